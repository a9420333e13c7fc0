"""The vocabulary: a byte-level BPE of 4096 entries, learned on the training documents."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tiny.sources import Source, load_sources
from tiny.texts import read_text

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 4096
SPLIT_PATTERN = r" ?<unk>|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build_tokenizer(sources: list[Source], out: Path) -> PreTrainedTokenizerFast:
    """Learn the byte-level BPE vocabulary, with sources repeated about as often as training does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for source in sources:
            weight = (source.share + source.decay_share) / max(source.raw_bytes, 1) * 4e7
            for _ in range(max(1, round(weight))):
                yield from (doc.prompt + doc.answer for doc in source.documents)

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, PAD)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    return fast


def learn_tokenizer(args: argparse.Namespace) -> None:
    """Learn the vocabulary and save it under the working folder."""
    sources = load_sources(args.data, args.prose)
    tokenizer = build_tokenizer(sources, args.work / "tokenizer")
    wiki = read_text(args.data, "text/wikitext2_valid.txt.gz")
    size = len(wiki.encode()) / len(tokenizer(wiki)["input_ids"])
    print(json.dumps({"vocabulary": len(tokenizer), "wikitext_bytes_per_token": round(size, 3)}))
