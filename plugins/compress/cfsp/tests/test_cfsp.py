from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, PeftxError, PluginError
from peftx.kernel.parts import DeltaPart, ReplacedPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx.toolkits.compression import NarrowLinear
from peftx_cfsp import CFSP, angles, budget, scores
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_sift import Sift

test_conformance = conformance("cfsp")

TWO = {"samples": 4, "length": 24}
ROWS = [{"prompt": "a", "completion": "b"}] * 4


def build(
    model: nn.Module | str, *others: object, before: tuple[object, ...] = (), **options: object
) -> Stack:
    model = tiny(model) if isinstance(model, str) else model
    plugins = [*before, CFSP(**{"ratio": 0.3, "multiple": 8, **options}), *others]
    return Stack(model, plugins, tokenizer=tiny_tokenizer(), inject=False)


def pruned(model: nn.Module | str, *others: object, **options: object) -> Stack:
    stack = build(model, *others, **options)
    stack.compress(TEXTS, ["cfsp"], **TWO)
    return stack


def logits(model: Stack | nn.Module) -> Tensor:
    model = model.model if isinstance(model, Stack) else model
    with torch.no_grad():
        return output_of(model.eval(), example_inputs(model))


def layers(stack: Stack) -> dict[str, NarrowLinear]:
    return {part.key: part.module for part in stack.ledger.of("cfsp", ReplacedPart)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------------- coarse
def test_angles() -> None:
    x = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    y = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 1.0], [-5.0, 0.0]])
    torch.testing.assert_close(angles(x, y), torch.arange(5, dtype=torch.float64) / 4)
    same = normal(50, 64)
    assert bool(angles(same, 3 * same).isfinite().all())  # a cosine that is rounded above 1


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 0.8])
def test_shares_have_their_mean(ratio: float) -> None:
    for scale in (1e-3, 0.05, 0.3):
        G = normal(12, seed=3).abs().double() * scale
        k = budget(G, ratio, 1.0)
        assert float(k.mean()) == pytest.approx(1 - ratio)
        assert 0 < k.min() <= k.max() <= 1
        assert torch.equal(k.argsort(), G.argsort()) or not ratio


def test_shares_by_hand() -> None:
    """26.2144 is 128 sequences of 2048 tokens over the paper's 10^4."""
    G = torch.tensor([0.1, 0.2], dtype=torch.float64)
    z = [1 / (1 + math.exp(-s * 2 * 26.2144 * 0.05)) for s in (-1, 1)]
    assert budget(G, 0.6, 2.0).tolist() == pytest.approx([0.4 * v / (sum(z) / 2) for v in z])
    # rho = 0.2: the second would be 1.17, so it is drawn to 1 + 0.25 / 1.05 of 0.8, and the first as far the other way.
    assert budget(G, 0.2, 1.0).tolist() == pytest.approx([0.8 * (1 - 0.25 / 1.05), 0.8 * (1 + 0.25 / 1.05)])
    assert budget(G, 0.3, 0.0).tolist() == pytest.approx([0.7, 0.7])
    assert budget(G, 0.0, 1.0).tolist() == [1, 1]
    assert budget(torch.full((3,), 0.1), 0.0, 1.0).tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------- fine
def test_scores_by_hand() -> None:
    down, up = torch.tensor([[1.0, -3.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [-4.0, 0.0]])
    X = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # D = [[1, 6], [2, 4]] -> shares of rows [[1/7, 6/7], [1/3, 2/3]]; U -> [[1/2, 1/2], [1, 0]].
    expected = [(1 / 7 + 1 / 3 + 1.5) / 2, 2 * (6 / 7 + 2 / 3 + 0.5) / 2]
    assert scores([down, up], X, b=1, c=1, among=1).tolist() == pytest.approx(expected)
    expected = [(1 / 4 + 1 / 2 + 1.5) / 2, (3 / 4 + 1 / 2 + 0.5) / 2]
    assert scores([down, up], X, b=0, c=0, among=1).tolist() == pytest.approx(expected)
    # Shares within a channel are 1 on the sum: what is left is how active it is.
    assert scores([down, up], X, b=1, c=1, among=0).tolist() == pytest.approx([1, 2])
    assert bool(scores([down * 0, up * 0], X, b=1, c=1, among=1).isfinite().all())


def by_hand(model: nn.Module) -> tuple[list[float], list[Tensor]]:
    """G, and ||X_j||, of the model as it is; from hooks around a plain call."""
    from types import SimpleNamespace

    from peftx.toolkits.compression.batches import calibration

    blocks, seen, X = model.model.layers, [[] for _ in model.model.layers], [[] for _ in model.model.layers]
    handles = []
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_hook(lambda m, x, y, i=i: seen[i].append((x[0], y))))
        handles.append(block.mlp.down_proj.register_forward_hook(lambda m, x, y, i=i: X[i].append(x[0])))
    with torch.no_grad():
        for batch in calibration(
            SimpleNamespace(tokenizer=tiny_tokenizer(), model=model), TEXTS, **TWO
        ).batches:
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    G = [
        torch.cat([(F.cosine_similarity(x, y, dim=-1).arccos() / math.pi).flatten() for x, y in pairs]).mean()
        for pairs in seen
    ]
    return [float(g) for g in G], [torch.cat([x.flatten(0, 1) for x in parts]).norm(dim=0) for parts in X]


