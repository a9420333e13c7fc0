"""The recipes in docs/recipes run from YAML to a bundle that loads and generates."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftx
from peftx.pipeline import load_run

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} == {
        "dialogues",
        "mosaic-lora-deft-prefixquant",
        "prompt-lora-mezo",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_from_end_to_end(path: Path, tmp_path: Path) -> None:
    shorter = ["train.steps=3", "train.batch_size=2", f"output={tmp_path / 'out'}"]
    run = load_run(path, overrides=shorter)
    for metric in run.pipeline.evaluate:
        assert metric.metric == "perplexity"
    result = run.run()
    assert result.training[0].steps == 3
    assert all(loss == loss for _, loss in result.training[0].losses)
    again = peftx.load(tmp_path / "out")
    assert list(again.plugins) == [entry.id for entry in run.pipeline.stack]
    prompt = "Office to Grey Island. Who is on duty?"
    assert again.generate(prompt, max_new_tokens=5) == result.stack.generate(prompt, max_new_tokens=5)
