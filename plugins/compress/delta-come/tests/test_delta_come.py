from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import peftx
from peftx import Stack
from peftx.composition.conflicts import find_conflicts
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.kernel.members import Member
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx.toolkits.compression import dequantize, quantize
from peftx_connected_adapters import ConnectedAdapters
from peftx_delta_come import DeltaCome, VectorDelta, Vectors, gptq, hessians
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant

test_conformance = conformance("delta-come")

TWO = {"samples": 2, "length": 24}
SMALL = {"alpha": 0.5, "bits": (8, 4), "vectors": (2,), "group_size": 32}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int, *, seed: int = 5) -> Tensor:
    """H = X^T X of correlated features."""
    X = normal(4 * n, n, seed=seed) @ (torch.eye(n) + 0.4 * normal(n, n, seed=seed + 1))
    return X.mT @ X


def long_tail(out: int, width: int, *, seed: int = 0) -> Tensor:
    """Singular values that fall as those of a fine-tune do: a few large ones, and a long rest."""
    n = min(out, width)
    U, V = (torch.linalg.qr(normal(m, n, seed=seed + k))[0] for k, m in enumerate((out, width)))
    return (U * (1.0 / torch.arange(1, n + 1))) @ V.mT


def packed(D: Tensor, groups: list[tuple[int, int]], H: Tensor | None = None, size: int = 128) -> VectorDelta:
    delta = VectorDelta(tuple(D.shape), groups, size)
    delta.take(D, torch.eye(D.shape[1]) if H is None else H)
    return delta


def made(delta: VectorDelta) -> Tensor:
    """What the delta adds to the weight."""
    A, B = delta.factors(torch.float32)
    return delta.fold(torch.zeros(len(B), A.shape[1]), None)[0]


def lost(D: Tensor, groups: list[tuple[int, int]], H: Tensor | None = None) -> float:
    return float((made(packed(D, groups, H)) - D).norm())


