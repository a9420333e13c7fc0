from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.engines.data import CLASS_INDEX
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import PAD, example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import ROWS_BY_FORMAT
from peftx.toolkits.evaluation import evaluating
from peftx_sk_tuning import Prompt, Reader, SkTuning, cached

test_conformance = conformance("sk-tuning")
test_conformance_of_the_prefix = conformance(
    "sk-tuning",
    options={"variant": "prefix"},
    not_on=SkTuning.refuses
    | {"bloom": "its attention is not looked up by name", "mamba": "it has no attention"},
    expected_failures={
        "effects_match_claims": "claims are of the class, and the other variant has soft tokens"
    },
)

ROWS = list(ROWS_BY_FORMAT["classification"])
TEXT = "Good or bad?"

# What the official Llama classes give on `tiny("llama", num_key_value_heads=4)`, its `example_inputs` with targets 0
# and 1, and the numbers that the test fills in: scores, then of the gradient of E_s two entries and the norm. Made once
# by running those classes outside this repository; the README says which commit.
OFFICIAL = {
    ("prompt", False): ([[0.135967, -0.666833], [0.268133, -0.706466]], [-0.1724845, -0.0263825, 1.6304172]),
    ("prompt", True): ([[0.360404, 0.472922], [0.161442, 0.472471]], [-0.0081875, -0.0027667, 0.1300471]),
    ("prefix", False): ([[-0.083719, -0.476719], [0.22467, -0.569195]], [-0.1808455, -0.0346817, 2.0035803]),
    ("prefix", True): ([[-0.295778, 0.910345], [-0.268232, 0.213432]], [-0.1166738, -0.0187084, 1.9116391]),
}


def stack_of(arch: str = "llama", **options: object) -> Stack:
    return Stack(tiny(arch), [SkTuning(**{"text": TEXT, **options})], tokenizer=tiny_tokenizer())


def class_scores(stack: Stack, inputs: dict[str, Tensor]) -> Tensor:
    """What the plugin's head gives for token ids, in evaluation mode."""
    stack.model.eval()
    return stack.plugins["sk-tuning"].scores(lambda: stack.model(**inputs), inputs["attention_mask"])[0]


def batch_of(stack: Stack) -> dict[str, Tensor]:
    inputs = example_inputs(stack.model)
    return inputs | {CLASS_INDEX: torch.tensor([0, 1]), "labels": torch.full((2, 9), -100)}


def tensors(stack: Stack, ending: str) -> Tensor:
    return next(t for name, t in stack.ledger.tensors("sk-tuning").items() if name.endswith(ending))


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


