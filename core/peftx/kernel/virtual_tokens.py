"""Soft tokens at the model's input, unseen by the caller: lengths, labels, masks, positions, beams stay the caller's.

The *base* model (`LlamaModel` inside `LlamaForCausalLM`, `OPTDecoder` inside `OPTModel`) becomes a subclass of itself
that puts the learned rows in front of the embedded input when the cache is empty and drops their rows from the output,
so every head, loss and generation loop above it works unchanged. Pads on the left stay in front of them: what a row
says must not depend on the rows beside it, also where distance counts (state spaces, windows). In an encoder-decoder
model they stand in front of the encoder's input, and the decoder attends to them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx.errors import ArchitectureError, ConflictError, PluginError
from peftx.kernel.anatomy.table import table_for
from peftx.kernel.chain import Chain
from peftx.kernel.soft_rows import (
    check_past,
    columns_seen,
    flat_mask,
    insert,
    is_tree,
    make_room,
    pads_before,
    with_soft_tokens,
    without,
)

CHILD = "peftx_prompt"
STATE = "_peftx_prompt"


class VirtualTokens(nn.Module):
    """`length` soft tokens. A subclass defines `rows()`.

    Args:
        length: number of tokens P.
    """

    after_bos: ClassVar[bool] = False
    """Stand behind the text's first token, which many models read as a sink, and not before it."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def rows(self) -> Tensor:
        """The embeddings, [P, hidden], in the embedding's dtype, as large as what the embedding returns; or
        [B, P, hidden], where each row of the batch has its own (what they follow from, `model.call` tells)."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no rows(): the embeddings of its tokens, [P, hidden]"
        )

    def real(self) -> Tensor | None:
        """Which of them are there, bool [B, P], where rows of the batch have fewer; None: all. Asked at every step of
        decoding too."""
        return None


class Shift(nn.Module):
    """Positions count from `by`: so many keys and values of a plugin's stand before the text's own."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by


class _Prompt(Chain[VirtualTokens | Shift]):
    """What one base model has in front of its input."""

    def __init__(self) -> None:
        super().__init__(CHILD)
        self.tokens: list[VirtualTokens] = []
        self.shift = 0

    def rebuild(self) -> None:
        super().rebuild()
        self.tokens = [edit for edit in self.active if isinstance(edit, VirtualTokens)]
        self.shift = sum(edit.by for edit in self.active if isinstance(edit, Shift))


