"""The architectures that have a table, from the tables."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, tables
from peftx.testing.models import ARCHITECTURES


def table() -> str:
    """A line for each `model_type`: its towers, its roles, and if the conformance kit has a tiny model of it."""
    found = tables()
    lines = [
        f"{len(found)} values of `model_type`, {len(set(map(id, found.values())))} tables.",
        "",
        "| `model_type` | towers | roles | also | kit |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, known in sorted(found.items()):
        towers = ", ".join(dict.fromkeys(tower.name for tower in known.towers))
        same = f"as `{known.model_type}`" if known.model_type != name else ""
        lines.append(
            f"| `{name}` | {towers} | {_roles(known)} | {same} | {'yes' if name in ARCHITECTURES else ''} |"
        )
    return "\n".join(lines)


def _roles(known: Table) -> str:
    """All roles that targets may name inside its layers, those of one kind together: `attention.q,k,v,o`."""
    kinds: dict[str, list[str]] = {}
    for tower in known.towers:
        fused = [role for fused in tower.fused for role in fused.roles]
        experts = [role for stacked in tower.stacked for role in stacked.roles]
        for role in (*tower.roles, *fused, *experts):
            kind, _, what = role.partition(".")
            if what not in kinds.setdefault(kind, []):
                kinds[kind].append(what)
    return " ".join(
        f"`{kind}.{','.join(parts)}`" if parts != [""] else f"`{kind}`" for kind, parts in kinds.items()
    )
