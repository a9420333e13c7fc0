"""From data and options to a trained stack."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow.compute as compute
import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from peftx.engines.data import Collator, TrainingData, read_dataset
from peftx.engines.data.formats import checked_dataset, dataset_of, detect_format
from peftx.engines.data.gate import listed
from peftx.engines.data.packing import Packing
from peftx.engines.data.places import select
from peftx.engines.data.preparing import prepare as prepare_data
from peftx.engines.data.training_data import Dropped
from peftx.engines.files import make_place, read_json
from peftx.engines.models import asset_path, slow_dtype
from peftx.engines.reporting import check_reports
from peftx.engines.training.arguments import arguments_of, parse_options
from peftx.engines.training.best import Best, Measure
from peftx.engines.training.examples import examples_of, mask_of, one_by_one
from peftx.engines.training.feeders import OWN, Feeder, check_source
from peftx.engines.training.order import order_of
from peftx.engines.training.packing import packing_of, prove
from peftx.engines.training.processes import check_processes, launched
from peftx.engines.training.trainer import IDENTITY, LOG, StackTrainer, check_whole, checkpoints_of, place_of
from peftx.errors import BundleError, CheckpointError, DataError, OptionError, TrainingError
from peftx.kernel.calls import columns_of, own_lengths_of
from peftx.kernel.objective import pad_of
from peftx.kernel.phases import spans
from peftx_spec.models import HIGHER_IS_BETTER
from peftx_spec.training import TrainSpec

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

Progress = Callable[[int, int, dict[str, float | str]], None]
"""Called with (steps done, steps planned, loss terms and phases)."""


Rows: TypeAlias = str | Path | Sequence[dict[str, Any]] | Dataset | TrainingData


@dataclass(frozen=True)
class TrainingReport:
    """What a training run was: losses are means over the logged steps."""

    steps: int
    losses: list[tuple[int, float]]
    """(optimizer step, loss of its micro-batches, mean)."""
    seconds: float
    trainable: int
    """Numbers that can still train at its end; the history has those of its beginning."""
    examples: int
    """Rows, tokenized; those that the run came to, where these are not all."""
    terms: dict[str, float] = field(default_factory=dict)
    """The last step's loss terms."""
    full: int = 0
    """Of these, of prompts and completions or of messages, how many are as long as `max_length`: what was longer is cut
    at its left."""
    best: tuple[int, float] | None = None
    """Step and value of the best measurement, where `eval_steps` asked for some."""
    measuring: float = 0.0
    """Of `seconds`, those that these measurements took."""
    dropped: list[Dropped] = field(default_factory=list)
    """Rows that plugins took from those given, each with its reason."""

    @property
    def first_loss(self) -> float:
        return self.losses[0][1]

    @property
    def last_loss(self) -> float:
        return self.losses[-1][1]


def as_training_data(
    stack: Stack,
    data: Rows,
    *,
    seed: int,
    max_length: int,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
) -> TrainingData:
    """A file or rows as `TrainingData`, before the `prepare_data` hooks."""
    if isinstance(data, TrainingData):
        return data
    if isinstance(data, str | Path):
        data = asset_path(data)
        kind = detect_format(data, columns=columns) if format == "auto" else format
        rows = read_dataset(data, format=kind, columns=columns, limit=limit)
    else:
        data = listed(data)
        if not len(data):
            raise DataError("no rows to train on")
        gate = checked_dataset if isinstance(data, Dataset) else dataset_of
        rows, kind = gate(data, format=format, columns=columns)  # type: ignore[operator]
        if limit is not None:
            rows = select(rows, range(min(limit, len(rows))))
    return TrainingData(
        train=rows, eval=None, tokenizer=stack.tokenizer, seed=seed, format=kind, max_length=max_length
    )


