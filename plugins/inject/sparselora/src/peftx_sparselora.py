"""SparseLoRA: while adapters train, the frozen layers compute only the channels that matter for the batch.

"SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity" (arXiv:2506.16500). X: [N, d] are the batch's
context tokens at a block's input, and W^T ~ A B is the SVD of W cut at rank 8: A = U: [d, 8], B = S V^T: [8, out].
Without gradients:

    MLP:        s_j = || silu(X A_g B_g)_j * (X A_u B_u)_j ||_2          j in 1..intermediate
    q and k:    s_j = || (X A_q B_q)_j ||_2 * || (X A_k B_k)_j ||_2      the query's norm is a mean over its group (GQA)
    v and o:    s_j = || (X A_v B_v)_j ||_2

    I = the (1 - rho) share of channels, rounded down, with the largest s;  one I for a block and a batch

    q, k, v, gate, up:   y_I = W_I x          rows of W; the other channels of W x are zero
    o, down:             y = W_:I x_I         columns of W

The same slices give dL/dx, so forward and backward are dense products of (1 - rho) the size; W is frozen and needs no
more. Three things stay dense: answer tokens (those with a label), the first steps, and the first and last layers. So do
biases, adapters, and everything outside a training step. At least one channel is in I; the released code may take none.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Site, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.chain import is_ours
from peftx.kernel.soft_rows import beside_soft_tokens

MLP = ("gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")


class SparseloraConfig(PluginConfig):
    """Options of SparseLoRA; the defaults are the paper's for Llama 3 8B on math."""

    mlp: float = Field(0.99, ge=0, lt=1, description="rho of the MLPs; 0: dense")
    attention: float = Field(0.75, ge=0, lt=1, description="rho of q, k, v and o; 0: dense")
    mlp_layers: list[int] | None = Field(
        None, description="layers with a sparse MLP; all but the first 3/32 and the last if left out"
    )
    attention_layers: list[int] | None = Field(
        None, description="layers with sparse attention; the deeper half but the last if left out"
    )
    rank: int = Field(8, ge=1, description="rank of the estimators")
    start: float = Field(
        0.05, ge=0, lt=1, description="share of the run's steps that are dense, at the beginning"
    )
    dense_answers: bool = Field(
        True, description="tokens with a label run dense; false: all tokens are sparse"
    )

    @model_validator(mode="after")
    def _fit(self) -> SparseloraConfig:
        for block in ("mlp", "attention"):
            if getattr(self, block) == 0 and (layers := getattr(self, f"{block}_layers")) is not None:
                raise ValueError(f"{block}_layers is {layers}, and {block} = 0 leaves them dense: drop one")
        return self


