"""Mixtral: experts as 3-D parameters, a router that holds a plain parameter."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, NORMS
from peftx.kernel.anatomy.table import Stacked, Table, Tower

ROUTER = {"router": "mlp.gate?"}
EXPERTS = (
    Stacked("mlp.experts?", "gate_up_proj", ("experts.gate", "experts.up")),
    Stacked("mlp.experts?", "down_proj", ("experts.down",)),
)

TABLE = Table(
    "mixtral",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | NORMS | ROUTER,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
