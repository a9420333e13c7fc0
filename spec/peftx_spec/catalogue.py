"""What the spec has to know about the installed plugins; the core's registry provides it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pydantic import BaseModel


class Catalogue(Protocol):
    """The installed plugins, by name."""

    def names(self) -> list[str]:
        """All names that `use:` may take."""
        ...

    def hooks(self, name: str) -> frozenset[str]:
        """The hooks that the plugin implements: `prepare_data`, `inject`, `train_step`, `compress`, ..."""
        ...

    def compresses_own(self, name: str) -> bool:
        """Does the plugin compress what it injected and trained itself, and so behind the training."""
        ...

    def config(self, name: str) -> type[BaseModel]:
        """The model of the plugin's options. May import the plugin; raises `PeftxError` where that fails."""
        ...

    def adapter(self, folder: str) -> list[dict[str, Any]]:
        """The stack that an adapter of HF PEFT is: `use` and `with` of each plugin. Raises `PeftxError`."""
        ...

    def install_hint(self, name: str) -> str:
        """What to do about a plugin that is not there: `install '<name>' from ...`."""
        ...
