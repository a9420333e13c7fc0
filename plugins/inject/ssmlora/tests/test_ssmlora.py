from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peftx import Plugin, Stack
from peftx.errors import ConflictError, PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.members import Member
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_delta_come import DeltaCome
from peftx_nf4 import NF4Storage
from peftx_prompt_tuning import PromptTuning
from peftx_ssmlora import Ssmlora, SsmloraConfig, StateLora

test_conformance = conformance("ssmlora")


def layers_of(stack: Stack) -> dict[str, StateLora]:
    return {part.path: part.module for part in stack.ledger.of("ssmlora", DeltaPart)}


def stack_of(arch: str = "llama", *before: Plugin, layers: int = 5, **options: Any) -> Stack:
    """A stack whose adapters do something."""
    plugin = Ssmlora(**{"rank": 4, "alpha": 2.0, **options})
    stack = Stack(tiny(arch, num_hidden_layers=layers), [*before, plugin])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("ssmlora"):
            parameter.normal_(0, 0.5, generator=generator)
    return stack


def chain(*, count: int = 2, r: int = 3, **options: Any) -> list[StateLora]:
    """Adapters [3 -> 2] that hand on to each other, inside of a call that runs."""
    call, config = Call(), SsmloraConfig(**{"rank": r, "alpha": 2.0, **options})
    call.begin({"input_ids": torch.ones(12, 1)})
    built = [StateLora(3, 2, config, call, "chain", n).eval() for n in range(count)]
    torch.manual_seed(0)
    for layer in built:
        for parameter in layer.parameters():
            parameter.data = torch.randn_like(parameter)
    return built


# -- the equations ---------------------------------------------------------------------------------------------------


def test_two_adapters_written_out() -> None:
    one, two = chain()
    x, z, y = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2)
    found = one(x, y), two(z, y)
    for n in range(4):
        h = torch.zeros(3)
        for layer, token, out in zip((one, two), (x[n], z[n]), found, strict=True):
            u = layer.A @ token
            g = h + layer.C @ h + layer.D @ u
            h = (g - g.min()) / (g.max() - g.min() + 1e-8)
            torch.testing.assert_close(out[n], y[n] + 2 * layer.B @ (u + h))


