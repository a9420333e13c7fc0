"""Who stands in a stack, and under which id."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peftx.composition.registry import Registry
from peftx.errors import ConflictError, PluginError, RegistryError
from peftx.kernel.members import Member
from peftx.kernel.names import HOOKS
from peftx.kernel.plugin import Plugin, hooks_of


def default_id(plugin: type[Plugin], registry: Registry | None = None) -> str:
    """The name under which a distribution publishes the class; one that none does goes by its own: `MyGain` is
    `my-gain`. `registry`: who asks for many has one, which looks at the path once."""
    published = (registry or Registry()).name_of(plugin)
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
