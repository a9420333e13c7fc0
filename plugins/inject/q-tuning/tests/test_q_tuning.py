from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Plugin, Stack
from peftx.engines.data import IGNORE
from peftx.errors import DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning
from peftx_q_tuning import QTuning, QueuedPrompt, de_queue, retained, state

test_conformance = conformance("q-tuning")

D, L, S = 32, 2, 3
TEN = tuple(f"t{i}" for i in range(10))
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.05}


def rows_of(i: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} and {i} =", "completion": f" {n + i}"} for n in range(6)]


def sources(tasks: tuple[str, ...]) -> dict[str, Any]:
    return {name: rows_of(i) for i, name in enumerate(tasks[:-1])}


def stack_of(
    tasks: tuple[str, ...] = TEN, *beside: Plugin, arch: str = "llama", **options: Any
) -> tuple[Stack, QTuning]:
    plugin = QTuning(**{"tasks": tasks, "length": L, "queue": 3, "shared": S, **options})
    return Stack(tiny(arch), [plugin, *beside], tokenizer=tiny_tokenizer()), plugin


def learn(plugin: QTuning, tasks: int, seed: int = 0) -> None:
    """Go through so many tasks as if each had trained."""
    random = torch.Generator().manual_seed(seed)
    for i in range(tasks):
        if i:
            plugin.prompt.next_task(torch.randn(L, D, generator=random))
        for p in plugin.prompt.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=random)


def logits(stack: Stack, **columns: Tensor) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left") | columns)


def plain(rows: Tensor, arch: str = "llama") -> Stack:
    stack = Stack(tiny(arch), [PromptTuning(length=len(rows))], tokenizer=tiny_tokenizer())
    (p,) = stack.ledger.parameters("prompt-tuning")
    p.data.copy_(rows)
    return stack


# -- De-Q --------------------------------------------------------------------------------------------------------------


