from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import peftx
from peftx import AttentionEdit, ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, MergeError, PeftxError
from peftx.kernel.call import Call
from peftx.kernel.parts import AttentionPart, BasePart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_p_tuning_v2 import Prefix, ProjectedRows, PTuningV2, Rows, Trunk, copy_projected

test_conformance = conformance("p-tuning-v2")

ARCHES = ["llama", "gpt2", "qwen2", "bert", "t5"]


def edits(stack: Stack, id: str = "p-tuning-v2") -> list[Prefix]:
    return [part.module for part in stack.ledger.of(id, AttentionPart)]


def spread(stack: Stack, by: float = 1.0) -> Stack:
    """Move the prompts far enough from their start to matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("p-tuning-v2"):
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return stack


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


class HidePrompts(AttentionEdit):
    """Attention that masks the first `length` rows: what the paper's mask of zeros over the prompts does."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def replace(self, query, key, value, mask, scaling, attend):  # type: ignore[no-untyped-def]
        if mask is None:
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        hidden = torch.zeros_like(mask[..., : self.length])
        if mask.dtype != torch.bool:
            hidden = hidden + torch.finfo(mask.dtype).min
        return attend(query, key, value, torch.cat((hidden, mask[..., self.length :]), -1))


class Hide(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        for tower in model.towers:
            for site in model.attention_sites(tower=tower):
                model.attend(site, HidePrompts(4))


def test_the_rows_stand_in_front() -> None:
    prompt = Rows((2, 1, 1), 2)
    prompt.rows.data = torch.tensor([[[[1.0], [2.0]]], [[[3.0], [4.0]]]])  # keys 1, 2; values 3, 4
    key, value = Prefix(prompt, 0.0).keys_values(torch.full((2, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1), 6.0))
    assert key.tolist() == 2 * [[[[1.0], [2.0], [5.0]]]]
    assert value.tolist() == 2 * [[[[3.0], [4.0], [6.0]]]]


def test_projection_is_the_formula() -> None:
    trunk = Trunk(1, 2, 2)
    trunk.e.data, trunk.down.weight.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0], [0.0, -0.5]])
    trunk.down.bias.data = torch.tensor([0.0, 1.5])
    prompt = ProjectedRows((2, 1, 2), 2, trunk, Call(), "rows")
    prompt.up.weight.data, prompt.up.bias.data = (
        torch.eye(4)[:, :2].contiguous(),
        torch.tensor([0.0, 0.0, 7.0, 8.0]),
    )
    half = 0.46211715726  # tanh(0.5), and -0.5 * 2 + 1.5 = 0.5 too
    assert torch.allclose(prompt().flatten(), torch.tensor([half, half, 7.0, 8.0]))  # key, then value


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_equals_a_filled_cache_with_unchanged_positions(arch: str, padding: str | None) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding=padding)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) if padding else torch.arange(9)[None]
    stack = spread(Stack(model, [PTuningV2(length=4)]))
    with torch.no_grad():
        ours = model(**inputs, position_ids=positions).logits
        cache = DynamicCache()
        for layer, edit in enumerate(edits(stack)):
            key, value = edit.prompt().unsqueeze(1).expand(-1, 2, -1, -1, -1)
            cache.update(key, value, layer)
        with stack.disabled():
            mask = torch.nn.functional.pad(inputs["attention_mask"], (4, 0), value=1)
            theirs = model(
                input_ids=inputs["input_ids"],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            ).logits
            base = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert difference(ours[real], theirs[real]) < 2e-5
    assert difference(ours[real], base[real]) > 0.1


