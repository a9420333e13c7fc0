"""What the process of a job does: run the pipeline as `peftx apply` does, and measure."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from peftx.comparing.jobs import Check, Job, JobResult, checks_file, write_result
from peftx.composition.registry import Registry
from peftx.engines.machine import peak_memory
from peftx.errors import PeftxError, TrainingError, TrialError
from peftx.pipeline import Run
from peftx.run_result import RunResult
from peftx.stack import Stack
from peftx.toolkits.decoding.text import request_for
from peftx.toolkits.evaluation.scores import Score
from peftx_spec import load_pipeline

TOKENS = 32
"""Generated to time a token, after a warm-up of as many; the median of `TIMES`."""
TIMES = 3
PROMPT = "Once upon a time"
PACED = 20
"""Steps at most that are timed for a budget in seconds."""
PACE_SHARE = 0.25
"""Of the budget: what timing takes at most."""
LAST_CHARACTERS = 4000
"""Of what a failed job printed."""


def work(
    job: Job,
    folder: Path,
    scratch: Path,
    threads: int,
    trust_remote_code: bool,
    told: Callable[[Check], None] | None = None,
) -> None:
    """Run a job and write its result; a failure is one too. Called in a process of its own, and nowhere else: it turns
    stdout and stderr to a file, and reads the peak of the process's memory.

    Args:
        told: is called with each check of a trial, once it is written.
    """
    log = scratch / "log"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(threads)
    blank = JobResult(job.id, job.kind, job.seed, job.rate, threads=threads)
    try:
        found = (
            _pace(job, blank, trust_remote_code)
            if job.kind == "pace"
            else _measure(job, blank, scratch, trust_remote_code, told)
        )
    except PeftxError as error:
        found = replace(blank, reason=error.message + (f" ({error.hint})" if error.hint else ""))
    except Exception as error:  # noqa: BLE001  a stack may break in any way, and its row is to say so
        traceback.print_exc()
        sys.stderr.flush()
        said = " ".join(str(error).split())[:500]
        found = replace(blank, reason=f"{type(error).__name__}: {said}", log=_last(log))
    write_result(folder, found)


def _last(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-LAST_CHARACTERS:]


class Watch:
    """A reporter that ends the process when nobody waits for it any more."""

    def __init__(self) -> None:
        self.parent = os.getppid()

    def stage(self, name: str, ids: Sequence[str]) -> None: ...

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        if os.getppid() != self.parent:
            os._exit(1)

    def finished(self, name: str, seconds: float, detail: str) -> None: ...


class Checks(Watch):
    """Writes down how a trial stands whenever it was measured, for the process that started it."""

    def __init__(self, file: Path, metric: str, told: Callable[[Check], None] | None) -> None:
        super().__init__()
        self.file, self.metric, self.told = file, metric, told
        self.run: Run | None = None
        self.training = False
        self.seen = 0
        self.found: list[Check] = []

    def stage(self, name: str, ids: Sequence[str]) -> None:
        self.training = name.startswith("train")
        self.started = time.perf_counter()

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        super().progress(done, total, values)
        if not self.training or self.run is None or self.run.result is None:
            return
        known = self.run.result.stack.history.evaluations
        if len(known) == self.seen:
            return
        self.seen = len(known)
        value = known[-1].scores[self.metric].value
        if value is not None:  # it is infinite: the score at the end will say so
            self.found.append(Check(done / total, value, time.perf_counter() - self.started))
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.found[-1])) + "\n")
            if self.told is not None:
                self.told(self.found[-1])


def _measure(
    job: Job,
    blank: JobResult,
    scratch: Path,
    trust_remote_code: bool,
    told: Callable[[Check], None] | None = None,
) -> JobResult:
    pipeline = load_pipeline(job.pipeline, catalogue=Registry())
    if job.kind != "rate" and pipeline.stack:
        pipeline = pipeline.model_copy(update={"output": str(scratch / "bundle")})
    checks = Checks(checks_file(scratch), job.metric, told)
    run = Run(
        pipeline, reporter=checks if job.kind == "trial" else Watch(), trust_remote_code=trust_remote_code
    )
    checks.run = run
    result = run.run()
    scores = {name: _plain(score) for name, score in list(result.scores.values())[-1].items()}
    if job.metric not in scores:
        raise TrialError(f"the run gave no '{job.metric}', but {', '.join(scores) or 'nothing'}")
    measured = replace(blank, scores=scores, trained=result.trainable, bundle_bytes=_bundle(result),
                       base_bytes=0 if result.stack.holds_base else result.bytes_before,
                       base_parameters=result.stack.base_parameters(), steps=sum(r.steps for r in result.training),
                       seconds=sum(r.seconds - r.measuring for r in result.training), losses=_losses(result),
                       memory=peak_memory(), device_memory=_device_peak(), checks=checks.found)  # fmt: skip
    if job.kind == "rate":
        return measured
    return replace(measured, token_seconds=_token_seconds(result.stack))


def _bundle(result: RunResult) -> int:
    return result.bytes_after if result.output is not None else 0


def _losses(result: RunResult) -> list[tuple[int, float]]:
    """Of all stages of training, one behind the other."""
    found: list[tuple[int, float]] = []
    start = 0
    for report in result.training:
        found += [(start + step, loss) for step, loss in report.losses]
        start += report.steps
    return found


def _plain(score: Score) -> dict[str, Any]:
    def number(value: float | None) -> float | str | None:
        return str(value) if value is not None and math.isinf(value) else value

    return {"value": number(score.value), "low": number(score.low), "high": number(score.high),
            "count": score.count, "unit": score.unit}  # fmt: skip


def _device_peak() -> int | None:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else None


def _token_seconds(stack: Stack) -> float | None:
    """Seconds for a token, one prompt at a time; None where the model writes no text, or the stack none of this
    length."""
    if not stack.model.can_generate() or stack.given_tokenizer is None:
        return None
    times = []
    try:
        for _ in range(TIMES + 1):
            times.append(_timed(stack))
    except PeftxError:
        return None
    return statistics.median(times[1:])


def _timed(stack: Stack) -> float:
    options: Mapping[str, Any] = {"do_sample": False, "min_new_tokens": TOKENS}
    request = request_for(stack, [PROMPT], TOKENS, None, dict(options))
    started = time.perf_counter()
    ids = stack.decode(request)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    start = 1 if stack.model.config.is_encoder_decoder else request.input_ids.shape[1]
    return seconds / max(1, ids.shape[1] - start)


# -- a budget in seconds ---------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """The steps are timed."""


class _Pace(Watch):
    """Notes when each step ended, and stops the training when enough of them have."""

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.budget = budget
        self.training = False
        self.ends: list[float] = []

    def stage(self, name: str, ids: Sequence[str]) -> None:
        self.training = name.startswith("train")
        self.started = time.perf_counter()

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        super().progress(done, total, values)
        if not self.training:
            return
        self.ends.append(time.perf_counter())
        if done >= 2 and (done >= PACED or self.ends[-1] - self.started > PACE_SHARE * self.budget):
            raise _EnoughError


def _pace(job: Job, blank: JobResult, trust_remote_code: bool) -> JobResult:
    """How many steps the seconds are enough for, counted from the second step on: the first one warms up."""
    assert job.seconds is not None
    pipeline = load_pipeline(job.pipeline, catalogue=Registry())
    watch = _Pace(job.seconds)
    with suppress(_EnoughError):
        Run(pipeline, reporter=watch, trust_remote_code=trust_remote_code).run()
    if len(watch.ends) < 2:
        raise TrainingError("no step could be timed: nothing trains")
    step = (watch.ends[-1] - watch.ends[0]) / (len(watch.ends) - 1)
    return replace(blank, steps=max(1, int(job.seconds / step)), seconds=step)
