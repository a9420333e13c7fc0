from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.plugin import Claim
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_gmt import Gmt, threshold
from peftx_hft import Hft
from peftx_lora import Lora
from peftx_mezo import Mezo

test_conformance = conformance("gmt")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def stack_of(**options: Any) -> Stack:
    return Stack(tiny("llama"), [Gmt(**options)], tokenizer=tiny_tokenizer())


def batch_of(stack: Stack, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def trained(stack: Stack) -> dict[str, nn.Parameter]:
    return {n: p for n, p in stack.model.named_parameters() if p.requires_grad}


def copies(stack: Stack) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in stack.model.named_parameters()}


def gradients(stack: Stack) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trained(stack).items() if p.grad is not None}


def matrices(stack: Stack) -> list[str]:
    """Names of the layers' matrices: in a batch of text every entry of theirs has a gradient."""
    return [n for n, p in trained(stack).items() if ".layers." in n and p.ndim == 2]


def optimizer_of(stack: Stack, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Any:
    return kind(list(trained(stack).values()), **({"lr": 1e-2} | options))


def test_threshold_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.5], [2.0, 0.0, 4.0]])
    found = [float(threshold(scores, k)) for k in (1e-9, 1 / 6, 0.5, 5 / 6, 1.0)]
    assert found == [4.0, 4.0, 2.0, 0.5, 0.0]
    assert float(threshold(torch.arange(10.0), 0.26)) == 7.0  # round(2.6) of them


def test_everything_trains() -> None:
    stack = stack_of()
    assert stack.trainable_parameters() == sum(p.numel() for p in tiny("llama").parameters())


def test_keep_all_is_full_tuning() -> None:
    """To the bit, under AdamW with a weight decay and clipping, `hold` or not."""
    plain = tiny("llama")
    for p in plain.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    stacks = [stack_of(keep=1.0, hold=hold) for hold in (False, True)]
    others = [optimizer_of(stack, weight_decay=0.1) for stack in stacks]
    for seed in range(3):
        plain(**batch_of(stacks[0], seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for stack, other in zip(stacks, others, strict=True):
            stack.train_step(batch_of(stack, seed), optimizer=other)
    for stack in stacks:
        after = dict(stack.model.named_parameters())
        assert all(torch.equal(after[n], p) for n, p in plain.named_parameters())


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.75])
def test_a_share_of_each_tensor_steps_and_has_the_largest_gradients(keep: float) -> None:
    full, stack = stack_of(keep=1.0), stack_of(keep=keep)
    optimizer = optimizer_of(stack, torch.optim.SGD, lr=1.0)
    for seed in range(2):
        full.model.load_state_dict(stack.model.state_dict())
        full.model.zero_grad()
        full.train_step(batch_of(full, seed))
        G, before = gradients(full), copies(stack)
        stack.train_step(batch_of(stack, seed), optimizer=optimizer)
        after = copies(stack)
        for name in matrices(stack):
            size = G[name].abs()
            M = size >= size.flatten().sort(descending=True).values[round(keep * size.numel()) - 1]
            assert int(M.sum()) == round(keep * size.numel())
            assert torch.equal(after[name], before[name] - M * G[name])
            assert (M * G[name]).square().sum() >= keep * G[name].square().sum()


def test_each_update_chooses_anew() -> None:
    stack = stack_of(keep=0.1)
    chosen = []
    for seed in range(2):
        stack.model.zero_grad()
        stack.train_step(batch_of(stack, seed))
        chosen.append({n: g != 0 for n, g in gradients(stack).items()})
    assert any(not torch.equal(chosen[0][n], chosen[1][n]) for n in matrices(stack))


