"""The trials of a search, which Optuna keeps in a file: proposed, told of, and taken up again after a kill."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from peftx.comparing.jobs import JobResult
from peftx.comparing.table import costs_of
from peftx.searching.objectives import coarse, excess
from peftx.searching.samplers import SearchSampler, Setting
from peftx.searching.space import Space
from peftx_spec.search import QUALITY

STUDY, FILE = "study", "trials.log"
"""The folder of Optuna's file, which locks it by others beside."""
REASON, REFUSED, JOB = "reason", "refused", "job"
"""What is noted of a trial: why it failed or ended early; why it was never run; the job that ran for it."""
MISSING = {
    "token_seconds": "the model writes no text",
    "memory_bytes": "this system does not tell how much a process held at most",
}
UNKNOWN = "its job is of a version that did not measure that; another --output measures anew"


@dataclass(frozen=True)
class Goal:
    """What a search is after. `higher`: more of the metric is better."""

    metric: str
    higher: bool
    objectives: tuple[str, ...]
    limits: Mapping[str, float]

    def values(self, quality: float, costs: Mapping[str, float | None]) -> list[float]:
        """One for each objective, as points are compared."""
        return [quality if name == QUALITY else coarse(float(costs[name] or 0)) for name in self.objectives]

    def signed(self, values: list[float]) -> list[float]:
        """The same where less is better."""
        flip = self.higher
        return [
            -value if name == QUALITY and flip else value
            for name, value in zip(self.objectives, values, strict=True)
        ]

    def flaw(self, result: JobResult) -> str:
        """Why a job is worth nothing; empty where it is worth something."""
        if result.reason:
            return result.reason
        quality = result.value(self.metric)
        if not math.isfinite(quality):
            return f"{self.metric} is {quality:g}"
        costs = costs_of([result])
        missing = [
            name for name in {**dict.fromkeys(self.objectives), **self.limits} if costs.get(name, 0) is None
        ]
        return f"it has no {missing[0]}: {MISSING.get(missing[0], UNKNOWN)}" if missing else ""


class Trials:
    """A study of Optuna's.

    Args:
        folder: where it is kept. name: what decides about the search: another one begins anew in the same file.
    """

    def __init__(
        self, folder: Path, name: str, goal: Goal, space: Space, sampler: SearchSampler, seed: int
    ) -> None:
        self.goal, self.space, self.sampler, self.seed = goal, space, sampler, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = folder / FILE
        _mend(file)
        ways = ["maximize" if name == QUALITY and goal.higher else "minimize" for name in goal.objectives]
        with _quiet():
            storage = JournalStorage(JournalFileBackend(str(file)))
            self.study = optuna.create_study(
                storage=storage, study_name=name, directions=ways, load_if_exists=True
            )
            sampler.check(self.setting(seed))
            for left in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self.study.tell(left.number, state=TrialState.FAIL)
                if JOB in left.user_attrs and REASON not in left.user_attrs:  # it was running: once more
                    self.study.enqueue_trial(left.params)

    def setting(self, seed: int) -> Setting:
        goal = self.goal
        return Setting(seed, goal.objectives, goal.higher, goal.limits, self.space.distributions(),
                       len(self.space.candidates))  # fmt: skip

    def ask(self) -> optuna.Trial:
        """A point that the sampler proposes, or one that was left."""
        count = sum(not _left(trial) for trial in self.study.get_trials(deepcopy=False))
        text = f"{self.seed} {count}"
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        with _quiet():
            self.study.sampler = self.sampler.sampler(self.setting(seed))
            trial = self.study.ask()
            self.space.draw(trial)
        return trial

    def refuse(self, trial: optuna.Trial, reason: str, over: float = 1.0) -> None:
        """It is not worth a run. over: by how much of a limit, for the sampler."""
        trial.set_user_attr(REFUSED, reason)
        trial.set_constraint(REFUSED, over)
        self._tell(trial, state=TrialState.PRUNED)

    def begin(self, trial: optuna.Trial, job: str) -> None:
        trial.set_user_attr(JOB, job)

    def tell(self, trial: optuna.Trial, result: JobResult) -> None:
        """What its job left."""
        flaw = self.goal.flaw(result)
        if flaw:
            trial.set_user_attr(REASON, flaw)
            self._tell(trial, state=TrialState.PRUNED if result.ended_early else TrialState.FAIL)
            return
        costs = costs_of([result])
        for name, over in excess(costs, self.goal.limits).items():
            trial.set_constraint(name, over)
        self._tell(trial, values=self.goal.values(result.value(self.goal.metric), costs))

    def _tell(self, trial: optuna.Trial, **told: Any) -> None:
        with _quiet():
            self.study.tell(trial, **told)

    def all(self) -> list[FrozenTrial]:
        """Those that were run, or are; without those that were refused, and those that a kill left behind."""
        every = self.study.get_trials(deepcopy=False)
        return [trial for trial in every if JOB in trial.user_attrs and not _left(trial)]

    def refused(self) -> list[str]:
        """Why trials were never run."""
        found = (trial.user_attrs.get(REFUSED) for trial in self.study.get_trials(deepcopy=False))
        return [reason for reason in found if reason is not None]

    def count(self, same: Callable[[Mapping[str, Any]], bool]) -> int:
        """How many trials there are of a point already."""
        return sum(same(trial.params) for trial in self.all())


def _left(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.FAIL and REASON not in trial.user_attrs


def _mend(file: Path) -> None:
    """Take away what a kill left half-written, and locks of processes that are no more: the folder's own is held."""
    for lock in file.parent.glob(f"{file.name}.*"):
        lock.unlink()
    if file.exists():
        whole = file.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with file.open("r+b") as handle:
                handle.truncate(end)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says of each option that it may change; the version is pinned to one of its releases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
