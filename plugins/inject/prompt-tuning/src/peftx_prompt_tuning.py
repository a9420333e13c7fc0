"""Prompt tuning: trained embeddings in front of the input of a frozen model.

"The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv:2104.08691). For n tokens X with embeddings E(X):

    h_0 = [P ; E(X)]            P: [l, d], trained; E(X): [n, d], frozen
    loss = -log p(Y | [P ; X])

l is the length, d the width of the embedding. The rows of P count as tokens: the mask grows by l ones, and positions go
on behind them. In an encoder-decoder model they stand before the encoder's input. P starts as (section 3.2)

    uniform      U(-0.5, 0.5)
    vocabulary   embeddings of tokens drawn among the most frequent ones, here the lowest ids
    text         embeddings of the tokens of a string, one a row
    labels       embeddings of class labels, one a row, the mean where a label has several tokens

and rows that text or labels leave over come from the vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, PeftFormat, Plugin, PluginConfig, Site, Stack, VirtualTokens, hookimpl
from peftx.errors import OptionError
from peftx.kernel.positions import free_positions
from peftx.peft_format import SOFT, Settings

BOUND = 0.5
"""Of the uniform start."""
FREQUENT = 5000
"""Of the vocabulary start."""


class PromptTuningConfig(PluginConfig):
    """Options of prompt tuning; the paper trains 100 rows that start as class labels, with Adafactor at rate 0.3."""

    length: int = Field(20, ge=1, description="l, rows in front of the input (paper: 100)")
    init: Literal["uniform", "vocabulary", "text", "labels"] = Field(
        "vocabulary", description="what the rows start as"
    )
    frequent: int = Field(
        FREQUENT, ge=1, description="tokens that vocabulary rows are drawn among: the lowest ids"
    )
    text: str | None = Field(None, description="the string of init: text")
    labels: tuple[str, ...] = Field(
        (), description="the class labels of init: labels, as the model writes them"
    )


class SoftPrompt(VirtualTokens):
    """P.

    Args:
        start: first values, [l, d].
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start)

    def rows(self) -> Tensor:
        return self.P


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says; how its rows began is of no account any more."""
    start = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
    for name in (*SOFT, *start):
        settings[name]
    return {"length": settings["num_virtual_tokens"], "init": "uniform"}


class PromptTuning(Plugin):
    """See the module."""

    Config = PromptTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("gemma",)
    config: PromptTuningConfig
    peft = (
        PeftFormat(
            "PROMPT_TUNING",
            kept={"prompt.P": "prompt_embeddings"},
            options=options_of,
            settings=lambda config: {"num_virtual_tokens": config.length, "num_transformer_submodules": 1},
            read=lambda prompt, own: {"P": own["P"][: prompt.length]},  # PEFT has unused rows for a decoder
        ),
    )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self._check(model)
        site = model.embedding()
        if model.restoring:
            start = torch.zeros(self.config.length, site.out_features)
        elif self.config.init == "uniform":
            start = torch.empty(self.config.length, site.out_features).uniform_(-BOUND, BOUND)
        else:
            start = self._embedded(site, stack)
        model.prompt(SoftPrompt(start.to(site.weight)))

    def _check(self, model: ModelView) -> None:
        for name, value in (("text", self.config.text), ("labels", self.config.labels)):
            if (self.config.init == name) != bool(value):
                raise OptionError(
                    f"prompt-tuning: init is '{self.config.init}', but {name} is {'given' if value else 'empty'}",
                    hint=f"init: {name} goes with {name}, and {name} with nothing else",
                )
        # Not `model_fields_set`: the pipeline in a bundle names every option, and must stay good.
        if self.config.init == "uniform" and self.config.frequent != FREQUENT:
            raise OptionError(
                f"prompt-tuning: frequent {self.config.frequent}, but init is 'uniform', which draws no tokens",
                hint="leave frequent out, or another init",
            )
        room = free_positions(model.module)
        if room is not None and self.config.length >= room:
            raise OptionError(
                f"prompt-tuning: length {self.config.length} leaves no room in the model's {room} free positions",
                hint="a shorter prompt; the paper gains little beyond 20 rows",
            )

    @torch.no_grad()
    def _embedded(self, site: Site, stack: Stack) -> Tensor:
        """First values of P out of the embedding, as the model calls it (Gemma's scales what it looks up): [l, d]."""
        length = self.config.length
        among = min(self.config.frequent, len(site.weight))
        # None twice while there are enough.
        draw = (
            torch.randperm(among, device="cpu")
            if length <= among
            else torch.randint(among, (length,), device="cpu")
        )
        drawn = draw[:length]
        rows = [[int(id)] for id in drawn]
        if self.config.init != "vocabulary":
            named = self._named(stack)
            rows[: len(named)] = named
        device = site.weight.device
        return torch.stack([site.module(torch.tensor(ids, device=device)).mean(0) for ids in rows])

    def _named(self, stack: Stack) -> list[list[int]]:
        """Token ids of each row that text or labels give: one, or all of a label's."""
        init, length = self.config.init, self.config.length
        words = self.config.labels if init == "labels" else (str(self.config.text),)
        tokens = [stack.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, ids in zip(words, tokens, strict=True):
            if not ids:
                raise OptionError(f"prompt-tuning: {init}: {word!r} has no tokens", hint="leave it out")
        rows = tokens if init == "labels" else [[id] for id in tokens[0]]
        if len(rows) > length:
            what = "labels" if init == "labels" else "tokens of text"
            raise OptionError(
                f"prompt-tuning: {len(rows)} {what} in length {length}", hint=f"length: {len(rows)} or more"
            )
        return rows
