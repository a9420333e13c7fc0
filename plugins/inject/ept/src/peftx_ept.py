"""EPT: a short soft prompt, a low-rank update of the text's embeddings, and a gated sum of projections.

"Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion" (arXiv:2405.11464). The m * d numbers of a prompt
of m rows are shared out among a shorter one, P_s: [s, d], and two factors, A: [n, r] and B: [r, d]:

    Delta   = A B                                          a row for each of the text's first n tokens
    P_f     = P_s + softmax(P_s Delta^T / sqrt(d)) Delta   fusion: each row of P_s looks at those of Delta
    Z_k     = (P_f D_k) U_k                                K subspaces, D_k: [d, h], U_k: [h, d]
    a       = softmax(G mean(P_f))                         the gate, G: [K, d]
    P*      = P_f + sum_k a_k Z_k
    h_0     = [P* ; E(X) + Delta]                          loss = -log p(Y | X), the model is frozen

    r       = (m - s) d / (n + d), rounded down, so that P_s, A and B are at most m d numbers

B and U_k start at 0: the model begins as under the plain prompt P_s, and reads s + T rows instead of m + T. The paper
trains the factors at a small rate and P_s at a large one. A run has one rate; all matrices but P_s are stored divided
by `rate`, which under Adam is a rate so many times smaller.

With the last update of a run P* takes the place of P_s, and D, U and G are gone: no gate is left to compute.

What is ours: the attention without projections of its own, what the gate reads, and how everything starts.
"""

from __future__ import annotations

from collections.abc import Generator
from copy import deepcopy
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import (
    CallEdit,
    Claim,
    Delta,
    ModelView,
    Plugin,
    PluginConfig,
    TrainStep,
    VirtualTokens,
    hookimpl,
)
from peftx.errors import ArchitectureError, OptionError
from peftx.kernel.call import Call


class EptConfig(PluginConfig):
    """Options of EPT; the paper shares out the numbers of 100 rows."""

    budget: int = Field(100, ge=2, description="m, rows of the prompt whose numbers are shared out")
    length: int = Field(60, ge=1, description="s, rows in front of the input; fewer than m")
    longest: int = Field(
        256, ge=1, description="n, tokens of a text that have an update; later ones have none"
    )
    spaces: int = Field(4, ge=1, description="K, subspaces that the prompt is projected to")
    width: int = Field(8, ge=1, description="h, width of each")
    rate: float = Field(
        0.002,
        gt=0,
        le=1,
        description="learning rate of all matrices but P_s, as a share of the run's; exact under Adam",
    )
    keep_spaces: bool = Field(
        False,
        description="keep subspaces and gate when a run ends, to train on; `collapse()` throws them away then",
    )

    @model_validator(mode="after")
    def _fit(self) -> EptConfig:
        if self.length >= self.budget:
            raise ValueError(f"length {self.length} leaves nothing of the budget {self.budget} for A and B")
        return self


