"""The matrix of pairs: what works, what is refused and how it is told."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peftx
from peftx import Plugin, Registry
from peftx.errors import ConflictError, RegistryError
from peftx.testing import matrix, shown, tried, trying
from peftx.testing.covering import Cover
from peftx.testing.life import built
from peftx.testing.matrix import Cell, Matrix, run_matrix, try_pair
from peftx.testing.matrix_page import page, to_json
from peftx.testing.models import tiny
from peftx.testing.reference import COMPANION
from peftx.testing.tried import members_as_tried, stands_on

SAMPLE = 6
"""Stacks of installed plugins that every run of the tests lives through; benchmarks/matrix.py covers all pairs."""


def test_stacks_of_many_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample, of plugins that go together by their claims: every one trains, is saved and comes back."""
    names = [name for name in sorted(Registry().names()) if stands_on(name, "llama") is None]
    pairs = {(a, b) for a in names for b in names if a != b and trying.fits((a, b))}
    cover, draw = Cover(pairs, trying.fits, size=8, seed=len(names)), random.Random(len(names))

    def lived(stack: tuple[str, ...]) -> shown.Group:
        """What is left of it when it is built."""
        return trying.try_group(
            "llama", trying.build_stack("llama", stack, dict.fromkeys(pairs, True))[-1].names
        )

    tried = [lived(stack) for stack in draw.sample(list(cover.stacks(pairs)), SAMPLE)]
    left = cover.threes()
    for _ in range(SAMPLE // 2):  # around a triple, which the stacks of all pairs may not have
        tried.append(lived(cover.drawn(left, draw)))
        cover.take(tried[-1].names, left)
    # A router may send every text of the calibration past a layer, which a quantizer refuses, and the first rows may
    # not reach a matrix that is to be pruned by its scores: that is of the weights and the rows.
    of_data = ("no calibration text comes to", "nothing tells its entries apart")
    failed = [(g.fault, g.reason) for g in tried if g.fault and not any(said in g.reason for said in of_data)]
    assert not [found for found in failed if not refused(found[0])]


def refused(names: Sequence[str]) -> bool:
    """Do plugins that go together by their claims refuse each other when they are put on a model."""
    try:
        built(members_as_tried(*names), tiny("llama"))
    except ConflictError:
        return True
    return False


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


def test_what_is_known_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a plugin changes: then the stacks with it, and no other."""
    names, kept = ["lora", "propulsion", "hft", "compacter"], tmp_path / "shown.jsonl"
    first = run_matrix(names, kept=kept)
    assert first.stacks > 1
    again = run_matrix(names, kept=kept)
    assert (again.stacks, again.cells) == (0, first.cells)
    with kept.open("a") as file:
        file.write('{"key": "cut')  # as a kill leaves it
    monkeypatch.setattr(shown, "_module", lambda name: "changed" if name == "hft" else module(name))
    shown._key.cache_clear()
    tried: list[tuple[str, ...]] = []
    lived = trying.try_group
    monkeypatch.setattr(
        trying, "try_group", lambda arch, names, *_: tried.append(names) or lived(arch, names)
    )
    third = run_matrix(names, kept=kept)
    shown._key.cache_clear()
    assert tried
    assert all("hft" in stack for stack in tried)
    assert [(c.outcome, c.reason) for c in third.cells] == [(c.outcome, c.reason) for c in first.cells]


def test_what_is_known_of_other_models_is_not_tried_again(tmp_path: Path) -> None:
    """What stands there by itself, what does not, and refused pairs; also by a run of fewer plugins."""
    names, kept = ["esft", "lora", "state-offset-tuning", "hft", "mend"], tmp_path / "shown.jsonl"
    first = run_matrix(names, kept=kept)
    assert {cell.arch for cell in first.cells} >= {"llama", "mixtral", "mamba"}
    assert {cell.outcome for cell in first.cells} == {"works", "refused", "other-model"}
    again = run_matrix(names, kept=kept)
    assert (again.stacks, again.cells) == (0, first.cells)
    assert run_matrix(["esft", "lora"], kept=kept).stacks == 0


module = shown._module


@pytest.mark.parametrize(
    ("faulty", "failed", "together"),
    [
        ({"hft"}, 6, []),  # beside itself it is refused
        ({"lora", "hft"}, 2, []),
        ({"lora", "hft", "compacter"}, 0, [{"lora", "hft", "compacter"}]),
    ],
)
def test_a_fault_is_found_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, faulty: set[str], failed: int, together: list[set[str]]
) -> None:
    """One plugin by itself, a pair, or three of which every two work."""

    def trouble(names: Sequence[str], arch: str, measured: object = None) -> str:
        return "they clash" if faulty <= set(names) else ""

    monkeypatch.setattr(trying, "trouble", trouble)
    found = run_matrix(["lora", "propulsion", "hft", "compacter"])
    bad = [cell for cell in found.cells if cell.outcome == "failed"]
    assert len(bad) == failed
    assert all(faulty <= {c.first, c.second} or len(faulty) == 1 for c in bad)
    assert all("they clash" in cell.reason for cell in bad)
    assert [set(group.fault) for group in found.together][:1] == together
    assert len(found.cells) == 16


@pytest.mark.parametrize(
    "faulty", [{"lora", "compacter"}, {"esft", "lora", "compacter"}], ids=["two", "three"]
)
def test_what_fails_together_on_another_model_is_told(
    monkeypatch: pytest.MonkeyPatch, faulty: set[str]
) -> None:
    """Two that work on their own model, and three of which one has no place there."""

    def trouble(names: Sequence[str], arch: str, measured: object = None) -> str:
        return "they clash" if arch == "mixtral" and faulty <= set(names) else ""

    monkeypatch.setattr(trying, "trouble", trouble)
    monkeypatch.setattr(trying, "lived_alone", lambda name, arch: None)
    monkeypatch.setattr(matrix, "STANDS", {})
    monkeypatch.setattr(tried, "STANDS", matrix.STANDS)
    found = run_matrix(["esft", "lora", "propulsion", "compacter"], threes=2)
    assert {frozenset(group.fault) for group in found.together} == {frozenset(faulty)}
    assert {group.arch for group in found.together} == {"mixtral"}
    assert found.count("failed") == 0


@pytest.mark.parametrize(
    "names",
    [("token-trails", "ullme"), ("smart", "robust-prefix-tuning"), ("superfiltering", "charbench")],
    ids=" ".join,
)
def test_the_rows_of_one_do_for_the_other(names: tuple[str, str]) -> None:
    """Turns for who tells speakers apart, rows that are left where some are chosen and others only measured on."""
    assert trying.trouble(names, "llama") == ""


@pytest.mark.parametrize("names", [("state-offset-tuning", "batchllm"), ("batchllm", "state-offset-tuning")])
def test_a_model_that_one_has_no_place_on_is_no_fault_of_the_pair(names: tuple[str, str]) -> None:
    assert try_pair(*names).outcome == "other-model"


def test_no_plugin_is_left_in_a_fault_that_it_has_no_part_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that others in the stack need, which have no part in it either."""

    def trouble(names: Sequence[str], arch: str, measured: object = None) -> str:
        return "they clash" if {"marconi", "beam-patience"} <= set(names) else ""

    monkeypatch.setattr(trying, "trouble", trouble)
    found = trying.try_group("llama", ("sira", "sparse-adapter", "marconi", "beam-patience"))
    assert found.fault == ("marconi", "beam-patience")


@pytest.mark.parametrize("faulty", [("lora", "hft"), ("lora", "hft", "ia3")])
def test_a_fault_that_several_stacks_show_is_told_once(
    monkeypatch: pytest.MonkeyPatch, faulty: tuple[str, ...]
) -> None:
    """A pair has its cell, and three their line, though stacks of a round do not know of each other."""
    names = ("lora", "hft", "ia3", "propulsion", "compacter")
    clash = lambda stack, *_: "they clash" if set(faulty) <= set(stack) else ""  # noqa: E731
    monkeypatch.setattr(trying, "trouble", clash)
    monkeypatch.setattr(trying, "refusal", clash)
    every = [(a, b) for a in names for b in names]
    monkeypatch.setattr(Cover, "stacks", lambda self, pairs: [names, names[::-1], *every] if pairs else [])
    found = run_matrix(names)
    cells = [cell.outcome for cell in found.cells if {cell.first, cell.second} == set(faulty)]
    assert cells == ["refused"] * (2 if len(faulty) == 2 else 0)
    assert len(found.together) == (2 if len(faulty) == 3 else 0), "one for each order"
    assert len({group.fault for group in found.together}) == len(found.together)


def test_two_that_are_named_and_fail_behind_a_third_are_found_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by leaving out one of twelve after the other."""
    tried: list[tuple[str, ...]] = []

    def refusal(names: Sequence[str], arch: str) -> str:
        tried.append(tuple(names))
        return (
            "'hft' stands on what 'lora' is to prune"
            if names[0] != "lora" and {"lora", "hft"} <= {*names}
            else ""
        )

    monkeypatch.setattr(trying, "refusal", refusal)
    names = ("mosaic-it", "propulsion", "lora", "compacter", "hft", "vera", "ia3", "mezo")
    (group,) = trying.build_stack("llama", names, {})
    assert (group.fault, group.refused) == (("mosaic-it", "lora", "hft"), True)
    assert len(tried) <= 6


def test_one_of_a_name_within_another_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora` is not, where a reason speaks of `sparselora`."""
    tried: list[tuple[str, ...]] = []

    def refusal(names: Sequence[str], arch: str) -> str:
        tried.append(tuple(names))
        return "sparselora: check: 'hft' trains what it computes" if {"sparselora", "hft"} <= {*names} else ""

    monkeypatch.setattr(trying, "refusal", refusal)
    (group,) = trying.build_stack("llama", ("lora", "mezo", "hft", "vera", "sparselora"), {})
    assert group.fault == ("hft", "sparselora")
    assert [len(names) for names in tried] == [5, 2]


def test_two_that_fail_behind_each_of_others_are_parted_at_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not found anew behind every one that stands before them."""

    def refusal(names: Sequence[str], arch: str) -> str:
        behind = {"lora", "hft"} <= {*names} and names[0] != "lora"
        return f"'hft' stands behind 'lora', and 'lora' behind '{names[0]}'" if behind else ""

    monkeypatch.setattr(trying, "refusal", refusal)
    names = ("mosaic-it", "propulsion", "compacter", "vera", "lora", "hft", "ia3")
    found = trying.build_stack("llama", names, dict.fromkeys(combinations(names, 2), True))
    assert [len(group.fault) for group in found] == [3, 3, 0]
    assert len({"lora", "hft"} & {*found[-1].names}) == 1


def test_metrics_and_servers_are_tried_in_one_of_two_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    names, lives = ("lora", "charbench", "yq-lsa"), list[tuple[list[str], Any]]()
    monkeypatch.setattr(
        trying, "live", lambda members, *_, measured: lives.append(([m.id for m in members], measured))
    )
    monkeypatch.setattr(trying, "refused_by_plan", lambda *_, **__: [])
    run_matrix(names)
    by_pair = {frozenset(pair): 0 for pair in combinations(names, 2)}
    for stack, asked in lives:
        if asked is None:  # a plugin beside itself is measured whole
            assert stack[1] == f"{stack[0]}-2"
            continue
        for pair in combinations(stack, 2):
            by_pair[frozenset(pair)] += {*pair} <= {*asked}
    assert set(by_pair.values()) == {1}


def test_two_that_failed_behind_several_stand_behind_none() -> None:
    """So that a stack is not begun once more for every other plugin that may stand before them."""
    names = [str(i) for i in range(12)]
    pairs = {(a, b) for a in names for b in names if a != b}
    cover = Cover(pairs, lambda stack: True, size=6)
    for third in ("7", "9"):
        cover.avoid((third, "1", "2"))
        stacks = list(cover.stacks(pairs))
        behind = [s for s in stacks if {"1", "2"} <= {*s} and 0 < s.index("1") < s.index("2")]
        assert {(a, b) for s in stacks for i, a in enumerate(s) for b in s[i + 1 :]} == pairs
    assert not behind


def test_what_is_left_of_a_stack_that_fails_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the one whose loss leaves most of the pairs that nothing has shown, as long as some are left."""
    tried: list[tuple[str, ...]] = []

    def trouble(names: Sequence[str], arch: str, measured: object = None) -> str:
        tried.append(tuple(names))
        return "they clash" if {"lora", "hft"} <= set(names) or "ia3" in names else ""

    monkeypatch.setattr(trying, "trouble", trouble)
    monkeypatch.setattr(trying, "refusal", lambda names, arch: "")
    names = ("lora", "propulsion", "hft", "ia3", "compacter")
    new = dict.fromkeys([("lora", "propulsion"), ("lora", "compacter"), ("propulsion", "hft")], True)
    found = trying.try_stack("llama", names, new)
    assert [group.fault for group in found] == [("lora", "hft"), ("ia3",), ()]
    assert found[-1].names == ("lora", "propulsion", "compacter")
    tried.clear()
    assert len(trying.try_stack("llama", names, {})) == 1
    assert len(tried) <= 1 + len(names)


def test_what_others_hide_from_building_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that is built, and fails later by two that are refused when they are built without the others."""
    pair = {"lora", "propulsion"}
    monkeypatch.setattr(trying, "trouble", lambda names, *_: "no" if pair <= set(names) else "")
    monkeypatch.setattr(trying, "refusal", lambda names, arch: "no" if pair == set(names) else "")
    group = trying.try_group("llama", ("lora", "hft", "propulsion"))
    assert (group.fault, group.refused) == (("lora", "propulsion"), True)


def test_a_refusal_that_leaves_something_behind_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves: list[bool] = []

    def refuse(members: Sequence[object], model: Any) -> None:
        if len(members) == 2:
            model.lm_head.weight.data.add_(float(bool(leaves)))
            raise ConflictError("no")

    monkeypatch.setattr(trying, "built", refuse)
    monkeypatch.setattr(trying, "trouble", lambda names, *_: "no" if len(names) == 2 else "")
    assert try_pair("lora", "propulsion").outcome == "refused"
    leaves.append(True)
    found = try_pair("lora", "propulsion")
    assert found.outcome == "failed"
    assert found.reason == "refused, and the model is not what it was: no"


def test_plan_folds_three_adapters_that_stand_on_each_other() -> None:
    """On the meta device, of which torch does not tell whether autocast is on: a stack that worked was refused."""
    from peftx.testing.planned import refused_by_plan
    from peftx.testing.tried import specified

    assert refused_by_plan(specified(("aligner", "adalora", "dora")), "llama") == []


def test_every_cell_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing of the stack does, a companion."""
    seen: list[list[str]] = []
    train = peftx.Stack.train
    monkeypatch.setattr(
        peftx.Stack, "train", lambda self, *a, **k: seen.append(list(self.plugins)) or train(self, *a, **k)
    )
    for names in (("mosaic-it", "superfiltering"), ("hydragen", "aded"), ("prefixquant", "mosaic-it")):
        seen.clear()
        assert try_pair(*names).outcome in ("works", "refused")
        assert not seen or seen[0][0] == COMPANION


def test_a_stack_that_does_not_learn_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def rests(self: object, *arguments: object, **options: object) -> object:
        return SimpleNamespace(losses=[(1, 0.5)])

    monkeypatch.setattr(peftx.Stack, "train", rests)
    assert trying.trouble(("lora",), "llama") == "no parameter of lora moved"


@given(data=st.data())
@settings(max_examples=40)
def test_a_cover_holds_every_pair_in_its_order(data: st.DataObject) -> None:
    names = "abcdefghijkl"[: data.draw(st.integers(2, 12))]
    every = [(a, b) for a in names for b in names]
    pairs = set(data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1)))
    size = data.draw(st.integers(2, 8))
    cover = Cover(pairs, lambda stack: True, size=size, seed=data.draw(st.integers(0, 3)))
    stacks = list(cover.stacks(pairs))
    held = {(a, b) for stack in stacks for i, a in enumerate(stack) for b in stack[i + 1 :]}
    assert held == pairs  # all of them, and none that may not stand together
    assert max(map(len, stacks)) <= max(size, 2)
    assert len(stacks) <= len(pairs)


