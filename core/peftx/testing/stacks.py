"""Random stacks of installed plugins on tiny models, each lived through as a run would.

    results = [try_stack(recipe) for recipe in draw(150, seed=0)]     # benchmarks/stacks.py shows them

A stack *works* if it is built, trains, compresses, measures, generates, is saved, comes back bit for bit with the same
tensors that train, and goes: after the removal of every plugin the base is, bit for bit, what it was. Else it is
refused *before* the build (by claims alone), *at the build*, *at the start* of the training, before a step was made, or
*late*, when one was paid for. Anything else *failed*. What is refused late or failed is a bug, and so is what is
refused at the start or at the build and `plan` says nothing of it.
"""

from __future__ import annotations

import math
import random
import re
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

import peftx
from peftx.composition.conflicts import check, starting_format
from peftx.engines.bundle import holds_base
from peftx.errors import ConflictError, DataError, MergeError, PeftxError
from peftx.kernel.ledger import carried
from peftx.kernel.objective import objective_of
from peftx.kernel.plugin import Claim
from peftx.stack import Stack
from peftx.testing.case import assert_equal, assert_same_tensors, base_tensors, crashed, inputs_for, output
from peftx.testing.life import PROMPT, built, early_ids, length_of, rows_of, sources_of
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.planned import refused_by_plan
from peftx.testing.recipes import (
    SAYINGS,
    Outcome,
    Recipe,
    Until,
    registry,
)
from peftx.testing.subject import DECODERS, GENERATIVE, ROWS, ROWS_BY_FORMAT, TEXTS, default_rows, steps_for

WRITTEN = 12
"""Tokens of a text: so many that what drafts by what was written has something to go by."""


@dataclass(frozen=True)
class Result:
    """What became of a stack: at which stage it stopped, and why."""

    recipe: Recipe
    outcome: Outcome
    stage: str = ""
    reason: str = ""
    hint: str = ""
    planned: tuple[str, ...] = ()
    """Why `plan` says that it cannot be."""
    steps: int = 0
    """Steps of training that were made."""
    still: tuple[str, ...] = ()
    """Plugins whose parameters are meant to train, and of which none moved."""

    @property
    def finding(self) -> bool:
        """Is it a bug, of the stack or of the plan."""
        known = ("works", "refused-before-build")
        if self.outcome in ("failed", "refused-late"):
            return True
        return bool(self.planned) == (self.outcome in known[:1]) and self.outcome != known[1]

    @property
    def cause(self) -> str:
        """What results of one cause have in common: the reason without places, numbers and the ids of others."""
        first = self.reason.splitlines()[0] if self.reason else ""
        speaker = min((id for id in self.recipe.ids if id in first), key=first.index, default="")
        text = re.sub(r"\w+(\.\w+){2,}(@[\w.]+)?", "...", first)
        for id in sorted(self.recipe.ids, key=len, reverse=True):
            if id != speaker:
                text = re.sub(rf"(?<![\w-]){re.escape(id)}(?![\w-])", "#", text)
        return f"{self.outcome}, {self.stage}: " + re.sub(r"[-+]?\d+(\.\d+)?(e-?\d+)?", "N", text)


# -- living ----------------------------------------------------------------------------------------------------------


def try_stack(recipe: Recipe, *, until: Until = "removal") -> Result:
    """One stack, from its check to here; only a whole one is planned. Nothing is raised: the result says it."""
    life = Life(recipe, until)
    with tempfile.TemporaryDirectory(prefix="peftx-stacks-") as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            life.live(Path(folder) / "bundle")
        except PeftxError as error:
            outcome = "failed" if crashed(error) else life.refusal
            return life.result(outcome, error.message, error.hint or "")
        except AssertionError as error:
            return life.result("failed", str(error) or "assertion failed")
        except Exception as error:  # noqa: BLE001  a stack may break in any way, and the result is to say so
            return life.result("failed", f"{type(error).__name__}: {error}")
    return life.result("works")


