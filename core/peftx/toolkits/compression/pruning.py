"""Whole blocks out of a model: where its heads and neurons are, how layers are cut, what cannot stand beside that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftx.engines.bundle.exporting import blank
from peftx.errors import ArchitectureError, ConflictError
from peftx.kernel.anatomy.site import Site
from peftx.kernel.parts import AttentionPart, BasePart, DeltaPart, ReplacedPart
from peftx.kernel.plugin import Claim
from peftx.kernel.slots import Delta, kind_of
from peftx.kernel.stack import Stack
from peftx.kernel.targets import Targets
from peftx.kernel.view import BoundSite, ModelView
from peftx.toolkits.compression.narrow import NarrowLinear

HEADS = ("attention.q", "attention.k", "attention.v", "attention.o")
NEURONS = ("mlp.gate", "mlp.up", "mlp.down")
WORK = "Llama, Mistral, Qwen 2 and 3, Gemma, BERT and RoBERTa work"
"""Models whose heads and neurons can be taken out."""
_RUNS: dict[tuple[object, ...], RuntimeError | None] = {}
"""What `check_runs` has found in this process: a plan asks, and then the run."""


@dataclass(frozen=True)
class Blocks:
    """The heads, or the neurons, of one layer: what some matrices write, and one reads."""

    into: tuple[tuple[BoundSite, int], ...]
    """Matrices into them, and rows of a block."""
    out: BoundSite
    """The matrix out of them."""
    width: int
    """Columns of a block there."""
    count: int

    @property
    def cost(self) -> int:
        """Numbers of one block."""
        rows = sum(n * (site.in_features + (site.bias is not None)) for site, n in self.into)
        return rows + self.width * self.out.out_features

    @property
    def sites(self) -> list[BoundSite]:
        return [*(site for site, _ in self.into), self.out]

    def cut(self, kept: Tensor, deltas: Mapping[str, Delta]) -> Iterable[tuple[BoundSite, NarrowLinear]]:
        """Every matrix, and the layer for its place in which only these blocks are left.

        Args:
            kept: [count] bool. deltas: by path of the layer, what is folded in; `cut`.
        """
        for site, n in self.into:
            yield site, cut(site, deltas.get(site.path), rows=kept.repeat_interleave(n))
        yield self.out, cut(self.out, deltas.get(self.out.path), columns=kept.repeat_interleave(self.width))

    def shells(self, count: int) -> Iterable[tuple[str, nn.Linear]]:
        """Path of every matrix, and a layer without numbers of the size that it has with so many blocks."""
        sizes = [(site, site.in_features, n * count) for site, n in self.into]
        for site, i, o in (*sizes, (self.out, self.width * count, self.out.out_features)):
            yield site.path, nn.Linear(i, o, site.bias is not None, device="meta", dtype=site.dtype)


def heads_and_neurons(model: ModelView) -> list[Blocks]:
    """Heads (with grouped keys: all that share them) and neurons of every layer, in turn.

    Raises:
        ArchitectureError: no text, two towers, or layers that have them elsewhere than between plain linear layers.
        ConflictError: one of these is packed.
    """
    known = {(s.role, s.layer): model.bound(s) for s in model.anatomy.sites}
    reads, found = len(model.towers) == 1 and model.module.main_input_name == "input_ids", []
    for layer, h in enumerate(model.main.by_layer):
        q = h.heads * h.head_dim // max(h.kv_heads, 1)
        for roles, rows in ((HEADS, (q, h.head_dim, h.value_dim)), (NEURONS, (1, 1))):
            sites = [known[role, layer] for role in roles if (role, layer) in known]
            for site in sites:
                check_not_packed(model, site, "blocks leave before that")
            plain = all(
                s.kind == "linear" and not (s.fused or s.read) and kind_of(s.module) == "plain" for s in sites
            )
            whole = reads and plain and {s.role for s in sites} | {"mlp.gate"} >= {*roles}
            count = 0 if not whole else h.kv_heads if roles is HEADS else sites[-1].in_features
            into = tuple(zip(sites[:-1], rows, strict=False))
            if not count or any(site.out_features != n * count for site, n in into):
                what = f"no {'heads' if roles is HEADS else 'neurons'} between plain linear layers"
                said = f"layer {layer} of {model.config.model_type} has {what} of one tower of text"
                raise ArchitectureError(f"{model.owner}: {said}", hint=WORK)
            found.append(Blocks(into, sites[-1], sites[-1].in_features // count, count))
    return found


def check_not_packed(model: ModelView, site: Site, why: str) -> None:
    """Raises ConflictError where a matrix is packed that something is to be taken out of; `why` not: "cannot ..."."""
    if site.kind == "quantized":
        said = f"{site.path} is packed already, and {why}"
        raise ConflictError(f"{model.owner}: {said}", hint=f"put '{model.owner}' first")


def check_into(model: ModelView, found: Iterable[Blocks], targets: Targets, why: str) -> None:
    """Raises ArchitectureError where one of these layers is no matrix into heads or neurons, `why` it has to be."""
    into = {site.path for blocks in found for site, _ in blocks.into}
    if other := [site for site in model.linears(targets) if site.path not in into]:
        said = f"{other[0].path} leads into no heads or neurons, and {why}"
        raise ArchitectureError(f"{model.owner}: {said}", hint=f"leave it out of targets: '!{other[0].role}'")


def check_shrinks(model: ModelView, found: Iterable[Blocks]) -> None:
    """Try the architecture with one head and one neuron less in each layer, without numbers.

    Raises:
        ArchitectureError: it does not run so.
    """
    shells = [shell for blocks in found for shell in blocks.shells(max(blocks.count - 1, 1))]
    check_runs(model, dict(shells), "counts its heads itself, and does not run with one less", WORK)


def check_runs(model: ModelView, modules: Mapping[str, nn.Module], why: str, hint: str) -> None:
    """Try a model of this configuration with other modules at these paths, on the meta device.

    Args:
        why: what is then said of models of its type. hint: which ones work.

    Raises:
        ArchitectureError: it does not run so.
    """
    shapes = ((path, repr(module)) for path, module in modules.items())
    key = (type(model.module), model.config.to_json_string(use_diff=False), *shapes)
    if key not in _RUNS:
        _RUNS[key] = _error_of(model, modules)
    if (error := _RUNS[key]) is not None:
        said = f"{model.owner}: {model.config.model_type} {why}"
        raise ArchitectureError(said, hint=hint) from error


def _error_of(model: ModelView, modules: Mapping[str, nn.Module]) -> RuntimeError | None:
    trial = blank(model.module).eval()
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(trial.get_submodule(parent), name, module)
    try:
        trial(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
    except RuntimeError as error:
        return error.with_traceback(None)
    return None


def wide(site: BoundSite) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32 at least, in which is folded."""
    dtype = torch.promote_types(site.weight.dtype, torch.float32)
    return site.weight.to(dtype), None if site.bias is None else site.bias.to(dtype)


