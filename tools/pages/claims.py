"""The claims, from the one list in the core, and what goes with what because of them."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise

from peftx.composition.registry import Registry
from peftx.composition.rules import EXCLUSIVE, RULES, Side
from peftx.kernel.plugin import Claim


@cache
def meanings() -> dict[str, str]:
    """Claim -> the sentence below it in the source."""
    (body,) = [
        node.body for node in ast.parse(inspect.getsource(Claim)).body if isinstance(node, ast.ClassDef)
    ]
    found = {}
    for said, text in pairwise(body):
        if isinstance(said, ast.Assign) and isinstance(text, ast.Expr):
            found[ast.literal_eval(said.value)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


@cache
def holders() -> dict[str, list[str]]:
    """Claim -> the installed plugins that make it."""
    registry = Registry(disabled=())
    found: dict[str, list[str]] = {claim: [] for claim in Claim}
    for name in registry.names():
        for claim in registry.outline(name).claims:
            found[claim].append(name)
    return found


def table() -> str:
    """Every claim, what it says, how many plugins make it, and three of them."""
    lines = ["| claim | what it says | plugins |", "| --- | --- | --- |"]
    for claim, meaning in meanings().items():
        names = holders()[claim]
        few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        told = " ".join(meaning.split()).replace("|", "\\|")
        lines.append(
            f'| <span id="{claim}"></span>`{claim}` | {told} | {len(names)}{f": {few}" if few else ""} |'
        )
    return "\n".join(lines)


def rules_table() -> str:
    """What is refused: two claims, or two kinds of plugins, and why."""
    lines = ["| one | the other | when | why |", "| --- | --- | --- | --- |"]
    lines += [f"| `{claim}` | `{claim}` | together | {why} |" for claim, why in EXCLUSIVE.items()]
    for rule in RULES:
        when = "the one before the other" if rule.ordered else "together"
        if rule.late:
            when += ", where the one compresses after training"
        reason = rule.reason.format(one="the one", two="the other").replace("|", "\\|")
        lines.append(f"| {_side(rule.one)} | {_side(rule.two)} | {when} | {reason} |")
    return "\n".join(lines)


def _side(side: Side) -> str:
    return ", ".join(f"`{claim}`" for claim in side.claims) or side.told.partition(", unless")[0]
