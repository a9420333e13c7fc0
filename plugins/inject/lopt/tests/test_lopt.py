from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lopt import SIGMA, Factors, Lopt, Projected
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("lopt")
test_conformance_projected = conformance("lopt", options={"form": "projected"}, models=("llama", "t5"))

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
FORMS = ["factors", "projected"]
D = 32


def stack_of(arch: str = "llama", **options: Any) -> tuple[Stack, Factors | Projected]:
    plugin = Lopt(**{"length": 6, "rank": 2, **options})
    return Stack(tiny(arch), [plugin], tokenizer=tiny_tokenizer()), plugin.prompt


def plain_of(P: Tensor, arch: str = "llama") -> tuple[Stack, torch.nn.Parameter]:
    """Prompt tuning with this prompt."""
    stack = Stack(tiny(arch), [PromptTuning(length=len(P))], tokenizer=tiny_tokenizer())
    (parameter,) = stack.ledger.parameters("prompt-tuning")
    parameter.data.copy_(P)
    return stack, parameter


def logits(stack: Stack) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left"))


def batch_of(stack: Stack, seed: int) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed)
    return inputs | {"labels": inputs["input_ids"]}


def run(stack: Stack, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for seed in range(steps):
        stack.train_step(batch_of(stack, seed), optimizer=optimizer)


# -- the equations -----------------------------------------------------------------------------------------------------


def test_factors_by_hand() -> None:
    prompt = Factors(3, 2, 1)
    prompt.U.data.copy_(torch.tensor([[1.0], [2.0], [-3.0]]))
    prompt.V.data.copy_(torch.tensor([[10.0, 0.5]]))
    X = prompt.rows()
    assert X.tolist() == [[10.0, 0.5], [20.0, 1.0], [-30.0, -1.5]]
    (X * torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])).sum().backward()
    assert prompt.U.grad.tolist() == [[10.0], [1.0], [10.5]], "dL/dX V^T"
    assert prompt.V.grad.tolist() == [[1.0 - 3.0, 4.0 - 3.0]], "U^T dL/dX"


@pytest.mark.parametrize(
    ("sigma", "bent"),
    [
        ("tanh", lambda x: math.tanh(x)),
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    ],
)
def test_projection_by_hand(sigma: str, bent: Any) -> None:
    prompt = Projected(2, 2, 1, SIGMA[sigma])
    prompt.X_0.copy_(torch.tensor([[1.0, 2.0], [0.5, -1.0]]))
    prompt.U.data.copy_(torch.tensor([[0.4], [0.3]]))  # X_0 U: 1.0, -0.1
    prompt.V.data.copy_(torch.tensor([[3.0, -2.0]]))
    X = prompt.rows()
    expected = torch.tensor([[3 * bent(1.0), -2 * bent(1.0)], [3 * bent(-0.1), -2 * bent(-0.1)]])
    torch.testing.assert_close(X, expected)
    X.sum().backward()
    assert prompt.V.grad[0].tolist() == pytest.approx([bent(1.0) + bent(-0.1)] * 2, abs=1e-6)
    slopes = [(bent(x + 1e-5) - bent(x - 1e-5)) / 2e-5 for x in (1.0, -0.1)]
    expected_U = [slopes[0] * 1.0 + slopes[1] * 0.5, slopes[0] * 2.0 - slopes[1]]
    assert prompt.U.grad[:, 0].tolist() == pytest.approx(expected_U, abs=1e-4)


@pytest.mark.parametrize(("n", "r"), [(6, 2), (20, 4), (9, 1)])
def test_as_many_numbers_train_as_the_paper_says(n: int, r: int, tmp_path: Path) -> None:
    """And so many lie in a bundle; of the second form X_0 beside them."""
    for form, expected, stored in (("factors", r * (n + D), 0), ("projected", 2 * r * D, n * D)):
        stack, prompt = stack_of(length=n, rank=r, form=form)
        assert stack.trainable_parameters() == expected
        assert prompt.length == len(prompt.rows()) == n
        stack.save(tmp_path / form)
        tensors = load_file(tmp_path / form / "lopt.safetensors")
        assert sum(t.numel() for t in tensors.values()) == expected + stored


