from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import PeftxError, TargetError
from peftx.kernel.parts import DeltaPart
from peftx.kernel.plugin import Claim, Plugin
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_learner_modules import Learner, LearnerModules
from peftx_lora import Lora
from peftx_nf4 import NF4Storage

test_conformance = conformance("learner-modules")

ROWS = [{"prompt": "It is", "completion": word} for word in ("so", "not so", "late", "dark")]
RUN: dict[str, Any] = {
    "batch_size": 2,
    "max_length": 48,
    "weight_decay": 0.1,
    "schedule": "constant",
    "warmup_steps": 0,
}


def stack_of(arch: str = "llama", *before: Plugin, head: str | None = None, **options: Any) -> Stack:
    plugin = LearnerModules(**{"rank": 2, **options})
    return Stack(tiny(arch, head=head), [*before, plugin], tokenizer=tiny_tokenizer())


def trained(steps: int, rate: float = 1e-2, **options: Any) -> Stack:
    stack = stack_of(**options)
    stack.train(ROWS, steps=steps, learning_rate=rate, **RUN)
    return stack


def values(stack: Stack) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in stack.model.named_parameters() if p.requires_grad}


def test_a_learner_by_hand() -> None:
    learner = Learner(2, 2, 1, ())
    assert not learner.U.any()
    assert 0 < float(learner.V.detach().abs().max()) <= 2**-0.5
    with torch.no_grad():
        learner.V.copy_(torch.tensor([[1.0, 2.0]]))
        learner.U.copy_(torch.tensor([[3.0], [-1.0]]))
    x, y = torch.tensor([[5.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    assert learner(x, y.clone()).tolist() == [[31.0, 3.0]]  # V x = 7
    weight, bias = learner.fold(torch.ones(2, 2), y[0])
    assert weight.tolist() == [[4.0, 7.0], [0.0, -1.0]]
    assert bias is not None
    assert torch.equal(bias, y[0])


def test_merged_it_computes_the_same() -> None:
    stack = trained(2)
    inputs = example_inputs(stack.model)
    given = output_of(stack.model.eval(), inputs)
    stack.merge()
    torch.testing.assert_close(output_of(stack.model, inputs), given, rtol=1e-5, atol=1e-6)


def test_it_learns_on_a_compressed_encoder(tmp_path: Path) -> None:
    """As in the paper, one that was compressed first: its integers stay, and learners and norms learn the classes."""
    model = tiny("bert", head="classification")
    model.config.id2label, model.config.label2id = {0: "dark", 1: "late"}, {"dark": 0, "late": 1}
    plugins = [NF4Storage(), LearnerModules(rank=4)]
    stack = Stack(model, plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["nf4"])
    packed = {name: t.clone() for name, t in stack.ledger.tensors("nf4").items()}
    stack.inject()
    rows = [{"text": f"{word} {n}", "label": word} for n in range(8) for word in ("dark", "late")]
    report = stack.train(rows, steps=40, learning_rate=1e-2, batch_size=8, max_length=24)
    assert report.losses[0][1] > 0.5
    assert report.losses[-1][1] < 0.1
    assert packed.keys() == stack.ledger.tensors("nf4").keys()
    assert all(torch.equal(t, packed[name]) for name, t in stack.ledger.tensors("nf4").items())
    learners = stack.ledger.of("learner-modules", DeltaPart)
    assert len(learners) == 4  # both matrices of two layers, packed ones
    assert all(bool(part.module.U.any()) and isinstance(part.place, QuantLinear) for part in learners)
    inputs = example_inputs(stack.model)
    given = output_of(stack.model.eval(), inputs)
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out")
    assert torch.equal(output_of(again.model.eval(), inputs), given)


@pytest.mark.parametrize("norms", [True, False])
def test_learners_norms_and_the_head_train_and_nothing_else(norms: bool) -> None:
    stack = stack_of("bert", head="classification", norms=norms)
    model = tiny("bert", head="classification")
    count = sum(p.numel() for name, p in model.named_parameters() if name.startswith("classifier"))
    if norms:
        count += sum(p.numel() for name, p in model.named_parameters() if "LayerNorm" in name)
    for part in stack.ledger.of("learner-modules", DeltaPart):
        count += 2 * sum(part.module.U.shape[:1] + part.module.V.shape[1:])
    assert stack.trainable_parameters() == count
    assert (Claim.TRAINS_BASE in stack.plugins["learner-modules"].claims) == norms


def test_without_priming_and_norms_it_is_lora() -> None:
    """With s = 1."""
    start, lora = (
        stack_of(norms=False),
        Stack(tiny("llama"), [Lora(rank=2, alpha=2, targets="mlp")], tokenizer=tiny_tokenizer()),
    )
    with torch.no_grad():
        for ours, other in zip(deltas_of(start), deltas_of(lora), strict=True):
            other.A.copy_(ours.V)
    lora.train(ROWS, steps=3, learning_rate=1e-2, **RUN)
    for ours, other in zip(deltas_of(trained(3, norms=False, priming=0)), deltas_of(lora), strict=True):
        torch.testing.assert_close(ours.U, other.B)
        torch.testing.assert_close(ours.V, other.A)
        assert ours.U.any()


def deltas_of(stack: Stack) -> list[Any]:
    return [part.module for part in stack.ledger.all(DeltaPart)]


def norms_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in found.items() if "norm" in name}


def watched(at: int, steps: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values behind so many steps, and at the run's end."""
    found, stack = {}, stack_of(**options)

    def watch(done: int, total: int, told: Any) -> None:
        if done == at:
            found.update(values(stack))

    stack.train(ROWS, steps=steps, learning_rate=1e-2, progress=watch, **RUN)
    return found, values(stack)


def test_norms_stand_while_learners_are_primed() -> None:
    start = values(stack_of())
    primed, end = watched(2, 4, priming=2)
    for name, p in start.items():
        assert torch.equal(primed[name], p) == ("norm" in name), name
        assert not torch.equal(end[name], primed[name]), name


def test_priming_is_training_at_a_higher_rate() -> None:
    primed, _ = watched(3, 4, priming=3, priming_rate=3.0, norms=False)
    three, slow = (values(trained(3, rate=rate, priming=0, norms=False)) for rate in (3e-2, 1e-2))
    for name, p in primed.items():
        torch.testing.assert_close(p, three[name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(p, slow[name], rtol=1e-3, atol=1e-4)


def test_others_keep_their_rate_and_a_step_is_stretched_once() -> None:
    def first_step(rho: float) -> dict[str, Tensor]:
        stack = stack_of("llama", Lora(rank=2, targets="attention.q"), priming=1, priming_rate=rho)
        before, batch = values(stack), example_inputs(stack.model)
        optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
        for micro in (0, 1):
            stack.train_step(
                batch | {"labels": batch["input_ids"]}, optimizer=optimizer, micro=micro, accumulation=2
            )
        return {name: p - before[name] for name, p in values(stack).items()}

    one, five = first_step(1.0), first_step(5.0)
    for name, step in five.items():
        rho = 5.0 if ".learner-modules" in name else 1.0
        torch.testing.assert_close(step, rho * one[name], rtol=1e-4, atol=1e-6)
    assert any(step.any() for name, step in five.items() if ".lora" in name)
    assert any(step.any() for name, step in five.items() if ".learner-modules" in name)


def test_a_further_run_is_not_primed(tmp_path: Path) -> None:
    stack = trained(3, priming=0.4)
    assert [phase.name for phase in stack_of(priming=0.4).plugins["learner-modules"].phases()] == [
        "priming",
        "tuning",
    ]
    assert [phase.name for phase in stack.plugins["learner-modules"].phases()] == ["tuning"]
    assert [phase.name for phase in LearnerModules(priming=0).phases()] == ["tuning"]
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    before = norms_of(values(again))
    again.train(ROWS, steps=1, learning_rate=1e-2, **RUN)
    assert all(not torch.equal(p, before[name]) for name, p in norms_of(values(again)).items())


def test_clear_errors() -> None:
    with pytest.raises(PeftxError, match="must be whole"):
        LearnerModules(priming=1.5)
    with pytest.raises(PeftxError, match="learner-modules: rank 33 exceeds"):
        stack_of(rank=33)
    with pytest.raises(TargetError, match="learner-modules"):
        stack_of("mamba")
    with pytest.raises(PeftxError, match="priming"):
        stack_of(priming=3).train(ROWS, steps=3, **RUN)
