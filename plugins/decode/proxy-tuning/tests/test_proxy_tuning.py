"""Proxy-tuning: limits where it equals the base or the expert; the three caches; batches, pads, beams; refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftx
from peftx import Claim, Generation, ModelView, Plugin, Stack, companion, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank, ReferencePrompt
from peftx_aded import Aded
from peftx_beam_patience import BeamPatience
from peftx_hydragen import Hydragen
from peftx_proxy_tuning import OWN, ProxyTuning, Reader

test_conformance = conformance("proxy-tuning")

ROWS = [[40, 41, 42, 43, 44, 45, 46], [50, 51, 50], [60]]
NEW = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of the tiny tokenizer, by name; `plus` and `minus` are two of one shape."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "plus": tiny("llama", seed=1),
        "minus": tiny("llama", seed=2),
        "other": tiny("gpt2", seed=5),
        "state": tiny("mamba", seed=1),
        "t5-plus": tiny("t5", seed=1),
        "t5-minus": tiny("t5", seed=2),
        "bert": tiny("bert"),
        "wide": tiny("llama", seed=1, vocab_size=352),
        "short": tiny("llama", seed=1, max_position_embeddings=16),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


SHELF: dict[str, PreTrainedModel] = {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that one test has loaded serves the next ones."""

    def shelved(stack: Stack, source: str) -> PreTrainedModel:
        if source in SHELF:
            stack.companions[source] = SHELF[source]
        found = companion(stack, source)
        if not (Path(source) / "manifest.json").exists():
            SHELF[source] = found
        return found

    monkeypatch.setattr("peftx_proxy_tuning.companion", shelved)


def load(folder: Path, name: str) -> PreTrainedModel:
    return companion(Stack(tiny("llama")), folder / name)


def proxied(model: PreTrainedModel, plus: object, minus: object, *others: Any, **options: Any) -> Stack:
    plugin = ProxyTuning(expert=str(plus), antiexpert=str(minus), **options)
    return Stack(model, [plugin, *others], tokenizer=tiny_tokenizer())


def request(model: PreTrainedModel, rows: Sequence[Sequence[int]] = ROWS, **options: Any) -> Generation:
    """Left pads (right ones for an encoder)."""
    longest, right = max(map(len, rows)), model.config.is_encoder_decoder
    ids, mask = (
        torch.tensor(
            [
                (list(row) + [fill] * (longest - len(row)))
                if right
                else [fill] * (longest - len(row)) + list(row)
                for row in of
            ]
        )
        for of, fill in ((rows, 2), ([[1] * len(row) for row in rows], 0))
    )
    config = copy.deepcopy(model.generation_config)
    config.update(**{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "top_k": 0, **options})
    return Generation(
        model=model, tokenizer=tiny_tokenizer(), input_ids=ids, attention_mask=mask,
        generation_config=config, seed=0,
    )  # fmt: skip


def text(stack: Stack, rows: Sequence[Sequence[int]] = ROWS, **options: Any) -> Tensor:
    return stack.decode(request(stack.model, rows, **options))


def scores(stack: Stack, rows: Sequence[Sequence[int]] = ROWS, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and processed scores of each step [B, NEW, V]."""
    asked = request(stack.model, rows, return_dict_in_generate=True, output_scores=True, **options)
    ids = stack.decode(asked)
    return ids, torch.stack(asked.state["generate"].scores, 1)


def last(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of the next token, without pads and without a cache."""
    with torch.no_grad():
        return model(ids[None]).logits[0, -1].log_softmax(-1)


WAYS = [
    {},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.4},
    {"do_sample": True, "num_return_sequences": 3},
    {"do_sample": True, "num_beams": 2},
]


# ------------------------------------------------------------------------------------------------------------ limits
@pytest.mark.parametrize("options", WAYS[1:3], ids=str)
def test_equal_experts_change_nothing(folder: Path, options: dict[str, Any]) -> None:
    base, stack = Stack(tiny("gpt2")), proxied(tiny("gpt2"), folder / "plus", folder / "plus", alpha=3.0)
    assert torch.equal(text(stack, **options), text(base, **options))


def test_equal_experts_are_a_difference_of_zero(folder: Path) -> None:
    found, expected = (
        scores(stack)
        for stack in (proxied(tiny("gpt2"), folder / "plus", folder / "plus"), Stack(tiny("gpt2")))
    )
    assert torch.equal(found[1], expected[1])


