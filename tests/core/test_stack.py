"""The stack: order, conflicts, hooks, merging, switching off, removing; and its bundles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import peftx
from peftx import Claim, Delta, Plugin, PluginConfig, Stack, hookimpl
from peftx.composition.conflicts import find_conflicts
from peftx.engines.bundle import smallest_exact
from peftx.errors import BundleError, ConflictError, MergeError, PeftxError, PluginError
from peftx.kernel.attention import AttentionEdit
from peftx.kernel.calls import CallEdit
from peftx.kernel.identity import fingerprint
from peftx.kernel.members import Member
from peftx.kernel.virtual_tokens import VirtualTokens
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.models import example_inputs, output_of
from peftx.toolkits.compression import QuantLinear

IDS = torch.arange(3, 27).reshape(2, 12)


class Shift(Delta):
    """y + b: folds into a bias, where there may have been none."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.b if bias is None else bias + self.b


class Scale(Delta):
    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.z

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z[:, None], None if bias is None else bias * self.z


class NumberConfig(PluginConfig):
    start: float = Field(0.5, description="first value")


class Shifts(Plugin):
    Config = NumberConfig
    claims = {Claim.MERGEABLE}
    config: NumberConfig

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.up"):
            site.attach(Shift(site.out_features, self.config.start))


class Scales(Plugin):
    Config = NumberConfig
    claims = {Claim.MERGEABLE}
    config: NumberConfig

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.linears("mlp.up attention.o"):
            site.attach(Scale(site.out_features, self.config.start))


class Frozen8(Plugin):
    """Replaces the feed-forward by 8-bit integers."""

    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS, Claim.FINAL}

    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp", whole=True):
            site.replace(QuantLinear.from_linear(site.module, bits=8))


class Tabled(Plugin):
    """Adds the values of a table that no file holds."""

    class Add(Delta):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.zeros(width))
            self.register_buffer("table", torch.arange(width, dtype=torch.float32), persistent=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + self.b + self.table

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in model.blocks("mlp"):
            site.attach(self.Add(model.main.hidden_size))


class Signs(Plugin):
    """Compresses by a delta that folds."""

    claims = {Claim.TRAINS_BASE, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: Any) -> None:
        model.train("mlp.down")

    @hookimpl
    def compress(self, model: Any) -> None:
        self.restore(model)

    def restore(self, model: Any, stack: Any = None) -> None:
        for site in model.linears("mlp.up"):
            site.attach(Scale(site.out_features, 0.5))


class Broken(Plugin):
    @hookimpl
    def inject(self, model: Any) -> None:
        site = model.linears("mlp.down")[0]
        site.attach(Scale(site.out_features, 1.0))
        raise ValueError("half way")


def stack_of(*plugins: Any, arch: str = "llama") -> Stack:
    return Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer())


def logits(stack: Stack) -> Tensor:
    with torch.no_grad():
        return stack.model(IDS).logits


def test_stack_order_is_the_order_of_effect() -> None:
    """(u + 0.5) * 0.5 is not u * 0.5 + 0.5."""
    one, other = stack_of(Shifts(), Scales()), stack_of(Scales(), Shifts())
    up = one.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, up.in_features)
    plain = x @ up.weight.t()
    assert torch.allclose(up(x), (plain + 0.5) * 0.5)
    assert torch.allclose(other.model.model.layers[0].mlp.up_proj(x), plain * 0.5 + 0.5)


