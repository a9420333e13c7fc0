"""Continuous batching: rows come and go at every step, and each is answered as alone."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from peftx import Claim, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.copies import sharing
from peftx.errors import UnsupportedError
from peftx.kernel.slots import slot_of
from peftx.testing import ARCHITECTURES, tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank
from peftx.testing.shapes import FIRST_BYTE, VOCABULARY
from peftx.testing.subject import ENCODERS
from peftx.toolkits.decoding import Generation
from peftx.toolkits.serving import Engine, Job, Request, Scheduler, Server
from peftx.toolkits.serving.answers import Answers
from peftx.toolkits.serving.packed import _COPIES, Packed, pack
from peftx.toolkits.serving.prefix import PrefixCache
from peftx.toolkits.serving.rows import Rows, prove
from peftx.toolkits.serving.shelves import Shelved, size_of
from peftx.toolkits.serving.slots import Slots
from peftx_pasta import Pasta

PROMPTS = [
    "Once upon a time",
    "The river took the bridge, the camera and the car",
    "A",
    "Nobody knew what the man in the blue coat had bought",
    "Seven",
]


def built(*plugins: Plugin, arch: str = "llama") -> Stack:
    """A tiny random model that writes printable characters only, and never ends by itself."""
    model = tiny(arch)
    printable = range(FIRST_BYTE + 32, FIRST_BYTE + 127)
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in printable]
    return Stack(model, plugins, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def stack() -> Stack:
    found = built()
    found.model.eval()
    return found


def job_of(stack: Stack, prompt: str, **options: Any) -> Job:
    request = Request(prompt, **{"max_tokens": 8, "temperature": 0.0} | options)
    return Job(request, stack.tokenizer(prompt).input_ids, request.max_tokens or 0, model="one")


def rows_of(stack: Stack, **options: Any) -> Rows:
    return Rows({"one": Answers(stack)}, **{"most": 4} | options)


def finish(rows: Rows, jobs: Sequence[Job] = ()) -> None:
    """Answer them and those that run."""
    waiting = list(jobs)
    while waiting or rows.busy:
        now, waiting = waiting[: rows.free], waiting[rows.free :]
        rows.step(now)


# ---------------------------------------------------------------------------------------------------------------- cache
def test_slots_hold_what_caches_of_their_own_hold() -> None:
    """Rows that come, grow and go in any order, against a cache for each."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)

    def drawn(batch: int, columns: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(batch, 2, columns, size, generator=generator) for size in (4, 3))  # type: ignore[return-value]

    def cache_of(columns: int) -> DynamicCache:
        found = DynamicCache()
        for layer in range(2):
            found.update(*drawn(1, columns), layer)
        return found

    slots, alone, moved = Slots[int](cache_of(1), 5), dict[int, DynamicCache](), 0
    for name in range(600):
        choice = draw.random()
        if choice < 0.12 and len(alone) < 5:
            own = cache_of(draw.choice((1, 3, 40, 150, 253, 500, 900)))
            slots.put(name, own, 0, own.get_seq_length())
            alone[name] = own
        elif choice < 0.2 and alone:
            gone = draw.choice([*alone])
            slots.drop(gone)
            del alone[gone]
        elif alone:
            before = slots.rows
            slots.ready()
            moved += slots.rows != before
            for layer in range(2):
                keys, values = drawn(len(alone), 1)
                seen = slots.update(keys, values, layer)
                for row, name in enumerate(slots.rows):
                    expected = alone[name].update(keys[row : row + 1], values[row : row + 1], layer)
                    for found, wanted in zip(seen, expected, strict=True):
                        assert torch.equal(found[row : row + 1, :, -wanted.shape[2] :], wanted)
                        assert not found[row : row + 1, :, : -wanted.shape[2]].isnan().any()
            slots.advance()
            assert slots.get_seq_length() == max(own.get_seq_length() for own in alone.values())
        assert {*slots.rows} == alone.keys()
        assert slots.lengths == [alone[name].get_seq_length() for name in slots.rows]
        assert all(size_of(length - 1) <= shelf.size for shelf in slots.shelves for length in shelf.lengths)
    assert moved > 3, "no row outgrew its shelf before another"


