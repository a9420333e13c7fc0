"""What a stack of plugins on a tiny model shows, as `peftx.testing.matrix` asks for it. Nothing here is raised."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from itertools import chain, combinations, islice
from pathlib import Path

import torch
from torch import Tensor

from peftx.composition.conflicts import find_conflicts
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.plugin import Claim
from peftx.testing.case import inputs_for, output
from peftx.testing.covering import Pair
from peftx.testing.life import LENGTH, POSITIONS, built, early_ids, live, model_of
from peftx.testing.planned import refused_by_plan
from peftx.testing.shown import Group
from peftx.testing.tried import lived_alone, members_as_tried, plain, soft, specified

Names = tuple[str, ...]
New = Mapping[Pair, bool]
"""Pairs of a stack that nothing has shown yet -> whether they did not stand in the other order either."""
SOFT = POSITIONS - LENGTH
"""Soft tokens of a stack at most, unless one plugin has more by itself; a pair may have more, and fails where it
matters."""
COMPANY = 3
"""Plugins that are tried beside those whom a reason names, where these alone do not fail."""
LEFT = "refused, and the model is not what it was"


def fits(names: Sequence[str]) -> bool:
    """Do these plugins go together by their claims and rows, and leave the tiny models positions for a text."""
    tokens = [*map(soft, names)]
    return sum(tokens) <= max(SOFT, *tokens) and not find_conflicts(plain(names))


def try_alone(arch: str, names: Names, _: New) -> list[Group]:
    """Whether a plugin stands on a model, as a stack of one."""
    why = lived_alone(names[0], arch)
    return [Group(arch, names, names if why else (), why or "", refused=bool(why))]


def build_stack(arch: str, names: Names, new: New) -> list[Group]:
    """What building refuses of a stack, down to a rest that is built, which comes last; hundredths of a second each. No
    rest where none of the `new` pairs is left in it."""
    return _down_to_rest(names, new, lambda less: _apart(arch, less, refusal(less, arch), by_building=True))


def try_stack(arch: str, names: Names, new: New) -> list[Group]:
    """What fails of a stack that is lived through, down to a rest that lives. It is measured and served by plugins that
    were not beside each other in a stack before, in whichever order."""
    measured = {name for pair, first in new.items() if first for name in pair} if new else None
    return _down_to_rest(names, new, lambda less: try_group(arch, less, measured))


def _down_to_rest(names: Names, new: New, attempt: Callable[[Names], Group]) -> list[Group]:
    """Try a stack, then what is left of it without one of those that fail, the one whose loss leaves most of the `new`
    pairs; of more than two, one that failed before with others, or it would fail behind each in turn."""
    found: list[Group] = []
    while True:
        group = attempt(names)
        again = [sum(len(each.fault) > 2 and gone in each.fault for each in found) for gone in group.fault]
        found.append(group)
        shown = {}
        for gone, often in zip(group.fault, again, strict=True):
            rest = tuple(name for name in names if name != gone)
            if often == max(again) and _may_live(rest):
                shown[rest] = sum(pair in new for pair in combinations(rest, 2))
        names = max(shown, key=shown.__getitem__, default=())
        if not shown.get(names):
            return found


def try_group(arch: str, names: Names, measured: Collection[str] | None = None) -> Group:
    """Live through a stack, and take it apart where it fails: by building alone what building refuses."""
    reason = trouble(names, arch, measured)
    said = reason and refusal(names, arch)
    return _apart(arch, names, said or reason, by_building=bool(said), measured=measured)


def _apart(
    arch: str, names: Names, reason: str, *, by_building: bool, measured: Collection[str] | None = None
) -> Group:
    """Those of a stack that fail together, until no plugin is too many: whom the reason names at once, or these with
    one more, else without one after the other. The last goes first: what works on others is gone then before these
    are."""
    fault = names if reason else ()

    @cache
    def still(less: Names) -> str:
        if not _may_live(less):
            return ""
        return refusal(less, arch) if by_building else trouble(less, arch, measured)

    named = tuple(name for name in fault if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", reason))
    if 1 < len(named) < len(fault):
        more = (tuple(n for n in fault if n in named or n == name) for name in fault if name not in named)
        tries = ((less, still(less)) for less in chain([named], islice(more, COMPANY)))
        fault, reason = next(((less, why) for less, why in tries if why), (fault, reason))
    if len(fault) > 2 or not by_building:  # each can be built by itself
        for i in reversed(range(len(fault))):
            if why := still(less := (*fault[:i], *fault[i + 1 :])):
                fault, reason = less, why
    said = reason if by_building or not fault else refusal(fault, arch)
    return Group(arch, names, fault, said or reason, refused=bool(said) and LEFT not in said)


def refusal(names: Sequence[str], arch: str) -> str:
    """Why a stack of these plugins is refused when it is built, and whether that left something of itself on the model;
    empty if it is not."""
    model, members = model_of(arch), members_as_tried(*names)
    try:
        built(members, model)
    except ConflictError as error:
        # What was packed is not what it was.
        whole = bool(early_ids(members)) or torch.equal(output(model, inputs_for(model)), _plain_output(arch))
        return str(error) if whole else f"{LEFT}: {error}"
    except Exception:  # noqa: BLE001  any other is the failure that was seen
        return ""
    return ""


@cache
def _plain_output(arch: str) -> Tensor:
    model = model_of(arch)
    return output(model, inputs_for(model))


def _may_live(names: Names) -> bool:
    """Is there a stack of what is left, in which a plugin that works on what stands before it has something there."""
    return bool(names) and fits(names) and not plain(names[:1])[0].claims(Claim.WORKS_ON_PREVIOUS)


def trouble(names: Sequence[str], arch: str, measured: Collection[str] | None = None) -> str:
    """Why a stack of these plugins does not live, or is refused by `plan` though it does; empty otherwise.

    Args:
        measured: whose metric and policy are asked for; all if left out.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="peftx-matrix-") as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            live(members_as_tried(*names), arch, Path(folder) / "bundle", measured=measured)
            said = refused_by_plan(specified(names), arch, model=model_of)
            assert not said, f"it works, and plan refuses it: {said[0]}"
    except (AssertionError, PeftxError) as error:
        return str(error) or "assertion failed"
    except Exception as error:  # noqa: BLE001  a stack may break in any way, and the table is to say so
        return f"{type(error).__name__}: {error}"
    return ""