@pytest.mark.parametrize("order", [(Shifts, Scales), (Scales, Shifts)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_all_and_back(order: tuple[type[Plugin], type[Plugin]], dtype: torch.dtype) -> None:
    stack = Stack(tiny("llama").to(dtype), [plugin() for plugin in order])
    before, keys = logits(stack), {n: t.clone() for n, t in stack.model.state_dict().items()}
    stack.merge()
    merged = logits(stack)
    assert torch.allclose(before.float(), merged.float(), atol=1e-5 if dtype == torch.float32 else 0.1)
    stack.unmerge()
    assert torch.equal(logits(stack), before)
    assert all(torch.equal(t, keys[n]) for n, t in stack.model.state_dict().items())


def test_only_what_lies_nearest_to_the_weights_merges_alone() -> None:
    stack = stack_of(Shifts(), Scales())
    stack.merge("shifts")
    stack.unmerge()
    with pytest.raises(MergeError, match="scales cannot be merged before shifts"):
        stack.merge("scales")
    assert torch.equal(logits(stack), logits(stack_of(Shifts(), Scales())))


def test_remove_gives_the_base_back() -> None:
    base = tiny("llama")
    stack = stack_of(Shifts(), Scales())
    stack.remove("shifts")
    assert torch.equal(logits(stack), logits(stack_of(Scales())))
    stack.remove("scales")
    with torch.no_grad():
        assert torch.equal(logits(stack), base(IDS).logits)
    assert list(stack.model.state_dict()) == list(base.state_dict())
    assert type(stack.model.model.layers[0].mlp.up_proj) is nn.Linear


def test_disabled_is_a_scope() -> None:
    stack = stack_of(Shifts(), Scales())
    before = logits(stack)
    with stack.disabled("scales"):
        assert torch.equal(logits(stack), logits(stack_of(Shifts())))
    with pytest.raises(RuntimeError, match="leave"), stack.disabled():
        raise RuntimeError("leave")
    assert torch.equal(logits(stack), before)


def test_disabled_plugins_neither_decode_nor_step() -> None:
    calls: list[str] = []

    @hookimpl(wrapper=True)
    def decode(self: Any, request: Any) -> Any:
        calls.append("decode")
        return (yield)

    stack = stack_of(("seen", _plugin(decode=decode)))
    with stack.disabled("seen"):
        stack.generate("a", max_new_tokens=1)
    assert not calls
    stack.generate("a", max_new_tokens=1)
    assert calls == ["decode"]


def test_what_is_not_on_the_model_yet_does_not_decode() -> None:
    """A base is measured before anything is injected, by metrics that write text too."""
    calls: list[str] = []

    @hookimpl
    def inject(self: Any, model: Any) -> None:
        self.table = {}

    @hookimpl(wrapper=True)
    def decode(self: Any, request: Any) -> Any:
        calls.append(str(self.table))
        return (yield)

    stack = Stack(
        tiny("llama"),
        [("table", _plugin(inject=inject, decode=decode))],
        tokenizer=tiny_tokenizer(),
        inject=False,
    )
    stack.generate("a", max_new_tokens=1)
    assert calls == []
    stack.inject()
    stack.generate("a", max_new_tokens=1)
    assert calls == ["{}"]


def test_freeze_and_unfreeze() -> None:
    stack = stack_of(Shifts(), Scales())
    total = stack.trainable_parameters()
    stack.freeze("shifts")
    assert stack.trainable_parameters() == total - stack.plugin_parameters("shifts")
    stack.unfreeze()
    assert stack.trainable_parameters() == total


def test_a_failing_hook_names_the_plugin_and_leaves_nothing() -> None:
    model = tiny("llama")
    with pytest.raises(PluginError, match="plugin 'broken' failed in inject: ValueError: half way"):
        Stack(model, [Broken()])
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_the_place_in_the_spec_is_named() -> None:
    with pytest.raises(PluginError, match=r"'b' at stack\.yaml:7:3 failed"):
        Stack(tiny("llama"), [Member("b", Broken(), "stack.yaml:7:3")])


def test_ids() -> None:
    assert list(stack_of(Shifts(), ("again", Shifts())).plugins) == ["shifts", "again"]
    with pytest.raises(ConflictError, match="'shifts' stands twice"):
        stack_of(Shifts(), Shifts())
    one = Shifts()
    with pytest.raises(ConflictError, match="one plugin object stands twice"):
        stack_of(("a", one), ("b", one))
    with pytest.raises(PeftxError, match="no plugin 'shift' in this stack") as caught:
        stack_of(Shifts()).remove("shift")
    assert "shifts" in str(caught.value)


def test_a_class_is_no_plugin() -> None:
    with pytest.raises(PluginError, match="not a plugin"):
        Stack(tiny("llama"), [Shifts])  # type: ignore[list-item]


def _plugin(**hooks: Any) -> Plugin:
    return type("Made", (Plugin,), hooks)()


@pytest.mark.parametrize("option", ["tryfirst", "trylast"])
def test_order_hints_are_refused(option: str) -> None:
    @hookimpl(**{option: True})
    def inject(self: Any, model: Any) -> None: ...

    with pytest.raises(PluginError, match="tryfirst and trylast are refused"):
        stack_of(_plugin(inject=inject))


def test_wrappers_only_where_they_make_sense() -> None:
    @hookimpl(wrapper=True)
    def inject(self: Any, model: Any) -> Any:
        yield

    with pytest.raises(PluginError, match="only train_step and decode take wrappers"):
        stack_of(_plugin(inject=inject))


def test_bad_arguments_and_unknown_hooks_are_refused() -> None:
    @hookimpl
    def inject(self: Any, modle: Any) -> None: ...

    with pytest.raises(PluginError, match="modle"):
        stack_of(_plugin(inject=inject))

    @hookimpl
    def injct(self: Any, model: Any) -> None: ...

    @hookimpl
    def evaluate(self: Any) -> None: ...

    with pytest.raises(PluginError, match="injct"):
        stack_of(_plugin(injct=injct, evaluate=evaluate))


def _claiming(*claims: Claim, hook: str = "train_step") -> Plugin:
    @hookimpl(wrapper=hook in ("train_step", "decode"))
    def method(self: Any) -> Any:
        return (yield)

    return type("Made", (Plugin,), {"claims": set(claims), hook: method})()


@pytest.mark.parametrize(
    "claim", [Claim.REPLACES_STEP, Claim.REPLACES_ATTENTION, Claim.REPLACES_DECODING, Claim.QUANTIZES]
)
def test_exclusive_claims_collide(claim: Claim) -> None:
    (conflict,) = find_conflicts([Member("a", _claiming(claim)), Member("b", _claiming(claim))])
    assert (conflict.first, conflict.second) == ("a", "b")
    assert claim in conflict.claims


def test_conflicts_name_the_order_that_works() -> None:
    with pytest.raises(ConflictError, match="this order works: shifts, frozen8"):
        stack_of(Frozen8(), Shifts())
    assert not find_conflicts([Member("shifts", Shifts()), Member("frozen8", Frozen8())])


def test_a_step_without_gradients_beside_one_that_needs_them() -> None:
    members = [Member("zo", _claiming(Claim.REPLACES_STEP)), Member("gs", _claiming(Claim.NEEDS_GRADIENTS))]
    assert len(find_conflicts(members)) == 1 == len(find_conflicts(members[::-1]))


def test_what_does_not_fold_before_a_compression() -> None:
    members = [Member("a", _claiming(hook="inject")), Member("q", Frozen8())]
    assert "does not fold" in find_conflicts(members)[0].reason
    beside = [Member("a", _claiming(Claim.BESIDE_WEIGHTS, hook="inject")), Member("q", Frozen8())]
    assert not find_conflicts(beside)


# -- bundles -----------------------------------------------------------------------------------------------------


def test_bundle_brings_everything_back(tmp_path: Path) -> None:
    stack = stack_of(Shifts(start=0.25), ("more", Scales()))
    with torch.no_grad():
        for parameter in stack.ledger.parameters("more"):
            parameter.normal_(1, 0.1)
    stack.freeze("more")
    stack.save(tmp_path / "b")
    back = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(back), logits(stack))
    assert back.plugins["shifts"].config == NumberConfig(start=0.25)
    assert back.trainable_parameters() == stack.trainable_parameters() == stack.plugin_parameters("shifts")
    assert not back.model.training
    assert all(not module.training for module in back.model.modules())


def test_folded_plugins_come_back_with_new_biases(tmp_path: Path) -> None:
    stack = stack_of(Shifts())
    before = logits(stack)
    stack.merge(keep=False)
    assert torch.allclose(logits(stack), before, atol=1e-5)
    assert not stack.trainable_parameters()
    stack.save(tmp_path / "b")
    back = peftx.load(tmp_path / "b", model=tiny("llama"))
    assert torch.equal(logits(back), logits(stack))
    assert isinstance(back.model.model.layers[0].mlp.up_proj.bias, nn.Parameter)


def test_compressed_bundles_need_no_base(tmp_path: Path) -> None:
    stack = stack_of(Scales(), Frozen8())
    stack.compress()
    stack.save(tmp_path / "b")
    assert stack.standing["scales"].folded
    back = peftx.load(tmp_path / "b")
    assert torch.equal(logits(back), logits(stack))
    assert isinstance(back.model.model.layers[0].mlp.up_proj, QuantLinear)
    assert back.model.lm_head.weight.device.type == "cpu"
    saved = (tmp_path / "b" / "frozen8.safetensors").stat().st_size
    packed = sum(t.nbytes for t in stack.ledger.tensors("frozen8").values())
    assert packed <= saved <= packed * 1.25 + 8000  # the header of a small file


def test_what_no_file_holds_is_there_above_packed_weights(tmp_path: Path) -> None:
    """Deltas come back before the weights they stand on, whose place is on no device yet."""

    class Beneath(Frozen8):
        claims: ClassVar[set[Claim]] = {Claim.QUANTIZES, Claim.FINAL}

    stack = stack_of(Tabled(), Beneath())
    stack.compress()
    stack.save(tmp_path / "b")
    assert torch.equal(logits(peftx.load(tmp_path / "b")), logits(stack))


def test_what_a_compression_attached_and_another_folded_comes_back(tmp_path: Path) -> None:
    stack = stack_of(Signs(), Frozen8())
    stack.compress()
    stack.save(tmp_path / "b")
    assert torch.equal(logits(peftx.load(tmp_path / "b")), logits(stack))


def test_a_delta_on_integers_does_not_merge() -> None:
    class Late(Scales):
        claims: ClassVar[set[Claim]] = {Claim.MERGEABLE}

    stack = Stack(tiny("llama"), [Frozen8Early(), ("late", Late(start=1.0))], inject=False)
    stack.compress(ids=["frozen8-early"])
    stack.inject()
    with pytest.raises(MergeError):
        stack.merge()
    with pytest.raises(MergeError):
        stack.merge(keep=False)


class Frozen8Early(Frozen8):
    claims: ClassVar[set[Claim]] = {Claim.QUANTIZES}


def test_switching_off_what_replaced_weights_is_refused() -> None:
    stack = stack_of(Frozen8())
    stack.compress()
    with pytest.raises(PeftxError, match="cannot be switched off"), stack.disabled():
        raise AssertionError("not reached")


def test_removing_a_compression_gives_the_base_back() -> None:
    stack = stack_of(Frozen8())
    base = logits(stack)
    stack.compress()
    assert not torch.equal(logits(stack), base)
    stack.remove("frozen8")
    assert torch.equal(logits(stack), base)


def test_another_base_is_refused(tmp_path: Path) -> None:
    stack_of(Shifts()).save(tmp_path / "b")
    with pytest.raises(BundleError, match="is another base model"):
        peftx.load(tmp_path / "b", model=tiny("llama", seed=1))


@pytest.mark.parametrize("read", [str, LlamaForCausalLM.from_pretrained])
def test_a_base_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], Any]
) -> None:
    tiny("llama").save_pretrained(tmp_path / "here" / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Stack(read("base"), [Shifts()]).save("bundle")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert peftx.load(tmp_path / "here" / "bundle").base_id == str(tmp_path / "here" / "base")


def test_damage_is_named(tmp_path: Path) -> None:
    stack_of(Shifts()).save(tmp_path / "b")
    file = tmp_path / "b" / "shifts.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "b" / "stray.txt").write_text("?")
    (tmp_path / "b" / "README.md").unlink()
    with pytest.raises(BundleError) as caught:
        peftx.load(tmp_path / "b", model=tiny("llama"))
    for words in (
        "shifts.safetensors is corrupted",
        "stray.txt is not in the manifest",
        "README.md is missing",
    ):
        assert words in str(caught.value)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    stack_of(Shifts()).save(tmp_path / "b")
    file = tmp_path / "b" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["format"] = 99
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="format 99"):
        peftx.load(tmp_path / "b", model=tiny("llama"))


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="not overwritten"):
        stack_of(Shifts()).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_saving_over_a_bundle_replaces_it(tmp_path: Path) -> None:
    stack_of(Shifts()).save(tmp_path / "b")
    stack_of(Scales()).save(tmp_path / "b")
    assert list(peftx.load(tmp_path / "b", model=tiny("llama")).plugins) == ["scales"]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_merged_stacks_are_not_saved(tmp_path: Path) -> None:
    stack = stack_of(Shifts())
    stack.merge()
    with pytest.raises(BundleError, match="merged"):
        stack.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_export_is_a_plain_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stack = stack_of(Scales())
    before = logits(stack)
    stack.export(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, before, atol=1e-5)
    assert torch.equal(logits(stack), before)