def test_a_cover_is_small_and_heeds_what_does_not_go_together() -> None:
    names = [str(i) for i in range(40)]
    pairs = {(a, b) for a in names for b in names if a != b}
    assert len(list(Cover(pairs, lambda stack: True, size=8).stacks(pairs))) < 2.2 * len(pairs) / 28
    cover = Cover(pairs, lambda stack: not {"1", "2", "3"} <= set(stack), size=8)
    cover.avoid(("4", "5", "6"))
    stacks = list(cover.stacks(pairs))
    assert not any({"1", "2", "3"} <= set(stack) or {"4", "5", "6"} <= set(stack) for stack in stacks)
    assert {(a, b) for s in stacks for i, a in enumerate(s) for b in s[i + 1 :]} == pairs
    assert stacks == list(cover.stacks(pairs))
    assert stacks != list(Cover(pairs, lambda stack: True, size=8, seed=1).stacks(pairs))


def test_soft_tokens_of_a_stack_leave_positions_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trying.fits(("prompt-tuning", "lora", "xprompt"))
    monkeypatch.setattr(trying, "soft", lambda name: {"prompt-tuning": 200, "xprompt": 20}.get(name, 0))
    assert trying.fits(("prompt-tuning", "lora", "mezo")), "one that has more by itself"
    assert not trying.fits(("prompt-tuning", "lora", "xprompt"))


