"""Pointer networks: positions of the input as answers, and copying from what a language model has read."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftx
from peftx import Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_pointer_network import (
    IGNORE,
    TASKS,
    Copy,
    Pointer,
    PointerNet,
    PointerNetwork,
    exact,
    experiment,
    hull,
    sorting,
)
from peftx_prefix_grouper import PrefixGrouper
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("pointer-network")

SMALL: dict[str, Any] = {"lengths": (3,), "longest": 5, "width": 8, "steps": 3}


def net_of(inputs: int = 2, width: int = 6) -> PointerNet:
    torch.manual_seed(0)
    net = PointerNet(inputs, width)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net


# ------------------------------------------------------------------------------------------------ the paper's networks
def test_the_pointer_by_hand() -> None:
    torch.manual_seed(0)
    pointer, e, d = Pointer(4, 3), torch.randn(2, 5, 4), torch.randn(2, 2, 4)
    u = pointer(pointer.W1(e), d)
    assert u.shape == (2, 2, 5)
    W1, W2, v = pointer.W1.weight, pointer.W2.weight, pointer.v.weight[0]
    for b in range(2):
        for i in range(2):
            for j in range(5):
                expected = v @ torch.tanh(W1 @ e[b, j] + W2 @ d[b, i])
                assert u[b, i, j].item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(p.numel() for p in pointer.parameters()) == 2 * 3 * 4 + 3


def test_the_network_by_hand() -> None:
    """Each step reads the element that was right before it, and the learned start at first."""
    net = net_of()
    P, C = torch.randn(2, 3, 2), torch.tensor([[2, 0, 3, IGNORE], [1, 0, 2, 3]])
    found = net(P, C)
    for b, steps in ((0, 3), (1, 4)):
        e, state = net.encoder(P[b : b + 1])
        e, x = torch.cat([e[0], net.end[None]]), net.start
        for i in range(steps):
            d, state = net.decoder(x[None, None], state)
            u = net.pointer.v(torch.tanh(net.pointer.W1(e) + net.pointer.W2(d[0])))[:, 0]
            torch.testing.assert_close(found[b, i], u.log_softmax(0))
            x = P[b, C[b, i]] if C[b, i] < 3 else x


@pytest.mark.parametrize("n", [5, 50])
def test_as_many_positions_as_there_are(n: int) -> None:
    net = net_of()
    P, C = torch.randn(3, n, 2), torch.stack([torch.randperm(n) for _ in range(3)])
    found = net(P, C)
    assert found.shape == (3, n, n + 1)
    torch.testing.assert_close(found.exp().sum(2), torch.ones(3, n))
    assert net.solve(P).shape == (3, n + 1)


class Items(nn.Module):
    """An encoder that does not know of an order."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(2, 6)

    def forward(self, P: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        e = torch.tanh(self.A(P))
        return e, (e.mean(1)[None], e.amax(1)[None])


def test_another_order_of_the_inputs_is_another_order_of_the_positions() -> None:
    net = net_of()
    P, C, order = torch.randn(2, 4, 2), torch.tensor([[2, 0, 3, 4], [1, 0, 2, 4]]), torch.tensor([3, 1, 0, 2])
    turned = torch.cat([order.argsort(), torch.tensor([4])])[C]
    for encoder, same in ((Items(), True), (net.encoder, False)):
        net.encoder = encoder
        one, other = net(P, C), net(P[:, order], turned)
        assert torch.allclose(other, one[..., torch.cat([order, torch.tensor([4])])], atol=1e-5) is same


def test_it_reads_its_own_answers_and_none_twice() -> None:
    net, P = net_of(), torch.randn(40, 4, 2)
    found = net.solve(P)
    assert torch.equal(found, net(P, found).argmax(2))
    assert any(len(set(row)) < 5 for row in found.tolist())
    for row, free in zip(net.solve(P, once=True).tolist(), found.tolist(), strict=True):
        elements = [at for at in row if at < 4]
        assert len(set(elements)) == len(elements)
        if len(set(free)) == 5:
            assert row == free
    with torch.no_grad():
        net.end.fill_(0)
        net.pointer.v.weight.fill_(-9)
        net.pointer.W1.weight.fill_(9)
        net.encoder = Items()
        nn.init.constant_(net.encoder.A.bias, 99.0)  # type: ignore[union-attr, arg-type]
        assert net.solve(P, once=True).eq(4).all(), "the end comes as often as it likes"


def test_numbers_in_order() -> None:
    P, C = sorting(50, 6)
    assert P.shape == (50, 6, 1)
    assert P.min() >= 0
    assert P.max() <= 1
    assert C[:, 6].eq(6).all()
    ordered = P[..., 0].gather(1, C[:, :6])
    assert (ordered.diff(dim=1) >= 0).all()
    assert {tuple(sorted(row)) for row in C[:, :6].tolist()} == {(0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize("n", [3, 4, 9])
def test_corners_of_a_hull(n: int) -> None:
    torch.manual_seed(1)
    P, C = hull(100, n)
    sizes = set()
    for points, row in zip(P.double(), C.tolist(), strict=True):
        end = row.index(n)
        corners, behind = row[:end], row[end + 1 :]
        sizes.add(end)
        assert set(behind) <= {IGNORE}
        assert len(set(corners)) == end
        assert corners[0] == min(corners)
        for i, j in pairwise([*corners, corners[0]]):
            side, others = points[j] - points[i], points - points[i]
            cross = side[0] * others[:, 1] - side[1] * others[:, 0]
            assert (cross >= -1e-9).all(), (
                "all points lie left of each side: counter-clockwise, and nothing is outside"
            )
            assert (cross > 0).sum() == n - 2, "no corner is left out"
    assert max(sizes) <= n
    assert min(sizes) >= 3
    assert len(sizes) == {3: 1, 4: 2}.get(n, len(sizes))


def test_the_share_of_exact_answers() -> None:
    class Knows(nn.Module):
        def solve(self, P: Tensor, *, once: bool) -> Tensor:
            assert once
            found = F.pad(P[..., 0].argsort(1), (0, 1), value=3)
            found[::4, 1] += 1  # a mistake in every fourth
            return found

    assert exact(Knows(), "sorting", 3) == 0.75  # type: ignore[arg-type]

    class Ends(nn.Module):
        def solve(self, P: Tensor, *, once: bool) -> Tensor:
            torch.manual_seed(5)
            return hull(500, 5)[1].clamp(min=0)  # behind the end it says 0

    torch.manual_seed(5)
    assert exact(Ends(), "hull", 5) == 1  # type: ignore[arg-type]


def test_it_learns_to_sort_three_numbers() -> None:
    """A random order of three is right in one of six cases, and of four, which it never saw, in one of 24."""
    options = {**SMALL, "lengths": (2, 3), "width": 32, "steps": 200, "longest": 4}
    net, shares = experiment(PointerNetwork(**options).config)
    assert [n for n, _ in shares] == [3, 4]
    assert shares[0][1] > 0.85
    assert shares[1][1] > 2 / 24
    torch.manual_seed(3)
    assert exact(net, "sorting", 3) > 0.85


@pytest.mark.slow
def test_it_sorts_five_numbers_and_more_than_it_was_trained_on() -> None:
    """At the defaults, by the table of the README: 5 are among the lengths that are trained on, 8 are not.
    A random order of 8 is right in one of 40,320 cases."""
    shares = dict(experiment(PointerNetwork().config)[1])
    assert shares[5] > 0.95
    assert shares[8] > 0.5


def test_the_training_by_hand() -> None:
    config = PointerNetwork(**SMALL | {"lengths": (3, 4), "task": "hull", "batch": 4}).config
    net, shares = experiment(config)
    torch.manual_seed(0)
    expected = PointerNet(2, 8)
    for p in expected.parameters():
        nn.init.uniform_(p, -0.2, 0.2)
    adam = torch.optim.Adam(expected.parameters())
    for step, n in enumerate((3, 4, 3)):
        P, C = hull(4, n)
        logs = [
            row[i, at]
            for row, right in zip(expected(P, C), C, strict=True)
            for i, at in enumerate(right)
            if at >= 0
        ]
        adam.zero_grad()
        (-torch.stack(logs).mean()).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 2.0)
        adam.param_groups[0]["lr"] = 0.02 * (1 - step / 3)
        adam.step()
    for found, by_hand in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4)  # Adam enlarges what rounds
    assert shares[0] == (3, pytest.approx(exact(expected, "hull", 3), abs=0.02))


def test_the_options_of_the_experiment() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    net, shares = experiment(PointerNetwork(**SMALL, task="hull").config)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers move"
    assert [n for n, _ in shares] == [3, 4, 5]
    assert net.start.shape == (2,)
    assert net.end.shape == (8,)
    again = experiment(PointerNetwork(**SMALL, task="hull").config)[0]
    assert torch.equal(net.end, again.end)
    for other in ({"steps": 4}, {"learning_rate": 0.01}, {"batch": 8}, {"lengths": (3, 4)}):
        assert not torch.equal(
            net.end, experiment(PointerNetwork(**{**SMALL, "task": "hull", **other}).config)[0].end
        )
    assert experiment(PointerNetwork(**SMALL).config)[0].start.shape == (1,)
    assert set(TASKS) == {"sorting", "hull"}


# ----------------------------------------------------------------------------------------------------- a language model
TOKENIZER = tiny_tokenizer()
TEXT = torch.tensor([[8, 20, 0, 8, 9, 31, 17, 25]])


def stack_of(arch: str = "llama", *others: Any, model: Any = None, **options: Any) -> Stack:
    """With a gate that is open for both."""
    base = tiny(arch) if model is None else model
    stack = Stack(base, [*others, PointerNetwork(**{"size": 8, "gate": 0.3, **options})], tokenizer=TOKENIZER)
    copy = copy_of(stack)
    with torch.no_grad():
        copy.gate.weight.copy_(
            torch.randn(copy.gate.weight.shape, generator=torch.Generator().manual_seed(1))
        )
        copy.pointer.v.weight.mul_(9)
    return stack


def copy_of(stack: Stack) -> Copy:
    (part,) = [part for part in stack.ledger.of("pointer-network") if isinstance(part.module, Copy)]
    return part.module  # type: ignore[return-value]


def by_hand(stack: Stack, plain: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """p(w) at each position of one text, from the plain model's last hidden states."""
    copy = copy_of(stack)
    with torch.no_grad():
        out = plain(**(inputs or {"input_ids": ids}), output_hidden_states=True)
        h, logits = (x[0, -ids.shape[1] :] for x in (out.hidden_states[-1], out.logits))
        rows = []
        for i in range(ids.shape[1]):
            u = torch.stack(
                [
                    copy.pointer.v(torch.tanh(copy.pointer.W1(h[j]) + copy.pointer.W2(h[i])))[0]
                    for j in range(i + 1)
                ]
            )
            g = torch.sigmoid(copy.gate(h[i]))
            p = g * logits[i].softmax(0)
            for j, share in enumerate(u.softmax(0)):
                p[ids[0, j]] += (1 - g[0]) * share
            rows.append(p)
    return torch.stack(rows)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "gpt_neox", "opt"])
