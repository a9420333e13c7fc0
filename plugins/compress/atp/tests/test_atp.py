"""ATP: masks that a generator makes, LoRA beside them, and a model that is smaller in the end."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Stack, TrainStep
from peftx.engines.data import Collator, tokenize_dataset
from peftx.engines.training.feeders import Feeder
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.testing import conformance
from peftx.testing.models import PAD, example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import NarrowLinear, QuantLinear
from peftx_atp import Atp, MaskedLora, Narrow, mismatch, proximal
from peftx_bottleneck_adapter import BottleneckAdapter
from peftx_cfsp import CFSP
from peftx_full_finetuning import FullFinetuning
from peftx_hft import Hft
from peftx_hypertuning import Hypertuning
from peftx_layernorm_tuning import LayernormTuning
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prefix_grouper import PrefixGrouper
from peftx_prefix_tuning import PrefixTuning
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("atp")

ROWS = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(8)]
OTHERS = {"validation": [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(8, 12)]}


def stack_of(arch: str = "llama", *others: Any, model: Any = None, **options: Any) -> Stack:
    options = {"rank": 3, "dropout": 0.0, **options}
    return Stack(model or tiny(arch), [Atp(**options), *others], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> Atp:
    return stack.plugins["atp"]  # type: ignore[return-value]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return output_of(model.eval(), example_inputs(model))


def filled(stack: Stack, *, gone: float = 0.4, seed: int = 0) -> list[Tensor]:
    """Masks drawn at random, with something left of each, and LoRA that adds something; the masks."""
    plugin, random = plugin_of(stack), torch.Generator().manual_seed(seed)
    g = plugin.generator
    g.d.copy_((torch.rand(len(g.d), generator=random) >= gone).float())
    for part in g.d.split(g.sizes):
        part[3] = 1
    with torch.no_grad():
        for delta in plugin.deltas.values():
            delta.B.copy_(torch.randn(delta.B.shape, generator=random) / 10)
    return list(g.d.split(g.sizes))


def project(plugin: Atp, rate: float, *, index: int = 0, total: int | None = None) -> None:
    """As behind an update; without a `total` t is T."""
    step = SimpleNamespace(index=index, total=total, rate=lambda plugin: rate)
    plugin.project(plugin.generator.d == 0, step)  # type: ignore[arg-type, union-attr]


def step_of(stack: Stack, **options: Any) -> TrainStep:
    """A step, whose batches of `validation` are always the same rows."""
    collate, found = Collator(PAD), {}
    for name, rows in {"train": ROWS, **OTHERS}.items():
        data = as_training_data(stack, rows, seed=0, max_length=64)
        found[name] = tokenize_dataset(data.train, stack.tokenizer, format=data.format, max_length=64)
    feeder = Feeder(found["validation"], collate, size=4, seed=0, name="validation")
    return TrainStep(stack, collate(list(found["train"])), sources={"validation": feeder}, **options)


def made_step(stack: Stack, kind: Any = torch.optim.SGD, rate: float = 0.1, **options: Any) -> None:
    stack.model.train()
    optimizer = kind([p for p in stack.model.parameters() if p.requires_grad], lr=rate)
    stack.run_train_step(step_of(stack, learning_rate=rate, **options))
    optimizer.step()


# -------------------------------------------------------------------------------------------------- the generator
def test_nearly_all_is_kept_at_first() -> None:
    """At zero logits P(s >= 0.5) = P(g >= -b) = 1 - exp(-exp(b)): for b = 3 all, for b = -1 three in ten."""
    for shift, expected in ((3.0, 1 - math.exp(-math.exp(3))), (-1.0, 1 - math.exp(-math.exp(-1)))):
        g = plugin_of(stack_of(shift=shift)).generator
        for U in g.U:
            nn.init.zeros_(U.weight)
        with torch.no_grad():
            kept = torch.stack([g() >= 0.5 for _ in range(60)]).float().mean()  # of 7680
        assert float(kept) == pytest.approx(expected, abs=0.02)


def test_soft_masks_by_hand() -> None:
    stack = stack_of(shift=-1.0, temperature=0.7)
    g = plugin_of(stack).generator.eval()
    with torch.no_grad():
        s = g(torch.Generator().manual_seed(5))
        h = g.norm(g.transformer(g.e[None]))[0]
        o = torch.cat([g.U[0].weight @ h[0], g.U[1].weight @ h[1]])
    u = torch.rand(len(o), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(s, torch.sigmoid((o - (-u.log()).log() - 1) / 0.7))
    torch.testing.assert_close(g.e @ g.e.T, torch.eye(2))  # orthogonal, one for each layer
    assert g.sizes == [8, 8, 48] * 2


def test_hard_masks_have_the_gradient_of_soft_ones_and_keep_the_largest() -> None:
    g = plugin_of(stack_of()).generator
    s = torch.full((128,), 0.2)
    s[[2, 5, 9, 30]] = torch.tensor([0.5, 0.49, 0.3, 0.9])  # of the second structure all lie below 0.5
    s[70] = 0.21
    s.requires_grad_()
    d = g.hard(s)
    kept = d.detach().nonzero()[:, 0].tolist()
    assert [n for n in kept if n < 64] == [2, 9, 30]
    assert [n for n in kept if 64 <= n < 72] == [70]
    (d * torch.arange(128.0)).sum().backward()
    assert torch.equal(s.grad, torch.arange(128.0))


def test_mismatch_is_zero_at_p_and_symmetric() -> None:
    assert float(mismatch(torch.tensor(0.3), 0.3)) == pytest.approx(0, abs=1e-6)
    one, two = mismatch(torch.tensor(0.8), 0.4), mismatch(torch.tensor(0.4), 0.8)
    assert float(one) == pytest.approx(math.log(2))
    assert float(two) == pytest.approx(math.log(2))


def test_the_share_that_is_left_comes_to_p() -> None:
    """By R alone, from all that is kept at first; the mean of the last fifty masks."""
    torch.manual_seed(0)
    g = plugin_of(stack_of()).generator.eval()  # without dropout
    optimizer, seen = torch.optim.AdamW(g.parameters(), lr=3e-3), []
    for _ in range(220):
        P = g.share(g.hard(g()))
        optimizer.zero_grad()
        (5 * mismatch(P, 0.6)).backward()
        optimizer.step()
        seen.append(P.item())
    assert seen[0] > 0.99
    assert sum(seen[-50:]) / 50 == pytest.approx(0.6, rel=0.02)


def test_the_task_reaches_the_generator_and_leaves_lora_alone() -> None:
    """Its gradient is that of loss + match R under live masks; d of LoRA's own step is a constant."""
    stack = stack_of(shift=0.0, match=2.0, density=0.3, dropout=0.5)
    plugin, step = plugin_of(stack), step_of(stack)
    filled(stack)
    stack.model.train()
    before = [p.detach().clone() for p in stack.ledger.parameters("atp")]
    torch.manual_seed(3)
    plugin.learn(plugin.generator, step)
    found = [p.grad.clone() for p in plugin.generator.parameters()]
    assert stack.model.training  # and it was not, so that LoRA dropped nothing
    assert plugin.generator.live is None
    assert all(delta.B.grad is None and delta.A.grad is None for delta in plugin.deltas.values())
    assert all(torch.equal(p, old) for p, old in zip(stack.ledger.parameters("atp"), before, strict=True))
    g = plugin.generator
    torch.manual_seed(3)
    stack.model.eval()
    g.train()
    g.live = g.hard(g())
    task = stack.model(**step.batch_of("validation")).loss
    only_task = torch.autograd.grad(task, list(g.parameters()), retain_graph=True)
    loss = task + 2 * mismatch(g.share(g.live), 0.3)
    expected = torch.autograd.grad(loss, list(g.parameters()))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert max(float(x.abs().max()) for x in only_task) > 1e-4


