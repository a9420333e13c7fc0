"""BLOOM: q, k and v interleaved by head in one matrix; no position embedding (ALiBi)."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Fused, Table, Tower

TABLE = Table(
    "bloom",
    towers=(
        Tower(
            "decoder",
            layers="transformer.h",
            roles={
                "attention.o": "self_attention.dense",
                "mlp.up": "mlp.dense_h_to_4h",
                "mlp.down": "mlp.dense_4h_to_h",
                "norm.attention": "input_layernorm",
                "norm.mlp": "post_attention_layernorm",
            },
            fused=(
                Fused(
                    "self_attention.query_key_value",
                    ("attention.q", "attention.k", "attention.v"),
                    "interleaved",
                ),
            ),
            # These modules add the residual themselves; what they add to it comes out of their last matrix.
            blocks={"attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"},
            dispatch={"attention": "self_attention"},
            around={
                "embedding": "transformer.word_embeddings",
                "norm.embedding": "transformer.word_embeddings_layernorm",
                "norm.final": "transformer.ln_f",
            },
        ),
    ),
    around={"head": "lm_head?", "classifier": "score|classifier|qa_outputs?"},
)
