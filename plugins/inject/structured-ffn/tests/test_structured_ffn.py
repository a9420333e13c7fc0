from __future__ import annotations

import gc
import math
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.evaluation import Score
from peftx_hypertuning import Hypertuning
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_structured_ffn import Structured, StructuredFfn

test_conformance = conformance("structured-ffn")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
FORMS: list[dict[str, Any]] = [
    {"form": "low-rank", "rank": 4},
    {"form": "block-dense", "rank": 4, "blocks": 2},
    {"form": "block-shuffle", "blocks": 2},
]


def stack_of(*before: Any, **options: Any) -> Stack:
    return Stack(tiny("llama"), [*before, StructuredFfn(**options)], tokenizer=tiny_tokenizer())


def layers_of(stack: Stack) -> list[Structured]:
    return stack.plugins["structured-ffn"].layers  # type: ignore[attr-defined]


def layer(
    o: int, i: int, p: int, q: int, middle: int, *, guided: bool = False, premerge: int = 0
) -> Structured:
    """With factors that say something, and a guide that says something else."""
    torch.manual_seed(0)
    built = Structured(nn.Parameter(torch.randn(o, i)), (p, q), middle, guided=guided, premerge=premerge)
    for parameter in built.parameters():
        parameter.data = torch.randn_like(parameter)
    return built


def ledger_names(stack: Stack) -> set[str]:
    return set(stack.ledger.tensors("structured-ffn"))


def base(built: Structured, x: Tensor) -> Tensor:
    return built.base(x, built.own[0], None)


# -- the forms -------------------------------------------------------------------------------------------------------


def test_low_rank_and_block_dense_by_hand() -> None:
    x = torch.randn(2, 5, 6)
    built = layer(4, 6, 1, 1, 3)
    torch.testing.assert_close(base(built, x), x @ built.D[0].T @ built.U[0].T)
    built = layer(4, 6, 1, 2, 2)  # r = 4, two blocks [2, 3]
    middle = torch.stack((x[..., :3] @ built.D[0].T, x[..., 3:] @ built.D[1].T), -1)  # [.., 2, part]
    torch.testing.assert_close(base(built, x), middle.flatten(-2) @ built.U[0].T)


def test_block_shuffle_by_hand() -> None:
    """Index s of block j of the first goes to place s b + j, and index s of block k of the second to output s b + k."""
    built, x, b = layer(12, 8, 2, 2, 4), torch.randn(8), 2
    middle = torch.zeros(8)
    for j in range(b):
        for s in range(4):
            middle[s * b + j] = built.D[j, s] @ x[4 * j : 4 * j + 4]
    y = torch.zeros(12)
    for k in range(b):
        for s in range(6):
            y[s * b + k] = built.U[k, s] @ middle[4 * k : 4 * k + 4]
    torch.testing.assert_close(base(built, x), y)


def test_one_block_is_low_rank() -> None:
    one = stack_of(form="block-dense", blocks=1, rank=4, guided=0)
    two = stack_of(form="low-rank", rank=4, guided=0)
    x = example_inputs(one.model)
    with torch.no_grad():
        assert torch.equal(one.model(**x).logits, two.model(**x).logits)


@pytest.mark.parametrize("options", FORMS)
def test_parameters_and_multiplications_are_counted(options: dict[str, Any]) -> None:
    model = tiny("llama", hidden_size=32, intermediate_size=48)
    stack = Stack(model, [StructuredFfn(guided=0, **options)])
    r, b = options.get("rank", 0), options.get("blocks", 1)
    for built in layers_of(stack):
        o, i = built.own[0].shape
        expected = {
            "low-rank": r * (i + o),
            "block-dense": r * i // b + o * r,
            "block-shuffle": min(i, o) * (i + o) // b,
        }[options["form"]]
        numbers = sum(p.numel() for p in built.parameters())
        assert numbers == expected
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            base(built, torch.randn(7, i))
        assert counter.get_total_flops() == 2 * 7 * numbers, (
            "a multiplication and an addition a parameter and token"
        )


