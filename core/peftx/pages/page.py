"""One run as HTML. Whatever comes from a bundle, a file or a model is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from peftx.charts import STYLE, Band, Curve, Point, chart
from peftx.history import Measured, TrainingHistory
from peftx.pages.samples import Samples, Served, Speed
from peftx.pages.told import Told
from peftx.quantities import between, measure, plain, size
from peftx.toolkits.evaluation.streams import TITLES, AccuracyMatrix, in_brief

STORED, TRAINED, ADDED = "numbers stored", "numbers trained", "numbers added"
_WHAT_IS_COUNTED = (
    f"{STORED.capitalize()} are those in a plugin's file here; several that are packed into one count as one. "
    f"{TRAINED.capitalize()} are those of all plugins that a training can move, as it begins. {ADDED.capitalize()} are "
    "those that plugins put on the model, trained or not, before it. A plugin may keep less than it trains, such as a "
    "prompt without the network that made it, or store what it never trained."
)


def page(told: Told, samples: Samples | None = None) -> str:
    """The whole page. `samples`: None where nobody asked for any."""
    parts = [
        _head(told),
        _section("The stack", _stack(told)),
        *([_section("Rows", _rows(told))] if told.history.preparations else []),
        _section("Metrics", _metrics(told)),
        _section("Training", _trainings(told)),
        _section("Before and after", _samples(samples)),
        *([_section("Stages", _stages(told))] if told.history.stages else []),
        _section("The plan", _plan(told)),
        _section("Files", _files(told)),
        _section("The spec", f"<pre>{escape(told.spec)}</pre>"),
        _section("How to load it", _loading(told)),
        _section("Versions", _versions(told)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>peftx: {escape(told.title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    texts: Sequence[int] = (),
) -> str:
    """A table of texts, which are escaped here. `numbers`: columns to align right. `texts`: whose line breaks stay."""

    def cell(kind: str, column: int, value: str) -> str:
        name = "number" if column in numbers else "text" if column in texts and kind == "td" else ""
        return f"<{kind}{f' class={chr(34)}{name}{chr(34)}' if name else ''}>{escape(value)}</{kind}>"

    def line(kind: str, values: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(kind, n, value) for n, value in enumerate(values))}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{line("th", columns)}</thead><tbody>{body}</tbody></table></div>'


def quiet(text: str) -> str:
    """A sentence on what is not there."""
    return f'<p class="quiet">{escape(text)}</p>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _head(told: Told) -> str:
    manifest = told.manifest
    steps = f"{manifest.trained_steps:,} step{'s' if manifest.trained_steps != 1 else ''}"
    total = size(sum(told.sizes.values()))
    holds = (
        "the base, compressed, is in it" if manifest.base.contained is not None else "the base is not in it"
    )
    line = f"Trained for {steps}; seed {manifest.seed}; {total} on disk, {holds}; {manifest.base.dtype}."
    return f"<h1>{escape(told.title)}</h1><p>{escape(line)}</p>"


def _stack(told: Told) -> str:
    if not told.manifest.plugins:
        return quiet("No plugin stands on the model.")
    rows = []
    for entry in told.manifest.plugins:
        states = [("in the base's weights for good", entry.folded is not None), ("compressed", entry.compressed),
                  ("frozen", entry.frozen)]  # fmt: skip
        options = ", ".join(f"{name}={value}" for name, value in entry.options.items())
        rows.append(
            (
                entry.id,
                told.papers.get(entry.id, ""),
                options,
                ", ".join(name for name, true in states if true),
                f"{told.numbers[entry.id]:,}" if entry.id in told.numbers else "",
                size(told.sizes[entry.file]) if entry.file is not None else "",
            )
        )
    files = [entry.file for entry in told.manifest.plugins if entry.file is not None]
    if len(files) > 1:
        stored = f"{sum(told.numbers.values()):,}"
        rows.append(("together", "", "", "", stored, size(sum(told.sizes[file] for file in files))))
    columns = ("plugin", "paper", "options", "state", STORED, "size of its file")
    return table(columns, rows, numbers=(4, 5)) + quiet(_WHAT_IS_COUNTED)


def _rows(told: Told) -> str:
    """What became of the rows to train on, plugin by plugin."""
    rows = []
    for one in told.history.preparations:
        reasons = "\n".join(f"{count:,} {reason}" for reason, count in one.dropped.items())
        dropped = sum(one.dropped.values())
        rows.append((one.plugin, f"{one.rows:,}", f"{one.left:,}", f"{dropped:,}", reasons))
    columns = ("plugin", "rows it got", "rows it gave", "dropped", "why")
    return table(columns, rows, numbers=(1, 2, 3), texts=(4,)) + quiet(
        "What it gave may be other rows than it got: several in one, or more of them."
    )


def _stages(told: Told) -> str:
    rows = [(s.name, ", ".join(s.plugins), f"{s.seconds:,.2f}", s.detail) for s in told.history.stages]
    rows.append(("together", "", f"{sum(s.seconds for s in told.history.stages):,.2f}", ""))
    return table(("stage", "plugins", "seconds", ""), rows, numbers=(2,)) + quiet(
        "Without the stage that wrote this bundle, which was not over then."
    )


def _metrics(told: Told) -> str:
    evaluations = told.history.evaluations
    if not evaluations:
        scores = told.manifest.scores
        if not scores:
            return quiet("Nothing was measured.")
        last = [
            (name, _score(value, low, high, unit)) for name, (value, low, high, _, unit) in scores.items()
        ]
        return table(("measure", "last value"), last, numbers=(1,))
    streams = _streams(told)
    names = list(dict.fromkeys(name for e in evaluations for name in e.scores))
    columns = ["measure", *(_moment(e.name, e.trainings) for e in evaluations)]
    shown = in_brief(names) if streams else names
    rows = [[name, *(_measured(e.scores.get(name)) for e in evaluations)] for name in shown]
    return table(columns, rows, numbers=range(1, len(columns))) + streams


def _streams(told: Told) -> str:
    """A table of each matrix of a stream of tasks, and what sums it up."""
    parts = []
    for kind, title in TITLES.items():
        matrix = AccuracyMatrix.of(told.history, kind)
        if matrix is not None:
            numbers = range(1, len(matrix.tasks) + 1)
            summary = ", ".join(
                f"{name} {plain(value)}" for name, value in matrix.told().items() if value is not None
            )
            parts.append(f"<p>{escape(title)}: {escape(summary)}</p>")
            parts.append(table(("after", *matrix.tasks), matrix.rows(), numbers=numbers))
    return "".join(parts)


def _moment(name: str, trainings: int) -> str:
    return f"{name} (before training)" if not trainings else name


def _measured(found: Measured | None) -> str:
    return "" if found is None else _score(found.value, found.low, found.high, found.unit)


def _score(value: object, low: object, high: object, unit: object) -> str:
    """The value, and its interval in a line below."""
    shown = measure(value, str(unit)) if isinstance(value, int | float) else str(value or "not finite")
    if isinstance(low, int | float) and isinstance(high, int | float):
        shown += f"\n{between(low, high)}"
    return shown


# -- training ----------------------------------------------------------------------------------------------------


def _trainings(told: Told) -> str:
    trainings = [training for training in told.history.trainings if training.step]
    if not trainings:
        steps = told.manifest.trained_steps
        why = f"It was trained for {steps:,} steps, and this" if steps else "This"
        return quiet(f"{why} bundle holds no history: there is no curve to draw.")
    rows = [_summary(number, training) for number, training in enumerate(trainings, start=1)]
    columns = ("training", "steps", "rows", TRAINED, "first loss", "last loss", "seconds")
    return (
        table(columns, rows, numbers=range(1, 7))
        + chart(_loss_curves(trainings), x="step", y="loss", title="Loss of each step", bands=bands(trainings))
        + chart(
            [Curve("learning rate", _along(trainings, [t.learning_rate for t in trainings]))],
            x="step", y="rate", title="Learning rate of each step",
        )
    )  # fmt: skip


def _summary(place: int, training: TrainingHistory) -> tuple[str, ...]:
    losses, seconds = training.losses, training.seconds[-1]
    return (
        str(place),
        f"{training.step[-1]:,}",
        f"{training.examples:,}" if training.examples is not None else "",
        f"{training.trainable:,}" if training.trainable is not None else "",
        plain(losses[0][1], 4) if losses else "",
        plain(losses[-1][1], 4) if losses else "",
        f"{seconds:,.1f}" if seconds is not None else "",
    )


def offsets(trainings: Sequence[TrainingHistory]) -> list[int]:
    """Steps of the trainings before each."""
    found = [0]
    for training in trainings:
        found.append(found[-1] + training.step[-1])
    return found[:-1]


def _along(trainings: Sequence[TrainingHistory], columns: Sequence[Sequence[float | None]]) -> list[Point]:
    """A column of each training as one curve, one training behind the other."""
    return [
        (float(before + step), value)
        for before, training, column in zip(offsets(trainings), trainings, columns, strict=True)
        for step, value in zip(training.step, column, strict=True)
        if value is not None
    ]


def _loss_curves(trainings: Sequence[TrainingHistory]) -> list[Curve]:
    """The loss; and its terms, where it has more than one."""
    curves = [Curve("loss", _along(trainings, [t.loss for t in trainings]), smooth=True)]
    names = list(dict.fromkeys(name for training in trainings for name in training.terms))
    for name in names if len(names) > 1 else ():
        columns = [t.terms.get(name, [None] * len(t.step)) for t in trainings]
        curves.append(Curve(f"term: {name}", _along(trainings, columns)))
    return curves


def bands(trainings: Sequence[TrainingHistory]) -> list[Band]:
    """The phases of the plugin that has most, or the trainings where there are several and none has phases."""
    found = []
    for number, (before, training) in enumerate(zip(offsets(trainings), trainings, strict=True), start=1):
        told = max(training.phases.values(), key=lambda column: len(set(column)), default=None)
        if told is None:
            name = f"training {number}" if len(trainings) > 1 else ""
            found.append(Band(name, before + training.step[0], before + training.step[-1]))
            continue
        at = 0
        for phase, run in groupby(told):
            length = len(list(run))
            steps = training.step[at : at + length]
            found.append(Band(phase or "", before + steps[0], before + steps[-1]))
            at += length
    return found if len(found) > 1 else []


# -- the rest ----------------------------------------------------------------------------------------------------


def _samples(found: Samples | None) -> str:
    if found is None:
        return quiet(
            "No samples were asked for: peftx report BUNDLE --samples 3 writes some, and loads the model."
        )
    notes = "".join(quiet(f"{note}.") for note in [*found.notes, *map(_speed, found.speeds)])
    if not found.samples:
        return notes
    rows = [(s.prompt, s.reference, s.before or "", s.after or "") for s in found.samples]
    columns = ("prompt", "the row's answer", "the base writes", "the stack writes")
    return notes + table(columns, rows, texts=(0, 1, 2, 3))


def _speed(found: Speed | Served) -> str:
    if isinstance(found, Served):
        asked = f"{found.who} answered {found.requests} requests that came at once, as peftx serve does"
        a_second = (
            f"{found.requests / found.seconds:,.2f} requests and {found.tokens / found.seconds:,.1f} tokens"
        )
        return f"{asked}: {found.seconds:.2f} seconds, {a_second} a second"
    calls = f"{found.calls:,.0f} forward passes, {found.tokens / found.calls:.2f} tokens each"
    rate = f"{found.seconds:.2f} seconds, {found.tokens / found.seconds:,.1f} tokens a second"
    return f"{found.who} wrote {found.tokens:,.0f} tokens in {calls}; {rate}, one text after another"


def _plan(told: Told) -> str:
    if told.plan is None:
        return quiet(f"The plan cannot be made here: {told.why}")
    totals = told.plan.totals
    stages = [(s.name, ", ".join(s.plugins), ", ".join(s.reads), s.detail) for s in told.plan.stages]
    numbers = [
        ("numbers of the base, and in memory", f"{totals.base_params:,}", size(totals.base_bytes)),
        (ADDED, f"{totals.added_params:,}", ""),
        (TRAINED, f"{totals.trainable_params:,}", ""),
        ("the model in memory at the end", "", size(totals.final_bytes)),
        ("tensors in the bundle", "", f"about {size(totals.bundle_bytes)}"),
    ]
    plugins = [(p.id, f"{p.modules:,}", f"{p.params:,}", size(p.bytes), p.detail) for p in told.plan.plugins]
    each = table(("plugin", "modules", ADDED, "size afterwards", ""), plugins, numbers=(1, 2, 3))
    return (
        table(("stage", "plugins", "reads", ""), stages)
        + each
        + table(("", "numbers", "size"), numbers, numbers=(1, 2))
    )


def _files(told: Told) -> str:
    rows = [(name, size(count)) for name, count in told.sizes.items()]
    rows.append(("together", size(sum(told.sizes.values()))))
    return table(("file", "size"), rows, numbers=(1,))


def _loading(told: Told) -> str:
    name = told.folder.name or "bundle"
    python = f"import peftx\n\nstack = peftx.load({name!r})\nstack.model  # a plain transformers model"
    shell = f'peftx generate {name} "Once upon a time"\npeftx evaluate {name} --data held_out.jsonl\npeftx serve {name}'
    return f"<pre>{escape(python)}</pre><pre>{escape(shell)}</pre>"


def _versions(told: Told) -> str:
    rows = [*told.manifest.versions.items()]
    rows += [(f"plugin {e.id}", e.version or "not published, or not told") for e in told.manifest.plugins]
    hub = told.manifest.hub
    rows += [(f"pulled from {hub.repo}@{hub.revision}", hub.commit)] if hub is not None else []
    return table(("", "version"), rows)
