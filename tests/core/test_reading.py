"""What layers give while the model runs; and ranks that a matrix has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftx import ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.reading import check_output, outputs_of
from peftx.kernel.view import BoundSite
from peftx.testing.models import example_inputs, tiny
from peftx_aligner import Aligner
from peftx_lora import Lora


class Places(Plugin):
    """Keeps the sites that it is given, and asks for ranks."""

    sites: list[BoundSite]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.sites = model.linears("attention mlp")


def places_of(arch: str, *others: Plugin) -> tuple[Stack, dict[str, BoundSite]]:
    plugin = Places()
    stack = Stack(tiny(arch), [*others, plugin])
    return stack, {site.key: site for site in plugin.sites}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@torch.no_grad()
def test_outputs_are_those_of_the_role_with_all_that_stands_on_it(arch: str) -> None:
    stack, sites = places_of(arch, Lora(rank=2))
    for p in stack.ledger.parameters("lora"):
        p.normal_(0, 0.1)
    inputs = example_inputs(stack.model)
    seen: dict[str, list[Tensor]] = {}
    for key, site in sites.items():
        site.module.register_forward_hook(
            lambda module, x, y, key=key, rows=site.rows: seen.setdefault(key, []).append(
                y if rows is None else rows.take(y)
            )
        )
    hooks = len(next(iter(sites.values())).module._forward_hooks)
    with outputs_of(stack.model, sites) as given:
        assert given == {}
        for count in (1, 2):
            stack.model(**inputs)
            assert given.keys() == sites.keys()
            for key, output in given.items():
                assert output.shape == (*inputs["input_ids"].shape, sites[key].out_features)
                assert output is seen[key][-1] or torch.equal(output, seen[key][-1])
                assert len(seen[key]) >= count
    before = dict(given)
    stack.model(**inputs)
    assert all(given[key] is before[key] for key in given), "it looks no more"
    assert len(next(iter(sites.values())).module._forward_hooks) == hooks
    q, k = (next(key for key, site in sites.items() if site.role == f"attention.{r}") for r in "qk")
    assert not torch.equal(given[q][..., :8], given[k][..., :8])


@torch.no_grad()
def test_what_a_plugin_has_a_layer_do_for_rows_of_its_own_is_not_the_models() -> None:
    """Aligner's tokens go through the keys and values of each layer, after those of the text."""
    stack, sites = places_of("llama", Aligner(tokens=3))
    inputs = example_inputs(stack.model)
    with outputs_of(stack.model, sites) as given:
        stack.model(**inputs)
    assert {output.shape[:2] for output in given.values()} == {inputs["input_ids"].shape}


def test_outputs_that_nobody_sees_are_refused() -> None:
    _, sites = places_of("mixtral")
    experts = next(site for site in sites.values() if site.kind == "experts")
    with pytest.raises(ArchitectureError, match=r"me: another module uses the weight of .*experts") as caught:
        check_output(experts, owner="me")
    assert caught.value.hint == f"leave it out of targets: '!{experts.role}'"
    check_output(next(site for site in sites.values() if site.kind == "linear"), owner="me")


def test_a_rank_that_a_matrix_does_not_have() -> None:
    _, sites = places_of("llama")
    site = next(site for site in sites.values() if site.role == "mlp.down")
    site.check_rank(min(site.shape))
    with pytest.raises(PeftxError, match=r"places: rank 33 exceeds the 32x\d+ matrix .*down_proj") as caught:
        site.check_rank(min(site.shape) + 1)
    assert caught.value.hint == "rank at most 32, or leave it out of targets: '!mlp.down'"
