"""What a step of training offers: phases, masks, references, further sources, trials, what runs around an update."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Claim, Delta, ModelView, Plugin, Registry, Stack, TrainStep, hookimpl
from peftx.engines.training.base import base_alone
from peftx.engines.training.step import swapped
from peftx.engines.training.trainer import place_of
from peftx.engines.training.updates import forget
from peftx.errors import BatchError, DataError, PeftxError, UnsupportedError
from peftx.kernel.names import GROUP
from peftx.kernel.phases import Phase, Span, at, spans
from peftx.planning import plan
from peftx.testing import run_checks
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx.testing.subject import steps_for
from peftx.toolkits.compression import QuantLinear
from peftx_alphatuning import AlphaTuning
from peftx_dora import Dora
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning as Prompt
from peftx_spec import load_spec

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
OTHERS = [{"prompt": f"{n} is", "completion": " odd" if n % 2 else " even"} for n in range(5)]
IDS = torch.arange(3, 19).reshape(2, 8)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def stack_of(*plugins: Plugin) -> Stack:
    return Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())


def test_a_batch_without_what_a_plugin_trains_on_is_refused() -> None:
    step = TrainStep(stack_of(Lora()), dict(BATCH))
    step.require("labels", "input_ids", by="mine")
    with pytest.raises(
        BatchError, match="mine: the batch has no aside, reward, but attention_mask, input_ids, lab"
    ):
        step.require("reward", "labels", "aside", by="mine")
    step.batch = {}
    with pytest.raises(BatchError, match="mine: the batch has no labels, but nothing"):
        step.require("labels", by="mine")


# -- phases ----------------------------------------------------------------------------------------------------------


def test_where_phases_lie() -> None:
    phases = (Phase("find", 0.3), Phase("warm", 2), Phase("tune"))
    assert spans(phases, 10, owner="x") == [Span("find", 0, 3), Span("warm", 3, 5), Span("tune", 5, 10)]
    assert spans((Phase("warm", 4), Phase("tune")), None, owner="x")[1] == Span("tune", 4, None)
    with pytest.raises(PeftxError, match=r"x: the phase 'find' is 0.3 of a run whose length is not known"):
        spans(phases, None, owner="x")
    for total in (1, 2, 3):
        with pytest.raises(PeftxError, match=r"x: '\w+' takes the run's \d steps.*none is left for"):
            spans(phases, total, owner="x")


class TwoPhases(Plugin):
    """Trains a gain, and notes which phase it is."""

    seen: list[tuple[int, str, bool]]

    class Gain(Delta):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y * self.g

    def phases(self) -> Sequence[Phase]:
        return (Phase("find", 0.5), Phase("tune"))

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.seen = []
        for site in model.linears("attention.q"):
            site.attach(self.Gain(site.out_features))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        self.seen.append((step.index, step.phase(self).name, step.begins(self)))
        return (yield)


def test_a_run_goes_through_its_phases_and_says_so() -> None:
    plugin, told = TwoPhases(), []
    stack = stack_of(plugin)
    stack.train(
        ROWS, steps=4, batch_size=2, gradient_accumulation=2,
        progress=lambda done, total, values: told.append(values["two-phases"]),
    )  # fmt: skip
    names = ["find", "find", "tune", "tune"]
    assert [(i, name) for i, name, _ in plugin.seen] == [(i // 2, names[i // 2]) for i in range(8)]
    assert [i for i, (_, _, begins) in enumerate(plugin.seen) if begins] == [0, 4]
    assert told == names


def test_a_resumed_run_goes_on_in_its_phase_though_it_was_lengthened(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "checkpoint_every": 3, "output": tmp_path}
    stack_of(TwoPhases()).train(ROWS, steps=4, **options)
    told = place_of(tmp_path / "checkpoint-3", 10)
    assert told == f"behind step 3 of 10, two-phases in 'tune': {tmp_path / 'checkpoint-3'}"
    assert [at(spans(TwoPhases().phases(), 4, owner="x"), index).name for index in (0, 1, 2, 3, 4)] == [
        "find", "find", "tune", "tune", "tune",
    ]  # fmt: skip
    again = TwoPhases()
    stack_of(again).train(ROWS, steps=10, resume=tmp_path / "checkpoint-3", **options)
    assert {name for _, name, _ in again.seen} == {"tune"}, "half of 10 steps is not asked for again"
    assert not any(begins for _, _, begins in again.seen)


def test_phases_that_do_not_fit_are_refused_before_the_first_step() -> None:
    plugin = TwoPhases()
    with pytest.raises(PeftxError, match="two-phases: 'find' takes the run's 1 steps"):
        stack_of(plugin).train(ROWS, steps=1)
    assert plugin.seen == []


class FourPhases(Plugin):
    claims = {Claim.BESIDE_WEIGHTS}

    def phases(self) -> Sequence[Phase]:
        return (Phase("a", 2), Phase("b", 0.2), Phase("c", 1), Phase("d"))

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.mlp"):
            site.attach(TwoPhases.Gain(model.hidden_size))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.phase(self)
        return (yield)


def test_the_kit_makes_as_many_steps_as_phases_need() -> None:
    assert [steps_for(p) for p in (FourPhases(), TwoPhases(), Lora())] == [5, 2, 2]
    assert steps_for(TwoPhases(), FourPhases()) == 5
    names = ["trains_in_the_trainer", "resume_is_exact"]
    found = run_checks(FourPhases, models=["llama"], only=names)
    assert [(result.name, result.outcome, result.message) for result in found] == [
        (n, "passed", "") for n in names
    ]


# -- masks, updates --------------------------------------------------------------------------------------------------


class Masked(Plugin):
    claims = {Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.places = model.train("attention.q")

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        for place in self.places.values():
            mask = torch.zeros_like(place.theta, dtype=torch.bool)
            mask[::2] = True
            place.restrict(mask)
        return (yield)


@pytest.mark.parametrize("own_loop", [False, True])
def test_entries_outside_a_mask_stay_to_the_bit(own_loop: bool) -> None:
    plugin = Masked()
    stack = stack_of(plugin)
    if own_loop:
        parameters = [p for p in stack.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            stack.train_step(BATCH, optimizer=optimizer)
    else:
        stack.train(ROWS, steps=3, learning_rate=0.1, weight_decay=0.5)
    for place in plugin.places.values():
        assert torch.equal(place.theta[1::2], place.theta_0[1::2])
        assert (place.theta[::2] != place.theta_0[::2]).any(1).all()
        place.restrict(None)
        place.rewind()
        assert torch.equal(place.theta, place.theta_0)


class Packs(Plugin):
    claims = {Claim.QUANTIZES}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("mlp"):
            site.replace(QuantLinear.from_linear(site.module, bits=8))


def test_a_bundle_without_the_base_says_so_where_theta_0_is_needed(tmp_path: Path) -> None:
    plugin = Masked()
    stack = stack_of(plugin, Packs())
    stack.train(ROWS, steps=1)
    stack.compress()
    assert all(torch.equal(place.theta[1::2], place.theta_0[1::2]) for place in plugin.places.values())
    loaded = peftx.load(stack.save(tmp_path))
    place = next(iter(loaded.plugins["masked"].places.values()))  # type: ignore[attr-defined]
    place.restrict(None)
    mask = torch.ones_like(place.theta, dtype=torch.bool)
    expected = (
        r"masked: .* holds its base compressed, and so without the base's own model\.layers\.0\.self_attn"
    )
    for use in (lambda: place.theta_0, place.rewind, lambda: place.restrict(mask)):
        with pytest.raises(PeftxError, match=expected):
            use()


def test_what_runs_around_an_update_runs_once_and_only_around_it() -> None:
    order: list[str] = []

    class Around(Plugin):
        claims = {Claim.NEEDS_GRADIENTS}

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            step.before_update(lambda optimizer: order.append(f"before {step.index}"))
            step.after_update(lambda optimizer: order.append(f"after {step.index}"))
            return (yield)

    stack = stack_of(Lora(rank=2), Around())
    stack.train(ROWS, steps=2, batch_size=2)
    assert order == ["before 0", "after 0", "before 1", "after 1"]
    order.clear()
    stack.train_step(BATCH)  # nobody steps
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()
    assert order == [], "another optimizer is no update of this stack"
    mine = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
    stack.train_step(BATCH, optimizer=mine)
    assert len(order) == 2


def test_an_optimizer_forgets() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p]
    forget(optimizer, [p], at=torch.tensor([1]))
    assert optimizer.state[p]["exp_avg"].tolist() == [pytest.approx(0.1), 0]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [pytest.approx(0.001), 0]
    assert optimizer.state[p]["step"] == 1
    forget(optimizer, [p])
    assert p not in optimizer.state
    forget(optimizer, [p], at=torch.tensor([1]))
    assert p not in optimizer.state


# -- references, trials ----------------------------------------------------------------------------------------------


def moved(stack: Stack) -> None:
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.add_(0.1)


def test_a_reference_is_the_model_as_it_was() -> None:
    stack = stack_of(Lora(rank=2, dropout=0.5))
    moved(stack)
    stack.model.eval()
    with torch.no_grad():
        at_start = stack.model(IDS).logits
        with stack.disabled():
            bare = stack.model(IDS).logits
    stack.model.train()
    memory: dict[str, Any] = {}
    for index in range(3):
        step = TrainStep(stack, BATCH, index=index, total=3, memory=memory)
        with step.reference() as model:
            found = model(IDS).logits
        assert torch.equal(found, at_start)
        assert not found.requires_grad
        with step.reference("base") as model:
            assert torch.equal(model(IDS).logits, bare)
        moved(stack)
        assert stack.model.training
    with step.reference(other := tiny("llama", seed=3)) as model:
        assert model is other
    late = TrainStep(stack, BATCH, index=2, total=3, memory={})
    with pytest.raises(PeftxError, match="step 2 does not remember how the run started"), late.reference():
        pass


def test_replaced_weights_are_the_base() -> None:
    """What they were is not there to run; all else that their plugin did is off, and back afterwards."""
    plugins = [AlphaTuning(bits=2), Lora(rank=2)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(None, ["alphatuning"])
    with torch.no_grad():
        packed = stack.model(IDS).logits  # its own deltas start at 0
        stack.inject()
        for id in stack.plugins:
            for p in stack.ledger.parameters(id):
                p.add_(0.1)
        before = stack.model(IDS).logits
        with pytest.raises(PeftxError, match="'alphatuning' replaced weights of the model"), stack.disabled():
            pass
        with base_alone(stack):
            assert torch.equal(stack.model(IDS).logits, packed)
            with base_alone(stack), stack.disabled():  # what is off already stays off
                pass
            assert torch.equal(stack.model(IDS).logits, packed)
        assert torch.equal(stack.model(IDS).logits, before)
        with TrainStep(stack, BATCH).reference("base") as model:
            assert torch.equal(model(IDS).logits, packed)
        assert torch.equal(stack.model(IDS).logits, before)
        with stack.disabled("lora"):
            assert not torch.equal(stack.model(IDS).logits, packed)


def test_what_was_folded_for_good_is_in_the_base() -> None:
    stack = stack_of(Lora(rank=2), Prompt(length=3))
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.add_(0.1)
    stack.merge("lora", keep=False)
    with (
        torch.no_grad(),
        pytest.raises(PeftxError, match="'lora' was folded into the weights"),
        stack.disabled(),
    ):
        pass
    with torch.no_grad(), stack.disabled("prompt-tuning"):
        folded = stack.model(IDS).logits
    with torch.no_grad(), base_alone(stack):
        assert torch.equal(stack.model(IDS).logits, folded)


def test_a_trial_leaves_no_trace() -> None:
    stack = stack_of(Lora(rank=2))
    step = TrainStep(stack, BATCH)
    step.backward(step.total_loss())
    before = [(p.detach().clone(), p.grad.clone()) for p in step.parameters()]
    state = torch.get_rng_state()
    with step.trial():
        torch.rand(3)
        moved(stack)
        assert all(p.grad is None for p in step.parameters())
        step.total_loss().backward()
    assert torch.equal(torch.get_rng_state(), state)
    for p, (value, gradient) in zip(step.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)


# -- sources ---------------------------------------------------------------------------------------------------------


class TwoSources(Plugin):
    """Adds the loss on rows of another source."""

    batches: list[list[list[int]]]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        batch = step.batch_of("others")
        self.batches = [*getattr(self, "batches", []), batch["input_ids"].tolist()]
        step.add_loss("others", lambda _: step.model(**batch).loss)
        return (yield)


def test_batches_of_a_further_source() -> None:
    plugin = TwoSources()
    stack = stack_of(Lora(rank=2), plugin)
    report = stack.train(ROWS, steps=3, batch_size=2, gradient_accumulation=2, sources={"others": OTHERS})
    assert set(report.terms) == {"task", "others"}
    seen = [tuple(t for t in row if t) for batch in plugin.batches for row in batch]
    assert len(seen) == 12
    assert len(set(seen[:5])) == 5, "every row once before any comes again"
    again = TwoSources()
    stack_of(Lora(rank=2), again).train(
        ROWS, steps=3, batch_size=2, gradient_accumulation=2, sources={"others": OTHERS}
    )
    assert again.batches == plugin.batches


def test_a_resumed_run_gets_the_same_batches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "sources": {"others": OTHERS}}
    whole = TwoSources()
    stack_of(Lora(rank=2), whole).train(ROWS, steps=4, **options)
    stack_of(Lora(rank=2), TwoSources()).train(ROWS, steps=2, checkpoint_every=2, output=tmp_path, **options)
    rest = TwoSources()
    stack_of(Lora(rank=2), rest).train(
        ROWS, steps=4, checkpoint_every=2, output=tmp_path, resume=True, **options
    )
    assert rest.batches == whole.batches[2:]


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no source 'others'") as caught:
        stack_of(Lora(rank=2), TwoSources()).train(ROWS, steps=1, sources={"other": OTHERS})
    assert caught.value.hint == "did you mean 'other'?"
    with pytest.raises(DataError, match="source 'others' has no rows"):
        stack_of(Lora(rank=2), TwoSources()).train(ROWS, steps=1, sources={"others": []})


class LooksAhead(Plugin):
    """Reads some of both sources before it trains."""

    sources = {"others": OTHERS}
    looked: dict[str, list[list[int]]]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if step.index == 0 and step.first_micro:
            self.looked = {
                name: [row for batch in step.batches_of(name, 5) for row in batch["input_ids"].tolist()]
                for name in ("train", "others")
            }
        return (yield)


def test_a_sample_of_the_rows_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop of one's own it is the step's batch, unless each of several processes has another."""
    seen: list[list[dict[str, Tensor]]] = []

    class Looks(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            seen.append(list(step.sample(3, by="looks")))
            return (yield)

    stack = stack_of(Lora(rank=2), Looks())
    stack.train(ROWS, steps=2, batch_size=2)
    assert sum(len(batch["input_ids"]) for batch in seen[0]) == 3
    assert torch.equal(seen[0][0]["input_ids"], seen[1][0]["input_ids"]), "the same ones in every step"
    stack.train_step(dict(BATCH))
    assert [torch.equal(batch["input_ids"], IDS) for batch in seen[2]] == [True]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="looks: every process would look at a batch of its own"):
        stack.train_step(dict(BATCH))


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        ("[lora, linupper]", "'linupper' trains in one process, and there are 2: each would weigh"),
        (
            "[sift]",
            "'sift' trains in one process, and there are 2: each would grow other entries; or grow: momentum",
        ),
        ("[{use: sift, with: {grow: momentum}}]", ""),
        ("[apt]", "'apt' trains in one process, and there are 2: each would choose blocks by its own rows"),
        ("[lora, mezo]", "'mezo' trains in one process, and there are 2: it makes no gradients"),
    ],
)
def test_several_processes_are_refused_by_the_plan(stack: str, why: str) -> None:
    spec = (
        f"peftx: 1\nmodel: peftx:tiny\nstack: {stack}\ntrain: {{steps: 2}}\noutput: o\n"
        "data: {train: peftx:sample/train.jsonl}\nruntime: {engine: ray, workers: 2}\n"
    )
    found = plan(load_spec(spec, catalogue=Registry()).pipeline, registry=Registry())
    assert [conflict.reason.startswith(why) for conflict in found.conflicts] == [True] * bool(why)


