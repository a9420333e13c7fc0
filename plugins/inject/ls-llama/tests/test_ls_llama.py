"""LS-LLaMA: heads of texts and words, and attention without the causal mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack
from peftx.engines.data import CLASS_INDEX, Collator, pads_right
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError, UnsupportedError
from peftx.testing import conformance, plan_checks
from peftx.testing.kit import Planned
from peftx.testing.models import EOS, PAD, example_inputs, tiny, tiny_tokenizer
from peftx.toolkits.evaluation import evaluating
from peftx_lora import Lora
from peftx_ls_llama import LsLlama, max_of
from peftx_ntk_attention import NtkAttention
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("ls-llama")
WORDS = plan_checks(
    "ls-llama",
    options={"task": "token", "labels": ["O", "PER"]},
    models=["llama"],
    rows=[{"text": f"Ada {'walks ' * n}home", "label": "PER " + "O " * n + "O"} for n in range(6)],
    expected_failures=dict.fromkeys(
        ("classes_are_named", "base_is_measured_before_inject"), "a word has a class, and not a text"
    ),
)
UNMASKED = plan_checks(
    "ls-llama",
    options={"unmasked": True},
    models=["llama"],
    not_on=LsLlama.refuses | {"mamba": "no attention", "bloom": "its attention is not looked up by name"},
    expected_failures={
        "identity_at_start": "attention is another one",
        "effects_match_claims": "an object that is unmasked claims replaces-attention, and the class does not",
        "cached_equals_uncached": "a cache is refused",
        "padded_generation": "a cache is refused",
    },
)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(each, id=f"{name}-{each.id}")
        for name, planned in (("words", WORDS), ("unmasked", UNMASKED))
        for each in planned
        if each.arch and "fresh_process" not in each.id  # slow; a test below loads a bundle
    ],
)
def test_the_kit_with_other_options(check: Planned) -> None:
    check.run()


LABELS = ["bad", "fair", "great"]
TEXTS = ["good", "a rather bad thing", "fine", "oh no, not again and again"]
TAGGED = [
    {"text": "Ada lives in Turin", "label": "PER O O LOC"},
    {"text": "No one knows Bo", "label": "O O O PER"},
]
TAGS = ["O", "PER", "LOC"]
MASKS = [False, True]


def stack_of(arch: str = "llama", *others: Any, model: Any = None, **options: Any) -> Stack:
    options = {"labels": TAGS if options.get("task") == "token" else LABELS, **options}
    base = tiny(arch) if model is None else model
    return Stack(base, [*others, LsLlama(**options)], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> LsLlama:
    return stack.plugins["ls-llama"]  # type: ignore[return-value]


def batch_of(stack: Stack, rows: list[dict[str, str]], side: Any = "right") -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=64))
    return Collator(PAD, padding_side=side)(list(data.train))


def states(model: Any, **inputs: Any) -> Tensor:
    """H, [B, T, d]."""
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]


def full(count: int, keys: int) -> Tensor:
    """A mask that hides nothing, for a model that is called as it comes."""
    return torch.zeros(1, 1, count, keys)


# --------------------------------------------------------------------------------------------------------- the head
@pytest.mark.parametrize("unmasked", MASKS)
@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_scores_of_a_text_by_hand(pool: Any, unmasked: bool) -> None:
    """z = W pool(H) of each text alone, though they are read in one batch."""
    stack = stack_of(unmasked=unmasked, pool=pool)
    labels, z = plugin_of(stack).classify(stack, TEXTS)
    W = plugin_of(stack).head.linear.weight
    for text, found in zip(TEXTS, z, strict=True):
        ids = torch.tensor(plugin_of(stack).texts.rows(stack, [text]))
        mask = full(ids.shape[1], ids.shape[1]) if unmasked else torch.ones_like(ids)
        (H,) = states(tiny("llama"), input_ids=ids, attention_mask=mask)
        h = {"last": H[-1], "mean": H.mean(0), "max": H.amax(0)}[pool]
        torch.testing.assert_close(found, W @ h, rtol=1e-4, atol=1e-5)
    assert labels == LABELS


def test_a_text_is_read_at_its_end_or_unmasked_as_a_whole() -> None:
    for unmasked, pool in ((False, "last"), (True, "mean")):
        default, named = stack_of(unmasked=unmasked), stack_of(unmasked=unmasked, pool=pool)
        assert torch.equal(*(plugin_of(s).classify(s, TEXTS)[1] for s in (default, named)))


def test_the_maximum_is_over_real_tokens() -> None:
    hidden = torch.tensor([[[9.0, 9.0], [-1.0, -4.0], [-3.0, -2.0]]])
    assert max_of(hidden, torch.tensor([[0, 1, 1]])).tolist() == [[-1.0, -2.0]]


@pytest.mark.parametrize("unmasked", MASKS)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_what_trains_is_the_adapter_and_the_head(task: str, unmasked: bool) -> None:
    """C d numbers, and of a head for words C more."""
    lora = Lora(rank=12, alpha=32, targets="attention.q,v")
    stack = stack_of("llama", lora, task=task, unmasked=unmasked)
    own = 3 * stack.anatomy.hidden_size + (3 if task == "token" else 0)
    adapter = sum(p.numel() for p in stack.ledger.parameters("lora"))
    assert stack.trainable_parameters() == adapter + own
    assert sum(p.numel() for p in stack.ledger.parameters("ls-llama")) == own


def test_the_states_are_the_bases_until_something_trains() -> None:
    inputs = example_inputs(tiny("llama"), padding="left")
    stack = stack_of("llama", Lora(rank=2), task="token")
    assert torch.equal(states(stack.model, **inputs), states(tiny("llama"), **inputs))


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_loss_and_gradients_by_hand(task: str) -> None:
    """Cross entropy over the texts, or over the words of all texts, of the states of the plain model."""
    rows = (
        TAGGED
        if task == "token"
        else [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)]
    )
    stack = stack_of(task=task)
    batch = batch_of(stack, rows)
    stack.model.eval()
    loss = stack.train_step(batch)
    head = plugin_of(stack).head.linear
    parameters = [head.weight] if task == "sequence" else [head.weight, head.bias]
    scores, targets = [], []
    for ids, mask, number in zip(
        batch["input_ids"], batch["attention_mask"], batch[CLASS_INDEX], strict=True
    ):
        (H,) = states(tiny("llama"), input_ids=ids[mask.bool()][None])
        at = torch.tensor([len(H) - 1]) if task == "sequence" else (number != -100).nonzero()[:, 0]
        scores.append(F.linear(H[at], *parameters))
        targets.append(number.reshape(1) if task == "sequence" else number[at])
    expected = F.cross_entropy(torch.cat(scores), torch.cat(targets))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    for found, gradient in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(found.grad, gradient, rtol=1e-4, atol=1e-5)


def test_other_numbers_for_the_classes_are_other_rows_of_W() -> None:
    order = [2, 0, 1]
    one, two = stack_of(), stack_of(labels=[LABELS[i] for i in order])
    with torch.no_grad():
        plugin_of(two).head.linear.weight.copy_(plugin_of(one).head.linear.weight[order])
    z = [plugin_of(stack).classify(stack, TEXTS)[1] for stack in (one, two)]
    assert torch.equal(z[0][:, order], z[1])
    rows = [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)]
    losses = [stack.train_step(batch_of(stack, rows)) for stack in (one, two)]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [plugin_of(stack).head.linear.weight.grad for stack in (one, two)]
    torch.testing.assert_close(gradients[0][order], gradients[1])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # relative positions, and absolute ones
@pytest.mark.parametrize("unmasked", MASKS)
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_side_of_the_pads_does_not_show(arch: str, unmasked: bool, task: str) -> None:
    rows = (
        TAGGED
        if task == "token"
        else [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(TEXTS)]
    )
    stack = stack_of(arch, task=task, unmasked=unmasked)
    stack.model.eval()
    left, right = (batch_of(stack, rows, side) for side in ("left", "right"))
    assert not torch.equal(left["input_ids"], right["input_ids"])
    assert torch.equal(pads_right(left)[CLASS_INDEX], right[CLASS_INDEX])
    assert float(stack.train_step(left)) == float(stack.train_step(right))


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_an_encoder_reads_texts_with_their_end(task: str) -> None:
    """In training and in use alike."""
    for arch, ends in (("bert", True), ("llama", False)):
        plugin = LsLlama(task=task, labels=TAGS if task == "token" else LABELS)
        stack = Stack(tiny(arch), [plugin], tokenizer=tiny_tokenizer(ends=True))
        rows = (
            TAGGED
            if task == "token"
            else [
                {"text": row["text"], "label": label}
                for row, label in zip(TAGGED, LABELS * len(TAGGED), strict=False)
            ]
        )
        trained = [ids[mask.bool()].tolist() for ids, mask in zip(
            *(batch_of(stack, rows)[name] for name in ("input_ids", "attention_mask")), strict=True
        )]  # fmt: skip
        own, texts = plugin_of(stack).asked(task), [row["text"] for row in rows]
        used = own.rows(stack, texts) if task == "sequence" else [ids for ids, _ in own.words(stack, texts)]
        assert trained == used
        assert {ids[-1] == EOS for ids in used} == {ends}


def test_dropout_is_of_the_states_of_words() -> None:
    heads = [
        plugin_of(stack_of(**options)).head
        for options in ({}, {"task": "token"}, {"task": "token", "dropout": 0.3})
    ]
    assert [head.dropout for head in heads] == [0.0, 0.1, 0.3]


# ----------------------------------------------------------------------------------------------------- without a mask
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("unmasked", MASKS)
def test_what_a_token_sees(arch: str, unmasked: bool) -> None:
    """Its state does not depend on what follows; unmasked it does, and so does every layer's."""
    stack = stack_of(arch, task="token", unmasked=unmasked)
    one = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    two = one.clone()
    two[:, 6:] = 7
    mask = torch.ones_like(one)
    z = []
    with evaluating(stack.model):
        for ids in (one, two):
            call: Callable[[], Any] = lambda ids=ids: stack.model(input_ids=ids, attention_mask=mask)  # noqa: E731
            z.append(plugin_of(stack).head.read(call, mask)[0][0])
    same = torch.isclose(z[0], z[1], rtol=1e-5, atol=1e-6).all(-1).tolist()
    assert same == [not unmasked] * 6 + [False] * 3


