"""Settings of every test, and what the tests of each plugin cost; at the root, for `pytest plugins/inject/lora` too."""

from __future__ import annotations

import gc
import os
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

# Read when torch, transformers and tokenizers are imported, which the tests do later than this file.
os.environ["OMP_NUM_THREADS"] = "1"  # one process a core; and sums come out the same on every machine
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["PEFTX_CACHE"] = ""  # no test reads what an earlier one left
gc.disable()  # until all is collected: imports leave hardly anything to free, and much to look through

# No deadline: the first example pays for imports. In CI the examples are the same in every run.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

STAYS = 40_000
"""Objects: to look through them after each training takes as long as a step or two."""
CPU = "cpu seconds"
SHOWN = 10
ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import draw_plugins  # noqa: E402  its folder is known from here on

DRAWN = pytest.StashKey[set[str]]()
"""Folders of plugins whose tests run, where these are not all."""


def pytest_configure(config: pytest.Config) -> None:
    """Processes of a run draw alike."""
    most = os.environ.get(draw_plugins.VARIABLE)
    if not most:
        return
    if not most.isdecimal() or int(most) < 1:
        raise pytest.UsageError(
            f"{draw_plugins.VARIABLE} is {most!r}; a number from 1 on, or leave it out for all"
        )
    folders = draw_plugins.folders()
    if len(folders) > int(most):
        config.stash[DRAWN] = draw_plugins.drawn(
            folders, int(most), changed=draw_plugins.changed(), seed=draw_plugins.seed()
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Plugins that are not drawn; pytest does not ask of paths that the command names."""
    if DRAWN not in config.stash or not collection_path.is_relative_to(ROOT / "plugins"):
        return None
    parts = collection_path.relative_to(ROOT).parts
    return True if len(parts) == 3 and "/".join(parts) not in config.stash[DRAWN] else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Dear tests run where what they are about changed, or where all do; those of a plugin where it is drawn."""
    dear = {item: mark for item in items if (mark := item.get_closest_marker("dear")) is not None}
    for item, mark in dear.items():
        gone = [path for path in mark.args if not (ROOT / path).exists()]
        if gone or not mark.args:
            said = f"{', '.join(gone)}, which is not there" if gone else "nothing"
            raise pytest.UsageError(f"{item.nodeid}: dear, and about {said}; name the files that it is about")
    left = set[pytest.Item]()
    if dear and os.environ.get(draw_plugins.VARIABLE):
        touched = draw_plugins.touched()
        left |= {item for item, mark in dear.items() if not draw_plugins.concerns(mark.args, touched)}
    if (drawn := config.stash.get(DRAWN, None)) is not None:
        marks = ((item, item.get_closest_marker("of_plugin")) for item in items)
        left |= {item for item, mark in marks if mark is not None and mark.args[0] not in drawn}
    if left:
        config.hook.pytest_deselected(items=[*left])
        items[:] = [item for item in items if item not in left]


def pytest_report_header(config: pytest.Config) -> str | None:
    if DRAWN not in config.stash:
        return None
    drawn, every = len(config.stash[DRAWN]), len(draw_plugins.folders())
    return f"plugins: {drawn} of {every}, those that changed and a draw; make test-all runs all"


def pytest_collection_finish() -> None:
    """Trainings of other tests gain by it as those of the kit do."""
    kit = sys.modules.get("peftx.testing.kit")
    if kit is not None:
        kit.settle()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """The same once more when a file has brought much that stays: modules that its tests were the first to import."""
    done = yield
    ends = nextitem is None or nextitem.path != item.path
    if ends and len(gc.get_objects()) > STAYS:
        gc.collect()
        gc.freeze()
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = sum(os.times()[:4])  # of this process and of those that it started and that ended
    item.stash[_began] = before
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append((CPU, sum(os.times()[:4]) - item.stash[_began]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The ten most expensive plugins, CPU of the kit and of their own tests; and files of the framework's."""
    cost: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    files: dict[str, float] = defaultdict(float)
    for report in terminalreporter.stats.get("", []):  # those of the teardown, passed
        name = _plugin(report.nodeid)
        seconds = dict(report.user_properties).get(CPU)
        if seconds is None:
            continue
        if name is None:
            files[report.nodeid.partition("::")[0]] += seconds
        else:
            cost[name]["::test_conformance" not in report.nodeid] += seconds
    if len(files) > 1:
        terminalreporter.section("CPU of the framework's tests, in seconds")
        for name, used in sorted(files.items(), key=lambda item: -item[1])[:SHOWN]:
            terminalreporter.line(f"{name:45} {used:7.1f}")
        terminalreporter.line(f"{f'all {len(files)} files':45} {sum(files.values()):7.1f}")
    if len(cost) < 2:
        return
    terminalreporter.section("CPU of plugins, in seconds")
    kit, own = (sorted(pair[i] for pair in cost.values()) for i in (0, 1))
    lines = [(name, *pair) for name, pair in sorted(cost.items(), key=lambda item: -sum(item[1]))][:SHOWN]
    lines.append((f"median of {len(cost)}", kit[len(kit) // 2], own[len(own) // 2]))
    for name, of_kit, of_own in [
        ("", "kit", "own tests"),
        *((n, f"{k:.1f}", f"{o:.1f}") for n, k, o in lines),
    ]:
        terminalreporter.line(f"{name:24} {of_kit:>8} {of_own:>10}")


_began = pytest.StashKey[float]()


def _plugin(nodeid: str) -> str | None:
    """The folder's name of a test under `plugins/<hook>/<name>/`."""
    parts = nodeid.split("/")
    return parts[2] if parts[0] == "plugins" and len(parts) > 3 else None
