"""AdaLoRA: low-rank updates whose rank goes to the matrices where it matters, under one budget.

"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (arXiv:2303.10512). An update in the form of a
singular value decomposition:

    y = W x + s P L Q x           P: [out, r], L diagonal: [r], Q: [r, in]; L = 0 at the start, P and Q normal
    loss = task + gamma mean over all P, Q of (|P^T P - I|, |Q Q^T - I|)          Frobenius norms

After each update every trained number w has a sensitivity, its smoothed value, and how uncertain that is; a triplet of
a singular value and its two vectors has an importance:

    I  = |w dloss/dw|     I' = b1 I' + (1 - b1) I     U' = b2 U' + (1 - b2) |I - I'|     s(w) = I' U'
    S_i = s(L_i) + mean over j of s(P_ji) + mean over j of s(Q_ij)

Every few updates only the b(t) most important singular values of the whole model stay, and the others are set to 0 (and
may grow again until the next time). The budget b falls from the initial to the target rank of all matrices:

    warmup    b = b_0
    prune     b = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))**3      t_i, T - t_f: where the phase begins, ends
    final     b = b_T, and those that went stay 0

In the code Q, L and P have the names that PEFT gives them: A, E: [r, 1], and B.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import (
    Claim,
    LowRank,
    ModelView,
    PeftFormat,
    Phase,
    Plugin,
    PluginConfig,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.errors import AdapterError
from peftx.kernel.phases import Span
from peftx.peft_format import Settings, targets_of
from peftx.toolkits.injecting import LowRankDelta

Memory = dict[str, Tensor]
"""`path.A` and the like -> I' and U', [2, ...]."""


class AdaloraConfig(PluginConfig):
    """Options of AdaLoRA; the paper begins with 1.5 times the target rank."""

    rank: int = Field(8, ge=1, description="rank of a matrix in the end, on average")
    initial_rank: int = Field(12, ge=1, description="r, rank of every matrix at the start")
    alpha: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="alpha; the initial rank if left out, so s = alpha / r = 1",
    )
    warmup: float = Field(
        0.1,
        gt=0,
        description="steps before the first pruning: a share of the run's, or from 1 on their number",
    )
    prune: float = Field(
        0.4, gt=0, description="steps over which the budget falls, likewise; the rest is final"
    )
    every: int = Field(10, ge=1, description="steps from one pruning to the next")
    beta1: float = Field(0.85, ge=0, lt=1, description="b1, of the smoothed sensitivity")
    beta2: float = Field(0.85, ge=0, lt=1, description="b2, of its uncertainty")
    orthogonal: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="gamma, weight of the orthogonality of P and Q"
    )
    targets: Targets = Field(Targets("all"), description="linear layers to adapt")

    @model_validator(mode="after")
    def _falls(self) -> AdaloraConfig:
        if self.rank > self.initial_rank:
            raise ValueError(
                f"rank {self.rank} is more than initial_rank {self.initial_rank}, and ranks fall"
            )
        return self


class AdaloraDelta(LowRankDelta):
    """y + s B (E * A) x.

    Args:
        shape: of the weight, [..., out, in] (leading: stacked experts). rank: r. scale: s.

    Attributes:
        kept: [..., r, 1], bool: the singular values that the last pruning left.
    """

    full_precision = True  # small steps of P and Q, whose rows come to length 1, would be rounded away
    kept: Tensor

    def __init__(self, shape: tuple[int, ...], *, rank: int, scale: float) -> None:
        super().__init__()
        *batch, out_features, in_features = shape
        self.scale = scale
        self.A = nn.Parameter(torch.randn(*batch, rank, in_features) * 0.02)
        self.E = nn.Parameter(torch.zeros(*batch, rank, 1))
        self.B = nn.Parameter(torch.randn(*batch, out_features, rank) * 0.02)
        self.register_buffer("kept", torch.ones(*batch, rank, 1, dtype=torch.bool))

    def low_rank(self) -> LowRank:
        return LowRank(self.E * self.A, self.B, self.scale)

    def lengths(self) -> Tensor:
        """|Q Q^T - I| and |P^T P - I|, [2, ...]."""
        one = torch.eye(self.E.shape[-2], device=self.E.device)
        return torch.stack([torch.linalg.matrix_norm(M @ M.mT - one) for M in (self.A, self.B.mT)])


OF_TRAINING = ("tinit", "tfinal", "deltaT", "total_step", "lora_dropout", "init_lora_weights", "r")
"""Settings of PEFT that say nothing of an adapter as it is."""


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says; s = alpha / r with the rank at the start, also where ranks have fallen."""
    for name in OF_TRAINING:
        settings[name]
    rank, alpha = settings.get("init_r", 12), settings.get("lora_alpha", 8)
    shapes = settings.adapted("lora_A")
    if settings["rank_pattern"] is None and any(shape[0] != rank for shape in shapes.values()):
        raise AdapterError(
            f"adalora: the adapter's ranks are not its init_r, {rank}, and it has no rank_pattern"
        )
    return {
        "rank": min(settings.get("target_r", 8), rank),
        "initial_rank": rank,
        "alpha": float(alpha) if alpha > 0 else rank,  # as PEFT takes it
        "every": settings.get("deltaT", 1),
        "beta1": settings.get("beta1", 0.85),
        "beta2": settings.get("beta2", 0.85),
        "orthogonal": settings.get("orth_reg_weight", 0.5),
        "targets": targets_of(shapes),
    }


def settings_of(config: AdaloraConfig) -> dict[str, Any]:
    """For `adapter_config.json`, whose own training is over."""
    r = config.initial_rank
    return {
        "init_r": r,
        "target_r": config.rank,
        "lora_alpha": r + 1e-5 if config.alpha is None else config.alpha,  # PEFT divides by r + 1e-5
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
        "deltaT": config.every,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonal,
    }