@torch.no_grad()
def test_the_mixture_by_hand(arch: str) -> None:
    stack = stack_of(arch)
    found = stack.model(TEXT).logits
    torch.testing.assert_close(found.softmax(-1)[0], by_hand(stack, tiny(arch), TEXT), rtol=1e-3, atol=1e-5)
    plain = tiny(arch)(TEXT).logits
    torch.testing.assert_close(found.logsumexp(-1), plain.logsumexp(-1), rtol=1e-4, atol=1e-4)
    assert (found.softmax(-1) - plain.softmax(-1)).abs().max() > 0.01


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@torch.no_grad()
def test_with_the_gate_at_1_it_is_the_plain_model_to_the_bit(arch: str) -> None:
    stack = stack_of(arch)
    copy_of(stack).gate.bias.fill_(math.inf)
    assert torch.equal(stack.model(TEXT).logits, tiny(arch)(TEXT).logits)


def test_what_it_starts_from() -> None:
    stack = Stack(tiny("llama"), [PointerNetwork(size=8, gate=2.0)], tokenizer=TOKENIZER)
    copy = copy_of(stack)
    assert not copy.gate.weight.any()
    assert copy.gate.bias.tolist() == [2.0]
    assert stack.trainable_parameters() == 2 * 8 * 32 + 8 + 33


