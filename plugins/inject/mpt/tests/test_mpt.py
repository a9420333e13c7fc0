from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningConfig
from safetensors.torch import load_file
from torch import Tensor

import peftx
from peftx import Stack, TrainStep
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.interop import import_peft, to_peft
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_mpt import Mpt, MptPrompt
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("mpt")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
SOURCES = {
    "tasks": [
        {"prompt": f"{n} {'is' if n % 2 else 'and'}", "completion": f" {n}", "task": n % 2} for n in range(8)
    ]
}
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.05}
D = 32


def stack_of(arch: str = "llama", moved: bool = True, **options: Any) -> tuple[Stack, Mpt]:
    plugin = Mpt(**{"length": 3, "tasks": 2, "teachers": 2, "shared": 2, **options})
    stack = Stack(tiny(arch), [plugin], tokenizer=tiny_tokenizer())
    if moved:
        random = torch.Generator().manual_seed(0)
        for x in (plugin.prompt.factors[0], plugin.prompt.factors[1]):
            x.data.copy_(torch.randn(x.shape, generator=random))
    return stack, plugin


def plain_of(P: Tensor, arch: str = "llama") -> Stack:
    stack = Stack(tiny(arch), [PromptTuning(length=len(P))], tokenizer=tiny_tokenizer())
    (parameter,) = stack.ledger.parameters("prompt-tuning")
    parameter.data.copy_(P)
    return stack


def logits(stack: Stack, **columns: Tensor) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left") | columns)


def values(plugin: Mpt) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in plugin.prompt.named_parameters()}


# -- the decomposition -------------------------------------------------------------------------------------------------


def test_a_prompt_by_hand() -> None:
    _, plugin = stack_of(length=2, tasks=0)
    prompt = plugin.prompt
    prompt.factors[0].data.copy_(torch.tensor([[[2.0], [-1.0]]]))
    row = torch.arange(D, dtype=torch.float32)
    prompt.factors[1].data.copy_(row[None, None])
    prompt.P.data.copy_(torch.stack((torch.ones(D), torch.full((D,), 3.0))))
    assert torch.equal(prompt.rows(), torch.stack((2 * row, -3 * row)))


def test_ones_make_every_prompt_the_shared_one() -> None:
    for rank in (1, 3):
        _, plugin = stack_of(moved=False, init="ones", rank=rank)
        prompt = plugin.prompt
        torch.testing.assert_close(prompt.rows(), prompt.P)
        torch.testing.assert_close(prompt.factors[0] @ prompt.factors[1], torch.ones(3, 3, D))


def test_normal_factors_start_small() -> None:
    _, plugin = stack_of(moved=False, length=40)
    for x in (plugin.prompt.factors[0], plugin.prompt.factors[1]):
        assert float(x.detach().std()) == pytest.approx(0.02, rel=0.3)
        assert abs(float(x.detach().mean())) < 0.01


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_numbers_and_scale(rank: int) -> None:
    _, plugin = stack_of(rank=rank)
    prompt = plugin.prompt
    assert (torch.linalg.matrix_rank(prompt.factors[0] @ prompt.factors[1]) == rank).all()
    counted = prompt.P.numel() + prompt.factors[0].numel() + prompt.factors[1].numel()
    assert counted == 3 * D + 3 * rank * (3 + D)  # two tasks and the target
    before = prompt.rows().detach()
    prompt.factors[0].data *= 4
    prompt.factors[1].data /= 4
    assert torch.equal(prompt.rows(), before)


@pytest.mark.parametrize("arch", ["llama", "t5", "gpt2", "mamba"])
def test_a_row_has_the_prompt_of_its_task(arch: str) -> None:
    stack, plugin = stack_of(arch)
    prompt, count = plugin.prompt, len(example_inputs(stack.model)["input_ids"])
    task = torch.arange(count) % 3
    found = logits(stack, task=task)
    for k in range(3):
        P_k = (prompt.P * (prompt.factors[0][k] @ prompt.factors[1][k])).detach()
        expected = logits(plain_of(P_k, arch))
        torch.testing.assert_close(found[task == k], expected[task == k], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(stack), expected, rtol=1e-4, atol=1e-4)  # of no task: the target's
    with prompt.under_teachers():
        found = logits(stack, task=task % 2)
    for k in range(2):
        expected = logits(plain_of(prompt.T[k].detach(), arch))
        torch.testing.assert_close(found[task % 2 == k], expected[task % 2 == k], rtol=1e-4, atol=1e-4)