def test_one_pass_through_the_model_as_it_is() -> None:
    model = tiny("llama", num_hidden_layers=3)
    G, X = by_hand(model)
    dense = {name: p.clone() for name, p in model.named_parameters()}
    stack = pruned(model)
    state = stack.plugins["cfsp"].state
    assert state["importance"] == pytest.approx(G, rel=1e-4)
    k = budget(torch.tensor(G).double(), 0.3, 1.0)
    assert state["kept"] == [[int((float(share) * 48 + 4) / 8) * 8, 48] for share in k]
    for i, (kept, _) in enumerate(state["kept"]):
        up, gate, down = (dense[f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("up", "gate", "down"))
        best = scores([down, up.T, gate.T], X[i].double(), b=1, c=1, among=1).topk(kept).indices.sort()[0]
        mlp = stack.model.model.layers[i].mlp
        assert torch.equal(mlp.up_proj.weight, up[best])
        assert torch.equal(mlp.gate_proj.weight, gate[best])
        assert torch.equal(mlp.down_proj.weight, down[:, best])


def test_released_shares_go_by_activations_alone() -> None:
    model = tiny("llama")
    X, up = by_hand(model)[1][0], model.model.layers[0].mlp.up_proj.weight.clone()
    stack = pruned(model, shares="hidden", a=0.0)
    best = X.topk(32).indices.sort()[0]
    assert torch.equal(stack.model.model.layers[0].mlp.up_proj.weight, up[best])
    assert not torch.equal(pruned("llama", a=0.0).model.model.layers[0].mlp.up_proj.weight, up[best])


# ------------------------------------------------------------------------------------------------------------- pruning
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "phi3", "opt", "gemma2"])
def test_it_computes_what_zeroed_channels_give(arch: str, tmp_path: Path) -> None:
    """Whatever holds them: gated or not, fused, stored the other way round, with biases."""
    stack, whole = pruned(arch, ratio=0.4, a=0.02), tiny(arch)
    group = build(tiny(arch)).plugins["cfsp"].groups(build(whole).view("cfsp"))
    for places, (n, of) in zip(group, stack.plugins["cfsp"].state["kept"], strict=True):
        assert n < of
        down, narrow = places["mlp.down"], stack.model.get_submodule(places["mlp.down"].path)
        assert narrow.weight.shape == (down.out_features, n)
        left = [
            next(j for j in range(of) if torch.equal(down.weight[:, j], column)) for column in narrow.weight.T
        ]
        assert left == sorted(left)
        silent = torch.ones(of)
        silent[left] = 0
        down.module.register_forward_pre_hook(lambda m, x, silent=silent: (x[0] * (1 - silent),))
    torch.testing.assert_close(logits(stack), logits(whole), atol=1e-4, rtol=1e-4)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))
    stack.remove("cfsp")
    assert torch.equal(logits(stack), logits(tiny(arch)))


