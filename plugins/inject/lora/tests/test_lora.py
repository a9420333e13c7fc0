from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peftx import Stack
from peftx.errors import PeftxError
from peftx.interop import from_peft, import_peft, to_peft
from peftx.kernel.parts import DeltaPart
from peftx.kernel.slots.delta import dropout_mask
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of
from peftx_lora import Lora, LoraConfig, LoraDelta

test_conformance = conformance("lora")
test_conformance_with_bias = conformance(
    "lora", options={"rank": 2, "bias": True}, models=["llama", "gpt2", "bert"]
)

IDS = torch.arange(24).reshape(2, 12)


def randomised(model: torch.nn.Module | None = None, **options: object) -> Stack:
    """A stack whose B is not zero."""
    stack = Stack(tiny("llama") if model is None else model, [Lora(**options)])
    generator = torch.Generator().manual_seed(1)
    for part in stack.ledger.of("lora"):
        if isinstance(part, DeltaPart):  # else the head of a classifier, which trains with it
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


def test_bias_by_hand() -> None:
    delta = LoraDelta(2, 2, rank=1, scale=3.0, bias=True)
    x, y = torch.tensor([[5.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    assert delta(x, y.clone()).tolist() == y.tolist(), "c starts at zero"
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2.0]]))
        delta.B.copy_(torch.tensor([[1.0], [-1.0]]))
        delta.c.copy_(torch.tensor([1.0, 2.0]))
    # s (B A x + c) = 3 (7 + 1, -7 + 2)
    assert delta(x, y.clone()).tolist() == [[34.0, -5.0]]
    for given, folded in ((None, [3.0, 6.0]), (torch.tensor([10.0, 10.0]), [13.0, 16.0])):
        _, bias = delta.fold(torch.zeros(2, 2), given)
        assert bias.tolist() == folded
    assert delta.low_rank() is None


@pytest.mark.parametrize(("arch", "what"), [("llama", "is an embedding"), ("mixtral", "holds experts")])
def test_a_bias_has_its_place_in_layers_alone(arch: str, what: str) -> None:
    with pytest.raises(PeftxError, match=f"lora: bias: .* {what}, and an update of the bias goes with"):
        Stack(tiny(arch), [Lora(rank=2, bias=True, targets="embedding" if arch == "llama" else "mlp")])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT's, which sees that it is a Conv1D
def test_roles_of_a_fused_matrix_go_out_with_biases_of_their_own(tmp_path: Path) -> None:
    """Each has a rank and a scale of its own, and PEFT one of each for the matrix."""
    from peft import PeftModel

    options = {"rank": 2, "ranks": {"attention.q": 4}, "alphas": {"attention.k": 3}, "targets": "attention"}
    stack = randomised(tiny("gpt2"), bias=True, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for part in stack.ledger.of("lora"):
            part.module.c.normal_()
    to_peft(stack, tmp_path)
    theirs = PeftModel.from_pretrained(tiny("gpt2"), tmp_path).eval()
    assert torch.allclose(logits(theirs), logits(stack.model), atol=1e-5, rtol=0)


def test_start_is_kaiming_uniform() -> None:
    """U(-1 / sqrt(in), 1 / sqrt(in)), and B = 0."""
    torch.manual_seed(0)
    delta = LoraDelta(400, 5, rank=8, scale=1.0)
    assert 0.99 / 20 < float(delta.A.detach().abs().max()) <= 1 / 20
    assert float(delta.A.detach().std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert not delta.B.any()


def test_number_of_parameters_is_r_times_in_plus_out() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=3, targets="attention.q,v")])
    sites = [s for s in stack.anatomy.sites if s.role in ("attention.q", "attention.v")]
    assert stack.trainable_parameters() == sum(3 * (s.in_features + s.out_features) for s in sites)


@pytest.mark.parametrize(("stabilized", "expected"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_scale(stabilized: bool, expected: float) -> None:
    assert Lora(rank=4, alpha=16, rank_stabilized=stabilized).scale(4, 16) == expected


def test_alpha_is_twice_the_rank_by_default() -> None:
    assert Lora(rank=4).scale(4, None) == 2.0 == Lora(rank=64).scale(64, None)


def test_ranks_by_role() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2, ranks={"attention.q": 4, "mlp": 6})])
    ranks = {part.path.split(".")[-1]: part.module.A.shape[0] for part in stack.ledger.of("lora")}
    assert ranks == {
        "q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 6, "up_proj": 6, "down_proj": 6
    }  # fmt: skip


