"""From a spec to a bundle; and what is refused before anything is touched."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from torch import Tensor, nn, ones

import peftx
from peftx import Claim, Delta, Plugin, PluginConfig, hookimpl
from peftx.composition.registry import Registry
from peftx.errors import BundleError, ConflictError, DataError, PeftxError, SpecError
from peftx.kernel.names import GROUP
from peftx.pipeline import Run, load_run
from peftx.planning import plan


class GainConfig(PluginConfig):
    start: float = Field(1.0, gt=0, description="first value")


class GainDelta(Delta):
    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.z = nn.Parameter(ones(width) * start)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.z

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z[:, None], bias


class Gain(Plugin):
    Config = GainConfig
    claims = {Claim.MERGEABLE, Claim.IDENTITY_AT_START}
    config: GainConfig

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.down"):
            site.attach(GainDelta(site.out_features, self.config.start))


class Half(Plugin):
    """Keeps every second row."""

    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: Any) -> None:
        data.train = data.train.select(range(0, len(data.train), 2))


class Sieve(Plugin):
    """Says why rows go, and how far it is."""

    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: Any) -> None:
        data.progress(1, 2)
        data.keep(["too even" if n % 2 == 0 else None for n in range(len(data.train))], by="sieve")


class Length(Plugin):
    """Measures the mean length of the rows it is given."""

    @hookimpl
    def evaluate(self, evaluation: Any) -> None:
        rows = evaluation.rows("eval")
        evaluation.add("rows", len(rows), count=len(rows))


class Step(Plugin):
    claims = {Claim.REPLACES_STEP}

    @hookimpl
    def train_step(self, step: Any) -> Any:
        return step.total_loss()


class Pack(Plugin):
    """Says that packing takes a millisecond a token."""

    claims = {Claim.NEEDS_CALIBRATION}

    @hookimpl
    def compress(self, model: Any, calibration: Any) -> None: ...

    def seconds(self, model: Any, tokens: int) -> tuple[float, float]:
        return tokens / 1000, tokens / 500


REGISTRY = Registry(
    [
        EntryPoint(name, f"{__name__}:{cls.__name__}", GROUP)
        for name, cls in {
            "gain": Gain,
            "half": Half,
            "sieve": Sieve,
            "length": Length,
            "step": Step,
            "pack": Pack,
        }.items()
    ],
    disabled=(),
)

SPEC = """
peftx: 1
model: peftx:tiny
data: {{train: {train}, eval: {eval}}}
stack:
  - half
  - use: gain
    with: {{start: 1.0}}
  - length
