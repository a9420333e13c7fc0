from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_esft import Esft, select
from peftx_hft import Hft
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("esft")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "qwen3_next")


def stack_of(arch: str = "mixtral", **options: Any) -> Stack:
    return Stack(tiny(arch), [Esft(**options)], tokenizer=tiny_tokenizer())


def batch_of(stack: Stack, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed, **options)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def own_steps(stack: Stack, count: int = 2, **options: Any) -> None:
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for seed in range(count):
        stack.train_step(batch_of(stack, seed, **options), optimizer=optimizer)


def state_of(stack: Stack) -> dict[str, Any]:
    return stack.plugins["esft"].state


def plant(stack: Stack, biases: list[float]) -> None:
    """Route every token of Mixtral to the experts of the largest biases: rows of the router that follow one feature,
    which the norm before it makes large."""
    with torch.no_grad():
        for layer in stack.model.model.layers:
            layer.post_attention_layernorm.weight.zero_()
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight.zero_()
            for expert, bias in enumerate(biases):
                layer.mlp.gate.weight[expert, 0] = bias


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.1, [2]),
        (0.4, [2]),
        (0.41, [0, 2]),
        (0.7, [0, 2]),
        (0.71, [0, 1, 2]),
        (0.9, [0, 1, 2]),
        (1.0, [0, 1, 2, 4]),
    ],
)
def test_the_smallest_set_that_comes_to_p(p: float, expected: list[int]) -> None:
    scores = torch.tensor([0.3, 0.2, 0.4, 0.0, 0.1], dtype=torch.float64)
    assert select(scores, p) == expected
    assert select(10 * scores, p) == expected


def test_of_equal_scores_the_lower_number() -> None:
    assert select(torch.full((4,), 0.25, dtype=torch.float64), 0.5) == [0, 1]
    assert select(torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).flip(0), 0.9) == [0, 1]
    assert select(torch.tensor([0.1, 0.2], dtype=torch.float64).repeat(1), 0.2 / 0.3) == [1]


@pytest.mark.parametrize("score", ["gate", "token"])
@pytest.mark.parametrize("arch", MIXTURES)
def test_scores_sum_to_one_and_sets_are_minimal(arch: str, score: str) -> None:
    stack = stack_of(arch, score=score, p=0.6)
    stack.train_step(batch_of(stack))
    state = state_of(stack)
    assert len(state["scores"]) == sum(site.role == "experts.down" for site in stack.anatomy.sites)
    for path, scores in state["scores"].items():
        chosen = [scores[e] for e in state["experts"][path]]
        assert sum(scores) == pytest.approx(1)
        assert sum(chosen) >= 0.6 - 1e-9
        assert sum(chosen) - min(chosen) < 0.6
        assert min(chosen) >= max(
            (s for e, s in enumerate(scores) if e not in state["experts"][path]), default=0
        )


@pytest.mark.parametrize("score", ["gate", "token"])
def test_scores_by_hand(score: str) -> None:
    """By the router's own answers, two rows, of which one has pads."""
    stack = stack_of(score=score)
    batch = batch_of(stack, padding="left")
    answers: list[tuple[Tensor, Tensor]] = []
    gates = [layer.mlp.gate for layer in stack.model.model.layers]
    hooks = [gate.register_forward_hook(lambda m, x, out: answers.append(out[1:])) for gate in gates]
    with torch.no_grad():
        stack.model(**batch)
    for hook in hooks:
        hook.remove()
    stack.train_step(batch)
    real = batch["attention_mask"].flatten().bool()
    assert not real.all()
    for (weights, index), scores in zip(answers, state_of(stack)["scores"].values(), strict=True):
        expected = torch.zeros(4, dtype=torch.float64)
        for gs, es in zip(weights[real], index[real], strict=True):
            for g, e in zip(gs.tolist(), es.tolist(), strict=True):
                expected[e] += g if score == "gate" else 1 / 2
        expected /= expected.sum()
        assert scores == pytest.approx(expected.tolist(), rel=1e-6)


def test_gates_and_tokens_are_different_shares() -> None:
    """Gates of 0.9 and 0.1: two experts are chosen as often, and one has the weight."""
    for score, expected in (("gate", [1]), ("token", [1, 3])):
        stack = stack_of(score=score, p=0.6)
        plant(stack, [-9.0, 2.0, -9.0, 1.0])
        rows = stack.model.model.embed_tokens.weight
        with torch.no_grad():
            rows[:, 0] = 30.0  # positive in the norm's first feature
        own_steps(stack, 1)
        assert all(chosen == expected for chosen in state_of(stack)["experts"].values())


