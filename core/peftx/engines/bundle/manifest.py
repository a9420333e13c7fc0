"""What lies in a bundle's folder under which name, and whether it is what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from peftx.engines.files import check_there, plain_files, read_json
from peftx.engines.tensor_files import differs
from peftx.errors import BundleError
from peftx.history import History
from peftx.version import __version__
from peftx_spec.portable import portable

FORMAT = 3
WITHOUT_ZEROS = 2
"""What bundles are written as that leave no zeros out, so that earlier versions read them."""
MANIFEST = "manifest.json"
PIPELINE = "pipeline.yaml"
CARD = "README.md"
HISTORY = "history.json"
BASE = "base.safetensors"
BASE_FOLDER = "base"
ANEW = "copy the bundle again, or save it anew"
"""The way out where what a bundle holds is not what was saved."""


def member_file(id: str) -> str:
    """The name of a plugin's file of tensors, which no other file of a bundle has: no id begins with `_`."""
    name = f"{portable(id)}.safetensors"
    return f"_{name}" if name == BASE else name


class _Loose(BaseModel):
    """Written by us, so entries of a later version may stand beside ours."""

    model_config = ConfigDict(extra="allow", strict=True)


class BaseEntry(_Loose):
    """The base of a bundle, as `manifest.json` holds it."""

    id: str
    fingerprint: str | None
    model_type: str
    cls: str = Field(alias="class")
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    contained: list[str] | None = None
    settings: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    buffers: dict[str, str] = {}
    """dtype of each buffer that is computed, and was cast with the model since."""
    tokenizer: str | None = None
    """Digest of the tokenizer; of bundles from version 0.1, and where there is none, None."""


class HubEntry(_Loose):
    """Where a pulled bundle came from: what was asked for, and the commit that it was."""

    repo: str
    revision: str
    commit: str


class PluginEntry(_Loose):
    """One plugin of a bundle, as `manifest.json` holds it."""

    id: str
    use: str
    cls: str = Field(alias="class")
    published: bool = True
    """Has `use` an entry point; else the class is one of the program that saved it."""
    options: dict[str, Any]
    phase: str | None
    state: dict[str, Any]
    injected: bool
    compressed: bool
    frozen: bool
    folded: dict[str, list[str]] | None
    replaced: dict[str, tuple[str, dict[str, Any]]]
    sparse: list[str] = []
    """Tensors that are stored as what changed in them."""
    shorter: dict[str, tuple[Literal["bool", "float32"], list[int]]] = {}
    """dtype and shape of tensors that are stored in fewer bits: masks, and packed numbers that half precision holds."""
    zeros: dict[str, list[int]] = {}
    """Shape of tensors of which those entries are stored that are not 0."""
    file: str | None = None
    version: str | None = None
    """Of the distribution that publishes it; None of an unpublished one, and of bundles that do not tell."""

    @field_validator("replaced", "shorter", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """JSON has no tuples."""
        if not isinstance(value, dict):
            return value
        return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}


class Manifest(_Loose):
    """What `manifest.json` holds."""

    format: int
    versions: dict[str, str]
    base: BaseEntry
    seed: int
    trained_steps: int
    plugins: list[PluginEntry]
    scores: dict[str, list[float | int | str | None]]
    files: dict[str, str]
    hub: HubEntry | None = None
    """Of a bundle that `peftx pull` wrote."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after every file was checked against it.

    Raises:
        BundleError: see `load`.
    """
    manifest = _own_part(folder)
    files = manifest.files
    present = {f.relative_to(folder).as_posix() for f in plain_files(folder)} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - files.keys())]
    problems += [
        f"{name} is corrupted (sha256 differs)" for name in sorted(files.keys() & present)
        if differs(folder / name, files[name])
    ]  # fmt: skip
    problems += [
        f"{entry.file}, which '{entry.id}' names, is not in the manifest" for entry in manifest.plugins
        if entry.file is not None and entry.file not in files
    ]  # fmt: skip
    if problems:
        raise BundleError(f"'{folder}': {'; '.join(problems)}", hint=ANEW)
    return manifest


def _own_part(folder: Path) -> Manifest:
    """The manifest, checked in itself; the other files are not looked at."""
    check_there(folder, MANIFEST)
    file = folder / MANIFEST
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise BundleError(f"'{file}' is corrupted: it has no format", hint=ANEW)
    if found["format"] > FORMAT:
        raise BundleError(
            f"'{folder}' has format {found['format']}; this peftx reads up to {FORMAT}",
            hint="pip install --upgrade peftx",
        )
    if found.get("own") != own_digest(found):
        raise BundleError(
            f"'{file}' is corrupted or was edited (sha256 differs)", hint="change a stack and save it anew"
        )
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise BundleError(f"'{file}' is corrupted: {place}: {problem['msg']}", hint=ANEW) from error


def read_history(folder: Path) -> History:
    """What the bundle's stack went through; nothing, of one that was not trained, or saved by a version that kept none.

    Raises:
        BundleError: a file that is no history. Whether it is the one that was written is `read_manifest`'s to say.
    """
    file = folder / HISTORY
    if not file.exists():
        return History()
    try:
        return History.model_validate(read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise BundleError(f"'{file}' is corrupted: {place}: {problem['msg']}", hint=ANEW) from error


def holds_base(path: str | Path) -> bool:
    """Is the base in the bundle itself, compressed, so that none is to be given. The files are checked by `load`."""
    return _own_part(Path(path)).base.contained is not None


def own_digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's content, its own entry left out."""
    rest = {name: value for name, value in manifest.items() if name != "own"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    import transformers

    return {"peftx": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
