"""What is known of the call of a model that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import StaticLayer

from peftx.errors import BatchError, ConflictError, UnsupportedError
from peftx.kernel.carried import carried_in, carry_on, has_rows, layers_of, pass_over, rows_of
from peftx.kernel.positions import place_of, prompt_length
from peftx.kernel.soft_rows import insert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

V = TypeVar("V")
IGNORE = -100
"""Label of a token without a loss, as PyTorch's cross entropy leaves it out."""


@dataclass
class _Said:
    """What is known of one call; see `Call`."""

    arguments: dict[str, Any]
    batch: dict[str, Tensor] = field(default_factory=dict)
    of_text: set[str] = field(default_factory=set)
    """Columns that are of the whole text, and not of the call's own tokens."""
    past: int | None = None
    in_cache: int = field(init=False)
    """Rows of the cache when the call began (attention adds to it while the call runs), if they are of the caller's
    tokens: those of a decoder behind an encoder are not."""
    goes_on: bool = field(init=False)
    """Was the cache filled by calls before this one."""
    made: dict[str, Any] = field(default_factory=dict)
    """What was worked out for it."""

    def __post_init__(self) -> None:
        self.take(self.arguments)

    def take(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.past = arguments, None
        cache = arguments.get("past_key_values")
        rows = rows_of(cache) if isinstance(cache, Cache) else 0
        self.in_cache, self.goes_on = 0 if isinstance(cache, EncoderDecoderCache) else rows, rows > 0


class Call:
    """The call that runs: what a delta or an edit anywhere inside may know of it.

    Taken once, in `inject`, as `model.call`; what it says is of the moment. Between calls, and where somebody calls a
    part of the model alone, it says nothing: `ids` and `real` are None then, and `batch` is empty. An encoder that is
    run alone, as `generate` does before the decoder's first token, is a call as well. In a backward pass it says again
    what it said in the last call with gradients, since layers that are recomputed ask again.

    Args:
        model: whose calls; none where there is nothing to be known of soft tokens.
    """

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self._model = model
        self._running: _Said | None = None
        self._kept: _Said | None = None
        """Of the last call with gradients."""
        self._columns: dict[str, str] = {}
        """Names of columns, and whose they are."""
        self._own_lengths: set[str] = set()
        self.given: Mapping[str, Tensor] = {}
        """Columns that calls have which bring none of the name, [B, ...]: see `giving`."""
        self._carried: dict[str, tuple[Tensor, int]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the model's forward, by name, after all `before`s."""
        return self._now.arguments

    @property
    def batch(self) -> dict[str, Tensor]:
        """Columns of the batch that the model itself does not take, by name; see `ModelView.column`."""
        return self._now.batch

    @property
    def _now(self) -> _Said:
        if self._running is not None:
            return self._running
        if self._kept is not None and torch._C._current_graph_task_id() != -1:  # inside a backward pass
            return self._kept
        return _Said({})

    @property
    def ids(self) -> Tensor | None:
        """Token ids of the caller's, [B, T]."""
        return self.arguments.get("input_ids")

    @property
    def shape(self) -> tuple[int, int] | None:
        """(B, T) of the caller's tokens."""
        given = self.ids if self.ids is not None else self.arguments.get("inputs_embeds")
        return None if given is None else (given.shape[0], given.shape[1])

    @property
    def real(self) -> Tensor | None:
        """Which of the caller's tokens are no pads, bool [B, T]; all, where the mask is of a layout of its own."""
        if self.shape is None:
            return None
        mask = self.arguments.get("attention_mask")
        given = self.ids if self.ids is not None else self.arguments["inputs_embeds"]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask[:, -self.shape[1] :].bool()
        return torch.ones(self.shape, dtype=torch.bool, device=given.device)

    @property
    def decoder_real(self) -> Tensor | None:
        """Of an encoder-decoder model: which of the decoder's tokens are no pads, bool [B, S], by their own mask, else
        by the labels; None where the call brings neither."""
        mask, labels = self.arguments.get("decoder_attention_mask"), self.arguments.get("labels")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.bool()
        return labels != IGNORE if isinstance(labels, Tensor) and labels.ndim == 2 else None

    @property
    def past(self) -> int:
        """Tokens of the caller's that were in the cache already."""
        said = self._now
        if said.past is None:
            soft = prompt_length(self._model) if said.in_cache and self._model is not None else 0
            said.past = said.in_cache - soft
        return said.past

    def rows(self, values: Tensor, like: Tensor, fill: float = 0) -> Tensor:
        """What belongs to the caller's tokens, [B, T, ...], as a layer sees it whose input is `like`, [B, T + P, ...]:
        with `fill` for the P soft tokens, wherever these stand."""
        return self._beside_soft(values, like.shape[1] - values.shape[1], fill)

    def tokens(self, name: str, fill: float = 0) -> Tensor | None:
        """Of a column with a value for each token, those of this call's tokens: [B, T]; None where there is no column.

        One that comes with the call has T. One of `stack.columns` is of the text that `generate` begins with, so a step
        gets `fill` for a token that was generated.

        Raises:
            PeftxError: it has another number of values.
        """
        column = self.batch.get(name)
        if column is None or self.shape is None:
            return None
        new = self.shape[1]
        if name in self._now.of_text:
            column = column[:, self.past :][:, :new]
            return nn.functional.pad(column, (0, new - column.shape[1]), value=fill)
        if column.ndim != 2 or column.shape[1] != new:
            raise BatchError(
                f"the column '{name}' has a value for {column.shape[-1]} tokens, and the call {new}"
            )
        return column

    def keys(self, values: Tensor, p: Tensor, fill: float = 0) -> Tensor:
        """What belongs to the tokens of the cache and of this call, as `carry` gives it, by the keys of an attention
        with the probabilities `p`, [B, H, Q, K]: [B, K]. Keys of no token have `fill`: those of soft tokens and of
        rows that plugins put in front, and the empty places of a static cache.

        Raises:
            UnsupportedError: a static cache and rows in front of it.
        """
        assert self.shape is not None
        values = self._beside_soft(values, p.shape[2] - self.shape[1], fill)
        before, behind = p.shape[3] - values.shape[1], 0
        if before < 0:  # of a sliding window
            return values[:, -before:]
        cache = self.arguments.get("past_key_values")
        if sizes := {layer.max_cache_len for layer in layers_of(cache) if isinstance(layer, StaticLayer)}:
            if p.shape[3] not in sizes:
                raise UnsupportedError(
                    f"which of {p.shape[3]} keys are tokens cannot be told of a static cache with rows in front of it",
                    hint="leave cache_implementation out",
                )
            before, behind = 0, before
        return nn.functional.pad(values, (before, behind), value=fill)

    def once(self, name: str, make: Callable[[], V]) -> V:
        """What `make` gives, worked out once in a call, however many layers ask; without gradients once for all calls
        that share a cache.

        Ask in `CallEdit.before` first where layers ask: what they make inside of checkpointing would be made again.

        Args:
            name: unique in the model. make: of nothing but what stays, as columns do, while a text goes on.
        """
        said, cache = self._now, self.arguments.get("past_key_values")
        if name not in said.made:
            kept: dict[str, tuple[int | None, V]] = {}
            if cache is not None and not torch.is_grad_enabled():
                kept = cache.__dict__.setdefault("peftx_kept", {})
            batch = None if self.shape is None else self.shape[0]
            if not said.goes_on or name not in kept or kept[name][0] != batch:
                kept[name] = batch, make()
            said.made[name] = kept[name][1]
        made: V = said.made[name]
        return made

    def carry(self, name: str, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the tokens of this call behind those of all calls before it whose keys and values are in the cache.

        They lie in the cache as one more layer, so what reorders, cuts or copies it (beams, drafts, shared prefixes)
        does the same to them.

        Args:
            name: unique in the model. values: [B, T] or [B, T, k]. fill: of rows of the cache that are no tokens of the
                caller's (soft tokens).

        Returns:
            [B, R + T] or [B, R + T, k], R rows in the cache.

        Raises:
            UnsupportedError: the cache was filled without these values.
        """
        cache, states = self.arguments.get("past_key_values"), self.arguments.get("cache_params")
        if states is not None and states.has_previous_state():
            raise UnsupportedError(
                f"{name}: mamba keeps states and no rows of a cache, and what goes with the tokens in them is not known"
            )
        layer, rows = carried_in(cache, name), self._now.in_cache
        known = 0 if layer is None else layer.get_seq_length()
        if known != rows:
            raise UnsupportedError(
                f"{name}: the cache holds {rows} rows, and what goes with them is known of {known}",
                hint="fill it by calls of the model with the plugin switched on",
            )
        self._carried[name] = (values, int(fill))
        if layer is None or not rows:
            return values
        past = layer.keys[:, 0]  # [B, R, k]
        return torch.cat((past[..., 0] if values.ndim == 2 else past, values), 1)

    def on_rows(
        self, kept: Tensor, layer: int, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Call an attention block, of a model with one tower, on some rows of the batch, as if it were not there for
        the others.

        Where no row is kept it does not run, and its layer of the cache grows by rows without content, one number a
        token, so that the cache has one length in all layers. Without a cache only the rows that are kept go through
        it, and what is inside sees a call of these alone; with one all do, since its rows grow together.

        Args:
            kept: bool [B]. layer: the block's, as the cache counts. inner, x, args, kwargs: of `Delta.around`.

        Returns:
            What the block returns: the output [B, T, d], zeros in the other rows, and what else it gives or None.
        """
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if bool(kept.all()):
            return tuple(inner(x, *args, **kwargs))
        if not bool(kept.any()):
            if cache is not None:
                pass_over(cache, layer, x)
            return torch.zeros_like(x), None
        if cache is not None:
            out, *rest = inner(x, *args, **kwargs)
            return torch.where(kept[:, None, None], out, 0), *rest
        with self._narrowed(kept):
            out, *_ = inner(*_of_rows((x, *args), kept), **_of_rows(kwargs, kept))
        rows = kept.nonzero()[:, 0]
        return out.new_zeros(x.shape).index_copy(0, rows, out), None

    @contextmanager
    def _narrowed(self, kept: Tensor) -> Iterator[None]:
        """Inside, the call is one of these rows alone."""
        before, self._running = self._running, copy(self._now)
        self._running.arguments, self._running.made = _of_rows(self.arguments, kept), {}
        self._running.batch = {name: column[kept] for name, column in self.batch.items()}
        try:
            yield
        finally:
            self._running = before

    # -- the core's side -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model knows of no call."""
        return self.__dict__ | {"_running": None, "_kept": None, "given": {}, "_carried": {}}

    def _beside_soft(self, values: Tensor, length: int, fill: float) -> Tensor:
        """[B, T, ...] with `fill` for soft tokens, where they stand."""
        if not length:
            return values
        return insert(values, values.new_full((len(values), length, *values.shape[2:]), fill), self._place())

    def _place(self) -> int | Tensor:
        """The column of the caller's tokens from which soft tokens stand."""
        assert self._model is not None
        return place_of(self._model, self.real)

    def declare(self, name: str, owner: str, *, own_length: bool = False) -> None:
        """See `ModelView.column`."""
        if own_length:
            self._own_lengths.add(name)
        if (other := self._columns.setdefault(name, owner)) != owner:
            raise ConflictError(
                f"'{owner}' and '{other}' both read a column '{name}'", hint="give one another name"
            )

    def withdraw(self, owner: str) -> None:
        self._columns = {name: by for name, by in self._columns.items() if by != owner}
        self._own_lengths &= set(self._columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that plugins read and the model does not take."""
        return tuple(self._columns)

    @property
    def own_lengths(self) -> frozenset[str]:
        """Those whose lists are as long as they like."""
        return frozenset(self._own_lengths)

    @contextmanager
    def giving(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, calls that bring no column of these names have these, [B, ...]."""
        if unknown := sorted(set(values) - set(self._columns)):
            raise BatchError(
                f"no plugin reads a column '{unknown[0]}'",
                hint=f"columns: {', '.join(self.columns) or 'none'}",
            )
        before, self.given = self.given, {**self.given, **values}
        try:
            yield
        finally:
            self.given = before

    def begin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        own = {name: arguments.pop(name, None) for name in self._columns}
        self._carried = {}  # what recomputed layers carried is of no call
        said = self._running = _Said(arguments)
        rows = self.shape[0] if self.shape is not None else None
        for name, value in own.items():
            found = value if value is not None else self.given.get(name)
            if value is None:
                said.of_text.add(name)
            if found is not None:
                said.batch[name] = _repeated(found, rows, name)
        return arguments

    def take(self, arguments: dict[str, Any]) -> None:
        """The edits made these of the arguments."""
        assert self._running is not None
        self._running.take(arguments)

    def end(self, output: Any) -> None:
        said, carried = self._running, self._carried
        assert said is not None
        at = self._place() if carried and not said.in_cache else 0  # where soft tokens came in
        self._running, self._carried = None, {}
        if output is not None and torch.is_grad_enabled():
            self._kept = said
        if output is None or not carried:
            return
        values = output if isinstance(output, tuple) else output.values()
        for cache in (value for value in values if isinstance(value, Cache) and has_rows(value)):
            for name, (rows, fill) in carried.items():
                carry_on(cache, name, rows, fill, at)


def _of_rows(value: Any, kept: Tensor) -> Any:
    """These rows of everything that has rows of the batch, through tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value[kept] if value.ndim > 1 and len(value) == len(kept) else value
    if isinstance(value, tuple):
        return tuple(_of_rows(item, kept) for item in value)
    if isinstance(value, dict):
        return {name: _of_rows(item, kept) for name, item in value.items()}
    return value


def _repeated(values: Tensor, rows: int | None, name: str) -> Tensor:
    """Of a batch that `generate` has expanded (beams), each row as often."""
    if rows is None or len(values) == rows:
        return values
    if len(values) == 0 or rows % len(values):
        raise BatchError(f"the column '{name}' has {len(values)} rows, and the batch {rows}")
    return values.repeat_interleave(rows // len(values), 0)
