"""Anatomy: every table names what is there, each site is what its role says, and targets select what they say."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
)

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, TargetError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.anatomy.site import Site
from peftx.kernel.anatomy.table import Fused, Table, Tower
from peftx.kernel.changes import Owner
from peftx.kernel.ledger import Ledger
from peftx.kernel.slots import Delta, merge, unmerge
from peftx.kernel.targets import Targets
from peftx.kernel.view import ModelView
from peftx.testing.models import (
    ARCHITECTURES,
    CORE_ARCHITECTURES,
    example_inputs,
    output_of,
    tiny,
    tiny_tokenizer,
)
from peftx.testing.shapes import IMAGE_TOKEN, PAD, Padding

# ------------------------------------------------------------------------------------------------ what is expected
QKVO = "attention.q attention.k attention.v attention.o "
CROSS = "cross_attention.q cross_attention.k cross_attention.v cross_attention.o norm.cross_attention "
GATED = "mlp.gate mlp.up mlp.down "
PLAIN = "mlp.up mlp.down "
EXPERTS = "router experts.gate experts.up experts.down "
NORMS = "norm.attention norm.mlp "
QK = "norm.q norm.k "
POST = "norm.post_attention norm.post_mlp "
BLOCKS = "block.attention block.mlp block.layer "
ENDS = "embedding norm.final "
LLAMA = QKVO + GATED + NORMS + BLOCKS + ENDS
BERT = QKVO + PLAIN + NORMS + BLOCKS + "embedding norm.embedding "
BART = BERT + "embedding.position "
GPT = QKVO + PLAIN + BLOCKS + ENDS
SHARED = "shared_experts.gate shared_experts.up shared_experts.down "
LINEAR = "linear_attention.out linear_attention.conv norm.linear_attention block.linear_attention "
PER_LAYER = "per_layer.gate per_layer.projection norm.per_layer embedding.per_layer projector.per_layer "
VIT = QKVO + PLAIN + NORMS + BLOCKS + "norm.final embedding.patch "
WHISPER = QKVO + PLAIN + NORMS + BLOCKS + "norm.final embedding.position "


def only(layers: str, roles: str) -> str:
    """The roles, in these layers alone; without it they are in every layer."""
    return " ".join(f"{role}@{layers}" for role in roles.split()) + " "


MOE_LLAMA = QKVO + EXPERTS + NORMS + BLOCKS + ENDS
QWEN_HYBRID = (
    only("0", LINEAR)
    + only("1", QKVO + QK + "attention.gate block.attention")
    + NORMS
    + "block.mlp block.layer "
    + ENDS
)
GEMMA_PER_LAYER = (
    LLAMA.replace("attention.k attention.v ", "")
    + POST
    + PER_LAYER
    + "norm.q norm.per_layer_model "
    + only("0,1", "attention.k attention.v norm.k")
)

# Architecture -> tower -> its roles; "" is the model as a whole.
EXPECTED: dict[str, dict[str, str]] = {
    "llama": {"decoder": LLAMA, "": "head"},
    "qwen2": {"decoder": LLAMA, "": "head"},
    "qwen3": {"decoder": LLAMA + QK, "": "head"},
    "mistral": {"decoder": LLAMA, "": "head"},
    "gemma": {"decoder": LLAMA, "": "head"},
    "gemma2": {"decoder": LLAMA + POST, "": "head"},
    "gemma3": {"decoder": LLAMA + POST + QK, "": "head"},
    "mixtral": {"decoder": QKVO + EXPERTS + NORMS + BLOCKS + ENDS, "": "head"},
    "qwen3_moe": {"decoder": QKVO + EXPERTS + NORMS + QK + BLOCKS + ENDS, "": "head"},
    "olmoe": {"decoder": MOE_LLAMA + QK, "": "head"},
    "granitemoe": {"decoder": MOE_LLAMA, "": "head"},
    "phimoe": {"decoder": MOE_LLAMA, "": "head"},
    "gpt_oss": {"decoder": MOE_LLAMA, "": "head"},
    "deepseek_v3": {
        "decoder": "attention.q_a attention.q_b attention.kv_a attention.kv_b attention.o norm.q_a norm.kv_a "
        + only("0", GATED)
        + only("1", EXPERTS + SHARED)
        + NORMS
        + BLOCKS
        + ENDS,
        "": "head",
    },
    "llama4": {
        "decoder": QKVO + only("0", GATED) + only("1", EXPERTS + SHARED) + NORMS + BLOCKS + ENDS,
        "": "head",
    },
    "qwen3_next": {
        "decoder": QWEN_HYBRID
        + only("0", GATED + "linear_attention.qkvz linear_attention.ba")
        + only("1", EXPERTS + SHARED + "router.shared"),
        "": "head",
    },
    "qwen3_5": {
        "decoder": QWEN_HYBRID
        + GATED
        + only("0", "linear_attention.qkv linear_attention.z linear_attention.b linear_attention.a"),
        "": "head",
    },
    "qwen3_5_moe": {
        "decoder": QWEN_HYBRID
        + EXPERTS
        + SHARED
        + "router.shared "
        + only("0", "linear_attention.qkv linear_attention.z linear_attention.b linear_attention.a"),
        "": "head",
    },
    "gemma3n": {
        "decoder": GEMMA_PER_LAYER
        + "laurel.left laurel.right norm.laurel altup.router altup.predict altup.correct norm.altup "
        + "projector.altup.0 projector.altup_unembed.0",
        "": "head",
    },
    "gemma4": {
        "decoder": GEMMA_PER_LAYER + EXPERTS + "norm.dense norm.experts norm.post_experts",
        "": "head",
    },
    "glm4": {"decoder": LLAMA + POST, "": "head"},
    "phi3": {"decoder": LLAMA, "": "head"},
    "gpt2": {"decoder": GPT + NORMS + "embedding.position", "": "head"},
    "gpt_neox": {"decoder": GPT + NORMS, "": "head"},
    "gptj": {"decoder": GPT + "norm.attention", "": "head"},
    "opt": {"decoder": GPT + NORMS + "embedding.position", "": "head"},
    "bloom": {"decoder": GPT + NORMS + "norm.embedding", "": "head"},
    "mamba": {
        "decoder": "ssm.in ssm.x ssm.dt ssm.out ssm.conv norm.ssm block.ssm block.layer " + ENDS,
        "": "head",
    },
    "bert": {"encoder": BERT + "embedding.position embedding.type", "": "head head.dense norm.head"},
    "roberta": {"encoder": BERT + "embedding.position embedding.type", "": "head head.dense norm.head"},
    "deberta_v2": {"encoder": BERT + "embedding.relative norm.relative", "": "head head.dense norm.head"},
    "t5": {
        "encoder": LLAMA + "embedding.relative",
        "decoder": LLAMA + CROSS + "embedding.relative block.cross_attention",
        "": "head",
    },
    "bart": {"encoder": BART, "decoder": BART + CROSS + "block.cross_attention", "": "head"},
    "whisper": {
        "encoder": WHISPER + "embedding.patch embedding.patch.second",
        "decoder": WHISPER + CROSS + "embedding block.cross_attention",
        "": "head",
    },
    "vit": {"vision": VIT, "": "classifier"},
    "clip": {
        "text": QKVO + PLAIN + NORMS + BLOCKS + ENDS + "embedding.position",
        "vision": VIT + "embedding.position norm.embedding",
        "": "projector.text projector.vision",
    },
    "llava": {
        "decoder": LLAMA,
        "vision": VIT + "embedding.position norm.embedding",
        "": "head projector.up projector.down",
    },
}

LAYERS = {"gemma3n": 3, "gemma4": 3}
"""Where they are not two."""

# Sizes of the heads where they are not 4 query heads of 8 out of 32: (heads, key-value heads, head size).
GQA = (4, 2, 8)
HEADS = {
    **{(arch, "decoder"): GQA for arch in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")},
    **{(arch, "decoder"): GQA for arch in ("mixtral", "qwen3_moe", "llava")},
    **{
        (arch, "decoder"): GQA
        for arch in ("olmoe", "granitemoe", "phimoe", "gpt_oss", "llama4", "gemma3n", "glm4")
    },
    **{(arch, "decoder"): GQA for arch in ("qwen3_next", "qwen3_5", "qwen3_5_moe")},
    ("deepseek_v3", "decoder"): (4, 4, 12),
    ("gemma", "decoder"): (4, 2, 16),
    ("mamba", "decoder"): (0, 0, 0),
    **{(arch, "decoder"): (2, 2, 16) for arch in ("bart", "whisper")},
    **{(arch, "vision"): (2, 2, 16) for arch in ("vit", "clip", "llava")},
}

# Raw names of some roles, independent of the tables; fused and stacked ones are cut out by hand below.
RAW = {
    "attention.v": {
        "default": r"self_attn\.v_proj$",
        "phi3": r"qkv_proj$",
        "gpt2": r"c_attn$",
        "gpt_neox": r"query_key_value$",
        "bloom": r"query_key_value$",
        "gptj": r"attn\.v_proj$",
        "bert": r"self\.value$",
        "roberta": r"self\.value$",
        "deberta_v2": r"self\.value_proj$",
        "t5": r"SelfAttention\.v$",
        "vit": r"attention\.v_proj$",
    },
    "attention.o": {
        "default": r"self_attn\.(o_proj|out_proj)$",
        "gpt2": r"attn\.c_proj$",
        "gpt_neox": r"attention\.dense$",
        "bloom": r"self_attention\.dense$",
        "gptj": r"attn\.out_proj$",
        "bert": r"attention\.output\.dense$",
        "roberta": r"attention\.output\.dense$",
        "deberta_v2": r"attention\.output\.dense$",
        "t5": r"SelfAttention\.o$",
        "vit": r"attention\.o_proj$",
    },
    "mlp.down": {
        "default": r"(mlp\.down_proj|fc2)$",
        "llama4": r"feed_forward\.down_proj$",
        "gpt2": r"mlp\.c_proj$",
        "gpt_neox": r"4h_to_h$",
        "bloom": r"4h_to_h$",
        "gptj": r"fc_out$",
        "bert": r"layer\.\d+\.output\.dense$",
        "roberta": r"layer\.\d+\.output\.dense$",
        "deberta_v2": r"layer\.\d+\.output\.dense$",
        "t5": r"DenseReluDense\.wo$",
    },
    "experts.down": {"default": r"\.experts$"},
    "shared_experts.down": {"default": r"shared_experts?\.down_proj$"},
    "router.shared": {"default": r"shared_expert_gate$"},
    "attention.q_b": {"default": r"q_b_proj$"},
    "attention.kv_a": {"default": r"kv_a_proj_with_mqa$"},
    "attention.gate": {"default": r"self_attn\.q_proj$"},
    "linear_attention.out": {"default": r"linear_attn\.out_proj$"},
    "per_layer.gate": {"default": r"per_layer_input_gate$"},
    "laurel.right": {"default": r"laurel\.linear_right$"},
    "altup.predict": {"default": r"altup\.prediction_coefs$"},
    "altup.correct": {"default": r"altup\.correction_coefs$"},
}


def has(arch: str, role: str) -> bool:
    """Does the architecture's language have it."""
    towers = EXPECTED[arch]
    return role in _with_layers(towers.get("decoder") or towers.get("encoder") or next(iter(towers.values())))


