from __future__ import annotations

from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.positions import prompt_length
from peftx.kernel.soft_rows import insert
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_prompt_gating import PromptGating, Writer
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("prompt-gating")

ID = "prompt-gating"
SIZES: dict[str, Any] = {"inner": 6, "hidden": 5}
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


def aspect(length: int = 3, **options: Any) -> PromptGating:
    return PromptGating(**{"length": length, **SIZES, **options})


def stack_of(*plugins: Any, arch: str = "bart") -> Stack:
    return Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer())


def inputs_of(stack: Stack, padding: str | None = None) -> dict[str, Tensor]:
    return example_inputs(stack.model, padding=padding)


def logits(stack: Stack, padding: str | None = None) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, inputs_of(stack, padding))


def by_hand(
    arch: str, plugins: list[PromptGating], inputs: dict[str, Tensor], *, gates: bool = True
) -> Tensor:
    """The equations on a plain model: hooks put zeros among the positions and gate the first states."""
    model, soft = tiny(arch).eval(), sum(p.slots.length for p in plugins)
    encoder = model.get_encoder() if arch == "bart" else model.bert
    at = int(arch == "bert")  # behind [CLS]
    layers = encoder.layers if arch == "bart" else encoder.encoder.layer
    norms = [n.self_attn_layer_norm if arch == "bart" else n.attention.output.LayerNorm for n in layers]
    place = encoder.embed_positions if arch == "bart" else encoder.embeddings.position_embeddings
    starts = list(accumulate((p.slots.length for p in plugins), initial=at))

    def unplaced(module: Any, given: Any, y: Tensor) -> Tensor:
        text = y[:, : y.shape[1] - soft]
        return insert(text, y.new_zeros(len(y), soft, y.shape[2]), at)

    def gated(j: int, module: Any, given: Any, y: Tensor) -> Tensor:
        y = y.clone()
        for plugin, start in zip(plugins, starts, strict=False):
            m, d = plugin.slots.length, y.shape[2]
            own = y[:, start : start + m]
            A, U = (net().view(m, -1, d)[:, j] for net in (plugin.slots.A, plugin.slots.U))
            y[:, start : start + m] = torch.sigmoid(A) * own + U
        return y

    place.register_forward_hook(unplaced)
    for j, norm in enumerate(norms if gates else []):
        norm.register_forward_hook(partial(gated, j))
    inputs = dict(inputs)
    words = model.get_input_embeddings()(inputs.pop("input_ids"))
    rows = torch.cat([p.slots.rows() for p in plugins]).expand(len(words), -1, -1)
    mask = insert(inputs.pop("attention_mask"), torch.ones(len(words), soft, dtype=torch.int64), at)
    with torch.no_grad():
        out = model(inputs_embeds=insert(words, rows, at), attention_mask=mask, **inputs)
    return out.logits if arch == "bart" else torch.cat((out.logits[:, :1], out.logits[:, 1 + soft :]), 1)


# -- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("arch", ["bart", "bert"])
@pytest.mark.parametrize("lengths", [[3], [2, 4]])
def test_equals_the_equations_by_hand(arch: str, lengths: list[int], padding: str | None) -> None:
    plugins = [aspect(m) for m in lengths]
    stack = stack_of(*((f"aspect-{i}", plugin) for i, plugin in enumerate(plugins)), arch=arch)
    inputs = inputs_of(stack, padding)
    expected = by_hand(arch, plugins, inputs)
    real = inputs["attention_mask"].bool() if arch == "bert" else ...
    assert torch.allclose(logits(stack, padding)[real], expected[real], atol=1e-5)
    assert not torch.allclose(by_hand(arch, plugins, inputs, gates=False)[real], expected[real], atol=1e-3)


def test_open_gates_are_a_plain_prompt() -> None:
    """sigmoid(A) = 1 and U = 0."""
    plugin = aspect()
    stack = stack_of(plugin)
    with torch.no_grad():
        for parameter in (*plugin.slots.U.up.parameters(), plugin.slots.A.up.weight):
            parameter.zero_()
        plugin.slots.A.up.bias.fill_(40.0)
    expected = by_hand("bart", [plugin], inputs_of(stack), gates=False)
    assert torch.allclose(logits(stack), expected, atol=1e-5)