def test_the_rank_that_is_left_out_leaves_a_third() -> None:
    for options in ({}, {"form": "block-dense"}, {"form": "block-dense", "blocks": 2}):
        for built in layers_of(stack_of(guided=0, **options)):
            share = sum(p.numel() for p in built.parameters()) / built.own[0].numel()
            assert 0.2 < share <= 0.32, options
            assert len(built.D) == (1 if not options else options.get("blocks", 4))
    assert layers_of(stack_of(form="block-shuffle", guided=0))[0].U.shape[0] == 4


@pytest.mark.parametrize("options", FORMS)
def test_it_is_faster_than_the_dense_layer(options: dict[str, Any]) -> None:
    o = i = 1024
    p, q, middle = {"low-rank": (1, 1, 128), "block-dense": (1, 2, 80), "block-shuffle": (4, 4, 256)}[
        options["form"]
    ]
    built, x = layer(o, i, p, q, middle), torch.randn(256, i)

    def seconds(function: Any) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    with torch.no_grad():
        pairs = [
            (seconds(lambda: base(built, x)), seconds(lambda: F.linear(x, built.own[0]))) for _ in range(7)
        ]
    assert statistics.median(one / two for one, two in pairs) < 0.85


# -- first values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q", "middle"), [(1, 1, 3), (1, 2, 2), (2, 2, 4), (2, 2, 2)])
def test_the_start_is_the_nearest_map(p: int, q: int, middle: int) -> None:
    """A matrix of the form comes back; of another one what is left over is the tail of the SVD of each block."""
    built = layer(8, 12, p, q, middle)
    of_form = built.matrix().detach()
    with torch.no_grad():
        built.approximate(of_form)
    torch.testing.assert_close(built.matrix(), of_form, rtol=1e-4, atol=1e-4)
    weight = torch.randn(8, 12)
    with torch.no_grad():
        built.approximate(weight)
    tail = 0.0
    for k in range(p):
        for j in range(q):
            block = weight[k::p, 12 // q * j : 12 // q * (j + 1)]
            tail += float(torch.linalg.svdvals(block)[middle // p :].square().sum())
    found = float((built.matrix() - weight).square().sum().detach())
    assert found == pytest.approx(tail, rel=1e-4)
    assert float((built.D.square().sum() / built.U.square().sum()).detach()) == pytest.approx(1, rel=1e-4)


def test_full_rank_changes_nothing() -> None:
    stack, plain = stack_of(rank=32, guided=0), tiny("llama")
    x = example_inputs(plain)
    with torch.no_grad():
        torch.testing.assert_close(stack.model(**x).logits, plain(**x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", FORMS)
def test_the_papers_start_has_orthogonal_blocks_or_the_spectrum_of_a_random_matrix(
    options: dict[str, Any],
) -> None:
    built = layers_of(stack_of(guided=0, start="random", **options))[0]
    o, i = built.own[0].shape
    if options["form"] == "low-rank":
        singular = torch.linalg.svdvals(built.matrix())[:4]
        bound = 1 + math.sqrt(o / i)  # of N(0, 1 / i)
        assert 0.7 * bound < singular[0] < 1.3 * bound
        assert singular[3] > 0.5 * bound
    else:
        for block in (*built.D, *built.U):
            torch.testing.assert_close(torch.linalg.svdvals(block), torch.ones(min(block.shape)))


# -- the guide -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("start", ["weights", "random"])
def test_the_guide_begins_as_the_product(options: dict[str, Any], start: str) -> None:
    stack = stack_of(start=start, **options)
    x = example_inputs(stack.model)
    found = []
    for a in (1.0, 0.7, 0.0):
        for built in layers_of(stack):
            assert a != 1.0 or built.a == 1.0
            built.a = a
        with torch.no_grad():
            found.append(stack.model(**x).logits)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-4)


def test_the_guide_by_hand() -> None:
    built, x = layer(4, 6, 1, 2, 2, guided=True), torch.randn(5, 6)
    built.a = 0.3
    assert built.W_g is not None
    expected = 0.3 * x @ built.W_g.T + 0.7 * built.structured(x)
    torch.testing.assert_close(base(built, x), expected)
    torch.testing.assert_close(x @ built.matrix().T, expected)
    built.a = 0.0
    torch.testing.assert_close(base(built, x), built.structured(x))


def test_a_falls_as_a_cosine_and_then_the_guide_is_gone(tmp_path: Path) -> None:
    stack = stack_of(rank=4)
    guides = [weakref.ref(built.W_g) for built in layers_of(stack)]
    seen, moved = [], []

    def look(done: int, total: int, values: dict[str, Any]) -> None:
        built = layers_of(stack)[0]
        seen.append((built.a, values["structured-ffn"], built.W_g is not None))
        if built.W_g is not None:
            moved.append(built.W_g.detach().clone())
        else:
            gc.collect()
            assert not any(guide() for guide in guides), "neither the optimizer nor the trainer holds it"

    stack.train(ROWS, steps=8, batch_size=2, learning_rate=1e-2, progress=look)
    expected = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)] + [0.0] * 4
    assert [a for a, _, _ in seen] == pytest.approx(expected)
    assert [name for _, name, _ in seen] == ["guided"] * 4 + ["alone"] * 4
    assert [there for _, _, there in seen] == [True] * 4 + [False] * 4
    assert not torch.equal(moved[0], moved[3])
    x = example_inputs(stack.model)
    with torch.no_grad():
        after = stack.model(**x).logits
        stack.save(tmp_path / "b")
        again = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
        assert torch.equal(again.model(**x).logits, after)
    never = stack_of(rank=4, guided=0)
    never.save(tmp_path / "never")
    with_a, without = ((tmp_path / b / "structured-ffn.safetensors").stat().st_size for b in ("b", "never"))
    assert with_a == without, "as if there had never been one"
    names = ledger_names(stack)
    assert names == ledger_names(again) == ledger_names(never)
    assert [phase.name for phase in stack.plugins["structured-ffn"].phases()] == ["alone"]
    stack.train(ROWS, steps=1, batch_size=2)
    assert layers_of(stack)[0].a == 0, "no second guide"


def test_nothing_holds_the_guide_of_a_half_precision_run_with_accumulation() -> None:
    plugins = [StructuredFfn(rank=4, guided=1)]
    stack = Stack(tiny("llama").to(torch.bfloat16), plugins, tokenizer=tiny_tokenizer())
    guides = [weakref.ref(built.W_g) for built in layers_of(stack)]
    held = []

    def look(*_: Any) -> None:
        gc.collect()
        held.append(sum(guide() is not None for guide in guides))

    stack.train(ROWS, steps=3, batch_size=2, gradient_accumulation=2, progress=look)
    assert held == [6, 0, 0]


def test_a_stack_that_is_saved_on_the_way_goes_on_with_its_guide(tmp_path: Path) -> None:
    stack = stack_of(rank=4, guided=6)
    batch = {**example_inputs(stack.model)}
    batch["labels"] = batch["input_ids"]
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    stack.model.train()
    for _ in range(3):
        stack.train_step(batch, optimizer=optimizer)
    stack.model.eval()
    a = layers_of(stack)[0].a
    assert a == pytest.approx((1 + math.cos(math.pi * 2 / 6)) / 2)
    with torch.no_grad():
        before = stack.model(**batch).logits
        stack.save(tmp_path / "b")
        again = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
        assert layers_of(again)[0].a == a
        assert torch.equal(again.model(**batch).logits, before)


@pytest.mark.parametrize("guided", [3, 5])
def test_a_run_that_is_resumed_is_the_same(tmp_path: Path, guided: int) -> None:
    """From a checkpoint without the guide, and from one with it; the optimizer has each parameter's own moments."""
    options: dict[str, Any] = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 4}
    whole, again = (
        Stack(tiny("llama"), [StructuredFfn(rank=4, guided=guided), Lora(rank=4)], tokenizer=tiny_tokenizer())
        for _ in range(2)
    )
    whole.train(ROWS, output=tmp_path, **options)
    again.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-4", **options)
    for id in ("structured-ffn", "lora"):
        for one, two in zip(*(stack.ledger.parameters(id) for stack in (whole, again)), strict=True):
            assert torch.equal(one, two)


def test_the_best_state_comes_back_with_its_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.0, 2.0, 3.0, 4.0])

    def measuring(self: Stack, rows: Any) -> Any:
        return lambda metric, length: {metric: Score(name=metric, value=next(values))}

    monkeypatch.setattr(Stack, "measuring", measuring)
    stack, guided = stack_of(rank=4, guided=2), []

    def look(done: int, total: int, values: dict[str, Any]) -> None:
        guided.append({name: t.clone() for name, t in stack.ledger.tensors("structured-ffn").items()})

    options = {"eval_steps": 1, "load_best_model_at_end": True, "progress": look, "measured": ROWS}
    stack.train(ROWS, steps=4, batch_size=2, learning_rate=1e-2, **options)
    built = layers_of(stack)[0]
    assert built.W_g is not None
    assert built.a == stack.plugins["structured-ffn"].state["a"] == 1.0
    now = stack.ledger.tensors("structured-ffn")
    assert now.keys() == guided[0].keys() != guided[3].keys()
    assert all(torch.equal(t, guided[0][name]) for name, t in now.items())


