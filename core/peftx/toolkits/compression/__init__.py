"""Mechanisms of compression: packed integers, quantized layers, calibration, rotations. No policy."""

from __future__ import annotations

from peftx.toolkits.compression.activations import fake_quantize, straight_through, token_scale
from peftx.toolkits.compression.calibration import BlockInputs, Calibration, walk_blocks
from peftx.toolkits.compression.finetuned import adopt, base_parameters, differences, text_blocks
from peftx.toolkits.compression.linear import QuantLinear
from peftx.toolkits.compression.narrow import Narrow, NarrowLinear
from peftx.toolkits.compression.observe import Stats, entering, mse_clip_scale, observe, observing
from peftx.toolkits.compression.packing import Quantized, dequantize, pack_bits, quantize, unpack_bits
from peftx.toolkits.compression.transforms import fwht, hadamard, hadamard_exists, hadamard_signs

__all__ = [
    "BlockInputs",
    "Calibration",
    "Narrow",
    "NarrowLinear",
    "QuantLinear",
    "Quantized",
    "Stats",
    "adopt",
    "base_parameters",
    "dequantize",
    "differences",
    "entering",
    "fake_quantize",
    "fwht",
    "hadamard",
    "hadamard_exists",
    "hadamard_signs",
    "mse_clip_scale",
    "observe",
    "observing",
    "pack_bits",
    "quantize",
    "straight_through",
    "text_blocks",
    "token_scale",
    "unpack_bits",
    "walk_blocks",
]