@pytest.mark.parametrize(
    ("arch", "kind", "options"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("gpt2", "sdpa", {}),
        ("qwen2", "eager", {}),
        ("mistral", "sdpa", {"sliding_window": 4}),
        ("mistral", "eager", {"sliding_window": 4}),
        ("gemma2", "eager", {"sliding_window": 4}),  # which caps its scores
    ],
)
def test_unmasked_is_the_model_under_a_mask_that_hides_nothing(
    arch: str, kind: str, options: dict[str, int]
) -> None:
    """No windows either, and pads on either side change nothing, though they see and are seen in the batch's mask."""
    model, plain = (tiny(arch, **options) for _ in range(2))
    for each in (model, plain):
        each.set_attn_implementation(kind)
    stack = stack_of(model=model, unmasked=True)
    for padding in ("left", "right"):
        inputs = example_inputs(plain, padding=padding)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found = states(stack.model, **inputs, position_ids=positions)
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            own = ids[mask.bool()][None]
            (expected,) = states(plain, input_ids=own, attention_mask=full(own.shape[1], own.shape[1]))
            torch.testing.assert_close(found[row, mask.bool()], expected, rtol=1e-4, atol=1e-5)


def test_soft_tokens_and_prefixes_are_seen_like_the_rest() -> None:
    ids = torch.randint(3, 250, (1, 7), generator=torch.Generator().manual_seed(0))
    stack = stack_of("llama", PromptTuning(length=3), unmasked=True)
    rows = next(iter(stack.ledger.parameters("prompt-tuning"))).detach()
    plain = tiny("llama")
    both = torch.cat((rows[None], plain.get_input_embeddings()(ids)), 1)
    expected = states(plain, inputs_embeds=both, attention_mask=full(10, 10))[:, 3:]
    torch.testing.assert_close(states(stack.model, input_ids=ids)[:, -7:], expected, rtol=1e-4, atol=1e-5)

    stack = stack_of("llama", PTuningV2(length=3, dropout=0.0), unmasked=True)
    short = torch.nn.functional.pad(ids, (0, 2), value=PAD)
    together = states(stack.model, input_ids=short, attention_mask=(short != PAD).long())
    alone = states(stack.model, input_ids=ids)
    torch.testing.assert_close(together[:, :7], alone, rtol=1e-4, atol=1e-5)
    with stack.disabled("p-tuning-v2"):
        assert not torch.allclose(states(stack.model, input_ids=ids), alone, atol=1e-2)


