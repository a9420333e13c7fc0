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

Elsewhere the LM has a row for every unit, since a cache must: those of units that end no word are hidden, and positions
count words. It is the same computation.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from peftx import (
    CallEdit,
    Claim,
    Delta,
    Evaluation,
    Generation,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    hookimpl,
)
from peftx.engines.data import Collator, tokenize_dataset
from peftx.errors import ArchitectureError, ConflictError, UnsupportedError
from peftx.kernel.calls import columns_of
from peftx.kernel.objective import pad_of
from peftx.kernel.parts import DeltaPart
from peftx.toolkits.evaluation import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARS = [bytes_to_unicode()[byte] for byte in range(256)]
"""How tokenizers of bytes write them."""
SPACES = b" \t\n\r\v\f"
PAD, SOFT, STRANGE = -1, -2, -3
"""What is no unit: a pad, a soft token, and a token of several bytes."""
NEVER = -1e4
"""Logit of a token that is no unit."""
WINDOWS = ("sliding_window", "attention_chunk_size")
FITS = "a causal language model with attention to all of a text in every layer, and a tokenizer of bytes"


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


class Pooling(CallEdit):
    """The words' vectors in, units' logits out.

    Args:
        model: which is called. ids: of the units' tokens, bytes first. config: the options.
    """

    unit_of: Tensor
    ids: Tensor
    said: tuple[Tensor, Tensor, Tensor, bool] | None = None
    """Of a call: units so far [B, S], which of them end a word, which rows of the cache are units, and does the LM read
    vectors of words alone."""

    def __init__(self, model: ModelView, ids: Sequence[int], config: WordPooledConfig) -> None:
        super().__init__()
        self.call, self.owner, self.k, self.m = model.call, model.owner, config.vectors, config.longest
        d = model.hidden_size // self.k
        unit_of = dict.fromkeys(range(max(ids) + 2), STRANGE) | {id: unit for unit, id in enumerate(ids)}
        self.register_buffer("unit_of", torch.tensor([*unit_of.values()]), persistent=False)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.E, self.P = nn.Embedding(len(ids), d), nn.Embedding(self.m, d)
        self.c, self.A = nn.Parameter(torch.randn(self.k, d)), nn.Linear(d, len(ids))
        self.encoder, self.decoder = (coder(d, config.heads, config.layers) for _ in range(2))
        size = model.embedded(256).std()  # e is as large as what tokens are
        self.encoder.norm.weight = nn.Parameter(size * torch.ones(d))

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        ids, real = self.call.ids, self.call.real
        if ids is None or real is None:
            said = f"{self.owner}: words are made of bytes, and the call brings embeddings"
            raise UnsupportedError(said, hint="model(input_ids=...)")
        units = self.unit_of[ids.clamp(max=len(self.unit_of) - 1)].masked_fill(~real, PAD)
        if bool((units == STRANGE).any()):
            said = f"{self.owner}: token {int(ids[units == STRANGE][0])} is no single byte, and the model reads bytes"
            raise UnsupportedError(
                said, hint="stack.train, stack.generate, or ids of the plugin's `tokenizer`"
            )
        rows = self.call.carry(self.owner, units, fill=SOFT)
        text = rows[rows != SOFT].view(len(ids), -1)  # [B, S]
        ends, (S, T) = self.ends(text), (text.shape[1], ids.shape[1])
        n = ends.cumsum(1) - ends.long()  # words before each unit's own
        b, t = ends[:, S - T :].nonzero(as_tuple=True)
        packed = self.training and S == T and not call.get("use_cache")
        count = torch.arange(int(ends.sum(1).max()) if packed else T, device=ids.device).expand(len(ids), -1)
        e = self.encode(text, ends, b, t + S - T)
        self.said = text, ends, rows != SOFT, packed
        given = {
            "inputs_embeds": e.new_zeros(*count.shape, e.shape[1]).index_put(
                (b, n[b, t] if packed else t), e
            ),
            "attention_mask": (count < ends.sum(1, keepdim=True) if packed else ends).long(),
            "position_ids": count if packed else n[:, S - T :],
            "use_cache": False if packed else call.get("use_cache"),
            "logits_to_keep": 0,  # those of a word go by what stands before it
        }
        return {name: value for name, value in call.items() if name != "input_ids"} | given

    def after(self, output: Any) -> None:
        self.said = None

    def ends(self, text: Tensor) -> Tensor:
        """Which units end a word, [B, S]. The first of a text does: BOS, in most."""
        real, place = text != PAD, torch.arange(text.shape[1], device=text.device)
        over = torch.isin(text, text.new_tensor([*SPACES])) | (text >= 256) | (real.cumsum(1) == 1)
        since = place - (place * (over & real)).cummax(1).values  # units of the word, were it not cut
        return real & (over | (since > 0) & (since % self.m == 0))

    def encode(self, text: Tensor, ends: Tensor, b: Tensor, t: Tensor) -> Tensor:
        """e of the words that end at these places, [W, d k]."""
        place = torch.arange(text.shape[1], device=text.device)
        begin = F.pad(((place + 1) * (ends | (text == PAD))).cummax(1).values, (1, 0))[b, t]
        at = begin[:, None] + torch.arange(self.m, device=text.device)
        units = self.E(text[b[:, None], torch.minimum(at, t[:, None])]) + self.P.weight
        hidden = F.pad(at > t[:, None], (self.k, 0))
        u = torch.cat((self.c.expand(len(b), -1, -1), units), 1)  # [W, k + m, d]
        e: Tensor = self.encoder(u, src_key_padding_mask=hidden)[:, : self.k].flatten(1)
        return e

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of the next unit [B, T, V], by the last states x, [B, T, d k], or [B, N, d k] of words alone."""
        assert self.said is not None
        text, ends, units, packed = self.said
        S, T = text.shape[1], text.shape[1] if packed else x.shape[1]
        h = x if packed else self.call.carry(f"{self.owner}.h", x)[units].view(len(x), S, -1)
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
        return y.new_full((*e.shape, y.shape[-1]), NEVER).index_copy(2, self.ids, z[word, j].to(y))


def coder(d: int, heads: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(d), enable_nested_tensor=False)


class ToUnits(Delta):
    """Logits of units in the place of those of tokens."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = (pooling,)  # in a tuple: it is no child of this one

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (pooling,) = self.pooling
        return y if pooling.said is None else pooling(x, y)


