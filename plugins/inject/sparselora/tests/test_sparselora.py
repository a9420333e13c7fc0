from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftx
from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.kernel.call import Call
from peftx.kernel.modes import eval_mode
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx.testing.reference import ReferencePrompt
from peftx.toolkits.compression import QuantLinear
from peftx_cpt import Cpt
from peftx_ist import Ist
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant
from peftx_sparselora import AttentionChannels, Estimate, MlpChannels, SlicedProduct, Sparselora, Tokens, kept

ALL: dict[str, Any] = {
    "mlp": 0.5,
    "attention": 0.5,
    "mlp_layers": [0, 1],
    "attention_layers": [0, 1],
    "start": 0,
}
"""Both layers of the tiny models, half of the channels."""

test_conformance = conformance("sparselora")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def stack_of(*plugins: Plugin, **options: Any) -> Stack:
    stack = Stack(tiny("llama"), [Lora(rank=2, **options), *plugins], tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return stack


def batch_for(stack: Stack, *, answers: int = 3, length: int = 12, padding: Any = None) -> dict[str, Tensor]:
    """Rows whose last `answers` tokens have labels."""
    inputs = example_inputs(stack.model, length=length, padding=padding)
    labels = inputs["input_ids"].clone()
    labels[:, : length - answers] = -100
    return inputs | {"labels": labels}


def gradients(stack: Stack, batch: dict[str, Tensor], **step: Any) -> tuple[float, list[Tensor]]:
    stack.model.train()
    stack.model.zero_grad()
    loss = float(stack.run_train_step(TrainStep(stack, batch, **step)))
    return loss, [p.grad.clone() for p in stack.ledger.parameters("lora") if p.grad is not None]


def equal(one: tuple[float, list[Tensor]], two: tuple[float, list[Tensor]]) -> bool:
    return one[0] == two[0] and all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def plugin_of(stack: Stack) -> Sparselora:
    plugin = stack.plugins["sparselora"]
    assert isinstance(plugin, Sparselora)
    return plugin


def all_chosen(stack: Stack) -> list[Tensor]:
    """I of each sliced layer in the last step."""
    deltas = [part.module for part in stack.ledger.of("sparselora", DeltaPart)]
    return [delta.block.chosen[delta.role] for delta in deltas]


def estimate(weight: Tensor, rank: int) -> Estimate:
    found = Estimate(weight.shape[1], weight.shape[0], rank=rank)
    found.fit(weight)
    return found


# -- the estimators ----------------------------------------------------------------------------------------------------


def test_estimate_is_the_best_of_its_rank() -> None:
    weight, x = torch.randn(20, 12), torch.randn(5, 12)
    u, s, vh = torch.linalg.svd(weight)
    cut = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    assert torch.allclose(estimate(weight, 4)(x), x @ cut.t(), atol=1e-4)
    assert torch.allclose(estimate(weight, 12)(x), x @ weight.t(), atol=1e-4)


def test_full_rank_chooses_the_oracles_mlp_channels() -> None:
    gate, up, x = torch.randn(24, 8), torch.randn(24, 8), torch.randn(10, 8)
    channels = MlpChannels(estimate(gate, 8), estimate(up, 8), keep=6, activation=F.silu)(x)
    oracle = (F.silu(x @ gate.t()) * (x @ up.t())).norm(dim=0).topk(6).indices.sort().values
    assert all(torch.equal(channels[role], oracle) for role in ("gate", "up", "down"))


def test_full_rank_chooses_the_oracles_attention_channels() -> None:
    q, k, v, x = torch.randn(16, 8), torch.randn(8, 8), torch.randn(8, 8), torch.randn(10, 8)
    channels = AttentionChannels(
        estimate(q, 8), estimate(k, 8), estimate(v, 8), keep=3, groups=2, head_dim=4
    )(x)
    # 4 query heads of 4 channels, 2 key-value heads: query heads 0 and 1 read key-value head 0, 2 and 3 read 1.
    of_q = (x @ q.t()).norm(dim=0).view(4, 4)
    mean = torch.cat([of_q[:2].mean(dim=0), of_q[2:].mean(dim=0)])
    qk = (mean * (x @ k.t()).norm(dim=0)).topk(3).indices.sort().values
    vo = (x @ v.t()).norm(dim=0).topk(3).indices.sort().values
    assert torch.equal(channels["k"], qk)
    assert torch.equal(channels["v"], vo)
    for narrow, wide in (("k", "q"), ("v", "o")):
        expected = [
            h * 4 + int(c) % 4 for c in channels[narrow] for h in (2 * (int(c) // 4), 2 * (int(c) // 4) + 1)
        ]
        assert channels[wide].tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("channels", "rho", "count"),
    [
        (14336, 0.99, 143),  # Llama 3 8B: 143.36
        (1024, 0.75, 256),
        (688, 0.99, 6),  # 6.88
        (688, 0.9, 68),  # 68.8
        (640, 0.9, 63),  # 1 - 0.9 is a little less than 0.1, in the release too
        (48, 0.99, 1),  # the release would keep none
        (48, 0.0, 48),
    ],
)
def test_as_many_channels_are_kept_as_in_the_release(channels: int, rho: float, count: int) -> None:
    """int(channels * (1 - sparsity)), in each of its predictors."""
    assert kept(channels, rho) == count


# -- the products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_equal_masked_dense_products(axis: int) -> None:
    x, weight = torch.randn(7, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    chosen, dense = torch.tensor([0, 2, 5]), torch.tensor([1, 6])
    mask = torch.zeros(7, 6 if axis else 9, dtype=torch.float64)
    mask[:, chosen] = 1
    mask[dense] = 1

    def masked(x: Tensor) -> Tensor:
        return (x * mask) @ weight.t() if axis else (x @ weight.t()) * mask

    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = SlicedProduct.apply(one, weight, chosen, dense, axis), masked(two)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.allclose(y, expected)
    assert torch.allclose(one.grad, two.grad)
    torch.autograd.gradcheck(
        lambda t: SlicedProduct.apply(t, weight, chosen, dense, axis), x.clone().requires_grad_()
    )


def masked_forward(stack: Stack, batch: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """The same step by masking dense activations: what the frozen layers give is multiplied by 0 and 1."""
    context = batch["labels"] == -100
    hooks = []
    for part in stack.ledger.of("sparselora"):
        if not isinstance(part, DeltaPart):
            continue
        place, role, chosen = part.place, part.module.role, part.module.block.chosen[part.module.role]
        assert isinstance(place, nn.Linear)
        columns = role in ("o", "down")
        mask = torch.zeros(*context.shape, place.in_features if columns else place.out_features)
        mask[..., chosen] = 1
        mask[~context] = 1

        def edit(
            _: nn.Module,
            inputs: tuple[Tensor],
            y: Tensor,
            mask: Tensor = mask,
            w: Tensor = place.weight,
            by: bool = columns,
        ) -> Tensor:
            whole = inputs[0] @ w.t()
            return y - whole + ((inputs[0] * mask) @ w.t() if by else whole * mask)

        hooks.append(place.register_forward_hook(edit))
    with stack.disabled("sparselora"):
        found = gradients(stack, batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp": 0, "mlp_layers": None},
        {"attention": 0, "attention_layers": None},
        {"mlp": 0.9, "attention": 0.25},
    ],
)
def test_a_step_equals_masking_the_dense_activations(options: dict[str, float]) -> None:
    stack = stack_of(Sparselora(**{**ALL, **options}))
    batch = batch_for(stack)
    loss, found = gradients(stack, batch)
    other, expected = masked_forward(stack, batch)
    assert loss == pytest.approx(other, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))
    plain = gradients(stack_of(), batch)
    assert abs(plain[0] - loss) > 1e-3  # or nothing was left out


# -- what stays dense --------------------------------------------------------------------------------------------------


def test_sparsity_zero_is_lora() -> None:
    plain, none = stack_of(), stack_of(Sparselora(mlp=0, attention=0))
    assert equal(gradients(plain, batch_for(plain)), gradients(none, batch_for(none)))
    for stack in (plain, none):
        stack.train(ROWS, steps=3, batch_size=2, learning_rate=1e-2)
    pairs = zip(plain.ledger.parameters("lora"), none.ledger.parameters("lora"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_all_channels_are_lora_to_rounding() -> None:
    # Not 0, which leaves blocks dense, and so small that 1 - rho is 1: no channel is rounded away.
    plain, whole = stack_of(), stack_of(Sparselora(**ALL | {"mlp": 1e-17, "attention": 1e-17}))
    one, two = gradients(plain, batch_for(plain)), gradients(whole, batch_for(whole))
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one[1], two[1], strict=True))


def test_answer_tokens_are_dense() -> None:
    """Where no token is context but the first, whose part in the rest is what attention takes of it: layer by layer."""
    stack = stack_of(Sparselora(**ALL))
    batch = batch_for(stack, answers=4)
    seen: dict[str, Tensor] = {}
    mlp = stack.model.model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda _, inputs, y: seen.update(x=inputs[0].detach(), y=y.detach()))
    gradients(stack, batch)
    hook.remove()
    with torch.no_grad():
        dense = mlp(seen["x"])
    wrong = (seen["y"] - dense).abs().amax(dim=-1)  # [B, T]
    assert wrong[:, -4:].max() < 1e-6
    assert wrong[:, :-4].min() > 1e-4


def test_evaluation_is_dense() -> None:
    plain, stack = stack_of(), stack_of(Sparselora(**ALL))
    batch = batch_for(stack)
    with torch.no_grad():
        for training in (False, True):  # outside a step of training even a model in training mode is dense
            logits = [s.model.train(training)(**batch).logits for s in (plain, stack)]
            assert torch.equal(*logits)
    gradients(stack, batch)
    with torch.no_grad():
        assert torch.equal(plain.model(**batch).logits, stack.model(**batch).logits)


def test_a_failing_step_ends_dense() -> None:
    class Break(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            raise RuntimeError("broken")
            yield

    stack = stack_of(Sparselora(**ALL), Break())
    stack.model.train()
    with pytest.raises(PeftxError, match="broken"):
        stack.run_train_step(TrainStep(stack, batch_for(stack)))
    assert plugin_of(stack).tokens.labels is None


def test_first_steps_are_dense() -> None:
    plain, stack = stack_of(), stack_of(Sparselora(**ALL | {"start": 0.2}))
    batch = batch_for(stack)
    dense = gradients(plain, batch)
    # Without SparseLoRA a layer and its LoRA are one step of autograd, which rounds otherwise.
    close = [near(gradients(stack, batch, index=i, total=10), dense) for i in range(4)]
    assert close == [True, True, False, False]


def near(found: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> bool:
    """To float32's rounding."""
    scale = max(float(g.abs().max()) for g in expected[1])
    pairs = zip(found[1], expected[1], strict=True)
    return all(float((one - other).abs().max()) < 1e-6 * scale for one, other in pairs)


def test_default_layers() -> None:
    stack = Stack(tiny("llama", num_hidden_layers=8), [Lora(rank=2), Sparselora()])
    parts = stack.ledger.of("sparselora", DeltaPart)
    found = {(part.path.split(".")[3], int(part.path.split(".")[2])) for part in parts}
    assert found == {("mlp", i) for i in range(1, 7)} | {("self_attn", i) for i in range(4, 7)}
    assert stack.trainable_parameters() == stack.plugin_parameters("lora")


# -- batches -----------------------------------------------------------------------------------------------------------


def test_padding_does_not_count() -> None:
    """A pad has no label, as context has none, and no say in the choice."""
    stack = stack_of(Sparselora(**ALL))
    row = {name: x[:1] for name, x in batch_for(stack).items()}
    fill = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    padded = {name: F.pad(x, (0, 9), value=fill[name]) for name, x in row.items()}
    (one, chosen), (two, of_padded) = (
        (gradients(stack, batch), all_chosen(stack)) for batch in (row, padded)
    )
    assert all(torch.equal(a, b) for a, b in zip(chosen, of_padded, strict=True))
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(one[1], two[1], strict=True))


def test_soft_tokens_are_context() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2), ReferencePrompt(), Sparselora(**ALL)])
    loss = float(stack.model.train() and stack.run_train_step(TrainStep(stack, batch_for(stack))))
    assert loss > 0
    tokens = plugin_of(stack).tokens
    assert tokens.rows(torch.empty(1, 5, 32)) is None, "between steps nothing is sparse"
    tokens.set(lambda: torch.tensor([[IGNORE, IGNORE, 5]]))
    assert tokens.rows(torch.empty(1, 6, 32)) is None, "nor is a layer that somebody calls alone"
    tokens.call.begin({"input_ids": torch.tensor([[2, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])})
    scored, dense = tokens.rows(torch.empty(1, 6, 32))  # a pad, three soft tokens, two of the text
    assert (scored.tolist(), dense.tolist()) == ([1, 2, 3, 4], [5])
    assert tokens.rows(torch.empty(1, 2, 32)) is None, "rows of another plugin's"


def test_checkpointing_chooses_the_same_channels() -> None:
    stack, again = stack_of(Sparselora(**ALL)), stack_of(Sparselora(**ALL))
    again.model.activation_checkpointing_enable({"use_reentrant": False})
    assert equal(gradients(stack, batch_for(stack)), gradients(again, batch_for(again)))


@pytest.mark.parametrize("quiet", [True, False])
def test_a_reference_between_the_two_passes_changes_nothing(quiet: bool) -> None:
    """Recomputed layers choose by the batch, whatever the model was called on in between."""
    found = []
    for beside in (False, True):
        stack = stack_of(Sparselora(**ALL))
        stack.model.activation_checkpointing_enable({"use_reentrant": False})
        stack.model.train()
        step = TrainStep(stack, batch_for(stack, padding="right"))

        def reference(_: Any, stack: Stack = stack, step: TrainStep = step, beside: bool = beside) -> Tensor:
            if not beside:
                return torch.zeros(())
            with step.reference() if quiet else eval_mode(stack.model):
                return 0 * stack.model(step.batch["input_ids"][:1, :5]).logits.sum()

        step.add_loss("reference", reference)
        stack.run_train_step(step)
        found.append([p.grad for p in stack.ledger.parameters("lora")])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_another_loss_brings_labels_of_its_own() -> None:
    """The context of rows beside the step's is that of their labels, and of two calls alike each has its own."""
    call = Call()
    tokens = Tokens(call, dense_answers=True)
    tokens.set(lambda: torch.full((2, 12), IGNORE))
    for answers in (1, 4):
        labels = torch.full((1, 6), IGNORE)
        labels[:, 6 - answers :] = 5
        call.begin({"input_ids": torch.full((1, 6), 7), "labels": labels})
        scored, dense = tokens.rows(torch.empty(1, 6, 32))
        assert dense.tolist() == list(range(6 - answers, 6))
        assert scored.tolist() == list(range(6 - answers))


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "gemma3", "qwen2"])
def test_the_gate_is_the_models_own(arch: str) -> None:
    """Gemma 2 and 3 name it otherwise in their config than Llama does; Qwen 2 has biases."""
    model = tiny(arch)
    stack = Stack(model, [Lora(rank=2), Sparselora(**ALL)], tokenizer=tiny_tokenizer())
    mlp = next(m for m in model.modules() if hasattr(m, "act_fn"))
    channels = next(m for m in model.modules() if isinstance(m, MlpChannels))
    assert channels.activation is mlp.act_fn
    gradients(stack, batch_for(stack))
    assert all(len(chosen) for chosen in all_chosen(stack))