def cache_with(columns: int, rows: int = 1) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 4), 0)
    return cache


def test_a_slot_comes_out_as_a_cache() -> None:
    cache = cache_with(7, rows=2)
    slots = Slots[str](cache, 2)
    slots.put("one", cache, 1, 5)
    slots.put("two", cache, 0, 7)
    own = slots.row("one", tiny("llama").config)
    assert torch.equal(own.layers[0].keys, cache.layers[0].keys[1:, :, 2:])


def test_slots_take_the_memory_of_the_rows_that_there_are() -> None:
    cache = cache_with(30)
    slots, most = Slots[int](cache, 32), []
    for index in range(5):
        slots.put(index, cache, 0, 30)
        most.append(slots.own[0].room(slots.shelves[0])[0])
    assert most == [1, 2, 4, 4, 8]
    for index in range(5):
        assert torch.equal(slots.own[0].row(slots.shelves[0], index)[0], cache.layers[0].keys[0])


def test_a_long_row_does_not_make_the_others_longer() -> None:
    """31 rows of 40 and one of 8,000: four times what their columns take at most, and what goes is given back."""
    short, long = cache_with(40), cache_with(8000)
    slots = Slots[int](short, 32)

    def held() -> int:
        return sum(t.numel() for layer in slots.own for kept in layer._kept.values() for t in kept)

    for index in range(31):
        slots.put(index, short, 0, 40)
    few = held()
    slots.put(31, long, 0, 8000)
    slots.ready()
    assert held() <= 4 * 2 * 2 * 4 * (31 * 40 + 8000)
    seen = slots.update(torch.ones(32, 2, 1, 4), torch.ones(32, 2, 1, 4), 0)
    assert [part.shape[2] for part in seen[0].parts] == [41, 8001]
    slots.advance()
    slots.drop(31)
    assert held() == few


def test_shelves_look_like_one_tensor() -> None:
    """Whatever is done with them, as with the whole; and what is read part by part is not copied."""
    short, long = torch.randn(2, 3, 4, 5), torch.randn(1, 3, 9, 5)
    found = Shelved([short, long], 0.0)
    whole = torch.cat([F.pad(short, (0, 0, 5, 0)), long])
    assert (found.shape, found.dtype, found.device) == (whole.shape, whole.dtype, whole.device)
    query = torch.randn(3, 3, 1, 5)
    for compute in (
        lambda x: x + 1, lambda x: x[:, :, -4:], lambda x: torch.cat([x, x], 2), lambda x: query @ x.mT, torch.exp,
        lambda x: F.scaled_dot_product_attention(query, x, x), lambda x: x.clone(), lambda x: x.contiguous(),
        lambda x: x.repeat_interleave(2, 1), lambda x: x.to(torch.float64),
    ):  # fmt: skip
        assert torch.equal(compute(found), compute(whole))
    assert found.parts[1] is long


def test_what_was_no_number_goes_with_its_row() -> None:
    """A masked column counts zero times what stands there."""

    def cache_of(columns: int, value: float) -> DynamicCache:
        found = DynamicCache()
        found.update(torch.full((1, 2, columns, 4), value), torch.full((1, 2, columns, 4), value), 0)
        return found

    none = float("nan")
    for came, gone, last in (
        ([(9, 1.0), (9, none)], 1, [(2, 1.0)]),  # one that comes
        ([(9, none), (9, 1.0), (2, 1.0)], 0, []),  # the last one, which takes the place
    ):
        slots = Slots[int](cache_of(1, 1.0), 3)
        for index, row in enumerate(came):
            slots.put(index, cache_of(*row), 0, row[0])
        slots.drop(gone)
        for row in last:
            slots.put(9, cache_of(*row), 0, row[0])
        slots.ready()
        for seen in slots.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0):
            assert seen.shape[2] == 10
            assert seen.isfinite().all()


