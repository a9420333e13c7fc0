from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import peftx
from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.errors import ArchitectureError, BatchError, ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.decoding.text import AS_IT_IS, DRAWN, written
from peftx_ircoco import (
    Evaluator,
    Ircoco,
    IrcocoConfig,
    bleu,
    edit,
    ends,
    parts,
    reinforced,
)
from peftx_lora import Lora
from peftx_sparselora import Sparselora

test_conformance = conformance("ircoco")

ROWS = [{"prompt": f"x{n} = {n} +", "completion": f" {n}"} for n in range(8)]
SMALL: dict[str, Any] = {
    "ahead": 3,
    "max_new_tokens": 4,
    "window": 32,
    "width": 8,
    "layers": 1,
    "heads": 2,
}
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.01}
END = 1


def stack_of(*beside: Plugin, arch: str = "llama", **options: Any) -> tuple[Stack, Ircoco]:
    plugin = Ircoco(**SMALL | {"sft": 2, "evaluator": 2} | options)
    stack = Stack(tiny(arch), [*beside, plugin], tokenizer=tiny_tokenizer())
    return stack, plugin


def evaluator(**options: Any) -> Evaluator:
    torch.manual_seed(0)
    return Evaluator(40, IrcocoConfig(**SMALL | options)).eval()