def read(delta: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Triplets that are gone have no numbers in the file: here they are zeros that are not kept."""
    found, left = {}, tensors["E"].shape[0]
    for name, axis in (("A", 0), ("E", 0), ("B", 1)):
        whole = getattr(delta, name).new_zeros(getattr(delta, name).shape)
        if tensors[name].shape[axis] != left or left > whole.shape[axis]:
            return tensors  # of another model
        whole.narrow(axis, 0, left).copy_(tensors[name])
        found[name] = whole
    kept = delta.kept.clone().zero_()
    kept[:left] = True
    return {**found, "kept": kept}


def write(delta: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """What is kept."""
    kept = delta.kept[:, 0]
    return {"A": tensors["A"][kept], "E": tensors["E"][kept], "B": tensors["B"][:, kept]}


def ranks_of(deltas: Mapping[str, Any]) -> dict[str, Any]:
    """Which triplets of each matrix are kept, where some are gone."""
    kept = {f"{path}.lora_E": delta.kept[:, 0].tolist() for path, delta in deltas.items()}
    return {} if all(map(all, kept.values())) else {"rank_pattern": kept}


def prepare(plugin: Any, settings: Settings) -> None:
    """With ranks that have fallen it trains on as it is."""
    if settings["rank_pattern"] is not None:
        plugin.state["pruned"] = True


class Adalora(Plugin):
    """See the module."""

    Config = AdaloraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_GRADIENTS}
    architectures = ("mixtral", "mamba")
    config: AdaloraConfig
    peft = (
        PeftFormat(
            "ADALORA",
            tensors={"A": "lora_A", "E": "lora_E", "B": "lora_B"},
            divided={"B": 0},
            own=frozenset({"kept"}),
            options=options_of,
            settings=settings_of,
            read=read,
            write=write,
            of_deltas=ranks_of,
            prepare=prepare,
        ),
    )
    # The tiny Mamba has a matrix of rank 2; a loop of one's own does not know its length.
    example = {"rank": 1, "initial_rank": 2, "warmup": 1, "prune": 1, "every": 1}

    def phases(self) -> Sequence[Phase]:
        if self.state.get("pruned"):  # what has its ranks trains on with them
            return (Phase("final"),)
        return Phase("warmup", self.config.warmup), Phase("prune", self.config.prune), Phase("final")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.deltas: dict[str, AdaloraDelta] = {}
        r, alpha = self.config.initial_rank, self.config.alpha
        scale = 1.0 if alpha is None else alpha / (r + 1e-5)  # as the released code and PEFT have it
        for site in model.linears(self.config.targets):
            site.check_rank(r)
            self.deltas[site.key] = site.attach(AdaloraDelta(site.shape, rank=r, scale=scale))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        span, memory = step.phase(self), step.memory.setdefault(step.stack.id_of(self), {})
        if gamma := self.config.orthogonal:
            step.add_loss("orthogonality", lambda _: self.orthogonality(), gamma, over="step")
        step.after_update(lambda _: self.allocate(span, step.index + 1, memory))
        return (yield)

    def orthogonality(self) -> Tensor:
        """Mean of the norms, 0-d."""
        return torch.cat([delta.lengths().flatten() for delta in self.deltas.values()]).mean()

    @torch.no_grad()
    def allocate(self, span: Span, t: int, memory: Memory) -> None:
        """What follows update t, of the phase `span`."""
        last = span.name == "prune" and t == span.end
        prunes = last or (span.name == "prune" and t % self.config.every == 0)
        if span.name != "final" and not last:
            self.sense(memory)
        if prunes:
            self.choose(self.budget(span, t), memory)
        if last:
            self.state["pruned"] = True
            memory.clear()
        if prunes or span.name == "final":
            for delta in self.deltas.values():
                delta.E.masked_fill_(~delta.kept, 0)

    def budget(self, span: Span, t: int) -> int:
        """b(t) in the phase of pruning: singular values of all matrices."""
        assert span.end is not None
        b_0 = sum(delta.E.numel() for delta in self.deltas.values())
        b_T = b_0 // self.config.initial_rank * self.config.rank
        return int(b_T + (b_0 - b_T) * (1 - (t - span.first) / (span.end - span.first)) ** 3)

    def sense(self, memory: Memory) -> None:
        """I' and U' after this update."""
        for path, delta in self.deltas.items():
            for name, p in delta.named_parameters():
                smooth, unsure = memory.get(f"{path}.{name}", torch.zeros(2, *p.shape)).to(p)
                if p.grad is not None:  # else another plugin lets it rest in this step
                    now = (p * p.grad).abs()
                    smooth = smooth.lerp(now, 1 - self.config.beta1)
                    unsure = unsure.lerp((now - smooth).abs(), 1 - self.config.beta2)
                memory[f"{path}.{name}"] = torch.stack((smooth, unsure))

    def importance(self, path: str, memory: Memory) -> Tensor:
        """S, [..., r, 1]."""
        A, E, B = (memory[f"{path}.{name}"].to(self.deltas[path].E).prod(0) for name in "AEB")
        return E + A.mean(-1, keepdim=True) + B.mean(-2).unsqueeze(-1)

    def choose(self, budget: int, memory: Memory) -> None:
        """Keep the most important singular values of all matrices together."""
        deltas = list(self.deltas.values())
        scores = torch.cat([self.importance(path, memory).flatten() for path in self.deltas])
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, scores.topk(budget).indices, True)
        for delta, mask in zip(deltas, kept.split([delta.E.numel() for delta in deltas]), strict=True):
            delta.kept.copy_(mask.view_as(delta.kept))
