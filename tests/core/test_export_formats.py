"""Checkpoints for engines: the libraries that read them say what we wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from tokenizers import Regex, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peftx import Claim, Plugin, Stack, hookimpl
from peftx.errors import BundleError, MergeError, PeftxError, UnsupportedError
from peftx.interop import compressed_tensors, gguf_file, to_compressed_tensors, to_gguf
from peftx.kernel.parts import ReplacedPart
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear, dequantize, quantize
from peftx_air_decoding import AirDecoding
from peftx_cli.main import app
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prefixquant import PrefixQuant
from peftx_prompt_tuning import PromptTuning
from peftx_signround import SignRound

IDS = torch.arange(3, 19)[None]
TEXTS = ["a text to look at, and some more of it"]
PLAIN = {"activation_bits": 16, "kv_bits": 16, "rotate": False}
"""PrefixQuant on weights alone."""


class Rounded(Plugin):
    """Linear layers in integers, by the options of `QuantLinear`."""

    claims: ClassVar[set[Claim]] = {Claim.QUANTIZES}
    targets: ClassVar[str] = "all"
    options: ClassVar[dict[str, Any]] = {"bits": 4}

    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears(self.targets, whole=True):
            site.replace(QuantLinear.from_linear(site.module, **self.options))


def rounded(targets: str = "all", **options: Any) -> Plugin:
    return type("Rounded", (Rounded,), {"targets": targets, "options": options})()


def stack_of(*plugins: Any, on: Any = "llama") -> Stack:
    """A stack on a tiny model, each plugin injected and compressed in turn; what trains has values that show."""
    model = tiny(on) if isinstance(on, str) else on
    stack = Stack(model, list(plugins), tokenizer=tiny_tokenizer(), inject=False)
    for member in stack.members:
        stack.inject([member.id])
        with torch.no_grad():
            for parameter in stack.ledger.parameters(member.id):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        if member.implements("compress"):
            stack.compress(TEXTS, ids=[member.id])
    stack.model.eval()
    return stack


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# -- compressed-tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize(
    "plugin",
    [
        SignRound(bits=4, group_size=8, steps=1),
        SignRound(bits=8, group_size=8, steps=1),
        PrefixQuant(weight_bits=4, **PLAIN),
        PrefixQuant(weight_bits=8, group_size=8, **PLAIN),
    ],
    ids=["w4-groups-zeros", "w8-groups-zeros", "w4-rows", "w8-groups"],
)
def test_transformers_reads_the_same_logits(plugin: Plugin, on: str, tmp_path: Path) -> None:
    """In float32: the weights are equal to the bit, and sums in another order differ by their rounding."""
    stack = stack_of(plugin, on=on)
    model = loaded(to_compressed_tensors(stack, tmp_path / "out"))
    torch.testing.assert_close(logits(model), logits(stack.model), rtol=0, atol=1e-5)
    for part in stack.ledger.all(ReplacedPart):
        assert torch.equal(model.get_submodule(part.key).weight, part.module.weight)


STATIC = {"bits": 8, "activation": "static-tensor", "input_scale": 0.02}
INPUTS: dict[str, Any] = {
    "prefixquant": lambda: PrefixQuant(weight_bits=8, kv_bits=16, prefix_tokens=0, rotate=False),
    "symmetric": lambda: rounded(**STATIC),
    "zeros": lambda: rounded(**STATIC, symmetric=False, act_symmetric=False, input_zero=113),
    "some": lambda: Partly(),
}


class Partly(Rounded):
    """Inputs of some layers alone."""

    @hookimpl
    def compress(self, model: Any) -> None:
        for targets, options in {"mlp": STATIC, "attention": {"bits": 4, "group_size": 8}}.items():
            for site in model.linears(targets, whole=True):
                site.replace(QuantLinear.from_linear(site.module, **options))


@pytest.mark.parametrize("on", ["llama", "gpt_neox"])
@pytest.mark.parametrize("what", INPUTS)
def test_transformers_reads_the_same_logits_of_rounded_inputs(what: str, on: str, tmp_path: Path) -> None:
    """W8A8: by one scale for all tokens, which is in the file; what is rounded is equal, sums differ by theirs."""
    stack = stack_of(INPUTS[what](), on=on)
    before = logits(stack.model)
    out = to_compressed_tensors(stack, tmp_path / "out")
    model = loaded(out)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for part in stack.ledger.all(ReplacedPart):
        part.module.activation = None
    weights_alone = logits(stack.model)
    assert (weights_alone - before).abs().max() > 1e-3, "inputs count"
    told = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    assert told["format"] == ("mixed-precision" if what == "some" else "int-quantized")
    again = loaded(out)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_unpacks_our_integers(bits: int, group_size: int | None, symmetric: bool) -> None:
    """Rows and columns that fill no whole word."""
    weight = torch.randn(13, 24) + 0.3
    ours = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=compressed_tensors._scheme(bits, symmetric, group_size)
    )
    theirs = PackedQuantizationCompressor.decompress(compressed_tensors.packed(ours), scheme)
    assert torch.equal(theirs["weight"], dequantize(ours))


def test_the_library_packs_the_same_words() -> None:
    """The other way: it rounds the weights that we rounded, and has our tensors."""
    ours = quantize(torch.randn(16, 24), bits=4, group_size=8, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=compressed_tensors._scheme(4, False, 8))
    zero = (ours.zero.to(torch.int8) - 8) if ours.zero is not None else None
    given = {"weight": dequantize(ours), "weight_scale": ours.scale, "weight_zero_point": zero}
    theirs = PackedQuantizationCompressor.compress(given, scheme)
    mine = compressed_tensors.packed(ours)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_deltas_fold_where_the_layer_is_not_quantized(tmp_path: Path) -> None:
    stack = stack_of(rounded("mlp", bits=4, group_size=8), Lora(rank=2, targets="attention"))
    before = logits(stack.model)
    out = to_compressed_tensors(stack, tmp_path / "out")
    torch.testing.assert_close(logits(loaded(out)), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(stack.model), before)  # and the stack is as it was
    told = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in told["ignore"]
    assert not any("mlp" in name for name in told["ignore"])


def test_an_adapter_that_was_folded_before_is_in_the_integers(tmp_path: Path) -> None:
    stack = stack_of(Lora(rank=2), SignRound(bits=4, group_size=8, steps=1))
    out = to_compressed_tensors(stack, tmp_path / "out")
    torch.testing.assert_close(logits(loaded(out)), logits(stack.model), rtol=0, atol=1e-5)


class Mixed(Rounded):
    """Not all layers in the same way."""

    @hookimpl
    def compress(self, model: Any) -> None:
        kinds = {"mlp": {"bits": 4, "group_size": 8}, "attention": {"bits": 8, "symmetric": False}}
        for targets, options in kinds.items():
            for site in model.linears(targets):
                site.replace(QuantLinear.from_linear(site.module, **options))


def test_two_kinds_of_integers_in_one_checkpoint(tmp_path: Path) -> None:
    stack = stack_of(Mixed())
    out = to_compressed_tensors(stack, tmp_path / "out")
    torch.testing.assert_close(logits(loaded(out)), logits(stack.model), rtol=0, atol=1e-5)
    groups = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]["config_groups"]
    told = [(group["weights"]["num_bits"], group["weights"]["symmetric"]) for group in groups.values()]
    assert told == [(4, True), (8, False)]


def test_in_bfloat16_the_readers_round_scales(tmp_path: Path) -> None:
    """transformers and vLLM keep scales in the model's dtype: the error is of the size of bfloat16's own."""
    stack = stack_of(SignRound(bits=4, group_size=8, steps=1), on=tiny("llama").to(torch.bfloat16))
    model = loaded(to_compressed_tensors(stack, tmp_path / "out"))
    assert model.dtype == torch.bfloat16
    ours = logits(stack.model).float()
    torch.testing.assert_close(logits(model).float(), ours, rtol=0, atol=2**-5 * float(ours.abs().max()))


def test_the_bytes_are_those_of_the_integers(tmp_path: Path) -> None:
    stack = stack_of(SignRound(bits=4, group_size=8, steps=0))
    out = to_compressed_tensors(stack, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    for part in stack.ledger.all(ReplacedPart):
        rows, columns = part.module.out_features, part.module.in_features
        groups = -(-columns // 8)
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(part.key + ".")}
        assert {n: t.nbytes for n, t in own.items()} == {
            "weight_packed": 4 * rows * -(-columns // 8), "weight_scale": 4 * rows * groups,
            "weight_zero_point": 4 * groups * -(-rows // 8), "weight_shape": 16,
        }  # fmt: skip
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    written = sum(tensor.nbytes for tensor in tensors.values())
    assert (out / "model.safetensors").stat().st_size == 8 + header + written


def test_the_tokenizer_goes_with_it(tmp_path: Path) -> None:
    stack = stack_of(SignRound(bits=4, group_size=8, steps=0))
    out = to_compressed_tensors(stack, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out)(TEXTS[0]).input_ids == stack.tokenizer(TEXTS[0]).input_ids


class Turned(QuantLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)


class Turning(Rounded):
    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp"):
            site.replace(Turned.from_linear(site.module, bits=8))


class Widened(QuantLinear):
    def activation_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return 2 * self.input_scale, None


class Widening(Rounded):
    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp"):
            site.replace(Widened.from_linear(site.module, **STATIC))


class Halved(Plugin):
    """Replaces layers by smaller ones."""

    claims: ClassVar[set[Claim]] = {Claim.QUANTIZES}

    class Half(nn.Linear):
        def geometry(self) -> dict[str, Any]:
            return {"in_features": self.in_features, "out_features": self.out_features}

    @hookimpl
    def compress(self, model: Any) -> None:
        for site in model.linears("mlp.up"):
            site.replace(self.Half(site.in_features, site.out_features))


class Heads(Plugin):
    """Trains a head of its own."""

    @hookimpl
    def inject(self, model: Any) -> None:
        model.head("classes", 2, pool="last")


REFUSED: dict[str, tuple[list[Any], str, str, str]] = {
    "a delta on a quantized layer": (
        [rounded(bits=4), Lora(rank=2, targets="mlp")],
        "'lora' stands on model.layers.0.mlp.gate_proj, a quantized layer",
        "--format peft",
        "llama",
    ),
    "soft tokens": (
        [PromptTuning(length=2), rounded(bits=4)],
        r"'prompt-tuning' has more than weights \(soft tokens",
        "--format peft",
        "llama",
    ),
    "decoding": (
        [AirDecoding(), rounded(bits=4)],
        "'air-decoding' takes part in decoding",
        "a bundle",
        "llama",
    ),
    "a head": (
        [Heads(), rounded(bits=4)],
        r"'heads' has more than weights \(",
        "a bundle",
        "llama",
    ),
    "a prefix in the cache": (
        [PrefixQuant()],
        r"'prefixquant' has more than weights \((attention|positions)",
        "a bundle",
        "llama",
    ),
    "a rotation": (
        [PrefixQuant(activation_bits=16, kv_bits=16)],
        "'prefixquant' keeps model.layers.0.self_attn.q_proj as RotatedLinear, which changes what goes into it",
        "a bundle",
        "llama",
    ),
    "another transform": ([Turning()], "as Turned, which changes what goes into it", "a bundle", "llama"),
    "inputs by token": (
        [rounded(bits=8, activation="dynamic-token")],
        r"'rounded' keeps .* as QuantLinear, which rounds its input by a scale for each token \(W8A8\), which every",
        "a bundle",
        "llama",
    ),
    "inputs by another rule": (
        [Widening()],
        "as Widened, which rounds its input by a rule of its own",
        "a bundle",
        "llama",
    ),
    "narrow weights with inputs": (
        [rounded(bits=4, activation="static-tensor", input_scale=0.02)],
        r"which rounds its input too, as W4A8, of which W8A8 with a scale for each row alone is read",
        "a bundle",
        "llama",
    ),
    "groups with inputs": (
        [rounded(bits=8, group_size=8, activation="static-tensor", input_scale=0.02)],
        r"as W8A8 in groups of 8, of which W8A8 with a scale for each row",
        "a bundle",
        "llama",
    ),
    "another data type": (
        [NF4Storage()],
        "'nf4' keeps .* as NF4Linear, which has values of a data type of its own",
        "a bundle",
        "llama",
    ),
    "three bits": ([rounded(bits=3)], "'rounded' keeps .* which has 3 bits a weight", "a bundle", "llama"),
    "a short group": (
        [rounded(bits=4, group_size=24)],
        "which has groups of 24 that do not divide its 32 inputs",
        "a bundle",
        "llama",
    ),
    "no packed layer": (
        [Halved()],
        "'halved' keeps .* as Half, which is no packed layer",
        "a bundle",
        "llama",
    ),
    "Conv1D": (
        [rounded(bits=4)],
        "is a Conv1D, and compressed-tensors packs nn.Linear alone",
        "a bundle",
        "gpt2",
    ),
    "stacked experts": (
        [rounded("attention", bits=4)],
        "experts holds stacked experts",
        "a bundle",
        "mixtral",
    ),
    "nothing quantized": ([Lora(rank=2)], "no layer of the stack is quantized", "--format hf", "llama"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_say_is_refused(what: str, tmp_path: Path) -> None:
    plugins, said, hint, on = REFUSED[what]
    stack = stack_of(*plugins, on=on)
    before = logits(stack.model)
    with pytest.raises(MergeError, match=said) as caught:
        to_compressed_tensors(stack, tmp_path / "out")
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(stack.model), before)


def test_a_head_that_is_tied_is_not_packed_alone(tmp_path: Path) -> None:
    stack = stack_of(on=tiny("llama", tie_word_embeddings=True))
    head = QuantLinear.from_linear(stack.model.lm_head, bits=4)
    part = ReplacedPart("mine", "lm_head", head, {}, stack.model, stack.model.lm_head, [])
    stack.model.lm_head = head
    stack.ledger.parts.append(part)
    with pytest.raises(MergeError, match=r"uses one matrix as model.embed_tokens.weight and lm_head.weight"):
        to_compressed_tensors(stack, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = to_compressed_tensors(stack_of(rounded(bits=8)), tmp_path / "out")
    before = contents(out)

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed_tensors, "_describe", fails)
    with pytest.raises(BundleError, match="the old one is intact"):
        to_compressed_tensors(stack_of(rounded(bits=4)), out)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]
    monkeypatch.undo()
    to_compressed_tensors(stack_of(rounded(bits=4)), out)
    assert contents(out)["model.safetensors"] != before["model.safetensors"]


def test_a_strange_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep", "utf-8")
    with pytest.raises(BundleError, match="is not overwritten"):
        to_compressed_tensors(stack_of(rounded(bits=4)), tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"keep"}


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(rounded(bits=4))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(PeftxError, match="needs compressed_tensors, which is not installed") as caught:
        to_compressed_tensors(stack, tmp_path / "out")
    assert caught.value.hint == "pip install 'peftx[compressed]'"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Of the bundled model, packed."""
    stack = Stack("peftx:tiny", [SignRound(bits=4, group_size=16, steps=0)])
    stack.compress(TEXTS * 4)
    return stack.save(tmp_path / "bundle")


