from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.errors import DataError, PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_deft import Deft, Observer, count, density, row_means, total, watching
from peftx_lora import Lora

# With eps = 1e-7 the gradient turns within |o| of 3e-4, and float32's rounding of o shows as 4e-4 of it on a tiny T5
# (as compared with float64): more than the kit allows between kept and recomputed activations.
test_conformance = conformance("deft")

BLOCKS = [  # activations [B, T, d_ff] of two blocks
    torch.tensor([[[0.0, 1e-3, -2e-4], [0.5, 0.0, 3e-4]], [[0.0, 0.0, 0.0], [-1e-4, 2.0, 1e-5]]]),
    torch.tensor([[[4e-4, 0.0, 0.0], [0.0, -5e-4, 1.0]], [[2e-3, 0.0, -3e-4], [0.0, 0.0, 6e-4]]]),
]
# What the official `compute_l0_penalty` and `compute_eval_sparsity` give for BLOCKS: [B, L]; and the gradient of the
# mean of the first in BLOCKS[0], eps = 1e-7. Made once by running them outside this repository; the README says which
# commit.
OFFICIAL = {
    1e-7: [[0.4447481632232666, 0.38827836513519287], [0.18198467791080475, 0.3719837963581085]],
    1e-2: [[0.16027525067329407, 0.1650233417749405], [0.16625119745731354, 7.413978892145678e-05]],
}
OFFICIAL_COUNT = [[0.6666666865348816, 0.5], [0.5, 0.5]]
OFFICIAL_GRADIENT = [
    [[0.0, 6.887046813964844, -85.03401184082031], [5.960464477539063e-08, 0.0, 69.2520751953125]],
    [[0.0, 0.0, 0.0], [-68.87052154541016, 0.0, 8.316690444946289]],
]


def stack_of(arch: str = "llama", **options: Any) -> Stack:
    return Stack(tiny(arch), [Lora(rank=2), Deft(**options)], tokenizer=tiny_tokenizer())


def batch_of(model: Any, padding: Any = None) -> dict[str, Tensor]:
    inputs = example_inputs(model, padding=padding)
    if "decoder_input_ids" in inputs:
        labels = inputs.pop("decoder_input_ids")
        labels[1, 5:] = -100  # pads of the decoder
        return {**inputs, "labels": labels}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def terms(stack: Stack, batch: dict[str, Any]) -> dict[str, float]:
    step = TrainStep(stack, batch)
    stack.run_train_step(step)
    stack.model.zero_grad()
    return step.losses


def observers(stack: Stack) -> list[Observer]:
    return [part.module for part in stack.ledger.of("deft", DeltaPart)]


@pytest.mark.parametrize("eps", OFFICIAL)
def test_density_is_the_official_one(eps: float) -> None:
    ours = torch.stack([density(o, eps).mean(1) for o in BLOCKS], 1)
    assert torch.allclose(ours, torch.tensor(OFFICIAL[eps]), rtol=1e-6, atol=1e-9)


def test_gradient_is_the_official_one_and_the_formula() -> None:
    o = [block.clone().requires_grad_() for block in BLOCKS]
    torch.stack([density(block, 1e-7).mean(1) for block in o], 1).mean().backward()
    assert torch.allclose(o[0].grad, torch.tensor(OFFICIAL_GRADIENT), rtol=1e-5, atol=1e-6)
    x = BLOCKS[0].double()
    formula = 2 * x * 1e-7 / (x.square() + 1e-7).square() / x.numel() / len(BLOCKS)
    assert torch.allclose(o[0].grad.double(), formula, rtol=1e-4, atol=1e-6)


