from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peftx
from peftx import Claim, ModelView, Plugin, Stack, TrainStep, VirtualTokens, hookimpl
from peftx.engines.data import Collator, tokenize_dataset
from peftx.engines.training.feeders import Feeder
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx.toolkits.injecting import LowRankDifference
from peftx_lora import Lora, LoraDelta
from peftx_reglu import Reglu, inverted_hinge, top

test_conformance = conformance("reglu")

NAMES = ("Ann", "Bob", "Cid", "Dora", "Ed", "Fay", "Gus", "Hal")
PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Minsk")
FACTS = [
    {"prompt": f"Where does {name} live?", "completion": f" In {place}."}
    for name, place in zip(NAMES, PLACES, strict=True)
]
FORGET, RETAIN = FACTS[:2], FACTS[2:]
SMALL: dict[str, Any] = {"rank": 4, "retained": 6, "samples": 8}


def stack_of(*before: Plugin, model: nn.Module | None = None, **options: Any) -> Stack:
    plugins = [*before, Reglu(**{**SMALL, **options})]
    return Stack(tiny("llama") if model is None else model, plugins, tokenizer=tiny_tokenizer())


def deltas_of(stack: Stack) -> dict[str, LowRankDifference]:
    plugin = stack.plugins["reglu"]
    assert isinstance(plugin, Reglu)
    return plugin.deltas


def feeders(
    stack: Stack, sources: Mapping[str, Sequence[dict[str, str]]], size: int = 4
) -> dict[str, Feeder]:
    found = {}
    for name, rows in sources.items():
        data = as_training_data(stack, rows, seed=0, max_length=64)
        assert data.train is not None
        examples = tokenize_dataset(data.train, stack.tokenizer, format=data.format, max_length=64)
        found[name] = Feeder(examples, Collator(stack.tokenizer.pad_token_id), size=size, seed=0, name=name)
    return found


def step_of(stack: Stack, *, memory: dict[str, Any] | None = None) -> TrainStep:
    sources = feeders(stack, {"train": RETAIN, "forget": FORGET})
    batch = sources["train"].batch(0)
    return TrainStep(stack, batch, memory={} if memory is None else memory, sources=sources)


def outputs_by_hand(stack: Stack, path: str, rows: Sequence[dict[str, str]]) -> Tensor:
    """H of one layer: each text alone, so that there are no pads; what stands in front of it is left out."""
    seen: list[Tensor] = []
    module = stack.model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, x, y: seen.append(y[0]))
    stack.model.eval()
    with torch.no_grad():
        for feeder in feeders(stack, {"rows": rows}, size=1).values():
            for batch in feeder.first(len(rows)):
                stack.model(**batch)
                seen[-1] = seen[-1][-batch["input_ids"].shape[1] :].double().sum(0)
    handle.remove()
    return torch.stack(seen)


def loss_on(stack: Stack, rows: Sequence[dict[str, str]]) -> float:
    (batch,) = feeders(stack, {"rows": rows}, size=len(rows))["rows"].first(len(rows))
    stack.model.eval()
    with torch.no_grad():
        return float(stack.model(**batch).loss)


# -- the start -------------------------------------------------------------------------------------------------------


def test_the_start_is_of_the_representations_and_changes_nothing() -> None:
    beta = 0.7
    stack = stack_of(beta=beta, rank=2)  # two texts to forget, whose sums span two directions
    path = "model.layers.0.mlp.up_proj"
    H_F, H_R = (outputs_by_hand(stack, path, rows) for rows in (FORGET, RETAIN))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = stack.model(ids).logits
    step = step_of(stack)
    stack.run_train_step(step)
    with torch.no_grad():
        assert torch.equal(stack.model(ids).logits, before), "the function is the same, to the bit"
    W0, delta = stack.model.get_submodule(path).weight, deltas_of(stack)[path]
    difference = (1 - beta) * H_F.t() @ H_F / len(H_F) - beta * H_R.t() @ H_R / len(H_R)
    values, vectors = torch.linalg.eigh(difference)
    Q = vectors[:, values.argsort(descending=True)[:2]].float()
    assert values[-2] > values[-3] + 1e-6, "else the space is not one alone"
    torch.testing.assert_close(delta.B @ delta.B.t(), Q @ Q.t(), rtol=0, atol=1e-4)
    torch.testing.assert_close(delta.B.t() @ delta.B, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(delta.B @ delta.A, Q @ Q.t() @ W0, rtol=0, atol=1e-4)
    assert torch.equal(delta.B, delta.B0)
    assert torch.equal(delta.A, delta.A0)
    Q_R = step.memory["reglu"][path]
    _, vectors = torch.linalg.eigh(H_R.t() @ H_R)
    wanted = vectors[:, -6:].float()
    torch.testing.assert_close(Q_R @ Q_R.t(), wanted @ wanted.t(), rtol=0, atol=1e-3)


def test_beta_0_is_pca_of_the_forgotten_and_beta_1_what_is_least_retained() -> None:
    path = "model.layers.1.self_attn.o_proj"
    plain = stack_of()
    H_F, H_R = (outputs_by_hand(plain, path, rows) for rows in (FORGET, RETAIN))
    for beta, H, largest in ((0.0, H_F, True), (1.0, H_R, False)):
        stack = stack_of(beta=beta, rank=2)
        stack.run_train_step(step_of(stack))
        B = deltas_of(stack)[path].B.double()
        energy = (H @ B).square().sum()
        values = torch.linalg.eigvalsh(H.t() @ H)
        wanted = values[-2:].sum() if largest else values[:2].sum()
        torch.testing.assert_close(energy, wanted, rtol=1e-4, atol=1e-4)


class Soft(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(3)
        self.E = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))

    def rows(self) -> Tensor:
        return self.E


