"""DPO with prefix sharing: one row computes what two compute."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid

from peftx import Stack, TrainingData, TrainStep
from peftx.engines.data import Collator, continuation, encode_pair, prompt_ids
from peftx.engines.models import load_model
from peftx.errors import (
    ArchitectureError,
    ConflictError,
    DataError,
    PeftxError,
    PluginError,
    UnsupportedError,
)
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferencePrompt
from peftx.testing.shapes import PAD
from peftx_dpo_prefix_sharing import (
    DpoPrefixSharing,
    answer_log_probs,
    join,
    layout,
    pack,
    preference_loss,
    token_log_probs,
)
from peftx_layernorm_tuning import LayernormTuning
from peftx_lora import Lora

ROWS = [
    {"prompt": f"Q{i}: is {word} nice?\nA:", "chosen": "yes, " + word, "rejected": "no" + "!" * i}
    for i, word in enumerate(("tea", "rain", "sleep", "noise", "bread", "snow"))
]
TOKENIZER = tiny_tokenizer()

test_conformance = conformance("dpo-prefix-sharing")


def prepared(stack: Stack, rows: list[dict[str, str]] = ROWS, max_length: int = 96) -> TrainingData:
    data = TrainingData(
        train=Dataset.from_list(rows), eval=None, tokenizer=stack.tokenizer, seed=0, format="preference",
        max_length=max_length,
    )  # fmt: skip
    return stack.prepare(data)


def batch_of(data: TrainingData) -> dict[str, Any]:
    assert data.train is not None
    return Collator(PAD)(list(data.train))


def build(arch: str, **options: Any) -> Stack:
    """LoRA away from its start, and the plugin."""
    stack = Stack(tiny(arch), [Lora(rank=2), DpoPrefixSharing(**options)], tokenizer=TOKENIZER)
    shift(stack, 1)
    return stack


def shift(stack: Stack, seed: int) -> None:
    """Move what trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in stack.model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def losses(stack: Stack, steps: int, **options: Any) -> list[float]:
    report = stack.train(ROWS, steps=steps, batch_size=6, learning_rate=1e-2, max_length=96, **options)
    return [loss for _, loss in report.losses]


def two_rows(model: torch.nn.Module, rows: list[dict[str, str]]) -> Tensor:
    """log p(y_w|x), log p(y_l|x), each in a row of its own: [N, 2]."""
    sums = []
    for row in rows:
        for answer in (row["chosen"], row["rejected"]):
            pair = encode_pair(TOKENIZER, row["prompt"], answer, max_length=96)
            ids, labels = torch.tensor([pair.input_ids]), torch.tensor([pair.labels])
            sums.append(token_log_probs(model(input_ids=ids).logits, labels).sum())
    return torch.stack(sums).view(-1, 2)


# ---------------------------------------------------------------------------------------------------- the method
# From the authors' code at commit 8963fa9, run once on the triples below: `construct_dpo_mask_with_packing` (as a dense
# mask), the row builder and packed collator, and `get_batch_logps_prefix_sharing` on the logits sin(0), sin(1), ...
TRIPLES = [([3, 4, 5, 6], [2, 1, 0], [6, 1]), ([5, 2], [4, 1], [3, 3, 1])]
OFFICIAL_IDS = [3, 4, 5, 6, 2, 1, 0, 6, 6, 1, 5, 2, 4, 1, 2, 3, 3, 1, 0, 0]
OFFICIAL_LABELS = [-100] * 4 + [2, 1, 0, -100, 6, 1] + [-100] * 2 + [4, 1, -100, 3, 3, 1] + [-100] * 2
OFFICIAL_POSITIONS = [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 0, 1, 2, 3, 1, 2, 3, 4]
OFFICIAL_MASK = """
10000000000000000000 11000000000000000000 11100000000000000000 11110000000000000000 11111000000000000000
11111100000000000000 11111110000000000000 11100001000000000000 11100001100000000000 11100001110000000000
00000000001000000000 00000000001100000000 00000000001110000000 00000000001111000000 00000000001000100000
00000000001000110000 00000000001000111000 00000000001000111100 00000000000000000010 00000000000000000011
"""
OFFICIAL_LOG_PROBS = [[-8.5520, -4.7891], [-5.3639, -5.0621]]


