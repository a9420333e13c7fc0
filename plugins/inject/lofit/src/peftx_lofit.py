"""LoFiT: find the few attention heads that matter for a task, then train an offset for the output of each.

"LoFiT: Localized Fine-tuning on LLM Representations" (arXiv:2406.01563). z[l, h] is the output of head h of layer l, in
front of the output projection W_O:

    1. choose    z' = (1 + A[l, h]) * z     loss = task + lambda * sum |A|     A: [d_head] for every head, ~ N(0, 1e-3)
                 keep the K heads of the model with the largest ||A[l, h]||_2, throw A away
    2. train     z' = z + v[l, h]           loss = task                        v: [d_head] for the K heads, ~ N(0, 1e-3)

Nothing else trains. What v adds behind W_O is the same for every token, so it folds into a bias of W_O:
b' = b + sum_h W_O[:, h] v[l, h]. Both steps run in one training, one after the other; or the heads are given, and the
second step runs alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftx import AttentionEdit, Claim, Delta, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.errors import OptionError, TrainingError

INIT_STD = 1e-3
SHARE = 0.03
"""Of all heads: K, unless it is given."""


class LofitConfig(PluginConfig):
    """Options of LoFiT; the paper takes 16 to 48 heads of a 7B or 13B model and as many epochs for each step."""

    heads: PositiveInt | tuple[tuple[int, int], ...] | None = Field(
        None,
        description="K, or the [layer, head] pairs themselves, which skips the choice; none: 3% of all heads",
    )
    selection: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the steps that choose the heads; 1: look at top_heads afterwards",
    )
    l1: float = Field(
        5e-4, ge=0, allow_inf_nan=False, description="lambda, weight of sum |A| while the heads are chosen"
    )


class Offsets(nn.Module):
    """v: [K, d_head], in the order of the chosen heads; d_head of the widest, and a narrower head (Gemma 4) takes the
    first numbers of its row."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(count, size) * INIT_STD)


