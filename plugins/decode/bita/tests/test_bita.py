"""BiTA: masks see the prefix and the text before them, tokens see neither; drafts are what they say; the text stays."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from peftx import Generation, Stack, TrainingData
from peftx.engines.data import IGNORE
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.decoding import speculative_generate
from peftx.toolkits.decoding.text import generate
from peftx_bita import MASK, Bita, BitaConfig, MaskDrafter, Prefix, draft, layout, mask_loss, prompt_of, up_to
from peftx_lora import Lora

test_conformance = conformance("bita")

TEXT = [11, 7, 30, 41, 5, 19, 23, 60]
GROUP = [MASK, MASK + 1, MASK + 2]


def built(arch: str = "llama", **options: int) -> Stack:
    torch.manual_seed(0)
    sizes = {"n_positions": 256} if arch == "gpt2" else {"max_position_embeddings": 256}
    return Stack(tiny(arch, **sizes), [Bita(**options)], tokenizer=tiny_tokenizer())


def prepared(stack: Stack, prompts: list[str], most: int) -> TrainingData:
    rows = Dataset.from_list([{"prompt": prompt, "completion": " unread"} for prompt in prompts])
    data = TrainingData(
        train=rows, eval=None, seed=0, format="prompt-completion", tokenizer=stack.tokenizer, max_length=most
    )
    return stack.prepare(data)


def request(stack: Stack, ids: list[int], new: int) -> Generation:
    config = stack.model.generation_config.to_dict() | {"max_new_tokens": new, "eos_token_id": None}
    return Generation(
        model=stack.model,
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        generation_config=type(stack.model.generation_config)(**config),
    )


def plain(stack: Stack, ids: list[int], new: int) -> torch.Tensor:
    with torch.no_grad(), stack.disabled():
        return request(stack, ids, new).run_default()


def said(stack: Stack, ids: list[int]) -> torch.Tensor:
    """Logits of everything, with the group of masks behind `ids` alone in its row."""
    with torch.no_grad():
        return stack.model(torch.tensor([[*ids, *GROUP]])).logits[0]


# ------------------------------------------------------------------------------------------------- what masks see
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_attention_by_hand(kind: str) -> None:
    """One head: a token weighs the keys before it, a mask those and the prefix."""
    stack = built()
    call, k = stack.model.model, torch.tensor([[0, 0, 1]])
    call.batch = {"bita": k}
    edit = Prefix(call, "bita", (1, 2, 4), (1, 2, 4))
    q, key, value = torch.randn(3, 1, 1, 3, 4)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    mask = {
        "none": None, "boolean": causal, "additive": torch.zeros(1, 1, 3, 3).masked_fill(~causal, -1e30)
    }[kind]  # fmt: skip

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(m.shape).masked_fill(~m, -math.inf) if m.dtype == torch.bool else m
        return ((q @ k.transpose(2, 3) * 0.5 + bias).softmax(-1) @ v).transpose(1, 2)

    found = edit.replace(q, key, value, mask, 0.5, attend)[0, :, 0]
    for row in range(3):
        K, V = key[0, 0, : row + 1], value[0, 0, : row + 1]
        if row == 2:
            K, V = torch.cat((edit.K[0], K)), torch.cat((edit.V[0], V))
        torch.testing.assert_close(found[row], (q[0, 0, row] @ K.T * 0.5).softmax(-1) @ V)
    call.batch = {}
    assert edit.replace(q, key, value, mask, 0.5, lambda *given: given)[1] is key


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral"])
def test_tokens_see_neither_prefix_nor_masks(arch: str) -> None:
    stack = built(arch)
    with torch.no_grad():
        base = stack.model(torch.tensor([TEXT])).logits[0]
        with stack.disabled():
            assert torch.equal(stack.model(torch.tensor([TEXT])).logits[0], base)
    torch.testing.assert_close(said(stack, TEXT)[: len(TEXT)], base, atol=1e-5, rtol=0)


def test_masks_see_prefix_text_and_earlier_masks() -> None:
    stack = built()
    before = said(stack, TEXT)
    edits = [m for m in stack.model.modules() if isinstance(m, Prefix)]
    assert len(edits) == stack.model.config.num_hidden_layers
    for edit in edits:
        for p in (edit.K, edit.V):
            kept = p.detach().clone()
            with torch.no_grad():
                p[:, 1] += 1.0
                assert (said(stack, TEXT) - before)[len(TEXT) :].abs().amax(1).min() > 1e-4
                p.copy_(kept)
    changed = said(stack, [TEXT[0] + 1, *TEXT[1:]])
    assert (changed - before)[len(TEXT) :].abs().amax(1).min() > 1e-4
    E = next(p for name, p in stack.model.named_parameters() if name.endswith(".E"))
    with torch.no_grad():
        E[1] += 1.0
    moved = (said(stack, TEXT) - before)[len(TEXT) :].abs().amax(1)
    assert moved[0] < 1e-6  # of m_1, before m_2
    assert moved[1:].min() > 1e-4


def test_trained_numbers() -> None:
    stack = built(prefix=5, masks=2)
    config = stack.model.config
    d_kv = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert d_kv < config.hidden_size  # shared keys
    assert stack.trainable_parameters() == 5 * 2 * config.num_hidden_layers * d_kv + 2 * config.hidden_size
    defaults = Bita().config
    assert (defaults.prefix, defaults.masks, defaults.candidates, defaults.groups) == (16, 3, 5, 64)


# ------------------------------------------------------------------------------------------------------- training
def batch() -> dict[str, torch.Tensor]:
    """Prompts of 3 and 2 tokens, answers of 5 and 4, two pads."""
    return {
        "input_ids": torch.tensor([TEXT, [*TEXT[:6], 0, 0]]),
        "attention_mask": torch.tensor([[1] * 8, [1] * 6 + [0] * 2]),
        "labels": torch.tensor([[IGNORE] * 3 + TEXT[3:], [IGNORE] * 2 + TEXT[2:6] + [IGNORE] * 2]),
    }


@pytest.mark.parametrize("groups", [64, 2])
@pytest.mark.parametrize("first", [0.0, 0.99])
def test_layout_by_hand(groups: int, first: float) -> None:
    """Each text's groups begin where `first` says, the last of them has one t_(i+2) left to learn."""
    given, M, T = batch(), 3, 8
    rows, learned = layout(given, M, groups, torch.float32, torch.tensor([first, first]))
    G = min(groups, 4)  # the longest answer has 5 tokens
    assert rows["input_ids"].shape == (2, T + G * M)
    assert rows["position_ids"].max() < T  # a text may fill the model's positions
    for b, (prompt, length) in enumerate(((3, 8), (2, 6))):
        usable = length - prompt - 1
        start = prompt - 1 + (max(usable - G, 0) if first else 0)
        ids, mask = rows["input_ids"][b].tolist(), rows["attention_mask"][b, 0]
        assert ids == given["input_ids"][b].tolist() + GROUP * G
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
        assert torch.equal(mask[:T, :T] == 0, torch.ones(T, T, dtype=torch.bool).tril())
        assert bool((mask[:T, T:] < 0).all())
        assert rows["position_ids"][b, :T].tolist() == list(range(T))
        for g in range(G):
            for k in range(1, M + 1):
                at, i = g * M + k - 1, start + g
                sees = (mask[T + at] == 0).nonzero()[:, 0].tolist()
                assert sees == [*range(i + 1), *range(T + g * M, T + g * M + k)]
                follows = i + 1 + k
                assert learned[b, at] == (given["input_ids"][b, follows] if follows < length else IGNORE)
                if follows < length:
                    assert rows["position_ids"][b, T + at] == i + k


