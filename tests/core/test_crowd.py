"""Rows of different bundles in one batch over the base that they share."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftx import Claim, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.copies import sharing
from peftx.errors import PeftxError, UnsupportedError
from peftx.testing import tiny, tiny_tokenizer
from peftx.toolkits.serving import Engine, Request, Scheduler, Server
from peftx.toolkits.serving import engine as engine_module
from peftx.toolkits.serving.answers import Answers
from peftx.toolkits.serving.crowd import Crowd
from peftx.toolkits.serving.engine import Together
from peftx.toolkits.serving.models import Models
from peftx.toolkits.serving.prefix import PrefixCache
from peftx_bitfit import Bitfit
from peftx_compacter import Compacter
from peftx_dora import Dora
from peftx_ia3 import Ia3
from peftx_layernorm_tuning import LayernormTuning
from peftx_lora import Lora
from peftx_ntk_attention import NtkAttention
from peftx_prompt_tuning import PromptTuning
from peftx_vera import Vera

MADE: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "two": lambda: [Lora(rank=2)],
    "five": lambda: [Lora(rank=5, targets="attention")],
    "pair": lambda: [("one", Lora(rank=2, targets="mlp")), ("other", Lora(rank=3, targets="mlp.down"))],
    "ia3": lambda: [Ia3()],
    "dora": lambda: [Dora(rank=2)],
    "norms": lambda: [LayernormTuning()],
    "vera": lambda: [Vera(rank=4)],
    "biased": lambda: [Lora(rank=2, targets="mlp"), Bitfit(add=True)],
    "soft": lambda: [PromptTuning(length=3)],
    "both": lambda: [Lora(rank=2), PromptTuning(length=5)],
}
PROMPTS = ["Once upon a time", "The river took the bridge, the camera and the car", "A", "Nobody knew"]


def stack_of(base: object, *plugins: Any, seed: int = 0) -> Stack:
    """Off its first values, or all would compute the same."""
    stack = Stack(sharing(base), list(plugins), tokenizer=tiny_tokenizer())  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in stack.model.parameters():
            if p.requires_grad and plugins:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    stack.model.eval()
    return stack


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def stacks(request: pytest.FixtureRequest) -> dict[str, Stack]:
    base = tiny(request.param).eval()
    base.requires_grad_(False)
    return {name: stack_of(base, *make(), seed=i) for i, (name, make) in enumerate(MADE.items())}


def servers(stacks: dict[str, Stack], **options: object) -> list[Server]:
    return [
        Server(stack, name=name, scheduler=Scheduler(**options))  # type: ignore[arg-type]
        for name, stack in stacks.items()
    ]


def expected(stack: Stack, prompt: str, length: int) -> str:
    return stack.generate(prompt, max_new_tokens=length, do_sample=False)


def test_rows_of_all_are_answered_as_alone(stacks: dict[str, Stack]) -> None:
    with Models(servers(stacks)) as models:
        ways = {name: models.engine(name).about()["batching"] for name in stacks}
        assert set(ways.values()) == {"shared"}, ways
        assert len({id(models.engine(name)._worker) for name in stacks}) == 1
        asked = [(name, prompt) for prompt in PROMPTS for name in stacks]
        jobs = [
            models.engine(name).submit(Request(prompt, max_tokens=7, temperature=0)) for name, prompt in asked
        ]
        for (name, prompt), job in zip(asked, jobs, strict=True):
            assert job.result(60).text == expected(stacks[name], prompt, 7), (name, prompt)
    texts = {expected(stack, PROMPTS[0], 7) for stack in stacks.values()}
    assert len(texts) >= 6, "they differ, or nothing was shown"


@pytest.mark.parametrize("groups", [(3, 3), (1, 5, 2), (1, 1, 1, 9), (12,), (1,) * 7])
def test_low_rank_updates_of_any_groups(groups: tuple[int, ...]) -> None:
    """One layer, against each row by its own adapter."""
    base = tiny("llama").eval().requires_grad_(False)
    crowd = Crowd(base, packed=False)
    loras = [stack_of(base, Lora(rank=2 + i % 3, targets="mlp.up"), seed=i) for i in range(len(groups))]
    for i, stack in enumerate(loras):
        crowd.join(str(i), stack)
    names = [str(i) for i, count in enumerate(groups) for _ in range(count)]
    random.Random(0).shuffle(names)
    path = "model.layers.0.mlp.up_proj"
    x = torch.randn(len(names), 3, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for order in (names, names[::-1]):
        crowd.seat(order)
        with torch.no_grad():
            found = crowd.host.get_submodule(path)(x)
            for row, name in enumerate(order):
                alone = loras[int(name)].model.get_submodule(path)(x[row : row + 1])
                assert torch.allclose(found[row : row + 1], alone, atol=1e-5)
    crowd.join("base", stack_of(base))
    crowd.leave("0")
    crowd.seat(["base"] * len(x))
    with torch.no_grad():
        assert torch.allclose(crowd.host.get_submodule(path)(x), base.get_submodule(path)(x), atol=1e-5)


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        (lambda: NtkAttention(), "changes more than what single layers compute"),
        (lambda: Compacter(), "which is more than one layer"),
    ],
)
def test_what_cannot_share_a_batch_has_its_own_and_says_why(plugin: Callable[[], Plugin], why: str) -> None:
    base = tiny("gpt2").eval().requires_grad_(False)
    stacks = {"plain": stack_of(base), "other": stack_of(base, plugin(), seed=1)}
    with Models(servers(stacks)) as models:
        way = models.engine("other").about()["batching"]
        assert way.startswith("continuous; apart: ")
        assert why in way
        for name, stack in stacks.items():
            job = models.engine(name).submit(Request(PROMPTS[1], max_tokens=6, temperature=0))
            assert job.result(60).text == expected(stack, PROMPTS[1], 6)


class _Mixing(Delta):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0.1 * y.mean(0, keepdim=True)


class Mixing(Plugin):
    claims: set[Claim] = set()

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.o"):
            site.attach(_Mixing())


def test_what_computes_something_else_in_company_leaves_no_trace() -> None:
    base = tiny("llama").eval().requires_grad_(False)
    together = Together(base, Scheduler())
    together.join(server := Server(stack_of(base, Lora(rank=2), seed=1), name="one"), Answers(server.stack))
    mixing = Server(stack_of(base, Mixing()), name="mixing")
    with pytest.raises(UnsupportedError, match="something else than each alone"):
        together.join(mixing, Answers(mixing.stack))
    assert list(together.rows.answers) == list(together.crowd.stacks) == ["one"]
    together.worker.start()
    engine = Engine(Server(server.stack, name="two"), together).start()
    job = engine.submit(Request(PROMPTS[0], max_tokens=5, temperature=0))
    assert job.result(30).text == expected(server.stack, PROMPTS[0], 5)
    engine.close()


def test_what_fails_on_its_way_in_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("llama").eval().requires_grad_(False)
    together, server = Together(base, Scheduler()), Server(stack_of(base, Lora(rank=2), seed=1), name="one")
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "prove", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            together.join(server, Answers(server.stack))
    assert not together.crowd.stacks
    assert not any(site.low or site.runs for site in together.crowd._sites.values())


def test_rows_are_counted_on_the_hosts_device() -> None:
    base = tiny("llama").to("meta")
    crowd = Crowd(base, packed=False)
    crowd.join("one", Stack(sharing(base), [], tokenizer=tiny_tokenizer()))
    crowd.seat(["one", "one"])
    assert crowd.seats.rows["one"].device.type == "meta"


def test_another_base_is_no_company() -> None:
    base, other = (tiny("llama").eval().requires_grad_(False) for _ in range(2))
    with pytest.raises(UnsupportedError, match="does not share its base's weights"):
        Crowd(base, packed=False).join("one", stack_of(other))


def test_a_policy_of_its_own_is_kept() -> None:
    base = tiny("llama").eval().requires_grad_(False)
    stacks = {"one": stack_of(base), "two": stack_of(base)}
    found = servers(stacks)
    found[1].scheduler.max_queue = 7
    with Models(found) as models:
        assert models.engine("two").apart == "a plugin changed its scheduler"


def test_a_policy_is_a_servers_own() -> None:
    """Also where two were given one object, which the plugin of the second changes."""

    class Policy(Plugin):
        claims: set[Claim] = set()

        @hookimpl
        def serve(self, server: Server) -> None:
            server.scheduler.max_queue = 7

    base, policy = tiny("llama").eval().requires_grad_(False), Scheduler()
    found = [
        Server(stack_of(base, *own), name=str(i), scheduler=policy) for i, own in enumerate([[], [Policy()]])
    ]
    with Models(found) as models:
        assert models.engine("1").apart == "a plugin changed its scheduler"
        assert models.engine("0").server.scheduler.max_queue == policy.max_queue == 256


def test_a_store_of_prefixes_is_one_models() -> None:
    base = tiny("llama").eval().requires_grad_(False)
    store = PrefixCache(base, entries=4)
    found = servers({"one": stack_of(base), "two": stack_of(base, Lora(rank=2))}, prefixes=store)
    with pytest.raises(PeftxError, match="'two' and 'one' have one store of prefixes"):
        Models(found)


@pytest.mark.parametrize("name", ["two", "dora", "both"])
def test_adapters_that_are_switched_or_merged_are_so_in_company(stacks: dict[str, Stack], name: str) -> None:
    stack = stacks[name]
    own = {"plain": stacks["plain"], name: stack}
    with Models(servers(own)) as models:
        engine = models.engine(name)

        def check() -> str:
            jobs = [
                models.engine(each).submit(Request(PROMPTS[0], max_tokens=7, temperature=0)) for each in own
            ]
            with engine.using():
                texts = [expected(each, PROMPTS[0], 7) for each in own.values()]
            assert [job.result(30).text for job in jobs] == texts
            return texts[1]

        first = check()
        with stack.disabled():
            assert check() != first
        assert check() == first
        if name == "two":
            stack.merge()
            check()
            stack.unmerge()
        assert check() == first
        assert engine.about()["batching"] == "shared"


def test_a_name_is_free_when_its_last_request_is_answered(stacks: dict[str, Stack]) -> None:
    """Else the rows that are still written would be the next one's."""
    text = expected(stacks["two"], PROMPTS[0], 60)
    with Models(
        servers({"plain": stacks["plain"], "it": stacks["two"]}),
        loader=lambda name, path: Server(stacks[path], name=name),
    ) as models:
        job = models.engine("it").submit(Request(PROMPTS[0], max_tokens=60, temperature=0, stream=True))
        next(job.pieces())
        with models.engine("it").using():  # no step meanwhile
            leaving = threading.Thread(target=models.unload, args=("it",))
            leaving.start()
            while "it" in models._engines:
                time.sleep(0.001)
            with pytest.raises(PeftxError, match="still answering"):
                models.load("it", "five")
        leaving.join(60)
        assert job.result(0).text == text
        models.load("it", "five")
        job = models.engine("it").submit(Request(PROMPTS[0], max_tokens=7, temperature=0))
        assert job.result(30).text == expected(stacks["five"], PROMPTS[0], 7)