def packed(triples: list[tuple[list[int], list[int], list[int]]], pads: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, labels, segments: [1, T]."""
    joined = [join(*triple) for triple in triples]
    segments = [1 + 3 * n + part for n, (_, _, parts) in enumerate(joined) for part in parts]
    ids, labels = ([value for triple in joined for value in triple[column]] for column in (0, 1))
    return (
        torch.tensor([ids + [0] * pads]),
        torch.tensor([labels + [-100] * pads]),
        torch.tensor([segments + [0] * pads]),
    )


def test_equals_the_official_code() -> None:
    ids, labels, segments = packed(TRIPLES, pads=2)
    mask, positions = layout(segments, torch.float32)
    assert ids[0].tolist() == OFFICIAL_IDS
    assert labels[0].tolist() == OFFICIAL_LABELS
    assert positions[0, :18].tolist() == OFFICIAL_POSITIONS
    assert ["".join(map(str, row)) for row in (mask[0, 0] == 0).long().tolist()] == OFFICIAL_MASK.split()
    logits = torch.arange(20.0 * 7).sin().view(1, 20, 7)
    found = answer_log_probs(logits, labels, segments)
    assert torch.allclose(found, torch.tensor(OFFICIAL_LOG_PROBS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("p", "w", "l"), [(1, 1, 1), (1, 4, 2), (5, 1, 3), (7, 3, 1)])
def test_mask_is_the_formula(p: int, w: int, l: int) -> None:  # noqa: E741
    ids, _, segments = packed([([9] * p, [8] * w, [7] * l)], pads=0)
    assert ids.shape[1] == p + w + l + 1  # two rows: 2 p + w + l
    mask, positions = layout(segments, torch.float32)
    c, r = p - 1, p + w
    for i in range(ids.shape[1]):
        for j in range(ids.shape[1]):
            sees = j <= i and not (i >= r and c <= j < r)
            assert float(mask[0, 0, i, j]) == (0.0 if sees else torch.finfo(torch.float32).min)
    assert positions[0].tolist() == [*range(p + w), *range(p - 1, p + l)]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_loss_and_gradients_are_those_of_two_rows(arch: str, packing: bool) -> None:
    stack = build(arch, packing=packing)
    batch = batch_of(prepared(stack))
    assert len(batch["input_ids"]) == (3 if packing else len(ROWS))
    reference = two_rows(stack.model, ROWS).detach()
    stack.train_step(batch)  # notes the reference
    stack.model.zero_grad()
    shift(stack, 2)
    loss = stack.train_step(batch)
    found = {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.requires_grad}
    stack.model.zero_grad()

    ratio = two_rows(stack.model, ROWS) - reference
    expected = -logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean()
    expected.backward()
    assert abs(float(loss - expected.detach())) < 1e-6
    assert abs(float(loss) - math.log(2)) > 1e-3
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    assert largest > 1e-2
    for name, parameter in stack.model.named_parameters():
        if parameter.requires_grad:
            assert float((found[name] - parameter.grad).abs().max()) < 1e-5 * max(1.0, largest), name


def test_log_probs_survive_packing_and_padding() -> None:
    for packing in (False, True):
        stack = build("llama", packing=packing)
        expected = two_rows(stack.model, ROWS).detach()
        batch = batch_of(prepared(stack))
        mask, positions = layout(batch["token_type_ids"], torch.float32)
        logits = stack.model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
        found = answer_log_probs(logits, batch["labels"], batch["token_type_ids"])
        order = found[:, 0].argsort(), expected[:, 0].argsort()  # packing has an order of its own
        assert torch.allclose(found[order[0]], expected[order[1]], atol=1e-4, rtol=0)


def test_packing_fills_rows() -> None:
    lengths = [5, 9, 3, 3, 8, 2, 10, 1]
    bins = pack(lengths, 10)
    assert sorted(i for chosen in bins for i in chosen) == list(range(8))
    assert max(sum(lengths[i] for i in chosen) for chosen in bins) <= 10
    assert bins == [[6], [1], [4], [0, 2], [3, 5, 7]]  # 41 tokens; the longest first, where most room is left
    assert pack([4, 6], 10) == [[1, 0]]
    assert pack([], 10) == []


@pytest.mark.parametrize(("loss", "at_start"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_losses(loss: Any, at_start: float) -> None:
    h = torch.tensor([0.0, 3.0, 20.0], requires_grad=True)
    values = preference_loss(h, 0.1, loss)
    expected = {
        "sigmoid": [math.log1p(math.exp(-x)) for x in (0.0, 0.3, 2.0)],
        "hinge": [1.0, 0.7, 0.0],
        "ipo": [25.0, 4.0, 225.0],  # a target for h, 1 / (2 beta) = 5
    }[loss]
    assert torch.allclose(values, torch.tensor(expected))
    stack = Stack(tiny("llama"), [Lora(), DpoPrefixSharing(loss=loss)], tokenizer=TOKENIZER)
    assert (
        abs(float(stack.train_step(batch_of(prepared(stack)))) - at_start) < 1e-4
    )  # LoRA starts at the reference


def test_training_raises_the_chosen_answers() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=4), DpoPrefixSharing()], tokenizer=TOKENIZER)
    before = two_rows(stack.model, ROWS).detach()
    report = stack.train(ROWS, steps=8, batch_size=6, learning_rate=1e-2, max_length=96)
    gain = (two_rows(stack.model, ROWS).detach() - before) @ torch.tensor([1.0, -1.0])
    assert abs(report.first_loss - math.log(2)) < 1e-5
    assert report.last_loss < 0.5
    assert bool((gain > 0).all())


def test_the_reference_is_the_model_before_training() -> None:
    """Adapters that were trained before, and those that do not start at nothing, belong to it."""
    from peftx_p_tuning_v2 import PTuningV2

    prefixes = Stack(
        tiny("llama"), [PTuningV2(length=3, dropout=0.0), DpoPrefixSharing()], tokenizer=TOKENIZER
    )
    lora = build("llama")
    assert not torch.allclose(two_rows(lora.model, ROWS), two_rows(tiny("llama"), ROWS), atol=0.1)
    for stack in (lora, prefixes):
        found = losses(stack, 6)
        assert abs(found[0] - math.log(2)) < 1e-5
        assert found[-1] < found[0] - 5e-3
        again = losses(stack, 2)  # another run starts from another reference
        assert abs(again[0] - math.log(2)) < 1e-5


def test_the_reference_stays_in_a_loop_of_ones_own() -> None:
    stack = build("llama")
    batch = batch_of(prepared(stack))
    reference = two_rows(stack.model, ROWS).detach()
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=1.0)
    found = [float(stack.train_step(batch, optimizer=optimizer)) for _ in range(3)]
    assert abs(found[0] - math.log(2)) < 1e-5
    ratio = two_rows(stack.model, ROWS).detach() - reference
    expected = float(-logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean())
    assert abs(float(stack.train_step(batch)) - expected) < 1e-5 < abs(expected - found[0])
    with pytest.raises(
        PeftxError, match=r"dpo-prefix-sharing: .*step 3 does not remember how the run started"
    ):
        stack.run_train_step(TrainStep(stack, batch, index=3, total=9, memory={}))


def test_the_reference_follows_a_cast_of_the_model() -> None:
    """Of what trains in the base itself, a layer takes no other dtype than the model's."""
    stack = Stack(tiny("llama"), [LayernormTuning(), DpoPrefixSharing()], tokenizer=TOKENIZER)
    batch = batch_of(prepared(stack))
    stack.train_step(batch)
    stack.model.to(torch.bfloat16)
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=1.0)
    assert abs(float(stack.train_step(batch, optimizer=optimizer)) - math.log(2)) < 1e-6  # nothing has moved
    assert float(stack.train_step(batch)) < math.log(2) - 1e-3


