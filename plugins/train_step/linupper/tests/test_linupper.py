"""LinUpper: weights of a whole step's rows, however it is cut."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftx import Plugin, Stack
from peftx.engines.data import Collator
from peftx.engines.data.packing import Packing
from peftx.engines.training.step import TrainStep
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import PAD, example_inputs, tiny, tiny_tokenizer
from peftx_d2o import D2o
from peftx_deft import Deft
from peftx_ist import Ist
from peftx_linupper import LinUpper, Part, weights
from peftx_lora import Lora
from peftx_ls_llama import LsLlama
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("linupper")

STRATEGIES = ("linupper", "quadratic", "linear", "extremes")
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}" + "!" * n} for n in range(8)]
WHOLE, CUT = [(0, 6)], [(0, 1), (1, 4), (4, 6)]


def stack_of(
    arch: str = "llama", *others: Plugin, order: int = 1, options: Any = None, **model: Any
) -> Stack:
    """LoRA away from its start, and the plugin."""
    plugins = [LinUpper(**({"burn_in": 0} | (options or {}))), *others][::order]
    stack = Stack(tiny(arch, **model), [Lora(rank=2), *plugins], tokenizer=tiny_tokenizer())
    torch.manual_seed(1)
    with torch.no_grad():
        for p in stack.ledger.parameters("lora"):
            p.normal_(std=0.3)
    return stack


def batch_of(stack: Stack) -> dict[str, Tensor]:
    """Six rows, with fewer labels from row to row."""
    batch = example_inputs(stack.model, batch=6)
    if "input_ids" not in batch:
        return {**batch, "labels": torch.arange(6) % 3}
    labels = batch["input_ids"].clone()
    for i in range(6):
        labels[i, :i] = -100
    return {**batch, "labels": labels}


def step(stack: Stack, cut: list[tuple[int, int]] = WHOLE, batch: Any = None, shares: bool = True) -> float:
    """One optimizer step's gradients; returns the mean of what its micro-batches return."""
    batch = batch_of(stack) if batch is None else batch
    parts = [{name: value[i:j] for name, value in batch.items()} for i, j in cut]
    found = stack.shares(parts) if shares else [None] * len(parts)
    stack.model.zero_grad()
    losses = [
        float(stack.train_step(part, micro=m, accumulation=len(parts), share=share))
        for m, (part, share) in enumerate(zip(parts, found, strict=True))
    ]
    return sum(losses) / len(losses)


def gradients(stack: Stack) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], share: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    assert scale > 0
    for name in one:
        assert float((one[name] - other[name]).abs().max()) <= share * scale, name


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    scale = max(float(g.abs().max()) for g in one.values())
    return max(float((one[n] - other[n]).abs().max()) for n in one) > 1e-2 * scale