class Tokens:
    """Which tokens run sparse; `context` is None outside a sparse step."""

    def __init__(self) -> None:
        self.context: Tensor | None = None  # [B, T] bool
        self.real: Tensor | None = None  # [B, T] bool: no padding
        self._known: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def set(self, context: Tensor | None, real: Tensor | None = None) -> None:
        self.context, self.real, self._known = context, real, {}

    def foreign(self, shape: torch.Size) -> bool:
        """Is it no text of the batch: a few rows that another plugin sends through one layer (Aligner's tokens)."""
        assert self.context is not None
        batch, length = self.context.shape
        return len(shape) < 2 or (shape[1] < length and (shape[0] != batch or batch == 1))

    def rows(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """For an input of this shape [B, T + P], P soft tokens beside the text: what to score, what runs dense."""
        if shape not in self._known:
            assert self.context is not None
            assert self.real is not None
            added = shape[1] - self.context.shape[1]
            if shape[0] != self.context.shape[0] or added < 0:
                raise PeftxError(
                    f"sparselora: the model runs on {shape[0]}x{shape[1]} tokens, the batch has labels for "
                    f"{self.context.shape[0]}x{self.context.shape[1]}",
                    hint="put sparselora behind the plugin that changes the batch",
                )
            context = beside_soft_tokens(self.context, self.real, added).flatten()
            real = beside_soft_tokens(self.real, self.real, added).flatten()
            self._known[shape] = ((context & real).nonzero().flatten(), (~context).nonzero().flatten())
        return self._known[shape]


class Estimate(nn.Module):
    """W x ~ x A B, with frozen factors from the SVD.

    Args:
        in_features: d. out_features: out. rank: r.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int) -> None:
        super().__init__()
        self.register_buffer("A", torch.zeros(in_features, rank))
        self.register_buffer("B", torch.zeros(rank, out_features))

    def fit(self, weight: Tensor) -> None:
        """A: the `rank` largest left singular vectors U of W^T; B = U^T W^T = S V^T."""
        w = weight.detach().double()  # [out, in]
        u = torch.linalg.eigh(w.t() @ w).eigenvectors[:, -self.A.shape[1] :]  # the largest come last
        self.A.copy_(u)
        self.B.copy_(u.t() @ w.t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.A @ self.B  # [N, out]


class MlpChannels(nn.Module):
    """I of one MLP.

    Args:
        gate, up: estimates. keep: channels in I. activation: the gate's function.
    """

    def __init__(
        self, gate: Estimate, up: Estimate, *, keep: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate, self.up, self.keep = gate, up, keep
        self.activation = activation

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        score = (self.activation(self.gate(x)) * self.up(x)).norm(dim=0)  # [intermediate]
        return dict.fromkeys(MLP, largest(score, self.keep))


class AttentionChannels(nn.Module):
    """I of q and k, and of v and o, of one attention.

    Args:
        q, k, v: estimates. keep: channels of k, and of v, in I. groups: query heads to a key-value head.
        head_dim: channels of a head.
    """

    def __init__(
        self, q: Estimate, k: Estimate, v: Estimate, *, keep: int, groups: int, head_dim: int
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.keep = q, k, v, keep
        self.groups, self.head_dim = groups, head_dim

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q = self.q(x).norm(dim=0).view(-1, self.groups, self.head_dim).mean(dim=1).flatten()  # [kv channels]
        qk = largest(q * self.k(x).norm(dim=0), self.keep)
        v = largest(self.v(x).norm(dim=0), self.keep)
        return {"q": self.spread(qk), "k": qk, "v": v, "o": self.spread(v)}

    def spread(self, channels: Tensor) -> Tensor:
        """Channels of key-value heads -> those of all query heads that read them."""
        head, channel = channels // self.head_dim, channels % self.head_dim
        member = torch.arange(self.groups, device=channels.device)
        return (
            ((head[:, None] * self.groups + member) * self.head_dim + channel[:, None])
            .flatten()
            .sort()
            .values
        )


def largest(scores: Tensor, keep: int) -> Tensor:
    return scores.topk(keep).indices.sort().values


@dataclass(eq=False)
class Block:
    """What the layers of one MLP or attention share; the first to be called chooses for all."""

    tokens: Tokens
    channels: nn.Module
    chosen: dict[str, Tensor] = field(default_factory=dict)


class Sliced(Delta):
    """The frozen W x + b, from the channels I alone for context tokens in a sparse step.

    Args:
        block: shared with the block's other layers. role: q, k, v, o, gate, up or down.
    """

    def __init__(self, block: Block, *, role: str) -> None:
        super().__init__()
        self.block = block
        self.role = role

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tokens = self.block.tokens
        if tokens.context is None or not self.training or tokens.foreign(x.shape[:-1]):
            return F.linear(x, weight, bias)
        scored, dense = tokens.rows(x.shape[:-1])
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # a function of its own is not cast
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.flatten(0, -2)  # [N, in]
        if self.role in ("q", "gate"):
            with torch.no_grad():
                self.block.chosen = self.block.channels(rows[scored])
        axis = int(self.role in ("o", "down"))
        y = SlicedProduct.apply(rows, weight, self.block.chosen[self.role], dense, axis)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


def sliced(x: Tensor, weight: Tensor, chosen: Tensor, dense: Tensor, axis: int, back: bool) -> Tensor:
    """x W^T, or back x W, of the rows I of W (axis 0) or its columns I (axis 1) alone; rows of x in `dense` whole."""
    part = (weight[chosen] if axis == 0 else weight[:, chosen]).to(x.dtype)
    if back:
        part, weight = part.t(), weight.t()
    if axis == back:  # I are channels of the output: zero on the others
        y = x.new_zeros(len(x), len(weight)).index_copy_(1, chosen, x @ part.t())
    else:
        y = x[:, chosen] @ part.t()
    return y.index_copy_(0, dense, x[dense] @ weight.to(x.dtype).t()) if len(dense) else y


class SlicedProduct(torch.autograd.Function):
    """`sliced`, of a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chosen: Tensor, dense: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(weight, chosen, dense)
        ctx.axis = axis
        return sliced(x, weight, chosen, dense, axis, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sliced(grad, *ctx.saved_tensors, ctx.axis, back=True), None, None, None, None


class Sparselora(Plugin):
    """See the module."""

    Config = SparseloraConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.MERGEABLE,
        Claim.NEEDS_GRADIENTS,
        Claim.NEEDS_LABELS,
        Claim.COMPUTES_LAYERS,
    }
    architectures = ("mistral", "gemma2")
    refuses = {
        "gpt2": "no gated MLP, and q, k, v in one matrix",
        "bert": "an encoder without a gated MLP",
        "t5": "an encoder and a decoder",
    }
    exempt = {
        "accumulation_makes_the_same_step": "the channels are chosen for all tokens of a batch together"
    }
    example = {
        "mlp": 0.5,
        "attention": 0.5,
        "mlp_layers": [0, 1],
        "attention_layers": [0, 1],
        "dense_answers": False,  # the kit's batches have a label on every token
    }
    config: SparseloraConfig
    tokens: Tokens

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, facts = self.config, model.main
        self.tokens = Tokens()
        if config.mlp:
            early = max(1, facts.layers * 3 // 32)
            for layer in self._layers("mlp", config.mlp_layers, range(early, facts.layers - 1), facts.layers):
                sites = self._sites(model, "mlp", MLP, layer)
                width = sites["gate"].out_features
                channels = MlpChannels(
                    *(self._estimate(model, sites[role]) for role in ("gate", "up")),
                    keep=kept(width, config.mlp),
                    activation=self._activation(model, sites),
                )
                self._attach(model, f"mlp_{layer}", sites, channels)
        if config.attention:
            deeper = range(facts.layers // 2, facts.layers - 1)
            for layer in self._layers("attention", config.attention_layers, deeper, facts.layers):
                sites = self._sites(model, "attention", ATTENTION, layer)
                sizes = facts.by_layer[layer]
                channels = AttentionChannels(
                    *(self._estimate(model, sites[role]) for role in ("q", "k", "v")),
                    keep=kept(sites["k"].out_features, config.attention),
                    groups=sizes.heads // sizes.kv_heads,
                    head_dim=sizes.head_dim,
                )
                self._attach(model, f"attention_{layer}", sites, channels)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        self._check(step)
        if step.index >= round(self.config.start * (step.total or 0)):
            ids = step.batch["input_ids"]  # [B, T]
            labels, mask = step.batch["labels"], step.batch.get("attention_mask")
            per_token = (
                labels.shape == ids.shape
            )  # a classifier has one label to a row: all its tokens are context
            context = torch.ones_like(ids, dtype=torch.bool)
            if self.config.dense_answers and per_token:
                context = labels == IGNORE
                if not context.any():
                    raise PeftxError(
                        f"sparselora: all {ids.numel()} tokens of the batch have a label, so none runs sparse",
                        hint="data with prompts, or dense_answers = false",
                    )
            self.tokens.set(context, torch.ones_like(context) if mask is None else mask.bool())
        try:
            return (yield)
        finally:
            self.tokens.set(None)

    @staticmethod
    def _check(step: TrainStep) -> None:
        if not step.parameters():
            raise PeftxError("sparselora: nothing trains beside it", hint="add an adapter, such as lora")
        if not step.model.training:
            raise PeftxError(
                "sparselora: the model is in evaluation mode, in which every layer runs dense",
                hint="stack.model.train() before a loop of your own",
            )

    @staticmethod
    def _layers(block: str, given: list[int] | None, rule: range, total: int) -> list[int]:
        layers = list(rule) if given is None else given
        wrong = [i for i in layers if not 0 <= i < total]
        if wrong or len(set(layers)) < len(layers):
            raise PeftxError(
                f"sparselora: {block}_layers {layers} of a model with {total} layers",
                hint=f"each once, 0 to {total - 1}",
            )
        if not layers:
            raise PeftxError(
                f"sparselora: of {total} layers none is left for {block} between the first and the last",
                hint=f"name them in {block}_layers, or {block} = 0",
            )
        return layers

    @staticmethod
    def _sites(model: ModelView, block: str, roles: tuple[str, ...], layer: int) -> dict[str, Site]:
        """The block's linear layers by role.

        Raises:
            ArchitectureError: the model is not a decoder with a gated MLP and separate projections, or has packed them.
        """

        names = {f"{block}.{role}": role for role in roles}
        decoder = len(model.towers) == 1 and model.anatomy.is_decoder

        def of(layer: int) -> dict[str, Site]:
            here = (site for site in model.anatomy.sites if site.layer == layer and site.role in names)
            return {names[site.role]: model.bound(site) for site in here}

        def fits(found: dict[str, Site], *kinds: str) -> bool:
            whole = all(site.kind in kinds and site.rows is None for site in found.values())
            return decoder and len(found) == len(roles) and whole

        found = of(layer)
        if fits(found, "linear"):
            return found
        if fits(found, "linear", "quantized"):
            packed = next(site for site in found.values() if site.kind == "quantized")
            raise ArchitectureError(
                f"sparselora: it slices rows and columns of weights, and {packed.path} is packed",
                hint="load the model unpacked, and put what packs it (prefixquant) behind sparselora; or leave this "
                f"block dense: {block}: 0",
            )
        others = [i for i in range(model.num_layers) if fits(of(i), "linear")]
        where = f"layer {layer} of {model.config.model_type}" if others else model.config.model_type
        raise ArchitectureError(
            f"sparselora slices {', '.join(names)} of a decoder, and {where} does not "
            "have them as linear layers of their own",
            hint=f"{block}_layers: {others}" if others else "Llama, Mistral, Qwen 2 and 3 and their kin do",
        )

    @staticmethod
    def _activation(model: ModelView, sites: dict[str, Site]) -> Callable[[Tensor], Tensor]:
        """What stands in the MLP beside its linear layers; its name differs (`act_fn`, Llama 4: `activation_fn`)."""
        mlp, linears = sites["gate"].path.rpartition(".")[0], [site.module for site in sites.values()]
        children = model.module.get_submodule(mlp).named_children()
        found = [module for name, module in children if module not in linears and not is_ours(name)]
        if len(found) != 1:
            raise ArchitectureError(
                f"sparselora: beside linear layers {mlp} has {len(found)} modules, and not the gate's function alone",
                hint="Llama, Mistral, Qwen 2 and 3 and their kin have it; or leave the MLPs dense: mlp: 0",
            )
        return found[0]

    def _estimate(self, model: ModelView, site: Site) -> Estimate:
        rank, full = self.config.rank, min(site.in_features, site.out_features)
        if rank > full:
            raise PeftxError(
                f"sparselora: rank {rank} exceeds the {site.out_features}x{site.in_features} matrix {site.path}",
                hint=f"rank at most {full}",
            )
        estimate = Estimate(site.in_features, site.out_features, rank=rank)
        if not model.restoring:
            estimate.fit(site.weight)
        return estimate

    def _attach(self, model: ModelView, name: str, sites: dict[str, Site], channels: nn.Module) -> None:
        block = Block(self.tokens, model.keep(name, channels))
        for role, site in sites.items():
            site.attach(Sliced(block, role=role))


def kept(channels: int, rho: float) -> int:
    """(1 - rho) of the channels, rounded down as in the released code (of 640 at 0.9 to 63 there too), at least one."""
    return max(1, int(channels * (1 - rho)))
