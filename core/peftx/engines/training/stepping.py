"""What a trainer of a stack does with each micro-batch, whoever wrote the rest of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from peftx.engines.training.processes import Processes, begin_alike, check_alike, check_processes
from peftx.engines.training.shares import Share, counts, shares
from peftx.engines.training.step import TrainStep
from peftx.errors import TrainingError

if TYPE_CHECKING:
    from peftx.engines.training.feeders import Feeder
    from peftx.kernel.stack import Stack


class Stepping(Trainer):
    """Makes a step of the stack of each micro-batch."""

    stack: Stack
    _micro = 0
    _shares: Sequence[Share] = ()

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        return Processes(self.args.process_index, self.args.world_size)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainingError(
                "a stack trains whole in each process, and the weights are to be sharded",
                hint="leave FSDP and DeepSpeed out: of a frozen base nothing but the adapters has gradients; or "
                "write a loop of your own over fully_shard",
            )
        # Without DistributedDataParallel: see `peftx.engines.training.processes`.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        check_processes(self.stack.members, self.processes.count)
        begin_alike(self.stack, self.processes)
        done = super().train(*args, **kwargs)
        check_alike(self.stack, self.processes, self.state.global_step)
        return done

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """These are this process's micro-batches of the next optimizer step; what part of it each is, is known from
        here on."""
        self._micro = 0
        check_alike(self.stack, self.processes, self.state.global_step)
        found = self.processes.gather([counts(self.stack.model, batch) for batch in batches])
        parts = shares([one for of_process in found for one in of_process])
        first = sum(map(len, found[: self.processes.index]))
        self._shares = parts[first : first + len(batches)] if len(parts) > 1 else ()

    def step_of(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        memory: dict[str, Any],
        sources: Mapping[str, Feeder] | None = None,
    ) -> TrainStep:
        """The step of the next micro-batch."""
        model.train()
        accumulation = self.current_gradient_accumulation_steps
        step = TrainStep(
            self.stack,
            self._prepare_inputs(inputs),
            model=model,
            index=self.state.global_step,
            micro=self._micro,
            accumulation=accumulation,
            total=self.state.max_steps,
            learning_rate=self._get_learning_rate(),
            share=self._shares[self._micro] if self._shares else None,
            memory=memory,
            backward=self.accelerator.backward,
            sources=sources,
            processes=self.processes,
            groups=self.optimizer.param_groups if self.optimizer is not None else (),
        )
        self._micro = (self._micro + 1) % accumulation
        return step
