"""GPT-2: `Conv1D` (weights [in, out]), q, k and v concatenated in one matrix."""

from __future__ import annotations

from peftx.architectures.llama import HEADS
from peftx.kernel.anatomy.table import Fused, Table, Tower

TABLE = Table(
    "gpt2",
    towers=(
        Tower(
            "decoder",
            layers="transformer.h",
            roles={
                "attention.o": "attn.c_proj",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
                "norm.attention": "ln_1",
                "norm.mlp": "ln_2",
            },
            fused=(Fused("attn.c_attn", ("attention.q", "attention.k", "attention.v")),),
            blocks={"attention": "attn", "mlp": "mlp"},
            around={
                "embedding": "transformer.wte",
                "embedding.position": "transformer.wpe",
                "norm.final": "transformer.ln_f",
            },
        ),
    ),
    around=HEADS | {"classifier": "score|classifier|qa_outputs?"},
)
