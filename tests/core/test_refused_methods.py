"""What methods that prune, sparsify and route cannot do is refused when the stack is built, and nothing is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from peftx import Plugin, Stack
from peftx.errors import PeftxError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_apt import Apt
from peftx_atp import Atp
from peftx_dsee import Dsee
from peftx_esft import Esft
from peftx_factorllm import FactorLlm
from peftx_gmt import Gmt
from peftx_lemo import Lemo
from peftx_longrope import LongRope
from peftx_lt_sft import LtSft
from peftx_pat_pruning import PatPruning
from peftx_pesc import Pesc
from peftx_sift import Sift
from peftx_sira import Sira
from peftx_sparse_adapter import SparseAdapter
from peftx_spp import Spp
from peftx_structured_ffn import StructuredFfn
from peftx_surgical_fim import SurgicalFim

LITTLE: list[tuple[list[Plugin], str]] = [
    ([Sift(density=1e-9)], "sift: density 1e-09 leaves"),
    ([Gmt(keep=1e-9)], "gmt: keep 1e-09 leaves"),
    ([Spp(rank=4, sparsity=0.9999999)], "spp: sparsity 0.9999999 leaves"),
    ([Dsee(rank=2, sparsity=0.9999999)], "dsee: sparsity 0.9999999 leaves"),
    ([LtSft(density=1e-9)], "lt-sft: density 1e-09"),
]
"""So low a share that nothing is left."""

HEADS: list[tuple[list[Plugin], str]] = [
    ([Apt(density=0.01)], "apt: density 0.01 is less than one head"),
    ([Atp(density=0.001)], "atp: density 0.001 leaves no dimension of a head"),
    ([PatPruning(width=0.01)], "pat-pruning: width 0.01 of 32 channels leaves none"),
    ([Dsee(rank=2, masks="structured", heads=0.01)], "dsee: heads 0.01 of the .* is less than one"),
]
"""A prune below one head or channel."""

SHAPES: list[tuple[list[Plugin], str]] = [
    ([StructuredFfn(form="block-dense", blocks=7)], "structured-ffn: .*7"),
    ([FactorLlm(experts=7)], "factorllm: 7 experts do not divide"),
    ([FactorLlm(experts=96)], "factorllm: 96 experts"),
    ([Pesc(experts=33)], "pesc: 33 experts"),
    ([Sira(experts=33)], "sira: 33 experts"),
    ([Esft()], "esft: llama.* has no experts"),
    ([SurgicalFim(layers=99)], "surgical-fim: layers is 99"),
    ([Lemo(layers=[99])], "lemo: layers"),
    ([LongRope(original=12, population=6, parents=7)], "longrope: 7 parents of a population of 6"),
]
"""Blocks that do not divide, more experts than there are units, no experts, layers that are not there."""


def anatomy(model: PreTrainedModel) -> dict[str, Any]:
    """All that could be touched: classes, numbers and whether they train, hooks, attributes of the model itself."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found[name] = (type(module), sorted(vars(module)), [len(h) for h in hooks], module.training)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} (tensor)"] = (id(t), t.requires_grad, t.detach().clone())
    return found


@pytest.mark.parametrize(
    ("plugins", "said"), LITTLE + HEADS + SHAPES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_it_is_refused_and_nothing_is_touched(plugins: list[Plugin], said: str) -> None:
    model = tiny("llama")
    before = anatomy(model)
    with pytest.raises(PeftxError, match=said):
        Stack(model, plugins, tokenizer=tiny_tokenizer())
    after = anatomy(model)
    assert before.keys() == after.keys()
    for name, one in before.items():
        for a, b in zip(one, after[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Sift, {"density": 0}), (Gmt, {"keep": 0}), (Apt, {"density": 0}), (Atp, {"density": 0}),
        (PatPruning, {"width": 0}), (LtSft, {"density": 0}), (Spp, {"sparsity": 1}), (Dsee, {"sparsity": 1}),
        (SparseAdapter, {"sparsity": 1}), (Lemo, {"keep": 0}),
        (FactorLlm, {"experts": 4, "top_k": 5}), (Pesc, {"experts": 4, "top_k": 5}), (Sira, {"experts": 4, "top_k": 5}),
    ],
)  # fmt: skip
def test_density_0_and_k_above_the_experts_are_no_options(
    kind: type[Plugin], options: dict[str, Any]
) -> None:
    with pytest.raises(PeftxError, match=next(reversed(options))):
        kind(**options)
