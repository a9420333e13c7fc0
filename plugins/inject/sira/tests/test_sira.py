from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from peftx import Stack, TrainStep
from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny
from peftx_prompt_tuning import PromptTuning
from peftx_sira import Experts, Routing, Sira, SiraConfig, balance_of, dropped, top, within

test_conformance = conformance("sira")

SMALL = SiraConfig(experts=4, top_k=2, rank=2, expert_dropout=0.0, capacity=None)


def replace(config: SiraConfig, **options: object) -> SiraConfig:
    return config.model_copy(update=options)


def experts(config: SiraConfig = SMALL) -> Experts:
    """A layer [3 -> 2] whose experts do something."""
    torch.manual_seed(0)
    built = Experts(3, 2, config, call=Call(), side="source")
    built.theta.data = 2 * torch.randn_like(built.theta)
    built.B.data = torch.randn_like(built.B)
    return built


def called(layer: Experts, mask: list[list[int]]) -> Tensor:
    """What a layer sees of a call with this mask."""
    real = torch.tensor(mask)
    layer.call.begin({"input_ids": torch.ones_like(real), "attention_mask": real})
    return torch.randn(*real.shape, 3, generator=torch.Generator().manual_seed(1))


def layers_of(stack: Stack) -> list[Experts]:
    return [part.module for part in stack.ledger.of("sira", DeltaPart)]


