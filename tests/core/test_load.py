"""Many clients at once, of bundles of all kinds: nothing is lost, nothing is mixed, and who hangs up makes room."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from peftx import Stack
from peftx.copies import sharing
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.shapes import FIRST_BYTE, VOCABULARY
from peftx.toolkits.serving import Engine, Job, Scheduler, Server
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.rows import Rows
from peftx_dora import Dora
from peftx_ia3 import Ia3
from peftx_lora import Lora
from peftx_ntk_attention import NtkAttention
from peftx_prompt_tuning import PromptTuning

MADE: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "lora": lambda: [Lora(rank=2)],
    "other": lambda: [Lora(rank=5, targets="attention")],
    "soft": lambda: [PromptTuning(length=3)],
    "dora": lambda: [Dora(rank=2)],
    "ia3": lambda: [Ia3()],
    "both": lambda: [Lora(rank=2), PromptTuning(length=2)],
    "apart": lambda: [NtkAttention()],
}
PROMPTS = ["Once upon a time", "The river took the bridge, the camera and the car", "A", "Nobody knew"]
LENGTHS = (5, 12, 20)


@pytest.fixture(scope="module")
def stacks() -> dict[str, Stack]:
    base = tiny("gpt2").eval().requires_grad_(False)
    printable = range(FIRST_BYTE + 32, FIRST_BYTE + 127)
    base.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in printable]
    found = {}
    for number, (name, make) in enumerate(MADE.items()):
        stack = found[name] = Stack(sharing(base), make(), tokenizer=tiny_tokenizer())
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():  # off their first values, or all would write the same
            for parameter in (p for p in stack.model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        stack.model.eval()
    return found


@pytest.fixture(scope="module")
def alone(stacks: dict[str, Stack]) -> dict[tuple[str, str], str]:
    """What each bundle writes to each prompt; a character is a token here."""
    texts = {
        (name, prompt): stack.generate(prompt, max_new_tokens=max(LENGTHS), do_sample=False)
        for (name, stack), prompt in itertools.product(stacks.items(), PROMPTS)
    }
    assert len(set(texts.values())) > len(PROMPTS) * 6, "they differ, or nothing was shown"
    return texts


@dataclass
class Client:
    """Speaks ASGI to an application, so that 200 of them need no socket and no thread."""

    app: Any
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    pieces: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    status: int = 0

    async def post(self, path: str, **body: Any) -> None:
        content = json.dumps(body).encode()
        messages = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(messages, None)) is None:
                await self.gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message.get("body"):
                await self.pieces.put(message["body"])

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80), "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        await self.app(scope, receive, send)
        await self.pieces.put(None)

    async def text(self) -> str:
        """All pieces of a stream."""
        found, ended = "", False
        while (piece := await self.pieces.get()) is not None:
            for line in piece.decode().split("\n\n"):
                if line and line != "data: [DONE]":
                    found += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                ended |= line == "data: [DONE]"
        assert ended, "a stream that ends says so"
        return found


@asynccontextmanager
async def served(stacks: dict[str, Stack], **options: Any) -> AsyncIterator[Any]:
    scheduler = {"max_queue": 1000} | options
    app = build_app(*(Server(s, name=name, scheduler=Scheduler(**scheduler)) for name, s in stacks.items()))
    async with app.router.lifespan_context(app):
        yield app


async def _ask(app: Any, name: str, prompt: str, length: int) -> tuple[str, str]:
    client = Client(app)
    asking = asyncio.create_task(
        client.post(
            "/v1/completions", model=name, prompt=prompt, max_tokens=length, temperature=0, stream=True
        )
    )
    text = await client.text()
    await asking
    return text, name


def crowd(stacks: dict[str, Stack], alone: dict[tuple[str, str], str], count: int) -> None:
    """So many clients, all at once; each bundle, prompt and length has its turn."""
    asked = list(itertools.islice(itertools.cycle(itertools.product(LENGTHS, PROMPTS, stacks)), count))

    async def run() -> None:
        async with served(stacks) as app:
            found = await asyncio.gather(*(_ask(app, name, prompt, n) for n, prompt, name in asked))
        for (length, prompt, name), (text, _) in zip(asked, found, strict=True):
            assert text == alone[name, prompt][:length], (name, prompt, length)

    asyncio.run(run())


def test_streams_of_all_bundles_at_once(stacks: dict[str, Stack], alone: dict[tuple[str, str], str]) -> None:
    crowd(stacks, alone, 48)


@pytest.mark.slow
def test_two_hundred_streams_at_once(stacks: dict[str, Stack], alone: dict[tuple[str, str], str]) -> None:
    crowd(stacks, alone, 200)


@dataclass
class Watched:
    """What the batches do, step by step; they stand still while `go` is not set."""

    jobs: list[Job] = field(default_factory=list)
    stuck: list[Job] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Nothing is computed meanwhile."""
        self.go.clear()
        try:
            yield
        finally:
            self.go.set()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched()
    found.go.set()
    step, submit = Rows.step, Engine.submit

    def stepping(self: Rows, jobs: Any) -> None:
        found.go.wait(60)
        gone = {row for row in (*self._reading, *self._writing) if row.job.cancelled}
        step(self, jobs)
        found.stuck += [row.job for row in (*self._reading, *self._writing) if row in gone]

    def submitting(self: Engine, request: Any) -> Job:
        found.jobs.append(submit(self, request))
        return found.jobs[-1]

    monkeypatch.setattr(Rows, "step", stepping)
    monkeypatch.setattr(Engine, "submit", submitting)
    return found


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_who_hangs_up_makes_room_within_a_step(
    stacks: dict[str, Stack], alone: dict[tuple[str, str], str], watched: Watched
) -> None:
    """Those who were being answered, who waited for a slot, and who went before their stream began."""
    chosen = {name: stacks[name] for name in ("plain", "soft", "lora", "dora")}
    long = {"prompt": "A", "max_tokens": 110, "temperature": 0}

    async def run() -> None:
        async with served(chosen, max_batch=4) as app:
            clients = [Client(app) for _ in range(6)]
            tasks = []
            for client, name, stream in zip(
                clients, [*chosen, "plain", "lora"], [True, False] * 3, strict=True
            ):
                asking = client.post("/v1/completions", model=name, stream=stream, **long)
                tasks.append(asyncio.create_task(asking))
                await _until(lambda: len(watched.jobs) == len(tasks))
            await clients[0].pieces.get()
            await clients[2].pieces.get()
            with watched.standing():
                early = Client(app)
                early.gone.set()
                await early.post("/v1/completions", model="soft", stream=True, **long)
                for index in (0, 1, 4, 5):
                    clients[index].gone.set()
                    await tasks[index]
                assert [job.cancelled for job in watched.jobs] == [True, True, False, False, True, True, True]
                late = asyncio.create_task(_ask(app, "soft", PROMPTS[0], 5))
                await _until(lambda: len(watched.jobs) == 8)
            assert (await late)[0] == alone["soft", PROMPTS[0]][:5]
            assert not watched.jobs[2].future.done(), "the late one did not wait for those who write on"
            await asyncio.gather(tasks[2], tasks[3])
        assert not watched.stuck
        for index, job in enumerate(watched.jobs):
            written = 0 if job.future.exception() else job.result(0).completion_tokens
            assert written == (5 if index == 7 else 110) if index in (2, 3, 7) else written < 110

    asyncio.run(run())


