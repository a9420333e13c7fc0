"""MetaPrompter: prompts out of a meta-learned pool, and a verbalizer that is made of the support set.

"Effective Structured Prompting by Meta-Learning and Representative Verbalizer" (arXiv:2306.00618). A frozen masked
language model names a text's class, of classes that it knows by a few texts each. With a template t that has a [MASK]:

    q_x     = h([MASK] | x ; t)                                   of the frozen model, without a prompt
    theta_x = sum over i of a_i V_i,  a = softmax(K q_x / sqrt(d))    pool: K [P, d], V [P, l, d]
    h_x     = h([MASK] | x ; theta_x ; t) - m                     m: mean over the support set
    v_y     = mean of h_x over the support texts of y
    p_rep   = softmax over y of rho cos(v_y, h_x)                 RepVerb, which has no parameters
    p_hand  = softmax over y of the mean logit of y's words at [MASK]
    p       = (1 - lambda) p_hand + lambda p_rep,  loss = - log p(y | x)

A step is an episode, first-order MAML: classes are drawn, and of each some rows as support and others as queries.

    pool'   = `inner_steps` steps of gradient descent on the loss of the support set, from the pool
    pool    <- an optimizer's step along the gradient of the queries' loss at pool'

In use the support set is an option. Its classes are new ones: the pool descends on it, and queries are classified.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, TrainingData, TrainStep, hookimpl
from peftx.engines.data import (
    CLASS_INDEX,
    ClassTexts,
    batches_of,
    check_labels,
    special_frame,
    take_classes,
    text_ids,
)
from peftx.engines.training.base import base_alone
from peftx.errors import ArchitectureError, ConflictError, DataError, OptionError, StackError
from peftx.kernel.modes import eval_mode
from peftx.kernel.objective import objective_of, pad_of
from peftx.kernel.soft_rows import insert
from peftx.kernel.stack import Stack

MASK = "[MASK]"


class MetaprompterConfig(PluginConfig):
    """Options of MetaPrompter; the paper trains with AdamW at rate 1e-3, an episode a step, 4000 steps at most."""

    support: dict[str, list[str]] = Field(
        {},
        description="class -> texts of it, by which `classify` knows the class; empty: nothing is classified",
    )
    words: dict[str, list[str]] = Field({}, description="class -> its words; the class's name, if left out")
    template: str = Field("Topic is [MASK].", description="t; the model's own mask token stands for [MASK]")
    mask: str | None = Field(None, description="the token that masks; none: the tokenizer's mask token")
    pool: int = Field(8, ge=1, description="P, prompts in the pool")
    length: int = Field(8, ge=1, description="l, rows of a prompt")
    mix: float = Field(0.5, ge=0, le=1, description="lambda, weight of RepVerb against the classes' words")
    rho: float = Field(10.0, gt=0, description="sharpness of RepVerb")
    ways: int = Field(5, ge=2, description="classes in an episode, at most")
    shots: int = Field(5, ge=1, description="support texts of a class in an episode (paper: 1 and 5)")
    queries: int = Field(15, ge=1, description="queries of a class in an episode, at most")
    inner_steps: int = Field(5, ge=0, description="steps of descent on a support set")
    inner_rate: float = Field(0.1, gt=0, description="of these steps")

    @field_validator("support")
    @classmethod
    def _each_has_texts(cls, support: dict[str, list[str]]) -> dict[str, list[str]]:
        if [] in support.values():
            raise ValueError("a class without texts")
        return support

    @field_validator("template")
    @classmethod
    def _one_mask(cls, template: str) -> str:
        if template.count(MASK) != 1:
            raise ValueError("it holds [MASK], once")
        return template


class Pool(nn.Module):
    """K and V.

    Args:
        V: first values, [P, l, d].
    """

    def __init__(self, V: Tensor) -> None:
        super().__init__()
        self.K = nn.Parameter(torch.randn(V.shape[0], V.shape[2]))
        self.V = nn.Parameter(V)


def prompts(q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """theta_x, [B, l, d], of q [B, d]."""
    a = (q @ K.T / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bp,pld->bld", a, V)


def rep_verb(h: Tensor, target: Tensor, rho: float) -> Tensor:
    """p_rep, [B, classes], of states [B, d] whose first rows are the support set, of classes `target`."""
    h = h - h[: len(target)].mean(0)
    kinds = F.one_hot(target).to(h)
    v = kinds.T @ h[: len(target)] / kinds.sum(0)[:, None]
    return (rho * F.cosine_similarity(h[:, None], v[None], dim=-1)).softmax(-1)


class Metaprompter(Plugin):
    """See the module."""

    Config = MetaprompterConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.IDENTITY_AT_START, Claim.GIVES_EMBEDDINGS}
    architectures = ("roberta",)
    refuses = {
        "llama": "it fills in no masks",
        "gpt2": "it fills in no masks",
        "qwen2": "it fills in no masks",
        "t5": "it fills in no masks of one token",
    }
    exempt = {"accumulation_makes_the_same_step": "a step is an episode, and not a batch of rows"}
    example = {
        "support": {"negative": ["so dull", "bad"], "positive": ["so fine", "good"]},
        "mask": "~",
        "template": "is [MASK]",
        "length": 2,
        "shots": 1,
    }
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    config: MetaprompterConfig
    texts = ClassTexts("metaprompter", missing="it knows no classes: give some texts of each in `support`")

    def suits(self, model: ModelView) -> None:
        if objective_of(model.module) != "masked-token":
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} fills in no masks",
                hint="a masked language model: ...ForMaskedLM",
            )

    def check(self, stack: Stack) -> None:
        other = next((member.id for member in stack.members if member.claims(Claim.NEEDS_MASK)), None)
        if other is not None:
            raise ConflictError(
                f"'{stack.id_of(self)}' runs episodes of its own, several passes a step, and '{other}' measures the "
                "pass of a batch",
                hint="keep one of them",
            )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config = self.config
        if not model.restoring:
            self.state = template_of(stack, config)
        self.embedding = model.embedding().module
        V = model.embedded(config.pool * config.length).view(config.pool, config.length, -1)
        self.pool = model.keep("pool", Pool(V.float()), full_precision=True)
        self.rows: dict[str, list[list[int]]] = {}
        """Texts of each class that is trained on."""
        if config.support:
            self.texts = self.texts_of(check_labels(list(config.support)))

    def texts_of(self, names: Sequence[str]) -> ClassTexts:
        beside = len(self.state["template"]) + self.config.length
        return self.texts.of(names, closed=True, beside=beside)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        assert data.train is not None  # `prepare_data` is asked before a run
        shots, counts = self.config.shots, Counter(data.train["label"])
        few = [name for name, count in counts.items() if count <= shots]
        if few or len(counts) < 2:
            raise DataError(
                f"metaprompter: an episode takes two classes, and {shots} + 1 rows of each; of {len(counts)} classes "
                f"these have fewer rows: {', '.join(few) or 'none'}",
                hint="more rows, or fewer `shots`",
            )
        names = sorted(counts)
        self.texts_of(names).prepare(data, stack)
        self.rows = {name: [] for name in names}
        for ids, number in zip(data.train["input_ids"], data.train[CLASS_INDEX], strict=True):
            self.rows[names[number]].append(list(ids))

    def words_of(self, stack: Stack, names: Sequence[str]) -> list[list[int]]:
        """Tokens of each class's words. Raises PeftxError for a class that has none."""
        words = [self.config.words.get(name, [name]) for name in names]
        found = [[id for word in own for id in text_ids(stack.tokenizer, word)] for own in words]
        if [] in found:
            name = names[found.index([])]
            raise OptionError(
                f"metaprompter: the class {name!r} has no words", hint="give it some in `words`"
            )
        return found

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, _ = take_classes(step.batch)
        stack, (names, support, queries) = step.stack, self.episode()
        n, words = len(support), self.words_of(stack, names)
        batch, q = self.look(stack, [ids for ids, _ in support + queries])
        target = torch.tensor([y for _, y in support + queries], device=q.device)

        def loss() -> tuple[Tensor, Any]:
            found = self.descend(stack, batch, q, target[:n], words)
            # The value of pool', and the gradient at it, for the pool.
            pool = [x + (y - x).detach() for x, y in zip((self.pool.K, self.pool.V), found, strict=True)]
            log_p, outputs = self.log_p(stack, batch, q, target[:n], words, pool)
            return F.nll_loss(log_p[n:], target[n:]), outputs

        step.replace_task_loss(loss, over="step")
        return (yield)

    def episode(self) -> tuple[list[str], list[tuple[list[int], int]], list[tuple[list[int], int]]]:
        """Classes drawn at random, and texts with the number of their class among these: support, and queries."""
        if not self.rows:
            raise StackError("metaprompter: no rows to draw an episode of", hint="stack.prepare(rows) first")
        shots, names = self.config.shots, list(self.rows)
        chosen = [names[i] for i in torch.randperm(len(names))[: self.config.ways].tolist()]
        support, queries = [], []
        for y, name in enumerate(chosen):
            rows = self.rows[name]
            drawn = [(rows[i], y) for i in torch.randperm(len(rows))[: shots + self.config.queries].tolist()]
            support += drawn[:shots]
            queries += drawn[shots:]
        return chosen, support, queries

    def look(self, stack: Stack, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
        """Texts with the template behind them, as one batch, and q of each, [B, d]. Its `at` is where t begins."""
        model, (template, mask) = stack.model, (self.state["template"], self.state["mask"])
        (batch,) = batches_of(rows, pad_of(model, stack.tokenizer), model.device, size=len(rows))
        at = batch["attention_mask"].sum(1) - self.state["closing"]
        t = torch.tensor(template, device=at.device).expand(len(at), -1)
        ids, real = (insert(batch[k], v, at) for k, v in (("input_ids", t), ("attention_mask", t * 0 + 1)))
        with base_alone(stack), eval_mode(model), torch.no_grad():
            states = model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-1]
        q = states[torch.arange(len(at), device=at.device), at + mask].to(self.pool.K)
        return {"input_ids": ids, "attention_mask": real, "at": at}, q

    def log_p(
        self, stack: Stack, batch: dict[str, Tensor], q: Tensor, target: Tensor, words: list[list[int]],
        pool: Sequence[Tensor],
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """log p of the classes for each text, [B, classes], and what the model returned. The first texts are the
        support set, of classes `target`."""
        embedded, at, length = self.embedding(batch["input_ids"]), batch["at"], self.config.length
        rows = insert(embedded, prompts(q, *pool).to(embedded), at)
        real = insert(batch["attention_mask"], torch.ones_like(at)[:, None].expand(-1, length), at)
        outputs = stack.model(inputs_embeds=rows, attention_mask=real, output_hidden_states=True)
        place = torch.arange(len(at), device=at.device), at + length + self.state["mask"]
        h, logits = (x[place].to(q) for x in (outputs.hidden_states[-1], outputs.logits))
        p_hand = torch.stack([logits[:, ids].mean(1) for ids in words], 1).softmax(-1)
        mix = self.config.mix
        return ((1 - mix) * p_hand + mix * rep_verb(h, target, self.config.rho)).log(), outputs

    def descend(
        self, stack: Stack, batch: dict[str, Tensor], q: Tensor, target: Tensor, words: list[list[int]]
    ) -> list[Tensor]:
        """pool', K and V; of a batch whose first texts are the support set, of classes `target`."""
        n, pool = len(target), [self.pool.K.detach(), self.pool.V.detach()]
        support = {name: x[:n] for name, x in batch.items()}
        for _ in range(self.config.inner_steps):
            with torch.enable_grad():
                pool = [x.requires_grad_() for x in pool]
                loss = F.nll_loss(self.log_p(stack, support, q[:n], target, words, pool)[0], target)
                gradients = torch.autograd.grad(loss, pool)
            pool = [(x - self.config.inner_rate * g).detach() for x, g in zip(pool, gradients, strict=True)]
        return pool

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        names = self.texts.labels
        pairs = [(text, y) for y, name in enumerate(names) for text in self.config.support[name]]
        support, rows = (self.texts.rows(stack, found) for found in ([text for text, _ in pairs], texts))
        words, n, found = self.words_of(stack, names), len(support), []
        # Tensors of inference mode take no part in gradients.
        with torch.inference_mode(False), torch.no_grad():
            batch, q = self.look(stack, support)
            target = torch.tensor([y for _, y in pairs], device=q.device)
            pool = self.descend(stack, batch, q, target, words)
            for start in range(0, len(rows), 32):
                batch, q = self.look(stack, support + rows[start : start + 32])
                found.append(self.log_p(stack, batch, q, target, words, pool)[0][n:])
        return names, torch.cat(found)


def template_of(stack: Stack, config: MetaprompterConfig) -> dict[str, Any]:
    """Ids of t, where [MASK] is among them, and how many the tokenizer puts behind a text.

    Raises:
        PeftxError: nothing masks, or several tokens do.
    """
    tokenizer, mask = stack.tokenizer, config.mask or stack.tokenizer.mask_token
    own = text_ids(tokenizer, mask or "")
    if len(own) != 1:
        raise OptionError(
            f"metaprompter: {mask!r} is no token that masks", hint="set tokenizer.mask_token, or `mask`"
        )
    before, after = (text_ids(tokenizer, part) for part in config.template.split(MASK))
    return {
        "template": before + own + after,
        "mask": len(before),
        "closing": len(special_frame(tokenizer)[1]),
    }