def test_the_gate_may_go_by_another_name() -> None:
    """Llama 4 calls it `activation_fn`; its second layer has experts."""
    model = tiny("llama4")
    plugins = [Lora(rank=2, targets="attention mlp"), Sparselora(**ALL | {"mlp_layers": [0]})]
    stack = Stack(model, plugins, tokenizer=tiny_tokenizer())
    channels = next(m for m in model.modules() if isinstance(m, MlpChannels))
    assert channels.activation is model.model.layers[0].feed_forward.activation_fn
    gradients(stack, batch_for(stack))
    assert all(len(chosen) for chosen in all_chosen(stack))


def test_heads_of_other_layers_may_be_wider() -> None:
    """Gemma 4: heads of 8 numbers in the first layer, of 16 in the second."""
    model = tiny("gemma4")
    options = ALL | {"mlp_layers": [0, 1, 2]}
    stack = Stack(model, [Lora(rank=2, targets="attention mlp"), Sparselora(**options)])
    found = [m for m in model.modules() if isinstance(m, AttentionChannels)]
    assert [(channels.head_dim, channels.groups, channels.keep) for channels in found] == [
        (8, 2, 8),
        (16, 2, 16),
    ]
    gradients(stack, batch_for(stack))
    assert all(len(chosen) for chosen in all_chosen(stack))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("around_backward", [False, True])
