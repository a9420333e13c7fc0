"""The life of a stack on a tiny model: trained, compressed, run, saved, loaded, run again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import peftx
from peftx.composition.conflicts import find_conflicts, starting_format
from peftx.engines.bundle import holds_base
from peftx.kernel.members import Member
from peftx.stack import Stack
from peftx.testing.case import assert_equal, inputs_for, output
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import COMPANION, ReferenceGain, ReferenceLowRank
from peftx.testing.subject import ROWS_BY_FORMAT, TEXTS, steps_for

PROMPT = TEXTS[0][:32]  # two soft prompts stand before it, and the tiny models read 128 tokens
LENGTH = 112  # tokens of a row at most: the tiny models have positions for 128, soft tokens among them


def live(members: Sequence[Member], arch: str, folder: Path) -> None:
    """The life of a stack: train, compress, run, save, load, run again. Where nothing trains, a companion does."""
    stack = Stack(tiny(arch), members, tokenizer=tiny_tokenizer())
    if not stack.trainable_parameters():
        members = accompanied(members)
        stack = Stack(tiny(arch), members, tokenizer=tiny_tokenizer())
    before = [(p, p.detach().clone()) for p in stack.model.parameters() if p.requires_grad]
    steps = steps_for(*(member.plugin for member in members))
    report = stack.train(
        rows_of(members),
        steps=steps,
        batch_size=2,
        max_length=LENGTH,
        learning_rate=1e-3,
        sources=sources_of(members),
    )
    losses = [loss for _, loss in report.losses]
    assert all(map(math.isfinite, losses)), f"losses are {losses}"
    assert not all(torch.equal(p, old) for p, old in before), "no parameter moved"
    if any(member.implements("compress") for member in members):
        stack.compress(TEXTS, samples=4, length=24)
    inputs = inputs_for(stack.model)
    logits, text = output(stack.model, inputs), stack.generate(PROMPT, max_new_tokens=4)
    assert bool(logits.isfinite().all()), "some logits are not finite"
    stack.save(folder)
    model = None if holds_base(folder) else tiny(arch)
    again = peftx.load(folder, model=model, tokenizer=tiny_tokenizer())
    assert_equal(output(again.model, inputs), logits, "logits loaded and saved")
    found = again.generate(PROMPT, max_new_tokens=4)
    assert found == text, f"generates {found!r} loaded and {text!r} saved"


def accompanied(members: Sequence[Member]) -> list[Member]:
    """With one of the kit's plugins that trains in front, the first that goes with them."""
    for plugin in (ReferenceLowRank(), ReferenceGain()):
        found = [Member(COMPANION, plugin), *members]
        if not find_conflicts(found):
            return found
    raise AssertionError("nothing trains, and nothing that does goes with it")


def rows_of(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """A plugin's own examples, else rows of a format that goes through."""
    own = next((member.plugin.example_rows for member in members if member.plugin.example_rows), None)
    if own is not None:
        return list(own)
    return list(ROWS_BY_FORMAT[starting_format(members) or "prompt-completion"])


def sources_of(members: Sequence[Member]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Rows of every further source that a plugin asks for."""
    return {name: rows for member in members for name, rows in member.plugin.sources.items()}
