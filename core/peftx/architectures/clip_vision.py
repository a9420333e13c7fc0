"""CLIP's vision tower on its own, with or without the projection."""

from __future__ import annotations

from peftx.architectures.clip import BLOCKS, LAYER, VISION_AROUND
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "clip_vision_model",
    towers=(
        Tower(
            "vision",
            layers="vision_model.encoder.layers|encoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={role: f"vision_model.{path}|{path}" for role, path in VISION_AROUND.items()},
        ),
    ),
    around={"projector.vision": "visual_projection?"},
)
