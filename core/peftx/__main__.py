"""`python -m peftx` is `peftx`. By its name alone: the core imports nothing of the command line."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("peftx_cli", run_name="__main__")
