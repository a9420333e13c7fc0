"""What `peftx evaluate` measures on, found before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.errors import DataError, UsageError

if TYPE_CHECKING:
    from peftx_spec.models import Pipeline

SAMPLE = "peftx:sample/held_out.jsonl"


@dataclass(frozen=True)
class Measured:
    """Rows to measure on.

    Attributes:
        rows: a file, or a `datasets.Dataset`. named: them, in words. format: theirs; None where they do not tell.
        metrics: what is measured unless others are named. max_length: tokens of a row; None without a limit.
        columns: our name -> the file's.
    """

    rows: Any
    named: str
    format: str | None
    metrics: tuple[str, ...] = ("perplexity",)
    max_length: int | None = None
    columns: Mapping[str, str] | None = None

    @classmethod
    def of(cls, target: str, data: str | None, columns: str | None = None) -> Measured:
        """The rows of `data`; without it those that the bundle `target` was measured on, else a sample.

        Raises:
            PeftxError: a file that is not there, or holds no rows; columns of no file.
        """
        from peftx_cli.columns import pairs_of
        from peftx_cli.recipe import format_of

        names = pairs_of(columns)
        if names and data is None:
            raise UsageError("--columns names columns of --data, and there is none", hint="--data FILE")
        pipeline = _made_by(target) if data is None else None
        own = None if pipeline is None else cls._own(target, pipeline)
        if own is not None:
            return own
        file = data or SAMPLE
        format = format_of("--data", file, names)
        from peftx.engines.models import asset_path  # only now: it brings torch

        return cls(asset_path(file), file, format, columns=names or None)

    @classmethod
    def _own(cls, bundle: str, pipeline: Pipeline) -> Measured | None:
        from peftx.engines.data.formats import format_of_row
        from peftx.engines.data.sources import measured_rows

        try:
            rows, named = measured_rows(pipeline.data)
        except DataError as error:
            raise DataError(
                f"the rows that '{bundle}' was measured on: {error.message}", hint="give others: --data FILE"
            ) from error
        if rows is None:
            return None
        asked = tuple(m.metric for m in pipeline.evaluate if m.options.path is None and not m.options.tasks)
        return cls(
            rows, named, format_of_row(rows[0], where=named), asked or ("perplexity",),
            None if pipeline.train is None else pipeline.train.max_length,
        )  # fmt: skip


def _made_by(target: str) -> Pipeline | None:
    """The pipeline that a bundle was made by; None of a plain model."""
    from peftx.composition.registry import Registry
    from peftx.sharing import located
    from peftx_spec import load_spec

    file = Path(os.path.expanduser(located(target))) / "pipeline.yaml"
    return load_spec(file, catalogue=Registry()).pipeline if file.is_file() else None
