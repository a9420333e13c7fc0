"""Every class of errors has a code of its own and a page; what the pages show is raised, and the ways out work."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftx.errors import PeftxError
from peftx_cli.explained import PAGES, codes, page, sentence
from peftx_cli.main import app

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(file for folder in ("spec", "core", "cli") for file in sorted((ROOT / folder).rglob("*.py"))),
    *sorted(ROOT.glob("plugins/*/*/src/**/*.py")),
]
CLASS = r"^ *class (\w+)\(([^)]*)\):"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------------------- the classes
def modules_with_classes() -> Iterator[str]:
    """Those with a class that is derived from an error of ours, known by its base's name.

    They are read, since importing all modules would take a minute.
    """
    texts = {file: file.read_text("utf-8") for file in SOURCES}
    bases = {file: re.findall(CLASS, text, re.MULTILINE) for file, text in texts.items()}
    known: set[str] = set()
    new = {"PeftxError"}
    while new:
        known |= new
        new = {
            name for found in bases.values() for name, of in found if known & {*re.findall(r"\w+", of)}
        } - known
    for file, found in bases.items():
        if known & {name for name, _ in found}:
            root = next(each for each in file.parents if each.name in ("spec", "core", "cli", "src"))
            yield ".".join(file.relative_to(root).with_suffix("").parts)


def classes_of_ours() -> list[type[PeftxError]]:
    for module in modules_with_classes():
        importlib.import_module(module)
    found, waiting = [PeftxError], [PeftxError]
    while waiting:
        new = [each for each in waiting.pop().__subclasses__() if each.__module__.startswith("peftx")]
        found += new
        waiting += new
    return list(dict.fromkeys(found))


CLASSES = classes_of_ours()


def test_the_walk_finds_them_where_they_stand() -> None:
    places = {each.__module__ for each in CLASSES}
    assert places >= {
        "peftx_spec.errors",
        "peftx_spec.problems",
        "peftx.errors",
        "peftx.toolkits.serving.worker",
    }


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_a_class_has_a_code_of_its_own_and_a_page(error: type[PeftxError]) -> None:
    assert "code" in vars(error), "it has that of its base"
    assert re.fullmatch("[a-z]+(-[a-z]+)*", error.code)
    assert [each for each in CLASSES if each.code == error.code] == [error]
    said = " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())
    assert sentence(error.code) == said, "the page begins with what the class says of itself"


def test_every_page_is_that_of_a_class() -> None:
    assert set(codes()) == {error.code for error in CLASSES}


def test_no_error_is_raised_without_a_class_of_its_own() -> None:
    """Also none that is handed over: `job.finish(None, PeftxError(...))`."""
    texts = {file: file.read_text("utf-8") for file in SOURCES}
    plain = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file, text in texts.items()
        if "PeftxError(" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "PeftxError"
    ]
    assert plain == []


def test_an_error_of_another_author_has_the_code_of_what_it_refines() -> None:
    class TheirsError(PeftxError):
        """As peftx 0.2 knew them, without a code."""

    class OwnError(PeftxError):
        code = "their-own"

    from peftx.errors import DataError

    assert (TheirsError("no").code, PeftxError("no").code, OwnError("no").code) == (
        "general",
        "general",
        "their-own",
    )
    assert type("RowsError", (DataError,), {})("no").code == "data"
    assert str(TheirsError("no", hint="yes")) == "no\n  hint: yes", "the code is not in the message"


# ------------------------------------------------------------------------------------------------------------ the pages
@pytest.mark.parametrize("code", codes())
def test_a_page_is_short_and_names_codes_that_there_are(code: str) -> None:
    text = page(code)
    assert text.startswith(f"# {code}\n\n")
    assert 15 <= len(text.splitlines()) <= 45
    assert {*re.findall(r"error\[([\w-]+)\]", text), *re.findall(r"peftx explain ([\w-]+)", text)} <= set(
        codes()
    )
    assert len(re.findall("^## ", text, re.MULTILINE)) >= 2, "the usual causes, each with a heading"


ABSENT = ("fastapi", "wandb")
"""Packages that the page of what is missing says are."""


@pytest.mark.parametrize("code", codes())
def test_what_a_page_shows_is_so(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and Python followed by an error raise it, word for word (`...` stands for anything); the others work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ABSENT if code == "missing-extra" else ():
        monkeypatch.setitem(sys.modules, module, None)
    raised: list[str] = []
    names: dict[str, object] = {"__name__": "page"}
    blocks = BLOCK.findall(page(code))
    for (kind, fence, body), (next_kind, _, told) in zip(blocks, [*blocks[1:], ("", "", "")], strict=True):
        if kind == "console":
            raised += run_commands(body)
        elif kind == "yaml":
            Path(re.findall('^ title="(.+)"$', fence)[0]).write_text(body, "utf-8")
        elif kind == "python":
            raised += run_python(body, told if next_kind == "text" else "", names)
        else:
            assert kind == "text"
    assert code in raised, "no block raises an error of this code"
    assert set(raised) == {code}


def run_commands(body: str) -> Iterator[str]:
    """Runs a block's commands; yields the codes of the errors that it shows."""
    for block in re.split(r"^\$ ", body.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
        command, _, shown = block.partition("\n")
        words = shlex.split(command)
        if words[0] != "peftx":
            subprocess.run(["bash", "-c", command], check=True)
            continue
        result = CliRunner().invoke(app, words[1:])
        if not shown.strip():
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
            continue
        assert result.exit_code == 2, f"{command}\n{result.output}\n{result.exception!r}"
        assert_alike(result.stderr, shown)
        (code,) = re.findall(r"^error\[(.+?)\]: ", shown, re.MULTILINE)
        yield code


def run_python(body: str, told: str, names: dict[str, object]) -> Iterator[str]:
    """Runs a block; `told`: the end of the traceback that it shows, empty where it works."""
    compiled = compile(body, "page", "exec", dont_inherit=True)
    if not told:
        exec(compiled, names)
        return
    with pytest.raises(PeftxError) as caught:
        exec(compiled, names)
    error = caught.value
    assert_alike(f"{type(error).__module__}.{type(error).__qualname__}: {error}", told)
    yield error.code


def assert_alike(printed: str, shown: str) -> None:
    """As the page shows it, where `...` stands for the rest of a line or a part of it."""
    pattern = re.escape(shown.strip()).replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, printed.strip()), f"printed:\n{printed}\nand shown:\n{shown}"


