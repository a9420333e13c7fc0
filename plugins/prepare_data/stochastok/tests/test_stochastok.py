from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from random import Random
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftx import Claim, ModelView, Plugin, Stack, TrainingData, hookimpl
from peftx.engines.data import FORMATS, IGNORE, text_ids, tokenize_dataset
from peftx.errors import ArchitectureError, ConflictError, DataError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny
from peftx.testing.subject import ROWS_BY_FORMAT
from peftx_mosaic_it import MosaicIt
from peftx_stochastok import StochasTok, expand, splits_of

test_conformance = conformance("stochastok")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CORPUS = (
    "the theatre there",
    "another mother bothers",
    "strawberry straw berry",
    "naïve café 12345 12 34",
) * 8
ROOM = 400


@cache
def bytes_tokenizer(*, added: bool = False) -> PreTrainedTokenizerFast:
    """BPE of bytes, 320 tokens; every text has one reading."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=[*SPECIAL.values()], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if added:
        tokenizer.add_tokens(["thether"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


@cache
def marks_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece's: a mark for a word's begin, and single bytes for what is in no token."""
    words = ["▁the", "▁", "the", "t", "h", "e", "▁t", "he", "th", "▁th", "<", "0x0A>", "<0", "x0A>", "o"]
    vocabulary = {
        w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("h", "e"), ("▁", "t"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@cache
def model(arch: str = "llama") -> Any:
    return tiny(arch, max_position_embeddings=512) if arch == "llama" else tiny(arch)


def given_data(
    rows: list[Any], *, format: str, length: int = ROOM, tokenizer: Any = None, **more: Any
) -> TrainingData:
    tokenizer = tokenizer or bytes_tokenizer()
    defaults = {"eval": None, "seed": 0} | more
    return TrainingData(
        train=Dataset.from_list(rows), tokenizer=tokenizer, format=format, max_length=length, **defaults
    )


def prepared(data: TrainingData, arch: str = "llama", **options: Any) -> TrainingData:
    return Stack(model(arch), [StochasTok(**options)], tokenizer=data.tokenizer).prepare(data)


class First(Random):
    """Draws what is written down."""

    def __init__(self, places: list[int], pairs: list[int] | None = None) -> None:
        super().__init__()
        self.places, self.pairs = places, pairs

    def randrange(self, *args: Any) -> int:
        place = self.places.pop(0)
        assert place < args[0]
        return place

    def choice(self, of: Any) -> Any:
        return of[self.pairs.pop(0) if self.pairs else 0]


# ----------------------------------------------------------------------------------------------------------- splits
def test_splits_by_hand() -> None:
    class Words:
        all_special_tokens = ["<s>"]

        def get_vocab(self) -> dict[str, int]:
            return {
                w: i
                for i, w in enumerate(
                    ["a", "b", "ab", "ba", "aba", "<s>", "<", "s>", "abx", "xx", "aab", "aa"]
                )
            }

        def get_added_vocab(self) -> dict[str, int]:
            return {"xx": 9}

    assert splits_of(Words()) == {
        2: [(0, 1)],
        3: [(1, 0)],
        4: [(0, 3), (2, 0)],
        10: [(0, 2), (11, 1)],
        11: [(0, 0)],
    }


def test_every_token_of_more_than_a_byte_has_splits() -> None:
    tokenizer = bytes_tokenizer()
    splits, vocabulary = splits_of(tokenizer), tokenizer.get_vocab()
    names = {id: token for token, id in vocabulary.items()}
    special = set(tokenizer.all_special_ids)
    assert {id for token, id in vocabulary.items() if len(token) > 1} - special == set(splits)
    for id, pairs in splits.items():
        assert len(set(pairs)) == len(pairs)
        assert all(names[a] + names[b] == names[id] for a, b in pairs)
        cuts = {len(names[a]) for a, _ in pairs}
        assert cuts == {
            k for k in range(1, len(names[id])) if {names[id][:k], names[id][k:]} <= set(vocabulary)
        }
    assert any(len(pairs) > 1 for pairs in splits.values()), "merges alone would give one each"


def test_marks_and_bytes() -> None:
    tokenizer = marks_tokenizer()
    splits, id = splits_of(tokenizer), tokenizer.get_vocab()
    assert set(splits[id["▁the"]]) == {(id["▁"], id["the"]), (id["▁t"], id["he"]), (id["▁th"], id["e"])}
    assert id["<0x0A>"] not in splits
    ids = tokenizer("the the\nthe o", add_special_tokens=False)["input_ids"]
    assert id["<0x0A>"] in ids
    found = [expand(ids, splits, 1.0, Random(seed), 99)[0] for seed in range(20)]
    assert {tokenizer.decode(one) for one in found} == {"the the\nthe o"}
    assert max(map(len, found)) > len(ids) + 1


# ----------------------------------------------------------------------------------------------------------- expand
def test_attempts_by_hand() -> None:
    splits = {5: [(1, 4)], 4: [(2, 3)]}
    assert expand([5, 9, 5], splits, 1.0, First([0, 1, 2]), 9) == ([1, 2, 3, 9, 5], [0, 0, 0, 1, 2])
    assert expand([5, 9, 5], splits, 0.67, First([1, 2]), 9) == ([5, 9, 1, 4], [0, 1, 2, 2])
    assert expand([5, 9, 5], splits, 1.0, First([0, 2, 3]), 1) == ([1, 4, 9, 5], [0, 0, 1, 2])
    assert expand([5, 5], splits, 0.49, First([]), 9) == ([5, 5], [0, 1])
    assert expand([], splits, 1.0, First([]), 9) == ([], [])


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=60) | st.sampled_from(CORPUS), st.floats(0, 1), st.integers(0, 2**32), st.integers(0, 40)
)
def test_the_text_is_the_same(text: str, p: float, seed: int, most: int) -> None:
    """decode(expand(encode(x))) = x."""
    tokenizer = bytes_tokenizer()
    splits = splits_of(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, places = expand(ids, splits, p, Random(seed), most)
    assert tokenizer.decode(found) == tokenizer.decode(ids) == text
    assert 0 <= len(found) - len(ids) <= min(int(len(ids) * p), most)
    assert places == sorted(places)
    assert set(places) == set(range(len(ids)))
    counts = Counter(places)
    for place, id in enumerate(ids):
        whole = [token for token, at in zip(found, places, strict=True) if at == place]
        assert id in splits or whole == [id]
        assert (whole == [id]) == (counts[place] == 1)
    assert expand(ids, splits, p, Random(seed), most) == (found, places)
    assert expand(ids, splits, 0.0, Random(seed), most)[0] == ids


def test_places_and_pairs_are_drawn_evenly() -> None:
    rng, splits = Random(0), {7: [(1, 2), (3, 4), (5, 6)]}
    drawn = [expand([7, 7, 7, 7], splits, 0.25, rng, 9) for _ in range(3000)]
    where = Counter(next(i for i in range(4) if places.count(i) == 2) for _, places in drawn)
    which = Counter(
        found[places.index(next(i for i in range(4) if places.count(i) == 2))] for found, places in drawn
    )
    assert all(abs(count - 750) < 120 for count in where.values())
    assert set(which) == {1, 3, 5}
    assert all(abs(count - 1000) < 130 for count in which.values())


def test_equals_the_official_code() -> None:
    """anyasims/stochastok, commit 7061534, gave these numbers on the bundled model's tokens, for the same draws."""
    tokenizer = Stack("peftx:tiny").tokenizer
    splits = splits_of(tokenizer)
    listed = sorted((id, sorted(map(list, pairs))) for id, pairs in splits.items())
    assert (len(splits), sum(map(len, splits.values()))) == (3837, 5963)
    digest = "2a5202121af0a7b0a2904d334173b0944924b7ed165c6f6cd18e4830dfaaa381"
    assert hashlib.sha256(json.dumps(listed).encode()).hexdigest() == digest
    ids = text_ids(tokenizer, "The lighthouse keeper lit the lamp at four in the evening")
    draws = First(
        [12, 15, 0, 3, 3, 7, 9, 19, 21, 18, 4, 23, 6, 24, 24, 12, 26, 1], [1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    )
    found, _ = expand(ids, splits, 1.0, draws, ROOM)
    assert found == [54, 74, 71, 316, 75, 73, 74, 86, 74, 303, 317, 502, 71, 71, 608, 1444, 265, 316, 866, 260, 86, 275,
                     437, 223, 75, 80, 265, 320, 1067, 285]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"preference"}))
