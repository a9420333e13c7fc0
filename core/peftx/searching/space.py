"""The space of a search as Optuna has it, and back: what is drawn becomes a stack and the values of its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftx_spec.compare_checks import value_text
from peftx_spec.search import SpanSpec
from peftx_spec.search_load import Candidate

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from peftx_spec.search import SearchSpec

STACK = "stack"
"""The name of the choice among stacks; keys of the space have a dot."""
DIGITS = 4
"""That count of a number that is drawn; so that a point can be read, and written down."""


class Space:
    """All that can be drawn.

    Args:
        candidates: the stacks that can be built.
    """

    def __init__(self, spec: SearchSpec, candidates: Mapping[str, Candidate]) -> None:
        self.candidates = dict(candidates)
        used = {key for candidate in candidates.values() for key in candidate.keys}
        self.spaces: dict[str, Any] = {key: space for key, space in spec.space.items() if key in used}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Of everything, whichever stack it belongs to."""
        from optuna.distributions import CategoricalDistribution

        stacks = {STACK: CategoricalDistribution(list(self.candidates))} if len(self.candidates) > 1 else {}
        return {**stacks, **{key: _distribution(space) for key, space in self.spaces.items()}}

    def draw(self, trial: optuna.Trial) -> None:
        """Have the sampler say a stack, and values for its keys alone."""
        names = list(self.candidates)
        name = trial.suggest_categorical(STACK, names) if len(names) > 1 else names[0]
        for key in self.candidates[name].keys:
            space = self.spaces[key]
            if not isinstance(space, SpanSpec):
                trial.suggest_categorical(key, [value_text(value) for value in space])
                continue
            low, high = space.ends
            if space.whole:
                trial.suggest_int(key, int(low), int(high), log=space.log is not None)
            else:
                trial.suggest_float(key, low, high, log=space.log is not None)

    def point(self, params: Mapping[str, Any]) -> tuple[Candidate, dict[str, object]]:
        """The stack and the values of what was drawn."""
        candidate = self.candidates[params.get(STACK, next(iter(self.candidates)))]
        return candidate, {key: _value(self.spaces[key], params[key]) for key in candidate.keys}


def _distribution(space: SpanSpec | tuple[Any, ...]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(space, SpanSpec):
        return CategoricalDistribution([value_text(value) for value in space])
    low, high = space.ends
    if space.whole:
        return IntDistribution(int(low), int(high), log=space.log is not None)
    return FloatDistribution(low, high, log=space.log is not None)


def _value(space: SpanSpec | tuple[Any, ...], drawn: Any) -> object:
    if not isinstance(space, SpanSpec):
        return next(value for value in space if value_text(value) == drawn)
    if space.whole:
        return int(drawn)
    low, high = space.ends
    return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)