def trained(arch: str = "llama", *before: PromptTuning, **options: object) -> Stack:
    """A stack in training mode whose experts do something."""
    plugin = Sira(**{"experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0, **options})
    stack = Stack(tiny(arch), [*before, plugin])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("sira"):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    stack.model.train()
    return stack


def losses_of(stack: Stack, batch: dict[str, Tensor]) -> dict[str, float]:
    step = TrainStep(stack, batch)
    stack.run_train_step(step)
    return step.losses


# -- the output ------------------------------------------------------------------------------------------------------


def test_output_is_the_weighted_sum_of_the_likeliest() -> None:
    layer = experts(replace(SMALL, alpha=3.0))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    p = (x @ layer.theta.T).softmax(-1)
    expected = y.clone()
    for n in range(5):
        for e in p[n].topk(2).indices:
            expected[n] += 1.5 * p[n, e] * (layer.B[:, e] @ (layer.A[e] @ x[n]))
    torch.testing.assert_close(layer(x, y), expected)


def test_alpha_left_out_is_the_rank() -> None:
    assert experts().scale == 1
    assert experts(replace(SMALL, alpha=6.0)).scale == 3


def test_all_experts_without_a_limit_are_the_dense_mixture() -> None:
    layer = experts(replace(SMALL, top_k=4)).train()
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    p = (x @ layer.theta.T).softmax(-1)
    dense = y + torch.einsum("gte,oer,eri,gti->gto", p, layer.B, layer.A, x)
    torch.testing.assert_close(layer(x, y), dense)


def test_weights_are_not_normalised_again() -> None:
    p = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.0, 0.0, 0.7, 0.0]])
    G, chosen = top(p, 2)
    assert torch.equal(G, p * torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    assert chosen.sum(-1).tolist() == [2, 1]  # what dropout took is not chosen


def test_parameters_are_counted() -> None:
    layer = Experts(7, 5, replace(SMALL, experts=6, rank=3), call=Call(), side="source")
    assert sum(p.numel() for p in layer.parameters()) == 6 * 3 * (7 + 5) + 6 * 7
    assert not layer.B.any()
    assert layer.A.abs().max() <= 1 / math.sqrt(7)
    assert layer.theta.abs().max() <= 1 / math.sqrt(7)
    assert layer.A.std() > 0.1


# -- capacity and dropout --------------------------------------------------------------------------------------------


def test_the_first_tokens_of_a_text_have_the_place() -> None:
    chosen = torch.tensor([[[1, 0], [1, 1], [1, 1], [0, 1]], [[0, 1], [1, 1], [1, 0], [1, 0]]]).bool()
    on = within(chosen, torch.tensor([2.0, 1.0]))
    assert on.int().tolist() == [
        [[1, 0], [1, 1], [0, 1], [0, 0]],
        [[0, 1], [1, 0], [0, 0], [0, 0]],
    ]


@pytest.mark.parametrize("capacity", [0.3, 1.0, 1.25, 100.0])
def test_no_token_has_more_than_k_and_no_expert_more_than_c(capacity: float) -> None:
    config = replace(SMALL, experts=4, top_k=2, capacity=capacity, expert_dropout=0.3)
    layer = experts(config).train()
    layer.watched = True
    mask = [[1] * 9 + [0] * 2, [0] * 4 + [1] * 7]
    x = called(layer, mask)
    layer(x, x.new_zeros(2, 11, 2))
    routing = layer.routing
    assert routing is not None
    assert routing.on.sum(-1).max() <= 2
    limits = [math.ceil(capacity * n * 2 / 4) for n in (9, 7)]
    assert layer.limit(routing.real, capacity).tolist() == limits
    for g, limit in enumerate(limits):
        assert routing.on[g].sum(0).max() <= limit
    assert torch.equal(routing.on & ~routing.chosen, torch.zeros_like(routing.on))
    assert not routing.on[~torch.tensor(mask).bool()].any(), "pads take no place"
    if capacity == 100.0:
        assert torch.equal(routing.on[routing.real], routing.chosen[routing.real])
    else:
        assert (dropped([layer]) > 0) == bool((routing.chosen & ~routing.on)[routing.real].any())


def test_a_token_over_the_limit_has_the_layer_alone() -> None:
    layer = experts(replace(SMALL, top_k=1, capacity=1.0)).train()
    x = called(layer, [[1] * 8])
    x[:] = x[:, :1]  # all to one expert, which takes 2 of 8
    y = torch.randn(1, 8, 2)
    out = layer(x, y)
    assert (out != y).any(-1)[0].tolist() == [True] * 2 + [False] * 6
    layer.eval()
    assert bool((layer(x, y) != y).any(-1).all()), "there is no limit outside of training"


def test_a_text_does_not_hear_of_later_tokens_or_other_texts() -> None:
    layer = experts(replace(SMALL, capacity=0.5)).train()
    x = called(layer, [[1] * 6, [1] * 6])
    y = torch.randn(2, 6, 2)
    out = layer(x, y)
    other = x.clone()
    other[1], other[0, 4:] = torch.randn(6, 3), torch.randn(2, 3)
    again = layer(other, y)
    assert torch.equal(out[0, :4], again[0, :4])
    assert not torch.equal(out[1], again[1])


def test_dropout_takes_experts_and_weighs_the_others_up() -> None:
    layer = experts(replace(SMALL, expert_dropout=0.5, top_k=4)).train()
    layer.watched = True
    x = called(layer, [[1] * 500])
    layer(x, x.new_zeros(1, 500, 2))
    assert layer.routing is not None
    share = layer.routing.chosen.float().mean()
    assert 0.45 < share < 0.55
    torch.testing.assert_close(layer.routing.p, (x @ layer.theta.T).softmax(-1))  # the loss's is whole
    y = torch.zeros(1, 500, 2)
    torch.manual_seed(3)
    outs = torch.stack([layer(x, y) for _ in range(200)])
    mean, whole = outs.mean(0), layer.eval()(x, y)
    assert (mean - whole).abs().mean() < 0.15 * whole.abs().mean()
    assert torch.equal(layer(x, y), whole), "none in evaluation"


# -- the loss --------------------------------------------------------------------------------------------------------


def test_uniform_routing_is_the_least() -> None:
    def routing(p: Tensor, chosen: Tensor) -> Routing:
        return Routing(p[None], chosen[None].bool(), chosen[None].bool(), torch.ones(1, len(p)).bool())

    uniform = routing(torch.full((4, 4), 0.25), torch.eye(4))
    assert balance_of(uniform).item() == pytest.approx(1)
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(4, 4)
    one = torch.tensor([[1, 0, 0, 0]]).expand(4, 4)
    assert balance_of(routing(p, one)).item() == pytest.approx(2.8)
    assert balance_of(routing(p, one * 0)).item() == 0


def test_loss_by_hand() -> None:
    layers = [experts(), experts(), experts()]
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    chosen = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]]).bool()
    layers[0].routing = Routing(p, chosen, chosen, torch.tensor([[True, True, False]]))
    half = torch.full_like(p, 0.25)
    layers[1].routing = Routing(half, torch.ones_like(chosen), chosen, torch.ones(1, 3).bool())
    with torch.no_grad():
        loss = Sira(experts=4, balance=0.1).loss(layers)
    # f = (1, 2, 1, 0) / 4, P = (.35, .4, .25, 0): 4 (.0875 + .2 + .0625) = 1.4; the second is 1, the third did not run
    assert loss.item() == pytest.approx(0.1 * (1.4 + 1) / 2)
    # of 4 + 12 choices 4 + 5 were taken
    assert dropped(layers).item() == pytest.approx(7 / 16)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("soft", [0, 3])
def test_pads_are_nowhere(side: str, soft: int) -> None:
    prompts = [PromptTuning(length=soft)] if soft else []
    stack = trained("llama", *prompts, capacity=0.8)
    plain = example_inputs(stack.model)
    plain["labels"] = plain["input_ids"].clone()
    plain["labels"][:, 0] = -100  # behind pads it would be predicted
    sides = (2, 0) if side == "left" else (0, 2)
    padded = {
        name: torch.nn.functional.pad(x, sides, value={"labels": -100, "input_ids": 5}.get(name, 0))
        for name, x in plain.items()
    }
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected, found = losses_of(stack, plain), losses_of(stack, padded)
    assert found["sira"] == pytest.approx(expected["sira"], rel=1e-5)
    assert found["task"] == pytest.approx(expected["task"], rel=1e-5)
    assert found["sira-dropped"] == pytest.approx(expected["sira-dropped"], abs=1e-6)
    assert expected["sira-dropped"] > 0.05
    unmasked = {name: x for name, x in padded.items() if name != "attention_mask"}
    assert losses_of(stack, unmasked)["sira"] != pytest.approx(expected["sira"], rel=1e-5)


