"""What a spec, the first row of its data and its plugins' claims can tell is said before the work, with its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from peftx.engines.data import read_dataset
from peftx.errors import DataError
from peftx_cli.peek import MOST, Unfit, labels, look

SPEC = """\
peftx: 1
model: peftx:tiny
data:
  train: {train}
  eval: {eval}
stack: [fake-gain]
train: {{steps: 1}}
evaluate: [{metric}]
"""
PAIRS = b'{"prompt": "a", "completion": "b"}\n'
FILES = {
    "pairs.jsonl": PAIRS,
    "questions.jsonl": b'{"ask": "a", "reply": "b"}\n',
    "reviews.csv": b"text,label\nfine,good\n",
    "preferences.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "notes.txt": b"Once upon a time.",
    "empty.jsonl": b"",
    "bad.jsonl": PAIRS + b'{"prompt": "a", "completion": null}\n\n{"prompt": 5, "completion": "b"}\n'
    b'{"completion": "b"}\n{"prompt": "a", "completion": NaN}\n' + PAIRS,
    "bad_questions.jsonl": b'{"ask": "a", "reply": null}\n',
    "bad.json": b'[{"text": "a", "label": "1"}, {"text": "b", "label": -3}]',
    "bad.csv": b'text,label\n"two\nlines",good\nshort\n',
    "void.jsonl": PAIRS + b'\n{"prompt": "a", "completion": ""}\n' + PAIRS,
    "unanswered.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
    "turns.jsonl": b'{"messages": [{"role": "user", "content": null}]}\n',
}


@pytest.fixture
def world(installed: Any) -> Any:
    installed.scaffold("fake-gain", "inject")
    for name, raw in FILES.items():
        (installed.work / name).write_bytes(raw)
    parquet.write_table(pa.table({"text": ["a", None]}), installed.work / "bad.parquet")
    return installed


def spec(world: Any, text: str = SPEC, **change: str) -> str:
    values = {"train": "pairs.jsonl", "eval": "pairs.jsonl", "metric": "perplexity"} | change
    (world.work / "spec.yaml").write_text(text.format(**values), "utf-8")
    return "spec.yaml"


CASES: list[tuple[dict[str, str], str, list[str]]] = [
    ({"train": "pair.jsonl"}, "4:10", ["pair.jsonl does not exist", "did you mean 'pairs.jsonl'"]),
    ({"train": "{path: gone/x.jsonl}"}, "4:17", ["gone/x.jsonl does not exist", "there is no folder"]),
    ({"eval": "."}, "5:9", ["is a folder, not a data file", "pairs.jsonl"]),
    ({"eval": "/dev/null"}, "5:9", ["no plain file"]),
    ({"train": "empty.jsonl"}, "4:10", ["empty.jsonl is empty"]),
    (
        {"train": "peftx:sample/trian.jsonl"},
        "4:10",
        ["no packaged data", "did you mean 'peftx:sample/train.jsonl'"],
    ),
    (
        {"train": "questions.jsonl"},
        "4:10",
        ["'ask', 'reply' fit no format", "columns: {prompt: question}"],
    ),
    (
        {"train": "{path: questions.jsonl, columns: {prompt: aks, completion: reply}}"},
        "4:43",
        ["there is no column 'aks'", "did you mean 'ask'?"],
    ),
    (
        {"train": "{path: pairs.jsonl, columns: {prompt: question}}"},
        "4:39",
        ["there is no column 'question'", "there are 'prompt', 'completion'"],
    ),
    (
        {"train": "bad.jsonl"},
        "4:10",
        ["bad.jsonl:2: 'completion' must be a string, got null; 3 further rows are refused too: 4, 5, 6"],
    ),
    (
        {"train": "{path: bad_questions.jsonl, columns: {prompt: ask, completion: reply}}"},
        "4:17",
        ["bad_questions.jsonl:1: 'reply' (our 'completion') must be a string, got null"],
    ),
    (
        {"train": "bad.json"},
        "4:10",
        ["bad.json: row 1 (counting from 0): 'label' must be", "whole numbers from 0 on"],
    ),
    (
        {"train": "bad.parquet"},
        "4:10",
        ["bad.parquet: row 1 (counting from 0): 'text' must be a string, got null"],
    ),
    ({"train": "turns.jsonl"}, "4:10", ["turns.jsonl:1: messages[0]: 'content' must be a string, got null"]),
    ({"train": "void.jsonl"}, "4:10", ["void.jsonl:3: the completion '' has no tokens"]),
    (
        {"train": "unanswered.jsonl"},
        "4:10",
        ["unanswered.jsonl:1: the conversation has no turn of the assistant"],
    ),
    ({"train": "{path: pairs.jsonl, format: messages}"}, "4:38", ["messages needs the column 'messages'"]),
    ({"train": "{path: notes.txt, format: messages}"}, "4:36", ["messages needs rows"]),
    ({"train": "{path: notes.txt, columns: {a: b}}"}, "4:37", ["has no columns"]),
    (
        {"metric": "accuracy"},
        "8:12",
        ["accuracy reads rows of classification, and these are prompt-completion"],
    ),
    ({"metric": "accuracy"}, "8:12", ["for these rows there is perplexity and exact-match"]),
    (
        {"metric": "{exact-match: {path: reviews.csv}}"},
        "8:13",
        ["exact-match reads rows of prompt-completion"],
    ),
    ({"metric": "{perplexity: {path: preferences.jsonl}}"}, "8:13", ["these are preference", "another file"]),
    ({"metric": "{perplexity: reviews.cvs}"}, "8:25", ["reviews.cvs does not exist", "reviews.csv"]),
    ({"train": "preferences.jsonl"}, "4:10", ["no plugin of the stack trains on rows of preference"]),
]


@pytest.mark.parametrize(("change", "place", "words"), CASES)
def test_data_that_does_not_fit(
    world: Any,
    refused: Callable[..., str],
    run: Callable[..., Any],
    change: dict[str, str],
    place: str,
    words: list[str],
) -> None:
    file = spec(world, **change)
    message = refused("validate", file)
    assert f"spec.yaml:{place}: " in message, message
    assert all(word in message for word in words), message
    assert "1 problem" in message
    assert refused("plan", file) == message
    assert refused("apply", file) == message
    problem = json.loads(run("validate", file, "--json").stdout)["problems"][0]
    assert f"{problem['line']}:{problem['column']}" == place


@pytest.mark.parametrize(
    ("train", "place"),
    [
        ("train: {{steps: 1, report_to: trackio}}", "7:30"),
        ("train: {{steps: 1}}\nrun: [inject, train: {{report_to: trackio}}, evaluate]", "8:34"),
    ],
)
def test_a_tracker_that_is_not_installed(
    world: Any, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, train: str, place: str
) -> None:
    file = spec(world, SPEC.replace("train: {{steps: 1}}", train))
    assert f"spec.yaml:{place}: report_to: trackio is not installed" in refused("validate", file)
    assert "pip install trackio" in refused("apply", file)


def test_rows_behind_a_limit_are_nobodys(world: Any, run: Callable[..., Any]) -> None:
    assert run("validate", spec(world, train="{path: bad.jsonl, limit: 1}")).exit_code == 0


def test_rows_that_are_not_trained_on_as_they_are(world: Any, run: Callable[..., Any]) -> None:
    """They are measured, or a plugin may yet say what is to be learned."""
    assert run("validate", spec(world, eval="void.jsonl", metric="exact-match")).exit_code == 0
    world.scaffold("fake-rows", "prepare_data")
    stack = SPEC.replace("[fake-gain]", "[fake-rows, fake-gain]")
    assert run("validate", spec(world, stack, train="void.jsonl")).exit_code == 0


def test_what_is_seen_of_rows_is_what_a_run_refuses(world: Any) -> None:
    for name in ("bad.jsonl", "bad.json", "bad.parquet", "turns.jsonl"):
        with pytest.raises(Unfit) as seen:
            look(str(world.work / name))
        with pytest.raises(DataError) as refused:
            read_dataset(world.work / name)
        assert seen.value.message == refused.value.message


def test_all_files_at_once(world: Any, refused: Callable[..., str]) -> None:
    message = refused(
        "validate", spec(world, train="pair.jsonl", eval="review.csv", metric="{perplexity: x.txt}")
    )
    assert "3 problems" in message
    assert [place in message for place in ("spec.yaml:4:", "spec.yaml:5:", "spec.yaml:8:")] == [True] * 3


def test_what_fits_is_valid(world: Any, run: Callable[..., Any]) -> None:
    mapped = "{path: questions.jsonl, columns: {prompt: ask, completion: reply}}"
    for change in (
        {"eval": "notes.txt"},
        {"train": mapped},
        {"train": "reviews.csv", "eval": "reviews.csv", "metric": "accuracy"},
        {"train": "peftx:sample/train.jsonl"},
        {"metric": "{accuracy: {path: reviews.csv, limit: 3}}"},
    ):
        result = run("validate", spec(world, **change))
        assert result.exit_code == 0, result.stderr
    assert "both trained on and evaluated on" in run("validate", spec(world)).stderr
    assert "both trained on" not in run("validate", spec(world, eval="notes.txt")).stderr


PLUGINS = """
from peftx import Claim, Plugin, PluginConfig, hookimpl
from pydantic import Field


