"""DeepSeek-V3: attention through latents (MLA), the first layers dense, then routed experts beside shared ones."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, BLOCKS, HEADS, NORMS
from peftx.architectures.mixtral import EXPERTS, ROUTER
from peftx.architectures.qwen3_moe import DENSE
from peftx.kernel.anatomy.table import Table, Tower

# x -> q_a -> norm -> q_b: the queries (`q` in one step where there is no latent); x -> kv_a: a latent, and the rotated
# part of the key, which all heads share; latent -> norm -> kv_b: per head, the rest of the key, and the value.
MLA = {
    "attention.q": "self_attn.q_proj?",
    "attention.q_a": "self_attn.q_a_proj?",
    "attention.q_b": "self_attn.q_b_proj?",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_b": "self_attn.kv_b_proj",
    "attention.o": "self_attn.o_proj",
    "norm.q_a": "self_attn.q_a_layernorm?",
    "norm.kv_a": "self_attn.kv_a_layernorm",
}
SHARED = {
    "shared_experts.gate": "mlp.shared_experts.gate_proj?",
    "shared_experts.up": "mlp.shared_experts.up_proj?",
    "shared_experts.down": "mlp.shared_experts.down_proj?",
}

TABLE = Table(
    "deepseek_v3",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=MLA | NORMS | DENSE | ROUTER | SHARED,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
