"""PANDA: a soft prompt learns its task, and from the model under the prompt of another one.

"PANDA: Prompt Transfer Meets Knowledge Distillation for Efficient Model Adaptation" (arXiv:2208.10160). P_s is a prompt
tuned on a source task, P_t the fresh one of the target; the language model is frozen under both:

    z_S    = logits under P_t,  z_T = logits under P_s          on the target's texts; no gradient reaches P_s
    loss   = CE(z_S, y) + lambda mean((z_S - z_T)^2) / N        the mean is over answers and their classes, N: rows
    lambda = weight                                             the release: 0.1 * 0.1
    lambda = weight * max(sim(s, t), 0)                         the paper, P_t' a prompt tuned on the target before

    e(P)      = mean over texts x of h(x | P) - h(x)            h: last hidden state, the mean over tokens
    sim(s, t) = cos(e(P_s), e(P_t'))                            how much of P_s is of use; it ranks sources too

Which prompt is tuned is another plugin's to say (prompt-tuning, p-tuning-v2, ...): this one teaches whatever the stack
trains. The teacher is a bundle of another stack on the same model; when the run ends nothing of it is left.

Departures: the teacher is in evaluation mode (the release leaves its dropout on), and both tasks' changes are measured
on the target's texts, so a source needs no data.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from peftx import Claim, Evaluation, Plugin, PluginConfig, TrainStep, companion, hookimpl
from peftx.engines.data import IGNORE, batches_of, class_rows
from peftx.engines.training.base import base_alone
from peftx.errors import ConflictError, ModelError
from peftx.kernel.calls import columns_of
from peftx.kernel.heads import mean_of
from peftx.kernel.modes import eval_mode
from peftx.kernel.objective import objective_of, pad_of
from peftx.kernel.stack import Stack
from peftx.toolkits.evaluation import context_window

OWN = "own"


class PandaConfig(PluginConfig):
    """Options of PANDA; the release has 20 rows of a prompt in each layer, at rate 7e-3."""

    source: str = Field(
        OWN,
        description="P_s: a bundle of a stack tuned on the source task; or `own`: the model as the run finds it",
    )
    weight: float = Field(0.01, ge=0, description="lambda, or what the similarity is multiplied by")
    target: str | None = Field(
        None,
        description="P_t', a bundle tuned on the target before, by which lambda follows the similarity; none: constant",
    )
    by_rows: bool = Field(
        True, description="divide the mean by the rows of a step once more, as the release does"
    )
    texts: int = Field(64, ge=1, description="texts on which similarities are measured")
    candidates: dict[str, str] = Field(
        {}, description="name -> bundle of a source task, to be ranked in evaluation; empty: `source` alone"
    )


def answers(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> Tensor:
    """Logits of what has a label, float32 [answers, classes]; of a next token, where that is what a model says."""
    if labels.ndim < 2 or labels.is_floating_point():
        return logits.float().view(len(labels), -1)  # a class, or numbers, for a row
    shifted = objective_of(model) == "next-token" and not model.config.is_encoder_decoder
    logits, labels = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    return logits[labels != IGNORE].float()


def state(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """h(x), float32 [B, d]; of an encoder and a decoder the first one's."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    part = model.get_encoder() if model.config.is_encoder_decoder else model
    with eval_mode(model), torch.no_grad():
        h = part(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].float()
    return mean_of(h[:, -mask.shape[1] :], mask)  # an encoder's soft tokens stand in front


def task_embeddings(
    stack: Stack, models: Sequence[PreTrainedModel], batches: Sequence[dict[str, Tensor]]
) -> list[Tensor]:
    """e(P) of each model, float32 [d]; `stack` without its plugins is the one that they change."""
    with base_alone(stack):
        base = [state(stack.model, batch) for batch in batches]
    return [
        torch.cat([state(model, batch) - h for batch, h in zip(batches, base, strict=True)]).mean(0)
        for model in models
    ]


