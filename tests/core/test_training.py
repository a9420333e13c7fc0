"""The training step as plugins see it, and the trainer around it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from peftx import Claim, Delta, Plugin, Stack, hookimpl
from peftx.engines.data import IGNORE, Collator, tokenize
from peftx.engines.data.packing import Packing, bins_of
from peftx.engines.training import TrainStep, last_checkpoint, run
from peftx.engines.training.order import order_of
from peftx.engines.training.state_io import load_state, save_state
from peftx.errors import ArchitectureError, BundleError, ConflictError, DataError, PeftxError
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.models import PAD
from peftx.toolkits.compression.batches import calibration
from peftx.toolkits.evaluation.scores import Score
from peftx_lora import Lora

ROWS = [{"prompt": f"count {i}", "completion": f"{i + 1} {i + 2}"} for i in range(24)]


class Gain(Delta):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.z = torch.torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * self.z


class Gains(Plugin):
    """Trains a gain on every feed-forward output."""

    claims = {Claim.IDENTITY_AT_START}

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.down"):
            site.attach(Gain(site.out_features))


class Logged(Plugin):
    """Writes down what it sees of every step."""

    def __init__(self, name: str, log: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        self.log.append((f"{self.name} in", step.index, step.micro))
        loss = yield
        self.log.append((f"{self.name} out", step.index, step.micro))
        return loss


class Extra(Plugin):
    """Adds a constant times the sum of the gains."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        parameters = step.parameters()
        step.add_loss("gains", lambda outputs: torch.stack([p.sum() for p in parameters]).sum(), self.weight)
        return (yield)


class Halved(Plugin):
    """Halves the accumulated gradient, and counts how often it was asked to."""

    claims = {Claim.NEEDS_GRADIENTS}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        def halve(parameters: list[torch.nn.Parameter]) -> None:
            self.seen.append(float(parameters[0].grad.norm()))
            for parameter in parameters:
                parameter.grad.mul_(0.5)

        step.on_gradients(halve)
        return (yield)


class Replaced(Plugin):
    """Replaces the step; still sees the terms of others."""

    claims = {Claim.REPLACES_STEP}

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[dict[str, float]] = []

    @hookimpl
    def train_step(self, step: TrainStep) -> torch.Tensor:
        with torch.no_grad():
            loss = step.total_loss()
            self.losses.append(step.losses)
            for parameter in step.parameters():
                parameter.sub_(step.learning_rate)
        return loss


def stack_of(*plugins: Plugin | tuple[str, Plugin]) -> Stack:
    return Stack(tiny("llama"), [Gains(), *plugins], tokenizer=tiny_tokenizer())


def batch(rows: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def gradients(stack: Stack) -> list[torch.Tensor]:
    return [p.grad.clone() for p in stack.model.parameters() if p.requires_grad]


def weights(stack: Stack) -> list[torch.Tensor]:
    return [p.detach().clone() for p in stack.ledger.parameters("gains")]


def test_the_loss_and_gradient_are_the_models_own() -> None:
    stack = stack_of()
    loss = stack.train_step(batch())
    found = gradients(stack)
    stack.model.zero_grad()
    plain = stack.model(**batch()).loss
    plain.backward()
    assert torch.equal(loss, plain.detach())
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(stack), strict=True))


def test_loss_terms_add_with_their_weights() -> None:
    plain, extra = stack_of(), stack_of(Extra(0.25))
    alone, both = plain.train_step(batch()), extra.train_step(batch())
    gains = sum(int(p.numel()) for p in extra.ledger.parameters("gains"))
    assert torch.allclose(both, alone + 0.25 * gains)
    for a, b in zip(gradients(plain), gradients(extra), strict=True):
        assert torch.allclose(b, a + 0.25, atol=1e-6)


def test_the_first_wrapper_is_the_outer_one() -> None:
    log: list[tuple[str, int, int]] = []
    stack_of(("one", Logged("one", log)), ("two", Logged("two", log))).train_step(batch())
    assert [name for name, _, _ in log] == ["one in", "two in", "two out", "one out"]


