"""GPT-NeoX and Pythia: q, k and v interleaved by head in one matrix."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Fused, Table, Tower

TABLE = Table(
    "gpt_neox",
    towers=(
        Tower(
            "decoder",
            layers="gpt_neox.layers",
            roles={
                "attention.o": "attention.dense",
                "mlp.up": "mlp.dense_h_to_4h",
                "mlp.down": "mlp.dense_4h_to_h",
                "norm.attention": "input_layernorm",
                "norm.mlp": "post_attention_layernorm",
            },
            fused=(
                Fused(
                    "attention.query_key_value", ("attention.q", "attention.k", "attention.v"), "interleaved"
                ),
            ),
            blocks={"attention": "attention", "mlp": "mlp"},
            around={"embedding": "gpt_neox.embed_in", "norm.final": "gpt_neox.final_layer_norm"},
        ),
    ),
    around={"head": "lm_head|embed_out?", "classifier": "score|classifier|qa_outputs?"},
)
