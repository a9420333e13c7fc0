"""Prefix Grouper: GRPO on groups of answers whose prompt is computed once.

"Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward" (arXiv:2506.05433). A prompt x and the G answers
that were drawn for it are one row, where G rows have (G - 1) |x| tokens more,

    s = [x ; y_1 ; ... ; y_G]        positions of x: 0 .. |x| - 1, and of each answer: |x|, |x| + 1, ...

so embeddings, norms, MLPs and projections run once for a token of x. Attention is computed in two calls, behind the
rotation of queries and keys and before the output projection:

    of x, on x                    softmax(Q_x K_x^T / sqrt(d)) V_x, causal
    of y_i, on x and y_i          softmax(Q_i [K_x ; K_i]^T / sqrt(d)) [V_x ; V_i], causal, i = 1 .. G

for which x is padded at its left and answers at their right; only keys and values of x stand G times. Gradients of
these sum over answers, so outputs and gradients are those of G rows. The last of x predicts each answer's first token.

The loss is that of GRPO. Of rewards r_1 .. r_G, and of pi_old, the model at the run's start, which drew the answers:

    A_i    = (r_i - mean r) / std r                        0 where all are equal
    rho_it = pi(y_it | x, y_i<t) / pi_old(...)
    loss   = -1/G sum_i 1/|y_i| sum_t [min(rho_it A_i, clip(rho_it, 1 - e, 1 + e) A_i) - beta KL_it]
    KL_it  = 1 / rho_it - log(1 / rho_it) - 1              of pi from pi_old

The loss of a micro-batch is the mean over its groups.

Under TRL's GRPOTrainer (`SharedPrompts`) the loss and its options are the trainer's, and the rows of a micro-batch with
one prompt are

    s = [x_1 .. x_|x|-1 ; x_|x| y_1 ; ... ; x_|x| y_G]

since the trainer scores a token by the output before it: x's last token stands before each answer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Sequence
from itertools import chain
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad

from peftx import (
    AttentionEdit,
    CallEdit,
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import IGNORE, Place, encode_pair
from peftx.errors import ConflictError, DataError
from peftx.kernel.attention import Attend
from peftx.kernel.parts import AttentionPart
from peftx.toolkits.evaluation import evaluating
from peftx.toolkits.shared_prompts import check_alike, check_layout, prompt_beside
from peftx.toolkits.shared_rows import SharedRows, shared_rows

SEGMENTS = "segments"
"""The column of rows that are groups: 1 on the prompt, 2, 3, ... on its answers behind it, 0 on pads."""


class PrefixGrouperConfig(PluginConfig):
    """Options of GRPO with shared prefixes."""

    clip: float = Field(
        0.2, gt=0, description="e, how far the ratio to the model that drew the answers counts"
    )
    beta: float = Field(0.04, ge=0, description="weight of the divergence from it")


class Groups(NamedTuple):
    """Where the texts of B rows stand; S answers, each of one row. Masks are added to scores."""

    prefix: Tensor
    """[B, Lp] places of the prompts in their rows, pads (< 0) at the left."""
    suffix: Tensor
    """[S, Ls] places of the answers, pads (< 0) at the right."""
    row: Tensor
    """[S] of each answer."""
    number: Tensor
    """[S] of each answer in its group, from 0."""
    prefix_mask: Tensor
    """[B, 1, Lp, Lp]."""
    suffix_mask: Tensor
    """[S, 1, Ls, Lp + Ls]."""

    @property
    def length(self) -> Tensor:
        """[B] tokens of the prompts."""
        return (self.prefix >= 0).sum(1)


def groups_of(segments: Tensor, dtype: torch.dtype) -> Groups:
    """segments: [B, T] int64, as the column has them, pads at the row's end."""
    counts = one_hot(segments).sum(1)[:, 1:]  # [B, 1 + G]
    row, number = counts[:, 1:].nonzero(as_tuple=True)
    start, length = (x[row, number + i][:, None] for i, x in enumerate((counts.cumsum(1), counts)))
    Lp, Ls = int(counts[:, 0].max()), int(length.max())
    i, j = torch.arange(Ls, device=row.device), torch.arange(Lp, device=row.device)
    prefix = (j - Lp + counts[:, :1]).clamp(min=-1)
    suffix = torch.where(i < length, start + i, -1)

    def mask(queries: int, keys: Tensor) -> Tensor:
        """Causal, aligned to the end, and no pads."""
        causal = torch.ones(queries, keys.shape[1], dtype=torch.bool, device=row.device)
        visible = causal.tril(keys.shape[1] - queries) & (keys >= 0)[:, None]
        # A pad that saw nothing would be no number, and its gradient.
        visible |= ~visible.any(-1, keepdim=True)
        hidden = torch.finfo(dtype).min * torch.ones((), dtype=dtype, device=row.device)
        return torch.where(visible, 0.0, hidden)[:, None]

    return Groups(
        prefix, suffix, row, number, mask(Lp, prefix), mask(Ls, torch.cat((prefix[row], suffix), 1))
    )


