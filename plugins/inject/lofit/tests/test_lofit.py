from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Claim, Stack, TrainStep
from peftx.errors import MergeError, PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_lofit import Heads, Lofit
from peftx_lora import Lora

test_conformance = conformance("lofit")
PAIRS = ((0, 1), (1, 2), (1, 3))
test_conformance_of_given_heads = conformance("lofit", options={"heads": PAIRS}, models=["llama", "gpt2"])

ARCHES = ["llama", "gpt2", "bert", "t5", "gemma"]
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]

# What the official `LlamaAttention` (4 wide, 2 heads) gives for `wave` weights, input and gradient, with A, and with v
# on head 1: the output, then the gradient of A (of v, head 1). Made once outside this repository; see the README.
OFFICIAL = {
    "A": (
        [[1.0878457, 1.6733001, 1.8216788, 1.4942274], [1.6242396, 1.7247469, 1.3747426, 0.6656473]],
        [[-2.1120150, 0.5450333], [-0.6315301, 2.2423246]],
    ),
    "v": (
        [[0.9804074, 1.5978278, 1.7978864, 1.5283295], [1.1282923, 1.7264786, 1.8737004, 1.5315013]],
        [[-1.3619127, 1.7465217]],
    ),
}


def wave(*shape: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7 + shift).view(shape) * scale


def edits(stack: Stack) -> list[Heads]:
    return stack.plugins["lofit"].edits


def v_of(stack: Stack) -> Tensor:
    return edits(stack)[0].offsets[0].v


def spread(stack: Stack) -> Stack:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lofit"):
            parameter.normal_(std=0.3)
    return stack


def built(arch: str = "llama", **options: object) -> Stack:
    return Stack(tiny(arch), [Lofit(**options)], tokenizer=tiny_tokenizer())


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


@pytest.mark.parametrize("step", OFFICIAL)
def test_equals_the_official_layer(step: str) -> None:
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    stack = Stack(tiny("llama", **sizes), [Lofit(heads=((0, 1),)) if step == "v" else Lofit()])
    attention = stack.model.model.layers[0].self_attn
    for shift, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
        attention.get_submodule(name).weight.data = wave(4, 4, shift=shift)
    if step == "A":
        trained = edits(stack)[0].A
        trained.data = wave(2, 2, shift=5, scale=0.5)
    else:
        trained = v_of(stack)
        trained.data = wave(2, 2, shift=6, scale=0.5)[1:]
    x = wave(1, 2, 4, shift=4)
    rotary = stack.model.model.rotary_emb(x, torch.arange(2)[None])
    y = attention(x, position_embeddings=rotary, attention_mask=None)[0]
    y.backward(wave(1, 2, 4, shift=7))
    for ours, theirs in zip((y[0], trained.grad), OFFICIAL[step], strict=True):
        assert torch.allclose(ours, torch.tensor(theirs), atol=2e-6)


@pytest.mark.parametrize("heads", [1, PAIRS])
@pytest.mark.parametrize("arch", ARCHES)
def test_zeros_give_the_base_bit_for_bit(arch: str, heads: int | tuple[tuple[int, int], ...]) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding="right")
    with torch.no_grad():
        base = output_of(model, inputs)
        stack = Stack(model, [Lofit(heads=heads)])
        assert 0 < difference(output_of(model, inputs), base) < 0.2  # the first values are small, not zero
        for parameter in stack.ledger.parameters("lofit"):
            parameter.zero_()
        assert torch.equal(output_of(model, inputs), base)


def test_trainable_count() -> None:
    layers, heads, size = 2, 4, 8
    assert built(heads=PAIRS).trainable_parameters() == len(PAIRS) * size
    choosing = built(heads=3)
    assert choosing.trainable_parameters() == layers * heads * size + 3 * size
    choosing.plugins["lofit"].choose()
    assert choosing.trainable_parameters() == 3 * size
    # 3% of 8 heads.
    assert built().plugins["lofit"].top_heads() == built(heads=1).plugins["lofit"].top_heads()
    assert v_of(built("gemma", heads=PAIRS)).shape == (3, 16)  # heads wider than hidden / heads


