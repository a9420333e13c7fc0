"""Comparisons without running one: intervals, notes, fronts, the page, jobs that died."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftx.comparing.jobs import Job, JobResult, read_result, result_file, write_result
from peftx.comparing.on_ray import room
from peftx.comparing.page import others, page
from peftx.comparing.plots import Axis, _front
from peftx.comparing.processes import InProcess, Processes
from peftx.comparing.schedule import Schedule
from peftx.comparing.statistics import SCALES, Scale, Spread, spread, t95
from peftx.comparing.table import Table, slugs_of, table_of
from peftx.comparing.work import _measure
from peftx.comparing.writing import to_csv
from peftx.composition.registry import Registry
from peftx.engines.files import folder_bytes
from peftx.engines.models import base_bytes, load_model
from peftx.errors import PeftxError
from peftx_spec.compare_load import load_compare
from peftx_spec.models import HIGHER_IS_BETTER

FILE = """\
peftx: 1
compare:
  base:
    model: peftx:tiny
    data: {train: "peftx:sample/train.jsonl", eval: "peftx:sample/held_out.jsonl"}
    evaluate: [perplexity]
  budget: {rows: 20}
  seeds: [0, 1, 2]
  learning_rate: [1e-3, 3e-3, 1e-2]
  methods:
    lora: {stack: [{use: lora}], grid: {lora.rank: [2, 4]}}
    "a.b": {stack: [lora, mezo, {use: mezo, id: again}], learning_rate: [1e-3]}
    base: {stack: []}
