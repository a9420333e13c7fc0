"""The loss of a causal language model, a segment of tokens at a time: its logits, [B, T, V], are never there whole.

    L = 1/N sum over segments S, sum over t in S of -log softmax(head(h_t))[y_t]        N tokens have a label

The logits of a segment are freed when its sum is known, and are computed again in the backward pass, where their
gradient is freed before the next segment's. So the head runs twice, and what is held of logits is size * V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftx.errors import UnsupportedError
from peftx.kernel.call import IGNORE
from peftx.kernel.calls import takes
from peftx.kernel.positions import prompt_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What a model does to its logits behind its head, by the names that configs have for it."""


def segmented_loss(states: Tensor, labels: Tensor, head: nn.Module, size: int) -> Tensor:
    """The mean of -log p(y) over labelled tokens, 0-d in float32; not a number where there are none, as ever.

    Args:
        states: the last hidden states, [B, T, d]. labels: of the tokens themselves, [B, T], which the states in front
            of them predict; tokens of IGNORE have no loss, and no logits. head: [1, n, d] -> logits [1, n, V].
        size: tokens of a segment.
    """
    y = labels[:, 1:].to(states.device)
    h, y = states[:, :-1][y != IGNORE], y[y != IGNORE]  # [N, d], [N]

    def of_segment(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h[None])[0].float(), y, reduction="sum")

    sums = [
        checkpoint(of_segment, *part, use_reentrant=False)
        for part in zip(h.split(size), y.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / len(y)


def has_plain_loss(model: PreTrainedModel) -> bool:
    """Is a model's loss the cross entropy of the next token, by what its head says of the last states, and no more."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    behind = [getattr(config, name, None) for name in _AFTER_HEAD]
    return (
        head is not None
        and not model.config.is_encoder_decoder
        and model.loss_type in (None, "ForCausalLM")  # of a class without a name for it, as GPT-2's
        and all(value in (None, 1) for value in behind)
        and not getattr(config, "output_router_logits", False)  # the routers' loss is added
        and "logits_to_keep" in takes(model)
        and not prompt_length(model)
    )


def in_segments(
    model: PreTrainedModel, forward: Callable[..., Any], labels: Tensor, size: int
) -> tuple[Tensor, Any]:
    """The task's loss of a model with `has_plain_loss`, and what the model returned: logits of the last token alone.

    Args:
        forward: calls the model on the batch, with some arguments changed. labels: of the batch, [B, T].
        size: tokens of a segment.

    Raises:
        UnsupportedError: these are not what the head says of the last state, so a plugin changes logits or states.
    """
    seen: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _module, _args, found: seen.append(found[0]))
    try:
        outputs = forward(labels=None, logits_to_keep=1)
    finally:
        hook.remove()
    head, states = model.get_output_embeddings(), seen[-1]
    # with gradients, as the model computed them: adapters may go another way without
    if states.shape[:2] != labels.shape or not torch.equal(head(states[:, -1:]), outputs.logits):
        raise UnsupportedError(
            "the model's logits are not those of its head, so that its loss cannot be computed in segments",
            hint="no segments: the option of the plugin that asks for them",
        )
    return segmented_loss(states, labels, head, size), outputs