def _with_layers(roles: str) -> dict[str, list[int]]:
    """Role -> the layers that alone have it, as `only` wrote them; empty: all."""
    pairs = (word.partition("@") for word in roles.split())
    return {role: [int(i) for i in layers.split(",") if i] for role, _, layers in pairs}


MOE = tuple(arch for arch in ARCHITECTURES if has(arch, "experts.down"))
TRANSPOSED = ("gpt_oss", "llama4")
"""Their experts' matrices are stored [in, out]."""


# --------------------------------------------------------------------------------------------------------- helpers
class Gain(Delta):
    """y * z with z near one."""

    def __init__(self, size: int, *, batch: tuple[int, ...] = (), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.z = nn.Parameter(0.5 + torch.rand(*batch, size, generator=generator))  # [..., out]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.z

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z[..., None], None if bias is None else bias * self.z


class Zero(Delta):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * 0

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * 0, None if bias is None else bias * 0


@cache
def shared(arch: str) -> Anatomy:
    """For tests that change nothing."""
    return Anatomy(tiny(arch))


def view_of(model: PreTrainedModel, *, owner: str = "one", rank: int = 0) -> ModelView:
    return ModelView(Anatomy(model), Ledger(model), Owner(owner, rank))


def run(model: PreTrainedModel, *, padding: Padding = None) -> Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(model, padding=padding))


