from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peftx import Plugin, Stack
from peftx.errors import ConflictError, PeftxError, UnsupportedError
from peftx.kernel.members import Member
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_connected_adapters import Bottleneck, Connected, ConnectedAdapters
from peftx_nf4 import NF4Storage
from peftx_prefixquant import PrefixQuant
from peftx_signround import SignRound

test_conformance = conformance("connected-adapters")

LAYERS = {"llama": "model.layers", "bert": "bert.encoder.layer", "gpt2": "transformer.h"}


def layers_of(stack: Stack) -> list[Connected]:
    return [part.module for part in stack.ledger.of("connected-adapters", DeltaPart)]


def stack_of(arch: str = "llama", layers: int = 3, *, spread: float = 0.3) -> Stack:
    """A stack whose adapters do something."""
    name = "n_layer" if arch == "gpt2" else "num_hidden_layers"
    stack = Stack(tiny(arch, **{name: layers}), [ConnectedAdapters(inside=4, aside=3)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("connected-adapters"):
            parameter.normal_(0, spread, generator=generator)
    return stack


def frozen_layers(stack: Stack, arch: str) -> list[nn.Module]:
    return list(stack.model.get_submodule(LAYERS[arch]))


def gradients(stack: Stack) -> list[dict[str, float]]:
    """Norms of the gradients of a loss on the output, by layer and by part."""
    stack.model.zero_grad()
    output_of(stack.model, example_inputs(stack.model)).square().mean().backward()
    return [
        {
            name: sum(float(p.grad.norm()) for p in getattr(layer, name).parameters())
            for name in ("inside", "aside")
        }
        for layer in layers_of(stack)
    ]


def without_side_path(stack: Stack) -> Stack:
    """Adapters that are scattered: F_l = 0."""
    for layer in layers_of(stack):
        nn.init.zeros_(layer.aside.up.weight)
        nn.init.zeros_(layer.aside.up.bias)
    return stack


def cut(stack: Stack, arch: str) -> Stack:
    """No gradient goes through a frozen layer any more; what stands behind it is no part of it."""
    for layer in frozen_layers(stack, arch):
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
    return stack


# -- the equations ---------------------------------------------------------------------------------------------------


def written_out(part: Bottleneck, h: Tensor) -> Tensor:
    D, b_D, U, b_U = part.down.weight, part.down.bias, part.up.weight, part.up.bias
    return nn.functional.gelu(h @ D.T + b_D) @ U.T + b_U


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_equals_the_layers_written_by_hand(arch: str) -> None:
    stack = stack_of(arch)
    by_hand = tiny(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 3})
    s: list[Tensor | float] = [0.0]
    for index, (layer, own) in enumerate(
        zip(by_hand.get_submodule(LAYERS[arch]), layers_of(stack), strict=True)
    ):

        def behind(
            module: nn.Module, inputs: object, z: Tensor, own: Connected = own, index: int = index
        ) -> Tensor:
            h = z + written_out(own.inside, z + s[-1])
            s.append(s[-1] + written_out(own.aside, h))
            return h + s[-1] if index == 2 else h

        layer.register_forward_hook(behind)
    inputs = example_inputs(by_hand)
    with torch.no_grad():
        found, expected, base = (output_of(m, inputs) for m in (stack.model, by_hand, tiny(arch)))
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert len(s) == 4
    assert not torch.allclose(found, base, atol=0.1)


def test_bottleneck_by_hand() -> None:
    part = Bottleneck(2, 1)
    part.down.weight.data, part.down.bias.data = torch.tensor([[1.0, -1.0]]), torch.tensor([1.0])
    part.up.weight.data, part.up.bias.data = torch.tensor([[2.0], [3.0]]), torch.tensor([0.5, 0.0])
    # D h + b = 0 and 9: gelu gives 0 and 9
    found = part(torch.tensor([[0.0, 1.0], [9.0, 1.0]]))
    assert torch.allclose(found, torch.tensor([[0.5, 0.0], [18.5, 27.0]]))


@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "mamba"])
def test_starts_as_the_base_model(arch: str) -> None:
    stack = Stack(tiny(arch), [ConnectedAdapters(inside=5, aside=3)])
    inputs = example_inputs(stack.model)
    start = output_of(stack.model, inputs)
    with stack.disabled():
        assert torch.equal(output_of(stack.model, inputs), start)


def test_parameters_are_counted() -> None:
    d, m, k = 32, 5, 3
    stack = Stack(tiny("llama"), [ConnectedAdapters(inside=m, aside=k)])
    assert stack.trainable_parameters() == 2 * (2 * (m + k) * d + m + k + 2 * d)
    assert len(layers_of(Stack(tiny("t5"), [ConnectedAdapters()]))) == 4


