"""Every folder `plugins/<hook>/<slug>/` is complete and says the same thing everywhere.

The folders are the only list of plugins that there is; this file derives everything from them.
"""

from __future__ import annotations

import ast
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx.composition.metadata import MARKS, keyword_values
from peftx.kernel.names import GROUP, HOOKS, SAMPLERS

PLUGINS = Path(__file__).parents[2] / "plugins"
HEADINGS = (
    "What it does",
    "Use",
    "Options",
    "The method",
    "What we measured",
    "Departures from the paper",
    "Cite",
)
GROUPS = {**dict.fromkeys(HOOKS, GROUP), "search": SAMPLERS}
"""Folder of `plugins/` -> the entry point group of its packages: hooks, and the samplers of `peftx search`."""
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7})")
RESERVED = ("spec", "cli")  # peftx-spec and peftx_cli are not plugins


# ------------------------------------------------------------------------------------------------ reading a folder
def headings(readme: str) -> list[str]:
    """The second-level headings, in order; what looks like one inside a code block is none."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", readme, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^## +(.+?) *$", prose, flags=re.MULTILINE)


def module_file(folder: Path, module: str) -> Path | None:
    for path in (folder / "src" / f"{module}.py", folder / "src" / module / "__init__.py"):
        if path.is_file():
            return path
    return None


def top_level_names(source: str) -> set[str]:
    """Classes that a module defines, and names that it imports from somewhere."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def problems(folder: Path) -> list[str]:
    """What is missing or contradictory in one plugin folder; empty when it is complete."""
    hook, slug = folder.parent.name, folder.name
    module = f"peftx_{slug.replace('-', '_')}"
    found = []
    if hook not in GROUPS:
        found.append(f"folder {hook!r} is no hook; hooks: {', '.join(GROUPS)}")
    if not SLUG.fullmatch(slug) or slug in RESERVED:
        found.append(f"slug {slug!r}: lower-case words joined by hyphens, and none of {RESERVED}")
    if not (folder / "pyproject.toml").is_file():
        return [*found, "pyproject.toml is missing"]
    try:
        metadata = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        return [*found, f"pyproject.toml: {error}"]

    code = module_file(folder, module)
    names = top_level_names(code.read_text("utf-8")) if code is not None else set()
    if code is None:
        found.append(f"src/{module}.py (or src/{module}/__init__.py) is missing")
    elif [path.name for path in (folder / "src").glob("[!_.]*")] not in ([f"{module}.py"], [module]):
        found.append(f"src/ holds more than {module}: one package, one module")
    return found + metadata_problems(metadata, hook, slug, names) + text_problems(folder, slug, module)


