"""CoFiTune: one module of a range of layers trains, softly where the model's versatility lies.

"Balancing Speciality and Versatility: a Coarse to Fine Framework for Supervised Fine-tuning Large Language Model"
(arXiv:2404.10306). Coarse: of N layers those in a range of depth train, there one kind of module, and the rest keeps
its bits. `climb` finds both as the paper does: of the candidates of a level, each trained alone, the one with the best

    unified score = speciality + versatility

is kept, first of the ranges, then of the modules in that range; both scores of all are told. What it found most often
is the default.

Fine: gates m = 1 stand on heads' outputs, on inputs of the MLP's down projection and on its outputs, in each layer.
Before the first step the base reads general texts twice, with dropout p on what attention and MLP give, so that words
to come have probabilities p_1 and p_2:

    J = sum over tokens of dKL(p_1 || p_2) / dm         both passes depend on m
    I = |tanh((J - mean) / std)|                        over the gates of a kind in one layer; in [0, 1]
    I = max over sources of texts

The gradient of what trains is multiplied by 1 - I, row by row (weight and bias), and rows of I = 1 keep their bits:

    up and gate projection, row j: 1 - I_j      down, row o: 1 - I_o      q, k, v, rows of head h: 1 - I_h

where k and v serve several heads of q, by the largest I_h of these. The forward pass is untouched. Factors of J, the
paper's temperature T = 0.1 and its division by the number of tokens, cancel in I.

An optimizer that divides by the size of gradients, as Adam does, undoes a constant factor of theirs. With `scale:
update` what the optimizer did to a row is multiplied by 1 - I instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import dropout

from peftx import BoundSite, Claim, ModelView, Plugin, PluginConfig, Targets, TrainStep, hookimpl
from peftx.engines.training.base import base_alone
from peftx.errors import ArchitectureError, ConflictError, TrainingError
from peftx.kernel.modes import eval_mode
from peftx.kernel.seeds import seeded
from peftx.toolkits.injecting import at_rates

Depth = tuple[float, float]
Key = tuple[int | None, str, str]
"""Of gates: layer, role of the module that they stand on, and its side, `in` or `out`."""

QUARTERS = ((0, 4), (0, 1), (1, 2), (0, 2), (2, 3), (1, 3), (3, 4), (2, 4))
RANGES: tuple[Depth, ...] = tuple((low / 4, high / 4) for low, high in QUARTERS)
MODULES = ("attention mlp", "attention", "mlp", "mlp.up,down", "mlp.up", "mlp.down")
HEADS = ("attention.o", "in")
GATES = {
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), HEADS),
    **dict.fromkeys(("mlp.up", "mlp.gate"), ("mlp.down", "in")),
    "mlp.down": ("mlp.down", "out"),
}
"""Role and side of the module whose gates the rows of a role go by."""


class CofituneConfig(PluginConfig):
    """Options of CoFiTune. The learning rate is that of full tuning."""

    targets: Targets = Field(Targets("mlp.up,down"), description="modules that train, inside of the range")
    depth: tuple[float, float] = Field(
        (0.25, 0.5), description="range of layers that train, from and to, as shares of the model's depth"
    )
    texts: tuple[str, ...] = Field(
        ("general",), min_length=1, description="sources of rows that importance is measured on"
    )
    rows: int = Field(32, ge=1, description="rows of each source that are read for it")
    dropout: float = Field(0.003, gt=0, lt=1, description="p, in the two passes over a text")
    scale: Literal["gradient", "update"] = Field(
        "gradient", description="1 - I multiplies the gradient, or what the optimizer made of it"
    )

    @field_validator("depth")
    @classmethod
    def _is_a_range(cls, depth: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= depth[0] < depth[1] <= 1:
            raise ValueError("depth goes up, inside of 0 to 1, as in (0.25, 0.5)")
        return depth


class Soft(nn.Module):
    """1 - I of a module's output features, `kept` [out] float32; 0 of those that do not train."""

    kept: Tensor

    def __init__(self, out: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(out))


