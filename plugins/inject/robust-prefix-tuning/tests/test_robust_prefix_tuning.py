from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, DataError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.evaluation import evaluating
from peftx_lora import Lora
from peftx_prefix_tuning import PrefixTuning
from peftx_robust_prefix_tuning import (
    Manifolds,
    RobustPrefixTuning,
    attack,
    first_tokens,
    misspelled,
    projection,
)

test_conformance = conformance("robust-prefix-tuning")

ID = "robust-prefix-tuning"
TEXTS = ["a fine film", "a dull film", "what a fine day it was", "dull and long", "fine", "so dull a book"]
ROWS = [{"text": text, "label": "positive" if "fine" in text else "negative"} for text in TEXTS]


def stack_of(*others: Any, arch: str = "llama", **options: Any) -> tuple[Stack, RobustPrefixTuning]:
    plugin = RobustPrefixTuning(**{"length": 3, "steps": 4, "rate": 0.01, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def batch_of(stack: Stack, plugin: RobustPrefixTuning, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return next(plugin.texts.batches(stack, texts))


def some_manifolds(plugin: RobustPrefixTuning, rank: int = 5) -> None:
    """As if they were known: of random states."""
    N, d, _ = plugin.manifolds.Q.shape
    torch.manual_seed(3)
    plugin.manifolds.Q.copy_(torch.stack([projection(torch.randn(rank + 1, d), 1.0) for _ in range(N)]))


def scores(stack: Stack, texts: list[str] = TEXTS) -> Tensor:
    with evaluating(stack.model):
        return stack.plugins[ID].classify(stack, texts)[1]


# -- manifolds ---------------------------------------------------------------------------------------------------------


def test_a_projection_by_hand() -> None:
    """Centred states (+-3, 0, 0) and (0, +-1, 0): singular values sqrt(18) and sqrt(2), 3/4 and 1/4 of their sum."""
    H = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]]) + torch.tensor([5.0, 6.0, 7.0])
    assert torch.allclose(projection(H, 0.7), torch.diag(torch.tensor([1.0, 0, 0])), atol=1e-6)
    assert torch.allclose(projection(H, 0.8), torch.diag(torch.tensor([1.0, 1, 0])), atol=1e-6)


@pytest.mark.parametrize("mass", [0.5, 0.99])
def test_a_projection_is_symmetric_idempotent_and_of_the_rank_that_is_kept(mass: float) -> None:
    torch.manual_seed(0)
    H = torch.randn(20, 8)
    Q, S = projection(H, mass), torch.linalg.svdvals(H - H.mean(0))
    kept = next(r for r in range(1, 9) if S[:r].sum() >= mass * S.sum())
    assert torch.allclose(Q, Q.T, atol=1e-6)
    assert torch.allclose(Q @ Q, Q, atol=1e-5)
    assert torch.linalg.matrix_rank(Q) == kept


def test_the_loss_by_hand() -> None:
    """Two layers of width 2 that keep the first number. A batch is centred, one text is not."""
    manifolds = Manifolds(2, 2)
    manifolds.Q[:] = torch.diag(torch.tensor([1.0, 0.0]))
    h = torch.tensor([[[1.0, 4.0], [5.0, 8.0]], [[1.0, 1.0], [2.0, 1.0]]])
    # layer 1: second numbers 4, 8 become their mean 6: two squares of 4 in 4 numbers; layer 2: in the manifold
    assert float(manifolds.distance(h)) == 2.0
    assert float(manifolds.distance(h[:, :1])) == 16 / 2 + 1 / 2


def test_states_in_the_manifold_cost_nothing() -> None:
    torch.manual_seed(0)
    H = torch.randn(4, 8)
    manifolds = Manifolds(1, 8)
    manifolds.Q[0] = projection(H, 1.0)
    inside = torch.randn(3, 4) @ (H - H.mean(0)) + torch.randn(8)  # any shift of it
    assert float(manifolds.distance(inside[None])) < 1e-9
    assert float(manifolds.distance(torch.randn(1, 3, 8))) > 0.1


