from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx import Claim, Stack
from peftx.errors import PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_bottleneck_adapter import Adapter, BottleneckAdapter, Input, NormAdapter, ParallelAdapter

test_conformance = conformance("bottleneck-adapter")
test_conformance_pfeiffer = conformance(
    "bottleneck-adapter", options={"form": "pfeiffer", "train_norms": True}, models=["llama", "bert"]
)
test_conformance_parallel = conformance(
    "bottleneck-adapter", options={"form": "parallel", "train_norms": True}, models=["gpt2", "bert"]
)

FORMS = ("houlsby", "pfeiffer", "parallel")
Change = Callable[[Tensor], Tensor]


def adapters_of(stack: Stack) -> dict[str, Adapter]:
    """By the path of the module they stand on."""
    parts = stack.ledger.of("bottleneck-adapter", DeltaPart)
    return {part.path: part.module for part in parts if isinstance(part.module, Adapter)}


def randomised(arch: str, form: str, **options: Any) -> Stack:
    """A stack whose adapters are not the identity."""
    stack = Stack(tiny(arch), [BottleneckAdapter(form=form, bottleneck=6, **options)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters_of(stack).values():
            for p in adapter.parameters():
                p.normal_(0, 0.3, generator=generator)
    return stack


def written_out(adapter: Adapter, f: Change, s: float) -> Change:
    """s A by the equation, on copies of the weights."""
    D, b_D, U, b_U = (p.detach().clone() for p in adapter.parameters())
    return lambda h: s * (f(h @ D.t() + b_D) @ U.t() + b_U)


# ------------------------------------------------------------------------- the papers' layers, written by hand
def pre_norm(model: PreTrainedModel, form: str, layers: str, attention: str, A: dict[str, Change]) -> None:
    """Llama and GPT-2: z = h + attention(LN(h)), y = z + mlp(LN(z)), with adapters in their places."""

    def behind(module: nn.Module, change: Change) -> None:
        def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            first = first + change(first)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        module.register_forward_hook(hook)

    for i, layer in enumerate(model.get_submodule(layers)):
        path = f"{layers}.{i}"
        if form == "houlsby":
            behind(getattr(layer, attention), A[f"{path}.{attention}"])
            behind(layer.mlp, A[f"{path}.mlp"])
        elif form == "pfeiffer":
            behind(layer, A[path])
        else:
            layer.mlp.register_forward_hook(lambda m, x, h, change=A[f"{path}.mlp"]: h + change(x[0]))


def post_norm(model: PreTrainedModel, form: str, A: dict[str, Change]) -> None:
    """BERT: a = LN(h + attention(h)), y = LN(a + mlp(a)), with adapters in their places."""

    def output(module: nn.Module, change: Change, form: str) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            h, r, LN = module.dense(hidden_states), input_tensor, module.LayerNorm
            if form == "houlsby":
                return LN(r + h + change(h))
            if form == "pfeiffer":
                return LN(r + h + change(LN(r + h)))
            return LN(r + h + change(r))  # r is what went into the feed-forward block

        return forward

    for i, layer in enumerate(model.bert.encoder.layer):
        path = f"bert.encoder.layer.{i}"
        if form == "houlsby":
            place = layer.attention.output
            place.forward = output(place, A[f"{path}.attention.output.dense"], form)
        place = f"{path}.output.{'LayerNorm' if form == 'pfeiffer' else 'dense'}"
        layer.output.forward = output(layer.output, A[place], form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_equals_the_layers_written_by_hand(arch: str, form: str) -> None:
    stack = randomised(arch, form)
    f = nn.functional.gelu if form == "houlsby" else torch.relu
    s = 4.0 if form == "parallel" else 1.0
    A = {path: written_out(adapter, f, s) for path, adapter in adapters_of(stack).items()}
    assert len(A) == (4 if form == "houlsby" else 2)
    by_hand = tiny(arch)
    if arch == "bert":
        post_norm(by_hand, form, A)
    else:
        layers, attention = {"llama": ("model.layers", "self_attn"), "gpt2": ("transformer.h", "attn")}[arch]
        pre_norm(by_hand, form, layers, attention, A)
    inputs = example_inputs(by_hand)
    with torch.no_grad():
        found, expected, base = (output_of(m, inputs) for m in (stack.model, by_hand, tiny(arch)))
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, base, atol=0.1)


@pytest.mark.parametrize("arch", ["bart", "opt", "bloom"])
def test_beside_blocks_whose_module_is_not_called(arch: str) -> None:
    """What goes into the first matrix is the block's input; the change goes onto what the second one gives."""
    stack = randomised(arch, "parallel")
    by_hand = tiny(arch)
    seen: dict[str, Tensor] = {}
    for path, adapter in adapters_of(stack).items():
        change, second = written_out(adapter, torch.relu, 4.0), by_hand.get_submodule(path)
        parent, _, name = path.rpartition(".")
        first = by_hand.get_submodule(f"{parent}.{ {'fc2': 'fc1', 'dense_4h_to_h': 'dense_h_to_4h'}[name] }")
        first.register_forward_hook(lambda m, x, y, path=path: seen.update({path: x[0]}))
        second.register_forward_hook(
            lambda m, x, y, path=path, change=change: y + change(seen[path]).view_as(y)
        )
    inputs = example_inputs(by_hand)
    with torch.no_grad():
        found, expected, base = (output_of(m, inputs) for m in (stack.model, by_hand, tiny(arch)))
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, base, atol=0.1)


# ------------------------------------------------------------------------------------------------ one adapter
def small(kind: type[Adapter], *, nonlinearity: str = "relu", scale: float = 1.0) -> Adapter:
    """D = [1, -1], b_D = 1, U = [2, 3], b_U = [0.5, 0]."""
    adapter = kind(2, bottleneck=1, nonlinearity=nonlinearity, scale=scale)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
        adapter.down.bias.fill_(1.0)
        adapter.up.weight.copy_(torch.tensor([[2.0], [3.0]]))
        adapter.up.bias.copy_(torch.tensor([0.5, 0.0]))
    return adapter


def test_numbers_by_hand() -> None:
    x, y = torch.tensor([[9.0, 9.0]]), torch.tensor([[4.0, 1.0]])
    # D y + b = 4, A(y) = (8.5, 12); D x + b = 1, A(x) = (2.5, 3)
    assert small(Adapter)(x, y).tolist() == [[12.5, 13.0]]
    assert small(Adapter, scale=2.0)(x, y).tolist() == [[21.0, 25.0]]
    assert small(ParallelAdapter, scale=2.0)(x, y).tolist() == [[9.0, 7.0]]
    # the norm halves: LN(z + A(LN(z))), LN(z) = (2, 0.5), D LN(z) + b = 2.5, A = (5.5, 7.5)
    assert small(NormAdapter).around(lambda z: z / 2, y).tolist() == [[4.75, 4.25]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("relu", 0.0), ("gelu", -0.1586553), ("silu", -0.2689414), ("tanh", -0.7615942)],
)
def test_nonlinearities(name: str, value: float) -> None:
    h = torch.tensor([[0.0, 2.0]])  # D h + b = -1
    change = small(Adapter, nonlinearity=name).change(h)
    assert torch.allclose(change, torch.tensor([[2 * value + 0.5, 3 * value]]), atol=1e-6)


