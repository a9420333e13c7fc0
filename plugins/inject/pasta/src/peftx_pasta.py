"""PASTA: one trained vector for each special token and layer.

"Parameter-efficient Tuning with Special Token Adaptation" (arXiv:2210.04382). Heads attend strongly to [CLS] and [SEP],
so what is added to these steers all tokens. On the way into layer l, before its self-attention,

    h_i <- h_i + e(l, s)     where token i is the s-th special token of its text, s = 1 .. m
    h_i <- h_i               elsewhere

e: [m, d] for each layer, L m d numbers in all; dropout acts on what is added. Nothing else trains but the head of a
classifier. In a decoder the special tokens are BOS and EOS, and counting goes on while it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters, digits
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import ArchitectureError, OptionError, UnsupportedError, nearest
from peftx.kernel.call import Call


class PastaConfig(PluginConfig):
    """Options of PASTA."""

    count: int = Field(
        3,
        ge=1,
        description="m, special tokens of a text that get vectors (paper: 2 for one sentence, 3 for a pair)",
    )
    tokens: tuple[str, ...] = Field(
        (),
        description="the special tokens; the tokenizer's [CLS] and [SEP] if left out, or else its BOS and EOS",
    )
    init_std: float = Field(
        0.02, ge=0, description="standard deviation of the first vectors; with 0 the model starts unchanged"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="probability of zeroing a number of what is added while training"
    )


class Special(Delta):
    """The vectors of one layer.

    Args:
        call: what the model is called on. owner: the plugin's id. ids: of the special tokens. e: first vectors, [m, d].
        dropout: p.
    """

    def __init__(self, call: Call, owner: str, ids: list[int], e: Tensor, dropout: float) -> None:
        super().__init__()
        self.e = nn.Parameter(e)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.call, self.owner, self.dropout = call, owner, dropout

    def around(self, inner: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        s = self.places()
        if s is None:
            return inner(hidden_states, *args, **kwargs)
        e = F.pad(self.e, (0, 0, 1, 0))  # e(l, 0) = 0
        added = F.dropout(e[self.call.rows(s, hidden_states)], self.dropout, self.training)
        return inner(hidden_states + added, *args, **kwargs)

    def places(self) -> Tensor | None:
        """s of every token of the call, [B, T], 0 where it is none of the m; None where there are no tokens."""
        ids, real = self.call.ids, self.call.real
        if real is None:
            return None
        if ids is None:
            raise UnsupportedError(
                f"{self.owner}: special tokens are told by their ids, and the call brings embeddings",
                hint="model(input_ids=...)",
            )
        special = torch.isin(ids, self.ids) & real
        s = self.call.carry(self.owner, special.long()).cumsum(1)[:, -ids.shape[1] :]
        return s * (special & (s <= len(self.e)))


class Pasta(Plugin):
    """See the module."""

    Config = PastaConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.NEEDS_TOKENS}
    architectures = ("roberta", "gemma", "bart")
    example = {"tokens": (*ascii_letters, *digits), "count": 2}  # of which any row has some
    refuses = {
        "mamba": "it keeps states, and no rows by which special tokens are counted",
        "vit": "it reads no tokens",
    }
    config: PastaConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        tower, kind = model.towers.get("encoder", model.main), model.config.model_type
        if model.module.main_input_name != "input_ids" or not any(tower.attention):
            raise ArchitectureError(
                f"pasta: {kind} reads no tokens, or keeps states and no rows to count them by",
                hint="a text model with attention",
            )
        ids, shape = self._ids(stack.tokenizer), (self.config.count, tower.hidden_size)
        for site in model.blocks("layer", tower=tower.name):
            e = torch.empty(shape).normal_(std=self.config.init_std)
            site.attach(Special(model.call, model.owner, ids, e, self.config.dropout))

    def _ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        known, tokens = tokenizer.get_vocab(), self.config.tokens
        if strange := [token for token in tokens if token not in known]:
            hint = nearest(strange[0], known) or None
            raise OptionError(f"pasta: the tokenizer has no token {strange[0]!r}", hint=hint)
        ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
        if ends == [None, None]:
            ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        found = [known[token] for token in tokens] or [id for id in ends if id is not None]
        if not found:
            raise OptionError("pasta: the tokenizer names no special tokens", hint="tokens: ['<s>', '</s>']")
        return found
