"""AlignDistil: the teacher and its loss by hand and against the official lines, the phases, the rows."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Plugin, Stack, TrainStep, companion, hookimpl
from peftx.engines.data import IGNORE, Collator, encode_pair, prompt_ids, together
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError, UnsupportedError
from peftx.kernel.calls import own_lengths_of
from peftx.testing import conformance
from peftx.testing.models import EOS, PAD, tiny, tiny_tokenizer
from peftx_aligndistil import (
    PAIR,
    AlignDistil,
    at_answers,
    distillation,
    dpo_loss,
    log_probs,
    row_means,
    teacher,
)
from peftx_d2o import D2o
from peftx_dpo_prefix_sharing import DpoPrefixSharing
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning
from peftx_sift import Sift

test_conformance = conformance("aligndistil")

TOKENIZER = tiny_tokenizer()
ROWS = [
    {"prompt": f"Q{i}: is {word} nice?\nA:", "chosen": "yes, " + word, "rejected": "no" + "!" * i}
    for i, word in enumerate(("tea", "rain", "sleep"))
]
SWAPPED = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
OPTIONS: dict[str, Any] = {"batch_size": 3, "learning_rate": 1e-2, "max_length": 64}


def build(*others: Any, arch: str = "llama", **options: Any) -> Stack:
    plugin = AlignDistil(**{"teacher_steps": 1, **options})
    return Stack(tiny(arch), [*(others or (Lora(rank=2),)), plugin], tokenizer=TOKENIZER)


def shift(stack: Stack, seed: int) -> None:
    """Move what trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in stack.model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def batch_of(stack: Stack, rows: Any = ROWS, side: Any = "right") -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, list(rows), seed=0, max_length=64))
    return Collator(PAD, padding_side=side, own_lengths=own_lengths_of(stack.model))(list(data.train))


def known(stack: Stack) -> dict[str, Any]:
    return stack.memory["aligndistil"]  # type: ignore[no-any-return]


def walk(stack: Stack, batch: dict[str, Tensor], steps: int) -> list[float]:
    """Steps of a loop of one's own; what trains is moved behind each, as an optimizer would."""
    losses = []
    for seed in range(steps):
        losses.append(float(stack.train_step(batch)))
        stack.model.zero_grad()
        stack.trained_steps += 1
        shift(stack, seed)
    return losses


def gradients(stack: Stack) -> list[Tensor]:
    return [p.grad.clone() for p in stack.model.parameters() if p.requires_grad]


def number(shape: Any, n: int) -> Tensor:
    """Numbers between -2 and 2 that no generator decides."""
    i = torch.arange(torch.Size(shape).numel())
    return 2 * (((31 * i * i + 17 * i * n + 101 * n + 7) % 1009) / 504.5 - 1).float().view(shape)


# ------------------------------------------------------------------------------------------------------- the teacher
def test_the_teacher_by_hand() -> None:
    """Over three tokens, number by number; the most likely one is that of the extrapolated logits."""
    for strength, adaptive, contrast in (
        (10.0, True, True),
        (0.7, False, True),
        (1.5, True, False),
        (0.4, False, False),
    ):
        dpo, other = number((5, 3), 1), number((5, 3), 2)
        log_p, a = teacher(dpo, other, strength=strength, adaptive=adaptive, contrast=contrast)
        for s in range(5):
            p, q = (
                [math.exp(z) / sum(map(math.exp, row)) for z in row]
                for row in (dpo[s].tolist(), other[s].tolist())
            )
            distance = sum(abs(x - y) for x, y in zip(p, q, strict=True))
            alpha = strength * distance + 1e-3 if adaptive else strength
            assert a[s].item() == pytest.approx(alpha, rel=1e-5)
            base = dpo[s] if contrast else other[s]
            z = [float(b) + alpha * float(x - y) for b, x, y in zip(base, dpo[s], other[s], strict=True)]
            total = sum(map(math.exp, z))
            assert log_p[s].exp().tolist() == pytest.approx([math.exp(x) / total for x in z], rel=1e-4)
            assert int(log_p[s].argmax()) == z.index(max(z))


