"""CLIP: a text and a vision tower of equal layers, each with a projection into the common space."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower

LAYER = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "norm.attention": "layer_norm1",
    "norm.mlp": "layer_norm2",
}
BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
TEXT_AROUND = {
    "embedding": "embeddings.token_embedding",
    "embedding.position": "embeddings.position_embedding",
    "norm.final": "final_layer_norm",
}
VISION_AROUND = {
    "embedding.patch": "embeddings.patch_embedding",
    "embedding.position": "embeddings.position_embedding",
    "norm.embedding": "pre_layrnorm?",  # spelled so in transformers
    "norm.final": "post_layernorm",
}

TABLE = Table(
    "clip",
    towers=(
        Tower(
            "text",
            layers="text_model.encoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={role: f"text_model.{path}" for role, path in TEXT_AROUND.items()},
            config="text_config",
        ),
        Tower(
            "vision",
            layers="vision_model.encoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={role: f"vision_model.{path}" for role, path in VISION_AROUND.items()},
            config="vision_config",
        ),
    ),
    around={
        "projector.text": "text_projection?",
        "projector.vision": "visual_projection?",
        "classifier": "classifier?",
    },
)
