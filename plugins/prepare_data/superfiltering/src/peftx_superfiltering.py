"""Superfiltering: a small model says which instruction pairs are hard, and a large one trains on these.

"Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning" (arXiv:2402.00530). For a pair (x, y) and a
small model that nobody tuned, with ppl the exponential of the mean cross entropy over the tokens of y,

    IFD(x, y) = ppl(y | x) / ppl(y)       instruction-following difficulty

Small: x makes y easy. Near 1: x helps little, so the pair is hard, and there is something to be learned. From 1 on x
does not fit y, and the pair goes. Of N pairs the floor(share N) with the largest IFD below 1 are kept, in their order.
The paper finds that small and large models rank pairs alike, so a small one will do.

Superfiltering.D takes more by IFD, `pool` of the N, and of these P the subset S that speaks for all of them best:

    max over S of sum over i in P of max over j in S of sim(i, j)       greedily: within 1 - 1/e of the best

with sim the cosine of the small model's mean last hidden states of x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, exp, floor
from pathlib import Path

from pydantic import Field, model_validator

from peftx import Plugin, PluginConfig, Stack, TrainingData, Worker, hookimpl
from peftx.engines.data import Lazy, facility_location, pairs_of, with_column
from peftx.errors import DataError
from peftx.kernel.heads import mean_of
from peftx.toolkits.working import OfStack, kept_file


class SuperfilteringConfig(PluginConfig):
    """Options of Superfiltering; the paper keeps 5, 10 and 15% by GPT-2 of 124 million parameters."""

    scorer: str = Field(
        "openai-community/gpt2", description="the small model: a folder, a hub id, or peftx:tiny"
    )
    share: float = Field(0.1, gt=0, le=1, description="of the rows that are kept, at most")
    pool: float | None = Field(
        None, gt=0, le=1, description="share by IFD, of which the most diverse are kept (Superfiltering.D)"
    )
    scores: Path | None = Field(
        None, description="file that keeps scores with their rows, in the place of peftx's own"
    )

    @model_validator(mode="after")
    def _wider(self) -> SuperfilteringConfig:
        if self.pool is not None and self.pool <= self.share:
            raise ValueError(f"pool {self.pool:g} leaves nothing to choose the share {self.share:g} from")
        return self


class Superfiltering(Plugin):
    """See the module."""

    Config = SuperfilteringConfig
    takes = ("prompt-completion", "messages")
    example = {"scorer": "peftx:tiny", "share": 0.5}
    example_rows = tuple(
        {"prompt": f"Say {word} again:", "completion": word}
        for word in ("tea", "rain", "sleep", "noise", "bread", "snow", "a cat", "the river")
    )
    config: SuperfilteringConfig

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        data.require(self.takes, by="superfiltering")
        if not data.train:  # the core says so
            return
        config, pairs = self.config, pairs_of(data.train)
        count = floor(config.share * len(pairs))  # K
        if count == 0:
            raise DataError(
                f"superfiltering: share {config.share:g} of {len(pairs)} rows is less than one",
                hint=f"share at least {ceil(1000 / len(pairs)) / 1000:g}",
            )
        if len(pairs) > count and all(pair == pairs[0] for pair in pairs):
            raise DataError(
                f"superfiltering: all {len(pairs)} pairs are the same text, so none is better than another",
                hint="are these the right columns?",
            )
        small = Stack(config.scorer, device=str(stack.model.device))
        by = OfStack(small)
        worker = Worker(by, config.scores, progress=data.progress, cache=kept_file(by.name, small))
        scores = ifd(worker, pairs)
        best = sorted((i for i in scores if scores[i] < 1), key=lambda i: -scores[i])
        kept = best[:count]
        reasons: list[str | None] = ["no answer"] * len(pairs)

        def told(rows: Iterable[int], reason: str | None) -> None:
            for i in rows:
                reasons[i] = reason

        told(scores, "IFD of 1 or more")
        told(best, "IFD below those kept")
        if config.pool is not None and best:
            P = best[: floor(config.pool * len(pairs))]
            told(P, "less diverse than those kept")
            vectors = small.embed([pairs[i][0] or pairs[i][1] for i in P], pool=mean_of)
            kept = [P[j] for j, _ in facility_location(vectors, count, data.progress)]
        told(kept, None)
        data.train = with_column(data.train, "ifd", [scores.get(i) for i in range(len(pairs))])
        data.keep(reasons, by=stack.id_of(self))


def ifd(worker: Worker, pairs: Sequence[tuple[str, str]]) -> dict[int, float]:
    """IFD of each pair that has an answer, by its place."""
    answered = [i for i, (_, y) in enumerate(pairs) if y.strip()]

    def asked(n: int) -> tuple[str, str]:
        x, y = pairs[answered[n // 2]]
        return ("", y) if n % 2 else (x, y)

    logs = worker.score(Lazy(2 * len(answered), asked))
    return {i: exp(logs[2 * n + 1] - logs[2 * n]) for n, i in enumerate(answered)}
