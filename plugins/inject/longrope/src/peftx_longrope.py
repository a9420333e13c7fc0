"""LongRoPE: a longer context by factors of the rotary frequencies, each its own, that are found by evolution.

"LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens" (arXiv:2402.13753). Pair i of a head's d numbers turns
at position m by the angle m t_i, t_i = base^(-2i/d). To read L' = s L tokens with a model of L, in all layers,

    m t_i            where m < n                 the first n tokens keep their angles
    m t_i / f_i      elsewhere                   1 <= f_0 <= f_1 <= ... <= 1.25 s

Linear interpolation is f_i = s, NTK f_i = s^(2i / (d - 2)), YaRN f_i = 1 / (g_i + (1 - g_i) / s) with its ramp g. The
search starts from these and mutants of them, and goes for T rounds: of P candidates the k with the lowest perplexity
on texts of L' tokens stay, and mutants of them (a gene is drawn anew with probability p, between its neighbours, in
steps of 0.01) and crossings, as far as they do not fall, take the places of the others.

Longer contexts come in stages: a second plugin behind this one, after training with it, searches factors on top of
these for s' s L tokens. One with `part: short` searches factors for texts of up to L tokens, which training at length
has made worse. Which factors count, the length of the text decides: up to L, or more.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, Evaluation, ModelView, Plugin, PluginConfig, Site, Stack, hookimpl
from peftx.engines.machine import is_out_of_memory
from peftx.errors import ArchitectureError, DataError, OptionError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.parts import DeltaPart
from peftx.toolkits.compression import Calibration

Genes = tuple[Tensor, int]  # f [d / 2] float32, n


class LongRopeConfig(PluginConfig):
    """Options of LongRoPE."""

    scale: float = Field(4.0, gt=1, description="s, how many times as long a text gets; of `short`: bounds f")
    part: Literal["long", "short"] = Field(
        "long",
        description="which texts the factors are for: longer ones than the model was made for, or others",
    )
    original: int | None = Field(
        None, ge=2, description="L, tokens that the model was made for; as its configuration says if left out"
    )
    first_tokens: tuple[int, ...] = Field(
        (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256), min_length=1, description="candidates for n"
    )
    population: int = Field(64, ge=3, description="P, candidates of the first round")
    parents: int = Field(32, ge=2, description="k, candidates that stay")
    mutations: int = Field(16, ge=0, description="mutants in a round")
    crossovers: int = Field(16, ge=0, description="crossings in a round")
    probability: float = Field(0.3, ge=0, le=1, description="p")
    rounds: int = Field(40, ge=0, description="T")
    texts: int = Field(5, ge=1, description="texts of s L tokens (`short`: L) that perplexity is measured on")
    attention_factor: float = Field(
        1.0, gt=0, description="cos and sin times this; the released models have sqrt(1 + ln s / ln L)"
    )


class Rescaled(Delta):
    """Around a rotary module: angles m t_i / f_i, and m t_i before position n, in texts of its part.

    Buffers: f [d / 2] float32; n [] int64.

    Args:
        rotary: the module, which has the frequencies `inv_freq` [d / 2]. call, owner: of the model and the plugin.
        limit: L; texts of more tokens are long. config: part says which are meant.
    """

    full_precision = True

    def __init__(
        self, rotary: nn.Module, call: Call, owner: str, *, limit: int, config: LongRopeConfig
    ) -> None:
        super().__init__()
        self.rotary, self.call, self.owner = (rotary,), call, owner
        self.limit, self.reach, self.long = limit, limit * config.scale, config.part == "long"
        self.factor = config.attention_factor
        self.register_buffer("f", torch.ones(len(rotary.inv_freq)))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def around(self, inner: Any, x: Tensor, position_ids: Tensor) -> Any:
        (rotary,) = self.rotary
        plain = inner(x, position_ids)
        if self.is_long(position_ids) != self.long:
            return plain
        frequencies = rotary.inv_freq
        try:
            rotary.inv_freq = frequencies / self.f
            new = inner(x, position_ids)
        finally:
            rotary.inv_freq = frequencies
        early = (position_ids < self.n)[..., None]
        return tuple(self.factor * torch.where(early, a, b) for a, b in zip(plain, new, strict=True))

    def is_long(self, position_ids: Tensor) -> bool:
        """By the longest text; one that goes on keeps what its keys in the cache were turned by at first."""
        long, shape = bool(position_ids.max() >= self.limit), self.call.shape
        if shape is None:
            return long
        known = self.call.carry(self.owner, position_ids.new_full(shape, 1 + long))  # 0: soft tokens
        before = known[:, : known.shape[1] - shape[1]]
        return bool(before[before > 0].min() > 1) if before.any() else long


class LongRope(Plugin):
    """See the module."""

    Config = LongRopeConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.NEEDS_CALIBRATION}
    refuses = {
        "gpt2": "its positions are learned vectors",
        "bert": "its positions are learned vectors",
        "t5": "its positions are biases of the attention",
    }
    example = {
        "original": 16, "scale": 2, "rounds": 1, "population": 4, "parents": 2, "mutations": 2, "crossovers": 2,
        "texts": 1,
    }  # fmt: skip
    config: LongRopeConfig

    def suits(self, model: ModelView) -> None:
        kind = f"{model.owner}: {model.config.model_type}"
        found = [m for m in model.module.modules() if hasattr(m, "rope_type")]
        if len(found) != 1 or len(model.towers) > 1 or isinstance(found[0].rope_type, dict):
            said = f"{kind} has no rotary module that is the only one and the same in all layers"
            raise ArchitectureError(said, hint="llama, mistral, qwen3, phi3, gpt_neox, mixtral, ...")
        if found[0].rope_type != "default":
            said = f"{kind} scales its frequencies already ({found[0].rope_type})"
            raise ArchitectureError(said, hint="rope_type: default in rope_parameters of its config")

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, own = self.config, stack.ledger.of(model.owner, DeltaPart)
        if config.parents > config.population:
            said = f"{model.owner}: {config.parents} parents of a population of {config.population}"
            raise OptionError(said, hint="parents at most population")
        if own:  # it compressed before it was injected
            return
        path, rotary = next((n, m) for n, m in model.module.named_modules() if hasattr(m, "rope_type"))
        limit = config.original or model.config.max_position_embeddings
        if config.part == "long":
            limit = max([limit, *(round(delta.reach) for delta in deltas(stack) if delta.long)])
        new = Rescaled(rotary, model.call, model.owner, limit=limit, config=config)
        self.delta = model.bound(Site("rotary", path, rotary, "block")).attach(new)

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration, stack: Stack) -> None:
        self.inject(model, stack)
        rows, delta = self.rows(calibration, model.owner), self.delta
        starts = {name: (f, 0) for name, f in self.starts(model).items()}
        try:
            self.state["start"] = {
                name: self.perplexity(stack, rows, genes) for name, genes in starts.items()
            }
            best, self.state["rounds"] = self.evolve(stack, rows, [*starts.values()][delta.long :])
        except BaseException:  # Ctrl-C too
            delta.f.fill_(1)
            delta.n.zero_()
            raise
        self.take(best)

    def take(self, genes: Genes) -> None:
        """Compute with these factors."""
        self.delta.f.copy_(genes[0])
        self.delta.n.fill_(genes[1])

    def rows(self, calibration: Calibration, owner: str) -> Tensor:
        """Texts of L' tokens, [N, L']: pieces of the calibration text, put together again."""
        length = round(self.delta.reach) if self.delta.long else self.delta.limit
        first = calibration.batches[0]["input_ids"]
        cut = int(
            len(calibration.batches) > 1 and bool(first[0, 0] == calibration.batches[1]["input_ids"][0, 0])
        )
        stream = torch.cat([first[0, :cut], *(batch["input_ids"][0, cut:] for batch in calibration.batches)])
        count = min(len(stream) // length, self.config.texts)
        if not count:
            said = f"{owner}: {len(stream)} tokens of calibration text are no text of {length}"
            raise DataError(said, hint=f"samples and length of at least {length} tokens together")
        return stream[: count * length].view(count, length)

    def starts(self, model: ModelView) -> dict[str, Tensor]:
        """Factors f [d / 2] of what is known: none, and for long texts linear interpolation, NTK and YaRN."""
        s, size = self.config.scale, len(self.delta.f)
        if not self.delta.long:
            return {"none": torch.ones(size)}
        i, base = torch.arange(size), model.config.rope_parameters["rope_theta"]
        turns = (size * math.log(self.delta.limit / (2 * math.pi * n)) / math.log(base) for n in (32, 1))
        low, high = (max(math.floor(next(turns)), 0), min(math.ceil(next(turns)), 2 * size - 1))
        g = 1 - ((i - low) / max(high - low, 1e-3)).clamp(
            0, 1
        )  # whose pairs turn 32 times in L tokens and more: 1
        ntk = s ** (i / max(size - 1, 1))
        return {
            "none": torch.ones(size), "linear": torch.full((size,), s), "ntk": ntk, "yarn": 1 / (g + (1 - g) / s),
        }  # fmt: skip

    def perplexity(self, stack: Stack, rows: Tensor, genes: Genes) -> float:
        self.take(genes)
        losses = []
        try:
            for row in rows:
                logits = stack.model(input_ids=row[None], use_cache=False).logits[0, :-1]
                losses.append(F.cross_entropy(logits.float(), row[1:]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = f"{stack.id_of(self)}: a text of {rows.shape[1]} tokens does not fit in memory"
            raise UnsupportedError(said, hint="a smaller scale") from error
        return float(torch.stack(losses).mean().exp())

    def evolve(self, stack: Stack, rows: Tensor, starts: list[Genes]) -> tuple[Genes, list[float]]:
        """The best candidate, and the lowest perplexity of each round."""
        config, seen = self.config, []
        population = [*starts, *(self.mutant(starts) for _ in range(config.population - len(starts)))]
        fitness = [self.perplexity(stack, rows, genes) for genes in population]
        for _ in range(config.rounds + 1):
            order = sorted(range(len(population)), key=fitness.__getitem__)[: config.parents]
            population, fitness = [population[i] for i in order], [fitness[i] for i in order]
            seen.append(fitness[0])
            if len(seen) <= config.rounds:
                crossed = (self.crossing(population) for _ in range(config.crossovers))
                new = [self.mutant(population) for _ in range(config.mutations)]
                new += [genes for genes in crossed if genes is not None]
                population += new
                fitness += [self.perplexity(stack, rows, genes) for genes in new]
        return population[0], seen

    def mutant(self, parents: list[Genes]) -> Genes:
        """Each gene of a parent is drawn anew with probability p: a factor between its neighbours."""
        f, n = parents[int(torch.randint(len(parents), ()))]
        f, p, most = f.clone(), self.config.probability, max(1.25 * self.config.scale, float(f.max()))
        for i in range(len(f)):
            if torch.rand(()) < p:
                low = float(f[i - 1]) if i else 1.0
                high = float(f[i + 1]) if i + 1 < len(f) else most
                steps = int((high - low) / 0.01 + 1e-4)
                f[i] = min(low + 0.01 * int(torch.randint(steps + 1, ())), high)
        if torch.rand(()) < p:
            n = self.config.first_tokens[int(torch.randint(len(self.config.first_tokens), ()))]
        return f, n

    def crossing(self, parents: list[Genes]) -> Genes | None:
        """Each gene of one of two parents, if ten tries give factors that do not fall."""
        for _ in range(10):
            (f, n), (g, m) = (parents[i] for i in torch.randint(len(parents), (2,)).tolist())
            child = torch.where(torch.rand(len(f)) < 0.5, f, g)
            if (child.diff() >= 0).all():
                return child, n if torch.rand(()) < 0.5 else m
        return None

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Perplexity of the texts of the search without factors, with linear interpolation, NTK, YaRN and what was
        found; 0 before there are any."""
        found = {**self.state.get("start", {}), "found": self.state.get("rounds", [0.0])[-1]}
        for name, value in found.items():
            evaluation.add(f"perplexity_{name}", value)