# ---------------------------------------------------------------------------------------------------- the weights
def test_weights_by_hand() -> None:
    l = torch.tensor([1.0, 1.5, 2.0, 3.0])  # noqa: E741  # h = -1, -0.5, 0, 1
    f = {
        "linupper": [0.0, 0.5, 1.0, 1.0],
        "quadratic": [0.0, 0.75, 1.0, 0.0],
        "linear": [0.0, 0.25, 0.5, 1.0],
        "extremes": [1.0, 0.5, 0.0, 1.0],
    }
    for strategy in STRATEGIES:
        for r in (1.0, 0.4):
            e = [math.exp(x / r) for x in f[strategy]]
            expected = torch.tensor([x / sum(e) for x in e])
            torch.testing.assert_close(weights(l, strategy, r), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_properties_of_the_weights(strategy: str) -> None:
    torch.manual_seed(0)
    l = torch.rand(16) * 3  # noqa: E741
    w = weights(l, strategy, 0.4)
    assert float(w.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights(5 * l, strategy, 0.4), w)
    torch.testing.assert_close(weights(l + 2, strategy, 0.4), w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(l.flip(0), strategy, 0.4), w.flip(0))
    assert (
        float(w.max() / w.min()) <= math.exp(1 / 0.4) * 1.0001
    )  # f has a span of 1, so no weight is far off
    torch.testing.assert_close(weights(l, strategy, math.inf), torch.full((16,), 1 / 16))
    same = weights(torch.full((5,), 2.0), strategy, 1.0)
    torch.testing.assert_close(same, torch.full((5,), 0.2))


def test_linupper_is_flat_above_the_middle_and_rises_below() -> None:
    l = torch.linspace(0, 4, 17)  # noqa: E741
    w = weights(l, "linupper", 1.0)
    assert torch.equal(w[l >= 2], w[-1].expand(9))
    assert (w[:9].diff() > 0).all()
    assert (weights(l, "linear", 1.0).diff() > 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_weights_are_the_argmax(strategy: str) -> None:
    """Of sum w f - r KL(w || uniform): no other distribution has more."""
    torch.manual_seed(0)
    l, r = torch.rand(6).double(), 0.4  # noqa: E741
    h = (2 * l - l.max() - l.min()) / (l.max() - l.min())
    f = {"linupper": (h + 1).clamp(max=1), "quadratic": 1 - h**2, "linear": (h + 1) / 2, "extremes": h.abs()}[
        strategy
    ]

    def worth(w: Tensor) -> Tensor:
        return (w * f).sum(-1) - r * (w * (6 * w).log()).sum(-1)

    others = torch.distributions.Dirichlet(torch.ones(6).double()).sample((500,))
    assert (worth(others) < worth(weights(l, strategy, r))).all()


OFFICIAL = {
    # strategy, r -> weights, sums over a row of the magnitudes of the gradient of the logits
    ("linupper", 1.0): ([0.228213, 0.1482369, 0.2206006, 0.4029495], [0.5555829, 0.1586841, 0.4784928, 0.2292649]),
    ("linupper", 0.4): ([0.1562169, 0.0531211, 0.1435138, 0.6471481], [0.380309, 0.0568649, 0.3112881, 0.3682058]),
    ("quadratic", 1.0): ([0.3358452, 0.1706951, 0.3227647, 0.170695], [0.8176128, 0.1827251, 0.7000915, 0.0971198]),
    ("quadratic", 0.4): ([0.4397955, 0.0809945, 0.3982155, 0.0809944], [1.0706792, 0.0867027, 0.8637478, 0.0460831]),
    ("linear", 1.0): ([0.2008061, 0.1618396, 0.1974286, 0.4399257], [0.4888611, 0.1732455, 0.4282317, 0.2503031]),
    ("linear", 0.4): ([0.1036735, 0.0604557, 0.099369, 0.7365018], [0.2523925, 0.0647164, 0.2155359, 0.4190451]),
    ("extremes", 1.0): ([0.1955592, 0.3010666, 0.2023075, 0.3010666], [0.4760876, 0.3222847, 0.4388143, 0.1712969]),
    ("extremes", 0.4): ([0.1254697, 0.3689772, 0.1365757, 0.3689774], [0.3054552, 0.3949814, 0.2962389, 0.2099359]),
}  # fmt: skip
"""Of `batch_losses_from_logits`, the functions f, and the lines of `training_step` between them, at commit edd6f15."""


class Logits(nn.Module):
    """A decoder whose logits are its parameter."""

    config = SimpleNamespace(is_encoder_decoder=False)
    loss_type = "ForCausalLM"

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, labels: Tensor) -> Any:
        loss = cross_entropy(self.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=self.logits)


@pytest.mark.parametrize(("strategy", "r"), OFFICIAL)
def test_equals_the_official_step(strategy: str, r: float) -> None:
    scale = torch.tensor([0.5, 1, 2, 3])[:, None, None]
    model = Logits((torch.arange(120.0) * 1.7).sin().view(4, 6, 5) * scale)
    labels = (torch.arange(24).view(4, 6) * 3) % 5
    labels[1, :3], labels[3, :5] = -100, -100
    plugin = LinUpper(strategy=strategy, r=r)
    fake: Any = SimpleNamespace(
        module=model, model=model, batch={"labels": labels}, share=None, accumulation=1, micro=0, last_micro=True,
        parameters=lambda: list(model.parameters()),
    )  # fmt: skip
    loss, outputs = plugin.task(fake)
    assert loss.item() == pytest.approx(model(labels).loss.item())  # the plain one
    assert outputs.logits is model.logits
    loss.backward()
    w, sums = map(torch.tensor, OFFICIAL[strategy, r])
    torch.testing.assert_close(weights(plugin.parts[0][1], strategy, r), w, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.logits.grad.abs().sum((1, 2)), sums, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- the step, and its cut
@pytest.mark.parametrize("arch", ["llama", "t5", "bert", "vit", "llama tokens"])
def test_the_gradient_is_that_of_the_weighted_rows(arch: str) -> None:
    """sum_i w_i n_i l_i B / N, with the weights of rows that were called one by one."""
    arch, _, each = arch.partition(" ")
    stack = stack_of(arch, **({"head": "token-classification", "num_labels": 400} if each else {}))
    batch = batch_of(stack)
    loss = step(stack)
    found = gradients(stack)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(6)]
    losses = torch.stack([stack.model(**row).loss for row in rows])
    labels = batch["labels"]
    counted = (
        labels[:, None] if labels.ndim == 1 else labels[:, 1:] if arch == "llama" and not each else labels
    )
    n = (counted != -100).sum(1)
    assert loss == pytest.approx(((losses * n).sum() / n.sum()).item(), rel=1e-5)  # the plain one
    stack.model.zero_grad()
    (6 * weights(losses.detach(), "linupper", 1.0) * n / n.sum() * losses).sum().backward()
    assert_close(found, gradients(stack))
    stack.model.zero_grad()
    stack.model(**batch).loss.backward()
    assert apart(found, gradients(stack))


@pytest.mark.parametrize(
    ("arch", "strategy"),
    [("llama", "linupper"), ("t5", "extremes"), ("bert", "linear"), ("vit", "quadratic")],
)
def test_the_step_is_the_same_however_it_is_cut(arch: str, strategy: str) -> None:
    stack = stack_of(arch, options={"strategy": strategy, "r": 0.4})
    loss, whole = step(stack), gradients(stack)
    for cut in (CUT, [(i, i + 1) for i in range(6)]):
        assert step(stack, cut) == pytest.approx(loss, rel=1e-5)
        assert_close(whole, gradients(stack))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "other", [Deft(eps=1e-2), Ist(interval=1), PromptTuning(length=3)], ids=lambda p: type(p).__name__
)
def test_it_is_cut_beside_others(other: Plugin, order: int) -> None:
    """Terms of other plugins are of their own micro-batch, and layers that they freeze stay frozen to the end."""
    stack = stack_of("llama", other, order=order)
    if isinstance(other, Ist):
        stack.trained_steps = 1  # when it measures
    loss, whole = step(stack), gradients(stack)
    scores = dict(other.state)
    other.state = {}
    assert step(stack, CUT) == pytest.approx(loss, rel=1e-4)
    assert_close(whole, gradients(stack), 1e-3)
    if isinstance(other, Ist):
        assert len(whole) < sum(p.requires_grad for p in stack.model.parameters())
        assert all(map(math.isfinite, [*scores["scores"], *other.state["scores"]]))


