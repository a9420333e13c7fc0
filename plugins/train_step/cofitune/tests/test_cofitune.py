from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

import peftx
from peftx import Stack, Targets, TrainStep
from peftx.engines.data import Collator
from peftx.engines.training.feeders import Feeder
from peftx.errors import ArchitectureError, DataError, PeftxError, TargetError
from peftx.kernel.seeds import seeded
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_cofitune import MODULES, RANGES, Cofitune, climb, gated, normalised
from peftx_lora import Lora

test_conformance = conformance("cofitune")

ALL = {"targets": "attention mlp", "depth": (0, 1), "dropout": 0.2}
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
TEXTS = [{"text": text} for text in ("Snow is white.", "Two and two are four, and one is less.", "No.")]


def stack_of(arch: str = "llama", *others: Any, model: dict[str, Any] | None = None, **options: Any) -> Stack:
    plugins = [Cofitune(**{"dropout": 0.2} | options), *others]
    return Stack(tiny(arch, **(model or {})), plugins, tokenizer=tiny_tokenizer())


def feeder(texts: list[dict[str, str]], name: str = "general") -> Feeder:
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["text"]).input_ids for row in texts]
    table = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
    return Feeder(table, Collator(tokenizer.pad_token_id), size=2, seed=0, name=name)


def batch_of(stack: Stack, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model, seed=seed, padding="right")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def plugin_of(stack: Stack) -> Cofitune:
    found = stack.plugins["cofitune"]
    assert isinstance(found, Cofitune)
    return found


def own_steps(stack: Stack, count: int = 1, kind: Any = torch.optim.AdamW, **options: Any) -> None:
    trained = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = kind(trained, **({"lr": 1e-2} | options))
    for seed in range(count):
        stack.train_step(batch_of(stack, seed), optimizer=optimizer, sources={"general": feeder(TEXTS)})


def fixed(stack: Stack, value: float | None = None) -> Stack:
    """With factors that are given, and not measured: one for all rows that train, or those that lie in [0.2, 1]."""
    plugin = plugin_of(stack)
    plugin.state["measured"] = True
    torch.manual_seed(1)
    for soft in plugin.soft.values():
        soft.kept.copy_(
            torch.full_like(soft.kept, value) if value is not None else 0.2 + 0.8 * torch.rand_like(soft.kept)
        )
    return stack


def copies(stack: Stack) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in stack.model.named_parameters()}


def moves(stack: Stack, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.detach() - before[n] for n, p in stack.model.named_parameters()}


def importance(stack: Stack, **texts: list[dict[str, str]]) -> dict[Any, Tensor]:
    feeders = {name: feeder(rows, name="general") for name, rows in (texts or {"general": TEXTS}).items()}
    return plugin_of(stack).importance(TrainStep(stack, batch_of(stack), sources=feeders))


def gradients(stack: Stack) -> dict[str, Tensor]:
    stack.train_step(batch_of(stack), sources={"general": feeder(TEXTS)})
    return {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.grad is not None}


