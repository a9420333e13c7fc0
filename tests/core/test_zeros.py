"""What is pruned takes no bytes in a bundle, and comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import peftx
from peftx import Stack
from peftx.engines.bundle.manifest import WITHOUT_ZEROS
from peftx.engines.bundle.sparse import with_zeros, without_zeros
from peftx.errors import BundleError
from peftx.testing import tiny
from peftx_lora import Lora


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_it_comes_back_bit_for_bit(shape: list[int], share: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    tensor = torch.where(torch.rand(shape, generator=generator) < share, 0.0, tensor).to(dtype)
    if tensor.numel() > 2:
        tensor.view(-1)[0], tensor.view(-1)[1] = -0.0, torch.nan
    pair = without_zeros(tensor)
    if pair is None:
        return
    assert sum(part.nbytes for part in pair) < tensor.nbytes
    again = with_zeros(*pair, list(tensor.shape))
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    one, two = (x.reshape(-1).view(torch.uint8).tolist() for x in (again, tensor))
    assert one == two


def pruned(share: float) -> Stack:
    stack = Stack(tiny("llama"), [Lora(rank=4)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(generator=generator)
            parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return stack


def test_a_bundle_holds_what_is_left(tmp_path: Path) -> None:
    sizes = {}
    for share in (0.0, 0.4, 0.9):
        stack = pruned(share)
        folder = stack.save(tmp_path / f"{share}")
        tensors = load_file(folder / "lora.safetensors")
        sizes[share] = sum(tensor.nbytes for tensor in tensors.values())
        found = peftx.load(folder, model=tiny("llama")).ledger.tensors("lora")
        assert all(torch.equal(tensor, found[name]) for name, tensor in stack.ledger.tensors("lora").items())
        assert (json.loads((folder / "manifest.json").read_text())["format"] == WITHOUT_ZEROS) is (
            share == 0.0
        )
    assert sizes[0.4] / sizes[0.0] == pytest.approx(0.6 + 1 / 32, abs=0.02)  # float32, and a bit each
    assert sizes[0.9] / sizes[0.0] == pytest.approx(0.1 + 1 / 32, abs=0.02)


def test_halves_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    from peftx.engines.bundle.manifest import own_digest
    from peftx.engines.files import sha256

    folder = pruned(0.9).save(tmp_path / "bundle")
    file = folder / "lora.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("//to"))
    save_file(tensors | {name: tensors[name][1:].clone()}, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["lora.safetensors"] = sha256(file)
    manifest["own"] = own_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleError, match=f"(?s){name.removesuffix('//to')}.*values for .* places.*save it anew"
    ):
        peftx.load(folder, model=tiny("llama"))
