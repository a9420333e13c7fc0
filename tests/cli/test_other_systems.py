"""The command line where Python has no Unix: no modules and no functions that Windows lacks.

A folder on the path of every process, those of a comparison too, takes them away before anything else is imported.
Libraries of this machine stand on some of them, so psutil comes before, and what torch and numpy ask for stays. What
the code asks for is read off it as well.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from peftx.comparing.sheet import paid
from peftx.comparing.table import TableRow
from peftx.engines.machine import cores, free_memory, peak_memory
from peftx.errors import UnsupportedError
from peftx.testing import attempt

ROOT = Path(__file__).parents[2]
WITHOUT = """\
import os, sys
import psutil
for name in ("resource", "fcntl", "grp", "pwd", "syslog"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "sysconf", "mkfifo", "getuid", "geteuid", "getpgid", "killpg", "setsid"):
    delattr(os, name)
"""
MODULES = {"resource", "fcntl", "grp", "pwd", "syslog", "termios", "tty", "pty"}
FUNCTIONS = {
    "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid", "getuid", "killpg",
    "mkfifo", "nice", "pread", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "set_blocking",
    "setsid", "statvfs", "sysconf", "uname", "wait", "waitpid", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW",
    "SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGCHLD", "setitimer", "alarm", "pthread_kill",
}  # fmt: skip
WITH_ANOTHER_WAY = {
    "core/peftx/engines/locks.py": {"fcntl"},
    "core/peftx/engines/machine.py": {"resource", "sched_getaffinity"},
    "core/peftx/testing/attempt.py": {"resource", "fork", "waitpid", "SIGKILL", "O_NONBLOCK", "O_CLOEXEC"},
    "core/peftx/testing/reload.py": {"fork", "waitpid"},
    "spec/peftx_spec/loader.py": {"O_NONBLOCK", "set_blocking"},
}
"""File -> what it asks for of Unix, and does without elsewhere, or refuses with the reason."""
FILE = """\
peftx: 1
compare:
  base:
    model: peftx:tiny
    data: {train: train.jsonl, eval: "peftx:sample/held_out.jsonl"}
    train: {batch_size: 2}
    evaluate: [{perplexity: {limit: 2}}]
  budget: {steps: 1}
  seeds: [0]
  learning_rate: [1e-3]
  methods: {lora: {stack: [lora]}}
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with rows, and what takes Unix away."""
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/sitecustomize.py").write_text(WITHOUT, "utf-8")
    row = {"prompt": "What is wet?", "completion": " Rain."}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 20, "utf-8")
    (tmp_path / "compare.yaml").write_text(FILE, "utf-8")
    (tmp_path / "stack.yaml").write_text("peftx: 1\nmodel: peftx:tiny\nstack: [lora, nf4]\n", "utf-8")
    return tmp_path


def run(folder: Path, *words: str) -> str:
    path = os.pathsep.join([str(folder / "gone"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "peftx_cli", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_asked_without_a_model(elsewhere: Path) -> None:
    assert "apply" in run(elsewhere, "--help")
    assert "prefixquant" in run(elsewhere, "list")
    assert "ok" in run(elsewhere, "validate", "stack.yaml")


@pytest.mark.slow
def test_a_run_trains_saves_and_writes(elsewhere: Path) -> None:
    run(
        elsewhere,
        "apply",
        "--plugin",
        "lora",
        "--data",
        "train.jsonl",
        "--steps",
        "1",
        "--metric",
        "none",
        "-o",
        "out",
    )
    assert (elsewhere / "out/lora.safetensors").is_file()
    assert run(elsewhere, "generate", "out", "What is wet?", "--max-new-tokens", "2")


def asked_of_unix(file: Path) -> set[str]:
    """Modules that it imports, and names of `os` and `signal` that it reads."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} & MODULES
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.attr} & FUNCTIONS if node.value.id in ("os", "signal") else set()
    return found


def test_what_is_asked_of_unix_is_known() -> None:
    files = [file for part in ("core", "spec", "cli", "plugins") for file in (ROOT / part).rglob("*.py")]
    asked = {
        file.relative_to(ROOT).as_posix(): asked_of_unix(file) for file in files if "tests" not in file.parts
    }
    assert {name: found for name, found in asked.items() if found} == WITH_ANOTHER_WAY


@pytest.mark.slow
def test_a_comparison_says_that_memory_was_not_measured(elsewhere: Path) -> None:
    run(elsewhere, "compare", "compare.yaml", "-o", "out")
    (row,) = json.loads((elsewhere / "out/results.json").read_text("utf-8"))["rows"]
    assert row["status"] == "done", row
    assert row["memory_bytes"] is None
    assert row["train_seconds"] > 0
    assert "not measured" in (elsewhere / "out/index.html").read_text("utf-8")


def test_a_peak_that_nobody_knows_is_not_zero() -> None:
    done = TableRow("lora", "lora", "compare.yaml:1", "done", value=1.0)
    assert (paid(done, "memory_bytes"), paid(done, "token_seconds")) == ("not measured", "")
    assert paid(TableRow("lora", "lora", "compare.yaml:1", "failed"), "memory_bytes") == ""


def test_windows_counts_the_peak_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**7 < (peak_memory() or 0) < psutil.virtual_memory().total
    assert 0 < free_memory() < psutil.virtual_memory().total
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() is None
    told = SimpleNamespace(memory_info=lambda: SimpleNamespace(_asdict=lambda: {"rss": 1, "peak_wset": 7}))
    monkeypatch.setattr(psutil, "Process", lambda: told)
    assert peak_memory() == 7


def test_all_cores_where_nobody_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def test_what_needs_a_fork_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(UnsupportedError, match="this system does not fork"):
        attempt.attempt(lambda _: attempt.Reading(""), tmp_path, tmp_path, seconds=1)
