"""Heads over the last hidden states, and texts as vectors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftx
from peftx import Claim, ModelView, Plugin, Stack, TrainingData, TrainStep, VirtualTokens, hookimpl
from peftx.engines.data import ClassTexts, class_rows, take_classes, tokenize_classes
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError
from peftx.kernel.heads import Head, Pool, each_of, first_of, last_of, mean_of
from peftx.pipeline import load_run
from peftx.testing.models import BOS, EOS, example_inputs, tiny, tiny_tokenizer
from peftx.testing.subject import ROWS_BY_FORMAT
from peftx.toolkits.evaluation import head_answers

TEXTS = ["good", "a rather bad thing", "fine", "oh no, not again and again"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pools_see_real_tokens_alone(side: str) -> None:
    hidden = torch.randn(3, 6, 4)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    spans = [(0, 2), (0, 6), (0, 4)] if side == "right" else [(4, 6), (0, 6), (2, 6)]
    for row, (a, b) in enumerate(spans):
        mask[row, a:b] = 1
    for row, (a, b) in enumerate(spans):
        own = hidden[row, a:b]
        torch.testing.assert_close(mean_of(hidden, mask)[row], own.mean(0))
        assert torch.equal(last_of(hidden, mask)[row], own[-1])
        assert torch.equal(first_of(hidden, mask)[row], own[0])
    assert each_of(hidden, mask) is hidden


class Rows(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(3)
        self.E = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))

    def rows(self) -> Tensor:
        return self.E


class Sentiment(Plugin):
    """A prompt and a head."""

    claims = {Claim.CLASSIFIES, Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels = ("bad", "good")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.closed = "encoder" in model.towers
        model.prompt(Rows(model.hidden_size))
        self.head: Head = model.head("head", 2, dropout=0.1)

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        tokenize_classes(data, self.labels, closed=self.closed)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, target = take_classes(step.batch)

        def loss() -> tuple[Tensor, object]:
            scores, outputs = self.head.read(step.forward, step.batch["attention_mask"])
            return F.cross_entropy(scores, target), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def classify(self, stack: Stack, texts: list[str]) -> tuple[list[str], Tensor]:
        rows = class_rows(stack.tokenizer, texts, max_length=32, closed=self.closed, owner="sentiment")
        return list(self.labels), torch.cat([*head_answers(stack, self.head, rows, size=3)])


@pytest.mark.parametrize("arch", ["llama", "bert", "mamba"])
def test_a_head_trains_is_saved_and_answers_alike_in_any_batch(arch: str, tmp_path: Path) -> None:
    stack = Stack(tiny(arch), [Sentiment()], tokenizer=tiny_tokenizer())
    rows = [{"text": text, "label": "good" if index % 2 == 0 else "bad"} for index, text in enumerate(TEXTS)]
    before = stack.plugins["sentiment"].head.linear.weight.clone()  # type: ignore[attr-defined]
    stack.train(rows, steps=3, batch_size=4, learning_rate=0.01)
    assert not torch.equal(stack.plugins["sentiment"].head.linear.weight, before)  # type: ignore[attr-defined]
    with torch.no_grad():
        _, together = stack.plugins["sentiment"].classify(stack, TEXTS)
        alone = torch.cat([stack.plugins["sentiment"].classify(stack, [text])[1] for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny(arch), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        assert torch.equal(again.plugins["sentiment"].classify(again, TEXTS)[1], together)


def test_a_head_keeps_full_precision_and_starts_from_texts() -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [Sentiment()], tokenizer=tiny_tokenizer())
    head = stack.plugins["sentiment"].head  # type: ignore[attr-defined]
    assert head.linear.weight.dtype == torch.float32
    rows = torch.randn(2, head.linear.in_features)
    head.start_from(rows)
    assert torch.equal(head.linear.weight, rows)
    assert not head.linear.bias.any()


class BehindBos(Rows):
    after_bos = True


@pytest.mark.parametrize("pool", [mean_of, first_of, last_of])
@pytest.mark.parametrize(("arch", "kind"), [("llama", Rows), ("bert", Rows), ("llama", BehindBos)])
def test_a_head_reads_the_tokens_of_the_caller_beside_soft_ones(
    arch: str, kind: type[Rows], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever these stand: in front, behind an encoder's first token, or behind the first token of a text."""
    monkeypatch.setitem(globals(), "Rows", kind)
    stack = Stack(tiny(arch), [Sentiment()], tokenizer=tiny_tokenizer())
    head: Head = stack.plugins["sentiment"].head  # type: ignore[attr-defined]
    head.pool = pool
    inputs = example_inputs(stack.model.eval(), padding="right")
    with torch.no_grad():
        found, outputs = head.read(
            lambda: stack.model(**inputs, output_hidden_states=True), inputs["attention_mask"]
        )
        expected = head(outputs.hidden_states[-1], inputs["attention_mask"])
    torch.testing.assert_close(found, expected)


