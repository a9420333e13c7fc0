from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_ept import Ept, EptConfig, EptPrompt
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("ept")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
SMALL: dict[str, Any] = {"length": 4, "budget": 20, "longest": 16, "width": 3, "spaces": 2}
D = 32


def stack_of(arch: str = "llama", *others: Any, moved: bool = True, **options: Any) -> tuple[Stack, Ept]:
    plugin = Ept(**{**SMALL, **options})
    stack = Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer())
    if moved:
        random = torch.Generator().manual_seed(0)
        for p in plugin.prompt.W.values():
            p.data.copy_(torch.randn(p.shape, generator=random) * 0.3 / plugin.config.rate)
    return stack, plugin


def logits(stack: Stack, padding: str = "left") -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding=padding))


def plain_of(P: Tensor, arch: str = "llama") -> Stack:
    stack = Stack(tiny(arch), [PromptTuning(length=len(P))], tokenizer=tiny_tokenizer())
    (parameter,) = stack.ledger.parameters("prompt-tuning")
    parameter.data.copy_(P)
    return stack


# -- the equations -----------------------------------------------------------------------------------------------------


def by_hand(**changes: Any) -> EptPrompt:
    """d = 2, s = 2, n = 2, r = 1, K = 2, h = 1."""
    config = EptConfig(budget=4, length=2, longest=2, spaces=2, width=1, rate=0.5)
    P = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    prompt = EptPrompt(P, 1, config, spaces=True, call=None, owner="ept")  # type: ignore[arg-type]
    values = {"A": [[1.0], [-1.0]], "B": [[3.0, 1.0]], "D": [[[1.0], [0.0]], [[0.0], [2.0]]],
              "U": [[[10.0, 0.0]], [[0.0, -1.0]]], "G": [[1.0, 0.0], [0.0, 1.0]]} | changes  # fmt: skip
    for name, value in values.items():
        prompt.W[name].data.copy_(torch.tensor(value) / 0.5)
    return prompt


def test_fusion_by_hand() -> None:
    found = by_hand().fused()
    # Delta: (3, 1), (-3, -1); P Delta^T: (3, -3), (2, -2); sum of +-Delta weighed by a softmax is tanh of half the gap
    first, second = (math.tanh(x / math.sqrt(2)) for x in (3.0, 2.0))
    expected = torch.tensor([[1 + 3 * first, first], [3 * second, 2 + second]])
    torch.testing.assert_close(found, expected)


def test_the_gate_and_the_projections_by_hand() -> None:
    prompt = by_hand(B=[[0.0, 0.0]])  # P_f = P
    P = prompt.P.detach()
    torch.testing.assert_close(prompt.fused(), P)
    a = torch.tensor([0.5, 1.0]).softmax(0)  # of the mean (0.5, 1)
    torch.testing.assert_close(prompt.gate(P), a)
    Z_1 = torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    Z_2 = torch.tensor([[0.0, 0.0], [0.0, -4.0]])
    torch.testing.assert_close(prompt.rows(), P + a[0] * Z_1 + a[1] * Z_2)


def test_projections_and_gate_read_the_fused_prompt() -> None:
    prompt = by_hand()
    P_f = prompt.fused()
    Z = [P_f @ prompt.matrix("D")[k] @ prompt.matrix("U")[k] for k in (0, 1)]
    a = (prompt.matrix("G") @ P_f.mean(0)).softmax(0)
    torch.testing.assert_close(prompt.rows(), P_f + a[0] * Z[0] + a[1] * Z[1])


@pytest.mark.parametrize("spaces", [1, 2, 5])
def test_weights_of_the_gate_are_a_distribution(spaces: int) -> None:
    _, plugin = stack_of(spaces=spaces)
    a = plugin.prompt.gate(plugin.prompt.fused()).detach()
    assert a.shape == (spaces,)
    assert float(a.sum()) == pytest.approx(1, abs=1e-6)
    assert a.min() > 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bert"])
def test_starts_as_plain_prompt_tuning(arch: str) -> None:
    stack, plugin = stack_of(arch, moved=False)
    P = plugin.prompt.P.detach()
    assert torch.equal(plugin.prompt.rows(), P)
    assert torch.equal(logits(stack), logits(plain_of(P, arch)))
    every = stack.model.get_input_embeddings().weight
    assert torch.cdist(P, every).min(1).values.max() < 1e-2, "rows of tokens"