def test_an_offset_acts_on_its_head_alone() -> None:
    edit = edits(built(heads=((0, 2), (1, 0), (0, 0))))[0]
    edit.offsets[0].v.data = torch.arange(24.0).view(3, 8)  # in the order of the pairs
    shift = edit.pre(torch.zeros(1, 32)).view(4, 8)
    assert shift[:, 0].tolist() == [16.0, 0.0, 0.0, 0.0]
    assert torch.equal(shift[2], torch.arange(8.0))
    assert torch.equal(shift[0], torch.arange(16.0, 24.0))
    assert shift[[1, 3]].abs().max() == 0


def test_heads_of_other_layers_may_be_wider() -> None:
    """Gemma 4: heads of 8 numbers in the first layer, of 16 in the two behind it; v is as wide as the widest."""
    stack = spread(built("gemma4", heads=((0, 3), (2, 1))))
    narrow, other, wide = edits(stack)
    assert v_of(stack).shape == (2, 16)
    shift = narrow.pre(torch.zeros(1, 32)).view(4, 8)
    assert torch.equal(shift[3], v_of(stack)[0, :8])
    assert shift[:3].abs().max() == 0
    assert other.shift() is None
    shift = wide.pre(torch.zeros(1, 64)).view(4, 16)
    assert torch.equal(shift[1], v_of(stack)[1])
    assert shift[[0, 2, 3]].abs().max() == 0
    choosing = built("gemma4", heads=3)
    assert [tuple(edit.A.shape) for edit in edits(choosing)] == [(4, 8), (4, 16), (4, 16)]
    choosing.train(ROWS, steps=4, batch_size=2, learning_rate=1e-2)
    assert len(choosing.plugins["lofit"].state["heads"]) == 3


def test_layers_may_differ_in_their_number_of_heads() -> None:
    """The ranking goes over the heads that each layer has."""
    stack = Stack(tiny("llama"), [Lofit(heads=3)], inject=False)
    facts = stack.anatomy.main
    fewer = replace(facts.by_layer[0], heads=2, head_dim=16, value_dim=16)
    stack.anatomy.towers["decoder"] = replace(facts, by_layer=(fewer, facts.by_layer[1]))
    stack.inject()
    assert [tuple(edit.A.shape) for edit in edits(stack)] == [(2, 16), (4, 8)]
    for edit in edits(stack):
        edit.A.data.zero_()
    edits(stack)[0].A.data[1], edits(stack)[1].A.data[3], edits(stack)[1].A.data[0] = 3.0, 2.0, 1.0
    assert stack.plugins["lofit"].top_heads() == [[0, 1], [1, 3], [1, 0]]


def test_a_layer_is_counted_as_the_model_counts_it() -> None:
    """Qwen3-Next: linear attention in layer 0, heads in layer 1 alone."""
    assert [edit.layer for edit in edits(built("qwen3_next", heads=((1, 2),)))] == [1]
    assert {layer for layer, _ in built("qwen3_next", heads=4).plugins["lofit"].top_heads()} == {1}
    with pytest.raises(PeftxError, match="there is no head 0 in layer 0") as caught:
        built("qwen3_next", heads=((0, 0),))
    assert caught.value.hint == "layers with heads: 1"


@pytest.mark.parametrize("arch", [*ARCHES, "bloom"])
def test_merged_is_a_bias(arch: str) -> None:
    """b' - b = sum_h W_O[:, h] v[h] in each layer, and the weights stay."""
    stack = spread(built(arch, heads=PAIRS))
    inputs = example_inputs(stack.model)
    places = [part.place for part in stack.ledger.of("lofit", DeltaPart)]
    weights = [place.weight.clone() for place in places]
    biases = [0 if place.bias is None else place.bias.clone() for place in places]
    with torch.no_grad():
        before = output_of(stack.model, inputs)
        stack.merge()
        assert difference(output_of(stack.model, inputs), before) < 1e-5
        for layer, place in enumerate(places):
            assert torch.equal(place.weight, weights[layer])
            W = place.weight.t() if arch == "gpt2" else place.weight  # Conv1D keeps it turned
            chosen = [(row, head) for row, (of, head) in enumerate(PAIRS) if of == layer]
            size = W.shape[1] // 4
            constant = sum(W[:, h * size : (h + 1) * size] @ v_of(stack)[row] for row, h in chosen)
            assert difference(place.bias - biases[layer], constant) < 1e-6