def test_autocast(arch: str, around_backward: bool) -> None:
    """Channels, loss and gradients are near those in float32."""
    stack = Stack(tiny(arch), [Lora(rank=2), Sparselora(**ALL)], tokenizer=tiny_tokenizer())
    for p in stack.ledger.parameters("lora"):
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05
    batch = batch_for(stack)
    expected, chosen = gradients(stack, batch), all_chosen(stack)
    stack.model.zero_grad()
    losses: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        loss = float(stack.run_train_step(TrainStep(stack, batch, backward=losses.append)))
        if around_backward:
            losses[0].backward()
    if not around_backward:
        losses[0].backward()
    found = [p.grad for p in stack.ledger.parameters("lora")]
    assert loss == pytest.approx(expected[0], rel=2e-2)
    same = torch.cat([torch.isin(a, b) for a, b in zip(chosen, all_chosen(stack), strict=True)])
    assert float(same.float().mean()) > 0.9  # what is on the edge may change places
    near = torch.cosine_similarity(
        *(torch.cat([g.flatten() for g in gs]) for gs in (found, expected[1])), dim=0
    )
    assert float(near) > 0.9


def test_labels_of_rows_leave_all_tokens_sparse() -> None:
    model = tiny("llama", head="classification", num_labels=3)
    stack = Stack(model, [Lora(rank=2), Sparselora(**ALL)])
    model.train()
    stack.run_train_step(TrainStep(stack, example_inputs(model) | {"labels": torch.tensor([0, 2])}))
    assert all(p.grad is not None for p in stack.ledger.parameters("lora"))


