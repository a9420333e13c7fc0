"""PrefixKV: sizes meet one budget by what attention needs, the cache holds no more, rows are as each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftx import AttentionEdit, Generation, ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, ConflictError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank, ReferencePrompt
from peftx.testing.shapes import PAD
from peftx.toolkits.decoding.evicting import KeptLayer
from peftx.toolkits.serving import Engine, Request, Server
from peftx_aded import Aded
from peftx_attention_steering import AttentionSteering
from peftx_batchllm import BatchLLM
from peftx_hydragen import Hydragen
from peftx_marconi import Marconi
from peftx_prefixkv import PrefixKV, chosen, sizes_of
from peftx_token_trails import TokenTrails

test_conformance = conformance("prefixkv")

DRAW = torch.Generator().manual_seed(0)
ROWS = [torch.randint(5, 200, (n,), generator=DRAW).tolist() for n in (40, 33, 8)]
TOKEN = 128
"""Bytes of a token's keys and values in a layer of the tiny Llama: two heads of 8 float32, twice."""


def request(model: torch.nn.Module, rows: list[list[int]], new: int = 12, **options: object) -> Generation:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made = Generation(model=model, input_ids=ids, attention_mask=mask, seed=0)
    given = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": PAD} | options
    made.generation_config.update(**given)
    return made


def logits(stack: Stack, rows: list[list[int]], new: int = 12, **options: object) -> Tensor:
    """[new, B, V]."""
    asked = request(stack.model, rows, new, return_dict_in_generate=True, output_logits=True, **options)
    stack.decode(asked)
    return torch.stack(asked.state["generate"].logits)


class Watched(PrefixKV):
    """Notes tokens held by each layer and row behind each call."""

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        super().inject(model, stack)
        self.seen: list[Tensor] = []
        evict = self.policy.evict

        def noted(layers: list[KeptLayer], reading: bool) -> None:
            evict(layers, reading)
            self.seen.append(torch.stack([layer.real.sum(1) for layer in layers]))

        self.policy.evict = noted  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------------------- sizes
def importance(layers: int, batch: int, keys: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of layers that are more and less peaked, and rows with some pads in front."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, batch, keys, generator=draw) * torch.arange(layers)[:, None, None] * 2
    real = torch.arange(keys) >= torch.randint(0, keys // 2, (batch, 1), generator=draw)
    return scores.softmax(-1) * real, real


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.77, 0.95, 1.0])
def test_sizes_meet_the_budget(budget: float, seed: int) -> None:
    weight, real = importance(5, 4, 120, seed)
    sizes, n = sizes_of(weight, real, budget, 5), real.sum(1)
    total = [max(int(budget * 5 * tokens + 1e-6), 25) for tokens in n.tolist()]
    assert sizes.sum(0).tolist() == total
    assert bool(((sizes >= 5) & (sizes <= n)).all())
    if budget == 1:
        assert bool((sizes == n).all())


def test_a_short_text_keeps_what_every_layer_keeps() -> None:
    weight, real = importance(3, 2, 6, 0)
    assert bool((sizes_of(weight, real, 0.1, 5) == real.sum(1).clamp(max=5)).all())


def test_every_layer_keeps_the_same_share_of_importance() -> None:
    """Within one token of each: c[k - s - 1] < p <= c[k - s], where a layer keeps neither all nor the least."""
    weight, real = importance(5, 1, 200, 3)
    sizes = sizes_of(weight, real, 0.4, 5)[:, 0]
    c = (weight[:, 0] / weight[:, 0].sum(-1, keepdim=True)).sort(-1, descending=True).values.cumsum(-1)
    between = [(layer, size) for layer, size in enumerate(sizes.tolist()) if 5 < size < int(real.sum())]
    assert len(between) == 3
    below, above = zip(*((c[layer, size - 6], c[layer, size - 5]) for layer, size in between), strict=True)
    assert max(below) <= min(above)


def test_what_is_even_keeps_most_and_what_is_one_token_least() -> None:
    one = torch.zeros(100)
    one[50] = 1
    weight = torch.stack([torch.ones(100), one, torch.rand(100, generator=DRAW)])[:, None]
    sizes = sizes_of(weight, torch.ones(1, 100, dtype=torch.bool), 0.4, 5)[:, 0]
    assert sizes.argmax() == 0
    assert sizes[1] in (5, 6)
    assert sizes.sum() == 120