def modules_of(sites: Iterable[Site]) -> list[nn.Module]:
    return list({id(site.module): site.module for site in sites}.values())


def text_of(call: Callable[[], object], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- tables
def test_every_tiny_model_has_an_expectation() -> None:
    assert set(EXPECTED) == set(ARCHITECTURES)
    assert len(ARCHITECTURES) == 37


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_roles(arch: str) -> None:
    anatomy = shared(arch)
    assert not anatomy.inferred
    found: dict[str, dict[str, list[int | None]]] = {}
    for site in anatomy:
        found.setdefault(site.tower, {}).setdefault(site.role, []).append(site.layer)
    expected = {tower: _with_layers(roles) for tower, roles in EXPECTED[arch].items()}
    assert {tower: set(roles) for tower, roles in found.items()} == {t: set(r) for t, r in expected.items()}
    assert set(anatomy.towers) == set(found) - {""}
    for name, facts in anatomy.towers.items():
        assert facts.layers == LAYERS.get(arch, 2)
        for role, layers in found[name].items():
            inside = layers != [None] and role not in ("embedding.relative",)
            every = list(range(facts.layers)) if inside else layers[:1]
            assert layers == (expected[name][role] or every), role


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sites_cover_every_matrix_once(arch: str) -> None:
    """Each parameter of the model's matrices belongs to exactly one role: rows add up, no overlap, nothing is left."""
    anatomy = shared(arch)
    rows: dict[tuple[int, str], Tensor] = {}
    for site in anatomy:
        if (
            site.kind == "block"
            or not site.shape
            or len(site.shape) < 2
            or site.kind in ("embedding", "convolution")
        ):
            continue
        parameter = site.module._parameters[site.parameter]
        total = site.rows.total if site.rows is not None else site.out_features
        counts = rows.setdefault((id(parameter), site.parameter), torch.zeros(total, dtype=torch.int))
        own = torch.arange(total) if site.rows is None else site.rows.take(torch.arange(total))
        assert len(own) == site.out_features, site
        counts[own] += 1
        assert site.weight.shape == site.shape
        assert site.weight.numel() == parameter.numel() * site.out_features // total
    for counts in rows.values():
        assert counts.tolist() == [1] * len(counts)
    covered = {key[0] for key in rows} | {
        id(p)
        for s in anatomy
        if s.kind in ("embedding", "convolution", "norm")
        for p in s.module._parameters.values()
    }
    loose = {
        name
        for name, p in anatomy.model.named_parameters()
        if id(p) not in covered and not name.endswith("bias")
    }
    own = r"A_log$|\.D$|class_embedding$|cls_token$|position_embeddings$|sinks$|scale$"  # no layer at all
    assert {name for name in loose if not re.search(own, name)} == set()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes(arch: str) -> None:
    anatomy = shared(arch)
    for name, facts in anatomy.towers.items():
        assert facts.hidden_size == 32
        if arch != "gemma4":
            heads = (facts.heads, facts.kv_heads, facts.head_dim)
            assert heads == HEADS.get((arch, name), (4, 4, 8))
        for site in anatomy:
            if site.tower != name or site.layer is None:
                continue
            sizes = facts.by_layer[site.layer] if arch == "gemma4" else facts
            width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
            if site.role in ("attention.q", "attention.gate", "cross_attention.q"):
                assert (site.out_features, site.in_features) == (width, 32)
            elif site.role == "attention.q_b":
                assert site.out_features == width
            elif site.role in ("attention.k", "attention.v", "cross_attention.k", "cross_attention.v"):
                assert (site.out_features, site.in_features) == (kv_width, 32)
            elif site.role in ("attention.o", "cross_attention.o"):
                values = 4 * 8 if arch == "deepseek_v3" else width  # there, values are narrower than keys
                assert (site.out_features, site.in_features) == (32, values)
            elif site.role in ("mlp.gate", "mlp.up"):
                assert site.in_features == 32
            elif site.role == "mlp.down":
                assert site.out_features == 32
            elif site.role == "router":
                assert site.shape == (4, 32)
            elif site.role in ("experts.gate", "experts.up"):
                assert site.batch == (4,)
                assert site.in_features == 32
            elif site.role == "experts.down":
                assert site.batch == (4,)
                assert site.out_features == 32
        embeddings = [s for s in anatomy if s.tower == name and s.role == "embedding"]
        assert all(site.out_features == 32 for site in embeddings)
        if facts.heads:
            assert facts.groups == facts.heads // facts.kv_heads
            assert len(facts.attention) == facts.layers
    assert (len(anatomy.main.cross_attention) == 2) == anatomy.is_encoder_decoder


def zero_by_hand(model: PreTrainedModel, arch: str, role: str) -> None:
    """Zero the rows of `role` in every layer, found by raw names and cut out by index arithmetic."""
    pattern = RAW[role].get(arch, RAW[role]["default"])
    hits = [module for name, module in model.named_modules() if re.search(pattern, name)]
    assert hits
    with torch.no_grad():
        for module in hits:
            parts = list(module.parameters(recurse=False))
            if role == "experts.down":
                for name, p in module.named_parameters():
                    if name.startswith("down_proj"):
                        p.zero_()
            elif role == "attention.gate":  # [head, (q, gate), 8, in]
                module.weight.view(4, 2, 8, 32)[:, 1] = 0
            elif role == "attention.v" and arch == "gpt2":  # [in, q | k | v]
                for p in parts:
                    p[..., 64:96] = 0
            elif role == "attention.v" and arch == "phi3":  # [q: 32 | k: 16 | v: 16, in]
                module.weight[48:64] = 0
            elif role == "attention.v" and arch in ("gpt_neox", "bloom"):  # [head, (q, k, v), 8, ...]
                for p in parts:
                    p.view(4, 3, 8, *p.shape[1:])[:, 2] = 0
            else:
                for p in parts:
                    p.zero_()


@pytest.mark.parametrize(("arch", "role"), [(a, r) for r in RAW for a in ARCHITECTURES if has(a, r)])
def test_a_site_is_what_its_role_says(arch: str, role: str) -> None:
    model = tiny(arch)
    by_hand = copy.deepcopy(model)
    zero_by_hand(by_hand, arch, role)
    before, expected = run(model, padding="right"), run(by_hand, padding="right")
    view = view_of(model)
    for site in view.linears(role):
        site.attach(Zero())
    actual = run(model, padding="right")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2  # the role does something


@pytest.mark.parametrize("arch", ["gpt2", "phi3", "gpt_neox", "bloom", "qwen3_next", "qwen3_5"])
def test_query_and_key_of_a_fused_matrix(arch: str) -> None:
    """Turning the query's sign around is turning the key's: the scores are products."""
    results = []
    for role in ("attention.q", "attention.k"):
        model = tiny(arch)
        for site in view_of(model).linears(role):
            delta = Gain(site.out_features)
            delta.z.data.fill_(-1.0)
            site.attach(delta)
        results.append(run(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], run(tiny(arch)), atol=1e-3)


@pytest.mark.parametrize("arch", ["phi3", "glm4"])
def test_gate_and_up_of_one_matrix(arch: str) -> None:
    """down(up * silu(gate)): without gate or without up there is no output of the block."""
    down = tiny(arch)
    zero_by_hand(down, arch, "mlp.down")
    for role in ("mlp.gate", "mlp.up"):
        model = tiny(arch)
        for site in view_of(model).linears(role):
            site.attach(Zero())
        torch.testing.assert_close(run(model), run(down))
    halved = {}
    for role in ("mlp.gate", "mlp.up"):
        model = tiny(arch)
        for site in view_of(model).linears(role):
            delta = Gain(site.out_features)
            delta.z.data.fill_(0.5)
            site.attach(delta)
        halved[role] = run(model)
    by_hand = tiny(arch)  # only `up` is linear in its half
    for layer in by_hand.model.layers:
        layer.mlp.down_proj.weight.data.mul_(0.5)
    torch.testing.assert_close(halved["mlp.up"], run(by_hand), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(halved["mlp.gate"], halved["mlp.up"], atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_block_output_is_what_joins_the_residual(arch: str) -> None:
    """With all blocks silenced a pre-norm layer is the identity; a post-norm layer only normalizes."""
    model = tiny(arch)
    view = view_of(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: object) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen.append((before, out[0] if isinstance(out, tuple) else out))

    post_norm = ("bert", "roberta", "deberta_v2", "bart")
    for site in view.blocks("layer"):
        site.module.register_forward_hook(watch, with_kwargs=True)
    for role in ("attention", "cross_attention", "linear_attention", "mlp", "ssm"):
        if any(site.role == f"block.{role}" for site in view.anatomy):
            for site in view.blocks(role):
                site.attach(Zero())
    run(model)
    assert seen
    for before, out in seen:
        if arch in post_norm:
            assert not torch.equal(before, out)
        elif not arch.startswith("gemma") or arch == "gemma":  # their post-norms have a zero to normalize
            torch.testing.assert_close(out, before, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attach_merge_unmerge_remove(arch: str) -> None:
    model = tiny(arch)
    before = run(model, padding="right")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]

    view = view_of(model)
    for i, site in enumerate(view.linears("all")):
        site.attach(Gain(site.out_features, batch=site.batch, seed=i))
    attached = run(model, padding="right")
    assert not torch.allclose(attached, before, atol=1e-3)
    modules = modules_of(view.linears("all"))

    for module in modules:
        merge(module, {"one"})
    merged = run(model, padding="right")
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=1e-5)
    for module in modules:
        unmerge(module)
    assert torch.equal(run(model, padding="right"), attached)

    view._ledger.remove("one")
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(run(model, padding="right"), before)


@pytest.mark.parametrize("arch", MOE)
@pytest.mark.parametrize("role", ["experts.gate", "experts.up", "experts.down", "router"])
def test_experts_one_by_one(arch: str, role: str) -> None:
    """A gain on the rows of a stacked parameter is that gain in the weights, for each expert its own."""
    model, by_hand = tiny(arch), tiny(arch)
    view = view_of(model)
    for site in view.linears(role):
        if site.role != role:
            continue  # `router.shared`
        delta = site.attach(Gain(site.out_features, batch=site.batch, seed=site.layer or 0))
        parameters = dict(by_hand.get_submodule(site.path).named_parameters())
        weight = "weight" if role == "router" else "down_proj" if role == "experts.down" else "gate_up_proj"
        bias = parameters.get("bias" if role == "router" else f"{weight}_bias")
        with torch.no_grad():
            matrix = parameters[weight]
            matrix = matrix.mT if arch in TRANSPOSED and role != "router" else matrix  # [..., out, in]
            mine = slice(None)
            if role in ("experts.gate", "experts.up"):
                first, half = role == "experts.gate", matrix.shape[-2] // 2
                mine = slice(0, half) if first else slice(half, None)
                if arch == "gpt_oss":
                    mine = slice(0, None, 2) if first else slice(1, None, 2)
            matrix[..., mine, :] *= delta.z[..., None]
            if bias is not None:
                bias[..., mine] *= delta.z
    torch.testing.assert_close(run(model), run(by_hand))
    assert not torch.allclose(run(model), run(tiny(arch)), atol=1e-4)


@pytest.mark.parametrize("arch", MOE)
def test_gradients_reach_experts(arch: str) -> None:
    model = tiny(arch)
    view = view_of(model)
    deltas = [s.attach(Gain(s.out_features, batch=s.batch)) for s in view.linears("experts router")]
    output_of(model, example_inputs(model)).square().sum().backward()
    assert all(d.z.grad is not None and d.z.grad.abs().sum() > 0 for d in deltas)


def test_a_delta_acts_where_training_reads_the_weight() -> None:
    """In training, AltUp clamps the weight of its corrections and uses it without a call."""
    model = tiny("gemma3n")
    before = run(model)
    for site in view_of(model).linears("altup.correct"):
        site.attach(Gain(site.out_features, seed=site.layer or 0))
    evaluated = run(model)
    assert not torch.allclose(evaluated, before, atol=1e-3)
    torch.testing.assert_close(run(model.train()), evaluated, rtol=1e-5, atol=1e-5)


VARIANTS = {
    "llama": ("base", "classification", "token-classification", "question-answering"),
    "qwen2": ("base", "classification"),
    "gpt2": ("base", "classification", "token-classification", "question-answering"),
    "gpt_neox": ("base", "classification"),
    "opt": ("base", "classification", "question-answering"),
    "mamba": ("base",),
    "bert": ("base", "classification", "token-classification", "question-answering"),
    "roberta": ("base", "classification", "token-classification", "question-answering"),
    "deberta_v2": ("base", "classification"),
    "t5": ("base", "classification", "token-classification", "question-answering"),
    "bart": ("base", "classification", "question-answering"),
    "olmoe": ("base",),
    "granitemoe": ("base",),
    "phimoe": ("base", "classification"),
    "gpt_oss": ("base", "classification", "token-classification"),
    "deepseek_v3": ("base", "classification", "token-classification"),
    "llama4": ("base",),
    "qwen3_next": ("base", "classification", "token-classification", "question-answering"),
    "qwen3_5": ("base", "classification"),
    "qwen3_5_moe": ("base",),
    "gemma3n": ("base",),
    "gemma4": ("base",),
    "glm4": ("base", "classification", "token-classification"),
    "whisper": ("base",),
    "vit": ("base",),
    "llava": ("base",),
}


@pytest.mark.parametrize(("arch", "head"), [(a, h) for a, heads in VARIANTS.items() for h in heads])
def test_other_heads(arch: str, head: str) -> None:
    """The layers have the same roles whatever stands on them; a classifier is one."""
    anatomy = Anatomy(tiny(arch, head=head))
    assert not anatomy.inferred
    usual = {(s.role, s.tower, s.layer) for s in shared(arch) if s.layer is not None}
    if (arch, head) == ("t5", "token-classification"):  # has no decoder
        usual = {place for place in usual if place[1] == "encoder"}
    assert {(s.role, s.tower, s.layer) for s in anatomy if s.layer is not None} == usual
    outside = {s.role for s in anatomy if not s.tower}
    assert ("classifier" in outside) == (head != "base")
    assert "head" not in outside
    assert not any(role.startswith("other") for role in outside)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_embedding_is_the_one_that_runs(arch: str) -> None:
    """T5 and BART have an embedding that holds the weight and is never called."""
    if arch == "vit":
        assert "no token embedding" in text_of(lambda: view_of(tiny(arch)).embedding(), ArchitectureError)
        return
    model = tiny(arch)
    before = run(model)
    view_of(model).embedding().attach(Zero())
    assert not torch.allclose(run(model), before, atol=1e-3)


def test_llava_vision_reaches_the_text() -> None:
    """The vision tower's sites are those that an image goes through."""
    model = tiny("llava")
    inputs = example_inputs(model)
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN  # 2 x 2 patches
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = output_of(model, inputs)
        view = view_of(model)
        for site in view.linears("attention.v tower=vision"):
            assert "vision_tower" in site.path
            site.attach(Zero())
        assert not torch.allclose(output_of(model, inputs), before, atol=1e-3)
        view._ledger.remove("one")
        assert torch.equal(output_of(model, inputs), before)


def test_gemma3_with_images() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=sizes
        | {"vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=sizes | {"image_size": 16, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
    )
    anatomy = Anatomy(Gemma3ForConditionalGeneration(config))
    assert not anatomy.inferred
    found = {(s.tower, s.role) for s in anatomy}
    text = {("decoder", role) for role in EXPECTED["gemma3"]["decoder"].split()}
    vision = {("vision", role) for role in (VIT + "embedding.position").split()}
    assert found == text | vision | {("", "head"), ("", "norm.projector")}
    assert (anatomy.main.heads, anatomy.main.kv_heads, anatomy.main.head_dim) == GQA
    assert anatomy.towers["vision"].heads == 4


_EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}
_QWEN_EYE = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 8}
_QWEN_EYE |= {"out_hidden_size": 32, "num_position_embeddings": 16}
_EAR = {"hidden_size": 32}
CONFORMER = (
    QKVO
    + "attention.position_k norm.attention norm.post_attention norm.layer block.layer "
    + "mlp.before_up mlp.before_down norm.mlp_before norm.post_mlp_before "
    + "mlp.after_up mlp.after_down norm.mlp_after norm.post_mlp_after "
    + "convolution.in convolution.depthwise convolution.out norm.convolution norm.depthwise "
    + "embedding.patch embedding.patch.second norm.patch norm.patch.second projector.in "
)

