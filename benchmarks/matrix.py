"""Every ordered pair of the installed plugins: results/matrix.html (a map), and results/matrix.json (not committed).

python benchmarks/matrix.py --threes 200 --seed 1       # and 200 further stacks, around threes that none has shown
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from peftx.testing.matrix import Cell, run_matrix
from peftx.testing.matrix_page import page, to_json

RESULTS = Path(__file__).parent / "results"


def told(done: int, total: int, cell: Cell) -> None:
    if cell.outcome == "failed":
        print(f"{cell.first}, {cell.second}: {cell.reason}", flush=True)
    if done % 50 == 0 or done == total:
        print(f"{done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="which stacks cover the pairs")
    parser.add_argument(
        "--threes", type=int, default=0, help="further stacks around threes that none has shown"
    )
    options = parser.parse_args()
    started = time.perf_counter()
    matrix = run_matrix(
        jobs=len(os.sched_getaffinity(0)), seed=options.seed, threes=options.threes, progress=told
    )
    (RESULTS / "matrix.html").write_text(page(matrix), encoding="utf-8")
    (RESULTS / "matrix.json").write_text(to_json(matrix) + "\n", encoding="utf-8")
    words = ("works", "refused", "other-model", "failed")
    for group in matrix.together:
        print(f"together: {', '.join(group.fault)}: {group.reason}")
    counts = ", ".join(f"{matrix.count(word)} {word}" for word in words)
    print(f"{counts}; {matrix.stacks} stacks in {time.perf_counter() - started:.0f} s")
    print(f"{matrix.threes[0]:,} of {matrix.threes[1]:,} ordered threes stood in a stack that works")


if __name__ == "__main__":
    main()
