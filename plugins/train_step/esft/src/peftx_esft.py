"""ESFT: of a mixture of experts, those train that the task comes to; the rest keeps its bits.

"Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural Large Language Models"
(arXiv:2407.01906). Before the first step the model reads a sample of the task's texts, n tokens. In a layer whose
router sends each token to K of E experts with gates g,

    ESFT-Gate     s_e = 1/n sum over tokens of g_e              g_e = 0 where e is not chosen
    ESFT-Token    s_e = 1/n sum over tokens of 1[e chosen] / K

and s is divided by its sum over the layer's experts. The layer's experts of largest s train, as few as come to

    sum of s_e >= p                                              p = 0.1 by gates, 0.2 by tokens

with all of their weights. All other experts, routers, attention, shared experts and embeddings are as they were, to the
bit. How many experts a layer trains, and which, is the task's.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, TrainStep, hookimpl
from peftx.engines.bundle.sparse import packed_at_most
from peftx.errors import ArchitectureError, TrainingError
from peftx.kernel.call import Call
from peftx.kernel.modes import eval_mode
from peftx.kernel.slots import base_class

SHARES = {"gate": 0.1, "token": 0.2}
"""p of the paper."""


class EsftConfig(PluginConfig):
    """Options of ESFT; the paper trains at 1e-5."""

    score: Literal["gate", "token"] = Field(
        "gate", description="relevance: the mean gate of an expert, or how often it is chosen"
    )
    p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the relevance that trains; 0.1 by gate, 0.2 by token if left out",
    )
    rows: int = Field(32, ge=1, description="rows of the training data in the sample (paper: of 4096 tokens)")
    beside: Targets | None = Field(
        None, description="layers that train beside the experts, whole: 'shared_experts', 'attention norm'"
    )


class Esft(Plugin):
    """See the module.

    Attributes:
        state: `experts`, path of a layer's experts -> the numbers of those that train; `scores`, path -> s.
    """

    Config = EsftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS}
    architectures = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
    refuses = dict.fromkeys(("llama", "gpt2", "qwen2", "bert", "t5"), "it has no experts") | {
        "llama4": "its experts are not told which tokens they get"
    }
    config: EsftConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        found = {site.path: site.module for site in model.anatomy.sites if site.kind == "experts"}
        # (self, states, places, gates): what every mixture in transformers hands to its experts, but Llama 4's.
        told = [len(inspect.signature(base_class(m).forward).parameters) >= 4 for m in found.values()]
        if not found or not all(told):
            raise ArchitectureError(
                f"esft: {model.config.model_type} has no experts that a router sends tokens to, as matrices that train",
                hint="a mixture of experts such as Mixtral, OLMoE, Qwen3-MoE or DeepSeek, not quantized",
            )
        self.call: Call = model.call
        self.experts = {path: model.train(f"re:^{re.escape(path)}$") for path in found}
        self.others = {} if self.config.beside is None else model.train(self.config.beside)

    def p(self) -> float:
        return SHARES[self.config.score] if self.config.p is None else self.config.p

    def changed_bytes(self) -> int:
        """The ceil(p E) experts of the highest scores have p of them, if not fewer do."""
        own = [place.theta for places in self.experts.values() for place in places.values()]
        beside = sum(place.theta.nbytes for place in self.others.values())
        return beside + sum(
            packed_at_most([theta], math.ceil(round(self.p() * len(theta), 9)) * theta[0].numel())
            for theta in own
        )

    def bytes_hang_on(self) -> str:
        return "at most: the fewer experts have most of the relevance, the less"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if "experts" not in self.state:
            scores = self.relevance(step)
            self.state["experts"] = {path: select(s, self.p()) for path, s in scores.items()}
            self.state["scores"] = {path: s.tolist() for path, s in scores.items()}
        for path, chosen in self.state["experts"].items():
            for place in self.experts[
                path
            ].values():  # [E, ...] each; said anew, since a bundle holds no masks
                mask = torch.zeros(len(place.theta), dtype=torch.bool, device=place.theta.device)
                mask[chosen] = True
                place.restrict(mask.view(-1, *[1] * (place.theta.ndim - 1)).expand_as(place.theta))
        return (yield)

    def relevance(self, step: TrainStep) -> dict[str, Tensor]:
        """s of each layer, [E] float64, sum 1; of the sample, or of the first batch where no `train` rows are given.

        Raises:
            PeftxError: no token came to the experts of a layer.
        """
        batches = step.sample(self.config.rows, by="esft")
        sums: dict[str, Tensor] = {}
        with torch.no_grad(), eval_mode(step.model), ExitStack() as exits:
            for path, places in self.experts.items():
                first = next(iter(places.values())).theta
                sums[path] = torch.zeros(len(first), dtype=torch.float64, device=first.device)
                hook = step.model.get_submodule(path).register_forward_pre_hook(
                    partial(self.count, sums[path])
                )
                exits.callback(hook.remove)
            for batch in batches:
                step.model(**batch)
        for path, found in sums.items():
            if not found.sum() > 0:  # not a number too
                raise TrainingError(
                    f"esft: the relevance of the experts in {path} is {float(found.sum())} on the sample",
                    hint="more rows; no plugin that leaves the layer out; a model whose outputs are finite",
                )
        return {path: (found / found.sum()).cpu() for path, found in sums.items()}

    def count(self, sums: Tensor, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add what the tokens of one call say; pads and soft tokens say nothing."""
        places, gates = args[1:3]  # [B T, K] both
        real = self.call.real
        if real is not None:
            rows = places.view(len(real), -1, places.shape[-1])
            kept = self.call.rows(real, like=rows, fill=False).flatten()
            places, gates = places[kept], gates[kept]
        says = gates if self.config.score == "gate" else torch.ones_like(gates)
        sums.index_add_(0, places.flatten(), says.flatten().to(sums))


def select(scores: Tensor, p: float) -> list[int]:
    """As few experts as come to the share p of the scores, the largest first; of equal ones that of lower number."""
    order = scores.argsort(descending=True, stable=True)
    cumulative = scores[order].cumsum(0)
    enough = p * cumulative[-1] * (1 - 1e-9)  # 0.1 + 0.2 is to come to 0.3
    return sorted(order[: int((cumulative < enough).sum()) + 1].tolist())
