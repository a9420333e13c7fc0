from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftx
from peftx import Stack, TrainStep
from peftx.errors import ArchitectureError, ConflictError, PeftxError, PluginError
from peftx.kernel.chain import is_ours
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear, pruning
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_pat_pruning import Hsm, Mask, NarrowNorm, PatPruning, gain_of
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("pat-pruning")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
ID = "pat-pruning"


def build(
    *others: Any, arch: str = "llama", before: tuple[Any, ...] = (), model: Any = None, **options: Any
) -> Stack:
    plugins = [*before, PatPruning(**{"rank": 4, "prune": 4, **options}), *others]
    return Stack(tiny(arch) if model is None else model, plugins, tokenizer=tiny_tokenizer())


def loop(stack: Stack, steps: int, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=rate)
    stack.model.train()
    for _ in range(steps):
        stack.train_step(batch_of(stack), optimizer=optimizer)
    stack.model.eval()


def trained(*others: Any, steps: int = 6, **options: Any) -> Stack:
    stack = build(*others, **options)
    loop(stack, steps)
    return stack


def batch_of(stack: Stack) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def plugin_of(stack: Stack) -> PatPruning:
    return stack.plugins[ID]  # type: ignore[return-value]


def logits(stack: Stack | nn.Module) -> Tensor:
    model = stack.model if isinstance(stack, Stack) else stack
    with torch.no_grad():
        return output_of(model.eval(), example_inputs(model))


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the mask --------------------------------------------------------------------------------------------------------


def test_m_by_hand() -> None:
    mask = Mask(4, 2).requires_grad_(False)
    mask.p.copy_(torch.tensor([0.5, 0.0, -0.5, 2.0]))
    for t, tau, b in (
        (0, 1.0, 0.5),
        (1, 1.0, 0.49),
        (40, 1 / (1 - math.log(40) / math.log(100)), 0.1),
        (60, None, 0),
    ):
        mask.at(t, 100)
        tau = tau or 1 / (1 - math.log(t) / math.log(100))
        torch.testing.assert_close(mask.m(), torch.sigmoid(tau * mask.p) + b)
    frozen = 1 / (1 - math.log(80) / math.log(100))
    for t in (80, 99):
        mask.at(t, 100)
        torch.testing.assert_close(mask.m(), torch.sigmoid(frozen * mask.p))
    for T in (1, 2):
        mask.at(0, T)
        assert float(mask.tau) == 1


def test_the_mask_is_one_at_the_start() -> None:
    mask = Mask(8, 6)
    assert mask.m().tolist() == [1.0] * 8


def test_the_task_leaves_the_logits_alone_in_the_end() -> None:
    mask, gradients = Mask(4, 2), []
    for t in (79, 80):
        mask.at(t, 100)
        m = mask.m()
        gradients.append(m.requires_grad)
        mask.loss().backward()  # which goes on to move them
    assert gradients == [True, False]
    assert mask.p.grad is not None


def test_the_largest_logits_stay() -> None:
    mask = Mask(5, 3).requires_grad_(False)
    mask.p.copy_(torch.tensor([0.1, -0.2, 3.0, -0.1, -4.0]))
    mask.settle()
    assert mask.m().tolist() == [1, 0, 1, 1, 0]


def test_the_loss_of_the_mask_by_hand() -> None:
    mask = Mask(4, 2)
    p = [0.2, 0.9, 0.0, -1.0]
    mask.p.data = torch.tensor(p)
    # n = 3, since 0 counts as kept; it is pulled to -1/2 with those below.
    expected = 10 * 1 / 2 + (0.3**2 + 0.4**2) / 2 + (0.5**2 + 0.5**2) / 2
    loss = mask.loss()
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    pulls = [2 * (0.2 - 0.5) / 2, 2 * (0.9 - 0.5) / 2, 2 * 0.5 / 2, 2 * -0.5 / 2]
    assert mask.p.grad is not None
    assert mask.p.grad.tolist() == pytest.approx([10 / 2 + pull for pull in pulls])


