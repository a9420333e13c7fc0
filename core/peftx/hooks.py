"""The seven hooks. A plugin implements the ones its paper needs, with `@hookimpl` and any subset of the arguments.

Order: implementations run in the order of the spec's `stack`; of two wrappers, the first in the spec is the outer
one. `tryfirst` and `trylast` are refused, since they would break that promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftx.plugin import PROJECT, hookspec

if TYPE_CHECKING:
    import torch

    from peftx.compression import Calibration
    from peftx.data import TrainingData
    from peftx.decoding import Generation
    from peftx.evaluation import Evaluation
    from peftx.serving import Server
    from peftx.stack import Stack
    from peftx.training import TrainStep
    from peftx.view import ModelView

HOOKS = ("prepare_data", "inject", "train_step", "compress", "decode", "serve", "evaluate")


class HookSpecs:
    """Signatures and contracts; pluggy checks every implementation against them."""

    @hookspec
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Filter, weight, mix, rewrite, pack or synthesize the training data, in place (`data.train = ...`).

        Called once before training, every plugin in order.

        Args:
            data: training and evaluation rows (`datasets.Dataset`), the tokenizer, and a seeded `rng(name)`.
            stack: the stack; its model may be asked for scores.
        """

    @hookspec
    def inject(self, model: ModelView, stack: Stack) -> None:
        """Attach deltas to slots, edits to attention, virtual tokens to the input; declare what trains.

        Called once when the stack is built, and again when a bundle is loaded (`model.restoring` is then true and
        tensors are filled in afterwards, so data-dependent initialisation is to be left out). Every plugin in order.

        Args:
            model: the anatomy of the model, bound to this plugin: what is attached through it belongs to the plugin.
            stack: the stack.
        """

    @hookspec(firstresult=True)
    def train_step(self, step: TrainStep) -> torch.Tensor | None:
        """Compute one micro-batch's loss and leave gradients (or updated parameters) behind.

        A wrapper (`@hookimpl(wrapper=True)`) adds loss terms (`step.add_loss`), edits `step.batch`, or registers
        gradient transforms (`step.on_gradients`) around its `yield`. A plain implementation replaces the step and
        must claim `REPLACES_STEP`. The first non-None result is the loss that is logged (0-d, detached).

        Args:
            step: the batch, `forward()`, loss terms, gradient transforms, the optimizer and the step's index.
        """

    @hookspec
    def compress(self, model: ModelView, calibration: Calibration, stack: Stack) -> None:
        """Quantize, prune or delta-compress; replace modules through `site.replace` so that real bytes are reported.

        Called once, every plugin in order; not called when a bundle is loaded (`Plugin.restore` is).

        Args:
            model: the anatomy of the model, bound to this plugin.
            calibration: tokenized batches, and a walk over the blocks that needs memory for one block at a time.
            stack: the stack.
        """

    @hookspec(firstresult=True)
    def decode(self, request: Generation) -> torch.Tensor | None:
        """Generate.

        A wrapper shapes logits (`request.logits_processors`), the prompt or the cache around its `yield`. A plain
        implementation replaces the loop, must claim `REPLACES_DECODING`, and returns token ids [B, T + new].

        Args:
            request: inputs, generation config, logits processors, cache and statistics.
        """

    @hookspec
    def serve(self, server: Server) -> None:
        """Change the server's policy of batching, caching and routing before it starts. Every plugin in order.

        Args:
            server: scheduler, prefix cache and routes.
        """

    @hookspec
    def evaluate(self, evaluation: Evaluation) -> None:
        """Measure: `evaluation.add(name, value, low, high, count, unit)`; figures go to `evaluation.output_dir`.

        Every plugin in order.

        Args:
            evaluation: the stack, the data to evaluate on, and the scores so far.
        """


def hooks_of(plugin: type | object) -> frozenset[str]:
    """Names of the hooks that a plugin class (or instance) implements."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    marker = f"{PROJECT}_impl"  # what `hookimpl` leaves on a function
    return frozenset(name for name in HOOKS if getattr(getattr(cls, name, None), marker, None) is not None)
