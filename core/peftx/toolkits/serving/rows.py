"""Continuous batching: a request joins the others when a slot is free, and leaves at its own last token.

Each step reads a piece of the prompts that came, then writes one token of every row. Rows may sample, stop and stream
as they like: what they share is the model's call. The model's own forward runs, with the plugins that stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache

from peftx.engines.data import Collator
from peftx.errors import UnsupportedError
from peftx.kernel.calls import takes
from peftx.kernel.objective import vocabulary_of
from peftx.kernel.positions import free_positions
from peftx.toolkits.serving.answers import Answers, ends_of
from peftx.toolkits.serving.crowd import Crowd
from peftx.toolkits.serving.job import Job, Request, TokenScore
from peftx.toolkits.serving.scoring import score_of
from peftx.toolkits.serving.slots import Slots, check_layers
from peftx.toolkits.serving.stream import Text, TextStream, cut_at_stop
from peftx.toolkits.serving.uneven import by_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.kernel.stack import Stack

PIECE = 256
"""Tokens of prompts that are read in a step at most, so that those who write need not wait for a long prompt."""


class Row:
    """A request that is being answered.

    Args:
        job: the request. answers: of the stack that it asks.
    """

    def __init__(self, job: Job, answers: Answers) -> None:
        self.job, self.answers = job, answers
        self.prepared = prepared = answers.prepared(job)
        self.more = 0  # columns of its cache that are no tokens of its text
        self.ids, self.written = list(job.ids), list[int]()
        self.cache: Cache | None = None  # of the prompt, while it is read
        self.read = 0  # tokens of the prompt in it
        self.ends = ends_of(prepared.config)
        request = job.request
        self.plain = not prepared.config.do_sample and not prepared.processors
        self.generator = None
        if request.seed is not None and prepared.config.do_sample:
            self.generator = torch.Generator(answers.stack.model.device).manual_seed(request.seed)
        self.scores, self.told = list[TokenScore](), 0  # of a stream's tokens, and how many of them were sent
        self.text = Text(answers.tokenizer)
        self.stream = None
        if request.stream:
            self.stream = TextStream(self.text, stop=request.stop, send=self._send)

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.job.ids) - self.read

    def pick(self, logits: Tensor) -> int:
        """The next token, of logits [1, V]."""
        ids = torch.tensor([self.ids], device=logits.device)
        scores = self.prepared.processors(ids, logits.to(torch.float32, copy=True))
        if not self.prepared.config.do_sample:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))

    def _send(self, text: str) -> None:
        scores, self.told = tuple(self.scores[self.told :]), len(self.scores)
        self.job.send(text, scores)

    def write(self, token: int, logits: Tensor) -> bool:
        """Take the next token, and the logits [1, V] that it is of; whether it was the last one."""
        top, stop = self.job.request.logprobs, self.job.request.stop
        if self.stream is not None and top is not None:
            score = score_of(logits[0], token, len(self.text.said), top=top, text=self.answers.text)
            self.scores.append(score)
        self.ids.append(token)
        self.written.append(token)
        if self.stream is not None or stop:
            self.text.put([token])
        if self.stream is not None:
            self.stream.pass_on()
        return (
            token in self.ends
            or len(self.written) >= self.job.max_tokens
            or cut_at_stop(self.text.said, stop)[1]
        )


class Rows:
    """The rows of one batch, of a stack or of several over one base.

    Args:
        answers: of each stack, by the name that jobs ask for; may grow and shrink between steps.
        most: rows at a time. crowd: computes for several stacks at once; None where there is one.
        piece: see `PIECE`.
    """

    def __init__(
        self, answers: dict[str, Answers], *, most: int, crowd: Crowd | None = None, piece: int = PIECE
    ) -> None:
        self.answers, self.most, self.crowd, self.piece = answers, most, crowd, piece
        self._reading: list[Row] = []
        self._slots: Slots[Row] | None = None

    # -- what a worker asks -----------------------------------------------------------------------------------------

    @property
    def _writing(self) -> list[Row]:
        return [] if self._slots is None else self._slots.rows

    @property
    def busy(self) -> bool:
        return bool(self._reading or self._writing)

    @property
    def free(self) -> int:
        return self.most - len(self._reading) - len(self._writing)

    def choose(self, waiting: Sequence[Job]) -> list[Job]:
        """Those of the waiting jobs, in their order, that may begin."""
        return list(waiting[: self.free])

    def ready(self, waiting: Sequence[Job]) -> bool:
        """Is there nothing to wait for."""
        return True

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> None:
        """Begin with `jobs`; read a piece of the prompts; write a token of each row."""
        for job in jobs:
            self._begin(job)
        for row in [row for row in self._reading if row.job.cancelled]:
            self._finish(row)
        for rows in self._pieces():
            try:
                self._read(rows)
            except Exception as error:  # noqa: BLE001  what a plugin raises is the answer of these requests, not the end
                self._fail(rows, error)
        for row in [row for row in self._writing if row.job.cancelled]:
            self._finish(row)
        if self._writing:
            try:
                self._write()
            except Exception as error:  # noqa: BLE001  as above
                self._fail(self._writing, error)

    # -- the parts of a step -----------------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        try:
            answers = self.answers[job.model]
            if job.max_tokens == 0:  # the prompt alone is looked at
                answers.finish(job, [], set())
                return
            row = Row(job, answers)
            if answers.prefixes is not None:
                row.cache = answers.prefixes.take(job.ids)
                row.read = int(row.cache.get_seq_length())
            self._reading.append(row)
        except Exception as error:  # noqa: BLE001  the answer of this request alone
            job.finish(None, error)

    def _pieces(self) -> list[list[Row]]:
        """What is read now: whole short prompts together, pieces of long ones each alone, `piece` tokens in all."""
        room, pieces, open_ones = self.piece, list[list[Row]](), dict[int, list[Row]]()
        for row in self._reading:
            if min(row.left, self.piece) > room:
                break
            room -= min(row.left, self.piece)
            if row.read or row.left > self.piece:
                pieces.append([row])
                continue
            reader = id(self._reader(row))
            others = open_ones.get(reader, [])
            if not others or max(r.left for r in (*others, row)) * (len(others) + 1) > self.piece:
                others = open_ones[reader] = []
                pieces.append(others)
            others.append(row)
        return pieces

    def _reader(self, row: Row) -> PreTrainedModel:
        """Who reads its prompt."""
        return row.answers.stack.model if self.crowd is None else self.crowd.reader(row.job.model)

    def _read(self, rows: list[Row]) -> None:
        """The next tokens of prompts; those that are read whole get their first token, and a slot."""
        reader, first = self._reader(rows[0]), rows[0]
        cache = first.cache if first.cache is not None else DynamicCache(config=reader.config)
        ids = [row.job.ids[row.read : row.read + self.piece] for row in rows]
        batch = Collator(first.answers.pad, padding_side="left")([{"input_ids": each} for each in ids])
        mask = F.pad(batch["attention_mask"], (first.read, 0), value=1)
        logits = self._call(reader, rows, batch["input_ids"], mask, cache)
        for index, row in enumerate(rows):
            row.read += len(ids[index])
            if row.left:
                row.cache = cache
                continue
            row.more = int(cache.get_seq_length()) - mask.shape[1]
            try:
                self._seat(row, cache, index)
            except Exception as error:  # noqa: BLE001  the answer of this request alone
                self._fail([row], error)
                continue
            self._next([(row, logits[index : index + 1])])

    def _seat(self, row: Row, cache: Cache, index: int) -> None:
        """A slot for what will be written behind a prompt, which stands in a row of `cache`."""
        if row.answers.prefixes is not None:
            row.answers.prefixes.keep_row(row.job.ids, cache, index)
        if self._slots is None:
            self._slots = Slots(cache, self.most)
        self._slots.put(row, cache, index, len(row.job.ids) + row.more)
        row.cache = None
        self._reading.remove(row)

    def _write(self) -> None:
        slots = self._slots
        assert slots is not None
        slots.ready()
        rows = slots.rows
        # A stack's own model knows of its soft tokens, and wants to hear of the others; the base of a crowd of all.
        writer, more = rows[0].answers.stack.model, rows[0].more
        if self.crowd is not None:
            writer, more = self.crowd.host, 0
        lengths = torch.tensor(slots.lengths)[:, None] + (1 - more)
        mask = (torch.arange(int(lengths.max())).flip(0)[None] < lengths).long()
        tokens = torch.tensor([[row.ids[-1]] for row in rows])
        with by_length(writer, [shelf.lengths for shelf in slots.shelves]):
            logits = self._call(writer, rows, tokens, mask, slots)
        slots.advance()
        self._next([(row, logits[index : index + 1]) for index, row in enumerate(rows)])

    def _call(
        self, model: PreTrainedModel, rows: Sequence[Row], ids: Tensor, mask: Tensor, cache: Cache
    ) -> Tensor:
        """Logits [B, V] behind the last of `ids` [B, T]; `mask` [B, P + T] is of what the cache holds too."""
        if self.crowd is not None and model is self.crowd.host:
            self.crowd.seat([row.job.model for row in rows])
        device, names = model.device, takes(model)
        given: dict[str, Any] = {"attention_mask": mask.to(device), "past_key_values": cache}
        if "position_ids" in names:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(device)
        if "logits_to_keep" in names:
            given["logits_to_keep"] = 1
        logits: Tensor = model(input_ids=ids.to(device), use_cache=True, **given).logits[:, -1]
        return logits

    def _next(self, found: Sequence[tuple[Row, Tensor]]) -> None:
        """Write the next token of rows, of logits [1, V] each; those that are done leave."""
        likeliest = torch.cat([logits for _, logits in found]).argmax(-1).tolist()
        for (row, logits), token in zip(found, likeliest, strict=True):
            try:
                done = row.write(token if row.plain else row.pick(logits), logits)
            except Exception as error:  # noqa: BLE001  the answer of this request alone
                self._fail([row], error)
                continue
            if done:
                self._finish(row)

    def _finish(self, row: Row) -> None:
        """Answer with what is written."""
        try:
            if row in self._writing and row.answers.prefixes is not None:
                assert self._slots is not None
                columns = self._slots.row(row, row.answers.stack.model.config)
                row.answers.prefixes.keep(row.ids[: int(columns.get_seq_length())], columns)
            if row.stream is not None:
                row.stream.end()
            row.answers.finish(row.job, row.written, row.ends, tuple(row.scores))
        except Exception as error:  # noqa: BLE001  the answer of this request alone
            row.job.finish(None, error)
        self._leave(row)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            row.job.finish(None, error)
            self._leave(row)

    def _leave(self, row: Row) -> None:
        """Give a row's place away; with the last one go all slots."""
        if row in self._reading:
            self._reading.remove(row)
            return
        assert self._slots is not None
        self._slots.drop(row)
        if not self._slots.rows:
            self._slots = None