class Prompt(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Soft(model.hidden_size))


@pytest.mark.parametrize("before", [(), (Prompt(),)], ids=["alone", "behind soft tokens"])
def test_neither_pads_nor_soft_tokens_are_summed(before: tuple[Plugin, ...]) -> None:
    stack = stack_of(*before)
    plugin = stack.plugins["reglu"]
    assert isinstance(plugin, Reglu)
    rows = [*FORGET, {"prompt": "Who?", "completion": " Ann, who is by far the oldest of all of them here."}]
    alone, together = (
        plugin.outputs(TrainStep(stack, {}, sources=feeders(stack, {"rows": rows}, size=size)), "rows")
        for size in (1, 3)
    )
    for key, H in alone.items():
        assert H.shape == (3, stack.model.get_submodule(key).out_features)
        assert H.dtype == torch.float64
        torch.testing.assert_close(together[key], H, rtol=1e-4, atol=1e-4)
    path = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(alone[path], outputs_by_hand(stack, path, rows), rtol=1e-5, atol=1e-5)


def test_texts_are_read_without_dropout() -> None:
    stack = stack_of(Lora(rank=2, dropout=0.5))
    plugin = stack.plugins["reglu"]
    assert isinstance(plugin, Reglu)
    for p in stack.ledger.parameters("lora"):
        nn.init.normal_(p)
    stack.model.train()
    one, other = (plugin.outputs(step_of(stack), "train") for _ in range(2))
    assert all(torch.equal(H, other[key]) for key, H in one.items())
    assert stack.model.training


def test_at_most_so_many_texts_are_read() -> None:
    stack = stack_of(samples=3)
    plugin = stack.plugins["reglu"]
    assert isinstance(plugin, Reglu)
    found = plugin.outputs(step_of(stack), "train")
    assert {len(H) for H in found.values()} == {3}


# -- the losses ------------------------------------------------------------------------------------------------------


def test_the_inverted_hinge_by_hand() -> None:
    z = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]).log()
    # Right: 1 + 0.7 - 0.2; wrong: 1 + 0.1 - 0.7.
    assert float(inverted_hinge(z, torch.tensor([0, 2]))) == pytest.approx((1.5 + 0.4) / 2)
    certain = torch.tensor([[30.0, 0.0, 0.0]])
    assert float(inverted_hinge(certain, torch.tensor([1]))) == pytest.approx(0, abs=1e-6)
    z = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = inverted_hinge(5 * z, torch.arange(50) % 7)
    (gradient,) = torch.autograd.grad(loss, z)
    assert 0 <= float(loss.detach()) < 2
    assert bool((gradient.gather(1, (torch.arange(50) % 7)[:, None]) >= 0).all()), "down with the right token"


def test_the_inverted_hinge_of_half_precision_is_taken_in_float32() -> None:
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(inverted_hinge(z, torch.arange(5)), inverted_hinge(z.float(), torch.arange(5)))


