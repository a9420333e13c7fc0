"""Training, and taking the plugin away afterwards."""

from __future__ import annotations

import copy
import math

import torch

from peftx.engines.data import IGNORE
from peftx.kernel.plugin import Claim
from peftx.testing.case import (
    Case,
    assert_close,
    assert_equal,
    assert_same_tensors,
    base_tensors,
    declared_base,
    difference,
    largest,
)
from peftx.testing.checks.check import changes_model, check, injects, trains
from peftx.testing.models import tiny_tokenizer
from peftx.testing.subject import Subject


def _has_gradients(subject: Subject) -> bool:
    return trains(subject) and not subject.claims(Claim.REPLACES_STEP)


@check(when=_has_gradients)
def check_every_parameter_gets_a_gradient(case: Case) -> None:
    """One backward pass reaches each declared parameter; after an update, some gradient is not zero."""
    stack = case.training_stack()
    loss, gradients = case.gradients(stack)
    assert math.isfinite(loss), f"the loss is {loss}"
    without = sorted(name for name, gradient in gradients.items() if gradient is None)
    assert not without, f"{len(without)} of {len(gradients)} parameters get no gradient, first {without[0]}"
    stack.model.zero_grad()
    case.train(stack, 1)
    gradients = case.gradients(stack)[1]
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    assert math.isfinite(largest), f"a gradient of step 2 is {largest}"
    assert largest > 0, "all gradients of step 2 are zero: nothing would ever train"


@check(when=trains)
def check_step_returns_the_loss(case: Case) -> None:
    """A step returns a finite number, detached, and the model learns from it."""
    stack = case.training_stack()
    before = {id(p): p.detach().clone() for p in stack.model.parameters() if p.requires_grad}
    batch, sources = case.batch(stack), case.sources(stack)
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    stack.model.train()
    for _ in range(2):
        loss = stack.train_step(batch, optimizer=optimizer, sources=sources, total=case.total)
        assert loss.ndim == 0, f"the loss has shape {tuple(loss.shape)}"
        assert not loss.requires_grad, "the loss is not detached, so it would keep the whole graph alive"
        assert math.isfinite(float(loss)), f"the loss is {float(loss)}"
    moved = [difference(before[id(p)], p.detach()) for p in stack.model.parameters() if p.requires_grad]
    assert max(moved) > 0, f"none of {len(moved)} parameters moved in 2 steps"


@check(on="first", when=trains)
def check_trained_model_is_copied(case: Case) -> None:
    """A model that made a step, with gradients, has a deep copy: no module holds on to the graph."""
    stack = case.training_stack()
    case.gradients(stack)
    copy.deepcopy(stack.model)


@check(when=trains)
def check_base_untouched_by_training(case: Case) -> None:
    """After three steps the base's tensors are the same bits, but for those that the plugin declares."""
    stack = case.training_stack()
    case.train(stack, 3)
    declared = declared_base(stack)
    expected = {name: t for name, t in base_tensors(case.model()).items() if name not in declared}
    found = {name: t for name, t in base_tensors(stack.model).items() if name not in declared}
    assert_same_tensors(found, expected, "the base after training and before")


@check(when=changes_model)
def check_remove_restores_base(case: Case) -> None:
    """After training (and compression) and removal there is the base, to the bit, and nothing else."""
    base = case.model()
    stack = case.stack()
    if stack.trainable_parameters():
        case.train(stack, 2)
    case.compress(stack)
    stack.remove(case.id)
    assert_same_tensors(base_tensors(stack.model), base_tensors(base), "the base after removal and before")
    assert_equal(case.output(stack), case.base_output(), "logits after removal and of the base")
    classes = {name: type(module) for name, module in stack.model.named_modules()}
    expected = {name: type(module) for name, module in base.named_modules()}
    left = sorted(classes.keys() ^ expected.keys())
    assert not left, f"modules differ after removal: {', '.join(left[:3])}"
    swapped = [n for n in classes if classes[n] is not expected[n]]
    assert not swapped, f"{swapped[0]} is still a {classes[swapped[0]]!r} after removal"
    configs = [m.config.to_dict() for m in (stack.model, base)]
    for config in configs:
        config.pop("problem_type", None)  # transformers notes it at the first labels
    assert configs[0] == configs[1], "the model's config differs after removal"
    known = [tokenizer.get_vocab() for tokenizer in (stack.tokenizer, tiny_tokenizer())]
    assert known[0] == known[1], (
        f"the tokenizer has {len(known[0])} tokens after removal, and had {len(known[1])}"
    )


@check(when=lambda subject: injects(subject) and not subject.implements("compress"))
def check_disable_restores_base(case: Case) -> None:
    """Switched off, the model is the base to the bit; switched on, what it was."""
    stack = case.finished()
    before = case.output(stack)
    with stack.disabled(case.id):
        assert_equal(case.output(stack), case.base_output(), "logits while disabled and of the base")
    assert_equal(case.output(stack), before, "logits after and before it was disabled")


