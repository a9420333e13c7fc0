"""The anatomy of a model: every place under one vocabulary, from a table or inferred."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import ArchitectureError, nearest
from peftx.kernel.anatomy.site import Site
from peftx.kernel.anatomy.table import Fused, Stacked, Table, Tower, table_for
from peftx.kernel.chain import is_ours
from peftx.kernel.slots import Rows, base_class, is_map, kind_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ROUTES = re.compile(r"(^|\.)(router|gate)(\.|$)")
_NO_MATRICES = ("embedding", "norm", "convolution")
# The tower's own name first: BART and Whisper map the general names to the encoder's.
_HEADS = ("{tower}_attention_heads", "num_attention_heads", "num_heads", "n_head")
_KV_HEADS = ("{tower}_attention_heads", "num_key_value_heads")
_HEAD_DIM = ("qk_head_dim", "head_dim", "d_kv")
"""DeepSeek has the first; its `head_dim` is the rotated part alone."""


@dataclass(frozen=True)
class Heads:
    """Sizes of one layer's attention; 0 where the tower has none (Mamba)."""

    heads: int
    kv_heads: int
    head_dim: int
    """Of queries and keys."""
    value_dim: int
    """Of values: as many, but in DeepSeek."""


@dataclass(frozen=True)
class TowerFacts:
    """Sizes of one tower.

    Raises:
        ArchitectureError: from `heads` and the others below, if the layers differ in it (Gemma 4).
    """

    name: str
    layers: int
    hidden_size: int
    by_layer: tuple[Heads, ...]
    attention: tuple[str, ...]
    """Paths of the modules that call the attention interface, by layer; empty where a layer has none."""
    cross_attention: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        return self._one({sizes.heads for sizes in self.by_layer}, "heads")

    @property
    def kv_heads(self) -> int:
        return self._one({sizes.kv_heads for sizes in self.by_layer}, "key-value heads")

    @property
    def head_dim(self) -> int:
        return self._one({sizes.head_dim for sizes in self.by_layer}, "numbers in a head")

    @property
    def value_dim(self) -> int:
        return self._one({sizes.value_dim for sizes in self.by_layer}, "numbers in a head's value")

    def _one(self, found: set[int], what: str) -> int:
        if len(found) == 1:
            return next(iter(found))
        raise ArchitectureError(
            f"the {self.name}'s layers differ: {' or '.join(map(str, sorted(found)))} {what}",
            hint="a plugin finds the sizes of each layer in `by_layer`",
        )

    @property
    def groups(self) -> int:
        """Query heads for each key-value head (GQA)."""
        return self.heads // self.kv_heads if self.kv_heads else 0


