"""Text of files, models and other authors is shown, and steers no terminal: titles, colors, cursor, direction."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx_spec.errors import PeftxError, visible

CLI = Path(__file__).parents[2] / "cli" / "peftx_cli"
TITLE = "\x1b]0;owned\x07"
EVIL = f"{TITLE}\x1b[2J\x9b31m\u202eright\x7f"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202eright\x7f"
PLUGIN = f"""
from peftx import Plugin, PluginConfig, hookimpl
from pydantic import Field


class FakeConfig(PluginConfig):
    size: str = Field({EVIL!r}, description={EVIL!r})


class Fake(Plugin):
    Config = FakeConfig

    @hookimpl
    def inject(self, model):
        raise RuntimeError({EVIL!r})
"""


def clean(text: str) -> bool:
    return visible(text, lines=True) == text


def test_every_line_goes_through_the_printers() -> None:
    """`print` and streams stand in three modules alone, so that no command can forget."""
    found = []
    for file in CLI.rglob("*.py"):
        if file.name in ("render.py", "failures.py", "progress.py") and file.parent == CLI:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "typer.echo",
            ):
                found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert [line for line in found if "peftx.__version__" not in line] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 日本, \U0001f600, \u200d", None),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\r", r"\r"),
        ("\x9b", r"\x9b"),
        ("\u2028\u2029\u202e\u2066\ufeff", r"\u2028\u2029\u202e\u2066\ufeff"),
        ("\ud800", r"\ud800"),
    ],
)
def test_visible(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)
    if shown is not None:
        assert visible("a\nb\tc" + text, lines=True) == "a\nb\tc" + (text if "\n" in text else shown)
    assert clean(str(PeftxError(text, hint=text)))


def test_metadata_and_code_of_another_author(installed: Any, ok: Callable[..., str]) -> None:
    installed.publish("fake-evil", PLUGIN, readme=f"# Evil\n\n{EVIL}\n")
    info = installed.site / "peftx_fake_evil-0.1.0.dist-info" / "METADATA"
    info.write_text(info.read_text("utf-8").replace("A fake fake-evil", f"A fake {EVIL}"), "utf-8")
    for words in (["list"], ["info", "fake-evil"], ["info", "fake-evil", "--readme"]):
        text = ok(*words)
        assert clean(text), words
        assert SHOWN in text, words
    for words in (["list", "--json"], ["info", "fake-evil", "--json"]):
        text = ok(*words)
        assert clean(text)
        found = json.loads(text)
        entry = found if isinstance(found, dict) else next(one for one in found if one["name"] == "fake-evil")
        assert entry["summary"] == f"A fake {EVIL}", "JSON keeps every character, escaped"
    schema = ok("schema")
    assert clean(schema)
    assert json.loads(schema)["$defs"]["with.fake-evil"]["properties"]["size"]["description"] == EVIL


def test_a_module_that_raises(installed: Any, run: Callable[..., Any], refused: Callable[..., str]) -> None:
    installed.publish("fake-torn", f"raise RuntimeError({EVIL!r})\n")
    message = refused("info", "fake-torn")
    assert clean(message)
    assert SHOWN in message
    traced = run("--traceback", "info", "fake-torn").stderr
    assert clean(traced)
    assert "Traceback" in traced
    found = run("doctor")
    assert clean(found.stdout)
    assert SHOWN in found.stdout


def test_a_spec(
    installed: Any, run: Callable[..., Any], refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    installed.publish("fake-evil", PLUGIN)
    name = json.dumps(EVIL)
    (installed.work / "bad.yaml").write_text(
        f"peftx: 1\nmodel: {name}\n{name}: 1\nstack: [{name}]\n", "utf-8"
    )
    for words in (["validate"], ["plan"], ["apply"]):
        message = refused(*words, "bad.yaml")
        assert clean(message)
        assert SHOWN in message
    text = run("validate", "bad.yaml", "--json").stdout
    assert clean(text)
    assert EVIL in json.loads(text)["problems"][0]["message"]
    good = f"peftx: 1\nmodel: 'peftx:tiny'\nstack: [{{use: fake-evil, with: {{size: {name}}}}}]\noutput: {name}\n"
    (installed.work / "good.yaml").write_text(good, "utf-8")
    shown = ok("apply", "good.yaml", "--show-spec")
    assert clean(shown)
    (installed.work / "shown.yaml").write_text(shown, "utf-8")
    assert ok("apply", "shown.yaml", "--show-spec") == shown, "the YAML still says the same"
    for words in (["plan", "good.yaml"], ["plan", "good.yaml", "--json"]):
        found = run(*words)
        assert found.exit_code == 2, "inject fails"
        assert clean(found.stdout), words
    assert SHOWN in run("plan", "good.yaml").stdout
    message = refused("apply", "good.yaml")
    assert clean(message)
    assert SHOWN in message


def test_data_and_what_a_model_writes(
    installed: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftx.stack import Stack

    installed.scaffold("fake-gain", "inject")
    rows = [json.dumps({"prompt": f"Say {n}. {EVIL}", "completion": f"It is {n}. {EVIL}"}) for n in range(6)]
    (installed.work / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    monkeypatch.setattr(Stack, "generate", lambda self, *_, **__: f"written {EVIL}")
    words = ["apply", "-p", "fake-gain", "--data", "rows.jsonl", "--eval", "rows.jsonl", "--steps", "1"]
    result = run(*words, "--set", "train.batch_size=2")
    assert result.exit_code == 0, result.stderr
    assert clean(result.stdout + result.stderr)
    assert f"written {SHOWN}" in result.stdout
    assert f"Say 0. {SHOWN}" in result.stdout
    found = run(*words, "--set", "train.batch_size=2", "--json").stdout
    assert clean(found)
    assert json.loads(found)["samples"][0]["text"] == f"written {EVIL}"


TERMINAL = """
import sys
from peftx_cli.failures import say, show
from peftx_cli.progress import reporter
from peftx_cli.render import out, out_exactly, print_table
from peftx_spec import Problem, SpecError
evil = {evil!r}
say(evil, hint=evil)
show(SpecError([Problem(evil, evil, 1, 1, evil, evil, suggestion=evil)]))
print_table(evil, (evil, "b"), [(evil, evil)])
out(evil)
out_exactly(evil)
with reporter() as told:
    told.stage(evil, [evil])
    told.progress(1, 2, {{evil: 0.5}})
    told.finished(evil, 0.1, evil)
"""


def test_on_a_terminal_and_in_a_log(
    installed: Any, spawn: Callable[..., Any], on_a_terminal: Callable[..., str]
) -> None:
    code = TERMINAL.format(evil=EVIL)
    installed.publish("fake-evil", PLUGIN, readme=f"# Evil\n\n{EVIL}\n")
    shown = on_a_terminal("-c", code) + on_a_terminal("-m", "peftx_cli", "info", "fake-evil", "--readme")
    for sequence in (TITLE, "\x1b[2J", "\x9b", "\u202e", "\x07"):
        assert sequence not in shown, sequence
    assert shown.count("owned") > 8
    done = spawn(python=("-c", code))
    assert done.returncode == 0, done.stderr
    assert clean(done.stderr)
    exact = f"{EVIL}\n"
    assert exact in done.stdout, "what a model wrote goes into a pipe as it is"
    assert clean(done.stdout.replace(exact, "", 1))
