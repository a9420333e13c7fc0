"""Metrics against numbers worked out by hand, and the properties that make them trustworthy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peftx.errors import DataError, PeftxError, UnsupportedError
from peftx.toolkits.evaluation import (
    Evaluation,
    Request,
    Score,
    accuracy,
    bootstrap_ratio,
    context_window,
    evaluating,
    exact_match,
    last_number,
    perplexity,
    score_requests,
    scores,
    wilson_interval,
    windows,
)
from peftx.toolkits.evaluation.classification import label_logs as all_label_logs

VOCAB = 259  # three special ids and the bytes


def byte_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One id for each byte."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


class Bigram(nn.Module):
    """The next token depends on the last one alone: logits = table[token].  table: [V, V]"""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)
        self.config = LlamaConfig(vocab_size=len(table), max_position_embeddings=16)
        self.generation_config = GenerationConfig()
        self.shapes: list[tuple[int, int]] = []

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert input_ids.shape == attention_mask.shape
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.embedding(input_ids))


def tiny_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def direct_logs(model: LlamaForCausalLM, sequence: list[int]) -> list[float]:
    """log p of every id but the first, one pass over the whole sequence."""
    with torch.inference_mode():
        logs = model(input_ids=torch.tensor([sequence])).logits[0].double().log_softmax(-1)
    return [float(logs[place, token]) for place, token in enumerate(sequence[1:])]


# --- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25525, 0.36621),  # Newcombe 1998, table I
        (15, 148, 0.06239, 0.16054),
    ],
)
def test_wilson_interval_has_its_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-4)


@given(trials=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_holds_the_proportion_and_mirrors(trials: int, share: float) -> None:
    successes = round(share * trials)
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_proportions_of_nothing_are_refused() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError, match="no proportion"):
            wilson_interval(successes, trials)


def test_bootstrap_is_seeded_and_covers_a_known_mean() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        sample = random.normal(3.0, 1.0, size=40)
        low, high = bootstrap_ratio(sample, np.ones(40), seed=trial, resamples=300)
        covered += low <= 3.0 <= high
    assert 48 <= covered < 60  # about 95 % of 60; all 60 would be an interval that is too wide
    assert bootstrap_ratio([1, 2, 5], [1, 1, 1], seed=1) == bootstrap_ratio([1, 2, 5], [1, 1, 1], seed=1)
    assert bootstrap_ratio(sample, np.ones(40), seed=1) != bootstrap_ratio(sample, np.ones(40), seed=2)
    assert bootstrap_ratio([2, 4, 6], [1, 2, 3]) == (2.0, 2.0)  # a ratio, not a mean of ratios
    assert bootstrap_ratio([2], [1]) is None


def test_an_interval_is_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0).random(7)
    whole = bootstrap_ratio(numbers, numbers + 1)
    for at_once in (1, 7, 50, 6999):
        monkeypatch.setattr(scores, "_DRAWN", at_once)
        assert bootstrap_ratio(numbers, numbers + 1) == whole


def test_shares_and_ratios_are_recorded_with_their_intervals() -> None:
    evaluation = Evaluation(stack=None)  # type: ignore[arg-type]
    share = evaluation.add_share("right", 3, 4, "share")
    assert (share.value, share.count, share.unit) == (0.75, 4, "share")
    assert (share.low, share.high) == wilson_interval(3, 4)
    ratio = evaluation.add_ratio("of pairs", [1, 2, 0], [2, 2, 4])
    assert (ratio.value, ratio.count) == (3 / 8, 8)
    assert (ratio.low, ratio.high) == bootstrap_ratio([1, 2, 0], [2, 2, 4])
    mean = evaluation.add_ratio("mean", [0.5, 1.0])
    assert (mean.value, mean.count, mean.low, mean.high) == (0.75, 2, *bootstrap_ratio([0.5, 1.0], [1, 1]))
    assert evaluation.add_ratio("one", [0.5]).low is None
    with pytest.raises(DataError, match="0 of 0 is no proportion"):
        evaluation.add_share("none", 0, 0)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_rows_to_measure_on_as_they_are_read_in_training(arch: str) -> None:
    """The model's own loss over the batches, in any size, is the one that a training of these rows begins with."""
    from peftx import Evaluation, Stack
    from peftx.testing import tiny, tiny_tokenizer

    rows = [{"prompt": f"{n} is", "completion": f" {n}" * n} for n in range(1, 6)]
    stack = Stack(tiny(arch), tokenizer=tiny_tokenizer())
    evaluation = Evaluation(stack=stack, data={"eval": rows})
    found = []
    for size in (1, 2, 9):
        batches = list(evaluation.batches(size))
        assert [len(batch["labels"]) for batch in batches] == [
            len(rows[i : i + size]) for i in range(0, 5, size)
        ]
        counts = [int((batch["labels"] != -100).sum()) for batch in batches]
        with torch.no_grad():
            losses = [float(stack.model(**batch).loss) for batch in batches]
        if arch == "llama":  # it predicts no first token
            counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        found.append(sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    texts = Evaluation(stack=stack, data={"eval": ["once", "upon"]})
    if arch == "llama":
        assert [list(batch["input_ids"].shape[:1]) for batch in texts.batches()] == [[1]], (
            "documents follow each other"
        )


@given(tops=st.lists(st.floats(0, 1), min_size=1, max_size=40), copies=st.integers(1, 9))
def test_a_ratio_lies_in_its_interval(tops: list[float], copies: int) -> None:
    """Also where all rows are alike, and sums round in one order as they do not in another."""
    for rows in (tops, tops[:1] * copies):
        score = Evaluation(stack=None).add_ratio("share", rows)  # type: ignore[arg-type]
        assert score.value == pytest.approx(sum(rows) / len(rows))
        assert score.low is None or score.low <= score.value <= score.high  # type: ignore[operator]


def test_scores_refuse_what_is_no_measurement() -> None:
    with pytest.raises(DataError, match="not a number"):
        Score(name="x", value=math.nan)
    with pytest.raises(DataError, match="both ends"):
        Score(name="x", value=1.0, low=0.0)
    with pytest.raises(DataError, match="outside"):
        Score(name="x", value=3.0, low=0.0, high=2.0)
    with pytest.raises(DataError, match="needs a name"):
        Score(name="", value=3.0)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (
            Score(name="perplexity", value=8.96821, low=8.7012, high=9.24, count=1204),
            "perplexity 8.9682 (95 %: 8.701 to 9.24, 1,204 counted)",
        ),
        (Score(name="size", value=12000.0, unit="bytes"), "size 12,000 bytes"),
        (Score(name="accuracy", value=0.5, count=2), "accuracy 0.5 (2 counted)"),
        (Score(name="perplexity", value=math.inf), "perplexity inf"),
    ],
)
def test_a_score_prints_as_a_person_writes_it(score: Score, text: str) -> None:
    assert str(score) == text


