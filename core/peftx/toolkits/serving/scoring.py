"""Logits of a request's own: penalties and biases on the way, log-probabilities afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor

from peftx.toolkits.serving.job import Request, TokenScore
from peftx.toolkits.serving.structured import Grammars, Structure

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """Tokens of the answer so far lose `presence`, and `frequency` for each time that they stand there."""

    def __init__(self, *, presence: float, frequency: float, start: int) -> None:
        self.presence, self.frequency, self.start = presence, frequency, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids[:, self.start :]
        counts = torch.zeros_like(scores).scatter_add_(
            1, written, torch.ones_like(written, dtype=scores.dtype)
        )
        return scores - self.presence * (counts > 0) - self.frequency * counts


class _Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the logits of some tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self.ids = torch.tensor([token for token, _ in bias])
        self.values = torch.tensor([value for _, value in bias])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self.ids.to(scores.device), self.values.to(scores).expand(len(scores), -1))


def shaping(request: Request, *, start: int, grammars: Callable[[], Grammars]) -> list[LogitsProcessor]:
    """What changes the logits of a request; `start`: tokens of its prompt, pads with it."""
    found: list[LogitsProcessor] = []
    if request.presence_penalty or request.frequency_penalty:
        found.append(
            _Penalties(presence=request.presence_penalty, frequency=request.frequency_penalty, start=start)
        )
    if request.logit_bias:
        found.append(_Bias(request.logit_bias))
    if request.schema:
        found.append(Structure(grammars(), request.schema, start=start))
    return found


@torch.no_grad()
def scores_of(
    stack: Stack,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    top: int,
    echo: bool,
    text: Callable[[list[int]], str],
) -> tuple[TokenScore, ...]:
    """Log-probabilities of the answer's tokens, with `echo` of the prompt's too: one more look at the whole text, by
    the model as it is, without temperature.

    Args:
        top: so many of the likeliest tokens in each place. text: decodes.
    """
    model, device = stack.model, stack.model.device
    if model.config.is_encoder_decoder:
        start = model.generation_config.decoder_start_token_id
        ids, first = [start, *answer], 1
        logits = model(
            input_ids=torch.tensor([list(prompt)], device=device),
            decoder_input_ids=torch.tensor([ids], device=device),
        ).logits[0]
    else:
        ids, first = [*prompt, *answer], 0 if echo else len(prompt)
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -len(ids) :]
    found: list[TokenScore] = []
    for place in range(first, len(ids)):
        offset = len(text(ids[first:place]))
        if place == 0:
            found.append(TokenScore(text([ids[place]]), None, offset))
            continue
        found.append(score_of(logits[place - 1], ids[place], offset, top=top, text=text))
    return tuple(found)


def score_of(
    logits: Tensor, token: int, offset: int, *, top: int, text: Callable[[list[int]], str]
) -> TokenScore:
    """Of a token, by the logits [V] in front of it; the rest as in `scores_of`."""
    row = logits.float().log_softmax(-1)
    best = row.topk(top)
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenScore(
        text([token]), float(row[token]), offset, tuple((text([other]), value) for other, value in likeliest)
    )