# Architecture that sees or hears -> its tiny text, class, configurations of the other towers, roles beside the text's.
SENSES: dict[str, tuple[str, str, dict[str, dict[str, object]], dict[str, str]]] = {
    "llama4": (
        "llama4",
        "Llama4",
        {
            "vision_config": _EYE
            | {"image_size": 16, "intermediate_size": 128, "vision_output_dim": 32}
            | {"projector_input_dim": 32, "projector_output_dim": 32},
        },
        {
            "vision": VIT + "norm.embedding",
            "": "head projector projector.adapter_up projector.adapter_down",
        },
    ),
    "qwen3_5": (
        "qwen3_5",
        "Qwen3_5",
        {"vision_config": _QWEN_EYE},
        {
            "vision": VIT.replace("norm.final ", "embedding.position "),
            "": "head projector.up projector.down norm.projector",
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        "Qwen3_5Moe",
        {"vision_config": _QWEN_EYE},
        {
            "vision": VIT.replace("norm.final ", "embedding.position "),
            "": "head projector.up projector.down norm.projector",
        },
    ),
    "gemma3n": (
        "gemma3n",
        "Gemma3n",
        {
            "audio_config": _EAR
            | {"conf_num_attention_heads": 4, "conf_num_hidden_layers": 2, "input_feat_size": 16}
            | {"sscp_conv_channel_size": [4, 4]},
        },
        {
            "audio": CONFORMER,
            "": "head embedding.vision projector.vision norm.hard.vision norm.soft.vision "
            "embedding.audio projector.audio norm.hard.audio norm.soft.audio",
        },
    ),
    "gemma4": (
        "gemma4",
        "Gemma4",
        {
            "vision_config": _EYE | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
            "audio_config": _EAR
            | {"num_attention_heads": 4, "num_hidden_layers": 2}
            | {"subsampling_conv_channels": [4, 4], "output_proj_dims": 32},
        },
        {
            "vision": LLAMA.removesuffix(ENDS) + POST + QK + "embedding.patch",
            "audio": CONFORMER + "projector.out",
            "": "head projector.vision projector.audio",
        },
    ),
}


@pytest.mark.parametrize("arch", SENSES)
def test_models_that_see_and_hear(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text tower is that of the text-only model; each other tower has its roles, and nothing is left out."""
    text, name, configs, expected = SENSES[arch]
    if arch == "gemma3n":  # its images go through a convolutional network of timm's
        from transformers.models.gemma3n import modeling_gemma3n

        make = modeling_gemma3n.AutoModel.from_config
        monkeypatch.setattr(
            modeling_gemma3n.AutoModel,
            "from_config",
            lambda config: nn.Identity() if config.model_type == "gemma3n_vision" else make(config),
        )
    config = getattr(transformers, f"{name}Config")(text_config=tiny(text).config.to_dict(), **configs)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    anatomy = Anatomy(model)
    assert not anatomy.inferred
    assert anatomy.main is anatomy.towers["decoder"]
    if eyes := anatomy.towers.get("vision"):
        assert (eyes.layers, eyes.heads, eyes.kv_heads, eyes.head_dim) == (2, 2, 2, 16)
    found: dict[str, set[str]] = {}
    for site in anatomy:
        found.setdefault(site.tower, set()).add(site.role)
    expected = {"decoder": EXPECTED[text]["decoder"]} | expected
    assert found == {tower: set(_with_layers(roles)) for tower, roles in expected.items()}
    assert lacks(anatomy) == set()
    before = run(model)
    for site in view_of(model).linears("attention.o tower=decoder"):
        site.attach(Zero())
    assert not torch.allclose(run(model), before, atol=1e-3)


def lacks(anatomy: Anatomy) -> set[str]:
    """Linear layers and stacked experts inside the towers' layers that have no role."""
    layers = [site.module for site in anatomy if site.role == "block.layer"]
    inside = {id(module) for layer in layers for module in layer.modules()}
    named = {(id(site.module), site.parameter) for site in anatomy if site.layer is not None}
    return {
        f"{path}.{name}"
        for path, module in anatomy.model.named_modules()
        if id(module) in inside
        for name, parameter in module.named_parameters(recurse=False)
        if (isinstance(module, nn.Linear) and name == "weight") or parameter.ndim == 3
        if (id(module), name) not in named and not isinstance(module, nn.Conv1d)
    }


@pytest.mark.parametrize(
    ("arch", "options", "there", "gone"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp.gate@0 experts.up@1 router@1", ""),
        ("deepseek_v3", {"q_lora_rank": None}, "attention.q", "attention.q_a attention.q_b norm.q_a"),
        ("llama4", {"interleave_moe_layer_step": 1}, "router experts.down shared_experts.up", "mlp.down"),
        ("qwen3_next", {"layer_types": 2 * ["full_attention"]}, "attention.gate", "linear_attention.out"),
        ("gemma4", {"attention_k_eq_v": True}, "attention.k@0,1 attention.v@0", ""),
        ("gemma4", {"hidden_size_per_layer_input": 0}, "router", "per_layer.gate embedding.per_layer"),
        ("gemma4", {"enable_moe_block": False}, "mlp.down", "router experts.down norm.experts"),
    ],
)
def test_variants(arch: str, options: dict[str, object], there: str, gone: str) -> None:
    """Other released configurations: what stands elsewhere, and what is not there."""
    anatomy = Anatomy(tiny(arch, **options))
    assert not anatomy.inferred
    assert lacks(anatomy) == set()
    for role, layers in _with_layers(there).items():
        assert [s.layer for s in anatomy if s.role == role] == (layers or list(range(anatomy.num_layers)))
    assert not {site.role for site in anatomy} & set(gone.split())


def test_a_table_that_names_what_is_not_there() -> None:
    table = Table("llama", (Tower("decoder", "model.layers", {"attention.q": "self_attn.q_pro"}),))
    message = text_of(lambda: Anatomy(tiny("llama"), table), ArchitectureError)
    assert "model.layers.0.self_attn.q_pro" in message
    assert "LlamaForCausalLM" in message
    wrong = Table("llama", (Tower("decoder", "model.norm"),))
    assert "not the list of layers" in text_of(lambda: Anatomy(tiny("llama"), wrong), ArchitectureError)
    fused = Table(
        "phi3",
        (
            Tower(
                "decoder",
                "model.layers",
                fused=(Fused("self_attn.o_proj", ("attention.q", "attention.k", "attention.v")),),
                blocks={"attention": "self_attn"},
            ),
        ),
    )
    assert "[32, 16, 16]" in text_of(lambda: Anatomy(tiny("phi3"), fused), ArchitectureError)


def test_site_asks_for_one() -> None:
    anatomy = shared("llama")
    assert anatomy.site("attention.q", layer=1).path == "model.layers.1.self_attn.q_proj"
    assert anatomy.site("head").path == "lm_head"
    assert "did you mean 'attention.q'" in text_of(lambda: anatomy.site("atention.q"), ArchitectureError)
    assert "has 2 sites" in text_of(lambda: anatomy.site("attention.q"), ArchitectureError)
    assert "in layer 7" in text_of(lambda: anatomy.site("attention.q", layer=7), ArchitectureError)


@pytest.mark.parametrize("arch", ["bert", "t5", "gpt2", "whisper", "clip"])
def test_attention_sites_are_the_modules_that_compute_it(arch: str) -> None:
    anatomy = shared(arch)
    for name, facts in anatomy.towers.items():
        for layer in range(2):
            site = anatomy.attention_site(layer, tower=name)
            assert site.path == facts.attention[layer]
            assert re.search("Attention$", type(site.module).__name__)
    assert "has no cross_attention" in text_of(
        lambda: shared("llama").attention_site(0, role="cross_attention"), ArchitectureError
    )


def test_anatomy_of_a_changed_model_is_the_old_one() -> None:
    """Deltas and kept modules are no parts of the model, linear layers inside them included."""
    model = tiny("llama")
    places = [(s.role, s.path, s.shape) for s in Anatomy(model)]
    view = view_of(model)
    for site in view.linears("all"):
        delta = Gain(site.out_features)
        delta.inner = nn.Linear(2, 2)
        site.attach(delta)
    view.keep("shared", nn.Linear(3, 3))
    assert [(s.role, s.path, s.shape) for s in Anatomy(model)] == places


# -------------------------------------------------------------------------------------------------------- adapters
GENERATING = tuple(
    a for a in ARCHITECTURES if "decoder" in EXPECTED[a] and a not in ("t5", "bart", "whisper", "llava")
)


@pytest.mark.parametrize("arch", GENERATING)
def test_lora_on_all(arch: str, tmp_path: Path) -> None:
    """Nothing at the start, then a step that tells; saved, merged and taken off to the bit."""
    from peftx_lora import Lora

    model = tiny(arch).requires_grad_(False)  # Mamba computes in another order where its weights train
    before = run(model, padding="left")
    stack = Stack(model, [Lora(rank=2)], tokenizer=TOKENIZER)
    assert torch.equal(run(model, padding="left"), before)
    inputs = example_inputs(model, padding="right")
    parameters = list(stack.ledger.parameters("lora"))
    for _ in range(2):  # the gradient of A is zero while B is
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter -= parameter.grad / (parameter.grad.abs().max() + 1e-12) / 20
                parameter.grad = None
    after = run(model, padding="left")
    assert not torch.allclose(after, before, atol=1e-2)
    assert all(parameter.abs().sum() > 0 for parameter in parameters)

    stack.save(tmp_path / "bundle")
    other = peftx.load(tmp_path / "bundle", model=tiny(arch), tokenizer=TOKENIZER)
    assert torch.equal(run(other.model, padding="left"), after)
    stack.merge()
    torch.testing.assert_close(run(model, padding="left"), after, rtol=1e-4, atol=1e-4)
    stack.unmerge()
    assert torch.equal(run(model, padding="left"), after)
    _generate_alone_and_padded(model)
    stack.remove("lora")
    assert torch.equal(run(model, padding="left"), before)


def _generate_alone_and_padded(model: PreTrainedModel) -> None:
    inputs = example_inputs(model, padding="left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    both = model.generate(**inputs, **options)
    real = inputs["attention_mask"][1].bool()
    alone = model.generate(
        input_ids=inputs["input_ids"][1:, real], attention_mask=inputs["attention_mask"][1:, real], **options
    )
    assert torch.equal(both[1, -4:], alone[0, -4:])


# ------------------------------------------------------------------------------------------------------- inference
UNKNOWN: dict[str, Callable[[], PreTrainedModel]] = {
    "stablelm": lambda: StableLmForCausalLM(
        StableLmConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
        )
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1
        )
    ),
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_architectures_are_inferred(kind: str) -> None:
    model = UNKNOWN[kind]().eval()
    view = view_of(model)
    anatomy = view.anatomy
    assert anatomy.inferred
    assert list(anatomy.towers) == ["decoder"]
    facts = anatomy.main
    assert (facts.layers, facts.hidden_size, facts.heads) == (2, 32, 4)
    roles = {s.role for s in anatomy}
    assert {"attention.o", "mlp.up", "mlp.down", "embedding", "head"} <= roles
    if kind == "stablelm":
        assert {"attention.q", "attention.k", "attention.v", "mlp.gate"} <= roles
        assert facts.kv_heads == 2
    assert len(facts.attention) == 2
    inside = [m for m in model.modules() if type(m).__name__ in ("Linear", "FalconLinear")]
    sites = view.linears("all")
    assert len({id(s.module) for s in sites}) == len(inside) - 1  # all but the head
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for i, site in enumerate(sites):
            site.attach(Gain(site.out_features, seed=i))
        attached = model(input_ids=ids).logits
        assert not torch.allclose(attached, before, atol=1e-3)
        for module in modules_of(sites):
            merge(module, {"one"})
        torch.testing.assert_close(model(input_ids=ids).logits, attached, rtol=1e-4, atol=1e-5)
        view._ledger.remove("one")
        assert torch.equal(model(input_ids=ids).logits, before)


# --------------------------------------------------------------------------------------------------------- targets
def chosen(arch: str, text: str, **filters: object) -> list[str]:
    """`role` or `role@layer` of what the targets select among the linear sites."""
    sites = [s for s in shared(arch) if s.kind in ("linear", "experts", "router")]
    picked = Targets(text).select(sites, layers=2)
    return [s.role if s.layer is None else f"{s.role}@{s.layer}" for s in picked]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attention.q,v layers=1", "attention.q@1 attention.v@1"),
        ("attention.q attention.q layers=0", "attention.q@0"),
        ("mlp.* layers=-1", "mlp.gate@1 mlp.up@1 mlp.down@1"),
        ("mlp layers=0 !mlp.up", "mlp.gate@0 mlp.down@0"),
        ("mlp layers=0 !mlp.up,down", "mlp.gate@0"),
        ("head", "head"),
        ("re:k_proj$", "attention.k@0 attention.k@1"),
        ("attention !re:0\\.self_attn layers=0-1", "attention.q@1 attention.k@1 attention.v@1 attention.o@1"),
        ("attention,mlp layers=-2 !attention.q,k,v", "attention.o@0 mlp.gate@0 mlp.up@0 mlp.down@0"),
        ("  all   layers=0   !attention ", "mlp.gate@0 mlp.up@0 mlp.down@0"),
        ("attention.o tower=decoder", "attention.o@0 attention.o@1"),
    ],
)
def test_grammar(text: str, expected: str) -> None:
    assert chosen("llama", text) == expected.split()


