"""Plugins that classify by a head of their own: rows, training, prediction, accuracy; and rows that do not fit."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, TrainStep, hookimpl
from peftx.composition.conflicts import find_conflicts
from peftx.engines.data import (
    CLASS_INDEX,
    IGNORE,
    Collator,
    check_labels,
    class_ids,
    class_index,
    tag_rows,
    take_classes,
    tokenize_classes,
    tokenize_tags,
)
from peftx.engines.models import load_model
from peftx.engines.training.run import as_training_data
from peftx.engines.training.shares import counts
from peftx.errors import DataError, PeftxError, PluginError
from peftx.kernel.members import Member
from peftx.testing.models import BOS, EOS, tiny, tiny_tokenizer

LABELS = ["bad", "good"]
ROWS = [{"text": f"number {i} is {word}", "label": word} for i in range(4) for word in LABELS]


class HeadConfig(PluginConfig):
    labels: list[str] = Field(LABELS, description="the classes")


class Head(Plugin):
    """A linear map of the mean of the last hidden states."""

    Config = HeadConfig
    claims = {Claim.CLASSIFIES, Claim.BESIDE_WEIGHTS}
    takes = ("classification",)

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        tokenize_classes(data, self.config.labels)

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.linear = model.keep("head", nn.Linear(model.hidden_size, len(self.config.labels)))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        target = step.batch[CLASS_INDEX]
        step.batch = {name: x for name, x in step.batch.items() if name not in (CLASS_INDEX, "labels")}

        def loss() -> tuple[Tensor, object]:
            outputs = step.forward(output_hidden_states=True)
            return F.cross_entropy(self.scores(outputs, step.batch["attention_mask"]), target), outputs

        step.replace_task_loss(loss)
        return (yield)

    def scores(self, outputs: object, mask: Tensor) -> Tensor:
        hidden = outputs.hidden_states[-1] * mask[..., None]  # type: ignore[attr-defined]
        return self.linear(hidden.sum(1) / mask.sum(1, keepdim=True))

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        rows = []
        for text in texts:
            ids = torch.tensor([class_ids(stack.tokenizer, text, max_length=64)])
            mask = torch.ones_like(ids)
            out = stack.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            rows.append(self.scores(out, mask))
        return self.config.labels, torch.cat(rows)


def stack_of(*plugins: Plugin) -> Stack:
    return Stack(tiny("llama"), plugins or [Head()], tokenizer=tiny_tokenizer())


def test_rows_become_texts_with_the_number_of_their_class() -> None:
    stack = stack_of()
    data = stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=16))
    assert data.format == "tokenized"
    assert data.train[1][CLASS_INDEX] == 1
    assert set(data.train[1]["labels"]) == {IGNORE}
    assert data.train[1]["input_ids"] == class_ids(stack.tokenizer, ROWS[1]["text"], max_length=16)


def test_a_long_text_is_cut_at_its_left_after_bos() -> None:
    tokenizer = tiny_tokenizer()
    whole = class_ids(tokenizer, "a b c d e f g h", max_length=99)
    cut = class_ids(tokenizer, "a b c d e f g h", max_length=5)
    assert len(cut) == 5
    frame = [i for i in (tokenizer.bos_token_id,) if i == whole[0]]
    assert cut == frame + whole[len(whole) - 5 + len(frame) :]


def test_the_head_learns_and_names_classes() -> None:
    stack = stack_of()
    before = stack.evaluate(ROWS, metrics=["accuracy"])["accuracy"]
    stack.train(ROWS, steps=60, batch_size=8, learning_rate=3e-2, max_length=16)
    after = stack.evaluate(ROWS, metrics=["accuracy"])["accuracy"]
    assert before.value < 1
    assert after.value == 1
    assert stack.classify("number 2 is good") == "good"
    assert stack.classify(["number 2 is good", "number 0 is bad"]) == ["good", "bad"]
    assert not stack.model.training


def test_switched_off_there_is_no_head() -> None:
    stack = stack_of()
    with stack.disabled("head"), pytest.raises(PeftxError, match="no plugin of this stack classifies"):
        stack.classify("x")


@pytest.mark.parametrize(
    ("labels", "said"),
    [(["one"], "1 class"), (["a", "a"], "'a' stands twice"), (["a", " "], "is empty")],
)
def test_labels_that_are_no_classes(labels: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_labels(labels)
    assert check_labels(["a", "b"]) == ["a", "b"]


def test_a_strange_label_names_its_row_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"row 3 .*'goood' is not among bad, good") as caught:
        class_index("goood", LABELS, "row 3 (counting from 0)")
    assert "good" in str(caught.value.hint)
    stack = stack_of()
    with pytest.raises(DataError, match="row 0"):
        stack.train([{"text": "x", "label": "awful"}], steps=1)
    with pytest.raises(DataError, match="row 1"):
        stack.evaluate([ROWS[0], {"text": "x", "label": "awful"}], metrics=["accuracy"])


def test_rows_of_another_format_are_refused() -> None:
    with pytest.raises(DataError, match="head: prepare_data: the rows are of format 'text'"):
        stack_of().train([{"text": "only text"}], steps=1)
    with pytest.raises(DataError, match="has no tokens"):
        stack_of().train([{"text": "", "label": "bad"}], steps=1)


TAGS = ["O", "PER", "LOC"]
TAGGED = [{"text": "Ada lives  in Turin", "label": "PER O O LOC"}, {"text": "No", "label": "O"}]


def tagged(rows: list[dict[str, str]], max_length: int = 64, **options: bool) -> TrainingData:
    data = as_training_data(stack_of(), rows, seed=0, max_length=max_length)
    tokenize_tags(data, TAGS, **options)
    return data


def test_rows_become_words_with_the_number_of_each_tag_on_its_first_token() -> None:
    tokenizer, data = tiny_tokenizer(), tagged(TAGGED)
    assert data.format == "tokenized"
    row = data.train[0]
    assert row["input_ids"] == class_ids(tokenizer, "Ada lives in Turin", max_length=64)
    assert set(row["labels"]) == {IGNORE}
    found = {place: tag for place, tag in enumerate(row[CLASS_INDEX]) if tag != IGNORE}
    first = row["input_ids"].index(tokenizer("A", add_special_tokens=False)["input_ids"][0])
    assert found == {
        first: 1,
        first + 3: 0,
        first + 9: 0,
        first + 12: 2,
    }  # a space belongs to what follows it


def framed() -> PreTrainedTokenizerFast:
    """One that puts BOS and EOS around a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", BOS), ("<|eos|>", EOS)]
    )
    return tokenizer


