"""Fine-tuned models beside their base, and what calibration text goes through."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peftx import ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ModelError
from peftx.testing import tiny
from peftx.toolkits.compression import adopt, base_parameters, differences, text_blocks


class Tuned(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.view, self.places = model, differences(model, model.linears("mlp", whole=True))


class Mine(Plugin):
    @hookimpl
    def evaluate(self) -> None:
        """Nothing."""


def tuned_of(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    for i, p in enumerate(found.parameters()):
        p.data += 0.01 * (i + 1)
    return found


def test_every_parameter_is_taken_over_and_what_it_was_is_known() -> None:
    base = tiny("gpt2")  # its head is its embedding
    before, tuned, plugin = copy.deepcopy(base), tuned_of(base), Tuned()
    stack = Stack(base, [plugin])
    adopt(plugin.view, plugin.places, tuned, "elsewhere")
    own = base_parameters(stack.model)
    assert own.keys() == dict(before.named_parameters(remove_duplicate=False)).keys()
    for name, place in plugin.places.items():
        assert torch.equal(place.theta, tuned.get_parameter(name))
        assert torch.equal(place.theta_0, before.get_parameter(name))
        assert own[name] is place.theta
    assert own["lm_head.weight"] is own["transformer.wte.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shape", r"is no fine-tune of this base: transformer\.ln_f\.weight is 3, and the base's 32"),
        ("vocabulary", r"is no fine-tune of this base: \S+ is 7x32, and the base's \d+x32"),
        ("tie", r"is no fine-tune of this base: \S+ is tied to another tensor in one of the two alone"),
        ("name", r"is no fine-tune of this base: more\.bias is in one of the two alone"),
        ("nan", r": transformer\.ln_f\.weight has numbers that are not finite"),
    ],
)
def test_no_relative_is_refused(change: str, said: str) -> None:
    plugin = Tuned()
    stack = Stack(tiny("gpt2"), [plugin])
    other: Any = tuned_of(tiny("gpt2"))
    if change == "shape":
        other.transformer.ln_f.weight = nn.Parameter(torch.ones(3))
    elif change == "vocabulary":
        other.resize_token_embeddings(7)
    elif change == "tie":
        other.lm_head.weight = nn.Parameter(torch.ones_like(other.lm_head.weight))
    elif change == "nan":
        other.transformer.ln_f.weight.data[1] = torch.nan
    else:
        other.more = nn.Linear(2, 2)
    with pytest.raises(
        ModelError, match=f"tuned: 'elsewhere'.*{said}" if change != "nan" else f"'elsewhere'{said}"
    ):
        adopt(plugin.view, plugin.places, other, "elsewhere")
    stack.remove("tuned")


def test_text_goes_through_one_tower_and_linear_layers_in_blocks_are_packed() -> None:
    for arch, targets, said in (
        ("t5", "attention", "t5 has encoder and decoder, and text goes through one tower"),
        ("vit", "attention", "vit has"),
        ("llama", "head", r"llama has head \(linear\) in lm_head, and linear layers in blocks"),
        ("mixtral", "mlp", r"mixtral has experts\S* \(experts\) in"),
    ):
        view = Stack(tiny(arch), [Mine()]).view("mine")
        with pytest.raises(ArchitectureError, match=f"mine: {said}"):
            text_blocks(view, view.linears(targets, whole=True))
    view = Stack(tiny("llama"), [Mine()]).view("mine")
    text_blocks(view, view.linears("all", whole=True))