def test_several_batches_of_a_source_each_row_once() -> None:
    plugin = LooksAhead()
    options: dict[str, Any] = {"steps": 1, "batch_size": 2}
    stack_of(Lora(rank=2), plugin).train(ROWS, sources={"others": OTHERS[:3]}, **options)
    first = plugin.looked
    for rows, wanted in ((first["train"], 5), (first["others"], 3)):
        assert len(rows) == wanted
        assert len({tuple(t for t in row if t) for row in rows}) == wanted
    tokens = stack_of().tokenizer(ROWS[0]["prompt"], add_special_tokens=False)["input_ids"]
    assert any(set(tokens) <= set(row) for row in first["train"] + first["others"])
    again = LooksAhead()
    stack_of(Lora(rank=2), again).train(ROWS, sources={"others": OTHERS[:3]}, **options)
    assert again.looked == first, "the same ones in every run"


def test_sources_that_a_plugin_needs_are_asked_for_before_the_first_step() -> None:
    plugin = LooksAhead()
    with pytest.raises(DataError, match="looks-ahead: there is no source 'others' of rows") as caught:
        stack_of(Lora(rank=2), plugin).train(ROWS, steps=1)
    assert caught.value.hint is not None
    assert "stack.train(..., sources={'others': rows})" in caught.value.hint
    assert "looked" not in vars(plugin)
    with pytest.raises(DataError, match="'train' is what the run trains on"):
        stack_of(Lora(rank=2)).train(ROWS, steps=1, sources={"train": OTHERS})