def test_generation_of_several_tasks_at_once() -> None:
    stack, _ = stack_of()
    with stack.columns(task=torch.tensor([0, 1])):
        both = stack.generate(["ab", "cde"], max_new_tokens=4)
    for k, text in enumerate(("ab", "cde")):
        with stack.columns(task=torch.tensor([k])):
            assert stack.generate(text, max_new_tokens=4) == both[k]


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_equals_the_peer_to_the_bit(rank: int) -> None:
    """PEFT's module on the same numbers: prompts and gradients; and its start from the mean of tasks."""
    _, plugin = stack_of(rank=rank)
    prompt = plugin.prompt
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=3, num_ranks=rank, token_dim=D, num_transformer_submodules=1
    )
    theirs = MultitaskPromptEmbedding(config, torch.nn.Embedding(5, D))
    with torch.no_grad():
        theirs.embedding.weight.copy_(prompt.P)
        theirs.prefix_task_cols.copy_(prompt.factors[0])
        theirs.prefix_task_rows.copy_(prompt.factors[1])
    task = torch.tensor([2, 0, 1, 1])
    prompt.call = type("Call", (), {"batch": {"task": task}})()  # type: ignore[assignment]
    weights = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))
    found, expected = prompt.rows(), theirs(torch.arange(3).expand(4, -1), task)
    assert torch.equal(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = (
        (prompt.P, theirs.embedding.weight),
        (prompt.factors[0], theirs.prefix_task_cols),
        (prompt.factors[1], theirs.prefix_task_rows),
    )
    for ours, other in pairs:
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_adapters_go_to_peft_and_back(arch: str, tmp_path: Path) -> None:
    stack, plugin = stack_of(arch, teachers=0, keep_factors=True, rank=2)
    to_peft(stack, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "a")).eval()
    inputs = example_inputs(stack.model, padding="right")
    if arch == "t5":  # PEFT hands no decoder_input_ids on
        inputs["labels"] = inputs.pop("decoder_input_ids")
    task = torch.arange(len(inputs["input_ids"])) % 3
    mask = inputs.get("labels", inputs["attention_mask"]) >= int(arch != "t5")
    with torch.no_grad():
        found = stack.model.eval()(**inputs, task=task).logits
        expected = theirs(**inputs, task_ids=task).logits
    torch.testing.assert_close(found[mask], expected[:, -found.shape[1] :][mask], rtol=1e-4, atol=1e-4)
    again = import_peft(tmp_path / "a", model=tiny(arch), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again, task=task), logits(stack, task=task))
    plugin.collapse()
    to_peft(stack, tmp_path / "p")
    theirs = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "p")).eval()
    with torch.no_grad():
        found, expected = stack.model(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(found[mask], expected[:, -found.shape[1] :][mask], rtol=1e-4, atol=1e-4)


# -- the phases --------------------------------------------------------------------------------------------------------


def seen_by_phase(arch: str, **options: Any) -> tuple[list[tuple[str, dict[str, Tensor]]], Mpt]:
    """(phase, values) after each step."""
    stack, plugin = stack_of(arch, moved=False, init="ones", **{"keep_factors": True, **options})
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def note(done: int, total: int, told: dict[str, Any]) -> None:
        seen.append((told["mpt"], values(plugin)))

    stack.train(ROWS, steps=6, sources=SOURCES, progress=note, weight_decay=0.1, **RUN)
    return seen, plugin


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_each_phase_trains_its_own(arch: str) -> None:
    seen, plugin = seen_by_phase(arch)
    assert [name for name, _ in seen] == ["teachers"] * 2 + ["shared"] * 2 + ["target"] * 2
    (_, t1), (_, t2), (_, s1), (_, s2), (_, g1), _ = seen
    start = values(stack_of(arch, moved=False, init="ones")[1])
    for name in ("P", "factors.0", "factors.1"):
        assert torch.equal(t2[name], start[name]), "teachers"
    assert not torch.equal(t1["T"], start["T"])
    assert all(not torch.equal(t2["T"][k], start["T"][k]) for k in range(2))
    assert torch.equal(s1["T"], t2["T"])
    assert torch.equal(s2["T"], t2["T"]), "the teachers rest"
    for name in ("P", "factors.0", "factors.1"):
        assert not torch.equal(s1[name], t2[name]), "shared"
        assert not torch.equal(g1[name], s2[name]), "target"
    assert set(values(plugin)) == {"P", "factors.0", "factors.1"}
    assert plugin.state == {"adapted": True, "sourced": True}


def test_the_target_begins_at_the_means() -> None:
    _, plugin = stack_of()
    u, v = plugin.prompt.factors[0].detach().clone(), plugin.prompt.factors[1].detach().clone()
    plugin.begin_target()
    for x, old in ((plugin.prompt.factors[0], u), (plugin.prompt.factors[1], v)):
        torch.testing.assert_close(x[-1], (old[0] + old[1]) / 2)
        assert torch.equal(x[:-1], old[:-1])
    plugin.prompt.factors[0].data[-1] = 7
    plugin.begin_target()
    assert (plugin.prompt.factors[0][-1] == 7).all(), "once"


def shared_step(
    arch: str = "llama", **options: Any
) -> tuple[Stack, Mpt, dict[str, Tensor], dict[str, float], float]:
    """One step of the second phase, by hand: its batch, and its terms."""
    stack, plugin = stack_of(arch, teachers=0.01, shared=5, adapt=False, **options)
    inputs = example_inputs(stack.model)
    batch = inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    batch.pop("decoder_input_ids", None)
    if arch == "t5":
        batch["labels"] = batch["labels"][:, :4].contiguous()
    batch["task"] = torch.arange(len(inputs["input_ids"])) % 2
    step = TrainStep(stack, {}, total=10, index=5)
    step.memory["phases"] = {"mpt": [["shared", 0, 10]]}
    step.batch_of = lambda name: batch  # type: ignore[method-assign]
    plugin.on_sources(step, taught=True)
    stack.model.eval()
    total = float(step.total_loss().detach())
    return stack, plugin, batch, step.losses, total


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_terms_by_hand(arch: str) -> None:
    stack, plugin, batch, terms, total = shared_step(arch)
    model, labels = stack.model, batch["labels"]
    with torch.no_grad():
        q = model(**batch, output_hidden_states=True)
        with plugin.prompt.under_teachers():
            p = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    divergence, states = [], []
    for row in range(len(labels)):
        for i in range(labels.shape[1]):
            at = i if arch == "t5" else i - 1
            if labels[row, i] == -100 or at < 0:
                continue
            log_p, log_q = (x.logits[row, at].log_softmax(-1) for x in (p, q))
            divergence.append(float((log_p.exp() * (log_p - log_q)).sum()))
            if arch == "t5":
                states.append(
                    (p.decoder_hidden_states[-1][row, i] - q.decoder_hidden_states[-1][row, i]).square()
                )
        for i in real[row].nonzero()[:, 0].tolist():
            one, two = (
                (x.encoder_last_hidden_state[row, 3 + i] for x in (p, q))
                if arch == "t5"
                else (x.hidden_states[-1][row, i] for x in (p, q))
            )
            states.append((one - two).square())
    assert terms["task"] == pytest.approx(float(q.loss), rel=1e-4)
    expected = sum(divergence) / len(divergence) + float(torch.stack(states).mean())
    assert terms["distillation"] == pytest.approx(expected, rel=1e-3)
    assert total == pytest.approx(terms["task"] + 0.9 * expected, rel=1e-3)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MptPrompt.rows
    monkeypatch.setattr(MptPrompt, "rows", lambda self: self.T[self.call.batch["task"]] + 0 * real(self))
    *_, terms, _ = shared_step(arch)
    assert terms["distillation"] == pytest.approx(0, abs=1e-6)


def test_lambda_weighs_both_terms_and_zero_leaves_the_task() -> None:
    *_, terms, _ = shared_step(weight=0)
    assert set(terms) == {"task"}
    assert Mpt().config.weight == 0.9
    *_, terms, _ = shared_step()
    assert set(terms) == {"task", "distillation"}


def test_tasks_are_drawn_anew_two_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"tasks": [{**row, "task": n % 4} for n, row in enumerate(SOURCES["tasks"])]}
    stack, plugin = stack_of(tasks=4, teachers=0, shared=8, adapt=False)
    drawn: list[frozenset[int]] = []
    forward = plugin.prompt.rows

    def note() -> Tensor:
        drawn.append(frozenset(plugin.prompt.call.batch["task"].tolist()))
        return forward()

    plugin.prompt.rows = note  # type: ignore[method-assign]
    stack.train(ROWS, steps=12, sources=rows, batch_size=8, learning_rate=0.1)
    assert {len(tasks) for tasks in drawn} == {2, 3, 4}
    assert len(set(drawn)) > 4


