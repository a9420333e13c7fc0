"""ULLME: both ways of reading, the three losses by hand and against the official ones, chunks, the rows."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.engines.data import IGNORE, Collator, encode_pair, prompt_ids
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError, UnsupportedError
from peftx.kernel.calls import own_lengths_of
from peftx.kernel.heads import last_of, mean_of
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_ntk_attention import NtkAttention
from peftx_prefix_tuning import PrefixTuning
from peftx_prompt_tuning import PromptTuning
from peftx_ullme import Ullme, alignment, contrast, five, log_probs, rows_of, same_texts

test_conformance = conformance("ullme")

TOKENIZER = tiny_tokenizer()
ROWS = [
    {"prompt": f"what is {word}?", "chosen": f"about {word}", "rejected": "no" + "!" * i}
    for i, word in enumerate(("tea", "rain", "sleep", "snow"))
]
TEXTS = ["tea", "a longer text about rain", "snow", "two words"]
OPTIONS: dict[str, Any] = {"batch_size": 4, "max_length": 64, "schedule": "constant"}
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def build(*others: Any, arch: str = "llama", **options: Any) -> Stack:
    return Stack(tiny(arch), [*(others or (Lora(rank=2),)), Ullme(**options)], tokenizer=TOKENIZER)


def plugin_of(stack: Stack) -> Ullme:
    return stack.plugins["ullme"]  # type: ignore[return-value]


def shift(stack: Stack, seed: int = 1) -> Stack:
    """Move what trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in stack.model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return stack


def batch_of(stack: Stack, rows: Any = ROWS, side: Any = "right") -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, list(rows), seed=0, max_length=64))
    return Collator(PAD, padding_side=side, own_lengths=own_lengths_of(stack.model))(list(data.train))


def gradients(stack: Stack) -> list[Tensor]:
    found = [p.grad.clone() for p in stack.model.parameters() if p.requires_grad]
    stack.model.zero_grad()
    return found


def states(stack: Stack, ids: Tensor, flag: list[int] | None = None, **inputs: Tensor) -> Tensor:
    columns = {} if flag is None else {"both_ways": torch.tensor(flag)}
    with torch.no_grad():
        return stack.model(ids, output_hidden_states=True, **columns, **inputs).hidden_states[-1]  # type: ignore[no-any-return]


def number(shape: Any, n: int) -> Tensor:
    """Numbers between -2 and 2 that no generator decides."""
    i = torch.arange(torch.Size(shape).numel())
    return 2 * (((31 * i * i + 17 * i * n + 101 * n + 7) % 1009) / 504.5 - 1).float().view(shape)