def test_where_the_two_models_agree_the_teacher_is_the_dpo_model() -> None:
    dpo = number((4, 7), 1)
    log_p, a = teacher(
        dpo, dpo + 3.0, strength=10.0, adaptive=True, contrast=True
    )  # a constant is no difference
    torch.testing.assert_close(log_p, dpo.log_softmax(-1))
    torch.testing.assert_close(a, torch.full((4, 1), 1e-3), rtol=0, atol=1e-5)


def test_the_first_theorem_at_equal_weights_is_the_dpo_model() -> None:
    dpo, start = number((4, 7), 1), number((4, 7), 2)
    log_p, a = teacher(dpo, start, strength=1.0, adaptive=False, contrast=False)
    torch.testing.assert_close(log_p, dpo.log_softmax(-1))
    assert (a == 1).all()


def test_the_adaptive_factor_lies_between_its_bounds() -> None:
    one, two = 50 * torch.eye(4)[:2], 50 * torch.eye(4)[2:]
    _, a = teacher(one, two, strength=3.0, adaptive=True, contrast=True)
    torch.testing.assert_close(a, torch.full((2, 1), 6 + 1e-3))
    _, a = teacher(5 * number((90, 7), 1), 5 * number((90, 7), 2), strength=3.0, adaptive=True, contrast=True)
    assert ((a >= 1e-3) & (a <= 6 + 1e-3)).all()
    assert a.std() > 0.1


def test_the_optimum_is_that_of_rlhf_with_the_contrastive_reward() -> None:
    """p* maximises E r - w KL(pi || pi_dpo) with r = beta log pi_dpo / pi_rev and w = beta / a, as no other does."""
    beta, strength = 0.3, 0.8
    dpo, rev = number((1, 5), 1), number((1, 5), 2)
    log_p, a = teacher(dpo, rev, strength=strength, adaptive=False, contrast=True)
    r = beta * (dpo.log_softmax(-1) - rev.log_softmax(-1))

    def goal(log_pi: Tensor) -> Tensor:
        pi = log_pi.exp()
        return (pi * r).sum(-1) - beta / strength * (pi * (log_pi - dpo.log_softmax(-1))).sum(-1)

    best = goal(log_p)
    for n in range(20):
        other = (log_p + 0.3 * number((1, 5), 3 + n)).log_softmax(-1)
        fall = distillation(other, log_p, a, beta)  # and what is lost is the loss
        torch.testing.assert_close(best - goal(other), fall, rtol=1e-3, atol=1e-6)


def test_the_loss_and_its_gradient_in_closed_form() -> None:
    z = number((4, 6), 1).requires_grad_()
    log_p, a = number((4, 6), 2).log_softmax(-1), torch.tensor([[0.5], [1.0], [2.0], [7.0]])
    loss = distillation(z, log_p, a, 0.3)
    loss.sum().backward()
    pi, ratio = z.detach().softmax(-1), z.detach().log_softmax(-1) - log_p
    divergence = (pi * ratio).sum(-1, keepdim=True)
    torch.testing.assert_close(loss.detach(), (0.3 / a * divergence)[:, 0])
    torch.testing.assert_close(z.grad, 0.3 / a * pi * (ratio - divergence))


