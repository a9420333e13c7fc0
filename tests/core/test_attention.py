"""Attention edits: exact where they change nothing, equal to the written-out method where they do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from peftx.errors import ArchitectureError, ConflictError
from peftx.kernel.anatomy.anatomy import Anatomy, Heads
from peftx.kernel.attention import AttentionEdit
from peftx.kernel.changes import Owner
from peftx.kernel.ledger import Ledger
from peftx.kernel.view import ModelView
from peftx.testing.models import ARCHITECTURES, example_inputs, output_of, tiny
from peftx.testing.shapes import PAD, Padding

SILENT = ("mamba", "bloom", "gptj", "deberta_v2")
DISPATCHING = tuple(arch for arch in ARCHITECTURES if arch not in SILENT)
DECODERS = tuple(
    arch
    for arch in DISPATCHING
    if arch not in ("bert", "roberta", "t5", "bart", "whisper", "vit", "clip", "llava")
)
P = 3


class Nothing(AttentionEdit):
    """Looks and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return key, value


class Prefix(AttentionEdit):
    """Learned keys and values [Hkv, P, D] in front."""

    def __init__(self, sizes: Heads, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.key = nn.Parameter(torch.randn(sizes.kv_heads, P, sizes.head_dim, generator=generator))
        self.value = nn.Parameter(torch.randn(sizes.kv_heads, P, sizes.value_dim, generator=generator))

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch = key.shape[0]
        return (
            torch.cat((self.key.to(key.dtype).expand(batch, -1, -1, -1), key), 2),
            torch.cat((self.value.to(value.dtype).expand(batch, -1, -1, -1), value), 2),
        )


class SilenceHead(AttentionEdit):
    def __init__(self, head: int) -> None:
        super().__init__()
        self.head = head

    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        out = out.clone()
        out[:, :, self.head] = 0
        return out


class WrittenOut(AttentionEdit):
    """softmax(scaling q k^T + mask) v."""

    def replace(self, query, key, value, mask, scaling, attend):  # type: ignore[no-untyped-def]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling  # [B, H, Q, K]
        if mask is None and self.causal and query.shape[2] > 1:
            mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
                if mask.dtype == torch.bool
                else scores + mask
            )
        return (scores.softmax(-1) @ value).transpose(1, 2)

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal


class Delegate(AttentionEdit):
    def replace(self, query, key, value, mask, scaling, attend):  # type: ignore[no-untyped-def]
        return attend(query, key, value, mask)


def view_of(model: PreTrainedModel, *, owner: str = "one", rank: int = 0) -> ModelView:
    return ModelView(Anatomy(model), Ledger(model), Owner(owner, rank))


def prefixed(model: PreTrainedModel, *, shift: bool = True) -> tuple[ModelView, list[Prefix]]:
    view = view_of(model)
    sites = view.attention_sites()
    prefixes = [Prefix(view.main.by_layer[site.layer or 0], seed=i) for i, site in enumerate(sites)]
    for site, prefix in zip(sites, prefixes, strict=True):
        view.attend(site, prefix)
    if shift:
        view.shift_positions(P)
    return view, prefixes


def run(model: PreTrainedModel, padding: Padding = None) -> Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(model, padding=padding))


@pytest.mark.parametrize("arch", DISPATCHING)
def test_an_edit_that_does_nothing_changes_no_bit(arch: str) -> None:
    model = tiny(arch)
    own = model.config._attn_implementation
    paddings: tuple[Padding, ...] = (None,) if arch in ("vit", "whisper") else (None, "left", "right")
    before = {padding: run(model, padding) for padding in paddings}
    view = view_of(model)
    edits = []
    for tower, facts in view.towers.items():
        for role in ("attention", "cross_attention") if facts.cross_attention else ("attention",):
            for site in view.attention_sites(tower=tower, role=role):
                edits.append((tower, Nothing()))
                view.attend(site, edits[-1][1])
    for padding in paddings:
        assert torch.equal(run(model, padding), before[padding])
    for tower, edit in edits:
        assert edit.calls == (0 if arch == "llava" and tower == "vision" else len(paddings)), tower
    view._ledger.remove("one")
    assert model.config._attn_implementation == own
    assert not any("peftx" in name for name, _ in model.named_modules())
    for padding in paddings:
        assert torch.equal(run(model, padding), before[padding])


