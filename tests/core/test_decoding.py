"""Decoding: one request, and drafts that never change what is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from peftx import CallEdit, ModelView, Plugin, Stack, hookimpl
from peftx.errors import PeftxError, UnsupportedError
from peftx.toolkits.decoding import (
    Drafter,
    DraftTree,
    Generation,
    Prepared,
    VerifiedStep,
    fork_cache,
    per_row,
    speculative_generate,
)

VOCAB = 48
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # wide, so that greedy text is varied and no two scores nearly tie
    **SPECIAL,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, **SPECIAL
    ),
    "mistral-window": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=8),
    "lfm2-conv": lambda: Lfm2Config(
        **SHAPE, num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **SPECIAL
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4, **SPECIAL
    ),
}


@cache
def model_of(name: str, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()


def prompt(length: int = 9, *, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def request(model: PreTrainedModel, ids: torch.Tensor | None = None, **options: object) -> Generation:
    """A greedy request for 40 tokens; `options` are fields of the generation config or of `Generation`."""
    fields = {name: options.pop(name) for name in list(options) if name in Generation.__dataclass_fields__}
    config = GenerationConfig(**{"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, **options})
    ids = prompt() if ids is None else ids
    fields.setdefault("attention_mask", torch.ones_like(ids))
    return Generation(model=model, input_ids=ids, generation_config=config, **fields)


class Scripted(Drafter):
    """Proposes what `guess(ids, limit)` returns, and keeps what it observes."""

    def __init__(self, guess: Callable[[torch.Tensor, int], DraftTree]) -> None:
        self.guess, self.steps, self.begun = guess, list[VerifiedStep](), 0

    def begin(self, generation: Generation) -> None:
        self.begun += 1

    def propose(self, ids: torch.Tensor, limit: int) -> DraftTree:
        assert ids.dim() == 1
        assert limit >= 1
        return self.guess(ids, limit)

    def observe(self, step: VerifiedStep) -> None:
        self.steps.append(step)


class Curious(Scripted):
    needs_hidden = True


def perfect(truth: torch.Tensor, depth: int) -> Scripted:
    return Scripted(lambda ids, limit: DraftTree.linear(truth[len(ids) : len(ids) + min(depth, limit)]))


def silent() -> Scripted:
    return Scripted(lambda ids, limit: DraftTree.empty())


def noisy(truth: torch.Tensor, seed: int, *, branches: int = 4, ignore_limit: bool = False) -> Scripted:
    """Random trees; each branch follows the truth for a random while, then turns to noise."""
    rng = torch.Generator().manual_seed(seed)

    def integer(high: int) -> int:
        return int(torch.randint(0, high, (), generator=rng))

    def guess(ids: torch.Tensor, limit: int) -> DraftTree:
        sequences = []
        for _ in range(integer(branches + 1)):
            right = truth[len(ids) : len(ids) + integer(6)].tolist()
            noise = [integer(VOCAB) for _ in range(integer(4))]
            sequences.append((right + noise)[: None if ignore_limit else limit])
        return DraftTree.from_sequences(sequences)

    return Scripted(guess)


# ---------------------------------------------------------------------------------------------------- draft trees
sequences_of_tokens = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6)


@given(sequences_of_tokens)
def test_a_tree_holds_every_prefix_once(sequences: list[list[int]]) -> None:
    tree = DraftTree.from_sequences(sequences)
    prefixes = {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}
    paths = [tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))]
    assert set(paths) == prefixes
    assert len(paths) == len(prefixes)
    assert tree.depths.tolist() == [len(path) for path in paths]
    for node in range(len(tree)):
        assert tree.ancestor_mask[node].nonzero()[:, 0].tolist() == tree.path(node)
    assert len(tree.longest_path()) == max((len(path) for path in paths), default=0)
    assert tuple(tree.longest_path().tokens.tolist()) in prefixes | {()}


@given(sequences_of_tokens, st.integers(0, 5))
def test_truncation_is_truncation_of_the_sequences(sequences: list[list[int]], depth: int) -> None:
    cut, reference = (
        DraftTree.from_sequences(sequences).truncated(depth),
        DraftTree.from_sequences([s[:depth] for s in sequences]),
    )
    assert torch.equal(cut.tokens, reference.tokens)
    assert torch.equal(cut.parents, reference.parents)


def test_truncation_cuts_the_probabilities_too() -> None:
    tree = DraftTree.linear([3, 4, 5], torch.rand(3, 8)).truncated(2)
    assert tree.probs is not None
    assert tree.probs.shape == (2, 8)


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [-1], "2 tokens but 1 parents"),
        ([1, 2], [1, -1], "parent 1 does not precede"),
        ([1, 1], [-1, -1], "token 1 is already a child of node -1"),
        ([[1]], [[-1]], "1-D int64"),
        (list(range(1025)), [-1] * 1025, "1025 nodes"),
    ],
)
def test_malformed_trees_are_refused(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(PeftxError, match=message):
        DraftTree(tokens=torch.tensor(tokens), parents=torch.tensor(parents))


def test_probabilities_need_a_linear_draft_of_their_length() -> None:
    with pytest.raises(PeftxError, match="branches"):
        DraftTree(tokens=torch.tensor([1, 2]), parents=torch.tensor([-1, -1]), probs=torch.rand(2, 8))
    with pytest.raises(PeftxError, match=r"expected \[2, V\]"):
        DraftTree.linear([1, 2], torch.rand(3, 8))


# ------------------------------------------------------------------------------------------------------ generation
RULES: dict[str, dict[str, object]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "minimum": {"eos_token_id": 7, "min_new_tokens": 12, "bad_words_ids": [[5], [6, 9]]},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 3},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_replaced_loop_with_warp_writes_what_the_default_writes(rule: str) -> None:
    model = model_of("llama")
    reference = request(model, **RULES[rule]).run_default()
    generation = request(model, **RULES[rule])
    ids = generation.input_ids
    with torch.no_grad(), generation.seeded(), generation.counting():
        while True:
            scores = generation.warp(ids, model(ids).logits[:, -1])
            ids = torch.cat([ids, generation.prepare().pick(scores)[:, None]], dim=1)
            if generation.finished(ids).all():
                break
    assert torch.equal(ids, reference)
    assert generation.stats["model_calls"] == reference.shape[1] - 9


def test_warp_sees_processors_and_options_that_come_late() -> None:
    generation = request(model_of("llama"))
    ids, scores = generation.input_ids, torch.zeros(1, VOCAB)
    assert torch.equal(generation.warp(ids, scores), scores)
    generation.logits_processors.append(Ban(4))
    assert generation.warp(ids, scores)[0, 4] == -math.inf
    assert scores[0, 4] == 0  # the caller's own scores stay
    generation.generation_config.bad_words_ids = [[6]]
    assert generation.warp(ids, scores)[0, 6] == -math.inf


class Ban(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] = -math.inf
        return scores


class EndsWith(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **_: object) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_the_default_is_generate_and_is_counted() -> None:
    model, ids = model_of("gpt2"), prompt(batch=2)
    generation = request(model, ids, max_new_tokens=6)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generation.run_default(), expected)
    assert generation.stats == {"model_calls": 6.0, "new_tokens": 6.0, "tokens_per_call": 1.0}
    generation.run_default()
    assert generation.stats == {"model_calls": 12.0, "new_tokens": 12.0, "tokens_per_call": 1.0}
    assert not model._forward_pre_hooks  # the counter is gone


def test_a_seed_repeats_and_leaves_the_global_state_alone() -> None:
    model = model_of("llama")
    before = torch.random.get_rng_state()
    first = request(model, do_sample=True, seed=5).run_default()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(request(model, do_sample=True, seed=5).run_default(), first)
    assert not torch.equal(request(model, do_sample=True, seed=6).run_default(), first)


def test_the_request_owns_its_config() -> None:
    config = GenerationConfig(max_new_tokens=3)
    generation = Generation(model=model_of("llama"), input_ids=prompt(), generation_config=config)
    generation.generation_config.max_new_tokens = 5
    assert config.max_new_tokens == 3


def test_encoder_decoder_and_beams_take_the_default_way() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    generation = request(model, prompt(batch=2), max_new_tokens=5, num_beams=2, eos_token_id=None)
    output = generation.run_default()
    assert output.shape[0] == 2
    assert output.shape[1] - 1 == generation.stats["new_tokens"] <= 5
    with pytest.raises(UnsupportedError, match="encoder-decoder model, num_beams > 1"):
        speculative_generate(generation, silent())


def test_a_full_output_is_kept_in_the_state() -> None:
    generation = request(
        model_of("llama"), max_new_tokens=3, return_dict_in_generate=True, output_scores=True
    )
    ids = generation.run_default()
    assert torch.equal(generation.state["generate"].sequences, ids)
    assert len(generation.state["generate"].scores) == 3


def learned_prefix(model: PreTrainedModel, rows: int = 4) -> DynamicCache:
    generator = torch.Generator().manual_seed(11)
    config = model.config
    shape = (1, config.num_key_value_heads, rows, config.hidden_size // config.num_attention_heads)
    return DynamicCache([tuple(torch.randn(shape, generator=generator) for _ in "kv") for _ in range(2)])


def test_masks_tell_a_learned_prefix_from_a_prefilled_prompt() -> None:
    model, ids = model_of("qwen2"), prompt()
    plain = request(model, ids).run_default()
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=prefilled)
    resumed = request(model, ids, past_key_values=fork_cache(prefilled))
    assert torch.equal(resumed.run_default(), plain)
    prefixed = request(model, ids, past_key_values=learned_prefix(model), attention_mask=torch.ones(1, 13))
    assert not torch.equal(prefixed.run_default(), plain)
    assert prefilled.get_seq_length() == 5  # the fork grew, not the original


@pytest.mark.parametrize(
    ("columns", "message"), [(None, "needs an attention mask"), (11, "expected 9 or 13 columns")]
)
def test_a_filled_cache_needs_a_mask_that_fits(columns: int | None, message: str) -> None:
    model = model_of("qwen2")
    mask = None if columns is None else torch.ones(1, columns)
    with pytest.raises(PeftxError, match=message):
        request(model, past_key_values=learned_prefix(model), attention_mask=mask)


def test_a_consumed_cache_is_noticed() -> None:
    model = model_of("qwen2")
    generation = request(model, past_key_values=learned_prefix(model), attention_mask=torch.ones(1, 13))
    generation.run_default()
    with pytest.raises(PeftxError, match="fork_cache"):
        generation.run_default()


@pytest.mark.parametrize(
    "ids", [torch.ones(3, dtype=torch.int64), torch.ones(1, 3), torch.ones(1, 0, dtype=torch.int64)]
)
def test_ids_of_another_shape_or_dtype_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(PeftxError, match=r"input_ids: expected \[B, T\] int64"):
        Generation(model=model_of("llama"), input_ids=ids)


# --------------------------------------------------------------------------------------------- losslessness, greedy
ARCHITECTURES = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen2", "sdpa"),
    ("gpt2", "sdpa"),
    ("gpt2", "eager"),
]


@cache
def truth_of(name: str, attention: str, rule: str, seed: int = 0) -> torch.Tensor:
    return request(model_of(name, attention), prompt(seed=seed), **RULES[rule]).run_default()


@pytest.mark.parametrize(("name", "attention"), ARCHITECTURES)
@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(["greedy", "penalty", "minimum"]))
def test_random_trees_never_change_greedy_text(name: str, attention: str, seed: int, rule: str) -> None:
    truth = truth_of(name, attention, rule)
    generation = request(model_of(name, attention), **RULES[rule])
    drafter = noisy(truth[0], seed, ignore_limit=seed % 2 == 0)
    assert torch.equal(speculative_generate(generation, drafter), truth)
    assert drafter.begun == 1
    assert any(not step.tree.is_linear for step in drafter.steps)  # trees did reach the model
    assert torch.equal(torch.cat([step.tokens for step in drafter.steps]), truth[0, 9:])
    assert generation.stats["model_calls"] == len(drafter.steps) + generation.stats["probe_calls"]


@pytest.mark.parametrize("name", ["mistral-window", "lfm2-conv", "bloom"])
def test_models_without_tree_attention_get_the_longest_path(name: str) -> None:
    truth = truth_of(name, "eager", "penalty")
    generation = request(model_of(name), **RULES["penalty"])
    drafter = noisy(truth[0], seed=2)
    assert torch.equal(speculative_generate(generation, drafter), truth)
    assert all(step.tree.is_linear for step in drafter.steps)
    assert generation.stats["linearized_drafts"] > 3
    assert generation.stats["accepted_tokens"] > 10  # rewinding did happen in the window or the convolution
    assert generation.stats["draft_tokens"] > generation.stats["accepted_tokens"]


def test_the_probe_finds_a_model_that_ignores_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, truth = model_of("llama", "sdpa"), truth_of("llama", "sdpa", "greedy")
    forward = type(model).forward

    def deaf(
        self: PreTrainedModel, *, attention_mask: torch.Tensor | None = None, **inputs: object
    ) -> object:
        return forward(self, attention_mask=None, **inputs)

    deaf.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", deaf)
    generation = request(model)
    assert torch.equal(speculative_generate(generation, noisy(truth[0], seed=2)), truth)
    assert generation.stats["probe_calls"] == 1
    assert generation.stats["linearized_drafts"] > 3


@pytest.mark.parametrize(("name", "attention"), ARCHITECTURES)
@pytest.mark.parametrize("prefixed", [False, True])
def test_logits_in_a_tree_are_logits_of_the_sequence(name: str, attention: str, prefixed: bool) -> None:
    model = model_of(name, attention)
    if prefixed and name == "gpt2":
        pytest.skip("the prefix helper reads Llama's field names")
    tree = DraftTree.from_sequences([[3, 4, 5], [3, 6], [7, 4, 5, 8], [9]])
    fields = (
        {"past_key_values": learned_prefix(model), "attention_mask": torch.ones(1, 13)} if prefixed else {}
    )
    drafter = Curious(lambda ids, limit: tree if limit < 39 else DraftTree.empty())
    speculative_generate(request(model, **fields), drafter)
    step, so_far = drafter.steps[1], torch.cat([prompt()[0], drafter.steps[0].tokens])
    assert len(step.tree) == len(tree) == len(step.logits) - 1
    for node in range(-1, len(tree)):
        ids = torch.cat([so_far, tree.tokens[tree.path(node)]])[None]
        with torch.no_grad():
            past = fields and {"past_key_values": learned_prefix(model)}
            plain = model(ids, output_hidden_states=True, **past)
        torch.testing.assert_close(step.logits[node + 1], plain.logits[0, -1], atol=1e-5, rtol=1e-5)
    assert torch.equal(drafter.steps[0].rows, prompt()[0])
    assert int(step.rows[0]) == int(so_far[-1])
    assert step.hidden is not None
    assert len(step.hidden) == 3
    with torch.no_grad():
        past = fields and {"past_key_values": learned_prefix(model)}
        plain = model(so_far[None], output_hidden_states=True, **past)
    torch.testing.assert_close(step.hidden[1][0], plain.hidden_states[1][0, -1], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_perfect_drafter_needs_one_call_for_k_plus_one_tokens(depth: int) -> None:
    truth = truth_of("llama", "eager", "greedy")
    generation = request(model_of("llama"))
    assert torch.equal(speculative_generate(generation, perfect(truth[0], depth)), truth)
    assert generation.stats["model_calls"] == math.ceil(40 / (depth + 1))
    assert generation.stats["tokens_per_call"] == 40 / generation.stats["model_calls"]
    assert generation.stats["accepted_tokens"] == 40 - generation.stats["model_calls"]


def test_an_empty_drafter_is_plain_decoding() -> None:
    generation = request(model_of("llama"))
    assert torch.equal(speculative_generate(generation, silent()), truth_of("llama", "eager", "greedy"))
    assert generation.stats["model_calls"] == 40
    assert generation.stats["draft_tokens"] == 0


def test_a_wrong_drafter_costs_no_call() -> None:
    truth = truth_of("llama", "eager", "greedy")
    wrong = Scripted(
        lambda ids, limit: DraftTree.linear(
            [(int(t) + 1) % VOCAB for t in truth[0, len(ids) : len(ids) + 2]][:limit]
        )
    )
    generation = request(model_of("llama"))
    assert torch.equal(speculative_generate(generation, wrong), truth)
    assert generation.stats["model_calls"] == 40
    assert generation.stats["accepted_tokens"] == 0


# ------------------------------------------------------------------------------------------------------------ edges
def test_an_eos_inside_an_accepted_draft_ends_the_text() -> None:
    truth = truth_of("llama", "eager", "greedy")[0]
    eos = int(truth[15])
    end = truth[9:].tolist().index(eos) + 10
    generation = request(model_of("llama"), eos_token_id=eos)
    assert torch.equal(speculative_generate(generation, perfect(truth, 20))[0], truth[:end])
    assert generation.stats["model_calls"] == 1


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("depth", [1, 4, 30])
def test_the_length_is_never_exceeded(length: int, depth: int) -> None:
    truth = truth_of("llama", "eager", "greedy")[0]
    careless = Scripted(lambda ids, limit: DraftTree.linear(truth[len(ids) : len(ids) + depth]))
    for options in ({"max_new_tokens": length}, {"max_new_tokens": None, "max_length": 9 + length}):
        generation = request(model_of("llama"), **options)
        assert torch.equal(speculative_generate(generation, careless)[0], truth[: 9 + length])
        assert generation.stats["model_calls"] == math.ceil(length / (depth + 1))


def test_the_last_position_of_a_learned_position_table_is_reached() -> None:
    model, ids = model_of("gpt2"), prompt(120)
    truth = request(model, ids, max_new_tokens=8).run_default()
    assert truth.shape[1] == 128 == model.config.n_positions
    generation = request(model, ids, max_new_tokens=8)
    assert torch.equal(speculative_generate(generation, noisy(truth[0], seed=1, ignore_limit=True)), truth)


def test_criteria_and_processors_of_plugins_are_honoured() -> None:
    truth = truth_of("llama", "eager", "greedy")[0]
    last = int(truth[20])
    extra = {
        "logits_processors": LogitsProcessorList([Ban(int(truth[12]))]),
        "stopping_criteria": StoppingCriteriaList([EndsWith(last)]),
    }
    expected = request(model_of("llama"), **extra).run_default()
    assert not torch.equal(expected[0, : len(truth)], truth[: expected.shape[1]])
    assert torch.equal(
        speculative_generate(request(model_of("llama"), **extra), noisy(expected[0], 4)), expected
    )


def test_stop_strings_work_in_both_ways() -> None:
    letters = [chr(ord("A") + i) for i in range(VOCAB)]  # one character a token; a to p among them
    spelling = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    spelling.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling)
    truth = truth_of("llama", "eager", "greedy")[0]
    options = {"stop_strings": [tokenizer.decode(truth[13:15])], "tokenizer": tokenizer}
    expected = request(model_of("llama"), **options).run_default()
    assert expected.shape[1] <= 15
    assert torch.equal(
        speculative_generate(request(model_of("llama"), **options), perfect(truth, 6)), expected
    )
    with pytest.raises(PeftxError, match="need a tokenizer"):
        request(model_of("llama"), stop_strings=["A"]).run_default()


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_the_streamer_gets_prompt_and_tokens_once() -> None:
    truth = truth_of("llama", "eager", "greedy")[0]
    for run in (Generation.run_default, lambda g: speculative_generate(g, noisy(truth, 3))):
        streamer = Collector()
        generation = request(model_of("llama"), streamer=streamer)
        generation.warp(generation.input_ids, torch.zeros(1, VOCAB))  # preparing streams nothing
        run(generation)
        assert streamer.tokens == truth.tolist()
        assert streamer.ended == 1


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_chunked_prefill_changes_nothing(name: str) -> None:
    model, ids = model_of(name), prompt(23)
    truth = request(model, ids).run_default()
    generation = request(model, ids, prefill_chunk_size=5)
    assert torch.equal(speculative_generate(generation, noisy(truth[0], seed=9)), truth)


def test_drafts_work_on_a_prefilled_cache_and_on_a_learned_prefix() -> None:
    model, ids = model_of("qwen2"), prompt()
    cached = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cached)
    for cache_, columns in ((cached, 9), (learned_prefix(model), 13)):
        truth = request(model, ids, past_key_values=fork_cache(cache_), attention_mask=torch.ones(1, columns))
        expected = truth.run_default()
        generation = request(
            model, ids, past_key_values=fork_cache(cache_), attention_mask=torch.ones(1, columns)
        )
        assert torch.equal(speculative_generate(generation, noisy(expected[0], seed=8)), expected)
        assert generation.stats["accepted_tokens"] > 10


def test_left_padding_in_a_row_is_masked() -> None:
    model = model_of("llama")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    truth = request(model, attention_mask=mask).run_default()
    assert torch.equal(truth[:, 9:], request(model, prompt()[:, 3:]).run_default()[:, 6:])
    generation = request(model, attention_mask=mask)
    assert torch.equal(speculative_generate(generation, noisy(truth[0], seed=8)), truth)


# ------------------------------------------------------------------------------------------------------------- rows
def test_rows_one_by_one_are_the_batch() -> None:
    model, ids = model_of("qwen2"), prompt(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids = ids * mask
    free = request(model, ids, attention_mask=mask).run_default()
    eos = int(free[0, 20])
    truth = request(model, ids, attention_mask=mask, eos_token_id=eos).run_default()
    assert (truth[:, -1] == 0).any()  # some row ends early and is padded
    generation = request(model, ids, attention_mask=mask, eos_token_id=eos)
    rows = iter(range(3))

    def decode(row: Generation) -> torch.Tensor:
        start = 4 if (index := next(rows)) == 1 else 0
        return speculative_generate(row, noisy(truth[index, start:], seed=index))

    assert torch.equal(per_row(generation, decode), truth)
    assert generation.stats["model_calls"] < free.shape[1] * 3
    right_padded = request(model, ids, attention_mask=mask.flip(1))
    with pytest.raises(PeftxError, match="row 1: padding must be on the left"):
        per_row(right_padded, Generation.run_default)
    with pytest.raises(UnsupportedError, match="a batch of 3"):
        per_row(request(model, ids, streamer=Collector()), Generation.run_default)


def test_rows_of_a_cache() -> None:
    model, ids = model_of("qwen2"), prompt(batch=2)
    cached = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cached)
    expected = request(model, ids).run_default()
    generation = request(model, ids, past_key_values=cached)
    assert torch.equal(per_row(generation, lambda row: speculative_generate(row, silent())), expected)


def test_rows_have_their_own_of_the_columns() -> None:
    """Of those of tokens without the row's pads; of others as they are."""
    seen: list[dict[str, list[list[int]]]] = []

    class Notes(CallEdit):
        def __init__(self, model: ModelView) -> None:
            super().__init__()
            self.call = model.call

        def before(self, call: dict[str, Any]) -> dict[str, Any]:
            seen.append({name: values.tolist() for name, values in self.call.batch.items()})
            return call

    class Reads(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.column("mark")
            model.column("options", own_length=True)
            model.around(Notes(model))

    model, ids = model_of("qwen2"), prompt(batch=2)[:, :3]
    stack, mask = Stack(model, [Reads()]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with stack.columns(
        mark=torch.tensor([[1, 2, 3], [4, 5, 6]]), options=torch.tensor([[7, 7, 8], [9, 9, 9]])
    ):
        per_row(request(model, ids * mask, attention_mask=mask), Generation.run_default)
        assert seen[0] == {"mark": [[1, 2, 3]], "options": [[7, 7, 8]]}
        assert seen[-1] == {"mark": [[5, 6]], "options": [[9, 9, 9]]}
        model(ids)
    assert seen[-1] == {"mark": [[1, 2, 3], [4, 5, 6]], "options": [[7, 7, 8], [9, 9, 9]]}


# ----------------------------------------------------------------------------------------------------- unsupported
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"num_beams": 2}, "num_beams > 1"),
        ("llama", {"use_cache": False}, "use_cache=False"),
        ("llama", {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ("llama", {"cache_implementation": "static"}, "StaticLayer"),
        ("mamba", {}, "MambaForCausalLM: it keeps no key/value cache"),
        ("llama", {"input_ids": prompt(batch=2), "attention_mask": torch.ones(2, 9)}, "per_row"),
    ],
)
def test_what_cannot_be_verified_is_refused_with_its_reason(
    name: str, options: dict[str, object], message: str
) -> None:
    options = dict(options)
    generation = request(model_of(name), options.pop("input_ids", None), **options)
    with pytest.raises(UnsupportedError, match=message):
        speculative_generate(generation, silent())