# --- windows ------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_windows_score_every_token_once_with_all_the_context_that_fits(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 60))
    size = data.draw(st.integers(1, 20))
    stride = data.draw(st.integers(1, size))
    start = data.draw(st.integers(1, length))
    scored: list[int] = []
    for begin, first, end in windows(length, size=size, stride=stride, start=start):
        assert 1 <= end - begin <= size
        assert begin < first <= end
        scored += range(first, end + 1)
        for token in range(first, end + 1):
            context = token - begin
            assert context >= min(token, size - stride + 1)
    assert scored == list(range(start, length))


def test_windows_refuse_steps_that_would_leave_gaps() -> None:
    for size, stride, start in ((4, 5, 1), (4, 0, 1), (0, 0, 1), (4, 2, 0)):
        with pytest.raises(DataError):
            windows(9, size=size, stride=stride, start=start)


# --- perplexity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 3])
def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(
    tokenizer: PreTrainedTokenizerFast, max_length: int | None
) -> None:
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    scores = perplexity(model, tokenizer, ["abcdefgh", "é"], max_length=max_length)
    assert scores["perplexity"].value == pytest.approx(VOCAB, rel=1e-6)
    assert scores["nll"].value == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert scores["bits_per_byte"].value == pytest.approx(math.log2(VOCAB), rel=1e-6)  # one token is one byte
    assert {score.count for score in scores.values()} == {10}
    assert scores["perplexity"].low == pytest.approx(VOCAB, rel=1e-6)


def test_a_llama_without_a_head_is_uniform(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokenizer, ["any text"])["perplexity"].value == pytest.approx(VOCAB, rel=1e-6)


