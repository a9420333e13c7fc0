"""StochasTok: while a model trains, some tokens stand in pieces, so that it learns what is inside of them.

"StochasTok: Improving Fine-Grained Subword Understanding in LLMs" (arXiv:2506.01687). With the tokenizer as it is,
and V its tokens as strings,

    splits(w) = {(a, b) in V x V: ab = w}                        at every cut, not only where BPE merged; found once
    expand(t_1 .. t_n): floor(n p) times: i ~ uniform{1 .. length now}
        t_i <- (a, b) ~ uniform splits(t_i)                      nothing where t_i has no splits

so pieces may be split again, and the text is the same. Labels go along: of a token that counts both pieces count.
Vocabulary and model stay, and evaluation reads whole tokens (p = 0).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from pydantic import Field

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, hookimpl
from peftx.engines.data import IGNORE, Example, Place, dataset_of_examples
from peftx.errors import ArchitectureError, DataError, UnsupportedError
from peftx.kernel.calls import own_lengths_of
from peftx.kernel.objective import objective_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Splits = Mapping[int, Sequence[tuple[int, int]]]


class StochasTokConfig(PluginConfig):
    """Options of StochasTok; the paper trains with p = 0.1, from the start or for a few thousand steps more."""

    p: float = Field(0.1, ge=0, le=1, description="attempts to split for each token of a row")


def splits_of(tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Of each token that has any. Special and added tokens, and bytes that are written as <0x0A>, are whole."""
    fixed = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    V = {w: id for w, id in tokenizer.get_vocab().items() if w not in fixed and not BYTE.fullmatch(w)}
    found = {
        id: [(V[w[:cut]], V[w[cut:]]) for cut in range(1, len(w)) if w[:cut] in V and w[cut:] in V]
        for w, id in V.items()
    }
    return {id: pairs for id, pairs in found.items() if pairs}


def expand(
    ids: Sequence[int], splits: Splits, p: float, rng: Random, most: int
) -> tuple[list[int], list[int]]:
    """The ids with at most `most` splits, and for each the place of the token that it is of."""
    found, places = list(ids), list(range(len(ids)))
    for _ in range(int(len(ids) * p)):
        i = rng.randrange(len(found))
        if found[i] in splits and len(found) < len(ids) + most:
            found[i : i + 1], places[i : i + 1] = rng.choice(splits[found[i]]), [places[i]] * 2
    return found, places


class StochasTok(Plugin):
    """See the module."""

    Config = StochasTokConfig
    claims = {Claim.DATA_ONLY}
    takes = ("text", "prompt-completion", "messages", "classification")
    gives = dict.fromkeys(takes, "tokenized")
    config: StochasTokConfig

    def suits(self, model: ModelView) -> None:
        if objective_of(model.module) != "next-token":
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} does not learn to foresee tokens",
                hint="a causal or an encoder-decoder model",
            )

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Tokenize the rows as training would, and split tokens of those to train on."""
        from peftx.engines.training.examples import encoded

        if not data.train:  # the core says so
            return
        name, p, limit = stack.id_of(self), self.config.p, data.max_length
        size = (
            max(2, int(limit / (1 + p))) if data.format == "text" else limit
        )  # blocks leave room for pieces
        rows = encoded(stack, replace(data, max_length=size), data.progress)
        if data.eval is not None:
            data.eval = encoded(stack, replace(data, train=data.eval))
        others = [column for column in rows.column_names if column not in ("input_ids", "labels")]
        for column in others:
            if isinstance(rows[0][column], list) and column not in own_lengths_of(stack.model):
                raise UnsupportedError(
                    f"{name}: '{column}' has a value for each token, and tokens are split",
                    hint="put it before the plugin that makes the column",
                )
        if p and all(len(ids) >= limit for ids in rows["input_ids"]):
            raise DataError(
                f"{name}: all rows have {limit} tokens, and none has room for pieces", hint="raise max_length"
            )
        splits, rng, tokenizer = splits_of(data.tokenizer), data.rng(name), data.tokenizer

        def pieces(ids: list[int]) -> tuple[list[int], list[int]]:
            found, places = expand(ids, splits, p, rng, max(0, limit - len(ids)))
            if tokenizer.decode(found) != tokenizer.decode(ids):
                raise UnsupportedError(
                    f"{name}: {type(tokenizer).__name__} writes tokens otherwise when they stand in pieces",
                    hint="a tokenizer of bytes or of SentencePiece",
                )
            return found, places

        def split() -> Iterator[Example]:
            for index, row in enumerate(rows):
                ids, labels = row["input_ids"], row["labels"]
                found, places = pieces(ids)
                if stack.model.config.is_encoder_decoder:
                    labels = pieces(labels)[0]
                elif all(label in (IGNORE, id) for id, label in zip(ids, labels, strict=True)):
                    labels = [
                        IGNORE if labels[i] == IGNORE else id for id, i in zip(found, places, strict=True)
                    ]
                else:
                    raise DataError(f"{name}: {Place(rows, index)} has labels that are not its tokens")
                yield Example(found, labels)

        made = dataset_of_examples(split())
        for column in others:
            made = made.add_column(column, rows[column][:])
        data.train, data.format = made, "tokenized"
