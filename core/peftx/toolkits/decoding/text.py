"""Text in, text out, through the `decode` hooks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig

from peftx.engines.data import Collator, encoder_ids, prompt_ids
from peftx.errors import ArchitectureError, DataError, GenerationError, nearest
from peftx.kernel.objective import pad_of, vocabulary_of
from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.generation import Generation, decode
from peftx_spec.rows import require_text

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack
    from peftx.kernel.view import ModelView


COLDEST = 1e-5
"""Temperatures below it are greedy: logits over them leave float32's range."""


def request_for(
    stack: Stack, prompts: list[str], max_new_tokens: int, seed: int | None, options: dict[str, Any]
) -> Generation:
    """One `Generation` for several prompts, padded on the left (an encoder's on the right).

    Raises:
        PeftxError: an option that `GenerationConfig` does not have, or more tokens than the model reads.
        DataError: no prompt, or one without tokens.
    """
    rows = [ids_for(stack, prompt) for prompt in prompts]
    return request_of_ids(stack, rows, max_new_tokens, seed, options)


def ids_for(stack: Stack, prompt: str) -> list[int]:
    """A prompt as the model was trained on prompts: BOS exactly once, nothing that closes the text.

    Raises:
        DataError: it is no text, or holds half a surrogate pair.
    """
    require_text(prompt, "the prompt")
    if stack.model.config.is_encoder_decoder:
        return encoder_ids(stack.tokenizer, prompt, max_length=sys.maxsize)
    return prompt_ids(stack.tokenizer, prompt)


def check_writes(model: ModelView, *, alone: bool = True) -> None:
    """Raises ArchitectureError unless the model goes on with a text: for `suits` and `inject`.

    Args:
        alone: it has to be a decoder; one behind an encoder, which writes an answer to a text, will not do.
    """
    name, writes = f"{model.owner}: {type(model.module).__name__}", model.module.can_generate()
    if not writes and not alone:
        raise ArchitectureError(f"{name} writes no text", hint="take a language model")
    if not writes or (alone and model.config.is_encoder_decoder):
        raise ArchitectureError(f"{name} is no decoder that writes text", hint="take a causal language model")


def check_ids(stack: Stack, ids: Sequence[int]) -> None:
    """Raises DataError for an id that the model's embedding has no row for."""
    size, highest = vocabulary_of(stack.model), max(ids)
    if size is not None and highest >= size:
        name = stack.tokenizer.convert_ids_to_tokens(highest) if highest < len(stack.tokenizer) else "a token"
        raise DataError(
            f"{name!r} has id {highest}, and the model's embedding has {size} rows",
            hint="the tokenizer is another model's, or has tokens that the model was never given",
        )


def check_length(stack: Stack, prompt: int, new: int) -> None:
    """Raises PeftxError where so many tokens do not fit the model."""
    limit = free_positions(stack.model)
    if limit is None:
        return
    apart = bool(stack.model.config.is_encoder_decoder)  # the one in the encoder, the other in the decoder
    room = limit if apart else limit - prompt
    if prompt > limit or new > room:
        raise GenerationError(
            f"the prompt has {prompt} tokens and {new} new ones are asked for; "
            f"{'each' if apart else 'together'} at most {limit} fit this model",
            hint=f"ask for {room} at most" if prompt <= limit and room > 0 else "a shorter prompt",
        )


def request_of_ids(
    stack: Stack,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int | None,
    options: dict[str, Any],
) -> Generation:
    """The same for prompts as token ids."""
    if not rows:
        raise DataError("no prompt to continue")
    if not stack.model.can_generate():
        raise ArchitectureError(f"{type(stack.model).__name__} writes no text", hint="take a decoder")
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens is {max_new_tokens}, and one is the least")
    lengths = [len(row) for row in rows]
    if min(lengths) == 0:
        raise DataError("the prompt has no tokens")
    check_length(stack, max(lengths), max_new_tokens)
    check_ids(stack, [max(row) for row in rows])
    if options.get("num_return_sequences", 1) != 1:
        raise GenerationError(
            "num_return_sequences: one text comes of a prompt", hint="give the prompt several times"
        )
    config = copy.deepcopy(stack.model.generation_config)
    known = GenerationConfig().to_dict()
    for name in options:
        if name not in known:
            raise GenerationError(f"generate: unknown option '{name}'", hint=nearest(name, known) or None)
    if options.get("do_sample") and 0 < options.get("temperature", 1.0) < COLDEST:
        options = options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    config.update(**options)
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    tokenizer = stack.tokenizer
    if config.pad_token_id is None:
        config.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    pad = pad_of(stack.model, tokenizer)
    side: Literal["left", "right"] = "right" if stack.model.config.is_encoder_decoder else "left"
    tokens = Collator(pad, padding_side=side)([{"input_ids": list(row)} for row in rows])
    device = stack.model.device
    return Generation(
        model=stack.model,
        tokenizer=tokenizer,
        input_ids=tokens["input_ids"].to(device),
        attention_mask=tokens["attention_mask"].to(device),
        generation_config=config,
        seed=seed,
    )


AS_IT_IS = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""Options that write from the model itself, whatever a checkpoint's own generation settings are."""
DRAWN = AS_IT_IS | {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""The same for drawing from it."""


def written(
    stack: Stack, prompts: Sequence[Sequence[int]], new: int, options: dict[str, Any]
) -> list[list[int]]:
    """What a causal model, as it stands, writes behind prompts of token ids: `new` tokens at most and one at least,
    fewer where one ends the text or the model's positions do. The token that ends a text is the last one of it.

    Drafts and other `decode` hooks have no part in it.

    Args:
        options: of generation, such as `DRAWN`.
    """
    limit = free_positions(stack.model)
    room = new if limit is None else limit - max(map(len, prompts))
    request = request_of_ids(stack, prompts, max(1, min(new, room)), None, options)
    y = request.run_default()[:, request.input_ids.shape[1] :]
    end = torch.isin(y, torch.tensor(request.generation_config.eos_token_id, device=y.device))
    behind = end.cumsum(1) > end.long()
    return [row[~over].tolist() for row, over in zip(y, behind, strict=True)]


def generate(
    stack: Stack, prompts: list[str], max_new_tokens: int, seed: int | None, options: dict[str, Any]
) -> tuple[list[str], dict[str, float]]:
    """New texts, one for each prompt, and the run's statistics."""
    request = request_for(stack, prompts, max_new_tokens, seed, options)
    ids = decode(stack, request)
    start = 0 if stack.model.config.is_encoder_decoder else request.input_ids.shape[1]
    texts = stack.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return texts, request.stats
