"""Caches that tokens are left out of: what a layer holds, the mask it gets, what is looked at, whose calls count."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peftx import Claim, ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.testing.models import tiny
from peftx.toolkits.decoding.evicting import Evictor, KeptLayer, held_bytes, looked_at, seen
from peftx.toolkits.serving import Server

LOW = torch.finfo(torch.float32).min


def filled(batch: int, columns: int) -> KeptLayer:
    """Keys [B, 2, K, 3] that say which row and column they are of."""
    layer = KeptLayer()
    keys = torch.arange(batch)[:, None, None, None] * 100 + torch.arange(columns)[None, None, :, None]
    layer.update(keys.float().expand(-1, 2, -1, 3), -keys.float().expand(-1, 2, -1, 3))
    return layer


def held(layer: KeptLayer) -> list[list[int]]:
    """Columns of each row, by its keys."""
    return [layer.keys[b, 0, real, 0].long().tolist() for b, real in enumerate(layer.real)]


# ------------------------------------------------------------------------------------------------------------ a layer
def test_rows_keep_different_tokens_and_go_on() -> None:
    layer = filled(2, 5)
    kept = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    layer.weight += torch.arange(5.0)
    layer.keep(kept)
    assert held(layer) == [[0, 2, 4], [104]]
    assert layer.at.tolist() == [[0, 2, 4], [-1, -1, 4]]
    assert layer.weight[layer.real].tolist() == [0, 2, 4, 4]
    assert (layer.get_seq_length(), layer.get_mask_sizes(3)) == (5, (8, 0))
    assert layer.keys.shape == layer.values.shape == (2, 2, 3, 3)
    layer.update(torch.full((2, 2, 1, 3), 5.0), torch.zeros(2, 2, 1, 3))
    assert layer.at.tolist() == [[0, 2, 4, 5], [-1, -1, 4, 5]]
    assert layer.weight[:, -1].tolist() == [0, 0]
    layer.keep(layer.at != 2)
    assert held(layer) == [[0, 4, 5], [104, 5]]


def test_memory_is_given_back() -> None:
    layer = filled(1, 100)
    layer.keep(torch.arange(100)[None] < 10)
    assert (
        layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() == 2 * 10 * 2 * 3 * 4
    )


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_is_cut_to_what_is_held(additive: bool) -> None:
    layer = filled(2, 4)
    layer.keep(torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool())
    layer.update(torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 3))  # columns 4 and 5
    whole = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()[None, None]  # two queries
    front = torch.ones(1, 1, 2, 1, dtype=torch.bool)  # a learned key
    mask = torch.cat([front, whole], -1)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, LOW)
    found = layer.narrowed(mask, 1 + 5)
    assert found is not None
    found = found if found.dtype == torch.bool else found == 0
    rows = [[[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], [[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1]]]
    assert found[:, 0].long().tolist() == rows


def test_without_a_mask_what_is_no_token_is_hidden() -> None:
    layer = filled(2, 4)
    assert layer.narrowed(None, 4) is None
    layer.keep(torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1]]).bool())
    assert layer.narrowed(None, 3) is None
    layer.keep(torch.tensor([[1, 1, 1], [0, 1, 0]]).bool())
    found = layer.narrowed(None, 5)  # two keys of another plugin's in front
    assert found is not None
    assert found[:, 0, 0].long().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]]


def test_rows_move_with_all_that_is_known_of_them() -> None:
    layer = filled(2, 3)
    layer.keep(torch.tensor([[1, 0, 1], [0, 1, 0]]).bool())
    beams = copy.copy(layer)
    beams.batch_repeat_interleave(2)
    assert held(beams) == [[0, 2], [0, 2], [101], [101]]
    beams.reorder_cache(torch.tensor([3, 0, 0, 1]))
    assert held(beams) == [[101], [0, 2], [0, 2], [0, 2]]
    beams.batch_select_indices(torch.tensor([1, 0]))
    assert held(beams) == [[0, 2], [101]]
    assert beams.weight.shape == beams.at.shape == (2, 2)
    beams.reset()
    assert beams.get_seq_length() == 0


# ---------------------------------------------------------------------------------------------------- what is looked at
@pytest.mark.parametrize("form", ["none", "bool", "additive"])
@pytest.mark.parametrize("queries", [150, 7, 1])  # pieces of 64; the last of a text
def test_weights_are_those_of_the_model(form: str, queries: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 150, 8, generator=draw) for heads in (4, 2))
    query = query[:, :, -queries:]
    mask = torch.ones(queries, 150, dtype=torch.bool).tril(150 - queries).expand(2, 1, -1, -1).clone()
    if form != "none":
        mask[1, ..., :20] = False  # pads, and queries that are pads see nothing
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    given = {"none": None, "bool": mask, "additive": torch.zeros(mask.shape).masked_fill(~mask, LOW)}[form]
    torch.testing.assert_close(
        looked_at(query, key, given, 0.3), weights.mean(1).sum(1), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(seen(given, query, key), mask[:, 0, -1])


# ------------------------------------------------------------------------------------------------------------ the model
class Half:
    """A policy: every second token of the prompt, and what is written."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, int]] = []

    def look(self, layer: KeptLayer, query: Tensor, key: Tensor, *_: object) -> None:
        layer.weight += 1

    def evict(self, layers: Sequence[KeptLayer], reading: bool) -> None:
        self.calls.append((reading, layers[0].length))
        for layer in layers if reading else ():
            layer.keep(layer.at % 2 == 0)


