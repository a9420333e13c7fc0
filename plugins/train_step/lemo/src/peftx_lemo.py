"""LeMo: in long fine-tuning, each layer's attention runs on the tokens that a predictor finds informative.

"LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning" (arXiv:2501.09767; published as Jenga). A text is
cut into N blocks of b tokens. How much block m matters to block n, by the queries and keys of a layer before rotation:

    S[n, m] = max over i in n, j in m of sum_h relu(q_i^h . k_j^h)        [N, N]

Each such layer has a predictor of it, which needs no T x T scores: X_n^h, the b x d/H hidden states of block n and head
h, flattened, goes through two three-layer networks that the heads share,

    f(X) = W3 relu(W2 relu(W1 X)),    W1: [128, b d/H], W2: [b d/H, 128], W3: [d/H, b d/H]
    S'[n, m] = sum_h f_q(X_n^h) . f_k(X_m^h)

fitted before training, on the rows, by the smooth L1 distance of S' to S / mean(S), while the model stands still. Then,
in every training step and layer, with importance(m) = sum_n S'[n, m]:

    K = ceil(r T) tokens of the most important blocks, in their order
    h <- h + (Attn(norm(h)_K) in the places K, 0 elsewhere)

Queries, keys and values are of the same K, at their own positions. Tokens outside go on by the residual path alone, and
attention stores nothing for them. The MLP and the loss have all tokens. With g = act(W_g x) and u = W_u x, the MLP is

    forward    W_d (g * u), of all neurons, as ever
    backward   as if there were only the neurons J: those with the largest ||g_j||_2 + ||u_j||_2 over the batch's tokens

so J alone is stored. The loss is a sum over segments of 2048 tokens: the logits of one are freed before the next one's
and computed again in the backward pass, which changes no number. Outside a training step every layer is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peftx import (
    CallEdit,
    Claim,
    Delta,
    ModelView,
    Plugin,
    PluginConfig,
    Site,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import tokenize_dataset
from peftx.errors import ArchitectureError, ConflictError, OptionError, TrainingError
from peftx.kernel.call import Call
from peftx.kernel.parts import DeltaPart
from peftx.kernel.view import BoundSite
from peftx.toolkits.evaluation import evaluating
from peftx.toolkits.injecting import storing


class LemoConfig(PluginConfig):
    """Options of LeMo; the defaults are those of the paper's code."""

    keep: float = Field(0.4, gt=0, le=1, description="r, share of the tokens that attend")
    mlp_keep: float = Field(0.2, gt=0, le=1, description="share of an MLP's neurons, J, that are stored")
    layers: list[int] | None = Field(
        None, description="layers that do so; the deeper half but the last if left out"
    )
    segment: int | None = Field(
        2048, ge=1, description="tokens whose loss is computed together; all of them if null"
    )
    block: int = Field(64, ge=1, description="b, tokens that are kept or left out together")
    hidden: int = Field(128, ge=1, description="width of a predictor")
    predictor_steps: int = Field(400, ge=1, description="steps that fit the predictors, of one row each")
    predictor_rate: float = Field(2e-5, gt=0, description="learning rate of these")


def in_blocks(x: Tensor, b: int) -> Tensor:
    """[B, T, ...] -> [B, N, b, ...]; the last block is filled up with zeros."""
    filled = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, -x.shape[1] % b))
    return filled.unflatten(1, (-1, b))


