"""What a plugin is: a plain object that holds a frozen configuration and says what it can do.

class Lora(Plugin):
    Config = LoraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model, stack): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

import pluggy
from pydantic import BaseModel, ConfigDict, ValidationError

from peftx.errors import PluginError, refused_options
from peftx.kernel.names import HOOKS, PROJECT
from peftx.kernel.phases import Phase

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftx.kernel.anatomy.site import Site
    from peftx.kernel.view import ModelView
    from peftx.peft_format import PeftFormat

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Claim(StrEnum):
    """Capabilities as data. The conformance kit proves each; conflicts and order rules are stated by claim."""

    IDENTITY_AT_START = "identity-at-start"
    """Right after `inject` the model computes exactly what it computed before."""
    MERGEABLE = "mergeable"
    """Every delta folds into the weights; merged and unmerged agree to the dtype's rounding."""
    NEEDS_CALIBRATION = "needs-calibration"
    """`compress` looks at calibration batches."""
    LOSSLESS_DECODING = "lossless-decoding"
    """`decode` returns, token for token, what greedy decoding returns."""
    EXACT_CACHE = "exact-cache"
    """Generation with the plugin's cache or attention equals generation without it."""
    REPLACES_STEP = "replaces-step"
    """A plain `train_step`: no backward pass runs, so nothing that needs gradients can stand beside it."""
    REPLACES_ATTENTION = "replaces-attention"
    """Computes attention itself; one plugin a model."""
    REPLACES_DECODING = "replaces-decoding"
    """A plain `decode`: one plugin a stack."""
    NEEDS_GRADIENTS = "needs-gradients"
    """Reads or edits gradients; cannot stand beside a step that makes none."""
    CLASSIFIES = "classifies"
    """Brings the head that names a text's class (`Plugin.classify`); one a stack."""
    QUANTIZES = "quantizes"
    """Replaces weights by integers: nothing folds into them afterwards."""
    FINAL = "final"
    """`compress` measures the finished model: nothing that changes it may come after."""
    FOLDS_PREVIOUS = "folds-previous"
    """`compress` starts from the merged weights: every delta before it must fold."""
    BESIDE_WEIGHTS = "beside-weights"
    """`inject` attaches nothing to a linear layer (soft tokens, attention, norms, block outputs)."""
    EDITS_INPUTS = "edits-inputs"
    """Its deltas edit what goes into layers (`Delta.pre`)."""
    COMPUTES_LAYERS = "computes-layers"
    """Computes linear layers itself, from their weights (`Delta.base`)."""
    PASSES_LAYERS = "passes-layers"
    """Computes some linear layers past their modules, so that nothing that stands on these sees a call."""
    WHOLE_CALLS = "whole-calls"
    """Works in calls of the whole model: its layers cannot be run one by one."""
    NEEDS_ADAPTERS = "needs-adapters"
    """Works on what the deltas of other plugins add to the output of layers."""
    TAKES_WEIGHTS = "takes-weights"
    """Prunes, splits, copies or trains the weights of linear layers: integers in the place of its own are refused."""
    NARROWS = "narrows"
    """`compress` leaves smaller layers: what may stand behind it, only a model tells."""
    WORKS_ON_PREVIOUS = "works-on-previous"
    """Works on parameters that the plugins before it attached."""
    VIRTUAL_TOKENS = "virtual-tokens"
    """Puts soft tokens in front of the input."""
    NEEDS_LABELS = "needs-labels"
    """Its step reads the batch's labels of tokens."""
    NO_LABELS = "no-labels"
    """The rows of its step have no labels of tokens: it trains on something else."""
    NEEDS_MASK = "needs-mask"
    """Tells real tokens from pads by the mask of a call or a batch, [rows, tokens]: a row is one text."""
    NEEDS_TOKENS = "needs-tokens"
    """Tells tokens by their ids, and refuses a call on embeddings."""
    TELLS_TOKENS = "tells-tokens"
    """Tells in an attention which key is which token (`model.call.keys`): none may be left out of a call."""
    GIVES_EMBEDDINGS = "gives-embeddings"
    """Calls the model on embeddings of its own, in the place of token ids."""
    REPLACES_LOSS = "replaces-loss"
    """Its step puts a loss of its own in the place of the task's (`step.replace_task_loss`); a head of classes does so
    anyway."""
    READS_LOSS = "reads-loss"
    """Its step evaluates the loss by itself, before plugins that stand after it have set theirs."""
    RESTARTS = "restarts"
    """Takes all that trains back to where the run began, as one of its phases ends."""
    NEW_ROWS = "new-rows"
    """Trains on rows of its own making, or of its own sources: further columns of the run's rows are not in them."""
    READS_COLUMNS = "reads-columns"
    """Works by further columns of the run's rows."""
    OWN_LAYOUT = "own-layout"
    """Lays several texts out in one row, with positions and a 4-D mask of its own."""
    PREFIX_CACHE = "prefix-cache"
    """Puts keys and values in front of the cache."""
    KEEPS_PREFIXES = "keeps-prefixes"
    """`serve` gives the scheduler a store of what prompts begin with: a server has one."""
    EVICTS = "evicts"
    """Leaves tokens out of the cache while a text is written: a prompt's rows are not all there to be shared or taken
    back."""
    CHANGES_VOCABULARY = "changes-vocabulary"
    """Adds rows to the embedding or the head."""
    TRAINS_BASE = "trains-base"
    """Trains parameters of the base model itself."""
    DATA_ONLY = "data-only"
    """Touches the data and nothing else."""


