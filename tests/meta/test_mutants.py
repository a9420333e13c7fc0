"""`tools/mutants.py` makes the mistakes that it says, and tells those that tests notice from those that they do not."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mutants_made
import mutants_record
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "mutants.py"


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("y = a + b", {"y = a - b": "arithmetic"}),
        ("y = (a - b) * (c)", {"y = (a + b) * (c)": "arithmetic", "y = (a - b) / (c)": "arithmetic"}),
        ("y = n // 2", {"y = n * 2": "arithmetic", "y = n // 3": "constant"}),
        ("y = x ** 0.5", {"y = x * 0.5": "arithmetic", "y = x ** 1.5": "constant"}),
        ("y = x.sum(dim=-1)", {"y = x.sum(dim=0)": "constant"}),
        ("y = x.sum(0, True)", {"y = x.sum(1, True)": "constant", "y = x.sum(0, False)": "constant"}),
        ("y = a < b <= c", {"y = a <= b <= c": "comparison", "y = a < b < c": "comparison"}),
        ("y = 'é', a >= b", {"y = 'é', a > b": "comparison"}),
        ("y = a if b else c", {"y = a if (not (b)) else c": "condition"}),
        ("y = a if not b == c else d", {"y = a if (b == c) else d": "condition"}),
        ("y = [a for a in b if a.c]", {"y = [a for a in b if (not (a.c))]": "condition"}),
        ("y = F.softmax(a @ b, c)", {"y = (a @ b)": "call"}),
        ("y = (a @ b).softmax(c)", {"y = (a @ b)": "call"}),
        ("y = self.norm(x.detach())", {"y = x.detach()": "call", "y = self.norm(x)": "call"}),
        ("y = self.weight.float()", {"y = self.weight": "call"}),
        ("x[1] = y", {"x[2] = y": "constant"}),
        ("x.copy_(y)", {"pass": "statement"}),
        ("x -= y", {"pass": "statement", "x += y": "arithmetic"}),
        ("def f(x: Literal[1] = 2) -> Literal[3]: ...", {"def f(x: Literal[1] = 3) -> Literal[3]: ...": "constant"}),
        ("class AConfig: k: int = Field(a, ge=1)", {"class AConfig: k: int = Field(a, ge=2)": "config"}),
    ],
)  # fmt: skip
def test_the_mistakes(line: str, kinds: dict[str, str]) -> None:
    imports = "import torch.nn.functional as F\n"
    found = mutants_made.mutants(imports + line + "\n")
    assert {mutant.new: mutant.kind for mutant in found} == kinds
    for mutant in found:
        assert mutant.source == f"{imports}{mutant.new}\n"
        assert (mutant.line, mutant.old) == (2, line)
        ast.parse(mutant.source)


@pytest.mark.parametrize(
    "line",
    [
        "'a + 1'", "y = f'{a + 1:.2f}'", "raise ValueError(f(a + 1))", "assert a < 1", "super().__init__()",
        "if TYPE_CHECKING: import a", "@f(a + 1)\ndef g() -> None: ...", "y: Literal[1]", "y = float(x)",
        "y = zip(a, b, strict=True)", "example = {'rank': 2}",
    ],
)  # fmt: skip
def test_what_is_left_alone(line: str) -> None:
    assert mutants_made.mutants(line + "\n") == []


TRIAL = """
import importlib.util, json, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("mutants", sys.argv[1])
sys.modules["mutants"] = tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
tool.ROOT = Path(sys.argv[2])
trial = tool.Trial("toy")
ends = {mutant.new: trial.of(path, mutant.source) for path, mutant in trial.mutants()}
trial.limits = {False: 0.7}
ends["stuck"] = trial.of("peftx_toy.py", "while True: pass")
try:
    tool.Trial("toys")
except SystemExit as error:
    ends["toys"] = str(error)
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_what_becomes_of_a_plugins_mutants(tmp_path: Path) -> None:
    """At 0 this plugin is not tested, so it does not matter there whether it refuses."""
    module = "def twice(x):\n    if x < 0:\n        raise ValueError\n    return 2 * x\n"
    tests = (
        "import pytest\nfrom peftx_toy import twice\n"
        "def test_twice():\n    assert twice(3) == 6\n    with pytest.raises(ValueError):\n        twice(-1)\n"
        "@pytest.mark.slow\ndef test_slow():\n    assert False\n"
    )
    folder = tmp_path / "plugins" / "inject" / "toy"
    for name, text in {
        "pyproject.toml": "",
        "src/peftx_toy.py": module,
        "tests/test_toy.py": tests,
        "tests/conftest.py": "def pytest_configure(config):\n    config.addinivalue_line('markers', 'slow')\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(TOOL), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(TOOL.parent)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "if x <= 0:": "survived",
        "if x < 1:": "survived",
        "if (not (x < 0)):": "killed",
        "return 3 * x": "killed",
        "return 2 / x": "killed",
        "stuck": "timed out",
        "toys": "mutants: there is no plugin 'toys' in plugins/",
    }
    assert (folder / "src/peftx_toy.py").read_text() == module


def _survivor(old: str, line: int = 3) -> dict[str, Any]:
    return {"file": "plugins/x.py", "kind": "constant", "line": line, "old": old, "new": f"{old} + 1"}


def _tally(killed: int, *survivors: dict[str, Any]) -> dict[str, Any]:
    return {"of": 9, "killed": killed, "timed_out": 0, "survivors": [*survivors]}


def test_a_reason_stays_with_its_survivor_and_counts_add_up(tmp_path: Path) -> None:
    """Over a new sample and a second look at the survivors, though lines have moved."""
    mutants_record.write({}, tmp_path)
    record = mutants_record.read(tmp_path)
    mutants_record.put(record, "toy", _tally(3, _survivor("a"), _survivor("b"), _survivor("c")), seed=1)
    assert {s["why"] for s in record["toy"]["survivors"]} == {"open: not looked at"}
    record["toy"]["survivors"][1]["why"] = "speed: b is a batch"
    mutants_record.put(record, "toy", _tally(4, _survivor("b", 7), _survivor("c")), seed=2)
    mutants_record.put_again(record, "toy", _tally(1, _survivor("b", 8)))
    mutants_record.write(record, tmp_path)
    toy = mutants_record.read(tmp_path)["toy"]
    assert toy.pop("survivors") == [_survivor("b", 8) | {"why": "speed: b is a batch"}]
    assert toy == {"mutants": 9, "tried": 6, "seed": 2, "killed": 4, "timed_out": 0, "killed_since": 1}
    page = (tmp_path / "mutations.md").read_text("utf-8")
    assert "| toy | 9 | 6 | 4 | 0 | 1 | 0 | 1 | 0 | 0 |" in page
    assert "x.py:8, speed: b is a batch" in page
    mutants_record.put_again(record, "toy", _tally(0))
    assert record["toy"]["tried"] == 5, "what is not in the source any more was not tried"


def test_the_record_is_whole() -> None:
    """Each survivor has a kind and a reason, each count adds up, and the page is that of the record."""
    record = mutants_record.read()
    assert record
    for name, entry in record.items():
        ends = entry["killed"] + entry["timed_out"] + entry["killed_since"] + len(entry["survivors"])
        assert ends == entry["tried"] <= entry["mutants"], name
        for survivor in entry["survivors"]:
            kind, _, reason = survivor["why"].partition(": ")
            assert kind in mutants_record.KINDS, (name, survivor)
            assert reason, (name, survivor)
    page = (mutants_record.RESULTS / "mutations.md").read_text("utf-8")
    assert page == mutants_record.page(record)
