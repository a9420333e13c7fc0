"""LeMo: predictors learn which blocks matter, attention runs on those in a training step, all else is as it was."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import peftx
from peftx import Stack, TrainingData
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.injecting import Wide
from peftx_bita import Bita
from peftx_factorllm import FactorLlm
from peftx_lae import Lae
from peftx_lemo import Eliminate, Lemo, Predictor, block_scores, informative, narrowed, observe
from peftx_lora import Lora
from peftx_prefixlm_vs_causal_icl import PrefixlmVsCausalIcl
from peftx_router_tuning import RouterTuning

test_conformance = conformance("lemo")

ROWS = [{"prompt": f"{n} and {n + 1} make", "completion": f" {2 * n + 1}"} for n in range(6)]
SMALL = {"block": 2, "hidden": 8, "predictor_steps": 2}


def built(arch: str = "llama", **options: object) -> Stack:
    """Two layers, both of which leave tokens out; fitted, and ready for a step."""
    torch.manual_seed(0)
    lemo = Lemo(**{"layers": [0, 1], "keep": 0.5, **SMALL, **options})
    stack = Stack(tiny(arch), [Lora(rank=2, targets="attention.q,k,v,o"), lemo], tokenizer=tiny_tokenizer())
    prepare(stack)
    stack.model.train()
    return stack


def prepare(stack: Stack, rows: list[dict[str, str]] = ROWS) -> None:
    data = TrainingData(
        train=Dataset.from_list(rows),
        eval=None,
        seed=0,
        format="prompt-completion",
        tokenizer=stack.tokenizer,
        max_length=256,
    )
    stack.prepare(data)


def batch(T: int = 12, pads: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 300, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, T - pads :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def eliminations(stack: Stack) -> list[Eliminate]:
    return [module for module in stack.model.modules() if isinstance(module, Eliminate)]


# --------------------------------------------------------------------------------------------------- the predictors
def test_block_scores_by_hand() -> None:
    """Four heads share two of the keys; five tokens in blocks of two."""
    q, k, b = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 2, 3), 2
    found = block_scores(q, k, b)
    assert found.shape == (2, 3, 3)
    for text in range(2):
        for n in range(3):
            for m in range(3):
                scores = [
                    sum(max(0.0, float(q[text, i, h] @ k[text, j, h // 2])) for h in range(4))
                    for i in range(2 * n, min(2 * n + 2, 5))
                    for j in range(2 * m, min(2 * m + 2, 5))
                ]
                assert found[text, n, m] == pytest.approx(max(scores), abs=1e-5)


def test_predictor_by_hand() -> None:
    """Two heads of three numbers, blocks of two tokens, the last one filled up with a token of zeros."""
    f, x = Predictor(6, 2, 2, 4), torch.randn(1, 5, 6)
    found = f(x)
    filled = torch.cat((x[0], torch.zeros(1, 6)))

    def through(network: torch.nn.Module, n: int, h: int) -> torch.Tensor:
        X = torch.cat([filled[2 * n + i, 3 * h : 3 * h + 3] for i in range(2)])  # [b d/H]
        return network.W3 @ (network.W2 @ (network.W1 @ X).clamp(min=0)).clamp(min=0)

    assert [tuple(W.shape) for W in f.buffers()] == [(4, 6), (6, 4), (3, 6)] * 2
    assert not list(f.parameters())
    for n in range(3):
        for m in range(3):
            expected = sum(through(f.q, n, h) @ through(f.k, m, h) for h in range(2))
            torch.testing.assert_close(found[0, n, m], expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_predictors_are_fitted_to(arch: str) -> None:
    """The attention's input, and q and k as the projections give them, before rotation."""
    stack, ids = built(arch), batch()["input_ids"]
    stack.model.eval()
    lemo = stack.plugins["lemo"]
    x, q, k = observe(stack, ids, lemo.seen)["1"]
    norm = (
        stack.model.model.layers[1].input_layernorm if arch == "llama" else stack.model.transformer.h[1].ln_1
    )
    with torch.no_grad():
        states = stack.model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(x, norm(states[1]))
        for role, heads in (("q", q), ("k", k)):
            site = stack.anatomy.site(f"attention.{role}", layer=1)
            y = x @ site.weight.T + (0 if site.bias is None else site.bias)
            torch.testing.assert_close(heads.flatten(2), y)
            assert heads.shape[3] == 8
    S = [block_scores(q, k, 2) for _, q, k in observe(stack, ids, lemo.seen).values()]
    by_hand = sum(
        torch.nn.functional.smooth_l1_loss(lemo.predictors[layer](x), s / s.mean((1, 2), keepdim=True))
        for s, (layer, (x, _, _)) in zip(S, observe(stack, ids, lemo.seen).items(), strict=True)
    )
    torch.testing.assert_close(lemo.distance(stack, ids), by_hand)
    assert not stack.anatomy.site("attention.q", layer=1).module._forward_hooks  # nothing stays behind


