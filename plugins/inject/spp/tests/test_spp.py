from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Plugin, Stack
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.anatomy.site import Site
from peftx.kernel.parts import DeltaPart
from peftx.kernel.plugin import Claim
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_hft import Hft
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prefixquant import PrefixQuant
from peftx_prompt_tuning import PromptTuning
from peftx_signround import SignRound
from peftx_spp import Spp, SppDelta, largest

test_conformance = conformance("spp")


@torch.no_grad()
def pruned(arch: str = "llama") -> nn.Module:
    """A tiny model with 2:4 zeros in all of its layers' matrices; in one of them far more."""
    model = tiny(arch)
    for site in Stack(model, []).anatomy.sites:
        if site.in_all:
            site.weight.copy_(site.weight * largest(site.weight, 2, 4))
    return model


def spp_of(stack: Stack) -> list[SppDelta]:
    return [part.module for part in stack.ledger.of("spp", DeltaPart)]


@torch.no_grad()
def perturbed(stack: Stack) -> Stack:
    torch.manual_seed(0)
    for delta in spp_of(stack):
        delta.B.normal_(0, 0.5)
    return stack


def logits(stack: Stack) -> Tensor:
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model))


def batch_of(stack: Stack) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model)
    return {**inputs, "labels": inputs["input_ids"]}


def matrices(stack: Stack) -> Iterator[tuple[str, Tensor]]:
    return ((s.key, s.weight.detach()) for s in stack.anatomy.sites if s.in_all)


def layer(W: Tensor, b: Tensor | None = None, **options: Any) -> tuple[SppDelta, nn.Linear]:
    module = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    with torch.no_grad():
        module.weight.copy_(W)
    delta = SppDelta(
        Site("mlp.up", "up", module, "linear"),
        **({"rank": 2, "scale": 1.0, "dropout": 0.0, "pruned": False} | options),
    )
    return delta.eval(), module


def test_equation_by_hand() -> None:
    """Four rows, two groups: rows 0 and 1 have the first row of A."""
    W = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 4.0], [5.0, 6.0]])
    delta, _ = layer(W, scale=0.5)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2.0], [-1.0, 4.0]]))
        delta.B.copy_(torch.tensor([2.0, 4.0, 6.0, -2.0]))
    expected = torch.tensor([[2.0, 0.0], [6.0, 15.0], [0.0, 52.0], [10.0, -18.0]])
    assert torch.equal(delta.fold(W, None)[0], expected)
    x, y = torch.tensor([[1.0, 10.0], [0.0, 1.0]]), torch.randn(2, 4)
    assert torch.allclose(delta(x, y), y + x @ (expected - W).t())


def test_rows_that_groups_do_not_divide() -> None:
    """Row i of m = 5 is in group floor(3 i / 5): 0, 0, 1, 1, 2."""
    delta, module = layer(torch.ones(5, 4), rank=3)
    with torch.no_grad():
        delta.A.copy_(torch.arange(3.0)[:, None].expand(3, 4))
        delta.B.fill_(1.0)
    assert delta.fold(module.weight, None)[0][:, 0].tolist() == [1, 1, 2, 2, 3]


def test_gradients_of_A_and_B() -> None:
    """Those of W' itself, with a bias and over leading dimensions."""
    torch.manual_seed(0)
    W = torch.randn(6, 4)
    delta, module = layer(W, scale=2.0)
    with torch.no_grad():
        delta.B.normal_()
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = torch.autograd.grad(delta(x, module(x)).square().sum(), (x, delta.A, delta.B))
    A, B = (p.detach().requires_grad_() for p in (delta.A, delta.B))
    expanded = A.repeat_interleave(3, 0)
    whole = W * (1 + 2 * expanded * B[:, None])
    expected = torch.autograd.grad((x @ whole.t()).square().sum(), (x, A, B))
    assert all(torch.allclose(f, e, atol=1e-4) for f, e in zip(found, expected, strict=True))


def test_no_product_of_the_size_of_W_is_kept() -> None:
    delta, module = layer(torch.randn(64, 32), pruned=True, dropout=0.5)
    delta.train()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        delta(torch.randn(2, 32), torch.zeros(2, 64))
    own = {t.data_ptr() for t in (module.weight, delta.A, delta.B, delta.left)}
    assert all(t.numel() < module.weight.numel() for t in kept if t.data_ptr() not in own)


def test_it_starts_as_the_pruned_model() -> None:
    model = pruned()
    with torch.no_grad():
        before = output_of(model, example_inputs(model))
    stack = Stack(model, [Spp()])
    assert torch.equal(logits(stack), before)
    stack.model.train()
    assert torch.equal(logits(stack), before)  # dropout is of what is added alone
    assert Claim.IDENTITY_AT_START in stack.plugins["spp"].claims
    assert Claim.IDENTITY_AT_START not in Spp(sparsity=0.5).claims


