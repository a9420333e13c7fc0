"""Bundles: a folder with everything that rebuilds a stack bit for bit.

`pipeline.yaml` (resolved), one safetensors file a plugin, `manifest.json` (hashes of all files, identity of the base,
versions), `README.md` (model card). A bundle of a compressed stack also holds the rest of the base (`base.safetensors`,
config, tokenizer) and needs no base model to load.
"""

from __future__ import annotations

from peftx.engines.bundle.exporting import export
from peftx.engines.bundle.manifest import holds_base, own_digest, read_manifest
from peftx.engines.bundle.saving import save
from peftx.engines.bundle.sparse import smallest_exact

__all__ = ["export", "holds_base", "own_digest", "read_manifest", "save", "smallest_exact"]
