"""Llama 4, text only: dense layers, and layers of experts beside a shared one, in turn; experts stored [in, out]."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, HEADS, NORMS
from peftx.kernel.anatomy.table import Stacked, Table, Tower

ROLES = (
    ATTENTION
    | NORMS
    | {
        "mlp.gate": "feed_forward.gate_proj?",
        "mlp.up": "feed_forward.up_proj?",
        "mlp.down": "feed_forward.down_proj?",
        "router": "feed_forward.router?",
        "shared_experts.gate": "feed_forward.shared_expert.gate_proj?",
        "shared_experts.up": "feed_forward.shared_expert.up_proj?",
        "shared_experts.down": "feed_forward.shared_expert.down_proj?",
    }
)
EXPERTS = (
    Stacked("feed_forward.experts?", "gate_up_proj", ("experts.gate", "experts.up"), transposed=True),
    Stacked("feed_forward.experts?", "down_proj", ("experts.down",), transposed=True),
)
BLOCKS = {"attention": "self_attn", "mlp": "feed_forward"}

TABLE = Table(
    "llama4_text",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ROLES,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
