"""Checkpoints for engines: the libraries that read them say what we wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peftx import Claim, Plugin, Stack, hookimpl
from peftx.errors import BundleError, MergeError, PeftxError
from peftx.interop import compressed_tensors, to_compressed_tensors
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
    "rounded inputs": (
        [rounded(bits=8, activation="dynamic-token")],
        r"'rounded' keeps .* as QuantLinear, which rounds its input too \(dynamic-token, 8 bits\)",
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
    stack.compress(TEXTS)
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