# -- in a spec -------------------------------------------------------------------------------------------------------


def test_plan_shows_phases_and_refuses_those_that_do_not_fit() -> None:
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: peftx:sample/train.jsonl}\n"
    text += "stack: [lt-sft]\ntrain: {steps: STEPS}\n"
    for steps, whole in (("10", True), ("1", False)):
        pipeline = load_spec(text.replace("STEPS", steps), catalogue=Registry()).pipeline
        found = plan(pipeline)
        (train,) = (stage for stage in found.stages if stage.name == "train")
        if whole:
            assert train.detail == "lt-sft: find 5, tune 5 steps"
        else:
            assert "lt-sft" in str(found.conflicts)


@pytest.mark.parametrize(
    ("phases", "total", "way_out", "enough"),
    [
        ((Phase("a", 4), Phase("b")), 2, "more than 4 steps", 5),
        ((Phase("a", 1), Phase("b", 3), Phase("c")), 3, "more than 4 steps", 5),
        ((Phase("a", 0.9), Phase("b")), 2, "more steps", 5),
    ],
)
def test_a_run_of_the_length_that_the_refusal_names_fits(
    phases: Sequence[Phase], total: int, way_out: str, enough: int
) -> None:
    with pytest.raises(PeftxError) as caught:
        spans(phases, total, owner="x")
    assert way_out in str(caught.value.hint)
    assert len(spans(phases, enough, owner="x")) == len(phases)


