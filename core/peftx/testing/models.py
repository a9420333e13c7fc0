"""Tiny random models of every architecture with a table, inputs for them, and a tokenizer; all made in memory.

The weights are seeded and larger than usual, and biases and norms do not start at constants: an edit in a wrong place
must show in the output.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from peftx.errors import ArchitectureError, nearest
from peftx.testing.shapes import BOS, EOS, FIRST_BYTE, PAD, RECIPES, Padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES: tuple[str, ...] = tuple(RECIPES)
CORE_ARCHITECTURES: tuple[str, ...] = ("llama", "gpt2", "qwen2", "bert", "t5")

_HEADS = {
    "base": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}


def tiny(arch: str, *, head: str | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of about 50,000 parameters: float32, on the CPU, in eval mode, no dropout.

    Args:
        arch: one of `ARCHITECTURES`.
        head: None: the usual one (language modelling, image classes, CLIP's pair); else `base`, `classification`,
            `token-classification` or `question-answering`, for architectures that have it.
        seed: of the weights; torch's global generator is left as it was.
        overrides: fields of the configuration; dictionaries (`text_config`) are merged into the recipe's.

    Raises:
        ArchitectureError: there is no such recipe or head.
    """
    recipe = RECIPES.get(arch)
    if recipe is None:
        raise ArchitectureError(
            f"no tiny model of '{arch}'",
            hint=nearest(arch, ARCHITECTURES) or f"there are: {', '.join(ARCHITECTURES)}",
        )
    if head is not None and head not in _HEADS:
        raise ArchitectureError(
            f"no head '{head}'", hint=nearest(head, _HEADS) or f"there are: {', '.join(_HEADS)}"
        )
    options = deepcopy(recipe.options)
    for name, value in overrides.items():
        options[name] = {**options[name], **value} if isinstance(value, dict) and name in options else value
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # generation defaults that a toy vocabulary does not have
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = getattr(transformers, recipe.config)(**options)
            if head is None:
                model = getattr(transformers, recipe.model)(config)
            else:
                model = getattr(transformers, _HEADS[head]).from_config(config)
            _perturb(model)
    finally:
        logging.set_verbosity(level)
    return model.eval()


@torch.no_grad()
def _perturb(model: PreTrainedModel) -> None:
    """Move biases, scales and norm weights off the zeros and ones that they start at."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or (parameter.ndim == 1 and name.endswith(("weight", "scale"))):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def example_inputs(
    model: PreTrainedModel, *, batch: int = 2, length: int = 9, seed: int = 0, padding: Padding = None
) -> dict[str, Tensor]:
    """Arguments of the model's `forward`, whatever it takes: text, images, audio, source and target.

    Args:
        batch: rows B. length: tokens of a row, of an encoder's input, and of a decoder's (where it has one).
        padding: the side of the pads; row i has min(2 i, length - 1) of them, so the first row has none. The decoder's
            input of an encoder-decoder model is not padded.

    Returns:
        input_ids, attention_mask and decoder_input_ids are int64 [B, length] (ids of bytes only), pixel_values float32
        [B, 3, 16, 16], input_features float32 [B, 8, 20]; on the model's device.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        return torch.randint(FIRST_BYTE, FIRST_BYTE + 256, (batch, length), generator=generator)

    def image(config: Any) -> Tensor:
        size = config.image_size
        return torch.randn(batch, config.num_channels, size, size, generator=generator)

    config = model.config
    kind = config.model_type
    inputs: dict[str, Tensor] = {}
    if kind == "whisper":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
    elif kind == "vit":
        inputs["pixel_values"] = image(config)
    else:
        inputs["input_ids"] = tokens()
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        if kind == "clip":
            inputs["pixel_values"] = image(config.vision_config)
            inputs["input_ids"][:, -1] = EOS  # whose position is read as the text's summary
        for row in range(batch if padding else 0):
            count = min(2 * row, length - 1)
            pads = slice(0, count) if padding == "left" else slice(length - count, length)
            inputs["input_ids"][row, pads] = PAD
            inputs["attention_mask"][row, pads] = 0
            if kind == "clip" and padding == "right":
                inputs["input_ids"][row, length - count - 1] = EOS
    if config.is_encoder_decoder and "decoder_input_ids" in _forward_names(type(model)):
        inputs["decoder_input_ids"] = tokens()
    return {name: value.to(model.device) for name, value in inputs.items()}


@cache
def _forward_names(cls: type[PreTrainedModel]) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(cls.forward).parameters)


def output_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The main tensor that the model returns: logits, CLIP's text-image scores, or the last hidden state."""
    out = model(**inputs)
    for name in ("logits", "logits_per_text", "last_hidden_state", "start_logits"):
        if name in out:
            return out[name]
    raise ArchitectureError(
        f"{type(model).__name__} returns {', '.join(out)}, none of which is a main output"
    )


def tiny_tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, behind `<|bos|>`, `<|eos|>`, `<|pad|>`; pads on the left; 259 tokens.

    Args:
        ends: put BOS and EOS around every text, as encoders' tokenizers do.
    """
    alphabet = _byte_characters()
    vocabulary = {"<|bos|>": BOS, "<|eos|>": EOS, "<|pad|>": PAD}
    vocabulary |= {character: FIRST_BYTE + byte for byte, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", BOS), ("<|eos|>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


@cache
def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte 0..255."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
