"""BatchLLM: the best groups of one level, each prefix read once, memory within M, the texts of each prompt alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from peftx import Generation, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank, ReferencePrompt
from peftx.toolkits.serving import Engine, Request, Server
from peftx.toolkits.serving.job import Job
from peftx.toolkits.serving.prefix import PrefixCache
from peftx.toolkits.serving.slots import Slots
from peftx_batchllm import BatchLLM, BatchLLMConfig, Group, Groups, complete, groups_of, prefix_of
from peftx_token_trails import TokenTrails

test_conformance = conformance("batchllm")

DOCUMENTS = ["The keeper of the North Head writes: ", "In the market of the old town they sell "]
QUESTIONS = ["wind?", "fish", "rope and tar", "what else?"]
PROMPTS = [document + question for question in QUESTIONS for document in DOCUMENTS] + ["A"]


def built(arch: str = "llama", *plugins: Plugin, **options: object) -> Stack:
    return Stack(tiny(arch), [*plugins, BatchLLM(**options)], tokenizer=tiny_tokenizer())


def alone(stack: Stack, prompts: Sequence[str], new: int = 6) -> list[str]:
    return [stack.generate(prompt, max_new_tokens=new, do_sample=False) for prompt in prompts]


def saved(groups: Sequence[Group]) -> int:
    return sum((len(group.members) - 1) * group.shared for group in groups)


# ----------------------------------------------------------------------------------------------------------- the groups
def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def common(prompts: Sequence[list[int]]) -> int:
    """Tokens that all begin with, short of each one's last."""
    least = min(len(prompt) - 1 for prompt in prompts)
    return next((i for i in range(least) if len({prompt[i] for prompt in prompts}) > 1), least)


def drawn(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2) for _ in range(draw.randint(1, 9))] for _ in range(count)]


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_groups_are_the_best_of_one_level(seed: int, least: int) -> None:
    prompts = drawn(seed, 7)
    found = groups_of(prompts, least=least)
    assert sorted(i for group in found for i in group.members) == list(range(7))
    for shared, members in found:
        assert shared == 0 or least <= shared <= common([prompts[i] for i in members])

    def worth(part: list[int]) -> int:
        shared = common([prompts[i] for i in part])
        return (len(part) - 1) * shared if shared >= least else 0

    best = max(sum(map(worth, parts)) for parts in partitions(list(range(7))))
    assert saved(found) == best


@pytest.mark.parametrize("seed", range(6))
def test_saved_tokens_lie_between_one_prefix_and_the_whole_tree(seed: int) -> None:
    prompts = [[7, *prompt] for prompt in drawn(seed, 30)]
    whole = sum(len(prompt) - 1 for prompt in prompts) - len(
        {tuple(prompt[:i]) for prompt in prompts for i in range(1, len(prompt))}
    )
    assert 29 * common(prompts) <= saved(groups_of(prompts)) <= whole


def test_a_fork_by_hand() -> None:
    """Three begin with 9 9, two of them with 9 9 1 1 1: apart they save 5, all under 9 9 they save 4."""
    prompts = [[9, 9, 1, 1, 1, 2], [9, 9, 1, 1, 1, 3], [9, 9, 4, 4]]
    assert groups_of(prompts) == [Group(0, [2]), Group(5, [0, 1])]
    assert groups_of([*prompts, [9, 9, 5], [9, 9, 6]]) == [Group(2, [2, 3, 4]), Group(5, [0, 1])]
    assert groups_of([[9, 9, 1, 2], [9, 9, 1, 3], [9, 9, 4], [9, 9, 5]]) == [Group(2, [0, 1, 2, 3])]
    assert groups_of([[1, 2, 3]] * 3) == [Group(2, [0, 1, 2])]  # the last token stays each one's own
    assert groups_of([[5], [5]]) == [Group(0, [0]), Group(0, [1])]


def test_prompts_that_continue_one_another() -> None:
    """A tree of 2000 levels: of all that go on, half share the middle one."""
    prompts = [[1] * n for n in range(2, 1002)]
    assert saved(groups_of(prompts)) > 200_000


# ------------------------------------------------------------------------------------------------------- the schedule
def job(ids: list[int], new: int = 4) -> Job:
    return Job(Request("", max_tokens=new, ids=tuple(ids)), ids, new)


def planned(**options: int) -> Groups:
    return Groups(tiny("llama"), BatchLLMConfig(**{"min_prefix": 2} | options))


