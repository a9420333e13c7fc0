"""Fill a checkout with further plugins, copies of those that are there under other names: what do hundreds cost?

    git clone . ../many && python tools/many_plugins.py 260 ../many
    cd ../many && time make setup && time make test && time .venv/bin/peftx list

For scratch only: it writes into the `plugins/` of the folder that it is given, never into its own checkout.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy(source: Path, number: int) -> Path:
    """One more plugin, `<name>-<number>`, beside the one at `source`."""
    slug, folder = f"{source.name}-{number}", source.with_name(f"{source.name}-{number}")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    module = next((source / "src").glob("peftx_*.py")).stem
    words = ((re.compile(rf"\b{module}\b"), f"{module}_{number}"),
             (re.compile(rf"\bpeftx-{source.name}\b(?!-)"), f"peftx-{slug}"),
             (re.compile(rf"""(?<=["'\n]){source.name}(?=["']| = )"""), slug))  # fmt: skip
    for file in sorted(folder.rglob("*.*")):
        text = file.read_text(encoding="utf-8")
        for pattern, word in words:
            text = pattern.sub(word, text)
        file.write_text(text, encoding="utf-8")
        if file.stem in (module, f"test_{module.removeprefix('peftx_')}"):
            file.rename(file.with_stem(f"{file.stem}_{number}"))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", type=int, help="plugins to make")
    parser.add_argument("checkout", type=Path, help="where")
    parser.add_argument("--of", nargs="+", metavar="NAME", help="copies of these (default: of all in turn)")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    if checkout == ROOT:
        sys.exit("this checkout stays as it is: git clone it, and name the clone")
    sources = [p.parent for p in sorted(checkout.glob("plugins/*/*/pyproject.toml"))]
    sources = [p for p in sources if not options.of or p.name in options.of]
    if not sources:
        sys.exit(f"{checkout} has no plugin to copy")
    for made in range(options.number):
        copy(sources[made % len(sources)], 2 + made // len(sources))
    print(f"{options.number} plugins made in {checkout}")


if __name__ == "__main__":
    main()
