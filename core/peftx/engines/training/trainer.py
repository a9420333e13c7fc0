"""`transformers.Trainer` whose step is the `train_step` hook, and whose checkpoints resume bit for bit, no pickle."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from peftx.engines.files import plain_files, read_json, sha256, staging, telling_what_was_not_written
from peftx.engines.tensor_files import differs, read_tensors
from peftx.engines.training.best import Best, Looking
from peftx.engines.training.feeders import Feeder
from peftx.engines.training.optimizer import optimizer_for
from peftx.engines.training.order import Epochs, Shuffled
from peftx.engines.training.processes import check_alike
from peftx.engines.training.state_io import load_state, random_state, save_state, set_random_state
from peftx.engines.training.step import run_train_step
from peftx.engines.training.stepping import Stepping
from peftx.errors import BundleError, CheckpointError, TrainingError
from peftx.kernel.phases import Span, at

if TYPE_CHECKING:
    from datasets import Dataset

    from peftx.engines.data.collate import Collator
    from peftx.engines.data.packing import Packing
    from peftx.engines.training.examples import Masks
    from peftx.kernel.stack import Stack

WEIGHTS = "trained.safetensors"
IDENTITY = "run.json"
SUMS = "checksums.json"
LOG = logging.getLogger("peftx")
KEPT = 2


class StackTrainer(Stepping):
    """Trains a stack.

    Args:
        stack: its plugins' parameters train; the base is frozen unless a plugin trains it.
        arguments: of `transformers`. rows: tokenized rows. collator: makes batches of them.
        callbacks: further callbacks (progress bars). identity: what a run must have in common with a checkpoint that it
            goes on from; JSON. masks: hides tokens of each batch, for a masked language model.
        drawn: the rows are those that the run comes to, in their order. best: measures while it trains.
        bf16: forward passes in bfloat16 where that is safe. rates: learning rates of single plugins, by id.
    """

    def __init__(
        self,
        stack: Stack,
        arguments: TrainingArguments,
        rows: Dataset,
        collator: Collator | Packing,
        callbacks: list[TrainerCallback] | None = None,
        identity: dict[str, Any] | None = None,
        masks: Masks | None = None,
        sources: Mapping[str, Feeder] | None = None,
        drawn: bool = False,
        best: Best | None = None,
        bf16: bool = False,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.stack = stack
        self.rates = rates or {}
        self.drawn, self.best, self.bf16 = drawn, best, bf16
        self.masks = masks
        self.sources = sources or {}
        self.identity = identity or {}
        self.memory: dict[str, Any] = {}
        self.loss_terms: dict[str, float] = {}
        self.phases: dict[str, str] = {}
        """Plugin -> its phase in the last step."""
        self._clock: float | None = None
        """When the training would have begun, had it not been interrupted."""
        self._staging: Path | None = None
        self._random: list[Any] = []
        """Random states of all processes, for the checkpoint that is written."""
        self._written: list[Path] = []
        super().__init__(
            model=stack.model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if best is not None:
            self.add_callback(Looking(lambda: self, best))

    # -- the step ------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        step = self.step_of(model, inputs, self.memory, self.sources)
        device = self.stack.model.device.type
        with self.compute_loss_context_manager(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            loss = run_train_step(step)
        self.loss_terms = step.losses
        self.phases = {m.id: step.phase(m.plugin).name for m in self.stack.members if m.plugin.phases()}
        for name, value in step.losses.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"training: the loss '{name}' of step {step.index + 1} is {value}",
                    hint="a smaller learning_rate"
                    + (", or dtype: bfloat16" if self.stack.model.dtype == torch.float16 else ""),
                )
        return loss / step.accumulation  # the log sums over the micro-batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = Shuffled(len(rows), seed, drawn=self.drawn)
        self.add_callback(Epochs(sampler))
        return sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step."""
        if self._clock is None:
            logged = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
            self._clock = time.perf_counter() - (logged[-1] if logged else 0.0)
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self.masks is not None:  # before the labels are counted
            count, first = self.processes.count, self.processes.index
            step = self.state.global_step
            batches = [self.masks(batch, step, i * count + first) for i, batch in enumerate(batches)]
        self.begin(batches)
        return batches, None

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Also what `stack.history` keeps of a step. Checkpoints bring it along, so a resumed run goes on with it."""
        more: dict[str, Any] = {}
        if "loss" in logs and self._clock is not None:
            logs["seconds"] = round(time.perf_counter() - self._clock, 3)
            more = {"terms": dict(self.loss_terms), "phases": dict(self.phases)}
        super().log(logs, start_time)
        if more:  # not for those that it reports to, which take numbers
            self.state.log_history[-1].update(more)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or SGD over what trains; a step that makes no gradients leaves the optimizer idle."""
        parameters = [p for p in self.stack.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_for(
            parameters or [nn.Parameter(torch.zeros(1))],
            str(self.args.optim),
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            own={p: rate for id, rate in self.rates.items() for p in self.stack.ledger.parameters(id)},
        )
        return self.optimizer

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Write a checkpoint of the finished run, unless its last step wrote one."""
        if not (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / WEIGHTS).exists():
            self._save_checkpoint(self.model, None)

    def finished(self, checkpoint: Path) -> bool:
        """Take everything from a checkpoint if the run was complete there: there is nothing to go on with."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_best(checkpoint)
        if state.global_step < self.args.max_steps and not (self.best is not None and self.best.enough):
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _rebuild(self, saved: Mapping[str, Tensor], states: Mapping[str, dict[str, Any]]) -> None:
        """Build plugins as they were when these were saved, where that is another form: without the network that wrote
        a prompt or the guide of a phase that is over, or with fewer ranks. They do so from their state, as when a
        bundle is loaded."""
        was, now = ({name: tuple(t.shape) for name, t in those.items()} for those in (saved, self._trained()))
        differ = {name.partition("/")[0] for name, _ in was.items() ^ now.items()}
        for owner in self.stack.plugins:
            if owner in differ and owner in states:
                self.stack.rebuild(owner, states[owner])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside and rename, so that a checkpoint is there whole or not at all; the first process does."""
        check_alike(self.stack, self.processes, self.state.global_step)
        self._random = self.processes.gather(random_state())
        if self.args.should_save:
            self._write_checkpoint(model, trial)
        self.processes.gather(None)  # the others go on when it is there

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with telling_what_was_not_written(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                with staging(place) as self._staging:
                    super()._save_checkpoint(model, trial)
                    made = self._staging / place.name
                    sums = {str(file.relative_to(made)): sha256(file) for file in plain_files(made)}
                    (made / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
                    _remove(place)
                    made.rename(place)
        finally:
            self._staging = None
        self._written.append(place)
        if len(self._written) > KEPT:  # of its own: another run's in this folder are not its to delete
            _remove(self._written.pop(0))

    def store_flos(self) -> None:
        """Not counted: nobody reads it, and the processes would wait for each other at each step."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def snapshot(self) -> dict[str, Any]:
        """What was trained, as it is: tensors, and what plugins remember."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self._trained().items()}
        return {"tensors": tensors, "state": {id: deepcopy(p.state) for id, p in self.stack.plugins.items()}}

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        """Make a snapshot what is trained."""
        self._rebuild(snapshot["tensors"], snapshot["state"])
        with torch.no_grad():
            for name, tensor in self._trained().items():
                tensor.copy_(snapshot["tensors"][name])
        for owner, state in snapshot["state"].items():
            self.stack.plugins[owner].state = state

    def _load_best(self, checkpoint: Path) -> None:
        if self.best is not None and (checkpoint / "best.json").exists():
            self.best.state = load_state(checkpoint / "best")

    def _trained(self) -> dict[str, Tensor]:
        ledger = self.stack.ledger
        return {f"{o}/{name}": t for o in self.stack.plugins for name, t in ledger.tensors(o).items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: t.detach().cpu().contiguous().clone() for k, t in self._trained().items()}, folder / WEIGHTS
        )
        states = {owner: plugin.state for owner, plugin in self.stack.plugins.items()}
        save_state(folder / "plugins", {"state": states, "memory": self.memory})
        if self.best is not None:
            save_state(folder / "best", self.best.state)
        (folder / IDENTITY).write_text(json.dumps(self.identity, indent=1), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved, extra = read_tensors(folder / WEIGHTS), load_state(folder / "plugins")
        self._rebuild(saved, extra["state"])
        current = self._trained()
        if saved.keys() != current.keys():
            differ = sorted(saved.keys() ^ current.keys())
            raise CheckpointError(
                f"{folder} was written by another stack: {len(differ)} tensors differ, e.g. {differ[0]}",
                hint="resume with the same plugins and options",
            )
        with torch.no_grad():
            for name, tensor in current.items():
                if tensor.shape != saved[name].shape:
                    raise CheckpointError(
                        f"{folder}: {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
                    )
                tensor.copy_(saved[name])
        self._load_best(folder)
        for owner, state in extra["state"].items():
            self.stack.plugins[owner].state = state
        self.memory = extra["memory"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder / "optimizer", self.optimizer.state_dict())
        schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k not in ("lr_lambdas",)}
        save_state(folder / "scheduler", schedule)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer"))
        schedule = self.lr_scheduler.state_dict() | load_state(Path(checkpoint) / "scheduler")
        self.lr_scheduler.load_state_dict(schedule)
        self.stack.settle()  # now: the optimizer's groups are those of the run's start

    def _save_rng_state(self, output_dir: str) -> None:
        for index, state in enumerate(self._random):
            save_state(Path(output_dir) / f"random-{index}", state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_state(Path(checkpoint) / f"random-{self.args.process_index}"))


def _remove(checkpoint: Path) -> None:
    """Rename, then remove: a kill in between leaves nothing that looks like a checkpoint."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f".{checkpoint.name}.removed-{secrets.token_hex(6)}")
        checkpoint.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    for rest in checkpoint.parent.glob(".checkpoint-*.removed-*"):
        shutil.rmtree(rest, ignore_errors=True)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first; whether they are whole is `check_whole`'s to say."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)


def check_whole(checkpoint: Path) -> None:
    """Raises CheckpointError unless every file of a checkpoint is there as it was written."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"no checkpoint at '{checkpoint}'")
    if not os.path.lexists(checkpoint / SUMS):
        raise CheckpointError(f"'{checkpoint}' is no whole checkpoint: {SUMS} is missing")
    sums = read_json(checkpoint / SUMS)
    present = {str(f.relative_to(checkpoint)) for f in plain_files(checkpoint)} - {SUMS}
    needed = {"trainer_state.json", WEIGHTS, IDENTITY}
    if not isinstance(sums, dict) or not needed <= sums.keys():
        raise CheckpointError(f"'{checkpoint / SUMS}' is corrupted")
    for name in sorted(sums.keys() - present):
        raise CheckpointError(f"'{checkpoint}' is no whole checkpoint: {name} is missing")
    for name in sorted(present - sums.keys()):
        raise CheckpointError(f"'{checkpoint}' holds {name}, which is not of it")
    for name, expected in sums.items():
        if differs(checkpoint / name, expected):
            raise CheckpointError(f"'{checkpoint / name}' is corrupted (sha256 differs)")


def place_of(checkpoint: Path, steps: int) -> str:
    """Where a run of so many steps stands that goes on from a checkpoint, in words: step, phases and folder."""
    done = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    lying = load_state(checkpoint / "plugins")["memory"].get("phases", {})
    phases = (
        f", {id} in '{at([Span(*found) for found in known], done).name}'" for id, known in lying.items()
    )
    return f"behind step {done} of {steps}{''.join(phases)}: {checkpoint}"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; a warning names each that is newer and not whole."""
    for checkpoint in checkpoints_of(folder):
        try:
            check_whole(checkpoint)
        except BundleError as error:
            LOG.warning("left out: %s", error.message)
            continue
        return checkpoint
    return None