def wave(*shape: int, by: float) -> Tensor:
    """Numbers that are the same everywhere."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * by).float().view(shape)


OFFICIAL = [
    *(1.8142952, -4.3696852, -2.4756479, 1.5491457, 4.0611763, 6.3648958, 1.0314429, -4.7297802),
    *(-4.5276585, -0.4874092, 5.1428242, 6.5453787, 2.1631613, -4.1320724, -4.3203373, 0.4197294),
    *(3.8147979, 6.4039488, 1.3361932, -4.5065145, -2.5718913, 0.8660225, 4.9266772, 6.7115722),
]
"""Of the second of two SSMLoRALayers with one key at commit a1a7447, on the weights and inputs of the test below."""


def test_equals_the_official_layers() -> None:
    for n, layer in enumerate(chain()):
        layer.A.data, layer.B.data = wave(3, 3, by=1.3 + n), wave(2, 3, by=0.7 + n)
        layer.C.data, layer.D.data = wave(3, 3, by=2.1 + n), wave(3, 3, by=0.9 + n)
        found = layer(2 * wave(12, 1, 3, by=0.4 + n), torch.zeros(12, 1, 2))
    assert torch.allclose(found.flatten(), torch.tensor(OFFICIAL), rtol=0, atol=2e-6)


def test_without_c_and_d_it_is_lora() -> None:
    for layer in chain(count=3):
        layer.C.data.zero_(), layer.D.data.zero_()
        x, y = torch.randn(5, 3), torch.randn(5, 2)
        torch.testing.assert_close(layer(x, y), y + 2 * x @ layer.A.T @ layer.B.T)


def test_states_carry_no_gradient() -> None:
    one, two = chain()
    one(torch.randn(4, 3), torch.zeros(4, 2))
    two(torch.randn(4, 3), torch.zeros(4, 2)).sum().backward()
    assert all(p.grad is None for p in one.parameters())
    assert all(bool(p.grad.any()) for p in two.parameters())


def test_gradients_of_c_and_d_in_the_first_steps() -> None:
    x = torch.randn(4, 3)
    for factor in (0.0, 1e-4):  # B at the start, and about what it is after a step
        (layer,) = chain(count=1)
        layer.C.data.zero_(), layer.D.data.zero_(), layer.B.data.mul_(factor)
        layer(x, torch.zeros(4, 2)).sum().backward()
        b = 2 * layer.B.sum(0)
        expected = (
            torch.outer(b - b.mean(), (x @ layer.A.T).sum(0)) / 1e-8
        )  # dh / dg = (1 - 1 1^T / r) / 1e-8
        torch.testing.assert_close(layer.D.grad, expected, rtol=1e-3, atol=0.0)
        assert not layer.C.grad.any()
        assert factor == 0 or layer.D.grad.norm() > 1e6 * layer.A.grad.norm()


def test_dropout_is_of_the_state_that_is_used_and_not_of_the_one_that_is_left() -> None:
    (layer,) = chain(count=1, dropout=0.5)
    layer.A.data.zero_()  # u = 0, and a state that is handed in
    layer.index, states = 1, layer.call.once("chain", dict)
    left = torch.tensor([0.0, 0.25, 1.0]).expand(4000, 3)
    states["left"] = left
    layer.C.data.zero_()
    layer.B.data = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    out = layer.train()(torch.zeros(4000, 3), torch.zeros(4000, 2))
    assert out[:, 0].unique().tolist() == [0.0, 1.0]  # 2 * 0.25 / (1 - 0.5)
    assert 0.45 < float((out[:, 1] > 0).float().mean()) < 0.55
    torch.testing.assert_close(states["left"], left)
    states.update({"left": left})
    states.pop(1)
    torch.testing.assert_close(layer.eval()(torch.zeros(4000, 3), torch.zeros(4000, 2)), 2 * left[:, 1:])


def test_start_and_number_of_parameters() -> None:
    stack = Stack(tiny("llama", num_hidden_layers=4), [Ssmlora(rank=4)])
    inputs = example_inputs(stack.model)
    start = output_of(stack.model, inputs)
    with stack.disabled():
        assert torch.equal(output_of(stack.model, inputs), start)
    by_hand = 0
    for path, layer in layers_of(stack).items():
        module = stack.model.get_submodule(path)
        by_hand += 4 * (module.in_features + module.out_features) + 2 * 4 * 4
        assert not any(p.any() for p in (layer.B, layer.C, layer.D))
    assert stack.trainable_parameters() == by_hand
    torch.manual_seed(0)
    wide = StateLora(4000, 2, SsmloraConfig(rank=4), Call(), "chain", 0)
    assert wide.A.std().item() == pytest.approx(0.5, rel=0.02)


# -- places ----------------------------------------------------------------------------------------------------------


def test_queries_of_even_layers_and_values_of_odd_ones() -> None:
    layers = layers_of(stack_of())
    path = "model.layers.{}.self_attn.{}_proj".format
    assert set(layers) == {path(n, "v" if n % 2 else "q") for n in range(5)}
    assert [layers[path(n, "q")].index for n in (0, 2, 4)] == [0, 1, 2]
    assert [layers[path(n, "v")].index for n in (1, 3)] == [0, 1]


def test_kinds_and_towers_have_a_chain_each() -> None:
    stack = Stack(tiny("t5"), [Ssmlora(rank=4, even="attention.q mlp.down", odd="attention.q")])
    chains = [layer.chain for layer in layers_of(stack).values()]
    assert len(set(chains)) == len(chains) == 6
    assert all(layer.index == 0 for layer in layers_of(stack).values())


def test_a_chain_goes_on_over_layers_without_an_adapter() -> None:
    """Of two adapters on the queries of layers 0 and 2 the second one hears of the first's D by the state alone."""
    stack = stack_of(layers=3)
    first = layers_of(stack)["model.layers.0.self_attn.q_proj"]
    heard: list[Tensor] = []
    second = layers_of(stack)["model.layers.2.self_attn.q_proj"]
    second.register_forward_hook(lambda module, inputs, out: heard.append(out - inputs[1]))
    nn.init.zeros_(first.B)  # its output is the base's
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        stack.model(ids)
        first.D.neg_()
        stack.model(ids)
    assert not torch.allclose(heard[0], heard[1], atol=1e-2)


# -- calls -----------------------------------------------------------------------------------------------------------


def test_two_forwards_are_the_same() -> None:
    stack = stack_of()
    inputs = example_inputs(stack.model)
    first = output_of(stack.model, inputs)
    stack.model(torch.tensor([[9, 8]]))
    assert torch.equal(output_of(stack.model, inputs), first)