def test_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"lora.*rank 9999 exceeds the .* matrix model\.layers\.0"):
        Stack(tiny("llama"), [Lora(rank=9999)])


def test_ranks_outside_the_targets_are_refused() -> None:
    with pytest.raises(
        PeftxError, match="lora: ranks: 'mlp' matches nothing inside targets 'attention'"
    ) as caught:
        Stack(tiny("llama"), [Lora(rank=2, targets="attention", ranks={"attention.q": 3, "mlp": 4})])
    assert "add it to targets" in str(caught.value.hint)
    stack = Stack(
        tiny("llama"), [Lora(rank=2, targets="mlp layers=1", ranks={"mlp.down": 4})]
    )  # of some layers
    assert sorted(part.module.A.shape[0] for part in stack.ledger.of("lora")) == [2, 2, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0}, {"dropout": 1.0}, {"alpha": -1.0}, {"alpha": math.inf}, {"alpha": math.nan}, {"rnak": 8},
        {"ranks": {"mlp": 0}}, {"ranks": {"mlp": -2}},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
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
    mask, scale = dropout_mask(x, 0.5, int(torch.randint(2**62, ()).item()))  # as documented: a seed, a mask
    keep = mask * scale
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


def peft_adapter(folder: Path, **options: Any) -> torch.nn.Module:
    """A PEFT model on the tiny Llama, and what it saves."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    } | options
    theirs = get_peft_model(tiny("llama"), LoraConfig(**options)).eval()
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # of the last case
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern", "ranks"),
    [
        ({"q_proj": 2}, {"q_proj": 4}, {"attention.q": 2}),  # the module's name
        ({"self_attn.q_proj": 2}, {"self_attn.q_proj": 4}, {"attention.q": 2}),  # the end of its path
        ({"(q|v)_proj": 2}, {".*_proj": 4}, {"attention.q": 2, "attention.v": 2}),  # a regular expression
        ({r"layers\.1\..*": 3}, {r"model.layers\.1\..*": 6}, {"attention layers=1": 3}),
        ({"_proj": 2}, {"_proj": 4, "self_attn": 6}, {}),  # no whole name: nothing matches
    ],
)  # fmt: skip
def test_patterns_are_read_as_peft_reads_them(
    tmp_path: Path, rank_pattern: dict[str, int], alpha_pattern: dict[str, int], ranks: dict[str, int]
) -> None:
    theirs = peft_adapter(tmp_path, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    stack = Stack(tiny("llama"), [Lora(rank=4, ranks=ranks, targets="attention.q,v")])
    from_peft(stack, tmp_path)
    assert torch.allclose(logits(theirs), logits(stack.model), atol=1e-5, rtol=0)


def test_options_of_an_adapter(tmp_path: Path) -> None:
    """On a matrix whose sides differ; a dropout that the adapter does not name is none."""
    peft_adapter(tmp_path, lora_dropout=0.25, target_modules=["up_proj"])
    config = tmp_path / "adapter_config.json"
    fields = json.loads(config.read_text())
    told = import_peft(tmp_path, model=tiny("llama")).plugins["lora"].config
    assert told == LoraConfig(rank=4, alpha=8, dropout=0.25, targets=told.targets)
    config.write_text(json.dumps({name: value for name, value in fields.items() if name != "lora_dropout"}))
    assert import_peft(tmp_path, model=tiny("llama")).plugins["lora"].config.dropout == 0
    config.write_text(json.dumps(fields | {"init_lora_weights": "pissa"}))
    with pytest.raises(PeftxError, match="takes something off W"):
        import_peft(tmp_path, model=tiny("llama"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about its own saving
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "embed_tokens"),
    ],
)
def test_more_than_lora_is_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    peft_adapter(tmp_path, **options)
    stack = Stack(tiny("llama"), [Lora(rank=4, targets="attention.q,v")])
    with pytest.raises(PeftxError, match=f"lora: the adapter is more than A and B of LoRA, it has .*{match}"):
        from_peft(stack, tmp_path)


def test_tensors_that_the_config_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    peft_adapter(tmp_path, use_dora=True)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": False}))
    stack = Stack(tiny("llama"), [Lora(rank=4, targets="attention.q,v")])
    with pytest.raises(PeftxError, match=r"it has base_model.*lora_magnitude_vector"):
        from_peft(stack, tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(PeftxError, match="it has peft_type='IA3'"):
        from_peft(stack, tmp_path)


@pytest.mark.parametrize(
    ("arch", "head", "task"),
    [
        ("bert", "classification", "SEQ_CLS"),
        ("llama", None, "CAUSAL_LM"),
        ("llama", "classification", "SEQ_CLS"),
        ("t5", None, "SEQ_2_SEQ_LM"),
        ("bert", "base", None),
        ("vit", None, None),  # it has a head, and PEFT has no wrapper for images
    ],
)
def test_the_task_is_that_of_the_model(tmp_path: Path, arch: str, head: str | None, task: str | None) -> None:
    """PEFT wraps the model by it, and computes the same; what is written comes back."""
    from peft import PeftModel

    options = {"head": head} if head else {}
    stack = randomised(tiny(arch, **options), rank=4)
    to_peft(stack, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = PeftModel.from_pretrained(tiny(arch, **options), tmp_path).eval()
    inputs = example_inputs(stack.model)
    for model in (stack.model, theirs.get_base_model()):
        model.config.pad_token_id = 0
    with torch.no_grad():
        one, two = (output_of(model, inputs) for model in (stack.model, theirs))
        with stack.disabled():
            base = output_of(stack.model, inputs)
    assert torch.allclose(one, two, atol=1e-5, rtol=0)
    assert not torch.allclose(one, base, atol=1e-3)
    again = Stack(tiny(arch, **options), [Lora(rank=4)])
    again.model.config.pad_token_id = 0
    from_peft(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), one)


def test_the_head_of_an_adapter_comes_with_it(tmp_path: Path) -> None:
    """The file of a classifier holds the head, which PEFT trains too; one of another size does not fit."""
    stack = randomised(tiny("bert", head="classification"), rank=2)
    with torch.no_grad():
        stack.model.classifier.bias.add_(1)
    to_peft(stack, tmp_path)
    again = Stack(tiny("bert", head="classification"), [Lora(rank=2)])
    from_peft(again, tmp_path)
    assert torch.equal(again.model.classifier.bias, stack.model.classifier.bias)
    wide = Stack(tiny("bert", head="classification", num_labels=5), [Lora(rank=2)])
    with pytest.raises(PeftxError, match=r"it has base_model\.model\.classifier\.bias"):
        from_peft(wide, tmp_path)


def test_an_adapted_head_goes_without_a_task(tmp_path: Path) -> None:
    """PEFT would replace the head, and with it the adapter."""
    from peft import PeftModel

    stack = randomised(tiny("bert", head="classification"), rank=2, targets="attention classifier")
    to_peft(stack, tmp_path)
    theirs = PeftModel.from_pretrained(tiny("bert", head="classification"), tmp_path).eval()
    assert torch.allclose(logits(theirs), logits(stack.model), atol=1e-5, rtol=0)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    to_peft(randomised(rank=4), tmp_path)
    with pytest.raises(PeftxError, match="modules differ"):
        from_peft(Stack(tiny("llama"), [Lora(rank=4, targets="mlp")]), tmp_path)
    stack = Stack(tiny("llama"), [Lora(rank=4, ranks={"mlp.down layers=1": 2})])
    with pytest.raises(
        PeftxError, match=r"down_proj \(32x48\) has rank 2 and scale 2, the adapter \(32x48\) 4 and 2"
    ):
        from_peft(stack, tmp_path)
    assert not any(part.module.B.any() for part in stack.ledger.of("lora"))  # all or nothing
    with pytest.raises(PeftxError, match=r"has rank 4 and scale 1.5, .* 4 and 2"):
        from_peft(Stack(tiny("llama"), [Lora(rank=4, alpha=6)]), tmp_path)
    wide = Stack(tiny("llama", intermediate_size=40), [Lora(rank=4)])
    with pytest.raises(PeftxError, match=r"\(40x32\) has rank 4 and scale 2, the adapter \(48x32\) 4 and 2"):
        from_peft(wide, tmp_path)
    fused = Stack(tiny("gpt2"), [Lora(rank=2)])
    with pytest.raises(PeftxError, match="fused"):
        from_peft(fused, tmp_path)
    with pytest.raises(PeftxError, match="no plugin 'lroa'"):
        to_peft(fused, tmp_path, id="lroa")
