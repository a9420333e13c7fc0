from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Stack, TrainStep
from peftx.errors import ArchitectureError, ConflictError, PeftxError, PluginError
from peftx.kernel.chain import is_ours
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.phases import Span
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx.toolkits.compression import NarrowLinear
from peftx_apt import Adapter, Apt, Match, excess_kurtosis, within
from peftx_bitmod import BitMoD
from peftx_cfsp import CFSP
from peftx_full_finetuning import FullFinetuning
from peftx_lemo import Lemo
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prefix_tuning import PrefixTuning
from peftx_prompt_tuning import PromptTuning
from peftx_sk_tuning import SkTuning

test_conformance = conformance("apt")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
SHORT: dict[str, Any] = {
    "density": 0.4,
    "rank": 2,
    "max_rank": 8,
    "tune": 0,
    "prune": 4,
    "times": 4,
    "fade": 2,
}


def build(
    *others: object, arch: str = "llama", before: tuple[object, ...] = (), model: Any = None, **options: Any
) -> Stack:
    plugins = [*before, Apt(**{**SHORT, **options}), *others]
    return Stack(tiny(arch) if model is None else model, plugins, tokenizer=tiny_tokenizer())


def trained(*others: object, steps: int = 6, **options: Any) -> Stack:
    stack = build(*others, **options)
    loop(stack, steps)
    return stack


def loop(stack: Stack, steps: int, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=rate)
    stack.model.train()
    for _ in range(steps):
        stack.train_step(batch_of(stack), optimizer=optimizer)
    stack.model.eval()


def batch_of(stack: Stack) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def plugin_of(stack: Stack) -> Apt:
    return stack.plugins["apt"]  # type: ignore[return-value]


def logits(stack: Stack | nn.Module) -> Tensor:
    model = stack.model if isinstance(stack, Stack) else stack
    with torch.no_grad():
        return output_of(model.eval(), example_inputs(model))


def randomize(stack: Stack) -> None:
    with torch.no_grad():
        for p in stack.ledger.parameters("apt"):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)


def kept(stack: Stack) -> list[list[bool]]:
    return [mask.kept.tolist() for _, mask in plugin_of(stack).masks]


def numbers(stack: Stack) -> int:
    return sum(b.cost * int(mask.kept.sum()) for b, mask in plugin_of(stack).masks)


def ranks(stack: Stack) -> list[int]:
    return [int(a.live.sum()) for a in plugin_of(stack).adapters.values()]


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masks_act_on_what_blocks_give() -> None:
    """The model with a mask is the plain one with these columns of W_o and W_down scaled."""
    stack, plain = build(), tiny("llama")
    for i, (b, mask) in enumerate(plugin_of(stack).masks):
        mask.level.copy_(torch.arange(b.count) % 3)
        m = (torch.arange(b.count) % 3 / 2).repeat_interleave((16, 1)[i % 2])
        plain.get_submodule(b.out.path).weight.data.mul_(m)
    torch.testing.assert_close(logits(stack), logits(plain), rtol=1e-4, atol=1e-5)


def test_what_a_block_costs() -> None:
    """With two queries a key: 2 * 8 rows of W_q, 8 of W_k and W_v, 16 columns of W_o, and biases; d = 32."""
    (heads, _), (neurons, _) = plugin_of(build(arch="qwen2")).masks[:2]
    assert (heads.count, heads.width, neurons.count) == (2, 16, 48)
    assert heads.cost == (16 + 8 + 8) * (32 + 1) + 16 * 32
    assert neurons.cost == 3 * 32
    (heads, _), (neurons, _) = plugin_of(build(arch="bert")).masks[:2]
    assert (heads.count, heads.cost) == (4, 3 * 8 * 33 + 8 * 32)
    assert neurons.cost == 33 + 32


def test_masks_fall_in_steps_and_return() -> None:
    stack = build(fade=4)
    plugin, (_, mask) = plugin_of(stack), plugin_of(stack).masks[1]
    mask.kept[:3] = False
    final, seen = Span("final", 0, None), []
    for t in range(6):
        plugin.move(final, t, {})
        seen.append(float(mask.m()[0]))
    assert seen == [0.75, 0.5, 0.25, 0, 0, 0]
    assert mask.m()[3:].eq(1).all()
    mask.kept[0] = True
    plugin.move(final, 6, {})
    assert mask.m()[:3].tolist() == [0.25, 0, 0]