def test_values_may_be_narrower_than_keys() -> None:
    """DeepSeek-V3: what attention is given has the prompts in front, keys of 12 numbers and values of 8."""
    prompt = Rows((1, 2 + 1), 2)
    prompt.rows.data = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])  # keys of 2 numbers, values of 1
    key, value = Prefix(prompt, 0.0).keys_values(torch.full((2, 1, 1, 2), 7.0), torch.full((2, 1, 1, 1), 8.0))
    assert key.tolist() == 2 * [[[[1.0, 2.0], [4.0, 5.0], [7.0, 7.0]]]]
    assert value.tolist() == 2 * [[[[3.0], [6.0], [8.0]]]]
    width = 4 * (12 + 8)
    plain = Stack(tiny("deepseek_v3"), [PTuningV2(length=7)])
    assert plain.trainable_parameters() == 2 * 7 * width
    projected = Stack(tiny("deepseek_v3"), [PTuningV2(length=7, projection=5)])
    assert projected.trainable_parameters() == 7 * 32 + 33 * 5 + 2 * 6 * width


def test_a_projection_of_narrower_values_can_be_written_out() -> None:
    source = spread(Stack(tiny("deepseek_v3"), [PTuningV2(length=3, projection=6)]), 0.3)
    target = Stack(tiny("deepseek_v3"), [PTuningV2(length=3)])
    copy_projected(source, target)
    inputs = example_inputs(source.model)
    with torch.no_grad():
        assert torch.equal(output_of(target.model, inputs), output_of(source.model, inputs))


def test_heads_of_other_layers_may_be_wider_or_fewer() -> None:
    """Gemma 4: heads of 8 numbers in the first layer, of 16 behind it, and there fewer for keys and values."""
    model = tiny("gemma4", attention_k_eq_v=True, num_global_key_value_heads=1)
    stack = spread(Stack(model, [PTuningV2(length=4)]))
    assert [tuple(edit.prompt.rows.shape) for edit in edits(stack)] == [(2, 2, 4, 8)] + 2 * [(2, 1, 4, 16)]
    inputs = example_inputs(model)
    with torch.no_grad():
        seen = output_of(model, inputs)
        with stack.disabled():
            assert difference(output_of(model, inputs), seen) > 0.05


@pytest.mark.parametrize("arch", [*ARCHES, "deepseek_v3", "gemma4"])
def test_masked_prompts_give_the_base(arch: str) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding="right")
    real = inputs["attention_mask"].bool() if arch != "t5" else slice(None)
    with torch.no_grad():
        base = output_of(model, inputs)[real]
        stack = spread(Stack(model, [PTuningV2(length=4), Hide()]))
        hidden = output_of(model, inputs)[real]
        with stack.disabled("hide"):
            seen = output_of(model, inputs)[real]
    assert difference(hidden, base) < 5e-6  # another number of keys, another order of the sums
    assert difference(seen, base) > 0.05


@pytest.mark.parametrize(("arch", "heads"), [("llama", 2), ("gpt2", 4), ("bert", 4)])
def test_trainable_count(arch: str, heads: int) -> None:
    layers, size = 2, 8
    plain = Stack(tiny(arch), [PTuningV2(length=7)])
    assert plain.trainable_parameters() == 2 * layers * heads * size * 7  # 2 L d l, d = width of keys
    projected = Stack(tiny(arch), [PTuningV2(length=7, projection=5)])
    outputs = layers * 2 * heads * size
    assert projected.trainable_parameters() == 7 * 32 + (32 + 1) * 5 + (5 + 1) * outputs


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_projected_tensor_reproduces_the_network(arch: str) -> None:
    source = spread(Stack(tiny(arch), [PTuningV2(length=3, projection=6)]), 0.3)
    target = Stack(tiny(arch), [PTuningV2(length=3)])
    inputs = example_inputs(source.model)
    with torch.no_grad():
        assert difference(output_of(target.model, inputs), output_of(source.model, inputs)) > 0.01
        copy_projected(source, target)
        assert torch.equal(output_of(target.model, inputs), output_of(source.model, inputs))
    assert target.plugin_parameters("p-tuning-v2") < source.plugin_parameters("p-tuning-v2")


