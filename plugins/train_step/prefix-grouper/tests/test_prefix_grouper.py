"""Prefix Grouper: one row computes what G rows compute."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTTrainer

import peftx
from peftx import Stack, TrainingData
from peftx.engines.data import Collator, encode_pair
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.shapes import PAD
from peftx.toolkits.shared_rows import shared_rows
from peftx_esft import Esft
from peftx_localist_dial import LocalistDial
from peftx_lora import Lora
from peftx_prefix_grouper import (
    GroupedAttention,
    GroupedRows,
    Groups,
    PrefixGrouper,
    advantages,
    answer_log_probs,
    group,
    groups_of,
    grpo_loss,
    positions,
    ungroup,
)
from peftx_prefix_tuning import PrefixTuning
from peftx_prompt_tuning import PromptTuning

TOKENIZER = tiny_tokenizer()
SAID = {
    "Is tea nice?": ("yes", "no, never", "so so"),
    "Rain?": ("wet", "a"),
    "And how is sleep to you?\n": ("good",),
}
REWARDS = iter((1.0, 0.0, 0.25, 2.0, -1.0, 3.0))
ROWS = [{"prompt": x, "completion": y, "reward": next(REWARDS)} for x, ys in SAID.items() for y in ys]

test_conformance = conformance("prefix-grouper")

# From the authors' code at commit 1accedc, run once on these groups: `PrefixGrouper.forward` around SDPA, with q, k, v:
# sin(c * (0, 1, 2, ...)), c = 1, 0.7, 0.3: outputs of head 0, number 0; and gradients of k, head 1, number 1, of the
# sum of outputs of tokens times cos(0, 1, 2, ...).
GROUPS = [[3, 2, 1], [2, 1, 3, 2], [4, 2]]
OFFICIAL_OUT = [
    [0.0, 0.37167, 0.57681, 0.5255, 0.56073, 0.52188, 0.0, 0.0],
    [-0.17433, -0.3971, -0.53888, -0.76603, -0.62267, -0.31939, 0.01409, 0.42478],
    [0.34332, 0.6326, 0.81192, 0.582, 0.74315, 0.72202, 0.0, 0.0],
]
OFFICIAL_GRADIENT = [
    [0.00585, 0.18675, -0.07123, 0.08736, -0.04583, -0.16289, 0.0, 0.0],
    [0.22395, 0.15891, -0.00726, -0.23721, -0.01971, 0.03342, -0.14575, -0.00634],
    [-0.38755, -0.10665, 0.02134, 0.36814, 0.10485, -0.00013, 0.0, 0.0],
]


def segments_of(lengths: list[list[int]]) -> Tensor:
    rows = [[1 + i for i, n in enumerate(each) for _ in range(n)] for each in lengths]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def prepared(stack: Stack, rows: list[dict[str, Any]] = ROWS, max_length: int = 96) -> TrainingData:
    data = TrainingData(
        train=Dataset.from_list(rows), eval=None, tokenizer=TOKENIZER, seed=0, format="prompt-completion",
        max_length=max_length,
    )  # fmt: skip
    return stack.prepare(data)


def batch_of(stack: Stack, rows: list[dict[str, Any]] = ROWS) -> dict[str, Any]:
    data = prepared(stack, rows)
    assert data.train is not None
    return Collator(PAD, pad_values={"segments": 0})(list(data.train))


def build(arch: str, *others: Any, model: dict[str, Any] | None = None, **options: Any) -> Stack:
    """LoRA away from its start, in float64, and the plugin."""
    plugins = [Lora(rank=2), *others, PrefixGrouper(**options)]
    stack = Stack(tiny(arch, **(model or {})).double(), plugins, tokenizer=TOKENIZER)
    stack.model.double()
    shift(stack, 1)
    return stack


def shift(stack: Stack, seed: int, by: float = 0.1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in (p for p in stack.model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p), alpha=by)


def apart(model: torch.nn.Module, rows: list[dict[str, Any]] = ROWS) -> list[Tensor]:
    """log p of the tokens of each answer, in a row of its own."""
    found = []
    for row in rows:
        pair = encode_pair(TOKENIZER, row["prompt"], row["completion"], max_length=96)
        n = sum(label >= 0 for label in pair.labels)
        ids = torch.tensor([pair.input_ids])
        logs = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1].float().log_softmax(-1)
        found.append(logs.gather(1, ids[0, -n:, None])[:, 0])
    return found


def together(stack: Stack, batch: dict[str, Any]) -> list[Tensor]:
    ids, segments = batch["input_ids"], batch["segments"]
    groups = groups_of(segments, stack.model.dtype)
    found = answer_log_probs(stack.model(input_ids=ids, segments=segments).logits, ids, groups)
    return [row[real] for row, real in zip(found, groups.suffix >= 0, strict=True)]


def gradients(stack: Stack, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    stack.model.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.requires_grad}


def by_hand(
    rows: list[dict[str, Any]], now: list[Tensor], old: list[Tensor], clip: float, beta: float
) -> Tensor:
    """GRPO, answer by answer."""
    losses: dict[str, list[Tensor]] = {}
    for row, new, was in zip(rows, now, old, strict=True):
        rewards = [other["reward"] for other in rows if other["prompt"] == row["prompt"]]
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0
        A = (row["reward"] - statistics.mean(rewards)) / spread if spread else 0.0
        total: Any = 0.0
        for a, b in zip(new, was, strict=True):
            rho = (a - b).exp()
            total = (
                total
                + torch.min(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
                - beta * (1 / rho + rho.log() - 1)
            )
        losses.setdefault(row["prompt"], []).append(-total / len(new))
    return torch.stack([torch.stack(each).mean() for each in losses.values()]).mean()


class Given(GroupedRows):
    """Groups without a model."""

    def __init__(self, groups: Groups) -> None:
        torch.nn.Module.__init__(self)
        self.given = groups

    def groups(self) -> Groups:
        return self.given


def test_equals_the_official_code() -> None:
    segments = segments_of(GROUPS)
    q, k, v = (
        torch.arange(3 * 2 * 8 * 2.0).mul(c).sin().view(3, 2, 8, 2).requires_grad_() for c in (1.0, 0.7, 0.3)
    )
    rows = Given(groups_of(segments, torch.float32))
    out = GroupedAttention(rows).replace(q, k, v, None, 1.0, attend)
    torch.testing.assert_close(out[:, :, 0, 0], torch.tensor(OFFICIAL_OUT), atol=1e-5, rtol=0)
    weights = torch.arange(out.numel() * 1.0).cos().view_as(out)
    (found,) = torch.autograd.grad((out * weights * (segments > 0)[:, :, None, None]).sum(), k)
    torch.testing.assert_close(found[:, 1, :, 1], torch.tensor(OFFICIAL_GRADIENT), atol=1e-5, rtol=0)


def test_groups_by_hand() -> None:
    groups = groups_of(segments_of([[2, 1, 3], [3, 2]]), torch.float32)
    assert groups.prefix.tolist() == [[-1, 0, 1], [0, 1, 2]]
    assert groups.suffix.tolist() == [[2, -1, -1], [3, 4, 5], [3, 4, -1]]
    assert groups.row.tolist() == [0, 0, 1]
    assert groups.number.tolist() == [0, 1, 0]
    assert groups.length.tolist() == [2, 3]
    assert positions(groups, 6).tolist() == [[0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 0]]
    low = torch.finfo(torch.float32).min
    assert (
        set(groups.prefix_mask.flatten().tolist()) == set(groups.suffix_mask.flatten().tolist()) == {0.0, low}
    )
    seen = (groups.prefix_mask[:, 0] == 0).long().tolist()
    assert seen == [[[1, 1, 1], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    seen = (groups.suffix_mask[:, 0] == 0).long().tolist()
    assert seen[1] == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    assert seen[2][:2] == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]


def test_group_undoes_ungroup() -> None:
    segments = segments_of(GROUPS)
    groups, x = groups_of(segments, torch.float32), torch.randn(3, 2, 8, 5)
    head, tail = (part.transpose(1, 2) for part in ungroup(x, groups))
    assert torch.equal(group(head, tail, groups, 8), x.transpose(1, 2) * (segments > 0)[:, :, None, None])


@pytest.mark.parametrize(
    ("arch", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma2", "eager")]
)
def test_log_probabilities_and_gradients_are_those_of_rows(arch: str, implementation: str) -> None:
    """Of prompts and answers of several lengths in one batch."""
    stack = build(arch)
    stack.model.set_attn_implementation(f"peftx_{implementation}")
    batch = batch_of(stack)
    assert batch["input_ids"].shape[0] == 3
    for one, other in zip(together(stack, batch), apart(stack.model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    loss = lambda found: torch.stack([row.cos().sum() for row in found]).sum()  # noqa: E731
    one = gradients(stack, lambda: loss(together(stack, batch)))
    other = gradients(stack, lambda: loss(apart(stack.model)))
    for name, g in one.items():
        torch.testing.assert_close(g, other[name], atol=1e-5, rtol=1e-5)
        assert g.abs().max() > 1e-4


def test_one_answer_is_an_ordinary_row() -> None:
    stack, ids = build("llama"), torch.arange(5, 12)[None]
    with torch.no_grad():
        expected = stack.model(ids, use_cache=False).logits
        found = stack.model(ids, segments=segments_of([[3, 4]])).logits
    torch.testing.assert_close(found, expected)


def test_a_token_of_the_prompt_goes_through_the_layers_once() -> None:
    stack = build("llama")
    batch = batch_of(stack, ROWS[:3])
    through: list[int] = []
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module = stack.model.get_submodule(f"model.layers.1.{name}")
        module.register_forward_hook(lambda m, x, y: through.append(y[..., 0].numel()))
    together(stack, batch)
    rows = [encode_pair(TOKENIZER, row["prompt"], row["completion"], max_length=96) for row in ROWS[:3]]
    answers = [sum(label >= 0 for label in row.labels) for row in rows]
    prompt = len(rows[0].input_ids) - answers[0]
    assert through == [prompt + sum(answers)] * 2
    assert batch["input_ids"].shape == (1, prompt + sum(answers))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_step_is_grpo_on_rows(beta: float) -> None:
    """At the first step, and when the model has moved: pi_old is the one that the run began with."""
    stack = build("llama", beta=beta, clip=0.1)
    batch = batch_of(stack)
    old = [row.detach() for row in apart(stack.model)]
    for moved in (False, True):
        if moved:
            shift(stack, 2, by=0.3)
        stack.model.zero_grad()
        loss = stack.train_step(batch)
        found = {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.requires_grad}
        expected = by_hand(ROWS, apart(stack.model), old, 0.1, beta)
        other = gradients(stack, lambda expected=expected: expected)
        torch.testing.assert_close(loss.double(), expected.detach().double(), atol=1e-5, rtol=1e-4)
        for name, g in found.items():
            torch.testing.assert_close(g, other[name], atol=1e-5, rtol=1e-3)
    assert abs(float(loss)) > 1e-2


def test_loss_by_hand() -> None:
    now, old = torch.tensor([[0.0, 1.0, 9.0]]), torch.zeros(1, 3)
    real = torch.tensor([[True, True, False]])
    e = 2.718281828
    up = grpo_loss(now, old, torch.tensor([2.0]), real, clip=0.2, beta=0.0)
    assert float(up) == pytest.approx(-(2 + 2.4) / 2)
    down = grpo_loss(now, old, torch.tensor([-2.0]), real, clip=0.2, beta=0.0)
    assert float(down) == pytest.approx((2 + 2 * e) / 2)
    falls = grpo_loss(-now, old, torch.tensor([-2.0]), real, clip=0.2, beta=0.0)
    assert float(falls) == pytest.approx((2 + 1.6) / 2)
    held = grpo_loss(now, old, torch.tensor([0.0]), real, clip=0.2, beta=0.5)
    assert float(held) == pytest.approx(0.5 * (1 / e + 1 - 1) / 2)


def test_advantages_by_hand() -> None:
    assert advantages([1.0, 2.0, 3.0]) == [-1.0, 0.0, 1.0]
    assert advantages([0.0, 4.0]) == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert advantages([5.0, 5.0]) == [0.0, 0.0]
    assert advantages([5.0]) == [0.0]


def test_rows_of_one_prompt_are_a_group_wherever_they_stand() -> None:
    stack = build("llama")
    data, other = (prepared(stack, rows).train for rows in (ROWS, [ROWS[0], ROWS[3], *ROWS[1:3], *ROWS[4:]]))
    assert data is not None
    assert other is not None
    assert list(data) == list(other)
    first = data[0]
    assert len(data) == 3
    assert TOKENIZER.decode(
        [i for i, s in zip(first["input_ids"], first["segments"], strict=True) if s == 3]
    ) == (" no, never" + TOKENIZER.eos_token)
    assert [label >= 0 for label in first["labels"]] == [s > 1 for s in first["segments"]]
    assert [len(row["advantages"]) for row in data] == [3, 3, 3]
    assert data[1]["advantages"] == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0])
    assert data[2]["advantages"] == [0.0, 0.0, 0.0]


def test_a_group_that_leaves_no_room_for_its_prompt() -> None:
    with pytest.raises(
        DataError, match=r"the prompt '.*': the answers have \d+ and \d+ and \d+ tokens .* no room"
    ):
        prepared(build("llama"), ROWS[:3], max_length=20)


def test_rewarded_answers_become_likelier(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [Lora(rank=4), PrefixGrouper()], tokenizer=TOKENIZER)
    before = [float(row.sum().detach()) for row in apart(stack.model, ROWS[:2])]
    stack.train(ROWS, steps=5, batch_size=3, learning_rate=1e-2)
    after = [float(row.sum().detach()) for row in apart(stack.model, ROWS[:2])]
    assert after[0] - before[0] > after[1] - before[1] + 0.1
    stack.save(tmp_path)
    loaded = peftx.load(tmp_path, model=tiny("llama"), tokenizer=TOKENIZER)
    assert [float(row.sum().detach()) for row in apart(loaded.model, ROWS[:2])] == pytest.approx(
        after, abs=1e-4
    )


def test_gradient_checkpointing_recomputes_groups() -> None:
    stack = build("llama")
    batch = batch_of(stack)
    stack.train_step(batch)
    expected = {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.requires_grad}
    stack.model.zero_grad()
    stack.model.activation_checkpointing_enable()
    stack.model.train()
    stack.train_step(batch)
    for name, p in stack.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name])


def test_the_model_is_an_ordinary_one_outside_of_a_step() -> None:
    stack, base = build("llama"), Stack(tiny("llama").double(), [Lora(rank=2)])
    shift(base, 1)
    ids = torch.arange(5, 12)[None]
    batch = batch_of(stack)
    stack.train_step(batch)
    with torch.no_grad():
        assert torch.equal(stack.model(ids).logits, base.model(ids).logits)
    del batch["input_ids"]
    with pytest.raises(PeftxError, match="input_ids"):
        stack.train_step(batch)


def test_a_row_is_its_group_wherever_it_is_read() -> None:
    """By a plugin behind this one that reads rows of its own before the step, and of some rows of a batch."""
    stack = build("llama")
    batch = batch_of(stack)
    stack.train_step(batch)
    whole = together(stack, batch)
    counts = (batch["segments"].amax(1) - 1).tolist()
    for i, own in enumerate(torch.tensor(range(len(whole))).split(counts)):
        (row,) = ({name: values[i : i + 1] for name, values in batch.items()},)
        for one, n in zip(together(stack, row), own.tolist(), strict=True):
            torch.testing.assert_close(one, whole[n])
    mixture = Stack(
        tiny("mixtral"),
        [PrefixGrouper(), Esft(rows=2)],
        tokenizer=TOKENIZER,
    )
    other = Stack(tiny("mixtral"), [Esft(rows=2), PrefixGrouper()], tokenizer=TOKENIZER)
    found = [one.train(ROWS, steps=2, batch_size=2, learning_rate=1e-3).losses for one in (mixture, other)]
    assert list(found[0]) == list(found[1])
    assert mixture.plugins["esft"].state == other.plugins["esft"].state


@pytest.mark.parametrize("first", [True, False])
def test_edits_that_tell_tokens_in_an_attention_are_refused(first: bool) -> None:
    """In either order, when the stack is built; one that is opened later, in the step."""
    dial = LocalistDial(blocks={"vowels": ["a", "e"]}, dial=1.0)
    plugins = [dial, PrefixGrouper()] if first else [PrefixGrouper(), dial]
    with pytest.raises(ConflictError, match="'localist-dial' tells in an attention which token of a row"):
        Stack(tiny("llama"), plugins, tokenizer=TOKENIZER)
    closed = LocalistDial(blocks={"vowels": ["a", "e"]}, dial=0.0)
    plugins = [closed, PrefixGrouper()] if first else [PrefixGrouper(), closed]
    stack = Stack(tiny("llama"), plugins, tokenizer=TOKENIZER)
    assert stack.train(ROWS, steps=1, batch_size=2, learning_rate=1e-3).losses
    closed.dial = 1.0
    with pytest.raises(ConflictError, match="computes it in parts of rows"):
        stack.train(ROWS, steps=1, batch_size=2, learning_rate=1e-3)


def test_learned_keys_and_values_stand_before_each_text() -> None:
    stack = build("llama", PrefixTuning(length=3))
    for one, other in zip(together(stack, batch_of(stack)), apart(stack.model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_windows_shorter_than_a_row_are_refused() -> None:
    build_ = lambda window: Stack(  # noqa: E731
        tiny("mistral", sliding_window=window), [Lora(rank=2), PrefixGrouper()], tokenizer=TOKENIZER
    )
    prepared(build_(64))
    with pytest.raises(
        ArchitectureError, match=r"prefix-grouper: .*MistralForCausalLM does not keep to the mask: a token of"
    ):
        prepared(build_(4))


def test_a_model_that_does_not_compute_is_refused() -> None:
    stack = build("llama")
    with torch.no_grad():
        stack.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ArchitectureError, match="by nan"):
        prepared(stack)


@pytest.mark.parametrize("arch", ["bert", "t5", "mamba", "bloom", "qwen3_next"])
def test_models_without_room_for_groups_are_refused_before_anything_runs(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"prefix-grouper: \w+ \(attention '\w+'\) is no decoder"):
        Stack(tiny(arch), [PrefixGrouper()], tokenizer=TOKENIZER)


def test_an_attention_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArchitectureError, match="attention 'flash_attention_2'"):
        Stack(model, [PrefixGrouper()], tokenizer=TOKENIZER)


def test_refusals() -> None:
    with pytest.raises(ConflictError, match="soft tokens of"):
        Stack(tiny("llama"), [PromptTuning(length=2), PrefixGrouper()], tokenizer=TOKENIZER)
    stack = build("llama")
    for rows in ([{"prompt": "a", "completion": "b"}], [{**ROWS[0], "reward": "much"}]):
        with pytest.raises(DataError, match=r"prefix-grouper: row 0 \(counting from 0\) has no reward"):
            prepared(stack, rows)
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=rf"row 1 \(counting from 0\) has the reward {value}"):
            prepared(stack, [ROWS[0], {**ROWS[1], "reward": value}])
    text = TrainingData(
        train=Dataset.from_list([{"text": "a"}]),
        eval=None,
        tokenizer=TOKENIZER,
        seed=0,
        format="text",
        max_length=9,
    )
    with pytest.raises(UnsupportedError, match="prefix-grouper: the rows are of format 'text'"):
        stack.prepare(text)
    with pytest.raises(
        PeftxError, match="prefix-grouper: the batch has no advantages, labels, segments, but input_ids"
    ):
        stack.train_step({"input_ids": torch.ones(1, 3, dtype=torch.long)})


@pytest.mark.parametrize("options", [{"clip": 0}, {"beta": -1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(PeftxError, match=f"PrefixGrouper: {next(iter(options))}"):
        PrefixGrouper(**options)


# ------------------------------------------------------------------------------------------- under TRL's GRPOTrainer
# Its configuration sets a field that transformers renamed.
renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
LONG = "One two three four five six seven eight nine ten, and once more: "


def trainer_of(stack: Stack, folder: Path, kind: type[Trainer] = GRPOTrainer, **more: Any) -> Any:
    """Two prompts a generation, of two lengths, and four answers to each."""
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "num_generations": 4, "num_iterations": 2, "max_completion_length": 6, "bf16": False, "optim": "sgd",
        "learning_rate": 1.0, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "epsilon": 0.05, "beta": 0.0, **more,
        # Answers of several lengths: a tiny model seldom ends by itself.
        "generation_kwargs": {"sequence_bias": {(TOKENIZER.eos_token_id,): 4.0}},
    }  # fmt: skip
    config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
    return stack.trainer(kind)(
        model=stack.model, args=config(**arguments), processing_class=stack.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": LONG + x} for x in ("go", "and now")]),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
    )  # fmt: skip


def trained(
    plugins: list[Any], folder: Path, **more: Any
) -> tuple[list[float], list[list[Tensor]], list[int]]:
    """Losses and gradients of two updates on the same answers, and tokens through a layer in calls with gradients."""
    stack = Stack(tiny("llama").double(), plugins, tokenizer=TOKENIZER)
    stack.model.double()
    shift(stack, 1)
    trainer, losses, found, tokens = trainer_of(stack, folder, **more), [], [], []
    compute, update = trainer.compute_loss, trainer.create_optimizer

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        optimizer = update(*args, **kwargs)
        parameters = list(stack.ledger.parameters("lora"))
        optimizer.register_step_pre_hook(lambda *_: found.append([p.grad.clone() for p in parameters]))
        return optimizer

    def counted(module: Any, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            tokens.append(output[..., 0].numel())

    trainer.compute_loss, trainer.create_optimizer = noted, watched
    stack.model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(counted)
    trainer.train()
    return losses, found, tokens


@renamed
@pytest.mark.parametrize(
    ("kind", "batch", "most"),
    [(GRPOTrainer, 8, 0.5), (GRPOTrainer, 4, 1.0), (RLOOTrainer, 8, 0.5)],
    ids=["whole groups", "groups that a shuffle parted", "RLOO"],
)
def test_a_trainer_of_trl_over_shared_prompts_trains_as_over_rows(
    kind: type[Trainer], batch: int, most: float, tmp_path: Path
) -> None:
    """Losses and gradients of two updates; the second one's ratios are not 1."""
    more = {"kind": kind, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
    losses, expected, rows = trained([Lora(rank=2)], tmp_path, **more)
    found, gradients, tokens = trained([Lora(rank=2), PrefixGrouper()], tmp_path, **more)
    assert len(found) == len(losses) == 2 * 8 // batch
    assert found == pytest.approx(losses, abs=1e-5)
    assert max(map(abs, losses)) > 1e-3
    for one, other in zip(gradients, expected, strict=True):
        for g, h in zip(one, other, strict=True):
            torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-5)
        assert max(float(h.abs().max()) for h in other) > 1e-3
    assert sum(tokens) < most * sum(rows)


