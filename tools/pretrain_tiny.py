#!/usr/bin/env python3
"""Pre-train, evaluate and export the small language model that is bundled with peftx.

The model is a plain Llama of 5.4 million parameters with a byte-level BPE vocabulary of 4096 entries,
trained on a few tens of megabytes of public English text.  Every stage is a sub-command::

    pretrain_tiny.py tokenizer --data DATA --work WORK     # learn the vocabulary
    pretrain_tiny.py train     --data DATA --work WORK --tokens 40M
    pretrain_tiny.py export    --work WORK --out DIR       # fp16 safetensors + tokenizer
    pretrain_tiny.py evaluate  --data DATA --model DIR     # bits per byte, zero-shot accuracy, as JSON
    pretrain_tiny.py card      --data DATA --work WORK --model DIR

``train`` may be stopped at any time (SIGTERM and SIGINT write a checkpoint first) and continues from its
last checkpoint when it is started again, with another ``--threads`` or ``--tokens`` if wished.  A checkpoint
is one safetensors file: weights, optimizer moments, and the state of the data sampler as JSON in its header.

``--prose`` leaves out every task set, AG News as running text included: such a model has seen no row that
a benchmark about data trains or tests on.

Held out, never trained on: the WikiText-2 test split, the GSM8K test split, the SNIPS validation split, the
AG News rows from index 6000 on, and the sentence polarity rows from index 9000 on.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import gzip
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 4096
AG_NEWS_TRAIN_ROWS = 6000
POLARITY_TRAIN_ROWS = 9000
LABEL_LOSS_WEIGHT = 10.0
WIKITEXT_TEST = "text/wikitext2_test.txt.gz"

# ----------------------------------------------------------------------------------------------------
# Reading the data
# ----------------------------------------------------------------------------------------------------


def read_text(data: Path, name: str) -> str:
    """The whole text of a gzip file, with its line ends untouched."""
    return gzip.decompress((data / name).read_bytes()).decode("utf-8")


def read_rows(data: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a ``.json.gz`` (one list), ``.jsonl.gz`` or ``.csv.gz`` file."""
    text = read_text(data, name)
    if name.endswith(".json.gz"):
        return json.loads(text)
    if name.endswith(".csv.gz"):
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def polarity_prompt(text: str) -> str:
    """The fixed prompt of sentiment classification; the label follows after one space."""
    return f"Review: {text}\nSentiment:"


def news_prompt(text: str) -> str:
    """The fixed prompt of news topic classification; the label follows after one space."""
    return f"News: {text}\nTopic:"


def intent_prompt(text: str) -> str:
    """The fixed prompt of intent classification; the label follows after one space."""
    return f"Utterance: {text}\nIntent:"


def entailment_prompt(premise: str, hypothesis: str) -> str:
    """The fixed prompt of textual entailment; the label follows after one space."""
    return f"Premise: {premise}\nHypothesis: {hypothesis}\nEntailment:"


def instruction_prompt(instruction: str, given: str = "") -> str:
    """The fixed prompt of instruction following; the response follows after one space."""
    middle = f"\nInput: {given.strip()}" if given.strip() else ""
    return f"Instruction: {instruction.strip()}{middle}\nResponse:"


def question_prompt(question: str) -> str:
    """The fixed prompt of math word problems; the answer follows after one space."""
    return f"Question: {question.strip()}\nAnswer:"


@dataclass(frozen=True)
class Document:
    """One training document; the tokens of ``answer`` weigh ``answer_weight`` times in the loss."""

    prompt: str
    answer: str = ""
    answer_weight: float = 1.0


def labelled(prompt: str, label: str) -> Document:
    """A classification prompt whose label counts more than the text before it."""
    return Document(prompt, f" {label}", LABEL_LOSS_WEIGHT)


def answered(prompt: str, answer: str) -> Document:
    """A prompt and its answer, all tokens weighing the same."""
    return Document(f"{prompt} {answer.strip()}")


COARSE_WORDS = re.compile(
    r"\b(boobs?|balls|tits?|dick|cock|pussy|fuck\w*|shit\w*|bitch\w*|cunt|slut\w*|whore\w*|nigg\w+|fag\w*|penis|"
    r"vagina|porn\w*|anal|blowjob|masturbat\w*|horny|ass(hole)?|rape[ds]?|sexy?|sexual\w*|naked|nude)\b",
    re.IGNORECASE,
)


def prose_blocks(text: str, limit: int = 6000) -> list[str]:
    """Split prose into blocks at blank lines, long blocks at line ends, coarse ones left out."""
    blocks: list[str] = []
    for raw in re.split(r"\n\s*\n", text):
        if COARSE_WORDS.search(raw):
            continue
        lines: list[str] = []
        size = 0
        for line in raw.splitlines():
            lines.append(line)
            size += len(line)
            if size >= limit:
                blocks.append("\n".join(lines))
                lines, size = [], 0
        if lines:
            blocks.append("\n".join(lines))
    return [block for block in blocks if block.strip()]


def merge_blocks(blocks: list[str], size: int, joiner: str) -> list[str]:
    """Join neighbouring blocks until each document has at least ``size`` characters."""
    out: list[str] = []
    held: list[str] = []
    length = 0
    for block in blocks:
        held.append(block)
        length += len(block)
        if length >= size:
            out.append(joiner.join(held))
            held, length = [], 0
    if held:
        out.append(joiner.join(held))
    return out


