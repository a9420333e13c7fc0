from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack, TrainStep
from peftx.engines.data import CLASS_INDEX, IGNORE, Collator, Place
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.subject import ROWS_BY_FORMAT
from peftx_lora import Lora
from peftx_predgen import Predgen, alignment, position_weights, write

test_conformance = conformance("predgen")
# Half of the batches are fed what the model writes: draws, generation and a resumed run.
test_conformance_when_sampling = conformance(
    "predgen", options={"p_min": 0.5, "p_max": 0.5}, models=["llama"], expected_failures=Predgen.exempt
)

ROWS = list(ROWS_BY_FORMAT["classification"])
NUMBERS = [{"text": "a ->", "label": "1.50"}, {"text": "b ->", "label": "2.25"}]
NUMBERS += [{"text": "c ->", "label": "0.75"}, {"text": "d ->", "label": "12"}]
WORDS = [{"text": row["text"], "label": "yes" if float(row["label"]) > 2 else "no"} for row in NUMBERS]
LABELS = ["ab", "cd"]
EOS = tiny_tokenizer().eos_token_id


def stack_of(*others: object, arch: str = "llama", **options: object) -> Stack:
    return Stack(tiny(arch), [*others, Predgen(**options)], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> Predgen:
    return stack.plugins["predgen"]


def batch_of(stack: Stack, rows: list[dict[str, str]] = ROWS, count: int = 3) -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=96))
    return Collator(EOS)(list(data.train)[:count])


def gradients(stack: Stack) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in stack.model.named_parameters() if p.grad is not None}


# -- the batch -------------------------------------------------------------------------------------------------------


def test_rows_are_the_text_and_g_tokens_of_the_answer() -> None:
    stack = stack_of(labels=["bad", "so good"])
    rows = [{"text": "x", "label": "so good"}, {"text": "yz", "label": "bad"}]
    data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=32))
    long, short = data.train[0], data.train[1]
    ids = stack.tokenizer("x so good")["input_ids"] + [EOS]
    assert long["input_ids"] == long["labels"] == ids  # the prompt is learned too
    ids = stack.tokenizer("yz bad")["input_ids"]
    assert short["input_ids"] == ids + [EOS] * 5
    assert short["labels"] == [*ids, EOS, *[IGNORE] * 4]  # its end, and no pads
    assert [long[CLASS_INDEX], short[CLASS_INDEX]] == [1, 0]
    assert plugin_of(stack).state["G"] == len(" so good") + 1


def test_numbers_are_written_digit_by_digit() -> None:
    stack = stack_of(labels=None)
    data = stack.prepare(as_training_data(stack, NUMBERS, seed=0, max_length=32))
    assert stack.tokenizer.decode(data.train[0]["input_ids"][-5:]) == "1.50<|eos|>"
    assert data.train[3]["labels"][-3:] == [EOS, IGNORE, IGNORE]
    assert plugin_of(stack).state == {"G": 5, "mean": 4.125}
    assert CLASS_INDEX not in data.train.column_names


@pytest.mark.parametrize("labels", [["no", "yes"], None])
def test_rows_may_be_prepared_before_anything_is_injected(labels: list[str] | None) -> None:
    rows, found = WORDS if labels else NUMBERS, []
    for inject in (True, False):
        stack = Stack(tiny("llama"), [Predgen(labels=labels)], tokenizer=tiny_tokenizer(), inject=inject)
        data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=32))
        found.append((data.train.to_list(), plugin_of(stack).state))
    assert found[0] == found[1]


@pytest.mark.parametrize("labels", [["no", "yes"], None])
def test_rows_to_watch_are_made_as_rows_to_train_on(labels: list[str] | None) -> None:
    stack, rows = stack_of(labels=labels), WORDS if labels else NUMBERS
    data = as_training_data(stack, rows, seed=0, max_length=32)
    data.eval = data.train.select(range(2))
    found = stack.prepare(data)
    assert found.eval.to_list() == found.train.to_list()[:2]
    assert found.format == "tokenized"


@pytest.mark.parametrize("labels", [["no", "yes"], None])
def test_rows_are_known_by_their_lines_with_their_answers_too(
    labels: list[str] | None, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in (WORDS if labels else NUMBERS)))
    stack = stack_of(labels=labels)
    data = stack.prepare(as_training_data(stack, file, seed=0, max_length=32))
    assert str(Place(data.train, 1)) == f"{file}:2"