train: {{steps: 3, batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2}}
evaluate: [perplexity]
output: {output}
"""


@pytest.fixture(autouse=True)
def _loadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module under its own name, since pytest imports it under none."""
    import sys

    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__)
    )
    for cls in (Gain, Half, Sieve, Length, Step, Pack):
        monkeypatch.setattr(sys.modules[__name__], cls.__name__, cls, raising=False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(8)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": tmp_path / "train.jsonl", "eval": tmp_path / "eval.jsonl", "output": tmp_path / "out"}


class Recorder:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.details: dict[str, str] = {}
        self.said: dict[str, list[str]] = {}
        self.steps: list[int] = []

    def stage(self, name: str, ids: Any) -> None:
        self.stages.append(name)

    def progress(self, done: int, total: int, values: dict[str, float]) -> None:
        if values:
            self.steps.append(done)

    def finished(self, name: str, seconds: float, detail: str) -> None:
        self.details[name] = detail
        self.said.setdefault(name, []).append(detail)


def make(files: dict[str, Path], **changes: Any) -> Run:
    text = SPEC.format(**files)
    return load_run(text, registry=REGISTRY, **changes)


def test_all_stages_run_in_order(files: dict[str, Path]) -> None:
    recorder = Recorder()
    result = make(files, reporter=recorder).run()
    assert recorder.stages == ["load", "inject", "prepare", "train", "evaluate", "save"]
    assert recorder.details["prepare"] == "8 rows became 4"
    assert recorder.steps == [1, 2, 3]
    (scores,) = result.scores.values()
    assert list(result.scores) == ["after train"]
    assert scores["rows"].value == 8
    assert scores["perplexity"].value > 1
    assert result.trainable == 6 * 256
    assert not (files["output"].parent / "out.checkpoints").exists()
    back = peftx.load(files["output"], registry=REGISTRY)
    assert list(back.plugins) == ["half", "gain", "length"]
    assert back.scores["perplexity"] == scores["perplexity"]


def test_evaluations_are_named_after_what_they_follow(files: dict[str, Path]) -> None:
    stages = (
        "run: [evaluate, {prepare: half}, inject, evaluate, {train: {steps: 1}}, evaluate, evaluate,"
        " {evaluate: {name: last}}]"
    )
    result = load_run(SPEC.format(**files) + stages, registry=REGISTRY).run()
    assert list(result.scores) == ["base", "after inject", "after train", "after train #2", "last"]


def test_explicit_stages(files: dict[str, Path]) -> None:
    text = (
        SPEC.format(**files)
        + "run: [{prepare: half}, inject, {train: {steps: 1}}, {freeze: gain}, {merge: gain},"
        + (" {evaluate: {name: after}}, save]\n")
    )
    result = load_run(text, registry=REGISTRY).run()
    assert list(result.scores) == ["after"]
    assert result.stack.standing["gain"].folded
    assert result.training[0].steps == 1
    assert peftx.load(files["output"], registry=REGISTRY).standing["gain"].folded


def test_resume_goes_on_from_the_checkpoint(files: dict[str, Path]) -> None:
    class Stop(Exception):
        pass

    class Stopping(Recorder):
        def progress(self, done: int, total: int, values: dict[str, float]) -> None:
            super().progress(done, total, values)
            if values and done == 3:
                raise Stop

    with pytest.raises(Stop):
        make(files, reporter=Stopping()).run()
    assert not files["output"].exists()
    recorder = Recorder()
    make(files, reporter=recorder, resume=True).run()
    assert recorder.steps == [3]
    (where,) = recorder.said["resume"]
    assert re.fullmatch(r"goes on behind step 2 of 3: .*/out\.checkpoints/stage-\d/checkpoint-2", where)
    assert recorder.stages.count("train") == 2, "the training's own line goes on below"
    whole = Recorder()
    make(files, reporter=whole).run()
    assert "resume" not in whole.said


def test_bad_input_is_found_before_the_model_is_loaded(files: dict[str, Path], tmp_path: Path) -> None:
    files["train"].write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        load_run(SPEC.format(**files), registry=REGISTRY)
    with pytest.raises(DataError, match="missing"):
        load_run(SPEC.format(**{**files, "train": tmp_path / "missing.jsonl"}), registry=REGISTRY)
    files["train"].write_text('{"prompt": "a", "completion": "b"}\n')
    files["output"].mkdir()
    (files["output"] / "thesis.tex").write_text("mine")
    with pytest.raises(BundleError, match="is no bundle"):
        make(files)


def test_what_a_late_stage_would_refuse_is_refused_before_anything_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cfsp prunes, which takes a pass over texts, what cofitune is to train behind it."""
    told = Recorder()
    spec = (
        "peftx: 1\nmodel: peftx:tiny\nstack: [cfsp, cofitune]\ntrain: {steps: 1}\n"
        "data: {train: peftx:sample/train.jsonl, sources: {general: peftx:sample/train.jsonl},"
        " calibration: {path: peftx:sample/train.jsonl, limit: 8, max_length: 32}}\n"
        f"output: {tmp_path / 'out'}\n"
    )
    run = load_run(spec, reporter=told)
    with pytest.raises(ConflictError, match=r"'cofitune' stands on .*, which 'cfsp' pruned"):
        run.run()
    assert not told.stages
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("peftx.pipeline.check_plan", lambda *_, **__: None)
    with pytest.raises(ConflictError, match=r"'cofitune' stands on .*, which 'cfsp' pruned"):
        run.run()
    assert told.stages == ["load", "compress", "inject"], "what the plan told ahead"


def test_the_first_of_several_processes_writes_and_tells(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go as far as the last training, and leave nothing."""
    monkeypatch.setenv("RANK", "1")
    told = Recorder()
    run = make(files, reporter=told)
    result = run.run()
    assert result.training
    assert list(result.seconds)[-1].endswith("train")
    assert not told.stages
    assert not files["output"].exists()
    assert not list(files["output"].parent.glob("*dropped*"))


def test_conflicts_name_both_places(files: dict[str, Path]) -> None:
    text = SPEC.format(**files).replace("  - length\n", "  - length\n  - step\n  - {use: step, id: other}\n")
    with pytest.raises(
        ConflictError, match=r"'step' \(<text>:10:\d+\) and 'other' \(<text>:11:\d+\) both replace"
    ):
        load_run(text, registry=REGISTRY)


def test_spec_errors_come_at_once(files: dict[str, Path]) -> None:
    text = SPEC.format(**files).replace("start: 1.0", "strat: 1.0").replace("steps: 3", "steps: many")
    with pytest.raises(SpecError) as caught:
        load_run(text, registry=REGISTRY)
    assert len(caught.value.problems) == 2


def test_overrides(files: dict[str, Path]) -> None:
    run = load_run(SPEC.format(**files), registry=REGISTRY, overrides=["gain.start=2.5", "train.steps=7"])
    assert run.members[1].plugin.config == GainConfig(start=2.5)
    assert run.pipeline.train is not None
    assert run.pipeline.train.steps == 7


def test_plan_loads_no_weight(files: dict[str, Path]) -> None:
    found = plan(make(files).pipeline, registry=REGISTRY)
    assert [stage.name for stage in found.stages] == ["inject", "prepare", "train", "evaluate", "save"]
    assert found.totals.trainable_params == found.totals.added_params == 6 * 256
    assert {module.role for module in found.modules} == {"mlp.down"}
    assert found.runnable
    assert not files["output"].exists()


def test_plan_says_what_packing_does_not_go_with() -> None:
    def reasons(plugin: str) -> list[str]:
        text = (
            f"peftx: 1\nmodel: peftx:tiny\ndata: {{train: 'peftx:sample/train.jsonl'}}\nstack: [{plugin}]\n"
        )
        run = load_run(text + "train: {steps: 2, packing: true}\n")
        return [conflict.reason for conflict in plan(run.pipeline).conflicts]

    assert reasons("lora") == []
    (reason,) = reasons("p-tuning-v2")
    assert "'p-tuning-v2' may look across the tokens of a row" in reason


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (None, "about 8.2 to 16 s on one CPU core, for up to 8,192 tokens"),
        (100, "about 3.2 to 6.4 s on one CPU core, for up to 3,200 tokens"),
        (20, ""),  # under two seconds it is not worth a word
    ],
)
def test_plan_says_what_compression_takes(files: dict[str, Path], length: int | None, said: str) -> None:
    source = f"{{path: {files['train']}" + (f", max_length: {length}}}" if length else "}")
    text = f"peftx: 1\nmodel: peftx:tiny\ndata: {{calibration: {source}}}\nstack: [pack]\n"
    (stage, *_) = plan(load_run(text, registry=REGISTRY).pipeline, registry=REGISTRY).stages
    assert (stage.name, stage.detail) == ("compress", said)


