"""The training documents by source, each source's share of the tokens, and what is held out of them."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tiny.texts import (
    entailment_prompt,
    instruction_prompt,
    intent_prompt,
    mask_rare_words,
    merge_blocks,
    news_prompt,
    normalised,
    polarity_prompt,
    prose_blocks,
    question_prompt,
    read_rows,
    read_text,
    tidy_news,
    wiki_articles,
    wiki_style,
)

AG_NEWS_TRAIN_ROWS = 6000
POLARITY_TRAIN_ROWS = 9000
LABEL_LOSS_WEIGHT = 10.0


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
