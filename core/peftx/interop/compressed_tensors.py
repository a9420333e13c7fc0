"""A quantized stack as a `compressed-tensors` checkpoint, which transformers, vLLM and SGLang read.

w = (q - z) s      q, z: our integers less 2^(b-1) where they are unsigned, s as it is

<layer>.weight_packed      [out, ceil(in b / 32)] int32, a row one stream of q + 2^(b-1)
<layer>.weight_scale       [out, groups]
<layer>.weight_zero_point  [ceil(out b / 32), groups] int32, only where it is asymmetric
<layer>.weight_shape       [2] int64: out, in

Where inputs are rounded too, by one scale for all (W8A8), the integers lie as they are, for products of integers:

<layer>.weight             [out, in] int8
<layer>.weight_scale       [out, 1]
<layer>.weight_zero_point  [out, 1] int8, only where it is asymmetric
<layer>.input_scale        [1]
<layer>.input_zero_point   [1] int8, only where it is asymmetric
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftx.engines.bundle.exporting import blank, check_plain, folded, save_plain, weights, writing
from peftx.errors import MergeError
from peftx.interop.refusals import BUNDLE, require_package, require_weights
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.slots import base_class
from peftx.stack import Stack
from peftx.toolkits.compression import Quantized, QuantLinear
from peftx.toolkits.compression.kernels import to_signed

FORMAT = "compressed-tensors"
BITS = (4, 8)
"""Of weights alone, that every reader of pack-quantized takes."""


def to_compressed_tensors(stack: Stack, folder: str | Path) -> Path:
    """Write the stack's integers, scales and zero points as they are, and all else as a plain checkpoint has it.

    Raises:
        MergeError: the format cannot say all of the stack. Nothing is written then.
        BundleError: the folder holds something else, or cannot be written; it is as it was.
        PeftxError: the package `compressed-tensors` is not there.
    """
    require_package("compressed_tensors", extra="compressed", format=FORMAT)
    require_weights(stack, FORMAT)
    layers = {part.key: _integers(part) for part in stack.ledger.all(ReplacedPart)}
    if not layers:
        raise MergeError("no layer of the stack is quantized to integers", hint="--format hf")
    _check_experts(stack)
    plain = blank(stack.model)
    for path in layers:
        _check_place(plain, path)
    with folded(stack):
        state = {name: t for name, t in weights(stack).items() if not _within(name, layers)}
        kept = {f"{path}.{name}": t for path, layer in layers.items() for name, t in _kept(layer)}
        check_plain(plain, state | kept)
        state |= {name: t for name, t in kept.items() if not t.is_meta}
        for path, layer in layers.items():
            tensors = packed(layer.quantized()) if layer.activation is None else multiplied(layer)
            state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        with writing(stack, Path(folder)) as place:
            save_plain(stack, place, state)
            _describe(place / "config.json", layers, plain)
    return Path(folder)


def packed(quantized: Quantized) -> dict[str, Tensor]:
    """A weight's tensors under the format's names; nothing is rounded."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q, bits = quantized.q, quantized.bits
    found = {
        "weight_packed": pack_to_int32(_centred(q, bits), bits),
        "weight_scale": quantized.scale,
        "weight_shape": torch.tensor(q.shape),
    }
    if quantized.zero is not None:
        zero = pack_to_int32(_centred(quantized.zero, bits), bits, packed_dim=0)
        found["weight_zero_point"] = zero.contiguous()
    return found


def multiplied(layer: QuantLinear) -> dict[str, Tensor]:
    """The tensors of a layer that multiplies integers of 8 bits, under the format's names."""
    quantized, given = layer.quantized(), (layer.input_scale, layer.input_zero)
    found = {
        "weight": _centred(quantized.q, 8), "weight_scale": quantized.scale, "weight_zero_point": quantized.zero,
        "input_scale": given[0], "input_zero_point": given[1],
    }  # fmt: skip
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    zeros = {name: _centred(zero, 8) for name, zero in found.items() if name.endswith("zero_point")}
    return {name: t.reshape(1) if t.ndim == 0 else t for name, t in (found | zeros).items()}


def _centred(q: Tensor, bits: int) -> Tensor:
    """int8 as it is; of uint8 the middle of the range taken away."""
    if q.dtype == torch.int8 or bits == 8:
        return to_signed(q)
    return q.to(torch.int8) - (1 << bits - 1)


def _integers(part: ReplacedPart) -> QuantLinear:
    """The layer that stands there, if its weight is integers with scales and nothing else happens in it."""
    layer, kind = part.module, base_class(part.module)
    reason = _reason(kind, layer)
    if reason:
        raise MergeError(
            f"'{part.owner}' keeps {part.key} as {kind.__name__}, which {reason}, and {FORMAT} holds integers of "
            "4 or 8 bits with their scales",
            hint=BUNDLE,
        )
    assert isinstance(layer, QuantLinear)
    return layer