def test_rows_that_a_plugin_sends_through_a_layer_afterwards_are_not_the_models() -> None:
    """As Aligner sends its tokens through the keys' projection, where that is packed."""
    stack, ids = built(), batch()["input_ids"]
    seen = stack.plugins["lemo"].seen
    expected = observe(stack, ids, seen)
    for layer in stack.model.model.layers:
        attention = layer.self_attn
        attention.register_forward_hook(lambda module, *_: (module.k_proj(torch.zeros(1, 32)), None)[1])
    for layer, found in observe(stack, ids, seen).items():
        assert all(torch.equal(a, b) for a, b in zip(found, expected[layer], strict=True))


def test_a_half_precision_model_is_scored_in_full() -> None:
    stack, ids = built(), batch()["input_ids"]
    stack.model.to(torch.bfloat16)
    for x, q, k in observe(stack, ids, stack.plugins["lemo"].seen).values():
        assert (x.dtype, q.dtype, k.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_fitting_lowers_the_distance_and_finds_what_matters() -> None:
    torch.manual_seed(0)
    lemo = Lemo(block=8, hidden=32, predictor_steps=60, predictor_rate=3e-3)
    stack = Stack("peftx:tiny", [lemo])
    assert list(lemo.predictors) == ["3", "4"]  # of six: the deeper half but the last
    rows = peftx.engines.data.read_dataset(peftx.engines.models.asset_path("peftx:sample/train.jsonl"))
    held_out = stack.tokenizer(rows[50]["prompt"] + rows[50]["completion"], return_tensors="pt").input_ids

    def distance_and_recall() -> tuple[float, float]:
        found = []
        for layer, (x, q, k) in observe(stack, held_out, lemo.seen).items():
            true, said = block_scores(q, k, 8).sum(1), lemo.predictors[layer](x).sum(1)
            half = true.shape[1] // 2
            best = set(true.topk(half).indices[0].tolist())
            found.append(len(best & set(said.topk(half).indices[0].tolist())) / half)
        return float(lemo.distance(stack, held_out)), sum(found) / 2

    before = distance_and_recall()
    prepare(stack, list(rows.select(range(40))))
    after = distance_and_recall()
    assert after[0] < 0.7 * before[0]
    assert after[1] >= 0.6


def test_predictors_are_fitted_once_and_saved(tmp_path: Path) -> None:
    stack = built()
    lemo = stack.plugins["lemo"]
    fitted = [W.clone() for W in lemo.predictors.buffers()]
    assert not any(W.requires_grad for W in lemo.predictors.buffers())
    prepare(stack, ROWS[::-1])
    stack.train(ROWS, steps=2, learning_rate=1e-2, weight_decay=0.1)
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("llama")).plugins["lemo"]
    assert again.state["fitted"]
    for kept in (lemo, again):
        assert all(torch.equal(a, b) for a, b in zip(fitted, kept.predictors.buffers(), strict=True))
    fresh = built().plugins["lemo"]
    assert all(torch.equal(a, b) for a, b in zip(fitted, fresh.predictors.buffers(), strict=True))


