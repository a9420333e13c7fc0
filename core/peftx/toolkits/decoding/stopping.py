"""Stop strings that count in the new text alone, as OpenAI's and vLLM's do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 4
"""Tokens that one character may take: its bytes."""
CONTEXT = 8
"""Tokens before those, so that a decoder which joins words has what it joins to."""


class StopStrings(StoppingCriteria):
    """Ends a row whose new text holds one of the strings. One that begins in the prompt is not in it.

    Args:
        tokenizer: of the model. strings: any of them ends a row. start: columns of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        self._start = start
        self._tail = MOST_TOKENS * max(map(len, self._strings), default=0) + CONTEXT

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids [B, L] -> bool [B]."""
        new = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        found = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)
