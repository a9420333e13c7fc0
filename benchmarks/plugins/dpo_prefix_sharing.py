"""Time and peak memory of a DPO step: one row with a shared prompt against two rows, over prompt lengths.

    python benchmarks/plugins/dpo_prefix_sharing.py hh_harmless_base_test.jsonl.gz

The data: rows with `chosen` and `rejected`, dialogues that differ in the assistant's last turn. In the first table
a prompt is cut at its left to exactly P tokens (earlier dialogues stand in front where it is shorter), an answer at its
right to `--answer`, so that nothing is padded. In the second the dialogues stay as they are, if their row has at most
`--max-length` tokens, and one pass over them is trained in two rows, in one, and packed. LoRA of rank 8 on the bundled
model, one thread. Seconds are CPU time, the least of rounds; memory is the most that tensors took at once over what was
there before. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.profiler import ProfilerActivity, profile

from peftx import Stack, TrainingData
from peftx.engines.data import IGNORE, Collator, read_dataset, text_ids
from peftx.toolkits.evaluation import evaluating
from peftx_dpo_prefix_sharing import DpoPrefixSharing, join
from peftx_lora import Lora

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import interleaved

TURN = "\n\nAssistant:"
Ids = tuple[list[int], ...]  # prompt, chosen, rejected


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Prompt, chosen, rejected: what both dialogues share up to their last turn is the prompt."""
    pairs = []
    for row in read_dataset(path, format="text", columns={"text": "chosen"}):
        chosen, rejected = row["text"], row["rejected"]
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        at = chosen.rfind(TURN, 0, same) + len(TURN) if same is not None else 0
        pair = {"prompt": chosen[:at], "chosen": chosen[at:].strip(), "rejected": rejected[at:].strip()}
        if at >= len(TURN) and all(pair.values()) and TURN not in pair["chosen"] + pair["rejected"]:
            pairs.append(pair)
    return pairs


def cut_to(tokenizer: Any, pairs: list[dict[str, str]], prompt: int, answer: int, count: int) -> list[Ids]:
    """Triples of ids with exactly so many tokens; BOS is one of the prompt's."""
    triples, history = [], ""
    for pair in pairs:
        history += pair["prompt"]
        ids = text_ids(tokenizer, history)[-prompt + 1 :]
        answers = [text_ids(tokenizer, " " + pair[name])[:answer] for name in ("chosen", "rejected")]
        if len(ids) == prompt - 1 and all(len(found) == answer for found in answers):
            triples.append(([tokenizer.bos_token_id, *ids], *answers))
            history = ""
        if len(triples) == count:
            break
    return triples


def two_row_step(stack: Stack, ids: Tensor, mask: Tensor, labels: Tensor, beta: float = 0.1) -> Tensor:
    """The usual step: chosen in the first half of the batch, rejected in the second; gradients are left in `.grad`."""

    def sums() -> Tensor:
        kept = labels[:, 1:] != IGNORE
        logits = stack.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][kept]
        scores = -cross_entropy(logits.float(), labels[:, 1:][kept], reduction="none")
        return scores.new_zeros(len(ids)).index_add(0, kept.nonzero()[:, 0], scores)

    with stack.disabled("lora"), evaluating(stack.model):
        reference = sums()
    ratio = (sums() - reference.clone()).view(2, -1)
    loss = -logsigmoid(beta * (ratio[0] - ratio[1])).mean()
    loss.backward()
    return loss.detach()


def shared_batch(triples: list[Ids]) -> dict[str, Tensor]:
    rows = []
    for triple in triples:
        ids, labels, parts = join(*triple)
        rows.append({"input_ids": ids, "labels": labels, "token_type_ids": [1 + part for part in parts]})
    return Collator(0)(rows)


def two_row_batch(triples: list[Ids]) -> dict[str, Tensor]:
    rows = [
        {"input_ids": [*triple[0], *triple[k]], "labels": [IGNORE] * len(triple[0]) + list(triple[k])}
        for k in (1, 2)
        for triple in triples
    ]
    return Collator(0)(rows)


