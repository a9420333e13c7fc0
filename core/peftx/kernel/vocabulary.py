"""New tokens: rows of their own beside the embedding's and the head's, which stay as they are.

E'(t) = R[i]  if t is the i-th new token, else E(t)          R: [n, d], trained and saved alone
logits'(h)    = [W h ; R_out h] by token id                   R_out is R where head and embedding are one matrix
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from peftx.kernel.slots import Delta, base_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NewRows(Delta):
    """Rows of the embedding for new tokens.

    Args:
        ids: of the tokens. width: d. scale: what the embedding multiplies its rows by.
    """

    def __init__(self, ids: Sequence[int], width: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.ids, self.scale = tuple(ids), scale
        self.R = nn.Parameter(torch.zeros(len(ids), width))
        self.register_buffer("row_of", _row_of(ids), persistent=False)

    def around(self, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = self.row_of[x.clamp(max=len(self.row_of) - 1)].masked_fill(x >= len(self.row_of), -1)
        y: Tensor = inner(x.masked_fill(row >= 0, 0), *args, **kwargs)
        new = nn.functional.embedding(row.clamp(min=0), self.R).to(y.dtype) * self.scale
        return torch.where((row >= 0)[..., None], new, y)


class NewLogits(Delta):
    """Logits of new tokens.

    Args:
        ids: of the tokens. known: tokens that the head has. rows: the embedding's new rows, where the two are one
            matrix; else the head has its own, of this width.
    """

    def __init__(
        self, ids: Sequence[int], known: int, *, rows: NewRows | None = None, width: int = 0
    ) -> None:
        super().__init__()
        self.inside = [index for index, id in enumerate(ids) if id < known]
        self.beyond = [index for index, id in enumerate(ids) if id >= known]
        self.ids = tuple(ids)
        self.rows = (rows,) if rows is not None else ()  # in a tuple: the embedding owns it
        if rows is None:
            self.R = nn.Parameter(torch.zeros(len(ids), width))

    @property
    def matrix(self) -> Tensor:
        return self.rows[0].R if self.rows else self.R

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        new = x @ self.matrix.to(x.dtype).t()  # [..., n]
        if self.inside:
            places = torch.tensor([self.ids[index] for index in self.inside], device=y.device)
            y = y.index_copy(-1, places, new[..., self.inside].to(y.dtype))
        return torch.cat((y, new[..., self.beyond].to(y.dtype)), -1) if self.beyond else y


def _row_of(ids: Sequence[int]) -> Tensor:
    """Token id -> its new row, or -1."""
    table = torch.full((max(ids) + 1,), -1, dtype=torch.int64)
    table[list(ids)] = torch.arange(len(ids))
    return table


def scale_of(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by (Gemma's does)."""
    scale = embedding._buffers.get("embed_scale")
    if scale is None or issubclass(nn.Embedding, base_class(embedding)):
        return 1.0
    return float(scale)


def without(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """A copy of a fast tokenizer that does not know these added tokens; another kind as it is."""
    if not tokenizer.is_fast:
        return tokenizer
    found = copy.deepcopy(tokenizer)
    state = json.loads(found.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in tokens]
    found._tokenizer = Tokenizer.from_str(json.dumps(state))
    return found


def widened(weight: Tensor, ids: Sequence[int], rows: Tensor) -> Tensor:
    """A matrix [V, d] with the new tokens' rows in their places: [max(V, ids + 1), d]."""
    size = max(len(weight), max(ids) + 1)
    whole = weight.new_zeros(size, weight.shape[1])
    whole[: len(weight)] = weight.detach()
    whole[list(ids)] = rows.detach().to(whole)
    return whole
