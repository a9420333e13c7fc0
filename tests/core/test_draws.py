"""Which architectures a run of the kit draws, and that each kind of them catches what only it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, hookimpl
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.call import Call
from peftx.testing import conformance, plan_checks, run_checks
from peftx.testing.kit import DRAW, Planned, drawn


class Bias(Delta):
    """y + b, b: [out]."""

    def __init__(self, features: int, start: float = 0.0) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((features,), start))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b.to(y.dtype)


def reads_tokens(model: ModelView) -> None:
    if model.module.main_input_name != "input_ids":
        raise ArchitectureError(f"{model.owner}: {model.config.model_type} reads no tokens")


class OnFirstRows(Plugin):
    """Reads a layer's own rows where a fused one has those of another: its first."""

    kind: ClassVar = ("gpt2", "phi3", "gpt_neox")
    claims = {Claim.IDENTITY_AT_START}

    class Beside(Bias):
        def __init__(self, difference: Tensor) -> None:
            super().__init__(len(difference))
            self.register_buffer("difference", difference.clone())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) + x @ self.difference.to(x.dtype).t()

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.q attention.v"):
            matrix = site.module.weight if isinstance(site.module, nn.Linear) else site.module.weight.t()
            rows = matrix.detach()[: site.out_features]
            if site.rows is None:
                rows = site.weight.detach()
            site.attach(self.Beside(site.weight.detach() - rows))


class OneTower(Plugin):
    """Takes the tokens of the call for those that every layer sees."""

    kind: ClassVar = ("t5", "bart")

    class OnReal(Bias):
        def __init__(self, features: int, call: Call) -> None:
            super().__init__(features, 0.5)
            self.call = call

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            real = self.call.real
            return y + self.b.to(y.dtype) * (1 if real is None else self.call.rows(real, y)[..., None])

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(self.OnReal(site.out_features, model.call))


class PadsOnTheLeft(Plugin):
    """Marks the first token of a text, and counts it from the right, as if pads stood on the left."""

    kind: ClassVar = ("bert", "roberta")

    class OnFirst(Bias):
        def __init__(self, features: int, call: Call) -> None:
            super().__init__(features, 0.5)
            self.call = call

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            real = self.call.real
            if real is None or self.call.past:
                return y
            first = torch.arange(real.shape[1]) == real.shape[1] - real.sum(1, keepdim=True)
            return y + self.b.to(y.dtype) * self.call.rows(first, y)[..., None]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        reads_tokens(model)
        for site in model.linears("mlp.down"):
            site.attach(self.OnFirst(site.out_features, model.call))


class OneExpert(Plugin):
    """Starts from a layer's matrix, and takes that of the first expert for all of them."""

    kind: ClassVar = ("mixtral", "qwen3_moe")
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    class Moves(Delta):
        def __init__(self, weight: Tensor, first: Tensor) -> None:
            super().__init__()
            self.D = nn.Parameter(torch.zeros_like(weight))
            self.register_buffer("beside", weight - first)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + x @ (self.D - self.beside).to(x.dtype).mT

        def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight + (self.D - self.beside).to(weight.dtype), bias

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp"):
            weight = site.weight.detach()
            site.attach(self.Moves(weight, weight[(0,) * len(site.batch)]))


class CountsInCache(Plugin):
    """Marks every second token, and counts those that it saw by the keys and values in the cache."""

    kind: ClassVar = ("mamba",)

    class OnOdd(Bias):
        def __init__(self, features: int, call: Call) -> None:
            super().__init__(features, 0.5)
            self.call = call

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            real = self.call.real
            if real is None:
                return y
            mask = self.call.arguments.get("attention_mask")
            seen = real if mask is None else mask  # in a cached call that of the whole text
            number = self.call.past * (mask is None) + seen.cumsum(1)[:, -real.shape[1] :]
            return y + self.b.to(y.dtype) * self.call.rows(number % 2, y)[..., None]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        reads_tokens(model)
        for site in model.linears("mlp.down" if any(model.main.attention) else "ssm.out"):
            site.attach(self.OnOdd(site.out_features, model.call))


BLIND = (OnFirstRows, OneTower, PadsOnTheLeft, OneExpert, CountsInCache)
"""Plugins that are right on llama, each blind to a kind of architecture."""


def renamed(plugin: type[Plugin], **words: Any) -> type[Plugin]:
    """A class of its own, so that `architectures` may differ."""
    return type(
        plugin.__name__, (plugin,), {"__module__": plugin.__module__, "__doc__": plugin.__doc__, **words}
    )


