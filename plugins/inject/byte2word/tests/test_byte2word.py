from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from peftx import Plugin, Stack, hookimpl
from peftx.composition.conflicts import find_conflicts
from peftx.errors import ArchitectureError, ConflictError, DataError, UnsupportedError
from peftx.kernel.members import Member
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx_byte2word import Byte2Word, Words, symbols_of
from peftx_dpo_prefix_sharing import DpoPrefixSharing
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prefix_grouper import PrefixGrouper
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("byte2word")

OPTIONS = {"width": 6, "heads": 2, "longest": 8}
TEXT = "The dog, who barked."
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


def stack_of(*plugins: Any, arch: str = "llama", **options: Any) -> Stack:
    return Stack(tiny(arch), [*plugins, Byte2Word(**OPTIONS | options)], tokenizer=tiny_tokenizer())


def words_of(stack: Stack) -> Words:
    return next(module for module in stack.model.modules() if isinstance(module, Words))


def ids_of(stack: Stack, *texts: str) -> Tensor:
    return torch.tensor([stack.tokenizer(text).input_ids for text in texts])


def vector(words: Words, text: bytes, symbol: int | None = None) -> Tensor:
    """w of a word, number by number."""
    symbols = [symbol] if symbol is not None else [*text]
    first = max(0, len(symbols) - words.L)
    xs = []
    for i in range(first, len(symbols)):
        xs.append(words.E.weight[symbols[i]] + words.P.weight[min(i, words.L - 1)])
    heads = []
    for h in range(len(words.q)):
        scores = [float(words.q[h] @ (words.K[h].T @ x)) / math.sqrt(words.q.shape[1]) for x in xs]
        total = sum(map(math.exp, scores))
        mixed = sum(math.exp(s) / total * x for s, x in zip(scores, xs, strict=True))
        heads.append(words.V[h].T @ mixed)
    out = words.O.weight @ torch.cat(heads)
    out = (out - out.mean()) / (out.var(unbiased=False) + 1e-5).sqrt()
    return words.norm.weight * out + words.norm.bias


@pytest.fixture
def bundled() -> Stack:
    return Stack("peftx:tiny", [Byte2Word(width=8, heads=2)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The dog, who  barked.", ["The", " dog", ",", " who", " ", " barked", "."]),
        ("a1 b\n\nc\td", ["a1", " b", "\n", "\nc", "\td"]),
        ("naïve 日本(x)", ["naïve", " 日本", "(", "x", ")"]),
        ("?! it's", ["?!", " it's"]),
    ],
)
def test_words_begin_at_white_space_and_punctuation(text: str, words: list[str]) -> None:
    stack = stack_of()
    seen: list[Tensor] = []
    owner = words_of(stack)
    before = owner.before
    owner.before = lambda call: (seen.append(owner.known()[1]), before(call))[1]  # type: ignore[method-assign]
    stack.model(ids_of(stack, text))
    (begins,) = seen[0].tolist()
    cuts = [i for i, begin in enumerate(begins) if begin] + [len(text.encode())]
    found = [text.encode()[a:b].decode() for a, b in pairwise(cuts)]
    assert found == words


def run_words(stack: Stack, vectors: list[Tensor]) -> Tensor:
    """Logits of the plain model at the last of these words."""
    with stack.disabled():
        return stack.model(inputs_embeds=torch.stack(vectors)[None]).logits[0, -1]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_is_a_transformer_over_the_vectors_of_words(arch: str) -> None:
    """At every token: of a word that is over, and of one that is not yet."""
    stack = stack_of(arch=arch)
    words = [b"The", b" dog", b",", b" who", b" barked", b"."]
    made = [vector(words_of(stack), word) for word in words]
    logits, place = stack.model(ids_of(stack, TEXT)).logits[0], 0
    for n, word in enumerate(words):
        for t in range(1, len(word) + 1):
            expected = run_words(stack, [*made[:n], vector(words_of(stack), word[:t])])
            torch.testing.assert_close(logits[place], expected, rtol=1e-3, atol=1e-4)
            place += 1


@torch.no_grad()
def test_a_longer_word_is_its_last_bytes() -> None:
    stack = stack_of()
    logits = stack.model(ids_of(stack, "incomprehensible")).logits[0, -1]
    expected = run_words(stack, [vector(words_of(stack), b"incomprehensible")])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    other = stack.model(ids_of(stack, "INCOMPREhensible")).logits[0, -1]  # the last eight are the same
    assert torch.equal(logits, other)
    assert not torch.allclose(logits, stack.model(ids_of(stack, "incompreHensible")).logits[0, -1], atol=1e-3)


