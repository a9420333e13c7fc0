"""Locks, and all that imports them where the system has no fcntl, as on Windows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftx.engines import locks
from peftx.engines.files import replacing

WITHOUT = """
import os, sys, warnings
sys.modules["fcntl"] = None  # so that importing it fails
del os.O_NONBLOCK
warnings.simplefilter("ignore")
"""


@pytest.fixture(params=["fcntl", "beside"])
def lock(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[[], None]]:
    """As it is here, and as it is where there is no fcntl; filelock then takes what the system has."""
    if request.param == "beside":
        monkeypatch.setattr(locks, "LOCKS_FOLDERS", False)
    return locks.lock


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_holds_it_at_a_time(kind: str, lock: Callable[..., Callable[[], None]], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir() if kind == "folder" else place.touch()
    unlock = lock(place, wait=False)
    with pytest.raises(BlockingIOError):
        lock(place, wait=False)
    unlock()
    lock(place, wait=False)()
    assert [path.name for path in tmp_path.iterdir()] == ["place"], "nothing is left of a lock"


def test_what_is_gone_is_not_locked(lock: Callable[..., Callable[[], None]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "place")


def test_who_writes_is_not_disturbed(lock: Callable[..., Callable[[], None]], tmp_path: Path) -> None:
    """And what a killed process left is removed."""
    (tmp_path / ".b.writing-left").mkdir()
    with replacing(tmp_path / "b", marker="x") as slow:
        with replacing(tmp_path / "b", marker="x") as quick:
            (quick / "x").write_text("quick")
        (slow / "x").write_text("slow")
    assert (tmp_path / "b" / "x").read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.slow
def test_a_run_where_there_is_no_fcntl(tmp_path: Path) -> None:
    """`import peftx`, all of the command line, a spec that is read, a bundle that is written and read."""
    code = f"""{WITHOUT}
import peftx, peftx_cli.main, peftx.comparing.run
from pathlib import Path
Path("spec.yaml").write_text("peftx: 1\\nmodel: peftx:tiny\\nstack: [lora]\\nrun: [inject, save]\\noutput: out\\n")
peftx.run("spec.yaml")
print(*peftx.load("out").plugins, *sorted(path.name for path in Path().iterdir()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "lora out spec.yaml\n", done.stderr


def test_peftx_is_imported_without_fcntl() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT}\nimport peftx.engines.files, peftx.comparing.place"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
