from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance, tiny
from peftx_lora import Lora, LoraDelta, from_peft, to_peft

test_conformance = conformance("lora")

IDS = torch.arange(24).reshape(2, 12)


def randomised(**options: object) -> Stack:
    """A stack whose B is not zero."""
    stack = Stack(tiny("llama"), [Lora(**options)])
    generator = torch.Generator().manual_seed(1)
    for part in stack.ledger.of("lora"):
        with torch.no_grad():
            part.module.B.normal_(0, 0.1, generator=generator)
    return stack


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_update_by_hand() -> None:
    delta = LoraDelta(2, 2, rank=1, scale=3.0)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2.0]]))
        delta.B.copy_(torch.tensor([[1.0], [-1.0]]))
    x, y = torch.tensor([[5.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    # A x = 5 + 2 = 7; s B A x = 3 * (7, -7)
    assert delta(x, y.clone()).tolist() == [[31.0, -11.0]]
    weight, _ = delta.fold(torch.zeros(2, 2), None)
    assert weight.tolist() == [[3.0, 6.0], [-3.0, -6.0]]


def test_number_of_parameters_is_r_times_in_plus_out() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=3, targets="attention.q,v")])
    sites = [s for s in stack.anatomy.sites if s.role in ("attention.q", "attention.v")]
    assert stack.trainable_parameters() == sum(3 * (s.in_features + s.out_features) for s in sites)


@pytest.mark.parametrize(("stabilized", "expected"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_scale(stabilized: bool, expected: float) -> None:
    assert Lora(rank=4, alpha=16, rank_stabilized=stabilized).scale(4) == expected


def test_alpha_is_twice_the_rank_by_default() -> None:
    assert Lora(rank=4).scale(4) == 2.0 == Lora(rank=64).scale(64)


def test_ranks_by_role() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2, ranks={"attention.q": 4, "mlp": 6})])
    ranks = {part.path.split(".")[-1]: part.module.A.shape[0] for part in stack.ledger.of("lora")}
    assert ranks == {
        "q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 6, "up_proj": 6, "down_proj": 6
    }  # fmt: skip


def test_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"lora.*rank 9999 exceeds the .* matrix model\.layers\.0"):
        Stack(tiny("llama"), [Lora(rank=9999)])


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"alpha": -1.0}, {"rnak": 8}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        Lora(**options)


def test_dropout_gradients_are_those_of_the_masked_input() -> None:
    torch.manual_seed(0)
    delta = LoraDelta(6, 5, rank=2, scale=1.5, dropout=0.5).double().train()
    with torch.no_grad():
        delta.B.normal_()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(3, 5, dtype=torch.float64)

    torch.manual_seed(7)
    out = delta(x, y)
    grad_x, grad_A = torch.autograd.grad(out.square().sum(), [x, delta.A])
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(
        int(torch.randint(2**62, ()).item())
    )  # as documented: a seed, a mask
    keep = torch.empty_like(x).bernoulli_(0.5, generator=generator) / 0.5
    A = delta.A.detach().clone().requires_grad_()
    expected = y + 1.5 * (x * keep) @ A.t() @ delta.B.t()
    assert torch.allclose(out, expected)
    for found, wanted in zip(
        (grad_x, grad_A), torch.autograd.grad(expected.square().sum(), [x, A]), strict=True
    ):
        assert torch.allclose(found, wanted)


def test_ours_in_peft_gives_the_same_logits(tmp_path: Path) -> None:
    from peft import PeftModel

    stack = randomised(rank=4, ranks={"mlp": 2})
    to_peft(stack, tmp_path)
    theirs = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.allclose(logits(theirs), logits(stack.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_in_ours_gives_the_same_logits(tmp_path: Path, stabilized: bool) -> None:
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=stabilized, target_modules=names, init_lora_weights=False
    )
    torch.manual_seed(3)
    theirs = get_peft_model(tiny("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    stack = Stack(
        tiny("llama"),
        [Lora(rank=4, alpha=12, rank_stabilized=stabilized, targets="attention.q,v mlp.down")],
    )
    from_peft(stack, tmp_path)
    assert torch.allclose(logits(theirs), logits(stack.model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(stack.model), logits(tiny("llama")), atol=1e-3)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    to_peft(randomised(rank=4), tmp_path)
    with pytest.raises(PeftxError, match="modules differ"):
        from_peft(Stack(tiny("llama"), [Lora(rank=4, targets="mlp")]), tmp_path)
    with pytest.raises(PeftxError, match="has rank 2"):
        from_peft(Stack(tiny("llama"), [Lora(rank=2)]), tmp_path)
    with pytest.raises(PeftxError, match="fused"):
        to_peft(Stack(tiny("gpt2"), [Lora(rank=2)]), tmp_path / "gpt2")
