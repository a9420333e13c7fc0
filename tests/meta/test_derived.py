"""What is generated from the plugins is up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def load(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_catalogue_and_option_tables() -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, text in load("generate").derived().items()  # type: ignore[attr-defined]
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run python tools/generate.py"


def test_sample_data() -> None:
    module = load("make_sample")
    for name, text in module.files().items():  # type: ignore[attr-defined]
        assert (module.FOLDER / name).read_text(encoding="utf-8") == text  # type: ignore[attr-defined]
    size = sum(path.stat().st_size for path in module.FOLDER.iterdir())  # type: ignore[attr-defined]
    assert size <= 200_000
