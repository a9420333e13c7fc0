"""A second model with the base's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftx import Claim, ModelView, Plugin, Stack, VirtualTokens, hookimpl
from peftx.errors import UnsupportedError
from peftx.kernel.copies import copy_of
from peftx.kernel.parts import DeltaPart
from peftx.testing.models import ARCHITECTURES, example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank
from peftx.toolkits.compression import QuantLinear


class Zeros(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(2)
        self.table = torch.nn.Parameter(torch.zeros(2, width))

    def rows(self) -> Tensor:
        return self.table


class Prompt(Plugin):
    claims = {Claim.VIRTUAL_TOKENS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Zeros(model.hidden_size))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_computes_what_the_base_computes(arch: str) -> None:
    model = tiny(arch)
    copied, inputs = copy_of(model), example_inputs(model)
    assert torch.equal(output_of(copied, inputs), output_of(model, inputs))
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in copied.parameters())
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in tiny(arch).parameters()
    ]
    assert list(copied.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("head", [None, "base", "classification"])
@torch.no_grad()
def test_leaves_out_what_plugins_put_on_the_model(head: str | None) -> None:
    model = tiny("llama", head=head)
    inputs = example_inputs(model)
    expected = output_of(model, inputs)
    stack = Stack(model, [ReferenceLowRank(), Prompt()], tokenizer=tiny_tokenizer())
    for part in stack.ledger.all(DeltaPart):
        for parameter in part.module.parameters():
            parameter.normal_()
    copied = copy_of(model)
    assert type(copied) is type(tiny("llama", head=head))
    assert not any("peftx" in name for name, _ in copied.named_modules())
    assert torch.equal(output_of(copied, inputs), expected)
    assert not torch.equal(output_of(model, inputs), expected)


@torch.no_grad()
def test_dtype_mode_and_the_meta_device_are_the_bases() -> None:
    copied = copy_of(tiny("llama").to(torch.bfloat16).train())
    assert copied.dtype == torch.bfloat16
    assert copied.training
    with torch.device("meta"):
        assert all(t.is_meta for t in copy_of(tiny("llama").to("meta")).state_dict().values())


def test_a_packed_base_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = QuantLinear.from_linear(model.model.layers[0].mlp.up_proj, bits=8)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM cannot be copied: model"):
        copy_of(model)