@torch.no_grad()
def test_pads_are_nothing_to_point_at() -> None:
    stack = stack_of()
    alone = stack.model(TEXT[:, :5]).logits[0]
    for at in ((3, 0), (0, 3)):
        ids, mask = F.pad(TEXT[:, :5], at, value=PAD), F.pad(torch.ones(1, 5).long(), at)
        ids, mask = torch.cat([TEXT, ids]), torch.cat([torch.ones(1, 8).long(), mask])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = stack.model(ids, attention_mask=mask, position_ids=places).logits
        torch.testing.assert_close(found[1, mask[1].bool()], alone, rtol=1e-4, atol=1e-4)
        assert found.isfinite().all()


@torch.no_grad()
def test_soft_tokens_are_nothing_to_point_at() -> None:
    stack, plain = stack_of("llama", PromptTuning(length=2)), tiny("llama")
    (soft,) = stack.ledger.parameters("prompt-tuning")
    inputs = torch.cat([soft[None], plain.get_input_embeddings()(TEXT)], 1)
    expected = by_hand(stack, plain, TEXT, inputs_embeds=inputs)
    torch.testing.assert_close(stack.model(TEXT).logits.softmax(-1)[0], expected, rtol=1e-3, atol=1e-5)
    cache = stack.model(TEXT[:, :5], use_cache=True).past_key_values
    step = stack.model(TEXT[:, 5:], past_key_values=cache, attention_mask=torch.ones_like(TEXT)).logits
    torch.testing.assert_close(step.softmax(-1)[0], expected[5:], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_cache_holds_what_can_be_pointed_at() -> None:
    stack = stack_of()
    whole = stack.model(TEXT).logits
    cache = stack.model(TEXT[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(
        stack.model(TEXT[:, 5:], past_key_values=cache).logits, whole[:, 5:], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        stack.model(TEXT, logits_to_keep=2).logits, whole[:, -2:], rtol=1e-4, atol=1e-4
    )
    with stack.disabled("pointer-network"):
        cache = stack.model(TEXT[:, :5], use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="pointer-network keys: the cache holds 5 rows"):
        stack.model(TEXT[:, 5:], past_key_values=cache)
    assert torch.equal(stack.model(TEXT).logits, whole)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}]
)
def test_generation(options: dict[str, Any]) -> None:
    stack, texts = stack_of(), ["one and two", "three"]
    found = stack.generate(texts, max_new_tokens=6, **options)
    assert found == [stack.generate(text, max_new_tokens=6, **options) for text in texts]
    if "num_beams" in options:
        return
    for text, written in zip(texts, found, strict=True):
        ids = torch.tensor([TOKENIZER(text).input_ids])
        known = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, by_hand(stack, tiny("llama"), ids)[-1].argmax()[None, None]], 1)
        assert written == TOKENIZER.decode(ids[0, known:], skip_special_tokens=True)


