"""`peftx explain`, and the lines of an error that lead to it. Whether the pages are true: tests/docs/test_errors.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from peftx.errors import ConflictError, OptionError, PeftxError, TargetError, with_code
from peftx_cli import failures
from peftx_cli.explained import codes, page, sentence


def test_a_page_goes_through_a_pipe_as_it_is(ok: Callable[..., str]) -> None:
    assert ok("explain", "conflict") == f"{page('conflict')}\n"


def test_without_a_code_all_are_listed(ok: Callable[..., str]) -> None:
    _, _, *lines = ok("explain").splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[code, sentence(code)] for code in codes()]


def test_a_code_that_there_is_not(refused: Callable[..., str]) -> None:
    assert refused("explain", "conflct") == (
        "error[usage]: no error has the code 'conflct'\nhint: did you mean 'conflict'?\nmore: peftx explain usage\n"
    )
    assert "peftx explain" in refused("explain", "../README")


def test_help_has_two_examples(ok: Callable[..., str]) -> None:
    assert ok("explain", "--help").count("Example: peftx explain") == 2


def test_the_lines_of_an_error_in_a_log(refused: Callable[..., str]) -> None:
    first, *_, last = refused("info", "nowhere").splitlines()
    assert first.startswith("error[registry]: no plugin named 'nowhere' is installed")
    assert last == "more: peftx explain registry"


def test_a_spec_has_them_behind_its_problems(installed: Any, refused: Callable[..., str]) -> None:
    (installed.work / "spec.yaml").write_text("peftx: 1\nmodel: peftx:tiny\nstuck: []\n", "utf-8")
    first, *_, count, last = refused("validate", "spec.yaml").splitlines()
    assert first.startswith("spec.yaml:3:1: "), "an editor jumps there"
    assert (count, last) == (
        "error[spec]: 1 problem in the spec; nothing was run",
        "more: peftx explain spec",
    )


SELECTS = "peftx: 1\nmodel: peftx:tiny\nstack:\n  - use: lora\n    with: {{targets: {}}}\n"


@pytest.mark.parametrize("targets", ["attention.z", "layers=x"])
@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_problem_of_another_kind_names_the_page_on_it(
    command: str, targets: str, installed: Any, refused: Callable[..., str]
) -> None:
    """It alone in the last lines; beside others below its own."""
    (installed.work / "spec.yaml").write_text(SELECTS.format(targets), "utf-8")
    assert refused(command, "spec.yaml").splitlines()[-2:] == [
        "error[target]: 1 problem in the spec; nothing was run",
        "more: peftx explain target",
    ]
    (installed.work / "spec.yaml").write_text(SELECTS.format(targets) + "stuck: []\n", "utf-8")
    told = refused(command, "spec.yaml")
    if command == "validate":  # which looks at all at once
        assert "\n  more: peftx explain target\n" in told
    assert told.endswith("error[spec]: 2 problems in the spec; nothing was run\nmore: peftx explain spec\n")


def test_what_the_system_says_against_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException, match="2"), failures.reported():
        raise NotADirectoryError(20, "Not a directory", "there")
    assert capsys.readouterr().err.startswith("error[file]: there: Not a directory\n")


def test_a_code_of_another_author_has_no_page_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    class TheirsError(PeftxError):
        code = "their-own\x1b[31m"

    failures.show(TheirsError("no", hint="yes"))
    assert capsys.readouterr().err == "error[their-own\\x1b[31m]: no\nhint: yes\n"


def test_a_warning_has_no_code(capsys: pytest.CaptureFixture[str]) -> None:
    failures.warn("mind the gap")
    assert capsys.readouterr().err == "warning: mind the gap\n"


@pytest.mark.parametrize(
    ("words", "code"), [("lora.rank=400", "option"), ("lora.targets=re:nowhere", "target")], ids=str
)
def test_what_a_plan_finds_keeps_its_code(
    refused: Callable[..., str], run: Callable[..., Any], words: str, code: str
) -> None:
    """`apply` plans first: what a plugin refuses on the model is no conflict of two."""
    said = ("--plugin", "lora", "--set", words)
    assert refused("apply", *said).startswith(f"error[{code}]: lora: ")
    assert f"more: peftx explain {code}" in run("plan", *said).stdout
    assert f'"code": "{code}"' in run("plan", *said, "--json").stdout


def test_the_class_of_a_code() -> None:
    class Narrow(TargetError):
        """Has the code of its base, which is found."""

    assert Narrow("no").code == "target"
    assert [with_code(code) for code in ("conflict", "option", "target", "general")] == [
        ConflictError, OptionError, TargetError, PeftxError
    ]  # fmt: skip
    assert with_code("of-nobody") is PeftxError


def test_codes_are_known_without_torch() -> None:
    code = (
        "import sys, peftx.errors as errors; "
        "print(errors.DataError('x').code, [name for name in ('torch', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "data []\n"
