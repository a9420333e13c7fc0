"""A plugin's name is its entry point, whatever its module and class are called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftx
from peftx import Phase, Plugin, Stack
from peftx.composition.conflicts import find_conflicts
from peftx.composition.members import default_id
from peftx.composition.rules import FIRST, RULES, rules
from peftx.engines.bundle import read_manifest
from peftx.errors import PeftxError, PluginError
from peftx.kernel.members import Member, blame
from peftx.kernel.plugin import Claim, PluginConfig, hookimpl
from peftx.testing.models import tiny, tiny_tokenizer

MODULE = """
from peftx import Claim, Delta, Plugin, hookimpl
import torch

class Gain(Delta):
    def __init__(self, out):
        super().__init__()
        self.g = torch.nn.Parameter(torch.ones(out))
    def forward(self, x, y):
        return y * self.g

class LoRAPlus(Plugin):
    @hookimpl
    def inject(self, model):
        for site in model.linears("attention.q"):
            site.attach(Gain(site.out_features))

class Second(LoRAPlus):
    pass
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A stranger's distribution: two plugins of one package, whose names follow from neither module nor class."""
    (tmp_path / "acme_tuners.py").write_text(MODULE)
    about = tmp_path / "acme_tuners-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tuners\nVersion: 1.0\n")
    points = "[peftx.plugins]\nlora-plus = acme_tuners:LoRAPlus\nother = acme_tuners:Second\n"
    (about / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("acme_tuners")
    del sys.modules["acme_tuners"]


def test_a_third_partys_bundle_comes_back(acme: object, tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [acme.LoRAPlus(), acme.Second()], tokenizer=tiny_tokenizer())  # type: ignore[attr-defined]
    assert list(stack.plugins) == ["lora-plus", "other"]
    folder = stack.save(tmp_path / "bundle")
    assert [entry.use for entry in read_manifest(folder).plugins] == ["lora-plus", "other"]
    assert "use: lora-plus" in (folder / "pipeline.yaml").read_text()
    assert "| lora-plus |" in (folder / "README.md").read_text()
    again = peftx.load(folder, model=tiny("llama"))
    assert [type(plugin) for plugin in again.plugins.values()] == [acme.LoRAPlus, acme.Second]  # type: ignore[attr-defined]


def test_a_class_that_nobody_publishes_goes_by_its_own_name() -> None:
    class MyGain(Plugin):
        pass

    assert default_id(MyGain) == "my-gain"


def test_a_class_of_a_published_name_is_not_taken_for_the_published_one(tmp_path: Path) -> None:
    """`class Lora` in a notebook is no lora."""

    class Lora(Plugin):
        @hookimpl
        def inject(self, model: peftx.ModelView) -> None: ...

    folder = Stack(tiny("llama"), [Lora()], tokenizer=tiny_tokenizer()).save(tmp_path / "bundle")
    assert type(peftx.load(folder, model=tiny("llama")).plugins["lora"]) is Lora


def test_an_error_that_begins_like_the_id_is_blamed_all_the_same() -> None:
    member = Member("loss", Plugin(PluginConfig()), "spec.yaml:3:1")
    with pytest.raises(PeftxError, match=r"^loss: train_step \(spec\.yaml:3:1\): loss must be finite$"):
        blame(PeftxError("loss must be finite"), member, "train_step")
    blame(PluginError("loss: the width is 3"), member, "train_step")  # it names itself


# -- rules: one table ------------------------------------------------------------------------------------------------


def _with(*claims: Claim, hook: str = "inject", phase: str | None = None, phases: bool = False) -> Member:
    @hookimpl
    def method(self: object) -> None: ...

    own = {"phases": lambda self: (Phase("first", 1), Phase("rest"))} if phases else {}
    return Member(
        f"p{len(claims)}{hook[:1]}",
        type("Made", (Plugin,), {"claims": set(claims), hook: method} | own)(),
        phase=phase,
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.claims) or "folding")
def test_what_is_told_of_a_plugin_is_what_is_checked(rule: object) -> None:
    """For every pair of claims: a sentence of `rules` for both sides if, and only if, the check finds a conflict."""
    together = [side.claims for side in (rule.one, rule.two) if len(side.claims) > 1]  # type: ignore[attr-defined]
    claims, hits = [(), *((claim,) for claim in Claim), *together], 0
    late: dict[str, str] = {"hook": "compress", "phase": "after-training"} if rule.late else {}  # type: ignore[attr-defined]
    for ones in claims:
        for twos in claims:
            one, two = _with(*ones, **late), Member("two", _with(*twos, phases=True).plugin)
            hit = rule.one.is_it(one.plugin) and rule.two.is_it(two.plugin)  # type: ignore[attr-defined]
            if not hit:
                continue
            hits += 1
            assert any(rule.reason.format(one=one, two=two) == c.reason for c in find_conflicts([one, two]))  # type: ignore[attr-defined]
            word = "before" if rule.ordered else "beside"  # type: ignore[attr-defined]
            assert f"not {word} {rule.two.told}" in rules(one.plugin)  # type: ignore[attr-defined]
            back = "after" if rule.ordered else "beside"  # type: ignore[attr-defined]
            told = f"not {back} {rule.one.told}"  # type: ignore[attr-defined]
            assert {told, told + FIRST} & {*rules(two.plugin)}
            if late and "unless" not in told:
                assert told + FIRST in rules(two.plugin)
                first = _with(*ones, hook="compress", phase="before-training")
                said = rule.reason.format(one=first, two=two)  # type: ignore[attr-defined]
                assert said not in [c.reason for c in find_conflicts([first, two])]
    assert hits


def test_an_order_that_is_named_works() -> None:
    """Not "put it last" where what then stands before it does not fold."""
    final = _with(Claim.FINAL, Claim.FOLDS_PREVIOUS, hook="compress")
    stubborn = _with(Claim.IDENTITY_AT_START)
    (conflict,) = find_conflicts([final, stubborn])
    assert conflict.working_order == ()
    assert "keep one of them" in str(conflict)
    folding = _with(Claim.MERGEABLE, Claim.IDENTITY_AT_START)
    (conflict,) = find_conflicts([final, folding])
    members = {m.id: m for m in (final, folding)}
    assert find_conflicts([members[id] for id in conflict.working_order]) == []


def test_decoding_may_come_after_what_is_final() -> None:
    exact = _with(Claim.EXACT_CACHE, Claim.BESIDE_WEIGHTS)
    assert find_conflicts([_with(Claim.FINAL, hook="compress"), exact]) == []
