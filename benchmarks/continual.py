"""A stream of tasks: what methods know of each task after each one, and what is left of it at the end.

    python benchmarks/stream_rows.py --data DATA -o rows
    python benchmarks/continual.py --spec benchmarks/leaderboards/stream.yaml --rows rows --model BASE --jobs jobs

Every method goes through the stream of the spec, in the place of its stack, under three seeds; `joint` trains on the
rows of all tasks at once, for as many steps. The learning rate is chosen on rows to choose by: of `joint` on those of
all tasks, of the others on those of the first `CHOSEN_AFTER`, after these. A job whose file lies in the folder of jobs
is not run again. Leaves continual.json, .md and .png in benchmarks/results; `python tools/generate.py` tells of them in
the READMEs of the plugins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bases import seen
from stream_rows import SOURCES

from peftx.composition.registry import Registry
from peftx.engines.files import write_text
from peftx.pipeline import Run
from peftx.toolkits.evaluation.streams import AMONG_ALL, SUMMARY, WITHIN, AccuracyMatrix
from peftx_spec import load_spec, resolved
from peftx_spec.models import Pipeline, SourceSpec, StackEntry
from peftx_spec.stages import RunStage

if importlib.util.find_spec("matplotlib") is None:  # now, and not after an hour of training
    sys.exit("the plots need matplotlib: python3 tools/dev_install.py --extra bench")

RESULTS = Path(__file__).parent / "results"
RATES, SEEDS, CHOSEN_AFTER = (5e-4, 2e-3, 1e-2, 1e-1), (0, 1, 2), 3
KINDS = {"unknown": AMONG_ALL, "known": WITHIN}
"""Is the task of a text known: its classes are found among those of all tasks, or among its task's."""
NUMBERS = ("average", "forgetting", "forward transfer")


@dataclass(frozen=True)
class Method:
    """One row. `stack` of the classes of each task; `known` where it has to be told a text's task."""

    name: str
    stack: Callable[[list[list[str]]], list[Any]]
    told: str = "no"
    joint: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = RATES
    before: bool = True
    """Does it answer before it has seen a row."""


def flat(classes: list[list[str]]) -> list[str]:
    return [name for own in classes for name in own]


def head(classes: list[list[str]]) -> list[Any]:
    return ["lora", {"use": "ls-llama", "with": {"labels": flat(classes)}}]


