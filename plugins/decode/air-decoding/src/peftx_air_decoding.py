"""Air-Decoding: text of an attribute by what prefixes of all its values say, reconstructed so that fluency stays.

"Air-Decoding: Attribute Distribution Reconstruction for Decoding-Time Controllable Text Generation" (arXiv:2310.14892).
For each value a of an attribute, l rows of keys and values in front of every layer's are trained on texts of it; the
model behind them gives p_a(v | x), alone it gives p(v | x). The distributions of the values are made flatter,

    R_a(v) = -1 / log p_a(v | x)                                                          larger where p_a is larger

and a token counts by how well it and the text so far tell a from the other values, by Bayes' rule:

    P(a | x, v) = R_a(v) / (R_a(v) + sum_{b != a} R_b(v) w_{b/a})       w_{b/a} = prod_{s < t} R_b(x_s) / R_a(x_s)
    P(v)  in proportion to  p(v | x) P(a | x, v)^lambda                 s: the tokens that were written

The rows of a layer are a map of l trained vectors for keys and l for values: P_K = E_K W + b, P_V = E_V W + b.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor

from peftx import AttentionEdit, Claim, Generation, ModelView, Plugin, PluginConfig, hookimpl
from peftx.engines.training import TrainStep
from peftx.errors import ArchitectureError, DataError, UnsupportedError
from peftx.kernel.call import Call
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.injecting import once_written

COLUMN = "attribute"
INIT_STD = 0.02
"""Standard deviation of first values, as GPT-2's."""
LEAST = 1e-10
"""Of -log p, so that R stays finite where p is 1."""


class AirDecodingConfig(PluginConfig):
    """Options of Air-Decoding; the paper takes lambda = 140 for sentiment, 60 for topics, 120 against toxicity."""

    values: int = Field(2, ge=2, description="values of the attribute, n; rows of data have 0 to n - 1")
    steer: int | None = Field(
        None, ge=0, description="a, the value that texts are to have; none: they are the base's"
    )
    strength: float = Field(140.0, ge=0, description="lambda, how much it counts")
    length: int = Field(20, ge=1, description="l, rows in front of each layer's keys and values")
    hidden: int = Field(512, ge=1, description="width of the vectors that they are made of")

    @model_validator(mode="after")
    def _known(self) -> AirDecodingConfig:
        if self.steer is not None and self.steer >= self.values:
            raise ValueError(
                f"steer {self.steer} is none of the {self.values} values, 0 to {self.values - 1}"
            )
        return self


class Prefix(AttentionEdit):
    """K' = [P_K ; K], V' = [P_V ; V] in one layer, by each row's value; calls without a column have none.

    Args:
        n: values. length: l. hidden: width of E. heads, size: of keys, and of values. call, name: of the model, in it.
    """

    def __init__(
        self, n: int, length: int, hidden: int, heads: int, size: int, call: Call, name: str
    ) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.empty(n, 2, length, hidden).normal_(std=INIT_STD))
        self.W = nn.Parameter(torch.empty(n, 1, hidden, heads * size).normal_(std=INIT_STD))
        self.b = nn.Parameter(torch.zeros(n, 1, 1, heads * size))
        self.size, self.call, self.name = size, call, name

    def rows(self) -> Tensor:
        """Of all values, keys and values: [n, 2, heads, l, size]."""
        return (self.E @ self.W + self.b).unflatten(-1, (-1, self.size)).transpose(2, 3)

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        which = self.call.batch.get(COLUMN)
        if which is None:
            return key, value
        P_K, P_V = once_written(self.call, self.name, self.rows)[which].to(key).unbind(1)
        return torch.cat((P_K, key), 2), torch.cat((P_V, value), 2)


def log_R(log_p: Tensor) -> Tensor:
    """log(-1 / log p)."""
    return -(-log_p).clamp(min=LEAST).log()


