from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

import peftx
from peftx import Claim, Plugin, Stack, TrainStep, companion, hookimpl
from peftx.errors import ConflictError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_ls_llama import LsLlama
from peftx_p_tuning_v2 import PTuningV2
from peftx_panda import IGNORE, OWN, Panda, answers, similarity, state, task_embeddings
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("panda")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.1}


def prompt_stack(*plugins: Any, arch: str = "llama", seed: int = 0, model: Any = None) -> Stack:
    model = model if model is not None else tiny(arch)
    return Stack(model, [PromptTuning(length=3), *plugins], tokenizer=tiny_tokenizer(), seed=seed)


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> dict[str, PreTrainedModel]:
    """Models that stand for bundles of these names."""
    known: dict[str, PreTrainedModel] = {}
    monkeypatch.setattr("peftx_panda.companion", lambda stack, source: companion(stack, known[source]))
    return known


def batch_of(stack: Stack, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, padding="left", seed=seed)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    labels[:, :2] = IGNORE
    return inputs | {"labels": labels}


def gradient(stack: Stack, batch: dict[str, Tensor]) -> Tensor:
    (p,) = stack.ledger.parameters("prompt-tuning")
    p.grad = None
    stack.train_step(batch)
    return p.grad.clone()


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_labels() -> None:
    llama, t5, bert = tiny("llama"), tiny("t5"), tiny("bert")
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[7, IGNORE, 3, 3], [1, 2, IGNORE, IGNORE]])
    torch.testing.assert_close(answers(llama, logits, labels), logits[[0, 0, 1], [1, 2, 0]])
    for model in (t5, bert):
        torch.testing.assert_close(answers(model, logits, labels), logits[[0, 0, 0, 1, 1], [0, 2, 3, 0, 1]])
    classes = torch.randn(3, 2)
    assert answers(llama, classes.bfloat16(), torch.tensor([0, 1, 1])).dtype == torch.float32
    torch.testing.assert_close(answers(llama, classes, torch.tensor([0, 1, 1])), classes)
    torch.testing.assert_close(answers(llama, classes[:, :1], torch.randn(3, 1)), classes[:, :1])


@pytest.mark.parametrize("by_rows", [True, False])
def test_the_loss_by_hand(teachers: dict[str, PreTrainedModel], by_rows: bool) -> None:
    """CE + lambda mean (z_S - z_T)^2 / N, and its gradient."""
    teachers["s"] = prompt_stack(seed=1).model
    stack = prompt_stack(Panda(source="s", weight=3.0, by_rows=by_rows))
    batch, (p,) = batch_of(stack), stack.ledger.parameters("prompt-tuning")
    found, total = gradient(stack, batch), float(stack.train_step(batch))
    p.grad = None
    out = stack.model.eval()(**batch)
    with torch.no_grad():
        z_T = teachers["s"](**batch).logits
    kept = batch["labels"][:, 1:] != IGNORE
    term = (out.logits[:, :-1] - z_T[:, :-1])[kept].square().mean() / (len(kept) if by_rows else 1)
    loss = out.loss + 3.0 * term
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6)


class Anew(Plugin):
    """Trains on other texts than the batch's."""

    claims = {Claim.REPLACES_LOSS}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch = batch_of(step.stack, seed=7) | {"labels": step.batch["labels"]}
        step.batch = {name: x[:, :5] for name, x in step.batch.items()}

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward()
            return outputs.loss, outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)


def test_the_teacher_reads_what_a_later_plugin_drew(teachers: dict[str, PreTrainedModel]) -> None:
    teachers["s"] = prompt_stack(seed=1).model
    first, behind = (prompt_stack(*order()) for order in (
        lambda: (Panda(source="s", weight=3.0), Anew()), lambda: (Anew(), Panda(source="s", weight=3.0))
    ))  # fmt: skip
    batch = batch_of(first)
    assert torch.equal(gradient(first, batch), gradient(behind, batch))


