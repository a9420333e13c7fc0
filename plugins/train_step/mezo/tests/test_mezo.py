from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftx import Claim, Plugin, Stack, TrainStep, hookimpl
from peftx.engines.data import CLASS_INDEX, IGNORE
from peftx.errors import ConflictError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_mezo import Mezo, digest, move, perturb, projected_gradient, replay, wrong_share

test_conformance = conformance("mezo")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def batch_for(stack: Stack, *, seed: int = 0, length: int = 8) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, batch=4, length=length, seed=seed)
    return inputs | {"labels": inputs["input_ids"]}


def lora_stack(
    *more: Plugin, dropout: float = 0.0, dtype: torch.dtype = torch.float32, rank: int = 2
) -> Stack:
    model = tiny("llama").to(dtype)
    return Stack(model, [Lora(rank=rank, dropout=dropout), *more], tokenizer=tiny_tokenizer())


def weights(stack: Stack) -> list[Tensor]:
    return [p.detach().clone() for p in stack.model.parameters() if p.requires_grad]


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def test_perturbations_give_the_weights_back() -> None:
    stack = lora_stack(Mezo())
    before = weights(stack)
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    with torch.no_grad():
        perturb(parameters, 7, 1e-3)
        away = weights(stack)
        perturb(parameters, 7, -2e-3)
        perturb(parameters, 7, 1e-3)
    assert difference(away, before) > 1e-3
    assert difference(weights(stack), before) < 1e-7
    z = [(a - b) / 1e-3 for a, b in zip(away, before, strict=True)]
    values = torch.cat([v.flatten() for v in z])
    assert abs(float(values.mean())) < 0.1
    assert 0.9 < float(values.std()) < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_do_not_drift(dtype: torch.dtype) -> None:
    stack = lora_stack(Mezo(), dtype=dtype)
    before, batch = weights(stack), batch_for(stack)
    assert {w.dtype for w in before} == {dtype}
    for index in range(50):
        stack.run_train_step(TrainStep(stack, batch, index=index, learning_rate=0.0))
    assert difference(weights(stack), before) == 0
    for index in range(5):
        stack.run_train_step(TrainStep(stack, batch, index=index, learning_rate=1e-1))
    assert difference(weights(stack), before) > 1e-3


