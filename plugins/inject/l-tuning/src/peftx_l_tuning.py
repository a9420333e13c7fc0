"""L-Tuning: label texts, read by the frozen model, become the prompt or prefix that a text is asked under.

"L-Tuning: Synchronized Label Tuning for Prompt and Prefix in LLMs" (arXiv:2402.01643).
Class c has a label text l_c of n tokens (short ones end in '.'). The frozen model M reads it; x is put behind what a
trained projection makes of that, and a head says whether the label holds:

    H_c = M(l_c)                                   [n, d], read once: neither M nor l_c changes
    prompt:  P_c = H_c W_p + b_p                   W_p: [d, d];  h = M([P_c ; E(x)])
    prefix:  a_c = H_c w + b                       [n], w: [d];  K_c = A_k a_c,  V_c = A_v a_c
                                                   A_k, A_v: n -> L * heads * n * size, with biases; heads and
                                                   size are each layer's own
             K_c, V_c = A H_c without pooling      A: d -> 2 * L * heads * size, for each position
             h = M(x | K' = [K_c ; K], V' = [V_c ; V]), positions of x go on after the n of l_c
    log p(c holds | x) = log softmax(U h + u)_1    U: [2, d]; h at the last token (an encoder's first)

With `centred`, which is not the paper's, H_c is read as (H_c - mean_c H_c) / rms, so that what all labels share does
not drown what tells them apart; mean and rms are of the classes at the start, and a class that is added moves neither.

In training half of a batch's texts stand behind their own label and the others behind a wrong one, as in entailment.
A text is of the class with the highest log p. A class that was never trained needs its label text only (`add_label`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import (
    AttentionEdit,
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import ClassTexts, check_labels, pads_right, take_classes, text_ids
from peftx.errors import OptionError, StackError
from peftx.kernel.heads import first_of, last_of
from peftx.kernel.positions import first_position
from peftx.kernel.soft_rows import without
from peftx.toolkits.evaluation import evaluating


class LTuningConfig(PluginConfig):
    """Options of L-Tuning."""

    variant: Literal["prompt", "prefix"] = Field("prompt", description="where the label stands")
    labels: list[str] = Field(["negative", "positive"], min_length=2, description="the classes")
    texts: dict[str, str] = Field(
        {}, description="label -> the text that is read for it; the label, if left out"
    )
    length: int | None = Field(None, ge=1, description="n, tokens of a label text; none: of the longest")
    pool: bool = Field(True, description="prefix: one number a position is all that is projected (a_c)")
    centred: bool = Field(
        False, description="take from label states their mean over the classes, and scale to a rms of 1"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="of keys and values, and before the head, while training"
    )

    @model_validator(mode="after")
    def _fit(self) -> LTuningConfig:
        if self.variant == "prompt" and not self.pool:
            raise ValueError("pool=False is of the prefix, and this is the prompt: leave it out")
        if strange := [name for name in self.texts if name not in self.labels]:
            raise ValueError(f"texts names {strange[0]!r}, which is not among `labels`")
        return self


def centred(H: Tensor, first: int) -> Tensor:
    """H, [C, n, d], without the mean of its first classes, at each position, over the rms of what these leave; H where
    there are none of them."""
    if not first:
        return H
    away = H - H[:first].mean(0)
    return away / away[:first].square().mean().sqrt()


class LabelPrompts(nn.Module):
    """P_c of every class, [C, n, d], out of H, [C, n, d].

    Args:
        first: classes that H is centred by; 0: it is not.
    """

    def __init__(self, H: Tensor, *, first: int) -> None:
        super().__init__()
        self.project, self.first = nn.Linear(H.shape[-1], H.shape[-1]), first
        self.register_buffer("H", H)

    def forward(self) -> Tensor:
        return self.project(centred(self.H, self.first))


class LabelPrefixes(nn.Module):
    """K_c and V_c of every class by layer, [C, heads, n, size] each, out of H, [C, n, d].

    Args:
        sizes: of each layer: heads, numbers in a key, and in a value. pool: through a_c. dropout: p. first: classes
            that H is centred by; 0: it is not.
    """

    def __init__(
        self, H: Tensor, *, sizes: Sequence[tuple[int, int, int]], pool: bool, dropout: float, first: int
    ) -> None:
        super().__init__()
        (_, n, d), self.dropout, self.first = H.shape, dropout, first
        self.w = nn.Linear(d, 1) if pool else None
        rows = [n] if pool else []  # of all positions, or of one
        heads, *numbers = zip(*sizes, strict=True)
        self.shapes = [[(h, *rows, size) for h, size in zip(heads, of, strict=True)] for of in numbers]
        widths = [sum(map(prod, shapes)) for shapes in self.shapes]
        self.A_k, self.A_v = (nn.Linear(n if pool else d, width) for width in widths)
        self.register_buffer("H", H)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        H = centred(self.H, self.first)
        read = H if self.w is None else self.w(H).squeeze(-1)  # a_c: [C, n]
        found = []
        for A, shapes in zip((self.A_k, self.A_v), self.shapes, strict=True):
            flat = F.dropout(A(read), self.dropout, self.training)
            parts = zip(flat.split([*map(prod, shapes)], -1), shapes, strict=True)
            rows = [part.unflatten(-1, shape) for part, shape in parts]  # without pooling [C, n, heads, size]
            found.append([part.transpose(1, 2) for part in rows] if self.w is None else rows)
        return list(zip(*found, strict=True))


class Prefix(AttentionEdit):
    """K' = [K_c ; K], V' = [V_c ; V] in one layer, while texts are asked about labels."""

    rows: tuple[Tensor, Tensor] | None = None  # [B, heads, n, size] each, by row of the batch

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            return key, value
        return torch.cat((self.rows[0].to(key), key), 2), torch.cat((self.rows[1].to(value), value), 2)


def pairs(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A label to stand before each row, and whether it is the row's own: [B], [B]. Half are; of an odd number, one more
    or one less."""
    count = len(target)
    own = torch.randperm(count) < (count + int(torch.randint(2, ()))) // 2
    other = torch.randint(1, classes, (count,))  # how far from the right one
    own, other = own.to(target.device), other.to(target.device)
    return torch.where(own, target, (target + other) % classes), own.long()


