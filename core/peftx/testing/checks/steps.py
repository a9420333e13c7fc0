"""The training step, in a loop of one's own and in `stack.train`."""

from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftx.engines.data import IGNORE
from peftx.engines.training.step import TrainStep
from peftx.errors import ConflictError
from peftx.kernel.parts import BasePart
from peftx.kernel.phases import spans
from peftx.kernel.plugin import Claim, Plugin, hookimpl
from peftx.stack import Stack
from peftx.testing.case import Case, assert_same_tensors, base_tensors, declared_base, difference, error_of
from peftx.testing.checks.check import check, trains
from peftx.testing.reference import COMPANION, ReferenceGain, ReferenceLowRank
from peftx.testing.subject import Subject, steps_for


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
            total=case.total,
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
    step = TrainStep(stack, case.batch(stack), sources=case.sources(stack), total=case.total)
    stack.run_train_step(step)
    count = len(step._gradients)
    assert count == 0, f"registers {count} gradient transforms, and does not claim {Claim.NEEDS_GRADIENTS}"


@check(on="first-text", when=lambda subject: subject.implements("train_step"))
def check_embeddings_of_a_step_are_claimed(case: Case) -> None:
    """A step that calls the model on embeddings says so, so that what needs tokens can refuse to stand beside it."""
    stack = case.training_stack()
    stack.model.train()
    seen: list[bool] = []

    def watch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(
            not arguments and named.get("input_ids") is None and named.get("inputs_embeds") is not None
        )

    step = TrainStep(stack, case.batch(stack), sources=case.sources(stack), total=case.total)
    handle = stack.model.register_forward_pre_hook(watch, with_kwargs=True)
    stack.run_train_step(step)
    handle.remove()
    claimed = Claim.GIVES_EMBEDDINGS in stack.plugins[case.id].claims
    said = f"{'claims' if claimed else 'does not claim'} {Claim.GIVES_EMBEDDINGS}"
    assert any(seen) == claimed, f"{sum(seen)} of {len(seen)} calls in a step bring embeddings, and it {said}"


def _keeps_labels(subject: Subject) -> bool:
    """A head's rows, and rows of a layout of their own, say by other claims that they have none."""
    other = subject.claims(Claim.CLASSIFIES) or subject.claims(Claim.OWN_LAYOUT)
    return subject.implements("train_step") and not other


@check(on="first-text", when=_keeps_labels)
def check_labels_of_a_step_are_claimed(case: Case) -> None:
    """A step whose rows have no labels of tokens says so, so that what reads labels can refuse to stand beside it."""
    stack = case.training_stack()
    stack.model.train()
    step = TrainStep(stack, case.batch(stack), sources=case.sources(stack), total=case.total)
    stack.run_train_step(step)
    labels = step.batch.get("labels")
    has = labels is not None and bool((labels != IGNORE).any())
    claimed = Claim.NO_LABELS in stack.plugins[case.id].claims
    said = f"{'claims' if claimed else 'does not claim'} {Claim.NO_LABELS}"
    assert has != claimed, f"the batch has {'' if has else 'no '}labels in its step, and it {said}"


@check(on="first-text", when=lambda s: s.implements("train_step") and not s.claims(Claim.CLASSIFIES))
def check_a_loss_of_its_own_is_claimed(case: Case) -> None:
    """A step that puts a loss in the place of the task's says so, so that another one's is not lost."""
    stack = case.training_stack()
    stack.model.train()
    step = TrainStep(stack, case.batch(stack), sources=case.sources(stack), total=case.total)
    replaced: list[object] = []
    put = step.replace_task_loss

    def noted(function: Any, **options: Any) -> None:
        replaced.append(function)
        put(function, **options)

    step.replace_task_loss = noted  # type: ignore[method-assign]
    stack.run_train_step(step)
    claimed = Claim.REPLACES_LOSS in stack.plugins[case.id].claims
    said = f"{'claims' if claimed else 'does not claim'} {Claim.REPLACES_LOSS}"
    assert bool(replaced) == claimed, (
        f"a step puts {'a' if replaced else 'no'} loss in the task's place; it {said}"
    )


@check(on="first-generative", when=lambda subject: trains(subject) or subject.implements("prepare_data"))
def check_trains_in_the_trainer(case: Case) -> None:
    """`stack.train` makes its steps, with finite losses, and leaves the base as it was."""
    stack = case.training_stack()
    steps = steps_for(case.subject.make())
    report = stack.train(
        list(case.subject.rows), steps=steps, batch_size=2, max_length=96, learning_rate=1e-2,
        sources=case.subject.plugin.sources,
    )  # fmt: skip
    assert report.steps == steps, f"{report.steps} steps were made, not {steps}"
    assert all(math.isfinite(loss) for _, loss in report.losses), f"losses are {report.losses}"
    declared = declared_base(stack)
    expected = {name: t for name, t in base_tensors(case.model()).items() if name not in declared}
    found = {name: t for name, t in base_tensors(stack.model).items() if name not in declared}
    assert_same_tensors(found, expected, "the base after stack.train and before")


