"""One attention function for all plugins: prefixes, edits of heads, replacements, on any model that dispatches.

`transformers` models look their attention up by name. The first edit switches the model to a name of ours, whose
function runs the edits of the calling layer and ends in the function that the model had before; a mask function is
registered under the same name, since without one padding would be ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftx.errors import ArchitectureError, ConflictError
from peftx.kernel.chain import Chain
from peftx.kernel.slots import base_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "peftx_"
CHILD = "peftx_attention"
STATE = "_peftx_attention"
WHOLE = "_peftx_whole"

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class AttentionEdit(nn.Module):
    """One plugin's edit of one layer's attention; define what the method needs.

    Shapes: query [B, H, Q, D], key and value [B, Hkv, K, D] (not repeated for GQA), heads' output [B, Q, H, D]; mask
    bool or additive [B, 1 or H, Q, K] (T5's position bias is in it), or None: causal if the layer is, query i then sees
    keys 0..i.
    """

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Edit keys and values; rows put in front ([B, Hkv, P + K, D]) are seen by every query."""
        return key, value

    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        """Edit the heads' output before the output projection: [B, Q, H, D] -> [B, Q, H, D]."""
        return out

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend
    ) -> Tensor:
        """Compute the attention: -> [B, Q, H, D]. `attend(query, key, value, mask)` is the model's own.

        A query that is a left pad sees no key: fill with the dtype's lowest number, since -inf would make it NaN.
        """
        raise NotImplementedError

    def probabilities(self, p: Tensor) -> Tensor:
        """Edit what the softmax gave: [B, H, Q, K] -> [B, H, Q, K]. The layer then computes its attention in the open,
        with all of it in memory.

        Raises:
            ArchitectureError: when called, of a model whose softmax has more than scores in it (gpt-oss's sinks).
        """
        return p

    def opens(self) -> bool:
        """Has `probabilities` something to edit in the call that runs; where no edit has, the layer computes its
        attention as it does by itself."""
        return True

    @classmethod
    def replaces(cls) -> bool:
        return cls.replace is not AttentionEdit.replace

    @classmethod
    def edits_probabilities(cls) -> bool:
        return cls.probabilities is not AttentionEdit.probabilities


def dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    inner: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; `inner` is the name of the model's own."""
    function = _inner_function(inner, type(module).__module__)
    edits: Chain[AttentionEdit] | None = module.__dict__.get(STATE)
    if edits is None or not edits.active:
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    old_length, mask = key.shape[2], attention_mask
    for edit in edits.active:
        key, value = edit.keys_values(key, value)
    added = key.shape[2] - old_length
    if added:
        mask = _widen(mask, added, old_length, query, _is_causal(module, kwargs))
        if (bias := kwargs.get("position_bias")) is not None:
            kwargs["position_bias"] = nn.functional.pad(bias, (added, 0))
    weights: list[Tensor | None] = [None]

    open_ = [edit.probabilities for edit in edits.active if edit.edits_probabilities() and edit.opens()]

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        if open_:
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            out, weights[0] = _in_the_open(module, q, k, v, m, scale, open_, kwargs)
            return out
        out, weights[0] = function(module, q, k, v, m, scaling=scaling, **kwargs)
        return out

    replacement = next((edit for edit in edits.active if edit.replaces()), None)
    if replacement is None:
        out = attend(query, key, value, mask)
    else:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if (bias := kwargs.pop("position_bias", None)) is not None:
            mask = _with_bias(mask, bias, query, key.shape[2], _is_causal(module, kwargs))
        out = replacement.replace(query, key, value, mask, scale, attend)
    for edit in edits.active:
        out = edit.heads(out, query)
    return out, weights[0]


def _in_the_open(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    edits: Sequence[Callable[[Tensor], Tensor]],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out [B, Q, H, D] and p [B, H, Q, K]: softmax(q k^T s + mask) v, with the softmax's result edited."""
    if kwargs.get("s_aux") is not None:
        raise ArchitectureError(
            f"{base_class(module).__name__} has sinks in its softmax, whose result cannot be edited"
        )
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scaling  # [B, H, Q, K]
    if (cap := kwargs.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if (bias := kwargs.get("position_bias")) is not None:
        mask = _with_bias(mask, bias, q, k.shape[2], _is_causal(module, kwargs))
    elif mask is None and _is_causal(module, kwargs) and q.shape[2] > 1:
        mask = _causal(q, k.shape[2])
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    p = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    for edit in edits:
        p = edit(p)
    p = nn.functional.dropout(p, kwargs.get("dropout", 0.0), module.training)
    return (p @ v).transpose(1, 2).contiguous(), p


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True)) if given is None else bool(given)


