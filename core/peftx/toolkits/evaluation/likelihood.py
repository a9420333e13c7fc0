"""Log-probabilities of given tokens under a causal or an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from peftx.engines.data import special_frame
from peftx.errors import DataError, ModelError, UnsupportedError
from peftx.kernel.modes import evaluating
from peftx.kernel.positions import free_positions

_Read = TypeVar("_Read")
Progress = Callable[[int, int], None]  # (done, total)

# Tokenizers without a limit say 1e30; a window is only taken from a tokenizer that means it.
_SANE_LENGTH: Final = 1_000_000
_DEFAULT_WINDOW: Final = 1024


@dataclass(frozen=True, kw_only=True)
class Request:
    """Tokens to score in one row of a batch.

    The logits at position `first + j` of the decoder's `inputs` score `targets[k][j]`, for each alternative k:
    alternatives share one forward pass.

    Attributes:
        inputs: ids that the model reads (an encoder-decoder's decoder reads).
        first: position whose logits score the first target.
        targets: alternatives, each a list of at most len(inputs) - first ids.
        encoder: what the encoder reads; None for a causal model.
    """

    inputs: list[int]
    first: int
    targets: list[list[int]]
    encoder: list[int] | None = None


def refuse_masked(model: PreTrainedModel) -> None:
    """Raises UnsupportedError for a model whose tokens see later tokens."""
    kinds = [kind.__name__ for kind in type(model).__mro__]
    masked = any(name.endswith("ForMaskedLM") for name in kinds)
    # BertLMHeadModel and its kin attend in both directions until told that they are decoders.
    both_ways = (
        model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not model.config.is_encoder_decoder
        and model.config.to_dict().get("is_decoder") is False
    )
    if masked or both_ways:
        raise UnsupportedError(
            f"{kinds[0]} predicts masked tokens from both sides: it has no probability of the next token given "
            "those before, so perplexity and label likelihood are not defined",
            hint="evaluate a causal or an encoder-decoder model"
            + ("" if masked else "; or set is_decoder=True"),
        )


def context_window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens the model can read at once: its number of positions less those of soft tokens in front, else the
    tokenizer's limit, else 1024."""
    room = free_positions(model)
    if room is not None:
        return room
    limit = int(tokenizer.model_max_length)  # relative positions or a state space: no limit in the config
    return limit if limit < _SANE_LENGTH else _DEFAULT_WINDOW


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text's first token, so that it can be scored."""
    prefix, _ = special_frame(tokenizer)
    if prefix:
        return prefix
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token)]
    raise UnsupportedError("the tokenizer has neither BOS nor EOS, so a text's first token has no context")


def decoder_start(model: PreTrainedModel) -> int:
    """The id that an encoder-decoder's decoder reads first."""
    if model.generation_config is not None and model.generation_config.decoder_start_token_id is not None:
        return int(model.generation_config.decoder_start_token_id)
    raise UnsupportedError(
        "generation_config.decoder_start_token_id is not set, so decoding has no first token"
    )


def windows(length: int, *, size: int, stride: int, start: int = 1) -> list[tuple[int, int, int]]:
    """Cut a sequence of `length` ids so that each id from `start` on is scored exactly once.

    Returns:
        Triples (begin, scored, end): the model reads ids[begin:end], which predict ids[begin+1:end+1]; of those
        the ids scored..end (inclusive) count. A window reads at most `size` ids. The first is filled to the
        brim; each later one moves on by `stride`, so that its scored ids see at least size - stride + 1 ids
        (or all there are).
    """
    if size < 1 or not 1 <= stride <= size:
        raise DataError(f"stride {stride} and window {size}: 1 <= stride <= window must hold")
    if start < 1:
        raise DataError("the first id has no context to be scored in")
    cuts: list[tuple[int, int, int]] = []
    scored, last = start, length - 1
    while scored <= last:
        end = min(last, max(size, scored + stride - 1))
        cuts.append((max(0, end - size), scored, end))
        scored = end + 1
    return cuts


def score_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> list[list[Tensor]]:
    """Score every request, as `read_requests`, which has the arguments.

    Returns:
        For each request, in the order given, one tensor [len(target)] of natural-log probabilities, float64 on
        the CPU, for each alternative. They are taken in float32.
    """

    def read(logits: Tensor, request: Request) -> list[Tensor]:
        return [_gather(logits, request.first, target) for target in request.targets]

    return read_requests(
        model,
        requests,
        read,
        batch_size=batch_size,
        pad_token_id=pad_token_id,
        device=device,
        progress=progress,
    )


def read_requests(
    model: PreTrainedModel,
    requests: Sequence[Request],
    read: Callable[[Tensor, Request], _Read],
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> list[_Read]:
    """What `read` takes from the logits [T, V] of each request.

    Longest first, right-padded.

    Args:
        pad_token_id: fills the padding; any id serves, since the mask hides it.
        device: where the batches go; the model's own when None.

    Returns:
        One result for each request, in the order given.

    Raises:
        PeftxError: the model returns NaN, or logits of another length than its input.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; at least 1")
    place = torch.device(device) if device is not None else next((p.device for p in model.parameters()), None)
    order = sorted(
        range(len(requests)), key=lambda i: -len(requests[i].inputs) - len(requests[i].encoder or ())
    )
    found: dict[int, _Read] = {}
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = [requests[index] for index in chosen]
            logits = _logits(model, batch, pad_token_id, place)  # [B, T, V]
            for row, index in enumerate(chosen):
                found[index] = read(logits[row], batch[row])
            if progress is not None:
                progress(len(found), len(requests))
    return [found[index] for index in range(len(requests))]


def _padded(rows: list[list[int]], pad: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [B, T]"""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def _logits(model: PreTrainedModel, batch: list[Request], pad: int, device: torch.device | None) -> Tensor:
    ids, mask = _padded([request.inputs for request in batch], pad, device)
    if batch[0].encoder is None:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    else:
        encoder_ids, encoder_mask = _padded([list(request.encoder or ()) for request in batch], pad, device)
        # The decoder is causal and the padding stands right, so it needs no mask of its own.
        logits = model(input_ids=encoder_ids, attention_mask=encoder_mask, decoder_input_ids=ids).logits
    if logits.shape[:2] != ids.shape:
        raise ModelError(
            f"the model read {tuple(ids.shape)} tokens and returned logits for {tuple(logits.shape[:2])}"
        )
    return logits


def _gather(logits: Tensor, first: int, target: list[int]) -> Tensor:
    """log p(target_j) = logits[first + j, target_j] - logsumexp(logits[first + j]);  logits: [T, V] -> [len]"""
    used = logits[first : first + len(target)].float()
    ids = torch.tensor(target, device=used.device)
    logs = used.gather(1, ids[:, None])[:, 0] - used.logsumexp(-1)
    logs = logs.cpu().double()
    if logs.isnan().any():
        at = int(logs.isnan().nonzero()[0])
        raise ModelError(f"the model's prediction of token {target[at]} at position {first + at} is NaN")
    return logs
