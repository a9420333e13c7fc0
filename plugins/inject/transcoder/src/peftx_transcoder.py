"""TransCoder: what code tasks have in common is learned by a prefix that goes from task to task, each on a fresh model.

"TransCoder: Towards Unified Transferable Code Representation Learning Inspired by Human Skills" (arXiv:2306.07285). Of
each kind of attention (the encoder's, the decoder's, and the decoder's to the encoder) one network is shared by tasks:

    P        = W_2 tanh(W_1 E + b_1) + b_2      E: [l, d], W_1: [h, d], W_2: [widths of all keys and values, h]
    K' = [P_K ; K],  V' = [P_V ; V]             P_K, P_V: [heads, l, head size], the attention's own part of P

E is what the model as it comes makes of the token ids 0 .. l - 1: last hidden states of the encoder, or the only tower.
W and b are the knowledge; E stays. With theta all else that trains in the stack, theta_0 its start, and source tasks
t_1 .. t_n, n of them, in R rounds:

    (W, b), theta  <-  argmin of the loss on t_i, from (W, b), theta_0          for each round, for i = 1 .. n
    (W, b), theta  <-  argmin of the loss on the target, from (W, b), theta_0

So W and b alone go from task to task; what a task did to theta is undone when it ends, and the optimizer begins anew.
No second derivative is taken. What theta is, other plugins say: full-finetuning, as in the paper; lora; or none.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import (
    BoundSite,
    Claim,
    ModelView,
    Phase,
    Plugin,
    PluginConfig,
    TrainStep,
    hookimpl,
)
from peftx.engines.training.restarts import go_back, remember_start
from peftx.engines.training.updates import forget
from peftx.errors import ArchitectureError
from peftx.kernel.modes import eval_mode
from peftx.toolkits.injecting import NetworkPrefix, columns

TARGET = "target"


class TranscoderConfig(PluginConfig):
    """Options of TransCoder; the paper visits each source task with 10000 rows, at rate 5e-5."""

    tasks: tuple[str, ...] = Field(
        (), description="names of the source tasks: sources of rows, in order; none: the target alone"
    )
    rounds: int = Field(
        4, ge=1, description="R, visits of each source task; the paper has 2 for summaries and languages"
    )
    steps: int | None = Field(None, ge=1, description="steps of a visit; none: equal parts of the run")
    adapt: bool = Field(
        True, description="go on to the target, the run's own rows; else a run ends with the source tasks"
    )
    length: int = Field(
        32, ge=0, description="l, rows in front of each attention's keys and values; 0: plain tuning"
    )
    hidden: int = Field(32, ge=1, description="h, width of the networks")

    @field_validator("tasks")
    @classmethod
    def _are_sources(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) < len(tasks) or {TARGET, "train"} & set(tasks):
            raise ValueError("each source task has a name of its own, and none is 'target' or 'train'")
        return tasks


class Knowledge(nn.Module):
    """P of all attentions of one kind, [l, widths]: in each attention all of its keys, then all of its values.

    Args:
        E: what the network reads, [l, d]. hidden: h. widths: numbers of all keys and values.
    """

    def __init__(self, E: Tensor, hidden: int, widths: int) -> None:
        super().__init__()
        self.register_buffer("E", E)
        self.down, self.up = nn.Linear(E.shape[1], hidden), nn.Linear(hidden, widths)

    def forward(self, part: slice) -> Tensor:
        """The columns of one attention, [l, its width]."""
        return F.linear(self.down(self.E).tanh(), self.up.weight[part], self.up.bias[part])


class Transcoder(Plugin):
    """See the module."""

    Config = TranscoderConfig
    claims = {
        Claim.BESIDE_WEIGHTS, Claim.PREFIX_CACHE, Claim.NEEDS_GRADIENTS, Claim.REPLACES_LOSS, Claim.NEW_ROWS,
        Claim.RESTARTS,
    }  # fmt: skip
    architectures = ("bart", "gemma")
    refuses = {
        "vit": "it reads no tokens",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
    }
    example = {"tasks": ("first",), "rounds": 1, "steps": 1, "length": 3, "hidden": 4}
    sources = {
        "first": (
            {"prompt": "2 + 2 =", "completion": " 4"},
            {"prompt": "The sky is", "completion": " blue"},
        )
    }
    config: TranscoderConfig

    def phases(self) -> Sequence[Phase]:
        config = self.config
        visits = [f"{task} {r}" for r in range(1, config.rounds + 1) for task in config.tasks]
        visits = [] if self.state.get("sourced") else visits
        names = [*visits, TARGET] if config.adapt or not visits else visits
        share = config.steps or 1 / len(names)
        return [*(Phase(name, share) for name in names[:-1]), Phase(names[-1])]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, kind = self.config, model.config.model_type
        if model.module.main_input_name != "input_ids" or not {*model.towers} <= {"decoder", "encoder"}:
            raise ArchitectureError(f"{model.owner}: {kind} reads more than tokens", hint="a model of texts")
        if not model.restoring:
            self.state = {}
        E = encoded(model, config.length)
        kinds: dict[str, list[BoundSite]] = {}
        for site in model.attentions():
            kinds.setdefault(f"{site.tower}_{site.role}", []).append(site)
        for name, sites in kinds.items():
            parts = columns(model, sites)
            knowledge = model.keep(name, Knowledge(E.clone(), config.hidden, parts[-1].stop))
            for site, part in zip(sites, parts, strict=True):
                site.attend(NetworkPrefix(knowledge, part, model.call, f"{model.owner}.{site.path}"))
        known, asked = type(self).sources, () if self.state.get("sourced") else config.tasks
        self.sources = {task: known.get(task, ()) for task in asked}  # type: ignore[misc]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        span = step.phase(self)
        if span.name == TARGET:
            return (yield)
        known = remember_start(step, self, but=step.stack.id_of(self))
        step.batch = step.batch_of(span.name.rpartition(" ")[0])
        # The shares of a step's micro-batches are those of the target's rows, which these are not.
        step.replace_task_loss(partial(task_loss, step), over="step")
        if step.last_micro and step.index + 1 == span.end:
            step.after_update(partial(self.leave, step, known))
        return (yield)

    def leave(self, step: TrainStep, known: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """A task is over: all but the knowledge is as it was at first."""
        go_back(step, known)
        forget(optimizer, step.parameters())
        if step.phase(self).name == self.phases()[-2 if self.config.adapt else -1].name:
            self.state["sourced"], self.sources = True, {}  # type: ignore[misc]


def task_loss(step: TrainStep) -> tuple[Tensor, Any]:
    """The model's own loss."""
    outputs = step.forward()
    return outputs.loss, outputs


def encoded(model: ModelView, length: int) -> Tensor:
    """E; zeros where a bundle brings it, or there are no weights, or no rows. Soft tokens of plugins before are left
    out. The whole model runs, since what stands on it may ask for the call; of two towers the encoder is one."""
    like = model.embedding().weight
    if model.restoring or like.is_meta or not length:
        return like.new_zeros(length, model.hidden_size)
    reader = model.module.get_encoder() if model.config.is_encoder_decoder else model.module
    ids = torch.arange(length, device=like.device)[None]
    with eval_mode(model.module), torch.no_grad():
        return reader(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -length:].to(like)
