"""Multi-Layers Trainable Pooling: the pool by hand and against the official code, the loss, and both attentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack, TrainStep
from peftx.engines.data import Collator
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError, UnsupportedError
from peftx.testing import conformance, plan_checks
from peftx.testing.kit import Planned
from peftx.testing.models import EOS, PAD, tiny, tiny_tokenizer
from peftx.toolkits.evaluation import evaluating
from peftx_lora import Lora
from peftx_multi_layer_trainable_pooling import LayerPool, MultiLayerTrainablePooling
from peftx_ntk_attention import NtkAttention
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("multi-layer-trainable-pooling")
BIDIRECTIONAL = plan_checks(
    "multi-layer-trainable-pooling",
    options={"bidirectional": True, "latents": 4, "heads": 2},
    models=["llama"],
    not_on=MultiLayerTrainablePooling.refuses
    | {"mamba": "no attention", "bloom": "its attention is not looked up by name"},
    expected_failures={
        "accumulation_makes_the_same_step": "other documents of a micro-batch are its negatives",
        "identity_at_start": "attention is another one",
        "effects_match_claims": "an object that is bidirectional claims replaces-attention, and the class does not",
        "cached_equals_uncached": "a cache is refused",
        "padded_generation": "a cache is refused",
    },
)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(each, id=each.id)
        for each in BIDIRECTIONAL
        if each.arch and "fresh_process" not in each.id  # slow; a test below loads a bundle
    ],
)
def test_the_kit_bidirectional(check: Planned) -> None:
    check.run()


SIZES = {"latents": 5, "heads": 2, "head_size": 6}
TEXTS = ["tea", "a longer text about rain", "snow", "two words"]
ROWS = [
    {"prompt": f"{word}?", "chosen": f"about {word}", "rejected": f"no {word}" + "!" * i}
    for i, word in enumerate(("tea", "rain", "sleep", "noise"))
]
BOTH = pytest.mark.parametrize("both", [False, True])


def stack_of(arch: str = "llama", *others: Any, model: Any = None, **options: Any) -> Stack:
    plugin = MultiLayerTrainablePooling(**{"latents": 6, "heads": 4, **options})
    return Stack(model or tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer())


def plugin_of(stack: Stack) -> MultiLayerTrainablePooling:
    return stack.plugins["multi-layer-trainable-pooling"]  # type: ignore[return-value]


def embed(stack: Stack, texts: list[str] = TEXTS, **options: Any) -> Tensor:
    return plugin_of(stack).embed(stack, texts, **options)


def number(shape: Any, n: int) -> Tensor:
    """Numbers between -1/2 and 1/2 that no generator decides."""
    i = torch.arange(torch.Size(shape).numel())
    return (((31 * i * i + 17 * i + 101 * n + 7) % 1009) / 504.5 - 1).float().view(shape) / 2


def numbered(layers: int = 3, width: int = 8) -> LayerPool:
    pool = LayerPool(layers, width, **SIZES)
    with torch.no_grad():
        for n, p in enumerate(pool.parameters()):
            p.copy_(number(p.shape, n))
    return pool


# --------------------------------------------------------------------------------------------------------- the pool
def test_equals_the_official_pool_and_loss() -> None:
    """PerceiverResampler and HardNegativeNLLLoss of yixuantt/PoolingAndAttn, commit 57791d5, with these weights."""
    official = [
        [-0.719472, 0.438962, 0.068872, -0.312524, -0.245334, -0.356292, -0.005425, 0.009796],
        [-0.589784, 0.434807, -0.075441, -0.397584, -0.333755, -0.385549, 0.045184, 0.193006],
    ]
    e = numbered()(number((6, 3, 8), 99))
    torch.testing.assert_close(e[[0, 5]], torch.tensor(official), rtol=0, atol=2e-6)
    q, *documents = e.chunk(3)
    loss = F.cross_entropy(20 * q @ torch.cat(documents).T, torch.arange(2))
    assert float(loss.detach()) == pytest.approx(2.654618, abs=1e-4)


def test_the_pool_by_hand() -> None:
    """Number by number: each head of each latent weighs the layers by a softmax."""
    pool, s = numbered(), number((1, 3, 8), 7)
    S, q = pool.norm_s(s[0] + pool.E), pool.norm_q(pool.Q)
    X = []
    for m in range(5):
        read = []
        for head in range(2):
            rows = slice(6 * head, 6 * head + 6)
            wq, wk, wv = (w.weight[rows] for w in (pool.W_q, pool.W_k, pool.W_v))
            scores = torch.stack([(wq @ q[m]) @ (wk @ S[layer]) for layer in range(3)]) / 6**0.5
            a = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(pool.weights(S[None])[0, head, m], a)
            read.append(sum(a[layer] * (wv @ S[layer]) for layer in range(3)))
        X.append(pool.Q[m] + pool.W_o.weight @ torch.cat(read))
    Y = []
    for x in X:
        inner = pool.W_in.weight @ pool.norm_x(x) + pool.W_in.bias
        a, b = inner[:32], inner[32:]
        Y.append(x + pool.W_out.weight @ (a * b * 0.5 * (1 + torch.erf(b / 2**0.5))) + pool.W_out.bias)
    mean = sum(Y) / 5
    torch.testing.assert_close(pool(s)[0], mean / mean.square().sum().sqrt())


def test_the_weights_are_of_layers() -> None:
    pool = numbered()
    A = pool.weights(pool.norm_s(number((2, 3, 8), 1) + pool.E))
    assert A.shape == (2, 2, 5, 3)
    torch.testing.assert_close(A.sum(-1), torch.ones(2, 2, 5))
    assert (A > 0).all()
    assert A.std(-1).max() > 0.01


def test_of_one_layer_every_latent_reads_the_same() -> None:
    """softmax over a single key is 1: W_o W_v S for each latent, whatever Q is."""
    pool, s = numbered(layers=1), number((2, 1, 8), 3)
    seen: list[Tensor] = []
    pool.norm_x.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] - pool.Q))
    pool(s)
    expected = pool.W_o(pool.W_v(pool.norm_s(s + pool.E)))  # [2, 1, 8]
    torch.testing.assert_close(seen[0], expected.expand(-1, 5, -1))
    with torch.no_grad():
        pool.Q.mul_(-3)
    pool(s)
    torch.testing.assert_close(seen[1], expected.expand(-1, 5, -1))


def test_layers_are_told_by_their_embeddings_alone() -> None:
    pool, s, order = numbered(), number((2, 3, 8), 3), [2, 0, 1]
    before = pool(s)
    assert not torch.allclose(pool(s[:, order]), before, atol=1e-3)
    with torch.no_grad():
        pool.E.copy_(pool.E[order])
    torch.testing.assert_close(pool(s[:, order]), before)


def test_the_residual_path_is_the_mean_of_the_latents() -> None:
    pool = numbered()
    with torch.no_grad():
        for p in (pool.W_o.weight, pool.W_out.weight, pool.W_out.bias):
            p.zero_()
    e = pool(number((2, 3, 8), 3))
    mean = pool.Q.mean(0)
    torch.testing.assert_close(e, (mean / mean.norm()).expand(2, -1))


def test_latents_start_normal_and_sizes_follow_the_width() -> None:
    pool = plugin_of(stack_of(latents=768, heads=32)).pool
    assert pool.Q.shape == (768, 32)
    assert pool.E.shape == (2, 32)
    for p in (pool.Q.detach(), pool.E.detach()):
        assert abs(float(p.mean())) < 0.4
        assert 0.8 < float(p.std()) < 1.2
    assert pool.W_q.weight.shape == (32, 32)
    assert pool.W_q.bias is None
    assert pool.W_o.bias is None
    assert plugin_of(stack_of(heads=3)).pool.W_v.weight.shape == (30, 32)
    assert plugin_of(stack_of(heads=64)).pool.W_k.weight.shape == (64, 32)
    assert plugin_of(stack_of(head_size=16)).pool.W_o.weight.shape == (32, 64)
    config = MultiLayerTrainablePooling().config
    assert (config.latents, config.heads, config.scale, config.bidirectional) == (768, 32, 20.0, False)


# ------------------------------------------------------------------------------------------------------ the layers
@BOTH
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_a_vector_of_each_layer(arch: str, both: bool) -> None:
    """The embedding is no layer; EOS's state under the causal mask, the mean otherwise, of a text alone."""
    stack, mean = stack_of(arch, bidirectional=both), both or arch == "bert"
    plain = tiny(arch)
    for text, found in zip(TEXTS, embed(stack), strict=True):
        (ids,) = torch.tensor(plugin_of(stack).rows(stack, [text]))[None].unbind(0)
        n = ids.shape[1]
        mask = torch.zeros(1, 1, n, n) if both and arch != "bert" else torch.ones_like(ids)
        with torch.no_grad():
            H = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            assert len(H) == stack.anatomy.num_layers + 1
            s = torch.stack([h[0].mean(0) if mean else h[0, -1] for h in H[1:]])
            torch.testing.assert_close(found, plugin_of(stack).pool(s[None])[0], rtol=1e-4, atol=1e-5)


