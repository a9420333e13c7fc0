"""A second model with the base's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Claim, ModelView, Plugin, Stack, VirtualTokens, hookimpl
from peftx.copies import Reader, copy_of
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing.models import ARCHITECTURES, example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank
from peftx.toolkits.compression import QuantLinear
from peftx_hypertuning import Hypertuning


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
    with pytest.raises(ConflictError, match="LlamaForCausalLM cannot be copied: model"):
        copy_of(model)


IDS = torch.tensor([[0, 5, 6, 7], [0, 9, -1, -1]])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "t5", "bart"])
@torch.no_grad()
def test_a_reader_reads_texts_and_vectors_as_the_model_would(arch: str) -> None:
    """Vectors that are embeddings of tokens: the states of these tokens behind the text; short texts as alone."""
    model = tiny(arch)
    reader, more = Reader(model), torch.tensor([[20, 21, 22]]).expand(2, -1)
    vectors = reader.embedding(more)
    found = reader(IDS, vectors)
    for row, length in ((0, 4), (1, 2)):
        ids = IDS[row : row + 1, :length]
        if model.config.is_encoder_decoder:
            base = model.get_encoder()(ids).last_hidden_state
            expected = model.get_decoder()(more[:1], encoder_hidden_states=base).last_hidden_state
        else:
            expected = model.base_model(torch.cat((ids, more[:1]), 1)).last_hidden_state[:, length:]
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_vectors_to_begin_with_are_as_large_as_embeddings(arch: str) -> None:
    reader = Reader(tiny(arch))
    embedded = reader.embedding(torch.arange(320)).detach()
    assert float(reader.vectors(400).std() / embedded.std()) == pytest.approx(1, abs=0.1)


def test_more_than_the_model_has_positions_for_is_refused() -> None:
    reader = Reader(tiny("gpt2"))
    ids = torch.zeros(1, 126, dtype=torch.int64)
    assert reader(ids, reader.vectors(2)[None]).shape == (1, 2, 32)
    with pytest.raises(
        PeftxError, match="126 tokens and 3 vectors are to be read, and the model has positions for 128"
    ):
        reader(ids, reader.vectors(3)[None])


def test_parameters_that_are_one_are_one_after_a_load(tmp_path: Path) -> None:
    """The embedding of a copy's encoder and decoder; else they would train apart."""
    stack = Stack(tiny("t5"), [Hypertuning(length=2, shots=1)], tokenizer=tiny_tokenizer())
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b", model=tiny("t5"), tokenizer=tiny_tokenizer())
    names = [{name for name, p in s.model.named_parameters() if p.requires_grad} for s in (stack, again)]
    assert names[0] == names[1]
