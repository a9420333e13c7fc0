"""What a stack is: an ordered list of configured plugins on one plain `transformers` model."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from peftx.errors import ConflictError, MergeError, ModelError, PluginError, StackError, nearest
from peftx.history import History
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.calling import register
from peftx.kernel.calls import giving
from peftx.kernel.changes import Owner
from peftx.kernel.guard import guard, release
from peftx.kernel.identity import Identity
from peftx.kernel.ledger import Ledger, carried
from peftx.kernel.members import Member, Standing, blaming
from peftx.kernel.objective import objective_of
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.kernel.plugin import Claim, Plugin
from peftx.kernel.seeds import seeded
from peftx.kernel.slots import base_class, merge, snapshot, unmerge
from peftx.kernel.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx_spec import Pipeline


class Stack:
    """Plugins on one model: `peftx.Stack` without its verbs, as engines and toolkits take it.

    Args:
        model: the base. members: in the order of effect. tokenizer: the model's. seed: of the plugins' first values.
        inject: run the `inject` hooks now.
        base_id: where the base comes from. tokenizer_of_base: digest of the tokenizer that lies there, if one does.

    Raises:
        ConflictError: two plugins that cannot stand together, or not in this order; a model with another stack's
            plugins on it. Nothing is built then.
        PluginError: a plugin's hook failed; names the plugin and the hook.
    """

    specs: ClassVar[type]
    """The hooks' signatures."""
    defaults: ClassVar[type]
    """What runs inside all wrappers where no plugin replaces it."""

    def __init__(
        self,
        model: PreTrainedModel,
        members: Sequence[Member] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        inject: bool = True,
        base_id: str | None = None,
        tokenizer_of_base: str | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"a {type(model).__name__} is no transformers model",
                hint="Stack(AutoModelForCausalLM.from_pretrained(...), ...), or the name of a model",
            )
        if others := carried(model):
            raise ConflictError(
                f"the model carries {', '.join(others)} of another stack, which alone can train and save them",
                hint="one Stack with all plugins; or that stack.remove(id) first, or load the model anew",
            )
        self.members, base = list(members), dict(model.named_parameters())
        self.plugins: dict[str, Plugin] = {member.id: member.plugin for member in members}
        self.standing: dict[str, Standing] = {member.id: Standing() for member in members}
        """How far each plugin is, by id."""
        self._manager = register(members, self.specs, self.defaults())
        self.seed = seed
        self.base_id = base_id or model.config.name_or_path or type(model).__name__
        self.tokenizer_of_base = tokenizer_of_base
        self.model = model
        self.given_tokenizer, self.tokenizer_before = tokenizer, None
        """None where there is none; see `tokenizer`, and `HasTokenizer`."""
        self.anatomy = Anatomy(model)
        self.ledger = Ledger(model)
        self.identity = Identity.of(base)
        """Of the base as it was before any plugin changed it; None where it is on the meta device."""
        self.given_fingerprint: str | None = None
        """What a bundle that holds its base, compressed, tells of it."""
        self.trained_steps = 0
        self.memory: dict[str, Any] = {}
        """What plugins remember between the steps of a loop of your own."""
        self.companions: dict[str, PreTrainedModel] = {}
        """Second models, by where they come from; see `peftx.companion`."""
        self.update_is_due = False
        """Have the `train_step` hooks run since the optimizer's last step."""
        self.around_update: list[Any] = []
        """Handles of what is to run around the optimizer's next step."""
        self.pipeline: Pipeline | None = None
        """The spec that made this stack; its bundle repeats it."""
        self.scores: dict[str, Any] = {}
        """Name -> the last `Score` of it."""
        self.history = History()
        self._check_suits()
        if members:
            guard(model)
        trained = [parameter for parameter in base.values() if parameter.requires_grad]
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
        if self.given_tokenizer is None:
            raise StackError("this stack has no tokenizer", hint="Stack(model, plugins, tokenizer=...)")
        return self.given_tokenizer

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
        raise StackError(
            f"no plugin '{id}' in this stack",
            hint=nearest(id, self.plugins) or f"its plugins: {', '.join(self.plugins)}",
        )

    def id_of(self, plugin: Plugin) -> str:
        """Under which id a plugin object stands in this stack. Raises PeftxError where it does not."""
        for id, other in self.plugins.items():
            if other is plugin:
                return id
        raise StackError(f"this {type(plugin).__name__} does not stand in the stack")

    def view(self, id: str, *, restoring: bool = False) -> ModelView:
        """The model as plugin `id` may change it."""
        rank = [member.id for member in self.members].index(self.member(id).id)
        return ModelView(self.anatomy, self.ledger, Owner(id, rank, restoring), self)

    def implementers(self, hook: str, ids: Iterable[str] | None = None) -> list[Member]:
        """Members with this hook, in order; of these ids, if given."""
        wanted = None if ids is None else {self.member(id).id for id in ids}
        return [m for m in self.members if m.implements(hook) and (wanted is None or m.id in wanted)]

    def call(self, member: Member, hook: str, **arguments: Any) -> Any:
        """Run one plugin's plain hook; a failure names the plugin, the hook and the place in the spec."""
        function = getattr(member.plugin, hook)
        taken = {name: arguments[name] for name in inspect.signature(function).parameters}
        with blaming(member, hook):
            return function(**taken)

    def call_nested(self, hook: str, **arguments: Any) -> Any:
        """Run a hook whose implementations wrap each other, without the plugins that are switched off or not yet on the
        model, and a step without those that are in the weights.

        Raises:
            PluginError: one failed, or gave nothing.
        """
        left_out = [
            self.plugins[id]
            for id, at in self.standing.items()
            if at.disabled or (at.folded and hook == "train_step") or not self.stands(id)
        ]
        every = getattr(self._manager.hook, hook)
        found = (self._manager.subset_hook_caller(hook, left_out) if left_out else every)(**arguments)
        if found is None:
            raise PluginError(f"{hook}: a wrapper returned nothing", hint="return what its `yield` gave")
        return found

    def stands(self, id: str) -> bool:
        """Is a plugin that injects on the model; a base is measured before it is."""
        at = self.standing[id]
        return at.injected or at.folded or not self.member(id).implements("inject")

    # -- building ------------------------------------------------------------------------------------------------

    def _check_suits(self) -> None:
        """Raises ArchitectureError where a plugin has no place on the model; nothing was touched then."""
        for member in self.members:
            if type(member.plugin).suits is not Plugin.suits:
                with blaming(member, "suits"):
                    member.plugin.suits(self.view(member.id))

    def inject(self, ids: Iterable[str] | None = None, *, restoring: bool = False) -> None:
        """Run the `inject` hooks (all, or of these ids) that have not run yet."""
        for member in self.implementers("inject", ids):
            at = self.standing[member.id]
            if at.injected or at.folded:
                continue
            # Of a bundle the tensors follow, so no first values are made; what a plugin draws is drawn again.
            with seeded(self.seed, member.id), no_init_weights() if restoring else nullcontext():
                try:
                    self.call(member, "inject", model=self.view(member.id, restoring=restoring), stack=self)
                except BaseException:  # Ctrl-C too: half of a plugin is worse than none
                    self.ledger.remove(member.id)
                    raise
            at.injected = True
            self._train_head(member, restoring=restoring)
        if restoring:
            return
        self.settle()  # of a bundle, after its tensors are in place
        if all(self.stands(member.id) for member in self.implementers("inject")):
            self._check_members()

    def _check_members(self) -> None:
        """Everything stands on the model: what cannot work together is said now, before anything is paid for."""
        for index, member in enumerate(self.members):
            if member.claims(Claim.FOLDS_PREVIOUS) and not self.standing[member.id].compressed:
                for other in self.members[:index]:
                    self._check_folds(other, member)
            if type(member.plugin).check is not Plugin.check:
                with blaming(member, "check"):
                    member.plugin.check(self)

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

    def settle(self) -> None:
        """Let train what is to train now."""
        for id, plugin in self.plugins.items():
            at = self.standing[id]
            rests = at.frozen or at.folded
            # One that stands nowhere yet has nothing to be done with.
            finished = {builtins.id(p) for p in plugin.finished()} if at.injected and not rests else ()
            for parameter in self.ledger.parameters(id):
                if parameter.is_floating_point():
                    parameter.requires_grad_(not rests and builtins.id(parameter) not in finished)

    def freeze(self, *ids: str) -> None:
        """Stop training these plugins' parameters (all without arguments); they stay in effect."""
        for member in map(self.member, ids or self.plugins):
            self.standing[member.id].frozen = True
        self.settle()

    def unfreeze(self, *ids: str) -> None:
        for member in map(self.member, ids or self.plugins):
            self.standing[member.id].frozen = False
        self.settle()

    def rebuild(self, id: str, state: dict[str, Any]) -> None:
        """Put a plugin on the model anew, as one of this state stands there; its tensors are the caller's to fill."""
        self.ledger.remove(id)
        self.standing[id].injected = False
        self.plugins[id].state = state
        self.anatomy = Anatomy(self.model)
        self.inject([id], restoring=True)

    def remove(self, id: str) -> None:
        """Take a plugin away; the base's own tensors come back, bit for bit.

        Raises:
            MergeError: it was folded into the weights for good, or something else is folded into those that it trained.
            ConflictError: another plugin stands on layers that this one replaced. Nothing is changed then.
        """
        member = self.member(id)
        self.ledger.remove(id)
        if self.standing[id].folded:
            raise MergeError(f"'{id}' was folded into the weights for good", hint="load the base model again")
        self.members = [m for m in self.members if m is not member]
        del self.plugins[id], self.standing[id]
        self._manager.unregister(member.plugin)
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
                if not self.standing[id].disabled:
                    self.ledger.switch(id, False)
                    self.standing[id].disabled = True
                    done.append(id)
            yield
        finally:
            for id in done:
                if id in self.standing:  # else it was removed meanwhile
                    self.ledger.switch(id, True)
                    self.standing[id].disabled = False

    @contextmanager
    def columns(self, **values: Tensor) -> Iterator[None]:
        """Inside, every call of the model has these columns, [B, ...], for the plugins that read them: `generate`,
        `evaluate`, or a call of your own. `generate` repeats rows for beams.

        Raises:
            PeftxError: no plugin of the stack reads one of the name.
        """
        with giving(self.model, values):
            yield

    # -- weights -------------------------------------------------------------------------------------------------

    def merge(self, *ids: str, keep: bool = True) -> None:
        """See `peftx.Stack.merge`."""
        wanted = {self.member(id).id for id in ids}
        chosen = [
            m.id for m in self.members if (m.id in wanted if ids else Claim.MERGEABLE in m.plugin.claims)
        ]
        for name in chosen:
            if Claim.MERGEABLE not in self.plugins[name].claims:
                kind = type(self.plugins[name]).__name__
                raise MergeError(f"'{name}' cannot be merged: {kind} does not fold into the weights")
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
            self.ledger.hush(name)
            self.standing[name].folded = True
        self.settle()

    def unmerge(self) -> None:
        """Bring back the weights from before `merge`, the very same bits."""
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
        return self.ledger.base_parameters()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        """Its parts know the model that they stand on, so a copy would change the original."""
        raise StackError("a stack cannot be copied", hint="save it and load it, or copy stack.model alone")

    def __repr__(self) -> str:
        names = ", ".join(f"{id}={plugin!r}" for id, plugin in self.plugins.items())
        return f"Stack({self.base_id}, [{names}], trains {self.trainable_parameters():,})"
