"""Training: the step that plugins see, and the trainer that runs it."""

from __future__ import annotations

from peftx.engines.training.step import TrainStep, default_step
from peftx.engines.training.trainer import StackTrainer, last_checkpoint

__all__ = ["StackTrainer", "TrainStep", "default_step", "last_checkpoint"]
