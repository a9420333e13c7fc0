"""`peftx compare`: methods beside each other, on the same rows, with the same budget, over seeds.

    loaded = load_compare("compare.yaml", catalogue=Registry())        # peftx_spec: the file, checked
    table = compare(loaded, Path("compare-out"), jobs=2)               # run, then JSON, CSV, a page, YAML a row

Importing the package loads nothing.
"""

from __future__ import annotations