def test_packaged_data() -> None:
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {eval: 'peftx:sample/trian.jsonl'}\n"
    with pytest.raises(DataError, match=r"no packaged data") as caught:
        load_run(text, registry=REGISTRY)
    assert "peftx:sample/train.jsonl" in str(caught.value)


def test_columns_of_the_evaluation_data_are_read_as_the_spec_says(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"question": "2 + 2 =", "answer": "4"}\n' * 3)
    spec = (
        "peftx: 1\nmodel: peftx:tiny\n"
        "data: {eval: {path: held.jsonl, columns: {prompt: question, completion: answer}, limit: 2}}\n"
        "evaluate: [perplexity]\n"
    )
    (tmp_path / "a.yaml").write_text(spec)
    result = load_run(tmp_path / "a.yaml").run()
    (scores,) = result.scores.values()
    assert scores["perplexity"].count == 2  # one token in each of two rows


def test_the_bundle_repeats_the_spec_that_made_it(files: dict[str, Path]) -> None:
    make(files).run()
    again = load_run(files["output"] / "pipeline.yaml", registry=REGISTRY).pipeline
    assert again.data.train is not None
    assert again.data.train.path == str(files["train"])
    assert again.train is not None
    assert again.train.steps == 3
    assert [metric.metric for metric in again.evaluate] == ["perplexity"]
    assert {entry.id: dict(entry.options) for entry in again.stack}["gain"] == {"start": 1.0}


