from __future__ import annotations

import re
import statistics
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftx
from peftx import Claim, Plugin, Stack, TrainStep, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_bottleneck_adapter import BottleneckAdapter
from peftx_factorllm import Experts, FactorLlm, FactorLlmConfig, experts_of, hot
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prefixquant import PrefixQuant
from peftx_prompt_tuning import PromptTuning
from peftx_signround import SignRound

test_conformance = conformance("factorllm")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


class Block(nn.Module):
    """As Llama's, with biases."""

    def __init__(self, d: int, m: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, m), nn.Linear(d, m), nn.Linear(m, d)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def of_block(d: int = 6, m: int = 12, **options: Any) -> tuple[Block, Experts]:
    torch.manual_seed(0)
    block = Block(d, m)
    return block, Experts(block, ("gate", "up", "down", "act"), d, FactorLlmConfig(**options))


def run(layer: Experts, x: Tensor) -> Tensor:
    return layer.around(lambda x: pytest.fail("the dense block runs"), x)


def stack_of(*plugins: Any, arch: str = "llama", **options: Any) -> Stack:
    return Stack(tiny(arch), [*plugins, FactorLlm(**options)], tokenizer=tiny_tokenizer())


def layers_of(stack: Stack) -> list[Experts]:
    return [part.module for part in stack.ledger.of("factorllm", DeltaPart)]


def batch_of(stack: Stack, **options: Any) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, **options)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def term(stack: Stack, batch: dict[str, Tensor]) -> float:
    step = TrainStep(stack, batch)
    stack.run_train_step(step)
    return step.losses["factorllm"]


