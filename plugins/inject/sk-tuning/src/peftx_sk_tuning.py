"""SK-Tuning: a real sentence, read by the frozen model, as trainable prompt or prefix.

"Parameter-Efficient Fine-Tuning of Large Language Models using Semantic Knowledge Tuning" (arXiv:2410.08598).
A sentence s of n tokens says the task; its word embeddings are where training starts:

    E_s = E(s)                                    [n, d], trained; the model M is frozen
    prompt:   H = M([P ; E(x)]),   P = E_s        or, with an adapter, dropout(E_s W), W: [d, d]
    prefix:   K_s^i, V_s^i = keys and values of layer i when M reads E_s alone: [heads, n, size]
              H = M(x | K' = [K_s ; K], V' = [V_s ; V])
                                                  with an adapter dropout(K_s W), dropout(V_s W), W: [size, size]
    scores = mean over positions of (A dropout(h) + b),    A: [C, d], b: [C]

The gradient reaches E_s through both passes of the prefix variant. Positions of x go on after the n of s; the mean is
over [P ; x] in the prompt variant, over x in the other. Trained, K_s and V_s are constants (`cached`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
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
    VirtualTokens,
    hookimpl,
)
from peftx.engines.data import (
    CLASS_INDEX,
    Collator,
    check_labels,
    class_ids,
    text_ids,
    tokenize_classes,
)
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.soft_rows import beside_soft_tokens
from peftx.toolkits.evaluation import context_window


class SkTuningConfig(PluginConfig):
    """Options of SK-Tuning."""

    variant: Literal["prompt", "prefix"] = Field("prompt", description="where the sentence stands")
    labels: list[str] = Field(["negative", "positive"], description="the classes")
    text: str | None = Field(
        None,
        description="s, a sentence that says the task; none: 'Classify the text as A or B', of the labels",
    )
    adapter: bool = Field(False, description="map the prompt, or the prefix's keys and values, by a matrix W")
    dropout: float = Field(0.1, ge=0, lt=1, description="before the head and behind W, while training")


class Prompt(VirtualTokens):
    """P = E_s, or dropout(E_s W).

    Args:
        E: first value of E_s, [n, d]. adapter: whether there is W. dropout: p.
    """

    def __init__(self, E: Tensor, *, adapter: bool, dropout: float) -> None:
        super().__init__(len(E))
        self.E = nn.Parameter(E)
        like: dict[str, Any] = {"dtype": E.dtype, "device": E.device}
        self.W = nn.Linear(E.shape[1], E.shape[1], bias=False, **like) if adapter else None
        self.dropout = dropout

    def rows(self) -> Tensor:
        return self.E if self.W is None else F.dropout(self.W(self.E), self.dropout, self.training)


class Reader(nn.Module):
    """E_s, and what the frozen model makes of it: K_s and V_s of every layer.

    Args:
        E: first value of E_s, [n, d]. size: of a head, for W; none: no adapter. dropout: p.
        base: the model that reads. blocks: its layers. beside: numbers that each layer is given of a token beside its
        embedding (Gemma 3n and 4), which soft tokens have none of.
    """

    def __init__(
        self,
        E: Tensor,
        *,
        size: int | None,
        dropout: float,
        base: nn.Module,
        blocks: Sequence[nn.Module],
        beside: int = 0,
    ) -> None:
        super().__init__()
        self.E = nn.Parameter(E)
        like: dict[str, Any] = {"dtype": E.dtype, "device": E.device}
        self.W = nn.Linear(size, size, bias=False, **like) if size is not None else None
        self.dropout, self.beside = dropout, beside
        self.base, self.blocks = (base,), tuple(blocks)  # in tuples: they are no children of this one
        self.noted: list[tuple[Tensor, Tensor]] | None = None  # keys and values, by layer, while E_s is read
        self.rows: list[list[Tensor]] = []  # K_s and V_s by layer, [1, heads, n, size]
        self.live = True

    def read(self) -> None:
        """The pass over E_s. Layers keep its activations: recomputed, they would not know that it is this pass."""
        places = torch.arange(len(self.E), device=self.E.device)[None]
        modes = [block.training for block in self.blocks]
        noted: list[tuple[Tensor, Tensor]] = []
        inputs = {"inputs_embeds": self.E[None].to(self.base[0].dtype)}
        if self.beside:
            inputs["per_layer_inputs"] = inputs["inputs_embeds"].new_zeros(
                *places.shape, len(self.blocks), self.beside
            )
        self.noted = noted
        for block in self.blocks:
            block.training = (
                False  # of the block alone, which recomputes while training; not of what is in it
            )
        try:
            self.base[0](
                **inputs,
                attention_mask=torch.ones_like(places),
                position_ids=places - len(self.E),  # `shift_positions` adds n
                use_cache=False,
            )
        finally:
            self.noted = None
            for block, mode in zip(self.blocks, modes, strict=True):
                block.training = mode
        self.rows = [[self.adapted(part[:, :, -len(self.E) :]) for part in pair] for pair in noted]

    def adapted(self, part: Tensor) -> Tensor:
        if self.W is None:
            return part
        return F.dropout(self.W(part.to(self.W.weight.dtype)), self.dropout, self.training).to(part)

    @contextmanager
    def cached(self) -> Iterator[None]:
        with torch.no_grad():
            self.read()
        self.live = False
        try:
            yield
        finally:
            self.live, self.rows = True, []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"rows": [], "live": True}  # a copy of the model reads for itself


class Prefix(AttentionEdit):
    """K' = [K_s ; K], V' = [V_s ; V] in one layer; the first layer has E_s read."""

    def __init__(self, reader: Reader, layer: int) -> None:
        super().__init__()
        self.reader, self.layer = (reader,), layer

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        reader = self.reader[0]
        if reader.noted is not None:
            reader.noted.append((key, value))
            return key, value
        if self.layer == 0 and reader.live:
            reader.read()
        front = [row.expand(len(key), -1, -1, -1) for row in reader.rows[self.layer]]  # [B, heads, n, size]
        return torch.cat((front[0], key), 2), torch.cat((front[1], value), 2)


class Head(nn.Module):
    """Scores of the classes: hidden [B, T, d], mask [B, T] -> [B, C]."""

    def __init__(self, width: int, classes: int, *, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        self.dropout = dropout

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = F.dropout(hidden.to(self.linear.weight.dtype), self.dropout, self.training)
        each = self.linear(hidden)  # [B, T, C]
        return (each * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class SkTuning(Plugin):
    """See the module."""

    Config = SkTuningConfig
    claims = {Claim.CLASSIFIES, Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS, Claim.PREFIX_CACHE}
    architectures = ("mistral", "roberta")
    refuses = {"t5": "the head reads one tower"}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    config: SkTuningConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, labels = self.config, check_labels(self.config.labels)
        if len(model.towers) > 1:
            raise ArchitectureError(
                f"{model.owner}: {model.config.model_type} has {' and '.join(model.towers)}, and the head reads one",
                hint="take a decoder or an encoder",
            )
        self.encoder = "encoder" in model.towers
        embedding = model.embedding().module
        if "ids" not in self.state:
            self.state["ids"] = self.sentence(model, stack)
        E = embedding(torch.tensor(self.state["ids"], device=model.module.device)).detach().clone()
        self.reader = None
        # What trains is not in half precision, which would lose small steps; it is rounded where the model reads it.
        full = torch.promote_types(E.dtype, torch.float32)
        if config.variant == "prompt":
            model.prompt(Prompt(E, adapter=config.adapter, dropout=config.dropout)).to(full)
        else:
            sites = model.attention_sites()
            blocks = [site.module for site in model.blocks("layer")]
            reader = Reader(
                E,
                size=self.size(model) if config.adapter else None,
                dropout=config.dropout,
                base=model.module.base_model,
                blocks=blocks,
                beside=getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0),
            )
            self.reader = model.keep("sentence", reader).to(full)
            for layer, site in enumerate(sites):
                model.attend(site, Prefix(reader, layer))
            model.shift_positions(len(E))
        head = Head(model.hidden_size, len(labels), dropout=config.dropout)
        self.head = model.keep("head", head).to(full)
        # Where the last hidden state comes from; an encoder's last layer ends in a norm.
        last = (
            model.site("norm.mlp", layer=model.num_layers - 1) if self.encoder else model.site("norm.final")
        )
        self.last = last.module

    @staticmethod
    def size(model: ModelView) -> int:
        """Of the heads of all layers, for W."""
        sizes = {size for heads in model.main.by_layer for size in (heads.head_dim, heads.value_dim)}
        if len(sizes) > 1:
            raise ArchitectureError(
                f"{model.owner}: one matrix W maps the keys and values of all layers, and {model.config.model_type} "
                f"has heads of {' or '.join(map(str, sorted(sizes)))} numbers",
                hint="adapter: false, or variant: prompt",
            )
        return sizes.pop()

    def sentence(self, model: ModelView, stack: Stack) -> list[int]:
        """Token ids of s, with what the tokenizer puts at the ends."""
        labels, tokenizer = self.config.labels, stack.tokenizer
        text = self.config.text
        text = f"Classify the text as {' or '.join(labels)}" if text is None else text
        if not text_ids(tokenizer, text):
            raise PeftxError(f"{model.owner}: the text {text!r} has no tokens", hint="say the task in `text`")
        ids, window = list(tokenizer(text)["input_ids"]), context_window(model.module, tokenizer)
        if len(ids) >= window:
            raise PeftxError(
                f"{model.owner}: the text has {len(ids)} tokens, and the model reads {window} in all",
                hint="a shorter `text`",
            )
        return ids

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        data.max_length = min(data.max_length, self.room(stack))
        tokenize_classes(data, self.config.labels, closed=self.encoder)

    def room(self, stack: Stack) -> int:
        """Tokens that the model can read behind s."""
        if "ids" not in self.state:
            raise PeftxError(
                "sk-tuning: there is no sentence and no head yet",
                hint="inject it before prepare and evaluate",
            )
        return context_window(stack.model, stack.tokenizer) - len(self.state["ids"])

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        target = step.batch[CLASS_INDEX]
        step.batch = {name: x for name, x in step.batch.items() if name not in (CLASS_INDEX, "labels")}

        def loss() -> tuple[Tensor, Any]:
            scores, outputs = self.scores(step.forward, step.batch["attention_mask"])
            return F.cross_entropy(scores, target), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def scores(self, forward: Callable[[], Any], mask: Tensor) -> tuple[Tensor, Any]:
        """Scores [B, C] of a forward pass over texts with this mask, and what the model returned."""
        seen: list[Tensor] = []  # the model's outputs have lost the prompt's positions
        handle = self.last.register_forward_hook(lambda module, inputs, hidden: seen.append(hidden))
        try:
            outputs = forward()
        finally:
            handle.remove()
        hidden = seen[-1]  # [B, n + T, d] behind a prompt, else [B, T, d]; a prefix was read before
        seen_mask = beside_soft_tokens(mask, mask, hidden.shape[1] - mask.shape[1])
        return self.head(hidden, seen_mask), outputs

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        tokenizer, room, closed = stack.tokenizer, self.room(stack), self.encoder
        rows = [class_ids(tokenizer, text, max_length=room, closed=closed) for text in texts]
        nothing = class_ids(tokenizer, "", max_length=room, closed=closed)
        if nothing in rows:
            index = rows.index(nothing)
            raise PeftxError(f"sk-tuning: text {index} (counting from 0), {texts[index]!r}, has no tokens")
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        found = []
        with nullcontext() if self.reader is None else self.reader.cached():
            for start in range(0, len(rows), 32):
                batch = Collator(pad)([{"input_ids": row} for row in rows[start : start + 32]])
                batch = {name: x.to(stack.model.device) for name, x in batch.items()}
                found.append(self.scores(partial(stack.model, **batch), batch["attention_mask"])[0].float())
        return list(self.config.labels), torch.cat(found)


@contextmanager
def cached(stack: Stack, *, id: str = "sk-tuning") -> Iterator[None]:
    """Inside, E_s has been read once and K_s and V_s are constants, for generation or to train something else.

    Raises:
        PeftxError: the prompt variant, which has none.
    """
    plugin = stack.member(id).plugin
    if not isinstance(plugin, SkTuning) or plugin.reader is None:
        raise PeftxError(f"{id}: there are no keys and values to cache", hint="SkTuning(variant='prefix')")
    with plugin.reader.cached():
        yield