def parts(Q: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Q and what is left of it, both without the mean of Q."""
    return Q - Q.mean(0), de_queue(Q, rows) - Q.mean(0)


def test_all_components_rebuild_the_queue() -> None:
    Q, kept = parts(torch.randn(6, D), 6)
    U = Q @ torch.linalg.pinv(kept)
    torch.testing.assert_close(U @ kept, Q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept.T @ kept, Q.T @ Q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_queue_of_low_rank_loses_nothing(rank: int) -> None:
    whole = torch.randn(6, rank) @ torch.randn(rank, D)
    kept = de_queue(whole, 4)
    assert kept.shape == (4, D)
    torch.testing.assert_close(whole @ torch.linalg.pinv(kept, rtol=1e-4) @ kept, whole, rtol=1e-3, atol=1e-3)


def test_the_largest_components_stay() -> None:
    """What is lost is the sum of the squares of the singular values that went, the least possible."""
    Q, kept = parts(torch.randn(6, D), 2)
    sigma = torch.linalg.svdvals(Q)
    torch.testing.assert_close(kept.norm(dim=1), sigma[:2])
    lost = Q - Q @ torch.linalg.pinv(kept) @ kept
    torch.testing.assert_close(lost.square().sum(), sigma[2:].square().sum(), rtol=1e-4, atol=1e-4)


def test_a_queue_by_hand() -> None:
    """Rows m + 3 e, m - e, m - 2 e: one component, sqrt(14) e, towards the row farthest out."""
    m, e = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    Q = torch.stack((m + 3 * e, m - e, m - 2 * e))
    torch.testing.assert_close(de_queue(Q, 2), torch.stack((m + 14**0.5 * e, m)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(de_queue(2 * m - Q, 1), (m - 14**0.5 * e)[None])
    assert de_queue(Q.bfloat16(), 2).dtype == torch.bfloat16


# -- the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "t5", "gpt2", "bert", "mamba"])
def test_at_first_it_is_a_plain_prompt_of_all_so_far(arch: str) -> None:
    """u = v = 1: progressive prompts behind the prefix, whatever room is left in the queue."""
    stack, plugin = stack_of(arch=arch)
    thetas = [torch.randn(L, D) for _ in range(3)]
    plugin.prompt.theta.data.copy_(thetas[0])
    for i, theta in enumerate(thetas):
        if i:
            plugin.prompt.next_task(theta)
        found = logits(stack)
        rows = torch.cat((plugin.prompt.S.detach(), *thetas[: i + 1]))
        torch.testing.assert_close(found, logits(plain(rows, arch)), rtol=1e-4, atol=1e-4)


def test_u_and_v_weigh_each_number() -> None:
    _, plugin = stack_of()
    prompt = plugin.prompt
    prompt.next_task(torch.full((L, D), 2.0))
    prompt.kept.fill_(3.0)
    prompt.u.data.copy_(torch.tensor([[9.0], [9.0], [1.0], [2.0], [3.0], [4.0]]))
    prompt.v.data.copy_(torch.arange(D)[None])
    Q = prompt.rows()[S:]
    expected = torch.tensor([3.0, 6.0, 6.0, 8.0])[:, None] * torch.arange(D)
    torch.testing.assert_close(Q, expected)
    torch.testing.assert_close(prompt.rows()[:S], prompt.S)


def test_what_the_queue_holds_as_tasks_come() -> None:
    _, plugin = stack_of()
    prompt, held = plugin.prompt, []
    for i in range(10):
        if i:
            whole = torch.cat((prompt.kept[4 - min(2 * i - 2, 4) :], prompt.theta)).detach().clone()
            prompt.next_task(torch.randn(L, D))
            expected = whole if i <= 2 else de_queue(whole, 4)
            torch.testing.assert_close(prompt.kept[4 - len(expected) :], expected)
            assert torch.equal(prompt.u, torch.ones(6, 1))
            assert torch.equal(prompt.v, torch.ones(1, D))
            assert torch.equal(prompt.S_before, prompt.S)
        assert prompt.newest == i
        held.append(len(prompt.rows()) - S)
        for p in prompt.parameters():
            p.data += torch.randn(p.shape)
    assert held == [2, 4, *[6] * 8], "never more than C"


def test_fewer_components_than_rows() -> None:
    prompt = QueuedPrompt(torch.randn(2, 2), torch.randn(1, 2), 8, 6, tiny_call())
    for _ in range(5):
        prompt.next_task(torch.randn(2, 2))
    assert prompt.counts.tolist() == [3, 5, 7, 9, 5, 7]
    assert prompt.rows().shape == (7, 2)


def tiny_call() -> Any:
    return stack_of()[1].prompt.call


@pytest.mark.parametrize("arch", ["llama", "t5", "bert", "gpt2", "mamba"])
def test_a_task_is_answered_as_it_was_when_it_ended(arch: str) -> None:
    stack, plugin = stack_of(arch=arch)
    ended = []
    for i in range(10):
        learn(plugin, 1, seed=i)
        ended.append(logits(stack))
        if i < 9:
            plugin.prompt.next_task(torch.randn(L, D))
    count = len(ended[0])
    for i in range(10):
        assert torch.equal(logits(stack, task=torch.full((count,), i)), ended[i])
    assert not torch.equal(ended[8], ended[9])
    mixed = logits(stack, task=9 - torch.arange(count))
    for row in range(count):
        torch.testing.assert_close(mixed[row], ended[9 - row][row], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(stack), ended[9]), "where nobody says, the newest"


def test_old_rows_have_no_gradient() -> None:
    stack, plugin = stack_of()
    learn(plugin, 4)
    trained = {name for name, p in stack.model.named_parameters() if p.requires_grad}
    last = {name.rsplit("prompt.", 1)[-1].rsplit(".", 1)[-1] for name in trained if "critic" not in name}
    assert last == {"theta", "S", "u", "v"}
    assert sum(p.numel() for p in plugin.prompt.parameters()) == L * D + S * D + 3 * L + D
    inputs = example_inputs(stack.model)
    stack.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in plugin.prompt.parameters())
    assert not plugin.prompt.kept.requires_grad
    assert [tuple(p.shape) for p in plugin.critic.parameters()] == [(128, 2 * D), (128,), (1, 128), (1,)]


# -- retention ---------------------------------------------------------------------------------------------------------


def test_retention_by_hand() -> None:
    """F(a, b) = a + 10 b on numbers: pairs of one text, and with the next text's state."""
    critic = torch.nn.Linear(2, 1, bias=False)
    critic.weight.data.copy_(torch.tensor([[1.0, 10.0]]))
    h, before = torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[0.01], [0.02], [0.03]])
    sp = torch.nn.functional.softplus
    joint = sp(-torch.tensor([0.2, 0.4, 0.6])).mean()
    apart = sp(torch.tensor([0.1 + 0.2, 0.2 + 0.3, 0.3 + 0.1])).mean()
    torch.testing.assert_close(retained(critic, h, before), joint + apart)


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_the_step_by_hand(arch: str) -> None:
    """L + eta L_MR, with states under S, and under what S was, alone."""
    stack, plugin = stack_of(("a", "b"), arch=arch, eta=0.7, steps=1)
    learn(plugin, 2)
    prompt, batch = plugin.prompt, example_inputs(stack.model, padding="left")
    batch.pop("decoder_input_ids", None)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    plugin.state["task"] = 1
    total = float(stack.train_step(batch))
    found = prompt.S.grad.clone()
    hidden, leaves = [], []
    for rows in (prompt.S, prompt.S_before):
        alone = plain(rows.detach(), arch)
        leaves += alone.ledger.parameters("prompt-tuning")
        hidden.append(state(alone.model.eval()(**batch, output_hidden_states=True), batch["attention_mask"]))
    prompt.S.grad = None
    task = stack.model.eval()(**batch).loss
    expected = task + 0.7 * retained(plugin.critic, hidden[0], hidden[1].detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-4)
    expected.backward()
    torch.testing.assert_close(found, prompt.S.grad + leaves[0].grad, rtol=1e-3, atol=1e-5)


