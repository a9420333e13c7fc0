"""Multi-Layers Trainable Pooling: texts as vectors, by trained latents that read every layer.

"Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?" (arXiv:2409.02727). Each layer
l = 1..L gives one vector s_l [d] of a text: the state of the EOS token behind it, where tokens see those before them
alone, or the mean over its tokens, where each sees the whole text (bidirectional: the causal mask is dropped). m
trained latents read the L vectors by cross-attention:

    S = norm([s_1 + E_1 .. s_L + E_L])           E: [L, d], of the layers
    A = softmax(norm(Q) W_q (S W_k)^T / sqrt(h)) [heads, m, L], the weights of the layers; Q: [m, d], h: size of a head
    X = Q + (A S W_v) W_o                        [m, d]
    Y = X + W_out(a * gelu(b))                   a, b = halves of W_in norm(X)
    e = mean over latents of Y / its length      [d]

Training pulls the vector q_i of a query to that of its document d_i, and from those of all other documents of the
batch, n of which are hard negatives that came with the queries:

    loss = - mean_i log softmax_j(scale q_i . d_j)[i]      d = [d_1 .. d_n, negative_1 .. negative_n]

Q, E and what is between them train here; what adapts the layers (LoRA, in the paper) is a plugin of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field
from torch import Tensor, nn

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
from peftx.engines.data import IGNORE, batches_of, check_passages, class_rows, together
from peftx.engines.data.encoding import eos_id
from peftx.errors import ArchitectureError
from peftx.kernel.heads import last_of, mean_of
from peftx.kernel.objective import pad_of
from peftx.toolkits.evaluation import context_window, evaluating
from peftx.toolkits.injecting import see_both_ways

COLUMNS = ("positive_ids", "negative_ids")
TEXTS = dict(zip(("prompt", "chosen", "rejected"), ("input_ids", *COLUMNS), strict=True))
"""Of a row of preferences the query, its document and the hard negative -> where their tokens are."""


class MultiLayerTrainablePoolingConfig(PluginConfig):
    """Options of Multi-Layers Trainable Pooling. Beside it the paper has LoRA: rank 16, alpha 32, dropout 0.1, on all
    linear layers."""

    bidirectional: bool = Field(
        False,
        description="drop a decoder's causal mask, and take the mean of each layer instead of its EOS state",
    )
    latents: int = Field(768, ge=1, description="m, latents that read the layers")
    heads: int = Field(32, ge=1, description="heads of the cross-attention")
    head_size: int | None = Field(
        None, ge=1, description="h, size of a head; none: the model's width over `heads`"
    )
    scale: float = Field(20.0, gt=0, allow_inf_nan=False, description="of the cosines in the loss")


class LayerPool(nn.Module):
    """The vectors s_1 .. s_L of texts -> e.

    Args:
        layers: L. width: d. latents: m. heads, head_size: of the cross-attention.
    """

    def __init__(self, layers: int, width: int, *, latents: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.E, self.Q = nn.Parameter(torch.randn(layers, width)), nn.Parameter(torch.randn(latents, width))
        self.norm_s, self.norm_q, self.norm_x = (nn.LayerNorm(width) for _ in range(3))
        inner, self.heads = heads * head_size, heads
        self.W_q, self.W_k, self.W_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.W_o = nn.Linear(inner, width, bias=False)
        self.W_in, self.W_out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def weights(self, S: Tensor) -> Tensor:
        """A of the normalised S [B, L, d], [B, heads, m, L]."""
        q, k = self.split(self.W_q(self.norm_q(self.Q))), self.split(self.W_k(S))
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def split(self, x: Tensor) -> Tensor:
        """[..., N, heads h] -> [..., heads, N, h]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, s: Tensor) -> Tensor:
        """[B, L, d] -> [B, d]."""
        S = self.norm_s(s.to(self.E.dtype) + self.E)
        read = self.weights(S) @ self.split(self.W_v(S))  # [B, heads, m, h]
        X = self.Q + self.W_o(read.transpose(1, 2).flatten(2))
        a, b = self.W_in(self.norm_x(X)).chunk(2, -1)
        return F.normalize((X + self.W_out(a * F.gelu(b))).mean(1), dim=-1)


