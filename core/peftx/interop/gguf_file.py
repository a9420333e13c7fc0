"""A stack's merged model as one GGUF file, which llama.cpp, Ollama and LM Studio read: models of Llama's shape.

Names of tensors are those of the package's own tables. Rotary dimension i is turned with i + D/2 in transformers and 2i
with 2i + 1 in llama.cpp's `llama`, so there rows of q and k change places:

    row 2i + j of a head in the file = row i + j D/2 of the head in the model,   j in {0, 1}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftx.engines.bundle.exporting import PACKED, blank, check_plain, folded, weights, writing
from peftx.errors import MergeError, UnsupportedError
from peftx.interop.gguf_tokens import Vocabulary, vocabulary_of
from peftx.interop.refusals import require_package, require_weights
from peftx.kernel.parts import ReplacedPart
from peftx.stack import Stack
from peftx.toolkits.compression.names import check_choice

if TYPE_CHECKING:
    from gguf import GGUFWriter

FORMAT = "gguf"
FILE = "model.gguf"
TYPES = ("f16", "q8_0", "q4_0")
BLOCK = 32
"""Weights that share a scale in q8_0 and q4_0."""


@dataclass(frozen=True)
class Shape:
    """How llama.cpp takes a model."""

    arch: str
    """Name in gguf's `MODEL_ARCH`."""
    turned: bool = False
    """Are neighbours turned together, and not halves."""
    biases: tuple[str, ...] = ()
    """Layers that may have one."""
    scaled_rope: bool = False
    """Does it read factors of the rotary frequencies."""


SHAPES = {
    "llama": Shape("LLAMA", True, ("q", "k", "v", "o", "gate", "up", "down"), True),
    "mistral": Shape("LLAMA", True, ("q", "k", "v", "o", "gate", "up", "down"), True),
    "qwen2": Shape("QWEN2", biases=("q", "k", "v")),
    "qwen3": Shape("QWEN3"),
}


def to_gguf(stack: Stack, folder: str | Path, *, type: str = "f16") -> Path:
    """Write `model.gguf` with the merged weights and the tokenizer.

    Args:
        type: of the matrices: f16, q8_0 or q4_0. Vectors are float32; in q4_0 the embedding and the head are q8_0, and
            rows that fill no blocks of 32 are f16.

    Raises:
        MergeError, UnsupportedError: the format, or llama.cpp, has no place for something. Nothing is written then.
        BundleError: the folder holds something else, or cannot be written; it is as it was.
        PeftxError: the package `gguf` is not there.
    """
    require_package("gguf", extra="gguf", format=FORMAT)
    check_choice(type, TYPES, "type")
    require_weights(stack, FORMAT)
    packed = next(iter(stack.ledger.all(ReplacedPart)), None)
    if packed is not None:
        raise MergeError(
            f"'{packed.owner}' has packed {packed.key}, and {FORMAT} rounds weights by itself",
            hint=PACKED,
        )
    shape, frequencies = _shape(stack.model), _frequencies(stack.model)
    words = vocabulary_of(stack.tokenizer, stack.model.get_input_embeddings().weight.shape[0])
    with folded(stack):
        state = weights(stack)
        check_plain(blank(stack.model), state)
        tensors = dict(_named(stack.model, shape, state))
        if frequencies is not None:
            tensors["rope_freqs.weight"] = frequencies
        with writing(stack, Path(folder)) as place:
            _write(place / FILE, stack, shape, words, tensors, type)
    return Path(folder)


def _shape(model: Any) -> Shape:
    """Raises UnsupportedError where llama.cpp would compute something else."""
    config, kind = model.config, model.config.model_type
    shape = SHAPES.get(kind)
    if shape is None or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != type(model).__name__:
        raise UnsupportedError(
            f"{type(model).__name__}: --format {FORMAT} takes language models of {', '.join(SHAPES)}",
            hint="--format hf, and llama.cpp's own convert_hf_to_gguf.py",
        )
    window = getattr(config, "sliding_window", None)
    reasons = {
        f"an activation of {config.hidden_act}": config.hidden_act != "silu",
        f"a window of {window} tokens": window is not None and window < config.max_position_embeddings,
        "frequencies that it does not read": _frequencies(model) is not None and not shape.scaled_rope,
        f"a rope of type {_rope_type(model)}": _rope_type(model) not in ("default", "linear", "llama3"),
    }
    for what, present in reasons.items():
        if present:
            raise UnsupportedError(
                f"{type(model).__name__} has {what}, and llama.cpp's {shape.arch.lower()} computes without",
                hint="--format hf",
            )
    return shape


def _rope_type(model: Any) -> str:
    return str(model.config.rope_parameters.get("rope_type", "default"))


def _frequencies(model: Any) -> Tensor | None:
    """By what llama.cpp divides each rotary frequency base^(-2i/D); None where that changes none."""
    used = model.get_decoder().rotary_emb.inv_freq.detach().double().cpu()
    base = float(model.config.rope_parameters["rope_theta"])
    plain = base ** (-torch.arange(len(used), dtype=torch.float64) / len(used))
    factors = (plain / used).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5, atol=0) else factors


def _named(model: Any, shape: Shape, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the file's names, in the file's order of rows; a tied head is not in it."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH[shape.arch], config.num_hidden_layers)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in state.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        role = name.split(".")[-2].removesuffix("_proj")
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None or (name.endswith(".bias") and role not in shape.biases):
            raise UnsupportedError(
                f"llama.cpp's {shape.arch.lower()} has no place for {name}", hint="--format hf, or a bundle"
            )
        turned = shape.turned and role in heads
        yield theirs, turn(tensor.detach(), heads[role]) if turned else tensor.detach()


def turn(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads D, ...] with the two halves of each head interleaved; see the module."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(
    path: Path, stack: Stack, shape: Shape, words: Vocabulary, tensors: dict[str, Tensor], type: str
) -> None:
    """One tensor after the other, so that no second copy of the model stands in memory."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[shape.arch]])
    _describe(writer, stack)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    words.tell(writer)
    kinds = {name: gguf.GGMLQuantizationType[_kind(name, t, type)] for name, t in tensors.items()}
    for name, tensor in tensors.items():
        size = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            values = tensor.float().cpu().contiguous().numpy()
            _check_range(name, values)
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    finally:
        writer.close()


def _kind(name: str, tensor: Tensor, type: str) -> str:
    """What a tensor is kept as; see `to_gguf`."""
    if tensor.dim() == 1:
        return "F32"
    if type == "f16" or tensor.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name in ("token_embd.weight", "output.weight") else type.upper()


def _check_range(name: str, values: Any) -> None:
    """Matrices, and the scales of their blocks, are of float16."""
    largest = float(abs(values).max())
    if not largest <= torch.finfo(torch.float16).max:
        raise UnsupportedError(f"{name} holds {largest:g}, which float16 does not", hint="--format hf")


def _describe(writer: GGUFWriter, stack: Stack) -> None:
    config = stack.model.config
    writer.add_name(Path(str(stack.base_id)).name)
    writer.add_description(f"written by peftx, plugins: {json.dumps(list(stack.plugins))}")
    writer.add_vocab_size(stack.model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    size = 2 * len(stack.model.get_decoder().rotary_emb.inv_freq)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
