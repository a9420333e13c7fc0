"""Measure while a run trains: keep the best state, and end a run that gets no better."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

from peftx.engines.training.processes import ALONE, Processes
from peftx.engines.training.state_io import random_state, set_random_state

if TYPE_CHECKING:
    from peftx_spec.training import TrainSpec

Measure = Callable[[str, int], Mapping[str, Any]]
"""(Metric, most tokens of a row) -> name -> `Score`, on rows that are not trained on."""


class Best:
    """The best state so far, by one number.

    Args:
        spec: `eval_steps`, `metric_for_best_model`, `load_best_model_at_end`, `early_stopping_patience`.
        higher: more of the metric is better. measure: of the stack as it is.
        told: called with (step, scores).
    """

    def __init__(
        self,
        spec: TrainSpec,
        measure: Measure,
        told: Callable[[int, Mapping[str, Any]], None],
        *,
        higher: bool,
    ) -> None:
        self.spec, self.measure, self.told, self.higher = spec, measure, told, higher
        self.state: dict[str, Any] = {"value": None, "step": 0, "waited": 0, "snapshot": None}
        """In checkpoints too: value and step of the best, measurements since, and what was trained then."""
        self.seconds = 0.0
        """That measuring took, in this process."""

    @property
    def enough(self) -> bool:
        patience = self.spec.early_stopping_patience
        return patience is not None and self.state["waited"] >= patience

    def look(self, step: int, snapshot: Callable[[], Any], processes: Processes = ALONE) -> None:
        """Measure, with the random streams left as they are. snapshot: what the trained state is made of. processes:
        all go by what the first one measured."""
        started = time.perf_counter()
        streams = random_state()
        scores = processes.gather(self.measure(self.spec.metric_for_best_model, self.spec.max_length))[0]
        set_random_state(streams)
        self.told(step, scores)
        value, best = scores[self.spec.metric_for_best_model].value, self.state["value"]
        if best is None or (value > best if self.higher else value < best):
            kept = snapshot() if self.spec.load_best_model_at_end else None
            self.state = {"value": value, "step": step, "waited": 0, "snapshot": kept}
        else:
            self.state["waited"] += 1
        self.seconds += time.perf_counter() - started


class Trained(Protocol):
    """Of a trainer what is looked at: its class imports this file."""

    @property
    def processes(self) -> Processes: ...

    def snapshot(self) -> dict[str, Any]: ...


class Looking(TrainerCallback):
    """Looks every `eval_steps`, before a checkpoint of the step is written."""

    def __init__(self, trainer: Callable[[], Trained], best: Best) -> None:
        self.trainer, self.best = trainer, best

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.best.spec.eval_steps
        if every is not None and state.global_step % every == 0:
            self.best.look(state.global_step, self.trainer().snapshot, self.trainer().processes)
            if self.best.enough:
                control.should_training_stop = True