def test_a_run_of_unknown_length_wants_steps() -> None:
    stack = stack_of(rank=4)
    batch = example_inputs(stack.model)
    with pytest.raises(PeftxError, match=r"structured-ffn: the phase 'guided' is 0\.5 of a run whose length"):
        stack.train_step({**batch, "labels": batch["input_ids"]})


# -- one product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMS)
def test_merged_and_premerged_equal_the_factors(options: dict[str, Any]) -> None:
    stack = stack_of(guided=0, **options)
    x = example_inputs(stack.model)
    with torch.no_grad():
        before = stack.model(**x).logits
        for built in layers_of(stack):
            built.premerge = 18
        torch.testing.assert_close(stack.model(**x).logits, before, rtol=1e-4, atol=1e-4)
        stack.merge()
        torch.testing.assert_close(stack.model(**x).logits, before, rtol=1e-4, atol=1e-4)


def test_premerge_is_for_few_tokens_and_follows_the_factors() -> None:
    built = layer(4, 6, 1, 2, 2, guided=True, premerge=5)
    x = torch.randn(5, 6)
    assert base(built, x).requires_grad
    assert built.product.value is None, "not where gradients are"
    with torch.no_grad():
        base(built, torch.randn(2, 3, 6))
        assert built.product.value is None, "not for six tokens"
        one = base(built, x)
        kept = built.product.value
        base(built, x)
        assert kept is not None
        assert built.product.value is kept, "multiplied once"
        built.D.mul_(2)
        built.a = 0.0
        torch.testing.assert_close(base(built, x), built.structured(x))
        assert not torch.allclose(base(built, x), one)
        built.D = nn.Parameter(torch.randn_like(built.D))
        torch.testing.assert_close(base(built, x), built.structured(x))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_lora_merges_beside_it(first: bool, keep: bool) -> None:
    plugins = [Lora(rank=2), StructuredFfn(rank=4, guided=0)]
    stack = Stack(tiny("llama"), plugins if first else plugins[::-1])
    x = example_inputs(stack.model)
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.add_(torch.randn_like(p), alpha=0.05)
        before = stack.model(**x).logits
        stack.merge("lora", keep=keep)
        torch.testing.assert_close(stack.model(**x).logits, before, rtol=1e-4, atol=1e-4)
        if keep:
            stack.merge()
            torch.testing.assert_close(stack.model(**x).logits, before, rtol=1e-4, atol=1e-4)
            stack.unmerge()
            assert torch.equal(stack.model(**x).logits, before)