def test_a_is_uniform_and_what_trains() -> None:
    stack = Stack(pruned(), [Spp(rank=8)])
    sites = [site for site in stack.anatomy.sites if site.in_all]
    assert stack.trainable_parameters() == sum(8 * s.in_features + s.out_features for s in sites)
    for delta, site in zip(spp_of(stack), sites, strict=True):
        bound = site.in_features**-0.5
        assert 0.8 * bound < delta.A.max() <= bound
        assert -bound <= delta.A.min() < -0.8 * bound
        assert not delta.B.any()
        assert delta.scale == 4.0  # 32 / 8
    assert spp_of(Stack(pruned(), [Spp()]))[0].scale == 2.0  # what the released scripts compute


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "mixtral", "bert"])
def test_zeros_stay_zeros_and_merging_changes_no_output(arch: str) -> None:
    """Conv1D, fused and stacked matrices too; after training with a weight decay."""
    stack = Stack(pruned(arch), [Spp(rank=4)])
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=4e-2)
    stack.model.train()
    for _ in range(3):
        stack.train_step(batch_of(stack), optimizer=optimizer)
    stack.model.eval()
    assert all(delta.B.any() for delta in spp_of(stack))
    before = logits(stack)
    stack.merge(keep=False)
    assert torch.allclose(logits(stack), before, atol=1e-4)
    base, moved = dict(matrices(Stack(pruned(arch), []))), 0
    for key, W in matrices(stack):
        assert torch.equal(W == 0, base[key] == 0)
        assert ((W != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        moved += not torch.equal(W, base[key])
    assert moved == len(base)


@pytest.mark.parametrize(
    ("packs", "zeros"),
    [
        (NF4Storage(), True), (SignRound(steps=2, batch_size=2), True), (PrefixQuant(rotate=False), True),
        (PrefixQuant(), False),
    ],
)  # fmt: skip
def test_what_packs_it_keeps_the_zeros_unless_it_rotates(packs: Plugin, zeros: bool) -> None:
    stack = Stack(tiny("llama"), [Spp(rank=4, pattern="2:4"), packs], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for delta in spp_of(stack):
            delta.B.fill_(0.1)
    left = {part.path: part.module.left for part in stack.ledger.of("spp", DeltaPart)}
    stack.compress(
        ["All is well on the island, and the lamp was lit at six in the evening."] * 4, samples=4, length=24
    )
    assert logits(stack).isfinite().all()
    filled = [stack.model.get_submodule(path).weight[~kept].any() for path, kept in left.items()]
    assert not any(filled) if zeros else all(filled)


@pytest.mark.parametrize(
    "options", [{"pattern": "2:4"}, {"pattern": "1:4"}, {"sparsity": 0.3}, {"sparsity": 0.75}]
)
@pytest.mark.parametrize("arch", ["llama", "mixtral", "phi3"])
def test_pruning_by_size(arch: str, options: dict[str, Any]) -> None:
    """Of each group the largest are left, in each expert too, before and after training; then the base comes back."""
    stack = Stack(tiny(arch), [Spp(rank=4, **options)])
    base = {key: W.clone() for key, W in matrices(Stack(tiny(arch), []))}
    start = logits(stack)
    stack.merge()
    assert torch.allclose(logits(stack), start, atol=1e-4)
    for key, W in matrices(stack):
        size = 4 if "pattern" in options else W.shape[-1] * W.shape[-2]
        left = int(options["pattern"][0]) if "pattern" in options else size - int(options["sparsity"] * size)
        groups, dense = W.reshape(-1, size), base[key].reshape(-1, size)
        assert ((groups != 0).sum(-1) == left).all()
        assert torch.equal(groups[groups != 0], dense[groups != 0])
        smallest = dense.abs().masked_fill(groups == 0, float("inf")).amin(-1)
        assert (dense.abs().masked_fill(groups != 0, 0.0).amax(-1) <= smallest).all()
    zeros = {key: W == 0 for key, W in matrices(stack)}
    stack.unmerge()
    perturbed(stack)
    trained = logits(stack)
    assert not torch.allclose(trained, start, atol=1e-2)
    stack.merge()
    assert torch.allclose(logits(stack), trained, atol=1e-4)
    assert all(torch.equal(W == 0, zeros[key]) for key, W in matrices(stack))
    stack.unmerge()
    stack.remove("spp")
    assert all(torch.equal(W, base[key]) for key, W in matrices(stack))


def test_of_equal_entries_the_first_are_left() -> None:
    W = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 3.0, -4.0, 0.0]])
    assert largest(W, 2, 4).tolist() == [[True, True, False, False], [False, True, True, False]]
    assert largest(W, 3, 8).tolist() == [[True, False, False, False], [False, True, True, False]]