# -- what the model reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("longest", [16, 5])
def test_is_the_same_as_written_out(arch: str, longest: int) -> None:
    """[P* ; E(X) + Delta], rows of Delta by place; tokens behind the n-th have none."""
    stack, plugin = stack_of(arch, longest=longest, budget=24)
    prompt, model = plugin.prompt, stack.model.eval()
    ids = torch.arange(5, 14)[None]
    Delta = torch.zeros(9, D)
    known = (prompt.matrix("A") @ prompt.matrix("B")).detach()[:9]
    Delta[: len(known)] = known
    with torch.no_grad():
        found = model(ids).logits
        with stack.disabled():
            text = model.get_input_embeddings()(ids) + Delta
            written = model(inputs_embeds=torch.cat((prompt.rows()[None], text), 1)).logits[:, 4:]
    torch.testing.assert_close(found, written, rtol=1e-4, atol=1e-4)
    assert Delta.abs().min() > 0 or longest == 5


def test_the_encoder_alone_is_updated() -> None:
    stack, plugin = stack_of("t5")
    model, ids, answer = stack.model.eval(), torch.arange(5, 12)[None], torch.tensor([[0, 5, 6]])
    Delta = (plugin.prompt.matrix("A") @ plugin.prompt.matrix("B")).detach()[:7]
    with torch.no_grad():
        found = model(ids, decoder_input_ids=answer).logits
        with stack.disabled():
            text = torch.cat((plugin.prompt.rows()[None], model.encoder.embed_tokens(ids) + Delta), 1)
            written = model(inputs_embeds=text, decoder_input_ids=answer).logits
    torch.testing.assert_close(found, written, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_cache_and_pads_change_nothing(arch: str) -> None:
    stack, _ = stack_of(arch)
    model = stack.model.eval()
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        whole = model(ids).logits[:, -3:]
        cache = model(ids[:, :6], use_cache=True).past_key_values
        later = model(ids[:, 6:], past_key_values=cache).logits
        padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), 1)
        mask = torch.tensor([[0] * 3 + [1] * 9])
        beside = model(padded, attention_mask=mask).logits[:, -3:]
    torch.testing.assert_close(later, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beside, whole, rtol=1e-4, atol=1e-4)


def test_beams_and_greedy_see_the_same_update() -> None:
    stack, _ = stack_of()
    alone = [stack.generate(text, max_new_tokens=5) for text in ("ab", "cdefg")]
    assert stack.generate(["ab", "cdefg"], max_new_tokens=5) == alone
    assert stack.generate("ab", max_new_tokens=5, use_cache=False) == alone[0]


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_embeddings_do_for_tokens_and_tokens_looked_up_aside_are_not_moved(arch: str) -> None:
    stack, _ = stack_of(arch)
    model, inputs = stack.model.eval(), example_inputs(stack.model, padding="left")
    table = model.get_input_embeddings()
    with torch.no_grad():
        by_ids = output_of(model, inputs)
        inputs["inputs_embeds"] = table(inputs.pop("input_ids"))
        assert torch.equal(table(torch.tensor([5])), table.weight[5:6])
        torch.testing.assert_close(output_of(model, inputs), by_ids, rtol=1e-4, atol=1e-4)


def test_the_model_reads_s_rows_more_and_not_m() -> None:
    stack, _ = stack_of()
    seen: list[int] = []
    layer = stack.model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    stack.model(torch.arange(5, 14)[None])
    handle.remove()
    assert seen == [4 + 9]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "s", "n"), [(20, 4, 16), (100, 60, 256), (12, 2, 7), (9, 8, 0)])
def test_the_budget_holds_and_is_used(m: int, s: int, n: int) -> None:
    n = n or 1
    options = {"budget": m, "length": s, "longest": n}
    if (m - s) * D < n + D:
        with pytest.raises(PeftxError, match="less than a rank of 1") as caught:
            stack_of(**options)
        least = int(str(caught.value.hint).split()[1])
        stack_of(**{**options, "budget": least})
        with pytest.raises(PeftxError, match="rank of 1"):
            stack_of(**{**options, "budget": least - 1})
        return
    _, plugin = stack_of(**options)
    P, W = plugin.prompt.P, plugin.prompt.W
    assert P.shape == (s, D)
    used = P.numel() + W["A"].numel() + W["B"].numel()
    assert m * D - (n + D) < used <= m * D
    assert W["A"].shape == (n, W["B"].shape[0])


