"""Q-tuning: prompts of a stream of tasks stand in a queue of bounded size, from which principal components are kept.

"Q-Tuning: Queue-based Prompt Tuning for Lifelong Few-shot Language Learning" (arXiv:2404.14607). Tasks i = 0, 1, ...
come one after the other, a run each; the model is frozen. Of width d, with prompts of l rows and a queue of C rows:

    Q_i  = [kept ; theta_i]                kept: what is left of theta_0 .. theta_i-1, frozen; theta_i: [l, d]
    Q~_i = W_i o Q_i,  W_i = u_i v_i       u_i: [rows of Q_i, 1], v_i: [1, d], both 1 at first; o: entry by entry
    h_0  = [S ; Q~_i ; E(x)]               S: [s, d], one prefix for all tasks
    L    = - log p(y | h_0) + eta L_MR     theta_i, u_i, v_i, S train

    De-Q   Q_i-1 - mean = U Sigma V^T;  kept = Sigma V^T + mean, its first C - l rows   if Q_i-1 has more than these
    L_MR = E sp(-F(h(x | S), h(x | S_i-1))) + E sp(F(h(x | S), h(x' | S_i-1)))          i > 0

sp is softplus, F: R^2d -> R a critic of two layers that trains too, h(x | S) the mean of the last hidden states (the
encoder's, where there are two) over a text's tokens under S alone, S_i-1 the prefix as task i found it, x' the next
text of the batch. L_MR is the Jensen-Shannon bound on the information that S has in common with S_i-1.

When a task ends, [S ; Q~_i] is stored for it, and nothing that follows changes it: a task is answered by s + C rows at
most, as it was when it ended. Which task a text is of has to be known then.

Departures: of the paper, its abstract and reviews were at hand. The mean in De-Q, the signs of its components, what h
and F are, and that S is stored with each task are ours.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    VirtualTokens,
    hookimpl,
)
from peftx.errors import DataError
from peftx.kernel.call import Call
from peftx.kernel.heads import mean_of
from peftx.kernel.modes import eval_mode

TASK = "task"
"""The column that says which task a row is of, its place in the stream from 0."""
HIDDEN = 128
"""Numbers between the layers of the critic."""


class QTuningConfig(PluginConfig):
    """Options of Q-tuning; the paper trains T5-large, and BERT, on 16 to 1000 rows a task."""

    tasks: int = Field(ge=2, description="how many tasks the stream may have")
    length: int = Field(10, ge=1, description="l, rows of a task's prompt")
    queue: int = Field(
        10, ge=2, description="prompts that the queue has room for, the newest among them: C / l"
    )
    shared: int = Field(10, ge=1, description="s, rows of the prefix that all tasks share")
    eta: float = Field(0.01, ge=0, description="weight of the memory retention; 0: none")


def de_queue(Q: Tensor, rows: int) -> Tensor:
    """The first `rows` of Sigma V^T + mean, all d if d are fewer; Q: [rows of the queue, d].

    A component has the sign that its largest part in a row of Q has.
    """
    mean = Q.float().mean(0)
    U, sigma, Vt = torch.linalg.svd(Q.float() - mean, full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()[0]
    return ((sign * sigma)[:, None] * Vt + mean)[:rows].to(Q)


class QueuedPrompt(VirtualTokens):
    """[S ; Q~] of the task that a call is about.

    Args:
        theta, S: first values, [l, d] and [s, d]. rows: C. tasks: of the stream. call: of the model.
    """

    def __init__(self, theta: Tensor, S: Tensor, rows: int, tasks: int, call: Call) -> None:
        super().__init__(len(S) + rows)
        self.call = call
        self.theta, self.S = nn.Parameter(theta), nn.Parameter(S)
        self.u, self.v = nn.Parameter(theta.new_ones(rows, 1)), nn.Parameter(theta.new_ones(1, len(theta[0])))
        self.register_buffer("kept", theta.new_zeros(rows - len(theta), len(theta[0])))  # its last ones
        self.register_buffer("S_before", S.clone())
        self.register_buffer("counts", torch.tensor([len(S) + len(theta)] + [0] * (tasks - 1)))
        self.register_buffer("stored", theta.new_zeros(tasks - 1, self.most, len(theta[0])))  # so are these
        self.under: Literal["task", "S", "S_before"] = "task"

    @property
    def length(self) -> int:  # type: ignore[override]
        """Rows that a call has; outside of calls s + C, for which a text leaves room.

        Raises:
            DataError: the batch is of tasks with prompts of several lengths, as those have that did not fill the queue.
        """
        if self.call.shape is None:
            return self.most
        counts = set(self.counts[self.tasks()].tolist()) if self.under == "task" else {len(self.S)}
        if len(counts) > 1:
            said = f"q-tuning: the tasks of a batch have prompts of {sorted(counts)} rows"
            raise DataError(said, hint="ask for the first tasks of the stream apart")
        return counts.pop()

    @length.setter
    def length(self, rows: int) -> None:
        self.most = rows

    @property
    def newest(self) -> int:
        """The newest task."""
        return int(self.counts.count_nonzero()) - 1

    def of_task(self) -> Tensor:
        """[S ; Q~] of the newest task."""
        Q = (self.u @ self.v) * torch.cat((self.kept, self.theta))
        return torch.cat((self.S, Q[self.most - self.counts[self.newest] :]))

    def rows(self) -> Tensor:
        """[rows, d], or for each row of the batch."""
        if self.under != "task":
            return self.S if self.under == "S" else self.S_before
        if TASK not in self.call.batch:
            return self.of_task()
        own = self.of_task()
        own = F.pad(own, (0, 0, self.most - len(own), 0))
        known = torch.cat((self.stored[: self.newest], own[None]))
        return known[self.tasks(), self.most - self.length :]

    def tasks(self) -> Tensor:
        """Of each row of the batch; the newest where nobody says, and for one that is yet to come."""
        task: Tensor = self.call.batch.get(TASK, torch.tensor([self.newest])).to(self.S.device)
        if not bool(((task >= 0) & (task < len(self.counts))).all()):
            said = f"q-tuning: tasks {sorted(set(task.tolist()))}, and the stream has {len(self.counts)}"
            raise DataError(said, hint="a task's place in the stream, from 0")
        return task.clamp(max=self.newest)

    @torch.no_grad()
    def next_task(self, theta: Tensor) -> None:
        """Store the newest task's prompt, and let the next one begin at `theta`."""
        now, own = self.newest, self.of_task()
        self.stored[now, self.most - len(own) :] = own
        Q = torch.cat((self.kept, self.theta))[self.most - len(own) :]
        kept = Q if len(Q) <= len(self.kept) else de_queue(Q, len(self.kept))
        self.kept.zero_()[len(self.kept) - len(kept) :] = kept
        self.S_before.copy_(self.S)
        self.theta.copy_(theta)
        self.u.fill_(1)
        self.v.fill_(1)
        self.counts[now + 1] = len(self.S) + len(kept) + len(theta)


