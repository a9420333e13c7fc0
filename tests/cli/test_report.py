"""`peftx report`: a run as one page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import peftx
from peftx.charts import MOST_POINTS, STYLE, Band, Curve, chart, running_mean, thinned, ticks
from peftx.engines.bundle.manifest import own_digest
from peftx.engines.files import sha256
from peftx.errors import ServerError
from peftx.history import TrainingHistory
from peftx.pages.page import bands, table
from peftx.pages.samples import prompt_of
from peftx.pages.told import numbers_in
from peftx.quantities import size
from peftx.testing import tiny, tiny_tokenizer
from peftx_lora import Lora

HOSTILE = "</pre><script>alert(1)</script> & \"quoted\" 'so' <img src=x onerror=alert(2)>"
EMPTY = {"meta", "br", "img", "line", "path", "rect", "circle", "polyline", "link", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps texts by element and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def checked(text: str) -> Page:
    """The page, if it is whole, and asks nobody for anything."""
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & found.tags
    assert not [
        name for name, _ in found.attributes if name in ("src", "href", "xlink:href") or name[:2] == "on"
    ]
    assert "url(" not in text
    assert "@import" not in text
    for svg in re.findall("<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that measured before and after training, on rows whose texts are hostile."""
    from peftx.pipeline import load_run

    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"{HOSTILE} {n}", "completion": "It is so."} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    text = f"""
peftx: 1
model: peftx:tiny
data: {{train: {folder / "rows.jsonl"}, holdout: 0.5}}
stack: [{{use: selectit, with: {{raters: ["peftx:tiny"], share: 0.5}}}}, {{use: lora, with: {{rank: 2}}}}]
train: {{steps: 4, batch_size: 2}}
evaluate: [perplexity]
run: [{{evaluate: {{name: base}}}}, prepare, inject, train, {{evaluate: {{name: adapted}}}}, save]
output: {folder / "out"}
"""
    load_run(text).run()
    return folder / "out"


def test_the_page_tells_the_run(bundle: Path, installed: Any, ok: Callable[..., str]) -> None:
    assert ok("report", str(bundle)).strip() == "report.html"
    text = Path("report.html").read_text("utf-8")
    found = checked(text)
    titles = ["The stack", "Rows", "Metrics", "Training", "Before and after", "Stages", "The plan", "Files",
              "The spec", "How to load it", "Versions"]  # fmt: skip
    assert found.texts["h2"] == titles
    assert found.texts["h1"] == ["selectit + lora on peftx:tiny"]
    assert "base (before training)" in found.texts["th"]
    assert "adapted" in found.texts["th"]
    assert {"lora.safetensors", "history.json", "pipeline.yaml"} <= set(found.texts["td"])
    assert "No samples were asked for" in text
    pre = "".join(found.texts["pre"])
    assert (bundle / "pipeline.yaml").read_text("utf-8") in pre
    assert "peftx.load('out')" in pre
    assert "peftx generate out" in pre
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    assert {*manifest["versions"].values(), manifest["plugins"][0]["version"]} <= set(found.texts["td"])
    history = peftx.load(bundle).history
    assert f"{history.trainings[0].loss[-1]:.4g}" in found.texts["td"]
    assert f"{history.trainings[0].trainable:,}" in found.texts["td"]
    (prepared,) = history.preparations
    assert (prepared.rows, prepared.left, sum(prepared.dropped.values())) == (4, 2, 2)
    assert "\n".join(f"{n} {why}" for why, n in prepared.dropped.items()) in found.texts["td"]
    assert [stage.name for stage in history.stages] == [
        "load",
        "evaluate",
        "prepare",
        "inject",
        "train",
        "evaluate",
    ]
    assert {f"{stage.seconds:,.2f}" for stage in history.stages} <= set(found.texts["td"])
    score = history.evaluations[0].scores["perplexity"].value
    assert any(f"{score:.5g}" in cell for cell in found.texts["td"])
    assert [p.name for p in Path.cwd().iterdir()] == ["report.html"], "nothing half-written lies beside it"


def test_one_name_for_one_count(tmp_path: Path, installed: Any, ok: Callable[..., str]) -> None:
    """A prompt's network trains and is not stored: the page says what each number counts, and the plan, the training
    and `apply` agree on what is trained."""
    from peftx.pipeline import load_run

    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "Say {n}.", "completion": "So."}}\n' for n in range(8)), "utf-8"
    )
    result = load_run(f"""
peftx: 1
model: peftx:tiny
data: {{train: {tmp_path / "rows.jsonl"}, holdout: 0.5}}
stack: [p-tuning, {{use: lora, with: {{rank: 2}}}}, nf4]
train: {{steps: 2, batch_size: 2}}
evaluate: [perplexity]
output: {tmp_path / "out"}
""").run()
    ok("report", str(tmp_path / "out"))
    text = Path("report.html").read_text("utf-8")
    found = checked(text)
    packed = next(
        scores["packed_bytes"].value for scores in result.scores.values() if "packed_bytes" in scores
    )
    stored = sum(numbers_in(tmp_path / "out" / f"{id}.safetensors") for id in ("p-tuning", "nf4"))
    trained = f"{result.trainable:,}"
    assert result.trainable > 900_000
    assert found.texts["th"].count("numbers stored") == 1
    assert found.texts["th"].count("numbers trained") == 1
    assert f"{stored:,}" in found.texts["td"]
    assert found.texts["td"].count(trained) == 3, (
        "the training, and of the plan what is added and what is trained"
    )
    assert "parameters" not in found.texts["th"]
    for name in ("Numbers stored", "Numbers trained", "Numbers added"):
        assert text.count(f"{name} are ") == 1
    assert f'<td class="number">{size(packed)}</td>' in text
    assert not re.search(r"\de\+\d", text)