@pytest.mark.parametrize("planted", [0, 3])
def test_planted_experts_are_chosen(planted: int) -> None:
    stack = stack_of(p=0.5)
    plant(stack, [9.0 if e == planted else 0.1 * e for e in range(4)])
    with torch.no_grad():
        stack.model.model.embed_tokens.weight[:, 0] = 30.0
    before = copies(stack.model)
    own_steps(stack)
    after = copies(stack.model)
    for name, p in after.items():
        moved = (p != before[name]).flatten(1).any(1) if p.ndim == 3 else (p != before[name]).any()
        assert moved.nonzero().flatten().tolist() == ([planted] if p.ndim == 3 else [])


@pytest.mark.parametrize("arch", MIXTURES)
def test_all_but_the_chosen_experts_keep_their_bits(arch: str) -> None:
    """Under AdamW with a weight decay; routers, attention, shared experts and biases too."""
    stack = stack_of(arch)
    before = copies(stack.model)
    own_steps(stack)
    experts, after = state_of(stack)["experts"], copies(stack.model)
    assert all(len(chosen) < 4 for chosen in experts.values())
    for name, p in after.items():
        path = name.rpartition(".")[0]
        if path not in experts:
            assert torch.equal(p, before[name]), name
            continue
        moved = (p != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
        assert moved == experts[path]


def test_p_of_one_trains_all_that_are_chosen_at_all() -> None:
    stack = stack_of(p=1.0)
    plant(stack, [2.0, 1.0, -9.0, -9.0])
    with torch.no_grad():
        stack.model.model.embed_tokens.weight[:, 0] = 30.0
    own_steps(stack, 1)
    assert all(chosen == [0, 1] for chosen in state_of(stack)["experts"].values())


def test_the_paper_s_shares() -> None:
    for score, share in (("gate", 0.1), ("token", 0.2)):
        named, left_out = stack_of(score=score, p=share), stack_of(score=score)
        for stack in (named, left_out):
            own_steps(stack, 1)
        assert state_of(named) == state_of(left_out)
    by_gate, by_token = (Esft(score=score).config for score in ("gate", "token"))
    assert by_gate.p is by_token.p is None


def test_it_chooses_once_by_the_training_rows() -> None:
    """By the rows of the run, as many as said, and not by the batch; dropout and soft tokens leave no trace."""
    stacks = [stack_of(rows=rows, p=0.7) for rows in (8, 8, 1)]
    stacks.append(
        Stack(tiny("mixtral"), [Esft(rows=8, p=0.7), PromptTuning(length=4)], tokenizer=tiny_tokenizer())
    )
    calls = []
    for stack in stacks:
        seen: list[int] = []
        hook = stack.model.register_forward_hook(lambda m, x, out, seen=seen: seen.append(len(out.logits)))
        stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-3)
        hook.remove()
        calls.append(seen)
    assert calls == [[2] * 6, [2] * 6, [1, 2, 2], [2] * 6]
    one, same, other, prompted = map(state_of, stacks)
    assert one == same
    assert one["scores"] != other["scores"]
    assert prompted["scores"].keys() == one["scores"].keys()


def test_soft_tokens_are_not_counted() -> None:
    first = "model.layers.0.mlp.experts"
    count = lambda stack, batch: Esft.relevance.__get__(stack.plugins["esft"])(  # noqa: E731
        peftx.TrainStep(stack, batch)
    )[first]
    stack = Stack(tiny("mixtral"), [Esft(score="token"), PromptTuning(length=5)], tokenizer=tiny_tokenizer())
    scores = count(stack, batch_of(stack))
    assert torch.allclose((scores * 2 * 18).round(), scores * 2 * 18, atol=1e-9)  # 18 tokens of text, K = 2


def test_the_model_is_in_evaluation_mode_for_the_sample_and_in_training_after_it() -> None:
    stack = stack_of()
    modes: list[bool] = []
    stack.model.train()
    stack.model.model.layers[0].register_forward_pre_hook(lambda m, x: modes.append(m.training))
    stack.train_step(batch_of(stack))
    stack.train_step(batch_of(stack))
    assert modes == [False, True, True]