def test_a_metric_that_cannot_read_the_data_is_refused_before_anything_runs(files: dict[str, Path]) -> None:

    text = SPEC.format(**files).replace("[perplexity]", "[accuracy]")
    with pytest.raises(PeftxError, match="accuracy reads rows of classification"):
        load_run(text, registry=REGISTRY)


def test_a_metric_of_the_command_line_is_known_before_anything_runs(files: dict[str, Path]) -> None:
    from peftx_spec.models import EvaluateSpec

    pipeline = load_run(SPEC.format(**files), registry=REGISTRY).pipeline
    wrong = pipeline.model_copy(update={"evaluate": (EvaluateSpec.model_validate({"perplexty": {}}),)})
    with pytest.raises(PeftxError, match="unknown metric 'perplexty'") as caught:
        Run(wrong, registry=REGISTRY)
    assert "perplexity" in str(caught.value.hint)


def test_the_spec_and_the_core_know_the_same_metrics() -> None:
    import peftx_spec
    from peftx.toolkits.evaluation.run import METRICS

    assert tuple(METRICS) == peftx_spec.METRICS


def test_a_failed_evaluation_does_not_lose_the_training(files: dict[str, Path], monkeypatch: Any) -> None:
    def fails(self: Any, evaluation: Any) -> None:
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Length.evaluate, "__code__", fails.__code__)
        with pytest.raises(Exception, match="a bug"):
            make(files).run()
    recorder = Recorder()
    make(files, resume=True, reporter=recorder).run()
    assert recorder.steps == []  # nothing was trained again
    assert files["output"].exists()


def test_calibration_honours_its_options(files: dict[str, Path]) -> None:
    seen: list[Any] = []

    class Looks(Plugin):
        claims = {Claim.QUANTIZES, Claim.NEEDS_CALIBRATION}

        @hookimpl
        def compress(self, model: Any, calibration: Any) -> None:
            seen.append(calibration)

    path = files["train"].parent / "calibration.jsonl"
    path.write_text("".join(json.dumps({"body": "word " * 40 + str(i)}) + "\n" for i in range(6)))
    spec = f"""
peftx: 1
model: peftx:tiny
data: {{calibration: {{path: {path}, columns: {{text: body}}, limit: 2, max_length: 16}}}}
stack: [looks]
"""
    sys_registry = Registry([EntryPoint("looks", f"{__name__}:Looks", GROUP)], disabled=())
    import sys

    sys.modules[__name__].Looks = Looks
    load_run(spec, registry=sys_registry).run()
    lengths = [batch["input_ids"].shape[1] for batch in seen[0].batches]
    assert max(lengths) == 16
    assert sum(lengths) < 120  # two rows and not six


def test_rows_are_made_anew_in_every_round(files: dict[str, Path]) -> None:
    """By the model as it is then: what `prepare_data` made in the last round is not what it starts from."""
    rounds_of = "run: [inject, {repeat: {times: 3, run: [prepare, train]}}, evaluate, save]\noutput:"
    run = load_run(SPEC.format(**files).replace("output:", rounds_of), registry=REGISTRY)
    seen: list[tuple[str, int]] = []

    class Notes:
        def stage(self, name: str, ids: object) -> None:
            seen.append(
                (name, len(run.data.train) if run.data is not None and run.data.train is not None else 0)
            )

        def progress(self, done: int, total: int, values: object) -> None: ...

        def finished(self, name: str, seconds: float, detail: str) -> None: ...

    run.reporter = Notes()
    run.run()
    rounds = [(name, rows) for name, rows in seen if name.startswith("train")]
    assert [name for name, _ in rounds] == [f"train (round {n} of 3)" for n in (1, 2, 3)]
    assert len({rows for _, rows in rounds}) == 1


def test_rows_that_plugins_drop_stand_beside_the_bundle_with_their_reasons(files: dict[str, Path]) -> None:
    recorder = Recorder()
    text = SPEC.format(**files).replace("- half", "- sieve")
    load_run(text, registry=REGISTRY, reporter=recorder).run()
    dropped = files["output"].with_name("out.dropped.jsonl")
    assert recorder.details["prepare"] == f"8 rows became 4; dropped 4: 4 too even ({dropped})"
    found = [json.loads(line) for line in dropped.read_text().splitlines()]
    assert [one["row"]["prompt"] for one in found] == [f"say {n}" for n in (0, 2, 4, 6)]
    make(files).run()
    assert not dropped.exists()
