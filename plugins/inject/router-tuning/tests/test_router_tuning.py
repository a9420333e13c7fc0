from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Claim, ModelView, Plugin, Stack, TrainStep, VirtualTokens, hookimpl
from peftx.errors import PeftxError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_router_tuning import RouterTuning, TextRouter

test_conformance = conformance("router-tuning")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
NEVER, ALWAYS = 2.0, 0.0
"""As tau: no score is as high, every score is."""


def stack_of(*before: Plugin, arch: str = "llama", layers: int = 2, **options: Any) -> Stack:
    sizes = {"num_hidden_layers": layers} if layers != 2 else {}
    return Stack(tiny(arch, **sizes), [*before, RouterTuning(**options)], tokenizer=tiny_tokenizer())


def routers(stack: Stack) -> list[TextRouter]:
    return [part.module for part in stack.ledger.of("router-tuning", DeltaPart)]


def without_attention(arch: str, *layers: int, **sizes: int) -> nn.Module:
    """The plain model, with attentions that add nothing to the residual."""
    model = tiny(arch, **sizes)
    for layer in layers:
        for parameter in Anatomy(model).site("attention.o", layer=layer).module.parameters():
            parameter.data.zero_()
    return model


def norm_outputs(stack: Stack, **inputs: Tensor) -> Tensor:
    """h of the only router, [B, T, d]."""
    seen: list[Tensor] = []
    norm = stack.anatomy.site("norm.attention", layer=0).module
    handle = norm.register_forward_hook(lambda module, args, h: seen.append(h.detach()))
    with torch.no_grad():
        stack.model(**inputs)
    handle.remove()
    return seen[0]


def disagreeing(stack: Stack, **inputs: Tensor) -> TextRouter:
    """The only router, so set that the first of two texts attends and the second does not."""
    (router,) = routers(stack)
    means = norm_outputs(stack, **inputs).mean(1)
    with torch.no_grad():
        router.w.copy_(means[0] - means[1])
    router.tau = float(torch.sigmoid(means @ router.w.detach()).mean())
    return router


# -- which layers, and what trains -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "share", "routed"),
    [
        (2, 0.5, [0]), (6, 0.5, [2, 3, 4]), (6, 1.0, [0, 1, 2, 3, 4]), (6, 0.01, [4]), (32, 0.5, list(range(15, 31))),
    ],
)  # fmt: skip
def test_the_layers_before_the_last_are_routed(layers: int, share: float, routed: list[int]) -> None:
    stack = stack_of(layers=layers, share=share)
    assert [router.layer for router in routers(stack)] == routed
    assert stack.trainable_parameters() == len(routed) * 32
    assert not any(router.w.any() for router in routers(stack))


def test_hybrid_models_route_what_attends() -> None:
    sizes = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
    stack = Stack(tiny("qwen3_next", **sizes), [RouterTuning(share=1.0)], tokenizer=tiny_tokenizer())
    assert [router.layer for router in routers(stack)] == [1]


