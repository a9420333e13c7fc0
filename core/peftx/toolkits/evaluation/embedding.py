"""Texts as vectors: pooled last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from peftx.engines.data import batches_of, class_rows
from peftx.errors import ConflictError, DataError
from peftx.kernel.heads import Pool, last_of, mean_of
from peftx.kernel.modes import evaluating
from peftx.kernel.objective import pad_of
from peftx.kernel.plugin import Plugin
from peftx.kernel.stack import Stack
from peftx.toolkits.evaluation.likelihood import context_window


def _of_its_own(stack: Stack) -> Plugin | None:
    """The plugin that has vectors of its own, if one stands and is switched on.

    Raises:
        ConflictError: two have.
    """
    standing = [
        m for m in stack.members if stack.standing[m.id].injected and not stack.standing[m.id].disabled
    ]
    found = [m for m in standing if type(m.plugin).embed is not Plugin.embed]
    if len(found) > 1:
        raise ConflictError(
            f"'{found[0].id}' and '{found[1].id}' both have vectors of their own",
            hint="the plugin's own `embed(stack, texts)`, or a `pool`",
        )
    return found[0].plugin if found else None


def embed(stack: Stack, texts: Sequence[str], *, pool: Pool | None = None, size: int = 32) -> Tensor:
    """See `peftx.Stack.embed`."""
    if not texts:
        raise DataError("no text to embed")
    if pool is None and (own := _of_its_own(stack)) is not None:
        return own.embed(stack, texts, size=size)
    model, tokenizer = stack.model, stack.tokenizer
    decoder = stack.anatomy.is_decoder and not stack.anatomy.is_encoder_decoder
    pool = pool or (last_of if decoder else mean_of)
    room = context_window(model, tokenizer)
    rows = class_rows(tokenizer, texts, max_length=room, closed=not decoder, owner="embed")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    part = model.get_encoder() if stack.anatomy.is_encoder_decoder else model
    found = []
    with evaluating(model):
        for batch in batches_of([rows[i] for i in order], pad_of(model, tokenizer), model.device, size=size):
            states = part(**batch, output_hidden_states=True).hidden_states[-1]  # [B, T, d]
            found.append(normalize(pool(states.float(), batch["attention_mask"]), dim=-1))
    vectors = torch.cat(found).clone()  # an ordinary tensor, not one of inference mode
    return vectors[torch.argsort(torch.tensor(order, device=vectors.device))]
