"""What a plugin's distribution asks for, and in which file and line it says something; nothing is imported."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from peftx.version import __version__


def misfit(requires: Iterable[str]) -> str:
    """The requirement of peftx, among those of a distribution, that this version does not meet; or nothing."""
    return next(
        (line for line in requires if line.lower().startswith("peftx") and not _fits(line, __version__)), ""
    )


@lru_cache
def _fits(line: str, version: str) -> bool:
    try:
        asked = Requirement(line)
    except InvalidRequirement:
        return False
    if asked.name.lower() != "peftx" or (asked.marker is not None and not asked.marker.evaluate()):
        return True
    return asked.specifier.contains(version, prereleases=True)  # packaging 24 leaves them out by itself


def requirement_place(point: EntryPoint, line: str) -> str:
    """File and line of a requirement."""
    return _place(point, "METADATA", re.compile(rf"Requires-Dist:\s*{re.escape(line)}"))


def name_place(point: EntryPoint) -> str:
    """File and line by which the distribution takes the plugin's name."""
    return _place(
        point, "entry_points.txt", re.compile(rf"{re.escape(point.name)}\s*=\s*{re.escape(point.value)}")
    )


def metadata_file(point: EntryPoint) -> str:
    """The file that holds the distribution's README."""
    return _place(point, "METADATA", re.compile(r"Name:")).rpartition(":")[0]


def error_place(point: EntryPoint, error: Exception) -> str:
    """File and line in the plugin's code at which an import failed; those of its entry point where it came to none."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    spec = find_spec(point.module.partition(".")[0])
    if spec is not None and spec.origin is not None:
        roots = [Path(place) for place in spec.submodule_search_locations or (spec.origin,)]
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if any(Path(frame.filename).is_relative_to(root) for root in roots):
                return f"{frame.filename}:{frame.lineno}"
    return name_place(point)


def _place(point: EntryPoint, file: str, wanted: re.Pattern[str]) -> str:
    """`…/peftx_lora-0.2.0.dist-info/METADATA:9`, as far as the distribution lies in a folder."""
    folder = getattr(point.dist, "_path", None)
    if point.dist is None or folder is None:
        return f"entry point {point.name} = {point.value}"
    lines = (point.dist.read_text(file) or "").splitlines()
    number = next((number for number, line in enumerate(lines, 1) if wanted.match(line)), 1)
    return f"{Path(folder, file)}:{number}"
