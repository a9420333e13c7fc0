"""What tests/core/test_processes.py runs, in one process and in two: trains stacks and writes what came of each.

The processes are copies of this one, which has loaded all that they need: that takes longer than their trainings.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import Trainer, TrainingArguments, set_seed

from peftx import BoundSite, Claim, Delta, ModelView, Plugin, Stack, TrainStep, hookimpl
from peftx.engines.data import Collator
from peftx.engines.training.examples import examples_of
from peftx.engines.training.run import as_training_data
from peftx.errors import PeftxError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_lt_sft import LtSft
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning
from peftx_reglu import Reglu

ROWS = [{"prompt": f"{n} + {n} =", "completion": " " + "1" * (1 + n % 7)} for n in range(24)]
TEXTS = [{"text": "The sky is blue" + " and so on" * (n % 4)} for n in range(24)]


class Gain(Delta):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.g


class Late(Plugin):
    """Half of it trains from the third step on: a wrapper that knows what trained at first would leave it out."""

    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites: list[BoundSite] = list(model.norms())
        self.gains = [site.attach(Gain(site.out_features)) for site in sites]
        for gain in self.gains[1:]:
            gain.g.requires_grad_(False)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Iterator[None]:
        for gain in self.gains[1:]:
            gain.g.requires_grad_(step.index >= 2)
        return (yield)


class DecidesAlone(Late):
    """Changes what it trains by the rows of the process."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Iterator[None]:
        loss = yield
        step.after_update(lambda _: self.move(loss))
        return loss

    def move(self, loss: Tensor) -> None:
        with torch.no_grad():
            self.gains[0].g.mul_(1 + loss)


class Remembers(Late):
    """Its state is of the process that it is put on a model in."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        super().inject(model)
        self.state["process"] = os.environ.get("RANK")


def stack_of(*plugins: Plugin, arch: str = "llama") -> Stack:
    set_seed(0)
    tokenizer = tiny_tokenizer()
    if arch == "bert":
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return Stack(tiny(arch), list(plugins), tokenizer=tokenizer)


def main(folder: Path, processes: int) -> None:
    accumulation = 4 // processes
    errors: dict[str, str] = {}
    losses: dict[str, list[float]] = {}
    tensors: dict[str, Tensor] = {}

    def run(name: str, stack: Stack, rows: Any = ROWS, **options: Any) -> None:
        given = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "max_length": 64, "max_grad_norm": 0.1}
        try:
            report = stack.train(rows, **given | {"gradient_accumulation": accumulation} | options)
        except PeftxError as error:
            errors[name] = str(error)
            return
        losses[name] = [loss for _, loss in report.losses]
        keep(name, stack)

    def keep(name: str, stack: Stack) -> None:
        for id in stack.plugins:
            for key, value in stack.ledger.tensors(id).items():
                tensors[f"{name}/{id}/{key}"] = value.detach().clone()

    def sharded(name: str, stack: Stack) -> None:
        """A loop of one's own, over weights that `fully_shard` has spread."""
        model, rank = stack.model, int(os.environ.get("RANK", "0"))
        if processes > 1:
            for module in (*model.model.layers, model):
                fully_shard(module)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        batch = torch.randint(5, 30, (8, 10), generator=torch.Generator().manual_seed(0))
        own = batch.chunk(processes)[rank]
        losses[name] = []
        for _ in range(4):
            loss = model(input_ids=own, labels=own).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
        stack.save(folder / f"{name}-{processes}")
        for doing in (stack.merge, stack.compress, lambda: stack.export(folder / "exported")):
            try:
                doing()
            except PeftxError as error:
                errors[name] = errors.get(name, "") + str(error)

    run("lora", stack_of(Lora(rank=2)))
    run("lt-sft", stack_of(LtSft()))
    run("prompt-tuning", stack_of(PromptTuning(length=3)))
    run("bert", stack_of(Lora(rank=2), arch="bert"), TEXTS)
    run("late", stack_of(Late()))
    run("reglu", stack_of(Reglu(**Reglu.example)), sources={"forget": TEXTS})
    run("mezo", stack_of(Lora(rank=2), Mezo()))
    run("alone", stack_of(DecidesAlone()))
    run("whole", stack_of(Lora(rank=2, dropout=0.2)), schedule="constant")
    # An epoch has three steps: the run stops in the middle of the second one.
    kept = {"checkpoint_every": 2, "output": folder / f"half-{processes}", "schedule": "constant"}
    run("half", stack_of(Lora(rank=2, dropout=0.2)), **kept, steps=4)
    run("resumed", stack_of(Lora(rank=2, dropout=0.2)), **kept, resume=True)
    if processes > 1:
        for name, plugin in (("drawn", Lora(rank=2)), ("states", Remembers())):
            run(name, Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer(), seed=dist.get_rank()))
    sharded("sharded-lora", stack_of(Lora(rank=2)))
    sharded("sharded-prompt", stack_of(PromptTuning(length=3)))
    stack = stack_of(Lora(rank=2))
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    rows, collate = examples_of(stack, data), Collator(stack.tokenizer.pad_token_id, encoder_decoder=False)
    trainer = stack.trainer(Trainer)(
        model=stack.model, args=arguments, train_dataset=rows, data_collator=collate
    )
    trainer.train()
    trainer.save_model()
    keep("trainer", stack)
    index = dist.get_rank() if processes > 1 else 0
    (folder / f"{processes}-{index}.json").write_text(json.dumps({"errors": errors, "losses": losses}))
    save_file(tensors, folder / f"{processes}-{index}.safetensors")


def start(folder: Path) -> None:
    """One process, then two as torchrun starts them, but for what it makes them of."""
    for arch in ("llama", "bert"):
        tiny(arch)  # loads the classes; nothing is trained: the threads of a training do not outlive a fork
    gc.freeze()  # or the collection of all that is loaded, which ends each training, takes longer than it
    one = multiprocessing.get_context("fork").Process(target=main, args=(folder, 1))
    one.start()
    one.join()
    if one.exitcode:
        sys.exit(f"the one process ended with {one.exitcode}")
    standalone: Any = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "two-processes"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", **standalone)
    elastic_launch(config, entrypoint=main)(folder, 2)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    start(Path(sys.argv[1]))
