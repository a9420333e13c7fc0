from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftx import Stack, TrainStep
from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.call import Call
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny
from peftx_dynmole import (
    Dynmole,
    DynmoleConfig,
    Mixture,
    Routing,
    entropy,
    entropy_of_uniform,
    route,
)
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("dynmole")


def replace(config: DynmoleConfig, **options: object) -> DynmoleConfig:
    return config.model_copy(update=options)


RAW = DynmoleConfig(q=1.1, threshold=0.9, relative=False, rho=0.75, k_min=2)
NEVER = replace(RAW, threshold=9.0)  # broadcast

# What the official `DynMoleSparseMoe` gives for the waves below, four experts, k = 1, rho = 0.95, no dropout (float32):
# weights, entropies, output, the gradients of router, A and B, and of the router in 100 times the entropy loss. Made
# once by running that class outside this repository; the README says which commit. The first token is broadcast, the
# second and the last have two experts on.
OFFICIAL_W = [
    [0.3566316, 0.1351787, 0.3780008, 0.1301889],
    [0.0, 0.2595476, 0.0, 0.657464],
    [0.0, 0.6367236, 0.0, 0.0],
    [0.0, 0.0, 0.6383981, 0.0],
    [0.0, 0.2633901, 0.0, 0.6659014],
]
OFFICIAL_S = [0.9151897, 0.6305932, 0.4889762, 0.4865699, 0.609431]
OFFICIAL_Y = [
    [0.2898718, 0.5501741],
    [0.9828354, 1.280615],
    [1.194943, 1.094919],
    [0.7643883, 0.5384166],
    [0.630075, 0.493364],
]
OFFICIAL_GRADIENTS = {
    "W_g": [
        [-0.009900085, -0.03812996, -0.04842672],
        [0.01598077, -0.1171035, -0.195112],
        [0.02259981, 0.02521613, 0.01597292],
        [-0.0286805, 0.1300173, 0.2275659],
    ],
    "A": [
        [[0.02890191, 0.0442108, 0.03872667], [-0.0357748, -0.05472416, -0.04793589]],
        [[-1.529255, -0.6576165, 0.5233089], [1.580724, 0.6362817, -0.6074138]],
        [[-0.4404928, -0.6611414, -0.5708451], [0.3771721, 0.5658107, 0.4883398]],
        [[-0.6827052, 0.7807584, 1.877018], [0.7081002, -0.8121368, -1.950412]],
    ],
    "B": [
        [
            [-0.02757326, -0.02487358],
            [-1.050559, -1.083701],
            [-0.03772935, 0.01678443],
            [-1.209528, -0.6750853],
        ],
        [
            [-0.01475163, -0.01330731],
            [-1.285718, -1.417714],
            [0.07630179, -0.03886783],
            [-0.3865875, -0.2176753],
        ],
    ],
}
OFFICIAL_ENTROPY = [
    [0.02322344, 0.007588547, -0.01161534],
    [0.03448692, 0.0001217682, -0.03430063],
    [-0.009311443, -0.02840369, -0.03413724],
    [-0.04839908, 0.02069336, 0.08005336],
]


def wave(*shape: int, f: float) -> Tensor:
    return torch.sin(f * torch.arange(1, math.prod(shape) + 1, dtype=torch.float32)).reshape(shape)


def close(one: Tensor, two: Tensor | list[object], tolerance: float = 2e-6) -> bool:
    return torch.allclose(one, torch.as_tensor(two), rtol=tolerance, atol=tolerance)


def mixture() -> Mixture:
    rule = replace(RAW, relative=True, rho=0.95, k_min=1)
    config = replace(rule, experts=4, rank=2, alpha=4.0, dropout=0.0)
    built = Mixture(3, 2, config, call=Call(), side="source")
    built.W_g.data, built.A.data, built.B.data = (
        3 * wave(4, 3, f=1.0),
        wave(4, 2, 3, f=2.0),
        wave(2, 4, 2, f=3.0),
    )
    return built


def mixtures(stack: Stack) -> list[Mixture]:
    return [part.module for part in stack.ledger.of("dynmole", DeltaPart)]


