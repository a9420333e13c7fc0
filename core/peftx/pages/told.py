"""What a bundle says of the run that made it; no model is loaded."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.hub import try_to_load_from_cache

from peftx.composition.registry import Registry
from peftx.engines.bundle.manifest import PIPELINE, Manifest, read_history, read_manifest
from peftx.engines.files import naming
from peftx.engines.tensor_files import check_tensors
from peftx.errors import BundleError, PeftxError
from peftx.history import History
from peftx.planning import plan
from peftx_spec import load_spec

if TYPE_CHECKING:
    from peftx_spec import Pipeline, Plan


@dataclass(frozen=True)
class Told:
    """What a page is made of.

    Attributes:
        folder: of the bundle. spec: its YAML. pipeline: the same, read; None where it cannot be, `why` then says why.
        plan: of that; None likewise. papers: of the plugins that are installed, by id. numbers: how many numbers each
            plugin's file holds, by id. sizes: bytes of every file.
    """

    folder: Path
    manifest: Manifest
    history: History
    spec: str
    pipeline: Pipeline | None
    plan: Plan | None
    why: str
    papers: dict[str, str]
    numbers: dict[str, int]
    sizes: dict[str, int]

    @property
    def title(self) -> str:
        names = " + ".join(entry.id for entry in self.manifest.plugins)
        return f"{names or 'plain'} on {self.manifest.base.id}"


def told(folder: Path, *, registry: Registry | None = None, trust_remote_code: bool = False) -> Told:
    """Read a bundle, every file of it checked.

    Raises:
        BundleError: no bundle, or one that is not as it was written.
    """
    registry = registry or Registry()
    manifest = read_manifest(folder)
    with naming(folder / PIPELINE):
        spec = (folder / PIPELINE).read_text("utf-8")
    pipeline, planned, why = None, None, ""
    try:
        pipeline = load_spec(spec, catalogue=registry, name=PIPELINE).pipeline
        place = at_hand(pipeline.model.id)
        if place is None:
            raise BundleError(f"the base '{pipeline.model.id}' is not on this machine")
        model = pipeline.model.model_copy(update={"id": place, "device": "cpu"})
        planned = plan(
            pipeline.model_copy(update={"model": model}),
            registry=registry,
            trust_remote_code=trust_remote_code,
        )
    except PeftxError as error:  # a plugin, the base or the rows are not at hand
        why = error.message
    papers = {}
    for entry in manifest.plugins:
        if entry.use in registry.names() and entry.use not in registry.clashes():
            papers[entry.id] = registry.describe(entry.use).paper
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    numbers = {e.id: numbers_in(folder / e.file) for e in manifest.plugins if e.file is not None}
    return Told(folder, manifest, read_history(folder), spec, pipeline, planned, why, papers, numbers, sizes)


def at_hand(id: str) -> str | None:
    """Where a model lies on this machine: as it is, or in the hub's cache; a page asks no network for one."""
    if id.startswith("peftx:") or Path(os.path.expanduser(id)).exists():
        return id
    try:
        found = try_to_load_from_cache(id, "config.json")
    except ValueError:  # no id of the hub
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


def numbers_in(file: Path) -> int:
    """How many numbers the tensors of a safetensors file have together; its header alone is read."""
    check_tensors(file)
    with naming(file), file.open("rb") as handle:
        header: dict[str, Any] = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
