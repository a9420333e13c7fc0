"""BA-LoRA: low-rank adapters from the principal components, with three regularisers on the outputs.

"BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models"
(arXiv:2408.04556). The adapter starts at the r largest singular values of W = U S V^T (PiSSA, arXiv:2404.02948):

    A0 = sqrt(S_r / s) V_r^T     B0 = U_r sqrt(S_r / s)          A: [r, in], B: [out, r], s = alpha / r
    y  = (W - s B0 A0) x + s B A x = W x + s (B A - B0 A0) x     W stays as it is; A, B train from A0, B0

    loss = task + l1 L_C + l2 L_D + l3 L_S                       Z the logits, Z0 those without the adapter

    of classes, Z: [b, c]                                        of tokens, Z: [b, T, V], p = softmax(Z)
    L_C = mean (Z_i / |Z_i| - Z0_i / |Z0_i|)**2                  KL(p0 || p), summed over a row, mean over rows
    L_D = 1/c sum over i != j of Cov(Z)_ij**2                    mean over tokens of sum p log p
    L_S = - sum of the k largest singular values of Z / sum of all, Z as [b, c] or [b, T V]

L_C holds on to what the model knew, L_D spreads the outputs, L_S gathers them in few directions. The weights are those
of the released code, which sums L_C over all positions of a row; here those with a label count, in all three terms.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss, normalize

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.engines.training.shares import Over
from peftx.errors import BatchError, ModelError, TrainingError
from peftx.kernel.modes import eval_mode
from peftx.toolkits.injecting import LowRankDifference, principal


class BaLoraConfig(PluginConfig):
    """Options of BA-LoRA, with the values of the released training script."""

    rank: int = Field(128, ge=1, description="r, the rank of the update")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; the rank if left out, so s = 1"
    )
    targets: Targets = Field(Targets("attention mlp"), description="linear layers to adapt")
    consistency: float = Field(
        1e-4, ge=0, allow_inf_nan=False, description="l1, weight of L_C; 0 saves the second forward pass"
    )
    diversity: float = Field(3e-4, ge=0, allow_inf_nan=False, description="l2, weight of L_D")
    singular: float = Field(1e-4, ge=0, allow_inf_nan=False, description="l3, weight of L_S")
    top: int = Field(3, ge=1, description="k, singular values that L_S gathers the logits in")


class BaLora(Plugin):
    """See the module."""

    Config = BaLoraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_LABELS}
    architectures = ("mixtral",)
    config: BaLoraConfig
    example = {"rank": 2, "top": 1}  # a batch of two rows has two singular values
    exempt = {"accumulation_makes_the_same_step": "L_S is of a batch's rows together, and one alone has none"}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        rank = self.config.rank
        scale = 1.0 if self.config.alpha is None else self.config.alpha / rank
        for site in model.linears(self.config.targets):
            site.check_rank(rank)
            delta = site.attach(LowRankDifference(site.shape, rank=rank, scale=scale))
            if not model.restoring:
                delta.start(*principal(site.weight, rank, scale=scale))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        def add(name: str, term: Callable[[Tensor], Tensor], over: Over) -> None:
            if weight := getattr(self.config, name):
                step.add_loss(name, lambda outputs: term(logits_of(outputs)), weight, over=over)

        add("consistency", lambda Z: consistency(step, Z, self.reference(step)), "rows")
        add("diversity", lambda Z: diversity(step, Z), "labels")  # of classes a row has one
        add("singular", lambda Z: singular(step, Z, self.config.top), "rows")  # it is no mean
        return (yield)

    def reference(self, step: TrainStep) -> Tensor:
        """Z0: logits of the model without this adapter, in eval mode; other plugins stay on."""
        with torch.no_grad(), eval_mode(step.model), step.stack.disabled(step.stack.id_of(self)):
            return logits_of(step.model(**step.batch))


def consistency(step: TrainStep, Z: Tensor, Z0: Tensor) -> Tensor:
    """L_C, 0-d; of tokens it grows with the length of the rows."""
    if Z.ndim == 2:
        return mse_loss(normalize(Z.float(), dim=-1), normalize(Z0.float(), dim=-1))
    log_p, log_p0 = (log_softmax(labelled(step, logits).float(), -1) for logits in (Z, Z0))  # [N, V]
    return (log_p0.exp() * (log_p0 - log_p)).sum() / len(Z)


def diversity(step: TrainStep, Z: Tensor) -> Tensor:
    """L_D, 0-d; 0 for one row of classes, which may be left over at the end of the data."""
    if Z.ndim == 2:
        b, c = Z.shape
        if b == 1 and step.index == 0:
            raise TrainingError(
                "ba-lora: diversity: the covariance of a batch of 1 row is not defined",
                hint="batch_size of 2 or more, or diversity: 0",
            )
        centred = Z.float() - Z.float().mean(0)
        covariance = centred.t() @ centred / max(1, b - 1)  # [c, c]
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / c
    log_p = log_softmax(labelled(step, Z).float(), -1)  # [N, V]
    return (log_p.exp() * log_p).sum() / max(1, len(log_p))


def singular(step: TrainStep, Z: Tensor, k: int) -> Tensor:
    """L_S, 0-d; -1 where Z has at most k rows or columns, as what is left over at the end of the data may."""
    if Z.ndim > 2:
        Z, mask = predictions(step, Z)
        Z = (Z * mask.unsqueeze(-1)).flatten(1)  # [b, T V], other positions at 0
    if min(Z.shape) <= k and step.index == 0:
        raise TrainingError(
            f"ba-lora: singular: the logits, {Z.shape[0]}x{Z.shape[1]}, have no singular values beside the top {k}, so "
            "that the term is constant",
            hint=f"a batch_size (and number of classes) above {k}, a smaller top, or singular: 0",
        )
    s = torch.linalg.svdvals(Z.float())  # [min(b, T V)], falling
    return -s[:k].sum() / (s.sum() + 1e-10)


def logits_of(outputs: Any) -> Tensor:
    if "logits" not in outputs:
        name = type(outputs).__name__
        raise ModelError(f"ba-lora: {name} has no logits to regularise", hint="a model with one head")
    return outputs["logits"]


def predictions(step: TrainStep, Z: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [b, T, V], whether each has a label [b, T]); a decoder's position predicts the token after it."""
    if "labels" not in step.batch:
        raise BatchError("ba-lora: the batch has no 'labels', which say what positions count")
    labels, anatomy = step.batch["labels"], step.stack.anatomy
    if anatomy.is_decoder and not anatomy.is_encoder_decoder:
        Z, labels = Z[:, :-1], labels[:, 1:]
    return Z, labels != IGNORE


def labelled(step: TrainStep, Z: Tensor) -> Tensor:
    """The logits of positions that have a label, [N, V]."""
    Z, mask = predictions(step, Z)
    return Z[mask]
