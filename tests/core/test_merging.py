"""Adapters merged into one: what has to hold of any merge, the papers' equations on small numbers, and HF PEFT beside
it."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftx import Claim, Delta, ModelView, Plugin, Stack, hookimpl, load
from peftx.errors import BundleError, MergeError, PeftxError
from peftx.interop import to_peft
from peftx.merging import METHODS, Merged, merge_adapters, share_kept
from peftx.merging.factors import Factors, beside, nearest_to, split
from peftx.merging.methods import Method, combine, dropped, elected, trimmed
from peftx.merging.sources import Source
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_dora import Dora
from peftx_full_finetuning import FullFinetuning
from peftx_ia3 import Ia3
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant
from peftx_prompt_tuning import PromptTuning

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
ONE = {"linear": {}, "task-arithmetic": {}, "cat": {}, "svd": {"rank": 4}, "ties": {"rank": 99, "density": 1.0},
       "dare": {"rank": 99, "density": 1.0}, "dare-ties": {"rank": 99, "density": 1.0}}  # fmt: skip
"""Options under which a method changes nothing of an adapter alone."""


def adapter(folder: Path, plugins: Any, *, seed: int = 0, model: Any = "llama", dtype: Any = None) -> Path:
    """A bundle of plugins whose numbers are not what they began with."""
    base = tiny(model) if isinstance(model, str) else model
    stack = Stack(
        base if dtype is None else base.to(dtype), plugins if isinstance(plugins, list) else [plugins]
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for id in stack.plugins:
            for parameter in stack.ledger.parameters(id):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return stack.save(folder)


def logits(model: Any) -> Tensor:
    model.eval()
    bare = getattr(model, "get_base_model", lambda: model)()
    with torch.no_grad():
        return output_of(bare, example_inputs(bare))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def folded(folder: Path, model: Any) -> dict[str, Tensor]:
    """The weights with an adapter in them, by the stack's own merge."""
    stack = load(folder, model=model)
    stack.model.eval()
    stack.merge()
    own = {name: t.detach().clone() for name, t in stack.model.named_parameters() if "peftx" not in name}
    stack.unmerge()
    return own


def state(merged: Merged) -> dict[str, Tensor]:
    """The weights of a result, whichever way it holds them."""
    if merged.stack.plugins:
        merged.stack.merge()
    own = {
        name: t.detach().clone() for name, t in merged.stack.model.named_parameters() if "peftx" not in name
    }
    if merged.stack.plugins:
        merged.stack.unmerge()
    return own


