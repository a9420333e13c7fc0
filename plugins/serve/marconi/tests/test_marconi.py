"""Marconi: what is gone on from is exact, memory stays within its bytes, and who goes first is the least useful."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import DynamicCache

from peftx import Generation, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank, ReferencePrompt
from peftx.toolkits.decoding.cache import empty_cache
from peftx.toolkits.serving import Engine, Request, Server
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.prefix import PrefixCache
from peftx_marconi import ALONE, GRID, Costs, Marconi, MarconiConfig, Place, RadixCache, Tree, read
from peftx_token_trails import TokenTrails

test_conformance = conformance("marconi")

SYSTEM = "You keep the log of the South Head. "
TURNS = [
    SYSTEM + "Wind?",
    SYSTEM + "Which ships came in?",
    SYSTEM + "Wind?",
    "Once",
    SYSTEM + "Who wrote it?",
]


def built(arch: str = "qwen3_next", *plugins: Plugin, **options: Any) -> Stack:
    """With states that last: those of the tiny models are all but gone after five tokens."""
    model = tiny(arch)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-4.0)
    return Stack(model, [*plugins, Marconi(**options)], tokenizer=tiny_tokenizer())


def store(arch: str = "qwen3_next", **options: Any) -> RadixCache:
    return RadixCache(built(arch), MarconiConfig(**options))


def served(server: Server, prompts: list[str], new: int = 6) -> list[str]:
    """One after the other."""
    with Engine(server) as engine:
        jobs = (engine.submit(Request(prompt, max_tokens=new, temperature=0.0)) for prompt in prompts)
        return [job.result(60).text for job in jobs]


def cache_of(found: Server) -> RadixCache:
    assert isinstance(found.scheduler.prefixes, RadixCache)
    return found.scheduler.prefixes


# ------------------------------------------------------------------------------------------------- a tree without model
HYBRID = Costs(token=2, state=10, hidden=4, ssm=1, attention=1, mlp=2, numbers=8)
PLAIN = Costs(token=2, state=0, hidden=4, ssm=0, attention=1, mlp=1, numbers=0)


def tree(costs: Costs = HYBRID, capacity: float = 1000, alpha: float = 0.0) -> Tree:
    return Tree(costs, capacity, alpha)


def put(into: Tree, *texts: list[int]) -> None:
    for text in texts:
        into.insert(text, [], ())


def shape(node: Place) -> dict[tuple[int, ...], Any]:
    """Edges and what is below them; with None in it where there is no state."""
    return {
        child.edge: shape(child) | ({} if child.data.state is not None else {None: None})
        for child in node.children.values()
    }


def held(of: Tree) -> int:
    return sum(
        len(n.edge) * of.costs.token + (n.data.state is not None) * of.costs.state for n in of.radix.nodes()
    )


def test_flops_by_hand() -> None:
    """d = 4, l = 3: 3 (12 16 + 40 + 8 8 + 8 16 + 2 16 16) + 4 9 4."""
    assert HYBRID.flops(3) == 3 * (192 + 40 + 64 + 128 + 512) + 144
    assert HYBRID.bytes(3) == 16


def test_a_hit_needs_a_state_where_it_ends() -> None:
    known = tree()
    put(known, [1, 2, 3, 4])
    assert known.find([1, 2, 3, 4, 5])[:2] == (4, 4)
    assert known.find([1, 2, 9])[:2] == (0, 2)
    put(known, [1, 2])  # the branch
    assert known.find([1, 2, 9])[:2] == (2, 2)
    assert known.find([1, 2, 3, 9])[:2] == (2, 3)
    assert known.find([7])[:2] == (0, 0)
    assert shape(known.radix.root) == {(1, 2): {(3, 4): {}}}


def test_without_states_every_token_is_a_place_to_go_on_from() -> None:
    known = tree(PLAIN)
    put(known, [1, 2, 3, 4], [1, 2, 5])
    for n in range(1, 5):
        assert known.find([*[1, 2, 3, 4][:n], 9])[:2] == (n, n)


def test_bytes_are_those_that_are_held() -> None:
    known = tree()
    put(known, [1, 2, 3, 4], [1, 2, 5], [1, 2], [1, 2])
    assert shape(known.radix.root) == {(1, 2): {(3, 4): {}, (5,): {}}}
    assert known.bytes == held(known) == 5 * 2 + 3 * 10


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("costs", [HYBRID, PLAIN], ids=["hybrid", "plain"])
def test_the_capacity_is_never_exceeded(costs: Costs, alpha: float) -> None:
    draw = torch.Generator().manual_seed(0)
    known = tree(costs, 60, alpha)
    for _ in range(200):
        text = torch.randint(2, (int(torch.randint(1, 30, (1,), generator=draw)),), generator=draw).tolist()
        put(known, text)
        assert known.bytes == held(known) <= 60
        assert (known.find(text).reach == len(text)) == (costs.bytes(len(text)) <= 60)
        for node in known.radix.nodes():
            assert node.above is not None
            assert node.above.children[node.edge[0]] is node
            assert node.depth == node.above.depth + len(node.edge)
    assert known.evicted > 100


def test_what_fills_more_than_all_evicts_nothing() -> None:
    known = tree(capacity=30)
    put(known, [1, 2, 3], list(range(20, 31)))
    assert shape(known.radix.root) == {(1, 2, 3): {}}


def test_the_oldest_goes_first_and_branches_stay() -> None:
    """alpha = 0. A node with two children is no candidate, however old; its age is its own."""
    known = tree(alpha=0.0)
    put(known, [1, 2], [1, 2, 3], [1, 2, 4], [5])
    known.touch(known.find([1, 2, 3]).node)
    known.evict()
    assert shape(known.radix.root) == {(1, 2): {(3,): {}}, (5,): {}}
    known.evict()  # now it is one: its state goes, its edge is the child's
    assert shape(known.radix.root) == {(1, 2, 3): {}, (5,): {}}
    assert known.bytes == held(known) == 4 * 2 + 2 * 10
    known.evict()
    assert shape(known.radix.root) == {(1, 2, 3): {}}


def test_lru_of_a_plain_model() -> None:
    known = tree(PLAIN)
    put(known, [1, 1], [2, 2], [3, 3])
    known.touch(known.find([1, 1]).node)
    order = []
    while known.radix.root.children:
        before = set(known.radix.root.children)
        known.evict()
        order += before - set(known.radix.root.children)
    assert order == [2, 3, 1]


def test_the_least_useful_goes_first() -> None:
    """Ages 3, 2, 1: 1/3, 1/2, 1 -> 0, 1/4, 1. A token of a long text saves more for its bytes than one of a short."""
    known = tree()
    put(known, [1] * 20, [2], [3] * 5)
    long, short, middle = sorted(known.radix.nodes(), key=lambda node: node.data.used)
    gains = [(HYBRID.flops(n) / (2 * n + 10)) for n in (20, 1, 5)]
    assert [known.efficiency(node) for node in (long, short, middle)] == gains
    assert known.worst() is long
    between = (gains[2] - gains[1]) / (gains[0] - gains[1])
    assert 0.3 < between < 0.8
    known.alpha = 0.24  # 0 + 0.24 against 1/4 + 0 for the short one
    assert known.worst() is long
    known.alpha = 0.26
    assert known.worst() is short


def test_efficiency_is_beyond_the_node_above() -> None:
    known = tree()
    put(known, [1, 2], [1, 2, 3])
    node = known.find([1, 2, 3]).node
    assert known.efficiency(node) == (HYBRID.flops(3) - HYBRID.flops(2)) / 12
    known.evict()  # the upper one, which is older: two tokens more on the edge
    assert known.efficiency(node) == HYBRID.flops(3) / 16


def test_a_bare_tree_goes_on_by_itself() -> None:
    known = tree(capacity=60)
    put(known, [1, 2, 3], [1, 2, 4])
    twin = known.bare(0.7)
    assert (shape(twin.radix.root), twin.bytes, twin.now, twin.alpha) == (
        shape(known.radix.root),
        known.bytes,
        known.now,
        0.7,
    )
    assert [node.data.used for node in twin.radix.nodes()] == [node.data.used for node in known.radix.nodes()]
    put(twin, [9] * 20)
    assert shape(known.radix.root) == {(1, 2): {(3,): {}, (4,): {}, None: None}}


# ----------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("arch", ["qwen3_next", "qwen3_5", "mamba", "llama", "gpt2", "opt", "deepseek_v3"])
def test_logits_behind_a_hit_are_those_from_scratch(arch: str) -> None:
    cache, draw = store(arch), torch.Generator().manual_seed(1)
    model, head = cache.model, torch.randint(3, 200, (30,), generator=draw).tolist()
    for tail in ([5, 6, 7], [8, 9], [8, 9, 10, 11], [5, 6, 7, 20, 21]):
        ids = head + tail
        found = cache.take(ids)
        begun = int(found.get_seq_length())
        whole = read(model, ids, empty_cache(model.config))
        torch.testing.assert_close(read(model, ids[begun:], found), whole, atol=2e-5, rtol=0)
        cache.keep(ids, found)
    # 0; 30 that were read for it; 30 and the two of the second; 30 and the three of the first
    assert cache.reused_tokens == (0 + 0 + 32 + 33 if cache.costs.state else 30 + 32 + 33)


@pytest.mark.parametrize("arch", ["qwen3_next", "mamba", "llama"])
@pytest.mark.parametrize("capacity_mb", [1.0, 0.022])
def test_texts_are_those_of_each_alone(arch: str, capacity_mb: float) -> None:
    stack = built(arch, capacity_mb=capacity_mb)
    server = Server(stack)
    found = served(server, TURNS)
    assert found == [stack.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in TURNS]
    cache = cache_of(server)
    assert cache.reused_tokens > 30
    assert (cache.tree.evicted > 0) == (capacity_mb < 1)
    real = [part for node in cache.tree.radix.nodes() for pair in node.data.kept for part in pair]
    real += [part for node in cache.tree.radix.nodes() for layer in node.data.state or ()
             for states in (layer.conv_states, layer.recurrent_states) for part in states.values()]  # fmt: skip
    assert sum(part.untyped_storage().nbytes() for part in real) == cache.tree.bytes <= capacity_mb * 2**20


def test_together_on_a_model_of_attention() -> None:
    """Rows that come and go keep what they read, and go on from what others did."""
    stack = built("llama")
    server = Server(stack)
    with Engine(server) as engine:
        jobs = [engine.submit(Request(prompt, max_tokens=6, temperature=0.0)) for prompt in TURNS * 2]
        found = [job.result(60).text for job in jobs]
    assert found == [stack.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in TURNS] * 2
    assert server.scheduler.max_batch == 32
    assert shape(cache_of(server).tree.radix.root)


def test_a_chat_goes_on_from_its_last_turn() -> None:
    stack = built()
    server, ids, turns = Server(stack), [5, 6, 7], list[int]()
    with Engine(server) as engine:
        for _ in range(3):
            answer = engine.submit(Request("", ids=tuple(ids), max_tokens=4, temperature=0.0)).result(60)
            whole = stack.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist()
            assert answer.text == stack.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
            turns.append(len(whole) - 1)
            ids = [*whole, 8, 9]
    cache = cache_of(server)
    assert (cache.hits, cache.reused_tokens) == (2, sum(turns[:2]))


def test_two_states_a_request_at_most() -> None:
    cache = store()
    texts = [[5, 6, 7, 8, i, i + 1] for i in range(20, 30)] + [[5, 6, 9, 9], [5, 6, 9, 8]]
    for i, ids in enumerate(texts):
        found = cache.take(ids)
        read(cache.model, ids[int(found.get_seq_length()) :], found)
        cache.keep(ids, found)
        assert sum(bool(node.data.state) for node in cache.tree.radix.nodes()) <= 2 * (i + 1)
    assert cache.figures()["states"] == 12 + 3  # one for each text; behind 5 6 7 8, behind 5 6, behind 5 6 9


def test_mamba_begins_from_a_state_where_that_is_sooner() -> None:
    """One token alone takes as long as `ALONE` that are read at once."""
    cache, ids = store("mamba"), list(range(5, 5 + 2 * ALONE))
    seen = list[int]()

    def ask(ids: list[int]) -> None:
        found = cache.take(ids)
        read(cache.model, ids[int(found.get_seq_length()) :], found)
        cache.keep(ids, found)

    cache.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ask(ids)
    assert seen == [len(ids)]
    ask([*ids, 3, 4])  # one token behind the state, then the last
    assert seen[1:] == [1, 1]
    assert cache.reused_tokens == len(ids)
    ask([*ids[:3], 9, 9, 9])  # short: anew, and the state where they part is kept
    assert seen[3:] == [3, 5, 1]
    assert cache.reused_tokens == len(ids)
    assert cache.tree.find(ids[:3]).reach == 3


def test_a_state_is_not_written_on_by_who_goes_on_from_it() -> None:
    cache, ids = store(), [5, 6, 7, 8]
    begun, seen = cache.take(ids), list[int]()
    cache.model.register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[1]))
    read(cache.model, ids, begun)
    cache.keep(ids, begun)
    (node,) = cache.tree.radix.nodes()
    before = [layer.recurrent_states[0].clone() for layer in node.data.state or ()]
    read(cache.model, [9, 9], begun)
    read(cache.model, [9, 9], cache.take([*ids, 9]))
    assert seen == [1, 1, 1]
    for layer, state in zip(node.data.state or (), before, strict=True):
        assert torch.equal(layer.recurrent_states[0], state)


# ---------------------------------------------------------------------------------------------------------------- alpha
def test_alpha_is_found_by_replay() -> None:
    """A long text that returns among short ones that do not: age throws it away, what it saves keeps it."""
    cache = store(capacity_mb=0.05, bootstrap=2)
    long, fresh = list(range(10, 60)), iter(range(60, 250))

    def ask(ids: list[int]) -> None:
        found = cache.take(ids)
        read(cache.model, ids[int(found.get_seq_length()) :], found)
        cache.keep(ids, found)

    ask([*long, 1])
    while cache.before is None and cache.tree.evicted == 0:
        ask([next(fresh)] * 3)
    first = cache.requests
    assert cache.window == 2 * first
    assert cache.tree.alpha == 0
    before = cache.before
    assert before is not None
    count = 0
    while cache.before is not None:
        count += 1
        ask([*long, 2] if count % first == 0 else [next(fresh)] * 3)
    assert count == cache.window
    assert cache.noted == []
    assert cache.tree.alpha > 0
    assert cache.tree.full is None


def test_the_alpha_of_most_hits_is_taken_and_the_least_of_equals() -> None:
    cache = store(capacity_mb=1)
    cache.requests, cache.tree.alpha = 1, 0.3
    cache.watch()
    assert (cache.window, cache.before and cache.before.alpha) == (5, 0.0)
    seen = {0.4: 7, 1.5: 7}
    cache.replayed = lambda alpha: seen.get(alpha, 0)  # type: ignore[method-assign]
    for i in range(5):
        assert cache.tree.alpha == 0.3
        found = cache.take([i + 3, 4])
        read(cache.model, [i + 3, 4], found)
        cache.keep([i + 3, 4], found)
    assert cache.tree.alpha == 0.4
    assert GRID[:2] + GRID[-1:] == (0.0, 0.1, 2.0)


def test_a_replay_counts_what_the_requests_would_have_had() -> None:
    cache = store(capacity_mb=1)
    cache.watch()
    cache.noted = [(False, [5, 6, 7, 8]), (True, [5, 6, 9]), (True, [5, 6, 9, 9]), (False, [5, 6, 9, 9]),
                   (True, [5, 6, 9, 9])]  # fmt: skip
    assert cache.replayed(0.0) == 0 + 2 + 4
    assert not cache.tree.radix.root.children


def test_a_replay_counts_no_state_that_mamba_would_not_go_on_from() -> None:
    cache, text = store("mamba", capacity_mb=1), list(range(5, 5 + 2 * ALONE))
    cache.watch()
    cache.noted = [(False, text), (True, [*text, 3]), (True, [*text, 3, 4, 3])]
    assert cache.replayed(0.0) == len(text)


def test_a_given_alpha_stays() -> None:
    cache = store(capacity_mb=0.02, alpha=0.7)
    for i in range(3, 20):
        found = cache.take([i] * 4)
        read(cache.model, [i] * 4, found)
        cache.keep([i] * 4, found)
    assert cache.tree.evicted > 3
    assert (cache.before, cache.tree.alpha) == (None, 0.7)


# ------------------------------------------------------------------------------------------------------- the operator
def test_the_route_tells_the_hit_rate() -> None:
    server = Server(built(), name="m")
    body = {"model": "m", "max_tokens": 3, "temperature": 0}
    with TestClient(build_app(server)) as client:
        for prompt in (SYSTEM + "a b", SYSTEM + "c d", SYSTEM + "e f"):
            assert client.post("/v1/completions", json=body | {"prompt": prompt}).status_code == 200
        assert client.post("/v1/completions", json=body | {"prompt": "x" * 500}).status_code == 400
        found = client.get("/v1/marconi").json()
    size = len(SYSTEM)
    assert (found["requests"], found["hits"], found["prompt_tokens"], found["reused_tokens"]) == (
        3, 1, 3 * (size + 3), size,
    )  # fmt: skip
    assert found["token_hit_rate"] == size / (3 * (size + 3))
    assert (found["states"], found["nodes"], found["evicted"], found["alpha"]) == (4, 4, 0, 0.0)
    assert found["bytes"] < found["capacity"] == 2**30


def test_who_hangs_up_leaves_the_others_their_texts() -> None:
    stack = built()
    server = Server(stack)
    engine = Engine(server)
    jobs = [engine.submit(Request(prompt, max_tokens=6, temperature=0.0)) for prompt in TURNS]
    jobs[1].cancel()
    with engine:
        for i, job in enumerate(jobs):
            if i != 1:
                assert job.result(60).text == stack.generate(TURNS[i], max_new_tokens=6, do_sample=False)
    with pytest.raises(PeftxError, match="cancelled"):
        jobs[1].result(60)


def test_with_an_adapter() -> None:
    stack = built("qwen3_next", ReferenceLowRank())
    found = served(Server(stack), TURNS)
    assert found == [stack.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in TURNS]
    assert found != served(Server(built()), TURNS)


def test_what_a_plugin_notes_in_the_cache_goes_with_it() -> None:
    """Token Trails keeps who speaks; a prefix ends within a marker."""
    stack = built("llama", TokenTrails())
    for parameter in stack.ledger.parameters("token-trails"):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    texts = [
        "User: how many seats?\nAssistant: three\nUs" + rest
        for rest in ("er: at two", "er: where", "ually no")
    ]
    cache, without = RadixCache(stack, MarconiConfig()), built("llama")
    for text in texts:
        ids = stack.tokenizer(text).input_ids
        found = cache.take(ids)
        begun = int(found.get_seq_length())
        behind = read(cache.model, ids[begun:], found)
        whole = read(cache.model, ids, DynamicCache(config=cache.model.config))
        torch.testing.assert_close(behind, whole, atol=2e-5, rtol=0)
        assert not torch.allclose(
            whole, read(without.model, ids, DynamicCache(config=cache.model.config)), atol=1e-3
        )
        cache.keep(ids, found)
    assert cache.hits == 2
    assert served(Server(stack), texts) == [
        stack.generate(t, max_new_tokens=6, do_sample=False) for t in texts
    ]


# ------------------------------------------------------------------------------------------------------------ refusals
def test_a_capacity_below_one_token() -> None:
    with pytest.raises(PeftxError, match=r"marconi: capacity_mb is 0\.001, and one token takes \d+ bytes"):
        Server(built(capacity_mb=0.001)).prepare()


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("bert", "is no decoder that writes text"),
        ("t5", "is no decoder that writes text"),
        ("mistral", "has layers of kind DynamicSlidingWindowLayer"),
    ],
)
def test_models_whose_cache_cannot_be_gone_on_from(arch: str, said: str) -> None:
    with pytest.raises(ArchitectureError, match=f"marconi: .* {said}"):
        built(arch)


def test_a_model_that_forgets_its_state_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether many tokens follow a state, or one: Mamba's layers forget where many do."""
    monkeypatch.setattr(DynamicCache, "get_recurrent_state", lambda self, layer, state_idx=0: None)
    with pytest.raises(PeftxError, match="marconi: Qwen3NextForCausalLM reads a text in parts otherwise"):
        Server(built()).prepare()


