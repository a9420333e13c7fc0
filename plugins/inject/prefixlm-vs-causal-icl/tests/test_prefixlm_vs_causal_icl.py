"""Prefix mask: who sees whom, in the theorem's linear attention and on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftx import Stack
from peftx.engines.data import IGNORE, Collator, encode_pair
from peftx.errors import ArchitectureError, ConflictError, PeftxError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_full_finetuning import FullFinetuning
from peftx_linupper import LinUpper
from peftx_ls_llama import LsLlama
from peftx_ntk_attention import NtkAttention
from peftx_prefix_tuning import PrefixTuning
from peftx_prefixlm_vs_causal_icl import (
    PrefixlmVsCausalIcl,
    before,
    descend,
    experiment,
    problems,
    sees,
    stationary,
)
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("prefixlm-vs-causal-icl")

SMALL = {"dim": 3, "pairs": 6, "queries": 4, "problems": 3, "layers": 8, "most_pairs": 12}


def experiment_of(**options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return experiment(PrefixlmVsCausalIcl(**options).config)


def pairs_of(noise: float = 0.0, pairs: int = 6, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x, y of the pairs, y of the queries."""
    x, y = problems(PrefixlmVsCausalIcl(**SMALL, noise=noise, **options).config, pairs, 0)
    return x, y[:, :pairs], y[:, pairs:]


def seen_by(x: Tensor, n: int, prefix: bool) -> Tensor:
    return sees((torch.arange(x.shape[1]) < n) & prefix)[:, :n]


# ------------------------------------------------------------------------------------------------------- the theorem
def test_who_sees_whom() -> None:
    found = sees(torch.tensor([False, True, True, True, False])).int().tolist()
    assert found == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert torch.equal(sees(torch.zeros(4).bool()), torch.ones(4, 4).tril().bool())
    assert sees(torch.ones(4).bool()).all()


RELEASED = {
    False: (
        [
            0.119260807,
            0.058918211,
            0.041146209,
            0.029729819,
            0.021127521,
            0.015261279,
            0.011604013,
            0.009401170,
        ],
        [
            0.166761834,
            0.151083766,
            0.154567745,
            0.157465697,
            0.157183223,
            0.154016480,
            0.148755210,
            0.142198703,
        ],
    ),
    True: (
        [
            0.042793182,
            0.023582792,
            0.017579572,
            0.014123401,
            0.011876692,
            0.010309935,
            0.009143040,
            0.008220940,
        ],
        [
            0.166761834,
            0.142359627,
            0.129878667,
            0.120497268,
            0.112385305,
            0.104906168,
            0.097817968,
            0.091043708,
        ],
    ),
}
"""Errors of pairs and of queries after layers 1 to 8 by google-research/causallm_icl, commit 6955752: the loops of
`draw_autoregressive_converge` and `draw_full_converge`, with rate 0.3 on the problems below."""


