"""The object that users hold: an ordered list of configured plugins on one plain `transformers` model."""

from __future__ import annotations

import builtins
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from peftx.anatomy import Anatomy
from peftx.changes import Owner
from peftx.conflicts import Member, check
from peftx.errors import ConflictError, DataError, MergeError, PeftxError, PluginError, nearest
from peftx.guard import guard, release
from peftx.identity import Identity
from peftx.ledger import Ledger, carried
from peftx.members import Defaults, blame, members_of, register
from peftx.models import load_model
from peftx.objective import objective_of
from peftx.parts import BasePart, DeltaPart, ReplacedPart
from peftx.plugin import Claim, Plugin
from peftx.slots import base_class
from peftx.view import ModelView
from peftx.virtual_tokens import free_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx.data import TrainingData
    from peftx.decoding import Generation
    from peftx.evaluation import Score
    from peftx.serving import Server
    from peftx.training import TrainStep
    from peftx.training.run import Progress, TrainingReport
    from peftx.training.shares import Share
    from peftx_spec import Pipeline

CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 32, 256


class Stack:
    """Plugins on one model. Building it injects all of them, so that `stack.model` is ready to train or run.

    Args:
        model: `peftx:tiny`, a local folder, a hub id, or a `transformers` model that you made yourself.
        plugins: in the order of effect; `("name", plugin)` gives one an id of its own (needed when a class stands
            twice). Ids are the plugins' entry-point names.
        tokenizer: for a model of your own. seed: of the plugins' first values.
        dtype, device, trust_remote_code: for a model that is loaded here.

    Raises:
        ConflictError: two plugins that cannot stand together, or not in this order; a model with another stack's
            plugins on it. Nothing is built then.
        PluginError: a plugin's hook failed; names the plugin and the hook.
    """

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
        self.members = members_of(plugins)
        check(self.members)
        if not isinstance(model, str | PreTrainedModel):
            raise PeftxError(
                f"a {type(model).__name__} is no transformers model",
                hint="Stack(AutoModelForCausalLM.from_pretrained(...), ...), or the name of a model",
            )
        if not isinstance(model, str) and (others := carried(model)):
            raise ConflictError(
                f"the model carries {', '.join(others)} of another stack, which alone can train and save them",
                hint="one Stack with all plugins; or that stack.remove(id) first, or load the model anew",
            )
        self.plugins: dict[str, Plugin] = {member.id: member.plugin for member in self.members}
        self._manager = register(self.members)
        self.seed = seed
        self.tokenizer_of_base: str | None = None
        """Digest of the tokenizer that lies beside the base, as it was loaded; None where none was."""
        self.base_id = (
            model if isinstance(model, str) else (model.config.name_or_path or type(model).__name__)
        )
        if isinstance(model, str):
            model, found = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            self._came_with(found)
            tokenizer = tokenizer or found
        self.model: PreTrainedModel = model
        self._tokenizer = tokenizer
        self.anatomy = Anatomy(model)
        self.ledger = Ledger(model)
        self.identity = Identity.of(model)
        """Of the base as it was before any plugin changed it; None where it is on the meta device."""
        self.given_fingerprint: str | None = None
        """What a bundle that holds its base, compressed, tells of it."""
        self.trained_steps = 0
        self.memory: dict[str, Any] = {}
        """What plugins remember between the steps of a loop of your own."""
        self.pipeline: Pipeline | None = None
        """The spec that made this stack; its bundle repeats it."""
        self.scores: dict[str, Score] = {}
        self.folded: set[str] = set()
        self.injected: set[str] = set()
        self.compressed: set[str] = set()
        self._frozen: set[str] = set()
        self.disabled_ids: set[str] = set()
        self._check_suits()
        if self.members:
            guard(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        if inject:
            try:
                self.inject()
            except BaseException:  # Ctrl-C too: the caller's model is as it was
                for id in reversed(self.plugins):
                    self.ledger.remove(id)
                for parameter in trained:
                    parameter.requires_grad_(True)
                release(model)
                raise

    # -- hooks ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises PeftxError if the model came without one."""
        if self._tokenizer is None:
            raise PeftxError("this stack has no tokenizer", hint="Stack(model, plugins, tokenizer=...)")
        return self._tokenizer

    def _came_with(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Note what lies beside the base, before anybody changes it."""
        from peftx.bundle.surroundings import tokenizer_digest

        self.tokenizer_of_base = tokenizer_digest(tokenizer) if tokenizer is not None else None

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base as it was before any plugin changed its weights, in the dtype that it has now; None where it was
        on the meta device."""
        if self.identity is None:
            return self.given_fingerprint
        return self.identity.digest({name: t.dtype for name, t in self.model.named_parameters()})

    def member(self, id: str) -> Member:
        for member in self.members:
            if member.id == id:
                return member
        raise PeftxError(
            f"no plugin '{id}' in this stack",
            hint=nearest(id, self.plugins) or f"its plugins: {', '.join(self.plugins)}",
        )

    def id_of(self, plugin: Plugin) -> str:
        """Under which id a plugin object stands in this stack. Raises PeftxError where it does not."""
        for id, other in self.plugins.items():
            if other is plugin:
                return id
        raise PeftxError(f"this {type(plugin).__name__} does not stand in the stack")

    def view(self, id: str, *, restoring: bool = False) -> ModelView:
        """The model as plugin `id` may change it."""
        rank = [member.id for member in self.members].index(self.member(id).id)
        return ModelView(self.anatomy, self.ledger, Owner(id, rank, restoring))

    def _implementers(self, hook: str, ids: Iterable[str] | None = None) -> list[Member]:
        wanted = None if ids is None else {self.member(id).id for id in ids}
        return [m for m in self.members if m.implements(hook) and (wanted is None or m.id in wanted)]

    def _caller(self, hook: str) -> Any:
        """The hook without the plugins that are switched off, and a step without those that are in the weights."""
        left_out = self.disabled_ids | self.folded if hook == "train_step" else self.disabled_ids
        if not left_out:
            return getattr(self._manager.hook, hook)
        return self._manager.subset_hook_caller(hook, [self.plugins[name] for name in left_out])

    def _call(self, member: Member, hook: str, **arguments: Any) -> Any:
        """Run one plugin's plain hook; a failure names the plugin, the hook and the place in the spec."""
        function = getattr(member.plugin, hook)
        taken = {name: arguments[name] for name in inspect.signature(function).parameters}
        try:
            return function(**taken)
        except Exception as error:
            blame(error, member, hook)
            raise

    @contextmanager
    def _blaming(self, hook: str) -> Iterator[None]:
        """For hooks that run nested: whose implementation was the innermost one on the way to the error."""
        try:
            yield
        except Exception as error:
            inner = None
            trace = error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_name == hook:
                    caller = trace.tb_frame.f_locals.get("self")
                    # A wrapper is not to blame for the framework's own loop, which it wraps.
                    other = None if isinstance(caller, Defaults) else inner
                    inner = next((m for m in self.members if m.plugin is caller), other)
                trace = trace.tb_next
            if inner is not None:
                blame(error, inner, hook)
            raise

    # -- building ------------------------------------------------------------------------------------------------

    def _check_suits(self) -> None:
        """Raises ArchitectureError where a plugin has no place on the model; nothing was touched then."""
        for member in self.members:
            if type(member.plugin).suits is Plugin.suits:
                continue
            try:
                member.plugin.suits(self.view(member.id))
            except Exception as error:
                blame(error, member, "suits")
                raise

    def inject(self, ids: Iterable[str] | None = None, *, restoring: bool = False) -> None:
        """Run the `inject` hooks (all, or of these ids) that have not run yet."""
        for member in self._implementers("inject", ids):
            if member.id in self.injected or member.id in self.folded:
                continue
            # Of a bundle the tensors follow, so no first values are made; what a plugin draws is drawn again.
            with _seeded(self.seed, member.id), no_init_weights() if restoring else nullcontext():
                try:
                    self._call(member, "inject", model=self.view(member.id, restoring=restoring), stack=self)
                except BaseException:  # Ctrl-C too: half of a plugin is worse than none
                    self.ledger.remove(member.id)
                    raise
            self.injected.add(member.id)
            self._train_head(member, restoring=restoring)
        if restoring:
            return
        self._set_trainable()  # of a bundle, after its tensors are in place
        if all(m.id in self.injected | self.folded for m in self._implementers("inject")):
            self._check_members()

    def _check_members(self) -> None:
        """Everything stands on the model: what cannot work together is said now, before anything is paid for."""
        for index, member in enumerate(self.members):
            if member.claims(Claim.FOLDS_PREVIOUS) and member.id not in self.compressed:
                for other in self.members[:index]:
                    self._check_folds(other, member)
            if type(member.plugin).check is not Plugin.check:
                try:
                    member.plugin.check(self)
                except Exception as error:
                    blame(error, member, "check")
                    raise

    def _check_folds(self, other: Member, member: Member) -> None:
        for part in self.ledger.of(other.id, DeltaPart):
            linear = issubclass(base_class(part.place), nn.Linear | Conv1D)
            if linear and not part.module.can_fold():  # type: ignore[operator]
                raise ConflictError(
                    f"'{member.id}' starts from merged weights, and '{other.id}' does not fold into {part.path}",
                    hint=f"leave that layer to one of them, or put '{member.id}' first if it allows that",
                )

    def _train_head(self, member: Member, *, restoring: bool) -> None:
        """Let the head of a sequence classifier train with the first plugin that adapts it: a new task has a head that
        nobody trained yet, and an adapter below it would learn for random numbers."""
        if objective_of(self.model) != "class" or any(m.claims(Claim.CLASSIFIES) for m in self.members):
            return
        heads = [site for site in self.anatomy.sites if site.role.partition(".")[0] == "classifier"]
        standing = {part.module for part in self.ledger.all(BasePart)}
        standing |= {part.place for part in self.ledger.all(DeltaPart)}
        if self.ledger.of(member.id) and not any(site.module in standing for site in heads):
            view = self.view(member.id, restoring=restoring)
            for site in heads:
                view.bound(site).train()

    def _set_trainable(self) -> None:
        for id, plugin in self.plugins.items():
            rests = id in self._frozen or id in self.folded
            finished = {builtins.id(parameter) for parameter in plugin.finished()}
            for parameter in self.ledger.parameters(id):
                if parameter.is_floating_point():
                    parameter.requires_grad_(not rests and builtins.id(parameter) not in finished)

    def freeze(self, *ids: str) -> None:
        """Stop training these plugins' parameters (all without arguments); they stay in effect."""
        self._frozen |= {self.member(id).id for id in ids} or set(self.plugins)
        self._set_trainable()

    def unfreeze(self, *ids: str) -> None:
        self._frozen -= {self.member(id).id for id in ids} or set(self.plugins)
        self._set_trainable()

    def remove(self, id: str) -> None:
        """Take a plugin away; the base's own tensors come back, bit for bit.

        Raises:
            MergeError: it was folded into the weights for good, or something else is folded into those that it trained.
            ConflictError: another plugin stands on layers that this one replaced. Nothing is changed then.
        """
        member = self.member(id)
        self.ledger.remove(id)
        if id in self.folded:
            raise MergeError(f"'{id}' was folded into the weights for good", hint="load the base model again")
        self.members = [m for m in self.members if m is not member]
        del self.plugins[id]
        self._manager.unregister(member.plugin)
        self.injected.discard(id)
        self.compressed.discard(id)
        self.disabled_ids.discard(id)
        self.anatomy = Anatomy(self.model)
        if not self.plugins:
            release(self.model)

    @contextmanager
    def disabled(self, *ids: str) -> Iterator[None]:
        """Run with these plugins switched off (all without arguments); those that were off already stay off."""
        chosen = [self.member(id).id for id in ids] or list(self.plugins)
        done: list[str] = []
        try:
            for id in chosen:
                if id not in self.disabled_ids:
                    self.ledger.switch(id, False)
                    self.disabled_ids.add(id)
                    done.append(id)
            yield
        finally:
            for id in done:
                if id in self.disabled_ids:  # else it was removed meanwhile
                    self.ledger.switch(id, True)
                    self.disabled_ids.discard(id)

    # -- weights -------------------------------------------------------------------------------------------------

    def merge(self, *ids: str, keep: bool = True) -> None:
        """Fold deltas into the weights (of all mergeable plugins without arguments).

        Args:
            keep: keep the untouched weights too, so that `unmerge` is bit-exact in every dtype; with False the plugin
                is folded for good.

        Raises:
            MergeError: a plugin whose effect does not fold, or a quantized base; nothing is changed then.
        """
        wanted = {self.member(id).id for id in ids}
        chosen = [
            m.id for m in self.members if (m.id in wanted if ids else Claim.MERGEABLE in m.plugin.claims)
        ]
        for name in chosen:
            if Claim.MERGEABLE not in self.plugins[name].claims:
                kind = type(self.plugins[name]).__name__
                raise MergeError(f"'{name}' cannot be merged: {kind} does not fold into the weights")
        from peftx.slots import merge, snapshot, unmerge

        for name in chosen:
            self.ledger.check_fold(name)
        places = self.ledger.carriers(chosen)
        if keep:
            restores = [snapshot(place) for place in places]
            try:
                for place in places:
                    merge(place, set(chosen))
            except BaseException:
                for restore in restores:
                    restore()
                raise
            return
        for place in places:  # what one place refuses is refused before any is changed
            restore = snapshot(place)
            try:
                unmerge(place)
                merge(place, set(chosen))
            finally:
                restore()
        for name in chosen:
            self.ledger.fold(name)
            self.folded.add(name)
        self._set_trainable()

    def unmerge(self) -> None:
        """Bring back the weights from before `merge`, the very same bits."""
        from peftx.slots import unmerge

        for part in self.ledger.all(DeltaPart):
            unmerge(part.place)

    def trainable_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def plugin_parameters(self, id: str) -> int:
        """How many numbers plugin `id` holds."""
        return sum(t.numel() for t in self.ledger.tensors(self.member(id).id).values())

    def base_parameters(self) -> int:
        """Numbers in the base model, each tied tensor once, quantized ones at their full count."""
        added = [part for part in self.ledger.parts if not isinstance(part, BasePart)]
        own = {id(tensor) for part in added for tensor in part.tensors().values()}
        count = sum(p.numel() for p in self.model.parameters() if id(p) not in own)
        replaced = (part.geometry for part in self.ledger.all(ReplacedPart))
        return count + sum(int(g["in_features"]) * int(g["out_features"]) for g in replaced)

    # -- data and training -------------------------------------------------------------------------------------

    def prepare(self, data: TrainingData, ids: Iterable[str] | None = None) -> TrainingData:
        """Run the `prepare_data` hooks over the data, in order."""
        for member in self._implementers("prepare_data", ids):
            self._call(member, "prepare_data", data=data, stack=self)
            if data.train is not None and len(data.train) == 0:
                raise DataError(
                    f"'{member.id}': no rows are left to train on", hint="it got none, or dropped them all"
                )
        return data

    def run_train_step(self, step: TrainStep) -> Tensor:
        """Run the `train_step` hooks on one micro-batch; returns the loss (0-d, detached)."""
        with self._blaming("train_step"):
            loss = self._caller("train_step")(step=step)
        if loss is None:
            raise PluginError("train_step: a wrapper returned nothing", hint="return what its `yield` gave")
        step.finish()
        return loss.detach()

    def train_step(
        self,
        batch: dict[str, Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        micro: int = 0,
        accumulation: int = 1,
        share: Share | None = None,
    ) -> Tensor:
        """One step of a loop of your own: gradients are left in `.grad`, or `optimizer` steps and clears them.

            parts = stack.shares(batches)  # of one optimizer step
            for i, (batch, share) in enumerate(zip(batches, parts)):
                stack.train_step(batch, optimizer=optimizer, micro=i, accumulation=len(batches), share=share)

        Args:
            batch: the model's keyword arguments, with labels.
            micro: which of the `accumulation` batches of one optimizer step this is, from 0; the optimizer steps after
                the last one.
            share: what part of the optimizer step this batch is, of `shares`; equal parts if left out, which is right
                where all batches have as many labels.

        Returns:
            The loss, 0-d, detached.
        """
        from peftx.training.step import TrainStep

        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else 0.0
        step = TrainStep(
            self, batch, index=self.trained_steps, micro=micro, accumulation=accumulation, learning_rate=rate,
            share=share,
        )  # fmt: skip
        loss = self.run_train_step(step)
        if optimizer is not None and step.last_micro:
            optimizer.step()
            optimizer.zero_grad()
            self.trained_steps += 1
        return loss

    def shares(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """What part of one optimizer step each of its micro-batches is, for `train_step`."""
        from peftx.training.shares import shares

        return shares(self.model, batches)

    def train(
        self,
        data: str | Path | Sequence[dict[str, Any]] | TrainingData,
        *,
        output: str | Path | None = None,
        resume: bool | str | Path = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> TrainingReport:
        """Train what the plugins declared.

        Args:
            data: a file, rows, or prepared `TrainingData`.
            output: folder for checkpoints. resume: from the last checkpoint in `output`, or from this one.
            progress: called with (steps done, steps planned, loss terms).
            options: fields of the spec's `train:` section: steps, batch_size, learning_rate, ...

        Raises:
            DataError: bad data. PeftxError: an unknown option, or nothing to train.
        """
        from peftx.training.run import train

        return train(self, data, output=output, resume=resume, progress=progress, options=options)

    # -- compression ---------------------------------------------------------------------------------------------

    def compress(
        self,
        data: str | Path | Sequence[str] | None = None,
        ids: Iterable[str] | None = None,
        *,
        samples: int = CALIBRATION_SAMPLES,
        length: int = CALIBRATION_LENGTH,
        keep: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Run the `compress` hooks (all, or of these ids) that have not run yet.

        Args:
            data: calibration text: a file, or texts; needed where a plugin claims `needs-calibration`.
            samples, length: at most so many sequences of so many tokens.
            keep: keep the layers that are replaced, so that `remove` brings them back; with False their memory is free.
            progress: called by plugins that go through the model block by block, with (blocks done, blocks).

        Raises:
            MergeError: a plugin starts from merged weights, and another one does not fold.
            PluginError: a hook failed. Its plugin has changed nothing then, nor is anything folded for it.
        """
        from peftx.compression.batches import calibration

        todo = [m for m in self._implementers("compress", ids) if m.id not in self.compressed]
        if not todo:
            raise PeftxError("no plugin of this stack compresses", hint="add one, for example prefixquant")
        room = free_positions(self.model)
        batches = calibration(
            self, data, samples=samples, length=min(length, room or length), progress=progress
        )
        for member in todo:
            if member.claims(Claim.NEEDS_CALIBRATION) and not batches.batches:
                raise PeftxError(
                    f"'{member.id}' needs calibration data", hint='stack.compress("calibration.txt")'
                )
            if member.claims(Claim.QUANTIZES):
                self._check_bare(member)
            restore, folded, state = (
                self.ledger.snapshot(),
                set(self.folded),
                copy.deepcopy(member.plugin.state),
            )
            try:
                if member.claims(Claim.FOLDS_PREVIOUS):
                    self._fold_before(member)
                with torch.no_grad(), _seeded(self.seed, member.id):
                    self.model.eval()
                    self._call(
                        member, "compress", model=self.view(member.id), calibration=batches, stack=self
                    )  # fmt: skip
            except BaseException:
                restore()
                self.folded, member.plugin.state = folded, state
                self.anatomy = Anatomy(self.model)
                self._set_trainable()
                raise
            if not keep:
                self.ledger.release(member.id)
            self.compressed.add(member.id)
            self.anatomy = Anatomy(self.model)
        self._set_trainable()

    def _check_bare(self, member: Member) -> None:
        """Raises ConflictError where a plugin that comes later stands already on layers that this one may replace."""
        for other in self.members[self.members.index(member) + 1 :]:
            standing = self.ledger.of(other.id, DeltaPart)
            if any(issubclass(base_class(part.place), nn.Linear | Conv1D) for part in standing):
                raise ConflictError(
                    f"'{other.id}' comes after '{member.id}' and stands already on layers that it replaces",
                    hint=f"Stack(..., inject=False), then compress(data, ['{member.id}']), then inject()",
                )

    def _fold_before(self, member: Member) -> None:
        for other in self.members[: self.members.index(member)]:
            if Claim.MERGEABLE in other.plugin.claims and self.ledger.of(other.id):
                self.merge(other.id, keep=False)

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
        from peftx.decoding.text import generate

        texts, _ = generate(
            self, [prompt] if isinstance(prompt, str) else list(prompt), max_new_tokens, seed, options
        )
        return texts[0] if isinstance(prompt, str) else texts

    def decode(self, request: Generation) -> Tensor:
        """Run one request through the `decode` hooks; ends in `model.generate` unless a plugin replaces the loop."""
        with torch.no_grad(), self._blaming("decode"):
            ids = self._caller("decode")(request=request)
        if ids is None:
            raise PluginError("decode: a wrapper returned nothing", hint="return what its `yield` gave")
        return ids

    def serve(self, server: Server) -> None:
        """Run the `serve` hooks on a server that is about to start; see `peftx.serving`."""
        for member in self._implementers("serve"):
            self._call(member, "serve", server=server)

    def classify(self, texts: str | Sequence[str]) -> Any:
        """The class of one text (or several) by the head of the plugin that claims `classifies`.

        Returns:
            A label, or a list of labels for a list of texts.

        Raises:
            PeftxError: no plugin of the stack has a head; `evaluate(metrics=["accuracy"])` compares likelihoods then.
        """
        from peftx.evaluation.classification import classify, head_of

        head = head_of(self)
        if head is None:
            raise PeftxError("no plugin of this stack classifies", hint="add one, for example sk-tuning")
        labels, scores = classify(self, head, [texts] if isinstance(texts, str) else list(texts))
        named = [labels[index] for index in scores.argmax(-1).tolist()]
        return named[0] if isinstance(texts, str) else named

    def evaluate(
        self, data: Any = None, *, metrics: Sequence[str] = ("perplexity",), **options: Any
    ) -> dict[str, Score]:
        """Measure; see `peftx.evaluation.run`.

        Args:
            data: a file, texts or rows. metrics: `perplexity`, `accuracy`, `exact-match`, or ids of plugins.
        """
        from peftx.evaluation.run import evaluate

        return evaluate(self, data, metrics=metrics, options=options)

    # -- saving --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a bundle: everything that `peftx.load` needs to rebuild this stack bit for bit."""
        from peftx.bundle import save

        return save(self, Path(path))

    def export(self, path: str | Path) -> Path:
        """Write a plain `transformers` checkpoint of the merged model, for vLLM, lm-eval and `from_pretrained`.

        Raises:
            MergeError: a plugin whose effect does not fold into the weights.
        """
        from peftx.bundle import export

        return export(self, Path(path))

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        """Its parts know the model that they stand on, so a copy would change the original."""
        raise PeftxError("a stack cannot be copied", hint="save it and load it, or copy stack.model alone")

    def __repr__(self) -> str:
        names = ", ".join(f"{id}={plugin!r}" for id, plugin in self.plugins.items())
        return f"Stack({self.base_id}, [{names}], trains {self.trainable_parameters():,})"


@contextmanager
def _seeded(seed: int, id: str) -> Iterator[None]:
    """Torch's global generators at a state of this plugin's own; as they were afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.manual_seed(_seed_of(seed, id))
        else:  # `torch.manual_seed` keeps a stack trace for a GPU that nobody uses
            torch.default_generator.manual_seed(_seed_of(seed, id))
        yield


def _seed_of(seed: int, id: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:8], "big") >> 1