# -- the experts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 4, 12])
def test_experts_add_up_to_the_block(experts: int) -> None:
    block, layer = of_block(experts=experts, top_k=experts)
    x = torch.randn(2, 5, 6)
    parts = experts_of((block.gate, block.up, block.down), block.act, experts)
    torch.testing.assert_close(torch.stack([f(x) for f in parts]).sum(0), block(x))
    torch.testing.assert_close(run(layer, x), block(x))


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_all_experts_are_the_model(arch: str) -> None:
    stack, plain = stack_of(arch=arch, top_k=4), tiny(arch)
    x = example_inputs(plain)
    with torch.no_grad():
        torch.testing.assert_close(stack.model(**x).logits, plain(**x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_output_by_hand(k: int) -> None:
    block, layer = of_block(experts=4, top_k=k)
    x = torch.randn(7, 6)
    r = x @ layer.W_r.T
    expected = torch.zeros(7, 6)
    for n in range(7):
        for e in r[n].topk(k).indices.tolist():
            part = slice(3 * e, 3 * e + 3)
            gate, up = (m.weight[part] @ x[n] + m.bias[part] for m in (block.gate, block.up))
            h = F.silu(gate) * up
            expected[n] += 4 / k * (block.down.weight[:, part] @ h + block.down.bias / 4)
    torch.testing.assert_close(run(layer, x), expected)


def test_parameters_are_the_blocks_and_the_routers() -> None:
    stack, plain = stack_of(experts=8), tiny("llama")
    blocks = sum(p.numel() for layer in plain.model.layers for p in layer.mlp.parameters())
    d = plain.config.hidden_size
    assert stack.trainable_parameters() == blocks + len(layers_of(stack)) * 8 * d
    (first, *_) = layers_of(stack)
    assert first.W_r.abs().max() <= d**-0.5
    assert first.W_r.std() > 0.4 * d**-0.5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_products_go_with_k(k: int) -> None:
    block, layer = of_block(16, 64, experts=4, top_k=k)
    x = torch.randn(32, 16)

    def flops(function: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(x)
        return counter.get_total_flops()

    router = 2 * 32 * 16 * 4
    assert flops(lambda x: run(layer, x)) == flops(block) * k // 4 + router


@pytest.mark.parametrize(("tokens", "share"), [(1, 0.95), (256, 0.75)])
def test_one_expert_is_faster_than_the_block(tokens: int, share: float) -> None:
    """CPU time of a prompt and of a step of decoding; the products alone would be a quarter."""
    block, layer = of_block(512, 4096, experts=4, top_k=1)
    x = torch.randn(tokens, 512)

    def seconds(function: Any) -> float:
        start = time.process_time()
        function(x)
        return time.process_time() - start

    with torch.no_grad():
        pairs = [(seconds(lambda x: run(layer, x)), seconds(block)) for _ in range(9)]
    assert statistics.median(one / two for one, two in pairs) < share


# -- the router's lesson -----------------------------------------------------------------------------------------------


def test_the_lesson_by_hand() -> None:
    block, layer = of_block(experts=4, top_k=2)
    x = torch.randn(5, 6)
    dense = block(x).detach()
    with torch.no_grad():
        parts = [f(x) for f in layer.experts()]
    approximate, balance, W_r = 0.0, 0.0, layer.W_r.detach()
    for n in range(5):
        errors = torch.stack([(part[n] - 0.5 * dense[n]).square().mean() for part in parts])
        label = torch.zeros(4)
        label[errors.topk(2, largest=False).indices] = 1
        q, r = label.softmax(0), W_r @ x[n]
        p = r.softmax(0)
        approximate += float((p * (p / q).log()).sum()) / 5
        balance += float(p[r.topk(2).indices].sum()) / (5 * 4)
    found = layer.teach(x, dense)
    assert [float(t.detach()) for t in found] == pytest.approx([approximate, balance], rel=1e-4)


def test_the_label_is_the_planted_expert() -> None:
    """One expert does everything: it alone comes near to the dense block, and the router learns its number."""
    block, layer = of_block(experts=4, top_k=1)
    x = torch.randn(64, 6)
    with torch.no_grad():
        block.down.bias.zero_()
        block.down.weight[:, :6] = block.down.weight[:, 9:] = 0  # all but the third
        x[:, 0] = 1.0  # so that a router has a constant
        dense = 4 * block(x)  # of which a quarter is wanted
    optimizer = torch.optim.Adam([layer.W_r], 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        layer.teach(x, dense)[0].backward()
        optimizer.step()
    assert (layer.scores(x).argmax(-1) == 2).all()
    assert not any(p.grad is not None for p in block.parameters()), "it teaches the router alone"


@pytest.mark.parametrize(("straight", "approximate"), [(False, 0.05), (False, 0.0), (True, 0.0)])
def test_what_teaches_the_router(straight: bool, approximate: float) -> None:
    stack = stack_of(approximate=approximate, balance=0.0, straight=straight)
    stack.model.train()
    stack.train_step(batch_of(stack))
    for layer in layers_of(stack):
        taught = layer.W_r.grad is not None and bool(layer.W_r.grad.any())
        assert taught == (straight or approximate > 0)
    assert stack.model.model.layers[0].mlp.gate_proj.weight.grad.any()


def test_the_straight_gate_changes_no_output() -> None:
    x = torch.randn(7, 6)
    one, two = (of_block(straight=s)[1] for s in (False, True))
    torch.testing.assert_close(run(one, x), run(two, x))
    weights = torch.randn(7, 6)
    (run(two, x) * weights).sum().backward()
    _, layer = of_block()
    p = (x @ layer.W_r.T).softmax(-1)
    chosen = hot(p.detach(), 2)
    outs = torch.stack([f(x) for f in layer.experts()], 1).detach()  # [n, E, d]
    (2 * ((chosen * p)[..., None] * outs).sum(1) * weights).sum().backward()
    torch.testing.assert_close(two.W_r.grad, layer.W_r.grad)


def test_the_teacher_is_the_model_without_plugins() -> None:
    """x_t and FFN_t are of the frozen model's own pass, whatever experts and soft tokens have become."""
    stack = stack_of(PromptTuning(length=3), approximate=1.0, balance=0.0)
    with torch.no_grad():
        for p in stack.ledger.parameters("factorllm"):
            p.add_(torch.randn_like(p), alpha=0.1)
    plain, seen, batch = tiny("llama"), [], batch_of(stack, padding="left")
    for layer in plain.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        plain(**batch)
        real = batch["attention_mask"].bool()
        losses = [
            layer.teach(x[real], y[real])[0] for layer, (x, y) in zip(layers_of(stack), seen, strict=True)
        ]
    assert term(stack, batch) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_weights_of_the_terms() -> None:
    found = []
    for options in ({"approximate": 1.0, "balance": 0.0}, {"approximate": 0.0, "balance": 1.0}):
        stack = stack_of(**options)
        found.append(term(stack, batch_of(stack)))
    stack = stack_of(approximate=0.3, balance=0.7)
    assert term(stack, batch_of(stack)) == pytest.approx(0.3 * found[0] + 0.7 * found[1], rel=1e-5)
    stack = stack_of(approximate=0.0, balance=0.0)
    step = TrainStep(stack, batch_of(stack))
    stack.run_train_step(step)
    assert set(step.losses) == {"task"}


class Shorter(Plugin):
    """Changes the batch behind others."""

    claims = {Claim.NEEDS_GRADIENTS}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch = {name: x[:, :4] for name, x in step.batch.items()}
        return (yield)


def test_the_teacher_reads_the_batch_that_is_trained_on() -> None:
    stack, plain = Stack(tiny("llama"), [FactorLlm(), Shorter()]), stack_of()
    batch = batch_of(stack)
    assert term(stack, batch) == pytest.approx(
        term(plain, {name: x[:, :4] for name, x in batch.items()}), rel=1e-5
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_formula(checkpointing: bool) -> None:
    """The reference pass, which swaps the trained matrices for the base's, leaves the step's graph alone."""
    stack = stack_of(approximate=0.5, balance=0.5)
    if checkpointing:
        stack.model.activation_checkpointing_enable({"use_reentrant": False})
    stack.model.train()
    with torch.no_grad():
        for p in stack.ledger.parameters("factorllm"):
            p.add_(torch.randn_like(p), alpha=0.05)
    batch = batch_of(stack)
    stack.model(**batch).loss.backward()
    place = stack.model.model.layers[1].mlp.gate_proj.weight
    expected, place.grad = place.grad, None
    stack.model.zero_grad()
    stack.train_step(batch)
    torch.testing.assert_close(stack.model.model.layers[1].mlp.gate_proj.weight.grad, expected)


# -- life ------------------------------------------------------------------------------------------------------------


def test_it_trains_and_comes_back(tmp_path: Path) -> None:
    stack = stack_of(Lora(rank=2, targets="attention"), top_k=1)
    report = stack.train(ROWS, steps=3, batch_size=4, learning_rate=1e-2)
    assert report.terms["factorllm"] > 0
    before_training = tiny("llama").model.layers[0].mlp.gate_proj.weight
    assert not torch.equal(stack.model.model.layers[0].mlp.gate_proj.weight, before_training)
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        before = stack.model(**inputs).logits
        stack.save(tmp_path / "b")
        again = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
        assert torch.equal(again.model(**inputs).logits, before)
        stack.remove("factorllm")
        assert torch.equal(stack.model.model.layers[0].mlp.gate_proj.weight, before_training)


def test_packed_matrices_are_what_experts_read() -> None:
    stack = Stack(tiny("llama"), [FactorLlm(top_k=1), NF4Storage(targets="mlp")], tokenizer=tiny_tokenizer())
    inputs = example_inputs(stack.model)
    (layer, *_) = layers_of(stack)
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = run(layer, x)
        stack.compress()
        matrices = [getattr(layer.block[0], name) for name in layer.names]
        assert type(matrices[0]).__name__ == "NF4Linear"
        parts = experts_of(matrices[:3], matrices[3], 4)
        after = run(layer, x)
        expected = torch.stack(
            [4 * parts[e](x[n]) for n, e in enumerate(layer.scores(x).argmax(-1).tolist())]
        )
        torch.testing.assert_close(after, expected)
        assert 0 < (after - before).norm() < 0.3 * before.norm()
        assert stack.model(**inputs).logits.isfinite().all()


def test_routers_stay_in_full_precision() -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [FactorLlm()])
    (layer, *_) = layers_of(stack)
    assert layer.W_r.dtype == torch.float32
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(layer.scores(x), x.float() @ layer.W_r.T)
        assert run(layer, x).dtype == torch.bfloat16
        assert layer.double().scores(x).dtype == torch.float64


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": 5}, r"factorllm: 5 experts do not divide the 64 hidden units of model\.layers\.0\.mlp"),
        ({"experts": 128}, r"factorllm: 128 experts do not divide the 64 hidden units"),
        ({"experts": 20, "top_k": 20}, r"factorllm: 20 experts do not divide the 64 hidden units"),
        (
            {"experts": 70, "top_k": 70},
            r"70 experts do not .*\n.*a lower top_k: .* 64 is the largest divisor",
        ),
        ({"experts": 4, "top_k": 5}, r"top_k 5 of 4 experts"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_touched(options: dict[str, Any], said: str) -> None:
    model = tiny("llama", intermediate_size=64)
    before = dict(model.named_parameters())
    with pytest.raises(PeftxError, match=said) as caught:
        Stack(model, [FactorLlm(**options)])
    if found := re.fullmatch(r"experts: (\d+)", str(caught.value.hint)):
        Stack(tiny("llama", intermediate_size=64), [FactorLlm(**options | {"experts": int(found[1])})])
    assert bool(found) == ("do not divide" in said)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("first", [True, False])
def test_what_stands_on_the_layers_is_refused(first: bool) -> None:
    plugins = [Lora(rank=2, targets="mlp.up"), FactorLlm()]
    with pytest.raises(ConflictError, match=r"'factorllm' computes .*mlp.up_proj .*'lora' stands on them"):
        Stack(tiny("llama"), plugins if first else plugins[::-1])


def test_packing_goes_behind_and_needs_no_measurements() -> None:
    with pytest.raises(ConflictError, match=r"'factorllm' computes .*'nf4' packs them before"):
        Stack(tiny("llama"), [NF4Storage(), FactorLlm()])
    with pytest.raises(
        ConflictError, match=r"'prefixquant' measures .*'factorllm' computes some past their modules"
    ):
        Stack(tiny("llama"), [FactorLlm(), PrefixQuant()], tokenizer=tiny_tokenizer())
    for fitting in (
        [NF4Storage(targets="attention"), FactorLlm()],
        [FactorLlm(), SignRound(targets="attention")],
    ):
        Stack(tiny("llama"), fitting, tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="'signround' measures") as raised:
        Stack(tiny("llama"), [FactorLlm(), SignRound()], tokenizer=tiny_tokenizer())
    assert "leave the layer out" in str(raised.value)
    stack = Stack(tiny("llama"), [NF4Storage(), FactorLlm()], inject=False)
    stack.compress(ids=["nf4"])
    with pytest.raises(ConflictError, match="layer 0 has them packed already"):
        stack.inject()


def test_what_stands_on_the_block_goes_behind() -> None:
    adapter = BottleneckAdapter(form="parallel", bottleneck=4)
    with pytest.raises(ConflictError, match=r"pass over 'bottleneck-adapter'") as raised:
        Stack(tiny("llama"), [adapter, FactorLlm()])
    assert "this order works: factorllm, bottleneck-adapter" in str(raised.value)
    stack = Stack(tiny("llama"), [FactorLlm(top_k=4), BottleneckAdapter(form="parallel", bottleneck=4)])
    alone = Stack(tiny("llama"), [BottleneckAdapter(form="parallel", bottleneck=4)])
    inputs = example_inputs(stack.model)
    for one in (stack, alone):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in one.ledger.parameters("bottleneck-adapter"):
                p.copy_(torch.randn_like(p) * 0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            stack.model(**inputs).logits, alone.model(**inputs).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("arch", ["mixtral", "phi3", "gemma3n"])
def test_other_blocks_are_refused(arch: str) -> None:
    with pytest.raises(ArchitectureError, match="factorllm splits gated feed-forward blocks"):
        Stack(tiny(arch), [FactorLlm(experts=2)])


def test_a_block_that_computes_something_else_is_refused() -> None:
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: 1.3 * inner(x)
    with pytest.raises(ArchitectureError, match=r"layers\.1\.mlp computes more than down"):
        Stack(model, [FactorLlm()])
