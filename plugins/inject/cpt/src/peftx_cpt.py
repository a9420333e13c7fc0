"""Context-aware prompt tuning: examples in front of the text, moved a little where they are no labels.

"Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods" (arXiv:2410.17222). Of N examples,
in order, every token has a kind: format (what a template adds), input, or label. With their embeddings E_0 and deltas d
on tokens that are no labels, d = 0 at first, a frozen model reads

    [E_0 + d ; E(X)]
    loss = CE(Y | .) + sum over j of w_j CE(label_j | the context up to it)      w_j = gamma^(N + 1 - j), the last gamma
    d_i <- d_i min(1, r / ||d_i||)     after each step; r = epsilon sqrt(width / 2048), one epsilon for each kind

so that what is learned stays near what was given, and a label is never moved. Untrained, it is in-context learning.

CE(Y | .) is the mean over the batch's label tokens. The CE of example j is the sum over its label's tokens, divided by
the number of label tokens that a row of the batch has on average: a token of a label counts as much here as there. HF
PEFT's loss is this one divided by 1 + (label tokens of the context) / (those of an average row).

The context is read once for a batch, by itself: no token of it sees the text that follows.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import dropwhile

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainStep, VirtualTokens, hookimpl
from peftx.engines.data.encoding import continuation, following_ids, special_frame, text_ids
from peftx.engines.training.shares import counts
from peftx.errors import ArchitectureError, OptionError
from peftx.kernel.objective import objective_of

FORMAT_BEFORE, INPUT, FORMAT, LABEL = 1, 2, 3, 4
"""Kinds of tokens, as PEFT counts them: of example j (from 0) 4 more for each j."""
WIDTH = 2048
"""Of the model whose epsilon is the option; PEFT's."""


class CptConfig(PluginConfig):
    """Options of context-aware prompt tuning; the paper takes 2 to 6 examples for each class."""

    examples: tuple[tuple[str, str], ...] = Field(
        (), description="the context: pairs of an input and its label, the last nearest to the text"
    )
    template: str = Field(
        "Input: {input} Output:{label}; ",
        description="of an example; a label follows as a completion does: behind a space, unless there is white space",
    )
    input_epsilon: float = Field(0.1, ge=0, description="how far a token of an input may move, at width 2048")
    format_epsilon: float = Field(
        0.1, ge=0, description="how far a token of the template may move, at width 2048"
    )
    gamma: float = Field(
        0.95, ge=0, le=1, description="weight of an example's label over that of the next one"
    )

    @field_validator("template")
    @classmethod
    def _has_both(cls, template: str) -> str:
        if [template.count(name) for name in ("{input}", "{label}")] != [1, 1]:
            raise ValueError("it holds {input} and {label}, each once")
        if template.index("{label}") <= template.index("{input}") + len("{input}"):
            raise ValueError("{label} follows {input}, with something between them")
        return template


class Context(VirtualTokens):
    """E_0 + d; `delta_embedding` has a row for each token that may move, [M, d].

    Args:
        start: E_0, [T, d]. radii: how far each token may move; None of a label. behind: of the text's first token,
            where all texts share it.
    """

    def __init__(self, start: Tensor, radii: Sequence[float | None], *, behind: bool) -> None:
        super().__init__(len(start))
        self.after_bos = behind  # type: ignore[misc]  # it follows from the tokenizer
        at = [i for i, radius in enumerate(radii) if radius is not None]
        self.register_buffer("embedding", start)
        self.register_buffer("at", torch.tensor(at, dtype=torch.int64), persistent=False)
        self.register_buffer("radius", torch.tensor([radii[i] for i in at])[:, None], persistent=False)
        self.delta_embedding = nn.Parameter(start.new_zeros(len(at), start.shape[1]))

    def rows(self) -> Tensor:
        return self.embedding.index_add(0, self.at, self.delta_embedding)

    @torch.no_grad()
    def project(self) -> None:
        """d_i <- d_i min(1, r / ||d_i||)."""
        size = self.delta_embedding.float().norm(dim=1, keepdim=True)
        self.delta_embedding *= torch.where(size > self.radius, self.radius / size, 1.0)


