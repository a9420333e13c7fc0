from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import peftx
from peftx import Stack
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, ConflictError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.evaluation import evaluating
from peftx_deft import Deft
from peftx_lora import Lora
from peftx_metaprompter import Metaprompter, prompts, rep_verb

test_conformance = conformance("metaprompter")

ID = "metaprompter"
CLS, SEP = 1, 2
SUPPORT = {
    "bad": ["so dull", "poor", "a long film"],
    "fair": ["so so", "it is"],
    "great": ["fine", "so good!"],
}
TEXTS = ["a fine film", "dull", "so so it is", "good"]
OPTIONS: dict[str, Any] = {
    "support": SUPPORT, "mask": "~", "template": "is [MASK]!", "pool": 3, "length": 2, "shots": 1, "queries": 2,
    "inner_steps": 2,
}  # fmt: skip
LABELS = ["sun", "sea", "wood", "hill"]
ROWS = [{"text": f"{label} {n}", "label": label} for n in range(4) for label in LABELS]


def stack_of(*others: Any, **options: Any) -> tuple[Stack, Metaprompter]:
    """With a tokenizer that frames texts, as BERT's does."""
    plugin, tokenizer = Metaprompter(**OPTIONS | options), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="c $A s", special_tokens=[("c", CLS), ("s", SEP)]
    )
    return Stack(tiny("bert"), [*others, plugin], tokenizer=tokenizer), plugin


def pool_of(plugin: Metaprompter) -> list[Tensor]:
    return [plugin.pool.K.detach(), plugin.pool.V.detach()]


def support_of(stack: Stack, plugin: Metaprompter) -> tuple[list[list[int]], Tensor, list[list[int]]]:
    rows = plugin.texts.rows(stack, [text for texts in SUPPORT.values() for text in texts])
    target = torch.tensor([y for y, texts in enumerate(SUPPORT.values()) for _ in texts])
    return rows, target, plugin.words_of(stack, list(SUPPORT))


def scores(stack: Stack, texts: list[str] = TEXTS) -> Tensor:
    with evaluating(stack.model):
        return stack.plugins[ID].classify(stack, texts)[1]


def by_hand(stack: Stack, plugin: Metaprompter, ids: list[int], pool: list[Tensor]) -> tuple[Tensor, Tensor]:
    """h and logits at the mask of one text, [d] and [V], and nothing padded."""
    model, tokenizer = tiny("bert").eval(), stack.tokenizer
    model.load_state_dict(
        {k: v for k, v in stack.model.state_dict().items() if "peftx" not in k}, strict=False
    )
    t = [tokenizer(x, add_special_tokens=False).input_ids for x in ("is ", "~", "!")]
    before, behind = [*ids[:-1], *t[0]], [*t[1], *t[2], SEP]
    E = model.get_input_embeddings()
    with torch.no_grad():
        q = model(torch.tensor([before + behind]), output_hidden_states=True).hidden_states[-1][
            0, len(before)
        ]
        a = torch.softmax(pool[0] @ q / 32**0.5, 0)
        theta = sum(a[i] * pool[1][i] for i in range(len(a)))
        text, rest = E(torch.tensor(ids[:-1])), E(torch.tensor([*t[0], *behind]))
        out = model(inputs_embeds=torch.cat((text, theta, rest))[None], output_hidden_states=True)
    at = len(before) + 2
    return out.hidden_states[-1][0, at], out.logits[0, at]


# -- the equations -----------------------------------------------------------------------------------------------------


def test_prompts_by_hand() -> None:
    """d = 4: products of 4 ln 3 and 0 make logits ln 9 and 0, so attention of 0.9 and 0.1."""
    K = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    V = torch.stack((torch.ones(3, 4), torch.full((3, 4), 11.0)))
    q = torch.tensor([[4 * torch.tensor(3.0).log(), 0, 0, 0]])
    assert torch.allclose(prompts(q, K, V), torch.full((1, 3, 4), 2.0))


def test_a_pool_of_one_gives_all_texts_one_prompt() -> None:
    torch.manual_seed(0)
    V = torch.randn(1, 3, 4)
    assert torch.allclose(prompts(torch.randn(5, 4), torch.randn(1, 4), V), V.expand(5, -1, -1))


def test_rep_verb_by_hand() -> None:
    """Centred support states (1, 0), (-1, 0); a query at a right angle to both, and one on the side of the first."""
    h = torch.tensor([[3.0, 5.0], [1.0, 5.0], [2.0, 9.0], [7.0, 5.0]])
    p = rep_verb(h, torch.tensor([0, 1]), 2.0)
    sure = torch.tensor([2.0, -2.0]).softmax(0)
    assert torch.allclose(p, torch.stack((sure, sure.flip(0), torch.tensor([0.5, 0.5]), sure)))


