"""BiTA: trained mask tokens and a prefix let a frozen model draft its own next tokens, verified in the same forward.

"BiTA: Bi-Directional Tuning for Lossless Acceleration in Large Language Models" (arXiv:2401.12522). Trained are M mask
embeddings, and in each attention P rows of keys and P of values. With t for tokens and m_1 .. m_M for a group of masks
behind t_i,

    t_j  sees  t_1 .. t_j                                     as without the plugin
    m_k  sees  the prefix, t_1 .. t_i, m_1 .. m_k             at position i + k, and predicts t_(i+1+k)

t_(i+1) itself is the model's own next token. Training, on the model's own greedy answers: behind one text stand groups
for up to G tokens in a row of its answer,

    L = mean over texts of (mean over masks of -log p(t_(i+1+k) | m_k))

Decoding: what the masks behind the last accepted token say is the next draft. Its level k holds the K + 1 - k likeliest
tokens of m_k, all behind the likeliest of level k - 1; the last token and each of these have a group of their own.
One forward verifies the tree and drafts the next one, so it gives 1 to M + 1 tokens, those that greedy decoding gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import (
    AttentionEdit,
    CallEdit,
    Claim,
    Delta,
    Generation,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import IGNORE, pads_right, tokenize_dataset
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.call import Call
from peftx.toolkits.decoding import Drafter, DraftTree, VerifiedStep, per_row, speculative_generate
from peftx.toolkits.decoding.text import request_of_ids
from peftx.toolkits.evaluation import context_window, evaluating

MASK = 1 << 40
"""Id of m_1, MASK + 1 of m_2, ...: no tokenizer has so many tokens, so the model never writes one."""
TOGETHER = 16
"""Prompts that the model answers at once."""


class BitaConfig(PluginConfig):
    """Options of BiTA; the defaults are the paper's."""

    prefix: int = Field(16, ge=1, description="P, rows of keys and values that masks see in each attention")
    masks: int = Field(3, ge=1, description="M, tokens drafted ahead")
    candidates: int = Field(
        5, ge=1, description="K, guesses for the first drafted token; one less for each next one"
    )
    groups: int = Field(
        64, ge=1, description="G, places of an answer that one text trains in a step, at most"
    )
    answer_tokens: int = Field(
        128, ge=3, description="length of the model's own answers to train on, at most"
    )

    @model_validator(mode="after")
    def _fits_a_tree(self) -> BitaConfig:
        M, K = self.masks, self.candidates
        if K < M:
            raise ValueError(f"{K} candidates leave none for mask {K + 1}: at least as many as masks")
        if (nodes := M + (M + 1) * sum(range(K, K - M, -1))) > 1024:
            raise ValueError(
                f"{K} candidates and {M} masks make {nodes} nodes, and 1024 are verified at once"
            )
        return self


class Told(CallEdit):
    """Which tokens of a call are masks: from ids that no embedding has to a column of `model.call`."""

    def __init__(self, call: Call, owner: str) -> None:
        super().__init__()
        self.call, self.owner = call, owner

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        ids = call.get("input_ids")
        if ids is None or not bool((ids >= MASK).any()):
            return call
        self.call.batch[self.owner] = (ids - MASK + 1).clamp(min=0)  # k of m_k, 0 of a token
        return {**call, "input_ids": ids.masked_fill(ids >= MASK, 0)}


class Embeddings(Delta):
    """The embeddings of m_1 .. m_M, [M, d]."""

    def __init__(self, call: Call, owner: str, first: Tensor) -> None:
        super().__init__()
        self.E = nn.Parameter(first)
        self.call, self.owner = call, owner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k = self.call.batch.get(self.owner)  # [B, T]
        return y if k is None else torch.where(k[..., None] > 0, self.E[(k - 1).clamp(min=0)], y)


class Prefix(AttentionEdit):
    """Keys [Hkv, P, D] and values [Hkv, P, Dv] that masks see."""

    def __init__(self, call: Call, owner: str, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
        super().__init__()
        self.K, self.V = nn.Parameter(torch.randn(keys)), nn.Parameter(torch.randn(values))
        self.call, self.owner = call, owner

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Any
    ) -> Tensor:
        k = self.call.batch.get(self.owner)  # [B, Q]
        if k is None:
            return attend(query, key, value, mask)
        B, Q = k.shape
        key, value = (
            torch.cat((p.to(x).expand(B, -1, -1, -1), x), 2) for p, x in ((self.K, key), (self.V, value))
        )
        if mask is None:  # what that means: causal
            mask = k.new_ones(Q, key.shape[2] - self.K.shape[1]).bool().tril()[None, None]
        sees = (k > 0)[:, None, :, None].expand(B, mask.shape[1], Q, self.K.shape[1])
        if mask.dtype != torch.bool:
            sees = torch.where(sees, 0.0, torch.finfo(mask.dtype).min).to(mask)
        return attend(query, key, value, torch.cat((sees, mask.expand(B, -1, -1, -1)), -1))


