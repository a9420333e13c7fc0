"""yq-LSA: what linear self-attention can say with a guess and without, and the guess on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack
from peftx.engines.data import IGNORE, Collator, encode_pair
from peftx.errors import ArchitectureError, ConflictError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_linupper import LinUpper
from peftx_ls_llama import LsLlama
from peftx_prompt_tuning import PromptTuning
from peftx_yq_lsa import (
    Guess,
    Lsa,
    YqLsa,
    descent,
    experiment,
    fit,
    predict,
    query_of,
    risk,
    tasks,
    with_guesses,
)

test_conformance = conformance("yq-lsa")

SMALL: dict[str, Any] = {"dim": 3, "pairs": 4, "tasks": 2000, "steps": 60, "norms": (0.0, 2.0)}


def number(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompts(N: int = 5, n: int = 4, d: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, n, d], w [N, d], and S of them."""
    x, w = number(N, n, d), 0.7 + number(N, d, seed=1)
    z = torch.cat([x, x @ w[..., None]], -1)
    return x, w, z.mT @ z / n


# ------------------------------------------------------------------------------------------------------- the theorem
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_linear_self_attention_on_whole_prompts(heads: int) -> None:
    """Entry (d + 1, n + 1) of Z + (1 / n) sum_h PV_h Z M Z^T KQ_h Z, whatever the other rows of PV are."""
    x, w, S = prompts()
    queries, v = number(2, 3, seed=2), number(3, seed=3)
    PV, KQ = number(heads, 4, 4, seed=4), number(heads, 4, 4, seed=5)
    found = predict(S, queries, (PV[:, -1], KQ, v))
    for b in range(5):
        for q in range(2):
            Z = torch.cat(
                [
                    torch.cat([x[b], queries[q : q + 1]]).T,
                    torch.cat([x[b] @ w[b], (v @ queries[q])[None]])[None],
                ]
            )
            M = torch.diag(torch.tensor([1, 1, 1, 1, 0]).double())
            Z = Z + sum(PV[h] @ Z @ M @ Z.T @ KQ[h] @ Z for h in range(heads)) / 4
            assert float(found[b, q]) == pytest.approx(float(Z[-1, -1]), rel=1e-9)


@pytest.mark.parametrize("zero", [True, False])
def test_one_step_of_gradient_descent(zero: bool) -> None:
    """From 0 it takes no guess."""
    x, w, S = prompts()
    w_0, queries, eta = number(3, seed=2) * (not zero), number(2, 3, seed=3), 0.3
    start = w_0.expand(5, 3).clone().requires_grad_()
    loss = ((x @ w[..., None] - x @ start[..., None]).square().mean(1) / 2).sum()
    stepped = start - eta * torch.autograd.grad(loss, start)[0]
    p, KQ, v = descent(w_0, eta)
    torch.testing.assert_close(predict(S, queries, (p, KQ, v)), stepped @ queries.T)
    assert zero is torch.allclose(predict(S, queries, (p, KQ, 0 * v)), stepped @ queries.T)


def test_it_is_linear_in_the_guess() -> None:
    _, _, S = prompts()
    queries, lsa = number(2, 3, seed=2), (number(2, 4, seed=3), number(2, 4, 4, seed=4))
    none, one, two = (predict(S, queries, (*lsa, k * torch.ones(3).double())) for k in range(3))
    torch.testing.assert_close(two - one, one - none)
    assert not torch.allclose(one, none)


def test_more_heads_than_d_plus_1_say_nothing_new() -> None:
    _, _, S = prompts()
    queries, p, KQ, v = number(2, 3, seed=2), number(9, 4, seed=3), number(9, 4, 4, seed=4), 0 * number(3)
    fewer = (torch.eye(4).double(), torch.einsum("hi,hjk->ijk", p, KQ), v)
    torch.testing.assert_close(predict(S, queries, fewer), predict(S, queries, (p, KQ, v)))
    A = torch.einsum("hi,hjk->ijk", p, KQ)[..., :3].reshape(16, 3)
    torch.testing.assert_close(predict(S, torch.eye(3).double(), fewer), S.flatten(1) @ A)


def test_the_risk_is_over_all_queries() -> None:
    _, w, S = prompts()
    lsa: Lsa = (number(2, 4, seed=3), number(2, 4, 4, seed=4), number(3, seed=5))
    queries = number(200_000, 3, seed=6)
    drawn = (predict(S, queries, lsa) - w @ queries.T).square().mean()
    assert float(risk(S, w, lsa)) == pytest.approx(float(drawn), rel=0.02)


