"""What was done is undone whole or not at all: odd orders of merging, folding, compressing, removing, switching off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Claim, Delta, Plugin, Stack, hookimpl
from peftx.errors import ConflictError, MergeError, PeftxError, PluginError
from peftx.testing import tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear

IDS = torch.arange(3, 27).reshape(2, 12)


class Scale(Delta):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.full((width,), 1.25))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.z

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z[:, None], None if bias is None else bias * self.z


class Stiff(Scale):
    """Does not fold."""

    fold = Delta.fold


class Scales(Plugin):
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.up"):
            site.attach(Scale(site.out_features))


class StiffInOneLayer(Plugin):
    @hookimpl
    def inject(self, model: Any) -> None:
        site = model.linears("mlp.up")[-1]
        site.attach(Stiff(site.out_features))


class TrainsBase(Plugin):
    claims = {Claim.TRAINS_BASE}

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.up"):
            site.train("weight")


class Quantizes(Plugin):
    claims: ClassVar[set[Claim]] = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}

    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp.up", whole=True):
            site.replace(QuantLinear.from_linear(site.module, bits=8))


class FailsHalfWay(Quantizes):
    @hookimpl
    def compress(self, model: Any) -> None:
        self.state["seen"] = 1
        site = model.linears("mlp.up", whole=True)[0]
        site.replace(QuantLinear.from_linear(site.module, bits=8))
        raise ValueError("half way")


class QuantizesEarly(Quantizes):
    claims: ClassVar[set[Claim]] = {Claim.QUANTIZES}


def stack_of(*plugins: Any, inject: bool = True) -> Stack:
    return Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=inject)


@torch.no_grad()
def logits(stack: Stack) -> Tensor:
    return stack.model(IDS).logits


def state(stack: Stack) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stack.model.state_dict().items()}


def same(stack: Stack, before: dict[str, Tensor]) -> bool:
    now = stack.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@torch.no_grad()
def train(stack: Stack, id: str) -> None:
    for parameter in stack.ledger.parameters(id):
        parameter.mul_(1.5)


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_that_one_layer_refuses_changes_none(keep: bool) -> None:
    stack = stack_of(StiffInOneLayer(), Scales())
    before = state(stack)
    with pytest.raises(MergeError, match="nearer to the weights"):
        stack.merge("scales", keep=keep)
    assert same(stack, before)
    stack.remove("scales")  # it was not folded


def test_a_refused_merge_keeps_an_earlier_one() -> None:
    stack = stack_of(Scales(), StiffInOneLayer(), ("later", Scales()))
    stack.merge("scales")
    before = state(stack)
    for keep in (True, False):
        with pytest.raises(MergeError):
            stack.merge("later", keep=keep)
        assert stack.ledger.merged() == ["scales"]
        assert same(stack, before)
    stack.unmerge()


def test_folding_goes_by_the_stack_and_keeps_other_merges() -> None:
    stack = stack_of(Scales(), ("b", Scales()), ("c", Scales()))
    before = logits(stack)
    stack.merge("scales", "b", "c")
    stack.merge("b", "scales", keep=False)
    assert stack.ledger.merged() == ["c"]
    assert torch.allclose(logits(stack), before, atol=1e-5)


def test_unmerged_weights_follow_a_cast() -> None:
    stack = stack_of(TrainsBase(), Scales())
    stack.merge("scales")
    stack.model.to(torch.bfloat16)
    stack.unmerge()
    stack.remove("trains-base")
    assert {p.dtype for p in stack.model.parameters()} == {torch.bfloat16}
    logits(stack)


# -- switching off and removing ----------------------------------------------------------------------------------------


def test_a_scope_within_a_scope() -> None:
    stack = stack_of(Scales(), ("other", Scales()))
    full = logits(stack)
    with stack.disabled("scales"):
        off = logits(stack)
        with stack.disabled():
            assert not torch.equal(logits(stack), off)
        assert torch.equal(logits(stack), off)
        stack.remove("other")
        logits(stack)
    assert not torch.equal(full, off)
    assert not any(at.disabled for at in stack.standing.values())


def test_removed_while_it_is_off() -> None:
    stack = stack_of(Scales())
    with stack.disabled():
        stack.remove("scales")
    assert not any(at.disabled for at in stack.standing.values())
    stack.generate("Once", max_new_tokens=2)


def test_a_trainer_of_the_base_under_a_merge_stays() -> None:
    stack = stack_of(TrainsBase(), Scales())
    train(stack, "trains-base")
    stack.merge("scales")
    before = state(stack)
    with pytest.raises(MergeError, match="unmerge"), stack.disabled("trains-base"):
        raise AssertionError("not reached")
    with pytest.raises(MergeError, match="unmerge"):
        stack.remove("trains-base")
    assert same(stack, before)


def test_weights_under_a_fold_are_not_taken_away() -> None:
    stack = stack_of(TrainsBase(), Scales())
    stack.merge("scales", keep=False)
    before = state(stack)
    for id in ("trains-base", "scales"):
        with pytest.raises(MergeError, match="folded"):
            stack.remove(id)
    assert same(stack, before)
    assert list(stack.plugins) == ["trains-base", "scales"]


def test_a_switch_that_one_layer_refuses_changes_none() -> None:
    stack = stack_of(Scales(), ("last", Scales()))
    stack.merge("scales")
    half = stack.ledger.carriers(["last"])[-1]
    half._peftx_slot.links[1].merged = True  # as if that layer alone had it merged
    with pytest.raises(MergeError), stack.disabled("last"):
        raise AssertionError("not reached")
    assert all(
        entry.enabled for place in stack.ledger.carriers(["last"]) for entry in place._peftx_slot.links
    )


# -- compressing -------------------------------------------------------------------------------------------------------


def test_a_compression_that_fails_changes_nothing(tmp_path: Path) -> None:
    stack = stack_of(Scales(), FailsHalfWay())
    before = state(stack)
    with pytest.raises(PluginError, match="half way"):
        stack.compress()
    assert same(stack, before)
    assert not any(at.folded for at in stack.standing.values())
    assert stack.plugins["fails-half-way"].state == {}
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle", model=tiny("llama"))), logits(stack))
    train(stack, "scales")
    stack.remove("scales")


def test_what_was_folded_for_a_compression_outlives_its_removal(tmp_path: Path) -> None:
    stack = stack_of(Scales(), Quantizes())
    adapted = logits(stack)
    stack.compress()
    with pytest.raises(MergeError, match="remove"):
        stack.remove("scales")
    stack.remove("quantizes")
    assert torch.allclose(logits(stack), adapted, atol=1e-5)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle", model=tiny("llama"))), logits(stack))


def test_what_was_trained_before_a_compression_is_still_removable() -> None:
    stack = stack_of(TrainsBase(), QuantizesEarly())
    base = logits(stack)
    train(stack, "trains-base")
    stack.compress()
    stack.remove("quantizes-early")
    stack.remove("trains-base")
    assert torch.equal(logits(stack), base)


def test_deltas_on_a_compressed_layer_keep_it() -> None:
    stack = stack_of(QuantizesEarly(), Scales(), inject=False)
    stack.compress()
    stack.inject()
    before = logits(stack)
    with pytest.raises(ConflictError, match=r"stack.remove\('scales'\)"):
        stack.remove("quantizes-early")
    assert torch.equal(logits(stack), before)
    stack.remove("scales")
    stack.remove("quantizes-early")


def test_replaced_layers_may_be_let_go() -> None:
    import gc
    import weakref

    stack = stack_of(Quantizes())
    old = [weakref.ref(site.module) for site in stack.anatomy.sites if site.role == "mlp.up"]
    stack.compress(keep=False)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    with pytest.raises(MergeError, match="not kept"):
        stack.remove("quantizes")


# -- training ----------------------------------------------------------------------------------------------------------


def test_what_is_in_the_weights_takes_no_step() -> None:
    class Steps(Scales):
        @hookimpl(wrapper=True)
        def train_step(self, step: Any) -> Any:
            raise AssertionError("there is nothing left of it to train")
            yield

    stack = stack_of(("steps", Steps()), Scales())
    stack.merge("steps", keep=False)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    assert stack.train_step(batch) > 0


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_training_what_does_not_act_is_refused(state: str) -> None:
    stack = stack_of(Scales())
    rows = [{"text": "Once upon a time there was a fox."}] * 4
    if state == "merged":
        stack.merge()
        with pytest.raises(PeftxError, match="unmerge"):
            stack.train(rows, steps=1)
    else:
        with stack.disabled(), pytest.raises(PeftxError, match="switched off"):
            stack.train(rows, steps=1)


def test_a_copy_of_a_stack_is_its_own() -> None:
    stack = stack_of(Scales())
    before = state(stack)
    with pytest.raises(PeftxError, match="save"):
        copy.deepcopy(stack)
    assert same(stack, before)
