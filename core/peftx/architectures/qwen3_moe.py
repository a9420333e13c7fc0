"""Qwen3-MoE: Qwen3's attention, Mixtral's experts; some layers may keep a dense feed-forward. OLMoE has none."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, MLP, NORMS, NORMS_QK
from peftx.architectures.mixtral import EXPERTS, ROUTER
from peftx.kernel.anatomy.table import Table, Tower

DENSE = {role: f"{path}?" for role, path in MLP.items()}

TABLE = Table(
    "qwen3_moe",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | DENSE | NORMS | NORMS_QK | ROUTER,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
    same_as=("olmoe",),
)