def test_steps_with_a_cache_are_the_whole() -> None:
    stack = stack_of()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        whole = stack.model(ids).logits
        cache = DynamicCache()
        parts = [stack.model(part, past_key_values=cache).logits for part in ids.split([3, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [0, 3])
def test_a_text_is_the_same_beside_pads(soft: int) -> None:
    stack = stack_of("llama", *([PromptTuning(length=soft)] if soft else []))
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 7, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = stack.model(ids, attention_mask=mask, position_ids=places).logits
        alone = stack.model(ids[1:, 2:]).logits
    torch.testing.assert_close(together[1:, -2:], alone[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_of_checkpointing(reentrant: bool) -> None:
    stack = stack_of(dropout=0.0)
    stack.model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            stack.model.enable_input_require_grads()
            stack.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        stack.model.zero_grad()
        output_of(stack.model, example_inputs(stack.model)).square().mean().backward()
        found.append([p.grad.clone() for p in stack.ledger.parameters("ssmlora")])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_are_in_full_precision(dtype: torch.dtype) -> None:
    one, two = (layer.to(dtype) for layer in chain())
    y = torch.zeros(12, 1, 2, dtype=dtype)
    one(torch.randn(12, 1, 3).to(dtype), y)
    assert two(torch.randn(12, 1, 3).to(dtype), y).dtype == dtype
    assert two.call.once("chain", dict)["left"].dtype == torch.promote_types(dtype, torch.float32)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_layer_that_runs_alone_is_refused() -> None:
    layer = layers_of(stack_of())["model.layers.2.self_attn.q_proj"]
    with pytest.raises(
        UnsupportedError, match=r"ssmlora: adapter 1 of ssmlora-decoder-attention\.q-0 runs, and"
    ):
        layer(torch.randn(1, 4, 32), torch.randn(1, 4, 32))


@pytest.mark.parametrize("second", [[[8, 9, 10]], [[8, 9]]])
def test_two_calls_before_going_back_are_refused_with_checkpointing_alone(second: list[list[int]]) -> None:
    stack = stack_of()
    stack.model.train()

    def loss() -> Tensor:
        calls = (torch.tensor(ids) for ids in ([[5, 6, 7]], second))
        return torch.stack([stack.model(ids).logits.square().mean() for ids in calls]).sum()

    loss().backward()
    stack.model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UnsupportedError, match="one call a step"):
        loss().backward()


def test_a_layer_that_runs_again_is_told_by_what_it_reads() -> None:
    one, two = chain()
    x, u = torch.randn(12, 1, 3), torch.randn(12, 1, 3)
    one(x, torch.zeros(12, 1, 2))
    states = two.call.once("chain", dict)
    left = two.before(u, states)
    states["left"] = left + 1
    assert two.before(u + 1e-5, states) is left
    with pytest.raises(UnsupportedError, match="is not known"):
        two.before(u + 0.1, states)


def test_what_calibrates_layer_by_layer_has_to_come_first() -> None:
    def stack(*members: Plugin | Member) -> Stack:
        return Stack(tiny("llama"), list(members))

    late = Member("delta-come", DeltaCome(), phase="after-training")
    early = Member("delta-come", DeltaCome(), phase="before-training")
    for members in ((Ssmlora(rank=4), DeltaCome()), (late, Ssmlora(rank=4))):
        with pytest.raises(
            ConflictError,
            match=r"'delta-come' runs layers one by one.*'ssmlora' works in calls of the whole model",
        ):
            stack(*members)
    Stack(tiny("llama"), [early, Ssmlora(rank=4)], inject=False)  # compressed, and then injected into
    stack(NF4Storage(), Ssmlora(rank=4))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PeftxError, match="Ssmlora: rank"):
        Ssmlora(rank=1)
    assert Ssmlora(rank=2).config.rank == 2
    with pytest.raises(PeftxError, match="ssmlora: rank 64 exceeds"):
        Stack(tiny("llama"), [Ssmlora(rank=64)])
    with pytest.raises(PeftxError, match="ssmlora: lm_head is in no layer"):
        Stack(tiny("llama"), [Ssmlora(rank=4, odd="head")])
    with pytest.raises(PeftxError, match=r"ssmlora: .*'attention\.q' matches nothing"):
        Stack(tiny("mamba"), [Ssmlora(rank=4)])
