"""A second model with the base's weights, for a plugin to own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from peftx.errors import ConflictError, GenerationError
from peftx.kernel.attention import PREFIX
from peftx.kernel.chain import is_ours
from peftx.kernel.positions import free_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.kernel.stack import Stack


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with its weights as they are now, and nothing of what plugins put on it. `keep`, or an
    edit that holds the copy, makes its parameters a plugin's own.

    Raises:
        ConflictError: layers were replaced by packed or smaller ones, or biases added where the class has none.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = (config._attn_implementation or "eager").removeprefix(PREFIX)
    with torch.device(model.device), no_init_weights():
        found = _own_class(model)._from_config(config, dtype=model.dtype)
    found.tie_weights()  # which making it without first values leaves out
    weights = {name: t for name, t in model.state_dict().items() if not is_ours(name)}
    known = found.state_dict()
    other = {name for name in weights.keys() & known.keys() if weights[name].shape != known[name].shape}
    if strange := sorted((weights.keys() ^ known.keys()) | other):
        raise ConflictError(
            f"{type(found).__name__} cannot be copied: {strange[0]} is no weight of the class, or of another size",
            hint="put the plugin before those that pack or prune layers",
        )
    # Layers that a bundle brings packed have no weights while it is read; what a copy had of them it brings too.
    found.load_state_dict({name: t for name, t in weights.items() if not t.is_meta}, strict=False)
    return found.train(model.training)


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same parameters, which take no further memory: plugins on the one are not on the
    other. Buffers are copied.

    Raises:
        ConflictError: plugins stand on the model, which the other one would have too.
    """
    if any(is_ours(name) for name, _ in model.named_modules()):
        raise ConflictError("plugins stand on the model that is to be shared", hint="share it before they do")
    shared = {id(parameter): parameter for parameter in model.parameters()}
    found: PreTrainedModel = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    _BASES[found] = model
    return found


def frozen(stack: Stack) -> PreTrainedModel:
    """The model of a stack as it is now, with what plugins put on it, in evaluation mode. It shares the parameters that
    no plugin trains; of the others it has copies, which do not train."""
    trained = {id(tensor) for tensor in stack.ledger.trained().values()}
    shared = {id(p): p for p in stack.model.parameters() if id(p) not in trained}
    found: PreTrainedModel = copy.deepcopy(stack.model, dict(shared))  # type: ignore[arg-type]
    for parameter in found.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return found.eval()


_BASES: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()
"""Model -> the one whose parameters it has."""


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose parameters this one was given by `sharing`; itself if none."""
    return _BASES.get(model, model)


class Reader(nn.Module):
    """A second model that reads a text and then vectors, in one pass; what it makes of these is its answer.

    A decoder reads them behind the text; of an encoder and a decoder the one reads the text and the other the vectors.

    Args:
        model: what it starts as.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        copied = copy_of(model)
        pair = model.config.is_encoder_decoder
        self.room = None if pair else free_positions(copied)
        self.towers = nn.ModuleList(
            [copied.get_encoder(), copied.get_decoder()] if pair else [copied.base_model]
        )

    @property
    def embedding(self) -> nn.Module:
        """Of the text's tokens."""
        found: nn.Module = self.towers[0].get_input_embeddings()
        return found

    @torch.no_grad()
    def vectors(self, count: int) -> Tensor:
        """Some to begin with, drawn as large as embeddings: [N, d]."""
        rows = self.embedding.weight.shape[0]
        like: Tensor = self.embedding(torch.randint(rows, (256,)).to(self.embedding.weight.device))
        return torch.randn(count, like.shape[-1]).to(like) * like.std()

    def forward(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """ids [B, S], -1 behind the end of a row; vectors [B, N, d] -> their last hidden states [B, N, d].

        Raises:
            PeftxError: more of both than the model has positions for.
        """
        if self.room is not None and ids.shape[1] + vectors.shape[1] > self.room:
            raise GenerationError(
                f"{ids.shape[1]} tokens and {vectors.shape[1]} vectors are to be read, and the model has positions for "
                f"{self.room}",
                hint="less text",
            )
        ids, mask = ids.clamp(min=0), (ids >= 0).long()
        if len(self.towers) == 2:
            encoder, decoder = self.towers
            read = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            out = decoder(
                inputs_embeds=vectors,
                encoder_hidden_states=read,
                encoder_attention_mask=mask,
                use_cache=False,
            )
            return out.last_hidden_state  # type: ignore[no-any-return]
        N = vectors.shape[1]
        mask = nn.functional.pad(mask, (0, N), value=1)
        out = self.towers[0](
            inputs_embeds=torch.cat((self.embedding(ids), vectors), 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        return out.last_hidden_state[:, -N:]  # type: ignore[no-any-return]


def _own_class(model: nn.Module) -> type[PreTrainedModel]:
    """Without the slots of plugins."""
    found = type(model)
    while "_peftx_base" in vars(found):
        found = vars(found)["_peftx_base"]
    return found