"""


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "compare.yaml").write_text(FILE, "utf-8")
    return Schedule(load_compare(folder / "compare.yaml", catalogue=Registry()), folder, registry=Registry())


def finished(job: Job, value: float, reason: str = "") -> JobResult:
    scores = (
        {} if reason else {"perplexity": {"value": value, "low": None, "high": None, "count": 4, "unit": ""}}
    )
    return JobResult(job.id, job.kind, job.seed, job.rate, reason, scores=scores, trained=10, base_parameters=1000,
                     bundle_bytes=2000, base_bytes=4000, memory=5 * 10**8, seconds=3.0, token_seconds=0.01,
                     losses=[] if reason else [(1, 4.0), (2, 3.0)], steps=3)  # fmt: skip


def carried_out(schedule: Schedule, value_of: Any) -> Table:
    """All jobs answered by a function of the job."""
    found: dict[str, JobResult] = {}
    while wanted := schedule.wanted(found):
        found |= {job.id: value_of(job) for job in wanted}
    return table_of(schedule, found, threads=1)


def best_in_the_middle(job: Job) -> JobResult:
    """The middle rate is the best, by validation; rank 4 is the better, a little."""
    value = {1e-3: 9.0, 3e-3: 5.0, 1e-2: 7.0}.get(job.rate or 0, 20.0) + 0.1 * job.seed
    return finished(job, value - (0.05 if "rank=4" in job.row else 0.0))


def test_rates_are_tried_first_and_the_best_goes_on_with_every_seed(schedule: Schedule) -> None:
    first = schedule.wanted({})
    assert [(job.kind, job.rate) for job in first if job.row == "lora rank=2"] == [
        ("rate", 1e-3), ("rate", 3e-3), ("rate", 1e-2)
    ]  # fmt: skip
    rows = carried_out(schedule, best_in_the_middle).rows
    assert [(row.learning_rate, row.edge, len(row.seeds)) for row in rows[:2]] == [(3e-3, False, 3)] * 2
    assert rows[0].steps == 3  # 20 rows in batches of 8


def test_rate_jobs_never_name_the_test_rows(schedule: Schedule) -> None:
    jobs = {job.kind: job for job in [*schedule.wanted({}), *schedule.seed_jobs(schedule.rows[3], {})]}
    assert "held_out" not in jobs["rate"].pipeline + jobs["rate"].identity
    assert "held_out" in jobs["seed"].pipeline
    assert "held_out" in jobs["seed"].identity


def test_a_conflict_is_a_row_before_anything_runs(schedule: Schedule) -> None:
    row = schedule.rows[2]
    assert row.pipeline is None
    assert row.reason


def test_rates_that_diverge_are_passed_over_and_an_edge_is_told(schedule: Schedule) -> None:
    def diverging(job: Job) -> JobResult:
        bad = job.kind == "rate" and (job.rate or 0) > 1e-3
        return finished(job, 8.0, "training: the loss is nan" if bad else "")

    row = carried_out(schedule, diverging).rows[0]
    assert (row.learning_rate, row.edge, row.status) == (1e-3, True, "done")
    assert [tried.reason for tried in row.rates] == ["", *["training: the loss is nan"] * 2]


def test_a_row_of_which_a_seed_fails_has_failed_and_keeps_the_others(schedule: Schedule) -> None:
    def second_fails(job: Job) -> JobResult:
        return finished(job, 8.0, "out of memory" if (job.kind, job.seed) == ("seed", 1) else "")

    row = carried_out(schedule, second_fails).rows[0]
    assert (row.status, row.reason, row.value) == ("failed", "seed 1: out of memory", None)
    assert [seed.value for seed in row.seeds] == [8.0, None, 8.0]


def test_all_rates_failing_fails_the_row_alone(schedule: Schedule) -> None:
    def fails(job: Job) -> JobResult:
        return finished(job, 8.0, "no memory" if job.row == "lora rank=2" else "")

    rows = carried_out(schedule, fails).rows
    assert [(row.status, row.reason) for row in rows[:2]] == [("failed", "no memory"), ("done", "")]


def test_notes_say_what_cannot_be_told_apart(schedule: Schedule) -> None:
    table = carried_out(schedule, best_in_the_middle)
    assert [row.note for row in table.rows] == ["inside the noise of the best", "best", "failed", ""]
    assert [row.row for row in table.ordered] == ["lora rank=4", "lora rank=2", "base", "a.b"]


def test_an_infinite_perplexity_is_a_result(schedule: Schedule) -> None:
    table = carried_out(schedule, lambda job: dataclasses.replace(
        finished(job, 8.0), scores={"perplexity": {"value": "inf", "low": None, "high": None, "count": 1, "unit": ""}}
    ))  # fmt: skip
    json.dumps(table.to_dict(), allow_nan=False)
    assert table.to_dict()["rows"][0]["value"] == "inf"
    assert "inf" in to_csv(table)
    assert "<h1>" in page(table)


def test_the_page_has_every_row_and_nothing_from_elsewhere(schedule: Schedule) -> None:
    table = carried_out(schedule, best_in_the_middle)
    text = page(table)
    assert not re.search(r"https?:|//\w|<link|<img|src=|@import|url\(", text)
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    lines = body.split("</tr>")[:-1]
    assert len(lines) == len(table.rows)
    for row, line in zip(table.ordered, lines, strict=True):
        assert f">{row.row}</a>" in line
        values = re.findall(r'<td[^>]* data-value="([^"]*)"', line)
        assert len(values) == text[: text.index("<tbody>")].count("<th ") + 1  # the number has no words
        assert values[2] == ("" if row.value is None else str(row.value))
    assert text.count("<svg") == 7  # six costs, and losses
    assert text.count("<details") == len(table.rows)
    assert all(
        table.yaml[row.row].splitlines()[0][2:] in text.replace("&#x27;", "'") for row in table.rows[:2]
    )


def test_what_else_was_measured_has_its_means(schedule: Schedule) -> None:
    """Where every seed has it; the metric that rows are chosen by is not told twice."""

    def more(job: Job) -> JobResult:
        found = finished(job, 5.0 + job.seed)
        found.scores["exact_match"] = {"value": 0.2 * job.seed, "unit": ""}
        found.scores["nll"] = {"value": 1.5, "unit": "nats per token"}
        if job.seed:
            found.scores["now_and_then"] = {"value": 1.0, "unit": ""}
        return found

    table = carried_out(schedule, more)
    row = next(row for row in table.ordered if len(row.seeds) == 3)
    assert list(row.others) == ["exact_match", "nll"]
    assert row.others["exact_match"].mean == pytest.approx(0.2)
    assert row.others["exact_match"].std == pytest.approx(0.2)
    heads, lines = others(table)
    assert heads == ("", "exact_match", "nll")
    assert (row.row, "0.2 ± 0.2", "1.5 ± 0 nats per token") in lines
    assert "What else was measured" in page(table)
    assert "What else was measured" not in page(carried_out(schedule, best_in_the_middle))
    told = next(one for one in table.to_dict()["rows"] if one["row"] == row.row)["others"]["nll"]
    assert told == {"mean": 1.5, "std": 0.0, "unit": "nats per token"}


def compressing(job: Job) -> JobResult:
    """The rows of lora compress: their bundles hold a base of 5 MB in 2 MB; the others lie beside it."""
    within = job.row.startswith("lora")
    sizes = {"bundle_bytes": 2_000_000 if within else 300_000, "base_bytes": 0 if within else 5_000_000}
    return dataclasses.replace(finished(job, 8.0), **sizes)


def test_of_a_job_that_did_not_look_for_its_base_nothing_is_said(schedule: Schedule) -> None:
    """Its file is of an earlier version, and has no `base_bytes`."""
    table = carried_out(schedule, lambda job: dataclasses.replace(finished(job, 8.0), base_bytes=None))
    assert {(row.base_within, row.shipped_bytes) for row in table.rows} == {(None, None)}
    assert "with the base" not in page(table)


def test_a_bundle_with_its_base_is_not_taken_for_one_without(schedule: Schedule) -> None:
    table = carried_out(schedule, compressing)
    told = {
        row["row"]: (row["bundle_bytes"], row["base_within"], row["shipped_bytes"])
        for row in table.to_dict()["rows"]
    }
    assert told["lora rank=2"] == (2_000_000, True, 2_000_000)
    assert told["base"] == (300_000, False, 5_300_000)
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [(line["base_within"], line["shipped_bytes"]) for line in lines] == [
        ("true", "2000000"), ("true", "2000000"), ("", ""), ("false", "5300000"),
    ]  # fmt: skip
    text = page(table)
    assert text.count(">2 MB with the base</td>") == 2
    assert text.count(">5.3 MB</td>") == 1
    assert "size of the bundle, with the base where compressed</text>" in text
    assert "size of bundle and base</text>" in text
    assert "<b>with the base</b>: " in text
    without = page(carried_out(schedule, best_in_the_middle))
    assert "where compressed" not in without
    assert "with the base" not in without


@pytest.mark.parametrize(("stack", "within"), [("[lora]", False), ("[nf4]", True)])
def test_what_must_be_there_to_run_is_measured(tmp_path: Path, stack: str, within: bool) -> None:
    pipeline = f"""