@pytest.mark.parametrize("prefix", [False, True])
def test_equals_the_released_loops(prefix: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(3, 10, 3, generator=random, dtype=torch.float64) * 2 - 1
    w = torch.randn(3, 3, generator=random, dtype=torch.float64)
    y = (x @ w[..., None])[..., 0]
    r = descend(x, y[:, :6], seen_by(x, 6, prefix), 0.3, 8)
    pairs, queries = r[1:, :, :6].square().mean((1, 2)), (y[:, 6:] + r[1:, :, 6:]).square().mean((1, 2))
    expected = torch.tensor(RELEASED[prefix], dtype=torch.float64)
    assert (torch.stack([pairs, queries]) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("prefix", [False, True])
def test_the_residuals_are_those_of_the_coefficients(prefix: bool) -> None:
    x, y, _ = pairs_of()
    a, rate = torch.zeros(3, 6, dtype=torch.float64), 0.2
    r = descend(x, y, seen_by(x, 6, prefix), rate, 3)
    for layer in range(4):
        for b in range(3):
            for j in range(10):
                known = [k for k in range(6) if prefix or k <= j]
                predicted = sum(float(a[b, k] * (x[b, k] @ x[b, j])) for k in known)
                expected = float(y[b, j]) - predicted if j < 6 else -predicted
                assert float(r[layer, b, j]) == pytest.approx(expected, abs=1e-9)
        a += rate * r[layer, :, :6]


@pytest.mark.parametrize(("pairs", "noise"), [(8, 0.5), (2, 0.0)])
def test_prefix_ends_at_least_squares(pairs: int, noise: float) -> None:
    """The one of the smallest norm, where there are fewer pairs than unknowns."""
    x, y, _ = pairs_of(noise, pairs)
    w = torch.linalg.pinv(x[:, :pairs]) @ y[..., None]
    r = descend(x, y, seen_by(x, pairs, True), 0.2, 2000)[-1]
    torch.testing.assert_close(-r[:, pairs:], (x[:, pairs:] @ w)[..., 0], rtol=1e-5, atol=1e-6)


def test_causal_ends_at_the_stationary_point() -> None:
    """Every pair is fitted by those up to itself, noise and all."""
    x, y, _ = pairs_of(0.5)
    r = descend(x, y, seen_by(x, 6, False), 0.3, 4000)[-1]
    assert r[:, :6].abs().max() < 1e-6
    found = stationary(x, y)
    torch.testing.assert_close(-r[:, 6:], found[..., -1], rtol=1e-5, atol=1e-5)
    a = torch.zeros(3, 6, dtype=torch.float64)
    for j in range(6):
        a[:, j] = (y[:, j] - sum(a[:, i] * (x[:, i] * x[:, j]).sum(-1) for i in range(j))) / x[
            :, j
        ].square().sum(-1)
        torch.testing.assert_close(found[..., j], torch.einsum("bi,bid,bqd->bq", a, x[:, :6], x[:, 6:]))
    w = torch.linalg.pinv(x[:, :6]) @ y[..., None]
    assert (found[..., -1] - (x[:, 6:] @ w)[..., 0]).abs().max() > 0.1, "and that is not least squares"


def test_only_prefix_is_the_same_in_any_order() -> None:
    x, y, _ = pairs_of()
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    turned = torch.cat([x[:, order], x[:, 6:]], 1)
    for prefix in (True, False):
        one, other = (
            descend(x_, y_, seen_by(x_, 6, prefix), 0.2, 9)[-1, :, 6:]
            for x_, y_ in ((x, y), (turned, y[:, order]))
        )
        assert torch.allclose(one, other) is prefix


def test_the_theorem_at_the_papers_sizes() -> None:
    depth, ends = experiment_of()
    query, pairs = (
        {name: depth[f"{kind}/{name}"] for name in ("prefix", "causal")} for kind in ("query", "pairs")
    )
    assert {len(errors) for errors in (*query.values(), *pairs.values())} == {51}
    assert pairs["causal"][-1] < 1e-4
    assert query["causal"][-1] > 0.4
    assert abs(query["causal"][-1] / query["causal"][-20] - 1) < 1e-3, "it stays where it is"
    assert query["prefix"][-1] < 1e-3 * query["causal"][-1]
    assert depth["query/least-squares"] < 1e-20
    rates = query["prefix"][31:] / query["prefix"][30:-1]
    assert 0.8 < rates.min() < rates.max() < 0.95, "linear convergence: by about a factor a layer"
    last = [float(ends[f"stationary/mean-{mean}"][-1]) for mean in range(4)]
    assert last == sorted(last)
    assert last[0] < 1e-6
    assert last[3] > 2
    assert {len(errors) for errors in ends.values()} == {300}


def test_with_noise_no_number_of_pairs_brings_causal_to_least_squares() -> None:
    options = {"noise": 0.5, "problems": 32}
    stays = experiment_of(**options)[1]["stationary/mean-0"]
    assert stays[-100:].mean() > 0.8 * stays[100:200].mean() > 0.15
    assert experiment_of(**options, pairs=300, rate=0.01)[0]["query/least-squares"] < 0.03


def test_options_of_the_experiment() -> None:
    depth, ends = experiment_of(**SMALL)
    assert len(depth["query/prefix"]) == 9
    assert len(ends["stationary/mean-0"]) == 12
    x, y, queries = pairs_of()
    assert x.shape == (3, 10, 3)
    assert float(depth["query/causal"][0]) == pytest.approx(float(queries.square().mean()))
    r = descend(x, y, seen_by(x, 6, True), 0.04, 8)
    assert float(depth["query/prefix"][-1]) == pytest.approx(float((queries + r[-1, :, 6:]).square().mean()))
    noisy = pairs_of(0.5)
    assert torch.equal(noisy[2], queries), "labels of queries have no noise"
    assert not torch.equal(noisy[1], y)
    centred, moved = (problems(PrefixlmVsCausalIcl(**SMALL).config, 6, mean)[0] for mean in (0, 2))
    torch.testing.assert_close(moved, centred + 2)
    assert centred.abs().max() < 1
    with pytest.raises(PeftxError, match=r"steps of rate 50\.0 diverge"):
        experiment_of(**SMALL | {"layers": 200}, rate=50.0)


# ----------------------------------------------------------------------------------------------------------- a model
TOKENIZER = tiny_tokenizer()
TEXT = torch.tensor([[8, 20, 31, 12, 9, 40, 17, 25]])
MARKS = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
ROWS = [
    {"prompt": f"{n} is more than {n - 1} and is", "completion": word}
    for n, word in enumerate(("no", "odd", "even"))
]


def stack_of(arch: str = "llama", *others: Any, model: Any = None, **options: Any) -> Stack:
    base = tiny(arch) if model is None else model
    return Stack(base, [*others, PrefixlmVsCausalIcl(**options)], tokenizer=TOKENIZER)


def by_mask(model: Any, ids: Tensor, marks: Tensor, **inputs: Any) -> Any:
    """The plain model on one text, under a mask that is given."""
    mask = torch.where(sees(marks.bool()), 0.0, torch.finfo(torch.float32).min)[None, None]
    if "sliding_attention" in getattr(model.config, "layer_types", ()):
        mask = {"full_attention": mask, "sliding_attention": mask}
    return model(ids, attention_mask=mask, **inputs)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "gpt_neox", "phi3", "mistral"])