@pytest.mark.parametrize("options", [{"tau": 0.6}, {"c": -1}, {"share": 0}, {"c": float("inf")}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        RouterTuning(**options)


# -- scores, and what they decide --------------------------------------------------------------------------------------


def test_the_score_is_of_the_mean_over_real_tokens() -> None:
    stack = stack_of()
    inputs = example_inputs(stack.model, padding="left")
    (router,) = routers(stack)
    with torch.no_grad():
        router.w.normal_(generator=torch.Generator().manual_seed(0))
    router.watched = True
    h, real = norm_outputs(stack, **inputs), inputs["attention_mask"].bool()
    assert not real.all()
    stack.model(**inputs)
    expected = [torch.sigmoid(router.w @ h[i, real[i]].mean(0)) for i in range(2)]
    stack.model.config.use_cache = False
    scores = []
    router.score = lambda h, own=router.score: scores.append(own(h)) or scores[-1]  # type: ignore[method-assign]
    stack.model(**inputs)
    torch.testing.assert_close(scores[0], torch.stack(expected))
    assert router.routing.tolist() == [float(s >= 0.5) for s in expected]


@torch.no_grad()
def test_a_text_of_one_token_has_its_score_and_one_of_none_has_a_half() -> None:
    stack, scores = stack_of(), []
    inputs, (router,) = example_inputs(stack.model), routers(stack)
    inputs["attention_mask"][:] = torch.eye(9, dtype=torch.long)[-1] * torch.tensor([[1], [0]])
    router.w.normal_(generator=torch.Generator().manual_seed(0))
    h = norm_outputs(stack, **inputs)
    router.score = lambda h, own=router.score: scores.append(own(h)) or scores[-1]  # type: ignore[method-assign]
    stack.model(**inputs)
    torch.testing.assert_close(
        scores[0], torch.stack((torch.sigmoid(router.w @ h[0, -1]), torch.tensor(0.5)))
    )


class Rows(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(3)
        self.E = nn.Parameter(torch.full((3, width), 5.0))

    def rows(self) -> Tensor:
        return self.E


class Prompt(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Rows(model.hidden_size))


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_soft_tokens_do_not_decide(use_cache: bool) -> None:
    stack = stack_of(Prompt())
    inputs = example_inputs(stack.model)
    h = norm_outputs(stack, **inputs)
    assert h.shape[1] == 9 + 3
    (router,) = routers(stack)
    router.w.copy_(h[:, 3:].mean((0, 1)) - h[0, 0])  # what the text says, against what the soft tokens say
    router.watched = True
    out = stack.model(**inputs, use_cache=use_cache)
    assert router.routing.tolist() == [1, 1]
    router.tau = NEVER  # but the prompt has decided
    if use_cache:
        stack.model(inputs["input_ids"][:, :1], past_key_values=out.past_key_values)
        assert router.routing.tolist() == [1, 1]


@pytest.mark.parametrize(
    "arch", ["llama", "gpt2", "qwen2", "opt", "gpt_neox", "mixtral", "gemma2", "deepseek_v3"]
)
@torch.no_grad()
def test_no_gate_open_is_a_model_without_these_attentions(arch: str) -> None:
    stack = stack_of(arch=arch, layers=4 if arch == "llama" else 2, share=0.5)
    for router in routers(stack):
        router.tau = NEVER
    layers = [router.layer for router in routers(stack)]
    assert layers == ([1, 2] if arch == "llama" else [0])
    bare = without_attention(arch, *layers, **({"num_hidden_layers": 4} if arch == "llama" else {}))
    inputs = example_inputs(stack.model, padding="left")
    real = inputs["attention_mask"].bool()
    found, expected = stack.model(**inputs).logits[real], bare(**inputs).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Padded rows need positions in some of these; alone they agree token by token, with a cache too.
    one = {name: value[:1] for name, value in inputs.items()}
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(stack.model.generate(**one, **options), bare.generate(**one, **options))


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_texts_that_disagree_compute_what_they_compute_alone(use_cache: bool) -> None:
    stack = stack_of()
    inputs = example_inputs(stack.model)
    router = disagreeing(stack, **inputs)
    router.watched = True
    together = stack.model(**inputs, use_cache=use_cache).logits
    assert router.routing.tolist() == [1, 0]
    for row, model in enumerate((tiny("llama"), without_attention("llama", 0))):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(together[row], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("straight", "texts"), [(False, 1), (True, 2)])
def test_texts_that_go_through_the_attention_in_training(straight: bool, texts: int) -> None:
    stack = stack_of(straight=straight)
    inputs = example_inputs(stack.model)
    disagreeing(stack, **inputs)
    sizes: list[int] = []
    site = stack.anatomy.site("attention.q", layer=0)
    site.module.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    stack.model.train()
    stack.train_step({**inputs, "labels": inputs["input_ids"], "use_cache": False})
    with torch.no_grad():
        stack.model(**inputs, use_cache=False)
    assert sizes == [texts, 1], "and afterwards those with an open gate alone"


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_gradients_by_hand(c: float, straight: bool) -> None:
    """Straight through: s' times c / layers, and times what the task says of each text, or of those that attend."""
    stack = stack_of(c=c, straight=straight)
    inputs = example_inputs(stack.model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    router, h = disagreeing(stack, **inputs), norm_outputs(stack, **inputs)
    s = torch.sigmoid(h.mean(1) @ router.w.detach())
    slope = (s * (1 - s))[:, None] * h.mean(1)  # ds/dw, [B, d]
    loss = stack.train_step(batch)
    found = router.w.grad

    plain, G = tiny("llama"), torch.tensor([1.0, 0.0], requires_grad=True)
    block = plain.model.layers[0].self_attn
    attend = block.forward
    block.forward = lambda *args, **kwargs: (attend(*args, **kwargs)[0] * G[:, None, None], None)
    task = plain(**batch).loss
    task.backward()
    torch.testing.assert_close(loss, (task + c * 0.5).detach())
    of_task = G.grad if straight else G.grad * G.detach()
    torch.testing.assert_close(found, of_task @ slope + c * slope.mean(0), rtol=1e-3, atol=1e-6)
    assert router.routing is None


@pytest.mark.parametrize(
    ("c", "straight", "learns"), [(0.1, False, True), (0.0, False, False), (0.0, True, True)]
)
def test_what_teaches_the_router_of_a_text_that_attends_nowhere(
    c: float, straight: bool, learns: bool
) -> None:
    stack = stack_of(c=c, straight=straight)
    (router,) = routers(stack)
    router.tau = NEVER
    inputs = example_inputs(stack.model)
    stack.train_step({**inputs, "labels": inputs["input_ids"]})
    assert bool(router.w.grad.any()) is learns


def test_the_second_term_closes_gates_and_is_told() -> None:
    stack = stack_of(c=50.0, layers=4, share=0.5)
    report = stack.train(ROWS, steps=6, batch_size=4, learning_rate=1e-2)
    assert report.terms["router-tuning"] == 0.0, "all skip at the end"
    assert stack_of(c=0.0).train(ROWS, steps=1, batch_size=4).terms["router-tuning"] == 1.0, (
        "and none at the start"
    )


def test_nothing_is_watched_behind_a_step() -> None:
    stack = stack_of()
    inputs, (router,) = example_inputs(stack.model), routers(stack)
    stack.train_step(inputs | {"labels": inputs["input_ids"]})
    stack.model(**inputs)
    assert router.routing is None, "the graph of a pass of one's own would be kept"


def test_the_term_weighs_layers_and_texts_alike() -> None:
    stack = stack_of(layers=5, share=0.6)
    for router, tau in zip(routers(stack), (NEVER, ALWAYS, ALWAYS), strict=True):
        router.tau = tau
    report = stack.train(ROWS, steps=1, batch_size=2, gradient_accumulation=2)
    assert report.terms["router-tuning"] == pytest.approx(2 / 3)

    ids = example_inputs(stack.model, batch=3)["input_ids"]
    found = []
    for parts in ([ids], [ids[:1], ids[1:]]):  # micro-batches of unlike size
        stack = stack_of(c=1.0, straight=False)
        (router,) = routers(stack)
        router.tau = NEVER  # so that the term alone teaches
        batches = [{"input_ids": part, "labels": part} for part in parts]
        for micro, (batch, share) in enumerate(zip(batches, stack.shares(batches), strict=True)):
            stack.train_step(batch, micro=micro, accumulation=len(parts), share=share)
        found.append(router.w.grad)
    torch.testing.assert_close(*found)


class Compares(Plugin):
    """Looks at the model as it was, between the task's loss and the terms of plugins behind it."""

    claims = {Claim.NEEDS_GRADIENTS}

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        def term(outputs: Any) -> Tensor:
            with step.reference() as model:
                return 0.0 * model(**step.batch).loss

        step.add_loss("compares", term)
        return (yield)


def test_a_pass_of_another_plugins_leaves_the_term_alone() -> None:
    found = []
    for before in ((), (Compares(),)):
        stack = stack_of(*before, c=1.0)
        (router,) = routers(stack)
        router.tau = NEVER
        inputs = example_inputs(stack.model)
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
        found.append(router.w.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("tau", [NEVER, ALWAYS])
@torch.no_grad()
def test_the_prompt_decides_for_what_follows(prompt: int, tau: float) -> None:
    """A prompt of one token is one; later tokens would say the opposite here."""
    stack = stack_of()
    (router,) = routers(stack)
    ids = example_inputs(stack.model)["input_ids"]
    router.tau, router.watched = tau, True
    out = stack.model(ids[:, :prompt], use_cache=True)
    first = router.routing.tolist()
    assert first == [float(tau == ALWAYS)] * 2
    router.tau = ALWAYS + NEVER - tau
    for at in range(prompt, 8):
        out = stack.model(ids[:, at : at + 1], past_key_values=out.past_key_values)
        assert router.routing.tolist() == first
        lengths = {layer.get_seq_length() for layer in out.past_key_values.layers}
        assert lengths == {at + 1}, "of all layers, the skipped one too"
    kept = out.past_key_values.layers[0]
    numbers = kept.keys.numel() + kept.values.numel()
    assert numbers == (2 * 8 if tau == NEVER else 2 * 2 * 8 * 2 * 8), "one number a token, or keys and values"
    plain = tiny("llama") if tau == ALWAYS else without_attention("llama", 0)
    torch.testing.assert_close(out.logits[:, -1], plain(ids[:, :8]).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "cache_implementation": "static"}])
@torch.no_grad()
def test_decisions_follow_beams(options: dict[str, Any]) -> None:
    """Of two prompts that disagree each one's beams are those that it has alone."""
    stack = stack_of()
    inputs = example_inputs(stack.model)
    disagreeing(stack, **inputs)
    asked: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    together = stack.model.generate(**inputs, **asked)
    for row, model in enumerate((tiny("llama"), without_attention("llama", 0))):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(together[row], model.generate(**alone, **asked)[0])


@torch.no_grad()
def test_two_in_one_stack_keep_their_own_decisions() -> None:
    model = tiny("llama", num_hidden_layers=4)
    stack = Stack(model, [("one", RouterTuning(share=0.25)), ("two", RouterTuning(share=0.5))])
    ids = example_inputs(model)["input_ids"]
    expected = tiny("llama", num_hidden_layers=4).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(stack.model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    for router in (part.module for part in stack.ledger.of("one", DeltaPart)):
        router.tau = NEVER
    bare = without_attention("llama", 2, num_hidden_layers=4)
    found = stack.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, bare.generate(ids, max_new_tokens=4, do_sample=False))


# -- with others, and back ---------------------------------------------------------------------------------------------


def test_trains_beside_lora_and_comes_back(tmp_path: Path) -> None:
    stack = stack_of(Lora(rank=2), layers=4, share=0.5)
    stack.train(ROWS, steps=3, batch_size=4, learning_rate=1e-2)
    for owner in ("lora", "router-tuning"):
        assert any(p.any() for p in stack.ledger.parameters(owner))
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        before = stack.model(**inputs).logits
        stack.save(tmp_path / "b")
        base = tiny("llama", num_hidden_layers=4)
        again = peftx.load(tmp_path / "b", model=base, tokenizer=tiny_tokenizer())
        assert torch.equal(again.model(**inputs).logits, before)


def test_routers_stay_in_full_precision() -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [RouterTuning()], tokenizer=tiny_tokenizer())
    (router,) = routers(stack)
    assert router.w.dtype == torch.float32


@pytest.mark.parametrize("arch", ["bert", "t5", "bloom", "gemma3n"])
def test_models_without_a_place_for_it_are_refused(arch: str) -> None:
    with pytest.raises(
        PeftxError, match=f"router-tuning: {arch}.* has no attention blocks that can be left out"
    ):
        Stack(tiny(arch), [RouterTuning()])
