"""What stands around the call of a block, and what edits the result of a softmax."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import AttentionEdit, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.errors import PluginError, UnsupportedError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer

IDS = torch.arange(3, 15).reshape(2, 6)


class Weighed(Delta):
    """x + g (block(x) - x) of a layer, so that g = 0 skips it and 1 leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(()))

    def around(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and self.g == 0:
            return x
        out = inner(x, *args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        mixed = x + self.g * (y - x)
        return (mixed, *out[1:]) if isinstance(out, tuple) else mixed


class Skips(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.blocks("layer")[1].attach(Weighed())


class Doubles(Delta):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * y


class DoublesLayer(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.blocks("layer")[1].attach(Doubles())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "mamba"])
@torch.no_grad()
def test_a_block_that_is_skipped_and_one_that_is_not(arch: str, tmp_path: Path) -> None:
    plain, stack = tiny(arch).eval(), Stack(tiny(arch), [Skips()], tokenizer=tiny_tokenizer())
    inputs = example_inputs(plain)
    before = output_of(plain, inputs)
    layers = next(m for m in plain.modules() if isinstance(m, nn.ModuleList) and len(m) >= 2)
    (gate,) = stack.ledger.parameters("skips")
    calls: list[int] = []
    watched = next(m for m in stack.model.modules() if isinstance(m, nn.ModuleList) and len(m) >= 2)[1]
    inside = next(
        m for m in watched.modules() if isinstance(m, nn.LayerNorm | nn.Linear) or "Norm" in type(m).__name__
    )
    inside.register_forward_hook(lambda *_: calls.append(1))
    skipped = output_of(stack.model, inputs)
    assert not calls, "the layer did not run"
    gate.fill_(1.0)
    torch.testing.assert_close(output_of(stack.model, inputs), before)
    gate.fill_(0.0)
    layers[1] = nn.Identity() if arch != "bert" else layers[1]
    if arch in ("llama", "mamba"):
        layers[1].forward = lambda x, *args, **kwargs: x
        torch.testing.assert_close(output_of(plain, inputs), skipped)
    gate.fill_(0.5)
    found = output_of(stack.model, inputs)
    again = peftx.load(stack.save(tmp_path / "b"), model=tiny(arch), tokenizer=tiny_tokenizer())
    assert torch.equal(output_of(again.model, inputs), found)
    stack.remove("skips")
    torch.testing.assert_close(output_of(stack.model, inputs), before)


@torch.no_grad()
def test_what_stands_around_nests_in_stack_order() -> None:
    """A doubled block that is skipped is not doubled; a skipped block that is doubled is."""
    layer = lambda stack: stack.model.model.layers[1]  # noqa: E731
    x = torch.randn(1, 4, 32)
    args = {"position_embeddings": (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))}
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    inside = Stack(tiny("llama"), [DoublesLayer(), Skips()])
    assert torch.equal(first(layer(inside)(x, **args)), x)
    outside = Stack(tiny("llama"), [Skips(), DoublesLayer()])
    assert torch.equal(first(layer(outside)(x, **args)), 2 * x)
    with outside.disabled("skips"), inside.disabled("skips"):
        assert torch.equal(first(layer(outside)(x, **args)), first(layer(inside)(x, **args)))


def test_gradients_pass_and_recomputed_layers_agree() -> None:
    found = []
    for recompute in (False, True):
        stack = Stack(tiny("llama"), [Skips()])
        stack.model.train()
        if recompute:
            stack.model.activation_checkpointing_enable()
        stack.model(IDS, labels=IDS).loss.backward()
        (gate,) = stack.ledger.parameters("skips")
        found.append(gate.grad)
    assert found[0] != 0
    torch.testing.assert_close(*found)


def test_a_linear_layer_offers_no_call_to_stand_around() -> None:
    class OnLinear(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.linears("attention.q")[0].attach(Weighed())

    with pytest.raises(UnsupportedError, match="stands around a call, which Linear does not offer"):
        Stack(tiny("llama"), [OnLinear()])


# -- attention blocks, which are called by names, and caches ----------------------------------------------------------


class Gate(Delta):
    """The attention of rows of which `kept` says so; of all, where it says nothing."""

    def __init__(self, model: ModelView, layer: int) -> None:
        super().__init__()
        self.call, self.layer, self.kept = model.call, layer, None
        self.seen: list[tuple[int, ...]] = []

    def around(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = x, self.call.ids, self.call.real, self.call.batch.get("kind", ())
            self.seen.append(tuple(map(len, found)))
            return inner(x, *args, **kwargs)

        kept = torch.ones(len(x), dtype=torch.bool) if self.kept is None else torch.tensor(self.kept)
        return self.call.on_rows(kept, self.layer, watched, x, *args, **kwargs)


class Gates(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("kind")
        self.gates = [site.attach(Gate(model, site.layer)) for site in model.blocks("attention")]


def gated(arch: str, kept: dict[int, list[bool]]) -> tuple[Stack, list[Gate]]:
    plugin = Gates()
    stack = Stack(tiny(arch), [plugin], tokenizer=tiny_tokenizer())
    for layer, rows in kept.items():
        plugin.gates[layer].kept = rows
    return stack, plugin.gates


def without_attention(arch: str, layer: int) -> nn.Module:
    """The plain model with a layer's attention that gives zeros."""
    model = tiny(arch)
    for parameter in Anatomy(model).site("attention.o", layer=layer).module.parameters():
        parameter.data.zero_()
    return model


DECODERS = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "mistral", "gemma2", "deepseek_v3"]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("arch", DECODERS)
@torch.no_grad()
def test_rows_that_a_block_is_not_there_for(arch: str, padding: Any) -> None:
    plain = tiny(arch)
    inputs = example_inputs(plain, padding=padding)
    real, bare = inputs["attention_mask"].bool(), without_attention(arch, 0)
    for kept in ([True, True], [False, False], [True, False], [False, True]):
        stack, gates = gated(arch, {0: kept})
        for use_cache in (True, False):
            found = stack.model(**inputs, use_cache=use_cache, kind=torch.tensor([1, 3])).logits
            for row, is_kept in enumerate(kept):
                expected = (plain if is_kept else bare)(**inputs, use_cache=use_cache).logits
                torch.testing.assert_close(
                    found[row, real[row]], expected[row, real[row]], rtol=1e-4, atol=1e-5
                )
        rows = sum(kept)
        assert gates[0].seen == ([(2,) * 4, (rows,) * 4] if rows else []), (
            "with a cache all of them go through"
        )
        assert gates[1].seen == [(2,) * 4] * 2


@pytest.mark.parametrize("kept", [[False, False], [True, False]])
@pytest.mark.parametrize("arch", DECODERS)
@torch.no_grad()
def test_a_cache_is_as_long_in_layers_that_were_skipped(arch: str, kept: list[bool]) -> None:
    stack, _ = gated(arch, {0: kept})  # layer 0, by whose length masks and positions go
    inputs = example_inputs(stack.model, padding="left")
    whole = stack.model(**inputs).logits[:, -1]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = "position_ids" in inspect.signature(type(stack.model).forward).parameters
    places = lambda part: {"position_ids": positions[:, part]} if takes else {}  # noqa: E731
    whole = stack.model(**inputs, **places(slice(None))).logits[:, -1]
    out = stack.model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True, **places(slice(0, 6)))
    for at in range(6, 9):
        assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {at}
        out = stack.model(
            ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=out.past_key_values,
            **places(slice(at, at + 1)),
        )  # fmt: skip
    torch.testing.assert_close(out.logits[:, -1], whole, rtol=1e-4, atol=1e-5)
    if not any(kept):
        held = out.past_key_values.layers[0]
        assert held.keys.numel() + held.values.numel() == 2 * 9, "one number a token"


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}]
)
@torch.no_grad()
def test_generation_with_a_layer_that_is_skipped(options: dict[str, Any]) -> None:
    """Beams reorder the cache, drafts cut it, a static one is made for all layers before."""
    stack, gates = gated("llama", {0: [False]})
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids, bare = IDS[:rows], without_attention("llama", 0)
    gates[0].kept = [False] * rows * options.get("num_beams", 1)
    asked: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        **options,
    }
    assert torch.equal(stack.model.generate(ids, **asked), bare.generate(ids, **asked))
    assert not gates[0].seen


