"""What a model does, by its class, and which ids it can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from peftx.errors import UnsupportedError
from peftx.kernel.slots import slot_of
from peftx.kernel.vocabulary import NewRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Objective = Literal["next-token", "masked-token", "class"]
_HEADS = ("ForSequenceClassification",)


def objective_of(model: PreTrainedModel) -> Objective:
    """The objective of a model's class."""
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if any(name.endswith("ForMaskedLM") for name in kinds):
        return "masked-token"
    return "class" if any(name.endswith(_HEADS) for name in kinds) else "next-token"


_ROWS: Mapping[Objective, tuple[str, ...]] = {"masked-token": ("text",), "class": ("classification",)}


def check_objective(model: PreTrainedModel, format: str) -> None:
    """Raises UnsupportedError where rows of this format do not serve what the model is trained to do."""
    kind, name = objective_of(model), type(model).__name__
    if format in _ROWS.get(kind, (format,)):
        return
    if kind == "masked-token":
        raise UnsupportedError(
            f"{name} fills in masked tokens, and rows of format '{format}' ask for more text",
            hint="rows with 'text' train it to fill in; a causal or an encoder-decoder model takes these rows",
        )
    raise UnsupportedError(
        f"{name} names the class of a text, and rows of format '{format}' have none",
        hint="rows with 'text' and 'label' (data.train.columns maps other names)",
    )


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Ids that the token embedding knows, those of tokens that plugins added too; None for a model that has none."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # CLIP has two towers
        return None
    if embedding is None:
        return None
    slot = slot_of(embedding)
    new = (
        (id for link in slot.links if isinstance(link.edit, NewRows) for id in link.edit.ids) if slot else ()
    )
    return max(int(embedding.weight.shape[0]), max(new, default=-1) + 1)


def pad_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with, inside the embedding: which one does not matter, since the mask hides it."""
    size = vocabulary_of(model)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if token is not None and (size is None or token < size):
            return int(token)
    return 0
