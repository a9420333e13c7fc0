from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx_dora
from peftx import Site, Stack
from peftx.errors import PeftxError
from peftx.interop import import_peft, to_peft
from peftx.kernel.slots.delta import dropout_mask
from peftx.testing import conformance, example_inputs, tiny
from peftx.testing.models import tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_dora import Dora, DoraDelta
from peftx_lora import Lora

test_conformance = conformance("dora")
test_conformance_of_embeddings = conformance(
    "dora",
    options={
        "rank": 2,
        "targets": "embedding attention.q",
        "ranks": {"embedding": 3},
        "alphas": {"embedding": 2},
    },
    models=["llama", "gemma2"],
    expected_failures=dict.fromkeys(
        ("merge_equals_unmerged", "merge_in_bfloat16", "unmerge_is_exact", "llama-merge_rounds_once"),
        "nothing folds into an embedding",
    ),
)

IDS = torch.arange(3, 27).reshape(2, 12)
V_PROJ = "model.layers.1.self_attn.v_proj"


@torch.no_grad()
def moved(stack: Stack, *, by: float = 0.3, seed: int = 1) -> Stack:
    """The stack with every trained number away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in stack.ledger.parameters("dora"):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(noise * (parameter.abs() if parameter.ndim == 1 else 0.3), alpha=by)
    return stack


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def delta_of(stack: Stack, path: str = V_PROJ) -> DoraDelta:
    found: DoraDelta = stack.model.get_submodule(path).peftx["dora"]
    return found


def on_a_layer(*, bias: bool = False, **options: Any) -> tuple[nn.Module, DoraDelta, Tensor, Tensor]:
    """A layer of a tiny model that is made anew, its delta with random numbers, W and a bias (BERT) or zeros."""
    arch, path = ("bert", "bert.encoder.layer.0.intermediate.dense") if bias else ("llama", V_PROJ)
    stack = Stack(tiny(arch).double(), [Dora(**{"rank": 3, "targets": "attention.v mlp.up"} | options)])
    layer, delta = stack.model.get_submodule(path), delta_of(moved(stack), path)
    b = layer.bias if bias else torch.zeros(layer.out_features, dtype=torch.float64)
    return layer, delta, layer.weight.detach(), b.detach()


# ---------------------------------------------------------------------------------------------------------- equations
def test_by_hand() -> None:
    delta = DoraDelta(Site("", "", nn.Linear(2, 2), "linear"), rank=1, scale=2.0, dropout=0.0)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 0.0]]))
        delta.B.copy_(torch.tensor([[1.0], [2.0]]))
        delta.magnitude.copy_(torch.tensor([10.0, 13.0]))
    weight = torch.tensor([[1.0, 4.0], [1.0, 12.0]])
    # V = W + 2 B A = [[3, 4], [5, 12]], |V| = [5, 13]
    assert delta.fold(weight, None)[0].tolist() == [[6.0, 8.0], [5.0, 12.0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_output_is_that_of_the_decomposed_weight(bias: bool, training: bool) -> None:
    layer, delta, W, b = on_a_layer(bias=bias)
    V = W + delta.scale * delta.B @ delta.A
    expected = delta.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    x = torch.randn(4, W.shape[1], dtype=torch.float64)
    layer.train(training)
    assert torch.allclose(layer(x), x @ expected.T + b, atol=1e-12)
    folded, same = delta.fold(W, b)
    assert torch.allclose(folded, expected, atol=1e-12)
    assert same is b  # the bias is no part of W


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@torch.no_grad()
def test_of_an_embedding_too(arch: str) -> None:
    """Its rows of W are features of all tokens: e = times m V[:, v] / |V|, V = E^T + s B A."""
    stack = Stack(tiny(arch).double(), [Dora(rank=3, targets="embedding")])
    table = stack.model.model.embed_tokens
    delta, E = table.peftx["dora"], table.weight
    assert torch.equal(table(IDS), tiny(arch).double().model.embed_tokens(IDS))
    assert torch.allclose(delta.magnitude, E.norm(dim=0))
    moved(stack)
    V = E.T + delta.scale * delta.embedding_B @ delta.embedding_A
    expected = (delta.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).T[IDS] * delta.times
    for training in (True, False, False):
        stack.model.train(training)
        assert torch.allclose(table(IDS), expected, atol=1e-12)
    E[4] *= 2
    assert not torch.allclose(table(IDS), expected, atol=1e-3), "kept, unless a number changed"


def test_m_is_the_length_of_the_rows_and_V_their_direction() -> None:
    _, delta, W, _ = on_a_layer()
    merged, _ = delta.fold(W, None)
    V = W + delta.scale * delta.B @ delta.A
    assert torch.allclose(merged.norm(dim=1), delta.magnitude, atol=1e-12)
    assert torch.allclose(torch.cosine_similarity(merged, V, dim=1), torch.ones(len(V)).double())


def test_m_starts_at_the_lengths_of_W() -> None:
    stack = Stack(tiny("llama"), [Dora(rank=2)])
    for part in stack.ledger.of("dora"):
        assert torch.allclose(part.module.magnitude, part.place.weight.norm(dim=1))
        assert not part.module.B.any()


def test_start_of_A_is_kaiming_uniform() -> None:
    delta = DoraDelta(Site("", "", nn.Linear(400, 5), "linear"), rank=8, scale=1.0, dropout=0.0)
    assert 0.99 / 20 < float(delta.A.detach().abs().max()) <= 1 / 20
    assert float(delta.A.detach().std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("way", ["forward", "fold"])
def test_gradients_hold_the_length_constant(way: str) -> None:
    """Section 4.3: dV = (m / |V|) dW', dm = sum_in dW' V / |V|, and y passes its gradient on through the gain."""
    layer, delta, W, b = on_a_layer(bias=True)
    s, m = delta.scale, delta.magnitude.detach()
    x = torch.randn(4, W.shape[1], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, W.shape[0], dtype=torch.float64)
    out = layer(x) if way == "forward" else nn.functional.linear(x, *delta.fold(W, b))
    d_x, d_A, d_B, d_m = torch.autograd.grad(
        (out * weights).sum(), [x, delta.A, delta.B, delta.magnitude]
    )  # dW' = weights^T x
    A, B = delta.A.detach(), delta.B.detach()
    V, d_merged = W + s * B @ A, weights.T @ x.detach()
    length = V.norm(dim=1, keepdim=True)
    d_V = m[:, None] / length * d_merged
    assert torch.allclose(d_A, s * B.T @ d_V, atol=1e-11)
    assert torch.allclose(d_B, s * d_V @ A.T, atol=1e-11)
    assert torch.allclose(d_m, (d_merged * V / length).sum(1), atol=1e-11)
    assert torch.allclose(d_x, weights @ (m[:, None] * V / length), atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- limits
def test_ranks_and_alphas_of_some() -> None:
    options = {"targets": "attention.q,v", "ranks": {"attention.q": 4}, "alphas": {"attention.v": 3}}
    stack = Stack(tiny("llama"), [Dora(rank=2, **options)])
    found = {
        part.path.split(".")[-1]: (part.module.A.shape[0], part.module.scale)
        for part in stack.ledger.of("dora")
    }
    assert found == {"q_proj": (4, 2.0), "v_proj": (2, 1.5)}
    with pytest.raises(PeftxError, match="dora: ranks: 'mlp' matches nothing inside targets 'attention'"):
        Stack(tiny("llama"), [Dora(rank=2, targets="attention", ranks={"mlp": 4})])


def test_lengths_that_follow_V_leave_lora() -> None:
    layer, delta, W, _ = on_a_layer()
    V = (W + delta.scale * delta.B @ delta.A).detach()
    with torch.no_grad():
        delta.magnitude.copy_(V.norm(dim=1))
        x = torch.randn(4, W.shape[1], dtype=torch.float64)
        assert torch.allclose(layer(x), x @ V.T, atol=1e-12)


@torch.no_grad()
def test_without_an_update_m_is_a_gain_of_each_feature() -> None:
    layer, delta, W, b = on_a_layer(bias=True)
    delta.B.zero_()
    x = torch.randn(4, W.shape[1], dtype=torch.float64)
    gain = delta.magnitude / W.norm(dim=1)
    assert torch.allclose(layer(x), gain * (x @ W.T) + b, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 2.0), ({"alpha": 12}, 3.0), ({"alpha": 12, "rank_stabilized": True}, 6.0)],
)
def test_scale(options: dict[str, Any], scale: float) -> None:
    _, delta, _, _ = on_a_layer(rank=4, **options)
    assert delta.scale == scale


def test_number_of_parameters_is_that_of_lora_and_one_for_each_output_feature() -> None:
    stack = Stack(tiny("llama"), [Dora(rank=3)])
    roles = {"attention.q", "attention.k", "attention.v", "mlp.up", "mlp.down"}
    sites = [s for s in stack.anatomy.sites if s.role in roles]
    assert len(sites) == 10
    expected = sum(3 * (s.in_features + s.out_features) + s.out_features for s in sites)
    assert stack.trainable_parameters() == expected


# ------------------------------------------------------------------------------------------------------------ HF PEFT
PEERS = {
    "llama": ("attention.q,v mlp.down", ["q_proj", "v_proj", "down_proj"]),
    "bert": ("attention.q,v mlp.up", ["query", "value", "intermediate.dense"]),
    "gpt2": ("mlp", ["mlp.c_fc", "mlp.c_proj"]),
}


def beside_peft(
    arch: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Stack, nn.Module, dict[str, nn.Parameter]]:
    """A stack and a PEFT model with the same random weights, and PEFT's parameters by its names in files."""
    from peft import LoraConfig, get_peft_model

    targets, names = PEERS[arch]
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=names, init_lora_weights=False, use_dora=True,
        fan_in_fan_out=arch == "gpt2", **options,
    )  # fmt: skip
    theirs = get_peft_model(tiny(arch).to(dtype), config, autocast_adapter_dtype=False).eval()
    stabilized = options.get("use_rslora", False)
    stack = Stack(tiny(arch).to(dtype), [Dora(rank=4, alpha=12, rank_stabilized=stabilized, targets=targets)])
    named = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
    }
    with torch.no_grad():
        for part in stack.ledger.of("dora"):
            named[f"{part.path}.lora_magnitude_vector.weight"].mul_(
                1 + 0.3 * torch.randn(part.module.magnitude.shape, dtype=dtype)
            )
            for own, peer in same(part.path, part.module, named):
                own.copy_(peer)
    return stack, theirs, named


