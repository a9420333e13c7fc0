"""The stream of training windows: sources walked in random order, drawn by their shares; resumable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from tiny.sources import Source
from tiny.tokenizer import BOS_ID, EOS_ID


@dataclass
class EncodedSource:
    """Token ids and loss weights of a source, and the position of its endless shuffled walk."""

    name: str
    tokens: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    seed: int
    piece: int
    epoch: int = -1
    cursor: int = 0
    units: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def shuffle(self, epoch: int) -> None:
        """Lay out an epoch: whole documents, long ones cut at a new phase each time, in random order."""
        rng = np.random.default_rng([self.seed, epoch])
        units: list[tuple[int, int]] = []
        for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            at = start
            if end - start > self.piece:
                cut = start + int(rng.integers(self.piece // 4, self.piece))
                while cut < end:
                    units.append((at, cut))
                    at, cut = cut, cut + self.piece
            units.append((at, end))
        self.units = np.asarray(units, np.int64)[rng.permutation(len(units))]
        self.epoch, self.cursor = epoch, 0

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """The next unit's tokens and loss weights."""
        if self.cursor >= len(self.units):
            self.shuffle(self.epoch + 1)
        start, end = self.units[self.cursor]
        self.cursor += 1
        return self.tokens[start:end], self.weights[start:end]

    @property
    def mean_unit(self) -> float:
        """Average tokens per unit."""
        lengths = np.diff(self.bounds)
        return float(lengths.sum() / np.maximum(1, np.ceil(lengths / self.piece)).sum())


def encode_source(
    source: Source, tokenizer: PreTrainedTokenizerFast, seed: int, piece: int = 1536
) -> EncodedSource:
    """Tokenise a source: each document as BOS, text, EOS, with the answers' loss weights."""
    core = tokenizer.backend_tokenizer
    prompts = core.encode_batch_fast([doc.prompt for doc in source.documents], add_special_tokens=False)
    answers = core.encode_batch_fast([doc.answer for doc in source.documents], add_special_tokens=False)
    tokens: list[int] = []
    weights: list[float] = []
    bounds = [0]
    for doc, prompt, answer in zip(source.documents, prompts, answers, strict=True):
        tokens += [BOS_ID, *prompt.ids, *answer.ids, EOS_ID]
        weights += [1.0] * (1 + len(prompt.ids)) + [doc.answer_weight] * len(answer.ids) + [1.0]
        bounds.append(len(tokens))
    return EncodedSource(
        source.name,
        np.asarray(tokens, np.int16),
        np.asarray(weights, np.float32),
        np.asarray(bounds, np.int64),
        seed,
        piece,
    )


class Sampler:
    """Packs units of weighted sources into one stream and cuts it into training windows; resumable."""

    def __init__(self, sources: list[Source], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.sources = [encode_source(source, tokenizer, seed + i) for i, source in enumerate(sources)]
        self.rng = np.random.default_rng(seed)
        self.probabilities = []
        for shares in ([s.share for s in sources], [s.decay_share for s in sources]):
            rates = np.asarray(shares) / np.asarray([encoded.mean_unit for encoded in self.sources])
            self.probabilities.append(rates / rates.sum())
        self.tokens = np.zeros(0, np.int16)
        self.weights = np.zeros(0, np.float32)

    def batch(self, rows: int, context: int, decay: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and target weights of the next ``rows`` windows."""
        need = rows * context + 1
        tokens, weights, size = [self.tokens], [self.weights], len(self.tokens)
        while size < need:
            source = self.sources[self.rng.choice(len(self.sources), p=self.probabilities[int(decay)])]
            unit, unit_weights = source.take()
            tokens.append(unit)
            weights.append(unit_weights)
            size += len(unit)
        stream, stream_weights = np.concatenate(tokens), np.concatenate(weights)
        self.tokens, self.weights = stream[need - 1 :], stream_weights[need - 1 :]
        ids = torch.from_numpy(stream[:need].astype(np.int64))
        target_weights = torch.from_numpy(stream_weights[1:need].copy())
        shape = (rows, context)
        return ids[:-1].view(shape), ids[1:].view(shape), target_weights.view(shape)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue the stream, as JSON values."""
        return {
            "rng": self.rng.bit_generator.state,
            "walks": {source.name: [source.epoch, source.cursor] for source in self.sources},
            "tokens": self.tokens.tolist(),
            "weights": self.weights.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.rng.bit_generator.state = state["rng"]
        for source in self.sources:
            epoch, cursor = state["walks"][source.name]
            if epoch >= 0:
                source.shuffle(epoch)
                source.cursor = cursor
        self.tokens = np.asarray(state["tokens"], np.int16)
        self.weights = np.asarray(state["weights"], np.float32)
