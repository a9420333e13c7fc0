"""The life of a stack on a tiny model: trained, compressed, run, measured, served, saved, loaded, run again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import peftx
from peftx.composition.conflicts import find_conflicts, starting_format
from peftx.engines.bundle import holds_base
from peftx.kernel.members import Member
from peftx.kernel.positions import free_positions
from peftx.stack import Stack
from peftx.testing.case import assert_equal, inputs_for, output
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import COMPANION, ReferenceGain, ReferenceLowRank
from peftx.testing.shapes import RECIPES
from peftx.testing.subject import ROWS_BY_FORMAT, TEXTS, steps_for
from peftx.toolkits.serving import Engine, Request, Server
from peftx_spec.models import FORMATS

OWN_COLUMNS = frozenset(name for names in FORMATS.values() for name in names)
"""What formats are made of: from one plugin's examples alone."""
WAIT = 120.0  # seconds for an answer
LEAST_ROWS = 12  # of which plugins that choose leave some
MEASURED = 4  # rows that a metric looks at
PROMPT = TEXTS[0][:32]  # soft prompts stand before it
LENGTH = 112  # tokens of a row at most
POSITIONS = 256  # of the models: soft tokens of a stack stand in front of a row


def model_of(arch: str) -> PreTrainedModel:
    """The tiny model of a stack, with more positions than it has elsewhere; a copy of one that is made once."""
    return deepcopy(_model(arch))


@cache
def _model(arch: str) -> PreTrainedModel:
    names = RECIPES[arch].options.keys() & {"max_position_embeddings", "n_positions"}
    return tiny(arch, **dict.fromkeys(names, POSITIONS))


def live(
    members: Sequence[Member], arch: str, folder: Path, *, measured: Collection[str] | None = None
) -> None:
    """The life of a stack: train, compress, run, measure, serve, save, load, run again. Each plugin that has parameters
    trains; where nothing trains, a companion does.

    Args:
        measured: ids of those whose metric and policy are asked for; all if left out.
    """
    stack = built(members, model_of(arch))
    if not stack.trainable_parameters():
        members = accompanied(members)
        stack = built(members, model_of(arch))
    before = {
        id: [(p, p.detach().clone()) for p in stack.ledger.parameters(id) if p.requires_grad]
        for id in stack.plugins
    }
    steps = steps_for(*(member.plugin for member in members))
    report = stack.train(
        rows_of(members),
        steps=steps,
        batch_size=2,
        max_length=length_of(stack),
        learning_rate=1e-3,
        sources=sources_of(members),
    )
    losses = [loss for _, loss in report.losses]
    assert all(map(math.isfinite, losses)), f"losses are {losses}"
    for id, held in before.items():
        assert not held or not all(torch.equal(p, old) for p, old in held), f"no parameter of {id} moved"
    todo = [m.id for m in members if m.implements("compress") and not stack.standing[m.id].compressed]
    if todo:
        stack.compress(TEXTS, todo, samples=4, length=24)
    inputs = inputs_for(stack.model)
    logits, text = output(stack.model, inputs), stack.generate(PROMPT, max_new_tokens=4)
    assert bool(logits.isfinite().all()), "some logits are not finite"
    asked = [m.id for m in members if measured is None or m.id in measured]
    for member in (m for m in stack.implementers("evaluate") if m.id in asked):
        scores = stack.evaluate(
            rows_of([member])[:MEASURED], metrics=[member.id], max_length=length_of(stack)
        )
        assert all(math.isfinite(score.value) for score in scores.values()), f"{member.id}: {scores}"
    if any(member.id in asked for member in stack.implementers("serve")):
        with Engine(Server(stack)) as engine:
            answer = engine.submit(Request(PROMPT, max_tokens=4, temperature=0.0)).result(WAIT).text
        assert answer == text, f"serves {answer!r} and generates {text!r}"
    stack.save(folder)
    model = None if holds_base(folder) else model_of(arch)
    again = peftx.load(folder, model=model, tokenizer=tiny_tokenizer())
    assert_equal(output(again.model, inputs), logits, "logits loaded and saved")
    found = again.generate(PROMPT, max_new_tokens=4)
    assert found == text, f"generates {found!r} loaded and {text!r} saved"


def built(members: Sequence[Member], model: PreTrainedModel) -> Stack:
    """As a run builds it: what stands before the first plugin that injects compresses the plain model."""
    early = early_ids(members)
    stack = Stack(model, members, tokenizer=tiny_tokenizer(), inject=not early)
    if early:
        stack.compress(TEXTS, early, samples=4, length=24)
        stack.inject()
    return stack


def length_of(stack: Stack) -> int:
    """Tokens of a row at most: behind soft tokens there may be fewer places."""
    return min(LENGTH, free_positions(stack.model) or LENGTH)


def early_ids(members: Sequence[Member]) -> list[str]:
    """Who compresses before anything is injected."""
    first = next((i for i, m in enumerate(members) if m.implements("inject")), len(members))
    return [
        m.id
        for i, m in enumerate(members)
        if m.implements("compress")
        and (i < first < len(members) if m.phase is None else m.phase == "before-training")
    ]


def accompanied(members: Sequence[Member]) -> list[Member]:
    """With one of the kit's plugins that trains, the first that goes with them: in front, else behind what compresses
    the plain model."""
    early = [m for m in members if m.id in early_ids(members)]
    late = [m for m in members if m not in early]
    for plugin in (ReferenceLowRank(), ReferenceGain()):
        own = Member(COMPANION, plugin)
        for found in ([*early, own, *late], [own, *members], [*members, own]):
            if not find_conflicts(found):
                return found
    raise AssertionError("nothing trains, and nothing that does goes with it")


def rows_of(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """The examples of a plugin that trains on rows of one kind, else of any, else rows of a format that goes through;
    with the further columns of all others' examples, and as many as the most of them."""
    given = [m.plugin for m in members if m.plugin.example_rows]
    format = starting_format(members)
    fitting = [p for p in given if format is None or p.example_rows[0].keys() >= set(FORMATS[format])]
    first = next((p for p in fitting if p.takes), fitting[0] if fitting else None)
    rows = first.example_rows if first is not None else ROWS_BY_FORMAT[format or "prompt-completion"]
    most = max([LEAST_ROWS, len(rows), *(len(plugin.example_rows) for plugin in given)])
    return [
        {name: value for plugin in given for name, value in plugin.example_rows[i % len(plugin.example_rows)].items()
         if name not in OWN_COLUMNS}
        | dict(rows[i % len(rows)])
        for i in range(most)
    ]  # fmt: skip


def sources_of(members: Sequence[Member]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Rows of every further source that a plugin asks for."""
    return {name: rows for member in members for name, rows in member.plugin.sources.items()}
