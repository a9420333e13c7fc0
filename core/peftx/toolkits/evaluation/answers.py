"""Exact match of generated answers with references."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peftx.engines.data.places import Place
from peftx.errors import DataError
from peftx.toolkits.evaluation.likelihood import Progress
from peftx.toolkits.evaluation.scores import Score, wilson_interval


def normalise_answer(text: str) -> str:
    """Without outer white space, inner runs of it as one space, case folded."""
    return " ".join(text.split()).casefold()


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators and trailing zeros: `$1,200.50` gives `1200.5`."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number: str = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(
    generate: Callable[[str], str],
    rows: Iterable[Mapping[str, Any]],
    *,
    normalise: Callable[[str], str] = normalise_answer,
    extract: Callable[[str], str | None] | None = None,
    progress: Progress | None = None,
) -> Score:
    """The share of rows whose generated answer equals the reference, with its Wilson interval.

    Args:
        generate: prompt -> the answer alone, without the prompt.
        rows: mappings with `prompt` and `completion`, the reference.
        normalise: applied to both sides before they are compared.
        extract: takes the answer out of both texts (`last_number`); None from the generated text counts as
            wrong, None from a reference is a DataError.
    """
    examples = list(rows)
    if not examples:
        raise DataError("no rows to generate for")
    right = 0
    for index, row in enumerate(examples):
        where = Place(rows, index)
        if "prompt" not in row or "completion" not in row:
            raise DataError(f"{where} needs 'prompt' and 'completion'; found {', '.join(row)}")
        expected = row["completion"] if extract is None else extract(row["completion"])
        if expected is None:
            raise DataError(f"{where}: no answer can be extracted from the reference {row['completion']!r}")
        generated = generate(row["prompt"])
        answer = generated if extract is None else extract(generated)
        right += answer is not None and normalise(answer) == normalise(expected)
        if progress is not None:
            progress(index + 1, len(examples))
    low, high = wilson_interval(right, len(examples))
    return Score(name="exact_match", value=right / len(examples), low=low, high=high, count=len(examples))
