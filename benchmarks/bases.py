"""Which rows of a measurement its base has seen in its pre-training: said with every table that trains on data.

    seen("peftx:tiny", train=Source("classify/snips_train.jsonl.gz"), test=Source("classify/snips_validate.jsonl.gz"))

What the bundled model has read is listed on its card, file by file; of two files it has read the first rows alone. Any
other base is one by `tools/pretrain_tiny.py --prose`, which reads the folder `text/` and no task set.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftx.engines.models import asset_path

READ_BEFORE = {"classify/ag_news_test.jsonl.gz": 6000, "classify/sentence_polarity.jsonl.gz": 9000}
"""File -> the row (counting from 0) that the bundled model has stopped before."""


@dataclass(frozen=True)
class Source:
    """Rows of a file as MANIFEST.json names it, from row `first` (counting from 0) on."""

    file: str
    first: int = 0

    def __str__(self) -> str:
        return self.file + (f" from row {self.first:,} on" if self.first else "")


def read_by(base: str, source: Source) -> bool:
    """Has the base read these rows?"""
    if base != "peftx:tiny":
        return source.file.startswith("text/")
    card = asset_path("peftx:tiny/README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| [^|]+ \| ([\w./]+\.gz) \|", card, flags=re.MULTILINE))
    return source.file in listed and not 0 < READ_BEFORE.get(source.file, 0) <= source.first


def seen(base: str, *, train: Source, test: Source) -> str:
    """The sentence that stands over a table."""
    name = base if base == "peftx:tiny" else "a model by tools/pretrain_tiny.py --prose"
    told = [
        f"{'has' if read_by(base, source) else 'has not'} seen the {what} rows ({source})"
        for what, source in (("training", train), ("test", test))
    ]
    return f"Base: {name}. In its pre-training it {' and '.join(told)}."