def test_every_number_of_tasks_is_as_likely() -> None:
    stack, plugin = stack_of(tasks=3, teachers=0, adapt=False)
    step = TrainStep(stack, {})
    step.batch_of = lambda name: {"task": torch.arange(3)}  # type: ignore[method-assign]
    torch.manual_seed(0)
    sizes = []
    for _ in range(600):
        plugin.on_sources(step, taught=True)
        sizes.append(len(step.batch["task"]))
    assert set(sizes) == {2, 3}
    assert 250 < sizes.count(2) < 350
    plugin.on_sources(step, taught=False)
    assert len(step.batch["task"]) == 3, "teachers see all"


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_finished_run_is_a_plain_prompt(arch: str, tmp_path: Path) -> None:
    stack, plugin = stack_of(arch)
    stack.train(ROWS, steps=6, sources=SOURCES, **RUN)
    assert stack.trainable_parameters() == 3 * D
    expected = logits(stack)
    assert torch.equal(expected, logits(plain_of(plugin.prompt.P.detach(), arch)))
    stack.save(tmp_path / "b")
    assert set(load_file(tmp_path / "b" / "mpt.safetensors")) == {"prompt.P"}
    again = peftx.load(tmp_path / "b", model=tiny(arch), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), expected)
    again.train(ROWS, steps=2, **RUN)  # as plain prompt tuning, without sources
    assert not torch.equal(logits(again), expected)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_folding_changes_no_bit(arch: str) -> None:
    stack, plugin = stack_of(arch)
    plugin.begin_target()
    expected = logits(stack)
    plugin.collapse()
    assert torch.equal(logits(stack), expected)
    assert [name for name, _ in plugin.prompt.named_parameters()] == ["P"]