def test_smallest_exact_keeps_every_bit() -> None:
    half = torch.randn(50).half().float()
    brain = torch.tensor([1e30, 2.0**-130]).bfloat16().float()
    full = torch.tensor([0.1])
    assert smallest_exact(half).dtype == torch.float16
    assert smallest_exact(brain).dtype == torch.bfloat16
    assert smallest_exact(full).dtype == torch.float32
    for tensor in (half, brain, full):
        assert torch.equal(smallest_exact(tensor).float(), tensor)


def test_fingerprint_tells_trainings_apart() -> None:
    one, same, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        same.lm_head.weight.mul_(1.001)
    assert fingerprint(one) != fingerprint(same)


@pytest.mark.parametrize("id", ["half", "type", "keys", "train"])
def test_an_id_may_be_the_name_of_a_method(id: str) -> None:
    from peftx_lora import Lora

    model = tiny("llama")
    inputs = example_inputs(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        stack = Stack(model, [(id, Lora(rank=2))])
        for parameter in stack.ledger.parameters(id):
            parameter.add_(0.1)
        assert not torch.equal(output_of(model, inputs), before)
        stack.remove(id)
        assert torch.equal(output_of(model, inputs), before)


def test_what_deltas_share_is_gone_once_they_are_folded(tmp_path: Path) -> None:
    from peftx_aligner import Aligner

    model = tiny("llama")
    stack = Stack(model, [Aligner()], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for parameter in stack.ledger.parameters("aligner"):
            parameter.add_(0.1)
    stack.merge(keep=False)
    before = logits(stack)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded), before)
    assert "peftx_parts" not in dict(loaded.model.named_children())


