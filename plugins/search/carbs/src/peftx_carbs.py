"""CARBS: cost-aware Bayesian search around the front of quality and cost.

"Tune As You Scale: Hyperparameter Optimization For Compute Efficient Training", arXiv:2306.08055.

Options lie in a basic space, in which a unit is a factor of ten (of a span by log) or the whole of a range. Until four
trials came through, x = centre + N(0, r^2). Then, with Gaussian processes over x of the output y (quantiles become
normal) and of the log of the cost c, the front F of what was measured, and a process over log c on F:

    x = f + N(0, r^2), f of F, a hundred a dimension; integers rounded, what is out of bounds dropped
    argmax  EI(mu(x), sigma(x); max(front(c(x)), front(c'))) * max_f N(|x - f|; r) * P(success) * [c(x) < limit]

with c' drawn along the front, so that costly points are tried. Where fronts are crowded by luck, re-runs help: each
fifth proposal is the member of F with the fewest of them. What still runs counts as a draw from the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field
from torch import Tensor

from peftx import PluginConfig
from peftx.errors import OptionError
from peftx.searching.samplers import SearchSampler, Setting

NOISE = 1e-2
"""Variance of a measurement, where outputs have one of about 1; the kernels' own is 1."""
MORE = 64
"""Times that so many random points are drawn as are needed, before one out of bounds is clipped."""
Kernel = Callable[[Tensor, Tensor], Tensor]


class CarbsConfig(PluginConfig):
    radius: float = Field(
        0.3, gt=0, description="deviation of a proposal from a point of the front, in basic space"
    )
    first: int = Field(4, ge=1, description="trials that come through before models say where to look")
    resample_every: int = Field(5, ge=0, description="trials to one that is a re-run of the front; 0: none")
    candidates: int = Field(100, ge=1, description="proposals that are weighed, a dimension")
    least_cost: float = Field(0.2, ge=0, le=1, description="quantile of the costs where the front begins")
    bias: float = Field(1.0, ge=0, description="of the expected improvement, towards what is not known")
    center: dict[str, float] = Field(
        default_factory=dict,
        description="values to begin around, by key; the middles of the spans unless given",
    )


class Carbs(SearchSampler):
    """CARBS, for numbers alone, and for quality with one cost."""

    Config = CarbsConfig
    whole = True

    def check(self, setting: Setting) -> None:
        if len(setting.objectives) != 2:
            raise OptionError(
                f"carbs weighs quality against one cost, and the objectives are {', '.join(setting.objectives)}",
                hint="objectives: [quality, train_seconds]",
            )
        named = [
            key for key, each in setting.distributions.items() if isinstance(each, CategoricalDistribution)
        ]
        if named:
            raise OptionError(
                f"carbs searches numbers, and '{named[0]}' is a choice", hint="a span, or sampler: tpe"
            )
        for key, value in self.config.center.items():
            span: Any = setting.distributions.get(key)
            if span is None or not span.low <= value <= span.high:
                where = "is not varied" if span is None else "lies outside of its span"
                keys = f"keys: {', '.join(setting.distributions)}"
                raise OptionError(f"carbs: the center of '{key}' {where}", hint=keys)

    def sampler(self, setting: Setting) -> BaseSampler:
        return CarbsSampler(self.config, setting)


# -- basic space -----------------------------------------------------------------------------------------------------


class Basic:
    """Values of the spans, [..., dim] in float64, and their coordinates around the centre, which is 0."""

    def __init__(self, spans: Mapping[str, Any], center: Mapping[str, float]) -> None:
        self.spans = dict(spans)
        self.log = torch.tensor([span.log for span in spans.values()])
        self.whole = torch.tensor([isinstance(span, IntDistribution) for span in spans.values()])
        ends = [(span.low, span.high) for span in spans.values()]
        self.low, self.high = torch.tensor(ends, dtype=torch.float64).unbind(-1)
        middle = (self._raw(self.low) + self._raw(self.high)) / 2
        given = self.tensor({key: center.get(key, math.nan) for key in spans})
        self.origin = torch.where(given.isnan(), middle, self._raw(given))

    def tensor(self, params: Mapping[str, Any]) -> Tensor:
        return torch.tensor([params[key] for key in self.spans], dtype=torch.float64)

    def _raw(self, values: Tensor) -> Tensor:
        return torch.where(self.log, values.log10(), (values - self.low) / (self.high - self.low))

    def coordinates(self, values: Tensor) -> Tensor:
        return self._raw(values) - self.origin

    def values(self, x: Tensor) -> Tensor:
        """Rounded where whole numbers are asked for."""
        raw = x + self.origin
        found = torch.where(self.log, 10**raw, self.low + raw * (self.high - self.low))
        return torch.where(self.whole, found.round(), found)

    def inside(self, values: Tensor) -> Tensor:
        return ((values >= self.low) & (values <= self.high)).all(-1)

    def params(self, values: Tensor) -> dict[str, Any]:
        """Of one point."""
        told = torch.where(self.whole, values.round(), values).clamp(self.low, self.high).tolist()
        return {
            key: int(value) if whole else value
            for key, value, whole in zip(self.spans, told, self.whole.tolist(), strict=True)
        }


