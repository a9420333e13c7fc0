"""KS-Lottery: tickets in the embedding, tuned or transferred."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_full_finetuning import FullFinetuning
from peftx_ks_lottery import KsLottery, ks_counts, p_values
from peftx_lora import Lora
from peftx_mezo import Mezo

test_conformance = conformance("ks-lottery")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
RUN = {"steps": 6, "batch_size": 4, "learning_rate": 0.1}
NAME = "model.embed_tokens.weight"


def stack_of(*others: Any, arch: str = "llama", model: Any = None, **options: Any) -> Stack:
    return Stack(tiny(arch, **(model or {})), [KsLottery(**options), *others], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> KsLottery:
    plugin = stack.plugins["ks-lottery"]
    assert isinstance(plugin, KsLottery)
    return plugin


def moved_rows(stack: Stack) -> Tensor:
    place = plugin_of(stack).place
    return (place.theta != place.theta_0).any(1)


def probe_of(**options: Any) -> Tensor:
    """E' of a run that trains the embedding alone."""
    stack = Stack(tiny("llama"), [FullFinetuning(targets="embedding")], tokenizer=tiny_tokenizer())
    stack.train(ROWS, **(RUN | options))
    return stack.model.get_input_embeddings().weight.detach().clone()


def logits(stack: Stack) -> Tensor:
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model))


# ------------------------------------------------------------------------------------------------------- the test
def by_hand(a: Tensor, b: Tensor) -> float:
    points = [*a.tolist(), *b.tolist()]
    return max(abs(sum(a <= t).item() - sum(b <= t).item()) / len(a) for t in points)  # type: ignore[arg-type,union-attr]


def test_the_statistic_by_hand() -> None:
    before = torch.tensor([[1.0, 2, 3, 4]] * 5)
    after = torch.tensor(
        [[4.0, 3, 2, 1], [11, 12, 13, 14], [1, 2, 3.5, 4], [1.5, 2.5, 3.5, 4.5], [1, 1, 1, 4]]
    )
    assert ks_counts(before, after).tolist() == [0, 4, 1, 1, 2]
    torch.manual_seed(0)
    a, b = torch.randn(1100, 9), torch.randn(1100, 9).round(decimals=1) * 2
    found = ks_counts(a, b)
    for j in (0, 1, 500, 1023, 1024, 1099):
        assert int(found[j]) / 9 == pytest.approx(by_hand(a[j], b[j]))
    assert torch.equal(ks_counts(b, a), found)
    assert torch.equal(ks_counts(a.bfloat16(), a.bfloat16()), torch.zeros(1100, dtype=torch.int64))


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_p_by_counting(d: int) -> None:
    """Of all orders in which two samples of d may lie, how many have a distance of at least h."""
    counts = [0] * (d + 1)
    for first in combinations(range(2 * d), d):
        walk, h = 0, 0
        for i in range(2 * d):
            walk += 1 if i in first else -1
            h = max(h, abs(walk))
        counts[h] += 1
    expected = [sum(counts[h:]) / comb(2 * d, d) for h in range(d + 1)]
    assert p_values(d) == pytest.approx(expected)


def test_p_of_a_wide_embedding() -> None:
    """Of 4096 numbers a row, at the usual 5%: the asymptotic c(alpha) sqrt(2 / d), c = 1.358."""
    p = p_values(4096)
    assert all(one >= other - 1e-9 for one, other in pairwise(p))
    assert p[:2] == pytest.approx([1, 1])
    assert 0 <= p[-1] < 1e-300
    critical = next(h for h, value in enumerate(p) if value <= 0.05)
    assert critical == pytest.approx(1.358 * (2 / 4096) ** 0.5 * 4096, abs=1)


def test_tickets_by_hand() -> None:
    stack = stack_of(alpha=0.05)
    plugin = plugin_of(stack)
    with pytest.raises(
        PeftxError, match=r"no row of the embedding moved enough: the smallest p is 1, and alpha 0.05"
    ):
        plugin.choose()
    assert not plugin.chosen
    with torch.no_grad():
        plugin.place.theta[7] += 100
        plugin.place.theta[9] = plugin.place.theta[9].flip(0)
    plugin.choose()
    assert plugin.tickets.chosen.nonzero().flatten().tolist() == [7]
    assert plugin.tickets.distance[7] == 1
    assert int((plugin.tickets.distance > 0).sum()) == 1


