"""`peftx search`: the stacks and options that are the best for what they cost.

    loaded = load_search("search.yaml", catalogue=Registry(), samplers=Samplers())     # peftx_spec: the file, checked
    table = search(loaded, Path("search-out"), jobs=2)      # trials, the front, then JSON, CSV, a page, YAML a point

The engine is Optuna, of the extra `peftx[search]`. Importing the package loads nothing.
"""

from __future__ import annotations
