"""Byte2Word: a word's vector is made of its bytes, by cross-attention, and stands in the place of token embeddings.

"Word-Level Representation From Bytes For Language Modeling" (arXiv:2211.12677). A text falls into words at white space
and punctuation; a word is its UTF-8 bytes b_1 .. b_n, of which the last L are read. With
E: [256 + special tokens, d_b] and byte positions P: [L, d_b], in each head, with one learned query for all words,

    x_i = E(b_i) + P(i)
    a   = softmax_i(q (W_k x_i) / sqrt(d_h))
    w   = LayerNorm(W_o [sum_i a_i W_v x_i; heads])           [d]; there is no table of tokens
    h_n = Transformer(w_1 .. w_n)                             over words, and n is the position
    p(piece | h)                                              sub-words are predicted, by the model's own head

In a decoder the pieces of a word come one by one, and each is predicted from the word as far as it is known: at token t
of word n the Transformer reads w_1 .. w_(n-1) and the vector of the bytes of word n up to t,

    h_t = Transformer(w_1 .. w_(n-1), w(b_1 .. b_t))          at positions 0 .. n - 1

which is h_n where the word is over. So tokens may cut a word as they like: it is its bytes that are read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from peftx import AttentionEdit, CallEdit, Claim, Delta, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, UnsupportedError
from peftx.kernel.parts import DeltaPart, VocabularyPart
from peftx.units import refuse_unread

LETTER, OTHER, SPACE, SPECIAL = range(4)
"""Kinds of symbols; an apostrophe is a letter, and so are all bytes beyond ASCII."""
KINDS = [
    SPACE if b in b" \t\n\r\v\f" else LETTER if b > 127 or chr(b).isalnum() or b == 39 else OTHER
    for b in range(256)
]
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
"""How tokenizers of bytes write them."""
FITS = "a causal language model with plain attention in every layer, heads that divide its width, a tokenizer of bytes"


class Byte2WordConfig(PluginConfig):
    """Options of Byte2Word."""

    width: int = Field(128, ge=1, description="d_b, width of a byte's embedding")
    heads: int = Field(8, ge=1, description="heads of the cross-attention; they divide the model's width")
    longest: int = Field(
        32, ge=1, description="L, bytes of a word that are read: the last ones of a longer word"
    )


def symbols_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of each id the bytes that it stands for. A special token is a symbol of its own, from 257 up, and 256 is for ids
    of no token."""
    added, special, known = tokenizer.get_added_vocab(), tokenizer.all_special_ids, tokenizer.get_vocab()
    found = [[256] for _ in range(max(known.values()) + 1)]
    for token, id in known.items():
        if id in special:
            found[id] = [257 + special.index(id)]
        else:
            found[id] = [*token.encode()] if token in added else [BYTES[char] for char in token]
    return found


