from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Plugin, Stack
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.modes import as_it_was
from peftx.kernel.positions import prompt_length
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_aligndistil import AlignDistil
from peftx_lora import Lora
from peftx_xprompt import Ticket, Xprompt, without_lowest

test_conformance = conformance("xprompt")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
PHASES = ["tune", "tokens", "pieces", "retune"]


def stack_of(*before: Plugin, arch: str = "llama", **options: Any) -> tuple[Stack, Xprompt, Ticket]:
    plugin = Xprompt(**{"length": 6, "pieces": 4, "tune": 2, "score": 1, **options})
    stack = Stack(tiny(arch), [*before, plugin], tokenizer=tiny_tokenizer())
    return stack, plugin, plugin.ticket


def batch_for(stack: Stack, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed, padding="left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, :5] = -100
    return inputs | {"labels": labels}


def run(stack: Stack, seeds: list[int], optimizer: torch.optim.Optimizer) -> None:
    for seed in seeds:
        stack.train_step(batch_for(stack, seed), optimizer=optimizer)


def adam(stack: Stack, rate: float = 0.05) -> torch.optim.Optimizer:
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)


# -- which go ----------------------------------------------------------------------------------------------------------


def test_the_lowest_of_what_is_left_go() -> None:
    scores, kept = torch.tensor([[3.0, 1.0], [0.5, 2.0]]), torch.tensor([[True, True], [False, True]])
    assert without_lowest(scores, kept, 0.0).tolist() == kept.tolist()
    assert without_lowest(scores, kept, 0.34).tolist() == [[True, False], [False, True]]
    assert without_lowest(scores, kept, 0.6).tolist() == [[True, False], [False, False]]
    assert without_lowest(scores, kept, 0.99).tolist() == [[True, False], [False, False]], "one stays"
    assert without_lowest(torch.zeros(5, 1), torch.ones(5, 1, dtype=torch.bool), 0.4).sum() == 3


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
@pytest.mark.parametrize("phase", ["tokens", "pieces"])
def test_scores_are_those_of_the_masks(phase: str, arch: str) -> None:
    """E_x |<p_i, dL/dp_i>|, the mean over texts and not the gradient of the mean; each as its labels weigh."""
    stack, _, ticket = stack_of(arch=arch, tune=1, tokens_off=0.0)
    optimizer = adam(stack, rate=1e-9)
    memory = stack.memory.setdefault("xprompt", {})
    run(stack, [0] * (2 if phase == "tokens" else 3), optimizer)
    batch, expected = batch_for(stack), torch.zeros(6, 4)
    first = 0 if arch in ("t5", "bert") else 1  # a decoder predicts none from nothing
    counts = (batch["labels"][:, first:] != -100).sum(1)
    for row, count in enumerate(counts):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        ticket.P.grad = None
        stack.model(**alone).loss.backward()
        products = (ticket.P * ticket.P.grad).detach().unflatten(1, (4, -1)).sum(2) * count / counts.sum()
        expected += products.abs() if phase == "pieces" else products.sum(1, keepdim=True).abs()
    found = memory["I"]
    assert found.shape == ((6, 1) if phase == "tokens" else (6, 4))
    torch.testing.assert_close(
        found, expected if phase == "pieces" else expected[:, :1], rtol=2e-3, atol=1e-6
    )


def test_a_token_of_one_piece_scores_as_its_piece() -> None:
    stack, _, _ = stack_of(pieces=1, tokens_off=0.0)
    optimizer, memory = adam(stack), stack.memory.setdefault("xprompt", {})
    run(stack, [0, 0, 0], optimizer)
    of_tokens = memory["I"].clone()
    run(stack, [0], optimizer)
    torch.testing.assert_close(memory["I"], of_tokens)


