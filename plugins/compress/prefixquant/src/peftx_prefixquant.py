"""PrefixQuant: static activation scales, made possible by outlier tokens that stand in a prefix of the cache.

"PrefixQuant: Static Quantization Beats Dynamic through Prefixed Outliers in LLMs" (arXiv:2410.05265)

    M_t = max_c |x_tc|, x the input of a down projection;   t is an outlier token where M_t / median(M) > eta
    o = ceil(max over layers of the mean number of outlier tokens);   prefix = [the o most frequent ids, BOS]
    K = [K_prefix, fq(K_text)],   V = [V_prefix, fq(V_text)],   fq(x) = s clamp(round(x / s))
    y = s_x s_w x_q w_q^T,   x_q = clamp(round(R x / s_x)),   w_q = clamp(round(W R^T / s_w))

s_x is a constant of the layer, s_k and s_v of the head, s_w of the output channel: each the clipping point with the
least squared error on calibration text behind the prefix, or (`clip_search: false`) s = 2 max|x| / (2^b - 1), which the
official code starts from. R is a Hadamard rotation: W x = (W R^T)(R x).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import peftx.toolkits.compression as packing
from peftx import AttentionEdit, Claim, Evaluation, ModelView, Plugin, PluginConfig, Site, Stack, hookimpl
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.parts import AttentionPart, FreePart, ReplacedPart, ShiftPart
from peftx.toolkits.compression.batches import calibration as sequences
from peftx.toolkits.evaluation import context_window, perplexity

Mode = Literal["with_prefix", "without_prefix", "dynamic"]  # dynamic: a scale a token, and no prefix either
DECODER = "a decoder-only model of linear layers: llama, qwen, gemma, phi3, gpt2, opt, ..."
ALONE = "activation_bits: 16 with kv_bits: 16 rounds the weights alone, which this model takes"


class PrefixQuantConfig(PluginConfig):
    """Options of PrefixQuant; the paper runs W4A8KV4 and W4A4KV4."""

    weight_bits: Literal[4, 8] = Field(4, description="bits of a weight")
    activation_bits: Literal[4, 8, 16] = Field(8, description="bits of a layer's input; 16: not rounded")
    kv_bits: Literal[4, 8, 16] = Field(4, description="bits of a key or value; 16: not rounded")
    group_size: int | None = Field(None, ge=1, description="weights that share a scale; a row if left out")
    eta: float = Field(64.0, gt=1, description="ratio to the median above which a token is an outlier")
    prefix_tokens: int = Field(16, ge=0, description="most tokens in the prefix; 0: none")
    rotate: bool = Field(True, description="rotate what is rounded by Hadamard matrices")
    clip_search: bool = Field(True, description="search the clipping points; false: the largest magnitude")


def min_max(x: Tensor, bits: int) -> Tensor:
    """s = 2 max|x| / (2^b - 1) along the last dimension, kept: 2^b - 1 steps from the least to the largest value. There
    are integers from -2^(b-1) to 2^(b-1) - 1, so the largest magnitude loses half a step, as rounding may anywhere."""
    return 2 * x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / (2**bits - 1)


class StaticLinear(packing.QuantLinear):
    """Whose dynamic scales, to compare with, are those of the paper's own code."""

    def activation_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.activation == "dynamic-token":
            return min_max(x, self.act_bits), None
        return super().activation_scale(x)


