"""`python -m peftx_cli` is `peftx`."""

from __future__ import annotations

from peftx_cli.main import main

if __name__ == "__main__":
    main()