def test_a_bundle_holds_the_chosen_experts_and_goes_on_with_them(tmp_path: Path) -> None:
    stack = stack_of()
    own_steps(stack)
    stack.save(tmp_path)
    file, sizes = tmp_path / "esft.safetensors", [p.numel() for p in stack.model.parameters() if p.ndim == 3]
    numbers = sum(len(chosen) for chosen in state_of(stack)["experts"].values()) * sum(sizes) / 2 / 4
    assert file.stat().st_size < 8 * numbers + 3000
    loaded = peftx.load(tmp_path, model=tiny("mixtral"), tokenizer=tiny_tokenizer())
    assert state_of(loaded) == state_of(stack)
    before = copies(loaded.model)
    assert all(torch.equal(p, before[n]) for n, p in stack.model.named_parameters())
    own_steps(loaded, 1)
    for name, p in copies(loaded.model).items():
        if p.ndim == 3:
            moved = (p != before[name]).flatten(1).any(1).nonzero().flatten().tolist()
            assert moved == state_of(stack)["experts"][name.rpartition(".")[0]]


@pytest.mark.parametrize("beside", [None, "attention"])
def test_the_plan_says_how_much_is_saved_at_most(tmp_path: Path, beside: str | None) -> None:
    """As many experts as have p of the relevance when all have the same; fewer are stored when some have more."""
    base = tiny("mixtral")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    spec = {
        "peftx": 1, "model": str(tmp_path / "base"), "data": {"train": "peftx:sample/train.jsonl"}, "train": {},
        "stack": [{"use": "esft", "with": {"p": 0.5, "beside": beside}}], "output": str(tmp_path / "out"),
    }  # fmt: skip
    found = plan(load_run(json.dumps(spec)).pipeline)
    assert "'esft': at most" in found.stages[-1].detail
    saved = []
    for p in (0.5, 1e-6):
        stack = Stack(str(tmp_path / "base"), [Esft(p=p, beside=beside)])
        own_steps(stack)
        folder = stack.save(tmp_path / str(p))
        chosen = state_of(stack)["experts"].values()
        assert all(len(each) <= 2 for each in chosen)
        saved.append(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    few = sum(len(each) == 1 for each in chosen)
    assert few == len(chosen)
    assert saved[1] < saved[0] <= found.totals.bundle_bytes + 3000  # the names of tensors in the file


def test_what_trains_beside_them() -> None:
    stack = stack_of("deepseek_v3", beside="shared_experts norm.final")
    before = copies(stack.model)
    own_steps(stack)
    moved = {n for n, p in stack.model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.split(".")[-2] for n in moved if "shared" in n} == {"gate_proj", "up_proj", "down_proj"}
    assert "model.norm.weight" in moved
    assert not any("self_attn" in n or ".mlp.gate." in n for n in moved)


@pytest.mark.parametrize("first", [True, False])
def test_beside_an_adapter(first: bool) -> None:
    plugins = [Esft(), Lora(rank=2, targets="attention")]
    stack = Stack(tiny("mixtral"), plugins if first else plugins[::-1])
    own_steps(stack)
    assert all((p != 0).any() for n, p in stack.model.named_parameters() if n.endswith("lora.B"))


def test_refusals() -> None:
    for arch in ("llama", "llama4"):
        with pytest.raises(ArchitectureError, match=f"esft: {arch}.* has no experts"):
            Stack(tiny(arch), [Esft()])
    with pytest.raises(ConflictError, match="both train the base's"):
        Stack(tiny("mixtral"), [Esft(), Hft(fraction=1.0)])
    stack = stack_of()
    with torch.no_grad():
        stack.model.model.layers[0].mlp.gate.weight.fill_(float("nan"))
    with pytest.raises(
        PeftxError, match=r"esft: the relevance of the experts in model\.layers\.0\.mlp\.experts is nan"
    ):
        stack.train_step(batch_of(stack))


def test_several_processes_choose_by_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(PeftxError, match="esft: every process would look at a batch of its own"):
        stack.train_step(batch_of(stack))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    stack.train_step(batch_of(stack))


def test_nothing_is_counted_after_the_sample() -> None:
    stack = stack_of()
    stack.train_step(batch_of(stack))
    assert not any(layer.mlp.experts._forward_pre_hooks for layer in stack.model.model.layers)


def test_a_sample_without_tokens_is_refused() -> None:
    stack = stack_of()
    batch = batch_of(stack)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(PeftxError, match=r"esft: the relevance of the experts in .* is 0\.0 on the sample"):
        stack.train_step(batch)


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 1.5}, {"score": "loss"}, {"rows": 0}, {"beside": ""}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"Esft: {next(iter(options))}") as caught:
        Esft(**options)
    assert "score, p, rows, beside" in str(caught.value.hint)
