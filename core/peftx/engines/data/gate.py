"""The one gate that rows come through, from files, from Python, and from plugins that rewrite them.

What is no text is refused here, with its place; nothing is turned into text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as compute

from peftx.engines.data.mapped import pieces
from peftx.engines.data.places import Place
from peftx.errors import DataError
from peftx_spec import models as spec
from peftx_spec.rows import LEARNED, ROLES, check_learned, check_messages, check_row, require_text

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = spec.FORMATS
FORMATS: Final = tuple(COLUMNS)
_TEXTS: Final = frozenset(name for names in COLUMNS.values() for name in names) - {"messages"}


def listed(data: Any, what: str = "rows") -> Any:
    """Rows or texts in an order that can be gone over twice: what has a length as it is, a generator as a list.

    Raises:
        DataError: it is one thing, or nothing.
    """
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise DataError(f"{what}: a list is wanted, or a file, and this is a {type(data).__name__}")
    return data if isinstance(data, Sized) else list(data)


def texts_of(given: Any, what: str) -> list[str]:
    """One text, or several. Raises DataError, which names it, unless all are."""
    texts = [given] if isinstance(given, str) else list(listed(given, f"{what}s"))
    for index, text in enumerate(texts):
        require_text(text, f"the {what}" if len(texts) == 1 else f"{what} {index}")
    return texts


def check_item(item: object, where: str) -> None:
    """Raises DataError unless `item` is a text, or a row whose columns of known names hold what they should."""
    if not isinstance(item, Mapping):
        require_text(item, where)
        return
    for name in item.keys() & _TEXTS:
        require_text(item[name], f"{where}: {name!r}")
    if "messages" in item:
        check_messages(item["messages"], where)


def check_rows(rows: Dataset, format: str) -> None:
    """Raises DataError, which names the row, unless all rows hold what their format needs. Whole columns are looked at
    first, in Arrow; rows one by one only where a column is not as it should be."""
    if format not in COLUMNS:
        return
    for name in COLUMNS[format]:
        if name not in rows.column_names or not all(
            _is_clean(column, name, format) for _, column in pieces(rows, name)
        ):
            for index, row in enumerate(rows):
                try:
                    check_row(row, "", format)
                except DataError:  # the same once more, with the place: it takes a while to find
                    check_row(row, str(Place(rows, index)), format)


def check_all_learned(rows: Dataset, format: str) -> None:
    """Raises DataError, which names the row, where one of those to train on has nothing to learn, as far as that is
    known without a tokenizer; of conversations see `orders.py`."""
    name = LEARNED.get(format)
    if name is None:
        return
    for start, column in pieces(rows, name):
        index = compute.index(column, "").as_py()
        if index >= 0:
            check_learned(rows[start + index], str(Place(rows, start + index)), format)


def _is_clean(column: pa.ChunkedArray, name: str, format: str) -> bool:
    column = pa.chunked_array([column]) if isinstance(column, pa.Array) else column
    nested = pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)
    if name != "messages" and not (nested and format == "preference"):
        return bool((pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
                    and not column.null_count)  # fmt: skip
    if not nested:
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