def metadata_problems(metadata: dict[str, Any], hook: str, slug: str, names: set[str]) -> list[str]:
    """`names`: what the entry point may name."""
    found = []
    module = f"peftx_{slug.replace('-', '_')}"
    project = metadata.get("project", {})

    def expect(place: str, got: object, wanted: object) -> None:
        if got != wanted:
            found.append(f"{place} is {got!r}, not {wanted!r}")

    expect(
        "build-system.build-backend",
        metadata.get("build-system", {}).get("build-backend"),
        "flit_core.buildapi",
    )
    expect("project.name", project.get("name"), f"peftx-{slug}")
    expect("project.readme", project.get("readme"), "README.md")
    expect("project.requires-python", project.get("requires-python"), ">=3.11")
    expect("project.license", project.get("license"), "Apache-2.0")
    expect("project.dynamic", project.get("dynamic"), None)
    if not re.fullmatch(r"\d+\.\d+\.\d+", str(project.get("version"))):
        found.append(f"project.version is {project.get('version')!r}, not like '0.1.0'")
    description = project.get("description", "")
    if not 10 <= len(description) <= 120 or description.endswith("."):
        found.append(
            f"project.description is {description!r}: one line of 10 to 120 characters, no full stop"
        )

    dependencies = project.get("dependencies", [])
    if not any(re.fullmatch(r"peftx *>=[\d.]+, *<[\d.]+", line) for line in dependencies):
        found.append(
            f"project.dependencies is {dependencies!r}: it needs peftx with both bounds, 'peftx>=0.2,<0.3'"
        )
    found += [
        f"{line!r} pins a sibling: give a range" for line in dependencies if re.match(r"peftx[^=]*==", line)
    ]

    keywords = project.get("keywords", [])
    papers = [word for word in keywords if ARXIV.fullmatch(word)]
    marks = [f"{mark}:{value}" for mark, values in MARKS.items() for value in values]
    known = (*GROUPS, *papers, *marks, "paper:none")
    free = re.compile(r"family:.*|peft:[A-Z0-9_]+")
    strange = [word for word in keywords if word not in known and not free.fullmatch(word)]
    if hook not in keywords:
        found.append(f"project.keywords lacks the hook {hook!r}")
    if (not papers and "paper:none" not in keywords) or (papers and "paper:none" in keywords):
        found.append("project.keywords needs 'arXiv:<id>' or 'paper:none', and not both")
    if sum(word.startswith("family:") for word in keywords) > 1:
        found.append("project.keywords names more than one family")
    if strange:
        found.append(
            f"project.keywords: {strange} are none of: a hook, family:..., peft:..., arXiv:..., paper:none, "
            f"{', '.join(marks)}"
        )
    found += [
        f"project.keywords needs one {mark}:..., of {', '.join(values)}"
        for mark, values in MARKS.items()
        if (papers or mark != "fidelity") and len(keyword_values(keywords, mark)) != 1
    ]
    if not papers and keyword_values(keywords, "fidelity"):
        found.append("project.keywords names a fidelity, and no paper to which the plugin could be true")
    if papers:
        urls = [f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" for paper in papers]
        if project.get("urls", {}).get("Paper") not in urls:
            found.append(f"project.urls.Paper is not {urls[0]}")

    groups = project.get("entry-points", {})
    group = GROUPS.get(hook, GROUP)
    expect("the entry point groups", sorted(groups), [group])
    points = groups.get(group, {})
    expect("the entry points", sorted(points), [slug])
    target = points.get(slug, "")
    if re.fullmatch(rf"{module}:[A-Z]\w*", target) is None:
        found.append(f"the entry point is {target!r}, not '{module}:<Class>'")
    elif names and target.partition(":")[2] not in names:
        found.append(f"the entry point names {target}, which {module} does not define")

    tools = sorted(set(metadata.get("tool", {})) - {"flit"})
    if tools:
        found.append(
            f"[tool] has {tools}: tool settings live in the root pyproject, what `peftx list` shows in keywords"
        )
    return found


def text_problems(folder: Path, slug: str, module: str) -> list[str]:
    found = []
    readme, test = folder / "README.md", folder / "tests" / f"test_{slug.replace('-', '_')}.py"
    if not readme.is_file():
        found.append("README.md is missing")
    else:
        text = readme.read_text("utf-8")
        if not text.startswith(f"# {slug}\n"):
            found.append(f"README.md does not begin with '# {slug}', the name that everybody types")
        if headings(text) != list(HEADINGS):
            found.append(f"README.md has the headings {headings(text)}, not {list(HEADINGS)}")
    if not test.is_file():
        found.append(f"tests/{test.name} is missing")
    elif folder.parent.name in HOOKS and not runs_the_kit(test.read_text("utf-8"), slug):
        found.append(
            f'tests/{test.name} does not say test_conformance = conformance("{slug}"), once and with nothing further: '
            "what the kit must know of the plugin stands in its class, where `peftx check` finds it"
        )
    return found


def runs_the_kit(source: str, slug: str) -> bool:
    """Does a test file run what `peftx check` runs: the plugin's name, and the kit's `conformance` alone."""
    lines = [ast.unparse(node) for node in ast.parse(source).body]
    imported = any(
        re.fullmatch(r"from peftx\.testing import (.*, )?conformance(, .*)?", line) for line in lines
    )
    named = [line for line in lines if re.search(r"\btest_conformance\b", line)]
    return imported and named == [f"test_conformance = conformance({slug!r})"]


def plugin_folders(root: Path) -> list[Path]:
    """Every folder two levels down, whether it is complete or not; caches left by removed plugins do not count."""
    return sorted(
        folder
        for folder in root.glob("[!_.]*/[!_.]*/")
        if any(path.is_file() and "__pycache__" not in path.parts for path in folder.rglob("*"))
    )


# ------------------------------------------------------------------------------------------------------- the tests
@pytest.mark.parametrize("hook", GROUPS)
def test_every_plugin_folder_is_complete(hook: str) -> None:
    folders = [folder for folder in plugin_folders(PLUGINS) if folder.parent.name == hook]
    report = [f"plugins/{hook}/{folder.name}: {line}" for folder in folders for line in problems(folder)]
    assert not report, "\n" + "\n".join(report)


def test_no_folder_escapes_the_test_above() -> None:
    checked = [folder for folder in plugin_folders(PLUGINS) if folder.parent.name in GROUPS]
    described = [path.parent for path in PLUGINS.glob("**/pyproject.toml")]
    assert sorted(described) == checked, (
        "a pyproject.toml lies outside plugins/<hook>/<slug>/, or a folder has none"
    )


def test_a_name_is_claimed_once() -> None:
    slugs = [folder.name for folder in plugin_folders(PLUGINS)]
    assert not {slug for slug in slugs if slugs.count(slug) > 1}


# ------------------------------------------------------------------- the check itself: each defect is seen, and named
PYPROJECT = """
[build-system]
requires = ["flit_core>=3.11,<5"]
build-backend = "flit_core.buildapi"

[project]
name = "peftx-two-words"
version = "0.1.0"
description = "Two words: an example of a complete folder"
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
keywords = ["inject", "family:example", "fidelity:equations", "evidence:not-measured", "arXiv:2101.00001"]
dependencies = ["peftx>=0.2,<0.3"]

[project.urls]
Paper = "https://arxiv.org/abs/2101.00001"

[project.entry-points."peftx.plugins"]
two-words = "peftx_two_words:TwoWords"
"""


KIT = """
from peftx.testing import conformance

test_conformance = conformance("two-words")
test_conformance_of_a_variant = conformance("two-words", options={"words": 3}, not_on={"t5": "two towers"})
"""


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    folder = tmp_path / "inject" / "two-words"
    (folder / "src").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT, "utf-8")
    (folder / "src" / "peftx_two_words.py").write_text("class TwoWords: ...\n", "utf-8")
    (folder / "tests" / "test_two_words.py").write_text(KIT, "utf-8")
    body = "".join(f"## {heading}\n\n```yaml\n## not a heading\n```\n" for heading in HEADINGS)
    (folder / "README.md").write_text(f"# two-words\n\n{body}", "utf-8")
    return folder


