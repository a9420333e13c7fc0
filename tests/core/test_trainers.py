"""A stack in trainers of other libraries: their loss, and the plugins' step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import peftx
from peftx import Claim, Plugin, Stack, hookimpl
from peftx.composition.registry import Registry
from peftx.engines.data import IGNORE, Collator, encode_pair
from peftx.engines.training import TrainStep
from peftx.engines.training.order import Shuffled
from peftx.engines.training.run import as_training_data
from peftx.errors import ConflictError, PeftxError
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.models import PAD

# TRL's configurations set a field that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

ROWS = [{"prompt": f"count {i}", "completion": f" {i + 1} {i + 2}" * (1 + i % 3)} for i in range(8)]
PAIRS = [{"prompt": f"count {i}", "chosen": f" {i + 1}", "rejected": f" {i + 7}"} for i in range(8)]
TOKENIZED = [
    {"input_ids": [3 + i, 4, 5] + [6, 7] * (i % 3), "labels": [3 + i, 4, 5] + [6, 7] * (i % 3)}
    for i in range(8)
]


class Watches(Plugin):
    """Notes steps, and adds a term that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []
        self.updates = 0

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        self.seen.append((step.index, step.micro, step.accumulation))
        step.after_update(lambda _: setattr(self, "updates", self.updates + 1))
        return (yield)


class Penalty(Plugin):
    """Adds a term that needs the model's outputs."""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Any:
        labels = step.batch.get("labels")
        told = ... if labels is None else labels[:, 1:] != IGNORE
        step.add_loss("spread", lambda outputs: outputs.logits[:, :-1][told].square().mean(), 0.1)
        return (yield)


def plugin(name: str, **options: Any) -> Plugin:
    return Registry().load(name)(**options)


def stack_of(*plugins: Plugin | tuple[str, Plugin]) -> Stack:
    return Stack(tiny("llama", seed=0), list(plugins), tokenizer=tiny_tokenizer())


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", **more,
    }  # fmt: skip


def sft(stack: Stack, kind: type[Trainer], folder: Path, **more: Any) -> Trainer:
    rows = Dataset.from_list(ROWS)
    arguments = SFTConfig(**settings(folder, **{"max_length": 32, **more}))
    return kind(model=stack.model, args=arguments, train_dataset=rows, processing_class=stack.tokenizer)


def dpo(stack: Stack, kind: type[Trainer], folder: Path, **more: Any) -> Trainer:
    arguments = DPOConfig(**settings(folder, **more), max_length=32)
    rows, more = Dataset.from_list(PAIRS), {}
    if kind is DPOTrainer:  # which would look for the base's folder
        more["ref_model"] = tiny("llama", seed=0)
    return kind(
        model=stack.model, args=arguments, train_dataset=rows, processing_class=stack.tokenizer, **more
    )


def grpo(stack: Stack, kind: type[Trainer], folder: Path) -> Trainer:
    arguments = GRPOConfig(**settings(folder), num_generations=2, max_completion_length=4)
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    return kind(
        model=stack.model, args=arguments, train_dataset=rows, processing_class=stack.tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )  # fmt: skip


def plain(stack: Stack, kind: type[Trainer], folder: Path, **more: Any) -> Trainer:
    return kind(
        model=stack.model, args=TrainingArguments(**settings(folder, **more)),
        eval_dataset=Dataset.from_list(TOKENIZED),
        train_dataset=Dataset.from_list(TOKENIZED),
        data_collator=Collator(PAD, padding_side="right"),
    )  # fmt: skip


MADE = {
    "Trainer": (Trainer, plain),
    "SFT": (SFTTrainer, sft),
    "DPO": (DPOTrainer, dpo),
    "GRPO": (GRPOTrainer, grpo),
}


def test_the_reference_of_dpo_is_the_stack_as_it_was(tmp_path: Path) -> None:
    """Trained, and on a base that was changed in memory; what nobody trains is not there twice."""
    stack = stack_of(plugin("lora"), plugin("prompt-tuning", length=3))
    stack.model.lm_head.weight.data *= 2
    stack.train(ROWS, steps=3, batch_size=2, learning_rate=1e-1)
    ids = torch.arange(3, 12)[None]
    stack.model.eval()
    with torch.no_grad():
        before = stack.model(input_ids=ids).logits
    trainer = dpo(stack, stack.trainer(DPOTrainer), tmp_path, learning_rate=1e-1)
    trainer.train()
    stack.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(trainer.ref_model(input_ids=ids).logits, before, rtol=0, atol=0)
        assert not torch.allclose(stack.model(input_ids=ids).logits, before, atol=1e-3)
    own = {p.data_ptr() for p in trainer.ref_model.parameters()} - {
        p.data_ptr() for p in stack.model.parameters()
    }
    assert len(own) == len(stack.ledger.trained())