def test_nothing_is_read_from_a_cache() -> None:
    stack = stack_of(unmasked=True)
    with pytest.raises(
        UnsupportedError, match="ls-llama: unmasked, the states of a text depend on what follows"
    ):
        stack.generate("Once", max_new_tokens=2)
    assert isinstance(stack.generate("Once", max_new_tokens=2, use_cache=False), str)
    with stack.disabled("ls-llama"):
        expected = Stack(tiny("llama"), tokenizer=tiny_tokenizer()).generate("Once", max_new_tokens=4)
        assert stack.generate("Once", max_new_tokens=4) == expected
    assert isinstance(stack_of().generate("Once", max_new_tokens=2), str)


def test_one_attention_a_layer() -> None:
    with pytest.raises(ConflictError, match="both compute the attention"):
        stack_of("llama", NtkAttention(), unmasked=True)
    stack_of("llama", NtkAttention())


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("mamba", "mamba has no attention"),
        ("bloom", "does not look its attention up"),
        ("qwen3_next", r"qwen3_next has '\w+' in 1 of 2"),
        ("t5", "t5 has encoder and decoder"),
        ("vit", "vit has no token embedding"),
    ],
)
def test_models_that_cannot_be_unmasked(arch: str, match: str) -> None:
    with pytest.raises(ArchitectureError, match=f"{match}|{type(tiny(arch)).__name__} {match}"):
        stack_of(arch, unmasked=True)


