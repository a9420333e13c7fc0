"""Names of version 0.1: they give what stands in their place, once, and say so."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import pytest

import peftx
from peftx.moved import MOVED, new_name


@pytest.fixture(autouse=True)
def _not_imported_yet() -> None:
    for name in [name for name in sys.modules if new_name(name)]:
        del sys.modules[name]


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module_and_says_so(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"'{old}' is '{MOVED[old]}' since peftx 0.2"):
        found = importlib.import_module(old)
    real = importlib.import_module(MOVED[old])
    assert found is real
    assert real.__name__ == MOVED[old]
    assert real.__spec__ is not None
    assert real.__spec__.name == MOVED[old]


def test_a_module_of_a_package_that_moved_is_not_loaded_twice() -> None:
    with pytest.warns(DeprecationWarning, match="since peftx 0.2"):
        from peftx.data.files import read_records  # type: ignore[import-not-found]
    assert read_records is importlib.import_module("peftx.engines.data.files").read_records


def test_a_part_of_the_model_is_one_class_by_either_name() -> None:
    with pytest.warns(DeprecationWarning, match="since peftx 0.2"):
        from peftx.slots import Delta  # type: ignore[import-not-found]
    assert Delta is peftx.Delta


def test_what_is_nowhere_is_named_where_it_was_looked_for() -> None:
    with (
        pytest.warns(DeprecationWarning, match="since peftx 0.2"),
        pytest.raises(ModuleNotFoundError, match=r"peftx\.engines\.data\.nope"),
    ):
        importlib.import_module("peftx.data.nope")
    assert new_name("peftx.stack") is None
    assert new_name("other.data") is None


def test_looking_for_an_old_name_imports_nothing() -> None:
    assert find_spec("peftx.slots") is not None
    assert "peftx.slots" not in sys.modules