class Marks(Plugin):
    """More new tokens than the embedding has rows to spare."""

    @hookimpl
    def inject(self, model: Any) -> None:
        self.rows = model.vocabulary([f"<{n}>" for n in range(70)])


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_new_tokens_are_copied_where_the_head_knows_them(first: bool) -> None:
    pointer, marks = PointerNetwork(size=8, gate=-9.0), ("marks", Marks())
    stack = Stack(tiny("llama"), [marks, pointer] if first else [pointer, marks], tokenizer=tiny_tokenizer())
    new = stack.plugins["marks"].rows.ids[-1]  # type: ignore[attr-defined]
    assert new >= 320
    p = stack.model(torch.tensor([[8, new]])).logits.softmax(-1)[0, 1]
    assert (float(p[new]) > 0.1) is first
    assert p[8] > 0.1


def test_gradients_are_those_of_the_mixture() -> None:
    stack = stack_of("llama", Lora(rank=2))
    batch = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "labels": TEXT}
    loss = stack.train_step(batch)
    assert float(loss) == pytest.approx(
        float(F.nll_loss(by_hand(stack, tiny("llama"), TEXT)[:-1].log(), TEXT[0, 1:])), rel=1e-3
    )
    copy = copy_of(stack)
    for p in (copy.gate.bias, copy.pointer.v.weight):
        found, eps = p.grad.flatten()[0].item(), 1e-2
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                p.view(-1)[0] += sign * eps
                losses.append(stack.model(**batch).loss.item())
        assert found == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=0.05, abs=1e-4)
        with torch.no_grad():
            p.view(-1)[0] += eps
    assert all(p.grad.isfinite().all() for p in stack.model.parameters() if p.requires_grad)
    assert any(p.grad.any() for p in stack.ledger.parameters("lora"))
    assert copy.noted is None