def test_a_resumed_run_keeps_its_reference(tmp_path: Path) -> None:
    straight, resumed = build("llama"), build("llama")
    whole = losses(straight, 4, output=tmp_path, checkpoint_every=2)
    shift(resumed, 5)  # the checkpoint brings weights and reference
    rest = losses(resumed, 4, output=tmp_path, checkpoint_every=2, resume=tmp_path / "checkpoint-2")
    assert rest[-2:] == whole[-2:]
    for one, two in zip(straight.ledger.parameters("lora"), resumed.ledger.parameters("lora"), strict=True):
        assert torch.equal(one, two)


def test_what_trains_may_change_and_the_reference_does_not() -> None:
    first = build("llama")
    plugins = [("sft", Lora(rank=2)), ("dpo", Lora(rank=2)), DpoPrefixSharing()]
    stack = Stack(tiny("llama"), plugins, tokenizer=TOKENIZER)
    for ours, theirs in zip(stack.ledger.parameters("sft"), first.ledger.parameters("lora"), strict=True):
        ours.data = theirs.data.clone()
    batch = batch_of(prepared(stack))
    stack.freeze("sft")
    assert abs(float(stack.train_step(batch)) - math.log(2)) < 1e-5
    stack.unfreeze("sft")
    assert abs(float(stack.train_step(batch)) - math.log(2)) < 1e-5
    shift(stack, 3)
    moved = float(stack.train_step(batch))
    assert abs(moved - math.log(2)) > 1e-3
    stack.freeze("sft")  # stays in the model as it is now, and in the reference as it was
    assert float(stack.train_step(batch)) == moved


