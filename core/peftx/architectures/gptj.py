"""GPT-J: attention and feed-forward side by side behind one norm."""

from __future__ import annotations

from peftx.architectures.llama import HEADS
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "gptj",
    towers=(
        Tower(
            "decoder",
            layers="transformer.h",
            roles={
                "attention.q": "attn.q_proj",
                "attention.k": "attn.k_proj",
                "attention.v": "attn.v_proj",
                "attention.o": "attn.out_proj",
                "mlp.up": "mlp.fc_in",
                "mlp.down": "mlp.fc_out",
                "norm.attention": "ln_1",
            },
            blocks={"attention": "attn", "mlp": "mlp"},
            around={"embedding": "transformer.wte", "norm.final": "transformer.ln_f"},
        ),
    ),
    around=HEADS,
)
