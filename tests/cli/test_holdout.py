"""Numbers are of rows that were not trained on: a part of the data is held out where nothing else is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx import Registry
from peftx.engines.data.sources import HeldOut, training_rows
from peftx.errors import DataError, PeftxError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_cli.recipe import Asked, _entries, read
from peftx_spec import DataSpec

FAST = ("--steps", "2", "--set", "train.batch_size=2")
TWO = ("--set", "evaluate.perplexity.limit=2")


def rows(count: int, *, twice: bool = False) -> list[dict[str, str]]:
    found = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(count)]
    return found * 2 if twice else found


def write(file: Path, content: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return str(file)


def split(file: str, **holdout: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    train, held = training_rows(DataSpec.model_validate({"train": file, "holdout": holdout}))
    assert train is not None
    assert isinstance(held, HeldOut)
    assert held.of == len(train) + len(held.rows)
    return list(train), list(held.rows)


def texts(content: list[dict[str, str]]) -> set[str]:
    return {row["prompt"] for row in content}


# ----------------------------------------------------------------------------------------------------------- the split
@pytest.mark.parametrize(
    ("count", "holdout", "held"),
    [
        (120, {}, 12),
        (120, {"share": 0.25}, 30),
        (120, {"most": 5}, 5),
        (120, {"share": 0.5, "most": 1000}, 60),
        (5, {}, 1),
        (2, {}, 1),
        (2, {"share": 0.99}, 1),
        (40, {"share": 0.99}, 39),
    ],
)
def test_how_many_rows(tmp_path: Path, count: int, holdout: dict[str, Any], held: int) -> None:
    train, test = split(write(tmp_path / "rows.jsonl", rows(count)), **holdout)
    assert (len(train), len(test)) == (count - held, held)
    assert not texts(train) & texts(test)
    assert texts(train) | texts(test) == texts(rows(count))


def test_equal_rows_stand_on_one_side(tmp_path: Path) -> None:
    """Also where other columns, such as a number, differ."""
    content = [row | {"id": str(index)} for index, row in enumerate(rows(50, twice=True))]
    for seed in range(5):
        train, test = split(write(tmp_path / "rows.jsonl", content), seed=seed)
        assert len(test) == 10
        assert not texts(train) & texts(test)


def test_the_same_rows_for_the_same_seed_whatever_their_order(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", rows(60))
    turned = write(tmp_path / "turned.jsonl", rows(60)[::-1])
    assert split(first) == split(first)
    assert texts(split(first)[1]) == texts(split(turned)[1])
    assert len({frozenset(texts(split(first, seed=seed)[1])) for seed in range(5)}) == 5
    train, test = split(first)
    for part in (train, test):
        assert [row["prompt"] for row in part] == sorted(texts(part), key=lambda text: int(text[4:-1])), (
            "file order"
        )


def test_a_group_that_is_larger_than_the_share(tmp_path: Path) -> None:
    """One row in every group is too much to hold out one; the smallest group goes, and some are left to train on."""
    content = rows(1) * 7 + rows(2)[1:] * 3
    train, test = split(write(tmp_path / "rows.jsonl", content))
    assert (len(train), len(test)) == (7, 3)


@pytest.mark.parametrize("content", [rows(1), rows(1) * 8])
def test_nothing_can_be_held_out(tmp_path: Path, content: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match=r"no two that differ(.|\n)*--eval FILE"):
        split(write(tmp_path / "rows.jsonl", content))


def test_limit_columns_and_other_formats(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("review,label\n" + "".join(f"good {n},yes\n" for n in range(40)), "utf-8")
    spec = {"train": {"path": str(file), "limit": 20, "columns": {"text": "review"}}, "holdout": 0.1}
    train, held = training_rows(DataSpec.model_validate(spec))
    assert train is not None
    assert held is not None
    assert str(held) == "2 of 20 rows held out, seed 0"
    assert set(train["text"]) | set(held.rows["text"]) == {f"good {n}" for n in range(20)}
    chats = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}]}
        for n in range(9)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats * 2), "utf-8")
    train, held = training_rows(DataSpec.model_validate({"train": str(file), "holdout": 0.2}))
    assert train is not None
    assert held is not None
    assert (len(train), len(held.rows)) == (14, 4)
    asked = {row["messages"][0]["content"] for row in held.rows}
    assert not asked & {row["messages"][0]["content"] for row in train}


# -------------------------------------------------------------------------------------------------------------- a run
def test_the_one_liner_measures_on_rows_that_it_did_not_train_on(
    installed: Any,
    run: Callable[..., Any],
    ok: Callable[..., str],
    ok_json: Callable[..., Any],
    refused: Callable[..., str],
    monkeypatch: Any,
) -> None:
    import peftx.pipeline
    from peftx.engines.models import asset_path
    from peftx.stack import Stack

    installed.scaffold("fake-gain", "inject")
    write(installed.work / "rows.jsonl", rows(60, twice=True))
    words = ["--plugin", "fake-gain", "--data", "rows.jsonl"]
    assert "12 of 120 rows held out, seed 0" in ok("plan", *words)
    stages = ok_json("plan", *words, "--json")["stages"]
    assert {stage["detail"] for stage in stages if stage["name"] == "evaluate"} == {
        "12 of 120 rows held out, seed 0"
    }

    trained: list[set[str]] = []
    measured: list[set[str]] = []
    train, evaluate = peftx.pipeline.train, Stack.evaluate

    def trains(stack: Any, data: Any, **options: Any) -> Any:
        trained.append(texts(list(data.train)))
        return train(stack, data, **options)

    def evaluates(self: Stack, data: Any, **options: Any) -> Any:
        measured.append({str(data)} if isinstance(data, Path) else texts(data))
        return evaluate(self, data, **options)

    monkeypatch.setattr(peftx.pipeline, "train", trains)
    monkeypatch.setattr(Stack, "evaluate", evaluates)
    result = run("apply", *words, *FAST, *TWO)
    assert result.exit_code == 0, result.stderr
    assert len(measured) == 2, "before and after"
    assert measured[0] == measured[1]
    assert not measured[0] & trained[0]
    assert "both trained on and evaluated on" not in result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("eval "))
    assert line.split(None, 1)[1].split("  ")[0] == "12 of 120 rows held out"
    assert line.endswith("seed 0")
    prompt = next(line for line in result.stdout.splitlines() if line.startswith("prompt:"))
    assert prompt.removeprefix("prompt:").strip() in measured[0], "the samples are of held-out rows too"
    assert "holdout:" in (installed.work / "peftx-out" / "pipeline.yaml").read_text("utf-8")
    found = ok_json("apply", *words, *FAST, "--set", "data.holdout.seed=3", "--json")
    assert found["held_out"] == {"rows": 12, "of": 120, "seed": 3}
    measured.clear()
    again = ok_json("evaluate", "peftx-out", "--json")
    (one, *_), last = measured, list(found["scores"].values())[-1]
    assert len(one) == 6, "each stands twice"
    assert again["perplexity"]["value"] == last["perplexity"]["value"], (
        "the bundle's own rows, and their limits"
    )
    ok_json("evaluate", "peftx-out", "--data", "peftx:sample/held_out.jsonl", "--limit", "2", "--json")
    assert measured[-1] == {str(asset_path("peftx:sample/held_out.jsonl"))}
    (installed.work / "rows.jsonl").unlink()
    assert "give others: --data FILE" in refused("evaluate", "peftx-out")


def test_data_to_measure_on_that_is_given_is_taken(
    installed: Any, run: Callable[..., Any], ok: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    write(installed.work / "rows.jsonl", rows(8))
    write(installed.work / "others.jsonl", rows(3))
    words = ["apply", "-p", "fake-gain", "--data", "rows.jsonl", *FAST]
    assert "holdout" not in ok(*words, "--eval", "others.jsonl", "--show-spec")
    assert "holdout" not in ok(*words, "--metric", "none", "--show-spec"), "nothing is measured"
    assert "holdout" not in ok("apply", "-p", "fake-gain", "--show-spec"), "the samples have held-out rows"
    assert "holdout" in ok(*words, "--show-spec")
    result = run(*words, *TWO, "--eval", "rows.jsonl")
    assert result.exit_code == 0
    assert "rows.jsonl is both trained on and evaluated on" in result.stderr
    assert "held out" not in result.stdout


def test_what_is_held_out_is_not_calibrated_on(
    installed: Any, ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftx.stack import Stack

    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-bits", "compress")
    file = write(installed.work / "rows.jsonl", rows(30))
    seen: list[str] = []
    compress = Stack.compress

    def compresses(self: Stack, data: Any, *arguments: Any, **options: Any) -> Any:
        seen.extend(data)
        return compress(self, data, *arguments, **options)

    monkeypatch.setattr(Stack, "compress", compresses)
    ok("apply", "-p", "fake-gain", "-p", "fake-bits", "--data", "rows.jsonl", *FAST, *TWO)
    assert len(seen) == 27
    held = split(file)[1]
    assert not {f"{row['prompt']} {row['completion']}" for row in held} & set(seen)
    seen.clear()
    ok("apply", "-p", "fake-bits", "--data", "rows.jsonl", "--set", "fake-bits.bits=8", *TWO)
    assert len(seen) == 27, "compression alone learns from the rows too"


def test_a_stack_that_learns_nothing_is_measured_on_all_rows(installed: Any, ok: Callable[..., str]) -> None:
    installed.scaffold("fake-words", "decode")
    write(installed.work / "rows.jsonl", rows(8))
    shown = ok("apply", "-p", "fake-words", "--data", "rows.jsonl", "--show-spec")
    assert "holdout" not in shown
    assert "eval: " in shown


def test_a_single_row_is_refused_with_the_way_out(
    installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    (installed.work / "notes.txt").write_text("Once upon a time there was a lamp. " * 40, "utf-8")
    message = refused("apply", "-p", "fake-gain", "--data", "notes.txt")
    assert "notes.txt: none of its 1 rows can be held out" in message
    assert "--eval FILE" in message
    ok("apply", "-p", "fake-gain", "--data", "notes.txt", "--metric", "none", *FAST)
    write(installed.work / "rows.jsonl", rows(3))
    ok("apply", "-p", "fake-gain", "--data", "notes.txt", "--eval", "rows.jsonl", *FAST, *TWO)


def test_a_spec_that_holds_out_and_an_override_in_its_place(
    installed: Any, ok_json: Callable[..., Any], refused: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    write(installed.work / "rows.jsonl", rows(10))
    write(installed.work / "others.jsonl", rows(3))
    tiny("llama").save_pretrained("base")  # its answers are the cost of an exact match
    tiny_tokenizer().save_pretrained("base")
    text = "peftx: 1\nmodel: base\ndata: {train: rows.jsonl, holdout: .2}\nstack: [fake-gain]\n"
    text += "train: {steps: 1, batch_size: 2}\nevaluate: [exact-match]\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")

    def counted(*words: str) -> tuple[Any, int]:
        found = ok_json("apply", "spec.yaml", "--json", *words)
        (scores,) = found["scores"].values()
        (score,) = scores.values()
        return found["held_out"], score["count"]

    assert counted() == ({"rows": 2, "of": 10, "seed": 0}, 2)
    assert counted("--set", "evaluate.exact-match.limit=1")[1] == 1
    assert counted("--eval", "others.jsonl") == (None, 3)
    message = refused("apply", "spec.yaml", "--eval", "others.jsonl", "--set", "data.holdout=0.5")
    assert "exclude each other" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"columns": "prompt=ask"}, "--columns names columns of --data and --eval, and there is neither"),
        ({"split": 0.0}, "data.holdout"),
    ],
)
def test_an_option_beside_a_spec_is_never_passed_over(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        'peftx: 1\nmodel: {id: "peftx:tiny"}\ndata: {train: "peftx:sample/train.jsonl"}\n'
        "stack: [{use: lora}]\ntrain: {steps: 1}\noutput: out\n",
        "utf-8",
    )
    with pytest.raises(PeftxError, match=message):
        read(Asked(spec=str(file), **more), Registry())


def test_entries_of_an_adapter_and_plugins_have_names_of_their_own() -> None:
    class Two(Registry):
        def adapter(self, folder: str) -> list[dict[str, Any]]:
            return [{"use": use, "with": {}} for use in ("lora", "full-finetuning", "full-finetuning")]

    found = _entries(["full-finetuning", "lora"], Two(), adapter="x")
    ids = [entry.get("id", entry["use"]) for entry in found]
    assert ids == ["lora", "full-finetuning", "full-finetuning-2", "full-finetuning-3", "lora-2"]