def test_packed_groups_are_groups_alone() -> None:
    stack = built()
    rows, learned = layout(batch(), 3, 64, torch.float32, torch.zeros(2))
    with torch.no_grad():
        packed = stack.model(**rows).logits
    for b, prompt in enumerate((3, 2)):
        for n in (learned[b].view(-1, 3)[:, 0] != IGNORE).nonzero()[:, 0].tolist():
            i = prompt - 1 + n
            alone = said(stack, TEXT[: i + 1])
            kept = learned[b].view(-1, 3)[n] != IGNORE
            found = packed[b, 8 + 3 * n : 8 + 3 * n + 3]
            torch.testing.assert_close(found[kept], alone[i + 1 :][kept], atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_texts() -> None:
    logits = torch.randn(2, 3, 7)
    learned = torch.tensor([[1, 2, 3], [4, IGNORE, IGNORE]])
    p = logits.softmax(-1)
    by_hand = (-(p[0, 0, 1] * p[0, 1, 2] * p[0, 2, 3]).log() / 3 - p[1, 0, 4].log()) / 2
    torch.testing.assert_close(mask_loss(logits, learned), by_hand)
    assert mask_loss(logits, torch.full((2, 3), IGNORE)) == 0  # answers of one token


def test_first_group_is_drawn_anew() -> None:
    """One group a text: what a step trains depends on where it stands, and that on the seed."""
    stack = built(groups=1)
    (parameter, *_), losses = stack.ledger.parameters("bita"), set()
    for seed in range(8):
        torch.manual_seed(seed)
        parameter.grad = None
        losses.add(round(float(stack.train_step({n: x[:1] for n, x in batch().items()})), 5))
    assert 1 < len(losses) <= 4
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stack.ledger.parameters("bita"))


