"""Rows as people have them: columns of well-known data sets, and what they are in ours.

    {prompt, response}, {question, answer}, {input, output}    prompt-completion
    {instruction, output}, with an `input` or without          prompt-completion (Alpaca)
    {conversations: [{from, value}]}                           messages (ShareGPT; role and content do as well)
    {prompt: [{role, content}], completion: [...]}             messages, of which the completion is learned (TRL)
    {chosen, rejected}                                         preference: what both begin with is the prompt
    {prompt, chosen: [{role, content}], rejected: [...]}       preference of turns; a prompt that is text is the user's
    {conversations, chosen: {from, value}, rejected: {...}}    the same (LLaMA-Factory)

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
    unasked = format is None and "messages" not in columns
    if (unasked or format == COMPARED.format) and columns >= COMPARED.needs and _has_turns(row):
        return COMPARED
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


def _turn(turn: Mapping[str, Any], index: int, name: str = "conversations") -> dict[str, Any]:
    if turn.keys() >= {"role", "content"}:
        return dict(turn)
    who, what = (
        next((n for n in names if n in turn), None) for names in (("from", "role"), ("value", "content"))
    )
    if who is None or what is None:
        raise DataError(
            f"{name}[{index}] must have the keys 'from' and 'value', or 'role' and 'content'; "
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
    """What both answers begin with, up to the last turn where they are dialogues of text, is the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise DataError("'chosen' and 'rejected' must be texts, or arrays of {role, content}")
    shared = "".join(
        a for a, _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
    )
    end = shared.rfind(TURN) + len(TURN) if TURN in shared else shared.rfind(" ") + 1
    if not shared[:end].strip():
        raise DataError(
            "'chosen' and 'rejected' begin with nothing in common that could be the prompt",
            hint="give the prompt a column of its own",
        )
    rest = {name: value for name, value in row.items() if name not in FORMATS["preference"]}
    return {"prompt": shared[:end], "chosen": chosen[end:], "rejected": rejected[end:], **rest}


def _has_turns(row: Row) -> bool:
    """Are answers, or what they answer, turns of a conversation."""
    return any(isinstance(row.get(name), (list, Mapping)) for name in FORMATS["preference"])


def _compared(row: Row) -> dict[str, Any]:
    """Arrays of turns: all up to the answers, and an answer in each of the others.

    What was asked stands in a column of its own (an array, or a text, which is the user's), or before both answers.
    """
    if not _has_turns(row):
        raise DataError("'chosen' and 'rejected' must be arrays of {role, content}, as in the first row")
    if row.get("tools"):
        raise DataError(
            "'tools' are for conversations in 'messages'", hint="rows of preferences are told without them"
        )
    given = row.get("prompt", row.get("conversations"))
    asked = [] if given is None else _turns(given, "user", "prompt")
    whole = []
    for name in ("chosen", "rejected"):
        turns = _turns(row[name], "assistant", name)
        told = turns[0]["role"] != "assistant"  # what was asked stands here
        if told and not _said(asked) <= _said(turns):
            raise DataError(f"'{name}' has turns of its own before the answer, and 'prompt' says others")
        whole.append(turns if told else [*asked, *turns])
    (*prompt, chosen), (*other, rejected) = whole
    if prompt != other or not prompt or {chosen["role"], rejected["role"]} != {"assistant"}:
        raise DataError(
            "'chosen' and 'rejected' must answer the same turns with one of the assistant each",
            hint="what was asked stands in 'prompt', or before the answer in both",
        )
    rest = {n: x for n, x in row.items() if n not in (*FORMATS["preference"], "conversations")}
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], **rest}


def _turns(given: Any, speaker: str, name: str) -> list[dict[str, Any]]:
    """An array of turns, one of them alone, or a text of the speaker."""
    if isinstance(given, str):
        return [{"role": speaker, "content": given}]
    turns = [given] if isinstance(given, Mapping) else given
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"'{name}' must be a text, or an array of {{role, content}}")
    return [_turn(turn, index, name) for index, turn in enumerate(turns)]


def _said(turns: Sequence[Row]) -> set[str]:
    return {str(turn["content"]).strip() for turn in turns}


SPOKEN = Shape(frozenset({"prompt", "completion"}), "messages", _spoken, "prompt and completion of turns")
COMPARED = Shape(
    frozenset({"chosen", "rejected"}), "preference", _compared, "prompt, chosen and rejected of turns"
)
SHAPES = (
    Shape(frozenset({"conversations"}), "messages", _sharegpt, "conversations (ShareGPT)"),
    Shape(
        frozenset({"instruction", "output"}), "prompt-completion", _alpaca, "instruction and output (Alpaca)"
    ),
    Shape(frozenset({"chosen", "rejected"}), "preference", _preference, "chosen and rejected"),
    *(_pair(*names) for names in PAIRS),
)


def as_written(row: Row) -> dict[str, Any]:
    """A row as a table of rows can hold it: calls of tools, and the tools that may be called, are JSON as text, since a
    table would give every call the arguments of all others; a label that is a whole number is its digits, as in CSV."""
    packed: dict[str, Any] = dict(row)
    label = row.get("label")
    if "text" in row and isinstance(label, int) and not isinstance(label, bool) and label >= 0:
        packed["label"] = str(label)
    if row.get("tools") is not None and not isinstance(row["tools"], str):
        packed["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    for name in ("messages", *FORMATS["preference"]):
        if isinstance(messages := row.get(name), list):
            packed[name] = [
                {**m, "tool_calls": json.dumps(m["tool_calls"], ensure_ascii=False)}
                if isinstance(m, Mapping) and isinstance(m.get("tool_calls"), list)
                else m
                for m in messages
            ]
    return packed


def rows_in(value: object) -> tuple[str, list[object]] | None:
    """Of an object that is no row itself, such as `{"version": 2, "data": [{...}, ...]}`, name and value of the one
    array of objects in it; None where there is none, or several."""
    if not isinstance(value, Mapping) or _is_row(value):
        return None
    found = [(str(name), rows) for name, rows in value.items() if isinstance(rows, list) and _objects(rows)]
    return found[0] if len(found) == 1 else None


def _is_row(value: Row) -> bool:
    return shape_of(value) is not None or any(value.keys() >= set(columns) for columns in FORMATS.values())


def _objects(rows: list[object]) -> bool:
    return bool(rows) and all(isinstance(row, Mapping) for row in rows)


def class_names(metadata: Mapping[bytes, bytes] | None, column: str | None) -> list[str] | None:
    """What Hugging Face's `datasets` calls the numbers of a column (`ClassLabel`), by a Parquet schema's metadata."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return None if column is None else list(features[column]["names"])
    except (ValueError, KeyError, TypeError):  # no such column, or a file of another program
        return None


def named(row: dict[str, object], column: str | None, names: Sequence[str] | None) -> dict[str, object]:
    """The row with the name of its class; what has none, as -1 of a row that nobody labelled, is null."""
    if column is not None and names is not None and isinstance(number := row.get(column), int):
        row[column] = names[number] if 0 <= number < len(names) else None
    return row


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
