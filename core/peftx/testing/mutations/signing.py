"""A manifest that agrees with what was changed."""

from __future__ import annotations

import json
from pathlib import Path

from peftx.engines.bundle import own_digest
from peftx.engines.bundle.manifest import MANIFEST
from peftx.engines.files import sha256
from peftx.testing.mutations.scene import (
    LARGE,
    is_regular,
)


def sign(folder: Path, manifest_before: bytes) -> None:
    """Make the checksums of a changed bundle agree with it, as another version of peftx, or an attacker, would.

    A manifest that was itself changed keeps its entries: only its own checksum is made anew.
    """
    file = folder / MANIFEST
    if not is_regular(file):
        return
    text = file.read_text("utf-8", errors="replace")
    try:
        manifest = json.loads(text)
        old = manifest["own"]
        if text.encode() == manifest_before:
            present = [f for f in sorted(folder.rglob("*")) if f != file and f.is_file()]
            known = manifest["files"]
            manifest["files"] = {
                str(p.relative_to(folder)): _sum(p, known.get(str(p.relative_to(folder)))) for p in present
            }
            text = json.dumps(manifest, indent=1)
        text = text.replace(old, own_digest(manifest))
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return
    file.write_text(text, "utf-8")


def _sum(path: Path, known: str | None) -> str:
    return sha256(path) if path.stat().st_size <= LARGE else known or ""
