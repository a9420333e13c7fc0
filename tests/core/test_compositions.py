"""Stacks of several plugins: what is built trains, is saved and goes; what is refused names a way out that works."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import pytest
from torch import Tensor

from peftx import Claim, Delta, ModelView, Plugin, Registry, hookimpl
from peftx.composition.conflicts import Conflict, find_conflicts
from peftx.errors import ConflictError, MergeError
from peftx.kernel.members import Member
from peftx.kernel.plugin import hooks_of
from peftx.stack import Stack
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.recipes import QUANTIZER, Entry, Recipe, draw, registry, stands
from peftx.testing.reference import ReferenceLowRank, ReferenceQuantizer
from peftx.testing.stacks import Result, try_stack
from peftx.testing.subject import ROWS
from peftx.testing.ways_out import dead_ends, trained
from peftx.toolkits.compression import Calibration
from peftx_lora import Lora

SAMPLE = 13
"""Random stacks that every run of the tests tries; benchmarks/stacks.py tries more."""


def recipe_of(*names: str, arch: str = "llama") -> Recipe:
    return Recipe(arch, tuple(Entry(name, dict(registry().load(name).example)) for name in names))


TRIPLES = [
    recipe_of("lora", "deft", "dpo-prefix-sharing"),
    recipe_of("aligner", "sparselora", "user-profile"),
    recipe_of("dora", "hft", "cfsp"),  # one folds for good into what another trains
    recipe_of("alphatuning", "selectit", "pissa"),
    recipe_of("d2o", "lora", "multi-control"),  # columns of rows of which each has several answers
    recipe_of("signround", "spp", "p-tuning-v2", arch="bert"),  # a packed layer that is a block too
    recipe_of("lora", "delta-come", QUANTIZER, arch="mamba"),  # folded for good into weights that are tied
]
"""Whose pairs all work."""


T = TypeVar("T")


@pytest.mark.parametrize("recipe", TRIPLES, ids=str)
def test_a_triple_of_good_pairs_works_or_is_refused_before_it_is_built(recipe: Recipe) -> None:
    result = try_stack(recipe)
    assert result.outcome in ("works", "refused-before-build"), result.reason


@cache
def drawn() -> list[Recipe]:
    return list(draw(SAMPLE, seed=0))


@pytest.mark.parametrize("number", range(SAMPLE))
def test_a_stack_works_or_is_refused_in_time(number: int) -> None:
    result = try_stack(drawn()[number])
    what = f"{result.recipe}: {result.outcome} at {result.stage}: {result.reason}; plan: {result.planned}"
    of_data = "no row of the embedding moved enough"  # in the few steps of a probe: of the weights
    assert not result.finding or of_data in result.reason, what


@cache
def refused_pairs() -> list[tuple[Recipe, list[Conflict]]]:
    """Of plugins that stand on Llama by themselves."""
    names = [name for name in sorted(Registry().names()) if stands(name, "llama")]
    recipes = [recipe_of(*pair) for pair in itertools.permutations(names, 2)]
    found = [(recipe, find_conflicts(recipe.members())) for recipe in recipes]
    return [(recipe, conflicts) for recipe, conflicts in found if conflicts]


def sampled(things: Sequence[T], count: int | None) -> list[T]:
    """So many, the same each time; all if None. There are as many as pairs, and pairs grow with the square."""
    return list(things) if count is None else random.Random(0).sample(list(things), min(count, len(things)))


some_or_all = pytest.mark.parametrize("count", [40, pytest.param(None, marks=pytest.mark.slow)])


@some_or_all
def test_the_order_that_a_conflict_of_two_names_is_built(count: int | None) -> None:
    orders = {c.working_order for _, conflicts in refused_pairs() for c in conflicts if c.working_order}
    assert len(orders) > 15
    built = [try_stack(recipe_of(*order), until="build") for order in sampled(sorted(orders), count)]
    wrong = [f"{result.recipe}: {result.reason}" for result in built if result.outcome != "works"]
    assert not wrong, "\n".join(wrong)


@some_or_all
def test_the_adapter_that_a_conflict_of_two_asks_for_helps(count: int | None) -> None:
    found = {
        frozenset(recipe.ids): Result(recipe, "refused-before-build")
        for recipe, conflicts in refused_pairs()
        if any("put an adapter" in conflict.way_out for conflict in conflicts)
    }
    assert found
    some = sampled(sorted(found.values(), key=lambda result: result.recipe.ids), count)
    ends = [end for result in some for end in dead_ends(result, depth=0)]
    assert not ends, "\n".join(f"{end.result.recipe}: {end.way.text}: {end.reason}" for end in ends)


def adapters() -> list[str]:
    """What acts on weights without training them, or computing with them itself. Not state-offset tuning, whose layers
    of Mamba are read and not called, and which says so."""
    kinds = {name: Registry().load(name) for name in sorted(Registry().names())}
    others = {Claim.BESIDE_WEIGHTS, Claim.TRAINS_BASE, Claim.COMPUTES_LAYERS, Claim.TAKES_WEIGHTS}
    found = {name for name, kind in kinds.items() if "inject" in hooks_of(kind) and not kind.claims & others}
    return sorted(found - {"state-offset-tuning"})


@pytest.mark.parametrize("name", adapters())
def test_an_adapter_trains_on_a_quantized_base(name: str) -> None:
    arch = next(arch for arch in ("gpt2", "llama", "mamba") if stands(name, arch))  # gpt2: fused matrices
    early = Entry(QUANTIZER, phase="before-training")
    result = trained(Recipe(arch, (early, *recipe_of(name).entries)))
    assert result.outcome == "works", result.reason


def test_training_leaves_the_configuration_as_it_was() -> None:
    model = tiny("llama")
    before = model.config.to_dict()
    stack = Stack(model, [("low-rank", ReferenceLowRank())], tokenizer=tiny_tokenizer())
    stack.train(list(ROWS), steps=1, batch_size=2)
    assert model.config.to_dict() == before  # `use_cache` among it: a call of the model is as fast as before


class Counts(Plugin):
    """Looks at the input of layers."""

    class Look(Delta):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(self.Look())


def test_layers_that_are_replaced_under_a_later_plugin_are_refused_before_the_build() -> None:
    """It compresses behind the training, and by then the later one stands on its layers."""
    members = [("lora", Lora(rank=2)), ("integers", ReferenceQuantizer()), ("counts", Counts())]
    with pytest.raises(ConflictError, match="'integers' replaces layers behind the training"):
        Stack(tiny("llama"), members)
    for order in ([1, 0, 2], [1, 2, 0]):  # what stands first compresses the plain model
        assert not find_conflicts([Member(*members[i]) for i in order])


def test_a_later_plugin_that_stands_already_is_told_how_to_begin() -> None:
    members = [("integers", ReferenceQuantizer()), ("lora", Lora(rank=2))]
    stack = Stack(tiny("llama"), members, tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="stands already") as caught:
        stack.compress()
    assert caught.value.hint is not None
    assert "inject=False" in caught.value.hint
    stack = Stack(tiny("llama"), members, tokenizer=tiny_tokenizer(), inject=False)  # as it says
    stack.compress(None, ["integers"])
    stack.inject()
    with pytest.raises(MergeError, match=r"quantized, and a delta does not fold"):
        stack.merge("lora")
    assert stack.trainable_parameters() > 0


def test_compression_tells_how_far_it_is() -> None:
    class Walks(Plugin):
        @hookimpl
        def compress(self, model: ModelView, calibration: Calibration) -> None:
            blocks = [site.module for site in model.blocks("layer")]
            calibration.walk(model.module, blocks, lambda number, block, inputs: None)

    told: list[tuple[int, int]] = []
    stack = Stack("peftx:tiny", [Walks()])
    stack.compress(["some text to look at"], samples=1, length=8, progress=lambda *at: told.append(at))
    layers = stack.anatomy.num_layers
    assert told == [(i, layers) for i in range(1, layers + 1)]