@pytest.mark.parametrize("arch", SILENT)
def test_models_that_do_not_dispatch_say_so(arch: str) -> None:
    model = tiny(arch)
    before = run(model)
    view = view_of(model)
    if arch == "mamba":
        with pytest.raises(ArchitectureError, match="no attention"):
            view.attention_sites()
        return
    with pytest.raises(ArchitectureError, match="by name"):
        view.attend(view.attention_sites()[0], Nothing())
    assert torch.equal(run(model), before)


def test_a_tower_that_does_not_dispatch_says_so() -> None:
    """The model as a whole takes the name; its text tower (GPT-J) never looks."""
    sizes = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "vocab_size": 320,
        "model_type": "gptj",
    }
    sizes |= {"bos_token_id": 0, "eos_token_id": 1}
    model = tiny("llava", text_config=sizes | {"hidden_size": 32})
    module = model.model.language_model.h[0].attn
    from peftx.kernel import attention

    with pytest.raises(ArchitectureError, match="by name"):
        attention.attach(model, module, Nothing(), owner="one", rank=0)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_prefix_equals_a_filled_cache(arch: str, padding: Padding) -> None:
    """Keys and values in front, positions from P: what the model computes with a cache that holds them."""
    model = tiny(arch)
    inputs = example_inputs(model, padding=padding)
    reference = copy.deepcopy(model)
    _, prefixes = prefixed(model)
    batch = inputs["input_ids"].shape[0]
    cache = DynamicCache(
        [(p.key.expand(batch, -1, -1, -1), p.value.expand(batch, -1, -1, -1)) for p in prefixes]
    )
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + P
    with torch.no_grad():
        expected = reference(
            input_ids=inputs["input_ids"],
            attention_mask=nn.functional.pad(mask, (P, 0), value=1),
            position_ids=positions,
            past_key_values=cache,
        ).logits
        actual = model(**inputs).logits
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actual[real], reference(**inputs).logits[real], atol=1e-2)


