"""`Worker`: what a plugin asks of a language model, with every answer kept by what was asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peftx.errors import BundleError, DataError, UnsupportedError, WorkerError
from peftx.toolkits.working.answers import Answer, Answerer, Scores, answer_of
from peftx.toolkits.working.kept import remember, remembered
from peftx_spec.rows import require_text

Progress = Callable[[int, int], None]
AT_ONCE = 32
"""Questions after which answers are written down: what a kill may cost."""
BLOCK = 32 * AT_ONCE
"""Questions that are in memory together."""
Q = TypeVar("Q")


@dataclass
class Budget:
    """What a worker may spend, and what it has; only questions that were not known count.

    Raises:
        PeftxError: when it is used up; what was answered is kept.
    """

    calls: int | None = None
    tokens: int | None = None
    spent_calls: int = 0
    spent_tokens: int = 0
    refusals: int = 0
    known: int = 0
    """Questions whose answers were there already."""

    def allow(self, calls: int) -> None:
        if self.calls is not None and self.spent_calls + calls > self.calls:
            raise WorkerError(
                f"the worker was asked {self.spent_calls} times, and {calls} more are over its budget of {self.calls}",
                hint="a larger budget goes on where this one ended: answers are kept",
            )
        if self.tokens is not None and self.spent_tokens >= self.tokens:
            raise WorkerError(
                f"the worker has used {self.spent_tokens} of {self.tokens} tokens",
                hint="a larger budget goes on where this one ended: answers are kept",
            )

    def __str__(self) -> str:
        return (
            f"{self.spent_calls} calls, {self.spent_tokens:,} tokens, {self.refusals} refusals, {self.known} answers "
            "known before"
        )


_WATCHED: ContextVar[list[int] | None] = ContextVar("questions", default=None)


@contextmanager
def watched() -> Iterator[list[int]]:
    """What is asked inside, by any worker: the numbers of questions that were put together; none that were known."""
    token = _WATCHED.set(asked := list[int]())
    try:
        yield asked
    finally:
        _WATCHED.reset(token)


@dataclass
class Worker:
    """Asks, and remembers.

    Args:
        by: who answers. transcript: a file of JSON lines in which every answer stands, with its prompt and who gave it;
            what stands there is not asked again. budget: what may be spent. progress: called with (done, asked).
        cache: where answers are kept if there is no `transcript`, of `kept_file`; without prompts, as room allows.
    """

    by: Answerer
    transcript: Path | None = None
    budget: Budget = field(default_factory=Budget)
    progress: Progress | None = None
    cache: Path | None = None
    _known: dict[str, Answer | float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.transcript is not None and self.transcript.exists():
            self._known = _read(self.transcript)
        elif self.transcript is None and self.cache is not None:
            self._known = remembered(self.cache)

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """What the model writes behind each prompt; equal prompts are asked once."""
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

        def ask(chunk: list[str]) -> list[dict[str, Any]]:
            answers = self.by.write(chunk, **options)  # type: ignore[arg-type]
            return [
                {"prompt": prompt, "text": a.text, "tokens": a.tokens, "refused": a.refused}
                for prompt, a in zip(chunk, answers, strict=True)
            ]

        def key(prompt: str, place: int) -> str:
            require_text(prompt, f"prompt {place} (counting from 0)")
            return self._key("write", prompt, options)

        return self._answers(prompts, key, ask)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The mean log-probability of each second text's tokens behind the first.

        Raises:
            UnsupportedError: the one who answers gives none.
        """
        by = self.by
        if not isinstance(by, Scores):
            raise UnsupportedError(f"{self.by.name} gives no probabilities", hint="OfStack(stack) does")
        scores = by.score

        def ask(chunk: list[tuple[str, str]]) -> list[dict[str, Any]]:
            return [
                {"prompt": prompt, "of": text, "score": score}
                for (prompt, text), score in zip(chunk, scores(chunk), strict=True)
            ]

        return self._answers(pairs, lambda pair, _: self._key("score", pair[0], {"text": pair[1]}), ask)

    def choose(self, prompts: Sequence[str], labels: Sequence[str]) -> list[str]:
        """One of the labels for each prompt: the likeliest, or where no probabilities are to be had the one that the
        answer names first; the first label where it names none."""
        if len(labels) < 2:
            raise DataError(f"{len(labels)} labels leave nothing to choose")
        if isinstance(self.by, Scores):
            scores = self.score([(prompt, label) for prompt in prompts for label in labels])
            rows = [scores[i : i + len(labels)] for i in range(0, len(scores), len(labels))]
            return [labels[row.index(max(row))] for row in rows]
        answers = self.write(prompts, max_new_tokens=16)
        return [_named(answer.text, labels) for answer in answers]

    # -- keeping -------------------------------------------------------------------------------------------------

    def _key(self, what: str, prompt: str, options: dict[str, Any]) -> str:
        asked = json.dumps([self.by.name, what, prompt, options], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _answers(
        self,
        questions: Sequence[Q],
        key_of: Callable[[Q, int], str],
        ask: Callable[[list[Q]], list[dict[str, Any]]],
    ) -> list[Any]:
        """Of each question the answer. Few questions are looked at together: all may be more than memory holds."""
        found = list[Any]()
        for start in range(0, len(questions), BLOCK):
            block = questions[start : start + BLOCK]
            keys = [key_of(question, place) for place, question in enumerate(block, start)]
            asked = dict(zip(keys, block, strict=True))
            unknown = [key for key in asked if key not in self._known]
            self.budget.known += len(asked) - len(unknown)
            for at in range(0, len(unknown), AT_ONCE):
                chunk = unknown[at : at + AT_ONCE]
                self.budget.allow(len(chunk))
                records = dict(zip(chunk, ask([asked[key] for key in chunk]), strict=True))
                if (watch := _WATCHED.get()) is not None:
                    watch.append(len(records))
                self.budget.spent_calls += len(records)
                self.budget.spent_tokens += sum(record.get("tokens", 0) for record in records.values())
                self.budget.refusals += sum(record.get("refused", False) for record in records.values())
                self._keep(records)
                if self.progress is not None:
                    left = len(unknown) - at - len(chunk)
                    self.progress(start + len(block) - left, len(questions))
            found += [self._known[key] for key in keys]
        return found

    def _keep(self, records: dict[str, dict[str, Any]]) -> None:
        self._known |= {key: answer_of(record) for key, record in records.items()}
        if self.transcript is None:
            if self.cache is not None:
                with suppress(OSError):  # a full or read-only disk: then they are asked for next time too
                    remember(records, self.cache)
            return
        self.transcript.parent.mkdir(parents=True, exist_ok=True)
        with self.transcript.open("a", encoding="utf-8") as file:
            for key, record in records.items():
                file.write(json.dumps({"key": key, "by": self.by.name, **record}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _named(text: str, labels: Sequence[str]) -> str:
    places = {label: text.lower().find(label.lower()) for label in labels}
    found = [label for label in labels if places[label] >= 0]
    return min(found, key=lambda label: (places[label], -len(label))) if found else labels[0]


def _read(file: Path) -> dict[str, Answer | float]:
    """The answers of a transcript; a last line that a kill cut short is left out.

    Raises:
        BundleError: another line is no answer.
    """
    found, whole, torn = dict[str, Answer | float](), 0, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if torn:
                raise BundleError(f"'{file}', line {torn}: no answer of a worker")
            try:
                record = (
                    json.loads(line) if line.endswith(b"\n") else {}
                )  # what comes next would stand behind it
                found[record.pop("key")] = answer_of(record)
                whole += len(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                torn = number
    if torn:
        os.truncate(file, whole)
    return found