class Heads(Delta):
    """The heads of one layer, side by side in front of W_O: [..., H * d_head].

    Args:
        layer, heads, size: l, H and d_head. choose: whether there is an A. offsets: v. plugin: its `state` holds
            `heads`, the chosen [layer, head] pairs, from the moment they are known.
    """

    full_precision = True  # bfloat16 cannot tell 1 + 0.001 from 1

    def __init__(
        self, *, layer: int, heads: int, size: int, choose: bool, offsets: Offsets, plugin: Lofit
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.size, self.plugin = layer, heads, size, plugin
        self.offsets = (offsets,)  # in a tuple: the plugin owns it, not this layer
        self.A = nn.Parameter(torch.randn(heads, size) * INIT_STD) if choose else None

    def shift(self) -> Tensor | None:
        """v at this layer's chosen heads, 0 at the others: [H * d_head]; None if none of them is chosen."""
        pairs = enumerate(self.plugin.state["heads"])
        chosen = [(row, head) for row, (layer, head) in pairs if layer == self.layer]
        if not chosen:
            return None
        v = self.offsets[0].v
        rows, heads = torch.tensor(chosen, device=v.device).unbind(1)
        return v.new_zeros(self.heads, self.size).index_copy(0, heads, v[rows, : self.size]).flatten()

    def pre(self, x: Tensor) -> Tensor:
        if "heads" not in self.plugin.state:
            return x + x * self.A.flatten().to(x.dtype)  # (1 + A) * z
        shift = self.shift()
        return x if shift is None else x + shift.to(x.dtype)  # z + v

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if "heads" not in self.plugin.state:
            return weight * (1 + self.A.flatten()).to(weight.dtype), bias
        shift = self.shift()
        if shift is None:
            return weight, bias
        constant = weight @ shift.to(weight.dtype)  # sum_h W_O[:, h] v[h]: [out]
        return weight, constant if bias is None else bias + constant


class HeadsInside(AttentionEdit):
    """The same inside attention, where W_O takes no edit of its input (a quantized one)."""

    def __init__(self, edit: Heads) -> None:
        super().__init__()
        self.edit = edit

    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        return self.edit.pre(out.flatten(-2)).view_as(out)  # [B, Q, H, d_head]


class Lofit(Plugin):
    """See the module."""

    Config = LofitConfig
    # Needs gradients: v must rest while it gets none.
    claims = {Claim.MERGEABLE, Claim.NEEDS_GRADIENTS, Claim.EDITS_INPUTS}
    architectures = ("gemma", "bloom", "gemma4")
    refuses = {"mamba": "it has no attention"}
    exempt = {
        "every_parameter_gets_a_gradient": "the first step trains A alone, v has its turn in the second"
    }
    config: LofitConfig
    edits: list[Heads]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = model.attention_sites()
        outputs = [model.site("attention.o", tower=site.tower, layer=site.layer) for site in sites]
        heads = {site.layer: model.main.by_layer[site.layer].heads for site in sites}
        sizes = [o.in_features // count for o, count in zip(outputs, heads.values(), strict=True)]
        pairs = self._pairs(heads)
        if not model.restoring:
            self.state = {} if pairs is None else {"heads": pairs}
        count = self._count(sum(heads.values())) if pairs is None else len(pairs)
        offsets = model.keep("offsets", Offsets(count, max(sizes)))
        self.edits = []
        for site, output, size in zip(sites, outputs, sizes, strict=True):
            edit = Heads(
                layer=site.layer,
                heads=heads[site.layer],
                size=size,
                choose=pairs is None,
                offsets=offsets,
                plugin=self,
            )
            self.edits.append(edit)
            if output.kind == "linear":
                output.attach(edit)
            else:
                model.attend(site, HeadsInside(edit))
                self.claims = {Claim.BESIDE_WEIGHTS, Claim.NEEDS_GRADIENTS}  # of this one: it does not fold

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        if self._choosing() and step.total is not None and step.index >= self._steps(step.total):
            self.choose()
        if self._choosing():
            step.add_loss(
                step.stack.id_of(self),
                lambda _: sum(edit.A.abs().sum() for edit in self.edits),
                self.config.l1,
                over="step",
            )
        return (yield)

    def finished(self) -> Iterable[nn.Parameter]:
        """Scales that the choice of heads threw away."""
        return [edit.A for edit in self.edits if edit.A is not None] if "heads" in self.state else []

    @torch.no_grad()
    def choose(self) -> None:
        """End the first step: keep the top heads, throw A away. `stack.train` does it; a loop of your own has to."""
        if "heads" in self.state:
            return
        self.state["heads"] = self.top_heads()
        for edit in self.edits:
            edit.A.zero_()  # stays as zeros, since a checkpoint of either step must fit this stack
            edit.A.requires_grad_(False)
            edit.A.grad = None  # one of zeros would let Adam's momentum move A on

    @torch.no_grad()
    def top_heads(self) -> list[list[int]]:
        """The K [layer, head] pairs with the largest ||A||_2, the largest first; later on, those that were chosen."""
        if "heads" in self.state:
            return self.state["heads"]
        norms = torch.cat([edit.A.float().norm(dim=-1) for edit in self.edits])  # layer by layer
        places = [[edit.layer, head] for edit in self.edits for head in range(edit.heads)]
        best = norms.sort(descending=True, stable=True).indices[: self._count(len(places))]
        return [places[index] for index in best.tolist()]

    def _choosing(self) -> bool:
        """Is the first step going on: no heads yet, and A trains (it does not while the plugin is frozen)."""
        return "heads" not in self.state and self.edits[0].A.requires_grad

    def _steps(self, total: int) -> int:
        share = self.config.selection
        steps = round(share * total)
        if share < 1 and not 0 < steps < total:
            raise TrainingError(
                f"lofit: selection={share} of {total} training steps leaves {min(steps, total - steps)} for one of "
                "the two steps of the method",
                hint="train for more steps, or give the heads",
            )
        return steps

    def _count(self, total: int) -> int:
        """K."""
        count = self.config.heads or max(1, round(SHARE * total))
        if count > total:
            raise OptionError(f"lofit: heads={count}, and the model has {total}", hint=f"at most {total}")
        return count

    def _pairs(self, heads: dict[int, int]) -> list[list[int]] | None:
        """The given pairs; None if they are to be chosen. heads: their number, by layer."""
        if not isinstance(self.config.heads, tuple):
            return None
        pairs = [list(pair) for pair in self.config.heads]
        for layer, head in pairs:
            if not 0 <= head < heads.get(layer, 0):
                raise OptionError(
                    f"lofit: there is no head {head} in layer {layer}",
                    hint=f"layer {layer} has heads 0 to {heads[layer] - 1}"
                    if layer in heads
                    else f"layers with heads: {', '.join(map(str, heads))}",
                )
        if not pairs or len(set(self.config.heads)) < len(pairs):
            raise OptionError(f"lofit: heads={pairs} names none, or one twice", hint="each pair once")
        defaults = LofitConfig()
        if (self.config.selection, self.config.l1) != (defaults.selection, defaults.l1):
            raise OptionError(
                "lofit: selection and l1 are for choosing heads, and they are given", hint="drop them"
            )
        return pairs
