"""The merge itself: over the model's modules, one of which has dense differences at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftx.errors import MergeError
from peftx.kernel.anatomy.site import LINEAR_KINDS, Site
from peftx.merging.factors import Factors, beside, nearest_to, split
from peftx.merging.methods import METHODS, combine
from peftx.merging.sources import Base, Source
from peftx.merging.writing import into_weights

PLAIN = "write a plain checkpoint: --format hf (into='weights')"


@dataclass(frozen=True)
class Place:
    """What became of one matrix, or of one role's rows of it.

    Attributes:
        name: of the site, or of the parameter. role: canonical (`attention.q`), else the parameter's name.
        rank: of the factors; None of a dense difference.
        norm: ||D||, by Frobenius. kept: ||D_r|| / ||D|| of the D_r that is left of it at the rank.
    """

    name: str
    role: str
    rank: int | None
    norm: float
    kept: float


@dataclass(frozen=True)
class _Unit:
    """What is merged as one tensor: a parameter, or one role's rows of it."""

    path: str
    parameter: str
    site: Site | None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}" if self.site is None else self.site.key

    def take(self, stored: Tensor) -> Tensor:
        """Its own [..., out, in] of a parameter as it is stored; of what is no matrix all."""
        if self.site is None:
            return stored
        own = stored.mT if self.site.turned else stored
        return own if self.site.rows is None else self.site.rows.take(own, -2)

    def add(self, stored: Tensor, difference: Tensor) -> Tensor:
        """The parameter, as it is stored, with the unit's difference added."""
        if self.site is None:
            return stored + difference
        own = stored.mT if self.site.turned else stored
        rows = self.site.rows
        own = own + difference if rows is None else rows.put(own, rows.take(own, -2) + difference, -2)
        return own.mT if self.site.turned else own


