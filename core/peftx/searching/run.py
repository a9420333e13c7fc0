"""A search carried out: points are proposed, run side by side, and the best of them measured on the test rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftx.comparing.on_ray import OnRay, tasks
from peftx.comparing.place import alone, check_place, side_by_side
from peftx.comparing.processes import processes
from peftx.comparing.writing import write
from peftx.composition.registry import Registry
from peftx.engines.clusters import require_ray
from peftx.engines.files import make_place
from peftx.searching.going import Progress, Search
from peftx.searching.page import page
from peftx.searching.stacks import Stacks
from peftx.searching.table import COLUMNS, SearchTable, table_of
from peftx.searching.trials import STUDY
from peftx_spec.search_load import LoadedSearch

OURS = frozenset({"jobs", "data", "repeat", "results.json", "results.csv", "index.html", ".lock", STUDY})
"""What a search's folder holds; scratch folders beside."""


def search(
    loaded: LoadedSearch,
    folder: Path,
    *,
    jobs: int | None = None,
    ray: bool = False,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchTable:
    """Try points of a space until there are as many trials as the file says, and write the table to `folder`.

    Args:
        jobs: processes side by side, in place of the file's. ray: as trials of Ray Tune, on a cluster or here.
        progress: called twice a second, and when a job ends.

    Raises:
        PeftxError: no stack can be built; no point keeps what limits can be known ahead. BundleError: `folder` holds
            something else, or another process is at it.
    """
    if ray:
        require_ray("--ray")
    check_place(folder, OURS, "search")
    stacks = Stacks(loaded, folder, registry or Registry(), trust_remote_code)
    make_place(folder / "any")
    with alone(folder):
        at_once, threads = side_by_side(loaded.spec.jobs if jobs is None else jobs, ray=ray)
        for name in ("jobs", STUDY):
            make_place(folder / name / "any")
        going = Search(loaded, folder, stacks)
        start = tasks if ray else processes
        with start(folder, jobs=at_once, threads=threads, trust_remote_code=trust_remote_code) as pool:
            if isinstance(pool, OnRay):
                from peftx.searching.on_tune import try_points

                try_points(going, pool, progress)
            else:
                going.try_points(pool, progress)
            tested = going.test(pool, progress)
        refused = going.trials.refused()
        table = table_of(
            going.points(),
            tested,
            going.goal,
            loaded,
            threads=threads,
            refused=refused,
            dropped=stacks.dropped,
        )
        write(table, page(table), folder, COLUMNS)
    return table
