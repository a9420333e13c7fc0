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

import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, Targets, TrainStep, hookimpl
from peftx.engines.bundle.sparse import packed_at_most
from peftx.engines.training.updates import forget
from peftx.errors import FileError, ModelError, StackError, TrainingError
from peftx.kernel.phases import Phase
from peftx.kernel.trained import Trained
from peftx.toolkits.injecting import check_share


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
    """The K entries that phase 2 trains, as positions among all N, sorted; -1 before they are chosen."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.full((number,), -1, dtype=torch.int64))  # [K]


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

    @property
    def chosen(self) -> bool:
        """Is there a mask. Said in the state, since it decides about phases before there is a model."""
        return bool(self.state.get("chosen"))

    def phases(self) -> Sequence[Phase]:
        find = [Phase("find", self.config.phase1)] if self.config.phase1 and not self.chosen else []
        return [*find, Phase("tune")]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.sparse = model.train(self.config.targets)
        self.dense = {} if self.config.dense is None else model.train(self.config.dense)
        number = sum(self.sizes())
        check_share(f"{model.owner}: density", self.config.density, number, "the layers to mask")
        self.mask = model.keep("mask", Mask(int(self.config.density * number)))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        phase = step.phase(self)
        if phase.name == "tune" and not self.chosen:
            if not step.begins(self):
                raise TrainingError(
                    "lt-sft: phase 2 without a mask", hint="start at step 0, or at the rewind"
                )
            self.rewind(step.stack.seed)
        if self.config.l1:
            step.add_loss("l1", lambda _: self.distance(), weight=self.config.l1, over="step")
        if step.last_micro:
            self.restrict()
            if 0 < phase.first == step.index:  # phase 1 ended here
                step.before_update(lambda optimizer: forget(optimizer, [p.theta for p in self.places()]))
        return (yield)

    def places(self) -> list[Trained]:
        return [*self.sparse.values(), *self.dense.values()]

    def changed_bytes(self) -> int:
        """The mask's numbers with their places; what trains without a mask is stored whole."""
        sparse = packed_at_most([place.theta for place in self.sparse.values()], len(self.mask.chosen))
        return sparse + sum(place.theta.nbytes for place in self.dense.values())

    def sizes(self) -> list[int]:
        """Numbers in each maskable parameter; N together."""
        return [place.start.numel() for place in self.sparse.values()]

    @torch.no_grad()
    def rewind(self, seed: int) -> None:
        """Choose the mask, by moves or at random, and go back to theta_0."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"lt-sft:{seed}".encode()))
        moves = [(place.theta - place.theta_0).abs().flatten().float() for place in self.sparse.values()]
        scores = (
            torch.cat(moves) if self.config.phase1 else torch.rand(sum(self.sizes()), generator=generator)
        )
        self.mask.chosen.copy_(scores.topk(len(self.mask.chosen)).indices.sort().values)
        self.state["chosen"] = True
        for place in self.places():
            place.rewind()

    def restrict(self) -> None:
        """Train the mask's entries alone, or all before there is one; said anew in each step, since a bundle or a
        checkpoint may have brought another mask."""
        entries = torch.zeros(sum(self.sizes()), dtype=torch.bool, device=self.mask.chosen.device)  # [N]
        entries[self.mask.chosen] = True
        for place, own in zip(self.sparse.values(), entries.split(self.sizes()), strict=True):
            place.restrict(own.view_as(place.theta) if self.chosen else None)

    def distance(self) -> Tensor:
        """mean |theta - theta_0| over the maskable numbers, 0-d float32."""
        places = self.sparse.values()
        sums = [(place.theta - place.theta_0).abs().sum(dtype=torch.float32) for place in places]
        return torch.stack(sums).sum() / sum(self.sizes())


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
        save_file(tensors, path, metadata={"lt-sft": "1"})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Skill:
        with safe_open(path, framework="pt") as file:
            if "lt-sft" not in (file.metadata() or {}):
                raise FileError(f"lt-sft: {path} holds no skill", hint="a file that `Skill.save` wrote")
            found = {tuple(key.rsplit(":", 1)): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sparse = {n: (found[n, "indices"], value) for (n, kind), value in found.items() if kind == "values"}
        return cls(sparse, {name: value for (name, kind), value in found.items() if kind == "dense"})


@torch.no_grad()
def take(stack: Stack, *, id: str = "lt-sft") -> Skill:
    """phi = theta_2 - theta_0 of a trained stack, on the CPU.

    Raises:
        PeftxError: the plugin `id` is not LT-SFT, or still in phase 1.
    """
    plugin = stack.plugins.get(id)
    if not isinstance(plugin, LtSft):
        raise StackError(f"lt-sft: no LT-SFT has the id '{id}'", hint=f"ids: {', '.join(stack.plugins)}")
    if not plugin.chosen:
        raise StackError("lt-sft: the mask is not chosen, so phi is dense", hint="train through phase 2")
    sparse = {}
    for name, place in plugin.sparse.items():
        difference = (place.theta.double() - place.theta_0.double()).flatten().cpu()
        if len(indices := difference.nonzero().flatten()):
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
            raise StackError(f"lt-sft: a skill '{name}' is there already", hint="subtract it first")
        sizes = {key: p.numel() for key, p in self.model.named_parameters(remove_duplicate=False)}
        last = {key: int(indices[-1]) for key, (indices, _) in skill.sparse.items()}
        for key, place in (last | {key: p.numel() - 1 for key, p in skill.dense.items()}).items():
            size = sizes.get(key, 0)
            if place >= size or (key in skill.dense and place != size - 1):
                raise ModelError(
                    f"lt-sft: skill '{name}' changes number {place} of {key}, which has {size} in this model",
                    hint="add it to the architecture that it was trained on",
                )
        for other, known in self.active.items():
            for key in known.dense.keys() & skill.dense.keys():
                raise StackError(f"lt-sft: '{other}' and '{name}' both bring {key}", hint="keep one head")
        self.active[name] = skill
        self._sum(skill)

    def subtract(self, name: str) -> None:
        """theta - phi: what theta_0 and the other skills give, to the bit."""
        if name not in self.active:
            raise StackError(f"lt-sft: no skill '{name}'", hint=f"known: {', '.join(self.active) or 'none'}")
        self._sum(self.active.pop(name))

    @torch.no_grad()
    def _sum(self, changed: Skill) -> None:
        """theta_0 + sum of phi, in float64 and in the order of the names, where `changed` has numbers."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for key in (*changed.sparse, *changed.dense):
            total = self._start.setdefault(key, own[key].detach().clone()).double().flatten()
            for _, skill in sorted(self.active.items()):
                total = skill.dense.get(key, total).to(total).flatten()
                if key in skill.sparse:
                    indices, values = (t.to(total.device) for t in skill.sparse[key])
                    total = total.index_add(0, indices, values)  # not in place: float64's is the start itself
            own[key].copy_(total.view_as(own[key]))