def test_a_stale_page_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    right = "$ peftx validate nowhere.yaml\nerror[file]: there is no file ...\nmore: peftx explain file\n"
    assert list(run_commands(right)) == ["file"]
    for wrong in (right.replace("file ...", "folder ..."), right.replace("[file]", "[data]"), "$ peftx validate x\n",
                  right.replace("more: peftx explain file\n", ""), "$ peftx list\nerror[file]: no\n"):  # fmt: skip
        with pytest.raises(AssertionError):
            list(run_commands(wrong))
    with pytest.raises(AssertionError):
        list(
            run_python("raise PeftxError('a')", "peftx_spec.errors.PeftxError: b", {"PeftxError": PeftxError})
        )
    with pytest.raises(pytest.fail.Exception):
        list(run_python("1", "peftx_spec.errors.PeftxError: b", {}))


def test_the_page_of_what_is_missing_names_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    ours = {"test", "bench", "docs"}  # of this repository's own work
    assert set(re.findall("`([a-z]+)`", page("missing-extra"))) >= set(extras) - ours


def test_the_site_shows_the_same_files() -> None:
    from pages.shown import shown

    assert set(PAGES.glob("*.md")) <= set(shown(".md"))
    assert "- Errors: cli/peftx_cli/errors/\n" in (ROOT / "mkdocs.yml").read_text("utf-8"), (
        "the folder's pages"
    )
    assert not (ROOT / "docs" / "errors").exists(), "a second truth"
