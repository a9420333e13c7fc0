"""What a command costs with the plugins that are installed, and with hundreds: CPU seconds, the least of some starts.

    git clone . ../many && python tools/many_plugins.py 175 ../many && (cd ../many && make setup)
    python benchmarks/at_size.py ../many        # with those of this checkout, and with those

Leaves at_size.json and .md in benchmarks/results, a column a number of plugins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEC = "peftx: 1\nmodel: peftx:tiny\nstack: [lora]\ndata: {train: rows.jsonl}\ntrain: {steps: 1}\n"
ROW = '{"prompt": "How are you?", "completion": " Well."}\n'
COMMANDS = {
    "`peftx --help`": ["-m", "peftx_cli", "--help"],
    "`peftx list`": ["-m", "peftx_cli", "list"],
    "`peftx info lora`": ["-m", "peftx_cli", "info", "lora"],
    "`peftx validate` of one plugin's spec": ["-m", "peftx_cli", "validate", "spec.yaml"],
    "`peftx schema lora`": ["-m", "peftx_cli", "schema", "lora"],
    "`peftx schema`": ["-m", "peftx_cli", "schema"],
}
COLLECTING = "collecting the tests, in one process"


def cost(python: Path, arguments: list[str], folder: Path, rounds: int) -> tuple[float, str]:
    """CPU seconds of a fresh process, the least of some, and what it printed."""
    least, told = float("inf"), ""
    for _ in range(rounds):
        before = os.times()
        done = subprocess.run(
            [python, *arguments], check=True, capture_output=True, text=True, cwd=folder, encoding="utf-8"
        )
        after, told = os.times(), done.stdout
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        least = min(least, spent)
    return least, told


def measured(checkout: Path, rounds: int) -> tuple[int, dict[str, dict[str, Any]]]:
    """How many plugins there are, and of each command its seconds; with what it prints in bytes, or finds in tests."""
    python, found = checkout / ".venv" / "bin" / "python", dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "spec.yaml").write_text(SPEC, "utf-8")
        (folder / "rows.jsonl").write_text(40 * ROW, "utf-8")
        for name, arguments in COMMANDS.items():
            seconds, told = cost(python, arguments, folder, rounds)
            found[name] = {"seconds": round(seconds, 2), "bytes": len(told.encode())}
        _, listed = cost(python, ["-m", "peftx_cli", "list", "--json"], folder, 1)
    collect = ["-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "not slow"]
    seconds, told = cost(python, collect, checkout, 1)
    tests = sum(
        int(line.rpartition(": ")[2]) for line in told.splitlines() if line.rpartition(": ")[2].isdigit()
    )
    found[COLLECTING] = {"seconds": round(seconds, 1), "tests": tests}
    return len(json.loads(listed)), found


def page(sizes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a row a command, a column a number of plugins."""
    numbers = sorted(sizes, key=int)
    lines = [
        "# What hundreds of plugins cost",
        "",
        "CPU seconds of one process, the least of some; plugins beyond those of the repository are copies of them.",
        "",
        "| command | " + " | ".join(f"{number} plugins" for number in numbers) + " |",
        "| --- |" + " --- |" * len(numbers),
    ]
    for name in [*COMMANDS, COLLECTING]:
        cells = []
        for number in numbers:
            told = sizes[number][name]
            size = f" ({told['bytes'] / 1000:,.0f} kB)" if "schema" in name else ""
            size = f" ({told['tests']:,} tests)" if "tests" in told else size
            cells.append(f"{told['seconds']:g}{size}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, nargs="*", help="whose .venv is measured beside this one's")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each command")
    options = parser.parse_args()
    every = [measured(checkout.resolve(), options.rounds) for checkout in (ROOT, *options.checkouts)]
    sizes = {str(number): found for number, found in every}
    (RESULTS / "at_size.json").write_text(json.dumps(sizes, indent=1) + "\n", "utf-8")
    (RESULTS / "at_size.md").write_text(page(sizes), "utf-8")
    print(page(sizes))


if __name__ == "__main__":
    main()
