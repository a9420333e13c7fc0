"""MultiControl: losses and the search by hand, where a prefix stands, and what is stored."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, DataError, PeftxError, PluginError, UnsupportedError
from peftx.kernel.parts import AttentionPart
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_multi_control import Autoencoder, MultiControl, Prefix, intersection, near

test_conformance = conformance("multi-control")

SMALL: dict[str, Any] = {"length": 3, "latent": 8, "values": (2, 3), "weights": (1.0, 2.0)}
TEXTS = ["A dull film.", "A ship sank.", "What a joy.", "They won, in the rain.", "So weak.", "A new moon."]
ROWS = [
    {"prompt": "", "completion": text, "aspect": t, "value": a}
    for text, (t, a) in zip(TEXTS, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 2)], strict=True)
] * 2
SEARCH: dict[str, Any] = {"K": 5, "iterations": 10, "starts": 50, "keep": 5}


def built(arch: str = "llama", **options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(tiny(arch), [MultiControl(**{**SMALL, **options})], tokenizer=tiny_tokenizer())


def trained(**options: Any) -> Stack:
    stack = built(**options)
    stack.train(ROWS, steps=2, batch_size=4, learning_rate=1e-2)
    return stack


def plugin(stack: Stack) -> MultiControl:
    found = stack.plugins["multi-control"]
    assert isinstance(found, MultiControl)
    return found


def batch(stack: Stack) -> dict[str, Tensor]:
    """Of three texts, the shorter ones with pads."""
    ids = [stack.tokenizer(text)["input_ids"] for text in TEXTS[:3]]
    longest = max(map(len, ids))
    rows = torch.tensor([row + [2] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": rows, "attention_mask": mask}


# ------------------------------------------------------------------------------------------------------------- search
def test_one_attribute_and_all_neighbours_is_the_mean() -> None:
    X = torch.randn(20, 4)
    (c,) = intersection([X], [3.0], K=20, iterations=1, starts=7, keep=1)
    torch.testing.assert_close(c, X.mean(0))


def test_near_by_hand() -> None:
    X = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    mean, far = near(torch.tensor([[0.0], [9.0]]), X, 2)
    assert mean.flatten().tolist() == [0.5, 6.5]
    assert far.tolist() == [0.5, 18.5]  # (0 + 1) / 2, (1 + 36) / 2
    c = torch.randn(250, 1)  # more than are looked up together
    whole, alone = near(c, X, 2), [near(one[None], X, 2) for one in c]
    for k in (0, 1):
        torch.testing.assert_close(whole[k], torch.cat([one[k] for one in alone]))


def test_a_step_by_hand() -> None:
    """c = (w_1 mean N_1 + w_2 mean N_2) / (w_1 + w_2), from the best of the texts."""
    A, B = torch.tensor([[0.0], [1.0], [50.0]]), torch.tensor([[3.0], [6.0], [90.0]])
    start = intersection([A, B], [1.0, 3.0], K=2, iterations=0, starts=1, keep=1)
    assert start.tolist() == [[3.0]]  # 13 / 2 + 9 / 2; from 1 it is 1 / 2 + 29 / 2
    moved = intersection([A, B], [1.0, 3.0], K=2, iterations=1, starts=1, keep=1)
    assert moved.tolist() == [[(0.5 + 3 * 4.5) / 4]]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 7.0, 1.0]])
def test_each_step_lowers_the_weighted_distance(weights: list[float]) -> None:
    torch.manual_seed(0)
    points = [torch.randn(60, 3) + shift for shift in (0.0, 1.0, -2.0)]
    costs = []
    for iterations in range(6):
        c = intersection(points, weights, K=10, iterations=iterations, starts=1, keep=1)
        costs.append(float(sum(w * near(c, X, 10)[1] for w, X in zip(weights, points, strict=True))))
    assert all(later <= cost + 1e-5 for cost, later in pairwise(costs))
    assert costs[-1] < costs[0] - 0.1


def test_centers_of_two_clouds_lie_where_these_overlap() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(400, 2) + torch.tensor([-1.5, 0.0]), torch.randn(400, 2) + torch.tensor([1.5, 0.0])
    found = intersection([A, B], [1.0, 1.0], K=20, iterations=15, starts=100, keep=10)
    assert found.shape == (10, 2)
    assert found[:, 0].abs().max() < 0.5  # the means lie at -1.5 and 1.5
    far = sum(near(found, X, 20)[1] for X in (A, B))
    assert far.tolist() == sorted(far.tolist())  # the best first
    assert float(far.max()) < float(sum(near(A.mean(0)[None], X, 20)[1] for X in (A, B)))


def test_weights_pull() -> None:
    A, B = torch.zeros(5, 1), torch.ones(5, 1)
    for w in (1.0, 9.0):
        c = intersection([A, B], [1.0, w], **SEARCH)
        torch.testing.assert_close(c, torch.full_like(c, w / (1 + w)))


# ------------------------------------------------------------------------------------------------------------- losses
def with_z(stack: Stack, z: Tensor) -> Autoencoder:
    A = plugin(stack).autoencoder
    A.z = z
    return A


def test_classes_by_hand() -> None:
    """Each row among the attributes of its own aspect."""
    z = torch.randn(4, 8)
    A = with_z(built(), z)
    aspect, attribute = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 2, 0, 0])
    W, c = A.W.weight, A.W.bias
    total = 0.0
    for row, (t, a) in enumerate(zip(aspect.tolist(), attribute.tolist(), strict=True)):
        own = slice(0, 2) if t == 0 else slice(2, 5)
        scores = W[own] @ z[row] + c[own]
        total -= scores.log_softmax(0)[a].item()
    assert A.classes(aspect, attribute).item() == pytest.approx(total / 4, rel=1e-5)


def test_gap_by_hand() -> None:
    stack = built(values=(1, 1, 1), weights=(1.0, 1.0, 1.0))
    z = torch.randn(3, 8, requires_grad=True)
    A = with_z(stack, z)
    aspect = torch.tensor([0, 0, 1])
    m = [(z[0] + z[1]) / 2, z[2]]
    expected = 10 * (m[0] - m[1]).square().mean()
    torch.testing.assert_close(A.gap(aspect), expected)
    A.remember(aspect)
    A.z = torch.randn(2, 8, requires_grad=True)  # of aspect 2 alone: against what is remembered of the others
    old, new = [x.detach() for x in m], A.z.mean(0)
    pairs = [(old[0], old[1]), (old[0], new), (old[1], new)]
    loss = A.gap(torch.tensor([2, 2]))
    torch.testing.assert_close(loss, 10 * sum((a - b).square().mean() for a, b in pairs))
    loss.backward()
    assert z.grad is None
    assert A.z.grad is not None
    assert A.z.grad.abs().sum() > 0
    A.remember(torch.tensor([2, 2]))
    assert A.seen.tolist() == [True, True, True]
    torch.testing.assert_close(A.m, torch.stack([*old, new.detach()]))


def test_there_is_no_gap_of_one_aspect() -> None:
    A = with_z(built(), torch.randn(3, 8))
    assert float(A.gap(torch.tensor([1, 1, 1]))) == 0


def told(stack: Stack) -> dict[str, Tensor]:
    """The batch as training has it."""
    data = batch(stack)
    labels = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    return data | {"labels": labels, "aspect": torch.tensor([0, 1, 0]), "value": torch.tensor([0, 0, 1])}


def gradients(stack: Stack) -> dict[str, Tensor]:
    return {n: p.grad for n, p in stack.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("w_cls", "w_gap"), [(0.0, 0.0), (0.2, 0.3)])
def test_the_gradient_is_that_of_L(w_cls: float, w_gap: float) -> None:
    """L divided by 1 - w_cls - w_gap; without weights that of a plain autoencoder."""
    stack, alike = (built(noise=0.0, w_cls=w_cls, w_gap=w_gap) for _ in range(2))
    stack.train_step(told(stack))
    data = told(alike)
    L_rec = alike.model(**data).loss
    A, rest, of = plugin(alike).autoencoder, 1 - w_cls - w_gap, (data["aspect"], data["value"])
    L = rest * L_rec + w_cls * A.classes(*of) + w_gap * A.gap(of[0])
    (L / rest if w_cls else L_rec).backward()
    by_hand, found = gradients(alike), gradients(stack)
    assert any(".E." in n and g.abs().max() > 1e-4 for n, g in by_hand.items())
    assert any("W_2" in n and g.abs().max() > 1e-4 for n, g in by_hand.items())
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, by_hand.get(n, torch.zeros_like(gradient)), atol=1e-5, rtol=1e-3)
    assert found.keys() >= by_hand.keys()


def test_terms_have_their_weights() -> None:
    """Of the report: task + w_cls / rest * classes + w_gap / rest * gap."""
    stack = built(noise=0.0, w_cls=0.1, w_gap=0.4)
    report = stack.train(ROWS[:6], steps=1, batch_size=6, learning_rate=1e-9)
    terms = report.terms
    assert set(terms) == {"task", "classes", "gap"}
    expected = terms["task"] + 0.2 * terms["classes"] + 0.8 * terms["gap"]
    assert report.losses[-1][1] == pytest.approx(expected, rel=1e-4)


def test_only_the_autoencoder_trains() -> None:
    stack = built()
    own = {id(p) for p in stack.ledger.parameters("multi-control")}
    for p in stack.model.parameters():
        assert p.requires_grad == (id(p) in own)
    before = {n: p.detach().clone() for n, p in stack.model.named_parameters() if not p.requires_grad}
    stack.train(ROWS, steps=2, batch_size=4, learning_rate=1e-2)
    for n, p in stack.model.named_parameters():
        if n in before:
            assert p.grad is None
            assert torch.equal(p, before[n])


def test_all_three_losses_fall() -> None:
    stack = built(noise=0.0)
    A, data = plugin(stack).autoencoder, told(stack)

    @torch.no_grad()
    def losses() -> list[float]:
        task = stack.model(**data).loss
        return [float(x) for x in (task, A.classes(data["aspect"], data["value"]), A.gap(data["aspect"]))]

    before = losses()
    stack.train(ROWS, steps=30, batch_size=12, learning_rate=1e-2)
    A.seen.zero_()
    assert all(later < loss for later, loss in zip(losses(), before, strict=True))


# ------------------------------------------------------------------------------------------------------------- latents
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_point_is_that_of_a_text_alone(arch: str) -> None:
    """z = tanh(W_1 h), h the state of e behind the text; pads on either side change nothing."""
    stack = built(arch)
    A, data = plugin(stack).autoencoder.eval(), batch(stack)
    ids, mask = data["input_ids"], data["attention_mask"].bool()
    with torch.no_grad():
        z = A(ids, mask)
        for row in range(3):
            text = ids[row, mask[row]]
            inputs = torch.cat((A.E.embedding(text), A.e))[None]
            h = A.E.towers[0](inputs_embeds=inputs).last_hidden_state[0, -1]
            torch.testing.assert_close(z[row], torch.tanh(A.W_1(h)), atol=1e-5, rtol=1e-4)
            padded = torch.cat((torch.tensor([2, 2]), text))[None]
            left = A(padded, torch.tensor([[0, 0] + [1] * len(text)]).bool())
            torch.testing.assert_close(left[0], z[row], atol=1e-5, rtol=1e-4)


def test_noise_in_training_alone() -> None:
    stack = built(noise=0.5)
    data = batch(stack) | {"aspect": torch.zeros(3, dtype=torch.int64)}
    with torch.no_grad():
        stack.model.eval()
        calm = [stack.model(**data).logits for _ in range(2)]
        z = plugin(stack).autoencoder.z
        with stack.columns(latent=z):
            given = stack.model(**batch(stack)).logits
        stack.model.train()
        noisy = [stack.model(**data).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert torch.equal(given, calm[0])
    assert not torch.allclose(*noisy, atol=1e-4)
    assert torch.equal(plugin(stack).autoencoder.z, z)  # what the losses read has none


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_prefix_is_keys_and_values_that_a_cache_could_hold(arch: str) -> None:
    stack = built(arch)
    z = torch.randn(1, 8)
    ids = torch.tensor([stack.tokenizer("The light is on.")["input_ids"]])
    with torch.no_grad():
        with stack.columns(latent=z):
            found = stack.model(ids).logits
        cache = DynamicCache()
        for layer, part in enumerate(stack.ledger.of("multi-control", AttentionPart)):
            edit = part.module
            assert isinstance(edit, Prefix)
            cache.update(*edit.W_2(z).unflatten(1, edit.shape).split(edit.sizes, -1), layer)
        positions = torch.arange(ids.shape[1])[None]  # the text's own
        mask = torch.ones(1, 3 + ids.shape[1], dtype=torch.int64)
        with stack.disabled():
            written = stack.model(
                ids, past_key_values=cache, position_ids=positions, attention_mask=mask
            ).logits
            plain = stack.model(ids).logits
    torch.testing.assert_close(found, written, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(stack.model(ids).logits, plain)  # without a column it is the base


# ------------------------------------------------------------------------------------------------------------- decoding
def test_points_are_those_of_the_texts_when_training_ends() -> None:
    stack = trained()
    points, A = plugin(stack).points, plugin(stack).autoencoder.eval()
    assert points.z.shape == (len(ROWS), 8)
    assert points.z.dtype == torch.float32
    with torch.no_grad():
        for row in ROWS[:6]:
            ids = stack.tokenizer(row["completion"])["input_ids"] + [stack.tokenizer.eos_token_id]
            z = A(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
            same = torch.isclose(points.z, z, atol=1e-4).all(1)
            assert bool(same.any())
            assert set(points.aspect[same].tolist()) == {row["aspect"]}
            assert set(points.value[same].tolist()) == {row["value"]}


def test_points_are_stored_once_with_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[Tensor] = []
    stack = built()
    store, W_1 = MultiControl.store, plugin(stack).autoencoder.W_1.weight

    def look(self: MultiControl, batches: Any) -> None:
        times.append(W_1.detach().clone())
        store(self, batches)

    monkeypatch.setattr(MultiControl, "store", look)
    stack.train(ROWS, steps=3, batch_size=2, gradient_accumulation=2)
    assert len(times) == 1
    assert torch.equal(times[0], W_1)  # as it is when the run is over


def test_centers_follow_what_is_asked_for() -> None:
    stack = trained(steer=(1, None), neighbours=3, centers=2)
    p = plugin(stack)
    of = p.points.z[(p.points.aspect == 0) & (p.points.value == 1)]
    torch.testing.assert_close(p.centers(p.steer)[0], of.mean(0))  # two texts, which are the same
    p.steer = (1, 2)
    other = p.points.z[(p.points.aspect == 1) & (p.points.value == 2)]
    torch.testing.assert_close(
        p.centers(p.steer)[0], (of.mean(0) + 2 * other.mean(0)) / 3
    )  # by their weights
    assert p.centers(p.steer).shape == (2, 8)


def test_text_is_written_behind_a_center() -> None:
    stack = trained(steer=(1, 2), noise=0.0, centers=1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("multi-control"):
            parameter.mul_(4.0)
    p = plugin(stack)
    found = stack.generate(["The light", "So"], max_new_tokens=6)
    c = p.centers(p.steer)
    p.steer = None
    with stack.columns(latent=c.expand(2, -1)):
        assert stack.generate(["The light", "So"], max_new_tokens=6) == found
    base = stack.generate(["The light", "So"], max_new_tokens=6)
    assert base != found
    with stack.disabled():
        assert stack.generate(["The light", "So"], max_new_tokens=6) == base
    p.steer = (1, 2)
    assert stack.generate("The light", max_new_tokens=6, num_beams=2)


def test_a_center_and_noise_are_drawn_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = trained(steer=(0, 1), noise=0.5)
    seen: list[Tensor] = []
    monkeypatch.setattr(MultiControl, "centers", lambda self, steer: torch.tensor([[9.0] * 8, [-9.0] * 8]))
    A = plugin(stack).autoencoder
    before = A.before

    def look(arguments: dict[str, Any]) -> dict[str, Any]:
        seen.append(A.call.batch["latent"].clone())
        return before(arguments)

    monkeypatch.setattr(A, "before", look)
    for seed in (*range(20), 0):
        stack.generate(["So", "The light"], max_new_tokens=2, seed=seed)
    assert all(torch.equal(one, two) for one, two in zip(seen[::2], seen[1::2], strict=True))  # of two calls
    drawn = [z for z in seen[::2] if torch.equal(z[0], z[1])]
    assert len(drawn) == 21
    assert torch.equal(drawn[0], drawn[-1])
    sides = [round(float(z.mean().sign())) for z in drawn]
    assert set(sides) == {-1, 1}
    spread = torch.stack([z[0] - 9 * side for z, side in zip(drawn[:20], sides, strict=False)]).std()
    assert 0.4 < float(spread) < 0.6


def test_a_row_is_what_it_is_alone() -> None:
    stack = trained(steer=(0, 1))
    texts = ["The light", "So"]
    both = stack.generate(texts, max_new_tokens=5, seed=3)
    assert both == [stack.generate(text, max_new_tokens=5, seed=3) for text in texts]


def test_a_bundle_has_the_points(tmp_path: Any) -> None:
    stack = trained(steer=(1, 1))
    text = stack.generate("The light", max_new_tokens=6, seed=0)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    for name in ("z", "aspect", "value"):
        assert torch.equal(getattr(plugin(loaded).points, name), getattr(plugin(stack).points, name))
    assert torch.equal(plugin(loaded).autoencoder.seen, torch.tensor([True, True]))
    assert loaded.generate("The light", max_new_tokens=6, seed=0) == text


def test_store_by_hand_replaces() -> None:
    stack = trained(steer=(1, 0))
    p = plugin(stack)
    data = batch(stack) | {"aspect": torch.tensor([0, 1, 0]), "value": torch.tensor([0, 0, 1])}
    old = p.centers((1, 0))
    assert p.centers((1, 0)) is old  # the search runs once
    p.store([data, data])
    assert not torch.equal(p.centers((1, 0)), old)
    assert p.points.z.shape == (6, 8)
    assert p.state["texts"] == 6
    p.centers(p.steer)
    p.steer = (1, 2)
    with pytest.raises(PeftxError, match="multi-control: no text with attribute 2 of aspect 1 is stored"):
        p.centers(p.steer)


# ------------------------------------------------------------------------------------------------------------- refusals
def test_nothing_is_stored_before_training() -> None:
    with pytest.raises(PeftxError, match="no text with attribute 1 of aspect 0 is stored"):
        built(steer=(1, 1)).generate("So", max_new_tokens=2)


@pytest.mark.parametrize(
    "wrong", [{"aspect": 2}, {"aspect": -1}, {"value": 3}, {"value": -1}, {"aspect": None}]
)
def test_rows_without_an_attribute(wrong: dict[str, Any]) -> None:
    rows = [{k: v for k, v in (row | wrong).items() if v is not None} for row in ROWS]
    with pytest.raises(DataError, match="multi-control: rows without 'aspect', from 0 to 1"):
        built().train(rows, steps=1)


def test_embeddings_have_no_point() -> None:
    stack = built()
    with pytest.raises(UnsupportedError, match="multi-control: the encoder reads token ids"):
        stack.model(inputs_embeds=torch.zeros(1, 2, 32), aspect=torch.tensor([0]))


def test_a_model_of_two_towers() -> None:
    with pytest.raises(ArchitectureError, match="multi-control: T5ForConditionalGeneration is no decoder"):
        built("t5")


@pytest.mark.parametrize("arch", ["gemma3n", "gemma4", "llama4"])
def test_a_model_that_reads_no_vector(arch: str) -> None:
    with pytest.raises(
        ArchitectureError, match=r"multi-control: a copy of .* cannot read a vector that is no"
    ):
        built(arch)


@pytest.mark.parametrize(
    "options",
    [
        {"values": (2, 0)}, {"weights": (1.0,)}, {"weights": (1.0, 0.0)}, {"w_cls": 0.5, "w_gap": 0.5},
        {"steer": (0,)}, {"steer": (0, 3)}, {"steer": (-1, 0)}, {"steer": (None, None)},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="MultiControl: "):
        MultiControl(**{**SMALL, **options})


def test_a_steer_that_is_set_later_is_looked_at() -> None:
    stack = trained()
    plugin(stack).steer = (0, 3)
    with pytest.raises(PeftxError, match=r"steer \(0, 3\): of each aspect an attribute, below \[2, 3\]"):
        stack.generate("So", max_new_tokens=2)


def test_defaults() -> None:
    config = MultiControl().config
    assert (config.w_cls, config.w_gap, config.noise) == (0.2, 0.3, 1e-3)
    assert (config.neighbours, config.iterations, config.latent) == (200, 15, 768)
    assert math.isclose(sum(config.weights), 7)
