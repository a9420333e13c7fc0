"""LAE: tasks of classes one after another; online and offline modules, and both as an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack
from peftx.engines.data import Collator
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError
from peftx.testing import conformance, plan_checks
from peftx.testing.kit import Planned
from peftx.testing.models import PAD, example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lae import Adapter, Input, Lae, Offline, Prefix
from peftx_lora import Lora

test_conformance = conformance("lae")
PREFIX = {
    "identity_at_start": "a prefix is read from the start",
    "effects_match_claims": "an object with a prefix claims beside-weights, and the class does not",
}
OTHERS = {
    kind: plan_checks(
        "lae", options={**Lae.example, "module": kind}, models=["llama"], expected_failures=failures
    )
    for kind, failures in (("lora", {}), ("prefix", PREFIX))
}


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(each, id=f"{kind}-{each.id}")
        for kind, planned in OTHERS.items()
        for each in planned
        if each.arch and "fresh_process" not in each.id  # slow; a test below loads a bundle
    ],
)
def test_the_kit_with_other_modules(check: Planned) -> None:
    check.run()


TASKS = (("bad", "good"), ("red", "green", "blue"), ("one", "two"))
KINDS = ["adapter", "lora", "prefix"]


def rows(task: int) -> list[dict[str, str]]:
    return [{"text": f"it is {name}" + "!" * n, "label": name} for n in range(2) for name in TASKS[task]]


def stack_of(arch: str = "llama", *others: Any, **options: Any) -> tuple[Stack, Lae]:
    plugin = Lae(**{"tasks": TASKS, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def theta(plugin: Lae) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of theta_on and theta_off."""
    return [p.detach().clone() for p in plugin.online()], [p.clone() for p in plugin.offline.buffers()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def learn(stack: Stack, task: int, steps: int = 2, **options: Any) -> list[float]:
    report = stack.train(rows(task), steps=steps, **{"batch_size": 4, "learning_rate": 1e-2, **options})
    return [loss for _, loss in report.losses]


# ------------------------------------------------------------------------------------------------------ the modules
def test_the_modules_by_hand() -> None:
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    seen = Input()
    assert seen(x, y) is y
    adapter = Adapter(8, 5, seen)
    assert torch.equal(adapter(y, y), y)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    inner = F.gelu(x @ adapter.down.weight.t() + adapter.down.bias)
    expected = y + adapter.s * (inner @ adapter.up.weight.t() + adapter.up.bias)
    seen(x, y)
    torch.testing.assert_close(adapter(y, y), expected)
    stack, plugin = stack_of(module="lora", layers=1)
    lora = plugin.modules[1]
    base = stack.model.model.layers[0].self_attn.v_proj
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        plain = base(x)
        lora.B.normal_()
        lora.s.fill_(3.0)
        torch.testing.assert_close(base(x), plain + 3 * (x @ lora.A.t() @ lora.B.t()), rtol=1e-4, atol=1e-4)


def test_a_prefix_has_the_weight_of_one_and_the_others_keep_theirs() -> None:
    edit = Prefix(2, 8, 4)
    with torch.no_grad():
        edit.s_K.fill_(2.0)
        edit.s_V.fill_(3.0)
    key, value = edit.keys_values(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 2))
    torch.testing.assert_close(key[0, 1, :2], 2 * edit.P_K[:, 4:])
    torch.testing.assert_close(value[0, 1, :2], 3 * edit.P_V[:, 2:])
    assert bool(((edit.P_K >= 0) & (edit.P_K <= 0.01)).all())
    p = torch.tensor([[[[0.5, 0.1, 0.3, 0.04, 0.05, 0.01]]]])  # another plugin's row stands in front
    found = edit.probabilities(p)[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.5, 0.25, 0.75, 0.04, 0.05, 0.01]))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_stand_in_the_first_layers_and_start_as_the_frozen_model(kind: Any) -> None:
    stack, plugin = stack_of(module=kind, layers=1)
    both, whole = stack_of(module=kind)
    assert 2 * len(plugin.modules) == len(whole.modules) == (4 if kind == "lora" else 2)
    inputs = example_inputs(stack.model)
    plain = output_of(tiny("llama"), inputs)
    assert torch.equal(output_of(both.model, inputs), plain) == (kind != "prefix")
    widths = {p.shape[0] for p in plugin.modules[0].parameters() if p.ndim == 2}
    assert (10 if kind == "prefix" else 5) in widths
    assert {p.item() for p in plugin.online() if p.ndim == 0} == {1.0}


