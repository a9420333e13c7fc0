from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Plugin, Stack, TrainStep, hookimpl
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.injecting import NetworkPrefix
from peftx_byte2word import Byte2Word
from peftx_connected_adapters import ConnectedAdapters
from peftx_full_finetuning import FullFinetuning
from peftx_localist_dial import LocalistDial
from peftx_lora import Lora
from peftx_ls_llama import LsLlama
from peftx_nf4 import NF4Storage
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning
from peftx_sift import Sift
from peftx_transcoder import Knowledge, Transcoder

test_conformance = conformance("transcoder")

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
SOURCES = {
    task: [{"prompt": f"{n} {task}", "completion": f" {task}"} for n in range(8)] for task in ("sum", "def")
}
RUN: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.02}


def stack_of(*beside: Plugin, arch: str = "llama", **options: Any) -> tuple[Stack, Transcoder]:
    plugin = Transcoder(**{"tasks": ("sum", "def"), "rounds": 2, "length": 3, "hidden": 4, **options})
    return Stack(tiny(arch), [*beside, plugin], tokenizer=tiny_tokenizer()), plugin


def logits(stack: Stack) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left"))


def knowledge(stack: Stack) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in stack.ledger.tensors("transcoder").items()}


def others(stack: Stack) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in stack.ledger.trained(but="transcoder").items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


# -- the prefix --------------------------------------------------------------------------------------------------------


def test_a_network_by_hand() -> None:
    """P = W_2 tanh(W_1 E + b_1) + b_2, and an attention's part of it."""
    network = Knowledge(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 1, 3)
    with torch.no_grad():
        network.down.weight.copy_(torch.tensor([[0.5, -0.25]]))
        network.down.bias.fill_(0.1)
        network.up.weight.copy_(torch.tensor([[1.0], [2.0], [-3.0]]))
        network.up.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    t = torch.tensor([0.6, -0.4]).tanh()
    torch.testing.assert_close(network(slice(0, 3)), torch.stack((t, 2 * t + 1, -3 * t), 1))
    torch.testing.assert_close(network(slice(1, 2)), (2 * t + 1)[:, None])
    assert {name for name, _ in network.named_parameters()} == {
        "down.weight",
        "down.bias",
        "up.weight",
        "up.bias",
    }


@pytest.mark.parametrize("arch", ["llama", "t5", "bert", "gpt2"])
def test_it_is_the_prefix_that_the_networks_compute(arch: str) -> None:
    """Prefix tuning with these rows: each attention has its own part, and the text keeps its positions."""
    stack, _ = stack_of(arch=arch)
    plain = Stack(
        tiny(arch),
        [
            PTuningV2(
                length=3,
                projection=None,
                targets="attention cross_attention" if arch == "t5" else "attention",
            )
        ],
        tokenizer=tiny_tokenizer(),
    )
    parts = {
        part.key: part.module
        for part in stack.ledger.of("transcoder")
        if isinstance(part.module, NetworkPrefix)
    }
    written = {part.key: part.module for part in plain.ledger.of("p-tuning-v2")}
    assert parts.keys() == written.keys()
    with torch.no_grad():
        for name, module in written.items():
            rows = module.prompt.rows  # [2, heads, l, size]
            P = parts[name].compute().unflatten(-1, (2, rows.shape[1], -1))
            rows.copy_(P.permute(1, 2, 0, 3))
    torch.testing.assert_close(logits(stack), logits(plain), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(stack), logits(Stack(tiny(arch), [])), atol=1e-3)


def test_each_kind_of_attention_has_one_network() -> None:
    names = {name.split(".")[1] for name in knowledge(stack_of(arch="t5")[0])}
    assert names == {"encoder_attention", "decoder_attention", "decoder_cross_attention"}
    stack, _ = stack_of()
    assert {name.split(".")[1] for name in knowledge(stack)} == {"decoder_attention"}
    widths = sum(2 * n.kv_heads * n.head_dim for n in stack.anatomy.main.by_layer)
    assert stack.trainable_parameters() == 4 * (32 + 1) + (4 + 1) * widths


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
@pytest.mark.parametrize("prompted", [False, True])
def test_E_is_what_the_model_makes_of_the_first_ids(arch: str, prompted: bool) -> None:
    """With what stands on it already; soft tokens are read and left out."""
    prompt = [PromptTuning(length=2)] * prompted
    stack, _ = stack_of(Lora(rank=2), *prompt, arch=arch)
    plain = Stack(tiny(arch), prompt, tokenizer=tiny_tokenizer())
    for p, own in zip(
        plain.ledger.parameters("prompt-tuning"), stack.ledger.parameters("prompt-tuning"), strict=True
    ):
        p.data.copy_(own)
    reader = plain.model.get_encoder() if arch == "t5" else plain.model.base_model
    with torch.no_grad():
        expected = reader(input_ids=torch.tensor([[0, 1, 2]])).last_hidden_state[0, -3:]
    found = [x for name, x in knowledge(stack).items() if name.endswith(".E")]
    assert len(found) == (3 if arch == "t5" else 1)
    for E in found:
        torch.testing.assert_close(E, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "beside",
    [
        Byte2Word(width=6, heads=2, longest=4),
        ConnectedAdapters(inside=4, aside=2),
        LocalistDial(blocks={"vowels": ("a", "e")}),
    ],
)
def test_E_is_read_by_plugins_that_ask_for_the_call(beside: Plugin) -> None:
    """Token ids, and the whole model."""
    stack, _ = stack_of(beside)
    (E,) = (x for name, x in knowledge(stack).items() if name.endswith(".E"))
    ids = torch.tensor([[0, 1, 2]])
    with torch.no_grad(), stack.disabled("transcoder"):
        expected = stack.model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(E, expected, rtol=1e-4, atol=1e-5)


