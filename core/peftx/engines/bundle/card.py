"""The model card of a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.composition.members import default_id
from peftx.composition.registry import Registry
from peftx.engines.bundle.manifest import PIPELINE, versions
from peftx.engines.files import sha256
from peftx.engines.hub import is_hub
from peftx.engines.models import asset_path

if TYPE_CHECKING:
    from peftx.composition.registry import Entry
    from peftx.kernel.stack import Stack


def _is_on_the_hub(base: str) -> bool:
    """Is it a name that the Hub takes for that of a base: no folder, and no bundled model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()


def model_card(stack: Stack) -> str:
    """Markdown: what stands on which model, from which rows, how to make it again, what was measured, how to load it,
    under which terms, and whom to cite."""
    entries = _entries(stack)
    lines = [
        "---",
        "library_name: peftx",
        *([f"base_model: {stack.base_id}"] if _is_on_the_hub(stack.base_id) else []),
        f"tags: [{', '.join(dict.fromkeys(['peftx', *(entry.name for entry in entries.values())]))}]",
        "---",
        "",
        f"# {' + '.join(stack.plugins) or 'plain'} on {stack.base_id}",
        "",
        "| plugin | paper | parameters | options |",
        "| --- | --- | --- | --- |",
    ]
    for member in stack.members:
        entry = entries.get(member.id)
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
    return "\n".join(
        [*lines, *_data(stack), *_versions(stack, entries), *_terms(entries), *_citations(entries)]
    )


def _entries(stack: Stack) -> dict[str, Entry]:
    """What is installed under the name of each member's class."""
    registry = Registry()
    known = set(registry.names()) - set(registry.clashes())
    uses = {member.id: default_id(type(member.plugin)) for member in stack.members}
    return {id: registry.describe(use) for id, use in uses.items() if use in known}


def _data(stack: Stack) -> list[str]:
    """The files of the spec that the stack was made from; of a file on this disk its digest too."""
    if stack.pipeline is None:
        return []
    data = stack.pipeline.data
    sources = {"train": data.train, "eval": data.eval, "calibration": data.calibration, **data.sources}
    lines = [f"| {role} | {_named(source.path)} |" for role, source in sources.items() if source is not None]
    return ["## Data", "", "| | file |", "| --- | --- |", *lines, ""] if lines else []


def _named(path: str) -> str:
    if is_hub(path):
        return path
    file = asset_path(path)
    digest = f", sha256 {sha256(file)[:16]}" if file.is_file() else ""
    return f"{path if path.startswith('peftx:') else file.name}{digest}"


def _versions(stack: Stack, entries: dict[str, Entry]) -> list[str]:
    found = versions() | {entry.distribution: entry.version for entry in entries.values()}
    made = ", ".join(f"{name} {version}" for name, version in found.items())
    again = (
        [f"`peftx apply {PIPELINE}` makes it again, where the files are.", ""]
        if stack.pipeline is not None
        else []
    )
    return ["## Made with", "", f"{made}.", "", *again]


def _terms(entries: dict[str, Entry]) -> list[str]:
    licenses = {entry.distribution: entry.license or "not stated" for entry in entries.values()}
    code = ", ".join(f"{name}: {license}" for name, license in licenses.items())
    said = [f"Code: {code}."] if code else []
    rest = "The terms of the base model and of the data hold for what was made from them."
    return ["## Licence", "", *said, rest, ""]


def _citations(entries: dict[str, Entry]) -> list[str]:
    papers = dict.fromkeys(paper for entry in entries.values() for paper in entry.citations)
    return ["## Cite", "", *(f"```bibtex\n{paper}```\n" for paper in papers)] if papers else []
