from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack
from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of
from peftx_oft import Oft, OftConfig, Turn

test_conformance = conformance("oft")
test_conformance_of_the_butterfly = conformance(
    "oft",
    options={"block_size": 4, "butterfly": 3, "scale": True, "targets": "attention mlp"},
    models=["llama", "gpt2"],
)
test_conformance_constrained = conformance("oft", options={"block_size": 8, "eps": 0.1}, models=["bert"])

IDS = torch.arange(24).reshape(2, 12)
NAMES = {  # where our targets stand, for PEFT
    "llama": ("attention mlp", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "bert": ("attention.q,v mlp.up", "query value intermediate.dense"),
}


def turn(d: int, b: int, *, bias: Tensor | None = None, out: int | None = None, **options: Any) -> Turn:
    """With random parameters, in float64."""
    delta = Turn(d, b, OftConfig(**options), out_features=out, bias=bias).double()
    generator = torch.Generator().manual_seed(d)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.5)
    return delta


def matrix(delta: Turn, d: int) -> Tensor:
    """R: the layer sees R x."""
    return delta.pre(torch.eye(d, dtype=torch.float64)).mT.detach()


def deltas(stack: Stack) -> list[DeltaPart]:
    return stack.ledger.of("oft", DeltaPart)


def block_diagonal(blocks: Tensor) -> list[Tensor]:
    """What PEFT's CUDA kernel computes; without a GPU PEFT has one butterfly factor alone."""
    return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


def theirs_of(arch: str, kind: str, **options: Any) -> nn.Module:
    from peft import BOFTConfig, OFTConfig, get_peft_model

    config = {"OFT": OFTConfig, "BOFT": BOFTConfig}[kind]
    torch.manual_seed(3)
    names = NAMES[arch][1].split()
    return get_peft_model(tiny(arch), config(target_modules=names, init_weights=False, **options)).eval()


def copied(theirs: nn.Module, stack: Stack) -> None:
    """PEFT's numbers under our names: one name for one name."""
    found = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for part in deltas(stack):
            for name, parameter in part.module.named_parameters():
                weight = ".weight" if name == "oft_R" else ""
                parameter.copy_(found[f"base_model.model.{part.path}.{name}{weight}"])


def compare(theirs: nn.Module, stack: Stack, *, exact: float = 1e-14) -> None:
    """In float32 the logits differ by rounding, of the largest logit; in float64 by nothing."""
    inputs = example_inputs(stack.model)
    base = output_of(tiny(stack.model.config.model_type), inputs)
    for dtype, most in ((torch.float64, exact), (torch.float32, 2e-6)):
        with torch.no_grad():
            found = output_of(stack.model.to(dtype), inputs)
            wanted = output_of(theirs.to(dtype), inputs)
        assert (base - wanted).abs().max() > 0.05
        assert float((found - wanted).abs().max() / wanted.abs().max()) < most


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arch", list(NAMES))
@pytest.mark.parametrize(
    ("ours", "peft"),
    [
        ({"block_size": 4}, {"use_cayley_neumann": False}),
        ({"block_size": 8}, {"use_cayley_neumann": False, "oft_block_size": 8}),
        ({"blocks": 4}, {"use_cayley_neumann": False, "r": 4, "oft_block_size": 0}),
        ({"block_size": 4, "neumann": 5}, {}),
        ({"block_size": 4, "neumann": 4}, {"num_cayley_neumann_terms": 4}),
        ({"block_size": 4, "neumann": 7}, {"num_cayley_neumann_terms": 7}),
        ({"block_size": 4, "share": True}, {"use_cayley_neumann": False, "block_share": True}),
        ({"block_size": 4, "eps": 0.8}, {"use_cayley_neumann": False, "coft": True, "eps": 0.8}),
    ],
    ids=["4", "8", "blocks", "neumann5", "neumann4", "neumann7", "share", "coft"],
)
def test_equals_oft_of_peft(arch: str, ours: dict[str, Any], peft: dict[str, Any]) -> None:
    theirs = theirs_of(arch, "OFT", **{"oft_block_size": 4} | peft)
    stack = Stack(tiny(arch), [Oft(targets=NAMES[arch][0], **ours)])
    copied(theirs, stack)
    compare(theirs, stack, exact=5e-7 if "eps" in ours else 1e-14)  # PEFT's root of r is float32
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert stack.trainable_parameters() == trained


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arch", list(NAMES))
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_equals_boft_of_peft(arch: str, factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(forward=block_diagonal)
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: kernel)
    theirs = theirs_of(arch, "BOFT", boft_block_size=4, boft_n_butterfly_factor=factors)
    stack = Stack(tiny(arch), [Oft(block_size=4, butterfly=factors, scale=True, targets=NAMES[arch][0])])
    copied(theirs, stack)
    compare(theirs, stack)
    assert stack.trainable_parameters() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("eps", [None, 0.02])
