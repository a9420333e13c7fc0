"""The instruction residual: theta_base(d1) + s (theta_inst(v1) - theta_base(v1))."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, MergeError, PeftxError
from peftx.kernel.plugin import Claim
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_bitfit import Bitfit
from peftx_full_finetuning import FullFinetuning
from peftx_instruction_residual import InstructionResidual, shared_ids, ties
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant

test_conformance = conformance("instruction-residual")

ID = "instruction-residual"
TEXTS = ["one text", "and another one", "and one more, longer than both"]


def moved(model: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """The model, every parameter off its value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((torch.randn(p.shape, generator=generator) * size).to(p))
    return model


def three(arch: str = "llama", **model: Any) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """theta_base(v1), theta_inst(v1), theta_base(d1)."""
    return tiny(arch, **model), moved(tiny(arch, **model), 1), moved(tiny(arch, **model), 2)


def stack_of(model: PreTrainedModel, *others: Any, **options: Any) -> Stack:
    return Stack(model, [*others, InstructionResidual(**options)], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> InstructionResidual:
    plugin = stack.plugins[ID]
    assert isinstance(plugin, InstructionResidual)
    return plugin


def values(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter of the model itself."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "peftx" not in n}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(model))


def pair(instruct: PreTrainedModel, base: PreTrainedModel) -> tuple[Any, Any]:
    return (instruct, tiny_tokenizer()), (base, tiny_tokenizer())


# ------------------------------------------------------------------------------------------------------ the algebra
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "mixtral"])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_every_tensor_by_hand(arch: str, scale: float) -> None:
    base, instruct, d1 = three(arch)
    was = values(d1)
    stack = stack_of(d1, scale=scale)
    plugin_of(stack).put(stack, *pair(instruct, base))
    now, i, b = values(stack.model), values(instruct), values(base)
    assert now.keys() == was.keys() == i.keys()
    for name in was:
        torch.testing.assert_close(now[name], was[name] + scale * (i[name] - b[name]), atol=1e-6, rtol=1e-6)
        assert not torch.equal(now[name], was[name])
    assert stack.trainable_parameters() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_pretraining_it_is_the_instruct_model(dtype: torch.dtype) -> None:
    base, instruct, _ = (model.to(dtype) for model in three())
    for given in (base, None):  # or the stack's own model
        stack = stack_of(tiny("llama").to(dtype))
        plugin_of(stack).put(stack, instruct, given)
        assert all(torch.equal(p, values(instruct)[n]) for n, p in values(stack.model).items())


def test_small_values_are_not_lost_beside_large_ones() -> None:
    """Of float32 in float64: what is large in the base and small in the tuned model is the tuned model's to the bit."""
    base, instruct = tiny("llama"), moved(tiny("llama"), 1)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(1e5)
    stack = stack_of(base)
    plugin_of(stack).put(stack, instruct)
    assert all(torch.equal(p, values(instruct)[n]) for n, p in values(stack.model).items())


def test_scale_zero_is_the_base_and_there_and_back_is_nothing() -> None:
    base, instruct, d1 = three()
    was = logits(d1)
    stack = stack_of(d1, scale=0.0)
    plugin_of(stack).put(stack, *pair(instruct, base))
    assert torch.equal(logits(stack.model), was)
    there = stack_of(moved(tiny("llama"), 2))
    plugin_of(there).put(there, *pair(instruct, base))
    assert not torch.equal(logits(there.model), was)
    other = tiny("llama")
    other.load_state_dict(values(there.model), strict=False)
    stack = stack_of(other)
    plugin_of(stack).put(stack, *pair(base, instruct))
    torch.testing.assert_close(logits(stack.model), was, atol=1e-5, rtol=1e-5)


def test_another_residual_takes_the_place_of_the_first() -> None:
    base, instruct, d1 = three()
    stack = stack_of(d1)
    plugin_of(stack).put(stack, *pair(moved(tiny("llama"), 7), base))
    plugin_of(stack).put(stack, *pair(instruct, base))
    other = stack_of(moved(tiny("llama"), 2))
    plugin_of(other).put(other, *pair(instruct, base))
    assert torch.equal(logits(stack.model), logits(other.model))
    with stack.disabled(ID):
        assert torch.equal(logits(stack.model), logits(moved(tiny("llama"), 2)))
    stack.remove(ID)
    assert torch.equal(logits(stack.model), logits(moved(tiny("llama"), 2)))