def test_fewer_tickets_at_a_lower_alpha() -> None:
    tickets = []
    for alpha in (1e-3, 0.05, 0.5, 1.0):
        plugin = plugin_of(stack_of(alpha=alpha))
        torch.manual_seed(0)
        with torch.no_grad():
            E = plugin.place.theta
            E.add_(torch.linspace(0, 4, len(E))[:, None] * torch.randn(E.shape) * E.std())
        plugin.choose()
        tickets.append(plugin.tickets.chosen)
    sizes = [int(t.sum()) for t in tickets]
    assert 0 < sizes[0] < sizes[1] < sizes[2] < sizes[3] == len(tickets[3])
    assert all((one <= other).all() for one, other in pairwise(tickets))


# ----------------------------------------------------------------------------------------------------------- a run
def test_partial_tuning_trains_the_tickets_from_the_start() -> None:
    """T is of the probe's first half; its rows train from E, and no other row moves, also under a decay."""
    stack = stack_of(alpha=0.7)
    seen: list[Any] = []
    stack.train(
        ROWS, **RUN, weight_decay=0.1, schedule="constant",
        progress=lambda done, total, values: seen.append(values["ks-lottery"]),
    )  # fmt: skip
    assert seen == ["probe"] * 3 + ["tune"] * 3
    plugin = plugin_of(stack)
    T = plugin.tickets.chosen
    assert 0 < int(T.sum()) < len(T)
    assert torch.equal(moved_rows(stack), T)
    probe = probe_of(steps=3, weight_decay=0.1, schedule="constant")
    expected = torch.tensor(p_values(probe.shape[1]))[ks_counts(plugin.place.theta_0, probe)] <= 0.7
    assert torch.equal(T, expected)
    # of the tickets: three AdamW steps, the first of which knows no moments of the probe
    moves = (plugin.place.theta - plugin.place.theta_0)[T].detach().abs()
    assert float(moves.max()) < 3.2 * 0.1
    before = plugin.place.theta.detach().clone()
    seen.clear()
    stack.train(ROWS, **RUN, progress=lambda done, total, values: seen.append(values["ks-lottery"]))
    assert set(seen) == {"tune"}
    assert torch.equal((plugin.place.theta != before).any(1), T)


@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_partial_transfer_keeps_the_tickets_of_the_probe(alpha: float) -> None:
    probe = probe_of()
    stack = stack_of(use="transfer", alpha=alpha)
    stack.train(ROWS, **RUN)
    plugin = plugin_of(stack)
    T, E = plugin.tickets.chosen, plugin.place.theta
    assert torch.equal(E[T], probe[T])
    assert torch.equal(E[~T], plugin.place.theta_0[~T])
    if alpha == 1:
        assert torch.equal(E, probe)  # all rows: the probe's model
    else:
        assert 0 < int(T.sum()) < int((probe != plugin.place.theta_0).any(1).sum())


def test_tokens_that_do_not_occur_are_no_tickets() -> None:
    """Where the head is not the embedding they have no gradient."""
    stack = stack_of(use="transfer", alpha=0.9)
    stack.train(ROWS, **RUN)
    plugin, known = plugin_of(stack), tiny_tokenizer()
    used = {i for row in ROWS for i in known(row["prompt"] + row["completion"] + known.eos_token).input_ids}
    unused = torch.tensor([i for i in range(len(plugin.tickets.chosen)) if i not in used])
    assert plugin.tickets.distance[unused].abs().max() == 0
    assert not plugin.tickets.chosen[unused].any()
    assert plugin.tickets.distance.max() > 0


def test_adapters_beside_it_train_all_along_and_the_rest_stands() -> None:
    stack = stack_of(Lora(rank=2), probe=1, alpha=1.0)
    plain = {n: p.clone() for n, p in tiny("llama").named_parameters()}
    stack.train(ROWS, **RUN)
    own = {n: p for n, p in stack.model.named_parameters() if "peftx" not in n}
    changed = {n for n, p in plain.items() if n in own and not torch.equal(own[n], p)}
    assert changed == {NAME}
    assert all(bool((p != 0).any()) for p in stack.ledger.tensors("lora").values())


def test_a_loop_of_ones_own() -> None:
    for use in ("tuning", "transfer"):
        stack = stack_of(use=use, probe=2, alpha=0.7)
        batch = example_inputs(stack.model)
        batch["labels"] = batch["input_ids"]
        optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(4):
            stack.train_step(batch, optimizer=optimizer)
        plugin = plugin_of(stack)
        if use == "transfer":
            assert not plugin.chosen
            before = plugin.place.theta.detach().clone()
            plugin.transfer()
            assert torch.equal(plugin.place.theta[plugin.tickets.chosen], before[plugin.tickets.chosen])
        assert plugin.chosen
        assert torch.equal(moved_rows(stack), plugin.tickets.chosen)


@pytest.mark.parametrize("probe", [1, 2])
def test_the_rewind_forgets_the_moments(probe: int) -> None:
    stack = stack_of(probe=probe, alpha=1.0)
    batch = example_inputs(stack.model)
    batch["labels"] = batch["input_ids"]
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(probe + 1):
        stack.train_step(batch, optimizer=optimizer)
    (state,) = optimizer.state.values()
    assert float(state["step"]) == 1


