from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftx import Stack, TrainStep
from peftx.errors import PeftxError
from peftx.testing import conformance, run_checks
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_ba_lora import BaLora, consistency, diversity, singular
from peftx_lora import Lora

test_conformance = conformance("ba-lora")

Z = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.5, 0.75, -1.0, 0.0], [-1.5, 0.5, 1.25, -0.25]])
Z0 = torch.tensor([[0.8, -0.4, 0.5, 1.5], [0.25, 1.0, -1.25, 0.25], [-1.0, 0.75, 1.0, -0.5]])
# What the official `compute_loss` gives for Z and Z0 as logits of classes [3, 4], and for the rows (0, 1) and (1, 2) as
# logits of tokens [2, 2, 4]: consistency, diversity, and their gradients (of tokens: in the first row). Made once by
# running its lines outside this repository; the README says which commit.
CLASSES = {
    "consistency": 0.016304288059473038,
    "diversity": 1.6893446445465088,
    "consistency gradient": [
        [-0.0009365994, 0.00046829972, -0.0121757789, 0.0021073469],
        [0.0253887977, -0.0091139227, 0.0058589568, -0.0188788511],
        [-0.0088966787, -0.0174226575, -0.0007413907, 0.0148277944],
    ],
    "diversity gradient": [
        [0.9609375596, -0.7799479365, -0.4978298843, 0.8845486045],
        [0.1640624702, 0.2278645784, -0.2973089814, 0.1319444776],
        [-1.125, 0.5520833135, 0.7951388955, -1.0164930820],
    ],
}
TOKENS = {
    "consistency": 0.06462275236845016,
    "diversity": -1.1391652822494507,
    "consistency gradient": [
        [-0.0099996738, -0.0118550695, -0.0378185920, 0.0596733093],
        [0.0453774408, -0.0376961417, 0.0101250755, -0.0178064089],
    ],
    "diversity gradient": [
        [-0.0260416027, -0.0247680750, -0.0323675983, 0.0831772685],
        [0.0081731025, 0.0362682864, -0.0250492450, -0.0193921495],
    ],
}


def stack_of(arch: str = "llama", head: str | None = None, **options: Any) -> Stack:
    model = tiny(arch, head=head, num_labels=4) if head else tiny(arch)
    return Stack(model, [BaLora(**{"rank": 2, **options})])


def batch_of(model: Any, padding: Any = None) -> dict[str, Tensor]:
    inputs = example_inputs(model, padding=padding, batch=5)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def perturb(stack: Stack, size: float = 0.05) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("ba-lora"):
            parameter.add_(torch.randn_like(parameter), alpha=size)


def losses(stack: Stack, batch: dict[str, Any], **step: Any) -> dict[str, float]:
    step = TrainStep(stack, batch, **step)
    stack.run_train_step(step)
    return step.losses


def tokens_step(rows: int = 2, length: int = 2) -> TrainStep:
    """Of a model whose position i predicts label i."""
    return TrainStep(stack_of("bert"), {"labels": torch.zeros(rows, length, dtype=torch.long)})


def classes_step() -> TrainStep:
    return TrainStep(stack_of("bert"), {"labels": torch.zeros(3, dtype=torch.long)})