def test_shared_rows_by_hand() -> None:
    """Pads left of prompts and right of answers; two answers to one prompt, apart, and one to another."""
    ids = torch.tensor([[1, 2, 2, 3, 4, 5, 0], [0, 0, 1, 8, 9, 0, 0], [1, 2, 2, 3, 6, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    shared = shared_rows(ids, mask, 3)
    assert shared is not None
    assert shared.ids.tolist() == [[1, 2, 2, 3, 4, 5, 3, 6, 7, 7], [1, 8, 9, 0, 0, 0, 0, 0, 0, 0]]
    assert shared.segments.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3, 3], [1, 2, 2, 0, 0, 0, 0, 0, 0, 0]]
    values = shared.ids[:, -shared.keep :]
    assert shared.apart(values).tolist() == [[4, 5, 0], [9, 0, 0], [6, 7, 7]]
    assert shared_rows(ids[1:], mask[1:], 3) is None, "no prompt stands twice"
    assert shared_rows(ids[:, 3:], mask[:, 3:], 3) is None, "prompts of one token"


@renamed
def test_a_trainer_that_cannot_share_is_refused_when_it_is_made(tmp_path: Path) -> None:
    """By its class, by options that would be passed by, and by a loss over the tokens of each row."""

    def made(arch: str, **options: Any) -> Stack:
        return Stack(tiny(arch), [Lora(rank=2), PrefixGrouper(**options)], tokenizer=TOKENIZER)

    with pytest.raises(ConflictError, match="'prefix-grouper' has a loss of its own, and so has SFTTrainer"):
        made("llama").trainer(SFTTrainer)
    with pytest.raises(ConflictError, match="options of its own loss, and GRPOTrainer computes") as caught:
        made("llama", beta=0.3).trainer(GRPOTrainer)
    assert "epsilon" in str(caught.value.hint)
    with pytest.raises(ConflictError, match="the load of experts is of each row") as caught:
        trainer_of(made("mixtral"), tmp_path)
    assert "router_aux_loss_coef=0" in str(caught.value.hint)
    trainer_of(made("mixtral"), tmp_path, router_aux_loss_coef=0)


@renamed
def test_windows_shorter_than_a_row_are_refused_under_a_trainer(tmp_path: Path) -> None:
    stack = Stack(tiny("mistral", sliding_window=4), [Lora(rank=2), PrefixGrouper()], tokenizer=TOKENIZER)
    before = [p.detach().clone() for p in stack.ledger.parameters("lora")]
    with pytest.raises(ArchitectureError, match="does not keep to the mask"):
        trainer_of(stack, tmp_path).train()
    assert all(map(torch.equal, before, stack.ledger.parameters("lora")))


@renamed
def test_rows_of_their_own_while_the_plugin_is_off(tmp_path: Path) -> None:
    """And log-probabilities of another model are the trainer's own."""
    stack = build("llama")
    trainer = trainer_of(stack, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]] * 3)
    ids[:, -1] += torch.arange(3)
    through: list[int] = []
    stack.model.get_submodule("model.layers.0").register_forward_hook(
        lambda m, x, y: through.append(x[0].shape[0])
    )
    told = []
    for off in (False, True):
        with stack.disabled("prefix-grouper") if off else nullcontext(), torch.no_grad():
            told.append(
                trainer._get_per_token_logps_and_entropies(stack.model, ids, torch.ones_like(ids), 2)[0]
            )
    torch.testing.assert_close(*told, atol=1e-5, rtol=1e-5)
    assert through[0] == 1
    assert through[-1] == 3
    with torch.no_grad():
        other = trainer._get_per_token_logps_and_entropies(
            deepcopy(stack.model), ids, torch.ones_like(ids), 2
        )[0]
    torch.testing.assert_close(other, told[1])
