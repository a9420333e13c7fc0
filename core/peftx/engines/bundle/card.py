"""The model card of a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.composition.members import default_id
from peftx.composition.registry import Registry
from peftx.engines.bundle.manifest import MANIFEST, PIPELINE, versions
from peftx.engines.files import plain_files, sha256
from peftx.engines.hub import is_hub
from peftx.engines.models import asset_path

if TYPE_CHECKING:
    from peftx.composition.metadata import Entry
    from peftx.history import Measured
    from peftx.kernel.stack import Stack


def _is_on_the_hub(base: str) -> bool:
    """Is it a name that the Hub takes for that of a base: no folder, and no bundled model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) is not None and not Path(base).exists()


def model_card(stack: Stack, folder: Path, registry: Registry) -> str:
    """Markdown: what stands on which model, from which rows, how to make it again, what was measured, how to load it,
    which files there are, under which terms, and whom to cite.

    Args:
        folder: of the bundle, with all in it but this card and the manifest.
    """
    entries = _entries(stack, registry)
    lines = [
        "---",
        "library_name: peftx",
        *([f"base_model: {stack.base_id}"] if _is_on_the_hub(stack.base_id) else []),
        f"tags: [{', '.join(dict.fromkeys(['peftx', *(entry.name for entry in entries.values())]))}]",
        "---",
        "",
        f"# {' + '.join(stack.plugins) or 'plain'} on {stack.base_id}",
        "",
        "| plugin | paper | numbers | options |",
        "| --- | --- | --- | --- |",
    ]
    for member in stack.members:
        entry = entries.get(member.id)
        paper = f"[{entry.paper}]({entry.url})" if entry and entry.paper else ""
        options = ", ".join(
            f"{name}={getattr(member.plugin.config, name)}"
            for name in sorted(member.plugin.config.model_fields_set)
        )
        lines.append(f"| {member.id} | {paper} | {_numbers(stack, member.id)} | {options or 'defaults'} |")
    lines += ["", f"Trained for {stack.trained_steps} steps; seed {stack.seed}.", ""]
    lines += [*_measured(stack), *_use(stack), *_files(folder), *_data(stack)]
    return "\n".join([*lines, *_versions(stack, entries), *_terms(entries), *_citations(entries)])


def _numbers(stack: Stack, id: str) -> str:
    """How many a plugin holds, and how many of them are trained."""
    if stack.standing[id].folded:
        return "in the base's weights"
    if not stack.ledger.of(id):
        return "none"
    held, trained = stack.plugin_parameters(id), sum(p.numel() for p in stack.ledger.parameters(id))
    return f"{held:,}" if held == trained else f"{held:,}, {trained:,} of them trained"


def _measured(stack: Stack) -> list[str]:
    """The scores, each beside the first of its name where there were several, in most runs the base's."""
    if not stack.scores:
        return []
    evaluations = stack.history.evaluations
    before: dict[str, Measured] = evaluations[0].scores if len(evaluations) > 1 else {}
    lines = [
        "| measure | value | 95 % interval | counted | at the start |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, score in stack.scores.items():
        first = before[name].value if name in before else None
        cells = (
            name,
            f"{score.value:.5g} {score.unit}",
            "" if score.low is None else f"{score.low:.4g} to {score.high:.4g}",
            "" if score.count is None else f"{score.count:,}",
            "" if first is None else f"{first:.5g} {score.unit}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _use(stack: Stack) -> list[str]:
    writes = stack.model.can_generate() and stack.given_tokenizer is not None
    call = ['print(stack.generate("Once upon a time", max_new_tokens=40))'] if writes else []
    return ["```python", "import peftx", "", 'stack = peftx.load("path/to/this/folder")', *call, "```", ""]


def _files(folder: Path) -> list[str]:
    lines = [
        f"| {file.relative_to(folder).as_posix()} | {file.stat().st_size:,} |" for file in plain_files(folder)
    ]
    told = (
        f"`{MANIFEST}` has the digest of each file. Those of plugins are called by their names in the stack."
    )
    return ["## Files", "", "| file | bytes |", "| --- | --- |", *lines, "", told, ""]


def _entries(stack: Stack, registry: Registry) -> dict[str, Entry]:
    """What is installed under the name of each member's class."""
    known = set(registry.names()) - set(registry.clashes())
    uses = {member.id: default_id(type(member.plugin), registry) for member in stack.members}
    return {id: registry.describe(use) for id, use in uses.items() if use in known}


def _data(stack: Stack) -> list[str]:
    """The files of the spec that the stack was made from; of a file on this disk its digest too."""
    if stack.pipeline is None:
        return []
    data = stack.pipeline.data
    sources = {"train": data.train, "eval": data.eval, "calibration": data.calibration, **data.sources}
    lines = [f"| {role} | {_named(source.path)} |" for role, source in sources.items() if source is not None]
    if not lines:
        return []
    rows = [f"{training.examples:,}" for training in stack.history.trainings if training.examples]
    told = [f"Trained on {', then '.join(rows)} rows."] if rows else []
    if held := data.holdout:
        most = f", at most {held.most:,}" if held.most else ""
        told.append(
            f"Measured on rows held out of `train`: a share of {held.share:g}{most}, seed {held.seed}."
        )
    return ["## Data", "", "| | file |", "| --- | --- |", *lines, "", *([" ".join(told), ""] if told else [])]


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
