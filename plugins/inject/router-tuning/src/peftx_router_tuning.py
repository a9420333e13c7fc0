"""Router-Tuning: one trained vector a layer decides whether a text skips its attention.

"Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers" (arXiv:2410.13184), with its
MindSkip: attention of dynamic depth. In a routed layer, for a text whose tokens come out of the norm before the
attention as h_1 .. h_T,

    s = sigmoid(w . mean_t h_t)                  w: [d], 0 at the start, all that trains
    G = 1 if s >= tau else 0
    x <- x + G Attn(h)                           the feed-forward part is never skipped
    loss = task + c mean_l G_l                   over routed layers and texts

Backward, G passes its gradient on to s (straight through), so in training a text with G = 0 goes through the attention
too, and is given zeros: the task tells its router what was missed. With `straight: false` it does not go through, which
saves the time, and only the second term teaches its router. Routed are layers before the last one, which is not. In
generation the prompt decides: G goes along with the cache. w = 0 gives s = 1/2 >= tau, so the model starts unchanged.

Departures: the released code does as with `straight: false`, where only other texts can open a gate again. It counts
pads in the mean and sums the second term over layers; here neither. In a batch with a cache whose texts disagree, all
go through the attention; a skipped layer keeps one number a token in the cache, so that lengths stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.errors import ArchitectureError
from peftx.kernel.call import Call
from peftx.toolkits.injecting import Router, routings, watching


class RouterTuningConfig(PluginConfig):
    """Options of Router-Tuning; the paper routes 16 of 32 layers."""

    share: float = Field(0.5, gt=0, le=1, description="of the layers that are routed: those before the last")
    tau: float = Field(
        0.5,
        ge=0,
        le=0.5,
        description="tau, score from which a layer attends; above 0.5 none would at the start",
    )
    straight: bool = Field(
        True,
        description="in training texts with G = 0 go through too, so that the task teaches their routers",
    )
    c: float = Field(
        0.08, ge=0, allow_inf_nan=False, description="c, weight of the mean share of layers that attend"
    )


class TextRouter(Router):
    """h -> G Attn(h), one G a text.

    Args:
        width: d. layer: the block's. tau: tau. call: of the model. name: of G in the cache.
    """

    def __init__(self, width: int, *, layer: int, tau: float, straight: bool, call: Call, name: str) -> None:
        super().__init__(call)
        self.w = nn.Parameter(torch.zeros(width))
        self.layer, self.tau, self.straight, self.name = layer, tau, straight, name

    def around(self, inner: Callable[..., Any], h: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        s = self.score(h)
        G = self.of_prompt((s >= self.tau).to(s)) + (s - s.detach())
        self.tell(lambda: G, G, self.w)
        through = (G > 0) | (self.straight and G.requires_grad)
        out, *rest = self.call.on_rows(through, self.layer, inner, h, *args, **kwargs)
        return out * G.to(out.dtype)[:, None, None], *rest

    def score(self, h: Tensor) -> Tensor:
        """s of each text, [B]: w . mean_t h_t is mean_t w . h_t, over its real tokens."""
        logits = h.to(self.w.dtype) @ self.w  # [B, T]
        real = self.call.real
        weights = torch.ones_like(logits) if real is None else self.call.rows(real.to(logits), like=logits)
        return torch.sigmoid((weights * logits).sum(1) / weights.sum(1).clamp(min=1))

    def of_prompt(self, G: Tensor) -> Tensor:
        """What the text's first call decided, which goes along with the cache; this one's G if it is the first, [B]."""
        if self.call.shape is None:
            return G
        new = G[:, None].expand(self.call.shape)  # [B, T]
        past = self.call.carry(self.name, torch.zeros_like(new))[:, : -new.shape[1]]
        if past.shape[1]:
            return past.amax(1)  # later tokens, and soft ones, say 0
        self.call.carry(self.name, new)
        return G


class RouterTuning(Plugin):
    """See the module."""

    Config = RouterTuningConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    architectures = ("mixtral", "gemma2")
    refuses = {
        "bert": "its attention adds to the residual in a layer of its own",
        "t5": "position biases come out of the first layer's attention",
        "bloom": "its attention adds the residual itself",
        "mamba": "it has no attention",
        "gemma4": "layers use the keys and values of others",
    }
    exempt = {  # the others decide alike on these texts
        f"{arch}-cached_equals_uncached": "without a cache each step decides anew, by prompt and answer"
        for arch in ("gpt2", "qwen2")
    }
    config: RouterTuningConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        blocks = model.blocks("attention", tower=model.main.name)
        sites = [site for site in blocks if site.path in model.main.attention]
        shared = model.config.get_text_config().to_dict().get("num_kv_shared_layers")
        if model.config.is_encoder_decoder or shared or len(sites) < 2:
            raise ArchitectureError(
                f"router-tuning: {model.config.model_type} has no attention blocks that can be left out: two at least, "
                "of one tower, with keys and values of their own, that only add to the residual",
                hint="a decoder such as Llama, Qwen or GPT-2",
            )
        count = min(max(1, round(self.config.share * len(sites))), len(sites) - 1)
        for site in sites[-1 - count : -1]:
            name = f"{model.owner}.{site.layer}"
            options = {"tau": self.config.tau, "straight": self.config.straight}
            site.attach(
                TextRouter(model.hidden_size, layer=site.layer, call=model.call, name=name, **options)
            )

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        id = step.stack.id_of(self)
        with watching(step, self) as routers:
            attending = lambda _: torch.stack([G.mean() for G in routings(id, routers)]).mean()  # noqa: E731
            step.add_loss(id, attending, weight=self.config.c, over="rows")
            return (yield)