def test_pairs_that_have_nothing_in_common_share_stacks() -> None:
    names = [str(i) for i in range(32)]
    every = {(a, b) for a in names for b in names if a != b}
    pairs = {(names[i], names[i + 1]) for i in range(0, 32, 2)}
    stacks = list(Cover(pairs, lambda stack: True, size=8, beside=every).stacks(pairs))
    held = {(a, b) for stack in stacks for i, a in enumerate(stack) for b in stack[i + 1 :]}
    assert pairs <= held <= every
    assert len(stacks) == 4
    assert len(list(Cover(pairs, lambda stack: True, size=8).stacks(pairs))) == 16


def test_where_a_plugin_stands_is_told_by_processes_and_former_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lives: list[tuple[str, str]] = []
    monkeypatch.setattr(trying, "lived_alone", lambda name, arch: lives.append((name, arch)))
    monkeypatch.setattr(matrix, "STANDS", {})
    for expected in ({("esft", "mixtral"), ("lora", "mixtral")}, set()):
        lives.clear()
        matrix._find_places(
            ["esft", "lora"],
            lambda attempt, arch, stacks: (group for each in stacks for group in attempt(arch, *each)),
            shown.Shown(tmp_path / "kept"),
        )
        assert set(lives) == expected
        assert matrix.STANDS == {("esft", "mixtral"): None, ("lora", "mixtral"): None}


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
    cells=[
        Cell("a<b", "a<b", "works", arch="llama", stack=("a<b", "a<b")),
        Cell("a<b", "c", "refused", "both </script> collide", ("final",), ("c", "a<b"), "llama"),
        Cell("c", "a<b", "failed", "losses are [nan]"),
        Cell("c", "c", "other-model", "no state"),
    ],
)


