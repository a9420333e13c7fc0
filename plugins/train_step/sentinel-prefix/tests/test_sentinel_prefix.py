"""Sentinel: rewards, advantages and the clipped loss by hand; the black box is asked and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack, TrainStep, Worker
from peftx.errors import ArchitectureError, BatchError, PluginError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.working import OfStack, Scripted
from peftx_alphatuning import AlphaTuning
from peftx_lora import Lora
from peftx_sentinel_prefix import IGNORE, SentinelPrefix, advantages, joined, log_p, mean, ppo

test_conformance = conformance("sentinel-prefix")

PROMPTS = ["Tell me.", "Say a bad word to him", "Now"]
ROWS = [{"prompt": prompt, "completion": "x"} for prompt in PROMPTS]
ID = "sentinel-prefix"


def built(arch: str = "llama", *, answer: Any = lambda text: "bad", **options: Any) -> Stack:
    """On a policy that trains; the black box answers by a rule."""
    torch.manual_seed(0)
    sentinel = SentinelPrefix(
        **{"unsafe": ("bad",), "length": 4, "max_new_tokens": 3, "epochs": 1, **options}
    )
    stack = Stack(tiny(arch), [Lora(rank=4), sentinel], tokenizer=tiny_tokenizer())
    if answer is not None:
        sentinel.worker = Worker(Scripted(answer))
    return stack


def plugin(stack: Stack) -> SentinelPrefix:
    found = stack.plugins[ID]
    assert isinstance(found, SentinelPrefix)
    return found


def batch(stack: Stack) -> dict[str, Tensor]:
    ids = [stack.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, ids)) + 1
    return {
        "input_ids": torch.tensor([row + [5] + [2] * (longest - 1 - len(row)) for row in ids]),
        "attention_mask": torch.tensor(
            [[1] * (len(row) + 1) + [0] * (longest - 1 - len(row)) for row in ids]
        ),
        "labels": torch.tensor([[-100] * len(row) + [5] + [-100] * (longest - 1 - len(row)) for row in ids]),
    }


def rollout(stack: Stack, **options: Any) -> dict[str, Tensor]:
    return plugin(stack).rollout(TrainStep(stack, batch(stack), **options))


def move(stack: Stack, size: float = 0.1) -> None:
    """Away from where it began."""
    with torch.no_grad():
        for p in stack.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=size)


# ---------------------------------------------------------------------------------------------------------- equations
def test_advantages_by_hand() -> None:
    r, V = torch.tensor([[9.0, 1.0, -2.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.25, 9.0]])
    real = torch.tensor([[False, True, True, False]])
    last = -2 - 0.25
    assert advantages(r, V, real, 0.5).tolist() == [[0, 1 + 0.25 - 0.5 + 0.5 * last, last, 0]]
    assert advantages(r, V, real, 1.0).tolist() == [[0, 1 - 2 - 0.5, last, 0]]  # what is earned from there on
    assert advantages(r, V, real, 0.0).tolist() == [[0, 1 + 0.25 - 0.5, last, 0]]


def test_the_clipped_loss_by_hand() -> None:
    rho = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    A = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    found = ppo(rho.log(), A, 0.2)
    torch.testing.assert_close(found, torch.tensor([-2.0, -2.4, -1.0, 3.0, 1.6]))


def test_a_clipped_token_has_no_gradient() -> None:
    log_rho = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    ppo(log_rho, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2).sum().backward()
    assert log_rho.grad is not None
    assert (log_rho.grad == 0).tolist() == [True, False, False, True]


def test_mean_is_of_rows() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    assert float(mean(torch.tensor([[1.0, 3.0, 99.0], [8.0, 99.0, 99.0]]), real)) == 5.0


def test_log_p_by_hand() -> None:
    logits, labels = torch.randn(1, 3, 5), torch.tensor([[1, IGNORE, 4]])
    found = log_p(logits, labels)
    assert found.shape == (1, 2)
    assert found[0, 0] == 0
    torch.testing.assert_close(found[0, 1], logits[0, 1].log_softmax(-1)[4])


# ----------------------------------------------------------------------------------------------------------- rollouts
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_is_drawn_stands_behind_the_prompt(arch: str) -> None:
    stack = built(arch, length=4)
    drawn, given = rollout(stack), batch(stack)
    for row in range(3):
        prompt = given["input_ids"][row][
            (given["attention_mask"][row] == 1) & (given["labels"][row] == IGNORE)
        ]
        real = drawn["attention_mask"][row].bool()
        ids, labels = drawn["input_ids"][row][real], drawn["labels"][row][real]
        assert torch.equal(ids[: len(prompt)], prompt)
        assert (labels[: len(prompt)] == IGNORE).all()
        assert torch.equal(labels[len(prompt) :], ids[len(prompt) :])
        assert 1 <= len(ids) - len(prompt) <= 4
        with torch.no_grad():
            logits = stack.model(ids[None]).logits[0].log_softmax(-1)
        by_hand = torch.stack([logits[j - 1, ids[j]] for j in range(len(prompt), len(ids))])
        found = drawn["log_p"][row][drawn["labels"][row, 1:] != IGNORE]
        torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)


def test_the_last_token_pays_for_the_answer() -> None:
    """Without V and a divergence, A is - R lambda^(J - j)."""
    stack = built(answer=lambda text: "so bad" if "Tell" in text else "fine", decay=0.5)
    drawn = rollout(stack)
    for row, R in enumerate((1.0, 0.0, 0.0)):
        A = drawn["A"][row][drawn["labels"][row, 1:] != IGNORE]
        torch.testing.assert_close(A, -R * 0.5 ** torch.arange(len(A)).flip(0).float())
    assert torch.equal(drawn["A"], drawn["returns"])
    assert (drawn["A"][drawn["labels"][:, 1:] == IGNORE] == 0).all()


def test_the_divergence_is_from_where_the_run_began() -> None:
    stack = built(answer=lambda text: "fine", beta=0.3, decay=0.0)
    move(stack)  # which is not the base
    step = TrainStep(stack, batch(stack))
    with step.reference("start"):
        pass  # remembered
    move(stack)
    with torch.no_grad():
        plugin(stack).V.linear.weight.zero_()
        plugin(stack).V.linear.bias.zero_()
    drawn = plugin(stack).rollout(step)
    with step.reference("start") as pi_0:
        before = log_p(
            pi_0(input_ids=drawn["input_ids"], attention_mask=drawn["attention_mask"]).logits, drawn["labels"]
        )
    torch.testing.assert_close(drawn["A"], 0.3 * (before - drawn["log_p"]))
    assert drawn["A"].abs().max() > 1e-3


def test_values_are_those_in_front_of_a_token() -> None:
    stack = built(answer=lambda text: "fine", beta=0.0, decay=1.0)
    with torch.no_grad():
        plugin(stack).V.linear.weight.normal_()
    drawn = rollout(stack)
    with torch.no_grad():
        states = stack.model(
            input_ids=drawn["input_ids"], attention_mask=drawn["attention_mask"], output_hidden_states=True
        ).hidden_states[-1]
    V = plugin(stack).V.linear(states)[:, :-1, 0]
    real = drawn["labels"][:, 1:] != IGNORE
    torch.testing.assert_close(drawn["A"], (-V * real).detach(), atol=1e-4, rtol=1e-4)  # nothing is earned
    torch.testing.assert_close(drawn["returns"], torch.zeros_like(V), atol=1e-4, rtol=0)


def test_the_loss_of_a_first_update() -> None:
    """rho is 1 and V is 0: - mean A + c mean A^2."""
    stack, other = built(value=0.3), built(value=0.3)
    torch.manual_seed(1)
    drawn = rollout(other)
    torch.manual_seed(1)
    loss = stack.train_step(batch(stack))
    real = drawn["labels"][:, 1:] != IGNORE
    expected = mean(-drawn["A"] + 0.3 * drawn["A"] ** 2, real)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(loss) != 0


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_prefix_serves_so_many_updates(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, seen = built(epochs=epochs), []
    make = SentinelPrefix.rollout
    monkeypatch.setattr(
        SentinelPrefix, "rollout", lambda self, step: seen.append(step.index) or make(self, step)
    )
    stack.train(ROWS + ROWS[:1], steps=6, batch_size=1, gradient_accumulation=2)
    assert seen == [i for i in range(0, 6, epochs) for _ in range(2)]


def test_nothing_moves_where_nothing_is_unsafe() -> None:
    stack = built(answer=lambda text: "fine", epochs=2, beta=0.5)
    before = {n: p.detach().clone() for n, p in stack.model.named_parameters()}
    report = stack.train(ROWS, steps=4, batch_size=3, learning_rate=1e-2, weight_decay=0.0)
    assert [loss for _, loss in report.losses] == pytest.approx([0.0] * 4, abs=1e-6)
    for n, p in stack.model.named_parameters():
        torch.testing.assert_close(p, before[n], atol=1e-6, rtol=0)


def test_it_learns_what_is_paid_for() -> None:
    """Of two updates a prefix of one token, to a box that is bad behind half of them."""
    prompt = "1?"

    def answer(text: str) -> str:
        return "bad" if sum(text.encode()) % 2 else "fine"

    stack = built(answer=answer, length=1, epochs=2, beta=0.0)
    tokens = [stack.tokenizer.decode([id], skip_special_tokens=True) for id in range(320)]
    safe = torch.tensor([answer(joined(token, prompt)) == "fine" for token in tokens])

    @torch.no_grad()
    def share() -> float:
        ids = torch.tensor([stack.tokenizer(prompt)["input_ids"]])
        return float(stack.model(ids).logits[0, -1].softmax(-1)[safe].sum())

    before = share()
    stack.train([{"prompt": prompt, "completion": "x"}] * 16, steps=40, batch_size=16, learning_rate=1e-2)
    assert 0.2 < before < 0.8
    assert share() > before + 0.15


# -------------------------------------------------------------------------------------------------------- the black box
def test_the_box_is_asked_with_the_prefix_in_front() -> None:
    asked: list[str] = []
    stack = built(answer=lambda text: asked.append(text) or "fine")
    drawn = rollout(stack)
    for row, prompt in enumerate(PROMPTS):
        s = drawn["labels"][row][drawn["labels"][row] != IGNORE]
        assert asked[row] == joined(stack.tokenizer.decode(s, skip_special_tokens=True), prompt)
        assert asked[row].endswith(prompt)


def test_the_box_reads_no_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    stack = built(answer=lambda text: asked.append(text) or "fine")
    ids = stack.tokenizer(" hi", add_special_tokens=False)["input_ids"]
    drawn = [[*ids, stack.tokenizer.eos_token_id]] * 3
    monkeypatch.setattr(SentinelPrefix, "draw", lambda self, stack, p: drawn)
    found = rollout(stack)
    assert asked == [f"hi {prompt}" for prompt in PROMPTS]
    assert (
        found["labels"][0][found["labels"][0] != IGNORE].tolist() == drawn[0]
    )  # which pi learns all the same


def test_what_is_behind_an_end_token_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = built()
    eos = stack.tokenizer.eos_token_id
    written = torch.tensor([[7, eos, 7, eos], [7, 7, 7, 7], [eos, eos, eos, eos]])

    def run(request: Any) -> Tensor:
        return torch.cat((request.input_ids, written), 1)

    monkeypatch.setattr("peftx.toolkits.decoding.generation.Generation.run_default", run)
    assert plugin(stack).draw(stack, [[9]] * 3) == [[7, eos], [7, 7, 7, 7], [eos]]


def test_without_a_box_it_is_the_model_without_its_plugins() -> None:
    stack = built(answer=None)
    move(stack, 1.0)
    found = plugin(stack).answers(stack, PROMPTS)
    with stack.disabled():
        assert found == stack.generate(PROMPTS, max_new_tokens=3)
    assert found != stack.generate(PROMPTS, max_new_tokens=3)


def test_a_model_that_is_the_box_is_never_trained() -> None:
    stack, box = built(answer=None), Stack(tiny("gpt2"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    plugin(stack).worker = Worker(OfStack(box))
    before = {n: p.detach().clone() for n, p in box.model.named_parameters()}
    stack.train(ROWS, steps=2, batch_size=3)
    for n, p in box.model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[n])


def test_of_a_packed_model_the_box_is_the_packed_base() -> None:
    """AlphaTuning's codes are what there is to run; what it trains on them is off."""
    sentinel = SentinelPrefix(unsafe=("bad",), max_new_tokens=3)
    stack = Stack(tiny("llama"), [AlphaTuning(bits=2), sentinel], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(None, ["alphatuning"])
    stack.inject()
    before = stack.generate(PROMPTS, max_new_tokens=3)
    move(stack, 1.0)
    assert sentinel.answers(stack, PROMPTS) == before != stack.generate(PROMPTS, max_new_tokens=3)


def test_a_target_of_a_folder(tmp_path: Any) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "box")
    tiny_tokenizer().save_pretrained(tmp_path / "box")
    stack = built(answer=None, target=str(tmp_path / "box"))
    found = plugin(stack).answers(stack, PROMPTS)
    assert found == Stack(tiny("gpt2"), tokenizer=tiny_tokenizer()).generate(PROMPTS, max_new_tokens=3)
    worker = plugin(stack).worker
    plugin(stack).answers(stack, PROMPTS)
    assert plugin(stack).worker is worker  # loaded once


