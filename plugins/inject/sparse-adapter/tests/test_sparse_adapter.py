"""SparseAdapter: which entries are kept, that the others stay zero, and that what is left trains as it would."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftx
from peftx import Claim, Delta, ModelView, Plugin, Stack, TrainStep, hookimpl
from peftx.errors import ConflictError, PeftxError, TrainingError
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_compacter import Compacter
from peftx_ist import Ist
from peftx_lofit import Lofit
from peftx_lora import Lora
from peftx_ls_llama import LsLlama
from peftx_mezo import Mezo
from peftx_p_tuning_v2 import PTuningV2
from peftx_propulsion import Propulsion
from peftx_sparse_adapter import SparseAdapter, kept, matrices

test_conformance = conformance("sparse-adapter")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
SCORES = ["random", "magnitude", "er", "snip", "grasp", "synflow"]
EACH = pytest.mark.parametrize("score", SCORES)


class Bottleneck(nn.Module):
    """An adapter of two layers with biases, as Houlsby's."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).relu())


class HoulsbyDelta(Delta):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.adapter = Bottleneck(width, inner)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapter(y)


class Houlsby(Plugin):
    """Bottlenecks behind the feed-forward parts."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(HoulsbyDelta(site.out_features, 4))


def stack_of(*adapters: Plugin, arch: str = "llama", seed: int = 0, **options: Any) -> Stack:
    plugins = [*(adapters or [Lora(rank=4)]), SparseAdapter(**options)]
    return Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer(), seed=seed)


def weights(stack: Stack) -> list[Tensor]:
    return list(matrices(stack, "sparse-adapter"))


def mask_of(stack: Stack) -> list[Tensor]:
    plugin = stack.plugins["sparse-adapter"]
    assert isinstance(plugin, SparseAdapter)
    parts = plugin.mask.m.split(plugin.sizes)
    return [m.view(w.shape) for m, w in zip(parts, weights(stack), strict=True)]


def batch_for(stack: Stack, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed)
    return inputs | {"labels": inputs["input_ids"]}


def steps(
    stack: Stack, count: int, *, micro: int = 1, decay: float = 0.1, kind: Any = torch.optim.AdamW
) -> None:
    """A loop of one's own, with batches 0, 1, 2, ..."""
    optimizer = kind([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=decay)
    for index in range(count):
        for i in range(micro):
            batch = batch_for(stack, index * micro + i)
            stack.run_train_step(TrainStep(stack, batch, index=index, micro=i, accumulation=micro))
        optimizer.step()
        optimizer.zero_grad()


def spread(stack: Stack) -> list[Tensor]:
    """Numbers into all matrices; copies of them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for w in weights(stack):
            w.copy_(torch.randn(w.shape, generator=generator) * 0.1)
    return [w.detach().clone() for w in weights(stack)]


def expected_of(z: list[Tensor], sparsity: float) -> list[Tensor]:
    """The mask by a sort of all scores."""
    flat = torch.cat([each.flatten() for each in z])
    edge = flat.sort(descending=True).values[kept(len(flat), sparsity) - 1]
    return [each >= edge for each in z]


def check_mask(stack: Stack, z: list[Tensor], before: list[Tensor], sparsity: float) -> None:
    """The mask is what the scores say, but for scores that rounding may put on the other side of the edge."""
    wrong = sum(int((a != b).sum()) for a, b in zip(mask_of(stack), expected_of(z, sparsity), strict=True))
    assert wrong <= 2, wrong
    for w, m, old in zip(weights(stack), mask_of(stack), before, strict=True):
        assert torch.equal(w.detach(), old * m)


# ------------------------------------------------------------------------------------------------- how many are left
@EACH
@pytest.mark.parametrize("sparsity", [0.4, 0.8])
def test_kept_are_floor_of_the_share(score: str, sparsity: float) -> None:
    stack = stack_of(score=score, sparsity=sparsity)
    N = sum(w.numel() for w in spread(stack))
    stack.train_step(batch_for(stack))
    assert sum(int(m.sum()) for m in mask_of(stack)) == math.floor(round((1 - sparsity) * N, 6))
    assert 0 < sum(int((w != 0).sum()) for w in weights(stack)) <= kept(N, sparsity)


def test_shares_are_of_the_number_as_it_is_written() -> None:
    assert [kept(10, 0.8), kept(10, 0.4), kept(10, 0.0), kept(7, 0.5), kept(1000, 0.999)] == [2, 6, 10, 3, 1]


@pytest.mark.parametrize("score", ["magnitude", "snip", "random"])
def test_local_keeps_the_share_of_each_matrix(score: str) -> None:
    stack = stack_of(score=score, scope="local", sparsity=0.75)
    stack.train_step(batch_for(stack))
    for m in mask_of(stack):
        assert int(m.sum()) == m.numel() // 4
    stack = stack_of(score="magnitude", sparsity=0.75)
    spread(stack)
    stack.train_step(batch_for(stack))
    assert any(int(m.sum()) != m.numel() // 4 for m in mask_of(stack))


def test_large_sparse_has_as_many_numbers_as_the_small_one() -> None:
    small = Stack(tiny("llama"), [Lora(rank=2)]).trainable_parameters()
    stack = stack_of(Lora(rank=8), sparsity=0.75)
    assert sum(w.numel() for w in weights(stack)) == 4 * small
    stack.train_step(batch_for(stack))
    assert sum(int(m.sum()) for m in mask_of(stack)) == small


# -------------------------------------------------------------------------------------------------------- the scores
def test_magnitude() -> None:
    stack = stack_of(score="magnitude", sparsity=0.6)
    before = spread(stack)
    stack.train_step(batch_for(stack))
    check_mask(stack, [w.abs() for w in before], before, 0.6)


def plain_gradients(stack: Stack, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """g, and H g as the derivatives of g^T v with v = g held."""
    ws = weights(stack)
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(stack.model(**batch).loss, ws, create_graph=True)
        dot = torch.stack([(each * each.detach()).sum() for each in g]).sum()
        return [each.detach() for each in g], list(torch.autograd.grad(dot, ws))


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_scores_of_gradients_are_of_the_first_micro_batch(score: str) -> None:
    stack = stack_of(Lora(rank=4, dropout=0.5), score=score, sparsity=0.6)
    before = spread(stack)
    batches = [batch_for(stack, i) for i in range(2)]
    stack.model.eval()
    g, Hg = plain_gradients(stack, batches[0])
    stack.model.train()  # scores are of the model without dropout
    for i, batch in enumerate(batches):
        stack.run_train_step(TrainStep(stack, batch, micro=i, accumulation=2))
    z = [(w * d).abs() if score == "snip" else w * d
         for w, d in zip(before, g if score == "snip" else Hg, strict=True)]  # fmt: skip
    check_mask(stack, z, before, 0.6)
    assert stack.model.training


def test_grasp_keeps_what_raises_the_flow_of_gradients() -> None:
    """Those with the largest w H g: without them |g|^2 would fall most. (The released code keeps these too.)"""
    norms = {}
    for score in ("grasp", "random"):
        stack = stack_of(score=score, sparsity=0.5)
        spread(stack)
        stack.model.eval()
        stack.train_step(batch_for(stack))
        g, _ = plain_gradients(stack, batch_for(stack))
        norms[score] = float(sum(each.square().sum() for each in g))
    assert norms["grasp"] > norms["random"]


class Synflow(Plugin):
    """y + U relu(D LN(y) + b), one bottleneck behind each feed-forward part."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.normed = normed

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(SynflowDelta(site.out_features, normed=self.normed))


class SynflowDelta(HoulsbyDelta):
    def __init__(self, width: int, *, normed: bool) -> None:
        super().__init__(width, 4)
        self.norm = nn.LayerNorm(width) if normed else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.adapter(self.norm(y))


@pytest.mark.parametrize("normed", [True, False])
def test_synflow_sums_the_paths_through_an_entry(normed: bool) -> None:
    """Of D[k, j] these are |gain_j| |D[k, j]| sum_o |U[o, k]|; of U[o, k] |U[o, k]| times what comes to unit k."""
    stack = stack_of(Synflow(normed), Lora(rank=4), score="synflow", sparsity=0.6)
    ws = dict(zip(map(id, weights(stack)), spread(stack), strict=True))
    z, generator = {}, torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in [*stack.ledger.of("synflow"), *stack.ledger.of("lora")]:
            tensors = {name.removeprefix(part.key): x for name, x in part.tensors().items()}
            if part.owner == "lora":
                A, B = tensors[".A"], tensors[".B"]
                z[id(A)] = A.abs() * B.abs().sum(0)[:, None] * 2  # alpha / rank
                z[id(B)] = B.abs() * A.abs().sum(1) * 2
                continue
            for x in tensors.values():
                if x.ndim == 1:
                    x.copy_(torch.randn(x.shape, generator=generator))
            D, U, b = (tensors[f".adapter.{n}"].abs() for n in ("down.weight", "up.weight", "down.bias"))
            gain, beta = (
                (tensors[f".norm.{n}"].abs() for n in ("weight", "bias")) if normed else (torch.ones(1), 0)
            )
            z[id(tensors[".adapter.down.weight"])] = D * (gain + beta) * U.sum(0)[:, None]
            z[id(tensors[".adapter.up.weight"])] = U * (D @ (gain + beta + torch.zeros(D.shape[1])) + b)
    vectors = [p.detach().clone() for p in stack.ledger.parameters("synflow") if p.ndim == 1]
    stack.train_step(batch_for(stack))
    check_mask(stack, [z[i] for i in ws], [*ws.values()], 0.6)
    now = [p for p in stack.ledger.parameters("synflow") if p.ndim == 1]
    assert all(torch.equal(a, b) for a, b in zip(now, vectors, strict=True)), "signs are back"


def test_synflow_reads_no_rows() -> None:
    """The call of the model that it needs is one of the base."""
    masks, base = [], tiny("llama").eval()
    for seed in (0, 1):
        stack = stack_of(score="synflow", sparsity=0.6)
        spread(stack)
        seen: list[Tensor] = []
        stack.model.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.logits.detach()))
        stack.train_step(batch_for(stack, seed))
        torch.testing.assert_close(seen[0], base(**batch_for(stack, seed)).logits)
        masks.append(torch.cat([m.flatten() for m in mask_of(stack)]))
    assert torch.equal(*masks)


