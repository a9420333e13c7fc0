"""Rows in which several answers stand behind one prompt, each as if it were alone with it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftx.engines.data import opening_of
from peftx.errors import ArchitectureError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.engines.data import TrainingData, Where
    from peftx.engines.data.pairs import Turns
    from peftx.kernel.view import ModelView


def check_layout(model: ModelView, *, each_layer: bool = False) -> None:
    """Raises ArchitectureError unless the model is a decoder that takes positions and masks of a plugin's own.

    Args:
        each_layer: must each layer have an attention that plugins can enter.
    """
    name, attention = type(model.module).__name__, str(model.config._attn_implementation)
    positions = "position_ids" in inspect.signature(model.module.forward).parameters
    takes = positions and attention.endswith(("eager", "sdpa"))
    decoder = list(model.towers) == ["decoder"] and (not each_layer or all(model.main.attention or [""]))
    if not decoder or not takes:
        raise ArchitectureError(
            f"{model.owner}: {name} (attention '{attention}') is no decoder that takes positions and a mask"
            + (", in each layer" if each_layer else ""),
            hint="Llama, Mistral, Qwen or GPT-2 with attn_implementation='sdpa' is one",
        )


def prompt_beside(
    data: TrainingData, prompt: str | Turns, answers: Sequence[int], where: Where, *, more: int = 0
) -> list[int]:
    """Token ids of a prompt, cut once at their left behind BOS, so that all its answers fit into its row.

    Args:
        answers: tokens of each. where: names the row. more: further tokens of the row.

    Raises:
        DataError: there is no token that an answer could follow, or no room for one.
    """
    frame, ids = opening_of(data.tokenizer, prompt)
    if not frame + ids:
        raise DataError(f"{where} has no prompt, and the tokenizer no BOS that an answer could follow")
    room = data.max_length - sum(answers) - more
    if room < len(frame) + 1:
        raise DataError(
            f"{where}: the answers have {' and '.join(map(str, answers))} tokens with EOS, which leaves no room for "
            f"the prompt in max_length {data.max_length}",
            hint="a row holds a prompt and all of its answers: raise max_length, or leave out long answers",
        )
    return frame + ids[max(0, len(frame) + len(ids) - room) :]


def check_alike(model: PreTrainedModel, shared: Tensor, apart: Tensor, *, tokens: int) -> None:
    """Raises ArchitectureError unless answers have the same log-probabilities in a shared row as in rows of their own,
    up to rounding: they have not where tokens are mixed otherwise than by the mask.

    Args:
        shared, apart: of the answers' tokens, float32. tokens: of the row, for the message.
    """
    wrong = float((shared - apart).abs().max())
    if not wrong <= (1e-3 if model.dtype == torch.float32 else 1.0):
        raise ArchitectureError(
            f"{type(model).__name__} does not keep to the mask: a token of the longest row, of {tokens}, has another "
            f"log-probability than in a row of its own, by {wrong:.3g}",
            hint="sliding windows that are shorter than the row, ALiBi and recurrent layers do that",
        )