def test_it_stands_on_a_packed_model() -> None:
    stack = Stack(
        tiny("llama"), [NF4Storage(), Transcoder(length=3)], tokenizer=tiny_tokenizer(), inject=False
    )
    stack.compress(["Once upon a time."], ["nf4"])
    stack.inject()
    assert stack.train(ROWS, steps=2, **RUN).terms["task"] > 0


def test_generation_with_a_cache_is_generation_without() -> None:
    stack, _ = stack_of()
    found = [stack.generate("ab", max_new_tokens=6, use_cache=cache) for cache in (True, False)]
    assert found[0] == found[1]


# -- from task to task -------------------------------------------------------------------------------------------------


class Watch(Plugin):
    """Notes what a step saw, and all values before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        stack = step.stack
        text = stack.tokenizer.decode(step.batch["input_ids"].flatten(), skip_special_tokens=True)
        note = {"text": text, "knowledge": knowledge(stack), "others": others(stack)}
        self.seen.append(note | {"asks": [*stack.plugins["transcoder"].sources]})
        return (yield)


def run(*beside: Plugin, steps: int = 8, **options: Any) -> tuple[Stack, Transcoder, list[dict[str, Any]]]:
    plugin, watch = (
        Transcoder(**{"tasks": ("sum", "def"), "rounds": 2, "length": 3, "hidden": 4, **options}),
        Watch(),
    )
    stack = Stack(tiny("llama"), [*beside, plugin, watch], tokenizer=tiny_tokenizer())
    sources = {name: SOURCES[name] for name in plugin.sources}
    phases: list[str] = []
    stack.train(
        ROWS, steps=steps, sources=sources, progress=lambda *told: phases.append(told[2]["transcoder"]), **RUN
    )
    return stack, plugin, [{"phase": name, **note} for name, note in zip(phases, watch.seen, strict=True)]


@pytest.mark.parametrize("beside", [Lora(rank=2), FullFinetuning(), Sift(density=0.05)])
def test_only_the_knowledge_is_carried(beside: Plugin) -> None:
    stack, plugin, seen = run(beside, steps=10)
    visits = ["sum 1", "def 1", "sum 2", "def 2", "target"]
    assert [note["phase"] for note in seen] == [name for name in visits for _ in range(2)]
    start = seen[0]["others"]
    for i, (one, two) in enumerate(pairwise(seen)):
        task = one["phase"].partition(" ")[0]
        assert task == "target" or task in one["text"], "the rows are those of the task"
        assert task != "target" or "1 =" in one["text"]
        moved = {name for name, x in one["knowledge"].items() if not torch.equal(x, two["knowledge"][name])}
        assert moved == {name for name in one["knowledge"] if not name.endswith(".E")}, "in every step"
        assert equal(two["others"], start) == (i % 2 == 1), (
            "begins each task as it was at first, and trains in it"
        )
    assert not equal(others(stack), start), "what the target trained stays"
    assert plugin.state == {"sourced": True}


def test_a_run_may_end_with_the_sources() -> None:
    stack, plugin, seen = run(FullFinetuning(), adapt=False, steps=8)
    assert [note["phase"] for note in seen][-2:] == ["def 2", "def 2"]
    assert all(note["asks"] == ["sum", "def"] for note in seen)
    model = tiny("llama")
    for name, p in stack.model.named_parameters():
        if "peftx" not in name:
            assert torch.equal(p, model.get_parameter(name)), name
    assert plugin.state == {"sourced": True}
    assert plugin.sources == {}
    assert [phase.name for phase in plugin.phases()] == ["target"]


def test_a_bundle_of_knowledge_goes_on_to_a_target(tmp_path: Path) -> None:
    """As networks with these values do; and other values learn otherwise: the random prefix is the baseline."""
    plugin = Transcoder(tasks=("sum",), rounds=1, length=3, hidden=4, adapt=False)
    stack = peftx.Stack("peftx:tiny", [Lora(rank=2), plugin])
    stack.train(ROWS, steps=3, sources={"sum": SOURCES["sum"]}, **RUN)
    stack.save(tmp_path / "b")
    again = peftx.load(tmp_path / "b")
    assert equal(knowledge(again), knowledge(stack))
    written, fresh = (
        Stack("peftx:tiny", [Lora(rank=2), Transcoder(length=3, hidden=4)], seed=1) for _ in range(2)
    )
    for one in (written, fresh):
        for name, x in again.ledger.trained(but="transcoder").items():
            one.ledger.trained(but="transcoder")[name].data.copy_(x)
    for name, x in written.ledger.tensors("transcoder").items():
        x.data.copy_(again.ledger.tensors("transcoder")[name])
    found = [list(one.train(ROWS, steps=2, **RUN).losses) for one in (again, written, fresh)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_length_0_is_plain_tuning() -> None:
    stack, _ = stack_of(tasks=(), length=0)
    assert torch.equal(logits(stack), logits(Stack(tiny("llama"), [])))
    losses = []
    for plugins in ([Lora(rank=2)], [Lora(rank=2), Transcoder(length=0)]):
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        losses.append(list(stack.train(ROWS, steps=4, **RUN).losses))
    assert losses[0] == losses[1]


def test_a_source_step_is_the_models_own_loss_on_its_rows() -> None:
    stack, _ = stack_of(Lora(rank=2))
    inputs = example_inputs(stack.model)
    batch = inputs | {"labels": inputs["input_ids"]}
    step = TrainStep(stack, {}, total=10, share={"labels": 0.1, "inputs": 0.1, "rows": 0.1})
    step.batch_of = lambda name: batch if name == "sum" else {}  # type: ignore[method-assign]
    stack.run_train_step(step)
    with torch.no_grad():
        assert step.losses == {"task": pytest.approx(float(stack.model(**batch).loss), rel=1e-5)}
    gradient = [p.grad.clone() for p in step.parameters()]
    stack.model.zero_grad()
    stack.model(**batch).loss.backward()
    for p, found in zip(step.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, found)


def test_each_task_begins_with_an_optimizer_that_is_empty() -> None:
    stack, _ = stack_of(Lora(rank=2), steps=2)
    feeds = {
        "sources": {name: type("Feed", (), {"batch": lambda self, n: batch_of(stack)})() for name in SOURCES}
    }
    optimizer = torch.optim.AdamW(
        parameters := [p for p in stack.model.parameters() if p.requires_grad], lr=0.01
    )
    counts = []
    for _ in range(4):
        stack.train_step(batch_of(stack), optimizer=optimizer, **feeds)
        counts.append({int(optimizer.state[p]["step"]) if optimizer.state[p] else 0 for p in parameters})
    assert counts == [{1}, {0}, {1}, {0}]
    assert not any(x.requires_grad for x in stack.memory["transcoder"]["start"].values())


def batch_of(stack: Stack) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model)
    return inputs | {"labels": inputs["input_ids"]}


# -- what is asked for, and refused ------------------------------------------------------------------------------------


def test_phases_of_a_run() -> None:
    plugin = Transcoder(tasks=("a", "b"), rounds=2, steps=5)
    assert [(phase.name, phase.share) for phase in plugin.phases()] == [
        ("a 1", 5), ("b 1", 5), ("a 2", 5), ("b 2", 5), ("target", None)
    ]  # fmt: skip
    assert [phase.share for phase in Transcoder(tasks=("a",)).phases()] == [0.2, 0.2, 0.2, 0.2, None]
    last = Transcoder(tasks=("a",), rounds=2, adapt=False).phases()
    assert [(phase.name, phase.share) for phase in last] == [("a 1", 0.5), ("a 2", None)]
    assert [phase.name for phase in Transcoder().phases()] == ["target"]


def test_a_source_that_is_missing_is_named() -> None:
    stack, _ = stack_of()
    with pytest.raises(DataError, match="def"):
        stack.train(ROWS, steps=8, sources={"sum": SOURCES["sum"]}, **RUN)


def test_a_loop_that_forgets_the_start_is_refused() -> None:
    stack, _ = stack_of(Lora(rank=2))
    with pytest.raises(PeftxError, match="transcoder: step 3 does not remember how the run started"):
        stack.run_train_step(TrainStep(stack, {}, index=3, total=10))


@pytest.mark.parametrize("arch", ["vit", "clip", "whisper", "llava"])
def test_models_of_more_than_texts_are_refused(arch: str) -> None:
    with pytest.raises(ArchitectureError, match="reads more than tokens"):
        stack_of(arch=arch)


def test_a_head_of_classes_is_refused() -> None:
    with pytest.raises(ConflictError, match="puts a loss of its own in the task's place"):
        stack_of(LsLlama())


@pytest.mark.parametrize("tasks", [("a", "a"), ("target",), ("a", "train")])
def test_names_of_tasks(tasks: tuple[str, ...]) -> None:
    with pytest.raises(PeftxError, match="a name of its own"):
        Transcoder(tasks=tasks)
