"""`peftx check NAME` judges a plugin of this repository as its tests do: by the same checks, on the same options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftx.kernel.names import HOOKS
from peftx.testing.kit import Planned, plan_checks
from peftx_cli.main import app

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
PLUGINS = [
    pytest.param(
        folder.name, marks=pytest.mark.of_plugin(folder.relative_to(ROOT).as_posix()), id=folder.name
    )
    for folder in FOLDERS
    if folder.parent.name in HOOKS
]


def told(planned: Planned) -> tuple[str, dict[str, object], str | None]:
    return planned.id, dict(planned.subject.options), planned.expected


@pytest.mark.parametrize("slug", PLUGINS)
def test_the_command_plans_what_the_suite_runs(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Planned] = []
    monkeypatch.setattr(Planned, "run", lambda item: ran.append(item))
    result = CliRunner().invoke(app, ["check", slug, "--json"])
    assert result.exit_code == 0, result.output
    assert list(map(told, ran)) == list(map(told, plan_checks(slug)))  # as `conformance(slug)` plans it


def test_the_command_from_end_to_end() -> None:
    names = [item.id for item in plan_checks("mosaic-it")]
    result = CliRunner().invoke(app, ["check", "mosaic-it", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [f"{line['arch']}-{line['name']}" if line["arch"] else line["name"] for line in found] == names
    assert {line["outcome"] for line in found} == {"passed"}
