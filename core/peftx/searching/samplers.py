"""Who proposes the points: Optuna's samplers, and those that packages bring under the entry points `peftx.samplers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, ClassVar

from peftx.composition.registry import installed
from peftx.errors import RegistryError
from peftx.kernel.names import SAMPLERS
from peftx.kernel.plugin import PluginConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


@dataclass(frozen=True)
class Setting:
    """What a sampler is told of a search.

    Attributes:
        seed: of this one proposal: a sampler is made anew for each, so that a search goes on as if it had never
            stopped.
        objectives: names, quality first; values come in this order, and `higher` says of quality alone whether more
            is better: less of a cost always is. limits: cost -> what it may be at most; a trial's constraints have
            these names, and are above 0 where it is beyond.
        distributions: of all that is varied. stacks: how many there are to choose from.
    """

    seed: int
    objectives: tuple[str, ...]
    higher: bool
    limits: Mapping[str, float]
    distributions: Mapping[str, BaseDistribution]
    stacks: int


class SearchSampler:
    """Base of all samplers. Subclasses set `Config`, and implement `sampler`.

    Attributes:
        whole: it learns from what a trial cost to its end, so none may end early.
    """

    Config: ClassVar[type[PluginConfig]] = PluginConfig
    whole: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        self.config: Any = self.Config(**options)

    def check(self, setting: Setting) -> None:
        """Raise PeftxError where it cannot serve this search, before anything runs."""

    def sampler(self, setting: Setting) -> BaseSampler:
        """Optuna's, for one proposal."""
        raise NotImplementedError


class Tpe(SearchSampler):
    """Tree-structured Parzen estimators, of all options together; running trials count as bad ones."""

    def sampler(self, setting: Setting) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(seed=setting.seed, multivariate=True, group=True, constant_liar=True)


class Nsga2(SearchSampler):
    """NSGA-II: generations, of which those that none beats have children."""

    def sampler(self, setting: Setting) -> BaseSampler:
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=setting.seed)


class Random(SearchSampler):
    """Each point by itself."""

    def sampler(self, setting: Setting) -> BaseSampler:
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=setting.seed)


BUILT_IN: dict[str, type[SearchSampler]] = {"tpe": Tpe, "nsga2": Nsga2, "random": Random}


class Samplers:
    """Samplers by name. Names are read off the metadata of distributions; one is imported when it is asked for."""

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in installed(SAMPLERS)}

    def names(self) -> list[str]:
        return [*BUILT_IN, *sorted(self._points.keys() - BUILT_IN.keys())]

    def config(self, name: str) -> type[PluginConfig]:
        return self.load(name).Config

    def load(self, name: str) -> type[SearchSampler]:
        """One of `names`.

        Raises:
            RegistryError: it does not import, or is none.
        """
        if name in BUILT_IN:
            return BUILT_IN[name]
        point = self._points[name]
        try:
            found = point.load()
        except Exception as error:  # whatever a stranger's module raises: reported with its reason
            said = f"{type(error).__name__}: {error}"
            raise RegistryError(f"the sampler '{name}' ({point.value}) does not import: {said}") from error
        if not (isinstance(found, type) and issubclass(found, SearchSampler)):
            raise RegistryError(f"the sampler '{name}': {point.value} is no subclass of SearchSampler")
        return found
