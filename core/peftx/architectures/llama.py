"""Llama and the families that kept its names; Phi-3, Qwen3 and Gemma 2 differ and have tables of their own."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower

ATTENTION = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
}
MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
NORMS = {"norm.attention": "input_layernorm", "norm.mlp": "post_attention_layernorm"}
NORMS_QK = {"norm.q": "self_attn.q_norm", "norm.k": "self_attn.k_norm"}
BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
AROUND = {"embedding": "model.embed_tokens", "norm.final": "model.norm"}
HEADS = {"head": "lm_head?", "classifier": "score|qa_outputs?"}
"""Heads of the variants for generation, for sequence or token classification, and for question answering."""

TABLE = Table(
    "llama",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | MLP | NORMS,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
    same_as=("mistral", "qwen2", "gemma"),
)