def test_a_writer_by_hand() -> None:
    found = Writer(2, 1, 1, 3, torch.tanh)
    with torch.no_grad():
        found.e.copy_(torch.tensor([[0.5], [0.0]]))
        for parameter, value in zip(found.down.parameters(), (1.0, 0.0), strict=True):
            parameter.fill_(value)
        found.up.weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        found.up.bias.copy_(torch.tensor([0.0, 0.0, 7.0]))
    half = 0.46211715726  # tanh(0.5)
    assert torch.allclose(found(), torch.tensor([[half, 2 * half, 3 * half + 7], [0.0, 0.0, 7.0]]))
    assert torch.equal(found(slice(1, 3)), found()[:, 1:])


def test_a_layer_has_its_own_part() -> None:
    plugin = aspect()
    stack_of(plugin)
    slots = plugin.slots.eval()
    H = torch.randn(2, 3, 32)
    for j in range(2):
        A, U = (net().view(3, 2, 32)[:, j] for net in (slots.A, slots.U))
        assert torch.allclose(slots.gated(H, j), A.sigmoid() * H + U, atol=1e-6)
    assert slots.P_0.f(torch.tensor(-2.0)) == 0  # relu
    assert slots.U.f(torch.tensor(-2.0)) < 0
    assert slots.A.f(torch.tensor(9.0)) <= 1


def test_dropout_falls_on_the_gate_behind_its_sigmoid_and_on_the_addition() -> None:
    plugin = aspect(dropout=0.5)
    stack_of(plugin)
    slots = plugin.slots.train()
    torch.manual_seed(0)
    with torch.no_grad():
        added, all_ = slots.gated(torch.zeros(1, 3, 32), 0), slots.U()[:, :32]
        dropped = added[0] == 0
        assert 0.2 < dropped.float().mean() < 0.8
        assert torch.allclose(added[0][~dropped], 2 * all_[~dropped])
        for parameter in slots.U.up.parameters():
            parameter.zero_()
        gate, open_ = slots.gated(torch.ones(1, 3, 32), 1)[0], slots.A()[:, 32:].sigmoid()
        assert 0.2 < (gate == 0).float().mean() < 0.8
        assert torch.allclose(gate[gate != 0], 2 * open_[gate != 0])
    assert torch.equal(
        slots.eval().gated(torch.zeros(1, 3, 32), 0), slots.eval().gated(torch.zeros(1, 3, 32), 0)
    )


# -- one step of the edit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_states_of_the_text_are_left_alone_where_slots_are_gated(padding: str | None) -> None:
    stack = stack_of(("one", aspect(2)), PromptTuning(length=4), ("two", aspect(3)))
    norm = stack.model.get_encoder().layers[0].self_attn_layer_norm
    seen: dict[str, Tensor] = {}
    norm.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    norm.register_forward_hook(lambda module, given, y: seen.update(y=y))
    logits(stack, padding)
    changed = (
        seen["y"] - torch.nn.functional.layer_norm(seen["x"], (32,), norm.weight, norm.bias)
    ).abs().amax(-1) > 1e-5
    mask = inputs_of(stack, padding)["attention_mask"]
    pads = (mask.cumsum(1) == 0).sum(1)
    for row, before in zip(changed, pads.tolist(), strict=True):
        own = [*range(before, before + 2), *range(before + 6, before + 9)]
        assert row.nonzero()[:, 0].tolist() == own