def test_the_model_is_smaller() -> None:
    stack = build("llama", ratio=0.5, a=0.0)
    before, dense = stack.base_parameters(), sum(p.nbytes for p in stack.model.parameters())
    told = sum(size for _, size in stack.plugins["cfsp"].planned(stack.view("cfsp")))
    assert stack.evaluate(["a text"], metrics=["cfsp"])["kept"].value == 1
    stack.compress(TEXTS, keep=False, **TWO)
    assert all(layer.weight.shape in ((24, 32), (32, 24)) for layer in layers(stack).values())
    gone = 2 * 3 * 32 * 24
    assert dense - sum(p.nbytes for p in stack.model.parameters()) == 4 * gone
    assert stack.base_parameters() == before - gone
    assert sum(p.nbytes for layer in layers(stack).values() for p in layer.parameters()) == told
    found = stack.evaluate(["a text"], metrics=["cfsp"])
    assert (found["kept"].value, found["least_kept"].value, found["parameters"].value) == (
        0.5,
        0.5,
        before - gone,
    )


def test_nothing_is_pruned_without_a_ratio() -> None:
    stack = pruned("llama", Lora(rank=2), ratio=0.0, multiple=20)  # of which 48 is no multiple
    assert not layers(stack)
    assert torch.equal(logits(stack), logits(tiny("llama")))
    stack.inject()


def test_no_more_channels_than_there_are() -> None:
    """49 of 50, which rounds to 64."""
    stack = pruned(tiny("llama", intermediate_size=50), ratio=0.02, a=0.0, multiple=32)
    assert not layers(stack)
    assert stack.plugins["cfsp"].state["kept"] == [[50, 50]] * 2


def test_shares_differ_and_the_metric_says_so() -> None:
    G = by_hand(tiny("llama"))[0]
    stack = pruned("llama", multiple=1, ratio=0.5, a=0.1)
    (one, _), (two, _) = stack.plugins["cfsp"].state["kept"]
    assert one != two
    assert (one < two) == (G[0] < G[1])
    found = stack.evaluate(["a text"], metrics=["cfsp"])
    assert found["least_kept"].value == min(one, two) / 48
    assert found["kept"].value == pytest.approx((one + two) / 96)


def test_bfloat16_stays() -> None:
    stack = pruned(tiny("llama").bfloat16())
    assert {layer.weight.dtype for layer in layers(stack).values()} == {torch.bfloat16}
    assert not any(p.requires_grad for layer in layers(stack).values() for p in layer.parameters())


# -------------------------------------------------------------------------------------------------------------- stacks
def test_lora_recovers(tmp_path: Path) -> None:
    ranks = pruned("llama").plugins["cfsp"].ranks(3)
    stack = pruned("llama", Lora(rank=3, ranks=ranks))
    before, kept = logits(stack), {key: layer.weight.clone() for key, layer in layers(stack).items()}
    stack.inject(["lora"])
    assert torch.equal(logits(stack), before)
    stack.train(ROWS, steps=2, learning_rate=1e-2)
    assert not torch.equal(logits(stack), before)
    assert all(torch.equal(layer.weight, kept[key]) for key, layer in layers(stack).items())
    trained = logits(stack)
    stack.save(tmp_path / "both")
    loaded = peftx.load(tmp_path / "both")
    assert torch.equal(logits(loaded), trained)
    assert loaded.trainable_parameters() == stack.trainable_parameters()
    assert loaded.plugins["cfsp"].ranks(3) == ranks
    stack.remove("lora")
    assert torch.equal(logits(stack), before)


def test_ranks_follow_the_coarse_importance() -> None:
    plugin = CFSP()
    plugin.state["importance"] = [0.1, 0.2, 0.6, 0.001]
    assert list(plugin.ranks(8).values()) == [4, 7, 21, 1]
    assert list(plugin.ranks(8))[2] == "all layers=2"


def test_what_stands_before_it_is_folded_and_pruned() -> None:
    stack = build("llama", before=(Lora(rank=2),))
    stack.inject()
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.1)
    stack.merge("lora")
    up = stack.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    stack.unmerge()
    stack.compress(TEXTS, **TWO)
    assert not stack.ledger.of("lora", DeltaPart)
    assert all(
        any(torch.equal(row, other) for other in up) for row in stack.model.model.layers[0].mlp.up_proj.weight
    )


def test_what_is_trained_before_it_is_pruned() -> None:
    stack = build("llama", before=(FullFinetuning(),))
    stack.inject()
    stack.train(ROWS, steps=1, learning_rate=1e-2)
    up = stack.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    stack.compress(TEXTS, **TWO)
    assert all(
        any(torch.equal(row, other) for other in up) for row in stack.model.model.layers[0].mlp.up_proj.weight
    )


