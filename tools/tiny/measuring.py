"""Held-out figures of an exported model: bits per byte and zero-shot accuracy; and samples of what it writes."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny.sources import AG_NEWS_TRAIN_ROWS, POLARITY_TRAIN_ROWS
from tiny.texts import intent_prompt, news_prompt, polarity_prompt, question_prompt, read_rows, read_text
from tiny.tokenizer import EOS_ID, PAD_ID

WIKITEXT_TEST = "text/wikitext2_test.txt.gz"


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