def test_a_complete_folder_has_no_problems(complete: Path) -> None:
    assert problems(complete) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("flit_core.buildapi", "hatchling.build", "build-backend"),
        ('"peftx-two-words"', '"peftx-two"', "project.name"),
        ('"0.1.0"', '"1"', "project.version"),
        ("Two words: an example", "Two.\\nwords" + "x" * 120, "project.description"),
        ('keywords = ["inject", ', 'keywords = ["decode", ', "lacks the hook"),
        (', "arXiv:2101.00001"', "", "arXiv:<id>"),
        (', "arXiv:2101.00001"', ', "arXiv:2101.1"', "are none of"),
        ('"family:example"', '"paper:none"', "not both"),
        (', "arXiv:2101.00001"', ', "paper:none"', "no paper to which"),
        ("abs/2101.00001", "abs/2101.00002", "project.urls.Paper"),
        (">=0.2,<0.3", ">=0.2", "both bounds"),
        (">=0.2,<0.3", "==0.2", "pins a sibling"),
        ("two-words = ", "two_words = ", "entry points"),
        (":TwoWords", ":Other", "does not define"),
        ('"peftx_two_words:', '"peftx_two:', "the entry point is"),
        ("fidelity:equations", "fidelity:exact", "['fidelity:exact'] are none of"),
        (', "fidelity:equations"', "", "needs one fidelity:..., of equal, equations, reconstruction"),
        (', "evidence:not-measured"', "", "needs one evidence:..., of shown, not-shown, not-measured"),
        (', "evidence:', ', "evidence:shown", "evidence:', "needs one evidence"),
        ('"family:example"', '"tier:gold"', "['tier:gold'] are none of"),
        ('"family:example"', '"peft:lora"', "['peft:lora'] are none of"),
        ("[project.urls]", "[tool.ruff]\n[project.urls]", "root pyproject"),
        ("[project]", "[project", "pyproject.toml"),
    ],
)
def test_wrong_metadata_is_named(complete: Path, old: str, new: str, named: str) -> None:
    assert PYPROJECT.count(old) >= 1
    (complete / "pyproject.toml").write_text(PYPROJECT.replace(old, new), "utf-8")
    assert any(named in line for line in problems(complete)), problems(complete)


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "README.md", "src/peftx_two_words.py", "tests/test_two_words.py"]
)
def test_a_missing_file_is_named(complete: Path, name: str) -> None:
    (complete / name).unlink()
    assert any(f"{name}" in line and "missing" in line for line in problems(complete))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("README.md", lambda text: text.replace("## Options", "## Settings"), "headings"),
        ("README.md", lambda text: text + "## More\n", "headings"),
        ("README.md", lambda text: text.removeprefix("# "), "'# two-words'"),
        ("README.md", lambda text: text.replace("# two-words", "# Two words"), "'# two-words'"),
        ("tests/test_two_words.py", lambda text: text.replace("two-words", "other"), "conformance"),
    ],
)
def test_wrong_text_is_named(complete: Path, name: str, change: Callable[[str], str], named: str) -> None:
    path = complete / name
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    assert any(named in line for line in problems(complete))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('conformance("two-words")', 'conformance("two-words", not_on={"t5": "two towers"})'),
        ('conformance("two-words")', 'conformance("two-words", **OPTIONS)'),
        ('conformance("two-words")', 'conformance("other")'),
        ('test_conformance = conformance("two-words")', 'test_it = conformance("two-words")'),
        (
            'test_conformance = conformance("two-words")',
            'if SLOW:\n    test_conformance = conformance("two-words")',
        ),
        ("from peftx.testing import conformance", "from helpers import conformance"),
        ("from peftx.testing import conformance", "from peftx.testing import other as conformance"),
        ("test_conformance_of_a_variant =", "test_conformance ="),
        ("test_conformance_of_a_variant =", "test_conformance: object ="),
    ],
)
def test_a_suite_that_runs_other_checks_than_the_command_is_named(complete: Path, old: str, new: str) -> None:
    assert KIT.count(old) >= 1
    (complete / "tests" / "test_two_words.py").write_text(KIT.replace(old, new), "utf-8")
    assert any("nothing further" in line for line in problems(complete))


def test_a_sampler_has_a_group_of_its_own_and_no_kit(complete: Path) -> None:
    folder = complete.parents[1] / "search" / "two-words"
    shutil.copytree(complete, folder)
    text = PYPROJECT.replace('keywords = ["inject"', 'keywords = ["search"')
    (folder / "tests" / "test_two_words.py").write_text("", "utf-8")
    (folder / "pyproject.toml").write_text(text, "utf-8")
    assert problems(folder)[0] == "the entry point groups is ['peftx.plugins'], not ['peftx.samplers']"
    (folder / "pyproject.toml").write_text(text.replace("peftx.plugins", "peftx.samplers"), "utf-8")
    assert problems(folder) == []


def test_wrong_places_are_named(complete: Path) -> None:
    (complete / "src" / "helpers.py").touch()
    assert any("holds more than" in line for line in problems(complete))
    assert any("is no hook" in line for line in problems(complete.parents[1] / "injekt" / "two-words"))
    assert any("slug" in line for line in problems(complete.parents[1] / "inject" / "Two_Words"))
    assert any("slug" in line for line in problems(complete.parents[1] / "inject" / "spec"))