# -- salience --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_salience_by_hand(accumulation: int) -> None:
    """|dL/dH| and |H| summed over the batch by hooks on a plain model, and |B * dL/dB| of the rows into a block."""
    stack = build(distil=False, beta=0.0)
    randomize(stack)
    plugin, found = plugin_of(stack), {}
    batch, memory = batch_of(stack), {}
    batch["attention_mask"][1, -3:] = 0
    batch["labels"][1, -3:] = -100
    places = {b.out.path: b for b, _ in plugin.masks}
    for path in places:
        stack.model.get_submodule(path).register_forward_pre_hook(
            lambda m, x, p=path: found.update({p: x[0]})
        )
    with torch.enable_grad():
        loss = stack.model(**batch).loss
    H = {path: h for path, h in found.items() if not h.retain_grad()}
    loss.backward()
    real = batch["attention_mask"].bool()
    expected = {}
    for path, b in places.items():
        g, h = (x[real].abs().sum(0) for x in (H[path].grad, H[path].detach()))
        expected[path] = (g * h).view(b.count, -1).sum(1)
        for site, _ in b.into:
            if a := plugin.adapters.get(site.path):
                expected[path] += (a.B * a.B.grad).abs().sum(1).view(b.count, -1).sum(1)
    strength = {path: (a.B * a.B.grad).abs().sum() for path, a in plugin.adapters.items()}
    stack.model.zero_grad()
    stack.model.train()
    for micro in range(accumulation):
        step = TrainStep(stack, batch, micro=micro, accumulation=accumulation, memory={"apt": memory})
        stack.run_train_step(step)
    for path, b in places.items():
        # Twice the same batch at half the weight: gradients as before, and values twice.
        torch.testing.assert_close(
            memory[path].detach(), expected[path].detach() + (accumulation - 1) * blockwise(H, path, b, real)
        )
        powers = torch.stack([(H[path][real].detach() ** k).mean(0) for k in (1, 2, 3, 4)])
        torch.testing.assert_close(memory[f"{path} H"], powers, rtol=1e-4, atol=1e-6)
    for path, value in strength.items():
        torch.testing.assert_close(memory[path], value)


def blockwise(H: dict[str, Tensor], path: str, b: Any, real: Tensor) -> Tensor:
    g, h = (x[real].abs().sum(0) for x in (H[path].grad, H[path].detach()))
    return (g * h).view(b.count, -1).sum(1)


def test_a_layer_that_was_left_out_weighs_nothing() -> None:
    stack, memory = build(), {}
    plugin = plugin_of(stack)
    plugin.sense(memory)
    plugin.choose(0.4, memory)
    plugin.enlarge(1.5, memory)
    assert memory[plugin.masks[0][0].out.path].tolist() == [0, 0]
    assert [one.index(True) for one in kept(stack)] == [0] * 4


def test_salience_is_smoothed() -> None:
    stack, memory = build(distil=False, beta=0.75), {}
    plugin = plugin_of(stack)
    path = plugin.masks[1][0].out.path
    for value in (1.0, 3.0):
        for b, mask in plugin.masks:
            mask.sums = torch.full((7, b.count * b.width), value)
        plugin.sense(memory)
    assert memory[path].tolist() == [0.75 * 0.25 + 0.25 * 9] * 48


def test_kurtosis_is_that_of_all_products() -> None:
    g = torch.Generator().manual_seed(0)
    H, W = torch.randn(50, 6, generator=g).double() ** 3, torch.randn(7, 6, generator=g).double() + 0.5
    powers = torch.stack([(H**k).mean(0) for k in (1, 2, 3, 4)])
    found = excess_kurtosis(powers, W, 3)
    for block in range(2):
        products = (H[:, None] * W)[:, :, 3 * block : 3 * block + 3].flatten()
        off = products - products.mean()
        assert float(found[block]) == pytest.approx(float((off**4).mean() / (off**2).mean() ** 2 - 3))
    assert excess_kurtosis(torch.zeros(4, 6), W, 3).tolist() == [0, 0]


