"""Whisper: BART's layers, pre-norm, behind two convolutions over the spectrogram."""

from __future__ import annotations

from peftx.architectures.bart import BLOCKS, CROSS, LAYER
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "whisper",
    towers=(
        Tower(
            "encoder",
            layers="model.encoder.layers",
            roles=LAYER,
            blocks=BLOCKS,
            around={
                "embedding.patch": "model.encoder.conv1",
                "embedding.patch.second": "model.encoder.conv2",
                "embedding.position": "model.encoder.embed_positions",
                "norm.final": "model.encoder.layer_norm",
            },
        ),
        Tower(
            "decoder",
            layers="model.decoder.layers",
            roles=LAYER | CROSS,
            blocks=BLOCKS | {"cross_attention": "encoder_attn"},
            around={
                "embedding": "model.decoder.embed_tokens",
                "embedding.position": "model.decoder.embed_positions",
                "norm.final": "model.decoder.layer_norm",
            },
        ),
    ),
    around={"head": "proj_out?", "projector": "projector?", "classifier": "classifier?"},
)
