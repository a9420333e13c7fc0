"""CFSP: channels of the feed-forward layers are taken out for good, and fewer of them from blocks that do much.

"CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information"
(arXiv:2409.13199). One pass of calibration text through the model as it is gives both measures. Of the L blocks,
coarse: how far each one turns the hidden state of a token,

    G_l = mean over tokens of arccos(cos(h_in, h_out)) / pi;   z_l = sigmoid(a 26.2144 (G_l - mean G))
    k_l = (1 - rho) z_l / mean z;   where the largest is no share (k_l >= 1), all z_l are drawn towards their mean first

Block l keeps the share k_l of its d_ff channels, to the nearest multiple of 128: those of the highest score. Fine: X_j
is what channel j gives to W_down [d, d_ff] on all tokens; of the weights into and out of it their share among all
channels counts,

    D_ij = |W_down,ij| ||X_j||^b;   U_ij = |W_up,ji|;   V_ij = |W_gate,ji|, where the block has a gate
    score_j = ||X_j||^c mean_i (D_ij / sum_j D_ij + U_ij / sum_j U_ij + V_ij / sum_j V_ij)

Attention stays as it is. The blocks compute what they did with the activations of these channels at zero, in smaller
matrices. Recovery: train an adapter behind it (`lora`), with ranks in proportion to G_l (`CFSP.ranks`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import BoundSite, Claim, Evaluation, ModelView, Plugin, PluginConfig, Site, Stack, hookimpl
from peftx.errors import ArchitectureError, ModelError
from peftx.toolkits.compression import BlockInputs, Calibration, entering, text_blocks
from peftx.toolkits.compression.pruning import check_layers, cut

INTO, OUT = ("mlp.gate", "mlp.up"), "mlp.down"
"""Fewer tell nothing of a channel."""
TOKENS = 128 * 2048 / 1e4
"""The paper's calibration text over its constant: its sums over tokens, whatever the number of ours."""


class CfspConfig(PluginConfig):
    """Options of CFSP; the paper calibrates on 128 sequences of 2048 tokens of WikiText-2."""

    ratio: float = Field(0.2, ge=0, lt=1, description="rho, share of the feed-forward channels to take out")
    a: float = Field(1.0, ge=0, description="how much the blocks' shares differ; 0: not at all")
    b: float = Field(1.0, ge=0, description="power of a channel's activations beside its weights in W_down")
    c: float = Field(1.0, ge=0, description="power of a channel's activations beside its weights' shares")
    shares: Literal["channels", "hidden"] = Field(
        "channels",
        description="among what a weight's share counts; hidden: as released, where weights cancel",
    )
    multiple: int = Field(128, ge=1, description="channels of a block are left in multiples of this")


def angles(x: Tensor, y: Tensor) -> Tensor:
    """Of the tokens of two hidden states [..., T, d], in parts of a half turn, float64 [..., T]."""
    return F.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1).arccos() / torch.pi


def budget(G: Tensor, ratio: float, a: float) -> Tensor:
    """k_l: which share of its channels each block keeps, [L] float64 from G [L]; 1 - ratio on the mean, 1 at most."""
    keep, z = 1 - ratio, torch.sigmoid(a * TOKENS * (G - G.mean()))
    mean, most = z.mean(), z.max()
    if most > mean and keep * most >= mean:
        z = mean + (z - mean) * mean * (1 / keep - 1) / (most - mean) / 1.05
    return keep * z / z.mean()


def scores(weights: list[Tensor], norms: Tensor, *, b: float, c: float, among: int) -> Tensor:
    """Of each channel, [f] float64.

    Args:
        weights: W_down, and the others turned like it, [d, f]. norms: ||X_j||, [f]. among: dimension of the sums.
    """
    D = [weights[0].abs().double() * norms**b, *(W.abs().double() for W in weights[1:])]
    shares = [W / W.sum(among, keepdim=True).clamp_min(1e-300) for W in D]
    return torch.stack(shares).sum(0).mean(0) * norms**c


