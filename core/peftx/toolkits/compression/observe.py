"""What flows through chosen modules: largest magnitudes for calibrating scales, and the scale that fits them best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftx.errors import UnsupportedError
from peftx.toolkits.compression.packing import integer_range

__all__ = ["Stats", "entering", "mse_clip_scale", "observe", "observing"]

_CHUNK = 2**16  # values searched at a time: with their counts and errors they stay in the cache


@dataclass(eq=False)
class Stats:
    """Running extremes of one module's input (or output) [..., features], over every token seen.

    Padding counts as tokens: calibrate on batches without it, or with padding that looks like text.
    A module that never ran has `tokens == 0`, and reading an extreme raises.
    """

    name: str
    tokens: int = 0
    _low: Tensor | None = None  # [features] float32
    _high: Tensor | None = None
    _token_absmax: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in x [..., features]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.shape[0] == 0:
            return
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._token_absmax.append(rows.abs().amax(dim=-1).cpu())
        self.tokens += rows.shape[0]

    def _seen(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise UnsupportedError(
                f"{self.name!r} saw no tokens while it was observed: there is nothing to calibrate on"
            )
        return value

    @property
    def channel_min(self) -> Tensor:
        """[features] float32."""
        return self._seen(self._low)

    @property
    def channel_max(self) -> Tensor:
        """[features] float32."""
        return self._seen(self._high)

    @property
    def channel_absmax(self) -> Tensor:
        """[features] float32."""
        return torch.maximum(self.channel_max.abs(), self.channel_min.abs())

    @property
    def absmax(self) -> Tensor:
        """[] float32."""
        return self.channel_absmax.amax()

    @property
    def token_absmax(self) -> Tensor:
        """[tokens] float32 on CPU, in the order seen."""
        self._seen(self._low)
        return torch.cat(self._token_absmax)


def _only_tensor(value: Any, name: str, of: str) -> Tensor:
    """The hidden states among a module's inputs or outputs: the tensor itself or the first of a tuple."""
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, Tensor):
        raise UnsupportedError(
            f"the {of} of {name!r} is {type(first).__name__}, not a tensor: it cannot be observed"
        )
    return first


@contextmanager
def observing(
    modules: Mapping[str, nn.Module], *, of: Literal["input", "output"] = "input"
) -> Iterator[dict[str, Stats]]:
    """Collect `Stats` by name while the block runs. The hooks are gone afterwards, whatever happened."""
    stats = {name: Stats(name) for name in modules}
    handles = []

    def watch_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A module called with keywords only is observed at the first of them.
            stats[name].add(_only_tensor(args or tuple(kwargs.values()), name, of))

        return hook

    def watch_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            stats[name].add(_only_tensor(output, name, of))

        return hook

    try:
        for name, module in modules.items():
            if of == "input":
                handles.append(module.register_forward_pre_hook(watch_input(name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(watch_output(name)))
        yield stats
    finally:
        for handle in handles:
            handle.remove()


def observe(
    modules: Mapping[str, nn.Module], run: Callable[[], object], *, of: Literal["input", "output"] = "input"
) -> dict[str, Stats]:
    """Call `run()` once, without gradients, and return what went into (or came out of) each module."""
    with observing(modules, of=of) as stats, torch.no_grad():
        run()
    return stats


@contextmanager
def entering(modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], object]) -> Iterator[None]:
    """Inside, `see(module, x)` runs before each call of a module, with its first positional argument as it is.

    For what `Stats` do not hold: the rows themselves, or sums over them. The hooks are gone afterwards, whatever
    happened.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        see(module, args[0])  # nothing that `see` returns takes the input's place

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mse_clip_scale(
    x: Tensor, *, bits: int, grid: int = 100, counts: Tensor | None = None, per_row: bool = False
) -> Tensor:
    """The symmetric scale with the least squared rounding error, of `grid` clipping points c = max|x| * i / grid.

        s = c / (2^(b-1) - 1);   error(s) = sum_j n_j (x_j - s clamp(round(x_j / s)))^2

    Args:
        x: any shape, the values; or the bin centres of a histogram.
        counts: n, of a shape that broadcasts to that of x; 1 if left out.
        per_row: one scale for each row of the last dimension instead of one for all.

    Returns:
        [] float32, or x.shape[:-1] with `per_row`. 1 where all values are 0. Of equal errors the largest scale wins.
    """
    if grid < 1 or x.numel() == 0:
        raise UnsupportedError(f"grid={grid} and {x.numel()} values: both must be at least 1")
    values = x.detach().float()
    weights = torch.ones(()) if counts is None else counts.float()
    weights = weights.to(values.device).expand(values.shape)
    rows = values.flatten(0, -2) if per_row and x.dim() > 1 else values.reshape(1, -1)
    weights = weights.reshape(rows.shape)
    size = max(1, _CHUNK // rows.shape[-1])
    best = [
        _best_of_grid(r, w, bits=bits, grid=grid)
        for r, w in zip(rows.split(size), weights.split(size), strict=True)
    ]
    return torch.cat(best).reshape(x.shape[:-1] if per_row else ())


def _best_of_grid(x: Tensor, counts: Tensor, *, bits: int, grid: int) -> Tensor:
    """`mse_clip_scale` of each row [rows, n] -> [rows]."""
    low, high = integer_range(bits, symmetric=True)
    top = x.abs().amax(dim=-1, keepdim=True) / high  # [rows, 1]
    top = torch.where(top > 0, top, torch.ones_like(top))
    best_scale, best_error = top, torch.full_like(top, torch.inf)
    rest = torch.empty_like(x)
    for step in range(grid, 0, -1):
        scale = top * (step / grid)
        if step % 10 == 0 and step < grid:
            # What is clipped is lost in every smaller scale too: where that alone is no better, nothing is.
            torch.clamp(x, low * scale, high * scale, out=rest).sub_(x)
            if bool((_weighted(rest, counts) >= best_error).all()):
                break
        torch.div(x, scale, out=rest).round_().clamp_(low, high)
        error = _weighted(torch.addcmul(x, rest, scale, value=-1, out=rest), counts)
        better = error < best_error
        best_scale, best_error = (
            torch.where(better, scale, best_scale),
            torch.where(better, error, best_error),
        )
    return best_scale.squeeze(-1)


def _weighted(error: Tensor, counts: Tensor) -> Tensor:
    """sum_j n_j error_j^2 of each row, [rows, 1]; `error` is used up."""
    return error.square_().mul_(counts).sum(dim=-1, keepdim=True)