@torch.no_grad()
def test_a_row_that_leaves_the_batch_takes_its_attention_along() -> None:
    stack, gates = gated("llama", {0: [True, False]})
    out = stack.model(IDS[:, :5], use_cache=True)
    cache = out.past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    gates[0].kept = [False]
    found = stack.model(IDS[1:, 5:], past_key_values=cache).logits
    assert cache.layers[0].get_seq_length() == 6
    torch.testing.assert_close(found, without_attention("llama", 0)(IDS[1:]).logits[:, -1:])


# -- probabilities ---------------------------------------------------------------------------------------------------


class Same(AttentionEdit):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def probabilities(self, p: Tensor) -> Tensor:
        self.seen.append(tuple(p.shape))
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
        return p


class FirstKey(AttentionEdit):
    """All attention to the first key that a query sees."""

    def probabilities(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p).scatter(-1, (p > 0).long().argmax(-1, keepdim=True), 1.0)


def editing(edit: type[AttentionEdit]) -> Plugin:
    class Edits(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.attention_sites():
                site.attend(edit())

    return Edits()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "gemma2", "mixtral"])
@pytest.mark.parametrize("padding", [None, "left"])
@torch.no_grad()
def test_the_open_attention_is_the_models_own(arch: str, padding: Any) -> None:
    plain, stack = tiny(arch).eval(), Stack(tiny(arch), [("edits", editing(Same))])
    inputs = example_inputs(plain, padding=padding)
    real = inputs["attention_mask"].bool() if padding and arch != "t5" else ...
    torch.testing.assert_close(
        output_of(stack.model, inputs)[real], output_of(plain, inputs)[real], rtol=1e-4, atol=1e-5
    )
    assert any(part.module.seen for part in stack.ledger.parts)


@torch.no_grad()
def test_edited_probabilities_act() -> None:
    stack, other = Stack(tiny("llama"), [("edits", editing(FirstKey))]), IDS.clone()
    other[:, 1:5] = 7  # no query of the last layer's last token reads these
    one = stack.model(IDS, output_hidden_states=True).hidden_states[1][:, -1]
    two = stack.model(other, output_hidden_states=True).hidden_states[1][:, -1]
    torch.testing.assert_close(one, two)


class Idle(Same):
    def opens(self) -> bool:
        return False


@torch.no_grad()
def test_where_nothing_is_edited_the_model_computes_as_it_does_by_itself() -> None:
    stack = Stack(tiny("llama"), [("edits", editing(Idle))])
    assert torch.equal(stack.model(IDS).logits, tiny("llama")(IDS).logits), "to the bit"
    assert not any(part.module.seen for part in stack.ledger.parts)
    both = Stack(tiny("llama"), [("edits", editing(Idle)), ("others", editing(FirstKey))])
    one = Stack(tiny("llama"), [("others", editing(FirstKey))])
    assert torch.equal(both.model(IDS).logits, one.model(IDS).logits)


def test_sinks_are_refused() -> None:
    stack = Stack(tiny("gpt_oss"), [("edits", editing(Same))])
    with pytest.raises((PluginError, Exception), match="has sinks in its softmax"):
        stack.model(IDS)