def cut(
    site: BoundSite,
    delta: Delta | None = None,
    *,
    rows: Tensor | slice = slice(None),
    columns: Tensor | slice = slice(None),
) -> NarrowLinear:
    """Some rows and columns of a layer, with a delta folded in, rounded once.

    Args:
        rows: of the outputs, [out] bool or their places. columns: likewise of the inputs, [in].
    """
    weight, bias = wide(site)
    weight, bias = (weight, bias) if delta is None else delta.fold(weight, bias)
    return NarrowLinear.of(weight[rows][:, columns], None if bias is None else bias[rows], site.weight.dtype)


def put_in_place(stack: Stack, id: str, layers: Sequence[tuple[BoundSite, nn.Module]]) -> list[str]:
    """Take off all that a plugin put on the model, and put these layers in the place of those that it stood on.

    Returns:
        Paths of what it trains of the base, a new head, which goes on as it is: for `train_again`.

    Raises:
        MergeError: what it attached was folded into the weights for good.
    """
    stack.ledger.check_removable(id)
    for part in reversed(stack.ledger.of(id)):
        if not isinstance(part, BasePart):
            part.undo()
            stack.ledger.parts.remove(part)
    for site, layer in layers:
        site.replace(layer)
    return [part.key for part in stack.ledger.of(id, BasePart)]