def test_tasks_are_as_the_paper_has_them() -> None:
    config = YqLsa(**SMALL | {"tasks": 20_000}).config
    mu = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    S, w = tasks(config, mu, 0)
    assert (w.mean(0) - mu).abs().max() < 0.03
    assert (w.std(0) - 1).abs().max() < 0.03
    torch.testing.assert_close(S[:, :3, 3:], S[:, :3, :3] @ w[..., None])  # y = w . x, without noise
    assert (S[:, :3, :3].mean(0) - torch.eye(3)).abs().max() < 0.03
    assert float(S[:, 0, 0].var()) == pytest.approx(2 / 4, rel=0.05), "of n pairs"
    assert not torch.equal(tasks(config, mu, 1)[1], w)
    assert torch.equal(tasks(config, mu, 0)[0], S)


def test_the_theorem_on_small_prompts() -> None:
    curves, mu, v = experiment(YqLsa(**SMALL).config)
    gd, lsa, heads, yq = (curves[name] for name in ("gd", "lsa", "heads", "yq-lsa"))
    best = 3 * 4 / (4 + 3 + 1)  # d (d + 1) / (n + d + 1)
    assert gd == pytest.approx([best, best], rel=0.05), "from the mean, wherever that is"
    assert gd[0] == pytest.approx(gd[1], rel=1e-9)
    assert lsa[0] == pytest.approx(gd[0], rel=0.01)
    assert lsa[1] > 1.4 * gd[1]
    assert lsa[1] > heads[1] > 1.02 * gd[1], "heads help, and do not do"
    assert yq == pytest.approx(gd, rel=0.01)
    assert torch.cosine_similarity(mu, v, 0) > 0.99
    assert float(v.norm()) == pytest.approx(2, rel=0.05)
    assert mu.tolist() == pytest.approx([2 / 3**0.5] * 3)


def test_what_is_trained() -> None:
    """Without a guess v stays, and what it starts from stays as it was."""
    config = YqLsa(**SMALL).config
    mu = torch.ones(3, dtype=torch.float64)
    S, w = tasks(config, mu, 0)
    start = descent(0 * mu, 0.5)
    for guess in (False, True):
        p, KQ, v = fit(S, w, start, 60, guess=guess)
        assert torch.equal(v, 0 * mu) is not guess
        assert not torch.equal(p, start[0])
        assert not torch.equal(KQ, start[1])
        assert not any(part.requires_grad for part in (p, KQ, v))
        assert torch.equal(start[0], descent(0 * mu, 0.5)[0])
        assert risk(S, w, (p, KQ, v)) < risk(S, w, fit(S, w, start, 4, guess=guess)) < risk(S, w, start)


def test_the_mean_is_the_best_to_start_from_and_the_step_size_the_best_from_there() -> None:
    config = YqLsa(**SMALL | {"tasks": 50_000}).config
    mu = torch.ones(3, dtype=torch.float64)
    S, w = tasks(config, mu, 0)
    risks = [float(risk(S, w, descent(mu, eta))) for eta in (0.4, 4 / 8, 0.6)]
    assert risks[1] == min(risks)
    for step in torch.eye(3, dtype=torch.float64):
        assert min(float(risk(S, w, descent(mu + sign * 0.2 * step, 0.5))) for sign in (-1, 1)) > risks[1]


# ----------------------------------------------------------------------------------------------------------- a model
TOKENIZER = tiny_tokenizer()
TEXT = torch.tensor([[8, 20, 31, 12, 9, 40, 17, 25]])
MARKS = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]])
ROWS = [
    {"prompt": f"{n} is more than {n - 1} and is", "completion": word}
    for n, word in enumerate(("no", "odd", "even"))
]


def stack_of(arch: str = "llama", *others: Any, **options: Any) -> Stack:
    """With a B that is not 0."""
    stack = Stack(tiny(arch), [*others, YqLsa(**options)], tokenizer=TOKENIZER)
    with torch.no_grad():
        guess_of(stack).B.copy_(number(*guess_of(stack).B.shape))
    return stack


def guess_of(stack: Stack) -> Guess:
    (part,) = [part for part in stack.ledger.of("yq-lsa") if isinstance(part.module, Guess)]
    return part.module  # type: ignore[return-value]