class MultiLayerTrainablePooling(Plugin):
    """See the module."""

    Config = MultiLayerTrainablePoolingConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.NO_LABELS, Claim.REPLACES_LOSS}
    takes, gives = ("preference",), {"preference": "tokenized"}
    refuses = {"t5": "it has layers of two towers", "gemma3n": "its layers give several states a token"}
    exempt = {"accumulation_makes_the_same_step": "other documents of a micro-batch are its negatives"}
    example = {"latents": 8, "heads": 4}
    example_rows = tuple(
        {
            "prompt": f"User: {word}?\nAssistant:",
            "chosen": f"about {word}",
            "rejected": f"no {word}" + "!" * i,
        }
        for i, word in enumerate(("tea", "rain", "sleep", "noise", "bread", "snow"))
    )
    config: MultiLayerTrainablePoolingConfig

    def claimed(self) -> frozenset[Claim]:
        if not self.config.bidirectional:
            return self.claims
        return self.claims - {Claim.IDENTITY_AT_START} | {Claim.REPLACES_ATTENTION}

    def suits(self, model: ModelView) -> None:
        if hasattr(model.config.get_text_config(), "altup_num_inputs"):
            raise ArchitectureError(f"{model.owner}: its layers give several states a token", hint="gemma3")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, width, both = self.config, model.hidden_size, self.config.bidirectional
        model.embedding(), model.last_hidden()  # refuse what reads no tokens, and two towers
        for name in COLUMNS:
            model.column(name, own_length=True)
        self.owner, self.encoder = model.owner, "encoder" in model.towers
        self.of_layer = mean_of if both or self.encoder else last_of
        size = config.head_size or max(1, width // config.heads)
        pool = LayerPool(model.num_layers, width, latents=config.latents, heads=config.heads, head_size=size)
        self.pool = model.keep("pool", pool, full_precision=True)
        if both and not self.encoder:
            see_both_ways(model, "bidirectional")

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        hint = "rows with prompt (the query), chosen (its document) and rejected (a hard negative)"
        data.require(self.takes, by=self.owner, hint=hint)

        def texts(rows: Dataset) -> Dataset:
            check_passages(rows, by=self.owner)
            ids = {to: self.rows(stack, rows[of][:], data.max_length) for of, to in TEXTS.items()}
            return Dataset.from_dict(ids | {"labels": [[IGNORE] * len(query) for query in ids["input_ids"]]})

        data.rewrite(texts)

    def rows(self, stack: Stack, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """Texts as token ids, cut at their left; in a decoder EOS stands behind them."""
        tokenizer, room = stack.tokenizer, context_window(stack.model, stack.tokenizer)
        end = [] if self.encoder else [eos_id(tokenizer)]
        room = min(most or room, room) - len(end)
        found = class_rows(tokenizer, texts, max_length=room, closed=self.encoder, owner=self.owner)
        return [ids + end for ids in found]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        texts = [(name, None) for name in TEXTS.values()]
        step.batch = together(
            step.batch, texts, pad=pad_of(step.model, step.stack.tokenizer), owner=self.owner
        )

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(output_hidden_states=True)
            q, *documents = self.vectors(outputs, step.batch["attention_mask"]).chunk(3)  # [B, d] each
            scores = self.config.scale * q @ torch.cat(documents).T  # [B, 2 B]
            return F.cross_entropy(scores, torch.arange(len(q), device=q.device)), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def vectors(self, outputs: Any, mask: Tensor) -> Tensor:
        """e of each text, [B, d], of what the model gave with its hidden states."""
        return self.pool(torch.stack([self.of_layer(h.float(), mask) for h in outputs.hidden_states[1:]], 1))

    def embed(self, stack: Stack, texts: Sequence[str], *, size: int = 32) -> Tensor:
        """e of each text, [N, d] float32; `size` texts in a forward pass."""
        model, rows, found = stack.model, self.rows(stack, texts), []
        with evaluating(model):
            for b in batches_of(rows, pad_of(model, stack.tokenizer), model.device, size=size):
                found.append(self.vectors(model(**b, output_hidden_states=True), b["attention_mask"]))
        return torch.cat(found)