# -- the models ------------------------------------------------------------------------------------------------------


def linear_matern(radius: float) -> Kernel:
    """x.x' and Matern 3/2, whose length is the radius of the search."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = math.sqrt(3) * torch.cdist(a, b) / radius
        return a @ b.T + (1 + distance) * torch.exp(-distance)

    return kernel


def rbf(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-0.5 * torch.cdist(a, b) ** 2)


def posterior(kernel: Kernel, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [m] and covariance [m, m], without noise, at [m, dim], given y [n] at x [n, dim]."""
    root = torch.linalg.cholesky(kernel(x, x) + NOISE * torch.eye(len(x), dtype=x.dtype))
    cross = torch.linalg.solve_triangular(root, kernel(x, at), upper=False)
    mean = cross.T @ torch.linalg.solve_triangular(root, y[:, None], upper=False)[:, 0]
    return mean, kernel(at, at) - cross.T @ cross


def normal_scores(y: Tensor) -> Callable[[Tensor], Tensor]:
    """From outputs to where their quantile lies in a normal distribution. Of sqrt(n) quantiles, so that distances
    between outputs still count."""
    share = np.linspace(0, 1, max(2, math.isqrt(len(y))))
    knots, edge = np.quantile(y.numpy(), share), 0.5 / len(y)

    def scores(values: Tensor) -> Tensor:
        below = np.interp(values.numpy(), knots, share)  # of equal knots one end, and below the other
        above = 1 - np.interp(-values.numpy(), -knots[::-1], share)
        return torch.special.ndtri(torch.from_numpy((below + above) / 2).clamp(edge, 1 - edge))

    return scores


def expected_improvement(mean: Tensor, deviation: Tensor, reference: Tensor) -> Tensor:
    z = (mean - reference) / deviation
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return deviation * (density + z * torch.special.ndtr(z))


# -- the front -------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """All runs of one point; more is better."""

    values: Tensor
    outputs: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    @property
    def output(self) -> float:
        return sum(self.outputs) / len(self.outputs)

    @property
    def cost(self) -> float:
        return sum(self.costs) / len(self.costs)


def front_of(groups: Sequence[Group], least: float, *, careful: bool) -> list[Group]:
    """Groups that none of a lower cost beats, by cost; the first is the best of those up to the quantile `least`.

    careful: a point that was run once must beat the best run of the one before it, and re-run points begin the front
    where there are any: what was lucky once does not draw the search.
    """
    costs = [cost for group in groups for cost in group.costs]
    start = max(float(np.quantile(costs, least)), min(group.cost for group in groups))
    cheap = [group for group in groups if group.cost <= start]
    again = [group for group in cheap if len(group.outputs) > 1]
    front = [max(again if careful and again else cheap, key=lambda group: group.output)]
    for group in sorted((group for group in groups if group.cost > start), key=lambda group: group.cost):
        last = front[-1]
        bar = max(last.outputs) if careful and len(group.outputs) == 1 else last.output
        if group.output > bar:
            front.append(group)
    return front


# -- the sampler -----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The trials of a study, by what they say."""

    groups: list[Group]
    failed: list[Tensor]
    pending: list[Tensor]
    repeats: int

    @property
    def count(self) -> int:
        return sum(len(group.outputs) for group in self.groups)


