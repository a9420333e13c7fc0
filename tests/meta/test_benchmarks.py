"""No figure can be measured again by a benchmark that no longer imports what it measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
IMPORT_ALL = """
import runpy, sys
from importlib.machinery import ModuleSpec
from types import ModuleType

sys.modules["matplotlib"] = plots = ModuleType("matplotlib")  # an extra, which compare.py asks for at once
plots.__spec__ = ModuleSpec("matplotlib", None)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/plugins"]  # as Python does for a script
broken = []
for file in sys.argv[2:]:
    try:
        runpy.run_path(file, run_name="imported")
    except (Exception, SystemExit) as error:
        broken.append(f"{file}: {type(error).__name__}: {error}")
sys.exit("\\n".join(broken) or 0)
"""


def test_every_benchmark_imports() -> None:
    files = sorted(str(file) for file in BENCHMARKS.rglob("*.py"))
    assert len(files) > 10
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(BENCHMARKS), *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