class Words(CallEdit):
    """The words of a call, and their vectors.

    Args:
        model: which is called. symbols: of each id, as `symbols_of` gives them. count: of those from 256
            up. config: the options.
    """

    symbols: Tensor
    sizes: Tensor
    ends: Tensor

    def __init__(
        self, model: ModelView, symbols: list[list[int]], count: int, config: Byte2WordConfig
    ) -> None:
        super().__init__()
        self.call, self.owner, self.L = model.call, model.owner, config.longest
        d, d_b, H = model.hidden_size, config.width, config.heads
        rows = [*symbols, [256]]  # the last for ids of no token, and for -1, which is no text
        kinds, longest = KINDS + [SPECIAL] * count, max(map(len, rows))
        table = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.register_buffer("symbols", table, persistent=False)
        self.register_buffer("sizes", torch.tensor([*map(len, rows)]), persistent=False)
        ends = torch.tensor([[kinds[row[0]], kinds[row[-1]]] for row in rows])
        self.register_buffer("ends", ends, persistent=False)
        self.E, self.P = nn.Embedding(256 + count, d_b), nn.Embedding(self.L, d_b)
        self.q = nn.Parameter(torch.randn(H, d // H))
        self.K, self.V = (nn.Parameter(torch.randn(H, d_b, d // H) * d_b**-0.5) for _ in range(2))
        self.O, self.norm = nn.Linear(d, d, bias=False), nn.LayerNorm(d)
        self.norm.weight = nn.Parameter(model.embedded(256).std() * torch.ones(d))  # as large as tokens were

    def known(self) -> tuple[Tensor, Tensor]:
        """The caller's tokens so far, [B, R + T], -1 where there is none, and which of them begin a word."""
        ids, real = self.call.ids, self.call.real
        if ids is None or real is None:
            raise UnsupportedError(
                f"{self.owner}: words are made of tokens' bytes, and the call brings no tokens",
                hint="model(input_ids=...), and the whole model",
            )
        ids = ids.clamp(max=len(self.sizes) - 1).masked_fill(~real, -1)
        text = self.call.carry(self.owner, ids, fill=-1)
        first, last = self.ends[text].unbind(-1)
        before = F.pad(last[:, :-1], (1, 0), value=SPECIAL)
        begins = (first != before) & (before != SPACE) | (first == SPACE) | (first == SPECIAL)
        return text, begins | (before == SPECIAL)

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        text, begins = self.known()
        B, T = call["input_ids"].shape
        n = (begins & (text >= 0)).cumsum(1)[:, -T:] - 1
        mask = call.get("attention_mask")
        if mask is None:  # without one the model takes positions that stay for the beginning of another text
            mask = text.new_ones(B, self.call.past + T)
        return call | {"position_ids": n.clamp(min=0), "attention_mask": mask}

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """w of the symbols' x_i [..., L, d_b], of which so many are real [..., L] -> [..., d]."""
        s = torch.einsum("...lc,hcd,hd->...hl", x, self.K, self.q) * self.q.shape[1] ** -0.5
        a = s.masked_fill(~real[..., None, :], -torch.inf).softmax(-1)
        heads = torch.einsum("...hl,...lc,hcd->...hd", a, x, self.V)
        w: Tensor = self.norm(self.O(heads.flatten(-2)))
        return w

    def vectors(self, T: int) -> Tensor:
        """Of the words up to each of the last T tokens, [B, T, d]."""
        text, begins = self.known()
        sizes = self.sizes[text]  # [B, R + T]
        behind = sizes.flatten().cumsum(0).view_as(text)  # places in a row of all symbols of the batch
        all_ = self.symbols[text][torch.arange(self.symbols.shape[1], device=text.device) < sizes[..., None]]
        first = ((behind - sizes) * begins).flatten().cummax(0).values.view_as(text)  # of each token's word
        last, first = behind[:, -T:, None], first[:, -T:, None]
        at = torch.maximum(first, last - self.L) + torch.arange(self.L, device=text.device)  # [B, T, L]
        real, at = at < last, torch.minimum(at, last - 1)
        return self(self.E(all_[at]) + self.P((at - first).clamp(max=self.L - 1)), real)


class OfWords(nn.Module):
    """Something that asks for words."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.words = (words,)  # in a tuple: it is no child of this one


class ToTokens(OfWords, Delta):
    """The words' vectors in the place of the tokens' embeddings."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ids = self.words[0].call.ids
        if ids is None or (x is not ids and not torch.equal(x, ids.to(x.device))):
            return y  # somebody looks tokens up, which are no text
        return self.words[0].vectors(x.shape[1]).to(y)


class OverWords(OfWords, AttentionEdit):
    """A token sees the words that are over, and itself."""

    def probabilities(self, p: Tensor) -> Tensor:
        (words,) = self.words
        text, begins = words.known()
        over = F.pad(begins[:, 1:], (0, 1)).long()
        over = words.call.keys(over, p, fill=1)  # [B, K]; soft tokens are words
        number = torch.arange(text.shape[1], device=p.device).expand(len(text), -1)
        assert words.call.shape is not None
        own = words.call.rows(number[:, -words.call.shape[1] :], p[:, 0], fill=-1)  # [B, Q]
        seen = (over == 1)[:, None] | (words.call.keys(number, p, fill=-1)[:, None] == own[..., None])
        q = p.float() * seen[:, None]
        return (q / q.sum(-1, keepdim=True)).to(p.dtype)


class Byte2Word(Plugin):
    """See the module."""

    Config = Byte2WordConfig
    claims = {
        Claim.BESIDE_WEIGHTS,
        Claim.NEEDS_TOKENS,
        Claim.NEEDS_MASK,
        Claim.TELLS_TOKENS,
        Claim.WHOLE_CALLS,
    }
    architectures = ("gemma", "mistral", "gpt_neox")
    example = {"width": 6, "heads": 2, "longest": 4}
    refuses = {
        "t5": "it has two towers",
        "bert": "it is no decoder",
        "mamba": "it has no attention",
        "bloom": "it takes no positions of words",
        "vit": "it reads no tokens",
    }
    config: Byte2WordConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        kind, heads, sites = model.config.model_type, self.config.heads, model.attention_sites()
        named = [name for site in sites for name, _ in site.module.named_parameters()]
        tokenizer = stack.tokenizer
        for wrong, why in (
            (model.config.is_encoder_decoder or not model.module.can_generate(), f"{kind} is no decoder"),
            (len(sites) < model.num_layers, f"{kind} has layers without attention"),
            (any("sink" in name for name in named), f"{kind} has more than scores in its softmax"),
            (hasattr(model.config, "vocab_size_per_layer_input"), f"{kind} looks tokens up in every layer"),
            (model.hidden_size % heads, f"{heads} heads do not divide the width, {model.hidden_size}"),
            (not BYTES.keys() <= tokenizer.get_vocab().keys(), "the tokenizer has no token for each byte"),
        ):
            if wrong:
                raise ArchitectureError(f"{model.owner}: {why}", hint=FITS)
        symbols = symbols_of(tokenizer)
        words = Words(model, symbols, 1 + len(tokenizer.all_special_ids), self.config)
        model.around(words)
        model.embedding().attach(ToTokens(words))
        for site in sites:
            site.attend(OverWords(words))

    def check(self, stack: Stack) -> None:
        id, model = stack.id_of(self), stack.model
        place, head = stack.view(id).embedding(), model.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is place.module.weight
        refuse_unread(stack, id, [] if tied else [place.module], "words' vectors")
        for other, plugin in stack.plugins.items():
            if plugin is not self and isinstance(plugin, Byte2Word):
                said = f"'{id}' and '{other}' both put words' vectors in the place of embeddings"
                raise ConflictError(said, hint="keep one of them")
        parts = [part for part in stack.ledger.all(DeltaPart) if part.path == place.path]
        # A new token's row is in the head too.
        standing = [part.owner for part in parts if not stack.ledger.of(part.owner, VocabularyPart)]
        if id in standing and (before := standing[: standing.index(id)]):
            said = f"'{id}' puts words' vectors in the place of what '{before[0]}' makes of embeddings"
            raise ConflictError(said, hint=f"put '{id}' before '{before[0]}'")