def test_dropout_is_of_the_trained_part_while_training() -> None:
    stack = perturbed(Stack(tiny("llama"), [Spp(rank=4, pattern="2:4", dropout=0.5)]))
    still = logits(stack)
    assert torch.equal(logits(stack), still)
    stack.model.train()
    assert not torch.allclose(logits(stack), still, atol=1e-3)
    torch.manual_seed(3)
    W, x = torch.randn(8, 4), torch.randn(5, 4)
    delta, module = layer(W, dropout=0.5, pruned=True)
    with torch.no_grad():
        delta.left.copy_(largest(W, 2, 4))
        delta.B.normal_()
        delta.train()
        torch.manual_seed(1)
        found = delta(x, module(x))
        torch.manual_seed(1)
        dropped, left = nn.functional.dropout(x, 0.5), W * delta.left
        expected = x @ left.t() + dropped @ (delta.factor() * left).t()
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_product_of_the_backward_pass_is_that_of_the_forward_pass() -> None:
    """A plugin may run the model in evaluation mode, and go backward when it trains again (MEND)."""
    stack = perturbed(Stack(pruned(), [Spp(rank=2, dropout=0.5)]))
    found = []
    for training in (False, True):
        loss = stack.model.eval()(**batch_of(stack)).loss
        stack.model.train(training)
        found.append(torch.autograd.grad(loss, [delta.B for delta in spp_of(stack)]))
    assert all(map(torch.equal, *found))


def test_which_entries_are_left_is_in_the_bundle(tmp_path: Any) -> None:
    stack = perturbed(Stack(tiny("llama"), [Spp(rank=4, sparsity=0.5)], tokenizer=tiny_tokenizer()))
    stack.save(tmp_path)
    loaded = peftx.load(tmp_path, model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded), logits(stack))
    assert all(torch.equal(a.left, b.left) for a, b in zip(spp_of(loaded), spp_of(stack), strict=True))
    whole = Stack(pruned(), [Spp(rank=4)], tokenizer=tiny_tokenizer())
    whole.save(tmp_path / "whole")
    again = peftx.load(tmp_path / "whole", model=pruned(), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), logits(whole))


def test_a_copy_reads_its_own_weights() -> None:
    stack = perturbed(Stack(pruned(), [Spp(rank=4)]))
    before, copied = logits(stack), deepcopy(stack.model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(logits(stack), before)


def test_a_second_one_and_prompts() -> None:
    for first, plugins in (
        (True, [Spp(rank=4), Lora(rank=2)]),
        (False, [PromptTuning(length=2), Spp(rank=4)]),
    ):
        stack = Stack(pruned(), plugins)
        stack.train_step(batch_of(stack))
        assert all(p.grad is not None for n, p in stack.model.named_parameters() if p.requires_grad), first


@pytest.mark.parametrize("other", [Lora(rank=2), Spp(rank=2)])
def test_what_changes_the_weights_before_it_is_refused(other: Plugin) -> None:
    with pytest.raises(
        ConflictError, match=r"spp scales the weights of .* as they are, and other changes them before"
    ) as e:
        Stack(pruned(), [("other", other), ("spp", Spp(rank=4))])
    assert "put other behind spp" in str(e.value)
    Stack(pruned(), [("other", Lora(rank=2, targets="attention")), ("spp", Spp(rank=4, targets="mlp"))])


def test_refusals() -> None:
    for plugins in ([Hft(fraction=1.0), Spp(rank=4)], [Spp(rank=4), Hft(fraction=1.0)]):
        with pytest.raises(
            ConflictError, match=r"spp scales the weights of .* as they are, and hft changes them"
        ) as e:
            Stack(pruned(), plugins)
        assert "behind" not in str(e.value)
    with pytest.raises(PeftxError, match="spp: no matrix of targets 'all' has a zero") as e:
        Stack(tiny("llama"), [Spp(rank=4)])
    assert "sparsity: 0.5" in str(e.value)
    with pytest.raises(PeftxError, match="spp: rank 17 exceeds the 16x32 matrix"):
        Stack(pruned(), [Spp(rank=17)])
    with pytest.raises(PeftxError, match=r"spp: pattern 2:5, and rows of .*q_proj have 32 entries"):
        Stack(tiny("llama"), [Spp(rank=4, pattern="2:5")])
    with pytest.raises(
        PeftxError, match=r"spp: sparsity 0.9999999 leaves .* of the 512 entries of .*k_proj"
    ) as e:
        Stack(tiny("llama"), [Spp(rank=4, sparsity=0.9999999)])
    assert "sparsity at most 0.998, or leave it out of targets: '!attention.k'" in str(e.value)
    Stack(tiny("llama"), [Spp(rank=4, sparsity=0.998)])
    with torch.device("meta"):
        Stack(tiny("llama").to("meta"), [Spp(rank=4)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.0}, "sparsity"),
        ({"pattern": "4:4"}, "N below M"),
        ({"pattern": "0:4"}, "N below M"),
        ({"pattern": "half"}, "N below M"),
        ({"pattern": "2:4", "sparsity": 0.5}, "both say how to prune"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=rf"Spp: .*{match}") as caught:
        Spp(**options)
    assert "rank, alpha, dropout, sparsity, pattern, targets" in str(caught.value.hint)