def test_another_reference_is_taken_as_it_is_given(tmp_path: Path) -> None:
    stack, other = stack_of(plugin("lora")), tiny("llama", seed=0)
    arguments = DPOConfig(**settings(tmp_path), max_length=32)
    trainer = stack.trainer(DPOTrainer)(
        stack.model,
        other,
        arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=stack.tokenizer,
    )
    assert trainer.ref_model is other


@pytest.mark.parametrize("name", MADE)
def test_the_step_of_every_plugin_runs(name: str, tmp_path: Path) -> None:
    kind, make = MADE[name]
    watches = Watches()
    stack = stack_of(plugin("lora"), ("watches", watches))
    make(stack, stack.trainer(kind), tmp_path).train()
    assert watches.seen == [(step, micro, 2) for step in range(2) for micro in range(2)]
    assert watches.updates == 2


@pytest.mark.parametrize("name", MADE)
def test_a_step_that_changes_nothing_trains_what_the_trainer_trains(name: str, tmp_path: Path) -> None:
    kind, make = MADE[name]
    alone, stack = stack_of(plugin("lora")), stack_of(plugin("lora"), ("watches", Watches()))
    make(alone, kind, tmp_path).train()  # lora has no step of its own
    make(stack, stack.trainer(kind), tmp_path).train()
    theirs, ours = (s.ledger.tensors("lora") for s in (alone, stack))
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    moved = stack_of(plugin("lora")).ledger.tensors("lora")
    if name != "GRPO":  # its rewards may be equal, and its gradient 0
        assert not all(torch.equal(theirs[k], moved[k]) for k in theirs)


@pytest.mark.parametrize("name", MADE)
def test_without_it_a_trainer_is_stopped_before_the_first_update(name: str, tmp_path: Path) -> None:
    kind, make = MADE[name]
    stack = stack_of(plugin("lora"), ("watches", Watches()))
    before = {k: t.clone() for k, t in stack.ledger.tensors("lora").items()}
    with pytest.raises(PeftxError, match="train_step of watches did not run") as caught:
        make(stack, kind, tmp_path).train()
    assert "stack.trainer" in str(caught.value.hint)
    assert all(torch.equal(before[k], t) for k, t in stack.ledger.tensors("lora").items())


def test_sparse_fine_tuning_stays_sparse(tmp_path: Path) -> None:
    stack = stack_of(plugin("lt-sft", density=0.05))
    before = [p.detach().clone() for p in stack.model.parameters()]
    sft(stack, stack.trainer(SFTTrainer), tmp_path, max_steps=4).train()
    moved = sum(int((p != old).sum()) for p, old in zip(stack.model.parameters(), before, strict=True))
    assert 0 < moved <= 0.05 * sum(p.numel() for p in before)


def test_terms_count_as_in_the_stacks_own_training(tmp_path: Path) -> None:
    """The same rows in the same order, two to an update, one by one or at once."""
    found = []
    for size, accumulation in ((1, 2), (2, 1)):
        stack = stack_of(plugin("lora"), ("penalty", Penalty()))
        arguments = settings(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd"
        )
        stack.trainer(Trainer)(
            model=stack.model, args=TrainingArguments(**arguments), train_dataset=Dataset.from_list(TOKENIZED),
            data_collator=Collator(PAD, padding_side="right"),
        ).train()  # fmt: skip
        found.append({k: t.detach().clone() for k, t in stack.ledger.tensors("lora").items()})
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-5, atol=1e-7)


