"""The `decode` hook."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from peftx.kernel.plugin import Claim
from peftx.stack import Stack
from peftx.testing.case import Case
from peftx.testing.checks.check import check
from peftx.testing.models import tiny_tokenizer
from peftx.testing.shapes import FIRST_BYTE
from peftx.testing.subject import Subject
from peftx.toolkits.decoding import Generation

NEW = 12
"""Tokens to generate."""


def _decodes(subject: Subject) -> bool:
    return subject.implements("decode")


def prompts() -> list[Tensor]:
    """Three prompts [1, T]: one that repeats itself (drafts are accepted), one that does not, one of one token."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(FIRST_BYTE, FIRST_BYTE + 256, (1, 5), generator=generator)
    other = torch.randint(FIRST_BYTE, FIRST_BYTE + 256, (1, 9), generator=generator)
    return [pattern.repeat(1, 3), other, other[:, :1]]


def request(model: Any, ids: Tensor, **options: Any) -> Generation:
    """Decode `NEW` tokens, greedily unless told otherwise."""
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=NEW, min_new_tokens=NEW, **{"do_sample": False, **options})
    config.max_length = None
    return Generation(
        model=model, tokenizer=tiny_tokenizer(), input_ids=ids, attention_mask=torch.ones_like(ids),
        generation_config=config, seed=0,
    )  # fmt: skip


def decoded(case: Case, stack: Stack, **options: Any) -> Tensor:
    """All prompts through the hooks, the new tokens of each: [3, NEW]."""
    stack.model.eval()
    return torch.cat([stack.decode(request(stack.model, ids, **options))[:, -NEW:] for ids in prompts()])


def plain(case: Case, model: Any) -> Tensor:
    """The same through the model's own `generate`."""
    model.eval()
    with torch.no_grad():
        return torch.cat([request(model, ids).run_default()[:, -NEW:] for ids in prompts()])


@check(on="generative", when=_decodes)
def check_decoding_continues_the_prompt(case: Case) -> None:
    """`decode` returns int64 ids [1, T + new]: the prompt, then at most as many tokens as were asked for."""
    stack = case.stack()
    stack.model.eval()
    encoder_decoder = bool(stack.model.config.is_encoder_decoder)
    for ids in prompts():
        found = stack.decode(request(stack.model, ids))
        assert found.dtype == torch.int64, f"ids are {found.dtype}"
        assert found.shape[:-1] == (1,), f"ids have shape {tuple(found.shape)}, not [1, T + new]"
        start = 1 if encoder_decoder else ids.shape[1]
        new = found.shape[1] - start
        assert new == NEW, f"{new} new tokens, {NEW} were asked for"
        if not encoder_decoder:
            assert torch.equal(found[:, :start], ids), (
                f"the prompt {ids.tolist()} came back as {found.tolist()}"
            )
        size = stack.model.config.get_text_config().vocab_size
        beyond = found[(found < 0) | (found >= size)]
        assert len(beyond) == 0, f"ids {beyond.tolist()} are not in 0..{size - 1}"


@check(on="generative", when=lambda subject: subject.claims(Claim.LOSSLESS_DECODING))
def check_lossless_decoding(case: Case) -> None:
    """Greedy decoding through the plugin gives the base's tokens, every one."""
    expected, found = plain(case, case.model()), decoded(case, case.stack())
    wrong = int((found != expected).sum()) if found.shape == expected.shape else found.numel()
    assert torch.equal(found, expected), (
        f"{wrong} of {expected.numel()} tokens differ: {found.tolist()}, not {expected.tolist()}"
    )


@check(on="generative", when=_decodes)
def check_decoding_repeats_under_a_seed(case: Case) -> None:
    """Two sampled runs of one seed give the same tokens, whatever the global generator did in between."""
    first = decoded(case, case.stack(), do_sample=True, temperature=1.5)
    torch.rand(7)
    second = decoded(case, case.stack(), do_sample=True, temperature=1.5)
    assert torch.equal(first, second), f"tokens {first.tolist()} and {second.tolist()}"


@check(on="generative", when=_decodes)
def check_decoding_leaves_the_model(case: Case) -> None:
    """Decoding changes neither the model's output nor the request's inputs."""
    stack = case.stack()
    before = case.output(stack)
    ids = prompts()[0]
    kept = ids.clone()
    stack.decode(request(stack.model, ids))
    assert torch.equal(ids, kept), "decoding wrote into its input_ids"
    after = case.output(stack)
    assert torch.equal(after, before), (
        f"logits after decoding moved by {float((after - before).abs().max()):.3g}"
    )


CHECKS = (
    check_decoding_continues_the_prompt,
    check_lossless_decoding,
    check_decoding_repeats_under_a_seed,
    check_decoding_leaves_the_model,
)