def test_what_writes_most_for_its_tokens_runs_first_and_groups_stay_together() -> None:
    short, long = [job([20, 21, i], 1) for i in range(3, 6)], [job([30, 31, i], 40) for i in range(3, 6)]
    mixed = [short[0], long[0], short[1], long[1], short[2], long[2]]
    assert planned().order(mixed) == [*long, *short]
    # 6 to write for 4 to read, with the prefix once; 5 for 4; 8 for 4
    one, two, three = [job([20, 21, 3], 3), job([20, 21, 4], 3)], job([40, 41, 42, 43], 5), job([50] * 4, 8)
    assert planned().order([two, *one, three]) == [three, *one, two]


def test_admission_ends_where_memory_does() -> None:
    """Each takes 7; the prefix 2 more, once."""
    jobs = [job([20, 21, i]) for i in range(3, 8)]
    groups = planned(kv_tokens=23)
    first = groups.order(jobs)
    assert (first, groups.most) == (jobs[:3], 23)
    assert groups.order(jobs[3:]) == []
    first[1].finish(None, PeftxError("gone"))
    assert groups.order(jobs[3:]) == [jobs[3]]
    assert groups.most == 23
    for each in jobs:
        each.finish(None, PeftxError("gone"))
    later = job([60, 61, 62])
    assert groups.order([later]) == [later]
    assert not groups.left[20, 21]


def test_a_prefix_goes_with_the_last_of_its_group() -> None:
    groups = planned()
    jobs = [job([20, 21, 3]), job([20, 21, 4]), job([30, 31, 3]), job([30, 31, 4])]
    groups.order(jobs)
    for each in jobs:
        assert groups.take(each.ids).get_seq_length() == 2
    assert (set(groups.live), groups.read, groups.reused_tokens) == ({(20, 21), (30, 31)}, 4, 8)
    jobs[0].finish(None, PeftxError("gone"))
    assert set(groups.live) == {(20, 21), (30, 31)}
    jobs[1].cancel()
    jobs[1].finish(None, PeftxError("gone"))
    assert set(groups.live) == {(30, 31)}
    groups.order(
        [*jobs[3:], job([70, 71, 72])]
    )  # who comes later makes a plan; the one that runs keeps its prefix
    assert groups.prefix[jobs[2]] == (30, 31)
    assert groups.take([1, 2, 3]).get_seq_length() == 0


def test_a_prefix_that_leaves_no_room_is_not_read_apart() -> None:
    jobs = [job([20] * 10 + [i], 4) for i in (3, 4)]
    groups = planned(kv_tokens=16)
    assert groups.order(jobs) == jobs[:1]
    assert groups.prefix[jobs[0]] == ()


