"""DSEE: the equations by hand, where Omega lies, how much is pruned of what, and that only A, B and S move."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Plugin, Stack
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.kernel.anatomy.site import Site
from peftx.kernel.parts import DeltaPart, ReplacedPart
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_dsee import Dsee, DseeDelta, PrunedDelta, choose, residual
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prefix_tuning import PrefixTuning
from peftx_prompt_tuning import PromptTuning
from peftx_sparselora import Sparselora

test_conformance = conformance("dsee")
test_conformance_of_structured_masks = conformance(
    "dsee",
    options={
        **Dsee.example,
        "masks": "structured",
        "heads": 0.5,
        "prune": 0,
    },  # it is compressed after a step
    models=["llama", "bert", "qwen2"],
    expected_failures={"stands_on_integers": "rows and columns of integers are not cut"},
)

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def stack_of(arch: str = "llama", *others: Plugin, **options: Any) -> Stack:
    settings = {"rank": 2, "entries": 6, "prune": 1} | options
    return Stack(tiny(arch), [Dsee(**settings), *others], tokenizer=tiny_tokenizer())


def parts(stack: Stack) -> dict[str, PrunedDelta]:
    return {part.key: part.module for part in stack.ledger.of("dsee", DeltaPart)}  # type: ignore[misc]


def updates(stack: Stack) -> list[DseeDelta]:
    return [delta for delta in parts(stack).values() if isinstance(delta, DseeDelta)]


def train(stack: Stack, steps: int = 2, **options: Any) -> Stack:
    stack.train(ROWS, steps=steps, batch_size=2, learning_rate=1e-2, **options)
    stack.model.eval()
    return stack


@torch.no_grad()
def logits(stack: Stack) -> Tensor:
    return output_of(stack.model, example_inputs(stack.model))


def layer(W: Tensor, cls: Any = PrunedDelta, **options: Any) -> tuple[PrunedDelta, nn.Linear]:
    module = nn.Linear(W.shape[1], W.shape[0])
    with torch.no_grad():
        module.weight.copy_(W)
    return cls(Site("mlp.up", "up", module, "linear"), pruned=True, **options), module


# ----------------------------------------------------------------------------------------------------- the equation
def test_equation_by_hand() -> None:
    """W' = M * W + s (B A + S) with s = 2, M without W_01 and S with 5 at W_10."""
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    delta, module = layer(W, DseeDelta, rank=1, scale=2.0, at=torch.tensor([2]))
    assert isinstance(delta, DseeDelta)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, -1.0]]))
        delta.B.copy_(torch.tensor([[1.0], [3.0]]))
        delta.S.values.fill_(5.0)
        delta.left.copy_(torch.tensor([[True, False], [True, True]]))
    dense = torch.tensor([[3.0, 0.0], [19.0, -2.0]])
    assert torch.equal(delta.fold(W, None)[0], dense)
    delta.acts = True
    masked = dense - torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert torch.equal(delta.fold(W, None)[0], masked)
    x = torch.randn(3, 4, 2, requires_grad=True)
    found = torch.autograd.grad(delta(x, module(x)).square().sum(), [x, delta.A, delta.B, delta.S.values])
    A, B, v = (p.detach().requires_grad_() for p in (delta.A, delta.B, delta.S.values))
    S = torch.stack([v[0] * 0, v[0] * 0, v[0], v[0] * 0]).view(2, 2)
    y = x @ (W * delta.left + 2 * (B @ A + S)).t() + module.bias
    assert torch.allclose(delta(x, module(x)), y, atol=1e-5)
    for one, two in zip(found, torch.autograd.grad(y.square().sum(), [x, A, B, v]), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


def test_no_masked_matrix_is_kept_for_the_backward_pass() -> None:
    delta, module = layer(torch.randn(64, 32))
    delta.acts = True
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        delta(torch.randn(2, 32, requires_grad=True), torch.zeros(2, 64))
    assert all(t.numel() < module.weight.numel() for t in kept)


def test_what_trains_and_how_it_starts() -> None:
    stack = stack_of(rank=4, entries=6, alpha=8.0)
    q_and_v = [site for site in stack.anatomy.sites if site.role in ("attention.q", "attention.v")]
    assert len(q_and_v) == len(updates(stack)) == 4
    assert stack.trainable_parameters() == sum(4 * (s.in_features + s.out_features) + 6 for s in q_and_v)
    assert not any(delta.B.any() or delta.S.values.any() for delta in updates(stack))
    A = torch.cat([delta.A.detach().flatten() for delta in updates(stack)])
    assert float(A.std()) == pytest.approx(0.02, rel=0.15)
    assert {delta.scale for delta in updates(stack)} == {2.0}
    assert len(parts(stack)) == sum(site.in_all for site in stack.anatomy.sites)
    assert Dsee().config.alpha / Dsee().config.rank == 2.0


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_without_entries_and_pruning_it_is_lora(arch: str) -> None:
    found = []
    for plugin in (Lora(rank=4, targets="attention.q,v"), Dsee(rank=4, alpha=8, entries=0, sparsity=0)):
        stack = Stack(tiny(arch), [("x", plugin)], tokenizer=tiny_tokenizer())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in sorted(stack.ledger.tensors("x").items()):
                if name.endswith("A"):
                    p.copy_(torch.randn(p.shape, generator=generator))
        found.append(logits(train(stack, 3)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], logits(Stack(tiny(arch), [])), atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- Omega
def test_omega_is_where_a_low_rank_matrix_fits_worst() -> None:
    """Ten numbers on top of a matrix of rank 3 are found to the last; the largest of the sum are others."""
    torch.manual_seed(0)
    L = torch.randn(200, 3) @ torch.randn(3, 150)
    spikes = torch.randperm(30_000)[:10]
    W = L.flatten().index_add(0, spikes, 5 * torch.randn(10).sign()).view(200, 150)
    assert set(residual(W, 0.02).flatten().topk(10).indices.tolist()) == set(spikes.tolist())
    assert set(W.abs().flatten().topk(10).indices.tolist()) != set(spikes.tolist())


@pytest.mark.parametrize(("shape", "background"), [((12, 9), 0.65), ((50, 60), 0.9), ((5, 4), 0.01)])
def test_the_decomposition_step_by_step(shape: tuple[int, int], background: float) -> None:
    """The module's equations with numpy's QR in float64; signs of Q and R cancel in U V, and rows of V may have any."""
    torch.manual_seed(1)
    W = torch.randn(shape) * 0.02
    R = max(1, int(background * min(shape)))
    k = -(-R // 20)
    torch.manual_seed(2)
    V = torch.randn(1, shape[1]).double().numpy()
    w = W.double().numpy()
    while True:
        S = np.zeros(shape)
        for _ in range(2):
            U = np.linalg.qr((w - S) @ V.T)[0]
            V = U.T @ (w - S)
            E = w - U @ V
            S = np.where(np.abs(E) >= 0.01, E, 0)
        if len(V) == R:
            break
        V = np.concatenate([V, np.linalg.qr(E - S)[1][: min(k, R - len(V))]])
    torch.manual_seed(2)
    found = residual(W, background)
    assert np.abs(found.numpy() - np.abs(E)).max() < 1e-3 * np.abs(w).max()


@pytest.mark.parametrize("arch", ["llama", "mixtral", "phi3"])
def test_omega_of_each_matrix_stays_where_it_is(arch: str) -> None:
    """N places in each matrix, in each expert too; S is not zero there after training, and zero elsewhere."""
    stack = stack_of(arch, targets="all", entries=5, prune=2)
    at = {key: delta.S.at.clone() for key, delta in parts(stack).items() if isinstance(delta, DseeDelta)}
    assert len(at) == len(parts(stack))
    assert len({tuple(places.tolist()) for places in at.values()}) > 1
    train(stack, 3)
    for key, delta in parts(stack).items():
        assert isinstance(delta, DseeDelta)
        assert torch.equal(delta.S.at, at[key])
        S = delta.S.matrix(torch.float32)
        assert len(S.flatten()) == delta.left.numel()
        assert (at[key].view(*S.shape[:-2], 5).sort(-1).values.diff() > 0).all()
        assert ((S != 0).sum((-2, -1)) <= 5).all()
        assert S.any()


def test_omega_is_of_the_weights() -> None:
    stack = stack_of(entries=6, background=0.3)
    for delta in updates(stack):
        r = residual(delta.site.weight.detach(), 0.3)
        assert r.flatten()[delta.S.at.long()].mean() > 2 * r.mean()


# ----------------------------------------------------------------------------------------------------------- pruning
def fake(values: list[float], update: list[float] | None = None) -> PrunedDelta:
    W = torch.tensor([values])
    if update is None:
        return layer(W)[0]
    delta = layer(W, DseeDelta, rank=1, scale=1.0, at=torch.arange(len(values)))[0]
    with torch.no_grad():
        delta.S.values.copy_(torch.tensor(update))  # type: ignore[union-attr]
    return delta


def test_the_smallest_sums_of_all_matrices_go() -> None:
    """|W + S| of the second: 3, 0.5, 0, 8; of all eight numbers the four smallest are gone, in the frozen part."""
    plain, updated = fake([1.0, -2.0, 0.1, 9.0]), fake([1.0, 2.0, -4.0, 8.0], [2.0, -1.5, 4.0, 0.0])
    choose([plain, updated], 0.5)
    assert plain.left.tolist() == [[False, True, False, True]]
    assert updated.left.tolist() == [[True, False, False, True]]
    updated.acts = True
    assert updated.fold(torch.tensor([[1.0, 2.0, -4.0, 8.0]]), None)[0].tolist() == [[3.0, -1.5, 4.0, 8.0]]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("p", [0.5, 0.27])
def test_the_share_that_is_pruned(arch: str, p: float) -> None:
    """p of all together, rounded, and not of each; the base's own weights stay as they are."""
    stack = train(stack_of(arch, sparsity=p))
    masks = [delta.left for delta in parts(stack).values()]
    gone, total = sum(int((~m).sum()) for m in masks), sum(m.numel() for m in masks)
    assert gone == round(p * total)
    assert len({float((~m).float().mean()) for m in masks}) > 1
    base = {site.key: site.weight for site in Stack(tiny(arch), []).anatomy.sites if site.in_all}
    assert base.keys() == {site.key for site in stack.anatomy.sites if site.in_all} == parts(stack).keys()
    for key, delta in parts(stack).items():
        assert torch.equal(delta.site.weight, base[key])
    before = logits(stack)
    stack.merge()
    torch.testing.assert_close(logits(stack), before, rtol=1e-4, atol=1e-4)
    for site in stack.anatomy.sites:
        delta = parts(stack).get(site.key)
        if delta is not None and not isinstance(delta, DseeDelta):
            assert torch.equal(site.weight == 0, ~delta.left | (base[site.key] == 0))


def test_it_is_pruned_once_and_trains_on() -> None:
    """Up to the phase's end nothing is masked; then the mask stays, also in a second run."""
    stack = stack_of(prune=2)
    batch = example_inputs(stack.model) | {"labels": example_inputs(stack.model)["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    acting = []
    for index in range(4):
        stack.run_train_step(peftx.TrainStep(stack, batch, index=index, total=4))
        acting.append({delta.acts for delta in parts(stack).values()})
        optimizer.step()
    assert acting == [{False}, {False}, {True}, {True}]
    masks = [delta.left.clone() for delta in parts(stack).values()]
    values = [delta.S.values.detach().clone() for delta in updates(stack)]
    train(stack)
    assert all(torch.equal(d.left, m) for d, m in zip(parts(stack).values(), masks, strict=True))
    assert not any(torch.equal(d.S.values, v) for d, v in zip(updates(stack), values, strict=True))
    assert [phase.name for phase in stack.plugins["dsee"].phases()] == ["recover"]
    assert [phase.name for phase in Dsee().phases()] == ["tune", "recover"]
    assert Dsee(sparsity=0).phases() == ()


def test_pruned_layers_need_not_be_updated_ones() -> None:
    stack = train(stack_of(targets="attention.q", pruned="mlp.up", sparsity=0.25))
    found = {key.rpartition(".")[2]: delta for key, delta in parts(stack).items()}
    assert found["q_proj"].left is None
    assert not found["q_proj"].acts
    up = [delta.left for delta in parts(stack).values() if delta.left is not None]
    assert sum(int((~m).sum()) for m in up) == sum(m.numel() for m in up) // 4
    assert len(found) == 2
    whole = train(stack_of(sparsity=0))
    assert len(parts(whole)) == len(updates(whole)) == 4


def test_bundles_and_checkpoints_bring_the_mask_back(tmp_path: Path) -> None:
    stack = train(stack_of())
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), logits(stack))
    assert all(torch.equal(a.S.at, b.S.at) for a, b in zip(updates(again), updates(stack), strict=True))
    whole = train(stack_of(), 4, output=tmp_path, checkpoint_every=2)
    rest = train(stack_of(), 4, output=tmp_path, checkpoint_every=2, resume=tmp_path / "checkpoint-2")
    assert torch.equal(logits(whole), logits(rest))


def test_a_copy_reads_its_own_weights() -> None:
    stack = train(stack_of())
    before, copied = logits(stack), deepcopy(stack.model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(logits(stack), before)


def test_half_precision_models() -> None:
    stack = Stack(tiny("llama").bfloat16(), [Dsee(rank=2, entries=6, prune=1)], tokenizer=tiny_tokenizer())
    train(stack)
    assert {p.dtype for p in stack.ledger.parameters("dsee")} == {torch.float32}
    assert logits(stack).isfinite().all()


# ------------------------------------------------------------------------------------------------- heads and neurons
def structured(*others: Plugin, arch: str = "llama", model: Any = None, **options: Any) -> Stack:
    settings = {"rank": 2, "entries": 6, "prune": 1, "masks": "structured", "heads": 0.5, "neurons": 0.25}
    plugins = [Dsee(**(settings | options)), *others]
    return Stack(model or tiny(arch), plugins, tokenizer=tiny_tokenizer())


def pruned(*others: Plugin, **options: Any) -> Stack:
    """Trained beyond the pruning, two steps on one batch."""
    stack = structured(*others, **options)
    batch = example_inputs(stack.model) | {"labels": example_inputs(stack.model)["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        stack.train_step(batch, optimizer=optimizer)
    stack.model.eval()
    return stack


def left(stack: Stack) -> list[list[bool]]:
    plugin = stack.plugins["dsee"]
    return [plugin.left(b).tolist() for b in plugin.blocks]  # type: ignore[attr-defined]


def test_the_smallest_sums_of_rows_go() -> None:
    """By hand, of the weights as they are when the phase begins: queries with values, gates with what they gate."""
    stack = structured()
    with torch.no_grad():
        for delta in updates(stack):
            delta.B.normal_()
    expected = []
    for layer in stack.model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q, v = (
            m.peftx["dsee"].fold(m.weight, None)[0].detach() for m in (attention.q_proj, attention.v_proj)
        )
        heads = q.abs().view(2, -1).sum(1) + v.abs().view(2, -1).sum(1)  # two keys, each of two queries
        expected.append((heads > heads.min()).tolist())
        with torch.no_grad():  # keys do not count
            attention.k_proj.weight.unflatten(0, (2, -1))[heads.argmin()] *= 100
        neurons = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1)
        expected.append((neurons > neurons.sort().values[11]).tolist())  # 12 of 48 go
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-9)
    assert left(stack) == expected
    assert [sum(one) for one in left(stack)] == [1, 36] * 2


@pytest.mark.parametrize("arch", ["llama", "bert", "qwen2", "gemma2"])
def test_the_masked_model_is_one_without_these_columns(arch: str) -> None:
    """What others write is not seen of a head or a neuron that is gone, whatever its update gives."""
    stack = pruned(arch=arch)
    plain = pruned(arch=arch, heads=0, neurons=0)
    for mine, theirs in zip(stack.ledger.parameters("dsee"), plain.ledger.parameters("dsee"), strict=True):
        theirs.data.copy_(mine.data)
    for b, kept in zip(stack.plugins["dsee"].blocks, left(stack), strict=True):  # type: ignore[attr-defined]
        columns = torch.tensor(kept).repeat_interleave(b.width)
        plain.model.get_submodule(b.out.path).weight.data *= columns
    torch.testing.assert_close(logits(stack), logits(plain), rtol=1e-4, atol=1e-5)
    assert all(any(one) and not all(one) for one in left(stack))


@pytest.mark.parametrize("arch", ["llama", "bert", "qwen2", "gemma2"])
def test_the_narrow_model_computes_what_the_masked_one_did(arch: str, tmp_path: Path) -> None:
    stack = pruned(arch=arch, targets="attention.q,v mlp.up")
    masked, kept, blocks = logits(stack), left(stack), stack.plugins["dsee"].blocks  # type: ignore[attr-defined]
    gone = sum(b.cost * one.count(False) for b, one in zip(blocks, kept, strict=True))
    before = stack.evaluate(["a text"], metrics=["dsee"])
    stack.compress()
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-4)
    state = stack.plugins["dsee"].state
    assert list(state["kept"].values()) == [[sum(one), len(one)] for one in kept]
    assert stack.trainable_parameters() == 0
    after = stack.evaluate(["a text"], metrics=["dsee"])
    assert after["left"].value == before["left"].value < 0.8
    assert before["parameters"].value - after["parameters"].value == gone
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def operations(model: Any, inputs: dict[str, Tensor]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(**inputs)
    return counter.get_total_flops()


def test_bytes_and_products_become_fewer() -> None:
    stack, base = pruned(), tiny("llama")
    stack.compress()
    narrow, inputs = stack.ledger.of("dsee", ReplacedPart), example_inputs(base)
    assert operations(stack.model, inputs) < 0.8 * operations(base, inputs)
    whole = sum(p.nbytes for part in narrow for p in base.get_submodule(part.key).parameters())
    assert sum(t.nbytes for t in stack.ledger.tensors("dsee").values()) < 0.7 * whole


def test_what_is_left_of_the_bundled_model() -> None:
    """The figures of the README, with the defaults of structured masks."""
    base, ids = Stack("peftx:tiny", []), {"input_ids": torch.arange(3, 131)[None]}
    stack = Stack("peftx:tiny", [Dsee(rank=8, entries=0, masks="structured", prune=0)])
    stack.train([{"text": "A row."}], steps=1, learning_rate=1e-9)
    stack.compress(keep=False)
    assert {tuple(pair) for pair in stack.plugins["dsee"].state["kept"].values()} == {(3, 4), (413, 688)}
    assert (base.base_parameters(), stack.base_parameters()) == (5_401_856, 3_839_744)
    assert operations(stack.model, ids) / operations(base.model, ids) == pytest.approx(0.71, abs=5e-3)


def test_untrained_all_of_it_stays_and_chosen_too_early_is_refused() -> None:
    stack = structured(prune=2)
    before = logits(stack)
    untouched = structured()
    untouched.compress()
    torch.testing.assert_close(logits(untouched), before, rtol=1e-4, atol=1e-5)
    assert untouched.plugins["dsee"].state["left"] == 1
    batch = example_inputs(stack.model) | {"labels": example_inputs(stack.model)["input_ids"]}
    stack.run_train_step(peftx.TrainStep(stack, batch, index=0, total=4))
    stack.model.eval()
    assert stack.plugins["dsee"].state["pruned"] is False
    with pytest.raises(PeftxError, match="no heads and neurons were chosen yet"):
        stack.compress()
    stack.merge()
    with pytest.raises(PeftxError, match="in the weights already"):
        stack.compress()


def test_packed_and_adapted_after_it(tmp_path: Path) -> None:
    plugins = [Dsee(rank=2, entries=6, prune=1, masks="structured", heads=0.5), Lora(rank=2), NF4Storage()]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["dsee"])
    train(stack)
    stack.compress(ids=["dsee"])
    stack.inject(["lora"])
    train(stack)
    stack.compress(ids=["nf4"])
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_a_classifiers_head_stays(tmp_path: Path) -> None:
    stack = structured(model=tiny("bert", head="classification"))
    rows = [{"text": f"{n} is even", "label": str(n % 2)} for n in range(8)]
    stack.train(rows, steps=2, batch_size=2, learning_rate=1e-2)
    masked, head = logits(stack), stack.model.classifier.weight.detach().clone()
    stack.compress()
    assert torch.equal(stack.model.classifier.weight, head)
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-4)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_unstructured_masks_make_nothing_smaller() -> None:
    stack = train(stack_of())
    before, held = logits(stack), len(stack.ledger.parts)
    stack.compress()
    assert torch.equal(logits(stack), before)
    assert len(stack.ledger.parts) == held
    gone = stack.evaluate(ROWS, metrics=["dsee"])["left"].value
    assert gone == pytest.approx(0.5, abs=1e-3)


def test_the_plan_says_what_is_saved(tmp_path: Path) -> None:
    """Of unstructured masks too, whose `compress` takes nothing away."""
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: peftx:sample/train.jsonl}\n"
    text += "train: {steps: 2, batch_size: 1, max_length: 200}\n"
    run = load_run(text + f"stack: [{{use: dsee, with: {{prune: 1}}}}]\noutput: {tmp_path / 'out'}\n")
    planned = plan(run.pipeline).totals.bundle_bytes
    run.run()
    saved = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert saved == pytest.approx(planned, rel=0.02)


def test_structured_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PeftxError, match=r"dsee: heads 0.25 of the 2 of a layer is less than one") as e:
        structured(heads=0.25)
    assert e.value.hint == "0.5 at least, or 0"
    with pytest.raises(ArchitectureError, match=r"o_proj leads into no heads or neurons") as e:
        structured(targets="attention")
    assert e.value.hint == "leave it out of targets: '!attention.o'"
    with pytest.raises(ArchitectureError, match="layer 0 of gpt2 has no heads between plain linear"):
        structured(arch="gpt2")
    for plugins in ([Lora(rank=2)], [PrefixTuning()], [NF4Storage()]):
        dsee = Dsee(rank=2, entries=6, masks="structured", heads=0.5)
        with pytest.raises(ConflictError, match="dsee"):
            Stack(tiny("llama"), [*plugins, dsee], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match=r"'lora' stands on .*, which 'dsee' is to prune"):
        structured(Lora(rank=2))


