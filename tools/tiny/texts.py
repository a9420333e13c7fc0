"""Reading the data, the fixed prompts, and prose as it is and in WikiText's style."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any


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