def test_no_word_is_broken_in_a_table() -> None:
    """`anywhere` lets a narrow table break every word."""
    assert "anywhere" not in re.sub(r"h1 {[^}]*}", "", STYLE)


def test_samples_of_hostile_rows_are_text(bundle: Path, installed: Any, ok: Callable[..., str]) -> None:
    ok("report", str(bundle), "--samples", "2", "-o", "new/page.html")
    text = Path("new/page.html").read_text("utf-8")
    found = checked(text)
    assert "<script" not in text
    assert "alert" not in "".join(value for _, value in found.attributes)
    whole = "".join(found.texts["td"])
    assert whole.count(HOSTILE) >= 2
    stack = peftx.load(bundle)
    prompt = next(t for t in found.texts["td"] if t.startswith(HOSTILE))
    after = stack.generate(prompt, max_new_tokens=64, do_sample=False)
    with stack.disabled():
        before = stack.generate(prompt, max_new_tokens=64, do_sample=False)
    assert {before, after} <= {*found.texts["td"], ""}
    for who in ("The base", "The stack"):
        told = next(text for text in found.texts["p"] if text.startswith(f"{who} wrote"))
        wrote, passes = re.findall(r"(\d+) (?:tokens in|forward passes)", told)
        assert int(wrote) == int(passes) <= 128, "nothing drafts here"
        served = next(text for text in found.texts["p"] if text.startswith(f"{who} answered"))
        asked, took, requests, tokens = map(
            float, re.findall(r"([\d.]+) (?:requests|seconds|tokens)", served)
        )
        assert asked == 8, "the two prompts, four times"
        assert requests * took == pytest.approx(8, rel=0.1)
        assert tokens * took == pytest.approx(4 * int(wrote), rel=0.1)