class Cpt(Plugin):
    """See the module."""

    Config = CptConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS, Claim.NEEDS_LABELS, Claim.GIVES_EMBEDDINGS}
    architectures = ("gemma",)
    refuses = {"bert": "it writes no labels", "t5": "it writes nothing of what it reads"}
    example = {"examples": (("ab", "c"), ("de", "fg")), "template": "{input}:{label}\n"}
    config: CptConfig

    def suits(self, model: ModelView) -> None:
        main = model.main.name, model.config.is_encoder_decoder, objective_of(model.module)
        if main != ("decoder", False, "next-token"):
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} does not go on with the labels of its context",
                hint="a decoder-only model with a head that writes: ...ForCausalLM",
            )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if not model.restoring:
            first, _ = special_frame(stack.tokenizer)
            self.state = {"first": first[:1], **self.read(stack)}
        first, ids, kinds = (self.state[name] for name in ("first", "ids", "kinds"))
        site, format = model.embedding(), self.config.format_epsilon
        tokens = torch.tensor(first + ids, device=site.weight.device)
        rows = site.module(tokens).detach().to(site.weight)  # as the model calls it: Gemma's scales
        self.first, start = rows.split([len(first), len(ids)])
        far = {FORMAT_BEFORE: format, INPUT: self.config.input_epsilon, FORMAT: format}
        radii = [far[kind % 4] * (rows.shape[1] / WIDTH) ** 0.5 if kind % 4 else None for kind in kinds]
        self.context = Context(start, radii, behind=bool(first))
        model.prompt(self.context)

    def read(self, stack: Stack) -> dict[str, list[int]]:
        """Ids and kinds of the context's tokens."""
        before, rest = self.config.template.split("{input}")
        between, after = rest.split("{label}")
        ids: list[int] = []
        kinds: list[int] = []
        for j, (x, y) in enumerate(self.config.examples):
            label = continuation(before + x + between, y)
            parts = (FORMAT_BEFORE, before), (INPUT, x), (FORMAT, between), (LABEL, label), (FORMAT, after)
            for kind, text in parts:
                found = following_ids(stack.tokenizer, text) if ids else text_ids(stack.tokenizer, text)
                ids += found
                kinds += [4 * j + kind] * len(found)
        if not kinds or not {4 * j + LABEL for j in range(len(self.config.examples))} <= {*kinds}:
            raise OptionError("cpt: no examples, or one without a label", hint="examples: [[input, label]]")
        return {"ids": ids, "kinds": kinds}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.context.delta_embedding.requires_grad:
            if self.config.gamma:
                step.add_loss("context", lambda _: self.loss(step))
            step.after_update(lambda _: self.context.project())
        return (yield)

    def loss(self, step: TrainStep) -> Tensor:
        """Of the labels of the context, for a row of the batch; divided by the labels that a row has."""
        rows = torch.cat((self.first.to(self.context.embedding), self.context.rows()))[None]
        ids, kinds = (torch.tensor(self.state[name], device=rows.device) for name in ("ids", "kinds"))
        at = (kinds % 4 == 0).nonzero()[:, 0]
        later = dropwhile(lambda member: member.plugin is not self, step.stack.members)
        unseen = [m.id for m in later if m.claims(Claim.VIRTUAL_TOKENS)]  # itself, and what follows it
        with step.stack.disabled(*unseen):
            logits = step.module(inputs_embeds=rows, use_cache=False).logits[0, len(self.first) + at - 1]
        losses = F.cross_entropy(logits.float(), ids[at], reduction="none")
        weights = self.config.gamma ** (len(self.config.examples) - (kinds[at] - LABEL) // 4)
        known = counts(step.model, step.batch)
        return (weights * losses).sum() * known["rows"] / max(known["labels"], 1)
