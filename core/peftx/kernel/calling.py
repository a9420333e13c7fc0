"""How pluggy calls the hooks of one stack."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import pluggy

from peftx.errors import PluginError
from peftx.kernel.members import Member, blame, blaming
from peftx.kernel.names import HOOKS, PROJECT

_FOLDED = ("inject", "compress", "prepare_data", "serve", "evaluate")
"""Hooks that run plugin by plugin; wrappers make no sense there."""


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


def _blame_failures(caller: pluggy.HookCaller, member: Member) -> None:
    """Let whatever fails in the member's own code of a hook that nests name it; what fails inside a wrapper's `yield`
    is not its doing."""
    for implementation in caller.get_hookimpls():
        if implementation.plugin is member.plugin:
            around = _wrapper if implementation.wrapper else _plain
            blamed = around(implementation.function, member, caller.name)
            implementation.function = blamed  # type: ignore[misc]


def _plain(function: Callable[..., Any], member: Member, hook: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with blaming(member, hook):
            return function(*arguments)

    return run


def _wrapper(function: Callable[..., Any], member: Member, hook: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Generator[None, Any, Any]:
        with blaming(member, hook):
            own = function(*arguments)
            next(own)
        try:
            result = yield
        except BaseException as inside:  # noqa: BLE001  # the wrapper itself decides what becomes of it
            result = _resume(own.throw, inside, member, hook)
        else:
            result = _resume(own.send, result, member, hook)
        return result

    return run


def _resume(go_on: Callable[[Any], Any], value: Any, member: Member, hook: str) -> Any:
    """What the wrapper makes of the result, or of the error, that came out of its `yield`."""
    try:
        go_on(value)
    except StopIteration as done:
        return done.value
    except Exception as error:
        if error is not value:
            blame(error, member, hook)
        raise
    raise PluginError(f"plugin '{member.id}': {hook} has a second yield", hint="a wrapper yields once")


def register(members: Sequence[Member], specs: type, defaults: object) -> pluggy.PluginManager:
    """A manager of this stack's own; reversed, since pluggy calls the last registered first.

    Args:
        specs: the hooks' signatures. defaults: what runs inside all wrappers where no plugin replaces it.
    """
    manager = _Manager(PROJECT)
    manager.add_hookspecs(specs)
    manager.register(defaults, name=PROJECT)
    for member in reversed(members):
        try:
            manager.register(member.plugin, name=member.id)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin '{member.id}': {error}") from error
        for caller in manager.get_hookcallers(member.plugin) or ():
            if caller.name not in _FOLDED:
                _blame_failures(caller, member)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error), hint=f"hooks: {', '.join(HOOKS)}") from error
    return manager
