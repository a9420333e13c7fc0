from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Plugin, Stack
from peftx.errors import ConflictError, PeftxError
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_deft import Deft
from peftx_hft import Hft
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_surgical_fim import SurgicalFim

test_conformance = conformance("surgical-fim")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def stack_of(arch: str = "llama", layers: int = 1, depth: int = 4, seed: int = 0, **options: Any) -> Stack:
    model = tiny(arch, **({} if arch == "t5" else {"num_hidden_layers": depth}))
    return Stack(model, [SurgicalFim(layers=layers, **options)], tokenizer=tiny_tokenizer(), seed=seed)


def classifier(layers: int = 1, depth: int = 3) -> Stack:
    model = tiny("bert", head="classification", num_labels=3, num_hidden_layers=depth)
    return Stack(model, [SurgicalFim(layers=layers)])


def batch_of(stack: Stack, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed, **options)
    if "decoder_input_ids" in inputs:
        return {**inputs, "labels": inputs.pop("decoder_input_ids")}
    if hasattr(stack.model, "classifier"):
        return {**inputs, "labels": torch.tensor([0, 2])}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def own_steps(stack: Stack, batch: dict[str, Tensor] | None = None, count: int = 2) -> None:
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for seed in range(count):
        stack.train_step(batch_of(stack, seed) if batch is None else batch, optimizer=optimizer)


def state_of(stack: Stack) -> dict[str, Any]:
    return stack.plugins["surgical-fim"].state


def copies(stack: Stack) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in stack.model.named_parameters()}


def moved(stack: Stack, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in stack.model.named_parameters() if not torch.equal(p, before[n])}


