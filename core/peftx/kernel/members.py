"""Who stands in a stack, and under which id."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peftx.errors import ConflictError, PeftxError, PluginError, RegistryError
from peftx.kernel.names import HOOKS
from peftx.kernel.plugin import Claim, Plugin, hooks_of
from peftx.kernel.registry import Registry


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


@dataclass
class Standing:
    """How far one plugin of a stack is."""

    injected: bool = False
    compressed: bool = False
    folded: bool = False
    """Its deltas are in the weights for good."""
    frozen: bool = False
    disabled: bool = False


def default_id(plugin: type[Plugin]) -> str:
    """The name under which a distribution publishes the class; one that none does goes by its own: `MyGain` is
    `my-gain`."""
    published = Registry().name_of(plugin)
    if published is not None:
        return published
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", plugin.__name__).lower()
    return re.sub("[^a-z0-9]+", "-", words).strip("-")


def members_of(plugins: Sequence[Plugin | tuple[str, Plugin] | Member]) -> list[Member]:
    """The stack's members, each with an id.

    Raises:
        PluginError, ConflictError, RegistryError: what cannot be one, or stands twice.
    """
    members: list[Member] = []
    for item in plugins:
        if isinstance(item, Member):
            member = item
        elif isinstance(item, tuple):
            member = Member(*item)
        else:
            member = Member(default_id(type(item)), item)
        plugin: object = member.plugin
        if not isinstance(plugin, Plugin):
            kind = type(member.plugin).__name__
            raise PluginError(
                f"'{member.id}' is a {kind}, not a plugin", hint="an instance of a peftx.Plugin subclass"
            )
        if not re.fullmatch("[a-z0-9][a-z0-9-]*", member.id):
            raise PluginError(
                f"'{member.id}' is no id", hint="lower-case letters, digits and hyphens, as in 'lora-2'"
            )
        if any(other.id == member.id for other in members):
            raise ConflictError(
                f"'{member.id}' stands twice in the stack", hint=f"give one an id: ('{member.id}-2', ...)"
            )
        if any(other.plugin is member.plugin for other in members):
            raise ConflictError(
                f"one plugin object stands twice, as '{member.id}' too", hint="make two objects"
            )
        if not hooks_of(member.plugin):
            raise RegistryError(f"'{member.id}' implements no hook", hint=f"hooks: {', '.join(HOOKS)}")
        members.append(member)
    return members


def blame(error: Exception, member: Member, hook: str) -> None:
    """Raise `error` anew with the plugin, the hook and the place in the spec; return if it names the plugin already."""
    if isinstance(error, PeftxError):
        # By its id as such: one of id `loss` is not named by "loss must be finite".
        if error.message.startswith((f"{member.id}:", f"'{member.id}'", f"plugin '{member.id}'")):
            return
        place = f" ({member.where})" if member.where else ""
        raise type(error)(f"{member.id}: {hook}{place}: {error.message}", hint=error.hint) from error
    place = f" at {member.where}" if member.where else ""
    raise PluginError(
        f"plugin '{member.id}'{place} failed in {hook}: {type(error).__name__}: {error}"
    ) from error


@contextmanager
def blaming(member: Member, hook: str) -> Iterator[None]:
    """Whatever fails inside names the plugin, the hook and the place in the spec."""
    try:
        yield
    except Exception as error:
        blame(error, member, hook)
        raise