def added(folders: Sequence[Path], weights: Sequence[float], kind: str) -> dict[str, Tensor]:
    """base + Σ w (folded - base), in float64."""
    base = dict(tiny(kind).named_parameters())
    found = {name: t.detach().double() for name, t in base.items()}
    for folder, weight in zip(folders, weights, strict=True):
        for name, value in folded(folder, tiny(kind)).items():
            found[name] = found[name] + weight * (value.double() - base[name].detach().double())
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].double() - value.double()).abs().max() <= within * max(1.0, value.abs().max()), (
            name
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Three adapters of one base, of unlike places and ranks; made once for an architecture."""
    made: dict[str, list[Path]] = {}

    def of(kind: str = "llama") -> list[Path]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            made[kind] = [
                adapter(root / "a", Lora(rank=2, targets="attention.q,v"), seed=1, model=kind),
                adapter(root / "b", Lora(rank=3, targets="attention.q mlp"), seed=2, model=kind),
                adapter(root / "c", Lora(rank=2, targets="attention.q", alpha=3), seed=3, model=kind),
            ]
        return made[kind]

    return of


# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["lora", "weights"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_adapter_of_weight_1_is_the_adapter(kind: str, method: str, into: Any, folders: Any) -> None:
    folder = folders(kind)[1]
    merged = merge_adapters([folder], method=method, into=into, model=tiny(kind), **ONE[method])
    theirs = logits(load(folder, model=tiny(kind)).model)
    assert apart(logits(merged.stack.model), theirs) <= 1e-6
    assert apart(theirs, logits(tiny(kind))) > 1e-3
    assert merged.kept == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "t5", "bert", "gpt_neox", "mamba"])
def test_a_sum_folded_is_the_sum_of_the_folded(kind: str, tmp_path: Path) -> None:
    linear = "ssm" if kind == "mamba" else "attention.q,v"
    pair = [
        adapter(tmp_path / "a", Lora(rank=2, targets=linear), seed=1, model=kind),
        adapter(tmp_path / "b", Lora(rank=2, targets="all"), seed=2, model=kind),
    ]
    wanted = added(pair, [0.7, -0.4], kind)
    for method, into in itertools.product(("linear", "cat"), ("lora", "weights")):
        same(
            state(merge_adapters(pair, weights=[0.7, -0.4], method=method, into=into, model=tiny(kind))),
            wanted,
        )


@QUICK
@given(weights=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3).filter(any))
def test_any_weights(folders: Any, weights: list[float]) -> None:
    three = folders()
    wanted = added(three, weights, "llama")
    for into in ("lora", "weights"):
        same(state(merge_adapters(three, weights=weights, into=into, model=tiny("llama"))), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_does_not_matter(method: str, folders: Any) -> None:
    options = {"rank": 3} if method != "cat" else {}
    pairs = list(zip(folders(), [1.0, -0.7, -0.7], strict=True))
    found = []
    for order in (pairs, pairs[::-1], [pairs[1], pairs[2], pairs[0]]):
        names, weights = zip(*order, strict=True)
        merged = merge_adapters(names, method=method, weights=weights, model=tiny("llama"), **options)
        found.append(merged.stack.ledger.tensors("lora"))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_0_removes_an_adapter(method: str, folders: Any) -> None:
    a, b, c = folders()
    options = {"into": "weights", **({"rank": 3} if method == "svd" else {})}
    without = merge_adapters([a, c], method=method, model=tiny("llama"), **options)
    found = merge_adapters([a, b, c], method=method, weights=[1, 0, 1], model=tiny("llama"), **options)
    same(state(found), state(without), within=0)


def test_ties_of_two_equal_adapters_at_density_1_is_the_adapter(folders: Any) -> None:
    folder = folders()[1]
    merged = merge_adapters([folder, folder], method="ties", density=1.0, into="weights", model=tiny("llama"))
    same(state(merged), folded(folder, tiny("llama")))


def test_what_dare_drops_hangs_on_seed_numbers_and_place(folders: Any) -> None:
    one = [state(merge_adapters(folders()[:1] * n, method="dare", seed=s, into="weights", model=tiny("llama")))
           for n, s in ((1, 0), (1, 0), (1, 1), (2, 0))]  # fmt: skip
    base = dict(tiny("llama").named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = [(own[name] != base[name]) for own in one]
    other = one[0][name.replace("layers.0", "layers.1")] != base[name.replace("layers.0", "layers.1")]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], other)
    assert int(kept[3].sum()) > 1.5 * int(kept[0].sum())  # the second of two equal ones loses other entries
    assert 0.05 < kept[0].float().mean() < 0.15


# -- equations ---------------------------------------------------------------------------------------------------------


def test_trimming_by_hand() -> None:
    D = torch.tensor([[0.1, -5.0, 0.3], [2.0, -0.2, 0.0]])
    assert torch.equal(trimmed(D, 1 / 3), torch.tensor([[0.0, -5, 0], [2, 0, 0]]))
    assert torch.equal(trimmed(D, 0.01), torch.tensor([[0.0, -5, 0], [0, 0, 0]]))
    assert torch.equal(trimmed(D, 1.0), D)


def test_ties_by_hand() -> None:
    """Of the third entry the sum is 0: no sign is elected."""
    D = torch.tensor([[1.0, -3.0, 2.0, 0.0], [3.0, 1.0, -2.0, 4.0], [-2.0, -1.0, 0.0, 0.0]])
    assert torch.equal(elected(D), torch.tensor([2.0, -2.0, 0.0, 4.0]))
    ties = METHODS["ties"]
    rows = [(w, row, "") for w, row in zip((1.0, 2.0, 1.0), D, strict=True)]
    assert torch.equal(combine(ties, rows, density=1.0, seed=0), torch.tensor([3.5, -2.0, -4.0, 8.0]))
    assert torch.equal(combine(ties, rows, density=0.25, seed=0), torch.tensor([-2.0, -3.0, 0.0, 8.0]))


def test_dare_gives_the_difference_in_the_mean() -> None:
    D = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    mean = torch.stack([dropped(D, 0.25, f"{seed} x") for seed in range(4000)]).mean(0)
    assert torch.allclose(mean, D, rtol=0.1)
    assert set(dropped(torch.ones(9, 9), 0.25, "x").unique().tolist()) == {0.0, 4.0}


def test_which_method_does_what() -> None:
    D = [(1.0, torch.tensor([1.0, -3.0, 0.2]), "a"), (1.0, torch.tensor([1.0, 1.0, 0.1]), "b")]
    assert torch.equal(combine(METHODS["linear"], D, density=1.0, seed=0), D[0][1] + D[1][1])
    assert torch.equal(
        combine(METHODS["dare-ties"], D, density=1.0, seed=0), elected(torch.stack([D[0][1], D[1][1]]))
    )
    assert {name for name, method in METHODS.items() if method.sums} == {
        "linear",
        "task-arithmetic",
        "cat",
        "svd",
    }
    both = [dropped(D[0][1], 0.5, "7 a"), dropped(D[1][1], 0.5, "7 b")]
    assert torch.equal(combine(METHODS["dare"], D, density=0.5, seed=7), both[0] + both[1])
    assert METHODS["ties"] == Method(trims=True, elects=True, density=0.2)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_factors(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [Factors(torch.randn(*batch, r, 6, generator=generator), torch.randn(*batch, 5, r, generator=generator))
            for r in (2, 3)]  # fmt: skip
    both = beside([(0.5, pair[0]), (-2.0, pair[1])])
    whole = 0.5 * pair[0].dense() - 2 * pair[1].dense()
    assert both.rank == 5
    assert torch.allclose(both.dense(), whole, atol=1e-5)
    assert both.norm() == pytest.approx(float(whole.norm()), rel=1e-5)
    assert torch.equal(both.padded(7).dense(), both.dense()) or torch.allclose(
        both.padded(7).dense(), both.dense()
    )
    assert both.padded(7).rank == 7
    for rank in (1, 3, 5):
        near = nearest_to(both, rank)
        assert near.rank == split(whole, rank).rank == rank
        assert torch.allclose(near.dense(), split(whole, rank).dense(), atol=1e-5)
        U, s, V = torch.linalg.svd(whole)
        assert torch.allclose(near.dense(), U[..., :rank] * s[..., None, :rank] @ V[..., :rank, :], atol=1e-5)
        assert torch.allclose(near.A.norm(dim=-1), near.B.norm(dim=-2), atol=1e-4)


def test_the_norm_that_a_rank_keeps(folders: Any) -> None:
    a, b, _ = folders()
    whole = merge_adapters([a, b], model=tiny("llama"))
    cut = merge_adapters([a, b], method="svd", rank=1, model=tiny("llama"))
    assert whole.kept == 1
    assert all(place.rank == 1 for place in cut.places)
    base, full, less = dict(tiny("llama").named_parameters()), state(whole), state(cut)
    total = sum(float((full[name] - base[name]).square().sum()) for name in full) ** 0.5
    left = sum(float((less[name] - base[name]).square().sum()) for name in full) ** 0.5
    assert cut.kept == pytest.approx(left / total, rel=1e-4)
    q = next(place for place in cut.places if place.name == "model.layers.0.self_attn.q_proj")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert q.role == "attention.q"
    assert q.norm == pytest.approx(float((full[name] - base[name]).norm()), rel=1e-4)
    assert q.kept == pytest.approx(float((less[name] - base[name]).norm()) / q.norm, rel=1e-4)
    assert share_kept([]) == 1
    assert cut.stack.scores["norm-kept"].value == cut.kept


# -- what an adapter may be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "plugins"),
    [
        ("llama", [Dora(rank=2)]),
        ("gpt2", [Ia3()]),
        ("llama", [FullFinetuning(targets="norm attention.q")]),
        ("gpt2", [FullFinetuning(targets="mlp")]),
        ("llama", [FullFinetuning(targets="attention.q"), Lora(rank=2, targets="attention"), Dora(rank=2)]),
        ("gpt2", [Dora(rank=2, targets="attention.q mlp")]),
        ("llama", [("one", Lora(rank=2)), ("two", Lora(rank=3, targets="mlp"))]),
    ],
    ids=str,
)
def test_whatever_folds(kind: str, plugins: Any, folders: Any, tmp_path: Path) -> None:
    other = folders(kind)[1]
    pair = [adapter(tmp_path / "own", plugins, model=kind), other]
    alone = merge_adapters(pair[:1], into="weights", model=tiny(kind))
    assert apart(logits(alone.stack.model), logits(load(pair[0], model=tiny(kind)).model)) <= 2e-6
    both = merge_adapters(pair, weights=[0.5, 2.0], into="weights", model=tiny(kind))
    same(state(both), added(pair, [0.5, 2.0], kind))


def test_what_is_no_factor_is_cut_to_some(folders: Any, tmp_path: Path) -> None:
    pair = [adapter(tmp_path / "dora", Dora(rank=2, targets="attention.q")), folders()[1]]
    merged = merge_adapters(pair, method="svd", rank=99, model=tiny("llama"))
    same(state(merged), added(pair, [1, 1], "llama"), within=2e-6)
    for method in ("linear", "cat"):
        with pytest.raises(MergeError, match=r"dora': dora at .*q_proj has no factors, so \w+ has no exact"):
            merge_adapters(pair, method=method, model=tiny("llama"))


def test_more_ranks_than_the_matrix_has(tmp_path: Path) -> None:
    pair = [adapter(tmp_path / n, Lora(rank=12, targets="attention"), seed=s) for s, n in enumerate("ab")]
    merged = merge_adapters(pair, method="cat", model=tiny("llama"))
    assert {place.role: place.rank for place in merged.places} == {
        "attention.q": 24, "attention.k": 16, "attention.v": 16, "attention.o": 24
    }  # fmt: skip
    same(state(merged), added(pair, [1, 1], "llama"), within=2e-6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("attention.q layers=0", "attention.q,v layers=1"),
        ("attention.q", "mlp.up layers=1"),
        ("attention.q layers=0", "attention.v layers=0"),
        ("attention.q,v layers=0", "attention.q"),
    ],
)
def test_any_roles_of_a_fused_matrix(first: str, second: str, tmp_path: Path) -> None:
    pair = [
        adapter(tmp_path / "a", Lora(rank=2, targets=first), seed=1, model="gpt2"),
        adapter(tmp_path / "b", Lora(rank=3, targets=second), seed=2, model="gpt2"),
    ]
    merged = merge_adapters(pair, model=tiny("gpt2"))
    same(state(merged), added(pair, [1, 1], "gpt2"))
    if first.endswith("layers=0") and second.endswith("layers=0"):  # words tell these from the others
        assert {part.key for part in merged.stack.ledger.of("lora")} == {
            place.name for place in merged.places
        }
    merged.stack.save(tmp_path / "both")
    again = load(tmp_path / "both", model=tiny("gpt2"))
    assert torch.equal(logits(again.model), logits(merged.stack.model))


def test_dropout_is_no_part_of_an_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", Lora(rank=2, dropout=0.5))
    assert merge_adapters([folder], method="cat", model=tiny("llama").train()).kept == 1


def test_tied_weights(tmp_path: Path) -> None:
    def base() -> Any:
        return tiny("llama", tie_word_embeddings=True)

    trained = adapter(tmp_path / "a", FullFinetuning(targets="embedding"), model=base())
    merged = merge_adapters([trained], weights=[2.0], into="weights", model=base())
    assert merged.stack.model.lm_head.weight is merged.stack.model.model.embed_tokens.weight
    same(
        state(merged),
        {n: 2 * v - dict(base().named_parameters())[n] for n, v in folded(trained, base()).items()},
    )
    merged.stack.export(tmp_path / "plain")
    other = adapter(
        tmp_path / "c", FullFinetuning(targets="head"), seed=1, model=base()
    )  # the same, by its other name
    merged = merge_adapters([trained, other], into="weights", model=base())
    values = [dict(base().named_parameters()), folded(trained, base()), folded(other, base())]
    same(
        state(merged), {name: values[1][name] + values[2][name] - value for name, value in values[0].items()}
    )
    head = adapter(tmp_path / "b", Lora(rank=2, targets="head"), model=base())
    merged = merge_adapters([head], into="weights", model=base())
    with pytest.raises(MergeError, match="uses one matrix as"):
        merged.stack.export(tmp_path / "plain")


def test_settings_of_generation_that_all_have_stay(tmp_path: Path, folders: Any) -> None:
    def of(name: str, top_k: int) -> Path:
        model = tiny("llama")
        model.generation_config.top_k = top_k
        return adapter(tmp_path / name, Lora(rank=2), model=model)

    own = tiny("llama").generation_config.top_k
    pair = [of("a", 7), of("b", 7)]
    assert merge_adapters(pair, model=tiny("llama")).stack.model.generation_config.top_k == 7
    for three in ([*pair, folders()[0]], [folders()[0], *pair]):
        assert merge_adapters(three, model=tiny("llama")).stack.model.generation_config.top_k == own


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_is_rounded_once(tmp_path: Path) -> None:
    def base() -> Any:
        return tiny("llama").to(torch.bfloat16)

    pair = [adapter(tmp_path / n, Lora(rank=2), seed=s, dtype=torch.bfloat16) for s, n in enumerate("ab")]
    found = state(merge_adapters(pair, weights=[0.3, 0.7], into="weights", model=base()))
    name = "model.layers.0.mlp.up_proj"
    total = base().get_submodule(name).weight.float()
    for folder, weight in sorted(zip(pair, (0.3, 0.7), strict=True)):
        delta = next(p for p in load(folder, model=base()).ledger.of("lora") if p.key == name).module
        total = total + weight * delta.scale * (delta.B.float() @ delta.A.float())
    differ = found[f"{name}.weight"] != total.to(torch.bfloat16)
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    assert differ.float().mean() < 0.002  # sums in another order fall on the other side of a middle
    factors = merge_adapters(pair, weights=[0.3, 0.7], model=base())
    assert factors.stack.ledger.tensors("lora")[f"{name}.A"].dtype == torch.float32
    differ = state(factors)[f"{name}.weight"] != found[f"{name}.weight"]
    assert differ.float().mean() < 0.002
    alone = merge_adapters(pair[:1], model=base())
    assert alone.stack.ledger.tensors("lora")[f"{name}.A"].dtype == torch.bfloat16
    assert torch.equal(logits(alone.stack.model), logits(load(pair[0], model=base()).model))
    factors.stack.save(tmp_path / "both")
    assert torch.equal(logits(load(tmp_path / "both", model=base()).model), logits(factors.stack.model))


def test_narrow_factors_fold_unrounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", Lora(rank=4, targets="mlp.up"), dtype=torch.bfloat16)
    base = tiny("llama").to(torch.bfloat16)
    low = merge_adapters([folder], method="svd", rank=4, model=base)
    monkeypatch.setattr(Source, "not_low_rank", lambda self, path, parameter: "all")
    full = merge_adapters([folder], method="svd", rank=4, model=tiny("llama").to(torch.bfloat16))
    assert [p.norm for p in full.places] == pytest.approx([p.norm for p in low.places], rel=1e-6)
    assert full.kept == pytest.approx(
        1, abs=1e-6
    )  # a product that was rounded to bfloat16 is of a higher rank


# -- files -------------------------------------------------------------------------------------------------------------


def test_results_come_back(tmp_path: Path, folders: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    tiny("llama").save_pretrained(base)
    pair = [adapter(tmp_path / n, Lora(rank=2), seed=s, model=AutoModelForCausalLM.from_pretrained(base))
            for s, n in enumerate("ab")]  # fmt: skip
    merged = merge_adapters(pair, method="ties", rank=3)
    assert merged.base == str(base)
    ours = logits(merged.stack.model)
    merged.stack.save(tmp_path / "bundle")
    again = load(tmp_path / "bundle")
    assert torch.equal(logits(again.model), ours)
    assert again.scores["norm-kept"].value == merged.kept < 1
    assert "norm-kept" in (tmp_path / "bundle/README.md").read_text()
    to_peft(merged.stack, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    assert apart(logits(theirs), ours) <= 1e-6
    mixed = merge_adapters([tmp_path / "peft", pair[0]], weights=[1, 0])
    assert apart(logits(mixed.stack.model), ours) <= 1e-6
    plain = merge_adapters(pair, method="ties", into="weights")
    plain.stack.export(tmp_path / "plain")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(whole), logits(plain.stack.model))
    with pytest.raises(BundleError, match="of the base changed"):
        plain.stack.save(tmp_path / "no-bundle")


def test_one_module_at_a_time(monkeypatch: pytest.MonkeyPatch, folders: Any) -> None:
    alive: list[weakref.ref[Tensor]] = []
    at: list[str] = []

    def differences(self: Source, path: str, module: Any, old: Any = Source.differences) -> Any:
        if at and at[-1] != path:
            assert not any(tensor() is not None for tensor in alive), f"{at[-1]} is still there at {path}"
        at.append(path)
        found = old(self, path, module)
        alive.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(Source, "differences", differences)
    monkeypatch.setattr(Source, "not_low_rank", lambda self, path, parameter: "all")
    merge_adapters(folders(), method="ties", rank=2, model=tiny("llama"))
    assert len(set(at)) == 10


def test_progress(folders: Any) -> None:
    seen: list[tuple[int, int]] = []
    merge_adapters(folders(), model=tiny("llama"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 10) for n in range(11)]


# -- refusals ----------------------------------------------------------------------------------------------------------


class Shift(Delta):
    """y + 1."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 1

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, weight.new_ones(weight.shape[:-1]) if bias is None else bias + 1


class Shifting(Plugin):
    """Needs a bias where it is folded."""

    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.q"):
            site.attach(Shift())


def test_a_bias_where_none_is(tmp_path: Path) -> None:
    llama = Stack(tiny("llama"), [Shifting()]).save(tmp_path / "llama")
    with pytest.raises(MergeError, match="q_proj has no bias, and shifting would give it one"):
        merge_adapters([llama], into="weights", model=tiny("llama"))
    gpt2 = Stack(tiny("gpt2"), [Shifting()]).save(tmp_path / "gpt2")
    same(state(merge_adapters([gpt2], into="weights", model=tiny("gpt2"))), folded(gpt2, tiny("gpt2")))


class Keeping(Plugin):
    """Has a module beside the weights, as a head is."""

    @hookimpl
    def inject(self, model: Any) -> None:
        model.keep("own", torch.nn.Linear(2, 2))


class Decoding(Plugin):
    """Replaces the loop of decoding."""

    @hookimpl
    def decode(self, request: Any) -> Any:
        return request.run_default()


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (
            [Lora(rank=2), PromptTuning(length=2)],
            r"'prompt-tuning' does not fold into the weights \(soft tokens",
        ),
        ([Lora(rank=2, targets="embedding")], "LoraEmbedding does not fold"),
        ([Lora(rank=2), Decoding()], "decodes, which no weight can"),
        ([Lora(rank=2), Keeping()], r"'keeping' does not fold into the weights \(shared"),
        ([], "changes no weight of the base"),
    ],
    ids=["prompt", "embedding", "decoding", "kept", "nothing"],
)
def test_what_does_not_fold(plugins: Any, message: str, folders: Any, tmp_path: Path) -> None:
    other = Stack(tiny("llama"), plugins).save(tmp_path / "other")
    with pytest.raises(MergeError, match=message) as error:
        merge_adapters([folders()[0], other], model=tiny("llama"))
    assert "'" + str(other) + "'" in str(error.value)
    assert ("stack.remove" in error.value.hint) == bool(plugins)


