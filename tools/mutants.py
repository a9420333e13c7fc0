"""Which mistakes in a plugin would its tests not notice? A small mutation tool.

    python tools/mutants.py propulsion                      # every mutant of one plugin
    python tools/mutants.py lora mezo --sample 25 --seed 1  # 25 of each, drawn by a seed
    python tools/mutants.py lora --tests "formula or fold" --no-config --json found.json
    python tools/mutants.py lora mezo --sample 10 --no-config --record      # into benchmarks/results/mutations.json
    python tools/mutants.py lora --again --record                           # the survivors that stand there, once more

A mutant is the plugin's source with one small mistake in it. It stands in a temporary folder that comes first on the
path, so the work tree is never edited. The plugin's own tests run on it until the first fails; what survives them meets
the conformance kit, on the first architecture. Tests marked slow do not run. Printed are the counts, and each survivor
with its line as it was and as it is: one that changes what the method computes wants a test, and one that changes
nothing (a tie that cannot come, a guard that another stands behind) is equivalent and wants none.

The mistakes, by kind:

    arithmetic   + and - swapped, * and /, += and -=; // and ** become *
    comparison   < and <= swapped, > and >=
    constant     n becomes n + 1, so that dim=-1 becomes dim=0; True and False swapped
    config       the same of the defaults and bounds in a `...Config` (--no-config leaves them out); what the plugin's
                 tests do not notice, the generated schema and option tables do: tests/meta/test_derived.py
    condition    the test of an `if` negated, also in an expression or a comprehension; a `not` dropped
    call         dropout, softmax, norm, clamp and their like dropped, and .detach(), .float(), .clone()
    statement    a call whose value nobody takes, or an augmented assignment, removed

Texts, `raise`, `assert`, decorators, type hints, a plugin's `example` and the `strict` of zip are left alone. Each run
is a fork of this process, which has torch and the kit imported already and no plugin, so it costs what its tests cost,
the quick ones first; where there is no fork, this does not work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mutants_record
from mutants_made import Mutant, mutants

ROOT = Path(__file__).parents[1]
TIMES = "times.json"
"""File in the temporary folder: how long each test took."""


@dataclass
class Tally:
    """What became of a plugin's mutants; `survivors` have file, line, kind, old and new."""

    name: str
    killed: int
    timed_out: int
    survivors: list[dict[str, Any]]
    of: int
    """How many there are, of which a sample ran."""
    seconds: float


# --------------------------------------------------------------------------------------------------------- the runs
class Selection:
    """Of a plugin's tests its own, or the kit's on the first architecture and on none; no slow ones. Quick ones first.

    Args:
        times: test -> seconds, as far as known; what runs is written into it.
    """

    def __init__(self, kit: bool, times: dict[str, float]) -> None:
        self.kit, self.times = kit, times

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        checks = [getattr(getattr(item, "callspec", None), "params", {}).get("check") for item in items]
        archs = [getattr(check, "arch", None) for check in checks]  # None: a test of the plugin's own
        first = next(filter(None, archs), "")
        items[:] = [
            item
            for item, arch in zip(items, archs, strict=True)
            if not item.get_closest_marker("slow") and (arch in ("", first) if self.kit else arch is None)
        ]
        items.sort(key=lambda item: self.times.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + report.duration


def tests_on(folder: Path, files: list[str], selection: Selection, expression: str) -> None:
    """The forked process: runs tests with `folder`/src first on the path, and exits with what pytest does."""
    import pytest

    os.setsid()  # what the tests start ends with them
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    os.environ["TMPDIR"] = tempfile.tempdir = str(
        folder / "tmp"
    )  # what a test that is stopped leaves goes with it
    os.makedirs(tempfile.tempdir, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(folder / "src"), os.environ.get("PYTHONPATH")))
    )
    sys.path.insert(0, str(folder / "src"))
    arguments = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files]
    code = pytest.main([*arguments, *(["-k", expression] if expression else [])], [selection])
    (folder / TIMES).write_text(json.dumps(selection.times), encoding="utf-8")
    sys.exit(code)


def outcome(
    folder: Path, files: list[str], selection: Selection, expression: str, *, limit: float
) -> int | None:
    """The exit status of the tests: 0 passed, 5 there were none; None: stopped after `limit` seconds."""
    arguments = (folder, files, selection, expression)
    process = multiprocessing.get_context("fork").Process(target=tests_on, args=arguments)
    process.start()
    process.join(limit)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return code


class Untestable(SystemExit):
    """The tests of a plugin fail without a mistake in it."""