def test_what_synflow_cannot_follow_is_refused_when_the_stack_is_built() -> None:
    refused: list[tuple[str, list[Plugin]]] = [
        ("attention", [PTuningV2(length=3, dropout=0.0)]),
        ("delta", [Lora(rank=2, targets="embedding")]),
        ("delta", [Lofit()]),
    ]
    for what, plugins in refused:
        with pytest.raises(ConflictError, match="is not called on these alone") as caught:
            stack_of(*plugins, score="synflow")
        assert f"({what})" in str(caught.value)
        assert "score: magnitude, er or random" in str(caught.value.hint)
    with pytest.raises(ConflictError, match=r"experts.* is not called on these alone"):
        stack_of(Lora(rank=2, targets="mlp"), arch="mixtral", score="synflow")


def test_erdos_renyi_shares() -> None:
    """Of each matrix a number in proportion to in + out, random ones; of a small one no more than all."""
    stack = stack_of(Lora(rank=8), score="er", sparsity=0.5)
    stack.train_step(batch_for(stack))
    count = {tuple(m.shape): int(m.sum()) for m in mask_of(stack)}
    assert len(count) > 2
    shares = {shape: n / sum(shape) for shape, n in count.items()}
    assert max(shares.values()) - min(shares.values()) < 0.1
    other = stack_of(Lora(rank=8), score="er", sparsity=0.5, seed=1)
    other.train_step(batch_for(other))
    assert any(not torch.equal(a, b) for a, b in zip(mask_of(stack), mask_of(other), strict=True))
    dense = stack_of(Lora(rank=1, ranks={"mlp": 8}), score="er", sparsity=0.05)
    dense.train_step(batch_for(dense))
    assert all(m.all() for m in mask_of(dense) if 1 in m.shape)
    assert not all(m.all() for m in mask_of(dense))