@check(on="first-generative", when=trains)
def check_resume_is_exact(case: Case) -> None:
    """Four steps in one go, and two, a stop and two more, end in the same bits; more, where phases need them. So does a
    run that finds itself finished: a pipeline that failed behind its training goes on from there."""
    half = steps_for(case.subject.make())
    options: dict[str, Any] = {
        "steps": 2 * half, "batch_size": 2, "max_length": 96, "learning_rate": 1e-2, "checkpoint_every": half,
        "sources": case.subject.plugin.sources,
    }  # fmt: skip
    rows = list(case.subject.rows)
    straight = case.training_stack()
    straight.train(rows, output=case.folder, **options)
    for done, said in ((half, f"{half} + {half}"), (2 * half, f"{2 * half} + 0")):
        resumed = case.training_stack()
        resumed.train(rows, output=case.folder, resume=case.folder / f"checkpoint-{done}", **options)
        for owner in straight.plugins:
            expected = {n: t.detach() for n, t in straight.ledger.tensors(owner).items()}
            found = {n: t.detach() for n, t in resumed.ledger.tensors(owner).items()}
            assert_same_tensors(found, expected, f"{owner} after {said} steps and after {2 * half}")


@check(on="first", when=lambda subject: subject.plugin.phases is not Plugin.phases)
def check_phases_fit(case: Case) -> None:
    """The phases of a run have names of their own, and lie one behind the other."""
    phases = case.subject.make().phases()
    names = [phase.name for phase in phases]
    assert len(set(names)) == len(names), f"two phases have one name: {', '.join(names)}"
    steps = 10 + sum(int(phase.share) for phase in phases if phase.share is not None and phase.share >= 1)
    found = spans(phases, steps, owner=case.id)
    ends = [0, *(span.end for span in found)]
    assert [span.first for span in found] == ends[:-1], f"the phases lie at {', '.join(map(str, found))}"


class _Watch(Plugin):
    """Sees what another plugin trains, as each step comes to it and right behind the update."""

    def __init__(self, other: str, seen: list[float]) -> None:
        super().__init__()
        self.other, self.seen = other, seen

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        def look(_: object = None) -> None:
            trained = step.stack.ledger.parameters(self.other)
            self.seen.append(sum(float(p.detach().double().sum()) for p in trained))

        look()
        step.after_update(look)
        return (yield)


def _beside(case: Case, other: str, kind: type[Plugin]) -> tuple[Stack, list[float]]:
    """The plugin between two that watch: what it does in its step, the second sees, and behind the update the first
    sees what it is about to undo."""
    seen: list[float] = []
    before = [(other, kind()), ("watch-before", _Watch(other, seen))]
    return case.stack(before=before, after=[("watch-behind", _Watch(other, seen))]), seen


@check(on="first-generative", when=lambda subject: subject.plugin.phases is not Plugin.phases)
def check_going_back_is_claimed(case: Case) -> None:
    """A plugin that takes another one's parameters back to where the run began says so, so that what goes by phases of
    its own can refuse to stand beside it."""
    others = (("reference-gain", ReferenceGain), (COMPANION, ReferenceLowRank))
    beside = [
        (id, kind) for id, kind in others if error_of(ConflictError, partial(_beside, case, id, kind)) is None
    ]
    if not beside:
        return  # nobody's parameters are there to be taken back
    stack, seen = _beside(case, *beside[0])
    stack.train(
        list(case.subject.rows), steps=steps_for(stack.plugins[case.id]), batch_size=2, max_length=96,
        learning_rate=1e-2, sources=case.subject.plugin.sources,
    )  # fmt: skip
    moved = next((place for place, value in enumerate(seen) if value != seen[0]), len(seen))
    back = seen[0] in seen[moved:]
    claimed = case.subject.claims(Claim.RESTARTS)
    assert back == claimed, (
        f"what '{beside[0][0]}' trained is {'taken back' if back else 'kept'} from phase to phase, and it "
        f"{'claims' if claimed else 'does not claim'} {Claim.RESTARTS}"
    )


@check(when=lambda subject: trains(subject) and subject.claims(Claim.TRAINS_BASE))
def check_masks_hold(case: Case) -> None:
    """Entries of the base outside a mask are what they were, to the bit, after steps with a weight decay."""
    stack = case.training_stack()
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    stack.model.train()
    for _ in range(2):
        stack.train_step(
            case.batch(stack), optimizer=optimizer, sources=case.sources(stack), total=case.total
        )
    for part in stack.ledger.all(BasePart):
        for name, mask in part.masks.items():
            now, before = part.module._parameters[name], part.original[name]
            assert now is not None
            moved = (now != before.to(now)) & ~mask
            assert not moved.any(), (
                f"{int(moved.sum())} entries of {part.key}.{name} moved outside of the mask"
            )


CHECKS = (
    check_step_makes_no_gradients,
    check_gradient_transforms_are_claimed,
    check_embeddings_of_a_step_are_claimed,
    check_labels_of_a_step_are_claimed,
    check_a_loss_of_its_own_is_claimed,
    check_trains_in_the_trainer,
    check_resume_is_exact,
    check_phases_fit,
    check_going_back_is_claimed,
    check_masks_hold,
)