def test_the_first_step_merges_into_the_weight() -> None:
    stack = spread(built(heads=2))
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        before = output_of(stack.model, inputs)
        stack.merge()
        assert difference(output_of(stack.model, inputs), before) < 1e-5
    assert stack.model.model.layers[0].self_attn.o_proj.bias is None


def test_both_steps_in_one_training() -> None:
    stack = built(heads=2, selection=0.5)
    seen = []

    def watch(step: int, total: int, losses: dict[str, float]) -> None:
        norms = [float(edit.A.detach().abs().sum()) for edit in edits(stack)]
        seen.append((sum(norms), v_of(stack).detach().clone(), sorted(losses)))

    first = v_of(stack).detach().clone()
    report = stack.train(ROWS, steps=6, batch_size=2, learning_rate=1e-2, progress=watch)
    chosen = stack.plugins["lofit"].state["heads"]
    assert len(chosen) == 2
    assert all(torch.equal(v, first) for _, v, _ in seen[:3])
    assert [terms for _, _, terms in seen] == 3 * [["lofit", "task"]] + 3 * [["task"]]
    assert [norm > 0 for norm, _, _ in seen] == 3 * [True] + 3 * [False]
    # Adam begins v afresh: its first move is the learning rate of that step, not what stale moments make of it.
    assert abs(float((seen[3][1] - first).abs().max()) - 1e-2 / 2) < 1e-4
    assert report.trainable == 2 * 8


@pytest.mark.parametrize("every", [3, 4])
def test_a_run_resumes_after_the_choice(tmp_path: Path, every: int) -> None:
    """The kit resumes before it; here, in the second step and after the last."""
    options = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": every}
    straight, again = built(heads=2), built(heads=2)
    straight.train(ROWS, output=tmp_path, **options)
    again.train(ROWS, output=tmp_path, resume=tmp_path / f"checkpoint-{every}", **options)
    assert again.plugins["lofit"].state == straight.plugins["lofit"].state
    assert "heads" in again.plugins["lofit"].state
    inputs = example_inputs(straight.model)
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), output_of(straight.model, inputs))


def test_bundle_keeps_the_choice(tmp_path: Path) -> None:
    stack = built(heads=3)
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-1)
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert again.plugins["lofit"].state == stack.plugins["lofit"].state
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), output_of(stack.model, inputs))
    before = again.plugins["lofit"].state["heads"]
    again.train(ROWS, steps=2, batch_size=2)  # goes on with v
    assert again.plugins["lofit"].state["heads"] == before


def test_a_large_lambda_empties_the_scales() -> None:
    sums = []
    for l1 in (0.0, 100.0):
        stack = built(heads=2, selection=1, l1=l1)
        stack.train(ROWS, steps=20, batch_size=2, learning_rate=1e-3)
        sums.append(max(float(edit.A.detach().norm(dim=-1).max()) for edit in edits(stack)))
    assert sums[1] < 1e-3 < sums[0]


@pytest.mark.parametrize("planted", [(0, 2), (1, 1)])
def test_the_planted_head_ranks_first(planted: tuple[int, int]) -> None:
    """The task is the base model with one head tripled; the other heads could only imitate it."""
    layer, head = planted
    teacher, stack = tiny("llama"), built(heads=3, l1=1e-3)
    columns = slice(head * 8, (head + 1) * 8)
    teacher.model.layers[layer].self_attn.o_proj.weight.data[:, columns] *= 3
    inputs = example_inputs(teacher, batch=8, length=24)
    with torch.no_grad():
        wanted = teacher(**inputs).logits.softmax(-1)
    optimizer = torch.optim.AdamW(stack.ledger.parameters("lofit"), lr=3e-2, weight_decay=0)
    for _ in range(40):
        loss = F.cross_entropy(stack.model(**inputs).logits.flatten(0, 1), wanted.flatten(0, 1))
        loss = loss + 1e-3 * sum(edit.A.abs().sum() for edit in edits(stack))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stack.plugins["lofit"].top_heads()[0] == [layer, head]


