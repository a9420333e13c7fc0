"""T5: encoder and decoder towers, cross attention, gated or plain feed-forward."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower

SELF = {f"attention.{role}": f"layer.0.SelfAttention.{role}" for role in "qkvo"} | {
    "norm.attention": "layer.0.layer_norm",
    "embedding.relative": "layer.0.SelfAttention.relative_attention_bias?",
}
CROSS = {f"cross_attention.{role}": f"layer.1.EncDecAttention.{role}" for role in "qkvo"} | {
    "norm.cross_attention": "layer.1.layer_norm"
}


def feed_forward(index: int) -> dict[str, str]:
    """`wi_0`/`wi_1` in gated models, `wi` in the first T5."""
    base = f"layer.{index}.DenseReluDense"
    return {
        "mlp.gate": f"{base}.wi_0?",
        "mlp.up": f"{base}.wi_1|{base}.wi",
        "mlp.down": f"{base}.wo",
        "norm.mlp": f"layer.{index}.layer_norm",
    }


# Each stack looks tokens up in an `embed_tokens` of its own; `shared`, whose weight they share, is never called.
TABLE = Table(
    "t5",
    towers=(
        Tower(
            "encoder",
            layers="encoder.block",
            roles=SELF | feed_forward(1),
            blocks={"attention": "layer.0.SelfAttention", "mlp": "layer.1.DenseReluDense"},
            around={"embedding": "encoder.embed_tokens", "norm.final": "encoder.final_layer_norm"},
        ),
        Tower(
            "decoder",
            layers="decoder.block",
            roles=SELF | CROSS | feed_forward(2),
            blocks={
                "attention": "layer.0.SelfAttention",
                "cross_attention": "layer.1.EncDecAttention",
                "mlp": "layer.2.DenseReluDense",
            },
            around={"embedding": "decoder.embed_tokens", "norm.final": "decoder.final_layer_norm"},
        ),
    ),
    around={
        "head": "lm_head?",
        "classifier": "classification_head.out_proj|classifier|qa_outputs?",
        "classifier.dense": "classification_head.dense?",
    },
)
