"""NTK-Attention: a prefix of any length as one matrix and one vector for each head.

"Toward Infinite-Long Prefix in Transformer" (arXiv:2406.14036). Prefix rows k_j, v_j add the sums over j of
exp(q k_j / sqrt(d)) v_j and of exp(q k_j / sqrt(d)) to numerator and denominator of attention. With
exp(q k / sqrt(d)) ~ phi(q) phi(k) these are phi(q) Z and phi(q) z, and Z and z are trained in the prefix's place:

    out = (A V + phi(q) Z) / (A 1 + phi(q) |z|)      A = exp(Q K^T / sqrt(d)), masked
    phi(x) = ELU(x / d^(1/4)) + 1                    entry by entry, positive
    Z = sum_j phi(k_j) v_j^T,  z = sum_j phi(k_j)    Z: [heads, d, d_v], z: [heads, d], 0 at the start

d_v is d, but in DeepSeek-V3, whose values are narrower.

Nothing else trains, and the cache does not grow. With the model's own output out_0 = A V / A 1 and L = log(A 1) it is

    out = out_0 + (phi(q) Z - phi(q)|z| out_0) / (exp(L) + phi(q)|z|)

so at Z = z = 0 it is out_0 itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import AttentionEdit, Claim, ModelView, Plugin, PluginConfig, Stack, Targets, hookimpl
from peftx.errors import ArchitectureError, OptionError, UnsupportedError
from peftx.kernel.anatomy.anatomy import Heads
from peftx.kernel.attention import Attend

NOTHING = -1e3
"""L below it: the query sees no key, as a left pad does; masks add the dtype's lowest number, at least -65504."""
SMALLEST = -80.0
"""Of L: below it exp(L) would be 0 in float32."""


class NtkAttentionConfig(PluginConfig):
    """Options of NTK-Attention."""

    dropout: float = Field(
        0.2, ge=0, lt=1, description="probability of zeroing an entry of phi(q) while training"
    )
    targets: Targets = Field(
        Targets("attention"),
        description="attentions that get Z and z, as in 'attention layers=0-5 tower=encoder'",
    )


def phi(x: Tensor, scaling: float) -> Tensor:
    """ELU(sqrt(scaling) x) + 1, float32; scaling is 1 / sqrt(d) in most models."""
    return F.elu(x.float() * scaling**0.5) + 1


def statistics(
    key: Tensor, value: Tensor, *, groups: int = 1, scaling: float | None = None
) -> tuple[Tensor, Tensor]:
    """Z and z of a prefix, divided by d: phi(q) phi(k) is d where q = k = 0, and exp(q k) is 1.

    Args:
        key, value: [key-value heads, length, d and d_v], keys as attention sees them. groups: query heads for each.
        scaling: of the scores; 1 / sqrt(d) if left out.

    Returns:
        [heads, d, d_v] and [heads, d], float32.
    """
    size = key.shape[-1]
    features = phi(key, size**-0.5 if scaling is None else scaling) / size  # [Hkv, length, d]
    Z, z = features.mT @ value.float(), features.sum(-2)
    return Z.repeat_interleave(groups, 0), z.repeat_interleave(groups, 0)


