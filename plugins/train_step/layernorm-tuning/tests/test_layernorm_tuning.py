from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Claim, ModelView, Plugin, Stack, TrainStep, hookimpl
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_layernorm_tuning import LayernormTuning, Subset, rows_of, squared_gradients
from peftx_lora import Lora

test_conformance = conformance("layernorm-tuning")
test_conformance_of_a_subset = conformance(
    "layernorm-tuning", options={"fraction": 0.25, "fisher_rows": 2}, models=["llama", "t5"]
)

ID = "layernorm-tuning"


def batch_of(model: Any, seed: int = 0) -> dict[str, Tensor]:
    inputs = example_inputs(model, padding="right", seed=seed)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def train(stack: Stack, steps: int = 4, *, weight_decay: float = 0.1, kind: Any = torch.optim.AdamW) -> None:
    parameters = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = kind(parameters, lr=1e-2, weight_decay=weight_decay)
    for i in range(steps):
        stack.train_step(batch_of(stack.model, seed=i), optimizer=optimizer)


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}:", "completion": " yes"} for i in range(count)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def subset_of(stack: Stack) -> Subset:
    (subset,) = (part.module for part in stack.ledger.of(ID) if isinstance(part.module, Subset))
    return subset


def norms_of(stack: Stack) -> dict[str, Tensor]:
    """By name, in the order of the mask's entries."""
    return {name: p for name, p in stack.ledger.tensors(ID).items() if "norm" in name.lower()}


def test_trainable_count_of_bert() -> None:
    model = tiny("bert", head="base")
    stack = Stack(model, [LayernormTuning()])
    layers, d = model.config.num_hidden_layers, model.config.hidden_size
    assert (
        stack.trainable_parameters() == 4 * layers * d + 2 * d
    )  # BERT-large: 4 * 24 * 1024 + 2 * 1024 = 100,352
    output_only = Stack(tiny("bert", head="base"), [LayernormTuning(targets="norm.mlp")])
    assert output_only.trainable_parameters() == 2 * layers * d


