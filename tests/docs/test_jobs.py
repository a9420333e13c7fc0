"""The jobs of docs/jobs: transcripts with the time of every command, and figures that are counted and not written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import figures, made
from pages.blocks import blocks, commands

ROOT = Path(__file__).parents[2]
MOST = 15
"""Minutes of a job's commands, without downloads: what issue 15 asks for."""


@pytest.mark.parametrize("page", figures.transcripts(), ids=lambda page: page.stem)
def test_a_transcript_has_the_time_of_every_command(page: Path) -> None:
    typed = [
        command
        for block in blocks(page, ROOT)
        if block.language == "console"
        for _, command, _ in commands(block)
    ]
    assert len(typed) > 5
    assert not [command for command in typed if not re.search(r"  # \d+\.\d s$", command)]
    assert len(figures.SECONDS.findall(page.read_text("utf-8"))) == len(typed)
    assert 1 < figures.minutes(page) <= MOST
    assert re.search(r"^\d+ \w+ 20\d\d; .* no accelerator", page.read_text("utf-8"), re.MULTILINE)


def test_the_table_has_every_job() -> None:
    rows = made("jobs").splitlines()[2:]
    assert len(rows) == len(figures.transcripts()) >= 4
    for page, row in zip(figures.transcripts(), rows, strict=True):
        assert f"({page.name}) | {figures.minutes(page):.1f} |" in row


def test_every_block_is_run_or_excused_and_no_link_is_dead() -> None:
    text = made("counts")
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if "blocks" in line
    }
    numbers = {name: [int(cell) for cell in cells] for name, cells in rows.items()}
    assert numbers.keys() == {"blocks of Python", "blocks of YAML", "blocks of commands"}
    for there, run, excused in numbers.values():
        assert there == run + excused
        assert run > 50
    assert text.endswith(" 0 of them dead.")
    for page in figures.documents():
        for block in blocks(page, ROOT):
            assert block.runs or re.search(r'norun="[^"]{8,}"', block.fence), f"{block.page}:{block.line}"