def layout(
    batch: dict[str, Any], M: int, G: int, dtype: torch.dtype, first: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """A batch with groups of masks behind its texts, and what the masks learn.

    Args:
        batch: ids, mask and labels [B, T], padded on the right. dtype: of the mask to add to the scores.
        first: [B], of [0, 1): where in an answer longer than G the groups begin.

    Returns:
        Ids and positions [B, T + GM], the mask [B, 1, T + GM, T + GM]; and labels of the masks [B, GM].
    """
    ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"]
    B, T = ids.shape
    begins = (labels != IGNORE).long().argmax(1)  # of the answer
    usable = (real.sum(1) - begins - 1).clamp(min=0)  # i that have a t_(i+2)
    G = min(G, max(int(usable.max()), 1))
    skipped = (first * ((usable - G).clamp(min=0) + 1)).long()
    i = (begins - 1 + skipped)[:, None] + torch.arange(G, device=ids.device)  # [B, G]
    at = i[..., None] + torch.arange(1, M + 1, device=ids.device)  # [B, G, M], positions
    learned = F.pad(labels, (0, 1), value=IGNORE).gather(1, (at + 1).clamp(max=T).flatten(1))
    group = torch.block_diag(*[torch.ones(M, M).tril()] * G).to(ids.device).bool()  # [GM, GM]
    last = torch.cat((torch.arange(T, device=ids.device).expand(B, T), i.repeat_interleave(M, 1)), 1)
    texts = torch.arange(T, device=ids.device) <= last[..., None]  # [B, T + GM, T]
    visible = torch.cat((texts, F.pad(group, (0, 0, T, 0)).expand(B, -1, -1)), 2)
    masks = torch.arange(MASK, MASK + M, device=ids.device).repeat(B, G)
    return {
        "input_ids": torch.cat((ids, masks), 1),
        # beyond the text nothing is learned
        "position_ids": torch.cat((last[:, :T], at.flatten(1).clamp(max=T - 1)), 1),
        "attention_mask": torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None],
    }, learned


def mask_loss(logits: Tensor, learned: Tensor) -> Tensor:
    """Logits of the masks [B, GM, V], their labels [B, GM] -> 0-d."""
    each = F.cross_entropy(logits.float().transpose(1, 2), learned, ignore_index=IGNORE, reduction="none")
    return (each.sum(1) / (learned != IGNORE).sum(1).clamp(min=1)).mean()


def draft(guesses: Sequence[Sequence[int]], M: int) -> DraftTree:
    """The tree of guesses, level by level, the likeliest first; each token with its group of masks."""
    group = list(range(MASK, MASK + M))
    best: list[int] = []
    paths = [group]
    for level in guesses:
        paths += [[*best, token, *group] for token in level]
        best.append(level[0])
    return DraftTree.from_sequences(paths)


class MaskDrafter(Drafter):
    """Drafts what the masks behind the last accepted token said."""

    def __init__(self, config: BitaConfig) -> None:
        self.config = config

    def begin(self, generation: Generation) -> None:
        self.guesses: list[list[int]] = []

    def propose(self, ids: Tensor, limit: int) -> DraftTree:
        return draft(self.guesses, self.config.masks)

    def observe(self, step: VerifiedStep) -> None:
        node, self.guesses = (-1, *step.accepted)[-1], []
        for k in range(self.config.masks):
            if (node, MASK + k) not in step.tree.children:
                break  # near the end, or where no tree is taken
            node = step.tree.children[node, MASK + k]
            self.guesses.append(step.logits[node + 1].topk(self.config.candidates - k).indices.tolist())