def trained(arch: str = "llama", *before: PromptTuning, **options: object) -> Stack:
    """A stack in training mode whose experts do something."""
    stack = Stack(tiny(arch), [*before, Dynmole(**{"rank": 2, "dropout": 0.0, **options})])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("dynmole"):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    stack.model.train()
    return stack


def auxiliary(stack: Stack, batch: dict[str, Tensor]) -> float:
    """The loss term of one step."""
    step = TrainStep(stack, batch)
    stack.run_train_step(step)
    return step.losses["dynmole"]


def test_equals_the_official_layer() -> None:
    x, y, slope = wave(1, 5, 3, f=0.7), wave(1, 5, 2, f=0.3), wave(1, 5, 2, f=1.3)
    x[0, 0] *= 0.1
    layer = mixture()
    layer.watched = True
    out = layer(x, y)
    assert close(layer.routing[0].w[0], OFFICIAL_W)
    p = (x @ layer.W_g.t()).softmax(-1)[0]
    assert close(layer.routing[0].S[0], OFFICIAL_S, 5e-4)
    assert close(entropy(p + 1e-5, 1.1) / entropy_of_uniform(4, 1.1), OFFICIAL_S)  # the released code's p
    assert close(out[0], OFFICIAL_Y)
    (out * slope).sum().backward(retain_graph=True)
    for name, expected in OFFICIAL_GRADIENTS.items():
        assert close(layer.get_parameter(name).grad, expected), name
    layer.W_g.grad = None
    Dynmole(balance=0.0, certainty=1.0).loss([layer]).backward()
    assert close(layer.W_g.grad, OFFICIAL_ENTROPY, 2e-5)  # without that 1e-5


def test_alpha_left_out_is_twice_the_rank() -> None:
    x, y = wave(1, 5, 3, f=0.7), wave(1, 5, 2, f=0.3)
    given = mixture()  # alpha 4, rank 2
    left_out = Mixture(3, 2, replace(given.config, alpha=None), call=Call(), side="source")
    left_out.load_state_dict(given.state_dict())
    assert torch.equal(left_out(x, y), given(x, y))
    assert not close(given(x, y), y, 0.1)  # it would show


def test_uniform_is_dense_and_certain_is_sparse() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    w, on, S = route(p, RAW)
    assert on.sum(-1).tolist() == [4, 2]
    assert torch.equal(w, p)
    assert S[0] > 0.9 > S[1]
    assert close(S, [entropy_of_uniform(4, 1.1), 0.0])


def test_weights_are_not_normalised_again() -> None:
    p = torch.tensor([[0.06, 0.7, 0.04, 0.2], [0.5, 0.1, 0.3, 0.1]])
    w, on, _ = route(p, NEVER)
    assert on.tolist() == [[False, True, False, True], [True, False, True, False]]
    assert torch.equal(w, p * on)
    assert w.sum(-1).max() < 1
    _, on, _ = route(p, replace(NEVER, rho=0.95))
    assert on.tolist() == [
        [False, True, False, True],
        [True, True, True, False],
    ]  # 0.96 is above rho, 0.9 is not


def test_entropy_tends_to_shannon() -> None:
    p = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    shannon = -(p * p.log()).sum(-1)
    assert close(entropy(p, 1.0), shannon, 1e-12)
    assert close(entropy(p, 1.0002), shannon, 1e-3)
    assert not close(entropy(p, 1.1), shannon, 1e-2)
    assert close(entropy(p, 2.0), 1 - p.square().sum(-1), 1e-12)  # Gini
    assert bool((entropy(p, 1.1) <= entropy_of_uniform(6, 1.1)).all())


def test_limits_of_the_rule() -> None:
    p = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(route(p, replace(NEVER, rho=1.0)).w, p)  # dense
    top = p.topk(3)
    expected = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    assert torch.equal(route(p, replace(NEVER, rho=1e-9, k_min=3)).w, expected)
    assert torch.equal(route(p, replace(RAW, threshold=1e-9)).w, p)  # never sure


def test_broadcast_starts_at_the_threshold_itself() -> None:
    p = torch.full((1, 4), 0.25)
    gini = replace(RAW, q=2.0, threshold=0.75)
    assert entropy(p, 2.0).item() == 0.75  # to the bit
    assert route(p, gini).on.all()
    assert route(p, replace(gini, threshold=0.7501)).on.sum() == 3


