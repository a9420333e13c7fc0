"""Mechanisms of compression: packed integers, quantized layers and caches, calibration, rotations. No policy."""

from __future__ import annotations

from peftx.compression.activations import fake_quantize, straight_through, token_scale
from peftx.compression.calibration import BlockInputs, Calibration, walk_blocks
from peftx.compression.kv import KVFormat, QuantizedKVLayer, cache_nbytes, make_cache
from peftx.compression.linear import QuantLinear
from peftx.compression.observe import Stats, mse_clip_scale, observe, observing
from peftx.compression.packing import Quantized, dequantize, pack_bits, quantize, unpack_bits
from peftx.compression.transforms import fwht, hadamard, hadamard_exists, hadamard_signs

__all__ = [
    "BlockInputs",
    "Calibration",
    "KVFormat",
    "QuantLinear",
    "Quantized",
    "QuantizedKVLayer",
    "Stats",
    "cache_nbytes",
    "dequantize",
    "fake_quantize",
    "fwht",
    "hadamard",
    "hadamard_exists",
    "hadamard_signs",
    "make_cache",
    "mse_clip_scale",
    "observe",
    "observing",
    "pack_bits",
    "quantize",
    "straight_through",
    "token_scale",
    "unpack_bits",
    "walk_blocks",
]