class LTuning(Plugin):
    """See the module."""

    Config = LTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.IDENTITY_AT_START, Claim.PREFIX_CACHE}
    architectures = ("mistral",)
    refuses = {"t5": "the head reads one tower"}
    exempt = {
        "accumulation_makes_the_same_step": "which half of a batch stands behind its own label is drawn for the batch"
    }
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels_option = "labels"
    config: LTuningConfig
    texts = ClassTexts("l-tuning", missing="the labels are not read and there is no head yet")

    def claimed(self) -> frozenset[Claim]:
        return self.claims | {Claim.GIVES_EMBEDDINGS} if self.config.variant == "prompt" else self.claims

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, encoder = self.config, "encoder" in model.towers
        self.embedding, self.base = model.embedding().module, model.module.base_model
        self.first = first_position(model.module)
        if "labels" not in self.state:
            texts = {name: config.texts.get(name, name) for name in check_labels(config.labels)}
            self.state["labels"] = self.tokens(stack, texts, config.length)
        names, rows = zip(*self.state["labels"], strict=True)
        n, first = len(rows[0]), len(config.labels) * config.centred
        self.texts = self.texts.of(names, closed=encoder, beside=n)
        if (room := self.texts.room(stack)) < 1:
            said = f"{model.owner}: label texts of {n} tokens, and the model reads {n + room} in all"
            raise OptionError(said, hint="shorter `texts`")
        H = torch.empty(len(rows), n, model.hidden_size)
        sites = model.attention_sites() if config.variant == "prefix" else []
        sizes = [(at.kv_heads, at.head_dim, at.value_dim) for at in map(model.heads_of, sites)]
        more: dict[str, Any] = {"sizes": sizes, "pool": config.pool, "dropout": config.dropout}
        labels = LabelPrefixes(H, first=first, **more) if sites else LabelPrompts(H, first=first)
        self.edits = [Prefix() for _ in sites]
        for site, edit in zip(sites, self.edits, strict=True):
            site.attend(edit)
        self.labels = model.keep("labels", labels, full_precision=True)
        self.head = model.head("head", 2, pool=first_of if encoder else last_of, dropout=config.dropout)
        if not model.restoring and model.module.device.type != "meta":  # as for `peftx plan`
            self.labels.H = self.read(stack, rows)

    def tokens(self, stack: Stack, texts: Mapping[str, str], n: int | None) -> list[tuple[str, list[int]]]:
        """(label, n token ids) of every class, with those of these label texts: an encoder's ends belong to them, and
        full stops fill them up to n (None: the longest).

        Raises:
            OptionError: no tokens, or more than n; or two labels that are read as one, and would always tie.
        """
        rows, found, stop = self.state.get("labels", []), {}, text_ids(stack.tokenizer, ".")[-1:]
        for label, text in texts.items():
            if not text_ids(stack.tokenizer, text):
                said = f"l-tuning: the label text {text!r} has no tokens"
                raise OptionError(said, hint="other words in `texts`")
            ends = "encoder" in stack.anatomy.towers
            found[label] = list(stack.tokenizer(text, add_special_tokens=ends)["input_ids"])
        n = n or max(map(len, found.values()))
        for label, ids in found.items():
            if len(ids) > n:
                said = f"l-tuning: the text of label {label!r} has {len(ids)} tokens, and n is {n}"
                hint = "shorter words for it in `texts`, or a larger `length` from the start"
                raise OptionError(said, hint=hint)
            ids += stop * (n - len(ids))
            if twin := next((name for name, other in rows if other == ids), None):
                said = f"l-tuning: labels {twin!r} and {label!r} have one text, so nothing tells them apart"
                raise OptionError(said, hint=f"other words for {label!r} in `texts`")
            rows = [*rows, (label, ids)]
        return rows

    def read(self, stack: Stack, rows: Sequence[Sequence[int]]) -> Tensor:
        """H_c: last hidden states of label texts, [C, n, d]."""
        ids = torch.tensor(rows, device=stack.model.device)
        mask = torch.ones_like(ids)
        with evaluating(stack.model), self.head.reading() as seen:
            stack.model(input_ids=ids, attention_mask=mask)
        soft = seen[-1].shape[1] - ids.shape[1]  # tokens of others
        own = without(seen[-1], soft, self.head.place(mask))
        return own.clone().to(self.labels.H)  # a tensor that gradients may pass

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        self.texts.prepare(data, stack)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        batch, target = take_classes(step.batch)
        step.batch = pads_right(batch)
        chosen, holds = pairs(target, len(self.texts.labels))

        def loss() -> tuple[Tensor, Any]:
            logits, outputs = self.ask(step.forward, step.batch, chosen)
            return F.cross_entropy(logits, holds), outputs

        step.replace_task_loss(loss, over="rows")
        try:
            return (yield)
        finally:
            self.forget()

    def ask(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], chosen: Tensor
    ) -> tuple[Tensor, Any]:
        """Logits [B, 2] (it does not hold, it holds) of a label for each text, and what the model returned.

        Args:
            batch: padded on the right. chosen: the labels, [B].
        """
        ids, mask, n = batch["input_ids"], batch["attention_mask"], self.texts.beside
        rows = self.labels()
        if self.edits:
            for edit, (key, value) in zip(self.edits, rows, strict=True):
                edit.rows = key[chosen], value[chosen]
            places = torch.arange(ids.shape[1], device=ids.device)[None] + n + self.first
            return self.head.read(partial(forward, position_ids=places), mask)
        embedded = self.embedding(ids)
        both = torch.cat((rows[chosen].to(embedded), embedded), 1)
        changes = {"input_ids": None, "inputs_embeds": both, "attention_mask": F.pad(mask, (n, 0), value=1)}
        # What each layer of Gemma 3n and 4 looks up for a token; labels are none, and have nothing there.
        if getattr(self.base.config.get_text_config(), "hidden_size_per_layer_input", 0):
            own = self.base.get_per_layer_inputs(ids)  # [B, T, layers, numbers]
            changes["per_layer_inputs"] = F.pad(own, (0, 0, 0, 0, n, 0))
        return self.head.read(partial(forward, **changes), F.pad(mask, (n, 0)))  # the head reads no label

    def forget(self) -> None:
        """Ask about no label any more; until the backward pass is over, layers that recompute need their rows."""
        for edit in self.edits:
            edit.rows = None

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        names, found = self.texts.labels, []
        every = torch.arange(len(names), device=stack.model.device)
        try:
            for text in self.texts.batches(stack, texts, size=1):  # one a pass, behind each of the labels
                batch = {name: x.repeat(len(names), 1) for name, x in text.items()}
                logits, _ = self.ask(partial(stack.model, **batch), batch, every)
                found.append(logits.float().log_softmax(-1)[:, 1])
        finally:
            self.forget()
        return names, torch.stack(found)


def add_label(stack: Stack, label: str, text: str | None = None, *, id: str = "l-tuning") -> None:
    """Make `label` one of the classes, by its text alone; nothing is trained.

    Args:
        text: what is read for it; the label itself if left out.

    Raises:
        PeftxError: the label is there already, or its text is, or has no tokens or more than n.
    """
    plugin = stack.member(id).plugin
    if not isinstance(plugin, LTuning):
        raise StackError(f"'{id}' is no L-Tuning, so it has no label texts")
    names, texts = check_labels([*plugin.texts.labels, label]), {label: label if text is None else text}
    rows = plugin.tokens(stack, texts, plugin.texts.beside)
    plugin.labels.H = torch.cat((plugin.labels.H, plugin.read(stack, [rows[-1][1]])))
    plugin.state["labels"], plugin.texts = rows, replace(plugin.texts, names=tuple(names))
