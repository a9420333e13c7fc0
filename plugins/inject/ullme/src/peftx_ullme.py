"""ULLME: texts as vectors by a decoder that drops its causal mask, and is taught by what it would write.

"ULLME: A Unified Framework for Large Language Model Embeddings with Generation-Augmented Learning" (arXiv:2408.03402),
its fine-tuning GRL. One model reads in two ways. To embed, each token sees the whole text, and e [d] is the mean of the
last states, or the last one, over its length; to write, tokens see those before them, as ever. A row is a query q, its
passage p+ and a hard negative p-; of the B rows of a micro-batch

    L_CL  = - mean_i log softmax_j(e(q_i) . e(d_j) / tau)[i]         d = [p+_1 .. p+_B, p-_1 .. p-_B]
    L_DPO = - log sigmoid(beta (log pi(p+|q) - log pi(p-|q)))        sums over a passage's tokens; no reference
    L_KL  = KL(softmax(g) || softmax(c / tau))                       over the row's candidates p in {p+, p-}:
            c_p = e(q) . e(p)
            g_p = log pi(p|q), the mean over its tokens, detached    writing teaches embedding
    loss  = L_CL + L_DPO + L_KL                                      means over rows; each has a weight

Both ways stand in one forward pass, row by row. In chunks the pass is made again in the backward pass, a chunk at a
time (GradCache): what stands in memory is of a chunk, and gradients are those of the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftx import (
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import IGNORE, Place, check_passages, class_rows, encode_pair, together
from peftx.errors import UnsupportedError
from peftx.kernel.calls import columns_of
from peftx.kernel.heads import last_of, mean_of
from peftx.kernel.objective import pad_of
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.injecting import see_both_ways


class UllmeConfig(PluginConfig):
    """Options of ULLME. Beside it the released code has LoRA: rank 16, alpha 32, dropout 0.1, on all linear layers."""

    bidirectional: bool = Field(True, description="drop the causal mask where texts are embedded")
    pool: Literal["mean", "last"] = Field(
        "mean", description="what a text is read by: all tokens, or the last"
    )
    temperature: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="tau, which cosines are divided by"
    )
    generation: Literal["dpo", "sft"] = Field(
        "dpo", description="p+ is preferred to p- in writing; or p+ alone is learned"
    )
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="of the preference")
    contrast_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of L_CL")
    generation_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of L_DPO, or of L_SFT")
    kl_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of L_KL")
    instruction: str = Field(
        "", description="behind the query where the passage is to be written: what is asked for"
    )
    chunk: int | None = Field(None, ge=1, description="rows whose pass stands in memory; none: all")


FLAG = "both_ways"
"""Column: 1 for a row whose tokens see all of it."""
WRITTEN = ("rejected_ids", "rejected_labels")
TEXTS = ("query_ids", "positive_ids", "negative_ids")
POOLS = {"mean": mean_of, "last": last_of}


def contrast(q: Tensor, documents: Tensor, same: Tensor, tau: float) -> Tensor:
    """L_CL of each query, [B].

    Args:
        q: [B, d]; documents: [2 B, d], the first B theirs, all of length 1. same: bool [B, 2 B], documents that are the
            query's own by their text: they are no negatives of it.
    """
    own = torch.eye(*same.shape, dtype=torch.bool, device=q.device)
    scores = (q @ documents.T / tau).masked_fill(same & ~own, float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(q), device=q.device), reduction="none")


def alignment(c: Tensor, g: Tensor, tau: float) -> Tensor:
    """L_KL of each row, [B]: cosines c and mean log-probabilities g of its candidates, [B, n]."""
    return F.kl_div((c / tau).log_softmax(-1), g.detach().softmax(-1), reduction="none").sum(-1)


def log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(p|q) of rows, sums and means over tokens: logits [N, T, V], labels [N, T] -> [N] each, float32."""
    each = F.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORE, reduction="none")
    total = -each.sum(1)
    return total, total / (labels[:, 1:] != IGNORE).sum(1).clamp(min=1)


