"""Gemma 4, text only: Gemma 3n's embeddings for each layer and shared keys and values, without its streams; layers with
full attention have wider heads, and may take the keys for values; experts may stand beside the dense feed-forward."""

from __future__ import annotations

from peftx.architectures.gemma2 import NORMS
from peftx.architectures.gemma3n_text import ATTENTION, PER_LAYER, around
from peftx.architectures.llama import BLOCKS, HEADS, MLP
from peftx.kernel.anatomy.table import Stacked, Table, Tower

MOE = {
    "router": "router.proj?",
    "norm.dense": "post_feedforward_layernorm_1?",
    "norm.experts": "pre_feedforward_layernorm_2?",
    "norm.post_experts": "post_feedforward_layernorm_2?",
}
ROLES = ATTENTION | MLP | PER_LAYER | MOE | NORMS
EXPERTS = (
    Stacked("experts?", "gate_up_proj", ("experts.gate", "experts.up")),
    Stacked("experts?", "down_proj", ("experts.down",)),
)

TABLE = Table(
    "gemma4_text",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ROLES,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=around("model"),
        ),
    ),
    around=HEADS,
)
