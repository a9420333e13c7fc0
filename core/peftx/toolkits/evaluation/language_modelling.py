"""Perplexity of given texts, with sliding windows over long ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftx.engines.data import (
    continuation,
    encoder_ids,
    following_ids,
    prompt_ids,
    prompt_turns,
    said,
    text_ids,
    turns,
)
from peftx.engines.data.places import Listed, Place
from peftx.errors import DataError
from peftx.toolkits.evaluation.likelihood import (
    Progress,
    Request,
    context_window,
    decoder_start,
    opening_ids,
    refuse_masked,
    score_requests,
    windows,
)
from peftx.toolkits.evaluation.scores import Score, bootstrap_ratio

_ENOUGH_DOCUMENTS: Final = 10  # with fewer, windows are the units of the bootstrap


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """How well the model predicts texts it is given.

        nll = -sum log p(token | tokens before it) / tokens        nats per token
        perplexity = exp(nll)
        bits_per_byte = nll * tokens / (ln 2 * bytes of UTF-8)     comparable between tokenizers

    Every token of every document is scored exactly once. BOS is read, not scored; a tokenizer that puts none in
    front lends its BOS (else EOS) id, so that the first token has a context too. EOS is not scored.

    Args:
        texts: documents; or rows with `text`; or rows with `prompt` and `completion`, of which the completion
            is scored; or rows with `messages`, of which the assistant's turns are. An encoder-decoder model needs
            prompt and completion: the one in the encoder, the other in the decoder.
        max_length: ids read at once; the model's window when None.
        stride: by how much a window moves on; half of `max_length` when None. Smaller gives every token more
            context and takes more passes.
        seed: of the bootstrap.

    Returns:
        Scores `perplexity`, `nll`, `bits_per_byte`, each with the number of tokens as its count. The interval
        is a percentile bootstrap (1000 resamples) over documents, or over windows where there are fewer than
        10 documents; it speaks of the sampling of the texts only. None for a single window.

    Raises:
        UnsupportedError: a masked language model.
        DataError: an empty document, or a row of another shape; names its index.
    """
    refuse_masked(model)
    size = context_window(model, tokenizer) if max_length is None else max_length
    step = max(1, size // 2) if stride is None else stride
    cut = _pair_requests if model.config.is_encoder_decoder else _text_requests
    requests: list[Request] = []
    owners: list[int] = []
    document_bytes: list[int] = []
    if isinstance(texts, str):
        raise DataError("texts is one string; give a list of documents")
    for index, item in enumerate(texts):
        place = Place(texts, index) if isinstance(texts, Listed) else f"text {index} (counting from 0)"
        pieces, count = cut(model, tokenizer, item, str(place), size, step)
        requests += pieces
        owners += [index] * len(pieces)
        document_bytes.append(count)
    if not document_bytes:
        raise DataError("no texts to evaluate")

    logs = score_requests(model, requests, batch_size=batch_size, device=device, progress=progress)
    sums = [-float(scored[0].sum()) for scored in logs]  # nats of each window
    counts = [len(scored[0]) for scored in logs]
    tokens, size_bytes, total = sum(counts), sum(document_bytes), sum(sums)

    if len(document_bytes) >= _ENOUGH_DOCUMENTS:
        documents = range(len(document_bytes))
        unit_sums, unit_counts = [0.0 for _ in documents], [0 for _ in documents]
        for owner, nats, count in zip(owners, sums, counts, strict=True):
            unit_sums[owner] += nats
            unit_counts[owner] += count
        unit_bytes: list[float] = list(map(float, document_bytes))
    else:
        unit_sums, unit_counts = sums, counts
        unit_bytes = [count * size_bytes / tokens for count in counts]  # a window's bytes are not known
    per_token = bootstrap_ratio(unit_sums, unit_counts, seed=seed)
    per_byte = bootstrap_ratio(unit_sums, unit_bytes, seed=seed)

    def score(
        name: str, unit: str, value: float, ends: tuple[float, float] | None, to: Callable[[float], float]
    ) -> Score:
        low, high = (None, None) if ends is None else (to(ends[0]), to(ends[1]))
        return Score(name=name, value=to(value), low=low, high=high, count=tokens, unit=unit)

    nll = total / tokens
    return {
        "perplexity": score("perplexity", "per token", nll, per_token, _exp),
        "nll": score("nll", "nats per token", nll, per_token, float),
        "bits_per_byte": score(
            "bits_per_byte", "bits per byte", total / size_bytes, per_byte, lambda nats: nats / math.log(2)
        ),
    }


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _text_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    item: str | Mapping[str, Any],
    where: str,
    size: int,
    stride: int,
) -> tuple[list[Request], int]:
    """Windows over one document of a causal model, and the bytes that they score."""
    if isinstance(item, Mapping) and "messages" in item:
        return _turn_requests(tokenizer, item, where, size)
    if isinstance(item, Mapping) and "completion" in item and "prompt" in item:
        context = prompt_ids(tokenizer, item["prompt"]) or opening_ids(tokenizer)
        text = continuation(item["prompt"], item["completion"])
        scored = following_ids(tokenizer, text)
    else:
        if isinstance(item, Mapping) and "text" not in item:
            raise DataError(
                f"{where} has neither 'text' nor 'prompt' and 'completion' nor 'messages'; found {', '.join(item)}"
            )
        text = item["text"] if isinstance(item, Mapping) else item
        whole, context = prompt_ids(tokenizer, text), opening_ids(tokenizer)
        scored = whole[len(context) :] if whole[: len(context)] == context else whole
    if not scored:
        raise DataError(f"{where} has no tokens to score: {text!r}")
    ids = context + scored
    requests = [
        Request(inputs=ids[begin:end], first=first - 1 - begin, targets=[ids[first : end + 1]])
        for begin, first, end in windows(len(ids), size=size, stride=stride, start=len(context))
    ]
    return requests, len(text.encode())


def _turn_requests(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], where: str, size: int
) -> tuple[list[Request], int]:
    """The assistant's turns of one conversation, each with what stands before it, cut on the left where it is long."""
    requests, count = [], 0
    ids, learned = turns(tokenizer, row, where)
    for begin, end in learned:
        start = max(0, end - 1 - size)
        if begin - 1 < start:
            raise DataError(f"{where}: a turn of {end - begin} tokens does not fit in max_length {size}")
        requests.append(
            Request(inputs=ids[start : end - 1], first=begin - 1 - start, targets=[ids[begin:end]])
        )
    for message in row["messages"][prompt_turns(row) :]:
        count += len(said(message).encode()) if message["role"] == "assistant" else 0
    return requests, count


def _pair_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    item: str | Mapping[str, Any],
    where: str,
    size: int,
    stride: int,
) -> tuple[list[Request], int]:
    """One pass of an encoder-decoder model over one row."""
    if not isinstance(item, Mapping) or "prompt" not in item or "completion" not in item:
        raise DataError(
            f"{where}: an encoder-decoder model scores a completion given a prompt",
            hint="give rows with 'prompt' and 'completion'",
        )
    target = text_ids(tokenizer, item["completion"])
    if not target or len(target) > size:
        raise DataError(
            f"{where}: the completion has {len(target)} tokens; between 1 and max_length {size} fit"
        )
    encoder = encoder_ids(tokenizer, item["prompt"], max_length=size)
    inputs = [decoder_start(model), *target[:-1]]
    return [Request(inputs=inputs, first=0, targets=[target], encoder=encoder)], len(
        item["completion"].encode()
    )
