"""A stream of tasks: rounds over named sources, accuracy by task, and what sums the matrix up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import peftx
from peftx import Plugin, PluginConfig, Stack, hookimpl
from peftx.composition.registry import Registry
from peftx.errors import DataError
from peftx.history import History
from peftx.kernel.calls import listening
from peftx.pages import page
from peftx.pages import told as told_of
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.previewing import preview
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.evaluation.scores import Score
from peftx.toolkits.evaluation.streams import WITHIN, AccuracyMatrix
from peftx_cli.main import app
from peftx_spec import SpecError, load_pipeline

LABELS = ("rain", "sun", "bad", "good")
TASKS = {"weather": LABELS[:2], "mood": LABELS[2:]}


# ----------------------------------------------------------------------------------------------- accuracy by task
class SaysConfig(PluginConfig):
    known: tuple[str, ...] = LABELS


class Says(Plugin):
    """A head that finds the class that stands in the text, of those that it knows; of others it finds the first."""

    Config = SaysConfig
    takes, gives = ("classification",), {"classification": "tokenized"}

    @hookimpl
    def prepare_data(self) -> None: ...

    def classify(self, stack: Stack, texts: list[str]) -> tuple[list[str], torch.Tensor]:
        known = list(self.config.known)
        scores = [[float(name in text) + 0.1 * (name == "good") for name in known] for text in texts]
        return known, torch.tensor(scores)


def row(text: str, label: str, task: str) -> dict[str, str]:
    return {"text": text, "label": label, "task": task}


ROWS = [
    row("rain", "rain", "weather"),
    row("sun", "sun", "weather"),
    row("sun", "rain", "weather"),
    row("nothing", "sun", "weather"),
    row("good", "good", "mood"),
    row("rain, and a bad one", "bad", "mood"),
]


def measured(*known: str) -> dict[str, float]:
    stack = Stack(tiny("llama"), [Says(known=known or LABELS)], tokenizer=tiny_tokenizer())
    return {name: score.value for name, score in stack.evaluate(ROWS, metrics=["task-accuracy"]).items()}


def test_classes_are_found_among_all_and_among_the_tasks_own() -> None:
    """`nothing` is taken for `good`, of the other task; without it nothing is known, which is not right either."""
    assert measured() == {
        "accuracy/weather": 0.5, "accuracy/mood": 0.5, "task-accuracy": 0.5,
        "accuracy-within/weather": 0.5, "accuracy-within/mood": 1.0, "task-accuracy-within": 0.75,
    }  # fmt: skip


def test_a_class_that_the_head_does_not_know_is_never_right() -> None:
    found = measured("bad", "good")
    assert found["accuracy/weather"] == found["accuracy-within/weather"] == 0
    assert found["accuracy/mood"] == found["accuracy-within/mood"] == 1


def test_a_class_that_no_row_has_is_an_answer_too() -> None:
    found = measured(*LABELS, "and a")
    assert (found["accuracy/mood"], found["accuracy-within/mood"]) == (0.5, 1)
    rows = [row("rain, or thunder", "rain", "weather")]
    stack = Stack(tiny("llama"), [Says(known=("sun", "thunder", "rain"))], tokenizer=tiny_tokenizer())
    scores = stack.evaluate(rows, metrics=["task-accuracy"])
    assert (scores["accuracy/weather"].value, scores["accuracy-within/weather"].value) == (0, 1)


def test_without_a_head_the_likelihood_says_as_for_accuracy() -> None:
    stack = Stack("peftx:tiny", [])
    rows = [
        row(f"Today there is {w}: {label}", label, task)
        for task, own in TASKS.items()
        for label in own
        for w in "ab"
    ]
    found = stack.evaluate(rows, metrics=["task-accuracy"], max_length=32)
    whole = stack.evaluate(rows, metrics=["accuracy"], max_length=32)["accuracy"]
    assert found["task-accuracy"].value == whole.value  # tasks of as many rows
    for task in TASKS:
        alone = stack.evaluate([r for r in rows if r["task"] == task], metrics=["accuracy"], max_length=32)
        assert found[f"accuracy-within/{task}"] == Score(
            **{**vars(alone["accuracy"]), "name": f"accuracy-within/{task}"}
        )


class Told(Says):
    """Right, and notes which task it was told."""

    seen: list[list[int]]

    @hookimpl
    def inject(self, model: Any) -> None:
        self.call, self.seen = model.call, []
        model.column("task")

    def classify(self, stack: Stack, texts: list[str]) -> tuple[list[str], torch.Tensor]:
        with listening(stack.model) as call:
            handle = stack.model.get_input_embeddings().register_forward_hook(
                lambda *_: self.seen.append(call.batch["task"].tolist())
            )
            stack.model(torch.ones(2, 3, dtype=torch.long))
            handle.remove()
        return super().classify(stack, texts)


def test_who_reads_the_task_is_told_its_place_in_the_stream() -> None:
    plugin = Told()
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer())
    stack.evaluate(ROWS, metrics=["task-accuracy"], tasks=["mood", "weather"])
    stack.evaluate(ROWS, metrics=["task-accuracy"])
    assert plugin.seen == [[0, 0], [1, 1], [0, 0], [1, 1]]
    names = list(stack.evaluate(ROWS, metrics=["task-accuracy"], tasks=["mood", "weather"]))
    assert names[0] == "accuracy/mood"


@pytest.mark.parametrize(
    ("tasks", "said"),
    [(["weather", "mod"], "row 4 .* of task 'mood', and the stream"), (["weather", "mood", "a"], "no row")],
)
def test_other_tasks_than_the_streams_are_refused(tasks: list[str], said: str) -> None:
    stack = Stack(tiny("llama"), [Says()], tokenizer=tiny_tokenizer())
    with pytest.raises(DataError, match=said):
        stack.evaluate(ROWS, metrics=["task-accuracy"], tasks=tasks)


@pytest.mark.parametrize("task", [None, 1])
def test_rows_of_no_task_are_refused(task: Any) -> None:
    stack = Stack(tiny("llama"), [Says()], tokenizer=tiny_tokenizer())
    bad = [*ROWS, {**ROWS[0], "task": task}]
    with pytest.raises(DataError, match=r"row 6 .* no name of a task"):
        stack.evaluate(bad, metrics=["task-accuracy"])


# ------------------------------------------------------------------------------------------------------ the matrix
def history(values: list[list[float]], before: list[float] | None = None) -> History:
    found, names = History(), ["a", "b", "c"]

    def told(name: str, row: list[float]) -> None:
        kinds = {"accuracy": row, WITHIN: [1.0] * 3}
        found.evaluated(name, {f"{kind}/{task}": Score(name=task, value=v) for kind, vs in kinds.items()
                               for task, v in zip(names, vs, strict=True)})  # fmt: skip

    if before is not None:
        told("before", before)
    for name, row in zip(names, values, strict=True):
        found.trained([], steps=1)
        told(name, row)
    return found


VALUES = [[0.9, 0.3, 0.0], [0.5, 0.8, 0.2], [0.6, 0.4, 0.7]]


def test_the_three_numbers_by_hand() -> None:
    matrix = AccuracyMatrix.of(history(VALUES, [0.1, 0.2, 0.1]))
    assert matrix is not None
    assert matrix.average == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert matrix.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.3 - 0.2) + (0.2 - 0.1)) / 2)
    assert matrix.rows()[:2] == [("before", "0.100", "0.200", "0.100"), ("a", "0.900", "0.300", "0.000")]


def test_what_was_not_measured_is_not_told() -> None:
    matrix = AccuracyMatrix.of(history(VALUES))
    assert matrix is not None
    assert matrix.forward_transfer is None
    assert AccuracyMatrix.of(history(VALUES), WITHIN) == AccuracyMatrix(("a", "b", "c"), ((1.0,) * 3,) * 3)
    one = AccuracyMatrix(("a",), ((0.5,),), (0.1,))
    assert one.told() == {"average": 0.5, "forgetting": None, "forward transfer": None}
    assert AccuracyMatrix.of(History()) is None


# ----------------------------------------------------------------------------------------------------- in a pipeline
SPEC = """
peftx: 1
model: peftx:tiny
data:
  sources: {{weather: {folder}/weather.jsonl, mood: {folder}/mood.jsonl}}
  eval: {folder}/eval.jsonl