def test_gradient_transforms_see_the_accumulated_gradient_once() -> None:
    halved = Halved()
    stack = stack_of(halved)
    full = batch(4)
    parts = [{k: v[i : i + 2] for k, v in full.items()} for i in (0, 2)]
    for micro, part in enumerate(parts):
        stack.run_train_step(TrainStep(stack, part, micro=micro, accumulation=2))
    found = gradients(stack)
    plain = stack_of()
    plain.train_step(full)
    assert len(halved.seen) == 1
    for a, b in zip(found, gradients(plain), strict=True):
        assert torch.allclose(2 * a, b, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_accumulation_equals_the_large_batch(schedule: str) -> None:
    one, two = stack_of(), stack_of()
    shared = {
        "steps": 3,
        "learning_rate": 0.05,
        "schedule": schedule,
        "max_grad_norm": 0.3,
        "optimizer": "sgd",
    }
    one.train(ROWS, batch_size=8, **shared)
    two.train(ROWS, batch_size=2, gradient_accumulation=4, **shared)
    for a, b in zip(weights(one), weights(two), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(weights(one)[0], torch.ones_like(weights(one)[0]), atol=1e-4)


def test_micro_batches_are_numbered() -> None:
    log: list[tuple[str, int, int]] = []
    stack_of(Logged("x", log)).train(ROWS, steps=2, batch_size=2, gradient_accumulation=3)
    assert [(step, micro) for name, step, micro in log if name == "x in"] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)
    ]  # fmt: skip


def test_a_replaced_step_sees_the_terms_of_others_and_leaves_no_gradient() -> None:
    replaced = Replaced()
    stack = stack_of(Extra(0.5), replaced)
    before = weights(stack)
    stack.train(ROWS, steps=2, batch_size=4, learning_rate=0.1, schedule="constant")
    assert all(set(terms) == {"task", "gains"} for terms in replaced.losses)
    assert all(p.grad is None for p in stack.model.parameters())
    for a, b in zip(before, weights(stack), strict=True):
        assert torch.allclose(a - 0.2, b)


def test_two_terms_of_one_name_are_told_apart() -> None:
    stack = stack_of(("a", Extra(1.0)), ("b", Extra(0.5)))
    step = TrainStep(stack, batch())
    total = float(stack.run_train_step(step))
    assert list(step.losses) == ["task", "gains", "gains #2"]
    assert step.losses["gains"] == step.losses["gains #2"]
    assert total == pytest.approx(step.losses["task"] + 1.5 * step.losses["gains"])