class Air(LogitsProcessor):
    """log p -> log p + lambda log P(a | x, v), where the values' passes have one cache beside the loop's.

    The loop may go on with other rows than before (beams): cache and history follow, by what is written in the rows.

    Args:
        plugin: whose. request: what is asked for; its prompts begin the rows.

    Raises:
        UnsupportedError: rows that begin otherwise, of which it is not known what was written in them.
    """

    def __init__(self, plugin: AirDecoding, request: Generation) -> None:
        self.plugin, self.request, self.n = plugin, request, plugin.config.values
        self.model = request.model
        self.takes = inspect.signature(self.model.forward).parameters
        self.prompt, mask = request.input_ids, request.attention_mask
        if mask is None:  # as `generate` decides it
            mask = request.prepare().model_kwargs.get("attention_mask")
            mask = torch.ones_like(self.prompt) if mask is None else mask
        self.mask = mask[:: len(mask) // len(self.prompt), -self.prompt.shape[1] :].long()
        self.cache: Cache | None = None
        self.read = self.prompt  # what the cache holds: each row's prompt, and its tokens [N, 1 + K]
        self.last = self.h = torch.empty(0)
        """log p_a of the token behind that [n, N, V]; log of prod_s R_a(x_s) up to there [n, N]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        copies, rest = divmod(len(input_ids), len(self.prompt))
        if rest or not self.prompt.equal(input_ids[:: max(copies, 1), : self.prompt.shape[1]]):
            said = f"{self.plugin.owner}: prompts that are decoded one by one, or without their pads"
            raise UnsupportedError(said, hint="one prompt without pads, or no other loop in the stack")
        P = self.log_P(input_ids)[self.plugin.steer].to(scores)
        scores = scores + self.plugin.config.strength * P
        return scores.log_softmax(-1) if (self.request.generation_config.num_beams or 1) > 1 else scores

    def log_P(self, ids: Tensor) -> Tensor:
        """log P(a | x, v) of all values, float32 [n, N, V], for the loop's rows [N, L]."""
        (N, L), n, B = ids.shape, self.n, len(self.prompt)
        row = torch.arange(N, device=ids.device) // (N // B)
        known = self.follow(torch.cat((row[:, None], ids), 1))
        mask = F.pad(self.mask[row], (0, L - self.prompt.shape[1]), value=1).repeat(n, 1)
        written = min(L - known, L - self.prompt.shape[1])
        given: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        given[COLUMN] = torch.arange(n, device=ids.device).repeat_interleave(N)
        if known:
            given["past_key_values"] = self.cache
        if "position_ids" in self.takes:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = written + 1
        inputs = self.model.prepare_inputs_for_generation(
            ids.repeat(n, 1), next_sequence_length=L - known, is_first_iteration=not known, **given
        )
        output = self.model(**inputs)
        self.cache = output.past_key_values
        log_p = output.logits.float().log_softmax(-1).unflatten(0, (n, N))  # [n, N, new, V]
        log_p = torch.cat((self.last[:, :, None], log_p), 2) if known else log_p
        told = log_p[:, :, -(written + 1) : -1].gather(
            3, ids[None, :, L - written :, None].expand(n, -1, -1, 1)
        )
        self.h = self.h + log_R(told).sum((2, 3))
        self.last = log_p[:, :, -1]
        return (self.h[..., None] + log_R(self.last)).log_softmax(0)

    def follow(self, rows: Tensor) -> int:
        """Bring cache and history into the order of `rows`; how many of their tokens they hold."""
        before, self.read = self.read, rows
        known = before.shape[1]
        if self.cache is not None and rows.shape[1] > known:
            same = (rows[:, None, :known] == before).all(2)  # [N, rows of the cache]
            if bool(same.any(1).all()):
                origin = same.int().argmax(1)
                blocks = torch.arange(self.n, device=rows.device)[:, None] * len(before)
                self.cache.reorder_cache((blocks + origin).flatten())
                self.h, self.last = self.h[:, origin], self.last[:, origin]
                return known - 1
        self.h = torch.zeros(self.n, len(rows), device=rows.device)
        return 0


class AirDecoding(Plugin):
    """See the module. `steer` of the plugin, which is the option's at first, may be set between texts."""

    Config = AirDecodingConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.READS_COLUMNS}
    example = {"length": 3, "hidden": 8, "steer": 1, "strength": 4.0}
    takes = ("prompt-completion", "messages")
    example_rows = tuple(
        {"prompt": f"The film was {word}.", "completion": mood, COLUMN: int(mood == " good")}
        for word, mood in (("dull", " bad"), ("a joy", " good"), ("weak", " bad"), ("bright", " good"))
    )
    refuses = {
        "bert": "it writes no text",
        "t5": "a prefix of a text is in one of its towers",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
        "vit": "it writes no text",
    }
    config: AirDecodingConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        check_writes(model)
        model.column(COLUMN)
        self.owner, config = model.owner, self.config
        self.steer: int | None = config.steer
        for site in model.attention_sites():
            n = model.heads_of(site)
            if n.head_dim != n.value_dim:
                said = f"{model.owner}: keys and values of {type(model.module).__name__} have two sizes, and one map"
                raise ArchitectureError(said, hint="p-tuning-v2 has prefixes for it")
            size, name = (n.kv_heads, n.head_dim), f"{model.owner}.{site.path}"
            site.attend(Prefix(config.values, config.length, config.hidden, *size, model.call, name))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        which = step.batch.get(COLUMN)
        if which is None or which.min() < 0 or which.max() >= self.config.values:
            said = f"{self.owner}: rows without '{COLUMN}', a whole number from 0 to {self.config.values - 1}"
            raise DataError(said, hint="it says which of the values a row's text has")
        return (yield)

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
        if self.steer is None:
            return (yield)
        if unread := ", ".join(request.model_kwargs):
            said = f"{self.owner}: the values' passes read text, and the request brings {unread}"
            raise UnsupportedError(said, hint=f"leave it out, or stack.disabled('{self.owner}')")
        air = Air(self, request)
        request.logits_processors.append(air)  # before temperature, top-k and top-p
        try:
            return (yield)
        finally:
            request.logits_processors.remove(air)
