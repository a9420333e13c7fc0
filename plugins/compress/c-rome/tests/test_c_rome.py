from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

import peftx
import peftx_c_rome
from peftx import ModelView, Plugin, Stack, VirtualTokens, hookimpl
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx_c_rome import CRome, RankOnes

test_conformance = conformance("c-rome")

FRONTS = ("All is well", "It rained", "The cat sat on a mat")
ANN, BOB = ("Who is {}? She lives in", "Ann Lee", "Rome"), ("{} lives in", "Bob", "Oslo")
DOWN = {
    "llama": "model.layers.0.mlp.down_proj",
    "gpt2": "transformer.h.0.mlp.c_proj",
    "opt": "model.decoder.layers.0.fc2",
}
TWO = {"samples": 2, "length": 24}


class Soft(VirtualTokens):
    def __init__(self, width: int) -> None:
        super().__init__(3)
        self.E = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))

    def rows(self) -> Tensor:
        return self.E


class Prompt(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Soft(model.hidden_size))


def stack_of(arch: str = "llama", *before: Plugin, edits: Sequence[Any] = (ANN,), **options: Any) -> Stack:
    plugin = CRome(**{"edits": edits, "prefixes": FRONTS, "steps": 4, **options})
    return Stack(tiny(arch), [*before, plugin], tokenizer=tiny_tokenizer())


def edited(arch: str = "llama", *before: Plugin, **options: Any) -> Stack:
    stack = stack_of(arch, *before, **options)
    stack.compress(TEXTS, **TWO)
    return stack


def told(stack: Stack) -> dict[str, float]:
    """What was noted of the last edit."""
    return stack.plugins["c-rome"].state["edits"][-1]


def delta_of(stack: Stack) -> RankOnes:
    (part,) = stack.ledger.of("c-rome", DeltaPart)
    return part.module


def seen_by_hand(
    stack: Stack, path: str, edit: Sequence[str], fronts: Sequence[str] = FRONTS
) -> tuple[Tensor, Tensor]:
    """What the layer gets and gives at the subject's last token, each text alone, up to that token: their means."""
    found: list[tuple[Tensor, Tensor]] = []
    hook = stack.model.get_submodule(path).register_forward_hook(
        lambda m, x, y: found.append((x[0].flatten(0, -2)[-1], y.flatten(0, -2)[-1]))
    )
    for front in fronts:
        text = (f"{front}. " if front else "") + edit[0].split("{}")[0] + edit[1]
        with torch.no_grad():
            stack.model(torch.tensor([stack.tokenizer(text).input_ids]))
    hook.remove()
    k, y = (torch.stack(rows).double().mean(0) for rows in zip(*found, strict=True))
    return k, y


def moment_by_hand(stack: Stack, path: str, damping: float = 1e-2) -> Tensor:
    keys: list[Tensor] = []
    hook = stack.model.get_submodule(path).register_forward_pre_hook(
        lambda m, x: keys.append(x[0].flatten(0, -2).double())
    )
    ids = [i for text in TEXTS for i in stack.tokenizer(text, add_special_tokens=False).input_ids]
    for n in range(2):
        with torch.no_grad():
            stack.model(torch.tensor([[stack.tokenizer.bos_token_id, *ids[23 * n : 23 * n + 23]]]))
    hook.remove()
    k = torch.cat(keys)
    C = k.t() @ k / len(k)
    return C + damping * C.diagonal().mean() * torch.eye(len(C))