def test_a_bundle_that_goes_under_load_answers_everyone(
    stacks: dict[str, Stack], alone: dict[tuple[str, str], str], watched: Watched
) -> None:
    async def run() -> None:
        async with served(stacks, max_batch=8) as app:
            asked = list(itertools.product(("lora", "soft", "apart"), PROMPTS, (12, 20)))
            going = [Client(app) for _ in range(3)]
            names = ("lora", "soft", "apart")
            with watched.standing():
                asking = [asyncio.create_task(_ask(app, *each)) for each in asked]
                await _until(lambda: len(watched.jobs) == len(asked))
                unloads = [
                    asyncio.create_task(client.post("/v1/unload_lora_adapter", lora_name=name))
                    for client, name in zip(going, names, strict=True)
                ]
                await asyncio.sleep(0.1)  # they are at it
            for (name, prompt, length), (text, _) in zip(asked, await asyncio.gather(*asking), strict=True):
                assert text == alone[name, prompt][:length]
            await asyncio.gather(*unloads)
            assert [client.status for client in going] == [200] * 3
            for name in names:
                late = Client(app)
                await late.post("/v1/completions", model=name, prompt="A")
                assert late.status == 404
            assert (await _ask(app, "plain", "A", 5))[0] == alone["plain", "A"][:5]

    asyncio.run(run())
