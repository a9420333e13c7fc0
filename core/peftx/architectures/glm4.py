"""GLM-4: gate and up in one matrix; the newer one has norms after each block as well."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, NORMS
from peftx.kernel.anatomy.table import Fused, Table, Tower

TABLE = Table(
    "glm4",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION
            | NORMS
            | {
                "mlp.down": "mlp.down_proj",
                "norm.post_attention": "post_self_attn_layernorm?",
                "norm.post_mlp": "post_mlp_layernorm?",
            },
            fused=(Fused("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),),
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
    same_as=("glm",),
)