# -- the path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_gradients_reach_every_module_past_the_frozen_layers(arch: str) -> None:
    """With all frozen layers cut, scattered adapters hear of the loss in the last layer alone."""
    scattered = gradients(cut(without_side_path(stack_of(arch)), arch))
    assert [g["inside"] > 0 for g in scattered] == [False, False, True]
    connected = gradients(cut(stack_of(arch), arch))
    assert all(g["inside"] > 1e-6 and g["aside"] > 1e-6 for g in connected)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_the_side_path_trains_from_the_first_step(arch: str) -> None:
    """At the start, where every U is zero, the gradient of each layer's F is that of the output, and no less."""
    stack = cut(stack_of(arch, spread=0.0), arch)
    bias = [layer.aside.up.bias for layer in layers_of(stack)]
    gradients(stack)
    for other in bias:
        assert other.grad is not None
        assert torch.equal(other.grad, bias[-1].grad)
    assert bias[0].grad.norm() > 1e-4


def test_what_frozen_layers_take_from_gradients_the_side_path_does_not() -> None:
    """12 layers that pass on half of the gradient: scattered, 2**-11 of it comes to the first."""
    found = {}
    for side in (True, False):
        for kept in (1.0, 0.5):
            stack = stack_of("bert", 12, spread=0.1)
            for layer in frozen_layers(stack, "bert"):
                layer.register_forward_pre_hook(
                    lambda module, inputs, kept=kept: (
                        kept * inputs[0] + (1 - kept) * inputs[0].detach(),
                        *inputs[1:],
                    )
                )
            found[side, kept] = gradients(stack if side else without_side_path(stack))[0]["inside"]
    assert found[False, 0.5] == pytest.approx(found[False, 1.0] / 2**11, rel=1e-3)
    assert found[True, 0.5] > found[True, 1.0] / 20


def way(loss: Tensor, to: nn.Parameter) -> list[str]:
    """Names of autograd's nodes on the shortest way from the loss to a parameter."""
    came: dict[Any, Any] = {loss.grad_fn: None}
    queue = deque(came)
    while queue:
        node = queue.popleft()
        if getattr(node, "variable", None) is to:
            break
        for further, _ in node.next_functions:
            if further is not None and further not in came:
                came[further] = node
                queue.append(further)
    names = []
    while node is not None:
        names.append(node.name().removesuffix("Backward0"))
        node = came[node]
    return names


def way_to_the_first(arch: str, layers: int, *, side: bool) -> Counter[str]:
    """Without the side path no node of it is in the graph."""
    stack = stack_of(arch, layers)
    for layer in layers_of(stack) if not side else ():
        layer.aside.requires_grad_(False)
        layer.aside.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out).detach())
    loss = output_of(stack.model, example_inputs(stack.model)).square().mean()
    return Counter(way(loss, layers_of(stack)[0].inside.up.weight))


@pytest.mark.parametrize(
    ("arch", "scattered"),
    [("llama", {"Add": 3}), ("gpt2", {"Add": 3}), ("bert", {"Add": 3, "NativeLayerNorm": 2})],
)
def test_the_shortest_way_of_a_gradient_grows_by_one_sum_a_layer(
    arch: str, scattered: dict[str, int]
) -> None:
    """Scattered, by two residual sums and the adapter's own; where a layer ends in its norms, by these too."""
    for side, each in ((True, {"Add": 1}), (False, scattered)):
        near, far = (way_to_the_first(arch, layers, side=side) for layers in (8, 12))
        assert far - near == {name: 4 * count for name, count in each.items()}


@pytest.mark.parametrize(("arch", "layers"), [("llama", 4), ("gpt2", 4), ("bert", 2)])
def test_in_few_layers_the_way_is_no_shorter(arch: str, layers: int) -> None:
    """The side path has a network between it and a layer's output, which residual connections have not."""
    connected, scattered, more = (
        way_to_the_first(arch, n, side=side)
        for n, side in ((layers, True), (layers, False), (layers + 1, True))
    )
    assert connected == scattered
    assert more.total() < way_to_the_first(arch, layers + 1, side=False).total()


def retrieval_loss(stack: Stack, queries: Tensor, passages: Tensor) -> Tensor:
    """In-batch negatives: of [B, T] ids each, mean states as vectors, whose products name the passage."""
    q, p = (
        stack.model(input_ids=ids, output_hidden_states=True).hidden_states[-1].mean(1)
        for ids in (queries, passages)
    )
    return nn.functional.cross_entropy(q @ p.T / 4, torch.arange(len(q)))


