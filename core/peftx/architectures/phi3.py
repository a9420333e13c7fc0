"""Phi-3: q, k, v in one matrix (k and v with their fewer heads), gate and up in another."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, BLOCKS, HEADS, NORMS
from peftx.kernel.anatomy.table import Fused, Table, Tower

TABLE = Table(
    "phi3",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles={"attention.o": "self_attn.o_proj", "mlp.down": "mlp.down_proj"} | NORMS,
            fused=(
                Fused("self_attn.qkv_proj", ("attention.q", "attention.k", "attention.v")),
                Fused("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),
            ),
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
