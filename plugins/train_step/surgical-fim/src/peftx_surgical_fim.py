"""Surgical fine-tuning: the few layers with the most Fisher information train.

"On Surgical Fine-tuning for Language Encoders" (arXiv:2310.17041). Before the first step, on N rows (x, y) that the
run's seed draws from the training data, one row at a time, the base without dropout and other plugins:

    F_t = 1/N sum over rows of (d log p(y | x) / dt)**2       of each parameter t of a layer, entry by entry
    s_l = sum over t in layer l of ||F_t||_F                  of tensors, not of all entries at once

The layers of largest s train, whole, with the ordinary loss; the other layers are frozen, to the bit. Embeddings, final
norm, pooler and head train too (`outside`). Below the lowest of all that trains no backward pass runs.

log p(y | x) is minus the row's loss: that of its class, or the mean of that of its labelled tokens.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Evaluation, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.engines.training.base import base_alone
from peftx.errors import ConflictError, OptionError, TrainingError
from peftx.kernel.modes import eval_mode


class SurgicalFimConfig(PluginConfig):
    """Options of surgical fine-tuning. The learning rate is that of full tuning (5e-5)."""

    layers: int = Field(5, ge=1, description="layers that train, those of the largest scores")
    samples: int = Field(100, ge=1, description="N, rows that the scores are estimated on")
    outside: bool = Field(
        True, description="train what stands outside of the layers too: embeddings, final norm, pooler, head"
    )


class SurgicalFim(Plugin):
    """See the module.

    Attributes:
        state: `layers`, paths of the layers that train; `scores`, path -> s_l.
    """

    Config = SurgicalFimConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.TRAINS_BASE,
        Claim.NEEDS_GRADIENTS,
        Claim.NEEDS_LABELS,
        Claim.TAKES_WEIGHTS,
    }
    architectures = ("roberta", "mixtral")
    exempt = {"scores_are_finite": "the scores are of the training that chooses the layers"}
    example = {"layers": 1}
    config: SurgicalFimConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        paths = [site.path for site in model.anatomy.sites if site.role == "block.layer"]
        packed = [site.path for site in model.anatomy.sites if site.kind == "quantized"]
        if packed:
            raise ConflictError(
                f"surgical-fim: {packed[0]} is quantized, and integers do not train",
                hint="put surgical-fim before the plugin that quantizes",
            )
        if self.config.layers > len(paths):
            raise OptionError(
                f"surgical-fim: layers is {self.config.layers}, and the model has {len(paths)}",
                hint=f"at most {len(paths)}, all of which is full fine-tuning",
            )
        self.layers = {path: model.train(f"re:^{re.escape(path)}[.]") for path in paths}
        others = f"re:^(?!({'|'.join(map(re.escape, paths))})[.])"
        self.outside = model.train(others) if self.config.outside else {}

    def parameters(self, path: str) -> list[nn.Parameter]:
        """Of a layer; read anew, since a bundle that is loaded puts others in their places."""
        return [place.theta for place in self.layers[path].values()]

    def changed_bytes(self) -> int:
        """Of the largest layers, since it is not known which ones are chosen, and of what trains outside."""
        sizes = [sum(p.nbytes for p in self.parameters(path)) for path in self.layers]
        outside = sum(place.theta.nbytes for place in self.outside.values())
        return sum(sorted(sizes)[-self.config.layers :]) + outside

    def bytes_hang_on(self) -> str:
        return (
            "at most: of what is outside the layers, numbers that do not change are not stored"
            if self.outside
            else ""
        )

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        trains = any(p.requires_grad for path in self.layers for p in self.parameters(path))
        if "layers" not in self.state and trains:
            scores = self.scores(step)
            best = sorted(scores, key=lambda path: -scores[path])[
                : self.config.layers
            ]  # of equal ones the lower
            self.state |= {"scores": scores, "layers": [path for path in scores if path in best]}
            for p in self.finished():
                p.requires_grad_(False)
                p.grad = None
        return (yield)

    def finished(self) -> Iterable[nn.Parameter]:
        left_out = [path for path in self.layers if path not in self.state.get("layers", self.layers)]
        return chain.from_iterable(map(self.parameters, left_out))

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `fisher/<layer>`, s_l of each layer once they are chosen, with what became of the layer as its unit."""
        for path, score in self.state.get("scores", {}).items():
            evaluation.add(
                f"fisher/{path}", score, unit="trains" if path in self.state["layers"] else "frozen"
            )

    def scores(self, step: TrainStep) -> dict[str, float]:
        """s_l of each layer; in a loop that gives no `train` rows those of its first batch are the sample.

        Raises:
            PeftxError: a row has no loss, or one that is not finite.
        """
        batches = step.sample(self.config.samples, by="surgical-fim")
        # Of the base: what others attached may watch every pass with gradients, for a loss of this step.
        with base_alone(step.stack), eval_mode(step.model), torch.enable_grad(), ExitStack() as exits:
            tensors = {path: self.parameters(path) for path in self.layers}
            every = list(chain.from_iterable(tensors.values()))
            for p in every:
                exits.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(True)
            squares, count = [torch.zeros_like(p, dtype=torch.float32) for p in every], 0
            for count, row in enumerate(
                islice(chain.from_iterable(map(rows_of, batches)), self.config.samples), 1
            ):
                loss = step.model(**row).loss
                if loss is None or not loss.isfinite():
                    shown = loss if loss is None else float(loss.detach())
                    raise TrainingError(
                        f"surgical-fim: row {count} of the sample has the loss {shown}",
                        hint="rows with labels, and a model whose outputs are finite",
                    )
                gradients = torch.autograd.grad(loss, every, materialize_grads=True)
                for F, g in zip(squares, gradients, strict=True):
                    F += g.float().square()
        norms = iter([float((F / count).norm()) for F in squares])
        return {path: sum(islice(norms, len(own))) for path, own in tensors.items()}


def rows_of(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch's rows, as batches of one."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    for i in range(len(next(iter(tensors.values())))):
        yield {**batch, **{name: tensor[i : i + 1] for name, tensor in tensors.items()}}