def test_a_retriever_is_trained_by_its_batch() -> None:
    """The paper's task: where all vectors are the same the loss is log(batch), and nothing can be learned; else all
    layers learn, and the frozen ones stay."""
    stack = Stack(tiny("bert", num_hidden_layers=3), [ConnectedAdapters(inside=4, aside=3)])
    stack.model.eval()
    same = torch.full((6, 5), 7)
    assert retrieval_loss(stack, same, same).item() == pytest.approx(math.log(6), abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    queries, passages = (torch.randint(3, 200, (6, 5), generator=generator) for _ in range(2))
    frozen = {name: p.clone() for name, p in stack.model.named_parameters() if not p.requires_grad}
    trained = [p for p in stack.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(25):
        loss = retrieval_loss(stack, queries, passages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert all(torch.equal(p, frozen[name]) for name, p in stack.model.named_parameters() if name in frozen)
    assert retrieval_loss(stack, same, same).item() == pytest.approx(math.log(6), abs=1e-5)


def test_an_adapter_reads_what_all_layers_before_it_handed_on() -> None:
    """The side path goes on where a layer's own output does not: cut, layer 3 still hears of F_1."""
    stack = stack_of()
    first, second, last = layers_of(stack)
    nn.init.zeros_(second.aside.up.weight)
    heard: list[Tensor] = []
    last.inside.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    cut(stack, "llama")
    output_of(stack.model, example_inputs(stack.model))
    (g,) = torch.autograd.grad(heard[0].sum(), first.aside.up.bias)
    assert torch.allclose(g, torch.full_like(g, float(heard[0][..., 0].numel())))  # ds_2 / ds_1 = 1


# -- calls -----------------------------------------------------------------------------------------------------------


def test_steps_with_a_cache_are_the_whole() -> None:
    stack = stack_of()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        whole = stack.model(ids).logits
        cache = DynamicCache()
        parts = [stack.model(part, past_key_values=cache).logits for part in ids.split([3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_text_is_the_same_beside_pads() -> None:
    stack = stack_of()
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 7, 8]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        together = stack.model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
        alone = stack.model(ids[1:, 2:]).logits
    torch.testing.assert_close(together[1:, 2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_gradients_are_those_of_checkpointing(arch: str) -> None:
    stack = stack_of(arch)
    stack.model.train()
    plain = gradients(stack)
    stack.model.activation_checkpointing_enable({"use_reentrant": False})
    for one, two in zip(plain, gradients(stack), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_states_keep_the_precision_they_had() -> None:
    part = Bottleneck(4, 2).to(torch.bfloat16)
    assert part(torch.randn(3, 4)).dtype == torch.float32
    assert part(torch.randn(3, 4).bfloat16()).dtype == torch.bfloat16


def test_two_towers_have_a_path_each() -> None:
    stack = Stack(tiny("t5"), [ConnectedAdapters(inside=4, aside=3)])
    paths = [(layer.path, layer.index, layer.last) for layer in layers_of(stack)]
    assert sorted(paths) == [
        (f"connected-adapters-{tower}", index, index == 1)
        for tower in ("decoder", "encoder")
        for index in (0, 1)
    ]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_layer_that_runs_alone_is_refused() -> None:
    stack = stack_of()
    second = layers_of(stack)[1]
    x = torch.randn(1, 4, 32)
    with pytest.raises(
        UnsupportedError, match="connected-adapters: layer 1 runs, and what the layers before"
    ):
        second(x, x)


def test_reentrant_checkpointing_is_refused() -> None:
    stack = stack_of()
    stack.model.train()
    stack.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        gradients(stack)


def test_two_calls_before_going_back_are_refused_with_checkpointing_alone() -> None:
    stack = stack_of()
    stack.model.train()
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])

    def loss() -> Tensor:
        return stack.model(first).logits.square().mean() + stack.model(second).logits.square().mean()

    loss().backward()
    stack.model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UnsupportedError, match="one call a step"):
        loss().backward()


def test_what_calibrates_layer_by_layer_has_to_come_first() -> None:
    def stack(*members: Plugin | Member) -> Stack:
        return Stack(tiny("llama"), list(members))

    early, late = (Member("signround", SignRound(), phase=f"{when}-training") for when in ("before", "after"))
    said = r"'(signround|prefixquant)' runs layers one by one.*'connected-adapters' works in calls of the whole model"
    for members in (
        (ConnectedAdapters(), PrefixQuant()),
        (ConnectedAdapters(), late),
        (late, ConnectedAdapters()),
    ):
        with pytest.raises(ConflictError, match=said):
            stack(*members)
    stack(early, ConnectedAdapters())
    stack(ConnectedAdapters(), early)
    stack(SignRound(), ConnectedAdapters())
    stack(ConnectedAdapters(), NF4Storage())  # without calibration


@pytest.mark.parametrize("option", ["inside", "aside"])
def test_widths_below_1_are_refused(option: str) -> None:
    with pytest.raises(PeftxError, match=f"ConnectedAdapters: {option}"):
        ConnectedAdapters(**{option: 0})
    assert getattr(ConnectedAdapters(**{option: 1}).config, option) == 1