def test_micro_batches_without_a_share_weigh_alike_whatever_they_hold() -> None:
    """In a loop of one's own that says nothing of shares, a triple of a micro-batch with n_i weighs 1 / (A n_i)."""
    stack = build("llama")
    parts = [batch_of(prepared(stack, rows)) for rows in (ROWS[:1], ROWS[1:])]
    stack.train_step(parts[0])
    shift(stack, 2)
    stack.model.zero_grad()
    for micro, batch in enumerate(parts):
        stack.run_train_step(TrainStep(stack, batch, micro=micro, accumulation=2))
    found = [p.grad.clone() for p in stack.ledger.parameters("lora")]
    expected = [torch.zeros_like(gradient) for gradient in found]
    for rows in ([row] for row in ROWS):
        stack.model.zero_grad()
        stack.train_step(batch_of(prepared(stack, rows)))
        for total, p in zip(expected, stack.ledger.parameters("lora"), strict=True):
            total += p.grad / (2 * (1 if rows[0] is ROWS[0] else 5))
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_the_batch_of_the_caller_stays() -> None:
    stack = build("llama")
    batch = batch_of(prepared(stack))
    before = copy.deepcopy(batch)
    stack.train_step(batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in before)


# -------------------------------------------------------------------------------------------------------- prompts
def test_a_prompt_that_would_merge_with_its_answer() -> None:
    """Tokenized with its answer, the prompt would end otherwise before each; alone it has one end."""
    model, tokenizer = load_model("peftx:tiny")
    row = {"prompt": "It was a good reas", "chosen": "on\n", "rejected": "\nable"}
    alone = prompt_ids(tokenizer, row["prompt"])
    assert continuation(row["prompt"], row["rejected"]) == row["rejected"]
    joint = [tokenizer(row["prompt"] + answer)["input_ids"] for answer in ("on", "\nable")]
    assert joint[0][: len(alone)] != alone == joint[1][: len(alone)]
    stack = Stack(model, [Lora(), DpoPrefixSharing()], tokenizer=tokenizer)
    data = prepared(stack, [row], max_length=32)
    (found,) = data.train.to_list()
    parts = [(code - 1) % 3 for code in found["token_type_ids"]]
    start = len(alone) - 1
    assert found["input_ids"][: len(alone)] == alone
    assert parts.index(1) == start
    assert found["input_ids"][parts.index(2)] == alone[-1]


def test_a_long_prompt_is_cut_once_for_both_answers() -> None:
    row = {"prompt": "x" * 30 + "tail:", "chosen": "yes, " * 4, "rejected": "no"}
    apart = [
        encode_pair(TOKENIZER, row["prompt"], row[name], max_length=32) for name in ("chosen", "rejected")
    ]
    kept = [sum(label == -100 for label in pair.labels) for pair in apart]
    assert kept[0] != kept[1]  # what cutting for each answer would do
    stack = Stack(tiny("llama"), [DpoPrefixSharing()], tokenizer=TOKENIZER)
    (found,) = prepared(stack, [row], max_length=32).train.to_list()
    assert len(found["input_ids"]) == 32
    parts = [(code - 1) % 3 for code in found["token_type_ids"]]
    prompt = TOKENIZER.decode(found["input_ids"][: parts.index(1) + 1])
    assert prompt == row["prompt"][-len(prompt) :]
    assert len(prompt) == 32 - 1 - 22 - 4  # the copy; " yes, yes, yes, yes, " and EOS; " no" and EOS


@pytest.mark.parametrize(
    ("row", "max_length", "match"),
    [
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, 96, "row 1 .* has no prompt"),
        ({"prompt": "Q:", "chosen": "", "rejected": "no"}, 96, "row 1 .*chosen.* has no tokens"),
        ({"prompt": "Q:", "chosen": "yes", "rejected": ""}, 96, "row 1 .*rejected.* has no tokens"),
        ({"prompt": "Q:", "chosen": "yes", "rejected": " yes"}, 96, "prefix-sharing: row 1 .* are the same"),
        ({"prompt": "Q:", "chosen": "y" * 50, "rejected": "n" * 50}, 96, "row 1 .*52 and 52 tokens with EOS"),
        ({"prompt": "Q:", "chosen": "y" * 99, "rejected": "n"}, 96, "row 1 .*chosen.* 101 tokens"),
    ],
    ids=["no prompt", "no chosen", "no rejected", "both the same", "both too long", "one too long"],
)
def test_bad_rows(row: dict[str, str], max_length: int, match: str) -> None:
    stack = Stack(tiny("llama"), [DpoPrefixSharing()], tokenizer=TOKENIZER)
    with pytest.raises(DataError, match=match):
        prepared(stack, [ROWS[0], row], max_length)


