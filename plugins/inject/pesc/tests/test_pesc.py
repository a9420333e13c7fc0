from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack, TrainStep
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_pesc import Experts, Pesc, PescConfig, Routing, balance_of
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("pesc")

SMALL = PescConfig(experts=4, top_k=2, bottleneck=3, dropout=0.0)


def experts(**options: Any) -> Experts:
    """Experts of width 5 that do something."""
    torch.manual_seed(0)
    built = Experts(5, SMALL.model_copy(update=options), call=Call())
    for parameter in built.parameters():
        parameter.data = torch.randn_like(parameter)
    return built.eval()


def adapter(layer: Experts, e: int, y: Tensor) -> Tensor:
    """A_e without the scale, by the equation."""
    return nn.functional.gelu(y @ layer.D[e].T) @ layer.U[:, e].T


def layers_of(stack: Stack) -> list[Experts]:
    return [part.module for part in stack.ledger.of("pesc", DeltaPart)]


def stack_of(arch: str = "llama", *before: PromptTuning, **options: Any) -> Stack:
    """A stack in training mode whose experts do something."""
    plugin = Pesc(**{"experts": 4, "bottleneck": 3, "dropout": 0.0, **options})
    stack = Stack(tiny(arch), [*before, plugin])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("pesc"):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    stack.model.train()
    return stack


def losses_of(stack: Stack, batch: dict[str, Tensor]) -> dict[str, float]:
    step = TrainStep(stack, batch)
    stack.run_train_step(step)
    return step.losses


# -- the output ------------------------------------------------------------------------------------------------------


def test_output_is_the_weighted_sum_of_the_experts() -> None:
    layer = experts(scale=0.7)
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    expected = torch.zeros_like(y)
    for n in range(6):
        best = (layer.R @ x[n]).topk(2)
        for w, e in zip(best.values.softmax(-1), best.indices, strict=True):
            expected[n] += w * (y[n] + 0.7 * adapter(layer, int(e), y[n]))
    torch.testing.assert_close(layer(x, y), expected)


