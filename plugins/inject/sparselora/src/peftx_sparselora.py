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

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, BatchError, OptionError, TrainingError
from peftx.kernel.call import Call
from peftx.kernel.chain import is_ours
from peftx.kernel.view import BoundSite

ROLES = {"mlp": ("gate", "up", "down"), "attention": ("q", "k", "v", "o")}
"""Linear layers of a block; the last is cut by columns."""


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
    """Which tokens run sparse, in a sparse step.

    Args:
        call: what the model is called on. dense_answers: tokens with a label run dense.
    """

    def __init__(self, call: Call, dense_answers: bool) -> None:
        self.call, self.dense_answers = call, dense_answers
        self.set(None)

    def set(self, labels: Callable[[], Tensor] | None) -> None:
        """Begin a sparse step, with what gives the labels of its batch as that stands, [B, T] or [B] of classes; None
        ends it."""
        self.labels = labels
        self._known: dict[torch.Size, tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}

    def check(self) -> None:
        """Raises TrainingError where the step called the model on other rows than the batch's alone."""
        if self._known and all(found is None for _, found in self._known.values()):
            said = "sparselora: the step ran the model on other rows than the batch's alone: none ran sparse"
            raise TrainingError(said, hint="leave sparselora out")

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of a layer's input, [B, T + P, in] with P soft tokens: which rows of [B (T + P), in] to score, and which run
        dense; None: all do. Found once for a call: layers that are recomputed choose as before, whatever ran since."""
        if self.labels is None or self.call.shape is None:
            return None
        shape, labels = x.shape[:-1], self.call.arguments.get("labels")
        if labels is None or labels.shape != self.call.shape:
            labels = self.labels()  # the call has none where another plugin computes the loss
        known, of_call = self._known.get(shape), labels.ndim < 2 or labels.shape == self.call.shape
        if known is None or (known[0] is not labels and of_call and len(labels) == len(x)):
            known = self._known[shape] = labels, self._find(x, labels)
        return known[1]

    def context_of(self, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Which tokens have no label, or all of them, [B, T] bool."""
        if labels.ndim < 2 or not self.dense_answers:
            return torch.ones(shape, dtype=torch.bool, device=labels.device)
        return labels == IGNORE

    def _find(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        shape = self.call.shape
        if labels.ndim > 1 and labels.shape != shape:
            return None  # a text beside the batch, without labels of its own (CPT's context)
        if x.ndim < 3 or len(x) != shape[0] or x.shape[1] < shape[1]:
            return None  # no text at all: rows that another plugin sends through one layer (Aligner's tokens)
        context = self.context_of(labels, shape)
        context, real = (self.call.rows(t, x, fill=True).flatten() for t in (context, self.call.real))
        return (context & real).nonzero().flatten(), (~context).nonzero().flatten()


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
        return dict.fromkeys(ROLES["mlp"], largest(score, self.keep))


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
        found = (head[:, None] * self.groups + member) * self.head_dim + channel[:, None]
        return found.flatten().sort().values


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
        sparse = self.block.tokens.rows(x) if self.training else None
        if sparse is None:
            return F.linear(x, weight, bias)
        scored, dense = sparse
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # a function of its own is not cast
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.flatten(0, -2)  # [N, in]
        if self.role in ("q", "gate"):
            with torch.no_grad():
                self.block.chosen = self.block.channels(rows[scored])
        axis = int(self.role in ("down", "o"))
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
        Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_GRADIENTS, Claim.NEEDS_LABELS,
        Claim.COMPUTES_LAYERS,
    }  # fmt: skip
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
        "mlp": 0.5, "attention": 0.5, "mlp_layers": [0, 1], "attention_layers": [0, 1],
        "dense_answers": False,  # the kit's batches have a label on every token
    }  # fmt: skip
    config: SparseloraConfig
    tokens: Tokens

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.tokens = Tokens(model.call, self.config.dense_answers)
        for block in ROLES:
            for layer in self._layers(block, model.num_layers):
                sites = sites_of(model, block, layer)
                channels = self._channels(model, block, sites)
                shared = Block(self.tokens, model.keep(f"{block}_{layer}", channels))
                for role, site in sites.items():
                    site.attach(Sliced(shared, role=role))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if not step.model.training:
            said = "sparselora: the model is in evaluation mode, in which every layer runs dense"
            raise TrainingError(said, hint="stack.model.train() before a loop of your own")
        if step.index >= round(self.config.start * (step.total or 0)):
            ids, labels = step.batch["input_ids"], step.batch["labels"]
            if not self.tokens.context_of(labels, ids.shape).any():
                said = f"sparselora: all {ids.numel()} tokens of the batch have a label, so none runs sparse"
                raise BatchError(said, hint="data with prompts, or dense_answers = false")
            self.tokens.set(lambda: step.batch["labels"])
        try:
            loss = yield
            self.tokens.check()
            return loss
        finally:
            self.tokens.set(None)

    def _layers(self, block: str, total: int) -> list[int]:
        """The block's sparse layers."""
        if not getattr(self.config, block):
            return []
        rule = range(max(1, total * 3 // 32), total - 1) if block == "mlp" else range(total // 2, total - 1)
        given = getattr(self.config, f"{block}_layers")
        layers = list(rule) if given is None else given
        if len(set(layers) & set(range(total))) < len(layers):
            said = f"sparselora: {block}_layers {layers} of a model with {total} layers"
            raise OptionError(said, hint=f"each once, 0 to {total - 1}")
        if not layers:
            said = f"sparselora: of {total} layers none is left for {block} between the first and the last"
            raise OptionError(said, hint=f"name them in {block}_layers, or {block} = 0")
        return layers

    def _channels(self, model: ModelView, block: str, sites: dict[str, BoundSite]) -> nn.Module:
        estimates, (*rows, _) = [], sites.values()
        for site in rows:
            rank, into, out = self.config.rank, site.in_features, site.out_features
            if rank > min(into, out):
                said = f"sparselora: rank {rank} exceeds the {out}x{into} matrix {site.path}"
                raise OptionError(said, hint=f"rank at most {min(into, out)}")
            estimates.append(Estimate(into, out, rank=rank))
            if not model.restoring:
                estimates[-1].fit(site.weight)
        keep = kept(rows[1].out_features, getattr(self.config, block))  # of up, and of k
        if block == "mlp":
            return MlpChannels(*estimates, keep=keep, activation=activation_of(model, sites))
        sizes = model.heads_of(rows[0])
        groups = sizes.heads // sizes.kv_heads
        return AttentionChannels(*estimates, keep=keep, groups=groups, head_dim=sizes.head_dim)


def sites_of(model: ModelView, block: str, layer: int) -> dict[str, BoundSite]:
    """The block's linear layers by role, in order.

    Raises:
        ArchitectureError: the model is not a decoder with a gated MLP and separate projections, or has packed them.
    """
    roles = {f"{block}.{role}": role for role in ROLES[block]}
    decoder = len(model.towers) == 1 and model.anatomy.is_decoder

    def at(layer: int, *kinds: str) -> dict[str, BoundSite]:
        """All of them, or nothing."""
        here = (s for s in model.anatomy.sites if s.layer == layer and s.role in roles)
        found = {s.role: model.bound(s) for s in here if s.kind in kinds and s.rows is None}
        whole = decoder and len(found) == len(roles)
        return {roles[name]: found[name] for name in roles} if whole else {}

    if found := at(layer, "linear"):
        return found
    if packed := [site for site in at(layer, "linear", "quantized").values() if site.kind == "quantized"]:
        said = f"sparselora: it slices rows and columns of weights, and {packed[0].path} is packed"
        way = "load the model unpacked, and put what packs it (prefixquant) behind sparselora"
        raise ArchitectureError(said, hint=f"{way}; or leave this block dense: {block}: 0")
    others = [i for i in range(model.num_layers) if at(i, "linear")]
    where = f"layer {layer} of {model.config.model_type}" if others else model.config.model_type
    said = f"sparselora slices {', '.join(roles)} of a decoder, and {where} does not have them"
    hint = f"{block}_layers: {others}" if others else "Llama, Mistral, Qwen 2 and 3 and their kin do"
    raise ArchitectureError(f"{said} as linear layers of their own", hint=hint)


def activation_of(model: ModelView, sites: dict[str, BoundSite]) -> Callable[[Tensor], Tensor]:
    """What stands in the MLP beside its linear layers; its name differs (`act_fn`, Llama 4: `activation_fn`)."""
    mlp, linears = sites["gate"].path.rpartition(".")[0], [site.module for site in sites.values()]
    children = model.module.get_submodule(mlp).named_children()
    found = [module for name, module in children if module not in linears and not is_ours(name)]
    if len(found) != 1:
        said = f"sparselora: beside linear layers {mlp} has {len(found)} modules, and not the gate's function alone"
        hint = "Llama, Mistral, Qwen 2 and 3 and their kin have it; or leave the MLPs dense: mlp: 0"
        raise ArchitectureError(said, hint=hint)
    return found[0]


def kept(channels: int, rho: float) -> int:
    """(1 - rho) of the channels, rounded down as in the released code (of 640 at 0.9 to 63 there too), at least one."""
    return max(1, int(channels * (1 - rho)))
