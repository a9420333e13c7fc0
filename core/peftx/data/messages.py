"""Conversations become text and token ids, with loss on the assistant's turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from peftx.data.collate import IGNORE
from peftx.data.encoding import (
    Example,
    completion_ids,
    continuation,
    eos_id,
    special_frame,
    text_ids,
    without_prefix,
)
from peftx.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, ask: bool = True
) -> str:
    """The text that asks for the assistant's next turn after `messages`; without `ask` all up to its last one.

    With a chat template: its rendering with the generation prompt, BOS included (encode it with
    `add_special_tokens=False`). Without: `User: hi`, a line break, `Assistant:`; BOS not included.
    """
    while not ask and messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if tokenizer.chat_template is not None:
        return _render(tokenizer, messages, ask=ask)
    ended = "" if tokenizer.eos_token is None else str(tokenizer.eos_token)
    segments = _plain_segments(messages, ask=ask)
    return "".join(text + ended if learned else text for text, learned in segments)


def messages_encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Mapping[str, object], str], Example]:
    prefix, _ = special_frame(tokenizer)
    plain = tokenizer.chat_template is None

    def encode(row: Mapping[str, object], where: str) -> Example:
        messages: Sequence[Mapping[str, str]] = row["messages"]  # type: ignore[assignment]
        segments = (
            _plain_segments(messages, ask=False) if plain else _template_segments(tokenizer, messages, where)
        )
        ids: list[int] = []
        labels: list[int] = []
        last = 0  # tokens of the assistant's last turn
        for text, learned in segments:
            if learned:
                piece = [*completion_ids(tokenizer, text, where), *([eos_id(tokenizer)] if plain else [])]
                labels += piece
                last = len(piece)
            else:
                piece = text_ids(tokenizer, text)
                labels += [IGNORE] * len(piece)
            ids += piece
        if not last:
            raise DataError(
                f"{where}: the conversation has no turn of the assistant, so there is nothing to learn"
            )
        # A chat template writes BOS itself; one that does not is for a model that has none.
        has_prefix = plain or ids[: len(prefix)] == prefix
        front = prefix if has_prefix else []
        body = without_prefix(ids, front)
        labels = labels[len(ids) - len(body) :]
        room = max_length - len(front)
        if last > room:
            raise DataError(
                f"{where}: the assistant's last turn has {last} tokens and does not fit in max_length {max_length}"
            )
        cut = max(0, len(body) - room)
        return Example(front + body[cut:], [IGNORE] * len(front) + labels[cut:])

    return encode


def turns(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, object], where: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """A conversation as it is trained on: ids, and where each turn of the assistant begins and ends (no EOS)."""
    example = messages_encoder(tokenizer, sys.maxsize)(row, where)
    ids, labels = example.input_ids, example.labels
    found: list[tuple[int, int]] = []
    for index, label in enumerate(labels):
        if label == IGNORE:
            continue
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return ids, [(max(1, begin), end - (ids[end - 1] == tokenizer.eos_token_id)) for begin, end in found]


def _plain_segments(messages: Sequence[Mapping[str, str]], *, ask: bool) -> Iterator[tuple[str, bool]]:
    """(text, learned?): `User: hi`, line break, `Assistant:` | ` hello` (EOS) | line break, `User: ...`

    With `ask` a last `Assistant:` waits for its turn; without, what follows the last answer is left out.
    """
    asked = ""
    for message in messages:
        if message["role"] == "assistant":
            yield asked + "Assistant:", False
            yield continuation("Assistant:", message["content"]), True
            asked = "\n"
        else:
            asked += f"{message['role'].capitalize()}: {message['content']}\n"
    if ask:
        yield asked + "Assistant:", False


def _template_segments(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], where: str
) -> Iterator[tuple[str, bool]]:
    """(text, learned?): what the template adds to ask for a turn, and what it adds for the turn itself."""
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:index], ask=True)
        answered = _render(tokenizer, messages[: index + 1], ask=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise UnsupportedError(
                f"{where}: the chat template rewrites earlier turns (before messages[{index}]), so the "
                "assistant's turns cannot be told from the rest",
                hint="split the conversation into prompt-completion rows",
            )
        yield asked[len(done) :], False
        yield answered[len(asked) :], True
        done = answered


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, ask: bool) -> str:
    rendered = tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=ask
    )
    return str(rendered)