def test_a_head_may_have_no_bias() -> None:
    class Plain(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            self.head = model.head("head", 3, bias=False)

    plugin = Plain()
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer())
    assert stack.trainable_parameters() == 3 * stack.anatomy.hidden_size
    rows = torch.randn(3, stack.anatomy.hidden_size)
    plugin.head.start_from(rows)
    assert torch.equal(plugin.head.linear.weight, rows)


def test_a_head_reads_one_tower() -> None:
    with pytest.raises(
        ArchitectureError, match="sentiment: t5 has encoder and decoder, and the head reads one"
    ):
        Stack(tiny("t5"), [Sentiment()], tokenizer=tiny_tokenizer())


def test_a_text_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match=r"sentiment: text 1 \(counting from 0\), '', has no tokens"):
        class_rows(tiny_tokenizer(), ["a", ""], max_length=8, owner="sentiment")
    with pytest.raises(DataError, match="sentiment: there is no text"):
        class_rows(tiny_tokenizer(), [], max_length=8, owner="sentiment")


@pytest.mark.parametrize("beside", ["", "\n- use: lora"])
@pytest.mark.parametrize("plugin", ["sk-tuning", "l-tuning", "predgen"])
def test_a_run_that_measures_the_base_first(plugin: str, beside: str, tmp_path: Path) -> None:
    """What `peftx apply --plugin` spells out: the base has no head, and is measured by likelihood."""
    rows = ROWS_BY_FORMAT["classification"]
    lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    run = load_run(f"""
peftx: 1
model: peftx:tiny
data: {{train: {tmp_path}/rows.csv, eval: {tmp_path}/rows.csv}}
stack:
- use: {plugin}{beside}
train: {{steps: 2, batch_size: 2}}
evaluate: [accuracy]
run:
- evaluate: {{name: base}}
- inject: all
- prepare: all
- train
- evaluate: {{name: adapted}}
""")
    result = run.run()
    base = Stack("peftx:tiny").evaluate(rows, metrics=["accuracy"])["accuracy"]
    assert result.scores["base"]["accuracy"].value == base.value
    assert result.scores["adapted"]["accuracy"].count == len(rows)


# ------------------------------------------------------------------------------------- classes, and the texts to name
MISSING = ClassTexts("x", missing="there is no head yet")
EARLY: list[Callable[[Stack], object]] = [
    lambda stack: MISSING.labels,
    lambda stack: MISSING.room(stack),
    lambda stack: MISSING.rows(stack, TEXTS),
    lambda stack: MISSING.words(stack, TEXTS),
    lambda stack: MISSING.batches(stack, TEXTS),
]


