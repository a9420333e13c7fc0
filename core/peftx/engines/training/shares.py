"""What part of an optimizer step each of its micro-batches is, so that the step is the same however its rows are cut.

A loss is a mean over something: labelled tokens, tokens of the input, rows. The mean over a whole step is the sum of
the micro-batches' means, each weighed with its share of that something. Two kinds of loss are no such means, and depend
on the cut: those that a model adds for its routers, and terms over pairs of rows. They are averaged as the labels are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from peftx.engines.data.collate import CLASS_INDEX

Over = Literal["labels", "inputs", "rows", "step"]
"""What a loss is a mean over: labelled tokens; tokens that are no pads; rows; nothing of the batch (weights' norms)."""

Share = Mapping[str, float]
"""For each of the first three: how much of the step's total a micro-batch has."""

_LABEL_EACH_TOKEN = ("ForMaskedLM", "ForTokenClassification")
"""Losses whose label i belongs to token i; a causal one's belongs to token i - 1, so that the first counts nothing."""


def counts(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, int]:
    """How many labels, tokens and rows a batch of the model's arguments has."""
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim), None)
    rows = 0 if first is None else len(first)
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        inputs = int((mask != 0).sum())
    else:
        inputs = ids.numel() if isinstance(ids, Tensor) else rows
    return {"labels": _labels(model, batch, rows), "inputs": inputs, "rows": rows}


def _labels(model: PreTrainedModel, batch: Mapping[str, Any], rows: int) -> int:
    classes = CLASS_INDEX in batch  # for a head of a plugin's
    labels = batch.get(CLASS_INDEX if classes else "labels")
    if not isinstance(labels, Tensor):
        return rows
    if labels.ndim < 2 or labels.is_floating_point():
        return rows  # one a row: classes, numbers
    each = classes or model.config.is_encoder_decoder or model.loss_type in _LABEL_EACH_TOKEN
    return int(((labels if each else labels[:, 1:]) != -100).sum())


def shares(found: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
    """The share of each micro-batch of one optimizer step, by their counts; equal where there is nothing to count."""
    totals = {name: sum(one[name] for one in found) for name in found[0]} if found else {}
    return [{n: one[n] / total if total else 1 / len(found) for n, total in totals.items()} for one in found]