@pytest.mark.parametrize(("variant", "adapter"), OFFICIAL)
def test_equals_the_official_code(variant: str, adapter: bool) -> None:
    mean = "all" if variant == "prompt" else None
    plugin = SkTuning(text=TEXT, variant=variant, adapter=adapter, dropout=0.0, mean=mean)
    stack = Stack(tiny("llama", num_key_value_heads=4), [plugin], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        plugin.head.linear.weight.copy_(torch.linspace(-0.3, 0.4, 64).view(2, 32))
        plugin.head.linear.bias.copy_(torch.tensor([0.1, -0.2]))
        if adapter:
            W = tensors(stack, ".W.weight")
            W.copy_(torch.linspace(-0.5, 0.7, W.numel()).view_as(W))
    inputs = example_inputs(stack.model)
    scores = class_scores(stack, inputs)
    nn.functional.cross_entropy(scores, torch.tensor([0, 1])).backward()
    gradient = tensors(stack, ".E").grad
    expected = [torch.tensor(numbers) for numbers in OFFICIAL[variant, adapter]]
    assert difference(scores, expected[0]) < 5e-6
    assert difference(torch.stack((gradient[0, 0], gradient[5, 7], gradient.norm())), expected[1]) < 5e-6


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral", "bert"])
@pytest.mark.parametrize("mean", [None, "text", "all"])
def test_untrained_the_prompt_is_the_sentence_read(arch: str, mean: str | None) -> None:
    stack = stack_of(arch, mean=mean)
    inputs = example_inputs(stack.model)
    s = torch.tensor(stack.plugins["sk-tuning"].state["ids"]).expand(2, -1)
    ids, at = inputs["input_ids"], int(arch == "bert")  # an encoder's first token stays first
    joined = torch.cat((ids[:, :at], s, ids[:, at:]), 1)
    with torch.no_grad():
        found, scores = stack.model(**inputs).logits, class_scores(stack, inputs)
        with stack.disabled():
            plain = stack.model(input_ids=joined, output_hidden_states=True)
    real = [*range(at), *range(at + s.shape[1], joined.shape[1])]
    assert difference(found, plain.logits[:, real]) < 1e-5
    # What the head averages: where nothing is said, the sentence counts where it has seen the text.
    whole = mean == "all" or (mean is None and arch == "bert")
    averaged = plain.hidden_states[-1] if whole else plain.hidden_states[-1][:, real]
    linear = stack.plugins["sk-tuning"].head.linear
    assert difference(scores, linear(averaged).mean(1)) < 1e-6


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_untrained_the_prefix_is_the_sentence_in_the_cache(arch: str, padding: str | None) -> None:
    stack = stack_of(arch, variant="prefix")
    inputs = example_inputs(stack.model, padding=padding)
    s = torch.tensor(stack.plugins["sk-tuning"].state["ids"]).expand(2, -1)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = stack.model(**inputs, position_ids=places).logits
        scores = class_scores(stack, inputs | {"position_ids": places})
        with stack.disabled():
            cache = stack.model(input_ids=s, use_cache=True).past_key_values
            plain = stack.model(
                input_ids=inputs["input_ids"],
                attention_mask=nn.functional.pad(mask, (s.shape[1], 0), value=1),
                position_ids=places + s.shape[1],
                past_key_values=cache,
                output_hidden_states=True,
            )
    real = mask.bool()
    assert difference(found[real], plain.logits[real]) < 1e-5
    each = stack.plugins["sk-tuning"].head.linear(plain.hidden_states[-1]) * mask[..., None]
    assert difference(scores, each.sum(1) / mask.sum(1, keepdim=True)) < 1e-6


def test_an_encoder_reads_the_sentence_by_itself() -> None:
    stack = stack_of("bert", variant="prefix")
    before, inputs = [], example_inputs(stack.model)
    s = torch.tensor([stack.plugins["sk-tuning"].state["ids"]])
    with torch.no_grad(), stack.disabled():
        for layer in stack.model.bert.encoder.layer:
            states = stack.model.bert(s, output_hidden_states=True).hidden_states[len(before)]
            before.append(layer.attention.self.key(states).unflatten(-1, (4, 8)).transpose(1, 2))
    with torch.no_grad(), cached(stack):
        for (key, _), expected in zip(stack.plugins["sk-tuning"].reader.rows, before, strict=True):
            assert difference(key, expected) < 1e-6
        stack.model(**inputs)


@pytest.mark.parametrize("arch", ["llama", "deepseek_v3", "gemma3n", "gemma4"])
def test_in_a_decoder_both_variants_are_one_function_of_the_text(arch: str) -> None:
    """A causal model's sentence does not see the text; so only the adapter tells the two apart, and `mean`: all. Soft
    tokens are none of the vocabulary, and have nothing in Gemma's further embeddings, one for each layer."""
    one, two = stack_of(arch, variant="prompt"), stack_of(arch, variant="prefix")
    inputs, heads = example_inputs(one.model), [s.plugins["sk-tuning"].head for s in (one, two)]
    heads[1].load_state_dict(heads[0].state_dict())
    with torch.no_grad():
        assert difference(one.model(**inputs).logits, two.model(**inputs).logits) < 1e-5
        assert difference(class_scores(one, inputs), class_scores(two, inputs)) < 1e-5


def test_a_hybrid_reads_the_sentence_in_its_layers_of_attention() -> None:
    """Qwen3.5: linear attention in layers 0 and 2, which keep no keys and values."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    model = tiny("qwen3_5", num_hidden_layers=4, layer_types=kinds)
    stack = Stack(model, [SkTuning(text=TEXT, variant="prefix")], tokenizer=tiny_tokenizer())
    s = torch.tensor([stack.plugins["sk-tuning"].state["ids"]])
    inputs = example_inputs(model)
    with torch.no_grad():
        live = output_of(model, inputs)
        with stack.disabled():
            cache = model(input_ids=s, use_cache=True).past_key_values
        with cached(stack):
            assert torch.equal(output_of(model, inputs), live)
            rows = stack.plugins["sk-tuning"].reader.rows
            assert len(rows) == 2
            for layer, (key, value) in zip((1, 3), rows, strict=True):
                assert difference(key, cache.layers[layer].keys) < 1e-5
                assert difference(value, cache.layers[layer].values) < 1e-5


@pytest.mark.parametrize("arch", ["deepseek_v3", "gemma4"])
def test_one_adapter_needs_heads_of_one_size(arch: str) -> None:
    """W of the prefix maps keys and values of every layer: here values are narrower, or some layers' heads wider."""
    with pytest.raises(
        ArchitectureError, match=r"sk-tuning: one matrix W.* (8 or 12|8 or 16) numbers"
    ) as caught:
        stack_of(arch, variant="prefix", adapter=True)
    assert caught.value.hint == "adapter: false, or variant: prompt"
    for options in ({"variant": "prefix", "adapter": False}, {"variant": "prompt", "adapter": True}):
        stack_of(arch, **options).train(ROWS, steps=1, batch_size=2, max_length=32)


@pytest.mark.parametrize("variant", ["prompt", "prefix"])
@pytest.mark.parametrize("adapter", [False, True])
def test_trainable_count(variant: str, adapter: bool) -> None:
    n, d, size, classes = len(TEXT), 32, 8, 2
    square = (d if variant == "prompt" else size) ** 2 if adapter else 0
    stack = stack_of(variant=variant, adapter=adapter)
    assert stack.trainable_parameters() == n * d + square + d * classes + classes


@pytest.mark.parametrize("variant", ["prompt", "prefix"])
def test_only_the_sentence_and_the_head_get_gradients(variant: str) -> None:
    stack = stack_of(variant=variant)
    stack.train_step(batch_of(stack))
    with_gradient = {name for name, p in stack.model.named_parameters() if p.grad is not None}
    assert len(with_gradient) == 3
    assert float(tensors(stack, ".E").grad.abs().min(1).values.max()) > 0
    assert bool((tensors(stack, ".E").grad.abs().amax(1) > 0).all()), "a token of the sentence does not train"


def test_the_gradient_passes_both_passes() -> None:
    """Against finite differences, in float64."""
    stack = Stack(tiny("gpt2").double(), [SkTuning(text=TEXT, variant="prefix")], tokenizer=tiny_tokenizer())
    batch, E = batch_of(stack), tensors(stack, ".E")
    stack.train_step(batch)
    gradient = E.grad.clone()
    for place in ((0, 3), (5, 20), (len(TEXT) - 1, 0)):
        losses = []
        for by in (1e-4, -1e-4):
            with torch.no_grad():
                E[place] += by
            losses.append(float(stack.train_step(batch)))
            with torch.no_grad():
                E[place] -= by
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(float(gradient[place]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_cached_equals_live_exactly(arch: str, adapter: bool) -> None:
    stack = stack_of(arch, variant="prefix", adapter=adapter)
    stack.train(ROWS, steps=2, batch_size=2, learning_rate=1e-2, max_length=32)
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        live = output_of(stack.model, inputs)
        with cached(stack):
            tensors(stack, ".E").copy_(torch.arange(32.0))  # no longer looked at
            assert torch.equal(output_of(stack.model, inputs), live)
        assert difference(output_of(stack.model, inputs), live) > 1e-3


def test_a_cached_prefix_generates_what_the_live_one_does() -> None:
    stack = stack_of(variant="prefix")
    live = stack.generate("x = ", max_new_tokens=8)
    with cached(stack):
        assert stack.generate("x = ", max_new_tokens=8) == live
    with pytest.raises(PeftxError, match="no keys and values"), cached(stack_of()):
        pass


def test_adapter_is_the_formula() -> None:
    E, W = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    prompt = Prompt(E, adapter=True, dropout=0.5)
    prompt.W.weight.data = W
    assert torch.equal(prompt.eval().rows(), E @ W.t())
    dropped = prompt.train().rows().detach()
    assert bool(((dropped == 0) | (dropped == 2 * E @ W.t())).all())
    reader = Reader(E, size=2, dropout=0.5, base=nn.Identity(), blocks=[])
    reader.W.weight.data = W
    rows = (E @ W.t()).expand(1, 64, 2, 2)
    assert torch.equal(reader.eval().adapted(E.expand(1, 64, 2, 2)), rows)
    dropped = reader.train().adapted(E.expand(1, 64, 2, 2)).detach()
    assert bool(((dropped == 0) | (dropped == 2 * rows)).all())
    assert 0.3 < float((dropped[rows != 0] == 0).float().mean()) < 0.7


def test_a_bundle_from_before_the_option_averages_as_it_did() -> None:
    now, plugin = stack_of(), SkTuning(text=TEXT)
    plugin.state["ids"] = now.plugins["sk-tuning"].state["ids"]
    then, all_ = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer()), stack_of(mean="all")
    inputs = example_inputs(now.model)
    for stack in (now, all_):
        stack.plugins["sk-tuning"].head.load_state_dict(plugin.head.state_dict())
    with torch.no_grad():
        before, same, other = (class_scores(stack, inputs) for stack in (then, all_, now))
    assert torch.equal(before, same)
    assert difference(before, other) > 1e-3


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("variant", ["prompt", "prefix"])
def test_in_half_precision_small_steps_count(variant: str, adapter: bool) -> None:
    """What trains stays in float32, and is rounded where the model reads it."""
    model = tiny("llama").to(torch.bfloat16)
    plugin = SkTuning(text=TEXT, variant=variant, adapter=adapter)
    stack = Stack(model, [plugin], tokenizer=tiny_tokenizer())
    trained = list(stack.ledger.parameters("sk-tuning"))
    before = [p.detach().clone() for p in trained]
    stack.train(ROWS, steps=20, batch_size=4, learning_rate=1e-4, max_length=32)
    assert {p.dtype for p in trained} == {torch.float32}
    assert model.dtype == torch.bfloat16
    moved = torch.cat([(p != q).flatten() for p, q in zip(trained, before, strict=True)])
    assert float(moved.float().mean()) > 0.95
    if variant == "prefix":
        with torch.no_grad(), cached(stack):
            assert {part.dtype for pair in plugin.reader.rows for part in pair} == {torch.bfloat16}


def test_head_leaves_pads_out() -> None:
    head = stack_of(dropout=0.0).plugins["sk-tuning"].head
    head.linear.weight.data = torch.tensor([[1.0], [-2.0]]) * torch.eye(32)[0]
    head.linear.bias.data = torch.tensor([0.5, 0.0])
    hidden, mask = torch.tensor([[[1.0], [3.0], [100.0]]]).expand(1, 3, 32), torch.tensor([[1, 1, 0]])
    assert head(hidden, mask).tolist() == [[2.5, -4.0]]


@pytest.mark.parametrize("variant", ["prompt", "prefix"])
def test_while_training_states_are_dropped_out_before_the_head(variant: str) -> None:
    """The tiny model has no dropout of its own, so the draws are the head's: of every state, and of no mean."""
    stack = stack_of(variant=variant, dropout=0.5)
    head, batch, losses = stack.plugins["sk-tuning"].head, batch_of(stack), []
    for training in (True, False):
        stack.model.train(training)
        torch.manual_seed(0)
        losses.append(float(stack.train_step(batch)))
    with torch.no_grad(), head.reading() as seen:
        stack.model.eval()(**example_inputs(stack.model))
        h = seen[-1][:, -batch["input_ids"].shape[1] :]  # of the text; a prefix was read before
        torch.manual_seed(0)
        scores = [head.linear(states).mean(1) for states in (nn.functional.dropout(h, 0.5), h)]
    expected = [float(nn.functional.cross_entropy(o, torch.tensor([0, 1]))) for o in scores]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("variant", ["prompt", "prefix"])
def test_it_learns_and_comes_back(variant: str, tmp_path: Path) -> None:
    stack = stack_of(variant=variant, dropout=0.0)
    stack.train(ROWS, steps=40, batch_size=8, learning_rate=3e-2, max_length=48)
    assert stack.evaluate(ROWS, metrics=["accuracy"])["accuracy"].value == 1
    assert stack.classify(ROWS[1]["text"]) == "positive"
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    texts = [row["text"] for row in ROWS]
    with evaluating(stack.model), evaluating(again.model):
        expected, found = (s.plugins["sk-tuning"].classify(s, texts)[1] for s in (stack, again))
    assert torch.equal(found, expected)


def test_a_copy_after_a_training_step_reads_for_itself() -> None:
    stack = stack_of(variant="prefix")
    stack.train_step(batch_of(stack))  # the rows of the last pass carry a graph
    inputs = example_inputs(stack.model)
    twin = copy.deepcopy(stack.model)
    with torch.no_grad():
        expected = output_of(stack.model, inputs)
        tensors(stack, ".E").zero_()
        assert torch.equal(output_of(twin, inputs), expected)


@pytest.mark.parametrize("variant", ["prompt", "prefix"])
@pytest.mark.parametrize("arch", ["llama", "roberta"])
def test_a_text_may_fill_what_the_model_reads_behind_the_sentence(arch: str, variant: str) -> None:
    stack = stack_of(arch, variant=variant)
    n = len(stack.plugins["sk-tuning"].state["ids"])
    read = stack.model.config.max_position_embeddings - (PAD + 1 if arch == "roberta" else 0)
    (row,) = stack.plugins["sk-tuning"].texts.rows(stack, ["y" * 500])
    assert len(row) == read - n
    assert stack.classify("y" * 500) in ("negative", "positive")


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_an_encoder_reads_texts_to_their_end(arch: str) -> None:
    stack = Stack(tiny(arch), [SkTuning()], tokenizer=tiny_tokenizer(ends=True))
    (row,) = stack.plugins["sk-tuning"].texts.rows(stack, ["fine"])
    assert row == stack.tokenizer("fine")["input_ids"][: None if arch == "bert" else -1]


def test_positions_go_on_after_the_prefix() -> None:
    stack = stack_of("gpt2", variant="prefix")
    inputs, table = example_inputs(stack.model), stack.model.transformer.wpe.weight
    with torch.no_grad():
        before = output_of(stack.model, inputs)
        table[len(TEXT) + 9 :] += 1.0
        assert torch.equal(output_of(stack.model, inputs), before)
        table[len(TEXT) + 8] += torch.arange(32.0)
        assert difference(output_of(stack.model, inputs)[:, -1], before[:, -1]) > 1e-3


def test_the_sentence_names_the_labels_where_none_is_given() -> None:
    stack = stack_of(text=None, labels=["odd", "even"])
    ids = stack.plugins["sk-tuning"].state["ids"]
    assert stack.tokenizer.decode(ids) == "Classify the text as odd or even"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": ""}, "the text '' has no tokens"),
        ({"text": "x" * 200}, "the text has 200 tokens, and the model reads 128"),
        ({"labels": ["one"]}, "at least 2 items"),
        ({"labels": ["one", " "]}, "is empty"),
    ],
)
def test_bad_input(options: dict[str, object], said: str) -> None:
    with pytest.raises(PeftxError, match=f"(sk-tuning|SkTuning): .*{said}"):
        stack_of(**options)