@pytest.mark.parametrize(("arch", "place"), [("llama", -1), ("bert", 0)])
def test_the_head_reads_the_end_of_a_text_or_an_encoders_first_token(arch: str, place: int) -> None:
    stack, plugin = stack_of(arch)
    (ids,) = plugin.texts.rows(stack, ["it is red"])
    with torch.no_grad():
        h = stack.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, place]
        z = plugin.head.linear(h)[:2]
    torch.testing.assert_close(stack_scores(stack, ["it is red"])[1][0], z.softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_an_adapter_reads_what_goes_into_the_attention(arch: str) -> None:
    """The same as the queries do, in a pre-norm and in a post-norm model."""
    stack, plugin = stack_of(arch, layers=1)
    (adapter,) = plugin.modules
    seen: list[Tensor] = []
    part = (
        "model.layers.0.self_attn.q_proj" if arch == "llama" else "bert.encoder.layer.0.attention.self.query"
    )
    stack.model.get_submodule(part).register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    adapter.down.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    output_of(stack.model, example_inputs(stack.model))
    assert len(seen) == 2
    assert torch.equal(*seen)


# --------------------------------------------------------------------------------------------------------- learning
def test_the_loss_is_over_the_classes_of_the_task_and_the_other_rows_rest() -> None:
    stack, plugin = stack_of(frozen=0)
    learn(stack, 0)
    data = stack.prepare(as_training_data(stack, rows(1), seed=0, max_length=64))
    batch = Collator(PAD)(list(data.train))
    with torch.no_grad():
        z, _ = plugin.head.read(
            lambda: stack.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]),
            batch["attention_mask"],
        )
    loss = stack.train_step(batch)
    expected = F.cross_entropy(z[:, 2:5], torch.tensor([0, 1, 2] * 2))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for p in plugin.head.parameters():
        assert not p.grad[:2].any()
        assert not p.grad[5:].any()
        assert p.grad[2:5].any()
    stack.model.zero_grad()
    before = [p.detach().clone() for p in plugin.head.parameters()]
    learn(stack, 1, weight_decay=0.5)
    for p, old in zip(plugin.head.parameters(), before, strict=True):
        assert torch.equal(p[:2], old[:2])
        assert torch.equal(p[5:], old[5:])
        assert not torch.equal(p[2:5], old[2:5])


@pytest.mark.parametrize("kind", KINDS)
def test_online_rests_while_frozen_and_learns_then(kind: Any) -> None:
    stack, plugin = stack_of(module=kind)
    start, _ = theta(plugin)
    learn(stack, 0)
    first, _ = theta(plugin)
    assert not same(start, first), "the first task has no frozen part"
    heads, seen = plugin.head.linear.weight.detach().clone(), []
    stack.train(
        rows(1), steps=5, batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        progress=lambda done, *_: seen.append(same(first, theta(plugin)[0])),
    )  # fmt: skip
    assert seen == [True, True, True, False, False], "3 epochs of 5"
    assert not torch.equal(plugin.head.linear.weight[2:5], heads[2:5])


# ----------------------------------------------------------------------------------------------------- accumulation
def test_offline_is_online_after_task_1_and_follows_it_then() -> None:
    stack, plugin = stack_of(frozen=0, decay=0.9)
    learn(stack, 0)
    on, off = theta(plugin)
    assert same(on, off)
    learn(stack, 1, steps=1)
    now, after = theta(plugin)
    assert not same(on, now)
    for p, old, new in zip(now, off, after, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)


def test_offline_follows_while_online_rests() -> None:
    stack, plugin = stack_of(decay=0.5)
    learn(stack, 0)
    learn(stack, 1, steps=3)
    on, off = theta(plugin)
    assert not same(on, off)
    seen: list[Any] = []
    stack.train(rows(2), steps=2, batch_size=2, progress=lambda *_: seen.append(theta(plugin)))
    assert same(seen[0][0], on)
    for p, old, new in zip(on, off, seen[0][1], strict=True):
        torch.testing.assert_close(new, (old + p) / 2)


@pytest.mark.parametrize(("decay", "follows"), [(0.0, True), (1.0, False)])
def test_the_limits_of_the_average(decay: float, follows: bool) -> None:
    stack, plugin = stack_of(frozen=0, decay=decay)
    learn(stack, 0)
    _, off = theta(plugin)
    learn(stack, 1)
    on, after = theta(plugin)
    assert same(after, on if follows else off)