def test_what_is_folded_or_compressed(tmp_path: Path, folders: Any) -> None:
    stack = load(folders()[0], model=tiny("llama"))
    stack.merge(keep=False)
    stack.save(tmp_path / "good")
    with pytest.raises(MergeError, match="folded into its base for good"):
        merge_adapters([tmp_path / "good"], model=tiny("llama"))
    packed = Stack("peftx:tiny", [PrefixQuant(weight_bits=4)])
    packed.compress("peftx:sample/calibration.txt", samples=1, length=32)
    packed.save(tmp_path / "packed")
    with pytest.raises(MergeError, match="packed' is compressed"):
        merge_adapters([tmp_path / "packed"])


def test_bases(tmp_path: Path, folders: Any) -> None:
    other = adapter(tmp_path / "other", Lora(rank=2), model=tiny("llama", seed=9))
    with pytest.raises(PeftxError, match=r"other' was made for another base than '.*a': fingerprint"):
        merge_adapters([folders()[0], other], model=tiny("llama"))
    with pytest.raises(BundleError, match="another base model"):
        merge_adapters([folders()[0]], model=tiny("llama", seed=9))
    for name in ("one", "two"):
        to_peft(load(folders()[0], model=tiny("llama")), tmp_path / name)
        told = json.loads((tmp_path / name / "adapter_config.json").read_text())
        told["base_model_name_or_path"] = name
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(PeftxError, match=r"they name: '.*one' one, '.*two' two") as error:
        merge_adapters([tmp_path / "one", tmp_path / "two"])
    assert error.value.hint == "--model ID"
    merged = merge_adapters([tmp_path / "one", tmp_path / "two"], model=tiny("llama"))
    same(state(merged), added([folders()[0]], [2.0], "llama"))


