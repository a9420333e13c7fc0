"""The plugins from their metadata: those of this repository, its examples, and those from elsewhere that are listed.

One from elsewhere is listed by a copy of its `pyproject.toml`, as `docs/listed/NAME.toml`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peftx.composition.metadata import MARKS, keyword_values
from peftx.composition.registry import Registry
from peftx.kernel.names import GROUP, HOOKS
from peftx.kernel.plugin import Claim, Plugin
from peftx.testing.models import CORE_ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
CHOOSE = ROOT / "docs" / "choose"
PLACES = ("plugins/*/*/pyproject.toml", "docs/examples/*/pyproject.toml", "docs/listed/*.toml")


@dataclass(frozen=True)
class Listed:
    """A plugin, as its project file tells it.

    Attributes:
        group: the hook that it is filed under. link: from a page in docs/choose.
        marks: fidelity, evidence; each may be empty.
        backbones: `model_type`s that the kit runs it on; empty for one that is not installed, or needs no model.
        formats: of the rows that it trains on, `any` where that is left to others; empty for one that is not installed.
        mergeable: `yes` or `no`; empty likewise.
    """

    name: str
    what: str
    link: str
    group: str
    hooks: tuple[str, ...]
    family: str
    marks: tuple[str, ...]
    paper: str
    claims: frozenset[str]
    backbones: tuple[str, ...]
    formats: tuple[str, ...]
    mergeable: str


@cache
def listed() -> tuple[Listed, ...]:
    """All, by name."""
    found = [each for place in PLACES for path in sorted(ROOT.glob(place)) for each in _listed(path)]
    return tuple(sorted(found, key=lambda each: each.name))


def _listed(path: Path) -> list[Listed]:
    """The plugins of a project file, mostly one."""
    project = tomllib.loads(path.read_text("utf-8"))["project"]
    names = next(iter(project["entry-points"].values()))
    return [_one(path, project, name, several=len(names) > 1) for name in names]


def _one(path: Path, project: dict[str, Any], name: str, *, several: bool) -> Listed:
    """A plugin of a project; where it is one of several, and installed, its source says what, which hooks and paper."""
    words = project["keywords"]
    known = _class(name) if GROUP in project["entry-points"] else None
    what, hooks = project["description"], tuple(word for word in words if word in HOOKS)
    paper = next((word for word in words if word.startswith("arXiv:")), "")
    if several and known is not None:
        own = REGISTRY.describe(name)
        what, hooks, paper = own.summary, own.hooks, own.paper
    group = path.relative_to(ROOT).parts[1] if path.is_relative_to(ROOT / "plugins") else "".join(hooks[:1])
    here = (path.parent / "README.md").exists()
    return Listed(
        name=name,
        what=what,
        link=Path(os.path.relpath(path.parent / "README.md", CHOOSE)).as_posix()
        if here
        else project["urls"]["Source"],
        group=group,
        hooks=hooks or (group,),
        family="".join(keyword_values(words, "family")),
        marks=tuple("".join(keyword_values(words, kind)) for kind in MARKS),
        paper=paper,
        claims=known.claims if known is not None else frozenset(),
        backbones=_backbones(known) if known is not None and set(hooks) - {"prepare_data", "serve"} else (),
        formats=tuple(known.takes or ["any"]) if known is not None else (),
        mergeable="" if known is None else "yes" if Claim.MERGEABLE in known.claims else "no",
    )


REGISTRY = Registry(disabled=())


def _class(name: str) -> type[Plugin] | None:
    return REGISTRY.outline(name) if name in REGISTRY.names() else None


def _backbones(plugin: type[Plugin]) -> tuple[str, ...]:
    """What `peftx check` runs it on."""
    return tuple(
        name
        for name in dict.fromkeys((*CORE_ARCHITECTURES, *plugin.architectures))
        if name not in plugin.refuses
    )


def table() -> str:
    """Every plugin in a line; docs/assets/tables.js makes filters of the columns."""
    lines = [
        f"| plugin | what | hook | family | backbone | format | mergeable | {' | '.join(MARKS)} | paper |",
        f"| --- | --- | --- | --- | --- | --- | --- | {' | '.join('---' for _ in MARKS)} | --- |",
    ]
    for each in listed():
        arxiv = each.paper.removeprefix("arXiv:")
        paper = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
        cells = (
            f"[{each.name}]({each.link})",
            each.what.replace("|", "\\|"),
            ", ".join(each.hooks),
            each.family,
            ", ".join(each.backbones),
            ", ".join(each.formats),
            each.mergeable,
            *each.marks,
            paper,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _claims(*claims: Claim) -> Callable[[Listed], bool]:
    return lambda plugin: bool(plugin.claims & set(claims))


def _families(*families: str) -> Callable[[Listed], bool]:
    return lambda plugin: plugin.family in families


def _first(hook: str) -> Callable[[Listed], bool]:
    return lambda plugin: plugin.group == hook


GOALS: tuple[tuple[str, str, Callable[[Listed], bool]], ...] = (
    (
        "adapt a model, at no cost when it runs",
        "merges into the weights",
        lambda plugin: Claim.MERGEABLE in plugin.claims and plugin.group == "inject",
    ),
    (
        "adapt by small networks that stay beside the layers",
        "a little time in each call",
        lambda plugin: _families("adapter", "mixture-of-adapters", "low-rank")(plugin)
        and Claim.MERGEABLE not in plugin.claims,
    ),
    (
        "adapt by a few soft tokens, or by a prefix",
        "nothing to merge; each takes places of the window or of the cache",
        lambda plugin: _families("soft-prompt", "prefix")(plugin) and "decode" not in plugin.hooks,
    ),
    ("train some of the base's own weights", "memory for their gradients", _families("sparse-tuning", "full-tuning")),
    ("train where no backward pass fits", "more steps", _families("zeroth-order")),
    ("train in less time or memory", "see each page", _families("efficient-training", "activation-sparsity")),
    ("classify texts or words", "rows with labels", _claims(Claim.CLASSIFIES)),
    ("learn from preferences", "pairs of answers", _families("alignment")),
    ("choose, rewrite or weigh the rows", "one look at the rows before training", _first("prepare_data")),
    ("learn one task after another", "rows task by task", _families("continual-learning")),
    ("change single facts", "the facts as rows", _families("knowledge-editing")),
    ("make it unlearn", "rows to forget", _families("unlearning")),
    (
        "fewer bytes, or fewer channels",
        "text to calibrate on, for most",
        lambda plugin: plugin.group == "compress" or _families("pruning", "delta-compression")(plugin),
    ),
    ("skip layers, or split them into experts", "a router that trains", _families("moefication", "dynamic-depth")),
    ("read longer texts", "long rows", _families("long-context")),
    ("write the same text in fewer calls", "training, for some", _families("speculative-decoding")),
    ("steer what is written", "attributes, or marked spans", _families("controlled-generation", "attention-steering")),
    ("read shared beginnings once", "prompts that begin alike", _families("prefix-sharing")),
    (
        "read bytes in the place of tokens",
        "training of what reads them",
        lambda plugin: plugin.family == "tokenizer" and plugin.group != "evaluate",
    ),
    ("change what is embedded, or embed texts", "rows, or pairs of texts", _families("embeddings")),
    ("measure something", "rows of its own, for some", _first("evaluate")),
)  # fmt: skip
"""A goal, what it takes, and which plugins serve it."""


def goals() -> str:
    """Goal -> plugins; in bold those whose effect shows on real data, marked those that equal official code."""
    found = {goal: (takes, [each for each in listed() if serves(each)]) for goal, takes, serves in GOALS}
    placed = {each.name for _, plugins in found.values() for each in plugins}
    found["something narrower"] = ("see its page", [each for each in listed() if each.name not in placed])
    lines = ["| goal | takes | plugins |", "| --- | --- | --- |"]
    lines += [
        f"| {goal} | {takes} | {', '.join(map(_told, plugins))} |" for goal, (takes, plugins) in found.items()
    ]
    return "\n".join(lines)


def _told(plugin: Listed) -> str:
    fidelity, evidence = plugin.marks
    link = f"[{plugin.name}]({plugin.link})" + (" =" if fidelity == "equal" else "")
    return f"**{link}**" if evidence == "shown" else link
