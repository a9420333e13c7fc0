"""Models beside the stack's own: those that a plugin compares with, and those that it asks."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from itertools import chain
from unittest.mock import patch

from torch import Tensor
from transformers import PreTrainedModel

from peftx.companions import companions_of
from peftx.engines.training.run import as_training_data
from peftx.testing.case import Case, assert_same_tensors
from peftx.testing.checks.check import check
from peftx.testing.subject import TEXTS, Subject
from peftx.toolkits.working.worker import watched


def _calls(name: str) -> Callable[[Subject], bool]:
    """Does the plugin's own source call something of this name."""

    def found(subject: Subject) -> bool:
        module = sys.modules[subject.plugin.__module__]
        return re.search(rf"\b{name}\(", inspect.getsource(module)) is not None

    return found


@check(on="first", when=_calls("companion"))
def check_second_models_are_no_part(case: Case) -> None:
    """A second model that is asked for stays frozen and as it was, and nothing of it is in the stack's."""
    stack = case.training_stack() if case.subject.implements("train_step") else case.stack()

    def use() -> None:
        if stack.trainable_parameters():
            case.train(stack, 1)
        if stack.model.can_generate():
            stack.generate(TEXTS[0][:24], max_new_tokens=2)

    case.compress(stack)
    use()
    others = [model for model in companions_of(stack) if model is not stack.model]
    before = [_copied(model) for model in others]
    use()
    own = {id(module) for module in stack.model.modules()}
    for model, tensors in zip(others, before, strict=True):
        name = type(model).__name__
        assert id(model) not in own, (
            f"the second {name} is a module of the stack's model, and so would be saved"
        )
        assert not model.training, f"the second {name} is left in training mode"
        unfrozen = [n for n, p in model.named_parameters() if p.requires_grad]
        assert not unfrozen, f"{len(unfrozen)} parameters of the second {name} train, first {unfrozen[0]}"
        assert_same_tensors(dict(_tensors(model)), tensors, f"the second {name} after two uses and after one")


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _copied(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


@check(on="first", when=lambda subject: subject.implements("prepare_data") and _calls("Worker")(subject))
def check_answers_are_kept(case: Case) -> None:
    """What a language model answered about some rows is not asked again for the same rows."""
    counts = []
    for _ in range(2):
        stack = case.stack()
        with patch.dict(os.environ, PEFTX_CACHE=str(case.folder / "kept")), watched() as asked:
            stack.prepare(as_training_data(stack, list(case.subject.rows), seed=0, max_length=96))
        counts.append(sum(asked))
    assert not counts[1], f"the second time {counts[1]} questions were asked, and the first time {counts[0]}"


CHECKS = (check_second_models_are_no_part, check_answers_are_kept)
