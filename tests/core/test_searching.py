"""Searches without running a job: who is beaten, what is drawn, what a kill leaves, the front, the page."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import optuna
import pytest
from optuna.trial import TrialState

from peftx.comparing.jobs import Check, Job, JobResult, read_checks, read_result, write_result
from peftx.comparing.processes import Processes
from peftx.comparing.writing import to_csv, to_json
from peftx.composition.registry import Registry
from peftx.errors import PeftxError
from peftx.searching import samplers
from peftx.searching.going import Search, _Running
from peftx.searching.objectives import beats, coarse, excess, front
from peftx.searching.page import page
from peftx.searching.samplers import Samplers, SearchSampler, Setting
from peftx.searching.stacks import Stacks
from peftx.searching.table import COLUMNS, SearchTable, table_of
from peftx.searching.trials import FILE, JOB, REASON, STUDY
from peftx_spec import load_pipeline
from peftx_spec.search_load import LoadedSearch, load_search

FILE_TEXT = """\
peftx: 1
search:
  base:
    model: peftx:tiny
    data: {train: "peftx:sample/train.jsonl", eval: "peftx:sample/held_out.jsonl"}
    evaluate: [perplexity]
  stack: [[lora, prompt-tuning]]
  space:
    lora.rank: {log: [1, 16]}
    lora.ranks: [{}, {attention.q: 2}]
    train.learning_rate: {log: [1e-4, 1e-1]}
    train.steps: {range: [4, 12]}
  objectives: [bundle_bytes, quality]
  sampler: random
  trials: 6
  seeds: [0, 1]
"""


def finished(job: Job, value: float, size: int = 2000, **more: Any) -> JobResult:
    scores = {"perplexity": {"value": value, "low": None, "high": None, "count": 4, "unit": ""}}
    told = {"trained": 10, "base_parameters": 1000, "bundle_bytes": size, "memory": 5 * 10**8, "seconds": 3.0,
            "token_seconds": 0.01, "steps": 3, **more}  # fmt: skip
    return JobResult(job.id, job.kind, job.seed, job.rate, scores=scores, **told)


class FakePool:
    """Answers jobs by a function, the oldest first, and keeps the results as a pool does."""

    def __init__(self, folder: Path, answer: Callable[[Job], JobResult], jobs: int = 1) -> None:
        self.folder, self.answer, self.jobs = folder, answer, jobs
        self.running: dict[str, Job] = {}
        self.started: list[Job] = []
        self.looks: dict[str, list[Check]] = {}

    def has_room(self) -> bool:
        return len(self.running) < self.jobs

    def start(self, job: Job) -> None:
        self.started.append(job)
        self.running[job.id] = job

    def wait(self, seconds: float) -> list[JobResult]:
        if not self.running:
            return []
        job = self.running.pop(next(iter(self.running)))
        return [self.left(self.answer(job))]

    def left(self, result: JobResult) -> JobResult:
        write_result(self.folder, result)
        return result

    def checks(self, id: str) -> list[Check]:
        return self.looks.get(id, [])

    def end(self, id: str, reason: str) -> JobResult:
        job = self.running.pop(id)
        return self.left(JobResult(id, job.kind, job.seed, job.rate, reason, ended_early=True))


def propose(search: Search, pool: FakePool) -> None:
    """Start one more job, if there is one."""
    job = search.next(pool.running)
    if job is not None:
        pool.start(job)


def load(folder: Path, *changes: tuple[str, str]) -> LoadedSearch:
    text = FILE_TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    for name in ("jobs", STUDY):
        (folder / name).mkdir(exist_ok=True)
    (folder / "search.yaml").write_text(text, "utf-8")
    return load_search(folder / "search.yaml", catalogue=Registry(), samplers=Samplers())


def begun(folder: Path, *changes: tuple[str, str]) -> Search:
    loaded = load(folder, *changes)
    return Search(loaded, folder, Stacks(loaded, folder, Registry(), False))


def tried(search: Search, answer: Callable[[Job], JobResult], jobs: int = 1) -> FakePool:
    pool = FakePool(search.folder, answer, jobs)
    search.try_points(pool, None)  # type: ignore[arg-type]
    return pool


def by_steps(job: Job) -> JobResult:
    """More steps are better, LoRA's bundle the larger one."""
    steps = int(re.search(r"^  steps: (\d+)", job.pipeline, re.MULTILINE)[1])  # type: ignore[index]
    return finished(job, 50.0 - steps + job.seed, 9000 if job.row == "lora" else 2000)