def test_what_no_lora_holds(tmp_path: Path) -> None:
    norm = adapter(tmp_path / "norm", FullFinetuning(targets="norm"))
    with pytest.raises(MergeError, match=r"changes model\.layers\.\S+norm\.weight, which no lora adapts"):
        merge_adapters([norm], method="svd", rank=2, model=tiny("llama"))
    bias = adapter(tmp_path / "ia3", Ia3(), model="gpt2")
    with pytest.raises(MergeError, match="bias changes with its matrix, which no lora does"):
        merge_adapters([bias], method="svd", rank=2, model=tiny("gpt2"))


def test_differences_that_are_nothing(tmp_path: Path) -> None:
    folder = Stack(tiny("llama"), [FullFinetuning(targets="attention.q")]).save(tmp_path / "a")
    with pytest.raises(MergeError, match="add up to nothing"):
        merge_adapters([folder], method="svd", rank=1, model=tiny("llama"))
    same(
        state(merge_adapters([folder], into="weights", model=tiny("llama"))),
        dict(tiny("llama").named_parameters()),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tise"}, "no method 'tise'"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [0.0, 0.0]}, "nothing is left"),
        ({"weights": [1.0, float("nan")]}, "nothing is left"),
        ({"density": 0.5}, "no density"),
        ({"method": "ties", "density": 0.0, "rank": 1}, "no share"),
        ({"method": "ties", "density": 1.5, "rank": 1}, "no share"),
        ({"method": "ties", "rank": 2, "seed": 1}, "no seed"),
        ({"rank": 0}, "no such matrix"),
        ({"method": "cat", "rank": 4}, "cat is exact"),
        ({"method": "svd"}, "svd needs the rank"),
        ({"method": "svd", "into": "weights"}, "svd needs the rank"),
        ({"method": "dare"}, "dare needs the rank"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    """Said before a folder is opened: these do not exist."""
    with pytest.raises(PeftxError, match=message):
        merge_adapters(["nope", "neither"], **options)


def test_nothing_to_merge() -> None:
    with pytest.raises(PeftxError, match="no adapter"):
        merge_adapters([])


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """A PEFT model with two adapters of unlike ranks and alphas, and the folders that it saves them in."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    where = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, lora_alpha=6, **where), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=9, **where))
    model.eval().save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize(
    ("method", "kind", "options", "peft_options"),
    [
        ("cat", "cat", {}, {}),
        ("svd", "svd", {"rank": 3}, {"svd_rank": 3}),
        ("ties", "ties_svd", {"rank": 3, "density": 0.5}, {"svd_rank": 3, "density": 0.5}),
    ],
)
def test_as_peft(
    method: str, kind: str, options: Any, peft_options: Any, theirs: Any, tmp_path: Path
) -> None:
    weights = [0.5, 0.5] if method == "ties" else [0.7, -0.4]
    theirs.add_weighted_adapter(["a", "b"], weights, "c", combination_type=kind, **peft_options)
    theirs.set_adapter("c")
    merged = merge_adapters(
        [tmp_path / "a", tmp_path / "b"], method=method, weights=weights, model=tiny("llama"), **options
    )
    assert apart(logits(merged.stack.model), logits(theirs)) <= 1e-5


def test_laws_that_peft_breaks(theirs: Any, tmp_path: Path) -> None:
    """What docs/merging.md says of it. A later version of PEFT may mend it, and this test says so then."""
    theirs.add_adapter("d", theirs.peft_config["a"])  # linear wants equal ranks
    theirs.add_weighted_adapter(["a", "d"], [1.0, 1.0], "sum", combination_type="linear")
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    sum_of = layer.get_delta_weight("a") + layer.get_delta_weight("d")
    assert apart(layer.get_delta_weight("sum"), sum_of) > 0.1
    theirs.add_weighted_adapter(
        ["a", "b"], [1.0, 0.0], "voted", combination_type="ties_svd", svd_rank=32, density=1.0
    )
    assert apart(layer.get_delta_weight("voted"), layer.get_delta_weight("a")) > 0.1
    found = merge_adapters([tmp_path / "a", tmp_path / "b"], weights=[1, 0], method="ties", density=1.0, rank=32,
                           model=tiny("llama"))  # fmt: skip
    only = merge_adapters([tmp_path / "a"], model=tiny("llama"))
    same(state(found), state(only), within=2e-6)