class _Watcher(TrainerCallback):
    """Collects losses and reports progress."""

    def __init__(self, trainer: Callable[[], StackTrainer], progress: Progress | None) -> None:
        self.trainer = trainer
        self.progress = progress
        self.losses: list[tuple[int, float]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None and state.is_world_process_zero:
            trainer = self.trainer()
            told: dict[str, float | str] = {**trainer.loss_terms, **trainer.phases}
            self.progress(state.global_step, state.max_steps, told)


def train(
    stack: Stack,
    data: str | Path | Sequence[dict[str, Any]] | TrainingData,
    *,
    output: str | Path | None,
    resume: bool | str | Path,
    progress: Progress | None,
    options: dict[str, Any] | TrainSpec,
    prepare: bool = True,
    columns: Mapping[str, str] | None = None,
    sources: Mapping[str, Rows] | None = None,
    measure: Measure | None = None,
    resumed: Callable[[str], None] = LOG.info,
) -> TrainingReport:
    """See `Stack.train`. `prepare=False` leaves the `prepare_data` hooks out (they ran already). `resumed` hears from
    where a run goes on."""
    spec = parse_options(options)
    best = _best(stack, spec, measure)
    check_reports(spec, output)
    for id in spec.learning_rates:
        if next(stack.ledger.parameters(stack.member(id).id), None) is None:
            raise OptionError(f"learning_rates: '{id}' has nothing that trains", hint="leave it out")
    trained = stack.trainable_parameters()  # now: a plugin may end in another form, with fewer
    if trained == 0:
        raise TrainingError(
            "nothing trains: no plugin of the stack has trainable parameters",
            hint="add one that injects (peftx list --hook inject), or unfreeze it",
        )
    _check_that_it_acts(stack)
    if slow := slow_dtype(stack.model.dtype, stack.model.device.type):
        warnings.warn(slow, stacklevel=3)
    check_processes(stack.members, launched())
    if output is not None:
        make_place(Path(output) / "checkpoint")
    given = None if columns is None else dict(columns)
    training_data = as_training_data(stack, data, seed=spec.seed, max_length=spec.max_length, columns=given)
    if prepare:
        prepare_data(stack, training_data)
    if training_data.train is None or len(training_data.train) == 0:
        raise DataError(
            "no rows are left to train on", hint="a prepare_data plugin may have dropped them all"
        )
    encoder_decoder = bool(stack.model.config.is_encoder_decoder)
    single = one_by_one(stack, training_data)
    whole = None if single else examples_of(stack, training_data)
    if spec.num_train_epochs is not None:
        count = len(training_data.train if whole is None else whole)
        spec = spec.model_copy(update={"steps": _steps(spec, spec.num_train_epochs, count)})
    processes = max(launched(), torch.cuda.device_count())  # each has a batch
    needed = spec.steps * spec.batch_size * spec.gradient_accumulation * processes
    drawn = single and needed < len(training_data.train)
    picked = order_of(len(training_data.train), spec.seed, 0)[:needed] if drawn else None
    rows = examples_of(stack, training_data, only=picked) if whole is None else whole
    collator = Collator(
        pad_of(stack.model, stack.tokenizer), encoder_decoder=encoder_decoder,
        pad_values=dict.fromkeys(columns_of(stack.model), 0), own_lengths=own_lengths_of(stack.model),
    )  # fmt: skip
    feeders = _feeders(stack, sources or {}, spec, collator)
    own = partial(examples_of, stack, training_data) if drawn else rows
    feeders[OWN] = Feeder(own, collator, size=spec.batch_size, seed=spec.seed, name=OWN)
    for member in stack.members:
        for name in member.plugin.sources:
            check_source(feeders, name, owner=member.id)
    set_seed(spec.seed)
    started = time.perf_counter()
    cached = stack.model.config.to_dict().get("use_cache")
    with ExitStack() as exits:
        folder = Path(output or exits.enter_context(TemporaryDirectory(prefix="peftx-")))
        identity = _identity(stack, spec, training_data.train)
        layout: Collator | Packing = collator
        if spec.packing:
            layout = packing_of(stack, training_data, collator)
            prove(stack, layout, rows)
        trainer = StackTrainer(
            stack, arguments_of(spec, folder, stack, output is not None), rows, layout, identity=identity,
            masks=mask_of(stack, training_data, spec.seed), sources=feeders, drawn=drawn,
            best=best, bf16=spec.bf16, rates=spec.learning_rates,
        )  # fmt: skip
        trainer.add_callback(_Watcher(lambda: trainer, progress))
        start = _checkpoint(folder, resume, identity)
        if start is not None:
            resumed(f"goes on {place_of(start, spec.steps)}")
        for member in stack.members if start is None else ():  # a checkpoint brings the phases of its run
            spans(member.plugin.phases(), spec.steps, owner=member.id)
        if start is None or not trainer.finished(start):
            try:
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
            finally:
                if cached is not None:
                    stack.model.config.use_cache = cached  # the Trainer takes it away
                if spec.gradient_checkpointing:
                    stack.model.activation_checkpointing_disable()
                stack.model.eval()
                stack.model.zero_grad(set_to_none=True)
            if output is not None:
                trainer.keep()
        if best is not None and best.state["snapshot"] is not None:
            trainer.go_back(best.state["snapshot"])
    steps = int(trainer.state.global_step)
    stack.trained_steps += steps
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in logged]
    stack.history.trained(logged, steps=spec.steps, trainable=trained, examples=len(rows))
    return TrainingReport(
        steps,
        losses,
        time.perf_counter() - started,
        stack.trainable_parameters(),
        len(rows),
        trainer.loss_terms,
        _full(rows, training_data),
        None if best is None or best.state["value"] is None else (best.state["step"], best.state["value"]),
        0.0 if best is None else best.seconds,
        training_data.dropped,
    )


def _feeders(
    stack: Stack, sources: Mapping[str, Rows], spec: TrainSpec, collator: Collator
) -> dict[str, Feeder]:
    """Batches of each further source, tokenized as rows of its format are; `prepare_data` has not seen them."""
    if OWN in sources:
        raise DataError(f"'{OWN}' is what the run trains on, and no further source", hint="another name")
    found = {}
    for name, rows in sources.items():
        if not isinstance(rows, str | Path | TrainingData) and len(rows) == 0:
            raise DataError(f"the source '{name}' has no rows")
        data = as_training_data(stack, rows, seed=spec.seed, max_length=spec.max_length)
        examples = examples_of(stack, data)
        found[name] = Feeder(examples, collator, size=spec.batch_size, seed=spec.seed, name=name)
    return found