def test_the_defaults_are_sparse() -> None:
    """H = 0.9 is a share of the largest entropy, 1.64; as it is, an entropy of 1.2 would be far above."""
    (layer, *_) = mixtures(Stack(tiny("llama"), [Dynmole(rank=2)]))
    p = torch.tensor([[0.55, 0.2, 0.1, 0.05, 0.05, 0.05]])
    assert 1.1 < entropy(p, layer.config.q).item() < 1.3
    assert route(p, layer.config).on.sum() == 2
    assert route(torch.full((1, 6), 1 / 6), layer.config).on.all()


def test_routers_are_float32_in_a_bfloat16_model() -> None:
    layer, x = mixture(), wave(1, 5, 3, f=0.7).bfloat16()
    layer.watched = True
    layer(x, wave(1, 5, 2, f=0.3).bfloat16())
    assert close(layer.routing[0].w, route((x.float() @ layer.W_g.t()).softmax(-1), layer.config).w, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_stack_that_is_cast_routes_as_its_router_says(dtype: torch.dtype) -> None:
    """Not in bfloat16, whatever W_g is kept in, and in no less than the model has."""
    layer, x = mixture().to(dtype), wave(1, 5, 3, f=0.7).to(dtype)
    layer.watched = True
    layer(x, wave(1, 5, 2, f=0.3).to(dtype))
    assert layer.routing[0].w.dtype == torch.promote_types(dtype, torch.float32)
    expected = route((x.double() @ layer.W_g.double().t()).softmax(-1), layer.config).w
    assert torch.allclose(
        layer.routing[0].w.double(), expected, atol=1e-6 if dtype == torch.bfloat16 else 1e-12
    )
    stack = Stack(tiny("llama"), [Dynmole(rank=2)])
    stack.model.to(dtype)
    batch = example_inputs(stack.model)
    step = TrainStep(stack, batch | {"labels": batch["input_ids"]})
    stack.run_train_step(step)
    plain = tiny("llama").to(dtype)(**batch, labels=batch["input_ids"]).loss
    assert step.losses["task"] == pytest.approx(float(plain.detach()), rel=1e-6)  # B starts at zero
    assert all(p.grad.isfinite().all() for p in stack.ledger.parameters("dynmole"))


def test_relative_entropy_moves_the_threshold() -> None:
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    assert route(p, RAW).on.all()  # 1.09 of at most 1.29
    assert route(p, replace(RAW, relative=True)).on.sum() == 2


def test_output_is_the_weighted_sum_of_the_experts() -> None:
    layer, x, y = mixture(), wave(2, 3, f=0.9), wave(2, 2, f=0.4)
    w = route((x @ layer.W_g.t()).softmax(-1), layer.config).w
    expected = y + 2 * sum(w[:, i, None] * (x @ layer.A[i].t() @ layer.B[:, i].t()) for i in range(4))
    assert close(layer(x, y), expected)


def test_loss_by_hand() -> None:
    layer = mixture()
    w = torch.tensor([[[0.5, 0.25, 0.0, 0.0], [0.0, 0.75, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]]])
    S = torch.tensor([[0.5, 0.25, 9.0]])
    layer.call.begin({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    layer.routing = Routing(w, w > 0, S), layer.real(w).flatten()
    plugin = Dynmole(balance=0.1, certainty=0.01)
    with torch.no_grad():
        loss = plugin.loss([layer])
    # F = (1/2, 1, 0, 0), P = (1/4, 1/2, 0, 0); 0.1 * 4 * 5/8 + 0.01 * 3/8
    assert close(loss, 0.25 + 0.00375)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("soft", [0, 3])
def test_pads_are_not_in_the_loss(side: str, soft: int) -> None:
    prompts = [PromptTuning(length=soft)] if soft else []
    stack = trained("llama", *prompts, targets="all", threshold=0.73)
    plain = example_inputs(stack.model)
    plain["labels"] = plain["input_ids"].clone()
    sides = (2, 0) if side == "left" else (0, 2)
    padded = {
        name: torch.nn.functional.pad(x, sides, value={"labels": -100, "input_ids": 5}.get(name, 0))
        for name, x in plain.items()
    }
    if side == "left":
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = auxiliary(stack, plain)
    assert math.isclose(auxiliary(stack, padded), expected, rel_tol=1e-5)
    unmasked = {name: x for name, x in padded.items() if name != "attention_mask"}
    assert not math.isclose(auxiliary(stack, unmasked), expected, rel_tol=1e-4)


def test_an_encoder_and_its_decoder_have_pads_of_their_own() -> None:
    stack = trained("t5", targets="attention cross_attention mlp")
    batch = example_inputs(stack.model, padding="right")
    batch["labels"] = batch.pop("decoder_input_ids")[:, :7].contiguous()
    batch["labels"][0, 4:] = -100
    seen: dict[str, set[int]] = {"source": set(), "target": set()}

    def count(outputs: object) -> Tensor:
        for part in stack.ledger.of("dynmole", DeltaPart):
            decoder = part.key.startswith("decoder")
            keys = "EncDecAttention" in part.key and part.key.endswith((".k", ".v"))
            real = int(part.module.routing[1].sum())
            seen["target" if decoder and not keys else "source"].add(real)
        return torch.zeros(())

    step = TrainStep(stack, batch)
    step.add_loss("count", count)
    stack.run_train_step(step)
    assert seen == {"source": {9 + 7}, "target": {4 + 7}}


def counted(stack: Stack, batch: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Real tokens and all of each layer in one call."""
    for layer in mixtures(stack):
        layer.watched = True
    with torch.no_grad():
        stack.model(**batch)
    parts = stack.ledger.of("dynmole", DeltaPart)
    return {part.path: (int(part.module.routing[1].sum()), part.module.routing[1].numel()) for part in parts}


def test_soft_tokens_are_real() -> None:
    stack = trained("llama", PromptTuning(length=3))
    found = counted(stack, example_inputs(stack.model, padding="left"))  # rows of 9 and 7 tokens
    assert set(found.values()) == {(9 + 7 + 2 * 3, 2 * (9 + 3))}


def test_images_and_summaries_have_no_pads() -> None:
    clip = trained("clip")
    inputs = example_inputs(clip.model, length=4, padding="right")  # fewer tokens than an image has patches
    for path, (real, tokens) in counted(clip, inputs).items():
        assert real == (tokens if "vision" in path else 4 + 2), path
    model = tiny("bert", head="classification", num_labels=3)
    summaries = Stack(model, [Dynmole(rank=2, targets="pooler mlp")])
    found = counted(summaries, example_inputs(model, padding="right"))
    assert found.pop("bert.pooler.dense") == (2, 2)
    assert set(found.values()) == {(9 + 7, 18)}


def test_a_pass_without_gradients_is_not_part_of_the_loss() -> None:
    """As a reference that is read behind the step's own forward pass."""
    stack = trained()
    inputs = example_inputs(stack.model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    step = TrainStep(stack, batch)

    def task() -> tuple[Tensor, object]:
        outputs = step.forward()
        with torch.no_grad():
            stack.model(inputs["input_ids"][:, :4] + 1)
        return outputs.loss, outputs

    step.replace_task_loss(task)
    stack.run_train_step(step)
    assert step.losses["dynmole"] == auxiliary(stack, batch)


def test_a_router_that_is_frozen_beside_others_is_read_all_the_same() -> None:
    """As another plugin freezes layers for a step."""
    stack = trained()
    inputs = example_inputs(stack.model)
    batch = {**inputs, "labels": inputs["input_ids"]}
    whole = auxiliary(stack, batch)
    mixtures(stack)[0].W_g.requires_grad_(False)
    assert auxiliary(stack, batch) == pytest.approx(whole)


def test_the_loss_trains_the_router_from_the_start() -> None:
    """B is zero, so the task says nothing to the router yet; with checkpointing the gradient is the same."""
    found = []
    for checkpointing in (False, True):
        stack = Stack(tiny("llama"), [Dynmole(rank=2)])
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        stack.model.train()
        inputs = example_inputs(stack.model)
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
        found.append([m.W_g.grad for m in mixtures(stack)])
        assert all(m.routing is None and not m.watched for m in mixtures(stack))
    assert all(float(g.abs().max()) > 1e-6 for g in found[0])
    assert all(close(one, two, 1e-7) for one, two in zip(*found, strict=True))


def test_a_step_may_call_the_model_twice_and_compute_both_again() -> None:
    """Layers that are recomputed hear of the last call, here of rows that theirs do not go into."""
    found = []
    for checkpointing in (False, True):
        stack = trained()
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = example_inputs(stack.model)
        step = TrainStep(stack, {**inputs, "labels": inputs["input_ids"]})

        def task(step: TrainStep = step) -> tuple[Tensor, object]:
            one = step.forward(**{name: x[:1] for name, x in step.batch.items()})
            two = step.forward(**{name: x[:, :4] for name, x in step.batch.items()})
            return one.loss + two.loss, two

        step.replace_task_loss(task)
        stack.run_train_step(step)
        found.append([p.grad for p in stack.ledger.parameters("dynmole")])
    assert all(close(one, two, 1e-6) for one, two in zip(*found, strict=True))


def test_reentrant_checkpointing_is_refused() -> None:
    stack = trained()
    stack.model.activation_checkpointing_enable({"use_reentrant": True})
    stack.model.enable_input_require_grads()
    inputs = example_inputs(stack.model)
    with pytest.raises(UnsupportedError, match="dynmole: reentrant checkpointing"):
        stack.train_step({**inputs, "labels": inputs["input_ids"]})


def test_no_loss_in_evaluation() -> None:
    stack = trained()
    stack.model.eval()
    inputs = example_inputs(stack.model)
    loss = stack.model(**inputs, labels=inputs["input_ids"]).loss
    step = TrainStep(stack, {**inputs, "labels": inputs["input_ids"]})
    stack.run_train_step(step)
    assert step.losses["task"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert all(m.routing is None for m in mixtures(stack))


def test_a_step_without_gradients_sees_the_loss() -> None:
    stack = Stack(tiny("llama"), [Dynmole(rank=2), Mezo()])
    inputs = example_inputs(stack.model)
    step = TrainStep(stack, {**inputs, "labels": inputs["input_ids"]}, learning_rate=1e-4)
    stack.run_train_step(step)
    assert 0 < step.losses["dynmole"] < 0.1


def test_trained_parameters() -> None:
    stack = Stack(tiny("llama"), [Dynmole(experts=5, rank=3, k_min=1)])
    sizes = [(32, 48), (32, 48), (48, 32)]  # gate, up, down of two layers
    expected = 2 * sum(5 * i + 5 * 3 * (i + o) for i, o in sizes)
    assert stack.trainable_parameters() == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"experts": 1}, "experts"),
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.1}, "rho"),
        ({"q": 0.0}, "q"),
        ({"k_min": 0}, "k_min"),
        ({"dropout": 1.0}, "dropout"),
        ({"balance": -1.0}, "balance"),
        *(({name: math.inf}, name) for name in ("alpha", "threshold", "balance", "certainty")),
        ({"k_min": 7}, ": Value error, k_min 7 of 6 experts: at most all of them"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Dynmole: {match}"):
        Dynmole(**options)
    assert Dynmole(k_min=6).config.k_min == 6


@pytest.mark.parametrize(
    ("arch", "options", "match"),
    [
        ("llama", {"experts": 33}, "33 experts, and the router of .* tells them apart by 32 numbers"),
        ("llama", {"rank": 33}, "rank 33 exceeds the 48x32 matrix"),
        ("mixtral", {"rank": 2}, "Mixture does not fold"),
    ],
)
def test_what_does_not_fit_is_refused(arch: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"dynmole: .*{match}"):
        Stack(tiny(arch), [Dynmole(**options)])


def test_the_mean_entropy_does_not_depend_on_how_rows_are_cut() -> None:
    """Micro-batches weigh as their real tokens do, here 9 and 4; the balance, which is no mean, is off."""
    stack = trained("llama", targets="all", threshold=0.73, balance=0.0, certainty=1.0)
    stack.model.eval()
    batch = example_inputs(stack.model)
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"][1, 4:], batch["labels"][1, 4:] = 0, -100
    parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
    found = []
    for batches in ([batch], parts):
        stack.model.zero_grad()
        for micro, (part, share) in enumerate(zip(batches, stack.shares(batches), strict=True)):
            stack.train_step(dict(part), micro=micro, accumulation=len(batches), share=share)
        found.append(torch.cat([p.grad.flatten() for p in stack.ledger.parameters("dynmole")]))
    assert close(found[1], found[0])