def test_outliers_count() -> None:
    """Of blocks alike in S the one with the heavier tail stays."""
    stack = build()
    plugin = plugin_of(stack)
    memory = {b.out.path: torch.ones(b.count) for b, _ in plugin.masks}
    for b, _ in plugin.masks:
        memory[f"{b.out.path} H"] = torch.tensor([0.0, 1, 0, 3]).repeat(b.count * b.width, 1).T.contiguous()
        memory[f"{b.out.path} H"][3, b.width : 2 * b.width] = 3e4
    plugin.choose(0.4, memory)
    assert all(one[1] for one in kept(stack))


# -- the budget ------------------------------------------------------------------------------------------------------


def test_within_the_budget_by_hand() -> None:
    scores, costs = [torch.tensor([4.0, 30.0]), torch.tensor([1.0, 5, 2, 0])], [10, 1]
    # Densities 0.4, 3 | 1, 5, 2, 0: the best of each group first, then 2, 1, 0.4, 0.
    assert [x.tolist() for x in within(scores, costs, 11)] == [[False, True], [False, True, False, False]]
    assert [x.tolist() for x in within(scores, costs, 13)] == [[False, True], [True, True, True, False]]
    assert [x.tolist() for x in within(scores, costs, 22)] == [[False, True], [True, True, True, False]]
    assert [x.tolist() for x in within(scores, costs, 23)] == [[True, True], [True, True, True, False]]
    assert all(x.all() for x in within(scores, costs, 24))
    assert [int(x.sum()) for x in within([torch.zeros(2), torch.zeros(3)], [10, 1], 11)] == [1, 1]


def test_every_choice_keeps_to_a_falling_budget() -> None:
    stack = build(prune=8, times=4, distil=False, arch="bert")
    total, seen, spent = sum(b.cost * b.count for b, _ in plugin_of(stack).masks), [], []
    choose = plugin_of(stack).choose

    def noted(share: float, memory: dict[str, Tensor]) -> None:
        choose(share, memory)
        seen.append(share)
        spent.append(numbers(stack))

    plugin_of(stack).choose = noted  # type: ignore[method-assign]
    loop(stack, 10)
    assert seen == pytest.approx([0.4 + 0.6 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)])
    assert all(n <= share * total for n, share in zip(spent, seen, strict=True))
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] > 0.35 * total
    assert all(any(one) for one in kept(stack))
    assert plugin_of(stack).density() == spent[-1] / total


def test_what_a_run_remembers_is_gone_when_it_has_pruned() -> None:
    stack = trained(steps=3)
    assert stack.memory["apt"]
    assert [phase.name for phase in plugin_of(stack).phases()] == ["prune", "final"]
    loop(stack, 1)
    assert not stack.memory["apt"]


def test_a_second_run_prunes_no_further() -> None:
    stack = trained()
    before, grown = kept(stack), ranks(stack)
    assert [phase.name for phase in plugin_of(stack).phases()] == ["final"]
    loop(stack, 2)
    assert (kept(stack), ranks(stack)) == (before, grown)


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_larger_ranks_leave_the_function() -> None:
    stack = build(max_rank=16)
    randomize(stack)
    plugin = plugin_of(stack)
    for a in plugin.adapters.values():
        a.B.data[:, 2:] = 0  # as they are in training: no gradient has reached them
    before = logits(stack)
    plugin.enlarge(3.0, {path: torch.tensor(1.0) for path in plugin.adapters})
    assert ranks(stack).count(6) == 3
    assert torch.equal(logits(stack), before)


def test_columns_behind_the_rank_do_not_train_before_it_grows() -> None:
    stack = trained(steps=3, grow=1.0)
    assert ranks(stack) == [2] * 6
    for a in plugin_of(stack).adapters.values():
        assert not a.B[:, 2:].any()
        assert a.B[:, :2].any()
    plugin_of(stack).enlarge(2.0, {path: torch.tensor(1.0) for path in plugin_of(stack).adapters})
    loop(stack, 1)
    assert plugin_of(stack).adapters["model.layers.0.self_attn.q_proj"].B[:, 2:4].any()