def test_towers() -> None:
    anatomy = shared("t5")
    picked = Targets("attention tower=encoder").select(anatomy.sites, layers=2)
    assert {s.tower for s in picked} == {"encoder"}
    both = Targets("attention.q tower=encoder,decoder").select(anatomy.sites, layers=2)
    assert {s.tower for s in both} == {"encoder", "decoder"}
    assert not any(s.role.startswith("cross") for s in Targets("attention").select(anatomy.sites, layers=2))


@pytest.mark.parametrize(
    ("arch", "groups"),
    [
        ("qwen3_moe", "attention experts"),
        ("llama4", "attention mlp experts shared_experts"),
        ("deepseek_v3", "attention mlp experts shared_experts"),
        ("qwen3_next", "attention linear_attention mlp experts shared_experts"),
        ("gemma3n", "attention mlp per_layer laurel"),
        ("gemma4", "attention mlp per_layer experts"),
    ],
)
def test_all_is_the_layers_linears(arch: str, groups: str) -> None:
    """No routers, nor matrices that weigh a few streams."""
    everything = Targets("all").select(shared(arch).sites, layers=shared(arch).num_layers)
    assert {s.role.split(".")[0] for s in everything} == set(groups.split())


def test_mlp_means_the_experts() -> None:
    everything = Targets("all").select(shared("qwen3_moe").sites, layers=2)
    assert {s.role for s in Targets("mlp").select(everything, layers=2)} == {
        "experts.gate",
        "experts.up",
        "experts.down",
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("attention.w", ["'attention.w' matches nothing", "attention.q", "its roles"]),
        ("atention", ["did you mean 'attention'"]),
        ("attention !mlpp", ["'!mlpp' matches nothing", "did you mean 'mlp'"]),
        ("mlp !mlp", ["exclude all"]),
        ("attention layers=2", ["layer 2 does not exist", "0 to 1"]),
        ("attention layers=-3", ["does not exist"]),
        ("attention layers=0-5", ["layer 5 does not exist"]),
        ("attention layers=0-99999999999", ["layer 99999999999 does not exist"]),
        ("attention tower=encoder", ["no tower 'encoder'", "decoder"]),
        ("head layers=0", ["'head' matches nothing"]),
        ("re:nothing_like_it", ["matches nothing"]),
        ("layer.3", ["matches nothing"]),
    ],
)
def test_selecting_nothing_is_an_error(text: str, parts: list[str]) -> None:
    message = text_of(lambda: Targets(text).select(shared("llama").sites, layers=2), TargetError)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "layers=0",
        "!attention",
        "attention layers=",
        "attention layers=a",
        "attention layers=3-1",
        "attention layers=1--",
        "attention layers=1,,2",
        "attention layrs=1",
        "attention tower=",
        "attention. mlp",
        ".q",
        "attention.q,,v",
        "attention,",
        "!",
        "re:(",
        "re:",
        "!re:[",
        "attention=3",
        "attention layers=0 layers=1",
        "attention tower=decoder tower=encoder",
    ],
)
def test_malformed_targets(text: str) -> None:
    with pytest.raises(TargetError):
        Targets(text)


