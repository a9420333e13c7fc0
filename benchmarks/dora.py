"""Decoding with DoRA that is not merged, beside the plain model, LoRA and the DoRA of HF PEFT.

    python benchmarks/run.py dora

The model, and how it is measured, are those of `peers.py`: batch 1, greedy, rank 8 on all 56 linear layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from measure import interleaved
from peers import ALL_LINEAR, model

from peftx.stack import Stack
from peftx_dora import Dora
from peftx_lora import Lora

TOKENS = 16


def peer() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR, use_dora=True, task_type="CAUSAL_LM")
    return get_peft_model(model(), config).eval()


@torch.inference_mode()
def decode(m: Any) -> None:
    ids = torch.arange(8)[None]
    m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
               do_sample=False, pad_token_id=0)  # fmt: skip


def run(quick: bool = False) -> dict[str, dict[str, Any]]:
    """Each as a ratio to the base; the promise is DoRA's."""
    torch.set_num_threads(1)
    models = {
        "base": model(),
        "LoRA": Stack(model(), [Lora(rank=8, targets="all")]).model,
        "DoRA": Stack(model(), [Dora(rank=8, targets="all")]).model,
        "DoRA of PEFT": peer(),
    }
    times = interleaved({name: partial(decode, m) for name, m in models.items()}, rounds=5 if quick else 15)
    limits = {"LoRA": 1.08, "DoRA": 1.4, "DoRA of PEFT": None}
    return {
        f"decode, batch 1, {name}": {
            "ms_per_token": times[name] / TOKENS * 1000,
            "ratio": times[name] / times["base"],
            "limit": limit,
            "peer": "the base model",
        }
        for name, limit in limits.items()
    }
