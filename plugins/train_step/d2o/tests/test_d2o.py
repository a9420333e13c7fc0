"""D2O: negative answers against answers of the model's own."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, logsigmoid

import peftx_d2o
from peftx import CallEdit, ModelView, Plugin, Stack, TrainStep, VirtualTokens, hookimpl
from peftx.engines.data import IGNORE, Collator, encode_pair, prompt_ids, tokenize_dataset
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.pipeline import load_run
from peftx.testing import conformance
from peftx.testing.models import BOS, EOS, PAD, tiny, tiny_tokenizer
from peftx_d2o import D2o, d2o_loss, log_probs, pairs_of
from peftx_dpo_prefix_sharing import DpoPrefixSharing
from peftx_lora import Lora
from peftx_mezo import Mezo

test_conformance = conformance("d2o")

TOKENIZER = tiny_tokenizer()
ROWS = [
    {"prompt": f"Q{i}: is {word} nice?\nA:", "chosen": "yes, " + word, "rejected": "no" + "!" * i}
    for i, word in enumerate(("tea", "rain", "sleep"))
]
SMALL = {"samples": 3, "max_new_tokens": 5}


def build(arch: str = "llama", *others: Any, **options: Any) -> Stack:
    """LoRA away from its start, and the plugin."""
    stack = Stack(tiny(arch), [Lora(rank=2), *others, D2o(**{**SMALL, **options})], tokenizer=TOKENIZER)
    shift(stack, 1)
    return stack


def shift(stack: Stack, seed: int) -> None:
    """Move what trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in stack.model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def batch_of(stack: Stack, rows: Any = ROWS, side: Any = "right") -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, list(rows), seed=0, max_length=64))
    tokens = tokenize_dataset(data.train, TOKENIZER, format=data.format, max_length=64)
    return Collator(PAD, padding_side=side)(list(tokens))


def plugin_of(stack: Stack) -> D2o:
    return stack.plugins["d2o"]  # type: ignore[return-value]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[list[int]]]]:
    """What each step draws."""
    seen: list[list[list[list[int]]]] = []
    draw = D2o.draw
    monkeypatch.setattr(D2o, "draw", lambda *args: seen.append(draw(*args)) or seen[-1])
    return seen


def log_prob(model: nn.Module, x: list[int], y: list[int]) -> Tensor:
    """log pi(y | x) of one row, token by token."""
    each = model(input_ids=torch.tensor([x + y])).logits[0].log_softmax(-1)
    return sum(each[len(x) + i - 1, token] for i, token in enumerate(y))


def gradients(stack: Stack) -> list[Tensor]:
    return [p.grad.clone() for p in stack.model.parameters() if p.requires_grad]


# -------------------------------------------------------------------------------------------------------- the loss
def test_the_loss_is_the_formula_and_its_gradient_weighs_the_answers() -> None:
    drawn = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    negative = torch.tensor([0.7], requires_grad=True)
    loss = d2o_loss(drawn, negative, alpha=0.4, beta=0.6)[0]
    margin = 0.6 / 3 * (0.3 - 1.0 + 2.0) - 0.4 * 0.7
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)))
    loss.backward()
    weight = 1 / (1 + math.exp(margin))
    assert drawn.grad.tolist() == [pytest.approx([-weight * 0.6 / 3] * 3)]  # descent raises each y_k
    assert negative.grad.tolist() == [pytest.approx(weight * 0.4)]  # and lowers y_l


def test_log_probs_are_sums_over_the_answer() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 1], [IGNORE, 2, IGNORE, IGNORE]])
    p = logits.log_softmax(-1)
    assert torch.allclose(log_probs(logits, labels), torch.stack((p[0, 1, 3] + p[0, 2, 1], p[1, 0, 2])))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mamba"])
