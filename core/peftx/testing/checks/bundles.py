"""Saving and loading, in this process and in a fresh one."""

from __future__ import annotations

import peftx
from peftx.engines.bundle import holds_base
from peftx.testing.case import Case, assert_equal, assert_same_tensors
from peftx.testing.checks.check import changes_model, check
from peftx.testing.fresh import fresh_process
from peftx.testing.models import tiny_tokenizer


@check(when=changes_model)
def check_save_load_same_logits(case: Case) -> None:
    """A loaded bundle holds the same tensors and computes the same bits."""
    stack = case.finished()
    before = case.output(stack)
    stack.save(case.folder / "bundle")
    model = None if holds_base(case.folder / "bundle") else case.model()
    loaded = peftx.load(case.folder / "bundle", model=model, tokenizer=tiny_tokenizer())
    expected = {n: t.detach() for n, t in stack.ledger.tensors(case.id).items()}
    found = {n: t.detach() for n, t in loaded.ledger.tensors(case.id).items()}
    assert_same_tensors(found, expected, "tensors loaded and saved")
    assert_equal(case.output(loaded), before, "logits loaded and saved")
    again = loaded.plugins[case.id].config
    assert again == stack.plugins[case.id].config, f"options came back as {again!r}"


@check(on="first", when=changes_model)
def check_save_load_in_a_fresh_process(case: Case) -> None:
    """Another process loads the bundle and computes the same bits."""
    report = fresh_process(case.subject, case.arch)
    assert report.error is None, report.error
    assert report.expected is not None, "no bundle was made"
    assert report.found is not None, "no bundle was loaded"
    assert_equal(report.found, report.expected, "logits in a fresh process and here")


CHECKS = (check_save_load_same_logits, check_save_load_in_a_fresh_process)
