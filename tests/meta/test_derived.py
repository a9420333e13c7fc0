"""What is generated from the plugins is up to date."""

from __future__ import annotations

from pathlib import Path

import generate
import make_sample

ROOT = Path(__file__).parent.parent.parent


def test_catalogue_and_option_tables() -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, text in generate.derived().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run python tools/generate.py"


def test_sample_data() -> None:
    for name, text in make_sample.files().items():
        assert (make_sample.FOLDER / name).read_text(encoding="utf-8") == text
    size = sum(path.stat().st_size for path in make_sample.FOLDER.iterdir())
    assert size <= 200_000