def test_the_defaults_share_out_a_hundred_rows() -> None:
    """At the width of T5-base: r = 30."""
    config = Ept().config
    assert (config.budget, config.length, config.longest) == (100, 60, 256)
    assert (config.budget - config.length) * 768 // (config.longest + 768) == 30


def test_the_rate_is_that_of_the_matrices_under_adam() -> None:
    stack, plugin = stack_of(rate=0.01)
    prompt, inputs = plugin.prompt, example_inputs(tiny("llama"))
    before = {name: prompt.matrix(name).detach() for name in prompt.W}
    P = prompt.P.detach().clone()
    optimizer = torch.optim.Adam(stack.ledger.parameters("ept"), lr=0.1, eps=0)
    stack.train_step(inputs | {"labels": inputs["input_ids"]}, optimizer=optimizer)
    for name, old in before.items():
        moved = (prompt.matrix(name).detach() - old).abs()
        assert float(moved.median()) == pytest.approx(0.1 * 0.01, rel=1e-3), name
    assert float((prompt.P.detach() - P).abs().median()) == pytest.approx(0.1, rel=1e-3)


def test_everything_trains_from_the_start() -> None:
    stack, plugin = stack_of(moved=False, keep_spaces=True)
    before = {name: p.detach().clone() for name, p in plugin.prompt.named_parameters()}
    stack.train(ROWS, steps=3, batch_size=2, learning_rate=0.1)
    for name, p in plugin.prompt.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert plugin.state == {}


# -- after a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_folded_prompt_computes_the_same_bits(arch: str, tmp_path: Path) -> None:
    stack, plugin = stack_of(arch)
    with torch.no_grad():
        rows, expected = plugin.prompt.rows(), logits(stack)
    plugin.collapse()
    assert torch.equal(plugin.prompt.rows(), rows)
    assert torch.equal(logits(stack), expected)
    stack.save(tmp_path / "b")
    stored = load_file(tmp_path / "b" / "ept.safetensors")
    assert sum(x.numel() for x in stored.values()) == stack.trainable_parameters() <= 20 * D
    again = peftx.load(tmp_path / "b", model=tiny(arch), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), expected)
    plugin.collapse()  # again, and nothing happens
    assert torch.equal(logits(stack), expected)


def test_folding_copies_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of()

    def refuse(self: Any, memo: Any) -> None:
        raise AssertionError("the model is copied")

    monkeypatch.setattr(type(stack.model), "__deepcopy__", refuse, raising=False)
    plugin.collapse()


def test_a_run_folds_and_another_trains_on(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.1)
    assert plugin.state == {"collapsed": True}
    assert set(plugin.prompt.W) == {"A", "B"}
    P, A = plugin.prompt.P.detach().clone(), plugin.prompt.W["A"].detach().clone()
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.1)
    assert not torch.equal(plugin.prompt.P, P)
    assert not torch.equal(plugin.prompt.W["A"], A)


def test_a_bundle_in_the_middle_has_the_gate(tmp_path: Path) -> None:
    stack, _ = stack_of(keep_spaces=True)
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.1)
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), logits(stack))
    assert "G" in again.plugins["ept"].prompt.W


def test_bfloat16_folds_as_it_computes() -> None:
    plugin = Ept(**SMALL)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.1, weight_decay=0.1)
    assert plugin.prompt.P.dtype == torch.bfloat16
    assert logits(stack).isfinite().all()


def test_before_and_behind_an_adapter() -> None:
    for others, stack_first in (((Lora(rank=2),), True), ((), False)):
        stack, _ = stack_of("llama", *others)
        if not stack_first:
            stack = Stack(tiny("llama"), [Ept(**SMALL), Lora(rank=2)], tokenizer=tiny_tokenizer())
        stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.01)
        assert logits(stack).isfinite().all()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_model_of_states_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="ept: MambaForCausalLM keeps states"):
        stack_of("mamba")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"length": 20}, "length 20 leaves nothing of the budget 20"),
        ({"rate": 0}, "rate"),
        ({"spaces": 0}, "spaces"),
        ({"width": 0}, "width"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(PeftxError, match=what):
        Ept(**{**SMALL, **options})