# ----------------------------------------------------------------------------------------------------- vocabularies
def test_shared_ids_by_hand() -> None:
    words = [{"a": 0, "b": 1, "c": 2, "d": 5}, {"a": 0, "x": 1, "c": 2, "d": 4}]
    tokenizers: Any = [type("Words", (), {"get_vocab": lambda self, w=w: w})() for w in words]
    assert shared_ids(6, tokenizers).tolist() == [0, 2, 3]  # 3 is none to both
    assert shared_ids(2, tokenizers).tolist() == [0]
    assert shared_ids(3, [None, tokenizers[0]]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_that_are_shared(tied: bool) -> None:
    """The tuned model has more rows, and two of its tokens are others here."""
    base, _, d1 = three(tie_word_embeddings=tied)
    size = len(base.get_input_embeddings().weight)
    instruct = moved(tiny("llama", tie_word_embeddings=tied, vocab_size=size + 8), 1)
    was, theirs, plain = values(d1), values(instruct), values(base)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<im_start>", "<im_end>"])
    first = tokenizer.convert_tokens_to_ids("<im_start>")
    stack = stack_of(d1)
    with pytest.warns(UserWarning, match="2 tokens of the tuned model are none here.*<im_end>, <im_start>"):
        plugin_of(stack).put(stack, (instruct, tokenizer), (base, tiny_tokenizer()))
    names = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    assert plugin_of(stack).over_vocabulary(stack) == set(names)
    now = values(stack.model)
    for name in names:
        expected = was[name] + theirs[name][:size] - plain[name]
        expected[first : first + 2] = was[name][first : first + 2]
        torch.testing.assert_close(now[name], expected)
    assert torch.equal(now[names[0]][first], was[names[0]][first])
    name = "model.norm.weight"
    torch.testing.assert_close(now[name], was[name] + theirs[name] - plain[name])


def test_a_base_with_more_tokens_keeps_their_rows() -> None:
    size = len(tiny("llama").get_input_embeddings().weight)
    d1 = moved(tiny("llama", vocab_size=size + 3), 2)
    was = values(d1)
    stack = stack_of(d1)
    base, instruct, _ = three()
    plugin_of(stack).put(stack, *pair(instruct, base))
    name = "model.embed_tokens.weight"
    assert torch.equal(values(stack.model)[name][size:], was[name][size:])
    assert not torch.equal(values(stack.model)[name][:size], was[name][:size])


def test_ties() -> None:
    shared, alone = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    assert ties({"a": shared, "b": alone, "c": shared}) == {"a": "a", "b": "b", "c": "a"}


# ---------------------------------------------------------------------------------------------------- in the stack
def grown(stack: Stack) -> Stack:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.normal_(std=0.3)
    return stack


def batch_of(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = example_inputs(model)
    return {**inputs, "labels": inputs["input_ids"]}


@pytest.mark.parametrize("order", [1, -1])
def test_adapters_are_pretrained_on_the_base(order: int) -> None:
    """Their gradients are those without the plugin; after training it is there again."""
    base, instruct, _ = three()

    def gradients(*plugins: Any, on: PreTrainedModel) -> tuple[Stack, list[Tensor]]:
        stack = grown(Stack(on, plugins, tokenizer=tiny_tokenizer()))
        if ID in stack.plugins:
            plugin_of(stack).put(stack, instruct, base)
        loss = stack.train_step(batch_of(on))
        return stack, [loss, *(p.grad for p in stack.ledger.parameters("lora") if p.grad is not None)]

    plain = gradients(Lora(rank=2), on=tiny("llama"))[1]
    stack, found = gradients(*[Lora(rank=2), InstructionResidual()][::order], on=tiny("llama"))
    assert len(plain) > 1
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    tuned = grown(Stack(moved(tiny("llama"), 1), [Lora(rank=2)]))
    torch.testing.assert_close(logits(stack.model), logits(tuned.model))
    options = {"train_on": "instruct"}
    on_tuned = gradients(*[Lora(rank=2), InstructionResidual(**options)][::order], on=tiny("llama"))[1]
    expected = gradients(Lora(rank=2), on=moved(tiny("llama"), 1))[1]
    for one, other in zip(on_tuned, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert float(on_tuned[0]) != float(plain[0])


def test_saved_loaded_exported_and_packed(tmp_path: Path) -> None:
    base, instruct, d1 = three()
    instruct.save_pretrained(tmp_path / "instruct")
    base.save_pretrained(tmp_path / "base")
    stack = stack_of(d1, instruct=str(tmp_path / "instruct"), base=str(tmp_path / "base"))
    assert Claim.IDENTITY_AT_START not in plugin_of(stack).claims
    other = stack_of(moved(tiny("llama"), 2))
    plugin_of(other).put(other, *pair(instruct, base))
    found = logits(stack.model)
    assert torch.equal(found, logits(other.model))
    stack.save(tmp_path / "bundle")
    (tmp_path / "instruct").rename(tmp_path / "gone")
    loaded = peftx.load(tmp_path / "bundle", model=moved(tiny("llama"), 2), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded.model), found)
    plain = type(d1).from_pretrained(stack.export(tmp_path / "plain"))
    torch.testing.assert_close(logits(plain), found)
    packing = PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)
    both = Stack(moved(tiny("llama"), 2), [InstructionResidual(), packing], tokenizer=tiny_tokenizer())
    plugin_of(both).put(both, *pair(instruct, base))
    both.compress(TEXTS, samples=2, length=24)
    torch.testing.assert_close(logits(both.model), found, atol=0.1, rtol=0.1)


# -------------------------------------------------------------------------------------------------------- refusals
def test_no_relatives(tmp_path: Path) -> None:
    stack, base = stack_of(tiny("llama")), tiny("llama")
    was = values(stack.model)
    for other, match in (
        (tiny("qwen2"), "is no relative of this one: model.layers.0.self_attn.k_proj.bias does not fit"),
        (tiny("llama", intermediate_size=40), r"mlp.gate_proj.weight does not fit"),
        (
            tiny("llama", tie_word_embeddings=not base.config.tie_word_embeddings),
            r"lm_head.weight does not fit",
        ),
    ):
        for instruct, given in ((other, base), (base, other)):
            with pytest.raises(PeftxError, match=match):
                plugin_of(stack).put(stack, instruct, given)
    tiny("qwen2").save_pretrained(tmp_path / "qwen2")
    with pytest.raises(PeftxError, match=r"instruction-residual: '.*/qwen2' is no relative of this one"):
        plugin_of(stack).put(stack, str(tmp_path / "qwen2"))
    words = type("Words", (), {"get_vocab": lambda self: {f"<{i}>": i for i in range(1000)}})()
    with pytest.raises(PeftxError, match="no id is the same token in all models"):
        plugin_of(stack).put(stack, (tiny("llama"), words), (base, None))
    assert all(torch.equal(p, was[n]) for n, p in values(stack.model).items())


def test_refused(tmp_path: Path) -> None:
    for other in (FullFinetuning(), Bitfit()):
        for order in (1, -1):
            with pytest.raises(ConflictError, match="train"):
                Stack(tiny("qwen2"), [other, InstructionResidual()][::order], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match=r"bitfit trains the base's own .*, to which R is added"):
        stack_of(tiny("qwen2"), Bitfit())
    with pytest.raises(ArchitectureError, match=r"R cannot be added to vit.embeddings.cls_token of vit"):
        Stack(tiny("vit"), [InstructionResidual()])
    packing = PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)
    stack = Stack(tiny("llama"), [packing, InstructionResidual()], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["prefixquant"], samples=2, length=24)
    with pytest.raises(ConflictError, match="is quantized, and R cannot be added"):
        stack.inject()
    with pytest.raises(PeftxError, match="base without instruct is no pair"):
        InstructionResidual(base="somewhere")
    with pytest.raises(PeftxError, match="scale"):
        InstructionResidual(scale=float("inf"))


def test_merged_or_switched_off() -> None:
    stack = grown(stack_of(tiny("llama"), Lora(rank=2)))
    with stack.disabled(ID), pytest.raises(PeftxError, match="switched off"):
        plugin_of(stack).put(stack, *pair(moved(tiny("llama"), 1), tiny("llama")))
    assert all(torch.equal(p, values(tiny("llama"))[n]) for n, p in values(stack.model).items())
    stack.merge()
    with pytest.raises(MergeError):
        plugin_of(stack).put(stack, *pair(moved(tiny("llama"), 1), tiny("llama")))