def test_a_model_in_training_mode_is_refused() -> None:
    model = model_of("llama", "sdpa").train()
    try:
        with pytest.raises(UnsupportedError, match="training mode"):
            speculative_generate(request(model), silent())
    finally:
        model.eval()


def test_a_plain_loop_gets_everything_prepared() -> None:
    seen: list[Prepared] = []

    def loop(prepared: Prepared) -> torch.Tensor:
        seen.append(prepared)
        assert not torch.is_grad_enabled()
        return prepared.input_ids

    generation = request(model_of("llama"), temperature=0.5, do_sample=True)
    assert torch.equal(generation.run(loop), generation.input_ids)
    assert seen[0].config.max_length == 49 == seen[0].criteria.max_length
    assert seen[0].pending == 9
    assert seen[0].model_kwargs["past_key_values"].get_seq_length() == 0
    assert generation.stats["model_calls"] == 0


# --------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("seed", range(6))
def test_fixed_guesses_make_the_very_same_draws(seed: int) -> None:
    options = {**RULES["sampled"], "seed": seed}
    truth = request(model_of("llama"), **options).run_default()
    generation = request(model_of("llama"), **options)
    assert torch.equal(speculative_generate(generation, noisy(truth[0], seed)), truth)
    assert generation.stats["accepted_tokens"] > 5