def peak_megabytes(call: Callable[[], object]) -> float:
    """Most that tensors took at once during the call, over what was there before: the profiler sees each allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def lengths_table(
    stack: Stack, pairs: list[dict[str, str]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    table = []
    for prompt in arguments.prompts:
        triples = cut_to(stack.tokenizer, pairs, prompt, arguments.answer, arguments.batch_size)
        shared, two = shared_batch(triples), two_row_batch(triples)
        calls = {
            "two": lambda two=two: two_row_step(
                stack, two["input_ids"], two["attention_mask"], two["labels"]
            ),
            "shared": lambda shared=shared: stack.train_step(shared),
        }
        losses = {name: float(call()) for name, call in calls.items()}
        seconds = interleaved(calls, rounds=arguments.rounds, warmup=0)
        stack.model.zero_grad()
        memory = {name: peak_megabytes(call) for name, call in calls.items()}
        table.append(
            {
                "prompt": prompt, "tokens_two": two["input_ids"].numel(), "tokens_shared": shared["input_ids"].numel(),
                "seconds_two": round(seconds["two"], 3), "seconds_shared": round(seconds["shared"], 3),
                "time_ratio": round(seconds["two"] / seconds["shared"], 2),
                "megabytes_two": round(memory["two"]), "megabytes_shared": round(memory["shared"]),
                "memory_ratio": round(memory["two"] / memory["shared"], 2),
                "loss_difference": abs(losses["two"] - losses["shared"]),
            }
        )  # fmt: skip
    return table


def epoch(pairs: list[dict[str, str]], arguments: argparse.Namespace) -> dict[str, Any]:
    """One pass over the same dialogues: in two rows, in one, packed. The order of the first two is the same."""
    found: dict[str, Any] = {}
    for name in ("two rows", "one row", "packed"):
        stack = Stack("peftx:tiny", [Lora(rank=8), DpoPrefixSharing(packing=name == "packed")])
        data = TrainingData(
            train=Dataset.from_list(pairs), eval=None, tokenizer=stack.tokenizer, seed=0, format="preference",
            max_length=arguments.max_length,
        )  # fmt: skip
        rows = list(stack.prepare(data).train)
        size = arguments.batch_size * 2 if name != "packed" else 2
        optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-3)
        losses, tokens, started = [], 0, time.process_time()
        for begin in range(0, len(rows), size):
            chunk = rows[begin : begin + size]
            if name == "two rows":
                batch = two_row_batch([apart(row) for row in chunk])
                loss = two_row_step(stack, batch["input_ids"], batch["attention_mask"], batch["labels"])
                optimizer.step()
                optimizer.zero_grad()
            else:
                batch = Collator(0)(chunk)
                loss = stack.train_step(batch, optimizer=optimizer)
            losses.append(float(loss))
            tokens += batch["input_ids"].numel()
        seconds = round(time.process_time() - started, 1)
        found[name] = {"steps": len(losses), "tokens": tokens, "cpu_seconds": seconds, "losses": losses}
    found["largest_loss_difference"] = max(
        abs(a - b) for a, b in zip(found["two rows"]["losses"], found["one row"]["losses"], strict=True)
    )
    for name in ("two rows", "one row", "packed"):
        found[name]["losses"] = [round(loss, 4) for loss in found[name]["losses"]]
    return found


def apart(row: dict[str, list[int]]) -> Ids:
    """Prompt, chosen, rejected of an unpacked row."""
    parts = [code - 1 for code in row["token_type_ids"]]
    c, r = parts.index(1), parts.index(2)
    ids = row["input_ids"]
    return ids[: c + 1], ids[c + 1 : r], ids[r + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--batch-size", type=int, default=2, help="triples in a step of the first table")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=48, help="dialogues of the second table")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a shared row there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    pairs = read_pairs(arguments.data)
    stack = Stack("peftx:tiny", [Lora(rank=8), DpoPrefixSharing()])
    stack.train_step(shared_batch(cut_to(stack.tokenizer, pairs, 64, 16, 1)))  # which notes the reference
    stack.model.zero_grad()
    with torch.no_grad():  # off the start, where every loss is log 2
        for parameter in stack.ledger.parameters("lora"):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    table = lengths_table(stack, pairs, arguments)

    def tokens(pair: dict[str, str]) -> int:
        return sum(len(text_ids(stack.tokenizer, text)) for text in pair.values()) + 8

    short = [pair for pair in pairs[: 10 * arguments.pairs] if tokens(pair) <= arguments.max_length]
    second = epoch(short[: arguments.pairs], arguments)
    print(json.dumps({"dialogues": len(pairs), "lengths": table, "epoch": second}, indent=1))


if __name__ == "__main__":
    main()