def test_what_a_trainer_saves_is_a_bundle(tmp_path: Path) -> None:
    """Checkpoints too, though the trainer puts more beside."""
    stack = stack_of(plugin("lora"))
    trainer = plain(stack, stack.trainer(Trainer), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "kept"))
    ids = torch.tensor([[5, 6, 7]])
    expected = stack.model.eval()(ids).logits
    for folder in ("kept", "checkpoint-2/bundle"):
        loaded = peftx.load(tmp_path / folder, model=tiny("llama", seed=0), tokenizer=tiny_tokenizer())
        assert torch.equal(loaded.model(ids).logits, expected)
    with pytest.raises(PeftxError, match="does not go on from a bundle"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_going_back_to_the_best_is_refused_at_once(tmp_path: Path) -> None:
    stack = stack_of(plugin("lora"))
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    with pytest.raises(PeftxError, match="best checkpoint"):
        plain(stack, stack.trainer(Trainer), tmp_path, **best)


def test_terms_without_outputs_are_refused(tmp_path: Path) -> None:
    stack = stack_of(plugin("lora"), ("penalty", Penalty()))
    with pytest.raises(PeftxError, match="asked for what the model returned"):
        grpo(stack, stack.trainer(GRPOTrainer), tmp_path).train()


def test_each_run_begins_anew(tmp_path: Path) -> None:
    """What a plugin remembers is of one run: here the model as the run began."""

    class Compares(Plugin):
        distances: list[float] = []

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            now = [p.detach().clone() for p in step.parameters()]
            with step.reference():
                start = [p.detach().clone() for p in step.parameters()]
            self.distances.append(sum(float((a - b).abs().sum()) for a, b in zip(now, start, strict=True)))
            return (yield)

    compares = Compares()
    stack = stack_of(plugin("lora"), ("compares", compares))
    for _ in range(2):
        plain(stack, stack.trainer(Trainer), tmp_path).train()
    first, second = compares.distances[:4], compares.distances[4:]
    assert first[0] == second[0] == 0
    assert first[-1] > 0


def test_two_losses_are_refused() -> None:
    with pytest.raises(
        ConflictError, match="'dpo-prefix-sharing' has a loss of its own, and so has SFTTrainer"
    ):
        stack_of(plugin("lora"), plugin("dpo-prefix-sharing")).trainer(SFTTrainer)


def test_a_plugin_that_serves_a_loss_stands_in_front_of_its_trainer(tmp_path: Path) -> None:
    """And leaves the loss to it; of a trainer that it does not serve it is refused as before."""

    class Front:
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.stack.plugins["serves"].losses += 1
            return super().compute_loss(*args, **kwargs)

    class Serves(Plugin):
        claims = {Claim.REPLACES_LOSS}
        losses = 0

        def front(self, kind: type[Trainer]) -> type | None:
            return Front if kind is SFTTrainer else None

        @hookimpl(wrapper=True)
        def train_step(self, step: TrainStep) -> Any:
            return (yield)

    serves = Serves()
    stack, alone = stack_of(plugin("lora"), ("serves", serves)), stack_of(plugin("lora"))
    for one in (stack, alone):
        sft(one, one.trainer(SFTTrainer), tmp_path, bf16=False).train()
    assert serves.losses == 4
    for name, x in alone.ledger.tensors("lora").items():
        assert torch.equal(x, stack.ledger.tensors("lora")[name])
    with pytest.raises(ConflictError, match="'serves' has a loss of its own, and so has DPOTrainer"):
        stack.trainer(DPOTrainer)


def test_another_model_is_refused_at_once(tmp_path: Path) -> None:
    stack = stack_of(plugin("lora"))
    with pytest.raises(PeftxError, match="trains another model"):
        plain(stack_of(plugin("lora")), stack.trainer(Trainer), tmp_path)


def test_dpo_with_a_shared_prefix_trains_what_dpo_of_trl_trains(tmp_path: Path) -> None:
    """Two libraries, two rows or one, and the same numbers after as many steps of the same rows."""

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
            return Shuffled(len(self.train_dataset), self.args.seed, drawn=False)

    theirs, ours = stack_of(plugin("lora")), stack_of(plugin("lora"), plugin("dpo-prefix-sharing"))
    start = {name: x.clone() for name, x in theirs.ledger.tensors("lora").items()}
    # Adam would take a gradient that is rounding alone for one.
    dpo(theirs, theirs.trainer(InOrder), tmp_path, optim="sgd", seed=3, learning_rate=1.0, bf16=False).train()
    ours.train(
        PAIRS,
        steps=2,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=1.0,
        seed=3,
        max_length=32,
        optimizer="sgd",
    )
    found, expected = (stack.ledger.tensors("lora") for stack in (ours, theirs))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-6)
    moved = [name for name, x in found.items() if not torch.allclose(x, start[name], rtol=1e-2, atol=1e-4)]
    assert len(moved) > len(found) / 2


def on_the_head() -> Plugin:
    return plugin("lora", targets="head", rank=2)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_a_loss_that_takes_the_weight_of_the_head_passes_no_plugin_by(
    tmp_path: Path, loss: str, ours: bool
) -> None:
    """TRL's losses never call the head, so that what stands on it would neither act nor train."""
    stack = stack_of(on_the_head())
    with pytest.raises(ConflictError, match="past 'lora', which stands on it") as caught:
        sft(
            stack, stack.trainer(SFTTrainer) if ours else SFTTrainer, tmp_path, bf16=False, loss_type=loss
        ).train()
    assert "'all !head'" in str(caught.value.hint)
    stack = stack_of(plugin("lora", targets="all !head", rank=2))
    sft(stack, stack.trainer(SFTTrainer), tmp_path, bf16=False, loss_type=loss).train()


