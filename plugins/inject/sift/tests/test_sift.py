from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftx
from peftx import Claim, ModelView, Plugin, SparseDelta, Stack, TrainStep, hookimpl
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_sift import Sift, inactive, move

test_conformance = conformance("sift")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


class Dense(Plugin):
    """Trains the matrices themselves, all or through a mask."""

    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.places = model.train("all")


def stack_of(*before: Plugin, arch: str = "llama", **options: Any) -> Stack:
    return Stack(tiny(arch), [*before, Sift(**options)], tokenizer=tiny_tokenizer())


def deltas_of(stack: Stack) -> dict[str, SparseDelta]:
    plugin = stack.plugins["sift"]
    assert isinstance(plugin, Sift)
    return plugin.deltas


def batch_for(stack: Stack, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed)
    return inputs | {"labels": inputs["input_ids"]}


def optimizer_of(
    stack: Stack, kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    return kind([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)


def steps(
    stack: Stack, optimizer: torch.optim.Optimizer, count: int, *, micro: int = 1, total: int | None = None
) -> None:
    """A loop of one's own, with batches 0, 1, 2, ..."""
    for index in range(count):
        for i in range(micro):
            batch = batch_for(stack, index * micro + i)
            stack.run_train_step(
                TrainStep(stack, batch, index=index, micro=i, accumulation=micro, total=total)
            )
        optimizer.step()
        optimizer.zero_grad()


def dense_gradients(stack: Stack, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """dW of every matrix, as ordinary fine-tuning of the model as it is now has it."""
    model = tiny("llama")
    for name, delta in deltas_of(stack).items():
        weight = model.get_submodule(name).weight
        weight.data += delta.matrix(weight.dtype).detach()
    model(**batch).loss.backward()
    return {name: model.get_submodule(name).weight.grad for name in deltas_of(stack)}


# -- phi at eta ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.002, 0.01, 0.37, 1.0])
def test_starts_at_random_places_each_once(density: float) -> None:
    stack = stack_of(density=density)
    for delta in deltas_of(stack).values():
        size = delta.shape[0] * delta.shape[1]
        eta = delta.at.long()
        assert len(eta) == max(1, round(density * size))
        assert len(eta.unique()) == len(eta)
        assert 0 <= int(eta.min()) <= int(eta.max()) < size
        assert not delta.values.any()
    one, other = (deltas_of(Stack(tiny("llama"), [Sift(density=0.01)], seed=seed)) for seed in (0, 1))
    assert any(not torch.equal(one[name].at, other[name].at) for name in one)


def test_phi_has_the_gradient_of_the_matrix_at_eta() -> None:
    stack = stack_of(density=0.05)
    steps(stack, optimizer_of(stack), 2)
    batch = batch_for(stack, 9)
    stack.train_step(batch)
    for name, dense in dense_gradients(stack, batch).items():
        delta = deltas_of(stack)[name]
        torch.testing.assert_close(delta.values.grad, dense.flatten()[delta.at.long()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_density_1_is_full_fine_tuning_of_the_matrices(kind: type[torch.optim.Optimizer]) -> None:
    full, stack = Stack(tiny("llama"), [Dense()]), stack_of(density=1.0, rate=0)
    for one in (full, stack):
        steps(one, optimizer_of(one, kind), 5)
    moved = 0.0
    for name, delta in deltas_of(stack).items():
        weight, start = full.model.get_submodule(name).weight, tiny("llama").get_submodule(name).weight
        # Adam divides a gradient near 0 by its size, so what rounds there is seen.
        tolerance = 1e-6 if kind is torch.optim.SGD else 1e-4
        torch.testing.assert_close(start + delta.matrix(start.dtype), weight, rtol=0, atol=tolerance)
        moved = max(moved, float((weight - start).detach().abs().max()))
    assert moved > 1e-3


# -- moving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
@pytest.mark.parametrize("density", [0.02, 0.9])
def test_the_number_of_entries_stays_and_none_comes_twice(grow: str, density: float) -> None:
    stack = stack_of(density=density, every=2, gamma=1, rate=0.5, grow=grow)
    before = {name: delta.at.clone() for name, delta in deltas_of(stack).items()}
    kind = torch.optim.AdamW if grow == "gradient" else torch.optim.SGD
    steps(stack, optimizer_of(stack, kind), 6)
    for name, delta in deltas_of(stack).items():
        assert len(delta.at) == len(before[name])
        assert len(delta.at.unique()) == len(delta.at)
        assert int(delta.at.max()) < delta.shape[0] * delta.shape[1]
        assert not torch.equal(delta.at.sort().values, before[name].sort().values)


def test_what_grows_and_what_is_dropped() -> None:
    """By hand, from the dense gradients of the last gamma steps."""
    stack = stack_of(density=0.01, every=4, gamma=2, rate=0.3)
    optimizer = optimizer_of(stack)
    steps(stack, optimizer, 2)
    start = {name: delta.at.clone() for name, delta in deltas_of(stack).items()}
    sums: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    for index in (2, 3):
        batch = batch_for(stack, index)
        for name, dense in dense_gradients(stack, batch).items():
            first.setdefault(name, dense.flatten().abs())
            sums[name] = sums.get(name, 0) + dense.flatten()
        stack.run_train_step(TrainStep(stack, batch, index=index))
        assert all(delta.on_gradient is None for delta in deltas_of(stack).values()), "nothing stays behind"
        phi = {name: delta.values.detach().clone() for name, delta in deltas_of(stack).items()}
        optimizer.step()  # moves phi, then entries
        optimizer.zero_grad()
    for name, delta in deltas_of(stack).items():
        k = int(0.3 * len(delta.at))
        changed = delta.at != start[name]
        assert int(changed.sum()) == k > 0
        assert not delta.values[changed].any(), "they start from the pretrained values"
        assert delta.values[~changed].all()
        candidates = first[name].index_fill(0, start[name].long(), -1).topk(len(delta.at)).indices
        wanted = candidates[sums[name][candidates].abs().topk(k).indices]
        assert set(delta.at[changed].tolist()) == set(wanted.tolist())
        # Of phi as the last update left it, which moved it by at most the rate.
        assert phi[name][changed].abs().max() <= phi[name][~changed].abs().min() + 2.1e-2


def test_what_is_dropped_has_the_pretrained_value_again() -> None:
    delta = SparseDelta(torch.tensor([0, 3, 5]), (2, 3))
    delta.values.data = torch.tensor([0.5, -0.1, 0.3])
    optimizer = torch.optim.SGD([delta.values], lr=0.0, momentum=0.9)
    delta.values.grad = torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        move(delta, torch.tensor([4]), [], optimizer)
    assert optimizer.state[delta.values]["momentum_buffer"].tolist() == [1, 0, 1], "it begins anew"
    assert delta.matrix(torch.float32).tolist() == [[0.5, 0, 0], [0, 0, pytest.approx(0.3)]]
    assert delta.at.tolist() == [0, 4, 5]


def test_only_places_that_do_not_train_grow() -> None:
    score = torch.tensor([[5.0, 1.0, 4.0], [0.0, 3.0, 2.0]])
    assert inactive(score, torch.tensor([0, 4], dtype=torch.int32)).tolist() == [2, 5]
    assert inactive(score, torch.tensor([0, 1, 2, 3, 5])).tolist() == [4]


def test_moments_of_what_grows_are_the_means_of_its_gradients() -> None:
    """Whether a step has one micro-batch or two; Adam then divides by 1 - beta**t."""
    for micro in (1, 2):
        stack = stack_of(density=0.02, every=3, gamma=2, rate=0.4)
        optimizer = optimizer_of(stack)
        gradients: list[dict[str, Tensor]] = []
        for index in range(3):
            batches = [batch_for(stack, 10 * index + i) for i in range(micro)]
            found = [dense_gradients(stack, batch) for batch in batches]
            gradients.append({name: sum(f[name] for f in found).flatten() / micro for name in found[0]})
            for i, batch in enumerate(batches):
                stack.run_train_step(TrainStep(stack, batch, index=index, micro=i, accumulation=micro))
            start = {name: delta.at.clone() for name, delta in deltas_of(stack).items()}
            optimizer.step()
            optimizer.zero_grad()
        for name, delta in deltas_of(stack).items():
            state, grown = optimizer.state[delta.values], delta.at != start[name]
            assert grown.any()
            g = torch.stack([one[name][delta.at.long()] for one in gradients[1:]])  # [gamma, N]
            for key, beta, mean in (("exp_avg", 0.9, g.mean(0)), ("exp_avg_sq", 0.999, g.square().mean(0))):
                corrected = state[key] / (1 - beta**3)
                torch.testing.assert_close(corrected[grown], mean[grown], rtol=1e-3, atol=1e-9)
                assert not torch.allclose(corrected[~grown], mean[~grown], rtol=1e-3, atol=0)


def test_the_share_that_moves_falls_to_nothing_at_the_end() -> None:
    stack = stack_of(density=0.05, every=2, gamma=1, rate=0.8)
    optimizer, moved = optimizer_of(stack), []
    (name, delta), *_ = deltas_of(stack).items()
    for index in range(8):
        before = delta.at.clone()
        stack.run_train_step(TrainStep(stack, batch_for(stack, index), index=index, total=8))
        optimizer.step()
        optimizer.zero_grad()
        moved.append(int((delta.at != before).sum()))
    N = len(delta.at)
    assert moved == [0, int(0.8 * 0.75 * N), 0, int(0.8 * 0.5 * N), 0, int(0.8 * 0.25 * N), 0, 0], name


def test_frozen_entries_stay() -> None:
    for grow in ("gradient", "momentum"):
        stack = stack_of(Dense(), density=0.05, every=2, gamma=2, rate=0.5, grow=grow)
        optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
        stack.run_train_step(TrainStep(stack, batch_for(stack), index=0))
        optimizer.step()
        optimizer.zero_grad()
        stack.freeze("sift")
        before = {name: (delta.at.clone(), delta.values.clone()) for name, delta in deltas_of(stack).items()}
        stack.run_train_step(TrainStep(stack, batch_for(stack), index=1))
        optimizer.step()
        for name, (at, values) in before.items():
            assert torch.equal(deltas_of(stack)[name].at, at)
            assert torch.equal(deltas_of(stack)[name].values, values)


# -- SM3 -------------------------------------------------------------------------------------------------------------


def test_sm3_by_hand() -> None:
    stack = stack_of(density=0.1, every=3, gamma=1, rate=0.5, grow="momentum")
    optimizer = optimizer_of(stack, torch.optim.SGD)
    names = list(deltas_of(stack))
    r = {name: torch.zeros(deltas_of(stack)[name].shape[0]) for name in names}
    c = {name: torch.zeros(deltas_of(stack)[name].shape[1]) for name in names}
    for index in range(3):
        batch = batch_for(stack, index)
        at = {name: deltas_of(stack)[name].at.clone() for name in names}
        phi = {name: deltas_of(stack)[name].values.detach().clone() for name in names}
        stack.run_train_step(TrainStep(stack, batch, index=index))
        g = {name: deltas_of(stack)[name].values.grad.clone() for name in names}
        optimizer.step()
        optimizer.zero_grad()
        for name in names:
            delta = deltas_of(stack)[name]
            nu = torch.zeros(delta.shape)
            for place, value in zip(at[name].tolist(), g[name].tolist(), strict=True):
                i, j = divmod(place, delta.shape[1])
                nu[i, j] = min(r[name][i], c[name][j]) + value**2
            r[name], c[name] = torch.maximum(r[name], nu.amax(1)), torch.maximum(c[name], nu.amax(0))
            root = (nu.flatten()[at[name].long()] + 1e-8).sqrt()
            stays = delta.at == at[name]
            torch.testing.assert_close(
                delta.values.detach()[stays], (phi[name] - 1e-2 * g[name] / root)[stays], rtol=1e-4, atol=1e-7
            )
    memory = stack.memory["sift"]
    for name in names:
        delta = deltas_of(stack)[name]
        torch.testing.assert_close(memory[name]["r"], r[name])
        torch.testing.assert_close(memory[name]["c"], c[name])
        score = torch.outer(r[name], c[name]).flatten().index_fill(0, at[name].long(), -1)
        k = int(0.5 * len(delta.at))
        grown = delta.at[delta.at != at[name]].long()
        assert len(grown) == k
        assert score[grown].min() >= score.sort(descending=True).values[k - 1]


def test_sm3_stands_in_the_optimizers_place() -> None:
    stack = stack_of(grow="momentum")
    with pytest.raises(PeftxError, match="sift: SM3 stands in the optimizer's place") as caught:
        stack.train(ROWS, steps=1)
    assert caught.value.hint == "train: {optimizer: sgd}"
    report = stack_of(grow="momentum", density=0.1).train(
        ROWS, steps=20, batch_size=4, optimizer="sgd", learning_rate=1e-2
    )
    assert report.last_loss < report.first_loss - 0.3


# -- over integers, in files, in memory ------------------------------------------------------------------------------


class Packed(Plugin):
    """4-bit weights."""

    claims = {Claim.QUANTIZES}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("all", whole=True):
            site.replace(QuantLinear.from_linear(site.module, bits=4, group_size=16))


def test_trains_over_integers() -> None:
    plugins = [Packed(), Sift(density=0.05, every=2, gamma=1, rate=0.5)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["packed"])
    stack.inject(["sift"])
    packed = {name: t.clone() for name, t in stack.ledger.tensors("packed").items()}
    before = {name: delta.at.clone() for name, delta in deltas_of(stack).items()}
    report = stack.train(ROWS, steps=20, batch_size=4, learning_rate=1e-2)
    assert report.last_loss < report.first_loss - 0.3
    assert any(not torch.equal(delta.at, before[name]) for name, delta in deltas_of(stack).items())
    assert all(torch.equal(t, packed[name]) for name, t in stack.ledger.tensors("packed").items())


@pytest.mark.parametrize(("grow", "optimizer"), [("gradient", "adamw"), ("momentum", "sgd")])
def test_resumes_between_the_steps_of_a_selection(tmp_path: Path, grow: str, optimizer: str) -> None:
    options: dict[str, Any] = {
        "steps": 8, "batch_size": 2, "learning_rate": 1e-2, "optimizer": optimizer, "checkpoint_every": 6,
        "gradient_accumulation": 2,
    }  # fmt: skip
    whole, rest = (stack_of(density=0.05, every=4, gamma=3, rate=0.5, grow=grow) for _ in range(2))
    whole.train(ROWS, output=tmp_path, **options)
    rest.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-6", **options)
    for name, delta in deltas_of(whole).items():
        assert torch.equal(delta.at, deltas_of(rest)[name].at)
        assert torch.equal(delta.values, deltas_of(rest)[name].values)


def test_a_bundle_holds_eight_bytes_an_entry(tmp_path: Path) -> None:
    """Places and values, as many bytes as the bundle of a masked base takes; and the same logits come back."""
    dense = Dense()
    stack, masked = Stack("peftx:tiny", [Sift(density=0.01)]), Stack("peftx:tiny", [dense])
    with torch.no_grad():
        for name, delta in deltas_of(stack).items():
            delta.values.normal_()
            dense.places[f"{name}.weight"].theta.view(-1)[delta.at.long()] += 1.0
    file = stack.save(tmp_path / "sift") / "sift.safetensors"
    other = masked.save(tmp_path / "dense") / "dense.safetensors"
    entries, matrices = stack.trainable_parameters(), deltas_of(stack).values()
    header = 400 * len(matrices)  # safetensors: names, shapes, offsets
    assert 8 * entries < file.stat().st_size < 8 * entries + header
    assert abs(file.stat().st_size - other.stat().st_size) < header
    assert file.stat().st_size < 0.025 * sum(delta.matrix(torch.float32).nbytes for delta in matrices)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(peftx.load(tmp_path / "sift").model(ids).logits, stack.model(ids).logits)


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


def peak(stack: Stack, index: int) -> int:
    """Of one step and its update, with a batch so small that weights are what counts."""
    ids = torch.arange(3, 7)[None]
    optimizer = optimizer_of(stack)
    step = TrainStep(stack, {"input_ids": ids, "labels": ids}, index=index)
    with Peak() as mode:
        stack.run_train_step(step)
        optimizer.step()
    return mode.peak


def test_a_step_keeps_no_gradient_of_the_matrices() -> None:
    """Neither their gradients nor Adam's moments of them; what a selection adds is one matrix's, and N numbers."""
    model = "peftx:tiny"
    masked = Dense()
    full, stack = Stack(model, [masked]), Stack(model, [Sift(density=0.01)])
    for place in masked.places.values():
        place.restrict(torch.rand_like(place.theta) < 0.01)
    matrices = [torch.Size(delta.shape).numel() * 4 for delta in deltas_of(stack).values()]
    through_a_mask, sparse, selecting = peak(full, 0), peak(stack, 0), peak(stack, 19)
    assert through_a_mask > 3 * sum(matrices), "a dense gradient and two dense moments"
    assert sparse < 0.15 * through_a_mask
    assert selecting < sparse + 4 * max(matrices)


def test_a_density_of_less_than_one_entry_is_refused() -> None:
    with pytest.raises(
        PeftxError, match=r"sift: density 0.001 leaves 0.51 of the 512 entries of .*k_proj"
    ) as e:
        stack_of(density=0.001)
    assert "density at least 0.002, or leave it out of targets: '!attention.k'" in str(e.value)
    assert min(len(delta.at) for delta in deltas_of(stack_of(density=0.002)).values()) == 1
    stack_of(density=0.001, targets="attention.q")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0}, "density"), ({"density": 1.1}, "density"), ({"every": 0}, "every"), ({"rate": 2}, "rate"),
        ({"grow": "random"}, "grow"), ({"gamma": 0}, "gamma"), ({"every": 3}, "gamma 5 is more than every 3"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        Sift(**options)