peftx: 1
model: peftx:tiny
data: {{train: {{path: "peftx:sample/train.jsonl", limit: 4}}, eval: {{path: "peftx:sample/held_out.jsonl", limit: 2}}}}
stack: {stack}
train: {{steps: 1, batch_size: 2}}
evaluate: [perplexity]
"""
    if within:
        pipeline = pipeline.replace("train: {steps: 1, batch_size: 2}\n", "")
    job = Job("row", "seed", pipeline, "perplexity", 0, "")
    result = _measure(job, JobResult(job.id, job.kind, job.seed, job.rate), tmp_path, False)
    assert result.bundle_bytes == folder_bytes(tmp_path / "bundle")
    assert result.base_bytes == (
        0 if within else base_bytes("peftx:tiny", load_model("peftx:tiny", meta=True)[0])
    )


def test_text_of_others_cannot_act_in_the_page(schedule: Schedule) -> None:
    table = carried_out(
        schedule, lambda job: finished(job, 1.0, "<script>alert(1)</script>" if job.seed else "")
    )
    assert "<script>alert" not in page(table)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (30, 2.042), (60, 2.0003), (1000, 1.9623)]
)
def test_t(freedom: int, expected: float) -> None:
    assert t95(freedom) == pytest.approx(expected, abs=1e-3)


def test_spread() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.std) == (2.0, 1.0)
    assert found.high == pytest.approx(2.0 + 4.3027 / 3**0.5)
    assert spread([4.0]) == Spread(4.0)
    assert found.overlaps(Spread(4.4))
    assert not found.overlaps(Spread(4.6))


@given(
    metric=st.sampled_from(sorted(SCALES)),
    errors=st.lists(st.floats(0, 1), min_size=2, max_size=6),
    size=st.floats(1, 1e4),
)
def test_an_interval_ends_where_the_metric_does(metric: str, errors: list[float], size: float) -> None:
    """Perplexity is no less than 1, and a share between 0 and 1; the mean lies within."""
    values = [1 + size * error for error in errors] if metric == "perplexity" else errors
    found = spread(values, SCALES[metric])
    assert SCALES[metric].least <= found.low <= found.mean <= found.high <= SCALES[metric].most


@given(values=st.lists(st.floats(50, 60), min_size=2, max_size=6), factor=st.floats(1, 100))
def test_by_logarithms_an_interval_is_a_factor_to_both_sides(values: list[float], factor: float) -> None:
    """The same whatever the unit; and that of Student's t to first order, for a small spread."""
    found = spread(values, Scale(by_log=True))
    more = spread([factor * value for value in values], Scale(by_log=True))
    assert found.low * found.high == pytest.approx(found.mean**2)
    assert (more.low, more.high) == pytest.approx((factor * found.low, factor * found.high))
    close = spread([100 + value / 1e4 for value in values], Scale(by_log=True))
    plain = spread([100 + value / 1e4 for value in values])
    assert (close.low, close.high) == pytest.approx((plain.low, plain.high), rel=1e-8)


