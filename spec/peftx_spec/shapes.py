"""Rows as people have them: columns of well-known data sets, and what they are in ours.

    {prompt, response}, {question, answer}, {input, output}    prompt-completion
    {instruction, output}, with an `input` or without          prompt-completion (Alpaca)
    {conversations: [{from, value}]}                           messages (ShareGPT; role and content do as well)
    {prompt: [{role, content}], completion: [...]}             messages, of which the completion is learned (TRL)
    {chosen, rejected}                                         preference: what both begin with is the prompt

Columns that a format has by itself are never read in another way.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

from peftx_spec.errors import DataError
from peftx_spec.models import FORMATS

Row = Mapping[str, Any]
PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("instruction", "response"),
    ("input", "output"),
)
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
PROMPT_TURNS = "prompt_turns"
"""Column of a conversation: so many turns, from the first, are asked and not learned."""
IN_NAMES = "'_-.()[]{}"
"""Signs that stand inside a column's name."""
BEGIN = 2**16
"""Characters of a table that tell its delimiter."""
TURN = "\n\nAssistant:"
"""Behind it in dialogues of plain text (Anthropic's HH) comes an answer."""


class Shape(NamedTuple):
    """One way to lay out rows."""

    needs: frozenset[str]
    format: str
    convert: Callable[[Row], dict[str, Any]]
    """A row in our columns; raises PeftxError where it is not laid out so after all."""
    named: str


def shape_of(row: Row, format: str | None = None) -> Shape | None:
    """The layout that the columns of this row are known for; None where they are a format's own, or nobody's.

    Args:
        format: that is asked for, whatever else the columns fit.
    """
    columns = set(row)
    if format in (None, SPOKEN.format) and all(isinstance(row.get(name), list) for name in SPOKEN.needs):
        return SPOKEN
    asked = FORMATS.values() if format is None else [FORMATS[format]]
    if any(columns >= set(own) for own in asked):
        return None
    fitting = (shape for shape in SHAPES if columns >= shape.needs)
    return next((shape for shape in fitting if format in (None, shape.format)), None)


def _pair(prompt: str, completion: str) -> Shape:
    def convert(row: Row) -> dict[str, Any]:
        rest = {name: value for name, value in row.items() if name not in (prompt, completion)}
        return {"prompt": row[prompt], "completion": row[completion], **rest}

    return Shape(frozenset({prompt, completion}), "prompt-completion", convert, f"{prompt} and {completion}")


def _alpaca(row: Row) -> dict[str, Any]:
    """The instruction, and behind an empty line the input that it is about."""
    rest = {name: value for name, value in row.items() if name not in ("instruction", "input", "output")}
    about = row.get("input")
    prompt = f"{row['instruction']}\n\n{about}" if about else row["instruction"]
    return {"prompt": prompt, "completion": row["output"], **rest}


def _sharegpt(row: Row) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name != "conversations"}
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("'conversations' must be an array of {from, value}")
    return {"messages": [_turn(turn, index) for index, turn in enumerate(turns)], **rest}


def _turn(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    if turn.keys() >= {"role", "content"}:
        return dict(turn)
    who, what = (
        next((n for n in names if n in turn), None) for names in (("from", "role"), ("value", "content"))
    )
    if who is None or what is None:
        raise DataError(
            f"conversations[{index}] must have the keys 'from' and 'value', or 'role' and 'content'; "
            f"found {sorted(turn)}"
        )
    speaker = turn[who]
    return {
        "role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker,
        "content": turn[what],
    }


def _spoken(row: Row) -> dict[str, Any]:
    """One conversation, and how many turns of it are the prompt."""
    prompt, completion = row["prompt"], row["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError("'prompt' and 'completion' must be arrays of {role, content}, as in the first row")
    rest = {name: value for name, value in row.items() if name not in SPOKEN.needs}
    return {"messages": [*prompt, *completion], PROMPT_TURNS: len(prompt), **rest}


def _preference(row: Row) -> dict[str, Any]:
    """What both answers begin with is the prompt: of texts up to the last turn, of conversations all but the last."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = "".join(
            a for a, _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
        )
        end = shared.rfind(TURN) + len(TURN) if TURN in shared else shared.rfind(" ") + 1
        if not shared[:end].strip():
            raise DataError(
                "'chosen' and 'rejected' begin with nothing in common that could be the prompt",
                hint="give the prompt a column of its own",
            )
        texts = {"prompt": shared[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    else:
        texts = _asked(chosen, rejected)
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected", "prompt")}
    return {**texts, **rest}


def _asked(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Of two conversations of one question and one answer each."""
    for messages in (chosen, rejected):
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
            raise DataError("'chosen' and 'rejected' must be texts, or arrays of {role, content}")
        if [m.get("role") for m in messages] != ["user", "assistant"]:
            raise DataError(
                "'chosen' and 'rejected' are read as one turn of the user and one of the assistant",
                hint="longer conversations: columns prompt, chosen and rejected, as text",
            )
    if chosen[0]["content"] != rejected[0]["content"]:
        raise DataError("'chosen' and 'rejected' answer different questions")
    return {
        "prompt": chosen[0]["content"], "chosen": chosen[1]["content"], "rejected": rejected[1]["content"]
    }  # fmt: skip


SPOKEN = Shape(frozenset({"prompt", "completion"}), "messages", _spoken, "prompt and completion of turns")
SHAPES = (
    Shape(frozenset({"conversations"}), "messages", _sharegpt, "conversations (ShareGPT)"),
    Shape(
        frozenset({"instruction", "output"}), "prompt-completion", _alpaca, "instruction and output (Alpaca)"
    ),
    Shape(frozenset({"chosen", "rejected"}), "preference", _preference, "chosen and rejected"),
    *(_pair(*names) for names in PAIRS),
)


def with_tools(row: Row) -> dict[str, Any]:
    """A conversation whose calls of tools, and the tools that it may call, are JSON as text: a table of rows would give
    every call the arguments of all others."""
    packed: dict[str, Any] = dict(row)
    if row.get("tools") is not None and not isinstance(row["tools"], str):
        packed["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    messages = row.get("messages")
    if isinstance(messages, list):
        packed["messages"] = [
            {**m, "tool_calls": json.dumps(m["tool_calls"], ensure_ascii=False)}
            if isinstance(m, Mapping) and isinstance(m.get("tool_calls"), list)
            else m
            for m in messages
        ]
    return packed


def delimiter_of(text: str) -> str:
    """What stands between the columns of a table: of comma, semicolon, tab and bar the one that its first line, quotes
    left out, has most of; else a sign between its words that its first two rows have equally many of; else a comma."""
    text = text.lstrip("\n\r")
    head = "".join(text.partition("\n")[0].split('"')[::2])
    usual = max(",;\t|", key=head.count)
    if usual in head:
        return usual
    signs = [s for s in dict.fromkeys(head) if not (s.isalnum() or s.isspace() or s in IN_NAMES)]
    signs = [s for s in signs if f" {s}" not in head and f"{s} " not in head]
    return next((s for s in sorted(signs, key=head.count, reverse=True) if _even(text, s)), ",")


def _even(text: str, delimiter: str) -> bool:
    """Have the first two rows as many cells."""
    rows = csv.reader(io.StringIO(text[:BEGIN], newline=""), delimiter=delimiter)
    return len({len(cells) for cells in islice(filter(None, rows), 2)}) == 1
