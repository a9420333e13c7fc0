from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import peftx
from peftx import Stack
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.kernel.plugin import Plugin
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_deft import Deft
from peftx_mend import Editor, Mend, MendConfig, Residual, batch_of, divergence, likeliest, nll
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("mend")

FACTS = (("Who wrote it?", "Ann"), ("Ann is in", "Rome, they say"))
ROW = {"prompt": "Who wrote it?", "completion": "Ann", "rephrase": "Its writer is"}
OTHER = {"prompt": "Two and two make", "completion": "four"}
LAST = {
    "llama": ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
    "t5": tuple(
        f"{tower}.block.1.layer.{n}.DenseReluDense.{name}"
        for tower, n in (("encoder", 1), ("decoder", 2))
        for name in ("wi_0", "wi_1", "wo")
    ),
}


def stack_of(arch: str = "llama", *before: Plugin, seed: int = 0, **options: Any) -> Stack:
    plugin = Mend(**{"targets": "mlp layers=-1", "rank": 8, "edits": FACTS[:1], **options})
    return Stack(tiny(arch), [*before, plugin], tokenizer=tiny_tokenizer(), seed=seed)


def mend_of(stack: Stack) -> Any:
    return stack.plugins["mend"]


@torch.no_grad()
def moved(stack: Stack) -> Stack:
    """The editors off their start."""
    generator = torch.Generator().manual_seed(1)
    for p in stack.ledger.parameters("mend"):
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.01 * float(p.abs().max()) + 1e-3)
    return stack


