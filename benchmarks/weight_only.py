"""Linear layers of 2048 x 2048 with weights in integers and float32 inputs, beside the same layers in float32.

    python benchmarks/run.py weight_only

For a few sizes of input: CPU time over that of `nn.Linear`, on one thread, the least of interleaved rounds; below 1 is
faster. Once for one layer called again and again, whose weights stay in the cache, and once for 16 layers in turn, as
in a model, whose weights come from memory. Error: the largest of the product, over its largest value, against the
dequantized weight in float64.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import interleaved
from torch import Tensor, nn

from peftx.toolkits.compression import QuantLinear

SIZE, LAYERS = 2048, 16
ROWS = (1, 2, 4, 16, 64, 256)
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4, groups of 64": {"bits": 4, "group_size": 64},
}
LIMITS = {
    ("int8", 1): 0.35,
    ("int4, groups of 64", 1): 0.45,
    ("int8", 64): 1.1,
    ("int4, groups of 64", 64): 1.1,
}


def run(quick: bool = False) -> dict[str, dict[str, Any]]:
    """One entry a setting and size: `ratio` of one layer, `in_turn` of several; `limit` where one is set."""
    torch.manual_seed(0)
    linears = [nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False) for _ in range(LAYERS)]
    layers: dict[str, list[nn.Module]] = {"fp32": list(linears)}
    for name, options in SETTINGS.items():
        layers[name] = [QuantLinear.from_linear(linear, **options) for linear in linears]
    rounds = 7 if quick else 25
    results: dict[str, dict[str, Any]] = {}
    for rows in ROWS:
        x = torch.randn(rows, SIZE)
        inner = 20 if rows < 8 else 160 // rows or 1
        calls = {name: partial(layer[0], x) for name, layer in layers.items()}
        one = interleaved(calls, rounds=rounds, inner=inner, warmup=2)
        chains = {name: partial(in_turn, layer, x) for name, layer in layers.items()}
        turn = interleaved(chains, rounds=max(3, rounds // 4))
        for name in SETTINGS:
            y, weight = layers[name][0](x), layers[name][0].weight
            expected = x.double() @ weight.double().T
            results[f"{name}, {rows} rows"] = {
                "ratio": one[name] / one["fp32"],
                "in_turn": turn[name] / turn["fp32"],
                "limit": LIMITS.get((name, rows)),
                "error": float((y - expected).abs().max() / expected.abs().max()),
                "ms": one[name] * 1e3,
                "peer": "nn.Linear in float32",
            }
    return results


def in_turn(layers: Sequence[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)