def test_a_state_is_the_mean_over_real_tokens() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 1, 1]])
    from transformers.modeling_outputs import CausalLMOutput, Seq2SeqLMOutput

    expected = torch.stack((hidden[0, 1:].mean(0), hidden[1].mean(0)))
    torch.testing.assert_close(state(CausalLMOutput(hidden_states=(hidden * 2, hidden)), mask), expected)
    soft = torch.cat((torch.randn(2, 5, 4), hidden), 1)
    torch.testing.assert_close(state(Seq2SeqLMOutput(encoder_last_hidden_state=soft), mask), expected)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_stream_of_ten_tasks(arch: str, tmp_path: Path) -> None:
    stack, plugin = stack_of(arch=arch)
    seen: list[str] = []
    told: list[set[str]] = []

    def note(done: int, total: int, values: dict[str, Any]) -> None:
        seen.append(values["q-tuning"])
        told.append({"task", "retention"} & set(values))

    stack.train(rows_of(9), steps=20, sources=sources(TEN), progress=note, **RUN)
    assert seen == [name for name in TEN for _ in range(2)]
    assert told == [{"task"}] * 2 + [{"task", "retention"}] * 18
    assert plugin.state == {"task": 9}
    assert plugin.prompt.counts.tolist() == [5, 7, *[9] * 8]
    assert len({tuple(x.flatten().tolist()) for x in plugin.prompt.stored}) == 9
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b", model=tiny(arch), tokenizer=tiny_tokenizer())
    for i in range(10):
        column = torch.full((len(logits(stack)),), i)
        assert torch.equal(logits(again, task=column), logits(stack, task=column))
    before = logits(again, task=torch.zeros(len(column), dtype=torch.int64))
    again.train(rows_of(9), steps=2, **RUN)  # the last task goes on, and needs no source
    assert torch.equal(logits(again, task=torch.zeros(len(column), dtype=torch.int64)), before)
    assert not torch.equal(logits(again), logits(stack))


def test_each_task_trains_on_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of(("a", "b", "c"), steps=2, eta=0)
    assert not hasattr(plugin, "critic")
    texts, forward = [], QueuedPrompt.rows

    def note(self: QueuedPrompt) -> Tensor:
        texts.append(stack.tokenizer.batch_decode(self.call.ids))
        return forward(self)

    monkeypatch.setattr(QueuedPrompt, "rows", note)
    report = stack.train(rows_of(2), steps=5, sources=sources(("a", "b", "c")), **RUN)
    assert set(report.terms) == {"task"}
    for step, i in enumerate((0, 0, 1, 1, 2)):
        assert all(f"and {i} =" in text for text in texts[step])


def test_the_optimizer_begins_anew_with_each_task() -> None:
    """Adam's first step is the rate, whatever the gradient is."""
    stack, plugin = stack_of(("a", "b"), steps=3, eta=0)
    seen = [plugin.prompt.S.detach().clone()]
    stack.train(
        rows_of(1), steps=6, sources=sources(("a", "b")), batch_size=4, learning_rate=0.01, schedule="constant",
        weight_decay=0, max_grad_norm=0, progress=lambda *_: seen.append(plugin.prompt.S.detach().clone()),
    )  # fmt: skip
    moved = [(b - a).abs().flatten() for a, b in pairwise(seen)]
    assert [bool((x > 0.0099).float().mean() > 0.95) for x in moved] == [True, False, False] * 2


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tasks = ("a", "b", "c")
    whole, _ = stack_of(tasks)
    options = {**RUN, "sources": sources(tasks), "checkpoint_every": 3}
    whole.train(rows_of(2), steps=6, output=tmp_path / "r", **options)
    again, plugin = stack_of(tasks)
    again.train(rows_of(2), steps=6, output=tmp_path / "s", resume=tmp_path / "r" / "checkpoint-3", **options)
    assert plugin.state == whole.plugins["q-tuning"].state
    assert torch.equal(logits(again), logits(whole))