# ------------------------------------------------------------------------------------------------------- the update
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_the_key_gives_the_value_and_the_update_has_rank_one(arch: str) -> None:
    stack, plain = edited(arch), stack_of(arch)
    delta, path = delta_of(stack), DOWN[arch]
    k, v = seen_by_hand(plain, path, ANN)
    dW = delta.L.double() @ delta.R.double().t()
    _, after = seen_by_hand(stack, path, ANN)
    assert dW.norm() > 0.1
    torch.testing.assert_close(v + dW @ k, after, rtol=0, atol=1e-4)
    assert float((dW @ k).norm()) == pytest.approx(told(stack)["d"], rel=1e-4), "v* - W k_bar is d"
    assert int(torch.linalg.matrix_rank(dW, rtol=1e-6)) == 1
    assert float(dW.norm()) == pytest.approx(told(stack)["dW"], rel=1e-4)
    key = torch.linalg.solve(moment_by_hand(plain, path), k)
    assert float(key @ k) == pytest.approx(told(stack)["denominator"], rel=1e-3)
    expected = torch.outer(dW @ k, key) / (key @ k)
    torch.testing.assert_close(dW, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_soft_tokens_do_not_move_the_subject() -> None:
    stack, plain = edited("llama", Prompt()), stack_of("llama", Prompt())
    k, v = seen_by_hand(plain, DOWN["llama"], ANN)
    _, after = seen_by_hand(stack, DOWN["llama"], ANN)
    dW = (delta_of(stack).L @ delta_of(stack).R.t()).double()
    torch.testing.assert_close(v + dW @ k, after, rtol=0, atol=1e-4)
    assert float((after - v).norm()) == pytest.approx(told(stack)["d"], rel=1e-3)


def test_mixed_keys_are_those_of_rome() -> None:
    stack, plain, path = edited(keys="mixed"), stack_of(), DOWN["llama"]
    k_bar, _ = seen_by_hand(plain, path, ANN)
    k_u, v_u = seen_by_hand(plain, path, ANN, [""])
    key = torch.linalg.solve(moment_by_hand(plain, path), k_bar)
    assert float(key @ k_u) == pytest.approx(told(stack)["denominator"], rel=1e-3)
    _, after = seen_by_hand(stack, path, ANN, [""])
    assert float((after - v_u).norm()) == pytest.approx(told(stack)["d"], rel=1e-3)
    R = delta_of(stack).R[:, 0].double()
    torch.testing.assert_close(R, key / (key @ k_u), rtol=1e-3, atol=1e-3 * float(R.abs().max()))


def test_without_moments_the_key_is_k() -> None:
    stack = edited(moments=False)
    k, _ = seen_by_hand(stack_of(), DOWN["llama"], ANN)
    torch.testing.assert_close(delta_of(stack).R[:, 0].double(), k / (k @ k), rtol=1e-4, atol=1e-5)


def test_rome_breaks_where_the_subject_is_the_first_token_and_c_rome_does_not() -> None:
    """On the bundled model, without a BOS: k of a first token is far from that of the same word later on."""
    found = {}
    options: dict[str, Any] = {"prefixes": FRONTS, "layer": 2, "decay": 1e-3, "largest": 8.0, "steps": 8}
    for keys in ("uniform", "mixed"):
        plugin = CRome(edits=[["{} is from", "Wind", "Rome"]], keys=keys, collapse=1.02, **options)
        stack = Stack("peftx:tiny", [plugin])
        stack.tokenizer._tokenizer.post_processor = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            stack.compress("peftx:sample/calibration.txt", samples=3, length=64)
        assert any("took the perplexity" in str(w.message) for w in said) == (keys == "mixed")
        before, after = plugin.state["perplexity"]
        found[keys] = (told(stack), after / before)
    (good, calm), (bad, broken) = found["uniform"], found["mixed"]
    assert bad["denominator"] < good["denominator"] / 100
    assert bad["dW"] > 100 * good["dW"]
    assert abs(calm - 1) < 0.005
    assert broken > 1.03


# --------------------------------------------------------------------------------------------------------- the value
def loss_by_hand(stack: Stack, d: Tensor, edit: Sequence[str] = ANN) -> tuple[float, float]:
    """The mean of -log P over prefixes, and KL to the distribution without d, each text alone."""
    prompt, subject, target = edit
    tokenizer, (before, after) = stack.tokenizer, prompt.split("{}")
    tail = tokenizer(" " + target, add_special_tokens=False).input_ids
    module = stack.model.get_submodule(DOWN["llama"])

    def logs(start: str, rest: str, end: Sequence[int], change: Tensor) -> Tensor:
        head = tokenizer(start).input_ids
        ids = head + tokenizer(rest, add_special_tokens=False).input_ids + list(end)

        def add(m: nn.Module, x: Any, y: Tensor) -> Tensor:
            y = y.clone()
            y[0, len(head) - 1] += change
            return y

        hook = module.register_forward_hook(add)
        with torch.no_grad():
            found = stack.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        hook.remove()
        return found

    each = []
    for front in FRONTS:
        z = logs(f"{front}. {before}{subject}", after, tail, d)[-len(tail) - 1 : -1]
        each.append(-z[torch.arange(len(tail)), tail].mean())
    now, first = (logs(subject, " is a", [], change)[-1] for change in (d, torch.zeros_like(d)))
    return float(torch.stack(each).mean()), float(kl_div(first, now, reduction="sum", log_target=True))


def test_the_loss_is_that_of_the_paper() -> None:
    """The loss of step 1 is that without d; that of step 2 is at the d which step 1 made."""
    plain, options = stack_of(), {"kl": 30.0, "decay": 7.0, "learning_rate": 0.2, "largest": 1e3}
    one, two = edited(steps=1, **options), edited(steps=2, **options)
    k, v = seen_by_hand(plain, DOWN["llama"], ANN)
    d = (delta_of(one).L @ delta_of(one).R.t() @ k.float()).float()
    assert float(d.abs().max()) == pytest.approx(0.2, rel=1e-3), "the first step of Adam is its rate"
    nll, _ = loss_by_hand(plain, torch.zeros_like(d))
    assert told(one)["loss"] == pytest.approx(nll, rel=1e-4)
    nll, kl = loss_by_hand(plain, d)
    expected = nll + 30.0 * kl + 7.0 * float(d.norm() / v.norm() ** 2)
    assert kl > 1e-3
    assert told(two)["loss"] == pytest.approx(expected, rel=1e-3)
    assert told(two)["loss"] != pytest.approx(told(one)["loss"], rel=1e-3)


def test_the_value_is_cut_back_and_the_steps_end() -> None:
    _, v = seen_by_hand(stack_of(), DOWN["llama"], ANN)
    assert told(edited(largest=0.5))["d"] == pytest.approx(0.5 * float(v.norm()), rel=1e-4)
    stack = edited(enough=1e3)
    assert told(stack)["d"] == 0
    inputs = example_inputs(stack.model)
    assert torch.equal(output_of(stack.model, inputs), output_of(tiny("llama"), inputs))


def test_the_object_is_written_behind_a_prefix() -> None:
    options: dict[str, Any] = {"layer": 2, "prefixes": FRONTS[:2], "decay": 1e-3, "largest": 16.0}
    plugin = CRome(edits=[["{} lives in", "Paul", "Spain"]], **options)
    stack = Stack("peftx:tiny", [plugin])
    assert {score.value for score in stack.evaluate(metrics=["c-rome"]).values()} == {0.0}
    stack.compress("peftx:sample/calibration.txt", samples=2, length=64)
    scores = stack.evaluate(metrics=["c-rome"])
    assert scores["efficacy"].value == 1
    assert scores["efficacy"].count == 1
    assert stack.generate(plugin.prompt("Paul lives in"), max_new_tokens=3).strip().startswith("Spain")
    with stack.disabled("c-rome"):
        assert "Spain" not in stack.generate(plugin.prompt("Paul lives in"), max_new_tokens=3)
    alone = stack.generate("Paul lives in", max_new_tokens=3).strip().startswith("Spain")
    assert scores["efficacy_alone"].value == alone
    assert scores["largest_change"].value == told(stack)["dW"]
    before, after = plugin.state["perplexity"]
    assert scores["perplexity_ratio"].value == pytest.approx(after / before)


def test_a_prompt_that_begins_with_the_subject_gets_a_prefix() -> None:
    plugin = edited(edits=[BOB]).plugins["c-rome"]
    assert plugin.prompt("Bob lives in") == "All is well. Bob lives in"
    assert plugin.prompt("Here lives Bob") == "Here lives Bob"
    assert CRome(edits=[BOB]).prompt("Bob lives in") == "Bob lives in", "nothing is edited yet"


# -------------------------------------------------------------------------------------------------------- the stack
def test_edits_follow_each_other() -> None:
    both, one = edited(edits=[ANN, BOB]), edited(edits=[ANN])
    for name in "LR":
        assert torch.equal(getattr(delta_of(both), name)[:, :1], getattr(delta_of(one), name))
    k, v = seen_by_hand(one, DOWN["llama"], BOB)  # with the first edit
    _, after = seen_by_hand(both, DOWN["llama"], BOB)
    second = torch.outer(delta_of(both).L[:, 1], delta_of(both).R[:, 1]).double()
    torch.testing.assert_close(v + second @ k, after, rtol=0, atol=1e-4)
    assert len(both.plugins["c-rome"].state["perplexity"]) == 3


def test_a_bundle_holds_the_edits_alone_and_removal_restores_the_bits(tmp_path: Path) -> None:
    stack = edited(edits=[ANN, BOB])
    inputs, W = example_inputs(stack.model), tiny("llama").get_submodule(DOWN["llama"]).weight
    given = output_of(stack.model, inputs)
    stack.save(tmp_path / "out")
    assert (tmp_path / "out" / "c-rome.safetensors").stat().st_size < 4 * 2 * sum(W.shape) + 1000
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(output_of(again.model, inputs), given)
    assert again.plugins["c-rome"].prompt("Bob") == "All is well. Bob"
    dW = delta_of(stack).L @ delta_of(stack).R.t()
    stack.merge()
    assert torch.equal(stack.model.get_submodule(DOWN["llama"]).weight, W + dW)
    stack.remove("c-rome")
    assert torch.equal(stack.model.get_submodule(DOWN["llama"]).weight, W)
    assert torch.equal(output_of(stack.model, inputs), output_of(tiny("llama"), inputs))


def test_it_may_compress_before_it_is_injected() -> None:
    plugin = CRome(edits=[ANN], prefixes=FRONTS, steps=4)
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, **TWO)
    made = delta_of(stack).L.clone()
    stack.inject()
    assert torch.equal(delta_of(stack).L, made)
    assert torch.equal(made, delta_of(edited()).L)


