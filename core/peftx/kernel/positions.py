"""Positions that soft tokens take among those of a text, and what they leave."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from peftx.errors import OptionError
from peftx.kernel.virtual_tokens import prompt_of


def free_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read behind its soft tokens; None where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    _, prompt = prompt_of(model)
    shift = prompt.shift if prompt is not None else 0
    return int(limit) - first_position(model) - prompt_length(model) - shift


def first_position(model: PreTrainedModel) -> int:
    """Of a text's first token: RoBERTa's table keeps a row for pads, and counts from behind it."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def check_room(model: PreTrainedModel, length: int, *, owner: str) -> None:
    """Raises PeftxError where `length` more rows leave the text no position."""
    room = free_positions(model)
    if room is not None and length >= room:
        raise OptionError(
            f"{owner}: {length} soft tokens leave no room in the {room} positions that the model has for them "
            f"and the text",
            hint="fewer soft tokens, or a model with a longer context",
        )


def place_of(model: PreTrainedModel, mask: Tensor | None) -> int | Tensor:
    """The column of the caller's tokens from which soft tokens stand, [B] where rows have pads in front.

    Args:
        mask: [B, T], 0 for pads.
    """
    host, prompt = prompt_of(model)
    return host._peftx_place(prompt.tokens, mask) if prompt is not None and prompt.tokens else 0  # type: ignore[operator]


def prompt_length(model: PreTrainedModel) -> int:
    """Rows that stand in front of the caller's first token now."""
    _, prompt = prompt_of(model)
    return sum(t.length for t in prompt.tokens) if prompt is not None else 0