def retained(critic: nn.Module, h: Tensor, before: Tensor) -> Tensor:
    """L_MR of states under S and S_i-1, float32 [B, d] each."""
    joint, apart = (critic(torch.cat((h, other), 1)) for other in (before, before.roll(-1, 0)))
    return F.softplus(-joint).mean() + F.softplus(apart).mean()


def state(outputs: Any, mask: Tensor) -> Tensor:
    """h of each text, float32 [B, d]; an encoder's soft tokens stand in front."""
    hidden = outputs.get("encoder_last_hidden_state")
    hidden = outputs.hidden_states[-1] if hidden is None else hidden
    return mean_of(hidden[:, -mask.shape[1] :].float(), mask)


class QTuning(Plugin):
    """See the module."""

    Config = QTuningConfig
    claims = {
        Claim.BESIDE_WEIGHTS,
        Claim.VIRTUAL_TOKENS,
        Claim.NEEDS_GRADIENTS,
        Claim.NEEDS_MASK,
        Claim.READS_COLUMNS,
    }
    architectures = ("gemma",)
    exempt = {"every_parameter_gets_a_gradient": "the critic trains from the second task on"}
    example = {"tasks": 2, "length": 2, "queue": 2, "shared": 2}
    config: QTuningConfig
    prompt: QueuedPrompt

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config = self.config
        self.task = self.state.get("task", 0)
        self.draw = partial(model.embedded, config.length)
        S, rows = model.embedded(config.shared), config.queue * config.length
        self.prompt = QueuedPrompt(self.draw(), S, rows, config.tasks, model.call)
        model.column(TASK)
        model.prompt(self.prompt)
        if config.eta:
            layers = nn.Linear(2 * model.hidden_size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
            self.critic = model.keep("critic", nn.Sequential(*layers), full_precision=True)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Find out the task of the rows; the newest, where they do not say.

        Raises:
            DataError: they are of several tasks, or of one that is not this one's turn.
        """
        assert data.train is not None
        at = self.state.get("task", -1)
        found = set(data.train[TASK]) if TASK in data.train.column_names else {max(at, 0)}
        if len(found) > 1 or not found <= {at, at + 1} & {*range(self.config.tasks)}:
            said = (
                f"q-tuning: rows of tasks {sorted(found)}, and {at + 1} of {self.config.tasks} were learned"
            )
            raise DataError(
                said, hint="a run is one task: its place in the column `task`, from 0, none left out"
            )
        (self.task,) = found

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        """The term `retention` is L_MR; of a text that is alone in its batch there is none.

        Raises:
            DataError: a row says another task than the run's.
        """
        if self.task > self.prompt.newest:
            self.prompt.next_task(self.draw())
        self.state["task"] = self.task
        if not bool((step.batch.get(TASK, torch.tensor(self.task)) == self.task).all()):
            raise DataError(f"q-tuning: rows of another task than {self.task}", hint="a run is one task")
        if self.config.eta and self.task and len(step.batch["attention_mask"]) > 1:
            step.add_loss("retention", lambda _: self.retention(step), self.config.eta, over="rows")
        return (yield)

    def retention(self, step: TrainStep) -> Tensor:
        """L_MR of the batch."""
        mask, prompt = step.batch["attention_mask"], self.prompt
        try:
            prompt.under = "S_before"
            with eval_mode(step.model), torch.no_grad():
                before = state(step.forward(output_hidden_states=True), mask)
            prompt.under = "S"
            return retained(self.critic, state(step.forward(output_hidden_states=True), mask), before)
        finally:
            prompt.under = "task"