def test_of_heads_with_one_norm_the_first_are_taken() -> None:
    """Of more than 16 an unstable sort takes others."""
    stack = Stack(tiny("llama", num_hidden_layers=6), [Lofit(heads=3)])
    with torch.no_grad():
        for edit in edits(stack):
            edit.A.fill_(0.5)
    assert stack.plugins["lofit"].top_heads() == [[0, 0], [0, 1], [0, 2]]


def test_top_heads_are_those_of_the_largest_norm() -> None:
    stack = built(heads=3)
    for edit in edits(stack):
        edit.A.data.zero_()
    edits(stack)[1].A.data[2, 0], edits(stack)[0].A.data[3, :] = 3.0, 1.0  # norms 3 and sqrt(8)
    edits(stack)[0].A.data[0, :2] = -2.0  # sum 4, norm sqrt(8) too: the earlier one first
    assert stack.plugins["lofit"].top_heads() == [[1, 2], [0, 0], [0, 3]]


def test_two_runs_with_rates_of_their_own() -> None:
    first = built(heads=2, selection=1)
    first.train(ROWS, steps=3, batch_size=2, learning_rate=5e-3)
    assert "heads" not in first.plugins["lofit"].state
    second = built(heads=first.plugins["lofit"].top_heads())
    start = v_of(second).detach().clone()
    report = second.train(ROWS, steps=3, batch_size=2, learning_rate=2e-2)
    assert report.trainable == 2 * 8
    assert report.terms.keys() == {"task"}
    assert not torch.equal(v_of(second), start)


def test_a_loop_of_your_own_chooses_when_told() -> None:
    stack, plugin = (stack := built(heads=2)), stack.plugins["lofit"]
    batch = example_inputs(stack.model)
    batch["labels"] = batch["input_ids"]
    optimizer = torch.optim.AdamW(stack.ledger.parameters("lofit"), lr=1e-2)
    for _ in range(3):
        stack.train_step(batch, optimizer=optimizer)
    wanted, start = plugin.top_heads(), v_of(stack).detach().clone()
    plugin.choose()
    stack.train_step(batch, optimizer=optimizer)
    plugin.choose()  # nothing more to choose
    assert plugin.state["heads"] == wanted == plugin.top_heads()
    assert not torch.equal(v_of(stack), start)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_scales_stay_zero_after_the_choice(set_to_none: bool) -> None:
    """Adam goes on by its momentum where a gradient is zeros and not None."""
    stack, plugin = (stack := built(heads=2)), stack.plugins["lofit"]
    batch = example_inputs(stack.model)
    batch["labels"] = batch["input_ids"]
    optimizer = torch.optim.AdamW(stack.ledger.parameters("lofit"), lr=1e-2)
    for step in range(4):
        if step == 2:
            plugin.choose()
        stack.train_step(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert not any(edit.A.any() for edit in edits(stack))


@pytest.mark.parametrize("way", ["frozen and unfrozen", "another unfrozen", "loaded", "resumed"])
def test_scales_that_were_thrown_away_do_not_train_again(way: str, tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Lofit(heads=2), Lora(rank=2)], tokenizer=tiny_tokenizer())
    options = {"steps": 4, "batch_size": 2, "checkpoint_every": 3}
    stack.train(ROWS, output=tmp_path, **options)
    match way:
        case "frozen and unfrozen":
            stack.freeze()
            stack.unfreeze()
        case "another unfrozen":
            stack.unfreeze("lora")
        case "loaded":
            bundle = stack.save(tmp_path / "bundle")
            stack = peftx.load(bundle, model=tiny("llama"), tokenizer=tiny_tokenizer())
        case "resumed":
            stack = Stack(tiny("llama"), [Lofit(heads=2), Lora(rank=2)], tokenizer=tiny_tokenizer())
            stack.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-3", **options)
    assert "heads" in stack.plugins["lofit"].state
    assert not any(edit.A.requires_grad for edit in edits(stack))
    assert v_of(stack).requires_grad
    lora = sum(p.numel() for p in stack.ledger.parameters("lora"))
    assert stack.trainable_parameters() == 2 * 8 + lora


