"""`save_pretrained` of a model that carries plugins: a plain checkpoint holds what it can, and says what it cannot.

It is called past every stack, by a Trainer's checkpoints for one, and `from_pretrained` reads its file without a word:
a quantized layer as random numbers, an adapter not at all.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peftx.errors import BundleError
from peftx.kernel.ledger import carried
from peftx.kernel.parts import Storage

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

NAME = "save_pretrained"


class GuardedSave:
    """Stands in the place of a model's method.

    Raises:
        BundleError: layers were replaced by packed ones, which no plain checkpoint can say.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.handles: list[RemovableHandle] = []
        """Of hooks that are there for as long as plugins are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packed = next((n for n, m in self.model.named_modules() if isinstance(m, Storage)), None)
        if packed is not None:
            raise BundleError(
                f"{packed} is packed, and a plain checkpoint would be read with random numbers in its place",
                hint="stack.save(folder), and peftx.load(folder)",
            )
        if lost := carried(self.model, trained=False):
            warnings.warn(
                f"from_pretrained will read this checkpoint without {', '.join(lost)}: stack.save(folder) keeps them, "
                "and stack.export(folder) folds in what folds",
                stacklevel=2,
            )
        return type(self.model).save_pretrained(self.model, *args, **kwargs)


def guard(model: PreTrainedModel) -> None:
    """Watch the model's `save_pretrained`."""
    model.__dict__[NAME] = GuardedSave(model)


def release(model: PreTrainedModel) -> None:
    """Give it back."""
    for handle in getattr(model.__dict__.pop(NAME, None), "handles", ()):
        handle.remove()