def test_one_side_of_the_mask_may_be_empty() -> None:
    mask = Mask(4, 2)
    assert float(mask.loss().detach()) == 10 * 2 / 2 + 0.25
    mask.p.data.fill_(0.5)
    assert float(mask.loss().detach()) == 10
    mask.p.data.copy_(torch.tensor([0.5, 0.5, -0.5, -0.5]))
    assert float(mask.loss().detach()) == 0


# -- modules ---------------------------------------------------------------------------------------------------------


def test_a_module_by_hand() -> None:
    mask = Mask(6, 3).requires_grad_(False)
    mask.p.copy_(normal(6))
    hsm, x = Hsm(mask, 6, 2).requires_grad_(False), normal(3, 6, seed=1)
    assert torch.equal(Hsm(Mask(6, 3), 6, 2)(x, x), x)
    hsm.B.copy_(normal(6, 2, seed=2))
    hsm.v.copy_(normal(6, seed=3))
    m = torch.sigmoid(mask.p) + 0.5
    torch.testing.assert_close(hsm(x, x.clone()), hsm.v * m * (x + x @ hsm.A.T @ hsm.B.T))
    W, b = normal(6, 4, seed=4), normal(6, seed=5)
    weight, bias = hsm.fold(W, b)
    y = normal(3, 4, seed=6)
    torch.testing.assert_close(F.linear(y, weight, bias), hsm(y, F.linear(y, W, b)), rtol=1e-5, atol=1e-5)
    assert hsm.fold(W, None)[1] is None
    torch.testing.assert_close(hsm.fold(W, None)[0], weight)
    plain = Hsm(mask, 6, 0)
    torch.testing.assert_close(plain(x, x), x * m)
    torch.testing.assert_close(plain.fold(W, None)[0], m[:, None] * W)


def test_orthonormal_rows_cost_nothing() -> None:
    hsm = Hsm(Mask(6, 3), 6, 2).requires_grad_(False)
    hsm.A.copy_(torch.linalg.qr(normal(6, 2))[0].T)
    assert float(hsm.identity()) == pytest.approx(0, abs=1e-10)
    hsm.A.mul_(2)
    assert float(hsm.identity()) == pytest.approx(9 * 2 / 4)


def test_where_modules_stand() -> None:
    """Behind the embedding, W_o and W_down; with one mask, in float32 also in a half precision model."""
    stack = build(model=tiny("llama").bfloat16())
    parts = ["self_attn.o_proj", "mlp.down_proj"]
    layers = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    assert sorted(plugin_of(stack).hsms) == sorted(["model.embed_tokens", *layers])
    assert {p.dtype for p in stack.ledger.parameters(ID)} == {torch.float32}
    width, r = 32, 4
    assert stack.trainable_parameters() == width + 5 * (2 * r * width + width)
    assert build(arch="gemma").trainable_parameters() == width + 4 * (2 * r * width + width)


def test_loss_terms() -> None:
    stack, memory = build(), {"phases": {ID: [["prune", 0, 4], ["settled", 4, 9]]}}
    step = TrainStep(stack, batch_of(stack), index=1, memory=memory)
    stack.model.train()
    loss = stack.run_train_step(step)
    hsms = list(plugin_of(stack).hsms.values())
    expected = sum(float(((h.A @ h.A.T - torch.eye(4)) ** 2).mean().detach()) for h in hsms)
    assert step.losses[f"{ID} identity"] == pytest.approx(expected)
    assert step.losses[f"{ID} mask"] == pytest.approx(10 * 8 / 24 + 0.25)
    assert float(loss) == pytest.approx(sum(step.losses.values()))
    assert float(plugin_of(stack).mask.b) == 0.25
    step = TrainStep(stack, batch_of(stack), index=4, memory=memory)
    stack.run_train_step(step)
    assert set(step.losses) == {"task", f"{ID} identity"}


# -- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_settles_on_the_target() -> None:
    stack = build(prune=60)
    mask = plugin_of(stack).mask
    loop(stack, 59, rate=3e-2)
    assert plugin_of(stack).state == {"settled": False}
    assert abs(int((mask.p >= 0).sum()) - 24) <= 2  # what the loss of the mask is for
    kept = set(mask.p.topk(24).indices.tolist())
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=1e-9)
    stack.model.train()
    stack.train_step(batch_of(stack), optimizer=optimizer)
    assert mask.settled
    assert set(mask.kept.nonzero()[:, 0].tolist()) == kept
    assert not mask.p.requires_grad
    before = mask.p.detach().clone()
    loop(stack, 2)
    assert torch.equal(mask.p, before)