class Trial:
    """One plugin: its modules, its tests, and how long these take without a mistake.

    Raises:
        SystemExit: there is no such plugin; Untestable: its tests fail as it is.
    """

    def __init__(self, name: str, expression: str = "") -> None:
        found = sorted(ROOT.glob(f"plugins/*/{name}/pyproject.toml"))
        if not found:
            raise SystemExit(f"mutants: there is no plugin {name!r} in plugins/")
        self.source = found[0].parent / "src"
        self.files = [str(path) for path in sorted((found[0].parent / "tests").glob("test_*.py"))]
        self.name, self.expression = name, expression
        self.times: dict[str, float] = {}
        self.limits: dict[bool, float] = {}  # kit or not -> seconds; not there: no such tests
        with self.copy() as folder:
            for kit in (False, True):
                began = time.perf_counter()
                code = self.run(folder, kit, limit=600)
                if code not in (0, 5):
                    raise Untestable(f"mutants: the tests of {name} fail without a mutant: pytest {code}")
                self.times |= json.loads((folder / TIMES).read_text("utf-8"))
                if code == 0:
                    self.limits[kit] = 20 + 4 * (time.perf_counter() - began)

    def run(self, folder: Path, kit: bool, *, limit: float) -> int | None:
        expression = "" if kit else self.expression
        return outcome(folder, self.files, Selection(kit, self.times), expression, limit=limit)

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="peftx-mutants-") as folder:
            shutil.copytree(self.source, Path(folder, "src"), ignore=shutil.ignore_patterns("__pycache__"))
            for name in ("pyproject.toml", "README.md"):  # as they are here, whatever the installation has
                if (self.source.parent / name).exists():
                    shutil.copy(self.source.parent / name, folder)
            yield Path(folder)

    def mutants(self) -> list[tuple[Path, Mutant]]:
        return [
            (path.relative_to(self.source), mutant)
            for path in sorted(self.source.rglob("*.py"))
            for mutant in mutants(path.read_text("utf-8"))
        ]

    def facts(self, path: Path, mutant: Mutant) -> dict[str, Any]:
        """A mutant without its source, with the file that it is in."""
        found = {key: value for key, value in asdict(mutant).items() if key != "source"}
        return {"file": str(self.source.relative_to(ROOT) / path)} | found

    def among(
        self, every: list[tuple[Path, Mutant]], known: list[dict[str, Any]]
    ) -> list[tuple[Path, Mutant]]:
        """Of each known mutant the one that is nearest to its line; none where the source has none such any more."""
        drawn = []
        for old in known:
            like = [pair for pair in every if mutants_record.same(self.facts(*pair), old)]
            drawn += sorted(like, key=lambda pair: abs(pair[1].line - old["line"]))[:1]
        return drawn

    def of(self, path: Path, source: str) -> str:
        """'killed', 'timed out' or 'survived', of a module with this source."""
        with self.copy() as folder:
            (folder / "src" / path).write_text(source, encoding="utf-8")
            for kit, limit in self.limits.items():
                code = self.run(folder, kit, limit=limit)
                if code != 0:
                    return "timed out" if code is None else "killed"
        return "survived"


def prepare() -> None:
    """Import what all plugins' tests need, which the forks then have."""
    os.environ.update(CI="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # as conftest.py
    os.environ.update(HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.dont_write_bytecode = True
    for name in ("pytest", "hypothesis", "transformers", "peft", "datasets", "peftx", "peftx.testing"):
        importlib.import_module(name)
    models = importlib.import_module("peftx.testing.models")
    for arch in ("llama", "gpt2", "qwen2", "bert", "t5"):
        models.tiny(arch)  # transformers imports a model's file when it is first asked for


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="a plugin's folder")
    parser.add_argument(
        "--tests", default="", metavar="EXPR", help="which of its own tests run, as `pytest -k`"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="that many mutants of each plugin")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--no-config", action="store_true", help="leave options' defaults and bounds alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument(
        "--record", action="store_true", help="write it into benchmarks/results/mutations.json"
    )
    parser.add_argument("--again", action="store_true", help="only the survivors that the record has")
    options = parser.parse_args()
    prepare()
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    console, tallies, failed = Console(), list[Tally](), False
    with Progress(console=console, auto_refresh=False) as bar:  # a thread of its own would be forked
        for name in options.names:
            began = time.perf_counter()
            try:
                trial = Trial(name, options.tests)
            except Untestable as error:  # the others are worth their time
                console.print(str(error), markup=False, soft_wrap=True)
                failed = True
                continue
            every = [pair for pair in trial.mutants() if not (options.no_config and pair[1].kind == "config")]
            drawn = every
            if options.again:
                known = mutants_record.read().get(name, {}).get("survivors", [])
                drawn = trial.among(every, known)
            elif options.sample is not None and options.sample < len(every):
                picked = sorted(random.Random(options.seed).sample(range(len(every)), options.sample))
                drawn = [every[index] for index in picked]
            tally = Tally(name, killed=0, timed_out=0, survivors=[], of=len(every), seconds=0.0)
            tallies.append(tally)
            task = bar.add_task(name, total=len(drawn))
            for path, mutant in drawn:
                end = trial.of(path, mutant.source)
                tally.killed += end == "killed"
                tally.timed_out += end == "timed out"
                if end == "survived":
                    tally.survivors.append(trial.facts(path, mutant))
                    text = "{file}:{line} ({kind})\n  - {old}\n  + {new}".format(**tally.survivors[-1])
                    console.print(text, markup=False, highlight=False, soft_wrap=True)
                bar.update(task, advance=1, refresh=True)
            tally.seconds = round(time.perf_counter() - began, 1)
            if options.json:
                text = json.dumps([asdict(each) for each in tallies], indent=1, ensure_ascii=False)
                options.json.write_text(text + "\n", encoding="utf-8")
            if options.record:
                record = mutants_record.read()
                if options.again:
                    mutants_record.put_again(record, name, asdict(tally))
                else:
                    mutants_record.put(record, name, asdict(tally), seed=options.seed)
                mutants_record.write(record)
    table = Table("plugin", "mutants", "ran", "killed", "survived", "timed out", "seconds")
    for tally in tallies:
        survived = len(tally.survivors)
        ran = tally.killed + survived + tally.timed_out
        row = (tally.of, ran, tally.killed, survived, tally.timed_out, tally.seconds)
        table.add_row(tally.name, *map(str, row))
    console.print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
