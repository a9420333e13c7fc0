"""OPT: a decoder of BART's kind; the smallest one projects between embedding and layers."""

from __future__ import annotations

from peftx.architectures.bart import AROUND_LAYERS, BLOCKS, LAYER
from peftx.architectures.llama import HEADS
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "opt",
    towers=(
        Tower(
            "decoder",
            layers="model.decoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={role: f"model.decoder.{path}" for role, path in AROUND_LAYERS.items()}
            | {
                "norm.final": "model.decoder.final_layer_norm?",
                "projector.in": "model.decoder.project_in?",
                "projector.out": "model.decoder.project_out?",
            },
        ),
    ),
    around=HEADS,
)
