"""A prompt and what follows it become token ids: each a text, or each an array of turns.

Of turns the text is that of the tokenizer's chat template, as `messages.py` renders it: the prompt is what asks for the
assistant's next turn, the answer what the template writes behind that, which ends as the template ends a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftx.engines.data.collate import IGNORE
from peftx.engines.data.encoding import (
    Example,
    completion_ids,
    continuation,
    eos_id,
    join_pair,
    prompt_ids,
    special_frame,
    text_ids,
    too_long,
    without_prefix,
)
from peftx.engines.data.messages import ends, render_messages
from peftx.engines.data.places import Where
from peftx.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Mapping[str, Any]]
"""Of a conversation: {role, content} each."""


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Turns,
    completion: str | Turns,
    *,
    max_length: int,
    where: Where = "the row",
) -> Example:
    """BOS prompt completion EOS, with loss on the completion and EOS; the prompt is cut at its left to fit.

    Args:
        prompt, completion: texts, or turns: all up to an answer, and the answer, one turn of the assistant.

    Raises:
        DataError: the completion has no tokens, or does not fit in `max_length` with BOS and EOS; names `where`.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        prefix, _ = special_frame(tokenizer)
        return join_pair(tokenizer, prefix, prompt, completion, max_length, where)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"{where}: prompt and completion must both be texts, or both arrays of turns")
    frame, head = opening_of(tokenizer, prompt)
    tail = _answer(tokenizer, prompt, completion, where)
    room = max_length - len(frame) - len(tail)
    if room < 0:
        raise too_long(where, tail, frame, max_length)
    head = frame + head[max(0, len(head) - room) :]
    return Example(head + tail, [IGNORE] * len(head) + tail)


def opening_of(tokenizer: PreTrainedTokenizerBase, prompt: str | Turns) -> tuple[list[int], list[int]]:
    """What stands before a completion: BOS (where there is one), which no cut takes, and the ids behind it."""
    prefix, _ = special_frame(tokenizer)
    if isinstance(prompt, str):
        return prefix, prompt_ids(tokenizer, prompt)[len(prefix) :]
    ids = text_ids(tokenizer, render_messages(tokenizer, prompt))
    # A chat template writes BOS itself; one that does not is for a model that has none.
    frame = prefix if tokenizer.chat_template is None or ids[: len(prefix)] == prefix else []
    return frame, without_prefix(ids, frame)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: Turns, completion: Turns, where: Where) -> list[int]:
    """Ids of one turn of the assistant, and of its end."""
    if [turn["role"] for turn in completion] != ["assistant"]:
        raise DataError(f"{where}: a completion of turns is one turn of the assistant")
    if tokenizer.chat_template is None:
        text = continuation("Assistant:", completion[0]["content"])
        return [*completion_ids(tokenizer, text, where), eos_id(tokenizer)]
    asked = render_messages(tokenizer, prompt)
    told = render_messages(tokenizer, [*prompt, *completion], ask=False)
    if not told.startswith(asked):
        raise UnsupportedError(f"{where}: the chat template writes a prompt otherwise once it is answered")
    ids = completion_ids(tokenizer, told[len(asked) :], where)
    return ids if ends(tokenizer, ids) else [*ids, eos_id(tokenizer)]