def test_a_bundle_that_is_refused_for_its_routes_leaves_no_trace(stacks: dict[str, Stack]) -> None:
    def loader(name: str, path: str) -> Server:
        server = Server(stacks[path], name=name)
        if path == "two":
            server.add_route("GET", "/more", lambda: "more")
        return server

    with Models(servers({"plain": stacks["plain"]}), loader=loader) as models:
        with pytest.raises(PeftxError, match="routes of its own"):
            models.load("it", "two")
        models.load("it", "dora")
        job = models.engine("it").submit(Request(PROMPTS[0], max_tokens=7, temperature=0))
        assert job.result(30).text == expected(stacks["dora"], PROMPTS[0], 7)
        assert models.engine("it").about()["batching"] == "shared"


def test_bundles_come_and_go_under_load(stacks: dict[str, Stack]) -> None:
    """Many clients of many bundles: every answer is that of its bundle; one that goes finishes what was asked."""
    texts = {(name, p): expected(stack, p, 12) for name, stack in stacks.items() for p in PROMPTS}
    late = {name: stacks[name] for name in ("five", "soft")}
    first = {name: stack for name, stack in stacks.items() if name not in late}
    wrong: list[object] = []
    done: list[str] = []

    def loader(name: str, _: str) -> Server:
        return Server(late[name], name=name)

    with Models(servers(first), loader=loader) as models:

        def ask(i: int) -> None:
            draw = random.Random(i)
            for _ in range(4):
                name, prompt = draw.choice(list(first)), draw.choice(PROMPTS)
                job = models.engine(name).submit(Request(prompt, max_tokens=12, temperature=0))
                if job.result(60).text != texts[name, prompt]:
                    wrong.append((name, prompt))
                done.append(name)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for name in late:
            models.load(name, name)
        jobs = [models.engine("soft").submit(Request(p, max_tokens=12, temperature=0)) for p in PROMPTS]
        models.unload("soft")
        assert [job.result(0).text for job in jobs] == [texts["soft", p] for p in PROMPTS]
        assert models.engine("five").about()["batching"] == "shared"
        for thread in threads:
            thread.join(120)
    assert not wrong
    assert len(done) == 48
