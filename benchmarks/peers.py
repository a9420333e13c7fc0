"""peftx beside HF PEFT in one process: injection, decoding, loading, a training step, saved activations; and the shape
of a 70-billion-parameter Llama on the meta device.

    python benchmarks/run.py peers

The model is a random Llama of 29.5 million parameters (hidden 512, 8 layers), float32; LoRA of rank 8 on its 56 linear
layers. All figures are CPU time on one thread, as a ratio to the peer measured in the same rounds.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, peak_megabytes
from transformers import LlamaConfig, LlamaForCausalLM

import peftx
from peftx.stack import Stack
from peftx_lora import Lora

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=4096, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def peft_config(dropout: float = 0.0) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=8, lora_alpha=16, target_modules=ALL_LINEAR, lora_dropout=dropout, task_type="CAUSAL_LM"
    )


def peft_model(base: LlamaForCausalLM, dropout: float = 0.0) -> Any:
    from peft import get_peft_model

    return get_peft_model(base, peft_config(dropout))


def inject(rounds: int) -> dict[str, Any]:
    """From a loaded model to one that trains."""
    bases = {name: [model() for _ in range(rounds + 1)] for name in ("peftx", "peft")}
    times = interleaved(
        {
            "peftx": lambda: Stack(bases["peftx"].pop(), [Lora(rank=8, targets="all")]),
            "peft": lambda: peft_model(bases["peft"].pop()),
        },
        rounds=rounds,
    )
    return {
        "ms": _ms(times),
        "ratio": times["peftx"] / times["peft"],
        "limit": 0.15,
        "peer": "get_peft_model",
    }


def decode(rounds: int, tokens: int = 16) -> dict[str, Any]:
    """Batch-1 greedy decoding with an adapter that is not merged, against the plain model."""
    ids = torch.arange(8)[None]
    base, adapted, peer = model(), Stack(model(), [Lora(rank=8, targets="all")]).model, peft_model(model())

    def run(m: Any) -> Any:
        with torch.inference_mode():
            return m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                              min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip

    times = interleaved(
        {"base": lambda: run(base), "peftx": lambda: run(adapted), "peft": lambda: run(peer)}, rounds=rounds
    )
    return {
        "ms_per_token": {k: v / tokens * 1000 for k, v in times.items()},
        "ratio": times["peftx"] / times["base"],
        "limit": 1.08,
        "peft_ratio": times["peft"] / times["base"],
        "peer": "the base model",
    }


def load(rounds: int) -> dict[str, Any]:
    """A saved adapter onto a base in memory, all hashes checked and the plugin found by its entry point, against
    PeftModel.from_pretrained."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(model(), [Lora(rank=8, targets="all")])
        stack.save(Path(folder) / "peftx")
        peft_model(model()).save_pretrained(Path(folder) / "peft")
        bases = {name: [model() for _ in range(rounds + 1)] for name in ("peftx", "peft")}
        times = interleaved(
            {
                "peftx": lambda: peftx.load(Path(folder) / "peftx", model=bases["peftx"].pop()),
                "peft": lambda: PeftModel.from_pretrained(bases["peft"].pop(), Path(folder) / "peft"),
            },
            rounds=rounds,
        )
    return {
        "ms": _ms(times), "ratio": times["peftx"] / times["peft"], "limit": 0.2, "peer": "PeftModel.from_pretrained",
    }  # fmt: skip


