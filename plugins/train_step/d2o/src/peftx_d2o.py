"""D2O: learn from negative answers alone, against answers that the model itself gave before.

"Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference Optimization"
(arXiv:2403.03419; its first version says "without Human Positive Samples"). A row is a prompt x and an answer y_l that
somebody found bad; nobody writes a good one. With pi_r, the model before the run:

    y_1 .. y_K ~ pi_r(y | x)                                          drawn anew in each step
    r(y) = log pi_theta(y | x) - log pi_r(y | x)                      sums over the answer's tokens
    loss = - log sigmoid(beta / K sum_k r(y_k) - alpha r(y_l))        the mean over rows

The gradient raises each y_k by beta / K and lowers y_l by alpha, both times sigmoid(- the margin): the mean over K
samples holds the model to the distribution that it came from, and one bad sample weighs little. With K = 1, y_1 the
preferred answer and alpha = beta this is DPO.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, TrainStep, hookimpl
from peftx.engines.data import IGNORE, PROMPT_TURNS, Collator, special_frame, text_ids
from peftx.errors import BatchError, DataError
from peftx.kernel.objective import pad_of
from peftx.toolkits.decoding.text import DRAWN, check_writes, written


class D2oConfig(PluginConfig):
    """Options of D2O."""

    samples: int = Field(11, ge=1, description="K, answers drawn for each prompt")
    alpha: float = Field(0.1, gt=0, description="weight of the negative answer")
    beta: float = Field(0.1, gt=0, description="weight of the mean of the drawn answers")
    reference: Literal["start", "base"] = Field(
        "start", description="pi_r: the model as the run finds it, or without its plugins"
    )
    max_new_tokens: int = Field(
        128, ge=1, description="tokens of a drawn answer; fewer where the model's window ends"
    )
    temperature: float = Field(1.0, gt=0, description="of drawing")
    instructions: list[str] = Field(
        [], description="texts before the prompt while drawing, in turn, as a plea to be harmless"
    )


OURS = {"input_ids", "attention_mask", "labels"}


def d2o_loss(drawn: Tensor, negative: Tensor, *, alpha: float, beta: float) -> Tensor:
    """r(y_k) [B, K] and r(y_l) [B] -> the loss of each row, [B]."""
    return -logsigmoid(beta * drawn.mean(1) - alpha * negative)


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi(y | x) of rows: logits [N, T, V], labels [N, T] -> [N], float32."""
    each = cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORE, reduction="none")
    return -each.sum(1)


def pairs_of(batch: dict[str, Tensor]) -> tuple[list[tuple[list[int], list[int]]], dict[str, Tensor]]:
    """(x, y_l) of each row, and what the batch has beside tokens, mask and labels."""
    if missing := ", ".join(sorted(OURS - batch.keys())):
        raise BatchError(f"d2o: the batch has no {missing}", hint="rows of prompts and answers have them")
    ids, real, answer = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] != IGNORE
    rows = zip(ids, real & ~answer, answer, strict=True)
    others = {name: x for name, x in batch.items() if name not in OURS}
    return [(row[x].tolist(), row[y].tolist()) for row, x, y in rows], others


def repeated(columns: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """Columns of rows that each stand so many times, one after the other."""
    return {name: x.repeat_interleave(times, 0) for name, x in columns.items()}


def rejected(rows: Dataset) -> tuple[Dataset, str]:
    """The rejected answer of each row as what follows its prompt, and the format of that."""
    if not len(rows) or isinstance(rows[0]["prompt"], str):
        return rows.remove_columns("chosen").rename_column("rejected", "completion"), "prompt-completion"
    talks = [[*row["prompt"], *row["rejected"]] for row in rows]
    asked = [len(prompt) for prompt in rows["prompt"]]
    rows = rows.remove_columns(list({"chosen", "rejected", "messages"} & {*rows.column_names}))
    rows = rows.add_column("messages", talks).add_column(PROMPT_TURNS, asked)
    return rows.remove_columns("prompt"), "messages"


class D2o(Plugin):
    """See the module."""

    Config = D2oConfig
    claims = {Claim.NEEDS_LABELS, Claim.NEEDS_MASK, Claim.REPLACES_LOSS}
    takes = ("preference", "prompt-completion")
    gives = {"preference": "prompt-completion"}
    refuses = {"bert": "it writes no text", "t5": "prompt and answer are not in one row"}
    exempt = {"accumulation_makes_the_same_step": "answers are drawn for a micro-batch at once"}
    example = {"samples": 2, "max_new_tokens": 4}
    config: D2oConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model)

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        """Of preferences the rejected answer is kept; the chosen one is dropped."""
        hint = "rows with prompt and rejected (and chosen), or with prompt and completion, the bad answer"
        data.require(self.takes, by="d2o", hint=hint)
        if data.format == "preference":
            found = {n: rejected(x) for n, x in (("train", data.train), ("eval", data.eval)) if x is not None}
            formats = {format for _, format in found.values()}
            if len(formats) > 1:
                raise DataError("d2o: rows of train and eval must both be texts, or both conversations")
            data.format = formats.pop()
            for name, (rows, _) in found.items():
                setattr(data, name, rows)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        config, stack = self.config, step.stack
        pairs, others = pairs_of(step.batch)
        with step.reference(config.reference) as pi_r:
            with stack.columns(**repeated(others, config.samples)):
                drawn = self.draw(stack, [x for x, _ in pairs])  # K of each prompt
            others = repeated(others, 1 + config.samples)
            answers = [(x, y) for (x, y_l), ys in zip(pairs, drawn, strict=True) for y in (y_l, *ys)]
            rows = [{"input_ids": x + y, "labels": [IGNORE] * len(x) + y} for x, y in answers]
            batch = Collator(pad_of(pi_r, stack.tokenizer))(rows)  # [B (1 + K), T]
            batch = {name: value.to(pi_r.device) for name, value in batch.items()}
            labels = batch.pop("labels")
            with stack.columns(**others):
                before = log_probs(pi_r(**batch).logits, labels)
        step.batch = {**others, **batch, "labels": labels}  # which terms of other plugins read

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(labels=None)
            r = (log_probs(outputs.logits, labels) - before).view(len(pairs), -1)  # [B, 1 + K]
            return d2o_loss(r[:, 1:], r[:, 0], alpha=config.alpha, beta=config.beta).mean(), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def draw(self, stack: Stack, prompts: list[list[int]]) -> list[list[list[int]]]:
        """y_1 .. y_K of each prompt, each up to its end token, from the model as it stands."""
        K, begin = self.config.samples, len(special_frame(stack.tokenizer)[0])
        said = [text_ids(stack.tokenizer, text) for text in self.config.instructions] or [[]]
        rows = [x[:begin] + said[k % len(said)] + x[begin:] for x in prompts for k in range(K)]
        options = DRAWN | {"temperature": self.config.temperature}
        kept = written(stack, rows, self.config.max_new_tokens, options)
        return [kept[i : i + K] for i in range(0, len(kept), K)]