def by_steps_if_any(job: Job) -> JobResult:
    """The base is the cheapest."""
    return by_steps(job) if "\ntrain:" in job.pipeline else finished(job, 90.0, 0)


def table(search: Search, pool: FakePool) -> SearchTable:
    tested = search.test(pool, None)  # type: ignore[arg-type]
    refused, dropped = search.trials.refused(), search.stacks.dropped
    loaded = search.stacks.loaded
    return table_of(search.points(), tested, search.goal, loaded, threads=1, refused=refused, dropped=dropped)


# -- who is beaten ---------------------------------------------------------------------------------------------------


def test_a_point_is_beaten_by_one_that_is_nowhere_worse() -> None:
    assert beats((1, 2), (1, 3))
    assert not beats((1, 2), (1, 2))
    assert not beats((1, 4), (2, 3))


def test_the_front_has_no_member_that_is_beaten_and_beats_all_others() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 1.0), (2.0, 5.0)]
    assert front(points) == [0, 1, 4, 5]


def test_costs_count_in_steps_of_a_tenth() -> None:
    assert coarse(100.0) == coarse(101.0) != coarse(111.0)
    assert coarse(200.0) / 200.0 == pytest.approx(1, abs=0.05)
    assert coarse(0.0) == 0.0


def test_by_how_much_a_limit_is_passed() -> None:
    assert excess({"bundle_bytes": 300, "trained": 5}, {"bundle_bytes": 200, "trained": 10}) == {
        "bundle_bytes": 0.5, "trained": -0.5,
    }  # fmt: skip


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_stack_is_drawn_with_its_own_keys_and_values_as_the_file_has_them(tmp_path: Path) -> None:
    search = begun(tmp_path)
    seen = set()
    for _ in range(20):
        stack, point = search.space.point(search.trials.ask().params)
        seen.add(stack.name)
        assert tuple(point) == stack.keys
        assert ("lora.rank" in point) == (stack.name == "lora")
        if stack.name == "lora":
            assert type(point["lora.rank"]) is int
            assert point["lora.ranks"] in ({}, {"attention.q": 2})
        rate = point["train.learning_rate"]
        assert isinstance(rate, float)
        assert float(f"{rate:.4g}") == rate
        assert 1e-4 <= rate <= 1e-1
    assert seen == {"lora", "prompt-tuning"}


def test_quality_comes_first_for_every_sampler(tmp_path: Path) -> None:
    search = begun(tmp_path)
    assert search.goal.objectives == ("quality", "bundle_bytes")
    directions = [direction.name for direction in search.trials.study.directions]
    assert directions == ["MINIMIZE", "MINIMIZE"]


@pytest.mark.parametrize(("sampler", "count"), [("tpe", 12), ("nsga2", 4), ("random", 4)])
def test_a_search_that_is_gone_on_with_draws_what_it_would_have_drawn(
    tmp_path: Path, sampler: str, count: int
) -> None:
    """Of TPE the first ten are random, and those after follow from them."""
    whole = f"trials: {count}"
    at_once = begun(tmp_path / "once", ("sampler: random", f"sampler: {sampler}"), ("trials: 6", whole))
    tried(at_once, by_steps)
    for trials in ("trials: 3", whole):
        search = begun(tmp_path / "twice", ("sampler: random", f"sampler: {sampler}"), ("trials: 6", trials))
        pool = tried(search, by_steps)
    assert len(pool.started) <= count - 3  # the first were not run again
    drawn = [[trial.params for trial in each.trials.all()] for each in (at_once, search)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == count


def test_another_seed_draws_other_points(tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 1)):
        search = begun(tmp_path / name, ("trials: 6", f"trials: 6\n  seed: {seed}"))
        drawn.append(search.trials.ask().params)
    assert drawn[0] != drawn[1]