def _best(stack: Stack, spec: TrainSpec, measure: Measure | None) -> Best | None:
    if spec.eval_steps is None:
        if (
            spec.load_best_model_at_end or spec.early_stopping_patience is not None
        ):  # of a stage and of `train`
            raise OptionError("the best state is known by measurements: set eval_steps")
        return None
    if measure is None:
        raise DataError(
            "eval_steps measures on rows that are not trained on, and there are none",
            hint="data: {eval: file}, or stack.train(..., measured=rows)",
        )

    def told(step: int, scores: Mapping[str, Any]) -> None:
        stack.history.evaluated(f"step {step}", scores)

    return Best(spec, measure, told, higher=HIGHER_IS_BETTER[spec.metric_for_best_model])


def _steps(spec: TrainSpec, epochs: float, rows: int) -> int:
    """Optimizer steps of so many passes, the last one begun counted, as the Trainer counts them."""
    batches = math.ceil(rows / (spec.batch_size * launched()))
    return math.ceil(epochs * math.ceil(batches / spec.gradient_accumulation))


def _full(rows: Dataset, data: TrainingData) -> int:
    if data.format in ("text", "tokenized"):
        return 0
    lengths = compute.list_value_length(rows.with_format("arrow")["input_ids"])
    return int(compute.sum(compute.greater_equal(lengths, data.max_length)).as_py())


def _check_that_it_acts(stack: Stack) -> None:
    """Raises PeftxError where parameters would get no gradient: their plugin is merged, or all are switched off."""
    training = [id for id in stack.plugins if any(p.requires_grad for p in stack.ledger.parameters(id))]
    merged = [id for id in stack.ledger.merged() if id in training]
    if merged:
        raise TrainingError(
            f"'{merged[0]}' is merged, so nothing of it trains",
            hint="stack.unmerge() first, or stack.freeze it",
        )
    if training and all(stack.standing[id].disabled for id in training):
        raise TrainingError(
            f"nothing trains: {', '.join(training)} is switched off", hint="train outside of stack.disabled()"
        )


def _identity(stack: Stack, spec: TrainSpec, rows: Dataset) -> dict[str, Any]:
    """What decides about every bit of a run beside its length: JSON-able."""
    settings = spec.model_dump(
        mode="json", exclude={"steps", "num_train_epochs", "checkpoint_every", "report_to"}
    )
    for name in ("learning_rates", "warmup_ratio"):  # as in checkpoints of versions that had none
        if not settings[name]:
            del settings[name]
    plugins = {id: plugin.config.model_dump(mode="json") for id, plugin in stack.plugins.items()}
    digest = hashlib.sha256(f"{len(rows)} {rows.column_names}".encode())
    for index in range(0, len(rows), max(1, len(rows) // 64)):
        digest.update(json.dumps(rows[index], default=str).encode())
    return {
        **{f"train.{name}": value for name, value in settings.items()},
        **{f"{id}.{name}": value for id, options in plugins.items() for name, value in options.items()},
        "the plugins": list(plugins),
        "the rows": digest.hexdigest(),
        "the base model": stack.base_fingerprint,
    }


def _checkpoint(folder: Path, resume: bool | str | Path, identity: dict[str, Any]) -> Path | None:
    """Where to go on from. Raises CheckpointError if there is nothing, or only checkpoints of another run."""
    if resume is False:
        return None
    if resume is not True:
        check_whole(Path(resume))
    choice = checkpoints_of(folder) if resume is True else [Path(resume)]
    others: list[Path] = []
    broken: list[str] = []
    for found in choice:
        try:
            check_whole(found)
        except BundleError as error:
            LOG.warning("left out: %s", error.message)
            broken.append(error.message)
            continue
        if read_json(found / IDENTITY) == identity:
            return found
        others.append(found)
    if not others:
        raise CheckpointError(
            f"nothing to resume: no whole checkpoint in '{folder}'" + (f": {broken[0]}" if broken else ""),
            hint="train with checkpoint_every",
        )
    found, theirs = others[0], read_json(others[0] / IDENTITY)
    if not isinstance(theirs, dict):
        raise CheckpointError(f"'{found / IDENTITY}' is corrupted")
    differ = sorted(n for n in identity.keys() | theirs.keys() if identity.get(n) != theirs.get(n))
    name, was = differ[0], ""
    if not name.startswith("the "):
        was = f": {theirs.get(name)!r}, now {identity.get(name)!r}"
    raise CheckpointError(
        f"'{found}' is of another run: it differs in {name}{was}"
        + (f", and in {', '.join(differ[1:4])}" if differ[1:] else ""),
        hint="resume with the options that it was started with, or start anew in another folder",
    )
