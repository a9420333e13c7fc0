"""The seven hooks. A plugin implements the ones its paper needs, with `@hookimpl` and any subset of the arguments.

Order: implementations run in the order of the spec's `stack`; of two wrappers, the first in the spec is the outer
one. `tryfirst` and `trylast` are refused, since they would break that promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftx.kernel.plugin import hookspec

if TYPE_CHECKING:
    import torch

    from peftx.engines.data import TrainingData
    from peftx.engines.training import TrainStep
    from peftx.kernel.stack import Stack
    from peftx.kernel.view import ModelView
    from peftx.toolkits.compression import Calibration
    from peftx.toolkits.decoding import Generation
    from peftx.toolkits.evaluation import Evaluation
    from peftx.toolkits.serving import Server


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
        """Attach deltas to slots, edits to attention, soft tokens to the input; declare what trains.

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