def test_the_model_as_it_was_teaches_between_the_passes() -> None:
    """Its prompt stands in the new one's place while the new one's graph waits for the backward pass."""
    stack = prompt_stack(Panda(weight=3.0))
    batch, (p,) = batch_of(stack), stack.ledger.parameters("prompt-tuning")
    with torch.no_grad():
        z_T = stack.model.eval()(**batch).logits
    stack.model.train()
    memory: dict[str, Any] = {}
    for index in range(2):
        p.grad = None
        stack.run_train_step(TrainStep(stack, batch, index=index, total=2, memory=memory))
        found = p.grad.clone()
        p.grad = None
        out = stack.model(**batch)
        kept = batch["labels"][:, 1:] != IGNORE
        term = (out.logits[:, :-1] - z_T[:, :-1])[kept].square().mean() / len(kept)
        (out.loss + 3.0 * term).backward()
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            p.add_(0.5)


def test_without_weight_it_is_prompt_tuning(teachers: dict[str, PreTrainedModel]) -> None:
    teachers["s"] = prompt_stack(seed=1).model
    plain = prompt_stack()
    batch = batch_of(plain)
    expected = gradient(plain, batch)
    assert torch.equal(gradient(prompt_stack(Panda(source="s", weight=0)), batch), expected)
    assert not torch.equal(gradient(prompt_stack(Panda(source="s", weight=1.0)), batch), expected)


def test_the_teacher_and_the_model_stay(teachers: dict[str, PreTrainedModel]) -> None:
    teachers["s"] = prompt_stack(seed=1).model
    stack = prompt_stack(Panda(source="s", weight=1.0))
    (p,) = stack.ledger.parameters("prompt-tuning")
    frozen = [(q, q.clone()) for q in (*teachers["s"].parameters(), *stack.model.parameters()) if q is not p]
    before = p.detach().clone()
    stack.train(ROWS, steps=2, weight_decay=0.1, **RUN)
    assert all(torch.equal(q, old) and q.grad is None for q, old in frozen)
    assert not torch.equal(p, before)
    assert stack.trainable_parameters() == p.numel()


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_a_student_under_the_teachers_prompt_has_nothing_to_learn_of_it(arch: str) -> None:
    rows = ROWS if arch != "bert" else [{"text": "one and two"}] * 4
    stack = prompt_stack(Panda(weight=1.0), arch=arch)  # `own`: as the run found it
    if arch == "bert":
        batch = example_inputs(stack.model) | {"labels": example_inputs(stack.model)["input_ids"]}
        plain = gradient(prompt_stack(arch=arch), batch)
        torch.testing.assert_close(gradient(stack, batch), plain, rtol=1e-5, atol=1e-7)
        return
    seen = stack.train(rows, steps=1, **RUN).terms["distillation"]
    assert seen == 0
    assert stack.train(rows, steps=2, **RUN).terms["distillation"] > 0, "of the second step"


def test_it_holds_to_the_start_with_a_large_weight() -> None:
    moved = []
    for weight in (0.0, 1e3):
        stack = prompt_stack(Panda(weight=weight, by_rows=False))
        batch = batch_of(stack)
        with torch.no_grad():
            before = stack.model.eval()(**batch).logits
        stack.train(ROWS, steps=4, batch_size=8, learning_rate=0.01)
        with torch.no_grad():
            moved.append(float((stack.model.eval()(**batch).logits - before).norm()))
    assert moved[1] < moved[0]