def test_it_learns_to_copy_where_the_frozen_model_cannot(tmp_path: Path) -> None:
    rows = [{"prompt": f"{word}, or", "completion": word} for word in ("zebra", "quartz", "jumbo", "vex")]
    options = {"steps": 25, "batch_size": 4, "learning_rate": 0.05, "max_length": 64}
    stack = Stack(tiny("llama"), [PointerNetwork(size=16)], tokenizer=TOKENIZER)
    report = stack.train(rows, **options)
    assert report.last_loss < report.first_loss - 1
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=TOKENIZER)
    with torch.no_grad():
        assert torch.equal(again.model(TEXT).logits, stack.model(TEXT).logits)


@torch.no_grad()
def test_in_bfloat16_the_pointer_stays_in_full_precision() -> None:
    stack = stack_of(model=tiny("llama").to(torch.bfloat16))
    assert copy_of(stack).gate.weight.dtype == torch.float32
    logits = stack.model(TEXT).logits
    assert logits.dtype == torch.bfloat16
    exact_ = stack_of().model(TEXT).logits.softmax(-1)
    assert (logits.float().softmax(-1) - exact_).abs().max() < 0.1


@torch.no_grad()
def test_parts_of_the_model_alone_are_left_alone() -> None:
    stack, plain = stack_of(), tiny("llama")
    h = stack.model.model(TEXT).last_hidden_state
    assert torch.equal(h, plain.model(TEXT).last_hidden_state)
    assert torch.equal(stack.model.lm_head(h), plain.lm_head(h))


# ------------------------------------------------------------------------------------------------ measuring and errors
def test_scores_and_the_figure(tmp_path: Path) -> None:
    stack = stack_of(**SMALL)
    found = stack.evaluate(metrics=["pointer-network"], output_dir=tmp_path / "new" / "figures")
    shares = experiment(PointerNetwork(**SMALL).config)[1]
    assert {name: score.value for name, score in found.items()} == {
        f"exact/n-{n}": share for n, share in shares
    }
    page = (tmp_path / "new" / "figures" / "pointer-network.html").read_text()
    assert page.count("<polyline") == 1
    assert "sorting</span>" in page


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("t5", "T5ForConditionalGeneration is no decoder"),
        ("bert", "BertForMaskedLM is no decoder"),
        ("mamba", "mamba has no attention"),
        ("gemma2", r"gemma2 changes logits behind its head \(final_logit_softcapping\)"),
    ],
)
def test_models_without_a_place_for_it(arch: str, told: str) -> None:
    with pytest.raises(ArchitectureError, match=f"pointer-network: {told}"):
        stack_of(arch)


def test_scaled_logits_are_refused_and_a_scale_of_1_is_none() -> None:
    with pytest.raises(ArchitectureError, match="logits_scaling"):
        stack_of(model=tiny("granitemoe", logits_scaling=2.0))
    stack_of(model=tiny("granitemoe", logits_scaling=1.0))


def test_embeddings_are_refused() -> None:
    stack = stack_of()
    with pytest.raises(UnsupportedError, match="pointer-network: what is copied are token ids"):
        stack.model(inputs_embeds=stack.model.get_input_embeddings()(TEXT))


def test_rows_of_a_layout_of_their_own_are_refused() -> None:
    with pytest.raises(ConflictError, match="lays several texts out in one row"):
        stack_of("llama", PrefixGrouper())


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0}, {"gate": math.inf}, {"task": "tsp"}, {"lengths": ()}, {"lengths": (1,)}, {"longest": 2},
        {"width": 0}, {"steps": 0}, {"batch": 0}, {"learning_rate": 0},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=next(iter(options))):
        PointerNetwork(**options)
