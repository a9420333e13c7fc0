from __future__ import annotations

import copy
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.pipeline import load_run
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx.toolkits.compression import Calibration
from peftx_bitdelta import BitDelta, SignDelta, pack, unpack
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant

test_conformance = conformance("bitdelta")

STILL = {"steps": 1, "learning_rate": 1e-12}  # scales that float32 cannot tell from those before
TWO = {"samples": 2, "length": 24}


def tuned(arch: str = "llama", *, size: float = 0.02, seed: int = 1, **options: Any) -> Stack:
    """A stack whose whole model moved off its base."""
    stack = Stack(tiny(arch), [BitDelta(**options)], tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("bitdelta"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return stack


def weights(stack: Stack) -> dict[str, Tensor]:
    """theta of every parameter, by name."""
    return {name: place.theta.detach().clone() for name, place in stack.plugins["bitdelta"].places.items()}


def deltas(stack: Stack) -> dict[str, SignDelta]:
    return {part.key: part.module for part in stack.ledger.of("bitdelta", DeltaPart)}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(model))


def batches() -> list[dict[str, Tensor]]:
    tokenizer = tiny_tokenizer()
    return [{"input_ids": torch.tensor([tokenizer(text)["input_ids"][:24]])} for text in TEXTS]


# ------------------------------------------------------------------------------------------------------ the algebra
def test_bits_by_hand() -> None:
    positive = torch.tensor([[True, False, True], [True, False, False], [False, False, True]])
    assert pack(positive).tolist() == [1 + 4 + 8, 1]
    assert unpack(pack(positive), (3, 3), torch.float32).tolist() == [[1, -1, 1], [1, -1, -1], [-1, -1, 1]]


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (3, 5), (2, 3, 7), (16, 32)])
def test_unpacking_gives_the_signs(shape: tuple[int, ...]) -> None:
    S = torch.randn(shape, generator=torch.Generator().manual_seed(0)) > 0
    packed = pack(S)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-S.numel() // 8),)
    assert torch.equal(unpack(packed, shape, torch.float32), S * 2.0 - 1)


def test_difference_by_hand() -> None:
    """a = mean |D|, zero counts as negative, and what is lost is ||D||^2 - out in a^2."""
    stack = Stack(tiny("llama"), [BitDelta(**STILL)], tokenizer=tiny_tokenizer())
    name = "model.layers.0.self_attn.o_proj"
    place = stack.plugins["bitdelta"].places[f"{name}.weight"]
    D = torch.zeros_like(place.theta)
    D[0, :4] = torch.tensor([0.5, -0.25, 1.0, -0.25])
    with torch.no_grad():
        place.theta.copy_(place.theta_0 + D)
        D = place.theta - place.theta_0
    stack.compress(TEXTS, **TWO)
    delta = deltas(stack)[name]
    a, S = delta.scale, unpack(delta.packed, D.shape, torch.float32)
    assert float(a) == pytest.approx(2.0 / D.numel())
    assert S[0, :6].tolist() == [1, -1, 1, -1, -1, -1]
    lost = (D - a * S).square().sum()
    assert float(lost) == pytest.approx(float(D.square().sum() - D.numel() * a**2), rel=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "bert", "mixtral", "mamba"])
def test_the_loss_of_every_matrix_is_the_least(arch: str) -> None:
    """||D - a S||^2 = ||D||^2 - n a^2, for Conv1D and each stacked expert too, and no other a does better."""
    stack = tuned(arch, **STILL)
    base = {name: place.theta_0 for name, place in stack.plugins["bitdelta"].places.items()}
    moved = weights(stack)
    paths = {(s.path, s.parameter): s.turned for s in stack.view("bitdelta").linears("all", whole=True)}
    stack.compress(TEXTS, **TWO)
    found = [part.module for part in stack.ledger.of("bitdelta", DeltaPart)]
    assert len(found) == len(paths) > 0
    for ((path, name), turned), delta in zip(paths.items(), found, strict=True):
        D = moved[f"{path}.{name}"] - base[f"{path}.{name}"]
        D = D.mT if turned else D
        S = unpack(delta.packed, delta.shape, torch.float32)
        assert torch.equal(S, torch.where(D > 0, 1.0, -1.0))
        assert delta.scale.shape == D.shape[:-2]
        n, a = D[..., 0, 0].numel() and D.shape[-1] * D.shape[-2], delta.scale[..., None, None]
        torch.testing.assert_close(
            (D - a * S).square().sum((-2, -1)),
            D.square().sum((-2, -1)) - n * delta.scale**2,
            atol=1e-5,
            rtol=1e-4,
        )
        for factor in (0.99, 1.01):
            assert ((D - factor * a * S).square().sum((-2, -1)) > (D - a * S).square().sum((-2, -1))).all()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_one_magnitude_is_kept_exactly(arch: str) -> None:
    """D = c S with its own c for each matrix: the model is the fine-tuned one."""
    stack = Stack(tiny(arch), [BitDelta(**STILL)], tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, place in enumerate(stack.plugins["bitdelta"].places.values()):
            signs = torch.where(torch.rand(place.theta.shape, generator=generator) > 0.5, 1.0, -1.0)
            place.theta.add_(signs * 2.0 ** -(5 + i % 3))
    before = logits(stack.model)
    stack.compress(TEXTS, **TWO)
    torch.testing.assert_close(logits(stack.model), before, atol=2e-4, rtol=1e-4)


def test_two_products_are_one() -> None:
    """x W_b^T + a (x S^T) = x W_hat^T."""
    torch.manual_seed(0)
    delta, W, x = (
        SignDelta(
            (6, 9),
        ),
        torch.randn(6, 9),
        torch.randn(4, 9),
    )
    delta.packed.copy_(pack(torch.randn(6, 9) > 0))
    delta.scale.fill_(0.3)
    folded, bias = delta.fold(W, None)
    assert bias is None
    torch.testing.assert_close(folded, W + 0.3 * unpack(delta.packed, (6, 9), torch.float32))
    torch.testing.assert_close(delta(x, F.linear(x, W)), F.linear(x, folded), atol=1e-5, rtol=1e-5)
    half = delta(x.bfloat16(), F.linear(x, W).bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), F.linear(x, folded), atol=0.05, rtol=0.02)


