"""Conversations become text and token ids, with loss on the assistant's turns."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from peftx.engines.data.collate import IGNORE
from peftx.engines.data.encoding import (
    Example,
    completion_ids,
    continuation,
    eos_id,
    following_ids,
    special_frame,
    text_ids,
    without_prefix,
)
from peftx.engines.data.mapped import Lazy
from peftx.engines.data.places import Where
from peftx.errors import DataError, UnsupportedError
from peftx_spec.rows import check_answered
from peftx_spec.shapes import PROMPT_TURNS

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says."""

REFUSALS = (TemplateError, TypeError)
"""What a template raises itself, what is wrong with it, and what its filters say of a thing that they cannot write."""

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool = True,
    tools: list[Any] | None = None,
) -> str:
    """The text that asks for the assistant's next turn after `messages`; without `ask` all up to its last one.

    With a chat template: its rendering with the generation prompt, BOS included (encode it with
    `add_special_tokens=False`). Without: `User: hi`, a line break, `Assistant:`; BOS not included.

    Raises:
        DataError: the chat template refuses the conversation. UnsupportedError: there is none, and it has tools.
    """
    while not ask and messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if tokenizer.chat_template is not None:
        return _render(tokenizer, messages, ask=ask, tools=tools)
    ended = "" if tokenizer.eos_token is None else str(tokenizer.eos_token)
    segments = _plain_segments(messages, ask=ask, tools=tools)
    return "".join(text + ended if learned else text for text, learned in segments)


def messages_encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Mapping[str, object], Where], Example]:
    prefix, _ = special_frame(tokenizer)
    plain = tokenizer.chat_template is None
    marked = not plain and tokenizer.is_fast and GENERATION.search(str(tokenizer.chat_template)) is not None

    def encode(row: Mapping[str, object], where: Where) -> Example:
        messages: Sequence[Mapping[str, Any]] = row["messages"]  # type: ignore[assignment]
        asked = sum(turn["role"] == "assistant" for turn in messages[: prompt_turns(row)])
        if marked:
            return _by_marks(tokenizer, messages, tools_of(row), asked, max_length, prefix, where)
        try:
            segments = list(
                _plain_segments(messages, ask=False, tools=tools_of(row))
                if plain
                else _template_segments(tokenizer, messages, tools_of(row))
            )
        except (DataError, UnsupportedError) as error:
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from error
        if not segments[2 * asked :]:  # two of each of the assistant's turns
            raise DataError(
                f"{where}: the conversation has no turn of the assistant, so there is nothing to learn"
            )
        if plain:
            eos_id(tokenizer)  # refused where there is none
            segments = [
                (text + str(tokenizer.eos_token) if learned else text, learned) for text, learned in segments
            ]
        segments = [(text, learned and at >= 2 * asked) for at, (text, learned) in enumerate(segments)]
        # What stands before the last answer is one piece, as the model is asked for it; the answer goes on from it.
        ids, labels = _asked(tokenizer, segments[:-1])
        answer = completion_ids(tokenizer, segments[-1][0], where)
        if not ends(tokenizer, answer):
            answer.append(eos_id(tokenizer))  # the template ends a turn by the next one's beginning
        ids, labels, last = ids + answer, labels + answer, len(answer)
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


def check_rendered(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], where: Where) -> None:
    """Write a conversation out as it is trained on up to its last answer, without tokenizing it.

    Raises:
        DataError: the assistant says nothing, or the chat template refuses it; names `where`.
    """
    messages, tools = row["messages"], tools_of(row)
    roles = [turn["role"] for turn in messages]
    check_answered(roles, str(where))
    last = len(roles) - 1 - roles[::-1].index("assistant")
    try:
        for end, ask in ((last, True), (last + 1, False)):
            render_messages(tokenizer, messages[:end], ask=ask, tools=tools)
    except (DataError, UnsupportedError) as error:
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from error