def ungroup(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """x: [B, H, T, D] -> of the prompts [B, H, Lp, D], of the answers [S, H, Ls, D]; anything on pads."""
    x, every = x.transpose(1, 2), torch.arange(len(x), device=x.device)
    parts = ((every, groups.prefix), (groups.row, groups.suffix))
    head, tail = (x[rows[:, None], places.clamp(min=0)].transpose(1, 2) for rows, places in parts)
    return head, tail


def group(head: Tensor, tail: Tensor, groups: Groups, length: int) -> Tensor:
    """[B, Lp, ...] and [S, Ls, ...] -> [B, length, ...], 0 on pads."""
    out = head.new_zeros(len(head), length, *head.shape[2:])
    every = torch.arange(len(head), device=head.device)
    for rows, places, values in ((every, groups.prefix, head), (groups.row, groups.suffix, tail)):
        real = places >= 0
        out[rows[:, None].expand_as(places)[real], places[real]] = values[real]
    return out


class GroupedRows(CallEdit):
    """Calls whose rows are groups: those with the column `segments`, whoever makes them."""

    def __init__(self, model: ModelView) -> None:
        super().__init__()
        self.call, self.owner, self.model = model.call, model.owner, (model.module,)  # in a tuple: no child

    def groups(self) -> Groups | None:
        """Of the call that runs; None: its rows are ordinary ones."""
        (model,), segments = self.model, self.call.batch.get(SEGMENTS)
        if segments is None:
            return None
        return self.call.once(self.owner, lambda: groups_of(segments, model.dtype))

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        if (groups := self.groups()) is None:
            return call
        return call | {"position_ids": positions(groups, call["input_ids"].shape[1]), "use_cache": False}


class GroupedAttention(AttentionEdit):
    """The two calls. Rows that other plugins put in front of keys and values are seen by all tokens."""

    def __init__(self, rows: GroupedRows) -> None:
        super().__init__()
        self.rows = (rows,)  # in a tuple: no child of this one

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend
    ) -> Tensor:
        groups, length = self.rows[0].groups(), query.shape[2]
        if groups is None:
            return attend(query, key, value, mask)
        front = key.shape[2] - length
        q_x, q_i = ungroup(query, groups)
        (k_x, k_i), (v_x, v_i) = (ungroup(x[:, :, front:], groups) for x in (key, value))
        k_x, v_x = torch.cat((key[:, :, :front], k_x), 2), torch.cat((value[:, :, :front], v_x), 2)
        k_i, v_i = torch.cat((k_x[groups.row], k_i), 2), torch.cat((v_x[groups.row], v_i), 2)
        out = attend(q_x, k_x, v_x, pad(groups.prefix_mask, (front, 0)))
        out_i = attend(q_i, k_i, v_i, pad(groups.suffix_mask, (front, 0)))
        return group(out, out_i, groups, length)


def answer_log_probs(logits: Tensor, ids: Tensor, groups: Groups) -> Tensor:
    """log p of the tokens of each answer, [S, Ls] float32; 0 on pads."""
    real = groups.suffix >= 0
    last = groups.length[groups.row, None] - 1
    before = torch.cat((last, groups.suffix[:, :-1]), 1)[real]
    row = groups.row[:, None].expand_as(real)[real]
    each = -cross_entropy(logits[row, before].float(), ids[row, groups.suffix[real]], reduction="none")
    return each.new_zeros(real.shape).masked_scatter(real, each)


def grpo_loss(now: Tensor, old: Tensor, A: Tensor, real: Tensor, *, clip: float, beta: float) -> Tensor:
    """log-probabilities [S, Ls] under pi and pi_old, A [S], what is no pad [S, Ls] -> the loss of each answer, [S]."""
    rho = (now - old).exp()
    gain = torch.minimum(rho * A[:, None], rho.clamp(1 - clip, 1 + clip) * A[:, None])
    divergence = (old - now).exp() - (old - now) - 1
    return -((gain - beta * divergence) * real).sum(1) / real.sum(1)


