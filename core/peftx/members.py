"""Who stands in a stack, under which id, and how pluggy calls their hooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy
from torch import Tensor

from peftx.conflicts import Member
from peftx.errors import ConflictError, PeftxError, PluginError, RegistryError
from peftx.hooks import HOOKS, HookSpecs, hooks_of
from peftx.plugin import PROJECT, Plugin, hookimpl
from peftx.registry import Registry

if TYPE_CHECKING:
    from peftx.decoding import Generation
    from peftx.training import TrainStep

_FOLDED = ("inject", "compress", "prepare_data", "serve", "evaluate")
"""Hooks that run plugin by plugin; wrappers make no sense there."""


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


class _Manager(pluggy.PluginManager):
    """Refuses what would break "order of the spec = order of effect"."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        if getattr(getattr(type(plugin), name, None), f"{PROJECT}_impl", None) is None:
            return None  # most attributes; the manager's own look at each is slow
        options: Any = super().parse_hookimpl_opts(plugin, name)
        who = f"{type(plugin).__name__}.{name}"
        if options.get("tryfirst") or options.get("trylast"):
            raise PluginError(
                f"{who}: tryfirst and trylast are refused", hint="the order of the stack decides"
            )
        if name in _FOLDED and (options.get("wrapper") or options.get("hookwrapper")):
            raise PluginError(f"{who}: only train_step and decode take wrappers")
        return options


class Defaults:
    """What runs inside all wrappers where no plugin replaces it: registered first, so it answers last."""

    @hookimpl
    def train_step(self, step: TrainStep) -> Tensor:
        from peftx.training.step import default_step

        return default_step(step)

    @hookimpl
    def decode(self, request: Generation) -> Tensor:
        return request.run_default()


def register(members: Sequence[Member]) -> pluggy.PluginManager:
    """A manager of this stack's own; reversed, since pluggy calls the last registered first."""
    manager = _Manager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    manager.register(Defaults(), name=PROJECT)
    for member in reversed(members):
        try:
            manager.register(member.plugin, name=member.id)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin '{member.id}': {error}") from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error), hint=f"hooks: {', '.join(HOOKS)}") from error
    return manager


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