class Prefix(AttentionEdit):
    """Z and z of one layer.

    Args:
        sizes: of the layer's heads. dropout: p. causal: what a missing mask means.
    """

    def __init__(self, sizes: Heads, *, dropout: float, causal: bool) -> None:
        super().__init__()
        self.Z = nn.Parameter(torch.zeros(sizes.heads, sizes.head_dim, sizes.value_dim))
        self.z = nn.Parameter(torch.zeros(sizes.heads, sizes.head_dim))
        self.dropout, self.causal = dropout, causal

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend
    ) -> Tensor:
        plain = attend(query, key, value, mask).transpose(1, 2)  # out_0: [B, H, Q, d_v]
        L = self._log_sum(query, key, mask, scaling)  # [B, H, Q, 1]
        m = L.clamp(min=0)
        features = F.dropout(phi(query, scaling), self.dropout, self.training)
        z = self.z.float()
        weight = features @ torch.where(z < 0, -z, z)[..., None] * (-m).exp()  # phi(q) |z| / exp(m)
        added = features @ self.Z.float() * (-m).exp() - weight * plain
        change = added / ((L - m).exp() + weight)
        return (plain + change.to(plain.dtype)).transpose(1, 2)

    def _log_sum(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """L = log sum exp of the scores over the keys that a query sees; 0 where it sees none."""
        grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, Hkv, groups, Q, d]
        scores = (grouped @ key.float().mT.unsqueeze(2)).flatten(1, 2) * scaling  # [B, H, Q, K]
        lowest = torch.finfo(scores.dtype).min
        if mask is not None and mask.dim() != 4:
            raise UnsupportedError(
                "ntk-attention: this attention makes no 4-D masks", hint="use sdpa or eager"
            )
        if mask is None and self.causal and query.shape[2] > 1:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, lowest)
        elif mask is not None:
            scores = (scores + mask).clamp(min=lowest)
        L = scores.logsumexp(-1, keepdim=True)
        return torch.where(L < NOTHING, 0.0, L.clamp(min=SMALLEST))


class NtkAttention(Plugin):
    """See the module."""

    Config = NtkAttentionConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.REPLACES_ATTENTION}
    architectures = ("gemma", "clip", "deepseek_v3", "gemma4")
    refuses = {
        "mamba": "it has no attention",
        "bloom": "its attention is not looked up by name",
        "gemma2": "it caps its scores",
    }
    config: NtkAttentionConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        capped = model.config.get_text_config().to_dict().get("attn_logit_softcapping") is not None
        depth = max(tower.layers for tower in model.towers.values())
        for site in self.config.targets.select(model.attentions(), layers=depth):
            sinks = any("sink" in name.split(".")[0] for name, _ in site.module.named_parameters())
            if capped or sinks:
                why = "caps its scores" if capped else "has attention sinks"
                raise ArchitectureError(
                    f"ntk-attention: {model.config.model_type} {why}, so the sum of its scores is not known here",
                    hint="real rows of keys and values (p-tuning-v2) go with caps and sinks",
                )
            # CLIP's text tower says it with each call and not on the module.
            causal = vars(site.module).get("is_causal", True) or site.tower == "text"
            edit = Prefix(model.heads_of(site), dropout=self.config.dropout, causal=causal)
            model.bound(site).attend(edit)


@torch.no_grad()
def set_prefix(
    stack: Stack,
    prefix: list[tuple[Tensor, Tensor]],
    *,
    scaling: float | None = None,
    id: str = "ntk-attention",
) -> None:
    """Start from a prefix: write its Z and z into every layer.

    Args:
        prefix: key and value of each layer, [key-value heads, length, d and d_v]. scaling: as in `statistics`.

    Raises:
        PeftxError: another number of layers, or a layer of another shape; nothing is written then.
    """
    edits = [part.module for part in stack.ledger.of(id)]
    if len(prefix) != len(edits):
        raise OptionError(
            f"{id}: the prefix has {len(prefix)} layers, the stack {len(edits)}", hint="one pair each"
        )
    found = []
    for layer, (edit, (key, value)) in enumerate(zip(edits, prefix, strict=True)):
        heads, *sizes = edit.Z.shape
        fits = key.shape[:-1] == value.shape[:-1] and [key.shape[-1], value.shape[-1]] == sizes
        if not fits or key.dim() != 3 or heads % key.shape[0]:
            raise OptionError(
                f"{id}: prefix of layer {layer} has shapes {tuple(key.shape)} and {tuple(value.shape)}, and Z "
                f"{tuple(edit.Z.shape)}",
                hint="key and value: [key-value heads, length, d], and d_v for the value",
            )
        found.append(statistics(key, value, groups=heads // key.shape[0], scaling=scaling))
    for edit, (Z, z) in zip(edits, found, strict=True):
        edit.Z.copy_(Z)
        edit.z.copy_(z)
