"""`torch.compile` of a model that carries a stack: one graph, and what the model computes by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftx import Stack
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_dora import Dora
from peftx_lofit import Lofit
from peftx_lora import Lora
from peftx_prefix_tuning import PrefixTuning
from peftx_prefixquant import PrefixQuant
from peftx_prompt_tuning import PromptTuning
from peftx_signround import SignRound

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* should not be instantiated:DeprecationWarning",  # of torch, which instantiates it
    # Dynamo, of how we remember the names of a forward's arguments: it traces what is remembered.
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
)
IDS = torch.arange(3, 27).reshape(2, 12)
STACKS: dict[str, Callable[[], list[Any]]] = {
    "nothing": list,
    "lora": lambda: [Lora(rank=2)],
    "dora": lambda: [Dora(rank=2)],
    "soft tokens": lambda: [PromptTuning(length=3)],
    "keys and values": lambda: [PrefixTuning(length=3)],
    "heads": lambda: [Lofit(heads=[(0, 0), (1, 1)])],
    "a packed base": lambda: [SignRound(bits=4, group_size=8, steps=0)],
    "inputs in integers": lambda: [PrefixQuant(prefix_tokens=0)],
    "an adapter on a packed base": lambda: [
        SignRound(bits=4, group_size=8, steps=0),
        Lora(rank=2),
        PromptTuning(length=2),
    ],
}


def stack_of(plugins: list[Any]) -> Stack:
    """On a tiny model; what trains has values that show."""
    torch.manual_seed(0)
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    for member in stack.members:
        stack.inject([member.id])
        if member.implements("compress"):
            stack.compress(["a text to look at, and some more of it"], ids=[member.id])
    with torch.no_grad():
        for parameter in stack.ledger.trained().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    stack.model.eval()
    return stack


def compiled(stack: Stack, graphs: list[Any]) -> Callable[[Tensor], Tensor]:
    """ids -> logits, by one graph: a break is an error. graphs: each that is made is put there."""

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(stack.model, backend=backend, fullgraph=True)
    return lambda ids: model(input_ids=ids).logits


def dearest(*slow: str) -> list[Any]:
    """All stacks that are compiled; these take longer."""
    return [pytest.param(what, marks=[pytest.mark.slow] if what in slow else []) for what in STACKS]


@pytest.mark.parametrize(
    "what", dearest("nothing", "dora", "inputs in integers", "an adapter on a packed base")
)
@torch.no_grad()
def test_a_stack_is_one_graph(what: str) -> None:
    stack, graphs = stack_of(STACKS[what]()), list[Any]()
    model = compiled(stack, graphs)
    plain = stack.model(input_ids=IDS).logits
    assert torch.equal(model(IDS), plain)
    assert len(graphs) == 1
    with torch.no_grad():
        for parameter in stack.ledger.trained().values():
            parameter.mul_(1.5)
    assert torch.equal(model(IDS), stack.model(input_ids=IDS).logits), "numbers are no constants of the graph"
    assert len(graphs) == 1
    assert torch.equal(model(IDS[:1, :7]), stack.model(input_ids=IDS[:1, :7]).logits), "of other sizes"


@pytest.mark.parametrize(
    "what",
    ["lora", *(pytest.param(what, marks=pytest.mark.slow) for what in ("soft tokens", "keys and values"))],
)
@torch.no_grad()
def test_what_is_switched_off_or_taken_away_is_not_in_the_graph_any_more(what: str) -> None:
    stack = stack_of(STACKS[what]())
    model = compiled(stack, [])
    base, adapted = tiny("llama").eval()(input_ids=IDS).logits, model(IDS)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with stack.disabled():
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), adapted)
    if what == "lora":
        stack.merge()
        torch.testing.assert_close(model(IDS), adapted, rtol=0, atol=1e-5)
        stack.unmerge()
        assert torch.equal(model(IDS), adapted)
    stack.remove(*stack.plugins)
    assert torch.equal(model(IDS), base)


@pytest.mark.parametrize(
    "what",
    [
        "lora",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("dora", "soft tokens", "an adapter on a packed base")
        ),
    ],
)
def test_a_compiled_stack_trains(what: str) -> None:
    """With autograd's graph in it, too: gradients are those of the model."""
    stack = stack_of(STACKS[what]())
    parameters = list(stack.ledger.trained().values())
    torch._dynamo.reset()
    found = []
    for model in (stack.model, torch.compile(stack.model, backend="aot_eager", fullgraph=True)):
        loss = model(input_ids=IDS, labels=IDS).loss
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    assert parameters
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
