"""A plugin's view of the model: the anatomy, and the ways to change it. What is done through it is the plugin's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from peftx.anatomy.anatomy import Anatomy
from peftx.anatomy.site import LINEAR_KINDS, Site
from peftx.anatomy.targets import Targets
from peftx.errors import ArchitectureError, TargetError
from peftx.slots import Delta

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from peftx.anatomy.anatomy import TowerFacts
    from peftx.attention import AttentionEdit
    from peftx.calls import CallEdit
    from peftx.ledger import Ledger
    from peftx.virtual_tokens import VirtualTokens

D = TypeVar("D", bound=Delta)
M = TypeVar("M", bound=nn.Module)


class ModelView:
    """What `inject` and `compress` get as `model`.

    Args:
        anatomy: the model's anatomy. ledger: where changes are noted. owner: the plugin's id in the stack.
        rank: its place in the stack. restoring: a bundle is being loaded: structure only, tensors come from the file.
    """

    def __init__(
        self, anatomy: Anatomy, ledger: Ledger, owner: str, rank: int, *, restoring: bool = False
    ) -> None:
        self.anatomy = anatomy
        self.owner = owner
        self.rank = rank
        self.restoring = restoring
        self._ledger = ledger

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def module(self) -> PreTrainedModel:
        """The `transformers` model itself."""
        return self.anatomy.model

    @property
    def config(self) -> PretrainedConfig:
        return self.anatomy.config

    @property
    def main(self) -> TowerFacts:
        """Sizes of the tower that speaks (decoder, else the only one)."""
        return self.anatomy.main

    @property
    def towers(self) -> dict[str, TowerFacts]:
        return self.anatomy.towers

    @property
    def hidden_size(self) -> int:
        return self.anatomy.hidden_size

    @property
    def num_layers(self) -> int:
        return self.anatomy.num_layers

    # -- places --------------------------------------------------------------------------------------------------

    def sites(self, targets: Targets | str, *, kinds: tuple[str, ...] = ()) -> list[Site]:
        """All sites that `targets` selects, of these kinds (any if empty), bound to this plugin.

        Raises:
            TargetError: a word of the targets matches nothing.
        """
        targets = Targets(targets) if isinstance(targets, str) else targets
        candidates = [s for s in self.anatomy.sites if not kinds or s.kind in kinds]
        depth = max((facts.layers for facts in self.towers.values()), default=0)
        try:
            chosen = targets.select(candidates, layers=depth)
        except TargetError as error:
            raise TargetError(f"{self.owner}: {error.message}", hint=error.hint) from error
        return [site.bound(self) for site in chosen]

    def linears(self, targets: Targets | str, *, whole: bool = False) -> list[Site]:
        """Matrices: nn.Linear, Conv1D, quantized linears, stacked experts, routers.

        Args:
            whole: give a fused matrix (GPT-2's `c_attn`) once and whole, as soon as one of its roles is selected.
        """
        found = self.sites(targets, kinds=LINEAR_KINDS)
        if not whole:
            return found
        unique = {(s.path, s.parameter): s for s in found}
        return [replace(s, rows=None) if s.rows is not None else s for s in unique.values()]

    def norms(self, targets: Targets | str = "norm") -> list[Site]:
        return self.sites(targets, kinds=("norm",))

    def blocks(self, role: str, *, tower: str | None = None) -> list[Site]:
        """Modules whose output is a block's output: role `attention`, `cross_attention`, `mlp`, `ssm` or `layer`."""
        return [
            s.bound(self)
            for s in self.sites(f"block.{role}", kinds=("block",))
            if tower is None or s.tower == tower
        ]

    def site(self, role: str, *, tower: str | None = None, layer: int | None = None) -> Site:
        """The one site of a role, bound to this plugin."""
        return self.anatomy.site(role, tower=tower, layer=layer).bound(self)

    def embedding(self) -> Site:
        """The token embedding (the encoder's, where decoder and encoder each look tokens up)."""
        for site in self.anatomy.sites:  # not `get_input_embeddings()`: T5's and BART's is never called
            if site.role == "embedding":
                return site.bound(self)
        raise ArchitectureError(f"{self.owner}: {self.config.model_type} has no token embedding")

    # -- changes -------------------------------------------------------------------------------------------------

    def attach(self, site: Site, delta: D) -> D:
        """Put a delta into a site's slot. `site.attach(delta)` is the same."""
        self._ledger.add_delta(self, site, delta)
        return delta

    def train(self, site: Site, parameters: tuple[str, ...] = ()) -> list[nn.Parameter]:
        """Train parameters of the base itself; their values go into the bundle, the old ones come back on removal."""
        return self._ledger.add_base(self, site, parameters)

    def replace(self, site: Site, module: M) -> M:
        """Put a storage module in the site's place."""
        self._ledger.add_replacement(self, site, module)
        return module

    def keep(self, name: str, module: M) -> M:
        """Own a module that stands nowhere in particular (weights shared by many deltas): it moves, trains and is
        saved with the plugin. Deltas may hold a reference to it in a tuple, so that it is no child of theirs."""
        self._ledger.add_free(self, name, module)
        return module

    def attend(self, site: Site, edit: AttentionEdit) -> None:
        """Edit the attention of one layer; `site` from `attention_sites`.

        Raises:
            ArchitectureError: the model does not dispatch its attention (Mamba, BLOOM, GPT-J, DeBERTa).
        """
        self._ledger.add_attention(self, site, edit)

    def attention_sites(self, *, tower: str | None = None, role: str = "attention") -> list[Site]:
        """The modules that call the attention interface, by layer.

        Args:
            tower: the main one if left out. role: `attention` or `cross_attention`.

        Raises:
            ArchitectureError: the tower has none.
        """
        facts = self.towers[tower] if tower else self.main
        if not facts.attention:
            raise ArchitectureError(f"{self.owner}: {self.config.model_type} has no attention layers")
        return [
            self.anatomy.attention_site(i, tower=facts.name, role=role).bound(self)
            for i, path in enumerate(facts.attention if role == "attention" else facts.cross_attention)
            if path
        ]

    def prompt(self, tokens: VirtualTokens) -> VirtualTokens:
        """Put soft tokens in front of the model's input (the encoder's, where there is one).

        Raises:
            PeftxError: they leave the text no position.
        """
        self._ledger.add_prompt(self, tokens)
        return tokens

    def around(self, edit: CallEdit) -> None:
        """See every call of the whole model: its arguments before, its output after."""
        self._ledger.add_call(self, edit)

    def shift_positions(self, by: int) -> None:
        """Count the position of every real token from `by` (keys and values of `by` tokens stand before them)."""
        self._ledger.add_shift(self, by)