def test_the_defaults_train_a_fifth_of_the_numbers() -> None:
    """At the width of GPT-2 large, and of T5-base, for which the paper says so."""
    n, r = Lopt().config.length, Lopt().config.rank
    for d in (1280, 768):
        assert 4.5 < n * d / (r * (n + d)) < 5.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_rank_stays_r_and_what_is_fixed_stays_fixed(form: str, arch: str) -> None:
    stack, prompt = stack_of(arch, form=form)
    fixed = getattr(prompt, "X_0", torch.zeros(0)).clone()
    before = prompt.rows().detach().clone()
    stack.train(ROWS, steps=4, batch_size=2, learning_rate=0.1, weight_decay=0.1)
    X = prompt.rows().detach()
    values = torch.linalg.svdvals(X)
    assert (values > 1e-5 * values[0]).sum() == 2
    assert (X - before).abs().min(dim=1).values.max() > 1e-4
    assert torch.equal(getattr(prompt, "X_0", torch.zeros(0)), fixed)
    assert not fixed.requires_grad


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bert", "gemma"])
def test_full_rank_starts_as_plain_prompt_tuning(arch: str) -> None:
    """r = n: the rows are embeddings of tokens, as the model calls them."""
    stack, prompt = stack_of(arch, rank=6)
    embedding = stack.model.get_input_embeddings()
    every = embedding(torch.arange(embedding.num_embeddings)).detach()
    distance = torch.cdist(prompt.rows().detach(), every)
    ids = distance.argmin(1)
    assert len(set(ids.tolist())) == 6
    torch.testing.assert_close(prompt.rows().detach(), every[ids], rtol=1e-5, atol=1e-5)
    plain, _ = plain_of(every[ids], arch)
    torch.testing.assert_close(logits(stack), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "r"), [(6, 6), (40, 32)])
def test_full_rank_trains_as_plain_prompt_tuning(n: int, r: int) -> None:
    """r = min(n, d), one factor the identity and at rest: the other one is the prompt, to the bit in every step."""
    P = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    stack, prompt = stack_of(length=n, rank=r)
    resting, training = (prompt.U, prompt.V) if n == r else (prompt.V, prompt.U)
    resting.data.copy_(torch.eye(r))
    training.data.copy_(P)
    plain, parameter = plain_of(P)
    assert torch.equal(logits(stack), logits(plain))
    run(stack, torch.optim.AdamW([training], lr=0.1))
    run(plain, torch.optim.AdamW([parameter], lr=0.1))
    assert not torch.equal(parameter.data, P)
    assert torch.equal(training.data, parameter.data)
    assert torch.equal(logits(stack), logits(plain))


def test_full_rank_goes_where_plain_prompt_tuning_goes() -> None:
    """An orthogonal U at rest is a change of basis, which plain gradient descent does not see."""
    stack, prompt = stack_of(rank=6)
    P = prompt.rows().detach().clone()
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    prompt.U.data.copy_(Q)
    prompt.V.data.copy_(Q.t() @ P)
    plain, parameter = plain_of(P)
    run(stack, torch.optim.SGD([prompt.V], lr=0.5))
    run(plain, torch.optim.SGD([parameter], lr=0.5))
    assert (parameter.data - P).abs().max() > 1e-2
    torch.testing.assert_close(prompt.rows().detach(), parameter.data, rtol=1e-4, atol=1e-4)