def test_rows_become_the_models_own_answers() -> None:
    stack, prompts = built(answer_tokens=9), ["to be or not to be or not", "ab ab", "x"] * 6  # two batches
    data, tokenizer = prepared(stack, prompts, 24), stack.tokenizer
    assert data.format == "tokenized"
    assert data.eval is None
    for row, text in zip(data.train, prompts, strict=True):
        prompt = tokenizer(text)["input_ids"][-15:]
        answer, n = row["input_ids"][len(prompt) :], len(prompt)
        assert row["labels"] == [IGNORE] * n + answer
        assert [*prompt, *answer] == plain(stack, prompt, 9)[0, : n + len(answer)].tolist()
        assert len(answer) == 9 or answer[-1] == tokenizer.eos_token_id


def test_an_answer_ends_with_eos() -> None:
    stack = built(answer_tokens=9)
    (row,) = prepared(stack, ["x"], 24).train
    n = row["labels"].count(IGNORE)
    third = row["input_ids"][n + 2]
    end = row["input_ids"].index(third, n) + 1
    assert end < len(row["input_ids"])
    for eos in (third, [319, third]):
        stack.model.generation_config.eos_token_id = eos
        assert prepared(stack, ["x"], 24).train[0]["input_ids"] == row["input_ids"][:end]


def test_prompts_and_answers() -> None:
    ids, x = [1, 2, 3, 4, 5, 6], IGNORE
    assert prompt_of(ids, [x, 2, x, x, 5, 6]) == [1, 2, 3, 4]  # of a conversation, before its last answer
    assert prompt_of(ids, [x, x, x, 4, 5, x]) == [1, 2, 3]
    assert up_to([7, 8, 9, 8], [8, 3]) == [7, 8]
    assert up_to([7, 8, 9], [3]) == [7, 8, 9]


def test_a_prompt_keeps_its_end() -> None:
    stack = built(answer_tokens=4)
    (row,) = prepared(stack, ["a b c d e f g h i j k l m n"], 10).train
    whole = stack.tokenizer("a b c d e f g h i j k l m n")["input_ids"]
    assert row["input_ids"][:6] == whole[-6:]
    assert prepared(stack, ["a b"], 5).train[0]["labels"][0] == IGNORE
    with pytest.raises(DataError, match="bita: answers of 4 tokens leave no room for a prompt"):
        prepared(stack, ["a"], 4)


