"""Run a plugin in another process: what its import costs, and what a bundle gives there."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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
            "report": str(folder / "report.json"),
            "output": str(folder / "output.safetensors"),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, "-m", "peftx.testing.reload", str(folder / "job.json")],
            env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False,
        )  # fmt: skip
        if done.returncode != 0 or not (folder / "report.json").exists():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return FreshReport(
                0.0, f"the process failed: {last[0]}", f"the process failed: {last[0]}", None, None
            )
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        found = load_file(folder / "output.safetensors")["output"] if report["loaded"] else None
        return FreshReport(
            report["import_seconds"], report["import_error"], trouble or report["error"], found, expected
        )
