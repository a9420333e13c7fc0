"""Bundles that hold their base themselves, packed: whatever stands before or behind what packed it, they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftx
from peftx import Registry, Stack
from peftx.errors import BundleError, MergeError
from peftx.testing.trying import trouble

ROWS = [
    {"prompt": "Once", "completion": " upon a time."},
    {"prompt": "The river", "completion": " took it."},
] * 2


def packed(*names: str, **options: dict[str, Any]) -> Stack:
    classes = {name: Registry().load(name) for name in names}
    plugins = [cls(**(dict(cls.example) | options.get(name, {}))) for name, cls in classes.items()]
    stack = Stack("peftx:tiny", plugins)
    stack.train(ROWS, steps=1, batch_size=2, learning_rate=1e-3)
    stack.compress(["a text of some words and more of them, for the scales of whoever asks"] * 4)
    return stack


@pytest.mark.parametrize(
    "names",
    [
        # First values out of an embedding that a later plugin brings.
        ("byte2word", "full-finetuning", "nf4"),
        ("multi-control", "gmt", "signround"),  # a copy of the model
        ("hypertuning", "bitdelta", "nf4"),
        ("multi-control", "hft", "cfsp"),  # folded for good
        ("lofit", "lt-sft", "cfsp"),  # a fold adds a bias to layers that another trained before
        ("aligner", "surgical-fim", "cfsp"),
    ],
    ids="-".join,
)
def test_what_stands_before_a_trainer_of_a_packed_base_is_read(names: tuple[str, ...]) -> None:
    assert not (found := trouble(names, "llama")), found


def test_what_a_base_was_before_is_gone(tmp_path: Path) -> None:
    """Nothing is taken away, or switched off, into weights that the bundle does not hold."""
    again = peftx.load(packed("gmt", "nf4").save(tmp_path / "bundle"))
    with pytest.raises(MergeError, match="the layers that nf4 replaced were not kept"):
        again.remove("nf4")
    with pytest.raises(MergeError, match="'gmt' is in the weights that nf4 replaced") as caught:
        again.remove("gmt")
    assert caught.value.hint == "load the base model again"
    with (
        pytest.raises(MergeError, match=r"does not hold what .* was before 'gmt' trained it"),
        again.disabled("gmt"),
    ):
        pass
    assert not any(parameter.is_meta for parameter in again.model.parameters())


def test_another_base_is_called_by_its_own_name(tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [Registry().load("lora")(rank=2)])
    bundle = stack.save(tmp_path / "bundle")
    with torch.no_grad():
        stack.model.model.norm.weight.add_(1)
    stack.remove("lora")
    stack.model.save_pretrained(tmp_path / "other")
    stack.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(
        BundleError, match=f"was made for 'peftx:tiny', and '{tmp_path}/other' is another base model"
    ):
        peftx.load(bundle, model=str(tmp_path / "other"))


def test_a_packed_layer_is_in_the_mode_of_the_model(tmp_path: Path) -> None:
    """Dropout of what stands on it acted in answers, and each was another one."""
    nf4, lora = (Registry().load(name) for name in ("nf4", "lora"))
    stack = Stack("peftx:tiny", [nf4(), lora(rank=2, dropout=0.5)], inject=False)
    stack.compress(None, ["nf4"])
    stack.inject()
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.1)
    again = peftx.load(stack.save(tmp_path / "bundle"))
    for model in (stack.model, again.model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(*(model(input_ids=torch.arange(5, 15)[None]).logits for _ in range(2)))