# ------------------------------------------------------------------------------------------------- leaving tokens out
def test_informative_by_hand() -> None:
    """Column sums of blocks 0 to 3 are 2, 5, 1, 5; seven tokens in blocks of two; two pads in the second text."""
    S = torch.tensor([[[1.0, 4, 0, 2], [1, 1, 1, 3]]] * 2)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False

    def kept(share: float) -> list[list[int]]:
        return informative(S, real, 2, share).tolist()

    assert kept(2 / 7) == [[2, 3], [2, 3]]  # the first of two equal blocks
    assert kept(3 / 7) == [[2, 3, 6], [0, 2, 3]]
    assert kept(0.3) == kept(3 / 7)  # rounded up
    assert kept(4 / 7) == [[0, 2, 3, 6], [0, 1, 2, 3]]  # the last block is cut
    assert kept(1.0) == [list(range(7))] * 2
    assert kept(6 / 7)[1] == [0, 1, 2, 3, 4, 5]  # pads last


def test_narrowed_arguments() -> None:
    K, T = torch.tensor([[0, 3], [1, 2]]), 4
    mask, rotary, positions = torch.randn(2, 1, T, T), torch.randn(1, T, 6), torch.arange(T)[None]
    (found, (cos,), where), none, cache, other = (
        narrowed(value, K, T)
        for value in ((mask, (rotary,), positions), None, torch.arange(T), torch.ones(2, 5))
    )
    for b in range(2):
        torch.testing.assert_close(found[b, 0], mask[b, 0][K[b]][:, K[b]])
        torch.testing.assert_close(cos[b], rotary[0, K[b]])
    assert where.tolist() == K.tolist()
    assert narrowed(mask[:1], K, T).shape == (2, 1, 2, 2)
    assert (none, cache.shape, other.shape) == (None, (T,), (2, 5))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("pads", [0, 3])
def test_a_layer_attends_among_its_tokens_alone(arch: str, pads: int) -> None:
    """What the block gives: at K what attention over these tokens gives, by a mask that hides the others; else 0."""
    stack, given, seen = built(arch), batch(pads=pads), []
    stack.plugins["lemo"].step.on = True
    blocks = [stack.anatomy.site("block.attention", layer=layer).module for layer in (0, 1)]
    ours = eliminations(stack)
    handle = blocks[0].register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    with torch.no_grad():
        stack.model(**given)
        (x, _, _) = observe(stack, given["input_ids"], stack.plugins["lemo"].seen)["0"]
        seen[:] = seen[:1]
        K = informative(ours[0].predictor[0](x), given["attention_mask"].bool(), 2, 0.5)
        hidden = torch.zeros(2, 12, dtype=torch.bool).scatter(1, K, True)
        causal = torch.ones(12, 12, dtype=torch.bool).tril() & hidden[:, None, :]
        causal &= given["attention_mask"].bool()[:, None, :]
        stack.plugins["lemo"].step.on = False
        mask = torch.zeros(2, 1, 12, 12).masked_fill(~causal[:, None], torch.finfo(torch.float32).min)
        stack.model(given["input_ids"], attention_mask=mask, position_ids=torch.arange(12)[None])
    handle.remove()
    eliminated, dense = seen
    assert K.shape == (2, 6)
    assert bool((eliminated[~hidden] == 0).all())
    kept = hidden & given["attention_mask"].bool()
    torch.testing.assert_close(eliminated[kept], dense[kept], atol=1e-5, rtol=1e-4)