class CarbsSampler(BaseSampler):
    """Of one proposal: all that it knows is in the study."""

    def __init__(self, config: CarbsConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.basic = Basic(setting.distributions, config.center)
        self.limit = setting.limits.get(setting.objectives[1], math.inf)
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.independent = RandomSampler(seed=setting.seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.setting.distributions)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        return self.basic.params(self.propose(self.seen(study, trial)))

    def seen(self, study: Study, trial: FrozenTrial) -> Seen:
        """Beyond the limit of its own cost a trial still came through; beyond another limit it failed."""
        seen = Seen([], [], [], 0)
        known: list[Tensor] = []
        for each in study.get_trials(deepcopy=False):
            if each.number == trial.number or not self.setting.distributions.keys() <= each.params.keys():
                continue
            values = self.basic.tensor(each.params)
            seen.repeats += any(torch.equal(values, other) for other in known)
            known.append(values)
            others = {
                name: over for name, over in each.constraints.items() if name != self.setting.objectives[1]
            }
            if each.state is TrialState.RUNNING:
                seen.pending.append(values)
            elif each.state is TrialState.COMPLETE and all(over <= 0 for over in others.values()):
                output, cost = each.values
                group = next((group for group in seen.groups if torch.equal(group.values, values)), None)
                if group is None:
                    group = Group(values)
                    seen.groups.append(group)
                group.outputs.append(output if self.setting.higher else -output)
                group.costs.append(max(cost, 1e-12))
            else:
                seen.failed.append(values)
        return seen

    def propose(self, seen: Seen) -> Tensor:
        """Values of the next point, [dim]."""
        if seen.count < self.config.first:
            return self.near(torch.zeros(1, len(self.basic.spans), dtype=torch.float64), 1)[0][0]
        every = self.config.resample_every
        if every and seen.count > every * (seen.repeats + 1):
            front = front_of(seen.groups, self.config.least_cost, careful=False)
            waiting = [sum(torch.equal(group.values, other) for other in seen.pending) for group in front]
            runs = [len(group.outputs) + count for group, count in zip(front, waiting, strict=True)]
            return front[runs.index(min(runs))].values
        front = front_of(seen.groups, self.config.least_cost, careful=True)
        origins = self.basic.coordinates(torch.stack([group.values for group in front]))
        values, density = self.near(origins, self.config.candidates * len(self.basic.spans))
        worth = self.worth(seen, front, self.basic.coordinates(values)) * density
        return values[worth.argmax()] if worth.max() > 0 else self.near(origins, 1)[0][0]

    def near(self, origins: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """At most `count` values around random origins, at least one; and how dense the search is there."""
        radius, dim = self.config.radius, origins.shape[-1]
        drawn = torch.randint(len(origins), (MORE * count,), generator=self.generator)
        noise = torch.randn(MORE * count, dim, generator=self.generator, dtype=torch.float64)
        x = origins[drawn] + radius * noise
        values = self.basic.values(x)
        kept = self.basic.inside(values)
        if not kept.any():
            kept[0] = True  # it is clipped
        nearest = torch.cdist(x[kept][:count], origins).amin(-1)
        return values[kept][:count], torch.exp(-0.5 * (nearest / radius) ** 2)

    def worth(self, seen: Seen, front: Sequence[Group], x: Tensor) -> Tensor:
        """The acquisition at [m, dim], but for the density of the search."""
        kernel = linear_matern(self.config.radius)
        values = torch.stack([group.values for group in seen.groups for _ in group.outputs])
        tried = self.basic.coordinates(values)
        outputs = torch.tensor(
            [output for group in seen.groups for output in group.outputs], dtype=torch.float64
        )
        costs = torch.tensor(
            [cost for group in seen.groups for cost in group.costs], dtype=torch.float64
        ).log()
        scores = normal_scores(outputs)
        shift, scale = (costs.max() + costs.min()) / 2, ((costs.max() - costs.min()) / 2).clamp_min(1e-9)
        cost = posterior(kernel, tried, (costs - shift) / scale, x)[0]

        where, scored = tried, scores(outputs)
        if seen.pending:
            waiting = self.basic.coordinates(torch.stack(seen.pending))
            mean, spread = posterior(kernel, tried, scored, waiting)
            root = torch.linalg.cholesky(spread + 1e-6 * torch.eye(len(waiting), dtype=torch.float64))
            drawn = mean + root @ torch.randn(len(waiting), generator=self.generator, dtype=torch.float64)
            where, scored = torch.cat([tried, waiting]), torch.cat([scored, drawn])
        mean, spread = posterior(kernel, where, scored, x)

        front_costs = torch.tensor([c for group in front for c in group.costs], dtype=torch.float64).log()
        front_scores = scores(
            torch.tensor([y for group in front for y in group.outputs], dtype=torch.float64)
        )
        front_x = (front_costs - shift) / scale
        ends = torch.tensor([group.cost for group in front], dtype=torch.float64).log()
        low, high = ends.min(), ends.max().clamp_max(math.log(self.limit))
        share = torch.rand((), generator=self.generator, dtype=torch.float64)
        threshold = (low + share * (high - low).clamp_min(0) - shift) / scale
        asked = torch.cat([cost, threshold[None]]).clamp(front_x.min(), front_x.max())
        best = posterior(rbf, front_x[:, None], front_scores, asked[:, None])[0]
        reference = torch.maximum(best[:-1], best[-1]) + self.config.bias

        worth = expected_improvement(mean, spread.diagonal().clamp_min(1e-12).sqrt(), reference)
        within = (cost * scale + shift) < math.log(self.limit) if self.limit < math.inf else True
        return worth * self.success(kernel, tried, seen.failed, x) * within

    def success(self, kernel: Kernel, tried: Tensor, failed: Sequence[Tensor], x: Tensor) -> Tensor:
        """The probability that a trial comes through, [m]: of a label below 0, -1 where others did and 1 where not."""
        if not failed:
            return torch.ones(len(x), dtype=torch.float64)
        where = torch.cat([tried, self.basic.coordinates(torch.stack(list(failed)))])
        labels = torch.cat([-torch.ones(len(tried)), torch.ones(len(failed))]).double()
        mean, spread = posterior(kernel, where, labels, x)
        return torch.special.ndtr(-mean / spread.diagonal().clamp_min(1e-12).sqrt())
