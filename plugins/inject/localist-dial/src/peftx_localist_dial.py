"""Localist dial: attention that one number draws to the block of tokens that a query belongs to.

"Localist LLMs with Recruitment Learning" (arXiv:2510.17358). Tokens are put into semantic blocks 1 .. G, 0 for none; a
query i of block g_i finds key j relevant, r_ij = 1, if g_j is g_i, or if a rule (g_i, g_j) says so, and else r_ij = 0.
The dial lambda >= 0 has two ends, localist and distributed, 0:

    attention   p = softmax(s + lambda r)                      s: the model's own scores of each head
    training    min L + lambda c sum_g sqrt(n_g) |W_g|_F       g: the n_g numbers of a head in W_Q, or in W_K
                W_g <- max(0, 1 - eta lambda c sqrt(n_g) / |W_g|_F) W_g     behind each update, eta: the learning rate

What W_Q and W_K still tell apart bounds what goes astray. Where no two scores of a query differ by more than m, and it
has w irrelevant keys to v relevant ones,

    1 - mass on the relevant <= (w / v) e^(m - lambda),        and m = 0 where a head's W_Q or W_K is gone

Recruitment: a candidate block of n tokens joins where the N tokens of a text get cheaper by more than it costs to say
which they are, of a vocabulary of V:

    N (NLL_old - NLL_new) - n log2 V > 0                       in bits, NLL of the model under the dial
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from itertools import chain, count
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftx import (
    AttentionEdit,
    BoundSite,
    Claim,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    TrainStep,
    hookimpl,
)
from peftx.errors import ArchitectureError, DataError, OptionError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.evaluation import perplexity
from peftx.toolkits.injecting import lent


class LocalistDialConfig(PluginConfig):
    """Options of the localist dial."""

    blocks: dict[str, tuple[str, ...]] = Field(
        min_length=1, description="the words of each block, by its name"
    )
    candidates: dict[str, tuple[str, ...]] = Field(
        {}, description="the words of blocks that may be recruited, by their names"
    )
    rules: tuple[tuple[str, str], ...] = Field(
        (), description="pairs of blocks: queries of the first find keys of the second relevant too"
    )
    dial: float = Field(1.0, ge=0, allow_inf_nan=False, description="lambda, at the start")
    penalty: float = Field(0.01, ge=0, allow_inf_nan=False, description="c, of the group lasso")
    sweep: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        tuple(map(float, range(0, 31, 2))), min_length=1, description="lambdas of the figure, rising"
    )

    @model_validator(mode="after")
    def _names(self) -> LocalistDialConfig:
        if twice := sorted(self.blocks.keys() & self.candidates.keys()):
            raise ValueError(f"{twice[0]!r} names a block and a candidate")
        for name, words in chain(self.blocks.items(), self.candidates.items()):
            if not words:
                raise ValueError(f"{name!r} names no words")
        if [*self.sweep] != sorted(set(self.sweep)):
            raise ValueError("sweep is not rising")
        for name in chain(*self.rules):
            if name not in {**self.blocks, **self.candidates}:
                raise ValueError(f"a rule names {name!r}, which is no block")
        return self


class Blocks(nn.Module):
    """Which block each token is of, [V], and which finds which relevant, bool [G + 1, G + 1], with row and column 0 for
    none.

    Attributes:
        dial: lambda. notes: None, or a list that gets [mass on the relevant, entropy in bits, 1, least mass that the
            bound allows] summed over the queries with a block and the heads of each layer that runs.
    """

    of: Tensor
    R: Tensor

    def __init__(self, vocabulary: int, R: Tensor, dial: float) -> None:
        super().__init__()
        self.register_buffer("of", torch.zeros(vocabulary, dtype=torch.long))
        self.register_buffer("R", R, persistent=False)
        self.dial = dial
        self.notes: list[Tensor] | None = None


class Localist(AttentionEdit):
    """softmax(s + lambda r) of one layer, from softmax(s).

    Args:
        call: what the model is called on. owner: the plugin's id.
    """

    def __init__(self, call: Call, owner: str, blocks: Blocks) -> None:
        super().__init__()
        self.call, self.owner, self.blocks = call, owner, (blocks,)  # in a tuple: no child of this one

    def opens(self) -> bool:
        return self.blocks[0].dial > 0 or self.blocks[0].notes is not None

    def probabilities(self, p: Tensor) -> Tensor:
        (blocks,), ids = self.blocks, self.call.ids
        if ids is None:
            said = f"{self.owner}: blocks are told by token ids, and the call brings embeddings"
            raise UnsupportedError(said, hint="model(input_ids=...)")
        own = blocks.of[ids] * self.call.real
        keys = self.call.keys(self.call.carry(self.owner, own), p)  # [B, K]
        queries = self.call.rows(own, p[:, 0])  # [B, Q]
        r = blocks.R[queries[:, :, None], keys[:, None]][:, None]  # [B, 1, Q, K]
        q = p.float()
        s = torch.where(q > 0, q.clamp_min(torch.finfo(q.dtype).tiny).log(), -torch.inf)
        q = torch.softmax(s + blocks.dial * r, -1)
        if blocks.notes is not None:
            mass, entropy = (q * r).sum(-1), torch.special.entr(q).sum(-1) / math.log(2)
            each = torch.stack((mass, entropy, torch.ones_like(mass), least_mass(s, r, blocks.dial)))
            blocks.notes.append((each * (queries > 0)[:, None]).sum((1, 2, 3)))
        return q.to(p.dtype)


def least_mass(s: Tensor, r: Tensor, dial: float) -> Tensor:
    """What the bound leaves on the relevant keys of each query, [B, H, Q], 0 where it says nothing.

    Args:
        s: scores [B, H, Q, K], up to a number for each query; -inf for what it does not see. r: bool [B, 1, Q, K].
    """
    seen = s > -torch.inf
    m = s.amax(-1) - s.masked_fill(~seen, torch.inf).amin(-1)
    w, v = (seen & ~r).sum(-1), (seen & r).sum(-1)
    return (1 - w / v * (m - dial).exp()).nan_to_num(0.0).clamp_min(0)


class LocalistDial(Plugin):
    """See the module. `dial` may be set at any time, between steps as between texts; a bundle keeps it."""

    Config = LocalistDialConfig
    claims = {
        Claim.TRAINS_BASE,
        Claim.NEEDS_GRADIENTS,
        Claim.NEEDS_TOKENS,
        Claim.TELLS_TOKENS,
        Claim.WHOLE_CALLS,
    }
    example = {
        "blocks": {"vowels": tuple("aeiou"), "ends": tuple("tns")},
        "candidates": {"more": tuple("rlh")},
    }
    refuses = {
        "t5": "its blocks would be those of two towers",
        "bert": "it is no decoder",
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
        "vit": "it reads no tokens",
    }
    config: LocalistDialConfig

    @property
    def dial(self) -> float:
        """lambda.

        Raises:
            PeftxError: when set, to less than 0, or to what is not finite.
        """
        return float(self.state.get("dial", self.config.dial))

    @dial.setter
    def dial(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise OptionError(f"localist-dial: a dial of {value}", hint="0, the plain model, or more")
        self.state["dial"] = self.blocks.dial = float(value)

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, kind, sites = self.config, model.config.model_type, model.attention_sites()
        check_writes(model)
        if any("sink" in name for site in sites for name, _ in site.module.named_parameters()):
            said = f"{model.owner}: {kind} has more than scores in its softmax"
            raise ArchitectureError(said, hint="a decoder with plain attention")
        words = {**config.blocks, **config.candidates}
        self.ids, self.numbers = ids_of(stack.tokenizer, words), dict(zip(words, count(1), strict=False))
        R = torch.eye(1 + len(words)) > 0
        R[0, 0] = False
        for query, key in config.rules:
            R[self.numbers[query], self.numbers[key]] = True
        self.blocks = model.keep("blocks", Blocks(len(model.embedding().weight), R, self.dial))
        for name in config.blocks:
            self.join(name)
        for site in sites:
            site.attend(Localist(model.call, model.owner, self.blocks))
        model.train("attention.q,k")
        self.heads = [(site, model.heads_of(site).head_dim) for site in model.linears("attention.q,k")]

    def join(self, name: str, *, yes: bool = True) -> None:
        """Let the tokens of a block be of it, or of none."""
        self.blocks.of[self.ids[name]] = yes * self.numbers[name]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        rate = step.rate(self)
        step.after_update(lambda _: self.shrink(rate * self.dial * self.config.penalty))
        return (yield)

    def shrink(self, by: float) -> None:
        """W_g <- max(0, 1 - by sqrt(n_g) / |W_g|_F) W_g, the proximal step of the group lasso."""
        for site, size in self.heads:
            at, tensors = groups_of(site, size)
            n = sum(W[at[0]].numel() for W in tensors)
            kept = (1 - by * math.sqrt(n) / norms_of(at, tensors).clamp_min(1e-30)).clamp_min(0)
            for W in tensors:
                W[at] = (W[at] * kept.view(-1, *[1] * W.ndim)).to(W)

    def read(self, stack: Stack, rows: Sequence[Any]) -> tuple[float, Tensor]:
        """NLL of the rows in bits, of all of their tokens together, and the sum of the notes."""
        notes: list[Tensor] = []
        with lent([self.blocks], "notes", [notes]):
            nll = perplexity(stack.model, stack.tokenizer, rows)["nll"]
        assert nll.count is not None
        return nll.value * nll.count / math.log(2), torch.stack(notes).sum(0)

    def sweep(self, stack: Stack, rows: Sequence[Any]) -> Tensor:
        """The experiment: under each lambda of `sweep` the mean mass on relevant keys of queries that have a block, and
        the least that the bound allows, [2, lambdas]. The dial is where it was afterwards."""
        found = []
        try:
            for dial in self.config.sweep:
                self.blocks.dial = dial
                _, (mass, _entropy, queries, least) = self.read(stack, rows)
                found.append(torch.stack((mass, least)) / queries)
        finally:
            self.blocks.dial = self.dial
        return torch.stack(found, 1)

    def gains(self, stack: Stack, rows: Sequence[Any]) -> dict[str, float]:
        """Bits that each candidate saves, less what it costs; of those that have joined none."""
        found, (old, _) = {}, self.read(stack, rows)
        for name in self.config.candidates:
            if not self.blocks.of[self.ids[name]].any():
                self.join(name)
                new, _ = self.read(stack, rows)
                self.join(name, yes=False)
                found[name] = old - new - len(self.ids[name]) * math.log2(len(self.blocks.of))
        return found

    def recruit(self, stack: Stack, rows: Sequence[Any]) -> list[str]:
        """Let candidates join, the one that gains most first, as long as one gains anything; which did, in order."""
        joined: list[str] = []
        while (gains := self.gains(stack, rows)) and max(gains.values()) > 0:
            joined.append(max(gains, key=gains.__getitem__))
            self.join(joined[-1])
        return joined

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add, of the rows `eval`, the mean `mass` on relevant keys, the `least_mass` that the bound allows, and the
        `entropy` of queries that have a block, the share of groups that are `zero`, and `recruit/<name>`, what a
        candidate would gain; mass and bound by the dial go to `localist-dial.html` in the run's folder.

        Raises:
            DataError: none of their tokens is of a block.
        """
        stack, rows = evaluation.stack, evaluation.rows("eval")
        _, (mass, entropy, queries, least) = self.read(stack, rows)
        if queries == 0:
            hint = f"rows with words of {', '.join(self.config.blocks)}"
            raise DataError("localist-dial: no token of the rows is of a block", hint=hint)
        norms = torch.cat([norms_of(*groups_of(site, size)) for site, size in self.heads])
        evaluation.add("mass", mass / queries, count=int(queries))
        evaluation.add("least_mass", least / queries, count=int(queries))
        evaluation.add("entropy", entropy / queries, count=int(queries), unit="bits")
        evaluation.add("zero", (norms == 0).double().mean(), count=len(norms))
        for name, bits in self.gains(stack, rows).items():
            evaluation.add(f"recruit/{name}", bits, unit="bits")
        if evaluation.output_dir is not None:
            curves = zip(("mass", "least mass by the bound"), self.sweep(stack, rows).tolist(), strict=True)
            drawn = {name: zip(self.config.sweep, values, strict=True) for name, values in curves}
            evaluation.figure("localist-dial", drawn, x="dial", y="mass on relevant keys")


