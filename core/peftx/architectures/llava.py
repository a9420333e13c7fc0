"""LLaVA: a CLIP vision tower, a two-layer projector, a decoder of the Llama kind."""

from __future__ import annotations

from peftx.architectures.clip import LAYER as VISION_LAYER
from peftx.architectures.clip import VISION_AROUND
from peftx.architectures.llama import ATTENTION, BLOCKS, HEADS, MLP, NORMS
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "llava",
    towers=(
        Tower(
            "decoder",
            layers="model.language_model.layers",
            roles=ATTENTION | MLP | NORMS,
            blocks=BLOCKS,
            around={
                "embedding": "model.language_model.embed_tokens",
                "norm.final": "model.language_model.norm",
            },
            config="text_config",
        ),
        Tower(
            "vision",
            layers="model.vision_tower.encoder.layers",
            roles=VISION_LAYER,
            blocks=BLOCKS,
            around={role: f"model.vision_tower.{path}" for role, path in VISION_AROUND.items()},
            config="vision_config",
        ),
    ),
    around=HEADS
    | {
        "projector.up": "model.multi_modal_projector.linear_1",
        "projector.down": "model.multi_modal_projector.linear_2",
    },
)