def test_the_upper_half_grows_within_the_budget() -> None:
    stack = build()
    plugin = plugin_of(stack)
    memory = {path: torch.tensor(float(i)) for i, path in enumerate(plugin.adapters)}  # q, v, up of 2 layers
    plugin.enlarge(1.5, memory)
    assert ranks(stack) == [2, 2, 2, 3, 3, 3]
    plugin.enlarge(1.6, memory)
    assert ranks(stack) == [2, 2, 2, 3, 3, 3]  # 3 * 1.6 / 1.5 is no 4
    plugin.enlarge(4.8, memory)
    assert ranks(stack) == [2, 2, 2, 8, 8, 8]  # at most max_rank

    # Of 1.3 times 2 * 2 * (64 + 48 + 80) numbers 230.4 are free: two rows of up, and one of v out of the 70.4 then.
    stack = build()
    plugin = plugin_of(stack)
    plugin.state["grown"] = 0.5
    plugin.enlarge(1.3, memory)
    assert ranks(stack) == [2, 2, 2, 2, 3, 4]

    stack = build()  # rows of blocks that are gone leave room
    plugin = plugin_of(stack)
    for _, mask in plugin.masks:
        mask.kept[1:] = False
    plugin.enlarge(1.0, memory)
    assert ranks(stack) == [2] * 6
    plugin.state["grown"] = 0.5
    plugin.enlarge(1.0, memory)
    assert ranks(stack) == [2, 2, 2, 4, 4, 4]


def test_nothing_pruned_and_nothing_grown_is_lora() -> None:
    mine = build(density=1.0, grow=1.0, distil=False, alpha=6.0)
    lora = Stack(tiny("llama"), [Lora(rank=2, alpha=6.0, targets="attention.q,v mlp.up")])
    with torch.no_grad():
        for path, a in plugin_of(mine).adapters.items():
            (delta,) = [p.module for p in lora.ledger.of("lora") if p.path == path]
            delta.A.copy_(a.A[:2])
    for stack in (mine, lora):
        loop(stack, 6)
    torch.testing.assert_close(logits(mine), logits(lora), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(mine), logits(tiny("llama")), atol=1e-2)


# -- the teacher -----------------------------------------------------------------------------------------------------


def terms(stack: Stack, index: int) -> dict[str, float]:
    phases = {"apt": [["tune", 0, 2], ["prune", 2, 6], ["final", 6, 9]]}
    step = TrainStep(stack, batch_of(stack), index=index, memory={"phases": phases})
    stack.model.train()
    stack.run_train_step(step)
    return step.losses


def test_the_teacher_has_its_own_adapters_and_no_masks() -> None:
    """Its states are those of a stack that never pruned; the student's those of the model in training."""
    stack, teacher = build(), build()
    for one in (stack, teacher):
        randomize(one)
    plugin, batch = plugin_of(stack), batch_of(stack)
    copies = {key: p.detach().clone() for key, p in plugin.trained().items()}
    batch["attention_mask"][1, -4:] = 0
    real, match = batch["attention_mask"].bool(), plugin.match
    with torch.no_grad():
        for p in stack.ledger.parameters("apt"):
            p.mul_(1.5)
        for _, mask in plugin.masks:
            mask.level[0] = 0
        states = []
        for one in (stack, teacher):
            seen: list[Tensor] = []
            hooks = [
                m.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y))
                for m in plugin_of(one).layers
            ]
            one.model(**batch)
            states.append(seen)
            for hook in hooks:
                hook.remove()
        expected = 0.0
        for A, B, h, goal in zip(match.A, match.B, *states, strict=True):
            expected += float(((h + (h @ A.T) @ B.T - goal)[real] ** 2).mean())
    phases = {"apt": [["tune", 0, 2], ["prune", 2, 6], ["final", 6, 9]]}
    step = TrainStep(stack, batch, index=5, memory={"phases": phases, "apt": copies})
    stack.model.train()
    now = {key: p.detach().clone() for key, p in plugin.trained().items()}
    loss = stack.run_train_step(step)
    task = step.losses["task"]
    assert step.losses["apt"] == pytest.approx(expected, rel=1e-4)
    assert step.losses["apt task"] == task
    assert float(loss) == pytest.approx(task + 0.75 * (expected - task), rel=1e-4)
    assert not any(mask.off for _, mask in plugin.masks)
    assert all(torch.equal(p, now[key]) for key, p in plugin.trained().items())
    assert expected > 0.01