# ---------------------------------------------------------------------------------------------------- what is kept
def test_the_rest_stays_fine_tuned_and_the_matrices_are_the_base() -> None:
    stack = tuned("qwen2", **STILL)
    moved, plain = weights(stack), dict(tiny("qwen2").named_parameters())
    packed = {f"{site.path}.weight" for site in stack.view("bitdelta").linears("all")}
    stack.compress(TEXTS, **TWO)
    now = weights(stack)
    assert {name for name in now if torch.equal(now[name], plain[name])} == packed
    assert all(torch.equal(now[name], moved[name]) for name in now.keys() - packed)
    kept = {name.rpartition(".")[2] for name in now.keys() - packed}
    assert kept == {"weight", "bias"}
    assert "model.embed_tokens.weight" in now.keys() - packed
    assert stack.trainable_parameters() == 0
    with stack.disabled("bitdelta"):
        assert torch.equal(logits(stack.model), logits(tiny("qwen2")))
    stack.remove("bitdelta")
    assert torch.equal(logits(stack.model), logits(tiny("qwen2")))


def test_targets_choose_what_is_packed() -> None:
    stack = tuned(targets="mlp", **STILL)
    moved = weights(stack)
    stack.compress(TEXTS, **TWO)
    assert {key.split(".")[3] for key in deltas(stack)} == {"mlp"}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights(stack)[name], moved[name])


def test_an_adapter_behind_it_trains_alone(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [BitDelta(**STILL), Lora(rank=2)], tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["bitdelta"])
    stack.compress(TEXTS, ["bitdelta"], **TWO)
    stack.inject(["lora"])
    before = weights(stack)
    stack.train([{"prompt": "a", "completion": "b"}] * 4, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(stack).items())
    stack.save(tmp_path / "both")
    loaded = peftx.load(tmp_path / "both", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert loaded.trainable_parameters() == loaded.plugin_parameters("lora")
    assert torch.equal(logits(loaded.model), logits(stack.model))


# ------------------------------------------------------------------------------------------------------ distillation
def error(student: PreTrainedModel, teacher: PreTrainedModel, some: list[dict[str, Tensor]]) -> Tensor:
    pairs = [(student(**batch).logits, teacher(**batch).logits) for batch in some]
    return torch.stack([(z_a - z_f).square().mean() for z_a, z_f in pairs]).mean()


def compressed(stack: Stack) -> PreTrainedModel:
    """Compress a stack on the three sequences; the fine-tuned model comes back."""
    teacher = copy.deepcopy(stack.model)
    member = stack.member("bitdelta")
    calibration = Calibration(batches())
    with torch.no_grad():
        stack.call(member, "compress", model=stack.view("bitdelta"), calibration=calibration, stack=stack)
    stack.settle()
    return teacher


def test_scales_alone_are_distilled() -> None:
    plain, stack = tuned(**STILL), tuned(steps=40, learning_rate=1e-3)
    compressed(plain)
    teacher = compressed(stack)
    before, after = stack.plugins["bitdelta"].state["logit_error"]
    with torch.no_grad():
        assert float(error(stack.model, teacher, batches())) == pytest.approx(after, rel=1e-4)
        assert float(error(plain.model, teacher, batches())) == pytest.approx(before, rel=1e-4)
    assert after < 0.9 * before
    for one, other in zip(deltas(plain).values(), deltas(stack).values(), strict=True):
        assert torch.equal(one.packed, other.packed)
        assert float(one.scale) != float(other.scale)
        assert not other.scale.requires_grad
        assert other.scale.grad is None
    found = weights(stack)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(plain).items())