def test_it_starts_at_ln_2(arch: str) -> None:
    """Also where adapters were trained before: they belong to the reference."""
    stack = build(arch)
    assert float(stack.train_step(batch_of(stack))) == pytest.approx(math.log(2), abs=1e-5)
    report = stack.train(ROWS, steps=2, batch_size=3, learning_rate=1e-2, max_length=64)
    assert report.first_loss == pytest.approx(math.log(2), abs=1e-5)
    assert report.last_loss != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("reference", ["start", "base"])
def test_each_round_has_a_reference_of_its_own(tmp_path: Path, reference: str) -> None:
    """Which is the model as the round before left it; the base stays what it was."""
    (tmp_path / "bad.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    spec = tmp_path / "rounds.yaml"
    spec.write_text(
        f"""
        peftx: 1
        model: peftx:tiny
        data: {{train: {{path: bad.jsonl, format: preference}}}}
        stack:
          - {{use: lora, with: {{rank: 2}}}}
          - {{use: d2o, with: {{samples: 2, max_new_tokens: 4, reference: {reference}}}}}
        train: {{steps: 2, batch_size: 3, learning_rate: 1e-2, max_length: 64}}
        run: [inject, {{repeat: {{times: 2, run: [prepare, train]}}}}]
        """,
        encoding="utf-8",
    )
    one, two = load_run(spec).run().training
    assert one.first_loss == pytest.approx(math.log(2), abs=1e-5)
    assert one.last_loss < one.first_loss - 0.1
    if reference == "start":
        assert two.first_loss == pytest.approx(math.log(2), abs=1e-5)
    else:
        assert two.first_loss < one.last_loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reference", ["start", "base"])
def test_loss_and_gradients_are_those_of_rows_by_themselves(
    reference: Any, side: Any, drawn: list[Any]
) -> None:
    stack = build(alpha=0.3, beta=0.2, reference=reference)
    batch = batch_of(stack, side=side)
    pi_r = tiny("llama")
    if reference == "start":
        Stack(pi_r, [Lora(rank=2)], tokenizer=TOKENIZER)
        pi_r.load_state_dict(stack.model.state_dict(), strict=False)
    stack.train_step(batch)
    stack.model.zero_grad()
    shift(stack, 2)
    loss = stack.train_step(batch)
    found = gradients(stack)
    stack.model.zero_grad()

    losses = []
    for row, answers in zip(ROWS, drawn[-1], strict=True):
        pair = encode_pair(TOKENIZER, row["prompt"], row["rejected"], max_length=64)
        x = prompt_ids(TOKENIZER, row["prompt"])
        r = [
            log_prob(stack.model, x, y) - log_prob(pi_r, x, y).detach()
            for y in (pair.input_ids[len(x) :], *answers)
        ]
        losses.append(-logsigmoid(0.2 / 3 * sum(r[1:]) - 0.3 * r[0]))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)
    assert float(loss) != pytest.approx(math.log(2), abs=1e-3)
    largest = max(float(gradient.abs().max()) for gradient in found)
    assert all(
        torch.allclose(a, b, atol=1e-5 * max(1, largest))
        for a, b in zip(found, gradients(stack), strict=True)
    )


