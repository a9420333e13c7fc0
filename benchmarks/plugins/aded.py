"""ADED against plain decoding on the bundled model: tokens per forward and CPU time, one thread; JSON to stdout.

In domain: prompts of the sample's held-out file, table counted from its training file. Sampled: temperature 1, where
the text does not run in circles. Repetitive: a list with one refrain, no corpus. Up to 100 new tokens, or the end of
the text. The ratio of CPU times is ADED's over plain decoding's; below 1 ADED is faster.
"""

from __future__ import annotations

import json
import time

import torch

from peftx import Generation, Stack
from peftx.engines.data import read_dataset
from peftx.engines.models import asset_path
from peftx_aded import Aded

NEW = 100


def request(stack: Stack, prompt: str, **options: object) -> Generation:
    ids = torch.tensor([stack.tokenizer(prompt)["input_ids"]])
    made = Generation(model=stack.model, input_ids=ids, attention_mask=torch.ones_like(ids), seed=0)
    made.generation_config.update(max_new_tokens=NEW, **options)
    return made


def measure(plugin: Aded, prompts: list[str], **options: object) -> dict[str, object]:
    stack = Stack("peftx:tiny", [plugin])
    stats: dict[str, float] = {}
    seconds = {"plain": 0.0, "aded": 0.0}
    same = True
    for prompt in prompts:
        with torch.no_grad():
            begin = time.process_time()
            plain = request(stack, prompt, **options).run_default()
            seconds["plain"] += time.process_time() - begin
        drafted = request(stack, prompt, **options)
        begin = time.process_time()
        ids = stack.decode(drafted)
        seconds["aded"] += time.process_time() - begin
        same = same and torch.equal(ids, plain)
        for name, value in drafted.stats.items():
            stats[name] = stats.get(name, 0.0) + value
    return {
        "tokens_per_call": round(stats["new_tokens"] / stats["model_calls"], 2),
        "draft_tokens_per_call": round(stats["draft_tokens"] / stats["model_calls"], 1),
        "cpu_ratio": round(seconds["aded"] / seconds["plain"], 2),
        "same_text": same,
    }


def search_ratio() -> float:
    """CPU time of one draft from a dense table (12 successors each) over that of one cached forward of one token."""
    from peftx_aded import AdedConfig, TrigramDrafter, TrigramTable

    stack = Stack("peftx:tiny", [])
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 40, (60_000,), generator=generator)
    config = AdedConfig(corpus="counted here", increment=0)  # the table stays as it is
    drafter = TrigramDrafter(TrigramTable.count([text.tolist()], 12), config)
    spans = [text[i : i + 40] for i in range(200)]
    for span in spans:  # fills the table's cache of rows
        drafter.propose(span, 8)
    begin = time.process_time()
    for span in spans:
        drafter.propose(span, 8)
    draft = (time.process_time() - begin) / len(spans)
    with torch.no_grad():
        cache = stack.model(text[None, :100], use_cache=True).past_key_values
        begin = time.process_time()
        for i in range(50):
            stack.model(text[None, i : i + 1], past_key_values=cache)
        forward = (time.process_time() - begin) / 50
    return draft / forward


def main() -> None:
    torch.set_num_threads(1)
    prompts = read_dataset(asset_path("peftx:sample/held_out.jsonl"))["prompt"][:12]
    refrain = "\n".join(
        f"Day {day}. The lamp was lit at dusk and the lamp was out at dawn." for day in range(1, 7)
    )
    result = {
        "in_domain": measure(Aded(corpus="peftx:sample/train.jsonl"), list(prompts)),
        "in_domain_no_corpus": measure(Aded(), list(prompts)),
        "in_domain_sampled": measure(
            Aded(corpus="peftx:sample/train.jsonl"), list(prompts), do_sample=True, temperature=1.0
        ),
        "repetitive": measure(Aded(), [refrain + "\nDay"]),
        "draft_over_forward": round(search_ratio(), 2),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
