"""LoPT: a soft prompt of low rank, as two factors or as a projection of a fixed prompt.

"LoPT: Low-Rank Prompt Tuning for Parameter Efficient Language Models" (arXiv:2406.19486). Trained prompts are nearly of
low rank, so X, n rows of width d in front of the input E(Y) of a frozen model, is trained as one:

    LoPT-1   X = U V               U: [n, r], V: [r, d]                         r (n + d) numbers train
    LoPT-2   X = sigma(X_0 U) V    U: [d, r], V: [r, d], X_0: [n, d] fixed      2 r d numbers train, whatever n is
    h_0 = [X ; E(Y)],              loss = -log p(answer | [X ; Y])

X_0 is made of embeddings of tokens. Ours is how both forms start, as near to X_0 as they can be: U and V of the first
are the truncated SVD of X_0, each with the roots of the singular values; in the second U is random, so that X_0 U is
about N(0, 1), and V is the least-squares answer. With r = min(n, d) the first form can be any prompt and starts at X_0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, VirtualTokens, hookimpl
from peftx.errors import OptionError

SIGMA: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
}


class LoptConfig(PluginConfig):
    """Options of LoPT; the paper finds about 20 rows of rank 2 to 5 best."""

    length: int = Field(20, ge=1, description="n, rows in front of the input")
    rank: int = Field(4, ge=1, description="r, at most n and the model's width")
    form: Literal["factors", "projected"] = Field(
        "factors", description="LoPT-1: X = U V; LoPT-2: X = sigma(X_0 U) V"
    )
    sigma: Literal["tanh", "relu", "gelu"] = Field("tanh", description="what bends X_0 U in LoPT-2")


class Factors(VirtualTokens):
    """LoPT-1."""

    def __init__(self, n: int, d: int, r: int) -> None:
        super().__init__(n)
        self.U = nn.Parameter(torch.empty(n, r))
        self.V = nn.Parameter(torch.empty(r, d))

    def rows(self) -> Tensor:
        return self.U @ self.V

    @torch.no_grad()
    def near(self, X: Tensor) -> None:
        """Let the rows be X [n, d], cut to rank r."""
        r = self.V.shape[0]
        left, values, right = torch.linalg.svd(X.float(), full_matrices=False)
        root = values[:r].clamp(min=1e-6 * values[0]).sqrt()  # where both factors are 0 neither would train
        self.U.copy_(left[:, :r] * root)
        self.V.copy_(root[:, None] * right[:r])


class Projected(VirtualTokens):
    """LoPT-2."""

    def __init__(self, n: int, d: int, r: int, sigma: Callable[[Tensor], Tensor]) -> None:
        super().__init__(n)
        self.U = nn.Parameter(torch.empty(d, r))
        self.V = nn.Parameter(torch.empty(r, d))
        self.register_buffer("X_0", torch.empty(n, d))
        self.sigma = sigma

    def hidden(self) -> Tensor:
        """[n, r]."""
        return self.sigma(self.X_0 @ self.U)

    def rows(self) -> Tensor:
        return self.hidden() @ self.V

    @torch.no_grad()
    def near(self, X: Tensor) -> None:
        """Let X [n, d] be X_0, and the rows as near to it as random U allow."""
        self.X_0.copy_(X)
        size = X.float().norm(dim=1).mean()
        self.U.copy_(torch.randn(self.U.shape, device="cpu").to(X.device) / size)
        self.V.copy_(torch.linalg.pinv(self.hidden().float()) @ X.float())


class Lopt(Plugin):
    """See the module."""

    Config = LoptConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("gemma",)
    config: LoptConfig
    prompt: Factors | Projected

    @hookimpl
    def inject(self, model: ModelView) -> None:
        n, r, site = self.config.length, self.config.rank, model.embedding()
        d = site.out_features
        if r > min(n, d):
            raise OptionError(
                f"lopt: rank {r}, and a prompt of {n} rows of width {d} has at most {min(n, d)}",
                hint=f"rank: {min(n, d)} or less; a few are enough",
            )
        if self.config.form == "factors":
            self.prompt = Factors(n, d, r).to(site.weight)
        else:
            self.prompt = Projected(n, d, r, SIGMA[self.config.sigma]).to(site.weight)
        if not model.restoring:
            self.prompt.near(model.embedded(n))
        model.prompt(self.prompt)
