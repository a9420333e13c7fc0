from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.engines.data.encoding import prompt_ids
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_cpt import Context, Cpt
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("cpt")

ID = "cpt"
EXAMPLES = (("ab", "c"), ("d", "efg"), ("h", "i"))
TEMPLATE = "<{input}:{label}\n"
TEXT = "<ab: c\n<d: efg\n<h: i\n"
FREE, MOVED = 8, 13  # tokens of labels with their spaces, and all others
KINDS = [1, 2, 2, 3, 4, 4, 3, 5, 6, 7, 8, 8, 8, 8, 7, 9, 10, 11, 12, 12, 11]
ROWS = [{"prompt": f"<{n}:", "completion": f" {n + 1}"} for n in range(8, 16)]
OPTIONS: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 0.05}


def stack_of(*others: Any, arch: str = "llama", bos: int = 0, **options: Any) -> tuple[Stack, Cpt]:
    plugin = Cpt(**{"examples": EXAMPLES, "template": TEMPLATE, **options})
    return Stack(tiny(arch), [plugin, *others], tokenizer=tokenizer(bos)), plugin


def tokenizer(bos: int) -> Any:
    """One with so many BOS in front of every text."""
    found = tiny_tokenizer()
    if bos:
        from tokenizers import processors

        found._tokenizer.post_processor = processors.TemplateProcessing(
            single=bos * "<|bos|> " + "$A", special_tokens=[("<|bos|>", found.bos_token_id)]
        )
    return found


def move(plugin: Cpt, by: float) -> Tensor:
    """Deltas that are long enough to be cut, of some tokens."""
    torch.manual_seed(3)
    delta = plugin.context.delta_embedding
    with torch.no_grad():
        delta.copy_(torch.randn_like(delta) * torch.linspace(0, by, len(delta))[:, None])
    return delta


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


def step_loss(stack: Stack, batch: dict[str, Tensor], optimizer: Any = None) -> float:
    return float(stack.train_step(batch, optimizer=optimizer))


def batch_of(stack: Stack, padding: str | None = None) -> tuple[dict[str, Tensor], float]:
    """Texts whose last four tokens are labels, and by what PEFT divides the loss."""
    inputs = example_inputs(stack.model, padding=padding)
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~real, -100)
    labels[:, :3] = -100
    count = int((labels != -100).sum())
    return inputs | {"labels": labels}, (count + len(labels) * FREE) / count


def their(
    stack: Stack, plugin: Cpt, gamma: float = 0.95, first: tuple[int, ...] = (), **options: Any
) -> nn.Module:
    """The same adapter of HF PEFT."""
    from peft import CPTConfig, get_peft_model

    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[*first, *plugin.state["ids"]],
        cpt_mask=[1] * (len(first) + FREE + MOVED),
        cpt_tokens_type_mask=[0] * len(first) + plugin.state["kinds"],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=gamma,
        **options,
    )
    theirs = get_peft_model(tiny(stack.model.config.model_type), config)
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    delta.data[len(first) + plugin.context.at] = plugin.context.delta_embedding.data
    return theirs


# -- the context -------------------------------------------------------------------------------------------------------


def test_kinds_of_tokens() -> None:
    _, plugin = stack_of()
    assert plugin.state["ids"] == tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert plugin.state["kinds"] == KINDS
    assert plugin.state["first"] == []
    bos = tiny_tokenizer().bos_token_id
    assert [stack_of(bos=n)[1].state["first"] for n in (1, 2)] == [[bos], [bos]]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "mamba"])
def test_untrained_it_is_in_context_learning(arch: str, bos: bool) -> None:
    """The logits of the query are those behind the same text; with BOS in front of all of it."""
    stack, plugin = stack_of(arch=arch, bos=bos)
    with torch.no_grad():
        text, query = (torch.tensor([prompt_ids(stack.tokenizer, t)]) for t in (TEXT + "<8:", "<8:"))
        found = stack.model(query).logits
        with stack.disabled():
            expected = stack.model(text).logits
            alone = stack.model(query).logits
    assert text.shape[1] == query.shape[1] + FREE + MOVED
    assert difference(found[:, -3:], expected[:, -3:]) < 2e-6
    assert difference(alone[:, -3:], expected[:, -3:]) > 1e-3
    assert plugin.context.after_bos == bos


