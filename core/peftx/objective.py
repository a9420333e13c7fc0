"""What a model does, by its class, and which ids it can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Rows of the token embedding; None for a model that has none."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # CLIP has two towers
        return None
    return None if embedding is None else int(embedding.weight.shape[0])


def pad_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with, inside the embedding: which one does not matter, since the mask hides it."""
    size = vocabulary_of(model)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if token is not None and (size is None or token < size):
            return int(token)
    return 0
