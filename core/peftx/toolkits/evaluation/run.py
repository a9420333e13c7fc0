"""Metrics and the `evaluate` hooks over a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from peftx.engines.data import read_dataset
from peftx.engines.data.formats import dataset_of, detect_format
from peftx.engines.data.gate import check_item, listed
from peftx.engines.data.places import Listed, select
from peftx.engines.data.sources import TASK, format_of, rows_of
from peftx.engines.models import asset_path
from peftx.engines.tasks import find_tasks
from peftx.errors import ConflictError, DataError, OptionError, UsageError, nearest
from peftx.kernel.modes import evaluating
from peftx.toolkits.decoding.text import generate
from peftx.toolkits.evaluation.answers import exact_match
from peftx.toolkits.evaluation.classification import accuracy, accuracy_of_head, head_of
from peftx.toolkits.evaluation.evaluation import Evaluation
from peftx.toolkits.evaluation.language_modelling import perplexity
from peftx.toolkits.evaluation.scores import Score
from peftx.toolkits.evaluation.streams import SUMMARY, task_accuracy, tasks_of
from peftx_spec.models import LM_EVAL, METRIC_FORMATS, Pipeline, SourceSpec

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

METRICS = METRIC_FORMATS
"""Metric -> the formats of rows that it reads."""

OPTIONS = frozenset({
    "limit", "max_length", "max_new_tokens", "columns", "format", "progress", "output_dir", "tasks", "include",
    "num_fewshot",
})  # fmt: skip


def check_known(metric: str, plugins: Sequence[str]) -> None:
    """Raises PeftxError for a name that is neither a metric nor one of these plugins, with the nearest right one."""
    names = [*METRICS, *plugins]
    if metric not in names:
        raise OptionError(
            f"unknown metric '{metric}'", hint=nearest(metric, names) or f"there are: {', '.join(names)}"
        )


def check_metric(metric: str, format: str) -> None:
    """Raises PeftxError where a metric of the core cannot read rows of this format."""
    formats = METRICS.get(metric, (format,))
    if formats and format not in formats:
        other = next((name for name, known in METRICS.items() if format in known), None)
        raise OptionError(
            f"{metric} reads rows of {' or '.join(formats)}, and these are {format}",
            hint=f"evaluate: [{other}]" if other else "give it other data: path",
        )


def check_metrics(
    pipeline: Pipeline, plugins: Sequence[str], *, measured: bool, stream: Sequence[str] = ()
) -> None:
    """Read the first row of each file that a metric reads, and look for the tasks that are named.

    Args:
        plugins: those that evaluate. measured: does a stage evaluate. stream: names of the tasks that are gone over.

    Raises:
        PeftxError: an unknown metric or task, or rows that a metric cannot read.
    """
    data = pipeline.data
    evaluated = data.train if data.holdout is not None else data.eval
    for metric in pipeline.evaluate:
        options = metric.options
        check_known(metric.metric, plugins)
        if metric.metric == LM_EVAL:
            find_tasks(options.tasks, None if options.include is None else Path(options.include))
            continue
        path = options.path or (evaluated.path if evaluated is not None else None)
        if options.path is not None:
            read_dataset(asset_path(options.path), format=options.format, limit=1)
        if metric.metric not in METRICS or not measured or path is None:  # the spec says so
            continue
        if options.path is None and evaluated is not None:
            check_metric(metric.metric, format_of(evaluated))
        else:
            known = options.format != "auto"
            check_metric(metric.metric, options.format if known else detect_format(asset_path(path)))
        if metric.metric == SUMMARY and stream:
            source = (
                evaluated if options.path is None else SourceSpec(path=options.path, format=options.format)
            )
            assert source is not None
            rows = rows_of(source, limit=options.limit or source.limit)
            tasks_of([row.get(TASK) for row in rows], stream)


def evaluate(
    stack: Stack,
    data: str | Path | Sequence[Any] | Mapping[str, Any] | None,
    *,
    metrics: Sequence[str],
    options: dict[str, Any],
) -> dict[str, Score]:
    """Run metrics (built-in names, or ids of plugins with an `evaluate` hook) on one data set.

    Args:
        data: a file, texts or rows.
        options: `limit`, `max_length`, `max_new_tokens` (of an exact match's answer), `columns` (the data's own name
            for a name of the format), `format`, `progress`, `output_dir`; of `task-accuracy` `tasks`, in their order;
            of `lm-eval`, which has rows of its own, `tasks`, `include` and `num_fewshot`.

    Returns:
        name -> Score; `stack.scores` gets them too.

    Raises:
        PeftxError: an unknown metric or option.
    """
    for name in sorted(options.keys() - OPTIONS):
        raise OptionError(f"evaluate: unknown option '{name}'", hint=nearest(name, OPTIONS) or None)
    limit, max_length = options.get("limit"), options.get("max_length")
    rows = _rows(data, options.get("format", "auto"), limit, options.get("columns"))
    plugins = [m for m in stack.members if m.implements("evaluate")]
    scores: dict[str, Score] = {}
    for metric in metrics:
        check_known(metric, [m.id for m in plugins])
        if metric == "perplexity":
            scores |= perplexity(
                stack.model, stack.tokenizer, _needed(rows, metric), max_length=max_length,
                progress=options.get("progress"),
            )  # fmt: skip
        elif metric == "accuracy":
            head = head_of(stack)
            result = (
                accuracy_of_head(stack, head, _needed(rows, metric))
                if head is not None
                else accuracy(
                    stack.model, stack.tokenizer, _needed(rows, metric), max_length=max_length,
                    progress=options.get("progress"),
                )
            )  # fmt: skip
            scores[result.score.name] = result.score
        elif metric == SUMMARY:
            scores |= task_accuracy(
                stack, _needed(rows, metric), tasks=options.get("tasks", ()), max_length=max_length,
                progress=options.get("progress"),
            )  # fmt: skip
        elif metric == "exact-match":
            answer = partial(_answer, stack, options.get("max_new_tokens", 64))
            found = exact_match(answer, _needed(rows, metric), progress=options.get("progress"))
            scores[found.name] = found
        elif metric == LM_EVAL:
            told = _lm_eval(stack, options)
            _refuse_overlap(metric, scores, told)
            scores |= told
        else:
            folder = options.get("output_dir")
            evaluation = Evaluation(
                stack=stack,
                data={"eval": rows} if rows is not None else {},
                output_dir=Path(folder) if folder else None,
            )
            with evaluating(stack.model):
                stack.call(stack.member(metric), "evaluate", evaluation=evaluation)
            _refuse_overlap(metric, scores, evaluation.scores)
            scores |= evaluation.scores
    stack.scores |= scores
    return scores


def _lm_eval(stack: Stack, options: Mapping[str, Any]) -> dict[str, Score]:
    names, include = options.get("tasks") or (), options.get("include")
    tasks, folder = (
        [names] if isinstance(names, str) else list(names),
        None if include is None else Path(include),
    )
    find_tasks(tasks, folder)  # says so where the library is not installed, before it is imported
    from peftx.toolkits.evaluation.harness import run_tasks

    return run_tasks(
        stack, tasks, include=folder, num_fewshot=options.get("num_fewshot"), limit=options.get("limit"),
        max_length=options.get("max_length"), progress=options.get("progress"),
    )  # fmt: skip


def _answer(stack: Stack, new: int, prompt: str) -> str:
    texts, _ = generate(stack, [prompt], new, None, {"do_sample": False})
    return texts[0]


def _refuse_overlap(plugin: str, known: Mapping[str, Score], new: Mapping[str, Score]) -> None:
    both = sorted(known.keys() & new.keys())
    if both:
        raise ConflictError(
            f"'{plugin}' reports a score named '{both[0]}', which another metric has given already"
        )


def _rows(
    data: Any, format: str, limit: int | None, columns: Mapping[str, str] | None = None
) -> list[Any] | None:
    if data is None:
        return None
    if isinstance(data, str | Path):
        return Listed(
            read_dataset(asset_path(data), format=format, columns=dict(columns or {}) or None, limit=limit)
        )
    if isinstance(data, Mapping):
        raise DataError("one row is no list of rows", hint="[row]")
    if isinstance(data, Dataset):
        rows: list[Any] = Listed(data if limit is None else select(data, range(min(limit, len(data)))))
    else:
        rows = list(listed(data))[:limit]
    if columns:
        return list(dataset_of(rows, format=format, columns=dict(columns))[0])
    for index, item in enumerate(rows):
        check_item(item, f"row {index} (counting from 0)")
    return rows


def _needed(rows: list[Any] | None, metric: str) -> list[Any]:
    if not rows:
        raise UsageError(f"{metric} needs data", hint="give a file, texts or rows")
    return rows
