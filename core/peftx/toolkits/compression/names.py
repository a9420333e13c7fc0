"""Options by name, for what must be JSON."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from peftx.errors import UnsupportedError, nearest

__all__ = ["check_choice", "dtype_name", "float_dtype"]

_FLOATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def check_choice(value: str, choices: Iterable[str], what: str) -> None:
    """Raise `UnsupportedError` with the nearest choice unless `value` is one; `what` names the option."""
    known = list(choices)
    if value not in known:
        hint = nearest(value, known) or None
        raise UnsupportedError(f"{what}={value!r} is none of {', '.join(map(repr, known))}", hint=hint)


def float_dtype(name: str, what: str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16"."""
    check_choice(name, _FLOATS, what)
    return _FLOATS[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The inverse: "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