def test_the_page_holds_every_cell_and_escapes() -> None:
    text = page(MATRIX)
    assert text.count("</script>") == 2  # of the data and the code
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    found = json.loads(data)
    assert [cell[0] for cell in found["cells"]] == ["w", "r", "f", "o"]
    assert found["reasons"] == ["both </script> collide", "losses are [nan]", "no state"]
    assert found["stacks"] == ["a<b, a<b"]
    assert "<td>c, a&lt;b</td><td>losses are [nan]</td>" in text  # without a script too
    assert "<option>decode</option>" in text
    assert "http" not in text  # nothing is fetched from elsewhere


def test_the_json_holds_counts_and_cells() -> None:
    found = json.loads(to_json(MATRIX))
    assert found["counts"] == {"works": 1, "refused": 1, "other-model": 1, "failed": 1}
    assert found["cells"][1]["order"] == ["c", "a<b"]
    assert found["hooks"]["c"] == "decode"


@given(data=st.data())
@settings(max_examples=30)
def test_stacks_around_triples_show_them_all_in_the_end(data: st.DataObject) -> None:
    names = "abcdefgh"[: data.draw(st.integers(3, 8))]
    every = [(a, b) for a in names for b in names]
    pairs = set(data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1)))
    banned = frozenset(data.draw(st.sampled_from([(), ("a", "b", "c")])))
    cover = Cover(
        pairs, lambda stack: not banned or not banned <= set(stack), size=data.draw(st.integers(3, 6))
    )
    wanted = {
        (a, b, c) for a, b, c in permutations(names, 3)
        if {(a, b), (a, c), (b, c)} <= pairs and {a, b, c} != banned
    }  # fmt: skip
    left, draw, held = cover.threes(), random.Random(0), set()
    while stack := cover.drawn(left, draw):
        before = int(left.sum())
        cover.take(stack, left)
        assert int(left.sum()) < before, "a stack that brings nothing"
        held |= set(combinations(stack, 3))
    assert held == wanted


def test_triples_are_counted_as_shown_where_their_stack_works(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["lora", "propulsion", "hft", "compacter"]
    monkeypatch.setattr(trying, "trouble", lambda stack, *_: "")
    whole = run_matrix(names, threes=50)
    assert 0 < whole.threes[0] == whole.threes[1]
    three = {"lora", "hft", "compacter"}
    monkeypatch.setattr(trying, "trouble", lambda stack, *_: "they clash" if three <= set(stack) else "")
    some = run_matrix(names, threes=50)
    assert some.threes[1] == whole.threes[1]
    assert some.threes[0] < some.threes[1]
    assert three in [set(group.fault) for group in some.together]


def test_three_that_are_refused_when_they_are_built_do_not_fail() -> None:
    """cfsp first, LoRA behind it works: the plain model is pruned first. Behind another adapter both stand on it."""
    group = trying.try_group("llama", ("propulsion", "cfsp", "lora"))
    assert group.fault == ("propulsion", "cfsp", "lora")
    assert group.refused
    assert "Stack(..., inject=False)" in group.reason
    found = Matrix(list(group.names), dict.fromkeys(group.names, "inject"), together=[group])
    assert not found.failing
    assert "What fails" not in page(found)
    assert "Refused together" in page(found)