def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient() -> None:
    log_p, a = teacher(number((3, 6), 1), number((3, 6), 2), strength=10.0, adaptive=True, contrast=True)
    z = (log_p + 5.0).requires_grad_()
    loss = distillation(z, log_p, a, 0.1)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6
    assert z.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("contrast", "adaptive", "strength", "official"),
    [
        (True, True, 10.0, 0.21025097),  # "aligndistil"
        (False, True, 2.0, 0.16682696),  # "theorem1_adaptive"
        (False, False, 0.1 / 0.04, 0.16057721),  # "theorem1"
        (True, False, 0.1 / 0.04, 0.23852727),  # "theorem1_contrast"
    ],
)
def test_equals_the_official_loss(contrast: bool, adaptive: bool, strength: float, official: float) -> None:
    """Numbers of aligndistil_offpolicy_trainer.py, songmzhang/AlignDistil, commit f80ca4e, given these states."""
    student, dpo, other = (number((2, 6, 9), n) for n in (1, 2, 3))
    labels = torch.full((2, 6), IGNORE)
    labels[0, 2:5], labels[1, 3:5] = 4, 5
    log_p, a = teacher(
        at_answers(dpo, labels),
        at_answers(other, labels),
        strength=strength,
        adaptive=adaptive,
        contrast=contrast,
    )
    loss = row_means(distillation(at_answers(student, labels), log_p, a, 0.1), labels)
    assert float(loss) == pytest.approx(official, abs=1e-6)


def test_means_are_over_tokens_and_then_over_rows() -> None:
    labels = torch.tensor([[IGNORE, 1, IGNORE, IGNORE], [IGNORE, 2, 3, 4]])
    assert float(row_means(torch.tensor([6.0, 1.0, 2.0, 3.0]), labels)) == pytest.approx((6 + 2) / 2)


# --------------------------------------------------------------------------------------------------------------- DPO
def test_dpo_by_hand() -> None:
    loss = dpo_loss(torch.tensor([1.0, -0.5, 0.25, 2.0]), 0.4)
    expected = [math.log1p(math.exp(-0.4 * h)) for h in (1.0 - 0.25, -0.5 - 2.0)]
    assert loss.tolist() == pytest.approx(expected)