def deltas(stack: Stack) -> list[Rescaled]:
    """Of all plugins of the kind, in stack order."""
    return [p.module for p in stack.ledger.all(DeltaPart) if isinstance(p.module, Rescaled)]


def rope_parameters(stack: Stack) -> dict[str, Any]:
    """What a plain transformers configuration says of the same: its `rope_parameters`, with the factors of all plugins
    of a part multiplied. Beside it `max_position_embeddings` is to be s L.

    Raises:
        PeftxError: what `longrope` there does not have: first tokens of their own, or a second stage.
    """
    found = deltas(stack)
    long, short = ([d for d in found if d.long == part] for part in (True, False))
    same = len({(d.limit, d.factor) for d in found}) == 1
    if len(long) != 1 or not same or any(d.n for d in found):
        said = "transformers has one length from which factors change, one factor of cos and sin, and no tokens apart"
        raise UnsupportedError(f"longrope: {said}", hint="one plugin of part long, and first_tokens: [0]")
    unit = torch.ones_like(long[0].f)
    factors = {"long_factor": long, "short_factor": short}
    return {
        "rope_type": "longrope",
        "rope_theta": stack.model.config.rope_parameters["rope_theta"],
        "factor": long[0].reach / long[0].limit,
        "original_max_position_embeddings": long[0].limit,
        "attention_factor": long[0].factor,
        **{k: torch.stack([unit, *(d.f for d in ds)]).prod(0).tolist() for k, ds in factors.items()},
    }
