"""LT-SFT: fine-tune a few entries of the weights, found like a lottery ticket, and add up what several runs learned.

"Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (arXiv:2110.07560), section 3. theta_0 are the N maskable
numbers of the pretrained model:

    phase 1:  theta_0 -> theta_1                all of them train
    mask                                        the K = density * N entries with the largest |theta_1 - theta_0|
    rewind:   theta_0 again, and the optimizer forgets
    phase 2:  theta_0 -> theta_2                gradients outside the mask are zeroed
    phi = theta_2 - theta_0                     at most K numbers that are not zero

    theta_0 + phi_language + phi_task           a task in a language that it was never trained in

A run that begins with a mask (a second `stack.train`) goes on in phase 2, from theta_2 and without a rewind.
Either phase may pull towards theta_0: loss + l1 * mean |theta - theta_0|. `take` reads phi from a trained stack;
`Skills` adds and subtracts such differences on any model. Sums are made anew from theta_0, in one order and in float64,
so neither the order of adding nor what was there before leaves a trace.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, field_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, Targets, TrainStep, hookimpl
from peftx.errors import PeftxError


class LtSftConfig(PluginConfig):
    """Options of LT-SFT; the paper takes 4% of the model for a language and 8% for a task."""

    density: float = Field(
        0.08, gt=0, le=1, description="K / N, share of the maskable numbers that phase 2 trains"
    )
    phase1: float = Field(
        0.5,
        ge=0,
        description="share of a run's steps in phase 1; whole from 1 on: how many; 0: none, and a random mask",
    )
    l1: float = Field(
        0.0, ge=0, description="weight of mean |theta - theta_0| in the loss (0.1 for languages)"
    )
    targets: Targets = Field(
        Targets("all embedding"), description="layers whose weights and biases are maskable"
    )
    dense: Targets | None = Field(
        None, description="layers that train without a mask and are kept whole: a new task head, 'classifier'"
    )

    @field_validator("phase1")
    @classmethod
    def _share_or_steps(cls, phase1: float) -> float:
        if phase1 >= 1 and phase1 != int(phase1):
            raise ValueError("from 1 on it is a number of steps, and must be whole")
        return phase1


class Mask(nn.Module):
    """The K entries that phase 2 trains, as positions among all N, sorted; -1 before they are chosen.

    Args:
        number: K.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.full((number,), -1, dtype=torch.int64))  # [K]

    def split(self, sizes: list[int]) -> list[Tensor]:
        """For parameters of these sizes, the entries of each: int64 [k_i], sum k_i = K."""
        edges = torch.tensor([0, *sizes], device=self.chosen.device).cumsum(0)
        cuts = torch.searchsorted(self.chosen, edges).tolist()
        return [self.chosen[a:b] - edge for a, b, edge in zip(cuts, cuts[1:], edges.tolist(), strict=False)]