def test_misspelt_filter_names_the_right_one() -> None:
    assert "did you mean 'layers'?" in text_of(lambda: Targets("attention layrs=1"), TargetError)


@given(data=st.data(), depth=st.integers(1, 12))
def test_ranges(data: st.DataObject, depth: int) -> None:
    """`layers=` means the union of its parts, negative indices counted from the end."""
    sites = [Site("attention.q", f"m.{i}", nn.Linear(1, 1), "linear", "decoder", i) for i in range(depth)]
    index = st.integers(-depth, depth - 1)
    parts, wanted = [], set()
    for _ in range(data.draw(st.integers(1, 4))):
        low = data.draw(index)
        if data.draw(st.booleans()):
            parts.append(str(low))
            wanted.add(low % depth)
        else:
            high = data.draw(index.filter(lambda h, low=low: h % depth >= low % depth))
            parts.append(f"{low}-{high}")
            wanted.update(range(low % depth, high % depth + 1))
    picked = Targets(f"attention layers={','.join(parts)}").select(sites, layers=depth)
    assert {s.layer for s in picked} == wanted


@given(word=st.text(st.sampled_from("aq.,!*:=-0 re"), max_size=12))
def test_any_text_parses_or_says_why(word: str) -> None:
    with contextlib.suppress(TargetError):  # any other exception fails the test
        targets = Targets(word)
        assert Targets(str(targets)) == targets


