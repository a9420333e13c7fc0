from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from torch import Tensor

import peftx
from peftx import Claim, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, DataError, MergeError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import BOS, EOS, FIRST_BYTE, PAD, tiny, tiny_tokenizer
from peftx.units import NEVER
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning
from peftx_word_pooled_lm import Pooling, WordPooled, in_bytes

test_conformance = conformance("word-pooled-lm")

OPTIONS = {"vectors": 2, "heads": 2, "layers": 1, "longest": 6}
TEXT = "The dog, he ran\naway"
WORDS = [b"T", b"he ", b"dog, ", b"he ", b"ran\n", b"away"]
"""The first unit is a word; the last one is not over yet."""
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


def stack_of(*plugins: Any, arch: str = "llama", **options: Any) -> Stack:
    return Stack(tiny(arch), [*plugins, WordPooled(**OPTIONS | options)], tokenizer=tiny_tokenizer())


def pooling_of(stack: Stack) -> Pooling:
    found = next(module for module in stack.model.modules() if isinstance(module, Pooling))
    with torch.no_grad():
        found.encoder.norm.weight.fill_(1.0)  # so that words show
    return found


def ids_of(text: str | bytes) -> Tensor:
    return torch.tensor([[FIRST_BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]])


def units(found: Tensor) -> Tensor:
    """Logits of bytes, BOS, EOS and PAD."""
    special = tiny_tokenizer().all_special_ids
    return torch.cat((found[..., FIRST_BYTE : FIRST_BYTE + 256], found[..., special]), -1)


def encoded(pooling: Pooling, word: bytes) -> Tensor:
    """e of one word, by itself."""
    u = torch.stack(
        [*pooling.c, *(pooling.E.weight[byte] + pooling.P.weight[j] for j, byte in enumerate(word))]
    )
    return pooling.encoder(u[None])[0, : pooling.k].flatten()


