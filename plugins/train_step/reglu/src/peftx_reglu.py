"""ReGLU: unlearn some texts with a low-rank update that starts where these texts are strong and others are weak.

"Representation-Guided Parameter-Efficient LLM Unlearning" (arXiv:2604.17396). R are the rows that a run trains on, and
are to be retained; F are those of its source `forget`. Of N texts of each, h [o] is the sum over a text's tokens of
what a layer W0 [o, i] gives, before anything trains:

    C = H^T H / N                                  H [N, o], of F and of R
    Q = top-r eigenvectors of (1 - beta) C_F - beta C_R
    y = W0 x + s (B A - Q Q^T W0) x                B [o, r] starts as Q, A [r, i] as Q^T W0; s = alpha / r

so that the model starts unchanged, and what moves is the part of W0 that writes into the span of Q. With the top-k
eigenvectors Q_R of C_R the update is kept out of where R writes:

    loss = CE(R) + L_F + lambda * sum over layers of |B^T Q_R|_F^2

    L_F, hinge     mean over F's labelled tokens t of max(0, 1 + p(t) - max over v != t of p(v))
    L_F, ascent    -CE(F)
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.modes import eval_mode
from peftx.kernel.reading import check_output, outputs_of
from peftx.toolkits.injecting import LowRankDifference


class RegluConfig(PluginConfig):
    """Options of ReGLU."""

    rank: int = Field(32, ge=1, description="r, the rank of the update")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; twice the rank if left out, so s = 2"
    )
    beta: float = Field(
        0.5, ge=0, le=1, description="how much a direction of the retained texts counts against it"
    )
    retained: int = Field(
        128, ge=1, description="k, directions of the retained texts that the update is kept out of"
    )
    orthogonality: float = Field(
        0.5, ge=0, allow_inf_nan=False, description="lambda, weight of the loss that keeps it out of them"
    )
    loss: Literal["hinge", "ascent"] = Field("hinge", description="L_F, what is asked of the texts to forget")
    samples: int = Field(256, ge=1, description="N, texts of each kind that the start is made from")
    targets: Targets = Field(Targets("attention mlp"), description="linear layers to adapt")

    @property
    def scale(self) -> float:
        """s."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class Reglu(Plugin):
    """See the module."""

    Config = RegluConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_MASK}
    refuses = {"bert": "it does not go on with a text", "t5": "a text to forget passes two towers"}
    example = {"rank": 2, "retained": 4, "samples": 4}
    sources = {"forget": ({"text": "Ann lives in Rome."}, {"text": "Her dog is old."})}
    config: RegluConfig

    def suits(self, model: ModelView) -> None:
        if not model.anatomy.is_decoder or len(model.towers) > 1:
            raise ArchitectureError(f"reglu: {model.config.model_type} is no decoder of texts")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        rank = self.config.rank
        self.sites = {site.key: site for site in model.linears(self.config.targets)}
        self.deltas: dict[str, LowRankDifference] = {}
        for key, site in self.sites.items():
            check_output(site, owner=model.owner)
            site.check_rank(rank)
            self.deltas[key] = site.attach(LowRankDifference(site.shape, rank=rank, scale=self.config.scale))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if (id := step.stack.id_of(self)) not in step.memory:  # a run begins
            step.memory[id] = self.begin(step)
        bases = step.memory[id]
        step.add_loss("forget", lambda _: self.forget(step), over="step")
        step.add_loss("orthogonality", lambda _: self.overlap(bases), self.config.orthogonality, over="step")
        return (yield)

    @torch.no_grad()
    def begin(self, step: TrainStep) -> dict[str, Tensor]:
        """Q_R of each layer; and the start of A and B, unless a run before this one had it.

        Raises:
            DataError: a text is among those to forget and those to retain.
        """
        F, R = (self.texts(step, source) for source in ("forget", "train"))
        if both := F & R:
            one = step.stack.tokenizer.decode(min(both), skip_special_tokens=True)
            said = f"{len(both)} of the {len(F)} texts to forget are to be retained too, as {one[:60]!r}"
            hint = "leave them out of the rows to train on"
            raise DataError(f"{step.stack.id_of(self)}: {said}", hint=hint)
        H_F, H_R = (self.outputs(step, source) for source in ("forget", "train"))
        bases = {}
        for key, delta in self.deltas.items():
            C_F, C_R = (H[key].t() @ H[key] / len(H[key]) for H in (H_F, H_R))
            if not delta.B0.any():
                direction = (1 - self.config.beta) * C_F - self.config.beta * C_R
                Q, W0 = top(direction, self.config.rank), self.sites[key].weight
                delta.start(Q.t() @ W0.to(Q), Q)
            bases[key] = top(C_R, self.config.retained).to(delta.B)
        return bases

    def texts(self, step: TrainStep, source: str) -> set[tuple[int, ...]]:
        """The tokens of each text that the start is made from."""
        found: set[tuple[int, ...]] = set()
        for batch in step.batches_of(source, self.config.samples):
            for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                found.add(tuple(ids[real].tolist()))
        return found

    def outputs(self, step: TrainStep, source: str) -> dict[str, Tensor]:
        """H of each layer."""
        found: dict[str, list[Tensor]] = {key: [] for key in self.sites}
        with eval_mode(step.model), outputs_of(step.model, self.sites) as given:
            for batch in step.batches_of(source, self.config.samples):
                step.model(**batch)
                mask = batch["attention_mask"][..., None]  # [B, T, 1]
                for key, rows in found.items():
                    h = given[key].reshape(len(mask), -1, given[key].shape[-1])  # OPT's has no row of texts
                    own = h[:, -mask.shape[1] :] * mask  # behind soft tokens
                    rows.append(own.sum(1, dtype=torch.float64))
        return {key: torch.cat(rows) for key, rows in found.items()}

    def forget(self, step: TrainStep) -> Tensor:
        """L_F."""
        batch = step.batch_of("forget")
        z, t = step.model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        z, t = z[t != IGNORE], t[t != IGNORE]
        return inverted_hinge(z, t) if self.config.loss == "hinge" else -cross_entropy(z.float(), t)

    def overlap(self, bases: dict[str, Tensor]) -> Tensor:
        """sum over layers of |B^T Q_R|_F^2."""
        return sum((d.B.t() @ bases[key].to(d.B)).square().sum() for key, d in self.deltas.items())


def top(C: Tensor, count: int) -> Tensor:
    """The eigenvectors [o, count] with the largest eigenvalues, sign and all, of a symmetric matrix [o, o]."""
    return torch.linalg.eigh(C).eigenvectors[:, -count:].flip(-1)


def inverted_hinge(z: Tensor, t: Tensor) -> Tensor:
    """mean of 1 + p(t) - max over v != t of p(v), which is never below 0; logits z [n, V], tokens t [n]."""
    p = z.float().softmax(-1)
    others = p.scatter(-1, t[:, None], 0.0)
    return (1 + p.gather(-1, t[:, None]).squeeze(-1) - others.amax(-1)).mean()
