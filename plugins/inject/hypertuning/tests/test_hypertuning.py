from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.parts import AttentionPart, CallPart
from peftx.testing import conformance
from peftx.testing.models import EOS, PAD, example_inputs, output_of, tiny, tiny_tokenizer
from peftx_hypertuning import Hypermodel, Hypertuning, prefix, quarters, read
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("hypertuning")

P = 3
IDS = torch.arange(3, 15).reshape(2, 6)
FEW = torch.tensor([[0, 40, 41, 42, 43], [0, 50, 51, -1, -1]])
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
LOGITS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}


def stack_of(arch: str, *plugins: Any, **options: Any) -> Stack:
    return Stack(tiny(arch), [*plugins, Hypertuning(length=P, **options)], tokenizer=tiny_tokenizer())


def hypermodel(stack: Stack) -> Hypermodel:
    (part,) = stack.ledger.of("hypertuning", CallPart)
    return part.module


def inputs_of(arch: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if arch in ("t5", "bart") else {})}


# -- phi -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [("llama", [(2, 8, 8)] * 2), ("t5", [(4, 8, 8)] * 6), ("bart", [(4, 8, 8)] * 2 + [(2, 16, 16)] * 4),
     ("deepseek_v3", [(4, 12, 8)] * 2)],
)  # fmt: skip
@torch.no_grad()
def test_phi_has_the_shape_of_every_attentions_keys_and_values(
    arch: str, sizes: list[tuple[int, int, int]]
) -> None:
    stack = stack_of(arch)
    found = [(tuple(K.shape), tuple(V.shape)) for K, V in hypermodel(stack)(FEW)]
    assert found == [((2, heads, P, k), (2, heads, P, v)) for heads, k, v in sizes]
    alone = prefix(stack, ["a b", "c d"])
    assert [(tuple(K.shape), tuple(V.shape)) for K, V in alone] == [
        ((heads, P, k), (heads, P, v)) for heads, k, v in sizes
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_phi_depends_on_the_rows_own_examples_alone(arch: str) -> None:
    H = hypermodel(stack_of(arch))
    both, swapped, short = H(FEW), H(FEW.flip(0)), H(FEW[1:, :3])
    for (K, V), (K2, V2), (K3, V3) in zip(both, swapped, short, strict=True):
        torch.testing.assert_close(K, K2.flip(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(V, V2.flip(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(K[1:], K3, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(V[1:], V3, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(K[0], K[1], atol=1e-3)


@torch.no_grad()
def test_each_attention_has_its_own_prefix_and_kinds_share_an_mlp() -> None:
    H = hypermodel(stack_of("t5"))
    phi = H(FEW)
    for one in range(6):
        for other in range(one):
            assert not torch.allclose(phi[one][0], phi[other][0], atol=1e-3)
    assert len(H.e) == 6
    assert sorted(H.mlps) == ["decoder_attention_4x8", "decoder_cross_attention_4x8", "encoder_attention_4x8"]


# -- M ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bart"])
@torch.no_grad()
def test_computes_what_a_trained_prefix_with_these_rows_computes(arch: str) -> None:
    """P-Tuning v2 whose keys and values are phi: the examples of one task as a prefix that needs them no more."""
    stack = stack_of(arch)
    targets = "attention cross_attention" if arch in ("t5", "bart") else "attention"
    other = Stack(tiny(arch), [PTuningV2(length=P, dropout=0, targets=targets)], tokenizer=tiny_tokenizer())
    parts, texts = other.ledger.of("p-tuning-v2", AttentionPart), ["ab c", "de f"]
    paths = [site.path for site in stack.view("hypertuning").attentions()]
    for part in parts:
        K, V = prefix(stack, texts)[paths.index(part.key.removesuffix(".attention"))]
        part.module.prompt.rows.copy_(torch.stack((K, V)))
    expected = output_of(other.model, inputs_of(arch))
    found = stack.model(**inputs_of(arch), examples=read(stack, texts)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, output_of(stack.model, inputs_of(arch)), atol=1e-4)


@pytest.mark.parametrize("others", [(), (PromptTuning(length=2, init="uniform"),)])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_rows_of_a_batch_have_their_own_examples_in_generation(arch: str, others: tuple[Any, ...]) -> None:
    """With beams, cache and pads each row goes on as it does alone, with its own examples."""
    stack = stack_of(arch, *others)
    for parameter in stack.ledger.parameters("hypertuning"):
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    left = arch != "t5"
    short = torch.full((1, 6), PAD)
    short[:, slice(2, 6) if left else slice(0, 4)] = IDS[1:, :4]
    ids = torch.cat((IDS[:1], short))
    mask = (ids != PAD).long()
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        with stack.columns(examples=FEW):
            found = stack.model.generate(ids, attention_mask=mask, **GREEDY, **LOGITS, **options)
        for row, (own, few) in enumerate(((IDS[:1], FEW[:1]), (IDS[1:, :4], FEW[1:, :3]))):
            with stack.columns(examples=few):
                alone = stack.model.generate(
                    own, attention_mask=torch.ones_like(own), **GREEDY, **LOGITS, **options
                )
            assert torch.equal(found.sequences[row, -5:], alone.sequences[0, -5:])
            beams = options.get("num_beams", 1)
            torch.testing.assert_close(found.logits[0][row * beams], alone.logits[0][0], rtol=1e-3, atol=1e-4)
    with stack.columns(examples=FEW.flip(0)):
        other = stack.model.generate(ids, attention_mask=mask, **GREEDY, **LOGITS)
    assert not torch.allclose(other.logits[0], found.logits[0], atol=1e-3)


@torch.no_grad()
def test_reads_once_for_all_that_is_written() -> None:
    calls: list[int] = []
    for arch, times in (("llama", 1), ("t5", 2)):  # T5's encoder runs before there is a cache
        stack = stack_of(arch)
        hypermodel(stack).register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        with stack.columns(examples=FEW):
            stack.model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY, num_beams=2)
        assert len(calls) == times


def test_examples_are_read_as_the_model_reads_prompts() -> None:
    stack = stack_of("llama")
    assert stack.tokenizer.decode(read(stack, ["a b", "c"])[0]) == "a b\n\nc"
    assert read(stack, ()).tolist() == [[EOS]], "of no examples a token all the same"
    bundled = Stack("peftx:tiny", [Hypertuning()])
    first = bundled.tokenizer("a")["input_ids"][0]
    assert read(bundled, ["a"])[0, 0] == read(bundled, ())[0, 0] == first


@torch.no_grad()
def test_one_set_of_examples_serves_a_whole_batch() -> None:
    stack = stack_of("llama")
    one = stack.model(IDS, examples=FEW[:1].expand(2, -1)).logits
    with stack.columns(examples=FEW[:1]):
        torch.testing.assert_close(stack.model(IDS).logits, one)
    assert stack.generate("ab", max_new_tokens=2) is not None


# -- H ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_starts_as_the_model_beside_whatever_stands_on_it() -> None:
    for others in ((), (PromptTuning(length=2), PTuningV2(length=2))):
        stack = stack_of("llama", *others)
        own, plain = hypermodel(stack).H.towers[0], tiny("llama").model
        assert torch.equal(own(IDS).last_hidden_state, plain(IDS).last_hidden_state)


def test_the_gradient_goes_through_the_frozen_model_into_the_hypermodel() -> None:
    stack = stack_of("llama")
    before = {name: p.clone() for name, p in tiny("llama").named_parameters()}
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
    stack.train_step({"input_ids": IDS, "labels": IDS, "examples": FEW}, optimizer=optimizer)
    moved = {n: bool((p - before[n]).any()) for n, p in stack.model.named_parameters() if n in before}
    assert not any(moved.values())
    H, start = hypermodel(stack), tiny("llama").model
    for name, parameter in H.H.towers[0].named_parameters():
        assert (parameter != start.get_parameter(name)).any(), name
    stack = stack_of("llama")
    stack.model(IDS, labels=IDS, examples=FEW).loss.backward()
    rows = hypermodel(stack).H.embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert rows == [0, 40, 41, 42, 43, 50, 51], "what it read, and no pad"


# -- rows ------------------------------------------------------------------------------------------------------------


def test_examples_are_other_rows_of_the_task() -> None:
    rows = [{"prompt": f"{task}{n}", "completion": "!", "task": task} for n in range(5) for task in "ab"]
    stack = stack_of("llama", shots=3)
    data = stack.prepare(training_data(stack, rows))
    for row in data.train:
        texts = stack.tokenizer.decode(row["examples"], skip_special_tokens=True).split("\n\n")
        assert len(set(texts)) == 3
        assert all(text[0] == row["task"] and text.endswith(" !") for text in texts)
        assert not any(text.startswith(row["prompt"]) for text in texts)
    again = stack.prepare(training_data(stack, rows))
    assert again.train["examples"][:] == data.train["examples"][:]


def test_texts_are_cut_into_what_is_read_and_what_is_gone_on_with() -> None:
    text = "one two three four five six seven eight"
    assert quarters(text) == ["one two", "three four", "five six", "seven eight"]
    assert [len(part.split()) for part in quarters("a b c d e f g")] == [1, 2, 2, 2]
    stack = stack_of("llama")
    data = stack.prepare(training_data(stack, [{"text": text}]))
    (row,) = data.train
    assert (row["prompt"], row["completion"]) == ("three four", "five six")
    assert stack.tokenizer.decode(row["examples"], skip_special_tokens=True) == "one two\n\nseven eight"
    assert stack.train([{"text": text}] * 2, steps=1, batch_size=2).steps == 1


def training_data(stack: Stack, rows: list[dict[str, str]]) -> Any:
    from peftx.engines.training.run import as_training_data

    return as_training_data(stack, rows, seed=0, max_length=64)


def test_reads_tasks_that_it_has_not_seen() -> None:
    """Each task is one letter that answers everything, and stands in the examples alone. On letters that are the answer
    of no row, one pass of H beats the frozen model, and beats itself with another task's examples."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isdigit()]
    random.Random(0).shuffle(letters)
    seen, unseen = letters[:70], letters[70:78]
    rows = [{"prompt": f"{n}", "completion": letter, "task": letter} for letter in seen for n in range(3)]
    stack = stack_of("t5", shots=1)
    stack.train(rows, steps=50, batch_size=16, learning_rate=5e-3, schedule="constant")

    def loss(examples_of: str, answer: str) -> float:
        ids, labels = (stack.tokenizer(text, return_tensors="pt")["input_ids"] for text in ("1", answer))
        with stack.columns(examples=read(stack, [f"2 {examples_of}"])), torch.no_grad():
            return float(stack.model(ids, labels=labels).loss)

    def mean(answers: list[str], examples_of: list[str]) -> float:
        return sum(map(loss, examples_of, answers)) / len(answers)

    right, wrong = mean(unseen, unseen), mean(unseen, unseen[1:] + unseen[:1])
    with stack.disabled():
        frozen = mean(unseen, unseen)
    assert right < frozen - 0.3
    assert right < wrong - 0.5


def test_bundles_hold_the_hypermodel(tmp_path: Any) -> None:
    stack = stack_of("t5")
    with torch.no_grad():
        for parameter in stack.ledger.parameters("hypertuning"):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        expected = stack.model(**inputs_of("t5"), examples=FEW).logits
        again = peftx.load(stack.save(tmp_path / "b"), model=tiny("t5"), tokenizer=tiny_tokenizer())
        assert torch.equal(again.model(**inputs_of("t5"), examples=FEW).logits, expected)


def test_what_has_no_place_is_refused() -> None:
    for arch in ("whisper", "llava", "bert", "clip"):
        with pytest.raises(ArchitectureError, match=f"hypertuning: {arch} answers no prompts of text alone"):
            stack_of(arch)
    stack = stack_of("llama")
    with pytest.raises(PeftxError, match="130 tokens and 2 vectors are to be read"):
        stack.model(**example_inputs(stack.model), examples=torch.zeros(2, 130, dtype=torch.int64))
    with pytest.raises(PeftxError, match="the column 'examples' has 3 rows, and the batch 2"):
        stack.model(IDS, examples=FEW[:1].expand(3, -1))