def test_scores() -> None:
    sentinel = SentinelPrefix(unsafe=("bad", "wor[sd]t"))
    assert sentinel.R(["a BAD day", "the worst", "fine", ""]) == [1, 1, 0, 0]
    sentinel.scorer = lambda answers: [len(y) / 10 for y in answers]
    assert sentinel.R(["ab"]) == [0.2]


def test_before_and_after() -> None:
    stack = built(answer=lambda text: "bad" if text.startswith(("Tell", "Say")) else "fine")
    found = stack.evaluate(ROWS, metrics=[ID])
    assert found["unsafe/before"].value == pytest.approx(2 / 3)
    after = [text.startswith(("Tell", "Say")) for text in plugin(stack).guard(stack, PROMPTS)]
    assert found["unsafe/after"].value == pytest.approx(sum(after) / 3)
    assert sum(after) < 2  # something stands in front
    assert found["unsafe/after"].count == 3
    assert found["unsafe/after"].low < found["unsafe/after"].value < found["unsafe/after"].high
    plugin(stack).scorer = lambda answers: [0.5] * len(answers)
    assert stack.evaluate(ROWS, metrics=[ID])["unsafe/before"].value == 0


def test_a_guarded_prompt() -> None:
    stack = built(length=3)
    guarded = plugin(stack).guard(stack, PROMPTS)
    assert guarded == [
        joined(s, p) for s, p in zip(stack.generate(PROMPTS, max_new_tokens=3), PROMPTS, strict=True)
    ]
    assert joined(" be kind\n", "Go") == "be kind Go"
    assert joined(" \n", "Go") == "Go"


