"""Plugins that go wrong in training, or afterwards."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Phase, Plugin, Stack, TrainingData, TrainStep, hookimpl
from peftx.engines.training.restarts import go_back, remember_start
from peftx.errors import DataError

Wrapper = Generator[None, Tensor, Tensor]


class _Gain(Delta):
    """y g, g: [out], starts at one."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.g.to(y.dtype)


class _Idle(_Gain):
    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.unused = nn.Parameter(torch.zeros(1))


class HasAnIdleParameter(Plugin):
    """One parameter takes no part in the output."""

    caught_by = "every_parameter_gets_a_gradient"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Idle(site.out_features))


class ReturnsAVector(Plugin):
    """The loss has a dimension too many."""

    caught_by = "step_returns_the_loss"
    also = {"trains_in_the_trainer", "resume_is_exact"}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        loss = yield
        return loss[None]


class WritesIntoTheBase(Plugin):
    """Each step moves a norm of the frozen base."""

    caught_by = "base_untouched_by_training"
    also = {"trains_in_the_trainer", "resume_is_exact"}
    also |= {"accumulation_makes_the_same_step"}  # the second row sees the base that the first one moved
    also |= {"composes_with_weights", "composes_with_norms", "composes_with_prompt"}  # the bundle misses it

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        loss = yield
        with torch.no_grad():
            next(p for n, p in step.model.named_parameters() if "norm" in n).add_(0.01)
        return loss


class LeavesATrace(Plugin):
    """Writes into the model's configuration, and does not clean up."""

    caught_by = "remove_restores_base"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.config.note = "was here"
        for site in model.norms():
            site.attach(_Gain(site.out_features))


class HooksTheModel(Plugin):
    """A forward hook that no switch reaches."""

    caught_by = "disable_restores_base"
    also = {"remove_restores_base", "composes_with_weights", "composes_with_norms", "composes_with_prompt"}
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        site = model.norms()[0]
        site.attach(_Gain(site.out_features))
        site.module.register_forward_hook(_half_as_much_again)


def _half_as_much_again(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out * 1.5


class _Counting(_Gain):
    """Every second call in training counts double."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            return super().forward(x, y) * (1 + self.calls % 2)
        return super().forward(x, y)


class CountsItsCalls(Plugin):
    """Recomputed activations are not the first ones."""

    caught_by = "gradient_checkpointing"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.attention"):
            site.attach(_Counting(site.out_features))


class _Faint(_Counting):
    """y + 2e-5 c y (g - 1); c, a factor of the gradient of g, is 2 and 1 by turns in training."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += self.training
        c = 1 + self.calls % 2 if self.training else 1
        return y + 2e-5 * (y * c) * (self.g - 1).to(y.dtype)


class CountsWhatIsHardlyThere(Plugin):
    """Its gradient is small beside that of its other part, and is wrong by half."""

    caught_by = "gradient_checkpointing"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms("norm.attention"):
            site.attach(_Faint(site.out_features))
        for site in model.norms("norm.mlp"):
            site.attach(_Gain(site.out_features))


class _Wide(_Gain):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.g.float()


class Widens(Plugin):
    """Turns bfloat16 activations into float32."""

    caught_by = "bfloat16"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Wide(site.out_features))


class KeepsGradients(Plugin):
    """Claims to replace the step by one without gradients, and leaves them lying about."""

    caught_by = "step_makes_no_gradients"
    claims = {Claim.REPLACES_STEP}

    @hookimpl
    def train_step(self, step: TrainStep) -> Tensor:
        loss = step.total_loss()
        loss.backward()
        with torch.no_grad():
            for parameter in step.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=step.learning_rate)
        return loss.detach()


class ClipsInSecret(Plugin):
    """Edits gradients without saying that it needs them."""

    caught_by = "gradient_transforms_are_claimed"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        step.on_gradients(lambda parameters: None)
        return (yield)


class CountsRowsAsTokens(Plugin):
    """A mean over rows, which it says is one over labelled tokens."""

    caught_by = "accumulation_makes_the_same_step"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        step.add_loss("size", lambda outputs: outputs.logits.square().mean(), weight=1e-2)
        return (yield)


class FailsInTheTrainer(Plugin):
    """Works in a loop of one's own only."""

    caught_by = "trains_in_the_trainer"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        loss = yield
        return loss if step.total is None else torch.tensor(float("nan"))