def test_orthogonality_is_0_where_the_update_leaves_the_retained_directions_alone() -> None:
    stack = stack_of(targets="mlp.up layers=0")
    plugin, generator = stack.plugins["reglu"], torch.Generator().manual_seed(0)
    assert isinstance(plugin, Reglu)
    ((key, delta),) = plugin.deltas.items()
    o = delta.B.shape[0]
    basis = torch.linalg.qr(torch.randn(o, o, generator=generator)).Q
    Q_R, rest = basis[:, :6], basis[:, 6:]
    delta.B.data = rest @ torch.randn(o - 6, 4, generator=generator)
    assert float(plugin.overlap({key: Q_R}).detach()) < 1e-9
    delta.B.data += Q_R @ torch.randn(6, 4, generator=generator)
    value = plugin.overlap({key: Q_R})
    (gradient,) = torch.autograd.grad(value, delta.B)
    torch.testing.assert_close(gradient, 2 * Q_R @ Q_R.t() @ delta.B.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, (delta.B.t() @ Q_R).norm() ** 2)


@pytest.mark.parametrize("loss", ["hinge", "ascent"])
def test_the_loss_is_the_sum_of_three(loss: str) -> None:
    stack = stack_of(loss=loss, orthogonality=0.3)
    step = step_of(stack)
    total = float(stack.run_train_step(step))
    batch = step.batch_of("forget")
    stack.model.eval()
    z, t = stack.model(**batch).logits[:, :-1].detach(), batch["labels"][:, 1:]
    z, t = z[t >= 0], t[t >= 0]
    forget = inverted_hinge(z, t) if loss == "hinge" else -cross_entropy(z, t)
    bases, deltas = step.memory["reglu"], deltas_of(stack)
    overlap = sum(float((bases[key].t() @ delta.B.detach()).norm() ** 2) for key, delta in deltas.items())
    assert len(bases) == 14
    task = float(stack.model(**step.batch).loss.detach())
    assert overlap > 0
    assert step.losses == pytest.approx(
        {"task": task, "forget": float(forget), "orthogonality": overlap}, rel=1e-4
    )
    assert total == pytest.approx(task + float(forget) + 0.3 * overlap, rel=1e-4)


# -- training --------------------------------------------------------------------------------------------------------


