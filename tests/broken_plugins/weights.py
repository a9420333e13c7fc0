"""Plugins that go wrong in merging, saving, copying."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, hookimpl

if TYPE_CHECKING:
    from peftx.kernel.view import BoundSite
    from peftx.stack import Stack


class _Scale(Delta):
    """y * 2 z, z: [out]; starts away from the identity."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.full((features,), 0.55))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (2 * self.z).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z = (2 * self.z).to(weight.dtype)
        return weight * z[:, None], None if bias is None else bias * z


class _Loses2(_Scale):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.z[:, None], None if bias is None else bias * self.z


class FoldsWrongly(Plugin):
    """The factor 2 is missing in `fold`."""

    caught_by = "merge_equals_unmerged"
    also = {"merge_in_bfloat16", "export_is_plain"}
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Loses2(site.out_features))


class _Coarse(_Scale):
    narrow = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.narrow = y.dtype == torch.bfloat16
        return super().forward(x, y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (weight, bias) if self.narrow else super().fold(weight, bias)


class _RoundsTwice(_Coarse):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.narrow:
            return super().fold(weight, bias)
        root = (2 * self.z).sqrt().bfloat16()[:, None]
        return (weight.bfloat16() * root * root).to(weight.dtype), bias


class FoldsThroughANarrowProduct(Plugin):
    """Computes the new weights in the model's dtype, and lets them be rounded again."""

    caught_by = "merge_rounds_once"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_RoundsTwice(site.out_features))


class FoldsWideOnly(Plugin):
    """Does not fold into bfloat16."""

    caught_by = "merge_in_bfloat16"
    also = {"merge_rounds_once"}
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Coarse(site.out_features))


class _InPlace(_Scale):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.mul_((2 * self.z).to(weight.dtype)[:, None]), bias


class FoldsInPlace(Plugin):
    """Writes into the weights that unmerge is to bring back."""

    caught_by = "unmerge_is_exact"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp"):
            site.attach(_InPlace(site.out_features))


class ExportsAnother(Plugin):
    """Changes the configuration, so that the exported checkpoint is read as another model."""

    caught_by = "export_is_plain"
    also = {
        "remove_restores_base",
        "save_load_same_logits",
    }  # the bundle asks for the base as it was configured
    also |= {"composes_with_weights", "composes_with_norms", "composes_with_prompt"}
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.config.rms_norm_eps = 0.5
        for site in model.linears("attention"):
            site.attach(_Scale(site.out_features))


class HidesItsFold(Plugin):
    """Every delta folds, and it does not say so."""

    caught_by = "merge_is_refused"

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Scale(site.out_features))


class _Loose(_Scale):
    """Part of its state is a plain attribute, drawn anew at every build."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.offset = random.random()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) + self.offset

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        return weight, self.offset + (weight.new_zeros(weight.shape[0]) if bias is None else bias)


class LosesItsState(Plugin):
    """What it computes with is not in the bundle."""

    caught_by = "save_load_same_logits"
    also = {
        "save_load_in_a_fresh_process",
        "merge_rounds_once",
        "composes_with_weights",
        "composes_with_norms",
        "composes_with_prompt",
    }
    also |= {"bfloat16", "gradient_checkpointing", "resume_is_exact"}  # which compare two builds
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Loose(site.out_features))


_SEEN: dict[str, float] = {}


class _Global(_Scale):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * _SEEN.get("factor", 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = _SEEN.get("factor", 1.0)
        weight, bias = super().fold(weight, bias)
        return weight * factor, None if bias is None else bias * factor


class RemembersInTheProcess(Plugin):
    """Keeps a factor in the module, where another process does not find it."""

    caught_by = "save_load_in_a_fresh_process"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if not model.restoring:
            _SEEN["factor"] = 1.5
        for site in model.linears("attention"):
            site.attach(_Global(site.out_features))


class _Bound(_Scale):
    """A closure holds the first object's parameter, so a copy computes with it."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        z = self.z
        self.run: Callable[[Tensor], Tensor] = lambda y: y * (2 * z).to(y.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(y)


class HoldsOn(Plugin):
    """A deep copy follows the original's weights."""

    caught_by = "deepcopy_is_independent"
    also = {"save_load_same_logits", "save_load_in_a_fresh_process"}  # a loaded one follows a tensor on meta
    also |= {"composes_with_weights", "composes_with_norms", "composes_with_prompt"}
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Bound(site.out_features))


class _Site(_Scale):
    def __init__(self, site: BoundSite) -> None:
        super().__init__(site.out_features)
        self.site = site


class TakesTheStackAlong(Plugin):
    """A copy of the model copies the stack, through a site that a delta holds."""

    caught_by = "deepcopy_is_independent"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention"):
            site.attach(_Site(site))


class _Common(_Scale):
    factor: ClassVar[float] = 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * _Common.factor

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        return weight * _Common.factor, None if bias is None else bias * _Common.factor


class SharesAFactor(Plugin):
    """A number on the class belongs to all stacks at once."""

    caught_by = "two_stacks_at_once"
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        _Common.factor = 1.0 + 0.1 * stack.seed
        for site in model.linears("attention"):
            site.attach(_Common(site.out_features))


class _SetLate(_Scale):
    """y z s, where a first step sets s."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("s", torch.ones(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) * self.s.to(y.dtype)


class FoldsItsStart(Plugin):
    """Folds what it had before its first step."""

    caught_by = "merge_equals_unmerged"
    also = {"merge_in_bfloat16", "export_is_plain", "merge_rounds_once"}
    claims = {Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.deltas = [site.attach(_SetLate(site.out_features)) for site in model.linears("mlp.down")]

    @hookimpl(wrapper=True)
    def train_step(self) -> Generator[None, Tensor, Tensor]:
        for delta in self.deltas:
            delta.s.fill_(1.5)
        return (yield)
