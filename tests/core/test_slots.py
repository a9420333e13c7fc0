"""Slots: whatever is attached, merged, switched and removed, in any order, the base comes back bit for bit."""

from __future__ import annotations

import contextlib
import copy
import pickle  # noqa: TID251 - in memory only: worker processes get modules so
from collections.abc import Callable
from typing import ClassVar

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftx.errors import ConflictError, MergeError, PeftxError, UnsupportedError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.changes import Owner
from peftx.kernel.ledger import Ledger
from peftx.kernel.slots import (
    Delta,
    Rows,
    attach,
    base_class,
    detach,
    dropout_linear,
    enable,
    merge,
    slot_of,
    unmerge,
)
from peftx.kernel.slots.delta import LowRank as factors
from peftx.kernel.slots.delta import dropout_mask
from peftx.kernel.slots.fused import linear_with_low_rank
from peftx.kernel.view import ModelView
from peftx.sparse import SparseDelta
from peftx.testing.models import example_inputs, output_of, tiny

STEPS = ("attach", "merge", "unmerge", "disable", "enable", "remove")
OWNERS = ("a", "b", "c")


class Gain(Delta):
    """y * z"""

    def __init__(self, size: int, *, batch: tuple[int, ...] = (), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.z = nn.Parameter(0.5 + torch.rand(*batch, size, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.z

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z[..., None], None if bias is None else bias * self.z


class Shift(Delta):
    """y + b: makes a bias where there was none."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.b.to(weight.dtype) if bias is None else bias + self.b


class Low(Delta):
    """y + x A^T B^T, which writes into y where no gradient is recorded."""

    def __init__(self, out_features: int, in_features: int, rank: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(rank, in_features, generator=generator) * 0.2)
        self.B = nn.Parameter(torch.randn(out_features, rank, generator=generator) * 0.2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        extra = x @ self.A.t() @ self.B.t()
        return y + extra if torch.is_grad_enabled() else y.add_(extra)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.B @ self.A, bias


class Bent(Delta):
    """tanh(y): does not fold."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y)


class Before(Delta):
    """Edits input and output: y + c mean(x'), x' = s x."""

    def __init__(self, s: float, c: float = 0.0) -> None:
        super().__init__()
        self.s, self.c = s, c

    def pre(self, x: Tensor) -> Tensor:
        return x * self.s + 1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.c * x.mean(-1, keepdim=True)


class OnlyBefore(Delta):
    """Edits the input alone; folds."""

    def pre(self, x: Tensor) -> Tensor:
        return -x

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return -weight, bias


def linear(out_features: int = 6, in_features: int = 4, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(in_features, out_features, bias=bias)


def conv1d(out_features: int = 6, in_features: int = 4) -> Conv1D:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Conv1D(out_features, in_features)
        nn.init.normal_(module.bias)
    return module


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def put(module: nn.Module, delta: Delta, owner: str, rank: int = 0, *, rows: Rows | None = None) -> Delta:
    attach(module, delta, name=owner, owner=owner, rank=rank, rows=rows)
    return delta


# ----------------------------------------------------------------------------------------------- one module at a time
@pytest.mark.parametrize("make", [linear, conv1d])
def test_deltas_nest_in_stack_order(make: Callable[[], nn.Module]) -> None:
    """y = d2(x, d1(x, base)), whichever was attached first."""
    module = make()
    base = module(X)
    gain, shift = Gain(6), Shift(6)
    put(module, shift, "second", 2)
    put(module, gain, "first", 1)
    torch.testing.assert_close(module(X), base * gain.z + shift.b)
    detach(module, "second")
    put(module, shift, "second", 0)
    torch.testing.assert_close(module(X), (base + shift.b) * gain.z)


def test_the_module_keeps_its_class_and_keys() -> None:
    module = linear()
    keys = list(module.state_dict())
    put(module, Gain(6), "a")
    assert isinstance(module, nn.Linear)
    assert type(module).__name__ == "Linear"
    assert base_class(module) is nn.Linear
    assert list(module.state_dict()) == [*keys, "peftx.a.z"]
    detach(module, "a")
    assert type(module) is nn.Linear
    assert list(module.state_dict()) == keys
    assert "_peftx_slot" not in module.__dict__


def test_input_edits_nest() -> None:
    """Inputs from the outermost in, outputs from the innermost out; each delta sees the input that it made."""
    module = linear()
    base = copy.deepcopy(module)
    inner, outer = Before(2.0, 0.5), Before(-1.0, 0.25)
    put(module, inner, "inner", 0)
    put(module, outer, "outer", 1)
    x_outer = X * -1.0 + 1
    x_inner = x_outer * 2.0 + 1
    y = base(x_inner) + 0.5 * x_inner.mean(-1, keepdim=True)
    torch.testing.assert_close(module(X), y + 0.25 * x_outer.mean(-1, keepdim=True))


def test_a_delta_without_pre_among_those_with() -> None:
    module = linear()
    base = copy.deepcopy(module)
    low = Low(6, 4)
    put(module, Before(2.0), "inner", 0)
    put(module, low, "between", 1)
    put(module, OnlyBefore(), "outer", 2)
    torch.testing.assert_close(module(X), base(-X * 2 + 1) + (-X) @ low.A.t() @ low.B.t())


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("rows", [Rows(6, 2, 5), Rows(6, 0, 2), Rows(6, heads=2, parts=3, part=1)])
def test_rows(make: Callable[[], nn.Module], rows: Rows) -> None:
    """A delta on rows leaves the others alone, in forward and in fold, with and without gradients."""
    module = make()
    base = module(X).detach()
    size = rows.size
    gain, low = Gain(size), Low(size, 4)
    put(module, gain, "gain", 0, rows=rows)
    put(module, low, "low", 1, rows=rows)
    mine = rows.take(torch.arange(6))
    expected = base.clone()
    expected[..., mine] = base[..., mine] * gain.z + X @ low.A.t() @ low.B.t()
    torch.testing.assert_close(module(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(X), expected)
        merge(module, {"gain", "low"})
        torch.testing.assert_close(module(X), expected)
    others = [i for i in range(6) if i not in mine]
    assert torch.equal(module(X)[..., others], base[..., others])


@given(
    rows=st.one_of(
        st.tuples(st.integers(0, 11), st.integers(0, 12))
        .filter(lambda p: p[0] < p[1])
        .map(lambda p: Rows(12, *p)),
        st.sampled_from(
            [Rows(12, heads=h, parts=p, part=i) for h in (1, 2, 4) for p in (1, 3) for i in range(p)]
        ),
    ),
    dim=st.sampled_from([-1, -2, 0, 1]),
)
def test_rows_take_and_put(rows: Rows, dim: int) -> None:
    """put(take) is the identity; put changes what take reads, and nothing else; take never copies more than it must."""
    shape = [3, 5]
    shape[dim] = 12
    tensor = torch.arange(shape[0] * shape[1]).view(shape)
    part = rows.take(tensor, dim)
    assert part.shape[dim] == rows.size
    assert torch.equal(rows.put(tensor, part, dim), tensor)
    changed = rows.put(tensor, part + 100, dim)
    assert torch.equal(rows.take(changed, dim), part + 100)
    assert int((changed != tensor).sum()) == part.numel()


def test_merge_that_makes_a_bias() -> None:
    module = linear(bias=False)
    shift = put(module, Shift(6), "a")
    attached = module(X)
    merge(module, {"a"})
    torch.testing.assert_close(module(X), attached)
    assert torch.equal(module.bias, shift.b)
    unmerge(module)
    assert module.bias is None
    assert torch.equal(module(X), attached)


def test_merge_in_the_wrong_order_is_refused() -> None:
    module = linear()
    put(module, Gain(6), "near", 0)
    put(module, Shift(6), "far", 1)
    with pytest.raises(MergeError, match="far cannot be merged before near"):
        merge(module, {"far"})
    merge(module, {"near"})
    unmerge(module)
    merge(module, {"near", "far"})
    assert all(link.merged for link in slot_of(module).links)


class HalfTheRows(Delta):
    """Computes the layer itself: W x + b with every second output left at zero."""

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        return y * (torch.arange(y.shape[-1]) % 2 == 0)


def test_a_delta_that_computes_the_layer_itself() -> None:
    layer, x = nn.Linear(4, 6), torch.randn(3, 4)
    plain = layer(x)
    kept = torch.arange(6) % 2 == 0
    attach(layer, Gain(6), name="a", owner="a", rank=1)
    gained = layer(x)
    attach(layer, HalfTheRows(), name="half", owner="half", rank=0)
    assert torch.equal(layer(x), gained * kept)  # inside all others, which still act
    twin = copy.deepcopy(layer)
    detach(layer, "half")
    assert torch.equal(layer(x), gained)
    assert torch.equal(twin(x), gained * kept)
    enable(twin, "half", False)
    assert torch.equal(twin(x), gained)
    enable(twin, "half", True)
    merge(twin, {"a"})  # though `half` stands nearer: it computes with whatever the weights are
    assert torch.allclose(twin(x), gained * kept, atol=1e-6)
    unmerge(twin)
    assert torch.equal(twin(x), gained * kept)
    detach(twin, "a")
    attach(twin, OnlyBefore(), name="pre", owner="pre", rank=2)
    assert torch.allclose(
        twin(x), nn.functional.linear(twin.peftx["pre"].pre(x), twin.weight, twin.bias) * kept
    )
    assert not torch.equal(plain, plain * kept)


def test_computing_the_layer_is_for_one_on_a_whole_linear_layer() -> None:
    layer = nn.Linear(4, 6)
    attach(layer, HalfTheRows(), name="a", owner="a", rank=0)
    with pytest.raises(ConflictError, match="'b' and 'a' both compute one layer"):
        attach(layer, HalfTheRows(), name="b", owner="b", rank=1)
    with pytest.raises(UnsupportedError, match=r"only a whole nn\.Linear"):
        attach(Conv1D(6, 4), HalfTheRows(), name="a", owner="a", rank=0)
    with pytest.raises(UnsupportedError, match=r"only a whole nn\.Linear"):
        attach(nn.Linear(4, 6), HalfTheRows(), name="a", owner="a", rank=0, rows=Rows(6, 0, 2))
    assert slot_of(nn.Linear(4, 6)) is None


def test_merging_the_near_one_then_the_far_one() -> None:
    module = linear()
    put(module, Gain(6), "near", 0)
    put(module, Shift(6), "far", 1)
    weight = module.weight
    attached = module(X)
    merge(module, {"near"})
    merge(module, {"far"})
    torch.testing.assert_close(module(X), attached)
    unmerge(module)
    assert module.weight is weight
    assert torch.equal(module(X), attached)


def test_a_near_one_switched_on_after_the_far_one_was_merged() -> None:
    """Switching on what acts nearer to the weights than a merged delta would turn the order around."""
    module = linear()
    gain, shift = Gain(6), Shift(6)
    put(module, gain, "near", 0)
    put(module, shift, "far", 1)
    base = copy.deepcopy(module)
    enable(module, "near", False)
    merge(module, {"far"})
    with pytest.raises(MergeError, match="unmerge"):
        enable(module, "near", True)
    unmerge(module)
    enable(module, "near", True)
    assert torch.equal(module(X), base(X))


def test_what_does_not_fold_does_not_merge() -> None:
    module = linear()
    put(module, Bent(), "bent")
    with pytest.raises(MergeError, match="Bent does not fold"):
        merge(module, {"bent"})
    norm = nn.LayerNorm(4)
    put(norm, Gain(4), "gain")
    with pytest.raises(MergeError, match="LayerNorm"):
        merge(norm, {"gain"})


def test_merged_for_good() -> None:
    module = linear()
    put(module, Gain(6), "a")
    attached = module(X)
    merge(module, {"a"}, keep=False)
    with pytest.raises(MergeError, match="keep=True"):
        unmerge(module)
    torch.testing.assert_close(module(X), attached)


def test_attaching_to_a_merged_module_is_refused() -> None:
    module = linear()
    put(module, Gain(6), "a")
    merge(module, {"a"})
    with pytest.raises(ConflictError, match="unmerge"):
        put(module, Gain(6), "b")
    assert list(module.get_submodule("peftx")._modules) == ["a"]


def test_a_name_twice_is_refused_and_changes_nothing() -> None:
    module = linear()
    put(module, Gain(6), "a")
    before = module(X)
    with pytest.raises(ConflictError, match="already"):
        put(module, Shift(6), "a")
    assert torch.equal(module(X), before)


def test_input_edits_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        put(nn.LayerNorm(4), Before(1.0), "a")
    module = linear()
    with pytest.raises(UnsupportedError, match="fused"):
        put(module, Before(1.0), "a", rows=Rows(6, 0, 3))
    assert type(module) is nn.Linear


def test_removing_one_of_several_merged() -> None:
    """The others stay merged, folded again from the untouched weights."""
    module, other = linear(), linear()
    put(module, Gain(6), "a", 0)
    put(module, Shift(6), "b", 1)
    put(other, Shift(6), "b", 1)
    merge(module, {"a", "b"})
    merge(other, {"b"})
    detach(module, "a")
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(module.bias, other.bias)
    detach(module, "b")
    assert torch.equal(module.weight, linear().weight)
    assert type(module) is nn.Linear


def test_removing_what_was_merged_for_good_is_refused() -> None:
    module = linear()
    put(module, Gain(6), "a")
    merge(module, {"a"}, keep=False)
    folded = module.weight.clone()
    with pytest.raises(MergeError, match="kept"):
        detach(module, "a")
    assert torch.equal(module.weight, folded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    """The folded weight is the float32 result rounded to the weight's dtype, however many deltas are folded."""
    module = linear().to(dtype)
    weight = module.weight.detach().to(torch.promote_types(dtype, torch.float32))
    gains = [put(module, Gain(6, seed=i).to(dtype), str(i), i) for i in range(3)]
    merge(module, {"0", "1", "2"})
    for gain in gains:
        weight = weight * gain.z.detach()[:, None]
    assert torch.equal(module.weight, weight.to(dtype))
    assert module.weight.dtype == dtype


def test_gradients() -> None:
    """The same as those of the written-out formula, for delta, base and input."""
    module = linear()
    gain = put(module, Gain(6), "a")
    low = put(module, Low(6, 4), "b", 1)
    x = X.clone().requires_grad_()
    module(x).square().sum().backward()
    weight, bias = (p.detach().clone().requires_grad_() for p in (module.weight, module.bias))
    z, A, B = (p.detach().clone().requires_grad_() for p in (gain.z, low.A, low.B))
    y = X.clone().requires_grad_()
    ((y @ weight.t() + bias) * z + y @ A.t() @ B.t()).square().sum().backward()
    for ours, theirs in (
        (module.weight, weight),
        (module.bias, bias),
        (gain.z, z),
        (low.A, A),
        (low.B, B),
        (x, y),
    ):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_dropout_linear_is_dropout_then_linear() -> None:
    A = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 40, dtype=torch.float64, requires_grad=True)

    def seeded(x: Tensor, A: Tensor) -> Tensor:
        torch.manual_seed(3)
        return dropout_linear(x, A, 0.4)

    assert torch.autograd.gradcheck(seeded, (x, A))
    torch.manual_seed(0)
    mean = torch.stack([dropout_linear(x.detach(), A.detach(), 0.4) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, (x @ A.t()).detach(), rtol=0, atol=1.0)
    assert not torch.equal(dropout_linear(x, A, 0.4), dropout_linear(x, A, 0.4))


def test_copies_are_independent() -> None:
    module = linear()
    gain = put(module, Gain(6), "a")
    put(module, Low(6, 4), "b", 1)
    before = module(X)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert torch.equal(copied(X), before)
        mine = copied.get_submodule("peftx.a")
        assert mine is not gain
        mine.z.data.zero_()  # what runs is what the copy owns
        assert not torch.equal(copied(X), before)
        assert torch.equal(module(X), before)
        merge(copied, {"a", "b"})
        unmerge(copied)
        detach(copied, "a")
        detach(copied, "b")
        assert type(copied) is nn.Linear
        assert torch.equal(copied(X), linear()(X))


class Reader(nn.Module):
    """Uses a linear layer's weight without calling the layer, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.t() + self.inner.bias


def test_weights_that_others_read() -> None:
    model = Reader()
    base = model(X)
    inner = model.inner
    gain, shift = Gain(6), Shift(6)
    attach(inner, gain, name="a", owner="a", rank=0, kind="read")
    attach(inner, shift, name="b", owner="b", rank=1, kind="read")
    expected = base * gain.z + shift.b
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(inner(X), expected)
    assert list(dict(inner.named_parameters())) == ["weight", "bias", "peftx.a.z", "peftx.b.b"]
    model(X).sum().backward()
    assert gain.z.grad.abs().sum() > 0
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)
    merge(inner, {"a", "b"})
    torch.testing.assert_close(model(X), expected)
    unmerge(inner)
    enable(inner, "a", False)
    torch.testing.assert_close(model(X), base + shift.b)
    with pytest.raises(UnsupportedError, match="does not fold"):
        attach(inner, Bent(), name="c", owner="c", rank=2, kind="read")
    detach(inner, "a")
    detach(inner, "b")
    assert torch.equal(model(X), base)
    assert type(inner) is nn.Linear


# ------------------------------------------------------------------------------------------------- whole models
class Bench:
    """A tiny model with three plugins that come and go, and what it was like before."""

    _models: ClassVar[dict[tuple[str, torch.dtype], PreTrainedModel]] = {}

    def __init__(self, arch: str, dtype: torch.dtype) -> None:
        self.model = tiny(arch, num_hidden_layers=1).to(dtype)
        self.inputs = example_inputs(self.model, length=4)
        self.ledger = Ledger(self.model)
        self.views = {
            owner: ModelView(Anatomy(self.model), self.ledger, Owner(owner, i))
            for i, owner in enumerate(OWNERS)
        }
        self.targets = {"a": "all", "b": "attention", "c": "attention.q,v mlp"}

    def run(self) -> Tensor:
        with torch.no_grad():
            return output_of(self.model, self.inputs)

    def step(self, what: str, owner: str) -> None:
        modules = list(self.model.modules())
        if what == "attach":
            if self.ledger.of(owner):
                return
            for i, site in enumerate(self.views[owner].linears(self.targets[owner])):
                if owner == "b":  # does not commute with the others
                    site.attach(Low(site.out_features, site.in_features, seed=i).to(site.dtype))
                else:
                    site.attach(Gain(site.out_features, batch=site.batch, seed=i))
        elif what == "merge":
            for module in modules:
                merge(module, {owner})
        elif what == "unmerge":
            for module in modules:
                unmerge(module)
        elif what in ("disable", "enable"):
            self.ledger.switch(owner, what == "enable")
        else:
            self.ledger.remove(owner)

    def snapshot(self) -> tuple[list[type], dict[str, Tensor], list[int]]:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        return [type(m) for m in self.model.modules()], state, [id(p) for p in self.model.parameters()]


@settings(max_examples=25)
@given(
    arch=st.sampled_from(["llama", "gpt2", "mixtral"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(OWNERS)), max_size=12),
)
def test_any_history_ends_in_the_base(arch: str, dtype: torch.dtype, steps: list[tuple[str, str]]) -> None:
    """Attach, merge, unmerge, disable, enable and remove in any order; refused steps included."""
    bench = Bench(arch, dtype)
    before = bench.run()
    classes, state, identities = bench.snapshot()
    for what, owner in steps:
        with contextlib.suppress(ConflictError, MergeError):
            bench.step(what, owner)
        assert torch.isfinite(bench.run()).all()
    for owner in OWNERS:
        bench.ledger.remove(owner)
    assert torch.equal(bench.run(), before)
    after_classes, after, after_identities = bench.snapshot()
    assert after_classes == classes
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert after_identities == identities


@settings(max_examples=15)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(OWNERS)), min_size=3, max_size=10))
def test_the_output_depends_only_on_what_is_attached_and_on(steps: list[tuple[str, str]]) -> None:
    """However a state was reached, a fresh model with the same plugins on gives the same output (to rounding)."""
    bench = Bench("llama", torch.float32)
    on: dict[str, bool] = {}
    for what, owner in steps:
        try:
            bench.step(what, owner)
        except PeftxError:
            continue
        if what == "attach":
            on.setdefault(owner, True)
        elif what == "remove":
            on.pop(owner, None)
        elif what in ("enable", "disable") and owner in on:
            on[owner] = what == "enable"
    fresh = Bench("llama", torch.float32)
    for owner, enabled in on.items():
        fresh.step("attach", owner)
        if not enabled:
            fresh.step("disable", owner)
    torch.testing.assert_close(bench.run(), fresh.run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "t5", "mamba"])
def test_deepcopy_and_pickle_of_models(arch: str) -> None:
    model = tiny(arch)
    view = ModelView(Anatomy(model), Ledger(model), Owner("a", 0))
    for site in view.linears("all"):
        site.attach(Gain(site.out_features, batch=site.batch))
    inputs = example_inputs(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output_of(copied, inputs), before)
            for name, parameter in copied.named_parameters():
                if name.endswith(".z"):
                    parameter.zero_()
            assert not torch.equal(output_of(copied, inputs), before)
        assert torch.equal(output_of(model, inputs), before)


def test_base_checkpoint_loads_into_a_model_with_slots() -> None:
    plain, model = tiny("llama", seed=1), tiny("llama")
    view = ModelView(Anatomy(model), Ledger(model), Owner("a", 0))
    for site in view.linears("all"):
        site.attach(Gain(site.out_features)).z.data.fill_(1.0)
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert all(".peftx.a." in key for key in keys.missing_keys)
    inputs = example_inputs(model)
    assert torch.equal(output_of(model, inputs), output_of(plain, inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hf_peft_on_top() -> None:
    """LoRA of HF PEFT wraps the layers that carry our deltas; both act, both can be taken away."""
    model = tiny("llama")
    inputs = example_inputs(model)
    base = output_of(model, inputs).detach()
    ledger = Ledger(model)
    view = ModelView(Anatomy(model), ledger, Owner("a", 0))
    for site in view.linears("attention.q,v"):
        site.attach(Gain(site.out_features))
    ours = output_of(model, inputs).detach()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    both = wrapped(**inputs).logits.detach()
    assert not torch.allclose(both, ours, atol=1e-4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(**inputs).logits, ours)
    unwrapped = wrapped.unload()
    assert torch.equal(output_of(unwrapped, inputs), ours)
    ledger.remove("a")
    assert torch.equal(output_of(unwrapped, inputs), base)


@pytest.mark.parametrize("role", ["embedding", "norm.attention", "norm.final", "head"])
def test_output_carriers_on_a_model(role: str) -> None:
    """Embeddings and norms: the delta sees what went in and edits what comes out."""
    model = tiny("llama", tie_word_embeddings=False)
    inputs = example_inputs(model)
    before = output_of(model, inputs).detach()
    ledger = Ledger(model)
    view = ModelView(Anatomy(model), ledger, Owner("a", 0))
    seen: list[torch.Size] = []

    class Spy(Gain):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.append(x.shape)
            return super().forward(x, y)

    for site in view.sites(role):
        site.attach(Spy(site.out_features))
    after = output_of(model, inputs)
    assert not torch.allclose(after, before, atol=1e-3)
    assert set(seen) == {torch.Size((2, 9)) if role == "embedding" else torch.Size((2, 9, 32))}
    ledger.remove("a")
    assert torch.equal(output_of(model, inputs), before)


def test_one_plugin_on_a_block_and_on_the_matrix_that_ends_it() -> None:
    """In BERT the block's output and `mlp.down` are one module: two deltas, two names, two sets of tensors."""
    model = tiny("bert")
    inputs = example_inputs(model)
    before = output_of(model, inputs).detach()
    ledger = Ledger(model)
    view = ModelView(Anatomy(model), ledger, Owner("a", 0))
    for site in (*view.linears("mlp.down"), *view.blocks("mlp")):
        site.attach(Gain(32))
    assert len(ledger.tensors("a")) == 4
    attached = output_of(model, inputs).detach()
    for module in model.modules():
        merge(module, {"a"})
    torch.testing.assert_close(output_of(model, inputs), attached, rtol=1e-4, atol=1e-5)
    ledger.remove("a")
    assert torch.equal(output_of(model, inputs), before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_low_rank_update_in_one_step_of_autograd(bias: bool) -> None:
    """The gradients, and those of the gradients, are those of the formula written out."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    A, B, x = (torch.randn(*shape, requires_grad=True) for shape in ((2, 6), (5, 2), (3, 4, 6)))

    def written(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return layer(x) + 1.5 * x @ A.t() @ B.t()

    def fused(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear_with_low_rank(x, layer.weight, layer.bias, factors(A, B, 1.5))

    torch.testing.assert_close(fused(x, A, B), written(x, A, B))
    found, wanted = (
        torch.autograd.grad(f(x, A, B).tanh().sum(), (x, A, B), create_graph=True) for f in (fused, written)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in grads), (x, A, B)) for grads in (found, wanted)
    ]
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_mask_of_dropout_drops_as_many_as_it_says() -> None:
    x = torch.ones(400, 500)
    for p in (0.1, 0.5, 0.9):
        keep, scale = dropout_mask(x, p, seed=7)
        assert set(keep.unique().tolist()) == {0.0, 1.0}
        assert float(keep.mean()) == pytest.approx(1 - p, abs=0.005)
        assert scale == pytest.approx(1 / (1 - p), rel=1e-4)
        assert torch.equal(keep, dropout_mask(x, p, seed=7)[0])
        assert not torch.equal(keep, dropout_mask(x, p, seed=8)[0])
        lanes = keep.flatten().view(-1, 4)  # four come out of one draw
        assert float(torch.corrcoef(lanes.t()).fill_diagonal_(0).abs().max()) < 0.02


# -- sparse deltas ---------------------------------------------------------------------------------------------------


def sparse(*shape: int, count: int = 5, seed: int = 0) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    delta = SparseDelta(torch.randperm(size, generator=generator)[:count], shape)
    delta.values.data.normal_(generator=generator)
    return delta


@torch.no_grad()
def test_a_sparse_delta_by_hand() -> None:
    delta = SparseDelta(torch.tensor([1, 3]), (2, 3))
    delta.values.copy_(torch.tensor([2.0, -1.0]))
    assert delta.matrix(torch.float32).tolist() == [[0, 2, 0], [-1, 0, 0]]
    x, y = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([[0.5, 0.5]])
    assert delta(x, y).tolist() == [[20.5, -0.5]]
    assert delta.fold(torch.ones(2, 3), None)[0].tolist() == [[1, 3, 1], [0, 1, 1]]
    assert delta.at.dtype == torch.int32
    with torch.device("meta"):
        assert SparseDelta(torch.arange(3), (2**16, 2**15)).at.dtype == torch.int64


def test_a_sparse_delta_has_the_gradients_of_its_places() -> None:
    delta, x = sparse(4, 6).double(), torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    y, weight = torch.randn(3, 7, 4, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    seen: list[Tensor] = []
    delta.on_gradient = lambda gradient: seen.append(gradient.clone())
    found = torch.autograd.grad(delta(x, y).square().sum(), [x, delta.values])
    dense = delta.matrix(torch.float64).detach().requires_grad_()
    wanted = torch.autograd.grad((y + x @ dense.t()).square().sum(), [x, dense])
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1].flatten()[delta.at.long()])
    torch.testing.assert_close(seen[0], wanted[1])
    folded = torch.autograd.grad((y + x @ delta.fold(weight, None)[0].t()).square().sum(), [delta.values])
    torch.testing.assert_close(folded[0], found[1])
    torch.testing.assert_close(seen[1], wanted[1])
    assert len(seen) == 2


def test_a_sparse_delta_keeps_no_matrix_for_the_backward_pass() -> None:
    deltas = [sparse(64, 64, count=40, seed=i) for i in range(3)]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = torch.ones(2, 64, requires_grad=True)
        for delta in deltas:
            out = delta(out, out)
    assert kept
    assert max(t.numel() for t in kept) == 2 * 64, "the input, values and places; no matrix of 64 x 64"


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "mamba"])
def test_sparse_deltas_on_models(arch: str) -> None:
    model = tiny(arch)
    ledger = Ledger(model)
    view = ModelView(Anatomy(model), ledger, Owner("a", 0))
    sites = view.linears("all")
    deltas = [site.attach(sparse(*site.shape, count=9, seed=i)) for i, site in enumerate(sites)]
    inputs = example_inputs(model)
    shapes: set[tuple[int, ...]] = set()
    for delta in deltas:
        delta.on_gradient = lambda gradient: shapes.add(tuple(gradient.shape))
    output_of(model, inputs).square().sum().backward()
    assert all(delta.values.grad is not None for delta in deltas)
    assert shapes == {site.shape for site in sites}
    with torch.no_grad():
        before = output_of(model, inputs)
        for place in ledger.carriers({"a"}):
            merge(place, {"a"})
        torch.testing.assert_close(output_of(model, inputs), before, rtol=1e-4, atol=1e-4)
