"""What a row must hold, in each format: the rule that files, programs and plugins are held to, told without a library.

What is no text is refused with its place; nothing is turned into text but labels that are whole numbers (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from peftx_spec.errors import DataError, nearest
from peftx_spec.models import FORMATS

ROLES: Final = ("system", "user", "assistant", "tool")
MESSAGE: Final = frozenset({"role", "content"})
TOOLS: Final = frozenset({"tool_calls", "tool_call_id", "name"})
"""Further keys of a message, where tools are called."""
TURNS_ARE: Final = (
    "conversations are of format messages: arrays in both prompt and completion, or in messages"
)
"""Where conversations go that stand in columns of texts."""
LEARNED: Final = {"text": "text", "prompt-completion": "completion", "classification": "label"}
"""What is learned of a row, by its format."""
LEAVE: Final = "leave the row out, or say in it what is to be learned"
LISTED: Final = 5
"""Places of refused rows that a message lists."""


def json_type(value: object) -> str:
    """A value's type in the words of JSON: `an object`, `a string`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    words: dict[type, str] = {
        str: "a string",
        int: "a number",
        float: "a number",
        tuple: "an array",
        list: "an array",
        dict: "an object",
    }
    found = words.get(type(value))
    return found if found is not None else f"a {type(value).__name__}"


def names_of(keys: Iterable[str]) -> str:
    """Keys for a message: quoted, sorted."""
    return ", ".join(repr(key) for key in sorted(keys)) or "(none)"


def require_text(value: object, where: str) -> str:
    """`value`, if it is text. Raises DataError, which names `where`, otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, got {json_type(value)}")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start}, which is no text"
        ) from error
    return value


def check_row(
    row: Mapping[str, object], place: str, format: str, *, columns: Mapping[str, str] | None = None
) -> None:
    """Raises DataError, which names `place`, unless the row holds what its format needs, as text.

    Args:
        row: under our names. columns: our name -> the file's, which a message gives too.
    """
    for key in FORMATS[format]:
        if key not in row:
            needed = ", ".join(FORMATS[format])
            raise DataError(
                f"{place}: no key {key!r}, which format {format!r} needs ({needed}); found {names_of(row)}",
                hint=nearest(key, list(row)) or None,
            )
        value = row[key]
        if key == "messages" or (format == "preference" and isinstance(value, list)):
            check_messages(value, place, key)
            continue
        theirs = (columns or {}).get(key, key)
        where = f"{place}: {theirs!r}" + (f" (our {key!r})" if theirs != key else "")
        if key == "label" and isinstance(value, int):
            raise DataError(
                f"{where} must be a string, got {json_type(value)}",
                hint="labels are texts, or whole numbers from 0 on",
            )
        if isinstance(value, list) and format == "prompt-completion":
            raise DataError(f"{where} must be a string, got an array", hint=TURNS_ARE)
        require_text(value, where)


def check_learned(row: Mapping[str, object], place: str, format: str) -> None:
    """Raises DataError, which names `place`, where a row to train on as it stands has nothing that could be learned,
    whatever the tokenizer. Of rows that `check_row` lets through."""
    name, messages = LEARNED.get(format), row.get("messages")
    if name is not None and row[name] == "":
        raise DataError(f"{place}: the {name} '' has no tokens, so there is nothing to learn", hint=LEAVE)
    if format == "messages" and isinstance(messages, list):
        check_answered([message["role"] for message in messages], place)


def check_answered(roles: Sequence[str], place: str) -> None:
    """Raises DataError, which names `place`, where the assistant says nothing in a conversation to train on."""
    if "assistant" not in roles:
        said = "the conversation has no turn of the assistant, so there is nothing to learn"
        raise DataError(f"{place}: {said}", hint=LEAVE)


def check_messages(messages: object, place: str, name: str = "messages") -> None:
    """Raises DataError, which names `place` and the column, unless these are the messages of a conversation."""
    if not isinstance(messages, list) or not messages:
        got = "an empty array" if messages == [] else json_type(messages)
        raise DataError(f"{place}: '{name}' must be an array of {{role, content}}, got {got}")
    for index, message in enumerate(messages):
        at = f"{place}: {name}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{at} must be an object {{role, content}}, got {json_type(message)}")
        if not MESSAGE <= set(message) <= MESSAGE | TOOLS:
            raise DataError(
                f"{at} must have the keys 'role' and 'content' only; found {names_of(message)}",
                hint=f"where tools are called, {', '.join(sorted(TOOLS))} too",
            )
        if message["content"] is None and message.get("tool_calls"):
            continue
        require_text(message["content"], f"{at}: 'content'")
        role = message["role"]
        if not isinstance(role, str) or not role.strip() or "\n" in role:
            raise DataError(
                f"{at}: 'role' must be a name, got {role!r}", hint=f"{', '.join(ROLES)}, or another speaker"
            )
        if role not in ROLES and (
            near := nearest(role, ROLES)
        ):  # other speakers are the template's or a plugin's to know
            raise DataError(
                f"{at}: role {role!r}; roles are {', '.join(ROLES)}, or other speakers", hint=near
            )


def with_further(first: DataError, further: Sequence[str]) -> DataError:
    """The error of the first row that is refused, which tells where the others stand.

    Args:
        further: places of rows behind it, `train.jsonl:12`.
    """
    if not further:
        return first
    shown = [place.rpartition(":")[2].strip() for place in further[:LISTED]]
    more = f" and {len(further) - LISTED:,} more" if len(further) > LISTED else ""
    count = f"{len(further):,} further row{'s are' if len(further) > 1 else ' is'}"
    return DataError(f"{first.message}; {count} refused too: {', '.join(shown)}{more}", hint=first.hint)