def wiki_articles(text: str) -> list[str]:
    """The articles of a WikiText file, whitespace untouched; each begins with its title line."""
    starts = [match.start() for match in re.finditer(r"(?m)^ \n = [^=].* = $\n", text)]
    starts = [0, *starts[1:]] if starts else [0]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


ABBREVIATION = re.compile(
    r"(?:^|\W)(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Gen|Lt|Col|Capt|Gov|Sen|Rep|Prof|Rev|No|vs|etc|Inc|Corp|Co|Ltd|[A-Z]|"
    r"(?:[A-Za-z]\.)+[A-Za-z])$"
)


def wiki_words(line: str) -> str:
    """Re-write one line the way WikiText is tokenised: spaced punctuation, ``@-@``, ``@,@`` and ``@.@``."""
    line = re.sub(r"[“”]|``|''", '"', line).replace("’", "'").replace("--", " – ")
    line = re.sub(r"(?<=\d),(?=\d)", " @,@ ", line)
    line = re.sub(r"(?<=\d)\.(?=\d)", " @.@ ", line)
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<!@),(?!@)|([;:!?()\[\]\"%$£&/*#=+<>]|\.\.\.)", lambda m: f" {m[0]} ", line)
    line = re.sub(r"(?<=\w)'(?=\w)", " '", line)
    line = re.sub(r"(?<=s)'(?=\s|$)", " '", line)
    words: list[str] = []
    for word in line.split():
        if len(word) > 1 and word.endswith(".") and not ABBREVIATION.search(word[:-1]) and word != "...":
            words += [word[:-1], "."]
        else:
            words.append(word)
    if words and len(words[-1]) > 1 and words[-1].endswith(".") and words[-1] != "...":
        words[-1:] = [words[-1][:-1], "."]
    return " ".join(words)


def wiki_style(block: str, heading: bool) -> str:
    """A block of plain prose in WikiText's layout; with ``heading`` a short first line becomes a title."""
    lines = [line for line in (wiki_words(line) for line in block.splitlines()) if line]
    head = ""
    if heading and len(lines) > 1 and len(lines[0]) < 80 and not lines[0].endswith((".", '"', "?", "!")):
        head = f" \n = {lines.pop(0)} = \n \n"
    return head + "".join(f" {line} \n" for line in lines)


def mask_rare_words(blocks: list[str], known: set[str]) -> list[str]:
    """Replace the words outside ``known`` by ``<unk>``, as WikiText does with its rare words."""

    def mask(match: re.Match[str]) -> str:
        return match[0] if match[0] in known else "<unk>"

    return [re.sub(r"(?<=\s)[^\W\d_][\w'.]*(?=\s)", mask, block) for block in blocks]


def tidy_news(text: str) -> str:
    """AG News text without its broken HTML escapes and backslashes."""
    for old, new in (("\\", " "), ("#36;", "$"), ("#39;", "'"), ("quot;", '"'), ("amp;", "&")):
        text = text.replace(old, new)
    return re.sub(r"\s+", " ", re.sub(r"\b[lg]t;/?\w*|&?nbsp;", " ", text)).strip()


def normalised(text: str) -> str:
    """Only the letters and digits of a text, in lower case: what held-out texts are compared by."""
    return re.sub(r"[\W_]+", "", text.lower())


class HeldOut:
    """Finds the training documents which contain the beginning of a held-out text."""

    WIDTH = 60

    def __init__(self, texts: list[str]) -> None:
        cleaned = [normalised(text) for text in texts]
        self.long = {text[: self.WIDTH] for text in cleaned if len(text) >= self.WIDTH}
        self.short = {text for text in cleaned if len(text) < self.WIDTH}

    @classmethod
    def load(cls, data: Path) -> HeldOut:
        """Everything the project evaluates on, the WikiText test split apart (no other source quotes it)."""
        texts = [
            row["text"] for row in read_rows(data, "classify/ag_news_test.jsonl.gz")[AG_NEWS_TRAIN_ROWS:]
        ]
        rows = read_rows(data, "classify/sentence_polarity.jsonl.gz")
        texts += [row["text"] for row in rows[POLARITY_TRAIN_ROWS:]]
        texts += [row["text"] for row in read_rows(data, "classify/snips_validate.jsonl.gz")]
        texts += [row["question"] for row in read_rows(data, "math/gsm8k_test.jsonl.gz")]
        for name in ("svamp", "multiarith", "addsub", "singleeq", "aqua"):
            texts += [row["instruction"] for row in read_rows(data, f"math/{name}_test.json.gz")]
        for name in ("arc-easy", "boolq", "openbookqa", "piqa", "winogrande"):
            for row in read_rows(data, f"commonsense/{name}_test.json.gz"):
                texts.append(row["instruction"].split("question: ")[-1].split("sentence: ")[-1])
        return cls(texts)

    def matches(self, document: Document) -> bool:
        """Whether the document contains a held-out beginning, or one line is a short held-out text."""
        text = normalised(document.prompt + document.answer)
        if any(text[i : i + self.WIDTH] in self.long for i in range(len(text) - self.WIDTH + 1)):
            return True
        parts = (re.sub(r"^\w+: ", "", line) for line in document.prompt.split("\n"))
        return any(normalised(part) in self.short for part in parts if len(part) >= 12)


@dataclass
class Source:
    """Documents of one kind, and their share of the tokens before and during the learning-rate decay."""

    name: str
    files: tuple[str, ...]
    share: float
    decay_share: float
    documents: list[Document] = field(repr=False, default_factory=list)
    dropped: int = 0

    @property
    def raw_bytes(self) -> int:
        """UTF-8 size of the documents."""
        return sum(len((doc.prompt + doc.answer).encode()) for doc in self.documents)


def load_prose(data: Path) -> list[Source]:
    """Running text: WikiText, and the other corpora both as they are and in WikiText's style."""
    articles = wiki_articles(read_text(data, "text/wikitext2_valid.txt.gz"))
    plain: dict[str, list[str]] = {}
    for name in ("abc", "state_union", "inaugural", "webtext"):
        plain[name] = prose_blocks(read_text(data, f"text/{name}.txt.gz"))
    news = read_rows(data, "classify/ag_news_test.jsonl.gz")[:AG_NEWS_TRAIN_ROWS]
    plain["ag_news"] = [tidy_news(row["text"]) for row in news]

    styled = {name: [wiki_style(block, name == "abc") for block in blocks] for name, blocks in plain.items()}
    counts = collections.Counter(word for article in articles for word in article.split() * 3)
    for blocks in styled.values():
        counts.update(word for block in blocks for word in block.split())
    known = {word for word, count in counts.items() if count >= 3}
    styled = {name: mask_rare_words(blocks, known) for name, blocks in styled.items()}

    shares = {  # plain, plain in decay, WikiText style, WikiText style in decay
        "abc": (0.07, 0.03, 0.16, 0.18),
        "state_union": (0.025, 0.005, 0.05, 0.05),
        "inaugural": (0.01, 0.002, 0.02, 0.02),
        "webtext": (0.03, 0.01, 0.03, 0.02),
        "ag_news": (0.01, 0.005, 0.05, 0.05),
    }
    wiki = [Document(article) for article in articles]
    sources = [Source("wikitext2_valid", ("text/wikitext2_valid.txt.gz",), 0.13, 0.27, wiki)]
    for name, (share, decay_share, style_share, style_decay_share) in shares.items():
        file = "classify/ag_news_test.jsonl.gz" if name == "ag_news" else f"text/{name}.txt.gz"
        documents = [Document(text) for text in merge_blocks(plain[name], 400, "\n\n")]
        sources.append(Source(f"{name} (plain)", (file,), share, decay_share, documents))
        documents = [Document(text) for text in merge_blocks(styled[name], 400, "")]
        sources.append(Source(f"{name} (WikiText style)", (file,), style_share, style_decay_share, documents))
    for name, share, decay_share in (("genesis", 0.006, 0.002), ("tinyshakespeare", 0.015, 0.004)):
        text = read_text(data, f"text/{name}.txt.gz")
        blocks = merge_blocks([block for block in re.split(r"\n\s*\n", text) if block.strip()], 2000, "\n\n")
        documents = [Document(block) for block in blocks]
        sources.append(Source(name, (f"text/{name}.txt.gz",), share, decay_share, documents))
    return sources


def load_prompts(data: Path) -> list[Source]:
    """Labelled prompts, instructions, questions and dialogues, one fixed format each."""
    sources: list[Source] = []

    def add(
        name: str,
        file: str,
        share: float,
        decay_share: float,
        make: Callable[[dict], list[Document]],
        rows: int | None = None,
    ) -> None:
        documents = [doc for row in read_rows(data, file)[:rows] for doc in make(row)]
        sources.append(Source(name, (file,), share, decay_share, documents))

    def slots(row: dict) -> list[Document]:
        if not row["slots"]:
            return []
        listed = "; ".join(f"{slot['slot']} = {slot['value']}" for slot in row["slots"])
        return [answered(f"Utterance: {row['text']}\nSlots:", listed)]

    def instances(row: dict) -> list[Document]:
        return [
            answered(instruction_prompt(row["instruction"], item["input"]), item["output"])
            for item in row["instances"]
        ]

    def math_answer(text: str) -> str:
        return re.sub(r"<<[^>]*>>", "", text)

    def instruction(row: dict) -> list[Document]:
        answer = row["response"] if "response" in row else row["output"]
        return [answered(instruction_prompt(row["instruction"], row["input"]), answer)]

    def dialogue(row: dict) -> list[Document]:
        return [Document("\n".join(f"{turn['speaker'].title()}: {turn['text']}" for turn in row["turns"]))]

    add(
        "ag_news (topic)",
        "classify/ag_news_test.jsonl.gz",
        0.07,
        0.08,
        lambda row: [labelled(news_prompt(row["text"]), row["label"])],
        AG_NEWS_TRAIN_ROWS,
    )
    add(
        "sentence_polarity",
        "classify/sentence_polarity.jsonl.gz",
        0.09,
        0.12,
        lambda row: [labelled(polarity_prompt(row["text"]), row["label"])],
        POLARITY_TRAIN_ROWS,
    )
    add(
        "snips (intent)",
        "classify/snips_train.jsonl.gz",
        0.025,
        0.02,
        lambda row: [labelled(intent_prompt(row["text"]), row["intent"])],
    )
    add("snips (slots)", "classify/snips_train.jsonl.gz", 0.015, 0.01, slots)
    add(
        "rte3_dev",
        "classify/rte3_dev.jsonl.gz",
        0.008,
        0.008,
        lambda row: [labelled(entailment_prompt(row["premise"], row["hypothesis"]), row["label"].lower())],
    )
    add(
        "gsm8k_train",
        "math/gsm8k_train.jsonl.gz",
        0.06,
        0.045,
        lambda row: [answered(question_prompt(row["question"]), math_answer(row["answer"]))],
    )
    add("seed_tasks", "instruct/seed_tasks.jsonl.gz", 0.003, 0.003, instances)
    add("user_oriented_instructions", "instruct/user_oriented_instructions.jsonl.gz", 0.004, 0.004, instances)
    add("roleplay_instruct", "instruct/roleplay_instruct.json.gz", 0.04, 0.025, instruction)
    add("codegen_instruct", "instruct/codegen_instruct.json.gz", 0.015, 0.01, instruction)
    add(
        "t0_multitask",
        "instruct/t0_multitask.jsonl.gz",
        0.06,
        0.04,
        lambda row: [answered(instruction_prompt(row["prompt"]), row["completion"])],
    )
    for name, share in (("boolq", 0.008), ("openbookqa", 0.012), ("arc-easy", 0.01)):
        add(f"{name}_train", f"commonsense/{name}_train.json.gz", share, share / 2, instruction)
    add("sgd_dev_sample", "dialogue/sgd_dev_sample.jsonl.gz", 0.01, 0.008, dialogue)
    add(
        "e2e_devset",
        "generate/e2e_devset.csv.gz",
        0.012,
        0.008,
        lambda row: [answered(instruction_prompt("Describe the restaurant.", row["mr"]), row["ref"])],
    )
    return sources


def load_sources(data: Path, prose: bool = False) -> list[Source]:
    """All training sources; prompts which contain a held-out text are dropped.

    With ``prose`` the running text alone, of files that are no task set.
    """
    if prose:
        return [
            source for source in load_prose(data) if all(file.startswith("text/") for file in source.files)
        ]
    held_out = HeldOut.load(data)
    prompts = load_prompts(data)
    for source in prompts:
        kept = [doc for doc in source.documents if not held_out.matches(doc)]
        source.dropped = len(source.documents) - len(kept)
        source.documents = kept
    return [source for source in load_prose(data) + prompts if source.documents]


# ----------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------


@dataclass
class EncodedSource:
    """Token ids and loss weights of a source, and the position of its endless shuffled walk."""

    name: str
    tokens: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    seed: int
    piece: int
    epoch: int = -1
    cursor: int = 0
    units: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def shuffle(self, epoch: int) -> None:
        """Lay out an epoch: whole documents, long ones cut at a new phase each time, in random order."""
        rng = np.random.default_rng([self.seed, epoch])
        units: list[tuple[int, int]] = []
        for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            at = start
            if end - start > self.piece:
                cut = start + int(rng.integers(self.piece // 4, self.piece))
                while cut < end:
                    units.append((at, cut))
                    at, cut = cut, cut + self.piece
            units.append((at, end))
        self.units = np.asarray(units, np.int64)[rng.permutation(len(units))]
        self.epoch, self.cursor = epoch, 0

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """The next unit's tokens and loss weights."""
        if self.cursor >= len(self.units):
            self.shuffle(self.epoch + 1)
        start, end = self.units[self.cursor]
        self.cursor += 1
        return self.tokens[start:end], self.weights[start:end]

    @property
    def mean_unit(self) -> float:
        """Average tokens per unit."""
        lengths = np.diff(self.bounds)
        return float(lengths.sum() / np.maximum(1, np.ceil(lengths / self.piece)).sum())


def encode_source(
    source: Source, tokenizer: PreTrainedTokenizerFast, seed: int, piece: int = 1536
) -> EncodedSource:
    """Tokenise a source: each document as BOS, text, EOS, with the answers' loss weights."""
    core = tokenizer.backend_tokenizer
    prompts = core.encode_batch_fast([doc.prompt for doc in source.documents], add_special_tokens=False)
    answers = core.encode_batch_fast([doc.answer for doc in source.documents], add_special_tokens=False)
    tokens: list[int] = []
    weights: list[float] = []
    bounds = [0]
    for doc, prompt, answer in zip(source.documents, prompts, answers, strict=True):
        tokens += [BOS_ID, *prompt.ids, *answer.ids, EOS_ID]
        weights += [1.0] * (1 + len(prompt.ids)) + [doc.answer_weight] * len(answer.ids) + [1.0]
        bounds.append(len(tokens))
    return EncodedSource(
        source.name,
        np.asarray(tokens, np.int16),
        np.asarray(weights, np.float32),
        np.asarray(bounds, np.int64),
        seed,
        piece,
    )


class Sampler:
    """Packs units of weighted sources into one stream and cuts it into training windows; resumable."""

    def __init__(self, sources: list[Source], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.sources = [encode_source(source, tokenizer, seed + i) for i, source in enumerate(sources)]
        self.rng = np.random.default_rng(seed)
        self.probabilities = []
        for shares in ([s.share for s in sources], [s.decay_share for s in sources]):
            rates = np.asarray(shares) / np.asarray([encoded.mean_unit for encoded in self.sources])
            self.probabilities.append(rates / rates.sum())
        self.tokens = np.zeros(0, np.int16)
        self.weights = np.zeros(0, np.float32)

    def batch(self, rows: int, context: int, decay: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and target weights of the next ``rows`` windows."""
        need = rows * context + 1
        tokens, weights, size = [self.tokens], [self.weights], len(self.tokens)
        while size < need:
            source = self.sources[self.rng.choice(len(self.sources), p=self.probabilities[int(decay)])]
            unit, unit_weights = source.take()
            tokens.append(unit)
            weights.append(unit_weights)
            size += len(unit)
        stream, stream_weights = np.concatenate(tokens), np.concatenate(weights)
        self.tokens, self.weights = stream[need - 1 :], stream_weights[need - 1 :]
        ids = torch.from_numpy(stream[:need].astype(np.int64))
        target_weights = torch.from_numpy(stream_weights[1:need].copy())
        shape = (rows, context)
        return ids[:-1].view(shape), ids[1:].view(shape), target_weights.view(shape)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue the stream, as JSON values."""
        return {
            "rng": self.rng.bit_generator.state,
            "walks": {source.name: [source.epoch, source.cursor] for source in self.sources},
            "tokens": self.tokens.tolist(),
            "weights": self.weights.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.rng.bit_generator.state = state["rng"]
        for source in self.sources:
            epoch, cursor = state["walks"][source.name]
            if epoch >= 0:
                source.shuffle(epoch)
                source.cursor = cursor
        self.tokens = np.asarray(state["tokens"], np.int16)
        self.weights = np.asarray(state["weights"], np.float32)


# ----------------------------------------------------------------------------------------------------
# Model and optimizer
# ----------------------------------------------------------------------------------------------------


def model_config() -> LlamaConfig:
    """The architecture: a plain Llama, 5.4 million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; the projections that write to the residual stream start at zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps; one batch per matrix shape."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonalise(cls, update: torch.Tensor, steps: int = 5) -> torch.Tensor:
        """An approximation of the nearest (semi-)orthogonal matrix for each matrix of the batch."""
        a, b, c = cls.COEFFICIENTS
        x = update.bfloat16()
        tall = x.size(-2) > x.size(-1)
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all matrices which have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = collections.defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                grads = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = self.orthogonalise(torch.stack(nesterov)) * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"])


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(hidden, lr=args.muon_lr, momentum=0.95, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=True),
    ]


def lr_scale(step: int, progress: float, warmup: int, decay: float) -> float:
    """Warm-up, constant, and a linear decay to zero over the last ``decay`` part of the token budget."""
    return min((step + 1) / warmup, 1.0, max(1.0 - progress, 0.0) / decay)


# ----------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Write weights, moments and state to one safetensors file, which replaces the old one atomically."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optims:
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optim.{key}.{names[parameter]}"] = value
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata={"state": json.dumps(state)})
    os.replace(beside, path)


def load_checkpoint(
    path: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer] | None = None
) -> dict[str, Any]:
    """Read a checkpoint into the model, and into the optimizers when given; returns the saved state."""
    parameters = dict(model.named_parameters())
    owners = {p: opt for opt in optims or () for group in opt.param_groups for p in group["params"]}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, rest = key.split(".", 1)
            if kind == "model":
                with torch.no_grad():
                    parameters[rest].copy_(file.get_tensor(key))
            elif optims:
                moment, name = rest.split(".", 1)
                owners[parameters[name]].state[parameters[name]][moment] = file.get_tensor(key)
        return json.loads(file.metadata()["state"])


# ----------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Train until the token budget is spent or a signal asks to stop."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    sources = load_sources(args.data, args.prose)
    sampler = Sampler(sources, tokenizer, args.seed)
    for source, encoded in zip(sources, sampler.sources, strict=True):
        print(
            f"{source.name:32s} {len(source.documents):6d} documents {source.raw_bytes:9d} bytes "
            f"{len(encoded.tokens):8d} tokens, share {source.share:.3f} -> {source.decay_share:.3f}, "
            f"{source.dropped} dropped",
            flush=True,
        )

    model = new_model(args.seed).to(device)
    model.config.use_cache = False
    optims = optimizers(model, args)
    checkpoint = args.work / "checkpoint.safetensors"
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "runs": []}
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, optims)
        sampler.restore(state.pop("sampler"))
        print(f"resumed at step {state['step']}, {state['tokens']} tokens", flush=True)
    options = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | bool)}
    state["runs"].append({"from_step": state["step"], **options})

    def loss_of(ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=ids).logits
        losses = F.cross_entropy(logits.float().view(-1, VOCAB_SIZE), targets.view(-1), reduction="none")
        return (losses * weights.view(-1)).sum() / weights.sum()

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stop.append(received))

    def checkpoint_now() -> None:
        state["seconds"] = earlier + time.monotonic() - started
        save_checkpoint(checkpoint, model, optims, {**state, "sampler": sampler.state()})

    earlier, started = state["seconds"], time.monotonic()
    tick, tick_tokens, recent = started, state["tokens"], []
    while state["tokens"] < args.tokens and not stop and state["step"] != args.max_steps:
        progress = state["tokens"] / args.tokens
        decaying = progress >= 1 - args.decay
        context = args.long_context if decaying else args.context
        batch = sampler.batch(args.batch_tokens // context, context, decaying)
        scale = lr_scale(state["step"], progress, args.warmup, args.decay)
        loss = step_loss(*(tensor.to(device) for tensor in batch))
        loss.backward()
        for optimizer in optims:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        state["step"] += 1
        state["tokens"] += batch[0].numel()
        if state["step"] % args.log_every == 0:
            now = time.monotonic()
            speed = (state["tokens"] - tick_tokens) / (now - tick)
            left = (args.tokens - state["tokens"]) / speed / 60
            print(
                f"step {state['step']:6d} | {state['tokens'] / 1e6:7.2f}M tokens | context {context} | "
                f"loss {sum(recent) / len(recent):.4f} | lr x{scale:.3f} | {speed:6.0f} tok/s | "
                f"ETA {left:5.1f} min",
                flush=True,
            )
            tick, tick_tokens, recent = now, state["tokens"], []
        if state["step"] % args.save_every == 0:
            checkpoint_now()
    checkpoint_now()
    print(
        f"{'stopped' if stop else 'finished'} at step {state['step']}, {state['tokens']} tokens", flush=True
    )


# ----------------------------------------------------------------------------------------------------
# Export
# ----------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint's model as a folder which ``from_pretrained`` reads, weights in fp16."""
    model = new_model(0)
    state = load_checkpoint(args.work / "checkpoint.safetensors", model)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    AutoTokenizer.from_pretrained(args.work / "tokenizer").save_pretrained(args.out)
    tokenizer_config = args.out / "tokenizer_config.json"
    options = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    options = {key: value for key, value in options.items() if "local" not in key and key != "backend"}
    options["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name which every transformers release knows
    tokenizer_config.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    readme = args.out / "README.md"
    if not readme.exists():
        readme.write_text(
            "# peftx tiny\n\nRun the `card` command of the pre-training script.\n", encoding="utf-8"
        )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        json.dumps(
            {"step": state["step"], "tokens": state["tokens"], "parameters": parameters, "bytes": size}
        )
    )


# ----------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------


def load_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The exported model in fp32, ready to evaluate, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def text_nats(model: LlamaForCausalLM, ids: list[int], context: int, rows: int = 8) -> float:
    """Total negative log-likelihood of ``ids[1:]``; windows overlap by half, each token is scored once."""
    stride = context // 2
    starts = list(range(0, max(len(ids) - 1 - stride, 1), stride))
    total = 0.0
    for at in range(0, len(starts), rows):
        windows = [(start, ids[start : start + context + 1]) for start in starts[at : at + rows]]
        width = max(len(window) for _, window in windows)
        batch = torch.full((len(windows), width), PAD_ID)
        scored = torch.zeros((len(windows), width - 1), dtype=torch.bool)
        for row, (start, window) in enumerate(windows):
            batch[row, : len(window)] = torch.tensor(window)
            scored[row, (0 if start == 0 else context - stride) : len(window) - 1] = True
        logits = model(input_ids=batch[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        total += losses.double().view_as(scored)[scored].sum().item()
    return total


def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int
) -> dict[str, float | int]:
    """Bits per UTF-8 byte and perplexity per token of one raw text."""
    ids = tokenizer(text)["input_ids"]
    nats = text_nats(model, ids, context)
    size = len(text.encode())
    return {
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "token_perplexity": round(math.exp(nats / (len(ids) - 1)), 3),
        "tokens": len(ids) - 1,
        "bytes": size,
    }


@torch.inference_mode()
def choose_labels(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    labels: list[str],
    rows: int = 32,
) -> list[str]:
    """For each prompt the label whose tokens, ended by a document end, are the most likely to follow."""
    endings = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"] + [EOS_ID] for label in labels]
    encoded = tokenizer(prompts)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    chosen = [""] * len(prompts)
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        scores = torch.zeros(len(part), len(labels))
        for column, ending in enumerate(endings):
            sequences = [encoded[i] + ending for i in part]
            batch = torch.full((len(part), max(map(len, sequences))), PAD_ID)
            for row, sequence in enumerate(sequences):
                batch[row, : len(sequence)] = torch.tensor(sequence)
            hidden = model.model(input_ids=batch).last_hidden_state
            ends = torch.tensor([len(sequence) for sequence in sequences])
            places = ends[:, None] - 1 - len(ending) + torch.arange(len(ending))
            states = hidden[torch.arange(len(part))[:, None], places]
            logs = model.lm_head(states).log_softmax(-1)
            scores[:, column] = logs.gather(-1, torch.tensor(ending).expand(len(part), -1)[..., None]).sum(
                (1, 2)
            )
        for row, best in zip(part, scores.argmax(1).tolist(), strict=True):
            chosen[row] = labels[best]
    return chosen


def classification_sets(data: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Prompts and labels of the held-out classification rows."""
    intents = read_rows(data, "classify/snips_validate.jsonl.gz")
    news = read_rows(data, "classify/ag_news_test.jsonl.gz")[AG_NEWS_TRAIN_ROWS:]
    reviews = read_rows(data, "classify/sentence_polarity.jsonl.gz")[POLARITY_TRAIN_ROWS:]
    return {
        "snips_intent": ([intent_prompt(row["text"]) for row in intents], [row["intent"] for row in intents]),
        "ag_news_topic": ([news_prompt(row["text"]) for row in news], [row["label"] for row in news]),
        "sentence_polarity": (
            [polarity_prompt(row["text"]) for row in reviews],
            [r["label"] for r in reviews],
        ),
    }


def evaluate_model(data: Path, folder: Path, context: int, quick: bool = False) -> dict[str, Any]:
    """All held-out figures of an exported model; ``quick`` takes a part of every set."""
    model, tokenizer = load_model(folder)
    wiki = read_text(data, WIKITEXT_TEST)
    questions = read_rows(data, "math/gsm8k_test.jsonl.gz")
    solved = [
        f"{question_prompt(row['question'])} {re.sub(r'<<[^>]*>>', '', row['answer'])}" for row in questions
    ]
    if quick:
        wiki, solved = wiki[:120_000], solved[:100]
    report: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context": context,
        "wikitext2_test": bits_per_byte(model, tokenizer, wiki, context),
        "gsm8k_test": bits_per_byte(model, tokenizer, "\n\n".join(solved), context),
    }
    for name, (prompts, labels) in classification_sets(data).items():
        if quick:
            prompts, labels = prompts[:200], labels[:200]
        chosen = choose_labels(model, tokenizer, prompts, sorted(set(labels)))
        right = sum(a == b for a, b in zip(chosen, labels, strict=True))
        report[name] = {"accuracy": round(right / len(labels), 4), "rows": len(labels)}
    return report


def evaluate(args: argparse.Namespace) -> None:
    """Print the held-out figures as JSON."""
    torch.set_num_threads(args.threads)
    print(json.dumps(evaluate_model(args.data, args.model, args.context, args.quick), indent=2))


# ----------------------------------------------------------------------------------------------------
# Model card
# ----------------------------------------------------------------------------------------------------

SAMPLE_PROMPTS = (
    "",
    " \n = Battle of",
    "The Prime Minister has",
    "The game was released in",
    "Review: a warm , funny film that",
    "News: Oil prices rose on Tuesday as",
    "Utterance: Play some jazz from 1959\nIntent:",
    "Question: Tom has 3 boxes with 4 apples each. How many apples does he have?\nAnswer:",
    "Instruction: Give three tips for staying healthy.\nResponse:",
    "User: I want to book a table for two.\nSystem:",
)


def samples(folder: Path) -> list[tuple[str, str]]:
    """Prompt and continuation pairs, sampled with fixed seeds."""
    model, tokenizer = load_model(folder)
    pairs = []
    for seed, prompt in enumerate(SAMPLE_PROMPTS):
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            top_k=0,
            max_new_tokens=60,
        )
        new = out[0, inputs["input_ids"].shape[1] :]
        pairs.append((prompt, tokenizer.decode(new, skip_special_tokens=True)))
    return pairs


CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny]
---

# peftx tiny

A Llama of {parameters:,} parameters which comes with peftx, so that examples, tests and benchmarks run on
a real pre-trained language model without a download. It was trained from scratch with
`tools/pretrain_tiny.py`. It is small: it knows spelling, grammar and some phrases, and a few labelled
tasks, but hardly any facts.

## Architecture

Plain `LlamaForCausalLM`: hidden size {hidden}, {layers} layers, {heads} heads of {head_dim} ({kv_heads}
key/value heads), feed-forward {ffn}, tied embeddings, RoPE theta 10000, stored in fp16. Positions up to
1024 are allowed; training used windows of {context} and then {long_context} tokens, so expect worse
results beyond {long_context}. The tokenizer is a byte-level BPE of {vocab} entries which puts `<|bos|>`
(0) in front; `<|eos|>` (1) ends a document and `<|pad|>` (2) pads.

## Training

{steps:,} steps, {tokens:,} tokens, {hours:.2f} hours of wall time on {device}. Options of the last run:

| option | value |
|---|---|
{options}

Hidden matrices are updated by Muon, the embedding and the norms by AdamW. The rate warms up, stays
constant, and falls linearly to zero over the last {decay:.0%} of the budget, during which the windows are
longer and the share of WikiText-style text is higher. The tokens of class labels weigh {label_weight:g}
times in the loss.

### Data

Documents are packed as `<|bos|>` text `<|eos|>`. Sources marked "WikiText style" are the plain documents
re-written in WikiText's tokenised layout (spaced punctuation, `@-@`, `@,@`, `@.@`, rare words as
`<unk>`). Blocks of prose with coarse words, and prompts which contain the beginning of a held-out text
(the math and commonsense test sets count as held out too), were left out. That removes all of
`instruct/math_data`, whose questions are those of the math test sets.

| source | file | bytes | share | share in decay | licence |
|---|---|---:|---:|---:|---|
{data_table}

Never trained on: the WikiText-2 test split, the GSM8K test split, the SNIPS validation split, the AG News
rows from index {news_rows} on, and the sentence polarity rows from index {polarity_rows} on.

### Prompt formats

One fixed format per task:

```text
Review: {{text}}\\nSentiment: {{positive|negative}}
News: {{text}}\\nTopic: {{World|Sports|Business|Sci/Tech}}
Utterance: {{text}}\\nIntent: {{AddToPlaylist|BookRestaurant|GetWeather|PlayMusic|RateBook|\
SearchCreativeWork|SearchScreeningEvent}}
Utterance: {{text}}\\nSlots: {{name = value; name = value}}
Premise: {{premise}}\\nHypothesis: {{hypothesis}}\\nEntailment: {{yes|no}}
Instruction: {{instruction}}\\nInput: {{input}}\\nResponse: {{response}}    (no Input line when it is empty)
Question: {{question}}\\nAnswer: {{answer}}
User: {{text}}\\nSystem: {{text}}\\n...
```

## Held-out figures

Computed by the `evaluate` command with windows of {eval_context} tokens which overlap by half.

| set | figure |
|---|---:|
{figures}

## Limits

English only. The model repeats what its small corpus says: texts of presidents, Australian radio news,
stubs of Wikipedia, film reviews and synthetic instructions, with the biases of those texts. It cannot do
arithmetic reliably, its factual statements are mostly invented, and it must not be used to inform anyone.
Some sources allow research use only; see the table.

## Samples

Unedited, temperature 0.8, top-p 0.95, 60 tokens, seeds 0 to {last_seed}.

{samples}
"""


def card(args: argparse.Namespace) -> None:
    """Write the model card next to the exported weights."""
    torch.set_num_threads(args.threads)
    model = new_model(0)
    state = load_checkpoint(args.work / "checkpoint.safetensors", model)
    config, run = model.config, state["runs"][-1]
    if run.get("prose"):
        sys.exit("the card tells of the bundled model, and this one was trained with --prose: write another")
    licences = {
        entry["file"]: entry["licence"] for entry in json.loads((args.data / "MANIFEST.json").read_text())
    }
    sources = load_sources(args.data)
    total, decay_total = sum(s.share for s in sources), sum(s.decay_share for s in sources)
    data_table = "\n".join(
        f"| {s.name} | {', '.join(s.files)} | {s.raw_bytes:,} | {s.share / total:.1%} | "
        f"{s.decay_share / decay_total:.1%} | {', '.join(licences[file] for file in s.files)} |"
        for s in sources
    )
    report = evaluate_model(args.data, args.model, args.context)
    figures = []
    for name in ("wikitext2_test", "gsm8k_test"):
        figures.append(f"| {name}, bits per byte | {report[name]['bits_per_byte']:.3f} |")
        figures.append(f"| {name}, perplexity per token | {report[name]['token_perplexity']:.2f} |")
    for name in ("snips_intent", "ag_news_topic", "sentence_polarity"):
        figures.append(
            f"| {name}, zero-shot accuracy ({report[name]['rows']} rows) | {report[name]['accuracy']:.1%} |"
        )
    hidden_options = {"command", "from_step", "device", "max_steps", "log_every", "save_every"}
    options = "\n".join(f"| {key} | {value} |" for key, value in run.items() if key not in hidden_options)
    shown = "\n\n".join(
        f"Prompt: `{json.dumps(prompt, ensure_ascii=False)}`\n\n```text\n{text}\n```"
        for prompt, text in samples(args.model)
    )
    text = CARD.format(
        parameters=report["parameters"],
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        context=run["context"],
        long_context=run["long_context"],
        steps=state["step"],
        tokens=state["tokens"],
        hours=state["seconds"] / 3600,
        device=f"{run['device']}, {run['threads']} threads",
        options=options,
        decay=run["decay"],
        label_weight=LABEL_LOSS_WEIGHT,
        data_table=data_table,
        news_rows=AG_NEWS_TRAIN_ROWS,
        polarity_rows=POLARITY_TRAIN_ROWS,
        eval_context=args.context,
        figures="\n".join(figures),
        last_seed=len(SAMPLE_PROMPTS) - 1,
        samples=shown,
    )
    (args.model / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(report))


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------


def learn_tokenizer(args: argparse.Namespace) -> None:
    """Learn the vocabulary and save it under the working folder."""
    sources = load_sources(args.data, args.prose)
    tokenizer = build_tokenizer(sources, args.work / "tokenizer")
    wiki = read_text(args.data, "text/wikitext2_valid.txt.gz")
    size = len(wiki.encode()) / len(tokenizer(wiki)["input_ids"])
    print(json.dumps({"vocabulary": len(tokenizer), "wikitext_bytes_per_token": round(size, 3)}))


def count(text: str) -> int:
    """A number of tokens, with an optional K or M behind it."""
    factor = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    return int(float(text.rstrip("kKmM")) * factor)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], *folders: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        texts = {
            "data": "folder of gzip files with MANIFEST.json",
            "work": "folder of tokenizer and checkpoint",
            "model": "exported model folder",
            "out": "folder to write the exported model to",
        }
        for folder in folders:
            sub.add_argument(f"--{folder}", type=Path, required=True, help=texts[folder])
        return sub

    learning = command("tokenizer", learn_tokenizer, "data", "work")
    sub = training = command("train", train, "data", "work")
    sub.add_argument("--tokens", type=count, default=count("40M"), help="token budget; may change on resume")
    sub.add_argument("--batch-tokens", type=count, default=4096, help="tokens per step")
    sub.add_argument("--context", type=int, default=256, help="window length before the decay")
    sub.add_argument("--long-context", type=int, default=512, help="window length during the decay")
    sub.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of the hidden matrices")
    sub.add_argument("--adam-lr", type=float, default=0.003, help="peak rate of embedding and norms")
    sub.add_argument(
        "--weight-decay", type=float, default=0.05, help="decoupled decay of the hidden matrices"
    )
    sub.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    sub.add_argument("--decay", type=float, default=0.3, help="part of the budget with a falling rate")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    sub.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    sub.add_argument("--device", default="cpu", help="torch device")
    sub.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    sub.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    sub.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    sub.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    sub.add_argument("--max-steps", type=int, default=-1, help="stop at this step; -1 for never")
    command("export", export, "work", "out")
    sub = command("evaluate", evaluate, "data", "model")
    sub.add_argument("--quick", action="store_true", help="only a part of every set")
    second = command("card", card, "data", "work", "model")
    for one in (learning, training):
        one.add_argument("--prose", action="store_true", help="running text alone: no row of a task set")
    for one in (sub, second):
        one.add_argument("--context", type=int, default=512, help="window length of the bits per byte")
        one.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command."""
    args = parser().parse_args(argv)
    with contextlib.suppress(BrokenPipeError):
        args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
