"""Gemma 3 with images: a SigLIP tower, a projector that holds a plain matrix, the text decoder."""

from __future__ import annotations

from peftx.architectures.clip import LAYER as VISION_LAYER
from peftx.architectures.clip import VISION_AROUND
from peftx.architectures.gemma2 import NORMS
from peftx.architectures.llama import ATTENTION, BLOCKS, HEADS, MLP, NORMS_QK
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "gemma3",
    towers=(
        Tower(
            "decoder",
            layers="model.language_model.layers",
            roles=ATTENTION | MLP | NORMS | NORMS_QK,
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
    around=HEADS | {"norm.projector": "model.multi_modal_projector.mm_soft_emb_norm"},
)
