"""The kit bites: each deliberately broken plugin is caught by the check that is there for it, a healthy one by none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    Evaluation,
    Generation,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    companion,
    hookimpl,
)
from peftx.errors import PeftxError
from peftx.kernel.phases import Phase
from peftx.testing import conformance, example_inputs, plan_checks, run_checks, tiny, tiny_tokenizer
from peftx.testing.checks import CHECKS
from peftx.testing.kit import CheckResult
from peftx.toolkits.compression import QuantLinear
from peftx.toolkits.serving import Server

FOLDER = Path(__file__).parents[1] / "broken_plugins"
OTHER_PROCESS = {"imports_quickly", "save_load_in_a_fresh_process"}
PROVED_HERE = {"marks_are_known", "package_is_whole", "readme_has_the_options", "refuses"}
"""Their broken plugins are made below, since they need files or arguments."""


@cache
def module(name: str) -> ModuleType:
    """A file of `broken_plugins`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"broken_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(found)
    return found


def broken() -> Iterator[type[Plugin]]:
    for file in sorted(FOLDER.glob("*.py")):
        for value in vars(module(file.stem)).values():
            if isinstance(value, type) and issubclass(value, Plugin) and "caught_by" in vars(value):
                yield value


BROKEN = list(broken())


class _Gain(Delta):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.g

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        g = self.g.to(weight.dtype)
        return weight * g[..., None], None if bias is None else bias * g


class Healthy(Plugin):
    """A gain on each feature of the attention's linear layers."""

    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Gain(site.out_features))


def failures(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.message for result in results if result.outcome == "failed"}


# ------------------------------------------------------------------------------------------------------- it bites
def test_every_check_has_a_broken_plugin() -> None:
    assert {plugin.caught_by for plugin in BROKEN} | PROVED_HERE == {check.name for check in CHECKS}


@pytest.mark.parametrize("plugin", BROKEN, ids=lambda plugin: plugin.__name__)
def test_broken_plugin_is_caught(plugin: type[Plugin]) -> None:
    found = failures(run_checks(plugin, models=["llama"], only=[plugin.caught_by]))
    assert set(found) == {plugin.caught_by}
    assert found[plugin.caught_by], "a failure says what it saw"


@pytest.mark.parametrize(
    ("change", "said"), [("train", "in training mode"), ("requires_grad_", "train, first")]
)
def test_a_second_model_that_is_not_left_alone(change: str, said: str) -> None:
    class Teaches(Plugin):
        teacher: Any = None

        @hookimpl
        def train_step(self, step: TrainStep) -> None:
            self.teacher = self.teacher or companion(step.stack, "copy")
            getattr(self.teacher, change)()

    Teaches.__module__ = module("others").__name__  # whose source asks for one
    (result,) = run_checks(Teaches, models=["llama"], only=["second_models_are_no_part"])
    assert said in result.message