class PluginConfig(BaseModel):
    """Options of a plugin: frozen, no unknown keys, a description on every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)


class Plugin:
    """Base of all plugins. Subclasses are final: they set `Config` and `claims` and implement hooks.

    Args:
        config: a ready configuration; or leave it out and
        options: name the fields of `Config`, as in `Lora(rank=8)`.

    Raises:
        PluginError: an option that `Config` does not have, or a value that it refuses.
    """

    Config: ClassVar[type[PluginConfig]] = PluginConfig
    claims: ClassVar[frozenset[Claim] | set[Claim]] = frozenset()
    architectures: ClassVar[tuple[str, ...]] = ()
    """Extra architectures (`model_type`s) whose conformance tests this plugin passes, beside the kit's own five."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Options with which the plugin runs on a model of width 32, where the defaults do not: required ones, sizes."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Architectures of the kit that the method has no place on, and why: the plugin says so before anything runs."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Checks of the kit (or `arch-check`) that the method cannot pass by its nature, and why. Strict: none may pass."""
    example_rows: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Rows to try it on, where those that its format has anyway do not do (further columns)."""
    sources: ClassVar[Mapping[str, Sequence[Mapping[str, Any]]]] = {}
    """Further sources of rows that its step asks for (`step.batch_of`), and rows of each to try it on. A run without
    them is refused before its first step."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Formats of the rows that the plugin trains on (`peftx.engines.data.FORMATS`); any if empty."""
    gives: ClassVar[Mapping[str, str]] = {}
    """What `prepare_data` makes of the rows, where it is another format: taken -> left behind."""
    least_tokens: ClassVar[int] = 32
    """Of calibration text, where `compress` needs some: it is refused with less, which is a sentence and no sample of a
    language."""
    labels_option: ClassVar[str] = ""
    """The option that names the classes, where there is one: rows of other labels are refused before a run begins. An
    option that is None names none."""

    peft: ClassVar[Sequence[PeftFormat]] = ()
    """How HF PEFT writes the method, where it has it: its adapters are read and written by that."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.claims = frozenset(cls.claims) | _follow(cls)

    def __init__(self, config: PluginConfig | None = None, /, **options: Any) -> None:
        if config is None:
            config = self._configured(options)
        elif options:
            raise PluginError(f"{type(self).__name__} takes a config or options, not both")
        elif not isinstance(config, self.Config):
            raise PluginError(
                f"{type(self).__name__} takes {self.Config.__name__}, not {type(config).__name__}"
            )
        self.config = config
        self.claims = self.claimed()  # type: ignore[misc]  # of this one
        self.state: dict[str, Any] = {}
        """Small JSON values that a bundle must bring back before `inject` or `restore` runs."""

    def claimed(self) -> frozenset[Claim] | set[Claim]:
        """What this one claims, for those whose options change that; asked as soon as these are known."""
        return self.claims

    @classmethod
    def _configured(cls, options: dict[str, Any]) -> PluginConfig:
        try:
            return cls.Config(**options)
        except ValidationError as error:
            fields = ", ".join(cls.Config.model_fields) or "none"
            said = refused_options(error, cls.Config.model_fields)
            raise PluginError(f"{cls.__name__}: {said}", hint=f"its options are: {fields}") from error

    def restore(self, model: ModelView, stack: Any) -> None:
        """Put back what `compress` attached (not what it replaced: the bundle rebuilds that), without data.

        Called instead of `compress` when a bundle is loaded; tensors are filled in afterwards.
        """

    def suits(self, model: ModelView) -> None:
        """Refuse a model on which the method has no place. Asked of every plugin of a stack before anything runs, on
        the meta device too (`peftx plan`). What `inject` refuses by itself need not be said here.

        Raises:
            ArchitectureError: names the model, and what does.
        """

    def check(self, stack: Any) -> None:
        """Refuse a stack in which the method cannot work, once all of its plugins stand on the model and before
        anything is trained; on the meta device too. What claims say already need not be said here.

        Raises:
            ConflictError, ArchitectureError: name what stands in the way, and what does.
        """

    def phases(self) -> Sequence[Phase]:
        """The phases of a training run, in order; `step.phase(self)` says which one it is, `peftx plan` how long each
        takes. Asked when a run begins."""
        return ()

    def one_process(self) -> str:
        """Why several processes, each with rows of its own, would not train one model with these options; empty where
        they do. A run on several is refused by it before anything is loaded."""
        return ""

    def finished(self) -> Iterable[nn.Parameter]:
        """Parameters of the plugin that train no more: what it chose against, or is done with. Asked whenever it is
        settled what trains, also in a stack that comes out of a bundle or goes on from a checkpoint."""
        return ()

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        """What `compress` would replace, and the bytes it would take then; for `peftx plan`, on the meta device."""
        return ()

    def seconds(self, model: ModelView, tokens: int) -> tuple[float, float]:
        """About what `compress` takes on one CPU core for so many tokens of text: least, and most; for `peftx plan`, on
        the meta device. (0, 0): not worth a word."""
        return 0.0, 0.0

    def classify(self, stack: Any, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        """Scores of the classes by the plugin's own head; of plugins that claim `CLASSIFIES`.

        Returns:
            (labels, scores [N, C]); the class of the highest score is the answer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not classify")

    def embed(self, stack: Any, texts: Sequence[str], *, size: int = 32) -> Tensor:
        """Texts as vectors of length 1, in the plugin's own way: where a class defines it, `stack.embed` without a
        `pool` and `/v1/embeddings` give these.

        Args:
            size: texts in a forward pass.

        Returns:
            [N, d] float32.
        """
        raise NotImplementedError(f"{type(self).__name__} has no vectors of its own")

    def __repr__(self) -> str:
        changed = {
            name: getattr(self.config, name)
            for name in type(self.config).model_fields
            if name in self.config.model_fields_set
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


def _follow(cls: type[Plugin]) -> set[Claim]:
    """Claims that follow from what a class defines, so that no author has to say them."""
    found = {Claim.CLASSIFIES} if cls.classify is not Plugin.classify else set()
    for hook, claim in (("train_step", Claim.REPLACES_STEP), ("decode", Claim.REPLACES_DECODING)):
        options = getattr(getattr(cls, hook, None), f"{PROJECT}_impl", None)
        if options is not None and not options["wrapper"]:
            found.add(claim)
    if hooks_of(cls) == {"prepare_data"}:
        found.add(Claim.DATA_ONLY)
    return found


def hooks_of(plugin: type | object) -> frozenset[str]:
    """Names of the hooks that a plugin class (or instance) implements."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    marker = f"{PROJECT}_impl"  # what `hookimpl` leaves on a function
    return frozenset(name for name in HOOKS if getattr(getattr(cls, name, None), marker, None) is not None)


def compresses_own(plugin: type[Plugin] | Plugin) -> bool:
    """Does `compress` make smaller layers of what its own `inject` attached and a run trained: it comes behind the
    training then, wherever the plugin stands, unless a spec says otherwise."""
    return Claim.NARROWS in plugin.claims and {"inject", "compress"} <= hooks_of(plugin)