class NoOutputs:
    """In the place of what the model returned, where no pass was over all rows."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedError(
            f"ullme: a loss of another plugin reads `{name}` of all rows, and with chunk they pass in parts",
            hint="leave chunk out",
        )


class Ullme(Plugin):
    """See the module."""

    Config = UllmeConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.BESIDE_WEIGHTS,
        Claim.REPLACES_ATTENTION,
        Claim.NEEDS_LABELS,
        Claim.NEEDS_MASK,
        Claim.REPLACES_LOSS,
    }
    takes, gives = ("preference",), {"preference": "tokenized"}
    refuses = {
        "bert": "it writes no text",
        "t5": "it has two towers",
        "mamba": "no attention, whose mask could be dropped",
    }
    exempt = {
        "accumulation_makes_the_same_step": "passages of a micro-batch are the negatives of its queries"
    }
    example_rows = tuple(
        {
            "prompt": f"User: what is {word}?\nAssistant:",
            "chosen": f"about {word}",
            "rejected": f"no {word}" + "!" * i,
        }
        for i, word in enumerate(("tea", "rain", "sleep", "noise", "bread", "snow"))
    )
    config: UllmeConfig

    def claimed(self) -> frozenset[Claim]:
        return self.claims if self.config.bidirectional else self.claims - {Claim.REPLACES_ATTENTION}

    def suits(self, model: ModelView) -> None:
        check_writes(model)

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.embedding()  # refuses what reads no tokens
        self.owner = model.owner
        model.column(FLAG)
        for name in (*WRITTEN, *TEXTS):
            model.column(name, own_length=True)
        if self.config.bidirectional:
            see_both_ways(model, "bidirectional", column=FLAG)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        hint = "rows with prompt (the query), chosen (its passage) and rejected (a hard negative)"
        data.require(self.takes, by=self.owner, hint=hint)

        def texts(rows: Dataset) -> Dataset:
            others = set(columns_of(stack.model)) & set(rows.column_names)
            return Dataset.from_dict(self.texts(rows, data) | {n: rows[n][:] for n in others})

        data.rewrite(texts)

    def texts(self, rows: Dataset, data: TrainingData) -> dict[str, list[list[int]]]:
        """Columns of the tokens of rows: what is written, and what is embedded."""
        check_passages(rows, by=self.owner)
        q, *passages = (rows[name][:] for name in ("prompt", "chosen", "rejected"))
        found: dict[str, list[list[int]]] = {}
        for names, name, texts in zip(
            (("input_ids", "labels"), WRITTEN), ("chosen", "rejected"), passages, strict=True
        ):
            pairs = [
                encode_pair(
                    data.tokenizer, query + self.config.instruction, text, max_length=data.max_length,
                    where=Place(rows, i, name),
                )
                for i, (query, text) in enumerate(zip(q, texts, strict=True))
            ]  # fmt: skip
            found |= dict(zip(names, ([p.input_ids for p in pairs], [p.labels for p in pairs]), strict=True))
        rows_of = partial(class_rows, data.tokenizer, max_length=data.max_length, owner=self.owner)
        return found | {name: rows_of(texts) for name, texts in zip(TEXTS, (q, *passages), strict=True)}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        documents = [step.batch.get(name) for name in TEXTS[1:]]
        step.batch = five(step.batch, pad_of(step.model, step.stack.tokenizer), self.owner)
        B, chunk = len(step.batch["input_ids"]) // 5, self.config.chunk
        same = same_texts(*documents)  # type: ignore[arg-type]

        def loss() -> tuple[Tensor, Any]:
            if chunk is None:
                e, sums, means, outputs = self.read(step, step.batch)
            else:
                parts = [rows_of(step.batch, range(i, min(i + chunk, B)), B) for i in range(0, B, chunk)]
                read = [
                    checkpoint(lambda part: self.read(step, part)[:3], p, use_reentrant=False) for p in parts
                ]
                e, sums, means = (torch.cat(each, 1) for each in zip(*read, strict=True))
                outputs = NoOutputs()
            return self.losses(e, sums, means, same).mean(), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def read(self, step: TrainStep, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
        """One pass over the five texts of B rows: e of q, p+, p-, [3, B, d]; log pi of p+ and p-, sums and means over
        tokens, [2, B] each; and what the model returned."""
        B = len(batch["input_ids"]) // 5
        outputs = step.forward(**batch | {"labels": None}, output_hidden_states=True)
        sums, means = log_probs(outputs.logits[: 2 * B], batch["labels"][: 2 * B])
        states = outputs.hidden_states[-1][2 * B :].float()
        e = F.normalize(POOLS[self.config.pool](states, batch["attention_mask"][2 * B :]), dim=-1)
        return e.view(3, B, -1), sums.view(2, B), means.view(2, B), outputs

    def losses(self, e: Tensor, sums: Tensor, means: Tensor, same: Tensor) -> Tensor:
        """The loss of each row, [B]."""
        config, (q, positive, negative) = self.config, e
        preferred = -F.logsigmoid(config.beta * (sums[0] - sums[1]))
        c = torch.stack([(q * positive).sum(-1), (q * negative).sum(-1)], 1)  # [B, 2]
        return (
            config.contrast_weight * contrast(q, torch.cat([positive, negative]), same, config.temperature)
            + config.generation_weight * (preferred if config.generation == "dpo" else -means[0])
            + config.kl_weight * alignment(c, means.T, config.temperature)
        )

    def embed(self, stack: Stack, texts: Sequence[str], *, size: int = 32) -> Tensor:
        """e of each text, [N, d] float32; `size` texts in a forward pass."""
        with stack.columns(**{FLAG: torch.ones(1, dtype=torch.int64, device=stack.model.device)}):
            return stack.embed(texts, pool=POOLS[self.config.pool], size=size)


def same_texts(positive: Tensor, negative: Tensor) -> Tensor:
    """Which of the documents are a row's own passage, by their tokens [B, S], -1 behind an end: bool [B, 2 B]."""
    width = max(positive.shape[1], negative.shape[1])
    own, other = (F.pad(x, (0, width - x.shape[1]), value=-1) for x in (positive, negative))
    return (own[:, None] == torch.cat([own, other])).all(-1)


def rows_of(batch: dict[str, Tensor], rows: range, B: int) -> dict[str, Tensor]:
    """The five texts of some of B rows."""
    at = torch.cat([torch.tensor(rows) + k * B for k in range(5)])
    return {name: x[at.to(x.device)] for name, x in batch.items()}


def five(batch: dict[str, Any], pad: int, owner: str) -> dict[str, Any]:
    """The texts of B rows as rows of one batch, B of each kind: query and passage to be written, the same of the
    negative, then query, passage and negative to be embedded, with the flag."""
    texts = [("input_ids", "labels"), WRITTEN, *((name, None) for name in TEXTS)]
    rows = together(batch, texts, pad=pad, owner=owner)
    flag = torch.arange(5, device=rows["input_ids"].device).ge(2).long()
    return rows | {FLAG: flag.repeat_interleave(len(rows["input_ids"]) // 5)}
