"""Qwen3-Next and the text of Qwen3.5: layers of gated linear attention, and of attention with a gate on its output;
dense feed-forward, or experts beside a shared one."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, HEADS, NORMS
from peftx.architectures.mixtral import EXPERTS, ROUTER
from peftx.architectures.qwen3_moe import DENSE
from peftx.kernel.anatomy.table import Fused, Table, Tower

ATTENTION = {
    "attention.k": "self_attn.k_proj?",
    "attention.v": "self_attn.v_proj?",
    "attention.o": "self_attn.o_proj?",
    "norm.q": "self_attn.q_norm?",
    "norm.k": "self_attn.k_norm?",
}
FUSED = (Fused("self_attn.q_proj?", ("attention.q", "attention.gate"), "interleaved"),)
LINEAR_ATTENTION = {
    "linear_attention.qkvz": "linear_attn.in_proj_qkvz?",  # Qwen3-Next: q, k, v and the gate z, by head
    "linear_attention.ba": "linear_attn.in_proj_ba?",
    "linear_attention.qkv": "linear_attn.in_proj_qkv?",  # Qwen3.5: apart
    "linear_attention.z": "linear_attn.in_proj_z?",
    "linear_attention.b": "linear_attn.in_proj_b?",
    "linear_attention.a": "linear_attn.in_proj_a?",
    "linear_attention.out": "linear_attn.out_proj?",
    "linear_attention.conv": "linear_attn.conv1d?",
    "norm.linear_attention": "linear_attn.norm?",
}
SHARED = {
    "shared_experts.gate": "mlp.shared_expert.gate_proj?",
    "shared_experts.up": "mlp.shared_expert.up_proj?",
    "shared_experts.down": "mlp.shared_expert.down_proj?",
    "router.shared": "mlp.shared_expert_gate?",  # one number a token
}
ROLES = ATTENTION | LINEAR_ATTENTION | NORMS | DENSE | ROUTER | SHARED
BLOCKS = {"attention": "self_attn?", "linear_attention": "linear_attn?", "mlp": "mlp"}
READ = ("linear_attention.conv",)
APART = ("router.shared",)

TABLE = Table(
    "qwen3_next",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ROLES,
            fused=FUSED,
            stacked=EXPERTS,
            blocks=BLOCKS,
            read=READ,
            apart=APART,
            around=AROUND,
        ),
    ),
    around=HEADS,
    same_as=("qwen3_5_text", "qwen3_5_moe_text"),
)
