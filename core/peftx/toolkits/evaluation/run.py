"""Metrics and the `evaluate` hooks over a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.engines.data import read_dataset
from peftx.engines.data.gate import check_item
from peftx.engines.models import asset_path
from peftx.errors import DataError, PeftxError, nearest
from peftx.kernel.modes import evaluating
from peftx.toolkits.decoding.text import generate
from peftx.toolkits.evaluation.answers import exact_match
from peftx.toolkits.evaluation.classification import accuracy, accuracy_of_head, head_of
from peftx.toolkits.evaluation.evaluation import Evaluation
from peftx.toolkits.evaluation.language_modelling import perplexity
from peftx.toolkits.evaluation.scores import Score
from peftx_spec.models import METRIC_FORMATS

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

METRICS = METRIC_FORMATS
"""Metric -> the formats of rows that it reads."""


def check_known(metric: str, plugins: Sequence[str]) -> None:
    """Raises PeftxError for a name that is neither a metric nor one of these plugins, with the nearest right one."""
    names = [*METRICS, *plugins]
    if metric not in names:
        raise PeftxError(
            f"unknown metric '{metric}'", hint=nearest(metric, names) or f"there are: {', '.join(names)}"
        )


def check_metric(metric: str, format: str) -> None:
    """Raises PeftxError where a metric of the core cannot read rows of this format."""
    formats = METRICS.get(metric, (format,))
    if format not in formats:
        other = next((name for name, known in METRICS.items() if format in known), None)
        raise PeftxError(
            f"{metric} reads rows of {' or '.join(formats)}, and these are {format}",
            hint=f"evaluate: [{other}]" if other else "give it other data: path",
        )


def evaluate(
    stack: Stack,
    data: str | Path | Sequence[Any] | Mapping[str, Any] | None,
    *,
    metrics: Sequence[str],
    options: dict[str, Any],
) -> dict[str, Score]:
    """Run metrics (built-in names, or ids of plugins with an `evaluate` hook) on one data set.

    Args:
        data: a file, texts or rows. options: `limit`, `max_length`, `max_new_tokens` (of an exact match's answer),
            `format`, `progress`, `output_dir`.

    Returns:
        name -> Score; `stack.scores` gets them too.

    Raises:
        PeftxError: an unknown metric or option.
    """
    unknown = set(options) - {"limit", "max_length", "max_new_tokens", "format", "progress", "output_dir"}
    if unknown:
        name = sorted(unknown)[0]
        raise PeftxError(
            f"evaluate: unknown option '{name}'",
            hint=nearest(name, ["limit", "max_length", "format"]) or None,
        )
    limit, max_length = options.get("limit"), options.get("max_length")
    rows = _rows(data, options.get("format", "auto"), limit)
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
        elif metric == "exact-match":
            answer = partial(_answer, stack, options.get("max_new_tokens", 64))
            found = exact_match(answer, _needed(rows, metric), progress=options.get("progress"))
            scores[found.name] = found
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


def _answer(stack: Stack, new: int, prompt: str) -> str:
    texts, _ = generate(stack, [prompt], new, None, {"do_sample": False})
    return texts[0]


def _refuse_overlap(plugin: str, known: Mapping[str, Score], new: Mapping[str, Score]) -> None:
    both = sorted(known.keys() & new.keys())
    if both:
        raise PeftxError(
            f"'{plugin}' reports a score named '{both[0]}', which another metric has given already"
        )


def _rows(data: Any, format: str, limit: int | None) -> list[Any] | None:
    if data is None:
        return None
    if isinstance(data, str | Path):
        return list(read_dataset(asset_path(data), format=format, limit=limit))
    if isinstance(data, Mapping):
        raise DataError("one row is no list of rows", hint="[row]")
    rows = list(data)[:limit]
    for index, item in enumerate(rows):
        check_item(item, f"row {index} (counting from 0)")
    return rows


def _needed(rows: list[Any] | None, metric: str) -> list[Any]:
    if not rows:
        raise PeftxError(f"{metric} needs data", hint="give a file, texts or rows")
    return rows