def test_a_stack_that_cannot_be_built_leaves_the_model_as_it_was() -> None:
    from peftx_hft import Hft
    from peftx_lora import Lora

    model = tiny("llama")
    inputs, before = example_inputs(model), dict(model.named_parameters())
    model.model.norm.weight.requires_grad_(False)
    trains = {name: p.requires_grad for name, p in before.items()}
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        logits = output_of(model, inputs)
        with pytest.raises(ConflictError, match="both train the base's"):
            Stack(model, [Lora(rank=2), Hft(fraction=1), ("again", Hft(fraction=1))])
        assert torch.equal(output_of(model, inputs), logits)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p is before[name] for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert len(set(trains.values())) == 2


class Everywhere(Plugin):
    """Puts something of its own where `where` says."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    @hookimpl
    def inject(self, model: Any) -> None:
        if self.where == "slot":
            site = model.linears("mlp.up")[0]
            site.attach(Shift(site.out_features, 1.0))
        elif self.where == "attention":
            model.attend(model.attention_sites()[1], AttentionEdit())
        elif self.where == "prompt":
            model.prompt(VirtualTokens(2))
        elif self.where == "base":
            model.norms()[0].train()
        elif self.where == "call":
            model.around(CallEdit())
        elif self.where == "positions":
            model.shift_positions(2)
        else:
            model.keep("head", nn.Linear(2, 2))


@pytest.mark.parametrize("where", ["slot", "attention", "prompt", "base", "call", "positions", "kept"])
def test_a_second_stack_on_one_model_is_refused(where: str) -> None:
    """It would freeze the first one's parameters, and neither could save both."""
    model = tiny("llama")
    first = Stack(model, [("first", Everywhere(where))])
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConflictError, match="carries first of another stack"):
        Stack(model, [Scales()])
    assert [p.requires_grad for p in model.parameters()] == trains
    first.remove("first")
    Stack(model, [Scales()])


