"""Plugins as their authors try them, each by itself on a tiny model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from peftx.composition.registry import Registry
from peftx.errors import ArchitectureError, PeftxError, TargetError, UnsupportedError
from peftx.kernel.members import Member
from peftx.kernel.plugin import Plugin
from peftx.kernel.positions import prompt_length
from peftx.stack import Stack
from peftx.testing.life import live, model_of
from peftx.testing.models import tiny_tokenizer

STANDS: dict[tuple[str, str], str | None] = {}
"""What `stands_on` has found of other models than `llama`, or what other processes have."""
NO_PLACE = (ArchitectureError, TargetError, UnsupportedError)
"""What a plugin raises that does not stand on a model."""


def members_as_tried(*names: str) -> list[Member]:
    """Plugins as their authors try them, for a stack."""
    return [
        Member(member.id, _example.__wrapped__(name))
        for name, member in zip(names, plain(names), strict=True)
    ]


def plain(names: Sequence[str]) -> list[Member]:
    """The same to be looked at alone: they are made once."""
    ids = (name if name not in names[:i] else f"{name}-2" for i, name in enumerate(names))
    return [Member(id, _example(name)) for id, name in zip(ids, names, strict=True)]


def specified(names: Sequence[str]) -> list[dict[str, Any]]:
    """The same as the stack of a spec."""
    return [
        {"use": name, "id": member.id, "with": to_jsonable_python(dict(member.plugin.example))}
        for name, member in zip(names, plain(names), strict=True)
    ]


@cache
def _example(name: str) -> Plugin:
    plugin = _loaded(name)
    return plugin(**plugin.example)


@cache
def _loaded(name: str) -> type[Plugin]:
    return Registry().load(name)


@cache
def arch_of(*names: str) -> str:
    """`llama`; where a plugin does not stand on it, the first architecture that it names."""
    registry = Registry()
    for name in names:
        if stands_on(name, "llama") is not None and registry.load(name).architectures:
            return registry.load(name).architectures[0]
    return "llama"


def stands_on(name: str, arch: str) -> str | None:
    """Why a plugin alone has no place on a tiny model; None if it has."""
    if arch == "llama":
        return _alone(name, arch).refused
    if (name, arch) not in STANDS:
        STANDS[name, arch] = lived_alone(name, arch)
    return STANDS[name, arch]


def lived_alone(name: str, arch: str) -> str | None:
    """The same of another model, found by living there: only that tells of drafts on one whose cache cannot be cut."""
    try:
        with tempfile.TemporaryDirectory(prefix="peftx-matrix-") as folder:
            live(members_as_tried(name), arch, Path(folder) / "bundle")
    except NO_PLACE as error:
        return str(error)
    except PeftxError:
        return None  # it needs a companion, which a pair may have
    return None


@dataclass(frozen=True)
class _Alone:
    """What a plugin that is built by itself shows; `refused`: why it has no place on the model."""

    soft: int = 0
    refused: str | None = None


@cache
def _alone(name: str, arch: str) -> _Alone:
    try:
        stack = Stack(model_of(arch), members_as_tried(name), tokenizer=tiny_tokenizer())
    except NO_PLACE as error:
        return _Alone(refused=str(error))
    except PeftxError:
        return _Alone()  # it needs a companion, which a pair may have
    return _Alone(prompt_length(stack.model))


def soft(name: str) -> int:
    """Soft tokens of a plugin as its author tries it."""
    return _alone(name, arch_of(name)).soft
