"""`peftx data`: rows as training sees them, before it does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx.composition.registry import Registry
from peftx.engines.data import IGNORE
from peftx.errors import DataError
from peftx.pipeline import load_run
from peftx.previewing import Preparation, Preview, preview, shown
from peftx.previewing.tokens import batch_of, token_text
from peftx.testing import tiny, tiny_tokenizer
from peftx_cli.tokens import in_brackets
from peftx_spec import load_spec, resolved

PAIRS = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(20)]
CLASSES = [{"text": f"a joy {n}", "label": ["good", "bad"][n % 2]} for n in range(6)]
TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
}
PREFERENCES = [{"prompt": f"Say {n}", "chosen": "Hi!", "rejected": "No."} for n in range(4)]
PROFILES = [
    {"text": "I am Ann.", "profile": {"name": "Ann"}},
    {"text": "I am Bo.", "profile": {"name": "Bo"}},
]


def spec(folder: Path, rows: list[dict[str, Any]], stack: str = "[lora]", **more: Any) -> str:
    """A spec over these rows; `more`: further lines under `data`, and under `train` those of `train`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    train = json.dumps({"steps": 2, **more.pop("train", {})})
    data = json.dumps({"train": {"path": "rows.jsonl", **more.pop("rows", {})}, **more})
    file = folder / "spec.yaml"
    file.write_text(f"peftx: 1\nmodel: peftx:tiny\ndata: {data}\nstack: {stack}\ntrain: {train}\n", "utf-8")
    return str(file)


def found(file: str, **options: Any) -> Preview:
    return preview(Path(file), **options)


FORMATS = {
    "text": ([{"text": "Once upon a time."}, {"text": "The end."}], "[lora]", False),
    "pairs": (PAIRS, "[lora]", False),
    "messages": ([TALK] * 2, "[lora]", False),
    "classification": (CLASSES, "[lora]", False),
    "mosaic-it": (PAIRS, "[mosaic-it, lora]", False),
    "superfiltering": (
        PAIRS,
        "[{use: superfiltering, with: {scorer: peftx:tiny, share: 0.5}}, lora]",
        True,
    ),
    "l-tuning": (CLASSES, "[{use: l-tuning, with: {labels: [good, bad]}}]", False),
    "token-trails": ([TALK] * 2, "[token-trails]", False),
    "user-profile": (PROFILES, "[user-profile, lora]", False),
    "preference": (PREFERENCES, "[dpo-prefix-sharing, lora]", True),
}


@pytest.mark.parametrize("case", FORMATS)
def test_rows_are_those_that_training_gets(tmp_path: Path, case: str) -> None:
    """The examples equal those of a run with weights; the brackets stand on the labels of the collated batch."""
    rows, stack, weights = FORMATS[case]
    file = spec(tmp_path, rows, stack)
    seen = found(file)
    assert seen.weights is weights, "the base is loaded where a plugin asks it, and only there"
    assert seen.kept + seen.dropped + seen.held_out == seen.read == len(rows)

    pipeline = resolved(load_spec(file, catalogue=Registry()).pipeline, tmp_path)
    _, _, examples = Preparation(pipeline, registry=Registry()).attempt("train", weights=True)
    assert seen.examples.to_dict() == examples.to_dict()

    batch = batch_of(seen, 3)
    for n, example in enumerate(shown(seen, 3)):
        ids = [token.id for token in example.tokens]
        assert ids == batch["input_ids"][n, : len(ids)].tolist()
        assert example.pads == batch["input_ids"].shape[1] - len(ids)
        if batch["labels"].shape == batch["input_ids"].shape:
            wanted = [label != IGNORE for label in batch["labels"][n].tolist()]
            assert [token.labelled for token in example.tokens] == wanted[: len(ids)]
            assert not any(wanted[len(ids) :]), "no pad has a label"
            plain = [t for t in example.tokens if "[" not in t.text and "]" not in t.text]
            told = in_brackets(plain)
            assert told.count("[") == told.count("]") == sum(t.labelled for t in plain)


def test_examples_equal_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer itself was given, by `peftx apply`'s own code."""
    from peftx.engines.training import run as training

    given = []
    true = training.examples_of
    monkeypatch.setattr(training, "examples_of", lambda *a, **k: given.append(true(*a, **k)) or given[-1])
    monkeypatch.setattr(training, "one_by_one", lambda *_: False)  # all rows, in their order
    file = spec(tmp_path, PAIRS, "[mosaic-it, lora]", holdout=0.2)
    load_run(file).run()
    assert found(file).examples.to_dict() == given[0].to_dict()


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    """A row that just fills max_length is not cut; one token more is."""
    long = {"prompt": "word " * 30, "completion": "yes"}
    whole = found(spec(tmp_path, [long, *PAIRS]))
    assert (whole.cut, whole.full) == (0, 0)
    size = whole.lengths()["tokens"].max
    fits = found(spec(tmp_path, [long, *PAIRS], train={"max_length": size}))
    assert (fits.cut, fits.full) == (0, 1)
    short = found(spec(tmp_path, [long, *PAIRS], train={"max_length": size - 1}))
    assert (short.cut, short.full) == (1, 1)
    assert short.lengths()["tokens"].max == size - 1