def test_tokens_that_nobody_looks_at_still_meet_the_budget() -> None:
    """Share 0.29 of 100 is 29, and a little less in binary."""
    one = torch.zeros(1, 1, 100)
    one[0, 0, 50] = 1
    real = torch.ones(1, 100, dtype=torch.bool)
    assert sizes_of(one, real, 0.29, 5).tolist() == [[29]]
    assert sizes_of(one.repeat(2, 1, 1), real, 0.4, 5).tolist() == [[40], [40]]


def test_layers_alike_differ_by_one_at_most() -> None:
    sizes = sizes_of(torch.ones(3, 1, 10), torch.ones(1, 10, dtype=torch.bool), 0.67, 1)[:, 0]
    assert sizes.tolist() == [7, 7, 6]


@pytest.mark.parametrize("size", [5, 6, 17, 30])
def test_first_tokens_the_last_and_the_most_important_stay(size: int) -> None:
    weight = torch.rand(1, 40, generator=DRAW)
    real = torch.arange(40)[None] >= 10
    weight[0, :10] = 9  # pads
    kept = chosen(weight, real, torch.tensor([size]), 4)[0].nonzero()[:, 0]
    assert len(kept) == size
    assert {10, 11, 12, 13, 39} <= set(kept.tolist())
    between = [i for i in range(14, 39) if i in kept]
    assert between == sorted(weight[0, 14:39].topk(size - 5).indices.add(14).tolist())


def test_equals_the_official_choice() -> None:
    """Numbers of THU-MIG/PrefixKV, commit 39b7265, on the attention that `official` draws; see the README."""
    attention = official()
    weight = attention.mean(2).sum(-2)  # [L, 1, K]
    real = torch.ones(1, 64, dtype=torch.bool)
    sizes = sizes_of(weight, real, 0.4, 5)[:, 0]
    assert int((sizes - torch.tensor(OFFICIAL_SIZES)).abs().max()) <= 1
    for layer, (size, kept) in enumerate(zip(OFFICIAL_SIZES, OFFICIAL_KEPT, strict=True)):
        assert chosen(weight[layer], real, torch.tensor([size]), 4)[0].nonzero()[:, 0].tolist() == kept


