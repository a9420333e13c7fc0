"""Random stacks of two to five installed plugins on tiny models, lived through, and the ways out that refusals name.

python benchmarks/stacks.py 150 --seed 0       # exit status 1 where something is found
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict

from rich.console import Console
from rich.progress import track

from peftx.testing.recipes import ARCHITECTURES, draw
from peftx.testing.stacks import Result, shrunk, try_stack
from peftx.testing.ways_out import DeadEnd, dead_ends

OUTCOMES = (
    "works",
    "refused-before-build",
    "refused-at-build",
    "refused-at-start",
    "refused-late",
    "failed",
)


def table(results: list[Result]) -> str:
    """How many stacks on each model came to which end."""
    counts = Counter((result.recipe.arch, result.outcome) for result in results)
    lines = ["model      " + "".join(f"{outcome:>22}" for outcome in OUTCOMES)]
    for arch in ARCHITECTURES:
        lines.append(f"{arch:11}" + "".join(f"{counts[arch, outcome]:22}" for outcome in OUTCOMES))
    totals = Counter(result.outcome for result in results)
    return "\n".join([*lines, f"{'all':11}" + "".join(f"{totals[outcome]:22}" for outcome in OUTCOMES)])


def told(results: list[Result]) -> list[str]:
    """Findings by cause, the most frequent first, each with the smallest stack that shows it."""
    causes: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.finding:
            causes[result.cause].append(result)
    lines = []
    for cause, found in sorted(causes.items(), key=lambda item: -len(item[1])):
        least = shrunk(min(found, key=lambda result: len(result.recipe.entries)))
        lines.append(f"\n{len(found)} x {cause}\n  {least.reason}")
        lines += [f"  hint: {least.hint}"] * bool(least.hint)
        if least.outcome.startswith("refused"):
            lines.append(f"  plan: {'; '.join(least.planned) or 'says nothing'}")
        elif least.outcome == "works":
            lines.append(f"  plan refuses it: {'; '.join(least.planned)}")
        lines.append(f"  try_stack({least.recipe.code})")
    return lines


def led_nowhere(ends: list[DeadEnd]) -> list[str]:
    """Ways out that lead to no stack that trains, by what was proposed."""
    kinds: dict[str, list[DeadEnd]] = defaultdict(list)
    for end in ends:
        kinds[end.kind].append(end)
    lines = []
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        least = min(found, key=lambda end: len(end.result.recipe.entries))
        lines.append(f"\n{len(found)} x {kind}\n  {least.result.reason}\n  hint: {least.way.text}")
        lines.append(f"  {least.reason}\n  dead_ends(try_stack({least.result.recipe.code}))")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", type=int, nargs="?", default=150, help="stacks to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    started = time.perf_counter()
    results, ends = [], []
    drawn = draw(options.number, seed=options.seed)
    for recipe in track(drawn, "stacks", total=options.number, console=Console(stderr=True)):
        results.append(try_stack(recipe))
        if results[-1].outcome.startswith("refused"):
            ends += dead_ends(results[-1])
    print(table(results))
    found = [*told(results), *led_nowhere(ends)]
    print("\n".join(found))
    print(f"\n{len(results)} stacks in {time.perf_counter() - started:.0f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
