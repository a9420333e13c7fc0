"""SCL-MGSM: classes come task by task; a frozen model, a guided random projection, and a head in closed form.

"Enhancing Pretrained Model-based Continual Representation Learning via Guided Random Projection" (arXiv:2603.19145).
phi [d] is a text's last hidden state, x = [phi; 1], and Y [N, C] has a row of zeros and one 1 for each text:

    features   g(x) = act(P x)                          P: [L, d + 1], chosen by the first run's rows, then frozen
    head       B = (sum G^T G + gamma I)^-1 sum G^T Y   sums over all rows of all runs so far; B: [L, C]
    answer     argmax over the classes seen of g(x) B

No rows are kept: with R = (sum G^T G + gamma I)^-1, which starts at I / gamma, a batch G [b, L], Y [b, C] changes

    K = R G^T (I + G R G^T)^-1        B = B + K (Y - G B)       R = R - K G R

P is built row by row. Each time T candidates p ~ U[-lambda, lambda]^(d + 1) give columns g = act(X p) over the rows of
the first run, and one joins the n columns G that are there. By how much it lets the ridge loss of class q fall,
J_q = min |Y_q - G B_q|^2 + gamma |B_q|^2, is exact, and counts what G spans already and gamma:

    gain_q = <g, Y_q - G B_q>^2 / s        s = gamma + g^T g - g^T G (G^T G + gamma I)^-1 G^T g
    g fits, if  gain_q >= (1 - rho) (1 - 1 / (n + 2)) J_q  for every q

Of those that fit the largest sum_q gain_q joins. rho grows until one fits, and then lambda; if none does, P ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
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
from peftx.engines.data import ClassTexts, check_labels, take_classes
from peftx.errors import ConflictError, StackError, TrainingError
from peftx.kernel.heads import Head, Pool, first_of, last_of
from peftx.kernel.positions import place_of
from peftx.toolkits.evaluation import eval_mode, head_answers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}


class SclMgsmConfig(PluginConfig):
    """Options of SCL-MGSM. A run is a task, of one pass over its rows: `num_train_epochs: 1`."""

    labels: list[str] = Field(min_length=2, description="the classes of all tasks, in any order")
    width: int = Field(2000, ge=1, description="L, rows of P at most")
    ridge: float = Field(1.0, gt=0, allow_inf_nan=False, description="gamma")
    candidates: int = Field(20, ge=1, description="T; 1 with rho (1.0,): no guidance, the first one joins")
    activation: Literal["relu", "tanh"] = Field("relu", description="act")
    scales: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (0.5, 1.0, 5.0), min_length=1, description="values of lambda, in order"
    )
    rho: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.9, 0.99, 0.999, 0.9999), min_length=1, description="values of rho, in order"
    )


def joining(gain: Tensor, J: Tensor, rho: Sequence[float], n: int) -> int | None:
    """Which of the candidates joins the n columns, None if none fits. gain: [T, C], J: [C]."""
    for r in rho:
        fits = (gain >= (1 - r) * (1 - 1 / (n + 2)) * J).all(1)
        if fits.any():
            return int(gain.sum(1).where(fits, -torch.inf).argmax())
    return None


def guided(X: Tensor, Y: Tensor, config: SclMgsmConfig) -> Tensor:
    """P [n, d + 1] with n at most `width`, for X [N, d + 1] and Y [N, C], float64.

    The columns so far have G^T G + gamma I = U^T U, and Z = U^-T G^T Y, so that J = |Y|^2 - |Z|^2.
    """
    act, width = ACTIVATIONS[config.activation], config.width
    P, G = X.new_zeros(width, X.shape[1]), X.new_zeros(len(X), width)
    U, Z = torch.eye(width).to(X), X.new_zeros(width, Y.shape[1])
    for n in range(width):
        J = Y.square().sum(0) - Z.square().sum(0)
        for scale in config.scales:
            p = X.new_empty(config.candidates, X.shape[1]).uniform_(-scale, scale)
            g = act(X @ p.T)  # [N, T]
            u = torch.linalg.solve_triangular(U[:n, :n].T, G[:, :n].T @ g, upper=False)
            s = config.ridge + g.square().sum(0) - u.square().sum(0)
            z = (g.T @ Y - u.T @ Z[:n]) / s.sqrt()[:, None]  # [T, C]; its squares are the gains
            best = joining(z.square(), J, config.rho, n)
            if best is not None:
                break
        else:
            return P[:n]
        P[n], G[:, n], Z[n] = p[best], g[:, best], z[best]
        U[:n, n], U[n, n] = u[:, best], s[best].sqrt()
    return P


class AnalyticHead(Head):
    """P, B and R, in float64. `read` gives x [B, d + 1]. Rows of P that are not there are 0, and so are their features.

    Args:
        model: whose states it reads. classes: C. pool: of [B, T, d] what is phi.

    Attributes:
        seen: rows of each class so far, [C].
    """

    P: Tensor
    R: Tensor
    seen: Tensor

    def __init__(self, model: ModelView, classes: int, config: SclMgsmConfig, pool: Pool) -> None:
        nn.Module.__init__(self)  # not Head's, which makes a map of its own
        self.last, self.place = (model.last_hidden(),), partial(place_of, model.module)
        self.pool, self.act, L = pool, ACTIVATIONS[config.activation], config.width
        self.B = nn.Parameter(torch.zeros(L, classes, dtype=torch.float64))
        self.register_buffer("P", torch.zeros(L, model.hidden_size + 1, dtype=torch.float64))
        self.register_buffer("R", torch.eye(L, dtype=torch.float64) / config.ridge)
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.float64))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return F.pad(self.pool(hidden, mask).double(), (0, 1), value=1.0)

    def scores(self, x: Tensor) -> Tensor:
        """[B, C] of the classes seen; of others the lowest number."""
        return (self.act(x @ self.P.T) @ self.B).masked_fill(self.seen == 0, torch.finfo(torch.float32).min)

    def learn(self, x: Tensor, Y: Tensor) -> Tensor:
        """Take rows in; returns how far B was off before, the mean over rows, 0-d."""
        G = self.act(x @ self.P.T)  # [B, L]
        RG, off = self.R @ G.T, Y - G @ self.B
        K = torch.linalg.solve(torch.eye(len(G)).to(G) + G @ RG, RG.T).T
        self.B += K @ off
        self.R -= K @ RG.T
        self.seen += Y.sum(0)
        return off.square().sum(1).mean()


class SclMgsm(Plugin):
    """See the module. The first step of the first run reads all of its rows, and makes P."""

    Config = SclMgsmConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    refuses = {"t5": "the head reads one tower"}
    exempt = {
        "step_makes_no_gradients": "a closed form has no rate, so it moves at rate 0 too",
        "classes_are_named": "it names none before it has seen rows, and says so",
    }
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels_option = "labels"
    example = {"labels": ["negative", "positive"], "width": 8}
    config: SclMgsmConfig
    texts = ClassTexts("scl-mgsm", missing="there is no head yet")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.embedding()  # refuses what reads no tokens
        encoder = "encoder" in model.towers
        self.texts = self.texts.of(check_labels(self.config.labels), closed=encoder)
        head = AnalyticHead(model, len(self.texts.names), self.config, first_of if encoder else last_of)
        self.head = model.keep("head", head, full_precision=True)

    def check(self, stack: Stack) -> None:
        """R sums up features of the model as it is, and no gradients are made."""
        own = stack.id_of(self)
        for other in stack.members:
            trains = any(p.requires_grad for p in stack.ledger.parameters(other.id))
            steps = other.implements("train_step") and not stack.standing[other.id].frozen
            if other.id != own and (trains or steps):
                said = f"'{own}' reads a model that stands still, and '{other.id}' would train it"
                hint = f"train '{other.id}' in a stack of its own, stack.export(), and '{own}' on what that gives"
                raise ConflictError(said, hint=hint)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        self.texts.prepare(data, stack)
        if not self.head.seen.any():  # the projection is made of them; a later task may be one class
            self.texts.check_several(data)

    @hookimpl
    def train_step(self, step: TrainStep) -> Tensor:
        """Take the batch in. The loss is |Y - G B|^2, the mean over rows, before that."""
        with torch.no_grad(), eval_mode(step.module):
            if not self.head.seen.any():
                self.project(step)
            step.batch, target = take_classes(step.batch)

            def loss() -> tuple[Tensor, Any]:
                x, outputs = self.head.read(step.forward, step.batch["attention_mask"])
                return self.head.learn(x, self.one_hot(target)), outputs

            step.replace_task_loss(loss, over="rows")
            return step.total_loss()

    def project(self, step: TrainStep) -> None:
        """Make P of all rows of the run; of the batch, in a loop that gives no `train` rows."""
        batches = step.sample(sys.maxsize, by="scl-mgsm")
        X, Y = [], []
        for batch, target in map(take_classes, batches):
            X += [self.head.read(partial(step.module, **batch), batch["attention_mask"])[0]]
            Y += [self.one_hot(target)]
        P = guided(torch.cat(X), torch.cat(Y), self.config)
        if not len(P):
            said = "scl-mgsm: no candidate fits, so there would be no features"
            raise TrainingError(said, hint="more candidates, other scales, or a last rho nearer to 1")
        self.head.P[: len(P)] = P

    def one_hot(self, target: Tensor) -> Tensor:
        return F.one_hot(target, len(self.texts.names)).to(self.head.B)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        """Scores of all classes; of those that no run had the lowest number there is.

        Raises:
            PeftxError: there was no run yet.
        """
        rows = self.texts.rows(stack, texts)
        if not self.head.seen.any():
            raise StackError("scl-mgsm: it has seen no rows, so it knows no class", hint="stack.train first")
        x = torch.cat([*head_answers(stack, self.head, rows)])
        return self.texts.labels, self.head.scores(x).float()