# ---------------------------------------------------------------------------------------------------------- generation
ARCHITECTURES = ["llama", "gpt2", "qwen2", "mixtral", "deepseek_v3", "llava", "qwen3_next"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_whole_budget_is_the_full_cache(arch: str) -> None:
    """Bit for bit; with pads too."""
    assert torch.equal(logits(Stack(tiny(arch), [PrefixKV(budget=1)]), ROWS), logits(Stack(tiny(arch)), ROWS))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_are_as_each_alone(arch: str) -> None:
    """They keep different tokens, and others in each layer."""
    stack = Stack(tiny(arch), [PrefixKV(budget=0.4)])
    together = logits(stack, ROWS)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(together[:, i], logits(stack, [row])[:, 0], atol=2e-5, rtol=0)
    full = logits(Stack(tiny(arch)), ROWS)
    assert torch.equal(together[0], full[0])  # the prompt is read whole
    assert not torch.allclose(together[1], full[1], atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_a_full_cache_with_a_mask(implementation: str) -> None:
    """What a layer keeps is seen, at the positions that it had, and nothing else is."""
    plugin = Watched(budget=0.4)
    stack = Stack(tiny("llama"), [plugin])
    stack.model.set_attn_implementation(f"peftx_{implementation}")
    kept: list[Tensor] = []
    keep = KeptLayer.keep
    with pytest.MonkeyPatch.context() as patch, plugin.evictor.watching(40) as cache, torch.no_grad():
        patch.setattr(KeptLayer, "keep", lambda layer, k: (kept.append(k), keep(layer, k)))
        ids = torch.tensor(ROWS[:1])
        stack.model(ids, past_key_values=cache)
        found = stack.model(torch.tensor([[7, 8, 9]]), past_key_values=cache).logits
    masks = iter([torch.cat([each, torch.ones(1, 3, dtype=torch.bool)], 1) for each in kept[:2]])

    class Hidden(AttentionEdit):
        def __init__(self, seen: Tensor) -> None:
            super().__init__()
            self.seen = seen

        def replace(self, query, key, value, mask, scaling, attend):
            whole = torch.ones(43, 43, dtype=torch.bool).tril()
            whole[40:] &= self.seen[0]
            whole = whole[None, None]
            return attend(query, key, value, whole if mask is None or mask.dtype == torch.bool else
                          torch.zeros(1, 1, 43, 43).masked_fill(~whole, torch.finfo(torch.float32).min))  # fmt: skip

    class Masked(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.attention_sites():
                site.attend(Hidden(next(masks)))

    other = Stack(tiny("llama"), [Masked()])
    with torch.no_grad():
        wanted = other.model(torch.tensor([ROWS[0] + [7, 8, 9]])).logits[:, 40:]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_the_cache_holds_the_budget_and_no_more(budget: float) -> None:
    plugin = Watched(budget=budget)
    stack = Stack(tiny("llama"), [plugin])
    asked = request(stack.model, ROWS[:1], 30)
    stack.decode(asked)
    assert plugin.seen[0].sum() == int(budget * 2 * 40)
    for step, held in enumerate(plugin.seen):  # a layer is above its share by less than one
        assert bool((held - plugin.policy.share * (40 + step) < 1).all())
    assert asked.stats["kv_bytes"] == plugin.seen[-1].sum() * TOKEN
    assert asked.stats["kv_bytes_plain"] == 2 * 69 * TOKEN


def test_first_tokens_and_the_newest_stay_while_text_is_written() -> None:
    stack = Stack(tiny("llama"), [plugin := PrefixKV(budget=0.3, recent=4)])
    with plugin.evictor.watching(40) as cache, torch.no_grad():
        stack.model(torch.tensor(ROWS[:1]), past_key_values=cache)
        before = [layer.at[0].tolist() for layer in cache.layers]
        for token in range(20):
            stack.model(torch.tensor([[token + 5]]), past_key_values=cache)
        for at, layer in zip(before, cache.layers, strict=True):
            now = layer.at[0].tolist()
            assert now == sorted(now)
            place = len(at) - 4
            assert now[:place] == at[:place]
            assert now[place:] == list(range(60))[-(len(now) - place) :]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2},
                                     {"do_sample": True}, {"repetition_penalty": 1.5}], ids=str)  # fmt: skip
def test_options_of_generate(options: dict[str, object]) -> None:
    stack = Stack(tiny("llama"), [PrefixKV(budget=0.4)])
    together = stack.decode(request(stack.model, ROWS, **options))
    again = stack.decode(request(stack.model, ROWS, **options))
    assert torch.equal(together, again)
    whole = Stack(tiny("llama"), [PrefixKV(budget=1)])
    base = Stack(tiny("llama"))
    assert torch.equal(whole.decode(request(whole.model, ROWS, **options)),
                       base.decode(request(base.model, ROWS, **options)))  # fmt: skip
    if "num_beams" in options:
        alone = stack.decode(request(stack.model, ROWS[:1], **options))
        assert torch.equal(together[: len(alone)], alone)


def test_a_prompt_that_is_read_in_pieces() -> None:
    stack = Stack(tiny("llama"), [PrefixKV(budget=0.4)])
    pieces = logits(stack, ROWS, prefill_chunk_size=7)
    torch.testing.assert_close(pieces, logits(stack, ROWS), atol=2e-5, rtol=0)


def test_request_and_model_are_left_as_they_were() -> None:
    stack = Stack(tiny("llama"), [PrefixKV(budget=0.4)])
    asked = request(stack.model, ROWS)
    first = stack.decode(asked)
    assert asked.past_key_values is None
    assert torch.equal(stack.decode(asked), first)
    base, plain = Stack(tiny("llama")), request(stack.model, ROWS)
    with torch.no_grad():
        assert torch.equal(plain.run_default(), base.decode(request(base.model, ROWS)))  # past the hook
    with stack.disabled():
        assert torch.equal(stack.decode(request(stack.model, ROWS)), base.decode(request(base.model, ROWS)))