def test_lengths_and_shares_are_what_the_examples_say(tmp_path: Path) -> None:
    seen = found(spec(tmp_path, [*PAIRS, {"prompt": "a longer one " * 4, "completion": "no"}]))
    sizes = sorted(len(row["input_ids"]) for row in seen.examples)
    marks = [sum(label != IGNORE for label in row["labels"]) for row in seen.examples]
    lengths = seen.lengths()
    assert (lengths["tokens"].min, lengths["tokens"].max) == (sizes[0], sizes[-1])
    assert lengths["tokens"].median == sizes[10]
    assert lengths["tokens"].p95 == sizes[19]  # of 21
    assert lengths["labelled"].total == sum(marks)
    assert seen.labelled().tolist() == marks
    assert seen.share() == sum(marks) / sum(sizes)


def test_the_table_says_who_dropped_what(installed: Any, ok: Callable[..., str]) -> None:
    stack = "[{use: superfiltering, with: {scorer: peftx:tiny, share: 0.5}}, lora]"
    told = ok("data", spec(installed.work, PAIRS, stack, holdout=0.2), "--rows", "0")
    assert "held out  4 " in told
    assert "superfiltering: IFD" in told
    assert "kept" in told
    assert "example 1" not in told


def test_rows_that_a_plugin_made_are_counted_apart(installed: Any, ok_json: Callable[..., Any]) -> None:
    """What is dropped of four times as many rows is no row of the file."""
    stack = "[mosaic-it, {use: superfiltering, with: {scorer: peftx:tiny, share: 0.1}}, lora]"
    told = ok_json("data", spec(installed.work, PAIRS, stack), "--json")
    first, second = told["prepared"]
    assert second["rows"] == first["left"] == second["left"] + sum(second["dropped"].values())
    assert told["rows"] == {"read": 20, "held_out": 0, "dropped": 0, "kept": 20}
    assert told["examples"] == second["left"] < 20


def test_brackets_stand_where_there_is_no_colour(installed: Any, ok: Callable[..., str]) -> None:
    told = ok("data", spec(installed.work, PAIRS[:1]), "--rows", "1")
    assert told.splitlines()[-1] == "<|bos|>|S|ay| 0|.[ It][ is][ 0][.][<|eos|>]"


def test_json_is_complete(installed: Any, ok_json: Callable[..., Any]) -> None:
    told = ok_json("data", spec(installed.work, PAIRS, "[mosaic-it, lora]", holdout=0.2), "--json")
    rows = told["rows"]
    assert rows["read"] == rows["held_out"] + rows["dropped"] + rows["kept"] == 20
    assert told["prepared"][0]["plugin"] == "mosaic-it"
    assert (told["source"], told["format"], told["objective"]) == ("train", "prompt-completion", "next-token")
    assert {"tokens", "labelled"} == set(told["lengths"])
    assert 0 < told["labelled_share"] < 1
    assert len(told["shown"]) == 3
    assert {"id", "text", "labelled", "special"} == set(told["shown"][0]["tokens"][0])
    assert told["shown"][0]["tokens"][0]["special"]


def test_classes_have_their_names(installed: Any, ok: Callable[..., str]) -> None:
    told = ok("data", spec(installed.work, CLASSES, "[{use: l-tuning, with: {labels: [good, bad]}}]"))
    assert "of class good" in told
    assert "class bad" in told.split("example 2 of 6")[1].splitlines()[0]
    assert "no token has a label" in told


def model(folder: Path, arch: str, **options: Any) -> str:
    """A tiny model of random weights in a folder, with a tokenizer of bytes; returns the folder."""
    made, tokenizer = tiny(arch, **options), tiny_tokenizer(ends=arch != "llama")
    if options:
        made.config.pad_token_id = tokenizer.pad_token_id
        made.config.id2label, made.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    if arch == "bert":
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    made.save_pretrained(folder / arch)
    tokenizer.save_pretrained(folder / arch)
    return str(folder / arch)


def test_an_encoder_and_a_decoder_have_a_line_each(installed: Any, ok: Callable[..., str]) -> None:
    file, folder = spec(installed.work, PAIRS[:2], train={"max_length": 12}), model(installed.work, "t5")
    told = ok("data", file, "--model", folder, "-n", "1")
    assert told.splitlines()[-2:] == ["<|bos|>|S|a|y| |0|.|<|eos|>", "[I][t][ ][i][s][ ][0][.][<|eos|>]"]
    assert "of the target has a label" in told


def test_hidden_tokens_are_those_of_the_first_step(installed: Any, ok: Callable[..., str]) -> None:
    file = spec(installed.work, [{"text": "Once upon a time there was a man."}], train={"max_length": 64})
    told = ok("data", file, "--model", model(installed.work, "bert"))
    assert "others in each step" in told
    assert "labelled" not in told
    assert "[<|mask|>]" in told