def check_masked(stack: Stack, id: str) -> None:
    """Raises ConflictError where a plugin has no masks on the model that it could compress by."""
    if not stack.ledger.of(id, DeltaPart) or id in stack.ledger.merged():
        said = "there are no masks on the model, or they are in the weights already"
        raise ConflictError(f"{id}: {said}", hint="phase: after-training beside `use`; stack.unmerge()")


def share_left(kept: Iterable[tuple[Blocks, Tensor]]) -> float:
    """Which share of the numbers in some heads and neurons is left; 1 of none.

    Args:
        kept: blocks, and which of them stay, [count] bool.
    """
    left = [(blocks.cost * int(these.sum()), blocks.cost * blocks.count) for blocks, these in kept]
    return sum(n for n, _ in left) / sum(of for _, of in left) if left else 1.0


def bytes_left(sites: Iterable[Site], share: float) -> Iterable[tuple[Site, int]]:
    """For `Plugin.planned`: each matrix, and its bytes when this share of it is left."""
    return [(site, int(site.weight.nbytes * share)) for site in sites]


def train_again(model: ModelView, paths: Iterable[str]) -> None:
    """In a bundle whose layers are narrow: let the base's own train that did, which are in its file."""
    for path in paths:
        model.bound(next(site for site in model.anatomy.sites if site.path == path)).train()


def check_unpacked(stack: Stack, id: str, verb: str = "prune") -> None:
    """Raises ConflictError where a plugin before this one packs the layers that it is to take parts out of."""
    order = list(stack.plugins)
    for other in stack.members[: order.index(id)]:
        if other.claims(Claim.QUANTIZES):
            said = f"'{other.id}' packs the layers that '{id}', which comes after it, is to {verb}"
            raise ConflictError(said, hint=f"put '{id}' before '{other.id}'")


def check_layers(stack: Stack, id: str, paths: Iterable[str], *, folds: bool) -> None:
    """Refuse what cannot stand on layers that a plugin takes blocks out of.

    Args:
        paths: of these layers, while it has not compressed yet. folds: what stands before it goes into the weights.

    Raises:
        ConflictError: a plugin packs them before it; stands on one of them and would not be folded in; or trains one
            that was pruned, which no bundle would hold twice.
    """
    order, done = list(stack.plugins), stack.standing[id].compressed
    if not done:
        check_unpacked(stack, id)
    mine = {part.key for part in stack.ledger.of(id, ReplacedPart)} if done else {*paths}
    for part in stack.ledger.parts:
        trains = isinstance(part, BasePart)
        lost = not folds or order.index(part.owner) > order.index(id)
        clash = trains if done else lost and (trains or isinstance(part, DeltaPart))
        if clash and part.owner != id and part.key.partition("@")[0] in mine:
            said = f"'{part.owner}' stands on {part.key}, which '{id}' {'pruned' if done else 'is to prune'}"
            place = f"before '{id}' or on other layers" if folds else "on other layers"
            later = f"put it on when '{id}' has: Stack(..., inject=False), compress(data, ['{id}']), inject()"
            way = "an adapter in its place" if done else f"'{part.owner}' {place}, or {later}"
            raise ConflictError(said, hint=way)


def check_heads(stack: Stack, id: str) -> None:
    """Raises ConflictError where another plugin edits attention by its heads, of which this one takes some out."""
    for part in stack.ledger.all(AttentionPart):
        if part.owner != id:
            said = f"'{part.owner}' edits attention by its heads, and '{id}' takes heads out"
            raise ConflictError(said, hint="keep one of them")