def test_copy_refuses_another_shape() -> None:
    source = Stack(tiny("llama"), [PTuningV2(length=3, projection=6)])
    for options in ({"length": 4}, {"projection": 6}, {"targets": "attention layers=0"}):
        with pytest.raises(PeftxError, match="do not match"):
            copy_projected(source, Stack(tiny("llama"), [PTuningV2(**{"length": 3, **options})]))


@pytest.mark.parametrize("arch", ARCHES)
def test_order_of_rows_does_not_matter(arch: str) -> None:
    model = tiny(arch)
    stack = spread(Stack(model, [PTuningV2(length=4)]))
    inputs = example_inputs(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        for edit in edits(stack):
            edit.prompt.rows.copy_(edit.prompt.rows[:, :, [2, 0, 3, 1]])
        assert difference(output_of(model, inputs), before) < 5e-6


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_prompts_in_the_last_layer_leave_earlier_states(arch: str) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding="left")
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True).hidden_states
        stack = spread(Stack(model, [PTuningV2(length=4, targets="attention layers=-1")]))
        after = model(**inputs, output_hidden_states=True).hidden_states
    assert len(edits(stack)) == 1
    assert all(torch.equal(one, two) for one, two in zip(before[:-1], after[:-1], strict=True))
    assert difference(before[-1], after[-1]) > 0.05


def test_towers_and_cross_attention() -> None:
    counts = {}
    for targets in (
        "attention",
        "attention tower=decoder",
        "cross_attention",
        "attention cross_attention layers=1",
    ):
        counts[targets] = len(edits(Stack(tiny("t5"), [PTuningV2(targets=targets)])))
    assert list(counts.values()) == [4, 2, 2, 3]
    model = tiny("t5")
    inputs = example_inputs(model)
    with torch.no_grad():
        base = model(**inputs)
        stack = Stack(model, [PTuningV2(length=4, targets="cross_attention")])
        spread(stack)
        after = model(**inputs)
    assert torch.equal(base.encoder_last_hidden_state, after.encoder_last_hidden_state)
    assert difference(base.logits, after.logits) > 0.05


@pytest.mark.parametrize("projection", [None, 8])
def test_cached_generation_equals_uncached(projection: int | None) -> None:
    model = tiny("llama")
    spread(Stack(model, [PTuningV2(length=4, projection=projection)]), 0.5)
    inputs = example_inputs(model, padding="left")
    kept = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    cached, uncached = (model.generate(**inputs, use_cache=use, **kept) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_dropout_acts_on_the_prompts_while_training() -> None:
    edit = Prefix(Rows((2, 2, 3), 50), 0.5)
    rows = edit.prompt.rows.detach()
    empty = torch.zeros(2, 2, 0, 3)
    one, two = edit.keys_values(empty, empty)[0]
    assert not torch.equal(one, two)  # other zeros for each example
    assert 0.35 < float((one == 0).float().mean()) < 0.65
    kept = one != 0
    assert torch.allclose(one[kept], 2 * rows[0][kept])
    edit.eval()
    assert torch.equal(edit.keys_values(empty, empty)[0][0], rows[0])


def test_trains_beside_lora_and_resumes_to_the_bit(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]

    def stack() -> Stack:
        plugins = [PTuningV2(length=3, projection=4), Lora(rank=2)]
        return Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())

    options = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2}
    straight, again = stack(), stack()
    report = straight.train(rows, output=tmp_path, **options)
    again.train(rows, output=tmp_path, resume=tmp_path / "checkpoint-2", **options)
    assert report.trainable == straight.trainable_parameters()
    for name, tensor in straight.ledger.tensors("p-tuning-v2").items():
        assert torch.equal(tensor, again.ledger.tensors("p-tuning-v2")[name]), name
    start = stack().ledger.tensors("p-tuning-v2")
    assert all(not torch.equal(t, start[n]) for n, t in straight.ledger.tensors("p-tuning-v2").items())


