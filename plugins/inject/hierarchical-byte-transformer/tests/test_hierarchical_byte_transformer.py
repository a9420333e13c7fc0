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
from peftx import Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, DataError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import BOS, EOS, FIRST_BYTE, PAD, tiny, tiny_tokenizer
from peftx.units import NEVER
from peftx_hierarchical_byte_transformer import HierarchicalByteTransformer, Hierarchy, in_words
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("hierarchical-byte-transformer")

OPTIONS = {"width": 16, "heads": 2, "layers": 2}
W = 259
"""The first id of the tiny tokenizer that is no byte and not special."""
TEXT = "The dog, ran\naway"
WORDS = [b"The", b" dog,", b" ran", b"\n", b"away"]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


def stack_of(*plugins: Any, arch: str = "llama", **options: Any) -> Stack:
    own = HierarchicalByteTransformer(**OPTIONS | options)
    return Stack(tiny(arch), [*plugins, own], tokenizer=tiny_tokenizer())


def hierarchy_of(stack: Stack) -> Hierarchy:
    """With vectors of words that show."""
    found = next(module for module in stack.model.modules() if isinstance(module, Hierarchy))
    with torch.no_grad():
        for parameter in (found.W_e, found.start):
            parameter.div_(parameter.std())
        for coder in (found.encoder, found.decoder):
            for parameter in coder.parameters():
                parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    return found


def ids_of(stack: Stack, *texts: str) -> Tensor:
    return torch.tensor([[BOS, *stack.tokenizer(text).input_ids] for text in texts])


def units(found: Tensor) -> Tensor:
    """Logits of bytes, [W], BOS, EOS and PAD."""
    special = tiny_tokenizer().all_special_ids
    return torch.cat((found[..., FIRST_BYTE : FIRST_BYTE + 256], found[..., [W, *special]]), -1)


def encoded(hierarchy: Hierarchy, word: list[int]) -> Tensor:
    """e of one word, by itself."""
    ones = torch.ones(1, 1, len(word), len(word), dtype=torch.bool)
    states = hierarchy.encoder(torch.tensor([word]), attention_mask=ones).last_hidden_state
    return hierarchy.W_e @ states[0, 0]


