"""Pieces of texts on their way from the thread that writes them to an event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from peftx.toolkits.serving.job import Job, Piece, Request
from peftx.toolkits.serving.replies import _POSTS, Pieces, _pieces_of, _Post

MANY = 2000


def test_every_piece_arrives_in_its_order_and_the_loop_is_woken_seldom() -> None:
    """From four threads at once, into queues of their own, while the loop reads."""
    woken = 0

    async def main() -> list[list[int]]:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(*arguments)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        post, queues = _Post(), [Pieces() for _ in range(4)]

        def write(queue: Pieces) -> None:
            for i in range(MANY):
                post.put(loop, queue, (i, Piece(str(i))))

        threads = [threading.Thread(target=write, args=(queue,)) for queue in queues]
        for thread in threads:
            thread.start()
            thread.join()  # the loop is busy with this, as with a page: it looks when all are there
        found = [[(await asyncio.wait_for(q.get(), 10))[0] for _ in range(MANY)] for q in queues[:2]]
        late = [threading.Thread(target=write, args=(queue,)) for queue in queues[:2]]
        for thread in late:
            thread.start()
        found += [[(await asyncio.wait_for(q.get(), 10))[0] for _ in range(MANY)] for q in queues]
        return found

    assert asyncio.run(main()) == [list(range(MANY))] * 6
    assert woken < 6 * MANY / 2


def test_a_loop_that_is_gone_is_kept_by_nobody() -> None:
    async def main() -> weakref.ref[asyncio.AbstractEventLoop]:
        job = Job(Request(""), [1], 1)
        _pieces_of([job])
        job.send("text")
        assert asyncio.get_running_loop() in _POSTS
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(main())
    gc.collect()
    assert loop() is None


def test_a_loop_that_is_closed_is_told_of_each_time() -> None:
    """So that every job whose reader is gone hears it."""
    loop = asyncio.new_event_loop()
    post = _Post()
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            post.put(loop, Pieces(), (0, None))