def test_all_kept_is_the_dense_step() -> None:
    losses, gradients = [], []
    for options in ({"keep": 1.0, "mlp_keep": 1.0}, {"keep": 0.5, "mlp_keep": 1.0}, None):
        torch.manual_seed(0)
        stack = (
            built(**options) if options else Stack(tiny("llama"), [Lora(rank=2, targets="attention.q,k,v,o")])
        )
        stack.model.train()
        torch.manual_seed(3)
        for p in stack.ledger.parameters("lora"):
            torch.nn.init.normal_(p.data, std=0.3)
        losses.append(float(stack.train_step(batch())))
        gradients.append([p.grad for p in stack.ledger.parameters("lora")])
    assert losses[0] == losses[2] != losses[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


@pytest.mark.parametrize("options", [{"keep": 1.0, "mlp_keep": 1.0}, {}])
def test_a_loss_in_segments_is_the_whole_loss(options: dict[str, float]) -> None:
    """Of the dense step, and of one that leaves tokens and neurons out; the head reads 5 tokens at most at once."""
    losses, gradients, rows = [], [], []
    for segment in (5, None):
        stack = built(**{"segment": segment, **options})
        torch.manual_seed(3)
        for p in stack.ledger.parameters("lora"):
            torch.nn.init.normal_(p.data, std=0.3)
        read: list[int] = []
        stack.model.lm_head.register_forward_hook(
            lambda _module, args, _y, read=read: read.append(args[0].shape[:-1].numel())
        )
        losses.append(float(stack.train_step(batch(pads=3))))
        gradients.append([p.grad for p in stack.ledger.parameters("lora")])
        rows.append(max(read))
    assert rows == [5, 24]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for ours, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_outside_a_step_every_token_attends() -> None:
    stack, given = built(), batch()
    with torch.no_grad(), stack.disabled():
        dense = stack.model(**given).logits
    seen = []
    handle = stack.model.register_forward_hook(lambda _module, _args, out: seen.append(out.logits.detach()))
    stack.train_step(given)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(stack.model(**given).logits, dense)  # in training mode
        stack.plugins["lemo"].step.on = True
        stack.model.eval()
        assert torch.equal(stack.model(**given).logits, dense)  # another plugin's reference inside a step
        stack.model.train()
        x = torch.randn(1, 12, 32)
        block = stack.model.model.layers[0].self_attn
        rotary = stack.model.model.rotary_emb(x, torch.arange(12)[None])
        alone = block(x, position_embeddings=rotary, attention_mask=None)[0]
        with stack.disabled():  # a part that somebody calls by itself
            assert torch.equal(alone, block(x, position_embeddings=rotary, attention_mask=None)[0])
    assert not torch.allclose(seen[0], dense, atol=1e-3)


def test_a_later_token_changes_an_earlier_output() -> None:
    """Importance looks at the whole text, so that a step is not causal."""
    stack, seen = built(layers=[0]), []
    stack.model.register_forward_hook(lambda _module, _args, out: seen.append(out.logits.detach()))
    first = batch()
    for token in range(5, 45):
        first["input_ids"][:, 9:] = token
        stack.train_step(first)
    moved = torch.stack([(logits - seen[0])[:, :9].abs().max() for logits in seen[1:]])
    assert moved.max() > 1e-3


def test_what_is_stored_falls_with_the_tokens_left_out() -> None:
    """Bytes that autograd keeps for the backward pass: linear in r, and what is saved grows with the text."""

    def stored(keep: float, T: int) -> int:
        stack, sizes = built(keep=keep, mlp_keep=1.0), {}
        weights = {p.untyped_storage().data_ptr() for p in stack.model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            stack.train_step(batch(T))
        return sum(sizes.values())

    at = {(keep, T): stored(keep, T) for keep in (0.25, 0.5, 0.75, 1.0) for T in (32, 64)}
    for T in (32, 64):
        low, high = at[0.5, T] - at[0.25, T], at[0.75, T] - at[0.5, T]
        # q, k, v and the heads' output of the tokens, in two texts and two layers
        assert low >= (T // 4) * (32 + 16 + 16 + 32) * 4 * 2 * 2
        assert high == pytest.approx(low, rel=0.1)
        assert at[0.5, T] < at[1.0, T]
    assert at[1.0, 64] - at[0.5, 64] > 1.8 * (at[1.0, 32] - at[0.5, 32])


# ------------------------------------------------------------------------------------------------------- the MLPs
def neurons(stack: Stack, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the second layer's MLP multiplies by W_d, and the norms that choose J; x [B, T, d]."""
    if hasattr(stack.model, "transformer"):
        mlp = stack.model.transformer.h[1].mlp
        z = mlp.act(mlp.c_fc(x))
        return z, z.flatten(0, 1).norm(dim=0)
    mlp = stack.model.model.layers[1].mlp
    g, u = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
    return g * u, g.flatten(0, 1).norm(dim=0) + u.flatten(0, 1).norm(dim=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_mlp_forward_and_backward(arch: str) -> None:
    """Forward to the bit as ever, backward as if the other neurons were not there."""
    stack = built(arch, mlp_keep=0.3)
    mlp = stack.anatomy.site("block.mlp", layer=1).module
    down = stack.anatomy.site("mlp.down", layer=1)
    x, G = torch.randn(2, 7, 32), torch.randn(2, 7, 32)

    def gradient(y: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(y, x, G)
        return found

    x.requires_grad_(True)
    dense = mlp(x)
    stack.plugins["lemo"].step.on = True
    ours = mlp(x)
    assert torch.equal(ours, dense)
    found, whole = gradient(ours), gradient(dense)
    stack.plugins["lemo"].step.on = False
    z, norms = neurons(stack, x)
    J = norms.topk(math.ceil(0.3 * down.in_features)).indices
    torch.testing.assert_close(found, gradient(z[..., J] @ down.weight[:, J].T), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-3)
    stack.plugins["lemo"].step.on = True
    stack.model.eval()
    torch.testing.assert_close(gradient(mlp(x)), whole)


def test_an_mlp_stores_its_neurons_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, thin = [], Wide.thin

    def noting(wide: Wide, J: torch.Tensor) -> None:
        thin(wide, J)
        kept.append((tuple(wide.x.shape), wide.x.untyped_storage().nbytes()))

    monkeypatch.setattr(Wide, "thin", noting)
    stack = built(mlp_keep=0.2)
    stack.train_step(batch(12))
    count = math.ceil(0.2 * stack.model.config.intermediate_size)
    # g before and after its function, and u, in each layer
    assert len(kept) == 6
    assert set(kept) == {((2, 12, count), 2 * 12 * count * 4)}


def test_checkpointing_gives_the_same_gradients_and_keeps_the_neurons() -> None:
    gradients, held = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        stack = built(mlp_keep=0.2)
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        handle = stack.model.register_forward_hook(
            lambda *_: held.append(sum(isinstance(found, Wide) for found in gc.get_objects()))
        )
        stack.train_step(batch())
        handle.remove()
        gradients.append([p.grad for p in stack.ledger.parameters("lora")])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-5)
    assert held[1] >= held[0] == 6


def test_a_step_with_thin_mlps() -> None:
    """The loss to the bit, other gradients; those of an adapter on the neurons are of J alone."""
    losses, gradients = [], []
    for share in (1.0, 0.2):
        torch.manual_seed(0)
        lemo = Lemo(**{"layers": [0, 1], "keep": 1.0, "mlp_keep": share, **SMALL})
        stack = Stack(tiny("llama"), [Lora(rank=2, targets="mlp.down"), lemo], tokenizer=tiny_tokenizer())
        prepare(stack)
        stack.model.train()
        torch.manual_seed(3)
        for p in stack.ledger.parameters("lora"):
            torch.nn.init.normal_(p.data, std=0.3)
        losses.append(float(stack.train_step(batch())))
        inputs = stack.model.config.intermediate_size
        gradients.append([p.grad for p in stack.ledger.parameters("lora") if p.shape[-1] == inputs])
    assert losses[0] == losses[1]
    for whole, thin in zip(*gradients, strict=True):
        assert int((whole != 0).any(0).sum()) == whole.shape[-1]
        assert int((thin != 0).any(0).sum()) == math.ceil(0.2 * thin.shape[-1])


def test_experts_are_refused() -> None:
    with pytest.raises(
        ArchitectureError, match="lemo: layer 0 of mixtral has no MLP with one set of neurons"
    ) as caught:
        Stack(tiny("mixtral"), [Lemo(layers=[0], **SMALL)])
    assert caught.value.hint == "mlp_keep=1 stores all of it"
    assert Stack(tiny("mixtral"), [Lemo(layers=[0], mlp_keep=1.0, **SMALL)])


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("layers", [[2], [0, 0], [-1], []])
def test_layers_that_are_not_there(layers: list[int]) -> None:
    with pytest.raises(PeftxError, match=r"lemo: layers .* of a model with 2"):
        Stack(tiny("llama"), [Lemo(layers=layers)])
    with pytest.raises(PeftxError, match=r"lemo: layers \[\] of a model with 2"):
        Stack(tiny("llama"), [Lemo()])  # no deeper half without the last


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": 1.1}, {"block": 0}, {"hidden": 0}, {"predictor_steps": 0}, {"segment": 0}],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(PeftxError, match=f"Lemo: {next(iter(options))}"):
        Lemo(**options)
    defaults = Lemo().config
    assert (defaults.keep, defaults.mlp_keep, defaults.block, defaults.hidden) == (0.4, 0.2, 64, 128)
    assert (defaults.predictor_steps, defaults.predictor_rate, defaults.segment) == (400, 2e-5, 2048)


def test_plugins_that_look_at_tokens_inside_attention() -> None:
    lemo, router = Lemo(layers=[0], **SMALL), RouterTuning(share=1)
    with pytest.raises(
        ConflictError, match="'router-tuning' stands around an attention that 'lemo' calls"
    ) as caught:
        Stack(tiny("llama"), [router, lemo])
    assert caught.value.hint == "put lemo before router-tuning"
    stack = Stack(tiny("llama"), [Lora(rank=2), lemo, router], tokenizer=tiny_tokenizer())
    assert len(stack.train(ROWS, steps=2).losses) == 2
    for order in ([Bita(), lemo], [lemo, Bita()]):
        with pytest.raises(ConflictError, match="'bita' computes attention by its own layout of tokens"):
            Stack(tiny("llama"), order)
    for order in ([PrefixlmVsCausalIcl(), lemo], [lemo, PrefixlmVsCausalIcl()]):
        with pytest.raises(ConflictError, match="'prefixlm-vs-causal-icl' tells in an attention which token"):
            Stack(tiny("llama"), order)


def test_an_edit_of_probabilities_that_tells_no_tokens() -> None:
    """LAE's prefix is in front of all of them, however many these are."""
    lae = Lae(tasks=[["a", "b"], ["c", "d"]], module="prefix")
    stack = Stack(tiny("llama"), [lae, Lemo(layers=[0], keep=0.5, **SMALL)], tokenizer=tiny_tokenizer())
    stack.train([{"text": "one two " * n, "label": "a" if n > 2 else "b"} for n in range(1, 5)], steps=2)


def test_an_mlp_that_is_computed_past_its_layers() -> None:
    with pytest.raises(ConflictError, match="'factorllm' computes an MLP past its layers") as error:
        Stack(tiny("llama"), [FactorLlm(), Lemo(layers=[0], **SMALL)])
    assert error.value.hint == "mlp_keep=1 for lemo"
    whole = {**SMALL, "layers": [0], "mlp_keep": 1}
    for order in ((FactorLlm(), Lemo(**whole)), (Lemo(**whole), FactorLlm())):
        stack = Stack(tiny("llama"), order, tokenizer=tiny_tokenizer())
        assert math.isfinite(stack.train(ROWS, steps=1, batch_size=2).losses[0][1])


def test_a_step_keeps_no_cache() -> None:
    stack, seen = built(), []
    stack.model.register_forward_hook(lambda _module, _args, out: seen.append(out.past_key_values))
    stack.train_step(batch())
    stack.model(**batch())
    assert seen[0] is None
    assert seen[1] is not None


def test_steps_that_cannot_be() -> None:
    stack = built()
    stack.model.eval()
    with pytest.raises(PeftxError, match="lemo: the model is in evaluation mode"):
        stack.train_step(batch())
    with pytest.raises(PeftxError, match="lemo: its predictors are not fitted yet"):
        Stack(tiny("llama"), [Lora(), Lemo(layers=[0], **SMALL)]).train_step(batch())


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("t5", r"lemo: t5 \(attention '.*'\) is no decoder whose attention takes any mask"),
        ("bert", r"lemo: bert \(attention '.*'\) is no decoder"),
        ("mamba", r"lemo: mamba \(attention '.*'\) is no decoder"),
    ],
)
def test_other_models(arch: str, match: str) -> None:
    with pytest.raises(ArchitectureError, match=match):
        Stack(tiny(arch), [Lemo(layers=[0])])