def test_a_prefix_has_no_states_to_average() -> None:
    with pytest.raises(PeftxError, match="mean: all is of the prompt"):
        SkTuning(variant="prefix", mean="all")


def test_nothing_is_known_before_inject() -> None:
    """As in a run that measures the base, or prepares the data, ahead of its stage `inject`."""
    plugin = SkTuning()
    stack = Stack(tiny("llama"), [plugin], tokenizer=tiny_tokenizer(), inject=False)
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    for early in (lambda: plugin.classify(stack, ["x"]), lambda: stack.prepare(data)):
        with pytest.raises(PeftxError, match=r"sk-tuning: .*there is no sentence and no head yet") as caught:
            early()
        assert caught.value.hint == "inject it before prepare and evaluate"


def test_bad_texts_and_models() -> None:
    stack = stack_of()
    with pytest.raises(PeftxError, match=r"sk-tuning: text 1 .* has no tokens"):
        stack.classify(["fine", ""])
    with pytest.raises(DataError, match="has no tokens"):
        stack.train([{"text": "", "label": "negative"}], steps=1)
    with pytest.raises(ArchitectureError, match="sk-tuning: t5 has encoder and decoder"):
        stack_of("t5")
    with pytest.raises(ArchitectureError, match="sk-tuning: mamba has no attention"):
        stack_of("mamba", variant="prefix")
    assert len(stack.classify(["y" * 500, "z"])) == 2  # cut to what the model reads behind the sentence