class RotatedLinear(StaticLinear):
    """Packed W R^T, which rotates its input: y = (W R^T)(R x)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rotated(x))

    @property
    def weight(self) -> Tensor:
        """W, which an adapter on top of the layer may ask for."""
        return rotated(super().weight, inverse=True)


class InputScales(nn.Module):
    """Of a block without attention (linear attention, in hybrids): float32 input_scale, as in `StaticKV`."""

    seen: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_scale", torch.empty(0))


class StaticKV(AttentionEdit):
    """[K_prefix, fq(K)], [V_prefix, fq(V)]; nothing is rounded before there are scales.

    Buffers, empty at first: prefix [2, Hkv, P, D] of K and V; float32 scales, with and without the prefix: scale
    [2, 2, Hkv] of K and V, input_scale [2, linear layers of the block].
    """

    def __init__(self, *, bits: int, rotate: bool) -> None:
        super().__init__()
        self.bits, self.rotate, self.mode = bits, rotate, "with_prefix"
        self.seen: tuple[Tensor, ...] = ()  # before there are scales: the last K and V, [Hkv, T, D]
        for name in ("prefix", "scale", "input_scale"):
            self.register_buffer(name, torch.empty(0))

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale.numel() == 0:
            self.seen = (key[0], value[0])
        elif self.bits < 16:
            key, value = self.rounded(key, 0), self.rounded(value, 1)
        if self.mode != "with_prefix" or self.prefix.numel() == 0:
            return key, value
        front = self.prefix.to(key)[:, None].expand(2, len(key), -1, -1, -1)
        return torch.cat((front[0], key), 2), torch.cat((front[1], value), 2)

    def rounded(self, x: Tensor, which: int) -> Tensor:
        """fq(x), x [B, Hkv, K, D]; with R it is R^T fq(R x), so that q k stays what it was."""
        x = rotated(x) if self.rotate else x
        scale = self.scale[int(self.mode != "with_prefix"), which].view(1, -1, 1, 1)
        scale = min_max(x, self.bits) if self.mode == "dynamic" else scale
        x = packing.fake_quantize(x, scale, bits=self.bits)
        return rotated(x, inverse=True) if self.rotate else x


def rotated(x: Tensor, *, inverse: bool = False) -> Tensor:
    """R x along the last dimension; R has blocks of the largest Hadamard order that divides its size."""
    n = x.shape[-1]
    block = next(n // k for k in range(1, n + 1) if n % k == 0 and packing.hadamard_exists(n // k))
    return packing.fwht(x, block_size=block, inverse=inverse)


def static_scale(x: Tensor, bits: int, *, clip: bool, bins: int = 2**14) -> Tensor:
    """One scale s a row, x [R, N] -> [R]: `min_max`, or the best of 100 clipping points by a histogram of the row."""
    if not clip:
        return min_max(x, bits)[:, 0]
    top = x.abs().amax(-1).clamp_min(1e-12)
    counts = torch.stack([torch.histc(row, bins, -float(t), float(t)) for row, t in zip(x, top, strict=True)])
    centres = top[:, None] * ((torch.arange(bins, device=x.device) + 0.5) * (2 / bins) - 1)  # [R, bins]
    return packing.mse_clip_scale(centres, bits=bits, counts=counts, per_row=True)


def groups(x: Tensor, size: int | None) -> Tensor:
    """[out, in] -> [out, groups, size], the last one filled up with zeros."""
    size = x.shape[-1] if size is None else size
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def token_peaks(stack: Stack, batches: list[dict[str, Any]]) -> list[list[Tensor]]:
    """M_t at the input of every down projection: [sequences][layers], each [T] float32."""
    downs = {site.path: site.module for site in stack.anatomy.sites if site.role == "mlp.down"}
    runs = (packing.observe(downs, lambda b=b: stack.model(**b, use_cache=False)) for b in batches)
    return [[stats.token_absmax for stats in run.values()] for run in runs]


def find_prefix(peaks: list[list[Tensor]], ids: list[Tensor], eta: float, start: int, most: int) -> list[int]:
    """The o most frequent ids of outlier tokens that do not stand first, then `start`; at most `most` in all."""
    outliers = [[(m / m.median() > eta).nonzero()[:, 0].tolist() for m in layers] for layers in peaks]
    number = -(-max(sum(map(len, layer)) for layer in zip(*outliers, strict=True)) // len(peaks))  # o
    kinds = Counter(int(ids[i][t]) for i, layers in enumerate(outliers) for at in layers for t in at if t > 0)
    front = [token for token, _ in kinds.most_common(min(number, most - 1))]
    return [*front, start] if number and most else []


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one block: scales of the inputs of its layers [layers], and of K and V [2, Hkv]; by layer the inputs'
    E[x_j^2]; by sequence M_t at the input of its down projection."""

    inputs: Tensor
    heads: Tensor
    squares: list[Tensor]
    peaks: list[Tensor]


