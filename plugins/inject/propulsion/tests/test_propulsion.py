from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peftx import Claim, Stack
from peftx.errors import ConflictError, MergeError, PeftxError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_propulsion import Propulsion, Push, PushOutput

test_conformance = conformance("propulsion")

W = torch.tensor([[0.5, -1.0, 0.25], [1.5, 0.75, -0.5]])
B = torch.tensor([0.1, -0.2])
X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.5, 3.0]])
Z = torch.tensor([1.02, 0.97])
G = torch.tensor([[1.0, -2.0], [0.5, 3.0]])  # gradient of the loss in y

# What the official `PropulsionLinear` gives for W, B, X, Z and G (float32): y, then the gradients of z, of the bias
# and of x. Made once by running that class outside this repository; the README says which commit.
OFFICIAL = {
    1: (
        [[-1.683, 3.201], [1.632, -1.2852501]],
        [-0.85, -10.575],
        [1.53, 0.97],
        [[-2.4, -2.475, 1.225], [4.62, 1.6725, -1.3275]],
    ),
    4: (
        [[-1.7860128, 2.9214666], [1.7318913, -1.1730131]],
        [-3.608107, -38.606071],
        [1.623648, 0.885293],
        [[-2.114663, -2.410371, 1.155901], [4.254426, 1.450693, -1.192635]],
    ),
    15: (
        [[-2.2206821, 2.0897298], [2.1533887, -0.8390583]],
        [-16.823349, -103.556198],
        [2.018802, 0.633252],
        [[-1.22682, -2.295745, 0.969718], [3.186099, 0.751882, -0.781644]],
    ),
}


def close(one: Tensor, two: Tensor | list[float] | list[list[float]], tolerance: float = 2e-6) -> bool:
    return torch.allclose(one, torch.as_tensor(two), rtol=tolerance, atol=tolerance)


def randomize(stack: Stack, spread: float = 0.02) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("propulsion"):
            parameter.add_(torch.randn_like(parameter), alpha=spread)


@pytest.mark.parametrize("degree", OFFICIAL)
def test_equals_the_official_layer(degree: int) -> None:
    push = Push(2, degree=degree, bias=True)
    push.z.data = Z.clone()
    x = X.clone().requires_grad_()
    y = push(x, x @ W.t() + B)
    y.backward(G)
    for ours, theirs in zip((y, push.z.grad, push.c.grad, x.grad), OFFICIAL[degree], strict=True):
        assert close(ours, theirs)


def test_equals_the_official_embedding() -> None:
    push = PushOutput(2, degree=15)
    push.z.data = Z.clone()
    rows = torch.tensor([[-0.75, 1.0], [0.5, -1.0]])
    y = push(torch.tensor([2, 0]), rows)
    y.backward(G)
    assert close(y, [[-1.0094010, 0.6332515], [0.6729340, -0.6332515]])  # official `PropulsionEmbedding`
    assert close(push.z.grad, [-9.8960876, -48.9627417])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_identity_at_start_is_exact(arch: str) -> None:
    model = tiny(arch)
    inputs = example_inputs(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        Stack(model, [Propulsion(targets="attention mlp embedding norm")])
        assert torch.equal(output_of(model, inputs), before)


@pytest.mark.parametrize("train_bias", [False, True])
def test_trainable_count(train_bias: bool) -> None:
    model = tiny("bert")
    sites = [s for s in Anatomy(model) if s.role.startswith(("attention.", "mlp.", "embedding"))]
    expected = sum(s.out_features for s in sites)
    expected += sum(s.bias.numel() for s in sites if s.kind == "linear") if train_bias else 0
    stack = Stack(model, [Propulsion(targets="attention mlp embedding", train_bias=train_bias)])
    assert stack.trainable_parameters() == expected == (928 if train_bias else 512)


@pytest.mark.parametrize(
    ("arch", "train_bias"), [("llama", False), ("gpt2", True), ("bert", True), ("t5", False)]
)
def test_merged_equals_wrapped(arch: str, train_bias: bool) -> None:
    model = tiny(arch)
    stack = Stack(model, [Propulsion(train_bias=train_bias)])
    inputs = example_inputs(model)
    with torch.no_grad():
        start = output_of(model, inputs)
        randomize(stack)
        wrapped = output_of(model, inputs)
        stack.merge()
        merged = output_of(model, inputs)
        stack.unmerge()
        assert torch.equal(output_of(model, inputs), wrapped)
    assert (wrapped - start).abs().max() > 0.1
    assert (wrapped - merged).abs().max() < 1e-5


def test_fold_is_the_formula() -> None:
    push = Push(2, degree=3, bias=True)
    push.z.data, push.c.data = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    weight, bias = push.fold(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0]))
    assert weight.tolist() == [[8.0, 16.0], [-3.0, -4.0]]  # an odd degree keeps the sign of z
    assert bias.tolist() == [12.0, 0.75]  # (1 + 0.5) * 8, (-1 + 0.25) * -1
    assert push.fold(torch.ones(2, 2), None)[1] is None
    plain = Push(2, degree=3)
    assert [name for name, _ in plain.named_parameters()] == ["z"]  # c is there where it is asked for


