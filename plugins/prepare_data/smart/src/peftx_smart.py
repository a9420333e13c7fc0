"""SMART: which tasks to train on, how many rows of each, and which: all by submodular functions.

"SMART: Submodular Data Mixture Strategy for Instruction Tuning" (arXiv:2403.08370). Rows belong to tasks. With e_i the
unit vector of a row's prompt, e_t the mean of those of task t, and s the cosine, a mixture of N rows is found thus:

    f(A) = sum_{i in V, j in A} s_ij - lambda sum_{i, j in A} s_ij       graph cut, A a set of tasks
    g_m  = the gain f(A + t_m) - f(A) of the m-th task that is chosen greedily, m = 1..M
    p_m  = (1 + g_m + g_m^2 / 2) / sum_k (1 + g_k + g_k^2 / 2)           Taylor's softmax of second order
    b_m  = floor(N p_m), what is left over one by one to the tasks in turn; at most the size of the task, what is over
           again one by one to those with room
    f(A) = sum_i max_{j in A} s_ij                                       facility location, A of the rows of a task

The first b_m rows that facility location chooses greedily in task m are kept. A task may be divided further, by
template: it gives each template the share of b_m that the template has of its rows.

A cosine is a product of unit vectors, so no function below ever holds a kernel of n x n numbers.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from peftx import Claim, Plugin, PluginConfig, Stack, TrainingData, Worker, hookimpl
from peftx.engines.data import Lazy, Picks, Place, facility_location, pair_of, pairs_of
from peftx.errors import DataError, nearest
from peftx.kernel.heads import mean_of
from peftx.toolkits.working import Answer, OfStack, kept_file


class SmartConfig(PluginConfig):
    """Options of SMART; the paper takes 25,000 to 400,000 rows of 8 to 1840 tasks of FLAN 2022."""

    budget: int = Field(25_000, ge=1, description="N, rows to keep")
    task: str = Field("task", min_length=1, description="column that names the task of a row")
    template: str | None = Field(None, description="column that divides a task further; none: undivided")
    tasks: int | None = Field(None, ge=1, description="M, tasks to choose; all unless given")
    encoder: str = Field("thenlper/gte-large", description="gives e_i: a folder, a hub id, or peftx:tiny")
    function: Literal["graph-cut", "facility-location"] = Field("graph-cut", description="f over tasks")
    cut: float = Field(0.4, ge=0, allow_inf_nan=False, description="lambda of the graph cut")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="gains g are divided by it")
    vectors: Path | None = Field(
        None, description="file that keeps e_i with their prompts, in the place of peftx's own"
    )


class Smart(Plugin):
    """See the module. Rows of any format but `tokenized`, with a column for the task (text or a whole number)."""

    Config = SmartConfig
    claims = {Claim.READS_COLUMNS}
    takes = ("prompt-completion", "messages", "text", "classification", "preference")
    example = {"encoder": "peftx:tiny", "budget": 6, "task": "kind"}
    example_rows = [
        {"prompt": f"{ask} {n}", "completion": f"{n + 1}", "kind": ask}
        for ask in ("Add to", "After")
        for n in range(4)
    ]
    config: SmartConfig

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Keep `budget` rows, in their order. The others go as `no prompt`, `task not chosen` or `over the budget of
        its task`.

        Raises:
            UnsupportedError: rows of a format without prompts.
            DataError: a row that names no task, more rows or tasks wanted than there are, prompts that are all alike.
        """
        config, id = self.config, stack.id_of(self)
        data.require(self.takes, by=id, hint="stand before plugins that tokenize")
        if not data.train:  # the core says so
            return
        groups, prompted = grouped(data, config, id)
        pairs = pairs_of(data.train)
        prompts = Lazy(len(prompted), lambda n: pairs[prompted[n]][0])
        refuse(config, groups, prompts, id)
        e = self._vectors(prompts, prompted, data, str(stack.model.device))
        means = unit([e[[i for rows in parts.values() for i in rows]].mean(0) for parts in groups.values()])
        M = config.tasks or len(groups)
        picks = (
            graph_cut(means, M, config.cut) if config.function == "graph-cut" else facility_location(means, M)
        )
        chosen = [list(groups.values())[place] for place, _ in picks]
        sizes = [sum(map(len, parts.values())) for parts in chosen]
        if sum(sizes) < config.budget:
            raise DataError(
                f"{id}: the {M} tasks that were chosen have {sum(sizes)} rows, and the budget is {config.budget}",
                hint="a smaller budget, or more `tasks`",
            )
        p = taylor_softmax([gain / config.temperature for _, gain in picks])
        reasons: list[str | None] = ["no prompt"] * len(data.train)

        def told(rows: Iterable[int], reason: str | None) -> None:
            for i in rows:
                reasons[i] = reason

        told(prompted, "task not chosen")
        for parts, b in zip(chosen, split(config.budget, p, sizes), strict=True):
            counts = [len(rows) for rows in parts.values()]
            for rows, count in zip(parts.values(), split(b, counts, counts), strict=True):
                told(rows, "over the budget of its task")
                kept = facility_location(unit(e[rows]), count, data.progress)
                told((rows[place] for place, _ in kept), None)
        data.keep(reasons, by=id)

    def _vectors(
        self, prompts: Sequence[str], prompted: Sequence[int], data: TrainingData, device: str
    ) -> Tensor:
        """e [rows, d]; what stands where a row has no prompt is never looked at. A worker holds vectors as text,
        which is larger than they are: it goes, before rows are chosen."""
        assert data.train is not None
        encoder = Vectors(Stack(self.config.encoder, device=device))
        cache = kept_file(encoder.name, encoder.encoder)
        answers = Worker(encoder, self.config.vectors, progress=data.progress, cache=cache).write(prompts)
        e = torch.empty(len(data.train), len(vector_of(answers[0])))
        for i, answer in zip(prompted, answers, strict=True):
            e[i] = vector_of(answer)
        return e


