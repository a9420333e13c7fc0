"""Which rows of a measurement its base has read in its pre-training: said with every table of real data.

    python benchmarks/bases.py          # the sentence for each table that is printed by no benchmark itself

What the bundled model has read is listed on its card, file by file; of two files it has read the first rows alone. Any
other base is one by `tools/pretrain_tiny.py --prose`, which reads prose of the folder `text/` and no task set. Files
are named as in MANIFEST.json of the data sets, or by their repository.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftx.engines.models import asset_path

READ_BEFORE = {"classify/ag_news_test.jsonl.gz": 6000, "classify/sentence_polarity.jsonl.gz": 9000}
"""File -> the row (counting from 0) that the bundled model has stopped before."""


@dataclass(frozen=True)
class Source:
    """Rows of a file from row `first` (counting from 0) on."""

    file: str
    first: int = 0

    def __str__(self) -> str:
        return self.file + (f" from row {self.first:,} on" if self.first else "")


def read_by(base: str, source: Source) -> bool:
    """Has the base read these rows?"""
    if source.first and source.first >= READ_BEFORE.get(source.file, source.first + 1):
        return False
    card = asset_path("peftx:tiny/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| [^|]+ \| ([\w./]+\.gz) \|", card, flags=re.MULTILINE)
    return source.file in listed and (base == "peftx:tiny" or source.file.startswith("text/"))


def seen(base: str, **parts: Source) -> str:
    """The sentence that stands with a table. Parts are named as the table's text names them, `training` and `test`."""
    told = []
    for read, words in ((True, "was pre-trained on"), (False, "was not pre-trained on")):
        some = [f"the {name} rows ({part})" for name, part in parts.items() if read_by(base, part) is read]
        if some:
            told.append(f"{words} {' and '.join(some)}")
    name = base if base == "peftx:tiny" else "a model by `tools/pretrain_tiny.py --prose`"
    return f"The base, {name}, {', and '.join(told)}."


NEWS = "classify/ag_news_test.jsonl.gz"
NEWS_LATER = {"training": Source(NEWS, 6000), "test": Source(NEWS, 7000)}
DIALOGUES = Source("dstc8-schema-guided-dialogue/dev, the files given")
SAMPLE = Source("dialogue/sgd_dev_sample.jsonl.gz")
PLAYS = "text/tinyshakespeare.txt.gz"
TABLES: dict[str, dict[str, Source]] = {
    **dict.fromkeys(
        (
            "aligner", "ba-lora", "compacter", "deft", "dynmole", "ist", "layernorm-tuning", "lofit", "lopt", "lora",
            "lorma", "mezo", "ntk-attention", "p-tuning-v2", "prompt-tuning", "propulsion", "qgoft",
            "residual-prompt-tuning", "router-tuning", "sift", "sparselora", "xprompt",
        ),
        NEWS_LATER,
    ),
    "predgen": {"training": Source(NEWS, 6000), "test": Source(NEWS, 7200)},
    "rfc": {"training": Source(NEWS, 6000), "test": Source(NEWS, 6000)},
    "token-trails": {"training": SAMPLE, "test": SAMPLE},
    "user-profile": {"training": DIALOGUES, "test": DIALOGUES},
    "hft": {**NEWS_LATER, "second task's": Source(PLAYS)},
    "lt-sft": {**NEWS_LATER, "style's": Source(PLAYS)},
    "surgical-fim": {"training": Source(NEWS, 6000)},
    "dpo-prefix-sharing": {"training": Source("preference/hh_harmless_base_test.jsonl.gz")},
    "language-ranker": {"compared": Source("text/udhr_parallel.json.gz")},
    "mosaic-it": {"training and test": Source("instruct/math_data.json.gz")},
    "ircoco": {"training and test": Source("code/HumanEval.jsonl.gz")},
    "longrope": dict.fromkeys(("searched", "measured"), Source("text/wikitext2_test.txt.gz")),
    "lemo": dict.fromkeys(("training", "test"), Source("text/wikitext2_test.txt.gz")),
    "transcoder": {"training and test": Source("instruct/codegen_instruct.json.gz")},
    "superfiltering": {"scored": Source("instruct/roleplay_instruct.json.gz")},
}  # fmt: skip
"""Plugin -> the parts of its table, with the bundled model as the base; `README.md` of the plugin has the sentence."""


def main() -> None:
    for name, parts in TABLES.items():
        print(f"{name}: {seen('peftx:tiny', **parts)}")


if __name__ == "__main__":
    main()
