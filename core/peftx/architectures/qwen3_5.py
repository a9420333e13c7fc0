"""Qwen3.5 with images and video: its text decoder, and a vision tower whose patches are merged four to one."""

from __future__ import annotations

from peftx.architectures.llama import HEADS
from peftx.architectures.mixtral import EXPERTS
from peftx.architectures.qwen3_next import APART, BLOCKS, FUSED, READ, ROLES
from peftx.kernel.anatomy.table import Fused, Table, Tower

VISION = Tower(
    "vision",
    layers="model.visual.blocks",
    roles={
        "attention.o": "attn.proj",
        "mlp.up": "mlp.linear_fc1",
        "mlp.down": "mlp.linear_fc2",
        "norm.attention": "norm1",
        "norm.mlp": "norm2",
    },
    fused=(Fused("attn.qkv", ("attention.q", "attention.k", "attention.v")),),
    blocks={"attention": "attn", "mlp": "mlp"},
    around={
        "embedding.patch": "model.visual.patch_embed.proj",
        "embedding.position": "model.visual.pos_embed",
    },
    config="vision_config",
)
PROJECTOR = {
    "projector.up": "model.visual.merger.linear_fc1",
    "projector.down": "model.visual.merger.linear_fc2",
    "norm.projector": "model.visual.merger.norm",
}

TABLE = Table(
    "qwen3_5",
    towers=(
        Tower(
            "decoder",
            layers="model.language_model.layers",
            roles=ROLES,
            fused=FUSED,
            stacked=EXPERTS,
            blocks=BLOCKS,
            read=READ,
            apart=APART,
            around={
                "embedding": "model.language_model.embed_tokens",
                "norm.final": "model.language_model.norm",
            },
            config="text_config",
        ),
        VISION,
    ),
    around=HEADS | PROJECTOR,
    same_as=("qwen3_5_moe",),
)