def test_manifolds_are_of_the_training_texts_that_are_classified_right() -> None:
    stack, plugin = stack_of(layers=1)
    batch = batch_of(stack, plugin)
    stack.model.eval()
    with torch.no_grad():
        h, z = plugin.read(stack.model, batch)
    stack.model.train()
    target = z.argmax(-1)
    target[:3] = 1 - target[:3]  # these are wrong
    whole = {**batch, "class_index": target}
    plugin.learn(stack.model, [{k: v[part] for k, v in whole.items()} for part in (slice(4), slice(4, 6))])
    assert stack.model.training
    assert torch.allclose(plugin.manifolds.Q[0], projection(h[0, 3:], 0.99), atol=1e-5)


def test_a_run_ends_with_the_manifolds(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of()
    seen, own = [], plugin.learn

    def learn(model: Any, batches: Any) -> None:
        kept = [*batches]
        seen.append(sum(len(batch["input_ids"]) for batch in kept))
        own(model, kept)

    monkeypatch.setattr(plugin, "learn", learn)
    stack.train(ROWS, steps=12, batch_size=3, learning_rate=0.05, gradient_accumulation=2)
    assert seen == [len(ROWS)]  # once, and every row
    for Q in plugin.manifolds.Q:
        assert 0 < torch.linalg.matrix_rank(Q) < len(Q)
        assert torch.allclose(Q @ Q, Q, atol=1e-5)


def test_so_many_texts_are_read_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of(texts=2)
    seen = []
    monkeypatch.setattr(plugin, "learn", lambda _, batches: seen.extend(len(b["input_ids"]) for b in batches))
    stack.train(ROWS, steps=1, batch_size=1)
    assert sum(seen) == 2


def test_without_two_texts_that_are_right_psi_stays_0() -> None:
    stack, plugin = stack_of()
    with evaluating(stack.model):
        best = plugin.classify(stack, TEXTS)[1].argmax(-1)
    wrong = {**batch_of(stack, plugin), "class_index": 1 - best}
    with pytest.warns(UserWarning, match=r"0 training texts are classified right.*train longer"):
        plugin.learn(stack.model, [wrong])
    wrong["class_index"][0] = best[0]
    with pytest.warns(UserWarning, match="1 training texts"):
        plugin.learn(stack.model, [wrong])
    assert torch.equal(plugin.manifolds.Q, torch.eye(32).repeat(2, 1, 1))
    wrong["class_index"][1] = best[1]
    plugin.learn(stack.model, [wrong])
    assert torch.linalg.matrix_rank(plugin.manifolds.Q[0]) == 1


# -- psi ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_without_psi_it_is_prefix_tuning(arch: str) -> None:
    """With 0 steps, and as long as Q is I."""
    stack, plugin = stack_of(arch=arch, steps=0)
    some_manifolds(plugin)
    untaught, taught = stack_of(arch=arch)[0], stack_of(arch=arch)[0]
    prefix = PrefixTuning(length=3, hidden=None)
    plain = Stack(tiny(arch), [prefix], tokenizer=tiny_tokenizer())
    parameters = list(stack.ledger.parameters(ID))
    with torch.no_grad():
        for other in (untaught, taught):
            for mine, theirs in zip(parameters, other.ledger.parameters(ID), strict=True):
                theirs.copy_(mine)
        rows = torch.cat([p.transpose(0, 1).flatten(1) for p in parameters], 1)
        prefix.encoders[0][0].embedding.weight.copy_(rows)
    ids = plugin.texts.rows(stack, TEXTS)
    words = plugin.state["words"]
    with torch.no_grad():
        expected = torch.stack([plain.model.eval()(torch.tensor([row])).logits[0, -1, words] for row in ids])
    assert torch.allclose(scores(stack), expected, atol=1e-5)
    assert torch.allclose(scores(untaught), expected, atol=1e-5)
    some_manifolds(taught.plugins[ID])
    assert (scores(taught) - expected).abs().max() > 1e-3


def test_q_of_one_gives_no_loss_and_no_gradient() -> None:
    stack, plugin = stack_of()
    stack.model.eval()
    assert plugin.tune(stack.model, batch_of(stack, plugin)) == [0.0] * 4
    assert not any(x.any() for edit in plugin.first for x in edit.psi)


def test_psi_brings_the_states_nearer_and_stands_in_the_first_layers_alone() -> None:
    stack, plugin = stack_of(layers=1, steps=8, rate=2e-3)
    some_manifolds(plugin)
    stack.model.eval()
    losses = plugin.tune(stack.model, batch_of(stack, plugin))
    assert len(losses) == 8
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert len(plugin.first) == 1
    for psi, theta in zip(plugin.first[0].psi, plugin.first[0].theta, strict=True):
        assert psi.shape == theta.shape
        assert 0 < psi.abs().max() <= 8 * 2e-3 * 1.05  # Adam's step is at most about the rate


def test_psi_is_tuned_by_adam() -> None:
    """The first step moves every number by the rate, against the sign of its gradient."""
    stack, plugin = stack_of(steps=1, rate=0.01)
    some_manifolds(plugin)
    stack.model.eval()
    batch = batch_of(stack, plugin)
    plugin.tune(stack.model, batch)
    moved = [[x.detach() for x in edit.psi] for edit in plugin.first]
    for edit in plugin.first:
        edit.psi = []
    plugin.manifolds.distance(plugin.read(stack.model, batch)[0]).backward()
    for edit, psi in zip(plugin.first, moved, strict=True):
        for x, theta in zip(psi, edit.theta, strict=True):
            clear = theta.grad.abs() > 1e-5
            assert clear.any()
            assert torch.allclose(x[clear], -0.01 * theta.grad.sign()[clear], atol=1e-4)


def test_each_batch_has_a_psi_of_its_own() -> None:
    stack, plugin = stack_of(batch=2)
    some_manifolds(plugin)
    both = scores(stack, TEXTS[:4])
    assert torch.allclose(both[2:], scores(stack, TEXTS[2:4]), atol=1e-5)
    assert not torch.allclose(
        both[1:3], scores(stack, TEXTS[1:3]), atol=1e-4
    )  # other neighbours, another psi


def test_a_test_batch_leaves_nothing_behind() -> None:
    lora = Lora(rank=2)
    stack, plugin = stack_of(lora)
    some_manifolds(plugin)
    before = {name: x.clone() for name, x in stack.model.state_dict().items()}
    rng = torch.get_rng_state()
    first = scores(stack)
    for name, x in stack.model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert all(p.grad is None for p in stack.model.parameters())
    assert all(not edit.psi for edit in plugin.first)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(scores(stack), first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scores(stack)
    assert all(not edit.psi for edit in plugin.first)


def test_bundles_hold_the_manifolds(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    some_manifolds(plugin)
    again = peftx.load(stack.save(tmp_path / "b"), model=tiny("llama"))
    assert torch.equal(again.plugins[ID].manifolds.Q, plugin.manifolds.Q)
    assert torch.equal(scores(again), scores(stack))


# -- training ----------------------------------------------------------------------------------------------------------


def test_classes_are_words_as_they_follow_a_text() -> None:
    """The bundled tokenizer has " film" as one token, and "film" as four."""
    bundled = Stack("peftx:tiny")
    pieces = [bundled.tokenizer.tokenize(f" {label}") for label in ("film", "food")]
    assert [len(piece) for piece in pieces] == [1, 1]
    assert first_tokens(bundled, ["film", "food"]) == bundled.tokenizer.convert_tokens_to_ids(
        [p for (p,) in pieces]
    )


def test_the_loss_is_that_of_the_class_token_behind_the_text() -> None:
    stack, plugin = stack_of()
    one, two = (
        stack.tokenizer(label, add_special_tokens=False).input_ids[0] for label in ("negative", "positive")
    )
    assert plugin.state["words"] == [one, two]
    report = stack.train(ROWS, steps=1, batch_size=6, learning_rate=1e-9)
    with torch.no_grad():
        losses = []
        for row in ROWS:
            ids = plugin.texts.rows(stack, [row["text"]])
            logits = stack.model.eval()(torch.tensor(ids)).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[plugin.state["words"][row["label"] == "positive"]])
    assert report.losses[0][1] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_it_trains_the_prefix_alone() -> None:
    stack, plugin = stack_of()
    n = plugin.first[0].theta[0].numel()
    assert stack.trainable_parameters() == 2 * 2 * n  # K and V of two layers
    before = {name: x.clone() for name, x in stack.model.state_dict().items()}
    stack.train(ROWS, steps=2, batch_size=6, learning_rate=0.1)
    changed = {name for name, x in stack.model.state_dict().items() if not torch.equal(x, before[name])}
    assert len(changed) == 4 + 1  # and Q


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_words_are_misspelled() -> None:
    assert misspelled("good") == ["god", "g00d"]  # its middle letters are one
    assert misspelled("dull") == ["dlul", "dul", "du11"]
    assert misspelled("fin") == []


def test_an_attack_takes_the_dearest_word_first_and_stops_when_the_class_falls() -> None:
    cost = {"fine": 2.0, "FINE": -0.5, "film": 1.0, "FILM": 0.0, "a": 0.5, "A": 0.4}

    def ask(texts: list[str]) -> Tensor:
        good = [sum(cost[word.strip(",.")] for word in text.split()) for text in texts]
        return torch.tensor([[1.0, x] for x in good])

    def upper(word: str) -> list[str]:
        return [word.upper()]

    assert attack(ask, "a fine, film.", 1, upper, 1) == "a FINE, film."
    assert (
        attack(ask, "a fine, film.", 1, upper, 2) == "a FINE, film."
    )  # 0.5 + 1 - 0.5 = 1 ties, and class 0 is first
    assert attack(ask, "a a fine, film.", 1, upper, 2) == "a a FINE, FILM."
    assert attack(ask, "a a fine, film.", 1, lambda word: [], 2) == "a a fine, film."
    assert attack(ask, "a A film", 0, upper, 5) == "a A film"  # class 1 already


def test_accuracy_on_clean_and_on_attacked_texts() -> None:
    torch.manual_seed(0)
    plugin = RobustPrefixTuning(length=5, rate=0.02, synonyms={"fine": ["dull"], "dull": ["fine"]}, edits=2)
    stack = Stack("peftx:tiny", [plugin])
    stack.train(ROWS, steps=60, batch_size=6, learning_rate=0.2)
    found = stack.evaluate(ROWS, metrics=[ID])
    kinds = ("clean", "characters", "words")
    assert set(found) == {f"accuracy/{kind}/{name}" for kind in kinds for name in ("prefix", "robust")}
    assert all(score.count == len(ROWS) for score in found.values())
    value = {name: score.value for name, score in found.items()}
    assert value["accuracy/clean/prefix"] == 1
    assert value["accuracy/words/prefix"] < 1
    assert value["accuracy/clean/robust"] == stack.evaluate(ROWS, metrics=["accuracy"])["accuracy"].value

    def ask(texts: list[str]) -> Tensor:
        return scores(stack, texts)

    plugin.config = plugin.config.model_copy(update={"steps": 0})
    attacked = [
        row | {"text": attack(ask, row["text"], int(row["label"] == "positive"), misspelled, 2)}
        for row in ROWS
    ]
    expected = stack.evaluate(attacked, metrics=["accuracy"])["accuracy"].value
    assert value["accuracy/characters/prefix"] == expected


def test_what_an_evaluation_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks ask the first prefix alone; without synonyms no words are attacked."""
    stack, _ = stack_of(steps=7)
    seen: list[int] = []
    monkeypatch.setattr(RobustPrefixTuning, "tune", lambda self, *_: seen.append(self.config.steps))
    found = stack.evaluate(ROWS[:1], metrics=[ID])
    assert {name.split("/")[1] for name in found} == {"clean", "characters"}
    assert seen[:2] == [0, 7]
    assert seen[-2:] == [0, 7]
    assert set(seen[2:-2]) == {0}


def test_a_model_of_half_precision_is_tuned() -> None:
    plugin = RobustPrefixTuning(length=3, steps=2)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    some_manifolds(plugin)
    assert plugin.manifolds.Q.dtype == torch.float32
    losses = plugin.tune(stack.model.eval(), batch_of(stack, plugin))
    assert losses[0] > 0
    assert all(x.any() for edit in plugin.first for x in edit.psi)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(DataError, match="two classes have one"):
        stack_of(labels=["bad", "bland"])
    with pytest.raises(ArchitectureError, match="2 attentions in the first 3 of 2 layers"):
        stack_of(layers=3)
    with pytest.raises(ArchitectureError, match="writes no class behind a text"):
        stack_of(arch="bert")
