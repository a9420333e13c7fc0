"""The model, its optimizers and learning rate, and checkpoints of both."""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


def model_config() -> LlamaConfig:
    """The architecture: a plain Llama, 5.4 million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; the projections that write to the residual stream start at zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps; one batch per matrix shape."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonalise(cls, update: torch.Tensor, steps: int = 5) -> torch.Tensor:
        """An approximation of the nearest (semi-)orthogonal matrix for each matrix of the batch."""
        a, b, c = cls.COEFFICIENTS
        x = update.bfloat16()
        tall = x.size(-2) > x.size(-1)
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all matrices which have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = collections.defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                grads = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = self.orthogonalise(torch.stack(nesterov)) * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"])


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(hidden, lr=args.muon_lr, momentum=0.95, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=True),
    ]


def lr_scale(step: int, progress: float, warmup: int, decay: float) -> float:
    """Warm-up, constant, and a linear decay to zero over the last ``decay`` part of the token budget."""
    return min((step + 1) / warmup, 1.0, max(1.0 - progress, 0.0) / decay)


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Write weights, moments and state to one safetensors file, which replaces the old one atomically."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optims:
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optim.{key}.{names[parameter]}"] = value
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata={"state": json.dumps(state)})
    os.replace(beside, path)


def load_checkpoint(
    path: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer] | None = None
) -> dict[str, Any]:
    """Read a checkpoint into the model, and into the optimizers when given; returns the saved state."""
    parameters = dict(model.named_parameters())
    owners = {p: opt for opt in optims or () for group in opt.param_groups for p in group["params"]}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, rest = key.split(".", 1)
            if kind == "model":
                with torch.no_grad():
                    parameters[rest].copy_(file.get_tensor(key))
            elif optims:
                moment, name = rest.split(".", 1)
                owners[parameters[name]].state[parameters[name]][moment] = file.get_tensor(key)
        return json.loads(file.metadata()["state"])