def test_any_prompt_is_reached_at_full_rank_and_not_below() -> None:
    target = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    lost = []
    for r in range(1, 5):
        prompt = Factors(4, 7, r)
        prompt.near(torch.randn(4, 7, generator=torch.Generator().manual_seed(1)))
        optimizer = torch.optim.LBFGS(prompt.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def loss(prompt: Factors = prompt, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            found = (prompt.rows() - target).square().sum()
            found.backward()
            return found

        optimizer.step(loss)
        lost.append(float((prompt.rows().detach() - target).square().sum()))
    tails = torch.linalg.svdvals(target).square()
    assert lost[:3] == pytest.approx([float(tails[r:].sum()) for r in range(1, 4)], rel=1e-3), (
        "the best there is"
    )
    assert lost[3] < 1e-6


def test_a_prompt_cut_to_a_rank_loses_what_its_spectrum_says() -> None:
    """And the logits that it gives come back with the rank."""
    P = torch.randn(6, D, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 6)[:, None]
    plain, _ = plain_of(P)
    expected, values, distances = logits(plain), torch.linalg.svdvals(P), []
    for r in range(1, 7):
        stack, prompt = stack_of(rank=r)
        prompt.near(P)
        assert float((prompt.rows().detach() - P).norm()) == pytest.approx(
            float(values[r:].square().sum().sqrt()), abs=1e-5
        )
        assert float(prompt.U.detach().norm()) == pytest.approx(float(prompt.V.detach().norm()), rel=1e-5), (
            "neither is larger"
        )
        distances.append(float((logits(stack) - expected).norm()))
    assert distances[-1] < 1e-3 < distances[3] < distances[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_the_product_is_a_prompt_like_any_other(form: str, arch: str) -> None:
    stack, prompt = stack_of(arch, form=form)
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.1)
    plain, _ = plain_of(prompt.rows().detach(), arch)
    assert torch.equal(logits(stack), logits(plain))


# -- how it starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("sigma", list(SIGMA))
def test_the_projected_form_starts_as_near_as_its_u_allows(sigma: str, arch: str) -> None:
    stack, prompt = stack_of(arch, form="projected", sigma=sigma, length=20, rank=3)
    embedding = stack.model.get_input_embeddings()
    every = embedding(torch.arange(embedding.num_embeddings)).detach()
    assert len({int((every == row).all(1).nonzero()) for row in prompt.X_0}) == 20
    H, X = prompt.hidden().detach(), prompt.rows().detach()
    assert torch.equal(H, SIGMA[sigma](prompt.X_0 @ prompt.U.detach()))
    assert (H.t() @ (prompt.X_0 - X)).abs().max() < 1e-3 * (H.t() @ prompt.X_0).abs().max(), "least squares"
    assert 0.5 < float((prompt.X_0 @ prompt.U.detach()).std()) < 1.5


@pytest.mark.parametrize("form", FORMS)
def test_all_of_it_trains_also_where_rows_are_the_same(form: str) -> None:
    """Twenty rows of sixteen tokens have rank 16."""
    plugin = Lopt(length=20, rank=20, form=form)
    stack = Stack(tiny("llama", vocab_size=16), [plugin])
    ids = torch.arange(16).expand(2, -1)
    before = [p.detach().clone() for p in stack.ledger.parameters("lopt")]
    optimizer = torch.optim.AdamW(stack.ledger.parameters("lopt"), lr=0.1)
    stack.train_step({"input_ids": ids, "labels": ids}, optimizer=optimizer)
    for old, p in zip(before, stack.ledger.parameters("lopt"), strict=True):
        assert (p.detach() - old).abs().min() > 1e-3


def test_directions_that_the_start_lacks_train() -> None:
    """Two factors that are both 0 would get no gradient, ever."""
    X, prompt = torch.zeros(4, 5), Factors(4, 5, 4)
    X[0, 1], X[2, 4] = 3.0, 2.0
    prompt.near(X)
    torch.testing.assert_close(prompt.rows().detach(), X, rtol=0, atol=1e-4)
    prompt.rows().backward(torch.ones(4, 5))
    assert prompt.U.grad.norm(dim=0).min() > 0
    assert prompt.V.grad.norm(dim=1).min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_seed_draws_the_tokens(form: str) -> None:
    def start(seed: int) -> Tensor:
        plugin = Lopt(length=6, rank=2, form=form)
        Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer(), seed=seed)
        return plugin.prompt.rows().detach()

    assert torch.equal(start(0), start(0))
    assert not torch.allclose(start(0), start(1), atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form: str, tmp_path: Path) -> None:
    plugin = Lopt(length=6, rank=2, form=form)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    _, prompt = stack_of(form=form)
    assert plugin.prompt.rows().dtype == torch.bfloat16
    torch.testing.assert_close(plugin.prompt.rows().float(), prompt.rows(), rtol=0.1, atol=0.1)
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b", model=tiny("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), logits(stack))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "r", "most"), [(6, 7, 6), (40, 33, 32)])
def test_a_rank_that_no_prompt_has_is_refused(form: str, n: int, r: int, most: int) -> None:
    with pytest.raises(
        PeftxError, match=f"lopt: rank {r}, and a prompt of {n} rows of width 32 has"
    ) as caught:
        stack_of(length=n, rank=r, form=form)
    assert f"rank: {most} or less" in str(caught.value.hint)
    stack_of(length=n, rank=most, form=form)


@pytest.mark.parametrize("options", [{"length": 0}, {"rank": 0}, {"form": "svd"}, {"sigma": "none"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Lopt(**options)
