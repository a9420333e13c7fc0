"""A stream of tasks: how well each one is answered while others are learned.

a[j, i]            accuracy on rows of task i after training on task j, i and j = 1 .. T;  b[i] before any training
average            mean over i of a[T, i]
forgetting         mean over i < T of max over j < T of a[j, i] - a[T, i]
forward transfer   mean over i > 1 of a[i-1, i] - b[i]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftx.engines.data.sources import TASK
from peftx.errors import DataError, nearest
from peftx.kernel.calls import columns_of
from peftx.toolkits.evaluation.classification import check_rows, classify, head_of, label_logs
from peftx.toolkits.evaluation.scores import Score, wilson_interval

if TYPE_CHECKING:
    from peftx.history import Evaluation, History
    from peftx.kernel.stack import Stack
    from peftx.toolkits.evaluation.likelihood import Progress

AMONG_ALL, WITHIN = "accuracy", "accuracy-within"
"""What is told of a task: its rows' classes found among those of all tasks, or among its own."""
TITLES = {
    AMONG_ALL: "accuracy of each task after each, among all classes",
    WITHIN: "accuracy of each task after each, among its own classes",
}
SUMMARY = "task-accuracy"


def task_accuracy(
    stack: Stack,
    rows: Iterable[Mapping[str, Any]],
    *,
    tasks: Sequence[str] = (),
    max_length: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """Accuracy of each task: `accuracy/TASK` among the classes of all tasks, `accuracy-within/TASK` among its own, as
    if one knew which task a text is of; and their means, `task-accuracy` and `task-accuracy-within`.

    By the head of a plugin, or by likelihood, as `accuracy`. A class that the head does not know yet is never right.
    Where a plugin reads a column `task`, it has the task's place, in both.

    Args:
        rows: with `text`, `label` and `task`, a name.
        tasks: of the stream, in order; as they come in the rows if left out.

    Raises:
        DataError: no rows, a row without one of these, or other tasks than the stream's.
    """
    examples = list(rows)
    check_rows(rows, examples)
    tasks = tasks_of([row.get(TASK) for row in examples], tasks)
    names = sorted({row["label"] for row in examples})
    found: dict[str, Score] = {}
    for place, task in enumerate(tasks):
        own = [row for row in examples if row[TASK] == task]
        truth = torch.tensor([names.index(row["label"]) for row in own])
        told = {TASK: torch.tensor([place])} if TASK in columns_of(stack.model) else {}
        with stack.columns(**told):
            scores = _scores(stack, [row["text"] for row in own], names, max_length, progress)  # [N, C]
        within = torch.full_like(scores, -torch.inf)
        within[:, truth] = scores[:, truth]
        for name, known in ((f"{AMONG_ALL}/{task}", scores), (f"{WITHIN}/{task}", within)):
            found[name] = _score(name, known, truth)
    for kind, name in ((AMONG_ALL, SUMMARY), (WITHIN, f"{SUMMARY}-within")):
        found[name] = Score(
            name=name, value=fmean(found[f"{kind}/{task}"].value for task in tasks), count=len(examples)
        )
    return found


def tasks_of(column: Sequence[object], tasks: Sequence[str]) -> list[str]:
    """The tasks of rows whose column `task` this is, in the stream's order where that is known.

    Raises:
        DataError: a row without a name, or of no task of the stream; a task of the stream without a row.
    """
    for index, name in enumerate(column):
        if not isinstance(name, str):
            raise DataError(
                f"row {index} (counting from 0) has no name of a task in 'task'", hint="'task': 'news'"
            )
        if tasks and name not in tasks:
            said = f"row {index} (counting from 0) is of task {name!r}, and the stream has {', '.join(tasks)}"
            raise DataError(said, hint=nearest(name, tasks) or "rows to measure on, of these tasks")
    for name in tasks:
        if name not in column:
            raise DataError(f"no row to measure on is of task {name!r}", hint=f"rows with 'task': '{name}'")
    return list(tasks) or [name for name in dict.fromkeys(column) if isinstance(name, str)]


def _scores(
    stack: Stack, texts: list[str], names: list[str], max_length: int | None, progress: Progress | None
) -> Tensor:
    """[N, C] of these classes, and of those that a head knows beside them; -inf of those that it does not know."""
    head = head_of(stack)
    if head is None:
        sums = label_logs(
            stack.model, stack.tokenizer, texts, names, max_length=max_length, progress=progress
        )
        return torch.tensor(sums)
    labels, given = classify(stack, head, texts)
    names = names + [label for label in labels if label not in names]
    scores = torch.full((len(texts), len(names)), -torch.inf)
    scores[:, [names.index(label) for label in labels]] = given.float().cpu()
    return scores


def _score(name: str, scores: Tensor, truth: Tensor) -> Score:
    """Right is what has more than all others: not one of several that nothing is known of."""
    own = scores.gather(1, truth[:, None])[:, 0]
    hits = int((own > scores.scatter(1, truth[:, None], -torch.inf).amax(1)).sum())
    low, high = wilson_interval(hits, len(truth))
    return Score(name=name, value=hits / len(truth), low=low, high=high, count=len(truth))


def in_brief(scores: Iterable[str]) -> list[str]:
    """Names of scores without those of single tasks, which a matrix tells."""
    return [name for name in scores if not name.startswith((f"{AMONG_ALL}/", f"{WITHIN}/"))]


@dataclass(frozen=True)
class AccuracyMatrix:
    """Of a stream that was gone through; see the module.

    Attributes:
        tasks: T names. values: a, row j of it after task j. before: b, None where nothing was measured before.
    """

    tasks: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    before: tuple[float, ...] | None = None

    @classmethod
    def of(cls, history: History, kind: str = AMONG_ALL) -> AccuracyMatrix | None:
        """What the evaluations of a history tell that are named as their tasks; None where there are none.

        Args:
            kind: `accuracy` or `accuracy-within`.
        """
        known = {e.name: e for e in history.evaluations if f"{kind}/{e.name}" in e.scores}
        if not known:
            return None
        first = [
            e for e in history.evaluations if not e.trainings and f"{kind}/{next(iter(known))}" in e.scores
        ]
        return cls(
            tuple(known),
            tuple(_row(e, kind, known) for e in known.values()),
            _row(first[-1], kind, known) if first else None,
        )

    def told(self) -> dict[str, float | None]:
        """The three numbers that sum it up."""
        return {
            "average": self.average,
            "forgetting": self.forgetting,
            "forward transfer": self.forward_transfer,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """As texts: after which task, and the accuracy of each; `before` first, where it is known."""
        before = [("before", self.before)] if self.before is not None else []
        return [
            (name, *(f"{value:.3f}" for value in row))
            for name, row in [*before, *zip(self.tasks, self.values, strict=True)]
        ]

    @property
    def average(self) -> float:
        return fmean(self.values[-1])

    @property
    def forgetting(self) -> float | None:
        """None of a single task."""
        columns = [*zip(*self.values, strict=True)][:-1]
        return fmean(max(column[:-1]) - column[-1] for column in columns) if columns else None

    @property
    def forward_transfer(self) -> float | None:
        """None of a single task, or where nothing was measured before."""
        if self.before is None or len(self.tasks) < 2:
            return None
        return fmean(self.values[i - 1][i] - self.before[i] for i in range(1, len(self.tasks)))


def _row(evaluation: Evaluation, kind: str, tasks: Iterable[str]) -> tuple[float, ...]:
    return tuple(float(evaluation.scores[f"{kind}/{task}"].value or 0) for task in tasks)
