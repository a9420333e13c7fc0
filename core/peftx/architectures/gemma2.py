"""Gemma 2: Llama's matrices, norms before and after each block."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, MLP
from peftx.kernel.anatomy.table import Table, Tower

NORMS = {
    "norm.attention": "input_layernorm",
    "norm.post_attention": "post_attention_layernorm",
    "norm.mlp": "pre_feedforward_layernorm",
    "norm.post_mlp": "post_feedforward_layernorm",
}

TABLE = Table(
    "gemma2",
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
)
