"""PTEC: a soft prompt and a head of several labels a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForSequenceClassification

import peftx
from peftx import Stack, TrainStep
from peftx.engines.data import Collator
from peftx.engines.training.run import as_training_data
from peftx.errors import BatchError, ConflictError, DataError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_mezo import Mezo
from peftx_ptec import LABELS, Ptec, filled, label_tokens, macro_f1, multi_hot, weights_of

test_conformance = conformance("ptec")

NAMES = ["industry", "software", "food"]
ROWS = [
    {"text": "cars and steel", "label": "industry"},
    {"text": "an app", "label": "software"},
    {"text": "apps for cars", "label": "software; industry"},
    {"text": "bread, and machines that bake", "label": "food;industry"},
    {"text": "nothing", "label": " "},
]
Y = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]])


def stack_of(arch: str = "llama", *, model: Any = None, **options: Any) -> Stack:
    options = {"labels": NAMES, "length": 5, **options}
    return Stack(model or tiny(arch), [Ptec(**options)], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> Ptec:
    return stack.plugins["ptec"]  # type: ignore[return-value]


def parts(stack: Stack) -> tuple[Tensor, Tensor]:
    """P and W."""
    P, W = stack.ledger.parameters("ptec")
    return P, W


def batch_of(stack: Stack, rows: list[dict[str, str]] = ROWS, side: Any = "right") -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=64))
    return Collator(PAD, padding_side=side)(list(data.train))


def step_on(stack: Stack, batch: dict[str, Tensor]) -> float:
    """The loss; gradients are left behind."""
    stack.model.zero_grad()
    return float(stack.run_train_step(TrainStep(stack, dict(batch))))


def scores(stack: Stack, batch: dict[str, Tensor]) -> Tensor:
    """z of a batch as it is padded, [B, C]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return plugin_of(stack).head.read(lambda: stack.model(**inputs), batch["attention_mask"])[0]


