"""Tensors out of a file: the same as the library reads, where torch would have put them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftx.engines.tensor_files import CACHE_LINE, read_tensors


def tensors_of_all_kinds() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{dtype}".removeprefix("torch."): torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        )
    }  # fmt: skip
    return found | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}


@pytest.mark.parametrize(
    "more", [{}, {"eight_bits": torch.ones(4).to(torch.float8_e4m3fn)}], ids=["known", "other"]
)
def test_tensors_are_read_as_the_library_reads_them(tmp_path: Path, more: dict[str, Tensor]) -> None:
    written = tensors_of_all_kinds() | more
    save_file(written, tmp_path / "x.safetensors")
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].double(), tensor.double())


def test_tensors_of_one_file_change_alone(tmp_path: Path) -> None:
    """They lie in one block of memory; autograd counts changes in place of each by itself."""
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "x.safetensors")
    read = read_tensors(tmp_path / "x.safetensors")
    read["a"].add_(1)
    assert read["b"].tolist() == [1, 1, 1]
    assert (read["a"]._version, read["b"]._version) == (1, 0)
    save_file(read, tmp_path / "again.safetensors")  # which refuses tensors that share memory


def test_tensors_start_at_a_cache_line(tmp_path: Path) -> None:
    """Their products would round otherwise than those of the tensors that were saved."""
    save_file({f"{i}": torch.ones(16 * (i + 1)) for i in range(5)}, tmp_path / "x.safetensors")
    assert not any(x.data_ptr() % CACHE_LINE for x in read_tensors(tmp_path / "x.safetensors").values())
