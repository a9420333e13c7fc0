"""Plugin folders from templates: every file that the structure test asks for, and a small method that works."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from peftx.errors import UsageError
from peftx_spec.errors import FileError, nearest
from peftx_spec.portable import portable

HOOKS = ("prepare_data", "inject", "train_step", "compress", "decode", "serve", "evaluate")
RESERVED = ("spec", "cli", "all", "peftx", "model", "data", "stack", "train", "evaluate", "run", "output")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}")
_FAMILY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SHORTEST, LONGEST = 10, 90  # characters of a one-line description


def write(
    folder: Path,
    *,
    slug: str,
    hook: str,
    arxiv: str | None = None,
    title: str | None = None,
    family: str | None = None,
) -> list[Path]:
    """Write the folder; returns its files.

    Raises:
        PeftxError: a bad slug, hook, arXiv id or title, or a folder that exists.
    """
    values = _values(slug=slug, hook=hook, arxiv=arxiv, title=title, family=family)
    if folder.exists():
        raise FileError(f"'{folder}' exists already", hint="choose another --dir, or remove it first")
    module = folder / "src" / f"{values['module']}.py"
    _write(module, f"{hook}.py", values)
    values["options"] = _options(module, values["name"])
    others = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"tests/test_{slug.replace('-', '_')}.py": "test.py",
    }
    for name, template in others.items():
        _write(folder / name, template, values)
    return [*(folder / name for name in others), module]


def _write(path: Path, template: str, values: dict[str, str]) -> None:
    text = Template((files("peftx_cli") / "templates" / f"{template}.tmpl").read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.substitute(values), encoding="utf-8")


def _options(module: Path, name: str) -> str:
    """The README's option table, from the `Config` that was written."""
    from peftx.composition.options import options_table
    from peftx.composition.outline import outline_of

    plugin = outline_of(str(module), module.stem, name)
    assert plugin is not None, f"{module} has no outline"
    return options_table(plugin.Config)


def _values(
    *, slug: str, hook: str, arxiv: str | None, title: str | None, family: str | None
) -> dict[str, str]:
    """What the templates are filled with."""
    if hook not in HOOKS:
        raise UsageError(
            f"there is no hook '{hook}'", hint=nearest(hook, HOOKS) or f"there are: {', '.join(HOOKS)}"
        )
    if not _SLUG.fullmatch(slug):
        better = "-".join(re.findall(r"[a-z0-9]+", slug.lower())) or "two-words"
        raise UsageError(
            f"'{slug}' is no name for a plugin: lower-case words joined by hyphens", hint=f"try '{better}'"
        )
    if slug in RESERVED or slug[0].isdigit() or portable(slug) != slug:
        raise UsageError(
            f"'{slug}' cannot be a plugin's name",
            hint="a letter first, no word of the spec, and none that cannot name a folder on Windows, such as 'con'",
        )
    if arxiv is not None and not _ARXIV.fullmatch(arxiv := arxiv.removeprefix("arXiv:")):
        raise UsageError(f"'{arxiv}' is no arXiv id", hint="as in 2106.09685")
    if family is not None and not _FAMILY.fullmatch(family):
        raise UsageError(
            f"'{family}' is no family: lower-case words joined by hyphens", hint="as in low-rank"
        )
    words = " ".join(slug.split("-"))
    title = f"{words.capitalize()}, a plugin for peftx" if title is None else " ".join(title.split())
    if not SHORTEST <= len(title) <= LONGEST or title.endswith(".") or set(title) & set('"\\'):
        raise UsageError(
            f"the title has {len(title)} characters; it is one line of {SHORTEST} to {LONGEST}, without a full stop, "
            "quotation marks and backslashes"
        )
    name, module = "".join(word.capitalize() for word in slug.split("-")), f"peftx_{slug.replace('-', '_')}"
    keywords = [
        hook,
        *([f"family:{family}"] if family else []),
        *(["fidelity:equations"] if arxiv else []),  # to what, where there is no paper
        "evidence:not-measured",
        f"arXiv:{arxiv}" if arxiv else "paper:none",
    ]
    return {
        "slug": slug,
        "module": module,
        "name": name,
        "title": title,
        "hook": hook,
        "paper": f"arXiv:{arxiv}" if arxiv else "No paper",
        "keywords": ", ".join(f'"{word}"' for word in keywords),
        "urls": f'\n[project.urls]\nPaper = "https://arxiv.org/abs/{arxiv}"\n' if arxiv else "",
        "fidelity": FIDELITY.format(module) if arxiv else "",
        "departures": "None known." if arxiv else NO_PAPER,
        "cite": _cite(slug, title, arxiv),
        "option": OPTIONS[hook][0],
        "bad": OPTIONS[hook][1],
        "good": OPTIONS[hook][2],
    }


NO_PAPER = "There is no paper."
FIDELITY = """\
**Fidelity: equations.** `src/{}.py` follows the paper's text; it was compared with no other code.

"""
OPTIONS = {
    "prepare_data": ("longest", "0", "64"),
    "inject": ("power", "0", "2"),
    "train_step": ("weight", "-1", "0.1"),
    "compress": ("bits", "1", "4"),
    "decode": ("penalty", "-1", "0.5"),
    "serve": ("max_batch", "0", "4"),
    "evaluate": ("limit", "0", "8"),
}
"""Hook -> an option, a value that it refuses, and one that it takes."""


def _cite(slug: str, title: str, arxiv: str | None) -> str:
    if arxiv is None:
        return NO_PAPER
    entry = (
        f"@misc{{{slug},",
        f"  title = {{{title}}},",
        f"  eprint = {{{arxiv}}},",
        "  archivePrefix = {arXiv}",
        "}",
    )
    return "\n".join(("```bibtex", *entry, "```"))