class Trained(NamedTuple):
    """A parameter of the base in its place, and its theta_0 (the base's own tensor, no copy)."""

    module: nn.Module
    name: str
    start: Tensor

    @property
    def theta(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # a bundle that is loaded puts new ones here

    @property
    def theta_0(self) -> Tensor:
        return self.start.to(self.theta)  # where it is now, and as a cast of the model rounds it


class LtSft(Plugin):
    """See the module."""

    Config = LtSftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS}
    architectures = ("mixtral",)
    example = {"phase1": 1}  # a loop of one's own does not know its length, of which 0.5 is a half
    config: LtSftConfig

    sparse: dict[str, Trained]
    """What is maskable, by the parameters' names."""
    dense: dict[str, Trained]
    """What trains without a mask."""
    mask: Mask
    waiting: Sequence[RemovableHandle] = ()
    """What is to run around the optimizer's next step."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.sparse = train(model, self.config.targets)
        self.dense = {} if self.config.dense is None else train(model, self.config.dense)
        number = sum(self.sizes())
        kept = int(self.config.density * number)
        if kept == 0:
            raise PeftxError(
                f"lt-sft: density {self.config.density:g} of {number} numbers is less than one",
                hint=f"density at least {1 / number:.2g}",
            )
        self.mask = model.keep("mask", Mask(kept))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if step.index == 0 and step.first_micro:  # a run begins
            self.state.pop("rewound", None)
        if not self.chosen():
            first = self.first_of_phase_2(step)
            if step.index == first and step.first_micro:
                self.rewind(step.stack.seed)
                self.state["rewound"] = first  # a run that is resumed, or lengthened, does not rewind again
            elif step.index >= first:
                raise PeftxError(
                    "lt-sft: phase 2 without a mask", hint="start before it: at the rewind, or at step 0"
                )
        if self.config.l1:
            step.add_loss("l1", lambda _: self.distance(), weight=self.config.l1, over="step")
        if self.chosen():
            rewound = step.index == self.state.get("rewound")
            step.on_gradients(lambda _: self.before_update(rewound=rewound))
        return (yield)

    def chosen(self) -> bool:
        """Is there a mask: is it phase 2."""
        return bool(self.mask.chosen[0] >= 0)

    def first_of_phase_2(self, step: TrainStep) -> int:
        """Index of the step that starts from theta_0 again."""
        first = int(self.config.phase1)
        if 0 < self.config.phase1 < 1:
            if step.total is None:
                raise PeftxError(
                    f"lt-sft: phase1 = {self.config.phase1:g} of a run whose length is not known",
                    hint="phase1 as a number of steps, or stack.train",
                )
            first = max(1, round(self.config.phase1 * step.total))
        if step.total is not None and first >= step.total:
            raise PeftxError(
                f"lt-sft: phase1 = {self.config.phase1:g} takes {first} of the run's {step.total} steps, and none "
                "is left for phase 2",
                hint=f"more than {first} steps" if step.total < 2 else "more steps, or phase1 = 0.5 for half",
            )
        return first

    def sizes(self) -> list[int]:
        """Numbers in each maskable parameter; N together."""
        return [place.start.numel() for place in self.sparse.values()]

    @torch.no_grad()
    def rewind(self, seed: int) -> None:
        """Choose the mask, go back to theta_0, and let the optimizer forget."""
        if self.config.phase1:
            moved = [(place.theta - place.theta_0).abs().flatten() for place in self.sparse.values()]
            scores = torch.cat([m.float() for m in moved])  # [N]
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"lt-sft:{seed}".encode()))
            scores = torch.rand(sum(self.sizes()), generator=generator)
        self.mask.chosen.copy_(scores.topk(len(self.mask.chosen)).indices.sort().values)
        places = [*self.sparse.values(), *self.dense.values()]
        for place in places:
            place.theta.copy_(place.theta_0)

    def before_update(self, *, rewound: bool) -> None:
        """Zero every gradient outside the mask; the optimizer forgets phase 1, and moves nothing outside."""
        for place, entries in zip(self.sparse.values(), self.mask.split(self.sizes()), strict=True):
            gradient = place.theta.grad
            if gradient is not None:
                kept = torch.zeros_like(gradient).flatten()
                kept[entries] = gradient.flatten()[entries]
                place.theta.grad = kept.view_as(gradient)
        for hook in self.waiting:
            hook.remove()  # of a step without an update
        own = [place.theta for place in (*self.sparse.values(), *self.dense.values())]
        waiting = [once(register_optimizer_step_post_hook, own, lambda _: self.hold())]
        if rewound:
            waiting.append(
                once(register_optimizer_step_pre_hook, own, lambda optimizer: forget(optimizer, own))
            )
        self.waiting = waiting

    @torch.no_grad()
    def hold(self) -> None:
        """theta_0 outside the mask, to the bit: a weight decay needs no gradient."""
        for place, entries in zip(self.sparse.values(), self.mask.split(self.sizes()), strict=True):
            kept = place.theta.flatten()[entries]
            place.theta.copy_(place.theta_0)
            place.theta.view(-1)[entries] = kept

    def distance(self) -> Tensor:
        """mean |theta - theta_0| over the maskable numbers, 0-d float32."""
        sums = [
            (place.theta - place.theta_0).abs().sum(dtype=torch.float32) for place in self.sparse.values()
        ]
        return torch.stack(sums).sum() / sum(self.sizes())


def train(model: ModelView, targets: Targets) -> dict[str, Trained]:
    """Let the base's parameters on these sites train; by name."""
    found: dict[str, Trained] = {}
    for site in {site.path: site for site in model.sites(targets) if site.kind != "block"}.values():
        known = {id(place.theta) for place in found.values()}  # a head tied to the embedding trains once
        own = {n: p.detach() for n, p in site.module.named_parameters(recurse=False) if id(p) not in known}
        if own:
            site.train(*own)
            found |= {f"{site.path}.{name}": Trained(site.module, name, start) for name, start in own.items()}
    return found


def once(
    register: Callable[[Any], RemovableHandle],
    parameters: list[nn.Parameter],
    action: Callable[[Optimizer], None],
) -> RemovableHandle:
    """Run `action` around the next step of the optimizer that holds these parameters, whoever calls it."""
    known = {id(p) for p in parameters}

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            handle.remove()
            action(optimizer)

    handle = register(hook)
    return handle