def test_windows_fall_with_the_mask_and_half_precision_is_left() -> None:
    """Of a window of 4, and in bfloat16: means and pool are float32."""
    model = tiny("mistral", sliding_window=4).bfloat16()
    stack = stack_of(model=model, bidirectional=True)
    pool, texts = plugin_of(stack).pool, ["a text of more tokens than the window", "short"]
    assert {p.dtype for p in pool.parameters()} == {torch.float32}
    plain, found = tiny("mistral", sliding_window=4).bfloat16(), embed(stack, texts)
    for text, e in zip(texts, found, strict=True):
        ids = torch.tensor(plugin_of(stack).rows(stack, [text]))
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bfloat16)
        with torch.no_grad():
            H = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            expected = pool(torch.stack([h[0].float().mean(0) for h in H[1:]])[None])[0]
            rounded = pool(torch.stack([h[0].mean(0) for h in H[1:]])[None])[0]
        torch.testing.assert_close(e, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(embed(stack, ["short"])[0], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(rounded, expected, rtol=0, atol=1e-6)


def test_a_decoders_text_ends_with_eos_once_and_fits() -> None:
    stack = stack_of()
    short, long = plugin_of(stack).rows(stack, ["tea", "tea and " * 60])
    assert short[-1] == EOS
    assert short.count(EOS) == 1
    assert len(long) == 128
    assert long[-1] == EOS
    assert long[0] != short[0]
    assert [len(ids) for ids in plugin_of(stack).rows(stack, ["tea and " * 60], 20)] == [20]
    encoder = Stack(
        tiny("bert"), [MultiLayerTrainablePooling(latents=2)], tokenizer=tiny_tokenizer(ends=True)
    )
    (ids,) = plugin_of(encoder).rows(encoder, ["tea"])
    assert ids.count(EOS) == 1
    with pytest.raises(DataError, match=r"multi-layer-trainable-pooling: text 1 .* has no tokens"):
        embed(stack, ["tea", ""])


@BOTH
def test_vectors_have_length_1_and_pads_do_not_show(both: bool) -> None:
    stack = stack_of(bidirectional=both)
    e = embed(stack)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(4))
    assert e.dtype == torch.float32
    assert not e.requires_grad
    assert not e.is_inference()
    torch.testing.assert_close(embed(stack, size=1), e)
    rows = [{"input_ids": ids} for ids in plugin_of(stack).rows(stack, TEXTS)]
    for side in ("left", "right"):
        for extra in (0, 5):
            batch = Collator(PAD, padding_side=side)([*rows, {"input_ids": [3] * (30 + extra)}])
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            with evaluating(stack.model):
                outputs = stack.model(**batch, position_ids=positions, output_hidden_states=True)
                found = plugin_of(stack).vectors(outputs, batch["attention_mask"])[:4]
            torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_the_first_token_sees(arch: str, both: bool) -> None:
    stack = stack_of(arch, bidirectional=both)
    one = torch.arange(3, 12)[None]
    two = one.clone()
    two[0, -1] = 77
    with evaluating(stack.model):
        first, other = (
            stack.model(ids, output_hidden_states=True).hidden_states[-1][0, 0] for ids in (one, two)
        )
    assert torch.allclose(first, other, atol=1e-6) is not both


def test_soft_tokens_are_seen_and_not_pooled() -> None:
    stack = stack_of("llama", PromptTuning(length=3), bidirectional=True)
    soft = next(iter(stack.ledger.parameters("prompt-tuning"))).detach()
    ids = torch.tensor(plugin_of(stack).rows(stack, ["tea"]))
    plain, n = tiny("llama"), ids.shape[1] + 3
    both = torch.cat((soft[None], plain.get_input_embeddings()(ids)), 1)
    with torch.no_grad():
        H = plain(
            inputs_embeds=both, attention_mask=torch.zeros(1, 1, n, n), output_hidden_states=True
        ).hidden_states
        expected = plugin_of(stack).pool(torch.stack([h[0, 3:].mean(0) for h in H[1:]])[None])
    torch.testing.assert_close(embed(stack, ["tea"]), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_read_from_a_cache() -> None:
    stack = stack_of(bidirectional=True)
    with pytest.raises(UnsupportedError, match="multi-layer-trainable-pooling: bidirectional, the states"):
        stack.generate("Once", max_new_tokens=2)
    assert isinstance(stack.generate("Once", max_new_tokens=2, use_cache=False), str)
    plain = Stack(tiny("llama"), tokenizer=tiny_tokenizer()).generate("Once", max_new_tokens=4)
    assert stack_of().generate("Once", max_new_tokens=4) == plain
    with stack.disabled("multi-layer-trainable-pooling"):
        assert stack.generate("Once", max_new_tokens=4) == plain


def test_one_attention_a_layer() -> None:
    with pytest.raises(ConflictError, match="both compute the attention"):
        stack_of("llama", NtkAttention(), bidirectional=True)
    stack_of("llama", NtkAttention())


@pytest.mark.parametrize(
    ("arch", "both", "match"),
    [
        ("t5", False, "t5 has encoder and decoder"),
        ("vit", False, "vit has no token embedding"),
        ("gemma3n", False, "several states a token"),
        ("mamba", True, "mamba has no attention"),
        ("bloom", True, "does not look its attention up"),
        ("qwen3_next", True, r"qwen3_next has '\w+' in 1 of 2"),
    ],
)
def test_models_that_do_not_fit(arch: str, both: bool, match: str) -> None:
    with pytest.raises(ArchitectureError, match=match):
        stack_of(arch, bidirectional=both)


def test_an_attention_without_masks_is_refused() -> None:
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArchitectureError, match="llama has 'flash_attention_2' in 2 of 2"):
        stack_of(model=model, bidirectional=True)


# -------------------------------------------------------------------------------------------------------- training
def batch_of(stack: Stack, rows: list[dict[str, str]] = ROWS, side: Any = "right") -> dict[str, Tensor]:
    data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=64))
    assert data.format == "tokenized"
    assert data.train is not None
    collate = Collator(PAD, padding_side=side, own_lengths=("positive_ids", "negative_ids"))
    return collate(list(data.train))


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_loss_by_hand(arch: str, side: str, both: bool) -> None:
    """Of the vectors that `embed` gives: each query picks its document among all, and all hard negatives."""
    stack = stack_of(arch, bidirectional=both, scale=7.0)
    loss = stack.train_step(batch_of(stack, side=side))
    q, d, n = (embed(stack, [row[name] for row in ROWS]) for name in ("prompt", "chosen", "rejected"))
    total = 0.0
    for i in range(4):
        scores = torch.stack([7 * q[i] @ x for x in (*d, *n)])
        total += float(scores.logsumexp(0) - scores[i]) / 4
    assert float(loss) == pytest.approx(total, abs=1e-4)