@pytest.mark.parametrize("more", [{"packing": True}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("ours", [True, False])
def test_packed_rows_are_refused_where_a_soft_prompt_reaches_the_first_text_alone(
    tmp_path: Path, more: dict[str, Any], ours: bool
) -> None:
    stack = stack_of(plugin("prompt-tuning", length=3))
    with pytest.raises(ConflictError, match="texts" if not ours else "'prompt-tuning' may look across"):
        sft(stack, stack.trainer(SFTTrainer) if ours else SFTTrainer, tmp_path, bf16=False, **more).train()
    stack = stack_of(plugin("lora", rank=2))
    sft(stack, stack.trainer(SFTTrainer), tmp_path, bf16=False, **more).train()


def test_rows_with_pads_on_the_left_are_no_packed_ones() -> None:
    stack = stack_of(plugin("prompt-tuning", length=3))
    ids, mask = torch.full((2, 5), 7), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    stack.model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    )


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_with_shared_prefixes_has_the_loss_of_grpo_of_trl(beta: float, tmp_path: Path) -> None:
    """`_compute_loss` of TRL on a row an answer, and one row a group: loss and gradients, when the model has moved so
    far from the one that drew the answers that some ratios are cut."""
    said = {"Is tea nice?": (" yes", " no, never", " so so"), "Rain?": (" wet", " a", " not a bit of it")}
    rows = [{"prompt": x, "completion": y, "reward": float(len(y) % 4)} for x, ys in said.items() for y in ys]
    stack = stack_of(plugin("lora", rank=2), plugin("prefix-grouper", beta=beta, clip=0.2))
    stack.model.double()
    data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=64))
    assert data.train is not None
    batch = Collator(PAD, pad_values={"segments": 0})(list(data.train))
    pairs = [encode_pair(stack.tokenizer, r["prompt"], r["completion"], max_length=64) for r in rows]
    answers = [[i for i in pair.labels if i != IGNORE] for pair in pairs]
    prompts = [pair.input_ids[: -len(y)] for pair, y in zip(pairs, answers, strict=True)]
    width = max(map(len, prompts))
    left = torch.tensor([[PAD] * (width - len(x)) + x for x in prompts])
    right = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, answers)), True, PAD)
    inputs = {
        "prompt_ids": left, "prompt_mask": torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts]),
        "completion_ids": right,
        "completion_mask": (torch.arange(right.shape[1]) < torch.tensor([[len(y)] for y in answers])).long(),
        "advantages": batch["advantages"].flatten(),
    }  # fmt: skip
    arguments = GRPOConfig(
        **settings(tmp_path), num_generations=2, loss_type="grpo", bf16=False, use_bias_correction_kl=False
    )
    trainer = GRPOTrainer(
        model=stack.model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=stack.tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )  # fmt: skip
    trainer.beta, trainer.current_gradient_accumulation_steps = beta, 1
    ids, mask = torch.cat((left, right), 1), torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
    stack.train_step(batch)  # remembers the start
    with torch.no_grad():
        old = trainer._get_per_token_logps_and_entropies(stack.model, ids, mask, right.shape[1])[0]
        torch.manual_seed(0)
        for p in stack.ledger.parameters("lora"):
            p.add_(torch.randn_like(p), alpha=0.1)
    found = []
    for loss in (
        lambda: stack.train_step(batch),
        lambda: trainer._compute_loss(
            stack.model, {**inputs, "old_per_token_logps": old, "ref_per_token_logps": old}
        ),
    ):
        stack.model.zero_grad()
        value = loss()
        if value.requires_grad:
            value.backward()
        found.append((float(value.detach()), [p.grad.clone() for p in stack.ledger.parameters("lora")]))
    (ours, g), (theirs, h) = found
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert abs(theirs) > 1e-2
    for one, other in zip(g, h, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    mode = "train" if stack.model.training else "eval"
    assert trainer._metrics[mode]["clip_ratio/region_mean"][-1] > 0


def test_a_tree_of_drafts_is_no_packed_row() -> None:
    """Its nodes have the positions of their depth, and a mask of its own says what each sees."""
    stack = Stack("peftx:tiny", [plugin("prompt-tuning", length=3), plugin("aded")])
    alone = Stack("peftx:tiny", [plugin("prompt-tuning", length=3)])
    prompt, branches = "a b c a b d a b e a b f a b c a b d a b e a b", list[bool]()

    def note(_: object, args: object, call: dict[str, Any]) -> None:
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None and mask.ndim == 4:
            branches.append(bool((positions[..., 1:] < positions[..., :-1]).any()))

    stack.model.register_forward_pre_hook(note, with_kwargs=True)
    assert stack.generate(prompt, max_new_tokens=24) == alone.generate(prompt, max_new_tokens=24)
    assert any(branches), "each draft was one path, whose positions grow"