def forget(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        optimizer.state.pop(p, None)


# -- differences, and what is built of them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Skill:
    """phi, and what was trained beside it without a mask."""

    sparse: dict[str, tuple[Tensor, Tensor]]
    """Parameter -> positions, int64 [k], sorted, and differences, float64 [k], none of them zero."""
    dense: dict[str, Tensor]
    """Parameter -> its value."""

    def __len__(self) -> int:
        return sum(len(values) for _, values in self.sparse.values())

    def save(self, path: str | Path) -> Path:
        """One safetensors file: `<parameter>:indices`, `<parameter>:values`, `<parameter>:dense`."""
        tensors = {f"{name}:dense": value for name, value in self.dense.items()}
        for name, (indices, values) in self.sparse.items():
            tensors |= {f"{name}:indices": indices, f"{name}:values": values}
        save_file(tensors, path, metadata={"lt-sft": json.dumps({"format": 1, "numbers": len(self)})})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Skill:
        with safe_open(path, framework="pt") as file:
            if "lt-sft" not in (file.metadata() or {}):
                raise PeftxError(f"lt-sft: {path} holds no skill", hint="a file that `Skill.save` wrote")
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no iterator
        names = [key.removesuffix(":indices") for key in found if key.endswith(":indices")]
        return cls(
            {name: (found[f"{name}:indices"], found[f"{name}:values"]) for name in names},
            {key.removesuffix(":dense"): value for key, value in found.items() if key.endswith(":dense")},
        )


@torch.no_grad()
def take(stack: Stack, *, id: str = "lt-sft") -> Skill:
    """phi = theta_2 - theta_0 of a trained stack, on the CPU.

    Raises:
        PeftxError: the plugin `id` is not LT-SFT, or still in phase 1.
    """
    plugin = stack.plugins.get(id)
    if not isinstance(plugin, LtSft):
        raise PeftxError(f"lt-sft: no LT-SFT has the id '{id}'", hint=f"ids: {', '.join(stack.plugins)}")
    if not plugin.chosen():
        raise PeftxError(
            "lt-sft: the mask is not chosen, so the difference is dense", hint="train through phase 2"
        )
    sparse = {}
    for name, place in plugin.sparse.items():
        if place.start.is_meta:
            raise PeftxError(
                "lt-sft: this bundle came without theta_0", hint="peftx.load(..., model=the base)"
            )
        difference = (place.theta.double() - place.theta_0.double()).flatten().cpu()
        indices = difference.nonzero().flatten()
        if len(indices):
            sparse[name] = (indices, difference[indices])
    return Skill(sparse, {name: place.theta.detach().cpu().clone() for name, place in plugin.dense.items()})


class Skills:
    """theta_0 and the skills that are added to it, in a model.

    Args:
        model: any model with parameters of the skills' names; they are changed in place. For a stack, its `model`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: dict[str, Skill] = {}
        self._start: dict[str, Tensor] = {}

    def add(self, name: str, skill: Skill) -> None:
        """theta + phi; a dense parameter is replaced.

        Raises:
            PeftxError: the name is taken, the model lacks a parameter, or two skills bring one head; nothing changes.
        """
        if name in self.active:
            raise PeftxError(f"lt-sft: a skill '{name}' is there already", hint="subtract it first")
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for key in (*skill.sparse, *skill.dense):
            last = int(skill.sparse[key][0][-1]) if key in skill.sparse else skill.dense[key].numel() - 1
            size = own[key].numel() if key in own else 0
            if last >= size:
                raise PeftxError(
                    f"lt-sft: skill '{name}' changes number {last} of {key}, which has {size} in this model",
                    hint="add it to the architecture that it was trained on",
                )
        for other, known in self.active.items():
            if both := sorted(known.dense.keys() & skill.dense.keys()):
                raise PeftxError(
                    f"lt-sft: skills '{other}' and '{name}' both bring {both[0]}", hint="keep one head"
                )
        self.active[name] = skill
        self._sum(skill)

    def subtract(self, name: str) -> None:
        """theta - phi: what theta_0 and the other skills give, to the bit."""
        if name not in self.active:
            raise PeftxError(
                f"lt-sft: no skill '{name}'", hint=f"there are: {', '.join(self.active) or 'none'}"
            )
        self._sum(self.active.pop(name))

    @torch.no_grad()
    def _sum(self, changed: Skill) -> None:
        """theta_0 + sum of phi, in float64 and in the order of the names, where `changed` has numbers."""
        for key in (*changed.sparse, *changed.dense):
            path, _, leaf = key.rpartition(".")
            p = self.model.get_submodule(path)._parameters[leaf]  # a property may stand before it
            start = self._start.setdefault(key, p.detach().clone())
            total = start.double().flatten()
            for name in sorted(self.active):
                skill = self.active[name]
                if key in skill.dense:
                    total = skill.dense[key].to(p.device).double().flatten()
                if key in skill.sparse:
                    indices, values = (t.to(p.device) for t in skill.sparse[key])
                    total = total.index_add(0, indices, values)  # not in place: float64's is the start itself
            p.copy_(total.view_as(p))
