"""What the base writes after prompts of held-out rows, and what the stack does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from peftx.engines.data import pair_of, said
from peftx.engines.data.sources import measured_rows, training_rows
from peftx.errors import ArchitectureError, PeftxError
from peftx.loading import load
from peftx.stack import Stack
from peftx.toolkits.decoding.text import generate
from peftx.toolkits.serving import Engine, Request, Server

if TYPE_CHECKING:
    from peftx.pages.told import Told
    from peftx_spec import Pipeline

SAMPLE_TOKENS = 64
CLIENTS = 8
"""Requests at once, at least: prompts are asked again where there are fewer."""
PROMPT_WORDS = 12
"""Of a text that has no prompt of its own."""


@dataclass(frozen=True)
class Sample:
    """One prompt, and what follows it: in the row, by the base, by the stack; None where there is nothing."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Speed:
    """How long `who` took for its texts. calls: of the model. tokens: new ones, of all texts."""

    who: str
    tokens: float
    calls: float
    seconds: float


@dataclass(frozen=True)
class Served:
    """How long `who` took for so many requests that came at once, answered as `peftx serve` does. tokens: new ones."""

    who: str
    requests: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Samples:
    """`notes` say what is not there, and why."""

    samples: Sequence[Sample] = ()
    notes: list[str] = field(default_factory=list)
    speeds: list[Speed | Served] = field(default_factory=list)


def samples(
    told: Told,
    count: int,
    *,
    model: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Samples:
    """The likeliest tokens, up to `SAMPLE_TOKENS`, after the first prompts of the rows that were evaluated on.

    Args:
        model: where the base lies now.
    """
    notes: list[str] = []
    rows = (
        _tried(lambda: prompts(told.pipeline, count), "there are no rows to take prompts from", notes) or []
    )
    if not rows:
        return Samples((), notes or ["there are no rows to take prompts from: the spec names none"])
    base, texts, speeds = told.manifest.base, [prompt for prompt, _ in rows], list[Speed | Served]()
    before = _tried(
        lambda: _written(
            "The base",
            Stack(model or base.id, dtype=base.dtype, device=device, trust_remote_code=trust_remote_code),
            texts,
            speeds,
            notes,
        ),
        "the base is not at hand",
        notes,
    )
    place = None if base.contained is not None else model
    after = _tried(
        lambda: _written(
            "The stack",
            load(told.folder, model=place, device=device, trust_remote_code=trust_remote_code),
            texts,
            speeds,
            notes,
        ),
        "the bundle cannot be loaded",
        notes,
    )
    found = [
        Sample(prompt, reference, _at(before, n), _at(after, n)) for n, (prompt, reference) in enumerate(rows)
    ]
    return Samples(found if before or after else (), notes, speeds)


def _at(texts: list[Any] | None, place: int) -> str | None:
    return None if texts is None else texts[place]


def _tried(make: Callable[[], list[Any] | None], what: str, notes: list[str]) -> list[Any] | None:
    try:
        return make()
    except PeftxError as error:
        notes.append(f"{what}: {error.message}")
        return None


def _written(
    who: str, stack: Stack, prompts: Sequence[str], speeds: list[Speed | Served], notes: list[str]
) -> list[str]:
    """What a stack writes, one text after another, and then served; how fast goes to `speeds`, and why it is not served
    to `notes`.

    Raises:
        ArchitectureError: its model writes nothing.
    """
    if not stack.model.can_generate():
        raise ArchitectureError(f"a {type(stack.model).__name__} writes no text")
    texts, stats, started = list[str](), Counter[str](), time.perf_counter()
    for prompt in prompts:
        (text,), each = generate(stack, [prompt], SAMPLE_TOKENS, None, {"do_sample": False})
        texts.append(text)
        stats.update({name: each[name] for name in ("new_tokens", "model_calls")})
    speeds.append(Speed(who, stats["new_tokens"], stats["model_calls"], time.perf_counter() - started))
    try:
        speeds.append(_served(who, stack, [*islice(cycle(prompts), max(CLIENTS, len(prompts)))]))
    except PeftxError as error:
        notes.append(f"{who} is not served: {error.message}")
    return texts


def _served(who: str, stack: Stack, prompts: Sequence[str]) -> Served:
    with Engine(Server(stack)) as engine:
        requests = [Request(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0) for prompt in prompts]
        started = time.perf_counter()
        answers = [job.result() for job in [engine.submit(request) for request in requests]]
        seconds = time.perf_counter() - started
    return Served(who, len(answers), sum(answer.completion_tokens for answer in answers), seconds)


def prompts(pipeline: Pipeline | None, count: int) -> list[tuple[str, str]]:
    """Prompts of the rows that are evaluated on, else of those that are trained on, each with its answer.

    Raises:
        DataError: they cannot be read.
    """
    if pipeline is None:
        return []
    rows, _ = measured_rows(pipeline.data, limit=count)
    if rows is None:
        rows, _ = training_rows(pipeline.data)
    found = [prompt_of(row) for row in (rows.take(min(count, len(rows))) if rows is not None else ())]
    return [(prompt, reference) for prompt, reference in found if prompt]


def prompt_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and answer of a row of any format."""
    if "prompt" in row:
        return pair_of(row)
    if "messages" in row:
        turns = row["messages"]
        first = next((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        asked = "\n".join(map(said, turns[:first]))
        return asked, said(turns[first]) if first < len(turns) else ""
    if "label" in row:
        return str(row["text"]), str(row["label"])
    words = str(row.get("text", "")).split(" ")
    return " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS : 3 * PROMPT_WORDS])