def wave(*shape: int, by: float) -> Tensor:
    """Numbers that are the same everywhere."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * by).float().view(shape)


OFFICIAL = [
    *(-0.7936590, -0.0093491, 0.6528909, 1.0895057, 0.4692278, 0.2629642, -0.2286564, -0.9317724),
    *(1.3276697, 0.5311556, -0.1272315, -0.5482215, -0.9640990, -0.7603384, -0.2787600, 0.4010323),
    *(0.2221445, 1.0415976, 1.7049708, 2.1176057, 1.1299932, 0.8556185, 0.3123643, -0.4146114),
]
"""Of CamelidaeGateAdapter at commit 5e9b10b, on the weights and states of the test below."""


def test_equals_the_official_layer() -> None:
    config = PescConfig(experts=3, top_k=2, bottleneck=2, scale=0.5)
    layer = Experts(4, config, call=Call()).eval()
    layer.R.data, layer.D.data = wave(3, 4, by=1.3), wave(3, 2, 4, by=0.7)
    layer.U.data = wave(4, 3, 2, by=2.1)
    found = layer(2 * wave(2, 3, 4, by=0.9), 2 * wave(2, 3, 4, by=0.4))
    assert torch.allclose(found.flatten(), torch.tensor(OFFICIAL), rtol=0, atol=5e-7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_token_has_k_experts_whose_weights_sum_to_1(k: int) -> None:
    """Adapters that give the same whatever they read: U_e of one hot, gelu(D y) = 1 for all tokens."""
    layer = experts(top_k=k, bottleneck=1)
    one = float(nn.functional.gelu(torch.tensor(3.0)))
    layer.D.data, layer.U.data = torch.full_like(layer.D, 3.0), torch.zeros_like(layer.U)
    layer.U.data[:4, :, 0] = torch.eye(4) / one
    y = torch.zeros(50, 5)
    y[:, 4] = 1.0
    w = (layer(torch.randn(50, 5), y) - y)[:, :4]
    torch.testing.assert_close(w.sum(-1), torch.ones(50))
    assert bool(((w != 0).sum(-1) == k).all())


def test_all_experts_alike_are_one_parallel_adapter() -> None:
    layer = experts(top_k=4)
    layer.D.data[:], layer.U.data[:] = layer.D.data[:1], layer.U.data[:, :1]
    x, y = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    torch.testing.assert_close(layer(x, y), y + adapter(layer, 0, y))


def test_dropout_is_of_what_adapters_read_while_training() -> None:
    layer = experts(dropout=0.5, top_k=4)
    layer.D.data[:], layer.U.data[:] = 1.0, 1.0
    y = torch.full((4000, 5), 100.0)  # gelu(y) = y there, so that the mean is kept
    change = layer.train()(torch.zeros_like(y), y) - y
    assert change[:, 0].unique().numel() == 6  # 0 to 5 of the inputs are left
    assert change.mean().item() == pytest.approx(3 * 500, rel=0.03)
    assert torch.equal(layer.eval()(torch.zeros_like(y), y) - y, torch.full_like(y, 1500.0))


@pytest.mark.parametrize(("arch", "block"), [("llama", "mlp"), ("gpt2", "mlp")])
@pytest.mark.parametrize("k", [1, 4])
def test_the_block_runs_once_and_its_input_routes(arch: str, block: str, k: int) -> None:
    stack = stack_of(arch, top_k=k)
    layers = layers_of(stack)
    seen: list[Tensor] = []
    for name, module in stack.model.named_modules():
        if name.endswith(f".{block}"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for layer in layers:
        layer.watched = True
    with torch.no_grad():
        output_of(stack.model, example_inputs(stack.model))
    assert len(seen) == len(layers) == 2
    for layer, x in zip(layers, seen, strict=True):
        assert layer.routing is not None
        torch.testing.assert_close(layer.routing.p, (x @ layer.R.T).softmax(-1))
        assert bool((layer.routing.chosen.sum(-1) == k).all())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "vit"])
def test_starts_as_the_dense_model_for_any_router(arch: str) -> None:
    stack = Stack(tiny(arch), [Pesc(experts=4)])
    for layer in layers_of(stack):
        nn.init.normal_(layer.R)
    inputs = example_inputs(stack.model)
    start = output_of(stack.model, inputs)
    with stack.disabled():
        assert torch.equal(output_of(stack.model, inputs), start)


def test_parameters_are_counted_and_nothing_else_trains() -> None:
    stack = Stack(tiny("llama"), [Pesc(experts=6, bottleneck=5)])
    d = 32
    assert stack.trainable_parameters() == 2 * (6 * 2 * 5 * d + d * 6)
    trained = {id(p) for p in stack.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in stack.ledger.parameters("pesc")}
    for layer in layers_of(stack):
        assert not layer.U.any()
        for start in (layer.R, layer.D):
            assert 0.9 / math.sqrt(d) < float(start.detach().abs().max()) <= 1 / math.sqrt(d)


def test_layers_of_experts_are_left_alone() -> None:
    stack = Stack(tiny("llama4"), [Pesc(experts=4)])
    (part,) = stack.ledger.of("pesc", DeltaPart)
    assert hasattr(stack.model.get_submodule(part.path), "gate_proj")


# -- the loss --------------------------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    layers = [experts(), experts(), experts()]
    p = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.3, 0.6, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    chosen = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]]).bool()
    layers[0].routing = Routing(p, chosen, torch.tensor([[True, True, False]]))
    uniform = Routing(
        torch.full((4, 4), 0.25), torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool(), torch.ones(4).bool()
    )
    layers[1].routing = uniform
    with torch.no_grad():
        loss = Pesc(experts=4, balance=0.1).loss(layers)
    # f = (.5, 1, .5, 0), P = (.3, .3, .4, 0): 4 (.15 + .3 + .2) = 2.6; uniform is K = 2, the third did not run
    assert balance_of(uniform).item() == pytest.approx(2)
    assert loss.item() == pytest.approx(0.1 * (2.6 + 2) / 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("soft", [0, 3])
def test_pads_are_nowhere(side: str, soft: int) -> None:
    stack = stack_of("llama", *([PromptTuning(length=soft)] if soft else []))
    plain = example_inputs(stack.model)
    plain["labels"] = plain["input_ids"].clone()
    plain["labels"][:, 0] = -100  # behind pads it would be predicted
    sides = (2, 0) if side == "left" else (0, 2)
    padded = {
        name: nn.functional.pad(x, sides, value={"labels": -100, "input_ids": 5}.get(name, 0))
        for name, x in plain.items()
    }
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected, found = losses_of(stack, plain), losses_of(stack, padded)
    assert found["pesc"] == pytest.approx(expected["pesc"], rel=1e-5)
    assert found["task"] == pytest.approx(expected["task"], rel=1e-5)
    unmasked = {name: x for name, x in padded.items() if name != "attention_mask"}
    assert losses_of(stack, unmasked)["pesc"] != pytest.approx(expected["pesc"], rel=1e-5)


def test_an_encoder_and_its_decoder_have_pads_of_their_own() -> None:
    stack = stack_of("t5")
    batch = example_inputs(stack.model, padding="right")
    batch["labels"] = batch.pop("decoder_input_ids")[:, :7].contiguous()
    batch["labels"][0, 4:] = -100
    seen: list[int] = []

    def count(outputs: object) -> Tensor:
        seen.extend(int(layer.routing.real.sum()) for layer in layers_of(stack) if layer.routing)
        return torch.zeros(())

    step = TrainStep(stack, batch)
    step.add_loss("count", count)
    stack.run_train_step(step)
    assert seen == [9 + 7] * 2 + [4 + 7] * 2


def test_images_have_no_pads() -> None:
    stack = stack_of("clip")
    for layer in layers_of(stack):
        layer.watched = True
    with torch.no_grad():
        stack.model(**example_inputs(stack.model, length=4, padding="right"))
    for part in stack.ledger.of("pesc", DeltaPart):
        real = part.module.routing.real
        assert real.sum() == (real.numel() if "vision" in part.path else 4 + 2), part.path


def test_the_loss_trains_the_router_from_the_start() -> None:
    """U is zero, so the task says nothing to the router yet; with checkpointing the gradient is the same."""
    found = []
    for checkpointing in (False, True):
        stack = Stack(tiny("llama"), [Pesc(experts=4, bottleneck=3, dropout=0.0)])
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        stack.model.train()
        inputs = example_inputs(stack.model)
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
        layers = layers_of(stack)
        found.append([layer.R.grad for layer in layers])
        assert all(layer.routing is None and not layer.watched for layer in layers)
    assert all(float(g.abs().max()) > 1e-7 for g in found[0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


def test_one_expert_a_token_says_nothing_to_the_router_but_the_balance() -> None:
    for k, balance, moves in ((1, 0.0, False), (1, 0.1, True), (2, 0.0, True)):
        stack = stack_of(top_k=k, balance=balance)
        inputs = example_inputs(stack.model)
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
        assert any(bool((layer.R.grad.abs() > 1e-8).any()) for layer in layers_of(stack)) is moves


def test_a_pass_without_gradients_is_not_part_of_the_loss() -> None:
    stack = stack_of()
    inputs = example_inputs(stack.model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    expected = losses_of(stack, batch)["pesc"]
    step = TrainStep(stack, batch)

    def task() -> tuple[Tensor, Any]:
        outputs = step.forward()
        with torch.no_grad():
            stack.model(inputs["input_ids"][:, :4] + 1)
        return outputs.loss, outputs

    step.replace_task_loss(task)
    stack.run_train_step(step)
    assert step.losses["pesc"] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_routers_are_in_full_precision(dtype: torch.dtype) -> None:
    layer = experts().to(dtype)
    layer.watched = True
    x = torch.randn(1, 6, 5).to(dtype)
    assert layer(x, x).dtype == dtype
    assert layer.routing is not None
    expected = (x.double() @ layer.R.double().T).softmax(-1)
    assert torch.allclose(layer.routing.p.double(), expected, atol=1e-6)
    narrow, _ = layers_of(Stack(tiny("llama").to(torch.bfloat16), [Pesc(experts=4)]))
    assert narrow.R.dtype == torch.float32


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"top_k 5 of 4 experts"):
        Pesc(experts=4, top_k=5)
    assert Pesc(experts=4, top_k=4).config.top_k == 4
    with pytest.raises(PeftxError, match=r"pesc: 33 experts, and .* 32 numbers") as e:
        Stack(tiny("llama"), [Pesc(experts=33)])
    assert str(e.value.hint) == "experts at most 32"
    Stack(tiny("llama"), [Pesc(experts=32)])
    with torch.device("meta"), pytest.raises(PeftxError, match=r"pesc: 1000000 experts, and .* 32 numbers"):
        Stack(tiny("llama").to("meta"), [Pesc(experts=10**6)])
    with pytest.raises(ArchitectureError, match=r"pesc: the feed-forward block of mixtral is a mixture"):
        Stack(tiny("mixtral"), [Pesc()])
    for arch in ("bert", "bart", "opt", "bloom", "whisper"):
        with pytest.raises(
            ArchitectureError, match=rf"pesc: the feed-forward block of {arch} calls no module"
        ):
            Stack(tiny(arch), [Pesc()])
    with pytest.raises(PeftxError, match=r"pesc: .*'block\.mlp' matches nothing"):
        Stack(tiny("mamba"), [Pesc()])
    with pytest.raises(PeftxError, match="pesc: no layer with a router ran"):
        Pesc().loss([experts()])


def test_reentrant_checkpointing_is_refused() -> None:
    stack = stack_of()
    stack.model.activation_checkpointing_enable({"use_reentrant": True})
    inputs = example_inputs(stack.model)
    with pytest.raises(UnsupportedError, match="pesc: reentrant checkpointing hides the routers"):
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