def by_hand(stack: Stack, plain: Any, ids: Tensor, marks: Tensor) -> Tensor:
    """Logits of the plain model on one text, with y_q added to what goes into its first layer."""
    guess = guess_of(stack)

    def adds(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        at = marks.nonzero()[:, 0]
        x[0, at[-1]] += guess.B @ (guess.V @ x[0, at].mean(0))
        return (x, *args[1:])

    first = plain.transformer.h[0] if hasattr(plain, "transformer") else plain.model.layers[0]
    handle = first.register_forward_pre_hook(adds)
    try:
        return plain(ids).logits  # type: ignore[no-any-return]
    finally:
        handle.remove()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
@torch.no_grad()
def test_the_guess_by_hand(arch: str, size: int) -> None:
    stack = stack_of(arch, size=size)
    assert guess_of(stack).V.shape == (size, 32)
    found = stack.model(TEXT, query=MARKS).logits
    torch.testing.assert_close(found, by_hand(stack, tiny(arch), TEXT, MARKS[0]), rtol=1e-4, atol=1e-5)
    plain = tiny(arch)(TEXT).logits
    changed = (found - plain).abs().amax(-1)[0] > 1e-4
    assert changed.tolist() == [False] * 4 + [True] * 4, (
        "what stands before the last of the query does not know"
    )
    assert torch.equal(stack.model(TEXT).logits, plain)


def test_what_it_starts_from() -> None:
    guess = guess_of(Stack(tiny("llama"), [YqLsa(size=64)], tokenizer=TOKENIZER))
    assert float(guess.V.detach().std()) == pytest.approx(32**-0.5, rel=0.05)
    assert not guess.B.any()


@torch.no_grad()
def test_rows_have_guesses_of_their_own_and_pads_none() -> None:
    stack, rows = stack_of(), (TEXT[0], TEXT[0, :5])
    queries = (MARKS[0], torch.tensor([1, 1, 1, 0, 0]))
    alone = [
        stack.model(ids[None], query=marks[None]).logits[0] for ids, marks in zip(rows, queries, strict=True)
    ]
    for at in ((3, 0), (0, 3)):
        ids = torch.stack([rows[0], F.pad(rows[1], at, value=PAD)])
        mask = torch.stack([torch.ones(8).long(), F.pad(torch.ones(5).long(), at)])
        marks = torch.stack(
            [queries[0], F.pad(queries[1], at, value=1)]
        )  # the pads are marked, and do not count
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = stack.model(ids, attention_mask=mask, position_ids=places, query=marks).logits
        for row in range(2):
            torch.testing.assert_close(found[row, mask[row].bool()], alone[row], rtol=1e-4, atol=1e-5)
    both = stack.model(TEXT.expand(2, -1), query=torch.cat([MARKS, 0 * MARKS])).logits
    torch.testing.assert_close(both[1], tiny("llama")(TEXT).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_soft_tokens_are_of_no_query() -> None:
    stack, plain = stack_of("llama", PromptTuning(length=2)), tiny("llama")
    (soft,) = stack.ledger.parameters("prompt-tuning")
    inputs, guess = plain.get_input_embeddings()(TEXT), guess_of(stack)
    inputs[0, 4] += guess.B @ (guess.V @ inputs[0, 1:5].mean(0))
    expected = plain(inputs_embeds=torch.cat([soft[None], inputs], 1)).logits[:, 2:]
    torch.testing.assert_close(stack.model(TEXT, query=MARKS).logits, expected, rtol=1e-4, atol=1e-5)
    embedded = stack.model(inputs_embeds=plain.get_input_embeddings()(TEXT), query=MARKS).logits
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- training
def batch_of(rows: Any = ROWS, side: Any = "right") -> dict[str, Tensor]:
    pairs = [encode_pair(TOKENIZER, row["prompt"], row["completion"], max_length=64) for row in rows]
    return Collator(PAD, padding_side=side)([{"input_ids": p.input_ids, "labels": p.labels} for p in pairs])


def test_the_query_ends_where_the_answer_begins() -> None:
    labels = torch.tensor(
        [[IGNORE, IGNORE, 7, IGNORE, 8], [5, 6, 7, 8, 9], [IGNORE, IGNORE, IGNORE, IGNORE, 9]]
    )
    assert query_of(labels).tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients(side: Any) -> None:
    stack, rows = stack_of(), [batch_of([row]) for row in ROWS]
    loss = float(stack.train_step(batch_of(side=side)))
    guess = guess_of(stack)
    found = guess.V.grad.clone(), guess.B.grad.clone()
    count = sum(int((row["labels"][:, 1:] != IGNORE).sum()) for row in rows)
    total = torch.zeros(())
    for row in rows:
        logits = by_hand(stack, tiny("llama"), row["input_ids"], query_of(row["labels"])[0])[0, :-1]
        total = total + F.cross_entropy(logits, row["labels"][0, 1:], reduction="sum") / count
    expected = torch.autograd.grad(total, [guess.V, guess.B])
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_column_of_the_rows_says_otherwise() -> None:
    batch = batch_of()
    first = F.pad(torch.ones(3, 1).long(), (0, batch["labels"].shape[1] - 1))
    given = float(stack_of().train_step({**batch, "query": first}))
    with torch.no_grad():
        assert given == pytest.approx(float(stack_of().model(**batch, query=first).loss), rel=1e-5)
    assert given != pytest.approx(float(stack_of().train_step(batch)), rel=1e-3)


def test_it_learns_what_to_guess_and_a_bundle_keeps_it(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [YqLsa(size=2)], tokenizer=TOKENIZER)
    assert stack.trainable_parameters() == 2 * 2 * 32
    report = stack.train(ROWS, steps=20, batch_size=3, learning_rate=0.05, max_length=64)
    assert report.last_loss < report.first_loss - 0.3
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=TOKENIZER)
    with torch.no_grad():
        assert torch.equal(again.model(TEXT, query=MARKS).logits, stack.model(TEXT, query=MARKS).logits)


# -------------------------------------------------------------------------------------------------------- generation
def test_a_prompt_is_a_query() -> None:
    stack, texts = stack_of(), ["one and two", "three"]
    with torch.no_grad():
        guess_of(stack).B.mul_(9)
    found = stack.generate(texts, max_new_tokens=5)
    for prompt, text in zip(texts, found, strict=True):
        ids = torch.tensor([TOKENIZER(prompt).input_ids])
        known = ids.shape[1]
        for _ in range(5):
            marks = (torch.arange(ids.shape[1]) < known).long()
            with torch.no_grad():
                best = by_hand(stack, tiny("llama"), ids, marks)[0, -1].argmax()
            ids = torch.cat([ids, best[None, None]], 1)
        assert text == TOKENIZER.decode(ids[0, known:], skip_special_tokens=True)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert stack.generate(texts, max_new_tokens=5, **options) == found
    with stack.disabled("yq-lsa"):
        assert stack.generate(texts, max_new_tokens=5) != found


@torch.no_grad()
def test_a_query_comes_in_one_call() -> None:
    stack = stack_of()
    with stack.columns(query=MARKS):
        cache = stack.model(TEXT[:, :6], use_cache=True).past_key_values
        step = stack.model(TEXT[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(step, stack.model(TEXT, query=MARKS).logits[:, 6:], rtol=1e-4, atol=1e-5)
        cache = stack.model(TEXT[:, :3], use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="yq-lsa: a guess follows from the whole query"):
            stack.model(TEXT[:, 3:], past_key_values=cache)


# --------------------------------------------------------------------------------------------------------- measuring
def test_scores_and_the_figure(tmp_path: Path) -> None:
    stack = stack_of(**SMALL)
    found = stack.evaluate(ROWS, metrics=["yq-lsa"], output_dir=tmp_path / "new" / "figures")
    curves, mu, v = experiment(YqLsa(**SMALL).config)
    for name, risks in curves.items():
        assert found[f"risk/{name}"].value == risks[-1]
    assert found["cosine"].value == pytest.approx(float(torch.cosine_similarity(mu, v, 0)))
    sums, count = {"guess": 0.0, "none": 0.0}, 0
    for row in ROWS:
        batch = batch_of([row])
        with torch.no_grad():
            both = {
                "guess": by_hand(stack, tiny("llama"), batch["input_ids"], query_of(batch["labels"])[0]),
                "none": tiny("llama")(batch["input_ids"]).logits,
            }
        for name, logits in both.items():
            sums[name] += float(F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum"))
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    for name, total in sums.items():
        assert found[f"nll/{name}"].value == pytest.approx(total / count, rel=1e-5)
        assert found[f"nll/{name}"].count == count
    page = (tmp_path / "new" / "figures" / "yq-lsa.html").read_text()
    assert page.count("<svg") == 1
    lines = [part.split('"', 1)[0].split() for part in page.split('points="')[1:]]
    assert [len(line) for line in lines] == [2] * 4
    assert all(f"{name}</span>" in page for name in curves)
    assert float(lines[1][1].split(",")[1]) < float(lines[3][1].split(",")[1]), (
        "without a guess more is risked"
    )
    assert not any("nll" in name for name in stack_of(**SMALL).evaluate(metrics=["yq-lsa"]))


def test_guesses_as_text() -> None:
    rows = [{"prompt": "A cat. A dog.", "guess": 2.5, "completion": "1.0"}]
    found = with_guesses(rows, "{prompt} Perhaps {guess}. Score:")
    assert found == [{"prompt": "A cat. A dog. Perhaps 2.5. Score:", "guess": 2.5, "completion": "1.0"}]
    assert rows[0]["prompt"] == "A cat. A dog."


# ----------------------------------------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_models_that_do_not_go_on(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"yq-lsa: .* is no decoder that writes text"):
        Stack(tiny(arch), [YqLsa()], tokenizer=TOKENIZER)


def test_plugins_that_cannot_stand_beside_it() -> None:
    with pytest.raises(ConflictError, match="reads labels of tokens"):
        stack_of("llama", LsLlama())
    for order in (1, -1):
        with pytest.raises(ConflictError, match="yq-lsa: 'linupper' computes a loss of its own"):
            Stack(tiny("llama"), [LinUpper(), YqLsa()][::order], tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"dim": 0}, {"pairs": 0}, {"norms": ()}, {"tasks": 0}, {"steps": 0}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=next(iter(options))):
        YqLsa(**options)
