"""Plugins that go wrong in `inject`."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from peftx import Claim, Delta, LowRank, ModelView, Plugin, VirtualTokens, add_low_rank, hookimpl
from peftx.errors import ArchitectureError


class _LowRank(Delta):
    """y + B A x, A: [r, in], B: [out, r]."""

    def __init__(self, in_features: int, out_features: int, *, start: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(2, in_features) * 0.1)
        self.B = nn.Parameter(torch.randn(out_features, 2) * start)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x, y, self.A, self.B, 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.B @ self.A).to(weight.dtype), bias

    def low_rank(self) -> LowRank | None:
        return LowRank(self.A, self.B, 1.0)


class TrainsForever(Plugin):
    """Its deltas stay in training on a model that is not."""

    caught_by = "modes_are_the_models"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features)).train()


class DrawsElsewhere(Plugin):
    """Its values come from Python's generator, which the stack's seed does not govern."""

    caught_by = "same_under_a_seed"
    also = {"bfloat16", "gradient_checkpointing"}  # which compare two builds
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            delta = site.attach(_LowRank(site.in_features, site.out_features))
            if not model.restoring:
                with torch.no_grad():
                    delta.A.add_(random.random())


class StartsElsewhere(Plugin):
    """Claims identity, and starts with a random B."""

    caught_by = "identity_at_start"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features, start=1e-4))


class HidesItsIdentity(Plugin):
    """Starts at the identity, and does not say so."""

    caught_by = "identity_not_hidden"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features))


class TrainsInSecret(Plugin):
    """Unfreezes a norm of the base behind the ledger's back."""

    caught_by = "only_declared_parameters_train"
    also = {"base_untouched_by_training", "trains_in_the_trainer", "remove_restores_base", "resume_is_exact"}
    also |= {"composes_with_weights", "composes_with_norms", "composes_with_prompt"}  # the bundle misses it
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features))
        model.norms()[0].module.weight.requires_grad_(True)


class _Tokens(VirtualTokens):
    def __init__(self, hidden: int) -> None:
        super().__init__(2)
        self.values = nn.Parameter(torch.randn(2, hidden))

    def rows(self) -> Tensor:
        return self.values


class HidesItsTokens(Plugin):
    """Puts soft tokens in front, and does not claim them."""

    caught_by = "effects_match_claims"
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(_Tokens(model.hidden_size))


class BesideAndOn(Plugin):
    """Claims to stand beside the weights, and stands on them."""

    caught_by = "effects_match_claims"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features))


class KnowsOneModel(Plugin):
    """Reaches for names that other architectures do not have."""

    caught_by = "carries_or_refuses"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        count = len(model.module.model.layers)
        for site in model.linears(f"attention layers=0-{count - 1}"):
            site.attach(_LowRank(site.in_features, site.out_features))


def _children(model: ModelView, name: str) -> bool:
    return any(name in path.split(".") for path, _ in model.module.named_modules())


class AvoidsDeltas(Plugin):
    """Refuses weights that carry another plugin's delta, and does not say whose."""

    caught_by = "composes_with_weights"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            if "peftx" in site.module._modules:
                raise ArchitectureError("a layer is occupied")
            site.attach(_LowRank(site.in_features, site.out_features))


class AvoidsGains(Plugin):
    """Refuses norms that carry another plugin's delta, and does not say whose."""

    caught_by = "composes_with_norms"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if any("peftx" in site.module._modules for site in model.norms()):
            raise ArchitectureError("a norm is occupied")
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features))


class AvoidsPrompts(Plugin):
    """Refuses models with soft tokens, and does not say whose."""

    caught_by = "composes_with_prompt"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if _children(model, "peftx_prompt"):
            raise ArchitectureError("the input is occupied")
        for site in model.linears("attention"):
            site.attach(_LowRank(site.in_features, site.out_features))


class _ActsBefore(Delta):
    """Halves what goes in, by a trained half."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.full((), 0.5))

    def pre(self, x: Tensor) -> Tensor:
        return x * self.z.to(x.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z.to(weight.dtype), bias


class ActsBeforeInSecret(Plugin):
    """Edits inputs, and does not say so."""

    caught_by = "input_edits_are_claimed"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(_ActsBefore())


class LooksAtNumbers(Plugin):
    """Reads a weight's value while it is built, which a model on the meta device has not got."""

    caught_by = "builds_on_meta"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            if float(site.weight.detach().sum()) != float("inf"):
                site.attach(_LowRank(site.in_features, site.out_features))
