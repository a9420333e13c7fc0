from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, MergeError, PeftxError
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_bitfit import AddedBias, Bitfit

test_conformance = conformance("bitfit")
test_conformance_of_added_biases = conformance(
    "bitfit",
    options={"add": True},
    models=["llama", "qwen2"],
    not_on={},
    expected_failures={
        "llama-effects_match_claims": "the claim is of models with biases; here all are added"
    },
)
test_conformance_of_the_papers_two = conformance(
    "bitfit", options={"targets": "attention.q mlp.up"}, models=["gpt2"], not_on={}
)


def batch_of(model: Any, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(model, seed=seed)
    return {**inputs, "labels": inputs["input_ids"]}


def train(stack: Stack, steps: int = 3, weight_decay: float = 0.1) -> None:
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    for i in range(steps):
        stack.train_step(batch_of(stack.model, seed=i), optimizer=optimizer)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def biases(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


def trained(stack: Stack) -> set[str]:
    return {name for name, p in stack.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("arch", ["bert", "gpt2", "opt", "qwen2"])
def test_equals_the_biases_of_peft(arch: str) -> None:
    """PEFT's `bias="all"` beside a LoRA that adds nothing: trained on the same batches, all numbers are the same."""
    from peft import LoraConfig, get_peft_model

    name = {"bert": "query", "gpt2": "c_attn"}.get(arch, "q_proj")
    config = LoraConfig(r=1, target_modules=[name], bias="all", fan_in_fan_out=arch == "gpt2")
    theirs = get_peft_model(tiny(arch), config)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.requires_grad_(False)  # B is zero
    stack = Stack(tiny(arch), [Bitfit()])
    own = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in own) == stack.trainable_parameters()
    optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)
    for i in range(4):
        theirs(**batch_of(stack.model, seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(stack, 4)
    ours = weights(stack.model)
    for key, parameter in theirs.named_parameters():
        if "lora_" not in key:
            plain = key.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(parameter, ours[plain]), plain
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        mine, wanted, base = (output_of(m, inputs) for m in (stack.model, theirs.eval(), tiny(arch)))
    assert (mine - wanted).abs().max() == 0
    assert (mine - base).abs().max() > 0.01


@pytest.mark.parametrize("arch", ["bert", "gpt2", "qwen2", "opt", "bart", "mamba", "whisper", "gpt_oss"])
def test_all_biases_train_and_nothing_else(arch: str) -> None:
    model = tiny(arch)
    wanted = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert trained(Stack(model, [Bitfit()])) == wanted


@pytest.mark.parametrize("arch", ["bert", "gpt2", "qwen2"])
def test_only_biases_move(arch: str) -> None:
    stack = Stack(tiny(arch), [Bitfit()])
    before = weights(stack.model)
    train(stack)
    after = weights(stack.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == biases(stack.model)
    stack.remove("bitfit")
    assert all(torch.equal(p, before[name]) for name, p in stack.model.named_parameters())


def test_trainable_count_of_a_layer_of_bert() -> None:
    """b_q, b_k, b_v, b_m1, b_LN1 [d], b_m2 [f], b_m3, b_LN2 [d]; 0.08% of BERT-large."""
    stack = Stack(tiny("bert", head="base"), [Bitfit(targets="all norm.attention norm.mlp")])
    d, f, layers = 32, 48, 2
    assert stack.trainable_parameters() == layers * (7 * d + f)
    assert 0.0007 < 24 * (7 * 1024 + 4096) / 335e6 < 0.0009


def test_the_papers_two_biases() -> None:
    """b_q and b_m2: 0.04% in the paper, of each layer d + f."""
    stack = Stack(tiny("bert"), [Bitfit(targets="attention.q mlp.up")])
    assert stack.trainable_parameters() == 2 * (32 + 48)
    assert all(n.endswith(("query.bias", "intermediate.dense.bias")) for n in trained(stack))
    assert not stack.ledger.of("bitfit", DeltaPart)


def test_a_part_of_a_fused_bias_moves_alone() -> None:
    """GPT-2's q alone: what trains is added to the first third of the bias of c_attn, and folds into it."""
    stack = Stack(tiny("gpt2"), [Bitfit(targets="attention.q mlp.up")])
    assert stack.trainable_parameters() == 2 * (32 + 128)
    assert len(stack.ledger.of("bitfit", DeltaPart)) == len(stack.ledger.of("bitfit", BasePart)) == 2
    before = weights(tiny("gpt2"))
    train(stack)
    stack.merge()
    for name, parameter in stack.model.named_parameters():
        if "c_attn.bias" in name:
            assert (parameter[:32] != before[name][:32]).all()
            assert torch.equal(parameter[32:], before[name][32:])
    together = Stack(tiny("gpt2"), [Bitfit(targets="attention.q,k,v")])
    assert not together.ledger.of("bitfit", DeltaPart)
    assert len(together.ledger.of("bitfit", BasePart)) == 2


def test_a_part_of_a_fused_bias_takes_the_steps_of_the_bias() -> None:
    """Adam's steps of b' from 0 are those of b, so q's third is what it is where q, k and v train, after one step."""
    found = []
    for targets in ("attention.q", "attention.q,k,v"):
        stack = Stack(tiny("gpt2"), [Bitfit(targets=targets)])
        train(stack, 1, weight_decay=0.0)
        stack.merge()
        found.append(stack.model.transformer.h[0].attn.c_attn.bias[:32].detach())
    assert torch.allclose(*found, atol=1e-6)


def test_each_stacked_expert_has_a_bias_of_its_own() -> None:
    stack = Stack(tiny("gpt_oss"), [Bitfit(targets="experts.gate")])
    assert [len(p) for p in stack.ledger.parameters("bitfit")] == [4, 4]
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        base = output_of(stack.model, inputs)
        for parameter in stack.ledger.parameters("bitfit"):
            parameter[1] += 1.0
        moved = output_of(stack.model, inputs)
        stack.merge()
        assert torch.allclose(output_of(stack.model, inputs), moved, atol=1e-5)
    assert (moved - base).abs().max() > 1e-3


def test_added_bias_by_hand() -> None:
    delta = AddedBias(2)
    assert not delta.bias.any()
    with torch.no_grad():
        delta.bias.copy_(torch.tensor([1.0, -2.0]))
    y = torch.tensor([[10.0, 10.0]])
    assert delta(torch.ones(1, 3), y).tolist() == [[11.0, 8.0]]
    weight = torch.ones(2, 3)
    same, bias = delta.fold(weight, None)
    assert same is weight
    assert bias.tolist() == [1.0, -2.0]
    assert delta.fold(weight, torch.tensor([0.5, 0.5]))[1].tolist() == [1.5, -1.5]


def test_biases_are_added_where_there_are_none() -> None:
    stack = Stack(tiny("qwen2"), [Bitfit(add=True)])
    added = {part.path.rpartition(".")[2] for part in stack.ledger.of("bitfit", DeltaPart)}
    own = {part.key.rpartition(".")[2] for part in stack.ledger.of("bitfit", BasePart)}
    assert added == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert own == {"q_proj", "k_proj", "v_proj"}
    some = Stack(tiny("llama"), [Bitfit(add=True, targets="attention.q mlp.gate,up")])
    assert some.trainable_parameters() == 2 * (32 + 48 + 48)
    assert {
        p.dtype for p in Stack(tiny("llama").bfloat16(), [Bitfit(add=True)]).ledger.parameters("bitfit")
    } == {torch.float32}


def test_added_biases_equal_a_model_that_has_them(tmp_path: Path) -> None:
    """A Llama with biases of zeros, of which Bitfit trains those of the model, beside one without and `add`."""
    options = {"attention_bias": True, "mlp_bias": True}
    with_biases = tiny("llama", **options)
    missing, _ = with_biases.load_state_dict(tiny("llama").state_dict(), strict=False)
    with torch.no_grad():
        for name in missing:
            with_biases.get_parameter(name).zero_()
    theirs, ours = Stack(with_biases, [Bitfit()]), Stack(tiny("llama"), [Bitfit(add=True)])
    assert theirs.trainable_parameters() == ours.trainable_parameters()
    for stack in (theirs, ours):
        parameters = [p for p in stack.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for i in range(3):
            stack.train_step(batch_of(stack.model, seed=i), optimizer=optimizer)
    inputs = example_inputs(ours.model)
    with torch.no_grad():
        assert torch.allclose(output_of(ours.model, inputs), output_of(theirs.model, inputs), atol=1e-5)
    ours.merge()
    for name in missing:
        assert torch.allclose(ours.model.get_parameter(name), theirs.model.get_parameter(name), atol=1e-6)
    with pytest.raises(MergeError, match=r"LlamaForCausalLM has no parameter '.*bias'"):
        ours.export(tmp_path / "plain")  # whose class would drop them


def test_biases_go_through_a_bundle_and_a_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stack = Stack(tiny("gpt2"), [Bitfit(targets="attention.q mlp.up norm")], tokenizer=tiny_tokenizer())
    train(stack)
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        wanted = output_of(stack.model, inputs)
        loaded = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("gpt2"))
        assert torch.equal(output_of(loaded.model, inputs), wanted)
        plain = AutoModelForCausalLM.from_pretrained(stack.export(tmp_path / "plain"))
        assert torch.allclose(output_of(plain.eval(), inputs), wanted, atol=1e-5)


def test_a_quantized_layer_gets_one_beside_its_own() -> None:
    model = tiny("gpt2")
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = QuantLinear.from_linear(mlp.c_fc, bits=8)
    targets = "mlp.up layers=0"
    with pytest.raises(ArchitectureError, match=r"bitfit: 1 of the layers have no bias, .*c_fc"):
        Stack(model, [Bitfit(targets=targets)])
    stack = Stack(model, [Bitfit(targets=targets, add=True)])
    (parameter,) = stack.ledger.parameters("bitfit")
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = mlp.c_fc(x)
        parameter.fill_(2.0)
        assert torch.allclose(mlp.c_fc(x), before + 2.0)


@pytest.mark.parametrize("options", [{}, {"targets": "attention.q mlp.up"}, {"targets": "all classifier"}])
def test_the_head_of_a_classifier_trains_whole(options: dict[str, Any]) -> None:
    stack = Stack(tiny("bert", head="classification", num_labels=3), [Bitfit(**options)])
    assert {name for name in trained(stack) if not name.endswith("bias")} == {"classifier.weight"}
    assert "classifier.bias" in trained(stack)
    assert trained(stack) - {"classifier.weight"} == biases(stack.model) or options
    images = Stack(tiny("vit"), [Bitfit()])
    assert trained(images) == biases(images.model) | {"classifier.weight"}


def test_a_head_without_a_bias_trains_too() -> None:
    stack = Stack(tiny("qwen2", head="classification", num_labels=3), [Bitfit()])
    assert trained(stack) == biases(stack.model) | {"score.weight"}


@pytest.mark.parametrize(
    ("arch", "options", "match", "hint"),
    [
        ("llama", {}, r"bitfit: 14 of the layers have no bias, .*q_proj", r"^add: true for biases of zeros$"),
        ("qwen2", {"targets": "attention"}, r"2 of the layers have no bias, .*o_proj", r"'!attention\.o' in targets"),
        ("llama", {"targets": "norm"}, r"5 of the layers have no bias", "add: true"),
        ("llama", {"targets": "norm", "add": True}, r"norm.* has no bias, and no place for one", r"'!norm\.\w+'"),
        ("mixtral", {"add": True}, r"experts has no bias, and no place", r"'!experts\.\w+'"),
        ("mamba", {"add": True}, r"x_proj has no bias, and no place", r"'!ssm\.\w+'"),
    ],
)  # fmt: skip
def test_layers_without_biases_are_refused(arch: str, options: dict[str, Any], match: str, hint: str) -> None:
    import re

    with pytest.raises(ArchitectureError, match=match) as caught:
        Stack(tiny(arch), [Bitfit(**options)])
    assert re.search(hint, str(caught.value.hint))


@pytest.mark.parametrize("options", [{"targets": ""}, {"add": "much"}, {"biases": "all"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Bitfit: {next(iter(options))}"):
        Bitfit(**options)
