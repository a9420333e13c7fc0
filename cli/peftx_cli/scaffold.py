"""Plugin folders from templates: every file that the structure test asks for, and a small method that works."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from peftx.errors import UsageError
from peftx_spec.errors import FileError, nearest

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
    module = values["module"]
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{module}.py": f"{hook}.py",
        f"tests/test_{slug.replace('-', '_')}.py": "test.py",
    }
    texts = {folder / name: _fill(template, values) for name, template in templates.items()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _fill(template: str, values: dict[str, str]) -> str:
    return Template((files("peftx_cli") / "templates" / f"{template}.tmpl").read_text("utf-8")).substitute(
        values
    )


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
    if slug in RESERVED or slug[0].isdigit():
        raise UsageError(
            f"'{slug}' cannot be a plugin's name", hint="a letter first, and no word of the spec"
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
    name = "".join(word.capitalize() for word in slug.split("-"))
    keywords = [
        hook,
        *([f"family:{family}"] if family else []),
        "fidelity:equations",
        "evidence:not-measured",
    ]
    keywords.append(f"arXiv:{arxiv}" if arxiv else "paper:none")
    return {
        "slug": slug,
        "module": f"peftx_{slug.replace('-', '_')}",
        "name": name,
        "title": title,
        "hook": hook,
        "paper": f"arXiv:{arxiv}" if arxiv else "No paper",
        "keywords": ", ".join(f'"{word}"' for word in keywords),
        "urls": f'\n[project.urls]\nPaper = "https://arxiv.org/abs/{arxiv}"\n' if arxiv else "",
        "cite": _cite(slug, title, arxiv),
        "option": OPTIONS[hook][0],
        "bad": OPTIONS[hook][1],
        "good": OPTIONS[hook][2],
        "options": OPTIONS[hook][3],
    }


OPTIONS = {
    "prepare_data": ("longest", "0", "64", "| `longest` | int (>= 2) | 256 | tokens that a row may have |"),
    "inject": (
        "power",
        "0",
        "2",
        (
            "| `power` | int (>= 1) | 1 | p, the exponent of the gains |\n"
            "| `targets` | Targets | all | linear layers to scale |"
        ),
    ),
    "train_step": ("weight", "-1", "0.1", "| `weight` | float (>= 0) | 0.01 | of the penalty in the loss |"),
    "compress": (
        "bits",
        "1",
        "4",
        "| `bits` | int (>= 2, <= 8) | 8 | of a weight |\n| `targets` | Targets | all | linear layers to quantize |",
    ),
    "decode": (
        "penalty",
        "-1",
        "0.5",
        "| `penalty` | float (>= 0) | 1.0 | taken from the logit of the last token |",
    ),
    "serve": ("max_batch", "0", "4", "| `max_batch` | int (>= 1) | 4 | requests that run together at most |"),
    "evaluate": ("limit", "0", "8", "| `limit` | int (>= 1) | 64 | rows to measure on |"),
}
"""Hook -> an option, a value that it refuses, one that it takes, and the README's rows."""


def _cite(slug: str, title: str, arxiv: str | None) -> str:
    if arxiv is None:
        return "There is no paper."
    entry = (
        f"@misc{{{slug},",
        f"  title = {{{title}}},",
        f"  eprint = {{{arxiv}}},",
        "  archivePrefix = {arXiv}",
        "}",
    )
    return "\n".join(("```bibtex", *entry, "```"))