def test_what_trains_is_the_pool_and_the_adapter() -> None:
    stack = stack_of("llama", Lora(rank=2))
    own = sum(p.numel() for p in plugin_of(stack).pool.parameters())
    adapter = sum(p.numel() for p in stack.ledger.parameters("lora"))
    assert stack.trainable_parameters() == own + adapter
    stack.train_step(batch_of(stack))
    stack.train_step(batch_of(stack))
    assert all(
        p.grad is not None for p in (*plugin_of(stack).pool.parameters(), *stack.ledger.parameters("lora"))
    )
    assert any(p.grad.abs().max() > 0 for p in stack.ledger.parameters("lora"))


@BOTH
def test_trained_vectors_find_their_documents_out_of_a_bundle(both: bool, tmp_path: Path) -> None:
    stack = stack_of("llama", Lora(rank=2), bidirectional=both)
    stack.train(ROWS * 2, steps=15, batch_size=4, learning_rate=1e-2, max_length=32)
    q, d, n = (embed(stack, [row[name] for row in ROWS]) for name in ("prompt", "chosen", "rejected"))
    assert (q @ torch.cat((d, n)).T).argmax(1).tolist() == [0, 1, 2, 3]
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(embed(again), embed(stack))
    assert torch.equal(again.embed(TEXTS), embed(stack)), "the server gives these too"


