"""Edits of every kind: those that only fold, several of one kind by one plugin, those with parameters of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import peftx
from peftx import (
    AttentionEdit,
    CallEdit,
    Claim,
    Delta,
    ModelView,
    Plugin,
    Stack,
    Targets,
    VirtualTokens,
    hookimpl,
)
from peftx.errors import ConflictError, PeftxError, UnsupportedError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_lora import Lora

IDS = torch.arange(3, 19).reshape(2, 8)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


class Doubles(Delta):
    """W -> (1 + s) W, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(0.25))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * (1 + self.s), bias


class Weights(Plugin):
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.q,o mlp"):
            site.attach(Doubles())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_a_delta_that_only_folds_acts_trains_and_merges(arch: str, tmp_path: Path) -> None:
    base = logits(tiny(arch))
    stack = Stack(tiny(arch), [Weights()], tokenizer=tiny_tokenizer())
    before = logits(stack.model)
    assert not torch.allclose(before, base, atol=1e-3)
    stack.merge()
    torch.testing.assert_close(logits(stack.model), before, rtol=1e-4, atol=1e-4)
    stack.unmerge()
    stack.train_step({"input_ids": IDS, "labels": IDS})
    assert all(p.grad is not None and float(p.grad.abs()) > 0 for p in stack.ledger.parameters("weights"))
    again = peftx.load(stack.save(tmp_path / "b"), model=tiny(arch))
    assert torch.equal(logits(again.model), logits(stack.model))
    stack.remove("weights")
    assert torch.equal(logits(stack.model), base)


def test_fold_only_over_and_under_an_adapter() -> None:
    """It makes its weights of those that the adapters before it leave, as a merge would."""
    for order in ((Lora(rank=2), Weights()), (Weights(), Lora(rank=2))):
        stack = Stack(tiny("llama"), order)
        with torch.no_grad():
            [p.normal_(0, 0.1) for p in stack.ledger.parameters("lora")]
        before = logits(stack.model)
        stack.merge()
        torch.testing.assert_close(logits(stack.model), before, rtol=1e-4, atol=1e-4)