def test_random_follows_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        stack = stack_of(score="random", sparsity=0.5, seed=seed)
        stack.train_step(batch_for(stack))
        found.append(torch.cat([m.flatten() for m in mask_of(stack)]))
    assert torch.equal(found[0], found[1])
    assert 0.4 < (found[0] == found[2]).float().mean() < 0.6
    first, second = [m for m in mask_of(stack) if m.shape == (4, 32)][:2]
    assert not torch.equal(first, second)
    parts = found[0][: 4 * 32].float().mean(), found[0][-4 * 32 :].float().mean()
    assert all(0.3 < part < 0.7 for part in parts)


# ------------------------------------------------------------------------------------------------------------- zeros
@pytest.mark.parametrize("score", ["magnitude", "snip", "grasp", "synflow"])
def test_scores_that_say_nothing_are_an_error(score: str) -> None:
    """LoRA's B is zero: it has no scores, and by it A has none."""
    stack = stack_of(score=score, init=0.0)
    with pytest.raises(
        PeftxError, match=f"sparse-adapter: matrix .* has {score} scores that are all 0"
    ) as caught:
        stack.train_step(batch_for(stack))
    assert "init above 0" in str(caught.value.hint)


class GatedDelta(Delta):
    """y + g W x with g: [1], zero: as long as it is, W has no gradient."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.W, self.g = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.g * (x @ self.W.T)


class Gated(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.site("attention.o", layer=0).attach(GatedDelta(model.hidden_size))


def test_a_matrix_behind_a_gate_of_zero_is_scored_with_the_gate_ajar() -> None:
    """By |w dL/dw| at a small gate, which is zero again when what is left begins to train."""
    stack = stack_of(Gated(), score="snip", sparsity=0.5, init=1e-3)
    (w,), (gate,) = weights(stack), [p for p in stack.ledger.parameters("gated") if p.ndim == 1]
    before, batch = [w.detach().clone()], batch_for(stack)
    gate.data.fill_(1e-3)
    stack.model.eval()
    (g,) = torch.autograd.grad(stack.model(**batch).loss, [w])
    gate.data.zero_()
    stack.train_step(batch)
    wrong = int((mask_of(stack)[0] != expected_of([(before[0] * g).abs()], 0.5)[0]).sum())
    assert wrong <= w.numel() // 50, "another small gate changes next to nothing"
    assert torch.equal(w.detach(), before[0] * mask_of(stack)[0])
    assert not gate.any()
    with pytest.raises(TrainingError, match="has snip scores that are all 0") as caught:
        stack_of(Gated(), score="snip", init=0.0).train_step(batch)
    assert "init above 0" in str(caught.value.hint)


class Idle(Plugin):
    """A matrix that no loss reads, as a critic of later steps."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.keep("critic", nn.Linear(5, 3, bias=False))


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_what_the_loss_does_not_reach_is_left_whole_and_told_of(
    score: str, scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes no part in the share: the others are those of a stack without it."""
    masks = []
    for adapters in ([Idle(), Lora(rank=4)], [Lora(rank=4)]):
        stack = stack_of(*adapters, score=score, scope=scope, sparsity=0.6)
        for w in stack.ledger.parameters("lora"):
            w.data.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(w.numel())) * 0.1)
        old = weights(stack)[0].detach().clone()
        stack.train_step(batch_for(stack))
        masks.append(mask_of(stack))
        if len(adapters) == 2:
            assert masks[0][0].all()
            assert torch.equal(weights(stack)[0], old)
    assert all(torch.equal(a, b) for a, b in zip(masks[0][1:], masks[1], strict=True))
    assert caplog.messages == [
        "sparse-adapter: left whole are 1 of 29 matrices, first (3, 5): the first step's loss does not reach them"
    ]


def test_where_the_loss_reaches_no_matrix_there_is_nothing_to_score() -> None:
    stack = stack_of(Idle(), Propulsion(), score="snip")
    with pytest.raises(TrainingError, match="loss reaches none of the matrices that 'snip' is to score"):
        stack.train_step(batch_for(stack))


def test_matrices_that_train_later_are_refused_for_scores_by_gradients() -> None:
    """When the stack is built, since the plugin itself says that the first step does not reach all of them."""
    for score in ("snip", "grasp"):
        with pytest.raises(
            ConflictError, match=r"'lofit' by gradients .* v has its turn in the second"
        ) as caught:
            stack_of(Lofit(), score=score)
        assert "score: magnitude, er or random" in str(caught.value.hint)
    for score in ("magnitude", "er", "random"):
        stack = stack_of(Lofit(), score=score)
        stack.train_step(batch_for(stack))
        assert not all(m.all() for m in mask_of(stack))
    Stack(tiny("llama"), [Lora(rank=2), SparseAdapter(), Lofit()])  # behind it nothing is scored


def test_a_plugin_stands_in_a_second_stack() -> None:
    """What it counted in the first one, nothing, says nothing of the second; and its mask is chosen anew."""
    plugin = SparseAdapter()
    Stack(tiny("llama"), [plugin])
    for rank in (2, 4):
        stack = Stack(tiny("llama"), [Lora(rank=rank), plugin])
        stack.train_step(batch_for(stack))
        assert sum(int(m.sum()) for m in mask_of(stack)) == kept(sum(plugin.sizes), 0.4)


def test_an_adapter_that_can_learn_nothing_is_told_of() -> None:
    """All of LoRA's B is smaller than A, and goes first."""
    stack = stack_of(score="magnitude", sparsity=0.6)
    with pytest.warns(
        UserWarning, match="sparse-adapter: nothing is left of 15 of 28 matrices; scope: local"
    ):
        stack.plugins["sparse-adapter"].choose(  # type: ignore[attr-defined]
            "sparse-adapter",
            weights(stack),
            [torch.full_like(w, 1 + i % 2) for i, w in enumerate(weights(stack))],
        )


@EACH
def test_what_starts_at_zero_starts_small_where_weights_are_looked_at(score: str) -> None:
    stack = stack_of(Lora(rank=16), score=score, sparsity=0.0, init=0.3)
    A = [w.detach().clone() for w in weights(stack)[::2]]
    stack.train_step(batch_for(stack))
    assert all(torch.equal(w, old) for w, old in zip(weights(stack)[::2], A, strict=True))
    B = torch.cat([w.detach().flatten() for w in weights(stack)[1::2]])
    assert float(B.std()) == pytest.approx(0.0 if score in ("random", "er") else 0.3, rel=0.05)
    if B.any():
        first, second = (w.detach().flatten()[:64] for w in weights(stack)[1:4:2])
        assert not torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------------- training
@EACH
def test_what_is_removed_stays_zero(score: str) -> None:
    """To the bit, through a weight decay and momentum, and nothing else stays where it was."""
    stack = stack_of(score=score, sparsity=0.6)
    spread(stack)
    steps(stack, 1)
    mask = [m.clone() for m in mask_of(stack)]
    start = [w.detach().clone() for w in weights(stack)]
    steps(stack, 3)
    for w, m, old, now in zip(weights(stack), mask, start, mask_of(stack), strict=True):
        assert torch.equal(m, now), "the mask is chosen once"
        assert not w[~m].any()
        assert (w[m] != old[m]).float().mean() > 0.9


class Noise(Plugin):
    """Moves all gradients."""

    claims = {Claim.NEEDS_GRADIENTS}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        step.on_gradients(lambda ps: [p.grad.add_(1.0) for p in ps if p.grad is not None])
        return (yield)


def test_nobody_brings_them_back() -> None:
    plugins = [Lora(rank=4), Noise(), SparseAdapter(score="magnitude", sparsity=0.6)]
    stack = Stack(tiny("llama"), plugins)
    spread(stack)
    steps(stack, 2)
    assert all(not w[~m].any() for w, m in zip(weights(stack), mask_of(stack), strict=True))


def test_gradients_of_what_is_removed_are_zero() -> None:
    stack = stack_of(score="snip", sparsity=0.6)
    for _ in range(2):
        stack.train_step(batch_for(stack))
        for w, m in zip(weights(stack), mask_of(stack), strict=True):
            assert w.grad is not None
            assert not w.grad[~m].any()
            assert w.grad[m].any() or not m.any()


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("score", ["snip", "random"])
def test_sparsity_0_is_the_dense_adapter(score: str, micro: int) -> None:
    dense = Stack(tiny("llama"), [Lora(rank=4)], tokenizer=tiny_tokenizer())
    sparse = stack_of(score=score, sparsity=0.0)
    spread(sparse)
    with torch.no_grad():
        for p, w in zip(dense.ledger.parameters("lora"), weights(sparse), strict=True):
            p.copy_(w)
    for stack in (dense, sparse):
        stack.model.train()
        steps(stack, 4, micro=micro)
    for p, w in zip(dense.ledger.parameters("lora"), weights(sparse), strict=True):
        torch.testing.assert_close(w, p, rtol=0, atol=0)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_first_step_is_of_what_is_left(micro: int) -> None:
    """Its gradients are those of the pruned adapter, not of the dense one that was scored; none counts twice."""
    stack = stack_of(Lora(rank=4), Propulsion(), score="snip", sparsity=0.8)
    spread(stack)
    batches = [batch_for(stack, i) for i in range(micro)]
    for i, batch in enumerate(batches):
        stack.run_train_step(TrainStep(stack, batch, micro=i, accumulation=micro))
    found = {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.requires_grad}
    stack.model.zero_grad()
    torch.stack([stack.model(**batch).loss for batch in batches]).mean().backward()
    masks = {id(w): m for w, m in zip(weights(stack), mask_of(stack), strict=True)}
    for name, p in stack.model.named_parameters():
        if p.requires_grad:
            expected = p.grad * masks.get(id(p), torch.tensor(True))
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- any adapter
@EACH
@pytest.mark.parametrize("adapter", [Houlsby(), Compacter(), PTuningV2(length=3, dropout=0.0), Lora(rank=2)])
def test_any_adapter(adapter: Plugin, score: str) -> None:
    if (type(adapter), score) == (PTuningV2, "synflow"):
        return  # refused, below
    stack = stack_of(adapter, score=score, sparsity=0.5)
    biases = [p for p in stack.ledger.parameters(next(iter(stack.plugins))) if p.ndim < 2]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in stack.ledger.parameters(next(iter(stack.plugins))):
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    before = [p.detach().clone() for p in biases]
    stack.train_step(batch_for(stack))
    assert sum(int(m.sum()) for m in mask_of(stack)) == sum(m.numel() for m in mask_of(stack)) // 2
    assert all(torch.equal(p, old) for p, old in zip(biases, before, strict=True)), "biases are not pruned"
    assert not torch.cat([w[~m] for w, m in zip(weights(stack), mask_of(stack), strict=True)]).any()


def test_two_adapters_share_one_threshold_and_heads_are_left_alone() -> None:
    head = LsLlama(labels=["a", "b"])
    stack = Stack(tiny("llama"), [head, Lora(rank=2), Houlsby(), SparseAdapter()], tokenizer=tiny_tokenizer())
    pruned = {id(w) for w in weights(stack)}
    of = {owner: {id(p) for p in stack.ledger.parameters(owner) if p.ndim > 1} for owner in stack.plugins}
    assert pruned == of["lora"] | of["houlsby"]
    assert of["houlsby"]
    assert of["ls-llama"]
    rows = [{"text": text, "label": label} for text, label in (("tea", "a"), ("rain", "b"))]
    stack.train(rows * 2, steps=2, batch_size=2)
    assert head.head.linear.weight.all()
    assert sum(int(m.sum()) for m in mask_of(stack)) == kept(sum(m.numel() for m in mask_of(stack)), 0.4)


def test_what_stands_behind_it_or_is_no_matrix_is_not_pruned() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2), SparseAdapter(score="random"), Houlsby()])
    stack.train_step(batch_for(stack))
    later = list(stack.ledger.parameters("houlsby"))
    assert later
    assert all(p.grad is not None for p in later)
    assert all((p != 0).all() for p in later if p.ndim > 1)
    with pytest.raises(ConflictError, match="put an adapter such as lora before 'sparse-adapter'"):
        Stack(tiny("llama"), [SparseAdapter(), Lora()])
    with pytest.raises(ConflictError, match="prunes matrices of adapters that stand before it") as caught:
        Stack(tiny("llama"), [Propulsion(), SparseAdapter()])
    assert "before 'sparse-adapter'" in str(caught.value.hint)
    with pytest.raises(ConflictError):
        Stack(tiny("llama"), [Lora(), SparseAdapter(), Mezo()])