def test_one_mask_of_what_was_accumulated() -> None:
    """The mask of the sum, and not a sum of masked gradients."""
    full, stack = stack_of(keep=1.0), stack_of(keep=0.2)
    for each in (full, stack):
        for micro in range(2):
            each.train_step(batch_of(each, micro), micro=micro, accumulation=2)
            if micro == 0:
                early = gradients(each)
    assert all((g != 0).float().mean() > 0.9 for n, g in early.items() if n in matrices(stack))
    G, masked = gradients(full), gradients(stack)
    for name in matrices(stack):
        M = masked[name] != 0
        assert int(M.sum()) == round(0.2 * M.numel())
        assert torch.equal(masked[name], M * G[name])
        assert G[name].abs()[M].min() >= G[name].abs()[~M].max()


@pytest.mark.parametrize("hold", [False, True])
def test_hold_leaves_the_others_as_they_are(hold: bool) -> None:
    stack = stack_of(keep=0.2, hold=hold)
    optimizer = optimizer_of(stack, weight_decay=0.5)
    moved_outside = 0
    for seed in range(3):
        before = copies(stack)
        stack.train_step(batch_of(stack, seed))
        M = {n: g != 0 for n, g in gradients(stack).items()}
        optimizer.step()
        optimizer.zero_grad()
        after = copies(stack)
        moved_outside += sum(int(((after[n] != before[n]) & ~M[n]).sum()) for n in M)
        assert all(((after[n] != before[n]) & M[n]).any() for n in matrices(stack))
    assert (moved_outside == 0) == hold
    rows = stack.model.model.embed_tokens.weight
    unseen = torch.ones(len(rows), dtype=torch.bool)
    for seed in range(3):
        unseen[example_inputs(stack.model, seed=seed)["input_ids"].flatten()] = False
    assert torch.equal(rows[unseen], tiny("llama").model.embed_tokens.weight[unseen]) == hold


def test_one_threshold_for_the_model() -> None:
    full, stack = stack_of(keep=1.0), stack_of(keep=0.1, scope="model")
    for each in (full, stack):
        each.train_step(batch_of(each))
    G, masked = gradients(full), gradients(stack)
    sizes = torch.cat([g.abs().flatten() for g in G.values()])
    M = torch.cat([g.flatten() != 0 for g in masked.values()])
    assert int(M.sum()) == round(0.1 * len(M))
    assert sizes[M].min() >= sizes[~M].max()
    shares = [float((masked[n] != 0).float().mean()) for n in matrices(stack)]
    assert max(shares) > 2 * min(shares)


def test_random_masks() -> None:
    """The paper's control: as many, without regard to their gradients; each step others, by the stack's seed."""

    def masks(seed: int, steps: int = 1) -> dict[str, Tensor]:
        stack = Stack(tiny("llama"), [Gmt(keep=0.2, choose="random")], seed=seed)
        for index in range(steps):
            stack.trained_steps = index
            stack.model.zero_grad()
            stack.train_step(batch_of(stack))
        return {n: g != 0 for n, g in gradients(stack).items() if n in matrices(stack)}

    def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return any(not torch.equal(one[n], other[n]) for n in one)

    first = masks(0)
    assert all(abs(int(M.sum()) - round(0.2 * M.numel())) <= 2 for M in first.values())
    assert not differ(first, masks(0))
    assert differ(first, masks(1))
    assert differ(first, masks(0, steps=2))
    names = [n for n, M in first.items() if M.shape == (32, 32)]
    assert not torch.equal(first[names[0]], first[names[1]])


def test_targets_alone_train_and_are_masked() -> None:
    stack = stack_of(targets="attention.q", keep=0.25)
    assert all("q_proj" in name for name in trained(stack))
    both = Stack(tiny("llama"), [Gmt(targets="attention.q", keep=0.25), Lora(rank=2, targets="mlp")])
    both.train_step(batch_of(both))
    for name, g in gradients(both).items():
        if "lora" not in name:
            assert int((g != 0).sum()) == g.numel() // 4
        elif name.endswith("B"):
            assert (g != 0).all()