def test_fold_only_over_what_does_not_fold_is_refused() -> None:
    class Bends(Delta):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y.tanh()

    class Bend(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.linears("mlp"):
                site.attach(Bends())

    with pytest.raises(
        ConflictError, match=r"(?s)'weights' edits the weights.*this order works: weights, bend"
    ):
        Stack(tiny("llama"), [Bend(), Weights()])
    Stack(tiny("llama"), [Weights(), Bend()])


@pytest.mark.parametrize(("role", "kind"), [("norm", Doubles), ("mlp", Delta)])
def test_a_delta_that_could_do_nothing_is_refused(role: str, kind: type[Delta]) -> None:
    class Idle(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.sites(Targets(role)):
                site.attach(kind())

    with pytest.raises(UnsupportedError, match="defines no"):
        Stack(tiny("llama"), [Idle()])


# -- two of one kind -------------------------------------------------------------------------------------------------


class Scaled(AttentionEdit):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(start))

    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        return out * self.s


class Token(VirtualTokens):
    def __init__(self, hidden: int, start: float) -> None:
        super().__init__(1)
        self.e = nn.Parameter(torch.full((1, hidden), start))

    def rows(self) -> Tensor:
        return self.e


class Adds(CallEdit):
    """Adds a trained number to the logits."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(start))

    def after(self, output: Any) -> None:
        if output is not None:
            output.logits = output.logits + self.s * output.logits.tanh()


class Twice(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        for start in (1.5, 0.5):
            for site in model.attention_sites():
                model.attend(site, Scaled(start))
            model.prompt(Token(model.hidden_size, start))
            model.around(Adds(start))
        model.shift_positions(1)
        model.shift_positions(2)


def test_two_edits_of_one_kind_both_count_and_come_back(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Twice()], tokenizer=tiny_tokenizer())
    tensors = stack.ledger.tensors("twice")
    assert len(tensors) == 2 * (stack.anatomy.num_layers + 1 + 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in stack.ledger.parameters("twice"):
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    before = logits(stack.model)
    again = peftx.load(stack.save(tmp_path / "b"), model=tiny("llama"))
    assert torch.equal(logits(again.model), before)
    stack.remove("twice")
    assert torch.equal(logits(stack.model), logits(tiny("llama")))
    assert [n for n, _ in stack.model.named_modules() if "peftx" in n] == []


def test_parameters_of_an_edit_of_calls_train_and_move() -> None:
    stack = Stack(tiny("llama"), [Twice()], tokenizer=tiny_tokenizer())
    mine = [p for n, p in stack.model.named_parameters() if "peftx_calls" in n]
    assert len(mine) == 2
    assert all(p.requires_grad for p in mine)
    stack.model.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in mine)
    stack.model(IDS).logits.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs()) > 0 for p in mine)


def test_rows_of_a_wrong_shape_are_refused() -> None:
    class Wrong(Token):
        def rows(self) -> Tensor:
            return self.e.expand(3, -1)

    class Soft(Plugin):
        claims = {Claim.VIRTUAL_TOKENS}

        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.prompt(Wrong(model.hidden_size, 0.1))

    stack = Stack(tiny("llama"), [Soft()])
    with pytest.raises(PeftxError, match=r"Wrong: rows\(\) gave \(3, 32\), and \(1, 32\) is needed"):
        stack.model(IDS)


# -- modules that torch runs past ------------------------------------------------------------------------------------


class Tiny(PreTrainedModel):
    """A model of torch's own encoder layers."""

    config_class = PretrainedConfig
    base_model_prefix = "base"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        pads = None if attention_mask is None else attention_mask == 0
        return self.encoder(self.embed(input_ids), src_key_padding_mask=pads)


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fused_encoder_does_not_pass_the_deltas_by(padded: bool) -> None:
    torch.manual_seed(0)
    model = Tiny(PretrainedConfig(hidden_size=32)).eval()
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, 5:] = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about nested tensors
        base = model(IDS, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what `all` leaves out of a model without a table
        stack = Stack(model, [Lora(rank=2)])
    with torch.no_grad():
        [p.normal_(0, 0.1) for p in stack.ledger.parameters("lora")]
    kept = mask.bool()
    with torch.no_grad():
        found = model(IDS, mask)[kept]
    expected = model(IDS, mask)[kept]  # with gradients on, torch takes the long way
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base[kept], atol=1e-3)
    places = {part.path.rpartition(".")[2] for part in stack.ledger.of("lora")}
    assert places == {"out_proj", "linear1", "linear2"}
    stack.remove("lora")
    assert model.encoder.use_nested_tensor
    assert not any(m._forward_hooks for m in model.modules())


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"a Linear is no transformers model"):
        Stack(nn.Linear(2, 2), [Lora(rank=1)])  # type: ignore[arg-type]


def test_vectors_may_have_several_trainers_and_matrices_one() -> None:
    class Trains(Plugin):
        claims = {Claim.TRAINS_BASE}
        targets = "norm"

        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.sites(self.targets):
                site.train("weight")

    class Also(Trains):
        pass

    class Matrices(Trains):
        targets = "mlp.up"

    class MatricesToo(Matrices):
        pass

    base = logits(tiny("llama"))
    stack = Stack(tiny("llama"), [Trains(), Also()])
    with torch.no_grad():
        [p.mul_(1.5) for p in stack.ledger.parameters("also")]
    changed = logits(stack.model)
    assert not torch.equal(changed, base)
    with stack.disabled("trains"):
        assert torch.equal(logits(stack.model), changed)  # the other one still trains them
        with stack.disabled("also"):
            assert torch.equal(logits(stack.model), base)
    assert torch.equal(logits(stack.model), changed)
    stack.remove("trains")
    assert torch.equal(logits(stack.model), changed)
    stack.remove("also")
    assert torch.equal(logits(stack.model), base)
    with pytest.raises(ConflictError, match=r"both train the base's .*\n  hint: leave it out of the targets"):
        Stack(tiny("llama"), [Matrices(), MatricesToo()])


def test_a_plugin_that_has_no_place_says_so_before_anything_is_touched() -> None:
    class Picky(Plugin):
        @hookimpl
        def compress(self, model: ModelView) -> None: ...

        def suits(self, model: ModelView) -> None:
            raise peftx.errors.ArchitectureError(f"{model.config.model_type} is too small")

    model = tiny("llama").requires_grad_(True)
    with pytest.raises(peftx.errors.ArchitectureError, match="picky: suits: llama is too small"):
        Stack(model, [Picky(), Lora(rank=1)])
    assert all(p.requires_grad for p in model.parameters())
