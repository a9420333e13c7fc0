"""`--help`, `list` and `info --metadata` start at once: they import neither torch nor a plugin."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "peft", "fastapi", "pandas", "pyarrow")

PROBE = """
import sys, time
began = time.process_time()
from peftx_cli.main import main
sys.argv = ["peftx", *{words!r}]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
loaded = [name for name in {heavy!r} if name in sys.modules]
plugins = [name for name in sys.modules if name.startswith("peftx_fake")]
print(loaded, plugins, code, round(time.process_time() - began, 3), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["list"],
        ["list", "--json"],
        ["list", "--hook", "inject"],
        ["info", "fake-gain", "--metadata"],
        ["apply", "--help"],
        ["compare", "--help"],
        ["search", "--help"],
        ["validate", "empty.yaml"],
        ["validate", "gain.yaml"],
        ["info", "fake-gain"],
        ["info", "lora", "--json"],
        ["schema"],
        ["schema", "lora"],
        ["explain"],
        ["explain", "conflict"],
    ],
    ids=" ".join,
)
def test_starts_without_heavy_imports(installed: Any, words: list[str]) -> None:
    installed.scaffold("fake-gain", "inject")
    (installed.work / "empty.yaml").write_text("peftx: 1\nmodel: peftx:tiny\n", "utf-8")
    stack = "stack: [{use: fake-gain}, {use: lora, with: {rank: 2, targets: attention.q}}]\n"
    (installed.work / "gain.yaml").write_text(f"peftx: 1\nmodel: peftx:tiny\n{stack}", "utf-8")
    code = PROBE.format(words=words, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("[] [] 0 "), last


def test_a_wrong_comparison_is_refused_without_heavy_imports(installed: Any) -> None:
    installed.scaffold("fake-gain", "inject")
    text = "peftx: 1\ncompare: {base: {}, budget: {steps: 0}, methods: {gain: {stack: [fake-gain]}}}\n"
    (installed.work / "wrong.yaml").write_text(text, "utf-8")
    code = PROBE.format(words=["compare", "wrong.yaml"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("[] [] 2 "), done.stderr
    assert "wrong.yaml:2:" in done.stderr


def test_a_wrong_search_is_refused_without_heavy_imports(installed: Any) -> None:
    installed.scaffold("fake-gain", "inject")
    text = "peftx: 1\nsearch: {base: {}, stack: [fake-gain], trials: 0}\n"
    (installed.work / "wrong.yaml").write_text(text, "utf-8")
    code = PROBE.format(words=["search", "wrong.yaml"], heavy=(*HEAVY, "optuna"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("[] [] 2 "), done.stderr
    assert "wrong.yaml:2:" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["report", "gone"],
        ["report", "gone", "--samples", "2"],
        ["evaluate", "gone"],
        ["evaluate", "./gone/deeper", "--metric", "perplexity"],
        ["evaluate", "peftx:tiny", "--data", "gone.jsonl"],
        ["evaluate", "gone", "--task", "peftx-opposites"],
        ["generate", "gone", "a prompt"],
        ["serve", "here=gone", "--port", "0"],
        ["merge", "gone", "out"],
        ["merge", "gone", "gone-too", "--method", "linear", "--output", "out"],
        ["export", "gone", "out", "--format", "gguf"],
        ["import", "gone", "--output", "out"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_told_before_torch_is_imported(installed: Any, words: list[str]) -> None:
    code = PROBE.format(words=words, heavy=("torch",))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("[] [] 2 "), done.stderr
    assert "gone" in done.stderr.splitlines()[0]
    assert installed.files() == {}


def test_the_probe_sees_a_heavy_import(installed: Any) -> None:
    installed.scaffold("fake-gain", "inject")
    (installed.work / "gain.yaml").write_text("peftx: 1\nmodel: peftx:tiny\nstack: [fake-gain]\n", "utf-8")
    code = PROBE.format(words=["plan", "gain.yaml"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch" in done.stderr
    assert "peftx_fake_gain" in done.stderr


def test_two_hundred_plugins_cost_little(installed: Any) -> None:
    """Beside the same command without them, in processor time: the machine may be slow, or busy."""
    code = PROBE.format(words=["list", "--json"], heavy=HEAVY)

    def listed() -> tuple[int, float]:
        """How many of them, and the least of three times."""
        runs = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            for _ in range(3)
        ]
        seconds = min(float(run.stderr.strip().splitlines()[-1].split()[-1]) for run in runs)
        return sum(one["name"].startswith("fake-") for one in json.loads(runs[0].stdout)), seconds

    assert (before := listed())[0] == 0
    for number in range(200):
        installed.publish(f"fake-{number:03}", "raise RuntimeError('imported')", readme="word " * 2000)
    found, seconds = listed()
    assert found == 200
    assert seconds < 2 * before[1], f"{seconds} s of processor time, and {before[1]} s without them"


def test_every_command_has_help_with_two_examples(ok: Callable[..., str]) -> None:
    """Which are of that command, and which it can read."""
    from typer.main import get_command

    from peftx_cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    expected = {
        "apply",
        "train",
        "evaluate",
        "generate",
        "serve",
        "plan",
        "validate",
        "schema",
        "list",
        "info",
    }
    expected |= {"import", "export", "check", "new", "merge", "doctor", "matrix", "data", "report", "compare"}
    expected |= {"push", "pull", "search", "explain"}
    assert expected == commands.keys()
    for name, command in commands.items():
        examples = re.findall(rf"Example: peftx {name}( .*)?$", command.epilog or "", re.MULTILINE)
        assert len(set(examples)) == len(examples) >= 2, f"peftx {name}: {command.epilog}"
        assert ok(name, "--help").count(f"Example: peftx {name}") == len(examples)
        for example in examples:
            command.make_context(name, shlex.split(example))


def test_no_arguments_show_the_help(run: Callable[..., Any]) -> None:
    result = run()
    assert result.exit_code == 2
    assert "apply" in result.output
    assert "doctor" in result.output


def test_a_misspelt_command_names_the_right_one(run: Callable[..., Any]) -> None:
    result = run("aply")
    assert result.exit_code == 2
    assert "apply" in result.stderr


def test_the_reader_of_a_pipe_may_go_away(installed: Any) -> None:
    for number in range(300):
        installed.publish(f"fake-{number:03}", "", readme="")
    shell = f"{sys.executable} -m peftx_cli list --json | head -1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "["
    assert "Traceback" not in done.stderr, done.stderr
    assert "BrokenPipe" not in done.stderr, done.stderr