# ------------------------------------------------------------------------------------------------------- decoding
def test_tree_by_hand() -> None:
    """Two masks; levels of 3 and 2 tokens, the second behind the likeliest of the first."""
    tree = draft([[10, 11, 12], [20, 21]], 2)
    m = [MASK, MASK + 1]
    nodes = {tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}
    paths = [[], [10], [11], [12], [10, 20], [10, 21]]
    assert nodes == {(*path, *m[:n]) for path in paths for n in range(3)} - {()}
    assert len(tree) == 5 + 6 * 2
    assert tree.longest_path().tokens.tolist() == [10, 20, *m]
    assert draft([], 2).tokens.tolist() == m


class Watched(MaskDrafter):
    """Compares each draft with what masks say of the text without the token that the model added itself."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack.plugins["bita"].config)
        self.stack, self.drafts, self.sizes = stack, 0, []

    def propose(self, ids: torch.Tensor, limit: int) -> object:
        if self.guesses:
            alone = said(self.stack, ids[:-1].tolist())[-3:]
            for k, (level, logits) in enumerate(zip(self.guesses, alone, strict=False)):
                assert level == logits.topk(5 - k).indices.tolist()
            self.drafts += len(self.guesses) == 3
        tree = super().propose(ids, limit)
        self.sizes.append(len(tree))
        return tree


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_drafts_are_what_masks_say(arch: str) -> None:
    stack = built(arch)
    watched = Watched(stack)
    with torch.no_grad():
        got = request(stack, TEXT, 24)
        speculative_generate(got, watched)
    assert watched.drafts > 5
    assert set(watched.sizes[1:-2]) == {3 + 4 * (5 + 4 + 3)}


class Oracle(MaskDrafter):
    """Guesses right, so that whole paths are accepted; what the masks then say is compared as above."""

    def __init__(self, stack: Stack, whole: list[int]) -> None:
        super().__init__(stack.plugins["bita"].config)
        self.stack, self.whole, self.checked = stack, whole, 0

    def propose(self, ids: torch.Tensor, limit: int) -> object:
        if self.guesses:
            alone = said(self.stack, ids[:-1].tolist())[-3:]
            for k, (level, logits) in enumerate(zip(self.guesses, alone, strict=False)):
                assert level == logits.topk(5 - k).indices.tolist()
            self.checked += 1
        right = [[token, 1, 2] for token in self.whole[len(ids) : len(ids) + 3]]
        return draft([list(dict.fromkeys(level)) for level in right], 3)


def test_masks_behind_accepted_tokens_are_read() -> None:
    stack = built()
    whole = plain(stack, TEXT, 40)[0].tolist()
    oracle = Oracle(stack, whole)
    with torch.no_grad():
        got = request(stack, TEXT, 40)
        assert speculative_generate(got, oracle)[0].tolist() == whole
    assert oracle.checked > 5
    # All three of each forward, which adds a token of its own
    assert got.stats["accepted_tokens"] >= 40 * 3 / 4 - 1


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral"])
def test_greedy_is_lossless(arch: str) -> None:
    stack = built(arch)
    for prompt in (TEXT, TEXT[:1], TEXT[2:5] * 4):
        for new in (1, 2, 5, 40):
            got = request(stack, prompt, new)
            assert torch.equal(stack.decode(got), plain(stack, prompt, new))
            assert got.stats["new_tokens"] == new


def test_a_sliding_window_takes_one_path() -> None:
    torch.manual_seed(0)
    stack = Stack(tiny("mistral", sliding_window=16), [Bita()])
    got = request(stack, TEXT, 40)
    assert torch.equal(stack.decode(got), plain(stack, TEXT, 40))
    assert got.stats["linearized_drafts"] > 5
    assert "probe_calls" not in got.stats


def test_batches_and_sampling_are_unchanged() -> None:
    stack, alone = built(), Stack(tiny("llama", max_position_embeddings=256), tokenizer=tiny_tokenizer())
    prompts = ["to be or not to be or not", "ab ab"]
    for options in ({}, {"do_sample": True, "temperature": 0.7}):
        found = [stack.generate(prompt, max_new_tokens=12, seed=3, **options) for prompt in prompts]
        assert found == [alone.generate(prompt, max_new_tokens=12, seed=3, **options) for prompt in prompts]
    assert stack.generate(prompts, max_new_tokens=12) == alone.generate(prompts, max_new_tokens=12)


def test_masks_train_on_an_adapter_that_rests() -> None:
    torch.manual_seed(0)
    lora = Lora(rank=2)
    stack = Stack(tiny("llama"), [lora, Bita(answer_tokens=8)], tokenizer=tiny_tokenizer())
    for p in stack.ledger.parameters("lora"):
        torch.nn.init.normal_(p.data, std=0.3)
    stack.freeze("lora")
    kept = [p.clone() for p in stack.ledger.parameters("lora")]
    before = [p.clone() for p in stack.ledger.parameters("bita")]
    stack.train([{"prompt": "to be", "completion": "x"}], steps=2, learning_rate=0.1)
    assert all(torch.equal(a, b) for a, b in zip(kept, stack.ledger.parameters("lora"), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, stack.ledger.parameters("bita"), strict=True))
    prompt = stack.tokenizer("to be")["input_ids"]
    text = stack.decode(request(stack, prompt, 20))
    with stack.disabled():
        assert not torch.equal(text, request(stack, prompt, 20).run_default())
    with torch.no_grad():
        assert torch.equal(text, request(stack, prompt, 20).run_default())  # of the model with its adapter


def test_bundled_model_drafts_after_a_short_training() -> None:
    torch.manual_seed(0)
    stack = Stack("peftx:tiny", [Bita(answer_tokens=24)])
    prompt = "Write the log of South Head for Thursday."
    rates = []
    for steps in (0, 45):
        if steps:
            rows = [{"prompt": prompt, "completion": "."}]
            stack.train(rows, steps=steps, batch_size=1, learning_rate=0.1)
        (text,), stats = generate(stack, [prompt], 24, None, {})
        with stack.disabled():
            assert text == stack.generate(prompt, max_new_tokens=24)
        rates.append(stats["tokens_per_call"])
    assert 1 <= rates[0] < 1.3
    assert 2 < rates[1] <= 4  # M + 1


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"masks": 4, "candidates": 3}, "3 candidates leave none for mask 4"),
        ({"masks": 9, "candidates": 20}, "20 candidates and 9 masks make 1449 nodes"),
        ({"masks": 1, "candidates": 512}, "make 1025 nodes"),
        ({"masks": 0}, "masks"),
        ({"prefix": 0}, "prefix"),
        ({"groups": 0}, "groups"),
        ({"answer_tokens": 2}, "answer_tokens"),
    ],
)
def test_bad_options(options: dict[str, int], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Bita: .*{match}"):
        Bita(**options)
    assert BitaConfig(masks=3, candidates=3).candidates == 3
    assert BitaConfig(masks=1, candidates=511).candidates == 511


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("t5", "bita: T5ForConditionalGeneration is no decoder alone"),
        ("bert", "bita: BertForMaskedLM is no decoder alone"),
        ("mamba", "bita: MambaForCausalLM has a state that cannot go back over rejected tokens"),
        ("bloom", "bita: BloomForCausalLM takes no positions"),
    ],
)
def test_models_on_which_no_draft_can_be_checked(arch: str, match: str) -> None:
    with pytest.raises(ArchitectureError, match=match):
        Stack(tiny(arch), [Bita()])


def test_a_batch_without_labels() -> None:
    with pytest.raises(PeftxError, match="bita: the batch has no labels"):
        built().train_step({"input_ids": torch.tensor([TEXT]), "attention_mask": torch.ones(1, 8).long()})