# --------------------------------------------------------------------------------------------------------- composition
def test_with_an_adapter() -> None:
    stack = Stack(tiny("llama"), [ReferenceLowRank(), PrefixKV(budget=0.4)])
    together = logits(stack, ROWS)
    torch.testing.assert_close(together[:, 2], logits(stack, ROWS[2:])[:, 0], atol=2e-5, rtol=0)
    whole = Stack(tiny("llama"), [ReferenceLowRank(), PrefixKV(budget=1)])
    assert torch.equal(logits(whole, ROWS), logits(Stack(tiny("llama"), [ReferenceLowRank()]), ROWS))


class Learned(Plugin):
    """Three learned keys and values in front of each layer's, at every call."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        class Front(AttentionEdit):
            def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
                front = torch.linspace(-2, 2, 3 * 8).view(1, 1, 3, 8).expand(len(key), key.shape[1], -1, -1)
                return torch.cat([front, key], 2), torch.cat([front.flip(3), value], 2)

        for site in model.attention_sites():
            site.attend(Front())


@pytest.mark.parametrize("other", [ReferencePrompt, Learned, TokenTrails], ids=lambda each: each.__name__)
def test_beside_what_stands_before_or_around_the_text(other: type[Plugin]) -> None:
    for plugins in ([other(), PrefixKV(budget=0.4)], [PrefixKV(budget=0.4), other()]):
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        together = logits(stack, ROWS)
        for i, row in enumerate(ROWS):
            torch.testing.assert_close(together[:, i], logits(stack, [row])[:, 0], atol=2e-5, rtol=0)
    whole, alone = (
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        for plugins in ([PrefixKV(budget=1), other()], [other()])
    )
    torch.testing.assert_close(logits(whole, ROWS), logits(alone, ROWS), atol=1e-6, rtol=0)
    assert not torch.allclose(together[1:], logits(alone, ROWS)[1:], atol=1e-3)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Hydragen, "both compute the attention themselves"),
        (Marconi, "'prefixkv' has a say in how a text is written"),
        (BatchLLM, "'prefixkv' has a say in how a whole text is written"),
        (Aded, "'prefixkv' leaves tokens out of the cache, and the loop of 'aded'"),
        (AttentionSteering, "prefixkv: another plugin edits attention's probabilities"),
        (PrefixKV, "both leave tokens out of the cache"),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_plugins_that_share_or_take_back_rows(other: type[Plugin], said: str) -> None:
    for plugins in ([PrefixKV(), other()], [other(), PrefixKV()]):
        if other is PrefixKV:
            plugins = [("prefixkv", PrefixKV()), ("again", PrefixKV())]
        with pytest.raises(ConflictError, match=said):
            Stack("peftx:tiny", plugins)


# ------------------------------------------------------------------------------------------------------------- serving
TEXTS = ["The log of the lighthouse for Thursday says that " * 3, "Once upon a time", "B"]


def test_served_texts_are_those_of_each_alone() -> None:
    stack = Stack("peftx:tiny", [PrefixKV(budget=0.3)])
    alone = [stack.generate(text, max_new_tokens=6, do_sample=False) for text in TEXTS] * 2
    engine = Engine(Server(stack))
    jobs = [engine.submit(Request(text, max_tokens=6, temperature=0.0)) for text in TEXTS * 2]
    jobs[1].cancel()
    with engine:
        found = [job.result(60).text for i, job in enumerate(jobs) if i != 1]
    assert found == alone[:1] + alone[2:]
    with pytest.raises(PeftxError, match="cancelled"):
        jobs[1].result(60)


def test_one_that_is_cancelled_while_it_runs_leaves_the_others_theirs() -> None:
    stack = Stack("peftx:tiny", [PrefixKV(budget=0.3)])
    engine = Engine(Server(stack))
    jobs = [engine.submit(Request(text, max_tokens=6, temperature=0.0)) for text in TEXTS]
    handle = stack.model.register_forward_hook(lambda *_: jobs[1].cancel())
    with engine:
        for i in (0, 2):
            assert jobs[i].result(60).text
    handle.remove()
    assert jobs[0].result(1).text == stack.generate(TEXTS[0], max_new_tokens=6, do_sample=False)


def test_a_server_that_would_share_prompts_is_refused() -> None:
    server = Server(Stack("peftx:tiny", [PrefixKV()]))
    server.scheduler.prefix_cache = True
    with pytest.raises(PeftxError, match="prefix_cache: 'prefixkv' claims evicts"):
        server.prepare()


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("t5", "prefixkv: T5ForConditionalGeneration is no decoder that writes text"),
        ("bert", "prefixkv: BertForMaskedLM is no decoder that writes text"),
        ("mamba", "prefixkv: mamba has no attention layers"),
        ("mistral", "prefixkv: MistralForCausalLM has sliding windows"),
        ("gemma2", "has sliding windows.* and caps its scores"),
        ("bloom", "does not look its attention up by name"),
    ],
)
def test_models_whose_cache_cannot_be_left_out_of(arch: str, said: str) -> None:
    model = tiny(arch)
    with pytest.raises(ArchitectureError, match=said):
        Stack(model, [PrefixKV()])
    assert not any(isinstance(module, AttentionEdit) for module in model.modules())


def test_a_budget_below_one_token() -> None:
    with pytest.raises(
        PeftxError, match=r"a budget of 0\.0009 of the 1024 tokens .* is less than one token"
    ) as caught:
        Stack("peftx:tiny", [PrefixKV(budget=0.0009)])
    least = float(str(caught.value.hint).split()[3])
    Stack("peftx:tiny", [PrefixKV(budget=least)])


@pytest.mark.parametrize(("option", "value"), [("budget", 0), ("budget", 1.1), ("budget", "half"), ("sinks", -1),
                                               ("recent", 0), ("size", 3)])  # fmt: skip
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(PeftxError, match=f"PrefixKV.*{option}"):
        PrefixKV(**{option: value})


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static"},
                                    {"prompt_lookup_num_tokens": 3}], ids=str)  # fmt: skip
def test_requests_with_a_cache_of_their_own(option: dict[str, object]) -> None:
    stack = Stack(tiny("llama"), [PrefixKV()])
    with pytest.raises(UnsupportedError, match="prefixkv keeps the cache itself, and the request asks for"):
        stack.decode(request(stack.model, ROWS[:1], **option))


def test_pads_on_the_right() -> None:
    stack = Stack(tiny("llama"), [PrefixKV()])
    asked = request(stack.model, ROWS)
    asked.attention_mask = asked.attention_mask.flip(1)
    with pytest.raises(PeftxError, match="prefixkv: padding must be on the left"):
        stack.decode(asked)
    asked.attention_mask = None
    asked.input_ids = torch.tensor([[5, 6, 7, PAD]])  # `generate` sees the pads by their token
    with pytest.raises(PeftxError, match="prefixkv: padding must be on the left"):
        stack.decode(asked)


# --------------------------------------------------------------------------------------------------- the official code
def official() -> Tensor:
    """Attention maps [L, 1, H, n, n] of three layers that are more and less peaked, as the official code was given."""
    at = torch.arange(64, dtype=torch.float64)
    heads = torch.stack([torch.sin(0.7 * at[None] * (h + 1) + 0.01 * at[:, None]) for h in range(2)])
    hidden = ~torch.ones(64, 64, dtype=torch.bool).tril()
    maps = [(heads * peak).masked_fill(hidden, -torch.inf).softmax(-1) for peak in (0.5, 4.0, 16.0)]
    return torch.stack(maps)[:, None].float()


OFFICIAL_SIZES = [37, 23, 17]  # one more than 0.4 of all: its search stops within five, and rounds
OFFICIAL_KEPT = [
    [*range(33), 36, 37, 38, 63],
    [0, 1, 2, 3, 5, 6, 9, 10, 11, 12, 14, 15, 19, 20, 23, 28, 29, 32, 37, 38, 41, 46, 63],
    [0, 1, 2, 3, 5, 10, 11, 14, 19, 20, 23, 28, 29, 32, 37, 41, 63],
]
