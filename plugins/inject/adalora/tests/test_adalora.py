from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.kernel.phases import Span
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of
from peftx_adalora import Adalora, AdaloraDelta

test_conformance = conformance("adalora")

PEFT: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "gpt2": {"target_modules": ["attn.c_proj", "c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
    "bert": {"target_modules": r".*layer\..*(query|value|dense)"},
}
TARGETS = {"llama": "attention.q,v mlp.down", "gpt2": "attention.o mlp", "bert": "attention.q,v,o mlp"}
IDS = torch.arange(5, 29).reshape(2, 12)


def plugin_of(stack: Stack) -> Adalora:
    return next(member.plugin for member in stack.members if isinstance(member.plugin, Adalora))


def both(arch: str) -> tuple[Any, Stack, dict[str, Any]]:
    """PEFT's model, ours with the same first values, and PEFT's layers by path; warmup 2, prune 5, final 3 of 10."""
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=3, total_step=10, deltaT=2, lora_alpha=6, orth_reg_weight=0.3,
        beta1=0.8, beta2=0.7, **PEFT[arch],
    )  # fmt: skip
    theirs = get_peft_model(tiny(arch), config)
    options = {
        "rank": 2,
        "initial_rank": 4,
        "alpha": 6,
        "warmup": 2,
        "prune": 5,
        "every": 2,
        "orthogonal": 0.3,
    }
    stack = Stack(tiny(arch), [Adalora(beta1=0.8, beta2=0.7, targets=TARGETS[arch], **options)])
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_E")
    }
    assert layers.keys() == plugin_of(stack).deltas.keys()
    for path, delta in plugin_of(stack).deltas.items():
        for ours, p in zip((delta.A, delta.E, delta.B), of_peft(layers[path]), strict=True):
            ours.data.copy_(p.data)
    return theirs, stack, layers


def of_peft(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    return layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]


# ---------------------------------------------------------------------------------------------- beside PEFT
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_equals_peft_on_its_weights(arch: str) -> None:
    theirs, stack, layers = both(arch)
    inputs = example_inputs(tiny(arch))
    with torch.no_grad():
        for path, delta in plugin_of(stack).deltas.items():
            for ours, p in zip((delta.A, delta.E, delta.B), of_peft(layers[path]), strict=True):
                ours.copy_(p.normal_(0, 0.3))
        one, two, base = (output_of(m, inputs) for m in (theirs.eval(), stack.model, tiny(arch)))
    assert torch.allclose(one, two, atol=5e-6, rtol=0)
    assert (one - base).abs().max() > 0.1
    merged = theirs.merge_and_unload()
    for path, delta in plugin_of(stack).deltas.items():
        W, left = (m.get_submodule(path).weight.detach() for m in (tiny(arch), merged))
        folded = delta.fold(W.mT if arch == "gpt2" else W, None)[0]
        assert torch.allclose(folded, left.mT if arch == "gpt2" else left, atol=2e-6, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_trains_and_prunes_as_peft_does(arch: str) -> None:
    """Loss with its orthogonality, importance, budget, mask, weights and logits after each of ten updates."""
    theirs, stack, layers = both(arch)
    plugin, allocator = plugin_of(stack), theirs.base_model.rankallocator
    models = (theirs, stack.model)
    one, two = (torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2) for m in models)
    batch = {"input_ids": IDS, "labels": IDS}
    left = []
    for t in range(1, 11):
        loss = theirs.base_model(**batch).loss  # with the orthogonality
        loss.backward()
        one.step()
        theirs.base_model.update_and_allocate(t)
        one.zero_grad()
        assert float(stack.train_step(dict(batch), optimizer=two)) == pytest.approx(loss.item(), abs=1e-5)
        memory = stack.memory[stack.id_of(plugin)]
        for path, delta in plugin.deltas.items():
            for name, p in zip("AEB", of_peft(layers[path]), strict=True):
                assert torch.allclose(getattr(delta, name), p, atol=5e-6, rtol=0)
                if t < 7:
                    end = f"{path}.lora_{name}.default"
                    key = next(key for key in allocator.exp_avg_ipt if key.endswith(end))
                    known = torch.stack((allocator.exp_avg_ipt[key], allocator.exp_avg_unc[key]))
                    assert torch.allclose(memory[f"{path}.{name}"], known, atol=1e-8, rtol=1e-3)
            assert torch.equal(delta.E == 0, of_peft(layers[path])[1] == 0)
        left.append(sum(int((delta.E != 0).sum()) for delta in plugin.deltas.values()))
        with torch.no_grad():
            logits = [model(input_ids=IDS).logits for model in models]
        assert torch.allclose(*logits, atol=1e-5, rtol=0)
    matrices = len(layers)
    b_0, b_T = 4 * matrices, 2 * matrices
    assert left[:3] == [b_0] * 3
    assert left[3] == int(b_T + (b_0 - b_T) * 0.6**3)
    assert left[5] == int(b_T + (b_0 - b_T) * 0.2**3)
    assert left[6:] == [b_T] * 4
    assert not memory


