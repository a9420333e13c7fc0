"""RFC: models that each need other features than those before, and one model that has the features of all.

"Rich Feature Construction for the Optimization-Generalization Dilemma" (arXiv:2203.15516; its code calls it Bonsai).
Rows x have a class y. The network is an encoder and, on its states h, K linear heads of C classes, one for each round:

    z_k = W_k h(x) + b_k,    z = mean_k z_k                                                 z is again a linear head

    discovery 0     m_0 : min mean CE(z, y)
    discovery k     m_k : min max_g mean_(x in g) CE(z, y)          g: rows that m_j has right, or wrong; all j < k
    synthesis       min mean_k CE(z_k, argmax m_k(x))               half of it over rows where all m are right, or all
                                                                    are wrong, half over the others
    task            min mean CE(z, y), from the encoder and heads of the synthesis; or with the encoder frozen

The features of m_j fail on the rows that it has wrong, so only others make m_k good on all groups; the encoder of the
synthesis carries the features of all m. Discovery and synthesis each start where the run began. What of the encoder
trains, other plugins say: lora, full-finetuning, or none.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftx import Claim, ModelView, Phase, Plugin, PluginConfig, TrainingData, TrainStep, hookimpl
from peftx.engines.data import ClassTexts, check_labels, take_classes
from peftx.engines.training.restarts import forget_moments, go_back, remember_start
from peftx.kernel.heads import last_of, mean_of
from peftx.kernel.modes import as_it_was
from peftx.kernel.stack import Stack
from peftx.toolkits.evaluation import head_answers


class RfcConfig(PluginConfig):
    """Options of RFC; the paper has 2 rounds, or 3, and shorter training in the first one."""

    labels: list[str] = Field(["negative", "positive"], min_length=2, description="the classes")
    rounds: int = Field(2, ge=2, description="K, models to discover")
    first: float = Field(
        0.05, gt=0, description="steps of the first: a share of the run's, or from 1 on their number"
    )
    discovery: float = Field(0.3, gt=0, description="steps of each further one: the same")
    synthesis: float = Field(0.3, gt=0, description="steps of the synthesis: the same")
    frozen: bool = Field(False, description="train the head alone in the last phase")


def dro(each: Tensor, right: Tensor) -> Tensor:
    """The largest mean loss of a group: losses [B], and which rows each model has right, bool [k, B]."""
    groups = torch.cat((right, ~right))
    groups = groups[groups.any(1)]
    return ((groups * each).sum(1) / groups.sum(1)).max()


def halves(each: Tensor, right: Tensor) -> Tensor:
    """The mean over rows that all models have right, or all have wrong, and that over the others, in equal parts."""
    alike = right.all(0) | ~right.any(0)
    return torch.stack([each[rows].mean() for rows in (alike, ~alike) if rows.any()]).mean()


class Rfc(Plugin):
    """See the module."""

    Config = RfcConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.NEEDS_GRADIENTS, Claim.RESTARTS}
    takes, gives = ("classification",), {"classification": "tokenized"}
    labels_option = "labels"
    refuses = {"t5": "the head reads one tower", "vit": "it reads no texts"}
    example = {"first": 1, "discovery": 1, "synthesis": 1}  # a loop of one's own does not know its length
    config: RfcConfig
    texts = ClassTexts("rfc", missing="there are no heads yet")

    def phases(self) -> Sequence[Phase]:
        config, task = self.config, Phase("task")
        if self.state.get("rich"):
            return [task]
        found = [config.first] + [config.discovery] * (config.rounds - 1)
        discovered = [Phase(f"discovery {k}", share) for k, share in enumerate(found)]
        return [*discovered, Phase("synthesis", config.synthesis), task]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.embedding()  # refuses what reads no tokens
        labels, closed = check_labels(self.config.labels), "encoder" in model.towers
        if not model.restoring:
            self.state = {}
        self.texts = self.texts.of(labels, closed=closed)
        pool = mean_of if closed else last_of
        self.head = model.head("heads", self.config.rounds * len(labels), pool=pool)  # W, b

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        self.texts.prepare(data, stack)
        self.texts.check_several(data)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, y = take_classes(step.batch)
        phase, models = self.enter(step)
        m = []  # of each model its classes, [B]
        for values in models:
            with as_it_was(step.stack.ledger, values):
                m.append(self.read(step)[0].mean(1).argmax(1))
        if phase == "task" and self.config.frozen:
            step.on_gradients(self.freeze)

        def loss() -> tuple[Tensor, Any]:
            z, outputs = self.read(step)
            if phase == "synthesis":
                each = cross_entropy(z.mT, torch.stack(m, 1), reduction="none").mean(1)
                return halves(each, torch.stack(m) == y), outputs
            each = cross_entropy(z.mean(1), y, reduction="none")
            return dro(each, torch.stack(m) == y) if m else each.mean(), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def read(self, step: TrainStep) -> tuple[Tensor, Any]:
        """z of each head, [B, K, C], and what the model returned."""
        answers, outputs = self.head.read(step.forward, step.batch["attention_mask"])
        return self.apart(answers), outputs

    def apart(self, answers: Tensor) -> Tensor:
        """[B, K C] -> [B, K, C]."""
        return answers.unflatten(1, (self.config.rounds, -1))

    def freeze(self, parameters: list[nn.Parameter]) -> None:
        """All but the heads rest, whatever terms other plugins add; without a gradient nothing decays either."""
        for p in {*parameters} - {*self.head.parameters()}:
            p.grad = None

    @torch.no_grad()
    def enter(self, step: TrainStep) -> tuple[str, Sequence[dict[str, Tensor]]]:
        """The phase, and what m_0, m_1, ... trained."""
        phase = step.phase(self)
        if step.index == phase.first:
            forget_moments(step)
        if phase.name == "task":
            if step.begins(self):
                step.memory[step.stack.id_of(self)] = {}
                self.state["rich"] = True
            return phase.name, ()
        known = remember_start(step, self)
        models: list[dict[str, Tensor]] = known.setdefault("models", [])
        if step.begins(self) and phase.first > 0:
            models.append({name: x.clone() for name, x in step.stack.ledger.trained().items()})
            go_back(step, known)
        return phase.name, models

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        rows = self.texts.rows(stack, texts)
        return self.texts.labels, self.apart(torch.cat([*head_answers(stack, self.head, rows)])).mean(1)
