"""The one version, of framework and plugins: `tools/generate.py` writes it where a file must name it."""

from __future__ import annotations

__version__ = "0.2.0"
