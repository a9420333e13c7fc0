"""The other process of `fresh.py`: `python -m peftx.testing.reload job.json`.

Without a job it reads names of job files, line by line, forks for each, and answers with what went wrong, as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import peftx
from peftx.engines.bundle import holds_base
from peftx.testing.case import inputs_for, output
from peftx.testing.models import tiny, tiny_tokenizer


def main(path: Path) -> None:
    """Do one job and write its report."""
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    assert transformers.PreTrainedModel is not None  # resolved before the clock starts
    report: dict[str, Any] = {"import_error": None, "error": None, "loaded": False}
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _import(job["module"], Path(job["file"]))
    except Exception as error:  # noqa: BLE001  whatever a stranger's module raises is what is reported
        report["import_error"] = f"{job['module']} does not import: {type(error).__name__}: {error}"
        report["error"] = report["import_error"]
    report["import_seconds"] = time.process_time() - started
    if job["bundle"] is not None and report["import_error"] is None:
        try:
            model = None if holds_base(job["bundle"]) else tiny(job["arch"])
            stack = peftx.load(job["bundle"], model=model, tokenizer=tiny_tokenizer())
            logits = output(stack.model, inputs_for(stack.model))
            save_file({"output": logits.contiguous()}, job["output"])
            report["loaded"] = True
        except Exception as error:  # noqa: BLE001  reported with its place, so that the check can show it
            place = traceback.extract_tb(error.__traceback__)[-1]
            report["error"] = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


def _import(name: str, file: Path) -> None:
    """By name; a module that stands on no path (a test's) by its file."""
    if name in sys.modules:
        return
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is not None and found.origin is not None and Path(found.origin) == file:
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def serve() -> None:
    """Jobs until the end of the input. Nothing of torch runs before a fork, so no thread is lost by it."""
    for line in sys.stdin:
        job = Path(line.strip())
        errors = job.with_name("stderr.txt")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                handle = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
                os.dup2(handle, 1)  # answers are the server's
                os.dup2(handle, 2)
                sys.path[:] = json.loads(job.read_text(encoding="utf-8"))["path"]
                main(job)
                status = 0
            except BaseException:  # noqa: BLE001  told by its last line
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = (
            ""
            if code == 0
            else (errors.read_text(errors="replace").strip().splitlines() or [f"exit status {code}"])[-1]
        )
        sys.stdout.write(f"{json.dumps(said)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        serve()