def test_what_it_cannot_score_is_refused() -> None:
    stack = stack_of(score="snip")
    stack.freeze("lora")
    with pytest.raises(
        PeftxError, match="sparse-adapter: scores by gradients, and some adapters before it are frozen"
    ):
        stack.train_step(batch_for(stack))
    stack = stack_of(Lora(rank=1, targets="attention.q"), sparsity=0.9999)
    with pytest.raises(PeftxError, match=r"sparse-adapter: sparsity 0\.9999 leaves nothing"):
        stack.train_step(batch_for(stack))
    stack = stack_of(Lora(rank=1), Houlsby())
    stack.remove("houlsby")
    with pytest.raises(PeftxError, match="sparse-adapter: other adapters stand before it"):
        stack.train_step(batch_for(stack))


def test_what_freezes_layers_or_sets_the_loss_in_its_step_has_a_place() -> None:
    """IST behind it, a head of classes before it."""
    stack = Stack(tiny("llama"), [Ist(interval=1), Lora(rank=2), SparseAdapter()])
    with pytest.raises(PeftxError, match="some adapters before it are frozen") as caught:
        stack.train_step(batch_for(stack))
    assert "as ist, goes behind sparse-adapter" in str(caught.value.hint)
    stack = Stack(tiny("llama"), [Lora(rank=2), SparseAdapter(), Ist(interval=1)])
    stack.train_step(batch_for(stack))
    assert sum(int(m.sum()) for m in mask_of(stack)) == kept(sum(m.numel() for m in mask_of(stack)), 0.4)
    with pytest.raises(ConflictError, match="this order works: lora, ls-llama, sparse-adapter"):
        Stack(
            tiny("llama"),
            [Lora(rank=2), SparseAdapter(), LsLlama(labels=["a", "b"])],
            tokenizer=tiny_tokenizer(),
        )