def test_sources_once_and_targets_from_the_same_start(tmp_path: Path) -> None:
    stack, plugin = stack_of(adapt=False)
    stack.train(ROWS, steps=4, sources=SOURCES, **RUN)
    assert plugin.state == {"sourced": True}
    assert set(values(plugin)) == {"P", "factors.0", "factors.1"}
    stack.save(tmp_path / "s")
    for rows in (ROWS, ROWS[::-1]):
        again = peftx.load(tmp_path / "s", model=tiny("llama"), tokenizer=tiny_tokenizer())
        assert torch.equal(logits(again, task=torch.tensor([0])), logits(stack, task=torch.tensor([0])))
        again.train(rows, steps=2, **RUN)  # no sources
        assert again.plugins["mpt"].state == {"sourced": True, "adapted": True, "folded": True}


def test_the_optimizer_begins_anew_with_each_phase() -> None:
    """Adam's first step is the rate, whatever the gradient is."""
    stack, plugin = stack_of(teachers=0, shared=3, keep_factors=True, init="ones")
    seen = [plugin.prompt.P.detach().clone()]
    stack.train(
        ROWS, steps=5, sources=SOURCES, batch_size=4, learning_rate=0.01, schedule="constant", weight_decay=0,
        progress=lambda *_: seen.append(plugin.prompt.P.detach().clone()), max_grad_norm=0,
    )  # fmt: skip
    steps = [(b - a).abs().flatten() for a, b in pairwise(seen)]
    first = [bool((x > 0.0099).float().mean() > 0.95) for x in steps]
    assert first == [True, False, False, True, False]


def test_folding_copies_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of()

    def refuse(self: Any, memo: Any) -> None:
        raise AssertionError("the model is copied")

    monkeypatch.setattr(type(stack.model), "__deepcopy__", refuse, raising=False)
    plugin.collapse()


def test_bfloat16() -> None:
    plugin = Mpt(length=3, tasks=2, teachers=1, shared=1)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    report = stack.train(ROWS, steps=3, sources=SOURCES, **RUN)
    assert all(math.isfinite(loss) for _, loss in report.losses)
    assert plugin.prompt.P.dtype == torch.bfloat16


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_writes_no_answers_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="mpt: BertForMaskedLM writes no answers"):
        stack_of("bert")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**row, "task": 2} for row in SOURCES["tasks"]], r"tasks \[2\], and there are 0 to 1"),
        ([{**row, "task": -1} for row in SOURCES["tasks"]], r"tasks \[-1\]"),
        (ROWS, "rows of the source 'tasks' without a task"),
    ],
)
def test_rows_of_no_task_are_refused(rows: Any, said: str) -> None:
    stack, _ = stack_of()
    with pytest.raises(DataError, match=said):
        stack.train(ROWS, steps=6, sources={"tasks": rows}, **RUN)


def test_a_run_without_sources_is_refused() -> None:
    stack, _ = stack_of()
    with pytest.raises(PeftxError, match="tasks"):
        stack.train(ROWS, steps=6, **RUN)
    stack, _ = stack_of(tasks=0)
    stack.train(ROWS, steps=1, **RUN)


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"rank": 0}, {"weight": -1}, {"init": "zeros"}, {"shared": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Mpt(**options)
