"""Which options of a merge go together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftx.errors import OptionError, UsageError, nearest
from peftx.merging.methods import METHODS


def check_options(
    adapters: int,
    method: str,
    weights: Sequence[float],
    rank: int | None,
    density: float | None,
    seed: int | None,
    into: str,
) -> None:
    """Raises PeftxError, before anything is read, for options that do not go together."""
    if method not in METHODS:
        raise OptionError(
            f"no method '{method}'", hint=nearest(method, METHODS) or f"one of {', '.join(METHODS)}"
        )
    how = METHODS[method]
    if not adapters:
        raise UsageError("there is no adapter to merge", hint="peftx merge A B --method linear -o OUT")
    if len(weights) != adapters:
        raise OptionError(
            f"{len(weights)} weights for {adapters} adapters", hint="one for each, as in 0.7,0.3"
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise OptionError(
            f"weights {', '.join(map(str, weights))}: nothing is left of that", hint="as in 0.7,0.3"
        )
    if density is not None and how.density is None:
        raise OptionError(
            f"{method} keeps all entries, so it has no density", hint="ties, dare and dare-ties have one"
        )
    if density is not None and not 0 < density <= 1:
        raise OptionError(f"density {density} is no share of entries", hint="above 0, at most 1")
    if seed is not None and not how.drops:
        raise OptionError(f"{method} draws nothing, so it has no seed", hint="dare and dare-ties have one")
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank}: there is no such matrix", hint="1 at least")
    if rank is not None and method == "cat":
        raise OptionError("cat is exact, of the ranks' sum", hint=f"method svd with rank {rank} cuts it")
    if rank is None and (method == "svd" or (into == "lora" and not how.sums)):
        raise OptionError(
            f"{method} needs the rank of its result",
            hint="--rank 8; ties and dare make a plain checkpoint without one: --format hf",
        )
