"""SCL-MGSM: a projection chosen base by base, and a ridge head that takes tasks in one after another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Plugin, Stack, hookimpl
from peftx.engines.data import Collator
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_scl_mgsm import ACTIVATIONS, SclMgsm, SclMgsmConfig, guided, joining

test_conformance = conformance("scl-mgsm")

LABELS = ["bad", "good", "red", "green", "one", "two"]
TASKS = (LABELS[:2], LABELS[2:4], LABELS[4:])


def config(**options: Any) -> SclMgsmConfig:
    return SclMgsmConfig(**{"labels": LABELS, "width": 12, "candidates": 6, **options})


def problem(seed: int, *, N: int = 60, d: int = 3, C: int = 3) -> tuple[Tensor, Tensor]:
    """X [N, d + 1] and Y [N, C]: clouds around C points."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % C
    phi = torch.randn(C, d, generator=g)[y] + 0.8 * torch.randn(N, d, generator=g)
    return F.pad(phi.double(), (0, 1), value=1.0), F.one_hot(y).double()


def ridge(G: Tensor, Y: Tensor, gamma: float) -> Tensor:
    return torch.linalg.solve(G.T @ G + gamma * torch.eye(G.shape[1]).double(), G.T @ Y)


def J_of(G: Tensor, Y: Tensor, gamma: float) -> Tensor:
    """The least |Y_q - G B_q|^2 + gamma |B_q|^2, [C]."""
    B = ridge(G, Y, gamma)
    return (Y - G @ B).square().sum(0) + gamma * B.square().sum(0)


def stack_of(arch: str = "llama", *others: Any, **options: Any) -> tuple[Stack, SclMgsm]:
    plugin = SclMgsm(config(**options))
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def rows(*tasks: int) -> list[dict[str, str]]:
    found = [(name, n) for task in tasks for n in range(3) for name in TASKS[task]]
    return [{"text": f"it is {name}" + "!" * n, "label": name} for name, n in found]


def learn(stack: Stack, *tasks: int, **options: Any) -> Any:
    return stack.train(rows(*tasks), **{"num_train_epochs": 1, "batch_size": 4, **options})


def seen_by(stack: Stack, plugin: SclMgsm, *tasks: int) -> tuple[Tensor, Tensor]:
    """X and Y of rows, each read by itself."""
    texts, X = rows(*tasks), []
    for ids in plugin.texts.rows(stack, [row["text"] for row in texts]):
        with torch.no_grad():
            h = stack.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        X.append(h[0, 0 if plugin.texts.closed else -1])
    Y = F.one_hot(torch.tensor([LABELS.index(row["label"]) for row in texts]), len(LABELS))
    return F.pad(torch.stack(X).double(), (0, 1), value=1.0), Y.double()


# --------------------------------------------------------------------------------------------------- the projection
def test_which_candidate_joins_by_hand() -> None:
    J = torch.tensor([2.0, 4.0])
    gain = torch.tensor([[0.9, 0.1], [0.2, 0.4], [0.21, 0.41]])
    # n = 0, rho 0.8: gains of 0.1 J at least; the first falls short in class 2, though its sum is the largest
    assert joining(gain, J, [0.8], 0) == 2
    assert joining(gain[:2], J, [0.8], 0) == 1
    # n = 2: of 0.15 J at least, which none has, and a larger rho lets the first through
    assert joining(gain, J, [0.8], 2) is None
    assert joining(gain, J, [0.8, 0.99], 2) == 0
    assert joining(torch.zeros(2, 2), J, [0.99], 0) is None
    assert joining(torch.zeros(2, 2), J, [1.0], 0) == 0