class EptPrompt(VirtualTokens):
    """P*, and the update of the text's embeddings.

    A, B, D, U and G are stored divided by `rate`.

    Args:
        start: first values of P_s, [s, d]. rank: r. config: the options. spaces: are there any, or is P_s P* already.
        call: of the model. owner: the plugin's id.
    """

    def __init__(
        self, start: Tensor, rank: int, config: EptConfig, *, spaces: bool, call: Call, owner: str
    ) -> None:
        s, d = start.shape
        super().__init__(s)
        K, h = config.spaces, config.width
        self.rate, self.call, self.owner = config.rate, call, owner
        self.P = nn.Parameter(start)
        drawn = {"A": (config.longest, rank)} | ({"D": (K, d, h), "G": (K, d)} if spaces else {})
        zero = {"B": (rank, d)} | ({"U": (K, h, d)} if spaces else {})
        W = {name: torch.randn(shape, device="cpu") * d**-0.5 / self.rate for name, shape in drawn.items()}
        W |= {name: torch.zeros(shape) for name, shape in zero.items()}
        self.W = nn.ParameterDict({name: nn.Parameter(value.to(start)) for name, value in W.items()})

    def matrix(self, name: str) -> Tensor:
        return self.rate * self.W[name]

    def fused(self) -> Tensor:
        """P_f, [s, d]."""
        Delta = self.matrix("A") @ self.matrix("B")  # [n, d]
        return self.P + (self.P @ Delta.T * self.P.shape[1] ** -0.5).softmax(-1) @ Delta

    def gate(self, P_f: Tensor) -> Tensor:
        """a, [K]."""
        return (self.matrix("G") @ P_f.mean(0)).softmax(-1)

    def rows(self) -> Tensor:
        if "G" not in self.W:
            return self.P
        P_f = self.fused()
        Z = P_f @ self.matrix("D") @ self.matrix("U")  # [K, s, d]
        return P_f + torch.einsum("k,ksd->sd", self.gate(P_f), Z)

    def update(self, like: Tensor) -> Tensor:
        """Rows of Delta for the tokens of the call that runs, [B, T, d], as `like`; 0 for pads and behind the n-th."""
        real = self.call.real
        assert real is not None
        seen = self.call.carry(self.owner, real.long())  # [B, R + T]; the cache's own first
        place = seen.cumsum(1)[:, -real.shape[1] :] - 1
        told = (real & (place < len(self.W["A"]))).to(like.device)
        A = self.matrix("A")[place.to(like.device).clamp(0, len(self.W["A"]) - 1)]  # [B, T, r]
        return (A @ self.matrix("B") * told[..., None]).to(like)

    @torch.no_grad()
    def collapse(self, dtype: torch.dtype) -> None:
        """Put P*, as a model of this dtype computes it, in the place of P_s, and let D, U and G go."""
        self.P.copy_(deepcopy(self, {id(self.call): None}).to(dtype).rows())  # without the model
        self.W = nn.ParameterDict({name: self.W[name] for name in ("A", "B")})


class ToTokens(Delta):
    """E(x) + Delta, where the embedding runs on the tokens of a call."""

    def __init__(self, prompt: EptPrompt) -> None:
        super().__init__()
        self.prompt = (prompt,)  # in a tuple: it is no child of this one

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ids = self.prompt[0].call.ids
        if ids is None or (x is not ids and not torch.equal(x, ids.to(x.device))):
            return y  # somebody looks tokens up, which are no text
        return y + self.prompt[0].update(y)


class ToEmbeddings(CallEdit):
    """The same to a caller's embeddings."""

    def __init__(self, prompt: EptPrompt) -> None:
        super().__init__()
        self.prompt = (prompt,)

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        x = call.get("inputs_embeds")
        return call if x is None else call | {"inputs_embeds": x + self.prompt[0].update(x)}


class Ept(Plugin):
    """See the module."""

    Config = EptConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("gemma",)
    refuses = {"mamba": "it keeps states, and no place of a token"}
    example = {"length": 4, "budget": 20, "longest": 16, "width": 3}
    config: EptConfig
    prompt: EptPrompt

    def suits(self, model: ModelView) -> None:
        if not model.main.heads:
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} keeps states, and the place of a token is not in them",
                hint="take a model with attention",
            )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, site = self.config, model.embedding()
        d = site.out_features
        rank = (config.budget - config.length) * d // (config.longest + d)
        if rank < 1:
            raise OptionError(
                f"{model.owner}: what {config.length} rows leave of a budget of {config.budget} is less than a rank of "
                f"1 for {config.longest} tokens at width {d}",
                hint=f"budget: {config.length + -(-(config.longest + d) // d)} or more, or a smaller longest",
            )
        if not model.restoring:
            self.state = {}
        start = model.embedded(config.length)
        open = not self.state.get("collapsed")
        self.prompt = EptPrompt(start, rank, config, spaces=open, call=model.call, owner=model.owner)
        model.prompt(self.prompt)
        site.attach(ToTokens(self.prompt))
        model.around(ToEmbeddings(self.prompt))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if not self.config.keep_spaces:
            step.at_end(self.collapse, self.prompt.P)
        return (yield)

    def collapse(self, dtype: torch.dtype | None = None) -> None:
        """Throw subspaces and gate away: P* is the prompt from now on. `stack.train` does it; a loop of your own has
        to."""
        if not self.state.get("collapsed"):
            self.prompt.collapse(dtype or self.prompt.P.dtype)
            self.state["collapsed"] = True
