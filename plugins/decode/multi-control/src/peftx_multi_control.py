"""MultiControl: text of several attributes at once, by a prefix from where the texts of all of them lie together.

"A Distributional Lens for Multi-Aspect Controllable Text Generation" (arXiv:2210.02889). Each text of the data has an
attribute a of one aspect t (sentiment, topic). An autoencoder, whose decoder is the frozen model, makes it a point:

    z = tanh(W_1 E(x) + b_1)          E(x): state of a trained vector behind x, in an encoder
    P = W_2 (z + noise) + b_2         l rows of keys and values in front of every layer's

    L = (1 - w_cls - w_gap) L_rec + w_cls L_cls + w_gap L_gap
    L_rec = -log p(x | P)
    L_cls = -log softmax(W_t z + c_t)_a                                          attributes of an aspect come apart
    L_gap = 10 sum_{s < t} mean over numbers of (m_s - m_t)^2                    aspects come together

m_t is the mean of z over the batch's texts of aspect t, or of the last batch that had some. Of the points X_a of all
texts, an intersection of attributes a_1, ..., a_n is searched from where texts are, with K nearest neighbours N_a(c):

    c <- sum_i w_i mean N_{a_i}(c) / sum_i w_i,        the best have the least sum_i mean_{x in N_{a_i}(c)} |c - x|^2

and texts are written behind the prefix of one of the best, z = c + noise.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import AttentionEdit, CallEdit, Claim, Generation, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.copies import Reader
from peftx.engines.training import TrainStep
from peftx.errors import ArchitectureError, ConflictError, DataError, StackError, UnsupportedError
from peftx.kernel.anatomy.anatomy import Heads
from peftx.kernel.modes import eval_mode
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.injecting import once_written

ASPECT, VALUE, LATENT = "aspect", "value", "latent"
AMPLIFICATION = 10
"""Of L_gap, as in the release."""
AT_ONCE = 100
"""Centers whose neighbours are looked up together."""


class MultiControlConfig(PluginConfig):
    """Options of MultiControl; the release trains 300 epochs at rate 1e-4, on 128 texts of one aspect a step."""

    values: tuple[int, ...] = Field(
        (2, 4, 2),
        min_length=1,
        description="attributes of each aspect; rows have an `aspect` and a `value`",
    )
    steer: tuple[int | None, ...] | None = Field(
        None,
        description="an attribute of each aspect that texts are to have, none: any; none at all: the base",
    )
    weights: tuple[float, ...] = Field((1.0, 5.0, 1.0), description="w, of each aspect in the search")
    latent: int = Field(768, ge=1, description="numbers in z")
    length: int = Field(20, ge=1, description="l, rows in front of each layer's keys and values")
    noise: float = Field(1e-3, ge=0, description="standard deviation of what is added to z")
    w_cls: float = Field(0.2, ge=0, lt=1, description="weight of L_cls")
    w_gap: float = Field(0.3, ge=0, lt=1, description="weight of L_gap")
    neighbours: int = Field(200, ge=1, description="K; all where there are fewer")
    iterations: int = Field(15, ge=0, description="steps of the search")
    starts: int = Field(1000, ge=1, description="texts that the search starts from: the best")
    centers: int = Field(10, ge=1, description="intersections that are kept of them")

    @model_validator(mode="after")
    def _fits(self) -> MultiControlConfig:
        if min(self.values) < 1 or len(self.weights) != len(self.values) or min(self.weights) <= 0:
            raise ValueError("values and weights: a number over 0 for each aspect")
        if self.w_cls + self.w_gap >= 1:
            raise ValueError(f"w_cls {self.w_cls} and w_gap {self.w_gap} leave nothing to L_rec")
        check_steer(self.steer, self.values)
        return self


def check_steer(steer: Sequence[int | None] | None, values: Sequence[int]) -> None:
    """Raises ValueError unless it has an attribute, or None, for each aspect, and one at least."""
    known = steer is None or (
        len(steer) == len(values)
        and any(a is not None for a in steer)
        and all(a is None or 0 <= a < n for a, n in zip(steer, values, strict=True))
    )
    if not known:
        raise ValueError(
            f"steer {steer}: of each aspect an attribute, below {list(values)}, or none; one at least"
        )


class Autoencoder(CallEdit):
    """E, W_1, and the classifiers; of a call, z.

    Args:
        model: E starts as a copy of it. config: sizes.
    """

    def __init__(self, model: ModelView, config: MultiControlConfig) -> None:
        super().__init__()
        self.E, T = Reader(model.module), len(config.values)
        self.e = nn.Parameter(self.E.vectors(1))
        self.W_1 = nn.Linear(model.hidden_size, config.latent)
        self.W = nn.Linear(config.latent, sum(config.values))  # of all aspects
        self.register_buffer("m", torch.zeros(T, config.latent))
        self.register_buffer("seen", torch.zeros(T, dtype=torch.bool))
        of = [t for t, n in enumerate(config.values) for _ in range(n)]
        self.register_buffer("of", torch.tensor(of), persistent=False)  # the aspect of each answer of W
        self.call, self.owner, self.noise = model.call, model.owner, config.noise
        self.z = torch.empty(0)
        """Of the last batch that was read, without noise: [B, latent]."""

    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        """z of texts [B, T], of which `real` are no pads: [B, latent]."""
        h = self.E(ids.masked_fill(~real, -1), self.e.expand(len(ids), -1, -1))[:, 0]
        return torch.tanh(self.W_1(h))

    def latent(self) -> Tensor | None:
        """z + noise of the call that runs, once for its cache: its column's, else that of its texts."""
        return self.call.once(self.owner, self.read)

    def read(self) -> Tensor | None:
        batch, ids, real = self.call.batch, self.call.ids, self.call.real
        if LATENT in batch or ASPECT not in batch:
            return batch.get(LATENT)
        if ids is None or real is None:
            said = f"{self.owner}: the encoder reads token ids, and the call has embeddings"
            raise UnsupportedError(said, hint=f"no '{ASPECT}' with it, or another plugin that makes them")
        self.z = self(ids, real)
        return self.z + self.noise * torch.randn_like(self.z) if self.training else self.z

    def before(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.latent()  # here, and not in a layer that may be recomputed
        return arguments

    def classes(self, aspect: Tensor, attribute: Tensor) -> Tensor:
        """L_cls."""
        scores = self.W(self.z).masked_fill(self.of != aspect[:, None], float("-inf"))
        first = (self.of < aspect[:, None]).sum(1)
        return F.cross_entropy(scores.float(), first + attribute)

    def means(self, aspect: Tensor) -> tuple[Tensor, Tensor]:
        """m [T, latent], and which aspects the batch has, [T]."""
        told = F.one_hot(aspect, len(self.m)).T.to(self.z)  # [T, B]
        here = told.sum(1) > 0
        return torch.where(
            here[:, None], told @ self.z / told.sum(1, keepdim=True).clamp(min=1), self.m
        ), here

    def gap(self, aspect: Tensor) -> Tensor:
        """L_gap, of aspects that the batch has or an earlier one had."""
        m, here = self.means(aspect)
        known = m[here | self.seen]
        return AMPLIFICATION * (known[:, None] - known).square().mean(-1).sum() / 2  # of each pair twice

    @torch.no_grad()
    def remember(self, aspect: Tensor) -> None:
        """m of this batch, for the next ones; its graph is let go, so that the model can be copied."""
        m, here = self.means(aspect)
        self.m.copy_(m)
        self.seen |= here
        self.z = self.z.detach()


class Prefix(AttentionEdit):
    """K' = [P_K ; K], V' = [P_V ; V] in one layer; without z nothing.

    Args:
        autoencoder: of whom z is. n: heads of the attention. length: l. latent: numbers in z. name: in a cache.
    """

    def __init__(self, autoencoder: Autoencoder, n: Heads, length: int, latent: int, name: str) -> None:
        super().__init__()
        self.autoencoder, self.name = (autoencoder,), name  # in a tuple: it is no child of this one
        self.shape, self.sizes = (n.kv_heads, length, -1), (n.head_dim, n.value_dim)
        self.W_2 = nn.Linear(latent, n.kv_heads * length * sum(self.sizes))

    def rows(self) -> Tensor | None:
        """[B, heads, l, sizes of a key and a value]."""
        z = self.autoencoder[0].latent()
        return None if z is None else self.W_2(z.to(self.W_2.weight)).unflatten(1, self.shape)

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        P = once_written(self.autoencoder[0].call, self.name, self.rows)
        if P is None:
            return key, value
        P_K, P_V = P.to(key).split(self.sizes, -1)
        return torch.cat((P_K, key), 2), torch.cat((P_V, value), 2)


class Points(nn.Module):
    """z of texts, [N, latent], and what each is of, [N]."""

    def __init__(self, z: Tensor, aspect: Tensor, value: Tensor) -> None:
        super().__init__()
        for name, found in (("z", z), (ASPECT, aspect), (VALUE, value)):
            self.register_buffer(name, found)


def near(c: Tensor, X: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Of each of c [C, d], the mean of its K nearest points of X [N, d], and its mean squared distance from these."""
    found = []
    for part in c.split(AT_ONCE):
        far, index = torch.cdist(part, X).square().topk(min(K, len(X)), largest=False)
        found.append((X[index].mean(1), far.mean(1)))
    means, distances = zip(*found, strict=True)
    return torch.cat(means), torch.cat(distances)


def intersection(
    points: Sequence[Tensor], weights: Sequence[float], *, K: int, iterations: int, starts: int, keep: int
) -> Tensor:
    """The best centers, [keep, d] at most.

    Args:
        points: X of each attribute, [N, d]. weights: w. starts: from how many of the points, the best. keep: how many.
    """

    def best(c: Tensor, count: int) -> Tensor:
        far = torch.stack([near(c, X, K)[1] for X in points]).sum(0)
        return c[far.argsort(stable=True)[:count]]

    c = best(torch.cat(list(points)), starts)
    for _ in range(iterations):
        moved = [w * near(c, X, K)[0] for X, w in zip(points, weights, strict=True)]
        c = torch.stack(moved).sum(0) / sum(weights)
    return best(c, keep)


class MultiControl(Plugin):
    """See the module. `steer` of the plugin, which is the option's at first, may be set between texts."""

    Config = MultiControlConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.READS_COLUMNS, Claim.TAKES_WEIGHTS}
    example = {"length": 3, "latent": 8, "values": (2, 2), "weights": (1.0, 2.0)}
    takes = ("prompt-completion", "messages")
    example_rows = tuple(
        {"prompt": f"{n}:", "completion": text, ASPECT: n % 2, VALUE: n // 2 % 2}
        for n, text in enumerate(
            ("A dull film.", "A ship sank.", "What a joy.", "They won, in the rain.") * 2
        )
    )
    refuses = {
        "bert": "it writes no text",
        "t5": "a prefix of a text is in one of its towers",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
        "vit": "it writes no text",
        "gemma3n": "its layers read token ids beside embeddings",
        "gemma4": "its layers read token ids beside embeddings",
        "llama4": "it has no part that gives hidden states alone",
    }
    exempt = {
        "accumulation_makes_the_same_step": "L_gap is of means over a batch, and those of its parts are others"
    }
    config: MultiControlConfig

    def check(self, stack: Stack) -> None:
        id, members = stack.id_of(self), stack.members
        behind = members[[m.id for m in members].index(id) + 1 :]
        if (other := next((m.id for m in behind if m.trains_own_rows), None)) is not None:
            said = f"'{id}' reads the aspect of each row of a batch, and '{other}' behind it runs rows of its own"
            raise ConflictError(said, hint=f"this order works: {other}, {id}")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        check_writes(model)
        if model.module.base_model is model.module or getattr(
            model.config.get_text_config(), "hidden_size_per_layer_input", False
        ):
            said = f"{model.owner}: a copy of {type(model.module).__name__} cannot read a vector that is no token"
            raise ArchitectureError(
                said, hint="take a model whose layers read embeddings alone: Llama, Qwen, GPT-2"
            )
        config, self.owner, self.call = self.config, model.owner, model.call
        self.steer = config.steer
        if not model.restoring:
            self.state = {}
        for column in (ASPECT, VALUE, LATENT):
            model.column(column)
        self.autoencoder = model.around(Autoencoder(model, config))
        for site in model.attention_sites():
            name = f"{model.owner}.{site.path}"
            site.attend(Prefix(self.autoencoder, model.heads_of(site), config.length, config.latent, name))
        nothing = torch.zeros(self.state.get("texts", 0), dtype=torch.int64)
        points = Points(torch.zeros(len(nothing), config.latent), nothing, nothing.clone())
        self.points = model.keep("points", points, full_precision=True)
        self.known: dict[tuple[int | None, ...], Tensor] = {}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        """The terms are `classes` and `gap`. With the last update of a run the points of its texts are stored.

        Raises:
            DataError: rows without an attribute of an aspect.
        """
        config, A = self.config, self.autoencoder
        aspect, attribute = self._told(step.batch)
        rest = 1 - config.w_cls - config.w_gap  # L is divided by it: the task's loss has weight 1
        step.add_loss("classes", lambda _: A.classes(aspect, attribute), config.w_cls / rest, over="rows")
        step.add_loss("gap", lambda _: A.gap(aspect), config.w_gap / rest, over="step")
        loss = yield
        A.remember(aspect)
        if step.last_micro and step.total is not None and step.index + 1 >= step.total:
            step.after_update(lambda _: self.store(step.batches_of("train", sys.maxsize)))
        return loss

    def _told(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        aspect, attribute = batch.get(ASPECT), batch.get(VALUE)
        values = torch.tensor(self.config.values)
        if aspect is not None and attribute is not None:
            t, a = aspect.cpu(), attribute.cpu()
            if bool(((t >= 0) & (t < len(values))).all()) and bool(((a >= 0) & (a < values[t])).all()):
                return aspect, attribute
        said = f"{self.owner}: rows without '{ASPECT}', from 0 to {len(values) - 1}, and its '{VALUE}', whole numbers"
        raise DataError(said, hint=f"an aspect has the attributes 0 to n - 1, for n of {values.tolist()}")

    @torch.no_grad()
    def store(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Keep the points of these texts, in the place of those before. `stack.train` does it when it ends; a loop of
        your own has to."""
        found = []
        with eval_mode(self.autoencoder):
            for batch in batches:
                z = self.autoencoder(batch["input_ids"], batch["attention_mask"].bool())
                found.append((z.to(self.points.z), *self._told(batch)))
        self.points.z, self.points.aspect, self.points.value = map(torch.cat, zip(*found, strict=True))
        self.state["texts"], self.known = len(self.points.z), {}

    def centers(self, steer: tuple[int | None, ...]) -> Tensor:
        """The intersections of attributes as in `steer`, [centers, latent] at most, the best first; searched once.

        Raises:
            ValueError: one is none. PeftxError: no text of one of them is stored.
        """
        if steer not in self.known:
            self.known[steer] = self._search(steer)
        return self.known[steer]

    def _search(self, steer: Sequence[int | None]) -> Tensor:
        config, points = self.config, self.points
        check_steer(steer, config.values)
        chosen = [(t, a, config.weights[t]) for t, a in enumerate(steer) if a is not None]
        found = [points.z[(points.aspect == t) & (points.value == a)] for t, a, _ in chosen]
        for (t, a, _), X in zip(chosen, found, strict=True):
            if not len(X):
                said = f"{self.owner}: no text with attribute {a} of aspect {t} is stored"
                raise StackError(said, hint="train on some with stack.train, or give them to `store`")
        return intersection(
            found, [w for *_, w in chosen], K=config.neighbours, iterations=config.iterations,
            starts=config.starts, keep=config.centers,
        )  # fmt: skip

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
        if self.steer is None:
            return (yield)
        c = self.centers(self.steer)
        with request.seeded():  # one for all rows, so that none hangs on what stands beside it
            z = c[torch.randint(len(c), (1,))] + self.config.noise * torch.randn(1, c.shape[1]).to(c)
        with self.call.giving({LATENT: z}):
            return (yield)
