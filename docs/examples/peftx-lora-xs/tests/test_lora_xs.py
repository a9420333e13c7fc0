from __future__ import annotations

import torch

from peftx import Stack
from peftx.testing import conformance
from peftx_lora_xs import LoraXs, LoraXsDelta

test_conformance = conformance("lora-xs")


def test_r_squared_numbers_train_in_each_layer() -> None:
    stack = Stack("peftx:tiny", [LoraXs(rank=4, targets="attention.q,v")])
    layers = len(stack.model.model.layers)
    assert stack.trainable_parameters() == layers * 2 * 4 * 4


def test_the_frozen_factors_are_the_best_rank_r_of_the_weight() -> None:
    weight = torch.diag(torch.tensor([5.0, 3.0, 1.0]))
    delta = LoraXsDelta((3, 3), rank=2)
    delta.start(weight, std=0.0)
    torch.testing.assert_close(delta.A @ delta.B, torch.diag(torch.tensor([5.0, 3.0, 0.0])))


def test_r_stands_between_them() -> None:
    delta = LoraXsDelta((3, 5), rank=2)
    delta.start(torch.randn(3, 5), std=1.0)
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    torch.testing.assert_close(delta(x, y), y + x @ (delta.A @ delta.R @ delta.B).T)
    x, y = torch.eye(5), torch.zeros(5, 3)
    folded, _ = delta.fold(torch.zeros(3, 5), None)
    torch.testing.assert_close(delta(x, y).T, folded)


def test_r_starts_at_random_of_the_given_size() -> None:
    delta = LoraXsDelta((64, 64), rank=64)
    delta.start(torch.eye(64), std=0.5)
    assert abs(delta.R.std().item() - 0.5) < 0.05