def test_packed_after_it(tmp_path: Path) -> None:
    stack = build("llama", NF4Storage(), Lora(rank=2))
    stack.compress(TEXTS, ["cfsp", "nf4"], **TWO)
    stack.inject()
    stack.train(ROWS, steps=1)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_sparse_deltas_stand_on_it(tmp_path: Path) -> None:
    stack = pruned("llama", Sift())
    stack.inject()
    stack.train(ROWS, steps=2)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


# ------------------------------------------------------------------------------------------------------------- refused
def unchanged(stack: Stack) -> None:
    assert not stack.ledger.parts
    assert not stack.plugins["cfsp"].state
    assert torch.equal(
        logits(stack), logits(tiny("llama", num_hidden_layers=stack.model.config.num_hidden_layers))
    )


def test_bad_options() -> None:
    for wrong in ({"ratio": 1.0}, {"ratio": -0.1}, {"multiple": 0}, {"a": -1.0}, {"shares": "rows"}):
        with pytest.raises(PluginError, match=f"CFSP: {next(iter(wrong))}"):
            CFSP(**wrong)


def test_models_it_has_no_place_on() -> None:
    for arch, said in (
        ("t5", "encoder and decoder"),
        ("mixtral", "block 0 of mixtral"),
        ("mamba", "block 0 of mamba"),
    ):
        with pytest.raises(ArchitectureError, match=rf"cfsp: .*{said}"):
            build(arch)
    with pytest.raises(
        ArchitectureError, match=r"block 0 would keep 80.0% of 48 channels.* multiples of 128"
    ) as caught:
        Stack(tiny("llama"), [CFSP()])
    assert "a smaller ratio, a or multiple" in str(caught.value.hint)
    with pytest.raises(ArchitectureError, match=r"would keep 1.0% of 48 channels"):
        build("llama", ratio=0.99, multiple=1)


def test_no_block_is_pruned_to_nothing() -> None:
    """A block that is told to keep less than half of a multiple, which only the text shows."""
    stack = build(tiny("llama", num_hidden_layers=3), ratio=0.8, a=50.0, multiple=8)
    with pytest.raises(ArchitectureError, match=r"cfsp: block \d would keep \d\.\d% of 48 channels"):
        stack.compress(TEXTS, **TWO)
    unchanged(stack)


def test_too_little_text() -> None:
    stack = build("llama")
    with pytest.raises(PeftxError, match=r"cfsp: 8 tokens of calibration text are too few, .* at least 64"):
        stack.compress(TEXTS, samples=1, length=8)
    unchanged(stack)
    with pytest.raises(PeftxError, match="'cfsp' needs calibration data"):
        stack.compress()
    stack.compress(TEXTS, **TWO)
    assert layers(stack)


def test_numbers_that_are_not_finite() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    stack = build(model)
    with pytest.raises(PeftxError, match="cfsp: the model computes numbers that are not finite"):
        stack.compress(TEXTS, **TWO)
    assert not stack.ledger.parts


def test_stacks_that_do_not_work() -> None:
    for later in (Lora(rank=2), FullFinetuning(targets="mlp")):
        with pytest.raises(ConflictError, match=r"stands on .*mlp.*, which 'cfsp' is to prune") as caught:
            Stack(tiny("llama"), [CFSP(ratio=0.3, multiple=8), later], tokenizer=tiny_tokenizer())
        assert "inject=False" in str(caught.value.hint)
    assert Stack(tiny("llama"), [CFSP(multiple=8), Lora(targets="attention")], tokenizer=tiny_tokenizer())
    stack = pruned("llama", FullFinetuning())
    with pytest.raises(ConflictError, match=r"'full-finetuning' stands on .*, which 'cfsp' pruned"):
        stack.inject()
    plugins = [NF4Storage(), CFSP(multiple=8)]
    with pytest.raises(ConflictError, match=r"'nf4' packs the layers that 'cfsp'.* is to prune") as caught:
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    assert caught.value.hint == "put 'cfsp' before 'nf4'"
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["nf4"], **TWO)
    with pytest.raises(ArchitectureError, match="no channels between plain linear layers") as caught:
        stack.compress(TEXTS, ["cfsp"], **TWO)
    assert "prune before anything is packed" in str(caught.value.hint)