def test_what_is_asked_of_it_comes_by_task() -> None:
    stack, plugin = stack_of()
    learn(plugin, 5)
    texts, tasks = ["Say it.", "The light is on"], torch.tensor([2, 3])
    with stack.columns(task=tasks):
        both = stack.generate(texts, max_new_tokens=5)
    for row, text in enumerate(texts):
        with stack.columns(task=tasks[row : row + 1]):
            assert stack.generate(text, max_new_tokens=5) == both[row]
    with stack.columns(task=torch.tensor([0])):
        first = stack.generate(texts[0], max_new_tokens=5)
    prompt = plain(plugin.prompt.stored[0, -S - L :])
    assert first == prompt.generate(texts[0], max_new_tokens=5)
    with (
        pytest.raises(DataError, match=r"prompts of \[5, 9\] rows"),
        stack.columns(task=torch.tensor([0, 3])),
    ):
        stack.generate(texts, max_new_tokens=5)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("one",)}, "a stream has two tasks or more"),
        ({"tasks": ()}, "a stream has two tasks or more"),
        ({"tasks": ("a", "a")}, "a name of its own"),
        ({"tasks": ("train", "a")}, "none but the last"),
        ({"queue": 1}, "queue"),
        ({"length": 0}, "length"),
        ({"shared": 0}, "shared"),
        ({"eta": -1}, "eta"),
        ({"steps": 0}, "steps"),
    ],
)
def test_options_that_make_no_stream_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PeftxError, match=said):
        QTuning(**{"tasks": ("a", "b"), **options})
    QTuning(tasks=("a", "train"))


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    room = tiny("llama").config.max_position_embeddings
    with pytest.raises(PeftxError, match=f"q-tuning: {room} soft tokens leave no room"):
        stack_of(length=1, queue=room - S)


def test_tasks_that_were_not_learned_are_refused() -> None:
    stack, plugin = stack_of()
    learn(plugin, 2)
    for task in (2, -1):
        with pytest.raises(DataError, match=rf"tasks \[{task}\], and 0 to 1 have been learned"):
            logits(stack, task=torch.tensor([task]))


def test_rows_that_do_not_fit_are_refused() -> None:
    stack, _ = stack_of(("a", "b"))
    with pytest.raises(DataError, match="q-tuning: there is no source 'a'"):
        stack.train(rows_of(0), steps=2, **RUN)
    wrong = [{**row, "task": 1} for row in rows_of(0)]
    with pytest.raises(DataError, match="rows of 'a' say another task than 0"):
        stack.train(rows_of(1), steps=2, sources={"a": wrong}, **RUN)
    right = [{**row, "task": 0} for row in rows_of(0)]
    with pytest.raises(DataError, match="'a' gives one at a time"):
        stack.train(rows_of(1), steps=2, sources={"a": right}, batch_size=1)


def test_a_text_that_is_left_over_trains_alone() -> None:
    stack, _ = stack_of(("a", "b"), steps=1)
    told: list[set[str]] = []
    rows = rows_of(1)[:5]
    stack.train(rows, steps=4, sources=sources(("a", "b")), progress=lambda *x: told.append(set(x[2])), **RUN)
    assert ["retention" in values for values in told] == [False, False, True, False]


def test_micro_batches_weigh_as_their_rows_and_those_of_a_source_alike() -> None:
    stack, plugin = stack_of(("a", "b", "c"), steps=1, eta=0.7)
    learn(plugin, 1)
    ids = torch.arange(5, 25).view(5, 4)
    whole = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    parts = [{key: x[part] for key, x in whole.items()} for part in (slice(3), slice(3, 5))]
    for task, expected in ((1, [1.0, 1.0]), (2, [6 / 5, 4 / 5])):
        plugin.prompt.next_task(torch.randn(L, D))
        plugin.state["task"] = task
        for i, share in enumerate(stack.shares(parts)):
            step = peftx.TrainStep(stack, parts[i], micro=i, accumulation=2, share=share)
            step.batch_of = lambda name: dict(parts[0])  # type: ignore[method-assign]
            total, found = float(stack.run_train_step(step)), step.losses
            weighed = expected[i] * (found["task"] + 0.7 * found["retention"])
            assert total == pytest.approx(weighed, rel=1e-4)


def test_adapters_beside_it_train_in_all_tasks() -> None:
    stack, _ = stack_of(("a", "b"), Lora(rank=2))
    before = [p.detach().clone() for p in stack.ledger.parameters("lora")]
    stack.train(rows_of(1), steps=4, sources=sources(("a", "b")), **RUN)
    after = stack.ledger.parameters("lora")
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
