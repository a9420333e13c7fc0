from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_full_finetuning import FullFinetuning

test_conformance = conformance("full-finetuning")


def llama(**options: Any) -> Stack:
    return Stack(tiny("llama"), [FullFinetuning(**options)], tokenizer=tiny_tokenizer())


def train(stack: Stack, steps: int = 3) -> Tensor:
    inputs = example_inputs(stack.model)
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = stack.train_step({**inputs, "labels": inputs["input_ids"]}, optimizer=optimizer)
    return loss


def test_the_steps_are_those_of_a_plain_loop() -> None:
    stack, plain = llama(), tiny("llama")
    inputs = example_inputs(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        loss = plain(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
        optimizer.step()
    assert torch.allclose(train(stack), loss.detach(), atol=1e-6)
    for (name, ours), theirs in zip(stack.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": "head"}, {"lm_head.weight"}),
        ({"targets": "norm.final"}, {"model.norm.weight"}),
        ({"targets": "re:layers.0.self_attn.(q|v)_proj$"}, {f"model.layers.0.self_attn.{n}_proj.weight" for n in "qv"}),
    ],
)  # fmt: skip
def test_targets_alone_train(options: dict[str, Any], expected: set[str]) -> None:
    stack = llama(**options)
    before = {name: p.detach().clone() for name, p in stack.model.named_parameters()}
    train(stack)
    moved = {name for name, p in stack.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == expected == {n for n, p in stack.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("parameters", ["weight", "bias"])
def test_weights_or_biases(parameters: str) -> None:
    model = tiny("gpt2")
    Stack(model, [FullFinetuning(targets="attention", parameters=parameters)])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(name.endswith(parameters) for name in trained)


def test_rows_of_tokens_alone_train_and_come_back(tmp_path: Path) -> None:
    stack = llama(targets="embedding head", tokens=[3, 7])
    before = {name: p.detach().clone() for name, p in stack.model.named_parameters()}
    train(stack)
    for name, p in stack.model.named_parameters():
        moved = (p != before[name]).reshape(len(p), -1).any(1).nonzero().flatten().tolist()
        assert moved == ([3, 7] if name in ("model.embed_tokens.weight", "lm_head.weight") else []), name
    stack.save(tmp_path / "out")
    assert sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.safetensors")) < 8 * 32 * 4 + 4000
    again = peftx.load(tmp_path / "out", model=tiny("llama"))
    inputs = example_inputs(stack.model)
    assert torch.equal(output_of(stack.model, inputs), output_of(again.model, inputs))
    held = again.model.lm_head.weight[5].clone()
    train(again)
    assert torch.equal(again.model.lm_head.weight[5], held), "the other rows still rest"


def test_clear_errors() -> None:
    with pytest.raises(PeftxError, match=r"token 5000, and model.embed_tokens.weight has 320 rows"):
        llama(targets="embedding", tokens=[5000])
    with pytest.raises(PeftxError, match="has a parameter to train among bias"):
        llama(targets="mlp", parameters="bias")