def _reason(kind: type[nn.Module], layer: nn.Module) -> str:
    if not issubclass(kind, QuantLinear):
        return "is no packed layer"
    assert isinstance(layer, QuantLinear)
    if kind.quantized is not QuantLinear.quantized:
        return "has values of a data type of its own"
    if kind.forward is not QuantLinear.forward or kind.product is not QuantLinear.product:
        return "changes what goes into it or comes out (as a rotation does)"
    if layer.activation is not None:
        return _reason_of_inputs(layer)
    if layer.bits not in BITS:
        return f"has {layer.bits} bits a weight"
    if layer.group_size is not None and layer.in_features % layer.group_size:
        return f"has groups of {layer.group_size} that do not divide its {layer.in_features} inputs"
    return ""


def _reason_of_inputs(layer: QuantLinear) -> str:
    """Of a layer that rounds its input: the format has what engines multiply as integers."""
    bits = f"W{layer.bits}A{layer.act_bits}"
    if layer.activation != "static-tensor":
        return f"rounds its input by a scale for each token ({bits}), which every reader chooses by a rule of its own"
    if (layer.bits, layer.act_bits, layer.group_size) != (8, 8, None):
        grouped = "" if layer.group_size is None else f" in groups of {layer.group_size}"
        return (
            f"rounds its input too, as {bits}{grouped}, of which W8A8 with a scale for each row alone is read"
        )
    if layer.activation_scale(torch.zeros(1, layer.in_features))[0] is not layer.input_scale:
        return "rounds its input by a rule of its own"
    return ""


def _check_place(plain: nn.Module, path: str) -> None:
    """Raises MergeError where the model's own class has something else than a linear layer with a weight to itself."""
    own = plain.get_submodule(path)
    if not isinstance(own, nn.Linear):
        raise MergeError(
            f"{path} is a {type(own).__name__}, and {FORMAT} packs nn.Linear alone",
            hint=BUNDLE,
        )
    shared = [n for n, p in plain.named_parameters(remove_duplicate=False) if p is own.weight]
    if shared != [f"{path}.weight"]:
        raise MergeError(
            f"{type(plain).__name__} uses one matrix as {' and '.join(shared)}, which are not packed one by one",
            hint="leave it out of the plugin's targets, or save a bundle",
        )


def _check_experts(stack: Stack) -> None:
    """Raises MergeError where experts stand in one tensor: transformers takes all experts of the format for packed."""
    found = next((site for site in stack.anatomy.sites if site.kind == "experts"), None)
    if found is not None:
        raise MergeError(
            f"{found.path} holds stacked experts, which transformers reads from {FORMAT} as packed ones alone",
            hint=BUNDLE,
        )


def _within(name: str, layers: Iterable[str]) -> bool:
    return name.rpartition(".")[0] in layers


def _kept(layer: QuantLinear) -> Iterable[tuple[str, Tensor]]:
    """What a plain layer would have: a weight, of which nothing is read here, and the bias as it is."""
    yield "weight", torch.empty(0, device="meta")
    if layer.bias is not None:
        yield "bias", layer.bias


def _describe(config: Path, layers: dict[str, QuantLinear], plain: nn.Module) -> None:
    """Add what is quantized, and how, to config.json."""
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    schemes: dict[tuple[int, bool, int | None, bool | None], list[str]] = {}
    for path, layer in layers.items():
        inputs = None if layer.activation is None else layer.act_symmetric
        schemes.setdefault((layer.bits, layer.symmetric, layer.group_size, inputs), []).append(path)
    others = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    formats = {_format(inputs) for *_, inputs in schemes}
    told = QuantizationConfig(
        config_groups={
            f"group_{index}": {
                # Of one scheme by the class, as engines that fuse layers of one class expect.
                "targets": ["Linear"] if len(schemes) == 1 else paths,
                "weights": _scheme(*scheme[:3]),
                "input_activations": None if scheme[3] is None else _scheme_of_inputs(scheme[3]),
                "format": _format(scheme[3]),
            }
            for index, (scheme, paths) in enumerate(schemes.items())
        },
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=others,
    )
    about = json.loads(config.read_text("utf-8"))
    about["quantization_config"] = {**told.model_dump(mode="json"), "version": __version__}
    config.write_text(json.dumps(about, indent=2), "utf-8")


def _format(inputs: bool | None) -> str:
    """How integers lie. inputs: are those of inputs symmetric; None: weights alone."""
    return "pack-quantized" if inputs is None else "int-quantized"


def _scheme_of_inputs(symmetric: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": symmetric, "dynamic": False, "strategy": "tensor"}


def _scheme(bits: int, symmetric: bool, group_size: int | None) -> dict[str, Any]:
    grouped = (
        {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    )
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **grouped}