def test_ist_measures_with_dense_layers() -> None:
    scores = []
    for plugins in ([], [Sparselora(**ALL)]):
        stack = stack_of(Ist(interval=1), *plugins)
        gradients(stack, batch_for(stack), index=1)
        scores.append(stack.plugins["ist"].state["scores"])
    assert scores[0] == scores[1]
    assert any(scores[0])


def test_copies_go_on_alone() -> None:
    stack = stack_of(Sparselora(**ALL))
    twin = copy.deepcopy(stack.model)
    plugin_of(stack).tokens.set(lambda: torch.full((2, 12), IGNORE))
    batch = batch_for(stack)
    with torch.no_grad():
        sparse, dense = (m.train()(**batch).logits for m in (stack.model, twin))
        plain = stack_of().model.train()(**batch).logits
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert torch.equal(dense, plain)


# -- cost --------------------------------------------------------------------------------------------------------------


def test_work_of_the_frozen_layers_scales_with_what_is_kept() -> None:
    model_options = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}

    def flops(*plugins: Plugin) -> int:
        stack = Stack(tiny("llama", **model_options), [Lora(rank=1), *plugins])
        stack.model.train()
        batch = batch_for(stack, answers=1, length=24)
        with FlopCounterMode(display=False) as counter:
            stack.run_train_step(TrainStep(stack, batch, index=0, total=10))
        return counter.get_total_flops()

    qkv, rest = 64 * 64 + 2 * 64 * 32, 3 * 64 * 192 + 64 * 64  # numbers in the sliced matrices of a layer
    forward, backward = 2 * (qkv + rest), 2 * (qkv + rest) - qkv  # no dX below the first layer
    work = 48 * 2 * (forward + backward)
    whole = flops(Sparselora(**ALL | {"rank": 1, "start": 0.5}))  # dense in the first steps
    for rho in (0.25, 0.5, 0.75):
        saved = whole - flops(Sparselora(**ALL | {"mlp": rho, "attention": rho, "rank": 1, "start": 0}))
        assert saved / work == pytest.approx(
            rho - 1 / 24, abs=0.012
        )  # 1 token in 24 is dense; estimators: 0.9%


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "opt", "phi3", "mixtral", "bert", "t5", "gpt_neox"])
def test_models_without_the_layers_are_refused(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=f"sparselora slices .*{arch} does not have them"):
        Stack(tiny(arch), [Lora(rank=2), Sparselora(**ALL)])


