"""Runs benchmarks and writes their results as JSON and a page.

python benchmarks/run.py                    # all
python benchmarks/run.py peers --quick
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
SUITES = {
    "peers": "Speed and memory beside HF PEFT",
    "startup": "Start of the command line",
    "weight_only": "Packed linears beside float32",
    "exports": "Bytes of what is exported beside the peers' own",
    "dora": "Decoding with DoRA beside the plain model",
}
"""Name and the title of its page."""


def page(suite: str, results: dict[str, Any], machine: dict[str, str]) -> str:
    """Markdown: one row a measurement."""
    timed = "one thread, CPU time, least of interleaved rounds"
    how = "bytes of whole folders" if all("bytes" in result for result in results.values()) else timed
    setting = (
        f"{machine['processor']}, Python {machine['python']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, PEFT {machine['peft']}; {how}."
    )
    lines = [
        f"# {SUITES[suite]}",
        "",
        setting,
        "",
        "| measurement | against | ratio | at most | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        limit = result["limit"]  # None: shown without a promise
        verdict = "" if limit is None else "met" if result["ratio"] <= limit else "**not met**"
        lines.append(f"| {name} | {result['peer']} | {result['ratio']:.3f} | {limit or ''} | {verdict} |")
    lines += ["", f"All figures: [{suite}.json]({suite}.json).", ""]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    from importlib.metadata import version

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"processor": processor, "python": platform.python_version(), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="which; all if left out")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    RESULTS.mkdir(exist_ok=True)
    missed = 0
    for suite in arguments.suites or SUITES:
        results = importlib.import_module(suite).run(quick=arguments.quick)
        (RESULTS / f"{suite}.json").write_text(
            json.dumps({"machine": machine(), "results": results}, indent=1) + "\n"
        )
        text = page(suite, results, machine())
        (RESULTS / f"{suite}.md").write_text(text)
        print(text.split("```")[0])
        missed += sum(result["ratio"] > (result["limit"] or float("inf")) for result in results.values())
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
