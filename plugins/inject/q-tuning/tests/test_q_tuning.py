from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Plugin, Stack
from peftx.engines.data import IGNORE
from peftx.errors import ConflictError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning
from peftx_q_tuning import QTuning, QueuedPrompt, de_queue, retained, state

test_conformance = conformance("q-tuning")

D, L, S = 32, 2, 3
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.05}


def rows_of(i: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} and {i} =", "completion": f" {n + i}", "task": i} for n in range(6)]


def stack_of(tasks: int = 10, *beside: Plugin, arch: str = "llama", **options: Any) -> tuple[Stack, QTuning]:
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
    stack, plugin = stack_of(2, arch=arch, eta=0.7)
    learn(plugin, 2)
    prompt, batch = plugin.prompt, example_inputs(stack.model, padding="left")
    batch.pop("decoder_input_ids", None)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    plugin.task = 1
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
    ended = []
    for i in range(10):
        report = stack.train(rows_of(i), steps=2, **RUN)
        assert set(report.terms) == ({"task", "retention"} if i else {"task"})
        ended.append(logits(stack))
    assert plugin.state == {"task": 9}
    assert plugin.prompt.counts.tolist() == [5, 7, *[9] * 8]
    assert len({tuple(x.flatten().tolist()) for x in plugin.prompt.stored}) == 9
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b", model=tiny(arch), tokenizer=tiny_tokenizer())
    for i in range(10):
        column = torch.full((len(ended[0]),), i)
        assert torch.equal(logits(again, task=column), ended[i])
    again.train(rows_of(9), steps=2, **RUN)  # the last task goes on
    assert torch.equal(logits(again, task=column * 0), ended[0])
    assert not torch.equal(logits(again), ended[9])


def test_rows_without_a_task_are_of_the_newest() -> None:
    stack, plugin = stack_of(eta=0)
    assert not hasattr(plugin, "critic")
    plain_rows = [{key: row[key] for key in ("prompt", "completion")} for row in rows_of(0)]
    for rows, task in ((plain_rows, 0), (rows_of(1), 1), (plain_rows, 1)):
        stack.train(rows, steps=1, **RUN)
        assert plugin.state == {"task": task}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    found = []
    for resume in (False, tmp_path / "checkpoint-3"):
        stack, plugin = stack_of(3)
        stack.train(rows_of(0), steps=2, **RUN)
        stack.train(rows_of(1), steps=6, output=tmp_path, resume=resume, checkpoint_every=3, **RUN)
        found.append((plugin.state, logits(stack)))
    assert found[0][0] == found[1][0] == {"task": 1}
    assert torch.equal(found[0][1], found[1][1])


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


@pytest.mark.parametrize("option", [{"tasks": 1}, {"queue": 1}, {"length": 0}, {"shared": 0}, {"eta": -1}])
def test_options_that_make_no_stream_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(option))):
        QTuning(**{"tasks": 2, **option})


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    room = tiny("llama").config.max_position_embeddings
    with pytest.raises(PeftxError, match=f"q-tuning: {room} soft tokens leave no room"):
        stack_of(length=1, queue=room - S)


def test_a_task_to_come_is_answered_as_the_newest_and_one_that_is_none_is_refused() -> None:
    stack, plugin = stack_of(4)
    learn(plugin, 2)
    newest = logits(stack)
    for task in (1, 3):
        assert torch.equal(logits(stack, task=torch.full((len(newest),), task)), newest)
    for task in (4, -1):
        with pytest.raises(DataError, match=rf"tasks \[{task}\], and the stream has 4"):
            logits(stack, task=torch.tensor([task]))


@pytest.mark.parametrize(
    ("learned", "rows", "said"),
    [
        ([], rows_of(1), r"tasks \[1\], and 0 of 3 were learned"),
        ([0], rows_of(2), r"tasks \[2\], and 1 of 3"),
        ([0, 1], rows_of(0), r"tasks \[0\], and 2 of 3"),
        ([0, 1, 2], rows_of(3), r"tasks \[3\], and 3 of 3"),
        ([], rows_of(0) + rows_of(1), r"tasks \[0, 1\]"),
    ],
)
def test_rows_out_of_turn_are_refused(learned: list[int], rows: list[dict[str, Any]], said: str) -> None:
    stack, plugin = stack_of(3)
    for task in learned:
        stack.train(rows_of(task), steps=1, **RUN)
    before = dict(plugin.state)
    with pytest.raises(DataError, match=said):
        stack.train(rows, steps=1, **RUN)
    assert plugin.state == before


@pytest.mark.parametrize("name", ["user-profile", "mosaic-it"])
def test_rows_of_another_make_say_no_task(name: str) -> None:
    """They would be learned as the newest one, or name tasks in another sense: refused by claims, in both orders."""
    cls = peftx.Registry().load(name)
    for stack in ([cls(**cls.example), QTuning(tasks=2)], [QTuning(tasks=2), cls(**cls.example)]):
        with pytest.raises(ConflictError, match=f"'{name}' trains on rows of its own"):
            Stack(tiny("llama"), stack, tokenizer=tiny_tokenizer())


def test_a_batch_of_another_task_is_refused() -> None:
    stack, _ = stack_of(2)
    with pytest.raises(DataError, match="rows of another task than 0"):
        stack.train_step({**example_inputs(stack.model), "task": torch.tensor([1])})


def test_a_text_that_is_left_over_trains_alone() -> None:
    stack, plugin = stack_of(2)
    learn(plugin, 2)
    plugin.state["task"] = 1
    told: list[set[str]] = []
    stack.train(rows_of(1)[:5], steps=2, progress=lambda *x: told.append(set(x[2])), **RUN)
    assert ["retention" in values for values in told] == [True, False]


def test_micro_batches_weigh_as_their_rows() -> None:
    stack, plugin = stack_of(3, eta=0.7)
    learn(plugin, 3)
    plugin.task = 2
    ids = torch.arange(5, 25).view(5, 4)
    whole = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    parts = [{key: x[part] for key, x in whole.items()} for part in (slice(3), slice(3, 5))]
    for i, (share, expected) in enumerate(zip(stack.shares(parts), (6 / 5, 4 / 5), strict=True)):
        step = peftx.TrainStep(stack, parts[i], micro=i, accumulation=2, share=share)
        total, found = float(stack.run_train_step(step)), step.losses
        assert total == pytest.approx(expected * (found["task"] + 0.7 * found["retention"]), rel=1e-4)


def test_adapters_beside_it_train_in_all_tasks() -> None:
    stack, _ = stack_of(2, Lora(rank=2))
    for i in range(2):
        before = [p.detach().clone() for p in stack.ledger.parameters("lora")]
        stack.train(rows_of(i), steps=2, **RUN)
        after = stack.ledger.parameters("lora")
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
