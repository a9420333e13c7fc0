"""Hydragen against a plain batch: CPU time of decoding and bytes of keys and values, one thread; JSON to stdout.

A Llama of random weights (4 layers, 8 heads over 4 key-value heads, 3.3M without embeddings), 32 sequences that share
1,000 tokens and go on from 4 of their own. Decoding: the median step of 32, after the prefill. Below 1 Hydragen is
faster or smaller. `attention` is one layer's attention alone, without what the plain cache copies to grow.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from peftx import Generation, Stack
from peftx_hydragen import Hydragen, attend_part, merge

SEQUENCES, PREFIX, OWN, NEW = 32, 1000, 4, 32


def model(prefix: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=prefix + 256,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


class Clock(LogitsProcessor):
    """Notes the CPU time before each new token."""

    def __init__(self) -> None:
        self.times = [time.process_time()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.process_time())
        return scores


def measure(stack: Stack, ids: torch.Tensor) -> tuple[float, float, torch.Tensor, dict[str, float]]:
    """CPU seconds of the prefill and of a decoding step, the text, the statistics."""
    made = Generation(model=stack.model, input_ids=ids, attention_mask=torch.ones_like(ids))
    made.generation_config.update(max_new_tokens=1 + NEW, eos_token_id=None, pad_token_id=0)
    made.logits_processors.append(clock := Clock())
    found = stack.decode(made)
    steps = [after - before for before, after in pairwise(clock.times)]
    return steps[0], median(steps[1:]), found, made.stats


def generation(prefix: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(3, 1024, (1, prefix), generator=generator).expand(SEQUENCES, -1)
    ids = torch.cat([head, torch.randint(3, 1024, (SEQUENCES, OWN), generator=generator)], dim=1)
    plain_prefill, plain_step, plain_text, _ = measure(Stack(model(prefix), []), ids)
    prefill, step, text, stats = measure(Stack(model(prefix), [Hydragen()]), ids)
    return {
        "prefix": prefix,
        "decode_cpu_ratio": round(step / plain_step, 3),
        "prefill_cpu_ratio": round(prefill / plain_prefill, 3),
        "kv_bytes_ratio": round(stats["kv_bytes"] / stats["kv_bytes_plain"], 3),
        "same_text": torch.equal(plain_text, text),
    }


def attention(prefix: int) -> float:
    """One layer: 8 heads of 32 over 4 key-value heads, 32 own columns."""
    query, own = torch.randn(SEQUENCES, 8, 1, 32), torch.randn(SEQUENCES, 4, 32, 32)
    shared = torch.randn(1, 4, prefix, 32)
    whole = torch.cat([shared.expand(SEQUENCES, -1, -1, -1), own], dim=2)

    def plain() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, whole, whole, enable_gqa=True)

    def parts() -> torch.Tensor:
        folded = query.view(SEQUENCES, 4, 2, 32)
        scale = 32**-0.5
        return merge([attend_part(folded, own, own, scale), attend_part(folded, shared, shared, scale)])

    def seconds(run: object) -> float:
        run()
        begin = time.process_time()
        for _ in range(50):
            run()
        return time.process_time() - begin

    assert torch.allclose(parts().view(SEQUENCES, 8, 1, 32), plain(), atol=1e-5)
    return round(seconds(parts) / seconds(plain), 3)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    result = {
        "generation": [generation(prefix) for prefix in (100, PREFIX)],
        "attention_cpu_ratio": {prefix: attention(prefix) for prefix in (100, PREFIX, 4 * PREFIX)},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
