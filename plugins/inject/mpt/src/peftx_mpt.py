"""Multitask prompt tuning: one prompt for all tasks and a factor of rank one for each, learned from a teacher a task.

"Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning" (arXiv:2303.02861). For tasks k = 1 .. K and the
target t, with prompts of l rows and width d and a frozen model:

    P_k = P o W_k,  W_k = u_k v_k                 P: [l, d], u_k: [l, r], v_k: [r, d], r = 1; o: entry by entry

    teachers   T_k: [l, d], a plain prompt for each source task, trained on its rows
    shared     P, u, v on rows of tasks drawn anew in each step, from 2 to K of them (rows of the others are left out):
               L = CE + lambda (KL(p(y | T_k, x) || p(y | P_k, x)) + mean (h(x | T_k) - h(x | P_k))^2)
    target     u_t, v_t = the means of u_k, of v_k; then P, u_t, v_t on the target's rows by CE alone

p is at the tokens that have labels, h the last hidden states of the text's tokens, of encoder and decoder where there
are both. With the last update of a run P_t takes the place of P and all else is gone: l d numbers, a plain prompt.

The three phases may be one run, or two: with `adapt: false` a run ends with P, u and v, and the next one on its bundle
adapts, each target from the same start.

Departures: all teachers train in one phase, on batches of mixed rows, and one schedule of the learning rate runs
through all phases; the optimizer begins anew with each.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx import (
    Claim,
    ModelView,
    PeftFormat,
    Phase,
    Plugin,
    PluginConfig,
    TrainStep,
    VirtualTokens,
    hookimpl,
)
from peftx.engines.data import IGNORE
from peftx.engines.training.updates import forget
from peftx.errors import ArchitectureError, DataError
from peftx.kernel.call import Call
from peftx.kernel.modes import eval_mode
from peftx.kernel.objective import objective_of
from peftx.peft_format import Settings

TASK = "task"
"""The column that says which task a row is of, from 0."""
TASKS = "tasks"
"""The source with the rows of all source tasks."""


class MptConfig(PluginConfig):
    """Options of multitask prompt tuning; the paper has 100 rows and 6 source tasks, at rate 0.3."""

    length: int = Field(100, ge=1, description="l, rows in front of the input")
    tasks: int = Field(6, ge=0, description="K, source tasks; 0: P and the target's factors train alone")
    rank: int = Field(1, ge=1, description="r, of a task's factor")
    init: Literal["normal", "ones"] = Field(
        "normal", description="first values of u and v: of deviation 0.02; or so that every P_k is P"
    )
    teachers: float = Field(
        0.3,
        ge=0,
        description="steps of the first phase: a share of the run's, or from 1 on their number; 0: none",
    )
    shared: float = Field(0.4, gt=0, description="steps of the second, if the target follows in the same run")
    adapt: bool = Field(True, description="go on to the target; else a run ends with the source tasks")
    weight: float = Field(0.9, ge=0, description="lambda, of what the teachers tell")
    keep_factors: bool = Field(
        False,
        description="keep P, u and v when a run ends, to train on; `collapse()` makes them one prompt then",
    )


class MptPrompt(VirtualTokens):
    """P_k for each row of the batch, by its task; the target's where it has none.

    Args:
        start: first values of P, [l, d]. teachers: of T, [K, l, d], or None. factors: of u and v, [K + 1, l, r] and
            [K + 1, r, d], the target's last; or none: P is the target's prompt already. call: of the model.
    """

    def __init__(self, start: Tensor, teachers: Tensor | None, factors: Sequence[Tensor], call: Call) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start)
        self.T = None if teachers is None else nn.Parameter(teachers)
        self.factors = nn.ParameterList(factors)
        self.call, self.teaching = call, False

    def rows(self) -> Tensor:
        """[l, d] or [B, l, d].

        Raises:
            DataError: a task that there is not.
        """
        if not len(self.factors):
            return self.P
        task: Tensor | None = self.call.batch.get(TASK)
        u, v = self.factors
        if task is None:
            return self.P * (u[-1] @ v[-1])
        each = self.T if self.teaching and self.T is not None else self.P * (u @ v)
        if not bool(((task >= 0) & (task < len(each))).all()):
            said = f"mpt: tasks {sorted(set(task.tolist()))}, and there are 0 to {len(each) - 1}"
            raise DataError(said, hint="count them from 0; `tasks` says how many there are")
        return each[task.to(each.device)]

    @contextmanager
    def under_teachers(self, on: bool = True) -> Iterator[None]:
        """Inside, rows are T_k."""
        self.teaching = on
        try:
            yield
        finally:
            self.teaching = False

    @torch.no_grad()
    def end(self, dtype: torch.dtype, *, fold: bool) -> None:
        """Let the teachers go; `fold`: and put P_t, as a model of this dtype computes it, in the place of P."""
        self.T = None
        if fold:
            self.P.copy_(deepcopy(self, {id(self.call): Call()}).to(dtype).rows())  # without the model
            self.factors = nn.ParameterList()


def told(model: PreTrainedModel, outputs: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p(y), float32 [labels, V], and h, float32 [tokens, d]."""
    labels, real = batch["labels"], batch["attention_mask"].bool()
    if not model.config.is_encoder_decoder:
        kept, logits, h = labels[:, 1:] != IGNORE, outputs.logits[:, :-1], outputs.hidden_states[-1][real]
    else:
        kept, logits = labels != IGNORE, outputs.logits
        encoded = outputs.encoder_last_hidden_state[:, -real.shape[1] :]  # behind the soft tokens
        h = torch.cat((encoded[real], outputs.decoder_hidden_states[-1][kept]))
    return logits[kept].float().log_softmax(-1), h.float()


