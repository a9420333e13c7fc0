"""Adapters in, one out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from peftx.composition.registry import Registry
from peftx.merging.options import check_options
from peftx.merging.sources import read_sources
from peftx.merging.work import Place, Work
from peftx.merging.writing import as_lora
from peftx.stack import Stack
from peftx.toolkits.evaluation import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM = "norm-kept"


@dataclass(frozen=True)
class Merged:
    """The result, on the base that it was made for.

    Attributes:
        stack: with one `lora`, or with none and other weights. base: id of the model.
    """

    stack: Stack
    base: str
    places: tuple[Place, ...]

    @property
    def kept(self) -> float:
        """Share of the Frobenius norm of all differences that their rank kept; 1 where nothing was cut."""
        return share_kept(self.places)


def share_kept(places: Sequence[Place]) -> float:
    """||D_r|| / ||D|| over several places."""
    whole = math.fsum(place.norm**2 for place in places)
    return math.sqrt(math.fsum((place.kept * place.norm) ** 2 for place in places) / whole) if whole else 1.0


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[str | Path],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    into: Literal["lora", "weights"] = "lora",
    model: PreTrainedModel | str | None = None,
    device: str = "cpu",
    registry: Registry | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Combine what adapters add to the weights of their base. Their order does not matter, to the bit.

    Args:
        adapters: folders of bundles, or of adapters of HF PEFT.
        method: of `METHODS`. weights: one for each adapter, 1 if left out; one of 0 is not there.
        rank: that differences are cut to. density, seed: of the methods that trim or drop.
        into: `lora`, or the `weights` of the base, each rounded once.
        model: the base, or where it lies now. One that is given is changed.
        progress: called with (modules done, modules).

    Raises:
        PeftxError: an option that the method does not have or needs; adapters of several bases.
        MergeError: an adapter that does not fold, or a result that a `lora` cannot hold; nothing was combined then.
        BundleError: a folder that is missing or damaged.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    check_options(len(adapters), method, weights, rank, density, seed, into)
    registry = registry or Registry()
    base, sources = read_sources(
        adapters, weights, model=model, device=device, registry=registry, trust_remote_code=trust_remote_code
    )
    work = Work(base, sources, method, rank, density, seed or 0, into_weights=into == "weights")
    places = list(work.run(progress or (lambda done, total: None)))
    stack = as_lora(base, work.factors, registry) if into == "lora" else work.plain
    merged = Merged(stack, base.id, tuple(places))
    if into == "lora":
        stack.scores[NORM] = Score(
            name=NORM, value=merged.kept, unit="of the merged difference's Frobenius norm"
        )
    return merged