class Cofitune(Plugin):
    """See the module.

    Attributes:
        state: `measured`: true once importance is known; it is in the bundle then, and not measured again.
    """

    Config = CofituneConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS, Claim.NEEDS_MASK, Claim.TAKES_WEIGHTS,
    }  # fmt: skip
    architectures = ("phi3", "bloom")
    refuses = {"bert": "it is no decoder", "t5": "it is no decoder"}
    example = {"dropout": 0.2}
    sources = {"general": ({"text": "Snow is white."}, {"text": "Two and two are four, and one is less."})}
    config: CofituneConfig

    def __init__(self, config: CofituneConfig | None = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        example = type(self).sources["general"]
        self.sources = {name: example for name in self.config.texts if name != "train"}  # type: ignore[misc]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if list(model.towers) != ["decoder"]:
            raise ArchitectureError(
                f"cofitune: {model.config.model_type} is no decoder, and importance is of words to come",
                hint="Llama, Qwen or GPT-2 is one",
            )
        first, behind = (round(share * model.num_layers) for share in self.config.depth)
        first = min(first, model.num_layers - 1)
        self.sites = model.linears(f"{self.config.targets} layers={first}-{max(first + 1, behind) - 1}")
        if odd := [site for site in self.sites if site.kind != "linear"]:
            kind = ConflictError if odd[0].kind == "quantized" else ArchitectureError
            raise kind(
                f"cofitune: {odd[0].path} ({odd[0].kind}) is no single matrix of numbers whose rows could train",
                hint="a model that is no mixture of experts, with cofitune before what quantizes it",
            )
        one = [s.path for s in self.sites if GATES.get(s.role) == HEADS and model.heads_of(s).heads == 1]
        if one:
            raise ArchitectureError(
                f"cofitune: the attention of {one[0]} has one head, whose importance is that of none",
                hint="targets of the MLP",
            )
        self.ends = [site for site in model.anatomy.sites if site.role in ("attention.o", "mlp.down")]
        self.heads_of = model.heads_of
        self.turned = {site.path for site in self.sites if site.turned}
        sizes = {s.path: s.out_features if s.rows is None else s.rows.total for s in self.sites}
        self.places = {path: model.train(f"re:^{re.escape(path)}$") for path in sizes}
        self.soft = {
            path: model.keep(path.replace(".", "-"), Soft(out), full_precision=True)
            for path, out in sizes.items()
        }

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if "measured" not in self.state:
            self.measure(step)
        soft: list[tuple[nn.Parameter, Tensor]] = []  # what trains, and 1 - I in a shape that goes over it
        for path, places in self.places.items():
            for place in places.values():
                kept = self.soft[path].kept.to(place.theta)
                row = kept if place.theta.ndim == 1 or path in self.turned else kept[:, None]
                soft.append((place.theta, row))
                if not row.all():
                    place.restrict((row > 0).expand_as(place.theta))

        def soften(_: object) -> None:
            for p, row in soft:
                if p.grad is not None:
                    p.grad *= row

        if self.config.scale == "gradient":
            step.on_gradients(soften)
        else:
            at_rates(step, soft)
        return (yield)

    def measure(self, step: TrainStep) -> None:
        """Settle how softly each row trains.

        Raises:
            PeftxError: gates have no importance that could be compared.
        """
        importance = self.importance(step)
        for site in self.sites:
            kept = self.soft[site.path].kept
            rows = torch.arange(len(kept), device=kept.device)
            rows = rows if site.rows is None else site.rows.take(rows)
            kept[rows] = 1.0
            if (key := key_of(site)) is None:
                continue
            own = importance[key]
            if not own.isfinite().all():
                raise TrainingError(
                    f"cofitune: the importance of {site.path} cannot be compared among its {len(own)} gates",
                    hint="more texts, a larger dropout, or a model whose outputs are finite",
                )
            if site.role in ("attention.k", "attention.v"):
                own = own.view(self.heads_of(site).kv_heads, -1).amax(1)
            kept[rows] -= own.repeat_interleave(len(rows) // len(own))
        self.state["measured"] = True

    def importance(self, step: TrainStep) -> dict[Key, Tensor]:
        """I of the gates that rows which train go by, [gates] float32."""
        stack, device, p = step.stack, step.model.device, self.config.dropout
        gates: dict[Key, Tensor] = {}
        best: dict[Key, Tensor] = {}
        with base_alone(stack), eval_mode(step.model), torch.enable_grad(), ExitStack() as exits:
            for site in self.ends:
                count = self.heads_of(site).heads if site.role == "attention.o" else site.in_features
                m, n = (torch.ones(k, device=device, requires_grad=True) for k in (count, site.out_features))
                gates |= {(site.layer, site.role, "in"): m, (site.layer, site.role, "out"): n}
                before = site.module.register_forward_pre_hook(lambda _, x, m=m: (gated(x[0], m),))
                after = site.module.register_forward_hook(lambda _, x, y, n=n: dropout(gated(y, n), p))
                exits.callback(before.remove)
                exits.callback(after.remove)
            gates = {key: gates[key] for site in self.sites if (key := key_of(site)) is not None}
            for name in self.config.texts:
                with seeded(stack.seed, f"{stack.id_of(self)}:{name}"):
                    for batch in step.batches_of(name, self.config.rows):
                        kl(step.model, batch).backward(inputs=list(gates.values()))
                for key, m in gates.items():
                    best[key] = normalised(m.grad).maximum(best.get(key, torch.zeros_like(m)))  # type: ignore[arg-type]
                    m.grad = None
        return best


def key_of(site: BoundSite) -> Key | None:
    """The gates that a matrix's rows go by, if any."""
    return (site.layer, *GATES[site.role]) if site.role in GATES else None


def kl(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """KL(p_1 || p_2) of two passes, the sum over tokens that are no pads, 0-d float32."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    real = batch["attention_mask"].bool()
    p_1, p_2 = (model(**inputs).logits[real].float().log_softmax(-1) for _ in range(2))
    return (p_1.exp() * (p_1 - p_2)).sum()


def normalised(J: Tensor) -> Tensor:
    """|tanh| of what is standardised over the gates of one kind in one layer, in [0, 1]."""
    return ((J - J.mean()) / J.std()).tanh().abs()


def gated(x: Tensor, m: Tensor) -> Tensor:
    """x [..., d] times m [gates], each gate over d / gates numbers that stand together."""
    return x * m.to(x.dtype).repeat_interleave(x.shape[-1] // len(m))


@dataclass(frozen=True)
class Candidate:
    """A place that was tried, and both of its scores: more is better."""

    targets: Targets
    depth: Depth
    speciality: float
    versatility: float

    @property
    def unified(self) -> float:
        return self.speciality + self.versatility


@dataclass(frozen=True)
class Climb:
    """All places that a search tried, in order."""

    tried: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """That of the largest unified score, the first of equal ones; a model that diverged is none.

        Raises:
            TrainingError: all did.
        """
        finite = [each for each in self.tried if math.isfinite(each.unified)]
        if not finite:
            raise TrainingError(
                f"climb: none of {len(self.tried)} candidates has scores that are finite",
                hint="a lower learning rate, and scores that are numbers, as minus the log of the perplexity",
            )
        return max(finite, key=lambda each: each.unified)

    def table(self) -> str:
        """Markdown, a line for each candidate, the best one in bold."""
        lines = [
            "| targets | depth | speciality | versatility | unified |",
            "| --- | --- | --- | --- | --- |",
        ]
        for each in self.tried:
            name = f"**{each.targets.text}**" if each is self.best else each.targets.text
            low, high = each.depth
            scores = " | ".join(f"{s:.4f}" for s in (each.speciality, each.versatility, each.unified))
            lines.append(f"| {name} | {low:.0%} to {high:.0%} | {scores} |")
        return "\n".join(lines)


def climb(score: Callable[[Targets, Depth], tuple[float, float]]) -> Climb:
    """The paper's search for `targets` and `depth`: first for a range, then for a module in the best one.

    Args:
        score: trains a model in which these alone train, and gives its speciality and its versatility. It is asked once
            for each pair.

    Raises:
        TrainingError: no range of layers has finite scores.
    """
    whole, *parts = map(Targets, MODULES)
    ranges = Climb(tuple(Candidate(whole, depth, *score(whole, depth)) for depth in RANGES))
    depth = ranges.best.depth
    return Climb((*ranges.tried, *(Candidate(part, depth, *score(part, depth)) for part in parts)))