def test_columns_of_other_plugins_stand_for_all_three_texts() -> None:
    stack = stack_of()
    batch = batch_of(stack)
    step = TrainStep(stack, batch | {"domain": torch.tensor([4, 5, 6, 7])})
    step.forward = lambda **changes: stack.model(  # type: ignore[method-assign]
        **{name: x for name, x in step.batch.items() if name != "domain"}, **changes
    )
    stack.run_train_step(step)
    assert step.batch["domain"].tolist() == [4, 5, 6, 7] * 3
    assert step.batch["input_ids"].shape == step.batch["attention_mask"].shape
    assert len(step.batch["input_ids"]) == 12
    assert set(step.batch) == {"input_ids", "attention_mask", "domain"}
    with pytest.raises(PeftxError, match="column 'speaker' has a value a token of one text"):
        stack.train_step(batch | {"speaker": batch["labels"]})
    with pytest.raises(PeftxError, match="the batch has no negative_ids, positive_ids"):
        stack.train_step({name: x for name, x in batch.items() if name in ("input_ids", "attention_mask")})


def test_rows_to_watch_the_loss_on_are_prepared_too() -> None:
    stack = stack_of()
    data = as_training_data(stack, ROWS, seed=0, max_length=64)
    data.eval = data.train
    data = stack.prepare(data)
    assert data.eval.to_list() == data.train.to_list()
    with pytest.raises(PeftxError, match="format 'prompt-completion'"):
        stack.train([{"prompt": "tea", "completion": " yes"}], steps=1)
    with pytest.raises(DataError, match=r"row 1 \(counting from 0\): chosen and rejected are the same"):
        stack.train([ROWS[0], {**ROWS[1], "rejected": ROWS[1]["chosen"] + " "}], steps=1)
    with pytest.raises(DataError, match="all 2 rows have one passage"):
        stack.train([{**row, "chosen": "tea"} for row in ROWS[:2]], steps=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latents": 0}, "latents"), ({"heads": 0}, "heads"), ({"head_size": 0}, "head_size"),
        ({"scale": 0}, "scale"), ({"scale": float("inf")}, "scale"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=f"MultiLayerTrainablePooling: .*{match}"):
        MultiLayerTrainablePooling(**options)