def test_gradients_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    stack = stack_of(score="snip")
    with pytest.raises(ConflictError, match=r"'sparse-adapter' trains in one process, .* each would score"):
        stack.train_step(batch_for(stack))
    stack = stack_of(score="magnitude")
    stack.train_step(batch_for(stack))


# ------------------------------------------------------------------------------------------------- bundles, merging
def test_a_bundle_goes_on_with_its_mask(tmp_path: Path) -> None:
    stack = stack_of(score="snip", sparsity=0.6)
    stack.train(ROWS, steps=3, batch_size=2, learning_rate=1e-2)
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert all(torch.equal(a, b) for a, b in zip(mask_of(again), mask_of(stack), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(stack), strict=True))
    size = (tmp_path / "bundle" / "sparse-adapter.safetensors").stat().st_size
    assert size < sum(m.numel() for m in mask_of(stack)) + 200
    again.train(ROWS, steps=2, batch_size=2, learning_rate=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(mask_of(again), mask_of(stack), strict=True))
    assert all(not w[~m].any() for w, m in zip(weights(again), mask_of(again), strict=True))


def test_what_is_left_of_lora_merges(tmp_path: Path) -> None:
    """Also for good: the bundle has the mask then, and no matrices."""
    stack = stack_of(score="magnitude", sparsity=0.6)
    spread(stack)
    steps(stack, 2)
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        before = stack.model(**inputs).logits
        stack.merge(keep=False)
        merged = stack.model(**inputs).logits
        torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
        again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
        assert torch.equal(again.model(**inputs).logits, merged)
    assert Claim.BESIDE_WEIGHTS in SparseAdapter.claims  # what starts from merged weights may follow


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_resumes_with_the_same_mask(tmp_path: Path, score: str) -> None:
    options: dict[str, Any] = {
        "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2, "gradient_accumulation": 2
    }  # fmt: skip
    whole, rest = stack_of(score=score), stack_of(score=score)
    whole.train(ROWS, output=tmp_path, **options)
    rest.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-2", **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1}, "sparsity"), ({"sparsity": -0.1}, "sparsity"), ({"score": "l1"}, "score"),
        ({"scope": "layer"}, "scope"), ({"init": -1}, "init"),
        ({"score": "er", "scope": "local"}, "er says how much of each matrix is kept"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=f"SparseAdapter: .*{match}"):
        SparseAdapter(**options)