def similarity(one: Tensor, two: Tensor) -> float:
    """cos of two tasks; 0 where a prompt changes nothing."""
    return float(F.cosine_similarity(one.double(), two.double(), dim=0))


class Panda(Plugin):
    """See the module."""

    Config = PandaConfig
    claims = {Claim.NEEDS_LABELS, Claim.NEEDS_MASK}
    config: PandaConfig

    def check(self, stack: Stack) -> None:
        if (other := next((m.id for m in stack.members if m.trains_own_rows), None)) is not None:
            raise ConflictError(
                f"'{stack.id_of(self)}' compares logits at the labels of a batch, and '{other}' runs rows of its own",
                hint="keep one of them",
            )

    def model(self, stack: Stack, source: str) -> PreTrainedModel:
        return stack.model if source == OWN else companion(stack, source)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        """The term `distillation` is mean((z_S - z_T)^2), divided by N with `by_rows`.

        Raises:
            PeftxError: the teacher's logits are of other classes.
        """
        weight, source = self.weight(step), self.config.source
        if not weight:
            return (yield)

        def distillation(outputs: Any) -> Tensor:
            labels = step.batch["labels"]  # by now a plugin behind this one may have drawn the texts anew
            with step.reference("start" if source == OWN else self.model(step.stack, source)) as teacher:
                others = set(columns_of(step.model)) - set(columns_of(teacher))
                batch = {name: value for name, value in step.batch.items() if name not in others}
                z_T = answers(teacher, teacher(**batch).logits, labels)
            z_S = answers(step.model, outputs.logits, labels)
            N = len(labels) / step.share["rows"] if step.share else len(labels) * step.accumulation
            if z_S.shape != z_T.shape:
                raise ModelError(
                    f"panda: '{source}' gives {tuple(z_T.shape)} logits, and this model {tuple(z_S.shape)}",
                    hint="a source task with the target's labels, or one whose labels are words that the model writes",
                )
            return F.mse_loss(z_S, z_T) / (N if self.config.by_rows else 1)

        step.add_loss("distillation", distillation, weight)
        return (yield)

    def weight(self, step: TrainStep) -> float:
        """lambda."""
        config, stack = self.config, step.stack
        if config.target is None:
            return config.weight
        memory = step.memory.setdefault(stack.id_of(self), {})
        if "similarity" not in memory:  # settled when the run begins
            batches = list(step.batches_of("train", config.texts))
            models = [self.model(stack, source) for source in (config.source, config.target)]
            memory["similarity"] = similarity(*task_embeddings(stack, models, batches))
        return config.weight * max(memory["similarity"], 0.0)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `similarity/<name>` of each candidate, with the stack's own prompt as the target's, and `rank/<name>`.

        Raises:
            DataError: no rows with `text` or `prompt`.
        """
        stack, config = evaluation.stack, self.config
        rows = evaluation.rows("eval")[: config.texts]
        found = [row if isinstance(row, str) else row.get("text", row.get("prompt")) for row in rows]
        texts = [text for text in found if isinstance(text, str)]
        model, tokenizer = stack.model, stack.tokenizer
        room = context_window(model, tokenizer)
        tokens = class_rows(tokenizer, texts, max_length=room, owner=stack.id_of(self))
        batches = list(batches_of(tokens, pad_of(model, tokenizer), model.device, size=16))
        names = config.candidates or {"source": config.source}
        models = [model, *(self.model(stack, source) for source in names.values())]
        own, *others = task_embeddings(stack, models, batches)
        sims = {name: similarity(own, other) for name, other in zip(names, others, strict=True)}
        for rank, name in enumerate(sorted(sims, key=lambda name: -sims[name]), start=1):
            evaluation.add(f"similarity/{name}", sims[name], count=len(texts), unit="cosine")
            evaluation.add(f"rank/{name}", rank, count=len(names))