@torch.no_grad()
def test_tokens_may_cut_a_word_as_they_like(bundled: Stack) -> None:
    """Of one text, in the tokenizer's pieces and in bytes."""
    text = "Once upon a time, in Zoë's town"
    chars = "".join(bundled.tokenizer.convert_ids_to_tokens(bundled.tokenizer(text).input_ids[1:]))
    spelled = [0, *bundled.tokenizer.convert_tokens_to_ids([*chars])]
    assert len(spelled) == 1 + len(text.encode()) > len(bundled.tokenizer(text).input_ids)
    found = bundled.model(torch.tensor([spelled])).logits[0, -1]
    expected = bundled.model(ids_of(bundled, text)).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_byte_shows_in_the_vector_of_its_word_alone() -> None:
    stack = stack_of()
    seen: list[Tensor] = []
    handle = stack.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    stack.model(ids_of(stack, TEXT, TEXT.replace("w", "W")))
    handle.remove()
    one, other = seen[0]
    changed = (one != other).any(-1).nonzero()[:, 0].tolist()
    assert changed == [TEXT.index("w") + i for i in range(3)]  # "who", from its second byte on


@torch.no_grad()
def test_pads_among_the_bytes_change_nothing() -> None:
    words, x = words_of(stack_of()), torch.randn(5, 3, 6)
    alone = words(x, torch.ones(5, 3, dtype=torch.bool))
    padded = torch.cat((x, torch.randn(5, 4, 6)), 1)
    found = words(padded, torch.arange(7).expand(5, -1) < 3)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_every_special_token_is_a_word_with_a_symbol_of_its_own() -> None:
    stack = stack_of()
    table = symbols_of(stack.tokenizer)
    assert table[3 + ord("a")] == [ord("a")]
    special = [table[id][0] for id in stack.tokenizer.all_special_ids]
    assert sorted(special) == [257, 258, 259]
    made = [vector(words_of(stack), b"", table[i][0]) for i in (1, 1)] + [vector(words_of(stack), b"hi")]
    ids = torch.tensor([[1, 1, *ids_of(stack, "hi")[0]]])
    found = stack.model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    torch.testing.assert_close(found, run_words(stack, made), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_any_text_comes_back_and_is_read(bundled: Stack) -> None:
    draw = random.Random(0)
    points = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(3):
        text = "".join(map(chr, draw.choices(points, k=12))) + " ok"
        ids = bundled.tokenizer(text).input_ids[1:]
        assert bundled.tokenizer.decode(ids) == text
        table = symbols_of(bundled.tokenizer)
        assert bytes(byte for id in ids for byte in table[id]) == text.encode()
        assert bundled.model(torch.tensor([ids])).logits.isfinite().all()


def test_no_number_follows_from_the_vocabulary(bundled: Stack) -> None:
    d, d_b, L, count = 256, 8, 32, 1 + 3
    assert bundled.trainable_parameters() == (256 + count + L + 2 * d) * d_b + d + d * d + 2 * d


def test_half_a_surrogate_pair_is_refused(bundled: Stack) -> None:
    with pytest.raises(DataError, match="half a surrogate pair"):
        bundled.generate("so \ud83d it is")
    with pytest.raises(DataError, match=r"row 0.*half a surrogate pair"):
        bundled.train([{"text": "so \ud83d it is"}], steps=1)


@pytest.mark.parametrize("others", [(), (PromptTuning(length=3, init="uniform"),), (PTuningV2(length=3),)])
@torch.no_grad()
def test_cached_and_padded_as_uncached_and_alone(others: tuple[Any, ...]) -> None:
    """Beside rows of others, and under beams too."""
    stack = stack_of(*others)
    long, short = ids_of(stack, "One day a")[0], ids_of(stack, "he ")[0]
    ids = torch.stack((long, torch.cat((short.new_full((len(long) - len(short),), PAD), short))))
    mask = (ids != PAD).long()
    cached = stack.model.generate(ids, attention_mask=mask, **GREEDY)
    uncached = stack.model.generate(ids, attention_mask=mask, **GREEDY, use_cache=False)
    alone = stack.model.generate(short[None], attention_mask=torch.ones_like(short)[None], **GREEDY)
    found, plain, one = (torch.stack(out.logits) for out in (cached, uncached, alone))
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[:, 1:], one, rtol=1e-3, atol=1e-4)
    beams = [
        stack.model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3, use_cache=use).sequences
        for use in (True, False)
    ]
    assert torch.equal(*beams)