def test_features_that_were_not_stored_have_no_gradient() -> None:
    """LeMo hands the backward pass zeros in their place."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.zeros_like):
        o = torch.tensor([[0.3, -0.7]], requires_grad=True)
        found = density(o, 1e-3).sum()
    found.backward()
    assert o.grad.tolist() == [[0, 0]]


def test_count_is_the_official_one() -> None:
    ours = torch.stack([count(o, 0.0).mean(1) for o in BLOCKS], 1)
    assert torch.allclose(ours, torch.tensor(OFFICIAL_COUNT))
    assert count(BLOCKS[1], 5e-4).tolist() == [[0, pytest.approx(1 / 3)], [pytest.approx(1 / 3)] * 2]


def test_density_goes_from_zero_to_one() -> None:
    assert density(torch.zeros(2, 3, 4), 1e-7).max() == 0
    values = [density(torch.full((4,), size * 1e-2), 1e-4).item() for size in (0.1, 1.0, 10.0, 1000.0)]
    assert values == sorted(values)
    assert values[1] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arch", "padding"), [("llama", "left"), ("llama", "right"), ("opt", "right"), ("bert", "right")]
)
def test_padding_does_not_count(arch: str, padding: str) -> None:
    """Of a padded batch the density is the mean of what its rows have alone; OPT's MLP sees [B * T, d_ff]."""
    stack = stack_of(arch)
    batch = batch_of(stack.model, padding)
    if padding == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = []
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        alone.append(terms(stack, {name: x[row, real][None] for name, x in batch.items()})["density"])
    assert abs(alone[0] - alone[1]) > 1e-6  # else any mean would do
    assert terms(stack, batch)["density"] == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_density_of_the_loss_is_that_of_what_the_second_matrix_reads() -> None:
    stack = stack_of("llama", eps=1e-3)
    seen: list[Tensor] = []
    for layer in stack.model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = batch_of(stack.model)
    found = terms(stack, batch)["density"]
    o = torch.stack(seen)  # [L, B, T, d_ff]
    assert o.shape == (2, 2, 9, 48)
    assert found == pytest.approx((o.square() / (o.square() + 1e-3)).mean().item(), rel=1e-6)


def test_encoder_and_decoder_are_summed_and_masked() -> None:
    found = {}
    for tower in ("encoder", "decoder", "encoder,decoder"):
        stack = stack_of("t5", targets=f"mlp.down tower={tower}", eps=1e-2)
        batch = batch_of(stack.model, "right")
        found[tower] = terms(stack, batch)["density"]
        longer = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)}
        assert terms(stack, longer)["density"] == pytest.approx(found[tower], rel=1e-5)
    assert found["encoder,decoder"] == pytest.approx(found["encoder"] + found["decoder"], rel=1e-6)


def test_images_have_no_pads() -> None:
    stack = Stack(tiny("clip"), [Deft(eps=1e-2)])
    inputs = example_inputs(stack.model, padding="right")
    watched, seen = observers(stack), {}
    for observer in watched:
        place = next(part.place for part in stack.ledger.of("deft", DeltaPart) if part.module is observer)
        place.register_forward_pre_hook(lambda _, args, o=observer: seen.update({o: density(args[0], 1e-2)}))
    with watching(watched, partial(density, eps=1e-2), None), torch.no_grad():
        stack.model(**inputs)
        for observer in watched:
            found = observer.take()
            real = inputs["attention_mask"] if observer.tower == "text" else torch.ones_like(seen[observer])
            assert torch.allclose(found, (seen[observer] * real).sum(1) / real.sum(1))
    assert {observer.tower for observer in watched} == {"text", "vision"}


def test_a_row_without_tokens_is_no_division_by_zero() -> None:
    stack = stack_of("t5", eps=1e-2)
    batch = batch_of(stack.model, "right")
    batch["labels"][1] = -100
    assert math.isfinite(terms(stack, batch)["density"])


def test_soft_tokens_count_as_tokens() -> None:
    from peftx.testing.reference import ReferencePrompt

    stack = Stack(tiny("llama"), [("prompt", ReferencePrompt(length=3)), Deft()])
    batch = batch_of(stack.model, "right")
    seen: list[Tensor] = []
    for layer in stack.model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = terms(stack, batch)["density"]
    o = torch.stack([density(x, 1e-7) for x in seen])  # [L, B, 3 + T]
    assert o.shape == (2, 2, 12)
    rows = (o[:, 0].mean(), o[:, 1, : 12 - 2].mean())  # row 1 has 2 pads
    assert found == pytest.approx(float(sum(rows) / 2), rel=1e-6)


def test_a_pass_without_gradients_is_not_part_of_the_loss() -> None:
    """A preference loss reads a reference first, on another batch."""
    stack = stack_of()
    batch = batch_of(stack.model)
    plain = terms(stack, batch)["density"]
    step = TrainStep(stack, batch)

    def task() -> tuple[Tensor, Any]:
        with torch.no_grad():
            step.model(batch["input_ids"][:, :4] + 1)
        outputs = step.forward()
        return outputs.loss, outputs

    step.replace_task_loss(task)
    stack.run_train_step(step)
    assert step.losses["density"] == plain


def test_each_look_is_of_the_calls_since_the_last() -> None:
    """A step may compute its loss more than once, as MeZO does."""
    stack = stack_of()
    inputs = example_inputs(stack.model)
    other = inputs | {"input_ids": inputs["input_ids"].flip(1)}
    found = []
    with watching(observers(stack), partial(density, eps=1e-7), None):
        for batch in (inputs, other, inputs):
            stack.model(**batch)
            found.append(float(total(observers(stack)).detach()))
    assert found[0] == found[2] != found[1]