# --------------------------------------------------------------------------------------------------- choosing greedily
def unit(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """[n, d] float64, of length 1."""
    v = vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))
    return normalize(v.double(), dim=-1)


def graph_cut(v: Tensor, count: int, cut: float) -> Picks:
    """Greedily for f(A) = sum_{i in V, j in A} s_ij - cut sum_{i, j in A} s_ij; of equals the first.

    Not lazily: where a cosine is below 0 a gain grows with A, and a gain from before is no bound.
    """
    gains, chosen = v @ v.sum(0) - cut, Picks()  # s_jj is 1
    while len(chosen) < count:
        best = int(gains.round(decimals=9).argmax())  # equal is equal, whatever the order of sums
        chosen.append((best, float(gains[best])))
        gains = gains - 2 * cut * (v @ v[best])
        gains[[place for place, _ in chosen]] = -torch.inf
    return chosen


# ------------------------------------------------------------------------------------------------------------ budgets
def taylor_softmax(gains: Sequence[float]) -> list[float]:
    """p_m: positive for every real gain, since 1 + g + g^2 / 2 = ((1 + g)^2 + 1) / 2."""
    weights = [1 + g + g * g / 2 for g in gains]
    return [weight / sum(weights) for weight in weights]


def split(total: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """`total` divided by weights, none over its size; `total` is at most all sizes together."""
    parts = [floor(total * weight / sum(weights)) for weight in weights]
    left = total - sum(parts)
    parts = [
        min(part + (place < left), size) for place, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]
    while left := total - sum(parts):
        roomy = [place for place, part in enumerate(parts) if part < sizes[place]][:left]
        parts = [part + (place in roomy) for place, part in enumerate(parts)]
    return parts


# ------------------------------------------------------------------------------------------------ prompts and vectors
class Vectors:
    """Answers a prompt with its vector, so that a `Worker` keeps vectors by what they are of and by whom."""

    def __init__(self, encoder: Stack) -> None:
        self.encoder, self.name = encoder, f"vectors:{OfStack(encoder).name}"

    def write(self, prompts: Sequence[str], **_: Any) -> list[Answer]:
        found = self.encoder.embed(prompts, pool=mean_of).cpu().numpy().astype("<f4")
        return [Answer(b64encode(vector.tobytes()).decode()) for vector in found]


def vector_of(answer: Answer) -> Tensor:
    """e_i [d] float32 of what `Vectors` answered."""
    return torch.from_numpy(np.frombuffer(b64decode(answer.text), "<f4").copy())


def grouped(
    data: TrainingData, config: SmartConfig, id: str
) -> tuple[dict[str, dict[str, list[int]]], list[int]]:
    """(task -> template -> places, places) of the rows that have a prompt, in the order of the data."""
    assert data.train is not None
    columns = [name for name in (config.task, config.template) if name is not None]
    for column in columns:
        if column not in data.train.column_names:
            raise DataError(
                f"{id}: no column '{column}' in the rows; columns: {', '.join(data.train.column_names)}",
                hint=nearest(column, data.train.column_names) or "name the column in `task` (or `template`)",
            )
    groups: dict[str, dict[str, list[int]]] = {}
    prompted = list[int]()
    for place, row in enumerate(data.train):
        for column in columns:
            if not isinstance(row[column], str | int) or row[column] == "":
                raise DataError(
                    f"{id}: {Place(data.train, place)} names no {column}: {row[column]!r:.60}",
                    hint=f"'{column}' holds a text or a whole number in every row",
                )
        if pair_of(row)[0].strip():
            prompted.append(place)
            parts = groups.setdefault(str(row[columns[0]]), {})
            parts.setdefault(str(row[columns[-1]]), []).append(place)
    return groups, prompted


def refuse(config: SmartConfig, groups: Mapping[str, Any], prompts: Sequence[str], id: str) -> None:
    """Raises DataError where there is nothing to choose."""
    if config.budget > len(prompts):
        raise DataError(
            f"{id}: the budget is {config.budget} rows, and there are {len(prompts)} with a prompt",
            hint=f"budget: {len(prompts)} keeps all; or more data",
        )
    if config.tasks is not None and config.tasks > len(groups):
        raise DataError(
            f"{id}: tasks {config.tasks}, and the rows are of {len(groups)}", hint="leave `tasks` out"
        )
    if len(prompts) > config.budget and all(prompt == prompts[0] for prompt in prompts):
        raise DataError(
            f"{id}: all {len(prompts)} prompts are the same text, so none is better than another",
            hint="are these the right columns?",
        )