def test_rep_verb_is_a_distribution_that_neither_scale_nor_shift_changes() -> None:
    torch.manual_seed(0)
    h, target = torch.randn(9, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    p = rep_verb(h, target, 10.0)
    assert torch.allclose(p.sum(1), torch.ones(9))
    assert torch.allclose(rep_verb(5 * h, target, 10.0), p, atol=1e-5)
    assert torch.allclose(rep_verb(h + torch.randn(6), target, 10.0), p, atol=1e-5)
    centred = h - h[:6].mean(0)
    v = [(centred[y] + centred[y + 3]) / 2 for y in range(3)]
    cos = torch.stack([F.cosine_similarity(centred, x[None]) for x in v], 1)
    assert torch.allclose(p, (10 * cos).softmax(1), atol=1e-6)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_classes_by_hand(mix: float) -> None:
    """Without descent: one text at a time, at the places where text, prompt and template stand."""
    words = {"great": ["good", "fine"]}
    stack, plugin = stack_of(mix=mix, inner_steps=0, words=words)
    support, target, ids = support_of(stack, plugin)
    rows = support + plugin.texts.rows(stack, TEXTS)
    found = [by_hand(stack, plugin, row, pool_of(plugin)) for row in rows]
    h, logits = (torch.stack(each) for each in zip(*found, strict=True))
    tokens = [list("bad"), list("fair"), list("goodfine")]
    mean = [
        logits[:, [stack.tokenizer(c, add_special_tokens=False).input_ids[0] for c in own]].mean(1)
        for own in tokens
    ]
    hand = torch.stack(mean, 1).softmax(1)
    expected = ((1 - mix) * hand + mix * rep_verb(h, target, 10.0)).log()[len(support) :]
    assert torch.allclose(scores(stack), expected, atol=1e-5)
    assert [len(own) for own in ids] == [3, 4, 8]


# -- episodes ----------------------------------------------------------------------------------------------------------


def test_descent_is_gradient_descent_from_the_pool() -> None:
    stack, plugin = stack_of(inner_rate=0.3)
    rows, target, words = support_of(stack, plugin)
    stack.model.eval()
    batch, q = plugin.look(stack, rows)
    pool = pool_of(plugin)
    for _ in range(2):
        pool = [x.clone().requires_grad_() for x in pool]
        log_p, _ = plugin.log_p(stack, batch, q, target, words, pool)
        loss = -log_p[torch.arange(len(target)), target].mean()
        loss.backward()
        pool = [(x - 0.3 * x.grad).detach() for x in pool]
    before = [x.clone() for x in pool_of(plugin)]
    for mine, theirs, old in zip(plugin.descend(stack, batch, q, target, words), pool, before, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
        assert not torch.equal(mine, old)
    assert all(torch.equal(x, old) for x, old in zip(pool_of(plugin), before, strict=True))


def test_what_is_classified_descends_on_its_support() -> None:
    stack, plugin = stack_of(inner_rate=0.3)
    rows, target, words = support_of(stack, plugin)
    stack.model.eval()
    pool = plugin.descend(stack, *plugin.look(stack, rows), target, words)
    with torch.no_grad():
        plugin.pool.K.copy_(pool[0])
        plugin.pool.V.copy_(pool[1])
    plugin.config = plugin.config.model_copy(update={"inner_steps": 0})
    expected = scores(stack)
    assert torch.allclose(scores(stack_of(inner_rate=0.3)[0]), expected, atol=1e-5)


def test_texts_do_not_see_each_other() -> None:
    """More than a batch of them, too."""
    stack, _ = stack_of()
    many = [f"text {n} " * (n % 4 + 1) for n in range(40)]
    both = scores(stack, many)
    for i in (0, 31, 32, 39):
        assert torch.allclose(both[i], scores(stack, many[i : i + 1])[0], atol=1e-5)


def test_a_step_takes_the_gradient_at_the_adapted_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of(inner_rate=0.3)
    data = stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=64))
    torch.manual_seed(5)
    names, support, queries = plugin.episode()
    monkeypatch.setattr(plugin, "episode", lambda: (names, support, queries))
    stack.model.eval()
    target = torch.tensor([y for _, y in support + queries])
    n, words = len(support), plugin.words_of(stack, names)
    batch, q = plugin.look(stack, [ids for ids, _ in support + queries])
    pool = [
        x.requires_grad_()
        for x in plugin.descend(stack, *plugin.look(stack, [i for i, _ in support]), target[:n], words)
    ]
    log_p, _ = plugin.log_p(stack, batch, q, target[:n], words, pool)
    expected = F.nll_loss(log_p[n:], target[n:])
    expected.backward()
    rows = [{k: data.train[0][k] for k in ("input_ids", "labels", "class_index")}]
    given = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    loss = stack.train_step(given)
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip((plugin.pool.K, plugin.pool.V), pool, strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
        assert theirs.grad.abs().max() > 1e-6


def test_an_episode_is_of_so_many_classes_and_texts() -> None:
    stack, plugin = stack_of(ways=3, shots=2, queries=1)
    stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=64))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        names, support, queries = plugin.episode()
        seen.add(tuple(names))
        assert len({*names}) == 3
        assert [y for _, y in support] == [0, 0, 1, 1, 2, 2]
        assert [y for _, y in queries] == [0, 1, 2]
        drawn = [tuple(ids) for ids, _ in support + queries]
        assert len({*drawn}) == 9
        for ids, y in support + queries:
            assert ids in plugin.rows[names[y]]
            assert stack.tokenizer.decode(ids[1:-1]).startswith(names[y])
    assert len(seen) > 1


