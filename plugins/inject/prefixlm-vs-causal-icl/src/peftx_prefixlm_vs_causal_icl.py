"""Prefix mask against causal mask: how the examples of a context may see one another.

"CausalLM is not optimal for in-context learning" (arXiv:2308.06912). Under a prefix mask the tokens of the context see
all of it, and those behind it see what stands before them; under a causal mask all see what stands before them:

    i sees j    if j <= i, or i and j are both of the context

The theorem is of layers of linear attention that each make one step of gradient descent, on pairs (x_j, y_j) of a
context and queries x. What is left of y_j is r_j, with r_j = y_j at first, and 0 for a query:

    r_j <- r_j - eta sum_{k of the context that j sees} r_k x_k . x_j        the prediction for a query is -r

With a_j = eta times the sum of r_j over layers, r = y - M a, where M holds x_k . x_j of what j sees:

    prefix   M = X X^T: gradient descent on all pairs; it ends at least squares
    causal   M = tril(X X^T): a_j = (y_j - sum_{i<j} a_i x_i . x_j) / (x_j . x_j) at its end, so every pair is fitted
             by those up to itself, and a query is not

On a real model the mask is the plugin's: of what is trained on, the context is what stands before the first label, and
of what is generated the prompt. A model that was trained under the causal mask has to be tuned under this one.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from peftx import (
    AttentionEdit,
    Claim,
    Evaluation,
    Generation,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, ConflictError, OptionError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.calls import giving


class PrefixlmVsCausalIclConfig(PluginConfig):
    """Options of the experiment; the mask on a model has none."""

    dim: int = Field(16, ge=1, description="numbers in x")
    pairs: int = Field(40, ge=1, description="pairs in a context")
    most_pairs: int = Field(300, ge=1, description="of those whose causal stationary point is drawn")
    queries: int = Field(20, ge=1, description="of each context")
    layers: int = Field(50, ge=1, description="of linear attention, each a step of gradient descent")
    rate: float = Field(0.04, gt=0, allow_inf_nan=False, description="eta, of a step on the sum over pairs")
    problems: int = Field(64, ge=1, description="contexts, each with a w of its own")
    noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="standard deviation on the labels of pairs"
    )


COLUMN = "context"
"""Column, 1 for tokens of the context."""
MEANS = (0, 1, 2, 3)
"""Of the numbers of x, in the figure of stationary points."""


def sees(context: Tensor) -> Tensor:
    """Which keys each token sees, bool [T, T], where these are of the context, bool [T]."""
    return torch.ones(len(context), len(context)).tril().bool() | context[:, None] & context


def problems(config: PrefixlmVsCausalIclConfig, pairs: int, mean: float) -> tuple[Tensor, Tensor]:
    """x [B, n + Q, d], uniform in [-1, 1] around the mean, and y [B, n + Q]: w . x, with noise on the n pairs."""
    B, Q, d = config.problems, config.queries, config.dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = 2 * torch.rand(B, pairs + Q, d, dtype=torch.float64) - 1 + mean
        y = (x @ torch.randn(B, d, 1, dtype=torch.float64))[..., 0]
        y[:, :pairs] += config.noise * torch.randn(B, pairs, dtype=torch.float64)
    return x, y


def descend(x: Tensor, y: Tensor, seen: Tensor, rate: float, layers: int) -> Tensor:
    """r after each layer, [layers + 1, B, n + Q].

    Args:
        x: [B, n + Q, d]. y: [B, n], of the pairs. seen: bool [n + Q, n], which pairs each sees.
    """
    n = y.shape[1]
    M, r = (x @ x[:, :n].mT) * seen, [F.pad(y, (0, x.shape[1] - n))]
    for _ in range(layers):
        r.append(r[-1] - rate * (M @ r[-1][:, :n, None])[..., 0])
    return torch.stack(r)


def stationary(x: Tensor, y: Tensor) -> Tensor:
    """What the causal layers predict for each query at their end, after each number of pairs: [B, Q, n]."""
    n = y.shape[1]
    K = x @ x[:, :n].mT  # [B, n + Q, n]
    a = torch.linalg.solve_triangular(K[:, :n], y[..., None], upper=False)
    return (K[:, n:] * a.mT).cumsum(-1)


def experiment(config: PrefixlmVsCausalIclConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean squared errors: of queries and of pairs by the number of layers, [layers + 1]; and of queries at the causal
    stationary point by the number of pairs, for each mean of x, [most_pairs].

    Raises:
        PeftxError: a rate at which the steps grow out of all bounds.
    """
    n = config.pairs
    x, y = problems(config, n, 0)
    tokens, depth, ends = torch.arange(x.shape[1]), dict[str, Tensor](), dict[str, Tensor]()
    for name, context in (("prefix", tokens < n), ("causal", tokens < 0)):
        r = descend(x, y[:, :n], sees(context)[:, :n], config.rate, config.layers)
        depth[f"query/{name}"] = (y[:, n:] + r[..., n:]).square().mean((1, 2))
        depth[f"pairs/{name}"] = r[..., :n].square().mean((1, 2))
    if not torch.stack([*depth.values()]).isfinite().all():
        raise OptionError(
            f"prefixlm-vs-causal-icl: steps of rate {config.rate} diverge", hint="a smaller rate"
        )
    w = torch.linalg.lstsq(x[:, :n], y[:, :n, None], driver="gelsd").solution
    depth["query/least-squares"] = ((x[:, n:] @ w)[..., 0] - y[:, n:]).square().mean()[None]
    for mean in MEANS:
        x, y = problems(config, config.most_pairs, mean)
        pairs, queries = y.split([config.most_pairs, config.queries], 1)
        ends[f"stationary/mean-{mean}"] = (queries[..., None] - stationary(x, pairs)).square().mean((0, 1))
    return depth, ends


