from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import peftx
from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError
from peftx.kernel.modes import as_it_was
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx.toolkits.evaluation import head_answers
from peftx_deft import Deft
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora
from peftx_ls_llama import LsLlama
from peftx_rfc import Rfc, dro, halves
from peftx_sift import Sift

test_conformance = conformance("rfc")

ALL = ["xp", "xq", "yp", "yq"]
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.02, "weight_decay": 0.1}


def rows_of(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of two letters: the first tells the class of nine rows in ten, the second of three in four."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        y = draw.random() < 0.5
        a, b = (y == (draw.random() < often) for often in (0.9, 0.75))
        found.append({"text": "xy"[a] + "pq"[b], "label": ("negative", "positive")[y]})
    return found


ROWS = rows_of(12)


def stack_of(*beside: Plugin, arch: str = "llama", **options: Any) -> tuple[Stack, Rfc]:
    plugin = Rfc(**{"first": 2, "discovery": 2, "synthesis": 2, **options})
    return Stack(tiny(arch), [*beside, plugin], tokenizer=tiny_tokenizer()), plugin


class Watch(Plugin):
    """Notes the phases, and all that trains before a step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []
        self.known: list[dict[str, Any]] = []

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        self.seen.append({name: x.detach().clone() for name, x in step.stack.ledger.trained().items()})
        known = step.memory["rfc"]
        self.known.append(known and known | {"models": [*known["models"]]})
        return (yield)


def run(*beside: Plugin, steps: int = 8, **options: Any) -> tuple[Stack, Rfc, Watch, list[str]]:
    watch, phases = Watch(), []
    plugin = Rfc(**{"first": 2, "discovery": 2, "synthesis": 2, **options})
    stack = Stack(tiny("llama"), [*beside, plugin, watch], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=steps, progress=lambda *told: phases.append(told[2]["rfc"]), **RUN)
    return stack, plugin, watch, phases


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


# -- the losses --------------------------------------------------------------------------------------------------------


def test_the_worst_group_alone_is_trained() -> None:
    """Groups of two models, side by side: the means are 2, 4, 3 and 3."""
    each = torch.tensor([1.0, 3.0, 5.0, 3.0], requires_grad=True)
    right = torch.tensor([[True, True, False, False], [True, False, True, False]])
    loss = dro(each, right)
    assert loss == 4
    loss.backward()
    assert each.grad.tolist() == [0, 0, 0.5, 0.5]


def test_groups_without_rows_count_nothing() -> None:
    each = torch.tensor([-1.0, -3.0])
    assert dro(each, torch.tensor([[True, True]])) == -2
    assert dro(each, torch.tensor([[False, False]])) == -2


def test_half_of_the_synthesis_is_over_rows_that_tell_models_apart() -> None:
    each = torch.tensor([1.0, 2.0, 3.0, 10.0])
    right = torch.tensor([[True, False, True, True], [True, False, True, False]])
    assert halves(each, right) == (2 + 10) / 2
    assert halves(each, right[:1].expand(2, 4)) == 4, "no such rows"
    assert halves(each, torch.stack((right[0], ~right[0]))) == 4, "no others"


def step_in(
    stack: Stack, plugin: Rfc, phase: str, models: list[dict[str, Tensor]], batch: dict[str, Tensor]
) -> TrainStep:
    """A step in the middle of this phase, that has gone back."""
    step = TrainStep(stack, dict(batch), index=5, total=9, memory={})
    step.memory |= {"phases": {"rfc": [[phase, 4, 9]]}, "rfc": {"start": {}, "models": models}}
    step.memory["rfc"] = {} if phase == "task" else step.memory["rfc"]
    stack.model.zero_grad()
    stack.run_train_step(step)
    return step


def batch_of(stack: Stack) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, batch=6, padding="right")
    return inputs | {"labels": inputs["input_ids"], "class_index": torch.tensor([0, 1, 2, 0, 1, 2])}


def other_values(stack: Stack, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=random) for name, x in stack.ledger.trained().items()}


@pytest.mark.parametrize("phase", ["discovery 0", "discovery 2", "synthesis", "task"])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_step_by_hand(phase: str, arch: str) -> None:
    stack, plugin = stack_of(Lora(rank=2), arch=arch, labels=["a", "b", "c"], rounds=3)
    batch = batch_of(stack)
    models = [other_values(stack, k) for k in range({"discovery 2": 2, "synthesis": 3}.get(phase, 0))]
    step = step_in(stack, plugin, phase, models, batch)
    gradient = [p.grad.clone() for p in step.parameters()]

    def z() -> Tensor:
        out = stack.model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        h, mask = out.hidden_states[-1], batch["attention_mask"]
        ends = mask.sum(1) - 1
        if arch == "llama":
            pooled = h[torch.arange(6), ends]
        else:
            pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        A, b = plugin.head.linear.weight.view(3, 3, -1), plugin.head.linear.bias.view(3, 3)
        return torch.einsum("bd,kcd->bkc", pooled, A) + b

    y, told = batch["class_index"], []
    for values in models:
        with as_it_was(stack.ledger, values):
            told.append(z().mean(1).argmax(-1))
    own = z()
    each = cross_entropy(own.mean(1), y, reduction="none")
    if phase == "synthesis":
        each = sum(cross_entropy(own[:, k], told[k], reduction="none") for k in range(3)) / 3
        counts = sum((m == y).long() for m in told)
        alike = (counts == 0) | (counts == 3)
        expected = (each[alike].mean() + each[~alike].mean()) / 2
    elif models:
        groups = [each[(m == y) == good] for m in told for good in (True, False)]
        assert sum(len(g) > 0 for g in groups) > 2
        expected = max(g.mean() for g in groups if len(g))
    else:
        expected = each.mean()
    assert step.losses["task"] == pytest.approx(float(expected.detach()), rel=1e-4)
    stack.model.zero_grad()
    expected.backward()
    for p, found in zip(step.parameters(), gradient, strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-5)


def test_heads_that_say_what_the_models_say_have_nothing_to_learn() -> None:
    """The models are linear in the encoder: each head is one of them, ten times."""
    stack, plugin = stack_of(labels=["a", "b", "c"], rounds=2)
    models = [other_values(stack, k) for k in range(2)]
    for values in models:
        values["rfc/peftx_parts.heads.linear.bias"].mul_(0.1)
    with torch.no_grad():
        for name, x in stack.ledger.trained().items():  # z of a model is the mean of its two heads
            x.copy_(torch.cat([50 * values[name].unflatten(0, (2, 3)).mean(0) for values in models]))
    step = step_in(stack, plugin, "synthesis", models, batch_of(stack))
    assert step.losses["task"] < 0.02


# -- the phases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [Lora(rank=2), FullFinetuning(), Sift(density=0.05)])
def test_each_model_starts_where_the_run_began(beside: Plugin) -> None:
    _, plugin, watch, phases = run(beside, rounds=3, steps=10)
    names = ["discovery 0", "discovery 1", "discovery 2", "synthesis", "task"]
    assert phases == [name for name in names for _ in range(2)]
    seen, known = watch.seen, watch.known
    for first in (2, 4, 6):
        assert equal(seen[first], seen[0])
        assert not equal(seen[first + 1], seen[0]), "and trains"
    assert [len(k["models"]) for k in known[:8]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(equal(known[i]["start"], seen[0]) for i in range(8))
    models = known[7]["models"]
    assert not any(equal(one, seen[0]) for one in models), "what each phase ended with"
    assert not equal(models[0], models[1])
    assert not any(x.requires_grad for one in models for x in one.values())
    assert not equal(seen[8], seen[0]), "the task goes on from the synthesis"
    assert known[8] == known[9] == {}
    assert plugin.state == {"rich": True}


def test_a_model_is_what_its_phase_ended_with() -> None:
    """A run that ends there has the same."""
    _, _, watch, _ = run(Lora(rank=2))
    stack, _ = stack_of(Lora(rank=2), first=5)
    memory: dict[str, Any] = {}

    class End(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            if step.index == 2:
                memory.update({name: x.detach().clone() for name, x in step.stack.ledger.trained().items()})
            return (yield)

    stack = Stack(
        tiny("llama"),
        [Lora(rank=2), Rfc(first=5, discovery=1, synthesis=1), End()],
        tokenizer=tiny_tokenizer(),
    )
    stack.train(ROWS, steps=8, **RUN)
    assert equal(watch.known[3]["models"][0], memory)


def test_each_phase_begins_with_an_optimizer_that_is_empty() -> None:
    stack, _ = stack_of(Lora(rank=2))
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer, counts = torch.optim.AdamW(parameters, lr=0.01), []
    batch = batch_of(stack) | {"class_index": torch.tensor([0, 1, 0, 1, 0, 1])}
    for _ in range(8):
        stack.train_step(dict(batch), optimizer=optimizer)
        counts.append({int(optimizer.state[p]["step"]) for p in parameters})
    assert counts == [{1}, {2}] * 4


@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_may_be_frozen_in_the_last_phase(frozen: bool) -> None:
    """Also where another plugin adds to the loss, and weights decay."""
    stack, _, watch, _ = run(Lora(rank=2), Deft(), frozen=frozen, steps=9)
    end = stack.ledger.trained()
    moved = {name for name, x in watch.seen[6].items() if not torch.equal(x, end[name])}
    heads = {name for name in end if name.startswith("rfc/")}
    assert moved == (heads if frozen else set(end))
    before = {name for name, x in watch.seen[4].items() if not torch.equal(x, watch.seen[5][name])}
    assert before > heads, "not in those before"


def test_a_bundle_goes_on_with_the_task(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2), Rfc(first=1, discovery=1, synthesis=1)])
    stack.train(ROWS, steps=5, **RUN)
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b")
    assert [phase.name for phase in again.plugins["rfc"].phases()] == ["task"]
    assert again.classify(ALL) == stack.classify(ALL)
    before = again.ledger.trained()["rfc/peftx_parts.heads.linear.weight"].detach().clone()
    again.train(ROWS, steps=1, learning_rate=1e-4, batch_size=4)
    after = again.ledger.trained()["rfc/peftx_parts.heads.linear.weight"].detach()
    assert 0 < (after - before).abs().max() < 2e-4


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_the_second_model_reads_what_the_first_does_not_and_the_last_has_both() -> None:
    watch, plugin = Watch(), Rfc(first=12, discovery=36, synthesis=30)
    stack = Stack(tiny("llama"), [FullFinetuning(), plugin, watch], tokenizer=tiny_tokenizer())
    stack.train(rows_of(96), steps=80, batch_size=32, learning_rate=7e-3)
    N, P = "negative", "positive"
    found = []
    for values in watch.known[60]["models"]:
        with as_it_was(stack.ledger, values):
            found.append(stack.classify(ALL))
    assert found == [[N, N, P, P], [N, P, N, P]]  # by the first letter, by the second
    with as_it_was(stack.ledger, watch.seen[78]):  # the end of the synthesis
        answers = torch.cat([*head_answers(stack, plugin.head, plugin.texts.rows(stack, ALL))])
    assert plugin.apart(answers).argmax(-1).T.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert stack.classify(ALL) == [N, N, P, P]


def test_a_class_is_that_of_the_mean_of_the_heads() -> None:
    stack, plugin = stack_of(rounds=3)
    answers = torch.cat([*head_answers(stack, plugin.head, plugin.texts.rows(stack, ALL))])
    labels, scores = plugin.classify(stack, ALL)
    assert labels == ["negative", "positive"]
    torch.testing.assert_close(scores, (answers[:, :2] + answers[:, 2:4] + answers[:, 4:]) / 3)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_phases_of_a_run() -> None:
    found = [(phase.name, phase.share) for phase in Rfc(rounds=3, first=7).phases()]
    assert found == [
        ("discovery 0", 7), ("discovery 1", 0.3), ("discovery 2", 0.3), ("synthesis", 0.3), ("task", None)
    ]  # fmt: skip


@pytest.mark.parametrize("index", [1, 2, 5])
def test_a_loop_that_forgets_is_refused(index: int) -> None:
    stack, _ = stack_of(Lora(rank=2))
    with pytest.raises(PeftxError, match=f"rfc: step {index} does not remember how the run started"):
        stack.run_train_step(TrainStep(stack, batch_of(stack), index=index, total=10))


@pytest.mark.parametrize("arch", ["t5", "vit", "clip"])
def test_models_without_one_tower_of_text_are_refused(arch: str) -> None:
    with pytest.raises(ArchitectureError):
        stack_of(arch=arch)


def test_a_second_head_of_classes_is_refused() -> None:
    with pytest.raises(ConflictError, match="names a text's class"):
        stack_of(LsLlama())


def test_rows_of_one_class_are_refused() -> None:
    stack, _ = stack_of()
    with pytest.raises(DataError, match="rfc: all 12 rows are of one class, 'positive'"):
        stack.train([{**row, "label": "positive"} for row in ROWS], steps=6)


@pytest.mark.parametrize(
    "options", [{"rounds": 1}, {"first": 0}, {"discovery": 0}, {"synthesis": -1}, {"labels": ["one"]}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Rfc(**options)