@torch.no_grad()
def test_gradient_along_z_of_a_linear_and_a_quadratic_function() -> None:
    theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    z = torch.randn(2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = torch.tensor([3.0, 0.5], dtype=torch.float64)
    g, loss = projected_gradient([theta], 5, 1e-2, lambda: float(slope @ theta))
    assert abs(g - float(slope @ z)) < 1e-12  # exact for a linear function
    assert abs(loss - 2.0) < 1e-12
    g, loss = projected_gradient([theta], 5, 1e-2, lambda: float(theta @ theta))
    assert abs(g - float(2 * theta @ z)) < 1e-12  # and for a quadratic one, whose even part cancels
    assert abs(loss - 5.0 - 1e-4 * float(z @ z)) < 1e-12


@torch.no_grad()
def test_mean_of_many_estimates_is_the_gradient() -> None:
    theta = nn.Parameter(torch.linspace(-1, 1, 12))
    curvature = torch.linspace(0.5, 3, 12)
    total = torch.zeros(12)
    for seed in range(1500):
        g, _ = projected_gradient(
            [theta], seed, 1e-2, lambda: float(0.5 * (curvature * theta.square()).sum())
        )
        total += g * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    gradient = curvature * torch.linspace(-1, 1, 12)
    assert torch.cosine_similarity(total, gradient, dim=0) > 0.97
    assert 0.9 < float((total / 1500).norm() / gradient.norm()) < 1.1


@torch.no_grad()
def test_the_update_by_hand() -> None:
    theta, gain = nn.Parameter(torch.full((1, 1), 2.0)), nn.Parameter(torch.full((1,), 2.0))
    drawn = [torch.randn(2, 1, generator=torch.Generator().manual_seed(s)).flatten().tolist() for s in (1, 2)]
    move([theta, gain], {"seeds": [1, 2], "g": [4.0, -2.0], "rate": 0.1}, 0.5)
    # two seeds: mean of g z; decay 0.1 * 0.5 of the matrix, none of the vector
    shift = [0.1 * (4 * one - 2 * two) / 2 for one, two in zip(*drawn, strict=True)]
    assert abs(float(theta) - (2.0 * 0.95 - shift[0])) < 1e-6
    assert abs(float(gain) - (2.0 - shift[1])) < 1e-6


def test_no_graph_is_kept_and_no_gradient_left() -> None:
    saved: list[int] = []

    def steps(stack: Stack) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            stack.run_train_step(TrainStep(stack, batch_for(stack), learning_rate=1e-3))
        return len(saved)

    stack = lora_stack(Mezo())
    assert steps(stack) == 0
    assert all(p.grad is None for p in stack.model.parameters())
    assert steps(lora_stack()) > 50  # the backward pass that it replaces


class Peak(TorchDispatchMode):
    """Most bytes of new storages alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def peak(stack: Stack, run: Any) -> int:
    batch = batch_for(stack, length=64)
    run(stack, batch)  # buffers of the first call
    with Peak() as mode:
        run(stack, batch)
    return mode.peak


def forward(stack: Stack, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        stack.model(**batch)


def step(stack: Stack, batch: dict[str, Tensor]) -> None:
    stack.run_train_step(TrainStep(stack, batch, learning_rate=1e-3))


def test_peak_memory_is_that_of_a_forward_pass() -> None:
    inference, mezo, backward = (
        peak(lora_stack(), forward),
        peak(lora_stack(Mezo()), step),
        peak(lora_stack(), step),
    )
    assert inference > 300_000  # logits alone: 4 * 64 * 320 numbers
    assert mezo < 1.05 * inference
    assert backward > 1.5 * inference


def test_peak_memory_of_narrow_weights_is_a_copy_more() -> None:
    copy = sum(w.nbytes for w in weights(lora_stack(dtype=torch.bfloat16, rank=16)))
    inference, mezo = (
        peak(lora_stack(*plugins, dtype=torch.bfloat16, rank=16), run)
        for plugins, run in (((), forward), ((Mezo(),), step))
    )
    assert copy > 0.02 * inference
    assert abs(mezo - inference - copy) < 0.1 * copy


@pytest.mark.parametrize("options", [{}, {"samples": 4}])
def test_loss_goes_down(options: dict[str, int]) -> None:
    stack = lora_stack(Mezo(**options))
    batch = batch_for(stack)
    torch.manual_seed(0)
    losses = [
        float(stack.run_train_step(TrainStep(stack, batch, index=i, learning_rate=5e-3))) for i in range(40)
    ]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1


def test_rate_zero_does_not_move() -> None:
    stack = lora_stack(Mezo(weight_decay=0.1))
    before = weights(stack)
    stack.run_train_step(TrainStep(stack, batch_for(stack), learning_rate=0.0))
    assert difference(weights(stack), before) < 1e-7


def test_micro_batches_share_their_seeds_and_update_once() -> None:
    stack = lora_stack(Mezo(samples=2, record=True))
    mezo: Any = stack.plugins["mezo"]
    batches = [batch_for(stack, seed=i) for i in range(2)]
    before, memory = weights(stack), {}
    torch.manual_seed(4)
    for micro, batch in enumerate(batches):
        step = TrainStep(stack, batch, micro=micro, accumulation=2, learning_rate=1e-2, memory=memory)
        stack.run_train_step(step)
        if micro == 0:
            assert difference(weights(stack), before) < 1e-6
    accumulated = weights(stack)
    assert difference(accumulated, before) > 1e-4
    assert memory == {}
    # The same in one step over both batches: the loss is the mean of theirs.
    whole = lora_stack(Mezo(samples=2, record=True))
    torch.manual_seed(4)
    both = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    whole.run_train_step(TrainStep(whole, both, learning_rate=1e-2))
    one, two = (s.plugins["mezo"].state["updates"] for s in (stack, whole))
    assert len(one) == len(two) == 1
    assert one[0]["seeds"] == two[0]["seeds"]
    assert one[0]["g"] == pytest.approx(two[0]["g"], abs=2e-3)
    assert difference(accumulated, weights(whole)) < 1e-3 * difference(accumulated, before) + 1e-4
    assert mezo.state["updates"][0]["micro_batches"] == 2


def test_trains_with_lora_resumes_and_replays_to_the_bit(tmp_path: Path) -> None:
    options = {
        "steps": 4,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
    }
    straight, again, fresh = (lora_stack(Mezo(record=True, weight_decay=0.1)) for _ in range(3))
    report = straight.train(ROWS, output=tmp_path, **options)
    assert report.steps == 4
    again.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-2", **options)
    assert difference(weights(again), weights(straight)) == 0
    updates = straight.plugins["mezo"].state["updates"]
    assert again.plugins["mezo"].state["updates"] == updates
    assert len(updates) == 4
    assert len({u["seeds"][0] for u in updates}) == 4
    assert updates[0]["rate"] > updates[3]["rate"] > 0  # the schedule's, not the peak
    mezo: Any = straight.plugins["mezo"]
    replay(fresh, mezo)
    assert difference(weights(fresh), weights(straight)) == 0
    assert difference(weights(fresh), weights(lora_stack(Mezo()))) > 1e-3


def test_replays_narrow_weights_to_the_bit() -> None:
    straight, fresh = lora_stack(Mezo(record=True), dtype=torch.bfloat16), lora_stack(dtype=torch.bfloat16)
    straight.train(ROWS, steps=3, batch_size=2, learning_rate=1e-1)
    mezo: Any = straight.plugins["mezo"]
    replay(fresh, mezo)
    assert difference(weights(fresh), weights(straight)) == 0


def test_a_start_is_of_a_dtype() -> None:
    starts = [digest([nn.Parameter(torch.zeros(3, dtype=d))]) for d in (torch.float16, torch.bfloat16)]
    assert starts[0] != starts[1], "the same bytes, and steps that round otherwise"


def test_replays_on_the_same_start_alone() -> None:
    recorded = lora_stack(Mezo(record=True))
    recorded.train(ROWS, steps=1, batch_size=2, learning_rate=1e-2)
    mezo: Any = recorded.plugins["mezo"]
    other = lora_stack(rank=3)
    before = weights(other)
    with pytest.raises(
        PeftxError, match=r"mezo: the steps were recorded on other parameters: \d+ differ, first "
    ):
        replay(other, mezo)
    assert difference(weights(other), before) == 0
    for stack in (recorded, lora_stack(dtype=torch.bfloat16)):
        with pytest.raises(PeftxError, match="mezo: the parameters start from other values"):
            replay(stack, mezo)
    recorded.unfreeze()
    frozen = Stack(tiny("llama"), [Lora(rank=2), ("more", Lora(rank=2)), mezo], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match="mezo: other parameters train in step 0 than when the record began"):
        frozen.run_train_step(TrainStep(frozen, batch_for(frozen)))


class Pull(Plugin):
    """A loss term and a batch edit around the step."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        step.add_loss("pull", lambda outputs: outputs.logits.new_tensor(3.0), weight=2.0)
        return (yield)


def test_sees_the_loss_terms_of_others() -> None:
    one, two = lora_stack(Mezo()), lora_stack(Pull(), Mezo())
    losses = []
    for stack in (one, two):
        torch.manual_seed(0)
        losses.append(float(stack.run_train_step(TrainStep(stack, batch_for(stack)))))
    assert losses[1] == pytest.approx(losses[0] + 6.0, abs=1e-4)


class Noise(Plugin):
    """A random loss term: both passes of a step must draw the same."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        step.add_loss("noise", lambda outputs: 1000 * torch.randn(()))
        return (yield)


def test_both_passes_draw_the_same_and_drop_nothing() -> None:
    stack = lora_stack(Noise(), Mezo(record=True), dropout=0.5)
    stack.model.train()
    torch.manual_seed(0)
    for _ in range(2):
        stack.run_train_step(TrainStep(stack, batch_for(stack), learning_rate=1e-3))
    g = [update["g"][0] for update in stack.plugins["mezo"].state["updates"]]
    assert max(map(abs, g)) < 100  # 1000 / eps = 1e6, did they differ
    assert stack.model.training
    plain = lora_stack(Mezo(record=True))
    torch.manual_seed(0)
    plain.run_train_step(TrainStep(plain, batch_for(plain), learning_rate=1e-3))
    assert plain.plugins["mezo"].state["updates"][0]["g"][0] == pytest.approx(g[0], abs=0.1)


def test_share_of_wrong_tokens() -> None:
    stack = lora_stack()
    batch = batch_for(stack)
    likeliest = stack.model(**batch).logits.argmax(-1)  # position i predicts token i + 1
    labels = batch["labels"].clone()
    labels[:, 1:] = likeliest[:, :-1]
    assert float(wrong_share(TrainStep(stack, batch | {"labels": labels}))[0]) == 0
    labels[0, 1] = (labels[0, 1] + 1) % 320
    labels[1:, 3:] = -100
    assert float(wrong_share(TrainStep(stack, batch | {"labels": labels}))[0]) == pytest.approx(
        1 / (7 + 3 * 2)
    )


def test_trains_on_accuracy() -> None:
    stack = lora_stack(Mezo(objective="accuracy", eps=0.05, samples=2, record=True))
    batch = batch_for(stack)
    torch.manual_seed(0)
    first = [float(stack.run_train_step(TrainStep(stack, batch, learning_rate=0.1))) for _ in range(30)]
    assert all(0 <= value <= 1 for value in first)
    slopes = [g for update in stack.plugins["mezo"].state["updates"] for g in update["g"]]
    assert any(slopes)
    assert sum(first[-5:]) < sum(first[:5])


class Head(Plugin):
    """Takes the labels of tokens away, as heads of their own do."""

    claims = {Claim.CLASSIFIES}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        step.batch = {name: x for name, x in step.batch.items() if name not in ("labels", CLASS_INDEX)}
        step.replace_task_loss(lambda: (torch.tensor(1.0), None))
        return (yield)


class Rows(Head):
    claims = {Claim.OWN_LAYOUT}


class Thief(Head):
    claims = set()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (Head, "'head' has a loss of its own"),
        (Rows, "'rows' has a loss of its own"),
        (Thief, "the batch has input_ids"),
    ],
)
def test_accuracy_needs_labels_of_tokens(other: type[Plugin], match: str) -> None:
    stack = lora_stack(other(), Mezo(objective="accuracy"))
    with pytest.raises(
        (UnsupportedError, PeftxError), match=f"mezo: objective 'accuracy' .*{match}"
    ) as caught:
        stack.run_train_step(TrainStep(stack, batch_for(stack)))
    assert "objective: loss" in str(caught.value.hint)
    on_loss = lora_stack(other(), Mezo())
    assert float(on_loss.run_train_step(TrainStep(on_loss, batch_for(on_loss)))) == 1


@pytest.mark.parametrize("objective", ["loss", "accuracy"])
def test_no_label_at_all_is_said(objective: str) -> None:
    stack = lora_stack(Mezo(objective=objective))
    batch = batch_for(stack)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    before = weights(stack)
    with pytest.raises(PeftxError, match="mezo: no token of the batch has a label in step 2"):
        stack.run_train_step(TrainStep(stack, batch, index=2, learning_rate=1e-3))
    assert difference(weights(stack), before) < 1e-7


def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights() -> None:
    class Break(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            step.add_loss("nan", lambda outputs: torch.tensor(float("nan")))
            return (yield)

    stack = lora_stack(Break(), Mezo())
    before = weights(stack)
    with pytest.raises(PeftxError, match="mezo: the loss is nan in step 3"):
        stack.run_train_step(TrainStep(stack, batch_for(stack), index=3, learning_rate=1.0))
    assert difference(weights(stack), before) < 1e-7


@pytest.mark.parametrize("calls", [1, 2])
def test_a_loss_that_fails_leaves_the_weights(calls: int) -> None:
    theta, done = nn.Parameter(torch.ones(3)), []

    def loss() -> float:
        done.append(1)
        if len(done) == calls:
            raise ValueError("no loss")
        return 1.0

    with torch.no_grad(), pytest.raises(ValueError, match="no loss"):
        projected_gradient([theta], 0, 0.1, loss)
    assert torch.allclose(theta, torch.ones(3))


def test_refuses_what_needs_gradients() -> None:
    class Surgery(Plugin):
        claims = {Claim.NEEDS_GRADIENTS}

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            return (yield)

    with pytest.raises(ConflictError, match="makes none"):
        lora_stack(Surgery(), Mezo())


def test_refuses_to_train_nothing_and_to_replay_nothing() -> None:
    stack = Stack(tiny("llama"), [Mezo()])
    with pytest.raises(PeftxError, match="mezo: nothing trains"):
        stack.run_train_step(TrainStep(stack, batch_for(stack)))
    with pytest.raises(PeftxError, match="no steps were recorded"):
        replay(lora_stack(), Mezo())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eps": 0}, "eps"),
        ({"samples": 0}, "samples"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"objective": "f1"}, "objective"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Mezo: {match}") as caught:
        Mezo(**options)
    assert "eps, samples, weight_decay, objective, record" in str(caught.value.hint)
