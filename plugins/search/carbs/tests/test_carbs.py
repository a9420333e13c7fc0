"""CARBS on functions whose front is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from peftx.errors import PeftxError
from peftx.searching.samplers import Samplers, Setting
from peftx_carbs import (
    Carbs,
    CarbsSampler,
    Group,
    expected_improvement,
    front_of,
    linear_matern,
    normal_scores,
    posterior,
    rbf,
)

SPANS: dict[str, BaseDistribution] = {
    "size": FloatDistribution(1.0, 1000.0, log=True),
    "rate": FloatDistribution(0.0, 1.0),
}
Told = tuple[float, float]


def rising(params: Mapping[str, Any]) -> Told:
    """Output and cost: a larger size costs more and is better, at a rate of 0.2."""
    return math.log10(params["size"]) - 30 * (params["rate"] - 0.2) ** 2, params["size"]


def setting(seed: int = 0, limits: Mapping[str, float] | None = None, **more: Any) -> Setting:
    given = {"distributions": SPANS, "stacks": 1, "higher": True, **more}
    return Setting(seed, ("quality", "train_seconds"), limits=limits or {}, **given)


def new_study(higher: bool = True) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["maximize" if higher else "minimize", "minimize"])


def ask(
    study: optuna.Study, number: int, limits: Mapping[str, float] | None = None, **options: Any
) -> optuna.Trial:
    spans = options.pop("spans", SPANS)
    study.sampler = Carbs(**options).sampler(
        setting(number, limits, distributions=spans, higher=_higher(study))
    )
    return study.ask(dict(spans))


def _higher(study: optuna.Study) -> bool:
    return study.directions[0] is optuna.study.StudyDirection.MAXIMIZE


def carried_out(count: int, *, first: int = 0, **more: Any) -> optuna.Study:
    study = more.pop("study", None) or new_study()
    for number in range(first, count):
        trial = ask(study, number, **more)
        study.tell(trial, rising(trial.params))
    return study


def known(points: list[tuple[float, float, float, float]], study: optuna.Study | None = None) -> optuna.Study:
    """A study with (size, rate, output, cost)."""
    study = study or new_study()
    for size, rate, output, cost in points:
        params = {"size": size, "rate": rate}
        study.add_trial(create_trial(params=params, distributions=dict(SPANS), values=[output, cost]))
    return study


def sampler(limits: Mapping[str, float] | None = None, seed: int = 0, **options: Any) -> CarbsSampler:
    found = Carbs(**options).sampler(setting(seed, limits))
    assert isinstance(found, CarbsSampler)
    return found


def seen(study: optuna.Study, of: CarbsSampler) -> Any:
    return of.seen(study, study.ask())


# -- the parts -------------------------------------------------------------------------------------------------------


def test_a_unit_is_a_factor_of_ten_or_the_whole_of_a_range() -> None:
    basic = sampler().basic
    middle = basic.tensor({"size": 1000**0.5, "rate": 0.5})
    assert torch.allclose(basic.coordinates(middle), torch.zeros(2).double(), atol=1e-12)
    there = basic.coordinates(basic.tensor({"size": 10 * 1000**0.5, "rate": 1.0}))
    assert torch.allclose(there, torch.tensor([1.0, 0.5]).double())
    assert torch.allclose(basic.values(there), basic.tensor({"size": 10 * 1000**0.5, "rate": 1.0}))


def test_the_search_begins_around_its_center() -> None:
    basic = sampler(center={"size": 10.0}).basic
    zero = basic.values(torch.zeros(2).double())
    assert torch.allclose(zero, torch.tensor([10.0, 0.5]).double())
    found = [ask(new_study(), number, center={"size": 10.0}).params["size"] for number in range(30)]
    logs = torch.tensor(found).log10()
    assert logs.mean().item() == pytest.approx(1.0, abs=0.15)
    assert logs.std().item() == pytest.approx(0.3, abs=0.1)


def test_a_posterior_by_hand() -> None:
    """One measurement y at x: k (k + noise)^-1 y, and what is left of the variance."""
    x, at = torch.tensor([[0.5]]).double(), torch.tensor([[0.5], [0.8]]).double()
    kernel = linear_matern(0.3)
    mean, spread = posterior(kernel, x, torch.tensor([2.0]).double(), at)
    own = 0.25 + 1
    far = math.sqrt(3)  # of a distance of one length
    cross = 0.4 + (1 + far) * math.exp(-far)
    assert mean.tolist() == pytest.approx([2 * own / (own + 0.01), 2 * cross / (own + 0.01)])
    assert spread[1, 1].item() == pytest.approx(0.64 + 1 - cross**2 / (own + 0.01))
    assert rbf(x, at)[0, 1].item() == pytest.approx(math.exp(-0.5 * 0.09))


def test_scores_keep_the_order_and_are_normal_quantiles() -> None:
    y = torch.arange(25.0).double()
    found = normal_scores(y)(y)
    assert (found.diff() > 0).all()
    assert found[12].item() == pytest.approx(0.0, abs=1e-6)
    assert found[-1].item() == pytest.approx(2.0537, abs=1e-3)  # the quantile 0.98, by tables
    assert normal_scores(y**3)(torch.tensor([12.0**3]).double()).item() == pytest.approx(0.0, abs=1e-6)
    assert normal_scores(torch.ones(6).double())(torch.ones(2).double()).tolist() == [0.0, 0.0]


def test_expected_improvement_by_quadrature() -> None:
    grid = torch.linspace(-12, 12, 200_001).double()
    weight = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (24 / 200_000)
    for mean, deviation, reference in ((0.3, 0.7, 0.5), (-1.0, 0.2, 0.1)):
        exact = ((mean + deviation * grid - reference).clamp_min(0) * weight).sum()
        told = expected_improvement(*(torch.tensor(v).double() for v in (mean, deviation, reference)))
        assert told.item() == pytest.approx(exact.item(), abs=1e-6)


def groups(*points: tuple[list[float], float]) -> list[Group]:
    return [
        Group(torch.tensor([float(n)]), outputs, [cost] * len(outputs))
        for n, (outputs, cost) in enumerate(points)
    ]


def test_no_member_of_the_front_is_beaten() -> None:
    generator = torch.Generator().manual_seed(0)
    every = groups(*(([output], cost) for output, cost in torch.rand(40, 2, generator=generator).tolist()))
    front = front_of(every, 0.0, careful=False)
    for member in front:
        assert not any(other.cost <= member.cost and other.output > member.output for other in every)
    assert [member.cost for member in front] == sorted(member.cost for member in front)
    assert max(every, key=lambda group: group.output) is front[-1]


def test_the_front_begins_at_a_quantile_of_the_costs() -> None:
    every = groups(([0.1], 1.0), ([0.5], 2.0), ([0.3], 3.0), ([0.9], 4.0), ([0.2], 5.0))
    assert [group.cost for group in front_of(every, 0.25, careful=False)] == [2.0, 4.0]
    assert [group.cost for group in front_of(every, 0.0, careful=False)] == [1.0, 2.0, 4.0]


def test_a_point_that_was_lucky_once_is_not_on_the_careful_front() -> None:
    every = groups(([0.0, 1.0], 1.0), ([0.6], 2.0), ([0.55, 0.75], 3.0), ([0.8], 4.0))
    assert [group.cost for group in front_of(every, 0.0, careful=False)] == [1.0, 2.0, 3.0, 4.0]
    assert [group.cost for group in front_of(every, 0.0, careful=True)] == [1.0, 3.0, 4.0]
    begun = groups(([0.9], 1.0), ([0.2, 0.4], 1.0), ([0.5], 2.0))
    assert [group.output for group in front_of(begun, 0.5, careful=True)] == pytest.approx([0.3, 0.5])
    assert [group.output for group in front_of(begun, 0.5, careful=False)] == [0.9]


# -- proposals -------------------------------------------------------------------------------------------------------

SOME = [(10.0, 0.5, 0.6, 10.0), (30.0, 0.3, 1.4, 30.0), (60.0, 0.6, 1.1, 60.0), (100.0, 0.25, 1.9, 100.0)]


def test_with_a_constant_cost_the_search_is_around_the_best_alone() -> None:
    flat = known([(size, rate, output, 1.0) for size, rate, output, _ in SOME])
    own = sampler()
    (best,) = front_of(seen(flat, own).groups, 0.2, careful=True)
    assert best.output == 1.9
    for number in range(10):
        trial = ask(flat, number, resample_every=0)
        size, rate = math.log10(trial.params["size"]), trial.params["rate"]
        assert math.hypot(size - 2.0, rate - 0.25) < 4 * 0.3
        flat.tell(trial, state=TrialState.FAIL)


def test_with_a_constant_cost_what_is_improved_on_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = known([(size, rate, output, 1.0) for size, rate, output, _ in SOME])
    asked = []
    monkeypatch.setattr(
        "peftx_carbs.expected_improvement", lambda *a: asked.append(a) or expected_improvement(*a)
    )
    own = sampler(bias=0.0)
    own.propose(seen(flat, own))
    (_, _, reference) = asked[0]
    score = normal_scores(torch.tensor([0.6, 1.4, 1.1, 1.9]).double())(torch.tensor([1.9]).double()).item()
    assert reference.std().item() < 1e-9
    assert reference[0].item() == pytest.approx(score / 1.01)  # of one measurement, with noise


def test_what_is_proposed_keeps_the_limit_but_where_the_model_of_costs_is_wrong() -> None:
    study = carried_out(25, limits={"train_seconds": 40.0}, resample_every=0)
    late = [trial.params["size"] for trial in study.trials[8:]]
    assert sum(size <= 40 for size in late) >= 0.8 * len(late)
    assert max(trial.params["size"] for trial in carried_out(25, resample_every=0).trials[8:]) > 200


def test_the_mask_of_costs_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    own = sampler({"train_seconds": 40.0})
    have = seen(known(SOME), own)
    front = front_of(have.groups, 0.2, careful=True)
    x = own.basic.coordinates(own.near(torch.zeros(1, 2).double(), 200)[0])
    worth = own.worth(have, front, x)
    tried = own.basic.coordinates(torch.stack([group.values for group in have.groups]))
    logs = torch.tensor([10.0, 30.0, 60.0, 100.0]).double().log()
    half = (logs.max() - logs.min()) / 2
    cost = posterior(linear_matern(0.3), tried, (logs - logs.min()) / half - 1, x)[0]
    beyond = (cost + 1) * half + logs.min() >= math.log(40.0)
    assert 0 < beyond.sum() < len(x)
    assert (worth[beyond] == 0).all()
    assert (worth[~beyond] > 0).all()


def test_a_search_goes_on_as_if_it_had_never_stopped() -> None:
    whole = carried_out(12)
    again = known([])
    for trial in carried_out(7).trials:
        again.add_trial(trial)
    carried_out(12, study=again, first=7)
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]


def test_each_fifth_is_a_re_run_of_the_front_where_there_were_fewest() -> None:
    study = carried_out(30)
    params = [tuple(trial.params.values()) for trial in study.trials]
    repeated = [n for n, point in enumerate(params) if point in params[:n]]
    assert repeated == [6, 11, 16, 21, 26]  # as soon as more than 5, 10, ... came through
    assert len({params[n] for n in repeated}) > 1
    none = [tuple(trial.params.values()) for trial in carried_out(15, resample_every=0).trials]
    assert len(set(none)) == 15


def test_members_that_are_run_already_again_wait() -> None:
    study = known([*SOME[:1], *SOME[3:], (11.0, 0.5, 0.1, 11.0), (12.0, 0.5, 0.1, 12.0), (13.0, 0.5, 0.1, 13.0),
                   (14.0, 0.5, 0.1, 14.0)])  # fmt: skip
    first = ask(study, 0)
    assert first.params == {"size": 10.0, "rate": 0.5}  # the cheaper one of equals
    known([(15.0, 0.5, 0.1, 15.0), (16.0, 0.5, 0.1, 16.0), (17.0, 0.5, 0.1, 17.0), (18.0, 0.5, 0.1, 18.0),
           (19.0, 0.5, 0.1, 19.0)], study)  # fmt: skip
    assert ask(study, 1).params == {"size": 100.0, "rate": 0.25}  # the first one still runs


def test_what_runs_side_by_side_is_not_proposed_twice() -> None:
    study = known(SOME)
    found = [ask(study, 7, resample_every=0).params for _ in range(3)]  # one seed, and none is told of
    assert len({tuple(each.values()) for each in found}) == 3


def test_where_trials_fail_success_is_not_expected() -> None:
    own = sampler()
    have = seen(known(SOME), own)
    have.failed = [
        own.basic.tensor({"size": 30.0, "rate": 0.9}),
        own.basic.tensor({"size": 50.0, "rate": 0.9}),
    ]
    tried = own.basic.coordinates(torch.stack([group.values for group in have.groups]))
    there = [{"size": 40.0, "rate": 0.9}, {"size": 30.0, "rate": 0.3}]
    at = own.basic.coordinates(torch.stack([own.basic.tensor(each) for each in there]))
    fails, works = own.success(linear_matern(0.3), tried, have.failed, at).tolist()
    assert fails < 0.05 < 0.95 < works
    assert own.success(linear_matern(0.3), tried, [], at).tolist() == [1.0, 1.0]


def test_what_a_point_is_worth_counts_by_its_success() -> None:
    have = seen(known(SOME), sampler())
    x = sampler().basic.coordinates(sampler().near(torch.zeros(1, 2).double(), 50)[0])
    front = front_of(have.groups, 0.2, careful=True)
    free = sampler().worth(have, front, x)
    have.failed = [torch.tensor([40.0, 0.9]).double()]
    risky = sampler().worth(have, front, x)
    tried = sampler().basic.coordinates(torch.stack([group.values for group in have.groups]))
    assert torch.allclose(risky, free * sampler().success(linear_matern(0.3), tried, have.failed, x))


def test_cheap_points_must_beat_the_front_at_a_cost_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "peftx_carbs.expected_improvement", lambda *a: asked.append(a) or expected_improvement(*a)
    )
    for seed in range(4):
        own = sampler(seed=seed, bias=0.0)
        own.propose(seen(known(SOME), own))
    floors = [reference.min() for _, _, reference in asked]
    assert len({round(floor.item(), 6) for floor in floors}) == 4
    assert (
        max((reference == floor).sum() for (_, _, reference), floor in zip(asked, floors, strict=True)) > 20
    )


def test_a_trial_beyond_another_limit_has_failed_and_beyond_its_own_cost_has_not() -> None:
    study = new_study()
    for number, constraints in enumerate(
        ({"bundle_bytes": 0.5}, {"train_seconds": 0.5}, {"bundle_bytes": -0.5})
    ):
        trial = ask(study, number)
        for name, over in constraints.items():
            trial.set_constraint(name, over)
        study.tell(trial, rising(trial.params))
    have = seen(study, sampler())
    assert (have.count, len(have.failed), len(have.pending)) == (2, 1, 0)


def test_less_may_be_better() -> None:
    up = carried_out(9)
    down = new_study(higher=False)
    for number in range(9):
        trial = ask(down, number)
        output, cost = rising(trial.params)
        down.tell(trial, [-output, cost])
    assert [trial.params for trial in up.trials] == [trial.params for trial in down.trials]


def test_whole_numbers_are_whole_and_inside() -> None:
    spans: dict[str, BaseDistribution] = {
        "rank": IntDistribution(2, 8, log=True),
        "steps": IntDistribution(1, 4),
    }
    study = new_study()
    for number in range(20):
        trial = ask(study, number, spans=spans)
        assert type(trial.params["rank"]) is int
        assert 2 <= trial.params["rank"] <= 8
        assert 1 <= trial.params["steps"] <= 4
        study.tell(trial, [trial.params["rank"], trial.params["steps"]])
    assert {trial.params["steps"] for trial in study.trials} > {2, 3}


def volume(points: list[Told]) -> float:
    """Between the front and output 0, over log10 of the cost from 1 to 1000."""
    total = 0.0
    best, at = 0.0, 0.0
    for output, cost in sorted(points, key=lambda point: point[1]):
        total += best * (math.log10(cost) - at)
        best, at = max(best, output), math.log10(cost)
    return total + best * (3 - at)


@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_found_sooner_than_by_chance(seed: int) -> None:
    """The volume between the whole front and 0 is 4.5."""
    study = new_study()
    for number in range(40):
        trial = ask(study, 1000 * seed + number)
        study.tell(trial, rising(trial.params))
    by_chance = optuna.samplers.RandomSampler(seed=seed)
    chance = optuna.create_study(directions=["maximize", "minimize"], sampler=by_chance)
    for _ in range(40):
        trial = chance.ask(dict(SPANS))
        chance.tell(trial, rising(trial.params))
    ours, theirs = ([rising(trial.params) for trial in each.trials] for each in (study, chance))
    assert volume(ours) > volume(theirs)
    assert max(output for output, _ in ours) > 2.6  # the best of all is 3


# -- as a sampler of `peftx search` ----------------------------------------------------------------------------------


def test_it_is_found_by_name() -> None:
    assert "carbs" in Samplers().names()
    assert Samplers().load("carbs") is Carbs
    assert Carbs.whole


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({}, {"objectives": ("quality", "bundle_bytes", "train_seconds")}, "weighs quality against one cost"),
        (
            {},
            {"distributions": {**SPANS, "stack": CategoricalDistribution(["a", "b"])}},
            "'stack' is a choice",
        ),
        ({"center": {"sise": 3.0}}, {}, "the center of 'sise' is not varied"),
        ({"center": {"size": 0.5}}, {}, "the center of 'size' lies outside of its span"),
    ],
)
def test_what_it_cannot_search_it_refuses(options: dict[str, Any], more: dict[str, Any], said: str) -> None:
    given = {"objectives": ("quality", "train_seconds"), "distributions": SPANS, **more}
    whole = Setting(0, higher=True, limits={}, stacks=1, **given)
    with pytest.raises(PeftxError, match=said):
        Carbs(**options).check(whole)
    Carbs(center={"size": 2.0}).check(setting())