class SharedPrompts:
    """In front of TRL's GRPOTrainer: its log-probabilities of rows with one prompt, by rows that share it.

    Those of a reference model, of images, and of rows that would not become fewer tokens are the trainer's own.

    Raises:
        PeftxError: another plugin, or the trainer's loss, needs the tokens of each row.
    """

    stack: Stack

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grouper = next(p for p in self.stack.plugins.values() if isinstance(p, PrefixGrouper))
        self.proved = 0  # tokens of the longest row that was computed both ways
        self.grouper.check(self.stack)
        if self.aux_loss_enabled:
            said = (
                f"'{self.stack.id_of(self.grouper)}' shares prompts, and the load of experts is of each row"
            )
            raise ConflictError(said, hint="router_aux_loss_coef=0 in the trainer's arguments")

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Of the answers' tokens [B, logits_to_keep]: log p, entropies where asked for, and no balance of experts.

        Args:
            batch_size: rows that are computed at once. more: what else TRL gives, images among it.
        """
        plain, stack = super()._get_per_token_logps_and_entropies, self.stack
        images = any(value is not None and not isinstance(value, bool) for value in more.values())
        off = stack.standing[stack.id_of(self.grouper)].disabled
        if images or off or self.accelerator.unwrap_model(model) is not stack.model:
            return plain(model, input_ids, attention_mask, logits_to_keep, batch_size, **more)
        self.grouper.check(stack)
        size, found = batch_size or len(input_ids), []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            shared = shared_rows(ids, mask, logits_to_keep)
            if shared is None:
                found.append(plain(model, ids, mask, logits_to_keep, **more)[:2])
                continue
            self.prove(shared)
            with stack.columns(**{SEGMENTS: shared.segments}):
                told = plain(model, shared.ids, (shared.segments > 0).long(), shared.keep, **more)[:2]
            found.append([None if x is None else shared.apart(x) for x in told])
        log_probs, entropies = zip(*found, strict=True)
        return torch.cat(log_probs), None if entropies[0] is None else torch.cat(entropies), None

    def prove(self, shared: SharedRows) -> None:
        """See `PrefixGrouper.prove`; of a row that is longer than all before."""
        lengths = (shared.segments > 0).sum(1)
        if int(lengths.max()) > self.proved:
            n = int(lengths.argmax())
            row = {"input_ids": shared.ids[n, : lengths[n]], SEGMENTS: shared.segments[n, : lengths[n]]}
            self.grouper.prove(self.stack, {name: values.tolist() for name, values in row.items()})
            self.proved = int(lengths.max())


class PrefixGrouper(Plugin):
    """See the module."""

    Config = PrefixGrouperConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.EXACT_CACHE, Claim.REPLACES_ATTENTION, Claim.OWN_LAYOUT,
        Claim.REPLACES_LOSS, Claim.NEW_ROWS, Claim.READS_COLUMNS,
    }  # fmt: skip
    takes = ("prompt-completion",)
    gives = {"prompt-completion": "tokenized"}
    architectures = ("mistral", "gemma2")
    refuses = {"bert": "tokens see both ways", "t5": "prompt and answer are two rows already"}
    example_rows = tuple(
        {"prompt": f"User: {word}?\nAssistant:", "completion": said, "reward": float(len(said))}
        for word, answers in (
            ("tea", ("yes", "no!", "I like it")),
            ("rain", ("no", "never")),
            ("sleep", ("a", "b")),
        )
        for said in answers
    )
    config: PrefixGrouperConfig

    def suits(self, model: ModelView) -> None:
        check_layout(model, each_layer=True)  # `prove` looks at windows, with the rows

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column(SEGMENTS)
        rows = model.around(GroupedRows(model))
        for site in model.attention_sites():
            site.attend(GroupedAttention(rows))

    def check(self, stack: Stack) -> None:
        for other in stack.members:
            edits = (part.module for part in stack.ledger.of(other.id, AttentionPart))
            if any(edit.edits_probabilities() and edit.opens() for edit in edits):
                said = f"'{other.id}' tells in an attention which token of a row is which, and "
                said += f"'{stack.id_of(self)}' computes it in parts of rows"
                raise ConflictError(said, hint="keep one of them")

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Rows of prompt, completion and reward -> `tokenized` ones, a group each."""
        hint = "rows with prompt, completion and reward; those of one prompt are a group"
        data.require(self.takes, by=stack.id_of(self), hint=hint)
        self.check(stack)  # what others edit may open later, and between steps
        data.rewrite(lambda rows: self.rows(rows, data, stack))

    def rows(self, rows: Dataset, data: TrainingData, stack: Stack) -> Dataset:
        found: dict[str, list[tuple[list[int], float]]] = {}
        for i, row in enumerate(rows):
            where, reward = Place(rows, i), row.get("reward")
            if not isinstance(reward, (int, float)) or not math.isfinite(reward):
                said = f"the reward {reward}" if isinstance(reward, float) else "no reward"
                raise DataError(f"prefix-grouper: {where} has {said}", hint="a number in the column 'reward'")
            x, y = row["prompt"], row["completion"]
            pair = encode_pair(data.tokenizer, x, y, max_length=data.max_length, where=where)
            answer = [label for label in pair.labels if label != IGNORE]
            found.setdefault(x, []).append((answer, float(reward)))
        size = max(map(len, found.values()), default=0)
        groups = []
        for prompt, answers in found.items():
            suffixes, rewards = map(list, zip(*answers, strict=True))
            prefix = prompt_beside(data, prompt, [*map(len, suffixes)], f"the prompt {prompt[:40]!r}")
            ids, labels = [*prefix, *chain(*suffixes)], [*[IGNORE] * len(prefix), *chain(*suffixes)]
            segments = [1 + n for n, text in enumerate([prefix, *suffixes]) for _ in text]
            A = [*advantages(rewards), *[0.0] * (size - len(rewards))]
            groups.append({"input_ids": ids, "labels": labels, SEGMENTS: segments, "advantages": A})
        if groups:
            self.prove(stack, max(groups, key=lambda each: len(each["input_ids"])))
        return Dataset.from_list(groups)

    def front(self, kind: type) -> type | None:
        """`SharedPrompts`, of trainers that compute log-probabilities as TRL's GRPOTrainer does."""
        method = getattr(kind, SharedPrompts._get_per_token_logps_and_entropies.__name__, None)
        asked = {"model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"}
        if method is None or not asked <= set(inspect.signature(method).parameters):
            return None
        if self.config != PrefixGrouperConfig():
            said = f"prefix-grouper has options of its own loss, and {kind.__name__} computes another one"
            hint = f"leave clip and beta out, and give {kind.__name__}'s arguments epsilon and beta"
            raise ConflictError(said, hint=hint)
        return SharedPrompts

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if "completion_ids" in step.batch:  # the trainer's loss, over `SharedPrompts`
            return (yield)
        step.require("labels", SEGMENTS, "advantages", by=step.stack.id_of(self))
        self.check(step.stack)
        batch = dict(step.batch)
        groups = groups_of(batch[SEGMENTS], step.model.dtype)
        A = batch.pop("advantages")[groups.row, groups.number]
        del batch["labels"]
        ids, real, step.batch = batch["input_ids"], groups.suffix >= 0, batch
        with step.reference("start"):
            old = answer_log_probs(step.forward().logits, ids, groups)

        def task() -> tuple[Tensor, object]:
            outputs = step.forward()
            now = answer_log_probs(outputs.logits, ids, groups)
            each = grpo_loss(now, old, A, real, clip=self.config.clip, beta=self.config.beta)
            return (each / groups.row.bincount()[groups.row]).sum() / len(ids), outputs

        step.replace_task_loss(task, over="rows")
        return (yield)

    def prove(self, stack: Stack, row: dict[str, Any]) -> None:
        """Raise unless the model gives the answers the same probabilities in one row and in rows of their own."""
        model = stack.model
        ids, segments = (torch.tensor([row[n]], device=model.device) for n in ("input_ids", SEGMENTS))
        groups = groups_of(segments, model.dtype)
        with evaluating(model):
            shared = answer_log_probs(model(input_ids=ids, segments=segments).logits, ids, groups)
            apart = torch.zeros_like(shared)
            for i in range(len(shared)):
                own = ids[(segments == 1) | (segments == 2 + i)][None]  # [1, |x| + n]
                n = int((segments == 2 + i).sum())
                logits = model(input_ids=own, use_cache=False).logits[0, -n - 1 : -1]
                apart[i, :n] = -cross_entropy(logits.float(), own[0, -n:], reduction="none")
        check_alike(model, shared, apart, tokens=ids.shape[1])


def positions(groups: Groups, length: int) -> Tensor:
    """Of the tokens of rows, [B, length]; 0 on pads."""
    tail = groups.length[groups.row, None] + torch.arange(groups.suffix.shape[1], device=groups.row.device)
    return group(groups.prefix.clamp(min=0), tail, groups, length)


def advantages(rewards: Sequence[float]) -> list[float]:
    """A of a group."""
    spread = stdev(rewards) if len(rewards) > 1 else 0.0
    return [(r - mean(rewards)) / spread if spread else 0.0 for r in rewards]