def test_trains_as_oft_of_peft_does(eps: float | None) -> None:
    """COFT's projection after an update is theirs before the next forward pass."""
    coft = {"coft": True, "eps": eps} if eps else {}
    theirs = theirs_of("llama", "OFT", oft_block_size=4, use_cayley_neumann=False, **coft)
    stack = Stack(tiny("llama"), [Oft(block_size=4, eps=eps, targets=NAMES["llama"][0])])
    copied(theirs, stack)
    batch = dict(example_inputs(stack.model))
    batch["labels"] = batch["input_ids"]
    ours = torch.optim.SGD(stack.ledger.parameters("oft"), lr=0.5)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        if eps:
            for part in deltas(stack):
                part.module.project()  # of the start, which PEFT projects where it first runs
        stack.train_step(batch, optimizer=ours)
        theirs(**batch).loss.backward()
        other.step()
        other.zero_grad()
    theirs(**batch)  # PEFT's last projection
    found = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    for part in deltas(stack):
        wanted = found[f"base_model.model.{part.path}.oft_R.weight"]
        assert torch.allclose(part.module.oft_R, wanted, atol=1e-6)
        if eps:  # of r blocks
            norms = torch.linalg.matrix_norm(part.module.free())
            assert norms.max() <= eps / math.sqrt(len(wanted)) * (1 + 1e-5)