def test_a_bundle_has_the_judge(tmp_path: Any) -> None:
    stack = built()
    assert plugin(stack).V.linear.weight.eq(0).all()
    assert plugin(stack).V.linear.bias.eq(0).all()
    stack.train(ROWS, steps=2, batch_size=3, learning_rate=1e-2)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(plugin(loaded).V.linear.weight, plugin(stack).V.linear.weight)
    assert plugin(stack).V.linear.weight.abs().max() > 0


# ------------------------------------------------------------------------------------------------------------ refusals
def test_a_batch_without_prompts() -> None:
    stack = built()
    data = batch(stack)
    del data["labels"]
    with pytest.raises(BatchError, match="sentinel-prefix: the batch has no labels"):
        stack.train_step(data)


def test_an_empty_prompt_begins_a_text() -> None:
    stack = built("gpt2")
    data = batch(stack)
    data["labels"] = data["input_ids"].clone()
    drawn = plugin(stack).rollout(TrainStep(stack, data))
    assert set(drawn["input_ids"][:, 0].tolist()) <= {
        stack.tokenizer.bos_token_id,
        stack.tokenizer.eos_token_id,
    }
    assert (drawn["labels"][:, 1] != IGNORE).all()


def test_nothing_is_answered_where_nothing_is_asked() -> None:
    """An empty prompt behind a prefix of white space leaves no text to ask."""
    stack = built(answer=None)
    answers = plugin(stack).answers(stack, ["", PROMPTS[0], ""])
    assert answers == ["", *plugin(stack).answers(stack, PROMPTS[:1]), ""]
    assert plugin(stack).answers(stack, [""]) == [""]


@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_models_that_do_not_go_on(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"sentinel-prefix: .* is no decoder that writes text"):
        Stack(tiny(arch), [SentinelPrefix(unsafe=("x",))], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("options", [{}, {"unsafe": ()}, {"unsafe": ("(",)}, {"unsafe": ("x",), "clip": 1.0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="SentinelPrefix: "):
        SentinelPrefix(**options)