@pytest.mark.parametrize("first", [True, False])
def test_it_masks_what_others_train(first: bool) -> None:
    """Inside of HFT's half; the other half keeps its bits."""
    plugins = [Gmt(targets=None, keep=0.25, hold=True), Hft()]
    stack = Stack(tiny("llama"), plugins if first else plugins[::-1])
    alone = Stack(tiny("llama"), [Hft()])
    assert trained(stack).keys() == trained(alone).keys()
    optimizer, before = optimizer_of(stack, weight_decay=0.1), copies(stack)
    stack.train_step(batch_of(stack), optimizer=optimizer)
    after = copies(stack)
    for name, p in after.items():
        moved = int((p != before[name]).sum())
        assert moved <= max(1, round(0.25 * p.numel())) if name in trained(stack) else moved == 0
    assert Claim.TRAINS_BASE not in stack.plugins["gmt"].claims
    assert Claim.TRAINS_BASE in Gmt().claims


def test_what_is_not_finite_stays_so() -> None:
    stack = stack_of(keep=0.2)
    stack.train_step(batch_of(stack), micro=0, accumulation=2)
    name = matrices(stack)[0]
    G = trained(stack)[name].grad
    assert G is not None
    G[0, 0] = float("nan")
    stack.train_step(batch_of(stack), micro=1, accumulation=2)
    assert gradients(stack)[name].isnan().any()


def test_a_frozen_layer_needs_no_mask() -> None:
    stack = stack_of(keep=0.2)
    stack.plugins["gmt"].places["model.norm.weight"].theta.requires_grad_(False)
    stack.train_step(batch_of(stack))
    assert "model.norm.weight" not in gradients(stack)


def test_refusals() -> None:
    from peftx.toolkits.compression import QuantLinear

    with pytest.raises(ConflictError, match="both train the base's"):
        Stack(tiny("llama"), [Gmt(), Hft()])
    with pytest.raises(ConflictError, match="needs gradients"):
        Stack(tiny("llama"), [Gmt(), Mezo()])
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = QuantLinear.from_linear(mlp.down_proj, bits=8)
    with pytest.raises(PeftxError, match=r"gmt: .*down_proj is quantized"):
        Stack(model, [Gmt()])
    alone = Stack(tiny("llama"), [Gmt(targets=None)])
    with pytest.raises(PeftxError, match="nothing trains"):
        alone.train_step(batch_of(alone))


@pytest.mark.parametrize(
    ("scope", "of"), [("tensor", "the largest tensor"), ("model", "all tensors together")]
)
def test_a_share_of_less_than_one_entry_is_refused(scope: str, of: str) -> None:
    with pytest.raises(PeftxError, match=rf"gmt: keep 1e-12 leaves .* of the \d+ entries of {of}") as e:
        stack_of(keep=1e-12, scope=scope)
    stack_of(keep=float(str(e.value.hint).rpartition(" ")[2]), scope=scope)
    with pytest.raises(PeftxError, match=rf"gmt: keep 0.001 leaves .* of the \d+ entries of {of}"):
        Stack(
            tiny("llama"), [Lora(rank=1, targets="attention.q"), Gmt(targets=None, keep=0.001, scope=scope)]
        )


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 1.1}, {"scope": "layer"}, {"choose": "first"}, {"targets": ""}]
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"Gmt: {next(iter(options))}") as caught:
        Gmt(**options)
    assert "keep, scope, choose, hold, targets" in str(caught.value.hint)


@pytest.mark.parametrize(("options", "bound"), [("keep: 0.02", True), ("keep: 1.0", False)])
def test_the_plan_says_how_much_is_saved_at_most(tmp_path: Path, options: str, bound: bool) -> None:
    """All of it; numbers that no update chooses are not in the bundle."""
    text = f"""peftx: 1
model: peftx:tiny
data: {{train: peftx:sample/train.jsonl}}
stack: [{{use: gmt, with: {{{options}, targets: mlp}}}}]
train: {{steps: 1, batch_size: 1, max_length: 200}}
output: {tmp_path / "out"}
"""
    run = load_run(text)
    found = plan(run.pipeline)
    assert found.stages[-1].detail.startswith("bytes of 'gmt': at most") == bound
    run.run()
    held = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert held == pytest.approx((0.04 if bound else 1) * found.totals.bundle_bytes, rel=0.02)