# ---------------------------------------------------------------------------------------------------------- the answers
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_texts_are_those_of_each_alone(arch: str) -> None:
    stack = built(arch)
    done = complete(stack, PROMPTS, max_tokens=6)
    assert done.texts == alone(stack, PROMPTS)
    tokens = [stack.tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert done.saved == saved(groups_of(tokens, least=16)) > 200
    assert done.read + done.saved == sum(map(len, tokens))
    assert done.refused == {}


def test_with_an_adapter() -> None:
    stack = built("llama", ReferenceLowRank())
    done = complete(stack, PROMPTS, max_tokens=6)
    assert done.texts == alone(stack, PROMPTS)
    assert done.saved > 200
    assert done.texts != alone(built(), PROMPTS)


def test_what_a_plugin_notes_in_the_cache_goes_with_it() -> None:
    """Token Trails keeps who speaks; the prefix ends within a marker."""
    stack = built("llama", TokenTrails())
    for parameter in stack.ledger.parameters("token-trails"):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    texts = [
        "User: how many seats?\nAssistant: three\nUs" + rest
        for rest in ("er: at two", "er: where", "ually no")
    ]
    assert complete(stack, texts, max_tokens=6).texts == alone(stack, texts)
    assert alone(stack, texts) != alone(built(), texts)
    assert prefix_of(stack.model, stack.tokenizer(texts[0]).input_ids).get_seq_length() == len(texts[0])


def test_as_many_tokens_are_read_as_it_says() -> None:
    stack = built(kv_tokens=200)  # so that groups run one after the other
    server = Server(stack)
    engine, seen = Engine(server), list[int]()

    def count(module: torch.nn.Module, args: object, given: dict[str, Any]) -> None:
        new = given["attention_mask"][:, -given["input_ids"].shape[1] :]
        seen.append(0 if isinstance(given["past_key_values"], Slots) else int(new.sum()))

    stack.model.register_forward_pre_hook(count, with_kwargs=True)
    jobs = [engine.submit(Request(prompt, max_tokens=3, temperature=0.0)) for prompt in PROMPTS]
    with engine:
        for each in jobs:
            each.result(60)
    groups = server.scheduler.prefixes
    assert isinstance(groups, Groups)
    assert sum(seen) == sum(len(each.ids) for each in jobs) - groups.figures()["tokens_saved"]
    assert groups.read == sum(shared for shared, _ in groups_of([each.ids for each in jobs], least=16)) > 60
    assert groups.most <= 200
    assert not groups.live
    assert not groups.prefix


def test_who_hangs_up_is_answered_no_more_and_holds_nothing() -> None:
    stack = built(kv_tokens=200)
    server = Server(stack)
    engine = Engine(server)
    jobs = [engine.submit(Request(prompt, max_tokens=6, temperature=0.0)) for prompt in PROMPTS]
    for each in jobs[::2]:
        each.cancel()
    with engine:
        assert [each.result(60).text for each in jobs[1::2]] == alone(stack, PROMPTS[1::2])
        for each in jobs[::2]:
            with pytest.raises(PeftxError, match="cancelled"):
                each.result(60)
    groups = server.scheduler.prefixes
    assert isinstance(groups, Groups)
    assert (groups.live, groups.prefix, groups.reused_tokens > 0) == ({}, {}, True)


def test_long_prefixes_are_read_in_pieces() -> None:
    model, seen = tiny("llama", max_position_embeddings=1024), list[tuple[int, int]]()
    model.register_forward_hook(
        lambda module, args, given, output: seen.append(
            (given["input_ids"].shape[1], output.logits.shape[1])
        ),
        with_kwargs=True,
    )
    ids = torch.randint(3, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    whole, cache = DynamicCache(config=model.config), prefix_of(model, ids[0].tolist())
    with torch.no_grad():
        model(input_ids=ids, past_key_values=whole)
    assert seen == [(256, 1), (44, 1), (300, 300)]
    for one, two in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(one.keys, two.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.values, two.values, atol=1e-5, rtol=0)


def test_nothing_shared_nothing_saved() -> None:
    done = complete(built(), ["A b", "C d"], max_tokens=3)
    assert (done.saved, done.read) == (0, 6)


def test_what_cannot_be_answered_is_refused_alone() -> None:
    stack = built(kv_tokens=60)
    done = complete(stack, ["", "x" * 300, "y" * 90, "Once"], max_tokens=4)
    assert done.texts == [None, None, None, *alone(stack, ["Once"], 4)]
    assert {i: str(error)[:20] for i, error in done.refused.items()} == {
        0: "the prompt has no to", 1: "the prompt has 300 t", 2: "batchllm: prompt and",
    }  # fmt: skip
    assert "more kv_tokens" in str(done.refused[2].hint)
    assert complete(stack, []).texts == []


def test_the_server_tells_what_it_saved() -> None:
    server = Server(built())
    server.prepare()
    (route,) = server.routes
    assert (route.method, route.path) == ("GET", "/v1/batchllm")
    assert route.endpoint()["tokens_saved"] == 0
    assert server.scheduler.max_batch == 128


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("arch", ["bert", "t5", "whisper", "vit"])
def test_models_that_continue_no_text(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"batchllm: .* is no decoder that writes text"):
        Stack(tiny(arch), [BatchLLM()])


def test_stacks_in_which_prompts_have_no_prefix_of_their_own() -> None:
    for arch in ("mamba", "qwen3_next"):
        with pytest.raises(ArchitectureError, match=r"batchllm: .*: its cache has .* LinearAttentionLayer"):
            built(arch)
    with pytest.raises(ConflictError, match=r"'batchllm' keeps rows .* 'reference-prompt' puts rows there"):
        built("llama", ReferencePrompt())

    class Shaping(Plugin):
        @hookimpl(wrapper=True)
        def decode(self, request: Generation) -> Iterator[None]:
            return (yield)

    with pytest.raises(ConflictError, match=r"batchllm needs .* 'shaping' has a say"):
        built("llama", Shaping())


def test_one_store_a_server() -> None:
    class Keeping(Plugin):
        @hookimpl
        def serve(self, server: Server) -> None:
            server.scheduler.prefixes = PrefixCache(server.stack.model, entries=1)

    with pytest.raises(PeftxError, match="batchllm: the server has a store of prefixes already"):
        Server(built("llama", Keeping())).prepare()
    with pytest.raises(PeftxError, match="batchllm: it is not in the stack"):
        complete(Stack(tiny("llama"), [], tokenizer=tiny_tokenizer()), ["A"])


@pytest.mark.parametrize("option", ["kv_tokens", "rows", "min_prefix"])
def test_bad_options(option: str) -> None:
    with pytest.raises(PeftxError, match=f"BatchLLM.*{option}"):
        BatchLLM(**{option: 0})
