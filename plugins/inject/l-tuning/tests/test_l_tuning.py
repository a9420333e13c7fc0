from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import peftx
from peftx import ModelView, Plugin, Stack, VirtualTokens, hookimpl
from peftx.engines.data import CLASS_INDEX, Collator, text_ids
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny, tiny_tokenizer
from peftx.testing.shapes import PAD
from peftx.testing.subject import ROWS_BY_FORMAT
from peftx.toolkits.evaluation import evaluating
from peftx_l_tuning import LabelPrefixes, LTuning, add_label, pairs
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("l-tuning")
test_conformance_of_the_prefix = conformance(
    "l-tuning",
    options={"variant": "prefix"},
    not_on=LTuning.refuses
    | {"bloom": "its attention is not looked up by name", "mamba": "it has no attention"},
    expected_failures=LTuning.exempt,
)

ROWS = list(ROWS_BY_FORMAT["classification"])
LABELS = ["bad", "fair", "great"]

# What the official Llama classes give on `tiny("llama", num_key_value_heads=4)` for labels "bad" and "good!", its
# `example_inputs` and the numbers that the test fills in: logits, then the norms of the gradients of the projections
# and of the head. Made once by running those classes outside this repository; the README says which commit.
OFFICIAL = {
    "prompt": (
        [[-1.347628, -0.113795], [-0.859747, -0.175239], [-0.464953, 0.757973]],
        [20.062067, 3.1624308, 1.2010231],
    ),
    "prefix": (
        [[-1.577021, -0.780615]],
        [0.8853666, 0.193412, 0.0593436, 0.1106536, 0.3482516, 0.6493582, 2.5109396],
    ),
}
VARIANTS = ({"variant": "prompt"}, {"variant": "prefix"}, {"variant": "prefix", "pool": False})
CENTRED = tuple(options | {"centred": True} for options in VARIANTS)


