"""One check's world: fresh models, stacks with the plugin, inputs, batches, and comparisons that show numbers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from peftx.engines.training.feeders import OWN, Feeder
from peftx.errors import PeftxError, PluginError
from peftx.kernel.calls import columns_of, own_lengths_of
from peftx.kernel.chain import is_ours
from peftx.kernel.parts import BasePart
from peftx.kernel.plugin import Plugin
from peftx.stack import Stack
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.reference import COMPANION, ReferenceLowRank
from peftx.testing.shapes import Padding
from peftx.testing.subject import DECODERS, ENCODER_DECODERS, ROWS, TEXT, TEXTS, Subject, steps_for

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peftx.engines.data import Collator, TrainingData

E = TypeVar("E", bound=PeftxError)

"""Names of the child modules that hold what plugins attach."""


@cache
def _base(arch: str) -> PreTrainedModel:
    return tiny(arch).requires_grad_(
        False
    )  # as in a stack; some kernels round differently where a gradient could run


@cache
def _base_output(arch: str, dtype: torch.dtype, padding: Padding) -> Tensor:
    model = copy.deepcopy(_base(arch)).to(dtype)
    return output(model, inputs_for(model, padding=padding))


def inputs_for(model: PreTrainedModel, *, padding: Padding = None, batch: int = 2) -> dict[str, Tensor]:
    """`example_inputs`, in the model's dtype, with the positions that left padding needs."""
    inputs = example_inputs(model, batch=batch, padding=padding)
    if padding == "left" and "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's main output in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return output_of(model, inputs)