@pytest.mark.parametrize("kind", ["relu", "tanh"])
def test_each_base_is_the_best_of_its_candidates(kind: Any) -> None:
    """Each candidate tried by a ridge fit of its own."""
    X, Y = problem(0)
    options = config(activation=kind, width=7, candidates=3, ridge=2.0, scales=(0.1, 1.0), rho=(0.9, 0.994))
    act = ACTIVATIONS[kind]
    torch.manual_seed(5)
    P = guided(X, Y, options)
    torch.manual_seed(5)
    G, used = X.new_zeros(len(X), 0), set()
    for n in range(options.width):
        J = J_of(G, Y, 2.0)
        for scale in options.scales:
            p = torch.empty(3, X.shape[1]).double().uniform_(-scale, scale)
            after = torch.stack([J_of(torch.cat((G, act(X @ row)[:, None]), 1), Y, 2.0) for row in p])
            fits = [(J - after >= (1 - rho) * (n + 1) / (n + 2) * J).all(1) for rho in options.rho]
            ok = next((each for each in fits if each.any()), None)
            if ok is not None:
                break
        if ok is None:
            break
        used.add(scale)
        torch.testing.assert_close(P[n], p[after.sum(1).where(ok, torch.inf).argmin()])
        G = torch.cat((G, act(X @ P[n])[:, None]), 1)
    assert len(P) == G.shape[1] >= 4
    assert used == {0.1, 1.0}


def test_the_ridge_loss_falls_with_each_base_and_as_far_as_rho_says() -> None:
    X, Y = problem(2)
    torch.manual_seed(0)
    G = torch.relu(X @ guided(X, Y, config(rho=(0.98,), candidates=30)).T)
    J = torch.stack([J_of(G[:, :n], Y, 1.0) for n in range(G.shape[1] + 1)])
    assert len(J) > 4
    for n, (before, after) in enumerate(pairwise(J)):
        assert bool((after <= before * (1 - 0.02 * (n + 1) / (n + 2)) + 1e-9).all())


def test_a_wider_scale_is_tried_where_none_fits_and_the_projection_ends_where_no_scale_has_one() -> None:
    X, Y = problem(0)
    torch.manual_seed(0)
    assert 0 < len(guided(X, Y, config(rho=(0.9,), scales=(1.0,)))) < 12
    assert len(guided(X, Y, config(rho=(0.9,), scales=(1e-6,)))) == 0, (
        "features as small as this do not matter"
    )
    both = guided(X, Y, config(rho=(0.9,), scales=(1e-6, 1.0), candidates=50))
    assert len(both)
    assert both.abs().max() > 1e-3
    assert both.abs().max() <= 1


def test_without_guidance_it_is_a_random_projection() -> None:
    X, Y = problem(0)
    torch.manual_seed(3)
    P = guided(X, Y, config(candidates=1, rho=(1.0,), scales=(2.0,)))
    torch.manual_seed(3)
    drawn = torch.cat([torch.empty(1, 4).double().uniform_(-2, 2) for _ in range(12)])
    assert torch.equal(P, drawn)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["relu", "tanh"])
def test_as_good_a_fit_takes_fewer_bases_and_is_better_conditioned(kind: Any, seed: int) -> None:
    X, Y = problem(seed, N=300, d=6, C=5)
    act = ACTIVATIONS[kind]
    torch.manual_seed(seed)
    P = guided(X, Y, config(activation=kind, width=40, scales=(0.5,), candidates=20))
    free = config(activation=kind, width=100, scales=(0.5,), candidates=1, rho=(1.0,))
    G, H = act(X @ P.T), act(X @ guided(X, Y, free).T)
    goal = J_of(G, Y, 1.0).sum()
    n = next(n for n in range(1, 101) if J_of(H[:, :n], Y, 1.0).sum() <= goal)
    assert n > 1.3 * len(P)
    assert torch.linalg.cond(H[:, :n].T @ H[:, :n]) > 1.2 * torch.linalg.cond(G.T @ G)


# --------------------------------------------------------------------------------------------------------- the head
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_tasks_one_by_one_are_one_ridge_regression_over_all_rows(arch: str) -> None:
    stack, plugin = stack_of(arch, ridge=0.5)
    for task in range(3):
        learn(stack, task)
    X, Y = seen_by(stack, plugin, 0, 1, 2)
    G = torch.relu(X @ plugin.head.P.T)
    assert torch.linalg.matrix_rank(G) > 5
    torch.testing.assert_close(plugin.head.B.detach(), ridge(G, Y, 0.5), rtol=1e-3, atol=1e-4)
    texts = [row["text"] for row in rows(0, 1, 2)]
    with torch.no_grad():
        labels, scores = plugin.classify(stack, texts)
    assert labels == LABELS
    torch.testing.assert_close(scores.double(), G @ ridge(G, Y, 0.5), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        alone = torch.cat([plugin.classify(stack, [text])[1] for text in texts])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)