# -------------------------------------------------------------------------------------------------------- architectures
WHOLE = {
    "mamba": "LinearAttentionLayer",
    "qwen3_next": "LinearAttentionLayer",
    "qwen3_5": "LinearAttentionLayer",
    "qwen3_5_moe": "LinearAttentionLayer",
    "t5": "encoder",
    "bart": "encoder",
    "whisper": "encoder",
}


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in ENCODERS | {"vit", "clip"}])
def test_every_architecture_that_writes_is_tried(arch: str) -> None:
    model = tiny(arch).eval()
    assert model.can_generate()
    stack = Stack(model, [], tokenizer=tiny_tokenizer())
    if arch in WHOLE:
        with pytest.raises(UnsupportedError, match=WHOLE[arch]):
            prove({"one": Answers(stack)})
    else:
        prove({"one": Answers(stack)})


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "gpt2", "bloom", "opt", "gemma4"])
def test_rows_that_come_one_by_one_are_answered_as_alone(arch: str) -> None:
    """Beyond the window of those that slide: texts of 90 tokens, a window of 64 in mistral and gemma3."""
    stack = built(arch=arch)
    stack.model.eval()
    rows = rows_of(stack, piece=16)
    prompts = [*PROMPTS, "The bridge over the river was closed for the whole of the winter"]
    jobs = [job_of(stack, prompt, max_tokens=30 - 4 * i) for i, prompt in enumerate(prompts)]
    rows.step(jobs[:1])
    rows.step(jobs[1:2])
    rows.step([])
    finish(rows, jobs[2:])
    for prompt, job in zip(prompts, jobs, strict=True):
        expected = stack.generate(prompt, max_new_tokens=job.max_tokens, do_sample=False)
        assert job.result(0).text == expected, prompt


# ------------------------------------------------------------------------------------------------------------- requests
def test_each_row_samples_stops_and_streams_as_it_likes(stack: Stack) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        (PROMPTS[0], {}),
        (PROMPTS[1], {"temperature": 1.0, "seed": 3, "top_p": 0.9}),
        (PROMPTS[2], {"temperature": 1.5, "seed": 3, "stream": True}),
        (PROMPTS[3], {"presence_penalty": 1.5, "frequency_penalty": 0.5}),
        (PROMPTS[4], {"logit_bias": ((FIRST_BYTE + 65, 50.0),)}),
    ]
    alone = []
    for prompt, options in asked:
        job = job_of(stack, prompt, **options)
        finish(rows_of(stack), [job])
        alone.append(job.result(0).text)
    jobs = [job_of(stack, prompt, **options) for prompt, options in asked]
    finish(rows_of(stack, most=5), jobs)
    assert [job.result(0).text for job in jobs] == alone
    assert "".join(jobs[2].pieces()) == alone[2]
    assert alone[4] == "A" * 8
    for (prompt, options), text in zip(asked[1:3], alone[1:3], strict=True):
        own = {"temperature": options["temperature"], "top_p": options.get("top_p", 1.0), "top_k": 0}
        expected = stack.generate(prompt, max_new_tokens=8, do_sample=True, seed=options["seed"], **own)
        assert text == expected, "the seed means what it means elsewhere"


def test_requests_that_sample_alike_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the model's settings change, and never where something is of a prompt: its length, or what it may say."""
    stack, prepared = Stack(tiny("llama").eval(), [], tokenizer=tiny_tokenizer()), list[int]()
    prepare = Generation.prepare
    monkeypatch.setattr(Generation, "prepare", lambda self: prepared.append(1) or prepare(self))
    rows = rows_of(stack)

    def asked(times: int, **options: Any) -> int:
        prepared.clear()
        jobs = [job_of(stack, prompt, **options) for prompt in PROMPTS[:times]]
        finish(rows, jobs)
        for prompt, job in zip(PROMPTS, jobs, strict=False):
            if not options:
                assert job.result(0).text == stack.generate(prompt, max_new_tokens=8, do_sample=False)
        return len(prepared)

    assert asked(3) == 1
    assert asked(3) == 0
    assert asked(2, temperature=1.0, seed=1) == 1
    assert asked(2, logit_bias=((FIRST_BYTE + 65, 50.0),)) == 2
    assert asked(2) == 1
    ends = stack.generate(PROMPTS[0], max_new_tokens=2, do_sample=False)
    stack.model.generation_config.eos_token_id = stack.tokenizer(ends).input_ids[-1]
    assert asked(2) == 1
    stack.model.generation_config.suppress_tokens = [FIRST_BYTE + 65]
    assert asked(2) == 2