# ------------------------------------------------------------------------------------------------------- the plan
SPEC = """peftx: 1
model: peftx:tiny
data: {{train: peftx:sample/train.jsonl}}
stack: [{stack}]
output: {output}
"""


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("{sparsity: 0.75}", 0.25),
        ("{sparsity: 0.75, score: magnitude}", 0.25),  # nothing is left of LoRA's B
        ("{sparsity: 0.9, scope: local, score: magnitude}", 0.1),
        ("{sparsity: 0.5, score: random}", 0.5),
        ("{sparsity: 0}", 1.0),
    ],
)
def test_the_plan_says_what_is_saved(tmp_path: Path, options: str, share: float) -> None:
    """A mask and what is left of the adapter, and the mask of the plugin's own."""
    stack = f"{{use: lora, with: {{rank: 32}}}}, {{use: sparse-adapter, with: {options}}}"
    text = SPEC.format(stack=stack, output=tmp_path / "out") + "train: {steps: 2, batch_size: 2}\n"
    run = load_run(text)
    told = plan(run.pipeline).totals.bundle_bytes
    numbers = plan(
        load_run(text.replace(f", {{use: sparse-adapter, with: {options}}}", "")).pipeline
    ).totals.bundle_bytes
    masks = 1 if share == 1 else 2
    assert told == pytest.approx(share * numbers + masks * numbers / 32, rel=2e-3)
    run.run()
    held = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert held == pytest.approx(told, rel=0.04)  # the names of 84 tensors are the most of it