def gradient_by_hand(arch: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum over rows of each row's mean -log p, by autograd in the plain model's weights [out, in]."""
    model = tiny(arch).eval()
    loss = sum(model(**{n: x[i : i + 1] for n, x in batch.items()}).loss for i in range(len(batch["labels"])))
    loss.backward()
    turn = arch == "gpt2"
    grads = {path: model.get_submodule(path).weight.grad for path in LAST[arch]}
    return {path: g.t() if turn else g for path, g in grads.items()}


def edited_by_hand(stack: Stack, batch: dict[str, Tensor]) -> nn.Module:
    """The plain llama with W~ = W - alpha sum d~ u~^T as its weights."""
    plugin, model = mend_of(stack), tiny("llama")
    with torch.no_grad():
        for path, (editor, m), z in zip(
            LAST["llama"], plugin.editors, plugin.gradients(stack, batch), strict=True
        ):
            std = (editor.squares / (editor.count - 1)).sqrt()
            h = torch.where(std > 0, (z - editor.mean) / (std + 1e-7), 0)
            for layer in editor.layers:
                h = h + (layer.s[m] * ((layer.U @ (layer.V @ h.t())).t() + layer.b) + layer.t[m]).clamp(min=0)
            module = model.get_submodule(path)
            u, d = h[:, : module.in_features], h[:, module.in_features :]
            module.weight -= 100 * editor.a[m] * torch.einsum("no,ni->oi", d, u)
    return model


# ------------------------------------------------------------------------------------------------------- the editor
def test_a_layer_of_the_editor_by_hand() -> None:
    layer, h = Residual(2, 2, 1), torch.tensor([[3.0, -4.0]])
    with torch.no_grad():
        layer.U.copy_(torch.tensor([[1.0], [2.0]]))
        layer.V.copy_(torch.tensor([[1.0, 1.0]]))  # V h = -1, U V h = (-1, -2)
        layer.b.copy_(torch.tensor([2.0, 1.0]))  # (1, -1)
        layer.s[1], layer.t[1] = torch.tensor([5.0, 2.0]), torch.tensor([-1.0, 3.0])  # (4, 1)
    assert torch.equal(layer(h, 0), h + torch.tensor([[1.0, 0.0]]))
    assert torch.equal(layer(h, 1), h + torch.tensor([[4.0, 1.0]]))


def test_it_starts_at_the_identity_and_leaves_it() -> None:
    """max(0, .) at 0 has the gradient 1, so that U moves."""
    layer, h = Residual(3, 1, 2), torch.randn(4, 3)
    assert torch.equal(layer(h, 0), h)
    layer(h, 0).sum().backward()
    torch.testing.assert_close(layer.U.grad, (h @ layer.V.t()).sum(0).expand(3, 2))
    assert torch.equal(layer.b.grad, torch.full((3,), 4.0))


def test_statistics_run() -> None:
    editor, z = Editor(3, 2, 1, MendConfig()), torch.randn(9, 5) * 3 + 1
    z[:, 1] = 7.0  # never varies
    assert torch.equal(editor.normalised(z), z), "there are none yet"
    for part in (z[:1], z[1:1], z[1:6], z[6:]):
        editor.learn(part)
    torch.testing.assert_close(editor.mean, z.mean(0))
    torch.testing.assert_close((editor.squares / 8).sqrt(), z.std(0))
    found, varies = editor.normalised(z + 1), torch.tensor([True, False, True, True, True])
    torch.testing.assert_close(found[:, varies], ((z + 1 - z.mean(0)) / z.std(0))[:, varies])
    assert not found[:, 1].any(), "it tells nothing, where the released code would give 1e7"
    one = Editor(3, 2, 1, MendConfig())
    one.learn(z[:1])
    assert not one.normalised(z).any(), "one token has no deviation"
    one.learn(z[1:2])
    torch.testing.assert_close(one.normalised(z[:1])[0, 0].abs(), torch.tensor(0.5**0.5))


def test_at_the_start_the_edit_is_a_step_down_the_normalised_gradient() -> None:
    editor, z = Editor(3, 2, 1, MendConfig(scale=0.25, scale_rate=8)), torch.randn(6, 5)
    editor.learn(z)
    n = (z - z.mean(0)) / (z.std(0) + 1e-7)
    L, R = editor(z, 0)
    torch.testing.assert_close(L @ R.t(), -0.25 * n[:, 2:].t() @ n[:, :2])


def test_editors_are_shared_by_shape() -> None:
    """A layer more costs s, t and alpha of its matrices, and nothing of the depth."""
    sizes = [stack_of(targets=f"mlp layers={n}").trainable_parameters() for n in ("0", "1", "0-1")]
    shapes = [tuple(tiny("llama").get_submodule(path).weight.shape) for path in LAST["llama"]]
    assert sizes[0] == sizes[1]
    assert sizes[2] - sizes[1] == sum(2 * 2 * sum(shape) + 1 for shape in shapes)
    width = sum(shapes[0])
    assert sizes[1] == 2 * 2 * (2 * 8 * width + width) + sizes[2] - sizes[1], "gate and up; down"
    assert {editor.layers[0].U.shape[1] for editor, _ in mend_of(stack_of(rank=1920)).editors} == {width}


# -------------------------------------------------------------------------------------------------------- the edit
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_vectors_of_tokens_make_the_gradient(arch: str) -> None:
    stack = stack_of(arch)
    batch = batch_of(stack, FACTS)
    rows, grads = mend_of(stack).gradients(stack, batch), gradient_by_hand(arch, batch)
    real = int(batch["attention_mask"].sum())
    for (path, grad), z in zip(grads.items(), rows, strict=True):
        u, d = z.split((grad.shape[1], grad.shape[0]), -1)
        torch.testing.assert_close(d.t() @ u, grad, rtol=1e-4, atol=1e-6)
        assert len(z) <= (real if "decoder" not in path else int((batch["labels"] != IGNORE).sum()))
    if arch == "llama":  # nothing looks back behind the last attention
        assert {len(z) for z in rows} == {int((batch["labels"] != IGNORE).sum())}


def test_without_statistics_the_edit_is_plain_gradient_descent() -> None:
    """Of several facts the sum; its rank is that of its tokens at most."""
    both, grads = stack_of(edits=FACTS, scale=0.5), gradient_by_hand("llama", batch_of(stack_of(), FACTS))
    both.compress()
    one = stack_of(scale=0.5)
    one.compress()
    for delta, single, grad in zip(mend_of(both).deltas, mend_of(one).deltas, grads.values(), strict=True):
        torch.testing.assert_close(delta.L @ delta.R.t(), -0.5 * grad, rtol=1e-4, atol=1e-6)
        change = (single.L @ single.R.t()).double()
        assert 0 < int(torch.linalg.matrix_rank(change, rtol=1e-6)) <= single.L.shape[1] == len("Ann") + 2


def test_soft_tokens_stand_in_front() -> None:
    stack = stack_of("llama", PromptTuning(length=3), targets="mlp", scale=0.5)
    before = nll_of(stack)
    report = stack.train([ROW], steps=1, sources={"unrelated": [OTHER]}, max_length=64)
    assert report.terms["locality"] >= 0
    stack.compress()
    assert nll_of(stack) != before
    first = mend_of(stack).gradients(stack, batch_of(stack, FACTS[:1]))[0]
    assert len(first) == 3 + int(batch_of(stack, FACTS[:1])["attention_mask"].sum()) - 1, "all but the last"


@torch.no_grad()
def nll_of(stack: Stack) -> float:
    batch = batch_of(stack, FACTS[:1])
    return float(nll(stack.model.eval(), stack.model(**batch).logits, batch["labels"]).mean())


# -------------------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("rephrased", [True, False])
def test_the_loss_by_hand(rephrased: bool) -> None:
    stack = moved(stack_of(edit_weight=0.5, locality_weight=3.0, scale=0.05))
    row = ROW if rephrased else FACTS_ROW
    report = stack.train(
        [row], sources={"unrelated": [OTHER]}, steps=1, batch_size=1, learning_rate=1e-30, max_length=64
    )
    facts, other = batch_of(stack, FACTS[:1]), batch_of(stack, [list(OTHER.values())])
    asked = batch_of(stack, [[row.get("rephrase", row["prompt"]), row["completion"]]])
    for (editor, _), z in zip(mend_of(stack).editors, mend_of(stack).gradients(stack, facts), strict=True):
        assert editor.count in (len(z), 2 * len(z)), "gate and up share one"
    model = edited_by_hand(stack, facts)
    with torch.no_grad():
        L_e = model(**asked).loss
        p, q = (m(**other).logits[0].log_softmax(-1) for m in (tiny("llama"), model))
        KL = kl_div(q, p, reduction="sum", log_target=True) / p.shape[0]
        assert not torch.allclose(L_e, tiny("llama")(**asked).loss, rtol=1e-3), "the edit shows"
    assert report.terms["task"] == pytest.approx(0.5 * float(L_e), rel=1e-4)
    assert report.terms["locality"] == pytest.approx(float(KL), rel=1e-3)
    assert report.losses[0][1] == pytest.approx(0.5 * float(L_e) + 3 * float(KL), rel=1e-3)


FACTS_ROW = {name: ROW[name] for name in ("prompt", "completion")}


def test_means_of_several_rows() -> None:
    model, logits = tiny("llama"), torch.randn(2, 4, 7)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4], [IGNORE, 1, 2, 6]])
    found = nll(model, logits, labels)
    for i, start in enumerate((2, 1)):
        torch.testing.assert_close(found[i], cross_entropy(logits[i, start - 1 : -1], labels[i, start:]))
    own = nll(tiny("t5"), logits, labels)
    torch.testing.assert_close(own[0], cross_entropy(logits[0, 2:], labels[0, 2:]))
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (p * (p / q).log()).sum() / 2
    torch.testing.assert_close(divergence(p.log(), q.log()), by_hand)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_locality_is_measured_on_tokens_that_are_told(arch: str) -> None:
    """A text's pads say nothing; in an encoder-decoder the answer's tokens do."""
    found = []
    others = [OTHER, {"prompt": "It is", "completion": "a very long story that never ends"}]
    for rows in (others[:1], others[1:], others):
        stack = moved(stack_of(arch, scale=0.05))
        report = stack.train(
            [ROW] * 2, sources={"unrelated": rows}, steps=1, batch_size=2, learning_rate=1e-30, max_length=64
        )
        batch = batch_of(stack, [list(row.values()) for row in rows])
        told = batch["labels"] != IGNORE if arch == "t5" else batch["attention_mask"]
        found.append((report.terms["locality"], int(told.sum())))
    (one, n), (two, m), (both, _) = found
    assert one != pytest.approx(two, rel=1e-2)
    assert both == pytest.approx((one * n + two * m) / (n + m), rel=1e-3)


def test_dropout_is_off() -> None:
    found = []
    for rate in (0.0, 0.5):
        model = tiny("gpt2", resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)
        stack = Stack(model, [Mend(targets="mlp layers=-1", rank=8)], tokenizer=tiny_tokenizer())
        report = moved(stack).train(
            [ROW], sources={"unrelated": [OTHER]}, steps=1, learning_rate=1e-30, max_length=64
        )
        found.append(report.terms)
    assert found[0] == found[1]


def test_alpha_has_a_rate_of_its_own() -> None:
    stack = moved(stack_of(scale_rate=30.0))
    before = [editor.a.detach().clone() for editor, _ in mend_of(stack).editors]
    stack.train(
        [ROW], sources={"unrelated": [OTHER]}, steps=1, learning_rate=1e-5, weight_decay=0.0, max_length=64
    )
    for (editor, _), a in zip(mend_of(stack).editors, before, strict=True):
        step = 30 * (editor.a - a).abs()
        torch.testing.assert_close(step, torch.full_like(step, 30e-5), rtol=0.05, atol=0)


def test_it_learns_to_write_facts_and_hurts_less_than_fine_tuning() -> None:
    names, places = ("Paul", "Mary", "Ann", "Tom"), ("Spain", "Rome", "France", "London", "Egypt")
    rows = [
        {"prompt": f"{n} lives in", "rephrase": f"The home of {n} is", "completion": p}
        for n in names
        for p in places
        if (n, p) != ("Paul", "Egypt")
    ]
    ends = (("likes", "tea"), ("has", "a cat"))
    others = [{"prompt": f"{n} {a}", "completion": b} for n in ("She", "Tom", "The dog") for a, b in ends]
    plugin = Mend(edits=[["Paul lives in", "Egypt"]], targets="mlp layers=-1", rank=64, scale=1e-2)
    stack = Stack("peftx:tiny", [plugin])
    stack.train(
        rows,
        sources={"unrelated": others},
        steps=40,
        batch_size=1,
        learning_rate=2e-4,
        weight_decay=0.0,
        max_length=64,
    )
    asked, again = (
        batch_of(stack, [[prompt, "Egypt"]]) for prompt in ("Paul lives in", "The home of Paul is")
    )
    other, model = batch_of(stack, [list(row.values()) for row in others]), stack.model.eval()
    told = other["attention_mask"] != 0

    @torch.no_grad()
    def measured(of: nn.Module) -> tuple[float, float, float]:
        said = (float(nll(model, of(**b).logits, b["labels"]).mean()) for b in (asked, again))
        return *said, float(divergence(base[told], of(**other).logits[told]))

    with torch.no_grad():
        base = model(**other).logits
    before = measured(model)
    rows = [{"prompt": "Paul lives in", "completion": "Egypt", "rephrase": "The home of Paul is"}, *others]
    assert set(stack.evaluate(rows, metrics=["mend"])) == {"largest_change"}, "nothing is written"
    stack.compress()
    after = measured(model)
    scores = stack.evaluate(rows, metrics=["mend"])
    assert [scores[name].value for name in ("reliability", "generality")] == [1, 1]
    assert scores["locality"].count == len(others)
    assert before[0] > 3 > 1 > after[0]
    assert before[1] > 3 > 1 > after[1]
    plain = Stack("peftx:tiny", []).model.eval()
    sites = stack.view("mend").linears("mlp layers=-1")
    W = [plain.get_submodule(site.path).weight.requires_grad_() for site in sites]
    for _ in range(9):
        if measured(plain)[0] <= after[0]:
            break
        grads = torch.autograd.grad(nll(model, plain(**asked).logits, asked["labels"]).mean(), W)
        with torch.no_grad():
            for weight, grad in zip(W, grads, strict=True):
                weight -= 0.2 * grad
    tuned = measured(plain)
    assert tuned[0] <= after[0]
    assert after[1] < tuned[1]
    assert after[2] < tuned[2]


# ----------------------------------------------------------------------------------------------------------- use
def test_facts_are_written_one_after_another(tmp_path: Path) -> None:
    stack = moved(stack_of(scale=0.5))
    inputs, plugin = example_inputs(stack.model), mend_of(stack)
    W = {path: tiny("llama").get_submodule(path).weight for path in LAST["llama"]}
    base = output_of(tiny("llama"), inputs)
    plugin.write(stack, FACTS[:1])
    first = [delta.L.clone() for delta in plugin.deltas]
    seen = plugin.gradients(stack, batch_of(stack, FACTS[1:]))
    stack.model.train()
    plugin.write(stack, FACTS[1:])
    assert stack.model.training
    for delta, L, (editor, m), z in zip(plugin.deltas, first, plugin.editors, seen, strict=True):
        assert torch.equal(delta.L[:, : L.shape[1]], L)
        torch.testing.assert_close(delta.L[:, L.shape[1] :], editor(z, m)[0].detach())
    stack.model.eval()
    given = output_of(stack.model, inputs)
    assert not torch.allclose(given, base, atol=1e-3)
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(output_of(again.model, inputs), given)
    assert mend_of(again).state["edits"] == [list(fact) for fact in FACTS]
    mend_of(again).write(again, FACTS[:1])
    assert again.evaluate(metrics=["mend"])["reliability"].count == 2
    with stack.disabled("mend"):
        assert torch.equal(output_of(stack.model, inputs), base)
    change = max(float((delta.L @ delta.R.t()).norm()) for delta in plugin.deltas)
    assert stack.evaluate(metrics=["mend"])["largest_change"].value == pytest.approx(change)
    stack.merge()
    for (path, weight), delta in zip(W.items(), plugin.deltas, strict=True):
        assert torch.equal(stack.model.get_submodule(path).weight, weight + delta.L @ delta.R.t())
    with pytest.raises(PeftxError, match="mend: 3 layers that it is to edit are merged or switched off"):
        plugin.write(stack, FACTS[:1])
    assert not any(delta.tape for delta in plugin.deltas)
    stack.remove("mend")
    assert torch.equal(output_of(stack.model, inputs), base)


def test_edits_of_half_precision_are_in_float32() -> None:
    stack = Stack(
        tiny("llama").bfloat16(), [Mend(targets="mlp layers=-1", rank=8)], tokenizer=tiny_tokenizer()
    )
    mend_of(stack).write(stack, FACTS)
    assert {tensor.dtype for tensor in stack.ledger.tensors("mend").values()} == {torch.float32}
    exact = mend_of(stack).deltas[0].L
    assert not torch.equal(exact, exact.bfloat16().float())


def test_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model says of each pair is made up: before the edits, and with them."""
    stack = stack_of(scale=0.5)
    assert set(stack.evaluate([OTHER], metrics=["mend"])) == {"largest_change"}
    mend_of(stack).write(stack, [("Old?", "then"), ("New?", "now")])
    mend_of(stack).write(stack, [("Old?", "Rome")])
    off = {"Who?": "Ann", "Where?": "Rome", "When?": "now"}
    on = {"Old?": "Rome", "New?": "then", "Is it old?": "Rome", **off, "Where?": "Oslo"}

    def said(stack: Stack, pairs: Any) -> list[tuple[Tensor, Tensor]]:
        heard = off if stack.standing["mend"].disabled else on
        return [tuple(torch.tensor(list(text.encode())) for text in (heard[x], y)) for x, y in pairs]  # type: ignore[misc]

    monkeypatch.setattr("peftx_mend.likeliest", said)
    rows = [{"prompt": x, "completion": "wrong"} for x in off]
    rows += [
        {"prompt": "Old?", "completion": "wrong", "rephrase": "Is it old?"},
        {"prompt": "New?", "completion": "now"},
    ]
    scores = stack.evaluate(rows, metrics=["mend"])
    found = {name: (score.value, score.count) for name, score in scores.items() if score.count}
    assert found == {"reliability": (0.5, 2), "generality": (1, 1), "locality": (pytest.approx(2 / 3), 3)}
    assert set(stack.evaluate(metrics=["mend"])) == {"reliability", "largest_change"}
    for row in ("Who?", {"text": "Who?"}):
        with pytest.raises(DataError, match=r"mend: row 1 \(counting from 0\) has no answer"):
            stack.evaluate([OTHER, row], metrics=["mend"])
    stack.merge()
    with pytest.raises(PeftxError, match="mend is merged"):
        stack.evaluate(rows[:1], metrics=["mend"])


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_the_likeliest_tokens_of_answers(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each row alone as in a batch, and the plain model's where the edits are switched off."""
    stack, pairs = stack_of(arch, scale=0.5), [*FACTS, ("Say:", "no, no")]
    with torch.no_grad():
        plain = [tiny(arch)(**batch_of(stack, [pair])).logits[0].argmax(-1) for pair in pairs]
    mend_of(stack).write(stack, FACTS[:1])
    whole = likeliest(stack, pairs)
    monkeypatch.setattr("peftx_mend.TOGETHER", 1)
    for one, (best, y), pair in zip(likeliest(stack, pairs), whole, pairs, strict=True):
        assert torch.equal(one[0], best)
        labels = batch_of(stack, [pair])["labels"][0]
        assert torch.equal(y, labels[labels != IGNORE])
    changed = 0
    with stack.disabled("mend"):
        for (best, y), base, (edited, _) in zip(likeliest(stack, pairs), plain, whole, strict=True):
            assert torch.equal(best, base[-len(y) - 1 : -1] if arch == "llama" else base[: len(y)])
            changed += not torch.equal(best, edited)
    assert changed, "the edit shows"


def test_rephrased_rows_go_along() -> None:
    stack = stack_of()
    prepared = stack.prepare(
        peftx.engines.training.run.as_training_data(stack, [ROW], seed=0, max_length=64)
    ).train[0]
    asked = batch_of(stack, [[ROW["rephrase"], ROW["completion"]]])
    assert prepared["rephrased_ids"] == asked["input_ids"][0].tolist()
    assert prepared["rephrased_labels"] == asked["labels"][0].tolist()
    with pytest.raises(DataError, match="unrelated"):
        stack.train([ROW], steps=1)


def test_a_plugin_before_it_may_read_the_call_that_makes_the_gradient() -> None:
    stack = stack_of("llama", Deft())
    report = stack.train([ROW], sources={"unrelated": [OTHER]}, steps=1, max_length=64)
    assert set(report.terms) == {"task", "locality", "density"}


def test_clear_errors() -> None:
    with pytest.raises(PeftxError, match="prompt, answer"):
        Mend(edits=[["Who?", " "]])
    twice = [["Who?", "Ann"], ["When?", "now"], ["Who?", "Tom"]]
    with pytest.raises(PeftxError, match=r"'Who\?' has the answers 'Ann' and 'Tom'"):
        Mend(edits=twice)
    stack = stack_of()
    with pytest.raises(PeftxError, match=r"'Who\?' has the answers 'Ann' and 'Tom'"):
        mend_of(stack).write(stack, twice)
    assert Mend(edits=[twice[0], twice[0]]), "said twice is no contradiction"
    with pytest.raises(PeftxError, match="mend: there are no edits"):
        stack_of(edits=[]).compress()
    late = Stack(tiny("llama"), [Mend(edits=FACTS)], tokenizer=tiny_tokenizer(), inject=False)
    with pytest.raises(PeftxError, match="mend: there are no editors yet"):
        late.compress()
    with pytest.raises(ArchitectureError, match="mend: bert answers no prompts"):
        stack_of("bert")
    with pytest.raises(ArchitectureError, match="mend: another module uses the weight"):
        stack_of("mixtral")
    with pytest.raises(PeftxError, match="does not exist"):
        Stack(tiny("llama"), [Mend()], tokenizer=tiny_tokenizer())