def test_another_space_begins_anew_and_runs_no_job_again(tmp_path: Path) -> None:
    tried(begun(tmp_path), by_steps)
    search = begun(tmp_path, ("train.steps: {range: [4, 12]}", "train.steps: {range: [4, 13]}"))
    assert search.trials.all() == []


# -- what a kill leaves ----------------------------------------------------------------------------------------------


def test_a_trial_that_ran_when_the_search_was_killed_runs_again_as_it_was(tmp_path: Path) -> None:
    search = begun(tmp_path)
    pool = FakePool(tmp_path, by_steps, jobs=2)
    propose(search, pool)
    propose(search, pool)
    search.tell(pool.wait(0)[0])
    search.trials.ask()  # drawn, and not begun
    with (tmp_path / STUDY / FILE).open("ab") as file:
        file.write(b'{"op_code": 5, "half')
    (tmp_path / STUDY / f"{FILE}.lock").write_text("of a process that is no more")
    again = begun(tmp_path)
    assert [trial.state for trial in again.trials.all()] == [TrialState.COMPLETE]
    second = tried(again, by_steps)
    assert second.started[0].id == pool.started[1].id
    undisturbed = begun(tmp_path / "other")
    tried(undisturbed, by_steps)
    drawn = [[trial.params for trial in each.trials.all()] for each in (again, undisturbed)]
    assert drawn[0] == drawn[1]
    assert len({job.id for job in second.started} | {pool.started[0].id}) == 6


def test_a_job_that_ended_before_its_trial_was_told_is_not_run_again(tmp_path: Path) -> None:
    search = begun(tmp_path)
    pool = FakePool(tmp_path, by_steps)
    propose(search, pool)
    pool.wait(0)  # its file is there, and the search is killed
    first = search.trials.all()[0].params
    search = begun(tmp_path)
    search.trials.seed = 99  # whatever a sampler would propose by now
    second = tried(search, by_steps)
    assert search.trials.all()[0].params == first
    assert pool.started[0].id not in [job.id for job in second.started]
    assert len(second.started) == 5


def test_a_trial_whose_failure_was_noted_and_not_told_has_failed(tmp_path: Path) -> None:
    search = begun(tmp_path)
    pool = FakePool(tmp_path, by_steps)
    propose(search, pool)
    (running,) = search.running.values()
    running[0].trial.set_user_attr(REASON, "no memory")
    again = begun(tmp_path)
    (trial,) = again.trials.all()
    assert (trial.state, trial.user_attrs[REASON]) == (TrialState.FAIL, "no memory")
    assert again.trials.study.get_trials(states=(TrialState.WAITING,)) == []


# -- trials ----------------------------------------------------------------------------------------------------------


def test_trials_never_name_the_test_rows_and_the_front_is_measured_on_them(tmp_path: Path) -> None:
    search = begun(tmp_path)
    pool = tried(search, by_steps)
    assert len(pool.started) == 6
    assert not any("held_out" in job.pipeline + job.identity for job in pool.started)
    table(search, pool)
    tests = pool.started[6:]
    assert {job.kind for job in tests} == {"seed"}
    assert {job.seed for job in tests} == {0, 1}
    assert len(tests) == 2 * sum(point.front for point in search.points())
    assert all("held_out" in job.pipeline and "held_out" in job.identity for job in tests)
    assert not any("eval_steps" in job.pipeline for job in tests)