@pytest.mark.parametrize(("kill_at", "rates"), [(2, {}), (4, {}), (2, {"gains": 0.1})])
def test_resume_is_exact(tmp_path: Path, kill_at: int, rates: dict[str, float]) -> None:
    options: dict[str, Any] = {
        "learning_rates": rates,
        "steps": 6,
        "batch_size": 3,
        "learning_rate": 0.02,
        "checkpoint_every": 2,
        "warmup_steps": 2,
    }
    whole = stack_of(Extra(0.1))
    report = whole.train(ROWS, output=tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, terms: dict[str, float]) -> None:
        if done == kill_at + 1:
            raise Killed

    first = stack_of(Extra(0.1))
    with pytest.raises(Killed):
        first.train(ROWS, output=tmp_path / "cut", progress=kill, **options)
    found = last_checkpoint(tmp_path / "cut")
    assert found is not None
    assert found.name == f"checkpoint-{kill_at}"
    second = stack_of(Extra(0.1))
    again = second.train(ROWS, output=tmp_path / "cut", resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert again.losses == report.losses


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    stack_of().train(ROWS, steps=2, checkpoint_every=1, output=tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_resume_by_another_stack_is_refused(tmp_path: Path) -> None:
    stack_of().train(ROWS, steps=2, checkpoint_every=1, output=tmp_path)
    other = Stack(tiny("llama"), [("other", Gains())], tokenizer=tiny_tokenizer())
    with pytest.raises(BundleError, match="differs in the plugins"):
        other.train(ROWS, steps=4, output=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.1}, "train.learning_rate: 0.02, now 0.1"),
        ({"seed": 7}, "train.seed"),
        ({"batch_size": 4}, "train.batch_size"),
    ],
)
def test_resume_with_other_options_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    options = {"steps": 2, "batch_size": 3, "learning_rate": 0.02}
    stack_of().train(ROWS, output=tmp_path, **options)
    with pytest.raises(BundleError, match=named):
        stack_of().train(ROWS, output=tmp_path, resume=True, **{**options, **changes})
    with pytest.raises(BundleError, match="differs in the rows"):
        stack_of().train(ROWS[1:], output=tmp_path, resume=True, **options)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    """Under a schedule that does not end at a rate of zero a further step would show."""
    options = {"steps": 4, "batch_size": 3, "learning_rate": 0.02, "schedule": "constant"}
    whole = stack_of()
    report = whole.train(ROWS, output=tmp_path, **options)
    again = stack_of()
    assert again.train(ROWS, output=tmp_path, resume=True, **options).losses == report.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_checkpoints_of_another_run_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    options = {"steps": 6, "batch_size": 3, "learning_rate": 0.02}
    stack_of().train(ROWS, output=tmp_path, seed=5, **options)
    options |= {"steps": 4, "checkpoint_every": 1}
    whole = stack_of()
    whole.train(ROWS, output=tmp_path, **options)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (3, 4, 6)}
    again = stack_of()
    again.train(
        ROWS, output=tmp_path, resume=True, **options
    )  # not from the newest, which is the other run's
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_a_run_without_output_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stack_of().train(ROWS, steps=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_an_update_counts_as_a_change_of_a_parameter(wrapped: bool, fused: bool) -> None:
    """By which deltas know that what they have computed is old: torch's fused optimizers leave the count as it is."""
    stack = stack_of()
    parameters = list(stack.ledger.parameters("gains"))
    optimizer = torch.optim.AdamW(parameters, fused=fused)
    before = [p._version for p in parameters]
    if wrapped:
        stack.train_step(batch(), optimizer=optimizer)
    else:
        stack.model(**batch()).loss.backward()
        optimizer.step()
    assert all(p._version > old for p, old in zip(parameters, before, strict=True))


def test_a_training_that_its_dtype_makes_slow_says_so() -> None:
    stack = Stack(tiny("llama").half(), [Gains()], tokenizer=tiny_tokenizer())
    with pytest.warns(
        UserWarning, match=r"a CPU trains in float16 many times slower .*: model: \{dtype: float32\}"
    ):
        stack.train(ROWS, steps=1)
    stack_of().train(ROWS, steps=1)  # any warning is an error here


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_add_up_in_narrow_types(dtype: torch.dtype, optimizer: str) -> None:
    """2^-12 of one is nothing in bfloat16, and 64 of them are 2^-6."""
    from peftx.engines.training.optimizer import optimizer_for

    p = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    made = optimizer_for([p], optimizer, learning_rate=2.0**-12, weight_decay=0.0)
    for _ in range(64):
        p.grad = torch.ones_like(p)
        made.step()
        assert p.dtype == p.grad.dtype == dtype
    assert torch.allclose(p.float(), torch.tensor(1 - 2.0**-6), atol=1e-4)


def test_what_is_written_into_a_narrow_parameter_counts() -> None:
    from peftx.engines.training.optimizer import optimizer_for

    p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    made = optimizer_for([p], "sgd", learning_rate=2.0**-12, weight_decay=0.0)
    for _ in range(8):
        p.grad = torch.ones_like(p)
        made.step()
        with torch.no_grad():
            p[0] = 3.0
    assert made.wide[p][0] == 3 - 7 * 2.0**-12
    assert made.wide[p][1] == 1 - 8 * 2.0**-12


def test_narrow_training_resumes_exactly(tmp_path: Path) -> None:
    def fresh() -> Stack:
        return Stack(tiny("llama").to(torch.bfloat16), [Gains()], tokenizer=tiny_tokenizer())

    class Killed(Exception):
        pass

    def kill(done: int, total: int, terms: dict[str, float]) -> None:
        if done == 5:
            raise Killed

    options = {"steps": 8, "batch_size": 3, "learning_rate": 1e-3, "checkpoint_every": 4}
    whole, cut, again = fresh(), fresh(), fresh()
    whole.train(ROWS, output=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        cut.train(ROWS, output=tmp_path / "cut", progress=kill, **options)
    again.train(ROWS, output=tmp_path / "cut", resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_no_number_ends_the_run() -> None:
    stack = stack_of()
    with torch.no_grad():
        next(stack.ledger.parameters("gains")).fill_(float("nan"))
    with pytest.raises(PeftxError, match="'task' of step 1 is nan"):
        stack.train(ROWS, steps=2)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nothing to resume"):
        stack_of().train(ROWS, steps=1, output=tmp_path, resume=True)


def test_nothing_to_train() -> None:
    with pytest.raises(PeftxError, match="nothing trains"):
        Stack(tiny("llama"), [], tokenizer=tiny_tokenizer()).train(ROWS, steps=1)


def test_misspelt_options_name_the_nearest() -> None:
    with pytest.raises(PeftxError, match="learning_rate"):
        stack_of().train(ROWS, learning_rte=0.1)


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        stack_of().train([])


def test_a_loop_of_ones_own() -> None:
    stack = stack_of()
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.05)
    losses = [float(stack.train_step(batch(), optimizer=optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert stack.trained_steps == 8
    assert all(p.grad is None for p in stack.model.parameters())


class Rates(Plugin):
    """Writes down the rates that it and another plugin have."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other, self.seen = other, list[tuple[float, float, float]]()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        other = step.stack.member(self.other).plugin
        self.seen.append((step.learning_rate, step.rate(self), step.rate(other)))
        return (yield)


def moved(stack: Stack, id: str, **options: Any) -> float:
    """The largest change of a number of a plugin in a run: of AdamW's first step it is the learning rate."""
    before = [p.detach().clone() for p in stack.parameters(id)]
    stack.train(ROWS, batch_size=2, weight_decay=0.0, max_grad_norm=0.0, **options)
    return max(
        float((p.detach() - old).abs().max()) for p, old in zip(stack.parameters(id), before, strict=True)
    )


def test_a_rate_for_each_plugin() -> None:
    def both(*more: Plugin | tuple[str, Plugin]) -> Stack:
        return stack_of(Lora(rank=2), *more)

    options: dict[str, Any] = {"steps": 1, "learning_rate": 0.02, "learning_rates": {"lora": 0.003}}
    assert moved(both(), "gains", **options) == pytest.approx(0.02, rel=1e-3)
    assert moved(both(), "lora", **options) == pytest.approx(0.003, rel=1e-3)
    watch = Rates("lora")
    both(watch).train(ROWS, **{**options, "steps": 4, "schedule": "linear"})
    assert watch.seen == [
        pytest.approx((0.02 * left, 0.02 * left, 0.003 * left)) for left in (1, 0.75, 0.5, 0.25)
    ]

    one, two = both(), both()
    one.train(ROWS, steps=3, learning_rate=0.02)
    two.train(ROWS, steps=3, learning_rate=0.5, learning_rates={"lora": 0.02, "gains": 0.02})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for wrong, said in (
        ({"lroa": 0.1}, "did you mean 'lora'"),
        ({"rates": 0.1}, "'rates' has nothing that trains"),
    ):
        with pytest.raises(PeftxError, match=said):
            both(("rates", Rates("lora"))).train(ROWS, learning_rates=wrong)


def test_parameters_of_plugins_for_an_optimizer_of_ones_own() -> None:
    stack = stack_of(Lora(rank=2))
    gains, lora = (stack.parameters(id) for id in stack.plugins)
    assert {*gains, *lora} == set(stack.parameters())
    assert not {*gains} & {*lora}
    optimizer = torch.optim.SGD([{"params": gains, "lr": 0.0}, {"params": lora, "lr": 0.1}])
    before = [p.detach().clone() for p in gains]
    stack.train_step(batch(), optimizer=optimizer)
    assert all(torch.equal(p, old) for p, old in zip(gains, before, strict=True))
    stack.freeze("lora")
    assert stack.parameters("lora") == []
    with pytest.raises(PeftxError, match="did you mean 'lora'"):
        stack.parameters("lroa")


def test_gradient_checkpointing_gives_the_same_weights() -> None:
    one, two = stack_of(), stack_of()
    one.train(ROWS, steps=2, learning_rate=0.05)
    two.train(ROWS, steps=2, learning_rate=0.05, gradient_checkpointing=True)
    for a, b in zip(weights(one), weights(two), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not two.model.is_gradient_checkpointing


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=12,
)


@given(value=VALUES)
@settings(max_examples=60)
def test_state_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "x"
    save_state(path, value)
    assert load_state(path) == value


def test_state_with_tensors_keeps_bits(tmp_path: Path) -> None:
    state = {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(3, 2).bfloat16()}}, "lr": 0.1}
    save_state(tmp_path / "x", state)
    found = load_state(tmp_path / "x")
    assert found["lr"] == 0.1
    assert all(torch.equal(found["state"][0][k], state["state"][0][k]) for k in ("step", "m"))
    assert found["state"][0]["m"].dtype == torch.bfloat16


def test_a_column_that_the_first_row_lacks_is_kept() -> None:
    from peftx.engines.training.run import as_training_data

    stack = Stack(tiny("llama"), [], tokenizer=tiny_tokenizer())
    rows = [{"text": "one"}, {"text": "two", "weight": 3}]
    data = as_training_data(stack, rows, seed=0, max_length=8)
    assert data.train.to_list() == [{"text": "one", "weight": None}, {"text": "two", "weight": 3}]


# --------------------------------------------------------------------------------- no more rows than a run comes to
def trained_gains(rows: list[dict[str, Any]], **options: Any) -> torch.Tensor:
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    stack.train(rows, batch_size=2, learning_rate=1e-2, max_length=64, **options)
    return torch.cat([p.detach() for p in stack.ledger.parameters("gains")])


@pytest.mark.parametrize("steps", [3, 7, 15])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_prepares_the_rows_that_it_comes_to(
    monkeypatch: pytest.MonkeyPatch, steps: int, accumulation: int
) -> None:
    """It trains on the same rows in the same order as one that prepares all of them."""
    seen: list[int] = []
    encode = tokenize.joined
    monkeypatch.setattr(tokenize, "joined", lambda *args: seen.append(1) or encode(*args))
    options = {"steps": steps, "gradient_accumulation": accumulation, "seed": 5}
    some = trained_gains(ROWS, **options)
    assert len(seen) == min(len(ROWS), 2 * steps * accumulation)
    monkeypatch.setattr(run, "one_by_one", lambda *_: False)
    assert torch.equal(some, trained_gains(ROWS, **options))


def test_a_run_goes_on_with_rows_that_its_beginning_did_not_prepare(tmp_path: Path) -> None:
    options = {"schedule": "constant", "checkpoint_every": 2}
    whole = trained_gains(ROWS, steps=20, **options)
    trained_gains(ROWS, steps=4, output=tmp_path, **options)
    assert torch.equal(trained_gains(ROWS, steps=20, output=tmp_path, resume=True, **options), whole)


def test_each_epoch_has_an_order_of_its_own_and_the_seed_decides() -> None:
    orders = [order_of(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == order_of(50, 0, 0)


def test_a_row_that_cannot_be_learned_is_named_by_its_place_in_the_data() -> None:
    rows = [{"prompt": "count", "completion": "1"} for _ in range(200)]
    bad = order_of(200, 0, 0)[1]
    rows[bad] = {"prompt": "count", "completion": "one " * 200}
    with pytest.raises(DataError, match=rf"row {bad} \(counting from 0\): the completion"):
        trained_gains(rows, steps=1)
    for row in order_of(200, 0, 0)[2:]:  # rows that the run does not come to
        rows[row] = {"prompt": "count", "completion": "one " * 200}
    rows[bad] = {"prompt": "count", "completion": "1"}
    trained_gains(rows, steps=1)


def test_a_plugin_may_ask_for_rows_that_the_run_does_not_come_to() -> None:
    class Asks(Gains):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            asked.append(sum(len(batch["input_ids"]) for batch in step.batches_of("train", 20)))
            return (yield)

    asked: list[int] = []
    stack = Stack(tiny("llama"), [Asks()], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=1, batch_size=2)
    assert asked == [20]


# ------------------------------------------------------------------------------------- epochs, measurements, autocast
def test_epochs_are_counted_in_steps() -> None:
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    options = {"batch_size": 5, "gradient_accumulation": 2, "max_length": 64}
    assert stack.train(ROWS, num_train_epochs=1.0, **options).steps == 3  # 24 rows: 5 batches, the last of 4
    assert stack.train(ROWS, num_train_epochs=0.5, **options).steps == 2
    with pytest.raises(PeftxError, match="steps and num_train_epochs both say how long"):
        stack.train(ROWS, num_train_epochs=1.0, steps=3)


def test_the_names_of_the_trainer_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer gets what its own arguments would say; `steps` are known when a share is taken of them."""
    seen: list[Any] = []
    arguments_of = run.arguments_of

    def noting(*args: Any) -> Any:
        seen.append(arguments_of(*args))
        return seen[-1]

    monkeypatch.setattr(run, "arguments_of", noting)
    given = {
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
    }
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    report = stack.train(ROWS, num_train_epochs=1.0, warmup_ratio=0.5, max_length=64, report_to=[], **given)
    assert report.steps == 3
    (found,) = seen
    assert {name: getattr(found, name) for name in given} == {
        **given,
        "lr_scheduler_type": "constant_with_warmup",
    }
    assert (found.max_steps, found.warmup_steps, found.report_to) == (3, 2, [])
    assert stack.train(ROWS, max_steps=1, batch_size=2).steps == 1
    with pytest.raises(PeftxError, match="steps and max_steps are names of one thing"):
        stack.train(ROWS, steps=1, max_steps=1)


class Scripted:
    """Stands in for the measurement."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, metric: str, length: int) -> dict[str, Any]:
        torch.rand(7)  # what it draws is not missing from the training
        return {metric: Score(name=metric, value=self.values.pop(0))}


def measured_run(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, torch.Tensor]:
    monkeypatch.setattr(Stack, "measuring", lambda self, rows: scripted)
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    options = {"batch_size": 2, "learning_rate": 1e-2, "schedule": "constant", "eval_steps": 1} | options
    report = stack.train(ROWS, measured=ROWS, **options)
    return report, torch.cat([p.detach() for p in stack.ledger.parameters("gains")])


def test_the_best_state_comes_back_and_a_run_that_gets_no_better_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best, end = {"load_best_model_at_end": True}, {"early_stopping_patience": 2}
    report, weights = measured_run(Scripted(5, 3, 4, 3.5), monkeypatch, steps=9, **best, **end)
    assert (report.steps, report.best) == (4, (2, 3.0))
    assert torch.equal(weights, trained_gains(ROWS, steps=2, schedule="constant"))
    report, weights = measured_run(Scripted(5, 3, 4, 3.5), monkeypatch, steps=9, **end)
    assert torch.equal(weights, trained_gains(ROWS, steps=4, schedule="constant"))
    up = {"metric_for_best_model": "accuracy"}
    report, _ = measured_run(Scripted(0.2, 0.4, 0.3, 0.1), monkeypatch, steps=9, **best, **end, **up)
    assert (report.steps, report.best) == (4, (2, 0.4))


def test_measuring_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights = measured_run(Scripted(*range(6)), monkeypatch, steps=6)
    assert torch.equal(weights, trained_gains(ROWS, steps=6, schedule="constant"))


@pytest.mark.parametrize("kill_at", [1, 3])
def test_measurements_go_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    values = (5, 3, 4, 3.5, 3.2, 1)
    options = {
        "load_best_model_at_end": True,
        "early_stopping_patience": 3,
        "checkpoint_every": 1,
        "steps": 6,
    }
    whole = measured_run(Scripted(*values), monkeypatch, **options)

    def kill(done: int, total: int, terms: dict[str, float]) -> None:
        if done == kill_at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stack, "measuring", lambda self, rows: Scripted(*values))
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    common = {"batch_size": 2, "learning_rate": 1e-2, "schedule": "constant", "eval_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        stack.train(ROWS, measured=ROWS, output=tmp_path, progress=kill, **common, **options)
    again = measured_run(Scripted(*values[kill_at:]), monkeypatch, output=tmp_path, resume=True, **options)
    assert (again[0].best, again[0].steps) == (whole[0].best, whole[0].steps) == ((2, 3.0), 5)
    assert torch.equal(again[1], whole[1])
    finished = measured_run(Scripted(), monkeypatch, output=tmp_path, resume=True, **options)
    assert torch.equal(finished[1], whole[1])


def test_options_that_need_another_are_refused() -> None:
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match="early_stopping_patience needs measurements: set eval_steps"):
        stack.train(ROWS, early_stopping_patience=2)
    with pytest.raises(DataError, match="eval_steps measures on rows that are not trained on") as caught:
        stack.train(ROWS, eval_steps=2)
    assert "measured=rows" in str(caught.value.hint)
    with pytest.raises(PeftxError, match="report_to: trackio is not installed") as caught:
        stack.train(ROWS, report_to="trackio")
    assert caught.value.hint == "pip install trackio"


def test_autocast_computes_in_bfloat16_and_leaves_the_weights_alone() -> None:
    seen: list[torch.dtype] = []

    class Watches(Gains):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            site = step.model.model.layers[0].mlp.up_proj
            with closing_hook(site.register_forward_hook(lambda m, x, y: seen.append(y.dtype))):
                return (yield)

    losses = []
    for options in ({}, {"bf16": True}):
        stack = Stack(tiny("llama"), [Watches()], tokenizer=tiny_tokenizer())
        losses.append(stack.train(ROWS, steps=2, batch_size=2, **options).last_loss)
        assert {p.dtype for p in stack.model.parameters()} == {torch.float32}
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@contextmanager
def closing_hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def test_reporters_get_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append(dict(logs))

    setup = run.StackTrainer.__init__
    monkeypatch.setattr(
        run.StackTrainer, "__init__", lambda self, *a, **k: setup(self, *a, callbacks=[Reporter()], **k)
    )
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=2, batch_size=2)
    assert {"loss", "learning_rate", "seconds"} <= told[0].keys()
    assert all(isinstance(value, int | float) for logs in told for value in logs.values())
    assert stack.history.trainings[0].terms["task"]


# ---------------------------------------------------------------------------------------------------------- packing
def examples(lengths: list[int], prompt: int = 2) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 27, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORE] * prompt + row[prompt:]} for row in rows]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(20, 64))
def test_bins_hold_every_text_once_and_no_more_than_fits(lengths: list[int], capacity: int) -> None:
    bins = bins_of(lengths, capacity)
    assert sorted(index for held in bins for index in held) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in held) <= capacity for held in bins)
    assert len(bins) <= 2 * -(-sum(lengths) // capacity)  # at most one bin is not half full


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "opt", "gpt_neox", "phi3"])
def test_packed_rows_have_the_loss_and_gradient_of_the_rows(arch: str) -> None:
    rows, found = examples([9, 4, 12, 6, 7, 3]), []
    plain = Collator(PAD)
    for collate in (plain, Packing(plain, 24, torch.float32)):
        stack = Stack(tiny(arch), [Gains()], tokenizer=tiny_tokenizer())
        with torch.no_grad():
            for p in stack.ledger.parameters("gains"):
                p.mul_(1.3)
        batch = collate(rows)
        loss = stack.train_step(batch)
        found.append(
            (len(batch["input_ids"]), float(loss), [p.grad for p in stack.ledger.parameters("gains")])
        )
    (six, loss, gradients), (two, packed, packed_gradients) = found
    assert (six, two) == (6, 2)
    assert packed == pytest.approx(loss, rel=1e-5)
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(gradients, packed_gradients, strict=True)
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_packed_run_is_the_run(accumulation: int) -> None:
    options = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "gradient_accumulation": accumulation}
    weights = []
    for packing in (False, True):
        stack = Stack(tiny("llama"), [Merging()], tokenizer=tiny_tokenizer())
        report = stack.train(ROWS, packing=packing, max_length=64, **options)
        weights.append(torch.cat([p.detach() for p in stack.ledger.parameters("merging")]))
        assert report.steps == 3
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weights[0], torch.ones_like(weights[0]), atol=1e-3)