class _BaseModelSlot:
    """Mixin of the swapped class."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _rebuild, (self._peftx_base,), self.__dict__  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prompt: _Prompt = self.__dict__[STATE]
        tokens = prompt.tokens
        length = sum(t.length for t in tokens)
        if not length and not prompt.shift:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        call = dict(zip(arguments_of(self._peftx_base), args, strict=False)) | kwargs  # type: ignore[attr-defined]
        input_ids, inputs_embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        attention_mask, position_ids = call.pop("attention_mask", None), call.pop("position_ids", None)
        past_key_values, states = call.get("past_key_values"), call.get("cache_params")
        if states is not None and states.has_previous_state():
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # Mamba's states hold the rows already
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        given = inputs_embeds if inputs_embeds is not None else input_ids
        new = given.shape[1]
        whole: Tensor | None = None
        tree: Tensor | None = None
        seen_before = max(past - length, 0)  # tokens of the caller's in the cache
        if length:
            if past_key_values is not None and not past:
                make_room(past_key_values, length, getattr(self.config, "sliding_window", None))  # type: ignore[attr-defined]
            if past and is_tree(
                attention_mask, past + new, past_key_values
            ):  # made for the cache, these rows included
                whole, attention_mask = attention_mask, None
            elif past and is_tree(attention_mask, seen_before + new, past_key_values):
                tree, attention_mask = attention_mask, columns_seen(attention_mask)
            attention_mask = flat_mask(attention_mask, seen_before, new, past_key_values)
            if attention_mask is None and any(edit.real() is not None for edit in tokens):
                attention_mask = given.new_ones((len(given), seen_before + new), dtype=torch.int64)
        positions = self._peftx_positions(position_ids, attention_mask, seen_before, new)
        if not length or past:
            if length:
                check_past(attention_mask, position_ids, seen_before, new)
                at = self._peftx_place(tokens, attention_mask)
                own = attention_mask if tree is None else tree
                attention_mask = _masked(tokens, own, at) if whole is None else whole
            if positions is not None:
                positions = positions + (length + prompt.shift)
            call |= _given(attention_mask=attention_mask, position_ids=positions)
            if inputs_embeds is not None:
                return super().forward(inputs_embeds=inputs_embeds, **call)  # type: ignore[misc]
            return super().forward(input_ids=input_ids, **call)  # type: ignore[misc]

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        first: int = self._peftx_at  # type: ignore[attr-defined]
        at = self._peftx_place(tokens, attention_mask)
        inputs_embeds = insert(inputs_embeds, self._peftx_rows(tokens, inputs_embeds), at)
        call.pop("logits_to_keep", None)  # of the caller's rows; a base model that cuts by it knows of more
        if (own := self._peftx_per_layer(call, input_ids)) is not None:
            call["per_layer_inputs"] = insert(own, own.new_zeros(len(own), length, *own.shape[2:]), at)
        attention_mask = _masked(tokens, attention_mask, at)
        if positions is not None:
            begin = first or int(tokens[0].after_bos)
            own = torch.arange(begin, begin + length, device=positions.device).expand(positions.shape[0], -1)
            later = (
                torch.cat((positions[:, :first], positions[:, first:] + length), 1) if first
                else torch.where(positions < begin, positions, positions + length)
            )  # fmt: skip
            positions = insert(later, own, at) + prompt.shift
        if (types := call.get("token_type_ids")) is not None:
            call["token_type_ids"] = insert(types, types.new_zeros(types.shape[0], length), at)
        call |= _given(attention_mask=attention_mask, position_ids=positions)
        out = super().forward(inputs_embeds=inputs_embeds, **call)  # type: ignore[misc]
        return out if self._peftx_visible else _drop(out, at, length)  # type: ignore[attr-defined]

    def _peftx_positions(
        self, given: Tensor | None, mask: Tensor | None, past: int, new: int
    ) -> Tensor | None:
        """Positions of the `new` tokens as the caller counts them, [B, new] or [1, new]; None: the model's own will do.

        Pads on the left are not counted, whatever the model itself would do.
        """
        if given is not None:
            if given.ndim != 2:
                raise ArchitectureError(
                    f"positions of shape {tuple(given.shape)} have no place for soft tokens",
                    hint="[rows, tokens]",
                )
            return given
        if "position_ids" not in arguments_of(self._peftx_base):  # type: ignore[attr-defined]
            return None
        left = (
            mask is not None
            and mask.ndim == 2
            and mask.shape[-1] == past + new
            and not bool(mask[:, 0].all())
        )
        if left and not self._peftx_at:  # type: ignore[attr-defined]
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]  # type: ignore[union-attr]
        if self.__dict__[STATE].shift:
            return torch.arange(past, past + new, device=self.device)[None]  # type: ignore[attr-defined]
        return None

    def _peftx_place(self, tokens: list[VirtualTokens], mask: Tensor | None) -> int | Tensor:
        """The column from which they stand, [B] where rows have pads in front."""
        first: int = self._peftx_at  # type: ignore[attr-defined]
        return first or pads_before(mask) + int(tokens[0].after_bos)

    def _peftx_per_layer(self, call: dict[str, Any], input_ids: Tensor | None) -> Tensor | None:
        """What each layer of Gemma 3n and 4 looks up for a token, [B, T, layers, d]; soft tokens have none."""
        given: Tensor | None = call.get("per_layer_inputs")
        if given is not None or input_ids is None or "per_layer_inputs" not in arguments_of(self._peftx_base):  # type: ignore[attr-defined]
            return given
        looks_up = self.config.hidden_size_per_layer_input  # type: ignore[attr-defined]
        return self.get_per_layer_inputs(input_ids) if looks_up else None  # type: ignore[attr-defined]

    def _peftx_rows(self, tokens: list[VirtualTokens], like: Tensor) -> Tensor:
        found = []
        for edit in tokens:
            rows, needed = edit.rows(), (edit.length, like.shape[-1])
            if tuple(rows.shape[-2:]) != needed or rows.ndim > 3:
                raise PluginError(
                    f"{type(edit).__name__}: rows() gave {tuple(rows.shape)}, and {needed} is needed: as many as "
                    "its length, as wide as the embedding; with a row of the batch to each, if they differ"
                )
            found.append(_for_batch(rows, like.shape[0], edit).to(like.dtype))
        return torch.cat(found, 1)  # [B, P, hidden]


def _masked(tokens: list[VirtualTokens], mask: Tensor | None, at: int | Tensor) -> Tensor | None:
    """A mask of the caller's tokens, [B, T] or [B, 1, new, T], as one of these and the soft tokens."""
    if mask is None:
        return None
    if mask.ndim == 4:
        flat = columns_seen(mask)
        rows = _masked(tokens, flat, at)
        assert rows is not None
        added = insert(
            torch.zeros_like(flat), torch.ones_like(rows[:, flat.shape[1] :]), at
        ).bool()  # [B, T + P]
        wide = insert(
            mask.movedim(-1, 1),
            mask.new_zeros(len(mask), added.shape[1] - flat.shape[1], *mask.shape[1:3]),
            at,
        )
        shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        soft = torch.where(rows.bool(), shown, hidden).to(mask.dtype)[:, :, None, None]
        return torch.where(added[:, :, None, None], soft, wide).movedim(1, -1)
    known = [edit.real() for edit in tokens]
    rows = [
        mask.new_ones(len(mask), edit.length) if real is None else _for_batch(real, len(mask), edit).to(mask)
        for edit, real in zip(tokens, known, strict=True)
    ]
    return insert(mask, torch.cat(rows, 1), at)