@pytest.mark.parametrize("closed", [False, True])
def test_words_make_the_tokens_of_the_text(closed: bool) -> None:
    """Of the bundled tokenizer too, whose tokens are longer than a letter."""
    text = "Office to Grey Island. Who's on duty, at 07:30?"
    for tokenizer in (tiny_tokenizer(), framed(), load_model("peftx:tiny")[1]):
        ((ids, starts),) = tag_rows(tokenizer, [text], max_length=99, closed=closed, owner="x")
        assert ids == class_ids(tokenizer, text, max_length=99, closed=closed)
        ends = [*starts[1:], len(ids)]
        words = [
            tokenizer.decode(ids[a:b], skip_special_tokens=True).strip()
            for a, b in zip(starts, ends, strict=True)
        ]
        assert words == text.split()


def test_a_long_row_of_tags_is_cut_at_its_end_and_a_text_to_tag_is_refused() -> None:
    whole, cut = (tagged(TAGGED, max_length=n).train[0] for n in (64, 8))
    assert cut["input_ids"] == whole["input_ids"][:8]
    assert cut[CLASS_INDEX] == whole[CLASS_INDEX][:8]
    with pytest.raises(DataError, match=r"x: text 1 \(counting from 0\) has \d+ tokens, and 8 fit"):
        tag_rows(tiny_tokenizer(), ["a", TAGGED[0]["text"]], max_length=8, owner="x")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a b", "label": "O"}, "row 1 .* 2 words and 1 tags"),
        ({"text": "a b", "label": "O LOK"}, "row 1 .*'LOK' is not among O, PER, LOC"),
        ({"text": " ", "label": ""}, "row 1 .* no words"),
    ],
)
def test_rows_without_a_tag_for_each_word_are_named(row: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        tagged([TAGGED[0], row])


def test_tags_are_padded_and_counted_as_labels() -> None:
    """All of them: that of a first token too, which a next token's label would not be."""
    rows = [{k: row[k][1:] for k in row} if row["input_ids"][0] == 0 else row for row in tagged(TAGGED).train]
    batch = Collator(2)(rows)
    assert batch[CLASS_INDEX].shape == batch["input_ids"].shape
    assert batch[CLASS_INDEX][0, 0] == 1
    assert counts(tiny("llama"), batch)["labels"] == 5
    assert (
        counts(tiny("llama"), {CLASS_INDEX: torch.ones(3), "labels": torch.full((3, 4), IGNORE)})["labels"]
        == 3
    )
    rest, target = take_classes(batch)
    assert sorted(rest) == ["attention_mask", "input_ids"]
    assert torch.equal(target, batch[CLASS_INDEX])


def test_a_batch_without_classes_says_what_it_has() -> None:
    with pytest.raises(DataError, match="the batch has no class_index, but attention_mask, input_ids"):
        take_classes({"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)})


class Asks(Plugin):
    """Trains on preferences."""

    takes = ("preference",)

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None: ...


class Rewrites(Plugin):
    """Makes preferences of messages."""

    takes = ("messages",)
    gives = {"messages": "preference"}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None: ...


def members(*plugins: Plugin) -> list[Member]:
    return [Member(type(plugin).__name__.lower(), plugin) for plugin in plugins]


def test_rows_that_do_not_fit_are_a_conflict() -> None:
    (conflict,) = find_conflicts(members(Head(), Asks()))
    assert "trains on rows of format classification, and 'asks' trains on preference" in conflict.reason
    assert conflict.working_order == ()
    assert find_conflicts(members(Rewrites(), Asks())) == []
    (conflict,) = find_conflicts(members(Asks(), Rewrites()))
    assert conflict.working_order == ("rewrites", "asks")


class Fails(Plugin):
    """Breaks in the hooks that run nested."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        raise ZeroDivisionError("nothing")
        yield

    @hookimpl(wrapper=True)
    def decode(self, request: object) -> Generator[None, Tensor, Tensor]:
        raise PeftxError("no way", hint="turn back")
        yield


class Listens(Plugin):
    """Works on adapters."""

    claims = {Claim.NEEDS_ADAPTERS}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        return (yield)


def test_a_wrapper_is_not_blamed_for_what_it_wraps() -> None:
    """Neither for the model's own step, nor for another plugin's."""
    from peftx_lora import Lora

    stack = Stack(tiny("llama"), [Lora(rank=1), Listens()], tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        stack.train_step({"nonsense": 1})
    stack = Stack(tiny("llama"), [Lora(rank=1), Listens(), Fails()], tokenizer=tiny_tokenizer())
    with pytest.raises(PluginError, match="plugin 'fails' failed in train_step"):
        stack.train_step({"input_ids": torch.ones(1, 2, dtype=torch.long)})


def test_a_nested_hook_that_fails_names_its_plugin_and_place() -> None:
    stack = Stack(tiny("llama"), [Head(), Member("fails", Fails(), "a.yaml:3:5")], tokenizer=tiny_tokenizer())
    with pytest.raises(PluginError, match=r"plugin 'fails' at a.yaml:3:5 failed in train_step: ZeroDivision"):
        stack.train(ROWS, steps=1)
    with pytest.raises(PeftxError, match=r"fails: decode \(a.yaml:3:5\): no way") as caught:
        stack.generate("x", max_new_tokens=1)
    assert caught.value.hint == "turn back"


def test_what_works_on_adapters_needs_one() -> None:
    from peftx_lora import Lora

    (conflict,) = find_conflicts(members(Head(), Listens()))
    assert (conflict.first, conflict.second) == ("listens", "head")
    assert conflict.claims == (Claim.NEEDS_ADAPTERS, Claim.BESIDE_WEIGHTS)
    assert "put an adapter such as lora in the place of 'head'" in str(conflict)
    assert find_conflicts(members(Head(), Lora(), Listens())) == []
    assert find_conflicts(members(Listens())) == []  # whoever trains it says that nothing trains


class Prunes(Plugin):
    """Works on what stands before it, and reads the loss."""

    claims = {Claim.WORKS_ON_PREVIOUS, Claim.BESIDE_WEIGHTS, Claim.IDENTITY_AT_START, Claim.READS_LOSS}

    @hookimpl
    def inject(self, model: ModelView) -> None: ...


class Names(Prunes):
    """Brings a head of classes."""

    claims = {Claim.CLASSIFIES, Claim.BESIDE_WEIGHTS}


def test_what_works_on_what_stands_before_it_stands_behind_something() -> None:
    from peftx_lora import Lora

    (conflict,) = find_conflicts(members(Prunes(), Lora()))
    assert conflict.claims == (Claim.WORKS_ON_PREVIOUS,)
    assert "put an adapter such as lora before 'prunes'" in str(conflict)
    for fine in ((Prunes(),), (Lora(), Prunes())):
        assert find_conflicts(members(*fine)) == []
    by_loss, by_place = find_conflicts(
        members(Prunes(), Names())
    )  # in the other order nothing stands before it either
    assert (by_loss.claims, by_loss.working_order) == ((Claim.READS_LOSS, Claim.CLASSIFIES), ())
    assert (by_place.claims, by_place.working_order) == ((Claim.WORKS_ON_PREVIOUS,), ())
    (conflict,) = find_conflicts(members(Lora(), Prunes(), Names()))
    assert conflict.working_order == ("lora", "names", "prunes")


def test_columns_do_not_go_with_rows_made_anew() -> None:
    class Makes(Plugin):
        claims = {Claim.NEW_ROWS}

    class Reads(Plugin):
        claims = {Claim.READS_COLUMNS}

    for pair in ((Makes(), Reads()), (Reads(), Makes())):
        (conflict,) = find_conflicts(members(*pair))
        assert conflict.claims == (Claim.NEW_ROWS, Claim.READS_COLUMNS)
        assert conflict.working_order == ()
        assert str(conflict).endswith("keep one of them")