@pytest.mark.parametrize(
    ("arch", "options", "layer", "hint"),
    [
        ("gemma4", {"attention_layers": [0, 2]}, 2, "attention_layers: [0, 1]"),  # it shares keys and values
        ("qwen3_next", {}, 1, "mlp_layers: [0]"),  # experts
        ("llama4", {}, 1, "mlp_layers: [0]"),
    ],
)
def test_layers_without_them_are_named(arch: str, options: dict[str, Any], layer: int, hint: str) -> None:
    with pytest.raises(ArchitectureError, match=f"layer {layer} of {arch}.* does not have them") as caught:
        Stack(tiny(arch), [Lora(rank=2, targets="attention mlp"), Sparselora(**ALL | options)])
    assert caught.value.hint == hint


@pytest.mark.parametrize(("block", "name"), [("mlp", "up_proj"), ("attention", "v_proj")])
def test_packed_weights_are_refused_as_such(block: str, name: str) -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        holder = layer.mlp if block == "mlp" else layer.self_attn
        setattr(holder, name, QuantLinear.from_linear(holder.get_submodule(name), bits=8))
    with pytest.raises(
        ArchitectureError, match=rf"sparselora: .*model\.layers\.0\.\S+{name} is packed"
    ) as caught:
        Stack(model, [Lora(rank=2), Sparselora(**ALL)])
    hint = str(caught.value.hint)
    assert f"{block}: 0" in hint
    assert "what packs it (prefixquant) behind sparselora" in hint
    options = {name: value for name, value in ALL.items() if name != f"{block}_layers"} | {block: 0}
    stack = Stack(model, [Lora(rank=2), Sparselora(**options)], tokenizer=tiny_tokenizer())
    gradients(stack, batch_for(stack))