def _widen(mask: Tensor | None, added: int, keys: int, query: Tensor, causal: bool) -> Tensor | None:
    """Let every query see `added` keys in front."""
    if mask is None and (not causal or query.shape[2] == 1):
        return None
    mask = _causal(query, keys) if mask is None else mask
    return nn.functional.pad(mask, (added, 0), value=True if mask.dtype == torch.bool else 0.0)


def _causal(query: Tensor, keys: int) -> Tensor:
    """What a missing mask means: query i sees keys 0..i. Keys beyond the queries are a static cache's empty places."""
    return torch.ones(query.shape[2], keys, dtype=torch.bool, device=query.device).tril()[None, None]


def _with_bias(mask: Tensor | None, bias: Tensor, query: Tensor, keys: int, causal: bool) -> Tensor:
    """T5's position bias [1 or B, H, Q, K] and the mask in one additive mask."""
    if mask is None:
        if not causal or query.shape[2] == 1:
            return bias
        mask = _causal(query, keys)
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


@cache
def _inner_function(name: str, source: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The model's own attention; `eager` is not registered but stands in each modelling file."""
    return sys.modules[source].eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def implementation_name(inner: str) -> str:
    """Register (once) and name the dispatcher around `inner`."""
    name = PREFIX + inner
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(dispatch, inner=inner))
        mask = ALL_MASK_ATTENTION_FUNCTIONS[inner]
        AttentionMaskInterface.register(name, mask)
    return name


for _inner in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
    if (
        _inner in ALL_MASK_ATTENTION_FUNCTIONS
    ):  # at import: a model that comes out of a pickle or another process names it
        implementation_name(_inner)


def attach(model: PreTrainedModel, module: nn.Module, edit: AttentionEdit, *, owner: str, rank: int) -> None:
    """Add an edit to one layer's attention.

    Raises:
        ArchitectureError: the model does not dispatch. ConflictError: two edits that replace the attention.
    """
    switch_on(model)
    config = module.__dict__.get("config")
    if config is None or not (config._attn_implementation or "").startswith(
        PREFIX
    ):  # the tower does not dispatch
        raise ArchitectureError(f"{base_class(module).__name__} does not look its attention up by name")
    edits: Chain[AttentionEdit] | None = module.__dict__.get(STATE)
    other = next((link.owner for link in edits.links if link.edit.replaces()), None) if edits else None
    if edit.replaces() and other is not None:
        raise ConflictError(
            f"'{owner}' and '{other}' both replace the attention of one layer", hint="keep one"
        )
    if edits is None:
        edits = module.__dict__[STATE] = Chain(CHILD)
    edits.append(module, edit, owner, rank)


def detach(module: nn.Module, owner: str) -> None:
    """Take the owner's edits out of one layer."""
    edits: Chain[AttentionEdit] | None = module.__dict__.get(STATE)
    if edits is not None and edits.drop(module, owner):
        del module.__dict__[STATE]


def enable(module: nn.Module, owner: str, enabled: bool) -> None:
    edits: Chain[AttentionEdit] | None = module.__dict__.get(STATE)
    if edits is not None:
        edits.switch(owner, enabled)


def switch_on(model: PreTrainedModel) -> None:
    """Give the model our attention name, and prove that it dispatches.

    Raises:
        ArchitectureError: it does not.
    """
    inner = model.config._attn_implementation or "eager"
    if inner.startswith(PREFIX):
        return
    if not model._can_set_attn_implementation():
        raise ArchitectureError(
            f"{type(model).__name__} does not look its attention up by name, so nothing can be attached inside it",
            hint="use a method that works on weights or on the input",
        )
    model.set_attn_implementation(implementation_name(inner))
    for inside in _that_cut(model):
        inside.__dict__[WHOLE] = inside.register_forward_pre_hook(_whole, with_kwargs=True)


def _that_cut(model: PreTrainedModel) -> list[nn.Module]:
    """Models inside that drop tokens whose logits nobody asked for (Gemma 4), where they know the attention by name:
    under ours they would drop them and leave the mask out."""
    inside = (m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and m is not model)
    return [m for m in inside if not m.can_generate() and "logits_to_keep" in signature(m.forward).parameters]


def _whole(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "logits_to_keep"}


def switch_off(model: PreTrainedModel) -> None:
    """Give the model its own attention name back."""
    for module in model.modules():
        if (handle := module.__dict__.pop(WHOLE, None)) is not None:
            handle.remove()
    name = model.config._attn_implementation or ""
    if name.startswith(PREFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX))