def test_offline_is_kept_in_full_precision() -> None:
    values = [torch.ones(3, dtype=torch.bfloat16)]
    assert {p.dtype for p in Offline(iter(values)).buffers()} == {torch.float32}
    plugin = Lae(tasks=TASKS)
    Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    assert {p.dtype for p in plugin.offline.buffers()} == {torch.float32}
    assert {p.dtype for p in plugin.online()} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------------------- ensemble
def test_the_ensemble_is_the_larger_probability_over_the_classes_seen() -> None:
    stack, plugin = stack_of(frozen=0, decay=1.0)
    learn(stack, 0)
    texts = ["it is good", "it is red"]
    labels, first = stack_scores(stack, texts)
    assert labels == ["bad", "good"]
    torch.testing.assert_close(first.sum(-1), torch.ones(2))  # two experts that are the same: one
    learn(stack, 1, steps=4, learning_rate=5e-2)
    labels, p = stack_scores(stack, texts)
    assert labels == ["bad", "good", "red", "green", "blue"]
    on, off = theta(plugin)
    each = []
    for values in (on, off):
        put(plugin, values, values)
        each.append(stack_scores(stack, texts)[1])
        torch.testing.assert_close(each[-1].sum(-1), torch.ones(2))
    torch.testing.assert_close(p, torch.maximum(*each))
    assert not torch.allclose(*each, atol=1e-3)
    put(plugin, on, off)
    stack_scores(stack, texts)
    assert same(theta(plugin)[0], on), "afterwards the online module stands there"


def stack_scores(stack: Stack, texts: list[str]) -> tuple[list[str], Tensor]:
    with torch.no_grad():
        return stack.plugins["lae"].classify(stack, texts)


def put(plugin: Lae, on: list[Tensor], off: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip([*plugin.online(), *plugin.offline.buffers()], [*on, *off], strict=True):
            p.copy_(value)


# -------------------------------------------------------------------------------------------------------- the stack
def test_a_stream_goes_on_from_a_bundle(tmp_path: Path) -> None:
    stack, _ = stack_of(decay=0.9)
    learn(stack, 0)
    learn(stack, 1, steps=5)
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    texts = ["it is good", "it is red"]
    torch.testing.assert_close(stack_scores(again, texts)[1], stack_scores(stack, texts)[1])
    assert learn(again, 2, steps=5) == pytest.approx(learn(stack, 2, steps=5))
    assert stack_scores(again, texts)[0] == [name for task in TASKS for name in task]


def test_what_is_merged_leaves_both_modules_standing() -> None:
    stack, plugin = stack_of("llama", Lora(rank=2), module="lora", frozen=0)
    learn(stack, 0)
    learn(stack, 1)
    before = stack_scores(stack, ["it is red"])[1]
    stack.merge()
    torch.testing.assert_close(stack_scores(stack, ["it is red"])[1], before, rtol=1e-3, atol=1e-4)
    assert not same(*theta(plugin))


def test_clear_errors() -> None:
    for tasks, said in (
        ([["a", "b"]], "1 task: LAE needs two"),
        ([["a", "b"], ["c"]], "fewer than two classes"),
        ([["a", "b"], ["b", "c"]], "stands twice"),
        ([["a", " "], ["b", "c"]], "is empty"),
    ):
        with pytest.raises(PeftxError, match=said):
            Lae(tasks=tasks)
    stack, plugin = stack_of()
    with pytest.raises(DataError, match="rows of task 2, and 0 of 3 were learned"):
        learn(stack, 1)
    with pytest.raises(DataError, match=r"2 class\(es\) of 2 task\(s\)"):
        stack.train([rows(0)[0], rows(1)[0]], steps=1)
    with pytest.raises(DataError, match=r"1 class\(es\) of 1 task\(s\)"):
        stack.train(rows(0)[:1], steps=1)
    assert not plugin.state
    learn(stack, 0)
    learn(stack, 0)  # a task may go on
    learn(stack, 1)
    with pytest.raises(DataError, match="rows of task 1, and 2 of 3 were learned"):
        learn(stack, 0)
    with pytest.raises(ArchitectureError, match="more than scores in its softmax"):
        stack_of("gpt_oss", module="prefix")
    with pytest.raises(ArchitectureError, match="vit"):
        Stack(tiny("vit"), [Lae(tasks=TASKS)])
    with pytest.raises(ConflictError):
        Stack(tiny("llama"), [Lae(tasks=TASKS), Lae(tasks=TASKS)], tokenizer=tiny_tokenizer())
