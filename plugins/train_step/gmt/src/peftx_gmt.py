"""GMT: each update changes the entries with the largest gradients, chosen anew every time.

"Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance" (arXiv:2406.15330; its second version is called
"Enhancing Large Language Model Performance with Gradient-Based Parameter Selection"). All weights may train. With
G = 1/N sum_n dL(theta, B_n)/dtheta, the gradient over the N micro-batches of one update,

    M     = 1[ |G| >= t ]          t: such that a share k of the tensor's entries has |G| >= t
    theta <- theta - rate * (M * G)            or what the optimizer makes of M * G

M belongs to one update and is kept nowhere. It is made of the accumulated gradient, once, and before clipping, so what
is clipped is what the optimizer gets. |M * G|**2 >= k |G|**2. k = 1 is full fine-tuning.

An optimizer with moments, or a weight decay, moves entries outside M too. With `hold` they stay where they are, to the
bit, until an update chooses them.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, Targets, TrainStep, hookimpl
from peftx.errors import ConflictError
from peftx.toolkits.injecting import check_share


class GmtConfig(PluginConfig):
    """Options of GMT. The learning rate is that of full tuning (1e-5 to 2e-5 for models of billions)."""

    keep: float = Field(
        0.2, gt=0, le=1, description="k, share of the entries whose gradient goes to the optimizer"
    )
    scope: Literal["tensor", "model"] = Field(
        "tensor", description="one t for each tensor, or one for all of them together"
    )
    choose: Literal["gradient", "random"] = Field(
        "gradient", description="M by |G|; or at random, as the paper's control"
    )
    hold: bool = Field(
        False, description="entries outside M stay to the bit; else moments and a weight decay move them too"
    )
    targets: Targets | None = Field(
        Targets("re:."),
        description="layers that train; all if left out; null: none of its own, and what others train is masked",
    )


class Gmt(Plugin):
    """See the module."""

    Config = GmtConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS, Claim.TAKES_WEIGHTS}
    architectures = ("mixtral", "gemma2")
    config: GmtConfig

    def claimed(self) -> frozenset[Claim]:
        if self.config.targets is not None:
            return self.claims
        return self.claims - {Claim.TRAINS_BASE} | {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if self.config.targets is None:
            return
        packed = [site for site in model.sites(self.config.targets) if site.kind == "quantized"]
        if packed:
            raise ConflictError(
                f"gmt: {packed[0].path} is quantized, and integers do not train",
                hint="put gmt before the plugin that quantizes; or an adapter, and gmt with targets: null",
            )
        self.places = model.train(self.config.targets)

    def check(self, stack: Stack) -> None:
        id, whole = stack.id_of(self), self.config.scope == "model"
        owners = stack.plugins if self.config.targets is None else [id]
        sizes = [p.numel() for owner in owners for p in stack.ledger.parameters(owner)]
        if sizes:
            size, of = (sum(sizes), "all tensors together") if whole else (max(sizes), "the largest tensor")
            check_share(f"{id}: keep", self.config.keep, size, of)

    def bytes_hang_on(self) -> str:
        own = self.config.keep < 1 and self.config.targets is not None
        return "at most: numbers that no update chooses are not stored" if own else ""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if self.config.keep < 1:
            step.on_gradients(lambda trained: self.mask(step, trained))
        return (yield)

    def mask(self, step: TrainStep, trained: Sequence[nn.Parameter]) -> None:
        """M * G in the place of G, of one update."""
        if self.config.targets is not None:
            trained = [place.theta for place in self.places.values()]
        graded = [p for p in trained if p.grad is not None]
        scores = [p.grad.abs() for p in graded]  # type: ignore[union-attr]
        if self.config.choose == "random":
            seed = zlib.crc32(f"{step.stack.id_of(self)}:{step.stack.seed}:{step.index}".encode())
            generator = torch.Generator().manual_seed(seed)
            scores = [torch.rand(p.shape, generator=generator).to(p.device) for p in graded]
        if self.config.scope == "model" and scores:
            one = threshold(torch.cat([score.flatten() for score in scores]), self.config.keep)
            masks = [score >= one for score in scores]
        else:
            masks = [score >= threshold(score, self.config.keep) for score in scores]
        kept = []
        for p, M in zip(graded, masks, strict=True):
            M &= p.grad != 0  # where t is 0: tokens that no text of the batch has
            p.grad = p.grad * M  # a product: what is not finite is not hidden
            if self.config.hold:
                kept.append((p, M, p.clone()))

        @torch.no_grad()
        def put_back(_: torch.optim.Optimizer) -> None:
            for p, M, before in kept:
                p.copy_(torch.where(M, p, before))

        if kept:
            step.after_update(put_back)


def threshold(scores: Tensor, keep: float) -> Tensor:
    """t, 0-d: the smallest of the largest round(k n) of n scores, of one at least."""
    n = scores.numel()
    return scores.flatten().kthvalue(n + 1 - max(1, round(keep * n))).values
