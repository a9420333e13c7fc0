"""Gemma 3, text only: Gemma 2 with a norm on each head's queries and keys."""

from __future__ import annotations

from peftx.architectures.gemma2 import NORMS
from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, MLP, NORMS_QK
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "gemma3_text",
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