def test_with_one_answer_that_is_the_preferred_one_it_is_dpo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of the DPO plugin."""
    preferred = [
        [[label for label in pair.labels if label != IGNORE]]
        for row in ROWS
        if (pair := encode_pair(TOKENIZER, row["prompt"], row["chosen"], max_length=64))
    ]
    monkeypatch.setattr(D2o, "draw", lambda *_: preferred)
    one = build(samples=1, alpha=0.2, beta=0.2)
    two = Stack(tiny("llama"), [Lora(rank=2), DpoPrefixSharing(beta=0.2)], tokenizer=TOKENIZER)
    shift(two, 1)
    data = two.prepare(as_training_data(two, ROWS, seed=0, max_length=64))
    batches = batch_of(one), Collator(PAD)(list(data.train))
    losses = []
    for stack, batch in zip((one, two), batches, strict=True):
        stack.train_step(batch)
        stack.model.zero_grad()
        shift(stack, 2)
        losses.append(float(stack.train_step(batch)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != pytest.approx(math.log(2), abs=1e-3)
    for a, b in zip(gradients(one), gradients(two), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_the_bad_answer_falls_and_the_others_keep_their_spread() -> None:
    """A policy over six answers of one prompt; ascent on the bad answer's loss leaves one of the others alone."""
    start, bad = torch.tensor([1.5, 0.2, 0.0, -0.2, 0.4, -0.1]), 0
    before, generator = start.log_softmax(0), torch.Generator().manual_seed(0)
    entropy = {}
    for method in ("d2o", "ascent"):
        theta = start.clone().requires_grad_()
        for _ in range(300):
            r = theta.log_softmax(0) - before
            y = torch.multinomial(before.exp(), 11, replacement=True, generator=generator)
            loss = (
                r[bad] if method == "ascent" else d2o_loss(r[y][None], r[bad][None], alpha=0.5, beta=0.5)[0]
            )
            (gradient,) = torch.autograd.grad(loss, theta)
            theta.data -= 0.2 * gradient
        p = theta.detach().softmax(0)
        assert p[bad] < 0.01 < 0.4 < before[bad].exp()
        entropy[method] = float(Categorical(p[1:]).entropy())
    assert entropy["d2o"] > 0.95 * float(Categorical(before[1:].exp()).entropy())
    assert entropy["ascent"] < 0.01


# ----------------------------------------------------------------------------------------------------- the answers
def test_answers_are_drawn_from_the_reference_and_not_from_what_it_became(drawn: list[Any]) -> None:
    for reference in ("start", "base"):
        stack = build(reference=reference)
        batch = batch_of(stack)
        for _ in range(2):
            torch.manual_seed(7)
            stack.train_step(batch)
            shift(stack, 5)
        assert drawn[-1] == drawn[-2]
        torch.manual_seed(7)
        plugin_of(stack).draw(stack, [x for x, _ in pairs_of(batch)[0]])
        assert drawn[-1] != drawn[-2]  # of the model as it is now
        stack.train_step(batch)
        stack.train_step(batch)
        assert drawn[-1] != drawn[-2]  # anew in each step


