"""The `serve` hook."""

from __future__ import annotations

from peftx.kernel.plugin import Claim
from peftx.testing.case import Case
from peftx.testing.checks.check import check
from peftx.toolkits.serving import Engine, Request, Server

_PROMPTS = ("Once upon a time", "Once upon a hill", "The film was", "B")
_NEW = 6
_WAIT = 120.0
"""Seconds."""


@check(on="first-generative", when=lambda subject: subject.implements("serve"))
def check_served_answers_are_the_models(case: Case) -> None:
    """Under the plugin's policy every request is answered, with the text that the stack gives it alone."""
    stack = case.stack()
    stack.model.eval()
    expected = [stack.generate(prompt, max_new_tokens=_NEW, do_sample=False) for prompt in _PROMPTS]
    with Engine(Server(stack)) as engine:
        jobs = [engine.submit(Request(prompt, max_tokens=_NEW, temperature=0.0)) for prompt in _PROMPTS]
        found = [job.result(_WAIT).text for job in jobs]
    wrong = [i for i in range(len(_PROMPTS)) if found[i] != expected[i]]
    assert not wrong, (
        f"{len(wrong)} of {len(found)} answers differ, first {found[wrong[0]]!r}, not {expected[wrong[0]]!r}"
    )


@check(on="first-generative", when=lambda subject: subject.implements("serve"))
def check_a_store_of_prefixes_is_claimed(case: Case) -> None:
    """What gives the server a store of prefixes claims to, and so stands beside no other that does."""
    server = Server(case.stack())
    server.prepare()
    gives, claimed = server.scheduler.prefixes is not None, case.subject.claims(Claim.KEEPS_PREFIXES)
    assert gives == claimed, (
        f"{'a' if gives else 'no'} store of prefixes is given to the server, and {Claim.KEEPS_PREFIXES} is "
        f"{'' if claimed else 'not '}claimed"
    )


CHECKS = (check_served_answers_are_the_models, check_a_store_of_prefixes_is_claimed)
