"""CLUE: right and wrong solutions lie apart in how far hidden states move from a thought's start to its end.

"CLUE: Non-parametric Verification from Experience via Hidden-State Clustering" (arXiv:2510.01591). Of a solution T with
a marked thought, h(T, t)_l is the state of token t after block l = 1..L, with D numbers:

    delta(T)  = h(T, last token of </think>) - h(T, last token of <think>)         [L, D]
    V_succ    = mean of delta over right solutions of the experience,  V_fail over as many wrong ones
    d(A, B)   = 1/L sum_l ||A_l - B_l||_2
    right     where d(delta, V_succ) < d(delta, V_fail)
    top-maj@m = the answer that is most frequent among the m solutions of a problem with the least d(delta, V_succ)

Nothing is trained. Centroids are those of one model: they are learned anew of whatever stack is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftx import Evaluation, ModelView, Plugin, PluginConfig, hookimpl
from peftx.engines.data import (
    Collator,
    Place,
    continuation,
    following_ids,
    pair_of,
    prompt_ids,
    read_dataset,
    render_messages,
)
from peftx.engines.models import asset_path
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.objective import pad_of
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.text import check_writes, generate
from peftx.toolkits.evaluation import (
    context_window,
    evaluating,
    last_number,
    normalise_answer,
)

SAMPLES = "samples"
"""Column of solutions that somebody else drew."""


class ClueConfig(PluginConfig):
    """Options of CLUE; the paper draws 32 solutions of a problem for experience and ranks 64."""

    experience: str | None = Field(
        None, description="file of problems to learn from; none: the first of the rows, by `share`"
    )
    share: float = Field(0.5, gt=0, lt=1, description="of the rows that are experience where no file is")
    experience_samples: int = Field(32, ge=1, description="solutions drawn of a problem of experience")
    per_class: int = Field(10000, ge=1, description="right solutions at most in V_succ, wrong in V_fail")
    samples: int = Field(64, ge=1, description="solutions drawn of a problem that is measured")
    best: tuple[int, ...] = Field((1, 4, 8, 16), min_length=1, description="m: how many vote; 1: the first")
    marks: tuple[str, str] = Field(
        ("<think>", "</think>"), description="what opens and what closes a thought; see The method"
    )
    answer: Literal["last-number", "whole"] = Field(
        "last-number", description="what counts of the text behind a thought"
    )
    chat: bool = Field(False, description="ask by the tokenizer's chat template")
    max_new_tokens: int = Field(1024, ge=1, description="tokens that a solution may have")
    temperature: float = Field(0.6, gt=0, description="of drawing solutions")
    top_p: float = Field(0.95, gt=0, le=1, description="mass of the tokens that are drawn from")
    batch_size: int = Field(16, ge=1, description="solutions at once")
    seed: int = Field(0, description="draws solutions, and which of them are experience")

    @field_validator("best")
    @classmethod
    def _counts(cls, best: tuple[int, ...]) -> tuple[int, ...]:
        if min(best) < 1 or len(set(best)) < len(best):
            raise ValueError("numbers from 1, each once")
        return best

    @field_validator("marks")
    @classmethod
    def _seen(cls, marks: tuple[str, str]) -> tuple[str, str]:
        if "" in marks:
            raise ValueError("a mark has a character at least")
        return marks


@dataclass(frozen=True)
class Solution:
    """A text that solves a problem. before: all up to where its thought begins; thought: from there to its end; answer:
    what counts behind it, None for nothing."""

    text: str
    before: str
    thought: str
    answer: str | None


@dataclass(frozen=True)
class Problem:
    """A prompt, the answer that is right, and solutions."""

    prompt: str
    gold: str
    solutions: list[Solution]

    @property
    def right(self) -> list[bool]:
        return [s.answer == self.gold for s in self.solutions]


def cut(prompt: str, text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    """What a solution is up to the end of the opening mark, from there to the end of the closing one, and behind that.

    Without an opening mark the thought begins with the solution, without a closing one it ends with it; without both
    it is the solution, and so is what counts.
    """
    whole, opening = prompt + continuation(prompt, text), len(prompt.rstrip()) - len(marks[0])
    closed = whole.find(marks[1], len(prompt))
    end = len(whole) if closed < 0 else closed + len(marks[1])
    opened = whole.rfind(marks[0], max(0, opening), end)  # a prompt may end with it
    start = len(prompt) if opened < 0 else opened + len(marks[0])
    return whole[:start], whole[start:end], text if max(closed, opened) < 0 else whole[end:]


def deltas(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, solutions: Sequence[Solution]
) -> Tensor:
    """delta of each: float32 [N, L, D], on the CPU.

    Raises:
        DataError: one is longer than what the model reads.
    """
    pairs = [(prompt_ids(tokenizer, s.before), following_ids(tokenizer, s.thought)) for s in solutions]
    longest, limit = max(len(before) + len(t) for before, t in pairs), context_window(model, tokenizer)
    if longest > limit:
        said = f"clue: a solution has {longest} tokens up to its thought's end, and the model reads {limit}"
        raise DataError(said, hint="a smaller `max_new_tokens`, or shorter samples")
    rows = [{"input_ids": before + thought} for before, thought in pairs]
    batch = Collator(pad_of(model, tokenizer), padding_side="right")(rows)
    with evaluating(model):
        output = model(**{name: x.to(model.device) for name, x in batch.items()}, output_hidden_states=True)
    row, ends = torch.arange(len(rows)), torch.tensor([(len(b) - 1, len(b) + len(t) - 1) for b, t in pairs])
    h = torch.stack([x.cpu()[row[:, None], ends].float() for x in output.hidden_states[1:]], 2)
    return h[:, 1] - h[:, 0]  # of [N, 2, L, D]


def d(A: Tensor, B: Tensor) -> Tensor:
    """The distance of each of A, [N, L, D], from B, [L, D]: float64 [N]."""
    return (A.double() - B).norm(dim=-1).mean(-1)


def vote(answers: Sequence[str | None], gold: str) -> list[bool]:
    """Of the most frequent answers, in the order of their first: which are right. None is no answer."""
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    return [answer == gold for answer, n in counts.items() if n == max(counts.values())]


class Clue(Plugin):
    """See the module."""

    Config = ClueConfig
    example = {"best": (1, 2)}
    example_rows = tuple(
        {"prompt": f"{n} + 1 =", "completion": str(n + 1), SAMPLES: [str(n + 1), str(n), f"{n}1"]}
        for n in range(4)
    )
    refuses = {
        "bert": "it writes no text",
        "t5": "problem and solution are in two towers",
        "vit": "it writes no text",
        "gemma3n": "it has several states for each token",
    }
    config: ClueConfig
    V: tuple[Tensor, Tensor]
    """V_succ and V_fail, float64 [L, D], of `learn`."""

    def suits(self, model: ModelView) -> None:
        check_writes(model)
        if getattr(model.config.get_text_config(), "altup_num_inputs", 1) > 1:
            said = f"{model.owner}: {type(model.module).__name__} has several hidden states for each token"
            raise ArchitectureError(said, hint="take a model that has one: Llama, Qwen, GPT-2")

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `clue/verified`, the share of solutions that are classified as they should be, and the same of right ones
        as `clue/verified/right`, of wrong ones as `clue/verified/wrong`; `clue/mean`, the share that is right; of
        problems `clue/majority` and `clue/top-maj-<m>`. All solutions go to `clue.jsonl` in the run's folder.

        Raises:
            DataError: rows that are no problems; or experience has no right solution, or no wrong one.
        """
        stack, config = evaluation.stack, self.config
        known, asked = self._rows(evaluation)
        self.learn(stack, known)
        problems = self._problems(stack, asked, config.samples)
        far = [self.distances(stack, problem.solutions) for problem in problems]
        told = [
            [(right, right == (succ < fail)) for right, (succ, fail) in zip(p.right, f.tolist(), strict=True)]
            for p, f in zip(problems, far, strict=True)
        ]
        _add(evaluation, "verified", [[hit for _, hit in group] for group in told])
        for name, kind in (("right", True), ("wrong", False)):
            _add(evaluation, f"verified/{name}", [[hit for r, hit in group if r is kind] for group in told])
        _add(evaluation, "mean", [p.right for p in problems])
        votes = [vote([s.answer for s in p.solutions], p.gold) or [False] for p in problems]
        _add(evaluation, "majority", [[sum(tied) / len(tied)] for tied in votes])  # the mean over ties
        for m in config.best:
            best = [
                [p.solutions[i].answer for i in _order(f)[:m]] for p, f in zip(problems, far, strict=True)
            ]
            first = [(vote(a, p.gold) or [False])[:1] for a, p in zip(best, problems, strict=True)]
            _add(evaluation, f"top-maj-{m}", first)  # a tie goes to the nearest solution's answer
        if evaluation.output_dir is not None:
            _write(evaluation.output_dir, problems, far)

    def learn(self, stack: Stack, rows: Sequence[Mapping[str, Any]]) -> None:
        """V, of solutions of these problems, with as many right ones as wrong ones."""
        found: dict[bool, list[Solution]] = {True: [], False: []}
        for problem in self._problems(stack, rows, self.config.experience_samples):
            for solution, right in zip(problem.solutions, problem.right, strict=True):
                found[right].append(solution)
        n = min(len(found[True]), len(found[False]), self.config.per_class)
        if not n:
            said = f"clue: {len(found[True])} right and {len(found[False])} wrong solutions to learn from"
            raise DataError(
                said, hint="problems that the model solves now and then, or more solutions of each"
            )
        rng = Random(self.config.seed)
        chosen = [rng.sample(found[kind], n) for kind in (True, False)]
        succ, fail = (sum(x.double().sum(0) for x in self._deltas(stack, each)) / n for each in chosen)
        self.V = succ, fail

    def distances(self, stack: Stack, solutions: Sequence[Solution]) -> Tensor:
        """d(delta, V_succ) and d(delta, V_fail) of each: float64 [N, 2]."""
        delta = torch.cat(list(self._deltas(stack, solutions)))
        return torch.stack([d(delta, V) for V in self.V], 1)

    def rank(self, stack: Stack, prompt: str, texts: Sequence[str]) -> list[int]:
        """Numbers of the texts that solve a problem, the one that is nearest to right ones first."""
        return _order(self.distances(stack, [self.solution(prompt, text) for text in texts]))

    def solution(self, prompt: str, text: str) -> Solution:
        """A text as `distances` takes it; `prompt` is all that the model read."""
        before, thought, rest = cut(prompt, text, self.config.marks)
        return Solution(text, before, thought, self._answer(rest))

    def _answer(self, text: str) -> str | None:
        return last_number(text) if self.config.answer == "last-number" else normalise_answer(text) or None

    def _deltas(self, stack: Stack, solutions: Sequence[Solution]) -> Iterator[Tensor]:
        for start in range(0, len(solutions), self.config.batch_size):
            yield deltas(stack.model, stack.tokenizer, solutions[start : start + self.config.batch_size])

    def _problems(self, stack: Stack, rows: Sequence[Mapping[str, Any]], count: int) -> list[Problem]:
        """Rows with the solutions that they bring, else with `count` that the stack draws."""
        config, asked, golds = self.config, [pair_of(row) for row in rows], list[str]()
        for number, (_, reference) in enumerate(asked):
            if (gold := self._answer(reference)) is None:
                said = f"clue: {Place(rows, number)}: no answer in the completion {reference!r:.60}"
                raise DataError(said, hint="`answer` says what is read of a `completion`")
            golds.append(gold)
        prompts = [prompt for prompt, _ in asked]
        if config.chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [render_messages(stack.tokenizer, turn) for turn in turns]
        open_ = [prompt for prompt, row in zip(prompts, rows, strict=True) if not row.get(SAMPLES)]
        drawn = iter(self._draw(stack, [prompt for prompt in open_ for _ in range(count)]))
        return [
            Problem(
                prompt,
                gold,
                [self.solution(prompt, text) for text in row.get(SAMPLES) or islice(drawn, count)],
            )
            for prompt, gold, row in zip(prompts, golds, rows, strict=True)
        ]

    def _draw(self, stack: Stack, prompts: Sequence[str]) -> Iterator[str]:
        config = self.config
        options = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        for start in range(0, len(prompts), config.batch_size):
            batch = list(prompts[start : start + config.batch_size])
            # Another seed for each batch: equal prompts would get equal texts.
            yield from generate(stack, batch, config.max_new_tokens, config.seed + start, options)[0]

    def _rows(self, evaluation: Evaluation) -> tuple[list[Any], list[Any]]:
        """Problems to learn from, and problems to measure on."""
        config, rows = self.config, list(evaluation.rows("eval"))
        if config.experience is not None:
            known = list(read_dataset(asset_path(config.experience)))
        else:
            first = round(len(rows) * config.share)
            known, rows = rows[:first], rows[first:]
        if not known or not rows or not all(isinstance(row, Mapping) for row in known + rows):
            said = (
                f"clue: {len(known)} rows to learn from and {len(rows)} to measure on, or one is no problem"
            )
            raise DataError(said, hint="more rows, with `prompt` and `completion`, or a file in `experience`")
        fewest = min(len(row.get(SAMPLES) or range(config.samples)) for row in rows)
        if fewest < max(config.best):
            said = f"clue: a problem has {fewest} solutions, and `best` asks for {max(config.best)}"
            raise DataError(said, hint=f"numbers up to {fewest} in `best`, or more `samples`")
        return known, rows


def _order(far: Tensor) -> list[int]:
    return far[:, 0].argsort(stable=True).tolist()


def _add(evaluation: Evaluation, name: str, groups: Sequence[Sequence[float]]) -> None:
    """The mean of all, with an interval over problems; of nothing no score."""
    filled = [group for group in groups if group]
    if filled:
        sums, counts = [sum(group) for group in filled], [len(group) for group in filled]
        evaluation.add_ratio(f"clue/{name}", sums, counts, "accuracy")


def _write(folder: Path, problems: Sequence[Problem], far: Sequence[Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"prompt": p.prompt, **asdict(s), "right": right, "distances": to}, ensure_ascii=False)
        for p, each in zip(problems, far, strict=True)
        for s, right, to in zip(p.solutions, p.right, each.tolist(), strict=True)
    ]
    (folder / "clue.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