def plain_gradients(stack: Stack) -> dict[str, Tensor]:
    parameters = {n: p for n, p in stack.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(stack.model(**batch_of(stack)).loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def test_normalised_by_hand() -> None:
    J = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, std sqrt(14 / 3)
    expected = torch.tanh(torch.tensor([2.0, 1.0, 0.0, 3.0]) / (14 / 3) ** 0.5)
    torch.testing.assert_close(normalised(J), expected)
    torch.testing.assert_close(normalised(-0.1 * J + 7), expected)  # T, and the number of tokens, cancel


def test_gates_by_hand() -> None:
    x = torch.arange(1.0, 7.0).view(1, 6)
    assert gated(x, torch.tensor([1.0, 10.0, 0.0])).tolist() == [[1, 2, 30, 40, 0, 0]]
    assert torch.equal(gated(x, torch.ones(3)), x)
    assert gated(x.bfloat16(), torch.ones(3)).dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_importance_by_products_of_values_and_gradients(arch: str) -> None:
    """dL/dm = sum over tokens of x dL/dx at each gate, of both passes; pads count in no pass."""
    stack = stack_of(arch, **ALL)
    found = importance(stack)
    model = tiny(arch)
    anatomy = Stack(model).anatomy
    model.requires_grad_(True)
    seen: dict[Any, list[Tensor]] = {}

    def look(key: Any, x: Tensor) -> None:
        x.retain_grad()
        seen.setdefault(key, []).append(x)

    for site in [s for s in anatomy.sites if s.role in ("attention.o", "mlp.down")]:

        def before(_: nn.Module, args: Any, key: Any = (site.layer, site.role, "in")) -> None:
            look(key, args[0])

        def after(_: nn.Module, args: Any, y: Tensor, key: Any = (site.layer, site.role, "out")) -> Tensor:
            look(key, y)
            return dropout(y, 0.2)

        site.module.register_forward_pre_hook(before)
        site.module.register_forward_hook(after)
    sums: dict[Any, Tensor] = {}
    with seeded(0, "cofitune:general"):
        for batch in feeder(TEXTS).first(32):
            seen.clear()
            real = batch["attention_mask"].bool()
            logs = [
                model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits.log_softmax(-1)
                for _ in range(2)
            ]
            (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[real].sum().backward()
            for key, xs in seen.items():
                sums[key] = sums.get(key, 0) + sum((x * x.grad).flatten(0, -2).sum(0) for x in xs).detach()
    assert len(found) == 3 * 2
    for key in found:
        J = sums[key]
        J = J.view(4, -1).sum(1) if key[1:] == ("attention.o", "in") else J
        torch.testing.assert_close(found[key], normalised(J), atol=1e-3, rtol=1e-3)
        assert ((found[key] >= 0) & (found[key] <= 1)).all()
        assert found[key].std() > 0.01


def test_measuring_leaves_no_trace() -> None:
    stack = stack_of("llama", Lora(rank=2), **ALL)
    stack.model.train()
    batch = batch_of(stack)
    before = stack.model(**batch).logits
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    importance(stack)
    assert torch.equal(torch.rand(4), expected)
    assert all(module.training for module in stack.model.modules())
    assert all(p.grad is None for p in stack.model.parameters())
    assert torch.equal(stack.model(**batch).logits, before)


def test_importance_is_of_the_base_and_the_same_each_time() -> None:
    alone = importance(stack_of(**ALL))
    stack = stack_of("llama", Lora(rank=2), **ALL)
    with torch.no_grad():
        for p in stack.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    beside = importance(stack)
    assert all(torch.equal(alone[key], beside[key]) for key in alone)


def test_the_largest_importance_of_several_texts() -> None:
    one, two = TEXTS[:2], [{"text": "A dog ran home."}]
    both = importance(stack_of(texts=("a", "b"), **ALL), a=one, b=two)
    apart = [importance(stack_of(texts=(n,), **ALL), **{n: rows}) for n, rows in (("a", one), ("b", two))]
    for key, largest in both.items():
        assert torch.equal(largest, torch.maximum(apart[0][key], apart[1][key]))
    assert any(
        (apart[0][key] > apart[1][key]).any() and (apart[0][key] < apart[1][key]).any() for key in both
    )


def test_as_many_rows_are_read_as_said() -> None:
    stack = stack_of(rows=2, **ALL)
    read: list[int] = []
    stack.model.register_forward_pre_hook(
        lambda m, args, kw: read.append(len(kw["input_ids"])), with_kwargs=True
    )
    importance(stack)
    assert read == [2, 2]  # two passes


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "bloom"])
def test_gradients_of_rows_by_what_their_gates_say(arch: str) -> None:
    """q, k and v by head, up and gate by unit, down by output; o, which has no gates, as ever."""
    stack = stack_of(arch, **ALL)
    measured, expected = importance(stack), plain_gradients(stack)
    sites = {site.key: site for site in stack.anatomy.sites if site.role.startswith(("attention.", "mlp."))}
    found = gradients(stack)
    assert found.keys() == expected.keys()
    checked = 0
    for site in sites.values():
        group, _, name = site.role.partition(".")
        own = (
            1
            - measured[
                site.layer,
                "attention.o" if group == "attention" else "mlp.down",
                "out" if name == "down" else "in",
            ]
        )
        if name in ("k", "v"):
            heads = stack.anatomy.main.kv_heads
            own = torch.stack([own[g * 4 // heads : (g + 1) * 4 // heads].min() for g in range(heads)])
        if name == "o":
            own = torch.ones(1)
        own = own.repeat_interleave(site.out_features // len(own))
        for leaf in ("weight", "bias"):
            full = f"{site.path}.{leaf}"
            if full not in found:
                continue
            pair = [g[full].mT if site.turned and leaf == "weight" else g[full] for g in (found, expected)]
            if site.rows is not None:
                pair = [site.rows.take(g, 0) for g in pair]
            row = own if leaf == "bias" else own[:, None]
            torch.testing.assert_close(pair[0], pair[1] * row, atol=1e-6, rtol=1e-4)
            checked += 1
    assert checked >= len(sites)


@pytest.mark.parametrize("scale", ["gradient", "update"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_no_importance_is_ordinary_tuning(arch: str, scale: str) -> None:
    """To the bit, under AdamW with a weight decay."""
    stack = fixed(stack_of(arch, scale=scale, **ALL), 1.0)
    plain = tiny(arch)
    names = [n for n, p in stack.model.named_parameters() if p.requires_grad]
    assert names
    optimizer = torch.optim.AdamW([plain.get_parameter(n) for n in names], lr=1e-2, weight_decay=0.1)
    for seed in range(2):
        plain(**batch_of(stack, seed)).loss.backward()
        optimizer.step()
        plain.zero_grad()
    own_steps(stack, 2, weight_decay=0.1)
    assert all(
        torch.equal(p, plain.get_parameter(n)) for n, p in stack.model.named_parameters() if ".soft" not in n
    )


@pytest.mark.parametrize("scale", ["gradient", "update"])
def test_full_importance_freezes_to_the_bit(scale: str) -> None:
    stack = fixed(stack_of(scale=scale, **ALL), 0.0)
    before = copies(stack)
    own_steps(stack, 2, weight_decay=0.1)
    assert not any(move.any() for move in moves(stack, before).values())


def test_all_but_the_region_keeps_its_bits() -> None:
    """Of eight layers the third and fourth, there up and down; of phi3's fused matrix the rows of up."""
    stack = stack_of("phi3", model={"num_hidden_layers": 8})
    before = copies(stack)
    own_steps(stack, 2, weight_decay=0.1)
    moved = {n: move for n, move in moves(stack, before).items() if move.any()}
    assert set(moved) == {
        f"model.layers.{i}.mlp.{n}.weight" for i in (2, 3) for n in ("gate_up_proj", "down_proj")
    }
    for name, move in moved.items():
        if "gate_up" in name:
            assert not move[:48].any()
            assert move[48:].any(1).all()


@pytest.mark.parametrize(
    ("depth", "count", "layers"),
    [
        ((0.25, 0.5), 2, [0]),
        ((0, 1), 3, [0, 1, 2]),
        ((0.5, 0.75), 8, [4, 5]),
        ((0.98, 1), 3, [2]),
        ((0.3, 0.31), 8, [2]),
    ],
)
def test_ranges_of_layers(depth: tuple[float, float], count: int, layers: list[int]) -> None:
    plugin = plugin_of(stack_of(depth=depth, model={"num_hidden_layers": count}))
    assert sorted({site.layer for site in plugin.sites}) == layers


def test_sgd_moves_rows_by_their_factors_and_adam_undoes_them() -> None:
    found, name = {}, "model.layers.0.mlp.up_proj"
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        for scale in ("gradient", "update"):
            for value in (None, 1.0):
                stack = fixed(stack_of(scale=scale, **ALL), value)
                before = copies(stack)
                own_steps(stack, kind=kind, lr=1e-3, weight_decay=0)
                found[kind.__name__, scale, value] = moves(stack, before)[f"{name}.weight"]
    kept = plugin_of(fixed(stack_of(**ALL))).soft[name].kept[:, None]
    soft = {key[:2]: (move, kept * found[(*key[:2], 1.0)]) for key, move in found.items() if key[2] is None}
    for key in (("SGD", "gradient"), ("SGD", "update"), ("AdamW", "update")):
        torch.testing.assert_close(*soft[key], atol=1e-7, rtol=1e-2)
    torch.testing.assert_close(
        found["AdamW", "gradient", None], found["AdamW", "gradient", 1.0], atol=1e-5, rtol=1e-2
    )


def test_what_was_accumulated_is_multiplied_once() -> None:
    stack = fixed(stack_of(**ALL))
    batches = [batch_of(stack, seed) for seed in range(2)]
    total = sum(stack.model(**batch).loss / 2 for batch in batches)
    name = "model.layers.1.mlp.down_proj.weight"
    (expected,) = torch.autograd.grad(total, stack.model.get_parameter(name))
    for i, batch in enumerate(batches):
        stack.train_step(batch, micro=i, accumulation=2)
    kept = plugin_of(stack).soft[name.removesuffix(".weight")].kept
    torch.testing.assert_close(stack.model.get_parameter(name).grad, expected * kept[:, None])


def test_it_is_measured_once_and_goes_on_out_of_a_bundle(tmp_path: Path) -> None:
    stack = stack_of()
    own_steps(stack)
    kept = {path: soft.kept.clone() for path, soft in plugin_of(stack).soft.items()}
    assert all(0 < float(k.min()) < float(k.max()) <= 1 for k in kept.values())
    stack.save(tmp_path)
    loaded = peftx.load(tmp_path, model=tiny("llama"), tokenizer=tiny_tokenizer())
    for each in (stack, loaded):
        each.train_step(batch_of(each))  # without a source
        assert all(torch.equal(soft.kept, kept[path]) for path, soft in plugin_of(each).soft.items())


def test_a_run() -> None:
    stack = stack_of(texts=("general", "train"))
    before = copies(stack)
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-3, sources={"general": TEXTS})
    assert {n.split(".")[2] for n, move in moves(stack, before).items() if move.any()} == {"0"}
    with pytest.raises(DataError, match="cofitune: there is no source 'wide' of rows"):
        stack_of(texts=("wide",)).train(ROWS, steps=1)


@pytest.mark.parametrize("depth", RANGES)
@pytest.mark.parametrize("module", MODULES)
def test_climb_finds_what_was_planted(module: str, depth: tuple[float, float]) -> None:
    asked: list[tuple[str, Any]] = []

    def score(targets: Targets, at: Any) -> tuple[float, float]:
        asked.append((targets.text, at))
        return float(at == depth), 0.5 * (targets.text == module)

    found = climb(score)
    assert (found.best.targets, found.best.depth) == (Targets(module), depth)
    assert len(asked) == len(set(asked)) == len(RANGES) + len(MODULES) - 1
    assert [(each.targets.text, each.depth) for each in found.tried] == asked
    stack_of(targets=module, depth=depth)


def test_climb_keeps_both_scores_of_every_candidate() -> None:
    """What is best at one of the two alone is not taken."""
    scores = {(0.0, 1.0): (9.0, -9.0), (0.25, 0.5): (2.0, 3.0), (0.5, 1.0): (-9.0, 9.0)}

    def score(targets: Targets, at: Any) -> tuple[float, float]:
        return scores.get(at, (0.0, 0.0)) if targets.text == MODULES[0] else (1.0, 2.0)

    found = climb(score)
    assert found.best is found.tried[RANGES.index((0.25, 0.5))]
    assert found.best.unified == 5.0
    told = {(each.targets.text, each.depth): (each.speciality, each.versatility) for each in found.tried}
    for depth in RANGES:
        assert told[MODULES[0], depth] == scores.get(depth, (0.0, 0.0))
    assert all(told[part, (0.25, 0.5)] == (1.0, 2.0) for part in MODULES[1:])
    lines = found.table().splitlines()
    assert len(lines) == 2 + 13
    assert "| attention mlp | 0% to 100% | 9.0000 | -9.0000 | 0.0000 |" in lines
    assert [line for line in lines if "**" in line] == [
        "| **attention mlp** | 25% to 50% | 2.0000 | 3.0000 | 5.0000 |"
    ]


def test_climb_does_not_take_what_diverged() -> None:
    nan = float("nan")
    found = climb(lambda targets, depth: (nan if depth == (0.0, 1.0) else float(depth == (0.5, 1.0)), 0.0))
    assert found.best.depth == (0.5, 1.0)
    assert "| attention mlp | 0% to 100% | nan | 0.0000 | nan |" in found.table()
    with pytest.raises(PeftxError, match="climb: none of 8 candidates has scores that are finite"):
        climb(lambda targets, depth: (nan, 1.0))


def test_the_paper_s_ranges() -> None:
    """Of 40 layers: all, the four quarters, and bottom, middle and top halves."""
    layers = {(round(40 * low), round(40 * high)) for low, high in RANGES}
    quarters = {(0, 10), (10, 20), (20, 30), (30, 40)}
    assert layers == {(0, 40), *quarters, (0, 20), (10, 30), (20, 40)}


def test_refusals() -> None:
    for arch in ("bert", "t5"):
        with pytest.raises(ArchitectureError, match=f"cofitune: {arch} is no decoder"):
            Stack(tiny(arch), [Cofitune()])
    with pytest.raises(ArchitectureError, match=r"cofitune: .*experts \(experts\) is no single matrix"):
        stack_of("mixtral", targets="mlp")
    with pytest.raises(TargetError, match=r"cofitune: .*'mlp\.up' matches nothing"):
        stack_of("mamba")
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(
        ArchitectureError, match=r"cofitune: the attention of model\.layers\.0\..* has one head"
    ):
        stack_of(model=heads, targets="attention")
    own_steps(stack_of(model=heads))
    stack = stack_of()
    with torch.no_grad():
        stack.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        PeftxError, match=r"cofitune: the importance of model\..* cannot be compared among its 48 gates"
    ):
        own_steps(stack)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": (0.5, 0.5)},
        {"depth": (-0.1, 0.5)},
        {"depth": (0.5, 1.1)},
        {"texts": ()},
        {"rows": 0},
        {"dropout": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Cofitune: {next(iter(options))}"):
        Cofitune(**options)