def test_two_kinds_of_inputs_at_right_angles() -> None:
    """One layer whose two kinds of inputs, and what it makes of them, share no direction: what is asked of the one kind
    leaves the other alone; an update that starts at random does not."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    W0 = torch.diag(torch.linspace(2, 1, 12)) @ basis.t()
    F, R = (torch.randn(20, 6, generator=generator) @ part.t() for part in (basis[:, :6], basis[:, 6:]))
    H_F, H_R = F @ W0.t(), R @ W0.t()
    guided, random = LowRankDifference((12, 12), rank=4, scale=2.0), LoraDelta(12, 12, rank=4, scale=2.0)
    with torch.no_grad():
        C_F, C_R = (H.t().double() @ H.double() / len(H) for H in (H_F, H_R))
        Q = top(0.5 * C_F - 0.5 * C_R, 4).float()
        guided.start(Q.t() @ W0, Q)
        random.A.normal_(0, 12**-0.5, generator=generator)
    changes = {}
    for name, delta in (("guided", guided), ("random", random)):
        optimizer = torch.optim.SGD(delta.parameters(), lr=0.02)
        for _ in range(30):
            optimizer.zero_grad()
            (delta(F, H_F) - H_F - 1).square().mean().backward()  # away from H_F
            optimizer.step()
        with torch.no_grad():
            changes[name] = [
                float((delta(x, H.clone()) - H).norm() / H.norm()) for x, H in ((F, H_F), (R, H_R))
            ]
    assert changes["guided"][0] > 0.03
    assert changes["guided"][1] < 1e-5
    assert changes["random"][1] > 0.01


class Packed(Plugin):
    """4-bit weights."""

    claims = {Claim.QUANTIZES}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("all", whole=True):
            site.replace(QuantLinear.from_linear(site.module, bits=4, group_size=16))


def test_starts_over_integers() -> None:
    stack = Stack(tiny("llama"), [Packed(), Reglu(**SMALL)], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["packed"])
    stack.inject(["reglu"])
    ids = torch.arange(3, 15)[None]
    before = stack.model(ids).logits.detach()
    stack.run_train_step(step_of(stack))
    assert torch.equal(stack.model(ids).logits.detach(), before)
    delta = deltas_of(stack)["model.layers.0.mlp.up_proj"]
    W0 = stack.model.get_submodule("model.layers.0.mlp.up_proj").weight
    torch.testing.assert_close(delta.A, delta.B.t() @ W0, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def knowing() -> nn.Module:
    """A tiny model that knows all facts."""
    model = tiny("llama")
    stack = Stack(model, [], tokenizer=tiny_tokenizer())
    (batch,) = feeders(stack, {"rows": FACTS}, size=8)["rows"].first(8)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(("loss", "rate"), [("hinge", 5e-3), ("ascent", 1e-3)])
def test_forgets_some_facts_and_keeps_the_others(knowing: nn.Module, loss: str, rate: float) -> None:
    stack = stack_of(model=copy.deepcopy(knowing), loss=loss, rank=8, retained=16)
    knew = loss_on(stack, FORGET), loss_on(stack, RETAIN)
    assert max(knew) < 0.3
    stack.train(RETAIN, sources={"forget": FORGET}, steps=30, batch_size=6, learning_rate=rate)
    knows = loss_on(stack, FORGET), loss_on(stack, RETAIN)
    assert knows[0] > knew[0] + 1
    assert knows[1] < knew[1] + 0.2


def test_a_second_run_goes_on_from_the_first(tmp_path: Path) -> None:
    stack = stack_of()
    options: dict[str, Any] = {
        "sources": {"forget": FORGET},
        "steps": 2,
        "batch_size": 3,
        "learning_rate": 1e-2,
    }
    stack.train(RETAIN, **options)
    delta = next(iter(deltas_of(stack).values()))
    trained, start = delta.B.detach().clone(), delta.B0.clone()
    assert not torch.equal(trained, start)
    again = peftx.load(stack.save(tmp_path), model=tiny("llama"), tokenizer=tiny_tokenizer())
    for one in (stack, again):
        one.train(RETAIN, **{**options, "learning_rate": 1e-9})
        delta = next(iter(deltas_of(one).values()))
        torch.testing.assert_close(delta.B.detach(), trained, rtol=0, atol=1e-6)
        assert torch.equal(delta.B0, start)


def test_micro_batches_see_one_start() -> None:
    stack = stack_of()
    memory: dict[str, Any] = {}
    seen = []
    for micro in range(2):
        step = step_of(stack, memory=memory)
        step.micro, step.accumulation = micro, 2
        stack.run_train_step(step)
        seen.append(memory["reglu"])
    assert seen[0] is seen[1], "the texts are read once a run"
    assert list(seen[0]) == list(deltas_of(stack))


def test_what_is_missing_or_has_no_place_is_refused() -> None:
    with pytest.raises(DataError, match="reglu: there is no source 'forget' of rows"):
        stack_of().train(RETAIN, steps=1)
    with pytest.raises(PeftxError, match="reglu: rank 33 exceeds the 32x32 matrix"):
        stack_of(rank=33)
    for arch in ("bert", "t5", "vit", "clip"):
        with pytest.raises(ArchitectureError, match=f"reglu: {arch} is no decoder of texts"):
            Stack(tiny(arch), [Reglu(**SMALL)])
    with pytest.raises(ArchitectureError, match=r"reglu: another module uses the weight of .*experts"):
        Stack(tiny("mixtral"), [Reglu(**SMALL)])
    assert Stack(tiny("mixtral"), [Reglu(**SMALL, targets="attention")]).trainable_parameters()


@pytest.mark.parametrize("forget", [RETAIN, [*FORGET, RETAIN[1]]])
def test_a_text_to_forget_and_to_retain_is_refused(forget: list[dict[str, str]]) -> None:
    stack = stack_of()
    shared = sum(row in RETAIN for row in forget)
    said = rf"reglu: {shared} of the {len(forget)} texts to forget are to be retained too, as '.*Where does \w+ live"
    with pytest.raises(DataError, match=said):
        stack.train(RETAIN, sources={"forget": forget}, steps=1)
    assert not any(tensor.any() for delta in deltas_of(stack).values() for tensor in (delta.A, delta.B0))


def test_a_text_is_the_same_with_other_pads() -> None:
    """Beside a long text it has pads, and is refused all the same."""
    long = {"prompt": "Where does Ann live in the summer, and her dog?", "completion": " In Rome."}
    with pytest.raises(DataError, match="reglu: 1 of the 2 texts to forget are to be retained too") as caught:
        stack_of().train(RETAIN, sources={"forget": [long, RETAIN[0]]}, steps=1)
    assert caught.value.hint == "leave them out of the rows to train on"


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 2.0), ({"rank": 8}, 2.0), ({"rank": 8, "alpha": 4}, 0.5), ({"alpha": 32.0}, 1.0)],
)
def test_scale(options: dict[str, Any], scale: float) -> None:
    assert Reglu(**options).config.scale == scale


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"beta": 1.1}, {"beta": -0.1}, {"retained": 0}, {"orthogonality": -1.0}, {"loss": "npo"},
     {"samples": 0}, {"alpha": math.inf}],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Reglu(**options)
