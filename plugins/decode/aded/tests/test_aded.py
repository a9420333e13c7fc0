"""ADED: the table counts, adapts and is cut as in the paper; the search follows its formula; the text is unchanged."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import peftx
from peftx import Generation, Stack
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.decoding import Drafter, DraftTree, VerifiedStep, speculative_generate
from peftx_aded import Aded, AdedConfig, TrigramDrafter, TrigramTable, grow, search

test_conformance = conformance("aded")

PERIOD = [40, 50, 60, 70, 80]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat and the cat saw the rat on the mat " * 3, encoding="utf-8")
    return str(path)


def request(stack: Stack, ids: list[int], new: int) -> Generation:
    config = stack.model.generation_config.to_dict() | {"max_new_tokens": new, "eos_token_id": None}
    return Generation(
        model=stack.model,
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        generation_config=type(stack.model.generation_config)(**config),
    )


def plain(stack: Stack, ids: list[int], new: int) -> torch.Tensor:
    with torch.no_grad():
        return request(stack, ids, new).run_default()


# ------------------------------------------------------------------------------------------------------- the table
def test_counts_by_hand() -> None:
    table = TrigramTable.count([[1, 2, 3, 1, 2, 4, 1, 2, 3], [1, 2], [9, 1, 2, 5]], successors=12)
    assert table.row((1, 2)).tokens == [3, 4, 5]  # most frequent first, ties by token
    assert table.row((1, 2)).values == [2 / 4, 1 / 4, 1 / 4]
    assert table.row((2, 3)).tokens == [1]
    assert table.row((9, 1)).values == [1.0]
    assert table.row((3, 9)).tokens == []  # no tri-gram crosses from one sequence into the next


def test_rows_sum_to_one_before_the_cut() -> None:
    rng = random.Random(0)
    text = [[rng.randrange(20) for _ in range(20_000)] for _ in range(2)]
    whole, cut = TrigramTable.count(text, 10**6), TrigramTable.count(text, 12)
    for key in whole.pairs.tolist():
        pair = (key >> 32, key & 0xFFFFFFFF)
        full, short = whole.row(pair), cut.row(pair)
        assert sum(full.values) == pytest.approx(1, abs=1e-12)
        assert len(full.tokens) > 12  # so that the cut cuts
        assert (short.tokens, short.values) == (full.tokens[:12], full.values[:12])


def test_adapting_by_hand() -> None:
    table = TrigramTable.count([[1, 2, 3, 1, 2, 4]], successors=12)
    table.adapt([1, 2, 4, 1, 2, 4, 7], 0.04, 3.0)
    assert table.row((1, 2)).tokens == [4, 3]
    assert table.row((1, 2)).values == pytest.approx([0.58, 0.5])
    assert table.row((4, 7)).tokens == []
    assert table.row((2, 4)).values == pytest.approx([0.04, 0.04])
    for _ in range(100):
        table.adapt([1, 2, 4], 0.04, 3.0)
    assert table.row((1, 2)).values == pytest.approx([3.0, 0.5])
    table.forget()
    assert table.row((1, 2)).values == [0.5, 0.5]
    assert table.row((2, 4)).tokens == []


def test_window_is_sixteen_tokens() -> None:
    table = TrigramTable.count([], successors=12)
    drafter = TrigramDrafter(table, AdedConfig())
    drafter.propose(torch.arange(100, 130), 8)
    assert table.row((112, 113)).tokens == []
    assert table.row((114, 115)).values == pytest.approx([0.04])


# ------------------------------------------------------------------------------------------------------ the search
def test_search_by_hand() -> None:
    """Depth 2, so no rollout is random: two children with M = 0.75 and 0.25, values 1.75 and 1.25."""
    table = TrigramTable.count([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 4]], successors=12)
    visits, total, prior = [0, 0], [0.0, 0.0], [0.75, 0.25]
    for n in range(20):
        weight = (32 + math.log((n + 8 + 1) / 8)) * math.sqrt(n)
        score = [
            total[i] / visits[i] + weight * prior[i] / (1 + visits[i]) if visits[i] else math.inf
            for i in range(2)
        ]
        best = score.index(max(score))
        visits[best] += 1
        total[best] += 1 + prior[best]
        config = AdedConfig(depth=2, iterations=n + 1, sequences=1)
        order = [3, 4] if visits[0] >= visits[1] else [4, 3]
        assert search(table, (1, 2), config, random.Random(0))[0][0] == order[0]
    assert visits == [16, 4]  # about in proportion to M


def tree_of(config: AdedConfig, *text: list[int], seed: int = 0) -> dict[tuple[int, ...], tuple[int, float]]:
    """Path -> visits and mean value, after a search from (1, 2)."""
    nodes = grow(TrigramTable.count(text, successors=12), (1, 2), config, random.Random(seed))
    return {node.path: (node.visits, node.total / max(1, node.visits)) for node in nodes}


def test_values_of_a_chain_by_hand() -> None:
    """M = 1 all along, so a path of d - 1 searched tokens is worth 1 + (d - 1) however far the tree has grown."""
    for depth in (2, 3, 4, 6):
        for iterations in (1, 2, 9):
            tree = tree_of(AdedConfig(depth=depth, iterations=iterations), [*range(1, 12)])
            assert {mean for visits, mean in tree.values() if visits} == {1 + (depth - 1)}
            searched = {tuple(range(3, 3 + n)): max(0, iterations - max(0, n - 1)) for n in range(depth)}
            assert {path: visits for path, (visits, _) in tree.items() if visits} == {
                path: visits for path, visits in searched.items() if visits
            }


@pytest.mark.parametrize(
    ("c1", "c2", "visits_of_4"),
    [(0.5, 2.0, [2, 13, 20, 27, 35]), (32.0, 8.0, [2, 8, 12, 16, 21, 25, 29, 34, 38])],
)
def test_visits_of_two_children_by_hand(c1: float, c2: float, visits_of_4: list[int]) -> None:
    """Depth 2: after (1, 2) come 3 and 4, M = 0.75 and 0.25, values 1.75 and 1.25. With c1 = 0.5 and c2 = 2:

    N_n = 0   3, the likeliest, is expanded and visited
    N_n = 1   4 has no visits, and comes first
    N_n = 2   w = (0.5 + ln 2.5) sqrt 2 = 2.003: 1.75 + w 0.75 / 2 = 2.501, 1.25 + w 0.25 / 2 = 1.500: 3
    N_n = 12  w = (0.5 + ln 7.5) sqrt 12 = 8.712: 1.75 + w 0.75 / 12 = 2.295, 1.25 + w 0.25 / 2 = 2.339: 4
    """
    visited = [0]
    for iterations in range(1, 41):
        config = AdedConfig(depth=2, iterations=iterations, c1=c1, c2=c2)
        tree = tree_of(config, [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 4])
        assert tree[3,][1] == 1.75
        assert tree[4,][1] == (0 if iterations == 1 else 1.25)
        assert tree[()][0] == tree[3,][0] + tree[4,][0] == iterations
        visited.append(tree[4,][0])
    assert [n for n in range(1, 41) if visited[n] > visited[n - 1]] == visits_of_4


def test_below_a_node_the_search_is_one_from_there() -> None:
    """The weight there grows with the visits of the node, and not of the root; values differ by a constant."""
    table = TrigramTable.count([[1, 2, 3]] * 2 + [[1, 2, 4]] + [[2, 4, 5]] * 3 + [[2, 4, 6]], successors=12)
    found = []
    for start, depth, iterations in (((1, 2), 3, 60), ((2, 4), 2, 0)):
        iterations = iterations or found[0][4,]
        config = AdedConfig(depth=depth, iterations=iterations, c1=0.5, c2=2.0)
        found.append({node.path: node.visits for node in grow(table, start, config, random.Random(0))})
    below, alone = found
    assert {path[1:]: visits for path, visits in below.items() if path[:1] == (4,)} == alone
    assert 10 < alone[()] < 50


def test_paths() -> None:
    table = TrigramTable.count([PERIOD * 3], successors=12)
    paths = search(table, (40, 50), AdedConfig(), random.Random(0))
    assert paths == [[60, 70], [60, 70, 80], [60, 70, 80, 40]]  # prefixes, each with its best successor
    assert search(table, (50, 40), AdedConfig(), random.Random(0)) == []


def test_draft_is_bounded_and_repeatable() -> None:
    rng = random.Random(0)
    text = [rng.randrange(15) for _ in range(4000)]
    table = TrigramTable.count([text], successors=12)
    for limit in (64, 10, 1):
        drafter = TrigramDrafter(table, AdedConfig(corpus="given", draft_tokens=limit, increment=0))
        drafts = [drafter.propose(torch.tensor(text[: 20 + i]), 9) for i in range(20)]
        sizes = [len(draft) for draft in drafts]
        assert max(sizes) <= limit
        assert max(int(draft.depths.max()) for draft in drafts) <= 4
        if limit == 64:
            assert min(sizes) > 24  # 24 nodes and their successors
            assert not drafts[0].is_linear
    again = TrigramDrafter(table, AdedConfig(corpus="given", increment=0))
    first = TrigramDrafter(table, AdedConfig(corpus="given", increment=0))
    ids = torch.tensor(text[:20])
    assert torch.equal(first.propose(ids, 9).tokens, again.propose(ids, 9).tokens)


# ---------------------------------------------------------------------------------------------------- verification
class Watched(Drafter):
    """Keeps each verified step of the drafter inside, and the text that it continued."""

    def __init__(self, inner: TrigramDrafter) -> None:
        self.inner = inner
        self.steps: list[tuple[torch.Tensor, VerifiedStep]] = []

    def propose(self, ids: torch.Tensor, limit: int) -> DraftTree:
        self.ids = ids.clone()
        return self.inner.propose(ids, limit)

    def observe(self, step: VerifiedStep) -> None:
        self.steps.append((self.ids, step))


def test_tree_rows_see_their_ancestors_only() -> None:
    stack = Stack(tiny("llama", max_position_embeddings=512), [Aded()])
    rng = random.Random(0)
    table = TrigramTable.count([[rng.randrange(320) for _ in range(100_000)]], successors=12)
    watched = Watched(TrigramDrafter(table, AdedConfig()))
    with torch.no_grad():
        speculative_generate(request(stack, PERIOD, 6), watched)
        branching = [(ids, step) for ids, step in watched.steps if not step.tree.is_linear]
        assert branching
        for ids, step in branching:
            for node in range(len(step.tree)):
                path = step.tree.path(node)
                assert step.tree.ancestor_mask[node].nonzero()[:, 0].tolist() == path
                linear = torch.cat([ids, step.tree.tokens[path]])[None]
                expected = stack.model(linear).logits[0, -1]
                torch.testing.assert_close(step.logits[node + 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral"])
def test_greedy_is_lossless(arch: str) -> None:
    sizes = {"n_positions": 512} if arch == "gpt2" else {"max_position_embeddings": 512}
    stack = Stack(tiny(arch, **sizes), [Aded()])
    got = request(stack, PERIOD * 3, 200)
    assert torch.equal(stack.decode(got), plain(stack, PERIOD * 3, 200))
    assert got.stats["new_tokens"] == 200


def test_bundled_model_in_domain() -> None:
    stack = Stack("peftx:tiny", [Aded(corpus="peftx:sample/train.jsonl")])
    ids = stack.tokenizer("Write the log of South Head for Thursday. Keeper: Henry Cook.")["input_ids"]
    got = request(stack, ids, 200)
    assert torch.equal(stack.decode(got), plain(stack, ids, 200))
    assert got.stats["tokens_per_call"] > 1.2


def test_batches_and_sampling_are_unchanged() -> None:
    stack = Stack(tiny("llama"), [Aded()], tokenizer=tiny_tokenizer())
    prompts = ["to be or not to be or not", "ab ab ab ab ab"]
    for options in ({}, {"do_sample": True, "temperature": 0.7}):
        drafted = [stack.generate(prompt, max_new_tokens=20, seed=3, **options) for prompt in prompts]
        alone = Stack(tiny("llama"), tokenizer=tiny_tokenizer())
        assert drafted == [alone.generate(prompt, max_new_tokens=20, seed=3, **options) for prompt in prompts]
    assert stack.generate(prompts, max_new_tokens=20) == alone.generate(prompts, max_new_tokens=20)


def test_accepted_length_rises_with_the_context_and_is_one_without_a_table(tmp_path: Path) -> None:
    """The target is made to write PERIOD for ever: its logits are replaced by the one token that follows."""
    model = tiny("llama", max_position_embeddings=512)
    following = dict(zip(PERIOD, PERIOD[1:] + PERIOD[:1], strict=True))
    seen: list[torch.Tensor] = []

    def periodic(_head: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor([[following.get(int(token), PERIOD[0]) for token in row] for row in seen[-1]])
        return torch.nn.functional.one_hot(chosen[:, -logits.shape[1] :], logits.shape[-1]).to(logits.dtype)

    model.model.embed_tokens.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.lm_head.register_forward_hook(periodic)

    learning = request(stack := Stack(model, [Aded()]), PERIOD * 4, 100)
    assert stack.decode(learning)[0].tolist() == PERIOD * 24
    assert learning.stats["tokens_per_call"] > 4  # four drafted tokens and the target's own

    stack.remove("aded")
    (tmp_path / "one.txt").write_text("z", encoding="utf-8")  # no tri-gram
    aded = Aded(corpus=str(tmp_path / "one.txt"), increment=0)
    empty = request(stack := Stack(model, [aded], tokenizer=tiny_tokenizer()), PERIOD * 4, 100)
    assert stack.decode(empty)[0].tolist() == PERIOD * 24
    assert empty.stats["tokens_per_call"] == 1
    assert empty.stats["draft_tokens"] == 0


def test_keep_updates() -> None:
    for keep, known in ((True, [60]), (False, [])):
        stack = Stack(tiny("llama"), [Aded(keep_updates=keep)])
        table = stack.plugins["aded"].table
        stack.decode(request(stack, PERIOD * 2, 4))
        assert table.row((40, 50)).tokens[:1] == [60]
        stack.decode(request(stack, [5, 6, 7], 4))
        assert table.row((40, 50)).tokens[:1] == known


# -------------------------------------------------------------------------------------------------- bundle, refusals
def test_bundle_holds_the_table(corpus: str, tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Aded(corpus=corpus, successors=2)], tokenizer=tiny_tokenizer())
    table = stack.plugins["aded"].table
    a, b = stack.tokenizer("th", add_special_tokens=False)["input_ids"]
    assert stack.tokenizer.decode(table.row((a, b)).tokens) == "e"
    assert table.tokens.numel() > 20
    stack.save(tmp_path / "bundle")
    Path(corpus).unlink()  # the counts are in the bundle, the text is not needed
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"))
    loaded = again.plugins["aded"].table
    for name, buffer in table.named_buffers():
        assert torch.equal(buffer, dict(loaded.named_buffers())[name]), name
    assert loaded.row((a, b)) == table.row((a, b))


def test_empty_bundle(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Aded()])
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"))
    assert torch.equal(again.decode(request(again, PERIOD, 8)), plain(stack, PERIOD, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"successors": 3}, "successors cuts the counts of a corpus, and there is none"),
        ({"increment": 0}, "without a corpus and with increment 0 the table stays empty"),
        ({"cap": 0.03}, "cap 0.03 is less than the increment 0.04"),
    ],
)
def test_options_that_would_do_nothing(options: dict[str, float], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Aded: .*{match}"):
        Aded(**options)
    whole = AdedConfig().model_dump()  # as a bundle gives them back
    assert Aded(**whole).config.model_dump() == whole


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("successors", 0),
        ("window", 2),
        ("increment", -0.1),
        ("cap", 0),
        ("depth", 1),
        ("iterations", 0),
        ("sequences", 0),
        ("draft_tokens", 0),
        ("draft_tokens", 1025),
        ("c1", -1),
        ("c2", 0),
        ("seed", -1),
        ("keep_updates", "perhaps"),
        ("corpora", "x"),
    ],
)
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(PeftxError, match=f"Aded.*{option}") as caught:
        Aded(**{option: value})
    assert "corpus" in str(caught.value.hint)


def test_a_missing_corpus() -> None:
    with pytest.raises(DataError, match=r"aded.*no-such\.txt"):
        Stack(tiny("llama"), [Aded(corpus="no-such.txt")], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("t5", "aded: T5ForConditionalGeneration is no decoder alone"),
        ("bert", "aded: BertForMaskedLM does not write text"),
        ("vit", "aded: ViTForImageClassification does not write text"),
        ("mamba", "aded: MambaForCausalLM has a state that cannot go back"),
    ],
)
def test_models_on_which_no_draft_can_be_checked(arch: str, match: str) -> None:
    with pytest.raises(ArchitectureError, match=match) as caught:
        Stack(tiny(arch), [Aded(corpus="no-such.txt")])  # before the corpus is read
    assert caught.value.hint == "take a causal language model with attention"