def test_the_penalty_is_the_sum_of_magnitudes() -> None:
    stack = spread(built(heads=2, l1=0.1))
    batch = example_inputs(stack.model)
    step = TrainStep(stack, batch | {"labels": batch["input_ids"]})
    total = stack.run_train_step(step)
    magnitudes = sum(float(edit.A.detach().abs().sum()) for edit in edits(stack))
    assert step.losses["lofit"] == pytest.approx(magnitudes, rel=1e-5)
    assert float(total) == pytest.approx(step.losses["task"] + 0.1 * magnitudes, rel=1e-5)


def test_a_frozen_plugin_chooses_nothing() -> None:
    stack = Stack(tiny("llama"), [Lofit(heads=2), Lora(rank=2)], tokenizer=tiny_tokenizer())
    stack.freeze("lofit")
    stack.train(ROWS, steps=4, batch_size=2)
    assert "heads" not in stack.plugins["lofit"].state
    stack.unfreeze()
    stack.train(ROWS, steps=4, batch_size=2)
    assert len(stack.plugins["lofit"].state["heads"]) == 2


@pytest.mark.parametrize("heads", [2, PAIRS])
def test_over_a_quantized_projection(heads: int | tuple[tuple[int, int], ...]) -> None:
    """The edit moves inside attention, computes the same, and says that it does not fold."""
    plain, packed = tiny("llama"), tiny("llama")
    for layer in range(2):
        linear = plain.model.layers[layer].self_attn.o_proj
        quantized = QuantLinear.from_linear(linear, bits=8)
        packed.model.layers[layer].self_attn.o_proj = quantized
        linear.weight.data = quantized.weight.clone()
    stacks = [spread(Stack(model, [Lofit(heads=heads)])) for model in (plain, packed)]
    for one, two in zip(*(stack.ledger.parameters("lofit") for stack in stacks), strict=True):
        two.data = one.data.clone()
    inputs = example_inputs(plain)
    with torch.no_grad():
        assert difference(output_of(packed, inputs), output_of(plain, inputs)) < 1e-5
    assert Claim.MERGEABLE not in stacks[1].plugins["lofit"].claims
    with pytest.raises(MergeError, match="'lofit' cannot be merged"):
        stacks[1].merge("lofit")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 0}, "heads"),
        ({"heads": ((0, 1, 2),)}, "heads"),
        ({"selection": 0}, "selection"),
        ({"selection": 1.1}, "selection"),
        ({"l1": -1}, "l1"),
        ({"l1": float("inf")}, "l1"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Lofit: {match}") as caught:
        Lofit(**options)
    assert "heads, selection, l1" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("arch", "options", "match"),
    [
        ("llama", {"heads": 9}, "lofit: heads=9, and the model has 8"),
        (
            "llama",
            {"heads": ((0, 4),)},
            "lofit: there is no head 4 in layer 0\n  hint: layer 0 has heads 0 to 3",
        ),
        (
            "llama",
            {"heads": ((2, 0),)},
            "lofit: there is no head 0 in layer 2\n  hint: layers with heads: 0, 1",
        ),
        ("llama", {"heads": ((0, 1), (0, 1))}, "lofit: .*one twice"),
        ("llama", {"heads": ()}, "lofit: .*names none"),
        ("llama", {"heads": ((0, 1),), "l1": 0.1}, "lofit: selection and l1 .* are given"),
        ("mamba", {}, "lofit: mamba has no attention"),
    ],
)
def test_what_does_not_fit_the_model(arch: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        built(arch, **options)


@pytest.mark.parametrize(("selection", "steps"), [(0.1, 4), (0.9, 4)])
def test_too_few_steps_for_both(selection: float, steps: int) -> None:
    with pytest.raises(PeftxError, match=f"lofit: selection={selection} of {steps} training steps"):
        built(selection=selection).train(ROWS, steps=steps, batch_size=2)