def test_micro_batches_add_up() -> None:
    stack = stack_of(shift=0.0)
    plugin = plugin_of(stack)
    plugin.generator.eval()
    for _ in range(2):
        torch.manual_seed(3)
        plugin.learn(plugin.generator, step_of(stack, micro=0, accumulation=2))
    both = [p.grad.clone() for p in plugin.generator.parameters()]
    stack.model.zero_grad()
    torch.manual_seed(3)
    plugin.learn(plugin.generator, step_of(stack))
    for p, sum_of in zip(plugin.generator.parameters(), both, strict=True):
        torch.testing.assert_close(p.grad, sum_of, rtol=1e-3, atol=1e-6)


def test_the_generator_has_a_rate_of_its_own() -> None:
    moved = {}
    for rate in (1.0, 10.0):
        stack = stack_of(control=1, generator_rate=rate)
        p, B = plugin_of(stack).generator.U[0].weight, plugin_of(stack).deltas["model.layers.0.mlp.up_proj"].B
        before = p.detach().clone(), B.detach().clone()
        torch.manual_seed(0)
        made_step(stack, total=2)
        moved[rate] = p.detach() - before[0], B.detach() - before[1]
    torch.testing.assert_close(moved[10.0][0], 10 * moved[1.0][0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moved[10.0][1], moved[1.0][1])
    assert float(moved[1.0][0].abs().max()) > 0


def test_all_processes_draw_the_same_masks() -> None:
    """Whatever their own generators gave before."""
    found = []
    for seed in (1, 2):
        stack = stack_of(control=1, shift=0.0)
        torch.manual_seed(seed)
        made_step(stack, total=2)
        found.append(plugin_of(stack).generator.d.clone())
    assert torch.equal(*found)
    assert 0 < found[0].mean() < 1
    stack = stack_of(control=2, shift=0.0)
    made_step(stack, total=3, index=1)
    assert not torch.equal(plugin_of(stack).generator.d, found[0])  # in another step others
    stack = stack_of(control=1, shift=0.0)
    made_step(stack, total=2, micro=1, accumulation=2)
    assert plugin_of(stack).generator.d.all()  # the first micro-batch draws for all


# --------------------------------------------------------------------------------------------------------- the masks
def test_all_kept_is_lora() -> None:
    stack, plain = stack_of(), Stack(tiny("llama"), [Lora(rank=3, alpha=3)], tokenizer=tiny_tokenizer())
    plugin = plugin_of(stack)
    filled(stack, gone=0.0)
    for part in plain.ledger.of("lora"):
        part.module.A.data, part.module.B.data = (getattr(plugin.deltas[part.path], n).data for n in "AB")
    torch.testing.assert_close(logits(stack.model), logits(plain.model), rtol=1e-4, atol=1e-5)
    assert set(plugin.deltas) == {part.path for part in plain.ledger.of("lora")}
    own = {name.rpartition("generator.")[2] for name in stack.ledger.tensors("atp")}
    assert {"d", "e"} <= own
    assert "cost" not in own  # the weights tell it


def zeroed(model: nn.Module, masks: list[Tensor]) -> nn.Module:
    """The model with the rows into each structure at zero, biases too."""
    with torch.no_grad():
        for layer, (qk, v, channels) in zip(
            model.model.layers, [masks[i : i + 3] for i in (0, 3)], strict=True
        ):
            attention, mlp = layer.self_attn, layer.mlp
            for m, d in ((attention.q_proj, qk), (attention.k_proj, qk), (attention.v_proj, v),
                         (mlp.gate_proj, channels), (mlp.up_proj, channels)):  # fmt: skip
                rows = d.repeat(m.out_features // len(d))
                m.weight *= rows[:, None]
                if m.bias is not None:
                    m.bias *= rows
    return model


def with_biases(arch: str) -> nn.Module:
    model = tiny(arch)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(torch.linspace(-0.3, 0.4, len(p)))
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_masks_are_on_what_goes_into_a_structure_and_not_on_lora(arch: str) -> None:
    """The same mask in all heads; queries with keys, and values and channels each by themselves."""
    stack = stack_of(arch, model=with_biases(arch))
    masks = filled(stack)
    expected = Stack(zeroed(with_biases(arch), masks), [Lora(rank=3, alpha=3)], tokenizer=tiny_tokenizer())
    for part in expected.ledger.of("lora"):
        part.module.A.data, part.module.B.data = (
            getattr(plugin_of(stack).deltas[part.path], n).data for n in "AB"
        )
    torch.testing.assert_close(logits(stack.model), logits(expected.model), rtol=1e-4, atol=1e-5)


def test_merged_masks_are_on_the_weights_and_not_on_lora() -> None:
    stack = stack_of("qwen2", model=with_biases("qwen2"))
    filled(stack)
    before = logits(stack.model)
    stack.merge("atp")
    torch.testing.assert_close(logits(stack.model), before, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_lora_alone_while_it_trains() -> None:
    stack = stack_of(dropout=0.5)
    filled(stack)
    delta = plugin_of(stack).deltas["model.layers.0.mlp.down_proj"]
    assert isinstance(delta, MaskedLora)
    x, y = torch.ones(2000, 48), torch.zeros(2000, 32)
    delta.train()
    found = delta(x, y).detach()
    assert float(found.std(0).max()) > 1e-3
    torch.testing.assert_close(found.mean(0), delta.eval()(x, y)[0].detach(), rtol=0.1, atol=0.03)


# ------------------------------------------------------------------------------------------------------- projection
def test_proximal_by_hand() -> None:
    one, two = torch.tensor([[[3.0]], [[0.3]], [[1.0]]]), torch.tensor([[[4.0]], [[0.4]], [[1.0]]])
    proximal([one, two], torch.tensor([True, True, False]), 1.0)  # norms 5 and 0.5 of what goes
    assert one.flatten().tolist() == pytest.approx([3 * 4 / 5, 0, 1])
    assert two.flatten().tolist() == pytest.approx([4 * 4 / 5, 0, 1])
    zero = torch.zeros(1, 2, 2)
    proximal([zero], torch.tensor([True]), 1.0)
    assert torch.equal(zero, torch.zeros(1, 2, 2))


def lora_of(plugin: Atp) -> list[list[list[Tensor]]]:
    """Of each structure and dimension: what LoRA has of it, one row or column for each head."""
    found = []
    for layer in range(2):
        path = f"model.layers.{layer}"
        D = plugin.deltas
        q, k, v, o = (D[f"{path}.self_attn.{n}_proj"] for n in "qkvo")
        gate, up, down = (D[f"{path}.mlp.{n}_proj"] for n in ("gate", "up", "down"))
        heads = [[m.B[j::8] for m in (q, k)] for j in range(8)]
        values = [[v.B[j::8], o.A[:, j::8]] for j in range(8)]
        found += [heads, values, [[gate.B[j], up.B[j], down.A[:, j]] for j in range(48)]]
    return found


@pytest.mark.parametrize(("index", "total"), [(0, None), (0, 10), (4, 10)])
def test_projection_shrinks_what_is_removed(index: int, total: int | None) -> None:
    """eta = beta lr (e^(t/T) - 1) / (e - 1) times the structure's share in all that is removed."""
    stack = stack_of(beta=40.0)
    plugin, masks = plugin_of(stack), filled(stack)
    before = [[[x.detach().clone() for x in group] for group in each] for each in lora_of(plugin)]
    project(plugin, 0.1, index=index, total=total)
    t = 1 if total is None else index / total
    gone = sum(int((d == 0).sum()) for d in masks)
    for old, new, d in zip(before, lora_of(plugin), masks, strict=True):
        eta = 40 * 0.1 * (math.exp(t) - 1) / (math.e - 1) * int((d == 0).sum()) / gone
        for was, now, kept in zip(old, new, d, strict=True):
            n = math.sqrt(sum(float(x.square().sum()) for x in was))
            factor = 1 if kept else max(n - eta, 0) / n
            for x, y in zip(was, now, strict=True):
                torch.testing.assert_close(y.detach(), factor * x, rtol=1e-4, atol=1e-6)


def test_projection_follows_every_update() -> None:
    stack = stack_of(control=1, beta=1e9)
    filled(stack)
    masks = plugin_of(stack).generator.d.clone()
    for index in (1, 2):
        made_step(stack, total=3, index=index)  # of the second phase
        assert torch.equal(plugin_of(stack).generator.d, masks)
        for group, d in zip(lora_of(plugin_of(stack)), masks.split([8, 8, 48] * 2), strict=True):
            sizes = torch.tensor([sum(float(x.detach().abs().sum()) for x in parts) for parts in group])
            assert torch.equal(sizes > 0, d > 0)


# ----------------------------------------------------------------------------------------------------- narrow tensors
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_narrow_model_computes_what_the_masked_one_did(arch: str, tmp_path: Path) -> None:
    """Once LoRA is gone from what is removed; with biases of queries, keys and values in Qwen 2."""
    stack = stack_of(arch, model=with_biases(arch))
    plugin, masks = plugin_of(stack), filled(stack)
    project(plugin, 1e9)
    masked, share = logits(stack.model), float(plugin.generator.share(plugin.generator.d))
    stack.compress()
    torch.testing.assert_close(logits(stack.model), masked, rtol=1e-4, atol=1e-5)
    layers = {name: m for name, m in stack.model.named_modules() if isinstance(m, Narrow | NarrowLinear)}
    assert len(layers) == 14
    assert sum(isinstance(m, NarrowLinear) for m in layers.values()) == 6  # the feed-forward parts
    base = tiny(arch)
    whole = sum(base.get_submodule(name).weight.numel() for name in layers)
    numbers = {name: m.W if isinstance(m, Narrow) else m.weight for name, m in layers.items()}
    assert sum(W.numel() for W in numbers.values()) == pytest.approx(share * whole)
    heads, kv = base.config.num_attention_heads, base.config.num_key_value_heads
    qk, v, channels = (int(d.sum()) for d in masks[:3])
    into, rest = [(heads * qk, 32), (kv * qk, 32), (kv * v, 32)], [(channels, 32), (channels, 32)]
    shapes = [tuple(W.shape) for W in list(numbers.values())[:7]]
    assert shapes == [*into, (32, heads * v), *rest, (32, channels)]
    assert plugin.state["kept"] == [[int(d.sum()), len(d)] for d in masks]
    assert not any(name.startswith("peftx") for name, _ in stack.model.named_children())  # no generator
    path = stack.save(tmp_path / "bundle")
    loaded = peftx.load(path, tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded.model), logits(stack.model))
    assert plugin_of(loaded).generator is None
    assert sum(p.numel() for p in loaded.ledger.tensors("atp").values()) < 0.75 * whole


def test_without_projection_something_is_lost() -> None:
    stack = stack_of()
    filled(stack)
    masked = logits(stack.model)
    stack.compress()
    assert float((logits(stack.model) - masked).abs().max()) > 1e-2


def test_a_narrow_layer_shows_its_old_matrix() -> None:
    """What others read of it: W and b with zeros, and they make the same."""
    stack = stack_of("qwen2", model=with_biases("qwen2"))
    filled(stack)
    stack.compress()
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for name in ("q_proj", "v_proj", "o_proj"):
        layer = getattr(stack.model.model.layers[1].self_attn, name)
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert bool((layer.weight == 0).all(1 if name != "o_proj" else 0).any())
    assert layer.bias is None


def test_a_narrow_model_goes_on_with_another_adapter(tmp_path: Path) -> None:
    """Nothing of ATP trains then, and rows to validate on are no longer asked for."""
    stack = Stack(tiny("llama"), [Atp(), Lora(rank=2)], tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["atp"])
    filled(stack)
    stack.compress()
    for each in (stack, peftx.load(stack.save(tmp_path / "bundle"), tokenizer=tiny_tokenizer())):
        each.inject()
        report = each.train(ROWS, steps=2, learning_rate=1e-2)
        assert [math.isfinite(loss) for _, loss in report.losses] == [True] * len(report.losses)
        assert {owner for owner in ("atp", "lora") if list(each.ledger.parameters(owner))} == {"lora"}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_packed_after_it(arch: str, tmp_path: Path) -> None:
    """What is packed: the narrow feed-forward part, and matrices of heads with zeros where dimensions are gone."""
    stack, narrow = (stack_of(arch, *others, model=with_biases(arch)) for others in ((NF4Storage(),), ()))
    for each in (stack, narrow):
        filled(each)
        each.compress(ids=["atp"])
    torch.testing.assert_close(logits(stack.model), logits(narrow.model), rtol=1e-5, atol=1e-6)
    stack.compress()
    packed, small = stack.model.model.layers[1], narrow.model.model.layers[1]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        layer, W = packed.get_submodule(name), small.get_submodule(name).weight
        assert isinstance(layer, QuantLinear)
        assert layer.weight.shape == W.shape
        assert torch.equal(layer.weight[W == 0], W[W == 0])
        torch.testing.assert_close(layer.weight, W, rtol=0, atol=0.2 * float(W.abs().max()))
    assert packed.mlp.up_proj.out_features < 48
    again = peftx.load(stack.save(tmp_path / "bundle"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again.model), logits(stack.model))


def test_recovered_by_an_adapter_and_packed(tmp_path: Path) -> None:
    """The adapter stands on matrices of heads too, and folds into them, with their zeros, before they are packed."""
    plugins = [Atp(rank=2), Lora(rank=2), NF4Storage()]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["atp"])
    filled(stack)
    stack.compress(ids=["atp"])
    stack.inject(["lora"])
    stack.train(ROWS, steps=2, learning_rate=1e-2)
    before = stack.model.model.layers[0].self_attn.q_proj.weight.clone()
    stack.compress(ids=["nf4"])
    assert not torch.equal(stack.model.model.layers[0].self_attn.q_proj.weight, before)
    again = peftx.load(stack.save(tmp_path / "bundle"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again.model), logits(stack.model))


def test_a_classifiers_head_trains_along_and_stays(tmp_path: Path) -> None:
    stack = stack_of(model=tiny("llama", head="classification"))
    filled(stack)
    project(plugin_of(stack), 1e9)
    with torch.no_grad():
        stack.model.score.weight.add_(1.0)
    masked, head = logits(stack.model), stack.model.score.weight.detach().clone()
    stack.compress()
    assert torch.equal(stack.model.score.weight, head)
    torch.testing.assert_close(logits(stack.model), masked, rtol=1e-4, atol=1e-5)
    again = peftx.load(stack.save(tmp_path / "bundle"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again.model), logits(stack.model))


def test_channels_go_once_more_after_it() -> None:
    """CFSP reads the narrow feed-forward part as any."""
    stack = stack_of("llama", CFSP(ratio=0.5, multiple=1))
    filled(stack)
    stack.compress(["a text to calibrate on, which is long enough for that, and more of it"] * 8)
    kept = stack.plugins["cfsp"].state["kept"]
    assert [whole for _, whole in kept] == [n for n, of in plugin_of(stack).state["kept"] if of == 48]
    up = [layer.mlp.up_proj.out_features for layer in stack.model.model.layers]
    assert up == [n for n, _ in kept]
    assert sum(up) < sum(whole for _, whole in kept)


def test_what_trains_a_narrow_layer_is_refused() -> None:
    plugins = [Atp(rank=2), FullFinetuning(targets="mlp")]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.inject(["atp"])
    filled(stack)
    stack.compress()
    with pytest.raises(ConflictError, match=r"'full-finetuning' stands on .*, which 'atp' pruned"):
        stack.inject()


def test_a_run_prunes_and_tunes() -> None:
    stack = stack_of(density=0.6, control=20)
    with pytest.raises(PeftxError, match="validation"):
        stack.train(ROWS, steps=24)
    seen: list[Any] = []
    plugin = plugin_of(stack)

    def note(done: int, total: int, values: Any) -> None:
        seen.append((values["atp"], plugin.generator.d.clone()))

    report = stack.train(
        ROWS, steps=24, batch_size=4, learning_rate=3e-3, sources=OTHERS, progress=note, max_length=32
    )
    phases = [phase for phase, _ in seen]
    assert phases == ["prune"] * 20 + ["tune"] * 4
    assert all(torch.equal(d, seen[19][1]) for _, d in seen[19:])
    assert plugin.state["fixed"]
    assert set(plugin.finished()) == set(plugin.generator.parameters())
    assert not any(p.requires_grad for p in plugin.generator.parameters())
    assert [phase.name for phase in plugin.phases()] == ["tune"]
    assert report.losses[-1][1] < report.losses[0][1]
    left = float(plugin.generator.share(plugin.generator.d))
    assert left < 0.9
    assert stack.evaluate(ROWS, metrics=["atp"])["left"].value == pytest.approx(left)
    stack.compress()
    assert plugin.phases() == ()
    assert stack.evaluate(ROWS, metrics=["atp"])["left"].value == pytest.approx(left)
    assert stack.generate("3 plus one is", max_new_tokens=2)


def test_the_plan_says_what_is_saved_once_masks_have_come_to_p(tmp_path: Path) -> None:
    """Heads and channels in other shares than p, of all weights p."""
    data = "{train: peftx:sample/train.jsonl, sources: {validation: peftx:sample/held_out.jsonl}}"
    stack = "[{use: atp, phase: after-training, with: {density: 0.6}}]"
    spec = f"peftx: 1\nmodel: peftx:tiny\ndata: {data}\nstack: {stack}\noutput: {tmp_path / 'out'}\n"
    found = plan(load_run(spec + "train: {steps: 2}\n").pipeline)
    assert not found.conflicts
    assert "'atp': at least" in found.stages[-1].detail
    saved = []
    for heads in (0.625, 1.0):
        stack = Stack("peftx:tiny", [Atp(density=0.6)])
        filled(stack, gone=0)
        g = plugin_of(stack).generator
        whole, of_channels = (float(cost.sum()) for cost in (g.cost, g.cost[g.cost == g.cost[-1]]))
        channels = (0.6 * whole - heads * (whole - of_channels)) / of_channels
        for d, size in zip(g.d.split(g.sizes), g.sizes, strict=True):
            d[round(size * (heads if size < 100 else channels)) :] = 0
        assert float(g.share(g.d)) == pytest.approx(0.6, abs=0.002)
        stack.compress(keep=False)
        folder = stack.save(tmp_path / str(heads))
        saved.append(sum(file.stat().st_size for file in folder.rglob("*.safetensors")))
    assert saved == pytest.approx([found.totals.bundle_bytes] * 2, rel=0.02)


# ------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0}, "density"),
        ({"density": 1}, "density"),
        ({"control": 1.5}, "whole"),
        ({"rank": 0}, "rank"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Atp: .*{match}"):
        Atp(**options)


def test_a_density_that_leaves_no_head() -> None:
    """One dimension of the heads and one channel in each layer are 16 (1 / 8) 2 ... of the weights, by hand."""
    config = tiny("llama").config
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    least = (2 * (heads + kv) + 3) / (2 * 8 * (heads + kv) + 3 * 48)
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PeftxError, match=r"atp: density .* leaves no dimension of a head") as error:
        stack_of(model=model, density=least * 0.99)
    assert f"{least:.2%}" in str(error.value.hint)
    assert {name: torch.equal(p, before[name]) for name, p in model.named_parameters()} == dict.fromkeys(
        before, True
    )
    stack_of(density=least * 1.01)
    assert width == 32


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5", "mamba", "bloom", "mixtral", "opt", "phi3"])
def test_models_without_such_layers(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"atp narrows decoders.*{arch} has 0 such layers"):
        stack_of(arch)


def test_a_packed_model() -> None:
    stack = Stack(tiny("llama"), [NF4Storage(), Atp(rank=2)], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(None, ["nf4"])
    with pytest.raises(
        ConflictError, match=r"'nf4' packs the layers that 'atp', which .* is to narrow"
    ) as error:
        stack.inject()
    assert error.value.hint == "put 'atp' before 'nf4'"


@pytest.mark.parametrize("other", [Lora(rank=2), Hft()])
def test_others_on_the_same_layers(other: Any) -> None:
    name = type(other).__name__.lower()
    for plugins in ([Atp(rank=2), other], [other, Atp(rank=2)]):
        with pytest.raises(ConflictError, match=rf"'{name}' stands on .*, which 'atp' is to prune"):
            Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    Stack(tiny("llama"), [Atp(rank=2), Lora(rank=2, targets="head")], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("other", [PromptTuning, PrefixTuning, LayernormTuning, BottleneckAdapter])
@pytest.mark.parametrize("first", [True, False])
def test_others_beside_the_layers(other: Any, first: bool, tmp_path: Path) -> None:
    plugins = [Atp(rank=2, control=1, shift=0.0), other(**other.example)]
    stack = Stack(tiny("llama"), plugins if first else plugins[::-1], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=2, sources=OTHERS)
    stack.compress(ids=["atp"])
    assert plugins[0].state["left"] < 0.99
    loaded = peftx.load(stack.save(tmp_path / "bundle"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(loaded.model), logits(stack.model))


@pytest.mark.parametrize(
    ("other", "after", "match"),
    [
        (Hypertuning, True, "copies the model"),
        (PrefixGrouper, False, "lays out rows otherwise"),
    ],
)
def test_others_on_the_wrong_side(other: Any, after: bool, match: str) -> None:
    mine, theirs = Atp(rank=2), other(**other.example)
    plugins = [mine, theirs] if after else [theirs, mine]
    place = "after" if after else "before"
    with pytest.raises(ConflictError, match=rf"stands {place} 'atp', and {match}"):
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    if other in (Hypertuning, PrefixGrouper):  # which go in the other order
        Stack(tiny("llama"), plugins[::-1], tokenizer=tiny_tokenizer())


def test_what_is_merged_is_not_narrowed() -> None:
    stack = stack_of()
    filled(stack)
    stack.merge("atp")
    with pytest.raises(PeftxError, match="it is merged, and masks in weights"):
        stack.compress()
    stack.unmerge()
    stack.compress()
    assert isinstance(stack.model.model.layers[0].self_attn.q_proj, Narrow)
    stack = stack_of()
    stack.merge("atp", keep=False)
    with pytest.raises(PeftxError, match="'atp' was folded into the weights for good"):
        stack.compress()


def test_compression_ahead_of_the_training_is_refused() -> None:
    stack = Stack(tiny("llama"), [Atp(rank=2)], tokenizer=tiny_tokenizer(), inject=False)
    with pytest.raises(PeftxError, match="no masks yet") as error:
        stack.compress()
    assert "phase: after-training" in str(error.value.hint)
