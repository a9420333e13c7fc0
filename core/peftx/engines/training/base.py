"""The model that plugins stand on, to be asked while they stand there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from peftx.kernel.parts import ReplacedPart

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack


@contextmanager
def base_alone(stack: Stack) -> Iterator[None]:
    """Inside, the stack's model runs without its plugins. Unlike in `stack.disabled()`, weights stay that a plugin
    replaced (packed, pruned), or was folded into for good: nothing else is there to run, so they are the base, and the
    plugin's other parts are off.

    Raises:
        MergeError: deltas are merged into weights that a plugin trains, or over it; nothing is changed then.
    """
    with ExitStack() as back:
        stays = [part for part in stack.ledger.parts if isinstance(part, ReplacedPart) or part.final]
        for id in dict.fromkeys(part.owner for part in stays):
            standing = stack.standing[id]
            if standing.disabled:  # by another one of these
                continue
            for part in stack.ledger.of(id):
                if part not in stays:
                    part.check_switch()
                    part.switch(False)
                    back.callback(part.switch, True)
            standing.disabled = True
            back.callback(setattr, standing, "disabled", False)
        back.enter_context(stack.disabled())
        yield