@pytest.mark.parametrize("ask", EARLY)
def test_who_asks_before_inject_is_told_what_is_missing(ask: Callable[[Stack], object]) -> None:
    stack = Stack(tiny("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match="x: there is no head yet") as caught:
        ask(stack)
    assert caught.value.hint == "inject it before prepare and evaluate"


def test_before_inject_no_rows_are_touched() -> None:
    stack = Stack(tiny("llama"), tokenizer=tiny_tokenizer())
    data = as_training_data(stack, [{"text": "a", "label": "good"}], seed=0, max_length=999)
    with pytest.raises(PeftxError, match="x: there is no head yet"):
        MISSING.prepare(data, stack)
    assert (data.max_length, data.format) == (999, "classification")


@pytest.mark.parametrize("arch", ["llama", "roberta", "mamba"])
@pytest.mark.parametrize("closed", [False, True])
def test_texts_fill_what_the_model_reads_in_training_and_afterwards(arch: str, closed: bool) -> None:
    """128 positions, of which RoBERTa keeps 3, or the tokenizer's limit; less 3 soft tokens, and 5 of an answer."""
    tokenizer = tiny_tokenizer(ends=True)
    tokenizer.model_max_length = 40
    stack = Stack(tiny(arch), [Sentiment()], tokenizer=tokenizer)
    free = {"llama": 128 - 3, "roberta": 128 - 3 - 3, "mamba": 40}[arch]
    for beside in (0, 5):
        texts = MISSING.of(["bad", "good"], closed=closed, beside=beside)
        assert texts.labels == ["bad", "good"]
        assert texts.room(stack) == free - beside
        long = {"text": "y" * 500, "label": "good"}
        data = as_training_data(stack, [long], seed=0, max_length=999)
        texts.prepare(data, stack)
        assert data.train is not None
        assert [row["input_ids"] for row in data.train] == texts.rows(stack, [long["text"]])
        assert [len(row["input_ids"]) for row in data.train] == [free - beside]
        assert data.train[0]["input_ids"][0] == BOS
        assert (data.train[0]["input_ids"][-1] == EOS) == closed
        shorter = as_training_data(stack, [long], seed=0, max_length=8)
        texts.prepare(shorter, stack)
        assert shorter.max_length == 8


def test_words_fill_what_the_model_reads_too() -> None:
    stack = Stack(tiny("llama"), [Sentiment()], tokenizer=tiny_tokenizer(ends=True))
    texts, free = MISSING.of(["bad", "good"], closed=True), 128 - 3
    fits, long = ("y " * (free // 2 - 1)).strip(), "y " * 99
    for text in (fits, long):
        rows = [{"text": text, "label": "good " * len(text.split())}]
        data = as_training_data(stack, rows, seed=0, max_length=999)
        texts.prepare(data, stack, words=True)
        assert data.train is not None
        assert data.train[0]["class_index"].count(1) > 1
        if text == fits:
            assert [(data.train[0]["input_ids"], [1, *range(2, 2 * len(text.split()), 2)])] == texts.words(
                stack, [text]
            )
    assert len(data.train[0]["input_ids"]) == free
    with pytest.raises(DataError, match=rf"x: text 0 .* and {free} fit"):
        texts.words(stack, [long])


def test_batches_keep_the_order_of_texts() -> None:
    stack = Stack(tiny("llama"), tokenizer=tiny_tokenizer())
    texts = MISSING.of(["bad", "good"])
    batches = list(texts.batches(stack, TEXTS, size=3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    found = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert found == texts.rows(stack, TEXTS)
    assert not batches[0]["attention_mask"][0, -1], "pads stand on the right"


@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "mamba"])
def test_vectors_do_not_depend_on_the_batch(arch: str) -> None:
    stack = Stack(tiny(arch), tokenizer=tiny_tokenizer())
    together = stack.embed(TEXTS, size=3)
    assert together.shape == (4, stack.anatomy.hidden_size)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    for text, vector in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(stack.embed(text), vector, rtol=1e-4, atol=1e-5)
    other = mean_of if arch in ("llama", "mamba") else last_of
    assert not torch.allclose(stack.embed(TEXTS, pool=other), together)


def test_a_decoder_is_read_at_its_last_token() -> None:
    stack = Stack(tiny("llama"), tokenizer=tiny_tokenizer())
    ids = torch.tensor(class_rows(stack.tokenizer, [TEXTS[1]], max_length=99, owner="x"))
    with torch.no_grad():
        state = stack.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(stack.embed(TEXTS[1]), F.normalize(state, dim=0))
    with pytest.raises(DataError, match="no text"):
        stack.embed([])


class Ends(Plugin):
    """Vectors that say how long a text is."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        pass

    def embed(self, stack: Stack, texts: Sequence[str], *, size: int = 32) -> Tensor:
        return F.one_hot(torch.tensor([len(text) for text in texts]), 32).float()


def test_a_plugin_that_has_vectors_of_its_own_gives_them() -> None:
    stack = Stack(tiny("llama"), [("ends", Ends())], tokenizer=tiny_tokenizer())
    plain = Stack(tiny("llama"), tokenizer=tiny_tokenizer())
    assert stack.embed(TEXTS).argmax(1).tolist() == [len(text) for text in TEXTS]
    assert int(stack.embed(TEXTS[0]).argmax()) == 4
    assert torch.equal(stack.embed(TEXTS, pool=last_of), plain.embed(TEXTS))  # a pool is of the states
    with stack.disabled("ends"):
        assert torch.equal(stack.embed(TEXTS), plain.embed(TEXTS))
    with pytest.raises(DataError, match="no text"):
        stack.embed([])
    two = Stack(tiny("llama"), [("ends", Ends()), ("more", Ends())], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="'ends' and 'more' both have vectors"):
        two.embed(TEXTS)
    assert torch.equal(two.embed(TEXTS, pool=last_of), plain.embed(TEXTS))