class Bita(Plugin):
    """See the module."""

    Config = BitaConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.LOSSLESS_DECODING, Claim.REPLACES_ATTENTION,
        Claim.OWN_LAYOUT, Claim.REPLACES_LOSS, Claim.NEW_ROWS,
    }  # fmt: skip
    takes = ("prompt-completion", "messages")
    gives = {"prompt-completion": "tokenized", "messages": "tokenized"}
    example = {"prefix": 2, "masks": 2, "answer_tokens": 6}
    refuses = {
        "bert": "an encoder writes no text",
        "t5": "drafts are checked on decoders alone",
        "vit": "it writes no text",
        "mamba": "its state cannot go back over rejected tokens",
        "bloom": "its attention is not looked up by name",
    }
    config: BitaConfig

    def suits(self, model: ModelView) -> None:
        module, attention = model.module, str(model.config._attn_implementation)
        takes = "position_ids" in inspect.signature(module.forward).parameters
        refused = {
            "is no decoder alone": list(model.towers) != ["decoder"] or not module.can_generate(),
            "has a state that cannot go back over rejected tokens": module._is_stateful,
            "takes no positions": not takes,
            f"has attention '{attention}', which takes no mask": not attention.endswith(("eager", "sdpa")),
        }
        if found := [reason for reason, wrong in refused.items() if wrong]:
            raise ArchitectureError(
                f"{model.owner}: {type(module).__name__} {' and '.join(found)}",
                hint="take a causal language model with attn_implementation='sdpa'",
            )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        P, M = self.config.prefix, self.config.masks
        say = (model.call, model.owner)
        model.around(Told(*say))
        model.embedding().attach(Embeddings(*say, model.embedded(M)))
        for site in model.attention_sites():
            n = model.heads_of(site)
            site.attend(Prefix(*say, (n.kv_heads, P, n.head_dim), (n.kv_heads, P, n.value_dim)))

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Rows -> `tokenized` ones: their prompts (of a conversation all before its last answer), and what the model
        answers."""
        window = context_window(stack.model, data.tokenizer)
        room = min(data.max_length, window) - self.config.answer_tokens
        if room < 1:
            raise DataError(
                f"{stack.id_of(self)}: answers of {self.config.answer_tokens} tokens leave no room for a prompt",
                hint="raise max_length, or lower answer_tokens",
            )
        data.rewrite(lambda rows: self.answered(rows, room, data, stack))

    def answered(self, rows: Dataset, room: int, data: TrainingData, stack: Stack) -> Dataset:
        """The last `room` tokens of each prompt, and what the model writes behind them, with its EOS."""
        texts = tokenize_dataset(rows, data.tokenizer, format=data.format, max_length=2**30)
        prompts = [
            prompt_of(ids, labels)[-room:]
            for ids, labels in zip(texts["input_ids"], texts["labels"], strict=True)
        ]
        table: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        greedy = {"do_sample": False, "num_beams": 1}
        for n in range(0, len(prompts), TOGETHER):
            few = prompts[n : n + TOGETHER]
            request = request_of_ids(stack, few, self.config.answer_tokens, None, greedy)
            with evaluating(stack.model):
                written = request.run_default()[:, request.input_ids.shape[1] :].tolist()
            eos = request.generation_config.eos_token_id
            for prompt, tokens in zip(few, written, strict=True):
                answer = up_to(tokens, eos if isinstance(eos, list) else [eos])
                table["input_ids"].append([*prompt, *answer])
                table["labels"].append([*[IGNORE] * len(prompt), *answer])
        return Dataset.from_dict(table)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.require("labels", "attention_mask", by=step.stack.id_of(self))
        batch = pads_right(step.batch)
        first = torch.rand(len(batch["labels"])).to(batch["labels"].device)
        changes, learned = layout(batch, self.config.masks, self.config.groups, step.model.dtype, first)
        step.batch = {**batch, **changes, "use_cache": False}
        del step.batch["labels"]

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward()
            return mask_loss(outputs.logits[:, -learned.shape[1] :], learned), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    @hookimpl
    def decode(self, request: Generation) -> Tensor:
        drafter = MaskDrafter(self.config)
        return per_row(request, lambda row: speculative_generate(row, drafter))


def prompt_of(ids: list[int], labels: list[int]) -> list[int]:
    """All before the last run of labels."""
    end = len(ids)
    while labels[end - 1] == IGNORE:
        end -= 1
    while end and labels[end - 1] != IGNORE:
        end -= 1
    return ids[:end]


def up_to(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """With the first of `stops`, if one is there."""
    end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return tokens[: end + 1]
