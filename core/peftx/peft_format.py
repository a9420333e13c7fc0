"""How HF PEFT writes a method: what a plugin says of it, so that adapters are read and written. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftx.errors import AdapterError

NEUTRAL: Mapping[str, Any] = {
    "inference_mode": ..., "task_type": ..., "base_model_name_or_path": ..., "revision": ..., "peft_version": ...,
    "peft_type": ..., "auto_mapping": ..., "fan_in_fan_out": ..., "megatron_core": ..., "qalora_group_size": ...,
    "target_modules": ..., "exclude_modules": ..., "layers_to_transform": ..., "layers_pattern": ...,
    "ensure_weight_tying": ..., "bias": "none",
}  # fmt: skip
"""Fields of `adapter_config.json` that change nothing of a finished adapter (...), or not at this value. Which modules
are adapted is read from the tensors."""


SOFT = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "init_weights")
"""Fields of soft prompts and prefixes that follow from the model, or say how they began."""

MERGED = "load it with PEFT, and merge it into the base: PeftModel.merge_and_unload"
"""The way out where no plugin computes an adapter."""
INNER = ".base_layer"
"""In the path of what a module was before it was wrapped: of stacked experts, once for each further matrix."""


class Settings:
    """An `adapter_config.json`, and the shapes beside it; remembers which fields somebody took into account.

    Args:
        fields: of the file. shapes: of its tensors, by the module's path in the model and the tensor's name in it:
            `{"model.layers.0.self_attn.q_proj": {"lora_A.weight": (8, 64), ...}}`; "" for those of no module.
    """

    def __init__(
        self, fields: Mapping[str, Any], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    ) -> None:
        self.fields = dict(fields)
        self.shapes = shapes
        self._read: set[str] = set()

    @property
    def type(self) -> str:
        return str(self.fields.get("peft_type"))

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self.fields.get(name)

    def get(self, name: str, default: Any) -> Any:
        found = self[name]
        return default if found is None else found

    def pattern(self, name: str, path: str, usual: Any = None) -> Any:
        """What a `..._pattern` says of a matrix: of the first key that matches its path, or all of it behind a dot."""
        patterns: Mapping[str, Any] = self.get(name, {})
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), usual)

    def matrices(self, path: str) -> list[str]:
        """What PEFT adapts at a module's path, by the names that patterns go by: the module, or those of its parameters
        that `target_parameters` names, each by itself, as of stacked experts."""
        split = [name.rpartition(".") for name in self.get("target_parameters", ())]
        modules = self.get("target_modules", ())
        by_name = (_ends(path, name) for name in modules)
        if re.fullmatch(modules, path) if isinstance(modules, str) else any(by_name):
            return [path]
        named = {last for above, _, last in split if not above or _ends(path, above)}
        return [f"{path}.{name}" for name in sorted(named)] or [path]

    def left(self) -> dict[str, Any]:
        """Fields that nobody took into account, and that say something."""
        return {
            name: value
            for name, value in self.fields.items()
            if name not in self._read and value and NEUTRAL.get(name) not in (..., value)
        }

    def adapted(self, *names: str, dimensions: int = 2) -> dict[str, tuple[int, ...]]:
        """Modules that have one of these tensors, with its shape.

        Args:
            dimensions: that the tensor has at a linear layer at most.

        Raises:
            AdapterError: it has more, as PEFT's is at a convolution.
        """
        found = {p: own[name] for p, own in self.shapes.items() for name in names if name in own and p}
        for path, shape in found.items():
            if len(shape) > dimensions:
                size = "x".join(map(str, shape))
                raise AdapterError(
                    f"the adapter has an update of a convolution, {path} ({size}), and plugins adapt matrices",
                    hint=MERGED,
                )
        return {path.replace(INNER, ""): shape for path, shape in found.items()}


@dataclass(frozen=True)
class PeftFormat:
    """One of PEFT's methods, as a plugin computes it; `Plugin.peft` lists those that a plugin knows.

    peft = (
        PeftFormat(
            "IA3",
            tensors={"l": "ia3_l"},
            options=lambda settings: {"targets": targets_of(settings.adapted("ia3_l"))},
            settings=lambda config: {"feedforward_modules": []},
        ),
    )
    """

    type: str
    """`peft_type`; a keyword of the package too, `peft:IA3`, by which the plugin is found."""
    options: Callable[[Settings], dict[str, Any]]
    """The plugin's options under which it is what the settings say.

    Raises:
        PeftxError: they say something that the plugin does not do.
    """
    settings: Callable[[Any], dict[str, Any]]
    """What `adapter_config.json` has to say of the plugin's configuration, modules apart."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Parameter or buffer of a delta -> its name in the file, behind the module's path."""
    divided: Mapping[str, int] = field(default_factory=dict)
    """Those that a fused matrix shares out among its roles, and along which axis; each role has the others whole."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Tensor of what the plugin keeps (`model.keep`, soft tokens), as `name.parameter` -> its name in the file."""
    fused: bool = True
    """Can roles of a fused matrix be told apart in a tensor that PEFT has of all of it."""
    neutral: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """What a divided tensor is, from the matrix's weight [out, in], where no role is adapted; else zero."""
    experts: bool = False
    """Does PEFT adapt stacked experts by it (`target_parameters`)."""
    own: frozenset[str] = frozenset()
    """Parameters or buffers of a delta that the file does not have."""
    read: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda delta, tensors: tensors
    """Tensors of a delta, or of what is kept, from those of the file, where they differ: both by our names."""
    write: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda delta, tensors: tensors
    """And back."""
    of_deltas: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda deltas: {}
    """What `adapter_config.json` has to say of the deltas, by their modules' paths."""
    prepare: Callable[[Any, Settings], None] = lambda plugin, settings: None
    """Make a plugin that was put on a model ready for the numbers of a finished adapter."""
    when: Callable[[Settings], bool] = lambda settings: True
    """Of several plugins that know a type: is an adapter this one's."""
    written: Callable[[Any], bool] = lambda config: True
    """Of several types that a plugin knows: is a configuration this one's."""


def _ends(path: str, name: str) -> bool:
    """As PEFT finds a module by its name."""
    return path == name or path.endswith(f".{name}")


def targets_of(paths: Sequence[str] | Mapping[str, Any]) -> str:
    """Words of `Targets` that select exactly these modules: those that differ in the layer alone are put together."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        layer = re.search(r"\.(\d+)\.", path)
        before, number, after = (
            (path[: layer.start()], layer[1], path[layer.end() :]) if layer else (path, "", "")
        )
        found.setdefault((before, after), []).append(number)
    same: dict[tuple[str, str], list[str]] = {}
    for (before, after), numbers in found.items():
        same.setdefault((before, "|".join(numbers)), []).append(after)
    words = []
    for (before, layers), ends in same.items():
        after = f"\\.({layers})\\.({'|'.join(map(re.escape, ends))})" if layers else ""
        words.append(f"re:^{re.escape(before)}{after}$")
    return " ".join(words)


def by_value(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """{targets: value} of the modules whose value is not the usual one."""
    groups: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != usual:
            groups.setdefault(value, []).append(path)
    return {targets_of(paths): value for value, paths in groups.items()}


def most_common(values: Mapping[str, Any]) -> Any:
    """The value that most modules have; of equally many the first.

    Raises:
        PeftxError: there is none.
    """
    if not values:
        raise AdapterError("the adapter's file has no tensor of the method that its settings name")
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: counts[value])
