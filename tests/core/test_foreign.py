"""Models that other libraries have laid hands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peftx import Stack
from peftx.errors import ConflictError, ModelError
from peftx.testing import tiny
from peftx.testing.models import example_inputs, output_of
from peftx_lora import Lora
from peftx_propulsion import Propulsion


def test_layers_of_hf_peft_are_not_passed_by() -> None:
    theirs = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    trained = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    with pytest.raises(
        ConflictError, match=r"HF PEFT stands on the model \(model\.layers\.0\.self_attn\.q_proj\)"
    ):
        Stack(theirs.base_model.model, [Lora(rank=2)])
    assert [name for name, parameter in theirs.named_parameters() if parameter.requires_grad] == trained
    Stack(theirs.unload(), [Lora(rank=2)])  # the way out


@pytest.mark.parametrize("write", ["save", "export"])
@pytest.mark.parametrize("module", ["q_proj", "v_proj"])  # beside the stack's, and around it
def test_hf_peft_on_a_stack_is_named_where_it_is_written(tmp_path: Path, write: str, module: str) -> None:
    stack = Stack("peftx:tiny", [Lora(rank=2, targets="attention.v")])
    theirs = get_peft_model(stack.model, LoraConfig(target_modules=[module]))
    with pytest.raises(
        ConflictError, match=rf"HF PEFT was put on the stack's model \(model\.layers\.0.*{module}\)"
    ):
        getattr(stack, write)(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    theirs.save_pretrained(tmp_path / "theirs")  # the way out
    theirs.unload()
    getattr(stack, write)(tmp_path / "out")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("merged", [True, False])
def test_a_merge_of_hf_peft_adds_to_the_weight_under_the_plugins(merged: bool) -> None:
    """So a plugin that multiplies has to be in the weight before: docs/peft.md says it."""
    stack = Stack(tiny("llama"), [Propulsion(targets="attention.q")])
    with torch.no_grad():
        for parameter in stack.ledger.trained().values():
            parameter.add_(0.1)
    if merged:
        stack.merge()
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = get_peft_model(stack.model, config).eval()
    with torch.no_grad():
        before = output_of(stack.model, example_inputs(stack.model))
        theirs.merge_adapter()
        after = output_of(stack.model, example_inputs(stack.model))
    assert torch.allclose(after, before, rtol=0, atol=1e-5) == merged


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model = tiny("llama")
    places = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    away = dispatch_model(
        model, device_map=places | {"model.layers.1": "disk"}, offload_dir=str(tmp_path), main_device="cpu"
    )
    with pytest.raises(ModelError, match=r"model\.layers\.1\.\S+ and \d+ further weights are offloaded"):
        Stack(away, [Lora(rank=2)])


def test_a_model_on_one_device_by_a_map_is_as_any_other() -> None:
    from accelerate import dispatch_model

    ids = torch.arange(5, 11)[None]
    plain, mapped = tiny("llama"), dispatch_model(tiny("llama"), device_map={"": "cpu"})
    found = [Stack(model, [Lora(rank=2)]).model(input_ids=ids).logits for model in (plain, mapped)]
    assert torch.equal(*found)