def test_the_teacher_is_the_model_that_the_pruning_began_with() -> None:
    stack, memory = build(), dict[str, Tensor]()
    assert set(terms(stack, 1)) == set(terms(stack, 6)) == {"task"}  # before it, and behind T
    randomize(stack)
    with torch.no_grad():
        plugin_of(stack).match.B.zero_()  # T is 1
    phases = {"apt": [["tune", 0, 2], ["prune", 2, 6], ["final", 6, 9]]}
    step = TrainStep(stack, batch_of(stack), index=2, memory={"phases": phases, "apt": memory})
    stack.model.train()
    stack.run_train_step(step)
    assert step.losses["apt"] == pytest.approx(0, abs=1e-9)
    assert all(torch.equal(memory[key], p) for key, p in plugin_of(stack).trained().items())
    assert set(terms(build(distil=False), 2)) == {"task"}


def test_it_tunes_before_it_prunes() -> None:
    stack = build(tune=2)
    assert [phase.name for phase in plugin_of(stack).phases()] == ["tune", "prune", "final"]
    loop(stack, 2)
    assert all(all(one) for one in kept(stack))
    assert any(a.B.any() for a in plugin_of(stack).adapters.values())
    shares, choose = [], plugin_of(stack).choose

    def noted(share: float, memory: dict[str, Tensor]) -> None:
        shares.append(share)
        choose(share, memory)

    plugin_of(stack).choose = noted  # type: ignore[method-assign]
    loop(stack, 6)
    assert shares == pytest.approx([0.4 + 0.6 * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)])
    assert plugin_of(stack).state["grown"] == 4
    stack.compress()


def test_t_begins_as_one() -> None:
    match = Match(2, 3, 8).requires_grad_(False)
    h = [torch.randn(2, 4, 8) for _ in range(2)]
    assert float(match.loss(h, h, None)) == 0
    assert float(match.loss(h, [x + 2 for x in h], None)) == pytest.approx(8)


def test_the_teacher_runs_without_dropout_and_gradients() -> None:
    stack, modes = build(model=tiny("llama", attention_dropout=0.5)), []
    stack.model.model.layers[0].register_forward_hook(
        lambda m, x, y: modes.append((m.training, torch.is_grad_enabled()))
    )
    terms(stack, 2)
    assert modes == [(True, True), (False, False)]
    assert stack.model.training


# -- a smaller model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "bert", "gemma2"])
def test_the_narrow_model_computes_what_the_masked_one_did(arch: str, tmp_path: Path) -> None:
    stack = trained(arch=arch)
    masked, chosen, costs = logits(stack), kept(stack), [b.cost for b, _ in plugin_of(stack).masks]
    size, gone = (
        stack.base_parameters(),
        sum(cost * one.count(False) for cost, one in zip(costs, chosen, strict=True)),
    )
    assert gone > 0
    biases = sum(b.out.bias is not None and b.out.out_features for b, _ in plugin_of(stack).masks)
    stack.compress(keep=False)
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-5)
    own = sum(p.numel() for p in stack.model.parameters())
    assert own == sum(p.numel() for p in tiny(arch).parameters()) - gone
    assert not any(is_ours(name) for name, _ in stack.model.named_modules())
    assert size - stack.base_parameters() >= gone - biases
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle")
    assert torch.equal(logits(again), logits(stack))
    assert sum(p.numel() for p in again.model.parameters()) == own
    assert plugin_of(again).state == plugin_of(stack).state


