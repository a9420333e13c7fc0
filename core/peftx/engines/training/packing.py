"""Whether texts may stand in one row: of the plugins by what they claim, of the model by trying it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.compute as compute
import torch
from datasets import Dataset

from peftx.engines.data import Collator, TrainingData
from peftx.engines.data.packing import Packing
from peftx.errors import ArchitectureError, ConflictError, UnsupportedError
from peftx.kernel.calls import columns_of
from peftx.kernel.modes import eval_mode
from peftx.kernel.objective import objective_of
from peftx.kernel.plugin import Claim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.kernel.members import Member
    from peftx.kernel.stack import Stack

_BY_TOKEN = {Claim.MERGEABLE, Claim.TRAINS_BASE, Claim.DATA_ONLY}
_BY_ROW = {Claim.OWN_LAYOUT, Claim.NEEDS_MASK, Claim.CLASSIFIES, Claim.GIVES_EMBEDDINGS, Claim.NEEDS_TOKENS}
_CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative to the largest logit."""


def check_member(member: Member) -> None:
    """Raises ConflictError where a plugin may act across the tokens of a row."""
    claims = set(member.plugin.claims)
    across = member.implements("inject") and not claims & _BY_TOKEN
    if across or claims & _BY_ROW:
        raise ConflictError(
            f"'{member.id}' may look across the tokens of a row, and packing puts several texts in one",
            hint="leave packing out, or take a plugin whose effect folds into weights, as lora's",
        )


def packing_of(stack: Stack, data: TrainingData, collator: Collator) -> Packing:
    """What packs the rows.

    Raises:
        ArchitectureError: no decoder that takes a mask and positions of ours.
        UnsupportedError: rows that a plugin laid out itself, or with columns of its own. ConflictError: as above.
    """
    model = stack.model
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or objective_of(model) != "next-token" or not takes:
        raise ArchitectureError(
            f"packing: {type(model).__name__} is no decoder that takes positions and a mask",
            hint="leave it out",
        )
    for member in stack.members:
        check_member(member)
    if data.format == "tokenized" or columns_of(model):
        raise UnsupportedError("packing: a plugin lays out the rows itself", hint="leave packing out")
    return Packing(collator, data.max_length, model.dtype)


def prove(stack: Stack, packing: Packing, rows: Dataset) -> None:
    """Raises ArchitectureError unless texts in one row have the logits that they have alone: states of recurrent layers
    mix them, and the mask of a packed row knows no window, which only a text that is longer shows."""
    half = max(1, packing.capacity // 2)
    names = ["input_ids", "labels"]
    first = [{name: row[name][:half] for name in names} for row in rows.select(range(min(2, len(rows))))]
    lengths = compute.list_value_length(rows.with_format("arrow")["input_ids"])
    longest = rows[compute.index(lengths, compute.max(lengths)).as_py()]
    for texts in (first, [{name: longest[name] for name in names}]):
        _compare(stack, packing, texts)


def _compare(stack: Stack, packing: Packing, texts: Sequence[Mapping[str, Any]]) -> None:
    model: PreTrainedModel = stack.model
    with torch.no_grad(), eval_mode(model):
        batch = {name: x.to(model.device) for name, x in packing(texts).items() if name != "labels"}
        found = model(**batch, use_cache=False).logits.float()
        for text in texts:
            ids = torch.tensor(text["input_ids"], device=model.device)
            alone = model(input_ids=ids[None], use_cache=False).logits[0].float()
            row, start = _place(batch["input_ids"], ids)
            difference = (found[row, start : start + len(ids)] - alone).abs().max() / alone.abs().max()
            if float(difference) > _CLOSE.get(model.dtype, 1e-1):
                raise ArchitectureError(
                    f"packing: {type(model).__name__} mixes the texts of one row, or looks less far back than they "
                    f"reach (logits differ by {difference:.2g} of the largest)",
                    hint="leave packing out, or take a max_length within the model's window",
                )


def _place(rows: torch.Tensor, ids: torch.Tensor) -> tuple[int, int]:
    """Row and column where these tokens stand."""
    windows = rows.unfold(1, len(ids), 1)  # [R, T - n + 1, n]
    row, start = (windows == ids).all(-1).nonzero()[0].tolist()
    return row, start
