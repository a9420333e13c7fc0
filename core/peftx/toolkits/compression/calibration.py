"""Run a model block by block on calibration data, so that a method sees, and may change, one block at a time.

    x_0 = what enters block 0;   on_block(i, block_i, x_i);   x_{i+1} = block_i(x_i), with block_i as changed

Only x_i of one i is kept. The other arguments of a block (masks, rotary embeddings) are taken
from the model itself: from its first block where all blocks are called alike, else from every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from peftx.errors import ArchitectureError, DataError, UnsupportedError
from peftx.kernel.modes import eval_mode

__all__ = ["BlockInputs", "Calibration", "walk_blocks"]


class _Reached(Exception):
    """Ends a forward pass at the first block; never leaves this file."""


@dataclass(frozen=True)
class _Call:
    """One call of a block: its arguments without the hidden states, which stand at `args[0]` or under `key`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None

    def filled(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.key is None:
            return (hidden, *self.args), dict(self.kwargs)
        return self.args, {**self.kwargs, self.key: hidden}


class BlockInputs:
    """What one block is called with, batch by batch.

    `for args, kwargs in inputs: block(*args, **kwargs)` calls it as the model does; `inputs.replay(block)` does so
    without gradients and yields the hidden states. Iterate as often as needed, until `advance`.
    """

    def __init__(self, *, calls: Sequence[_Call], store: dict[int, Tensor]) -> None:
        self._calls = calls
        self._store = store
        self._advanced = 0

    def __len__(self) -> int:
        return len(self._calls)

    def hidden(self, index: int) -> Tensor:
        """The hidden states [B, T, H] of batch `index`."""
        if index < self._advanced:
            raise UnsupportedError(f"the inputs of batch {index} are gone: the block was advanced")
        return self._store[index]

    def filled(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block is called with in batch `index`, with other hidden states [B, T, H]."""
        return self._calls[index].filled(hidden)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        for index in range(len(self)):
            yield self.filled(index, self.hidden(index))

    def replay(self, block: nn.Module) -> Iterator[Tensor]:
        """The block's output hidden states [B, T, H], batch by batch."""
        for args, kwargs in self:
            yield _output(block, args, kwargs)

    def advance(self, block: nn.Module) -> Iterator[Tensor]:
        """As `replay`, once, of a block that stays as it is from now on: each output takes its input's place as what
        the next block gets, and the walk runs this one no more."""
        while self._advanced < len(self):
            index = self._advanced
            output = _output(block, *self._calls[index].filled(self.hidden(index)))
            self._store[index] = output
            self._advanced += 1
            yield output


def _output(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return _hidden_of(block(*args, **kwargs), block)


def _hidden_of(output: Any, block: nn.Module) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise ArchitectureError(f"{type(block).__name__} returns {type(hidden).__name__}, not hidden states")
    return hidden


def _freed(value: Any) -> Any:
    """Detached; without the cache, which a second call would fill twice. An empty cache changes no output."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Cache):
        return None
    if isinstance(value, tuple):
        return tuple(_freed(item) for item in value)
    return value


def _take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    """Part the hidden states from the rest of a call."""
    free_args = tuple(_freed(value) for value in args)
    free_kwargs = {key: _freed(value) for key, value in kwargs.items() if key != "use_cache"}
    if free_args and isinstance(free_args[0], Tensor):
        return free_args[0], _Call(free_args[1:], free_kwargs, None)
    if not free_args and isinstance(free_kwargs.get("hidden_states"), Tensor):
        return free_kwargs.pop("hidden_states"), _Call((), free_kwargs, "hidden_states")
    raise ArchitectureError(
        f"{type(block).__name__} gets its hidden states neither first nor as hidden_states="
    )


def _same(one: Any, other: Any) -> bool:
    """Equal by value, through tuples; tensors by content."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return one is other or (
            both and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def _same_call(one: _Call, other: _Call) -> bool:
    return one.key == other.key and _same(one.args, other.args) and _same(one.kwargs, other.kwargs)


def _shared(call: _Call, known: list[_Call]) -> _Call:
    """An equal call that is kept already: masks and rotary tables repeat from batch to batch and block to block."""
    return next((other for other in reversed(known) if _same_call(call, other)), call)


def _first_call(model: nn.Module, block: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, _Call]:
    """Run the model up to its first block only."""
    taken: list[tuple[Tensor, _Call]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(_take(module, args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
    except _Reached:
        return taken[0]
    finally:
        handle.remove()
    raise ArchitectureError(f"the model never called its first block, {type(block).__name__}")


def _all_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batch: dict[str, Any]
) -> tuple[Tensor, list[_Call]]:
    """Run the whole model, note every block's call, and check that each gets what the one before it returned."""
    calls: list[_Call] = []
    state: dict[str, Tensor] = {}
    places = {id(block): index for index, block in enumerate(blocks)}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = places[id(module)]
        if index != len(calls):
            raise ArchitectureError(
                f"block {index} ran as number {len(calls)}: give the blocks in the order they run"
            )
        hidden, call = _take(module, args, kwargs)
        if index and not _same(hidden, state["output"]):
            raise ArchitectureError(
                f"block {index} does not get what block {index - 1} returned: something is between"
            )
        state.setdefault("first", hidden)
        calls.append(_shared(call, calls))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state["output"] = _hidden_of(output, module).detach()

    handles = []
    try:
        for block in blocks:
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(blocks):
        raise ArchitectureError(f"the model called {len(calls)} of its {len(blocks)} blocks")
    return state["first"], calls


def walk_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[dict[str, Any]],
    *,
    on_block: Callable[[int, nn.Module, BlockInputs], None],
) -> None:
    """Visit the blocks in order; each sees what the changed blocks before it make of the calibration data.

    The model runs in evaluation mode and without gradients; `on_block` runs in the caller's gradient mode. The first
    batch goes through the whole model once, to learn how the blocks are called and that they form a chain. The other
    batches stop at the first block, unless the blocks are called differently (sliding and full attention mixed).
    Arguments other than the hidden states are those of the unchanged model: a T5 block that changes its relative
    position table does not hand the new bias on.

    Args:
        blocks: the model's layers, in the order they run; `on_block` changes them in place.
        batches: keyword arguments of `model`.
        on_block: gets the block's number, the block, and its inputs (valid during the call only). One that changes
            nothing reads what it needs during `inputs.advance(block)`; each block then runs once a batch, not twice.

    Raises:
        ArchitectureError: the blocks are no chain, or are called in a way that is not understood.
        DataError: no batches.
    """
    if not blocks:
        raise UnsupportedError("no blocks to walk")
    if not batches:
        raise DataError("calibration needs at least one batch, got none")
    store: dict[int, Tensor] = {}
    with eval_mode(model):
        hidden, first = _all_calls(model, blocks, batches[0])
        store[0] = hidden
        uniform = all(call is first[0] for call in first)
        calls = [first]  # [batch][block]
        for index in range(1, len(batches)):
            if uniform:
                hidden, call = _first_call(model, blocks[0], batches[index])
                calls.append([_shared(call, [calls[-1][0]])] * len(blocks))
            else:
                hidden, others = _all_calls(model, blocks, batches[index])
                known = calls[-1]
                calls.append([_shared(call, known) for call in others])
            store[index] = hidden
        for number, block in enumerate(blocks):
            inputs = BlockInputs(calls=[of_batch[number] for of_batch in calls], store=store)
            on_block(number, block, inputs)
            if number + 1 < len(blocks):
                for _ in inputs.advance(block):
                    pass


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration data that `compress` hooks get.

    Args:
        batches: keyword arguments of the model, tokenized, on its device.
        progress: called in a walk after each block, with (blocks done, blocks of the model).
    """

    batches: list[dict[str, Any]] = field(default_factory=list)
    progress: Callable[[int, int], None] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens there are, padding counted in."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def require(self, least: int, *, by: str) -> None:
        """Raises DataError where there are fewer tokens than the plugin `by` needs (`Plugin.least_tokens`)."""
        if self.tokens < least:
            raise DataError(
                f"{by}: {self.tokens} tokens of calibration text are too few, it needs at least {least}",
                hint="more text (`data: {calibration: file}`), or a larger `samples` or `length`",
            )

    def walk(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        on_block: Callable[[int, nn.Module, BlockInputs], None],
    ) -> None:
        """`walk_blocks` over these batches."""

        def told(number: int, block: nn.Module, inputs: BlockInputs) -> None:
            on_block(number, block, inputs)
            if self.progress is not None:
                self.progress(number + 1, len(blocks))

        walk_blocks(model, blocks, self.batches, on_block=told)
