"""What is released, and an environment without a source tree to try it in."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = """
import os, sys
from importlib import import_module
folder, backend, output = sys.argv[1:]
os.chdir(folder)
print(import_module(backend).build_wheel(output))
"""


def outside(
    *words: str | Path, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command without PYTHONPATH, which may lead to the source tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONDONTWRITEBYTECODE"] = (
        "1"  # modules of libraries are links to the running environment's
    )
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def done(*words: str | Path, cwd: Path | None = None) -> str:
    """Stdout of such a command, which succeeds."""
    result = outside(*words, cwd=cwd)
    assert result.returncode == 0, f"{' '.join(map(str, words))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all distributions, as `make dist` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, ROOT / "tools/dist.py", "--output", folder)
    return folder


@pytest.fixture
def build() -> Callable[[Path, str, Path], Path]:
    """`build(folder, backend, output)`: a wheel of a folder, by its backend."""

    def wheel(folder: Path, backend: str, output: Path) -> Path:
        output.mkdir(exist_ok=True)
        return output / done(sys.executable, "-c", BUILD, folder, backend, output).splitlines()[-1]

    return wheel


@dataclass
class Bare:
    """An environment with the running one's libraries and nothing of ours, and an empty working directory."""

    python: Path
    work: Path

    def install(self, *wheels: str | Path, index: Path) -> None:
        pip = (self.python, "-m", "pip", "--disable-pip-version-check")
        done(*pip, "install", "-q", "--no-index", "--find-links", index, *wheels, cwd=self.work)

    def peftx(self, *words: str) -> str:
        return done(self.python.parent / "peftx", *words, cwd=self.work)

    def run(self, code: str) -> str:
        return done(self.python, "-c", code, cwd=self.work)

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """A command of a page, as somebody types it who has activated the environment and is offline."""
        name, *words = shlex.split(line)
        variables = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip reads 0 as: without isolation
        return outside(self.python.parent / name, *words, cwd=self.work, **variables)


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    """Each distribution of the running environment is linked into it, but for ours and for `.pth` files, by which
    editable installs put source trees on the path."""
    folder = tmp_path / "bare"
    venv.EnvBuilder(symlinks=True).create(folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = folder / "lib" / version / "site-packages"
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for path in (path for place in places for path in Path(place).iterdir()):
        if not path.name.startswith(("peftx", "__pycache__")) and path.suffix != ".pth":
            (target / path.name).symlink_to(path)
    (tmp_path / "work").mkdir()
    return Bare(folder / "bin" / "python", tmp_path / "work")
