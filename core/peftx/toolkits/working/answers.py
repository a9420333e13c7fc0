"""Who answers a worker's questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peftx.engines.data import encode_pair, prompt_ids
from peftx.engines.data.collate import IGNORE
from peftx.errors import DataError, UnsupportedError
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.text import generate
from peftx.toolkits.evaluation.likelihood import Request, context_window, score_requests


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt."""

    text: str
    tokens: int = 0
    """Of prompt and answer together, as the one who answers counts them; 0 where nobody does."""
    refused: bool = False
    """Did the one who answers decline, or give nothing."""


def answer_of(record: Mapping[str, Any]) -> Answer | float:
    """What a worker wrote down of an answer, without the question. Raises KeyError: nothing of the kind."""
    if "score" in record:
        return float(record["score"])
    return Answer(record["text"], record["tokens"], record["refused"])


@runtime_checkable
class Answerer(Protocol):
    """Who answers. `name` says who, so that answers of two are never taken for each other's."""

    name: str

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        """One answer a prompt, in order."""


@runtime_checkable
class Scores(Protocol):
    """One who also says how likely texts are."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The mean natural-log probability of the second text's tokens behind the first."""


class OfStack:
    """A stack of this process, or one of a bundle: `OfStack(peftx.load(path))`."""

    def __init__(self, stack: Stack, *, batch_size: int = 8) -> None:
        self.stack, self.batch_size = stack, batch_size
        plugins = {id: plugin.config.model_dump(mode="json") for id, plugin in stack.plugins.items()}
        trained = json.dumps([stack.base_fingerprint, stack.trained_steps, plugins], sort_keys=True)
        self.name = f"stack:{stack.base_id}:{hashlib.sha256(trained.encode()).hexdigest()[:12]}"

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        options = (
            {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
        )
        found: list[Answer] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            texts, stats = generate(self.stack, batch, max_new_tokens, seed, options)
            read = sum(len(prompt_ids(self.stack.tokenizer, prompt)) for prompt in batch)
            each = (read + int(stats.get("new_tokens", 0)) * len(batch)) // len(batch)
            found += [Answer(text, each, refused=not text.strip()) for text in texts]
        return found

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        if self.stack.model.config.is_encoder_decoder:
            raise UnsupportedError("scores need a decoder", hint="a stack on a causal language model")
        size, requests = context_window(self.stack.model, self.stack.tokenizer), []
        for index, (prompt, text) in enumerate(pairs):
            found = encode_pair(
                self.stack.tokenizer, prompt, text, max_length=size, where=f"pair {index} (counting from 0)"
            )
            first = next(i for i, label in enumerate(found.labels) if label != IGNORE)
            ids, target = list(found.input_ids), list(found.input_ids)[first:]
            requests.append(Request(inputs=ids[:-1], first=first - 1, targets=[target]))
        logs = score_requests(self.stack.model, requests, batch_size=self.batch_size)
        return [float(one[0].mean()) for one in logs]


class Scripted:
    """A function in place of a model, for rules and for tests: prompt -> text; None refuses."""

    def __init__(self, function: Callable[[str], str | None], *, name: str = "scripted") -> None:
        self.function, self.name = function, f"scripted:{name}"

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        texts = [self.function(prompt) for prompt in prompts]
        return [Answer(text or "", len((text or "").split()), refused=not text) for text in texts]


class Recorded:
    """Answers that somebody wrote down: a worker's own transcript, or a mapping from prompts to texts."""

    def __init__(self, answers: Mapping[str, str] | str | Path) -> None:
        if isinstance(answers, Mapping):
            self.answers, source = dict(answers), "mapping"
        else:
            with Path(answers).open(encoding="utf-8") as lines:
                records = [json.loads(line) for line in lines]
            self.answers = {record["prompt"]: record["text"] for record in records if "text" in record}
            source = str(answers)
        self.name = f"recorded:{source}"

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        unknown = next((prompt for prompt in prompts if prompt not in self.answers), None)
        if unknown is not None:
            raise DataError(f"{self.name}: no answer is recorded for {unknown!r:.80}")
        return [Answer(self.answers[prompt], 0, refused=not self.answers[prompt]) for prompt in prompts]