@pytest.mark.parametrize("arch", DECODERS)
def test_padding_does_not_matter_with_a_prefix(arch: str) -> None:
    model = tiny(arch)
    prefixed(model)
    whole = example_inputs(model, length=6)["input_ids"]
    pads = torch.full((2, 3), PAD)
    ones, zeros = torch.ones_like(whole), torch.zeros_like(pads)
    with torch.no_grad():
        plain = model(input_ids=whole).logits
        masked = model(input_ids=whole, attention_mask=ones).logits
        left = model(input_ids=torch.cat((pads, whole), 1), attention_mask=torch.cat((zeros, ones), 1)).logits
        right = model(
            input_ids=torch.cat((whole, pads), 1), attention_mask=torch.cat((ones, zeros), 1)
        ).logits
    assert torch.equal(plain, masked)
    torch.testing.assert_close(left[:, 3:], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right[:, :6], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing(arch: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny(arch)
        _, prefixes = prefixed(model)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = example_inputs(model, padding="left")
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append([p.key.grad for p in prefixes] + [p.value.grad for p in prefixes])
    assert all(g.abs().sum() > 0 for g in grads[0])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Six new tokens and their logits [steps, rows, vocabulary]."""
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    out = model.generate(**inputs, **fixed, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, -6:], torch.stack(out.logits)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gemma3", "opt", "gpt_neox", "t5", "bart"])
def test_cached_generation_is_uncached_generation(arch: str) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding="left", length=5)
    inputs.pop("decoder_input_ids", None)
    _, without = generated(model, inputs)
    prefixed(model, shift=arch not in ("t5", "bart"))
    _, logits = generated(model, inputs)
    assert not torch.allclose(logits, without, atol=1e-2)
    for options in ({}, {"num_beams": 3}):
        cached = generated(model, inputs, **options)
        plain = generated(model, inputs, use_cache=False, **options)
        assert torch.equal(cached[0], plain[0])
        torch.testing.assert_close(cached[1], plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_static_cache(arch: str) -> None:
    """Its empty places behind the prompt are not seen, though the model gives no mask for them."""
    model = tiny(arch)
    prefixed(model)
    inputs = example_inputs(model, length=5)
    dynamic = generated(model, inputs)
    static = generated(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static[0], dynamic[0])
    torch.testing.assert_close(static[1], dynamic[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart", "clip", "gemma3", "vit"])
@pytest.mark.parametrize("prefix", [False, True])
def test_replacement_sees_what_the_model_sees(arch: str, prefix: bool) -> None:
    """The formula written out equals the model's own function: masks, causality, GQA and T5's position bias."""
    model = tiny(arch)
    view = view_of(model)
    ledger = view._ledger
    other = ModelView(view.anatomy, ledger, Owner("two", 1))
    paddings: tuple[Padding, ...] = (None,) if arch == "vit" else (None, "left", "right")
    for tower, facts in view.towers.items():
        for role in ("attention", "cross_attention") if facts.cross_attention else ("attention",):
            for i, site in enumerate(view.attention_sites(tower=tower, role=role)):
                if prefix:
                    view.attend(site, Prefix(facts.by_layer[i], seed=i))
                else:
                    view.attend(site, Nothing())
    expected = {padding: run(model, padding) for padding in paddings}
    for tower, facts in view.towers.items():
        for role in ("attention", "cross_attention") if facts.cross_attention else ("attention",):
            for site in other.attention_sites(tower=tower, role=role):
                causal = role == "attention" and tower in ("decoder", "text")
                other.attend(site, WrittenOut(causal=causal))
    for padding in paddings:
        mask = example_inputs(model, padding=padding).get("attention_mask")
        actual, wanted = run(model, padding), expected[padding]
        if arch in ("t5", "bart") or mask is None or arch == "clip":
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
        else:  # rows of pads may have nothing to attend to
            torch.testing.assert_close(actual[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    ledger.remove("two")
    for site in other.attention_sites():
        other.attend(site, Delegate())
    for padding in paddings:
        torch.testing.assert_close(run(model, padding), expected[padding], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "path"), [("llama", "self_attn.o_proj"), ("bert", "attention.output.dense")]
)
def test_a_silenced_head_is_its_columns_of_the_output_projection(arch: str, path: str) -> None:
    model = tiny(arch)
    view = view_of(model)
    by_hand = copy.deepcopy(model)
    for site in view.attention_sites():
        view.attend(site, SilenceHead(1))
    for name, module in by_hand.named_modules():
        if name.endswith(path):
            module.weight.data[:, 8:16] = 0
    torch.testing.assert_close(run(model), run(by_hand), rtol=1e-5, atol=1e-5)


def test_prefix_in_cross_attention() -> None:
    """Rows in front of the encoder's output, seen by the decoder: equal to rows that the projections would make."""
    model = tiny("bart")
    view = view_of(model)
    prefixes = []
    for i, site in enumerate(view.attention_sites(role="cross_attention")):
        prefixes.append(Prefix(view.main.by_layer[i], seed=i))
        view.attend(site, prefixes[-1])
    before = run(tiny("bart"), "right")
    after = run(model, "right")
    assert not torch.allclose(after, before, atol=1e-3)
    inputs = example_inputs(model, padding="right")
    output_of(model, inputs).square().sum().backward()
    assert all(p.key.grad.abs().sum() > 0 for p in prefixes)


def test_two_replacements_are_refused() -> None:
    model = tiny("llama")
    ledger = Ledger(model)
    one, two = (ModelView(Anatomy(model), ledger, Owner(owner, i)) for i, owner in enumerate(("one", "two")))
    one.attend(one.attention_sites()[0], Delegate())
    expected = run(model)
    with pytest.raises(ConflictError, match="both replace"):
        two.attend(two.attention_sites()[0], Delegate())
    two.attend(two.attention_sites()[1], Delegate())  # another layer
    torch.testing.assert_close(run(model), expected)


def test_prefixes_of_two_plugins_and_switching_off() -> None:
    model = tiny("llama")
    ledger = Ledger(model)
    base = run(model)
    views = [ModelView(Anatomy(model), ledger, Owner(owner, i)) for i, owner in enumerate(("one", "two"))]
    outputs = {}
    for seed, view in enumerate(views):
        for site in view.attention_sites():
            view.attend(site, Prefix(view.main.by_layer[0], seed=seed))
        outputs[view.owner] = run(model)
    ledger.switch("two", False)
    assert torch.equal(run(model), outputs["one"])
    ledger.switch("one", False)
    assert torch.equal(run(model), base)
    ledger.switch("one", True)
    ledger.switch("two", True)
    assert torch.equal(run(model), outputs["two"])
    ledger.remove("one")
    ledger.remove("two")
    assert torch.equal(run(model), base)
    assert model.config._attn_implementation == "sdpa"


def test_deepcopy_is_independent() -> None:
    model = tiny("llama")
    _, prefixes = prefixed(model)
    before = run(model)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied), before)
    with torch.no_grad():
        for prefix in prefixes:
            prefix.value.zero_()
    assert torch.equal(run(copied), before)
    assert not torch.equal(run(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bfloat16(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    prefixed(model)
    out = run(model, "left")
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_eager_models_keep_their_weights() -> None:
    """`output_attentions` works as before where the model's own function returns the weights."""
    model = tiny("llama", attn_implementation="eager")
    inputs = example_inputs(model)
    before = model(**inputs, output_attentions=True)
    view = view_of(model)
    for site in view.attention_sites():
        view.attend(site, Nothing())
    after = model(**inputs, output_attentions=True)
    assert torch.equal(after.logits, before.logits)
    assert len(after.attentions) == len(before.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(after.attentions, before.attentions, strict=True))


class Louder(AttentionEdit):
    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        return 1.5 * out


@pytest.mark.parametrize("arch", ["llama", "gemma4", "gemma3n"])
@torch.no_grad()
def test_logits_that_are_asked_for_alone_are_those_of_the_whole_text(arch: str) -> None:
    """Gemma 4 drops the other tokens inside, where it knows the attention by its name."""
    model = tiny(arch)
    view = view_of(model)
    for site in view.attention_sites():
        view.attend(site, Louder())
    ids = torch.arange(3, 15).reshape(2, 6)
    whole = model(ids).logits
    for last in (1, 3):
        torch.testing.assert_close(
            model(ids, logits_to_keep=last).logits, whole[:, -last:], rtol=1e-4, atol=1e-5
        )
    view._ledger.remove(view.owner)
    assert not any("_peftx_whole" in vars(module) for module in model.modules())


def test_all_attentions_of_a_model_and_the_sizes_of_their_heads() -> None:
    for arch, expected in {
        "t5": [("encoder", "attention")] * 2
        + [("decoder", "attention")] * 2
        + [("decoder", "cross_attention")] * 2,
        "llama": [("decoder", "attention")] * 2,
        "qwen3_next": [("decoder", "attention")],
    }.items():
        model = tiny(arch)
        view = ModelView(Anatomy(model), Ledger(model), Owner("one", 0))
        sites = view.attentions()
        assert [(site.tower, site.role) for site in sites] == expected
        for site in sites:
            sizes = view.heads_of(site)
            assert (sizes.heads, sizes.head_dim) == (4, 8)
