"""What changes the output is in the bundle, or refused; nothing is read or written in silence."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftx
from peftx import Claim, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.engines import models
from peftx.engines.bundle import read_manifest
from peftx.engines.files import replacing, staging
from peftx.engines.models import load_model
from peftx.errors import BundleError, DataError, MergeError, PeftxError, UnsupportedError
from peftx.interop import from_peft
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_compacter import Compacter
from peftx_lora import Lora
from peftx_lt_sft import LtSft

IDS = torch.arange(3, 19).reshape(2, 8)
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def moved(stack: Stack) -> Stack:
    with torch.no_grad():
        for id in stack.plugins:
            for p in stack.ledger.parameters(id):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p) * 0.1)
    return stack


# -- surroundings ----------------------------------------------------------------------------------------------------


def test_the_tokenizer_as_it_was_changed_is_in_the_bundle(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2)])
    plain = stack.save(tmp_path / "plain")
    assert not (plain / "tokenizer").exists()  # the base's place has it
    stack.tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    again = peftx.load(stack.save(tmp_path / "changed"))
    assert again.tokenizer.chat_template == stack.tokenizer.chat_template
    assert peftx.load(plain).tokenizer.chat_template != stack.tokenizer.chat_template


def test_another_tokenizer_beside_the_base_is_refused(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [])
    stack.model.save_pretrained(tmp_path / "base")
    stack.tokenizer.save_pretrained(tmp_path / "base")
    bundle = Stack(str(tmp_path / "base"), [Lora(rank=2)]).save(tmp_path / "bundle")
    stack.tokenizer.add_tokens(["<tool>"])
    stack.tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(BundleError, match="has another tokenizer than the base"):
        peftx.load(bundle)
    assert peftx.load(bundle, tokenizer=stack.tokenizer)


def test_generation_settings_come_back_and_other_configurations_are_refused(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    stack.model.generation_config.repetition_penalty = 1.7
    folder = stack.save(tmp_path / "bundle")
    again = peftx.load(folder, model=tiny("llama"))
    assert again.model.generation_config.repetition_penalty == 1.7
    assert again.tokenizer.get_vocab() == stack.tokenizer.get_vocab()
    other = tiny("llama")
    other.config.rms_norm_eps = 0.5
    with pytest.raises(BundleError, match=r"configured otherwise: rms_norm_eps was 1e-06, here it is 0\.5"):
        peftx.load(folder, model=other)


def test_a_base_that_somebody_changed_is_not_saved_without_the_change(tmp_path: Path) -> None:
    class Grows(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.module.resize_token_embeddings(330, mean_resizing=False)

    class Writes(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            with torch.no_grad():  # one number in the middle of a matrix
                model.module.get_parameter("model.layers.0.mlp.up_proj.weight")[17, 16] += 1

    for plugin, name in ((Grows(), "embed_tokens"), (Writes(), "up_proj")):
        stack = Stack(tiny("llama"), [plugin, Lora(rank=2)], tokenizer=tiny_tokenizer())
        with pytest.raises(BundleError, match=rf"{name}\.weight.* of the base changed"):
            stack.save(tmp_path / "bundle")


@pytest.mark.parametrize(
    "plugin", [Lora(rank=2), LtSft(phase1=1), Compacter()], ids=lambda p: type(p).__name__
)
def test_a_stack_that_was_cast_saves_and_loads(plugin: Plugin, tmp_path: Path) -> None:
    stack = moved(Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer()))
    stack.model.to(torch.bfloat16)
    folder = stack.save(tmp_path / "bundle")
    again = peftx.load(folder, model=tiny("llama").to(torch.bfloat16))
    assert torch.equal(logits(again.model), logits(stack.model))


# -- bases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    stack = Stack("peftx:tiny", [])
    stack.model.save_pretrained(tmp_path / "base")
    stack.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_missing_matrix_is_no_random_one(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match=r"1 missing \(model\.layers\.2\.mlp\.up_proj\.weight\)"):
        Stack(str(base), [])


def test_a_checkpoint_with_plugins_on_it_is_no_base(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2)])
    with pytest.warns(UserWarning, match="read this checkpoint without lora"):
        stack.model.save_pretrained(tmp_path / "m")
    with pytest.raises(
        BundleError, match=r"84 too many|too many .*peftx.*\n  hint: it was saved with plugins on it"
    ):
        Stack(str(tmp_path / "m"), [])
    stack.remove("lora")
    stack.model.save_pretrained(tmp_path / "plain")  # no word: there is nothing to lose
    assert Stack(str(tmp_path / "plain"), [])


def test_packed_layers_have_no_plain_checkpoint(tmp_path: Path) -> None:
    class Packs(Plugin):
        claims = {Claim.QUANTIZES}

        @hookimpl
        def compress(self, model: ModelView) -> None:
            for site in model.linears("mlp", whole=True):
                site.replace(QuantLinear.from_linear(site.module, bits=8))

    stack = Stack(tiny("llama"), [Packs()], tokenizer=tiny_tokenizer())
    stack.compress(["a text to look at"])
    with pytest.raises(
        BundleError, match="is packed, and a plain checkpoint would be read with random numbers"
    ):
        stack.model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_exports_leave_no_adapter_behind(tmp_path: Path) -> None:
    """Compacter trains norms, which a checkpoint holds, and has adapters, which it does not."""
    for plugins in ([Compacter()], [Lora(rank=2), Compacter()]):
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        with pytest.raises(MergeError, match="'compacter' does not fold into the weights"):
            stack.export(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_checkpoints_dtype_is_the_default(base: Path) -> None:
    model, _ = load_model(str(base))
    assert model.dtype == torch.float32
    model.to(torch.bfloat16).save_pretrained(base)
    stack = Stack(str(base), [Lora(rank=2)])
    assert stack.model.dtype == torch.bfloat16
    moved(stack).export(base.parent / "merged")
    tensors = load_file(base.parent / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert Stack(str(base), [], dtype="float32").model.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_decides_about_no_dtype(base: Path, mode: Any) -> None:
    """What a device can compute is tried by a backward pass, and remembered."""
    models._computes.cache_clear()
    half = tiny("llama").to(torch.bfloat16)
    half.save_pretrained(base)
    with mode():
        loaded, _ = load_model(str(base))
    assert loaded.dtype == torch.bfloat16


def test_an_adapter_folder_without_its_weights_is_named(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Lora(rank=4)])
    with pytest.raises(BundleError, match=r"adapter_config\.json' cannot be read: No such file"):
        from_peft(stack, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    with pytest.raises(BundleError, match=r"adapter_model\.safetensors' cannot be read"):
        from_peft(stack, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(BundleError, match=r"only as a pickle \(adapter_model\.bin\)"):
        from_peft(stack, tmp_path)


def test_a_device_that_is_not_there_is_found_before_the_weights() -> None:
    with pytest.raises(PeftxError, match=r"device 'xpu' cannot be used.*\n  hint: device: cpu, or auto"):
        load_model("peftx:tiny", device="xpu")


# -- sparse training -------------------------------------------------------------------------------------------------


def test_sparse_training_is_saved_sparsely(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [LtSft(density=0.01, phase1=1)])
    stack.train("peftx:sample/train.jsonl", steps=3, batch_size=2, learning_rate=1e-2)
    folder = stack.save(tmp_path / "bundle")
    whole = sum(p.nbytes for p in stack.ledger.parameters("lt-sft"))
    assert (folder / "lt-sft.safetensors").stat().st_size < 0.05 * whole
    assert read_manifest(folder).plugins[0].sparse
    again = peftx.load(folder)
    for name, tensor in stack.ledger.tensors("lt-sft").items():
        assert torch.equal(again.ledger.tensors("lt-sft")[name], tensor)
    assert torch.equal(logits(again.model), logits(stack.model))


# -- places ----------------------------------------------------------------------------------------------------------


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer()).save(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "manifest.json").exists()


def test_threads_that_save_to_one_place_do_not_meet(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    errors: list[BaseException] = []

    def save() -> None:
        try:
            for _ in range(3):
                stack.save(tmp_path / "bundle")
        except BaseException as error:  # noqa: BLE001  whatever a thread meets is what is looked at
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert peftx.load(tmp_path / "bundle", model=tiny("llama"))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_swept_away_before_its_lock_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = fcntl.flock, []

    def late(handle: int, kind: int) -> None:
        if not swept:  # another call comes between the making of the folder and its lock
            (folder,) = tmp_path.iterdir()
            swept.append(folder)
            folder.rmdir()
        lock(handle, kind)

    monkeypatch.setattr("peftx.engines.locks.fcntl.flock", late)
    with replacing(tmp_path / "b", marker="x") as new:
        (new / "x").write_text("whole")
    assert swept
    assert (tmp_path / "b" / "x").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_who_comes_second_to_an_empty_place_takes_it_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "b", marker="x") as late:
        with replacing(tmp_path / "b", marker="x") as early:
            (early / "x").write_text("early")
        (late / "x").write_text("late")
    assert (tmp_path / "b" / "x").read_text() == "late"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    lines = ["import os", "from pathlib import Path", "from peftx.engines.files import staging"]
    lines.append(f"with staging(Path({str(tmp_path / 'b')!r})): os._exit(9)")
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with staging(tmp_path / "b") as mine, staging(tmp_path / "b") as other:
        assert mine.exists()
        assert other.exists()
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BundleError), replacing(tmp_path / "loop", marker="x"):
        pass


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_last_whole_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"steps": 4, "batch_size": 2, "checkpoint_every": 1, "output": tmp_path / "run"}
    straight = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    straight.train(ROWS, **options)
    newest, older = tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-3"
    tensors = load_file(newest / "trained.safetensors")
    tensors[min(tensors)][0, 0] += 1
    save_file(tensors, newest / "trained.safetensors")
    resumed = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    resumed.train(ROWS, **options, resume=True)
    assert "trained.safetensors' is corrupted" in caplog.text
    assert torch.equal(logits(resumed.model), logits(straight.model))
    (older / "checksums.json").unlink()
    with pytest.raises(BundleError, match=r"checksums\.json is missing"):
        resumed.train(ROWS, **options, resume=older)


# -- what models do --------------------------------------------------------------------------------------------------


def test_a_masked_language_model_fills_in(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    stack = Stack(tiny("bert"), [Lora(rank=4)], tokenizer=tokenizer)
    with pytest.raises(
        UnsupportedError, match="fills in masked tokens, and rows of format 'prompt-completion'"
    ):
        stack.train(ROWS, steps=1)
    texts = [{"text": "the sea is wide and the sea is deep"}] * 4
    with pytest.raises(UnsupportedError, match="no mask token"):
        stack.train(texts, steps=1)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    seen: list[dict[str, Tensor]] = []
    stack.model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    report = stack.train(texts, steps=30, batch_size=4, learning_rate=2e-2, seed=3)
    assert report.last_loss < report.first_loss
    hidden = sum(float((call["input_ids"] == tokenizer.mask_token_id).sum()) for call in seen)
    counted = sum(float((call["labels"] != -100).sum()) for call in seen)
    everything = sum(float(call["attention_mask"].sum()) for call in seen)
    assert 0.10 < counted / everything < 0.20
    assert 0.65 < hidden / counted < 0.92
    assert (
        len({tuple(call["labels"].flatten().tolist()) for call in seen}) > 20
    )  # another choice in each step


def test_a_sequence_classifier_learns_names_with_its_head(tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} {n}", "label": label}
        for n in range(6)
        for word, label in (("aaaa", "0"), ("zzzz", "1"))
    ]
    stack = Stack(tiny("bert", head="classification"), [Lora(rank=4)], tokenizer=tiny_tokenizer())
    head = {n for n, p in stack.model.named_parameters() if p.requires_grad and "peftx" not in n}
    assert head == {"classifier.weight", "classifier.bias"}
    stack.train(rows, steps=30, batch_size=6, learning_rate=1e-2)
    named = [{"text": r["text"], "label": f"LABEL_{r['label']}"} for r in rows]
    assert stack.evaluate(named, metrics=["accuracy"])["accuracy"].value == 1.0
    again = peftx.load(stack.save(tmp_path / "b"), model=tiny("bert", head="classification"))
    assert again.classify("zzzz 9") == "LABEL_1"
    with pytest.raises(DataError, match=r"label 'x' is not among LABEL_0, LABEL_1 \(the model's own names\)"):
        stack.train([{"text": "a", "label": "x"}], steps=1)


def test_ids_and_lengths_without_a_place_are_found_before_the_first_step() -> None:
    def attempt(rows: list[dict[str, str]], change: str = "", **options: Any) -> None:
        tokenizer = tiny_tokenizer()
        if change:
            tokenizer.add_tokens([change])
        Stack(tiny("gpt2", vocab_size=259), [Lora(rank=2)], tokenizer=tokenizer).train(
            rows, steps=1, batch_size=2, **options
        )

    with pytest.raises(
        DataError, match=r"row 1 .*'<tool>' has id 259, and the model's embedding has 259 rows"
    ):
        attempt([ROWS[0], {"prompt": "<tool>", "completion": "b"}], "<tool>")
    with pytest.raises(
        DataError, match=r"a block of the texts has 256 input_ids, and the model has positions for 128"
    ):
        attempt([{"text": "word " * 60}], max_length=256)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"pad_token": "[PAD]"}
    )  # its id is beyond the embedding, and is hidden anyway
    stack = Stack(tiny("gpt2", vocab_size=259), [Lora(rank=2)], tokenizer=tokenizer)
    assert stack.train([ROWS[0], {"prompt": "a", "completion": "b"}], steps=1, batch_size=2).steps == 1


def test_folds_round_once() -> None:
    class Adds(Delta):
        def __init__(self, out: int, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, width)), nn.Parameter(torch.randn(out, 3))

        def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight + self.b @ self.a, bias

    class Add(Plugin):
        claims = {Claim.MERGEABLE}

        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.linears("mlp.up"):
                site.attach(Adds(site.out_features, site.in_features))

    stack = Stack(tiny("llama").to(torch.bfloat16), [Add()])
    part = stack.ledger.of("add")[0]
    weight, delta = part.place.weight.detach().float(), part.module  # type: ignore[union-attr]
    expected = (weight + delta.b.float() @ delta.a.float()).bfloat16()  # type: ignore[union-attr, operator]
    stack.merge()
    assert torch.equal(part.place.weight, expected)  # type: ignore[union-attr]
    assert delta.a.dtype == torch.bfloat16


def test_a_tokenizer_that_makes_no_tokens(base: Path) -> None:
    file = base / "tokenizer.json"
    found = json.loads(file.read_text("utf-8"))
    found["post_processor"] = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    file.write_text(json.dumps(found), "utf-8")
    with pytest.raises(BundleError, match=r"cannot be read.*no tokens of text"):
        load_model(str(base))


def test_settings_that_no_file_can_hold(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2)])
    stack.tokenizer.chat_template = "\ud800"
    with pytest.raises(BundleError, match="tokenizer's settings"):
        stack.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("kind", ["file", "in a file"])
def test_checkpoints_into_a_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "taken").write_text("mine", "utf-8")
    output = tmp_path / "taken" if kind == "file" else tmp_path / "taken" / "inside"
    with pytest.raises(BundleError, match=r"nothing can be written in .*taken"):
        Stack("peftx:tiny", [Lora(rank=2)]).train(ROWS, steps=1, output=output)
    assert (tmp_path / "taken").read_text("utf-8") == "mine"


def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path) -> None:
    from peftx.interop import to_peft

    folder = to_peft(Stack("peftx:tiny", [Lora(rank=2)]), tmp_path / "theirs")
    for targets in ("attention.q", "attention.q,v"):
        stack = Stack("peftx:tiny", [Lora(rank=4, targets=targets)])
        with pytest.raises(PeftxError, match="theirs"):
            from_peft(stack, folder)


NO_ROWS = [None, 5, b"bytes"]


@pytest.mark.parametrize("given", NO_ROWS, ids=repr)
def test_what_is_no_list_of_texts_or_rows_is_refused_by_its_kind(given: Any) -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    asked = {
        "prompts": lambda: stack.generate(given),
        "texts": lambda: stack.embed(given),
        "rows": lambda: stack.train(given, steps=1),
    }
    for what, ask in asked.items():
        with pytest.raises(DataError, match=f"{what}: a list is wanted, or a file, and this is a "):
            ask()
    if given is not None:  # which stands for no rows at all
        with pytest.raises(DataError, match="rows: a list is wanted"):
            stack.evaluate(given)
    with pytest.raises(DataError, match="text 1 must be a string"):
        stack.embed(["a", given])


def test_rows_of_a_generator_are_rows() -> None:
    rows = [{"prompt": "one", "completion": " two"}, {"prompt": "three", "completion": " four"}]
    found = []
    for given in (rows, iter(rows)):
        stack = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
        found.append(stack.train(given, steps=2, batch_size=2, learning_rate=1e-3).losses)
    assert found[0] == found[1]


def test_a_base_that_another_library_packed_is_named(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="the weights are packed") as caught:
        Stack(str(tmp_path), [Lora(rank=2)])
    assert "nf4" in str(caught.value.hint)
