"""The shapes of the tiny models: a configuration for every architecture with a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
class Recipe:
    """How to make one architecture: the class with its usual head, and a tiny configuration."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "llama": Recipe("LlamaForCausalLM", "LlamaConfig", _TOKENS | _SIZES | _GQA),
    "qwen2": Recipe("Qwen2ForCausalLM", "Qwen2Config", _TOKENS | _SIZES | _GQA),
    "qwen3": Recipe("Qwen3ForCausalLM", "Qwen3Config", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "mistral": Recipe(
        "MistralForCausalLM", "MistralConfig", _TOKENS | _SIZES | _GQA | {"sliding_window": 64}
    ),
    # Gemma: heads wider than hidden / heads, as in the released 7B.
    "gemma": Recipe("GemmaForCausalLM", "GemmaConfig", _TOKENS | _SIZES | _GQA | {"head_dim": 16}),
    "gemma2": Recipe("Gemma2ForCausalLM", "Gemma2Config", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "gemma3": Recipe("Gemma3ForCausalLM", "Gemma3TextConfig", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "mixtral": Recipe(
        "MixtralForCausalLM", "MixtralConfig", _TOKENS | _SIZES | _GQA | _MOE | {"num_local_experts": 4}
    ),
    "qwen3_moe": Recipe(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "olmoe": Recipe("OlmoeForCausalLM", "OlmoeConfig", _TOKENS | _SIZES | _GQA | _MOE | {"num_experts": 4}),
    "granitemoe": Recipe(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"num_local_experts": 4},
    ),
    # With the usual noise most tokens see one expert, whose weight is then 1.
    "phimoe": Recipe(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"num_local_experts": 4, "router_jitter_noise": 0.5},
    ),
    "gpt_oss": Recipe(
        "GptOssForCausalLM",
        "GptOssConfig",
        _TOKENS | _SIZES | _GQA | _MOE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 64},
    ),
    # One dense layer, one with experts.
    "deepseek_v3": Recipe(
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
    "llama4": Recipe(
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
    "qwen3_next": Recipe(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        _TOKENS
        | _SIZES
        | _GQA
        | _LINEAR_ATTENTION
        | _SHARED_EXPERT
        | {"head_dim": 8, "mlp_only_layers": [0]},
    ),
    "qwen3_5": Recipe(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        _TOKENS | _SIZES | _GQA | _LINEAR_ATTENTION | {"head_dim": 8},
    ),
    "qwen3_5_moe": Recipe(
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        _TOKENS | _SIZES | _GQA | _LINEAR_ATTENTION | _SHARED_EXPERT | {"head_dim": 8},
    ),
    "gemma3n": Recipe(
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
    "gemma4": Recipe(
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
    "glm4": Recipe("Glm4ForCausalLM", "Glm4Config", _TOKENS | _SIZES | _GQA | {"head_dim": 8}),
    "phi3": Recipe("Phi3ForCausalLM", "Phi3Config", _TOKENS | _SIZES | _GQA),
    "gpt2": Recipe("GPT2LMHeadModel", "GPT2Config", _TOKENS | _GPT),
    "gpt_neox": Recipe(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", _TOKENS | _SIZES | {"tie_word_embeddings": False}
    ),
    "gptj": Recipe("GPTJForCausalLM", "GPTJConfig", _TOKENS | _GPT | {"rotary_dim": 4}),
    "opt": Recipe(
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
    "bloom": Recipe(
        "BloomForCausalLM",
        "BloomConfig",
        _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15},
    ),
    "mamba": Recipe(
        "MambaForCausalLM",
        "MambaConfig",
        _TOKENS | {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.15},
    ),
    "bert": Recipe("BertForMaskedLM", "BertConfig", _TOKENS | _SIZES | _NO_DROPOUT),
    "roberta": Recipe(
        "RobertaForMaskedLM", "RobertaConfig", _TOKENS | _SIZES | _NO_DROPOUT | {"type_vocab_size": 1}
    ),
    "deberta_v2": Recipe(
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
    "t5": Recipe(
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
    "bart": Recipe(
        "BartForConditionalGeneration",
        "BartConfig",
        _TOKENS | _TWO_STACKS | {"max_position_embeddings": 128, "classifier_dropout": 0.0},
    ),
    "whisper": Recipe(
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
    "vit": Recipe("ViTForImageClassification", "ViTConfig", _VISION | _NO_DROPOUT | {"num_labels": 3}),
    "clip": Recipe(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": _TOKENS | _SIZES | {"projection_dim": 16},
            "vision_config": _VISION,
            "projection_dim": 16,
        },
    ),
    "llava": Recipe(
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
