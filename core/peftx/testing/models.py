"""Tiny random models of every architecture with a table, inputs for them, and a tokenizer; all made in memory.

The weights are seeded and larger than usual, and biases and norms do not start at constants: an edit in a wrong place
must show in the output.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from peftx.errors import ArchitectureError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOS, EOS, PAD = 0, 1, 2
FIRST_BYTE = 3
"""Token of byte 0; byte b is token FIRST_BYTE + b."""
VOCABULARY = 320
"""Rows of the embedding: the tokenizer's 259 tokens, and some that it never makes."""
IMAGE_TOKEN = 300
"""Stands for one patch of an image (LLaVA)."""

Padding = Literal["left", "right"] | None

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
_GQA = {"num_key_value_heads": 2}
_GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.15,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_MOE = {"num_experts_per_tok": 2}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED_EXPERT = _MOE | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
_SHARED_KEYS = {  # the third layer uses the keys and values of the second
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TWO_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,  # unlike the encoder's, so that neither is taken for the other
    "init_std": 0.15,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": EOS,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
_IMAGE = {"image_size": 16, "patch_size": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
} | _IMAGE


@dataclass(frozen=True)
class _Recipe:
    """How to make one architecture: the class with its usual head, and a tiny configuration."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)


_RECIPES = {
    "llama": _Recipe("LlamaForCausalLM", "LlamaConfig", _TOKENS | _SIZES | _GQA),
    "qwen2": _Recipe("Qwen2ForCausalLM", "Qwen2Config", _TOKENS | _SIZES | _GQA),
    "qwen3": _Recipe("Qwen3ForCausalLM", "Qwen3Config", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "mistral": _Recipe(
        "MistralForCausalLM", "MistralConfig", _TOKENS | _SIZES | _GQA | {"sliding_window": 64}
    ),
    # Gemma: heads wider than hidden / heads, as in the released 7B.
    "gemma": _Recipe("GemmaForCausalLM", "GemmaConfig", _TOKENS | _SIZES | _GQA | {"head_dim": 16}),
    "gemma2": _Recipe("Gemma2ForCausalLM", "Gemma2Config", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "gemma3": _Recipe("Gemma3ForCausalLM", "Gemma3TextConfig", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "mixtral": _Recipe(
        "MixtralForCausalLM", "MixtralConfig", _TOKENS | _SIZES | _GQA | _MOE | {"num_local_experts": 4}
    ),
    "qwen3_moe": _Recipe(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "olmoe": _Recipe("OlmoeForCausalLM", "OlmoeConfig", _TOKENS | _SIZES | _GQA | _MOE | {"num_experts": 4}),
    "granitemoe": _Recipe(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"num_local_experts": 4},
    ),
    # With the usual noise most tokens see one expert, whose weight is then 1.
    "phimoe": _Recipe(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"num_local_experts": 4, "router_jitter_noise": 0.5},
    ),
    "gpt_oss": _Recipe(
        "GptOssForCausalLM",
        "GptOssConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 64},
    ),
    # One dense layer, one with experts.
    "deepseek_v3": _Recipe(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _TOKENS
        | _SIZES
        | _MOE
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
        },
    ),
    "llama4": _Recipe(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _TOKENS
        | _SIZES
        | _GQA
        | {
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
        },
    ),
    # One layer of linear attention, one of full attention; in Qwen3-Next also one dense and one with experts.
    "qwen3_next": _Recipe(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _TOKENS
        | _SIZES
        | _GQA
        | _LINEAR_ATTENTION
        | _SHARED_EXPERT
        | {"head_dim": 8, "mlp_only_layers": [0]},
    ),
    "qwen3_5": _Recipe(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        _TOKENS | _SIZES | _GQA | _LINEAR_ATTENTION | {"head_dim": 8},
    ),
    "qwen3_5_moe": _Recipe(
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        _TOKENS | _SIZES | _GQA | _LINEAR_ATTENTION | _SHARED_EXPERT | {"head_dim": 8},
    ),
    "gemma3n": _Recipe(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        _TOKENS
        | _SIZES
        | _GQA
        | _SHARED_KEYS
        | {
            "head_dim": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        },
    ),
    "gemma4": _Recipe(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        _TOKENS
        | _SIZES
        | _GQA
        | _SHARED_KEYS
        | {
            "head_dim": 8,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "glm4": _Recipe("Glm4ForCausalLM", "Glm4Config", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "phi3": _Recipe("Phi3ForCausalLM", "Phi3Config", _TOKENS | _SIZES | _GQA),
    "gpt2": _Recipe("GPT2LMHeadModel", "GPT2Config", _TOKENS | _GPT),
    "gpt_neox": _Recipe(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", _TOKENS | _SIZES | {"tie_word_embeddings": False}
    ),
    "gptj": _Recipe("GPTJForCausalLM", "GPTJConfig", _TOKENS | _GPT | {"rotary_dim": 4}),
    "opt": _Recipe(
        "OPTForCausalLM",
        "OPTConfig",
        _TOKENS
        | {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "init_std": 0.15,
            "dropout": 0.0,
        },
    ),
    "bloom": _Recipe(
        "BloomForCausalLM",
        "BloomConfig",
        _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15},
    ),
    "mamba": _Recipe(
        "MambaForCausalLM",
        "MambaConfig",
        _TOKENS | {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.15},
    ),
    "bert": _Recipe("BertForMaskedLM", "BertConfig", _TOKENS | _SIZES | _NO_DROPOUT),
    "roberta": _Recipe(
        "RobertaForMaskedLM", "RobertaConfig", _TOKENS | _SIZES | _NO_DROPOUT | {"type_vocab_size": 1}
    ),
    "deberta_v2": _Recipe(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        _TOKENS
        | _SIZES
        | _NO_DROPOUT
        | {
            "pooler_hidden_size": 32,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "t5": _Recipe(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "bart": _Recipe(
        "BartForConditionalGeneration",
        "BartConfig",
        _TOKENS | _TWO_STACKS | {"max_position_embeddings": 128, "classifier_dropout": 0.0},
    ),
    "whisper": _Recipe(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _TOKENS
        | _TWO_STACKS
        | {
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "vit": _Recipe("ViTForImageClassification", "ViTConfig", _VISION | _NO_DROPOUT | {"num_labels": 3}),
    "clip": _Recipe(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": _TOKENS | _SIZES | {"projection_dim": 16},
            "vision_config": _VISION,
            "projection_dim": 16,
        },
    ),
    "llava": _Recipe(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": _TOKENS | _SIZES | _GQA | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
            "image_token_id": IMAGE_TOKEN,
            "vision_feature_layer": -1,
            "pad_token_id": PAD,
        },
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_RECIPES)
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
    recipe = _RECIPES.get(arch)
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


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte 0..255."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