def test_a_stop_string_ends_its_row_alone(stack: Stack) -> None:
    texts = {prompt: stack.generate(prompt, max_new_tokens=20, do_sample=False) for prompt in PROMPTS[:2]}
    stop = texts[PROMPTS[0]][4:6]
    first = job_of(stack, PROMPTS[0], max_tokens=20, stop=(stop,))
    second = job_of(stack, PROMPTS[1], max_tokens=20)
    rows = rows_of(stack)
    rows.step([first, second])
    while not first.future.done():
        rows.step([])
    assert rows.busy
    assert not second.future.done()
    finish(rows)
    assert first.result(0).text == texts[PROMPTS[0]].partition(stop)[0]
    assert first.result(0).finish_reason == "stop"
    assert second.result(0).text == texts[PROMPTS[1]]


def test_a_cancelled_row_gives_its_slot_away_within_a_step(stack: Stack) -> None:
    rows = rows_of(stack, most=2)
    jobs = [job_of(stack, prompt, max_tokens=50) for prompt in PROMPTS[:2]]
    rows.step(jobs)
    assert rows.free == 0
    jobs[0].cancel()
    rows.step([])
    assert rows.free == 1
    assert jobs[0].future.done()
    assert not jobs[1].future.done()
    late = job_of(stack, PROMPTS[2])
    rows.step([late])
    finish(rows)
    assert late.result(0).text == stack.generate(PROMPTS[2], max_new_tokens=8, do_sample=False)
    assert jobs[1].result(0).text == stack.generate(PROMPTS[1], max_new_tokens=50, do_sample=False)


