"""Text in, text out, through the `decode` hooks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from peftx.decoding.generation import Generation
from peftx.errors import DataError, PeftxError, nearest

if TYPE_CHECKING:
    from peftx.stack import Stack


def request_for(
    stack: Stack, prompts: list[str], max_new_tokens: int, seed: int | None, options: dict[str, Any]
) -> Generation:
    """One `Generation` for several prompts, padded on the left.

    Raises:
        PeftxError: an option that `GenerationConfig` does not have. DataError: an empty prompt list.
    """
    if not prompts:
        raise DataError("no prompt to continue")
    config = copy.deepcopy(stack.model.generation_config)
    known = GenerationConfig().to_dict()
    for name in options:
        if name not in known:
            raise PeftxError(f"generate: unknown option '{name}'", hint=nearest(name, known) or None)
    config.update(**options)
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    tokenizer = stack.tokenizer
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    tokens = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    device = stack.model.device
    return Generation(
        model=stack.model,
        tokenizer=tokenizer,
        input_ids=tokens["input_ids"].to(torch.int64).to(device),
        attention_mask=tokens["attention_mask"].to(device),
        generation_config=config,
        seed=seed,
    )


def generate(
    stack: Stack, prompts: list[str], max_new_tokens: int, seed: int | None, options: dict[str, Any]
) -> tuple[list[str], dict[str, float]]:
    """New texts, one for each prompt, and the run's statistics."""
    request = request_for(stack, prompts, max_new_tokens, seed, options)
    ids = stack.decode(request)
    start = 0 if stack.model.config.is_encoder_decoder else request.input_ids.shape[1]
    texts = stack.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return texts, request.stats