def test_steps_by_hand() -> None:
    """Adam on the mean of two sequences a step; the third is followed by the first."""
    stack, by_hand = tuned(steps=2, batch_size=2, learning_rate=1e-3), tuned(**STILL)
    compressed(stack)
    teacher = compressed(by_hand)
    scales = [delta.scale.requires_grad_() for delta in deltas(by_hand).values()]
    start = [a.detach().clone() for a in scales]
    optimizer = torch.optim.Adam(scales, lr=1e-3, betas=(0.9, 0.999))
    first, second, third = batches()
    for some in ([first, second], [third, first]):
        optimizer.zero_grad()
        error(by_hand.model, teacher, some).backward()
        optimizer.step()
    for a, delta, old in zip(scales, deltas(stack).values(), start, strict=True):
        assert a.item() == pytest.approx(delta.scale.item(), abs=1e-5)
        assert abs(a.item() - old.item()) > 1e-4


def test_scales_that_got_worse_are_left() -> None:
    plain, stack = tuned(**STILL), tuned(steps=1, learning_rate=10.0)
    compressed(plain)
    compressed(stack)
    before, after = stack.plugins["bitdelta"].state["logit_error"]
    assert before == after
    for one, other in zip(deltas(plain).values(), deltas(stack).values(), strict=True):
        assert float(one.scale) == float(other.scale)


def test_a_run_that_is_stopped_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = tuned(steps=1)
    before, moved = logits(stack.model), weights(stack)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        stack.compress(TEXTS, **TWO)
    assert all(torch.equal(tensor, moved[name]) for name, tensor in weights(stack).items())
    assert torch.equal(logits(stack.model), before)
    assert stack.trainable_parameters() == sum(tensor.numel() for tensor in moved.values())
    monkeypatch.undo()
    stack.compress(TEXTS, **TWO)
    assert deltas(stack)


# ----------------------------------------------------------------------------------------------------------- on disk
def header(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(size))


def test_bits_on_disk(tmp_path: Path) -> None:
    stack = tuned("qwen2", **STILL)
    dense = stack.save(tmp_path / "dense") / "bitdelta.safetensors"
    assert stack.evaluate(["a text"], metrics=["bitdelta"])["bits_per_weight"].value == 0
    numbers = {
        site.path: site.in_features * site.out_features for site in stack.view("bitdelta").linears("all")
    }
    stack.compress(TEXTS, **TWO)
    file = stack.save(tmp_path / "signs") / "bitdelta.safetensors"
    stored = header(file)
    spans = {name: span["data_offsets"] for name, span in stored.items() if name != "__metadata__"}
    taken = {name: end - start for name, (start, end) in spans.items()}
    for path, n in numbers.items():
        assert taken[f"{path}.packed"] == n // 8
        assert taken[f"{path}.scale"] == 4
        others = [size for name, size in taken.items() if name.startswith(f"{path}.weight")]
        assert sum(others) == 0, "a matrix that is the base's takes none"
    scores = stack.evaluate(["a text"], metrics=["bitdelta"])
    packed = sum(size for name, size in taken.items() if name.endswith((".packed", ".scale")))
    assert scores["packed_bytes"].value == packed == sum(n // 8 + 4 for n in numbers.values())
    assert scores["bits_per_weight"].value == pytest.approx(8 * packed / sum(numbers.values()))
    assert 1 < scores["bits_per_weight"].value < 1.1
    kept = sum(taken.values()) - packed
    ends = [span["data_offsets"][1] for name, span in header(dense).items() if name != "__metadata__"]
    assert 30 * packed < max(ends) - kept  # float32 matrices


def test_two_tenants_of_one_base(tmp_path: Path) -> None:
    base, found = tiny("llama"), {}
    for seed in (1, 2):
        stack = tuned(seed=seed, **STILL)
        stack.compress(TEXTS, **TWO)
        stack.save(tmp_path / str(seed))
        found[seed] = logits(stack.model)
    for seed in (1, 2, 1):
        tenant = peftx.load(tmp_path / str(seed), model=base, tokenizer=tiny_tokenizer())
        assert torch.equal(logits(base), found[seed])
        tenant.remove("bitdelta")
        assert torch.equal(logits(base), logits(tiny("llama")))


def test_merged_and_exported(tmp_path: Path) -> None:
    stack = tuned("gpt2", **STILL)
    stack.compress(TEXTS, **TWO)
    before = logits(stack.model)
    plain = type(stack.model).from_pretrained(stack.export(tmp_path / "dense"))
    torch.testing.assert_close(logits(plain), before, atol=1e-4, rtol=1e-4)


def test_it_may_be_packed_further() -> None:
    packing = PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)
    stack = Stack(tiny("llama"), [BitDelta(**STILL), packing], tokenizer=tiny_tokenizer())
    stack.compress(TEXTS, ["bitdelta"], **TWO)
    before = logits(stack.model)
    stack.compress(TEXTS, ["prefixquant"], **TWO)
    torch.testing.assert_close(logits(stack.model), before, atol=0.1, rtol=0.1)


