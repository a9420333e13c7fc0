"""`apply` and `train`: carry out a pipeline."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import failures, options
from peftx_cli.recipe import Asked

if TYPE_CHECKING:
    from peftx.pipeline import Run

Resume = Annotated[
    bool, typer.Option("--resume", help="go on from the last checkpoint of an interrupted run")
]
ShowSpec = Annotated[bool, typer.Option("--show-spec", help="print the spec and run nothing")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples(
            "apply --plugin lora --plugin prefixquant --set lora.rank=16", "apply pipeline.yaml --output out"
        )
    )(apply)
    app.command(
        epilog=options.examples(
            "train --plugin lora --data rows.jsonl --split 0.1", "train pipeline.yaml --steps 500 --resume"
        )
    )(train)


def apply(
    spec: options.Spec = None,
    plugin: options.Plugins = None,
    model: options.Model = None,
    override: options.Overrides = None,
    data: options.Data = None,
    eval: options.Eval = None,
    columns: options.Columns = None,
    split: options.Split = None,
    adapter: options.Adapter = None,
    calibration: options.Calibration = None,
    steps: options.Steps = None,
    metric: options.Metrics = None,
    output: options.Output = None,
    resume: Resume = False,
    show_spec: ShowSpec = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Run a whole pipeline: prepare, inject, train, compress, evaluate, save.

    Without SPEC the plugins named by --plugin run on the bundled model and its sample data; --show-spec prints that
    spec, to start your own from.
    """
    asked = Asked(spec, plugin or (), model, data, eval, calibration, steps, output, override or (),
                  metric or (), trust_remote_code, columns, split, adapter)  # fmt: skip
    _carry_out(asked, resume=resume, show_spec=show_spec, as_json=as_json, compress=True)


def train(
    spec: options.Spec = None,
    plugin: options.Plugins = None,
    model: options.Model = None,
    override: options.Overrides = None,
    data: options.Data = None,
    eval: options.Eval = None,
    columns: options.Columns = None,
    split: options.Split = None,
    adapter: options.Adapter = None,
    steps: options.Steps = None,
    metric: options.Metrics = None,
    output: options.Output = None,
    resume: Resume = False,
    show_spec: ShowSpec = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Run a pipeline without its compress stages: what is saved is the trained adapter."""
    asked = Asked(spec, plugin or (), model, data, eval, None, steps, output, override or (),
                  metric or (), trust_remote_code, columns, split, adapter)  # fmt: skip
    _carry_out(asked, resume=resume, show_spec=show_spec, as_json=as_json, compress=False)


def _carry_out(asked: Asked, *, resume: bool, show_spec: bool, as_json: bool, compress: bool) -> None:
    from peftx.composition.registry import Registry
    from peftx.errors import PeftxError, with_code
    from peftx_cli.recipe import read, without_compression
    from peftx_cli.render import out_yaml

    registry = Registry()
    recipe = read(asked, registry)
    if not compress:
        recipe = without_compression(recipe, registry)
    if show_spec:
        out_yaml(recipe.text)
        return
    from peftx.pipeline import Run
    from peftx_cli.progress import Interruptible, Interrupts, reporter
    from peftx_cli.summary import report, samples

    with reporter() as shown, Interrupts() as interrupts:
        told = Interruptible(shown, interrupts)
        run = Run(
            recipe.pipeline,
            registry=registry,
            where=recipe.where,
            reporter=told,
            resume=resume,
            trust_remote_code=asked.trust_remote_code,
        )
        # What lies between two plugins Run has named by now; this is between a plugin and the model.
        for conflict in recipe.conflicts:
            raise with_code(conflict.code)(conflict.reason, hint=conflict.remedy or None)
        if run.leads:
            _warn(run, resume=resume)
        try:
            result = run.run()
        except (Exception, KeyboardInterrupt) as error:
            # Of several processes one may hear that another has ended before it hears of Ctrl-C itself.
            if interrupts.seen or isinstance(error, KeyboardInterrupt):
                failures.say("interrupted", hint=_how_to_resume(run) if run.leads else None)
                raise typer.Exit(failures.INTERRUPTED) from error
            trained = run.result is not None and run.result.training
            if isinstance(error, PeftxError) and trained and _checkpoints(run):
                failures.warn(f"the training is not lost: {_how_to_resume(run)}")
            raise
        texts = samples(run, result) if run.leads else []
    if run.leads:
        report(run, result, texts, as_json=as_json)


def _warn(run: Run, *, resume: bool) -> None:
    """What this run replaces or begins anew, before it does."""
    from peftx_cli import ahead

    ahead.warn(run.pipeline)
    found = _checkpoints(run)
    if run.pipeline.output is not None and (Path(run.pipeline.output) / "manifest.json").exists():
        failures.warn(f"{run.pipeline.output} holds a bundle, which this run replaces when it is done")
    if found and not resume:
        failures.warn(
            "an interrupted run into this folder can be resumed; this one starts at the beginning, and what the other "
            f"has done is gone when it ends\n{_how_to_resume(run)}"
        )
    if resume and not found:
        failures.warn("no checkpoint to resume from: the run starts at the beginning")


def _checkpoints(run: Run) -> list[Path]:
    from peftx.engines.files import checkpoints

    if run.pipeline.output is None:
        return []
    return sorted(
        checkpoints(Path(run.pipeline.output)).glob("stage-*/checkpoint-*"), key=lambda p: p.stat().st_mtime
    )


def _how_to_resume(run: Run) -> str:
    """What the user types to go on; honest where there is nothing to go on from."""
    from peftx.engines.training.processes import launched

    found = _checkpoints(run)
    if not found:
        every = run.pipeline.train.checkpoint_every if run.pipeline.train is not None else None
        more = (
            f"the first comes after {every} steps" if every else "--set train.checkpoint_every=20 writes them"
        )
        return f"no checkpoint was written yet, so the run starts over; {more}"
    words = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    start = f"torchrun --nproc-per-node {launched()} -m peftx" if launched() > 1 else "peftx"
    return f"the last checkpoint is {found[-1]}\nto go on: {start} {shlex.join(words)}"