def _for_batch(rows: Tensor, batch: int, edit: VirtualTokens) -> Tensor:
    """[P, d] for every row of the batch; [B, P, ...] of a batch that `generate` has expanded (beams), each as often."""
    if rows.ndim == 2 and rows.dtype != torch.bool:
        return rows.expand(batch, -1, -1)
    if len(rows) == 0 or batch % len(rows):
        raise PluginError(
            f"{type(edit).__name__}: soft tokens for {len(rows)} rows, and the batch has {batch}"
        )
    return rows if len(rows) == batch else rows.repeat_interleave(batch // len(rows), 0)


class _CrossAttentionSlot:
    """The decoder of an encoder-decoder model: the encoder's output is longer than the caller's mask of it."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _rebuild_decoder, (self._peftx_base,), self.__dict__  # type: ignore[attr-defined]

    def forward(self, *args: Any, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Any:
        mask, tokens = kwargs.get("encoder_attention_mask"), self.__dict__[STATE].tokens
        length = sum(edit.length for edit in tokens)
        if encoder_hidden_states is not None:
            if mask is None and any(edit.real() is not None for edit in tokens):
                batch, seen = encoder_hidden_states.shape[:2]
                mask = encoder_hidden_states.new_ones((batch, seen - length), dtype=torch.int64)
            missing = 0 if mask is None else encoder_hidden_states.shape[1] - mask.shape[-1]
            if missing == length and missing:
                kwargs["encoder_attention_mask"] = _masked(tokens, mask, pads_before(mask))
            elif missing > 0:  # of tokens that were there when the encoder ran
                kwargs["encoder_attention_mask"] = with_soft_tokens(mask, missing)
        return super().forward(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)  # type: ignore[misc]


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _place(model: PreTrainedModel, host: nn.Module) -> int:
    """Where the rows stand: in front; but in an encoder whose first token is read as the summary ([CLS]), behind it."""
    if model.config.is_encoder_decoder:
        return 0
    causal = {m.is_causal for m in host.modules() if "is_causal" in m.__dict__}
    if (
        not causal and (table := table_for(host.config.model_type)) is not None
    ):  # DeBERTa, BLOOM, ... do not say
        causal = {any(tower.name == "decoder" for tower in table.towers)}
    return 1 if causal == {False} else 0


@cache
def arguments_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of `forward`'s arguments, in order."""
    import inspect

    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _drop(out: Any, at: int | Tensor, length: int) -> Any:
    """Remove the prompt's rows from what the base model returns."""
    if isinstance(out, tuple):
        return (without(out[0], length, at), *out[1:])
    out.last_hidden_state = without(out.last_hidden_state, length, at)
    if out.get("hidden_states") is not None:
        out.hidden_states = tuple(without(rows, length, at) for rows in out.hidden_states)
    return out


@cache
def _slot_class(base: type[nn.Module], mixin: type) -> type[nn.Module]:
    names = {"_peftx_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _slot_class(base, _BaseModelSlot)
    return cls.__new__(cls)


def _rebuild_decoder(base: type[nn.Module]) -> nn.Module:
    cls = _slot_class(base, _CrossAttentionSlot)
    return cls.__new__(cls)


def _host(model: PreTrainedModel) -> nn.Module:
    """The module whose input gets the tokens: the innermost model around the token embedding.

    The innermost, since `OPTForCausalLM` calls the decoder inside `OPTModel` directly, and images join LLaVA's text
    before its language model sees it.
    """
    base = model.base_model
    if model.config.is_encoder_decoder:
        return base.get_encoder()
    for module in model.modules():
        if isinstance(module, _BaseModelSlot):
            return module
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # CLIP, which has two towers
        return base
    inside = [m for m in base.modules() if isinstance(m, PreTrainedModel) and embedding in m.modules()]
    return inside[-1] if inside else base


def _prepare(model: PreTrainedModel) -> tuple[nn.Module, _Prompt]:
    host = _host(model)
    prompt: _Prompt | None = host.__dict__.get(STATE)
    if prompt is not None:
        return host, prompt
    if "inputs_embeds" not in arguments_of(type(host)):
        raise ArchitectureError(
            f"{type(host).__name__} takes no inputs_embeds, so nothing can stand before its input"
        )
    prompt = host.__dict__[STATE] = _Prompt()
    host.__dict__["_peftx_at"] = _place(model, host)
    host.__dict__["_peftx_visible"] = bool(model.config.is_encoder_decoder)
    host.__class__ = _slot_class(type(host), _BaseModelSlot)
    if model.config.is_encoder_decoder:
        decoder = model.base_model.get_decoder()
        decoder.__dict__[STATE] = prompt
        decoder.__class__ = _slot_class(type(decoder), _CrossAttentionSlot)
    return host, prompt


def prompt_of(model: PreTrainedModel) -> tuple[nn.Module, _Prompt | None]:
    """The module that the caller's tokens come into, and what stands before them there."""
    host = _host(model)
    return host, host.__dict__.get(STATE)


def attach(model: PreTrainedModel, edit: VirtualTokens | Shift, *, owner: str, rank: int) -> None:
    """Add a plugin's soft tokens, of which the first in the stack stand first, or its shift of positions."""
    host, prompt = _prepare(model)
    other = next((link.owner for link in prompt.links if isinstance(link.edit, VirtualTokens)
                  and isinstance(edit, VirtualTokens) and link.edit.after_bos != edit.after_bos), None)  # fmt: skip
    if other is not None:
        raise ConflictError(
            f"the soft tokens of '{owner}' and '{other}' stand on two sides of a text's first token",
            hint="keep one",
        )
    prompt.append(host, edit, owner, rank)


def detach(model: PreTrainedModel, owner: str) -> None:
    """Take the owner's tokens and shifts away; the last one gone gives the classes back."""
    host = _host(model)
    prompt: _Prompt | None = host.__dict__.get(STATE)
    if prompt is None or not prompt.drop(host, owner):
        return
    del host.__dict__[STATE], host.__dict__["_peftx_visible"], host.__dict__["_peftx_at"]
    host.__class__ = host._peftx_base  # type: ignore[assignment]
    if model.config.is_encoder_decoder:
        decoder = model.base_model.get_decoder()
        del decoder.__dict__[STATE]
        decoder.__class__ = decoder._peftx_base


def enable(model: PreTrainedModel, owner: str, enabled: bool) -> None:
    prompt: _Prompt | None = _host(model).__dict__.get(STATE)
    if prompt is not None:
        prompt.switch(owner, enabled)