@pytest.mark.parametrize(("total", "warmup", "final"), [(10, 2, 3), (100, 10, 30), (37, 5, 1)])
def test_the_budget_is_pefts(total: int, warmup: int, final: int) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=5, target_r=2, tinit=warmup, tfinal=final, total_step=total, **PEFT["llama"]
    )
    allocator = get_peft_model(tiny("llama"), config).base_model.rankallocator
    plugin = plugin_of(Stack(tiny("llama"), [Adalora(rank=2, initial_rank=5, targets=TARGETS["llama"])]))
    span = Span("prune", warmup, total - final)
    expected = [allocator.budget_schedule(t)[0] for t in range(warmup + 1, total - final + 1)]
    assert [plugin.budget(span, t) for t in range(warmup + 1, total - final + 1)] == expected
    assert expected[-1] == 2 * 6


# ---------------------------------------------------------------------------------------------- the update
def test_update_by_hand() -> None:
    delta = AdaloraDelta((2, 2), rank=2, scale=3.0)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))  # Q
        delta.E.copy_(torch.tensor([[2.0], [-1.0]]))
        delta.B.copy_(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))  # P
    x, y = torch.tensor([[5.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    # Q x = (7, 5), L Q x = (14, -5), P L Q x = (14, -19)
    assert delta(x, y.clone()).tolist() == [[52.0, -47.0]]
    weight, bias = delta.fold(torch.zeros(2, 2), None)
    assert (x @ weight.t()).tolist() == [[42.0, -57.0]]
    assert bias is None


def test_start() -> None:
    torch.manual_seed(0)
    delta = AdaloraDelta((3, 50, 60), rank=8, scale=1.0)
    assert (delta.A.shape, delta.E.shape, delta.B.shape) == ((3, 8, 60), (3, 8, 1), (3, 50, 8))
    for p in (delta.A, delta.B):
        assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert float(p.detach().mean()) == pytest.approx(0, abs=0.002)
    assert not delta.E.any()
    assert delta.kept.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains_is_float32(dtype: torch.dtype) -> None:
    deltas = plugin_of(Stack(tiny("llama").to(dtype), [Adalora(targets="mlp.up")])).deltas
    assert {p.dtype for delta in deltas.values() for p in delta.parameters()} == {torch.float32}


def test_orthogonality_by_hand() -> None:
    delta = AdaloraDelta((2, 2), rank=2, scale=1.0)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))  # Q Q^T - I = [[3, 2], [2, 1]]
        delta.B.copy_(torch.tensor([[2.0, 1.0], [0.0, 2.0]]))  # P^T P - I = [[3, 2], [2, 4]]
    assert delta.lengths().tolist() == pytest.approx([18**0.5, 33**0.5])
    nn.init.eye_(delta.A)
    nn.init.eye_(delta.B)
    lengths = delta.lengths()
    assert lengths.tolist() == [0.0, 0.0]
    lengths.sum().backward()
    assert not delta.A.grad.any()  # and no nan
    assert AdaloraDelta((3, 5, 6), rank=2, scale=1.0).lengths().shape == (2, 3)  # of each expert


def test_the_term_of_orthogonality() -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    options = {"rank": 1, "initial_rank": 2, "warmup": 1, "prune": 1, "every": 1}

    def terms(**more: float) -> dict[str, float]:
        return Stack("peftx:tiny", [Adalora(**options, **more)]).train(rows, steps=3).terms

    assert terms()["orthogonality"] == pytest.approx(2**0.5, rel=0.2)  # of r = 2 at 0: |I|
    assert "orthogonality" not in terms(orthogonal=0)


# ------------------------------------------------------------------------------------------ importance, masks
def small(**options: Any) -> Adalora:
    """Two matrices, r = 2."""
    options = {"rank": 1, "initial_rank": 2, "targets": "attention.o", "every": 1} | options
    return plugin_of(Stack(tiny("llama"), [Adalora(**options)]))


def test_importance_by_hand() -> None:
    plugin = small(beta1=0.5, beta2=0.25)
    path, delta = next(iter(plugin.deltas.items()))
    memory: dict[str, Tensor] = {}
    for factor in (1.0, 3.0):
        for p, value in ((delta.A, 2.0), (delta.E, -1.0), (delta.B, 1.0)):
            nn.init.constant_(p, value)
            p.grad = torch.full_like(p, -factor)
        with torch.no_grad():
            plugin.sense(memory)
    # E: |w g| = 1, I' = .5, U' = .75 * .5 = .375; then 3, I' = 1.75, U' = .25 * .375 + .75 * 1.25 = 1.03125
    assert torch.allclose(memory[f"{path}.E"][:, 0, 0], torch.tensor([1.75, 1.03125]))
    s = 1.75 * 1.03125
    assert torch.allclose(plugin.importance(path, memory), torch.full((2, 1), s + 4 * s + s))  # A: 2 and 2
    memory[f"{path}.A"][:, 0, 0] = 0  # one of 32 entries of row 0 of Q
    memory[f"{path}.B"][:, 0, 1] = 0  # one of 32 of column 1 of P
    expected = torch.tensor([[6 * s - 4 * s / 32], [6 * s - s / 32]])
    assert torch.allclose(plugin.importance(path, memory), expected)


def memory_of(plugin: Adalora, scores: list[float]) -> dict[str, Tensor]:
    """In which the importance of the singular values, matrix by matrix, is this."""
    memory = {}
    for (path, delta), two in zip(plugin.deltas.items(), (scores[:2], scores[2:]), strict=True):
        memory |= {f"{path}.{name}": torch.zeros(2, *p.shape) for name, p in delta.named_parameters()}
        memory[f"{path}.E"] = torch.tensor([two, [1.0, 1.0]]).unsqueeze(-1)
    return memory


@pytest.mark.parametrize(
    ("scores", "budget", "kept"),
    [
        ([4.0, 1.0, 3.0, 2.0], 3, [True, False, True, True]),
        ([4.0, 1.0, 3.0, 2.0], 2, [True, False, True, False]),
        ([4.0, 3.0, 1.0, 2.0], 2, [True, True, False, False]),  # all of the budget to one matrix
        ([4.0, 3.0, 1.0, 2.0], 4, [True, True, True, True]),
    ],
)
def test_the_most_important_of_all_matrices_stay(scores: list[float], budget: int, kept: list[bool]) -> None:
    plugin = small()
    plugin.choose(budget, memory_of(plugin, scores))
    assert torch.cat([delta.kept.flatten() for delta in plugin.deltas.values()]).tolist() == kept


def test_of_equals_as_many_stay_as_the_budget_has() -> None:
    plugin = small()
    plugin.choose(3, memory_of(plugin, [0.0] * 4))
    assert sum(int(delta.kept.sum()) for delta in plugin.deltas.values()) == 3


def test_what_went_may_come_back_until_the_end() -> None:
    plugin = small(every=4)
    memory = memory_of(plugin, [4.0, 1.0, 3.0, 2.0])

    def after(t: int, span: Span) -> int:
        for delta in plugin.deltas.values():
            nn.init.ones_(delta.E)  # what an optimizer with momentum does
        plugin.allocate(span, t, memory)
        return sum(int(delta.E.count_nonzero()) for delta in plugin.deltas.values())

    prune, final = Span("prune", 2, 10), Span("final", 10, None)
    assert after(1, Span("warmup", 0, 2)) == 4
    assert [after(t, prune) for t in (3, 4, 5, 8, 9)] == [4, 2, 4, 2, 4]
    assert "pruned" not in plugin.state
    assert after(10, prune) == 2  # no multiple of 4, and the last
    assert plugin.state["pruned"]
    assert [after(t, final) for t in (11, 12, 13)] == [2, 2, 2]
    kept = torch.cat([delta.kept.flatten() for delta in plugin.deltas.values()])
    assert kept.tolist() == [True, False, True, False]


def test_a_matrix_that_rests_keeps_what_is_known() -> None:
    plugin = small()
    memory = memory_of(plugin, [4.0, 1.0, 3.0, 2.0])
    before = {name: tensor.clone() for name, tensor in memory.items()}
    with torch.no_grad():
        plugin.sense(memory)  # no gradients
    assert all(torch.equal(memory[name], tensor) for name, tensor in before.items())


# ------------------------------------------------------------------------------------------------- phases
def test_phases_and_what_trains_on_afterwards(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    options = {"rank": 1, "initial_rank": 3, "warmup": 0.2, "prune": 0.4, "every": 1, "targets": "mlp.up"}
    stack, seen = Stack("peftx:tiny", [Adalora(**options)]), []

    def progress(done: int, total: int, values: dict[str, Any]) -> None:
        seen.append(values["adalora"])

    stack.train(rows, steps=5, learning_rate=1e-2, progress=progress)
    assert seen == ["warmup", "prune", "prune", "final", "final"]
    deltas = plugin_of(stack).deltas
    assert sum(int(delta.E.count_nonzero()) for delta in deltas.values()) == len(deltas)

    again = peftx.load(stack.save(tmp_path / "bundle"))
    loaded = plugin_of(again).deltas
    assert all(torch.equal(loaded[path].kept, delta.kept) for path, delta in deltas.items())
    seen.clear()
    again.train(rows, steps=2, learning_rate=1e-2, progress=progress)
    assert seen == ["final", "final"]
    assert all(torch.equal(delta.E != 0, delta.kept) for delta in plugin_of(again).deltas.values())


def test_a_run_too_short_is_refused() -> None:
    rows = [{"prompt": "1 + 1 =", "completion": " 2"}]
    with pytest.raises(PeftxError, match=r"adalora: 'prune' takes the run's 2 steps"):
        Stack("peftx:tiny", [Adalora(rank=1, initial_rank=2)]).train(rows, steps=2)


# ------------------------------------------------------------------------------------------------- options
def test_defaults() -> None:
    config = Adalora().config
    assert (config.rank, config.initial_rank, config.alpha, config.every) == (8, 12, None, 10)
    assert (config.warmup, config.prune, config.orthogonal, config.targets.text) == (0.1, 0.4, 0.1, "all")
    assert (config.beta1, config.beta2) == (0.85, 0.85)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 2.0)])
def test_scale(alpha: float | None, scale: float) -> None:
    plugin = small(initial_rank=4, alpha=alpha)
    assert next(iter(plugin.deltas.values())).low_rank().scale == pytest.approx(scale, rel=3e-6)


def test_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"adalora: rank 33 exceeds the 32x32 matrix model\.layers\.0"):
        small(initial_rank=33)
    assert small(initial_rank=32)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0}, {"initial_rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"warmup": 0.0}, {"prune": 0.0},
        {"every": 0}, {"beta1": 1.0}, {"beta2": 1.0}, {"beta1": -0.1}, {"beta2": -0.1}, {"orthogonal": -1.0},
        {"orthogonal": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Adalora: {next(iter(options))}"):
        Adalora(**options)


def test_a_target_above_the_start_is_refused() -> None:
    with pytest.raises(PeftxError, match="rank 4 is more than initial_rank 3"):
        Adalora(rank=4, initial_rank=3)
    assert Adalora(rank=1, initial_rank=1, alpha=0.5, beta1=0, beta2=0, warmup=0.01, prune=0.01)
