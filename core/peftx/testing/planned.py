"""What `plan` says of a stack on a tiny model, to be held against what the stack does."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from peftx.composition.registry import Registry
from peftx.planning import plan
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_spec.models import Pipeline


def refused_by_plan(
    stack: Sequence[Mapping[str, Any]],
    arch: str,
    registry: Registry | None = None,
    model: Callable[[str], PreTrainedModel] = tiny,
) -> list[str]:
    """Why `plan` says that the stack of a spec cannot be; empty if it says nothing. `model`: what makes the one that it
    would stand on."""
    pipeline = Pipeline.model_validate({"peftx": 1, "model": _folder(model, arch), "stack": list(stack)})
    return [conflict.reason for conflict in plan(pipeline, registry=registry or _registry()).conflicts]


@cache
def _registry() -> Registry:
    return Registry()


@cache
def _folder(make: Callable[[str], PreTrainedModel], arch: str) -> str:
    """Of a model's shape, for `plan`, which loads no weights; gone when the process ends."""
    folder = tempfile.mkdtemp(prefix=f"peftx-{arch}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = make(arch)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