def test_rows_are_those_of_training(format: str) -> None:
    """p = 0 is the core's tokenization; with p each row has the same text, and what counts is the same text."""
    rows, tokenizer = [dict(row) for row in ROWS_BY_FORMAT[format]], bytes_tokenizer()
    plain = tokenize_dataset(Dataset.from_list(rows), tokenizer, format=format, max_length=ROOM)
    assert prepared(given_data(rows, format=format), p=0.0).train.to_list() == plain.to_list()
    data = prepared(given_data(rows, format=format), p=0.5)
    assert data.format == "tokenized"
    assert data.train.features == plain.features
    if format != "text":  # which is cut into blocks
        assert len(data.train) == len(rows)
        for old, new in zip(plain, data.train, strict=True):
            assert tokenizer.decode(old["input_ids"]) == tokenizer.decode(new["input_ids"])
            assert counted(old) == counted(new)
            assert all(
                label in (IGNORE, id) for id, label in zip(new["input_ids"], new["labels"], strict=True)
            )
    everything = "".join(tokenizer.decode(row["input_ids"]) for row in data.train)
    assert everything == "".join(tokenizer.decode(row["input_ids"]) for row in plain)
    assert sum(map(len, data.train["input_ids"])) > sum(map(len, plain["input_ids"]))
    assert "<s>" not in str(splits_of(tokenizer).keys() & set(tokenizer.all_special_ids))


