"""Granite MoE: Llama's attention, experts and their router under a name of their own."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, HEADS, NORMS
from peftx.kernel.anatomy.table import Stacked, Table, Tower

TABLE = Table(
    "granitemoe",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | NORMS | {"router": "block_sparse_moe.router"},
            stacked=(
                Stacked("block_sparse_moe.experts", "gate_up_proj", ("experts.gate", "experts.up")),
                Stacked("block_sparse_moe.experts", "down_proj", ("experts.down",)),
            ),
            blocks={"attention": "self_attn", "mlp": "block_sparse_moe"},
            around=AROUND,
        ),
    ),
    around=HEADS,
)
