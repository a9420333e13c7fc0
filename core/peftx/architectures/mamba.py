"""Mamba: no attention; `x_proj` makes dt, B and C, `dt_proj` lifts dt."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "mamba",
    towers=(
        Tower(
            "decoder",
            layers="backbone.layers",
            roles={
                "ssm.in": "mixer.in_proj",
                "ssm.x": "mixer.x_proj",
                "ssm.dt": "mixer.dt_proj",
                "ssm.out": "mixer.out_proj",
                "ssm.conv": "mixer.conv1d",
                "norm.ssm": "norm",
            },
            blocks={"ssm": "mixer"},
            # `dt_proj` and `conv1d` always, the others in the kernel that runs in training where it is installed.
            read=("ssm.x", "ssm.dt", "ssm.out", "ssm.conv"),
            called=("ssm.x", "ssm.out"),
            around={"embedding": "backbone.embeddings", "norm.final": "backbone.norm_f"},
        ),
    ),
    around={"head": "lm_head?", "classifier": "score?"},
)