def test_shapes_follow_the_blocks() -> None:
    stack = trained(arch="qwen2")
    heads, neurons = (sum(one) for one in kept(stack)[:2])
    stack.compress()
    layer = stack.model.model.layers[0]
    shapes = {
        name: tuple(p.shape)
        for name, p in layer.named_parameters()
        if name.endswith(("proj.weight", "proj.bias"))
    }
    assert shapes["self_attn.q_proj.weight"] == (16 * heads, 32)
    assert shapes["self_attn.q_proj.bias"] == (16 * heads,)
    assert shapes["self_attn.k_proj.weight"] == shapes["self_attn.v_proj.weight"] == (8 * heads, 32)
    assert shapes["self_attn.o_proj.weight"] == (32, 16 * heads)
    assert shapes["mlp.up_proj.weight"] == shapes["mlp.gate_proj.weight"] == (neurons, 32)
    assert shapes["mlp.down_proj.weight"] == (32, neurons)
    assert heads == 1
    assert neurons < 48


def test_it_generates_when_it_is_narrow() -> None:
    stack = trained()
    before = stack.generate("Once upon a time", max_new_tokens=6)
    stack.compress()
    assert stack.generate("Once upon a time", max_new_tokens=6) == before


def test_products_become_fewer() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    stack, flops = trained(density=0.3), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            logits(stack)
        flops.append(counter.get_total_flops())
        if len(flops) == 1:
            stack.compress()
    assert flops[1] < 0.8 * flops[0]


def test_what_was_replaced_comes_back() -> None:
    stack = trained()
    stack.compress()
    assert all(isinstance(part.module, NarrowLinear) for part in stack.ledger.of("apt", ReplacedPart))
    stack.remove("apt")
    assert torch.equal(logits(stack), logits(tiny("llama")))


def test_metrics() -> None:
    bare = Stack(tiny("llama"), [Apt(**SHORT)], tokenizer=tiny_tokenizer(), inject=False)
    assert bare.evaluate(["a text"], metrics=["apt"])["density"].value == 1
    stack = trained()
    before = stack.evaluate(["a text"], metrics=["apt"])
    assert before["density"].value == plugin_of(stack).density() <= 0.4
    stack.compress()
    after = stack.evaluate(["a text"], metrics=["apt"])
    assert after["density"].value == before["density"].value
    assert after["parameters"].value < before["parameters"].value


def test_a_classifiers_head_trains_along_and_stays(tmp_path: Path) -> None:
    stack = build(model=tiny("bert", head="classification"))
    inputs = example_inputs(stack.model)
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    stack.model.train()
    for _ in range(6):
        stack.train_step({**inputs, "labels": torch.tensor([0, 1])}, optimizer=optimizer)
    masked, head = logits(stack), stack.model.classifier.weight.detach().clone()
    assert not torch.equal(head, tiny("bert", head="classification").classifier.weight)
    stack.compress()
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-5)
    assert torch.equal(stack.model.classifier.weight, head)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))
    stack.remove("apt")
    assert torch.equal(logits(stack), logits(tiny("bert", head="classification")))


def test_it_comes_back_in_the_middle(tmp_path: Path) -> None:
    stack = trained(steps=4)
    levels = [mask.level.tolist() for _, mask in plugin_of(stack).masks]
    assert any(0 < n < 2 for one in levels for n in one)
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), logits(stack))
    assert [mask.level.tolist() for _, mask in plugin_of(again).masks] == levels
    assert ranks(again) == ranks(stack)
    loop(again, 2)
    again.compress()


def test_bfloat16() -> None:
    stack = trained(model=tiny("llama").bfloat16())
    masked = logits(stack)
    stack.compress()
    assert {p.dtype for p in stack.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(stack), masked, rtol=0.1, atol=0.1 * float(masked.abs().max()))


# -- stacks ----------------------------------------------------------------------------------------------------------


def test_what_stands_before_it_is_folded() -> None:
    for other in (Lora(rank=2), FullFinetuning(targets="mlp")):
        stack = trained(before=(other,))
        masked = logits(stack)
        stack.compress()
        torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-4)


