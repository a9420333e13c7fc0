"""Full fine-tuning: parameters of the base itself train, from the values that pretraining gave them.

"Universal Language Model Fine-tuning for Text Classification" (arXiv:1801.06146), section 3.2:

    theta_t = theta_{t-1} - eta * grad L(theta_{t-1})          theta_0: the pretrained model

Of all modules, or of those that `targets` selects: what HF PEFT saves beside an adapter as `modules_to_save`, `bias`
and `trainable_token_indices`. With `tokens` V of an embedding E [vocab, d] only the rows E_v, v in V, train.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, hookimpl
from peftx.errors import OptionError
from peftx.kernel.trained import Trained

TokenId = Annotated[int, Field(ge=0)]


class FullFinetuningConfig(PluginConfig):
    """Options of full fine-tuning. The learning rate is ten to a hundred times below that of an adapter."""

    targets: Targets = Field(
        Targets("re:."), description="modules that train; everything that has a role if left out"
    )
    parameters: Literal["all", "weight", "bias"] = Field(
        "all", description="which parameters of these modules"
    )
    tokens: tuple[TokenId, ...] = Field(
        (), description="of embeddings and heads, the rows of these ids alone; all rows if empty"
    )


class FullFinetuning(Plugin):
    """See the module."""

    Config = FullFinetuningConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE}
    architectures = ("gemma2", "mamba")
    config: FullFinetuningConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        trained = model.train(self.config.targets, named=self.wanted)
        if not trained:
            raise OptionError(
                f"full-finetuning: no module of '{self.config.targets}' has a parameter to train"
                + (f" among {self.config.parameters}" if self.config.parameters != "all" else ""),
                hint="other targets; a quantized layer has integers, which do not train",
            )
        for name, theta in trained.items() if self.config.tokens else ():
            theta.restrict(self.rows(name, theta))

    def wanted(self, name: str) -> bool:
        """Is a parameter of this name to train."""
        return self.config.parameters == "all" or ("bias" in name) == (self.config.parameters == "bias")

    def rows(self, name: str, theta: Trained) -> Tensor:
        """The entries of the tokens' rows, bool, as large as theta [vocab, d] (a head's bias: [vocab])."""
        highest, size = max(self.config.tokens), len(theta.theta)
        if highest >= size:
            raise OptionError(
                f"full-finetuning: token {highest}, and {name} has {size} rows",
                hint="tokens of an embedding or a head: targets 'embedding', 'head'",
            )
        mask = torch.zeros(theta.theta.shape, dtype=torch.bool, device=theta.start.device)
        mask[list(self.config.tokens)] = True
        return mask