def test_a_long_text_is_cut_and_its_answer_is_not() -> None:
    stack = stack_of()
    data = stack.prepare(as_training_data(stack, [ROWS[0]], seed=0, max_length=20))
    assert len(data.train[0]["input_ids"]) == 20
    assert stack.tokenizer.decode(data.train[0]["input_ids"]).endswith(". negative<|eos|>")


# -- losses ----------------------------------------------------------------------------------------------------------


def test_alignment_by_hand() -> None:
    for writer in (0.0, 0.3, 1.0, 7.5):
        for director in (0.0, 0.69, 2.0):
            a, b = math.log(1 + writer), math.log(1 + director)
            expected = a + b + (1 + max(writer, director)) ** 2 * math.exp(-abs(a - b))
            assert expected == pytest.approx(a + b + (1 + writer) * (1 + director))  # as the README says
            one, two = torch.tensor(writer), torch.tensor(director)
            assert float(alignment(one, two)) == pytest.approx(expected, rel=1e-6)
            assert float(alignment(two, one)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("G", [1, 2, 3, 8, 19])
def test_position_weights(G: int) -> None:
    w = position_weights(G)
    assert len(w) == G
    assert float(w.mean()) == pytest.approx(1.0)
    assert G < 3 or bool((w.diff() < 0).all())
    assert float(w[0] / w[-1]) == pytest.approx(1 if G == 1 else G / 2)


def test_the_schedule() -> None:
    plugin = Predgen(p_min=0.1, p_max=0.7, ramp=10)
    found = [plugin.probability(t) for t in range(1, 14)]
    assert found == pytest.approx([0.1 + 0.06 * t for t in range(1, 11)] + [0.7] * 3)


def by_hand(stack: Stack, batch: dict[str, Tensor], fed: Tensor) -> Tensor:
    """The loss of rows with these tokens, with nothing of the plugin but its adapter."""
    plugin, lengths = plugin_of(stack), batch["attention_mask"].sum(1).tolist()
    G = plugin.state["G"]
    logits = stack.model(input_ids=fed, attention_mask=batch["attention_mask"]).logits.float()
    writer = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1))
    if CLASS_INDEX in batch:
        W1, W2 = plugin.director.U.weight / logits.shape[-1] ** 0.5, plugin.director.W2.weight
        Z = torch.stack([logits[i, n - G : n] for i, n in enumerate(lengths)])
        o = (Z @ W1.t()).mean(1) @ W2.t()
        director = F.cross_entropy(o, batch[CLASS_INDEX])
    else:
        terms, w = [], position_weights(G)
        for i, n in enumerate(lengths):
            log_p = logits[i, n - G - 1 : n - 1].log_softmax(-1)
            y = batch["labels"][i, n - G : n].tolist()
            terms += [-float(w[g]) * log_p[g, y[g]] for g in range(G) if y[g] != IGNORE]
        director = torch.stack(terms).mean()
    return alignment(writer, director)