def test_tokens_that_others_leave_out() -> None:
    stack = build(Lemo(layers=[0, 1], block=2, hidden=8, predictor_steps=2))
    stack.train(ROWS, steps=6, batch_size=2, learning_rate=1e-3)
    assert all(any(one) and not all(one) for one in kept(stack))


def test_packed_after_it(tmp_path: Path) -> None:
    stack = trained(NF4Storage())
    stack.compress()
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_adapted_after_it(tmp_path: Path) -> None:
    """A run behind the compression trains the other plugin alone, and sees no phases."""
    stack = Stack(tiny("llama"), [Apt(**SHORT), Lora(rank=2)], tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["apt"])
    loop(stack, 6)
    stack.compress()
    narrow = logits(stack)
    stack.inject()
    assert torch.equal(logits(stack), narrow)
    assert set(stack.train(ROWS, steps=2, learning_rate=1e-2).terms) == {"task"}
    assert not torch.equal(logits(stack), narrow)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_soft_tokens_of_others() -> None:
    for options in ({"before": (PromptTuning(length=3),)}, {}):
        stack = trained(*(() if options else (PromptTuning(length=3),)), **options)
        masked = logits(stack)
        stack.compress()
        torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_heads_that_others_edit_are_refused(first: bool) -> None:
    plugins = [PrefixTuning(), Apt(**SHORT)]
    with pytest.raises(ConflictError, match="'prefix-tuning' edits attention by its heads, and 'apt'"):
        Stack(tiny("llama"), plugins if first else plugins[::-1], tokenizer=tiny_tokenizer())


def test_what_stands_on_its_layers_goes_before_it() -> None:
    for other in (Lora(rank=2), FullFinetuning(targets="mlp")):
        with pytest.raises(ConflictError, match=r"stands on .*proj, which 'apt' is to prune") as raised:
            build(other)
        assert "before 'apt'" in str(raised.value.hint)
    stack = Stack(tiny("llama"), [Apt(**SHORT), FullFinetuning(targets="mlp")], inject=False)
    stack.inject(["apt"])
    loop(stack, 6)
    stack.compress()
    with pytest.raises(ConflictError, match=r"'full-finetuning' stands on .*proj, which 'apt' pruned"):
        stack.inject()


def test_packed_before_it_is_refused() -> None:
    with pytest.raises(ConflictError, match="'nf4' packs the layers that 'apt'") as raised:
        build(before=(NF4Storage(),))
    assert raised.value.hint == "put 'apt' before 'nf4'"

    stack = Stack(tiny("llama"), [BitMoD(), Apt(**SHORT)], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["bitmod"], samples=4, length=24)
    with pytest.raises(ConflictError, match=r"apt: model.layers.0.self_attn.q_proj is packed already"):
        stack.inject()


def test_pruned_before_it(tmp_path: Path) -> None:
    """What another plugin made narrower it makes narrower still."""
    plugins = [CFSP(ratio=0.3, multiple=8), Apt(**SHORT)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["cfsp"], samples=4, length=24)
    stack.inject()
    loop(stack, 6)
    masked = logits(stack)
    stack.compress()
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-5)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_another_loss_is_refused_while_it_distils() -> None:
    head = SkTuning(labels=["no", "yes"])
    with pytest.raises(ConflictError, match="'sk-tuning' brings another") as raised:
        build(head)
    assert "distil: false" in str(raised.value.hint)
    build(head, distil=False)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_bad_options() -> None:
    for wrong in (
        {"density": 0.0},
        {"density": 1.1},
        {"rank": 0},
        {"grow": 0.5},
        {"fade": 0},
        {"times": 0},
        {"prune": 0},
    ):
        with pytest.raises(PluginError, match=f"Apt: {next(iter(wrong))}"):
            Apt(**wrong)
    with pytest.raises(PluginError, match="max_rank 4 is less than rank 8"):
        Apt(max_rank=4)