def tuned(arch: str = "llama", *, seed: int = 1, **options: object) -> Stack:
    """A stack whose whole model moved off its base."""
    stack = Stack(tiny(arch), [DeltaCome(**{**SMALL, **options})], tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("delta-come"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return stack


def weights(stack: Stack) -> dict[str, Tensor]:
    return {name: p.theta.detach().clone() for name, p in stack.plugins["delta-come"].places.items()}


def deltas(stack: Stack) -> dict[str, VectorDelta]:
    return {part.key: part.module for part in stack.ledger.of("delta-come", DeltaPart)}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(model))


# --------------------------------------------------------------------------------------------------------------- gptq
def asymmetric(W: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the nearest, scales and zero points, as large as W."""
    plain = quantize(W, bits=bits, symmetric=False)
    return plain.q, plain.scale.expand_as(W), plain.zero.float().expand_as(W)


def test_gptq_by_hand() -> None:
    """Two columns. H_22 is larger, so the second goes first, and the first makes up for what that one lost."""
    W, H = torch.tensor([[0.9, 0.4]]), torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    q = gptq(W, H, torch.ones(1, 2), torch.zeros(1, 2), 2)
    # H / 2 + 0.01: the best w_1 after w_2 lost 0.4 is 0.9 + 0.4 * 0.5 / 0.51 = 1.29
    assert q.tolist() == [[1, 0]]
    q = gptq(torch.tensor([[1.2, 0.4]]), H, torch.ones(1, 2), torch.zeros(1, 2), 2)
    assert q.tolist() == [[2, 0]]  # 1.59, where the nearest is 1
    q = gptq(torch.tensor([[9.0, -9.0]]), torch.eye(2), torch.ones(1, 2), torch.ones(1, 2), 2)
    assert q.tolist() == [[3, 0]]


def test_gptq_of_unrelated_inputs_is_the_nearest() -> None:
    W = normal(6, 20)
    q, s, z = asymmetric(W, 3)
    for H in (torch.eye(20), torch.diag(torch.rand(20) + 0.1), torch.zeros(20, 20)):
        assert torch.equal(gptq(W, H, s, z, 3), q)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_output(bits: int) -> None:
    W, H = normal(16, 48), inputs(48)
    plain, s, z = asymmetric(W, bits)
    errors = [((q - z) * s - W) for q in (gptq(W, H, s, z, bits).float(), plain.float())]
    found, nearest = (float(((E @ H) * E).sum()) for E in errors)
    assert found < 0.6 * nearest
    order = H.diagonal().argsort(descending=True)  # the same columns in another order are the same columns
    assert torch.equal(gptq(W[:, order], H[order][:, order], s, z, bits), gptq(W, H, s, z, bits)[:, order])


# ------------------------------------------------------------------------------------------------------------ vectors
@pytest.mark.parametrize(("bits", "size"), [(8, 32), (3, 32), (2, 50), (5, 7)])
def test_vectors_are_packed(bits: int, size: int) -> None:
    vectors, whole = normal(4, size), Vectors(4, size, bits, 16)
    found = whole.take(vectors, torch.eye(size), mixed=False)
    expected = quantize(vectors, bits=bits, group_size=16, symmetric=False, scale_dtype=torch.float16)
    assert torch.equal(found, dequantize(expected, torch.float32))
    assert torch.equal(Vectors(4, size, bits, 16).take(vectors, torch.eye(4), mixed=True), found)
    assert whole.q.shape == (4, -(-size * bits // 8))
    whole.to(torch.bfloat16)
    assert torch.equal(whole(), found)


def test_each_side_is_rounded_for_its_inputs() -> None:
    """V for X^T X; U for what comes out of the packed V and S."""
    D, H = long_tail(24, 32), inputs(32)
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    delta = packed(D, [(2, 8), (6, 3)], H, size=16)
    for i, (g, bits) in enumerate(((slice(0, 2), 8), (slice(2, 8), 3))):
        n = g.stop - g.start
        v = Vectors(n, 32, bits, 16).take(V[g], H, mixed=False)
        Y = S[g, None] * v
        u = Vectors(n, 24, bits, 16).take(U[:, g].mT.contiguous(), Y @ H @ Y.mT, mixed=True)
        assert torch.equal(delta.V[i](), v)
        assert torch.equal(delta.U[i](), u)
    assert torch.equal(delta.S, S[:8])
    A, B = delta.factors(torch.float32)
    torch.testing.assert_close(made(delta), B @ A)
    torch.testing.assert_close(A, delta.S[:, None] * torch.cat([v() for v in delta.V]))


def test_all_vectors_are_the_difference() -> None:
    """In eight bits nearly so, and to 1e-5 before they are rounded."""
    D = normal(24, 32) * 0.01
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    torch.testing.assert_close((U * S) @ V, D, atol=1e-5, rtol=0)
    assert lost(D, [(24, 8)]) < 0.02 * float(D.norm())
    best = (S[4:].square().sum()).sqrt()  # nothing of rank 4 does better
    assert float(best) <= lost(D, [(4, 8)]) < 1.01 * float(best)


def test_no_difference_costs_nothing() -> None:
    delta = packed(torch.zeros(8, 16), [(2, 8), (3, 2)], inputs(16))
    assert not made(delta).any()


def test_more_bits_lose_less() -> None:
    """A vector that moves to more bits, at any place in the order; and mixed bits beat one width of as many bytes."""
    D, H = long_tail(64, 96), inputs(96)
    for stairs in ([(0, 8), (8, 4), (8, 2)], [(2, 8), (6, 4), (8, 2)], [(2, 8), (14, 4), (0, 2)], [(16, 8)]):
        now = lost(D, stairs)
        assert now < locals().get("before", float("inf"))
        before = now
    plan = DeltaCome(alpha=1 / 8, vectors=(2, 8))
    mixed = plan.groups((64, 96))
    single = [DeltaCome(alpha=1 / 8, bits=(b,), vectors=()).groups((64, 96)) for b in (8, 3, 2)]
    weighted = [float(((E := made(packed(D, g, H)) - D) @ H * E).sum()) for g in (mixed, *single)]
    assert all(weighted[0] < other for other in weighted[1:])
    assert all(lost(D, mixed) < lost(D, other) for other in single)


def test_two_products_are_one() -> None:
    delta, W, x = packed(normal(6, 9), [(2, 8), (1, 2)]), normal(6, 9, seed=1), normal(4, 9, seed=2)
    folded, bias = delta.fold(W, None)
    assert bias is None
    torch.testing.assert_close(delta(x, F.linear(x, W)), F.linear(x, folded), atol=1e-5, rtol=1e-5)
    assert delta(x.bfloat16(), F.linear(x, W).bfloat16()).dtype == torch.bfloat16
    assert delta.fold(W.bfloat16(), None)[0].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------- budget
def test_the_papers_numbers_of_vectors() -> None:
    """2, 32 and 968 of 4096 x 4096; a few less, since what goes with the numbers counts too."""
    for shape, paper in (((4096, 4096), 968), ((11008, 4096), 1428)):
        first, second, rest = DeltaCome().groups(shape)
        assert (first, second, rest[1]) == ((2, 8), (32, 3), 2)
        assert 0.84 * paper < rest[0] < paper
    by_nominal = (4096 * 4096 - 2 * 8192 * 8 - 32 * 8192 * 3) // (8192 * 2)
    assert by_nominal == 968


@pytest.mark.parametrize(
    ("shape", "alpha", "expected"),
    [
        ((64, 64), 1 / 16, [(2, 8), (4, 3), (0, 2)]),  # 512 bytes: 2 of 138, then 4 of 58
        ((64, 64), 2.0, [(2, 8), (32, 3), (30, 2)]),  # no more than the rank
        ((32, 32), 0.05, [(1, 8), (0, 3), (1, 2)]),
    ],
)
def test_groups_keep_to_rank_and_budget(
    shape: tuple[int, int], alpha: float, expected: list[tuple[int, int]]
) -> None:
    found = DeltaCome(alpha=alpha).groups(shape)
    assert found == expected
    delta = VectorDelta(shape, found, 128)
    assert sum(t.nbytes for t in delta.state_dict().values()) <= alpha * 2 * shape[0] * shape[1]


def test_bytes_on_disk(tmp_path: Path) -> None:
    stack = tuned(alpha=1 / 4)
    stack.compress(TEXTS, **TWO)
    raw = (stack.save(tmp_path / "bundle") / "delta-come.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    held = json.loads(raw[8 : 8 + size])
    spans = [held[n]["data_offsets"] for n in held if n.rpartition(".")[2] in ("q", "scale", "zero", "S")]
    scores = stack.evaluate(["a text"], metrics=["delta-come"])
    halves = sum(2 * site.weight.numel() for site in stack.view("delta-come").linears("all", whole=True))
    assert 0.7 * halves / 4 < scores["packed_bytes"].value <= halves / 4
    assert sum(end - start for start, end in spans) == scores["packed_bytes"].value
    assert 0 < scores["lost"].value < 1


# ------------------------------------------------------------------------------------------------------- the compress
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "phi3"])
def test_matrices_of_every_kind(arch: str) -> None:
    """Each difference as [out, in], of what the fine-tuned block was given."""
    stack = tuned(arch)
    moved = weights(stack)
    start = {name: place.theta_0.clone() for name, place in stack.plugins["delta-come"].places.items()}
    sites = {site.path: site for site in stack.view("delta-come").linears("all", whole=True)}
    stack.compress(TEXTS, **TWO)
    assert deltas(stack).keys() == sites.keys()
    squares = torch.zeros(2)
    for path, delta in deltas(stack).items():
        D = moved[f"{path}.weight"] - start[f"{path}.weight"]
        D = D.mT if sites[path].turned else D
        squares += torch.stack(((made(delta) - D).square().sum(), D.square().sum()))
        assert float((made(delta) - D).norm()) < 0.95 * float(D.norm())
    assert stack.plugins["delta-come"].state["error"] == pytest.approx(
        float((squares[0] / squares[1]).sqrt()), rel=1e-4
    )


def test_inputs_are_those_of_the_fine_tuned_block() -> None:
    stack, seen = tuned(), {}
    moved = weights(stack)
    sites = [s for s in stack.view("delta-come").linears("all", whole=True) if s.layer == 0]
    block = stack.model.model.layers[0]

    class Replay:
        def replay(self, block: torch.nn.Module) -> list[Tensor]:
            with torch.no_grad():
                return [stack.model(torch.arange(5, 5 + n)[None]).logits for n in (6, 3)]

    handle = sites[0].module.register_forward_pre_hook(lambda m, x: seen.setdefault("x", []).append(x[0][0]))
    found = hessians(sites, block, Replay())
    handle.remove()
    X = torch.cat(seen["x"])
    torch.testing.assert_close(found[0], X.mT @ X)
    assert not block.self_attn.q_proj._forward_pre_hooks
    # By the walk: the first block's are the same before and after, and the delta is rounded for them.
    batch = tiny_tokenizer()(TEXTS[0])["input_ids"]
    assert batch
    stack.compress(TEXTS, **TWO)
    path = "model.layers.0.self_attn.q_proj"
    D = moved[f"{path}.weight"] - dict(tiny("llama").named_parameters())[f"{path}.weight"]
    plain = packed(D, DeltaCome(**SMALL).groups(tuple(D.shape)), size=32)
    assert not torch.equal(deltas(stack)[path].V[1].q, plain.V[1].q)


def test_the_rest_stays_fine_tuned_and_the_matrices_are_the_base(tmp_path: Path) -> None:
    stack = tuned("qwen2")
    moved, plain = weights(stack), dict(tiny("qwen2").named_parameters())
    before = logits(stack.model)
    matrices = {f"{site.path}.weight" for site in stack.view("delta-come").linears("all")}
    stack.compress(TEXTS, **TWO)
    now = weights(stack)
    assert {name for name in now if torch.equal(now[name], plain[name])} == matrices
    assert all(torch.equal(now[name], moved[name]) for name in now.keys() - matrices)
    assert stack.trainable_parameters() == 0
    after, base = logits(stack.model), logits(tiny("qwen2"))
    assert float((after - before).norm()) < 0.8 * float((base - before).norm())
    stack.save(tmp_path / "tenant")
    with stack.disabled("delta-come"):
        assert torch.equal(logits(stack.model), base)
    model = tiny("qwen2")
    loaded = peftx.load(tmp_path / "tenant", model=model, tokenizer=tiny_tokenizer())
    assert torch.equal(logits(model), after)
    loaded.merge()
    torch.testing.assert_close(logits(model), after, atol=1e-4, rtol=1e-4)
    stack.remove("delta-come")
    assert torch.equal(logits(stack.model), base)


def test_a_run_that_is_stopped_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = tuned()
    before, moved, calls = logits(stack.model), weights(stack), []

    def stop(self: VectorDelta, *_: Tensor) -> None:
        calls.append(self)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(VectorDelta, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        stack.compress(TEXTS, **TWO)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in weights(stack).items())
    assert torch.equal(logits(stack.model), before)
    assert not deltas(stack)


def test_fine_tuned_elsewhere(tmp_path: Path) -> None:
    stack = tuned()
    moved = weights(stack)
    stack.export(tmp_path / "tuned")
    options = {**SMALL, "finetuned": str(tmp_path / "tuned")}
    other = Stack(tiny("llama"), [DeltaCome(**options)], tokenizer=tiny_tokenizer())
    assert all(torch.equal(tensor, moved[name]) for name, tensor in weights(other).items())
    for one in (stack, other):
        one.compress(TEXTS, **TWO)
    assert torch.equal(logits(other.model), logits(stack.model))
    other.save(tmp_path / "bundle")
    (tmp_path / "tuned").rename(tmp_path / "gone")
    model = tiny("llama")
    peftx.load(tmp_path / "bundle", model=model, tokenizer=tiny_tokenizer())
    assert torch.equal(logits(model), logits(other.model))
    tiny("qwen2").save_pretrained(tmp_path / "qwen2")
    with pytest.raises(
        PeftxError, match=r"delta-come: .* is no fine-tune of this base: .*bias is in one of the two alone"
    ):
        Stack(
            tiny("llama"), [DeltaCome(finetuned=str(tmp_path / "qwen2"), **SMALL)], tokenizer=tiny_tokenizer()
        )


def test_what_goes_behind_it() -> None:
    for other in (Lora(rank=2), PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)):
        plugins = [DeltaCome(**SMALL), other]
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
        stack.inject(["delta-come"])
        stack.compress(TEXTS, ["delta-come"], **TWO)
        before = logits(stack.model)
        if isinstance(other, Lora):
            stack.inject(["lora"])
            assert stack.trainable_parameters() == stack.plugin_parameters("lora")
        else:
            stack.compress(TEXTS, ["prefixquant"], **TWO)
        torch.testing.assert_close(logits(stack.model), before, atol=0.1, rtol=0.1)


def test_calls_of_the_whole_model_come_behind_it() -> None:
    """Refused when the stack is built, before anything is trained; the way out that the error names works."""
    plugins = [
        DeltaCome(alpha=0.5, bits=(8,), vectors=(), group_size=32),
        ConnectedAdapters(inside=2, aside=2),
    ]
    with pytest.raises(ConflictError, match=r"runs layers one by one .* calls of the whole model") as error:
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    assert "inject 'delta-come', train and compress it, and inject 'connected-adapters' then" in str(
        error.value
    )
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["delta-come"])
    stack.train([{"prompt": "a", "completion": "b"}] * 4, steps=1, batch_size=2, learning_rate=1e-3)
    stack.compress(TEXTS, ["delta-come"], samples=2, length=16)
    before = logits(stack.model)
    stack.inject(["connected-adapters"])
    torch.testing.assert_close(logits(stack.model), before)
    (known,) = find_conflicts([Member("connected-adapters", plugins[1]), Member("delta-come", plugins[0])])
    assert known.working_order == ()  # in the other order it calibrates with them all the same


def test_refused() -> None:
    with pytest.raises(PeftxError, match="no fine-tuned model yet") as caught:
        Stack(tiny("llama"), [DeltaCome(**SMALL)], tokenizer=tiny_tokenizer(), inject=False).compress(TEXTS)
    assert "phase: after-training" in str(caught.value.hint)
    with pytest.raises(ArchitectureError, match="delta-come: t5 has encoder and decoder"):
        Stack(tiny("t5"), [DeltaCome(**SMALL)])
    with pytest.raises(ArchitectureError, match="delta-come: mixtral has experts") as caught:
        Stack(tiny("mixtral"), [DeltaCome(**SMALL)])
    assert "targets: 'all !experts" in str(caught.value.hint)
    with pytest.raises(ArchitectureError, match=r"32x32\) has no room for a vector in alpha = 0.01"):
        Stack(tiny("llama"), [DeltaCome(alpha=0.01)])
    with pytest.raises(ArchitectureError, match=r"delta-come: llama has head .* in lm_head"):
        Stack(tiny("llama"), [DeltaCome(**SMALL, targets="all head")])
    packing = PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)
    stack = Stack(tiny("llama"), [packing, DeltaCome(**SMALL)], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["prefixquant"], **TWO)
    with pytest.raises(ConflictError, match=r"delta-come: .*q_proj is packed already"):
        stack.inject()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": (8, 2)}, "2 bit widths go with 1 numbers of vectors"),
        ({"bits": (8, 3, 2), "vectors": (2, -1)}, "numbers of vectors, from 0 on"),
        ({"bits": (8, 3, 1)}, "bits are from 2 to 8"),
        ({"alpha": 0}, "alpha"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], said: str) -> None:
    with pytest.raises(PeftxError, match=said):
        DeltaCome(**options)