class Halving(Plugin):
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.REPLACES_ATTENTION, Claim.EVICTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.policy = Half()
        self.evictor = model.around(Evictor(model, self.policy))

    @hookimpl(wrapper=True)
    def decode(self, request: object) -> object:
        with self.evictor.during(request):  # type: ignore[arg-type]
            return (yield)


IDS = torch.tensor([[11, 12, 13, 14, 15, 16]])


@torch.no_grad()
def test_calls_with_the_cache_are_watched_and_no_others() -> None:
    stack = Stack(tiny("llama"), [halving := Halving()])
    plain = stack.model(IDS).logits
    with halving.evictor.watching(6) as cache:
        stack.model(IDS[:, :4], past_key_values=cache)  # a piece of the prompt
        assert halving.policy.calls == []
        assert torch.equal(stack.model(IDS).logits, plain)
        with pytest.raises(Exception, match=r"shape|size"):  # a call that fails is over
            stack.model(IDS[:, :1], past_key_values=cache, position_ids=torch.zeros(1, 5, dtype=torch.long))
        assert all(edit.layer is None for edit in halving.evictor.edits.values())
    stack = Stack(tiny("llama"), [halving := Halving()])
    with halving.evictor.watching(6) as cache:
        for ids in (IDS[:, :4], IDS[:, 4:], IDS[:, :1]):
            stack.model(ids, past_key_values=cache)
        assert halving.policy.calls == [(True, 6), (False, 7)]
        assert cache.layers[0].at.tolist() == [[0, 2, 4, 6]]
        assert cache.layers[0].weight.tolist() == [[3, 3, 2, 1]]
        assert held_bytes(cache) == (2 * 4 * 128, 2 * 7 * 128)
    assert torch.equal(stack.model(IDS).logits, plain)


@torch.no_grad()
def test_a_copy_and_a_stack_that_is_switched_off() -> None:
    stack = Stack(tiny("llama"), [halving := Halving()])
    twin = copy.deepcopy(stack.model)
    assert torch.equal(twin(IDS).logits, stack.model(IDS).logits)
    with stack.disabled(), halving.evictor.watching(6) as cache:
        stack.model(IDS, past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 6
    assert halving.policy.calls == []
    stack.remove("halving")
    assert stack.model.config._attn_implementation == "sdpa"


def test_attention_without_masks_of_its_own() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ArchitectureError, match="flex_attention, which makes no masks"):
        Stack(model, [Halving()])


class Loop(Plugin):
    @hookimpl
    def decode(self, request: object) -> None:
        return None


def test_what_does_not_go_beside_it() -> None:
    with pytest.raises(ConflictError, match="leaves tokens out of the cache, and the loop of"):
        Stack(tiny("llama"), [Halving(), Loop()])
    server = Server(Stack("peftx:tiny", [Halving()]))
    server.scheduler.prefix_cache = True
    with pytest.raises(PeftxError, match="claims evicts"):
        server.prepare()