def heads(seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A head with bases, and rows for it."""
    _, plugin = stack_of(ridge=0.5)
    X, Y = problem(seed, d=32, C=len(LABELS))
    with torch.no_grad():
        plugin.head.P.copy_(torch.randn(12, 33, generator=torch.Generator().manual_seed(seed)))
    return plugin.head, X, Y


@torch.no_grad()
def test_the_recursion_is_exact_in_any_order_and_any_batches() -> None:
    found = []
    for cuts, turned in (((60,), False), ((7, 30, 60), False), ((1, 2, 59, 60), True)):
        head, X, Y = heads()
        if turned:
            X, Y = X.flip(0), Y.flip(0)
        for start, end in pairwise((0, *cuts)):
            head.learn(X[start:end], Y[start:end])
        found.append(head)
    G = torch.relu(X @ head.P.T)
    for head in found:
        torch.testing.assert_close(head.B.detach(), ridge(G, Y, 0.5), rtol=1e-8, atol=1e-9)
        inverse = torch.linalg.inv(G.T @ G + 0.5 * torch.eye(12).double())
        torch.testing.assert_close(head.R, inverse, rtol=1e-8, atol=1e-9)
        assert head.seen.tolist() == [10.0] * 6


@torch.no_grad()
def test_two_passes_are_half_the_ridge_and_the_loss_is_of_rows_not_yet_taken_in() -> None:
    head, X, Y = heads()
    G = torch.relu(X @ head.P.T)
    torch.testing.assert_close(head.learn(X, Y), torch.tensor(1.0).double())  # B = 0: each row is off by 1
    off = (Y - G @ ridge(G, Y, 0.5)).square().sum(1).mean()
    torch.testing.assert_close(head.learn(X, Y), off)
    torch.testing.assert_close(head.B.detach(), ridge(G, Y, 0.25), rtol=1e-8, atol=1e-9)


def test_classes_that_no_run_had_are_no_answer() -> None:
    stack, plugin = stack_of()
    with pytest.raises(PeftxError, match="seen no rows"):
        stack.classify(["it is red"])
    learn(stack, 0)
    texts = [row["text"] for row in rows(0, 1, 2)]
    assert set(stack.classify(texts)) <= set(TASKS[0])
    P = plugin.head.P.clone()
    learn(stack, 2)
    assert torch.equal(plugin.head.P, P), "the projection is the first run's"
    assert set(stack.classify(texts)) <= {*TASKS[0], *TASKS[2]}


def test_what_was_learned_first_is_known_at_the_end() -> None:
    stack, _ = stack_of(width=40, ridge=1e-3)
    for task in range(3):
        learn(stack, task)
    assert stack.evaluate(rows(0, 1, 2), metrics=["accuracy"])["accuracy"].value == 1


def test_the_order_of_later_tasks_does_not_matter() -> None:
    found = []
    for order in ((0, 1, 2), (0, 2, 1)):
        stack, plugin = stack_of()
        for task in order:
            learn(stack, task)
        found.append(plugin.head.B.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- the step
def test_the_projection_is_made_of_all_rows_of_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of()
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(X: Tensor, Y: Tensor, config: SclMgsmConfig) -> Tensor:
        seen.append((X, Y))
        return guided(X, Y, config)

    monkeypatch.setattr("peftx_scl_mgsm.guided", noted)
    learn(stack, 0, batch_size=2)
    learn(stack, 1, batch_size=2)
    ((X, Y),) = seen
    expected, _ = seen_by(stack, plugin, 0)
    torch.testing.assert_close(X.sum(0), expected.sum(0), rtol=1e-4, atol=1e-4)
    assert Y.sum(0).tolist() == [3, 3, 0, 0, 0, 0]


def test_a_loop_of_ones_own_takes_its_first_batch() -> None:
    stack, plugin = stack_of("llama", width=20)
    data = stack.prepare(as_training_data(stack, rows(0), seed=0, max_length=64))
    batch = Collator(PAD)(list(data.train))
    stack.model.train()
    losses = [float(stack.train_step(batch)) for _ in range(2)]
    assert losses[0] == pytest.approx(1)
    assert losses[1] < 0.9
    assert stack.model.training
    assert all(p.grad is None for p in stack.model.parameters())
    assert plugin.head.seen.tolist() == [6, 6, 0, 0, 0, 0]


def test_it_counts_in_float64_in_a_model_of_any_dtype() -> None:
    plugin = SclMgsm(config())
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    learn(stack, 0)
    assert {t.dtype for t in (*plugin.head.buffers(), *plugin.head.parameters())} == {torch.float64}
    assert set(stack.classify(["it is bad"])) <= set(TASKS[0])


def test_a_stream_goes_on_from_a_bundle(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    learn(stack, 0)
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    other = again.plugins["scl-mgsm"]
    for one in (stack, again):
        learn(one, 1)
    for name in ("P", "R", "B", "seen"):
        assert torch.equal(getattr(other.head, name), getattr(plugin.head, name))


class Steps(Plugin):
    """Does something in the step, and has no parameters."""

    @hookimpl(wrapper=True)
    def train_step(self, step: Any) -> Any:
        return (yield)


def test_nothing_trains_beside_it() -> None:
    for other in (("other", Lora(rank=2)), ("other", Steps())):
        with pytest.raises(ConflictError, match="'scl-mgsm' reads a model that stands still, and 'other'"):
            stack_of("llama", other)


def test_beside_a_frozen_adapter_it_reads_what_that_one_makes_of_the_model() -> None:
    plugin = SclMgsm(config())
    members = [Lora(rank=2), ("steps", Steps()), plugin]
    stack = Stack(tiny("llama"), members, tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["lora"])
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.normal_(std=0.5)
    stack.freeze("lora", "steps")
    stack.inject()
    learn(stack, 0)
    X, Y = seen_by(stack, plugin, 0)
    expected = ridge(torch.relu(X @ plugin.head.P.T), Y, 1.0)
    torch.testing.assert_close(plugin.head.B.detach(), expected, rtol=1e-3, atol=1e-4)
    with stack.disabled("lora"):
        assert not torch.allclose(seen_by(stack, plugin, 0)[0], X, atol=1e-2)


def test_a_first_task_of_one_class_is_refused_and_a_later_one_is_learned() -> None:
    """The projection is guided by what tells classes apart."""
    given = [{"text": f"it is {label} {i}", "label": label} for i in range(4) for label in LABELS]
    stack, plugin = stack_of()
    with pytest.raises(DataError, match="all 4 rows are of one class"):
        stack.train([row for row in given if row["label"] == LABELS[0]], steps=1, batch_size=4)
    assert not plugin.head.seen.any()
    stack.train([row for row in given if row["label"] in LABELS[:2]], steps=1, batch_size=8)
    stack.train([row for row in given if row["label"] == LABELS[2]], steps=1, batch_size=4)
    assert (plugin.head.seen > 0).tolist() == [True] * 3 + [False] * 3


def test_clear_errors() -> None:
    stack, plugin = stack_of(rho=(0.5,), scales=(1e-6,))
    with pytest.raises(PeftxError, match="no candidate fits"):
        learn(stack, 0)
    assert not plugin.head.seen.any()
    with pytest.raises(DataError, match="'blue' is not among"):
        stack.train([{"text": "it is blue", "label": "blue"}], steps=1)
    with pytest.raises(DataError, match="stands twice"):
        stack_of(labels=["a", "a"])
    for options in ({"rho": (1.5,)}, {"scales": (0.0,)}, {"ridge": 0.0}, {"rho": ()}):
        with pytest.raises(PeftxError, match=next(iter(options))):
            SclMgsm(labels=LABELS, **options)
    with pytest.raises(PeftxError, match="labels: List should have at least 2 items"):
        SclMgsm(labels=["one"])
    with pytest.raises(ArchitectureError, match="the head reads one"):
        stack_of("t5")
    with pytest.raises(ArchitectureError, match="vit"):
        Stack(tiny("vit"), [SclMgsm(config())])
