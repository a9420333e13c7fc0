"""Layers that several plugins make smaller one after another: what stands, what a bundle holds, what the plan says."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftx
from peftx import Claim, Delta, Plugin, Stack, Targets, hookimpl
from peftx.composition.registry import Registry
from peftx.engines.bundle.sparse import as_bits, widened
from peftx.errors import ArchitectureError, ConflictError, MergeError
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.plugin import compresses_own
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.models import example_inputs, output_of
from peftx.toolkits.compression import NarrowLinear, QuantLinear
from peftx.toolkits.compression.pruning import (
    bytes_left,
    check_into,
    check_masked,
    check_not_packed,
    check_runs,
    cut,
    heads_and_neurons,
    put_in_place,
    share_left,
)
from peftx_lora import Lora
from peftx_spec import load_spec

IDS = torch.arange(3, 27).reshape(2, 12)


class Halves(Plugin):
    """Leaves the first half of the channels of each feed-forward part."""

    claims = {Claim.NARROWS}

    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp"):
            half = site.weight.shape[1 if site.role == "mlp.down" else 0] // 2
            cut = site.weight[:, :half] if site.role == "mlp.down" else site.weight[:half]
            site.replace(NarrowLinear.of(cut, None))


class Packs(Plugin):
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}

    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp"):
            site.replace(QuantLinear.from_linear(site.module, bits=8))


@torch.no_grad()
def logits(stack: Stack) -> Tensor:
    return stack.model.eval()(input_ids=IDS).logits


def shrunk(*, adapter: bool, pack: bool, keep: bool = True) -> Stack:
    """Narrowed, with an adapter on the narrow layers, packed."""
    plugins = [Halves(), *([Lora(rank=2, targets="mlp")] if adapter else []), *([Packs()] if pack else [])]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["halves"], keep=keep)
    stack.inject()
    with torch.no_grad():
        for p in stack.ledger.parameters("lora") if adapter else ():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))) * 0.1)
    if pack:
        stack.compress(ids=["packs"], keep=keep)
    return stack


def test_an_adapter_folds_into_a_layer_that_is_only_narrower(tmp_path: Path) -> None:
    stack = shrunk(adapter=True, pack=False)
    before = logits(stack)
    stack.merge(keep=False)
    assert torch.allclose(logits(stack), before, atol=1e-5)
    stack.save(tmp_path / "out")
    files = {file.stem for file in (tmp_path / "out").glob("*.safetensors")}
    assert files == {"base", "halves"}, "the folded weights stand in the layers' own file alone"
    assert torch.equal(logits(peftx.load(tmp_path / "out")), logits(stack))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_layer_that_is_packed_after_it_was_narrowed_is_saved_once(tmp_path: Path, adapter: bool) -> None:
    stack = shrunk(adapter=adapter, pack=True)
    stack.save(tmp_path / "out")
    files = {file.stem: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert set(files) == {"base", "packs"}
    again = peftx.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(stack))
    assert (
        again.base_parameters()
        == stack.base_parameters()
        == shrunk(adapter=False, pack=False).base_parameters()
    )


def test_who_replaced_a_layer_first_goes_last() -> None:
    fresh = Stack(tiny("llama"), [])
    stack = shrunk(adapter=False, pack=True)
    with pytest.raises(MergeError, match=r"'halves' is in the weights that packs replaced"):
        stack.remove("halves")
    stack.remove("packs")
    assert isinstance(stack.model.model.layers[0].mlp.up_proj, NarrowLinear)
    stack.remove("halves")
    assert torch.equal(logits(stack), logits(fresh))


def test_what_was_folded_into_a_narrow_layer_goes_with_it() -> None:
    fresh = Stack(tiny("llama"), [])
    stack = shrunk(adapter=True, pack=False)
    stack.merge(keep=False)
    with pytest.raises(MergeError):
        stack.remove("lora")
    stack.remove("halves")
    assert torch.equal(logits(stack), logits(fresh))


def test_layers_that_nobody_keeps_are_free() -> None:
    stack = Stack(tiny("llama"), [Halves(), Packs()], tokenizer=tiny_tokenizer())
    dense = weakref.ref(stack.model.model.layers[0].mlp.up_proj)
    stack.compress(ids=["halves"], keep=False)
    narrow = weakref.ref(stack.model.model.layers[0].mlp.up_proj)
    stack.compress(ids=["packs"], keep=False)
    gc.collect()
    assert dense() is None
    assert narrow() is None
    with pytest.raises(MergeError):
        stack.remove("halves")
    assert next(part.covers for part in stack.ledger.all(ReplacedPart)) == {"halves"}


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 11)])
def test_masks_take_a_bit(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = as_bits(mask)
    assert bits.nbytes == -(-mask.numel() // 8)
    assert torch.equal(widened(bits, "bool", shape), mask)
    with pytest.raises(ValueError, match="bits"):
        widened(bits, "bool", (mask.numel() + 8,))


def test_narrow_layers_of_a_half_precision_base_stay_half(tmp_path: Path) -> None:
    """As float32 a pruned model would be larger on disk than it was."""
    stack = Stack("peftx:tiny", [Halves()])
    stack.compress()
    file = stack.save(tmp_path / "out") / "halves.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    again = peftx.load(tmp_path / "out")
    assert again.model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.equal(logits(again), logits(stack))


ROWS = "{train: 'peftx:sample/train.jsonl'}"
TEXT = "{calibration: 'peftx:sample/calibration.txt'}"
SPEC = """
peftx: 1
model: peftx:tiny
data: {data}
stack: {stack}
output: {output}
"""


PLAIN = ["[lora]", "[{use: spp, with: {pattern: '2:4'}}]"]
COMPRESS = [
    "[nf4]", "[lora, nf4]", "[nf4, lora]", "[{use: cfsp, with: {multiple: 16}}]",
    "[{use: apt, with: {density: 1.0}}, nf4]",
]  # fmt: skip


TRAIN = [
    "[{use: apt, with: {density: 1.0, tune: 1, prune: 1, fade: 1}}]",
    "[{use: pat-pruning, with: {width: 1.0, prune: 1}}]",
]
"""Some of their layers train and are float32 then, the others are only cut."""


@pytest.mark.parametrize("stack", PLAIN + COMPRESS + TRAIN)
def test_the_plan_knows_the_bytes_of_the_bundle(tmp_path: Path, stack: str) -> None:
    data = TEXT if stack in COMPRESS else ROWS if stack in TRAIN else "{}"
    train = "train: {steps: 3, batch_size: 1}\n" if stack in TRAIN else ""
    run = load_run(SPEC.format(data=data, stack=stack, output=tmp_path / "out") + train)
    planned = plan(run.pipeline)
    assert planned.runnable, planned.conflicts
    run.run()
    held = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert planned.totals.bundle_bytes == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "bert"])
def test_blocks_that_are_cut_are_blocks_that_are_zero(arch: str) -> None:
    """Without every other head and neuron a model computes what it does where their columns out of them are 0."""
    small, zeroed = (Stack(tiny(arch), [Fades()], tokenizer=tiny_tokenizer()) for _ in range(2))
    found = heads_and_neurons(small.view("fades"))
    assert len(found) == 2 * small.anatomy.num_layers
    saved, whole, layers = 0, small.base_parameters(), []
    for blocks in found:
        kept = torch.arange(blocks.count) % 2 == 0
        saved += blocks.cost * int((~kept).sum())
        out = zeroed.model.get_submodule(blocks.out.path).weight.data
        out *= kept.repeat_interleave(blocks.width)
        layers += blocks.cut(kept, {})
    put_in_place(small, "fades", layers)
    inputs = example_inputs(zeroed.model)
    with torch.no_grad():
        got, expected = (output_of(stack.model.eval(), inputs) for stack in (small, zeroed))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert whole - small.base_parameters() == saved


def test_a_delta_is_folded_into_what_is_cut() -> None:
    stack = Stack(tiny("llama"), [Fades()], tokenizer=tiny_tokenizer())
    site = heads_and_neurons(stack.view("fades"))[1].into[0][0]
    layer = cut(site, Doubles(), rows=torch.tensor([3, 1]), columns=slice(0, 5))
    assert torch.equal(layer.weight, 2 * site.weight[[3, 1], :5])


def test_other_modules_are_tried_without_numbers() -> None:
    model = Stack(tiny("llama"), [Fades()], tokenizer=tiny_tokenizer()).view("fades")
    site = next(iter(model.linears("mlp.up")))
    fits, thin = (torch.nn.Linear(site.in_features - n, site.out_features, device="meta") for n in (0, 1))
    check_runs(model, {site.path: fits}, "has more", "Llama works")
    with pytest.raises(ArchitectureError, match="fades: llama has more") as raised:
        check_runs(model, {site.path: thin}, "has more", "Llama works")
    assert raised.value.hint == "Llama works"


def test_nothing_is_taken_out_of_what_is_packed() -> None:
    stack = Stack(tiny("llama"), [Fades(), Packs()], tokenizer=tiny_tokenizer())
    for site in stack.view("fades").linears("mlp"):
        check_not_packed(stack.view("fades"), site, "stays whole")
    stack.compress()
    site = next(s for s in stack.anatomy.sites if s.role == "mlp.up")
    with pytest.raises(ConflictError, match=f"{site.path} is packed already, and stays whole") as raised:
        check_not_packed(stack.view("fades"), site, "stays whole")
    assert raised.value.hint == "put 'fades' first"


def test_what_leads_into_heads_and_neurons() -> None:
    model = Stack(tiny("llama"), [Fades()], tokenizer=tiny_tokenizer()).view("fades")
    found = heads_and_neurons(model)
    check_into(model, found, Targets("attention.q,k,v mlp.gate,up"), "masks fall there")
    with pytest.raises(
        ArchitectureError, match=r"mlp.down_proj leads into no .*, and masks fall there"
    ) as raised:
        check_into(model, found, Targets("mlp.up,down"), "masks fall there")
    assert raised.value.hint == "leave it out of targets: '!mlp.down'"


def test_masks_that_are_not_there_or_in_the_weights() -> None:
    stack = Stack(tiny("llama"), [Drops(), Lora(rank=2)], tokenizer=tiny_tokenizer(), inject=False)
    with pytest.raises(ConflictError, match="lora: there are no masks"):
        check_masked(stack, "lora")
    stack.inject()
    check_masked(stack, "lora")
    stack.remove("drops")
    stack.merge()
    with pytest.raises(ConflictError, match="in the weights already"):
        check_masked(stack, "lora")


def test_the_share_that_is_left_weighs_blocks_by_their_numbers() -> None:
    model = Stack(tiny("llama"), [Fades()], tokenizer=tiny_tokenizer()).view("fades")
    heads, neurons = heads_and_neurons(model)[:2]
    kept = [(b, torch.arange(b.count) < n) for b, n in ((heads, 1), (neurons, 3))]
    whole = heads.cost * heads.count + neurons.cost * neurons.count
    assert share_left(kept) == (heads.cost + 3 * neurons.cost) / whole
    assert share_left([]) == 1.0


def test_bytes_that_are_left() -> None:
    sites = Stack(tiny("llama"), [Fades()], tokenizer=tiny_tokenizer()).view("fades").linears("mlp")
    assert [site for site, _ in bytes_left(sites, 0.5)] == list(sites)
    assert all(2 * n == site.weight.nbytes for site, n in bytes_left(sites, 0.5))


class Fades(Plugin):
    """Injects what it compresses."""

    claims = {Claim.NARROWS, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: Any) -> None: ...

    @hookimpl
    def compress(self, model: Any) -> None: ...


@pytest.mark.parametrize("stack", ["[lora]", "[lora, nf4]", "[nf4, lora]"])
def test_a_plan_counts_packed_layers_among_those_that_are_reached(stack: str, tmp_path: Path) -> None:
    text = SPEC.format(data=ROWS, stack=stack, output=tmp_path / "out") + "train: {steps: 1}\n"
    found = plan(load_run(text).pipeline)
    (detail,) = (stage.detail for stage in found.stages if stage.name == "inject")
    assert detail == "stands on 100.0% of the numbers in the layers' matrices"


def test_who_compresses_what_it_injected() -> None:
    assert compresses_own(Fades)
    assert not compresses_own(Halves)
    assert not compresses_own(Lora)


class Drops(Plugin):
    """Masks channels while it stands there, and leaves the others in the end: nothing of it folds in the old width."""

    claims = {Claim.NARROWS}

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.up"):
            site.attach(Doubles())

    @hookimpl
    def compress(self, model: Any, stack: Stack) -> None:
        stack.ledger.remove(model.owner)
        Halves().compress(model)


class Doubles(Delta):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return 2 * weight, bias


def test_what_packs_waits_for_what_compresses_its_own() -> None:
    """Without a claim that it folds: what its `compress` leaves are plain layers."""
    stack = Stack(tiny("llama"), [Drops(), Packs()], tokenizer=tiny_tokenizer())
    before = logits(stack)
    with pytest.raises(ConflictError, match="'packs' starts from the smaller layers of 'drops'") as raised:
        stack.compress(ids=["packs"])
    assert raised.value.hint == "compress(data, ['drops', 'packs'])"
    assert torch.equal(logits(stack), before)
    stack.compress()
    up = stack.model.model.layers[0].mlp.up_proj
    assert isinstance(up, QuantLinear)
    assert up.out_features == 24
    with pytest.raises(ConflictError, match="does not fold into the weights"):
        Stack(tiny("llama"), [Beside(), Packs()], tokenizer=tiny_tokenizer())


class Beside(Plugin):
    """Stands there, and compresses nothing of its own."""

    claims = {Claim.NARROWS}

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.up"):
            site.attach(Doubles())


MIXED = [
    "[selectit, lora, nf4]",
    "[lora, prompt-tuning, nf4]",
    "[{use: cfsp, with: {multiple: 16}}, selectit, nf4]",
]


@pytest.mark.parametrize("stack", MIXED)
def test_a_plan_has_every_plugin_and_the_rows_of_each(stack: str, tmp_path: Path) -> None:
    """A layer that one plugin makes smaller and the next one packs is a row of both, and counts once."""
    data = "{train: 'peftx:sample/train.jsonl', calibration: 'peftx:sample/calibration.txt'}"
    text = SPEC.format(data=data, stack=stack, output=tmp_path / "out") + "train: {steps: 1}\n" * (
        "lora" in stack
    )
    pipeline = load_run(text).pipeline
    found = plan(pipeline)
    assert [plugin.id for plugin in found.plugins] == [entry.id for entry in pipeline.stack]
    for plugin in found.plugins:
        rows = [module for module in found.modules if module.plugin == plugin.id]
        assert (plugin.modules, plugin.params, plugin.bytes) == (
            len(rows), sum(row.params for row in rows), sum(row.bytes for row in rows),
        )  # fmt: skip
        assert bool(rows) == (plugin.id != "selectit")
        assert plugin.detail == ("" if rows else "changes no module")


UNSEEN = "not looked at, since the stack is refused"


@pytest.mark.parametrize(
    ("stack", "details"),
    [
        ("[lora, nf4, signround]", [UNSEEN, "refused", "refused"]),
        ("[lora, bitfit, nf4]", ["", "refused", ""]),
        ("[lora, metaprompter, nf4]", [UNSEEN, "refused", UNSEEN]),
    ],
)  # fmt: skip
def test_a_plan_says_what_became_of_each_plugin_where_one_is_refused(
    stack: str, details: list[str], tmp_path: Path
) -> None:
    text = SPEC.format(data=ROWS, stack=stack, output=tmp_path / "out") + "train: {steps: 1}\n"
    run = load_spec(text, catalogue=Registry(), name="spec.yaml").pipeline
    assert [plugin.detail for plugin in plan(run).plugins] == details


def test_a_plan_of_compressors_alone_says_which_order_works(tmp_path: Path) -> None:
    found = plan(load_run(SPEC.format(data=TEXT, stack="[nf4, cfsp]", output=tmp_path / "out")).pipeline)
    assert [conflict.remedy for conflict in found.conflicts] == ["put 'cfsp' before 'nf4'"]
    assert plan(
        load_run(SPEC.format(data=TEXT, stack="[cfsp, nf4]", output=tmp_path / "out")).pipeline
    ).runnable


def test_a_plan_follows_the_run(tmp_path: Path) -> None:
    """An adapter that comes after a compression stands on what it left, and phases that are over are not told again."""
    text = (
        SPEC.format(data=ROWS, stack="[{use: apt, with: {fade: 2}}, lora, nf4]", output=tmp_path / "out")
        + f"""
train: {{steps: 8}}
run:
  - inject: apt
  - train: {{plugins: apt}}
  - compress: apt
  - save: {{path: {tmp_path}/between}}
  - inject: lora
  - train: {{plugins: lora}}
  - compress: nf4
  - save
"""
    )
    found = plan(load_run(text).pipeline)
    assert found.runnable, found.conflicts
    assert [stage.writes for stage in found.stages if stage.name == "save"] == [
        (f"{tmp_path}/between",),
        (f"{tmp_path}/out",),
    ]
    first, second = (stage.detail for stage in found.stages if stage.name == "train")
    assert "apt: prune" in first or "apt: tune" in first
    assert not second
    alone = (
        SPEC.format(data=ROWS, stack="[{use: apt, with: {fade: 2}}]", output=tmp_path / "out")
        + "train: {steps: 8}\n"
    )
    assert [stage.name for stage in plan(load_run(alone).pipeline).stages] == [
        "inject",
        "train",
        "compress",
        "save",
    ]