def test_alpha_zero_is_the_base(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus", alpha=0)
    assert torch.equal(scores(stack)[1], scores(Stack(tiny("gpt2")))[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("llama", way) for way in WAYS), ("t5", {}), ("t5", {"num_beams": 3, "num_return_sequences": 2})],
    ids=str,
)
def test_an_antiexpert_like_the_base_leaves_the_expert(
    folder: Path, kind: str, options: dict[str, Any]
) -> None:
    """p_M p_M+ / p_M- = p_M+: its text, whatever the rows of the loop do."""
    names = ("plus", "minus") if kind == "llama" else ("t5-plus", "t5-minus")
    stack = proxied(tiny(kind, seed=2), *(folder / name for name in names))
    expert = Stack(tiny(kind, seed=1))
    found = text(stack, **options)
    assert torch.equal(found, text(expert, **options))
    assert not torch.equal(found, text(Stack(tiny(kind, seed=2)), **options))


def test_scores_of_beams_are_log_probabilities(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    _, found = scores(stack, num_beams=3)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(found.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", [False, True])
def test_own_is_the_stacks_model_with_its_plugins(folder: Path, prompt: bool) -> None:
    others = [ReferencePrompt(), ReferenceLowRank()][: 2 if prompt else 0]
    stack = proxied(tiny("llama", seed=2), folder / "plus", OWN, *others)
    for parameter in stack.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    trained = stack.trainable_parameters()
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(text(stack, **options), text(Stack(tiny("llama", seed=1)), **options))
    assert stack.trainable_parameters() == trained


# ----------------------------------------------------------------------------------------------------- the equation
def test_against_three_models_without_caches(folder: Path) -> None:
    """Padded rows, step by step: s = s_M + alpha (s_M+ - s_M-)."""
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "other", alpha=0.7)
    ids, found = scores(stack)
    base, plus, minus = tiny("gpt2"), load(folder, "plus"), load(folder, "other")
    longest = max(map(len, ROWS))
    for row, prompt in enumerate(ROWS):
        for step in range(NEW):
            so_far = ids[row, longest - len(prompt) : longest + step]
            s = last(base, so_far) + 0.7 * (last(plus, so_far) - last(minus, so_far))
            got = found[row, step].log_softmax(-1)
            torch.testing.assert_close(got, s.log_softmax(-1), atol=2e-4, rtol=0)
    # Between two tokens the shift is the difference of the log-ratios.
    ratio = last(plus, torch.tensor(ROWS[0])) - last(minus, torch.tensor(ROWS[0]))
    shift = found[0, 0].log_softmax(-1) - last(base, torch.tensor(ROWS[0]))
    torch.testing.assert_close(shift[77] - shift[99], 0.7 * (ratio[77] - ratio[99]), atol=2e-4, rtol=0)


def test_temperature_and_filters_come_behind_the_shift(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    plain = scores(stack, max_new_tokens=1)[1]
    warm = scores(stack, max_new_tokens=1, do_sample=True, temperature=2.0, top_k=5)[1]
    kept = warm.isfinite()
    assert torch.equal(kept.sum(-1), torch.full(kept.shape[:-1], 5))
    torch.testing.assert_close(warm[kept], plain[kept] / 2)
    assert torch.equal(warm.argmax(-1), plain.argmax(-1))


def test_what_other_processors_forbid_stays_forbidden(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    ids = text(stack, bad_words_ids=[[i] for i in range(3, 200)])
    assert not ((ids[:, 7:] > 2) & (ids[:, 7:] < 200)).any()


def test_companions_may_have_longer_embeddings(folder: Path) -> None:
    """Rows behind the vocabulary are cut, and those that only the base has stay as they are."""
    stack = proxied(tiny("llama", seed=2), folder / "wide", folder / "minus")
    assert scores(stack)[1].shape[-1] == 320
    stack = proxied(tiny("llama", vocab_size=352), folder / "plus", folder / "minus")
    base = Stack(tiny("llama", vocab_size=352))
    found, expected = scores(stack, max_new_tokens=1)[1], scores(base, max_new_tokens=1)[1]
    assert torch.equal(found[..., 320:], expected[..., 320:])
    assert not torch.equal(found[..., :320], expected[..., :320])


# ------------------------------------------------------------------------------------------------------------ caches
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_companions_read_each_token_once(folder: Path, options: dict[str, Any]) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    seen: list[int] = []
    for model in stack.companions.values():
        model.register_forward_pre_hook(
            lambda _module, _args, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
        )
    ids = text(stack, **options)
    assert seen[:2] == [7, 7]
    assert set(seen[2:]) == {1}
    assert len(seen) >= 2 * (ids.shape[1] - 7)


def test_a_companion_without_keys_and_values_reads_all_again(folder: Path) -> None:
    stack = proxied(tiny("mamba", seed=2), folder / "state", OWN)
    rows = [[40, 41, 42], [50, 51, 52]]
    assert torch.equal(text(stack, rows), text(Stack(tiny("mamba", seed=1)), rows))


def test_a_cache_follows_its_rows() -> None:
    """Rows in another order, fewer, a step back, others: what comes is what comes without a cache."""
    model = tiny("llama")
    prompt = torch.tensor([[5, 6, 7], [5, 6, 7]])  # the same tokens, and one row has pads
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    reader = Reader(model, prompt, mask, 3)

    def once(rows: list[list[int]]) -> None:
        ids = torch.tensor(rows)
        with torch.no_grad():
            torch.testing.assert_close(reader(ids), Reader(model, prompt, mask, 3)(ids), atol=1e-4, rtol=0)

    a, b, c, d = [5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8], [5, 6, 7, 9]
    once([a, b, c, d])
    assert reader.read is not None
    once([[*b, 1], [*a, 2], [*d, 3], [*d, 4]])
    once([[*b, 1, 1], [*d, 4, 1]])
    once([[*b, 2, 1], [*d, 4, 1]])
    once([[*b, 2], [*d, 4]])
    once([[*b, 2, 6, 6], [*d, 4, 7, 8]])
    once([[*b, 2, 6, 6], [*d, 4, 7, 8]])
    once([[*b, 2, 6, 6, 1], [*d, 5, 7, 8, 1]])


def test_a_cache_of_the_prompt_is_the_bases(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    asked, rows = request(stack.model, ROWS[:1]), ROWS[:1]
    with torch.no_grad():
        asked.past_key_values = stack.model(asked.input_ids[:, :4]).past_key_values
    assert torch.equal(stack.decode(asked), text(stack, rows))


def test_a_mask_is_found_as_generate_finds_it(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    for options in ({}, {"num_beams": 2}):
        asked = request(stack.model, **options)
        asked.attention_mask = None  # pads are seen by their token
        assert torch.equal(stack.decode(asked), text(stack, **options))


# ---------------------------------------------------------------------------------------------------------- template
def test_the_expert_reads_the_template(folder: Path) -> None:
    """Its rows begin otherwise, and go on with the same tokens."""
    prompts = ["abcdef", "xy"]
    inner = tiny_tokenizer()
    rows = [[0, *inner(prompt)["input_ids"]] for prompt in prompts]  # BOS is no text
    stack = proxied(tiny("llama", seed=2), folder / "plus", OWN, template="<{prompt}>: ")
    expected = [inner(f"<{prompt}>: ")["input_ids"] for prompt in prompts]
    for options in ({}, {"num_beams": 3}):
        found = text(stack, rows, **options)[:, 7:]
        alone = text(Stack(tiny("llama", seed=1)), expected, **options)[:, 10:]
        assert torch.equal(found, alone)
    pair = proxied(tiny("t5", seed=2), folder / "t5-plus", OWN, template="<{prompt}>: ")
    assert torch.equal(text(pair, rows), text(Stack(tiny("t5", seed=1)), expected))


# ------------------------------------------------------------------------------------------------------- composition
@pytest.mark.parametrize("other", [Aded, Hydragen])
def test_with_another_loop(folder: Path, other: Any) -> None:
    """Drafts are checked on what the three say together; a batch row by row is a batch."""
    rows = [[40, 50, 60] * 6, [*[40, 50, 60] * 6, 41, 42], [40, 50] * 9]
    alone = proxied(tiny("llama", seed=3), folder / "plus", folder / "minus")
    both = proxied(tiny("llama", seed=3), folder / "plus", folder / "minus", other())
    assert torch.equal(text(both, rows), text(alone, rows))
    assert torch.equal(text(both, rows[:1]), text(alone, rows[:1]))


def test_rows_one_by_one_have_no_template(folder: Path) -> None:
    """Where a row begins like the one before, its end was taken for what is written."""
    rows, options = [[70, 80, 70], [70, 80, 70, 80, 90]], {"template": "<{prompt}>"}
    alone = proxied(tiny("llama", seed=3), folder / "plus", folder / "minus", **options)
    both = proxied(tiny("llama", seed=3), folder / "plus", folder / "minus", Aded(), **options)
    assert torch.equal(text(both, rows[:1]), text(alone, rows[:1]))
    with pytest.raises(UnsupportedError, match="proxy-tuning: rows that are decoded one by one"):
        text(both, rows)


def test_two_pairs_add_up(folder: Path) -> None:
    """There and back again."""
    pairs = [
        ("one", ProxyTuning(expert=str(folder / "plus"), antiexpert=str(folder / "minus"))),
        ("two", ProxyTuning(expert=str(folder / "minus"), antiexpert=str(folder / "plus"))),
    ]
    stack = Stack(tiny("gpt2"), pairs, tokenizer=tiny_tokenizer())
    assert torch.equal(text(stack), text(Stack(tiny("gpt2"))))
    with stack.disabled("two"):
        assert torch.equal(text(stack), text(proxied(tiny("gpt2"), folder / "plus", folder / "minus")))


def test_companions_may_be_bundles(folder: Path, tmp_path: Path) -> None:
    tuned = Stack(str(folder / "minus"), [ReferenceLowRank()])
    for parameter in tuned.ledger.parameters("reference-low-rank"):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tuned.save(tmp_path / "tuned")
    stack = proxied(tiny("llama", seed=2), tmp_path / "tuned", folder / "minus")
    assert torch.equal(text(stack), text(tuned))


def test_a_bundle_names_its_companions(folder: Path, tmp_path: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("gpt2"), tokenizer=tiny_tokenizer())
    assert torch.equal(text(again), text(stack))
    assert stack.trainable_parameters() == 0
    assert len(stack.companions) == 2


def test_beams_of_another_loop(folder: Path) -> None:
    """Which a request need not name."""
    both = proxied(tiny("gpt2"), folder / "plus", folder / "minus", BeamPatience(patience=1.0, beams=3))
    alone = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    assert torch.equal(text(both), text(alone, num_beams=3, early_stopping=True))


def test_the_request_is_left_as_it_was(folder: Path) -> None:
    stack = proxied(tiny("gpt2"), folder / "plus", folder / "minus")
    asked = request(stack.model)
    first = stack.decode(asked)
    assert len(asked.logits_processors) == 0
    assert torch.equal(stack.decode(asked), first)
    asked.generation_config.stop_strings = ["x"]
    asked.tokenizer = None
    with pytest.raises(PeftxError, match="stop_strings"):
        stack.decode(asked)
    assert len(asked.logits_processors) == 0


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arch", "name", "match"),
    [
        ("llama", "bert", "proxy-tuning: a BertForMaskedLM does not write beside a LlamaForCausalLM"),
        ("llama", "t5-plus", "proxy-tuning: a T5ForConditionalGeneration does not write beside"),
        ("t5", "plus", "proxy-tuning: a LlamaForCausalLM does not write beside a T5"),
        ("bert", OWN, "proxy-tuning: a BertForMaskedLM does not write"),
    ],
)
def test_companions_that_do_not_write_alike(folder: Path, arch: str, name: str, match: str) -> None:
    with pytest.raises(ArchitectureError, match=match):
        proxied(tiny(arch), OWN, name if name == OWN else folder / name)


def test_another_vocabulary() -> None:
    with pytest.raises(PeftxError, match="'peftx:tiny' has another vocabulary"):
        proxied(tiny("llama"), "peftx:tiny", OWN)


def test_the_same_tokens_by_other_rules(tmp_path: Path) -> None:
    """A tokenizer that has lost merges has the same vocabulary, and cuts texts otherwise."""
    base = Stack("peftx:tiny")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:50]
    file.write_text(json.dumps(rules))
    with pytest.raises(PeftxError, match="has another way to cut texts into tokens"):
        Stack("peftx:tiny", [ProxyTuning(expert=str(tmp_path), antiexpert=OWN)])


class NewTokens(Plugin):
    claims = {Claim.CHANGES_VOCABULARY}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.vocabulary(["<new>"])


@pytest.mark.parametrize("last", [True, False])
def test_new_tokens(folder: Path, last: bool) -> None:
    order = slice(None, None, 1 if last else -1)
    plugins = [ProxyTuning(expert=OWN, antiexpert=str(folder / "plus")), NewTokens()][order]
    with pytest.raises(ConflictError, match=r"'new-tokens' adds tokens, .* 'proxy-tuning' do not know"):
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    Stack(
        tiny("llama"),
        [ProxyTuning(expert=OWN, antiexpert=OWN), NewTokens()][order],
        tokenizer=tiny_tokenizer(),
    )


def test_a_companion_that_reads_less(folder: Path) -> None:
    stack = proxied(tiny("llama"), folder / "short", folder / "minus")
    text(stack, max_new_tokens=9)
    with pytest.raises(UnsupportedError, match=r"proxy-tuning: .* reads 16 tokens, and the text may have 17"):
        text(stack, max_new_tokens=10)


def test_what_companions_cannot_read(folder: Path) -> None:
    stack = proxied(tiny("llama"), folder / "plus", folder / "minus")
    asked = request(stack.model)
    asked.model_kwargs["token_type_ids"] = torch.zeros_like(asked.input_ids)
    with pytest.raises(UnsupportedError, match=r"proxy-tuning: .* brings token_type_ids"):
        stack.decode(asked)


def test_a_pair_must_be_named() -> None:
    with pytest.raises(PeftxError, match="proxy-tuning: neither expert nor antiexpert is named"):
        Stack(tiny("llama"), [ProxyTuning(alpha=2.0)])


@pytest.mark.parametrize(
    ("option", "value"), [("template", "[INST]"), ("alpha", float("inf")), ("expert", 3), ("experts", "x")]
)
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(PeftxError, match=f"ProxyTuning.*{option}"):
        ProxyTuning(**{"expert": OWN, "antiexpert": OWN, option: value})
