"""Who stands in a stack, how far each is, and whose fault an error is."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftx.errors import PeftxError, PluginError
from peftx.kernel.plugin import Claim, Plugin, hooks_of


@dataclass(frozen=True)
class Member:
    """One plugin in its place: id in the stack, where the spec names it (file:line:column, or empty)."""

    id: str
    plugin: Plugin
    where: str = ""
    phase: str | None = None

    def __str__(self) -> str:
        return f"'{self.id}'" + (f" ({self.where})" if self.where else "")

    def claims(self, claim: Claim) -> bool:
        return claim in self.plugin.claims

    def implements(self, hook: str) -> bool:
        return hook in hooks_of(self.plugin)

    @property
    def trains_own_rows(self) -> bool:
        """Does it put a loss on rows of its own in the place of the task's: on further sources, or on pairs."""
        own = self.plugin.sources or "preference" in self.plugin.takes
        return self.claims(Claim.REPLACES_LOSS) and bool(own)


@dataclass
class Standing:
    """How far one plugin of a stack is."""

    injected: bool = False
    compressed: bool = False
    folded: bool = False
    """Its deltas are in the weights for good."""
    frozen: bool = False
    disabled: bool = False


def blame(error: Exception, member: Member, hook: str) -> None:
    """Raise `error` anew with the plugin, the hook and the place in the spec; return if it names the plugin already."""
    if isinstance(error, PeftxError):
        # By its id as such: one of id `loss` is not named by "loss must be finite".
        if error.message.startswith((f"{member.id}:", f"'{member.id}'", f"plugin '{member.id}'")):
            return
        place = f" ({member.where})" if member.where else ""
        raise type(error)(f"{member.id}: {hook}{place}: {error.message}", hint=error.hint) from error
    place = f" at {member.where}" if member.where else ""
    line = line_in(error, type(member.plugin).__module__)
    raise PluginError(
        f"plugin '{member.id}'{place} failed in {hook}: {type(error).__name__}: {error}"
        + (f" ({line})" if line else "")
    ) from error


def line_in(error: BaseException, module: str) -> str:
    """`peftx_lora.py:47`: the last line of a module, or of its package, that an error came through; empty where it came
    through none."""
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        if name == module or name.startswith(f"{module}."):
            found = f"{Path(frame.f_code.co_filename).name}:{number}"
    return found


@contextmanager
def blaming(member: Member, hook: str) -> Iterator[None]:
    """Whatever fails inside names the plugin, the hook and the place in the spec."""
    try:
        yield
    except Exception as error:
        blame(error, member, hook)
        raise
