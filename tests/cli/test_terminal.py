"""What is printed where: panels, tables and bars on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from peftx_cli.progress import LineReporter
from peftx_cli.render import plain_table


def test_an_error_is_a_panel_on_a_terminal(installed: Any, on_a_terminal: Callable[..., str]) -> None:
    shown = on_a_terminal("-m", "peftx_cli", "info", "nowhere")
    assert "╭" in shown
    assert "no plugin named 'nowhere' is installed" in shown


def test_the_panel_has_the_code_and_where_to_read_on(
    installed: Any, on_a_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich does not take the code for markup, with colors and without."""
    for colors in (True, False):
        if not colors:
            monkeypatch.setenv("NO_COLOR", "1")
        shown = on_a_terminal("-m", "peftx_cli", "info", "nowhere")
        assert ("\x1b[" in shown) == colors
        plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
        assert re.search(r"^╭─ error\[registry\] ─+╮\s*$", plain, re.MULTILINE)
        assert re.search(r"^│ peftx explain registry +│\s*╰─+╯\s*$", plain, re.MULTILINE), (
            "it is the last line"
        )


def test_a_page_is_laid_out_on_a_terminal(on_a_terminal: Callable[..., str]) -> None:
    shown = on_a_terminal("-m", "peftx_cli", "explain", "conflict")
    assert "\x1b[" in shown
    assert "```" not in shown


def test_a_list_is_a_table_on_a_terminal(installed: Any, on_a_terminal: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    shown = on_a_terminal("-m", "peftx_cli", "info", "fake-gain")
    assert "│ power" in shown
    assert "\x1b[" in shown


SHOWING = [["--help"], ["apply", "--help"], ["list"], ["info", "fake-gain"], ["info", "fake-gain", "--readme"],
           ["info", "nowhere"], ["validate", "wrong.yaml"], ["data", "rows.yaml"], ["explain"],
           ["explain", "conflict"]]  # fmt: skip


@pytest.fixture
def shown_things(installed: Any) -> None:
    installed.scaffold("fake-gain", "inject")
    (installed.work / "wrong.yaml").write_text("peftx: 2\nmodel: peftx:tiny\nstack: [fake-gain]\n", "utf-8")
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: 'peftx:sample/train.jsonl'}\nstack: [fake-gain]\n"
    (installed.work / "rows.yaml").write_text(text + "train: {steps: 1}\n", "utf-8")