def stack_of(arch: str = "llama", **options: object) -> Stack:
    return Stack(tiny(arch), [LTuning(**{"labels": LABELS, **options})], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> LTuning:
    return stack.plugins["l-tuning"]


def scores_of(stack: Stack, texts: list[str]) -> Tensor:
    with evaluating(stack.model):
        return plugin_of(stack).classify(stack, texts)[1]


def ask(stack: Stack, inputs: dict[str, Tensor], chosen: list[int]) -> Tensor:
    """Two-way logits in evaluation mode."""
    plugin = plugin_of(stack)
    stack.model.eval()
    with torch.no_grad():
        logits, _ = plugin.ask(lambda **new: stack.model(**{**inputs, **new}), inputs, torch.tensor(chosen))
    plugin.forget()
    return logits


def label_states(stack: Stack) -> Tensor:
    """H, read here and now by the frozen model."""
    ids = torch.tensor([row for _, row in plugin_of(stack).state["labels"]])
    with torch.no_grad():
        return stack.model.base_model(input_ids=ids).last_hidden_state


def numbers(labels: torch.nn.Module) -> Tensor:
    """All that the labels become."""
    rows = labels()
    return rows if isinstance(rows, Tensor) else torch.cat([part.flatten() for pair in rows for part in pair])


def trained(stack: Stack, steps: int = 2) -> Stack:
    rows = [{"text": row["text"], "label": LABELS[i % 3]} for i, row in enumerate(ROWS)]
    stack.train(rows, steps=steps, batch_size=2, learning_rate=1e-2, max_length=32)
    return stack


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


@pytest.mark.parametrize("variant", OFFICIAL)
def test_equals_the_official_code(variant: str) -> None:
    plugin = LTuning(labels=["bad", "good!"], variant=variant, dropout=0.0)
    stack = Stack(tiny("llama", num_key_value_heads=4), [plugin], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for p in plugin.labels.parameters():
            row = torch.linspace(-0.1, 0.12, p.numel()).view_as(p)
            p.copy_(row.flip(0) if p.ndim == 1 else row)
        plugin.head.linear.weight.copy_(torch.linspace(-0.3, 0.4, 64).view(2, 32))
        plugin.head.linear.bias.zero_()
    count = len(OFFICIAL[variant][0])  # one row of a prefix: the official code mixes the rows of a batch
    inputs, chosen = example_inputs(stack.model, batch=count), torch.tensor([0, 1, 1])[:count]
    logits, _ = plugin.ask(lambda **new: stack.model(**{**inputs, **new}), inputs, chosen)
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 1])[:count]).backward()
    trained = [*plugin.labels.parameters(), plugin.head.linear.weight]
    norms = torch.stack([p.grad.norm() for p in trained])
    expected = [torch.tensor(numbers) for numbers in OFFICIAL[variant]]
    assert difference(logits, expected[0]) < 1e-5
    assert float(((norms - expected[1]) / expected[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "opt"])
def test_the_prompt_is_the_formula(arch: str) -> None:
    stack = trained(stack_of(arch))
    plugin, inputs, chosen = plugin_of(stack), example_inputs(stack.model, padding="right"), [2, 0]
    project, head, n = plugin.labels.project, plugin.head.linear, plugin.texts.beside
    P = label_states(stack)[chosen] @ project.weight.t() + project.bias
    embedded = torch.cat((P, stack.model.get_input_embeddings()(inputs["input_ids"])), 1)
    for row in range(2):
        real = n + int(inputs["attention_mask"][row].sum())
        with torch.no_grad():
            states = stack.model(inputs_embeds=embedded[row : row + 1, :real], output_hidden_states=True)
        at = n if arch == "bert" else -1  # an encoder's first token, a decoder's last
        expected = head(states.hidden_states[-1][0, at])
        assert difference(ask(stack, inputs, chosen)[row], expected) < 1e-5


class Front(Plugin):
    """Soft tokens as given."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(GivenRows(self.state["rows"]))


class GivenRows(VirtualTokens):
    def __init__(self, given: Tensor) -> None:
        super().__init__(len(given))
        self.given = given

    def rows(self) -> Tensor:
        return self.given


@pytest.mark.parametrize("arch", ["llama", "gemma3n", "gemma4"])
def test_the_prompt_is_a_soft_prompt_of_the_label(arch: str) -> None:
    """Gemma 3n and 4 look the tokens up again for each layer, which soft tokens have nothing in; what Gemma 3n lists as
    its last hidden states are several streams."""
    stack = trained(stack_of(arch))
    plugin, inputs, chosen = plugin_of(stack), example_inputs(stack.model, padding="right"), [2, 0]
    P = (label_states(stack) @ plugin.labels.project.weight.t() + plugin.labels.project.bias).detach()
    found = ask(stack, inputs, chosen)
    for row, c in enumerate(chosen):
        front = Front()
        front.state["rows"] = P[c]
        model = Stack(tiny(arch), [front]).model
        ids = inputs["input_ids"][row : row + 1, : int(inputs["attention_mask"][row].sum())]
        with torch.no_grad():
            expected = plugin.head.linear(model.base_model(input_ids=ids).last_hidden_state[0, -1])
        assert difference(found[row], expected) < 1e-5


@pytest.mark.parametrize("pool", [True, False])
def test_layers_may_differ_and_values_be_narrower_than_keys(pool: bool) -> None:
    H = torch.randn(2, 5, 4)
    labels = LabelPrefixes(H, sizes=[(2, 3, 1), (1, 4, 6)], pool=pool, dropout=0.0, first=0)
    one, two = labels()
    assert [tuple(part.shape) for part in (*one, *two)] == [
        (2, 2, 5, 3),
        (2, 2, 5, 1),
        (2, 1, 5, 4),
        (2, 1, 5, 6),
    ]
    read = labels.w(H)[..., 0] if pool else H
    if pool:
        keys, values = labels.A_k(read).split((30, 20), -1), labels.A_v(read).split((10, 30), -1)
        expected = [keys[0].view(2, 2, 5, 3), values[0].view(2, 2, 5, 1)]
        expected += [keys[1].view(2, 1, 5, 4), values[1].view(2, 1, 5, 6)]
    else:
        keys, values = labels.A_k(read).split((6, 4), -1), labels.A_v(read).split((2, 6), -1)
        expected = [keys[0].view(2, 5, 2, 3), values[0].view(2, 5, 2, 1)]
        expected += [keys[1].view(2, 5, 1, 4), values[1].view(2, 5, 1, 6)]
        expected = [part.transpose(1, 2) for part in expected]
    assert all(torch.equal(found, part) for found, part in zip((*one, *two), expected, strict=True))


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("arch", ["deepseek_v3", "gemma3n", "gemma4", "qwen3_next"])
def test_a_prefix_of_each_layers_own_sizes(arch: str, pool: bool) -> None:
    stack = trained(stack_of(arch, variant="prefix", pool=pool))
    plugin, inputs = plugin_of(stack), example_inputs(stack.model)
    bad, fair = (ask(stack, inputs, 2 * [c]) for c in (0, 1))
    assert difference(bad, fair) > 1e-3
    facts = stack.anatomy.main
    attending = [facts.by_layer[layer] for layer, path in enumerate(facts.attention) if path]
    for sizes, (key, value) in zip(attending, plugin.labels(), strict=True):
        assert key.shape == (3, sizes.kv_heads, plugin.texts.beside, sizes.head_dim)
        assert value.shape == (3, sizes.kv_heads, plugin.texts.beside, sizes.value_dim)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "opt"])
def test_the_prefix_is_a_filled_cache(arch: str, pool: bool) -> None:
    stack = trained(stack_of(arch, variant="prefix", pool=pool))
    plugin, inputs, chosen = plugin_of(stack), example_inputs(stack.model, padding="right"), [1, 2]
    labels, n, L = plugin.labels, plugin.texts.beside, stack.anatomy.num_layers
    heads, size = stack.anatomy.main.kv_heads, stack.anatomy.main.head_dim
    expected = []
    for row, c in enumerate(chosen):
        H, cache = label_states(stack)[c], DynamicCache()
        if pool:
            a = labels.w(H)[:, 0]  # [n]
            flat = [A(a).view(L, heads, n, size) for A in (labels.A_k, labels.A_v)]
        else:
            flat = [A(H).view(n, L, heads, size).permute(1, 2, 0, 3) for A in (labels.A_k, labels.A_v)]
        for layer in range(L):
            cache.update(flat[0][layer][None].detach(), flat[1][layer][None].detach(), layer)
        real = int(inputs["attention_mask"][row].sum())
        with torch.no_grad():
            out = stack.model(
                input_ids=inputs["input_ids"][row : row + 1, :real],
                past_key_values=cache,
                output_hidden_states=True,
            )
        expected.append(plugin.head.linear(out.hidden_states[-1][0, -1]))
    assert difference(ask(stack, inputs, chosen), torch.stack(expected)) < 1e-5


@pytest.mark.parametrize("options", VARIANTS)
def test_a_kept_label_equals_a_live_one_exactly(options: dict[str, object]) -> None:
    """The model is frozen, so what it made of a label before training is what it makes of it afterwards."""
    stack = trained(stack_of(**options))
    labels = plugin_of(stack).labels.eval()
    kept = numbers(labels)
    labels.H = label_states(stack)
    assert torch.equal(numbers(labels), kept)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_an_encoder_reads_texts_and_labels_to_their_end(arch: str) -> None:
    tokenizer = tiny_tokenizer(ends=True)
    stack = Stack(tiny(arch), [LTuning(labels=["bad", "fair"])], tokenizer=tokenizer)
    (row,) = plugin_of(stack).texts.rows(stack, ["fine"])
    assert row == tokenizer("fine")["input_ids"][: None if arch == "bert" else -1]
    fair = dict(plugin_of(stack).state["labels"])["fair"]
    assert fair == (tokenizer("fair")["input_ids"] if arch == "bert" else text_ids(tokenizer, "fair"))


@pytest.mark.parametrize("variant", ["prompt", "prefix"])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_soft_tokens_of_others_are_no_label_and_no_text(arch: str, variant: str) -> None:
    """Wherever these stand; in an encoder behind its first token."""
    plugins = [PromptTuning(length=3), LTuning(labels=LABELS, variant=variant)]
    stack = Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer())
    plugin, inputs, states = plugin_of(stack), example_inputs(stack.model, padding="right"), []
    assert difference(plugin.labels.H, label_states(stack)) < 1e-6
    handle = stack.model.base_model.register_forward_hook(  # it returns what belongs to the caller's tokens
        lambda module, inputs, out: states.append(out.last_hidden_state)
    )
    found = ask(stack, inputs, [2, 0])
    handle.remove()
    own = states[-1][:, -inputs["input_ids"].shape[1] :]
    lengths = inputs["attention_mask"].sum(1) - 1
    h = own[:, 0] if arch == "bert" else own[torch.arange(2), lengths]
    assert difference(found, plugin.head.linear(h)) < 1e-6


@pytest.mark.parametrize("options", VARIANTS)
def test_only_projection_and_head_train(options: dict[str, object]) -> None:
    d, n, L, width = 32, 5, 2, 16
    count = {
        "prompt": d * d + d,
        "prefix": (d + 1)
        + 2 * (n * n * L * width + n * L * width),  # width: of the keys, d without grouped queries
        "unpooled": 2 * (d + 1) * L * width,
    }["unpooled" if "pool" in options else options["variant"]]
    stack = stack_of(**options)
    assert plugin_of(stack).texts.beside == n
    assert stack.trainable_parameters() == count + 2 * (d + 1)
    batch = example_inputs(stack.model) | {
        CLASS_INDEX: torch.tensor([0, 1]),
        "labels": torch.full((2, 9), -100),
    }
    stack.train_step(batch)
    own = {id(p) for p in stack.ledger.parameters("l-tuning")}
    assert {id(p) for p in stack.model.parameters() if p.grad is not None} == own


@pytest.mark.parametrize("options", VARIANTS)
def test_classes_are_independent_questions(options: dict[str, object]) -> None:
    stack = trained(stack_of(**options))
    texts = [row["text"] for row in ROWS[:3]]
    scores = scores_of(stack, texts)
    for row, text in enumerate(texts):
        ids = torch.tensor([stack.tokenizer(text)["input_ids"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        alone = [float(ask(stack, inputs, [c]).log_softmax(-1)[0, 1]) for c in range(3)]
        assert scores[row].tolist() == pytest.approx(alone, abs=1e-5)
    assert stack.classify(texts) == [LABELS[i] for i in scores.argmax(-1).tolist()]


def test_the_order_of_labels_does_not_matter() -> None:
    one, two = stack_of(), stack_of(labels=LABELS[::-1])
    texts = [row["text"] for row in ROWS]
    assert difference(scores_of(one, texts), scores_of(two, texts).flip(1)) < 1e-6
    assert one.classify(texts) == two.classify(texts)


def test_half_of_the_pairs_are_true() -> None:
    target = torch.arange(8) % 4
    counts = torch.zeros(4, 4)
    for seed in range(300):
        torch.manual_seed(seed)
        chosen, holds = pairs(target, 4)
        assert holds.sum() == 4
        assert torch.equal(chosen == target, holds.bool())
        counts.index_put_((target, chosen), torch.ones(8), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True)
    assert (
        difference(shares, torch.full((4, 4), 1 / 6) + torch.eye(4) / 3) < 0.05
    )  # wrong ones are drawn evenly
    sums = [int(pairs(target[:3], 4)[1].sum()) for _ in range(50)]
    assert set(sums) == {1, 2}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "mamba"])
@pytest.mark.parametrize("variant", ["prompt", "prefix"])
def test_the_side_of_the_pads_does_not_matter(arch: str, variant: str) -> None:
    """In a loop of one's own: rows of unlike lengths, padded on either side."""
    if (arch, variant) == ("mamba", "prefix"):
        return
    stack = stack_of(arch, variant=variant, dropout=0.0)
    found = []
    for side in ("right", "left"):
        rows = [
            {"input_ids": list(b"good food")},
            {"input_ids": list(b"so")},
            {"input_ids": list(b"nothing")},
        ]
        batch = Collator(PAD, padding_side=side)(rows) | {CLASS_INDEX: torch.tensor([0, 1, 2])}
        stack.model.zero_grad()
        torch.manual_seed(0)
        loss = stack.train_step(batch)
        found.append((loss, [p.grad.clone() for p in stack.ledger.parameters("l-tuning")]))
    (right, gradients), (left, others) = found
    assert float(right) == pytest.approx(float(left), rel=1e-6)
    assert all(difference(a, b) < 1e-6 for a, b in zip(gradients, others, strict=True))


def test_robertas_text_stands_behind_its_prefix() -> None:
    """RoBERTa counts positions from padding_idx + 1, so the first token behind n rows stands at n + padding_idx + 1."""
    stack, plain = stack_of("roberta", variant="prefix"), stack_of("bert", variant="prefix")
    plugin, seen = plugin_of(stack), []
    table = stack.model.roberta.embeddings.position_embeddings
    table.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    inputs = example_inputs(stack.model)
    ask(stack, inputs, [0, 1])
    assert seen[-1][0].tolist() == [plugin.texts.beside + PAD + 1 + t for t in range(9)]
    assert plugin_of(plain).first == 0
    assert len(stack.classify(["y" * 500, "z"])) == 2
    # The longest text has a place in the table, and all of it.
    assert max(int(positions.max()) for positions in seen) == table.num_embeddings - 1


@pytest.mark.parametrize("options", VARIANTS)
def test_in_half_precision_small_steps_count(options: dict[str, object]) -> None:
    model = tiny("llama").to(torch.bfloat16)
    stack = Stack(model, [LTuning(labels=LABELS, **options)], tokenizer=tiny_tokenizer())
    trained = list(stack.ledger.parameters("l-tuning"))
    before = [p.detach().clone() for p in trained]
    rows = [{"text": row["text"], "label": LABELS[i % 3]} for i, row in enumerate(ROWS)]
    stack.train(rows, steps=20, batch_size=2, learning_rate=1e-4, max_length=32)
    assert {p.dtype for p in trained} == {torch.float32}
    assert model.dtype == torch.bfloat16
    moved = torch.cat([(p != q).flatten() for p, q in zip(trained, before, strict=True)])
    assert float(moved.float().mean()) > 0.95


def test_short_labels_end_in_full_stops() -> None:
    stack = stack_of(labels=["a", "bcd"], texts={"a": "xy"})
    said = [stack.tokenizer.decode(ids) for _, ids in plugin_of(stack).state["labels"]]
    assert said == ["xy.", "bcd"]


@pytest.mark.parametrize("options", CENTRED)
def test_centred_states_are_what_tells_labels_apart(options: dict[str, object]) -> None:
    """The projections read label states, so what they give for centred ones is what a plugin gives for states that were
    centred by hand."""
    own, plain = (plugin_of(stack_of(**{**options, "centred": on})) for on in (True, False))
    H = own.labels.H
    away = H - H.mean(0)
    plain.labels.load_state_dict(own.labels.state_dict() | {"H": away / away.square().mean() ** 0.5})
    found = numbers(own.labels.eval())
    assert difference(numbers(plain.labels.eval()), found) < 1e-6
    plain.labels.H = H
    assert difference(numbers(plain.labels), found) > 1e-3


@pytest.mark.parametrize("options", [*VARIANTS, CENTRED[0], CENTRED[1]])
def test_a_new_label_by_its_text(options: dict[str, object], tmp_path: Path) -> None:
    stack, texts = trained(stack_of(**options, length=6)), [row["text"] for row in ROWS]
    before = scores_of(stack, texts)
    add_label(stack, "fine", "fair!")
    after = scores_of(stack, texts)
    assert difference(after[:, :3], before) < 1e-6
    assert difference(plugin_of(stack).labels.H, label_states(stack)) < 1e-6  # read as the others are
    assert difference(after[:, 3:], before) > 1e-6
    assert stack.trainable_parameters() == stack_of(**options, length=6).trainable_parameters()
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(scores_of(again, texts), after)
    assert plugin_of(again).texts.labels == [*LABELS, "fine"]
    with pytest.raises(PeftxError, match="'fine' stands twice"):
        add_label(stack, "fine")
    with pytest.raises(PeftxError, match="'great' and 'fabulous' have one text"):
        add_label(stack, "fabulous", "great.")
    with pytest.raises(PeftxError, match="'excellent' has 9 tokens, and n is 6"):
        add_label(stack, "excellent")


def test_it_learns() -> None:
    stack = stack_of(labels=["negative", "positive"], dropout=0.0)
    stack.train(ROWS, steps=40, batch_size=8, learning_rate=1e-2, max_length=48)
    assert stack.evaluate(ROWS, metrics=["accuracy"])["accuracy"].value >= 0.875


def test_while_training_states_are_dropped_out_before_the_head() -> None:
    """The prompt's projection and the tiny model have no dropout, so the draws behind those of the pairs are the
    head's."""
    stack = trained(stack_of(dropout=0.5))
    plugin, inputs, target = plugin_of(stack), example_inputs(stack.model), torch.tensor([0, 2])
    batch = inputs | {CLASS_INDEX: target, "labels": torch.full((2, 9), -100)}
    losses, expected = [], []
    for training in (True, False):
        stack.model.train(training)
        torch.manual_seed(0)
        losses.append(float(stack.train_step(batch)))
        torch.manual_seed(0)
        chosen, holds = pairs(target, 3)
        state = torch.get_rng_state()
        with plugin.head.reading() as seen:
            ask(stack, inputs, chosen.tolist())
        torch.set_rng_state(state)
        h = torch.nn.functional.dropout(seen[0], 0.5, training)[:, -1]
        logits = plugin.head.linear(h).detach()
        expected.append(float(torch.nn.functional.cross_entropy(logits, holds)))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_dropout_acts_while_training() -> None:
    labels = LabelPrefixes(torch.randn(2, 5, 4), sizes=2 * [(3, 50, 50)], pool=True, dropout=0.5, first=0)
    assert 0.4 < float((numbers(labels) == 0).float().mean()) < 0.6
    assert not bool((numbers(labels.eval()) == 0).any())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"texts": {"bad": ""}}, "the label text '' has no tokens"),
        ({"texts": {"awful": "x"}}, "texts names 'awful'"),
        ({"texts": {"bad": "x" * 200}}, "label texts of 200 tokens, and the model reads 128"),
        ({"length": 3}, "label 'fair' has 4 tokens, and n is 3"),
        ({"texts": {"bad": "x", "great": "x"}}, "labels 'bad' and 'great' have one text"),
        ({"texts": {"fair": "bad."}}, "labels 'bad' and 'fair' have one text"),  # full stops fill up
        ({"labels": ["bad"]}, "at least 2 items"),
        ({"labels": ["bad", " "]}, "is empty"),
    ],
)
def test_bad_input(options: dict[str, object], said: str) -> None:
    with pytest.raises(PeftxError, match=f"(l-tuning|LTuning): .*{said}"):
        stack_of(**options)