def test_the_command_writes_what_transformers_generates_from(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = CliRunner().invoke(app, ["export", str(bundle), str(out), "-f", "compressed-tensors", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["bytes"] == sum(map(len, contents(out).values()))
    model, tokenizer = loaded(out), AutoTokenizer.from_pretrained(out)
    found = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    said = CliRunner().invoke(app, ["generate", str(bundle), "Once upon", "-n", "12"]).stdout
    assert tokenizer.decode(found[0], skip_special_tokens=True).strip().endswith(said.strip())


def test_the_command_says_why_not(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    done = CliRunner().invoke(app, ["export", str(bundle), str(out)])
    assert done.exit_code != 0
    assert "compressed-tensors" in str(done.exception) + done.output
    assert not out.exists()


# -- gguf --------------------------------------------------------------------------------------------------------

SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, with biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3's rope": ("llama", {"rope_parameters": SCALED}),
    "a linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def words(split: Any = None, **options: Any) -> Any:
    """A tokenizer of bytes with some merges, split as GPT-2 does if not said otherwise."""
    tokenizer = tiny_tokenizer(**options)
    merges = [
        ("t", "h"),
        ("Ġ", "th"),
        ("Ġth", "e"),
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "12"),
        ("\u010a", "\u010a"),
    ]
    vocabulary = tokenizer.get_vocab()
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    tokenizer.backend_tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def merged_of(on: str = "llama", *plugins: Any, tokenizer: Any = None, **options: Any) -> Stack:
    """A stack on a model with a row for each of `words`, and two more."""
    stack = Stack(tiny(on, vocab_size=268, **options), list(plugins), tokenizer=tokenizer or words())
    with torch.no_grad():
        for id in stack.plugins:
            for parameter in stack.ledger.parameters(id):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    stack.model.eval()
    return stack


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What gguf's own reader finds: fields and tensors."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {n: f.contents() for n, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values_of(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_reads_back(shape: str, tmp_path: Path) -> None:
    on, options = SHAPES[shape]
    stack = merged_of(on, **options)
    _, tensors = read(to_gguf(stack, tmp_path / "out"))
    model, config = stack.model, stack.model.config
    size = config.hidden_size // config.num_attention_heads if on != "qwen3" else config.head_dim
    named = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    layer = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # fmt: skip
    for index in range(config.num_hidden_layers):
        named |= {f"blk.{index}.{theirs}": f"model.layers.{index}.{ours}" for theirs, ours in layer.items()}
    count = 0
    for theirs, ours in named.items():
        for leaf in ("weight", "bias"):
            if theirs == "output" and config.tie_word_embeddings:
                assert "output.weight" not in tensors
                continue
            value = dict(model.named_parameters()).get(f"{ours}.{leaf}")
            if value is None:
                assert f"{theirs}.{leaf}" not in tensors
                continue
            found = values_of(tensors[f"{theirs}.{leaf}"])
            wanted = value.detach().half().float() if value.dim() == 2 else value.detach()
            if on in ("llama", "mistral") and theirs.endswith(("attn_q", "attn_k")):
                turned = torch.empty_like(wanted)
                for row in range(len(wanted)):  # by hand: halves of a head become neighbours
                    head, place = divmod(row, size)
                    half, index_in_half = divmod(place, size // 2)
                    turned[head * size + 2 * index_in_half + half] = wanted[row]
                wanted = turned
            assert torch.equal(found, wanted), theirs
            count += 1
    assert count == len(tensors) - ("rope_freqs.weight" in tensors)
    assert ("rope_freqs.weight" in tensors) == ("rope_parameters" in options)


def test_factors_of_the_rope(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    _, tensors = read(to_gguf(merged_of(rope_parameters=linear), tmp_path / "out"))
    torch.testing.assert_close(values_of(tensors["rope_freqs.weight"]), torch.full((4,), 4.0))


def test_fields_and_words(tmp_path: Path) -> None:
    stack = merged_of("qwen2")
    fields, _ = read(to_gguf(stack, tmp_path / "out", type="q8_0"))
    config, tokenizer = stack.model.config, stack.tokenizer
    assert fields["general.architecture"] == "qwen2"
    assert fields["general.file_type"] == 7
    assert {n.partition(".")[2]: v for n, v in fields.items() if n.startswith("qwen2.")} == {
        "vocab_size": 268, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps), "rope.freq_base": 1e4,
        "rope.dimension_count": 8, "attention.key_length": 8, "attention.value_length": 8,
    }  # fmt: skip
    told = {n.removeprefix("tokenizer.ggml."): v for n, v in fields.items() if n.startswith("tokenizer.")}
    assert told["tokens"] == [
        *(tokenizer.convert_ids_to_tokens(i) for i in range(266)),
        "[PAD266]",
        "[PAD267]",
    ]
    assert told["merges"][:2] == ["t h", "Ġ th"]
    assert (told["model"], told["pre"]) == ("gpt2", "gpt-2")
    normal, control, unused = 1, 3, 5
    assert told["token_type"] == [control] * 3 + [normal] * 263 + [unused] * 2
    assert [told[f"{n}_token_id"] for n in ("bos", "eos", "padding")] == [0, 1, 2]
    assert told["add_bos_token"] is False


def test_rounded_matrices(tmp_path: Path) -> None:
    """Half a step at most, and what its scale of float16 loses; what fills no blocks is f16."""
    stack = merged_of(hidden_size=64, intermediate_size=72)
    rows = stack.model.model.layers[1].mlp.up_proj.weight.detach()
    steps = {"q8_0": 127, "q4_0": 8}
    for type, step in steps.items():
        _, tensors = read(to_gguf(stack, tmp_path / type, type=type))  # type: ignore[arg-type]
        kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
        assert kinds["blk.1.ffn_up.weight"] == type.upper()
        assert kinds["blk.1.ffn_down.weight"] == "F16"
        assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
        assert kinds["output_norm.weight"] == "F32"
        assert tensors["blk.1.ffn_up.weight"].n_bytes == rows.numel() // 32 * (34 if type == "q8_0" else 18)
        error = (values_of(tensors["blk.1.ffn_up.weight"]) - rows).view(-1, 32).abs().amax(1)
        largest = rows.reshape(-1, 32).abs().amax(1)
        # In q4_0 the end of the range that the largest number is not on has one step less.
        assert (error <= largest / step * (0.6 if type == "q8_0" else 1.05)).all()


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    sizes = []
    for type in ("f16", "q8_0", "q4_0"):
        out = to_gguf(merged_of(), tmp_path / type, type=type)
        reader = gguf.GGUFReader(out / "model.gguf")
        assert sorted(contents(out)) == ["model.gguf", "peftx_export.json"]
        ends = max(tensor.data_offset + -(-tensor.n_bytes // 32) * 32 for tensor in reader.tensors)
        assert (out / "model.gguf").stat().st_size == ends
        sizes.append(ends)
    assert sizes == sorted(sizes, reverse=True)


def test_plugins_are_in_the_weights(tmp_path: Path) -> None:
    stack = merged_of("llama", Lora(rank=2, targets="mlp.up"))
    before = logits(stack.model)
    _, tensors = read(to_gguf(stack, tmp_path / "out"))
    assert torch.equal(logits(stack.model), before)
    stack.merge()
    wanted = stack.model.model.layers[0].mlp.up_proj.weight.detach().half().float()
    assert torch.equal(values_of(tensors["blk.0.ffn_up.weight"]), wanted)
    stack.unmerge()
    assert not torch.equal(stack.model.model.layers[0].mlp.up_proj.weight.half().float(), wanted)


WAYS = {  # as the tokenizer.json of Llama 3 and Qwen 2 say it
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.filterwarnings("ignore:llama.cpp does not split text")
@pytest.mark.parametrize("name", [*WAYS, "gpt-2"])
def test_the_way_of_splitting_is_found_on_the_bundled_words(name: str) -> None:
    from peftx.engines.models import load_model
    from peftx.interop.gguf_tokens import vocabulary_of

    _, tokenizer = load_model("peftx:tiny")
    assert tokenizer is not None
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt-2")
    first = [pre_tokenizers.Split(Regex(WAYS[name]), "isolated")] if name in WAYS else []
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_only])
    found = vocabulary_of(tokenizer, 4096)
    assert (found.split, found.begins) == (name, True)


def test_another_way_of_splitting_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="llama.cpp does not split text as this tokenizer does"):
        to_gguf(Stack("peftx:tiny"), tmp_path / "out")


def huge() -> Stack:
    stack = merged_of()
    with torch.no_grad():
        stack.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    return stack


NO_GGUF: dict[str, tuple[Any, str, str]] = {
    "another family": (lambda: merged_of("gemma2"), "Gemma2ForCausalLM: --format gguf takes", "--format hf"),
    "no language model": (lambda: merged_of(head="classification"), "ForSequenceClassification: --format gguf", "hf"),
    "packed layers": (
        lambda: stack_of(rounded(bits=4)), "'rounded' has packed model.layers.0", "--format compressed-tensors",
    ),
    "soft tokens": (
        lambda: merged_of("llama", PromptTuning(length=2)), "'prompt-tuning' has more than weights", "--format peft",
    ),
    "decoding": (
        lambda: merged_of("llama", AirDecoding()), "'air-decoding' takes part in decoding", "a bundle",
    ),
    "a window": (
        lambda: merged_of("mistral", sliding_window=16), "has a window of 16 tokens, and llama.cpp's", "--format hf",
    ),
    "a bias": (
        lambda: merged_of("qwen3", attention_bias=True),
        r"qwen3 has no place for model.layers.0.self_attn.q_proj.bias", "--format hf",
    ),
    "an activation": (lambda: merged_of(hidden_act="gelu"), "has an activation of gelu", "--format hf"),
    "a rope": (
        lambda: merged_of(rope_parameters={**SCALED, "rope_type": "yarn"}), "has a rope of type yarn", "--format hf",
    ),
    "a scaled rope of qwen2": (
        lambda: merged_of("qwen2", rope_parameters=SCALED), "has frequencies that it does not read", "--format hf",
    ),
    "bytes alone": (
        lambda: merged_of(tokenizer=tiny_tokenizer()), "is no BPE of bytes with merges", "--format hf",
    ),
    "eos behind a text": (lambda: merged_of(tokenizer=words(ends=True)), "puts bos in front alone", "--format hf"),
    "too large numbers": (huge, "blk.0.ffn_up.weight holds 100000", "--format hf"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_GGUF)
def test_what_llama_cpp_has_no_place_for_is_refused(what: str, tmp_path: Path) -> None:
    make, said, hint = NO_GGUF[what]
    stack = make()
    with pytest.raises((MergeError, UnsupportedError), match=said) as caught:
        to_gguf(stack, tmp_path / "out")
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = to_gguf(merged_of(), tmp_path / "out")
    before = contents(out)

    def fails(name: str, values: Any) -> None:
        if name == "output_norm.weight":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "_check_range", fails)
    with pytest.raises(BundleError, match="the old one is intact"):
        to_gguf(merged_of(), out, type="q8_0")
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_without_gguf_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = merged_of()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PeftxError, match="needs gguf, which is not installed") as caught:
        to_gguf(stack, tmp_path / "out")
    assert caught.value.hint == "pip install 'peftx[gguf]'"


@pytest.mark.filterwarnings("ignore:llama.cpp does not split text")
def test_the_command_writes_a_file(tmp_path: Path) -> None:
    bundle = Stack("peftx:tiny", [Lora(rank=2)]).save(tmp_path / "bundle")
    run = CliRunner().invoke
    done = run(app, ["export", str(bundle), str(tmp_path / "f"), "-f", "gguf", "--type", "q4_0", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] == sum(map(len, contents(tmp_path / "f").values()))
    assert read(tmp_path / "f")[0]["general.file_type"] == 2
    wrong = run(app, ["export", str(bundle), str(tmp_path / "g"), "-f", "gguf", "--type", "q5"])
    assert "type='q5' is none of 'f16', 'q8_0', 'q4_0'" in str(wrong.exception) + wrong.output
    wrong = run(app, ["export", str(bundle), str(tmp_path / "g"), "--type", "q8_0"])
    assert "--type is of gguf" in str(wrong.exception) + wrong.output
    assert not (tmp_path / "g").exists()


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is built from source, which takes minutes"
    )


def engine(llama_cpp: Any, folder: Path) -> Any:
    return llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=128, n_threads=1, verbose=False, logits_all=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_same(llama_cpp: Any, shape: str, tmp_path: Path) -> None:
    """It multiplies in float16."""
    on, options = SHAPES[shape]
    stack = merged_of(on, **options)
    model = engine(llama_cpp, to_gguf(stack, tmp_path / "out"))
    model.eval(IDS[0].tolist())
    theirs = torch.from_numpy(np.array(model.scores[: IDS.shape[1]]))
    model.close()
    torch.testing.assert_close(theirs, logits(stack.model)[0], rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore:llama.cpp does not split text")
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_llama_cpp_writes_the_same_text(llama_cpp: Any, type: str, tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2)])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    stack.model.eval()
    model = engine(llama_cpp, to_gguf(stack, tmp_path / "out", type=type))
    for text in ("Once upon a time", "Write the log of Far Point for Monday."):
        assert model.tokenize(text.encode(), special=True) == stack.tokenizer(text).input_ids
        theirs = model(text, max_tokens=24, temperature=0)["choices"][0]["text"]
        assert theirs == stack.generate(text, max_new_tokens=24)
    model.close()