def test_every_metric_that_one_chooses_by_has_a_scale() -> None:
    assert SCALES.keys() == HIGHER_IS_BETTER.keys()


def test_the_front_is_what_none_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.7), (9.0, 0.9)]
    assert _front(points, True) == [(1.0, 0.5), (3.0, 0.9)]
    assert _front(points, False) == [(1.0, 0.5), (2.0, 0.4)]


@pytest.mark.parametrize(
    "axis", [Axis(0.0, 1.0, 0, 100), Axis(2.0, 2.0, 0, 100), Axis(1.4, 3.9, 0, 100, log=True),
             Axis(1e2, 1e7, 0, 100, log=True, zero=True)]
)  # fmt: skip
def test_ticks_lie_on_the_axis(axis: Axis) -> None:
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in ticks)


def test_names_of_files() -> None:
    assert slugs_of(["lora rank=4", "lora rank-4", "LORA rank/4", "a" * 300]) == {
        "lora rank=4": "lora-rank-4", "lora rank-4": "lora-rank-4-2", "LORA rank/4": "LORA-rank-4-3",
        "a" * 300: "a" * 80,
    }  # fmt: skip


def test_a_process_that_was_killed_left_a_reason(tmp_path: Path, schedule: Schedule) -> None:
    job = schedule.wanted({})[0]
    dead: Any = SimpleNamespace(exitcode=-9)
    pool = Processes(tmp_path, tmp_path, 1, 1, trust_remote_code=False)
    left = pool.lost(InProcess(job, tmp_path, dead))
    assert "SIGKILL, as the system does where memory runs out" in left.reason


def test_results_are_read_as_they_were_written(tmp_path: Path, schedule: Schedule) -> None:
    job = schedule.wanted({})[0]
    (tmp_path / "jobs").mkdir()
    write_result(tmp_path, finished(job, 3.0))
    found = read_result(tmp_path, job.id)
    assert found is not None
    assert found.value("perplexity") == 3.0
    result_file(tmp_path, job.id).write_text('{"id": "', "utf-8")
    assert read_result(tmp_path, job.id) is None


def test_data_that_is_not_there_ends_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text(
        FILE.replace("peftx:sample/train.jsonl", "gone.jsonl").replace("    base: {stack: []}\n", "")
    )
    with pytest.raises(PeftxError, match=r"no row of the comparison can be built(.|\n)*gone\.jsonl"):
        Schedule(load_compare(file, catalogue=Registry()), tmp_path, registry=Registry())


def test_rows_held_out_to_measure_on_are_parted_from_those_that_rates_are_chosen_on(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {n} is here"}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    file = tmp_path / "compare.yaml"
    data = 'data: {train: "peftx:sample/train.jsonl", eval: "peftx:sample/held_out.jsonl"}'
    file.write_text(FILE.replace(data, "data: {train: rows.jsonl, holdout: 0.25}"), "utf-8")
    schedule = Schedule(load_compare(file, catalogue=Registry()), tmp_path, registry=Registry())
    pipeline = schedule.rows[0].pipeline
    assert pipeline is not None
    assert pipeline.data.train is not None
    assert pipeline.data.eval is not None
    train, held = (Path(s.path).read_text().splitlines() for s in (pipeline.data.train, pipeline.data.eval))
    assert (len(train), len(held)) == (15, 5)
    assert sorted(map(str, map(json.loads, train + held))) == sorted(map(str, map(json.loads, rows)))
    job = schedule.wanted({})[0]
    assert pipeline.data.train.path in job.pipeline
    assert pipeline.data.eval.path not in job.pipeline


@pytest.mark.parametrize(("jobs", "allowed", "found"), [
    (1, "", (1, 8)), (2, "", (2, 4)), (1, "3", (1, 3)), (4, "3", (4, 2)), (0, "", (8, 1)), (1, "many", (1, 8)),
])  # fmt: skip
def test_processes_and_their_threads(
    jobs: int, allowed: str, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftx.comparing import place

    monkeypatch.setattr(place, "cores", lambda: 8)
    monkeypatch.setattr(place, "has_accelerator", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert place.side_by_side(jobs) == found
    assert place.side_by_side(jobs, ray=True) == (jobs, int(allowed) if allowed.isdecimal() else 1)


def test_a_cluster_is_filled() -> None:
    assert room({"CPU": 10.0}, 4) == 2
    assert room({"CPU": 1.0}, 4) == 1
    assert room({"CPU": 10.0, "GPU": 3.0}, 4) == 3