def refuse_whole_batches(stack: Stack) -> None:
    """Raises UnsupportedError where requests have to run whole, with the reason."""
    model = stack.model
    if model.config.is_encoder_decoder:
        raise UnsupportedError("an encoder reads a prompt at once, into a cache of another kind")
    if looping := stack.implementers("decode"):
        raise UnsupportedError(
            f"'{looping[0].id}' has a say in how a whole text is written, by its decode hook"
        )
    config = model.generation_config
    if (config.num_beams or 1) > 1 or config.use_cache is False or config.cache_implementation is not None:
        raise UnsupportedError("the model's generation settings ask for beams, another cache, or none")
    if config.stop_strings is not None or config.max_time is not None:
        raise UnsupportedError(
            "the model's generation settings end texts by strings of their own, or by time"
        )
    check_layers(DynamicCache(config=model.config))


PROMPTS = ((5,), (17, 3, 2))
"""Tokens of the prompts of a proof: those of the second group come when the first one is being answered."""


class _Watched(Rows):
    """Notes the logits behind which each row's tokens are written."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: dict[Row, list[Tensor]] = {}

    def _next(self, found: Sequence[tuple[Row, Tensor]]) -> None:
        for row, logits in found:
            self.seen.setdefault(row, []).append(logits)
        super()._next(found)


def prove(answers: dict[str, Answers], crowd: Crowd | None = None) -> None:
    """Prompts that are read in pieces and together, some while others are answered, against each text alone: each asks
    the next of the names.

    Raises:
        UnsupportedError: the model, with what stands on it, computes something else; with the reason.
    """
    for each in answers.values():
        refuse_whole_batches(each.stack)
        room = free_positions(each.stack.model)
        if room is not None and room < 24:
            raise UnsupportedError("its context is too short to try it")
    # Of their own, since nothing of it is to be remembered.
    answers = {name: Answers(each.stack) for name, each in answers.items()}
    rows = _Watched(answers, most=4, crowd=crowd, piece=8)
    draw, names = torch.Generator().manual_seed(0), cycle(answers)
    groups = [[_job(length, next(names), answers, draw) for length in group] for group in PROMPTS]
    for jobs in groups:
        rows.step(jobs)
    while rows.busy:
        rows.step([])
    for job in (job for group in groups for job in group):
        if (error := job.future.exception()) is not None:
            raise UnsupportedError(f"tried, rows that come and go end in {type(error).__name__}: {error}")
    for row, logits in rows.seen.items():
        _compare(row.answers.stack, row.ids[:-1], torch.cat(logits))


def _job(length: int, name: str, answers: dict[str, Answers], draw: torch.Generator) -> Job:
    size = vocabulary_of(answers[name].stack.model) or 2
    ids = torch.randint(size, (length,), generator=draw).tolist()
    return Job(Request("", max_tokens=4, ids=tuple(ids), temperature=0), ids, 4, model=name)


@torch.no_grad()
def _compare(stack: Stack, ids: list[int], seen: Tensor) -> None:
    """The last logits [n, V] of a row beside those of its text in one call."""
    alone = stack.model(input_ids=torch.tensor([ids], device=seen.device), use_cache=False).logits[
        0, -len(seen) :
    ]
    most = float((alone.float() - seen.float()).abs().max() / alone.float().abs().max())
    if not most <= torch.finfo(alone.dtype).eps ** 0.5:
        raise UnsupportedError(
            f"tried, rows that come and go compute something else than each alone ({most:.0e})"
        )
