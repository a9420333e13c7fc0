"""Batches that run whole: requests that sample alike, as one call, left-padded, to the longest of their lengths.

For what decides over whole texts (`decode` hooks), encoder-decoders, and caches whose rows cannot come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.generation import decode
from peftx.toolkits.serving.answers import Answers, ends_of
from peftx.toolkits.serving.job import Job
from peftx.toolkits.serving.stream import Text, TextStream


class _Cancelled(StoppingCriteria):
    """Ends the loop when every job of the batch was cancelled."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        gone = all(job.cancelled for job in self._jobs)
        return torch.full((input_ids.shape[0],), gone, dtype=torch.bool, device=input_ids.device)


class Batches:
    """One batch after the other.

    Args:
        answers: what becomes of the tokens; a prompt that runs alone may begin from its prefixes.
        most: rows of a batch.
    """

    busy = False  # a step leaves nothing behind

    def __init__(self, answers: Answers, *, most: int) -> None:
        self.answers, self.most = answers, most
        self.free = most

    def choose(self, waiting: Sequence[Job]) -> list[Job]:
        """The first of them, and those that may run beside it."""
        first = waiting[0]
        if _alone(first):
            return [first]
        alike = [job for job in waiting[1:] if not _alone(job) and job.request.key == first.request.key]
        return [first, *self._fitting(first, alike)[: self.most - 1]]

    def ready(self, waiting: Sequence[Job]) -> bool:
        """Is there nothing to wait for."""
        return len(waiting) >= self.most or _alone(waiting[0])

    def step(self, jobs: Sequence[Job]) -> None:
        """Run a batch, and answer."""
        try:
            self._run(jobs)
        except Exception as error:  # noqa: BLE001  what a plugin raises is the answer of these requests, not the end
            for job in jobs:
                job.finish(None, error)

    def _fitting(self, first: Job, others: Sequence[Job]) -> list[Job]:
        """Those that, padded to the longest prompt and run to the largest length, stay inside the context."""
        context = free_positions(self.answers.stack.model)
        if context is None:
            return list(others)
        prompt, new = first.prompt_tokens, first.max_tokens
        chosen = []
        for job in others:
            longer, more = max(prompt, job.prompt_tokens), max(new, job.max_tokens)
            if longer + more <= context:
                chosen.append(job)
                prompt, new = longer, more
        return chosen

    def _run(self, jobs: Sequence[Job]) -> None:
        first, stack = jobs[0].request, self.answers.stack
        if jobs[0].max_tokens == 0:  # the prompt alone is looked at
            self.answers.finish(jobs[0], [], set())
            return
        generation = self.answers.generation(jobs)
        generation.stopping_criteria.append(_Cancelled(jobs))
        written = 1 if stack.model.config.is_encoder_decoder else generation.input_ids.shape[1]
        if first.stream:
            generation.streamer = TextStream(Text(self.answers.tokenizer), stop=first.stop, send=jobs[0].send)
        alone = self.answers.prefixes if len(jobs) == 1 else None
        if alone is not None:
            generation.past_key_values = alone.take(generation.input_ids[0].tolist())
        ids = decode(stack, generation)
        if alone is not None and generation.past_key_values is not None:
            alone.keep(ids[0].tolist(), generation.past_key_values)
        ends = ends_of(generation.generation_config)
        for job, row in zip(jobs, ids[:, written:].tolist(), strict=True):
            self.answers.finish(job, row, ends)


def _alone(job: Job) -> bool:
    """Whether nothing may run beside it: the random numbers of a batch depend on its rows."""
    request = job.request
    return request.stream or request.max_tokens == 0 or (request.seed is not None and request.temperature > 0)
