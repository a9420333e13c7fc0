"""One version for framework and docs; `pyproject.toml` reads it."""

from __future__ import annotations

__version__ = "0.2.0"