def test_channels_that_are_gone_are_0_in_the_whole_stream() -> None:
    stack, seen = trained(), []
    for layer in stack.model.model.layers:
        layer.register_forward_hook(lambda m, x, y: seen.extend((x[0], y)))
    logits(stack)
    gone = ~plugin_of(stack).mask.kept
    assert int(gone.sum()) == 8
    assert len(seen) == 4
    assert all(not h[..., gone].any() and h[..., ~gone].all() for h in seen)


def test_a_second_run_trains_on_narrow() -> None:
    stack = trained()
    kept = plugin_of(stack).mask.kept.clone()
    assert [phase.name for phase in plugin_of(stack).phases()] == ["settled"]
    loop(stack, 2)
    assert torch.equal(plugin_of(stack).mask.kept, kept)


# -- a narrower model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "gemma2", "glm4"])
def test_the_narrow_model_computes_what_the_masked_one_did(arch: str, tmp_path: Path) -> None:
    model = tiny(arch)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name:
                p.mul_(0.05)  # so small that the eps of the norms counts
    first = logits(model)
    stack = trained(model=model)
    masked = logits(stack)
    stack.compress(keep=False)
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked, first, atol=0.1)
    assert not any(is_ours(name) for name, _ in stack.model.named_modules())
    # Each number that has the width as one of its sizes; biases of what reads the stream have not.
    plain = tiny(arch)
    biases = sum(p.numel() for n, p in plain.named_parameters() if n.endswith("bias"))
    assert numbers(stack.model) - biases == (numbers(plain) - biases) * 24 // 32
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle")
    assert torch.equal(logits(again), logits(stack))
    assert numbers(again.model) == numbers(stack.model)
    assert plugin_of(again).state == plugin_of(stack).state


def test_shapes() -> None:
    stack = trained(width=0.5)
    stack.compress()
    inner = stack.model.model
    assert inner.embed_tokens.weight.shape[1] == stack.model.lm_head.weight.shape[1] == 16
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.weight.shape == (32, 16)
        assert attention.o_proj.weight.shape == (16, 32)
        assert (mlp.up_proj.weight.shape, mlp.down_proj.weight.shape) == ((48, 16), (16, 48))
        assert len(layer.input_layernorm.weight) == len(layer.post_attention_layernorm.weight) == 16
    assert len(inner.norm.weight) == 16
    assert plugin_of(stack).state["kept"] == sorted(plugin_of(stack).state["kept"])
    assert not any(p.requires_grad for p in stack.model.parameters())


def test_tied_matrices_stay_one(tmp_path: Path) -> None:
    stack = trained(arch="gemma")
    stack.compress()
    stack.save(tmp_path / "bundle")
    for model in (stack.model, peftx.load(tmp_path / "bundle").model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(
        stack.model.lm_head.weight, tiny("gemma").lm_head.weight[:, plugin_of(stack).state["kept"]]
    )


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_a_narrow_norm_is_the_wide_one_on_zeros(arch: str) -> None:
    wide = tiny(arch).model.norm
    kept = torch.arange(32) % 3 > 0
    x = normal(4, 32) * kept * 1e-3
    n = int(kept.sum())
    narrow = NarrowNorm(in_features=1, out_features=n, eps=wide_eps(wide) * 32 / n, dtype="float32")
    narrow.weight.copy_(gain_of(wide, 32)[kept] * math.sqrt(32 / n))
    torch.testing.assert_close(narrow(x[:, kept]), wide(x)[:, kept].detach())


def wide_eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def test_it_generates_when_it_is_narrow() -> None:
    stack = trained()
    before = stack.generate("Once upon a time", max_new_tokens=6)
    stack.compress()
    assert stack.generate("Once upon a time", max_new_tokens=6) == before


def test_products_become_fewer() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    narrow = trained(width=0.5)
    narrow.compress()
    for model in (tiny("llama"), narrow.model):
        with FlopCounterMode(display=False) as counter:
            logits(model)
        found.append(counter.get_total_flops())
    assert found[1] < 0.6 * found[0]


def test_what_was_replaced_comes_back() -> None:
    stack = trained(arch="gemma")
    stack.compress()
    stack.remove(ID)
    assert torch.equal(logits(stack), logits(tiny("gemma")))
    assert stack.model.lm_head.weight is stack.model.model.embed_tokens.weight


def test_metrics() -> None:
    bare = Stack(tiny("llama"), [PatPruning(rank=4)], tokenizer=tiny_tokenizer(), inject=False)
    stack = build()
    for untouched in (bare, stack):
        assert untouched.evaluate(["a text"], metrics=[ID])["width"].value == 1
    loop(stack, 6)
    before = stack.evaluate(["a text"], metrics=[ID])
    assert (before["width"].value, before["parameters"].value) == (0.75, numbers(tiny("llama")))
    stack.compress()
    after = stack.evaluate(["a text"], metrics=[ID])
    assert (after["width"].value, after["parameters"].value) == (0.75, numbers(tiny("llama")) * 0.75)


@pytest.mark.parametrize("steps", [2, 6])
def test_it_comes_back_before_it_is_narrow(steps: int, tmp_path: Path) -> None:
    stack = trained(steps=steps)
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), logits(stack))
    assert plugin_of(again).mask.p.requires_grad == (steps == 2)
    loop(again, 4)
    masked = logits(again)
    again.compress()
    torch.testing.assert_close(logits(again), masked, rtol=1e-4, atol=1e-5)


