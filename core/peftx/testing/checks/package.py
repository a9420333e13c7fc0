"""The package as a stranger gets it."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

from peftx.composition.metadata import MARKS, keyword_values, keywords
from peftx.composition.options import COLUMNS, options_table
from peftx.composition.outline import outline
from peftx.composition.registry import Registry
from peftx.kernel.plugin import hooks_of
from peftx.testing.case import Case
from peftx.testing.checks.check import check
from peftx.testing.fresh import fresh_process
from peftx.testing.subject import Subject

_SECONDS = 2.0


@check(on="package")
def check_imports_quickly(case: Case) -> None:
    """The module imports in a fresh process without a warning, in two seconds of processor time beside torch."""
    report = fresh_process(case.subject, (*case.subject.models, "")[0])
    assert report.import_error is None, report.import_error
    assert report.import_seconds <= _SECONDS, (
        f"importing takes {report.import_seconds:.1f} s, allowed {_SECONDS} s"
    )


def _source_tree(subject: Subject) -> Path | None:
    file = Path(inspect.getfile(subject.plugin))
    folder = file.parent if file.name != "__init__.py" else file.parent.parent
    return folder.parent if folder.name == "src" else None


@check(on="package", when=lambda subject: _source_tree(subject) is not None)
def check_package_is_whole(case: Case) -> None:
    """In a source tree: README, and a pyproject whose entry point and keywords agree with the class."""
    root = _source_tree(case.subject)
    assert root is not None
    assert (root / "README.md").exists(), f"{root} has no README.md"
    assert (root / "pyproject.toml").exists(), f"{root} has no pyproject.toml"
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project.get("entry-points", {}).get("peftx.plugins", {})
    plugin = case.subject.plugin
    value = f"{plugin.__module__}:{plugin.__qualname__}"
    assert value in points.values(), f"no entry point of peftx.plugins is {value}: {points}"
    words = project.get("keywords", [])
    silent = sorted(case.subject.hooks - set(words))
    assert not silent, f"keywords of pyproject.toml lack the hooks {', '.join(silent)}"
    named, known = set(keyword_values(words, "peft")), {format.type for format in plugin.peft}
    assert named == known, f"keywords say peft: {sorted(named)}, and the class {sorted(known)}"


@check(on="package")
def check_marks_are_known(case: Case) -> None:
    """Of fidelity and evidence, as `peftx list` shows them, the package names at most one value that there is."""
    words = _words(case.subject)
    for mark, values in MARKS.items():
        named = keyword_values(words, mark)
        for value in named:
            known = ", ".join(f"{mark}:{value}" for value in values)
            assert value in values, f"the keyword '{mark}:{value}' is none of {known}"
        assert len(named) < 2, f"the keywords name more than one {mark}: {', '.join(named)}"


def _words(subject: Subject) -> list[str]:
    """The package's keywords: of its source tree, which may be newer than what is installed, or of the installation."""
    root = _source_tree(subject)
    if root is not None and (root / "pyproject.toml").exists():
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return list(project.get("keywords", ()))
    registry = Registry(disabled=())
    name = registry.name_of(subject.plugin)
    return [] if name is None else keywords(registry.point(name))


def _readme(subject: Subject) -> str:
    """The package's README: of its source tree, or of the installation; empty where it brings none."""
    root = _source_tree(subject)
    if root is not None and (root / "README.md").exists():
        return (root / "README.md").read_text(encoding="utf-8")
    registry = Registry(disabled=())
    name = registry.name_of(subject.plugin)
    return "" if name is None else registry.describe(name).readme


@check(on="package", when=lambda subject: COLUMNS in _readme(subject))
def check_readme_has_the_options(case: Case) -> None:
    """The option table of the README, where it has one with the columns of `peftx new`, is that of `Config`."""
    table = options_table(case.subject.plugin.Config)
    assert f"\n{table}\n\n" in f"{_readme(case.subject)}\n\n", (
        f"the options of the README are not those of Config, which are\n\n{table}"
    )


READ = (
    "architectures",
    "example",
    "example_rows",
    "exempt",
    "gives",
    "labels_option",
    "refuses",
    "sources",
    "takes",
)


@check(on="package")
def check_outline_says_the_same(case: Case) -> None:
    """Options, hooks and claims are those that `peftx validate` reads off the file without importing it."""
    plugin = case.subject.plugin
    read = outline(plugin.__module__, plugin.__qualname__)
    if read is None:
        return  # it is imported then, which takes its seconds
    assert read.Config.model_json_schema() == plugin.Config.model_json_schema(), "the options differ"
    assert hooks_of(read) == hooks_of(plugin), "the hooks differ"
    for options in (plugin.example, case.subject.options):
        found, claims = read(**options).claims, plugin(**options).claims
        assert found == claims, (
            f"claims of {options}: {sorted(found)} in the file, {sorted(claims)} of the class"
        )
    for name in READ:
        assert getattr(read, name) == getattr(plugin, name), f"{name} differs; set it in the class"


CHECKS = (
    check_imports_quickly,
    check_package_is_whole,
    check_marks_are_known,
    check_readme_has_the_options,
    check_outline_says_the_same,
)
