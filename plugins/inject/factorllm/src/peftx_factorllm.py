"""FactorLLM: each feed-forward block split into experts, with a router that the dense block teaches.

"FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models" (arXiv:2408.11855). The m hidden
units of a gated block are cut into E runs of equal length, with the rows of W_g and W_u and the columns of W_d of each:

    FFN_e(x) = W_d[:, e] (act(W_g[e] x) * W_u[e] x)          sum_e FFN_e(x) = FFN(x)
    y        = E/k sum_{e in Top_k(r)} FFN_e(x)              r = W_r x, W_r: [E, d] the router, float32

Only the k experts are computed. Nothing is copied: experts are slices of the block's own matrices, which train along.
The router learns from the dense block, with x_t and FFN_t(x_t) of the frozen model's own pass:

    D_e   = mean_d (FFN_e(x_t) - k/E FFN_t(x_t))^2           how badly expert e stands for its share
    q     = softmax(1 where D_e is among the k smallest, 0 elsewhere);   p = softmax(W_r x_t)
    L_PA  = mean_t sum_e p_e log(p_e / q_e);                 L_bal = mean_{t, e} [e in Top_k] p_e
    loss  = task + lambda_r L_PA + lambda_b L_bal            means over the layers too
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import BoundSite, Claim, Delta, ModelView, Plugin, PluginConfig, Stack, TrainStep, hookimpl
from peftx.errors import ArchitectureError, ConflictError, OptionError
from peftx.kernel.chain import is_ours
from peftx.kernel.members import Member
from peftx.kernel.parts import DeltaPart
from peftx.kernel.slots import kind_of

ROLES = ("mlp.gate", "mlp.up", "mlp.down")


class FactorLlmConfig(PluginConfig):
    """Options of FactorLLM; the paper has 4 experts, of which 2 or 1 are on."""

    experts: int = Field(4, ge=2, description="E, experts that a block is split into")
    top_k: int = Field(2, ge=1, description="k, experts that a token goes to")
    approximate: float = Field(
        0.05, ge=0, allow_inf_nan=False, description="lambda_r, weight of the loss that teaches routers"
    )
    balance: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="lambda_b, weight of the balance of experts"
    )
    straight: bool = Field(
        False, description="the task teaches routers too, as if the gate were the probability"
    )

    @model_validator(mode="after")
    def _fit(self) -> FactorLlmConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} of {self.experts} experts: at most all of them")
        return self


class Experts(Delta):
    """In the place of a feed-forward block: x [..., d] -> [..., d].

    Args:
        block: whose matrices the experts are slices of. names: of gate, up, down and activation in it. width: d.
        config: E, k, straight.
    """

    full_precision = True  # routing is decided by differences of scores

    def __init__(self, block: nn.Module, names: Sequence[str], width: int, config: FactorLlmConfig) -> None:
        super().__init__()
        self.block, self.names, self.config = (block,), tuple(names), config
        bound = 1 / math.sqrt(width)
        self.W_r = nn.Parameter(torch.empty(config.experts, width).uniform_(-bound, bound))

    def around(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = x.flatten(0, -2)  # [n, d]
        p = self.scores(rows).softmax(-1)  # [n, E]
        chosen = p.topk(self.config.top_k).indices  # [n, k]
        experts, y = self.experts(), torch.zeros_like(rows)
        for e in chosen.unique().tolist():
            at = (chosen == e).any(-1).nonzero()[:, 0]
            out = experts[e](rows[at])
            if self.config.straight:
                out = out * (1 + p[at, e] - p[at, e].detach()).to(out.dtype)[:, None]
            y = y.index_add(0, at, out.to(y.dtype))
        return (y * (self.config.experts / self.config.top_k)).view(x.shape)

    def scores(self, x: Tensor) -> Tensor:
        """r of tokens [n, d]: [n, E], float32 or more."""
        full = torch.promote_types(self.W_r.dtype, torch.float32)  # where the whole stack was cast
        return F.linear(x.to(full), self.W_r.to(full))

    def experts(self) -> list[Callable[[Tensor], Tensor]]:
        """FFN_e, [n, d] -> [n, d], of the matrices as they are now."""
        gate, up, down, activation = (getattr(self.block[0], name) for name in self.names)
        return experts_of((gate, up, down), activation, self.config.experts)

    def teach(self, x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """(L_PA, L_bal) for inputs [n, d] of the dense block and what it made of them."""
        E, k = self.config.experts, self.config.top_k
        with torch.no_grad():
            errors = torch.stack(
                [(f(x) - k / E * dense).float().square().mean(-1) for f in self.experts()], -1
            )
            q = hot(errors, k, largest=False).to(self.W_r).log_softmax(-1)  # [n, E]
        r = self.scores(x)
        p = r.log_softmax(-1)
        balance = (hot(r, k) * p.exp()).mean()
        return (p.exp() * (p - q)).sum(-1).mean(), balance


def experts_of(
    matrices: Sequence[Any], activation: Callable[[Tensor], Tensor], count: int
) -> list[Callable[[Tensor], Tensor]]:
    """The experts of a block whose gate, up and down are these; each has its share of the bias of down."""
    (g, u, d), (bg, bu, bd) = [m.weight for m in matrices], [m.bias for m in matrices]
    width = len(g) // count

    def expert(x: Tensor, part: slice) -> Tensor:
        x = x.to(g.dtype)
        gate, up = (F.linear(x, w[part], None if b is None else b[part]) for w, b in ((g, bg), (u, bu)))
        return F.linear(activation(gate) * up, d[:, part], None if bd is None else bd / count)

    return [partial(expert, part=slice(e * width, (e + 1) * width)) for e in range(count)]


def hot(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """1 for the k largest or smallest of each row, 0 for the others."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, largest=largest).indices, 1.0)