def test_what_is_not_served_keeps_its_samples(
    bundle: Path, installed: Any, ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(server: Any) -> None:
        raise ServerError("a plugin of the stack will have none of it")

    monkeypatch.setattr(
        sys.modules["peftx.pages.samples"], "Engine", refuse
    )  # beside it a function of that name
    ok("report", str(bundle), "--samples", "1", "-o", "page.html")
    found = checked(Path("page.html").read_text("utf-8"))
    assert "The stack is not served: a plugin of the stack will have none of it." in found.texts["p"]
    assert any(text.startswith("The stack wrote") for text in found.texts["p"])
    assert "the stack writes" in found.texts["th"]


def test_a_base_that_is_not_at_hand_is_said(bundle: Path, installed: Any, ok: Callable[..., str]) -> None:
    ok("report", str(bundle), "--samples", "1", "--model", "./gone", "-o", "page.html")
    text = Path("page.html").read_text("utf-8")
    checked(text)
    assert "the base is not at hand: " in text
    assert "the bundle cannot be loaded: " in text


def test_rows_that_are_gone_are_said(bundle: Path, installed: Any, ok: Callable[..., str]) -> None:
    rows = bundle.parent / "rows.jsonl"
    rows.rename(rows.with_suffix(".away"))
    try:
        ok("report", str(bundle), "--samples", "1", "-o", "page.html")
    finally:
        rows.with_suffix(".away").rename(rows)
    text = Path("page.html").read_text("utf-8")
    checked(text)
    assert "there are no rows to take prompts from: " in text
    assert "The plan cannot be made here: " in text


def test_a_run_without_history_has_a_page(installed: Any, ok: Callable[..., str]) -> None:
    """A stack made in Python, and a bundle of a version that kept none."""
    stack = peftx.Stack("peftx:tiny", [Lora(rank=2)])
    stack.save("plain")
    ok("report", "plain", "-o", "page.html")
    text = Path("page.html").read_text("utf-8")
    checked(text)
    assert "This bundle holds no history" in text
    assert "Nothing was measured." in text
    stack.train([{"text": "Once upon a time."}], steps=2, batch_size=1)
    stack.history = type(stack.history)()
    stack.save("old")
    ok("report", "old", "-o", "page.html")
    text = Path("page.html").read_text("utf-8")
    assert "trained for 2 steps, and this bundle holds no history" in text
    assert "<svg" not in text


def test_a_base_of_the_hub_is_not_asked_for(
    installed: Any, ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its base a page is whole but for the plan, and no connection is tried."""

    def refused(*words: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    model = tiny("llama")
    model.config._name_or_path = "somebody/model"
    peftx.Stack(model, [Lora(rank=2)], tokenizer=tiny_tokenizer()).save("out")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    ok("report", "out")
    text = Path("report.html").read_text("utf-8")
    checked(text)
    assert "The plan cannot be made here: the base &#x27;somebody/model&#x27; is not on this machine" in text


def test_a_spec_that_is_no_text_is_named(bundle: Path, installed: Any, refused: Callable[..., str]) -> None:
    shutil.copytree(bundle, "out")
    Path("out/pipeline.yaml").write_bytes(b"\xff\xfe")
    manifest = json.loads(Path("out/manifest.json").read_text("utf-8"))
    manifest["files"]["pipeline.yaml"] = sha256(Path("out/pipeline.yaml"))
    manifest["own"] = own_digest(manifest)
    Path("out/manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert "'out/pipeline.yaml' is damaged or cannot be read" in refused("report", "out")


def test_what_is_no_bundle_is_refused(bundle: Path, installed: Any, refused: Callable[..., str]) -> None:
    Path("empty").mkdir()
    assert "no bundle at 'gone'" in refused("report", "gone")
    assert "is no bundle" in refused("report", "empty")
    shutil.copytree(bundle, "broken")
    with Path("broken/history.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    assert "history.json is corrupted" in refused("report", "broken")


def test_the_page_spoils_no_bundle(bundle: Path, installed: Any, refused: Callable[..., str]) -> None:
    shutil.copytree(bundle, "out")
    assert "holds no strange file" in refused("report", "out", "-o", "out/report.html")
    assert "is a folder" in refused("report", "out", "-o", "out")
    peftx.load("out")


# ------------------------------------------------------------------------------------------------------------ parts
def test_a_chart_escapes_names_and_keeps_every_point() -> None:
    text = chart([Curve(HOSTILE, [(1.0, 2.0), (2.0, 1.0), (3.0, 1.5)])], x="x<", y="y&", title=HOSTILE,
                 bands=[Band(HOSTILE, 1, 2), Band("b", 3, 3)])  # fmt: skip
    assert "<script" not in text
    figure = ElementTree.fromstring(text)
    (line,) = figure.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] > points[2][1] > points[0][1], "up is more"
    assert len(list(figure.iter("rect"))) == 2


@pytest.mark.parametrize("values", [[(1.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)], [(1.0, -1e-9), (2.0, 1e9)]])
def test_a_chart_of_few_or_flat_values(values: list[tuple[float, float]]) -> None:
    text = chart([Curve("loss", values)], x="step", y="loss", title="t")
    ElementTree.fromstring(text)
    assert "nan" not in text
    assert "inf" not in text
    assert chart([Curve("nothing", [])], x="", y="", title="") == ""


def test_a_long_curve_keeps_its_spikes() -> None:
    points = [(float(n), 1.0) for n in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[777] = (777.0, -9.0)
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 4
    assert {points[0], points[-1], points[54_321], points[777]} <= set(few)
    assert [x for x, _ in few] == sorted(x for x, _ in few)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.7, 4.4) == [1, 2, 3, 4]
    assert ticks(3, 3) == [3]
    assert all(-5e-4 <= tick <= 3e-3 + 1e-12 for tick in ticks(-5e-4, 3e-3))


def test_a_running_mean_is_of_the_points_around() -> None:
    line = [(float(n), float(n)) for n in range(40)]
    assert running_mean(line) == [(x, pytest.approx(y)) for x, y in line], "a straight line is its own mean"
    spike = [(float(n), 5.0 * (n == 20)) for n in range(40)]
    assert [y for _, y in running_mean(spike)][17:24] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_phases_and_trainings_are_bands() -> None:
    one = TrainingHistory(
        steps=4, step=[1, 2, 3, 4], loss=[1.0] * 4, learning_rate=[1.0] * 4, grad_norm=[1.0] * 4, seconds=[1.0] * 4,
        phases={"p": ["warm", "warm", "main", "main"], "q": ["only"] * 4},
    )  # fmt: skip
    assert [(b.name, b.begin, b.end) for b in bands([one])] == [("warm", 1, 2), ("main", 3, 4)]
    two = one.model_copy(update={"phases": {}})
    assert bands([two]) == []
    assert [(b.name, b.begin, b.end) for b in bands([two, two])] == [
        ("training 1", 1, 4),
        ("training 2", 5, 8),
    ]


def test_cells_are_escaped() -> None:
    assert HOSTILE not in table((HOSTILE,), [(HOSTILE,)])
    assert Page(table((HOSTILE,), [(HOSTILE,)])).texts == {"th": [HOSTILE], "td": [HOSTILE]}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b"),
        ({"text": "a joy", "label": "good"}, "a joy", "good"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, "hi", "ho"),
        ({"text": " ".join(map(str, range(30)))}, " ".join(map(str, range(12))), " ".join(map(str, range(12, 30)))),
    ],
)  # fmt: skip
def test_prompts_of_rows_of_every_format(row: dict[str, Any], prompt: str, answer: str) -> None:
    assert prompt_of(row) == (prompt, answer)
