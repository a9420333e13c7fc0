"""A plugin's view of the model: the anatomy, and the ways to change it. What is done through it is the plugin's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from peftx.errors import ArchitectureError, OptionError, PluginError, TargetError
from peftx.kernel.anatomy.anatomy import Anatomy, Heads, TowerFacts
from peftx.kernel.anatomy.site import LINEAR_KINDS, Site
from peftx.kernel.attention import AttentionEdit
from peftx.kernel.call import Call
from peftx.kernel.calls import CallEdit
from peftx.kernel.changes import (
    Owner,
    add_tokens,
    attach_delta,
    call_context,
    edit_attention,
    edit_calls,
    keep_module,
    other_tokenizer,
    put_before,
    replace_module,
    train_base,
)
from peftx.kernel.heads import Head, Pool, mean_of
from peftx.kernel.ledger import Ledger
from peftx.kernel.parts import BasePart, HasTokenizer
from peftx.kernel.positions import place_of
from peftx.kernel.slots import Delta
from peftx.kernel.targets import Targets
from peftx.kernel.trained import Trained
from peftx.kernel.virtual_tokens import Shift, VirtualTokens
from peftx.kernel.vocabulary import NewRows

D = TypeVar("D", bound=Delta)
M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=CallEdit)


@dataclass(eq=False, kw_only=True)
class BoundSite(Site):
    """A site through which one plugin may act."""

    ledger: Ledger
    owner: Owner

    @classmethod
    def of(cls, site: Site, ledger: Ledger, owner: Owner) -> BoundSite:
        bound = object.__new__(cls)  # `dataclasses.replace` would run the constructor: slow on 560 sites
        bound.__dict__.update(site.__dict__)
        bound.ledger, bound.owner = ledger, owner
        return bound

    def attach(self, delta: D) -> D:
        """Put the plugin's delta into this site's slot; returns it."""
        attach_delta(self.ledger, self.owner, self, delta)
        return delta

    def train(self, *parameters: str) -> list[nn.Parameter]:
        """Train parameters of the base itself (all of the module's if none is named); their values go into the bundle,
        the old ones come back on removal."""
        return train_base(self.ledger, self.owner, self, parameters)

    def replace(self, module: M) -> M:
        """Put a storage module (`QuantLinear`, ...) in this one's place; the bundle then holds its tensors."""
        replace_module(self.ledger, self.owner, self, module)
        return module

    def check_rank(self, rank: int) -> None:
        """Raises PeftxError where the matrix has no such rank."""
        if rank > min(self.in_features, self.out_features):
            raise OptionError(
                f"{self.owner.id}: rank {rank} exceeds the {self.out_features}x{self.in_features} matrix {self.path}",
                hint=f"rank at most {min(self.in_features, self.out_features)}, or leave it out of targets: "
                f"'!{self.role}'",
            )

    def attend(self, edit: AttentionEdit) -> None:
        """Edit the attention of one layer; of sites from `attention_sites`.

        Raises:
            ArchitectureError: the model does not dispatch its attention (Mamba, BLOOM, GPT-J, DeBERTa).
        """
        edit_attention(self.ledger, self.owner, self, edit)


class ModelView:
    """What `inject` and `compress` get as `model`.

    Args:
        anatomy: the model's anatomy. ledger: where changes are noted. by: whose they are. holder: of the tokenizer.
    """

    def __init__(
        self, anatomy: Anatomy, ledger: Ledger, by: Owner, holder: HasTokenizer | None = None
    ) -> None:
        self.anatomy = anatomy
        self._ledger = ledger
        self._by = by
        self._holder = holder

    @property
    def owner(self) -> str:
        """The plugin's id in the stack."""
        return self._by.id

    @property
    def restoring(self) -> bool:
        """Is a bundle being loaded: structure only, the tensors come from its file."""
        return self._by.restoring

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("attach", "replace"):
            raise PluginError(f"model.{name}(site, ...) is site.{name}(...) since version 0.2")
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

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

    def sites(self, targets: Targets | str, *, kinds: tuple[str, ...] = ()) -> list[BoundSite]:
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
        if targets.names_all and self.anatomy.inferred and not self.restoring:
            self._say_what_is_left_out()
        return [self.bound(site) for site in chosen]

    def _say_what_is_left_out(self) -> None:
        left, total, names = self.anatomy.uncovered()
        if left:
            warnings.warn(
                f"{self.owner}: 'all' reaches {1 - left / total:.1%} of the numbers in the layers of "
                f"{self.config.model_type}, which has no table; {names[0]} and {len(names) - 1} others are left out",
                stacklevel=4,
            )

    def linears(self, targets: Targets | str, *, whole: bool = False) -> list[BoundSite]:
        """Matrices: nn.Linear, Conv1D, quantized linears, stacked experts, routers.

        Args:
            whole: give a fused matrix (GPT-2's `c_attn`) once and whole, as soon as one of its roles is selected.
        """
        found = self.sites(targets, kinds=LINEAR_KINDS)
        if not whole:
            return found
        unique = {(s.path, s.parameter): s for s in found}
        return [replace(s, rows=None) if s.rows is not None else s for s in unique.values()]

    def norms(self, targets: Targets | str = "norm") -> list[BoundSite]:
        return self.sites(targets, kinds=("norm",))

    def blocks(self, role: str, *, tower: str | None = None) -> list[BoundSite]:
        """Modules whose output is a block's output: role `attention`, `cross_attention`, `mlp`, `ssm` or `layer`."""
        found = self.sites(f"block.{role}", kinds=("block",))
        return [site for site in found if tower is None or site.tower == tower]

    def site(self, role: str, *, tower: str | None = None, layer: int | None = None) -> BoundSite:
        """The one site of a role, bound to this plugin."""
        return self.bound(self.anatomy.site(role, tower=tower, layer=layer))

    def embedding(self) -> BoundSite:
        """The token embedding (the encoder's, where decoder and encoder each look tokens up)."""
        for site in self.anatomy.sites:  # not `get_input_embeddings()`: T5's and BART's is never called
            if site.role == "embedding":
                return self.bound(site)
        raise ArchitectureError(f"{self.owner}: {self.config.model_type} has no token embedding")

    def embedded(self, count: int, *, among: int | None = None) -> Tensor:
        """What the embedding gives for tokens that are drawn at random, [count, hidden], detached: first values of soft
        tokens. None stands twice while there are enough.

        Args:
            among: of so many first ids, which are the frequent ones in most vocabularies; of all if left out.
        """
        site = self.embedding()
        known = len(site.weight) if among is None else min(among, len(site.weight))
        ids = torch.randperm(known, device="cpu")[torch.arange(count, device="cpu") % known]
        # As the model calls it: Gemma's scales.
        found: Tensor = site.module(ids.to(site.weight.device)).detach()
        return found.to(site.weight)

    def train(
        self, targets: Targets | str, *, named: Callable[[str], bool] = lambda name: True
    ) -> dict[str, Trained]:
        """Let the parameters of the base on these sites train (weights and biases, one that is tied once); by name.

        Args:
            named: of a module's parameters, those whose name it says yes to.
        """
        found: dict[str, Trained] = {}
        for site in {site.path: site for site in self.sites(targets) if site.kind != "block"}.values():
            known = {id(place.theta) for place in found.values()}
            parameters = site.module.named_parameters(recurse=False)
            own = [n for n, p in parameters if id(p) not in known and named(n)]
            if own:
                site.train(*own)
                part = self._ledger.of(self.owner, BasePart)[-1]
                found |= {f"{site.path}.{name}": Trained(part, name) for name in own}
        return found

    def bound(self, site: Site) -> BoundSite:
        """A site of the anatomy, through which this plugin may act."""
        return BoundSite.of(site, self._ledger, self._by)

    # -- changes -------------------------------------------------------------------------------------------------

    def keep(self, name: str, module: M, *, full_precision: bool = False) -> M:
        """Own a module that stands nowhere in particular (weights shared by many deltas): it moves, trains and is
        saved with the plugin. Deltas may hold a reference to it in a tuple, so that it is no child of theirs.

        Args:
            full_precision: float32 at least, whatever the dtype of the model: half precision would lose small steps.
        """
        keep_module(self._ledger, self._by, name, module, full_precision=full_precision)
        return module

    def head(
        self, name: str, out: int, *, pool: Pool = mean_of, dropout: float = 0.0, bias: bool = True
    ) -> Head:
        """A head over the last hidden states of the model's one tower, kept as `keep` keeps it, in full precision.

        Args:
            out: numbers in an answer. pool: what becomes of a text's states; see `peftx.kernel.heads`.
            dropout: of the states, while training. bias: one for each number too.

        Raises:
            ArchitectureError: the model has two towers.
        """
        last, place = self.last_hidden(), partial(place_of, self.module)
        head = Head(self.hidden_size, out, last=last, place=place, pool=pool, dropout=dropout, bias=bias)
        return self.keep(name, head, full_precision=True)

    def last_hidden(self) -> nn.Module:
        """The module that gives the last hidden states [B, T, d]: the final norm; in an encoder its last layer's.

        Raises:
            ArchitectureError: the model has two towers.
        """
        if len(self.towers) > 1:
            raise ArchitectureError(
                f"{self.owner}: {self.config.model_type} has {' and '.join(self.towers)}, and the head reads one",
                hint="take a decoder or an encoder",
            )
        encoder = "encoder" in self.towers
        site = self.site("norm.mlp", layer=self.num_layers - 1) if encoder else self.site("norm.final")
        return site.module

    def attend(self, site: BoundSite, edit: AttentionEdit) -> None:
        """`site.attend(edit)`."""
        site.attend(edit)

    def attention_sites(self, *, tower: str | None = None, role: str = "attention") -> list[BoundSite]:
        """The modules that call the attention interface, by layer.

        Args:
            tower: the main one if left out. role: `attention` or `cross_attention`.

        Raises:
            ArchitectureError: the tower has none.
        """
        facts = self.towers[tower] if tower else self.main
        if not facts.attention:
            raise ArchitectureError(f"{self.owner}: {self.config.model_type} has no attention layers")
        paths = facts.attention if role == "attention" else facts.cross_attention
        return [
            self.bound(self.anatomy.attention_site(i, tower=facts.name, role=role))
            for i in range(facts.layers)
            if not paths or paths[i]
        ]

    def attentions(self) -> list[BoundSite]:
        """The modules that call the attention interface, of all towers, those that look at another tower last.

        Raises:
            ArchitectureError: a tower has none.
        """
        towers = list(self.towers.values())
        found = [site for tower in towers for site in self.attention_sites(tower=tower.name)]
        for tower in towers:
            if tower.cross_attention:
                found += self.attention_sites(tower=tower.name, role="cross_attention")
        return found

    def heads_of(self, site: Site) -> Heads:
        """Numbers and sizes of the heads of an attention."""
        assert site.layer is not None
        return self.towers[site.tower].by_layer[site.layer]

    def prompt(self, tokens: VirtualTokens) -> VirtualTokens:
        """Put soft tokens in front of the model's input (the encoder's, where there is one).

        Raises:
            PeftxError: they leave the text no position.
        """
        put_before(self._ledger, self._by, tokens)
        return tokens

    def around(self, edit: C) -> C:
        """See every call of the whole model: its arguments before, its output after. Returns the edit."""
        edit_calls(self._ledger, self._by, edit)
        return edit

    def vocabulary(self, add: Sequence[str], *, init: Tensor | None = None) -> NewRows:
        """Add tokens: the tokenizer knows them, the embedding and the head have rows for them, which train and are
        saved alone. `export` writes a checkpoint that is as large as the vocabulary is then.

        Args:
            add: texts that are to be one token each. init: first rows of the embedding, [n, d]; each the mean of those
                of its text's tokens up to now if left out. (A head of its own starts so in any case.)

        Returns:
            The rows; `ids` says under which numbers they go.

        Raises:
            PeftxError: no tokenizer, or a token that is there already.
        """
        if not add or len(set(add)) < len(add):
            raise OptionError(f"{self.owner}: {len(add)} new tokens, each once", hint="add=['<new>', ...]")
        head = next((site for site in self.anatomy.sites if site.role == "head"), None)
        holder = self._holder
        assert holder is not None
        return add_tokens(self._ledger, self._by, holder, (self.embedding(), head), add, init)

    def tokenizer(self, make: Callable[[Any], Any]) -> Any:
        """Put another tokenizer in the place of the stack's: rows, prompts, answers and the bundle go by it. `make`
        gives it for the old one, and the same for one that it made. Raises PeftxError where the stack has none."""
        assert self._holder is not None
        return other_tokenizer(self._ledger, self._by, self._holder, make)

    @property
    def call(self) -> Call:
        """What the model is called on, for deltas and edits to ask while it runs: tokens, pads, further columns, and
        values that go along with the cache."""
        return call_context(self._ledger, self._by)

    def column(self, name: str, *, own_length: bool = False) -> None:
        """Read a column of the batch that the model does not take: `model.call.batch[name]`. In training it comes with
        the rows, elsewhere by `stack.columns(name=...)` or as an argument of the model's call.

        Args:
            own_length: its rows are lists of whole numbers that need not be as long as the text, [B, S] in a batch, -1
                behind the end of a shorter one. A list of a row is otherwise as long as its tokens, and 0 stands for
                pads (`model.call.tokens(name)`).

        Raises:
            PeftxError: another plugin reads one of the name.
        """
        self.call.declare(name, self.owner, own_length=own_length)

    def shift_positions(self, by: int) -> None:
        """Count the position of every real token from `by` (keys and values of `by` tokens stand before them)."""
        put_before(self._ledger, self._by, Shift(by))