def test_what_follows_from_the_form() -> None:
    found = {form: BottleneckAdapter(form=form).options for form in FORMS}
    assert found["houlsby"] == {"bottleneck": 64, "nonlinearity": "gelu", "scale": 1.0}
    assert found["pfeiffer"] == {"bottleneck": 64, "nonlinearity": "relu", "scale": 1.0}
    assert found["parallel"] == {"bottleneck": 64, "nonlinearity": "relu", "scale": 4.0}
    told = BottleneckAdapter(form="parallel", bottleneck=5, nonlinearity="tanh", scale=0.5).options
    assert told == {"bottleneck": 5, "nonlinearity": "tanh", "scale": 0.5}


def test_start() -> None:
    torch.manual_seed(0)
    adapter = Adapter(400, bottleneck=8, nonlinearity="relu", scale=1.0)
    assert 0.99 / 20 < float(adapter.down.weight.detach().abs().max()) <= 1 / 20
    assert not any(p.any() for p in (adapter.down.bias, adapter.up.weight, adapter.up.bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "llama4"])
def test_identity_at_the_start_to_the_bit(arch: str, form: str) -> None:
    stack = Stack(tiny(arch), [BottleneckAdapter(form=form)])
    inputs = example_inputs(stack.model)
    start = output_of(stack.model, inputs)
    with stack.disabled():
        assert torch.equal(output_of(stack.model, inputs), start)