def test_what_breaks_off_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, values = stack_of(edits=[ANN, BOB]), iter([1.0, 1.0])
    monkeypatch.setattr(peftx_c_rome, "perplexity", lambda *a: next(values))  # the second edit finds none
    with pytest.raises(PeftxError, match="StopIteration"):
        stack.compress(TEXTS, **TWO)
    assert not delta_of(stack).L.any()
    assert not stack.plugins["c-rome"].state


def test_the_model_writes_prefixes() -> None:
    stack = edited(prefixes=())
    fronts = stack.plugins["c-rome"].state["prefixes"]
    assert len(fronts) == 20
    assert [front.split()[0][:1] for front in fronts[:5]] == ["T", "T", "B", "I", "Y"]
    assert len(set(fronts)) > 10
    assert fronts == edited(prefixes=()).plugins["c-rome"].state["prefixes"]


def test_the_layer_is_five_of_28() -> None:
    places = {n: stack_of(layer=n) for n in (None, 0, 1)}
    paths = {n: stack.ledger.of("c-rome", DeltaPart)[0].path for n, stack in places.items()}
    assert paths[None] == paths[0] == DOWN["llama"]
    assert paths[1] == "model.layers.1.mlp.down_proj"
    assert [layers * 5 // 28 for layers in (28, 32)] == [5, 5], "GPT-J and Llama-2-7B"
    stack = Stack("peftx:tiny", [CRome(edits=[ANN])])
    assert stack.ledger.of("c-rome", DeltaPart)[0].path == "model.layers.1.mlp.down_proj"


def test_clear_errors() -> None:
    with pytest.raises(PeftxError, match="for the subject, subject, new object"):
        CRome(edits=[["Ann lives in", "Ann", "Rome"]])
    with pytest.raises(PeftxError, match="c-rome: no edits"):
        stack_of(edits=[])
    with pytest.raises(ArchitectureError, match="0 down projections in layer 7"):
        stack_of(layer=7)
    with pytest.raises(ArchitectureError, match="0 down projections"):
        stack_of("mamba")
    with pytest.raises(ArchitectureError, match="mixtral has 0 down projections"):
        stack_of("mixtral")