@pytest.mark.parametrize("arch", ["mamba", "bloom", "gptj", "deberta_v2"])
def test_refuses_models_that_do_not_dispatch(arch: str) -> None:
    with pytest.raises(
        ArchitectureError, match=r"p-tuning-v2: .*(no attention layers|does not look its attention up)"
    ):
        Stack(tiny(arch), [PTuningV2()])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 0}, "length"),
        ({"projection": 0}, "projection"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"targets": "layers=1"}, "targets"),
        ({"head": 3}, "head"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"PTuningV2: {match}") as caught:
        PTuningV2(**options)
    assert "length, projection, dropout, targets, head" in str(caught.value.hint)


@pytest.mark.parametrize("targets", ["attention layers=2", "cross_attention", "mlp"])
def test_targets_that_are_not_there(targets: str) -> None:
    with pytest.raises(PeftxError, match="p-tuning-v2: "):
        Stack(tiny("llama"), [PTuningV2(targets=targets)])


def test_start_is_berts() -> None:
    """N(0, 0.02**2), the prompts and all matrices; biases 0."""
    stack = Stack(tiny("llama"), [PTuningV2(length=100, projection=64), ("plain", PTuningV2(length=100))])
    found = [t for id in stack.plugins for t in stack.ledger.tensors(id).items()]
    for name, tensor in found:
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert float(tensor.detach().std()) == pytest.approx(0.02, rel=0.06), name
            assert abs(float(tensor.detach().mean())) < 2e-3
    assert len(found) == 3 + 2 * 2 + 2


def generated(stack: Stack, *, beams: int = 1, **options: object) -> tuple[Tensor, Tensor]:
    """Tokens and scores of a greedy continuation."""
    inputs = example_inputs(stack.model)
    inputs.pop("decoder_input_ids", None)
    stack.model.eval()
    out = stack.model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def uncached(stack: Stack, arch: str = "llama", **options: object) -> tuple[Tensor, Tensor]:
    """The same by prompts that are written out."""
    plain = Stack(tiny(arch), [PTuningV2(length=3)])
    copy_projected(stack, plain)
    return generated(plain, **options)


