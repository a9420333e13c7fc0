"""Prefix-tuning: a network writes keys and values in front of every attention, in training only.

"Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv:2101.00190). Activations of l tokens that are none
stand before the text in every layer, and the model is frozen. In an attention:

    P     = W_2 tanh(W_1 P' + b_1) + b_2     P': [l, k], W_1: [h, k], W_2: [widths of all keys and values, h]
    K' = [P_K ; K],  V' = [P_V ; V]          P_K, P_V: [heads, l, head size], the attention's own part of P
    position of token t = l + t              the prefix stands before the text, also in its positions

P' and the network train; with the last update of a run P takes the place of both, and computes the same bits. Without
`hidden` P trains as it is. P-Tuning v2 differs: it leaves the text's positions as they are, drops out numbers of the
prefix, keeps its network in the bundle, and by default has none.

An encoder-decoder model has a prefix in both towers, each of a network of its own, as [PREFIX ; x ; PREFIX' ; y] says.
Positions are counted on in decoders alone: an encoder has no cache whose rows could count.
"""

from __future__ import annotations

from collections.abc import Generator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    BoundSite,
    Claim,
    ModelView,
    PeftFormat,
    Plugin,
    PluginConfig,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.errors import AdapterError
from peftx.peft_format import SOFT, Settings
from peftx.toolkits.injecting import NetworkPrefix, columns


class PrefixTuningConfig(PluginConfig):
    """Options of prefix-tuning; the paper takes 10 rows for table-to-text and 200 for summarization, h of 512 and 800,
    and trains with AdamW at rate 5e-5."""

    length: int = Field(10, ge=1, description="l, rows in front of each layer's keys and values")
    hidden: int | None = Field(
        512, ge=1, description="h, width of the network that makes the prefix; none: it trains as it is"
    )
    targets: Targets = Field(
        Targets("attention"),
        description="attentions that get a prefix, as in 'attention layers=-2,-1' or 'attention cross_attention'",
    )
    keep_network: bool = Field(
        False,
        description="keep the network when a run ends, to train on with it; `collapse()` throws it away then",
    )


class PrefixEncoder(nn.Module):
    """P of all attentions of one tower, [l, widths]: in each attention all of its keys, then all of its values.

    `embedding` holds P' and `transform` is the network; or `embedding` holds P, and there is no network.

    Args:
        length: l. width: k. hidden: h, or none. widths: numbers of all keys and values.
    """

    def __init__(self, length: int, width: int, hidden: int | None, widths: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, widths if hidden is None else width)
        self.transform = (
            nn.Sequential()
            if hidden is None
            else nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, widths))
        )

    def forward(self, part: slice) -> Tensor:
        """The columns of one attention, [l, its width]."""
        P = self.embedding.weight
        if not len(self.transform):
            return P[:, part]
        up = self.transform[2]
        return F.linear(self.transform[:2](P), up.weight[part], up.bias[part])

    @torch.no_grad()
    def collapse(self, parts: list[slice], dtype: torch.dtype) -> None:
        """Put P, as a model of this dtype computes it, in the place of P', and let the network go."""
        own = deepcopy(self).to(dtype)
        P = torch.cat([own(part) for part in parts], 1)
        self.embedding.weight = nn.Parameter(P, requires_grad=self.embedding.weight.requires_grad)
        self.transform = nn.Sequential()


EVERY = "attention"


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says; the network is not in the file, its prefix is."""
    if settings["task_type"] == "SEQ_2_SEQ_LM" or settings["num_transformer_submodules"] == 2:
        raise AdapterError(
            "prefix-tuning: the adapter is of an encoder-decoder, where PEFT's stands in the decoder and its cross "
            "attention, the plugin's in both towers",
            hint="use it with PEFT",
        )
    for name in SOFT:
        settings[name]
    hidden, projected = settings["encoder_hidden_size"], settings["prefix_projection"]
    return {
        "length": settings["num_virtual_tokens"],
        "hidden": (hidden or settings["token_dim"]) if projected else None,
        "targets": EVERY,
    }


def settings_of(config: PrefixTuningConfig) -> dict[str, Any]:
    """For `adapter_config.json`."""
    return {
        "num_virtual_tokens": config.length,
        "num_transformer_submodules": 1,
        "prefix_projection": config.hidden is not None,
        "encoder_hidden_size": config.hidden,
    }


class PrefixTuning(Plugin):
    """See the module."""

    Config = PrefixTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.PREFIX_CACHE}
    architectures = ("deepseek_v3", "gemma4")
    refuses = {"mamba": "it has no attention", "bloom": "its attention is not looked up by name"}
    config: PrefixTuningConfig
    peft = (
        PeftFormat(
            "PREFIX_TUNING",
            kept={"decoder_attention.embedding.weight": "prompt_embeddings"},
            options=options_of,
            settings=settings_of,
            write=lambda encoder, own: {"embedding.weight": encoder(slice(None))},
            prepare=lambda plugin, settings: plugin.collapse(),
            written=lambda config: str(config.targets) == EVERY,
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        length, depth = self.config.length, max(tower.layers for tower in model.towers.values())
        if not model.restoring:
            self.state = {}
        hidden = None if self.state.get("collapsed") else self.config.hidden
        self.encoders: list[tuple[PrefixEncoder, list[slice]]] = []
        towers: dict[str, list[BoundSite]] = {}
        for site in self.config.targets.select(model.attentions(), layers=depth):
            towers.setdefault(f"{site.tower}_{site.role}", []).append(site)
        for name, sites in towers.items():
            parts, n = columns(model, sites), model.heads_of(sites[0])
            encoder = PrefixEncoder(length, n.kv_heads * n.head_dim, hidden, parts[-1].stop)
            self.encoders.append((model.keep(name, encoder), parts))
            for site, part in zip(sites, parts, strict=True):
                site.attend(NetworkPrefix(encoder, part, model.call, f"{model.owner}.{site.path}"))
        if model.main.name == "decoder" and not model.config.is_encoder_decoder:
            model.shift_positions(length)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if not self.config.keep_network:
            step.at_end(self.collapse, self.encoders[0][0].embedding.weight)
        return (yield)

    def collapse(self, dtype: torch.dtype | None = None) -> None:
        """Throw the network away: what it computes is the prefix from now on. `stack.train` does it; a loop of your own
        has to."""
        for encoder, parts in self.encoders:
            if len(encoder.transform):
                encoder.collapse(parts, dtype or encoder.embedding.weight.dtype)
        self.state["collapsed"] = True