# -------------------------------------------------------------------------------------------------------- both ways
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "gemma2"])
def test_with_the_flag_every_token_sees_the_whole_text(arch: str) -> None:
    """What the model gives under a mask that hides nothing; and without the flag what it gave before."""
    stack, base, other = build(arch=arch), tiny(arch), IDS.clone()
    other[:, -1] += 20
    assert torch.equal(states(stack, IDS)[:, :-1], states(stack, other)[:, :-1])
    assert torch.equal(states(stack, IDS), states(stack, IDS, [0, 0])) or torch.allclose(
        states(stack, IDS), states(stack, IDS, [0, 0]), atol=1e-5
    )
    moved = (states(stack, IDS, [1, 1]) - states(stack, other, [1, 1])).abs().amax(-1)
    assert (moved > 1e-4).all()
    with torch.no_grad():
        open_ = torch.zeros(2, 1, 5, 5)
        masks = dict.fromkeys(("full_attention", "sliding_attention"), open_) if arch == "gemma2" else open_
        expected = base(IDS, attention_mask=masks, output_hidden_states=True).hidden_states[-1]
        plain = base(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states(stack, IDS, [1, 1]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(states(stack, IDS), plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_both_kinds_stand_in_one_pass_and_pads_are_not_seen(side: str, implementation: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    stack = Stack(model, [Ullme()], tokenizer=TOKENIZER)
    ids, mask = IDS.repeat(2, 1), torch.ones(4, 5).long()
    mask[1::2, slice(0, 2) if side == "left" else slice(3, 5)] = 0
    ids[mask == 0] = PAD
    found = states(stack, ids, [1, 1, 0, 0], attention_mask=mask)
    for row, flag in enumerate((1, 1, 0, 0)):
        real = mask[row].bool()
        alone = states(stack, ids[row, real][None], [flag])
        torch.testing.assert_close(found[row, real], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [PromptTuning(length=3), PrefixTuning()])
def test_soft_tokens_and_prefixes_of_other_plugins(other: Plugin) -> None:
    """A row is what it is alone, in both ways."""
    stack = shift(build(other))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for flag in (0, 1):
        found = states(stack, IDS, [flag, flag], attention_mask=mask)
        alone = states(stack, IDS[1:, :3], [flag])
        torch.testing.assert_close(found[1, :3], alone[0], rtol=1e-4, atol=1e-5)


def test_no_cache_in_a_call_with_the_flag() -> None:
    stack = build()
    with (
        stack.columns(both_ways=torch.tensor([1])),
        pytest.raises(UnsupportedError, match="ullme: both_ways, the states of a text"),
    ):
        stack.generate("Say it.", max_new_tokens=2)
    plain = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=TOKENIZER).generate("Say it.", max_new_tokens=4)
    assert stack.generate("Say it.", max_new_tokens=4) == plain


# ---------------------------------------------------------------------------------------------------------- vectors
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_vectors_are_those_of_texts_by_themselves(pool: Any) -> None:
    stack = shift(build(pool=pool))
    e = plugin_of(stack).embed(stack, TEXTS, size=3)
    for row, text in zip(e, TEXTS, strict=True):
        hidden = states(stack, torch.tensor([prompt_ids(TOKENIZER, text)]), [1])[0]
        pooled = hidden.mean(0) if pool == "mean" else hidden[-1]
        torch.testing.assert_close(row, pooled / pooled.norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(stack.embed(TEXTS, size=3), e), "the server gives these too"
    assert not torch.allclose(e, stack.embed(TEXTS, pool=mean_of if pool == "mean" else last_of), atol=1e-3)


def test_with_the_mask_vectors_are_those_of_the_stack() -> None:
    for arch in ("llama", "mamba"):
        stack = shift(build(arch=arch, bidirectional=False, pool="last"))
        assert torch.equal(plugin_of(stack).embed(stack, TEXTS), stack.embed(TEXTS, pool=last_of))
        assert math.isfinite(stack.train_step(batch_of(stack)))


# ----------------------------------------------------------------------------------------------------------- losses
def test_equals_the_official_losses() -> None:
    """Numbers of nlp-uoregon/ullme, commit 225d31a: get_batch_logps, PreferenceLoss, KLLoss."""
    logits, labels, c = number((4, 6, 9), 1), torch.full((4, 6), IGNORE), number((2, 2), 2) / 2
    for row, (begin, end) in enumerate(((2, 5), (3, 6), (1, 4), (2, 6))):
        labels[row, begin:end] = torch.arange(row, row + end - begin)
    sums, means = (x.view(2, 2) for x in log_probs(logits, labels))
    assert sums.flatten().tolist() == pytest.approx([-6.1411, -11.4773, -7.7173, -13.6606], abs=1e-4)
    assert means.flatten().tolist() == pytest.approx([-2.0470, -3.8258, -2.5724, -3.4152], abs=1e-4)
    plugin = Ullme(beta=0.3, contrast_weight=0, kl_weight=0)
    e, same = F.normalize(torch.ones(3, 2, 4), dim=-1), torch.zeros(2, 4).bool()
    assert float(plugin.losses(e, sums, means, same).mean()) == pytest.approx(0.45137793, abs=1e-6)
    assert float(alignment(c, means.T, 0.25).mean()) == pytest.approx(0.12954861, abs=1e-6)


def test_of_one_token_sum_and_mean_are_one() -> None:
    labels = torch.tensor([[IGNORE, 3, IGNORE], [IGNORE, IGNORE, IGNORE]])
    sums, means = log_probs(number((2, 3, 5), 1), labels)
    assert sums[0] == means[0] < 0
    assert sums[1] == means[1] == 0


def test_the_contrast_by_hand() -> None:
    q, d = F.normalize(number((3, 5), 1), dim=-1), F.normalize(number((6, 5), 2), dim=-1)
    same = torch.zeros(3, 6).bool()
    same[0, 0] = same[1, 1] = same[2, 2] = True
    same[0, 2] = same[2, 0] = same[1, 5] = True  # texts that stand twice
    found = contrast(q, d, same, 0.2)
    for i in range(3):
        left_out = {0: [2], 1: [5], 2: [0]}[i]
        each = [math.exp(float(q[i] @ d[j]) / 0.2) for j in range(6)]
        total = sum(x for j, x in enumerate(each) if j not in left_out)
        assert found[i].item() == pytest.approx(-math.log(each[i] / total), rel=1e-4)


def test_the_alignment_by_hand_and_where_it_is_nothing() -> None:
    c, g = number((3, 4), 1), number((3, 4), 2)
    found = alignment(c, g, 0.5)
    for i in range(3):
        p, q = (
            [math.exp(x) / sum(map(math.exp, row)) for x in row]
            for row in (g[i].tolist(), (c[i] / 0.5).tolist())
        )
        assert found[i].item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-4
        )
    assert alignment(c, c / 0.5 - 7, 0.5).abs().max() < 1e-6


def test_writing_is_not_taught_by_embedding() -> None:
    c, g = number((3, 2), 1).requires_grad_(), number((3, 2), 2).requires_grad_()
    alignment(c, g, 0.05).sum().backward()
    assert g.grad is None
    torch.testing.assert_close(c.grad, ((c / 0.05).softmax(-1) - g.softmax(-1)).detach() / 0.05)


def test_the_preference_at_equal_log_probabilities_is_ln_2() -> None:
    e, same = F.normalize(number((3, 2, 4), 1), dim=-1), torch.zeros(2, 4).bool()
    sums = torch.tensor([[-3.0, -5.0], [-3.0, -5.0]], requires_grad=True)
    loss = Ullme(contrast_weight=0, kl_weight=0).losses(e, sums, sums / 2, same)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    loss.sum().backward()
    assert sums.grad.flatten().tolist() == pytest.approx([-0.05, -0.05, 0.05, 0.05])  # beta / 2


def test_each_loss_has_its_weight() -> None:
    e, same = F.normalize(number((3, 2, 4), 1), dim=-1), torch.zeros(2, 4).bool()
    sums, means = number((2, 2), 2), number((2, 2), 3)
    names = ("contrast_weight", "generation_weight", "kl_weight")
    for generation in ("dpo", "sft"):

        def total(*weights: float, generation: Any = generation) -> Tensor:
            options = dict(zip(names, weights, strict=True))
            return Ullme(generation=generation, **options).losses(e, sums, means, same)

        alone = [total(1, 0, 0), total(0, 1, 0), total(0, 0, 1)]
        torch.testing.assert_close(total(2, 3, 5), 2 * alone[0] + 3 * alone[1] + 5 * alone[2])
        torch.testing.assert_close(alone[2], alignment((e[0] * e[1:]).sum(-1).T, means.T, 0.05))
        assert generation == "dpo" or torch.equal(alone[1], -means[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_loss_and_gradients_are_those_of_texts_by_themselves(side: Any, bidirectional: bool) -> None:
    stack = shift(build(bidirectional=bidirectional, temperature=0.3, beta=0.2, instruction=" Say:"))
    loss = float(stack.train_step(batch_of(stack, side=side)))
    found = gradients(stack)

    def vector(text: str) -> Tensor:
        flag = {"both_ways": torch.tensor([1])} if bidirectional else {}
        ids = torch.tensor([prompt_ids(TOKENIZER, text)])
        return F.normalize(
            stack.model(ids, output_hidden_states=True, **flag).hidden_states[-1][0].mean(0), dim=-1
        )

    def written(query: str, text: str) -> Tensor:
        pair = encode_pair(TOKENIZER, query + " Say:", text, max_length=64)
        p = stack.model(torch.tensor([pair.input_ids])).logits[0].log_softmax(-1)
        return torch.stack([p[t - 1, y] for t, y in enumerate(pair.labels) if y != IGNORE])

    q, p, n = (torch.stack([vector(row[name]) for row in ROWS]) for name in ("prompt", "chosen", "rejected"))
    losses = []
    for i, row in enumerate(ROWS):
        good, bad = (written(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        scores = torch.cat([p, n]) @ q[i] / 0.3
        c, g = torch.stack([q[i] @ p[i], q[i] @ n[i]]) / 0.3, torch.stack([good.mean(), bad.mean()]).detach()
        kl = (g.softmax(0) * (g.log_softmax(0) - c.log_softmax(0))).sum()
        losses.append(-scores.log_softmax(0)[i] - F.logsigmoid(0.2 * (good.sum() - bad.sum())) + kl)
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for a, b in zip(found, gradients(stack), strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(1, float(b.abs().max())))


# ----------------------------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_give_the_gradients_of_the_whole(checkpointing: bool) -> None:
    """Also where layers are recomputed: a recomputed layer reads the way that its own row was read."""
    found = []
    for chunk, again in (
        (None, False),
        (None, checkpointing),
        (1, checkpointing),
        (3, checkpointing),
        (9, False),
    ):
        stack = shift(build(chunk=chunk))
        stack.model.train()
        if again:
            stack.model.activation_checkpointing_enable()
        loss = float(stack.train_step(batch_of(stack)))
        found.append((loss, gradients(stack)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        assert max(float((a - b).abs().max()) for a, b in zip(gradient, found[0][1], strict=True)) < 1e-5


def test_a_chunk_is_passed_again_when_its_gradient_is_known() -> None:
    stack, rows = shift(build(chunk=3)), []
    stack.model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    stack.train_step(batch_of(stack))
    assert sorted(rows) == [5, 5, 15, 15]


def test_what_is_dropped_at_random_is_the_same_when_it_is_passed_again() -> None:
    found = []
    for chunk in (None, 4):
        stack = shift(build(Lora(rank=2, dropout=0.5), chunk=chunk))
        stack.model.train()
        torch.manual_seed(3)
        stack.train_step(batch_of(stack))
        found.append(gradients(stack))
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-5


class Reads(Plugin):
    """A loss on what the model returned."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.add_loss("size", lambda outputs: outputs.logits.square().mean(), over="step")
        return (yield)


def test_losses_of_others_read_the_whole_pass_alone() -> None:
    assert math.isfinite(build(Lora(rank=2), Reads()).train_step(batch_of(build())))
    stack = build(Lora(rank=2), Reads(), chunk=2)
    with pytest.raises(
        UnsupportedError, match="reads `logits` of all rows, and with chunk they pass in parts"
    ):
        stack.train_step(batch_of(stack))


def test_forward_passes_alone_train_on_it_too() -> None:
    for chunk in (None, 2):
        report = build(Lora(rank=2), Mezo(eps=1e-2), chunk=chunk).train(
            ROWS, steps=2, learning_rate=1e-3, **OPTIONS
        )
        assert all(math.isfinite(loss) for _, loss in report.losses)


# ------------------------------------------------------------------------------------------------------------- rows
def test_the_five_texts_of_a_row() -> None:
    stack = build(instruction=" Say:")
    for side in ("left", "right"):
        rows = five(batch_of(stack, side=side), PAD, "ullme")
        pairs = [
            encode_pair(TOKENIZER, row["prompt"] + " Say:", row[name], max_length=64)
            for name in ("chosen", "rejected")
            for row in ROWS
        ]
        texts = [
            prompt_ids(TOKENIZER, row[name]) for name in ("prompt", "chosen", "rejected") for row in ROWS
        ]
        expected = Collator(PAD)(
            [{"input_ids": p.input_ids, "labels": p.labels} for p in pairs]
            + [{"input_ids": ids, "labels": [IGNORE] * len(ids)} for ids in texts]
        )
        assert all(torch.equal(rows[name], expected[name]) for name in expected)
        assert rows["both_ways"].tolist() == [0] * 8 + [1] * 12
        part = rows_of(rows, range(1, 3), 4)
        assert part["input_ids"].tolist() == rows["input_ids"][[1, 2, 5, 6, 9, 10, 13, 14, 17, 18]].tolist()


def test_a_token_whose_id_is_zero_counts() -> None:
    zero = torch.tensor([[5, 0]])
    batch = dict.fromkeys(
        ("rejected_ids", "rejected_labels", "query_ids", "positive_ids", "negative_ids"), zero
    )
    batch |= {"input_ids": zero, "labels": zero, "attention_mask": torch.ones(1, 2).long()}
    rows = five(batch, 9, "ullme")
    assert rows["input_ids"].tolist() == [[5, 0]] * 5
    assert rows["labels"].tolist() == [[5, 0]] * 2 + [[IGNORE, IGNORE]] * 3
    assert rows["attention_mask"].all()


def test_passages_that_are_the_same_are_no_negatives() -> None:
    p, n = torch.tensor([[4, 5], [6, -1], [4, 5]]), torch.tensor([[6, -1, -1], [4, 5, 6], [7, 7, 7]])
    assert same_texts(p, n).tolist() == [
        [True, False, True, False, False, False],
        [False, True, False, True, False, False],
        [True, False, True, False, False, False],
    ]
    rows = [*ROWS[:2], {**ROWS[1], "prompt": "and this?"}]
    stack = build(generation_weight=0, kl_weight=0, temperature=0.5)
    loss = float(stack.train_step(batch_of(stack, rows)))
    q, p, n = (
        plugin_of(stack).embed(stack, [row[name] for row in rows])
        for name in ("prompt", "chosen", "rejected")
    )
    scores = q @ torch.cat([p, n]).T / 0.5
    scores[1, 2] = scores[2, 1] = float("-inf")
    assert loss == pytest.approx(float(F.cross_entropy(scores, torch.arange(3))), rel=1e-4)


def test_rows_of_evaluation_are_rewritten_too_and_columns_of_others_come_along() -> None:
    class Asks(Plugin):
        @hookimpl
        def inject(self, model: Any) -> None:
            model.column("user")

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            loss = yield
            seen.append(step.batch["user"].tolist())
            return loss

    seen: list[list[int]] = []
    stack = build(Lora(rank=2), Asks())
    rows = [{**row, "user": 4 + i, "note": "of nobody"} for i, row in enumerate(ROWS)]
    data = as_training_data(stack, rows, seed=0, max_length=64)
    data.eval = data.train
    stack.prepare(data)
    assert data.format == "tokenized"
    assert data.train[:] == data.eval[:]
    assert "note" not in data.train.column_names
    batch = batch_of(stack, rows)
    stack.train_step(batch)
    assert seen == [[4, 5, 6, 7] * 5]
    with pytest.raises(PeftxError, match="column 'user' has a value a token of one text"):
        stack.train_step(batch | {"user": torch.ones_like(batch["input_ids"])})


def test_training_finds_passages_and_prefers_to_write_them() -> None:
    stack = build(Lora(rank=4), chunk=2)
    batch = five(batch_of(stack), PAD, "ullme")
    inputs = {name: batch[name][:8] for name in ("input_ids", "attention_mask")}

    def margin() -> float:
        with torch.no_grad():
            good, bad = log_probs(stack.model(**inputs).logits, batch["labels"][:8])[0].chunk(2)
        return float((good - bad).min())

    before = margin()
    report = stack.train(ROWS, steps=12, learning_rate=1e-2, **OPTIONS)
    assert report.last_loss < 0.3 * report.first_loss
    q, p = (plugin_of(stack).embed(stack, [row[name] for row in ROWS]) for name in ("prompt", "chosen"))
    assert (q @ p.T).argmax(1).tolist() == [0, 1, 2, 3]
    assert margin() > before + 1


# ----------------------------------------------------------------------------------------------------- what is wrong
def test_a_negative_that_is_the_passage_is_refused() -> None:
    rows = [*ROWS, {"prompt": "Q", "chosen": " same", "rejected": "same"}]
    with pytest.raises(
        DataError, match=r"ullme: row 4 \(counting from 0\): chosen and rejected are the same"
    ):
        build().train(rows, steps=1)


def test_rows_of_one_class_are_refused() -> None:
    rows = [{**row, "chosen": "spam"} for row in ROWS]
    with pytest.raises(DataError, match="ullme: all 4 rows have one passage, so there is one class"):
        build().train(rows, steps=1)
    build().train(rows[:1], steps=1, batch_size=1, max_length=64)  # its negative is another
    with pytest.raises(DataError, match=r"ullme: row 0 .* is a conversation, and passages are texts"):
        build().train([{**ROWS[0], "prompt": [{"role": "user", "content": "Hi"}]}], steps=1)


def test_rows_and_batches_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="ullme: the rows are of format 'text'"):
        build().train([{"text": "once"}], steps=1)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(PeftxError, match="ullme: the batch has no attention_mask, labels, negative_ids"):
        build().train_step({"input_ids": ids})


@pytest.mark.parametrize("arch", ["bert", "t5", "vit"])
def test_models_that_do_not_go_on_with_a_text(arch: str) -> None:
    with pytest.raises(
        ArchitectureError, match=f"ullme: {type(tiny(arch)).__name__} is no decoder that writes text"
    ):
        build(arch=arch)


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("mamba", "mamba has no attention layers"),
        ("bloom", "does not look its attention up"),
        ("qwen3_next", r"qwen3_next has '\w+' in 1 of 2"),
    ],
)
def test_models_whose_mask_cannot_be_dropped(arch: str, told: str) -> None:
    with pytest.raises(ArchitectureError, match=told):
        build(arch=arch)
    build(arch=arch, bidirectional=False)


def test_an_attention_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArchitectureError, match="llama has 'flash_attention_2' in 2 of 2"):
        Stack(model, [Ullme()], tokenizer=TOKENIZER)


def test_another_plugin_that_computes_the_attention_is_refused() -> None:
    with pytest.raises(ConflictError, match="compute the attention"):
        build(NtkAttention())
    build(NtkAttention(), bidirectional=False)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "max"},
        {"temperature": 0},
        {"generation": "ipo"},
        {"beta": 0},
        {"contrast_weight": -1},
        {"kl_weight": math.nan},
        {"chunk": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Ullme: {next(iter(options))}"):
        Ullme(**options)