def test_bfloat16() -> None:
    stack = trained(model=tiny("llama").bfloat16())
    masked = logits(stack)
    stack.compress()
    assert {p.dtype for p in stack.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(stack), masked, rtol=0.1, atol=0.1 * float(masked.abs().max()))


def test_a_classifiers_head_reads_the_narrow_stream(tmp_path: Path) -> None:
    stack = build(model=tiny("llama", head="classification"))
    batch = {**example_inputs(stack.model), "labels": torch.tensor([0, 1])}
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        stack.train_step(batch, optimizer=optimizer)
    masked = logits(stack)
    stack.compress()
    torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-5)
    assert stack.model.score.weight.shape[1] == 24
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


# -- stacks ----------------------------------------------------------------------------------------------------------


def test_what_stands_before_it_is_folded() -> None:
    for other in (Lora(rank=2), FullFinetuning(targets="mlp norm")):
        stack = trained(before=(other,))
        masked = logits(stack)
        stack.compress()
        torch.testing.assert_close(logits(stack), masked, rtol=1e-4, atol=1e-4)


def test_adapted_after_it(tmp_path: Path) -> None:
    stack = Stack(
        tiny("llama"), [PatPruning(rank=4, prune=4), Lora(rank=2)], tokenizer=tiny_tokenizer(), inject=False
    )
    stack.inject([ID])
    loop(stack, 6)
    stack.compress()
    narrow = logits(stack)
    stack.inject()
    assert torch.equal(logits(stack), narrow)
    assert set(stack.train(ROWS, steps=2, learning_rate=1e-2).terms) == {"task"}
    assert not torch.equal(logits(stack), narrow)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_what_stays_at_the_full_width_is_refused() -> None:
    for other, what in (
        (PromptTuning(length=3), "soft tokens at prompt"),
        (Lora(rank=2), "delta at model.layers.0"),
    ):
        with pytest.raises(ConflictError, match=f"{what}.*stays at the full width, which 'pat-pruning'"):
            build(other)
    with pytest.raises(ConflictError, match="soft tokens at prompt"):
        build(before=(PromptTuning(length=3),))
    for other in (PromptTuning(length=3), FullFinetuning(targets="mlp")):
        stack = Stack(
            tiny("llama"), [PatPruning(rank=4, prune=4), other], tokenizer=tiny_tokenizer(), inject=False
        )
        stack.inject([ID])
        loop(stack, 6)
        stack.compress()
        with pytest.raises(ConflictError, match="stays at the full width"):
            stack.inject()


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2"])
def test_packed_after_it(arch: str, tmp_path: Path) -> None:
    """What is packed are the narrow layers: it computes what the narrow model does, packed by itself."""
    stack = trained(NF4Storage(), arch=arch)
    stack.compress(ids=[ID])
    narrow = copy.deepcopy(stack.model)
    stack.compress()
    alone = Stack(narrow, [NF4Storage()], tokenizer=tiny_tokenizer())
    alone.compress()
    assert torch.equal(logits(stack), logits(alone))
    packed = [m for m in stack.model.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == len([m for m in alone.model.modules() if isinstance(m, QuantLinear)]) > 0
    assert {m.in_features for m in packed if m.in_features < 32} == {24}
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_what_packs_waits_for_it() -> None:
    stack = trained(NF4Storage())
    masked = logits(stack)
    with pytest.raises(ConflictError, match="'nf4' starts from the smaller layers of 'pat-pruning'"):
        stack.compress(ids=["nf4"])
    assert torch.equal(logits(stack), masked)
    stack.compress()
    assert plugin_of(stack).state["kept"]


def test_packed_before_it_is_refused() -> None:
    with pytest.raises(ConflictError, match="'nf4' packs the layers that 'pat-pruning'") as raised:
        build(before=(NF4Storage(),))
    assert raised.value.hint == "put 'pat-pruning' before 'nf4'"
    plugins = [NF4Storage(), PatPruning(rank=4)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["nf4"])
    with pytest.raises(ConflictError, match=r"pat-pruning: .*q_proj is packed already") as raised:
        stack.inject()
    assert raised.value.hint == "put 'pat-pruning' first"


# -- refusals --------------------------------------------------------------------------------------------------------


def test_bad_options() -> None:
    for wrong in ({"width": 0.0}, {"width": 1.5}, {"rank": 0}, {"prune": 0}):
        with pytest.raises(PluginError, match=f"PatPruning: {next(iter(wrong))}"):
            PatPruning(**wrong)
    with pytest.raises(PeftxError, match="pat-pruning: rank 33 exceeds the 32 channels"):
        build(rank=33)


def test_a_width_that_leaves_nothing() -> None:
    with pytest.raises(
        ArchitectureError, match=r"pat-pruning: width 0.01 of 32 channels leaves none"
    ) as raised:
        build(width=0.01)
    assert "0.0312 at least" in str(raised.value.hint)
    stack = trained(width=0.03125)
    stack.compress()
    assert len(plugin_of(stack).state["kept"]) == 1
    assert logits(stack).isfinite().all()


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("gpt2", "transformer.wpe is no plain linear layer, RMS norm or embedding of tokens"),
        ("gpt_neox", "final_layer_norm is no plain linear layer, RMS norm"),
        ("mixtral", "mlp.gate is no plain linear layer"),
        ("t5", "t5 is not one tower of text"),
        ("vit", "vit is not one tower of text"),
    ],
)
def test_models_it_cannot_narrow(arch: str, said: str) -> None:
    model = tiny(arch)
    before = dict(model.named_parameters())
    with pytest.raises(ArchitectureError, match=f"pat-pruning: .*{said}"):
        Stack(model, [PatPruning(rank=4)])
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())


def test_a_model_with_more_of_the_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that no table names: the architecture is tried with one channel less."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    inner = LlamaDecoderLayer.forward

    def shifted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(self, x + torch.ones(32, device=x.device), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", shifted)
    monkeypatch.setattr(pruning, "_RUNS", {})  # what it found of the class as it is
    with pytest.raises(ArchitectureError, match="llama has more that is as wide as its residual stream"):
        build()


def test_a_mask_that_has_not_settled_is_refused() -> None:
    for steps in (1, 3):
        stack = trained(steps=steps)
        masked = logits(stack)
        with pytest.raises(PeftxError, match="pat-pruning: the mask has not settled yet"):
            stack.compress()
        assert torch.equal(logits(stack), masked)
    loop(stack, 1)
    stack.compress()
    stack = Stack(tiny("llama"), [PatPruning(rank=4)], inject=False)
    with pytest.raises(ConflictError, match="there is no mask on the model yet"):
        stack.compress()


def test_without_training_nothing_goes() -> None:
    stack = build()
    stack.compress()
    torch.testing.assert_close(logits(stack), logits(tiny("llama")), rtol=1e-5, atol=1e-5)
    assert len(plugin_of(stack).state["kept"]) == 32