@torch.no_grad()
def test_equals_the_model_under_a_mask_that_is_given(arch: str, kind: str) -> None:
    model = tiny(arch)
    model.set_attn_implementation(kind)
    stack = stack_of(model=model)
    plain = tiny(arch)
    plain.set_attn_implementation(kind)
    found = stack.model(TEXT, context=MARKS).logits
    torch.testing.assert_close(found, by_mask(plain, TEXT, MARKS[0]).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, :4], plain(TEXT).logits[:, :4], atol=1e-3)
    assert torch.equal(stack.model(TEXT).logits, plain(TEXT).logits), "without marks it is the plain model"


@torch.no_grad()
def test_windows_fall_inside_of_a_context_alone() -> None:
    stack = stack_of(model=tiny("mistral", sliding_window=2))
    i, j = torch.arange(8)[:, None], torch.arange(8)
    seen = (j <= i) & (i - j < 2) | sees(MARKS[0].bool()) & (i < 5) & (j < 5)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = tiny("mistral", sliding_window=2)(TEXT, attention_mask=mask).logits
    torch.testing.assert_close(stack.model(TEXT, context=MARKS).logits, expected, rtol=1e-4, atol=1e-5)
    with stack.columns(context=MARKS):
        cache = stack.model(TEXT[:, :6], use_cache=True).past_key_values
        step = stack.model(TEXT[:, 6:7], past_key_values=cache).logits
    torch.testing.assert_close(step, expected[:, 6:7], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_have_contexts_of_their_own_and_pads_are_of_none() -> None:
    stack, rows = stack_of(), (TEXT[0], TEXT[0, :5])
    contexts = (MARKS[0], torch.tensor([1, 1, 1, 0, 0]))
    alone = [
        stack.model(ids[None], context=marks[None]).logits[0]
        for ids, marks in zip(rows, contexts, strict=True)
    ]
    for side in ("left", "right"):
        pad = (
            (lambda x, value: F.pad(x, (3, 0), value=value))
            if side == "left"
            else (lambda x, value: F.pad(x, (0, 3), value=value))
        )
        ids, mask = (
            torch.stack([rows[0], pad(rows[1], PAD)]),
            torch.stack([torch.ones(8).long(), pad(torch.ones(5).long(), 0)]),
        )
        marks = torch.stack([contexts[0], pad(contexts[1], 1)])  # the pads are marked, and do not count
        places = (mask.cumsum(1) - 1).clamp(min=0)
        found = stack.model(ids, attention_mask=mask, position_ids=places, context=marks).logits
        for row in range(2):
            torch.testing.assert_close(found[row, mask[row].bool()], alone[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_of_it_is_unmasked_attention_and_one_token_is_the_plain_model() -> None:
    stack = stack_of()
    unmasked = (
        Stack(tiny("llama"), [LsLlama(unmasked=True)], tokenizer=TOKENIZER)
        .model(TEXT, use_cache=False)
        .logits
    )
    torch.testing.assert_close(
        stack.model(TEXT, context=torch.ones_like(TEXT)).logits, unmasked, rtol=1e-4, atol=1e-5
    )
    one = F.one_hot(torch.tensor([3]), 8)
    torch.testing.assert_close(
        stack.model(TEXT, context=one).logits, stack.model(TEXT).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("place", range(8))
@torch.no_grad()
def test_who_follows_from_whom(place: int) -> None:
    stack, other = stack_of(), TEXT.clone()
    other[0, place] += 1
    changed = (stack.model(TEXT, context=MARKS).logits - stack.model(other, context=MARKS).logits).abs().amax(
        -1
    )[0] > 1e-5
    assert changed.tolist() == sees(MARKS[0].bool())[:, place].tolist()


@torch.no_grad()
def test_soft_tokens_are_of_no_context_and_prefixes_are_seen_by_all() -> None:
    stack = stack_of("llama", PromptTuning(length=2))
    plain, (soft,) = tiny("llama"), stack.ledger.parameters("prompt-tuning")
    inputs = torch.cat([soft[None], plain.get_input_embeddings()(TEXT)], 1)
    mask = torch.where(sees(F.pad(MARKS[0], (2, 0)).bool()), 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = plain(inputs_embeds=inputs, attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(stack.model(TEXT, context=MARKS).logits, expected, rtol=1e-4, atol=1e-5)
    stack = stack_of("llama", PrefixTuning(length=2))
    for p in stack.ledger.parameters("prefix-tuning"):
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before_last = [
        stack.model(TEXT, context=marks).logits[:, 4] for marks in (MARKS, torch.zeros_like(MARKS))
    ]
    assert not torch.allclose(*before_last, atol=1e-4)
    last_of_context = F.pad(torch.ones(1, 1).long(), (0, 7))
    torch.testing.assert_close(
        stack.model(TEXT, context=last_of_context).logits, stack.model(TEXT).logits, rtol=1e-4, atol=1e-5
    )
    one = TEXT[:, :1]  # a text of one token sees all that stands in front of it
    torch.testing.assert_close(
        stack.model(one, context=torch.ones_like(one)).logits, stack.model(one).logits, rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------------------------------------------------- training
def batch_of(rows: Any = ROWS, side: Any = "right") -> dict[str, Tensor]:
    pairs = [encode_pair(TOKENIZER, row["prompt"], row["completion"], max_length=64) for row in rows]
    return Collator(PAD, padding_side=side)([{"input_ids": p.input_ids, "labels": p.labels} for p in pairs])


def test_the_context_ends_at_the_first_label() -> None:
    labels = torch.tensor(
        [[IGNORE, IGNORE, 7, IGNORE, 8], [5, 6, 7, 8, 9], [IGNORE, IGNORE, IGNORE, IGNORE, 9]]
    )
    assert before(labels).tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_those_under_the_mask(side: Any) -> None:
    stack = stack_of("llama", FullFinetuning())
    loss = float(stack.train_step(batch_of(side=side)))
    plain, total = tiny("llama"), 0.0
    rows = [batch_of([row]) for row in ROWS]
    count = sum(int((row["labels"][:, 1:] != IGNORE).sum()) for row in rows)
    for row in rows:
        logits = by_mask(plain, row["input_ids"], before(row["labels"])[0]).logits[0, :-1]
        total = total + F.cross_entropy(logits, row["labels"][0, 1:], reduction="sum") / count
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        stack.model.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-6
    )


def test_a_column_of_the_rows_says_otherwise() -> None:
    batch = batch_of()
    given = stack_of("llama", FullFinetuning()).train_step(
        {**batch, "context": torch.zeros_like(batch["labels"])}
    )
    causal, prefix = tiny("llama")(**batch).loss.item(), stack_of("llama", FullFinetuning()).train_step(batch)
    assert float(given) == pytest.approx(causal, rel=1e-5)
    assert abs(float(prefix) - causal) > 1e-3


# -------------------------------------------------------------------------------------------------------- generation
def test_a_prompt_is_a_context_of_what_is_generated() -> None:
    stack, plain = stack_of(), tiny("llama")
    prompts = ["one and two", "three"]
    found = stack.generate(prompts, max_new_tokens=5)
    assert found != Stack(tiny("llama"), tokenizer=TOKENIZER).generate(prompts, max_new_tokens=5)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([TOKENIZER(prompt).input_ids])
        known = ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                logits = by_mask(plain, ids, torch.arange(ids.shape[1]) < known).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        assert text == TOKENIZER.decode(ids[0, known:], skip_special_tokens=True)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert stack.generate(prompts, max_new_tokens=5, **options) == found
    with stack.disabled("prefixlm-vs-causal-icl"):
        assert stack.generate(prompts, max_new_tokens=5) != found


@torch.no_grad()
def test_a_part_of_a_prompt_and_what_a_cache_holds() -> None:
    stack = stack_of()
    with stack.columns(context=MARKS):
        cached = stack.model(TEXT[:, :6], use_cache=True)
        step = stack.model(TEXT[:, 6:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(step, stack.model(TEXT, context=MARKS).logits[:, 6:], rtol=1e-4, atol=1e-5)
    with stack.columns(context=MARKS):
        cached = stack.model(TEXT[:, :3], use_cache=True)
        with pytest.raises(UnsupportedError, match="a part of the text is in the cache already"):
            stack.model(TEXT[:, 3:], past_key_values=cached.past_key_values)


# --------------------------------------------------------------------------------------------------------- measuring
def test_scores_and_the_figure(tmp_path: Path) -> None:
    stack = stack_of(**SMALL)
    found = stack.evaluate(ROWS, metrics=["prefixlm-vs-causal-icl"], output_dir=tmp_path / "new" / "figures")
    depth, ends = experiment_of(**SMALL)
    for name, errors in (depth | ends).items():
        assert found[name].value == float(errors[-1])
    sums, count = {"prefix": 0.0, "causal": 0.0}, 0
    for row in ROWS:
        batch = batch_of([row])
        for name, marks in (
            ("prefix", before(batch["labels"])),
            ("causal", torch.zeros_like(batch["labels"])),
        ):
            with torch.no_grad():
                logits = by_mask(tiny("llama"), batch["input_ids"], marks[0]).logits[0, :-1]
            sums[name] += float(F.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum"))
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    for name, total in sums.items():
        assert found[f"nll/{name}"].value == pytest.approx(total / count, rel=1e-5)
        assert found[f"nll/{name}"].count == count
    page = (tmp_path / "new" / "figures" / "prefixlm-vs-causal-icl.html").read_text()
    assert page.count("<svg") == 2
    lines = [part.split('"', 1)[0] for part in page.split('points="')[1:]]
    assert [len(line.split()) for line in lines] == [8] * 4 + [12] * 4
    for name in (*(n for n in depth if n != "query/least-squares"), *ends):
        assert f"{name}</span>" in page
    heights = [float(point.split(",")[1]) for point in lines[0].split()]
    logs = depth["query/prefix"][1:].log10()
    down = (logs[0] - logs) / (logs[0] - logs[-1])  # in proportion to the logarithm
    assert [(h - heights[0]) / (heights[-1] - heights[0]) for h in heights] == pytest.approx(
        down.tolist(), abs=0.02
    )


def test_texts_have_no_context_and_without_rows_the_theorem_is_left() -> None:
    stack = stack_of(**SMALL)
    found = stack.evaluate(["one and two", "three"], metrics=["prefixlm-vs-causal-icl"])
    assert found["nll/prefix"].value == found["nll/causal"].value
    assert not any("nll" in name for name in stack_of(**SMALL).evaluate(metrics=["prefixlm-vs-causal-icl"]))


# ----------------------------------------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("t5", r"t5 has '\w+' in 0 of 2"),
        ("bert", r"bert has '\w+' in 0 of 2"),
        ("mamba", "no attention layers"),
        ("bloom", "does not look its attention up"),
        ("qwen3_next", r"qwen3_next has '\w+' in 1 of 2"),
    ],
)
def test_models_without_a_mask_to_change(arch: str, told: str) -> None:
    with pytest.raises(ArchitectureError, match=told):
        stack_of(arch)


def test_an_attention_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArchitectureError, match="llama has 'flash_attention_2' in 2 of 2"):
        stack_of(model=model)


def test_plugins_that_cannot_stand_beside_it() -> None:
    with pytest.raises(ConflictError, match="compute the attention"):
        stack_of("llama", NtkAttention())
    with pytest.raises(ConflictError, match="reads labels of tokens"):
        stack_of("llama", LsLlama())
    for order in (1, -1):
        plugins = [LinUpper(), PrefixlmVsCausalIcl()][::order]
        with pytest.raises(
            ConflictError, match="prefixlm-vs-causal-icl: 'linupper' computes a loss of its own"
        ):
            Stack(tiny("llama"), plugins, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"pairs": 0},
        {"queries": 0},
        {"layers": 0},
        {"rate": 0.0},
        {"problems": 0},
        {"noise": -1.0},
        {"most_pairs": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=next(iter(options))):
        PrefixlmVsCausalIcl(**options)
