"""`peftx matrix`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftx_cli.main import app


def test_the_page_and_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path / "cache"))
    page = tmp_path / "pairs.html"
    result = CliRunner().invoke(app, ["matrix", "mezo", "mosaic-it", "-j", "1", "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert "both replace the training step" in " ".join(result.output.split())
    assert re.search(
        r"4 pairs: 3 works, 1 refused, 0 other-model, 0 failed; [1-3] stacks were", result.output
    )
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(page.with_suffix(".json").read_text())["counts"]["works"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "pairs.html", "pairs.json"]
    again = CliRunner().invoke(app, ["matrix", "mezo", "mosaic-it", "-j", "1"])
    assert "; 0 stacks were tried" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "pairs.txt"], "the page is an .html file"),
        (["-o", "nowhere/pairs.html"], "there is no folder nowhere"),
        (["mezzo"], "mezo"),
    ],
)
def test_bad_input(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["matrix", "lora", *arguments])
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())
