"""Instruction residual: what instruction tuning changed in a released pair, put on a newly pre-trained base.

"Balancing Continuous Pre-Training and Instruction Fine-Tuning: Optimizing Instruction-Following in LLMs"
(arXiv:2410.10739). Of a released base and its instruction-tuned model (v1), and a base d1 that was pre-trained further
on new text, for every tensor:

    R              = theta_inst(v1) - theta_base(v1)
    theta_inst(d1) = theta_base(d1) + s R                    s = 1; no instruction data, and no training

A tensor over the vocabulary (embedding, head) gets rows of R for ids that stand for one and the same token in all
three, and keeps its other rows. The stack's model is the base: theta_base(d1), or theta_base(v1) beside adapters that
are pre-trained in this stack. In training steps R is off, so that the base is what learns; with `train_on: instruct`
it is on, which is the arm that the paper warns of. Everywhere else the model is theta_base + s R.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainStep, hookimpl, load_model
from peftx.errors import ArchitectureError, ConflictError, ModelError, StackError
from peftx.kernel.parts import BasePart
from peftx.kernel.trained import Trained
from peftx.toolkits.compression import base_parameters

Pair: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
Source: TypeAlias = str | PreTrainedModel | Pair
"""A folder or hub id; or a model, alone or with its tokenizer."""


def loaded(source: Source) -> Pair:
    if isinstance(source, str):
        return load_model(source)
    return source if isinstance(source, tuple) else (source, None)


class InstructionResidualConfig(PluginConfig):
    """Options of the instruction residual."""

    instruct: str | None = Field(
        None, description="theta_inst(v1), a folder or hub id; none: R comes by `put`, and is 0 until then"
    )
    base: str | None = Field(
        None, description="theta_base(v1), likewise; the stack's own model if left out (before adapters)"
    )
    scale: float = Field(1.0, allow_inf_nan=False, description="s")
    train_on: Literal["base", "instruct"] = Field(
        "base", description="which model training steps see: without R, or with it"
    )

    @model_validator(mode="after")
    def _is_a_pair(self) -> InstructionResidualConfig:
        if self.base is not None and self.instruct is None:
            raise ValueError("base without instruct is no pair: name the model that was tuned from that base")
        return self


def ties(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name -> the first name of the same parameter."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in parameters.items()}


def shared_ids(rows: int, tokenizers: Sequence[PreTrainedTokenizerBase | None]) -> Tensor:
    """Ids below `rows` that are one and the same token to all (or none to any), int64 [S]; all, where none is known."""
    words = [{i: word for word, i in t.get_vocab().items()} for t in tokenizers if t is not None]
    return torch.tensor(
        [i for i in range(rows) if len({known.get(i) for known in words}) < 2], dtype=torch.long
    )


class InstructionResidual(Plugin):
    """See the module; `identity-at-start` without `instruct`."""

    Config = InstructionResidualConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.TAKES_WEIGHTS}
    architectures = ("mixtral", "gemma2")
    exempt = {"only_declared_parameters_train": "the base's parameters carry R, and none of them trains"}
    config: InstructionResidualConfig
    places: Mapping[str, Trained] = {}
    """theta_base and theta_inst of d1, by the parameters' names."""

    def claimed(self) -> frozenset[Claim]:
        return self.claims if self.config.instruct is None else self.claims - {Claim.IDENTITY_AT_START}

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.places = model.train("re:.")  # all there are
        reached = {id(place.theta) for place in self.places.values()}
        missing = [name for name, p in base_parameters(model.module).items() if id(p) not in reached]
        packed = [site.path for site in model.anatomy.sites if site.kind == "quantized"]
        if packed:
            said = f"{packed[0]} is quantized, and R cannot be added to integers"
            raise ConflictError(f"{model.owner}: {said}", hint="quantize behind this plugin")
        if missing:
            said = f"R cannot be added to {missing[0]} of {model.config.model_type}, which stands in no known layer"
            raise ArchitectureError(f"{model.owner}: {said}", hint="a language model with attention")
        if (instruct := self.config.instruct) and not model.restoring and model.module.device.type != "meta":
            self.put(stack, instruct, self.config.base)

    def check(self, stack: Stack) -> None:
        owner = stack.id_of(self)
        if other := next((part for part in stack.ledger.all(BasePart) if part.owner != owner), None):
            said = f"{other.owner} trains the base's own {other.key}, to which R is added"
            hint = (
                "pre-train without this plugin, stack.export(), and put R on what that gives; or an adapter"
            )
            raise ConflictError(f"{owner}: {said}", hint=hint)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        off = self.config.train_on == "base"
        with step.stack.disabled(step.stack.id_of(self)) if off else nullcontext():
            return (yield)

    def finished(self) -> Iterable[nn.Parameter]:
        return [place.theta for place in self.places.values()]

    @torch.no_grad()
    def put(self, stack: Stack, instruct: Source, base: Source | None = None) -> None:
        """Make the model theta_base + s R, whatever R was there before.

        Args:
            base: theta_base(v1); the stack's own model if left out.

        Raises:
            PeftxError: the three do not have the same parameters, tied alike, but for rows of the vocabulary; or no
                token in common. Nothing has changed then.
            MergeError, PeftxError: adapters are merged, or the plugin is switched off.
        """
        owner, sources = stack.id_of(self), [instruct, *([] if base is None else [base])]
        pair = [loaded(source) for source in sources]
        theirs, rows = [base_parameters(model) for model, _ in pair], self.over_vocabulary(stack)
        for source, other in zip(sources, theirs, strict=True):
            if wrong := self.unlike(other, base_parameters(stack.model), rows):
                named = f"'{source}'" if isinstance(source, str) else "the model"
                said = f"{named} is no relative of this one: {wrong[0]} does not fit"
                hint = "same architecture, tied alike, no adapters"
                raise ModelError(f"{owner}: {said}", hint=hint)
        sizes = [len(p) for n in rows for p in (self.places[n].start, *(other[n] for other in theirs))]
        words = [stack.given_tokenizer, *(tokenizer for _, tokenizer in pair)]
        ids = shared_ids(min(sizes, default=0), words)
        if rows and not len(ids):
            raise ModelError(f"{owner}: no id is the same token in all models", hint="one family's tokenizer")
        known = {} if words[1] is None or not rows else words[1].get_vocab()
        there = set(ids.tolist())
        if lost := sorted(known.keys() - {word for word, i in known.items() if i in there}):
            told = f"{len(lost)} tokens of the tuned model are none here, or have another id, and get no residual"
            warnings.warn(f"{owner}: {told}: {', '.join(lost[:3])}", stacklevel=2)
        for place in self.places.values():
            place.part.check_unmerged()
            if not place.part.on:
                raise StackError(f"{owner} is switched off", hint="put outside of stack.disabled()")
        for name, place in self.places.items():
            start, wide = place.start, torch.float64 if place.start.dtype == torch.float32 else torch.float32
            tuned, plain = theirs[0][name], theirs[1][name] if base is not None else start
            at = ids if name in rows else slice(None)
            R = tuned[at].to(start.device, wide) - plain[at].to(start.device, wide)
            total = start.to(wide, copy=True)
            total[at] += self.config.scale * R
            place.theta.copy_(total)

    def over_vocabulary(self, stack: Stack) -> set[str]:
        """Names of the tensors with a row for each token: embedding, head, a head's bias."""
        paths = {s.path: s.role for s in stack.anatomy.sites if s.role in ("embedding", "head")}
        size = next((len(self.places[f"{p}.weight"].start) for p, r in paths.items() if r == "embedding"), -1)
        places = ((n, place) for n, place in self.places.items() if n.rpartition(".")[0] in paths)
        return {name for name, place in places if len(place.start) == size}

    def unlike(
        self, theirs: Mapping[str, nn.Parameter], own: Mapping[str, nn.Parameter], rows: set[str]
    ) -> list[str]:
        """Names of parameters that only one of two models has, or ties, or that have another shape."""
        a, b = ties(theirs), ties(own)
        names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
        shapes = ((n, theirs[n].shape, own[n].shape, n in rows) for n in self.places if n not in names)
        return names + [name for name, one, other, cut in shapes if one[cut:] != other[cut:]]
