"""ViT (pre-norm encoder of image patches)."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "vit",
    towers=(
        Tower(
            "vision",
            layers="vit.layers",
            roles={
                "attention.q": "attention.q_proj",
                "attention.k": "attention.k_proj",
                "attention.v": "attention.v_proj",
                "attention.o": "attention.o_proj",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
                "norm.attention": "layernorm_before",
                "norm.mlp": "layernorm_after",
            },
            blocks={"attention": "attention", "mlp": "mlp"},
            around={
                "embedding.patch": "vit.embeddings.patch_embeddings.projection",
                "norm.final": "vit.layernorm",
                "pooler": "vit.pooler.dense?",
            },
        ),
    ),
    around={"classifier": "classifier?"},
)