def log10(errors: Tensor) -> list[float]:
    """Of errors over 1, 2, ..., which may be 0 to rounding."""
    return errors.clamp(min=1e-30).log10().tolist()  # type: ignore[no-any-return]


class PrefixMask(AttentionEdit):
    """The mask in one layer.

    Args:
        call: what the model is called on. owner: the plugin's id.
    """

    def __init__(self, call: Call, owner: str) -> None:
        super().__init__()
        self.call, self.owner = call, owner

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Any
    ) -> Tensor:
        marks = self.call.tokens(COLUMN)  # [B, T]
        if marks is None or not (marks := marks * self.call.real).any():
            return attend(query, key, value, mask)  # type: ignore[no-any-return]
        if self.call.past:
            raise UnsupportedError(
                f"{self.owner}: a context is seen as a whole, and a part of the text is in the cache already",
                hint="give the model the whole context in one call",
            )
        if mask is None:
            Q, K = query.shape[2], key.shape[2]
            mask = query.new_ones(Q, K, dtype=torch.bool)[None, None]
            mask = mask.tril() if Q > 1 else mask  # one token sees all that other plugins put in front
        queries, keys = self.call.rows(marks, query[:, 0]).bool(), self.call.keys(marks, mask).bool()
        both = queries[:, None, :, None] & keys[:, None, None]  # [B, 1, Q, K]
        return attend(query, key, value, mask | both if mask.dtype == torch.bool else mask.where(~both, 0.0))  # type: ignore[no-any-return]


class PrefixlmVsCausalIcl(Plugin):
    """See the module."""

    Config = PrefixlmVsCausalIclConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.BESIDE_WEIGHTS,
        Claim.REPLACES_ATTENTION,
        Claim.NEEDS_LABELS,
        Claim.TELLS_TOKENS,
    }
    refuses = {
        "t5": "its encoder sees the whole context by itself",
        "bert": "it has no causal mask",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
        "vit": "it reads no tokens",
    }
    example = {"pairs": 8, "most_pairs": 12, "layers": 6, "problems": 4}
    config: PrefixlmVsCausalIclConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        kind, config = str(model.config._attn_implementation), model.config
        decoder = model.module.can_generate() and not config.is_encoder_decoder
        sites = model.attention_sites() if decoder else []
        if len(sites) < model.num_layers or not kind.endswith(("eager", "sdpa")):
            raise ArchitectureError(
                f"{model.owner}: it needs a decoder with attention under a mask of pairs of tokens in each layer, and "
                f"{config.model_type} has '{kind}' in {len(sites)} of {model.num_layers}",
                hint="a decoder of attention alone with attn_implementation='sdpa'",
            )
        model.column(COLUMN)
        for site in sites:
            site.attend(PrefixMask(model.call, model.owner))

    def check(self, stack: Stack) -> None:
        for member in stack.members:
            if member.claims(Claim.REPLACES_LOSS):
                said = f"{member} computes a loss of its own, by calls that do not say what the context is"
                raise ConflictError(f"{stack.id_of(self)}: {said}", hint="keep one of them")

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch = {COLUMN: before(step.batch["labels"]), **step.batch}
        return (yield)

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Tensor, Tensor]:
        ids, mask = (
            request.input_ids,
            request.attention_mask,
        )  # a static cache hides from calls which tokens are pads
        with giving(
            request.model, {COLUMN: torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]}
        ):
            return (yield)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add the last of each curve of the experiment, and of rows, if any, the mean `nll/prefix` and `nll/causal` of
        labelled tokens under either mask; the curves go to `prefixlm-vs-causal-icl.html` in the run's folder."""
        depth, ends = experiment(self.config)
        for name, errors in (depth | ends).items():
            evaluation.add(name, errors[-1])
        layers = {name: errors[1:] for name, errors in depth.items() if len(errors) > 1}
        for x, curves in (("layers", layers), ("pairs", ends)):
            drawn = {name: enumerate(log10(errors), 1) for name, errors in curves.items()}
            y = "log10 of the mean squared error"
            evaluation.figure("prefixlm-vs-causal-icl", drawn, x=x, y=y)
        if "eval" not in evaluation.data:
            return
        model, sums, count = evaluation.stack.model, {"prefix": 0.0, "causal": 0.0}, 0
        for batch in evaluation.batches():
            ids, labels = batch["input_ids"], batch["labels"]
            for name, marks in (("prefix", before(labels)), ("causal", torch.zeros_like(ids))):
                logits = model(input_ids=ids, **{COLUMN: marks}).logits[0, :-1]
                sums[name] += float(F.cross_entropy(logits.float(), labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != IGNORE).sum())
        for name, total in sums.items():
            evaluation.add(f"nll/{name}", total / count, count=count, unit="nats")


def before(labels: Tensor) -> Tensor:
    """1 for tokens before a row's first label, [B, T]; pads are told by the call's mask."""
    return ((labels != IGNORE).cumsum(1) == 0).long()