class Prefers(Plugin):
    takes = ("preference",)

    @hookimpl
    def train_step(self, step): ...


class Bits(Plugin):
    claims = {Claim.NEEDS_CALIBRATION}

    @hookimpl
    def compress(self, model, calibration): ...


class NamesConfig(PluginConfig):
    classes: list[str] | None = Field(["bad", "good"], description="the classes; none: numbers")


class Names(Plugin):
    Config = NamesConfig
    takes = ("classification",)
    labels_option = "classes"

    @hookimpl
    def prepare_data(self, data): ...
"""


def test_rows_of_classes_that_a_plugin_does_not_name(
    world: Any, refused: Callable[..., str], run: Callable[..., Any]
) -> None:
    """Wherever the row stands in what is looked at, in rows to train on and to measure on."""
    world.publish("fake-names", PLUGINS, keywords=("prepare_data",), target="Names")
    text = SPEC.replace("[fake-gain]", "[fake-gain, {{use: fake-names, with: {{classes: {classes}}}}}]")
    files = {
        "good.jsonl": '{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n',
        "typo.jsonl": '{"text": "a", "label": "good"}\n\n{"text": "b", "label": "goood"}\n{"text": ""',
        "other.json": '[{"text": "a", "label": "good"},\n {"text": "b", "label": "5"}]',
        "other.csv": "mood,text,label\nhappy,a,1\n",
    }
    for name, rows in files.items():
        (world.work / name).write_text(rows, "utf-8")
    given = {"train": "good.jsonl", "eval": "good.jsonl", "metric": "accuracy", "classes": "[bad, good]"}
    assert run("validate", spec(world, text, **given)).exit_code == 0
    cases = [
        (
            {"train": "typo.jsonl"},
            "typo.jsonl: row 1 (counting from 0) is of class 'goood'",
            "did you mean 'good'?",
        ),
        (
            {"eval": "other.json"},
            "other.json: row 1 (counting from 0) is of class '5'",
            "good, 5: name all in 'classes'",
        ),
        (
            {"metric": "{accuracy: {path: other.csv}}"},
            "other.csv: row 0 (counting from 0) is of class '1'",
            "name all",
        ),
        (
            {"train": "{path: other.csv, columns: {label: mood, old: label}}"},
            "other.csv: row 0 (counting from 0) is of class 'happy'",
            "the rows have happy",
        ),
    ]
    for change, said, hint in cases:
        file = spec(world, text, **{**given, **change})
        message = refused("validate", file)
        assert f"spec.yaml:6:20: {world.work}/{said}, and 'fake-names' names bad, good" in message, message
        assert hint in message
        assert refused("plan", file) == refused("apply", file) == message
    numbers = {**given, "train": "other.csv", "classes": "null"}
    assert run("validate", spec(world, text, **numbers)).exit_code == 0
    unread = spec(world, text.replace("train: {{steps: 1}}\n", ""), **{**given, "train": "typo.jsonl"})
    assert run("validate", unread).exit_code == 0
    measured = spec(world, text.replace("train: {{steps: 1}}\n", ""), **{**given, "eval": "typo.jsonl"})
    assert "is of class 'goood'" in refused("validate", measured)


def test_the_classes_of_a_plugin_of_this_repository(world: Any, refused: Callable[..., str]) -> None:
    """Before anything is loaded: `peftx apply --plugin` too."""
    for name in ("sk-tuning", "l-tuning", "predgen"):
        message = refused("apply", "-p", name, "--data", "reviews.csv", "--set", f"{name}.labels=[x, y]")
        assert f"is of class 'good', and '{name}' names x, y" in message
        assert "the rows have good: name all in 'labels'" in message


def test_rows_that_no_plugin_takes(world: Any, refused: Callable[..., str], run: Callable[..., Any]) -> None:
    world.publish("fake-dpo", PLUGINS, keywords=("train_step",), target="Prefers")
    text = SPEC.replace("[fake-gain]", "[fake-gain, fake-dpo]")
    file = spec(world, text, eval="notes.txt")
    for command in ("validate", "plan", "apply"):
        message = refused(command, file)
        assert (
            "spec.yaml:6:20: 'fake-dpo' trains on rows of preference, and these are prompt-completion"
            in message
        )
    assert run("validate", spec(world, text, train="preferences.jsonl", eval="notes.txt")).exit_code == 0


def test_a_plugin_that_needs_text_to_calibrate_on(
    world: Any, refused: Callable[..., str], run: Callable[..., Any]
) -> None:
    world.publish("fake-exact", PLUGINS, keywords=("compress",), target="Bits")
    text = "peftx: 1\nmodel: peftx:tiny\nstack: [fake-exact]\noutput: out\n"
    (world.work / "spec.yaml").write_text(text, "utf-8")
    for command in ("validate", "plan", "apply"):
        message = refused(command, "spec.yaml")
        assert "spec.yaml:3:9: 'fake-exact' needs text to calibrate on" in message
        assert "data: {calibration: file}" in message
    for source in ("calibration", "train"):
        (world.work / "spec.yaml").write_text(text + f"data: {{{source}: notes.txt}}\n", "utf-8")
        assert run("validate", "spec.yaml").exit_code == 0


def test_every_refusal_is_json_where_that_is_asked_for(world: Any, run: Callable[..., Any]) -> None:
    world.scaffold("fake-bits", "compress")
    (world.work / "spec.yaml").write_text(
        "peftx: 1\nmodel: peftx:tiny\nstack: [fake-bits, fake-gain]\n", "utf-8"
    )
    for file, words in (("spec.yaml", "this order works"), ("nowhere.yaml", "there is no file")):
        result = run("validate", file, "--json")
        assert result.exit_code == 2
        found = json.loads(result.stdout)
        assert not found["valid"]
        assert words in found["problems"][0]["message"]


def test_files_of_the_command_line(world: Any, refused: Callable[..., str]) -> None:
    words = ["apply", "-p", "fake-gain"]
    for option in ("--data", "--eval"):
        message = refused(*words, option, "pair.jsonl")
        assert f"error[data]: {option}: data file" in message
        assert "did you mean 'pairs.jsonl'" in message
    assert "fit no format" in refused(*words, "--data", "questions.jsonl")
    assert refused("apply", spec(world), "--eval", "pair.jsonl").startswith("--eval:1:16: data file")
    message = refused("apply", spec(world), "--set", "train.seed=1", "--metric", "accuracy")
    assert message.startswith("--metric:1:"), message
    assert "for these rows there is perplexity" in message
    message = refused("apply", spec(world), "--metric", "perplexty")
    assert "--metric:1:" in message
    assert "no metric 'perplexty'" in message
    assert "did you mean 'perplexity'?" in message


def test_a_metric_for_a_spec_without_data_to_measure_on(world: Any, refused: Callable[..., str]) -> None:
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: pairs.jsonl}\nstack: [fake-gain]\ntrain: {steps: 1}\n"
    (world.work / "spec.yaml").write_text(text, "utf-8")
    message = refused("apply", "spec.yaml", "--metric", "perplexity")
    assert "'perplexity' has no data" in message
    assert "data: {holdout: 0.1}" in message


def test_options_that_nothing_reads(world: Any, refused: Callable[..., str]) -> None:
    world.scaffold("fake-words", "decode")
    world.scaffold("fake-bits", "compress")
    message = refused("apply", "-p", "fake-gain", "--calibration", "notes.txt")
    assert "--calibration has no effect: no plugin of this stack compresses" in message
    message = refused("apply", "-p", "fake-words", "--data", "pairs.jsonl", "--eval", "notes.txt")
    assert "--data has no effect" in message
    assert "--steps has no effect" in refused("apply", "-p", "fake-bits", "--steps", "3")


def test_what_an_architecture_lacks_is_said_before_anything_is_measured(
    world: Any, refused: Callable[..., str]
) -> None:
    message = refused("apply", "-p", "fake-gain", "--set", "fake-gain.targets=attention.w")
    assert "attention.w" in message
    assert "perplexity" not in message, "the base was evaluated first"


# ------------------------------------------------------------------------------------------------------- the first row
ROWS: list[tuple[str, bytes, str | None]] = [
    ("a.jsonl", PAIRS * 3, "prompt-completion"),
    ("a.JSONL.gz", gzip.compress(PAIRS, mtime=0), "prompt-completion"),
    ("a.jsonl", gzip.compress(PAIRS, mtime=0), "prompt-completion"),
    ("a.ndjson", b"\n\n" + PAIRS, "prompt-completion"),
    ("a.jsonl", b"\xef\xbb\xbf" + PAIRS, "prompt-completion"),
    ("a.json", b"[" + PAIRS.strip() + b", 3]", "prompt-completion"),
    ("a.csv", b'text,label,more\n"a, b",c,d\n', "classification"),
    ("a.tsv", b"text\tother\na\tb\n", "text"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": ""}]}\n', "messages"),
    ("a.txt", b"words", "text"),
    ("a.md", b"# words", "text"),
    ("a.jsonl", b"{torn", None),
    ("a.jsonl", b"[1, 2]\n", None),
    ("a.jsonl", b"9" * 5000, None),
    ("a.jsonl", b"[" * 100_000, None),
    ("a.json", b"[" * 100_000, None),
    ("a.csv", b"text,label\n", None),
    ("a.csv", b"text,label\n1,2,3,4\n", "classification"),
    ("a.csv", b"text,label\n1\n", "classification"),
    ("a.jsonl", b'{"text": "' + b"x" * (MOST + 9) + b'"}', None),
]


@pytest.mark.parametrize(("name", "raw", "format"), ROWS, ids=[name for name, _, _ in ROWS])
def test_look(tmp_path: Path, name: str, raw: bytes, format: str | None) -> None:
    (tmp_path / name).write_bytes(raw)
    assert look(str(tmp_path / name)) == format


FULL = b"text,label\n" + b"aaaaaaaaaaaaa,x\n" * (MOST // 16 - 1)
"""Five bytes less than what is looked at."""
LABELS: list[tuple[str, bytes, dict[str, int]]] = [
    ("a.csv", b"text,label\na,x\nb,y\nc,x\n", {"x": 0, "y": 1}),
    ("a.tsv", b"label\ttext\nx\ta\n", {"x": 0}),
    ("a.csv", b"text,label\na\nb,y\n", {"y": 1}),
    ("a.csv", FULL + b"b,yy\n", {"x": 0, "yy": MOST // 16 - 1}),
    ("a.csv", FULL + b"bb,yyy\n", {"x": 0}),  # cut within the label of the last row
    ("a.json", b'[ {"label": "x"} , {"label": -3},{"label": "y"} ]\n', {"x": 0, "y": 2}),
    ("a.json", b'[{"label": "x"}, {"label": "y', {"x": 0}),
    ("a.jsonl", b'\n{"label": "x"}\n\n{"text": ""}\n{"label": "y"}\ntorn\n{"label": "z"}', {"x": 0, "y": 2}),
    ("a.jsonl.gz", gzip.compress(b'{"label": "x"}', mtime=0), {"x": 0}),
]


@pytest.mark.parametrize(("name", "raw", "expected"), LABELS)
def test_labels_of_the_first_rows(tmp_path: Path, name: str, raw: bytes, expected: dict[str, int]) -> None:
    (tmp_path / name).write_bytes(raw)
    assert labels(str(tmp_path / name), columns={}) == expected


@pytest.mark.parametrize(
    "raw", [b"", b"\n \n", b"\xff\xfea", b"a\xe9b", b"\x1f\x8bnot", gzip.compress(PAIRS, mtime=0)[:20]]
)
def test_look_at_what_is_no_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(Unfit, match=r"a\.jsonl"):
        look(str(tmp_path / "a.jsonl"))


def test_look_and_the_core_see_the_same_formats(tmp_path: Path) -> None:
    from peftx.engines.data import FORMATS as CORE
    from peftx.engines.data import detect_format
    from peftx.errors import DataError
    from peftx.toolkits.evaluation.run import METRICS as METRICS_OF_CORE
    from peftx_spec.models import FORMATS, METRIC_FORMATS

    assert tuple(FORMATS) == tuple(CORE)
    assert METRIC_FORMATS == METRICS_OF_CORE
    names = sorted({name for columns in FORMATS.values() for name in columns} | {"other"})
    file = tmp_path / "a.jsonl"
    for bits in range(1, 2 ** len(names)):
        row: dict[str, object] = {
            name: f"say {name}" for index, name in enumerate(names) if bits >> index & 1
        }
        if "messages" in row:
            row["messages"] = [{"role": "user", "content": "say messages"}]
        file.write_text(json.dumps(row) + "\n", "utf-8")
        try:
            expected: str | None = detect_format(file)
        except DataError:
            with pytest.raises(Unfit):
                look(str(file))
        else:
            assert look(str(file)) == expected


def test_looking_imports_nothing_heavy(world: Any) -> None:
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {eval: reviews.csv}\nevaluate: [accuracy]\n"
    (world.work / "spec.yaml").write_text(text, "utf-8")
    code = (
        "import sys; from peftx_cli.main import main; sys.argv = ['peftx', 'validate', 'spec.yaml']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "print([name for name in ('torch', 'pyarrow', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stderr
