from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_hft import Hft, draw

test_conformance = conformance("hft")


def llama(layers: int = 6, **options: object) -> Stack:
    return Stack(tiny("llama", num_hidden_layers=layers), [Hft(**options)], tokenizer=tiny_tokenizer())


def trained_names(stack: Stack) -> set[str]:
    return {name for name, p in stack.model.named_parameters() if p.requires_grad}


def per_layer(stack: Stack, word: str) -> list[int]:
    """How many matrices whose name holds `word` train in each layer."""
    counts = Counter(name.split(".")[2] for name in trained_names(stack) if word in name)
    return [counts[str(i)] for i in range(stack.anatomy.num_layers)]


def train(stack: Stack, steps: int = 3, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    inputs = example_inputs(stack.model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        stack.train_step(batch, optimizer=optimizer)
    return optimizer


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_of_each_category_in_each_layer(seed: int) -> None:
    stack = Stack(tiny("llama", num_hidden_layers=6), [Hft(outside=False)], seed=seed)
    assert per_layer(stack, "self_attn") == [2] * 6
    assert per_layer(stack, "layernorm") == [1] * 6
    assert sorted(per_layer(stack, "mlp.")) == [1, 1, 1, 2, 2, 2]
    # Matrices differ in size (k, v: 16x32, q, o: 32x32, MLP: 48x32), so half of them is half of the numbers only about.
    block = sum(p.numel() for n, p in stack.model.named_parameters() if ".layers." in n)
    assert abs(stack.trainable_parameters() / block - 0.5) < 48 * 32 * 6 / block / 2


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_what_is_frozen_keeps_its_bits(arch: str) -> None:
    model = tiny(arch)
    stack = Stack(model, [Hft()])
    before = weights(model)
    inputs = example_inputs(model)
    labels = inputs.pop("decoder_input_ids") if "decoder_input_ids" in inputs else inputs["input_ids"]
    chosen = trained_names(stack)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for _ in range(3):
        stack.train_step({**inputs, "labels": labels}, optimizer=optimizer)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == chosen
    assert moved < before.keys()


def test_all_of_it_is_full_tuning() -> None:
    stack, plain = llama(2, fraction=1.0), tiny("llama")
    train(stack)
    inputs = example_inputs(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        plain(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = weights(plain)
    assert trained_names(stack) == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(stack.model).items())


def test_none_of_it_leaves_the_layers_alone() -> None:
    stack = llama(2, fraction=0.0)
    before = weights(stack.model)
    train(stack)
    after = weights(stack.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    }  # fmt: skip
    with pytest.raises(
        PeftxError, match=r"hft: fraction 0 of 18 matrices, and outside: false, train nothing"
    ):
        llama(2, fraction=0.0, outside=False)


def test_optimizer_state_is_half() -> None:
    def numbers(**options: object) -> int:
        state = train(llama(4, outside=False, **options), 1).state
        return sum(t.numel() for entry in state.values() for t in entry.values() if t.ndim)

    assert 0.4 < numbers() / numbers(fraction=1.0) < 0.6


def test_round_draws_again_and_the_same_round_the_same() -> None:
    drawn = [frozenset(trained_names(llama(round=i))) for i in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3
    shares = [len(drawn[0] & other) / len(drawn[0]) for other in drawn[1:3]]
    assert all(share < 0.9 for share in shares), shares  # embeddings, head and final norm are in all
    other_seed = Stack(tiny("llama", num_hidden_layers=6), [Hft()], seed=5)
    assert trained_names(other_seed) != drawn[0]


def test_two_stages_one_after_the_other(tmp_path: Path) -> None:
    """A matrix that only the first stage trained holds in the end what that stage gave it."""
    first = llama(2, outside=False)
    train(first)
    middle = weights(first.model)
    first.export(tmp_path / "stage-1")
    second = Stack(str(tmp_path / "stage-1"), [Hft(outside=False, round=1)], tokenizer=tiny_tokenizer())
    train(second)
    end = weights(second.model)
    only_first = trained_names(first) - trained_names(second)
    both = trained_names(first) & trained_names(second)
    assert only_first
    assert all(torch.equal(end[name], middle[name]) for name in only_first)
    assert not any(torch.equal(end[name], middle[name]) for name in both)


def test_level_layer_takes_whole_layers() -> None:
    stack = llama(6, level="layer", outside=False)
    counts = per_layer(stack, "model.layers")
    assert sorted(counts) == [0, 0, 0, 9, 9, 9]


def test_level_model_takes_any_half() -> None:
    stack = llama(6, level="model", outside=False)
    assert len(trained_names(stack)) == 27  # of 54
    assert per_layer(stack, "self_attn") != [2] * 6


def test_a_bias_trains_with_its_matrix() -> None:
    model = Stack(tiny("gpt2"), [Hft()]).model
    matrices = [m for m in model.transformer.h.modules() if getattr(m, "weight", torch.empty(0)).ndim == 2]
    assert {m.weight.requires_grad for m in matrices} == {True, False}
    assert all(m.bias.requires_grad == m.weight.requires_grad for m in matrices)


def test_fused_and_tied_matrices_are_one() -> None:
    names = trained_names(Stack(tiny("gpt2"), [Hft(outside=False)]))
    for layer in range(2):
        attention = {name.split(".")[4] for name in names if name.startswith(f"transformer.h.{layer}.attn")}
        assert len(attention) == 1  # c_attn, whole, or c_proj; each with its bias
    stack = Stack(tiny("gpt2"), [Hft(fraction=0.0)])
    assert stack.model.lm_head.weight is stack.model.transformer.wte.weight
    assert [part.key for part in stack.ledger.of("hft")] == [
        "transformer.wte", "transformer.wpe", "transformer.ln_f"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([3] * 4, 0.5, [1, 1, 2, 2]),
        ([4] * 3, 0.5, [2, 2, 2]),
        ([1] * 4, 0.25, [0, 0, 0, 1]),
        ([3] * 3, 1.0, [3, 3, 3]),
        ([10], 0.7, [7]),
        ([3, 1, 1, 1, 1], 1 - 5e-10, [1, 1, 1, 1, 3]),  # full layers get none of the spare ones
    ],
)
def test_draw_is_even(sizes: list[int], fraction: float, expected: list[int]) -> None:
    layers = [[(f"{i}.{j}",) for j in range(n)] for i, n in enumerate(sizes)]
    chosen = draw(layers, fraction, torch.Generator().manual_seed(0))
    assert len(set(chosen)) == len(chosen)
    found = Counter(unit[0].split(".")[0] for unit in chosen)
    assert sorted(found[str(i)] for i in range(len(sizes))) == expected


def test_every_matrix_gets_its_turn() -> None:
    layers = [[(j,) for j in range(4)]]
    counts = Counter(
        unit[0] for seed in range(200) for unit in draw(layers, 0.5, torch.Generator().manual_seed(seed))
    )
    assert all(70 < counts[j] < 130 for j in range(4)), counts


def test_every_layer_gets_the_spare_matrix_in_its_turn() -> None:
    """Three matrices a layer: the layers in which two train are a random half of the four."""
    layers = [[((i, j),) for j in range(3)] for i in range(4)]
    with_two: Counter[int] = Counter()
    for seed in range(200):
        chosen = draw(layers, 0.5, torch.Generator().manual_seed(seed))
        with_two.update(i for i, size in Counter(unit[0][0] for unit in chosen).items() if size == 2)
    assert all(70 < with_two[i] < 130 for i in range(4)), with_two


def test_the_choice_comes_back_from_a_bundle(tmp_path: Path) -> None:
    stack = llama(2, round=3)
    train(stack)
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        before = output_of(stack.model.eval(), inputs)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert trained_names(loaded) == trained_names(stack)
    with torch.no_grad():
        assert torch.equal(output_of(loaded.model.eval(), inputs), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fraction": -0.1}, "fraction"),
        ({"fraction": 1.1}, "fraction"),
        ({"level": "head"}, "level"),
        ({"round": -1}, "round"),
        ({"outside": "some"}, "outside"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Hft: {match}"):
        Hft(**options)


def test_two_of_them_cannot_train_the_same_matrix() -> None:
    with pytest.raises(PeftxError, match="both train the base's"):
        Stack(tiny("llama"), [("one", Hft()), ("two", Hft(round=1))])


def test_quantized_matrices_are_refused() -> None:
    from peftx.toolkits.compression import QuantLinear

    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = QuantLinear.from_linear(mlp.down_proj, bits=8)
    with pytest.raises(PeftxError, match=r"hft: .*down_proj is quantized"):
        Stack(model, [Hft(fraction=1.0)])