METHODS = [
    Method("joint LoRA, head", head, joint=True),
    Method("LoRA, head", head),
    Method("lae", lambda classes: [{"use": "lae", "with": {"tasks": classes}}]),
    Method(
        "scl-mgsm",
        lambda classes: [{"use": "scl-mgsm", "with": {"labels": flat(classes)}}],
        train={"num_train_epochs": 1}, rates=(RATES[0],), before=False,
    ),
    Method("LoRA, likelihood", lambda classes: ["lora"]),
    Method("q-tuning, likelihood", lambda classes: [{"use": "q-tuning", "with": {"tasks": len(classes)}}], told="yes"),
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """The stream of a spec, with rows of `rows` and a model in place of its own."""

    pipeline: Pipeline
    rows: Path
    jobs: Path

    @property
    def tasks(self) -> list[str]:
        return list(self.pipeline.data.sources)

    def classes(self) -> list[list[str]]:
        """Of each task, as they come first in its rows."""
        found = []
        for task in self.tasks:
            text = (self.rows / f"stream.{task}.jsonl").read_text("utf-8")
            found.append(list(dict.fromkeys(json.loads(line)["label"] for line in text.splitlines())))
        return found

    def run(self, method: Method, rate: float, seed: int, *, choose: bool) -> dict[str, Any]:
        """A job: matrices of both kinds, or of `joint` the accuracy of each task at the end."""
        name = f"{method.name}-{rate:g}-{seed}{'-choose' * choose}".replace(" ", "_")
        pipeline = self.built(method, rate, seed, choose=choose)
        digest = hashlib.sha256(pipeline.model_dump_json().encode()).hexdigest()[:12]
        file = self.jobs / f"{name}-{digest}.json"
        if not file.exists():
            result = Run(pipeline).run()
            scores = {key: score.value for key, score in [*result.scores.values()][-1].items()}
            told = {}
            for kind, summary in ((AMONG_ALL, SUMMARY), (WITHIN, f"{SUMMARY}-within")):
                matrix = AccuracyMatrix.of(result.stack.history, kind)
                told[kind] = asdict(matrix) | matrix.told() if matrix else {"average": scores[summary]}
            found = {"seconds": sum(report.seconds for report in result.training), "trained": result.trainable,
                     "steps": sum(report.steps for report in result.training), **told, "scores": scores}  # fmt: skip
            write_text(file, json.dumps(found) + "\n")
            print(f"{name:45} {told[AMONG_ALL]['average']:.3f} {told[WITHIN]['average']:.3f}", flush=True)
        return dict(json.loads(file.read_text("utf-8")))

    def built(self, method: Method, rate: float, seed: int, *, choose: bool) -> Pipeline:
        tasks = self.tasks[:CHOSEN_AFTER] if choose and not method.joint else self.tasks
        data, train = self.pipeline.data, self.pipeline.train
        assert train is not None
        train = train.model_copy(update={"learning_rate": rate, "seed": seed})
        if method.joint:
            train = train.model_copy(update={"steps": train.steps * len(tasks)})
        measured = self.source("valid" if choose else "test", tasks)
        update: dict[str, Any] = {"eval": measured, "sources": {t: self.source(t) for t in tasks}}
        repeat = {"repeat": {"over": tasks, "run": ["prepare", "train", "evaluate"]}}
        before = [{"evaluate": {"name": "before"}}] if method.before and not choose else []
        stages: list[Any] = ["inject", *before, repeat]
        if method.joint:
            update |= {"train": self.source("all", tasks), "sources": {}}
            stages = ["inject", "prepare", "train", "evaluate"]
        return self.pipeline.model_copy(update={
            "data": data.model_copy(update=update), "train": train.model_copy(update=method.train),
            "stack": tuple(StackEntry.model_validate(entry) for entry in method.stack(self.classes())),
            "run": tuple(RunStage.model_validate(stage) for stage in stages),
        })  # fmt: skip

    def source(self, name: str, tasks: Sequence[str] = ()) -> SourceSpec:
        """Rows of a file, those of the stream's first tasks alone where it says of which task its rows are."""
        file = self.rows / f"stream.{name}.jsonl"
        limit = sum(json.loads(line).get("task") in tasks for line in file.read_text("utf-8").splitlines())
        return SourceSpec(path=str(file.absolute()), limit=limit or None)


def of_seeds(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds; None where a number is not told."""
    known = [value for value in values if value is not None]
    return (statistics.mean(known), statistics.stdev(known)) if len(known) > 1 else None


def measured(setting: Setting, methods: Sequence[Method]) -> Iterator[dict[str, Any]]:
    for method in methods:
        tried = {}
        for rate in method.rates if len(method.rates) > 1 else ():
            tried[rate] = setting.run(method, rate, SEEDS[0], choose=True)[AMONG_ALL]["average"]
        rate = max(tried, key=lambda rate: tried[rate], default=method.rates[0])
        seeds = [setting.run(method, rate, seed, choose=False) for seed in SEEDS]
        summary = {
            known: {name: of_seeds([seed[kind].get(name) for seed in seeds]) for name in NUMBERS}
            for known, kind in KINDS.items()
        }
        chosen = {"rate": rate if tried else None, "tried": tried}
        yield {"method": method.name, "told": method.told, "joint": method.joint, **chosen,
               "summary": summary, "seeds": seeds}  # fmt: skip


def table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| method | told the task | rate | trained | task | average accuracy | forgetting | forward transfer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        for known, numbers in row["summary"].items():
            told = ("" if each is None else "{:.3f} ± {:.3f}".format(*each) for each in numbers.values())
            edge = ", edge" * (row["rate"] in (min(RATES), max(RATES)))
            rate = f"{row['rate']:g}{edge}" if row["rate"] else ""
            cells = [row["method"], row["told"], rate, f"{row['seeds'][0]['trained']:,}", known, *told]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(result: Mapping[str, Any]) -> str:
    """Of what continual.json holds."""
    settings = result["settings"]
    classes, rates = sum(map(len, settings["classes"])), ", ".join(f"{rate:g}" for rate in settings["rates"])
    before = (
        f"{classes} classes, {settings['steps']} steps of {settings['batch_size']} rows a task. A rate out of {rates}, "
        f"chosen on rows apart: on those of the first {settings['chosen_after']} tasks after these, of `joint` on "
        "those of all. Three seeds, ± the standard deviation. `edge`: the best rate was the smallest or the largest "
        "that was tried."
    )
    after = (
        "`joint` has the rows of all tasks at once, for as many steps. Where the `task` is unknown the answer is one "
        f"of all {classes} classes, where it is known one of the text's own task. Forward transfer is how much of a "
        "task is right before it comes, beside what was right before the first: `lae` has none, since a class that "
        "its head does not know yet is never right; `scl-mgsm` does not answer before its first task; `joint` has no "
        "order."
    )
    figure = "![accuracy of each task after each](continual.png)"
    title, lines = f"# A stream of {len(settings['tasks'])} tasks", table(result["results"])
    return "\n\n".join((title, f"{before} {result['base']}", lines, after, figure)) + "\n"


def plot(found: Sequence[Mapping[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """The mean matrix of each method that goes through the stream: the task unknown above, known below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in found if not row["joint"]]
    figure, grid = pyplot.subplots(
        2, len(rows), figsize=(2.6 * len(rows), 7.2), layout="constrained", squeeze=False
    )
    for column, row in enumerate(rows):
        for axes, (known, kind) in zip(grid[:, column], KINDS.items(), strict=True):
            values = torch.tensor([seed[kind]["values"] for seed in row["seeds"]]).mean(0)
            image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"{row['method']}\ntask {known}", fontsize=9)
            axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=6)
            axes.set_yticks(range(len(tasks)), tasks if column == 0 else [""] * len(tasks), fontsize=6)
    grid[0, 0].set_ylabel("after task", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.6, label="accuracy")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main(
    spec: Annotated[Path, typer.Option()],
    rows: Annotated[Path, typer.Option()],
    model: Annotated[str, typer.Option()],
    jobs: Annotated[Path, typer.Option()],
    only: Annotated[list[str] | None, typer.Option(help="methods; all, and the page, if left out")] = None,
) -> None:
    torch.set_num_threads(1)
    jobs.mkdir(parents=True, exist_ok=True)
    pipeline = resolved(
        load_spec(spec, catalogue=Registry(), overrides=[f"model.id={model}"]).pipeline, Path.cwd()
    )
    setting = Setting(pipeline, rows, jobs)
    found = list(measured(setting, [m for m in METHODS if not only or m.name in only]))
    print(table(found))
    if only:
        return
    assert pipeline.train is not None
    settings = {"tasks": setting.tasks, "classes": setting.classes(), "steps": pipeline.train.steps,
                "batch_size": pipeline.train.batch_size, "rates": RATES, "chosen_after": CHOSEN_AFTER}  # fmt: skip
    result = {"settings": settings, "base": seen(model, **SOURCES), "results": found}
    write_text(RESULTS / "continual.json", json.dumps(result, indent=1) + "\n")
    plot(found, setting.tasks, RESULTS / "continual.png")
    write_text(RESULTS / "continual.md", page(result))


if __name__ == "__main__":
    typer.run(main)
