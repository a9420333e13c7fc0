"""Plugins that are installed for one test, and the command line run in this process or in another one."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from peftx_cli.main import app
from peftx_cli.scaffold import write

ROOT = Path(__file__).parents[2]


@dataclass
class Installed:
    """A folder on the path where distributions appear as pip would leave them, and a working directory."""

    site: Path
    work: Path

    def publish(
        self,
        name: str,
        source: str,
        *,
        target: str = "Fake",
        distribution: str | None = None,
        keywords: Sequence[str] = ("inject",),
        requires: Sequence[str] = (),
        readme: str = "",
        module: str = "{}",
    ) -> str:
        """Install a plugin of one module, or of a package that is still to be written, as of `{}.inner`; returns the
        name of the top-level module."""
        distribution = distribution or f"peftx-{name}"
        top = distribution.replace("-", "_")
        if module == "{}":
            (self.site / f"{top}.py").write_text(source, encoding="utf-8")
        metadata = [
            "Metadata-Version: 2.4",
            f"Name: {distribution}",
            "Version: 0.1.0",
            f"Summary: A fake {name}",
        ]
        metadata += [f"Keywords: {','.join(keywords)}", *(f"Requires-Dist: {line}" for line in requires)]
        self._info(distribution, "\n".join([*metadata, "", readme]), {name: f"{module.format(top)}:{target}"})
        return top

    def publish_several(
        self,
        distribution: str,
        points: dict[str, str],
        sources: dict[str, str],
        *,
        keywords: Sequence[str] = (),
    ) -> None:
        """Install a distribution of several plugins. `points`: name -> module:class. `sources`: module -> text."""
        for module, source in sources.items():
            (self.site / f"{module}.py").write_text(source, encoding="utf-8")
        lines = [
            "Metadata-Version: 2.4",
            f"Name: {distribution}",
            "Version: 0.1.0",
            "Summary: A fake of several",
        ]
        self._info(distribution, "\n".join([*lines, f"Keywords: {','.join(keywords)}", ""]), points)

    def scaffold(self, slug: str, hook: str) -> Path:
        """Install what `peftx new` writes; returns the folder."""
        folder = self.site.parent / "plugins" / hook / slug
        write(
            folder,
            slug=slug,
            hook=hook,
            arxiv="2101.00001",
            title=f"A {hook} plugin of the tests",
            family="fake",
        )
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
        lines += [f"Summary: {project['description']}", f"Keywords: {','.join(project['keywords'])}"]
        lines += [f"Requires-Dist: {line}" for line in project["dependencies"]]
        text = "\n".join([*lines, "", (folder / "README.md").read_text("utf-8")])
        self._info(project["name"], text, project["entry-points"]["peftx.plugins"])
        for file in (folder / "src").iterdir():
            (self.site / file.name).write_bytes(file.read_bytes())
        return folder

    def _info(self, distribution: str, metadata: str, points: dict[str, str]) -> None:
        folder = self.site / f"{distribution.replace('-', '_')}-0.1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[peftx.plugins]", *lines, ""]), encoding="utf-8")

    def files(self) -> dict[str, bytes]:
        """Everything under the working directory, to see that a command wrote nothing."""
        return {str(p.relative_to(self.work)): p.read_bytes() for p in self.work.rglob("*") if p.is_file()}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """An empty site folder on the path, here and in child processes; the working directory is empty too."""
    world = Installed(tmp_path / "site", tmp_path / "work")
    world.site.mkdir()
    world.work.mkdir()
    monkeypatch.syspath_prepend(str(world.site))
    monkeypatch.chdir(world.work)
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path / "cache"))
    roots = [str(world.site), *(str(ROOT / name) for name in ("core", "spec", "cli"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("PEFTX_DISABLE_PLUGINS", raising=False)
    before = set(sys.modules)
    yield world
    for name in set(sys.modules) - before:
        if name.startswith(("peftx_fake", "peftx_test_")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes at its end is half of what a short one costs."""
    monkeypatch.setattr("peftx_cli.summary.SAMPLE_TOKENS", 4)


@pytest.fixture
def run() -> Callable[..., Result]:
    """`run("list", "--json")` in this process."""

    def invoke(*words: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, list(words), input=input)

    return invoke


@pytest.fixture
def ok(run: Callable[..., Result]) -> Callable[..., str]:
    """`ok("list")`: the command's stdout; fails where the exit code is not 0."""

    def invoke(*words: str, input: str | None = None) -> str:
        result = run(*words, input=input)
        assert result.exit_code == 0, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        return result.stdout

    return invoke


@pytest.fixture
def ok_json(ok: Callable[..., str]) -> Callable[..., Any]:
    """As `ok`, and reads the output as JSON."""
    return lambda *words: json.loads(ok(*words))


@pytest.fixture
def refused(run: Callable[..., Result], installed: Installed) -> Callable[..., str]:
    """`refused("plan", "--plugin", "nope")`: stderr of a command that exits with 2 and leaves every file as it was."""

    def invoke(*words: str) -> str:
        before = installed.files()
        result = run(*words)
        assert result.exit_code == 2, (
            f"exit code {result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
        )
        assert installed.files() == before, "the command wrote something"
        assert "Traceback" not in result.stderr
        return str(result.stderr)

    return invoke


def child(*words: str, python: Sequence[str] = ("-m", "peftx_cli")) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, *python, *words], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def spawn() -> Callable[..., subprocess.CompletedProcess[str]]:
    return child


def terminal(*words: str) -> str:
    """Everything that a command shows where stdout and stderr are a terminal of 100 columns."""
    control, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen([sys.executable, *words], stdout=other, stderr=other, env=environment)
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(control, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        shown += piece
    process.wait(60)
    os.close(control)
    return shown.decode("utf-8")


@pytest.fixture
def on_a_terminal() -> Callable[..., str]:
    return terminal