@cache
def bigram_model() -> PreTrainedModel:
    """Eight words; attention adds nothing, so the next word depends on the last one only and can be counted."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.8,
        **SPECIAL,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.lm_head.weight.data.mul_(0.15)  # no word is rare
    return model


def tail_probability(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """P(chi-square is as large or larger) for transition `counts` [V, V] under `probs` [V, V]."""
    expected = counts.sum(1, keepdim=True) * probs
    assert expected.min() >= 5  # or the approximation is too coarse
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.numel() - len(counts), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def test_drafts_that_are_drawn_leave_the_distribution_exact() -> None:
    model, total, depth = bigram_model(), 1600, 3
    with torch.no_grad():
        logits = model(torch.arange(8)[:, None]).logits[:, -1]
    probs = torch.softmax(logits / 0.8, dim=-1).double()  # [last word, next word]
    rng = torch.Generator().manual_seed(4)
    own = torch.softmax(torch.randn(8, 8, generator=rng), dim=-1)  # what the drafter draws from
    drafted = torch.zeros(8, 8)

    def guess(ids: torch.Tensor, limit: int) -> DraftTree:
        last, tokens, rows = int(ids[-1]), list[int](), list[torch.Tensor]()
        for _ in range(min(depth, limit)):
            rows.append(own[last])
            tokens.append(int(torch.multinomial(own[last], 1, generator=rng)))
            drafted[last, tokens[-1]] += 1
            last = tokens[-1]
        return DraftTree.linear(tokens, torch.stack(rows))

    generation = request(
        model, torch.tensor([[2]]), max_new_tokens=total, do_sample=True, temperature=0.8, top_k=0, seed=0
    )
    ids = speculative_generate(generation, Scripted(guess))[0]
    counts = torch.zeros(8, 8, dtype=torch.float64)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(total, dtype=torch.float64), accumulate=True)
    assert tail_probability(counts, probs) > 0.01
    assert tail_probability(drafted.double(), probs) < 1e-6  # so accepting them all would be seen
    # With p and q as they are, a draft token is accepted with sum(min(p, q)), well above nothing and below all.
    assert 0.2 < generation.stats["accepted_tokens"] / generation.stats["draft_tokens"] < 0.9
    assert generation.stats["model_calls"] < total


def test_drawn_drafts_under_greedy_are_plain_guesses() -> None:
    truth = truth_of("llama", "eager", "greedy")
    uniform = torch.full((2, VOCAB), 1 / VOCAB)

    def guess(ids: torch.Tensor, limit: int) -> DraftTree:
        tokens = truth[0, len(ids) : len(ids) + min(2, limit)]
        return DraftTree.linear(tokens, uniform[: len(tokens)])

    generation = request(model_of("llama"))
    assert torch.equal(speculative_generate(generation, Scripted(guess)), truth)
    assert generation.stats["model_calls"] == math.ceil(40 / 3)


@pytest.mark.parametrize("probs", [torch.full((1, 3), 1 / 3), torch.eye(VOCAB)[:1]])
def test_probabilities_that_cannot_have_drawn_the_token_are_refused(probs: torch.Tensor) -> None:
    drafter = Scripted(lambda ids, limit: DraftTree.linear([5], probs))
    with pytest.raises(PeftxError, match="draft probs: row 0"):
        speculative_generate(request(model_of("llama"), do_sample=True, seed=0), drafter)
