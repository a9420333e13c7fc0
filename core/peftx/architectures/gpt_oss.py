"""GPT-OSS: biases throughout, sinks beside the keys; experts stored [in, out], gate and up row by row in turn."""

from __future__ import annotations

from peftx.architectures.llama import AROUND, ATTENTION, BLOCKS, HEADS, NORMS
from peftx.kernel.anatomy.table import Stacked, Table, Tower

TABLE = Table(
    "gpt_oss",
    towers=(
        Tower(
            "decoder",
            layers="model.layers",
            roles=ATTENTION | NORMS | {"router": "mlp.router"},
            stacked=(
                Stacked(
                    "mlp.experts",
                    "gate_up_proj",
                    ("experts.gate", "experts.up"),
                    layout="interleaved",
                    transposed=True,
                    bias="gate_up_proj_bias",
                ),
                Stacked(
                    "mlp.experts", "down_proj", ("experts.down",), transposed=True, bias="down_proj_bias"
                ),
            ),
            blocks=BLOCKS,
            around=AROUND,
        ),
    ),
    around=HEADS,
)