def test_what_would_not_fit_unpacked_either_is_refused_for_that() -> None:
    model = tiny("phi3")
    for layer in model.model.layers:
        layer.mlp.down_proj = QuantLinear.from_linear(layer.mlp.down_proj, bits=8)
    with pytest.raises(ArchitectureError, match="phi3 does not have them"):
        Stack(model, [Lora(rank=2), Sparselora(**ALL)])


def test_the_gates_function_must_be_told_apart() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.dropout = nn.Dropout(0.1)
    with pytest.raises(ArchitectureError, match=r"model\.layers\.0\.mlp has 2 modules") as caught:
        Stack(model, [Lora(rank=2), Sparselora(**ALL)])
    assert "mlp: 0" in str(caught.value.hint)


def test_what_packs_may_stand_behind() -> None:
    """The way out that the refusal names, before anything is packed."""
    plugins = [
        PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16), Lora(rank=2), Sparselora(**ALL)
    ]  # fmt: skip
    with pytest.raises(
        ConflictError,
        match=r"'prefixquant' packs .*'sparselora'.*this order works: lora, sparselora, prefixquant",
    ):
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    plugins = [Lora(rank=2), Sparselora(**ALL), PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=2, batch_size=2)
    stack.compress(["The lamp is lit at six in the evening. "], samples=1, length=32)
    assert isinstance(stack.generate("1 + 1 =", max_new_tokens=2), str)


