"""The `prepare_data` hook."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from peftx.engines.data import FORMATS, TrainingData, tokenize_dataset
from peftx.engines.data.gate import COLUMNS
from peftx.engines.training.run import as_training_data
from peftx.errors import DataError, PeftxError
from peftx.kernel.plugin import Claim
from peftx.stack import Stack
from peftx.testing.case import Case, crashed, error_of
from peftx.testing.checks.check import check
from peftx.testing.reference import ReferenceColumn
from peftx.testing.subject import Subject


def _prepares(subject: Subject) -> bool:
    return subject.implements("prepare_data")


def _data(case: Case, stack: Stack, rows: list[Any]) -> TrainingData:
    return as_training_data(stack, rows, seed=0, max_length=96)


@check(on="first", when=_prepares)
def check_data_repeats_under_a_seed(case: Case) -> None:
    """The same rows and seed give the same rows, whatever the global generators did in between."""
    results = []
    for _ in range(2):
        stack = case.stack()
        data = stack.prepare(_data(case, stack, list(case.subject.rows)))
        assert data.train is not None, "the rows to train on are gone"
        results.append((data.format, data.train.column_names, data.train.to_list()))
        torch.rand(3), random.random(), numpy.random.rand()  # noqa: NPY002  must not matter
    assert results[0] == results[1], _first_difference(results[0][2], results[1][2])


def _first_difference(one: list[Any], other: list[Any]) -> str:
    if len(one) != len(other):
        return f"two runs with seed 0 give {len(one)} and {len(other)} rows"
    index = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    return (
        f"two runs with seed 0 differ in row {index}: {one[index or 0]!r:.100} and {other[index or 0]!r:.100}"
    )


@check(on="first", when=_prepares)
def check_rows_fit_their_format(case: Case) -> None:
    """What comes out is rows of the format that the data names, and can be tokenized."""
    stack = case.stack()
    data = stack.prepare(_data(case, stack, list(case.subject.rows)))
    assert data.train is not None, "the rows to train on are gone"
    known = (*FORMATS, "tokenized")
    assert data.format in known, f"format '{data.format}' is none of {', '.join(known)}"
    needed = {"tokenized": ("input_ids", "labels"), "preference": ("prompt", "chosen", "rejected")}.get(
        data.format, ()
    )
    missing = [name for name in needed if name not in data.train.column_names]
    assert not missing, (
        f"rows of format '{data.format}' lack {', '.join(missing)}; they have {data.train.column_names}"
    )
    if data.format != "preference":
        tokenizer = data.tokenizer
        try:
            tokenize_dataset(data.train, tokenizer, format=data.format, max_length=data.max_length)
        except (DataError, KeyError) as error:
            raise AssertionError(f"rows of format '{data.format}' cannot be tokenized: {error}") from error


@check(on="first", when=_prepares)
def check_empty_data_is_refused(case: Case) -> None:
    """No rows at all are a `DataError`."""
    stack = case.stack()
    data = _data(case, stack, list(case.subject.rows))
    assert data.train is not None
    data.train = data.train.select([])
    error = error_of(DataError, lambda: stack.prepare(data))
    assert error is not None, "an empty data set went through"
    assert case.id in str(error), f"the message does not name '{case.id}': {error}"


_NO_COLUMNS = (Claim.NEW_ROWS, Claim.CLASSIFIES, Claim.OWN_LAYOUT, Claim.NO_LABELS)
"""Claims of which each says that the rows are not the run's as they were."""


@check(on="first", when=_prepares)
def check_further_columns_stay(case: Case) -> None:
    """A column that a plugin behind it works by comes through, unless the plugin claims rows of its own."""
    name, claimed = ReferenceColumn.column, [claim for claim in _NO_COLUMNS if case.subject.claims(claim)]
    stack = case.stack(after=[("column", ReferenceColumn())])
    rows = [{**row, name: 1} for row in case.subject.rows]
    prepared: list[TrainingData] = []
    error = error_of(PeftxError, lambda: prepared.append(stack.prepare(_data(case, stack, rows))))
    assert error is None or not crashed(error), f"rows with a further column: {error}"
    if error is not None:  # it says so
        return
    (data,) = prepared
    stays = data.train is not None and name in data.train.column_names
    assert stays or claimed, f"a further column of the rows is gone, so claim {Claim.NEW_ROWS}"
    assert not (stays and Claim.NEW_ROWS in claimed), (
        f"claims {Claim.NEW_ROWS}, and further columns come through"
    )


def _reads_columns(subject: Subject) -> bool:
    return _prepares(subject) and _further(subject.rows) != set()


def _further(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Columns beyond those that make the rows' format."""
    columns = {name for row in rows for name in row}
    return min(
        (columns - {*names} for names in COLUMNS.values() if columns >= {*names}), key=len, default=set()
    )


@check(on="first", when=_reads_columns)
def check_columns_that_are_read_are_claimed(case: Case) -> None:
    """Rows without the further columns of the plugin's examples go through, or it claims that it works by them."""
    gone = _further(case.subject.rows)
    rows = [{name: value for name, value in row.items() if name not in gone} for row in case.subject.rows]
    stack = case.stack()
    error = error_of(PeftxError, lambda: stack.prepare(_data(case, stack, rows)))
    if error is None or crashed(error):
        return
    assert case.subject.claims(Claim.READS_COLUMNS), (
        f"rows without {', '.join(sorted(gone))} are refused, so claim {Claim.READS_COLUMNS}: a plugin in front may "
        f"train on rows of its own ({error})"
    )


CHECKS = (
    check_data_repeats_under_a_seed,
    check_rows_fit_their_format,
    check_empty_data_is_refused,
    check_further_columns_stay,
    check_columns_that_are_read_are_claimed,
)