def same(path: str, delta: DoraDelta, named: dict[str, nn.Parameter]) -> list[tuple[Tensor, nn.Parameter]]:
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
    return [(getattr(delta, own), named[f"{path}.{peer}"]) for own, peer in names.items()]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, by PEFT
@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("arch", list(PEERS))
def test_equals_peft(arch: str, stabilized: bool) -> None:
    """Logits up to 4: 1e-6 of the largest in float32, and nothing but rounding."""
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        stack, theirs, _ = beside_peft(arch, dtype, use_rslora=stabilized)
        ours, peer = logits(stack.model), logits(theirs)
        assert (ours - peer).abs().max() <= most * peer.abs().max()
        assert not torch.allclose(peer, logits(tiny(arch).to(dtype)), atol=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradients_equal_those_of_peft(arch: str) -> None:
    stack, theirs, named = beside_peft(arch, torch.float64)
    for model in (stack.model, theirs):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for part in stack.ledger.of("dora"):
        for own, peer in same(part.path, part.module, named):
            assert own.grad.abs().max() > 1e-4
            assert torch.allclose(own.grad, peer.grad, atol=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_m_starts_where_peft_starts_it(arch: str) -> None:
    from peft import LoraConfig, get_peft_model

    targets, names = PEERS[arch]
    config = LoraConfig(r=4, target_modules=names, use_dora=True, fan_in_fan_out=arch == "gpt2")
    named = dict(get_peft_model(tiny(arch), config).named_parameters())
    stack = Stack(tiny(arch), [Dora(rank=4, targets=targets)])
    for part in stack.ledger.of("dora"):
        peer = named[f"base_model.model.{part.path}.lora_magnitude_vector.default.weight"]
        assert torch.allclose(part.module.magnitude, peer, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out:UserWarning")
def test_roles_of_a_fused_matrix_go_out_and_come_back(tmp_path: Path) -> None:
    """Of Q and V; K, which has no m, is as long as it was."""
    from peft import PeftModel

    stack = moved(Stack(tiny("gpt2"), [Dora(rank=2, targets="attention.q,v")]))
    to_peft(stack, tmp_path)
    theirs = PeftModel.from_pretrained(tiny("gpt2"), tmp_path).eval()
    for model in (theirs, import_peft(tmp_path, model=tiny("gpt2")).model):
        assert torch.allclose(logits(model), logits(stack.model), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------- what is kept
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever lengths are computed."""
    calls, plain = [], peftx_dora.lengths

    def lengths(V: Tensor) -> Tensor:
        calls.append(1)
        return plain(V)

    monkeypatch.setattr(peftx_dora, "lengths", lengths)
    return calls


def test_lengths_are_computed_once_for_all_tokens(counted: list[int]) -> None:
    stack = moved(Stack(tiny("llama"), [Dora(rank=2)]))
    counted.clear()
    stack.model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(counted) == 10  # layers, not layers times tokens


def test_lengths_are_computed_at_every_call_that_trains(counted: list[int]) -> None:
    stack = moved(Stack(tiny("llama"), [Dora(rank=2, targets="attention.v")]))
    for training, recording in ((True, False), (True, True), (False, True)):
        stack.model.train(training)
        logits(stack.model)
        counted.clear()
        with torch.set_grad_enabled(recording):
            stack.model(IDS), stack.model(IDS)
        assert len(counted) == 4


CHANGES: dict[str, Callable[[nn.Module, DoraDelta], Any]] = {
    "A": lambda layer, delta: delta.A.mul_(2),
    "B": lambda layer, delta: delta.B.mul_(2),
    "m": lambda layer, delta: delta.magnitude.mul_(2),
    "W": lambda layer, delta: layer.weight[0].mul_(2),
    "b": lambda layer, delta: layer.bias.add_(1),
    "another A": lambda layer, delta: setattr(delta, "A", nn.Parameter(delta.A * 2)),
    "another W": lambda layer, delta: setattr(layer, "weight", nn.Parameter(layer.weight.roll(1, 0))),
    # New numbers of a cast or a move count no version, and may lie where the old ones did.
    "a cast": lambda layer, delta: delta._apply(lambda tensor: tensor.data.mul_(2)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", list(CHANGES))
@torch.no_grad()
def test_a_change_of_any_number_is_seen(what: str, inference: bool) -> None:
    layer, delta, _, _ = on_a_layer(bias=True)
    layer.eval()
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    with torch.inference_mode(inference):
        before = layer(x)
        assert torch.equal(layer(x), before)
    CHANGES[what](layer, delta)
    expected = nn.functional.linear(x, *delta.fold(layer.weight, layer.bias))
    with torch.inference_mode(inference):
        assert torch.allclose(layer(x), expected, atol=1e-12)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_a_cast_is_seen() -> None:
    stack = moved(Stack(tiny("llama"), [Dora(rank=2)]))
    wide = logits(stack.model)
    narrow = logits(stack.model.bfloat16())
    assert torch.allclose(narrow.float(), wide, atol=0.2)
    again = logits(stack.model.float())
    fresh = copy.deepcopy(stack.model)
    for module in fresh.modules():
        if isinstance(module, DoraDelta):
            module.known.forget()
    assert torch.equal(again, logits(fresh))
    assert not torch.equal(again, wide)  # bfloat16's rounding stays


def test_what_inference_mode_kept_trains() -> None:
    stack = moved(Stack(tiny("llama"), [Dora(rank=2)]))
    with torch.inference_mode():
        kept = stack.model(IDS).logits
    assert torch.equal(logits(stack.model), kept)
    assert torch.equal(logits(copy.deepcopy(stack.model)), kept)
    stack.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in stack.ledger.parameters("dora"))


def test_parameters_made_in_inference_mode() -> None:
    model = tiny("llama")
    before = logits(model)
    with torch.inference_mode():
        stack = Stack(model, [Dora(rank=2)])
        assert torch.equal(stack.model(IDS).logits, before)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiles() -> None:
    stack = moved(Stack(tiny("llama"), [Dora(rank=2, targets="attention.v")]))
    layer = stack.model.get_submodule(V_PROJ)
    x = torch.randn(1, 3, layer.in_features)
    with torch.no_grad():
        expected = layer(x)
        assert torch.allclose(torch.compile(layer, backend="eager")(x), expected, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- places
@pytest.mark.parametrize("order", ["lora, dora", "dora, lora"])
def test_beside_lora(order: str) -> None:
    """What stands inside is part of W: only so m is the length of the rows."""
    plugins = {"lora": Lora(rank=2, targets="attention.v"), "dora": Dora(rank=2, targets="attention.v")}
    stack = moved(Stack(tiny("llama"), [(id, plugins[id]) for id in order.split(", ")]))
    with torch.no_grad():
        for part in stack.ledger.of("lora"):
            part.module.B.normal_()
    layer, delta = stack.model.get_submodule(V_PROJ), delta_of(stack)
    lora = layer.peftx["lora"]
    add = 2 * lora.B @ lora.A
    x = torch.randn(5, layer.in_features)
    inner = layer.weight + add if order.startswith("lora") else layer.weight
    V = inner + 2 * delta.B @ delta.A
    expected = delta.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    expected = expected if order.startswith("lora") else expected + add
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
        for ids in (["lora"], ["lora", "dora"]) if order.startswith("lora") else (["dora"], ["dora", "lora"]):
            stack.merge(*ids)
            assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)
            stack.unmerge()
        if order.startswith("lora"):  # a change of what stands inside is seen too
            lora.B.mul_(2)
            V = layer.weight + 2 * add + 2 * delta.B @ delta.A
            now = delta.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
            assert torch.allclose(layer(x), x @ now.T, atol=1e-5)


def test_m_starts_at_the_lengths_of_what_stands_inside() -> None:
    plugins = [Lora(rank=2, targets="attention.v"), Dora(rank=2, targets="attention.v")]
    stack = Stack(tiny("llama"), plugins, inject=False)
    stack.inject(["lora"])
    with torch.no_grad():
        for part in stack.ledger.of("lora"):
            part.module.B.normal_()
    before = logits(stack.model)
    stack.inject(["dora"])
    assert torch.equal(logits(stack.model), before)


def test_part_of_a_fused_matrix() -> None:
    stack = moved(Stack(tiny("gpt2"), [Dora(rank=2, targets="attention.k")]))
    layer = stack.model.transformer.h[0].attn.c_attn
    delta = next(iter(layer.peftx.values()))
    d = delta.B.shape[0]
    rows = slice(d, 2 * d)
    V = layer.weight.T[rows] + 2 * delta.B @ delta.A
    x = torch.randn(5, len(layer.weight))
    plain = x @ layer.weight + layer.bias
    expected = x @ (delta.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).T + layer.bias[rows]
    found = layer(x)
    assert torch.allclose(found[:, rows], expected, atol=1e-5)
    assert torch.equal(found[:, :d], plain[:, :d])
    assert torch.equal(found[:, 2 * d :], plain[:, 2 * d :])


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_packed_layer(bits: int) -> None:
    """W is what the integers stand for."""
    model = tiny("bert")
    dense = model.bert.encoder.layer[0].intermediate
    dense.dense = QuantLinear.from_linear(dense.dense, bits=bits)
    x = torch.randn(5, dense.dense.in_features)
    plain = dense.dense(x)
    stack = Stack(model, [Dora(rank=2, targets="mlp.up")])
    layer, delta = dense.dense, dense.dense.peftx["dora"]
    assert torch.equal(layer(x), plain)
    moved(stack)
    V = layer.weight + 2 * delta.B @ delta.A
    expected = x @ (delta.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_half_precision_starts_unchanged() -> None:
    model = tiny("llama").bfloat16()
    before = logits(model)
    stack = Stack(model, [Dora(rank=2)])
    assert torch.equal(logits(stack.model), before)
    assert {p.dtype for p in stack.ledger.parameters("dora")} == {torch.float32}


def test_half_precision_rounds_the_change_and_not_the_gain() -> None:
    """g = 2^-10 is below what bfloat16 can add to 1."""
    layer = nn.Linear(16, 16, bias=False).bfloat16()
    model = tiny("llama").bfloat16()
    model.model.layers[0].self_attn.o_proj = layer
    stack = Stack(model, [Dora(rank=2, targets="attention.o layers=0")])
    delta = layer.peftx["dora"]
    with torch.no_grad():
        delta.magnitude.mul_(1 + 2**-10)
        g = delta.terms(torch.bfloat16)[2]
    assert stack.trainable_parameters() == 5 * 16
    assert torch.allclose(g.float(), torch.full((16,), 2**-10), rtol=1e-2)


def test_a_row_of_zeros_has_no_direction() -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.weight[3] = 0
    before = logits(model)
    stack = Stack(model, [Dora(rank=2)])
    assert torch.equal(logits(stack.model), before)
    stack.merge()
    assert torch.equal(logits(stack.model), before)


# ------------------------------------------------------------------------------------------------------------- options
def test_dropout_is_of_the_input_of_A_alone() -> None:
    layer, delta, W, b = on_a_layer(bias=True, dropout=0.5)
    layer.train()
    x = torch.randn(4, W.shape[1], dtype=torch.float64)
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    mask, scale = dropout_mask(x, 0.5, int(torch.randint(2**62, ()).item()))
    V = W + delta.scale * delta.B @ delta.A
    u = x @ W.T + delta.scale * (x * mask * scale) @ delta.A.T @ delta.B.T
    assert torch.allclose(found, delta.magnitude / V.norm(dim=1) * u + b, atol=1e-12)
    layer.eval()
    whole = x @ V.T * delta.magnitude / V.norm(dim=1) + b
    assert torch.allclose(layer(x), whole, atol=1e-12)


def test_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"dora: rank 999 exceeds the .* matrix model\.layers\.0"):
        Stack(tiny("llama"), [Dora(rank=999)])


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"dropout": 1.0}, {"alpha": -1.0}, {"alpha": math.inf}, {"targets": ""}, {"magnitude": 1}],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Dora: {next(iter(options))}"):
        Dora(**options)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_kept_in_evaluation_is_old_after_an_update(fused: bool) -> None:
    """A pass without gradients may stand between a step's loss and its update, as a measure of the base's."""
    stack = Stack(tiny("llama"), [Dora(rank=2)], tokenizer=tiny_tokenizer())
    inputs = example_inputs(stack.model)
    optimizer = torch.optim.AdamW(stack.ledger.parameters("dora"), lr=1e-2, fused=fused)
    stack.model.train()
    stack.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    stack.model.eval()
    with torch.no_grad():
        stack.model(**inputs)
    optimizer.step()
    with torch.no_grad():
        found = stack.model(**inputs).logits
        for part in stack.ledger.of("dora"):
            part.module.known.forget()
        assert torch.equal(found, stack.model(**inputs).logits)