def test_trainable_entries_are_those_of_input_and_format() -> None:
    stack, plugin = stack_of()
    assert stack.trainable_parameters() == 32 * MOVED
    assert plugin.context.at.tolist() == [at for at, kind in enumerate(KINDS) if kind % 4]


def test_deltas_stand_on_their_tokens_and_none_on_a_label() -> None:
    _, plugin = stack_of()
    context = plugin.context
    moved = move(plugin, 1.0)
    found = context.rows() - context.embedding
    labels = [at for at, kind in enumerate(KINDS) if kind % 4 == 0]
    assert not found[labels].any()
    assert torch.allclose(found[context.at], moved, atol=1e-6)


# -- the ball ----------------------------------------------------------------------------------------------------------


def test_projection_by_hand() -> None:
    """(3, 4) into a ball of 1, one of 5 and one of 10; zero stays zero, also in a ball of 0."""
    context = Context(torch.zeros(6, 2), [1.0, None, 5.0, 10.0, 0.0, 0.0], behind=False)
    with torch.no_grad():
        context.delta_embedding[:4] = torch.tensor([3.0, 4.0])
    context.project()
    expected = torch.tensor([[0.6, 0.8], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(context.delta_embedding, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_after_each_step_deltas_are_in_the_ball(optimizer: str) -> None:
    stack, plugin = stack_of(input_epsilon=0.4, format_epsilon=0.2)
    radius = torch.tensor(
        [(0.4 if kind % 4 == 2 else 0.2) / 8 for kind in KINDS if kind % 4]
    )  # sqrt(32 / 2048) = 1/8
    assert torch.allclose(plugin.context.radius[:, 0], radius)
    sizes = []

    def look(done: int, total: int, values: Any) -> None:
        sizes.append(plugin.context.delta_embedding.detach().norm(dim=1))

    stack.train(ROWS, progress=look, **OPTIONS)
    assert len(sizes) == 3
    for size in sizes:
        assert (size <= radius * (1 + 1e-6)).all()
        assert (size > 0).all()
    assert torch.allclose(sizes[-1], radius), "the rate is large: each came to its edge"


def test_epsilon_0_stays_in_context_learning() -> None:
    stack, plugin = stack_of(input_epsilon=0.0, format_epsilon=0.0)
    inputs = example_inputs(stack.model)
    before = output_of(stack.model.eval(), inputs).detach()
    stack.train(ROWS, **OPTIONS)
    assert torch.equal(output_of(stack.model.eval(), inputs), before)
    assert not plugin.context.delta_embedding.any()


def test_one_kind_may_move_alone() -> None:
    stack, plugin = stack_of(format_epsilon=0.0)
    stack.train(ROWS, **OPTIONS)
    moved = plugin.context.delta_embedding.detach().norm(dim=1) > 0
    assert moved.tolist() == [kind % 4 == 2 for kind in KINDS if kind % 4]


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize(("arch", "gamma"), [("llama", 0.5), ("llama", 0.95), ("gpt2", 0.5), ("qwen2", 1.0)])
def test_equals_hf_peft(arch: str, gamma: float, padding: str | None) -> None:
    """Logits, loss, gradients and projected deltas. Epsilons differ, so that some deltas are cut and some are not."""
    options = {"input_epsilon": 8.0, "format_epsilon": 2.0}
    stack, plugin = stack_of(arch=arch, gamma=gamma, **options)
    mine = move(plugin, 0.5)
    theirs = their(stack, plugin, gamma, opt_projection_epsilon=8.0, opt_projection_format_epsilon=2.0)
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    batch, divided = batch_of(stack, padding)
    plugin.context.project()  # PEFT does so when it is called
    found = step_loss(stack, batch)
    two = theirs.train()(**batch)
    two.loss.backward()
    kinds, at = torch.tensor(KINDS), plugin.context.at
    assert difference(mine, delta[at]) < 1e-6
    assert delta[kinds % 4 == 0].abs().max() < 1e-9
    assert (plugin.context.radius[:, 0] < 0.999 * delta[at].norm(dim=1)).sum() == 0
    assert found / divided == pytest.approx(two.loss.item(), abs=1e-6)
    assert difference(mine.grad / divided, delta.grad[at]) < 1e-6
    assert delta.grad[at].abs().max() > 1e-3
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        one = stack.model(**batch).logits
    assert difference(one[real], two.logits[:, len(KINDS) :][real]) < 1e-6


def test_equals_hf_peft_behind_bos() -> None:
    stack, plugin = stack_of(bos=True)
    move(plugin, 0.001)  # none is cut
    (bos,) = first = plugin.state["first"]
    theirs = their(stack, plugin, first=first)
    batch, divided = batch_of(stack)
    begun = batch | {
        name: F.pad(batch[name], (1, 0), value=value)
        for name, value in (("input_ids", bos), ("attention_mask", 1), ("labels", -100))
    }
    found = step_loss(stack, begun)
    two = theirs.train()(**batch)
    assert found / divided == pytest.approx(two.loss.item(), abs=1e-6)
    with torch.no_grad():
        one = stack.model(**begun).logits[:, 1:]
    assert difference(one, two.logits[:, 1 + len(KINDS) :]) < 1e-6


def test_equals_three_steps_of_hf_peft() -> None:
    """Adam on both sides: the constant that divides PEFT's loss falls out, and every third of the deltas is cut."""
    stack, plugin = stack_of(input_epsilon=0.4, format_epsilon=0.2)
    theirs = their(stack, plugin, opt_projection_epsilon=0.4, opt_projection_format_epsilon=0.2)
    encoder = theirs.prompt_encoder["default"]
    batch, _ = batch_of(stack)
    mine, adam = plugin.context.delta_embedding, {"lr": 3e-3, "eps": 1e-12}
    adams = [torch.optim.Adam([p], **adam) for p in (mine, encoder.delta_embedding.weight)]
    for _ in range(3):
        step_loss(stack, batch, adams[0])
        adams[0].zero_grad()
        theirs.train()(**batch).loss.backward()
        adams[1].step()
        adams[1].zero_grad()
    delta = encoder.get_projection()[plugin.context.at]
    assert difference(mine, delta) < 1e-6
    cut = torch.isclose(delta.norm(dim=1), plugin.context.radius[:, 0])
    assert cut.any()
    assert not cut.all()


def test_gamma_0_is_the_loss_of_the_query() -> None:
    stack, _ = stack_of(gamma=0.0)
    batch, _ = batch_of(stack)
    loss = step_loss(stack, batch)
    assert loss == pytest.approx(stack.model(**batch).loss.item(), abs=1e-6)
    assert set(stack.train(ROWS, **OPTIONS).terms) == {"task"}


def test_the_nearest_example_weighs_most() -> None:
    """By hand: sum over j of gamma^(N - j) times the loss of its label's tokens, behind the context up to them."""
    stack, plugin = stack_of(gamma=0.5)
    batch, _ = batch_of(stack)
    ids = torch.tensor([plugin.state["ids"]])
    with torch.no_grad():
        query = float(stack.model(**batch).loss)
        with stack.disabled():
            losses = F.cross_entropy(stack.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    by_example = [float(losses[torch.tensor(KINDS[1:]) == 4 * j + 4].sum()) for j in range(3)]
    each = int((batch["labels"] != -100).sum()) / len(ids.expand(2, -1))
    expected = query + (0.125 * by_example[0] + 0.25 * by_example[1] + 0.5 * by_example[2]) / each
    assert step_loss(stack, batch) == pytest.approx(expected, abs=1e-5)


def test_a_frozen_context_has_no_loss_and_no_projection() -> None:
    stack, plugin = stack_of(Lora(rank=2))
    stack.freeze(ID)
    before = move(plugin, 1.0).detach().clone()
    assert set(stack.train(ROWS, **OPTIONS).terms) == {"task"}
    assert torch.equal(plugin.context.delta_embedding, before)


@pytest.mark.parametrize("first", [False, True])
def test_the_context_is_read_behind_what_stands_before_it_alone(first: bool) -> None:
    """Rows of another prompt in front of it are seen by it, and those behind it are not."""
    stack, plugin = stack_of(gamma=1.0)
    order: list[Any] = [("prompt", PromptTuning(length=2)), ("cpt", Cpt(plugin.config))]
    both = Stack(tiny("llama"), order if first else order[::-1], tokenizer=tiny_tokenizer())
    losses = [step.train(ROWS, steps=1, batch_size=2).terms["context"] for step in (stack, both)]
    assert (losses[0] == pytest.approx(losses[1], abs=1e-6)) != first


def test_a_step_without_gradients_stays_in_the_ball() -> None:
    stack, plugin = stack_of(Mezo())
    stack.train(ROWS, **OPTIONS)
    size = plugin.context.delta_embedding.detach().norm(dim=1)
    assert (size <= plugin.context.radius[:, 0] * (1 + 1e-6)).all()
    assert size.max() > 0


# -- bundles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_a_bundle_needs_no_tokenizer_to_know_its_context(bos: bool, tmp_path: Path, monkeypatch: Any) -> None:
    stack, plugin = stack_of(bos=bos)
    stack.train(ROWS, **OPTIONS)
    stack.save(tmp_path / "b")
    monkeypatch.setattr(Cpt, "read", lambda *_: pytest.fail("it is in the bundle"))
    loaded = peftx.load(tmp_path / "b", model=tiny("llama"))
    assert loaded.plugins[ID].state == plugin.state
    inputs = example_inputs(stack.model, padding="left")
    with torch.no_grad():
        one, two = (output_of(s.model.eval(), inputs) for s in (stack, loaded))
    assert torch.equal(one, two)
    assert loaded.plugins[ID].context.after_bos == bos


def test_the_context_takes_the_dtype_of_the_model() -> None:
    plugin = Cpt(examples=EXAMPLES, template=TEMPLATE)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    assert plugin.context.delta_embedding.dtype == plugin.context.embedding.dtype == torch.bfloat16
    stack.train(ROWS, **OPTIONS)
    size = plugin.context.delta_embedding.detach().float().norm(dim=1)
    assert (size <= plugin.context.radius[:, 0].float() * 1.02).all()


# -- options -----------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = Cpt().config
    assert (config.input_epsilon, config.format_epsilon, config.gamma) == (0.1, 0.1, 0.95)
    assert config.template == "Input: {input} Output:{label}; "


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"examples": ("ab",)}, "examples"),
        ({"template": "{input}"}, r"\{input\} and \{label\}, each once"),
        ({"template": "{input}:{label}{label}"}, "each once"),
        ({"template": "{label}:{input}"}, "follows"),
        ({"template": "{input}{label}"}, "something between"),
        ({"input_epsilon": -0.1}, "input_epsilon"),
        ({"format_epsilon": -0.1}, "format_epsilon"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        Cpt(**options)


@pytest.mark.parametrize("examples", [(), (("ab", "c"), ("d", ""))])
def test_a_context_without_labels_is_refused(examples: Any) -> None:
    with pytest.raises(PeftxError, match="cpt: no examples, or one without a label"):
        stack_of(examples=examples)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("bert"),
        lambda: tiny("t5"),
        lambda: tiny("llama", head="classification", num_labels=3),
    ],
)
def test_models_that_do_not_write_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ArchitectureError, match=r"cpt: .* does not go on with the labels of its context"):
        Stack(make(), [Cpt(examples=EXAMPLES)], tokenizer=tiny_tokenizer())


def test_a_context_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(PeftxError, match="cpt: 168 soft tokens"):
        stack_of(arch="gpt2", examples=(("a", "b"),) * 28)