class Anatomy:
    """Names of a model's parts.

    Args:
        model: a `transformers` model, on any device (meta too).
        table: its table; looked up by `config.model_type`, else inferred (`inferred` is then true).

    Raises:
        ArchitectureError: the table names a module that the model lacks, or no layers can be found.
    """

    def __init__(self, model: PreTrainedModel, table: Table | None = None) -> None:
        from peftx.kernel.anatomy.lookup import infer

        self.model = model
        self.config: PretrainedConfig = model.config
        self._modules: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules(remove_duplicate=False) if not is_ours(name)
        }
        base = model.base_model
        self._table_prefix = f"{base.base_model_prefix}."
        self._own_prefix = "" if base is model else f"{model.base_model_prefix}."
        found = table or table_for(self.config.model_type)
        self.inferred = found is None
        self.table = found or infer(model, self._modules)
        self.sites: list[Site] = []
        self.towers: dict[str, TowerFacts] = {}
        for tower in self.table.towers:
            self._read_tower(tower)
        for role, path in self.table.around.items():
            self._add(role, path, "", None, "")
        self._add_others()

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def main(self) -> TowerFacts:
        """The tower that speaks: the decoder if there is one, else the first."""
        return self.towers.get("decoder") or next(iter(self.towers.values()))

    @property
    def hidden_size(self) -> int:
        return self.main.hidden_size

    @property
    def num_layers(self) -> int:
        return self.main.layers

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config.is_encoder_decoder)

    @property
    def is_decoder(self) -> bool:
        """Is there a tower that generates."""
        return "decoder" in self.towers

    @property
    def max_length(self) -> int | None:
        """The context the model was made for, in tokens; None where it has no such limit."""
        config = self.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
            if isinstance(value := getattr(config, name, None), int):
                return value
        return None

    def site(self, role: str, *, tower: str | None = None, layer: int | None = None) -> Site:
        """The one site of a role, as in `site("head")` or `site("attention.o", layer=3)`.

        Raises:
            ArchitectureError: there is none, or more than one.
        """
        found = [
            s
            for s in self.sites
            if s.role == role and (tower is None or s.tower == tower) and (layer is None or s.layer == layer)
        ]
        if len(found) != 1:
            roles = sorted({s.role for s in self.sites})
            what = "no" if not found else f"{len(found)}"
            raise ArchitectureError(
                f"{self.config.model_type} has {what} sites of role '{role}'"
                + (f" in layer {layer}" if layer is not None else ""),
                hint=nearest(role, roles) or f"its roles: {', '.join(roles)}",
            )
        return found[0]

    def attention_site(self, layer: int, *, tower: str | None = None, role: str = "attention") -> Site:
        """The module of layer `layer` that calls the attention interface."""
        facts = self.towers[tower] if tower else self.main
        paths = facts.attention if role == "attention" else facts.cross_attention
        if not paths or not paths[layer]:
            where = f"layer {layer} of the {facts.name}" if paths else f"the {facts.name}"
            raise ArchitectureError(f"{self.config.model_type}: {where} has no {role}")
        return Site(role, paths[layer], self._modules[paths[layer]], "block", facts.name, layer)

    # -- reading -------------------------------------------------------------------------------------------------

    def _find(self, path: str, layer: str = "") -> tuple[str, nn.Module] | None:
        """Resolve `a|b?` below `layer`; the base model's prefix may be missing (`LlamaModel`) or another one
        (`transformer` in `LlamaForQuestionAnswering` and `T5ForTokenClassification`)."""
        optional = path.endswith("?")
        for choice in path.rstrip("?").split("|"):
            full = f"{layer}.{choice}" if layer else choice
            for name in (full, self._own_prefix + full.removeprefix(self._table_prefix)):
                if name in self._modules:
                    return name, self._modules[name]
        if optional:
            return None
        raise ArchitectureError(
            f"the table of '{self.table.model_type}' names '{layer + '.' if layer else ''}{path}', "
            f"which {type(self.model).__name__} does not have",
            hint=nearest(path, self._modules) or None,
        )

    def _read_tower(self, tower: Tower) -> None:
        found = self._find(f"{tower.layers}?")
        if found is None:
            return  # a text-only model of a family that also has another tower
        base, layers = found
        if not isinstance(layers, nn.ModuleList):
            raise ArchitectureError(f"'{base}' is a {type(layers).__name__}, not the list of layers")
        config = getattr(self.config, tower.config) if tower.config else self.config
        facts = self._facts(tower, config, base, len(layers))
        self.towers[tower.name] = facts
        for role, path in tower.around.items():
            self._add(role, path, "", None, tower.name)
        for index in range(len(layers)):
            layer = f"{base}.{index}"
            for role, path in tower.roles.items():
                self._add(
                    role, path, layer, index, tower.name,
                    read=role in tower.read, called=role in tower.called, apart=role in tower.apart,
                )  # fmt: skip
            for fused in tower.fused:
                self._add_fused(fused, layer, index, facts)
            for stack in tower.stacked:
                self._add_stacked(stack, layer, index, tower.name)
            for role, path in tower.blocks.items():
                if (hit := self._find(path, layer)) is not None:
                    self.sites.append(Site(f"block.{role}", *hit, "block", tower.name, index))
            self.sites.append(Site("block.layer", layer, self._modules[layer], "block", tower.name, index))

    def _facts(self, tower: Tower, config: PretrainedConfig, base: str, layers: int) -> TowerFacts:
        def first(names: tuple[str, ...], config: PretrainedConfig = config) -> int | None:
            values = (getattr(config, name.format(tower=tower.name), None) for name in names)
            return next((v for v in values if isinstance(v, int)), None)

        hidden = first(("hidden_size", "d_model", "n_embd")) or 0
        dispatch = {**tower.blocks, **tower.dispatch}
        has_attention = "attention" in dispatch

        def sizes(config: PretrainedConfig) -> Heads:
            heads = (first(_HEADS, config) or 0) if has_attention else 0
            kv_heads = first(_KV_HEADS, config) or heads
            head_dim = first(_HEAD_DIM, config) or (hidden // heads if heads else 0)
            value_dim = first(("v_head_dim",), config) or head_dim
            return Heads(heads, kv_heads if heads else 0, head_dim, value_dim)

        by_layer = (
            tuple(sizes(config.per_layer_config[i]) for i in range(layers))
            if config.is_heterogeneous
            else layers * (sizes(config),)
        )

        def paths(role: str) -> tuple[str, ...]:
            if role not in dispatch:
                return ()
            hits = (self._find(dispatch[role], f"{base}.{i}") for i in range(layers))
            return tuple(hit[0] if hit is not None else "" for hit in hits)

        return TowerFacts(
            tower.name, layers, hidden, by_layer, paths("attention"), paths("cross_attention"),
        )  # fmt: skip

    def _add(
        self,
        role: str,
        path: str,
        layer: str,
        index: int | None,
        tower: str,
        *,
        read: bool = False,
        called: bool = False,
        apart: bool = False,
    ) -> None:
        hit = self._find(path, layer)
        if hit is None:
            return
        # torch's attention takes the weight of its output projection, and never calls it.
        read = read or isinstance(self._modules.get(hit[0].rpartition(".")[0]), nn.MultiheadAttention)
        self.sites.append(
            Site(role, *hit, _kind(hit[1], role), tower, index, read=read, called=called, apart=apart)
        )

    def _add_fused(self, fused: Fused, layer: str, index: int, facts: TowerFacts) -> None:
        hit = self._find(fused.path, layer)
        if hit is None:
            return
        name, module = hit
        total = _out_features(module)
        sizes = _part_sizes(fused, total, facts.by_layer[index])
        start = 0
        for part, (role, size) in enumerate(zip(fused.roles, sizes, strict=True)):
            if fused.layout == "interleaved":
                rows = Rows(total, heads=facts.by_layer[index].heads, parts=len(fused.roles), part=part)
            else:
                rows = Rows(total, start, start + size)
            start += size
            self.sites.append(
                Site(role, name, module, _kind(module, role), facts.name, index, "weight", rows, fused.roles)
            )

    def _add_stacked(self, stack: Stacked, layer: str, index: int, tower: str) -> None:
        hit = self._find(stack.path, layer)
        if hit is None:
            return
        name, module = hit
        parameter = module._parameters.get(stack.parameter)
        if parameter is None or not parameter.is_floating_point():  # packed, in a layout of its own (MXFP4)
            return
        total = parameter.shape[-1 if stack.transposed else -2]
        parts = len(stack.roles)
        size = total // parts
        for i, role in enumerate(stack.roles):
            rows = None
            if parts > 1:
                rows = (
                    Rows(total, heads=size, parts=parts, part=i)
                    if stack.layout == "interleaved"
                    else Rows(total, i * size, (i + 1) * size)
                )
            self.sites.append(
                Site(
                    role, name, module, "experts", tower, index, stack.parameter, rows, stack.roles,
                    transposed=stack.transposed, bias_name=stack.bias,
                )
            )  # fmt: skip

    def uncovered(self) -> tuple[int, int, list[str]]:
        """Matrices inside the layers that `targets: all` leaves out: in no table, and by their form no linear layers.
        Routers, embeddings, norms and convolutions are not counted, since `all` does not mean them.

        Returns:
            (their numbers, numbers of all matrices inside the layers, their names).
        """
        known = {id(s.module._parameters.get(s.parameter)) for s in self.sites if s.kind != "block"}
        left, total, names = 0, 0, []
        from peftx.kernel.anatomy.lookup import layer_stacks

        stacks = tuple(f"{path}." for path in layer_stacks(self._modules))
        for name, module in self._modules.items():
            if not f"{name}.".startswith(stacks) or _kind(module, "") in _NO_MATRICES or _ROUTES.search(name):
                continue
            for leaf, parameter in module._parameters.items():
                if parameter is None or parameter.ndim not in (2, 3):
                    continue
                total += parameter.numel()
                if id(parameter) not in known:
                    left += parameter.numel()
                    names.append(f"{name}.{leaf}")
        return left, total, names

    def _add_others(self) -> None:
        """Linear layers that no table names: selectable by regular expression only."""
        known = {id(site.module) for site in self.sites if site.kind != "block"}
        for name, module in self._modules.items():
            if id(module) not in known and name and _kind(module, "") in ("linear", "quantized"):
                known.add(id(module))
                self.sites.append(Site(f"other.{name.split('.')[-1]}", name, module, "linear"))

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)


def _kind(module: nn.Module, role: str) -> str:
    base = base_class(module)
    if role == "router":  # first: Llama 4's is an nn.Linear, which returns more than its product
        return "router"
    if issubclass(base, nn.Linear | Conv1D):
        return "linear" if is_map(module) else "block"
    if issubclass(base, nn.Embedding):
        return "embedding"
    if kind_of(module) == "packed":
        return "quantized"
    if issubclass(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    if re.search(r"norm", base.__name__, re.IGNORECASE):
        return "norm"
    return "block"


def _out_features(module: nn.Module) -> int:
    if issubclass(base_class(module), nn.Linear) or kind_of(module) == "packed":
        return module.out_features
    return module.nf  # Conv1D


def _part_sizes(fused: Fused, total: int, facts: Heads) -> list[int]:
    if fused.roles == ("attention.q", "attention.k", "attention.v") and fused.layout == "concat":
        sizes = [facts.heads * facts.head_dim, *2 * [facts.kv_heads * facts.head_dim]]
    else:
        sizes = len(fused.roles) * [total // len(fused.roles)]
    if sum(sizes) != total:
        raise ArchitectureError(
            f"'{fused.path}' has {total} rows, its roles {', '.join(fused.roles)} need {sizes}"
        )
    return sizes