class ForgetsItsPlace(Plugin):
    """Counts steps in an attribute that no checkpoint holds."""

    caught_by = "resume_is_exact"
    also = {"accumulation_makes_the_same_step"}

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.count = 0

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        self.count += 1
        weight = 0.1 * self.count
        step.add_loss("size", lambda outputs: outputs.logits.square().mean(), weight=weight, over="rows")
        return (yield)


class LeavesTokens(Plugin):
    """Tells the tokenizer of new tokens past `model.vocabulary`, so that nobody takes them back."""

    caught_by = "remove_restores_base"
    claims = {Claim.BESIDE_WEIGHTS, Claim.IDENTITY_AT_START}

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if "<left>" not in stack.tokenizer.get_vocab():
            stack.tokenizer.add_tokens(["<left>"])
        for site in model.norms():
            site.attach(_Gain(site.out_features))


class TwoPhasesOfOneName(Plugin):
    """Nobody can tell which phase it is."""

    caught_by = "phases_fit"
    claims = {Claim.BESIDE_WEIGHTS, Claim.IDENTITY_AT_START}

    def phases(self) -> Sequence[Phase]:
        return (Phase("tune", 0.5), Phase("tune"))

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Gain(site.out_features))


class StartsAgainUnsaid(Plugin):
    """Its second phase begins where the run began, for all plugins."""

    caught_by = "going_back_is_claimed"
    claims = {Claim.BESIDE_WEIGHTS, Claim.IDENTITY_AT_START}

    def phases(self) -> Sequence[Phase]:
        return (Phase("try", 1), Phase("tune"))

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Gain(site.out_features))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        known = remember_start(step, self)
        if step.begins(self) and step.index:
            go_back(step, known)
        return (yield)


class MovesWhatItMasked(Plugin):
    """Trains half of the entries, and moves the others too."""

    caught_by = "masks_hold"
    also = {"resume_is_exact"}
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.places = model.train("attention.q attention.o")

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        def pull(_: torch.optim.Optimizer) -> None:
            with torch.no_grad():
                for place in self.places.values():
                    place.theta.mul_(0.999)

        for place in self.places.values():
            mask = torch.zeros_like(place.theta, dtype=torch.bool)
            mask[::2] = True
            place.restrict(mask)
        step.after_update(pull)
        return (yield)


class HidesItsLoss(Plugin):
    """Its step puts a loss in the place of the task's, and nobody is told."""

    caught_by = "a_loss_of_its_own_is_claimed"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Wrapper:
        step.replace_task_loss(step._task_loss)
        return (yield)


class RunsByItself(Plugin):
    """Says that its layers cannot run one by one, and they can."""

    caught_by = "layers_run_by_themselves"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.WHOLE_CALLS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Gain(site.out_features))


class LosesColumns(Plugin):
    """Makes rows anew, and does not say so."""

    caught_by = "further_columns_stay"

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        if not data.train:
            raise DataError("loses-columns: no rows")
        names = [name for name in data.train.column_names if name in ("text", "prompt", "completion")]
        data.train = Dataset.from_list([{name: row[name] for name in names} for row in data.train])


class ReadsAColumn(Plugin):
    """Works by a column of its rows, and does not say so."""

    caught_by = "columns_that_are_read_are_claimed"
    example_rows = [{"text": f"One, two, {n}.", "kind": "count"} for n in range(4)]

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        if not data.train or "kind" not in data.train.column_names:
            raise DataError("reads-a-column: rows with a column 'kind' are needed")
        data.train = data.train.filter(lambda row: row["kind"] == "count")


class WorksOnNothing(Plugin):
    """Says that it works on what stands before it, and brings its own."""

    caught_by = "works_on_previous"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.WORKS_ON_PREVIOUS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Gain(site.out_features))


class HoldsItsGraph(Plugin):
    """Notes what it computed, with the graph of it."""

    caught_by = "trained_model_is_copied"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    class Noting(_Gain):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.noted = super().forward(x, y)
            return self.noted

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(self.Noting(site.out_features))


class PassesNoLayer(Plugin):
    """Says that it computes layers past their modules, and leaves them alone."""

    caught_by = "layers_are_passed_by"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.PASSES_LAYERS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Gain(site.out_features))


class SaysThatItTakesWeights(Plugin):
    """And stands on norms."""

    caught_by = "stands_on_integers"
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.TAKES_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_Gain(site.out_features))