class Work:
    """One merge; `run` fills `factors`, or changes the model's weights.

    Args:
        density, rank: None where nobody says one.

    Attributes:
        plain: the base as a stack of its own. factors: by the site's key.

    Raises:
        MergeError: a `lora` cannot hold the result.
    """

    def __init__(
        self,
        base: Base,
        sources: Sequence[Source],
        method: str,
        rank: int | None,
        density: float | None,
        seed: int,
        *,
        into_weights: bool,
    ) -> None:
        self.method, self.rank, self.seed, self.into_weights = METHODS[method], rank, seed, into_weights
        self.density = density or self.method.density or 1.0
        self.factors: dict[str, tuple[Site, Factors]] = {}
        self.sources = sorted(
            (s for s in sources if s.weight), key=lambda source: (source.digest, source.weight)
        )
        digests = [source.digest for source in self.sources]
        self.keys = [f"{digest} {digests[:index].count(digest)}" for index, digest in enumerate(digests)]
        """Of each source: two adapters of the same numbers do not lose the same entries."""
        self.plain = base.stack()
        self.sites: dict[tuple[str, str], list[Site]] = {}
        for site in self.plain.anatomy.sites:
            if site.kind in LINEAR_KINDS:
                self.sites.setdefault((site.path, site.parameter), []).append(site)
        wanted = {path for source in self.sources for path in source.paths()}
        self.modules = {path: module for path, module in base.model.named_modules() if path in wanted}
        if not into_weights:
            self._check_lora(method)

    def _check_lora(self, method: str) -> None:
        changes = ((s, path, p) for s in self.sources for path in self.modules for p in s.parameters(path))
        for source, path, parameter in changes:
            if (path, parameter) not in self.sites:
                raise MergeError(
                    f"'{source.name}' changes {path}.{parameter}, which no lora adapts", hint=PLAIN
                )
            who = source.not_low_rank(path, parameter)
            if who and self.rank is None:
                raise MergeError(
                    f"'{source.name}': {who} at {path} has no factors, so {method} has no exact ones",
                    hint=f"cut it to a rank: --method svd --rank 8; or, with --method linear, {PLAIN}",
                )

    def run(self, progress: Callable[[int, int], None]) -> Iterator[Place]:
        """What became of each place; `progress` hears of modules done."""
        for done, (path, module) in enumerate(self.modules.items()):
            progress(done, len(self.modules))
            yield from self._module(path, module)
        progress(len(self.modules), len(self.modules))

    def _module(self, path: str, module: nn.Module) -> Iterator[Place]:
        dense = [self._dense(source, path, module) for source in self.sources]
        named = [name for source in self.sources for name in source.parameters(path)]
        named += [name for own in dense for name in own or ()]  # biases that change with their matrix
        for parameter in dict.fromkeys(named):
            if not self.into_weights and (path, parameter) not in self.sites:
                raise MergeError(
                    f"{path}.{parameter} changes with its matrix, which no lora does", hint=PLAIN
                )
            old = module._parameters[parameter]
            assert old is not None
            new = old.detach().to(torch.promote_types(old.dtype, torch.float32))
            for site in self.sites.get((path, parameter), (None,)):
                unit = _Unit(path, parameter, site)
                whole = self._combined(unit, dense, new.dtype)
                if whole is None:
                    continue
                cut = self._cut(whole, unit)
                yield _place(unit, whole, cut)
                if self.into_weights:
                    new = unit.add(new, cut.dense() if isinstance(cut, Factors) else cut)
                elif isinstance(cut, Factors) and site is not None:
                    self.factors[site.key] = site, cut
            if self.into_weights:
                stands = any(path in source.deltas for source in self.sources)
                into_weights(self.plain.model, module, parameter, new, tied=not stands)

    def _dense(self, source: Source, path: str, module: nn.Module) -> dict[str, Tensor] | None:
        """What an adapter adds to a module; None where factors say it."""
        own = source.parameters(path)
        low = all((path, name) in self.sites and not source.not_low_rank(path, name) for name in own)
        return None if low else source.differences(path, module)

    def _combined(
        self, unit: _Unit, dense: Sequence[dict[str, Tensor] | None], dtype: torch.dtype
    ) -> Factors | Tensor | None:
        """D, as factors where all have some and the method leaves them such; None where nobody changes anything."""
        found: list[tuple[float, Factors | Tensor, str]] = []
        for source, key, own in zip(self.sources, self.keys, dense, strict=True):
            if own is not None:
                if unit.parameter in own:
                    found.append((source.weight, unit.take(own[unit.parameter]), key))
            elif unit.site is not None and (pairs := source.factors(unit.path, unit.site, dtype)):
                found.append((source.weight, beside([(1.0, pair) for pair in pairs]), key))
        low = [(weight, pair) for weight, pair, _ in found if isinstance(pair, Factors)]
        if not found or (len(low) == len(found) and self.method.sums):
            return beside(low) if low else None
        full = [
            (weight, pair.dense() if isinstance(pair, Factors) else pair, f"{key} {unit.name}")
            for weight, pair, key in found
        ]
        return combine(self.method, full, density=self.density, seed=self.seed)

    def _cut(self, whole: Factors | Tensor, unit: _Unit) -> Factors | Tensor:
        """D at the rank that was asked for; without one all of it, by no more factors than the matrix has ranks."""
        if unit.site is None:
            return whole
        most = min(unit.site.in_features, unit.site.out_features)
        rank = most if self.rank is None else min(self.rank, most)
        if isinstance(whole, Factors):
            return nearest_to(whole, rank) if whole.rank > rank else whole
        return whole if self.rank is None else split(whole, rank)


def _place(unit: _Unit, whole: Factors | Tensor, cut: Factors | Tensor) -> Place:
    norm, left = (float(d.norm()) for d in (whole, cut))
    rank = cut.rank if isinstance(cut, Factors) else None
    role = unit.parameter if unit.site is None else unit.site.role
    return Place(unit.name, role, rank, norm, 1.0 if cut is whole or not norm else min(1.0, left / norm))