@pytest.mark.parametrize("labels", [["negative", "positive"], ["no", "yes"], None])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_step_is_the_formula(labels: list[str] | None, p: float) -> None:
    """p_t = 0 is teacher forcing; with p_t = 1 the same loss is taken behind the model's own tokens. Answers shorter
    than G ("no", "12") end in pads, which are in no sum and in no denominator."""
    stack = stack_of(Lora(), labels=labels, p_min=p, p_max=p)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.add_(0.05)
    rows = {None: NUMBERS, "no": WORDS, "negative": ROWS}[labels and labels[0]]
    batch = batch_of(stack, rows, count=4)
    short = (batch["labels"] == IGNORE) & batch["attention_mask"].bool()
    assert bool(short.any()) == (rows is not ROWS)
    fed, mask, G = batch["input_ids"], batch["attention_mask"], plugin_of(stack).state["G"]
    if p:
        fed = write(stack, fed, mask, G=G)
        assert not torch.equal(fed, batch["input_ids"])
    expected = by_hand(stack, batch, fed)
    expected.backward()
    by_autograd = gradients(stack)
    stack.model.zero_grad()
    loss = stack.train_step(batch)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(stack)
    assert found.keys() == by_autograd.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, by_autograd[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("labels", [["negative", "positive"], None])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_side_of_the_pads_does_not_matter(labels: list[str] | None, p: float) -> None:
    """In a loop of one's own: the same rows, padded on the left."""
    stack = stack_of(Lora(), labels=labels, p_min=p, p_max=p)
    right = batch_of(stack, ROWS if labels else [*NUMBERS, {"text": "longer ->", "label": "7"}], count=5)
    order = right["attention_mask"].argsort(dim=1, stable=True)
    assert not torch.equal(order, order.sort(1).values)
    left = {name: x.gather(1, order) if x.ndim == 2 else x for name, x in right.items()}
    losses = [float(stack.train_step(batch)) for batch in (right, left)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_in_half_precision_small_steps_count() -> None:
    """The director trains in float32, and reads logits of the model's dtype."""
    model = tiny("llama").to(torch.bfloat16)
    stack = Stack(model, [Predgen(labels=["no", "yes"], p_max=0.0)], tokenizer=tiny_tokenizer())
    trained = list(stack.ledger.parameters("predgen"))
    before = [p.detach().clone() for p in trained]
    stack.train(WORDS, steps=20, batch_size=4, learning_rate=1e-4, max_length=32)
    assert {p.dtype for p in trained} == {torch.float32}
    assert model.dtype == torch.bfloat16
    moved = torch.cat([(p != q).flatten() for p, q in zip(trained, before, strict=True)])
    assert float(moved.float().mean()) > 0.95


@pytest.mark.parametrize("labels", [["no", "yes"], None])
def test_in_half_precision_the_loss_is_taken_in_float32(labels: list[str] | None) -> None:
    plugin, model = Predgen(labels=labels, p_max=0.0), tiny("llama").to(torch.bfloat16)
    stack = Stack(model, [Lora(), plugin], tokenizer=tiny_tokenizer())
    batch = batch_of(stack, WORDS if labels else NUMBERS)
    expected = by_hand(stack, batch, batch["input_ids"]).item()
    assert float(stack.train_step(batch)) == pytest.approx(expected, rel=1e-6)


def test_teacher_forcing_draws_nothing() -> None:
    stack = stack_of(p_max=0.0)
    batch, state = batch_of(stack), torch.get_rng_state()
    stack.train_step(batch)
    assert torch.equal(torch.get_rng_state(), state)


# Kowsher/PredGen, modeling.py, commit 23a3323, on this model, these ids and this adapter: loss, largest gradient of W2.
OFFICIAL = {0.0: (13.839865684509277, 0.8586518168449402), 1.0: (13.31089973449707, 0.9605190753936768)}


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_official_numbers(p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(3, 250, (3, n), generator=generator) for n in (7, 3))
    stack = stack_of(labels=LABELS, dense=4, p_min=p, p_max=p)
    plugin_of(stack).state["G"] = 3
    ids = torch.cat((x, y), 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss = stack.train_step(batch | {CLASS_INDEX: torch.tensor([0, 1, 1])})
    assert float(loss) == pytest.approx(OFFICIAL[p][0], rel=1e-5)
    assert float(plugin_of(stack).director.W2.weight.grad.abs().max()) == pytest.approx(
        OFFICIAL[p][1], rel=1e-4
    )


# -- what is fed -----------------------------------------------------------------------------------------------------


def fed_in(stack: Stack, batch: dict[str, Tensor], index: int = 0) -> Tensor:
    """The ids of the one forward pass that the loss is taken of."""
    seen: list[Tensor] = []

    def note(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        if stack.model.training:  # generation is in evaluation mode
            seen.append(kwargs["input_ids"])

    stack.model.train()
    handle = stack.model.register_forward_pre_hook(note, with_kwargs=True)
    stack.run_train_step(TrainStep(stack, dict(batch), index=index))
    handle.remove()
    assert stack.model.training
    (ids,) = seen
    return ids


def test_own_tokens_do_not_depend_on_the_gold_ones() -> None:
    stack = stack_of(p_min=1.0)
    batch = batch_of(stack)
    other = dict(batch, input_ids=batch["input_ids"].clone())
    G = plugin_of(stack).state["G"]
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        other["input_ids"][row, length - G : length] = 50 + row
    own = fed_in(stack, batch)
    assert torch.equal(fed_in(stack, other), own)
    assert not torch.equal(own, batch["input_ids"])
    with_gold = stack_of()
    assert torch.equal(fed_in(with_gold, batch, index=0), batch["input_ids"])


def test_own_tokens_are_what_the_model_writes_behind_the_text() -> None:
    stack = stack_of()
    batch, G = batch_of(stack), plugin_of(stack).state["G"]
    ids = write(stack, batch["input_ids"], batch["attention_mask"], G=G)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        so_far = batch["input_ids"][row, : length - G].tolist()
        for _ in range(G):  # without a cache, alone, no padding
            ended = so_far[-1] == EOS
            so_far.append(EOS if ended else int(stack.model(torch.tensor([so_far])).logits[0, -1].argmax()))
        assert ids[row, :length].tolist() == so_far


def test_own_answers_come_as_often_as_p_says() -> None:
    stack = stack_of(p_min=0.5, p_max=0.5)
    batch = batch_of(stack, count=1)
    torch.manual_seed(0)
    draws = [float(torch.rand(())) < 0.5 for _ in range(8)]
    torch.manual_seed(0)
    assert [not torch.equal(fed_in(stack, batch), batch["input_ids"]) for _ in range(8)] == draws
    assert 0 < sum(draws) < 8
    ramp = stack_of(p_min=0.0, p_max=1.0, ramp=5)
    assert not torch.equal(fed_in(ramp, batch, index=4), batch["input_ids"])  # t = 5, p = 1


def test_the_first_step_has_p_1_and_no_later_one() -> None:
    """t counts from 1: with a ramp of one step, p is p_max from the first step of the optimizer on."""
    stack = stack_of(ramp=1)
    batch = batch_of(stack, count=1)
    assert not torch.equal(fed_in(stack, batch, index=0), batch["input_ids"])
    stack = stack_of(p_max=1.0, ramp=2)  # p_1 = 1/2, p_2 = 1
    for index, seed in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)):
        torch.manual_seed(seed)
        own = float(torch.rand(())) < (index + 1) / 2
        torch.manual_seed(seed)
        assert torch.equal(fed_in(stack, batch, index=index), batch["input_ids"]) != own


# -- prediction ------------------------------------------------------------------------------------------------------


def test_it_learns_to_name_classes_and_comes_back(tmp_path: Path) -> None:
    stack = stack_of(Lora(rank=8), labels=["no", "yes"], ramp=20)
    stack.train(WORDS, steps=40, batch_size=4, learning_rate=3e-2, max_length=32)
    scores = stack.evaluate(WORDS, metrics=["accuracy", "predgen"])
    assert [score.value for score in scores.values()] == [1, 1, 1]
    assert list(scores) == ["accuracy", "accuracy_director", "accuracy_writer"]
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    texts = [row["text"] for row in WORDS]
    with torch.no_grad():
        for one, two in zip(*(plugin_of(s).predict(s, texts) for s in (stack, again)), strict=True):
            assert torch.equal(one, two)


def test_it_learns_to_write_numbers_and_comes_back(tmp_path: Path) -> None:
    stack = stack_of(Lora(rank=8), labels=None, ramp=20)
    stack.train(NUMBERS, steps=40, batch_size=4, learning_rate=3e-2, max_length=32)
    scores = stack.evaluate(NUMBERS, metrics=["predgen"])
    assert scores["mae"].value < 0.5  # the mean as a guess: 3.9
    assert scores["numbers_written"].value == 1
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    texts = [row["text"] for row in NUMBERS]
    assert plugin_of(again).numbers(again, texts) == plugin_of(stack).numbers(stack, texts)


def test_what_is_no_number_counts_as_the_mean() -> None:
    stack = stack_of(labels=None)
    plugin_of(stack).state.update({"G": 3, "mean": 2.0})
    texts = [row["text"] for row in NUMBERS]
    assert plugin_of(stack).numbers(stack, texts) == [None] * 4  # nothing has trained
    scores = stack.evaluate(NUMBERS, metrics=["predgen"])
    assert scores["numbers_written"].value == 0
    assert scores["mae"].value == pytest.approx((0.5 + 0.25 + 1.25 + 10) / 4)


def test_prediction_never_reads_gold_answers() -> None:
    stack = stack_of()
    turned = [
        {"text": row["text"], "label": other["label"]}
        for row, other in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True)
    ]
    found = []
    for rows in (ROWS, turned):
        found.append(stack.evaluate(rows, metrics=["predgen"])["accuracy_director"].value)
    names = stack.classify([row["text"] for row in ROWS])
    right = [row["label"] == name for row, name in zip(ROWS, names, strict=True)]
    assert found == [sum(right) / 8, 1 - sum(right) / 8]  # neighbours have the other label


def test_the_director_reads_what_was_written() -> None:
    stack = stack_of()
    plugin, text = plugin_of(stack), ROWS[1]["text"]
    stack.model.eval()
    with torch.no_grad():
        written, scores = plugin.predict(stack, [text])
        ids = torch.cat((torch.tensor([stack.tokenizer(text)["input_ids"]]), written), 1)
        Z = stack.model(ids).logits[:, -plugin.state["G"] :]
        assert torch.allclose(plugin.director(Z), scores, atol=1e-6)


def test_predictions_stand_in_the_order_of_the_texts() -> None:
    """Batches are made of texts of like lengths."""
    stack = stack_of(Lora(), labels=LABELS)
    texts = ["a long text to begin with", "so", "and another"]
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.add_(0.05)
        written, scores = plugin_of(stack).predict(stack, texts)
        alone = [plugin_of(stack).predict(stack, [text]) for text in texts]
    assert torch.equal(written, torch.cat([each[0] for each in alone]))
    assert torch.allclose(scores, torch.cat([each[1] for each in alone]), atol=1e-6)
    assert len(scores.unique(dim=0)) == 3


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["one"]}, "at least 2 items"),
        ({"labels": ["one", " "]}, "is empty"),
        ({"labels": ["one", "one "]}, "'one' and 'one ' have the same tokens"),
    ],
)
def test_bad_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(PeftxError, match=f"(predgen|Predgen): .*{said}"):
        stack_of(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"p_min": 0.5, "p_max": 0.2}, "p_max 0.2 is below p_min 0.5: swap them"),
        ({"labels": None, "dense": 8}, "dense is 8, and numbers have no director: leave it out"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_stack_is_built(
    options: dict[str, object], said: str
) -> None:
    with pytest.raises(PeftxError, match=f"Predgen: .*{said}"):
        Predgen(**options)
    assert Predgen(labels=None, dense=64).config.dense == 64  # a bundle writes every option down


def test_bad_rows_and_uses() -> None:
    stack, numbers = stack_of(), stack_of(Lora(), labels=None)
    with pytest.raises(DataError, match="answers of 10 tokens leave no room for a text in max_length 10"):
        stack.train(ROWS, steps=1, max_length=10)
    with pytest.raises(DataError, match=r"row 0 .*'awful'"):
        stack.train([{"text": "x", "label": "awful"}], steps=1)
    with pytest.raises(DataError, match=r"row 1 .*'1.2.3' is no number"):
        numbers.train([NUMBERS[0], {"text": "x", "label": "1.2.3"}], steps=1)
    with pytest.raises(DataError, match=r"row 0 .*'one' is no number"):
        numbers.evaluate([{"text": "x", "label": "one"}], metrics=["predgen"])
    with pytest.raises(DataError, match="every row needs 'text' and 'label'"):
        stack.evaluate([{"prompt": "x", "completion": "y"}], metrics=["predgen"])
    assert stack.evaluate(metrics=["predgen"]) == {}  # a run has no rows to measure on
    with pytest.raises(PeftxError, match="how long the numbers are is not known yet"):
        numbers.evaluate(NUMBERS, metrics=["predgen"])
    bare = Stack(tiny("llama"), [Predgen(labels=["bad", "good"])], tokenizer=tiny_tokenizer(), inject=False)
    bare.prepare(as_training_data(bare, [{"text": "x", "label": "bad"}], seed=0, max_length=32))
    for early in (
        lambda: plugin_of(bare).classify(bare, ["x"]),
        lambda: bare.evaluate([{"text": "x", "label": "bad"}], metrics=["predgen"]),
    ):
        with pytest.raises(PeftxError, match="predgen: there is no director yet"):
            early()
    with pytest.raises(PeftxError, match="numbers are no classes"):
        numbers.classify("x")
    with pytest.raises(PeftxError, match="classes are no numbers"):
        plugin_of(stack).numbers(stack, ["x"])
    with pytest.raises(PeftxError, match=r"text 1 .* has no tokens"):
        stack.classify(["fine", ""])
    with pytest.raises(ArchitectureError, match="predgen: t5 does not write behind its prompt"):
        stack_of(arch="t5")
    for arch in (
        "llama",
        "gpt2",
    ):  # cut to what the model reads before an answer; GPT-2 has no places behind that
        assert len(stack_of(arch=arch).classify(["y" * 500, "z"])) == 2


@pytest.mark.parametrize("labels", [["no", "yes"], None])
def test_a_tokenizer_without_an_end_of_texts_is_refused(labels: list[str] | None) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"predgen: .*the tokenizer has no EOS token, so a completion"):
        Stack(tiny("llama"), [Predgen(labels=labels)], tokenizer=tokenizer)
