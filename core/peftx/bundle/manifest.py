"""What lies in a bundle's folder under which name, and whether it is what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import peftx
from peftx.errors import BundleError, nearest
from peftx.files import aside, sha256

FORMAT = 1
MANIFEST = "manifest.json"
PIPELINE = "pipeline.yaml"
CARD = "README.md"
BASE = "base.safetensors"
BASE_FOLDER = "base"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was checked against it.

    Raises:
        BundleError: see `load`.
    """
    manifest = _own_part(folder)
    files: dict[str, str] = manifest["files"]
    present = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - files.keys())]
    problems += [
        f"{name} is corrupted (sha256 differs)" for name in sorted(files.keys() & present)
        if sha256(folder / name) != files[name]
    ]  # fmt: skip
    if problems:
        raise BundleError(f"'{folder}': {'; '.join(problems)}", hint="copy the bundle again, or save it anew")
    return manifest


def _own_part(folder: Path) -> dict[str, Any]:
    """The manifest, checked in itself; the other files are not looked at."""
    if not folder.exists() and aside(folder.absolute()).exists():
        aside(folder.absolute()).rename(folder)  # a save was killed between its two renames
    file = folder / MANIFEST
    if not folder.is_dir():
        near = [p.name for p in folder.absolute().parent.glob("*") if (p / MANIFEST).exists()]
        raise BundleError(f"no bundle at '{folder}'", hint=nearest(folder.name, near) or None)
    if not file.exists():
        raise BundleError(
            f"'{folder}' is no bundle: {MANIFEST} is missing", hint="stack.save(path) writes one"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["files"].keys()
        number = int(manifest["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"'{file}' is corrupted: {type(error).__name__}: {error}") from error
    if number > FORMAT:
        raise BundleError(
            f"'{folder}' has format {number}; this peftx reads up to {FORMAT}",
            hint="pip install --upgrade peftx",
        )
    if manifest.get("own") != own_digest(manifest):
        raise BundleError(
            f"'{file}' is corrupted or was edited (sha256 differs)", hint="change a stack and save it anew"
        )
    return manifest


def holds_base(path: str | Path) -> bool:
    """Is the base in the bundle itself, compressed, so that none is to be given. The files are checked by `load`."""
    return _own_part(Path(path))["base"].get("contained") is not None


def own_digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's content, its own entry left out."""
    rest = {name: value for name, value in manifest.items() if name != "own"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    import transformers

    return {"peftx": peftx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