def test_classes_are_the_official_terms() -> None:
    step, z = classes_step(), Z.clone().requires_grad_()
    for name, loss in (("consistency", consistency(step, z, Z0)), ("diversity", diversity(step, z))):
        assert float(loss.detach()) == pytest.approx(CLASSES[name], rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.allclose(gradient, torch.tensor(CLASSES[f"{name} gradient"]), atol=1e-6)


def test_tokens_are_the_official_terms() -> None:
    step = tokens_step()
    z, z0 = (torch.stack([x[:2], x[1:]]).requires_grad_() for x in (Z, Z0))
    for name, loss in (("consistency", consistency(step, z, z0)), ("diversity", diversity(step, z))):
        assert float(loss.detach()) == pytest.approx(TOKENS[name], rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.allclose(gradient[0], torch.tensor(TOKENS[f"{name} gradient"]), atol=1e-6)


def test_consistency_is_of_whole_rows() -> None:
    """Its weight is the release's, which sums over a row: a row twice as long pulls twice as hard, two rows as one."""
    z, z0 = (torch.stack([x[:2]]) for x in (Z, Z0))
    value = float(consistency(tokens_step(1), z, z0))
    longer = consistency(tokens_step(1, 4), z.repeat(1, 2, 1), z0.repeat(1, 2, 1))
    assert float(longer) == pytest.approx(2 * value, rel=1e-6)
    more = consistency(tokens_step(2), z.repeat(2, 1, 1), z0.repeat(2, 1, 1))
    assert float(more) == pytest.approx(value, rel=1e-6)
    assert BaLora().config.consistency == 1e-4


def test_singular_by_hand() -> None:
    diagonal = torch.diag(torch.tensor([3.0, 4.0, 1.0])).requires_grad_()  # its own singular values
    loss = singular(classes_step(), diagonal, 1)
    assert float(loss.detach()) == pytest.approx(-4 / 8)
    (gradient,) = torch.autograd.grad(loss, diagonal)
    # d(-s1 / sum) = -1 / sum + s1 / sum**2 for the first, s1 / sum**2 for the others
    assert torch.allclose(gradient.diagonal(), torch.tensor([4 / 64, 4 / 64 - 1 / 8, 4 / 64]), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_singular_lies_between_minus_one_and_minus_k_by_rank(k: int) -> None:
    torch.manual_seed(0)
    for rank in (1, 2, 3, 6):
        matrix = torch.randn(8, rank) @ torch.randn(rank, 6)
        value = float(singular(classes_step(), matrix, k))
        assert -1 - 1e-6 <= value <= -min(k / rank, 1) + 1e-6
        assert (value == pytest.approx(-1, abs=1e-5)) == (rank <= k)


def test_terms_of_half_precision_are_taken_in_float32() -> None:
    for step, shape in ((classes_step(), (3, 7)), (tokens_step(), (2, 2, 7))):
        generator = torch.Generator().manual_seed(0)
        half, half0 = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        whole, whole0 = half.float(), half0.float()
        assert torch.equal(consistency(step, half, half0), consistency(step, whole, whole0))
        assert torch.equal(diversity(step, half), diversity(step, whole))
        assert torch.equal(singular(step, half, 1), singular(step, whole, 1))


def test_consistency_and_its_gradient_vanish_at_the_reference() -> None:
    for step, z in ((classes_step(), Z), (tokens_step(), torch.stack([Z[:2], Z[1:]]))):
        moving = z.clone().requires_grad_()
        loss = consistency(step, moving, z)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
        assert torch.autograd.grad(loss, moving)[0].abs().max() < 1e-7


def test_diversity_of_classes_is_about_correlated_columns() -> None:
    plain = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # diagonal covariance
    assert float(diversity(classes_step(), plain)) == pytest.approx(0, abs=1e-7)
    copied = plain[:, [0, 0]]
    assert float(diversity(classes_step(), copied)) == pytest.approx(2 * (4 / 3) ** 2 / 2)


def test_diversity_of_tokens_is_least_at_the_uniform_distribution() -> None:
    step = tokens_step()
    uniform = float(diversity(step, torch.zeros(2, 2, 4)))
    assert uniform == pytest.approx(-torch.log(torch.tensor(4.0)).item())
    assert uniform < float(diversity(step, torch.randn(2, 2, 4))) < 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_identity_at_start_is_exact_and_principal(arch: str) -> None:
    model = tiny(arch)
    inputs = example_inputs(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        stack = Stack(model, [BaLora(rank=3, alpha=6)])
        assert torch.equal(output_of(model, inputs), before)
    sites = {site.key: site for site in stack.anatomy.sites}
    for part in stack.ledger.of("ba-lora"):
        delta, weight = part.module, sites[part.key].weight if part.key in sites else None
        assert torch.equal(delta.A, delta.A0)
        assert torch.equal(delta.B, delta.B0)
        if weight is not None:  # the best approximation of rank 3: what is left has the other singular values
            rest = torch.linalg.svdvals(weight - delta.scale * delta.B0 @ delta.A0)
            values = torch.linalg.svdvals(weight)
            assert torch.allclose(rest[..., :-3], values[..., 3:], atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about its own saving
def test_equals_pissa_of_peft() -> None:
    """The same start as PEFT's PiSSA, and after the same move of A and B the same logits and gradients."""
    from peft import LoraConfig, get_peft_model

    stack = Stack(
        tiny("llama"), [BaLora(rank=4, targets="attention.q,v", consistency=0, diversity=0, singular=0)]
    )
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    theirs = get_peft_model(tiny("llama"), config)
    inputs = batch_of(stack.model)
    torch.manual_seed(3)
    pairs = []
    for part in stack.ledger.of("ba-lora"):
        layer = theirs.base_model.model.get_submodule(part.path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(part.module.B @ part.module.A, B @ A, atol=1e-5)
        with torch.no_grad():
            change = torch.randn(4, 4) * 0.2 + torch.eye(4)
            for a, b in ((part.module.A, part.module.B), (A, B)):
                sign = torch.sign(
                    a[:, :1] * part.module.A0[:, :1]
                )  # a singular vector's sign is anybody's choice
                a.mul_(sign).copy_(change @ a)
                b.mul_(sign.t())
        pairs += [(part.module.A, A), (part.module.B, B)]
    one, two = stack.model(**inputs), theirs(**inputs)
    assert torch.allclose(one.logits, two.logits, atol=2e-5)
    assert not torch.allclose(one.logits, tiny("llama")(**inputs).logits, atol=1e-2)
    one.loss.backward()
    two.loss.backward()
    assert all(torch.allclose(a.grad, b.grad, atol=2e-5) for a, b in pairs)


def test_weights_of_zero_are_plain_training() -> None:
    """Bit for bit, and without a second forward pass."""
    stack = stack_of(consistency=0, diversity=0, singular=0)
    other = stack_of()
    batch = batch_of(stack.model)
    calls = []
    stack.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    for s in (stack, other):
        perturb(s)
    assert list(losses(stack, batch)) == ["task"]
    assert len(calls) == 1
    other.model(**batch).loss.backward()
    for a, b in zip(*(s.ledger.parameters("ba-lora") for s in (stack, other)), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_each_weight_switches_its_term() -> None:
    off = {"consistency": 0.0, "diversity": 0.0, "singular": 0.0}
    for name in off:
        stack = stack_of(**{**off, name: 0.5})
        perturb(stack)
        found = losses(stack, batch_of(stack.model))
        assert list(found) == ["task", name]
        gradient = [p.grad.clone() for p in stack.ledger.parameters("ba-lora")]
        plain = stack_of(**off)
        perturb(plain)
        losses(plain, batch_of(plain.model))
        assert any(
            not torch.equal(g, p.grad)
            for g, p in zip(gradient, plain.ledger.parameters("ba-lora"), strict=True)
        )


def test_the_reference_is_the_model_without_the_adapter() -> None:
    stack = stack_of()
    batch = batch_of(stack.model, "right")
    stack.model.train()
    assert losses(stack, batch)["consistency"] == pytest.approx(0, abs=1e-7)
    perturb(stack)
    found = losses(stack, batch)["consistency"]
    with torch.no_grad():
        log_p = stack.model(**batch).logits[:, :-1].log_softmax(-1)
        log_p0 = tiny("llama")(**batch).logits[:, :-1].log_softmax(-1)
    known = batch["labels"][:, 1:] != -100
    expected = (log_p0.exp() * (log_p0 - log_p)).sum(-1)[known].sum() / len(known)
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert found > 1e-3
    assert stack.model.training
    assert not any(at.disabled for at in stack.standing.values())


def test_dropout_of_the_base_is_off_in_the_reference() -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    stack = Stack(model, [BaLora(rank=2)])
    batch = batch_of(model)
    model.train()
    step = TrainStep(stack, batch)
    assert torch.equal(stack.plugins["ba-lora"].reference(step), stack.plugins["ba-lora"].reference(step))


def test_other_plugins_stay_on_in_the_reference() -> None:
    model, plugin = tiny("llama"), BaLora(rank=2)
    batch = batch_of(model)
    with torch.no_grad():
        base = model(**batch).logits
        stack = Stack(model, [Lora(rank=2), plugin])
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.1)
        beside = model(**batch).logits  # of LoRA alone: the other one starts as nothing
        perturb(stack)
    found = plugin.reference(TrainStep(stack, batch))
    assert torch.allclose(found, beside, atol=1e-5)
    assert (found - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["consistency", "diversity", "singular"])
def test_padding_does_not_count(name: str) -> None:
    stack = stack_of()
    perturb(stack)
    batch = batch_of(stack.model)
    longer = {
        key: torch.nn.functional.pad(x, (0, 4), value={"input_ids": 2, "labels": -100}.get(key, 0))
        for key, x in batch.items()
    }
    assert losses(stack, longer)[name] == pytest.approx(losses(stack, batch)[name], rel=1e-4)


def test_classes_take_the_other_form() -> None:
    for arch in ("bert", "llama"):
        stack = stack_of(arch, head="classification")
        perturb(stack)
        batch = {**example_inputs(stack.model, batch=5), "labels": torch.tensor([0, 1, 2, 3, 0])}
        if arch == "llama":
            stack.model.config.pad_token_id = 2
        found = losses(stack, batch)
        with torch.no_grad():
            logits = stack.model(**batch).logits
        assert found["diversity"] == pytest.approx(float(diversity(classes_step(), logits)), rel=1e-5)
        s = torch.linalg.svdvals(logits)
        assert found["singular"] == pytest.approx(float(-s[:3].sum() / s.sum()), rel=1e-5)
        assert found["singular"] > -1
        assert found["consistency"] > 1e-6


def test_the_terms_work() -> None:
    """A large weight of each lowers its own term on the batch."""
    for name in ("consistency", "diversity", "singular"):
        ends = []
        for weight in (0.0, 20.0):
            off = {"consistency": 1e-12, "diversity": 1e-12, "singular": 1e-12}
            stack = stack_of(**{**off, name: weight or 1e-12})
            batch = batch_of(stack.model)
            optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=5e-3)
            for _ in range(12):
                stack.train_step(batch, optimizer=optimizer)
            ends.append(losses(stack, batch)[name])
        assert ends[1] < ends[0] - 1e-3, (name, ends)


def test_a_batch_of_one_row_has_no_covariance() -> None:
    stack = stack_of("bert", head="classification")
    batch = {**example_inputs(stack.model, batch=1), "labels": torch.tensor([1])}
    with pytest.raises(PeftxError, match="ba-lora: diversity: the covariance of a batch of 1 row"):
        losses(stack, batch)
    assert losses(stack, batch, index=7)["diversity"] == 0  # the last rows of an epoch
    z = Z[:1].clone().requires_grad_()
    loss = diversity(TrainStep(stack, batch, index=7), z)
    assert not torch.autograd.grad(loss, z)[0].any()


def test_singular_values_that_are_all_in_the_top_are_refused() -> None:
    """The term would be the constant -1, with no gradient."""
    batch = {name: x[:3] for name, x in batch_of(stack_of().model).items()}
    match = r"ba-lora: singular: the logits, 3x\d+, have no singular values beside the top 3"
    with pytest.raises(PeftxError, match=match) as caught:
        losses(stack_of(), batch)
    assert "a batch_size (and number of classes) above 3" in str(caught.value.hint)
    assert -1 < losses(stack_of(top=2), batch)["singular"] < 0
    assert "singular" not in losses(stack_of(singular=0), batch)
    assert losses(stack_of(), batch, index=7)["singular"] == pytest.approx(-1)  # the last rows of an epoch
    classes = Stack(tiny("bert", head="classification", num_labels=2), [BaLora(rank=2)])
    batch = {**example_inputs(classes.model, batch=5), "labels": torch.tensor([0, 1, 1, 1, 0])}
    with pytest.raises(PeftxError, match="the logits, 5x2, have no"):
        losses(classes, batch)


def test_small_steps_count_in_bfloat16() -> None:
    """bfloat16 keeps 8 bits: a step of a thousandth of A would be rounded away, and so would its effect on y."""
    torch.manual_seed(0)
    model = tiny("llama").to(torch.bfloat16)
    stack = Stack(model, [BaLora(rank=2)])
    assert {t.dtype for t in stack.ledger.tensors("ba-lora").values()} == {torch.float32}
    delta = model.model.layers[0].mlp.down_proj.peftx["ba-lora"]
    with torch.no_grad():
        for _ in range(8):
            delta.A.mul_(1 + 1e-4)
        assert torch.allclose(delta.A, delta.A0 * (1 + 1e-4) ** 8, rtol=1e-5)
        x = torch.randn(3, 48).bfloat16()
        found = delta(x, torch.zeros(3, 32, dtype=torch.bfloat16))
        expected = ((1 + 1e-4) ** 8 - 1) * x.double() @ (delta.B0.double() @ delta.A0.double()).t()
    assert found.dtype == torch.bfloat16
    assert expected.abs().max() > 1e-4
    assert torch.allclose(found.double(), expected, rtol=0.02, atol=1e-6)


def test_the_bundle_holds_the_start(tmp_path: Any) -> None:
    import peftx

    stack = stack_of()
    perturb(stack)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"))
    saved = stack.ledger.tensors("ba-lora")
    assert {name.rpartition(".")[2] for name in saved} == {"A", "B", "A0", "B0"}
    assert all(torch.equal(t, saved[name]) for name, t in loaded.ledger.tensors("ba-lora").items())


def test_rank_above_the_matrix_is_refused() -> None:
    match = r"ba-lora: rank 128 exceeds the 32x32 matrix model\.layers\.0"
    with pytest.raises(PeftxError, match=match) as caught:
        Stack(tiny("llama"), [BaLora()])
    assert caught.value.hint == "rank at most 32, or leave it out of targets: '!attention.q'"


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(PeftxError, match=r"ba-lora: .*'mpl' matches nothing"):
        stack_of(targets="mpl")


def test_tokens_without_labels_are_refused() -> None:
    """As a step may leave them whose own loss needs none."""
    step, z = TrainStep(stack_of("bert"), {}), torch.stack([Z[:2], Z[1:]])
    for term in (lambda: consistency(step, z, z), lambda: diversity(step, z), lambda: singular(step, z, 1)):
        with pytest.raises(PeftxError, match="ba-lora: the batch has no 'labels'"):
            term()


def test_outputs_without_logits_are_refused() -> None:
    stack = Stack(tiny("clip"), [BaLora(rank=2)])
    with pytest.raises(PeftxError, match="ba-lora: CLIPOutput has no logits"):
        losses(stack, {**example_inputs(stack.model), "return_loss": True})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"consistency": -1.0}, "consistency"),
        ({"diversity": -1.0}, "diversity"),
        ({"singular": -1.0}, "singular"),
        ({"singular": float("inf")}, "singular"),
        ({"top": 0}, "top"),
        ({"targets": ""}, "targets"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"BaLora: {match}"):
        BaLora(**options)


def test_what_is_a_mean_does_not_depend_on_how_rows_are_cut() -> None:
    """L_C and L_D weigh right in micro-batches with unlike numbers of labels; L_S, which is of a batch, is off."""
    options = {"rank": 2, "consistency": 1.0, "diversity": 1.0, "singular": 0.0}
    check = "accumulation_makes_the_same_step"
    results = run_checks("ba-lora", options=options, only=[check])
    assert len(results) >= 4
    assert not [result for result in results if result.outcome != "passed"]