IGNORED = ("prompt_tuning_init", "prompt_tuning_init_task", "prompt_tuning_init_state_dict_path",
           "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "token_dim", "num_layers",
           "num_attention_heads", "num_transformer_submodules")  # fmt: skip
"""What says how an adapter of HF PEFT began, or follows from the model."""


def options_of(settings: Settings) -> dict[str, Any]:
    """P, u and v of PEFT's tasks, of which the last one is the target here."""
    for name in IGNORED:
        settings[name]
    sizes = {"length": settings["num_virtual_tokens"], "tasks": settings["num_tasks"] - 1}
    return sizes | {"rank": settings["num_ranks"], "teachers": 0, "keep_factors": True}


FACTORED = PeftFormat(
    "MULTITASK_PROMPT_TUNING",
    options=options_of,
    settings=lambda config: {
        "num_virtual_tokens": config.length, "num_tasks": config.tasks + 1, "num_ranks": config.rank,
        "num_transformer_submodules": 1,
    },
    kept={
        "prompt.P": "prompt_embeddings",
        "prompt.factors.0": "prefix_task_cols",
        "prompt.factors.1": "prefix_task_rows",
    },
)  # fmt: skip
FOLDED = PeftFormat(
    "PROMPT_TUNING",
    options=lambda settings: {},
    settings=lambda config: {"num_virtual_tokens": config.length, "num_transformer_submodules": 1},
    kept={"prompt.P": "prompt_embeddings"},
)
"""To write one."""