def test_bundles(tmp_path: Path) -> None:
    stack = stack_of(alpha=0.7)
    stack.train(ROWS, **RUN)
    T = plugin_of(stack).tickets.chosen
    file = stack.save(tmp_path / "bundle") / "ks-lottery.safetensors"
    d = plugin_of(stack).place.theta.shape[1]
    assert file.stat().st_size < int(T.sum()) * d * 8 + len(T) * 5 + 1500
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded), logits(stack))
    assert torch.equal(plugin_of(loaded).tickets.chosen, T)
    before = plugin_of(loaded).place.theta.detach().clone()
    loaded.train(ROWS, **RUN)
    assert torch.equal((plugin_of(loaded).place.theta != before).any(1), T)


# ----------------------------------------------------------------------------------------------------- certificates
def test_a_monotone_mean_moves_by_the_distance_at_most() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 16).double(), torch.randn(200, 16).double() * 1.5 + 0.3
    D = ks_counts(a, b) / 16
    for scale in (0.1, 1.0, 100.0):
        for shift in (-1.0, 0.0, 0.7):
            means = [((x - shift) * scale).sigmoid().mean(1) for x in (a, b)]
            assert ((means[0] - means[1]).abs() <= D + 1e-12).all()


def test_certified_by_hand() -> None:
    stack = stack_of()
    plugin = plugin_of(stack)
    plugin.tickets.distance[5], plugin.tickets.distance[6], plugin.tickets.distance[7] = 0.1, 0.15, 0.9
    plugin.tickets.chosen[7] = True
    ids = torch.tensor([5, 7, 5, 6, 5])
    found = []
    for margin in (0.1, 0.22, 0.45, 0.55):  # radius 0.05, 0.11, 0.225, 0.275; moves 0.1, 0.1, 0.1, 0.25, 0.25
        p = torch.tensor([0.1, (0.9 - margin) / 2, (0.9 + margin) / 2]).log()
        found.append(plugin.certified(ids, p.expand(5, 3)).tolist())
    assert found == [[False] * 5, [True] * 3 + [False] * 2, [True] * 3 + [False] * 2, [True] * 5]


def test_evaluate() -> None:
    stack = stack_of(use="transfer", alpha=0.7)
    assert {name: s.value for name, s in stack.evaluate(ROWS, metrics=["ks-lottery"]).items()} == {
        "tickets": 0
    }
    stack.train(ROWS, **RUN)
    plugin = plugin_of(stack)
    scores = stack.evaluate(ROWS, metrics=["ks-lottery"])
    assert scores["tickets"].value == int(plugin.tickets.chosen.sum()) > 0
    assert scores["certified"].count == sum(
        len(tiny_tokenizer()(row["completion"]).input_ids) + 1 for row in ROWS
    )
    plugin.tickets.distance.zero_()
    assert stack.evaluate(ROWS, metrics=["ks-lottery"])["certified"].value == 1
    plugin.tickets.distance.fill_(1)
    plugin.tickets.chosen.zero_()
    assert stack.evaluate(ROWS, metrics=["ks-lottery"])["certified"].value == 0
    for arch, model in (("llama", {"tie_word_embeddings": True}), ("t5", {}), ("bert", {})):
        other = stack_of(arch=arch, model=model, probe=1, alpha=1.0)
        other.plugins["ks-lottery"].state["chosen"] = True
        rows = ["a text"] if arch == "bert" else ROWS
        assert set(other.evaluate(rows, metrics=["ks-lottery"])) == {"tickets"}


# -------------------------------------------------------------------------------------------------------- refusals
def test_refused() -> None:
    with pytest.raises(ConflictError, match="both train the base's"):
        stack_of(FullFinetuning())
    with pytest.raises(ArchitectureError, match="ks-lottery: vit has no token embedding"):
        Stack(tiny("vit"), [KsLottery()])
    with pytest.raises(PeftxError, match="needs gradients"):
        stack_of(Mezo())
    for options in ({"alpha": 0}, {"alpha": 1.1}, {"probe": 0}, {"probe": 1.5}, {"use": "both"}):
        with pytest.raises(PeftxError, match=f"KsLottery: {next(iter(options))}"):
            KsLottery(**options)
    stack = stack_of(probe=1)
    fake: Any = SimpleNamespace(
        phase=lambda _: SimpleNamespace(name="tune"), begins=lambda _: False, last_micro=True, index=3
    )
    with pytest.raises(PeftxError, match="tuning without tickets"):
        next(plugin_of(stack).train_step(fake))
