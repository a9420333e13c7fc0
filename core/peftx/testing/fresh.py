"""Run a plugin in another process: what its import costs, and what a bundle gives there.

A process that has everything of ours imported, and no plugin, forks one for each job, so that a job costs what the
plugin costs. Where there is no fork each job starts a process of its own.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from select import select

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftx.errors import PeftxError
from peftx.testing.case import Case
from peftx.testing.subject import Subject

_LIMIT = 300
"""Seconds."""


@dataclass(frozen=True)
class FreshReport:
    """What the other process said."""

    import_seconds: float
    import_error: str | None
    error: str | None
    found: Tensor | None
    expected: Tensor | None


@lru_cache(maxsize=8)
def fresh_process(subject: Subject, arch: str) -> FreshReport:
    """Import the plugin in a fresh process and load a bundle of it there; one process serves all checks of a plugin."""
    with tempfile.TemporaryDirectory(prefix="peftx-conformance-") as name:
        folder = Path(name)
        expected, trouble = None, None
        if arch and subject.implements("inject", "compress"):
            case = Case(subject, arch, folder)
            try:
                stack = case.finished()
                stack.save(folder / "bundle")
                expected = case.output(stack)
            except PeftxError as error:
                trouble = f"no bundle was made: {error}"
        job = {
            "module": subject.plugin.__module__,
            "file": inspect.getfile(subject.plugin),
            "bundle": str(folder / "bundle") if expected is not None else None,
            "arch": arch,
            "threads": torch.get_num_threads(),
            "path": [entry for entry in sys.path if entry],
            "report": str(folder / "report.json"),
            "output": str(folder / "output.safetensors"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        trouble_there = _run(folder)
        if trouble_there:
            reason = f"the process failed: {trouble_there}"
            return FreshReport(0.0, reason, reason, None, None)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        found = load_file(folder / "output.safetensors")["output"] if report["loaded"] else None
        return FreshReport(
            report["import_seconds"], report["import_error"], trouble or report["error"], found, expected
        )


def _run(folder: Path) -> str:
    """Have a job done; why it was not."""
    if hasattr(os, "fork"):
        server = _server()
        said = server.ask(folder)
        if said is None:  # it is gone, or takes too long
            server.close()
            _server.cache_clear()
            return f"no answer in {_LIMIT} seconds"
        return said
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "peftx.testing.reload", str(folder / "job.json")],
        env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return last[0] if done.returncode != 0 else ""


class _Server:
    """The process that forks others; see `peftx.testing.reload`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peftx.testing.reload"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, folder: Path) -> str | None:
        """What went wrong with the job in a folder, else ''; None where there is no answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(folder / "job.json", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        if not select([self.process.stdout], [], [], _LIMIT)[0]:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@lru_cache(maxsize=1)
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server
