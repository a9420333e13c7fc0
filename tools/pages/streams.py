"""What `benchmarks/continual.py` measured, once it has: a table for the site, and a line in each plugin's README."""

from __future__ import annotations

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BESIDE = {
    "lae": ("unknown", "joint LoRA, head", "LoRA, head"),
    "scl-mgsm": ("unknown", "joint LoRA, head", "LoRA, head"),
    "q-tuning": ("known", "LoRA, likelihood"),
}
"""Plugin -> whether the task of a text is known, and the rows that its own is told beside."""
PLACE = re.compile(r"<!-- stream -->\n.*?<!-- /stream -->", re.DOTALL)


def table(results: Path = RESULTS) -> str:
    """The page of the run, without its title."""
    file = results / "continual.md"
    if not file.is_file():
        return "It was not run to its end yet: no figures."
    _, _, text = file.read_text("utf-8").partition("\n\n")
    return text.replace("](continual.", "](../../benchmarks/results/continual.").rstrip()


def told(plugin: str, readme: str, results: Path = RESULTS) -> str:
    """A README with what was measured of the plugin between its marks; without a run, and without marks, as it is."""
    file = results / "continual.json"
    if plugin not in BESIDE or not file.is_file():
        return readme
    found = json.loads(file.read_text("utf-8"))
    known, *beside = BESIDE[plugin]
    rows = {row["method"]: row["summary"][known] for row in found["results"]}
    own = next(method for method in rows if method.partition(",")[0] == plugin)
    said = "; ".join(f"{method} {_numbers(rows[method])}" for method in (own, *beside))
    kind = "one of all classes" if known == "unknown" else "one of the text's own task"
    text = (
        f"**A stream of {len(found['settings']['tasks'])} tasks** "
        f"([table](../../../benchmarks/results/continual.md)), three seeds, the answer {kind}: {said}. {found['base']}"
    )
    return PLACE.sub(lambda _: f"<!-- stream -->\n{text}\n<!-- /stream -->", readme)


def _numbers(summary: dict[str, list[float] | None]) -> str:
    """`0.610 ± 0.020 right at the end, 0.100 ± 0.010 forgotten`."""
    told = ((summary["average"], "right at the end"), (summary["forgetting"], "forgotten"))
    return ", ".join(f"{each[0]:.3f} ± {each[1]:.3f} {word}" for each, word in told if each is not None)


MADE = {"stream": table}