def test_a_trained_base_takes_a_stack_when_its_own_is_gone() -> None:
    """It is a fine-tuned model then, and nothing else."""
    model = tiny("llama")
    first = Stack(model, [("first", Everywhere("base"))])
    with pytest.raises(ConflictError):
        Stack(model, [Scales()])
    first.pipeline = first  # type: ignore[assignment]  # a cycle, which only the collector ends
    del first
    Stack(model, [Scales()])


def test_a_model_that_keeps_the_folded_weights_takes_another_stack() -> None:
    first = stack_of(Shifts())
    first.merge(keep=False)
    before = logits(first)
    second = Stack(first.model, [Scales(start=1.0)])
    assert torch.equal(logits(second), before)


def test_weights_that_were_trained_and_then_quantized_come_back(tmp_path: Path) -> None:
    from peftx_hft import Hft
    from peftx_prefixquant import PrefixQuant

    stack = Stack(tiny("llama"), [Hft(), PrefixQuant(weight_bits=4)], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for parameter in stack.ledger.parameters("hft"):
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    stack.compress(["Once upon a time there was a fox that had no name."] * 3, samples=2, length=16)
    before = logits(stack)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded), before)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    stack_of(Scales()).save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "manifest.json"
    file.write_text(file.read_text().replace('"start": 0.5', '"start": 5.5'))
    with pytest.raises(BundleError, match="was edited"):
        peftx.load(tmp_path / "bundle", model=tiny("llama"))


