"""Plugins that go wrong with a model beside the stack's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from peftx import Claim, Plugin, TrainingData, TrainStep, companion, hookimpl
from peftx.toolkits.working import Scripted, Worker


class MovesItsTeacher(Plugin):
    """The model that it compares with drifts."""

    caught_by = "second_models_are_no_part"
    teacher: PreTrainedModel | None = None

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Iterator[None]:
        loss = yield
        self.teacher = self.teacher or companion(step.stack, "copy")
        with torch.no_grad():
            next(self.teacher.parameters()).add_(0.01)
        return loss


class KeepsItsTeacherInTheModel(Plugin):
    """What it compares with is a module of the model that it teaches."""

    caught_by = "second_models_are_no_part"
    also = {"base_untouched_by_training", "trains_in_the_trainer", "resume_is_exact"}  # it is new there
    also |= {"composes_with_weights", "composes_with_norms", "composes_with_prompt"}  # and cannot be saved

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Iterator[None]:
        if not hasattr(step.model, "teacher"):
            step.model.teacher = companion(step.stack, "copy")
        return (yield)


class AsksAnew(Plugin):
    """A worker that remembers nothing."""

    caught_by = "answers_are_kept"
    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        assert data.train is not None
        Worker(Scripted(lambda prompt: prompt)).write([str(row) for row in data.train.to_list()])