def test_the_first_phase_is_dpo() -> None:
    """Loss and gradients of the DPO plugin, which equals its own official code."""
    one = build(beta=0.2, teacher_steps=5)
    two = Stack(tiny("llama"), [Lora(rank=2), DpoPrefixSharing(beta=0.2)], tokenizer=TOKENIZER)
    data = two.prepare(as_training_data(two, ROWS, seed=0, max_length=64))
    losses = []
    for stack, batch in ((one, batch_of(one)), (two, Collator(PAD)(list(data.train)))):
        shift(stack, 1)
        assert float(stack.train_step(batch)) == pytest.approx(
            math.log(2), abs=1e-5
        )  # of the run's own start
        stack.model.zero_grad()
        shift(stack, 2)
        stack.trained_steps += 1
        losses.append(float(stack.train_step(batch)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != pytest.approx(math.log(2), abs=1e-3)
    for a, b in zip(gradients(one), gradients(two), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_the_reverse_model_is_the_dpo_model_of_swapped_pairs() -> None:
    """To the bit: it begins where the first one began, with an optimizer that knows nothing."""
    found: dict[str, list[float]] = {}
    for name, rows in (("as they are", ROWS), ("swapped", SWAPPED)):
        report = build(teacher_steps=3).train(rows, steps=7, schedule="constant", **OPTIONS)
        found[name] = [loss for _, loss in report.losses]
    assert found["as they are"][3:6] == pytest.approx(found["swapped"][:3], abs=1e-6)
    assert found["swapped"][3:6] == pytest.approx(found["as they are"][:3], abs=1e-6)
    assert found["swapped"][1] != pytest.approx(found["as they are"][1], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- phases
def test_a_phase_begins_from_the_start_and_keeps_what_the_last_one_trained() -> None:
    stack = build()
    batch = batch_of(stack)
    seen: list[dict[str, Tensor]] = []
    for seed in range(3):
        stack.train_step(batch)
        seen.append({name: x.detach().clone() for name, x in stack.ledger.trained().items()})
        stack.model.zero_grad()
        stack.trained_steps += 1
        shift(stack, seed)
        if seed < 2:
            end = {name: x.detach().clone() for name, x in stack.ledger.trained().items()}
        if seed == 0:
            first = end
    for name, x in seen[0].items():
        assert torch.equal(seen[1][name], x)
        assert torch.equal(seen[2][name], x)
        assert torch.equal(known(stack)["start"][name], x)
        assert torch.equal(known(stack)["dpo"][name], first[name])
        assert torch.equal(known(stack)["reverse"][name], end[name])
    stack.train_step(batch)  # and the last phase goes on
    now = stack.ledger.trained()
    assert any(not torch.equal(now[name], x) for name, x in seen[0].items())


def test_the_optimizer_forgets_between_phases() -> None:
    class Counts(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            def count(optimizer: Any) -> None:
                seen.append({int(state["step"]) for state in optimizer.state.values()})

            step.after_update(count)
            return (yield)

    for steps, expected in ((1, [1, 1, 1, 2]), (2, [1, 2, 1, 2, 1, 2, 3])):
        seen: list[set[int]] = []
        stack = build(Lora(rank=2), Counts(), teacher_steps=steps)
        options = OPTIONS | {"batch_size": 1, "gradient_accumulation": 3}
        stack.train(ROWS, steps=len(expected), **options)
        assert seen == [{count} for count in expected]


def test_phases_follow_from_what_is_to_be_trained() -> None:
    def names(**options: Any) -> list[str]:
        return [phase.name for phase in AlignDistil(**options).phases()]

    assert names() == ["dpo", "reverse", "distil"]
    assert names(contrast=False) == ["dpo", "distil"]
    assert names(dpo="a") == ["reverse", "distil"]
    assert names(dpo="a", contrast=False) == names(dpo="a", reverse="b") == ["distil"]
    assert [phase.share for phase in AlignDistil(teacher_steps=0.1).phases()] == [0.1, 0.1, None]


def test_another_run_begins_anew() -> None:
    stack = build()
    batch = batch_of(stack)
    walk(stack, batch, 4)
    before = {name: x.detach().clone() for name, x in stack.ledger.trained().items()}
    stack.trained_steps = 0
    assert float(stack.train_step(batch)) == pytest.approx(math.log(2), abs=1e-5)
    assert all(torch.equal(x, before[name]) for name, x in stack.ledger.trained().items())
    assert set(known(stack)) == {"start", "phase"}


def test_a_run_that_does_not_remember_its_start_is_refused() -> None:
    stack = build(teacher_steps=2)
    stack.trained_steps = 1
    with pytest.raises(PeftxError, match="aligndistil: step 1 does not remember how the run started"):
        stack.train_step(batch_of(stack))


def test_places_of_sparse_entries_belong_to_a_teacher() -> None:
    """SIFT moves its entries; the values of a teacher stand where they stood."""
    stack = build(Sift(density=0.2, every=1, gamma=1, rate=0.5), teacher_steps=3)
    plugin, batch = stack.plugins["aligndistil"], batch_of(stack)
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        stack.train_step(batch, optimizer=optimizer)
    places = {name: x.clone() for name, x in stack.ledger.trained().items() if not x.is_floating_point()}
    assert places
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        stack.model.eval()
        expected = stack.model(**inputs).logits
    for _ in range(3):
        stack.train_step(batch, optimizer=optimizer)
    moved = {name: x for name, x in stack.ledger.trained().items() if name in places}
    assert any(not torch.equal(x, places[name]) for name, x in moved.items())
    step = TrainStep(stack, {**inputs, "labels": batch["labels"]}, index=6)
    torch.testing.assert_close(plugin.logits(step, "dpo"), expected)
    assert all(x is moved[name] for name, x in stack.ledger.trained().items() if name in places)


# ------------------------------------------------------------------------------------------------- the distillation
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("states", "contrast", "adaptive"), [("both", True, True), ("chosen", False, False)])
def test_loss_and_gradients_are_those_of_rows_by_themselves(
    side: Any, states: Any, contrast: bool, adaptive: bool
) -> None:
    stack = build(states=states, contrast=contrast, adaptive=adaptive, strength=3.0, beta=0.2)
    batch = batch_of(stack, side=side)
    shift(stack, 9)
    teachers = 2 if contrast else 1
    walk(stack, batch, teachers + 1)
    loss = stack.train_step(batch)
    found = gradients(stack)
    stack.model.zero_grad()

    frozen = {}
    for who in ("start", "dpo", "reverse")[: teachers + 1]:
        frozen[who] = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=TOKENIZER)
        with torch.no_grad():
            for name, x in frozen[who].ledger.trained().items():
                x.copy_(known(stack)[who][name])
    losses = []
    for answer in ("chosen", "rejected")[: 2 if states == "both" else 1]:
        for row in ROWS:
            pair = encode_pair(TOKENIZER, row["prompt"], row[answer], max_length=64)
            begin = pair.labels.index(next(label for label in pair.labels if label != IGNORE))
            places = range(begin - 1, len(pair.input_ids) - 1)  # from before the first token to before EOS
            ids = torch.tensor([pair.input_ids])

            def logits(model: nn.Module, ids: Tensor = ids) -> Tensor:
                return model(input_ids=ids).logits[0]  # type: ignore[no-any-return]

            with torch.no_grad():
                dpo = logits(frozen["dpo"].model)
                other = logits(frozen["reverse" if contrast else "start"].model)
            z, each = logits(stack.model), []
            for t in places:
                log_p, a = teacher(dpo[t], other[t], strength=3.0, adaptive=adaptive, contrast=contrast)
                each.append(distillation(z[t], log_p, a, 0.2))
            losses.append(torch.stack(each).mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in found)
    assert largest > 1e-3
    for a, b in zip(found, gradients(stack), strict=True):
        assert torch.allclose(a, b, atol=1e-4 * largest)


def test_answers_are_drawn_from_the_student_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is that of rows with these answers, which end with their end token, or when they are long enough."""
    seen: list[dict[str, Tensor]] = []
    draw = AlignDistil.drawn
    monkeypatch.setattr(AlignDistil, "drawn", lambda *args: seen.append(draw(*args)) or seen[-1])
    stack = build(states="drawn", max_new_tokens=6)
    stack.model.generation_config.top_k = 1
    rows = [row for row in ROWS for _ in range(20)]
    batch = batch_of(stack, rows, side="left")
    walk(stack, batch, 2)
    assert seen == []  # DPO is of the rows
    for _ in range(2):
        torch.manual_seed(7)
        loss = float(stack.train_step(batch))
        stack.model.zero_grad()
        stack.trained_steps += 1
        shift(stack, 5)
    found = [[y[y != IGNORE].tolist() for y in each["labels"]] for each in seen]
    assert found[0] != found[1]  # of what the student has become, at the same random numbers
    ended = [y for y in found[1] if EOS in y]
    assert ended
    assert all(y.index(EOS) == len(y) - 1 for y in ended)
    assert {len(y) for y in found[1] if EOS not in y} == {6}
    assert len({tuple(y) for y in found[1]}) > 40  # drawn, whatever the model's own settings are
    ids, labels = seen[1]["input_ids"], seen[1]["labels"]
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    for row, x, y in zip(rows, ids, labels, strict=True):
        begin = int((y != IGNORE).long().argmax())
        assert x[:begin].tolist() == prompt_ids(TOKENIZER, row["prompt"])
    assert seen[1]["attention_mask"].sum(1).tolist() == [
        len(prompt_ids(TOKENIZER, row["prompt"])) + len(y) for row, y in zip(rows, found[1], strict=True)
    ]
    assert math.isfinite(loss)


def test_drawn_answers_are_distilled_as_those_of_the_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlignDistil, "drawn", lambda self, step: step.batch)
    losses = []
    for states in ("chosen", "drawn"):
        stack = build(states=states)
        shift(stack, 9)
        losses.append(walk(stack, batch_of(stack), 4))
    assert losses[0] == losses[1]


def test_drawn_answers_stop_where_the_window_ends_and_have_their_columns() -> None:
    class Asks(Plugin):
        @hookimpl
        def inject(self, model: Any) -> None:
            model.column("user")

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            loss = yield
            seen.append((step.batch["user"].tolist(), step.batch["input_ids"].shape[1]))
            return loss

    seen: list[tuple[list[int], int]] = []
    stack = build(
        Lora(rank=2), PromptTuning(length=2), Asks(), states="drawn", max_new_tokens=900, contrast=False
    )
    batch = batch_of(stack, [{**row, "user": 4 + i} for i, row in enumerate(ROWS)])
    walk(stack, batch, 2)
    assert seen[0][0] == [4, 5, 6] * 2
    assert seen[1][0] == [4, 5, 6]
    assert 30 < seen[1][1] <= 126


def test_the_student_comes_to_prefer_what_is_chosen() -> None:
    stack = build(strength=2.0, teacher_steps=4)
    batch = together(batch_of(stack), PAIR, pad=PAD, owner="aligndistil")
    labels, inputs = batch["labels"], {name: batch[name] for name in ("input_ids", "attention_mask")}

    def margins() -> Tensor:
        with torch.no_grad():
            chosen, rejected = log_probs(stack.model(**inputs).logits, labels).chunk(2)
        return chosen - rejected

    before = margins()
    report = stack.train(ROWS, steps=18, schedule="constant", **OPTIONS)
    losses = [loss for _, loss in report.losses]
    assert losses[-1] < 0.7 * losses[8]
    assert (margins() > before + 1).all()


def test_teachers_may_be_models_of_their_own(tmp_path: Path) -> None:
    """Bundles of the two teachers give the loss that a run gives which trains them itself."""
    stack = build()
    batch = batch_of(stack)
    shift(stack, 9)
    walk(stack, batch, 2)
    expected = float(stack.train_step(batch))
    for who in ("dpo", "reverse"):
        other = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=TOKENIZER)
        with torch.no_grad():
            for name, x in other.ledger.trained().items():
                x.copy_(known(stack)[who][name])
        other.save(tmp_path / who)
    named = build(dpo=str(tmp_path / "dpo"), reverse=str(tmp_path / "reverse"))
    for who in ("dpo", "reverse"):  # from a path of its own the tiny base is not found again
        named.companions[str(tmp_path / who)] = companion(
            named, peftx.load(tmp_path / who, model=tiny("llama"), tokenizer=TOKENIZER)
        )
    with torch.no_grad():
        for name, x in named.ledger.trained().items():
            x.copy_(known(stack)["start"][name])
    assert float(named.train_step(batch)) == pytest.approx(expected, rel=1e-4)


def test_a_teacher_whose_head_is_rounded_up_is_cut() -> None:
    """Qwen's sizes have heads of different numbers of rows, and one tokenizer."""
    stack = build(dpo="wide", reverse="own")
    wide = tiny("llama")
    wide.resize_token_embeddings(wide.config.vocab_size + 16)
    stack.companions |= {"wide": companion(stack, wide), "own": companion(stack, tiny("mistral"))}
    assert math.isfinite(stack.train_step(batch_of(stack)))


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    stack = build(dpo="peftx:tiny", contrast=False)
    with pytest.raises(PeftxError, match="'peftx:tiny' has another vocabulary"):
        stack.train_step(batch_of(stack))


# ------------------------------------------------------------------------------------------------------------- rows
def test_both_answers_are_rows_of_one_batch() -> None:
    stack = build()
    for side in ("left", "right"):
        rows = together(batch_of(stack, side=side), PAIR, pad=PAD, owner="aligndistil")
        pairs = [
            encode_pair(TOKENIZER, row["prompt"], row[name], max_length=64)
            for name in ("chosen", "rejected")
            for row in ROWS
        ]
        expected = Collator(PAD)([{"input_ids": p.input_ids, "labels": p.labels} for p in pairs])
        assert all(torch.equal(rows[name], expected[name]) for name in expected)


def test_a_token_whose_id_is_zero_counts() -> None:
    ids, mask, labels = torch.tensor([[5, 0, 7]]), torch.ones(1, 3).long(), torch.tensor([[IGNORE, 0, 7]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    others = {"rejected_ids": torch.tensor([[5, 0]]), "rejected_labels": torch.tensor([[IGNORE, 0]])}
    rows = together(batch | others, PAIR, pad=9, owner="aligndistil")
    assert rows["input_ids"].tolist() == [[5, 0, 7], [5, 0, 9]]
    assert rows["labels"].tolist() == [[IGNORE, 0, 7], [IGNORE, 0, IGNORE]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_rows_of_evaluation_are_rewritten_too() -> None:
    stack = build()
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    data.eval = data.train
    stack.prepare(data)
    assert data.format == "tokenized"
    assert data.train[:] == data.eval[:]
    assert set(data.eval.column_names) == {"input_ids", "labels", "rejected_ids", "rejected_labels"}


def test_columns_that_other_plugins_read_come_along() -> None:
    class Asks(Plugin):
        @hookimpl
        def inject(self, model: Any) -> None:
            model.column("user")

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            loss = yield
            seen.append(step.batch["user"].tolist())
            labelled.append((step.batch["labels"] != IGNORE).any(1).tolist())
            return loss

    seen: list[list[int]] = []
    labelled: list[list[bool]] = []
    stack = build(Lora(rank=2), PromptTuning(length=2), Asks())
    rows = [{**row, "user": 4 + i, "note": "of nobody"} for i, row in enumerate(ROWS)]
    batch = batch_of(stack, rows)
    assert "note" not in batch
    stack.train_step(batch)
    assert seen == [[4, 5, 6, 4, 5, 6]]
    assert labelled == [[True] * 6]
    with pytest.raises(PeftxError, match="column 'user' has a value a token of one text"):
        stack.train_step(batch | {"user": torch.ones_like(batch["input_ids"])})


def test_forward_passes_alone_train_on_it_too() -> None:
    report = build(Lora(rank=2), Mezo(eps=1e-2)).train(ROWS, steps=4, **OPTIONS)
    assert all(math.isfinite(loss) for _, loss in report.losses)


# ------------------------------------------------------------------------------------------------------- what is wrong
def test_equal_answers_are_refused() -> None:
    rows = [*ROWS, {"prompt": "Q", "chosen": " same", "rejected": "same"}]
    with pytest.raises(
        DataError, match=r"aligndistil: row 3 \(counting from 0\): chosen and rejected are the same"
    ):
        build().train(rows, steps=3)


def test_rows_and_batches_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="aligndistil: the rows are of format 'text'"):
        build().train([{"text": "once"}], steps=3)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(
        PeftxError, match="aligndistil: the batch has no attention_mask, labels, rejected_ids"
    ):
        build().train_step({"input_ids": ids})


@pytest.mark.parametrize("arch", ["bert", "t5", "vit"])
def test_models_that_do_not_go_on_with_a_text(arch: str) -> None:
    with pytest.raises(
        ArchitectureError, match=f"aligndistil: {type(tiny(arch)).__name__} is no decoder that writes text"
    ):
        build(arch=arch)


def test_two_methods_that_train_on_preferences_are_refused() -> None:
    with pytest.raises(ConflictError, match="preference"):
        build(Lora(rank=2), D2o(samples=2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"beta": 0}, "beta"),
        ({"strength": 0}, "strength"),
        ({"strength": math.inf}, "strength"),
        ({"states": "on-policy"}, "states"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"teacher_steps": 2.5}, "must be whole"),
        ({"teacher_steps": 0}, "teacher_steps"),
        ({"reverse": "a", "contrast": False}, "reverse is not looked at without contrast"),
    ],
)
def test_bad_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PeftxError, match=told):
        AlignDistil(**options)


def test_a_run_too_short_for_its_phases_is_refused() -> None:
    with pytest.raises(PeftxError, match="none is left for 'distil'"):
        build(teacher_steps=2).train(ROWS, steps=4)
