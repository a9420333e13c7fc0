"""Qwen3: Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, MLP, NORMS, NORMS_QK
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "qwen3",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | MLP | NORMS | NORMS_QK,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
