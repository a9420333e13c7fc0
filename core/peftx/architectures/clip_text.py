"""CLIP's text tower on its own, with or without the projection."""

from __future__ import annotations

from peftx.architectures.clip import BLOCKS, LAYER, TEXT_AROUND
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "clip_text_model",
    towers=(
        Tower(
            "text",
            layers="text_model.encoder.layers|encoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={role: f"text_model.{path}|{path}" for role, path in TEXT_AROUND.items()},
        ),
    ),
    around={"projector.text": "text_projection?"},
)
