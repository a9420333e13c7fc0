"""Prompt gating: a prompt for each aspect, trained alone, whose states are gated so that several go together.

"An Extensible Plug-and-Play Method for Multi-Aspect Controllable Text Generation" (arXiv:2212.09387). One plugin is one
aspect (a sentiment, a topic, a tense) on a frozen encoder: m slots P_0 before the text's embeddings E(x), and in each
layer j an addition U_j and the logits A_j of a gate. With H the states of the slots behind the layer's self-attention
and the norm of its residual sum:

    input  = [P_0 ; E(x)]                                 P_0 = W_2 relu(W_1 e + a) + b        e: [m, k]
    H      <- sigmoid(A_j) * H + U_j                      A, U = V_2 tanh(V_1 e' + c) + d      of all layers at once
    states of the text are left alone
    several: [P_0^(1) ; ... ; P_0^(n) ; x], each slot with the A_j and U_j of its own plugin

The loss is the task's, on rows of that aspect. Trained alone, plugins stand together in one stack, and nothing trains
again: a gate below 1 keeps the slots of the others from moving a slot's state far. A slot has no position, and the
text those that it has alone, so the order of the plugins means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Stack, VirtualTokens, hookimpl
from peftx.engines.tensor_files import read_tensors
from peftx.errors import ArchitectureError, FileError
from peftx.kernel.call import Call
from peftx.kernel.positions import place_of
from peftx.kernel.virtual_tokens import prompt_of


class PromptGatingConfig(PluginConfig):
    """Options of prompt gating; the paper trains with Adam at rate 1e-4 behind 5000 steps of warm-up."""

    length: int = Field(100, ge=1, description="m, slots of the aspect")
    inner: int = Field(512, ge=1, description="k, width of the vectors that the networks read")
    hidden: int = Field(512, ge=1, description="width of the networks that write P_0, U and A")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the numbers of U and of the gate, while training")
    start: str | None = Field(
        None,
        description="a file of a bundle, as topic/prompt-gating.safetensors: the aspect that was trained there",
    )


class Writer(nn.Module):
    """W_2 f(W_1 e + a) + b, [m, out].

    Args:
        length: m. inner: k. hidden: width between. out: numbers for a slot. f: of the hidden numbers.
    """

    def __init__(self, length: int, inner: int, hidden: int, out: int, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.randn(length, inner))
        self.down, self.up, self.f = nn.Linear(inner, hidden), nn.Linear(hidden, out), f

    def forward(self, part: slice = slice(None)) -> Tensor:
        """These of the numbers, [m, part]."""
        return F.linear(self.f(self.down(self.e)), self.up.weight[part], self.up.bias[part])


class Slots(VirtualTokens):
    """P_0, U and A of one aspect.

    Args:
        config: its sizes. layers: of the encoder. width: d. call: of the model. model: whose slots they are.
    """

    def __init__(
        self, config: PromptGatingConfig, layers: int, width: int, call: Call, model: PreTrainedModel
    ) -> None:
        super().__init__(config.length)
        sizes = config.length, config.inner, config.hidden
        self.P_0 = Writer(*sizes, width, F.relu)
        self.U, self.A = (Writer(*sizes, layers * width, torch.tanh) for _ in range(2))
        self.width, self.dropout, self.call, self.model = width, config.dropout, call, (model,)

    def rows(self) -> Tensor:
        return self.P_0()

    def gated(self, H: Tensor, layer: int) -> Tensor:
        """sigmoid(A_j) * H + U_j, of [B, m, d]."""
        part = slice(layer * self.width, (layer + 1) * self.width)
        gate, U = (F.dropout(x, self.dropout, self.training) for x in (self.A(part).sigmoid(), self.U(part)))
        return (gate * H + U).to(H)

    def own(self, like: Tensor) -> Tensor | None:
        """Columns of these slots in states [., T + slots, d]: [B, m], or [1, m] for all rows; None: there are none."""
        if self.call.shape is None or like.shape[1] == self.call.shape[1]:
            return None
        (model,) = self.model
        _, prompt = prompt_of(model)
        assert prompt is not None  # these are of it
        before = sum(other.length for other in takewhile(lambda other: other is not self, prompt.tokens))
        at = torch.as_tensor(place_of(model, self.call.real), device=like.device)
        return at.view(-1, 1) + before + torch.arange(self.length, device=like.device)


class Gate(Delta):
    """Behind the norm of a layer's self-attention."""

    def __init__(self, slots: Slots, layer: int) -> None:
        super().__init__()
        self.slots, self.layer = (slots,), layer  # in a tuple: no child of this one

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        columns = self.slots[0].own(y)
        if columns is None:
            return y
        at = torch.arange(len(y), device=y.device)[:, None], columns
        return y.index_put(at, self.slots[0].gated(y[at], self.layer))


class Unplaced(Delta):
    """Behind the embedding of positions: slots have none, and what is behind them counts as if they were not there.

    Deltas follow in stack order, as slots do, so those of several plugins do what one for all of their slots would.
    """

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = (slots,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        columns = self.slots[0].own(y)
        if columns is None:
            return y
        first, m = columns[:, :1], columns.shape[1]
        here = torch.arange(y.shape[1], device=y.device)
        index = torch.where(here < first, here, (here - m).clamp(min=0))  # [B or 1, T + slots]
        rows = max(len(y), len(index))
        moved = y.expand(rows, -1, -1).gather(1, index[..., None].expand(rows, -1, y.shape[2]))
        return moved.masked_fill(((here >= first) & (here < first + m))[..., None], 0)


class PromptGating(Plugin):
    """See the module."""

    Config = PromptGatingConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("bart",)
    example = {"length": 4, "inner": 8, "hidden": 8}  # the tiny models have few positions
    refuses = {
        "llama": "it has no encoder",
        "gpt2": "it has no encoder",
        "qwen2": "it has no encoder",
        "t5": "its norms stand before the residual sums, and its positions are no embeddings",
    }
    config: PromptGatingConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        sites = [site for site in model.anatomy.sites if site.tower == "encoder"]
        norms = [model.bound(site) for site in sites if site.role == "norm.attention"]
        places = [model.bound(site) for site in sites if site.role == "embedding.position"]
        if not norms or not places or any(site.role == "norm.final" for site in sites):
            raise ArchitectureError(
                f"{model.owner}: {model.config.model_type} has no encoder with a norm behind each residual sum and an "
                "embedding of positions",
                hint="a model such as BART",
            )
        facts = model.towers["encoder"]
        slots = Slots(self.config, facts.layers, facts.hidden_size, model.call, model.module)
        self.slots = model.prompt(slots)
        for site in places:
            site.attach(Unplaced(slots))
        for layer, site in enumerate(norms):
            site.attach(Gate(slots, layer))
        if self.config.start is not None and not model.restoring:
            self.take(stack.ledger.tensors(model.owner), self.config.start)

    @staticmethod
    @torch.no_grad()
    def take(own: dict[str, Tensor], file: str) -> None:
        """Fill the tensors of an aspect from the file of another stack's bundle.

        Raises:
            PeftxError: they are of other sizes, or another plugin's.
        """
        found = read_tensors(Path(file))
        if {name: x.shape for name, x in found.items()} != {name: x.shape for name, x in own.items()}:
            raise FileError(
                f"prompt-gating: '{file}' holds no aspect of these sizes",
                hint="the length, inner and hidden that it was trained with, on the same model",
            )
        for name, tensor in own.items():
            tensor.copy_(found[name])