@pytest.mark.parametrize("padding", [None, "left"])
def test_slots_have_no_position_and_the_text_has_its_own(padding: str | None) -> None:
    stack = stack_of(("one", aspect(2)), ("two", aspect(3)))
    place = stack.model.get_encoder().embed_positions
    seen: list[Tensor] = []
    place.register_forward_hook(lambda module, given, y: seen.append(y))
    logits(stack, padding)
    with stack.disabled():
        logits(stack, padding)
    found, base = seen
    mask = inputs_of(stack, padding)["attention_mask"]
    pads = (mask.cumsum(1) == 0).sum(1) if padding else 0
    assert torch.equal(found, insert(base, base.new_zeros(len(base), 5, 32), pads))


def test_other_soft_tokens_keep_their_positions() -> None:
    stack = stack_of(PromptTuning(length=2), aspect(3))
    seen: list[Tensor] = []
    stack.model.get_encoder().embed_positions.register_forward_hook(lambda module, given, y: seen.append(y))
    logits(stack)
    with stack.disabled(ID):
        logits(stack)
    found, base = seen  # of 2 + 3 + T, and of 2 + T
    assert torch.equal(found, insert(base, base.new_zeros(len(base), 3, 32), 2))


# -- aspects together --------------------------------------------------------------------------------------------------


def trained(path: Path, seed: int, **options: Any) -> Path:
    """An aspect's file, trained alone."""
    stack = Stack(tiny("bart"), [aspect(**options)], tokenizer=tiny_tokenizer(), seed=seed)
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-2, seed=seed)
    return stack.save(path / str(seed)) / f"{ID}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [trained(tmp_path_factory.mktemp("aspects"), seed) for seed in (1, 2)]


def together(files: list[Path]) -> Stack:
    return stack_of(*((file.parent.name + "-aspect", aspect(start=str(file))) for file in files))


def test_aspects_are_what_they_were_alone(files: list[Path]) -> None:
    alone = [peftx.load(file.parent, model=tiny("bart")) for file in files]
    stack = together(files)
    for id, other in zip(stack.plugins, alone, strict=True):
        mine, theirs = stack.ledger.tensors(id), other.ledger.tensors(ID)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    first, second = stack.plugins
    for hidden, other in ((second, alone[0]), (first, alone[1])):
        with stack.disabled(hidden):
            assert torch.equal(logits(stack), logits(other))
    assert not torch.allclose(logits(stack), logits(alone[0]), atol=1e-4)


def test_each_has_its_slots_and_its_parameters(files: list[Path]) -> None:
    one, two = together(files[:1]), together(files)
    assert prompt_length(one.model) == 3
    assert prompt_length(two.model) == 6
    assert two.trainable_parameters() == 2 * one.trainable_parameters()
    m, k, h, d, layers = 3, 6, 5, 32, 2
    assert one.trainable_parameters() == 3 * (m * k + (k + 1) * h) + (h + 1) * (d + 2 * layers * d)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_their_order_means_nothing(files: list[Path], padding: str | None) -> None:
    one, two = together(files), together(files[::-1])
    assert torch.allclose(logits(one, padding), logits(two, padding), atol=1e-5)
    text = one.generate(["Say it.", "Tell me of the sea."], max_new_tokens=5, num_beams=2)
    assert text == two.generate(["Say it.", "Tell me of the sea."], max_new_tokens=5, num_beams=2)


def test_a_bundle_of_both_needs_no_other_file(files: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / file.parent.name / file.name for file in files]
    for file, copied in zip(files, copies, strict=True):
        copied.parent.mkdir()
        copied.write_bytes(file.read_bytes())
    stack = together(copies)
    saved = stack.save(tmp_path / "both")
    for copied in copies:
        copied.unlink()
    assert torch.equal(logits(peftx.load(saved, model=tiny("bart"))), logits(stack))


def test_refusals(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PeftxError, match=r"holds no aspect of these sizes"):
        stack_of(aspect(4, start=str(files[0])))
    with pytest.raises(PeftxError, match=r"nowhere\.safetensors"):
        stack_of(aspect(start=str(tmp_path / "nowhere.safetensors")))
    for arch in ("gpt2", "t5"):
        with pytest.raises(ArchitectureError, match="no encoder with a norm behind each residual sum"):
            stack_of(aspect(), arch=arch)