class _Shift(Delta):
    """y + b, b: [out]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b.to(y.dtype)


class ShiftsKeysAndValues(Plugin):
    """Softmax does not see the shift of a key, where no position turns it: its gradient is rounding."""

    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.k,v"):
            site.attach(_Shift(site.out_features))


def test_a_gradient_that_is_zero_is_not_compared_by_its_own_rounding() -> None:
    assert not failures(
        run_checks(ShiftsKeysAndValues, models=["t5", "gpt2"], only=["gradient_checkpointing"])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "plugin",
    [each for each in BROKEN if getattr(each, "whole_kit", True)],
    ids=lambda plugin: plugin.__name__,
)
def test_broken_plugin_is_caught_by_nothing_else(plugin: type[Plugin]) -> None:
    """But for those of which no stack can be built, so that every check fails."""
    names = {item.check.name for item in plan_checks(plugin, models=["llama"])}
    names -= OTHER_PROCESS - {plugin.caught_by}
    found = failures(run_checks(plugin, models=["llama"], only=sorted(names)))
    allowed = {plugin.caught_by} | (getattr(plugin, "also", set()) - OTHER_PROCESS)
    assert plugin.caught_by in found
    assert set(found) <= allowed, found


@pytest.fixture
def thing(tmp_path: Path) -> Iterator[type[Plugin]]:
    """A plugin in the `src` of a source tree that has nothing else yet."""
    source = "from peftx import Claim, Plugin, hookimpl\n\n\nclass Thing(Plugin):\n    claims = {Claim.DATA_ONLY}\n\n"
    source += "    @hookimpl\n    def prepare_data(self, data): ...\n"
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "peftx_thing.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("peftx_thing", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["peftx_thing"] = found
    spec.loader.exec_module(found)
    yield found.Thing
    del sys.modules["peftx_thing"]


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, keywords: Sequence[str] = (), readme: str = ""
) -> None:
    """Move `thing` out of its source tree, into a folder on the path where it is as pip would leave it."""
    file, site = folder / "src" / "peftx_thing.py", folder / "site"
    info = site / "peftx_thing-0.1.0.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.4",
        "Name: peftx-thing",
        "Version: 0.1.0",
        f"Keywords: {','.join(keywords)}",
    ]
    (info / "METADATA").write_text("\n".join([*lines, "", readme]), encoding="utf-8")
    (info / "entry_points.txt").write_text("[peftx.plugins]\nthing = peftx_thing:Thing\n", encoding="utf-8")
    monkeypatch.setattr(sys.modules["peftx_thing"], "__file__", str(file.rename(site / file.name)))
    monkeypatch.syspath_prepend(str(site))


POINT = '[project.entry-points."peftx.plugins"]\nthing = "peftx_thing:Thing"\n'


def test_package_is_whole(tmp_path: Path, thing: type[Plugin]) -> None:
    def message() -> str:
        return failures(run_checks(thing, only=["package_is_whole"])).get("package_is_whole", "")

    assert "no README.md" in message()
    (tmp_path / "README.md").write_text("# Thing\n", encoding="utf-8")
    assert "no pyproject.toml" in message()
    project = '[project]\nname = "peftx-thing"\nkeywords = []\n'
    (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    assert "no entry point" in message()
    project += POINT
    (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    assert "prepare_data" in message()
    whole = project.replace("keywords = []", 'keywords = ["prepare_data"]')
    (tmp_path / "pyproject.toml").write_text(whole, encoding="utf-8")
    assert not message()


MARKED = [
    ((), ""),
    (("fidelity:equal", "evidence:not-shown"), ""),
    (("evidence:shown",), ""),
    (
        ("fidelity:exact",),
        "'fidelity:exact' is none of fidelity:equal, fidelity:equations, fidelity:reconstruct",
    ),
    (
        ("evidence:gold",),
        "'evidence:gold' is none of evidence:shown, evidence:not-shown, evidence:not-measured",
    ),
    (("fidelity:",), "'fidelity:' is none of"),
    (("fidelity:equal", "fidelity:equations"), "more than one fidelity: equal, equations"),
]


@pytest.mark.parametrize(("words", "said"), MARKED)
@pytest.mark.parametrize("installed", [False, True], ids=["source", "installed"])
def test_marks_are_known(
    tmp_path: Path,
    thing: type[Plugin],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str],
    said: str,
    installed: bool,
) -> None:
    """In a source tree as pyproject.toml says them, elsewhere as the distribution does."""
    if installed:
        install(tmp_path, monkeypatch, keywords=words)
    else:
        project = f'[project]\nname = "peftx-thing"\nkeywords = {json.dumps(words)}\n{POINT}'
        (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    found = failures(run_checks(thing, only=["marks_are_known"]))
    assert set(found) == ({"marks_are_known"} if said else set())
    assert said in "".join(found.values())


TABLE = (
    "| option | type | default | meaning |\n| --- | --- | --- | --- |\n| size | integer | 3 | how much |\n"
)
READMES = [
    (f"# Thing\n\n## Options\n\n{TABLE}\n## Cite\n", True),
    (f"# Thing\n\n{TABLE}", True),
    (f"# Thing\n\n{TABLE.replace('3', '4')}\n## Cite\n", False),
    (f"# Thing\n\n{TABLE.replace('integer', 'number')}\n", False),
    (f"# Thing\n\n{TABLE.replace('much', 'many')}\n", False),
    (f"# Thing\n\n{TABLE}| old | integer | 3 | gone |\n", False),
    (f"# Thing\n\n{TABLE.replace('| size | integer | 3 | how much |', '')}", False),
    ("# Thing\n\n| name | meaning |\n| --- | --- |\n| size | in the author's own words |\n", None),
    ("", None),
]
"""A README; does its option table hold; None: it has none that is judged."""


@pytest.mark.parametrize(("readme", "holds"), READMES)
@pytest.mark.parametrize("installed", [False, True], ids=["source", "installed"])
def test_readme_has_the_options(
    tmp_path: Path,
    thing: type[Plugin],
    monkeypatch: pytest.MonkeyPatch,
    readme: str,
    holds: bool,
    installed: bool,
) -> None:
    class ThingConfig(PluginConfig):
        size: int = Field(3, description="how much")

    monkeypatch.setattr(thing, "Config", ThingConfig)
    if installed:
        install(tmp_path, monkeypatch, readme=readme)
    else:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    planned = {item.check.name for item in plan_checks(thing)}
    assert ("readme_has_the_options" in planned) == (holds is not None)
    if holds is not None:
        found = failures(run_checks(thing, only=["readme_has_the_options"]))
        assert set(found) == (set() if holds else {"readme_has_the_options"})
        assert holds or TABLE.strip() in found["readme_has_the_options"], "what to put in is told"


def test_refusal_must_happen() -> None:
    found = run_checks(Healthy, models=["gpt2"], not_on={"llama": "it does not work there"}, only=["refuses"])
    assert [result.id for result in found] == ["llama-refuses"]
    assert "take it out of `refuses`" in found[0].message
    found = run_checks(Healthy, models=["gpt2"], not_on={"mamba": "it has no attention"}, only=["refuses"])
    assert [result.outcome for result in found] == ["passed"]


# ------------------------------------------------------------------------------------------------ and bites nobody else
test_healthy = conformance(Healthy, models=["llama", "gpt2"])


class Quantizer(Plugin):
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("mlp", whole=True):
            site.replace(QuantLinear.from_linear(site.module, bits=8))


class Reverser(Plugin):
    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        data.train = data.train.select(range(len(data.train) - 1, -1, -1))


class Signs(Plugin):
    """Moves every parameter by the learning rate, in a direction that depends on the loss."""

    claims = {Claim.REPLACES_STEP}

    @hookimpl
    def train_step(self, step: TrainStep) -> Tensor:
        with torch.no_grad():
            loss = step.total_loss()
            for parameter in step.parameters():
                parameter.sub_(step.learning_rate * loss.sign())
        return loss


class Counter(Plugin):
    """A lossless decoder, a metric and a policy of serving in one."""

    claims = {Claim.LOSSLESS_DECODING}

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
        return (yield)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        evaluation.add("rows", len(evaluation.rows("eval")))

    @hookimpl
    def serve(self, server: Server) -> None:
        server.scheduler.max_batch = 2


class Pair(Plugin):
    """Trains on rows of a source beside its own."""

    claims = Healthy.claims
    inject = Healthy.inject
    sources = {
        "others": ({"prompt": "2 is", "completion": " even"}, {"prompt": "3 is", "completion": " odd"})
    }

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        ahead = [
            len(batch["input_ids"]) for name in ("train", "others") for batch in step.batches_of(name, 2)
        ]
        assert sum(ahead) == 4
        step.add_loss("others", lambda _: step.model(**step.batch_of("others")).loss, over="step")
        return (yield)


class Halves(Plugin):
    """Has a phase that is a share of the run."""

    claims = Healthy.claims
    inject = Healthy.inject

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("held", 0.5), Phase("free"))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if step.phase(self).name == "held":
            step.add_loss(
                "size", lambda _: sum(p.square().sum() for p in step.parameters()), weight=0.01, over="step"
            )
        return (yield)


@pytest.mark.parametrize(
    "plugin", [Quantizer, Reverser, Signs, Counter, Pair, Halves], ids=lambda plugin: plugin.__name__
)
def test_other_healthy_plugins(plugin: type[Plugin]) -> None:
    names = {item.check.name for item in plan_checks(plugin, models=["llama"])} - OTHER_PROCESS
    results = run_checks(plugin, models=["llama"], only=sorted(names))
    assert not failures(results)
    assert len(results) > 8


def test_ids_say_what_is_proven() -> None:
    ids = [item.id for item in plan_checks(Healthy, models=["llama", "bert"])]
    assert len(ids) == len(set(ids))
    assert {"config_round_trip", "llama-merge_equals_unmerged", "bert-identity_at_start"} <= set(ids)
    assert "llama-cached_equals_uncached" in ids
    assert "bert-cached_equals_uncached" not in ids, "an encoder does not generate"
    assert not any("lossless" in id or "bytes_are_real" in id or "data_repeats" in id for id in ids)
    assert "llama-resume_is_exact" in ids
    assert "bert-resume_is_exact" not in ids, "one architecture is enough"


def test_plugin_without_claims_gets_the_opposite_checks() -> None:
    class Bare(Healthy):
        claims = frozenset()

    names = {item.check.name for item in plan_checks(Bare, models=["llama"])}
    assert {"identity_not_hidden", "merge_is_refused"} <= names
    assert not names & {"identity_at_start", "merge_equals_unmerged", "unmerge_is_exact"}


# ------------------------------------------------------------------------------------------------------ the engine
def test_expected_failure_is_strict() -> None:
    options = {"models": ["llama"], "only": ["config_round_trip", "identity_at_start"]}
    found = run_checks(Healthy, expected_failures={"identity_at_start": "not yet"}, **options)
    outcomes = {result.name: result.outcome for result in found}
    assert outcomes == {"config_round_trip": "passed", "identity_at_start": "failed"}
    assert "passes, and was expected to fail (not yet)" in found[1].message
    late = module("building").StartsElsewhere
    found = run_checks(late, expected_failures={"llama-identity_at_start": "random start"}, **options)
    assert (found[1].name, found[1].outcome, found[1].message) == (
        "identity_at_start",
        "expected",
        "random start",
    )


def test_crash_does_not_count_as_an_expected_failure() -> None:
    class Crashes(Plugin):
        """Its configuration cannot be made."""

        def __init__(self) -> None:
            raise KeyError("no such thing")

        @hookimpl
        def prepare_data(self) -> None: ...

    only = ["config_round_trip"]
    found = run_checks(Crashes, expected_failures={"config_round_trip": "it is new"}, only=only)
    assert [result.outcome for result in found] == ["failed"]
    assert "KeyError" in found[0].message


@pytest.mark.parametrize("what", ["expected_failures", "only", "models", "not_on"])
def test_unknown_names_are_refused(what: str) -> None:
    wrong: dict[str, object] = {
        "expected_failures": {"merge_equals_unmergd": "why"},
        "only": ["merge_equals_unmergd"],
        "models": ["lama"],
        "not_on": {"lama": "why"},
    }
    with pytest.raises(PeftxError, match=r"did you mean '(merge_equals_unmerged|llama)"):
        run_checks(Healthy, **{what: wrong[what]})


def test_progress_and_deadline() -> None:
    seen: list[tuple[int, int, str]] = []
    only = ["config_round_trip", "config_schema"]

    def note(done: int, total: int, result: CheckResult) -> None:
        seen.append((done, total, result.id))

    found = run_checks(Healthy, only=only, progress=note)
    assert seen == [(1, 2, "config_round_trip"), (2, 2, "config_schema")]
    assert all(result.seconds > 0 for result in found)
    found = run_checks(Healthy, only=only, deadline=0.0)
    assert [result.outcome for result in found] == ["not-run", "not-run"]


def test_global_generators_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    run_checks(Healthy, models=["llama"], only=["identity_at_start", "base_untouched_by_training"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrappers_stand_around_what_runs() -> None:
    """Code behind a `yield` sees the gradients of the default step, and the text of the default loop."""
    seen: dict[str, object] = {}

    class Watches(Plugin):
        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
            loss = yield
            seen["gradients"] = [p.grad is not None for p in step.parameters()]
            seen["loss"] = float(loss)
            return loss

        @hookimpl(wrapper=True)
        def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
            ids = yield
            seen["length"] = ids.shape[1]
            return ids

    stack = Stack(tiny("llama"), [Healthy(), Watches()], tokenizer=tiny_tokenizer())
    ids = example_inputs(stack.model)["input_ids"]
    loss = stack.train_step({"input_ids": ids, "labels": ids})
    assert seen["loss"] == float(loss)
    assert seen["gradients"]
    assert all(seen["gradients"])
    stack.generate("a", max_new_tokens=3)
    assert seen["length"] == 4


def test_import_is_light() -> None:
    code = "import sys, peftx.testing; assert 'torch' not in sys.modules and 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