def test_fold_gives_new_tensors() -> None:
    """Equal ones: there is nothing to fold."""
    own = torch.ones(3, 2), torch.ones(3)
    for one, new in zip(own, observers(stack_of())[0].fold(*own), strict=True):
        assert new is not one
        assert torch.equal(new, one)


def test_a_step_without_gradients_sees_the_density_too() -> None:
    from peftx_mezo import Mezo

    stack = Stack(tiny("llama"), [Lora(rank=2), Deft(), Mezo(eps=1e-6)])  # eps: hardly away from the start
    batch = batch_of(stack.model)
    torch.manual_seed(0)
    assert terms(stack, batch)["density"] == pytest.approx(terms(stack_of(), batch)["density"], rel=1e-3)


def test_checkpointing_gives_the_same_density_and_leaves_nothing_behind() -> None:
    stack = stack_of()
    batch = batch_of(stack.model, "right")
    stack.model.train()
    plain = terms(stack, batch)["density"]
    stack.model.activation_checkpointing_enable({"use_reentrant": False})
    assert terms(stack, batch)["density"] == plain
    assert all(o.measure is None and not o.seen for o in observers(stack))


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_checkpointing_gives_the_same_gradients(arch: str) -> None:
    """In float64, with the default eps."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny(arch).double()
        stack = Stack(model, [Lora(rank=2), Deft()])
        with torch.no_grad():
            for i, parameter in enumerate(stack.ledger.parameters("lora")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        stack.train_step(batch_of(model, "right"))
        gradients.append(torch.cat([p.grad.flatten() for p in stack.ledger.parameters("lora")]))
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_a_step_may_call_the_model_twice_and_compute_both_again() -> None:
    """Layers that are recomputed hear of the last call; what they measure is dropped."""
    gradients = []
    for checkpointing in (False, True):
        stack = stack_of(eps=1e-2)
        batch = batch_of(stack.model, "right")
        stack.model.train()
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        step = TrainStep(stack, batch)

        def task(step: TrainStep = step) -> tuple[Tensor, Any]:
            one, two = (
                step.forward(**{name: x[rows] for name, x in step.batch.items()}) for rows in ([0], [0, 1])
            )
            return one.loss + two.loss, two

        step.replace_task_loss(task)
        stack.run_train_step(step)
        gradients.append(torch.cat([p.grad.flatten() for p in stack.ledger.parameters("lora")]))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_two_in_a_stack_each_count_their_own() -> None:
    """The sum of both terms is that of one with twice the weight."""

    def loss(**plugins: Deft) -> float:
        stack = Stack(tiny("llama"), [("lora", Lora(rank=2)), *plugins.items()], tokenizer=tiny_tokenizer())
        stack.model.train()
        return float(stack.run_train_step(TrainStep(stack, batch_of(stack.model))))

    one, two = Deft(alpha=0.1, eps=1e-2), Deft(alpha=0.2, eps=1e-2)
    assert loss(a=one, b=Deft(alpha=0.1, eps=1e-2)) == pytest.approx(loss(a=two), rel=1e-6)
    assert loss(a=Deft(alpha=0.1, eps=1e-2)) < loss(a=Deft(alpha=0.2, eps=1e-2))


def test_reentrant_checkpointing_is_refused() -> None:
    stack = stack_of()
    stack.model.train()
    stack.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PeftxError, match=r"layer 0 was not observed") as caught:
        terms(stack, batch_of(stack.model))
    assert "use_reentrant=False" in str(caught.value.hint)


def trained(alpha: float | None, steps: int = 8, arch: str = "llama") -> Stack:
    plugins = [Lora(rank=2)] if alpha is None else [Lora(rank=2), Deft(alpha=alpha, eps=1e-3)]
    stack = Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer())
    batch = batch_of(stack.model, "right")
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        stack.train_step(batch, optimizer=optimizer)
    return stack


def test_alpha_zero_trains_as_without_the_plugin() -> None:
    with_it, without = trained(0.0).ledger.tensors("lora"), trained(None).ledger.tensors("lora")
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_density_falls_with_alpha() -> None:
    """A tiny OPT has ReLUs: the exact count falls, and the task is still learned."""
    found, losses = [], []
    for alpha in (0.0, 1.0, 5.0):
        stack = trained(alpha, steps=40, arch="opt")
        batch = batch_of(stack.model, "right")
        losses.append(terms(stack, batch)["task"])
        with watching(observers(stack), partial(count, threshold=0.0), None), torch.no_grad():
            stack.model(**batch)
            found.append(float(torch.stack([o.take().mean() for o in observers(stack)]).mean()))
    start = terms(stack_of("opt"), batch)["task"]
    assert found[0] > found[1] + 0.02 > found[2] + 0.04, found
    assert max(losses[:2]) < start / 2, (start, losses)


def test_evaluate_counts_by_hand() -> None:
    stack = Stack(tiny("opt"), [Deft()], tokenizer=tiny_tokenizer())
    rows = [{"prompt": "one", "completion": " two"}, {"prompt": "three four", "completion": " five six"}]
    scores = stack.evaluate(rows, metrics=["deft"])
    assert list(scores) == ["density", "density/layer-0", "density/layer-1"]
    tokenizer, seen = tiny_tokenizer(), []
    for layer in stack.model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    shares = []
    for row in rows:
        ids = [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            stack.model(torch.tensor([ids]))
    for layer in range(2):
        shares.append([float((seen[2 * row + layer] != 0).float().mean()) for row in range(2)])
        assert scores[f"density/layer-{layer}"].value == pytest.approx(sum(shares[layer]) / 2, rel=1e-5)
    assert scores["density"].value == pytest.approx(sum(map(sum, shares)) / 4, rel=1e-5)
    assert 0.2 < scores["density"].value < 0.8
    assert scores["density"].count == 2


def test_evaluate_reports_both_towers_and_the_threshold_counts() -> None:
    rows = [{"prompt": "one", "completion": " two"}] * 3
    values = []
    for threshold in (0.0, 0.1, 1e3):
        stack = Stack(tiny("t5"), [Deft(threshold=threshold)], tokenizer=tiny_tokenizer())
        scores = stack.evaluate(rows, metrics=["deft"])
        assert {"density/encoder", "density/decoder", "density/encoder/layer-1"} < set(scores)
        values.append(scores["density/encoder"].value)
    assert values[0] == 1 > values[1] > values[2] == 0  # a smooth activation has no exact zeros


def test_evaluate_leaves_out_the_pads_of_each_tower() -> None:
    """Of a batch with pads the density is the mean of what its rows have alone."""
    stack = Stack(tiny("t5"), [Deft(threshold=0.1)], tokenizer=tiny_tokenizer())
    rows = [
        {"prompt": "one", "completion": " two three four five"},
        {"prompt": "six seven eight", "completion": " nine"},
    ]
    together, *alone = (stack.evaluate(some, metrics=["deft"]) for some in (rows, rows[:1], rows[1:]))
    for name, score in together.items():
        own = [scores[name].value for scores in alone]
        assert abs(own[0] - own[1]) > 1e-4  # else any mean would do
        assert score.value == pytest.approx(sum(own) / 2, rel=1e-6)


def test_texts_are_rows_too() -> None:
    stack = Stack(tiny("llama"), [Deft()], tokenizer=tiny_tokenizer())
    assert stack.evaluate(["Once upon a time."], metrics=["deft"])["density"].value == 1
    assert not any(part.place._forward_hooks for part in stack.ledger.of("deft", DeltaPart)), (
        "nothing listens on"
    )


def test_rows_of_no_format_are_refused_by_name() -> None:
    stack = Stack(tiny("llama"), [Deft()], tokenizer=tiny_tokenizer())
    with pytest.raises(DataError, match=r"row 0 .*'question' fit no format"):
        stack.evaluate([{"question": "Who?"}], metrics=["deft"])
    with pytest.raises(DataError, match=r"row 1 .*no key 'text'"):
        stack.evaluate(["Once upon a time.", {"prompt": "Who?", "completion": " He."}], metrics=["deft"])


@pytest.mark.parametrize("first", [True, False])
def test_a_merged_model_is_measured_too(tmp_path: Path, first: bool) -> None:
    """The numbers are those from before; for good merged, its observers are gone, and they still are."""
    plugins = [Lora(rank=2), Deft(threshold=0.1)]
    stack = Stack(tiny("llama"), plugins if first else plugins[::-1], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.3)

    def measured() -> list[float]:
        return [score.value for score in stack.evaluate(["a text", "two"], metrics=["deft"]).values()]

    before = measured()
    assert len(before) == 3
    assert 0 < before[0] < 1
    stack.merge()
    assert measured() == pytest.approx(before, abs=1e-3)
    stack.unmerge()
    stack.export(tmp_path / "exported")
    stack.merge(keep=False)
    assert not any(isinstance(module, Observer) for module in stack.model.modules())
    assert measured() == pytest.approx(before, abs=1e-3)
    stack = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert measured() == pytest.approx(before, abs=1e-3)


def test_a_quantized_model_is_measured_by_what_its_matrices_read(tmp_path: Path) -> None:
    from peftx_prefixquant import PrefixQuant

    stack = Stack(tiny("opt"), [Lora(rank=2), Deft(), PrefixQuant(rotate=False)], tokenizer=tiny_tokenizer())
    text = "two words and two more"
    stack.compress([text] * 2, samples=2, length=16)
    scores = stack.evaluate([text], metrics=["deft"])
    seen: list[Tensor] = []
    for layer in stack.model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        stack.model(torch.tensor([[*tiny_tokenizer()(text).input_ids, tiny_tokenizer().eos_token_id]]))
    for layer, o in enumerate(seen):
        assert scores[f"density/layer-{layer}"].value == pytest.approx(float((o != 0).float().mean()))
    again = peftx.load(stack.save(tmp_path / "bundle"), tokenizer=tiny_tokenizer())
    assert again.evaluate([text], metrics=["deft"])["density"].value == scores["density"].value


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"eps": 0.0}, "eps"),
        ({"threshold": -1.0}, "threshold"),
        ({"targets": ""}, "targets"),
        ({"alpha": math.inf}, "alpha"),
        ({"eps": math.inf}, "eps"),
        ({"threshold": math.inf}, "threshold"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Deft: {match}"):
        Deft(**options)


def test_targets_that_match_nothing_and_models_without_an_mlp() -> None:
    with pytest.raises(PeftxError, match=r"deft: .*'mlp.dwon' matches nothing"):
        stack_of("llama", targets="mlp.dwon")
    for arch in ("mamba", "mixtral"):
        with pytest.raises(PeftxError, match=r"deft: .*'mlp.down' matches nothing"):
            Stack(tiny(arch), [Deft()])
    with pytest.raises(PeftxError, match=r"deft: another module uses the weight of .*experts"):
        Stack(tiny("mixtral"), [Deft(targets="experts.down")])


def test_a_mask_of_another_shape_is_refused() -> None:
    stack = stack_of()
    batch = batch_of(stack.model)
    observer = observers(stack)[0]
    observer.call.begin({"input_ids": batch["input_ids"]})
    for shape in ((2, 8), (19,)):  # fewer than the call's 2 x 9 tokens, or not as many for each row
        tokens = torch.zeros(shape)
        with pytest.raises(PeftxError, match=rf"shape \({shape[0]},.* do not go with a mask of \(2, 9\)"):
            row_means(tokens, observer.weights(tokens))
    with pytest.raises(PeftxError, match=r"do not go with a mask of \(2, 1, 1, 1\)"):
        row_means(torch.zeros(2, 1), torch.zeros(2, 1, 1, 1))  # which has as many numbers
    mask = torch.zeros(2, 1, 9, 9)  # additive, as packed rows have it
    with pytest.raises(PeftxError, match=r"do not go with a mask of \(2, 1, 9, 9\)"):
        terms(stack, {**batch, "attention_mask": mask})


def test_a_decoder_s_mask_of_another_shape_is_its_own() -> None:
    stack = stack_of("t5")
    observer = next(each for each in observers(stack) if each.tower == "decoder")
    batch = batch_of(stack.model)
    observer.call.begin({**batch, "labels": batch["labels"][:, :4]})
    tokens = torch.zeros(2, 3)
    with pytest.raises(PeftxError, match=r"do not go with a mask of \(2, 4\)"):
        row_means(tokens, observer.weights(tokens))


def test_a_merged_observer_is_told_in_training() -> None:
    stack = Stack(tiny("llama"), [Deft(), Lora(rank=2)])
    stack.merge("deft")
    with pytest.raises(PeftxError, match="was not observed"):
        terms(stack, batch_of(stack.model))


class Elsewhere(Plugin):
    """Reads rows of its own, before the task's loss and in a term, as MEND does."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        ids = torch.arange(3, 23).view(2, 10)
        torch.autograd.grad(step.model(input_ids=ids).logits.mean(), step.parameters(), allow_unused=True)
        step.add_loss("apart", lambda _: step.model(input_ids=ids).logits.mean() * 0, over="step")
        return (yield)


@pytest.mark.parametrize("first", [True, False])
def test_rows_of_another_plugin_are_not_counted(first: bool) -> None:
    def density_of(*plugins: Plugin) -> float:
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
        return stack.train(rows, steps=1, batch_size=2).terms["density"]

    beside = [Elsewhere(), Deft(eps=1e-3)] if first else [Deft(eps=1e-3), Elsewhere()]
    assert density_of(Lora(rank=2), *beside) == density_of(Lora(rank=2), Deft(eps=1e-3))