def failed(planned: list[Planned]) -> set[str]:
    found = set()
    for item in planned:
        try:
            item.run()
        except (AssertionError, PeftxError, RuntimeError):
            found.add(item.id)
    return found


@pytest.mark.parametrize("plugin", BLIND, ids=lambda plugin: plugin.__name__)
def test_on_llama_nothing_is_wrong(plugin: type[Plugin]) -> None:
    names = {item.check.name for item in plan_checks(plugin, models=["llama"]) if item.check.on != "odd"}
    names -= {"imports_quickly", "save_load_in_a_fresh_process"}
    assert not [
        r.id for r in run_checks(plugin, models=["llama"], only=sorted(names)) if r.outcome == "failed"
    ]


@pytest.mark.parametrize(("plugin", "arch"), [(p, arch) for p in BLIND for arch in p.kind],
                         ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_a_draw_of_its_kind_catches_it(
    plugin: type[Plugin], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else stands in the run."""
    monkeypatch.setenv(DRAW, "draw")
    if arch == "mamba":
        planned = [item for item in plan_checks(plugin, models=["llama"]) if item.arch == arch]
    else:
        planned = [item for item in drawn(plan_checks(plugin, models=["llama", arch])) if item.arch == arch]
    assert planned
    assert failed(planned)


def with_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, text: str) -> list[Planned]:
    """What is drawn for a plugin whose file holds this."""
    (tmp_path / "it.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr("inspect.getfile", lambda cls: str(tmp_path / "it.py"))
    return drawn(plan_checks(OnFirstRows))


def test_a_draw_is_the_first_and_one_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """It hangs on the source alone, and the sources of many plugins draw every architecture."""
    monkeypatch.setenv(DRAW, "draw")
    whole = {item.arch for item in plan_checks(OnFirstRows)}
    seen: set[str] = set()
    for number in range(30):
        found = with_source(monkeypatch, tmp_path, str(number))
        assert [i.id for i in found] == [i.id for i in with_source(monkeypatch, tmp_path, str(number))]
        models = {item.arch for item in found if item.check.on in ("model", "text", "generative")}
        assert "llama" in models
        assert len(models) == 2
        assert len({item.arch for item in found if item.check.on == "odd"}) == 1
        seen |= {item.arch for item in found}
    assert seen == whole


def test_what_is_drawn_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the companions, of which the first architecture meets one."""
    planned = plan_checks(OnFirstRows)
    monkeypatch.setenv(DRAW, "all")
    assert [item.id for item in drawn(planned)] == [item.id for item in planned]
    monkeypatch.setenv(DRAW, "draw")
    some = drawn(planned)
    for arch in {item.arch for item in some if item.check.on == "model"}:
        assert of_all(some, arch) == of_all(planned, arch)
    assert {i.id for i in planned if i.check.on in ("package", "first") and not i.check.one_of} <= {
        i.id for i in some
    }


def of_all(items: Sequence[Planned], arch: str) -> list[str]:
    return [item.id for item in items if item.arch == arch and not item.check.one_of]


def test_many_plugins_meet_every_companion(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(DRAW, "draw")
    whole = {item.id for item in plan_checks(OnFirstRows) if item.check.one_of}
    assert len(whole) == 3
    seen: set[str] = set()
    for number in range(30):
        met = [item.id for item in with_source(monkeypatch, tmp_path, str(number)) if item.check.one_of]
        assert len(met) == 1
        seen |= set(met)
    assert seen == whole


def test_one_item_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def items(function: Callable[..., None]) -> dict[str, list[str]]:
        (mark,) = function.pytestmark  # type: ignore[attr-defined]
        return {parameter.id: [item.id for item in parameter.values[0]] for parameter in mark.args[1]}

    monkeypatch.setenv(DRAW, "all")
    found = items(conformance(OnFirstRows))
    assert list(found)[:3] == ["package", "llama", "gpt2"]
    assert "config_round_trip" in found["package"]
    assert all(name.startswith("gpt2-") for name in found["gpt2"])
    assert sorted(name for ids in found.values() for name in ids) == sorted(
        i.id for i in plan_checks(OnFirstRows)
    )
    monkeypatch.setenv(DRAW, "draw")
    assert set(items(conformance(OnFirstRows))) < set(found)


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DRAW, "some")
    with pytest.raises(PeftxError, match="PEFTX_ARCHITECTURES is 'some'"):
        conformance(OnFirstRows)
