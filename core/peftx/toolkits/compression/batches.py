"""Calibration text -> batches of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftx.engines.data import read_dataset, render_messages, text_ids
from peftx.engines.models import asset_path
from peftx.errors import DataError
from peftx.kernel.positions import free_positions
from peftx.toolkits.compression.calibration import Calibration
from peftx_spec.rows import require_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx.kernel.stack import Stack


def calibration(
    stack: Stack,
    data: str | Path | Sequence[str | Mapping[str, Any]] | None,
    *,
    samples: int,
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """At most `samples` sequences of `length` tokens (or as many as the model has positions for), one a batch, in the
    order of the text; short text gives fewer.

    Args:
        data: a text file, texts, rows of any format, or None for no batches. progress: see `Calibration`.

    Raises:
        DataError: the text gives no sequence.
    """
    if data is None:
        return Calibration([])
    if isinstance(data, str | Path):
        texts = calibration_texts(read_dataset(asset_path(data)), stack.tokenizer)
    else:
        if isinstance(data, Mapping):
            raise DataError("one row is no list of texts", hint="[row]")
        texts = [
            _text_of(one, stack.tokenizer) if isinstance(one, Mapping)
            else require_text(one, f"text {index} (counting from 0)")
            for index, one in enumerate(data)
        ]  # fmt: skip
    tokenizer = stack.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = [i for text in texts for i in text_ids(tokenizer, text)]
    room = min(length, free_positions(stack.model) or length) - len(start)
    pieces = [stream[i : i + room] for i in range(0, len(stream), room)][:samples]
    if len(pieces) > 1 and len(pieces[-1]) < room // 2:
        pieces.pop()
    if not pieces or not pieces[0]:
        raise DataError("the calibration data holds no text")
    device = stack.model.device
    batches = [{"input_ids": torch.tensor([start + piece], device=device)} for piece in pieces]
    return Calibration(batches, progress=progress)


def calibration_texts(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of rows of any format; conversations as they are trained on."""
    return [_text_of(row, tokenizer) for row in rows]


def _text_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if "text" in row:
        return str(row["text"])
    if isinstance(row.get("prompt"), list):
        return render_messages(tokenizer, [*row["prompt"], *row["chosen"]], ask=False)
    if "prompt" in row:
        return f"{row['prompt']} {row.get('completion', row.get('chosen', ''))}"
    if "messages" in row:
        return render_messages(tokenizer, row["messages"], ask=False)
    raise DataError(f"calibration rows need 'text', 'prompt' or 'messages'; found {', '.join(map(str, row))}")