# ------------------------------------------------------------------------------------------- fine-tuned elsewhere
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_a_folder(arch: str, tmp_path: Path) -> None:
    stack = tuned(arch, **STILL)
    expected, moved = logits(stack.model), weights(stack)
    stack.export(tmp_path / "tuned")
    other = Stack(
        tiny(arch), [BitDelta(finetuned=str(tmp_path / "tuned"), **STILL)], tokenizer=tiny_tokenizer()
    )
    assert all(torch.equal(tensor, moved[name]) for name, tensor in weights(other).items())
    torch.testing.assert_close(logits(other.model), expected)
    stack.compress(TEXTS, **TWO)
    other.compress(TEXTS, **TWO)
    assert torch.equal(logits(other.model), logits(stack.model))
    other.save(tmp_path / "bundle")
    (tmp_path / "tuned").rename(tmp_path / "gone")
    loaded = peftx.load(tmp_path / "bundle", model=tiny(arch), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded.model), logits(other.model))


def refused(finetuned: Path, model: PreTrainedModel) -> PeftxError:
    with pytest.raises(PeftxError) as caught:
        Stack(model, [BitDelta(finetuned=str(finetuned))], tokenizer=tiny_tokenizer())
    return caught.value


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_what_is_no_fine_tune(tmp_path: Path) -> None:
    base = tiny("llama")
    before = logits(base)
    said = str(refused(saved(tiny("qwen2"), tmp_path / "qwen2"), base))
    assert "bitdelta" in said
    assert (
        "is no fine-tune of this base: model.layers.0.self_attn.k_proj.bias is in one of the two alone"
        in said
    )
    assert torch.equal(logits(base), before)
    short = tiny("llama", vocab_size=300)
    assert re.search(
        r"lm_head.weight is \d+x32, and the base's \d+x32",
        str(refused(saved(short, tmp_path / "short"), base)),
    )
    tied = tiny("llama", tie_word_embeddings=True)
    error = refused(saved(base, tmp_path / "untied"), tied)
    assert "is no fine-tune of this base" in str(error)
    assert "tied alike" in str(error.hint)


def test_a_bundle_of_an_adapter(tmp_path: Path) -> None:
    saved(tiny("llama"), tmp_path / "base")
    stack = Stack(str(tmp_path / "base"), [Lora(rank=2)])
    stack.save(tmp_path / "lora")
    assert "is in one of the two alone" in str(refused(tmp_path / "lora", tiny("llama")))


def test_in_a_pipeline(tmp_path: Path) -> None:
    spec = (
        "peftx: 1\nmodel: peftx:tiny\n"
        f"data: {{train: '{tmp_path / 'train.jsonl'}', calibration: '{tmp_path / 'train.jsonl'}'}}\n"
        "stack: [{use: bitdelta, PHASE with: {steps: 1, targets: 'mlp.down layers=0'}}]\n"
        f"train: {{steps: 1, batch_size: 1}}\noutput: '{tmp_path / 'out'}'\n"
    )
    (tmp_path / "train.jsonl").write_text('{"prompt": "a cat", "completion": "sat"}\n' * 12)
    with pytest.raises(PeftxError, match="no fine-tuned model yet") as caught:
        load_run(spec.replace("PHASE ", "")).run()
    assert "phase: after-training" in str(caught.value.hint)
    load_run(spec.replace("PHASE", "phase: after-training,")).run()
    assert "model.layers.0.mlp.down_proj.packed" in header(tmp_path / "out" / "bitdelta.safetensors")


def test_refused() -> None:
    with pytest.raises(ArchitectureError, match="gives no logits of LlamaModel"):
        Stack(tiny("llama", head="base"), [BitDelta()], tokenizer=tiny_tokenizer())
    with pytest.raises(ArchitectureError, match="gives no logits of ViTForImageClassification"):
        Stack(tiny("vit"), [BitDelta()])
    packing = PrefixQuant(weight_bits=8, activation_bits=16, kv_bits=16)
    stack = Stack(tiny("llama"), [packing, BitDelta()], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["prefixquant"], **TWO)
    with pytest.raises(ConflictError, match=r"q_proj is packed already"):
        stack.inject()
