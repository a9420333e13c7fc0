"""P-tuning: an LSTM or an MLP writes the soft prompt, in training only.

"GPT Understands, Too" (arXiv:2103.10385). For l trained vectors e and tokens X with embeddings E(X):

    LSTM    [P_1 ... P_l] = W_2 relu(W_1 [forward(e_1 ... e_i) ; backward(e_i ... e_l)] + b_1) + b_2    for each i
    MLP     P_i = W_3 relu(W_2 relu(W_1 e_i + b_1) + b_2) + b_3
    h_0     = [P ; E(X)]             loss = -log p(Y | [P ; X]), the model is frozen

so that rows of an LSTM's prompt depend on each other, where those of a plain prompt are found one by one. e and the
encoder train. With the last update of a run e becomes P and the encoder is gone: what is saved is l * d numbers, a
prompt like any other, which computes the same bits.

Departures: all rows stand before the text, where the paper's template has some between and behind its parts.
"""

from __future__ import annotations

from collections.abc import Generator
from copy import deepcopy
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import Claim, ModelView, PeftFormat, Plugin, PluginConfig, TrainStep, VirtualTokens, hookimpl
from peftx.peft_format import SOFT, Settings


class PTuningConfig(PluginConfig):
    """Options of p-tuning; the released code takes 9 rows for LAMA and trains with Adam at rate 1e-5."""

    length: int = Field(9, ge=1, description="l, rows in front of the input")
    encoder: Literal["lstm", "mlp"] = Field("lstm", description="what writes them")
    hidden: int | None = Field(
        None,
        ge=1,
        description="width of the encoder, of an LSTM in each direction; none: so that it is as wide as the model",
    )
    layers: int = Field(2, ge=1, description="of the LSTM")
    dropout: float = Field(0.0, ge=0, lt=1, description="between layers of the LSTM, while training")
    keep_encoder: bool = Field(
        False,
        description="keep the encoder when a run ends, to train on with it; `collapse()` throws it away then",
    )

    @model_validator(mode="after")
    def _fit(self) -> PTuningConfig:
        if self.encoder == "mlp" and (self.layers, self.dropout) != (2, 0.0):
            raise ValueError("layers and dropout are of the LSTM, and this is the MLP: leave them out")
        if self.dropout and self.layers == 1:
            raise ValueError("dropout acts between layers, and layers is 1: leave it out, or have more")
        return self


class PromptEncoder(VirtualTokens):
    """P out of e, both [l, d].

    `embedding` holds e, and `lstm_head` and `mlp_head` are the encoder; or `embedding` holds P, and there is none.

    Args:
        d: width of the model's embedding. config: None, of a prompt that was written.
    """

    def __init__(self, length: int, d: int, config: PTuningConfig | None) -> None:
        super().__init__(length)
        self.embedding = nn.Embedding(length, d)
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head = nn.Sequential()
        if config is None:
            return
        if config.encoder == "mlp":
            h = config.hidden or d
            self.mlp_head.extend((nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h)))
        else:
            each = config.hidden or -(-d // 2)
            h = 2 * each
            self.lstm_head = nn.LSTM(
                d, each, config.layers, dropout=config.dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head.append(nn.Linear(h, h))
        self.mlp_head.extend((nn.ReLU(), nn.Linear(h, d)))

    def rows(self) -> Tensor:
        x = self.embedding.weight
        if self.lstm_head is not None:
            with torch.backends.cudnn.flags(enabled=False):  # cuDNN's makes no gradients in evaluation mode
                x = self.lstm_head(x[None])[0][0]
        return self.mlp_head(x)

    @torch.no_grad()
    def collapse(self, dtype: torch.dtype) -> None:
        """Put P, as a model of this dtype computes it, in the place of e, and let the encoder go."""
        self.embedding.weight.copy_(deepcopy(self).to(dtype).eval().rows())
        self.lstm_head, self.mlp_head = None, nn.Sequential()


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says; the encoder is not in the file, its prompt is."""
    for name in SOFT:
        settings[name]
    encoder = str(settings.get("encoder_reparameterization_type", "MLP")).lower()
    layers, dropout = settings.get("encoder_num_layers", 2), settings.get("encoder_dropout", 0.0)
    found = {
        "length": settings["num_virtual_tokens"],
        "encoder": encoder,
        "hidden": settings["encoder_hidden_size"],
    }
    if encoder == "lstm":
        found |= {"layers": layers, "dropout": dropout if layers > 1 else 0.0}
    return found


def settings_of(config: PTuningConfig) -> dict[str, Any]:
    """For `adapter_config.json`."""
    return {
        "num_virtual_tokens": config.length,
        "num_transformer_submodules": 1,
        "encoder_reparameterization_type": config.encoder.upper(),
        "encoder_hidden_size": config.hidden,
        "encoder_num_layers": config.layers,
        "encoder_dropout": config.dropout,
    }


class PTuning(Plugin):
    """See the module."""

    Config = PTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("gemma",)
    config: PTuningConfig
    prompt: PromptEncoder
    peft = (
        PeftFormat(
            "P_TUNING",
            kept={"prompt.embedding.weight": "prompt_embeddings"},
            options=options_of,
            settings=settings_of,
            read=lambda prompt, own: {"embedding.weight": own["embedding.weight"][: prompt.length]},
            write=lambda prompt, own: {"embedding.weight": deepcopy(prompt).eval().rows()},
            prepare=lambda plugin, settings: plugin.collapse(),
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        site = model.embedding()
        if not model.restoring:
            self.state = {}
        config = None if self.state.get("collapsed") else self.config
        self.prompt = PromptEncoder(self.config.length, site.out_features, config).to(site.weight)
        model.prompt(self.prompt)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if not self.config.keep_encoder:
            step.at_end(self.collapse, self.prompt.embedding.weight)
        return (yield)

    def collapse(self, dtype: torch.dtype | None = None) -> None:
        """Throw the encoder away: what it writes is the prompt from now on. `stack.train` does it; a loop of your own
        has to."""
        self.prompt.collapse(dtype or self.prompt.embedding.weight.dtype)
        self.state["collapsed"] = True
