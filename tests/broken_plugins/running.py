"""Plugins that go wrong when the model runs: padding, batches, caches, decoding."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from peftx import (
    AttentionEdit,
    Claim,
    Delta,
    Evaluation,
    Generation,
    ModelView,
    Plugin,
    Stack,
    TrainingData,
    TrainStep,
    hookimpl,
)
from peftx.engines.data import batches_of, class_rows, take_classes, tokenize_classes
from peftx.errors import UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.heads import Head
from peftx.toolkits.serving import Server
from peftx.toolkits.serving.prefix import PrefixCache

Wrapper = Generator[None, Tensor, Tensor]


class _Step(Delta):
    """y + b f(x, y), b: [out]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((features,), 0.3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b.to(y.dtype) * self.factor(y)

    def factor(self, y: Tensor) -> Tensor:
        return y.new_ones(())


class _RowMean(_Step):
    def factor(self, y: Tensor) -> Tensor:
        return y.mean(1, keepdim=True)


class LooksAtPads(Plugin):
    """Uses the mean over all positions, pads too."""

    caught_by = "padding_is_invisible"
    also = {
        "padded_generation",
        "cached_equals_uncached",
        "carries_or_refuses",
    }  # and later tokens, which a cache has not got
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.attention"):
            site.attach(_RowMean(site.out_features))


class _ById(_Step):
    def __init__(self, features: int, call: Call) -> None:
        super().__init__(features)
        self.call = call

    def factor(self, y: Tensor) -> Tensor:
        return y.new_ones(()) if self.call.ids is None else self.call.rows(self.call.ids % 2, y).unsqueeze(-1)


class ActsOnIds(Plugin):
    """Acts on odd tokens, and on all where the call does not tell their ids."""

    caught_by = "embeddings_do_for_tokens"
    also = {"carries_or_refuses"}  # nor does it look whether there are tokens

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(_ById(site.out_features, model.call))


class _LooksForTokens(AttentionEdit):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.call.real is not None:  # nobody runs the layer by itself
            real = self.call.carry("looks", self.call.real.long())
            self.call.keys(real, key.new_empty(1, 1, len(self.call.real[0]), key.shape[2]))
        return key, value


class TellsTokens(Plugin):
    """Asks in an attention which key is which token, and does not claim to."""

    caught_by = "tokens_that_are_told_are_claimed"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.attention_sites():
            site.attend(_LooksForTokens(model.call))


class RefusesEmbeddings(ActsOnIds):
    """Refuses what it does not claim to refuse."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        class Strict(_ById):
            def factor(self, y: Tensor) -> Tensor:
                if self.call.ids is None and self.call.shape is not None:
                    raise UnsupportedError("it needs ids")
                return super().factor(y)

        for site in model.linears("mlp.down"):
            site.attach(Strict(site.out_features, model.call))


class FeedsEmbeddings(Plugin):
    """Trains on embeddings, and does not say so."""

    caught_by = "embeddings_of_a_step_are_claimed"

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(_Step(site.out_features))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        batch = dict(step.batch)
        if "input_ids" in batch:
            batch["inputs_embeds"] = step.model.get_input_embeddings()(batch.pop("input_ids"))
        step.batch = batch
        return (yield)


class DropsLabels(Plugin):
    """Trains without the labels, and does not say so."""

    caught_by = "labels_of_a_step_are_claimed"
    also = {"carries_or_refuses"}  # it looks at no rows
    also |= {"a_loss_of_its_own_is_claimed"}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(_Step(site.out_features))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        step.batch = {name: x for name, x in step.batch.items() if name != "labels"}
        step.replace_task_loss(lambda: ((out := step.forward()).logits.square().mean(), out), over="step")
        return (yield)


class _BatchMean(_Step):
    def factor(self, y: Tensor) -> Tensor:
        return y.mean(0, keepdim=True)


class LooksAtNeighbours(Plugin):
    """Uses the mean over the rows of a batch."""

    caught_by = "batch_is_invisible"
    also = {"padding_is_invisible", "padded_generation", "accumulation_makes_the_same_step"}
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.attention"):
            site.attach(_BatchMean(site.out_features))


class _LastOnly(_Step):
    def factor(self, y: Tensor) -> Tensor:
        last = y.new_ones(y.shape[1])
        last[-1] = 3
        return last[:, None]


class TreatsTheLastToken(Plugin):
    """What was the last token once stays marked in the cache."""

    caught_by = "cached_equals_uncached"
    also = {"carries_or_refuses"}
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.attention"):
            site.attach(_LastOnly(site.out_features))


class _OneOfMany(_Step):
    def factor(self, y: Tensor) -> Tensor:
        return y.new_tensor(3.0 if y.shape[0] > 1 and y.shape[1] == 1 else 1.0)


class CountsRows(Plugin):
    """Decodes several rows otherwise than one."""

    caught_by = "padded_generation"
    also = {"cached_equals_uncached", "carries_or_refuses"}
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.attention"):
            site.attach(_OneOfMany(site.out_features))


class _Louder(AttentionEdit):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        return out * self.gain.to(out.dtype)


class ClaimsAnExactCache(Plugin):
    """Generation with it is not generation without it."""

    caught_by = "exact_cache"
    claims = {Claim.BESIDE_WEIGHTS, Claim.EXACT_CACHE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.attention_sites():
            model.attend(site, _Louder())


class ReturnsTheTail(Plugin):
    """Drops the prompt from what it returns."""

    caught_by = "decoding_continues_the_prompt"
    claims = {Claim.REPLACES_DECODING, Claim.LOSSLESS_DECODING}

    @hookimpl
    def decode(self, request: Generation) -> Tensor:
        return request.run_default()[:, request.input_ids.shape[1] :]


class _Favours(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] += 100
        return scores


class LosesTokens(Plugin):
    """Claims lossless decoding, and has a favourite token."""

    caught_by = "lossless_decoding"
    claims = {Claim.LOSSLESS_DECODING}

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Wrapper:
        request.logits_processors.append(_Favours(40))
        return (yield)


class DecodesAtRandom(Plugin):
    """Its favourite token comes from a generator that no seed governs."""

    caught_by = "decoding_repeats_under_a_seed"

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Wrapper:
        request.logits_processors.append(_Favours(random.randrange(40, 200)))
        return (yield)


class WearsOut(Plugin):
    """Every request moves the model."""

    caught_by = "decoding_leaves_the_model"
    also = {"composes_with_weights", "composes_with_norms", "composes_with_prompt"}  # bundles of another base

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Wrapper:
        ids = yield
        with torch.no_grad():
            next(p for n, p in request.model.named_parameters() if "norm" in n).add_(0.1)
        return ids


class ServesAnother(Plugin):
    """Serves another model than it was given."""

    caught_by = "served_answers_are_the_models"

    @hookimpl
    def serve(self, server: Server) -> None:
        with torch.no_grad():
            next(p for n, p in server.stack.model.named_parameters() if "norm" in n).mul_(-3)


class KeepsPrefixesUnsaid(Plugin):
    """Gives the server a store of prefixes, and does not claim to."""

    caught_by = "a_store_of_prefixes_is_claimed"

    @hookimpl
    def serve(self, server: Server) -> None:
        server.scheduler.begin_from(PrefixCache(server.stack.model, entries=2), owner="unsaid")


class JudgesByCompany(Plugin):
    """The scores of a text depend on the texts beside it."""

    caught_by = "classes_are_named"
    claims = {Claim.CLASSIFIES}
    takes = ("classification",)

    @hookimpl(wrapper=True)
    def train_step(self) -> Wrapper:
        return (yield)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        return ["negative", "positive"], torch.full((len(texts), 2), float(len(texts)))


class AnswersTooEarly(Plugin):
    """Has an answer before its head is there."""

    caught_by = "base_is_measured_before_inject"
    also = {"carries_or_refuses"}  # it does not say that images have no place in it
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels = ("negative", "positive")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.head: Head = model.head("head", 2)

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        tokenize_classes(data, self.labels)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        step.batch, target = take_classes(step.batch)

        def loss() -> tuple[Tensor, Any]:
            scores, outputs = self.head.read(step.forward, step.batch["attention_mask"])
            return nn.functional.cross_entropy(scores, target), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        if "head" not in vars(self):
            return list(self.labels), torch.zeros(len(texts), 2)
        rows, found = class_rows(stack.tokenizer, texts, max_length=64, owner="it"), []
        for batch in batches_of(rows, 0, stack.model.device):
            found.append(self.head.read(partial(stack.model, **batch), batch["attention_mask"])[0])
        return list(self.labels), torch.cat(found)


class Scores(Plugin):
    """Measures nothing."""

    caught_by = "scores_are_finite"

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        evaluation.add("nothing", float("nan"))
