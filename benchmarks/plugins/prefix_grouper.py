"""Time and peak memory of a GRPO step: a group in one row against a row an answer, over prompt lengths and group sizes.

    python benchmarks/plugins/prefix_grouper.py

Groups of random tokens: a prompt of P and G answers of `--answer` each, so that nothing is padded. LoRA of rank 8 on
the bundled model, one thread; both ways take the reference's probabilities first, without gradients, and the same loss.
Seconds are CPU time, the least of rounds; memory is the most that tensors took at once over what was there before.
Leaves prefix_grouper.json in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dpo_prefix_sharing import peak_megabytes
from torch import Tensor
from torch.nn.functional import cross_entropy

from peftx import Stack
from peftx.engines.files import write_text
from peftx.toolkits.evaluation import evaluating
from peftx_lora import Lora
from peftx_prefix_grouper import PrefixGrouper, advantages, grpo_loss

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import interleaved


def repeated_step(stack: Stack, ids: Tensor, answer: int, A: Tensor) -> Tensor:
    """The usual step on rows [G, P + answer]; gradients are left in `.grad`."""
    config = stack.plugins["prefix-grouper"].config

    def log_probs() -> Tensor:
        logits = stack.model(input_ids=ids, use_cache=False).logits[:, -answer - 1 : -1]
        return -cross_entropy(logits.float().mT, ids[:, -answer:], reduction="none")

    with evaluating(stack.model), stack.disabled("lora"):  # which starts at nothing
        old = log_probs()
    real = torch.ones_like(ids[:, -answer:], dtype=torch.bool)
    loss = grpo_loss(log_probs(), old.clone(), A, real, clip=config.clip, beta=config.beta).mean()
    loss.backward()
    return loss.detach()


def measured(stack: Stack, prompt: int, size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One group, both ways."""
    generator, answer = torch.Generator().manual_seed(0), arguments.answer
    x = torch.randint(5, 1000, (prompt,), generator=generator)
    ys = torch.randint(5, 1000, (size, answer), generator=generator)
    A = torch.tensor(advantages([float(i) for i in range(size)]))
    rows = torch.cat((x.expand(size, -1), ys), 1)
    segments = torch.tensor([1] * prompt + [2 + i for i in range(size) for _ in range(answer)])[None]
    ids = torch.cat((x, ys.flatten()))[None]
    grouped = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "segments": segments}
    grouped["advantages"] = A[None]
    calls = {
        "repeated": lambda: repeated_step(stack, rows, answer, A),
        "grouped": lambda: stack.train_step(grouped),
    }
    gradients = []
    for call in calls.values():  # the loss of a first step is 0 either way
        stack.model.zero_grad()
        call()
        gradients.append(torch.cat([p.grad.flatten() for p in stack.ledger.parameters("lora")]))
    seconds = interleaved(calls, rounds=arguments.rounds, warmup=0)
    memory = {name: peak_megabytes(call) for name, call in calls.items()}
    return {
        "prompt": prompt, "answers": size, "tokens_repeated": rows.numel(), "tokens_grouped": ids.numel(),
        **{f"seconds_{name}": round(value, 3) for name, value in seconds.items()},
        "time_ratio": round(seconds["repeated"] / seconds["grouped"], 2),
        **{f"megabytes_{name}": round(value) for name, value in memory.items()},
        "memory_ratio": round(memory["repeated"] / memory["grouped"], 2),
        "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[0].norm()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 8], help="G, answers of a group")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stack = Stack("peftx:tiny", [Lora(rank=8), PrefixGrouper()])
    stack.model.train()
    grid = [(prompt, size) for size in arguments.answers for prompt in arguments.prompts]
    settings = {"answer": arguments.answer, "rounds": arguments.rounds, "rank": 8, "model": "peftx:tiny"}
    found = {"settings": settings, "groups": [measured(stack, *each, arguments) for each in grid]}
    file = Path(__file__).parents[1] / "results" / "prefix_grouper.json"
    write_text(file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