def test_the_pool_alone_trains() -> None:
    stack, plugin = stack_of(pool=4, length=3)
    assert stack.trainable_parameters() == 4 * 32 * (1 + 3)
    before = {name: x.clone() for name, x in stack.model.state_dict().items()}
    stack.train(ROWS, steps=3, learning_rate=1e-2)
    changed = {name for name, x in stack.model.state_dict().items() if not torch.equal(x, before[name])}
    assert len(changed) == 2  # K and V
    with evaluating(stack.model):
        old = {name: x.clone() for name, x in stack.model.state_dict().items()}
        plugin.classify(stack, TEXTS)
    assert all(torch.equal(x, old[name]) for name, x in stack.model.state_dict().items())


def test_the_query_is_the_frozen_models() -> None:
    """An adapter beside it moves states of the prompted pass, and no q."""
    lora = Lora(rank=2)
    stack, plugin = stack_of(lora)
    rows = plugin.texts.rows(stack, TEXTS)
    before, q = scores(stack), plugin.look(stack, rows)[1]
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.add_(0.3)
    assert torch.equal(plugin.look(stack, rows)[1], q)
    assert not torch.allclose(scores(stack), before, atol=1e-3)


def test_a_run_learns_to_tell_classes_apart() -> None:
    stack, _ = stack_of(ways=2, queries=3, pool=2)
    report = stack.train(ROWS, steps=60, batch_size=1, learning_rate=3e-2)
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


def test_bundles_hold_the_pool(tmp_path: Path) -> None:
    stack, _ = stack_of()
    stack.train(ROWS, steps=2, learning_rate=1e-2)
    again = peftx.load(stack.save(tmp_path / "b"), model=tiny("bert"))
    assert torch.equal(scores(again), scores(stack))
    assert stack.classify(TEXTS) == [list(SUPPORT)[i] for i in scores(stack).argmax(1).tolist()]


def test_the_pool_of_a_model_of_half_precision_is_float32() -> None:
    plugin = Metaprompter(**OPTIONS)
    stack = Stack(tiny("bert").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=1)
    assert {x.dtype for x in pool_of(plugin)} == {torch.float32}
    assert scores(stack).isfinite().all()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ArchitectureError, match="fills in no masks"):
        Stack(tiny("gpt2"), [Metaprompter(**OPTIONS)], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match="None is no token that masks"):
        stack_of(mask=None)
    with pytest.raises(PeftxError, match="'~~' is no token that masks"):
        stack_of(mask="~~")
    with pytest.raises(PeftxError, match=r"it holds \[MASK\], once"):
        stack_of(template="is it")
    with pytest.raises(PeftxError, match="a class without texts"):
        stack_of(support={"a": ["b"], "c": []})
    with pytest.raises(PeftxError, match="the class 'bad' has no words"):
        scores(stack_of(words={"bad": []})[0])
    with pytest.raises(PeftxError, match="it knows no classes"):
        stack_of(support={})[0].classify(TEXTS)
    for others in ([Deft()], [Lora(rank=2), Deft()]):
        with pytest.raises(ConflictError, match=r"runs episodes of its own.* and 'deft' measures"):
            stack_of(*others)
    stack, plugin = stack_of()
    with pytest.raises(PeftxError, match="no rows to draw an episode of"):
        plugin.episode()
    with pytest.raises(DataError, match="these have fewer rows: sea, wood, hill"):
        stack.train(ROWS[:5], steps=1)
    with pytest.raises(DataError, match="of 1 classes these have fewer rows: none"):
        stack.train([row for row in ROWS if row["label"] == "sea"], steps=1)