def test_an_answer_needs_one_token_of_its_prompt() -> None:
    """The copy of the prompt's last token takes a place, and so does the token."""
    stack = Stack(tiny("llama"), [DpoPrefixSharing()], tokenizer=TOKENIZER)
    row = {"prompt": "Q:", "chosen": "yes", "rejected": "no"}  # 5 and 4 tokens
    (found,) = prepared(stack, [row], max_length=11).train.to_list()
    assert [(code - 1) % 3 for code in found["token_type_ids"]] == [1] * 6 + [2] * 5
    with pytest.raises(DataError, match=r"row 0 .*leaves no room for the prompt in max_length 10"):
        prepared(stack, [row], max_length=10)


def test_rows_to_evaluate_on_are_laid_out_too() -> None:
    stack = Stack(tiny("llama"), [DpoPrefixSharing()], tokenizer=TOKENIZER)
    train, held_out = (Dataset.from_list(rows) for rows in (ROWS[:4], ROWS[4:]))
    data = TrainingData(
        train=train, eval=held_out, tokenizer=TOKENIZER, seed=0, format="preference", max_length=96
    )
    stack.prepare(data)
    assert data.format == "tokenized"
    expected = prepared(stack).train.to_list()
    assert [data.train.to_list(), data.eval.to_list()] == [expected[:4], expected[4:]]


def test_other_rows_are_refused() -> None:
    stack = Stack(tiny("llama"), [Lora(), DpoPrefixSharing()], tokenizer=TOKENIZER)
    rows = [{"prompt": "Q:", "completion": "yes"}]
    with pytest.raises(UnsupportedError, match="format 'prompt-completion'") as caught:
        stack.train(rows, steps=1)
    assert caught.value.hint == "rows with prompt and chosen and rejected"
    ids = torch.tensor([[3, 4]])
    with pytest.raises(
        PeftxError, match="dpo-prefix-sharing: the batch has no token_type_ids, but input_ids, labels"
    ):
        stack.train_step({"input_ids": ids, "labels": ids})


# --------------------------------------------------------------------------------------------------------- models
def test_a_short_sliding_window_is_refused() -> None:
    stack = Stack(tiny("mistral", sliding_window=8), [DpoPrefixSharing()], tokenizer=TOKENIZER)
    with pytest.raises(ArchitectureError, match="MistralForCausalLM does not keep to the mask"):
        prepared(stack)


def test_the_longest_row_is_what_is_looked_at() -> None:
    stack = Stack(tiny("mistral", sliding_window=32), [DpoPrefixSharing()], tokenizer=TOKENIZER)
    prepared(stack, ROWS[:1])
    with pytest.raises(ArchitectureError, match="a token of the longest row, of 77, has another"):
        prepared(stack, [ROWS[0], {**ROWS[1], "prompt": "Q" * 60}, ROWS[2]])


def test_soft_tokens_are_refused() -> None:
    with pytest.raises(ConflictError, match="'dpo-prefix-sharing' lays its rows out"):
        Stack(tiny("llama"), [ReferencePrompt(), DpoPrefixSharing()], tokenizer=TOKENIZER)


def test_an_attention_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ArchitectureError, match=r"LlamaForCausalLM \(attention 'flash_attention_2'\)"
    ) as caught:
        Stack(model, [DpoPrefixSharing()], tokenizer=TOKENIZER)
    assert "attn_implementation='sdpa'" in str(caught.value.hint)


@pytest.mark.parametrize("arch", ["bert", "t5", "mamba", "bloom", "llava"])
def test_models_without_room_for_two_branches_are_refused_before_anything_runs(arch: str) -> None:
    model = tiny(arch)
    match = rf"{type(model).__name__} \(attention '\w+'\) is no decoder that takes positions"
    with pytest.raises(ArchitectureError, match=match):
        Stack(model, [Lora(rank=2), DpoPrefixSharing()], tokenizer=TOKENIZER)


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": -1}, {"loss": "kto"}, {"packing": 3}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PluginError, match=f"DpoPrefixSharing: {next(iter(options))}") as caught:
        DpoPrefixSharing(**options)
    assert "beta, loss, packing" in str(caught.value.hint)
