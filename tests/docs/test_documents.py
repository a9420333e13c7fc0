"""The documents' Python runs, their pipelines are valid and their commands exist, and every hook is documented with its
exact signature. Pipelines and commands run in test_runs.py."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pages import figures
from pages.blocks import Block, commands
from pages.blocks import blocks as blocks_of

from peftx.hooks import HookSpecs
from peftx.kernel.names import HOOKS

ROOT = Path(__file__).parent.parent.parent


def blocks(document: str, language: str) -> list[Block]:
    """Those that do not say in their fence why they cannot run: ```` ```yaml norun="the reason" ````."""
    return [block for block in blocks_of(ROOT / document, ROOT) if block.language == language and block.runs]


def bodies(document: str, language: str) -> list[str]:
    return [block.body for block in blocks(document, language)]


PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)
FOLLOWED = re.compile(f"docs/({'|'.join(figures.FOLLOWED)})/")
"""Pages that tests/docs/test_guides.py follows from top to bottom, with their Python."""
MOST = {"steps": 4, "batch_size": 2}
"""Of a run; that of the README tests/docs/test_front_page.py compares with the other ways to say it."""
LEARN = ("docs/mechanisms/calls.md", "docs/mechanisms/heads.md")
"""Pages that show what a model has learned after all their steps."""


def with_blocks(language: str) -> list[str]:
    return [document for document in DOCUMENTS if blocks(document, language)]


@pytest.mark.parametrize("document", [page for page in with_blocks("python") if not FOLLOWED.match(page)])
def test_python_blocks_run(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shorten: Any
) -> None:
    if document not in LEARN:
        shorten(MOST)
    monkeypatch.chdir(tmp_path)
    for source in (ROOT / document).parent.glob("src"):  # of a distribution in docs/examples
        monkeypatch.syspath_prepend(str(source))
    names: dict[str, object] = {"__name__": "document"}
    code = blocks(document, "python")
    assert code
    for block in code:
        block.execute(names)


ELSEWHERE = ("docs/write-a-plugin.md", "docs/examples/peftx-lora-xs/README.md")
"""Pages on a plugin that is not installed: tests of their own write or install it, and run their pipelines."""


@pytest.mark.parametrize("document", [page for page in with_blocks("yaml") if page not in ELSEWHERE])
def test_yaml_blocks_are_valid(document: str, tmp_path: Path) -> None:
    """Pipelines as they stand; sections of one in a pipeline around them. Files need not be there."""
    from peftx import Registry
    from peftx_spec import load_pipeline
    from peftx_spec.compare_load import load_compare

    around = {"peftx: 1": "peftx: 1\n", "model:": "model: peftx:tiny\n", "stack:": "stack: [lora, nf4]\n",
              "train:": "train: {steps: 1}\n", "data:": "data: {train: 'peftx:sample/train.jsonl'}\n"}  # fmt: skip
    for block in blocks(document, "yaml"):
        body = block.body
        if block.title and FOLLOWED.match(document):
            continue  # a file, which the page's commands read
        if "use: peft\n" in body:
            continue  # reads an adapter, which test_runs.py makes first
        if re.search("^compare:", body, re.MULTILINE):
            (tmp_path / "compare.yaml").write_text(body, "utf-8")
            load_compare(tmp_path / "compare.yaml", catalogue=Registry())
            continue
        if re.search("^(search|task):", body, re.MULTILINE):
            continue  # no pipelines: run, and read, in tests of their own
        missing = [text for key, text in around.items() if not re.search(f"^{key}", body, re.MULTILINE)]
        load_pipeline("".join(missing) + body, catalogue=Registry())


def test_yaml_in_the_readme_is_valid() -> None:
    from peftx.pipeline import load_run

    (text,) = bodies("README.md", "yaml")
    run = load_run(text)
    assert [stage.kind for stage in run.stages] == ["inject", "train", "compress", "evaluate", "save"]


def test_yaml_of_the_training_page_is_valid() -> None:
    from peftx.pipeline import load_run

    text, rates, _ = bodies("docs/training.md", "yaml")  # the last is of rows that are not there
    assert load_run(rates).pipeline.train.learning_rates == {"prompt-tuning": 0.1}  # type: ignore[union-attr]
    settings = load_run(text).pipeline.train
    assert settings is not None
    assert settings.model_fields_set >= {"num_train_epochs", "eval_steps", "bf16", "report_to"}


def test_yaml_of_the_measuring_page_is_valid(tmp_path: Path) -> None:
    from peftx.engines.tasks import find_tasks
    from peftx.pipeline import load_run

    spec, task = bodies("docs/measuring.md", "yaml")
    assert load_run(spec).pipeline.evaluate[0].options.tasks == ("peftx-log", "peftx-opposites")
    (tmp_path / "mine.yaml").write_text(task, "utf-8")
    (tmp_path / "mine.jsonl").write_text("{}", "utf-8")
    assert find_tasks(["mine"], tmp_path)[0].file == tmp_path / "mine.yaml"


SHORTER = {
    "docs/compare.md": {
        "steps: 12": "steps: 1", "[0, 1, 2]": "[0]", "[2, 8]": "[2]", "limit: 12": "limit: 2",
        "[1e-3, 1e-2]": "[1e-2]", "[1e-2, 1e-1]": "[1e-1]",
    },
    "docs/choose/reading.md": {
        "steps: 60": "steps: 1", "[0, 1, 2]": "[0]", "[3e-3, 1e-2]": "[1e-2]", "batch_size: 8": "batch_size: 2",
        '"peftx:sample/held_out.jsonl"': '{path: "peftx:sample/held_out.jsonl", limit: 2}',
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/compare.md", "docs/choose/reading.md"])
def test_a_comparison_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from peftx_cli.main import app

    (text,) = bodies(page, "yaml")
    for long, short in SHORTER[page].items():
        assert long in text
        text = text.replace(long, short)
    monkeypatch.chdir(tmp_path)
    Path("compare.yaml").write_text(text, "utf-8")
    result = CliRunner().invoke(app, ["compare", "compare.yaml", "--output", "results", "-j", "1"])
    assert result.exit_code == 0, result.output
    assert Path("results/index.html").exists()


@pytest.mark.slow
def test_the_search_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed that draws LoRA alone, which takes seconds; compression would take minutes on a busy machine."""
    from typer.testing import CliRunner

    from peftx_cli.main import app

    (text,) = bodies("docs/search.md", "yaml")
    for long, short in (("[10, 60]", "[1, 2]"), ("[2, 64]", "[1, 2]"), ("limit: 64", "limit: 10"),
                        ("limit: 12", "limit: 2"), ("trials: 30", "trials: 1\n  seeds: [0]"),
                        ("token_seconds: 0.1", "token_seconds: 100"),
                        ("  seed: 0", "  seed: 2")):  # fmt: skip
        assert long in text
        text = text.replace(long, short)
    monkeypatch.chdir(tmp_path)
    Path("search.yaml").write_text(text, "utf-8")
    result = CliRunner().invoke(app, ["search", "search.yaml", "--output", "results", "-j", "1"])
    assert result.exit_code == 0, result.output
    assert Path("results/index.html").exists()


READMES = sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("plugins/*/*/README.md"))


@pytest.mark.parametrize("document", [*DOCUMENTS, *READMES])
def test_commands_and_their_options_exist(document: str) -> None:
    from typer.main import get_command

    from peftx_cli.main import app

    """Of blocks that cannot run, too."""
    known: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for block in (block for block in blocks_of(ROOT / document, ROOT) if block.language == "console"):
        for at, line, _ in commands(block):
            program, *words = shlex.split(line, comments=True)
            if program != "peftx":
                continue
            where, name = f"{document}:{at}: {line}", words[0]
            assert name in known, where
            options = {option for parameter in known[name].params for option in parameter.opts}
            assert {word for word in words if re.match("--?[a-z]", word)} <= options | {"-h", "--help"}, where


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_documented_with_its_signature(hook: str) -> None:
    arguments = [name for name in inspect.signature(getattr(HookSpecs, hook)).parameters if name != "self"]
    heading = f"## `{hook}({', '.join(arguments)})`"
    assert heading in (ROOT / "docs/hooks.md").read_text()


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_implemented_by_a_plugin(hook: str) -> None:
    """Every hook has a real plugin in the repository, or a test that runs one."""
    sources = [*ROOT.glob("plugins/*/*/src/*.py"), *ROOT.glob("tests/core/*.py")]
    texts = (path.read_text("utf-8") for path in sources)
    there = (text for text in texts if f"def {hook}(" in text)  # the others need no parsing, which takes long
    assert any(
        isinstance(node, ast.FunctionDef) and node.name == hook and _is_hookimpl(node)
        for text in there
        for node in ast.walk(ast.parse(text))
    )


def _is_hookimpl(node: ast.FunctionDef) -> bool:
    return any("hookimpl" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_the_install_page_names_the_extras_and_those_that_a_checkout_lacks() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    default = re.search(r"DEFAULT_EXTRAS = \((.*?)\)", (ROOT / "tools/dev_install.py").read_text("utf-8"))
    assert default is not None
    page = (ROOT / "docs/start/install.md").read_text("utf-8").split("## Extras")[1].split("\n## ")[0]
    said, table = page.split("| extra | for |")
    named = set(
        re.findall(r"`([a-z]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    assert named == extras.keys() - {"test", "bench", "docs"}
    lacking = said.split("A wheel")[0].split("all but")[1].split(":")[0]
    assert set(re.findall(r"`([a-z]+)`", lacking)) == extras.keys() - set(re.findall(r'"(\w+)"', default[1]))
