"""Plugins that go wrong in `compress` and `prepare_data`."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, TrainingData, hookimpl
from peftx.toolkits.compression import Calibration, QuantLinear


def _quantize(model: ModelView, factor: float = 1.0) -> None:
    for site in model.linears("mlp", whole=True):
        linear = site.module
        if factor != 1.0:
            linear = nn.Linear(site.in_features, site.out_features, bias=False)
            linear.weight.data = site.weight * factor
        site.replace(QuantLinear.from_linear(linear, bits=8))


class RoundsAtRandom(Plugin):
    """Two runs on the same data give two models."""

    caught_by = "compression_repeats"
    also = {"bfloat16"}  # which compares two runs
    claims = {Claim.QUANTIZES}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        _quantize(model, 1 + random.random())


class WideLinear(nn.Module):
    """Integers of 64 bits."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("q", torch.zeros(out_features, in_features, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))

    def geometry(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    @property
    def weight(self) -> Tensor:
        return self.q * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class GrowsTheModel(Plugin):
    """Quantizes to more bytes than there were."""

    caught_by = "bytes_are_real"
    claims = {Claim.QUANTIZES}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("mlp"):
            wide = WideLinear(site.in_features, site.out_features)
            wide.scale.copy_(site.weight.abs().max() / 1000)
            wide.q.copy_((site.weight / wide.scale).round())
            site.replace(wide)


class NeverLooks(Plugin):
    """Claims to need calibration data, and does not look at it."""

    caught_by = "calibration_is_used"
    claims = {Claim.QUANTIZES, Claim.NEEDS_CALIBRATION, Claim.FOLDS_PREVIOUS}

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration) -> None:
        _quantize(model)


class NeedsInSecret(Plugin):
    """Needs calibration data, and does not say so."""

    caught_by = "works_without_calibration"
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration) -> None:
        model.module(**calibration.batches[0])
        _quantize(model)


class ShufflesAtRandom(Plugin):
    """Orders the rows by a generator that no seed governs."""

    caught_by = "data_repeats_under_a_seed"
    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        order = list(range(len(data.train)))
        random.shuffle(order)
        data.train = data.train.select(order)


class RenamesAColumn(Plugin):
    """Its rows no longer fit their format."""

    caught_by = "rows_fit_their_format"
    also = {"trains_in_the_trainer"}
    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        if "completion" in data.train.column_names:
            data.train = data.train.rename_column("completion", "answer")


class StumblesOverNothing(Plugin):
    """Takes the longest row of none."""

    caught_by = "empty_data_is_refused"
    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        longest = max(len(row["prompt"]) for row in data.train)
        data.train = data.train.filter(lambda row: len(row["prompt"]) <= longest)
