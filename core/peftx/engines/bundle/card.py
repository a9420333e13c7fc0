"""The model card of a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.composition.members import default_id
from peftx.composition.registry import Registry

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack


def _is_on_the_hub(base: str) -> bool:
    """Is it a name that the Hub takes for that of a base: no folder, and no bundled model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()


def model_card(stack: Stack) -> str:
    """Markdown: what stands on which model, how it was made, what was measured, how to load it."""
    registry = Registry()
    known = set(registry.names())
    lines = [
        "---",
        "library_name: peftx",
        *([f"base_model: {stack.base_id}"] if _is_on_the_hub(stack.base_id) else []),
        "---",
        "",
        f"# {' + '.join(stack.plugins) or 'plain'} on {stack.base_id}",
        "",
        "| plugin | paper | parameters | options |",
        "| --- | --- | --- | --- |",
    ]
    for member in stack.members:
        use = default_id(type(member.plugin))
        entry = registry.describe(use) if use in known and use not in registry.clashes() else None
        paper = f"[{entry.paper}]({entry.url})" if entry and entry.paper else ""
        options = ", ".join(
            f"{name}={getattr(member.plugin.config, name)}"
            for name in sorted(member.plugin.config.model_fields_set)
        )
        count = f"{stack.plugin_parameters(member.id):,}" if stack.ledger.of(member.id) else "none"
        if stack.standing[member.id].folded:
            count = "in the base's weights"
        lines.append(f"| {member.id} | {paper} | {count} | {options or 'defaults'} |")
    lines += ["", f"Trained for {stack.trained_steps} steps; seed {stack.seed}.", ""]
    if stack.scores:
        lines += ["| measure | value | 95 % interval |", "| --- | --- | --- |"]
        for name, score in stack.scores.items():
            interval = (
                f"{score.low:.4g} to {score.high:.4g}"
                if score.low is not None and score.high is not None
                else ""
            )
            lines.append(f"| {name} | {score.value:.5g} {score.unit} | {interval} |")
        lines.append("")
    lines += ["```python", "import peftx", "", 'stack = peftx.load("path/to/this/folder")', "```", ""]
    return "\n".join(lines)