@pytest.mark.usefixtures("shown_things")
@pytest.mark.parametrize("words", SHOWING, ids=" ".join)
def test_no_escape_codes_where_colors_are_not_wanted(
    on_a_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Neither colors nor bold or underlines; in a pipe nothing at all, and so also without NO_COLOR."""
    piped = subprocess.run(
        [sys.executable, "-m", "peftx", *words], capture_output=True, text=True, check=False
    )
    assert piped.stdout + piped.stderr
    assert "\x1b" not in piped.stdout + piped.stderr
    monkeypatch.setenv("NO_COLOR", "1")
    shown = on_a_terminal("-m", "peftx", *words)
    assert re.findall(r"\x1b\[[\d;]*m", shown) == []
    assert len(shown) > 20


LOUD = """
import sys, warnings
import peftx_cli.commands.catalogue as catalogue
from peftx.errors import PeftxError
from peftx_cli.failures import warn
from peftx_cli.main import main
from peftx_cli.progress import reporter
def breaks(*arguments, **options):
    with reporter() as told:
        told.stage("train", ["lora"])
        told.finished("train", 0.45, "3 steps")
    warn("mind the gap")
    warnings.warn("theirs")
    raise PeftxError("it broke")
catalogue._filtered = breaks
main()
"""


def test_quiet_leaves_out_progress_and_warnings() -> None:
    def told(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", LOUD, *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    loud = told("list")
    assert loud.startswith("train        0.45 s  3 steps\nwarning: mind the gap\n")
    assert "UserWarning: theirs" in loud
    assert told("--quiet", "list") == "error[general]: it broke\nmore: peftx explain general\n"


def test_the_shell_completes_commands_and_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(*words: str) -> list[str]:
        asked = {
            "_PEFTX_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        code = "from peftx_cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True,
                              check=False)  # fmt: skip
        return done.stdout.split()

    assert completed("peftx", "valid") == ["validate"]
    assert "lora" in completed("peftx", "info", "lo")
    assert {name[:3] for name in completed("peftx", "apply", "--plugin", "pre")} == {"pre"}


def test_markup_in_a_message_is_shown_as_it_is(installed: Any, on_a_terminal: Callable[..., str]) -> None:
    """`pip install 'peftx[serve]'` must not lose its brackets to rich."""
    code = (
        "from peftx_cli.failures import say; say('needs [bold]x[/bold]', hint=\"pip install 'peftx[serve]'\")"
    )
    shown = on_a_terminal("-c", code)
    assert "needs [bold]x[/bold]" in shown
    assert "peftx[serve]" in shown


BAR = """
import time
from peftx_cli.progress import reporter
with reporter() as told:
    told.stage("train", ["lora"])
    for done in range(3):
        told.progress(done + 1, 3, {"task": 0.5})
        time.sleep(0.15)
    told.finished("train", 0.45, "3 steps [of 3]")
"""


def test_a_bar_while_it_runs_and_a_line_when_it_is_done(on_a_terminal: Callable[..., str]) -> None:
    shown = on_a_terminal("-c", BAR)
    assert "train lora" in shown
    assert "3/3" in shown
    assert "task 0.5" in shown
    assert "train        0.45 s  3 steps [of 3]" in shown


def test_lines_in_a_log() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "train        0.45 s  3 steps [of 3]\n"


def test_a_long_stage_writes_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    told = LineReporter()
    told.stage("train", ["lora"])
    for done in range(40):
        now[0] += 1.0
        told.progress(done + 1, 40, {"task": 2.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["train lora: 15 of 40  task 2", "train lora: 30 of 40  task 2"]


def test_a_plain_table() -> None:
    text = plain_table("title", ("name", "empty", ""), [("a", "", ""), ("long one", "", "")])
    assert text.splitlines() == ["title", "name      empty", "--------  -----", "a", "long one"]
    assert plain_table("", ("a",), [("two\nlines",)]).splitlines() == ["a", "---------", "two lines"]


def test_a_warning_of_ours_is_a_message_and_names_no_line_of_code() -> None:
    code = (
        "import warnings; from peftx_cli.failures import tell_warnings; tell_warnings(); "
        "warnings.warn_explicit('mind the {}', UserWarning, 'core/peftx/{}.py', 7); "
        "warnings.warn_explicit('theirs', UserWarning, 'lib/other.py', 8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{}", "gap")], capture_output=True, text=True, check=True
    )
    assert "warning: mind the gap\n" in done.stderr
    assert "peftx/gap.py" not in done.stderr
    assert "lib/other.py:8: UserWarning: theirs" in done.stderr


# -------------------------------------------------------------------------------------------------------------- serve
def test_serve_listens_on_loopback_unless_told(
    installed: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: calls.append(options | {"app": app}))
    result = run("serve", "peftx:tiny", "--max-batch", "3", "--max-wait-ms", "7")
    assert result.exit_code == 0, result.output
    assert (calls[0]["host"], calls[0]["port"]) == ("127.0.0.1", 8000)
    assert "open to the network" not in result.stderr
    result = run("serve", "peftx:tiny", "--host", "0.0.0.0", "--port", "9000")
    assert result.exit_code == 0
    assert "0.0.0.0 is open to the network" in result.stderr
    assert (calls[1]["host"], calls[1]["port"]) == ("0.0.0.0", 9000)


def test_limits_of_requests(
    installed: Any, run: Callable[..., Any], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftx.toolkits.serving import http

    served: list[Any] = []
    monkeypatch.setattr(http, "run_http", lambda *servers, **options: served.extend(servers))
    assert run("serve", "peftx:tiny").exit_code == 0
    limits = ("--max-queue", "3", "--max-new-tokens", "40", "--max-seconds", "1.5")
    assert run("serve", "peftx:tiny", *limits).exit_code == 0
    found = [(each.scheduler.max_queue, each.max_tokens, each.max_seconds) for each in served]
    assert found == [(256, None, None), (3, 40, 1.5)]
    for option in limits[::2]:
        assert option in refused("serve", "peftx:tiny", option, "0")


def test_several_bundles_are_served_by_name(
    installed: Any,
    run: Callable[..., Any],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import uvicorn
    from fastapi.testclient import TestClient

    from peftx import Stack
    from peftx.engines.models import model_path
    from peftx_lora import Lora
    from peftx_spec.errors import visible

    apps: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: apps.append(app))
    for place in ("out/legal", "outside"):
        Stack("peftx:tiny", [Lora(rank=2)]).save(tmp_path / place)
    (tmp_path / "out" / "circle").symlink_to(tmp_path / "out" / "circle")
    shutil.copytree(model_path("peftx:tiny"), tmp_path / "model")
    Stack(str(tmp_path / "model"), [Lora(rank=2)]).save(tmp_path / "out" / "elsewhere")
    shutil.copytree(tmp_path / "out" / "legal", tmp_path / "out" / "broken")
    (tmp_path / "out" / "broken" / "lora.safetensors").write_bytes(b"")
    result = run(
        "serve", "plain=peftx:tiny", str(tmp_path / "out" / "legal"), "--adapters", str(tmp_path / "out")
    )
    assert result.exit_code == 0, result.output
    with TestClient(apps[0], base_url="http://127.0.0.1") as http:

        def load(path: str) -> Any:
            return http.post("/v1/load_lora_adapter", json={"lora_name": "more", "lora_path": path})

        assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["plain", "legal"]
        places = ("../outside", str(tmp_path / "outside"), "missing", "legal/manifest.json")
        for path in (*places, "b\0", "b" * 900, "circle", "circle/legal", "~nobody"):
            answer = load(path)
            assert answer.status_code == 400, answer.text
            assert f"there is no bundle '{visible(path)}'" in answer.json()["error"]["message"]
        for path, words in (
            ("broken", "'broken': lora.safetensors is corrupted"),
            ("elsewhere", f"'elsewhere' is of '{tmp_path / 'model'}', and no such base is served here"),
            (".", "there is no bundle '.'"),
        ):
            message = load(path).json()["error"]["message"]
            assert words in message
            assert str(tmp_path / "out") not in message
        assert load("legal").status_code == 200
        asked = {"model": "more", "prompt": "Once", "max_tokens": 2, "temperature": 0}
        assert http.post("/v1/completions", json=asked).status_code == 200
    monkeypatch.chdir(tmp_path)
    result = run("serve", "base=model", "--adapters", "out")
    assert result.exit_code == 0, result.output
    with TestClient(apps[1], base_url="http://127.0.0.1") as http:
        body = {"lora_name": "more", "lora_path": "elsewhere"}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert (
            http.post(
                "/v1/load_lora_adapter", json=body | {"lora_name": "x", "lora_path": "legal"}
            ).status_code
            == 400
        )
    shutil.rmtree(tmp_path / "model")
    assert f"'{tmp_path / 'model'}' does not exist" in refused("serve", "out/elsewhere")
    for option in ("--model", "--base"):
        assert run("serve", "out/elsewhere", option, "peftx:tiny").exit_code == 0
    said = refused("serve", "peftx:tiny", "peftx:tiny=peftx:tiny")
    assert "two models are named 'peftx:tiny'" in said


def test_serve_without_its_packages(
    installed: Any, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    message = refused("serve", "peftx:tiny")
    assert "uvicorn" in message
    assert "pip install 'peftx[serve]'" in message


def served(port: int, log: Path) -> None:
    from peftx_cli.main import main

    sys.argv = ["peftx", "serve", "peftx:tiny", "--port", str(port)]
    with log.open("w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        main()


def test_serve_answers_over_a_socket(installed: Any) -> None:
    import signal
    import socket
    import time

    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = installed.work / "log"
    process = get_context("fork").Process(target=served, args=(port, log))  # the libraries are loaded here
    process.start()
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                health = httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10)
                break
            except httpx.TransportError:
                assert process.is_alive(), log.read_text()
                assert time.monotonic() < deadline, "it does not answer"
                time.sleep(0.2)
        assert health.json()["status"] == "ok"
        body = {"model": "peftx:tiny", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 4
        strange = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"Host": "evil.example"}, timeout=10)
        assert strange.status_code == 400
    finally:
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(60)
    output = log.read_text("utf-8")
    assert "Traceback" not in output, output


def test_a_ctrl_c_that_a_library_loses_is_found_at_the_next_step() -> None:
    import contextlib
    import os
    import signal

    from peftx_cli.progress import Interrupts

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(KeyboardInterrupt):  # as a destructor does
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before