def test_the_two_ways_may_differ_by_rounding_of_large_logits() -> None:
    stack = built("llama")
    stack.model.lm_head.weight.data.mul_(1000)
    Server(stack).prepare()


def test_stacks_in_which_a_prompt_has_no_prefix_of_its_own() -> None:
    with pytest.raises(ConflictError, match=r"'marconi' keeps rows .* 'reference-prompt' puts rows there"):
        built("llama", ReferencePrompt())

    class Shaping(Plugin):
        @hookimpl(wrapper=True)
        def decode(self, request: Generation) -> Iterator[None]:
            return (yield)

    with pytest.raises(ConflictError, match="marconi: 'shaping' has a say in how a text is written"):
        built("llama", Shaping())


def test_one_store_a_server() -> None:
    class Keeping(Plugin):
        @hookimpl
        def serve(self, server: Server) -> None:
            server.scheduler.prefixes = PrefixCache(server.stack.model, entries=1)

    with pytest.raises(PeftxError, match="marconi: the server has a store of prefixes already"):
        Server(built("llama", Keeping())).prepare()


@pytest.mark.parametrize("options", [{"capacity_mb": 0}, {"alpha": -1}, {"bootstrap": 0}])
def test_bad_options(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(PeftxError, match=f"Marconi.*{name}"):
        Marconi(**options)