class PrefixQuant(Plugin):
    """See the module."""

    Config = PrefixQuantConfig
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS, Claim.FINAL, Claim.NEEDS_CALIBRATION, Claim.PREFIX_CACHE}
    refuses = {"bert": "sees later tokens", "t5": "has an encoder, and caches two attentions"}
    config: PrefixQuantConfig

    def claimed(self) -> frozenset[Claim]:
        config = self.config
        self.weights_only = config.activation_bits == config.kv_bits == 16
        # Inputs of layers alone, with nothing in the cache: layers with a constant each, and no more than these.
        self.inputs_only = config.kv_bits == 16 and not (config.prefix_tokens or self.weights_only)
        if self.weights_only:  # no constants of activations, which adapters behind would make wrong
            return self.claims - {Claim.FINAL, Claim.PREFIX_CACHE}
        return self.claims - {Claim.PREFIX_CACHE} if self.inputs_only else self.claims

    def suits(self, model: ModelView) -> None:
        """Raise ArchitectureError, with a way out, unless `compress` works on this model."""
        kind, towers = f"{model.owner}: {model.config.model_type}", set(model.towers)
        if towers != {"decoder"} and not (self.weights_only and towers == {"encoder"}):
            one, alone = "only one tower of text can be packed", "its prefix needs a decoder alone"
            said = f"{kind} has {' and '.join(model.towers)}, and {one if self.weights_only else alone}"
            raise ArchitectureError(said, hint=ALONE if towers == {"encoder"} else DECODER)
        sites = model.linears("all", whole=True)
        if other := next((site for site in sites if site.kind != "linear"), None):
            said = f"{kind} keeps its {other.kind} ({other.role}) stacked in {other.path}.{other.parameter}"
            raise ArchitectureError(f"{said}, and only linear layers can be packed", hint=DECODER)
        if "mlp.down" not in {site.role for site in sites}:
            said = f"{kind} has no MLP, at whose down projection outlier tokens are found"
            raise ArchitectureError(said, hint=DECODER)
        beside = not (self.weights_only or self.inputs_only)
        if beside and not model.module._can_set_attn_implementation():
            said = f"{kind} does not look its attention up by name, so its keys and values cannot be rounded"
            raise ArchitectureError(said, hint=ALONE)
        size, least = self.config.group_size or 1, min(sites, key=lambda site: site.in_features)
        if size > (row := least.in_features):
            said = f"{model.owner}: group_size {size} exceeds the {row} weights in a row of {least.path}"
            raise ArchitectureError(said, hint=f"at most {row}, or leave it out: a scale for each row")

    @hookimpl
    def compress(self, model: ModelView, calibration: packing.Calibration, stack: Stack) -> None:
        self.suits(model)
        blocks = self.linears(model)
        if self.weights_only or self.inputs_only:
            for sites, block in zip(blocks, self.measure(model, calibration, [], 0), strict=True):
                for site, scale, squares in zip(sites, block.inputs, block.squares, strict=True):
                    site.replace(self.packed(site, None if self.weights_only else scale, squares))
            return
        edits = self.attach(model)
        attending = [edit for edit in edits if isinstance(edit, StaticKV)]
        plain = self.measure(model, calibration, edits, 0)
        batches, tokenizer = calibration.batches, stack.tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        fronts = {Claim.VIRTUAL_TOKENS, Claim.PREFIX_CACHE}  # of others: they stand behind the outlier tokens
        others = [m.id for m in stack.members if m.plugin is not self and m.plugin.claims & fronts]
        with stack.disabled(*others) if others else nullcontext():
            ids = [batch["input_ids"][0] for batch in batches]
            seen = [list(of_batch) for of_batch in zip(*(found.peaks for found in plain), strict=True)]
            peaks, most = token_peaks(stack, batches) if others else seen, self.config.prefix_tokens
            self.state["prefix"] = prefix = find_prefix(peaks, ids, self.config.eta, start, most)
            if prefix:
                model.module(input_ids=ids[0].new_tensor([prefix]), use_cache=False)
                for edit in attending:
                    edit.prefix = torch.stack(edit.seen)
        model.shift_positions(len(prefix))
        # The prefix has a BOS, so that of the text does not count.
        found = self.measure(model, calibration, edits, 1) if prefix else plain
        for edit, sites, new, old in zip(edits, blocks, found, plain, strict=True):
            for site, scale, squares in zip(sites, new.inputs, new.squares, strict=True):
                site.replace(self.packed(site, scale, squares))
            edit.input_scale = torch.stack((new.inputs, old.inputs))
            if isinstance(edit, StaticKV):
                edit.scale = torch.stack((new.heads, old.heads))
                edit.seen = ()

    def restore(self, model: ModelView, stack: Stack) -> None:
        if "prefix" in self.state:
            self.attach(model)
            model.shift_positions(len(self.state["prefix"]))

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        self.suits(model)
        for site in itertools.chain(*self.linears(model)):
            n, bias = site.in_features, 0 if site.bias is None else site.bias.nbytes
            row = -(-n * self.config.weight_bits // 8) + 4 * -(-n // (self.config.group_size or n))
            yield site, site.out_features * row + bias + (4 if self.config.activation_bits < 16 else 0)

    def seconds(self, model: ModelView, tokens: int) -> tuple[float, float]:
        """About what `compress` takes on one CPU core for so many tokens of text: least, and most (a prefix is found).

        From rates seen on a core of 2023: 1e11 operations a second in products, 9 ns for what is learnt from a value,
        70 ns for the search and the packing of a weight. Nothing is run; it works on the meta device.
        """
        sites = [site for block in self.linears(model) for site in block]
        weights = sum(site.in_features * site.out_features for site in sites)
        values = sum(site.in_features for site in sites)  # as many as keys, values and inputs that differ
        once = tokens * (2 * weights / 1e11 + 9e-9 * values)
        search = 70e-9 * weights
        again = self.config.prefix_tokens and not self.weights_only
        return once + search, once * (2 if again else 1) + search

    def linears(self, model: ModelView) -> list[list[Site]]:
        """The linear layers of each block, fused ones whole."""
        sites = model.linears("all", whole=True)
        return [[site for site in sites if site.layer == layer] for layer in range(model.num_layers)]

    def attach(self, model: ModelView) -> list[StaticKV | InputScales]:
        """For each layer an edit of its attention, still empty; a place for the constants alone where it has none."""
        sites = {site.layer: site for site in model.attention_sites()}
        edits: list[StaticKV | InputScales] = []
        for layer in range(model.num_layers):
            if layer in sites:
                edits.append(StaticKV(bits=self.config.kv_bits, rotate=self.config.rotate))
                model.attend(sites[layer], edits[-1])
            else:
                edits.append(model.keep(f"layer_{layer}", InputScales()))
        return edits

    def measure(
        self, model: ModelView, text: packing.Calibration, edits: list[StaticKV | InputScales], skip: int
    ) -> list[Measured]:
        """What each block is given before rounding, without the first `skip` tokens of a sequence. Each runs once.

        Without `edits` there is nothing of keys and values; where inputs are not rounded no scales, only what weights
        are worth.
        """
        results: list[Measured] = []
        blocks, config = self.linears(model), self.config

        def scales(parts: Iterable[Tensor], bits: int) -> tuple[Tensor, Tensor]:  # [1 or Hkv, ..., n] each
            pieces = (part.flatten(1, -2)[:, skip:].float() for part in parts)
            x = torch.cat([rotated(piece) if config.rotate else piece for piece in pieces], 1)
            if self.weights_only:
                return x.new_ones(1), x.square().mean((0, 1))
            scale = static_scale(x.flatten(1), min(bits, 8), clip=config.clip_search)
            return scale, x.square().mean((0, 1))

        def on_block(layer: int, block: nn.Module, calls: packing.BlockInputs) -> None:
            rows: dict[nn.Module, list[Tensor]] = {site.module: [] for site in blocks[layer]}
            with packing.entering(rows, lambda module, x: rows[module].append(x)):
                seen = [edits[layer].seen if edits else () for _ in calls.advance(block)]
            unseen = [site.path for site in blocks[layer] if not rows[site.module]]
            if unseen or len(set(map(len, seen))) > 1:  # keys and values of some texts alone
                place = unseen[0] if unseen else f"the attention of layer {layer} in some calls"
                said = f"prefixquant: no calibration text comes to {place}, so its input has no scale"
                hint = "more of it, or another plugin in the place of one that lets texts skip layers"
                raise DataError(said, hint=hint)
            known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # q, k and v are given the same tensors
            for row in rows.values():
                if (key := tuple(map(id, row))) not in known:
                    known[key] = scales((x[None] for x in row), config.activation_bits)
            found = [known[tuple(map(id, row))] for row in rows.values()]
            down = next(site.module for site in blocks[layer] if site.role == "mlp.down")
            heads = [scales(side, config.kv_bits)[0] for side in zip(*seen, strict=True)]
            measured = Measured(
                inputs=torch.cat([scale for scale, _ in found]),
                heads=torch.stack(heads) if heads else torch.empty(0),
                squares=[squares for _, squares in found],
                peaks=[x.abs().amax(-1).flatten().float().cpu() for x in rows[down]],
            )
            results.append(measured)

        text.walk(model.module, [site.module for site in model.blocks("layer")], on_block)
        return results

    def packed(self, site: Site, input_scale: Tensor | None, squares: Tensor) -> packing.QuantLinear:
        """W R^T in integers, whose scales have the least sum_j E[x_j^2] (w_j - fq(w_j))^2 in their row or group."""
        config, bits, acts = self.config, self.config.weight_bits, self.config.activation_bits
        weight = rotated(site.weight.float()) if config.rotate else site.weight.float()  # [out, in]
        values = groups(weight, config.group_size)
        if config.clip_search:
            counts = groups(squares[None], config.group_size)
            scale = packing.mse_clip_scale(values, bits=bits, counts=counts, per_row=True)  # [out, groups]
        else:
            scale = min_max(values, bits)[..., 0]
        integers = packing.quantize(weight, bits=bits, group_size=config.group_size, scale=scale)
        static = {"activation": "static-tensor", "act_bits": acts, "input_scale": input_scale}
        make = (RotatedLinear if config.rotate else StaticLinear).from_quantized
        return make(integers, bias=site.bias, dtype=site.weight.dtype, **(static if acts < 16 else {}))

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """In each mode: perplexity, and the outlier ratio of tokens that do not stand first."""
        stack, rows, prefix = evaluation.stack, evaluation.rows("eval"), self.state.get("prefix", [])
        texts = [row if isinstance(row, str) else " ".join(map(str, row.values())) for row in rows]
        batches = sequences(stack, texts, samples=8, length=256).batches
        id = stack.id_of(self)
        evaluation.add("prefix_tokens", len(prefix))
        evaluation.add("packed_bytes", sum(t.nbytes for t in stack.ledger.tensors(id).values()), unit="bytes")
        size = context_window(stack.model, stack.tokenizer) - len(prefix)
        try:
            for mode in self.modes(stack, id):
                switch(stack, id, mode)
                score = perplexity(stack.model, stack.tokenizer, rows, max_length=size)["perplexity"]
                evaluation.add(f"perplexity_{mode}", score.value, score.low, score.high, score.count)
                peaks = [m for layers in token_peaks(stack, batches) for m in layers]
                k = int(mode == "with_prefix" and bool(prefix))  # the text's BOS does not count
                evaluation.add(f"outlier_ratio_{mode}", max(float(m[k:].max() / m.median()) for m in peaks))
        finally:
            switch(stack, id, "with_prefix")

    def modes(self, stack: Stack, id: str) -> tuple[str, ...]:
        """What there is to compare."""
        if not stack.standing[id].compressed:
            return ("unquantized",)
        if self.inputs_only:
            return ("without_prefix", "dynamic")
        return ("weights_only",) if self.weights_only else get_args(Mode)


def switch(stack: Stack, id: str, mode: str) -> None:
    """Run the packed model of plugin `id` in another mode, with the static scales that belong to it."""
    parts, row = stack.ledger.of(id), int(mode != "with_prefix")
    scaled = (p for p in parts if isinstance(p, AttentionPart | FreePart))
    scales = itertools.chain(*(p.module.input_scale[row] for p in scaled))
    for part in parts:
        if isinstance(part, AttentionPart):
            part.module.mode = mode
        elif isinstance(part, ShiftPart):
            part.switch(mode == "with_prefix")
        elif isinstance(part, ReplacedPart) and part.module.activation is not None:
            part.module.activation = "dynamic-token" if mode == "dynamic" else "static-tensor"
            part.module.input_scale = next(scales, part.module.input_scale).clone()