class Mpt(Plugin):
    """See the module."""

    Config = MptConfig
    claims = {
        Claim.BESIDE_WEIGHTS,
        Claim.VIRTUAL_TOKENS,
        Claim.NEEDS_GRADIENTS,
        Claim.NEEDS_LABELS,
        Claim.NEEDS_MASK,
        Claim.REPLACES_LOSS,
        Claim.NEW_ROWS,
    }
    architectures = ("gemma",)
    refuses = {"bert": "its tasks are texts with answers"}
    exempt = {"every_parameter_gets_a_gradient": "each phase trains its own"}
    example = {"length": 3, "tasks": 2, "teachers": 1, "shared": 1}
    sources = {
        "tasks": (
            {"prompt": "2 + 2 =", "completion": " 4", "task": 0},
            {"prompt": "The sky is", "completion": " blue", "task": 1},
        )
    }
    peft = (FACTORED,)
    config: MptConfig
    prompt: MptPrompt

    def suits(self, model: ModelView) -> None:
        if objective_of(model.module) != "next-token":
            raise ArchitectureError(
                f"{model.owner}: {type(model.module).__name__} writes no answers to texts",
                hint="a decoder, or an encoder and a decoder: ...ForCausalLM, ...ForConditionalGeneration",
            )

    def phases(self) -> Sequence[Phase]:
        config, target = self.config, [Phase("target")]
        if self.state.get("sourced") or not config.tasks:
            return target
        first = [Phase("teachers", config.teachers)] if config.teachers else []
        return (
            [*first, Phase("shared", config.shared), *target] if config.adapt else [*first, Phase("shared")]
        )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, site = self.config, model.embedding()
        if not model.restoring:
            self.state = {}
        names = [phase.name for phase in self.phases()]
        folded, K = self.state.get("folded", False), config.tasks
        T = [model.embedded(config.length) for _ in range(K)] if "teachers" in names else []
        shapes = [(K + 1, config.length, config.rank), (K + 1, config.rank, site.out_features)]
        factors = [torch.randn(shape, device="cpu") * 0.02 for shape in shapes]
        if config.init == "ones":
            factors = [torch.ones(shapes[0]), torch.full(shapes[1], 1 / config.rank)]
        factors = [] if folded else [x.to(site.weight) for x in factors]
        start = model.embedded(config.length)
        self.prompt = MptPrompt(start, torch.stack(T) if T else None, factors, model.call)
        model.column(TASK)
        model.prompt(self.prompt)
        # Nothing of the source tasks is asked for any more, or they are no longer in PEFT's form.
        self.sources = {} if names == ["target"] else type(self).sources  # type: ignore[misc]
        self.peft = (FOLDED if folded else FACTORED,)  # type: ignore[misc]

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        """In the phase `shared` the term `distillation` is the divergence plus the mean square."""
        prompt, span = self.prompt, step.phase(self)
        if step.begins(self) and span.name == "target":
            self.begin_target()
        if step.index == span.first:
            step.before_update(lambda optimizer: forget(optimizer, list(prompt.parameters())))
        fold = span.name == "target" and not self.config.keep_factors
        step.at_end(partial(self.end, fold=fold), prompt.P)
        if span.name != "target":
            self.on_sources(step, taught=span.name == "shared")
        with prompt.under_teachers(span.name == "teachers"):
            return (yield)

    def begin_target(self) -> None:
        """u_t and v_t become the means, once."""
        if self.config.tasks and not self.state.get("adapted"):
            with torch.no_grad():
                for x in self.prompt.factors:
                    x[-1] = x[:-1].mean(0)
        self.state["adapted"] = True

    def on_sources(self, step: TrainStep, *, taught: bool) -> None:
        """Let the step be one on rows of source tasks; `taught`: of some of them, and by their teachers."""
        model, K, weight = (
            step.model,
            self.config.tasks,
            self.config.weight if self.prompt.T is not None else 0,
        )
        batch = step.batch_of(TASKS)
        if TASK not in batch:
            raise DataError("mpt: rows of the source 'tasks' without a task", hint="a column `task`, from 0")
        if taught and K > 1:
            drawn = torch.randperm(K, device="cpu")[: int(torch.randint(2, K + 1, (), device="cpu"))]
            kept = torch.isin(batch[TASK], drawn.to(batch[TASK].device))
            batch = {name: x[kept] for name, x in batch.items()} if bool(kept.any()) else batch
        step.batch = batch

        def task_loss() -> tuple[Tensor, Any]:
            outputs = step.forward(output_hidden_states=taught)
            return outputs.loss, outputs

        # The shares of a step's micro-batches are those of the target's rows, which these are not.
        step.replace_task_loss(task_loss, over="step")
        if not taught or not weight:
            return
        with self.prompt.under_teachers(), eval_mode(model), torch.no_grad():
            log_p, h = told(model, model(**batch, output_hidden_states=True), batch)

        def distillation(outputs: Any) -> Tensor:
            log_q, own = told(model, outputs, batch)
            return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") + F.mse_loss(own, h)

        step.add_loss("distillation", distillation, weight, over="step")

    def end(self, dtype: torch.dtype, *, fold: bool) -> None:
        """What a run ends with; `fold`: as one prompt."""
        self.prompt.end(dtype, fold=fold)
        self.state["sourced"] = True
        if fold:
            self.state["folded"], self.peft = True, (FOLDED,)  # type: ignore[misc]

    def collapse(self) -> None:
        """Put P_t in the place of P, and let all else go. `stack.train` does it; a loop of your own has to."""
        self.begin_target()
        self.end(self.prompt.P.dtype, fold=True)