def counted(row: dict[str, Any]) -> str:
    return bytes_tokenizer().decode([label for label in row["labels"] if label != IGNORE])


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_blocks_of_text_leave_room(p: float) -> None:
    data = prepared(given_data([{"text": text} for text in CORPUS], format="text", length=20), p=p)
    lengths = [len(ids) for ids in data.train["input_ids"]]
    assert max(lengths) <= 20
    assert max(lengths) > int(20 / (1 + p))
    whole = tokenize_dataset(
        Dataset.from_list([{"text": text} for text in CORPUS]),
        bytes_tokenizer(),
        format="text",
        max_length=20,
    )
    assert sum(lengths) > (1 + p / 4) * sum(map(len, whole["input_ids"])), (
        "no block is full before it is split"
    )
    tokenizer = bytes_tokenizer()
    texts = "".join(tokenizer.decode(ids) for ids in data.train["input_ids"])
    expected = "".join(f"{text}</s>" for text in CORPUS)
    assert texts in (expected, expected.removesuffix("</s>")), (
        "a last block of one token goes, as it always does"
    )
    assert data.train["input_ids"][:] == data.train["labels"][:]


def test_a_row_that_is_nearly_full_is_split_less() -> None:
    row = {"prompt": "the theatre there", "completion": "another mother"}
    plain = tokenize_dataset(
        Dataset.from_list([row]), bytes_tokenizer(), format="prompt-completion", max_length=ROOM
    )
    size = len(plain[0]["input_ids"])
    short = {"prompt": "a", "completion": "b"}
    for room in (1, 2):
        data = prepared(given_data([row, short], format="prompt-completion", length=size + room), p=1.0)
        assert len(data.train[0]["input_ids"]) == size + room
    data = prepared(given_data([row, short], format="prompt-completion", length=size), p=1.0)
    assert data.train[0] == plain[0]
    full = given_data([row], format="prompt-completion", length=size)
    assert prepared(full, p=0.0).train.to_list() == plain.to_list()
    with pytest.raises(DataError, match=f"all rows have {size} tokens, and none has room for pieces"):
        prepared(given_data([row], format="prompt-completion", length=size))


def test_evaluation_reads_whole_tokens() -> None:
    rows = [dict(row) for row in ROWS_BY_FORMAT["prompt-completion"]]
    plain = tokenize_dataset(
        Dataset.from_list(rows), bytes_tokenizer(), format="prompt-completion", max_length=ROOM
    )
    data = prepared(given_data(rows, format="prompt-completion", eval=Dataset.from_list(rows)), p=1.0)
    assert data.eval.to_list() == plain.to_list()
    assert data.train.to_list() != plain.to_list()