def test_answers_have_the_probabilities_of_the_model_whatever_its_own_settings_are() -> None:
    count = 4000
    stack = build(samples=count, max_new_tokens=1, temperature=0.7)
    settings = stack.model.generation_config
    settings.top_k, settings.top_p, settings.repetition_penalty = 1, 0.1, 3.0
    x = prompt_ids(TOKENIZER, string.printable)  # a third of all tokens, for the penalty
    torch.manual_seed(0)
    (answers,) = plugin_of(stack).draw(stack, [x])
    with torch.no_grad():
        p = (stack.model(input_ids=torch.tensor([x])).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(torch.tensor([y for (y,) in answers]), minlength=len(p))
    chi_squared = float(((found - count * p).square() / (count * p)).sum())
    assert chi_squared < len(p) + 5 * math.sqrt(2 * len(p))


def test_an_answer_ends_with_its_end_token_or_when_it_is_long_enough() -> None:
    stack = build(samples=300, max_new_tokens=6, temperature=50.0)  # any token, the end too
    torch.manual_seed(0)
    prompts = [prompt_ids(TOKENIZER, text) for text in ("a", "a longer one")]
    drawn = plugin_of(stack).draw(stack, prompts)
    assert [len(answers) for answers in drawn] == [300, 300]
    answers = [y for each in drawn for y in each]
    ended = [y for y in answers if EOS in y]
    assert ended
    assert len(ended) < len(answers)
    assert all(y.index(EOS) == len(y) - 1 for y in ended)
    assert {len(y) for y in answers if EOS not in y} == {6}


def test_answers_stop_where_the_window_ends() -> None:
    stack = build(max_new_tokens=60)
    drawn = plugin_of(stack).draw(stack, [prompt_ids(TOKENIZER, "x" * 120), prompt_ids(TOKENIZER, "y")])
    assert max(len(y) for answers in drawn for y in answers) <= 8
    with pytest.raises(PeftxError, match=r"the prompt has 1\d\d tokens and 1 new ones are asked for"):
        plugin_of(stack).draw(stack, [prompt_ids(TOKENIZER, "x" * 140)])


def test_instructions_stand_before_the_prompt_while_drawing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[list[int]]] = []
    real = peftx_d2o.written
    monkeypatch.setattr(
        peftx_d2o, "written", lambda s, rows, *rest: asked.append(rows) or real(s, rows, *rest)
    )
    stack = build(instructions=["Be kind. ", "Be safe. "])
    batch = batch_of(stack)
    calls: list[Tensor] = []
    stack.model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"]), with_kwargs=True)
    stack.train_step(batch)
    texts = [TOKENIZER.decode(row, skip_special_tokens=True) for row in asked[0]]
    said = ["Be kind. ", "Be safe. ", "Be kind. "]
    assert texts == [text + row["prompt"] for row in ROWS for text in said]
    trained = TOKENIZER.batch_decode(calls[-1], skip_special_tokens=True)
    assert len(trained) == 3 * 4
    assert all(text.startswith(ROWS[i // 4]["prompt"]) for i, text in enumerate(trained))


@pytest.mark.parametrize("frame", ["<|bos|> $A <|eos|>", "<|bos|> $A"])
def test_instructions_stand_behind_bos(frame: str) -> None:
    tokenizer, ends = tiny_tokenizer(ends=True), [("<|bos|>", BOS), ("<|eos|>", EOS)]
    parts = tokenizer.backend_tokenizer
    parts.post_processor = type(parts.post_processor)(single=frame, special_tokens=ends)
    stack = Stack(
        tiny("llama"), [Lora(rank=2), D2o(**SMALL, instructions=["Be kind. "])], tokenizer=tokenizer
    )
    calls: list[Tensor] = []
    stack.model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"]), with_kwargs=True)
    plugin_of(stack).draw(stack, [prompt_ids(tokenizer, "Q")])
    assert calls[0][0].tolist() == prompt_ids(tokenizer, "Be kind. Q")
    assert calls[0][0, 0] == BOS


def test_each_row_weighs_the_same_however_a_step_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(D2o, "draw", lambda self, stack, prompts: [[[x[1], x[1]], [x[1]]] for x in prompts])
    stack = build()
    batch = batch_of(stack)
    stack.train_step(batch)
    shift(stack, 2)
    found = []
    for cuts in ([slice(0, 3)], [slice(0, 2), slice(2, 3)]):
        parts = [{name: x[cut] for name, x in batch.items()} for cut in cuts]
        stack.model.zero_grad()
        for micro, (part, share) in enumerate(zip(parts, stack.shares(parts), strict=True)):
            stack.train_step(part, micro=micro, accumulation=len(parts), share=share)
        found.append(gradients(stack))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


# -------------------------------------------------------------------------------------------------------------- rows
def test_the_preferred_answer_is_not_looked_at() -> None:
    found = []
    for rows in (
        ROWS,
        [{**row, "chosen": "something else"} for row in ROWS],
        [{"prompt": row["prompt"], "completion": row["rejected"]} for row in ROWS],
    ):
        stack = build()
        stack.train(rows, steps=2, batch_size=3, learning_rate=1e-2, max_length=64)
        found.append([p.detach() for p in stack.ledger.parameters("lora")])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_of_evaluation_are_rewritten_too() -> None:
    stack = build()
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    data.eval = data.train
    stack.prepare(data)
    assert data.train.column_names == data.eval.column_names == ["prompt", "completion"]
    assert data.eval[2]["completion"] == "no!!"


def test_rows_without_an_answer_to_avoid_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="d2o: the rows are of format 'text'"):
        build().train([{"text": "once"}], steps=1)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(PeftxError, match="d2o: the batch has no attention_mask, labels"):
        build().train_step({"input_ids": ids})


def test_training_lowers_the_negative_answers_and_keeps_the_drawn_ones(drawn: list[Any]) -> None:
    stack = build(samples=6, alpha=0.5, beta=0.5)
    pairs, _ = pairs_of(batch_of(stack))
    reference = build(samples=6).model
    report = stack.train(ROWS, steps=12, batch_size=3, learning_rate=1e-2, max_length=64)
    assert report.last_loss < report.first_loss
    with torch.no_grad():
        for i, (x, y_l) in enumerate(pairs):
            r = [float(log_prob(stack.model, x, y) - log_prob(reference, x, y)) for y in (y_l, *drawn[0][i])]
            assert r[0] < -3
            assert sum(r[1:]) / 6 > r[0] / 2


# ------------------------------------------------------------------------------------------------------------ others
class Rows(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(2)
        self.E = nn.Parameter(torch.randn(2, width, generator=torch.Generator().manual_seed(0)))

    def rows(self) -> Tensor:
        return self.E


class Watch(CallEdit):
    """Notes a column of each call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.context, self.seen = call, []

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(self.context.batch["user"].tolist())
        return call


class Asked(Plugin):
    """Soft tokens, and a column of the batch that each of the calls must bring."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("user")
        model.prompt(Rows(model.hidden_size))
        self.watch = Watch(model.call)
        model.around(self.watch)


def test_beside_soft_tokens_and_columns_of_other_plugins() -> None:
    plugin = Asked()
    stack = build("llama", plugin)
    batch = batch_of(stack) | {"user": torch.tensor([4, 5, 6])}
    assert float(stack.train_step(batch)) == pytest.approx(math.log(2), abs=1e-5)
    scored = [user for user in (4, 5, 6) for _ in range(1 + 3)]
    *seen, before, after = plugin.watch.seen
    assert before == after == scored
    assert seen  # while drawing, a token a call
    assert all(users == [user for user in (4, 5, 6) for _ in range(3)] for users in seen)
    with pytest.raises(PeftxError, match="no plugin reads a column 'speaker'"):
        stack.train_step(batch | {"speaker": torch.tensor([4, 5, 6])})


def test_terms_of_other_plugins_read_the_labels_of_its_answers() -> None:
    class Reads(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            loss = yield
            seen.append((step.batch["labels"] != IGNORE).any(1).tolist())
            return loss

    seen: list[list[bool]] = []
    stack = build("llama", Reads())
    stack.train_step(batch_of(stack))
    assert seen == [[True] * len(ROWS) * 4]


def test_forward_passes_alone_train_on_it_too() -> None:
    stack = build("llama", Mezo(eps=1e-2))
    report = stack.train(ROWS, steps=2, batch_size=3, learning_rate=1e-2, max_length=64)
    assert all(math.isfinite(loss) for _, loss in report.losses)


@pytest.mark.parametrize("arch", ["bert", "t5", "vit", "whisper"])
def test_models_that_do_not_go_on_with_a_text(arch: str) -> None:
    with pytest.raises(
        ArchitectureError, match=f"d2o: {type(tiny(arch)).__name__} is no decoder that writes text"
    ):
        Stack(tiny(arch), [D2o()], tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"alpha": 0}, {"beta": -1}, {"reference": "end"}, {"temperature": 0}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"D2o: {next(iter(options))}"):
        D2o(**options)


def test_cross_entropy_is_what_log_probs_sum() -> None:
    """The loss that a model gives is their mean with the other sign."""
    stack = build()
    batch = batch_of(stack)
    with torch.no_grad():
        logits = stack.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    count = int((batch["labels"] != IGNORE).sum())
    mean = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(-log_probs(logits, batch["labels"]).sum() / count, mean)