class HandWritten(torch.nn.Module):
    """y = W x + s B A x by `addmm`: what one writes who needs LoRA alone."""

    def __init__(self, base: torch.nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        down = x.reshape(-1, x.shape[-1]) @ self.A.T
        return torch.addmm(y.reshape(-1, y.shape[-1]), down, self.B.T, alpha=self.scale).view_as(y)


def by_hand() -> LlamaForCausalLM:
    base = model().requires_grad_(False)
    for name, module in list(base.named_modules()):
        if name.rpartition(".")[2] in ALL_LINEAR:
            base.set_submodule(name, HandWritten(module))
    return base


def _steppers(dropout: float) -> dict[str, tuple[torch.nn.Module, Callable[[], None]]]:
    ids = torch.randint(0, 4096, (2, 128), generator=torch.Generator().manual_seed(0))
    stack = Stack(model(), [Lora(rank=8, targets="all", dropout=dropout)])
    stack.model.train()
    peer = peft_model(model(), dropout).train()

    def step(m: Any) -> None:
        m(input_ids=ids, labels=ids).loss.backward()

    models = {"peftx": stack.model, "peft": peer} | ({} if dropout else {"by hand": by_hand().train()})
    return {name: (m, partial(step, m)) for name, m in models.items()}


def train_step(rounds: int, dropout: float, peer: str) -> dict[str, Any]:
    """Forward and backward, 2 x 128 tokens, rank 8 on all linear layers."""
    times = interleaved({name: step for name, (_, step) in _steppers(dropout).items()}, rounds=rounds)
    return {"ms": _ms(times), "ratio": times["peftx"] / times[peer], "limit": 0.95, "peer": peer}


def saved_tensors() -> dict[str, Any]:
    """Megabytes that a training step keeps for its backward pass: each storage once, the model's own weights left out,
    whose transposed views autograd keeps too."""
    found = {}
    for dropout in (0.0, 0.1):
        for name, (trained, step) in _steppers(dropout).items():
            weights = {p.untyped_storage().data_ptr() for p in trained.parameters()}
            storages: dict[int, int] = {}

            def pack(
                tensor: torch.Tensor, seen: dict[int, int] = storages, own: set[int] = weights
            ) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    seen[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                step()
            found[f"{name} dropout {dropout}"] = sum(storages.values()) / 2**20
    ratio = found["peftx dropout 0.1"] / found["peftx dropout 0.0"]
    peft_ratio = found["peft dropout 0.1"] / found["peft dropout 0.0"]
    return {
        "megabytes": found,
        "ratio": ratio,
        "limit": 1.02,
        "peft_ratio": peft_ratio,
        "peer": "without dropout",
    }


def meta_shapes() -> dict[str, Any]:
    """Injection into Llamas of growing depth up to the shape of 70 billion parameters (560 linears), on meta."""
    rows = {}
    for layers in (10, 20, 40, 80):
        config = LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256,
        )  # fmt: skip
        with torch.device("meta"):
            shape = LlamaForCausalLM(config)
        before = peak_megabytes()
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            with torch.device("meta"):
                stack = Stack(copy.deepcopy(shape), [Lora(rank=16, targets="all")])
            best = min(best, time.process_time() - started)
        rows[7 * layers] = {
            "seconds": best,
            "megabytes": peak_megabytes() - before,
            "parameters": sum(p.numel() for p in shape.parameters()),
            "trainable": stack.trainable_parameters(),
        }
    per_linear = {n: row["seconds"] / n for n, row in rows.items()}
    return {
        "by_linears": rows,
        "ratio": per_linear[560] / per_linear[70],
        "limit": 1.25,
        "peer": "70 linears, by linear",
    }


def _ms(times: dict[str, float]) -> dict[str, float]:
    return {name: seconds * 1000 for name, seconds in times.items()}


def run(quick: bool = False) -> dict[str, dict[str, Any]]:
    """All measurements."""
    torch.set_num_threads(1)
    few, many = (3, 5) if quick else (7, 15)
    return {
        "inject 56 linears": inject(few),
        "decode, batch 1": decode(many),
        "load a bundle": load(few),
        "train step": train_step(few, 0.0, "by hand"),
        "train step with dropout 0.1": train_step(few, 0.1, "peft"),
        "saved for backward with dropout": saved_tensors(),
        "inject on meta, linear in modules": meta_shapes(),
    }
