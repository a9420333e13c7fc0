"""A folder of HF PEFT: which plugins it is, with which options. Read are its settings and the names of its tensors.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
|---------------|------------- path -------------|-- name ----|
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from peftx.composition import metadata
from peftx.errors import AdapterError, BundleError, PeftxError, RegistryError
from peftx.kernel.plugin import Plugin
from peftx.peft_format import INNER, MERGED, PeftFormat, Settings, targets_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BARE = "base_model."
"""The same of soft prompts and prefixes."""
LARGEST_HEADER = 1 << 26
LIES = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What Python raises where a file says a thing of the wrong kind: strings for numbers, lists for mappings, 1e999."""
HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
"""Modules that PEFT's wrapper for a task reads from the adapter's file too, and that train with an adapter here."""
PROMPT = "prompt_embeddings"
FULL = "full-finetuning"
"""The plugin that trains parts of the base as they are."""
TOKENS = "token_adapter.trainable_tokens_delta"


class Plugins(Protocol):
    """The installed ones: of the registry, which reads adapters itself, what is asked for here."""

    def entries(self) -> list[metadata.Entry]: ...

    def outline(self, name: str) -> type[Plugin]: ...

    def load(self, name: str) -> type[Plugin]: ...


def is_adapter(folder: str | Path) -> bool:
    """Is this a folder as PEFT writes it."""
    return (Path(folder) / CONFIG).is_file()


@dataclass(frozen=True)
class Entry:
    """A plugin of the stack that an adapter is."""

    use: str
    options: dict[str, Any]
    format: PeftFormat | None = None
    """None: parameters of the base itself."""