def test_the_product_can_be_packed() -> None:
    stack = Stack(tiny("llama"), [StructuredFfn(rank=16, guided=0), NF4Storage()])
    x = example_inputs(stack.model)
    with torch.no_grad():
        before = stack.model(**x).logits
        stack.compress()
        after = stack.model(**x).logits
    assert F.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_compressed_it_computes_the_same_and_the_model_is_smaller(
    options: dict[str, Any], arch: str, tmp_path: Path
) -> None:
    stack = Stack(tiny(arch), [StructuredFfn(guided=0, **options)], tokenizer=tiny_tokenizer())
    x = example_inputs(stack.model)
    numbers = sum(p.numel() for built in layers_of(stack) for p in built.parameters())
    with torch.no_grad():
        before = output_of(stack.model, x)
        stack.compress()
        torch.testing.assert_close(output_of(stack.model, x), before, rtol=1e-4, atol=1e-5)
    parts = stack.ledger.of("structured-ffn")
    assert sum(t.numel() for part in parts for t in part.tensors().values() if t.ndim == 3) == numbers
    assert not layers_of(stack)
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(output_of(again.model, x), output_of(stack.model, x))
    stack.remove("structured-ffn")
    with torch.no_grad():
        assert torch.equal(output_of(stack.model, x), output_of(tiny(arch).eval(), x))


