"""yq-LSA: a query comes with a first guess at its answer, and the guess is trained.

"The Initialization Determines Whether In-Context Learning Is Gradient Descent" (arXiv:2512.04268). A prompt is a matrix
Z [d + 1, n + 1]: columns z_i = (x_i; y_i) of n pairs with y_i = w . x_i, w ~ N(mu, I), and last (x_q; y_q) with a guess
y_q. H heads of linear self-attention on S = Z M Z^T / n, where M leaves out the last column, predict the entry
(d + 1, n + 1) of Z + sum_h PV_h S KQ_h Z, so that of each PV_h its last row p_h counts:

    LSA      y_q = 0:        sum_h p_h^T S KQ_h (x_q; 0)
    yq-LSA   y_q = v . x_q:  y_q + p^T S KQ (x_q; y_q)             one head; v trains with p and KQ

One step of gradient descent from w_0 is w_0 . x_q + (eta / n) sum_i (y_i - w_0 . x_i) x_i . x_q. That is yq-LSA with
v = w_0, p = (-w_0; 1) and KQ = diag(eta, .., eta, 0), and LSA where w_0 = 0. It is best from w_0 = mu. LSA has
nothing to say mu by but S: its heads make w = A vec(S) of it, for any A once they are d + 1, and no more than that
however many they are; so where mu is not 0 a gap stays, which v closes.

On a real model the guess goes to the last token of the query, behind which the answer begins. With X the mean of what
goes into the first layer at the query's tokens, the last one's gets

    + B y_q,    y_q = V X            V: [r, d], B: [d, r] and 0 at the start; both train
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
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
from peftx.errors import ConflictError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.calls import giving
from peftx.toolkits.decoding.text import check_writes


class YqLsaConfig(PluginConfig):
    """Options of the guess, and of the experiment."""

    size: int = Field(1, ge=1, description="r, numbers in a guess")
    dim: int = Field(10, ge=1, description="d of the experiment")
    pairs: int = Field(10, ge=1, description="n of the experiment, pairs in a prompt")
    norms: tuple[float, ...] = Field(
        (0.0, 1.0, 2.0, 3.0, 4.0), min_length=1, description="of mu, rising; each is an experiment"
    )
    tasks: int = Field(8192, ge=1, description="w of each experiment to train on, and as many to measure on")
    steps: int = Field(80, ge=1, description="of L-BFGS, for each model")


COLUMN = "query"
"""Column, 1 for tokens of the query."""
Lsa = tuple[Tensor, Tensor, Tensor]
"""p [H, d + 1], KQ [H, d + 1, d + 1], v [d]."""


def tasks(config: YqLsaConfig, mu: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """S [N, d + 1, d + 1] and w [N, d]; x ~ N(0, I)."""
    N, n, d = config.tasks, config.pairs, config.dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x, w = torch.randn(N, n, d, dtype=mu.dtype), mu + torch.randn(N, d, dtype=mu.dtype)
    z = torch.cat([x, x @ w[..., None]], -1)
    return z.mT @ z / n, w


def predict(S: Tensor, queries: Tensor, lsa: Lsa) -> Tensor:
    """The answer to queries x_q [Q, d] in each of N prompts: [N, Q]."""
    p, KQ, v = lsa
    z = torch.cat([queries, queries @ v[:, None]], 1)
    return z[:, -1] + torch.einsum("hi,nij,hjk,qk->nq", p, S, KQ, z)


def descent(w_0: Tensor, eta: float) -> Lsa:
    """One step of gradient descent from w_0."""
    one = torch.ones(1, dtype=w_0.dtype)
    return (
        torch.cat([-w_0, one])[None],
        torch.diag(torch.cat([eta * torch.ones_like(w_0), 0 * one]))[None],
        w_0,
    )


def risk(S: Tensor, w: Tensor, lsa: Lsa) -> Tensor:
    """The mean squared error over prompts and all queries x_q ~ N(0, I): the sum of that of the unit vectors."""
    return (predict(S, torch.eye(w.shape[1], dtype=w.dtype), lsa) - w).square().sum(1).mean()


def fit(S: Tensor, w: Tensor, start: Lsa, steps: int, *, guess: bool) -> Lsa:
    """What L-BFGS makes of these, v with a guess alone."""
    lsa = tuple(part.clone().requires_grad_(guess or part is not start[2]) for part in start)
    trained = [part for part in lsa if part.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = risk(S, w, lsa)
        found.backward()
        return found

    optimizer.step(loss)
    return tuple(part.detach() for part in lsa)  # type: ignore[return-value]


def experiment(config: YqLsaConfig) -> tuple[dict[str, list[float]], Tensor, Tensor]:
    """The risk on new prompts by the norm of mu of gradient descent from mu, of one head of LSA, of as many as one
    likes, and of yq-LSA; and mu and the v that was found, [d], at the last norm."""
    d, eta = config.dim, config.pairs / (config.pairs + config.dim + 1)  # the best one, from mu
    curves: dict[str, list[float]] = {name: [] for name in ("gd", "lsa", "heads", "yq-lsa")}
    for norm in config.norms:
        mu = torch.full((d,), norm / d**0.5, dtype=torch.float64)
        (S, w), new = tasks(config, mu, 0), tasks(config, mu, 1)
        start = descent(torch.zeros_like(mu), eta)
        yq = fit(S, w, start, config.steps, guess=True)
        A = torch.linalg.lstsq(S.flatten(1), w, driver="gelsd").solution  # [(d + 1)^2, d]
        curves["gd"].append(float(risk(*new, descent(mu, eta))))
        curves["lsa"].append(float(risk(*new, fit(S, w, start, config.steps, guess=False))))
        curves["heads"].append(float((new[0].flatten(1) @ A - new[1]).square().sum(1).mean()))
        curves["yq-lsa"].append(float(risk(*new, yq)))
    return curves, mu, yq[2]


class Guess(Delta):
    """y_q at the last token of the query, in what goes into the first layer.

    Args:
        call: what the model is called on. owner: the plugin's id. width: d. size: r.
    """

    def __init__(self, call: Call, owner: str, width: int, size: int) -> None:
        super().__init__()
        self.call, self.owner = call, owner
        self.V = nn.Parameter(torch.randn(size, width) / width**0.5)
        self.B = nn.Parameter(torch.zeros(width, size))

    def around(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        marks = self.call.tokens(COLUMN)  # [B, T]
        if marks is None or not (marks := marks * self.call.real).any():
            return inner(x, *args, **kwargs)
        if self.call.past:
            raise UnsupportedError(
                f"{self.owner}: a guess follows from the whole query, and a part of the text is in the cache already",
                hint="give the model the whole query in one call",
            )
        marks = self.call.rows(marks, x).to(x.dtype)  # [B, T + P]
        X = (marks[..., None] * x).sum(1) / marks.sum(1, keepdim=True).clamp(min=1)
        last = marks * (marks.flip(1).cumsum(1).flip(1) == 1)
        return inner(x + last[..., None] * F.linear(F.linear(X, self.V), self.B)[:, None], *args, **kwargs)


class YqLsa(Plugin):
    """See the module."""

    Config = YqLsaConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.NEEDS_LABELS}
    example = {"tasks": 64, "steps": 2, "norms": (0.0, 2.0)}
    refuses = {
        "t5": "its answer begins in another tower than its query",
        "bert": "no answer goes behind a query",
        "vit": "it reads no tokens",
    }
    config: YqLsaConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        check_writes(model)
        model.column(COLUMN)
        first = model.blocks("layer")[0]
        first.attach(Guess(model.call, model.owner, model.hidden_size, self.config.size))

    def check(self, stack: Stack) -> None:
        for member in stack.members:
            if member.claims(Claim.REPLACES_LOSS):
                said = f"{member} computes a loss of its own, by calls that do not say what the query is"
                raise ConflictError(f"{stack.id_of(self)}: {said}", hint="keep one of them")

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch = {COLUMN: query_of(step.batch["labels"]), **step.batch}
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
        """Add the `risk/...` of each model at the last norm of mu, and the `cosine` of v with mu; of rows, if any, the
        mean `nll/guess` and `nll/none` of labelled tokens with a guess and without. The risks by the norm of mu go to
        `yq-lsa.html` in the run's folder."""
        with torch.inference_mode(False), torch.enable_grad():
            curves, mu, v = experiment(self.config)
        for name, risks in curves.items():
            evaluation.add(f"risk/{name}", risks[-1], count=self.config.tasks)
        evaluation.add("cosine", torch.cosine_similarity(mu, v, 0))
        drawn = {name: zip(self.config.norms, risks, strict=True) for name, risks in curves.items()}
        evaluation.figure("yq-lsa", drawn, x="norm of mu", y="risk")
        if "eval" not in evaluation.data:
            return
        model, sums, count = evaluation.stack.model, {"guess": 0.0, "none": 0.0}, 0
        for batch in evaluation.batches():
            ids, labels = batch["input_ids"], batch["labels"]
            for name, marks in (("guess", query_of(labels)), ("none", torch.zeros_like(ids))):
                logits = model(input_ids=ids, **{COLUMN: marks}).logits[0, :-1]
                sums[name] += float(F.cross_entropy(logits.float(), labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != IGNORE).sum())
        for name, total in sums.items():
            evaluation.add(f"nll/{name}", total / count, count=count, unit="nats")


def query_of(labels: Tensor) -> Tensor:
    """1 for tokens up to the one behind which a row's first answer comes, [B, T]; pads are told by the call's mask."""
    answers = F.pad(labels[:, 1:] != IGNORE, (1, 0))  # nothing answers with the first token
    return (answers.cumsum(1) == 0).long()


def with_guesses(rows: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Rows whose prompt has the row's `guess` in it, as text: the template with `{prompt}` and `{guess}` filled in."""
    return [{**row, "prompt": template.format(prompt=row["prompt"], guess=row["guess"])} for row in rows]
