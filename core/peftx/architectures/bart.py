"""BART: encoder and decoder, post-norm; the feed-forward matrices stand on the layer itself."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower


def attention(role: str, module: str) -> dict[str, str]:
    """The four projections of one attention module."""
    return {
        f"{role}.q": f"{module}.q_proj",
        f"{role}.k": f"{module}.k_proj",
        f"{role}.v": f"{module}.v_proj",
        f"{role}.o": f"{module}.out_proj",
    }


LAYER = attention("attention", "self_attn") | {
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "norm.attention": "self_attn_layer_norm",
    "norm.mlp": "final_layer_norm",
}
CROSS = attention("cross_attention", "encoder_attn") | {"norm.cross_attention": "encoder_attn_layer_norm"}
BLOCKS = {"attention": "self_attn", "mlp": "fc2"}
AROUND_LAYERS = {"embedding": "embed_tokens", "embedding.position": "embed_positions"}
AROUND = AROUND_LAYERS | {"norm.embedding": "layernorm_embedding"}

TABLE = Table(
    "bart",
    towers=(
        Tower(
            "encoder",
            layers="model.encoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={role: f"model.encoder.{path}" for role, path in AROUND.items()},
        ),
        Tower(
            "decoder",
            layers="model.decoder.layers",
            roles=LAYER | CROSS,
            blocks=BLOCKS | {"cross_attention": "encoder_attn"},
            around={role: f"model.decoder.{path}" for role, path in AROUND.items()},
        ),
    ),
    around={
        "head": "lm_head?",
        "classifier": "classification_head.out_proj|qa_outputs?",
        "classifier.dense": "classification_head.dense?",
    },
)
