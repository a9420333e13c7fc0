"""`python -m peftx` is `peftx`. By its name alone: the core imports nothing of the command line."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    try:
        runpy.run_module("peftx_cli", run_name="__main__")
    except KeyboardInterrupt:  # before the command line could take it, in an import
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
