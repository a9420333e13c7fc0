"""Language Ranker: similarities by hand, and the properties of the score."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from peftx import Evaluation, Stack
from peftx.errors import ArchitectureError, DataError, PeftxError, PluginError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.evaluation import evaluating
from peftx_language_ranker import LanguageRanker, built_in, figure, last_states, spearman

ROWS = built_in()

test_conformance = conformance("language-ranker")


@cache
def model(arch: str = "llama") -> Any:
    return tiny(arch)


def scores(
    rows: list[Any] | None = None,
    *,
    arch: str = "llama",
    tokenizer: Any = None,
    output: Path | None = None,
    **options: Any,
) -> dict[str, float]:
    stack = Stack(model(arch), [LanguageRanker(**options)], tokenizer=tokenizer or tiny_tokenizer())
    found = stack.evaluate(rows, metrics=["language-ranker"], output_dir=output)
    return {name: score.value for name, score in found.items()}


def alone(arch: str, text: str) -> torch.Tensor:
    """h_k of one text without a batch around it: [L, D]."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    with torch.inference_mode():
        return torch.stack(
            [
                state[0, -1]
                for state in model(arch)(input_ids=ids, output_hidden_states=True).hidden_states[1:]
            ]
        )


def test_english_with_itself_is_one_at_all_layers():
    found = scores([{**row, "same": row["en"]} for row in ROWS])
    assert found["similarity/same"] == pytest.approx(1, abs=1e-6)
    assert found["rank/same"] == 1
    assert [found[f"similarity/same/layer-{k}"] for k in (1, 2)] == pytest.approx([1, 1], abs=1e-6)
    assert found["similarity/de"] < 0.999


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "mamba", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_are_those_of_sentences_read_alone(arch, side):
    """Sentences of many lengths in one batch, under either padding side, with absolute and rotary positions."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    found = scores(arch=arch, tokenizer=tokenizer, languages=["de", "sw"])
    for language in ("de", "sw"):
        by_hand = [
            cosine_similarity(alone(arch, row[language]), alone(arch, row["en"]), dim=-1) for row in ROWS
        ]
        curve = torch.stack(by_hand).mean(0)
        assert [found[f"similarity/{language}/layer-{k}"] for k in (1, 2)] == pytest.approx(
            curve.tolist(), abs=1e-4
        )
        assert found[f"similarity/{language}"] == pytest.approx(float(curve.mean()), abs=1e-4)


@settings(max_examples=10)
@given(st.permutations(range(len(ROWS))), st.integers(1, 12))
def test_order_of_pairs_and_batches_do_not_matter(order, batch_size):
    found = scores([ROWS[i] for i in order], batch_size=batch_size)
    assert found == pytest.approx(expected(), abs=1e-5)


@cache
def expected() -> dict[str, float]:
    return scores(ROWS)


@pytest.mark.parametrize("factor", [0.01, 300.0])
def test_scale_of_the_states_does_not_matter(monkeypatch, factor):
    monkeypatch.setattr("peftx_language_ranker.last_states", lambda *args: factor * last_states(*args))
    assert scores(ROWS) == pytest.approx(expected(), abs=1e-5)


def test_shuffled_pairs_are_less_alike():
    words = ["stone", "river", "lamp", "winter", "bread", "garden", "ship", "music"]
    rows = [{"en": f"I saw the {word}", "x": f"We saw the {word}"} for word in words]
    shuffled = [
        {"en": row["en"], "x": other["x"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    assert scores(rows)["similarity/x"] > scores(shuffled)["similarity/x"] + 0.05


def test_random_tokens_rank_last_on_a_trained_model():
    stack = Stack("peftx:tiny", [LanguageRanker(curves=False)])
    rng = Random(0)
    usable = range(3, len(stack.tokenizer))
    rows = [{**row, "noise": stack.tokenizer.decode([rng.choice(usable) for _ in range(12)])} for row in ROWS]
    found = {name: score.value for name, score in stack.evaluate(rows, metrics=["language-ranker"]).items()}
    assert found["rank/noise"] == 6
    assert sorted(value for name, value in found.items() if name.startswith("rank/")) == [1, 2, 3, 4, 5, 6]
    ranked = sorted((name for name in found if name.startswith("rank/")), key=found.__getitem__)
    values = [found[name.replace("rank", "similarity")] for name in ranked]
    assert values == sorted(values, reverse=True)


def test_layers():
    found = expected()
    assert scores(layers=[2])["similarity/fr"] == pytest.approx(found["similarity/fr/layer-2"])
    assert scores(layers=[-1, 2, 2])["similarity/fr"] == pytest.approx(found["similarity/fr/layer-2"])
    both = (found["similarity/fr/layer-1"] + found["similarity/fr/layer-2"]) / 2
    assert (
        scores(layers=[1, 2])["similarity/fr"] == pytest.approx(both) == pytest.approx(found["similarity/fr"])
    )
    for k in (0, 3, -3):
        with pytest.raises(PeftxError, match=f"language-ranker: layers: there is no block {k}") as error:
            scores(layers=[k])
        assert "1 to 2" in str(error.value.hint)


def test_interval_and_count():
    stack = Stack(model(), [LanguageRanker()], tokenizer=tiny_tokenizer())
    rows = [dict(row) for row in ROWS]
    for row in rows[:4]:
        row["de"] = None  # no pair of this language
    score = stack.evaluate(rows, metrics=["language-ranker"])["similarity/de"]
    assert score.count == 6
    assert score.low < score.value < score.high
    assert stack.scores["similarity/fr"].count == 10


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(json.dumps({"eng": row["en"], "fra": row["fr"]}) for row in ROWS), encoding="utf-8"
    )
    found = scores(pairs=str(path), english="eng")
    assert found["similarity/fra"] == pytest.approx(expected()["similarity/fr"], abs=1e-6)
    with pytest.raises(DataError, match="no column 'en'"):
        scores(pairs=str(path))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"prompt": "a", "completion": "b"}], "prompt, completion"),
        ([{"eng": "a", "de": "b"}, {"fr": "c"}], "eng, de, fr"),
        (["a text"], "text"),
        ([], "none"),
    ],
)
def test_given_rows_are_never_replaced(rows, columns):
    """The built-in pairs are for no rows at all."""
    with pytest.raises(
        DataError, match=f"language-ranker: no column 'en' in the rows; columns: {columns}\n"
    ) as error:
        scores(rows)
    assert "set `english`" in str(error.value.hint)
    assert "`pairs`" in str(error.value.hint)
    assert scores(None) == expected()
    with pytest.raises(DataError, match="no column 'eng' in the rows; columns: en, de, fr, es, tr, sw"):
        scores(english="eng")


def test_figure(tmp_path):
    scores(output=tmp_path / "new")
    root = ElementTree.parse(tmp_path / "new" / "language-ranker.svg").getroot()
    lines = [part for part in root if part.tag.endswith("polyline")]
    assert len(lines) == 5
    scores(output=tmp_path / "none", curves=False)
    assert not (tmp_path / "none").exists()
    # From top to bottom whatever the range is.
    points = ElementTree.fromstring(figure({"<a>": torch.tensor([0.5, 0.75, 0.25])}))[3].get("points")
    assert points == "60.0,200.0 320.0,30.0 580.0,370.0"


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 40, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, 1, 0
    assert spearman([0.1, 0.2, 0.3, 0.4], [1, 3, 2, 4]) == pytest.approx(0.8)
    # Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_shares():
    ranked = sorted(("de", "fr", "es"), key=lambda name: expected()[f"rank/{name}"])
    shares = {name: 0.3 / (place + 1) for place, name in enumerate(ranked)}
    assert scores(shares=shares)["spearman"] == pytest.approx(1)
    assert "spearman" not in expected()
    with pytest.raises(PeftxError, match="'dee' is not ranked") as error:
        scores(shares={"dee": 0.1, "fr": 0.2, "es": 0.3})
    assert "de" in str(error.value.hint)
    for bad in ({"de": 0.1, "fr": 0.2}, {"de": 0.1, "fr": 0.1, "es": 0.1}):
        with pytest.raises(PeftxError, match="cannot be correlated"):
            scores(shares=bad)


def test_the_hook_alone_reads_in_evaluation_mode():
    busy = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    stack = Stack(busy, [LanguageRanker()], tokenizer=tiny_tokenizer())
    twice = []
    for _ in range(2):
        evaluation = Evaluation(stack=stack)
        stack.plugins["language-ranker"].evaluate(evaluation)
        twice.append(evaluation.to_dict())
    assert twice[0] == twice[1]
    assert busy.training


def test_bad_pairs():
    with pytest.raises(DataError, match=r"row 1 .* no sentence in 'en'"):
        scores([ROWS[0], {"en": " ", "de": "x"}])
    with pytest.raises(DataError, match="column 'de' holds 3"):
        scores([{"en": "a", "de": 3}])
    with pytest.raises(DataError, match="column 'de' is empty"):
        scores([{"en": "a", "de": None}])
    with pytest.raises(DataError, match="no column beside 'en'"):
        scores([{"en": "a"}])
    with pytest.raises(PeftxError, match="languages: no column 'dee'"):
        scores(languages=["dee"])
    with pytest.raises(DataError, match="a sentence has 300 tokens and the model reads 128"):
        scores([{"en": "a", "de": "x" * 300}])


def test_two_towers_are_refused_before_anything_runs() -> None:
    with pytest.raises(
        ArchitectureError, match="language-ranker: T5ForConditionalGeneration has two last tokens"
    ):
        Stack(model("t5"), [LanguageRanker()])


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"english": ""},
        {"layers": ["last"]},
        {"languages": ["de", "fr", "de"]},
        *({"shares": {"de": share}} for share in ("much", 0, -0.1, 1.1, 17, float("nan"), float("inf"))),
    ],
)
def test_bad_options(options):
    with pytest.raises(PluginError, match=f"LanguageRanker: {next(iter(options))}"):
        LanguageRanker(**options)


def test_states_are_counted_behind_soft_tokens():
    """A model that prepends tokens returns longer states; the last token is still the text's."""

    class Longer:
        def __getattr__(self, name: str) -> Any:
            return getattr(model(), name)  # in all else the model

        def __call__(self, **inputs: Any) -> Any:
            out = model()(**inputs)
            pads = [torch.cat([torch.zeros(len(s), 3, s.shape[2]), s], 1) for s in out.hidden_states]
            return type("Out", (), {"hidden_states": pads})

    texts = ["abc", "a longer text"]
    with evaluating(model()):
        plain = last_states(model(), tiny_tokenizer(), texts)
        assert torch.equal(last_states(Longer(), tiny_tokenizer(), texts), plain)  # type: ignore[arg-type]