def test_what_does_not_train_is_scored_on_the_validation_rows_too(tmp_path: Path) -> None:
    search = begun(tmp_path, ("[[lora, prompt-tuning]]", "[[lora, ~]]"), ("trials: 6", "trials: 4"))
    pool = tried(search, by_steps_if_any)
    table(search, pool)
    base = {
        job.kind: load_pipeline(job.pipeline, catalogue=Registry())
        for job in pool.started
        if job.row == "base"
    }
    assert base["trial"].train is None
    assert base["trial"].data.train is not None
    assert base["trial"].data.holdout is not None
    assert base["seed"].data.train is None
    assert base["seed"].data.eval is not None


def test_a_point_that_is_drawn_again_trains_with_the_next_seed_and_counts_by_its_mean(tmp_path: Path) -> None:
    space = FILE_TEXT[FILE_TEXT.index("    lora.rank") : FILE_TEXT.index("  objectives")]
    one = "    train.learning_rate: [1e-3]\n    train.steps: [4]\n"
    stack = ("[[lora, prompt-tuning]]", "[prompt-tuning]")
    search = begun(tmp_path, (space, one), stack, ("trials: 6", "trials: 3"))
    pool = tried(search, by_steps)
    assert [job.seed for job in pool.started] == [0, 1, 2]
    (point,) = search.points()
    assert point.trials == [0, 1, 2]
    assert point.quality("perplexity") == [46, 47, 48]
    (row,) = table(search, pool).rows
    assert row.value == 47


def test_what_trains_too_much_is_refused_before_it_runs(tmp_path: Path) -> None:
    limit = ("trials: 6", "trials: 6\n  limits: {trained: 6k}")
    search = begun(tmp_path, limit)
    pool = tried(search, by_steps)
    assert {job.row for job in pool.started} == {"prompt-tuning"}  # LoRA trains more than 5,120 numbers
    assert len(pool.started) == len(search.trials.all()) == 6
    assert search.trials.refused()
    assert re.match(r"lora: it trains [\d,]+ numbers, and the limit is 6,000", search.trials.refused()[0])
    constraints = [
        trial.constraints for trial in search.trials.study.trials if trial.state is TrialState.PRUNED
    ]
    assert all(each["refused"] > 0 for each in constraints)


def test_limits_that_no_point_can_keep_are_an_error_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = begun(tmp_path, ("trials: 6", "trials: 6\n  limits: {trained: 100}"))
    monkeypatch.setattr("peftx.searching.going.MOST_REFUSED", 3)
    with pytest.raises(PeftxError, match=r"of 3 that were drawn, all were refused; .* the limit is 100"):
        tried(search, by_steps)
    assert len(search.trials.refused()) == 3


def test_no_stack_that_can_be_built_is_an_error_with_each_reason(tmp_path: Path) -> None:
    conflict = ("[[lora, prompt-tuning]]", "[lora, [mezo, ~], {use: mezo, id: again}]")
    loaded = load(tmp_path, conflict, ("stack: ", "stack: "))
    stacks = Stacks(loaded, tmp_path, Registry(), False)
    assert list(stacks.candidates) == ["lora + again"]
    assert "lora + mezo + again" in stacks.dropped
    loaded = load(tmp_path, ("[[lora, prompt-tuning]]", "[lora, mezo, {use: mezo, id: again}]"))
    with pytest.raises(PeftxError, match=r"no stack of the search can be built:\nlora \+ mezo \+ again: "):
        Stacks(loaded, tmp_path, Registry(), False)


def test_a_trial_that_fails_has_its_reason_and_the_search_goes_on(tmp_path: Path) -> None:
    def answer(job: Job) -> JobResult:
        if job.row == "lora":
            return JobResult(job.id, job.kind, job.seed, None, reason="no memory")
        return finished(job, float("inf")) if "steps: 4\n" in job.pipeline else by_steps(job)

    search = begun(tmp_path, ("trials: 6", "trials: 8"))
    pool = tried(search, answer)
    failed = [trial for trial in search.trials.all() if trial.state is TrialState.FAIL]
    assert {trial.user_attrs[REASON] for trial in failed} <= {"no memory", "perplexity is inf"}
    assert failed
    rows = table(search, pool).rows
    assert {row.status for row in rows if row.method == "lora"} == {"failed"}
    assert not any(row.front for row in rows if row.method == "lora")  # type: ignore[attr-defined]