def decoded(pooling: Pooling, h: Tensor, word: bytes) -> Tensor:
    """Logits of the unit behind these, of the next word after h."""
    known = [pooling.E.weight[byte] + pooling.P.weight[j] for j, byte in enumerate(word)]
    u = torch.stack([*h.view(pooling.k, -1), *known])
    return pooling.A(pooling.decoder(u[None], mask=torch.full((len(u), len(u)), -math.inf).triu(1))[0, -1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_is_the_model_over_words_and_decodes_each_word_by_itself(arch: str, training: bool) -> None:
    stack = stack_of(arch=arch)
    pooling = pooling_of(stack)
    stack.model.train(training)
    logits = units(stack.model(ids_of(TEXT)).logits[0])
    stack.model.eval()
    made = [encoded(pooling, word) for word in WORDS]
    with stack.disabled():
        base = stack.model.base_model
        hidden = base(inputs_embeds=torch.stack(made)[None]).last_hidden_state[0]
    place = 0
    for n, word in enumerate(WORDS):  # behind j units of word n
        for j in range(1, len(word) + 1):
            over = j == len(word) and n < 5
            expected = decoded(pooling, hidden[n] if over else hidden[n - 1], b"" if over else word[:j])
            torch.testing.assert_close(logits[place], expected, rtol=1e-3, atol=1e-4)
            place += 1
    assert place == len(TEXT)


@torch.no_grad()
def test_a_longer_word_is_cut() -> None:
    stack, text = stack_of(), torch.tensor([[PAD, PAD, 0, *b"incomprehensible at", 257, *b"ab"]])
    text[:, :2] = -1
    (ends,) = pooling_of(stack).ends(text)
    cuts = [0, 1, 2, *(place + 1 for place, end in enumerate(ends.tolist()) if end)]
    row = text[0].tolist()
    found = [row[a:b] for a, b in zip(cuts[2:], [*cuts[3:], len(row)], strict=True)]
    expected = [[0], [*b"incomp"], [*b"rehens"], [*b"ible "], [*b"at", 257], [*b"ab"]]
    assert found == expected
    logits = [stack.model(ids_of(word)).logits[0, -1] for word in ("incomprehens", "incomprEhens")]
    assert not torch.equal(*logits)


@torch.no_grad()
def test_later_words_and_other_words_do_not_show() -> None:
    stack = stack_of()
    seen: list[Tensor] = []
    stack.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    one, other = (stack.model(ids_of(text)).logits[0] for text in (TEXT, TEXT.replace("dog", "dig")))
    changed = TEXT.index("o")
    assert torch.equal(one[:changed], other[:changed])
    assert not torch.allclose(one[changed], other[changed], atol=1e-3)
    assert (seen[0][0] != seen[1][0]).any(-1).nonzero().tolist() == [
        [TEXT.index(" he")]
    ]  # where the word is over


@torch.no_grad()
def test_reads_as_many_vectors_as_words_in_training() -> None:
    stack = stack_of()
    sizes: list[int] = []
    stack.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(args[0].shape[1]), with_kwargs=True
    )
    ids = torch.cat((ids_of(TEXT), torch.tensor([[PAD] * 4 + ids_of(TEXT)[0, 4:].tolist()])))
    mask = (ids != PAD).long()
    kept = stack.model(ids, attention_mask=mask).logits
    stack.model.train()
    found = stack.model(ids, attention_mask=mask).logits
    assert sizes == [len(TEXT), 5]
    torch.testing.assert_close(found[mask == 1], kept[mask == 1], rtol=1e-3, atol=1e-4)
    assert stack.model(ids, attention_mask=mask, use_cache=True).past_key_values.get_seq_length() == len(TEXT)


@torch.no_grad()
def test_beside_what_asks_for_tokens_it_has_a_row_for_every_unit() -> None:
    """The same logits, in as many rows as the batch has tokens."""

    class Asks(Plugin):
        claims = {Claim.MERGEABLE, Claim.NEEDS_MASK}

        @hookimpl
        def inject(self, model: Any) -> None:
            """It only claims."""

    ids, found, sizes = ids_of(TEXT), [], list[int]()
    for other in (Lora(rank=2), Asks()):
        stack = Stack(tiny("llama"), [WordPooled(**OPTIONS), other], tokenizer=tiny_tokenizer())
        stack.model.model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(args[0].shape[1]), with_kwargs=True
        )
        found.append(stack.model.train()(ids).logits)
    assert sizes == [5, len(TEXT)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_units_share_all_of_the_probability() -> None:
    logits = stack_of().model(ids_of(TEXT)).logits[0].double()
    torch.testing.assert_close(units(logits.softmax(-1)).sum(-1), torch.ones(len(TEXT)).double())
    assert units(logits).min() > NEVER
    assert (logits == NEVER).sum() == len(TEXT) * (320 - 259)


@pytest.mark.parametrize("others", [(), (PromptTuning(length=3, init="uniform"),), (PTuningV2(length=3),)])
@torch.no_grad()
def test_cached_and_padded_as_uncached_and_alone(others: tuple[Any, ...]) -> None:
    """Beside rows of others, and under beams too."""
    stack = stack_of(*others, longest=3)  # so words end while they are written
    pooling_of(stack)
    long, short = ids_of("so One d")[0], ids_of("at ")[0]
    ids = torch.stack((long, torch.cat((short.new_full((len(long) - len(short),), PAD), short))))
    mask = (ids != PAD).long()
    cached = stack.model.generate(ids, attention_mask=mask, **GREEDY)
    uncached = stack.model.generate(ids, attention_mask=mask, **GREEDY, use_cache=False)
    alone = stack.model.generate(short[None], attention_mask=torch.ones_like(short)[None], **GREEDY)
    found, plain, one = (units(torch.stack(out.logits)) for out in (cached, uncached, alone))
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[:, 1:], one, rtol=1e-3, atol=1e-4)
    beams = [
        stack.model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3, use_cache=use).sequences
        for use in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_text_that_was_learned_comes_back() -> None:
    stack, text = stack_of(longest=12), "the naïve cat sat on the mat, and ran"
    before = stack.evaluate([text], metrics=["perplexity"])["bits_per_byte"].value
    stack.train([{"prompt": "the", "completion": text[3:]}], steps=60, batch_size=1, learning_rate=3e-2)
    assert stack.generate("the", max_new_tokens=60) == text[3:]  # and EOS behind it
    assert stack.evaluate([text], metrics=["perplexity"])["bits_per_byte"].value < before / 4


@torch.no_grad()
def test_bits_per_byte_are_those_of_all_bytes() -> None:
    stack, text = Stack("peftx:tiny", [WordPooled(layers=1)]), "Zoë sat."
    ids = [0, *stack.tokenizer(text, add_special_tokens=False).input_ids]
    logs = stack.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = -sum(float(logs[t, id]) for t, id in enumerate(ids[1:]))
    score = stack.evaluate([text], metrics=["perplexity"])["bits_per_byte"]
    assert score.count == len(text.encode()) == 9
    assert score.value == pytest.approx(nats / math.log(2) / 9, rel=1e-4)


@pytest.mark.parametrize("source", ["peftx:tiny", "normalizing"])
def test_any_text_comes_back_from_its_bytes(source: str) -> None:
    tokenizer = Stack("peftx:tiny").tokenizer
    if source == "normalizing":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    spelled, draw = in_bytes(tokenizer), random.Random(0)
    points = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    for text in ("e\u0301 is é", *("".join(map(chr, draw.choices(points, k=30))) for _ in range(3))):
        ids = spelled(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.encode())
        assert spelled.decode(ids) == text
    assert spelled("so<|eos|>").input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer("the cat").input_ids != spelled("the cat").input_ids