def equal(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def projected(arch: str = "llama") -> Stack:
    return spread(Stack(tiny(arch), [PTuningV2(length=3, projection=6)], tokenizer=tiny_tokenizer()), 0.3)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_decoding_runs_the_network_once(monkeypatch: pytest.MonkeyPatch, arch: str, beams: int) -> None:
    stack = projected(arch)
    calls, forward = [], Trunk.forward
    monkeypatch.setattr(Trunk, "forward", lambda self: calls.append(1) or forward(self))
    found = generated(stack, beams=beams)
    assert len(calls) == len(edits(stack))  # once a layer, and not at each token
    assert equal(found, uncached(stack, arch, beams=beams))
    calls.clear()
    with torch.no_grad():
        for _ in range(2):  # calls that are no generation
            output_of(stack.model, example_inputs(stack.model))
    assert len(calls) == 2 * len(edits(stack))


def adamw(stack: Stack, **options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.1, **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", [True, False])  # a loop of one's own may forget `model.train()`
def test_decoding_sees_what_training_changes(mode: bool, fused: bool) -> None:
    """A fused optimizer writes into parameters without counting up their version."""
    stack = projected()
    optimizer, inputs, before = adamw(stack, fused=fused), example_inputs(stack.model), generated(stack)
    for _ in range(2):
        stack.model.train(mode)
        stack.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert equal(generated(stack), before)
        optimizer.step()
        after = generated(stack)
        assert equal(after, uncached(stack))
        assert difference(after[1], before[1]) > 1e-2
        before = after


def test_decoding_sees_what_loading_changes(tmp_path: Path) -> None:
    stack, other = projected(), Stack(tiny("llama"), [PTuningV2(length=3, projection=6)])
    expected = generated(stack)
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"))
    assert equal(generated(again), expected)
    assert difference(generated(other)[1], expected[1]) > 1e-2
    pairs = [s.ledger.parameters("p-tuning-v2") for s in (other, stack)]
    for mine, theirs in zip(*pairs, strict=True):
        mine.data.copy_(theirs.data)  # which no version counts either
    assert equal(generated(other), expected)


def test_a_cache_that_is_used_again_gets_the_rows_of_now() -> None:
    from transformers import StaticCache

    stack = projected()
    cache = StaticCache(config=stack.model.config, max_cache_len=32)
    before = generated(stack, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        for parameter in stack.ledger.parameters("p-tuning-v2"):
            parameter.add_(0.1)
    after = generated(stack, past_key_values=cache)
    assert difference(after[1], uncached(stack)[1]) < 1e-5  # its empty places are masked: other sums
    assert difference(after[1], before[1]) > 1e-2


def test_rows_are_those_of_the_call() -> None:
    """Not those of another cache, of a call of the inner model, or of a call that is to have gradients."""
    stack, ids = projected(), torch.tensor([[5, 6, 7]])
    plain = Stack(tiny("llama"), [PTuningV2(length=3)])
    copy_projected(stack, plain)
    cache, other, third = (DynamicCache() for _ in range(3))
    with torch.no_grad():
        stack.model(ids, past_key_values=cache)
        for filled in (other, third):  # by a model without the network
            plain.model(ids, past_key_values=filled)
        for mine, theirs in (
            (
                lambda: stack.model(ids, past_key_values=other),
                lambda: plain.model(ids, past_key_values=third),
            ),
            (lambda: stack.model.model(ids), lambda: plain.model.model(ids)),
        ):
            for parameter in stack.ledger.parameters("p-tuning-v2"):
                parameter.add_(0.1)
            found = next(iter(mine().values()))
            copy_projected(stack, plain)
            assert torch.equal(found, next(iter(theirs().values())))
        stack.model(ids, past_key_values=other)
    stack.model(ids, past_key_values=other, labels=ids).loss.backward()
    assert all(p.grad is not None for p in stack.ledger.parameters("p-tuning-v2"))


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_network_trains_through_checkpointed_layers(arch: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        stack = Stack(tiny(arch), [PTuningV2(length=3, projection=6, dropout=0.0)])
        spread(stack, 0.3).model.train()
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = example_inputs(stack.model)
        labels = inputs.pop("decoder_input_ids", inputs["input_ids"])
        stack.train_step({**inputs, "labels": labels})
        gradients.append([p.grad for p in stack.ledger.parameters("p-tuning-v2")])
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients[0])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in zip(*gradients, strict=True))


def test_a_copy_of_a_cache_goes_on_with_the_rows_that_it_was_filled_with() -> None:
    stack, ids = projected(), torch.tensor([[5, 6, 7]])
    cache = DynamicCache()
    with torch.no_grad():
        stack.model(ids, past_key_values=cache)
        one, two = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = stack.model(ids, past_key_values=one).logits
        for parameter in stack.ledger.parameters("p-tuning-v2"):
            parameter.add_(0.1)
        assert torch.equal(stack.model(ids, past_key_values=two).logits, expected)
        assert difference(stack.model(ids, past_key_values=DynamicCache()).logits, expected) > 1e-2


def test_the_model_keeps_no_cache_alive() -> None:
    """So nobody copies or pickles one with it."""
    stack, cache = projected(), DynamicCache()
    with torch.no_grad():
        stack.model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None


def test_a_head_of_tokens_trains_where_it_is_asked_for() -> None:
    """One of sequences trains anyway, as the core lets the first plugin that adapts a classifier have it."""

    def trained(**options: object) -> int:
        model = tiny("bert", head="token-classification", num_labels=3)
        return Stack(model, [PTuningV2(length=3, **options)]).trainable_parameters()

    assert trained(head=True) == trained() + 3 * 32 + 3


def test_the_head_trains(tmp_path: Path) -> None:
    def bert() -> PreTrainedModel:
        return tiny("bert", head="classification", num_labels=3)

    def build(**options: object) -> Stack:
        return Stack(bert(), [PTuningV2(length=3, **options)], tokenizer=tiny_tokenizer())

    stack = build(projection=4, head=True)
    head = stack.model.classifier
    parts = stack.ledger.of("p-tuning-v2")
    prompts = sum(
        t.numel() for part in parts if not isinstance(part, BasePart) for t in part.tensors().values()
    )
    assert stack.trainable_parameters() == prompts + 3 * 32 + 3
    before = head.weight.detach().clone()
    batch = {**example_inputs(stack.model), "labels": torch.tensor([0, 2])}
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=0.1)
    stack.train_step(batch, optimizer=optimizer)
    assert (head.weight != before).all()
    inputs = example_inputs(stack.model)
    plain = build(head=True)
    copy_projected(stack, plain)  # with the head
    again = peftx.load(stack.save(tmp_path / "bundle"), model=bert())
    with torch.no_grad():
        expected = output_of(stack.model, inputs)
        assert torch.equal(output_of(plain.model, inputs), expected)
        assert torch.equal(output_of(again.model, inputs), expected)
    with pytest.raises(PeftxError, match="do not match"):
        copy_projected(stack, Stack(bert(), [PTuningV2(length=2)], tokenizer=tiny_tokenizer()))
    with pytest.raises(MergeError, match="'p-tuning-v2' does not fold"):
        stack.export(tmp_path / "export")  # a plain checkpoint would hold the head, and no prompts
    with pytest.raises(PeftxError, match=r"p-tuning-v2: .*'classifier' matches nothing"):
        Stack(tiny("llama"), [PTuningV2(head=True)])


@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("projection", [None, 6])
def test_prompts_take_the_dtype_of_the_model(arch: str, projection: int | None) -> None:
    model = tiny(arch).to(torch.bfloat16)
    stack = Stack(model, [PTuningV2(length=3, projection=projection)])
    assert {t.dtype for t in stack.ledger.tensors("p-tuning-v2").values()} == {torch.bfloat16}
    assert output_of(model, example_inputs(model)).dtype == torch.bfloat16


def test_on_a_quantized_base() -> None:
    """Its attention has no parameters whose dtype the network could take; trunk and layers still fit each other."""
    from peftx.toolkits.compression import QuantLinear

    model = tiny("llama").to(torch.bfloat16)
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantLinear.from_linear(child, bits=8))
    stack = Stack(model, [PTuningV2(length=3, projection=6)])
    assert {t.dtype for t in stack.ledger.tensors("p-tuning-v2").values()} == {torch.bfloat16}
    assert output_of(model, example_inputs(model)).isfinite().all()


def test_bundle_keeps_the_network(tmp_path: Path) -> None:
    model = tiny("llama")
    stack = spread(Stack(model, [PTuningV2(length=3, projection=6)], tokenizer=tiny_tokenizer()), 0.3)
    saved = stack.save(tmp_path / "bundle")
    again = peftx.load(saved, model=tiny("llama"))
    inputs = example_inputs(model)
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), output_of(model, inputs))
    assert again.plugin_parameters("p-tuning-v2") == stack.plugin_parameters("p-tuning-v2")


def test_rows_in_front_that_are_measured_do_not_take_it_in() -> None:
    """PrefixQuant stores keys and values of outlier tokens: of these alone."""
    from peftx_prefixquant import PrefixQuant, StaticKV

    plugins = [PTuningV2(length=5), PrefixQuant(eta=1.5)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    stack.compress(["one two three four five six seven eight nine ten."] * 4)
    stored = {m.prefix.shape[2] for m in stack.model.modules() if isinstance(m, StaticKV)}
    assert stored == {len(stack.plugins["prefixquant"].state["prefix"])}
