"""Shares of entries that round to none."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from peftx.errors import OptionError
from peftx.kernel.anatomy.site import Site


def check_share(
    said: str, share: float, size: int, of: str, *, goes: bool = False, least: int = 1, way: str = ""
) -> None:
    """Refuse a share of `size` entries of which fewer than `least` are left.

    Args:
        said: whose share, and the option's name: "sift: density". of: what has the entries. way: another way out.
        goes: `share` is what goes (a sparsity), not what is left (a density).

    Raises:
        OptionError: names the bound, in so many digits that it is enough.
    """
    left = size - size * share if goes else size * share
    if left >= least:
        return
    ten = 10 ** len(str(size))
    bound = ten * (size - least) // size if goes else -(-ten * least // size)
    option, side = said.rpartition(" ")[2], "at most" if goes else "at least"
    digits = f"{bound / ten:.{len(str(size))}f}".rstrip("0").rstrip(".")
    raise OptionError(
        f"{said} {share} leaves {left:.2g} of the {size} entries of {of}, and {least} is the least",
        hint=f"{option} {side} {digits}{way}",
    )


def check_each(
    said: str, share: float, sites: Sequence[Site], *, goes: bool = False, whole: bool = False
) -> None:
    """`check_share` of each of these matrices, where it can be left out of `targets` too.

    Args:
        whole: stacked experts share what is left of all of them; else each has its own.
    """
    sizes = {site.key: prod(site.shape if whole else site.shape[-2:]) for site in sites}
    least = min(sites, key=lambda site: sizes[site.key])
    way = f", or leave it out of targets: '!{least.role}'"
    check_share(said, share, sizes[least.key], least.path, goes=goes, way=way)
