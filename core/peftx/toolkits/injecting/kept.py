"""What a layer computes of its numbers, and keeps until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


class Kept:
    """One value, made of tensors.

        self.gain = Kept()                                      # in a delta's __init__
        g = self.gain.of(self.parameters(), self.compute)       # in its forward, where nothing trains

    A change is one that torch counts, as the step of an optimizer is; another tensor; or other numbers that are lent to
    a parameter, as to a reference to the run's start. Whoever knows of further ones says `forget`.
    """

    def __init__(self) -> None:
        self._known: tuple[Any, list[Tensor | None], Any] | None = None

    def of(self, tensors: Iterable[Tensor | None], make: Callable[[], Any], *, about: object = None) -> Any:
        """What `make` gives, or gave for the same numbers in the same tensors, and the same `about`."""
        behind = list(tensors)
        now = about, [_state(tensor) for tensor in behind]
        if self._known is None or self._known[0] != now:
            self._known = now, behind, make()  # `behind` lives on, so that no id comes again
        return self._known[2]

    @property
    def value(self) -> Any:
        """What is kept; None where nothing is."""
        return None if self._known is None else self._known[2]

    def forget(self) -> None:
        self._known = None


def _state(tensor: Tensor | None) -> tuple[int, int, int]:
    if tensor is None:
        return 0, 0, 0
    # Inference tensors count no versions; outside inference mode they cannot be changed either.
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