def test_plan_tells_of_sources_that_are_not_there() -> None:
    registry = Registry(
        [*entry_points(group=GROUP), EntryPoint("looks-ahead", f"{__name__}:LooksAhead", GROUP)]
    )
    text = "peftx: 1\nmodel: peftx:tiny\ndata:\n  train: peftx:sample/train.jsonl\nSOURCES"
    text += "stack: [lora, looks-ahead]\ntrain: {steps: 1}\n"
    for sources, missing in (("", True), ("  sources: {others: peftx:sample/held_out.jsonl}\n", False)):
        found = plan(
            load_spec(text.replace("SOURCES", sources), catalogue=registry).pipeline, registry=registry
        )
        assert ("no source 'others'" in str(found.conflicts)) is missing


def test_two_stacks_may_wait_for_an_update_at_once() -> None:
    """Each for its own optimizer's, whichever comes first."""

    class Waits(Lora):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            step.after_update(lambda _: told.append(step.stack))
            return (yield)

    told: list[Stack] = []
    stacks = [Stack(tiny("llama"), [Waits(rank=2)], tokenizer=tiny_tokenizer()) for _ in range(3)]
    optimizers = [
        torch.optim.SGD([p for p in s.model.parameters() if p.requires_grad], lr=0.1) for s in stacks
    ]
    for stack in stacks:
        ids = example_inputs(stack.model)["input_ids"]
        stack.train_step({"input_ids": ids, "labels": ids})
    for place in (1, 0, 2):
        optimizers[place].step()
    assert told == [stacks[1], stacks[0], stacks[2]]
    optimizers[0].step()
    assert len(told) == 3


@pytest.mark.parametrize("kind", ["packed", "dora"])
def test_a_reference_computes_with_the_values_that_it_lends(kind: str) -> None:
    """What a layer keeps of the numbers that it had is not theirs, and not kept for those that come back."""
    plugin = AlphaTuning(bits=2) if kind == "packed" else Dora(rank=2)
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer(), inject=kind == "dora")
    if kind == "packed":
        stack.compress(None, ["alphatuning"])
        stack.inject()
    stack.model.eval()
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    with torch.no_grad():
        now = stack.model(IDS).logits
        with swapped([(p, p * 1.5 + 0.1) for p in parameters]):
            lent = stack.model(IDS).logits
            again = stack.model(IDS).logits
        assert torch.equal(stack.model(IDS).logits, now)
        for p in parameters:
            p.mul_(1.5).add_(0.1)
        assert torch.equal(stack.model(IDS).logits, lent)
    assert torch.equal(lent, again)
    assert not torch.equal(lent, now)
