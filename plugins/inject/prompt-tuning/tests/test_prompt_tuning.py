from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("prompt-tuning")

SETTINGS = [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("qwen2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]


def prompt(stack: Stack) -> Tensor:
    (P,) = stack.ledger.parameters("prompt-tuning")
    return P


def start(*, ends: bool = False, **options: object) -> Tensor:
    """First values of P on a tiny Llama; `ends`: its tokenizer puts BOS and EOS around a text."""
    tokenizer = tiny_tokenizer(ends=ends)
    return prompt(Stack(tiny("llama"), [PromptTuning(**options)], tokenizer=tokenizer)).detach()


def table() -> Tensor:
    return tiny("llama").get_input_embeddings().weight.detach()


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize(("arch", "task"), SETTINGS)
def test_equals_hf_peft(arch: str, task: str, padding: str | None) -> None:
    """Logits, loss and the gradient of P. Labels begin behind the first token: PEFT alone predicts that one from P."""
    from peft import PromptTuningConfig, get_peft_model

    stack = Stack(tiny(arch), [PromptTuning(length=4)])
    config = PromptTuningConfig(
        task_type=task, num_virtual_tokens=4, token_dim=32, num_layers=2, num_attention_heads=4
    )
    theirs = get_peft_model(tiny(arch), config)
    (embedding,) = (p for p in theirs.parameters() if p.requires_grad)
    embedding.data[:4] = prompt(
        stack
    ).data  # T5: PEFT holds as many rows for the decoder, and leaves them unused
    inputs = example_inputs(stack.model, padding=padding)
    real = inputs["attention_mask"].bool()
    labels = inputs.pop("decoder_input_ids", inputs["input_ids"]).clone()
    if arch != "t5":
        labels[~real] = -100
        labels[:, 0] = -100
    one, two = (model(**inputs, labels=labels) for model in (stack.model, theirs))
    one.loss.backward()
    two.loss.backward()
    behind = two.logits[:, -one.logits.shape[1] :]
    kept = real if arch != "t5" else slice(None)
    assert torch.allclose(one.logits[kept], behind[kept], rtol=0, atol=1e-6)
    assert torch.allclose(one.loss, two.loss, rtol=0, atol=1e-6)
    assert torch.allclose(prompt(stack).grad, embedding.grad[:4], rtol=0, atol=1e-6)
    assert prompt(stack).grad.abs().max() > 0.01


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
def test_embeddings_of_a_string_are_the_string(arch: str, padding: str | None) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real, words = mask.bool(), torch.tensor([70, 9, 200, 9])
    pads = [(~row).sum() for row in real]
    longer = torch.stack([torch.cat((i[:n], words, i[n:])) for i, n in zip(ids, pads, strict=True)])
    seen = torch.nn.functional.pad(mask, (0, 4), value=1)
    numbers = (seen.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(input_ids=longer, attention_mask=seen, position_ids=numbers).logits[:, 4:]
        stack = Stack(model, [PromptTuning(length=4)])
        prompt(stack).copy_(model.get_input_embeddings()(words))  # Gemma's scales
        found = model(**inputs).logits
    assert torch.allclose(found[real], expected[real], rtol=0, atol=2e-5)


def test_trained_and_saved_are_l_times_d(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [PromptTuning(length=7)], tokenizer=tiny_tokenizer())
    assert stack.trainable_parameters() == 7 * 32
    stack.save(tmp_path / "bundle")
    saved = [t for file in (tmp_path / "bundle").rglob("*.safetensors") for t in load_file(file).values()]
    assert [tuple(t.shape) for t in saved] == [(7, 32)]


def test_order_of_rows_matters() -> None:
    stack = Stack(tiny("llama"), [PromptTuning(length=4)])
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        before = output_of(stack.model, inputs)
        prompt(stack).copy_(prompt(stack)[[2, 0, 3, 1]])
        assert (output_of(stack.model, inputs) - before).abs().max() > 0.01  # rows have positions


def test_uniform_start() -> None:
    P = start(init="uniform", length=100)
    assert 0.49 < float(P.abs().max()) <= 0.5
    assert abs(float(P.mean())) < 0.02
    assert abs(float(P.var()) - 1 / 12) < 0.005


def test_vocabulary_start_draws_low_ids_once() -> None:
    P = start(length=12, frequent=12)
    rows = (P[:, None] == table()[None, :12]).all(-1)  # [12 rows, 12 ids]
    assert rows.sum(0).tolist() == rows.sum(1).tolist() == [1] * 12
    more = start(length=13, frequent=5)
    assert (more[:, None] == table()[None, :5]).all(-1).any(-1).all()


@pytest.mark.parametrize("ends", [False, True])
def test_text_start(ends: bool) -> None:
    """What a tokenizer puts around a text is not of the text."""
    ids = tiny_tokenizer()("Good?", add_special_tokens=False)["input_ids"]
    P = start(ends=ends, init="text", text="Good?", length=8, frequent=3)
    assert torch.equal(P[:5], table()[ids])
    assert (P[5:, None] == table()[None, :3]).all(-1).any(-1).all()  # left over: from the vocabulary


def test_labels_start() -> None:
    P = start(init="labels", labels=("a", "bad"), length=4, frequent=3)
    ids = [tiny_tokenizer()(word, add_special_tokens=False)["input_ids"] for word in ("a", "bad")]
    assert [len(row) for row in ids] == [1, 3]
    assert torch.equal(P[0], table()[ids[0][0]])
    assert torch.allclose(P[1], table()[ids[1]].mean(0))
    assert (P[2:, None] == table()[None, :3]).all(-1).any(-1).all()


def test_prompts_stand_in_the_order_of_the_stack() -> None:
    """Two prompts are one long one."""
    inputs = example_inputs(tiny("gpt2"))
    pair = Stack(tiny("gpt2"), [("one", PromptTuning(length=3)), ("two", PromptTuning(length=2))])
    whole = Stack(tiny("gpt2"), [PromptTuning(length=5)])
    rows = [next(pair.ledger.parameters(id)) for id in ("one", "two")]
    with torch.no_grad():
        prompt(whole).copy_(torch.cat(rows))
        assert torch.equal(output_of(pair.model, inputs), output_of(whole.model, inputs))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 0}, "length"),
        ({"init": "zeros"}, "init"),
        ({"frequent": 0}, "frequent"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"PromptTuning: {match}"):
        PromptTuning(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 128}, "length 128 leaves no room in the model's 128 free positions"),
        ({"init": "text"}, "init is 'text', but text is empty"),
        ({"init": "labels"}, "init is 'labels', but labels is empty"),
        ({"text": "Topic:"}, "init is 'vocabulary', but text is given"),
        ({"init": "text", "text": "Topic:", "labels": ["yes"]}, "init is 'text', but labels is given"),
        ({"init": "uniform", "frequent": 9}, "frequent 9, but init is 'uniform'"),
        ({"init": "text", "text": "Topic:", "length": 5}, "6 tokens of text in length 5"),
        ({"init": "labels", "labels": ["a", "b", "c"], "length": 2}, "3 labels in length 2"),
        ({"init": "labels", "labels": ["a", ""]}, "labels: '' has no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"prompt-tuning: {match}"):
        start(**options)


def test_a_bundle_names_every_option(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [PromptTuning(init="uniform")], tokenizer=tiny_tokenizer())
    loaded = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"))
    assert "frequent" in loaded.plugins["prompt-tuning"].config.model_fields_set
    Stack(tiny("llama"), [PromptTuning(loaded.plugins["prompt-tuning"].config)])  # as its pipeline.yaml would


@pytest.mark.parametrize("arch", ["vit", "whisper"])
def test_refuses_models_without_tokens(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"no token embedding|takes no inputs_embeds"):
        Stack(tiny(arch), [PromptTuning(length=2)])