def test_a_long_prompt_is_read_in_pieces_beside_those_who_write(stack: Stack) -> None:
    rows = rows_of(stack, piece=8)
    short = job_of(stack, PROMPTS[2], max_tokens=20)
    rows.step([short])
    long = job_of(stack, PROMPTS[1])
    steps = -(-len(long.ids) // 8)
    assert steps > 3
    written = len(rows._writing[0].written)
    for step in range(steps - 1):
        rows.step([long] if step == 0 else [])
    assert len(rows._writing) == 1, "the prompt is still being read"
    assert len(rows._writing[0].written) == written + steps - 1, "a token in each step"
    long.cancel()
    rows.step([])
    assert long.future.done()
    assert not rows._reading
    finish(rows)


def test_one_request_that_fails_is_the_only_one(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, jobs = rows_of(stack), [job_of(stack, prompt) for prompt in PROMPTS[:3]]
    rows.step(jobs[:2])
    monkeypatch.setattr(rows._writing[0], "pick", lambda logits: 1 / 0)
    monkeypatch.setattr(rows._writing[0], "plain", False)
    rows.step([])
    finish(rows, jobs[2:])
    assert isinstance(jobs[0].future.exception(), ZeroDivisionError)
    for job, prompt in zip(jobs[1:], PROMPTS[1:3], strict=True):
        assert job.result(0).text == stack.generate(prompt, max_new_tokens=8, do_sample=False)


def test_a_model_that_fails_ends_the_rows_it_was_called_for(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, jobs = rows_of(stack), [job_of(stack, prompt) for prompt in PROMPTS[:2]]
    rows.step(jobs)
    with monkeypatch.context() as patched:
        patched.setattr(rows, "_call", lambda *_: 1 / 0)
        rows.step([])
    assert all(isinstance(job.future.exception(), ZeroDivisionError) for job in jobs)
    assert not rows.busy
    assert rows.free == 4
    again = job_of(stack, PROMPTS[0])
    finish(rows, [again])
    assert again.result(0).text == stack.generate(PROMPTS[0], max_new_tokens=8, do_sample=False)


def test_slots_go_with_the_last_row(stack: Stack) -> None:
    rows = rows_of(stack)
    finish(rows, [job_of(stack, prompt) for prompt in PROMPTS])
    assert rows._slots is None


def test_a_step_reads_no_more_than_a_piece(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several prompts, padding left aside."""
    rows, read = rows_of(stack, piece=8), [0]
    call = rows._call

    def counting(model: Any, own: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        read[-1] += ids.numel() if ids.shape[1] > 1 or isinstance(cache, DynamicCache) else 0
        return call(model, own, ids, mask, cache)

    monkeypatch.setattr(rows, "_call", counting)
    jobs = [job_of(stack, prompt) for prompt in (PROMPTS[4], PROMPTS[1], PROMPTS[3], PROMPTS[2])]
    rows.step(jobs)
    while rows.busy:
        read.append(0)
        rows.step([])
    assert max(read) <= 8
    assert sum(read) == sum(len(job.ids) for job in jobs)


@pytest.mark.parametrize("place", ["take", "keep_row", "keep"])
def test_a_store_that_fails_ends_its_request_and_no_other(place: str) -> None:
    stack = built()

    class Store(PrefixCache): ...

    def failing(self: Store, ids: list[int], *rest: Any) -> Any:
        if PROMPTS[1].startswith(stack.tokenizer.decode(ids, skip_special_tokens=True)[:10]):
            raise ZeroDivisionError
        return getattr(PrefixCache, place)(self, ids, *rest)

    setattr(Store, place, failing)
    with Engine(Server(stack, scheduler=Scheduler(prefixes=Store(stack.model, entries=4)))) as engine:
        for length in (1, 6):
            jobs = [engine.submit(Request(prompt, max_tokens=length, temperature=0)) for prompt in PROMPTS]
            for prompt, job in zip(PROMPTS, jobs, strict=True):
                if prompt == PROMPTS[1]:
                    with pytest.raises(ZeroDivisionError):
                        job.result(30)
                else:
                    assert job.result(30).text == stack.generate(
                        prompt, max_new_tokens=length, do_sample=False
                    )


def test_a_listener_that_fails_ends_its_request_and_no_other(stack: Stack) -> None:
    def send(piece: str | None) -> None:
        raise ZeroDivisionError

    rows = rows_of(stack)
    jobs = [job_of(stack, prompt, stream=True) for prompt in PROMPTS[:3]]
    jobs[1].listen(send)
    jobs[2].cancel()
    jobs[2].listen(send)
    finish(rows, jobs)
    assert isinstance(jobs[1].future.exception(), ZeroDivisionError)
    assert "".join(jobs[0].pieces()) == stack.generate(PROMPTS[0], max_new_tokens=8, do_sample=False)


# ------------------------------------------------------------------------------------------------ what is not the same
class _Mixing(Delta):
    """Its output for a row depends on the rows beside it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0.1 * y.mean(0, keepdim=True)


class Mixing(Plugin):
    claims: set[Claim] = set()

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.o"):
            site.attach(_Mixing())


class _Counting(Delta):
    """Looks at how many tokens there are, pads with them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + 0.1 * y.shape[1])


class Counting(Mixing):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.o"):
            site.attach(_Counting())


@pytest.mark.parametrize("plugin", [Mixing, Counting])
def test_what_computes_something_else_in_company_runs_whole(plugin: type[Plugin]) -> None:
    stack = built(plugin())
    with Engine(Server(stack)) as engine:
        assert "something else than each alone" in engine.whole
        assert engine.submit(Request("A", max_tokens=3, temperature=0)).result(30).completion_tokens == 3


def test_what_has_a_say_in_whole_texts_runs_whole() -> None:
    class Loop(Plugin):
        claims: set[Claim] = set()

        @hookimpl(wrapper=True)
        def decode(self, request: Any) -> Any:
            return (yield)

    assert "whole text" in Engine(Server(built(Loop()))).whole


@pytest.mark.parametrize("setting", [{"stop_strings": ["e"]}, {"max_time": 9.0}])
def test_what_ends_texts_in_ways_of_its_own_runs_whole(setting: dict[str, Any]) -> None:
    stack = built()
    stack.model.generation_config.update(**setting)
    assert "end texts" in Engine(Server(stack)).whole


# --------------------------------------------------------------------------------------------------------------- engine
def test_prompts_begin_from_what_others_read(stack: Stack) -> None:
    long = "The river took the bridge, the camera and the car. "
    with Engine(Server(stack, scheduler=Scheduler(prefix_cache=True))) as engine:
        assert engine.prefixes is not None
        assert not engine.whole
        for tail in ("One", "Two"):
            engine.submit(Request(long + tail, max_tokens=4, temperature=0)).result(30)
        jobs = [engine.submit(Request(long + f"{i}", max_tokens=6, temperature=0)) for i in range(6)]
        for i, job in enumerate(jobs):
            expected = stack.generate(long + f"{i}", max_new_tokens=6, do_sample=False)
            assert job.result(30).text == expected
        assert engine.prefixes.hits >= 7


def test_a_store_and_an_order_of_a_plugins_own() -> None:
    """Seen by the engine as its own; who is left out of an order waits as long as others run, and no longer."""
    asked: list[int] = []

    class Store(PrefixCache):
        def take(self, ids: list[int]) -> Any:
            asked.append(len(ids))
            return super().take(ids)

    class Policy(Plugin):
        claims: set[Claim] = set()

        @hookimpl
        def serve(self, server: Server) -> None:
            server.scheduler.prefixes = Store(server.stack.model, entries=4)
            server.scheduler.order = lambda jobs: [job for job in jobs if job.prompt_tokens < 10]

    stack = built(Policy())
    with Engine(Server(stack)) as engine:
        jobs = [engine.submit(Request(prompt, max_tokens=6, temperature=0)) for prompt in PROMPTS]
        for prompt, job in zip(PROMPTS, jobs, strict=True):
            assert job.result(60).text == stack.generate(prompt, max_new_tokens=6, do_sample=False)
    assert sorted(asked) == sorted(job.prompt_tokens for job in jobs)


def test_an_order_that_is_none_loses_and_doubles_nothing() -> None:
    """It empties the list that it is given, names jobs twice, and jobs of others."""
    stack = built()
    other = job_of(stack, "no job of this engine's")

    def order(jobs: Sequence[Job]) -> list[Job]:
        found = [*jobs, other, *jobs]
        jobs.clear()  # type: ignore[attr-defined]
        return found

    with Engine(Server(stack, scheduler=Scheduler(order=order, max_batch=3))) as engine:
        jobs = [
            engine.submit(Request(prompt, max_tokens=6, temperature=0, stream=True)) for prompt in PROMPTS
        ]
        for prompt, job in zip(PROMPTS, jobs, strict=True):
            assert "".join(job.pieces()) == stack.generate(prompt, max_new_tokens=6, do_sample=False)
    assert not other.future.done()


def test_an_order_that_fails_is_the_answer_of_those_that_wait() -> None:
    stack, broken = built(), [True]

    def order(jobs: Sequence[Job]) -> list[Job]:
        return [1 / 0] if broken[0] else list(jobs)  # type: ignore[list-item]

    with Engine(Server(stack, scheduler=Scheduler(order=order))) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.submit(Request("A", max_tokens=3, temperature=0)).result(30)
        broken[0] = False
        assert engine.submit(Request("A", max_tokens=3, temperature=0)).result(30).completion_tokens == 3


def test_guests_that_never_end_leave_rows_their_turn(stack: Stack) -> None:
    ended = threading.Event()
    with Engine(Server(stack)) as engine:

        def visit() -> None:
            while not ended.is_set():
                with engine.using():
                    ended.wait(0.005)

        threads = [threading.Thread(target=visit) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            job = engine.submit(Request("A", max_tokens=20, temperature=0))
            assert job.result(10).completion_tokens == 20
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def test_what_goes_with_tokens_is_remembered_with_them() -> None:
    stack = built(Pasta())
    long = "The river took the bridge, the camera and the car. "
    with Engine(Server(stack, scheduler=Scheduler(prefix_cache=True))) as engine:
        assert not engine.whole
        for tail in ("One", "Two", "One more", ""):
            job = engine.submit(Request(long + tail, max_tokens=6, temperature=0))
            assert job.result(30).text == stack.generate(long + tail, max_new_tokens=6, do_sample=False)
        assert engine.prefixes is not None
        assert engine.prefixes.hits >= 3


def test_others_get_the_model_between_two_steps(stack: Stack) -> None:
    with Engine(Server(stack)) as engine:
        job = engine.submit(Request("A", max_tokens=100, temperature=0, stream=True))
        next(job.pieces())
        with engine.using() as own:
            assert own is stack
            assert not job.future.done()
        assert job.result(30).completion_tokens == 100


def test_closing_finishes_the_rows_that_run(stack: Stack) -> None:
    engine = Engine(Server(stack, scheduler=Scheduler(max_batch=1))).start()
    running = engine.submit(Request("A", max_tokens=60, temperature=0, stream=True))
    next(running.pieces())
    waiting = engine.submit(Request("B", max_tokens=5, temperature=0))
    engine.close()
    assert running.result(0).completion_tokens == 60
    assert "closing" in str(waiting.future.exception())


def test_many_threads_ask_for_many_lengths(stack: Stack) -> None:
    expected = {prompt: stack.generate(prompt, max_new_tokens=24, do_sample=False) for prompt in PROMPTS}
    found: list[tuple[str, int, str]] = []
    with Engine(Server(stack, scheduler=Scheduler(max_batch=6))) as engine:

        def ask(i: int) -> None:
            prompt, length = PROMPTS[i % 5], 1 + (7 * i) % 24
            text = engine.submit(Request(prompt, max_tokens=length, temperature=0)).result(60).text
            found.append((prompt, length, text))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    for prompt, length, text in found:
        assert text == expected[prompt][:length], "a character is a token here"


# -------------------------------------------------------------------------------------------------------------- weights
def test_packed_weights_multiply_alike() -> None:
    model = tiny("llama").eval()
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        count = pack(model)
        after = model(ids).logits
    assert count == sum(isinstance(module, nn.Linear) for module in model.modules())
    assert torch.allclose(before, after, atol=1e-4)
    model(ids).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_changed_weight_is_multiplied_itself() -> None:
    weight, x = torch.randn(8, 6), torch.randn(3, 6)
    product = Packed(weight)
    other = torch.randn(8, 6)
    with torch.no_grad():
        assert torch.equal(product(x, other, None), F.linear(x, other))
        weight.mul_(2)
        assert torch.equal(product(x, weight, None), F.linear(x, weight))


def test_a_weight_with_other_values_under_it_is_multiplied_itself() -> None:
    """What `model.half().float()` does counts as no change of the parameter."""
    layer, x = nn.Linear(6, 8, bias=False), torch.randn(3, 6)
    product = Packed(layer.weight)
    layer.weight.data = torch.randn(8, 6)
    with torch.no_grad():
        assert torch.equal(product(x, layer.weight, None), layer(x))


def test_a_packed_model_can_be_copied() -> None:
    model, ids = tiny("llama").eval(), torch.tensor([[5, 6, 7]])
    pack(model)
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(model)(ids).logits, model(ids).logits, atol=1e-5)


def test_models_of_one_base_share_their_copies() -> None:
    base = tiny("llama").eval()
    models = [sharing(base) for _ in range(3)]
    gc.collect()
    before = len(_COPIES)
    for model in models:
        pack(model)
    weights = {id(m.weight) for m in base.modules() if isinstance(m, nn.Linear)}
    assert len(_COPIES) - before == len(weights)
    places = [slot_of(model.model.layers[0].mlp.up_proj) for model in models]
    assert places[0].base is places[1].base is places[2].base  # type: ignore[union-attr]
    del models, model, places, base
    gc.collect()
    assert len(_COPIES) == before, "they go with the weights"


def test_packed_weights_can_be_left_alone() -> None:
    stack = built()
    engine = Engine(Server(stack, scheduler=Scheduler(pack_weights=False)))
    assert engine.packed == 0
    assert all(slot_of(module) is None for module in stack.model.modules())


def test_weights_that_a_model_reads_by_itself_are_not_packed() -> None:
    """Mamba multiplies by some weights in its own code, and finds in them what an adapter adds."""
    stack = Stack(tiny("mamba"), [ReferenceLowRank()], tokenizer=tiny_tokenizer())
    for parameter in stack.ledger.parameters("reference-low-rank"):
        parameter.data.add_(0.05)
    text = stack.generate("abc def", max_new_tokens=5, do_sample=False)
    with Engine(Server(stack)) as engine:
        answer = engine.submit(Request("abc def", max_tokens=5, temperature=0.0)).result(60)
    assert answer.text == text
    assert engine.packed > 0