def test_another_seed_splits_otherwise() -> None:
    rows = [dict(row) for row in ROWS_BY_FORMAT["prompt-completion"]]
    one, again, other = (
        prepared(given_data(rows, format="prompt-completion", seed=seed), p=0.5).train.to_list()
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_rows_that_are_tokenized_already() -> None:
    ids = bytes_tokenizer()("another mother bothers the theatre")["input_ids"]
    labels = [IGNORE] * 4 + ids[4:]
    data = prepared(
        given_data([{"input_ids": ids, "labels": labels, "weight": 0.5}], format="tokenized"), p=1.0
    )
    row = data.train[0]
    assert len(row["input_ids"]) > len(ids)
    assert row["weight"] == 0.5
    assert counted(row) == bytes_tokenizer().decode(ids[4:])
    with pytest.raises(DataError, match=r"row 0 \(counting from 0\) has labels that are not its tokens"):
        prepared(given_data([{"input_ids": ids, "labels": ids[::-1]}], format="tokenized"))
    with pytest.raises(UnsupportedError, match="'position_ids' has a value for each token"):
        prepared(given_data([{"input_ids": ids, "labels": ids, "position_ids": ids}], format="tokenized"))


def test_special_and_added_tokens_stay_whole() -> None:
    tokenizer = bytes_tokenizer(added=True)
    added = tokenizer.get_added_vocab()["thether"]
    data = prepared(given_data([{"prompt": "thether the", "completion": "the"}] * 9, format="prompt-completion",
                               tokenizer=tokenizer), p=1.0)  # fmt: skip
    for ids in data.train["input_ids"]:
        assert ids.count(added) == 1
        assert ids[-1] == tokenizer.eos_token_id


def test_encoder_and_decoder() -> None:
    rows, tokenizer = (
        [{"prompt": "another mother bothers", "completion": "the theatre there"}] * 4,
        bytes_tokenizer(),
    )
    data = prepared(given_data(rows, format="prompt-completion"), "t5", p=1.0)
    for row in data.train:
        assert tokenizer.decode(row["input_ids"]) == "another mother bothers"
        assert tokenizer.decode(row["labels"]) == "the theatre there</s>"
    for side in ("input_ids", "labels"):
        assert len({len(ids) for ids in data.train[side]}) > 1


def test_columns_of_other_plugins_come_along() -> None:
    class Reads(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.column("speaker")
            model.column("shown", own_length=True)

    rows = [{"prompt": "a", "completion": "b", "speaker": i, "shown": [i, i]} for i in range(3)]
    data = given_data(rows, format="prompt-completion")
    found = Stack(tiny("llama"), [StochasTok(), Reads()], tokenizer=data.tokenizer).prepare(data).train
    assert found["speaker"][:] == [0, 1, 2]
    assert found["shown"][:] == [[0, 0], [1, 1], [2, 2]]


class Tunes(Plugin):
    claims = {Claim.TRAINS_BASE, Claim.IDENTITY_AT_START}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.train("norm.final")


def test_it_trains() -> None:
    stack, seen = Stack("peftx:tiny", [StochasTok(p=1.0), Tunes()]), []
    stack.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    row = {"prompt": "The lighthouse keeper", "completion": "writes a log of the weather"}
    stack.train([row] * 4, steps=2, batch_size=2)
    texts = [stack.tokenizer.decode(ids, skip_special_tokens=True) for batch in seen for ids in batch]
    assert len(texts) == 4
    assert {text.strip() for text in texts} == {"The lighthouse keeper writes a log of the weather"}
    assert len({ids.ne(stack.tokenizer.pad_token_id).sum().item() for batch in seen for ids in batch}) > 1


# ---------------------------------------------------------------------------------------------------------- refused
def test_refused() -> None:
    with pytest.raises(
        ArchitectureError, match="stochastok: BertForMaskedLM does not learn to foresee tokens"
    ):
        Stack(tiny("bert"), [StochasTok()], tokenizer=bytes_tokenizer())
    with pytest.raises(UnsupportedError, match=r"stochastok.*two completions"):
        prepared(given_data([dict(row) for row in ROWS_BY_FORMAT["preference"]], format="preference"))
    with pytest.raises(ConflictError, match="leaves rows of format tokenized") as caught:
        Stack(tiny("llama"), [StochasTok(), MosaicIt()], tokenizer=bytes_tokenizer())
    assert "mosaic-it, stochastok" in str(caught.value)
    Stack(tiny("llama"), [MosaicIt(), StochasTok()], tokenizer=bytes_tokenizer())


def test_a_tokenizer_that_writes_pieces_otherwise() -> None:
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "</s>", "t", "he", "the", "a"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    rows = [{"prompt": "the a the", "completion": "the the"}]
    with pytest.raises(UnsupportedError, match="writes tokens otherwise when they stand in pieces"):
        prepared(given_data(rows, format="prompt-completion", tokenizer=words), p=1.0)
