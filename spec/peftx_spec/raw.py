"""A spec as it was read, before it is checked: mappings and lists that may hold anything."""

from __future__ import annotations

Data = dict[str, object]


def list_of(data: Data, key: str) -> list[object]:
    """The list under a key; empty where another thing stands there, which is said elsewhere."""
    value = data.get(key)
    return value if isinstance(value, list) else []


def mapping_of(data: Data, key: str) -> Data:
    """The mapping under a key; empty where another thing stands there."""
    value = data.get(key)
    return value if isinstance(value, dict) else {}