def test_less_than_a_head_is_refused() -> None:
    """One of two groups of heads and one of 48 neurons: (1536 + 96) / (2 * 1536 + 48 * 96)."""
    least = 1632 / 7680
    with pytest.raises(
        ArchitectureError, match=r"apt: density 0.2 is less than one head and one neuron"
    ) as raised:
        build(density=0.2)
    assert f"{math.ceil(1000 * least) / 1000:g} at least" in str(raised.value.hint)
    stack = trained(density=math.ceil(1000 * least) / 1000, arch="llama")
    assert [sum(one) for one in kept(stack)] == [1, 1, 1, 1]
    stack.compress()
    assert logits(stack).isfinite().all()


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("gpt2", "layer 0 of gpt2 has no heads between plain linear layers"),
        ("mixtral", "layer 0 of mixtral has no neurons"),
        ("t5", "of one tower of text"),
        ("vit", "of one tower of text"),
        ("gemma3n", "layer 2 of gemma3n_text has no heads"),
        ("opt", "opt counts its heads itself"),
    ],
)
def test_models_it_has_no_place_on(arch: str, said: str) -> None:
    model = tiny(arch)
    before = dict(model.named_parameters())
    with pytest.raises(ArchitectureError, match=f"apt: .*{said}"):
        Stack(model, [Apt(**SHORT)])
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())


def test_layers_that_no_block_follows_are_refused() -> None:
    for role in ("attention.o", "mlp.down"):
        with pytest.raises(ArchitectureError, match="leads into no heads or neurons") as raised:
            build(targets=role)
        assert f"'!{role}'" in str(raised.value.hint)


def test_a_run_too_short_for_masks_to_fall() -> None:
    stack = build(fade=4, tune=1)
    with pytest.raises(PeftxError, match="apt: masks take 4 steps to fall, and 2 are left") as raised:
        stack.train(ROWS, steps=7, batch_size=2)
    assert "smaller `tune`, `prune` or `fade`" in str(raised.value.hint)
    assert not any(a.B.any() for a in plugin_of(stack).adapters.values())  # no step was made
    stack.train(ROWS, steps=8, batch_size=2)  # the last of the pruning is the first of these
    stack.compress()


def test_processes_that_choose_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = build()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        PeftxError,
        match="'apt' trains in one process, and there are 2: each would choose blocks by its own rows",
    ):
        loop(stack, 1)


def test_masks_that_still_fall_are_refused() -> None:
    stack = trained(steps=4, fade=3)
    masked = logits(stack)
    with pytest.raises(PeftxError, match="apt: masks of blocks that are to go have not fallen") as raised:
        stack.compress()
    assert "train 2 steps more" in str(raised.value.hint)
    assert torch.equal(logits(stack), masked)
    loop(stack, 2)
    stack.compress()


def test_no_masks_to_go_by() -> None:
    stack = Stack(tiny("llama"), [Apt(**SHORT)], inject=False)
    with pytest.raises(ConflictError, match="apt: there are no masks on the model") as raised:
        stack.compress()
    assert "after-training" in str(raised.value.hint)
    stack = trained()
    stack.merge("apt")
    with pytest.raises(ConflictError, match="in the weights already") as raised:
        stack.compress()
    assert "stack.unmerge()" in str(raised.value.hint)
    stack.unmerge()
    stack.compress()
    stack = trained()
    stack.merge("apt", keep=False)
    with pytest.raises(ConflictError, match="in the weights already"):
        stack.compress()


def test_without_training_nothing_goes() -> None:
    stack = build()
    stack.compress()
    assert torch.equal(logits(stack), logits(tiny("llama")))
    assert plugin_of(stack).state["density"] == 1


def test_adapters_have_room_in_small_matrices() -> None:
    a = next(iter(plugin_of(build(arch="qwen2", max_rank=64, targets="attention.k")).adapters.values()))
    assert isinstance(a, Adapter)
    assert a.A.shape == (16, 32)
    with pytest.raises(PeftxError, match="rank 17 exceeds the 16x32 matrix"):
        build(arch="qwen2", rank=17, max_rank=64, targets="attention.k")


def test_packed_rows_are_refused() -> None:
    """Scores and the teacher's lesson are of tokens that the mask of a row tells from pads."""
    stack = Stack(tiny("llama"), [Apt(**Apt.example)], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="'apt' may look across the tokens of a row"):
        stack.train(ROWS, steps=1, batch_size=2, packing=True)