def test_rows_and_prompts_are_read_in_bytes_until_it_is_removed(tmp_path: Path) -> None:
    """After a load too, where somebody gives the base's tokenizer."""
    plain = Stack("peftx:tiny").tokenizer("the cat sat").input_ids
    stack = Stack("peftx:tiny", [WordPooled(layers=1)])
    spelled = stack.tokenizer("the cat sat").input_ids
    assert spelled == [0, *in_bytes(stack.tokenizer)("the cat sat", add_special_tokens=False).input_ids]
    assert len(spelled) == 1 + len("the cat sat")
    stack.save(tmp_path / "bundle")
    for found in (stack, peftx.load(tmp_path / "bundle")):
        assert found.tokenizer("the cat sat").input_ids == spelled
        found.remove("word-pooled-lm")
        assert found.tokenizer("the cat sat").input_ids == plain
    found = peftx.load(tmp_path / "bundle", model=Stack("peftx:tiny").model)
    with pytest.raises(MergeError, match="nobody gave the base's"):
        found.remove("word-pooled-lm")
    assert found.tokenizer("the cat sat").input_ids == spelled


@torch.no_grad()
def test_added_tokens_are_units_too() -> None:
    """As those of chats are; one that the model has no row for is none."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<end>", *(f"<{i}>" for i in range(60))])
    stack = Stack(tiny("llama"), [WordPooled(**OPTIONS)], tokenizer=tokenizer)
    ids = tokenizer("at <end>").input_ids
    assert ids[-1] == 259
    assert stack.tokenizer("at <end>").input_ids == ids
    assert stack.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[259] > 0
    found = next(module for module in stack.model.modules() if isinstance(module, Pooling))
    assert found.ids[256:].tolist() == [0, 1, 2, *range(259, 320)]
    assert found.ends(torch.tensor([[97, 98, 259, 99]])).tolist() == [[True, False, True, False]]


def test_tokens_that_are_no_bytes_and_embeddings_are_refused() -> None:
    stack = Stack("peftx:tiny", [WordPooled(layers=1)])
    (the,) = Stack("peftx:tiny").tokenizer(" the", add_special_tokens=False).input_ids
    for id in (the, 4095):
        with pytest.raises(UnsupportedError, match=f"token {id} is no single byte"):
            stack.model(torch.tensor([[0, id]]))
    with pytest.raises(UnsupportedError, match="brings embeddings"):
        stack.model(inputs_embeds=torch.zeros(1, 2, 256))
    assert stack.model(ids_of("ab")).logits.isfinite().all()  # what was refused has left nothing behind


def test_half_a_surrogate_pair_is_refused() -> None:
    stack = stack_of()
    with pytest.raises(DataError, match="half a surrogate pair"):
        stack.generate("so \ud83d it is")
    with pytest.raises(DataError, match=r"row 0.*half a surrogate pair"):
        stack.train([{"text": "so \ud83d it is"}], steps=1)


class Marks(Plugin):
    """A new token with rows of its own."""

    @hookimpl
    def inject(self, model: Any) -> None:
        model.vocabulary(["<end>"])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("other", "end"),
    [
        (Marks(), "embedding"),
        (Lora(rank=2, targets="head"), "head"),
        (Lora(rank=2, targets="embedding"), "embedding"),
    ],
)
def test_nothing_else_stands_on_the_ends(other: Any, end: str, first: bool) -> None:
    plugins = [other, WordPooled(**OPTIONS)]
    with pytest.raises(ConflictError, match=rf"word-pooled-lm .* stands on the {end}"):
        Stack(tiny("gpt_neox"), plugins if first else plugins[::-1], tokenizer=tiny_tokenizer())


def test_no_number_follows_from_the_vocabulary() -> None:
    stack = Stack("peftx:tiny", [WordPooled()])
    d, count, m, k = 64, 256 + 3, 20, 4
    layer = 4 * d * d + 4 * d + 2 * 4 * d * d + 5 * d + 4 * d
    assert stack.trainable_parameters() == 2 * count * d + count + (m + k) * d + 2 * (2 * layer + 2 * d)


@torch.no_grad()
def test_vectors_start_as_large_as_embeddings_and_the_rest_is_left_alone() -> None:
    stack, table = stack_of(), tiny("llama").get_input_embeddings().weight
    found = next(module for module in stack.model.modules() if isinstance(module, Pooling))
    assert float(found.encoder.norm.weight[0]) == pytest.approx(float(table.std()), rel=0.1)
    x = torch.randn(1, 3, 32)
    assert torch.equal(stack.model.lm_head(x), tiny("llama").lm_head(x))  # outside of a call
    special = stack_of().model(torch.tensor([[BOS, EOS, BOS]])).logits[0]
    assert not torch.allclose(special[0], special[1], atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("mistral", "has windows"), ("llama4", "has windows"), ("bert", "is no decoder"),
        ("qwen3_next", "layers without attention"), ("t5", "is no decoder"),
    ],
)  # fmt: skip
def test_refused(arch: str, why: str) -> None:
    with pytest.raises(ArchitectureError, match=why):
        stack_of(arch=arch)


def test_widths_and_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(ArchitectureError, match="32 wide, which 4 vectors of 3 heads"):
        stack_of(vectors=4, heads=3)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ArchitectureError, match="without a token for each byte"):
        Stack(tiny("llama"), [WordPooled(**OPTIONS)], tokenizer=words)
