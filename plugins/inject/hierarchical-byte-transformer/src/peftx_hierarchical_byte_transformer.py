"""Hierarchical autoregressive Transformer: bytes inside of words, words between them, and no vocabulary.

"Hierarchical Autoregressive Transformers: Combining Byte- and Word-Level Processing for Robust, Adaptable Language
Models" (arXiv:2501.10322). A fixed rule splits a text into words, each of which begins with a symbol [W]:

    e_i = W_e Encoder([W], b_1 .. b_n) at [W]                 of word i, both ways in the word
    o_i = LM(e_1 .. e_i)                                      the backbone, causal over words
    p(b_j | ..), p([W] | ..) = softmax(A Decoder(W_d o_(i-1), b_1 .. b_(j-1)))   of word i, causal in the word

so [W] says both that a word is over and that the next begins. A text begins with a learned vector, and a special token
is a word by itself. Encoder and Decoder are small Llamas. A text's words lie in one row, under masks that let none see
another; of their rotary positions only differences count. The loss is the cross-entropy of all bytes and [W].

The stack's tokenizer writes a text as [W] and bytes. In training the backbone reads as many vectors as there are words;
elsewhere, and beside plugins that look for a row of each token (heads, masks), it has a row for every byte, as a cache
must, and rows of bytes are hidden. It is the same computation.
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
from transformers import LlamaConfig, LlamaModel

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, hookimpl, units
from peftx.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD = "\N{LOWER ONE EIGHTH BLOCK}"
"""How tokenizers write [W]. In a text the same character is three bytes."""
RULE = "|".join(
    (
        r"\r\n|[\r\n]",  # each line break
        r" ?[\p{Han}\p{Hiragana}\p{Katakana}]\p{P}?",  # each character of these
        r" ?(?:\p{Lu}?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?:['’][\p{L}\p{M}]+)?|\p{Lu}+(?!\p{Ll})|\p{Lu}|\p{N}+)\p{P}?",
        r" ?[^\s\p{L}\p{N}\p{M}]",  # punctuation that follows no word
        r" (?=\S)|[^\S\r\n]+",  # what is left of white space
    )
)
"""Words: one blank in front belongs to a word, and one mark behind it; a capital in it begins another one."""


class HierarchicalConfig(PluginConfig):
    """Options of the hierarchical Transformer."""

    width: int = Field(128, ge=2, description="width of encoder and decoder")
    layers: int = Field(6, ge=1, description="layers of each")
    heads: int = Field(4, ge=1, description="heads of each; they divide the width into even numbers")


def in_words(tokenizer: PreTrainedTokenizerBase, id: int) -> PreTrainedTokenizerBase:
    """One that writes a text as words: the token `id`, and tokens of single bytes."""
    found, state = deepcopy(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())
    known = {token: other for token, other in state["model"]["vocab"].items() if other != id}
    known |= {token["content"]: token["id"] for token in state["added_tokens"]}  # else they are numbered anew
    state["model"] |= {"vocab": known | {WORD: id}, "merges": []}
    state["normalizer"] = None
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": RULE}, "behavior": "Isolated", "invert": False}
    mark = {"type": "Metaspace", "replacement": WORD, "prepend_scheme": "always", "split": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_, mark]}
    unmark = {"type": "Replace", "pattern": {"String": WORD}, "content": ""}
    state["decoder"] = {"type": "Sequence", "decoders": [unmark, bytes_]}
    found._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    return found


class Hierarchy(units.Units):
    """Vectors of words in, logits of bytes and [W] out.

    Args:
        model: which is called. ids: of the units' tokens: bytes, [W], special ones. config: the options.
    """

    said: tuple[Tensor, Tensor, Tensor, int, bool] | None = None
    """Of a call: units [B, S'] from the first word on that it needs, where words begin, which rows of the cache are
    units, how many of these stand before the S', and does the backbone read vectors of words alone."""

    def __init__(self, model: ModelView, ids: Sequence[int], config: HierarchicalConfig) -> None:
        super().__init__(model, ids)
        c, d = config.width, model.hidden_size
        llama = LlamaConfig(
            vocab_size=len(ids), hidden_size=c, intermediate_size=4 * c, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        self.encoder, self.decoder = LlamaModel(llama), LlamaModel(llama)
        self.W_d, self.A = nn.Linear(d, c, bias=False), nn.Linear(c, len(ids), bias=False)
        size = model.embedded(256).std()  # e is as large as what tokens are
        self.W_e = nn.Parameter(torch.randn(d, c) * size * c**-0.5)
        self.start = nn.Parameter(torch.randn(d) * size)

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        text, rows = self.read()
        S, T = text.shape[1], call["input_ids"].shape[1]
        begins = (text >= 256) | ((text != units.PAD).cumsum(1) == 1) & (text != units.PAD)
        n = begins.cumsum(1) - 1
        place = torch.arange(S, device=text.device)
        before = F.pad((place * begins).cummax(1).values[:, :-1], (1, 0))  # where the word before begins
        cut = int(before[:, S - T].min())
        packed = self.packs(call, text)
        self.said = text[:, cut:], begins[:, cut:], rows, cut, packed
        b, t = begins[:, S - T :].nonzero(as_tuple=True)
        states = self.encoder(text[:, cut:].clamp(min=0), attention_mask=self.words()).last_hidden_state
        e = states[b, before[b, t + S - T] - cut] @ self.W_e.T
        first = (n[b, t + S - T] == 0)[:, None]
        return self.with_words(call, torch.where(first, self.start, e), begins, n, packed=packed)

    def words(self) -> Tensor:
        """Which units are of one word, [B, 1, S', S']; pads are of one."""
        text, begins, *_ = self.said
        word = begins.cumsum(1).masked_fill(text == units.PAD, -1)
        return (word[:, :, None] == word[:, None])[:, None]

    def logits(self, x: Tensor) -> Tensor:
        """By the backbone's states x, [B, T, d], or [B, N, d] of words alone."""
        text, begins, rows, cut, packed = self.said
        if packed:
            T, o = text.shape[1], x[torch.arange(len(x))[:, None], (begins.cumsum(1) - 1).clamp(min=0)]
        else:
            T, o = x.shape[1], self.states(x, rows)[:, cut:]
        u = torch.where(begins[..., None], self.W_d(o), self.decoder.embed_tokens(text.clamp(min=0)))
        z = self.decoder(inputs_embeds=u, attention_mask=self.words().tril()).last_hidden_state
        found: Tensor = self.A(z[:, -T:])
        return found


class HierarchicalByteTransformer(Plugin):
    """See the module."""

    Config = HierarchicalConfig
    claims = {Claim.NEEDS_TOKENS, Claim.GIVES_EMBEDDINGS}
    architectures = ("gemma", "gpt_neox")
    example = {"width": 16, "heads": 2, "layers": 1}
    example_rows = tuple(
        {"text": f"Once, {word} was here: it's {word}\nagain."} for word in ("he", "Ann", "the cat") * 2
    )
    refuses = {
        "t5": "it has two towers",
        "bert": "it is no decoder",
        "mamba": "it has no attention",
        "vit": "it reads no tokens",
    }
    config: HierarchicalConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        width, heads, rows = self.config.width, self.config.heads, len(model.embedding().weight)
        bytes_, special = units.alphabet(model, stack.tokenizer)
        added = stack.tokenizer.get_added_vocab().values()
        # A bundle's tokenizer knows [W] already. Else it gets the row of a token of several bytes, or of none.
        free = sorted({*range(rows)} - {*bytes_, *special, *added})
        word = stack.tokenizer.get_vocab().get(WORD, free[0] if free else None)
        if word is None:
            said = f"{model.owner}: no row of the embedding is free for [W]"
            raise ArchitectureError(said, hint="a tokenizer that has a token of several bytes")
        if width % (2 * heads):
            said = f"{model.owner}: a width of {width}, of which {heads} heads have no even number"
            raise ArchitectureError(said, hint=f"width: {-(-width // (2 * heads)) * 2 * heads}")
        model.tokenizer(lambda tokenizer: in_words(tokenizer, word))
        self.units = Hierarchy(model, [*bytes_, word, *special], self.config)
        units.put(model, self.units)

    def check(self, stack: Stack) -> None:
        units.settle(stack, stack.id_of(self), self.units)
