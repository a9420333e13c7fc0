"""Llama 4 with images: its text decoder, and a vision tower with an adapter and a projection behind it."""

from __future__ import annotations

from peftx.architectures.llama import ATTENTION, NORMS
from peftx.architectures.llama import BLOCKS as VISION_BLOCKS
from peftx.architectures.llama4_text import BLOCKS, EXPERTS, ROLES
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "llama4",
    towers=(
        Tower(
            "decoder",
            layers="language_model.model.layers",
            roles=ROLES,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around={
                "embedding": "language_model.model.embed_tokens",
                "norm.final": "language_model.model.norm",
            },
            config="text_config",
        ),
        Tower(
            "vision",
            layers="vision_model.model.layers",
            roles=ATTENTION | NORMS | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
            blocks=VISION_BLOCKS,
            around={
                "embedding.patch": "vision_model.patch_embedding.linear",
                "norm.embedding": "vision_model.layernorm_pre",
                "norm.final": "vision_model.layernorm_post",
            },
            config="vision_config",
        ),
    ),
    around={
        "head": "language_model.lm_head",
        "projector.adapter_up": "vision_model.vision_adapter.mlp.fc1",
        "projector.adapter_down": "vision_model.vision_adapter.mlp.fc2",
        "projector": "multi_modal_projector.linear_1",
    },
)
