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
over x, and in an encoder's prompt variant over [P ; x]: there P sees the text, in a decoder it cannot. The paper's is
over [P ; x] in both (`mean`). Trained, K_s and V_s are constants (`cached`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
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
    VirtualTokens,
    hookimpl,
)
from peftx.engines.data import ClassTexts, check_labels, take_classes, text_ids
from peftx.errors import ArchitectureError, OptionError, StackError
from peftx.kernel.soft_rows import beside_soft_tokens
from peftx.toolkits.evaluation import context_window


class SkTuningConfig(PluginConfig):
    """Options of SK-Tuning."""

    variant: Literal["prompt", "prefix"] = Field("prompt", description="where the sentence stands")
    labels: list[str] = Field(["negative", "positive"], min_length=2, description="the classes")
    text: str | None = Field(
        None,
        description="s, a sentence that says the task; none: 'Classify the text as A or B', of the labels",
    )
    adapter: bool = Field(False, description="map the prompt, or the prefix's keys and values, by a matrix W")
    dropout: float = Field(0.1, ge=0, lt=1, description="before the head and behind W, while training")
    mean: Literal["text", "all"] | None = Field(
        None,
        description="prompt: the head averages the text, or the prompt too (all, the paper); none: all if an encoder",
    )

    @model_validator(mode="after")
    def _fit(self) -> SkTuningConfig:
        if self.variant == "prefix" and self.mean == "all":
            raise ValueError(
                "mean: all is of the prompt, and a prefix has no states to average: leave it out"
            )
        return self


class Prompt(VirtualTokens):
    """P = E_s, or dropout(E_s W).

    Args:
        E: first value of E_s, [n, d]. adapter: whether there is W. dropout: p.
    """

    def __init__(self, E: Tensor, *, adapter: bool, dropout: float) -> None:
        super().__init__(len(E))
        self.E = nn.Parameter(E)
        self.W = nn.Linear(E.shape[1], E.shape[1], bias=False).to(E) if adapter else None
        self.dropout = dropout

    def rows(self) -> Tensor:
        return self.E if self.W is None else F.dropout(self.W(self.E), self.dropout, self.training)


