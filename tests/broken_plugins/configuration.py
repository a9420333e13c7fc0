"""Plugins whose options, hooks or claims are declared wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import ConfigDict, Field, field_serializer
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, hookimpl

if TYPE_CHECKING:
    from peftx.stack import Stack


class _Shift(Delta):
    """y + s b, b: [out], starts at zero."""

    def __init__(self, features: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.b = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * self.b.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shift = self.scale * self.b.to(weight.dtype)
        return weight, shift if bias is None else bias + shift


def _attach(model: ModelView) -> None:
    for site in model.linears("mlp"):
        site.attach(_Shift(site.out_features))


class RoundsOptions(Plugin):
    """Its scale loses digits on the way to JSON."""

    caught_by = "config_round_trip"
    also = {"save_load_same_logits"}  # a bundle's options are JSON

    class Config(PluginConfig):
        scale: float = Field(1.2345, description="scale")

        @field_serializer("scale")
        def _short(self, value: float) -> float:
            return round(value, 1)

    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)


class HidesAnOption(Plugin):
    """An option without a description."""

    caught_by = "config_schema"

    class Config(PluginConfig):
        scale: float = 1.0

    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)


class TakesAnything(Plugin):
    """Options that do not exist are dropped in silence."""

    caught_by = "unknown_option_refused"

    class Config(PluginConfig):
        model_config = ConfigDict(frozen=True, extra="ignore")

    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)


class ChangesItsMind(Plugin):
    """A configuration that can be written to."""

    caught_by = "config_is_frozen"

    class Config(PluginConfig):
        model_config = ConfigDict(frozen=False, extra="forbid")

    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)


class ForgetsTheMark(Plugin):
    """`evaluate` without @hookimpl never runs."""

    caught_by = "hook_signatures"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)

    def evaluate(self, evaluation: object) -> None: ...


class PushesAhead(Plugin):
    """`tryfirst` would break the order of the stack."""

    caught_by = "hook_signatures"
    whole_kit = False  # nothing can be built with it

    @hookimpl(tryfirst=True)
    def inject(self, model: ModelView, stack: Stack) -> None: ...


class ClaimsTooMuch(Plugin):
    """Claims lossless decoding, and does not decode."""

    caught_by = "claims_fit_hooks"
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.LOSSLESS_DECODING}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)


class SetLater(Plugin):
    """What it says of itself is set behind its class, where nobody sees it who does not import the file."""

    caught_by = "outline_says_the_same"

    @hookimpl
    def inject(self, model: ModelView) -> None:
        _attach(model)


def _say() -> bool:
    SetLater.claims = frozenset({Claim.IDENTITY_AT_START, Claim.MERGEABLE})
    return True


SAID = _say()