@pytest.mark.parametrize("order", [1, -1])
def test_it_is_cut_where_layers_are_recomputed(order: int) -> None:
    stack = stack_of("llama", Deft(eps=1e-2), PromptTuning(length=2), order=order)
    step(stack)
    whole = gradients(stack)
    stack.model.activation_checkpointing_enable({"use_reentrant": False})
    stack.model.train()
    step(stack, CUT)
    assert_close(whole, gradients(stack), 1e-3)


def test_without_shares_parts_are_equal() -> None:
    stack = stack_of()
    batch = batch_of(stack)
    batch["labels"] = batch["input_ids"]
    loss, whole = step(stack, batch=batch), gradients(stack)
    assert step(stack, [(0, 3), (3, 6)], batch, shares=False) == pytest.approx(loss, rel=1e-5)
    assert_close(whole, gradients(stack))


def test_rows_and_parts_without_labels_count_nothing() -> None:
    stack = stack_of()
    batch = batch_of(stack)
    few = {name: value[:4] for name, value in batch.items()}
    batch["labels"][4:] = -100
    loss, whole = step(stack, [(0, 4)], few), gradients(stack)
    for cut in (WHOLE, [(0, 4), (4, 6)], [(0, 2), (4, 6), (2, 4)]):
        assert step(stack, cut, batch) == pytest.approx(loss, rel=1e-5)
        assert_close(whole, gradients(stack))
    batch["labels"][:] = -100
    assert math.isfinite(step(stack, batch=batch))


