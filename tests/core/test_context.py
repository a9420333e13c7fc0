"""What a delta knows of the call that it runs in: tokens, pads, columns of its own, values that go with the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Delta, ModelView, Plugin, Stack, VirtualTokens, hookimpl
from peftx.errors import PeftxError, UnsupportedError
from peftx.testing.models import tiny, tiny_tokenizer

IDS = torch.arange(3, 15).reshape(2, 6)


class SumOfIds(Delta):
    """y + scale * (sum of all ids up to here): wrong as soon as a token before is forgotten, or a pad counted."""

    def __init__(self, call: Any, owner: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.01))
        self.call, self.owner = call, owner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ids, real = self.call.ids, self.call.real
        if ids is None:
            return y
        all_ids = self.call.carry(self.owner, ids * real)  # [B, R + T]
        sums = all_ids.cumsum(1)[:, -ids.shape[1] :].to(y.dtype)
        return y + self.scale * sums[..., None]


class Sums(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.embedding().attach(SumOfIds(model.call, model.owner))


class Deep(Plugin):
    """In a layer behind others, whose rows of this call are in the cache already."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(SumOfIds(model.call, f"{model.owner}.{site.layer}"))


class Rows(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(3)
        self.E = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))

    def rows(self) -> Tensor:
        return self.E


class Prompt(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Rows(model.hidden_size))


def stack_of(*plugins: Plugin, arch: str = "llama") -> Stack:
    return Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "plugins", [(Sums(),), (Prompt(), Sums()), (Deep(),)], ids=["alone", "behind soft tokens", "in every layer"]
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_next"])
@torch.no_grad()
def test_values_go_with_the_cache(arch: str, plugins: tuple[Plugin, ...]) -> None:
    model = stack_of(*plugins, arch=arch).model
    whole = model(IDS).logits
    out = model(IDS[:, :4], use_cache=True)
    for at in (4, 5):
        out = model(IDS[:, at : at + 1], past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_values_follow_beams_and_pads() -> None:
    model = stack_of(Sums()).model
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), IDS[:1]), 1)
    mask = (padded > 0).long()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    alone = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    beside = model.generate(torch.cat((padded, padded)), attention_mask=torch.cat((mask, mask)), **options)
    assert torch.equal(beside[0, 3:], alone[0])
    uncached = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), use_cache=False, **options)
    assert torch.equal(uncached, alone)


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_values_is_refused() -> None:
    stack = stack_of(Sums())
    with stack.disabled():
        cache = stack.model(IDS, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="6 rows, and what goes with them is known of 0"):
        stack.model(IDS[:, :1], past_key_values=cache)


class ByRow(Delta):
    """y + shift of the row's own column."""

    def __init__(self, call: Any, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, width, generator=torch.Generator().manual_seed(1)))
        self.call = call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kind = self.call.batch.get("kind")
        return y if kind is None else y + self.table[kind][:, None]


class Kinds(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("kind")
        site = model.embedding()
        site.attach(ByRow(model.call, site.out_features))


@torch.no_grad()
def test_columns_reach_calls_and_generation() -> None:
    stack = stack_of(Kinds())
    kind = torch.tensor([1, 3])
    both = stack.model(IDS, kind=kind).logits
    each = torch.cat([stack.model(IDS[i : i + 1], kind=kind[i : i + 1]).logits for i in (0, 1)])
    torch.testing.assert_close(both, each)
    assert not torch.allclose(both, stack.model(IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with stack.columns(kind=kind):
        torch.testing.assert_close(stack.model(IDS).logits, both)
        found = stack.model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    for row in (0, 1):
        with stack.columns(kind=kind[row : row + 1]):
            one = IDS[row : row + 1]
            own = stack.model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(found[row], own[0])
    with pytest.raises(PeftxError, match="no plugin reads a column 'knd'"), stack.columns(knd=kind):
        pass


def test_columns_come_with_the_rows_and_a_bundle_reads_them_again(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "kind": n % 4} for n in range(8)]
    stack = stack_of(Kinds())
    before = next(stack.ledger.parameters("kinds")).clone()
    stack.train(rows, steps=4, batch_size=4, learning_rate=0.1)
    moved = (next(stack.ledger.parameters("kinds")) - before).abs().sum(1)
    assert (moved > 0).all(), "each row's own kind trains"
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        kind = torch.tensor([0, 2])
        assert torch.equal(again.model(IDS, kind=kind).logits, stack.model(IDS, kind=kind).logits)


def test_two_plugins_with_one_column_are_refused_and_removal_withdraws_it() -> None:
    with pytest.raises(PeftxError, match="both read a column 'kind'"):
        stack_of(Kinds(), ("other", Kinds()))  # type: ignore[arg-type]
    stack = stack_of(Kinds())
    stack.remove("kinds")
    with pytest.raises(PeftxError, match="no plugin reads"), stack.columns(kind=torch.tensor([1])):
        pass


def test_layers_that_are_recomputed_see_the_same_call() -> None:
    class Inside(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.column("kind")
            for site in model.linears("mlp.down"):
                site.attach(ByRow(model.call, site.out_features))

    found = []
    for recompute in (False, True):
        stack = stack_of(Inside())
        stack.model.train()
        if recompute:
            stack.model.activation_checkpointing_enable()
        stack.model(IDS, labels=IDS, kind=torch.tensor([1, 3])).loss.backward()
        found.append([p.grad for p in stack.ledger.parameters("inside")])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_what_a_recomputed_layer_carries_is_not_taken_for_a_later_calls() -> None:
    stack = stack_of(Deep())
    stack.model.train()
    stack.model.activation_checkpointing_enable()
    stack.model(IDS, labels=IDS).loss.backward()
    stack.model.eval()
    with stack.disabled("deep"), torch.no_grad():
        cache = stack.model(IDS[:1], use_cache=True).past_key_values
    assert len(cache.layers) == 2
