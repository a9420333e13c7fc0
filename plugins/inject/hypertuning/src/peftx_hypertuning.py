"""HyperTuning: a hypermodel reads examples of a task and writes the prefix of a frozen model, in one pass.

"HyperTuning: Toward Adapting Large Language Models without Back-propagation" (arXiv:2211.12485): its HyperT5-Prefix.
The hypermodel H starts as a copy of the model M, and all of it trains. It reads examples x, and then a learned vector
e(a) for each attention a of M. What it makes of these becomes M's prefix, by an MLP for each kind of attention:

    phi(a) = MLP(H(x, e)(a))                    K and V: [heads, P, head size]
    K' = [phi_K ; K],  V' = [phi_V ; V]         in M, which is frozen
    loss = -log p_M(y | query; phi)             the gradient goes through M into H

Each row of a batch has examples, and so a phi, of its own. The two stages of training are two kinds of rows. Of a text
(hyperpretraining), cut into parts A B C D, H reads A and D, and M goes on from B to C. With a prompt and a completion
(multi-task tuning) H reads up to 16 other rows of the same `task`. A new task then takes one pass of H and no gradient:
`stack.columns(examples=read(stack, texts))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    AttentionEdit,
    CallEdit,
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    hookimpl,
)
from peftx.copies import Reader
from peftx.engines.data.encoding import continuation, eos_id, prompt_ids
from peftx.errors import ArchitectureError
from peftx.kernel.parts import CallPart

COLUMN = "examples"
Phi = list[tuple[Tensor, Tensor]]
"""K and V of each attention, [B, heads, P, head size]."""


class HypertuningConfig(PluginConfig):
    """Options of HyperTuning."""

    length: int = Field(32, ge=1, description="P, rows in front of each attention's keys and values")
    shots: int = Field(16, ge=1, description="most examples of its task that the hypermodel reads for a row")


class Hypermodel(CallEdit):
    """H, e and the MLPs.

    Args:
        model: what H starts as. length: P. nothing: what H reads where there are no examples, [1, S].
    """

    def __init__(self, model: ModelView, length: int, nothing: Tensor) -> None:
        super().__init__()
        self.H, d = Reader(model.module), model.hidden_size
        self.mlps, self.slots = nn.ModuleDict(), []
        for site in model.attentions():
            n = model.heads_of(site)
            kind = f"{site.tower}_{site.role}_{n.kv_heads}x{n.head_dim}"
            out = n.kv_heads * (n.head_dim + n.value_dim)
            self.slots.append((kind, n))
            if kind not in self.mlps:
                self.mlps[kind] = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, length * out))
        self.e = nn.Parameter(self.H.vectors(len(self.slots)))
        self.register_buffer("nothing", nothing, persistent=False)
        self.call, self.owner, self.length = model.call, model.owner, length

    def forward(self, x: Tensor) -> Phi:
        """x [B, S], -1 behind the end of a row."""
        o, found = self.H(x, self.e.expand(len(x), -1, -1)), []  # [B, attentions, d]
        for a, (kind, n) in enumerate(self.slots):
            rows = self.mlps[kind](o[:, a]).unflatten(1, (n.kv_heads, self.length, -1))
            found.append(rows.split((n.head_dim, n.value_dim), -1))
        return found

    def phi(self) -> Phi:
        """Of the call that runs, once for its cache."""
        return self.call.once(self.owner, lambda: self(self.call.batch.get(COLUMN, self.nothing)))

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        self.phi()
        return call


class Prefix(AttentionEdit):
    """K' = [phi_K ; K], V' = [phi_V ; V] in attention `a`."""

    def __init__(self, hypermodel: Hypermodel, a: int) -> None:
        super().__init__()
        self.hypermodel, self.a = (hypermodel,), a  # in a tuple: it is no child of this one

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        K, V = (x.repeat_interleave(len(key) // len(x), 0).to(key) for x in self.hypermodel[0].phi()[self.a])
        return torch.cat((K, key), 2), torch.cat((V, value), 2)


class Hypertuning(Plugin):
    """See the module."""

    Config = HypertuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.PREFIX_CACHE, Claim.TAKES_WEIGHTS}
    takes = ("prompt-completion", "text")
    gives = {"text": "prompt-completion"}
    example = {"length": 4, "shots": 2}
    architectures = ("bart", "gemma")
    refuses = {
        "bert": "it answers no prompts",
        "vit": "it answers no prompts",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
    }
    config: HypertuningConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        kind, reads = model.config.model_type, model.module.main_input_name
        if reads != "input_ids" or not {"decoder"} <= {*model.towers} <= {"decoder", "encoder"}:
            raise ArchitectureError(f"hypertuning: {kind} answers no prompts of text alone", hint="a decoder")
        model.column(COLUMN, own_length=True)
        hypermodel = model.around(Hypermodel(model, self.config.length, read(stack, ())))
        for a, site in enumerate(model.attentions()):
            site.attend(Prefix(hypermodel, a))

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        rows = data.train
        if data.format == "text":
            A, B, C, D = zip(*map(quarters, rows["text"]), strict=True)
            rows, data.format = Dataset.from_dict({"prompt": B, "completion": C}), "prompt-completion"
            few = list(zip(A, D, strict=True))
        else:
            texts = [row["prompt"] + continuation(row["prompt"], row["completion"]) for row in rows]
            others = data.others(self.config.shots, name=stack.id_of(self), by="task")
            few = [[texts[i] for i in chosen] for chosen in others]
        data.train = rows.add_column(COLUMN, [read(stack, x)[0, : data.max_length].tolist() for x in few])


def quarters(text: str) -> list[str]:
    """A text in four parts of as many words."""
    words = text.split(" ")
    return [" ".join(words[len(words) * i // 4 : len(words) * (i + 1) // 4]) for i in range(4)]


def read(stack: Stack, texts: Sequence[str]) -> Tensor:
    """Examples, in each text a prompt and its completion, as the column for all rows of a batch: [1, S]."""
    ids = prompt_ids(stack.tokenizer, "\n\n".join(texts)) or [eos_id(stack.tokenizer)]
    return torch.tensor([ids], device=stack.model.device)


@torch.no_grad()
def prefix(stack: Stack, texts: Sequence[str], *, id: str = "hypertuning") -> Phi:
    """What H writes of examples, [heads, P, head size] each, to train on from."""
    (part,) = stack.ledger.of(id, CallPart)
    return [(K[0], V[0]) for K, V in part.module(read(stack, texts))]
