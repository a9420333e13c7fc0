"""The training step, in a loop of one's own and in `stack.train`."""

from __future__ import annotations

import math
from typing import Any

import torch

from peftx.engines.training.step import TrainStep
from peftx.kernel.plugin import Claim
from peftx.testing.case import Case, assert_same_tensors, base_tensors, declared_base, difference
from peftx.testing.checks.check import check, trains
from peftx.testing.subject import Subject


def _wraps_step(subject: Subject) -> bool:
    claims = subject.claims(Claim.REPLACES_STEP) or subject.claims(Claim.NEEDS_GRADIENTS)
    return subject.implements("train_step") and not claims


@check(when=lambda subject: subject.claims(Claim.REPLACES_STEP))
def check_step_makes_no_gradients(case: Case) -> None:
    """A step that replaces the backward pass leaves no gradients, moves parameters, and none at rate 0."""
    for rate in (1e-2, 0.0):
        stack = case.training_stack()
        trained = [p for p in stack.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizer = torch.optim.SGD(trained, lr=rate)
        step = TrainStep(
            stack,
            case.batch(stack),
            learning_rate=optimizer.param_groups[0]["lr"],
            sources=case.sources(stack),
        )
        stack.model.train()
        stack.run_train_step(step)
        with_gradient = sum(p.grad is not None for p in stack.model.parameters())
        assert with_gradient == 0, f"{with_gradient} parameters hold a gradient after the step"
        moved = max(difference(old, p.detach()) for old, p in zip(before, trained, strict=True))
        if rate:
            assert moved > 0, "no parameter moved"
        else:
            assert moved <= 1e-5, f"parameters moved by {moved:.3g} at learning rate 0"


@check(on="first", when=_wraps_step)
def check_gradient_transforms_are_claimed(case: Case) -> None:
    """A plugin that edits gradients says so, so that a step without gradients can refuse it."""
    stack = case.training_stack()
    stack.model.train()
    step = TrainStep(stack, case.batch(stack), sources=case.sources(stack))
    stack.run_train_step(step)
    count = len(step._gradients)
    assert count == 0, f"registers {count} gradient transforms, and does not claim {Claim.NEEDS_GRADIENTS}"


@check(on="first-generative", when=lambda subject: trains(subject) or subject.implements("prepare_data"))
def check_trains_in_the_trainer(case: Case) -> None:
    """`stack.train` makes its steps, with finite losses, and leaves the base as it was."""
    stack = case.training_stack()
    report = stack.train(
        list(case.subject.rows), steps=2, batch_size=2, max_length=96, learning_rate=1e-2,
        sources=case.subject.plugin.sources,
    )  # fmt: skip
    assert report.steps == 2, f"{report.steps} steps were made, not 2"
    assert all(math.isfinite(loss) for _, loss in report.losses), f"losses are {report.losses}"
    declared = declared_base(stack)
    expected = {name: t for name, t in base_tensors(case.model()).items() if name not in declared}
    found = {name: t for name, t in base_tensors(stack.model).items() if name not in declared}
    assert_same_tensors(found, expected, "the base after stack.train and before")


@check(on="first-generative", when=trains)
def check_resume_is_exact(case: Case) -> None:
    """Four steps in one go, and two, a stop and two more, end in the same bits."""
    options: dict[str, Any] = {
        "steps": 4, "batch_size": 2, "max_length": 96, "learning_rate": 1e-2, "checkpoint_every": 2,
        "sources": case.subject.plugin.sources,
    }  # fmt: skip
    rows = list(case.subject.rows)
    straight, resumed = case.training_stack(), case.training_stack()
    straight.train(rows, output=case.folder, **options)
    resumed.train(rows, output=case.folder, resume=case.folder / "checkpoint-2", **options)
    for owner in straight.plugins:
        expected = {n: t.detach() for n, t in straight.ledger.tensors(owner).items()}
        found = {n: t.detach() for n, t in resumed.ledger.tensors(owner).items()}
        assert_same_tensors(found, expected, f"{owner} after 2 + 2 steps and after 4")


CHECKS = (
    check_step_makes_no_gradients,
    check_gradient_transforms_are_claimed,
    check_trains_in_the_trainer,
    check_resume_is_exact,
)
