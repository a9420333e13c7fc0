"""Which plugins go together: every ordered pair on a tiny model, built, trained, saved, reloaded and run, or refused.

    cells = run_matrix(["lora", "mezo", "prefixquant"])        # `peftx matrix` shows them

A pair *works* if it trains some steps to finite losses, is saved, comes back bit for bit and generates the same tokens.
It is *refused* if its claims collide: before anything is built, with the reason and the order that would work; or if
both want one place, and then the model is bit for bit what it was. It is
*not for this model* if one of the two cannot stand on the pair's architecture by itself. Anything else *failed*, and is
a bug.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

import peftx
from peftx.engines.bundle import holds_base
from peftx.errors import ArchitectureError, ConflictError, PeftxError, TargetError, UnsupportedError
from peftx.kernel.conflicts import find_conflicts, starting_format
from peftx.kernel.members import Member
from peftx.kernel.names import HOOKS
from peftx.kernel.plugin import Plugin
from peftx.kernel.registry import Registry
from peftx.stack import Stack
from peftx.testing.case import assert_equal, inputs_for, output
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.subject import ROWS_BY_FORMAT, TEXTS, steps_for

PROMPT = TEXTS[0][:32]  # two soft prompts stand before it, and the tiny models read 128 tokens

Outcome = Literal["works", "refused", "other-model", "failed"]
LENGTH = 112  # tokens of a row at most: the tiny models have positions for 128, soft tokens among them


@dataclass(frozen=True)
class Cell:
    """`first` before `second` in a stack.

    `order` is the one that works where this one is refused; `arch` the tiny model that it was tried on.
    """

    first: str
    second: str
    outcome: Outcome
    reason: str = ""
    claims: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    arch: str = ""
    seconds: float = 0.0


@dataclass
class Matrix:
    """All cells; `plugins` are grouped by hook, as a page shows them."""

    plugins: list[str]
    hooks: dict[str, str]
    """Plugin -> the hook that its folder names, the first of its metadata."""
    cells: list[Cell] = field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        return sum(cell.outcome == outcome for cell in self.cells)


def run_matrix(
    names: Sequence[str] = (),
    *,
    jobs: int = 1,
    pairs: Sequence[tuple[str, str]] | None = None,
    progress: Callable[[int, int, Cell], None] | None = None,
) -> Matrix:
    """Try every ordered pair of these plugins (of all that are installed), a plugin with itself included.

    Args:
        jobs: processes. pairs: only these. progress: called with (cells done, cells planned, the last one).

    Raises:
        RegistryError: a name that is not installed, or a plugin that does not import.
    """
    registry = Registry()
    chosen = list(dict.fromkeys(names)) or sorted(registry.names())
    for name in chosen:
        registry.load(name)
    hooks = {name: next(iter(registry.describe(name).hooks), "") for name in chosen}
    chosen.sort(key=lambda name: (HOOKS.index(hooks[name]) if hooks[name] else len(HOOKS), name))
    todo = [(a, b) for a in chosen for b in chosen] if pairs is None else list(pairs)
    found: dict[tuple[str, str], Cell] = {}

    def note(cell: Cell) -> None:
        found[cell.first, cell.second] = cell
        if progress is not None:
            progress(len(found), len(todo), cell)

    if jobs <= 1:
        for first, second in todo:
            note(try_pair(first, second))
    else:
        # A fresh interpreter for each: threads of torch do not survive a fork.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            for done in as_completed([pool.submit(try_pair, first, second) for first, second in todo]):
                note(done.result())
    return Matrix(chosen, hooks, [found[pair] for pair in todo])


def _one_thread() -> None:
    torch.set_num_threads(1)


def try_pair(first: str, second: str) -> Cell:
    """One cell. Whatever goes wrong is in it, never raised."""
    started = time.perf_counter()
    arch = _arch(first, second)

    def cell(outcome: Outcome, reason: str = "", **more: Any) -> Cell:
        seconds = round(time.perf_counter() - started, 3)
        return Cell(first, second, outcome, reason, arch=arch, seconds=seconds, **more)

    members = _members(first, second)
    conflicts = find_conflicts(members)
    if conflicts:
        conflict = conflicts[0]
        return cell("refused", conflict.reason, claims=conflict.claims, order=conflict.working_order)
    for name in dict.fromkeys((first, second)):
        if (why := _stands_on(name, arch)) is not None:
            return cell("other-model", why)
    model = tiny(arch)
    try:
        Stack(model, _members(first, second), tokenizer=tiny_tokenizer())
    except ConflictError as error:
        inputs = inputs_for(model)
        if not torch.equal(output(model, inputs), output(tiny(arch), inputs)):
            return cell("failed", f"refused, and the model is not what it was: {error}")
        shared = set(members[0].plugin.claims) & set(members[1].plugin.claims)
        return cell("refused", str(error), claims=tuple(sorted(shared)))
    except Exception as error:  # noqa: BLE001  as below
        return cell("failed", f"{type(error).__name__}: {error}")
    try:
        with tempfile.TemporaryDirectory(prefix="peftx-matrix-") as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            _use(members, arch, Path(folder) / "bundle")
    except (AssertionError, PeftxError) as error:
        return cell("failed", str(error) or "assertion failed")
    except Exception as error:  # noqa: BLE001  a pair may break in any way, and the table is to say so
        return cell("failed", f"{type(error).__name__}: {error}")
    return cell("works")


def _members(*names: str) -> list[Member]:
    registry = Registry()
    ids = [name if name not in names[:i] else f"{name}-2" for i, name in enumerate(names)]
    return [Member(id, _example(registry.load(name))) for id, name in zip(ids, names, strict=True)]


def _example(plugin: type[Plugin]) -> Plugin:
    return plugin(**plugin.example)


def _use(members: Sequence[Member], arch: str, folder: Path) -> None:
    """The life of a stack: train, compress, run, save, load, run again."""
    stack = Stack(tiny(arch), members, tokenizer=tiny_tokenizer())
    if stack.trainable_parameters():
        steps = steps_for(*(member.plugin for member in members))
        report = stack.train(
            _rows(members), steps=steps, batch_size=2, max_length=LENGTH, learning_rate=1e-3,
            sources=sources_of(members),
        )  # fmt: skip
        losses = [loss for _, loss in report.losses]
        assert all(map(math.isfinite, losses)), f"losses are {losses}"
    elif any(member.implements("prepare_data") for member in members):
        from peftx.engines.training.run import as_training_data

        stack.prepare(as_training_data(stack, _rows(members), seed=0, max_length=LENGTH))
    if any(member.implements("compress") for member in members):
        stack.compress(TEXTS, samples=4, length=24)
    inputs = inputs_for(stack.model)
    before, text = output(stack.model, inputs), stack.generate(PROMPT, max_new_tokens=4)
    assert bool(before.isfinite().all()), "some logits are not finite"
    stack.save(folder)
    model = None if holds_base(folder) else tiny(arch)
    again = peftx.load(folder, model=model, tokenizer=tiny_tokenizer())
    assert_equal(output(again.model, inputs), before, "logits loaded and saved")
    found = again.generate(PROMPT, max_new_tokens=4)
    assert found == text, f"generates {found!r} loaded and {text!r} saved"


def _rows(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """A plugin's own examples, else rows of a format that goes through."""
    own = next((member.plugin.example_rows for member in members if member.plugin.example_rows), None)
    if own is not None:
        return list(own)
    return list(ROWS_BY_FORMAT[starting_format(members) or "prompt-completion"])


def sources_of(members: Sequence[Member]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Rows of every further source that a plugin asks for."""
    return {name: rows for member in members for name, rows in member.plugin.sources.items()}


def _arch(*names: str) -> str:
    """`llama`; where a plugin does not stand on it, the first architecture that it names."""
    registry = Registry()
    for name in names:
        if _stands_on(name, "llama") is not None and registry.load(name).architectures:
            return registry.load(name).architectures[0]
    return "llama"


@cache
def _stands_on(name: str, arch: str) -> str | None:
    """Why a plugin alone has no place on a tiny model; None if it has."""
    try:
        if arch == "llama":
            Stack(tiny(arch), _members(name), tokenizer=tiny_tokenizer())
        else:  # only the whole life tells, as for drafts on a model without a cache that can be cut
            with tempfile.TemporaryDirectory(prefix="peftx-matrix-") as folder:
                _use(_members(name), arch, Path(folder) / "bundle")
    except (ArchitectureError, TargetError, UnsupportedError) as error:
        return str(error)
    except PeftxError:
        return None  # it needs a companion, which a pair may have
    return None