class Life:
    """A stack from stage to stage."""

    def __init__(self, recipe: Recipe, until: Until = "removal") -> None:
        self.recipe = recipe
        self.until = until
        self.stage = "check"
        self.steps = 0
        self.still: tuple[str, ...] = ()

    @property
    def refusal(self) -> Outcome:
        """What a refusal is called now."""
        if self.stage == "check":
            return "refused-before-build"
        if self.stage == "build":
            return "refused-at-build"
        return "refused-late" if self.steps else "refused-at-start"

    def result(self, outcome: Outcome, reason: str = "", hint: str = "") -> Result:
        planned = tuple(plan_of(self.recipe)) if self.until == "removal" else ()
        return Result(self.recipe, outcome, self.stage, reason, hint, planned, self.steps, self.still)

    def live(self, folder: Path) -> None:
        """Everything that is asked for, in order. folder: for the bundle."""
        check(self.recipe.members())
        self.stage = "build"
        stack = self.built()
        if self.until == "build":
            return
        if not stack.trainable_parameters():
            self.recipe = self.recipe.accompanied()
            self.stage = "check"
            check(self.recipe.members())
            self.stage = "build"
            stack = self.built()
        self.stage = "train"
        self.train(stack)
        self.stage = "compress"
        if self.recipe.merges:
            stack.merge(keep=False)
        if todo := [
            m.id for m in stack.members if m.implements("compress") and not stack.standing[m.id].compressed
        ]:
            stack.compress(TEXTS, todo, samples=4, length=24)
        if self.until == "compression":
            return
        self.use(stack, folder)

    def use(self, stack: Stack, folder: Path) -> None:
        """Run, measure, save, load, and take apart."""
        self.stage = "run"
        inputs = inputs_for(stack.model)
        logits, text = output(stack.model, inputs), self.generated(stack)
        assert bool(logits.isfinite().all()), "some logits are not finite"
        self.stage = "evaluate"
        self.evaluate(stack)
        assert_equal(output(stack.model, inputs), logits, "logits after and before the evaluation")
        self.stage = "save"
        stack.save(folder)
        self.stage = "load"
        base = None if holds_base(folder) else tiny(self.recipe.arch)
        again = peftx.load(folder, model=base, tokenizer=tiny_tokenizer(), registry=registry())
        assert_equal(output(again.model, inputs), logits, "logits loaded and saved")
        found = self.generated(again)
        assert found == text, f"generates {found!r} loaded and {text!r} saved"
        names = [{n for n, p in s.model.named_parameters() if p.requires_grad} for s in (stack, again)]
        self.stage = "remove"
        self.remove(stack)
        self.stage = "load"
        more, less = sorted(names[1] - names[0]), sorted(names[0] - names[1])
        assert not more, f"{len(more)} tensors train again after a load: {more[0]}"
        assert not less, f"{len(less)} tensors do not train after a load: {less[0]}"

    def built(self) -> Stack:
        """As a run builds it: what stands before the first plugin that injects compresses the plain model."""
        members, model = self.recipe.members(), tiny(self.recipe.arch)
        try:
            return built(members, model)
        except PeftxError:
            if not early_ids(members):  # those change it for good
                self.unchanged(model, "the model after the refusal")
            raise

    def unchanged(self, model: Any, what: str) -> None:
        fresh = tiny(self.recipe.arch).requires_grad_(False)  # some kernels round otherwise with gradients
        model.requires_grad_(False)
        left = carried(model)
        assert not left, f"{what} still carries {', '.join(left)}"
        assert_same_tensors(base_tensors(model), base_tensors(fresh), what)
        inputs = inputs_for(fresh)
        assert_equal(output(model, inputs), output(fresh, inputs), f"logits of {what}")

    def train(self, stack: Stack) -> None:
        before = {
            id: [(p, p.detach().clone()) for p in stack.ledger.parameters(id) if p.requires_grad]
            for id in stack.plugins
        }

        def count(done: int, *_: Any) -> None:
            self.steps = done

        rows = rows_of(stack.members)
        if objective_of(stack.model) == "masked-token" and starting_format(stack.members) is None:
            stack.tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
            rows = list(ROWS_BY_FORMAT["text"])
        report = stack.train(
            rows,
            steps=steps_for(*(member.plugin for member in stack.members)),
            batch_size=2,
            max_length=length_of(stack),
            learning_rate=1e-3,
            progress=count,
            sources=sources_of(stack.members),
        )
        losses = [loss for _, loss in report.losses]
        assert all(map(math.isfinite, losses)), f"losses are {losses}"
        still = {id: all(torch.equal(p, old) for p, old in pairs) for id, pairs in before.items() if pairs}
        assert not all(still.values()), f"no parameter of {', '.join(still)} moved"
        self.still = tuple(id for id, rests in still.items() if rests)

    def generated(self, stack: Stack) -> str | None:
        """A few tokens; what claims to change none of them is tried without."""
        if self.recipe.arch not in GENERATIVE:
            return None
        text: str = stack.generate(PROMPT, max_new_tokens=WRITTEN)
        for member in stack.members:
            if member.claims(Claim.LOSSLESS_DECODING):
                with stack.disabled(member.id):
                    plain = stack.generate(PROMPT, max_new_tokens=WRITTEN)
                assert plain == text, f"{member.id}: generates {text!r}, and {plain!r} switched off"
        return text

    def evaluate(self, stack: Stack) -> None:
        """What a run measures: a metric, and every plugin's own numbers."""
        if any(member.claims(Claim.CLASSIFIES) for member in stack.members):
            stack.evaluate(
                list(ROWS_BY_FORMAT["classification"]), metrics=["accuracy"], max_length=length_of(stack)
            )
        elif self.recipe.arch in DECODERS:
            stack.evaluate(list(ROWS), metrics=["perplexity"], max_length=length_of(stack))
        for member in stack.members:
            if member.implements("evaluate"):
                rows = [{**SAYINGS, **row} for row in default_rows(type(member.plugin))]
                with suppress(DataError):  # of rows that are too long for this model, not of the stack
                    stack.evaluate(rows, metrics=[member.id], max_length=length_of(stack))

    def remove(self, stack: Stack) -> None:
        """In any order; what another one stands on waits for it, and what is folded for good stays."""
        waiting = list(stack.plugins)
        random.Random(str(self.recipe)).shuffle(waiting)
        folded = {id for id, at in stack.standing.items() if at.folded}
        reasons: dict[str, str] = {}
        for _ in range(len(waiting) ** 2):
            if not waiting:
                break
            id = waiting.pop(0)
            try:
                stack.remove(id)
            except (ConflictError, MergeError) as error:
                reasons[id] = str(error)
                waiting.append(id)
        stuck = [reasons[id] for id in waiting if id not in folded]
        assert not stuck or folded, f"cannot be removed: {stuck[0]}"
        if not waiting:
            self.unchanged(stack.model, "the model after all removals")


def shrunk(result: Result) -> Result:
    """The same finding with as few plugins as show it."""
    for id in result.recipe.ids:
        less = try_stack(result.recipe.without(id)) if len(result.recipe.ids) > 1 else result
        fewer = len(less.recipe.ids) < len(result.recipe.ids)  # a companion comes back
        if fewer and less.finding and less.cause == result.cause:
            return shrunk(less)
    return result


def plan_of(recipe: Recipe) -> list[str]:
    """Why `plan` says that the stack cannot be; empty if it says nothing."""
    entries = [
        {"use": e.name, "id": e.key, "with": to_jsonable_python(e.options)}
        | ({"phase": e.phase} if e.phase else {})
        for e in recipe.entries
    ]
    return refused_by_plan(entries, recipe.arch, registry())