def batch_of(stack: Stack) -> dict[str, Tensor]:
    """Contexts of 3, 2 and 4 tokens, completions of 2, 1 and 2."""
    ids = torch.tensor([[9, 10, 11, 20, 1, 2], [9, 12, 21, 2, 2, 2], [9, 13, 14, 15, 22, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = ids.clone()
    for row, (begin, end) in enumerate(((3, 5), (2, 3), (4, 6))):
        labels[row, :begin] = labels[row, end:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


CODES = [[9, 10, 11, 20, 1], [9, 12, 21], [9, 13, 14, 15, 22, 1]]
CONTEXTS = [[9, 10, 11], [9, 12], [9, 13, 14, 15]]


def step_in(stack: Stack, phase: str, padding: str = "right") -> TrainStep:
    """A step in the middle of this phase, that has gone back."""
    batch = batch_of(stack)
    if padding == "left":
        order = batch["attention_mask"].argsort(dim=1, stable=True)
        batch = {name: x.gather(1, order) for name, x in batch.items()}
    step = TrainStep(stack, batch, index=5, total=9, memory={"phases": {"ircoco": [[phase, 4, 9]]}})
    stack.model.zero_grad()
    stack.run_train_step(step)
    return step


# -- scores ------------------------------------------------------------------------------------------------------------


def test_bleu_by_hand() -> None:
    assert bleu([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == pytest.approx(1)
    assert bleu([1, 2, 9, 4], [1, 2, 3, 4]) == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25)
    assert bleu([1, 2], [1, 2, 3, 4]) == pytest.approx(math.exp(1 - 4 / 2)), "too short"
    assert bleu([1, 2, 3, 4, 5, 6], [1, 2, 3]) == pytest.approx((4 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25), (
        "too long"
    )
    assert bleu([7, 7, 7], [7, 8, 9]) == pytest.approx((2 / 4 * 1 / 3 * 1 / 2) ** 0.25), "counts are clipped"
    assert bleu([], [1]) == bleu([1], []) == bleu([], []) == 0


def test_edit_similarity_by_hand() -> None:
    assert edit("return x", "return x") == 1
    assert edit("kitten", "sitting") == pytest.approx(8 / 13)
    assert edit("abc", "cba") == pytest.approx(2 / 6)
    assert edit("aab", "ab") == pytest.approx(4 / 5)
    assert edit("", "") == edit("a", "") == edit("", "a") == edit("a", "b") == 0


def test_scores_leave_end_tokens_out() -> None:
    stack, plugin = stack_of()
    y, truth = [[20, 21, END], [END], [20, 30]], [[20, 21], [20], [20, 31, END, 5]]
    assert plugin.scores(stack, y, truth) == pytest.approx([1, 0, (2 / 3 * 1 / 2) ** 0.25])
    stack, plugin = stack_of(score="edit")
    letters = [stack.tokenizer(text).input_ids for text in ("abc", "abd")]
    assert plugin.scores(stack, [[*letters[0], END]], [[*letters[1], END, 5]]) == pytest.approx([4 / 6])


# -- the evaluator -----------------------------------------------------------------------------------------------------


def test_one_pass_gives_the_value_of_every_beginning() -> None:
    V = evaluator()
    text = [5, 6, 7, 8, 9]
    whole, short = V([text, [5, 6]])
    assert [x.shape for x in (whole, short)] == [(5,), (2,)]
    for t in range(1, 6):
        torch.testing.assert_close(whole[t - 1], V([text[:t]])[0][-1])
    torch.testing.assert_close(short, whole[:2], rtol=1e-4, atol=1e-5)
    assert len(set(whole.tolist())) == 5


def test_of_a_long_text_it_reads_the_end() -> None:
    V = evaluator(window=6)
    text = list(range(5, 17))
    torch.testing.assert_close(V([text])[0], V([text[-6:]])[0])


def test_it_is_the_network_of_the_options() -> None:
    V = evaluator(width=12, layers=3, heads=4, window=20)
    config = V.body.config
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.vocab_size) == (
        12,
        3,
        4,
        20,
        40,
    )
    assert V.linear.bias is None
    default = IrcocoConfig()
    assert (default.width, default.layers, default.heads, default.window, default.ahead) == (
        256,
        4,
        4,
        256,
        10,
    )


def test_it_learns_what_a_beginning_tells() -> None:
    """A score that is the share of right tokens so far: the error falls far below the scores' variance."""
    V = evaluator(width=16)
    codes = torch.randint(5, 7, (64, 8), generator=torch.Generator().manual_seed(0))
    s = (codes == 5).float().mean(1)
    optimizer = torch.optim.Adam(V.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (torch.stack([v[-1] for v in V(codes.tolist())]) - s).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * s.var()


def test_its_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of(Lora(rank=2))
    asked: list[Any] = []

    def fake(stack: Stack, x: list[list[int]], new: int, options: dict[str, Any]) -> list[list[int]]:
        assert (new, options) == (3, AS_IT_IS)
        asked.append(x)
        return [[20, 21], [22, 1], [30]]

    monkeypatch.setattr("peftx_ircoco.written", fake)
    stack.model.eval()
    step = step_in(stack, "evaluator")
    gradient = [p.grad for p in plugin.V.parameters()]
    (c,) = asked
    truth = []
    for beginning, code in zip(c, CODES, strict=True):
        assert code[: len(beginning)] == beginning
        assert 0 < len(beginning) < len(code)
        rest = code[len(beginning) :][:3]
        truth.append(rest[: rest.index(1)] if 1 in rest else rest)
    s = torch.tensor([bleu(y, t) for y, t in zip([[20, 21], [22], [30]], truth, strict=True)])
    expected = sum((plugin.V([a])[0][-1] - b).square() for a, b in zip(c, s, strict=True)) / 3
    assert step.losses == {"task": pytest.approx(float(expected.detach()), rel=1e-4)}
    plugin.V.zero_grad()
    expected.backward()
    for p, found in zip(plugin.V.parameters(), gradient, strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in stack.ledger.parameters("lora")), "the actor rests"


def test_places_to_cut_at_are_all_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of()
    cuts: list[int] = []

    def fake(stack: Stack, x: list[list[int]], new: int, options: dict[str, Any]) -> list[list[int]]:
        cuts.extend(map(len, x))
        return [[] for _ in x]

    monkeypatch.setattr("peftx_ircoco.written", fake)
    torch.manual_seed(0)
    plugin.judging(TrainStep(stack, batch_of(stack)), [[5, 6, 7, 8]] * 300 + [[5]], {})
    assert all(80 < cuts[:-1].count(n) < 120 for n in (1, 2, 3))
    assert cuts[-1] == 1


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_are_read_as_tokens_come() -> None:
    stack, plugin = stack_of()
    plugin.V.eval()
    x, y = [[5, 6], [7, 8, 9], [7]], [[10, 11, 12], [10, END], [END]]
    found = plugin.rewards(stack, x, y)

    def V(text: list[int]) -> float:
        return float(plugin.V([text])[0][-1].detach())

    assert found[0].tolist() == pytest.approx(
        [V([5, 6, 10]), V([5, 6, 10, 11]), V([5, 6, 10, 11, 12])], abs=1e-5
    )
    assert found[1].tolist() == pytest.approx([V([7, 8, 9, 10])] * 2, abs=1e-5), "the end has the last one"
    assert found[2].tolist() == pytest.approx([V([7])], abs=1e-5)
    long = plugin.rewards(stack, [list(range(5, 45))], [[10, 11]])[0]
    assert long.tolist() == pytest.approx(
        [V([*range(5, 45), 10][-31:]), V([*range(5, 45), 10, 11])], abs=1e-2
    )


def test_the_loss_of_drawn_tokens_by_hand() -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, -100, -100]])
    r = torch.tensor([[0.0, 0.0, 0.5, 2.0], [0.0, -1.0, 0.0, 0.0]])
    p = logits.log_softmax(-1)
    expected = -(0.5 * p[0, 1, 3] + 2 * p[0, 2, 4] - p[1, 0, 5]) / 3
    torch.testing.assert_close(reinforced(logits, labels, r), expected)
    ce = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(reinforced(logits, labels, torch.ones(2, 4)), ce)
    (gradient,) = torch.autograd.grad(reinforced(logits, labels, r), logits)
    (scaled,) = torch.autograd.grad(reinforced(logits, labels, 3 * r), logits)
    torch.testing.assert_close(scaled, 3 * gradient)
    (none,) = torch.autograd.grad(reinforced(logits, labels, 0 * r), logits)
    assert not none.any()


Y = [[30, 31, 1], [32], [1]]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_step_of_the_actor_by_hand(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of(Lora(rank=2), weight=0.7)

    def fake(stack: Stack, x: list[list[int]], new: int, options: dict[str, Any]) -> list[list[int]]:
        assert (x, new, options) == (CONTEXTS, 4, DRAWN)
        return Y

    monkeypatch.setattr("peftx_ircoco.written", fake)
    stack.model.eval()
    step = step_in(stack, "rl", padding)
    gradient = [p.grad.clone() for p in stack.ledger.parameters("lora")]
    assert all(p.grad is None for p in plugin.V.parameters())
    terms = []
    for x, y, r in zip(CONTEXTS, Y, plugin.rewards(stack, CONTEXTS, Y), strict=True):
        log_p = stack.model(torch.tensor([x + y])).logits[0].log_softmax(-1)
        terms += [-r[t].detach() * log_p[len(x) + t - 1, token] for t, token in enumerate(y)]
    expected = sum(terms) / 5
    task = stack.model(**batch_of(stack)).loss
    assert step.losses["rl"] == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-6)
    assert step.losses["task"] == pytest.approx(float(task.detach()), rel=1e-4)
    stack.model.zero_grad()
    (task + 0.7 * expected).backward()
    for p, found in zip(stack.ledger.parameters("lora"), gradient, strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["weight", "rewards", "sft"])
def test_without_rewards_it_is_fine_tuning(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of(Lora(rank=2), **({"weight": 0} if how == "weight" else {}))
    if how == "rewards":
        monkeypatch.setattr(plugin, "rewards", lambda stack, x, y: [torch.zeros(len(row)) for row in y])
    step_in(stack, "sft" if how == "sft" else "rl")
    plain = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    plain.train_step(batch_of(plain))
    pairs = zip(stack.ledger.parameters("lora"), plain.ledger.parameters("lora"), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_likeliest_and_the_drawn(arch: str) -> None:
    stack, _ = stack_of(arch=arch)
    stack.model.eval()
    with torch.no_grad():
        found = written(stack, CONTEXTS, 3, AS_IT_IS)
        for x, y in zip(CONTEXTS, found, strict=True):
            for t, token in enumerate(y):
                assert int(stack.model(torch.tensor([x + y[:t]])).logits[0, -1].argmax()) == token
        stack.model.get_output_embeddings().weight.mul_(2.5)  # of which some tokens are far likelier
        vars(stack.model.generation_config).update(temperature=3.0, top_k=2, repetition_penalty=2.0)
        p = stack.model(torch.tensor([[9, 10]])).logits[0, -1].softmax(-1)
        torch.manual_seed(0)
        drawn = torch.tensor([y[0] for y in written(stack, [[9, 10]] * 2000, 1, DRAWN)])
    often, order = torch.bincount(drawn, minlength=len(p)) / 2000, p.argsort(descending=True)
    assert 0.1 < p.max() < 0.9
    for likeliest in (order[:1], order[:2], order[:8]):
        share = p[likeliest].sum()
        assert (often[likeliest].sum() - share).abs() < 4 * (share * (1 - share) / 2000).sqrt()


def test_a_text_ends_with_its_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, _ = stack_of()
    stack.model.generation_config.eos_token_id = [50, 60]
    assert ends(stack) == {50, 60}
    monkeypatch.setattr(
        "peftx.toolkits.decoding.generation.Generation.run_default",
        lambda self: torch.cat((self.input_ids, torch.tensor([[7, 50, 60], [60, 7, 7], [7, 8, 9]])), 1),
    )
    assert written(stack, CONTEXTS, 3, AS_IT_IS) == [[7, 50], [60], [7, 8, 9]]


def test_no_more_is_written_than_the_model_reads() -> None:
    stack, _ = stack_of(arch="gpt2")
    room = stack.model.config.n_positions
    with torch.no_grad():
        (y,) = written(stack, [[9] * (room - 2)], 5, AS_IT_IS)
    assert len(y) <= 2


def test_parts_of_a_batch() -> None:
    stack, _ = stack_of()
    step = TrainStep(stack, batch_of(stack) | {"style": torch.tensor([1, 2, 3])})
    codes, x, others = parts(step)
    assert (codes, x) == (CODES, CONTEXTS)
    assert [*others] == ["style"]
    step.batch["labels"] = step.batch["input_ids"].clone()
    assert parts(step)[1] == [[stack.tokenizer.bos_token_id]] * 3, "without a prompt"
    del step.batch["labels"]
    with pytest.raises(BatchError, match="ircoco: the batch has no labels"):
        parts(step)


# -- runs --------------------------------------------------------------------------------------------------------------


class Watch(Plugin):
    """Notes all that trains before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        named = step.model.named_parameters()
        self.seen.append({name: p.detach().clone() for name, p in named if p.requires_grad})
        return (yield)


def test_each_phase_trains_its_own() -> None:
    watch, phases = Watch(), []
    plugin = Ircoco(**SMALL, sft=2, evaluator=2)
    stack = Stack(tiny("llama"), [Lora(rank=2), plugin, watch], tokenizer=tiny_tokenizer())
    report = stack.train(
        ROWS, steps=7, weight_decay=0.1, progress=lambda *told: phases.append(told[2]["ircoco"]), **RUN
    )
    assert phases == ["sft"] * 2 + ["evaluator"] * 2 + ["rl"] * 3
    assert set(report.terms) == {"task", "rl"}
    V = {name for name in watch.seen[0] if "evaluator" in name}
    moved = [
        {name for name in one if not torch.equal(one[name], two[name])}
        for one, two in zip(watch.seen, watch.seen[1:], strict=False)
    ]
    lora = watch.seen[0].keys() - V
    assert V
    assert lora
    assert all(found and found <= lora for found in (*moved[:2], *moved[4:]))
    assert moved[1] == moved[5] == lora
    assert all(found and found <= V for found in moved[2:4])
    assert plugin.state == {"evaluated": True}


def test_each_phase_begins_with_an_optimizer_that_is_empty() -> None:
    stack, plugin = stack_of(Lora(rank=2))
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer, counts = torch.optim.AdamW(parameters, lr=0.01), []
    lora, own = next(iter(stack.ledger.parameters("lora"))), next(plugin.V.parameters())
    for _ in range(6):
        stack.train_step(batch_of(stack), optimizer=optimizer)
        counts.append([int(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0 for p in (lora, own)])
    assert counts == [[1, 0], [2, 0], [0, 1], [0, 2], [1, 0], [2, 0]]


def test_a_bundle_goes_on_with_its_evaluator(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2), Ircoco(**SMALL, sft=1, evaluator=1)])
    stack.train(ROWS, steps=3, **RUN)
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b")
    plugin, before = again.plugins["ircoco"], stack.plugins["ircoco"].V.eval()
    assert [phase.name for phase in plugin.phases()] == ["rl"]
    assert torch.equal(plugin.V.eval()([[5, 6, 7]])[0], before([[5, 6, 7]])[0])
    assert set(again.train(ROWS, steps=1, **RUN).terms) == {"task", "rl"}


def test_what_is_drawn_is_called_with_its_labels() -> None:
    """Which plugins read that tell context from answers, and refuse labels of other tokens."""
    stack, _ = stack_of(Sparselora(**Sparselora.example), sft=0, evaluator=1)
    assert "rl" in stack.train(ROWS, steps=3, **RUN).terms


def test_completions_are_measured() -> None:
    stack, _ = stack_of(max_new_tokens=5)
    y = stack.generate("ab", max_new_tokens=5, do_sample=False)
    rows = [{"prompt": "ab", "completion": y}, {"prompt": "ab", "completion": y + "!" * len(y)}]
    scores = stack.evaluate(rows, metrics=["ircoco"])
    assert scores["completion/exact"].value == 0.5
    assert scores["completion/edit"].value == pytest.approx(
        (1 + edit(y.strip(), rows[1]["completion"].strip())) / 2
    )
    assert 0.5 < scores["completion/edit"].value < 1
    assert scores["completion/edit"].count == scores["completion/exact"].count == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_phases_of_a_run() -> None:
    assert [(phase.name, phase.share) for phase in Ircoco().phases()] == [
        ("sft", 0.4), ("evaluator", 0.3), ("rl", None)
    ]  # fmt: skip
    assert [phase.name for phase in Ircoco(sft=0).phases()] == ["evaluator", "rl"]


class Marks(Plugin):
    @hookimpl
    def inject(self, model: peftx.ModelView) -> None:
        model.vocabulary([f"<{n}>" for n in range(80)])


def test_tokens_of_a_later_plugin_are_refused() -> None:
    with pytest.raises(ConflictError, match="does not know the tokens that a later plugin adds"):
        Stack(tiny("llama"), [Ircoco(**SMALL), Marks()], tokenizer=tiny_tokenizer())
    stack = Stack(tiny("llama"), [Marks(), Ircoco(**SMALL, sft=0, evaluator=1)], tokenizer=tiny_tokenizer())
    rows = [{"prompt": "<0> <79>", "completion": "<79>"}] * 4
    assert stack.train(rows, steps=2, **RUN).terms["rl"] != 0


@pytest.mark.parametrize("arch", ["bert", "t5", "vit"])
def test_models_that_do_not_go_on_are_refused(arch: str) -> None:
    with pytest.raises(ArchitectureError, match="is no decoder that writes text"):
        stack_of(arch=arch)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 64}, "more than max_new_tokens"),
        ({"width": 6}, "multiple of heads"),
        ({"ahead": 0}, "ahead"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PeftxError, match=said):
        Ircoco(**options)