def test_what_writes_no_text_has_no_seconds_a_token(tmp_path: Path) -> None:
    search = begun(
        tmp_path, ("[bundle_bytes, quality]", "[quality, token_seconds]"), ("trials: 6", "trials: 1")
    )
    tried(search, lambda job: finished(job, 5.0, token_seconds=None))
    assert search.trials.all()[0].user_attrs[REASON] == "it has no token_seconds: the model writes no text"


def test_a_job_of_a_version_that_did_not_measure_a_cost_says_so(tmp_path: Path) -> None:
    search = begun(
        tmp_path, ("[bundle_bytes, quality]", "[quality, shipped_bytes]"), ("trials: 6", "trials: 1")
    )
    tried(search, lambda job: finished(job, 5.0, base_bytes=None))
    reason = search.trials.all()[0].user_attrs[REASON]
    assert reason.startswith("it has no shipped_bytes: its job is of a version that did not measure that")


def test_a_point_beyond_a_limit_is_not_on_the_front_and_the_sampler_hears_by_how_much(tmp_path: Path) -> None:
    search = begun(tmp_path, ("trials: 6", "trials: 6\n  limits: {bundle_bytes: 3k}"))
    pool = tried(search, by_steps)
    rows = table(search, pool).rows
    assert {(row.method, row.status) for row in rows} == {("lora", "over a limit"), ("prompt-tuning", "done")}
    assert {row.method for row in rows if row.front} == {"prompt-tuning"}  # type: ignore[attr-defined]
    over = {trial.constraints["bundle_bytes"] for trial in search.trials.all()}
    assert over == {2.0, 2000 / 3000 - 1}


# -- what is beaten ends early ---------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., bool]:
    """`watched(rank, checks, ...)`: does a trial end early beside one that is done, with rank 4 and these checks:
    a half of its steps with 10.0 after 2 seconds, all with 9.0 after 4."""

    def ends(rank: int, check: Check, objectives: str = "[quality, bundle_bytes, train_seconds]") -> bool:
        space = FILE_TEXT[FILE_TEXT.index("    lora.rank") : FILE_TEXT.index("  objectives")]
        search = begun(
            tmp_path, ("[[lora, prompt-tuning]]", "[lora]"), (space, "    lora.rank: [1, 4, 8]\n"),
            ("[bundle_bytes, quality]", objectives), ("trials: 6", "trials: 2"),
        )  # fmt: skip
        for each in (4, rank):
            search.trials.study.enqueue_trial({"lora.rank": str(each)})
        numbers = {}
        pool = FakePool(tmp_path, by_steps)
        propose(search, pool)
        (first,) = search.running.values()
        numbers[4] = first[0].numbers
        done = finished(
            pool.started[0], 9.0, trained=numbers[4], checks=[Check(0.5, 10.0, 2.0), Check(1.0, 9.0, 4.0)]
        )
        search.tell(pool.left(done))
        pool.running.clear()
        propose(search, pool)
        pool.looks[pool.started[1].id] = [check]
        id = pool.started[1].id
        reason = search.beaten(id, pool.checks(id))
        assert search.beaten(id, []) == "", "nothing is known of it yet"
        if reason:
            search.tell(pool.end(id, reason))
        ended = read_result(tmp_path, id)
        if ended is not None:
            assert re.match(r"ended early, after \d+% of its steps: perplexity", ended.reason)
            assert search.trials.all()[1].state is TrialState.PRUNED
            assert search.points()[1].ended
        return ended is not None

    return ends


def test_a_beaten_trial_ends_early(watched: Callable[..., bool]) -> None:
    assert watched(8, Check(0.5, 10.5, 2.5))