def test_one_row_and_a_high_r_are_the_plain_loss() -> None:
    """With what the model adds for its routers."""
    for options, cut in (({"r": 1e9}, WHOLE), ({"r": 1e9}, CUT), ({}, [(0, 1)])):
        stack = stack_of("mixtral", options=options, output_router_logits=True, router_aux_loss_coef=0.5)
        batch = batch_of(stack)
        loss, found = step(stack, cut), gradients(stack)
        stack.model.zero_grad()
        parts = [{name: value[i:j] for name, value in batch.items()} for i, j in cut]
        shares = stack.shares(parts)
        plain = sum(s["labels"] * stack.model(**p).loss for s, p in zip(shares, parts, strict=True))
        plain.backward()
        assert loss == pytest.approx(plain.item(), rel=1e-6)
        assert_close(found, gradients(stack), 1e-5)


def test_texts_in_one_row_weigh_one_by_one() -> None:
    stack = stack_of(tie_word_embeddings=False)
    rows = [
        {"input_ids": list(range(5 + i, 12 + 3 * i)), "labels": [-100, *range(6 + i, 12 + 3 * i)]}
        for i in range(5)
    ]
    collate = Collator(PAD)
    alone, packed = collate(rows), Packing(collate, 40, torch.float32)(rows)
    assert len(packed["labels"]) < len(alone["labels"])
    _, _, l, n = Part(stack.model, stack.model, packed, 1.0).read()  # noqa: E741
    assert sorted(n[n > 0].tolist()) == sorted(float((r != -100).sum()) for r in alone["labels"])
    assert ((l * n).sum() / n.sum()).item() == pytest.approx(stack.model(**packed).loss.item(), rel=1e-5)
    step(stack, [(0, 5)], alone)
    found = gradients(stack)
    step(stack, [(0, len(packed["labels"]))], packed)
    assert_close(found, gradients(stack), 1e-3)


def test_between_micro_batches_no_graph_is_kept() -> None:
    stack = stack_of()
    batch = {name: value[:2] for name, value in batch_of(stack).items()}
    plugin: Any = stack.plugins["linupper"]
    stack.train_step(batch, micro=0, accumulation=3)
    stack.train_step(batch, micro=1, accumulation=3)
    assert set(plugin.parts) == {0, 1}
    for part, l, n in plugin.parts.values():  # noqa: E741
        assert not l.requires_grad
        assert not n.requires_grad
        assert not any(value.requires_grad for value in part.batch.values())
    assert sum(float(g.abs().max()) for g in gradients(stack).values()) == 0  # nothing before the last
    stack.train_step(batch, micro=0, accumulation=3)  # a step that was left is forgotten
    assert set(plugin.parts) == {0}
    stack.train_step(batch, micro=2, accumulation=3)
    assert not plugin.parts


