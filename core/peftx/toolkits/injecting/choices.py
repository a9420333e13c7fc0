"""Options that have another value for some of a plugin's targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from peftx.errors import OptionError
from peftx.kernel.targets import Targets
from peftx.kernel.view import ModelView

Value = TypeVar("Value")


def of_each(
    model: ModelView,
    keys: Collection[str],
    usual: Value,
    others: Mapping[str, Value],
    *,
    option: str,
    owner: str,
    targets: Targets,
) -> dict[str, Value]:
    """Key of a site -> its value.

    Args:
        keys: of the sites that the plugin adapts. usual: what most have. others: targets -> the value of those among
            the sites, as in `{"attention.q": 4}`; the last that matches counts. option: its name. owner: the plugin.
            targets: all that it adapts, for the message.

    Raises:
        OptionError: targets that match none of the sites.
    """
    found = dict.fromkeys(keys, usual)
    for target, value in others.items():
        matched = found.keys() & {site.key for site in model.sites(target)}
        if not matched:
            raise OptionError(
                f"{owner}: {option}: '{target}' matches nothing inside targets '{targets}'",
                hint=f"add it to targets, or take it out of {option}",
            )
        found |= dict.fromkeys(matched, value)
    return found
