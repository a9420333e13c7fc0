"""The matrix of pairs: what works, what is refused and how it is told."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import pytest

from peftx import Plugin, Registry
from peftx.errors import RegistryError
from peftx.testing.matrix import Cell, Matrix, run_matrix, try_pair
from peftx.testing.matrix_page import page, to_json

SAMPLE = 24
"""Pairs of installed plugins that every run of the tests tries; benchmarks/matrix.py tries all."""


def sampled_pairs() -> list[tuple[str, str]]:
    names = sorted(Registry().names())
    return random.Random(len(names)).sample([(a, b) for a in names for b in names], SAMPLE)


@pytest.mark.parametrize("pair", sampled_pairs(), ids="-then-".join)
def test_a_pair_works_or_is_refused_with_a_reason(pair: tuple[str, str]) -> None:
    cell = try_pair(*pair)
    assert cell.outcome != "failed", cell.reason
    if cell.outcome == "refused":
        assert cell.claims
        assert all(f"'{name}" in cell.reason for name in pair)
    if cell.order:
        assert sorted(cell.order) != list(cell.order) or cell.order != pair
        assert try_pair(*cell.order).outcome == "works"


def test_a_refusal_names_claim_reason_and_order() -> None:
    cell = try_pair("prefixquant", "lora")
    assert cell.outcome == "refused"
    assert cell.claims == ("final",)
    assert cell.order == ("lora", "prefixquant")


def test_two_processes_give_the_same_as_one() -> None:
    def plain(cells: Sequence[Cell]) -> list[tuple[str, str, str, str]]:
        return [(c.first, c.second, c.outcome, c.reason) for c in cells]

    told: list[int] = []
    one = run_matrix(["lora", "mezo"], progress=lambda done, total, cell: told.append(done))
    two = run_matrix(["mezo", "lora"], jobs=2)
    assert told == [1, 2, 3, 4]
    assert plain(one.cells) == plain(two.cells)
    assert one.plugins == ["lora", "mezo"]  # by hook
    assert one.hooks == {"lora": "inject", "mezo": "train_step"}
    assert [c.outcome for c in one.cells] == ["works", "works", "works", "refused"]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(RegistryError) as caught:
        run_matrix(["lora", "mezzo"])
    assert "mezo" in str(caught.value)


def test_what_goes_wrong_is_in_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftx_lora import Lora

    def broken(self: Plugin, model: object) -> None:
        raise ZeroDivisionError("nothing to divide by")

    broken.peftx_impl = Lora.inject.peftx_impl  # type: ignore[attr-defined]
    monkeypatch.setattr(Lora, "inject", broken)
    cell = try_pair("mosaic-it", "lora")
    assert cell.outcome == "failed"
    assert "ZeroDivisionError: nothing to divide by" in cell.reason


MATRIX = Matrix(
    ["a<b", "c"],
    {"a<b": "inject", "c": "decode"},
    [
        Cell("a<b", "a<b", "works", arch="llama", seconds=0.5),
        Cell("a<b", "c", "refused", "both </script> collide", ("final",), ("c", "a<b"), "llama"),
        Cell("c", "a<b", "failed", "losses are [nan]"),
        Cell("c", "c", "other-model", "no state"),
    ],
)


def test_the_page_holds_every_cell_and_escapes() -> None:
    text = page(MATRIX)
    assert len(re.findall(r"<td tabindex", text)) == 4
    assert "a&lt;b" in text
    assert text.count("</script>") == 3  # of the two data elements and the code
    (data,) = re.findall(r'id="cells">(.*?)</script>', text)
    assert [cell["outcome"] for cell in json.loads(data)] == ["works", "refused", "failed", "other-model"]
    assert "http" not in text  # nothing is fetched from elsewhere


def test_the_json_holds_counts_and_cells() -> None:
    found = json.loads(to_json(MATRIX))
    assert found["counts"] == {"works": 1, "refused": 1, "other-model": 1, "failed": 1}
    assert found["cells"][1]["order"] == ["c", "a<b"]
    assert found["hooks"]["c"] == "decode"
