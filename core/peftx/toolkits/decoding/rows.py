"""A batch, one row after another, for loops that work on a single sequence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from peftx.errors import GenerationError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.calls import call_of
from peftx.toolkits.decoding.cache import fork_cache
from peftx.toolkits.decoding.generation import Generation


def per_row(generation: Generation, decode: Callable[[Generation], torch.Tensor]) -> torch.Tensor:
    """Decode each row alone, without its left padding, and put the rows together again.

    Rows share `stats`, `state`, processors and criteria with the request; row i's seed is `seed + i`. Tensors in
    `model_kwargs` whose first dimension is B are cut to their row, and so are columns of `stack.columns`, of those with
    a value for each token the row's own tokens.

    Args:
        generation: a request of any batch size.
        decode: gets a request with batch size 1, returns [1, t + new].

    Returns:
        [B, T + longest new] int64; shorter rows end in the pad token, as `model.generate`'s do.

    Raises:
        PeftxError: padding that is not on the left, or rows of different lengths and no pad token.
        UnsupportedError: a streamer with more than one row, or an encoder-decoder model.
    """
    if generation.model.config.is_encoder_decoder:
        raise UnsupportedError(
            "rows of an encoder-decoder model are decoded as one batch", hint="run_default"
        )
    ids, mask = generation.input_ids, generation.attention_mask
    batch, length = ids.shape
    if batch > 1 and generation.streamer is not None:
        raise UnsupportedError(f"a streamer follows one sequence, got a batch of {batch}")
    call = call_of(generation.model)
    results: list[torch.Tensor] = []
    for row in range(batch):
        own = slice(row, row + 1)
        cache = generation.past_key_values
        if cache is not None:
            cache = fork_cache(cache)
            cache.batch_select_indices(torch.tensor([row], device=ids.device))
        row_mask = None if mask is None else mask[own]
        start = 0
        if row_mask is not None and cache is None:  # beside a cache rows stay aligned, zeros are kept
            start = length - int(row_mask.sum())
            if start == length or not bool(row_mask[0, start:].all()):
                raise GenerationError(f"row {row}: padding must be on the left and leave a token")
            row_mask = row_mask[:, start:]
        alone = Generation(
            model=generation.model,
            tokenizer=generation.tokenizer,
            input_ids=ids[own, start:],
            attention_mask=row_mask,
            generation_config=generation.generation_config,
            logits_processors=generation.logits_processors,
            stopping_criteria=generation.stopping_criteria,
            past_key_values=cache,
            model_kwargs={
                name: value[own]
                if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == batch
                else value
                for name, value in generation.model_kwargs.items()
            },
            streamer=generation.streamer,
            seed=None if generation.seed is None else generation.seed + row,
            stats=generation.stats,
            state=generation.state,
        )
        with nullcontext() if call is None else call.giving(_columns_of(call, row, start, batch, length)):
            result = decode(alone)
        results.append(result[0, length - start :])
    longest = max(len(new) for new in results)
    if all(len(new) == longest for new in results):
        return torch.cat([ids, torch.stack(results)], dim=1)
    pad = torch.full((batch, longest), _pad_token(generation), dtype=torch.int64, device=ids.device)
    output = torch.cat([ids, pad], dim=1)
    for row, new in enumerate(results):
        output[row, length : length + len(new)] = new
    return output


def _columns_of(call: Call, row: int, start: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Of the columns that are given a row's own, without its `start` pads where they have a value for each token."""
    found = {}
    for name, values in call.given.items():
        own = values[row : row + 1] if len(values) == batch else values
        of_tokens = own.ndim > 1 and own.shape[1] == length and name not in call.own_lengths
        found[name] = own[:, start:] if of_tokens else own
    return found


def _pad_token(generation: Generation) -> int:
    """The pad token, or the first EOS token, as `model.generate` chooses it."""
    for config in (generation.generation_config, generation.model.generation_config):
        if config.pad_token_id is not None:
            return int(config.pad_token_id)
    for config in (generation.generation_config, generation.model.generation_config):
        if config.eos_token_id is not None:
            eos = config.eos_token_id
            return int(eos[0] if isinstance(eos, list) else eos)
    raise GenerationError(
        "rows ended at different lengths and there is no pad token", hint="set `pad_token_id`"
    )