class Merging(Plugin):
    claims = {Claim.MERGEABLE, Claim.IDENTITY_AT_START}

    def __init__(self, role: str = "mlp.down") -> None:
        super().__init__()
        self.role = role

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears(self.role):
            site.attach(Folding(site.out_features))


class Folding(Gain):
    def fold(self, weight: Any, bias: Any) -> Any:
        return weight * self.z[:, None], None if bias is None else bias * self.z


def test_packing_is_refused_where_texts_would_mix() -> None:
    stack = Stack(tiny("llama"), [Gains()], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="'gains' may look across the tokens of a row"):
        stack.train(ROWS, steps=1, packing=True)
    for arch, role in (("mamba", "ssm.out"), ("t5", "mlp.down")):
        stack = Stack(tiny(arch), [Merging(role)], tokenizer=tiny_tokenizer())
        with pytest.raises(ArchitectureError, match="is no decoder that takes positions and a mask"):
            stack.train(ROWS, steps=1, packing=True)
    model = tiny("llama")
    model.model.layers[0].self_attn.forward = mixing(model.model.layers[0].self_attn)
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM mixes the texts of one row"):
        Stack(model, [Merging()], tokenizer=tiny_tokenizer()).train(ROWS, steps=1, packing=True)


def mixing(attention: Any) -> Any:
    """An attention that heeds no mask of the caller's, as a state space layer would."""
    forward = attention.forward
    return lambda **k: forward(**{**k, "attention_mask": None})