def decoded(hierarchy: Hierarchy, o: Tensor, word: bytes) -> Tensor:
    """Logits of the unit behind these, of the next word after o."""
    known = hierarchy.decoder.embed_tokens(torch.tensor([*word], dtype=torch.int64))
    u = torch.cat((hierarchy.W_d(o)[None], known))
    return hierarchy.A(hierarchy.decoder(inputs_embeds=u[None]).last_hidden_state[0, -1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_is_the_model_over_words_with_an_encoder_and_a_decoder_for_each(arch: str, training: bool) -> None:
    stack = stack_of(arch=arch)
    hierarchy = hierarchy_of(stack)
    stack.model.train(training)
    logits = units(stack.model(ids_of(stack, TEXT)).logits[0])
    stack.model.eval()
    bos = 257 + tiny_tokenizer().all_special_ids.index(BOS)
    vectors = [hierarchy.start, encoded(hierarchy, [bos])]
    vectors += [encoded(hierarchy, [256, *word]) for word in WORDS[:-1]]
    with stack.disabled():
        o = stack.model.base_model(inputs_embeds=torch.stack(vectors)[None]).last_hidden_state[0]
    torch.testing.assert_close(logits[0], decoded(hierarchy, o[0], b""), rtol=1e-3, atol=1e-4)
    place = 1
    for n, word in enumerate(WORDS):
        for j in range(len(word) + 1):  # behind [W] and j bytes
            expected = decoded(hierarchy, o[n + 1], word[:j])
            torch.testing.assert_close(logits[place], expected, rtol=1e-3, atol=1e-4)
            place += 1
    assert place == len(logits)


def words_in(tokenizer: Any, text: str) -> list[str]:
    found: list[list[int]] = []
    for id in tokenizer(text, add_special_tokens=False).input_ids:
        if tokenizer.convert_ids_to_tokens(id) == "▁":
            found.append([])
        else:
            found[-1].append(id)
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, world!", ["Hello,", " world!"]),
        ("camelCase HTTPServer it's", ["camel", "Case", " HTTP", "Server", " it's"]),
        ("two   blanks\n\r\n end", ["two", "   ", "blanks", "\n", "\r\n", " end"]),
        ("12 eggs... (a)", ["12", " eggs.", ".", ".", " (", "a)"]),
        ("日本語、 naïve e\u0301x", ["日", "本", "語、", " naïve", " e\u0301x"]),
        ("a ▁b", ["a", " ▁", "b"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_in(stack_of().tokenizer, text) == words


@pytest.mark.parametrize("source", ["peftx:tiny", "normalizing"])
def test_any_text_comes_back(source: str) -> None:
    tokenizer = Stack("peftx:tiny").tokenizer
    if source == "normalizing":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    made, draw = in_words(tokenizer, 259), random.Random(0)
    points = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    for text in ("", "▁ e\u0301 é", *("".join(map(chr, draw.choices(points, k=30))) for _ in range(5))):
        ids = made(text, add_special_tokens=False).input_ids
        assert made.decode(ids) == text
        assert len(ids) - ids.count(259) == len(text.encode())
    assert made("so<|eos|>").input_ids[-1] == tokenizer.eos_token_id
    assert made.get_vocab() == {
        **{token: id for token, id in tokenizer.get_vocab().items() if id != 259}, "▁": 259
    }  # fmt: skip


@torch.no_grad()
def test_later_words_and_other_words_do_not_show() -> None:
    stack = stack_of()
    hierarchy_of(stack)
    seen: list[Tensor] = []
    stack.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    one, other = (ids_of(stack, text) for text in (TEXT, TEXT.replace("dog", "dig")))
    changed = int((one != other).nonzero()[0, 1])
    first, second = (stack.model(ids).logits[0] for ids in (one, other))
    assert torch.equal(first[:changed], second[:changed])
    assert not torch.allclose(first[changed], second[changed], atol=1e-3)
    ((place,),) = (seen[0][0] != seen[1][0]).any(-1).nonzero().tolist()
    assert one[0, place] == W  # of " ran": the word before it is over
    assert one[0, :place].tolist().count(W) == 2


@torch.no_grad()
def test_reads_as_many_vectors_as_words_in_training() -> None:
    stack = stack_of()
    hierarchy_of(stack)
    sizes: list[int] = []
    stack.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(args[0].shape[1]), with_kwargs=True
    )
    long = ids_of(stack, TEXT)[0].tolist()
    rows = [long, [PAD] * 8 + long[8:], long[:6] + [PAD] * (len(long) - 6)]
    ids = torch.tensor(rows)
    mask = (ids != PAD).long()
    kept = stack.model(ids, attention_mask=mask).logits
    stack.model.train()
    found = stack.model(ids, attention_mask=mask).logits
    assert sizes == [len(long), 6]
    torch.testing.assert_close(found[mask == 1], kept[mask == 1], rtol=1e-3, atol=1e-4)
    alone = stack.model(torch.tensor([long[:6]])).logits[0]
    torch.testing.assert_close(found[2, :6], alone, rtol=1e-3, atol=1e-4)
    cache = stack.model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert cache.get_seq_length() == len(long)


@torch.no_grad()
def test_all_strings_of_two_units_have_a_probability_of_1() -> None:
    stack = stack_of()
    hierarchy_of(stack)
    ids = ids_of(stack, "The d")
    first = stack.model(ids).logits[0, -1].double()
    assert (first == NEVER).sum() == 320 - 260
    each = torch.tensor([*range(FIRST_BYTE, FIRST_BYTE + 256), W, *tiny_tokenizer().all_special_ids])
    after = stack.model(torch.cat((ids.expand(260, -1), each[:, None]), 1)).logits[:, -1].double()
    total = (first.softmax(-1)[each, None] * units(after.softmax(-1))).sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("others", [(), (PromptTuning(length=3, init="uniform"),), (PTuningV2(length=3),)])
@torch.no_grad()
def test_cached_and_padded_as_uncached_and_alone(others: tuple[Any, ...]) -> None:
    """Beside rows of others, and under beams too, over the end of a word."""
    stack = stack_of(*others)
    hierarchy = hierarchy_of(stack)
    hierarchy.A.weight[256].mul_(4.0)  # some words end
    long, short = ids_of(stack, "so One d")[0], ids_of(stack, "at")[0]
    ids = torch.stack((long, torch.cat((short.new_full((len(long) - len(short),), PAD), short))))
    mask = (ids != PAD).long()
    cached = stack.model.generate(ids, attention_mask=mask, **GREEDY)
    uncached = stack.model.generate(ids, attention_mask=mask, **GREEDY, use_cache=False)
    alone = stack.model.generate(short[None], attention_mask=torch.ones_like(short)[None], **GREEDY)
    assert (cached.sequences[:, len(long) :] == W).any()
    found, plain, one = (units(torch.stack(out.logits)) for out in (cached, uncached, alone))
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[:, 1:], one, rtol=1e-3, atol=1e-4)
    beams = [
        stack.model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3, use_cache=use).sequences
        for use in (True, False)
    ]
    assert torch.equal(*beams)


@torch.no_grad()
def test_several_words_behind_a_cache() -> None:
    stack = stack_of()
    hierarchy_of(stack)
    ids = ids_of(stack, TEXT)
    whole = stack.model(ids).logits
    for cut in (1, 4, 7, 15):
        cache = stack.model(ids[:, :cut], use_cache=True).past_key_values
        found = stack.model(ids[:, cut:], past_key_values=cache).logits
        torch.testing.assert_close(units(found), units(whole[:, cut:]), rtol=1e-3, atol=1e-4)


def test_a_text_that_was_learned_comes_back() -> None:
    stack, text = stack_of(layers=1), "the naïve cat sat"
    before = stack.evaluate([text], metrics=["perplexity"])["bits_per_byte"].value
    stack.train([{"prompt": "the", "completion": text[3:]}], steps=60, batch_size=1, learning_rate=2e-2)
    assert stack.generate("the", max_new_tokens=60) == text[3:]  # and EOS behind it
    assert stack.generate("the naïve ca", max_new_tokens=60) == text[12:]
    assert stack.evaluate([text], metrics=["perplexity"])["bits_per_byte"].value < before / 3


@torch.no_grad()
def test_bits_per_byte_count_the_ends_of_words_too() -> None:
    stack, text = Stack("peftx:tiny", [HierarchicalByteTransformer(**OPTIONS)]), "Zoë sat."
    ids = stack.tokenizer(text).input_ids
    assert ids[0] == 0
    logs = stack.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = -sum(float(logs[t, id]) for t, id in enumerate(ids[1:]))
    score = stack.evaluate([text], metrics=["perplexity"])["bits_per_byte"]
    assert score.count == 9 + 2
    assert score.value == pytest.approx(nats / math.log(2) / 9, rel=1e-4)


def test_the_tokenizer_goes_and_comes_back(tmp_path: Path) -> None:
    base = Stack("peftx:tiny").tokenizer
    stack = Stack("peftx:tiny", [HierarchicalByteTransformer(**OPTIONS)])
    ids = stack.tokenizer("the cat").input_ids
    assert ids != base("the cat").input_ids
    stack.save(tmp_path)
    for tokenizer in (None, base):  # the bundle's, or the base's
        loaded = peftx.load(tmp_path, tokenizer=tokenizer)
        assert loaded.tokenizer("the cat").input_ids == ids
        with torch.no_grad():
            one, other = (each.model(torch.tensor([ids])).logits for each in (stack, loaded))
        assert torch.equal(one, other)
    stack.remove("hierarchical-byte-transformer")
    assert stack.tokenizer("the cat").input_ids == base("the cat").input_ids
    assert stack.model.config.vocab_size == 4096


def test_tokens_that_are_no_bytes_and_embeddings_are_refused() -> None:
    stack = Stack("peftx:tiny", [HierarchicalByteTransformer(**OPTIONS)])
    for id in (260, 4095):
        with pytest.raises(UnsupportedError, match=f"token {id} is no single byte"):
            stack.model(torch.tensor([[0, id]]))
    with pytest.raises(UnsupportedError, match="brings embeddings"):
        stack.model(inputs_embeds=torch.zeros(1, 2, 256))
    x = torch.randn(1, 3, 256)
    assert torch.equal(stack.model.lm_head(x), Stack("peftx:tiny").model.lm_head(x))  # outside of a call


@torch.no_grad()
def test_added_tokens_are_words_and_w_is_another_one() -> None:
    """As those of chats are."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<end>", *(f"<{i}>" for i in range(59))])
    stack = Stack(tiny("llama"), [HierarchicalByteTransformer(**OPTIONS)], tokenizer=tokenizer)
    ids = stack.tokenizer("at<end>").input_ids
    assert ids == [319, FIRST_BYTE + ord("a"), FIRST_BYTE + ord("t"), 259]
    hierarchy = next(module for module in stack.model.modules() if isinstance(module, Hierarchy))
    assert hierarchy.ids.tolist()[256:] == [319, 0, 1, 2, *range(259, 319)]
    assert stack.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[259] > 0
    tokenizer.add_tokens(["<last>"])
    with pytest.raises(ArchitectureError, match="no row of the embedding is free"):
        Stack(tiny("llama"), [HierarchicalByteTransformer(**OPTIONS)], tokenizer=tokenizer)


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
    plugins = [other, HierarchicalByteTransformer(**OPTIONS)]
    with pytest.raises(ConflictError, match=rf"hierarchical-byte-transformer .* stands on the {end}"):
        Stack(tiny("gpt_neox"), plugins if first else plugins[::-1], tokenizer=tiny_tokenizer())


def test_no_number_follows_from_the_vocabulary() -> None:
    stack = Stack("peftx:tiny", [HierarchicalByteTransformer(width=32, layers=3)])
    c, d, count = 32, 256, 256 + 1 + 3
    layer = 4 * c * c + 3 * c * 4 * c + 2 * c
    assert stack.trainable_parameters() == 2 * (3 * layer + c + count * c) + count * c + 2 * c * d + d


@torch.no_grad()
def test_vectors_start_as_large_as_embeddings() -> None:
    found = next(module for module in stack_of().model.modules() if isinstance(module, Hierarchy))
    size = float(tiny("llama").get_input_embeddings().weight.std())
    assert float(encoded(found, [256, *b"cat"]).std()) == pytest.approx(size, rel=0.4)
    assert float(found.start.std()) == pytest.approx(size, rel=0.4)


@torch.no_grad()
def test_a_row_that_begins_inside_of_a_word_begins_with_one() -> None:
    """Its first byte stands for the [W]."""
    stack = stack_of()
    hierarchy, (text,) = hierarchy_of(stack), ids_of(stack, "cat at")
    logits = units(stack.model(text[None, 2:]).logits[0])  # without BOS and [W]
    vectors = [hierarchy.start, encoded(hierarchy, [*b"cat"])]
    with stack.disabled():
        o = stack.model.model(inputs_embeds=torch.stack(vectors)[None]).last_hidden_state[0]
    for place, expected in ((0, (o[0], b"")), (2, (o[0], b"at")), (4, (o[1], b" "))):
        torch.testing.assert_close(logits[place], decoded(hierarchy, *expected), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_special_tokens_are_words_of_their_own() -> None:
    stack = stack_of()
    hierarchy = hierarchy_of(stack)
    special = tiny_tokenizer().all_special_ids
    logits = units(stack.model(torch.tensor([[EOS, BOS]])).logits[0, -1])
    vectors = [hierarchy.start, encoded(hierarchy, [257 + special.index(EOS)])]
    with stack.disabled():
        o = stack.model.model(inputs_embeds=torch.stack(vectors)[None]).last_hidden_state[0]
    torch.testing.assert_close(logits, decoded(hierarchy, o[1], b""), rtol=1e-3, atol=1e-4)


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
    with pytest.raises(ArchitectureError, match="width of 18, of which 6 heads have no even number"):
        stack_of(width=18, heads=6)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ArchitectureError, match="without a token for each byte"):
        Stack(tiny("llama"), [HierarchicalByteTransformer(**OPTIONS)], tokenizer=words)
