"""Gemma 3n, text only: Gemma 3 on several streams at once (AltUp), with a low-rank residual beside the attention
(LAuReL) and embeddings for each layer; the last layers use the keys and values of earlier ones."""

from __future__ import annotations

from peftx.architectures.gemma2 import NORMS
from peftx.architectures.llama import BLOCKS, HEADS, MLP
from peftx.kernel.anatomy.table import Table, Tower

ATTENTION = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj?",
    "attention.v": "self_attn.v_proj?",
    "attention.o": "self_attn.o_proj",
    "norm.q": "self_attn.q_norm",
    "norm.k": "self_attn.k_norm?",
}
PER_LAYER = {
    "per_layer.gate": "per_layer_input_gate?",
    "per_layer.projection": "per_layer_projection?",
    "norm.per_layer": "post_per_layer_input_norm?",
}
STREAMS = {
    "laurel.left": "laurel.linear_left",
    "laurel.right": "laurel.linear_right",
    "altup.router": "altup.modality_router",
    "altup.predict": "altup.prediction_coefs",
    "altup.correct": "altup.correction_coefs",
    "norm.laurel": "laurel.post_laurel_norm",
    "norm.altup": "altup.router_norm",
}
ROLES = ATTENTION | MLP | PER_LAYER | STREAMS | NORMS
READ = ("altup.correct",)
"""In training its weight is clamped and used without a call."""
APART = ("altup.router", "altup.predict", "altup.correct")


def around(model: str) -> dict[str, str]:
    """The places outside the layers; `model` is the text model's path."""
    return {
        "embedding": f"{model}.embed_tokens",
        "embedding.per_layer": f"{model}.embed_tokens_per_layer?",
        "projector.per_layer": f"{model}.per_layer_model_projection?",
        "norm.per_layer_model": f"{model}.per_layer_projection_norm?",
        "norm.final": f"{model}.norm",
    }


def streams(model: str) -> dict[str, str]:
    """The projections to the other streams of AltUp and back; four streams in the released models."""
    return {
        f"projector.{name}.{i}": f"{model}.{path}.{i}?"
        for name, path in (("altup", "altup_projections"), ("altup_unembed", "altup_unembed_projections"))
        for i in range(3)
    }


TABLE = Table(
    "gemma3n_text",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ROLES,
            blocks=BLOCKS,
            read=READ,
            called=READ,
            apart=APART,
            around=around("model") | streams("model"),
        ),
    ),
    around=HEADS,
)
