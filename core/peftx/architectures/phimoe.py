"""Phi-3.5-MoE: Mixtral's layers, with a router that is an `nn.Linear` and returns more than its product."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, NORMS
from peftx.architectures.mixtral import EXPERTS
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "phimoe",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | NORMS | {"router": "mlp.router"},
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
