"""Parameters of the base that a plugin trains, beside what they were: theta and theta_0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftx.errors import StackError
from peftx.kernel.parts import BasePart


@dataclass(frozen=True, eq=False)
class Trained:
    """One parameter of the base in its place."""

    part: BasePart
    name: str

    @property
    def theta(self) -> nn.Parameter:
        """What trains; read it anew, since a bundle that is loaded puts another one here."""
        return self.part.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def theta_0(self) -> Tensor:
        """The base's own, where theta is now, and as a cast of the model rounds it.

        Raises:
            PeftxError: the stack came out of a bundle that holds its base compressed, and so without it.
        """
        self._check_known()
        return self.start.to(self.theta)

    @property
    def start(self) -> Tensor:
        """The base's own tensor itself."""
        return self.part.original[self.name].detach()

    @torch.no_grad()
    def rewind(self) -> None:
        """theta_0 again."""
        self.theta.copy_(self.theta_0)

    def restrict(self, mask: Tensor | None) -> None:
        """Train these entries alone from the next update on: gradients of the others are zeroed, and what an optimizer
        does without gradients (a weight decay) leaves no trace on them. None: all.

        Args:
            mask: bool, as large as theta. It is not saved: what it follows from is the plugin's to keep.

        Raises:
            PeftxError: theta_0 is not there, which the other entries keep.
        """
        if mask is None:
            self.part.masks.pop(self.name, None)
        else:
            self._check_known()
            self.part.masks[self.name] = mask

    def _check_known(self) -> None:
        if self.start.is_meta:
            raise StackError(
                f"{self.part.owner}: this stack is from a bundle that holds its base compressed, and so without the "
                f"base's own {self.part.key}.{self.name}",
                hint="use the stack as it was before it was compressed",
            )