# ------------------------------------------------------------------------------------------------------- the method
def test_a_text_is_read_behind_the_prompt_at_its_last_token() -> None:
    """z = W h of [P ; E(x)], written out."""
    stack, model = stack_of(), tiny("llama")
    P, W = parts(stack)
    names, z = plugin_of(stack).classify(stack, [row["text"] for row in ROWS])
    for row, found in zip(ROWS, z, strict=True):
        ids = torch.tensor(plugin_of(stack).texts.rows(stack, [row["text"]]))
        embedded = torch.cat((P[None], model.get_input_embeddings()(ids)), 1)
        h = model(inputs_embeds=embedded, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(found, W @ h, rtol=1e-4, atol=1e-5)
    assert names == NAMES


@pytest.mark.parametrize("side", ["left", "right"])
def test_is_what_transformers_computes_of_a_multi_label_class_head(side: str) -> None:
    """Logits, loss and gradients: LlamaForSequenceClassification on [P ; E(x)] with left pads, as the release has it; w
    is 1 there."""
    stack = stack_of(weights="none")
    P, W = parts(stack)
    config = tiny("llama").config
    config.update({"num_labels": 3, "problem_type": "multi_label_classification"})
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.model.load_state_dict(tiny("llama").model.state_dict())
    theirs.score.weight.data = W.detach().clone()
    prompt = torch.nn.Parameter(P.detach().clone())
    left = batch_of(stack, side="left")
    embedded = theirs.get_input_embeddings()(left["input_ids"])
    # Their pads stand in front of the prompt: each row is put together by itself.
    pads = (left["attention_mask"] == 0).sum(1)
    rows = [torch.cat((row[:n], prompt, row[n:])) for row, n in zip(embedded, pads, strict=True)]
    mask = F.pad(left["attention_mask"], (0, 5), value=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    seen = theirs(
        inputs_embeds=torch.stack(rows), attention_mask=mask, position_ids=places, labels=left[LABELS]
    )
    seen.loss.backward()
    batch = batch_of(stack, side=side)
    torch.testing.assert_close(scores(stack, batch), seen.logits.detach(), rtol=1e-4, atol=1e-5)
    assert step_on(stack, batch) == pytest.approx(seen.loss.item(), abs=1e-5)
    torch.testing.assert_close(P.grad, prompt.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(W.grad, theirs.score.weight.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_by_hand() -> None:
    stack = stack_of()
    batch = batch_of(stack)
    p = scores(stack, batch).sigmoid()
    w = torch.tensor([2 / 3, 3 / 2, 4.0])  # of 5 rows 3, 2 and 1 have the label
    torch.testing.assert_close(plugin_of(stack).w, w)
    expected = -(w * Y * p.log() + (1 - Y) * (1 - p).log()).mean()
    assert step_on(stack, batch) == pytest.approx(float(expected), abs=1e-5)


def test_the_order_of_labels_does_not_matter() -> None:
    """Rows of W and columns of y permuted alike: the same loss. So are the names in a row."""
    order = [2, 0, 1]
    one, two = stack_of(), stack_of(labels=[NAMES[i] for i in order])
    with torch.no_grad():
        parts(two)[0].copy_(parts(one)[0])
        parts(two)[1].copy_(parts(one)[1][order])
    assert step_on(two, batch_of(two)) == pytest.approx(step_on(one, batch_of(one)), abs=1e-6)
    assert (
        multi_hot("software; industry", NAMES, "") == multi_hot("industry;software", NAMES, "") == [1, 1, 0]
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])
def test_left_pads_right_pads_and_none_give_the_same_scores(arch: str) -> None:
    stack = stack_of(arch)
    alone = torch.cat([scores(stack, batch_of(stack, [row])) for row in ROWS])
    for side in ("left", "right"):
        torch.testing.assert_close(scores(stack, batch_of(stack, side=side)), alone, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_read_at_its_first_token() -> None:
    stack = stack_of("bert")
    text = ROWS[2]["text"]
    ids = torch.tensor(plugin_of(stack).texts.rows(stack, [text]))
    with torch.no_grad():
        h = stack.model(ids, output_hidden_states=True).hidden_states[-1][0, 0]
    _, (z,) = plugin_of(stack).classify(stack, [text])
    torch.testing.assert_close(z, parts(stack)[1] @ h, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_the_cache_is_the_prompt() -> None:
    stack = stack_of()
    ids = batch_of(stack, ROWS[:1])["input_ids"]
    with torch.no_grad():
        cache = stack.model(ids[:, :4], use_cache=True).past_key_values
        rest = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        one = torch.ones_like(ids[:, 4:])
        z, _ = plugin_of(stack).head.read(lambda: stack.model(ids[:, 4:], past_key_values=cache), one)
    torch.testing.assert_close(z, scores(stack, rest), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- training
def test_what_trains_is_the_prompt_and_the_head() -> None:
    stack = stack_of()
    assert [tuple(p.shape) for p in parts(stack)] == [(5, 32), (3, 32)]
    assert stack.trainable_parameters() == 5 * 32 + 3 * 32


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_head_has_a_rate_of_its_own(kind: Any) -> None:
    """Three steps with a weight decay are those of an optimizer of two groups."""
    one, two = stack_of(head_rate=0.01), stack_of(head_rate=1.0)
    options = {"lr": 0.05, "weight_decay": 0.1}
    P, W = parts(two)
    with torch.no_grad():
        for mine, other in zip(parts(one), parts(two), strict=True):
            other.copy_(mine)
    single = kind(parts(one), **options)
    grouped = kind([{"params": [P]}, {"params": [W], "lr": 0.05 * 0.01}], **options)
    for _ in range(3):
        for stack, optimizer in ((one, single), (two, grouped)):
            step_on(stack, batch_of(stack))
            optimizer.step()
    for mine, other in zip(parts(one), parts(two), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_learns_several_labels_a_text_and_none(tmp_path: Path) -> None:
    plugin = Ptec(labels=NAMES, length=8, head_rate=1.0)
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=60, batch_size=5, learning_rate=3e-2)
    texts = [row["text"] for row in ROWS]
    assert plugin.assign(stack, texts) == [[n for n, y in zip(NAMES, row, strict=True) if y] for row in Y]
    assert stack.evaluate(ROWS, metrics=["ptec"])["macro-f1"].value == 1
    p = plugin.confidences(stack, texts)
    torch.testing.assert_close(p, plugin.classify(stack, texts)[1].sigmoid())
    assert plugin.assign(stack, texts, above=1.0) == [[]] * 5
    loaded = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"))
    torch.testing.assert_close(plugin_of(loaded).confidences(loaded, texts), p)


def test_rows_to_watch_do_not_weigh() -> None:
    stack = stack_of()
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    data.eval = data.train.select([1])
    data = stack.prepare(data)
    assert data.eval[LABELS][:] == [[0, 1, 0]]
    torch.testing.assert_close(plugin_of(stack).w, torch.tensor([2 / 3, 3 / 2, 4.0]))
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    data.train, data.eval = None, data.train
    stack.prepare(data)  # of a run that does not train
    torch.testing.assert_close(plugin_of(stack).w, torch.tensor([2 / 3, 3 / 2, 4.0]))


def test_weights() -> None:
    y = torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]])
    assert weights_of(y, "negatives").tolist() == [1, 3, 1, 1]
    assert weights_of(y, "largest").tolist() == [2, 4, 1, 1]
    assert weights_of(y, "none").tolist() == [1, 1, 1, 1]


def test_macro_f1_by_hand() -> None:
    """2 TP / (given + true): 2/3, 0 and, of a label of neither, 0."""
    given = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    y = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    assert macro_f1(given, y) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert macro_f1(y[:, :2], y[:, :2]) == 1


# ------------------------------------------------------------------------------------------------- where it begins
def test_the_prompt_starts_as_the_labels() -> None:
    """All tokens of the names, one behind the other, and again from the first."""
    ids = tiny_tokenizer()("industrysoftwarefood", add_special_tokens=False)["input_ids"]
    table = tiny("llama").get_input_embeddings().weight.detach()
    assert len(ids) == 20
    P = parts(stack_of(length=23))[0]
    assert torch.equal(P, table[ids + ids[:3]])


def test_of_too_many_tokens_some_are_taken_in_order() -> None:
    found = [filled(range(100), 10) for _ in range(2)]
    assert all(len(set(ids)) == 10 and ids == sorted(ids) for ids in found)
    assert found[0] != found[1]


def test_the_prompt_may_start_as_any_tokens() -> None:
    table = tiny("llama").get_input_embeddings().weight.detach()
    P = parts(stack_of(init="vocabulary", length=9))[0]
    assert ((P[:, None] == table).all(-1).sum(1) == 1).all()
    ids = tiny_tokenizer()("industry", add_special_tokens=False)["input_ids"]
    assert not torch.equal(P[:8], table[ids])


def test_the_head_starts_small() -> None:
    W = parts(stack_of(labels=[str(i) for i in range(100)]))[1]
    assert float(W.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_what_trains_is_float32_over_a_half_precision_model() -> None:
    stack = stack_of(model=tiny("llama").to(torch.bfloat16))
    assert {p.dtype for p in parts(stack)} == {torch.float32}


# ---------------------------------------------------------------------------------------------------- what is refused
class Deaf:
    """A tokenizer that knows no capitals, and drops what is not ASCII."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text.lower() if letter.isascii()]}


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["cars", "éé"], "label 'éé' has no tokens"),
        (["cars", "food", "Cars"], "label 'Cars' has the tokens of 'cars'"),
    ],
)
def test_labels_that_a_tokenizer_cannot_tell(labels: list[str], match: str) -> None:
    class Owner:
        tokenizer = Deaf()

    with pytest.raises(DataError, match=f"ptec: {match}"):
        label_tokens(Owner(), labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "match"),
    [(["a"], "at least 2 items"), (["a", "a"], "stands twice"), (["a", ""], "is empty")],
)
def test_labels_that_are_none(labels: list[str], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        stack_of(labels=labels)


@pytest.mark.parametrize("label", ["a;b", " a"])
def test_labels_that_cannot_stand_in_a_row(label: str) -> None:
    with pytest.raises(PeftxError, match=r"Ptec: labels: .*blanks at an end"):
        Ptec(labels=["x", label])


def test_a_prompt_longer_than_the_context_is_refused_and_nothing_touched() -> None:
    model = tiny("llama")
    with pytest.raises(PeftxError, match=r"ptec: 128 soft tokens leave no room in the 128 positions"):
        stack_of(model=model, length=128)
    assert not [name for name, p in model.named_parameters() if "peftx" in name]
    assert type(model.model).__name__ == "LlamaModel"
    assert "peftx" not in "".join(vars(model.model))


def test_rows_of_other_labels_and_of_no_labels() -> None:
    stack = stack_of()
    with pytest.raises(DataError, match=r"row 1 \(counting from 0\): label 'fod' is not among") as error:
        batch_of(stack, [ROWS[0], {"text": "bread", "label": "industry; fod"}])
    assert "food" in str(error.value.hint)
    with pytest.raises(UnsupportedError, match="ptec: the rows are of format 'prompt-completion'"):
        batch_of(stack, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(BatchError, match=f"ptec: the batch has no {LABELS}, but input_ids"):
        step_on(stack, {"input_ids": torch.ones(1, 2, dtype=torch.long)})


def test_texts_are_cut_to_what_the_prompt_leaves() -> None:
    stack = stack_of(length=100)
    data = as_training_data(stack, [{"text": "x" * 200, "label": "food"}], seed=0, max_length=128)
    assert [len(ids) for ids in stack.prepare(data).train["input_ids"]] == [28]
    data = as_training_data(stack, [{"text": "x" * 200, "label": "food"}], seed=0, max_length=9)
    assert [len(ids) for ids in stack.prepare(data).train["input_ids"]] == [9]


def test_a_step_without_gradients_is_refused() -> None:
    """MeZO moves what trains by itself, at one rate."""
    with pytest.raises(ConflictError, match="needs gradients"):
        Stack(tiny("llama"), [Ptec(length=4), Mezo()], tokenizer=tiny_tokenizer())