def test_cayley_by_hand() -> None:
    """Q = [[0, q], [-q, 0]]: R turns by 2 atan(q), here q = 1/2: cos = 3/5, sin = 4/5."""
    delta = Turn(2, 2, OftConfig())
    with torch.no_grad():
        delta.oft_R.fill_(0.5)
    assert torch.allclose(delta.pre(torch.eye(2)).mT, torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    weight = torch.tensor([[1.0, 2.0]])
    assert torch.allclose(delta.fold(weight, None)[0], torch.tensor([[-1.0, 2.0]]))


@pytest.mark.parametrize("b", [2, 3, 4, 12])
def test_is_the_cayley_transform_of_each_block(b: int) -> None:
    delta = turn(12, b)
    blocks = []
    for Q in delta.free()[0].detach():
        assert torch.equal(Q, -Q.mT)
        identity = torch.eye(b)
        blocks.append((identity + Q) @ torch.linalg.inv(identity - Q))
    assert torch.allclose(matrix(delta, 12), torch.block_diag(*blocks), atol=1e-12)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("factors", [None, 1, 2, 3])
def test_R_is_a_rotation(factors: int | None, share: bool) -> None:
    R = matrix(turn(16, 4, butterfly=factors, share=share), 16)
    assert torch.allclose(R.mT @ R, torch.eye(16, dtype=torch.float64), atol=1e-12)
    assert float(torch.linalg.det(R)) == pytest.approx(1)
    assert (R - torch.eye(16)).abs().max() > 0.1


def test_hyperspherical_energy_of_the_rows_stays() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def energy(W: Tensor) -> float:
        unit = W / W.norm(dim=1, keepdim=True)
        return float((1 / torch.pdist(unit)).sum())

    for options in ({}, {"butterfly": 3}, {"scale": True}):
        delta = turn(16, 4, out=6 if options.pop("scale", False) else None, **options)
        with torch.no_grad():
            if delta.boft_s is not None:
                delta.boft_s.abs_()  # a length alone
        new = delta.fold(weight, None)[0].detach()
        assert energy(new) == pytest.approx(energy(weight))
        assert (new - weight).abs().max() > 0.1


@pytest.mark.parametrize("share", [False, True])
def test_butterfly_is_the_product_of_factors_on_coordinates_that_stand_apart(share: bool) -> None:
    """B_i turns half blocks j and j + 2^(i-1) of each group of 2^i together."""
    d, b, m = 16, 4, 3
    delta = turn(d, b, butterfly=m, share=share)
    product = torch.eye(d, dtype=torch.float64)
    for i, Qs in enumerate(delta.free().detach()):
        Qs = Qs.expand(d // b, b, b)
        B, block = torch.zeros(d, d, dtype=torch.float64), 0
        for group in range(
            0, d // 2, 2 ** (i + 1)
        ):  # counted in half blocks, of which there are d / (b / 2) = 8
            for j in range(group, min(group + 2**i, d // 2)):
                if group + 2**i >= d // (b // 2):
                    break
                half = b // 2
                at = [*range(j * half, j * half + half), *range((j + 2**i) * half, (j + 2**i) * half + half)]
                Q, identity = Qs[block], torch.eye(b)
                B[torch.tensor(at)[:, None], torch.tensor(at)] = (identity + Q) @ torch.linalg.inv(
                    identity - Q
                )
                block += 1
        assert block == d // b
        product = product @ B  # R = B_1 B_2 ... B_m
    assert torch.allclose(matrix(delta, d), product, atol=1e-12)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_m_factors_reach_2_to_the_m_minus_1_blocks(factors: int) -> None:
    """d = 16 in 4 blocks: with 1 + log2 4 = 3 factors R is dense."""
    R = matrix(turn(16, 4, butterfly=factors), 16)
    assert ((R.abs() > 1e-9).sum(1) == 4 * 2 ** (factors - 1)).all()


def test_one_factor_is_oft() -> None:
    delta, factor = turn(12, 4), turn(12, 4, butterfly=1)
    with torch.no_grad():
        factor.boft_R.copy_(delta.free())
    assert torch.allclose(matrix(delta, 12), matrix(factor, 12), atol=1e-12)


def test_the_series_comes_near_the_inverse_of_minus_Q() -> None:
    errors = []
    for terms in (4, 6, 9):
        delta = turn(12, 4, neumann=terms)
        with torch.no_grad():
            delta.oft_R.mul_(0.2)
        exact = turn(12, 4)
        with torch.no_grad():
            exact.oft_R.copy_(-delta.oft_R)
        errors.append(float((matrix(delta, 12) - matrix(exact, 12)).abs().max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-4


def test_number_of_parameters_is_that_of_the_paper() -> None:
    """Section 3.3: a 128 x 128 matrix with r = 8 has 960, where LoRA of rank 8 has 2,048."""
    delta = Turn(128, 128 // 8, OftConfig())
    assert sum(p.numel() for p in delta.parameters()) == 960 == 128 * (128 // 8 - 1) // 2
    assert sum(p.numel() for p in Turn(128, 16, OftConfig(share=True)).parameters()) == 960 // 8
    stack = Stack(tiny("llama"), [Oft(block_size=8)])
    sizes = [s.in_features for s in stack.anatomy.sites if s.role.startswith("attention.")]
    assert stack.trainable_parameters() == sum(d * 7 // 2 for d in sizes)


def test_default_is_blocks_of_32_in_the_attention() -> None:
    stack = Stack(tiny("llama"), [Oft()])
    assert {part.module.size for part in deltas(stack)} == {32}
    assert {part.path.split(".")[3] for part in deltas(stack)} == {"self_attn"}


@pytest.mark.parametrize("factors", [None, 2])
def test_coft_stays_in_its_ball(factors: int | None) -> None:
    """|Q_i| <= eps / sqrt(r), by the shortest way: what is inside stays, what is outside goes to the border."""
    delta = turn(16, 4, butterfly=factors, eps=0.5)
    with torch.no_grad():
        R = getattr(delta, delta.key)
        (R[:, 0] if factors else R[0]).mul_(1e-3)  # the first block
    before = delta.free().detach().clone()
    norms = torch.linalg.matrix_norm(before)
    assert (norms < 0.25).any()
    assert (norms > 0.25).any()
    R = matrix(delta, 16)  # in the ball without a projection of the parameters
    delta.project()
    after = delta.free().detach()
    assert torch.allclose(after, before * (0.25 / norms).clamp(max=1)[..., None, None], atol=1e-12)
    assert torch.allclose(matrix(delta, 16), R, atol=1e-12)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_coft_projects_after_each_update(accumulation: int) -> None:
    stack = Stack(tiny("bert", head="classification", num_labels=3), [Oft(block_size=8, eps=1e-3)])
    batch = {**example_inputs(stack.model), "labels": torch.tensor([0, 2])}
    optimizer = torch.optim.SGD([p for p in stack.model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(accumulation):
        stack.train_step(batch, optimizer=optimizer)
    norms = torch.stack([torch.linalg.matrix_norm(part.module.free()).max() for part in deltas(stack)])
    assert norms.max().item() == pytest.approx(1e-3 / 2, rel=1e-4)  # 4 blocks


@pytest.mark.parametrize("bias", [True, False])
def test_scale_by_hand(bias: bool) -> None:
    layer = nn.Linear(8, 6, bias=bias, dtype=torch.float64)
    delta = turn(8, 4, out=6, bias=layer.bias)
    R, s = matrix(delta, 8), delta.boft_s.detach()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b = layer.bias if bias else torch.zeros(6)
    expected = x @ (s * layer.weight @ R).mT + b
    assert torch.allclose(delta(x, layer(delta.pre(x))), expected)
    weight, folded = delta.fold(layer.weight, layer.bias)
    assert torch.allclose(weight, s * layer.weight @ R)
    assert folded is None if not bias else torch.allclose(folded, layer.bias)


def test_starts_at_the_identity_to_the_bit_in_half_precision() -> None:
    for options in ({}, {"butterfly": 2, "scale": True}, {"neumann": 5}, {"eps": 1e-4}):
        model = tiny("gpt2").to(torch.bfloat16)
        with torch.no_grad():
            before = model(IDS).logits
            stack = Stack(model, [Oft(block_size=4, **options)])
            assert torch.equal(stack.model(IDS).logits, before)
        assert {p.dtype for p in stack.ledger.parameters("oft")} == {torch.float32}


def test_lengths_stay_in_half_precision() -> None:
    delta = turn(256, 32).float()
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    turned = delta.pre(x)
    assert turned.dtype == torch.bfloat16
    assert torch.allclose(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=2e-3)


@pytest.mark.parametrize("first", [True, False])
def test_order_in_a_stack_is_the_order_of_the_maths(first: bool) -> None:
    from peftx_lora import Lora

    targets = "attention.q layers=0"
    ours, low = Oft(block_size=4, targets=targets), Lora(rank=2, targets=targets)
    stack = Stack(tiny("llama"), [ours, low] if first else [low, ours])
    for id in ("oft", "lora"):
        for parameter in stack.ledger.parameters(id):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    (part,), (lora,) = deltas(stack), stack.ledger.of("lora")
    R = part.module.pre(torch.eye(32)).mT.detach()
    BA = (lora.module.scale * lora.module.B @ lora.module.A).detach()
    dense = stack.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    expected = x @ (dense.weight @ R + BA if first else (dense.weight + BA) @ R).t()
    assert torch.allclose(dense(x), expected, atol=1e-4)
    stack.merge()
    assert torch.allclose(dense(x), expected, atol=1e-4)


def test_a_fused_matrix_has_one_R() -> None:
    stack = Stack(tiny("gpt2"), [Oft(block_size=8, targets="attention.q,k,v")])
    assert stack.trainable_parameters() == 2 * 32 * 7 // 2
    with pytest.raises(PeftxError, match=r"oft: .*c_attn, which attention\.k, attention\.v shares"):
        Stack(tiny("gpt2"), [Oft(block_size=8, targets="attention.q")])


def test_stacked_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"oft: .*MixtralExperts"):
        Stack(tiny("mixtral"), [Oft(block_size=4, targets="mlp")])
    Stack(tiny("mixtral"), [Oft(block_size=4)])


@pytest.mark.parametrize(
    ("options", "match", "hint"),
    [
        ({"block_size": 5}, r"oft: blocks of 5 and 1 factors do not fit the 32 inputs of .*q_proj", "2, 4, 8, 16, 32"),
        ({"blocks": 5}, r"oft: 5 blocks and 1 factors do not fit the 32 inputs", "2, 4, 8, 16, 32"),
        ({"blocks": 32}, r"oft: 32 blocks", "2, 4, 8, 16, 32"),  # of one number, which do not turn
        ({"block_size": 8, "butterfly": 4}, r"blocks of 8 and 4 factors", r"\[2, 4\]"),
        ({"butterfly": 6}, r"blocks of 32 and 6 factors", r"\[\]"),
        ({"block_size": 3, "butterfly": 2, "targets": "mlp.down"}, "blocks of 3 and 2 factors", r"4, 6, 8, 12, 24"),
        ({"targets": "mlp"}, r"oft: blocks of 32 and 1 factors do not fit the 48 inputs", r"'!mlp\.down'"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit_are_refused(options: dict[str, Any], match: str, hint: str) -> None:
    with pytest.raises(PeftxError, match=match) as caught:
        Stack(tiny("llama"), [Oft(**options)])
    assert caught.match(match)
    import re

    assert re.search(hint, str(caught.value.hint))


def test_odd_blocks_need_no_halves() -> None:
    Stack(tiny("llama"), [Oft(block_size=3, targets="mlp.down")])


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 1}, {"blocks": 0}, {"eps": 0.0}, {"eps": math.inf}, {"butterfly": 0}, {"neumann": 3},
        {"targets": ""}, {"share": "much"}, {"rank": 8}, {"blocks": 4, "block_size": 8},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Oft: {next(iter(options))}"):
        Oft(**options)
