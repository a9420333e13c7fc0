"""Selectors that match nothing in any model of an architecture are said with their place, before a model is loaded; and
none is refused that a model of it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx.composition.registry import Registry
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.testing.models import ARCHITECTURES, CORE_ARCHITECTURES, tiny
from peftx_cli.selectors import BY_MODEL, findings

SPEC = """\
peftx: 1
model: {model}
stack:
  - use: lora
    with: {{targets: "{targets}"}}
"""


def found(model: str, targets: str, folder: Path) -> list[str]:
    data = {"model": model, "stack": ["nf4", {"use": "lora", "with": {"targets": targets}}, 7]}
    told = list(findings(data, Registry(), folder))
    assert all(finding.path == ("stack", 1, "with", "targets") for finding in told)
    return [finding.message for finding in told]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention.z", "'attention.z' matches nothing"),
        ("attention.q,w !mllp", "'attention.w' matches nothing"),
        ("attention.q !mllp", "'!mllp' matches nothing"),
        ("mlp layers=4-6", "layer 6 does not exist"),
        ("tower=encoder mlp", "no tower 'encoder'"),
        ("attention.q !attention", "exclude all that they select"),
        ("re:nowhere$", ""),  # names are the model's own
        ("attention.q layers=-1", ""),
        ("attention. layers=3-1", ""),  # malformed, which the option's type says
    ],
)
def test_a_selector_that_finds_nothing_is_said_before_a_model_is_loaded(
    targets: str, expected: str, tmp_path: Path
) -> None:
    told = found("peftx:tiny", targets, tmp_path)
    assert [expected in message for message in told] == ([True] if expected else [])


FEW = {*CORE_ARCHITECTURES, "gemma3n", "mamba", "whisper"}
"""With fused matrices, two towers, several more, and none of attention."""


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in ARCHITECTURES],
)
def test_what_a_model_has_is_never_refused(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    anatomy = Anatomy(model)
    (tmp_path / "config.json").write_text(model.config.to_json_string(use_diff=False), "utf-8")
    there = {
        f"{site.role} {f'tower={site.tower}' if site.tower else ''}"
        f" {f'layers={site.layer}' if site.layer is not None else ''}"
        for site in anatomy.sites
        if not site.role.startswith(BY_MODEL)
    }
    attention = {f"attention tower={tower.name}" for tower in anatomy.towers.values() if tower.attention}
    data = {
        "model": str(tmp_path),
        "stack": [{"use": "lora", "with": {"targets": text}} for text in sorted(there | attention | {"all"})],
    }
    assert list(findings(data, Registry(), tmp_path)) == []
    assert anatomy.inferred or found(str(tmp_path), "attention.zz", tmp_path)


@pytest.mark.parametrize("text", [None, "[]", "{", '{"model_type": 5}', '{"model_type": "nobody"}'])
def test_a_configuration_that_tells_nothing_is_left_to_the_run(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, "utf-8")
    assert found("./", "attention.z", tmp_path) == []


def test_every_mistake_at_once_with_its_place(installed: Any, run: Callable[..., Any]) -> None:
    (installed.work / "model").mkdir()
    config = {"model_type": "gpt2", "n_layer": 2}
    (installed.work / "model" / "config.json").write_text(json.dumps(config), "utf-8")
    text = SPEC.format(model="./model", targets="mlp.gate") + "data: {train: nowhere.jsonl}\ntrain: {}\n"
    for name, more in (("alone", ""), ("among", "evaluate: [perplexityy]\n")):
        (installed.work / f"{name}.yaml").write_text(text + more, "utf-8")
        for command in ("validate", "plan"):
            result = run(command, f"{name}.yaml")
            assert result.exit_code == 2
            told = result.stderr
            assert f"{name}.yaml:5:21: targets 'mlp.gate': 'mlp.gate' matches nothing" in told
            assert f"{name}.yaml:6:15: data file" in told
            assert ("perplexityy" in told) == bool(more)


def test_plan_calls_what_the_model_refuses_by_its_code(run: Callable[..., Any]) -> None:
    """LoRA adapts matrices, which the table does not say of a role."""
    result = run("plan", "--plugin", "lora", "--set", "lora.targets=norm")
    assert result.exit_code == 2
    assert "\ntarget: lora: targets 'norm': 'norm' matches nothing in this model" in result.stdout
    assert "peftx explain target" in result.stdout
