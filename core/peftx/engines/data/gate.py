"""The one gate that rows come through, from files, from Python, and from plugins that rewrite them.

What is no text is refused here, with its place; nothing is turned into text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.compute as compute

from peftx.engines.data.files import json_type
from peftx.errors import DataError, nearest
from peftx_spec import models as spec

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = spec.FORMATS
FORMATS: Final = tuple(COLUMNS)
ROLES: Final = ("system", "user", "assistant", "tool")
MESSAGE: Final = frozenset({"role", "content"})
TOOLS: Final = frozenset({"tool_calls", "tool_call_id", "name"})
"""Further keys of a message, where tools are called."""
_TEXTS: Final = frozenset(name for names in COLUMNS.values() for name in names) - {"messages"}


def require_text(value: object, where: str) -> str:
    """`value`, if it is text. Raises DataError, which names `where`, otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, got {json_type(value)}")
    _check_encodes(value, where)
    return value


def check_item(item: object, where: str) -> None:
    """Raises DataError unless `item` is a text, or a row whose columns of known names hold what they should."""
    if not isinstance(item, Mapping):
        require_text(item, where)
        return
    for name in item.keys() & _TEXTS:
        require_text(item[name], f"{where}: {name!r}")
    if "messages" in item:
        _check_messages(item["messages"], where)


def check_rows(rows: Dataset, format: str) -> None:
    """Raises DataError, which names the row, unless all rows hold what their format needs. Whole columns are looked at
    first, in Arrow; rows one by one only where a column is not as it should be."""
    if format not in COLUMNS:
        return
    table = rows.with_format("arrow")
    for name in COLUMNS[format]:
        if name not in rows.column_names or not _is_clean(table[name][:], name):
            for index, row in enumerate(rows):
                check_row(row, f"row {index} (counting from 0)", format)


def _is_clean(column: pa.ChunkedArray, name: str) -> bool:
    column = pa.chunked_array([column]) if isinstance(column, pa.Array) else column
    if name != "messages":
        return bool((pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
                    and not column.null_count)  # fmt: skip
    if not (pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)):
        return False
    if {column.type.value_type.field(i).name for i in range(column.type.value_type.num_fields)} != {
        "role",
        "content",
    }:
        return False
    if column.null_count or compute.any(compute.equal(compute.list_value_length(column), 0)).as_py():
        return False
    for chunk in column.chunks:
        messages = chunk.flatten()
        role, content = (messages.field(part) for part in ("role", "content"))
        texts = all(pa.types.is_string(part.type) and not part.null_count for part in (role, content))
        if messages.null_count or not texts:
            return False
        if not set(compute.unique(role).to_pylist()) <= set(ROLES):
            return False  # or other speakers: looked at one by one
    return True


def names_of(keys: set[str]) -> str:
    """Keys for a message: quoted, sorted."""
    return ", ".join(repr(key) for key in sorted(keys)) or "(none)"


def _check_encodes(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start}, which is no text"
        ) from error


def check_row(row: Mapping[str, object], place: str, format: str) -> None:
    """Raises DataError, which names `place`, unless the row holds what its format needs, as text."""
    for key in COLUMNS[format]:
        if key not in row:
            needed = ", ".join(COLUMNS[format])
            raise DataError(
                f"{place}: no key {key!r}, which format {format!r} needs ({needed}); found {names_of(set(row))}",
                hint=nearest(key, list(row)) or None,
            )
        value = row[key]
        if key == "messages":
            _check_messages(value, place)
        elif not isinstance(value, str):
            hint = (
                f'labels are strings: write "{value}"' if key == "label" and isinstance(value, int) else None
            )
            raise DataError(f"{place}: {key!r} must be a string, got {json_type(value)}", hint=hint)
        else:
            _check_encodes(value, f"{place}: {key!r}")


def _check_messages(messages: object, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        got = "an empty array" if messages == [] else json_type(messages)
        raise DataError(f"{place}: 'messages' must be an array of {{role, content}}, got {got}")
    for index, message in enumerate(messages):
        at = f"{place}: messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{at} must be an object {{role, content}}, got {json_type(message)}")
        if not MESSAGE <= set(message) <= MESSAGE | TOOLS:
            raise DataError(
                f"{at} must have the keys 'role' and 'content' only; found {names_of(set(message))}",
                hint=f"where tools are called, {', '.join(sorted(TOOLS))} too",
            )
        calls = message.get("tool_calls")
        if message["content"] is None and calls:
            continue
        if not isinstance(message["content"], str):
            raise DataError(f"{at}: 'content' must be a string, got {json_type(message['content'])}")
        _check_encodes(message["content"], f"{at}: 'content'")
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
