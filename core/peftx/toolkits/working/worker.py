"""`Worker`: what a plugin asks of a language model, with every answer kept by what was asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftx.errors import BundleError, DataError, UnsupportedError, WorkerError
from peftx.toolkits.working.answers import Answer, Answerer, Scores
from peftx.toolkits.working.kept import remember, remembered
from peftx_spec.rows import require_text

Progress = Callable[[int, int], None]
AT_ONCE = 32
"""Questions after which answers are written down: what a kill may cost."""


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
    _known: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.transcript is not None and self.transcript.exists():
            self._known = dict(_read(self.transcript))
        elif self.transcript is None and self.cache is not None:
            self._known = remembered(self.cache)

    def write(
        self, prompts: Sequence[str], *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """What the model writes behind each prompt; equal prompts are asked once."""
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        keys = [self._key("write", prompt, options) for prompt in self._checked(prompts)]
        asked = dict(zip(keys, prompts, strict=True))

        def ask(chunk: list[str]) -> list[dict[str, Any]]:
            answers = self.by.write([asked[key] for key in chunk], **options)  # type: ignore[arg-type]
            return [
                {"prompt": asked[key], "text": a.text, "tokens": a.tokens, "refused": a.refused}
                for key, a in zip(chunk, answers, strict=True)
            ]

        self._answer(list(asked), ask)
        found = [self._known[key] for key in keys]
        return [Answer(one["text"], one["tokens"], one["refused"]) for one in found]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The mean log-probability of each second text's tokens behind the first.

        Raises:
            UnsupportedError: the one who answers gives none.
        """
        by = self.by
        if not isinstance(by, Scores):
            raise UnsupportedError(f"{self.by.name} gives no probabilities", hint="OfStack(stack) does")
        keys = [self._key("score", prompt, {"text": text}) for prompt, text in pairs]
        asked = dict(zip(keys, pairs, strict=True))
        scores = by.score

        def ask(chunk: list[str]) -> list[dict[str, Any]]:
            found = scores([asked[key] for key in chunk])
            return [
                {"prompt": asked[key][0], "of": asked[key][1], "score": score}
                for key, score in zip(chunk, found, strict=True)
            ]

        self._answer(list(asked), ask)
        return [self._known[key]["score"] for key in keys]

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

    @staticmethod
    def _checked(prompts: Sequence[str]) -> Sequence[str]:
        for index, prompt in enumerate(prompts):
            require_text(prompt, f"prompt {index} (counting from 0)")
        return prompts

    def _key(self, what: str, prompt: str, options: dict[str, Any]) -> str:
        asked = json.dumps([self.by.name, what, prompt, options], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _answer(self, keys: list[str], ask: Callable[[list[str]], list[dict[str, Any]]]) -> None:
        unknown = [key for key in keys if key not in self._known]
        self.budget.known += len(keys) - len(unknown)
        for start in range(0, len(unknown), AT_ONCE):
            chunk = unknown[start : start + AT_ONCE]
            self.budget.allow(len(chunk))
            records = dict(zip(chunk, ask(chunk), strict=True))
            self.budget.spent_calls += len(records)
            self.budget.spent_tokens += sum(record.get("tokens", 0) for record in records.values())
            self.budget.refusals += sum(record.get("refused", False) for record in records.values())
            self._keep(records)
            if self.progress is not None:
                self.progress(min(start + AT_ONCE, len(unknown)), len(unknown))

    def _keep(self, records: dict[str, dict[str, Any]]) -> None:
        self._known |= records
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


def _read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The answers of a transcript; a last line that a kill cut short is left out.

    Raises:
        BundleError: another line is no answer.
    """
    lines = file.read_text("utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.append((record.pop("key"), record))
        except (ValueError, KeyError, AttributeError) as error:
            if number == len(lines):
                file.write_text("".join(f"{whole}\n" for whole in lines[:-1]), "utf-8")
                break
            raise BundleError(f"'{file}', line {number}: no answer of a worker") from error
    return found