def test_an_attention_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArchitectureError, match="llama has 'flash_attention_2' in 2 of 2"):
        stack_of(model=model, unmasked=True)


# --------------------------------------------------------------------------------------------------------- in use
def test_the_right_context_decides_and_only_unmasked_learns_it() -> None:
    """The first word's tag is told by the last word alone; the same LoRA, the same steps."""
    rows = [{"text": f"{word} is {mood}", "label": f"{tag} O O"} for word in ("tea", "rain", "snow")
            for mood, tag in (("up", "PER"), ("so", "LOC"))]  # fmt: skip
    right = {}
    for unmasked in MASKS:
        stack = stack_of("llama", Lora(rank=4), task="token", unmasked=unmasked, dropout=0.0)
        stack.train(rows, steps=30, batch_size=6, learning_rate=2e-2, max_length=32)
        found = plugin_of(stack).tag(stack, [row["text"] for row in rows])
        assert all(tags[1:] == ["O", "O"] for tags in found)
        right[unmasked] = sum(
            tags[0] == row["label"].split()[0] for tags, row in zip(found, rows, strict=True)
        )
    assert right == {False: 3, True: 6}


@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("unmasked", MASKS)
def test_a_trained_tagger_is_saved(arch: str, unmasked: bool, tmp_path: Path) -> None:
    stack = stack_of(arch, Lora(rank=2), task="token", unmasked=unmasked, dropout=0.0)
    stack.train(TAGGED, steps=25, batch_size=2, learning_rate=2e-2, max_length=32)
    texts = [row["text"] for row in TAGGED]
    found = plugin_of(stack).tag(stack, texts)
    assert found == [row["label"].split() for row in TAGGED]
    assert [plugin_of(stack).tag(stack, [text])[0] for text in texts] == found
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny(arch), tokenizer=tiny_tokenizer())
    assert plugin_of(again).tag(again, texts) == found
    inputs = example_inputs(stack.model)
    assert torch.equal(states(again.model, **inputs), states(stack.model, **inputs))


def test_a_head_answers_for_what_it_is_trained_on() -> None:
    stack = stack_of(task="token")
    with pytest.raises(PeftxError, match="ls-llama: its task is 'token', not 'sequence'") as caught:
        stack.classify("Ada")
    assert "plugin.tag" in str(caught.value.hint)
    with pytest.raises(DataError, match=r"ls-llama: text 0 .* has 2\d\d tokens, and 128 fit"):
        plugin_of(stack).tag(stack, ["word " * 50])
    stack = stack_of()
    with pytest.raises(PeftxError, match="ls-llama: its task is 'sequence', not 'token'"):
        plugin_of(stack).tag(stack, ["Ada"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "word"}, "task"),
        ({"task": "token", "pool": "mean"}, "pool is not of the task 'token'"),
        ({"dropout": 0.2}, "dropout is not of the task 'sequence'"),
        ({"task": "token", "dropout": 1.0}, "dropout"),
        ({"pool": "first"}, "pool"),
        ({"labels": ["good"]}, "labels: List should have at least 2 items"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=f"LsLlama: .*{match}"):
        LsLlama(**options)


def test_labels_of_texts_are_looked_up_before_a_run_and_those_of_words_are_not() -> None:
    """A row of words has a label for each, in one text."""
    assert LsLlama().labels_option == "labels"
    assert LsLlama(task="token").labels_option == ""


def test_labels_that_are_no_classes() -> None:
    with pytest.raises(DataError, match="ls-llama: all 2 rows are of one class, "):
        stack_of().train([{"text": text, "label": LABELS[1]} for text in ("a", "b")], steps=1)
    with pytest.raises(DataError, match=r"ls-llama.*stands twice"):
        stack_of(labels=["a", "a"])