def test_classes_of_the_model_itself(installed: Any, ok_json: Callable[..., Any]) -> None:
    file = spec(installed.work, CLASSES, train={"max_length": 64})
    told = ok_json("data", file, "--model", model(installed.work, "llama", head="classification"), "--json")
    assert told["classes"] == {"good": 3, "bad": 3}
    assert [row["label"] for row in told["shown"]] == ["good", "bad", "good"]


COLOUR = """
from types import SimpleNamespace as Token
from peftx_cli.tokens import print_tokens
words = [("Say", False), ("[b]", True), (" 0", True), ("\\n", False)]
print_tokens([Token(id=n, text=text, labelled=seen, special=False) for n, (text, seen) in enumerate(words)], 2)
"""


def test_colour_on_a_terminal(on_a_terminal: Callable[..., str]) -> None:
    """Tokens that count are green there, and in no brackets but their own."""
    shown = on_a_terminal("-c", COLOUR)
    styled = re.findall(r"\x1b\[([0-9;]*)m([^\x1b]*)", shown)
    assert "".join(text for style, text in styled if "32" in style.split(";")) == "[b] 0"
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).strip() == "Say[b] 0\\n + 2 pads"


def test_sources_and_held_out_rows(tmp_path: Path) -> None:
    other = [{"prompt": "Other", "completion": "Yes"}] * 3
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other), "utf-8")
    file = spec(tmp_path, PAIRS, holdout=0.2, sources={"second": "other.jsonl"})
    assert found(file, source="second").read == 3
    held = found(file, source="eval")
    assert held.read == 4
    texts = {row["prompt"] for row in held.rows.train}
    assert not texts & {row["prompt"] for row in found(file).rows.train}
    with pytest.raises(DataError, match="no source 'secnd'") as caught:
        found(file, source="secnd")
    assert "second" in str(caught.value.hint)


@pytest.mark.parametrize("case", ["classification", "l-tuning", "preference", "mosaic-it"])
def test_rows_to_evaluate_on(tmp_path: Path, case: str) -> None:
    """They are not joined, or dropped; a plugin with a head of its own, or with pairs of answers, reads them."""
    rows, stack, _ = FORMATS[case]
    file = spec(tmp_path, rows, stack, eval="rows.jsonl")
    seen = found(file, source="eval")
    assert len(seen.examples) == seen.read == len(rows)


def test_rows_are_written_whole(installed: Any, ok: Callable[..., str], refused: Callable[..., str]) -> None:
    file = spec(installed.work, PAIRS)
    ok("data", file, "--output", "new/tokens.jsonl")
    lines = Path("new/tokens.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(found(file).examples)
    assert [p.name for p in Path("new").iterdir()] == ["tokens.jsonl"]
    assert "holds rows that the pipeline reads" in refused("data", file, "-o", "rows.jsonl")
    assert "is a folder" in refused("data", file, "-o", "new")


def test_what_cannot_be_read_is_named_with_its_line(installed: Any, refused: Callable[..., str]) -> None:
    file = spec(installed.work, PAIRS)
    with Path("rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write("{broken\n")
    assert "rows.jsonl:21:2: not JSON" in refused("data", file)
    Path("rows.jsonl").write_text('{"question": "?"}\n', "utf-8")
    told = refused("data", file)
    assert told == refused("validate", file), "the same words as of `validate`"
    assert "spec.yaml:3:" in told


def test_nothing_to_show(installed: Any, refused: Callable[..., str]) -> None:
    Path("spec.yaml").write_text("peftx: 1\nmodel: peftx:tiny\nstack: [lora]\n", "utf-8")
    assert "names no rows to train on" in refused("data", "spec.yaml")
    assert "names no rows to evaluate on" in refused("data", "spec.yaml", "--eval")
    assert "exclude each other" in refused("data", "spec.yaml", "--eval", "--source", "x")


def test_an_output_that_is_taken_is_not_looked_at(installed: Any, ok: Callable[..., str]) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine", "utf-8")
    file = spec(installed.work, PAIRS)
    Path(file).write_text(Path(file).read_text("utf-8") + "output: out\n", "utf-8")
    before = installed.files()
    ok("data", file)
    assert installed.files() == before


def test_text_cannot_steer_the_terminal(installed: Any, ok: Callable[..., str]) -> None:
    told = ok("data", spec(installed.work, [{"text": "a \x1b[31mred\u202e text"}]))
    assert "\x1b" not in told
    assert "\u202e" not in told


def test_tokens_add_up_to_the_text(tmp_path: Path) -> None:
    seen = found(spec(tmp_path, PAIRS))
    ids = seen.examples[0]["input_ids"]
    tokenizer = seen.stack.tokenizer
    assert "".join(token_text(tokenizer, i) for i in ids) == tokenizer.decode(ids)