def test_a_bundle_brings_its_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(Sparselora(**ALL))
    stack.save(tmp_path / "bundle")
    monkeypatch.setattr(Estimate, "fit", lambda *_: pytest.fail("takes long on a large model"))
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    pairs = zip(*(s.ledger.tensors("sparselora").items() for s in (stack, again)), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_nothing_to_train_is_refused() -> None:
    stack = Stack(tiny("llama"), [Sparselora(**ALL)], tokenizer=tiny_tokenizer())
    stack.model.train()
    with pytest.raises(PeftxError, match="nothing trains: no plugin of the stack"):
        stack.run_train_step(TrainStep(stack, batch_for(stack)))
    with pytest.raises(PeftxError, match="nothing trains"):
        stack.train(ROWS, steps=1)


def test_a_trained_base_is_refused() -> None:
    from peftx_lt_sft import LtSft

    with pytest.raises(
        ConflictError, match=r"'sparselora' computes model\.layers\.\d\.\S+ itself .* lt-sft trains"
    ):
        Stack(tiny("llama"), [LtSft(phase1=1), Sparselora(**ALL)])
    with pytest.raises(ConflictError, match=r"'lt-sft' trains .*, which sparselora computes itself"):
        Stack(tiny("llama"), [Sparselora(**ALL), LtSft(phase1=1)])


def test_a_step_in_evaluation_mode_is_refused() -> None:
    stack = stack_of(Sparselora(**ALL))
    batch = batch_for(stack)
    with pytest.raises(PeftxError, match="sparselora: the model is in evaluation mode") as caught:
        stack.train_step(batch)
    assert "stack.model.train()" in str(caught.value.hint)
    stack.model.train()
    stack.train_step(batch)
    assert all(len(chosen) for chosen in all_chosen(stack))


def test_batches_without_context_are_refused() -> None:
    stack = stack_of(Sparselora(**ALL))
    stack.model.train()
    with pytest.raises(PeftxError, match="all 24 tokens of the batch have a label"):
        stack.run_train_step(TrainStep(stack, batch_for(stack, answers=12)))


def test_steps_on_other_rows_alone_are_refused() -> None:
    stack = stack_of(Sparselora(**ALL))
    stack.model.train()
    step = TrainStep(stack, batch_for(stack))
    half = {name: step.batch[name][:1] for name in ("input_ids", "attention_mask")}
    step.replace_task_loss(lambda: (step.forward(**half, labels=None).logits.mean(), None))
    with pytest.raises(PeftxError, match="the step ran the model on other rows than the batch's"):
        stack.run_train_step(step)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 33}, r"rank 33 exceeds the 48x32 matrix model\.layers\.0\.mlp\.gate_proj"),
        ({"mlp_layers": [0, 2]}, r"mlp_layers \[0, 2\] of a model with 2 layers"),
        ({"attention_layers": [1, 1]}, r"attention_layers \[1, 1\]"),
        ({"mlp_layers": None}, "of 2 layers none is left for mlp"),
        ({"mlp_layers": []}, "of 2 layers none is left for mlp"),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=f"sparselora: {match}"):
        Stack(tiny("llama"), [Lora(rank=2), Sparselora(**{**ALL, **options})])


@pytest.mark.parametrize(
    "options",
    [
        {"mlp": 1},
        {"mlp": -0.1},
        {"attention": 1},
        {"rank": 0},
        {"start": 1},
        {"start": -0.1},
        {"dense_answers": 2},
    ],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(PeftxError, match=f"Sparselora: {next(iter(options))}") as caught:
        Sparselora(**options)
    assert "mlp, attention, mlp_layers, attention_layers, rank, start, dense_answers" in str(
        caught.value.hint
    )


def test_rows_that_another_plugin_sends_through_a_layer_run_dense() -> None:
    from peftx_aligner import Aligner

    stack = Stack(tiny("llama"), [Aligner(), Sparselora(**ALL)], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-2)
    assert all(p.isfinite().all() for p in stack.ledger.parameters("aligner"))
    assert any(
        p.abs().max() > 0 for name, p in stack.ledger.tensors("aligner").items() if name.endswith(".g")
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_text_beside_the_batch_runs_dense(first: bool) -> None:
    """The context of CPT, which its loss reads alone: its label's loss is what it is without SparseLoRA."""
    terms = []
    for sparse in ([], [Sparselora(**ALL)]):
        cpt = Cpt(**Cpt.example)
        stack = stack_of(*([cpt, *sparse] if first else [*sparse, cpt]))
        stack.model.train()
        step = TrainStep(stack, batch_for(stack), total=4)
        stack.run_train_step(step)
        terms.append(step.losses["context"])
        assert all(len(chosen) for chosen in (all_chosen(stack) if sparse else []))
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)


@pytest.mark.parametrize("name", ["hierarchical-byte-transformer", "word-pooled-lm"])
def test_units_in_the_place_of_tokens_run_sparse(name: str) -> None:
    """In both orders: the model has a row for every unit then."""
    cls = peftx.Registry().load(name)
    for swap in (False, True):
        members = [cls(**cls.example), Sparselora(**ALL)]
        stack = Stack(tiny("llama"), members[::-1] if swap else members, tokenizer=tiny_tokenizer())
        stack.model.train()
        ids = torch.tensor([stack.tokenizer("a text of words").input_ids] * 2)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100)
        stack.train_step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        assert any(len(chosen) for chosen in all_chosen(stack))


@pytest.mark.parametrize("block", ["mlp", "attention"])
def test_layers_of_a_dense_block_are_refused(block: str) -> None:
    with pytest.raises(PeftxError, match=rf"{block}_layers is \[1\], and {block} = 0 leaves them dense"):
        Sparselora(**{block: 0, f"{block}_layers": [1]})
