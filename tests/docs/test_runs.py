"""Pipelines and commands run, also on the pages that are not followed from top to bottom (tests/docs/test_guides.py).

Each page has a folder with what it takes for granted, such as a bundle that was trained before. Runs are short.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages.blocks import Block, BlockError, blocks
from pages.figures import FOLLOWED
from pages.follow import carried_out, loaded, type_in, write

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
ELSEWHERE = {"docs/write-a-plugin.md"}
"""Of a plugin that is not installed: test_write_a_plugin.py installs it first."""
COMPARING = {"docs/choose/reading.md", "docs/compare.md", "docs/search.md"}
"""Their work is done by processes of their own, which test_documents.py shortens in another way."""
LONG = {"README.md", "docs/export.md"}
"""Ten seconds or more: `make test-all` runs them."""
MOST = {"steps": 2, "batch_size": 2, "eval_steps": 1}
AROUND = {
    "peftx:": "peftx: 1\n",
    "model:": "model: peftx:tiny\n",
    "stack:": "stack: [lora, nf4]\n",
    "train:": "train: {steps: 1}\n",
    "data:": "data: {train: 'peftx:sample/train.jsonl'}\n",
}
"""What a section of a pipeline stands in."""

LABELLED = [{"text": f"{word} {number}", "label": word} for number in range(20) for word in ("rain", "sun")]
TASKS = {"weather": ("rain", "sun"), "mood": ("bad", "good"), "calls": ("sos", "hello")}


def bundle(name: str) -> None:
    from peftx import Stack
    from peftx_lora import Lora

    Stack("peftx:tiny", [Lora(rank=4)]).save(name)


def with_a_prompt(name: str) -> None:
    from peftx import Stack
    from peftx_lora import Lora
    from peftx_prompt_tuning import PromptTuning

    Stack("peftx:tiny", [PromptTuning(), Lora(rank=4)]).save(name)


def adapter(name: str) -> None:
    import peftx
    from peftx.interop import to_peft

    bundle("before")
    to_peft(peftx.load("before"), name)


def model(name: str) -> None:
    from peftx import Stack

    stack = Stack("peftx:tiny", [])
    stack.model.save_pretrained(name)
    stack.tokenizer.save_pretrained(name)


def rows(name: str) -> None:
    lines = (ROOT / "core/peftx/assets/sample/train.jsonl").read_text("utf-8").splitlines()[:20]
    Path(name).write_text("".join(line + "\n" for line in lines), "utf-8")


def dialogues(name: str) -> None:
    Path(name).write_bytes((ROOT / "core/peftx/assets/sample/dialogues.jsonl").read_bytes())


def table(*columns: str) -> Callable[[str], None]:
    def write_table(name: str) -> None:
        import csv

        with Path(name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *([f"{row['text']}", row["label"]] for row in LABELLED)])

    return write_table


def tasks(name: str) -> None:
    found = [
        {"text": f"{word} {number}", "label": word, "task": task}
        for number in range(4)
        for task, words in TASKS.items()
        for word in words
        if Path(name).stem in (task, "held_out")
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")


def questions(name: str) -> None:
    row = {"question": "What is wet?", "choices": ["rain", "sun"], "answer": 0}
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(json.dumps(row) + "\n", "utf-8")


def pipeline(name: str) -> None:
    Path(name).write_text(
        "peftx: 1\nmodel: peftx:tiny\ndata: {train: 'peftx:sample/train.jsonl', holdout: 0.1}\nstack: [lora]\n",
        "utf-8",
    )


def checkout(name: str) -> None:
    Path(name).symlink_to(ROOT / name)


TAKEN_FOR_GRANTED: dict[str, dict[str, Callable[[str], None]]] = {
    "README.md": {"reviews.csv": table("text", "label"), "docs": checkout},
    "docs/data.md": {
        "stack.yaml": pipeline, "questions.csv": table("question", "answer"), "held_out.jsonl": rows,
        "notes.txt": rows,
    },
    "docs/export.md": {"out": with_a_prompt, "adapted": bundle},
    "docs/how-to/compress.md": {"adapter": adapter},
    "docs/how-to/model.md": {"my-llama": model},
    "docs/measuring.md": {"out": bundle, "tasks/mine.jsonl": questions},
    "docs/merging.md": {"german": bundle, "legal": bundle},
    "docs/peft.md": {"their-adapter": adapter, "base": model, "rows.jsonl": rows},
    "docs/recipes/index.md": {"docs": checkout, "my.jsonl": dialogues, "my-llama": model},
    "docs/training.md": {f"{name}.jsonl": tasks for name in (*TASKS, "held_out")},
}  # fmt: skip
"""What a page says that somebody has."""


def shown(page: Path) -> list[Block]:
    """The pipelines and commands of a page that are not run by other tests."""
    name = page.relative_to(ROOT).as_posix()
    if name in ELSEWHERE | COMPARING:
        return []
    followed = name.split("/")[1] in FOLLOWED if name.startswith("docs/") else False
    found = [block for block in blocks(page, ROOT) if block.runs and block.language in ("yaml", "console")]
    return [block for block in found if not followed or (block.language == "yaml" and not block.title)]


def drawn(page: Path) -> bool:
    """A third of the pages a run, by what they say, as architectures are drawn; all in `make test-all`."""
    return os.environ.get("PEFTX_ARCHITECTURES") != "draw" or zlib.crc32(page.read_bytes()) % 3 == 0


@pytest.mark.filterwarnings("ignore:llama.cpp does not split text")  # said to users, on stderr
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.relative_to(ROOT).as_posix() in LONG))
        for page in PAGES
        if shown(page) and drawn(page)
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_what_a_page_shows_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shorten: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in TAKEN_FOR_GRANTED.get(page.relative_to(ROOT).as_posix(), {}).items():
        make(name)
    shorten(MOST)
    for block in shown(page):
        if block.title:
            write(block)
    for block in shown(page):
        if block.title:
            continue
        if block.language == "console":
            type_in(block)
        else:
            carried_out(block, loaded(block, around=around(block.body)))


def around(body: str) -> str:
    """What a section of a pipeline lacks; nothing of one that is whole."""
    keys = set(re.findall(r"^\w+:", body, re.MULTILINE))
    return "" if "peftx:" in keys else "".join(text for key, text in AROUND.items() if key not in keys)


ROWS, SHORT = "{train: 'peftx:sample/train.jsonl'}", "{steps: 2, batch_size: 1}"  # too short for this method


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("model: peftx:tiny\nstuck: []\n", "page.md:6: <text>:3:1: unknown key: 'stuck'"),
        (
            f"model: peftx:tiny\ndata: {ROWS}\nstack: [ks-lottery]\ntrain: {SHORT}\n",
            "page.md:4: TrainingError",
        ),
    ],
)
def test_a_failing_pipeline_is_named_by_file_and_line(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(f"# Page\n\n```yaml\npeftx: 1\n{body}```\n", "utf-8")
    (block,) = blocks(tmp_path / "page.md", tmp_path)
    with pytest.raises(BlockError) as caught:
        carried_out(block, loaded(block))
    assert str(caught.value).startswith(says)
