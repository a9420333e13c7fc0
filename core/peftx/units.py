"""Models that read and write units: single bytes and special tokens, in the rows of a language model.

The tokens that a byte-level tokenizer has for single bytes are the alphabet. What a plugin makes of the units (words,
patches) goes into the model in the place of embeddings, and logits of units come out in the place of tokens'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from peftx.errors import ArchitectureError, ConflictError, UnsupportedError
from peftx.kernel.calls import CallEdit
from peftx.kernel.members import Member
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.kernel.plugin import Claim
from peftx.kernel.slots import Delta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx.kernel.stack import Stack
    from peftx.kernel.view import ModelView

CHARS = [bytes_to_unicode()[byte] for byte in range(256)]
"""How tokenizers of bytes write them."""
PAD, SOFT, STRANGE = -1, -2, -3
"""What is no unit: a pad, a soft token, and a token of several bytes."""
NEVER = -1e4
"""Logit of a token that is no unit: a probability of 0."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


class Units(CallEdit):
    """An edit of the call that reads ids as units, and is asked for logits where the head stands.

    Args:
        model: which is called. ids: of the units' tokens: 256 bytes, then others, numbered as they stand here.
    """

    unit_of: Tensor
    ids: Tensor
    said: Any = None
    """What `before` knows of the call that runs, for `logits`."""
    alone = False
    """Does nobody else in the stack look at rows of the model, of which there may be fewer than units then."""

    def __init__(self, model: ModelView, ids: Sequence[int]) -> None:
        super().__init__()
        self.call, self.owner = model.call, model.owner
        unit_of = dict.fromkeys(range(max(ids) + 2), STRANGE) | {id: unit for unit, id in enumerate(ids)}
        self.register_buffer("unit_of", torch.tensor([*unit_of.values()]), persistent=False)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def read(self) -> tuple[Tensor, Tensor]:
        """The units of the texts, those of the cache first [B, S], -1 at pads; and which rows of cache and call they
        are [B, rows], beside soft tokens.

        Raises:
            UnsupportedError: a call without ids, or with a token that is no unit.
        """
        ids, real = self.call.ids, self.call.real
        if ids is None or real is None:
            said = f"{self.owner}: units are read off ids, and the call brings embeddings"
            raise UnsupportedError(said, hint="model(input_ids=...)")
        units = self.unit_of[ids.clamp(max=len(self.unit_of) - 1)].masked_fill(~real, PAD)
        if bool((units == STRANGE).any()):
            said = f"{self.owner}: token {int(ids[units == STRANGE][0])} is no single byte, and the model reads bytes"
            raise UnsupportedError(said, hint="ids of the stack's tokenizer: stack.tokenizer(text)")
        rows = self.call.carry(self.owner, units, fill=SOFT)
        return rows[rows != SOFT].view(len(ids), -1), rows != SOFT

    def after(self, output: Any) -> None:
        self.said = None

    def packs(self, call: dict[str, Any], text: Tensor) -> bool:
        """Whether the model need read vectors of words alone: in training, of whole texts, where no cache is made."""
        whole = text.shape[1] == call["input_ids"].shape[1] and not call.get("use_cache")
        return self.training and self.alone and whole

    def with_words(
        self, call: dict[str, Any], e: Tensor, marks: Tensor, n: Tensor, *, packed: bool
    ) -> dict[str, Any]:
        """The call with vectors of words in the place of ids. A cache must have a row for every unit; those that are
        not marked are hidden then, and positions count words.

        Args:
            e: of the words that are marked in this call, [W, d]. marks: one unit of each word, [B, S]. n: the word of
                each unit, from 0, [B, S]. packed: rows of words alone.
        """
        T = call["input_ids"].shape[1]
        b, t = marks[:, -T:].nonzero(as_tuple=True)
        n = n[:, -T:].clamp(min=0)
        words = marks.sum(1, keepdim=True)  # [B, 1]
        count = torch.arange(int(words.max()) if packed else T, device=e.device).expand(len(n), -1)
        at = (b, n[b, t] if packed else t)
        given = {
            "inputs_embeds": e.new_zeros(*count.shape, e.shape[1]).index_put(at, e),
            "attention_mask": (count < words if packed else marks).long(),
            "position_ids": count if packed else n,
            "use_cache": False if packed else call.get("use_cache"),
            "logits_to_keep": 0,  # those of a word go by what stands before it
        }
        return {name: value for name, value in call.items() if name != "input_ids"} | given

    def states(self, x: Tensor, rows: Tensor) -> Tensor:
        """Of all units of the texts, the cache's too, [B, S, d].

        Args:
            x: of this call, [B, T, d]. rows: as `read` gives them.
        """
        return self.call.carry(f"{self.owner}.states", x)[rows].view(len(x), -1, x.shape[-1])

    def logits(self, x: Tensor) -> Tensor:
        """Of the next unit [B, T, units], by the states x in front of the head."""
        raise NotImplementedError


