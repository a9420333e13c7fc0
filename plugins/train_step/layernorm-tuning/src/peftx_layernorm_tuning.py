"""LayerNorm tuning: only the norms train, or a small part of them.

"LayerNorm: A key component in parameter-efficient fine-tuning" (arXiv:2403.20284). Of each norm

    y = gamma * normalized(x) + beta          gamma, beta: [d]; an RMSNorm has no beta

gamma and beta train in place, everything else is frozen. With `fraction` k < 1 only the k n entries, of all n entries
theta_j together, that have the largest Fisher information train:

    F_j = 1/N sum_i (d L_i / d theta_j)**2        L_i: the loss of row i = 1..N; of a classifier, -log p(y_i | x_i)

F is estimated on the first N rows of the training, without dropout, during which no norm moves; then the mask is fixed.
A masked entry gets no gradient, and is put back after the optimizer's step, whatever weight decay did to it: it keeps
its bits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, TrainStep, hookimpl
from peftx.errors import BatchError, OptionError, TrainingError
from peftx.kernel.modes import eval_mode
from peftx.toolkits.injecting import check_share


class LayernormTuningConfig(PluginConfig):
    """Options of LayerNorm tuning. The learning rate is larger than for full tuning (1e-3 to 1e-2)."""

    targets: Targets = Field(
        Targets("norm"), description="norms to train; 'norm.mlp' for those at the MLPs alone"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="k, share of the norms' entries that train")
    fisher_rows: int = Field(
        128, ge=1, description="N, rows that the Fisher information is estimated on, if k < 1"
    )
    head: bool = Field(False, description="train the classification head too, all of it")


class Subset(nn.Module):
    """Which entries train; saved with the plugin.

    Args:
        entries: n.
    """

    fisher: Tensor
    """Sum over rows of squared gradients, [n] float32."""
    rows: Tensor
    mask: Tensor
    """[n]; all false until the rows are seen."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.register_buffer("fisher", torch.zeros(entries))
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.zeros(entries, dtype=torch.bool))

    @property
    def chosen(self) -> bool:
        return bool(self.mask.any())

    def choose(self, count: int) -> None:
        """Fix the mask: the `count` entries of largest F; of equal ones the first."""
        if not (self.fisher.isfinite().all() and self.fisher.any()):
            raise TrainingError(
                f"layernorm-tuning: the Fisher information of {int(self.rows)} rows is zero or not finite",
                hint="the loss must depend on the norms, and be finite",
            )
        self.mask[self.fisher.argsort(descending=True, stable=True)[:count]] = True


class LayernormTuning(Plugin):
    """See the module."""

    Config = LayernormTuningConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.BESIDE_WEIGHTS, Claim.NEEDS_GRADIENTS}
    architectures = ("gemma2", "mamba")
    config: LayernormTuningConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        # Not `model_fields_set`: the pipeline in a bundle names every option, and must stay good.
        default = LayernormTuningConfig.model_fields["fisher_rows"].default
        if self.config.fraction == 1 and self.config.fisher_rows != default:
            raise OptionError(
                f"layernorm-tuning: fisher_rows {self.config.fisher_rows}, but all entries train, and none is chosen",
                hint="leave fisher_rows out, or a fraction below 1",
            )
        self.sites = model.norms(self.config.targets)
        entries = sum(p.numel() for site in self.sites for p in site.train())
        check_share(f"{model.owner}: fraction", self.config.fraction, entries, "the norms")
        if self.config.fraction < 1:
            self.subset = model.keep("subset", Subset(entries)).float()  # squares of gradients need float32
        if self.config.head:
            for site in model.linears("classifier"):
                site.train()

    @property
    def norms(self) -> list[nn.Parameter]:
        """In the order of the mask's entries; read anew, since a bundle that is loaded puts others in their places."""
        return [p for site in self.sites for p in site.module.parameters(recurse=False)]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        # Not while frozen, as beside an adapter that trains alone.
        if self.config.fraction < 1 and all(p.requires_grad for p in self.norms):
            if not self.subset.chosen:
                self.estimate(step)
            step.on_gradients(lambda _: self.restrict(step))
        return (yield)

    def estimate(self, step: TrainStep) -> None:
        """Go on with F, and choose once the rows are seen."""
        rows, seen = list(rows_of(step.batch)), int(self.subset.rows)
        if step.index == 0 and step.first_micro and step.total is not None:
            self.check_length(step, seen + step.total * step.accumulation * len(rows))
        with eval_mode(step.model):
            for row in rows[: self.config.fisher_rows - seen]:
                # Not in place: a cast of the model may have cast the sum, which is float32 again with what comes.
                self.subset.fisher = self.subset.fisher + squared_gradients(step, row, self.norms)
                self.subset.rows += 1
        if self.subset.rows >= self.config.fisher_rows:
            self.subset.choose(round(self.config.fraction * len(self.subset.fisher)))
        elif step.index + 1 == step.total and step.last_micro:  # batches were smaller than the first
            self.check_length(step, int(self.subset.rows))

    def check_length(self, step: TrainStep, rows: int) -> None:
        """Refuse a run that ends after `rows` rows with no mask, and so trains nothing."""
        if rows < self.config.fisher_rows:
            raise OptionError(
                f"layernorm-tuning: fisher_rows is {self.config.fisher_rows}, and the training ends after {rows} rows "
                f"(steps: {step.total}), before any norm trains",
                hint=f"fisher_rows below {rows}, or more steps",
            )

    def restrict(self, step: TrainStep) -> None:
        """Clear the gradient of masked entries, and put back what the optimizer does to them: it skips a parameter
        without a gradient, but decays the whole of one that has any."""
        masks = self.subset.mask.split([p.numel() for p in self.norms])
        kept = [(p, mask.view_as(p), p.detach().clone()) for p, mask in zip(self.norms, masks, strict=True)]
        for p, mask, _ in kept:
            p.grad = p.grad * mask if p.grad is not None and self.subset.chosen else None

        @torch.no_grad()
        def put_back(optimizer: torch.optim.Optimizer) -> None:
            for p, mask, before in kept:
                p.copy_(torch.where(mask, p, before))

        step.after_update(put_back)


def rows_of(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch's rows, as batches of one."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    for i in range(len(next(iter(tensors.values())))):
        yield {**batch, **{name: tensor[i : i + 1] for name, tensor in tensors.items()}}


def squared_gradients(step: TrainStep, row: dict[str, Any], parameters: Sequence[nn.Parameter]) -> Tensor:
    """(d L_i / d theta)**2 of one row, [n] float32."""
    loss = step.model(**row).loss
    if loss is None:
        raise BatchError("layernorm-tuning: the model returned no loss", hint="the batch needs 'labels'")
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([g.float().flatten() for g in gradients]).square()
