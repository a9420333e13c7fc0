"""LAE: classes come task by task; an online module learns, an offline one accumulates, and both answer together.

"A Unified Continual Learning Framework with General Parameter-Efficient Tuning" (arXiv:2303.10070). The model is
frozen; theta_on is a small module in each of its first layers, C_t are the classes of task t, and z the logits of a
head over the classes of all tasks. No rows of earlier tasks are kept. One run of training is one task:

    learning      loss = - log softmax(z[C_t])[y]        of task t alone; from task 2 on theta_on rests in the first
                                                         share `frozen` of a run, while rows C_t of the head learn
    accumulation  theta_off = theta_on                   after each update of task 1
                  theta_off = a theta_off + (1 - a) theta_on      after each update of a later task
    ensemble      p = max(softmax(z_on), softmax(z_off))          class by class, over C_1 .. C_t; the largest answers

The modules, with trained scales s that start at 1, so that all of them adapt about as fast (x goes into a block of
attention or a matrix, y comes out):

    adapter  y + s (U gelu(D x + b_D) + b_U)             D: [m, d], U: [d, m]; U = 0, b = 0 at the start
    lora     y + s B A x                                 of keys and values; B = 0 at the start
    prefix   keys [s_K P_K; K], values [s_V P_V; V]      P_K, P_V: [m, heads x size of a head]
             a' = [a_P / sum a_P; a_K]                   a = [a_P; a_K], a query's softmax over all keys

a' takes back that sum a_P is near 0, by which a prefix learns slowly; a query's weights add up to 2 - sum a_P.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import (
    AttentionEdit,
    BoundSite,
    Claim,
    Delta,
    ModelView,
    Phase,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import CLASS_INDEX, ClassTexts, take_classes
from peftx.engines.training.step import swapped
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.heads import first_of, last_of
from peftx.toolkits.evaluation import head_answers


class LaeConfig(PluginConfig):
    """Options of LAE; the paper trains each task for 5 epochs with Adam at 2.8e-3 and batches of 24."""

    tasks: tuple[tuple[str, ...], ...] = Field(description="C_1, C_2, ..: the classes of each task, in order")
    module: Literal["adapter", "lora", "prefix"] = Field("adapter", description="theta")
    layers: int = Field(5, ge=1, description="how many layers, from the first on, have a module")
    size: int | None = Field(
        None, ge=1, description="m, of adapter and lora 5 if left out; rows of a prefix, 10 if left out"
    )
    decay: float = Field(0.9999, ge=0, le=1, description="a")
    frozen: float = Field(
        0.6, ge=0, lt=1, description="share of a later task's run in which theta_on rests (3 epochs of 5)"
    )

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, tasks: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        names = [name for task in tasks for name in task]
        if len(tasks) < 2:
            raise ValueError(f"{len(tasks)} task: LAE needs two at least, for one ls-llama has a head")
        if min(map(len, tasks)) < 2:
            raise ValueError("a task of fewer than two classes has nothing to tell apart: join it to another")
        if not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise ValueError("a class is empty or stands twice; each class is of one task")
        return tasks


class Input(Delta):
    """Notes x, what goes into a block of attention, until it is taken."""

    x: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.x = x
        return y

    def take(self) -> Tensor:
        x, self.x = self.x, None  # what holds a graph cannot be copied with the model
        assert x is not None
        return x


class Adapter(Delta):
    """y + s A(x), beside a block of attention [B, T, d]: on its last matrix.

    Args:
        width: d. size: m. seen: what notes x.
    """

    def __init__(self, width: int, size: int, seen: Input) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.s = nn.Parameter(torch.ones(()))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.seen = (seen,)  # in a tuple: no child of this module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.s * self.up(F.gelu(self.down(self.seen[0].take())))


class ScaledLora(Delta):
    """y + s B A x. It does not fold: with one of the two modules in the weights the other would be lost."""

    def __init__(self, site: BoundSite, size: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(size, site.in_features))
        self.B, self.s = nn.Parameter(torch.zeros(site.out_features, size)), nn.Parameter(torch.ones(()))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.s * F.linear(F.linear(x, self.A), self.B)


class Prefix(AttentionEdit):
    """m rows in front of keys and values, whose probabilities are made to add up to 1.

    Args:
        size: m. key, value: numbers of all heads, of a token.
    """

    behind: int
    """Keys behind these rows."""

    def __init__(self, size: int, key: int, value: int) -> None:
        super().__init__()
        self.P_K, self.P_V = (nn.Parameter(torch.rand(size, width) * 0.01) for width in (key, value))
        self.s_K, self.s_V = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.behind = key.shape[2]
        return self.before(key, self.s_K * self.P_K), self.before(value, self.s_V * self.P_V)

    @staticmethod
    def before(old: Tensor, P: Tensor) -> Tensor:
        rows = P.to(old).unflatten(-1, (old.shape[1], -1)).transpose(0, 1)  # [heads, m, size]
        return torch.cat((rows.expand(len(old), -1, -1, -1), old), 2)

    def probabilities(self, p: Tensor) -> Tensor:
        end = p.shape[-1] - self.behind  # rows of other plugins may stand in front
        start = end - len(self.P_K)
        own = p[..., start:end]
        own = own / own.sum(-1, keepdim=True).clamp_min(1e-12)
        return torch.cat((p[..., :start], own, p[..., end:]), -1)


class Offline(nn.Module):
    """theta_off, float32 at least: in half precision 1e-4 of a difference would be lost."""

    def __init__(self, values: Iterator[Tensor]) -> None:
        super().__init__()
        for number, value in enumerate(values):
            self.register_buffer(f"theta_{number}", value.detach().clone().float())


class Lae(Plugin):
    """See the module."""

    Config = LaeConfig
    claims = {Claim.IDENTITY_AT_START, Claim.NEEDS_GRADIENTS}
    refuses = {"t5": "the head reads one tower", "mamba": "it has no attention"}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    example = {"tasks": [["negative", "positive"], ["mixed", "none"]]}
    config: LaeConfig
    texts = ClassTexts("lae", missing="there is no head yet")
    task = 0

    def claimed(self) -> frozenset[Claim]:
        if self.config.module != "prefix":
            return self.claims
        return self.claims - {Claim.IDENTITY_AT_START} | {Claim.BESIDE_WEIGHTS, Claim.PREFIX_CACHE}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of each task where its classes begin and end among all."""
        return [*pairwise(accumulate(map(len, self.config.tasks), initial=0))]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.embedding()  # refuses what reads no tokens
        encoder, names = "encoder" in model.towers, [name for task in self.config.tasks for name in task]
        self.texts = self.texts.of(names, closed=encoder)
        self.head = model.head("head", len(names), pool=first_of if encoder else last_of)
        self.task = self.state.get("task", 0)
        self.modules = [*self.attached(model)]
        self.offline = model.keep("offline", Offline(self.online()), full_precision=True)

    def attached(self, model: ModelView) -> Iterator[nn.Module]:
        """theta_on."""
        config, kind = self.config, self.config.module
        size = config.size or (10 if kind == "prefix" else 5)
        sites = [s for s in model.attention_sites() if s.layer is not None and s.layer < config.layers]
        for at in sites:
            if kind == "prefix":
                if any("sink" in name for name, _ in at.module.named_parameters()):
                    said = f"{model.owner}: {model.config.model_type} has more than scores in its softmax"
                    raise ArchitectureError(said, hint="module: adapter or lora")
                heads = model.heads_of(at)
                edit = Prefix(size, heads.kv_heads * heads.head_dim, heads.kv_heads * heads.value_dim)
                at.attend(edit)
                yield edit
            elif kind == "lora":
                for role in ("attention.k", "attention.v"):
                    site = model.site(role, layer=at.layer)
                    site.check_rank(size)
                    yield site.attach(ScaledLora(site, size))
            else:
                # Not of queries: DeBERTa calls their matrix a second time, on positions.
                seen = model.site("attention.v", layer=at.layer).attach(Input())
                yield model.site("attention.o", layer=at.layer).attach(Adapter(model.hidden_size, size, seen))

    def online(self) -> Iterator[nn.Parameter]:
        """theta_on; looked up anew, since a bundle may put others in their place."""
        return (p for module in self.modules for p in module.parameters())

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Find out the task of the rows.

        Raises:
            DataError: they are of several tasks, of one class, or of a task that is not this one's turn.
        """
        self.texts.prepare(data, stack)
        assert data.train is not None
        found, id = set(data.train[CLASS_INDEX]), stack.id_of(self)
        tasks = [t for t, (start, end) in enumerate(self.spans) if any(start <= c < end for c in found)]
        at = self.state.get("task", -1)
        if len(tasks) > 1 or len(found) < 2:
            said = f"{id}: the rows have {len(found)} class(es) of {len(tasks)} task(s)"
            raise DataError(said, hint="a run is one task, with rows of two of its classes at least")
        if tasks[0] not in (at, at + 1):
            said = (
                f"{id}: these are rows of task {tasks[0] + 1}, and {at + 1} of {len(self.spans)} were learned"
            )
            raise DataError(said, hint="tasks in the order of `tasks`, and none again after the next one")
        self.task = tasks[0]

    def phases(self) -> Sequence[Phase]:
        later = self.task > 0 and self.config.frozen > 0
        return (Phase("frozen", self.config.frozen), Phase("tuned")) if later else ()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, target = take_classes(step.batch)  # [B]
        start, end = self.spans[self.task]
        self.state["task"] = self.task

        def loss() -> tuple[Tensor, Any]:
            z, outputs = self.head.read(step.forward, step.batch["attention_mask"])
            return F.cross_entropy(z[:, start:end], target - start), outputs

        def rest(parameters: list[nn.Parameter]) -> None:
            for p in self.online():
                p.grad = None  # and not 0, which momentum and weight decay would act beside

        step.replace_task_loss(loss, over="rows")
        if self.phases() and step.phase(self).name == "frozen":
            step.on_gradients(rest)
        before = [p.detach().clone() for p in self.head.parameters()]
        step.after_update(lambda optimizer: self.accumulate(before))
        return (yield)

    @torch.no_grad()
    def accumulate(self, head: list[Tensor]) -> None:
        """Let theta_off follow; rows of the head that are of other tasks are as they were, also under weight decay."""
        share = 1 - self.config.decay if self.task else 1.0
        for off, p in zip(self.offline.buffers(), self.online(), strict=True):
            off.lerp_(p.to(off), share)
        for p, old in zip(self.head.parameters(), head, strict=True):
            start, end = self.spans[self.task]
            p[:start], p[end:] = old[:start], old[end:]

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        """The larger of both modules' probabilities, of the classes up to the task that was trained last."""
        rows, seen = self.texts.rows(stack, texts), self.spans[self.state.get("task", 0)][1]

        def expert() -> Tensor:
            return torch.cat([*head_answers(stack, self.head, rows)])[:, :seen].softmax(-1)

        on = expert()
        with swapped([(p, off.to(p)) for p, off in zip(self.online(), self.offline.buffers(), strict=True)]):
            return self.texts.labels[:seen], torch.maximum(on, expert())