def block_scores(q: Tensor, k: Tensor, b: int) -> Tensor:
    """S: q [B, T, H, D], k [B, T, Hkv, D] -> [B, N, N], a row of blocks at a time."""
    q, k = in_blocks(q, b), in_blocks(k.repeat_interleave(q.shape[2] // k.shape[2], 2), b)
    rows = [torch.einsum("bihd,bmjhd->bmijh", query, k).relu().sum(-1).amax((2, 3)) for query in q.unbind(1)]
    return torch.stack(rows, 1)


class Network(nn.Module):
    """f: [..., sizes[0]] -> [..., sizes[3]]. W1 to W3 are buffers: no step of the run trains them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        for n, (i, o) in enumerate(pairwise(sizes), start=1):
            self.register_buffer(
                f"W{n}", torch.empty(o, i).uniform_(-(i**-0.5), i**-0.5)
            )  # as nn.Linear starts

    def forward(self, X: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(X, self.W1).relu(), self.W2).relu(), self.W3)


class Predictor(nn.Module):
    """X [B, T, d] -> S' [B, N, N].

    Args:
        width: d. heads: H. block: b. hidden: width of the first layer.
    """

    def __init__(self, width: int, heads: int, block: int, hidden: int) -> None:
        super().__init__()
        D, self.heads, self.block = width // heads, heads, block
        self.q, self.k = (Network(block * D, hidden, block * D, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        blocks = in_blocks(x.float().unflatten(2, (self.heads, -1)), self.block)  # [B, N, b, H, D]
        X = blocks.transpose(2, 3).flatten(3)  # [B, N, H, b D]
        return torch.einsum("bnhd,bmhd->bnm", self.q(X), self.k(X))


def informative(S: Tensor, real: Tensor, b: int, keep: float) -> Tensor:
    """K of each text, ascending: S [B, N, N], real [B, T] -> [B, ceil(keep T)]. Pads are taken last."""
    T = real.shape[1]
    importance = S.sum(1).repeat_interleave(b, 1)[:, :T].masked_fill(~real, -math.inf)
    best = importance.sort(dim=1, descending=True, stable=True).indices  # so a block stays together
    return best[:, : math.ceil(keep * T)].sort(1).values


def narrowed(value: Any, K: Tensor, T: int) -> Any:
    """An attention's further arguments, for the tokens K [B, k] alone: masks [., ., T, T] and what is [., T, ...]."""
    if isinstance(value, tuple):
        return tuple(narrowed(item, K, T) for item in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    rows = torch.arange(len(K), device=K.device)[:, None]
    if value.ndim == 4 and value.shape[2:] == (T, T):
        value = value.expand(len(K), -1, -1, -1)
        return value[rows[..., None], :, K[:, :, None], K[:, None, :]].permute(0, 3, 1, 2)
    return value.expand(len(K), *value.shape[1:])[rows, K] if value.shape[1] == T else value


Seen = tuple[BoundSite, BoundSite, int]
"""Where a layer's queries and keys come from, and the size of a head."""


class Running(CallEdit):
    """Is a training step running; its calls keep no cache, whose layers would differ in length."""

    on = False

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "use_cache": False} if self.on else call


class Eliminate(Delta):
    """Attention on the tokens K alone, in a training step."""

    def __init__(self, step: Running, call: Call, predictor: Predictor, keep: float) -> None:
        super().__init__()
        self.step, self.call, self.predictor, self.keep = (step,), call, (predictor,), keep

    def around(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        real = self.call.real
        if real is None or not (self.step[0].on and self.training) or self.keep == 1:
            return inner(x, *args, **kwargs)
        (predictor,) = self.predictor
        with torch.no_grad():
            real = self.call.rows(real, x, fill=True)
            K = informative(predictor(x), real, predictor.block, self.keep)
        T, places = x.shape[1], K[..., None].expand(-1, -1, x.shape[2])
        args, kwargs = narrowed(args, K, T), {name: narrowed(value, K, T) for name, value in kwargs.items()}
        out, *rest = inner(x.gather(1, places), *args, **kwargs)
        return torch.zeros_like(x).scatter(1, places, out), *rest


class Thin(Delta):
    """An MLP that stores the neurons J alone, in a training step.

    Args:
        sites: what gives a number for each neuron, and what is applied to it before its norm is taken.
        neurons: I. keep: share of these in J.
    """

    def __init__(self, step: Running, sites: list[tuple[Site, nn.Module]], neurons: int, keep: float) -> None:
        super().__init__()
        self.step, self.sites, self.neurons = (step,), sites, neurons
        self.count = math.ceil(keep * neurons)

    def around(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.step[0].on and self.training):
            return inner(x, *args, **kwargs)
        norms: list[Tensor] = []

        def note(site: Site, act: nn.Module, _: nn.Module, __: Any, y: Tensor) -> None:
            y = act(y.detach() if site.rows is None else site.rows.take(y.detach(), -1))
            norms.append(y.float().flatten(0, -2).norm(dim=0))

        with ExitStack() as hooks, storing(x.shape[:-1].numel(), self.neurons) as stored:
            for site, act in self.sites:
                hooks.callback(site.module.register_forward_hook(partial(note, site, act)).remove)
            y = inner(x, *args, **kwargs)
        J = torch.stack(norms).sum(0).topk(self.count).indices
        for wide in stored:
            wide.thin(J)
        return y


class Lemo(Plugin):
    """See the module."""

    Config = LemoConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.NEEDS_GRADIENTS}
    takes = ("text", "prompt-completion", "messages", "classification", "tokenized")
    example = {"layers": [0, 1], "block": 2, "hidden": 8, "predictor_steps": 2}
    exempt = {"accumulation_makes_the_same_step": "the neurons are chosen for all tokens of a batch together"}
    refuses = {
        "bert": "its attention adds to the residual in a layer of its own",
        "t5": "position biases come out of the first layer's attention",
        "vit": "it reads no text",
        "bloom": "its attention adds the residual itself",
        "mamba": "it has no attention",
    }
    config: LemoConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        kind, attention = model.config.model_type, str(model.config._attn_implementation)
        takes = attention.endswith(("eager", "sdpa")) and model.main.attention
        if list(model.towers) != ["decoder"] or not takes:
            raise ArchitectureError(
                f"{model.owner}: {kind} (attention '{attention}') is no decoder whose attention takes any mask",
                hint="Llama, Mistral, Qwen or GPT-2 with attn_implementation='sdpa'",
            )
        self.step, self.predictors = model.around(Running()), nn.ModuleDict()
        self.seen: dict[str, Seen] = {}
        for layer in self.layers(model):
            heads = model.main.by_layer[layer].heads
            if model.hidden_size % heads:
                raise ArchitectureError(
                    f"{model.owner}: {heads} heads do not share {model.hidden_size} hidden numbers evenly",
                    hint="another model",
                )
            predictor = Predictor(model.hidden_size, heads, self.config.block, self.config.hidden)
            self.predictors[str(layer)] = model.keep(f"predictor_{layer}", predictor, full_precision=True)
            q, k = (model.site(f"attention.{role}", layer=layer) for role in ("q", "k"))
            self.seen[str(layer)] = q, k, model.main.by_layer[layer].head_dim
            block = model.site("block.attention", layer=layer)
            block.attach(Eliminate(self.step, model.call, predictor, self.config.keep))
            if self.config.mlp_keep < 1:
                sites, neurons = neurons_of(model, layer)
                model.site("block.mlp", layer=layer).attach(
                    Thin(self.step, sites, neurons, self.config.mlp_keep)
                )

    def layers(self, model: ModelView) -> list[int]:
        """The layers that leave tokens out."""
        L, given = model.num_layers, self.config.layers
        found = list(range(L // 2, L - 1)) if given is None else given
        if not found or len(set(found) & set(range(L))) < len(found):
            raise OptionError(
                f"{model.owner}: layers {found} of a model with {L}",
                hint=f"name some, each once: 0 to {L - 1}",
            )
        return found

    def check(self, stack: Stack) -> None:
        own, layout = stack.id_of(self), {Claim.OWN_LAYOUT, Claim.REPLACES_ATTENTION}
        blocks, thin = (
            {p.place for p in stack.ledger.of(own, DeltaPart) if isinstance(p.module, kind)}
            for kind in (Eliminate, Thin)
        )
        for i, other in enumerate(stack.members):
            parts = stack.ledger.of(other.id, DeltaPart)
            around = {p.place for p in parts if isinstance(p.module, Delta) and p.module.has_around()}
            if i < stack.members.index(stack.member(own)) and blocks & around:
                raise ConflictError(
                    f"'{other.id}' stands around an attention that '{own}' calls on some of the tokens alone",
                    hint=f"put {own} before {other.id}",
                )
            if other.claims(Claim.PASSES_LAYERS) and thin & around:
                raise ConflictError(
                    f"'{other.id}' computes an MLP past its layers, of which '{own}' measures the neurons",
                    hint=f"mlp_keep=1 for {own}",
                )
            if other.claims(Claim.TELLS_TOKENS):
                raise ConflictError(
                    f"'{other.id}' tells in an attention which token is which, and '{own}' leaves some out",
                    hint="keep one of them",
                )
            if layout <= other.plugin.claims:
                raise ConflictError(
                    f"'{other.id}' computes attention by its own layout of tokens, and '{own}' leaves some out",
                    hint="keep one of them",
                )

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Fit the predictors on the rows to train on, once."""
        if data.train is None or self.state.get("fitted"):
            return
        rows = tokenize_dataset(data.train, data.tokenizer, format=data.format, max_length=data.max_length)
        texts = islice(cycle(rows["input_ids"]), self.config.predictor_steps)
        weights = list(self.predictors.buffers())
        optimizer = torch.optim.Adam(weights, lr=self.config.predictor_rate)
        for W in weights:
            W.requires_grad_(True)
        for ids in texts:
            optimizer.zero_grad()
            with torch.enable_grad():
                self.distance(stack, torch.tensor([ids], device=stack.model.device)).backward()
            optimizer.step()
        for W in weights:
            W.requires_grad_(False)
        self.state["fitted"] = True

    def distance(self, stack: Stack, ids: Tensor) -> Tensor:
        """The sum over layers of how far S' is from S / mean(S), on texts without pads [B, T]; 0-d."""
        found = []
        for layer, (x, q, k) in observe(stack, ids, self.seen).items():
            S = block_scores(q, k, self.config.block)
            target = S / S.mean((1, 2), keepdim=True).clamp(min=1e-6)
            found.append(F.smooth_l1_loss(self.predictors[layer](x), target))
        return torch.stack(found).sum()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        id = step.stack.id_of(self)
        if not self.state.get("fitted"):
            raise TrainingError(
                f"{id}: its predictors are not fitted yet", hint="stack.prepare the rows first"
            )
        if not step.model.training:
            raise TrainingError(
                f"{id}: the model is in evaluation mode, in which every token attends",
                hint="stack.model.train() before a loop of your own",
            )
        if self.config.segment is not None:
            step.segment_task_loss(self.config.segment)
        self.step.on = True
        try:
            return (yield)
        finally:
            self.step.on = False


def observe(stack: Stack, ids: Tensor, seen: dict[str, Seen]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What goes into layers' attention, [B, T, d], and their queries and keys before rotation, [B, T, heads, D]. Of
    several calls of a layer the first one's, which the model makes: those that follow are of plugins (Aligner's)."""
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {layer: {} for layer in seen}

    def note(layer: str, site: BoundSite, D: int, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        y = y if site.rows is None else site.rows.take(y, -1)
        found[layer].setdefault(site.role, (args[0], y.unflatten(-1, (-1, D)).float()))

    with ExitStack() as hooks, evaluating(stack.model):
        for layer, (q, k, D) in seen.items():
            for site in (q, k):
                handle = site.module.register_forward_hook(partial(note, layer, site, D))
                hooks.callback(handle.remove)
        stack.model(input_ids=ids, use_cache=False)
    own = {layer: (sites[0].role, sites[1].role) for layer, sites in seen.items()}
    return {layer: (*found[layer][q], found[layer][k][1]) for layer, (q, k) in own.items()}


def neurons_of(model: ModelView, layer: int) -> tuple[list[tuple[Site, nn.Module]], int]:
    """What gives g and u of a layer's MLP, with what is applied to it (of one without a gate g alone), and I.

    Raises:
        ArchitectureError: its MLP is not one of linear layers, as that of experts.
    """
    here = (s for s in model.anatomy.sites if s.layer == layer and s.kind in ("linear", "quantized"))
    # Not bound ones, which a copy of the model would follow to the stack.
    sites = {s.role: s for s in here}
    if "mlp.up" not in sites or "mlp.down" not in sites:
        raise ArchitectureError(
            f"{model.owner}: layer {layer} of {model.config.model_type} has no MLP with one set of neurons",
            hint="mlp_keep=1 stores all of it",
        )
    config = model.config.get_text_config()
    named = (
        getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function")
    )
    act = ACT2FN[next(name for name in named if name)]
    gate, up = sites.get("mlp.gate"), sites["mlp.up"]
    return [(up, act)] if gate is None else [(gate, act), (up, nn.Identity())], sites["mlp.down"].in_features
