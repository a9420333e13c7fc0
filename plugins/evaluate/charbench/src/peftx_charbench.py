"""CharBench: can a model count and find the characters of a word, and does that depend on how it is cut into tokens?

"CharBench: Evaluating the Role of Tokenization in Character-Level Tasks" (arXiv:2508.02591). Words w, each in one item
only, as many of every length and task; c is a character of w, drawn by its place:

    unique-characters  |{c in w}|          frequency   how often c stands in w
    first-index        min {i : w_i = c}   last-index  max {i : w_i = c}        from 0; upper and lower case differ

A model is asked without examples, greedily, and an answer is right if the whole of it is that number. Of each item is
known what may explain it, with the word cut into tokens by itself:

    length, answer, answer / length, tokens, length / tokens, and of the two indices
    target: characters of the token in which the character at the answer's place stands

and r is Pearson's correlation of each with right (1) and wrong (0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import atanh, sqrt, tanh
from random import Random
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerBase

from peftx import Evaluation, ModelView, Plugin, PluginConfig, hookimpl
from peftx.engines.data import read_dataset, render_messages
from peftx.engines.models import asset_path
from peftx.errors import DataError, UnsupportedError
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.decoding.text import generate as write

Task = Literal["unique-characters", "frequency", "first-index", "last-index"]
GOLD: dict[Task, tuple[Callable[[str, str], int], str]] = {
    "unique-characters": (lambda w, c: len(set(w)), "How many different characters does '{w}' have?"),
    "frequency": (lambda w, c: w.count(c), "How often does the character '{c}' stand in '{w}'?"),
    "first-index": (str.index, "At which index, counted from 0, does '{c}' stand first in '{w}'?"),
    "last-index": (str.rindex, "At which index, counted from 0, does '{c}' stand last in '{w}'?"),
}
PROMPT = "Give the number only. Upper and lower case letters are different characters.\n\nQuestion: {question}\nAnswer:"


class CharBenchConfig(PluginConfig):
    """Options of CharBench; the paper has 6250 words of each length from 4 to 10 in each task."""

    words: str | None = Field(
        None, description="file whose texts give the words; the rows to evaluate on if left out"
    )
    pattern: str = Field("[a-zA-Z]+", min_length=1, description="what is a word: a regular expression")
    tasks: tuple[Task, ...] = Field(tuple(GOLD), min_length=1, description="tasks to ask")
    lengths: tuple[int, int] = Field((4, 10), description="shortest and longest word, in characters")
    count: int = Field(6250, ge=1, description="words of each length in each task")
    prompt: str = Field(PROMPT, description="what the model reads; {question} is the question")
    chat: bool = Field(False, description="ask by the tokenizer's chat template")
    answer: Literal["whole", "first-number"] = Field(
        "whole", description="what is read as the answer; whole: any further text makes it wrong"
    )
    max_new_tokens: int = Field(8, ge=1, description="tokens that an answer may have")
    batch_size: int = Field(16, ge=1, description="questions at once")
    strata: bool = Field(True, description="give the accuracy of each length, answer, tokens and target too")
    seed: int = Field(42, description="draws words and characters")

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task stands twice")
        return tasks

    @field_validator("lengths")
    @classmethod
    def _rising(cls, lengths: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= lengths[0] <= lengths[1]:
            raise ValueError("the shorter one comes first, and is 1 at least")
        return lengths

    @field_validator("pattern")
    @classmethod
    def _regular(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return pattern

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        if prompt.count("{question}") != 1:
            raise ValueError("it holds {question} exactly once")
        return prompt


@dataclass(frozen=True)
class Item:
    """One question. character: c; empty where the task has none. answer: the number that is right."""

    task: Task
    word: str
    character: str
    answer: int

    @property
    def question(self) -> str:
        return GOLD[self.task][1].replace("{c}", self.character).replace("{w}", self.word)


def words_of(texts: Iterable[str], pattern: str) -> list[str]:
    """The different words of texts, sorted, so that nothing hangs on their order."""
    return sorted({word for text in texts for word in re.findall(rf"\b(?:{pattern})\b", text)})


def generate(
    words: Sequence[str], *, tasks: Sequence[Task], lengths: tuple[int, int], count: int, seed: int
) -> list[Item]:
    """`count` items of every task and length, no word twice; the same for the same set of words and seed.

    Raises:
        DataError: too few words of a length.
    """
    rng, items = Random(seed), []
    for length in range(lengths[0], lengths[1] + 1):
        known = sorted({word for word in words if len(word) == length})
        if len(known) < count * len(tasks):
            most = len(known) // len(tasks)
            raise DataError(
                f"charbench: {len(known)} words of {length} characters, and {len(tasks)} tasks of {count} words each "
                f"need {count * len(tasks)}",
                hint=f"count: {most}" if most else "more text (`words`), or other `lengths`",
            )
        drawn = rng.sample(known, count * len(tasks))
        for number, word in enumerate(drawn):
            task, c = tasks[number // count], rng.choice(word)
            c = "" if task == "unique-characters" else c
            items.append(Item(task, word, c, GOLD[task][0](word, c)))
    return sorted(items, key=lambda item: tasks.index(item.task))


def features(item: Item, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """What may explain an answer, by name."""
    found = tokenizer(item.word, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = [(begin, end) for begin, end in found if begin < end]
    length, tokens = len(item.word), len(spans)
    known = {
        "length": length, "answer": item.answer, "answer-of-length": item.answer / length, "tokens": tokens,
        "compression": length / max(tokens, 1),
    }  # fmt: skip
    if item.task.endswith("index"):
        known["target"] = next((end - begin for begin, end in spans if begin <= item.answer < end), 0)
    return known


def read_answer(text: str, how: Literal["whole", "first-number"] = "whole") -> int | None:
    """The number that a model gave; None for none."""
    found = re.search(r"-?\d+", text) if how == "first-number" else re.fullmatch(r"\s*([+-]?\d+)\s*", text)
    return int(found[0]) if found else None


def correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Pearson's r with its 95 % interval, by Fisher's transformation; None where one of them does not vary, or of fewer
    than four pairs."""
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    r = float(np.corrcoef(x, y)[0, 1])
    z, reach = atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), 1.959964 / sqrt(len(x) - 3)
    return r, min(r, tanh(z - reach)), max(r, tanh(z + reach))