def test_even_degree_cannot_flip_signs() -> None:
    push = Push(1, degree=4)
    push.z.data = torch.tensor([-2.0])
    assert push(torch.ones(1, 1), torch.ones(1, 1)).item() == 16


@pytest.mark.parametrize("degree", [2, 15])
def test_gradient_gain_is_the_degree(degree: int) -> None:
    gradients = []
    for k in (1, degree):
        model = tiny("llama")
        stack = Stack(model, [Propulsion(degree=k)])
        inputs = example_inputs(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(torch.cat([p.grad for p in stack.ledger.parameters("propulsion")]))
    assert gradients[0].abs().max() > 1e-3
    assert close(gradients[1], degree * gradients[0], 1e-5)


def test_degree_one_is_ia3_on_outputs() -> None:
    from peft import IA3Config, get_peft_model

    ours, theirs = tiny("llama"), tiny("llama")
    stack = Stack(ours, [Propulsion(degree=1, targets="attention.k,v")])
    randomize(stack, 0.3)
    ia3 = get_peft_model(theirs, IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    vectors = [p for name, p in ia3.named_parameters() if "ia3_l" in name]
    gains = list(stack.ledger.parameters("propulsion"))
    assert len(vectors) == len(gains) == 4
    for vector, z in zip(vectors, gains, strict=True):
        vector.data = z.detach().clone().unsqueeze(-1)  # peft: [out, 1]
    inputs = example_inputs(ours, padding="left")
    one, two = (m(**inputs, labels=inputs["input_ids"]) for m in (ours, ia3))
    one.loss.backward()
    two.loss.backward()
    assert torch.equal(one.logits, two.logits)
    assert all(close(z.grad, v.grad.squeeze(-1)) for z, v in zip(gains, vectors, strict=True))


def test_positions_of_the_ablation() -> None:
    counts = {}
    for targets in ("attention.q,k,v", "mlp", "embedding", "attention mlp embedding"):
        model = tiny("llama")
        counts[targets] = Stack(model, [Propulsion(targets=targets)]).trainable_parameters()
    # 2 layers; q 32, k and v 16, o 32; gate and up 48, down 32; embedding 32
    assert counts == {"attention.q,k,v": 128, "mlp": 256, "embedding": 32, "attention mlp embedding": 480}


def test_embedding_is_scaled_and_stays_out_of_the_head() -> None:
    model = tiny("gpt2")  # head and embedding share their matrix
    stack = Stack(model, [Propulsion(degree=2, targets="embedding")])
    next(stack.ledger.parameters("propulsion")).data.fill_(
        3.0
    )  # of the tokens; the positions keep their gain
    ids = torch.tensor([[5, 6]])
    table = model.transformer.wte
    assert torch.equal(table(ids), 9 * table.weight[ids])
    assert torch.equal(model.lm_head(torch.ones(1, 32)), torch.ones(1, 32) @ table.weight.t())
    with pytest.raises(MergeError, match="'propulsion' cannot be merged"):
        stack.merge("propulsion")


OUTPUTS = [
    "attention mlp embedding",
    "mlp,norm",
    "norm.mlp",
    "embedding",
    r"attention re:norm$",
    "re:wte$ mlp",
]
"""Targets among which something does not fold; the last two by a regular expression."""


@pytest.mark.parametrize("targets", OUTPUTS)
def test_gains_of_outputs_leave_the_others_mergeable(targets: str) -> None:
    """Merging folds LoRA, and leaves the gains where they are."""
    from peftx_lora import Lora

    known = Claim.MERGEABLE not in Propulsion(targets=targets).claims
    assert known == ("re:" not in targets)  # before a model is there, where the words tell
    model = tiny("gpt2" if "wte" in targets else "llama")
    stack = Stack(model, [Lora(rank=2, targets="mlp.down"), Propulsion(targets=targets)])
    assert Claim.MERGEABLE not in stack.plugins["propulsion"].claims
    assert Claim.MERGEABLE in Propulsion.claims
    randomize(stack)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = example_inputs(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        stack.merge()
        assert stack.ledger.merged() == ["lora"]
        assert (output_of(model, inputs) - before).abs().max() < 1e-5


@pytest.mark.parametrize("targets", OUTPUTS)
def test_gains_of_outputs_are_refused_before_what_starts_from_merged_weights(targets: str) -> None:
    """When the stack is built, not after training."""
    from peftx_prefixquant import PrefixQuant

    model = tiny("gpt2" if "wte" in targets else "llama")
    with pytest.raises(ConflictError, match="starts from merged weights, and 'propulsion' does not fold"):
        Stack(model, [Propulsion(targets=targets), PrefixQuant()])
    Stack(model, [Propulsion(targets="attention mlp"), PrefixQuant()])  # and the model is as it was


@pytest.mark.parametrize("targets", ["attention mlp", "all !mlp.down", r"re:(q|v)_proj$", "mlp layers=0"])
def test_gains_of_linear_layers_merge(targets: str) -> None:
    stack = Stack(tiny("llama"), [Propulsion(targets=targets)])
    assert Claim.MERGEABLE in stack.plugins["propulsion"].claims
    stack.merge()
    assert stack.ledger.merged() == ["propulsion"]


def test_gains_stay_in_full_precision() -> None:
    model = tiny("llama").to(torch.bfloat16)
    stack = Stack(model, [Propulsion(targets="attention mlp embedding")])
    assert {p.dtype for p in stack.ledger.parameters("propulsion")} == {torch.float32}
    assert output_of(model, example_inputs(model)).dtype == torch.bfloat16


def test_the_power_is_taken_before_it_is_rounded() -> None:
    """Rounded before, z would be off by up to 2**-9, and its power by 15 times as much."""
    linear, output = Push(41, degree=15), PushOutput(41, degree=15)
    linear.z.data = output.z.data = torch.linspace(0.9, 1.1, 41)
    exact, ones = linear.z.data.double() ** 15, torch.ones(41, dtype=torch.bfloat16)
    weight, bias = linear.fold(ones[:, None], ones)
    for found in (linear(ones, ones), output(ones, ones), weight[:, 0], bias):
        assert found.dtype == torch.bfloat16
        assert float((found.double() / exact - 1).detach().abs().max()) <= 2**-8


def test_scales_after_the_low_rank_sum() -> None:
    from peftx_lora import Lora

    model = tiny("llama")
    stack = Stack(model, [Lora(rank=2, targets="mlp.down"), Propulsion(degree=1, targets="mlp.down")])
    torch.manual_seed(2)
    with torch.no_grad():
        for id in ("lora", "propulsion"):
            for parameter in stack.ledger.parameters(id):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    layer = model.model.layers[0].mlp.down_proj
    lora, push = layer.peftx["lora"], layer.peftx["propulsion"]
    x = torch.randn(3, 48)
    expected = push.z * nn.functional.linear(x, layer.weight + lora.scale * lora.B @ lora.A)
    assert close(layer(x), expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"degree": 0}, "degree"),
        ({"degree": 1.5}, "degree"),
        ({"targets": ""}, "targets"),
        ({"train_bias": 3}, "train_bias"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Propulsion: {match}") as caught:
        Propulsion(**options)
    assert "degree, targets, train_bias" in str(caught.value.hint)


def test_train_bias_needs_a_bias() -> None:
    with pytest.raises(PeftxError, match="train_bias, but no layer") as caught:
        Stack(tiny("llama"), [Propulsion(train_bias=True)])
    assert caught.value.hint == "leave train_bias out"


def test_unknown_target_names_the_roles() -> None:
    with pytest.raises(PeftxError, match=r"propulsion: .*'atention' matches nothing") as caught:
        Stack(tiny("llama"), [Propulsion(targets="atention")])
    assert "attention" in str(caught.value.hint)