class WordPooled(Plugin):
    """See the module.

    Attributes:
        tokenizer: the stack's, of single bytes. special: tokens that are units beside them, special and added ones.
    """

    Config = WordPooledConfig
    claims = {Claim.NEEDS_TOKENS, Claim.GIVES_EMBEDDINGS}
    takes = ("text", "prompt-completion", "messages", "classification")
    gives = dict.fromkeys(takes, "tokenized")
    architectures = ("gemma", "bloom", "gpt_neox")
    example = {"vectors": 2, "heads": 2, "layers": 1, "longest": 6}
    refuses = {
        "t5": "it has two towers",
        "bert": "it is no decoder",
        "mamba": "it has no attention",
        "vit": "it reads no tokens",
    }
    config: WordPooledConfig
    tokenizer: PreTrainedTokenizerBase
    special: list[int]

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        k, heads, kind, d = self.config.vectors, self.config.heads, model.config, model.hidden_size
        known, size = stack.tokenizer.get_vocab(), len(model.embedding().weight)
        for wrong, why in (
            (kind.is_encoder_decoder or not model.module.can_generate(), "is no decoder"),
            (len(model.attention_sites()) < model.num_layers, "has layers without attention"),
            (
                any(getattr(kind, name, None) for name in WINDOWS),
                "looks back through a window, which counts units",
            ),
            (hasattr(kind, "vocab_size_per_layer_input"), "looks tokens up in every layer"),
            (d % (k * heads), f"is {d} wide, which {k} vectors of {heads} heads do not divide"),
            (not {*CHARS} <= known.keys(), "has a tokenizer without a token for each byte"),
        ):
            if wrong:
                raise ArchitectureError(f"{model.owner}: {kind.model_type} {why}", hint=FITS)
        self.tokenizer = in_bytes(stack.tokenizer)
        added = {*stack.tokenizer.all_special_ids, *stack.tokenizer.get_added_vocab().values()}
        self.special = sorted(id for id in added if id < size)
        pooling = Pooling(model, [*(known[char] for char in CHARS), *self.special], self.config)
        model.around(pooling)
        model.site("head").attach(ToUnits(pooling))

    def check(self, stack: Stack) -> None:
        id = stack.id_of(self)
        (head,) = (part.path for part in stack.ledger.of(id, DeltaPart))
        for part in stack.ledger.all(DeltaPart):
            if part.path == head and part.owner != id:
                raise ConflictError(
                    f"{id} puts logits of bytes in the place of the head's, and {part.owner} stands on the head",
                    hint=f"leave {head} out of {part.owner}",
                )

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        def encoded(rows: Dataset) -> Dataset:
            keep = [name for name in columns_of(stack.model) if name in rows.column_names]
            form, size = data.format, data.max_length
            return tokenize_dataset(rows, self.tokenizer, format=form, max_length=size, keep=keep)

        if not data.train:  # the core says so
            return
        data.train, data.eval = encoded(data.train), encoded(data.eval) if data.eval else None
        data.format = "tokenized"

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
        if request.past_key_values is not None and request.past_key_values.get_seq_length():
            said = "word-pooled-lm: a prompt is read in bytes, and a cache was filled with other tokens"
            raise UnsupportedError(said, hint="leave past_key_values out")
        request.past_key_values = None  # nobody goes on from it by the prompt's own tokens
        given, mask = request.input_ids, request.attention_mask
        real = torch.ones_like(given) if mask is None else mask
        ids = [
            {"input_ids": self.spelled(row[kept.bool()].tolist())}
            for row, kept in zip(given, real, strict=True)
        ]
        batch = Collator(pad_of(request.model, self.tokenizer), padding_side="left")(ids)
        request.input_ids, request.attention_mask = (
            batch[name].to(given.device) for name in ("input_ids", "attention_mask")
        )
        found = yield
        new = found[:, request.input_ids.shape[1] :]
        request.input_ids, request.attention_mask = given, mask
        return torch.cat((given, new), 1)

    def spelled(self, ids: Sequence[int]) -> list[int]:
        """The same text in tokens of bytes."""
        known, words = self.tokenizer.get_vocab(), self.tokenizer.convert_ids_to_tokens(ids)
        return [
            unit
            for id, word in zip(ids, words, strict=True)
            for unit in ([id] if id in self.special else map(known.get, word))
        ]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        found = perplexity(evaluation.stack.model, self.tokenizer, evaluation.rows("eval"))
        evaluation.add_score(found["bits_per_byte"])
