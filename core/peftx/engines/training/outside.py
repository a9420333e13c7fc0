"""What loops of other libraries ask of a model: what one with plugins on it cannot give, and what a plugin can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from peftx.errors import ConflictError
from peftx.kernel.guard import NAME, GuardedSave
from peftx.kernel.positions import prompt_length
from peftx.kernel.slots import slot_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


@runtime_checkable
class UnderLoss(Protocol):
    """A plugin with a loss of its own whose method serves that of some trainers too: there the trainer's counts."""

    def front(self, kind: type[Trainer]) -> type | None:
        """A class that stands in front of a trainer's, with `stack` in it; None: the plugin does not serve its loss.

        Raises:
            ConflictError: the plugin has options of the loss that it leaves to the trainer.
        """


def watch_calls(model: PreTrainedModel) -> None:
    """Stop a call that would pass a plugin by without a word, whoever makes it, for as long as plugins are there."""
    if isinstance(guard := vars(model).get(NAME), GuardedSave):
        guard.handles.append(model.register_forward_pre_hook(_check, with_kwargs=True))


def _check(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("fused_lm_head"):
        refuse_fused_head(model)
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if isinstance(positions, Tensor) and positions.shape[-1] > 1 and prompt_length(model):
        _refuse_packed(positions, mask)


def refuse_fused_head(model: PreTrainedModel) -> None:
    """Raises ConflictError where a plugin stands on the head: TRL's losses take its weight, and do not call it."""
    head = model.get_output_embeddings()
    slot = None if head is None else slot_of(head)
    if slot is not None and slot.links:
        raise ConflictError(
            f"the trainer multiplies by the weight of the head, past '{slot.links[0].owner}', which stands on it",
            hint="leave the head out of its targets ('all !head'), or stack.train(rows)",
        )


def _refuse_packed(positions: Tensor, mask: Tensor | None) -> None:
    """Raises ConflictError where positions begin again within a row: soft tokens stand before its first text alone."""
    if mask is not None and mask.ndim != 2:
        return  # a tree of drafts, or another layout whose mask says what is seen
    again = positions[..., 1:] < positions[..., :-1]
    if mask is not None and mask.shape == positions.shape:
        again = again & mask[..., :-1].bool()  # pads on the left may have any
    if bool(again.any()):
        raise ConflictError(
            "several texts stand in one row, and soft tokens before the first of them alone",
            hint="packing=False and padding_free=False",
        )
