"""Around the call of the whole model: what goes in, what came out, and what everything inside may know of it.

Standard hooks of `nn.Module`, so that `model(...)`, `generate`, Trainer and lm-eval all pass through. The edits are
children of the model, so that what they hold trains, moves and is saved with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.chain import Chain
from peftx.kernel.soft_rows import beside_soft_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHILD = "peftx_calls"
STATE = "_peftx_calls"


class CallEdit(nn.Module):
    """One plugin's view of each call of the model; define what the method needs."""

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        """Change the arguments, all of them by name."""
        return call

    def after(self, output: Any) -> None:
        """See the output; None where the call failed. What `before` noted is to be forgotten here."""


class Call:
    """The call that runs: what a delta or an edit anywhere inside may know of it.

    Taken once, in `inject`, as `model.call`; what it says is of the moment. Between calls, and where somebody calls a
    part of the model alone, it says nothing: `ids` and `real` are None then, and `batch` is empty. A call with
    gradients lasts until the next one begins, since layers that are recomputed for the backward pass ask again.

    Attributes:
        arguments: of the model's forward, by name, after all `before`s.
        batch: columns of the batch that the model itself does not take, by name; see `ModelView.column`.
    """

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.batch: dict[str, Tensor] = {}
        self._columns: dict[str, str] = {}
        """Names of columns, and whose they are."""
        self._given: Mapping[str, Tensor] = {}
        self._carried: dict[str, tuple[Tensor, int]] = {}
        self._rows = 0
        """In the cache when the call began: its layers grow one after another."""

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

    def rows(self, values: Tensor, like: Tensor, fill: float = 0) -> Tensor:
        """What belongs to the caller's tokens, [B, T, ...], as a layer sees it whose input is `like`, [B, T + P, ...]:
        with `fill` for the P soft tokens, which stand behind the pads in front."""
        real = self.real
        assert real is not None
        return beside_soft_tokens(values, real, like.shape[1] - values.shape[1], fill)

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
        cache = self.arguments.get("past_key_values")
        layer, rows = _layer(cache, name), self._rows
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
                _pass_over(cache, layer, x)
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
        whole = self.arguments, self.batch
        self.arguments = _of_rows(self.arguments, kept)
        self.batch = {name: column[kept] for name, column in self.batch.items()}
        try:
            yield
        finally:
            self.arguments, self.batch = whole

    # -- the core's side -----------------------------------------------------------------------------------------

    def declare(self, name: str, owner: str) -> None:
        """See `ModelView.column`."""
        if (other := self._columns.setdefault(name, owner)) != owner:
            raise PeftxError(
                f"'{owner}' and '{other}' both read a column '{name}'", hint="give one another name"
            )

    def withdraw(self, owner: str) -> None:
        self._columns = {name: by for name, by in self._columns.items() if by != owner}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that plugins read and the model does not take."""
        return tuple(self._columns)

    @contextmanager
    def giving(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, calls that bring no column of these names have these, [B, ...]."""
        if unknown := sorted(set(values) - set(self._columns)):
            raise PeftxError(
                f"no plugin reads a column '{unknown[0]}'",
                hint=f"columns: {', '.join(self.columns) or 'none'}",
            )
        before, self._given = self._given, {**self._given, **values}
        try:
            yield
        finally:
            self._given = before

    def begin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        own = {name: arguments.pop(name, None) for name in self._columns}
        self.arguments, self.batch, self._carried = arguments, {}, {}
        cache = arguments.get("past_key_values")
        self._rows = _length(cache) if isinstance(cache, Cache) else 0
        rows = self.shape[0] if self.shape is not None else None
        for name, value in own.items():
            found = value if value is not None else self._given.get(name)
            if found is not None:
                self.batch[name] = _repeated(found, rows, name)
        return arguments

    def end(self, output: Any) -> None:
        carried, self._carried = self._carried, {}
        if output is None or not torch.is_grad_enabled():
            self.arguments, self.batch = {}, {}
        if output is None or not carried:
            return
        values = output if isinstance(output, tuple) else output.values()
        for cache in (value for value in values if isinstance(value, Cache)):
            for name, (rows, fill) in carried.items():
                _keep(cache, name, rows, fill)


def _length(cache: Cache) -> int:
    return int(cache.get_seq_length())


def _layer(cache: Cache | None, name: str) -> DynamicLayer | None:
    layers = [] if cache is None else cache.layers
    return next((layer for layer in layers if vars(layer).get("peftx_carried") == name), None)


def _keep(cache: Cache, name: str, values: Tensor, fill: int) -> None:
    layer = _layer(cache, name)
    if layer is None:
        layer = DynamicLayer()
        layer.peftx_carried = name
        layer.is_compileable = True  # as the rest of a static cache: else its empty places were read
        cache.layers.append(layer)
    values = values[..., None] if values.ndim == 2 else values  # [B, T, k]
    others = _length(cache) - layer.get_seq_length() - values.shape[1]
    values = nn.functional.pad(values, (0, 0, others, 0), value=fill)[:, None]  # [B, 1, R, k]
    layer.update(values, values[..., :0])


def _pass_over(cache: Cache, layer: int, x: Tensor) -> None:
    """As many rows as x [B, T, d] has tokens for a layer that nobody reads; like those it has, if it has any."""
    known = cache.layers[layer] if layer < len(cache.layers) else None
    shape = [len(x), 1, x.shape[1], 1], [len(x), 1, x.shape[1], 0]
    if known is not None and known.keys is not None:  # of rows that left the batch, or a static cache
        for form, held in zip(shape, (known.keys, known.values), strict=True):
            form[1], form[3] = held.shape[1], held.shape[3]
    cache.update(x.new_zeros(shape[0]), x.new_zeros(shape[1]), layer)


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
        raise PeftxError(f"the column '{name}' has {len(values)} rows, and the batch {rows}")
    return values.repeat_interleave(rows // len(values), 0)


class _Calls(Chain[CallEdit]):
    """The edits of a model's calls, and the hooks that run them.

    Args:
        names: of the positional arguments of the model's forward.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__(CHILD)
        self.names = names
        self.call = Call()
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = self.call.begin({**dict(zip(self.names, args, strict=False)), **kwargs})
        for edit in self.active:
            arguments = edit.before(arguments)
        self.call.arguments = arguments
        return (), arguments

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for edit in self.active:
            edit.after(output)
        self.call.end(output)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _calls(model: PreTrainedModel) -> _Calls:
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is None:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        calls = model.__dict__[STATE] = _Calls(model, names)
    return calls


def call_of(model: PreTrainedModel) -> Call | None:
    """The context of a model's calls; None where no plugin looks at them."""
    calls: _Calls | None = model.__dict__.get(STATE)
    return None if calls is None else calls.call


def columns_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Columns that plugins on the model read, and it does not take."""
    call = call_of(model)
    return () if call is None else call.columns


def attach(model: PreTrainedModel, edit: CallEdit, *, owner: str, rank: int) -> Call:
    """Put the edit around the model's calls; the first in the stack sees the caller's arguments."""
    calls = _calls(model)
    calls.append(model, edit, owner, rank)
    return calls.call


def detach(model: PreTrainedModel, owner: str) -> None:
    """Take the owner's edits off the model's calls."""
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is None:
        return
    calls.call.withdraw(owner)
    if calls.drop(model, owner):
        calls.close()
        del model.__dict__[STATE]


def enable(model: PreTrainedModel, owner: str, enabled: bool) -> None:
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is not None:
        calls.switch(owner, enabled)
