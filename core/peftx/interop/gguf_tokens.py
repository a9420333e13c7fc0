"""A tokenizer as a GGUF file holds it: tokens, their kinds, merges, and the name of how text is split before.

llama.cpp knows ways of splitting by name. Ours is found by what it does: the known way that gives the same tokens for
texts that tell them apart.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from peftx.errors import UnsupportedError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "llama-bpe": rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}",
}
NEAREST = "gpt-2"
PROBES = (
    "It's 7 o'clock, DON'T wait: 12, 345 and 67890!",
    "a  b\n\n  c\t\td \r\n e",
    "x=1;if(y!=2){return z;}...",
    "Größe, naïve, 東京へ行く, привет, नमस्ते 😀",
)


@dataclass(frozen=True)
class Vocabulary:
    """What the file says about text."""

    tokens: list[str]
    special: set[int]
    """Ids that a model ends or begins with, and that no text becomes."""
    added: set[int]
    """Ids of further tokens that are whole wherever they stand."""
    unused: set[int]
    """Rows of the embedding without a token."""
    merges: list[str]
    split: str
    ids: dict[str, int]
    """bos, eos, pad, ... where there is one."""
    begins: bool
    """Does a text begin with bos."""
    chat: str | None

    def tell(self, writer: GGUFWriter) -> None:
        from gguf import TokenType

        kinds = {
            **dict.fromkeys(self.unused, TokenType.UNUSED), **dict.fromkeys(self.added, TokenType.USER_DEFINED),
            **dict.fromkeys(self.special, TokenType.CONTROL),
        }  # fmt: skip
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types([kinds.get(id, TokenType.NORMAL) for id in range(len(self.tokens))])
        writer.add_token_merges(self.merges)
        for name, id in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(id)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(False)
        if self.chat is not None:
            writer.add_chat_template(self.chat)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Of a byte-level BPE, filled up to the rows of the embedding.

    Raises:
        UnsupportedError: another kind of tokenizer.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(backend.to_str()) if backend is not None else {}
    _check_kind(tokenizer, told)
    words = {id: word for word, id in backend.get_vocab(with_added_tokens=True).items()}
    if max(words) >= rows:
        raise UnsupportedError(
            f"the tokenizer has {max(words) + 1} tokens, and the embedding {rows} rows", hint="--format hf"
        )
    added = {entry["id"]: bool(entry["special"]) for entry in told["added_tokens"]}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in told["model"]["merges"]]
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "sep", "pad")}
    chat = tokenizer.chat_template
    return Vocabulary(
        tokens=[words.get(id, f"[PAD{id}]") for id in range(rows)],
        special={id for id, special in added.items() if special},
        added={id for id, special in added.items() if not special},
        unused=set(range(rows)) - set(words),
        merges=[" ".join(pair) for pair in pairs],
        split=_split(backend),
        ids={name: id for name, id in named.items() if id is not None},
        begins=_begins(tokenizer),
        chat=chat if isinstance(chat, str) else None,
    )


def _check_kind(tokenizer: PreTrainedTokenizerBase, told: dict[str, Any]) -> None:
    model, decoder = told.get("model") or {}, told.get("decoder") or {}
    bytes_alone = decoder.get("type") == "ByteLevel" and not model.get("byte_fallback")
    normalizer = (told.get("normalizer") or {"type": "NFC"})[
        "type"
    ]  # llama.cpp composes nothing, and most text is
    if model.get("type") != "BPE" or not bytes_alone or normalizer != "NFC" or not model["merges"]:
        raise UnsupportedError(
            f"the tokenizer ({type(tokenizer).__name__}) is no BPE of bytes with merges, as --format gguf needs",
            hint="--format hf, and llama.cpp's own convert_hf_to_gguf.py",
        )


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does it put bos before a text. Nothing else goes into the file, so nothing else may stand around it.

    Raises:
        UnsupportedError: it puts something else there.
    """
    bare = tokenizer("a", add_special_tokens=False).input_ids
    around = tokenizer("a").input_ids
    if around not in (bare, [tokenizer.bos_token_id, *bare]):
        raise UnsupportedError(
            f"the tokenizer makes {around} of a text of {bare}, and --format gguf puts bos in front alone",
            hint="--format hf",
        )
    return around != bare


def _split(backend: Tokenizer) -> str:
    """llama.cpp's name of the way that gives the same tokens; else the nearest, with a warning."""
    for name, way in _ways().items():
        other = copy.deepcopy(backend)
        other.pre_tokenizer = way
        if all(_ids(backend, text) == _ids(other, text) for text in PROBES):
            return name
    warnings.warn(
        f"llama.cpp does not split text as this tokenizer does; the file says '{NEAREST}', and some texts, of long "
        "numbers for one, become other tokens there than here",
        stacklevel=2,
    )
    return NEAREST


def _ways() -> dict[str, PreTokenizer]:
    plain = ByteLevel(add_prefix_space=False, use_regex=True)
    whole = ByteLevel(add_prefix_space=False, use_regex=False)
    split = {n: Sequence([Split(Regex(p), "isolated"), whole]) for n, p in PATTERNS.items()}
    return {**split, NEAREST: plain}


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)
