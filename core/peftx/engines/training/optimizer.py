"""Optimizers whose arithmetic is float32 whatever the model's dtype is.

An update of 1e-5 of a value disappears in bfloat16 (8 bits of mantissa), and AdamW's epsilon of 1e-8 is zero in
float16. So parameters of these dtypes have a float32 copy here, which the gradients move and the parameter is rounded
from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

NARROW = (torch.float16, torch.bfloat16)


def optimizer_for(
    parameters: list[nn.Parameter],
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    own: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """AdamW, or SGD if `name` is `sgd`. `own`: learning rates of single parameters; the first group has all others."""
    narrow = any(p.dtype in NARROW for p in parameters)
    kinds: tuple[type[Optimizer], type[Optimizer]] = (SGD, WideSGD) if name == "sgd" else (AdamW, WideAdamW)
    groups: dict[float | None, list[nn.Parameter]] = {None: []}
    for p in parameters:
        groups.setdefault((own or {}).get(p), []).append(p)
    given = [{"params": those, "lr": rate or learning_rate} for rate, those in groups.items()]
    return kinds[narrow](given, lr=learning_rate, weight_decay=weight_decay)  # type: ignore[call-arg]


class _Wide:
    """Mixin before an optimizer: `step` sees float32 parameters and gradients."""

    param_groups: list[dict[str, Any]]
    state: dict[nn.Parameter, Any]
    wide: dict[nn.Parameter, Tensor]
    """Parameter -> its float32 values."""

    def __init__(self, parameters: Sequence[Any], **options: Any) -> None:
        self.wide = {}
        super().__init__(parameters, **options)  # type: ignore[call-arg]

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        moved = [(p, p.data, p.grad) for p in self._parameters() if p.grad is not None and p.dtype in NARROW]
        for p, narrow, gradient in moved:
            wide = self.wide.get(p)
            values = narrow.float()
            if wide is not None:  # but what somebody else wrote into the parameter counts
                values = torch.where(wide.to(narrow.dtype) == narrow, wide, values)
            p.grad = None
            p.data, p.grad = values, gradient.float()
        try:
            super().step()  # type: ignore[misc]
        finally:
            for p, narrow, gradient in moved:
                self.wide[p] = p.data
                narrow.copy_(p.data)
                p.grad = None
                p.data, p.grad = narrow, gradient

    def state_dict(self) -> dict[str, Any]:
        order = self._parameters()
        wide = {i: self.wide[p] for i, p in enumerate(order) if p in self.wide}
        return {**super().state_dict(), "wide": wide}  # type: ignore[misc]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        order = self._parameters()
        self.wide = {order[i]: tensor.to(order[i].device) for i, tensor in rest.pop("wide").items()}
        super().load_state_dict(rest)  # type: ignore[misc]
        # It cast the moments to the parameters' dtype.
        for i, saved in rest["state"].items():
            for name, value in saved.items():
                if isinstance(value, Tensor) and value.ndim:
                    self.state[order[i]][name] = value.to(order[i].device)


class WideAdamW(_Wide, AdamW):
    pass


class WideSGD(_Wide, SGD):
    pass
