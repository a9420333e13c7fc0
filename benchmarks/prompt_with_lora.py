"""A soft prompt and a LoRA on one model, trained together, saved and reloaded: in peftx, and nested in HF PEFT.

    python benchmarks/prompt_with_lora.py

On the bundled model. For each way: what trains, the loss before and after, what the saved files hold, and the largest
difference of the logits after loading. PEFT holds one kind of adapter a model, so its two ways are the two nestings:
one freezes and does not save the LoRA, the other drops the prompt without a word.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor

import peftx
from peftx import Stack
from peftx.engines.data import Collator, read_dataset, tokenize_dataset
from peftx.engines.models import asset_path, load_model
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning

STEPS, ROWS, LENGTH, RATE = 20, 8, 8, 5e-3


def batch() -> dict[str, Tensor]:
    rows = read_dataset(asset_path("peftx:sample/train.jsonl"), limit=ROWS)
    tokenized = tokenize_dataset(rows, TOKENIZER, format="prompt-completion", max_length=128)
    return Collator(TOKENIZER.pad_token_id)(list(tokenized))


def saved(folder: Path) -> list[str]:
    """Names of the tensors in a folder's safetensors files, shortened to what tells them apart."""
    kinds: dict[str, int] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                lora = "lora" in name or name.endswith((".A", ".B"))
                kind = "LoRA" if lora else "prompt"
                kinds[kind] = kinds.get(kind, 0) + tensors.get_tensor(name).numel()
    return [f"{kind}: {count:,} numbers" for kind, count in sorted(kinds.items())]


def train(
    parameters: Iterable[torch.nn.Parameter], loss: Callable[[], Tensor], *, steps: int
) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(list(parameters), lr=RATE)
    first = last = 0.0
    for step in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = (float(value) if step == 0 else first), float(value)
    return round(first, 3), round(last, 3)


def ours(folder: Path, *extra: peftx.Plugin) -> dict[str, Any]:
    stack = Stack("peftx:tiny", [PromptTuning(length=LENGTH), Lora(rank=4, targets="attention.q,v"), *extra])
    before = {owner: _copy(stack.ledger.parameters(owner)) for owner in ("prompt-tuning", "lora")}
    rows = list(read_dataset(asset_path("peftx:sample/train.jsonl"), limit=ROWS))
    schedule = {"schedule": "constant"} if extra else {}
    report = stack.train(rows, steps=STEPS, batch_size=ROWS, learning_rate=RATE / (5 if extra else 1), max_length=128,
                         **schedule)  # fmt: skip
    moved = {owner: _moved(before[owner], stack.ledger.parameters(owner)) for owner in before}
    stack.save(folder)
    again = peftx.load(folder)
    difference = _difference(stack.model, again.model)
    return {
        "trains": f"{stack.trainable_parameters():,}", "moved": moved,
        "loss": (round(report.first_loss, 3), round(report.last_loss, 3)),
        "saved": saved(folder), "difference after loading": difference,
    }  # fmt: skip


def _copy(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _moved(before: list[Tensor], after: Iterable[torch.nn.Parameter]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))


@torch.no_grad()
def _difference(one: Any, other: Any) -> float:
    ids = batch()["input_ids"][:2]
    logits = [m.eval()(input_ids=ids).logits for m in (one, other)]
    if logits[0].shape != logits[1].shape:
        return float("inf")
    return float((logits[0] - logits[1]).abs().max())


def peft(folder: Path, first: str, second: str) -> dict[str, Any]:
    """What PEFT's documentation says: `get_peft_model` twice, here with half of the steps after each."""
    configs = {
        "LoRA": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM"),
    }
    base, _ = load_model("peftx:tiny")
    model, inputs = copy.deepcopy(base), batch()
    losses = []
    for kind in (first, second):
        model = get_peft_model(model, configs[kind])
        trained = [p for p in model.parameters() if p.requires_grad]
        losses.append(train(trained, lambda: model(**inputs).loss, steps=STEPS // 2))  # noqa: B023
    trains = {
        kind: sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and mark in n)
        for kind, mark in (("LoRA", "lora_"), ("prompt", "prompt"))
    }
    ids = inputs["input_ids"][:2]
    model.save_pretrained(folder)
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        after = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(input_ids=ids).logits
    same = before.shape == after.shape
    return {
        "trains in the end": trains, "losses": losses, "prompt rows in effect": before.shape[1] - ids.shape[1],
        "saved": saved(folder),
        "difference after loading": round(float((after - before).abs().max()), 3) if same else "other shape",
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's generic ones about nesting; what is lost is in no message
        folder = Path(place)
        results = {
            "peftx: prompt-tuning + lora": ours(folder / "a"),
            "peftx: prompt-tuning + lora + mezo": ours(folder / "b", Mezo()),
            "PEFT: LoRA, then prompt tuning": peft(folder / "c", "LoRA", "prompt"),
            "PEFT: prompt tuning, then LoRA": peft(folder / "d", "prompt", "LoRA"),
        }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    _, TOKENIZER = load_model("peftx:tiny")
    main()
