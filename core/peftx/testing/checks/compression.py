"""The `compress` hook."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peftx.errors import PeftxError
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.plugin import Claim
from peftx.testing.case import Case, assert_same_tensors, crashed, error_of
from peftx.testing.checks.check import check
from peftx.testing.subject import TEXTS, Subject
from peftx.toolkits.compression import Calibration
from peftx.toolkits.compression.batches import calibration


def _compresses(subject: Subject) -> bool:
    return subject.implements("compress")


@check(when=_compresses)
def check_compression_repeats(case: Case) -> None:
    """Two runs on the same data make the same tensors, and the model still computes finite numbers."""
    first, second = case.finished(), case.finished()
    expected = {n: t.detach() for n, t in first.ledger.tensors(case.id).items()}
    found = {n: t.detach() for n, t in second.ledger.tensors(case.id).items()}
    assert_same_tensors(found, expected, "two compressions")
    assert bool(case.output(first).isfinite().all()), "some logits are not finite"


@check(when=lambda subject: subject.claims(Claim.QUANTIZES))
def check_bytes_are_real(case: Case) -> None:
    """The bytes that are reported are those on disk, and fewer than the weights had."""
    stack = case.finished()
    reported = sum(t.numel() * t.element_size() for t in stack.ledger.tensors(case.id).values())
    stack.save(case.folder / "bundle")
    stored = _payload(case.folder / "bundle" / f"{case.id}.safetensors")
    assert abs(stored - reported) <= 0.01 * reported, f"{reported} bytes reported, {stored} on disk"
    base = case.model()
    places = [part.key for part in stack.ledger.of(case.id, ReplacedPart)]
    before = sum(
        p.numel() * p.element_size() for name in places for p in base.get_submodule(name).parameters()
    )
    after = sum(
        t.numel() * t.element_size()
        for part in stack.ledger.of(case.id, ReplacedPart)
        for t in part.tensors().values()
    )
    assert after < before, f"{len(places)} replaced modules take {after} bytes, {before} before"


def _payload(file: Path) -> int:
    """Bytes of a safetensors file without its header."""
    with file.open("rb") as handle:
        (header,) = struct.unpack("<Q", handle.read(8))
        json.loads(handle.read(header))
    return file.stat().st_size - 8 - header


class _Watched(list[dict[str, Any]]):
    """Batches that note whether anybody looked at them."""

    seen = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.seen = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.seen = True
        return super().__getitem__(index)


@check(on="first", when=lambda subject: subject.claims(Claim.NEEDS_CALIBRATION))
def check_calibration_is_used(case: Case) -> None:
    """A plugin that claims to need calibration data looks at it, and without data there is an error."""
    stack = case.stack()
    error = error_of(PeftxError, lambda: case.compress(stack, None))
    assert error is not None, f"claims {Claim.NEEDS_CALIBRATION}, and works without"
    assert not crashed(error), f"it crashed: {error}"
    assert case.id in str(error), f"the message does not name '{case.id}': {error}"
    batches = _Watched(calibration(stack, TEXTS, samples=4, length=24).batches)
    with torch.no_grad():
        stack.call(
            stack.member(case.id), "compress", model=stack.view(case.id), calibration=Calibration(batches), stack=stack
        )  # fmt: skip
    assert batches.seen, f"claims {Claim.NEEDS_CALIBRATION}, and never looks at the batches"


@check(on="first", when=lambda subject: _compresses(subject) and not subject.claims(Claim.NEEDS_CALIBRATION))
def check_works_without_calibration(case: Case) -> None:
    """A plugin that does not claim to need calibration data works without."""
    stack = case.stack()
    error = error_of(PeftxError, lambda: case.compress(stack, None))
    assert error is None, f"fails without data, and does not claim {Claim.NEEDS_CALIBRATION}: {error}"
    assert bool(case.output(stack).isfinite().all()), "some logits are not finite"


CHECKS = (
    check_compression_repeats,
    check_bytes_are_real,
    check_calibration_is_used,
    check_works_without_calibration,
)