class Options(BaseModel):
    model_config = ConfigDict(frozen=True)
    targets: Targets = Targets("attention mlp")


def test_pydantic() -> None:
    options = Options(targets="attention.q,v   layers=0-1")
    assert options.targets == Targets("attention.q,v layers=0-1")
    assert options.model_dump() == {"targets": "attention.q,v layers=0-1"}
    assert Options.model_validate_json(options.model_dump_json()) == options
    assert Options.model_validate(options.model_dump()) == options
    assert Options(targets=Targets("head")).targets.text == "head"
    assert Options.model_json_schema()["properties"]["targets"]["type"] == "string"
    assert Options.model_json_schema()["properties"]["targets"]["default"] == "attention mlp"
    assert hash(options.targets) == hash(Targets("attention.q,v layers=0-1"))
    with pytest.raises(ValidationError, match="select nothing"):
        Options(targets=" ")
    with pytest.raises(ValidationError, match="not int"):
        Options(targets=3)


# ------------------------------------------------------------------------------------------------------ tiny models
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_is_only_padding(arch: str) -> None:
    """Right pads change nothing at the real tokens, so example inputs and masks are what the model expects."""
    if arch in ("vit", "whisper", "clip"):
        pytest.skip("no row of token logits to compare")
    model = tiny(arch)
    padded = example_inputs(model, padding="right")
    with torch.no_grad():
        out = output_of(model, padded)
        full = output_of(model, example_inputs(model))
    if "decoder_input_ids" in padded:
        torch.testing.assert_close(out[0], full[0], rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(out[0], full[0], rtol=1e-5, atol=1e-5)
    short = {name: value[1:, :7] for name, value in padded.items()}
    with torch.no_grad():
        alone = output_of(model, short)
    torch.testing.assert_close(out[1, :7], alone[0], rtol=1e-4, atol=1e-5)


def test_tiny_models_are_seeded_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert len(tiny("llama", num_hidden_layers=3).model.layers) == 3
    assert not one.training
    for arch in CORE_ARCHITECTURES:
        assert all(m.p == 0 for m in tiny(arch).modules() if isinstance(m, nn.Dropout))
    assert "did you mean 'llama'" in text_of(lambda: tiny("lama"), ArchitectureError)
    assert "did you mean 'base'" in text_of(lambda: tiny("llama", head="bases"), ArchitectureError)


@given(st.text(max_size=20))
def test_tiny_tokenizer_reads_back_any_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert ids == [3 + byte for byte in text.encode()]
    assert TOKENIZER.decode(ids) == text


TOKENIZER = tiny_tokenizer()