def test_a_bigram_table_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    """p(a | BOS) = 1/2, p(b | a) = 1/8, p(a | b) = 1/4; the text is "aba"."""
    a, b = ids("ab")
    table = torch.full((VOCAB, VOCAB), -math.inf)
    table[:, 5] = 0.0  # all else goes to one id
    for last, token, p in ((1, a, 1 / 2), (a, b, 1 / 8), (b, a, 1 / 4)):
        table[last, token] = math.log(p)
        table[last, 5] = math.log(1 - p)
    scores = perplexity(Bigram(table), tokenizer, ["aba"])
    assert scores["perplexity"].value == pytest.approx((2 * 8 * 4) ** (1 / 3), rel=1e-6)
    assert scores["bits_per_byte"].value == pytest.approx((1 + 3 + 2) / 3, rel=1e-6)
    assert scores["perplexity"].low is None  # one window says nothing about spread
    impossible = perplexity(Bigram(table), tokenizer, ["bb"])
    assert impossible["perplexity"].value == math.inf


def test_one_window_is_the_whole_sequence_and_strides_within_it_change_nothing(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "the quick brown fox"
    logs = direct_logs(llama, [1, *ids(text)])
    for stride in (None, 1, 7):
        scores = perplexity(llama, tokenizer, [text], max_length=32, stride=stride)
        assert scores["nll"].value == pytest.approx(-sum(logs) / len(logs), rel=1e-5)


def test_stride_one_gives_every_token_a_full_window(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    sequence = [1, *ids("a text of more ids than a window")]
    size = 6
    expected = [
        direct_logs(llama, sequence[max(0, at - size) : at + 1])[-1] for at in range(1, len(sequence))
    ]
    scores = perplexity(llama, tokenizer, ["a text of more ids than a window"], max_length=size, stride=1)
    assert scores["nll"].value == pytest.approx(-sum(expected) / len(expected), rel=1e-5)


def test_a_completion_is_scored_given_its_prompt(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, completion = "two and two is", "four"
    logs = direct_logs(llama, [1, *ids(prompt + " " + completion)])[-5:]
    row = {"prompt": prompt, "completion": completion}
    scores = perplexity(llama, tokenizer, [row])
    assert scores["nll"].value == pytest.approx(-sum(logs) / 5, rel=1e-5)
    assert scores["nll"].count == 5
    whole = perplexity(llama, tokenizer, [row], max_length=10, stride=1)
    assert whole["nll"].count == 5


def test_a_tokenizer_without_bos_lends_one(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with_bos = perplexity(llama, tokenizer, ["abc", "<s>abc"])
    without = perplexity(llama, byte_tokenizer("$A"), ["abc", "abc"])
    assert without["nll"].value == pytest.approx(with_bos["nll"].value)
    assert without["nll"].count == with_bos["nll"].count == 6


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_and_padding_change_nothing(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    texts = ["a", "a much longer text than the first one", "middle sized", "é" * 9]
    logs = [log for text in texts for log in direct_logs(llama, [1, *ids(text)])]
    seen: list[tuple[int, int]] = []
    scores = perplexity(
        llama,
        tokenizer,
        texts,
        batch_size=batch_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert scores["nll"].value == pytest.approx(-sum(logs) / len(logs), rel=1e-5)
    assert seen[-1] == (4, 4)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_intervals_are_over_documents_when_there_are_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ten equal documents have no spread, though their windows differ; nine are cut into windows."""
    model = Bigram(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))
    many = perplexity(model, tokenizer, ["abcdef"] * 10, max_length=3)["nll"]
    assert many.high - many.low < 1e-9
    few = perplexity(model, tokenizer, ["abcdef"] * 9, max_length=3)["nll"]
    assert few.high - few.low > 1e-3
    assert few.value == pytest.approx(many.value)


def test_faults_of_texts_name_their_index(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for texts, said in (
        (["a", ""], "text 1 .*no tokens"),
        ([], "no texts"),
        ("abc", "one string"),
        ([{"prompt": "x"}], "found prompt"),
    ):
        with pytest.raises(DataError, match=said):
            perplexity(llama, tokenizer, texts)


def test_nan_is_not_a_result(tokenizer: PreTrainedTokenizerFast) -> None:
    table = torch.zeros(VOCAB, VOCAB)
    table[ids("b")[0]] = math.nan
    with pytest.raises(PeftxError, match="NaN"):
        perplexity(Bigram(table), tokenizer, ["abc"])


def test_logits_of_another_length_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=model.embedding(input_ids[:, 1:])
    )
    with pytest.raises(PeftxError, match=r"read \(1, 3\) tokens"):
        perplexity(model, tokenizer, ["abc"])


def test_the_window_comes_from_the_model_then_the_tokenizer(llama: LlamaForCausalLM, tokenizer: Any) -> None:
    assert context_window(llama, tokenizer) == 64
    model = Bigram(torch.zeros(4, 4))
    model.config = T5Config()
    assert context_window(model, SimpleNamespace(model_max_length=77)) == 77
    assert context_window(model, SimpleNamespace(model_max_length=int(1e30))) == 1024


def test_modes_of_every_module_come_back() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_masked_models_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    rows = [{"text": "a", "label": "x"}]
    for model in (BertForMaskedLM(config), BertLMHeadModel(config)):
        with pytest.raises(UnsupportedError, match="both sides"):
            perplexity(model, tokenizer, ["a"])
        with pytest.raises(UnsupportedError, match="both sides"):
            accuracy(model, tokenizer, rows, labels=["x", "y"])
    config.is_decoder = True
    assert perplexity(BertLMHeadModel(config), tokenizer, ["a"])["nll"].count == 1


# --- encoder-decoder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def t5_logs(model: T5ForConditionalGeneration, prompt: str, target: str) -> list[float]:
    labels = ids(target)
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([[*ids(prompt), 2]]), decoder_input_ids=torch.tensor([[0, *labels[:-1]]])
        ).logits
    return [float(row[token]) for row, token in zip(logits[0].double().log_softmax(-1), labels, strict=True)]


def test_an_encoder_decoder_scores_the_completion_in_its_decoder(t5: T5ForConditionalGeneration) -> None:
    tokenizer = byte_tokenizer("$A </s>")
    rows = [{"prompt": "a longer prompt", "completion": "xy"}, {"prompt": "p", "completion": "zab"}]
    logs = [log for row in rows for log in t5_logs(t5, row["prompt"], row["completion"])]
    scores = perplexity(t5, tokenizer, rows)
    assert scores["nll"].value == pytest.approx(-sum(logs) / 5, rel=1e-5)
    assert scores["bits_per_byte"].value == pytest.approx(-sum(logs) / 5 / math.log(2), rel=1e-5)
    with pytest.raises(DataError, match="given a prompt"):
        perplexity(t5, tokenizer, ["text"])


def test_an_encoder_decoder_classifies(t5: T5ForConditionalGeneration) -> None:
    tokenizer = byte_tokenizer("$A </s>")
    rows = [{"text": text, "label": "ab"} for text in ("one", "three", "seventeen")]
    labels = ["ab", "ac", "b"]
    expected = [max(labels, key=lambda label: sum(t5_logs(t5, row["text"], label))) for row in rows]
    assert list(accuracy(t5, tokenizer, rows, labels=labels).predictions) == expected


# --- accuracy -----------------------------------------------------------------------------------------------


def label_logs(model: LlamaForCausalLM, prompt: str, label: str) -> float:
    tail = ids(" " + label)
    return sum(direct_logs(model, [1, *ids(prompt), *tail])[-len(tail) :])


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_the_likeliest_label_wins(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, normalise: Any
) -> None:
    labels = ["good", "gooc", "x", "very long label", "ä"]
    rows = [
        {"text": text, "label": labels[i % 2]}
        for i, text in enumerate(["a", "bcd", "some words", "!", "z z"])
    ]
    lengths = {
        "none": dict.fromkeys(labels, 1),
        "tokens": {label: len(ids(" " + label)) for label in labels},
        "bytes": {label: len(label.encode()) for label in labels},
    }[normalise]
    expected = [
        max(labels, key=lambda label: label_logs(llama, f"<{row['text']}>", label) / lengths[label])
        for row in rows
    ]
    result = accuracy(
        llama, tokenizer, rows, labels=labels, prompt="<{text}>", normalise=normalise, batch_size=3
    )
    assert list(result.predictions) == expected


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_what_is_not_read_could_not_have_won(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, normalise: Any
) -> None:
    """Labels that begin alike, begin one another, or differ in their last token alone."""
    labels = ["a", "ab", "abc", "abd", "abcde", "b", "ba", "bab", "c a b", "c a c", "ddddddd"]
    rows = [{"text": f"{place} of them", "label": "a"} for place in range(40)]
    found = accuracy(llama, tokenizer, rows, labels=labels, normalise=normalise, batch_size=7)
    logs = all_label_logs(llama, tokenizer, [row["text"] for row in rows], labels)
    sizes = {"none": lambda _: 1, "tokens": lambda label: len(ids(" " + label)), "bytes": len}[normalise]
    expected = [max(range(len(labels)), key=lambda i: row[i] / sizes(labels[i])) for row in logs]
    assert list(found.predictions) == [labels[place] for place in expected]
    assert len(set(found.predictions)) > 1 or normalise == "none"


def test_a_sure_model_reads_few_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    """Eight labels of three tokens: a pass over the first shows which may win, one over that one that it does."""
    labels = [f"{first}xy" for first in "abcdefgh"]
    table = torch.full((VOCAB, VOCAB), -20.0)
    for before, after in [("t", " "), (" ", "c"), *((first, "x") for first in "abcdefgh"), ("x", "y")]:
        table[ids(before)[0], ids(after)[0]] = 0.0
    model = Bigram(table)
    seen: list[tuple[int, int]] = []
    result = accuracy(
        model, tokenizer, [{"text": "t", "label": "axy"}] * 5, labels=labels, batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert result.predictions == ("cxy",) * 5
    assert sum(rows for rows, _ in model.shapes) == 10
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_accuracy_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    """After a space the model says `a` with 0.6, `b` with 0.4, whatever the text: all rows become a."""
    a, b = ids("ab")
    table = torch.full((VOCAB, VOCAB), -20.0)
    table[:, ids(" ")[0]] = 0.0
    table[ids(" ")[0], a], table[ids(" ")[0], b] = math.log(0.6), math.log(0.4)
    rows = [{"text": "t", "label": label} for label in "aabaab"]
    model = Bigram(table)
    result = accuracy(model, tokenizer, rows)
    assert result.predictions == ("a",) * 6
    assert result.score.value == pytest.approx(4 / 6)
    assert (result.score.low, result.score.high) == wilson_interval(4, 6)
    assert result.score.count == 6
    table_of = {row.label: row for row in result.classes}
    assert list(table_of) == ["a", "b"]
    assert (table_of["a"].count, table_of["a"].predicted, table_of["a"].correct) == (4, 6, 4)
    assert table_of["a"].precision == pytest.approx(4 / 6)
    assert table_of["a"].recall == 1.0
    assert (table_of["b"].recall, table_of["b"].precision) == (0.0, None)
    assert sum(rows for rows, _ in model.shapes) == 6  # both labels of a row come from one pass


def test_long_prompts_are_cut_at_their_left(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text, labels = "0123456789" * 10, ["yes", "no"]
    rows = [{"text": text, "label": "yes"}]
    # BOS, then what fits beside the longest label (4 ids with its space, of which 3 are read).
    kept = text[-(20 - 1 - 3) :]
    expected = max(labels, key=lambda label: label_logs(llama, kept, label))
    assert accuracy(llama, tokenizer, rows, labels=labels, max_length=20).predictions == (expected,)
    with pytest.raises(DataError, match="does not fit in max_length 3"):
        accuracy(llama, tokenizer, rows, labels=labels, max_length=3)


@pytest.mark.parametrize(
    ("rows", "labels", "said"),
    [
        ([], ["a", "b"], "no rows"),
        ([{"text": "t", "label": "a"}], None, "at least two"),
        ([{"text": "t", "label": "a"}], ["a", "a"], "at least two different"),
        (
            [{"text": "t", "label": "a"}, {"text": "t", "label": "c"}],
            ["a", "b"],
            "row 1 .*'c' is not among a, b",
        ),
        ([{"text": "t"}], ["a", "b"], "found text"),
        ([{"text": "t", "label": "a"}], ["a", " a"], "same tokens"),
        ([{"text": "t", "label": "a"}], ["a", ""], "no tokens"),
    ],
)
def test_classifications_that_are_refused(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Any], labels: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        accuracy(llama, tokenizer, rows, labels=labels)


def test_requests_keep_their_order_and_alternatives(llama: LlamaForCausalLM) -> None:
    long, short = [1, 9, 8, 7, 6, 5], [1, 30]
    requests = [
        Request(inputs=short, first=0, targets=[[30], [31]]),
        Request(inputs=long[:-1], first=2, targets=[long[3:]]),
    ]
    scored = score_requests(llama, requests, batch_size=2)
    assert scored[0][0].tolist() == pytest.approx(direct_logs(llama, short), abs=1e-5)
    assert scored[0][1].tolist() == pytest.approx(direct_logs(llama, [1, 31]), abs=1e-5)
    assert scored[1][0].tolist() == pytest.approx(direct_logs(llama, long)[2:], abs=1e-5)
    with pytest.raises(DataError, match="batch_size is 0"):
        score_requests(llama, requests, batch_size=0)


# --- exact match --------------------------------------------------------------------------------------------


def test_exact_match_counts_after_normalising() -> None:
    rows = [
        {"prompt": str(n), "completion": answer} for n, answer in enumerate(["Paris", "Rome", "Oslo", "Bern"])
    ]
    said = iter(["  paris\n", "Rome.", "", "BERN"])
    seen: list[tuple[int, int]] = []
    score = exact_match(
        lambda prompt: next(said), rows, progress=lambda done, total: seen.append((done, total))
    )
    assert (score.value, score.count) == (0.5, 4)
    assert (score.low, score.high) == wilson_interval(2, 4)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    strict = exact_match(lambda prompt: "paris", rows[:1], normalise=lambda text: text)
    assert strict.value == 0.0


def test_exact_match_extracts_from_both_sides() -> None:
    rows = [{"prompt": "a", "completion": "so #### 1,200"}, {"prompt": "b", "completion": "it is 3"}]
    answers = {"a": "that makes $1200.00 in all.", "b": "no idea"}
    assert exact_match(answers.__getitem__, rows, extract=last_number).value == 0.5
    with pytest.raises(DataError, match=r"row 0 .*no answer"):
        exact_match(answers.__getitem__, [{"prompt": "a", "completion": "none"}], extract=last_number)
    with pytest.raises(DataError, match="found prompt"):
        exact_match(answers.__getitem__, [{"prompt": "a"}])
    with pytest.raises(DataError, match="no rows"):
        exact_match(answers.__getitem__, [])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,200.50 in all", "1200.5"),
        ("1 then -7.", "-7"),
        ("5.0", "5"),
        ("100", "100"),
        ("none", None),
        ("a,b 3, ok", "3"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluation(data: dict[str, Sequence[Any]] | None = None) -> Evaluation:
    return Evaluation(stack=SimpleNamespace(model=None, tokenizer=None, generate=None), data=data)


def test_scores_are_kept_in_order_and_names_are_unique() -> None:
    run = evaluation()
    run.add("loss", 1.25, 1.0, 1.5, count=12345, unit="nats")
    run.add_score(Score(name="share", value=0.5))
    assert list(run.scores) == ["loss", "share"]
    assert run.table() == [("loss", "1.25", "1 to 1.5", "nats", "12,345"), ("share", "0.5", "", "", "")]
    with pytest.raises(DataError, match=r"'loss' is there already, with value 1\.25"):
        run.add("loss", 1.25)
    assert len(run.scores) == 2


def test_scores_go_through_strict_json() -> None:
    run = evaluation()
    run.add("perplexity", math.inf, count=3)
    run.add("nll", np.float32(2.5), torch.tensor(2.0), math.inf, count=np.int64(7))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(run.to_json(), parse_constant=refuse)
    assert read == run.to_dict()
    assert float(read["perplexity"]["value"]) == math.inf
    assert read["nll"] == {"value": 2.5, "low": 2.0, "high": "inf", "count": 7, "unit": ""}


def test_data_is_found_by_name() -> None:
    run = evaluation({"held_out": ["a", "b"]})
    assert run.rows("held_out") == ["a", "b"]
    with pytest.raises(DataError, match="did you mean 'held_out'"):
        run.rows("heldout")
    with pytest.raises(DataError, match="there is: none"):
        evaluation().rows("x")


def test_soft_tokens_take_room_in_the_window() -> None:
    from peftx import Stack
    from peftx.testing import tiny, tiny_tokenizer
    from peftx.testing.reference import ReferencePrompt

    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    before = context_window(model, tokenizer)
    stack = Stack(model, [ReferencePrompt()], tokenizer=tokenizer)
    (part,) = stack.ledger.of("reference-prompt")
    assert context_window(model, tokenizer) == before - part.module.length