# --------------------------------------------------------------------------------------------------- places
@pytest.mark.parametrize(
    ("arch", "form", "places"),
    [
        ("llama", "houlsby", ["self_attn", "mlp"]),
        ("llama", "pfeiffer", [""]),
        ("gemma2", "houlsby", ["self_attn", "mlp"]),  # before the norm that follows a block there
        ("gemma2", "pfeiffer", [""]),
        ("bert", "houlsby", ["attention.output.dense", "output.dense"]),
        ("bert", "pfeiffer", ["output.LayerNorm"]),
        ("roberta", "pfeiffer", ["output.LayerNorm"]),
        ("vit", "pfeiffer", [""]),  # an encoder whose norms stand before the blocks
    ],
)
def test_places(arch: str, form: str, places: list[str]) -> None:
    stack = Stack(tiny(arch), [BottleneckAdapter(form=form)])
    layers = {s.layer: s.path for s in stack.anatomy.sites if s.role == "block.layer"}
    expected = {f"{path}.{place}".rstrip(".") for path in layers.values() for place in places}
    assert set(adapters_of(stack)) == expected


def test_both_towers_and_no_adapter_behind_cross_attention() -> None:
    for form, count in (("houlsby", 8), ("pfeiffer", 4), ("parallel", 4)):
        paths = set(adapters_of(Stack(tiny("t5"), [BottleneckAdapter(form=form)])))
        assert len(paths) == count
        assert not any("EncDecAttention" in path for path in paths)
    bart = set(adapters_of(Stack(tiny("bart"), [BottleneckAdapter(form="pfeiffer")])))
    assert {path.rpartition(".")[2] for path in bart} == {"final_layer_norm"}


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize(("form", "adapters"), [("houlsby", 4), ("pfeiffer", 2), ("parallel", 2)])
def test_number_of_parameters(form: str, adapters: int, m: int) -> None:
    d = 32
    stack = Stack(tiny("llama"), [BottleneckAdapter(form=form, bottleneck=m, train_norms=False)])
    assert stack.trainable_parameters() == adapters * (2 * m * d + d + m)
    with_norms = Stack(tiny("llama"), [BottleneckAdapter(form=form, bottleneck=m, train_norms=True)])
    assert with_norms.trainable_parameters() == stack.trainable_parameters() + 5 * d


def test_norms_train_with_houlsby_and_come_back() -> None:
    def trained(form: str) -> set[str]:
        model = Stack(tiny("bert"), [BottleneckAdapter(form=form)]).model
        return {name for name, p in model.named_parameters() if p.requires_grad and "LayerNorm" in name}

    assert len(trained("houlsby")) == 2 * (2 * 2 + 1 + 1)
    assert not {name for name in trained("pfeiffer") if ".peftx." not in name}
    assert not trained("parallel")
    assert Claim.TRAINS_BASE in BottleneckAdapter().claims
    assert Claim.TRAINS_BASE not in BottleneckAdapter(train_norms=False).claims
    assert Claim.TRAINS_BASE not in BottleneckAdapter(form="pfeiffer").claims
    assert Claim.TRAINS_BASE in BottleneckAdapter(form="pfeiffer", train_norms=True).claims
    stack = Stack(tiny("llama"), [BottleneckAdapter()])
    before = stack.model.model.norm.weight.detach().clone()
    nn.init.zeros_(stack.model.model.norm.weight)
    stack.remove("bottleneck-adapter")
    assert torch.equal(stack.model.model.norm.weight, before)


# ----------------------------------------------------------------------------------- the input that is noted
def test_a_noted_input_is_let_go() -> None:
    stack = randomised("bert", "parallel")
    output_of(stack.model, example_inputs(stack.model))
    notes = [
        p.module for p in stack.ledger.of("bottleneck-adapter", DeltaPart) if isinstance(p.module, Input)
    ]
    assert len(notes) == 2
    assert all(note.x is None for note in notes)


def test_a_copy_notes_its_own() -> None:
    model = randomised("bert", "parallel").model
    inputs = example_inputs(model)
    again = copy.deepcopy(model)
    assert torch.equal(output_of(again, inputs), output_of(model, inputs))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_checkpointing(form: str) -> None:
    stack = randomised("bert", form)
    inputs = example_inputs(stack.model)
    stack.model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            stack.model.activation_checkpointing_enable()
        stack.model.zero_grad()
        output_of(stack.model, inputs).square().sum().backward()
        grads = [p.grad for a in adapters_of(stack).values() for p in a.parameters()]
        assert all(grad is not None and grad.any() for grad in grads)
        found.append([grad.clone() for grad in grads])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "options",
    [
        {"form": "adapterdrop"},
        {"bottleneck": 0},
        {"nonlinearity": "sine"},
        {"scale": 0.0},
        {"scale": float("inf")},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"BottleneckAdapter: {next(iter(options))}"):
        BottleneckAdapter(**options)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_the_blocks_is_refused(form: str) -> None:
    with pytest.raises(PeftxError, match=r"bottleneck-adapter: .*'block\.mlp' matches nothing"):
        Stack(tiny("mamba"), [BottleneckAdapter(form=form)])