class CFSP(Plugin):
    """See the module."""

    Config = CfspConfig
    claims = {Claim.FOLDS_PREVIOUS, Claim.NEEDS_CALIBRATION, Claim.NARROWS}
    architectures = ("phi3",)
    least_tokens = 64
    example = {"ratio": 0.3, "multiple": 1}
    refuses = {"t5": "calibration text feeds an encoder alone"}
    config: CfspConfig

    def suits(self, model: ModelView) -> None:
        text_blocks(model)
        self.widths(model, [1 - self.config.ratio] * model.num_layers)

    def groups(self, model: ModelView) -> list[dict[str, BoundSite]]:
        """Of each block, by role, the matrices into its channels and the one out of them."""
        found: list[dict[str, BoundSite]] = [{} for _ in range(model.num_layers)]
        for site in model.anatomy.sites:
            if site.role in (*INTO, OUT) and site.layer is not None:
                found[site.layer][site.role] = model.bound(site)
        for layer, group in enumerate(found):
            into = [site.out_features for role, site in group.items() if role != OUT]
            plain = all(site.kind == "linear" and not site.read for site in group.values())
            if not (plain and into and OUT in group and {*into} == {group[OUT].in_features}):
                said = (
                    f"block {layer} of {model.config.model_type} has no channels between plain linear layers"
                )
                hint = "prune before anything is packed; experts and layers without a feed-forward part have no place"
                raise ArchitectureError(f"{model.owner}: {said}", hint=hint)
        return found

    def widths(self, model: ModelView, shares: Iterable[float]) -> list[int]:
        """Channels that each block keeps.

        Raises:
            ArchitectureError: none are left of one.
        """
        step, kept = self.config.multiple, []
        for layer, (group, k) in enumerate(zip(self.groups(model), shares, strict=True)):
            n = group[OUT].in_features
            kept.append(n if round(k * n) >= n else min(n, int((k * n + step / 2) / step) * step))
            if not kept[-1]:
                said = f"block {layer} would keep {k:.1%} of {n} channels, which rounds to none in multiples of {step}"
                raise ArchitectureError(f"{model.owner}: {said}", hint="a smaller ratio, a or multiple")
        return kept

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration) -> None:
        self.suits(model)
        groups, G, norms = self.groups(model), [], []

        def on_block(layer: int, block: nn.Module, inputs: BlockInputs) -> None:
            squares: list[Tensor] = []

            def see(module: nn.Module, x: Tensor) -> None:
                squares.append(x.flatten(0, -2).double().square().sum(0))

            with entering([groups[layer][OUT].module], see):
                before = (inputs.hidden(i) for i in range(len(inputs)))
                turned = [angles(x, y).flatten() for x, y in zip(before, inputs.advance(block), strict=False)]
            G.append(torch.cat(turned).mean())
            norms.append(torch.stack(squares).sum(0).sqrt())

        calibration.walk(model.module, [site.module for site in model.blocks("layer")], on_block)
        if not all(bool(x.isfinite().all()) for x in (*G, *norms)):
            raise ModelError(f"{model.owner}: the model computes numbers that are not finite on this text")
        shares = budget(torch.stack(G).cpu(), self.config.ratio, self.config.a).tolist()
        widths = self.widths(model, shares)
        self.state["importance"] = [float(g) for g in G]
        self.state["kept"] = [[n, group[OUT].in_features] for n, group in zip(widths, groups, strict=True)]
        for group, X, n in zip(groups, norms, widths, strict=True):
            if n < len(X):
                self.narrow(group, self.score(group, X).topk(n).indices.sort()[0])

    def score(self, group: dict[str, BoundSite], norms: Tensor) -> Tensor:
        weights = [group[OUT].weight, *(group[role].weight.mT for role in INTO if role in group)]
        among = 1 if self.config.shares == "channels" else 0
        return scores(weights, norms, b=self.config.b, c=self.config.c, among=among)

    def narrow(self, group: dict[str, BoundSite], kept: Tensor) -> None:
        """Leave these channels, in place of the matrices; those into them may be one."""
        rows: dict[str, list[Tensor]] = {}
        for site in (group[role] for role in INTO if role in group):
            every = torch.arange(site.rows.total if site.rows else site.out_features, device=kept.device)
            rows.setdefault(site.path, []).append((site.rows.take(every) if site.rows else every)[kept])
        for site in {site.path: dataclasses.replace(site, rows=None) for site in group.values()}.values():
            out = torch.cat(rows[site.path]).sort()[0] if site.path in rows else slice(None)
            site.replace(cut(site, rows=out, columns=slice(None) if site.path in rows else kept))

    def check(self, stack: Stack) -> None:
        id = stack.id_of(self)
        todo = [] if stack.standing[id].compressed else self.groups(stack.view(id))
        paths = {site.path for group in todo for site in group.values()}
        check_layers(stack, id, paths, folds=True)

    def ranks(self, rank: int) -> dict[str, int]:
        """`Lora(ranks=...)` for the recovery: in proportion to G_l, `rank` on the mean, 1 at least."""
        G = self.state["importance"]
        return {f"all layers={layer}": max(1, round(rank * len(G) * g / sum(G))) for layer, g in enumerate(G)}

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        widths = self.widths(model, [1 - self.config.ratio] * model.num_layers)
        for group, n in zip(self.groups(model), widths, strict=True):
            for site in {site.path: dataclasses.replace(site, rows=None) for site in group.values()}.values():
                yield site, site.weight.nbytes * n // group[OUT].in_features

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Which share of the channels is left: of all, and in the block with the fewest; 1 before anything is pruned.
        Numbers in the model."""
        kept = self.state.get("kept", [[1, 1]])
        evaluation.add("kept", sum(n for n, _ in kept) / sum(of for _, of in kept))
        evaluation.add("least_kept", min(n / of for n, of in kept))
        evaluation.add("parameters", evaluation.stack.base_parameters())