def test_the_plan_counts_what_is_pruned_and_no_more(tmp_path: Path) -> None:
    """Without training nothing is; what stands behind it is not; what went into the weights is gone."""

    def told(stack: str, *, trains: bool = True) -> int:
        text = SPEC.format(stack=stack, output=tmp_path) + "train: {steps: 2}\n"
        if not trains:
            text = "\n".join(line for line in text.splitlines() if not line.startswith(("data", "train")))
        return plan(load_run(text).pipeline).totals.bundle_bytes

    sparse, lora = "{use: sparse-adapter, with: {sparsity: 0.75}}", "{use: lora, id: behind}"
    assert told(f"lora, {sparse}", trains=False) == told("lora") * 33 // 32
    assert told(f"lora, {sparse}, {lora}") == told(f"lora, {sparse}") + told(lora)
    mask = told(f"lora, {sparse}") - told("lora") // 4 - told("lora") // 32  # the plugin's own
    assert told(f"lora, {sparse}, {{use: nf4, phase: after-training}}") == told("nf4", trains=False) + mask


def test_a_matrix_of_which_nothing_is_left_is_a_mask_in_the_file(tmp_path: Path) -> None:
    """Before the first step it takes the place that it will have; afterwards it comes back as zeros."""
    stack = Stack(tiny("llama"), [Lora(rank=4), SparseAdapter(score="magnitude", sparsity=0.75)],
                  tokenizer=tiny_tokenizer())  # fmt: skip
    file = stack.save(tmp_path / "first") / "lora.safetensors"
    assert not any(name.endswith("//at") for name in load_file(file))
    with pytest.warns(UserWarning, match="nothing is left"):
        stack.train(ROWS, steps=1, batch_size=2)
    gone = [w for w in weights(stack) if not w.any()]
    assert gone
    stack.save(tmp_path / "then")
    kept_there = load_file(tmp_path / "then" / "lora.safetensors")
    assert sum(not len(x) for name, x in kept_there.items() if name.endswith("//to")) == len(gone)
    loaded = peftx.load(tmp_path / "then", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert all(torch.equal(a, b) for a, b in zip(weights(stack), weights(loaded), strict=True))