def test_an_encoder_and_its_decoder_have_pads_of_their_own() -> None:
    stack = trained("t5", targets="attention cross_attention mlp")
    batch = example_inputs(stack.model, padding="right")
    batch["labels"] = batch.pop("decoder_input_ids")[:, :7].contiguous()
    batch["labels"][0, 4:] = -100
    seen: dict[str, set[int]] = {"source": set(), "target": set()}

    def count(outputs: object) -> Tensor:
        for part in stack.ledger.of("sira", DeltaPart):
            decoder = part.key.startswith("decoder")
            keys = "EncDecAttention" in part.key and part.key.endswith((".k", ".v"))
            seen["target" if decoder and not keys else "source"].add(int(part.module.routing.real.sum()))
        return torch.zeros(())

    step = TrainStep(stack, batch)
    step.add_loss("count", count)
    stack.run_train_step(step)
    assert seen == {"source": {9 + 7}, "target": {4 + 7}}


def test_images_and_summaries_have_no_pads() -> None:
    clip = trained("clip", capacity=None)
    inputs = example_inputs(clip.model, length=4, padding="right")
    for layer in layers_of(clip):
        layer.watched = True
    with torch.no_grad():
        clip.model(**inputs)
    for part in clip.ledger.of("sira", DeltaPart):
        real = part.module.routing.real
        assert real.sum() == (real.numel() if "vision" in part.path else 4 + 2), part.path
        assert len(real) == 2
    layer = experts()
    layer.call.begin({"input_ids": torch.ones(3, 8), "attention_mask": torch.ones(3, 8)})
    assert layer.real(torch.randn(3, 3)).shape == (3, 1)  # as in a pooler: each text by itself


def test_the_loss_trains_the_router_from_the_start() -> None:
    """B is zero, so the task says nothing to the router yet; with checkpointing the gradient is the same."""
    found = []
    for checkpointing in (False, True):
        stack = Stack(tiny("llama"), [Sira(experts=4, top_k=2, rank=2, expert_dropout=0.0)])
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        stack.model.train()
        inputs = example_inputs(stack.model)
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
        found.append([layer.theta.grad for layer in layers_of(stack)])
        assert all(layer.routing is None and not layer.watched for layer in layers_of(stack))
    assert all(float(g.abs().max()) > 1e-7 for g in found[0])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


def test_a_pass_without_gradients_is_not_part_of_the_loss() -> None:
    stack = trained()
    inputs = example_inputs(stack.model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    expected = losses_of(stack, batch)["sira"]
    step = TrainStep(stack, batch)

    def task() -> tuple[Tensor, Any]:
        outputs = step.forward()
        with torch.no_grad():
            stack.model(inputs["input_ids"][:, :4] + 1)
        return outputs.loss, outputs

    step.replace_task_loss(task)
    stack.run_train_step(step)
    assert step.losses["sira"] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_routers_are_in_full_precision(dtype: torch.dtype) -> None:
    layer = experts().to(dtype)
    layer.watched = True
    x = torch.randn(1, 5, 3).to(dtype)
    out = layer(x, x.new_zeros(1, 5, 2))
    assert out.dtype == dtype
    assert layer.routing is not None
    assert layer.routing.p.dtype == torch.promote_types(dtype, torch.float32)
    expected = (x.double() @ layer.theta.double().T).softmax(-1)
    assert torch.allclose(layer.routing.p.double(), expected, atol=1e-6)
    (narrow, *_) = layers_of(Stack(tiny("llama").to(torch.bfloat16), [Sira(experts=4, rank=2)]))
    assert narrow.theta.dtype == torch.float32


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"top_k 5 of 4 experts"):
        Sira(experts=4, top_k=5)
    assert Sira(experts=4, top_k=4).config.top_k == 4
    with pytest.raises(PeftxError, match=r"sira: 33 experts, and .* 32 numbers") as e:
        Stack(tiny("llama"), [Sira(experts=33)])
    assert str(e.value.hint) == "experts at most 32"
    Stack(tiny("llama"), [Sira(experts=32)])
    with torch.device("meta"), pytest.raises(PeftxError, match=r"sira: 1000000 experts, and .* 32 numbers"):
        Stack(tiny("llama").to("meta"), [Sira(experts=10**6)])
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PeftxError, match=r"sira: rank 64 exceeds"):
        Stack(model, [Sira(rank=64)])
    assert before.keys() == dict(model.named_parameters()).keys()


def test_reentrant_checkpointing_is_refused() -> None:
    stack = trained()
    stack.model.activation_checkpointing_enable({"use_reentrant": True})
    inputs = example_inputs(stack.model)
    with pytest.raises(UnsupportedError, match="sira: reentrant checkpointing hides the routers"):
        stack.train_step({**inputs, "labels": inputs["input_ids"]})


def test_a_step_in_which_none_ran_is_refused() -> None:
    with pytest.raises(PeftxError, match="sira: no layer with a router ran"):
        Sira().loss([experts()])
