"""The blocks of every plugin's README run, pipelines and Python; pipelines are planned before.

A short run: trainings stop after a few steps, and files that a block names have a few rows of the packaged sample, with
columns that its method reads. A block that cannot run says why in its fence: ```` ```yaml norun="the reason" ````.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from pages.blocks import Block
from pages.blocks import blocks as blocks_of
from pages.follow import carried_out, loaded

from peftx import Stack
from peftx.engines.models import asset_path
from peftx.planning import plan

ROOT = Path(__file__).parents[2]
READMES = sorted(ROOT.glob("plugins/*/*/README.md"))
FILE = re.compile(r"(?<![\w:/.-])([\w.-]+\.jsonl)\b")
STEPS = 4
MOST = {"steps": STEPS, "batch_size": 2}
MORE = {
    "aligndistil": {"steps": 16},
    "ba-lora": {"batch_size": 4},
    "ist": {"steps": 12},
    "ks-lottery": {"steps": 40, "batch_size": 8},
    "layernorm-tuning": {"steps": 12, "batch_size": 8},
    "pat-pruning": {"steps": 8},
    "transcoder": {"steps": 8},
}
"""Methods whose phases, or whose terms, need more."""
OF_PIPELINES = {"transcoder": {"steps": 9}}
"""Those whose pipeline has other phases than their Python."""
LONG = {"adalora", "apt", "surgical-fim", "xprompt"}
"""Methods that need all the steps that their README names, or read all rows first."""
COSTLY = LONG | {
    "bitdelta", "d2o", "delta-come", "hierarchical-byte-transformer", "ks-lottery", "layernorm-tuning",
    "longrope", "prefixquant", "reglu", "superfiltering", "word-pooled-lm", "yq-lsa",
}  # fmt: skip
"""Those that take more than a moment all the same: `make test-all` runs them."""
ROWS = 8
COLUMNS: dict[str, dict[str, Any]] = {
    "drawn.jsonl": {"reward": 1.0},
    "mixture.jsonl": {"task": "log"},
    "facts.jsonl": {"rephrase": "The home of Paul is"},
    "tasks.jsonl": {"task": 0},
    "texts.jsonl": {"aspect": 0, "value": 1},
}
"""What rows of a file have beside prompt and completion."""
INSTEAD: dict[str, list[dict[str, Any]]] = {
    "films.jsonl": [{"text": "A joy.", "label": "positive"}, {"text": "A bore.", "label": "negative"}],
    "pairs.jsonl": [
        {"query": "Who keeps it?", "positive": "Paul Reed.", "negative": "The sea."},
        {"query": "What is lit?", "positive": "The lamp.", "negative": "The wind."},
    ],
    "problems.jsonl": [
        {"prompt": f"{n} + 1 =", "completion": str(n + 1), "samples": [str(n + 1), str(n)] * 8}
        for n in range(8)
    ],
    "preferences.jsonl": [{"prompt": "Who keeps it?", "chosen": "Paul Reed.", "rejected": "The sea."}],
    "profiles.jsonl": [{"text": "I am Ann.", "profile": {"name": "Ann"}, "old_profile": None}],
}
"""Rows of other files."""
REVIEWS = [{"prompt": "A joy.", "completion": "positive"}, {"prompt": "A bore.", "completion": "negative"}]
FORMS = [
    {"prompt": "Who keeps it?", "completion": "question"},
    {"prompt": "I do.", "completion": "statement"},
]
TWO = ("l-tuning", "ls-llama", "predgen", "ptec", "robust-prefix-tuning", "sk-tuning")
OF_CLASSES: dict[str, dict[str, list[dict[str, Any]]]] = {
    **{name: {"train.jsonl": REVIEWS} for name in TWO},
    **{name: {"reviews.jsonl": REVIEWS, "forms.jsonl": FORMS} for name in ("lae", "scl-mgsm")},
}
"""Rows of the files of single READMEs, of the classes that their pipelines name."""
MANY = {"mixture.jsonl": 400}
"""Rows of a file from which many are chosen."""
MODELS = {"sentinel-prefix": "path/of/the/target"}
"""Checkpoints that a README names."""


def blocks(readme: Path, language: str) -> list[Block]:
    """Those that run."""
    return [block for block in blocks_of(readme, ROOT) if block.language == language and block.runs]


def write_rows(name: str, folder: Path, number: int = 0, given: Sequence[dict[str, Any]] = ()) -> None:
    """Rows for a file, those that are `given` or the sample's.

    Args:
        number: how many others the page names before, which have other rows of the sample.
    """
    lines = (
        Path(asset_path("peftx:sample/train.jsonl")).read_text("utf-8").splitlines()[ROWS * number :][:ROWS]
    )
    rows = given or INSTEAD.get(name) or [json.loads(line) | COLUMNS.get(name, {}) for line in lines]
    written = islice(cycle(rows), MANY.get(name, ROWS))
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in written), "utf-8")


def drawn(readme: Path) -> bool:
    """Is it among those whose blocks run now: a sixth of them, by what they say, as architectures are drawn; all in
    `make test-all`."""
    return os.environ.get("PEFTX_ARCHITECTURES") != "draw" or zlib.crc32(readme.read_bytes()) % 6 == 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "readme",
    [
        pytest.param(
            path,
            marks=[
                pytest.mark.of_plugin(path.parent.relative_to(ROOT).as_posix()),
                *[pytest.mark.slow] * (path.parent.name in COSTLY),
            ],
        )
        for path in READMES
    ],
    ids=lambda path: path.parent.name,
)
def test_what_a_readme_shows_works(readme: Path, here: Path, shorten: Any) -> None:
    most = {"batch_size": 2} if readme.parent.name in LONG else MOST | MORE.get(readme.parent.name, {})
    shorten(most)
    pipelines, code = blocks(readme, "yaml"), blocks(readme, "python")
    files = FILE.findall("".join(block.body for block in pipelines + code))
    of_classes = OF_CLASSES.get(readme.parent.name, {})
    for number, name in enumerate(dict.fromkeys(files)):
        write_rows(name, here, number, of_classes.get(name, ()))
    if readme.parent.name in MODELS:
        Stack("peftx:tiny", []).export(MODELS[readme.parent.name])
    runs = [(block, loaded(block)) for block in pipelines]
    for block, run in runs:
        assert not plan(run.pipeline).conflicts, f"{block.page}:{block.line}"
    if not drawn(readme):
        return
    names: dict[str, object] = {"__name__": "readme"}
    for block in code:
        block.execute(names)
    shorten(most | OF_PIPELINES.get(readme.parent.name, {}))
    for block, run in runs:  # after the Python, which may train what they begin with
        carried_out(block, run)


def test_readmes_show_a_pipeline_and_python() -> None:
    """Of those that run; there is none where the method needs a base of the Hub, or searches over stacks."""
    without = {
        language: {readme.parent.name for readme in READMES if not blocks(readme, language)}
        for language in ("yaml", "python")
    }
    assert without == {
        "yaml": {
            "carbs",
            "esft",
            "instruction-residual",
            "metaprompter",
            "prompt-gating",
            "state-offset-tuning",
        },
        "python": {"carbs", "esft", "metaprompter", "prompt-gating"},
    }


def test_a_block_that_does_not_run_says_why() -> None:
    found = [block for readme in READMES for block in blocks_of(readme, ROOT) if block.fence]
    wrong = [
        f"{block.page}:{block.line}: {block.fence}"
        for block in found
        if not re.fullmatch(r' norun="[^"]{15,}"', block.fence)
    ]
    assert not wrong