def test_nothing_is_known_before_inject() -> None:
    """As in a run that measures the base, or prepares the data, ahead of its stage `inject`."""
    plugin = LTuning()
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer(), inject=False)
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    for early in (
        lambda: plugin.classify(stack, ["x"]),
        lambda: stack.prepare(data),
        lambda: add_label(stack, "new"),
    ):
        with pytest.raises(
            PeftxError, match=r"l-tuning: .*the labels are not read and there is no head yet"
        ) as caught:
            early()
        assert caught.value.hint == "inject it before prepare and evaluate"


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(PeftxError, match="pool=False is of the prefix"):
        LTuning(pool=False)
    assert LTuning(pool=True).config.pool  # a bundle writes every option down
    with pytest.raises(PeftxError, match=r"LTuning: .*texts names 'awful', which is not among `labels`"):
        LTuning(labels=["bad", "good"], texts={"awful": "x"})  # before a model is loaded


def test_bad_texts_and_models() -> None:
    stack = stack_of()
    with pytest.raises(PeftxError, match=r"l-tuning: text 1 .* has no tokens"):
        stack.classify(["fine", ""])
    with pytest.raises(DataError, match="'awful' is not among"):
        stack.train([{"text": "x", "label": "awful"}], steps=1)
    with pytest.raises(ArchitectureError, match="l-tuning: t5 has encoder and decoder"):
        stack_of("t5")
    with pytest.raises(ArchitectureError, match="l-tuning: mamba has no attention"):
        stack_of("mamba", variant="prefix")
    assert len(stack.classify(["y" * 500, "z"])) == 2  # cut to what the model reads behind a label