def test_layers_that_others_need_stay(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    stack = Stack(
        tiny("llama"), [StructuredFfn(rank=4, guided=0), Lora(targets="mlp.up")], tokenizer=tiny_tokenizer()
    )
    x = example_inputs(stack.model)
    with torch.no_grad():
        before = stack.model(**x).logits
        stack.compress()
        torch.testing.assert_close(stack.model(**x).logits, before, rtol=1e-4, atol=1e-5)
        assert len(layers_of(stack)) == 2
        assert (
            "structured-ffn: 2 of 6 layers stay as they are, since 'lora' stands on model.layers.0.mlp.up_proj"
            in (caplog.text)
        )
        stack.save(tmp_path / "b")
        again = peftx.load(tmp_path / "b", tokenizer=tiny_tokenizer())
        assert len(layers_of(again)) == 2
        assert torch.equal(again.model(**x).logits, stack.model(**x).logits)
    guided = stack_of(rank=4, guided=6)
    guided.compress()
    assert "6 of 6 layers stay as they are, since the guide has not faded" in caplog.text
    assert len(layers_of(guided)) == 6
    for plugin in (NF4Storage(), Hypertuning(length=4, shots=2)):
        other = Stack(tiny("llama"), [StructuredFfn(rank=4, guided=0), plugin], tokenizer=tiny_tokenizer())
        other.compress(ids=["structured-ffn"])
        assert f"since '{list(other.plugins)[1]}' behind it works on the products" in caplog.text
        assert len(layers_of(other)) == 6
    merged = stack_of(rank=4, guided=0)
    merged.merge()
    merged.compress()
    assert "6 of 6 layers stay as they are, since they are merged" in caplog.text
    merged.unmerge()
    assert len(layers_of(merged)) == 6


def test_adapters_stand_on_what_was_compressed() -> None:
    plugins = [StructuredFfn(rank=4, guided=0), Lora(rank=2, targets="mlp")]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["structured-ffn"])
    stack.compress(ids=["structured-ffn"])
    stack.inject()
    assert stack.train(ROWS, steps=1, batch_size=2).steps == 1


def test_the_plan_says_what_is_saved(tmp_path: Path) -> None:
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: peftx:sample/train.jsonl}\ntrain: {steps: 2, max_length: 200}\n"
    run = load_run(text + f"stack: [structured-ffn]\noutput: {tmp_path / 'out'}\n")
    planned = plan(run.pipeline).totals.bundle_bytes
    run.run()
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == pytest.approx(
        planned, rel=0.02
    )


def test_the_layers_own_bias_stays() -> None:
    stack = Stack(tiny("bert"), [StructuredFfn(rank=4, guided=0)])
    built = layers_of(stack)[0]
    x, bias = torch.randn(3, built.own[0].shape[1]), torch.randn(built.own[0].shape[0])
    torch.testing.assert_close(built.base(x, built.own[0], bias), base(built, x) + bias)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"form": "block-dense", "blocks": 3, "rank": 6},
            r"3 blocks do not divide the 32 inputs of .*gate_proj",
        ),
        ({"form": "block-dense", "blocks": 4, "rank": 6}, r"4 blocks do not divide the 6 rank of"),
        ({"form": "block-shuffle", "blocks": 3}, r"3 blocks do not divide the 32 inputs"),
        ({"form": "block-shuffle", "blocks": 16}, r"16 blocks do not divide the 2 rows of a block"),
        ({"rank": 33}, r"structured-ffn: rank 33 exceeds"),
        ({"blocks": 2}, r"low-rank has one block, and blocks is 2"),
        (
            {"form": "block-shuffle", "rank": 2},
            r"rank of block-shuffle follows from its blocks, and rank is 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_touched(options: dict[str, Any], said: str) -> None:
    model = tiny("llama")
    before = dict(model.named_parameters())
    with pytest.raises(PeftxError, match=said):
        Stack(model, [StructuredFfn(**options)])
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("arch", ["gpt2", "mixtral"])
def test_layers_of_another_kind_are_refused(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"structured-ffn: .* is no plain nn.Linear"):
        Stack(tiny(arch), [StructuredFfn(rank=4)])