# ---------------------------------------------------------------------------------------------------------- refusals
def test_what_changes_a_pruned_layer_before_it_is_refused() -> None:
    with pytest.raises(
        ConflictError, match=r"dsee prunes the weights of .*q_proj as they are, and lora ch"
    ) as e:
        Stack(tiny("llama"), [Lora(rank=2), Dsee(rank=2)])
    assert "put lora behind dsee" in str(e.value)
    with pytest.raises(ConflictError, match=r"dsee prunes the weights of .* and sparselora changes"):
        stack_of("llama", Sparselora(**Sparselora.example))
    Stack(tiny("llama"), [Lora(rank=2, targets="mlp"), Dsee(rank=2, pruned="attention")])
    Stack(tiny("llama"), [Lora(rank=2), Dsee(rank=2, sparsity=0)])
    for plugins in (
        [PromptTuning(length=2), Dsee(rank=2, entries=4, prune=1)],
        [Dsee(rank=2, entries=4, prune=1), Lora(rank=2)],
    ):
        before = train(Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer()))
        found = logits(before)
        before.merge(*(id for id in before.plugins if id != "prompt-tuning"))
        torch.testing.assert_close(logits(before), found, rtol=1e-4, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PeftxError, match="dsee: rank 17 exceeds the 16x32 matrix"):
        stack_of(rank=17)
    with pytest.raises(PeftxError, match=r"dsee: 513 entries of .*v_proj, which has 512") as e:
        stack_of(entries=513)
    assert "at most 512" in str(e.value)
    stack_of(entries=512)
    with pytest.raises(
        PeftxError, match=r"dsee: sparsity 0.9999999 leaves .* of 14 matrices, and 14 is the least"
    ) as e:
        stack_of(sparsity=0.9999999)
    bound = float(str(e.value.hint).rpartition(" ")[2])
    with pytest.warns(
        UserWarning, match=r"dsee: nothing is left of \d+ of 14 matrices, first .*; a lower sparsity"
    ):
        stack = train(stack_of(sparsity=bound))
    assert sum(int(delta.left.sum()) for delta in parts(stack).values()) >= 14
    with torch.device("meta"):
        Stack(tiny("llama").to("meta"), [Dsee(rank=2)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"entries": -1}, "entries"),
        ({"alpha": 0}, "alpha"),
        ({"background": 1}, "background"),
        ({"background": 0}, "background"),
        ({"sparsity": 1}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"prune": -1}, "prune"),
        ({"prune": 2.5}, "must be whole"),
        ({"heads": 0.5}, "heads and neurons go with structured masks"),
        ({"masks": "structured", "heads": 1}, "heads"),
        ({"masks": "structured", "sparsity": 0.3}, "sparsity goes with unstructured masks"),
        ({"masks": "structured", "pruned": "mlp"}, "pruned goes with unstructured masks"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=rf"Dsee: .*{match}") as caught:
        Dsee(**options)
    assert "rank, entries, alpha, background, masks, sparsity, heads, neurons, prune" in str(
        caught.value.hint
    )