class Case:
    """What a check gets.

    Args:
        subject: the plugin. arch: the architecture ("" for checks without a model). folder: an empty one, for files.
    """

    def __init__(self, subject: Subject, arch: str, folder: Path) -> None:
        self.subject = subject
        self.arch = arch
        self.folder = folder

    @property
    def id(self) -> str:
        return self.subject.id

    # -- building ------------------------------------------------------------------------------------------------

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A fresh copy of the base."""
        return copy.deepcopy(_base(self.arch)).to(dtype)

    def stack(
        self,
        before: Sequence[tuple[str, Plugin]] = (),
        after: Sequence[tuple[str, Plugin]] = (),
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        inject: bool = True,
    ) -> Stack:
        """The plugin on a fresh model, between others; nothing is compressed yet."""
        plugins = [*before, (self.id, self.subject.make()), *after]
        return Stack(self.model(dtype), plugins, tokenizer=tiny_tokenizer(), seed=seed, inject=inject)

    def training_stack(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Stack:
        """A stack in which something trains: with a companion where the plugin brings no parameters of its own."""
        stack = self.stack(seed=seed, dtype=dtype)
        if stack.trainable_parameters():
            return stack
        return self.stack(before=[(COMPANION, ReferenceLowRank())], seed=seed, dtype=dtype)

    def finished(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Stack:
        """As after training: the plugin's parameters moved off their start, and the model compressed, if it is."""
        stack = self.stack(seed=seed, dtype=dtype)
        self.perturb(stack)
        self.compress(stack)
        return stack

    def compress(self, stack: Stack, texts: Sequence[str] | None = TEXTS) -> None:
        """Run the plugin's `compress` hook, if it has one."""
        if self.subject.implements("compress"):
            stack.compress(texts, [self.id], samples=4, length=24)

    def perturb(self, stack: Stack, *, size: float = 0.02, seed: int = 0) -> None:
        """Add Gaussian noise to everything that the plugins train."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for owner in stack.plugins:
                for parameter in stack.ledger.parameters(owner):
                    if parameter.is_floating_point():
                        noise = torch.randn(parameter.shape, generator=generator) * size
                        parameter.add_(noise.to(parameter.dtype))

    # -- running -------------------------------------------------------------------------------------------------

    def inputs(self, *, padding: Padding = None) -> dict[str, Tensor]:
        return inputs_for(_base(self.arch), padding=padding)

    def output(self, stack: Stack, *, padding: Padding = None) -> Tensor:
        return output(stack.model, inputs_for(stack.model, padding=padding))

    def base_output(self, *, dtype: torch.dtype = torch.float32, padding: Padding = None) -> Tensor:
        """What the model computes without any plugin."""
        return _base_output(self.arch, dtype, padding)

    @property
    def padding(self) -> Padding:
        """The side on which this architecture pads."""
        return "left" if self.arch in DECODERS or self.arch == "llava" else "right"

    def batch(self, stack: Stack) -> dict[str, Any]:
        """Arguments of the model, with labels; made of the author's rows where the plugin deals with data."""
        subject = self.subject
        if self.arch in TEXT and (subject.implements("prepare_data") or subject.rows is not ROWS):
            return self._prepared_batch(stack)
        inputs: dict[str, Any] = dict(inputs_for(stack.model))
        kind = stack.model.config.model_type
        if kind == "clip":
            inputs["return_loss"] = True
        elif kind == "vit":
            inputs["labels"] = torch.arange(len(inputs["pixel_values"])) % stack.model.config.num_labels
        elif "decoder_input_ids" in inputs:
            inputs["labels"] = inputs.pop("decoder_input_ids")
        else:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def _prepared_batch(self, stack: Stack) -> dict[str, Any]:
        from peftx.engines.training.run import as_training_data

        data = stack.prepare(as_training_data(stack, list(self.subject.rows), seed=0, max_length=96))
        return self._collator(stack)(list(self._tokenized(stack, data))[:2])

    def sources(self, stack: Stack) -> dict[str, Feeder]:
        """The plugin's further sources, and its own rows, as a run gives them to its step."""
        from peftx.engines.training.run import as_training_data

        needed = self.subject.plugin.sources
        if not needed or self.arch not in TEXT:
            return {}
        named = {OWN: self.subject.rows, **needed}
        tokenized = {
            name: self._tokenized(stack, as_training_data(stack, list(rows), seed=0, max_length=96))
            for name, rows in named.items()
        }
        collate = self._collator(stack)
        return {name: Feeder(rows, collate, size=2, seed=0, name=name) for name, rows in tokenized.items()}

    def _tokenized(self, stack: Stack, data: TrainingData) -> Dataset:
        from peftx.engines.data import tokenize_dataset

        assert data.train is not None
        return tokenize_dataset(
            data.train, stack.tokenizer, format=data.format, max_length=data.max_length,
            encoder_decoder=self.arch in ENCODER_DECODERS,
            keep=[name for name in columns_of(stack.model) if name in data.train.column_names],
        )  # fmt: skip

    def _collator(self, stack: Stack) -> Collator:
        from peftx.engines.data import Collator

        return Collator(
            stack.tokenizer.pad_token_id, encoder_decoder=self.arch in ENCODER_DECODERS,
            pad_values=dict.fromkeys(columns_of(stack.model), 0), own_lengths=own_lengths_of(stack.model),
        )  # fmt: skip

    @property
    def total(self) -> int | None:
        """Steps that a loop says it has, where a phase is a share of them: so many that each phase has one."""
        plugin = self.subject.make()
        shares = any(phase.share is not None and phase.share < 1 for phase in plugin.phases())
        return steps_for(plugin) if shares else None

    def train(self, stack: Stack, steps: int, *, rate: float = 1e-2) -> list[float]:
        """A plain loop on one batch; returns the losses."""
        batch, sources = self.batch(stack), self.sources(stack)
        trained = [p for p in stack.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        stack.model.train()
        given = {"optimizer": optimizer, "sources": sources, "total": self.total and max(steps, self.total)}
        losses = [float(stack.train_step(batch, **given)) for _ in range(steps)]
        stack.model.eval()
        return losses

    def gradients(self, stack: Stack) -> tuple[float, dict[str, Tensor | None]]:
        """One step without an optimizer, seeded: the loss, and the gradient of everything that trains, by name."""
        torch.manual_seed(0)
        stack.model.train()
        loss = float(stack.train_step(self.batch(stack), sources=self.sources(stack), total=self.total))
        stack.model.eval()
        return loss, {name: p.grad for name, p in stack.model.named_parameters() if p.requires_grad}


# -- looking -------------------------------------------------------------------------------------------------------


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the base by name, without what plugins attached; copies."""
    return {name: tensor.detach().clone() for name, tensor in _own(model)}


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if not is_ours(name):
            yield name, tensor


def declared_base(stack: Stack) -> set[str]:
    """Names of the base's parameters that a plugin says it trains."""
    declared = {id(t) for part in stack.ledger.all(BasePart) for t in part.tensors().values()}
    return {name for name, tensor in _own(stack.model) if id(tensor) in declared}


def error_of(kind: type[E], call: Callable[[], object]) -> E | None:
    """The error of this kind that `call` raises; None if it raises none."""
    try:
        call()
    except kind as error:
        return error
    return None


def crashed(error: PeftxError) -> bool:
    """Was it a crash inside a hook, that the core wrapped, and no message that somebody wrote."""
    cause = error.__cause__
    return isinstance(error, PluginError) and cause is not None and not isinstance(cause, PeftxError)


# -- comparing -----------------------------------------------------------------------------------------------------


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or something is not a number."""
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0:
        return 0.0
    largest = float((one.double() - other.double()).abs().max())
    return largest if largest == largest else float("inf")


def assert_equal(one: Tensor, other: Tensor, what: str) -> None:
    """Bit for bit (0.0 and -0.0 count as equal)."""
    assert one.shape == other.shape, f"{what}: shapes {tuple(one.shape)} and {tuple(other.shape)}"
    assert one.dtype == other.dtype, f"{what}: {one.dtype} and {other.dtype}"
    assert torch.equal(one, other), f"{what}: largest difference {difference(one, other):.3g}, must be 0"


def largest(tensor: Tensor) -> float:
    """Largest absolute value; 0 of an empty one."""
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def assert_close(one: Tensor, other: Tensor, tolerance: float, what: str, *, least: float = 1e-12) -> None:
    """Within `tolerance`, relative to the largest absolute value of `other`, or to `least` where that is more."""
    scale = max(largest(other), least)
    relative = difference(one, other) / scale
    assert relative <= tolerance, (
        f"{what}: largest difference {relative:.3g} of the scale {scale:.3g}, allowed {tolerance:g}"
    )


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """The same names, and under each the same bits."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert found.keys() == expected.keys(), f"{what}: missing {missing[:3]}, extra {extra[:3]}"
    changed = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not changed, (
        f"{what}: {len(changed)} of {len(expected)} tensors differ, first {changed[0]} by "
        f"{difference(found[changed[0]], expected[changed[0]]):.3g}"
    )