def groups_of(site: BoundSite, size: int) -> tuple[Tensor, list[Tensor]]:
    """Rows of each head, [heads, size], and what has them as its first dimension: the matrix, and a bias if any."""
    every = torch.arange(site.rows.total if site.rows else site.out_features)
    at = (site.rows.take(every) if site.rows else every).view(-1, size)
    own = [getattr(site.module, name) for name in (site.parameter, site.bias_name)]
    return at, [p.detach().mT if site.turned and p.ndim == 2 else p.detach() for p in own if p is not None]


def norms_of(at: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """|W_g|_F, [heads]."""
    return torch.stack([W[at].flatten(1).float().square().sum(1) for W in tensors]).sum(0).sqrt()


def ids_of(tokenizer: PreTrainedTokenizerBase, words: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Tokens of each block: its words, at the start of a text and behind a blank.

    Raises:
        PeftxError: a word is no single token in either way, or a token is of two blocks.
    """
    of: dict[int, str] = {}
    for name, word in ((block, word) for block in words for word in words[block]):
        forms = [tokenizer(form, add_special_tokens=False).input_ids for form in (word, f" {word}")]
        own = {ids[0] for ids in forms if len(ids) == 1}
        if not own:
            said = f"localist-dial: {word!r} of block {name!r} is no single token"
            raise OptionError(said, hint="words that the tokenizer leaves whole")
        if other := next((of[id] for id in own if of.get(id, name) != name), None):
            said = f"localist-dial: {word!r} of block {name!r} is of block {other!r} too"
            raise OptionError(said, hint="a token is of one block")
        of |= dict.fromkeys(own, name)
    return {name: [id for id in of if of[id] == name] for name in words}
