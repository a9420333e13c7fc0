"""From a request to what `generate` would start with, and from tokens to an answer."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftx.kernel.objective import pad_of
from peftx.toolkits.decoding.text import COLDEST, request_of_ids
from peftx.toolkits.serving.job import Completion, Job, TokenScore
from peftx.toolkits.serving.prefix import PrefixCache
from peftx.toolkits.serving.scoring import scores_of, shaping
from peftx.toolkits.serving.stream import cut_at_stop
from peftx.toolkits.serving.structured import Grammars

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack
    from peftx.toolkits.decoding import Generation, Prepared


class Answers:
    """What a stack makes of requests, whichever way its batches run.

    Args:
        prefixes: where prompts may begin from, None for none.
    """

    def __init__(self, stack: Stack, prefixes: PrefixCache | None = None) -> None:
        self.stack, self.tokenizer, self.prefixes = stack, stack.tokenizer, prefixes
        self.pad = pad_of(stack.model, stack.tokenizer)
        self._grammars: Grammars | None = None
        self._plain: tuple[object, Prepared] | None = None
        self._reading = threading.Lock()

    def grammars(self) -> Grammars:
        """Those of its tokenizer, which is read when the first is asked for."""
        with self._reading:
            if self._grammars is None:
                config, tokenizer = self.stack.model.generation_config, self.tokenizer
                self._grammars = Grammars(self.stack, ends_of(config) or {tokenizer.eos_token_id})
            return self._grammars

    def generation(self, jobs: Sequence[Job]) -> Generation:
        """One call for jobs that sample alike, to the longest of their lengths."""
        first, stack = jobs[0].request, self.stack
        choice: dict[str, Any] = {"do_sample": False}
        if first.temperature >= COLDEST:
            choice = {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
        if first.stop:
            choice["stop_strings"] = list(first.stop)
        longest = max(job.max_tokens for job in jobs)
        found = request_of_ids(stack, [job.ids for job in jobs], longest, first.seed, choice)
        written = 1 if stack.model.config.is_encoder_decoder else found.input_ids.shape[1]
        found.logits_processors += shaping(first, start=written, grammars=self.grammars)
        return found

    def prepared(self, job: Job) -> Prepared:
        """What `generate` would write a row by. The next requests that sample alike take it over where nothing shapes
        scores: then it holds settings, and nothing of a prompt."""
        settings = job.request.key, dict(vars(self.stack.model.generation_config))
        if self._plain is not None and self._plain[0] == settings:
            return self._plain[1]
        found = self.generation([job]).prepare()
        self._plain = None if found.processors else (settings, found)
        return found

    def finish(
        self, job: Job, row: list[int], ends: Collection[int], scores: tuple[TokenScore, ...] = ()
    ) -> None:
        """Answer with the tokens of a row, cut at its own length, at a token of `ends`, at a stop string; `scores`:
        theirs, where they are known already."""
        row = row[: job.max_tokens]
        place = next((index for index, token in enumerate(row) if token in ends), None)
        if place is not None:
            row = row[: place + 1]
        stop = job.request.stop
        text, stopped = cut_at_stop(self.text(row), stop)
        if stopped:
            # In a batch the row may have gone on: up to the token that completed the stop string it counts.
            whole = row
            last = bisect_left(
                range(len(row)), True, key=lambda i: cut_at_stop(self.text(whole[: i + 1]), stop)[1]
            )
            row = row[: last + 1]
        reason = "stop" if stopped or place is not None else "length"
        job.finish(self._scored(job, Completion(text, reason, job.prompt_tokens, len(row), scores), row))

    def _scored(self, job: Job, completion: Completion, row: list[int]) -> Completion:
        """With the prompt in front and log-probabilities, where these are asked for."""
        request = job.request
        if request.logprobs is not None and not completion.scores:
            scores = scores_of(
                self.stack, job.ids, row, top=request.logprobs, echo=request.echo, text=self.text
            )
            completion = replace(completion, scores=scores)
        if request.echo:
            front = request.prompt if not request.ids else self.text(job.ids)
            completion = replace(completion, text=front + completion.text)
        return completion

    def text(self, row: list[int]) -> str:
        """What tokens say, special ones left out."""
        return str(self.tokenizer.decode(row, skip_special_tokens=True))


def ends_of(config: Any) -> set[int]:
    """The tokens that end a text."""
    ends = config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())