class FactorLlm(Plugin):
    """See the module."""

    Config = FactorLlmConfig
    claims = {Claim.TRAINS_BASE, Claim.NEEDS_MASK, Claim.PASSES_LAYERS, Claim.TAKES_WEIGHTS}
    architectures = ("mistral", "gemma2")
    refuses = {
        "gpt2": "no gated MLP",
        "bert": "an encoder without a gated MLP",
        "t5": "an encoder and a decoder",
    }
    config: FactorLlmConfig

    @torch.no_grad()
    def suits(self, model: ModelView) -> None:
        count, blocks = self.config.experts, self.blocks(model)
        shared = math.gcd(*(gate.out_features for _, (gate, _, _) in blocks))
        for block, (gate, up, down) in blocks:
            if gate.out_features % count:
                fit = [e for e in range(max(2, self.config.top_k), shared + 1) if shared % e == 0]
                raise OptionError(
                    f"{model.owner}: {count} experts do not divide the {gate.out_features} hidden units of "
                    f"{block.path}",
                    hint=f"experts: {min(fit, key=lambda e: abs(e - count))}"
                    if fit
                    else f"a lower top_k: of all layers' widths {shared} is the largest divisor",
                )
            activation = getattr(block.module, activation_of(model, block))
            x = torch.linspace(-2, 2, 2 * gate.in_features, device="cpu").sin().view(2, -1).to(gate.weight)
            if not x.is_meta:
                experts = experts_of((gate.module, up.module, down.module), activation, count)
                whole = torch.stack([expert(x) for expert in experts]).sum(0)
                if not torch.allclose(
                    whole, block.module(x), rtol=0.05, atol=0.05 * float(whole.abs().max())
                ):
                    raise unfit(model, f"{block.path} computes more than down(act(gate x) * up x)")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.train(" ".join(ROLES))
        for block, sites in self.blocks(model):
            names = [*(site.path.rpartition(".")[2] for site in sites), activation_of(model, block)]
            block.attach(Experts(block.module, names, sites[0].in_features, self.config))

    def check(self, stack: Stack) -> None:
        id, order = stack.id_of(self), list(stack.plugins)
        blocks = self.blocks(stack.view(id))
        mine, paths = {block.path for block, _ in blocks}, {s.path for _, sites in blocks for s in sites}
        for part in stack.ledger.all(DeltaPart):
            if part.path in paths:
                self.clash(id, stack.member(part.owner), part.path, "stands on them")
            if part.path in mine and order.index(part.owner) < order.index(id):
                raise ConflictError(
                    f"'{id}' computes {part.path} anew, and would pass over '{part.owner}', which stands before it",
                    hint=f"this order works: {id}, {part.owner}",
                )
        reads = Claim.QUANTIZES, Claim.NEEDS_CALIBRATION
        for other in (m for m in stack.members if any(map(m.claims, reads))):
            targets = getattr(other.plugin.config, "targets", "all")
            packed = [s.path for s in stack.view(other.id).linears(targets) if s.path in paths]
            if packed and order.index(other.id) < order.index(id):
                self.clash(id, other, packed[0], "packs them before that")
            if packed and other.claims(Claim.NEEDS_CALIBRATION):
                self.clash(id, other, packed[0], "measures what goes through them, which nothing does")

    @staticmethod
    def clash(id: str, other: Member, path: str, said: str) -> None:
        chooses = "targets" in type(other.plugin.config).model_fields
        raise ConflictError(
            f"'{id}' computes {path} and its like itself, by experts, and '{other.id}' {said}",
            hint="leave the layer out of one of them" if chooses else "keep one",
        )

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.config.approximate or self.config.balance:
            step.add_loss(step.stack.id_of(self), lambda _: self.lesson(step), over="inputs")
        return (yield)

    def lesson(self, step: TrainStep) -> Tensor:
        """lambda_r L_PA + lambda_b L_bal over the real tokens of the batch, 0-d."""
        parts, seen = step.stack.ledger.of(step.stack.id_of(self), DeltaPart), {}

        def look(block: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            seen[block] = args[0] if args else next(iter(kwargs.values())), out

        with step.reference("base"), ExitStack() as hooks:
            for part in parts:
                hooks.callback(part.place.register_forward_hook(look, with_kwargs=True).remove)
            step.forward()
        losses = []
        for part in parts:
            x, dense = seen[part.place]
            real = step.batch.get("attention_mask")
            real = torch.ones_like(x[..., 0]).bool() if real is None else real.bool()
            losses.append(torch.stack(part.module.teach(x[real], dense[real])))  # type: ignore[operator]
        return torch.stack(losses).mean(0) @ losses[0].new_tensor(
            [self.config.approximate, self.config.balance]
        )

    def blocks(self, model: ModelView) -> list[tuple[BoundSite, list[BoundSite]]]:
        """Every feed-forward block with its gate, up and down."""
        known = {(s.role, s.layer): model.bound(s) for s in model.anatomy.sites if s.role in ROLES}
        found = []
        for layer in range(model.num_layers):
            sites = [known[role, layer] for role in ROLES if (role, layer) in known]
            plain = all(s.kind == "linear" and s.rows is None and kind_of(s.module) == "plain" for s in sites)
            decoder = len(model.towers) == 1 and model.anatomy.is_decoder
            if not decoder or len(sites) < len(ROLES) or not plain:
                if any(s.kind == "quantized" for s in sites):
                    said = (
                        f"{model.owner} splits feed-forward blocks, and layer {layer} has them packed already"
                    )
                    raise ConflictError(said, hint=f"put {model.owner} first")
                raise unfit(model, f"layer {layer} has none")
            path = sites[0].path.rpartition(".")[0]
            found.append((next(block for block in model.blocks("mlp") if block.path == path), sites))
        return found


def unfit(model: ModelView, said: str) -> ArchitectureError:
    return ArchitectureError(
        f"{model.owner} splits gated feed-forward blocks of a decoder, whose gate, up and down are linear layers of "
        f"their own, and of {model.config.model_type} {said}",
        hint="Llama, Mistral, Qwen 2 and 3 and their kin have them",
    )


def activation_of(model: ModelView, block: BoundSite) -> str:
    """The name of what stands in the block beside its three layers (`act_fn`, Llama 4: `activation_fn`)."""
    children = block.module.named_children()
    found = [name for name, child in children if not isinstance(child, nn.Linear) and not is_ours(name)]
    if len(found) != 1:
        raise unfit(model, f"{block.path} has {len(found)} modules beside them, not an activation alone")
    return found[0]
