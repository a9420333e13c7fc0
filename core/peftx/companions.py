"""Second models beside a stack's own: teachers, proxies, drafts, reward models, frozen copies."""

from __future__ import annotations

import copy
import weakref
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from peftx.engines.bundle.manifest import MANIFEST
from peftx.engines.hub import is_hub
from peftx.engines.models import load_model, reads_alike
from peftx.errors import ModelError
from peftx.kernel.stack import Stack
from peftx.loading import load

_MADE: MutableMapping[PreTrainedModel, weakref.ref[Stack]] = weakref.WeakKeyDictionary()
"""Companion -> the stack that asked for it last."""


def companion(
    stack: Stack, source: Literal["copy"] | str | Path | PreTrainedModel | Stack, *, share: bool = True
) -> PreTrainedModel:
    """A frozen model in evaluation mode, to compare with or to be taught by: `with step.reference(teacher) as model`.

    It is no part of the stack: nothing of it trains, and no bundle holds it. (The stack's own model as it was, or
    without its plugins, takes no second one: `step.reference("start")`, `step.reference("base")`.)

    Args:
        source: `copy`, the stack's model as it is now; a folder or hub id; a bundle, or `hub:...` of one; a model, or
            another stack's.
        share: one model for all that ask for the same source; else a new one.

    Raises:
        PeftxError: the tokenizers of the two differ in what they make of a text.
    """
    key = str(source) if isinstance(source, str | Path) else None
    known: dict[str, PreTrainedModel] = stack.companions
    if key is not None and share and key != "copy" and key in known:
        return known[key]
    if source == "copy":
        found, tokenizer = copy.deepcopy(stack.model), None
    elif isinstance(source, PreTrainedModel):
        found, tokenizer = source, None
    elif isinstance(source, Stack):
        found, tokenizer = source.model, source.given_tokenizer
    elif is_hub(source) or (Path(source) / MANIFEST).exists():
        other = load(source, device=str(stack.model.device))
        found, tokenizer = other.model, other.given_tokenizer
    else:
        found, tokenizer = load_model(str(source), device=str(stack.model.device))
    own = stack.given_tokenizer
    if tokenizer is not None and own is not None and not reads_alike(tokenizer, own):
        what = "vocabulary" if tokenizer.get_vocab() != own.get_vocab() else "way to cut texts into tokens"
        raise ModelError(
            f"'{source}' has another {what} than the stack's model, so their tokens cannot be compared",
            hint="a model of the same family; or compare texts (peftx.toolkits.working)",
        )
    found.requires_grad_(False).eval()
    _MADE[found] = weakref.ref(stack)
    if key is not None and key != "copy":
        known[key] = found
    return found


def companions_of(stack: Stack) -> list[PreTrainedModel]:
    """Those of its companions that somebody still holds."""
    return [model for model, asked in _MADE.items() if asked() is stack]