class Marks(Plugin):
    """A new token with rows of its own."""

    @hookimpl
    def inject(self, model: Any) -> None:
        self.rows = model.vocabulary(["<end>"])


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_new_tokens_beside_it(first: bool) -> None:
    """One that was there before is read by its bytes, one that comes later keeps the row that it brings."""
    marks, own = Marks(), Byte2Word(**OPTIONS)
    stack = Stack("peftx:tiny", [marks, own] if first else [own, marks])
    ids = ids_of(stack, "so<end>")
    assert int(ids[0, -1]) == marks.rows.ids[0] == 4096
    logits = stack.model(ids).logits[0, -1, :4096]
    read = vector(words_of(stack), b"<end>")  # a word of its own, behind BOS and "so"
    made = [vector(words_of(stack), b"", 257), vector(words_of(stack), b"so"), read]
    assert torch.allclose(run_words(stack, made)[:4096], logits, rtol=1e-3, atol=1e-3) is first
    marks.rows.R.add_(1.0)
    assert torch.equal(stack.model(ids).logits[0, -1, :4096], logits) is first


def test_learns_and_is_measured_in_bits_per_byte(bundled: Stack) -> None:
    rows = [{"text": "the cat sat on the mat and the cat sat on the mat again"}]
    plain = Stack("peftx:tiny").evaluate(rows, metrics=["perplexity"])
    before = bundled.evaluate(rows, metrics=["perplexity"])
    bundled.train(rows * 4, steps=12, batch_size=2, learning_rate=1e-2)
    after = bundled.evaluate(rows, metrics=["perplexity"])
    assert after["bits_per_byte"].value < 0.5 * before["bits_per_byte"].value
    assert after["nll"].count == plain["nll"].count  # the same tokens are predicted, so the two compare


@torch.no_grad()
def test_text_as_an_embedding_and_lookups_of_others() -> None:
    stack, ids = stack_of(), torch.tensor([[5, 6]])
    assert torch.equal(stack.model.get_input_embeddings()(ids), tiny("llama").get_input_embeddings()(ids))
    words = words_of(stack)
    table = tiny("llama").get_input_embeddings().weight
    assert float(words.norm.weight[0]) == pytest.approx(float(table.std()), rel=0.1)
    with pytest.raises(UnsupportedError, match="brings no tokens"):
        stack.model(inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("gpt_oss", "more than scores"), ("qwen3_next", "layers without attention"),
        ("gemma3n", "looks tokens up in every layer"), ("bert", "no decoder"),
    ],
)  # fmt: skip
def test_refused(arch: str, why: str) -> None:
    with pytest.raises(ArchitectureError, match=why):
        stack_of(arch=arch)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [DpoPrefixSharing(), PrefixGrouper()])
def test_rows_of_several_texts_are_refused(other: Plugin, first: bool) -> None:
    """By claims: `peftx validate` says so without a model."""
    plugins = [Byte2Word(), other] if first else [other, Byte2Word()]
    members = [Member(type(plugin).__name__, plugin) for plugin in plugins]
    (known,) = find_conflicts(members)
    assert "'Byte2Word' reads a row as one text" in known.reason
    assert known.claims == ("needs-mask", "own-layout")


def test_heads_and_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(ArchitectureError, match="3 heads do not divide the width, 32"):
        stack_of(heads=3)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ArchitectureError, match="has no token for each byte"):
        Stack(tiny("llama"), [Byte2Word(**OPTIONS)], tokenizer=words)


@pytest.mark.parametrize("first", [True, False])
def test_with_lora_in_the_backbone(first: bool) -> None:
    pair = [Lora(rank=2), Byte2Word(**OPTIONS)]
    stack = Stack(tiny("llama"), pair if first else pair[::-1], tokenizer=tiny_tokenizer())
    report = stack.train([{"text": "a b c d e f"}] * 4, steps=8, batch_size=2, learning_rate=1e-2)
    assert report.losses[-1][1] < report.losses[0][1]


def test_what_stands_on_the_embedding_before_it_is_refused_and_behind_it_works() -> None:
    lora = {"rank": 2, "targets": "embedding"}
    with pytest.raises(ConflictError, match="in the place of what 'lora' makes of embeddings") as caught:
        Stack(tiny("llama"), [Lora(**lora), Byte2Word(**Byte2Word.example)], tokenizer=tiny_tokenizer())
    assert caught.value.hint == "put 'byte2word' before 'lora'"
    stack = Stack(tiny("llama"), [Byte2Word(**Byte2Word.example), Lora(**lora)], tokenizer=tiny_tokenizer())
    before = [p.detach().clone() for p in stack.ledger.parameters("lora")]
    stack.train([{"text": "Snow is white."}, {"text": "Grass is green."}], steps=2, batch_size=2)
    assert not all(map(torch.equal, stack.ledger.parameters("lora"), before))