@pytest.mark.parametrize("by_rows", [True, False])
def test_cutting_a_step_changes_nothing(teachers: dict[str, PreTrainedModel], by_rows: bool) -> None:
    teachers["s"] = prompt_stack(seed=1).model
    rows = [{"prompt": "a", "completion": "b" * (1 + n * n % 7)} for n in range(8)]
    found = []
    for size, cuts in ((8, 1), (2, 4)):
        stack = prompt_stack(Panda(source="s", weight=50.0, by_rows=by_rows))
        stack.train(rows, steps=2, batch_size=size, gradient_accumulation=cuts, learning_rate=0.1)
        found.append(next(iter(stack.ledger.parameters("prompt-tuning"))).detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_prefixes_of_each_layer_and_classes_do_as_well(teachers: dict[str, PreTrainedModel]) -> None:
    """The paper's setting: P-tuning v2 on a classifier."""

    def model(classes: int) -> PreTrainedModel:
        torch.manual_seed(0)
        config = tiny("bert").config.to_dict() | {"num_labels": classes}
        return AutoModelForSequenceClassification.from_config(BertConfig(**config))  # fmt: skip

    def stack_of(*plugins: Any, classes: int = 2, seed: int = 0) -> Stack:
        prefix = PTuningV2(length=2, dropout=0, head=True)
        return Stack(model(classes), [prefix, *plugins], tokenizer=tiny_tokenizer(), seed=seed)

    teachers["two"], teachers["three"] = stack_of(seed=1).model, stack_of(classes=3, seed=1).model
    inputs = example_inputs(tiny("bert"))
    batch = inputs | {"labels": torch.tensor([0, 1] * 8)[: len(inputs["input_ids"])]}
    stack = stack_of(Panda(source="two", weight=2.0))
    stack.model.eval()
    out = stack.model(**batch)
    with torch.no_grad():
        z_T = teachers["two"](**batch).logits
    expected = out.loss + 2.0 * (out.logits - z_T).square().mean() / len(z_T)
    assert float(stack.train_step(batch)) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(PeftxError, match=r"panda: 'three' gives .*3\) logits, and this model .*2\)"):
        stack_of(Panda(source="three")).train_step(batch)


# -- the similarity ----------------------------------------------------------------------------------------------------


def test_cosine_of_two_tasks() -> None:
    one, two = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-2.0, 1.0, 0.0])
    assert similarity(one, one * 3) == pytest.approx(1)
    assert similarity(one, -one) == pytest.approx(-1)
    assert similarity(one, two) == pytest.approx(0, abs=1e-12)
    assert similarity(one, torch.zeros(3)) == 0


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_a_task_is_what_its_prompt_changes(arch: str) -> None:
    stack, other = prompt_stack(arch=arch), prompt_stack(arch=arch, seed=1)
    batches = [example_inputs(stack.model, padding=p) for p in ("left", "right")]
    own, same, strange = task_embeddings(stack, [stack.model, stack.model, other.model], batches)
    assert similarity(own, same) == pytest.approx(1)
    assert -1 <= similarity(own, strange) < 0.999
    assert own.shape == (32,)
    with stack.disabled():
        expected = [state(stack.model, batch) for batch in batches]
    expected = [state(stack.model, b) - h for b, h in zip(batches, expected, strict=True)]
    torch.testing.assert_close(own, torch.cat(expected).mean(0))
    none = Stack(tiny(arch), [], tokenizer=tiny_tokenizer())
    assert task_embeddings(none, [none.model], batches)[0].abs().max() == 0


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_states_do_not_hang_on_pads_and_soft_tokens_are_left_out(arch: str) -> None:
    model = prompt_stack(arch=arch).model
    inputs = example_inputs(model, padding="left")
    row = int(inputs["attention_mask"].sum(1).argmin())
    kept = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][kept][None]
    together = state(model, inputs)[row]
    alone = state(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    part = model.get_encoder() if arch == "t5" else model
    h = part(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(alone, h[0, -ids.shape[1] :].mean(0).detach(), rtol=1e-4, atol=1e-5)


def opposed(stack: Stack) -> PreTrainedModel:
    """A model whose prompt does the opposite: its e is the negative one."""

    class Opposite(torch.nn.Module):
        config = stack.model.config

        def forward(self, **batch: Any) -> Any:
            out = stack.model(**batch)
            with stack.disabled():
                h = stack.model(**batch).hidden_states[-1]
            out.hidden_states = (2 * h - out.hidden_states[-1],)
            return out

    return Opposite()  # type: ignore[return-value]


def test_an_opposed_task_has_the_similarity_minus_one() -> None:
    stack = prompt_stack()
    one, two = task_embeddings(stack, [stack.model, opposed(stack)], [example_inputs(stack.model)])
    assert similarity(one, two) == pytest.approx(-1, abs=1e-5)


def test_the_weight_follows_the_similarity(
    teachers: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers["s"], teachers["t"] = prompt_stack(seed=1).model, prompt_stack(seed=2).model

    def run(**options: Any) -> Tensor:
        stack = prompt_stack(Panda(source="s", by_rows=False, **options))
        stack.train(ROWS, steps=2, **RUN)
        return next(iter(stack.ledger.parameters("prompt-tuning"))).detach().clone()

    alike = run(weight=0.5, target="s")
    torch.testing.assert_close(alike, run(weight=0.5), rtol=1e-4, atol=1e-5)  # sim is 1
    monkeypatch.setattr("peftx_panda.similarity", lambda one, two: 0.25)
    torch.testing.assert_close(run(weight=2.0, target="t"), run(weight=0.5), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("peftx_panda.similarity", lambda one, two: -0.5)
    assert torch.equal(run(weight=2.0, target="t"), run(weight=0))


def test_the_similarity_is_settled_once(
    teachers: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On so many texts of the run, before its first update."""
    teachers["s"], teachers["t"] = prompt_stack(seed=1).model, prompt_stack(seed=2).model
    asked: list[int] = []

    def measured(stack: Stack, models: Any, batches: Any) -> list[Tensor]:
        asked.append(sum(len(batch["input_ids"]) for batch in batches))
        assert models == [teachers["s"], teachers["t"]]
        return task_embeddings(stack, models, batches)

    monkeypatch.setattr("peftx_panda.task_embeddings", measured)
    prompt_stack(Panda(source="s", target="t", texts=3)).train(ROWS, steps=3, **RUN)
    assert asked == [3]


def test_the_defaults_are_the_releases() -> None:
    assert Panda().config.weight == pytest.approx(0.1 * 0.1)
    assert Panda().config.by_rows
    assert Panda().config.target is None


def test_source_tasks_are_ranked(teachers: dict[str, PreTrainedModel]) -> None:
    """The prompt itself first, then one that was moved a little, then strangers."""
    stack = prompt_stack(Panda(candidates={"far": "far", "near": "near", "same": OWN}))
    (p,) = stack.ledger.parameters("prompt-tuning")
    near = prompt_stack()
    next(iter(near.ledger.parameters("prompt-tuning"))).data.copy_(p.data + 0.05)
    teachers["near"], teachers["far"] = near.model, prompt_stack(seed=5).model
    scores = stack.evaluate(ROWS, metrics=["panda"])
    assert [scores[f"rank/{name}"].value for name in ("same", "near", "far")] == [1, 2, 3]
    assert scores["similarity/same"].value == pytest.approx(1)
    assert 1 > scores["similarity/near"].value > scores["similarity/far"].value >= -1
    assert scores["similarity/far"].count == len(ROWS)
    few = Stack(tiny("llama"), [PromptTuning(length=3), Panda(texts=2)], tokenizer=tiny_tokenizer())
    found = few.evaluate([row["prompt"] for row in ROWS], metrics=["panda"])
    assert set(found) == {"similarity/source", "rank/source"}
    assert found["similarity/source"].count == 2
    with pytest.raises(DataError, match="no text"):
        few.evaluate([{"messages": [{"role": "user", "content": "a"}]}], metrics=["panda"])


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_a_bundle_teaches_and_is_none_of_what_is_saved(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    source = Stack(str(tmp_path / "model"), [PromptTuning(length=3)], seed=1)
    source.train(ROWS, steps=2, **RUN)
    source.save(tmp_path / "s")
    stack = Stack(
        str(tmp_path / "model"), [PromptTuning(length=5), Panda(source=str(tmp_path / "s"), weight=1.0)]
    )
    before = stack.train(ROWS, steps=1, **RUN).terms["distillation"]
    after = stack.train(ROWS, steps=20, **RUN).terms["distillation"]
    assert 0 < after < before
    stack.save(tmp_path / "t")
    again = peftx.load(tmp_path / "t")
    assert sum(p.numel() for p in again.ledger.parameters("prompt-tuning")) == again.trainable_parameters()
    assert not again.companions


def test_heads_of_plugins_are_refused() -> None:
    with pytest.raises(ConflictError, match="reads labels of tokens in its step"):
        Stack(tiny("llama"), [LsLlama(labels=("a", "b")), Panda()], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("options", [{"weight": -1}, {"texts": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Panda(**options)


def test_a_loss_on_rows_of_its_own_is_refused() -> None:
    from peftx_d2o import D2o

    for plugins in ([Panda(), D2o()], [D2o(), Panda()]):
        with pytest.raises(
            ConflictError, match="'panda' compares logits at the labels of a batch, and 'd2o' runs"
        ):
            Stack(tiny("llama"), [PromptTuning(length=3), *plugins], tokenizer=tiny_tokenizer())


def test_what_trains_on_rows_of_further_sources_is_refused() -> None:
    """Its step puts them in the place of those whose labels were read."""
    mpt = pytest.importorskip("peftx_mpt").Mpt
    members = [PromptTuning(length=2), Panda(source=OWN), mpt(**mpt.example)]
    with pytest.raises(ConflictError, match="'mpt' runs rows of its own"):
        Stack(tiny("llama"), members, tokenizer=tiny_tokenizer())