class Reader(nn.Module):
    """E_s, and what the frozen model makes of it: K_s and V_s of every layer.

    Args:
        E: first value of E_s, [n, d]. size: of a head, for W; none: no adapter. dropout: p.
        base: the model that reads. blocks: its layers.
    """

    def __init__(
        self,
        E: Tensor,
        *,
        size: int | None,
        dropout: float,
        base: nn.Module,
        blocks: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.E = nn.Parameter(E)
        self.W = nn.Linear(size, size, bias=False).to(E) if size is not None else None
        self.dropout = dropout
        self.base, self.blocks = (base,), tuple(blocks)  # in tuples: they are no children of this one
        self.noted: list[tuple[Tensor, Tensor]] | None = None  # keys and values, by layer, while E_s is read
        self.rows: list[list[Tensor]] = []  # K_s and V_s by layer, [1, heads, n, size]
        self.live = True

    def read(self) -> None:
        """The pass over E_s. Layers keep its activations: recomputed, they would not know that it is this pass."""
        (base,), n = self.base, len(self.E)
        inputs = {"inputs_embeds": self.E[None].to(base.dtype)}
        # What each layer of Gemma 3n and 4 looks up for a token; soft tokens have none.
        if own := getattr(base.config.get_text_config(), "hidden_size_per_layer_input", 0):
            inputs["per_layer_inputs"] = inputs["inputs_embeds"].new_zeros(1, n, len(self.blocks), own)
        places = torch.arange(-n, 0, device=self.E.device)[None]  # `shift_positions` adds n
        modes = [block.training for block in self.blocks]
        noted = self.noted = []
        for block in self.blocks:  # alone, which recomputes while training; not what is in it
            block.training = False
        try:
            base(**inputs, attention_mask=torch.ones_like(places), position_ids=places, use_cache=False)
        finally:
            self.noted = None
            for block, mode in zip(self.blocks, modes, strict=True):
                block.training = mode
        self.rows = [[self.adapted(part[:, :, -n:]) for part in pair] for pair in noted]

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
        K_s, V_s = (
            row.expand(len(key), -1, -1, -1) for row in reader.rows[self.layer]
        )  # [B, heads, n, size]
        return torch.cat((K_s, key), 2), torch.cat((V_s, value), 2)


class SkTuning(Plugin):
    """See the module."""

    Config = SkTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS, Claim.PREFIX_CACHE}
    architectures = ("mistral", "roberta")
    refuses = {"t5": "the head reads one tower"}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels_option = "labels"
    config: SkTuningConfig
    texts = ClassTexts("sk-tuning", missing="there is no sentence and no head yet")

    def claimed(self) -> frozenset[Claim]:
        prefix = self.config.variant == "prefix"  # whose sentence goes through the layers first
        return self.claims | {Claim.WHOLE_CALLS} if prefix else self.claims

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, labels = self.config, check_labels(self.config.labels)
        encoder = "encoder" in model.towers
        if "ids" not in self.state:
            self.state["ids"] = self.sentence(model, stack)
            seen = config.variant == "prompt" and encoder  # the sentence's states have read the text
            self.state["mean"] = config.mean or ("all" if seen else "text")
        self.over_prompt = (
            self.state.get("mean", "all") == "all"
        )  # a bundle of 0.2.0 says nothing, and averaged all
        ids = torch.tensor(self.state["ids"], device=model.module.device)
        E = model.embedding().module(ids).detach()
        # What trains is not in half precision, which would lose small steps; it is rounded where the model reads it.
        E = E.to(torch.promote_types(E.dtype, torch.float32))
        self.reader = None
        if config.variant == "prompt":
            model.prompt(Prompt(E, adapter=config.adapter, dropout=config.dropout)).to(E)
        else:
            sites = model.attention_sites()
            reader = Reader(
                E,
                size=self.size(model) if config.adapter else None,
                dropout=config.dropout,
                base=model.module.base_model,
                blocks=[site.module for site in model.blocks("layer")],
            )
            self.reader = model.keep("sentence", reader, full_precision=True)
            for layer, site in enumerate(sites):
                site.attend(Prefix(reader, layer))
            model.shift_positions(len(E))
        self.head = model.head("head", len(labels), dropout=config.dropout)
        self.texts = self.texts.of(labels, closed=encoder)

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
        tokenizer, text = stack.tokenizer, self.config.text
        text = f"Classify the text as {' or '.join(self.config.labels)}" if text is None else text
        if not text_ids(tokenizer, text):
            raise OptionError(
                f"{model.owner}: the text {text!r} has no tokens", hint="say the task in `text`"
            )
        ids, window = list(tokenizer(text)["input_ids"]), context_window(model.module, tokenizer)
        if len(ids) >= window:
            raise OptionError(
                f"{model.owner}: the text has {len(ids)} tokens, and the model reads {window} in all",
                hint="a shorter `text`",
            )
        return ids

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        self.texts.prepare(data, stack)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, target = take_classes(step.batch)

        def loss() -> tuple[Tensor, Any]:
            scores, outputs = self.scores(step.forward, step.batch["attention_mask"])
            return F.cross_entropy(scores, target), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def scores(self, forward: Callable[[], Any], mask: Tensor) -> tuple[Tensor, Any]:
        """Scores [B, C] of a forward pass over texts with this mask, and what the model returned."""
        if not self.over_prompt:
            return self.head.read(forward, mask)
        with self.head.reading() as seen:
            outputs = forward()
        h = seen[-1]  # [B, n + T, d]
        return self.head(h, beside_soft_tokens(mask, mask, h.shape[1] - mask.shape[1])), outputs

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        batches = self.texts.batches(stack, texts)
        with nullcontext() if self.reader is None else self.reader.cached():
            found = [self.scores(partial(stack.model, **b), b["attention_mask"])[0] for b in batches]
        return self.texts.labels, torch.cat(found).float()


@contextmanager
def cached(stack: Stack, *, id: str = "sk-tuning") -> Iterator[None]:
    """Inside, E_s has been read once and K_s and V_s are constants, for generation or to train something else.

    Raises:
        PeftxError: the prompt variant, which has none.
    """
    plugin = stack.member(id).plugin
    if not isinstance(plugin, SkTuning) or plugin.reader is None:
        raise StackError(f"{id}: there are no keys and values to cache", hint="SkTuning(variant='prefix')")
    with plugin.reader.cached():
        yield