@pytest.mark.parametrize(
    ("rank", "check"),
    [
        (8, Check(0.5, 9.5, 2.5)),  # it is better
        (8, Check(0.5, 10.5, 1.5)),  # it is faster
        (8, Check(0.25, 10.5, 2.5)),  # the other one was not looked at so early
        (1, Check(0.5, 10.5, 2.5)),  # it trains fewer numbers
        (8, Check(1.0, 9.5, 4.5)),  # it has trained
    ],
    ids=["better", "faster", "earlier", "smaller", "trained"],
)
def test_a_trial_that_may_come_to_the_front_goes_on(
    watched: Callable[..., bool], rank: int, check: Check
) -> None:
    assert not watched(rank, check)


def test_trials_of_ray_tune_are_those_of_the_search(tmp_path: Path) -> None:
    """Without a cluster: what Tune would ask and tell."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.tune.search import Searcher

    from peftx.searching.on_tune import Proposals

    here, there = begun(tmp_path / "here"), begun(tmp_path / "there")
    tried(here, by_steps)
    trials = Proposals(there, SimpleNamespace(folder=tmp_path / "there", scratch=tmp_path, threads=1))  # type: ignore[arg-type]
    for number in range(6):
        asked = trials.suggest(str(number))
        write_result(tmp_path / "there", by_steps(Job(**asked["job"])))
        trials.on_trial_complete(str(number))
    assert trials.suggest("7") == Searcher.FINISHED
    drawn = [[(trial.params, trial.values) for trial in each.trials.all()] for each in (here, there)]
    assert drawn[0] == drawn[1]


def test_what_ray_tune_lost_or_ended_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.tune.schedulers import TrialScheduler

    from peftx.searching.on_tune import Early, Proposals

    search = begun(tmp_path)
    trials = Proposals(search, SimpleNamespace(folder=tmp_path, scratch=tmp_path, threads=1))  # type: ignore[arg-type]
    early, check = Early(trials), {"share": 0.5, "value": 10.0, "seconds": 2.0}
    lost, ended = (Job(**trials.suggest(name)["job"]) for name in ("lost", "ended"))
    search.beaten = lambda id, checks: "worse" if id == ended.id and checks == [Check(**check)] else ""  # type: ignore[method-assign]
    ends = {
        name: early.on_trial_result(None, SimpleNamespace(trial_id=name), {**check, "pid": 1})
        for name in trials.jobs
    }
    assert ends == {"lost": TrialScheduler.CONTINUE, "ended": TrialScheduler.STOP}
    assert (
        early.on_trial_result(None, SimpleNamespace(trial_id="ended"), {"done": True})
        == TrialScheduler.CONTINUE
    )
    for name in ("lost", "ended"):
        trials.on_trial_complete(name, error=name == "lost")
    reasons = {job.id: read_result(tmp_path, job.id) for job in (lost, ended)}
    assert "left no result" in reasons[lost.id].reason  # type: ignore[union-attr]
    assert (reasons[ended.id].reason, reasons[ended.id].ended_early) == ("worse", True)  # type: ignore[union-attr]
    assert [trial.state for trial in search.trials.all()] == [TrialState.FAIL, TrialState.PRUNED]
    search.checks = 0
    assert early.on_trial_result(None, SimpleNamespace(trial_id="x"), check) == TrialScheduler.CONTINUE


def test_what_compresses_otherwise_is_not_compared(tmp_path: Path) -> None:
    space = FILE_TEXT[FILE_TEXT.index("    lora.rank") : FILE_TEXT.index("  objectives")]
    bits = (space, "    prefixquant.weight_bits: [4, 8]\n    train.steps: [4, 8]\n")
    search = begun(tmp_path, ("[[lora, prompt-tuning]]", "[lora, prefixquant]"), bits)
    stack = search.stacks.candidates["lora + prefixquant"]
    done = {}
    for width in (4, 8):
        point = {"prefixquant.weight_bits": width, "train.steps": 4}
        done[width] = search.stacks.sizing(stack, point)
        assert done[width] == {"prefixquant.weight_bits": width}
    job = Job("lora + prefixquant", "trial", "", "perplexity", 0, "")
    search._keep(stack, done[4], finished(job, 9.0, checks=[Check(0.5, 10.0, 2.0)]))
    now = Check(0.5, 10.5, 2.5)
    for width, ended in ((4, True), (8, False)):
        running = _Running(search.trials.ask(), stack, 10, done[width])
        assert bool(search._beaten(running, now, search.done[0])) is ended


def test_numbers_do_not_matter_where_nothing_but_time_is_paid(watched: Callable[..., bool]) -> None:
    assert watched(1, Check(0.5, 10.5, 2.5), "[quality, train_seconds]")


def test_trials_are_looked_at_three_times_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    steps = ("train.steps: {range: [4, 12]}", "train.steps: [12, 10]")
    found = {}
    for name, more in (("a", ""), ("b", "\n  checks: 0")):
        pool = tried(begun(tmp_path / name, steps, ("trials: 6", f"trials: 3{more}")), by_steps)
        found[name] = {re.search(r"eval_steps: (\d)", job.pipeline) for job in pool.started}
    assert {match[1] for match in found["a"] if match} == {"3"}
    assert found["b"] == {None}


def test_a_pool_ends_a_trial_and_keeps_what_was_seen_of_it(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    line = json.dumps({"share": 0.5, "value": 3.0, "seconds": 1.0})
    (scratch / "checks").write_text(f'{line}\n{{"share": 0.75, "va')
    assert read_checks(scratch) == [Check(0.5, 3.0, 1.0)]
    process = SimpleNamespace(terminate=lambda: None, join=lambda seconds=None: None, is_alive=lambda: False)
    pool = Processes(tmp_path, tmp_path, 1, 1, False)
    job = Job("lora", "trial", "peftx: 1", "perplexity", 0, "")
    pool.running[job.id] = SimpleNamespace(job=job, process=process, scratch=scratch)  # type: ignore[assignment]
    result = pool.end(job.id, "beaten")
    assert (result.reason, result.ended_early, result.checks) == ("beaten", True, [Check(0.5, 3.0, 1.0)])
    assert read_result(tmp_path, job.id) == result
    assert pool.running == {}
    assert not scratch.exists()


# -- samplers of others ----------------------------------------------------------------------------------------------


class Lowest(SearchSampler):
    """Proposes the same points again and again."""

    whole = True
    asked: ClassVar[list[Setting]] = []

    def check(self, setting: Setting) -> None:
        if len(setting.objectives) != 2:
            raise PeftxError("one cost, no more")

    def sampler(self, setting: Setting) -> optuna.samplers.BaseSampler:
        self.asked.append(setting)
        return optuna.samplers.RandomSampler(seed=3)


@pytest.fixture
def lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(name, f"{__name__}:{value}", "peftx.samplers")
              for name, value in (("lowest", "Lowest"), ("other", "FakePool"), ("gone", "Gone"))]  # fmt: skip
    others = EntryPoint.load

    def loaded(point: EntryPoint) -> Any:
        return globals()[point.attr] if point.group == "peftx.samplers" else others(point)

    monkeypatch.setattr(EntryPoint, "load", loaded)
    monkeypatch.setattr(samplers, "installed", lambda group: points if group == "peftx.samplers" else [])


def test_a_package_brings_a_sampler(lowest: None, tmp_path: Path) -> None:
    assert Samplers().names() == ["tpe", "nsga2", "random", "gone", "lowest", "other"]
    changes = (
        ("sampler: random", "sampler: lowest"),
        ("trials: 6", "trials: 2\n  limits: {bundle_bytes: 5k}"),
    )
    search = begun(tmp_path, *changes)
    assert search.checks == 0
    tried(search, by_steps)
    setting = Lowest.asked[-1]
    assert (setting.objectives, setting.higher, setting.stacks) == (("quality", "bundle_bytes"), False, 2)
    assert setting.limits == {"bundle_bytes": 5000}
    assert list(setting.distributions) == [
        "stack", "lora.rank", "lora.ranks", "train.learning_rate", "train.steps"
    ]  # fmt: skip
    first, second = search.trials.all()
    assert first.params == second.params


def test_a_sampler_that_cannot_serve_says_so_before_anything_runs(lowest: None, tmp_path: Path) -> None:
    sampler = ("sampler: random", "sampler: lowest")
    with pytest.raises(PeftxError, match="one cost, no more"):
        begun(tmp_path, sampler, ("[bundle_bytes, quality]", "[quality]"))
    with pytest.raises(PeftxError, match="'lowest' learns from what a trial cost to its end"):
        begun(tmp_path, sampler, ("trials: 6", "trials: 6\n  checks: 2"))


@pytest.mark.parametrize(
    ("name", "said"), [("other", "is no subclass of SearchSampler"), ("gone", "KeyError: 'Gone'")]
)
def test_a_sampler_that_is_none_is_an_error_with_its_place(
    lowest: None, tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(PeftxError, match=said) as caught:
        load(tmp_path, ("sampler: random", f"sampler: {name}"))
    assert "search.yaml:14:12" in str(caught.value)


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_table_and_page(tmp_path: Path) -> None:
    def answer(job: Job) -> JobResult:
        if job.kind == "seed":
            return finished(job, 30.0 + job.seed)
        return by_steps(job)

    search = begun(tmp_path, ("trials: 6", "trials: 7\n  limits: {bundle_bytes: 20k}"))
    pool = tried(search, answer)
    told = table(search, FakePool(tmp_path, answer))
    assert [row.row for row in told.front] == [row.row for row in told.ordered if row.front]  # type: ignore[attr-defined]
    best = told.front[0]
    assert (best.test_value, best.test_std) == (30.5, pytest.approx(0.7071, abs=1e-3))
    assert best.test_low is not None
    assert best.test_low < 30 < best.value  # type: ignore[operator]
    others = [row for row in told.rows if row not in told.front]
    assert others
    assert not any(row.seeds for row in others)
    assert set(told.yaml) == {row.row for row in told.front}
    shown = page(told)
    names = re.findall(r'<a href="#row-\d+">(.*?)</a>', shown)
    assert sorted(names) == sorted(row.row for row in told.rows)
    assert names[: len(told.front)] == [row.row for row in told.front]
    assert "perplexity (validation)" in shown
    assert shown.count("<pre>") == len(told.front)
    assert "at most 20 kB" in shown
    assert "No point keeps the limits" not in shown
    assert json.loads(to_json(told))["sampler"] == "random"
    lines = list(csv.DictReader(io.StringIO(to_csv(told, COLUMNS))))
    assert [line["front"] for line in lines] == [str(row.front).lower() for row in told.rows]  # type: ignore[attr-defined]
    assert pool.started[0].row in {line["method"] for line in lines}


def test_a_front_whose_test_failed_shows_no_mean(tmp_path: Path) -> None:
    def answer(job: Job) -> JobResult:
        if job.kind == "seed" and job.seed == 1:
            return JobResult(job.id, job.kind, job.seed, None, reason="<no memory>")
        return by_steps(job)

    search = begun(tmp_path)
    told = table(search, tried(search, answer))
    assert all(row.test_value is None and row.reason == "on the test rows: <no memory>" for row in told.front)
    assert "&lt;no memory&gt;" in page(told)
    assert [trial.user_attrs[JOB] for trial in search.trials.all()]


def test_nobody_keeps_the_limits(tmp_path: Path) -> None:
    search = begun(tmp_path, ("trials: 6", "trials: 3\n  limits: {token_seconds: 0.001}"))
    told = table(search, tried(search, by_steps))
    assert told.front == []
    shown = page(told)
    assert "No point keeps the limits" in shown
    assert "Quality against cost" not in shown
