"""User profiles from real dialogues: LoRA and full fine-tuning, whole profiles written or edits that are merged.

    python benchmarks/plugins/user_profile.py dialogues_004.json dialogues_005.json dialogues_006.json

The data: files of the Schema-Guided Dialogue set as released (folder dev of the repository
google-research-datasets/dstc8-schema-guided-dialogue, CC BY-SA 4.0), with the annotated state of the user after each
turn. The bundled model has read the texts of files 001 to 003, without states, so leave those out. The state is the
profile (slot -> value). Of each dialogue about one service, one construction turn and two updating turns are drawn:

    construction   the dialogue from its start to a user turn -> the state there
    updating       the state before a turn, that turn and the question before it -> the state after it

The first of the two updates changes the state. Dialogues, not rows, are split into test, validation and training. Both
tasks are trained together, and scored on exact pairs. No YAML file, since it is the mean of two scores that counts.
Leaves the tables and the plot of `compare.py` in `--output`. With `--jobs` a run that was
stopped goes on behind the last training that came to its end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from peftx import Plugin, Stack
from peftx.engines.models import load_model
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora
from peftx_user_profile import UserProfile, matched, read_task, serialise

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import TABLES, seen
from compare import RESULTS, Method, Parts, Result, compare, write

Row = dict[str, Any]
RATES = (3e-4, 1e-3, 3e-3)
UNIT = "F1 of exact key-value pairs, mean of both tasks"
PARTS = (
    "construction/precision", "construction/recall", "construction/f1", "updating/precision", "updating/recall",
    "updating/f1", "updating/kept", "updating/changed", "updating/added", "updating/spurious",
)  # fmt: skip


def read_dialogues(paths: Sequence[Path]) -> list[list[tuple[str, dict[str, str]]]]:
    """Dialogues about one service: for each user turn its text, with the question before it, and the state after."""
    dialogues = []
    for path in paths:
        for dialogue in json.loads(path.read_text(encoding="utf-8")):
            turns: list[tuple[str, dict[str, str]]] = []
            said, state = "", {}
            for turn in dialogue["turns"]:
                if turn["speaker"] == "SYSTEM":
                    said = f"System: {turn['utterance']}\n"
                    continue
                text = f"{said}User: {turn['utterance']}"
                state = {
                    slot: one_of(values, state.get(slot), text)
                    for frame in turn["frames"]
                    for slot, values in frame["state"]["slot_values"].items()
                }
                turns.append((text, state))
            if len(dialogue["services"]) == 1:
                dialogues.append(turns)
    return dialogues


def one_of(values: list[str], before: str | None, text: str) -> str:
    """Of several wordings of a value: the one that it has already, else one that was just said, else the first."""
    if before in values:
        return before
    return next((value for value in values if value.casefold() in text.casefold()), values[0])


def rows_of(turns: list[tuple[str, dict[str, str]]], random: Random) -> list[Row]:
    states = [{}, *(state for _, state in turns)]
    rows = []
    last = random.choice([i for i, (_, state) in enumerate(turns) if state] or [0])
    if turns[last][1]:
        text = "\n".join(text for text, _ in turns[: last + 1])
        rows.append({"text": text, "profile": json.dumps(turns[last][1]), "old_profile": None})
    changing = [i for i in range(len(turns)) if states[i] != states[i + 1]]
    for i in (random.choice(changing or [0]), random.randrange(len(turns))):
        old, new = (json.dumps(state) for state in states[i : i + 2])
        rows.append({"text": turns[i][0], "profile": new, "old_profile": old})
    return rows


def copying(rows: Sequence[Row]) -> float:
    """F1 of answering every update with the old profile."""
    tasks = [read_task(row, "row") for row in rows if row["old_profile"] is not None]
    hits = sum(len(matched(task.old or {}, task.gold)) for task in tasks)
    return 2 * hits / sum(len(task.old or {}) + len(task.gold) for task in tasks)


def methods(tokens: int) -> list[Method]:
    def method(name: str, edits: bool, *kinds: type[Plugin]) -> Method:
        def plugins() -> list[Plugin]:
            told = UserProfile(max_new_tokens=tokens, batch_size=16, edits=edits, probabilities=False)
            return [told, *(kind() for kind in kinds)]

        return Method(name=name, plugins=plugins)

    return [
        method("no training", False),
        method("LoRA, rank 8, profiles", False, Lora),
        method("LoRA, rank 8, edits", True, Lora),
        method("full fine-tuning, profiles", False, FullFinetuning),
        method("full fine-tuning, edits", True, FullFinetuning),
    ]


def pairs(results: Sequence[Result], copied: float) -> str:
    """Markdown: a row a method, of its scores at the end the means over the seeds (of all seeds that have them)."""
    lines = ["| exact pairs | " + " | ".join(PARTS) + " |", "| --- |" + " --- |" * len(PARTS)]
    for result in results:
        found = {name: [c.parts[name] for c in result.curves if name in c.parts] for name in PARTS}
        cells = [_spread(values) if values else "" for values in found.values()]
        lines.append(f"| {result.method} | " + " | ".join(cells) + " |")
    told = [f"{copied:.3f}" if name == "updating/f1" else "" for name in PARTS]
    return "\n".join([*lines, "| copying the old profile | " + " | ".join(told) + " |"])


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="steps between two looks at the scores")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="longer rows are left out")
    parser.add_argument("--test", type=int, default=40, help="dialogues to test on")
    parser.add_argument("--validation", type=int, default=20, help="dialogues to choose rates on")
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens that a generated profile may have")
    parser.add_argument("--jobs", type=Path, help="folder of finished runs, which are not made again")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    dialogues = read_dialogues(arguments.data)
    random = Random(0)
    random.shuffle(dialogues)
    _, tokenizer = load_model("peftx:tiny")

    def fits(row: Row) -> bool:
        task = read_task(row, "row")
        return len(tokenizer(task.prompt + serialise(task.gold))["input_ids"]) + 2 <= arguments.max_length

    cuts = arguments.test, arguments.test + arguments.validation
    split = dialogues[: cuts[0]], dialogues[cuts[0] : cuts[1]], dialogues[cuts[1] :]
    test, validation, train = (
        [r for turns in part for r in rows_of(turns, random) if fits(r)] for part in split
    )

    def score(stack: Stack, rows: Sequence[Any]) -> dict[str, float]:
        scores = {name: found.value for name, found in stack.evaluate(rows, metrics=["user-profile"]).items()}
        return {"mean": (scores["construction/f1"] + scores["updating/f1"]) / 2, **scores}

    results = compare(
        [method for method in methods(arguments.new_tokens) if arguments.only in method.name],
        Parts(train, validation, test), score, rates=RATES, seeds=arguments.seeds, steps=arguments.steps,
        every=arguments.every, batch_size=arguments.batch_size, max_length=arguments.max_length,
        jobs=arguments.jobs,
    )  # fmt: skip
    settings = {
        "dialogues": len(dialogues), "training rows": len(train),
        "test constructions": sum(row["old_profile"] is None for row in test),
        "test updates": sum(row["old_profile"] is not None for row in test),
        "F1 of copying the old profile": round(copying(test), 4),
        "epochs": round(arguments.steps * arguments.batch_size / len(train), 1),
        "steps": arguments.steps, "batch": arguments.batch_size, "tokens": arguments.max_length,
    }  # fmt: skip
    write(
        "user_profile",
        "User profiles from dialogues",
        results,
        unit=UNIT,
        base=seen("peftx:tiny", **TABLES["user-profile"]),
        settings=settings,
        folder=arguments.output,
    )
    below = pairs(results, copying(test))
    with (arguments.output / "user_profile.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{below}\n")
    print(f"\n{below}")


if __name__ == "__main__":
    main()