@dataclass(frozen=True)
class Adapter:
    """A folder of PEFT, as far as its settings and its tensors' names and shapes tell."""

    folder: Path
    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """By the name in the file."""

    @property
    def type(self) -> str:
        return str(self.fields.get("peft_type"))

    @property
    def base(self) -> str | None:
        """The model that the settings name."""
        return self.fields.get("base_model_name_or_path") or None

    @property
    def prefix(self) -> str:
        """Of the names of what stands in the model."""
        return BARE if PROMPT in self.shapes else PREFIX

    @cached_property
    def full(self) -> dict[str, str]:
        """Parameters of the base that the file holds whole, by their name in the model -> name in the file."""
        found = {}
        for name in self.shapes:
            path, _, last = name.removeprefix(self.prefix).rpartition(".")
            own = not any(part.startswith(("lora_", "token_adapter")) for part in path.split("."))
            if last in ("weight", "bias") and own and name.startswith(self.prefix):
                found[f"{path.replace(INNER, '')}.{last}"] = name
        return found

    def places(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Path of a module -> name of a tensor in it -> name in the file; "" for those of no module."""
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            for name in names:
                if key == name:
                    found.setdefault("", {})[name] = key
                elif key.startswith(self.prefix) and key.endswith(f".{name}"):
                    found.setdefault(key[len(self.prefix) : -len(name) - 1], {})[name] = key
        return found

    def settings(self, names: Iterable[str]) -> Settings:
        places = self.places(names)
        return Settings(
            self.fields,
            {p: {n: self.shapes[key] for n, key in own.items()} for p, own in places.items()},
        )


def read_adapter(folder: str | Path) -> Adapter:
    """What a folder of PEFT says of itself.

    Raises:
        BundleError: a file is missing or damaged, or the weights are a pickle.
    """
    folder = Path(folder)
    fields = _fields(folder / CONFIG)
    return Adapter(folder, fields, _shapes(folder))


def entries(adapter: Adapter, registry: Plugins) -> list[Entry]:
    """The plugins that the adapter is: its method, and what of the base it trained as well.

    Raises:
        PeftxError: no installed plugin computes the method, or it has settings that none takes into account.
        BundleError: a setting is of a kind that it cannot be, or a tensor of a shape.
    """
    try:
        return _entries(adapter, registry)
    except PeftxError:
        raise
    except (re.error, *LIES) as error:
        said = " ".join(str(error).split())[:300]
        raise BundleError(
            f"'{adapter.folder}' has a setting or a tensor that PEFT does not write: {type(error).__name__}: {said}"
        ) from error


def _entries(adapter: Adapter, registry: Plugins) -> list[Entry]:
    use, format, settings = _method(adapter, registry)
    options = format.options(settings)
    plugin = registry.outline(use)
    if "targets" in plugin.Config.model_fields and "targets" not in options:
        options["targets"] = targets_of(settings.adapted(*format.tensors.values()))
    names = (*format.tensors.values(), *format.kept.values())
    known = {key for own in adapter.places([*names, TOKENS]).values() for key in own.values()}
    other = [key for key in adapter.shapes if key not in known and key not in adapter.full.values()]
    if other:
        more = f" and {len(other) - 1} more" if other[1:] else ""
        raise AdapterError(
            f"'{adapter.folder}' has {other[0].removeprefix(adapter.prefix)}{more}, which '{use}' does not compute",
            hint=MERGED,
        )
    found = [Entry(use, options, format), *_beside(adapter, settings)]
    left = settings.left()
    if left:
        what = ", ".join(f"{name}={value!r:.80}" for name, value in list(left.items())[:3])
        raise AdapterError(
            f"'{adapter.folder}' has settings that '{use}' does not know: {what}",
            hint=MERGED,
        )
    return found


def _method(adapter: Adapter, registry: Plugins) -> tuple[str, PeftFormat, Settings]:
    """The plugin that computes the adapter."""
    known: set[str] = set()
    for entry in registry.entries():
        types = metadata.keyword_values(entry.keywords, "peft")
        known |= set(types)
        if adapter.type not in types:
            continue
        for format in registry.outline(entry.name).peft:
            settings = adapter.settings([*format.tensors.values(), *format.kept.values()])
            if format.type == adapter.type and format.when(settings):
                return entry.name, format, settings
    methods = ", ".join(sorted(known)) or "no method of PEFT"
    raise RegistryError(
        f"'{adapter.folder}' is an adapter of {adapter.type}, which no installed plugin computes"
        + (", or not with these settings" if adapter.type in known else ""),
        hint=f"there are plugins for {methods}: install one, merge it with PEFT, or write one (docs/peft.md)",
    )


def _beside(adapter: Adapter, settings: Settings) -> list[Entry]:
    """What PEFT trains beside any method: whole modules, biases, rows of tokens."""
    found = []
    saved, bias = settings["modules_to_save"] or (), settings.get("bias", "none")
    parameters = {name: tuple(name.rpartition(".")[::2]) for name in adapter.full}
    heads = HEADS.get(adapter.fields.get("task_type") or "", set())
    whole = [p for p, _ in parameters.values() if _named(p, saved) and heads.isdisjoint(p.split("."))]
    if whole:
        found.append(Entry(FULL, {"targets": targets_of(dict.fromkeys(whole))}))
    biases = [path for path, last in parameters.values() if last == "bias" and path not in whole]
    if bias != "none" and biases:
        found.append(Entry(FULL, {"targets": targets_of(biases), "parameters": "bias"}))
    rows = settings["trainable_token_indices"] or ()
    by_name = rows if isinstance(rows, dict) else {"": rows}
    for path, own in adapter.places([TOKENS]).items():
        tokens = next((ids for name, ids in by_name.items() if not name or _named(path, [name])), None)
        if tokens is None or len(tokens) != adapter.shapes[own[TOKENS]][0]:
            raise BundleError(
                f"'{adapter.folder}': trainable_token_indices do not go with the rows of {path}"
            )
        found.append(Entry(FULL, {"targets": targets_of([path]), "tokens": sorted(tokens)}))
    return found


def _named(path: str, names: Iterable[str]) -> bool:
    """As PEFT finds modules to save: by the end of their path."""
    return any(path == name or path.endswith(name) for name in names)


def _fields(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        out = f"it is a bundle: peftx export {file.parent} adapter --format peft writes one"
        bundle = (file.parent / "manifest.json").exists()
        raise BundleError(
            f"'{file.parent}' is no adapter of PEFT: it has no {file.name}", hint=out if bundle else None
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"'{file}' is corrupted: {error}") from error
    if not isinstance(fields, dict):
        raise BundleError(f"'{file}' is corrupted: it holds no settings")
    return fields


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the head of the file of weights."""
    file = folder / WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise BundleError(
            f"'{folder}' has its weights only as a pickle (adapter_model.bin), which peftx does not read",
            hint="convert it where you trust it: PeftModel.save_pretrained(path) writes safetensors",
        )
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        return {
            name: tuple(int(size) for size in told["shape"])
            for name, told in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError as error:
        raise BundleError(f"'{folder}' has no {WEIGHTS}") from error
    except (OSError, RecursionError, struct.error, *LIES) as error:
        raise BundleError(f"'{file}' is corrupted: {error}") from error


def plugin_of(entry: Entry, registry: Plugins) -> Plugin:
    """The plugin itself."""
    return registry.load(entry.use)(**entry.options)
