"""The object that users hold: a stack with everything that one does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx.composition.conflicts import check
from peftx.composition.members import members_of
from peftx.engines.models import lasting, load_model, tokenizer_digest
from peftx.engines.sharded import refuse_shards, whole
from peftx.engines.training.updates import watch
from peftx.errors import StackError
from peftx.foreign import refuse_foreign
from peftx.hooks import HookSpecs
from peftx.kernel.members import Member
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.plugin import Plugin, hookimpl
from peftx.kernel.stack import Stack as Kernel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from peftx.engines.data import TrainingData
    from peftx.engines.training import TrainStep
    from peftx.engines.training.best import Measure
    from peftx.engines.training.feeders import Feeder
    from peftx.engines.training.run import Progress, TrainingReport
    from peftx.engines.training.shares import Share
    from peftx.kernel.heads import Pool
    from peftx.toolkits.decoding import Generation
    from peftx.toolkits.evaluation import Score
    from peftx.toolkits.serving import Server

CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 32, 256


class Defaults:
    """What runs inside all wrappers where no plugin replaces it."""

    @hookimpl
    def train_step(self, step: TrainStep) -> Tensor:
        from peftx.engines.training.step import default_step

        return default_step(step)

    @hookimpl
    def decode(self, request: Generation) -> Tensor:
        return request.run_default()


class Stack(Kernel):
    """Plugins on one model. Building it injects all of them, so that `stack.model` is ready to train or run.

    Args:
        model: `peftx:tiny`, a local folder, a hub id, or a `transformers` model that you made yourself.
        plugins: in the order of effect; `("name", plugin)` gives one an id of its own (needed when a class stands
            twice). Ids are the plugins' entry-point names.
        tokenizer: for a model of your own.
        seed: of the plugins' first values.
        dtype: of a model that is loaded here.
        device: where it is loaded to.
        trust_remote_code: run Python code that it brings along.

    Raises:
        ConflictError: two plugins that cannot stand together, or not in this order; a model with another stack's
            plugins on it. Nothing is built then.
        PluginError: a plugin's hook failed; names the plugin and the hook.
    """

    specs = HookSpecs
    defaults = Defaults

    def __init__(
        self,
        model: str | PreTrainedModel,
        plugins: Sequence[Plugin | tuple[str, Plugin] | Member] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
        inject: bool = True,
    ) -> None:
        members = members_of(plugins)
        check(members)  # before anything is read
        if not isinstance(model, str):
            refuse_foreign(model)
            config = getattr(model, "config", None)  # of what is no model, which is refused
            named = None if config is None else lasting(config.name_or_path)
            super().__init__(model, members, tokenizer=tokenizer, seed=seed, inject=inject, base_id=named)
        else:
            loaded, beside = load_model(
                model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            digest = None if beside is None else tokenizer_digest(beside)  # before anybody changes it
            super().__init__(
                loaded, members, tokenizer=tokenizer or beside, seed=seed, inject=inject, base_id=lasting(model),
                tokenizer_of_base=digest,
            )  # fmt: skip
        watch(self)

    # -- data and training -------------------------------------------------------------------------------------

    def prepare(self, data: TrainingData, ids: Iterable[str] | None = None) -> TrainingData:
        """Run the `prepare_data` hooks over the data, in order."""
        from peftx.engines.data.preparing import prepare

        return prepare(self, data, ids)

    def run_train_step(self, step: TrainStep) -> Tensor:
        """Run the `train_step` hooks on one micro-batch; returns the loss (0-d, detached)."""
        from peftx.engines.training.step import run_train_step

        return run_train_step(step)

    def train_step(
        self,
        batch: dict[str, Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        micro: int = 0,
        accumulation: int = 1,
        total: int | None = None,
        share: Share | None = None,
        sources: Mapping[str, Feeder] | None = None,
    ) -> Tensor:
        """One step of a loop of your own: gradients are left in `.grad`, or `optimizer` steps and clears them.

            parts = stack.shares(batches)  # of one optimizer step
            for i, (batch, share) in enumerate(zip(batches, parts)):
                stack.train_step(batch, optimizer=optimizer, micro=i, accumulation=len(batches), share=share)

        Args:
            batch: the model's keyword arguments, with labels.
            micro: which of the `accumulation` batches of one optimizer step this is, from 0; the optimizer steps after
                the last one.
            total: optimizer steps of the loop, for phases that are a share of it.
            share: what part of the optimizer step this batch is, of `shares`; equal parts if left out, which is right
                where all batches have as many labels.
            sources: see `peftx.engines.training.feeders.Feeder`; for plugins that train on several sources.

        Returns:
            The loss, 0-d, detached.
        """
        from peftx.engines.training.step import TrainStep

        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else 0.0
        step = TrainStep(
            self, batch, index=self.trained_steps, micro=micro, accumulation=accumulation, total=total,
            learning_rate=rate, share=share, sources=sources,
            groups=optimizer.param_groups if optimizer is not None else (),
        )  # fmt: skip
        loss = self.run_train_step(step)
        if optimizer is not None and step.last_micro:
            optimizer.step()
            optimizer.zero_grad()
            self.trained_steps += 1
        return loss

    def parameters(self, *ids: str) -> list[nn.Parameter]:
        """What trains: of all plugins, or of these, for an optimizer of your own with a rate for each:

        soft, rest = stack.parameters("prompt-tuning"), stack.parameters("lora")
        optimizer = AdamW([{"params": soft, "lr": 0.1}, {"params": rest, "lr": 1e-4}])
        """
        if not ids:
            return [p for p in self.model.parameters() if p.requires_grad]
        found = {p: None for id in ids for p in self.ledger.parameters(self.member(id).id)}
        return [p for p in found if p.requires_grad]

    def shares(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """What part of one optimizer step each of its micro-batches is, for `train_step`."""
        from peftx.engines.training.shares import counts, shares

        return shares([counts(self.model, batch) for batch in batches])

    def train(
        self,
        data: str | Path | Sequence[dict[str, Any]] | TrainingData,
        *,
        output: str | Path | None = None,
        resume: bool | str | Path = False,
        progress: Progress | None = None,
        columns: Mapping[str, str] | None = None,
        sources: Mapping[str, Any] | None = None,
        measured: Any = None,
        **options: Any,
    ) -> TrainingReport:
        """Train what the plugins declared.

        Args:
            data: a file, rows, or prepared `TrainingData`.
            columns: the data's own name of a column for a name of the format: `{"prompt": "question"}`.
            output: folder for checkpoints. resume: from the last checkpoint in `output`, or from this one.
            progress: called with (steps done, steps planned, loss terms and phases).
            sources: further rows by name, files or rows, for plugins that train on several (`step.batch_of`).
            measured: a file or rows to measure on every `eval_steps`.
            options: fields of the spec's `train:` section: steps, batch_size, learning_rate, ...

        Raises:
            DataError: bad data. PeftxError: an unknown option, or nothing to train.
        """
        from peftx.engines.training.run import train

        return train(
            self, data, output=output, resume=resume, progress=progress, options=options, columns=columns,
            sources=sources, measure=None if measured is None else self.measuring(measured),
        )  # fmt: skip

    def trainer(self, kind: type[Trainer]) -> type[Trainer]:
        """A class of trainers (`transformers.Trainer`, TRL's) that runs this stack's `train_step` hooks.

            stack.trainer(SFTTrainer)(model=stack.model, args=..., train_dataset=...).train()

        Its loss is the trainer's, with what plugins do around it; what it saves is a bundle.

        Raises:
            ConflictError: a plugin brings a loss of its own, and so does the class, which it does not serve.
        """
        from peftx.engines.training.trainers import trainer_of

        return trainer_of(self, kind)

    def measuring(self, rows: Any) -> Measure:
        """What measures on these rows while the stack trains."""
        return lambda metric, length: self.evaluate(rows, metrics=[metric], max_length=length)

    # -- compression ---------------------------------------------------------------------------------------------

    def compress(
        self,
        data: str | Path | Sequence[str | Mapping[str, Any]] | None = None,
        ids: Iterable[str] | None = None,
        *,
        samples: int = CALIBRATION_SAMPLES,
        length: int = CALIBRATION_LENGTH,
        keep: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run the `compress` hooks (all, or of these ids) that have not run yet.

        Args:
            data: calibration text: a file, texts, or rows; needed where a plugin claims `needs-calibration`.
            samples: sequences at most.
            length: tokens of each at most.
            keep: keep the layers that are replaced, so that `remove` brings them back; with False their memory is free.
            progress: called by plugins that go through the model block by block, with (blocks done, blocks).

        Raises:
            MergeError: a plugin starts from merged weights, and another one does not fold.
            PluginError: a hook failed. Its plugin has changed nothing then, nor is anything folded for it.
        """
        refuse_shards(self.model, "compressing")
        from peftx.toolkits.compression.batches import calibration
        from peftx.toolkits.compression.run import compress

        compress(
            self,
            lambda: calibration(self, data, samples=samples, length=length, progress=progress),
            ids,
            keep=keep,
        )

    # -- generation and evaluation -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Continue one prompt (or several) through the `decode` hooks.

        Args:
            options: fields of `transformers.GenerationConfig`: do_sample, temperature, top_p, num_beams, ...

        Returns:
            The new text, or a list of texts for a list of prompts.
        """
        from peftx.engines.data.gate import texts_of
        from peftx.toolkits.decoding.text import generate

        texts, _ = generate(self, texts_of(prompt, "prompt"), max_new_tokens, seed, options)
        return texts[0] if isinstance(prompt, str) else texts

    def decode(self, request: Generation) -> Tensor:
        """Run one request through the `decode` hooks; ends in `model.generate` unless a plugin replaces the loop."""
        from peftx.toolkits.decoding.generation import decode

        return decode(self, request)

    def serve(self, server: Server) -> None:
        """Run the `serve` hooks on a server that is about to start; see `peftx.toolkits.serving`."""
        for member in self.implementers("serve"):
            self.call(member, "serve", server=server)

    def classify(self, texts: str | Sequence[str]) -> Any:
        """The class of one text (or several) by the head of the plugin that claims `classifies`.

        Returns:
            A label, or a list of labels for a list of texts.

        Raises:
            PeftxError: no plugin of the stack has a head; `evaluate(metrics=["accuracy"])` compares likelihoods then.
        """
        from peftx.toolkits.evaluation.classification import classify, head_of

        head = head_of(self)
        if head is None:
            raise StackError("no plugin of this stack classifies", hint="add one, for example sk-tuning")
        labels, scores = classify(self, head, [texts] if isinstance(texts, str) else list(texts))
        named = [labels[index] for index in scores.argmax(-1).tolist()]
        return named[0] if isinstance(texts, str) else named

    def embed(self, texts: str | Sequence[str], *, pool: Pool | None = None, size: int = 32) -> Tensor:
        """Texts as vectors of length 1: those of the plugin that has its own, or from the last hidden states.

        Args:
            pool: of `peftx.kernel.heads`, of the last hidden states. If left out the way of the plugin that has one
                (`Plugin.embed`), and without such a plugin the last token of a decoder, the mean of other models.
            size: texts in a forward pass.

        Returns:
            [d] float32, or [N, d] for a list of texts. Cosine similarity is their product.

        Raises:
            DataError: no text, or one without tokens. ConflictError: two plugins have vectors of their own.
        """
        from peftx.engines.data.gate import texts_of
        from peftx.toolkits.evaluation.embedding import embed

        found = embed(self, texts_of(texts, "text"), pool=pool, size=size)
        return found[0] if isinstance(texts, str) else found

    def evaluate(
        self, data: Any = None, *, metrics: Sequence[str] = ("perplexity",), **options: Any
    ) -> dict[str, Score]:
        """Measure; see `peftx.toolkits.evaluation.run`.

        Args:
            data: a file, texts or rows. metrics: `perplexity`, `accuracy`, `task-accuracy`, `exact-match`, ids of
                plugins, or `lm-eval`, which has rows of its own: `tasks=`.
        """
        from peftx.toolkits.evaluation.run import evaluate

        return evaluate(self, data, metrics=metrics, options=options)

    # -- what needs whole matrices -------------------------------------------------------------------------------

    def merge(self, *ids: str, keep: bool = True) -> None:
        """Fold deltas into the weights (of all mergeable plugins without arguments).

        Args:
            keep: keep the untouched weights too, so that `unmerge` is bit-exact in every dtype; with False the plugin
                is folded for good.

        Raises:
            MergeError: a plugin whose effect does not fold, or a quantized base; nothing is changed then.
            UnsupportedError: the weights are sharded.
        """
        refuse_shards(self.model, "merging")
        super().merge(*ids, keep=keep)

    # -- saving --------------------------------------------------------------------------------------------------

    @property
    def holds_base(self) -> bool:
        """Whether a bundle of it holds the base, compressed; else that must be there beside it."""
        return bool(self.ledger.all(ReplacedPart))

    def save(self, path: str | Path) -> Path:
        """Write a bundle: everything that `peftx.load` needs to rebuild this stack bit for bit.

        Under `fully_shard` every process calls it; the weights are gathered, and the first process writes.
        """
        from peftx.engines.bundle import save

        with whole(self.model) as writes:
            return save(self, Path(path)) if writes else Path(path)

    def export(self, path: str | Path) -> Path:
        """Write a plain `transformers` checkpoint of the merged model, for vLLM, lm-eval and `from_pretrained`.

        Raises:
            MergeError: a plugin whose effect does not fold into the weights.
        """
        refuse_shards(self.model, "an export")
        from peftx.engines.bundle import export

        return export(self, Path(path))
