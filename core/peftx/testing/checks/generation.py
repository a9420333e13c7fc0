"""Plain `generate` on a model that carries the plugin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftx.kernel.plugin import Claim
from peftx.testing.case import Case, assert_close, inputs_for
from peftx.testing.checks.check import changes_model, check
from peftx.testing.checks.inputs import tolerance
from peftx.testing.shapes import Padding
from peftx.testing.subject import DECODERS, Subject

NEW = 6
"""Tokens to generate."""


def keeps_cache(subject: Subject) -> bool:
    """An attention of the plugin's own may drop old keys, unless it claims not to."""
    own = subject.claims(Claim.REPLACES_ATTENTION) and not subject.claims(Claim.EXACT_CACHE)
    return changes_model(subject) and not own


def prompt(case: Case, *, padding: Padding = None) -> dict[str, Tensor]:
    """What `generate` gets: ids and mask."""
    inputs = inputs_for(case.model(), padding=padding)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def greedy(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Plain greedy decoding of `NEW` tokens, with logits."""
    model.eval()
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip


def _compare(case: Case, one: Any, other: Any, what: str) -> None:
    """Logits as long as the tokens agree; tokens must agree all along, unless activations are rounded."""
    start = other.sequences.shape[1] - NEW
    for step in range(NEW):
        assert_close(one.logits[step], other.logits[step], tolerance(case), f"{what}: logits of step {step}")
        same = torch.equal(one.sequences[:, start + step], other.sequences[:, start + step])
        if not same:
            ids = one.sequences[:, start:].tolist(), other.sequences[:, start:].tolist()
            assert case.subject.claims(Claim.QUANTIZES), f"{what}: tokens {ids[0]} and {ids[1]}"
            return


@check(on="generative", when=keeps_cache)
def check_cached_equals_uncached(case: Case) -> None:
    """Greedy generation gives the same tokens and logits with and without a key-value cache."""
    model = case.finished().model
    inputs = prompt(case)
    cached, uncached = greedy(model, inputs, use_cache=True), greedy(model, inputs, use_cache=False)
    _compare(case, cached, uncached, "with and without cache")


@check(on="generative", when=keeps_cache)
def check_padded_generation(case: Case) -> None:
    """A prompt that is padded in a batch goes on as it does alone."""
    model = case.finished().model
    inputs = prompt(case, padding="left" if case.arch in DECODERS else "right")
    together = greedy(model, inputs)
    row = len(inputs["input_ids"]) - 1
    real = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row, real][None]
    alone = greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    together.sequences = together.sequences[row : row + 1, -NEW:]
    together.logits = tuple(x[row : row + 1] for x in together.logits)
    alone.sequences = alone.sequences[:, -NEW:]
    _compare(case, together, alone, "in a padded batch and alone")


@check(on="generative", when=lambda subject: subject.claims(Claim.EXACT_CACHE))
def check_exact_cache(case: Case) -> None:
    """Generation with the plugin's cache or attention gives the base's tokens."""
    from peftx.testing.checks.decoding import decoded, plain

    stack = case.stack()
    case.compress(stack)
    expected, found = plain(case, case.model()), decoded(case, stack)
    assert torch.equal(found, expected), f"tokens {found.tolist()}, the base gives {expected.tolist()}"


CHECKS = (check_cached_equals_uncached, check_padded_generation, check_exact_cache)