def test_a_load_that_fails_leaves_the_callers_model(tmp_path: Path) -> None:
    class More(Scales):
        @hookimpl
        def inject(self, model: Any) -> None:
            for site in model.linears("mlp.up"):
                site.attach(Scale(site.out_features, 1.0))

    stack = stack_of(Shifts(), ("more", More()))
    stack.save(tmp_path / "bundle")
    More.inject = Scales.inject  # type: ignore[method-assign]  the plugin changed since
    model = tiny("llama")
    before = dict(model.named_parameters())
    with pytest.raises(BundleError, match=r"too many|missing"):
        peftx.load(tmp_path / "bundle", model=model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p for name, p in before.items())


def test_a_base_for_a_bundle_that_holds_one_is_refused(tmp_path: Path) -> None:
    stack = stack_of(Frozen8())
    stack.compress()
    stack.save(tmp_path / "bundle")
    with pytest.raises(BundleError, match="holds its base itself"):
        peftx.load(tmp_path / "bundle", model=tiny("llama"))


def test_an_export_does_not_throw_away_what_others_wrote(tmp_path: Path) -> None:
    stack = stack_of(Scales())
    base = tmp_path / "base"
    with pytest.warns(UserWarning, match=r"read this checkpoint without scales: stack\.save"):
        stack.model.save_pretrained(base)
    with pytest.raises(BundleError, match="not overwritten"):
        stack.export(base)
    out = stack.export(tmp_path / "out")
    stack.export(out)  # its own is replaced
    (out / "notes.txt").write_text("keep")
    with pytest.raises(BundleError, match=r"notes.txt"):
        stack.export(out)
    assert (out / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("id", ["v1.0", "a/b", "A", ""])
def test_an_id_that_no_bundle_could_hold_is_refused(id: str) -> None:
    with pytest.raises(PluginError, match="is no id"):
        stack_of((id, Scales()))


def test_folded_plugins_are_named_in_the_card(tmp_path: Path) -> None:
    stack = stack_of(Scales())
    stack.merge(keep=False)
    stack.save(tmp_path / "bundle")
    assert "in the base's weights" in (tmp_path / "bundle" / "README.md").read_text()


def test_the_card_says_which_numbers_are_trained(tmp_path: Path) -> None:
    """Vera's A and B are frozen, and held."""
    from peftx_lora import Lora
    from peftx_vera import Vera

    stack = Stack(tiny("llama"), [Vera(rank=2), Lora(rank=2)], tokenizer=tiny_tokenizer())
    stack.save(tmp_path / "bundle")
    card = (tmp_path / "bundle" / "README.md").read_text()
    held, trained = stack.plugin_parameters("vera"), sum(p.numel() for p in stack.ledger.parameters("vera"))
    assert held > trained > 0
    assert f"| {held:,}, {trained:,} of them trained |" in card
    assert f"| {stack.plugin_parameters('lora'):,} |" in card


def test_the_card_says_from_what_by_what_and_whom_to_cite(tmp_path: Path) -> None:
    from peftx.engines.files import sha256
    from peftx.pipeline import load_run
    from peftx.version import __version__

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    spec = f"peftx: 1\nmodel: peftx:tiny\ndata: {{train: {rows}, eval: 'peftx:sample/held_out.jsonl'}}\n"
    spec += "stack: [lora, {use: lora, id: second}, mezo]\ntrain: {steps: 1, batch_size: 1}\n"
    spec += "evaluate: [{perplexity: {limit: 1}}]\n"
    load_run(spec, overrides=[f"output={tmp_path / 'out'}"]).run()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "tags: [peftx, lora, mezo]\n" in card
    assert f"| train | rows.jsonl, sha256 {sha256(rows)[:16]} |" in card
    assert str(tmp_path) not in card, "nobody's folders"
    assert "| eval | peftx:sample/held_out.jsonl, sha256 " in card
    assert f"peftx {__version__}, torch {torch.__version__}, " in card
    assert "`peftx apply pipeline.yaml`" in card
    assert "Code: peftx-lora: Apache-2.0, peftx-mezo: Apache-2.0." in card
    assert [line[:9] for line in card.splitlines() if line.startswith("@")] == ["@article{", "@inprocee"]
    assert card.count("@article{hu2021lora,") == 1
    files = {file.name for file in (tmp_path / "out").iterdir()} - {"README.md", "manifest.json"}
    assert set(re.findall(r"^\| ([\w.-]+) \| [\d,]+ \|$", card, re.MULTILINE)) == files
    assert "stack.generate(" in card


def test_the_card_says_on_how_many_rows_and_beside_what(tmp_path: Path) -> None:
    from peftx.pipeline import load_run

    rows = tmp_path / "rows.jsonl"
    lines = (f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(10))
    rows.write_text("".join(lines), "utf-8")
    spec = f"peftx: 1\nmodel: peftx:tiny\ndata: {{train: {rows}, holdout: 0.2}}\nstack: [lora]\n"
    spec += "train: {steps: 2, batch_size: 1, learning_rate: 0.01}\nevaluate: [perplexity]\n"
    spec += "run: [evaluate, {inject: [lora]}, train, evaluate, save]\n"
    load_run(spec, overrides=[f"output={tmp_path / 'out'}"]).run()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    told = json.loads((tmp_path / "out" / "history.json").read_text("utf-8"))["evaluations"]
    first, last = (each["scores"]["perplexity"] for each in told)
    assert first["value"] != last["value"]
    cells = [cell.strip() for line in card.splitlines() if "| perplexity" in line for cell in line.split("|")]
    assert cells[2] == f"{last['value']:.5g} {last['unit']}"
    assert cells[4] == f"{last['count']:,}"
    assert cells[5] == f"{first['value']:.5g} {first['unit']}"
    assert "Trained on 2 rows. Measured on rows held out of `train`: a share of 0.2, seed 0." in card


def test_a_loop_of_ones_own_accumulates_and_remembers() -> None:
    class Counts(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: Any) -> Any:
            step.memory["n"] = step.memory.get("n", 0) + 1
            step.on_gradients(lambda _: step.memory.update(updates=step.memory.get("updates", 0) + 1))
            return (yield)

    stack = stack_of(Scales(), ("counts", Counts()))
    optimizer = torch.optim.SGD(list(stack.ledger.parameters("scales")), lr=0.1)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    for micro in (0, 1, 2, 0, 1, 2):
        stack.train_step(batch, optimizer=optimizer, micro=micro, accumulation=3)
    assert stack.memory == {"n": 6, "updates": 2}
    assert stack.trained_steps == 2
