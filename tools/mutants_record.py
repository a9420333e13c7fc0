"""What `tools/mutants.py --record` leaves: benchmarks/results/mutations.json, and the page of it beside.

For each plugin how many mutants there are, how many were drawn and by which seed, and what became of them. Each
survivor stands there as it was printed, with `why`: a kind and a reason, written by hand, which later runs keep.

    equivalent   computes the same wherever the plugin can be
    speed        computes the same in more time or memory
    message      changes what is said, not what is done
    open         should be killed, and no test does it yet
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
KINDS = ("equivalent", "speed", "message", "open")
Record = dict[str, dict[str, Any]]


def read(folder: Path = RESULTS) -> Record:
    """By plugin; empty where nothing was recorded yet."""
    file = folder / "mutations.json"
    found: Record = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def write(record: Record, folder: Path = RESULTS) -> None:
    """The record, and its page."""
    record = dict(sorted(record.items()))
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "mutations.json").write_text(text + "\n", encoding="utf-8")
    (folder / "mutations.md").write_text(page(record), encoding="utf-8")


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Is it the same mistake? Lines move, so their numbers do not count."""
    return all(one[key] == other[key] for key in ("file", "kind", "old", "new"))


def explained(
    survivors: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The survivors, each with the reason that the record had for it, or an open one."""
    whys = [
        next((old["why"] for old in before if same(new, old)), "open: not looked at") for new in survivors
    ]
    return [dict(survivor) | {"why": why} for survivor, why in zip(survivors, whys, strict=True)]


def put(record: Record, name: str, found: Mapping[str, Any], *, seed: int) -> None:
    """A plugin's new sample in place of the one before. `found`: a tally of `mutants.py`."""
    before = record.get(name, {}).get("survivors", [])
    survivors = explained(found["survivors"], before)
    record[name] = {
        "mutants": found["of"],
        "tried": found["killed"] + found["timed_out"] + len(survivors),
        "seed": seed,
        "killed": found["killed"],
        "timed_out": found["timed_out"],
        "killed_since": 0,
        "survivors": survivors,
    }


def put_again(record: Record, name: str, found: Mapping[str, Any]) -> None:
    """What became of the survivors of an earlier sample: those that tests notice by now are `killed_since`, and one
    whose line is gone was not tried."""
    entry = record[name]
    left = explained(found["survivors"], entry["survivors"])
    noticed = found["killed"] + found["timed_out"]
    entry["tried"] -= len(entry["survivors"]) - noticed - len(left)
    entry["killed_since"] += noticed
    entry["survivors"] = left


def page(record: Record) -> str:
    """Markdown: a row a plugin, and each survivor with its reason."""
    titles = ["plugin", "mutants", "tried", "killed", "timed out", "killed by tests written since", *KINDS]
    rows = [
        [
            name,
            entry["mutants"],
            *(entry[key] for key in ("tried", "killed", "timed_out", "killed_since")),
            *(sum(s["why"].startswith(f"{kind}:") for s in entry["survivors"]) for kind in KINDS),
        ]
        for name, entry in record.items()
    ]
    rows.append([f"{len(rows)} plugins", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    lines = [
        "# Mistakes that tests do not notice",
        "",
        "One small mistake at a time in a plugin's source, drawn by a seed; defaults and bounds of options left out.",
        "Made by `tools/mutants.py --no-config --record`, which says what the mistakes are. The last four columns are",
        "survivors, by what is known of them (`tools/mutants_record.py`). Plugins that are not named were not tried.",
        "",
        "| " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * (len(titles) - 1),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]
    for name, entry in record.items():
        lines += [f"## {name}", ""] if entry["survivors"] else []
        for survivor in entry["survivors"]:
            place = f"{Path(survivor['file']).name}:{survivor['line']}"
            lines += ["```diff", f"- {survivor['old']}", f"+ {survivor['new']}", "```", ""]
            lines += [f"{place}, {survivor['why']}", ""]
    return "\n".join(lines).rstrip() + "\n"
