"""Examples as tokens that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peftx.engines.data import CLASS_INDEX, IGNORE, Collator
from peftx.engines.training.examples import mask_of
from peftx.kernel.calls import columns_of, own_lengths_of
from peftx.kernel.objective import pad_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx.previewing.found import Preview


@dataclass(frozen=True)
class Token:
    """One place of an example: what stands there, whether it counts in the loss, and whether it is no text."""

    id: int
    text: str
    labelled: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One example of a batch.

    Attributes:
        number: its place among the examples, from 0. tokens: of `input_ids`. target: of `labels`, where a decoder of
            its own writes them. pads: behind it, up to the longest of those shown. label: of the whole example: its
            class. columns: what plugins put beside it.
    """

    number: int
    tokens: list[Token]
    target: list[Token]
    pads: int
    label: str
    columns: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def batch_of(found: Preview, count: int) -> dict[str, Any]:
    """The first examples as training would collate them, tokens hidden as in its first step; int64 [count, T]."""
    stack = found.stack
    collate = Collator(
        pad_of(stack.model, stack.tokenizer), encoder_decoder=found.two_sided,
        pad_values=dict.fromkeys(columns_of(stack.model), 0), own_lengths=own_lengths_of(stack.model),
    )  # fmt: skip
    batch = collate([found.examples[n] for n in range(min(count, len(found.examples)))])
    masks = mask_of(stack, found.rows, found.seed)
    return batch if masks is None else masks(batch, 0, 0)


def shown(found: Preview, count: int) -> list[Shown]:
    """The first examples."""
    if not count:
        return []
    batch, tokenizer = batch_of(found, count), found.stack.tokenizer
    special = set(tokenizer.all_special_ids)
    examples = []
    for n, row in enumerate(batch["input_ids"].tolist()):
        length = len(found.examples[n]["input_ids"])
        marks, label = _marks(batch, n, len(row), found.names, two_sided=found.two_sided)
        tokens = [_token(tokenizer, i, marked, special) for i, marked in zip(row, marks, strict=True)]
        written = [i for i in batch["labels"][n].tolist() if i != IGNORE] if found.two_sided else []
        columns = {
            k: v for k, v in found.examples[n].items() if k not in ("input_ids", "labels", CLASS_INDEX)
        }
        examples.append(
            Shown(
                n,
                tokens[:length],
                [_token(tokenizer, i, True, special) for i in written],
                len(row) - length,
                label,
                columns,
            )
        )
    return examples


def _marks(
    batch: dict[str, Any], n: int, length: int, names: Sequence[str], *, two_sided: bool
) -> tuple[list[bool], str]:
    """Which of a row's tokens count in the loss, and the row's class."""
    values = batch.get(CLASS_INDEX, batch["labels"])[n].tolist()
    if isinstance(values, list):
        return [False] * length if two_sided else [value != IGNORE for value in values], ""
    known = isinstance(values, int) and 0 <= values < len(names)
    return [False] * length, names[values] if known else f"{values:g}"


def _token(
    tokenizer: PreTrainedTokenizerBase, id: int, labelled: bool, special: Sequence[int] | set[int]
) -> Token:
    return Token(id, token_text(tokenizer, id), labelled, id in special)


def token_text(tokenizer: PreTrainedTokenizerBase, id: int) -> str:
    """What a token adds to a text; where it is a part of a character, its name in the vocabulary."""
    piece = tokenizer.convert_ids_to_tokens(id)
    if piece is None:
        return f"<no token {id}>"
    text = tokenizer.decode([id], clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:
        return str(piece)
    # SentencePiece's mark of a blank, which decoding takes off the first token of a text.
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else str(text)
