"""Word-pooled LM: bytes are pooled to words, the model runs over words, and words are written out byte by byte.

"Learn Your Tokens: Word-Pooled Tokenization for Language Modeling" (arXiv:2310.11628). A text is bytes and special
tokens, and falls into words at white space. Of word n with the units u_1 .. u_n', the last of which is the white space
(or the special token) that ends it,

    e_n = concat of the first k outputs of Encoder(c_1 .. c_k, u_1 .. u_n')      in the word alone, both ways
    h_n = LM(e_1 .. e_n)                                                         over words, causal
    p(u_j | h_n, u_<j) = softmax(A Decoder(h_n cut in k, u_1 .. u_(j-1)))        of word n + 1, causal

with the c learned, and Encoder and Decoder small Transformers of width d / k. The loss is the mean cross-entropy of
units. In training all words are encoded and decoded at once, and the LM reads as many vectors as there are words. A
word of more than m units is cut there.

Elsewhere, and beside plugins that look for a row of each token (heads, masks), the LM has a row for every unit, as a
cache must: those of units that end no word are hidden, and positions count words. It is the same computation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, hookimpl, units
from peftx.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACES = b" \t\n\r\v\f"


class WordPooledConfig(PluginConfig):
    """Options of the word-pooled LM."""

    vectors: int = Field(4, ge=1, description="k, vectors of a word, each as wide as encoder and decoder are")
    longest: int = Field(20, ge=1, description="m, most units of a word; a longer one is cut into several")
    layers: int = Field(2, ge=1, description="layers of the encoder, and of the decoder")
    heads: int = Field(4, ge=1, description="heads of their attention")


def in_bytes(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokens, of which a text gets those of single bytes alone, and the special ones."""
    found, state = deepcopy(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"] |= {"merges": [], "ignore_merges": False}
    found._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state | {"normalizer": None}))
    return found


class Pooling(units.Units):
    """The words' vectors in, units' logits out.

    Args:
        model: which is called. ids: of the units' tokens, bytes first. config: the options.
    """

    said: tuple[Tensor, Tensor, Tensor, bool] | None = None
    """Of a call: units so far [B, S], which of them end a word, which rows of the cache are units, and does the LM read
    vectors of words alone."""

    def __init__(self, model: ModelView, ids: Sequence[int], config: WordPooledConfig) -> None:
        super().__init__(model, ids)
        self.k, self.m = config.vectors, config.longest
        d = model.hidden_size // self.k
        self.E, self.P = nn.Embedding(len(ids), d), nn.Embedding(self.m, d)
        self.c, self.A = nn.Parameter(torch.randn(self.k, d)), nn.Linear(d, len(ids))
        self.encoder, self.decoder = (coder(d, config.heads, config.layers) for _ in range(2))
        size = model.embedded(256).std()  # e is as large as what tokens are
        self.encoder.norm.weight = nn.Parameter(size * torch.ones(d))

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        text, rows = self.read()
        ends, S, T = self.ends(text), text.shape[1], call["input_ids"].shape[1]
        n = ends.cumsum(1) - ends.long()  # words before each unit's own
        b, t = ends[:, S - T :].nonzero(as_tuple=True)
        self.said = text, ends, rows, (packed := self.packs(call, text))
        return self.with_words(call, self.encode(text, ends, b, t + S - T), ends, n, packed=packed)

    def ends(self, text: Tensor) -> Tensor:
        """Which units end a word, [B, S]. The first of a text does: BOS, in most."""
        real, place = text != units.PAD, torch.arange(text.shape[1], device=text.device)
        over = torch.isin(text, text.new_tensor([*SPACES])) | (text >= 256) | (real.cumsum(1) == 1)
        since = place - (place * (over & real)).cummax(1).values  # units of the word, were it not cut
        return real & (over | (since > 0) & (since % self.m == 0))

    def encode(self, text: Tensor, ends: Tensor, b: Tensor, t: Tensor) -> Tensor:
        """e of the words that end at these places, [W, d k]."""
        place = torch.arange(text.shape[1], device=text.device)
        begin = F.pad(((place + 1) * (ends | (text == units.PAD))).cummax(1).values, (1, 0))[b, t]
        at = begin[:, None] + torch.arange(self.m, device=text.device)
        read = self.E(text[b[:, None], torch.minimum(at, t[:, None])]) + self.P.weight
        hidden = F.pad(at > t[:, None], (self.k, 0))
        u = torch.cat((self.c.expand(len(b), -1, -1), read), 1)  # [W, k + m, d]
        e: Tensor = self.encoder(u, src_key_padding_mask=hidden)[:, : self.k].flatten(1)
        return e

    def logits(self, x: Tensor) -> Tensor:
        """By the last states x, [B, T, d k], or [B, N, d k] of words alone."""
        text, ends, rows, packed = self.said
        S, T = text.shape[1], text.shape[1] if packed else x.shape[1]
        h = x if packed else self.states(x, rows)
        place = torch.arange(S, device=x.device)
        e = (place * ends).cummax(1).values[:, S - T :]  # where the last word ended
        new = ends[:, S - T :].clone()
        new[:, 0] = True  # words that are written in this call, W of them
        b, begin = new.nonzero(as_tuple=True)[0], e[new]
        h = h[b, (ends.cumsum(1)[b, begin] - 1).clamp(min=0) if packed else begin]
        at = (begin[:, None] + torch.arange(1, self.m, device=x.device)).clamp(max=S - 1)
        known = self.E(text[b[:, None], at].clamp(min=0)) + self.P.weight[: self.m - 1]
        u = torch.cat((h.unflatten(1, (self.k, -1)).to(known), known), 1)  # [W, k + m - 1, d]
        causal = nn.Transformer.generate_square_subsequent_mask(u.shape[1], u.device, u.dtype)
        z = self.A(self.decoder(u, mask=causal, is_causal=True)[:, self.k - 1 :])  # [W, m, units]
        word, j = new.flatten().cumsum(0).view_as(e) - 1, (place[S - T :] - e).clamp(max=self.m - 1)
        found: Tensor = z[word, j]
        return found


def coder(d: int, heads: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(d), enable_nested_tensor=False)


class WordPooled(Plugin):
    """See the module."""

    Config = WordPooledConfig
    claims = {Claim.NEEDS_TOKENS, Claim.GIVES_EMBEDDINGS}
    architectures = ("gemma", "bloom", "gpt_neox")
    example = {"vectors": 2, "heads": 2, "layers": 1, "longest": 6}
    refuses = {
        "t5": "it has two towers",
        "bert": "it is no decoder",
        "mamba": "it has no attention",
        "vit": "it reads no tokens",
    }
    config: WordPooledConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        bytes_, special = units.alphabet(model, stack.tokenizer)
        k, heads, d = self.config.vectors, self.config.heads, model.hidden_size
        if d % (k * heads):
            said = f"{model.owner}: the model is {d} wide, which {k} vectors of {heads} heads do not divide"
            raise ArchitectureError(said, hint=f"vectors times heads that divide {d}")
        model.tokenizer(in_bytes)
        self.units = Pooling(model, [*bytes_, *special], self.config)
        units.put(model, self.units)

    def check(self, stack: Stack) -> None:
        units.settle(stack, stack.id_of(self), self.units)