@check(when=_has_gradients)
def check_gradient_checkpointing(case: Case) -> None:
    """Recomputed activations give the same gradients.

    A gradient that is zero is rounding, which does not repeat: a shift of a key, for one, adds the same to all scores
    of a query. So none is asked for more than float32 has beside the model's largest, 1e-6 of it.
    """
    plain, recomputed = case.training_stack(), case.training_stack()
    for stack in (plain, recomputed):
        case.perturb(stack)
    recomputed.model.activation_checkpointing_enable({"use_reentrant": False})
    loss, gradients = case.gradients(plain)
    other_loss, others = case.gradients(recomputed)
    assert math.isclose(loss, other_loss, rel_tol=1e-5), f"loss {other_loss:.8g}, and {loss:.8g} without"
    seen = max((largest(gradient) for gradient in gradients.values() if gradient is not None), default=0.0)
    for name, gradient in gradients.items():
        other = others[name]
        if gradient is None or other is None:
            assert gradient is other, (
                f"{name} has a gradient only {'with' if gradient is None else 'without'} it"
            )
            continue
        what = f"gradient of {name} with and without checkpointing"
        assert_close(other, gradient, 1e-4, what, least=max(1e-12, 1e-2 * seen))


@check(when=lambda subject: changes_model(subject) or trains(subject))
def check_bfloat16(case: Case) -> None:
    """A bfloat16 model stays bfloat16, trains, and computes what the float32 one does, as far as it can."""
    stack = case.finished(dtype=torch.bfloat16)
    found = case.output(stack)
    base_output = case.base_output(dtype=torch.bfloat16)
    assert found.dtype == base_output.dtype, f"logits are {found.dtype}, the base's {base_output.dtype}"
    half = _half_tensors(case)
    grown = [n for n, t in base_tensors(stack.model).items() if t.dtype == torch.float32 and n in half]
    assert not grown, f"{grown[0]} became float32"
    assert bool(found.isfinite().all()), "some logits are not finite"
    expected = case.output(case.finished())
    base = difference(base_output, case.base_output())
    scale = float(expected.abs().max())
    share = 0.6 if case.subject.claims(Claim.QUANTIZES) else 0.1  # rounding on rounding
    allowed = share * scale + 4 * base
    wrong = difference(found, expected)
    assert wrong <= allowed, (
        f"logits are {wrong:.3g} away from float32's, allowed {allowed:.3g} (base: {base:.3g})"
    )
    if trains(case.subject):
        losses = case.train(case.training_stack(dtype=torch.bfloat16), 2)
        assert all(map(math.isfinite, losses)), f"losses are {losses}"


def _half_tensors(case: Case) -> set[str]:
    """Names of the tensors that are bfloat16 in the plain bfloat16 model."""
    return {n for n, t in base_tensors(case.model(torch.bfloat16)).items() if t.dtype == torch.bfloat16}


@check(when=_has_gradients)
def check_accumulation_makes_the_same_step(case: Case) -> None:
    """The gradient of some rows is the same whether they come at once or one by one, with unlike numbers of labels."""
    stack = case.training_stack()
    if stack.model.config.model_type == "clip":
        return  # its loss is of pairs of rows, so what stands beside a row matters
    case.perturb(stack)
    stack.model.eval()  # dropout draws otherwise
    batch, sources = case.batch(stack), case.sources(stack)
    labels = batch["labels"]
    if labels.ndim == 2 and bool((labels[1] != IGNORE).all()):
        batch["labels"] = labels.clone()
        batch["labels"][1, : labels.shape[1] // 2] = IGNORE
    rows = len(labels)
    parts = [
        {n: v[i : i + 1] if isinstance(v, torch.Tensor) and len(v) == rows else v for n, v in batch.items()}
        for i in range(rows)
    ]
    found = []
    for batches in ([batch], parts):
        stack.model.zero_grad()
        torch.manual_seed(0)
        for micro, (part, share) in enumerate(zip(batches, stack.shares(batches), strict=True)):
            stack.train_step(
                dict(part),
                micro=micro,
                accumulation=len(batches),
                share=share,
                sources=sources,
                total=case.total,
            )
        found.append({n: p.grad.clone() for n, p in stack.model.named_parameters() if p.grad is not None})
    whole, cut = found
    assert whole.keys() == cut.keys(), (
        f"other parameters get a gradient: {sorted(whole.keys() ^ cut.keys())[:3]}"
    )
    scale = max((float(g.abs().max()) for g in whole.values()), default=0.0)
    for name, gradient in whole.items():
        wrong = difference(cut[name], gradient) / max(scale, 1e-12)
        assert wrong <= 1e-4, (
            f"gradient of {name}, rows one by one and at once: {wrong:.3g} of the largest gradient"
        )


CHECKS = (
    check_every_parameter_gets_a_gradient,
    check_step_returns_the_loss,
    check_base_untouched_by_training,
    check_trained_model_is_copied,
    check_remove_restores_base,
    check_disable_restores_base,
    check_gradient_checkpointing,
    check_accumulation_makes_the_same_step,
    check_bfloat16,
)