def expected_scores(stack: Stack, batch: dict[str, Tensor], paths: list[str]) -> dict[str, float]:
    """By per-row gradients of log p, each row alone, and norms of the means."""
    model, found = stack.model, {}
    rows: list[dict[str, Tensor]] = []
    for i in range(len(batch["input_ids"])):
        model.zero_grad()
        (-model(**{k: v[i : i + 1] for k, v in batch.items()}).loss).backward()
        rows.append({n: p.grad.clone().double() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for path in paths:
        names = [n for n in rows[0] if n.startswith(f"{path}.")]
        F = {n: torch.stack([row[n].square() for row in rows]).mean(0) for n in names}
        found[path] = float(sum(f.square().sum().sqrt() for f in F.values()))
    return found


@pytest.mark.parametrize(
    "make", [lambda: stack_of(), classifier, lambda: stack_of("t5"), lambda: stack_of("gpt2")]
)
def test_scores_are_of_mean_squares_of_rows_gradients(make: Any) -> None:
    stack = make()
    batch = batch_of(stack) if stack.model.config.is_encoder_decoder else batch_of(stack, padding="right")
    paths = [site.path for site in stack.anatomy.sites if site.role == "block.layer"]
    expected = expected_scores(stack, batch, paths)
    stack.train_step(batch)
    scores = state_of(stack)["scores"]
    assert list(scores) == paths
    assert all(s > 0 for s in scores.values())
    assert scores == pytest.approx(expected, rel=1e-4)
    assert state_of(stack)["layers"] == [max(scores, key=lambda path: scores[path])]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("outside", [True, False])
def test_other_layers_keep_their_bits(layers: int, outside: bool) -> None:
    stack = stack_of(layers=layers, outside=outside)
    before = copies(stack)
    own_steps(stack)
    chosen, scores = state_of(stack)["layers"], state_of(stack)["scores"]
    assert chosen == sorted(chosen)
    assert set(chosen) == set(sorted(scores, key=lambda path: -scores[path])[:layers])
    expected = {n for n in before if n.startswith(tuple(f"{path}." for path in chosen))}
    expected |= {n for n in before if ".layers." not in n} if outside else set()
    assert moved(stack, before) == expected
    assert {n for n, p in stack.model.named_parameters() if p.requires_grad} == expected


def test_all_layers_are_full_fine_tuning() -> None:
    stack, plain = stack_of(layers=4), tiny("llama", num_hidden_layers=4)
    own_steps(stack, count=3)
    for p in plain.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        plain(**batch_of(stack, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(stack.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in plain.named_parameters())


@pytest.mark.parametrize("planted", [0, 2])
def test_the_only_layer_that_matters_is_first(planted: int) -> None:
    """The others are the identity: what they add to the residual is zero, and so small are their gradients."""
    model = tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if i != planted:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    norm.weight.mul_(1e-3)
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    stack = Stack(model, [SurgicalFim(layers=1)])
    own_steps(stack)
    assert state_of(stack)["layers"] == [f"model.layers.{planted}"]


def test_of_equal_scores_the_lower_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SurgicalFim, "scores", lambda self, step: dict.fromkeys(self.layers, 1.0))
    stack = stack_of(layers=2)
    stack.train_step(batch_of(stack))
    assert state_of(stack)["layers"] == ["model.layers.0", "model.layers.1"]


def test_the_sample_is_of_the_training_rows() -> None:
    """So many of them, one at a time, before the first step alone; pads of a batch change nothing."""
    seen: list[int] = []
    scores = []
    for samples, size in ((5, 2), (5, 4), (100, 2)):
        stack = stack_of(samples=samples)
        hook = stack.model.register_forward_hook(lambda m, x, out: seen.append(len(out.logits)))
        stack.train(ROWS, steps=2, batch_size=size, learning_rate=1e-3)
        hook.remove()
        scores.append(state_of(stack)["scores"])
    assert seen == [1] * 5 + [2, 2] + [1] * 5 + [4, 4] + [1] * 8 + [2, 2]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[0] != pytest.approx(scores[2], rel=1e-2)


def test_the_sample_is_drawn_by_the_seed_of_the_run() -> None:
    """From all rows, so that a file sorted by its answers gives a mixed one; the stack's seed has no part in it."""
    rows = [{"prompt": "one" if n < 32 else "two", "completion": f" {n}"} for n in range(64)]
    samples: list[set[tuple[int, ...]]] = []
    for seed, of_stack in ((0, 0), (0, 1), (1, 0)):
        stack = stack_of(samples=16, seed=of_stack)
        seen: list[tuple[int, ...]] = []
        stack.model.register_forward_pre_hook(
            lambda m, args, kw, seen=seen: seen.append(tuple(kw["input_ids"][0].tolist())), with_kwargs=True
        )
        stack.train(rows, steps=1, batch_size=1, learning_rate=1e-3, seed=seed)
        samples.append(set(seen[:16]))
        assert 3 < sum(ids[0] == seen[0][0] for ids in samples[-1]) < 13, "of both halves of the file"
    assert samples[0] == samples[1] != samples[2]


def test_evaluation_reports_scores_and_choice() -> None:
    stack = stack_of(layers=2)
    assert not stack.evaluate(ROWS, metrics=["surgical-fim"])
    own_steps(stack)
    told = stack.evaluate(ROWS, metrics=["surgical-fim"])
    for path, score in state_of(stack)["scores"].items():
        assert told[f"fisher/{path}"].value == score
        assert told[f"fisher/{path}"].unit == ("trains" if path in state_of(stack)["layers"] else "frozen")
    assert sum(score.unit == "trains" for score in told.values()) == 2


def test_dropout_and_gradients_of_others_are_left_alone() -> None:
    stacks = [Stack(tiny("bert", hidden_dropout_prob=p), [SurgicalFim(layers=1)]) for p in (0.0, 0.5)]
    for stack in stacks:
        stack.model.train()
        stack.train_step(batch_of(stack))
        assert stack.model.training
    assert state_of(stacks[0])["scores"] == state_of(stacks[1])["scores"]
    unsettled = stack_of()
    for p in unsettled.model.parameters():
        p.grad = torch.zeros_like(p)
    before = copies(unsettled)
    own_steps(unsettled, count=1)
    assert not any(n.startswith("model.layers.0.") for n in moved(unsettled, before)) or state_of(unsettled)[
        "layers"
    ] == ["model.layers.0"]
    left = [n for n, p in unsettled.model.named_parameters() if not p.requires_grad]
    assert left
    assert not set(left) & moved(unsettled, before)


def test_below_the_lowest_layer_nothing_is_kept() -> None:
    kept = []
    for lowest in (0, 3):
        stack = stack_of(outside=False)
        state_of(stack)["layers"] = [f"model.layers.{lowest}"]
        stack.settle()
        count: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, count=count: count.append(t.numel()) or t, lambda t: t
        ):
            stack.train_step(batch_of(stack))
        kept.append(sum(count))
    assert kept[1] < 0.5 * kept[0]


def test_the_choice_comes_back_from_a_bundle(tmp_path: Path) -> None:
    stack = stack_of(layers=2)
    own_steps(stack)
    stack.save(tmp_path)
    loaded = peftx.load(tmp_path, model=tiny("llama", num_hidden_layers=4), tokenizer=tiny_tokenizer())
    assert state_of(loaded) == state_of(stack)
    trained = lambda s: {n for n, p in s.model.named_parameters() if p.requires_grad}  # noqa: E731
    assert trained(loaded) == trained(stack)
    before = copies(loaded)
    own_steps(loaded, count=1)
    assert moved(loaded, before) == trained(stack)


@pytest.mark.parametrize("first", [True, False])
def test_scores_are_of_the_base_whatever_stands_beside(first: bool) -> None:
    """DEFT watches every pass with gradients of a step that it stands around."""
    alone = stack_of()
    alone.train_step(batch_of(alone))
    plugins: list[Plugin] = [SurgicalFim(layers=1), Deft(), Lora(rank=2)]
    stack = Stack(tiny("llama", num_hidden_layers=4), plugins if first else plugins[::-1])
    with torch.no_grad():
        for name, p in stack.model.named_parameters():
            if name.endswith("lora.B"):
                p.normal_()
    own_steps(stack)
    assert state_of(stack) == state_of(alone)
    stack.remove("surgical-fim")
    base = dict(tiny("llama", num_hidden_layers=4).named_parameters())
    assert not any(p.requires_grad for n, p in stack.model.named_parameters() if n in base)


def test_the_plan_says_the_bytes_of_the_layers_that_will_train(tmp_path: Path) -> None:
    """Whichever these are: all of the model's are as large. Embedding rows that do not move make the bundle smaller."""
    told, stored = {}, {}
    for outside in (True, False):
        spec = {
            "peftx": 1, "model": "peftx:tiny", "data": {"train": "peftx:sample/train.jsonl"},
            "train": {},
            "stack": [{"use": "surgical-fim", "with": {"layers": 2, "outside": outside}}],
            "output": str(tmp_path / "out"),
        }  # fmt: skip
        (tmp_path / "spec.yaml").write_text(json.dumps(spec))
        found = plan(load_run(tmp_path / "spec.yaml").pipeline)
        told[outside] = found.totals.bundle_bytes
        assert ("at most" in found.stages[-1].detail) == outside
        stack = Stack("peftx:tiny", [SurgicalFim(layers=2, samples=1, outside=outside)])
        stack.train(ROWS, steps=1, batch_size=1, learning_rate=1e-3)
        folder = stack.save(tmp_path / str(outside))
        stored[outside] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert stored[False] == pytest.approx(told[False], rel=0.01)
    assert 0.5 * told[True] < stored[True] <= 1.01 * told[True]


def test_the_plan_of_what_is_refused_says_why() -> None:
    spec = {
        "peftx": 1, "model": "peftx:tiny", "data": {"train": "peftx:sample/train.jsonl"}, "train": {},
        "stack": [{"use": "surgical-fim", "with": {"layers": 99, "outside": True}}], "output": "out",
    }  # fmt: skip
    found = plan(load_run(json.dumps(spec)).pipeline)
    assert any("layers is 99" in conflict.reason for conflict in found.conflicts)


def test_while_frozen_nothing_is_chosen() -> None:
    stack = Stack(tiny("llama"), [SurgicalFim(layers=1), Lora(rank=2)])
    stack.freeze("surgical-fim")
    stack.train_step(batch_of(stack))
    assert "layers" not in state_of(stack)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftx.toolkits.compression import QuantLinear

    with pytest.raises(PeftxError, match="surgical-fim: layers is 5, and the model has 2"):
        Stack(tiny("llama"), [SurgicalFim()])
    with pytest.raises(ConflictError, match="both train the base's"):
        Stack(tiny("llama"), [SurgicalFim(layers=1), Hft()])
    with pytest.raises(ConflictError, match="needs gradients"):
        Stack(tiny("llama"), [SurgicalFim(layers=1), Mezo()])
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = QuantLinear.from_linear(mlp.down_proj, bits=8)
    with pytest.raises(PeftxError, match=r"surgical-fim: .*down_proj is quantized"):
        Stack(model, [SurgicalFim(layers=1)])
    stack = stack_of()
    batch = batch_of(stack)
    with pytest.raises(PeftxError, match="surgical-fim: row 2 of the sample has the loss nan"):
        stack.train_step({**batch, "labels": batch["labels"].clone().index_fill_(0, torch.tensor([1]), -100)})
    with pytest.raises(PeftxError, match="surgical-fim: row 1 of the sample has the loss None"):
        stack.train_step({"input_ids": batch["input_ids"]})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(PeftxError, match="surgical-fim: every process would look at a batch of its own"):
        stack.train_step(batch)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    stack.train_step(batch)


@pytest.mark.parametrize("options", [{"layers": 0}, {"samples": 0}, {"outside": "some"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"SurgicalFim: {next(iter(options))}") as caught:
        SurgicalFim(**options)
    assert "layers, samples, outside" in str(caught.value.hint)