# ----------------------------------------------------------------------------------------------------- whole runs
def run(batch_size: int, accumulation: int, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    stack = stack_of(options=options)
    report = stack.train(
        ROWS, steps=4, batch_size=batch_size, gradient_accumulation=accumulation, learning_rate=1e-3
    )
    return [loss for _, loss in report.losses], {
        n: p.detach() for n, p in stack.ledger.tensors("lora").items()
    }


def test_runs_of_the_same_rows_are_the_same() -> None:
    losses, trained = run(4, 1, r=0.4)
    for size, accumulation in ((1, 4), (2, 2)):
        others, cut = run(size, accumulation, r=0.4)
        assert others == pytest.approx(losses, rel=1e-4)
        assert_close(trained, cut, 1e-3)


def test_weights_are_uniform_up_to_the_end_of_burn_in() -> None:
    plain = run(4, 1, r=1e9)[1]
    assert_close(plain, run(4, 1, r=0.1, burn_in=3)[1], 2e-2)
    stack = stack_of(options={"burn_in": 0.5})
    seen: list[Any] = []
    stack.train(ROWS, steps=4, progress=lambda done, total, values: seen.append(values["linupper"]))
    assert seen == ["uniform", "uniform", "weighted", "weighted"]
    stack = stack_of(options={"burn_in": 1, "r": 0.1})
    loss, found = step(stack), gradients(stack)
    stack.model.zero_grad()
    plain_loss = stack.model(**batch_of(stack)).loss
    plain_loss.backward()
    assert loss == plain_loss.item()
    assert_close(found, gradients(stack), 1e-6)
    stack.trained_steps = 1
    step(stack)
    assert apart(found, gradients(stack))
    assert LinUpper().config.burn_in == 0.05
    assert not LinUpper(burn_in=0).phases()


def test_learned_samples_hold_up_less() -> None:
    """Linear regression, most samples of which are solved at the start: fewer steps to a small loss."""

    def steps(strategy: str | None) -> int:
        x = torch.cat([torch.tensor([[1.0, 0.0]]).expand(50, 2), torch.tensor([[0.0, 1.0]]).expand(4, 2)])
        theta, target = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        for count in range(1000):
            error = x @ (theta - target)
            l = error.square()  # noqa: E741
            if float(l.max()) < 1e-4:
                return count
            w = torch.full((54,), 1 / 54) if strategy is None else weights(l, strategy, 1.0)
            theta = theta - 0.5 * (2 * w * error) @ x
        return 1000

    assert steps("linupper") < 0.6 * steps(None)


# ------------------------------------------------------------------------------------------------------- refusals
def test_refused() -> None:
    for other in (LsLlama(labels=["a", "b"]), Mezo(), D2o(samples=2, max_new_tokens=2)):
        for order in (1, -1):
            with pytest.raises(ConflictError, match="linupper"):
                stack_of("llama", other, order=order)
    with pytest.raises(ArchitectureError, match="linupper: the loss of CLIPModel is of pairs of rows"):
        Stack(tiny("clip"), [Lora(rank=2), LinUpper()])
    stack = stack_of("llama", head="classification", num_labels=1)
    batch = {**example_inputs(stack.model), "labels": torch.tensor([0.1, 0.2])}
    with pytest.raises(PeftxError, match="linupper: the batch has no labels of tokens or classes"):
        stack.train_step(batch)
    del batch["labels"]
    with pytest.raises(PeftxError, match="no labels"):
        stack.train_step(batch)
    for options in ({"r": 0}, {"burn_in": -1}, {"burn_in": 1.5}, {"strategy": "mid"}):
        with pytest.raises(PeftxError, match=f"LinUpper: {next(iter(options))}"):
            LinUpper(**options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConflictError, match="'linupper' trains in one process"):
        stack.run_train_step(TrainStep(stack, batch_of(stack)))


def test_a_class_of_a_text_is_a_label() -> None:
    stack = stack_of("llama", head="classification", num_labels=3)
    batch = {**example_inputs(stack.model, batch=6), "labels": torch.arange(6) % 3}
    loss, whole = step(stack, batch=batch), gradients(stack)
    assert step(stack, CUT, batch) == pytest.approx(loss, rel=1e-5)
    assert_close(whole, gradients(stack))