def test_an_rms_norm_has_gammas_only() -> None:
    stack = Stack(tiny("llama"), [LayernormTuning()])
    assert stack.trainable_parameters() == 5 * 32  # two a layer and the last one


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_only_norms_move(arch: str, fraction: float) -> None:
    options = {} if fraction == 1 else {"fraction": fraction, "fisher_rows": 2}
    stack = Stack(tiny(arch), [LayernormTuning(**options)])
    before = weights(stack.model)
    declared = {n for n, p in stack.model.named_parameters() if p.requires_grad}
    train(stack)
    after = weights(stack.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= declared
    assert moved == declared if fraction == 1.0 else moved


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, about norms
def test_equals_ln_tuning_of_peft() -> None:
    """Trained by PEFT's LN tuning on the same weights and batches, the norms end in the same values."""
    from peft import LNTuningConfig, get_peft_model

    stack = Stack(tiny("llama"), [LayernormTuning()])
    norms = ["input_layernorm", "post_attention_layernorm", "model.norm"]
    theirs = get_peft_model(tiny("llama"), LNTuningConfig(target_modules=norms, task_type="CAUSAL_LM"))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == stack.trainable_parameters()
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for i in range(4):
        theirs(**batch_of(stack.model, seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(stack)
    ours = [p.detach() for p in stack.model.parameters() if p.requires_grad]
    assert max(float((a - b.detach()).abs().max()) for a, b in zip(ours, trained, strict=True)) == 0


def test_fisher_of_a_logistic_model_by_hand() -> None:
    """p(y | x) = sigmoid(y theta x), y = +-1: (d log p / d theta)**2 = ((1 - p) x)**2."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.5, -0.25]))

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            class Output:
                loss = -nn.functional.logsigmoid(labels * (x * self.theta).sum(-1)).mean()

            return Output

    model = Logistic()
    batch = {
        "x": torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]]),
        "labels": torch.tensor([1.0, -1.0, 1.0]),
    }
    stack = Stack(tiny("llama"), [LayernormTuning()])
    step = TrainStep(stack, batch)
    stack.model = model  # what `step.model` is
    total = sum(squared_gradients(step, row, [model.theta]) for row in rows_of(batch))
    margin = batch["labels"] * (batch["x"] @ model.theta.detach())
    expected = ((1 - margin.sigmoid())[:, None] * batch["x"]).square().sum(0)
    assert torch.allclose(total, expected)


def test_fisher_is_estimated_row_by_row_before_anything_moves() -> None:
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.25, fisher_rows=5)])
    start = weights(stack.model)
    expected = torch.zeros(160)
    for seed, count in ((0, 2), (1, 2), (2, 1)):  # two rows a batch; of the third batch one
        batch = batch_of(stack.model, seed)
        for i in range(count):
            real = batch["attention_mask"][i].bool()
            row = batch["input_ids"][i, real][None]
            gradients = torch.autograd.grad(
                stack.model(input_ids=row, labels=row).loss, list(norms_of(stack).values())
            )
            expected += torch.cat([g.flatten() for g in gradients]).square()
    train(stack, 2)
    assert not subset_of(stack).chosen
    assert all(torch.equal(p, start[name]) for name, p in stack.model.named_parameters())
    train(stack, 0)
    stack.train_step(batch_of(stack.model, 2))
    subset = subset_of(stack)
    assert int(subset.rows) == 5
    assert torch.allclose(subset.fisher, expected, rtol=1e-4)
    assert int(subset.mask.sum()) == 40 == round(0.25 * 160)
    assert subset.fisher[subset.mask].min() >= subset.fisher[~subset.mask].max()
    fixed = subset.mask.clone()
    train(stack, 2)
    assert torch.equal(subset.mask, fixed)
    assert int(subset.rows) == 5


def test_gradients_are_none_before_the_mask_and_zero_outside_it() -> None:
    """None: an optimizer keeps no moments of a norm, and does not count a step. Zero: nothing to clip by."""
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=4)])
    norms = list(norms_of(stack).values())
    optimizer = torch.optim.AdamW(norms, lr=1e-2)
    step = TrainStep(stack, batch_of(stack.model))
    stack.run_train_step(step)
    assert not subset_of(stack).chosen
    assert all(p.grad is None for p in norms)
    optimizer.step()
    assert not optimizer.state
    stack.run_train_step(TrainStep(stack, batch_of(stack.model, 1), index=1))
    gradient = torch.cat([p.grad.flatten() for p in norms])
    assert torch.equal(gradient != 0, subset_of(stack).mask)


def test_a_norm_that_a_row_does_not_use_has_no_information() -> None:
    stack = Stack(tiny("llama"), [LayernormTuning()])
    used, unused = stack.model.model.norm.weight, nn.Parameter(torch.ones(3))
    batch = batch_of(stack.model)
    both = squared_gradients(TrainStep(stack, batch), batch, [unused, used])
    assert not both[:3].any()
    assert torch.equal(both[3:], squared_gradients(TrainStep(stack, batch), batch, [used]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_masked_entries_keep_their_bits_under_weight_decay(kind: Any) -> None:
    stack = Stack(tiny("bert"), [LayernormTuning(fraction=0.1, fisher_rows=4)])
    before = torch.cat([p.detach().flatten().clone() for p in norms_of(stack).values()])
    train(stack, 6, weight_decay=0.5, kind=kind)
    after = torch.cat([p.detach().flatten() for p in norms_of(stack).values()])
    mask = subset_of(stack).mask
    assert torch.equal(before[~mask], after[~mask])
    assert (before[mask] != after[mask]).all()
    assert int(mask.sum()) == round(0.1 * len(before))


def test_masked_entries_keep_their_bits_in_the_trainer(tmp_path: Path) -> None:
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=4)], tokenizer=tiny_tokenizer())
    before = torch.cat([p.detach().flatten().clone() for p in norms_of(stack).values()])
    stack.train(
        rows(8),
        steps=4,
        batch_size=2,
        gradient_accumulation=2,
        weight_decay=0.5,
        learning_rate=1e-2,
        max_length=32,
    )
    after = torch.cat([p.detach().flatten() for p in norms_of(stack).values()])
    mask = subset_of(stack).mask
    assert torch.equal(before[~mask], after[~mask])
    assert (before[mask] != after[mask]).all()
    assert all(p.dtype == torch.float32 for p in norms_of(stack).values())


def test_another_optimizer_of_the_process_is_left_alone() -> None:
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=2)])
    stack.train_step(batch_of(stack.model))  # gradients, and no step of an optimizer yet
    parameters = list(norms_of(stack).values())
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1).step()
    assert torch.allclose(other, torch.tensor(0.9))
    torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5).step()
    after = torch.cat([p.detach().flatten() for p in parameters])
    mask = subset_of(stack).mask
    assert torch.equal(before[~mask], after[~mask])
    assert not torch.equal(before[mask], after[mask])


def test_a_mask_of_all_entries_is_ln_tuning() -> None:
    found = []
    for options in ({}, {"fraction": 0.999, "fisher_rows": 2}):  # 0.999 * 160 rounds to 160
        stack = Stack(tiny("llama"), [LayernormTuning(**options)])
        train(stack)
        found.append(norms_of(stack))
    assert subset_of(stack).mask.all()
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


def test_resetting_the_chosen_entries_restores_the_base() -> None:
    model = tiny("llama")
    base = weights(model)
    stack = Stack(model, [LayernormTuning(fraction=0.2, fisher_rows=2)])
    train(stack)
    names = list(norms_of(stack))
    masks = subset_of(stack).mask.split([base[name].numel() for name in names])
    with torch.no_grad():
        for name, mask in zip(names, masks, strict=True):
            parameter = stack.model.get_parameter(name)
            parameter[mask] = base[name][mask]
    assert all(
        torch.equal(tensor, base[name]) for name, tensor in weights(stack.model).items() if name in base
    )


def test_export_is_in_place(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=2)], tokenizer=tiny_tokenizer())
    train(stack)
    plain = AutoModelForCausalLM.from_pretrained(stack.export(tmp_path / "export"))
    expected = weights(stack.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(plain).items())


def test_the_head_trains_whole() -> None:
    stack = Stack(
        tiny("bert", head="classification", num_labels=3),
        [LayernormTuning(fraction=0.2, fisher_rows=2, head=True)],
    )
    head = stack.model.classifier
    before = head.weight.detach().clone()
    inputs = example_inputs(stack.model)
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
    stack.train_step({**inputs, "labels": torch.tensor([0, 2])}, optimizer=optimizer)
    assert (head.weight != before).all()
    assert len(subset_of(stack).mask) == 4 * 2 * 32 + 2 * 32
    with pytest.raises(PeftxError, match=r"layernorm-tuning: .*'classifier' matches nothing"):
        Stack(tiny("llama"), [LayernormTuning(head=True)])


@pytest.mark.parametrize("head", [False, True])
def test_which_heads_train(head: bool) -> None:
    """A classifier of texts has one that nobody trained yet, so the core lets it train; others with `head`."""
    texts = Stack(tiny("bert", head="classification", num_labels=3), [LayernormTuning(head=head)])
    assert texts.model.classifier.weight.requires_grad
    images = Stack(tiny("vit"), [LayernormTuning(head=head)])
    assert images.model.classifier.weight.requires_grad == head


def test_fisher_is_measured_without_dropout() -> None:
    """Twice the same F, the modes as before, and the random stream where a plain run has it."""
    fishers, streams = [], []
    for options in ({"fraction": 0.2, "fisher_rows": 2}, {"fraction": 0.2, "fisher_rows": 2}, {}):
        stack = Stack(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), [LayernormTuning(**options)])
        stack.model.train()
        stack.model.transformer.h[1].eval()
        modes = [m.training for m in stack.model.modules()]
        torch.manual_seed(len(fishers))  # another one each time
        if options:
            state = torch.random.get_rng_state()
            plugin = stack.plugins[ID]
            plugin.estimate(TrainStep(stack, batch_of(stack.model)))
            assert torch.equal(torch.random.get_rng_state(), state)
            fishers.append(subset_of(stack).fisher)
        torch.manual_seed(7)
        stack.train_step(batch_of(stack.model))
        streams.append(torch.random.get_rng_state())
        assert [m.training for m in stack.model.modules()] == modes
    assert torch.equal(*fishers)
    assert torch.equal(streams[0], streams[2])


@pytest.mark.parametrize(
    ("count", "options", "seen"),
    [
        (8, {"steps": 2, "batch_size": 2}, 4),
        (8, {"steps": 1, "batch_size": 2, "gradient_accumulation": 2}, 4),
        (3, {"steps": 3, "batch_size": 2}, None),  # 2 + 1 + 2 rows
        (3, {"steps": 4, "batch_size": 1}, 4),
        (1, {"steps": 5, "batch_size": 2}, None),
        (5, {"steps": 2, "batch_size": 4}, None),
        (4, {"steps": 2, "batch_size": 3}, 4),  # known at the end alone
    ],
)
def test_a_run_that_is_over_before_the_mask_is_refused(
    count: int, options: dict[str, Any], seen: int | None
) -> None:
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=5)], tokenizer=tiny_tokenizer())
    before = weights(stack.model)
    if seen is None:
        stack.train(rows(count), max_length=32, **options)
        assert subset_of(stack).chosen
        assert any(not torch.equal(p, before[name]) for name, p in stack.model.named_parameters())
        return
    ends = f"fisher_rows is 5, and the training ends after {seen} rows"
    with pytest.raises(PeftxError, match=f"layernorm-tuning: {ends}"):
        stack.train(rows(count), max_length=32, **options)
    assert int(subset_of(stack).rows) == (4 if count == 4 else 0)  # the others at once


def test_a_run_that_goes_on_counts_the_rows_of_the_first() -> None:
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=5)], tokenizer=tiny_tokenizer())
    train(stack, 2)  # four rows
    stack.train(rows(4), steps=1, batch_size=1, max_length=32)
    assert subset_of(stack).chosen


@pytest.mark.parametrize("rows_before", [0, 2])
def test_frozen_beside_lora(rows_before: int) -> None:
    """Neither estimate nor mask: only LoRA trains; on later, the estimate goes on."""
    stack = Stack(
        tiny("llama"),
        [Lora(rank=2), LayernormTuning(fraction=0.2, fisher_rows=4)],
        tokenizer=tiny_tokenizer(),
    )
    if rows_before:
        stack.train_step(batch_of(stack.model))
        stack.model.zero_grad()
    stack.freeze(ID)
    before = weights(stack.model)
    stack.train(rows(4), steps=1, batch_size=2, learning_rate=1e-2, weight_decay=0.5, max_length=32)
    moved = {name for name, p in stack.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".peftx." in name for name in moved)
    assert int(subset_of(stack).rows) == rows_before
    stack.unfreeze(ID)
    train(stack, 2)
    assert subset_of(stack).chosen


class Packs(Plugin):
    claims = {Claim.QUANTIZES}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("mlp"):
            site.replace(QuantLinear.from_linear(site.module, bits=8))


def test_a_bundle_that_holds_its_base_packed_trains_on(tmp_path: Path) -> None:
    """What the norms were before is not in it, and entries outside the mask stand where they are all the same."""
    norms = LayernormTuning(fraction=0.2, fisher_rows=2)
    stack = Stack(tiny("llama"), [norms, Packs()], tokenizer=tiny_tokenizer())
    train(stack, 2)
    stack.compress()
    loaded = peftx.load(stack.save(tmp_path / "bundle"))
    before = torch.cat([p.detach().flatten().clone() for p in norms_of(loaded).values()])
    train(loaded, 2, weight_decay=0.5)
    after = torch.cat([p.detach().flatten() for p in norms_of(loaded).values()])
    assert torch.equal(before != after, subset_of(stack).mask)


def test_rows_without_a_choice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftxError, match="layernorm-tuning: fisher_rows 16, but all entries train"):
        Stack(tiny("llama"), [LayernormTuning(fisher_rows=16)])
    with pytest.raises(
        PeftxError, match=r"layernorm-tuning: fraction 0.001 leaves 0.16 of the 160 entries of the norms"
    ) as e:
        Stack(tiny("llama"), [LayernormTuning(fraction=0.001)])
    assert "fraction at least 0.007" in str(e.value)
    stack = Stack(tiny("llama"), [LayernormTuning()], tokenizer=tiny_tokenizer())
    stack.save(tmp_path / "bundle")  # a bundle names every option
    assert peftx.load(tmp_path / "bundle", model=tiny("llama")).plugins[ID].config == stack.plugins[ID].config


def test_fisher_stays_in_full_precision() -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [LayernormTuning(fraction=0.2, fisher_rows=2)])
    assert subset_of(stack).fisher.dtype == torch.float32
    train(stack, 2)
    assert subset_of(stack).fisher.dtype == torch.float32
    assert {p.dtype for p in norms_of(stack).values()} == {torch.bfloat16}


def test_fisher_is_summed_in_full_precision_in_a_stack_that_is_cast() -> None:
    """bfloat16 would stop to grow at 256 times an addend, and choose other entries long before."""
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=6)])
    stack.model.to(torch.bfloat16)
    expected = torch.zeros(len(subset_of(stack).fisher))
    for seed in range(3):
        step = TrainStep(stack, batch_of(stack.model, seed=seed))
        expected += sum(
            squared_gradients(step, row, list(norms_of(stack).values())) for row in rows_of(step.batch)
        )
        stack.run_train_step(step)
    subset = subset_of(stack)
    assert subset.fisher.dtype == torch.float32
    assert torch.allclose(subset.fisher, expected, rtol=1e-6)
    assert torch.equal(
        subset.mask.nonzero().flatten(), expected.topk(int(subset.mask.sum())).indices.sort().values
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"fisher_rows": 0}, "fisher_rows"),
        ({"targets": ""}, "targets"),
        ({"head": "yes please"}, "head"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"LayernormTuning: {match}"):
        LayernormTuning(**options)


def test_targets_that_match_nothing() -> None:
    with pytest.raises(PeftxError, match=r"layernorm-tuning: .*'nrom' matches nothing"):
        Stack(tiny("llama"), [LayernormTuning(targets="nrom")])


def test_a_model_without_norms_is_refused() -> None:
    model = tiny("llama")
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
    with pytest.raises(PeftxError, match=r"layernorm-tuning: .*'norm' matches nothing"):
        Stack(model, [LayernormTuning()])


def test_no_labels_and_no_information_are_refused() -> None:
    stack = Stack(tiny("llama"), [LayernormTuning(fraction=0.2, fisher_rows=2)])
    batch = batch_of(stack.model)
    with pytest.raises(PeftxError, match="layernorm-tuning: the model returned no loss"):
        stack.train_step({name: batch[name] for name in ("input_ids", "attention_mask")})
    with torch.no_grad():
        stack.model.lm_head.weight.zero_()
    with pytest.raises(PeftxError, match="Fisher information of 2 rows is zero"):
        stack.train_step(batch)
