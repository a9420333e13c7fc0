"""What one stack answers: requests in, jobs out.

Rows come and go at every step (`rows.py`) where the model and what stands on it compute the same that way, which is
tried when an engine is made; batches run whole (`batches.py`) elsewhere. Stacks of one base may share a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from peftx.errors import GenerationError, PeftxError, ServerError, UnsupportedError
from peftx.kernel.objective import vocabulary_of
from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.text import check_ids, check_length, ids_for
from peftx.toolkits.serving.answers import Answers
from peftx.toolkits.serving.batches import Batches
from peftx.toolkits.serving.crowd import Crowd, adopt
from peftx.toolkits.serving.job import MOST_LEFT, Job, Request
from peftx.toolkits.serving.packed import pack
from peftx.toolkits.serving.prefix import PrefixCache
from peftx.toolkits.serving.rows import Rows, prove
from peftx.toolkits.serving.server import Scheduler, Server
from peftx.toolkits.serving.worker import Worker
from peftx_spec.rows import require_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.kernel.stack import Stack


def who_stops_rows(answers: Answers) -> list[str]:
    """The plugins of a stack that let no rows come and go: those with a decode hook, else each that does not when all
    others that can be are switched off; none where the model itself does not, or only several together."""
    stack = answers.stack
    if looping := stack.implementers("decode"):
        return [member.id for member in looping]
    able = [id for id in stack.plugins if _can_be_off(stack, id)]
    if _stopped(answers, able):
        return []
    return [id for id in able if _stopped(answers, [other for other in able if other != id])]


def _can_be_off(stack: Stack, id: str) -> bool:
    try:
        with stack.disabled(id):
            return True
    except PeftxError:  # it replaced weights, or others are merged over it
        return False


def _stopped(answers: Answers, off: Sequence[str]) -> bool:
    """Do no rows come and go while these plugins are switched off."""
    try:
        with answers.stack.disabled(*off) if off else nullcontext():
            prove({"": answers})
    except UnsupportedError:
        return True
    return False


class Together:
    """One batch for stacks that stand on one base.

    Args:
        base: whose weights they share. scheduler: the policy, which each of them must have.
    """

    def __init__(self, base: PreTrainedModel, scheduler: Scheduler) -> None:
        self.crowd = Crowd(base, packed=scheduler.pack_weights)
        self.rows = Rows({}, most=scheduler.max_batch, crowd=self.crowd)
        self.worker = Worker(self.rows, scheduler)

    def join(self, server: Server, answers: Answers) -> None:
        """Take a stack in.

        Raises:
            UnsupportedError: it cannot share a batch, with the reason.
        """
        if server.scheduler != self.worker.scheduler:
            raise UnsupportedError("a plugin changed its scheduler")
        name = server.name
        with self.worker.between_steps():
            beside = dict(list(self.rows.answers.items())[:1])
            try:
                self.crowd.join(name, answers.stack)
                prove(beside | {name: answers}, self.crowd)
            except Exception:
                self.crowd.leave(name)
                raise
            self.rows.answers[name] = answers

    def leave(self, name: str) -> None:
        """Let a stack go, of which nothing is asked any more."""
        with self.worker.between_steps():
            self.crowd.leave(name)
            del self.rows.answers[name]


class Engine:
    """Runs a server's requests. Use it in a `with` block, or call `start` and `close`.

    Args:
        together: a batch to share, if the stack can.

    Attributes:
        whole: why batches run whole; empty where rows come and go.
        apart: why the stack has a batch of its own; empty where it shares one, or none was to be shared.
    Raises:
        PeftxError: the model generates no text, or a plugin's `serve` hook failed.
    """

    def __init__(self, server: Server, together: Together | None = None) -> None:
        stack = server.stack
        if not stack.model.can_generate():
            raise UnsupportedError(f"{type(stack.model).__name__} generates no text, so it cannot be served")
        server.prepare()
        scheduler = server.scheduler
        stack.model.eval()
        self.server, self.whole, self.apart = server, "", ""
        self.prefixes = scheduler.prefixes
        if self.prefixes is None and scheduler.prefix_cache:
            self.prefixes = PrefixCache(stack.model, entries=scheduler.prefix_entries)
        if together is not None:
            adopt(stack)
        self.packed = pack(stack.model) if scheduler.pack_weights else 0  # linear layers
        self._answers = Answers(stack, self.prefixes)
        self._together, self._worker = self._place(self._answers, together)
        self._tokenizer = stack.tokenizer
        self._tokenizing = threading.Lock()  # a tokenizer's settings are its own, not a call's
        self._changed = threading.Condition()
        self._unanswered, self._retiring = 0, False

    def _place(self, answers: Answers, together: Together | None) -> tuple[Together | None, Worker]:
        scheduler, name = self.server.scheduler, self.server.name
        if together is not None:
            try:
                together.join(self.server, answers)
                return together, together.worker
            except UnsupportedError as reason:
                self.apart = reason.message
        try:
            prove({name: answers})
            return None, Worker(Rows({name: answers}, most=scheduler.max_batch), scheduler)
        except UnsupportedError as reason:
            self.whole = reason.message
        return None, Worker(Batches(answers, most=scheduler.max_batch), scheduler)

    @cached_property
    def stopping(self) -> list[str]:
        """The plugins that `whole` is about; none where it is the model, or only several together. They are found by
        trying, between two steps, when somebody asks."""
        if not self.whole:
            return []
        with self._worker.between_steps():
            return who_stops_rows(self._answers)

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None where the model sets no limit."""
        return free_positions(self.server.stack.model)

    def about(self) -> dict[str, Any]:
        """What an operator wants to know: requests, and how they run."""
        name, worker = self.server.name, self._worker
        way = "continuous" if not self.whole else f"whole: {self.whole}"
        way = "shared" if self._together is not None else f"{way}; apart: {self.apart}" if self.apart else way
        return {
            "queued": worker.waiting(name), "served": worker.served[name], "batches": worker.batches[name],
            "batching": way, "why_whole": self.whole or None, "plugins": self.stopping, "why_apart": self.apart or None,
        }  # fmt: skip

    def submit(self, request: Request) -> Job:
        """Put a request in the queue.

        Raises:
            PeftxError: an empty prompt, one that does not fit the model's context, a bias of a token that there is not,
                or a schema that is none.
            QueueFull: too many wait already.
        """
        ids = self.ids_of(request)
        size = vocabulary_of(self.server.stack.model)
        for token, _ in request.logit_bias:
            if size is not None and token >= size:
                raise GenerationError(
                    f"logit_bias names token {token}, and this model has {size} tokens",
                    hint="POST /tokenize gives the ids of a text",
                )
        if request.schema:
            self._answers.grammars().compiled(request.schema)  # here, where others need not wait for it
        job = Job(request, ids, self.room_of(request, ids), model=self.server.name)
        with self._changed:
            if self._retiring:
                raise ServerError(
                    f"'{self.server.name}' is closing", hint="ask another model: GET /v1/models"
                )
            self._unanswered += 1
        job.future.add_done_callback(self._answered)
        try:
            self._worker.put(job)
        except PeftxError as error:
            job.finish(None, error)
            raise
        return job

    def _answered(self, _: object) -> None:
        with self._changed:
            self._unanswered -= 1
            self._changed.notify_all()

    def ids_of(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises PeftxError where there is none, or the model has no such token."""
        if request.ids:
            check_ids(self.server.stack, request.ids)
            return list(request.ids)
        with self._tokenizing:
            if request.rendered:
                ids = self._tokenizer(
                    require_text(request.prompt, "the prompt"), add_special_tokens=False
                ).input_ids
            else:
                ids = ids_for(self.server.stack, request.prompt)
        if not ids:
            raise GenerationError("the prompt has no tokens")
        return list(ids)

    def text_of(self, ids: list[int]) -> str:
        """What tokens say, special ones with it."""
        if ids:
            check_ids(self.server.stack, ids)
        with self._tokenizing:
            return str(self._tokenizer.decode(ids))

    def room_of(self, request: Request, ids: list[int]) -> int:
        """Tokens that the answer may have. Raises PeftxError where they do not fit with the prompt."""
        stack, most = self.server.stack, self.server.max_tokens
        if request.max_tokens is not None:
            if most is not None and request.max_tokens > most:
                raise GenerationError(
                    f"{request.max_tokens} tokens are asked for, and this server writes {most} at most",
                    hint=f"max_tokens: {most}",
                )
            check_length(stack, len(ids), request.max_tokens)
            return request.max_tokens
        apart = 0 if stack.model.config.is_encoder_decoder else len(ids)
        left = MOST_LEFT if most is None else min(MOST_LEFT, most)
        left = left if self.context is None else min(left, self.context - apart)
        check_length(stack, len(ids), max(1, left))
        return left

    @contextmanager
    def using(self) -> Iterator[Stack]:
        """The model and its tokenizer for something else than a request's text: nothing else runs meanwhile."""
        with self._worker.between_steps(), self._tokenizing:
            yield self.server.stack

    def start(self) -> Engine:
        self._worker.start()
        return self

    def retire(self) -> None:
        """Take no more requests, answer those that came; end the thread, unless others share it."""
        with self._changed:
            self._retiring = True
            self._changed.wait_for(lambda: not self._unanswered)
        if self._together is not None:
            self._together.leave(self.server.name)
        else:
            self.close()

    def close(self) -> None:
        """Finish what runs, turn the waiting requests away, end the thread."""
        self._worker.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