stack: [{stack}]
train: {{steps: 6, batch_size: 4, learning_rate: 1e-2, max_length: 32}}
evaluate: [task-accuracy]
run:
  - inject
  - evaluate: {{name: before}}
  - repeat: {{over: [weather, mood], run: [prepare, train, evaluate]}}
  - save
output: {folder}/out
"""
LAE = "{use: lae, with: {tasks: [[rain, sun], [bad, good]], frozen: 0}}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    held_out = []
    for task, labels in TASKS.items():
        rows = [{"text": f"{n} times {label}", "label": label} for n in range(6) for label in labels]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]), "utf-8")
        held_out += [{**row, "task": task} for row in rows[:4]]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), "utf-8")
    return tmp_path


def spec(folder: Path, stack: str = LAE) -> str:
    return SPEC.format(folder=folder, stack=stack)


def test_a_stream_is_gone_through_task_by_task_and_the_bundle_tells_of_it(folder: Path) -> None:
    result = load_run(spec(folder)).run()
    assert [e.name for e in result.stack.history.evaluations] == ["before", "weather", "mood"]
    assert [report.examples for report in result.training] == [8, 8]
    assert result.stack.plugins["lae"].state == {"task": 1}
    matrix = AccuracyMatrix.of(peftx.load(folder / "out").history)
    assert matrix is not None
    assert matrix.tasks == ("weather", "mood")
    assert matrix.values[0][1] == 0, "a class that is yet to come is no answer"
    assert matrix.forward_transfer == 0
    by_hand = Stack(
        "peftx:tiny",
        [result.stack.member("lae").plugin.__class__(**result.stack.plugins["lae"].config.model_dump())],
    )
    for task in TASKS:
        by_hand.train(folder / f"{task}.jsonl", steps=6, batch_size=4, learning_rate=1e-2, max_length=32)
    same = zip(by_hand.ledger.parameters("lae"), result.stack.ledger.parameters("lae"), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


class StopsIn:
    """A reporter that ends the run within a round."""

    def __init__(self, name: str) -> None:
        self.name, self.inside = name, False

    def stage(self, name: str, ids: object) -> None:
        self.inside = name == self.name

    def progress(self, done: int, total: int, values: object) -> None:
        if self.inside and done == 4:
            raise KeyboardInterrupt

    def finished(self, name: str, seconds: float, detail: str) -> None: ...


def test_a_stream_goes_on_where_it_was_stopped(folder: Path) -> None:
    text = spec(folder).replace("steps: 6", "steps: 6, checkpoint_every: 2")
    with pytest.raises(KeyboardInterrupt):
        load_run(text, reporter=StopsIn("train (mood, 2 of 2)")).run()
    again = load_run(text, resume=True).run().stack
    whole = load_run(text).run().stack
    same = zip(again.ledger.parameters("lae"), whole.ledger.parameters("lae"), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert AccuracyMatrix.of(again.history) == AccuracyMatrix.of(whole.history)


class Notes(Plugin):
    """Reads the column of the task."""

    @hookimpl
    def inject(self, model: Any) -> None:
        model.column("task")
        self.call = model.call
        model.train("attention.q layers=0")

    @hookimpl
    def prepare_data(self, data: Any) -> None:
        self.found = [*getattr(self, "found", []), set(data.train["task"])]

    @hookimpl(wrapper=True)
    def train_step(self, step: Any) -> Any:
        assert set(step.batch["task"].tolist()) == self.found[-1]
        return (yield)


def test_rows_say_the_place_of_their_task_and_other_sources_do_not_come(folder: Path) -> None:
    from importlib.metadata import EntryPoint

    from peftx.composition.registry import GROUP

    registry = Registry([EntryPoint("notes", f"{__name__}:Notes", GROUP)], disabled=())
    text = spec(folder, "notes").replace("sources: {", f"sources: {{more: {folder}/mood.jsonl, ")
    run = load_run(text, registry=registry)
    stack = run.run().stack
    assert stack.plugins["notes"].found == [{0}, {1}]


def test_plan_and_preview_know_the_rounds(folder: Path) -> None:
    pipeline = load_pipeline(spec(folder), catalogue=Registry())
    found = [(stage.name, stage.detail) for stage in plan(pipeline).stages if stage.name == "train"]
    assert found == [("train", "weather, 1 of 2"), ("train", "mood, 2 of 2")]
    rows = preview(spec(folder), source="weather")
    assert [one.plugin for one in rows.prepared] == ["lae"], "the hooks see these rows"


def test_rows_of_a_task_that_nobody_trains_on_are_refused_before_anything_runs(folder: Path) -> None:
    (folder / "mood.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "utf-8")
    for stack, said in (
        (LAE, "give data.sources.mood such rows"),
        ("lora", "no plugin of the stack trains on rows of"),
    ):
        (folder / "spec.yaml").write_text(spec(folder, stack), "utf-8")
        told = CliRunner().invoke(app, ["validate", str(folder / "spec.yaml")])
        assert told.exit_code == 2
        assert said in " ".join(told.output.split())


def test_the_command_prints_the_matrix_and_the_report_draws_it(folder: Path) -> None:
    (folder / "spec.yaml").write_text(spec(folder), "utf-8")
    told = CliRunner().invoke(app, ["apply", str(folder / "spec.yaml")])
    assert told.exit_code == 0, told.output
    matrix = AccuracyMatrix.of(peftx.load(folder / "out").history)
    assert matrix is not None
    assert (
        f"average {matrix.average:.3f}, forgetting {matrix.forgetting:.3f}, forward transfer 0.000"
        in told.output
    )
    assert "accuracy/weather, mood" not in told.output
    shown = page(told_of(folder / "out"))
    assert f"among all classes: average {matrix.average:.5g}" in shown
    assert shown.count("<td>weather</td>") == 2


def test_rows_to_measure_on_of_other_tasks_are_refused_before_anything_is_loaded(folder: Path) -> None:
    text = (folder / "eval.jsonl").read_text("utf-8")
    (folder / "eval.jsonl").write_text(text.replace('"mood"', '"mod"'), "utf-8")
    with pytest.raises(DataError, match="is of task 'mod', and the stream has weather, mood"):
        load_run(spec(folder))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("over: [weather, mood]", "over: [weather, mod]", "'over' names 'mod', which is not in data.sources"),
        ("over: [weather, mood]", "over: [mood, mood]", "over names a source twice"),
        ("over: [weather, mood]", "over: []", "over"),
        ("over: [weather, mood]", "times: 2", "there is nothing to train on: data.train is missing"),
        ("over: [weather, mood]", "over: [mood], times: 2", "either times or over"),
        ("over: [weather, mood], ", "", "either times or over"),
    ],
)
def test_a_stream_that_is_none_is_refused(folder: Path, old: str, new: str, said: str) -> None:
    assert old in spec(folder)
    with pytest.raises(SpecError) as caught:
        load_pipeline(spec(folder, "lora").replace(old, new), catalogue=Registry())
    assert said in str(caught.value)