def test_micro_batches_and_steps_add_up() -> None:
    found = []
    for accumulation in (1, 2):
        stack, _, _ = stack_of(score=2)
        optimizer, memory = adam(stack), stack.memory.setdefault("xprompt", {})
        run(stack, [0, 0], optimizer)
        for index in (2, 3):
            for micro in range(accumulation):
                batch = batch_for(stack, 1)
                if accumulation == 2:
                    batch = {name: value[micro : micro + 1] for name, value in batch.items()}
                step = peftx.TrainStep(
                    stack, batch, index=index, micro=micro, accumulation=accumulation,
                    share=stack.shares([batch_for(stack, 1)])[0] if accumulation == 1 else shares(stack)[micro],
                )  # fmt: skip
                stack.run_train_step(step)
        found.append(memory["I"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def shares(stack: Stack) -> list[Any]:
    whole = batch_for(stack, 1)
    return stack.shares([{name: value[i : i + 1] for name, value in whole.items()} for i in range(2)])


def test_numbers_that_are_left() -> None:
    stack, _, ticket = stack_of(length=20, pieces=16, tokens_off=0.3, pieces_off=0.4)
    report = stack.train(ROWS, steps=6, batch_size=4, learning_rate=0.1)
    assert report.steps == 6
    left = int(ticket.zeta.sum())
    assert left == 14 * 16 - round(0.4 * 14 * 16)
    assert (ticket.P != 0).sum() == left * 32 / 16
    assert ticket.length == int(ticket.zeta.any(1).sum()) <= 14
    assert ticket.rows().shape == (ticket.length, 32)
    assert prompt_length(stack.model) == ticket.length, "the text has the rest of the positions"


# -- phases ------------------------------------------------------------------------------------------------------------


def test_what_each_phase_does_to_the_prompt() -> None:
    stack, _, ticket = stack_of(Lora(rank=2), score=2, tokens_off=0.5, pieces_off=0.5)
    optimizer, seen = adam(stack), []
    lora = [p for p in stack.ledger.parameters("lora") if p.ndim == 2]
    start = ticket.P.detach().clone()
    for index in range(8):
        before, others = ticket.P.detach().clone(), [p.detach().clone() for p in lora]
        run(stack, [index], optimizer)
        seen.append((before, ticket.P.detach().clone(), ticket.zeta.clone()))
        assert any(not torch.equal(p, old) for p, old in zip(lora, others, strict=True)), "others train on"
    assert not torch.equal(seen[1][1], start)
    for index in (2, 3):
        assert torch.equal(seen[index][1], seen[1][1]), "P rests while tokens are scored"
    assert seen[3][2].all()
    gamma = seen[4][2].any(1)
    assert gamma.sum() == 3
    assert torch.equal(seen[4][2], gamma[:, None].expand(-1, 4)), "tokens go whole"
    for index in (4, 5):
        assert torch.equal(seen[index][1], seen[1][1] * gamma[:, None]), "and while pieces are"
    zeta = seen[6][2]
    assert zeta.sum() == 6
    assert not (zeta & ~gamma[:, None]).any()
    kept = zeta.repeat_interleave(8, 1)
    assert (seen[6][1][kept] - start[kept]).abs().max() <= 0.051 * (1 + start.abs().max()), (
        "one step from the start"
    )
    for index in (6, 7):
        assert not seen[index][1][~kept].any(), "what went stays 0, to the bit"
        assert seen[index][1][kept].all()


def test_the_lowest_scores_go() -> None:
    stack, _, ticket = stack_of(tokens_off=0.5, pieces_off=0.25)
    optimizer, memory = adam(stack), stack.memory.setdefault("xprompt", {})
    run(stack, [0, 1, 2], optimizer)
    order = memory["I"][:, 0].argsort()
    run(stack, [3], optimizer)
    assert not ticket.zeta[order[:3]].any()
    assert ticket.zeta[order[3:]].all()
    scores = memory["I"].masked_fill(~ticket.zeta, float("inf"))
    lowest = scores.flatten().topk(3, largest=False).indices
    before = ticket.zeta.clone()
    run(stack, [4], optimizer)
    gone = before & ~ticket.zeta
    assert sorted(gone.flatten().nonzero().flatten().tolist()) == sorted(lowest.tolist())


def test_without_pruning_the_second_training_is_the_first() -> None:
    """The same batches, and the optimizer has forgotten: the same bits."""
    stack, _, ticket = stack_of(tune=3, tokens_off=0.0, pieces_off=0.0)
    optimizer = adam(stack)
    run(stack, [0, 1, 2], optimizer)
    first = ticket.P.detach().clone()
    run(stack, [3, 4], optimizer)
    run(stack, [0, 1, 2], optimizer)
    assert torch.equal(ticket.P, first)


def test_the_optimizer_forgets_when_the_second_training_begins_and_then_no_more() -> None:
    stack, _, ticket = stack_of()
    optimizer, counts = adam(stack), []
    for seed in range(7):
        run(stack, [seed], optimizer)
        counts.append(int(optimizer.state[ticket.P]["step"]))
    assert counts == [1, 2, 2, 2, 1, 2, 3]  # of Adam's means; P rests while scores are taken


def test_in_half_precision_scores_add_up_in_float32() -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [Xprompt(length=6, pieces=4, tune=1, score=2)])
    run(stack, [0, 0, 0], adam(stack))
    assert stack.memory["xprompt"]["I"].dtype == torch.float32


def test_rewinding_to_the_tuned_prompt() -> None:
    stack, _, ticket = stack_of(rewind="tuned", tokens_off=0.0, pieces_off=0.5)
    optimizer = adam(stack, rate=0.1)
    run(stack, [0, 1], optimizer)
    tuned = ticket.P.detach().clone()
    run(stack, [2, 3], optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(stack, [4], optimizer)
    kept = ticket.zeta.repeat_interleave(8, 1)
    assert torch.equal(ticket.P, tuned * kept)
    assert kept.sum() == 12 * 8


def test_a_pruned_prompt_trains_on_as_it_is() -> None:
    stack, plugin, ticket = stack_of()
    stack.train(ROWS, steps=6, batch_size=4, learning_rate=0.1)
    zeta, P = ticket.zeta.clone(), ticket.P.detach().clone()
    assert [phase.name for phase in plugin.phases()] == ["retune"]
    stack.train(ROWS, steps=2, batch_size=4, learning_rate=1e-4)
    assert torch.equal(ticket.zeta, zeta)
    assert 0 < (ticket.P - P).abs().max() < 1e-3


class CutError(Exception):
    """Of the power."""


@pytest.mark.parametrize("at", range(1, 7))
def test_a_run_that_was_cut_anywhere_ends_in_the_same_bits(at: int, tmp_path: Path) -> None:
    def cut(done: int, *_: Any) -> None:
        if done > at:
            raise CutError

    options: dict[str, Any] = {"steps": 8, "batch_size": 2, "learning_rate": 0.1}
    whole, _, ticket = stack_of(score=2)
    whole.train(ROWS, **options)
    with pytest.raises(CutError):
        stack_of(score=2)[0].train(ROWS, output=tmp_path, checkpoint_every=at, progress=cut, **options)
    again, plugin, other = stack_of(score=2)
    again.train(ROWS, output=tmp_path, checkpoint_every=at, resume=tmp_path / f"checkpoint-{at}", **options)
    assert torch.equal(ticket.P, other.P)
    assert torch.equal(ticket.zeta, other.zeta)
    assert ticket.length == other.length < 6
    assert plugin.state == whole.plugins["xprompt"].state


@torch.no_grad()
def test_a_reference_of_the_start_has_all_tokens() -> None:
    """What an earlier state of what trains computes: the prompt is as long as it was then."""
    stack, _, ticket = stack_of()
    start = {name: x.clone() for name, x in stack.ledger.trained().items()}
    inputs = example_inputs(stack.model)
    before = output_of(stack.model, inputs)
    zeta = torch.ones(6, 4, dtype=torch.bool)
    zeta[2] = False
    ticket.keep(zeta, ticket.P)
    with as_it_was(stack.ledger, start):
        assert prompt_length(stack.model) == 6
        assert torch.equal(output_of(stack.model, inputs), before)
    assert prompt_length(stack.model) == 5


def test_what_takes_a_run_back_to_its_start_is_refused() -> None:
    """AlignDistil begins each of its phases from the start, which would bring the worst of the prompt back."""
    with pytest.raises(ConflictError, match="in the middle of what the phases of 'xprompt' settle"):
        stack_of(AlignDistil())


# -- what is left of it in the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bert"])
@torch.no_grad()
def test_a_token_without_pieces_is_not_there(arch: str) -> None:
    """As a prompt of the tokens that are left, with their positions."""
    stack, _, ticket = stack_of(arch=arch)
    zeta = torch.ones(6, 4, dtype=torch.bool)
    zeta[1], zeta[4, :2], zeta[5] = False, False, False
    ticket.keep(zeta, ticket.P)
    short, _, other = stack_of(arch=arch, length=4)
    other.P.copy_(ticket.P[[0, 2, 3, 4]])
    assert not other.P[3, :16].any()
    inputs = example_inputs(stack.model)
    assert torch.equal(output_of(stack.model, inputs), output_of(short.model, inputs))
    if arch in ("llama", "gpt2", "t5"):
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found, expected = (s.model.generate(**ids, max_new_tokens=5) for s in (stack, short))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_bundles_of_every_phase_come_back(steps: int, tmp_path: Path) -> None:
    stack, _, ticket = stack_of(score=2, tokens_off=0.5)
    run(stack, list(range(steps)), adam(stack))
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), output_of(stack.model, inputs))
    assert prompt_length(again.model) == ticket.length


# -- options -----------------------------------------------------------------------------------------------------------


def test_rows_start_as_embeddings_and_none_twice_while_there_are_enough() -> None:
    _, _, ticket = stack_of(length=8, frequent=8)
    table = tiny("llama").get_input_embeddings().weight.detach()
    assert sorted(int((table == row).all(1).nonzero()) for row in ticket.P) == list(range(8))
    _, _, ticket = stack_of(length=6, frequent=2)
    assert all((table[:2] == row).all(1).any() for row in ticket.P)


def test_pieces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PeftxError, match="xprompt: 32 numbers make no 12 pieces") as caught:
        stack_of(pieces=12)
    stack_of(pieces=int(str(caught.value.hint).removeprefix("pieces: ")))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens_off": 1.0},
        {"pieces_off": -0.1},
        {"tune": 0},
        {"score": 0},
        {"rewind": "early"},
        {"length": 0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Xprompt(**options)