class CharBench(Plugin):
    """See the module."""

    Config = CharBenchConfig
    example = {"count": 1, "lengths": (5, 6), "max_new_tokens": 2, "prompt": "{question}"}
    example_rows = [
        {"prompt": f"stone river bread table {n}", "completion": f"window garden yellow silver {n}"}
        for n in range(8)
    ]
    config: CharBenchConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model, alone=False)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `charbench`, the accuracy over all items, `charbench/<task>`, `charbench/<task>/r/<feature>`, and with
        `strata` `charbench/<task>/<feature>/<value>`; all items go to `charbench.jsonl` in the run's folder.

        Raises:
            DataError: no words, or too few of a length. UnsupportedError: a tokenizer without offsets.
        """
        config, stack = self.config, evaluation.stack
        if not stack.tokenizer.is_fast:
            raise UnsupportedError(
                "charbench: this tokenizer does not say where its tokens stand", hint="a fast tokenizer does"
            )
        words = words_of(self._texts(evaluation), config.pattern)
        items = generate(
            words, tasks=config.tasks, lengths=config.lengths, count=config.count, seed=config.seed
        )
        known = [features(item, stack.tokenizer) for item in items]
        texts = self._ask(stack, items)
        right = [
            read_answer(text, config.answer) == item.answer for text, item in zip(texts, items, strict=True)
        ]
        evaluation.add_share("charbench", sum(right), len(right), "accuracy")
        for task in config.tasks:
            places = [i for i, item in enumerate(items) if item.task == task]
            of_task = [right[i] for i in places]
            evaluation.add_share(f"charbench/{task}", sum(of_task), len(of_task), "accuracy")
            for name in known[places[0]]:
                values = [known[i][name] for i in places]
                found = correlation(values, of_task)
                if found is not None:
                    evaluation.add(f"charbench/{task}/r/{name}", *found, len(values), "r")
                if config.strata and name in ("length", "answer", "tokens", "target"):
                    for value in sorted(set(values)):
                        part = [one for one, other in zip(of_task, values, strict=True) if other == value]
                        evaluation.add_share(
                            f"charbench/{task}/{name}/{value}", sum(part), len(part), "accuracy"
                        )
        if evaluation.output_dir is not None:
            evaluation.output_dir.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(
                    asdict(item) | {"features": known[i], "text": texts[i], "right": right[i]},
                    ensure_ascii=False,
                )
                for i, item in enumerate(items)
            ]
            (evaluation.output_dir / "charbench.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _ask(self, stack: Stack, items: Sequence[Item]) -> list[str]:
        """What the model writes behind each question."""
        config, texts = self.config, list[str]()
        prompts = [config.prompt.replace("{question}", item.question) for item in items]
        if config.chat:
            prompts = [render_messages(stack.tokenizer, [{"role": "user", "content": p}]) for p in prompts]
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            texts += write(stack, batch, config.max_new_tokens, None, {"do_sample": False})[0]
        return texts

    def _texts(self, evaluation: Evaluation) -> list[str]:
        """Texts that hold the words: of the file, else of the rows."""
        if self.config.words is not None:
            rows: Sequence[Any] = list(read_dataset(asset_path(self.config.words)))
        elif "eval" in evaluation.data:
            rows = evaluation.rows("eval")
        else:
            raise DataError(
                "charbench: no text to take words from", hint="set `words` to a file of texts, or give rows"
            )
        return [text for row in rows for text in _strings(row)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [part for name, part in value.items() if name != "role"]  # of a conversation
    parts = value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]