def test_a_window_that_a_text_is_longer_than_is_found() -> None:
    """Mistral's is 64 here, and the mask of packed rows knows no window."""
    short, long = ({"prompt": "a" * length, "completion": "b"} for length in (10, 90))
    options = {"steps": 1, "batch_size": 3, "packing": True, "max_length": 112}
    stack = Stack(tiny("mistral"), [Merging()], tokenizer=tiny_tokenizer())
    stack.train([short] * 4, **options)
    said = "MistralForCausalLM mixes the texts of one row, or looks less far back"
    with pytest.raises(ArchitectureError, match=said) as caught:
        stack.train([short, short, long], **options)
    assert "a max_length within the model's window" in str(caught.value.hint)
    stack.train([short, short, long], **options | {"max_length": 60})  # the way out


def test_columns_of_ones_own(tmp_path: Path) -> None:
    """In Python as in a spec: of rows and of a file, to train, to measure and to calibrate."""
    rows = [{"ask": f"{n} + 1 =", "reply": f" {n + 1}"} for n in range(6)]
    ours = [{"prompt": row["ask"], "completion": row["reply"]} for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "ask", "completion": "reply"}
    found = []
    for data, own in ((ours, None), (rows, columns), (file, columns)):
        stack = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer(), seed=0)
        stack.train(data, columns=own, steps=2, batch_size=2)
        told = {} if own is None else {"columns": own}
        found.append(stack.evaluate(data, **told)["perplexity"].value)
    assert found[0] == found[1] == found[2]
    batches = [
        list(calibration(stack, each, samples=2, length=16).batches)
        for each in (ours, file_of(ours, tmp_path))
    ]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*batches, strict=True))


def file_of(rows: list[dict[str, str]], folder: Path) -> Path:
    file = folder / "ours.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