class _ToUnits(Delta):
    """Logits of units in the place of those of tokens."""

    def __init__(self, units: Units) -> None:
        super().__init__()
        self.units = (units,)  # in a tuple: it is no child of this one

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (units,) = self.units
        if units.said is None:
            return y
        found = units.logits(x).to(y)
        return y.new_full((*found.shape[:2], y.shape[-1]), NEVER).index_copy(2, units.ids, found)


def put(model: ModelView, units: Units) -> None:
    """Put the edit around the model, and its logits in the place of the head's."""
    model.around(units)
    model.site("head").attach(_ToUnits(units))


def alphabet(model: ModelView, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the 256 single bytes, and of the special and added tokens that the model has rows for.

    Raises:
        ArchitectureError: no causal language model with attention to all of a text in every layer, or no tokenizer of
            bytes.
    """
    known, kind, size = tokenizer.get_vocab(), model.config, len(model.embedding().weight)
    for wrong, why in (
        (kind.is_encoder_decoder or not model.module.can_generate(), "is no decoder"),
        (len(model.attention_sites()) < model.num_layers, "has layers without attention"),
        (any(getattr(kind, name, None) for name in _WINDOWS), "has windows, which would count units"),
        (hasattr(kind, "vocab_size_per_layer_input"), "looks tokens up in every layer"),
        (not {*CHARS} <= known.keys(), "has a tokenizer without a token for each byte"),
    ):
        if wrong:
            hint = "a causal language model with attention to all of a text in every layer, and a tokenizer of bytes"
            raise ArchitectureError(f"{model.owner}: {kind.model_type} {why}", hint=hint)
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [known[char] for char in CHARS], sorted(id for id in added if id < size)


def settle(stack: Stack, id: str, units: Units) -> None:
    """For `check`: what else stands on the model. Beside plugins that may ask which row of a layer is which token of
    the batch, the model has a row for every unit: the same computation, in as many rows as units.

    Raises:
        ConflictError: another plugin stands on the head, or the embedding, or trains these alone: nobody reads what
            they give.
    """
    (head,) = (part.path for part in stack.ledger.of(id, DeltaPart))
    ends = {
        head: ("logits of bytes", "head"),
        stack.view(id).embedding().path: ("vectors of words", "embedding"),
    }
    for part in stack.ledger.all(DeltaPart):
        if part.path in ends and part.owner != id:
            own, end = ends[part.path]
            raise ConflictError(
                f"{id} puts {own} in the place of what the {end} gives, and {part.owner} stands on the {end}",
                hint=f"leave {part.path} out of {part.owner}",
            )
    refuse_unread(stack, id, [stack.model.get_submodule(path) for path in ends], "units")
    units.alone = all(_asks_nothing(member) for member in stack.members if member.id != id)


def refuse_unread(stack: Stack, id: str, unread: Sequence[nn.Module], instead: str) -> None:
    """For `check` of what puts something of its own in the place of what modules give.

    Args:
        unread: these modules. instead: what it puts there.

    Raises:
        ConflictError: all that another plugin trains of the base is theirs.
    """
    for other in stack.plugins:
        parts = [*stack.ledger.of(other, BasePart)]
        if other != id and parts and all(any(part.module is one for one in unread) for part in parts):
            names = " and ".join(sorted({part.key for part in parts}))
            raise ConflictError(
                f"'{id}' puts {instead} in the place of what {names} gives, and '{other}' acts on that alone",
                hint="keep one of them",
            )


_WEIGHTS = (Claim.MERGEABLE, Claim.TRAINS_BASE, Claim.QUANTIZES)
_ASKS = (Claim.EDITS_INPUTS, Claim.COMPUTES_LAYERS, Claim.NEEDS_LABELS, Claim.NEEDS_MASK, Claim.CLASSIFIES)


def _asks_nothing(member: Member) -> bool:
    """Does it change weights and nothing else."""
    return any(member.claims(claim) for claim in _WEIGHTS) and not any(
        member.claims(claim) for claim in _ASKS
    )