def _by_marks(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: list[Any] | None,
    asked: int,
    max_length: int,
    prefix: list[int],
    where: Where,
) -> Example:
    """Labels where the template itself says that the assistant speaks, its first `asked` turns apart."""
    try:
        found = tokenizer.apply_chat_template(
            [_unpacked(m) for m in messages], tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
    except REFUSALS as error:
        raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error
    ids, marks = list(found["input_ids"]), list(found["assistant_masks"])
    turn = accumulate(own > before for before, own in pairwise([0, *marks]))
    mask = [own and number > asked for own, number in zip(marks, turn, strict=True)]
    if not any(mask):
        raise DataError(
            f"{where}: the conversation has no turn of the assistant, so there is nothing to learn"
        )
    end = len(mask) - mask[::-1].index(True)  # what follows the last answer is nobody's to learn
    ids, labels = ids[:end], [i if own else IGNORE for i, own in zip(ids[:end], mask[:end], strict=True)]
    front = prefix if ids[: len(prefix)] == prefix else []
    cut = max(len(front), len(ids) - (max_length - len(front)))
    if all(label == IGNORE for label in labels[cut:]):
        raise DataError(f"{where}: the assistant's last turn does not fit in max_length {max_length}")
    return Example(front + ids[cut:], [IGNORE] * len(front) + labels[cut:])


def _asked(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]]
) -> tuple[list[int], list[int]]:
    """Ids of the segments as one text, and labels of those tokens that lie inside a learned one."""
    text = "".join(piece for piece, _ in segments)
    if not tokenizer.is_fast:  # it does not tell where its tokens stand
        pieces = [(following_ids(tokenizer, piece) if i else text_ids(tokenizer, piece), learned)
                  for i, (piece, learned) in enumerate(segments)]  # fmt: skip
        ids = [i for piece, _ in pieces for i in piece]
        return ids, [i if learned else IGNORE for piece, learned in pieces for i in piece]
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, labels, spans, end = list(found["input_ids"]), [], [], 0
    for piece, learned in segments:
        begin, end = end, end + len(piece)
        if learned:
            spans.append((begin, end))
    at = 0
    for token, (begin, end) in zip(ids, found["offset_mapping"], strict=True):
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        inside = at < len(spans) and spans[at][0] <= begin < end <= spans[at][1]
        labels.append(token if inside else IGNORE)
    return ids, labels


def ends(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> bool:
    """Does an answer end in a token that stands for an end (white space may follow), and not in words."""
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in reversed(answer):
        if token in marks:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def turns(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, object], where: Where
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


def pair_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a row asks, and what it answers, as text: of a conversation the contents of all before the last answer, and
    that answer (empty where there is none); of a preference the better one; of a plain text the text, and nothing."""
    if not isinstance(row.get("prompt", ""), str):
        return "\n".join(map(said, row["prompt"])), "".join(map(said, row["chosen"]))
    if "messages" not in row:
        return row.get("prompt", row.get("text", "")), row.get("completion", row.get("chosen", ""))
    turns = row["messages"]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    texts = [said(turn) for turn in turns]
    return "\n".join(texts[:last]), "".join(texts[last : last + 1])


def pairs_of(rows: Dataset) -> Lazy[tuple[str, str]]:
    """`pair_of` each row, which is read for it each time."""
    return Lazy(len(rows), lambda place: pair_of(rows[place]))


def prompt_turns(row: Mapping[str, Any]) -> int:
    """The turns of a conversation that are asked and not learned."""
    return int(row.get(PROMPT_TURNS) or 0)


def said(turn: Mapping[str, Any]) -> str:
    """The words of a turn, and its calls of tools as JSON."""
    calls = _unpacked(turn).get("tool_calls")
    return str(turn["content"] or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _plain_segments(
    messages: Sequence[Mapping[str, Any]], *, ask: bool, tools: list[Any] | None
) -> Iterator[tuple[str, bool]]:
    """(text, learned?): `User: hi`, line break, `Assistant:` | ` hello` (EOS) | line break, `User: ...`

    With `ask` a last `Assistant:` waits for its turn; without, what follows the last answer is left out.
    """
    if tools or any(_unpacked(message).get("tool_calls") for message in messages):
        raise UnsupportedError(
            "tools go through the tokenizer's chat template, and this model has none",
            hint="take a model with a chat template",
        )
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
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: list[Any] | None = None,
) -> Iterator[tuple[str, bool]]:
    """(text, learned?): what the template adds to ask for a turn, and what it adds for the turn itself."""
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:index], ask=True, tools=tools)
        answered = _render(tokenizer, messages[: index + 1], ask=False, tools=tools)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise UnsupportedError(
                f"the chat template rewrites earlier turns (before messages[{index}]), so the assistant's turns "
                "cannot be told from the rest",
                hint="split the conversation into prompt-completion rows",
            )
        yield asked[len(done) :], False
        yield answered[len(asked) :], True
        done = answered


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool,
    tools: list[Any] | None = None,
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [_unpacked(m) for m in messages], tokenize=False, add_generation_prompt=ask, tools=tools
        )
    except REFUSALS as error:
        raise DataError(
            f"the chat template refuses the conversation: {error}",
            hint="change the row, or set another tokenizer.chat_template",
        ) from error
    return str(rendered)


def _unpacked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: calls of tools as what they are, and nothing that it does not have.

    Raises:
        DataError: a call has arguments that are no JSON.
    """
    found = {name: value for name, value in message.items() if value is not None or name == "content"}
    calls = found.get("tool_calls")
    if calls is not None:
        found["tool_calls"] = list(map(_called, json.loads(calls) if isinstance(calls, str) else calls))
    return found


def _called(call: Any) -> Any:
    """A call with its arguments as an object, which templates write as JSON: those of OpenAI's form are that text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise DataError(f"tool_calls: the arguments are no JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def tools_of(row: Mapping[str, object]) -> list[Any] | None:
    """The tools that a conversation may call, of a row's column `tools`."""
    tools = row.get("tools")
    found = json.loads(tools) if isinstance(tools, str) and tools else tools
    return list(found) if isinstance(found, Sequence) and found else None
