from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import peftx
from peftx import Stack, TrainingData
from peftx.errors import ArchitectureError, DataError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferencePrompt
from peftx.toolkits.decoding.cache import fork_cache, keep_rows
from peftx_lora import Lora
from peftx_token_trails import TokenTrails, Trail, marker_text

test_conformance = conformance("token-trails")

TALK = "User: two seats\nAssistant: when?\nUser: at six\nAssistant:"
SHORT = "User: hello\nAssistant:"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)


def build(
    arch: str = "llama", *, before: list[Any] | None = None, tokenizer: Any = None, **options: Any
) -> Stack:
    """A stack whose speakers differ by much."""
    plugins = [*(before or []), TokenTrails(**options)]
    stack = Stack(tiny(arch), plugins, tokenizer=tokenizer or tiny_tokenizer())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("token-trails"):
            parameter.normal_()
    stack.model.eval()
    return stack


def trail_of(stack: Stack) -> Trail:
    return next(m for m in stack.model.modules() if isinstance(m, Trail))


def ids_of(stack: Stack, *texts: str) -> Tensor:
    return stack.tokenizer(list(texts), return_tensors="pt", padding=True)["input_ids"]


def one_by_one(model: Any, ids: Tensor, first: int = 1) -> Tensor:
    """Logits of all tokens, the cache growing by one token at a time after the first few."""
    out = model(ids[:, :first], use_cache=True)
    logits = [out.logits]
    for place in range(first, ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def speakers(stack: Stack, text: str) -> str:
    """One character for each of the text: 0 nobody, 1 the first speaker, ..."""
    ids = torch.tensor(
        [stack.tokenizer(text, add_special_tokens=False)["input_ids"]]
    )  # a token for each byte
    return "".join(map(str, trail_of(stack).read(ids)[0].tolist()))


def test_who_speaks() -> None:
    stack = build()
    text = "So. User: hi\nAssistant: yes\nSystem: be kind\nUser:"
    assert speakers(stack, text) == "0" * 8 + "1" * 14 + "2" * 12 + "0" * 14 + "1", (
        "a turn opens with its colon"
    )
    assert speakers(stack, "no turns here") == "0" * 13


def test_added_to_the_embedding() -> None:
    stack = build()
    ids = ids_of(stack, SHORT)
    R, table = trail_of(stack).R, stack.model.model.embed_tokens
    s = [0] * 4 + [1] * len(": hello\nAssistant") + [2]  # `User`; from its colon on; the last colon
    expected = torch.stack([table.weight[t] + (R[k - 1] if k else 0) for t, k in zip(ids[0], s, strict=True)])
    assert torch.allclose(table(ids)[0], expected, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_identity_at_start_in_a_conversation(arch: str) -> None:
    model = tiny(arch)
    ids = tiny_tokenizer()(TALK, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        stack = Stack(model, [TokenTrails()], tokenizer=tiny_tokenizer())
        assert torch.equal(model(ids).logits, before)
        trail_of(stack).R.data.normal_()
        assert not torch.allclose(model(ids).logits, before, atol=0.1)


@pytest.mark.parametrize(("names", "rows"), [(("user", "assistant"), 2), (("user", "assistant", "guide"), 3)])
def test_trainable_count(names: tuple[str, ...], rows: int) -> None:
    stack = build(speakers=names)
    assert stack.trainable_parameters() == rows * stack.model.config.hidden_size


@torch.no_grad()
def test_swapping_the_types() -> None:
    stack = build()
    model, trail = stack.model, trail_of(stack)
    ids = torch.randint(3, 250, (1, 9))
    types = torch.tensor([[1, 1, 1, 2, 2, 1, 1, 2, 2]])
    one = model(ids, token_type_ids=types).logits
    other = model(ids, token_type_ids=3 - types).logits
    assert not torch.allclose(one, other, atol=0.1)
    trail.R.data = trail.R.data.flip(0)  # and their vectors too: nothing has changed
    assert torch.equal(model(ids, token_type_ids=3 - types).logits, one)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "opt"])
def test_cache_equals_full_forward(arch: str) -> None:
    stack = build(arch)
    ids = ids_of(stack, TALK)
    full = stack.model(ids).logits
    assert torch.allclose(one_by_one(stack.model, ids), full, atol=1e-4)
    assert torch.allclose(one_by_one(stack.model, ids, first=9), full, atol=1e-4)  # inside a marker


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_equals_generate_without_cache(options: dict[str, int]) -> None:
    stack = build()
    inputs = stack.tokenizer([TALK, SHORT, "no turns"], return_tensors="pt", padding=True)
    assert not inputs["attention_mask"].all()
    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    cached = stack.model.generate(**inputs, **settings)
    assert torch.equal(cached, stack.model.generate(**inputs, use_cache=False, **settings))
    with stack.disabled():
        assert not torch.equal(cached, stack.model.generate(**inputs, **settings))


@torch.no_grad()
def test_drafts_are_cut_out_of_the_trail() -> None:
    stack = build()
    ids = ids_of(stack, TALK)
    plain = stack.model.generate(ids, max_new_tokens=12, do_sample=False)
    drafted = stack.model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, plain)


@torch.no_grad()
def test_what_is_done_to_the_cache_is_done_to_the_trail() -> None:
    stack = build()
    model = stack.model
    one, two = ids_of(
        stack, "User: ab", "System: a"
    )  # the last tokens: the user's, nobody's (the pads are nobody's)
    two = two[-len(one) :]
    rows = torch.stack((one, two))
    more = ids_of(stack, "so\nAssistant: o", "so\nAssistant: o")[:, 1:]

    cache = model(rows, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    expected = model(torch.cat((rows.flip(0), more), 1)).logits[:, rows.shape[1] :]
    assert torch.allclose(model(more, past_key_values=cache).logits, expected, atol=1e-4)
    assert not torch.allclose(expected[0, 0], expected[1, 0], atol=0.1)

    whole = torch.cat((rows, more), 1)
    cache = model(whole, use_cache=True).past_key_values
    fork = fork_cache(cache)
    cache.crop(-4)
    keep_rows(fork, torch.arange(whole.shape[1] - 4))
    expected = model(whole).logits[:, -4:]
    for shorter in (cache, fork):
        assert torch.allclose(model(whole[:, -4:], past_key_values=shorter).logits, expected, atol=1e-4)


@torch.no_grad()
def test_a_padded_conversation_computes_what_it_does_alone() -> None:
    stack = build()
    inputs = stack.tokenizer([TALK, SHORT], return_tensors="pt", padding=True)
    alone = stack.model(ids_of(stack, SHORT)).logits[0]
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = stack.model(**inputs, position_ids=positions).logits[1, -len(alone) :]
    assert torch.allclose(together, alone, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompt_first", [True, False])
def test_soft_tokens_in_front_are_nobodys(prompt_first: bool) -> None:
    plugins = [ReferencePrompt(), TokenTrails()]
    stack = Stack(tiny("llama"), plugins if prompt_first else plugins[::-1], tokenizer=tiny_tokenizer())
    trail_of(stack).R.data.normal_()
    model = stack.model.eval()
    ids = ids_of(stack, TALK)
    full = model(ids, use_cache=True)
    assert torch.allclose(one_by_one(model, ids), full.logits, atol=1e-4)
    kept = full.past_key_values.layers[-1].keys[:, 0]  # [B, 3 + T, 2]: tokens, and speakers that were told
    assert kept[0, :, 0].tolist() == [-1] * 3 + ids[0].tolist()
    said = trail_of(stack).read(*kept.unbind(-1))[0].tolist()
    assert said == [0] * 3 + trail_of(stack).read(ids)[0].tolist()
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@torch.no_grad()
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("texts", [[TALK, SHORT], [TALK]])
def test_a_static_cache(texts: list[str], prompt: bool) -> None:
    """With pads and without: then `generate` prepares no mask, and asks the cache whether it is static."""
    from peftx_prompt_tuning import PromptTuning

    stack = build(before=[PromptTuning(length=3)] if prompt else [])
    inputs = stack.tokenizer(texts, return_tensors="pt", padding=True)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = stack.model.generate(**inputs, cache_implementation="static", **settings)
    wanted = stack.model.generate(**inputs, **settings)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_of_unknown_speakers_is_refused() -> None:
    stack = build()
    ids = ids_of(stack, SHORT)
    with stack.disabled():
        cache = stack.model(ids, use_cache=True).past_key_values
    refusal = f"token-trails: the cache holds {ids.shape[1]} rows, and what goes with them is known of 0"
    for types in (
        {},
        {"token_type_ids": torch.ones_like(ids)},
    ):  # who spoke before is not known by these either
        with pytest.raises(UnsupportedError, match=refusal) as caught:
            stack.model(ids, past_key_values=cache, **types)
    assert "the plugin switched on" in str(caught.value.hint)


@torch.no_grad()
def test_embeddings_behind_a_cache_are_refused() -> None:
    """They do not say who speaks, and what is said with the cache so far would go on without a speaker."""
    stack = build()
    model, ids = stack.model, ids_of(stack, SHORT)
    embedded = model.get_input_embeddings()(ids)
    assert model(inputs_embeds=embedded).logits.isfinite().all()  # with nothing before it, as it stands
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match=f"inputs_embeds go on from a cache of {ids.shape[1]} rows"):
        model(inputs_embeds=embedded, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="inputs_embeds come with token_type_ids"):
        model(inputs_embeds=embedded, token_type_ids=torch.ones_like(ids))
    assert trail_of(stack).call.shape is None
    assert cache.get_seq_length() == ids.shape[1], "nothing went on from it"


def test_speakers_stay_in_full_precision() -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [TokenTrails()], tokenizer=tiny_tokenizer())
    R = trail_of(stack).R
    R.data.fill_(1.0)
    rows = [{"messages": [{"role": r, "content": "words"} for r in ("user", "assistant")]}]
    stack.train(rows * 4, steps=4, batch_size=2, learning_rate=1e-4)
    assert R.dtype == torch.float32
    assert float((R != 1).float().mean()) > 0.95  # in bfloat16 the next number below 1 is 4e-3 away
    logits = stack.model(ids_of(stack, SHORT)).logits
    assert logits.dtype == torch.bfloat16


@torch.no_grad()
def test_given_types_are_taken_and_carried_on() -> None:
    stack = build()
    model, trail = stack.model, trail_of(stack)
    ids = ids_of(stack, TALK)
    assert torch.equal(model(ids, token_type_ids=trail.read(ids)).logits, model(ids).logits)

    plain = torch.randint(3, 250, (2, 6))
    types = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])
    cache = model(plain[:, :4], token_type_ids=types[:, :4], use_cache=True).past_key_values
    carried = model(plain[:, 4:], past_key_values=cache).logits  # no marker: the same speakers go on
    assert torch.allclose(carried, model(plain, token_type_ids=types).logits[:, 4:], atol=1e-4)


@pytest.mark.parametrize("told", [False, True])
def test_pads_are_nobodys(told: bool) -> None:
    """What closes a row to the length of the others is not said by the last speaker."""
    stack = build()
    ids = torch.tensor([[*stack.tokenizer(SHORT)["input_ids"], stack.tokenizer.pad_token_id]])
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    seen: list[Tensor] = []
    embedding = stack.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    types = {"token_type_ids": torch.full_like(ids, 2)} if told else {}
    cache = stack.model(ids, attention_mask=mask, use_cache=True, **types).past_key_values
    assert torch.equal(seen[0][0, -1], embedding.weight[ids[0, -1]])
    assert not torch.equal(seen[0][0, -2], embedding.weight[ids[0, -2]])
    text = stack.tokenizer("hi")["input_ids"]
    longer = torch.cat((mask, torch.ones(1, len(text), dtype=torch.long)), 1)
    stack.model(torch.tensor([text]), attention_mask=longer, past_key_values=cache)
    R = trail_of(stack).R
    assert torch.equal(seen[1][0], embedding.weight[text] + R[1]), "the assistant goes on behind the pad"


def test_it_learns_where_pads_are_zeros() -> None:
    """Gemma 3n takes the root of the mean square of each embedding; at a pad's, zeros, its gradient is not finite."""
    stack = Stack(tiny("gemma3n"), [TokenTrails()], tokenizer=tiny_tokenizer())
    assert not stack.model.get_input_embeddings().weight[stack.tokenizer.pad_token_id].any()
    turns = [[("user", "six"), ("assistant", "yes")], [("user", "seven o'clock"), ("assistant", "no, eight")]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in row]} for row in turns]
    report = stack.train(rows, steps=4, batch_size=2, learning_rate=1e-2)
    assert math.isfinite(report.last_loss)
    assert bool(trail_of(stack).R.isfinite().all())
    assert bool(trail_of(stack).R.all(-1).all())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
@pytest.mark.parametrize("prompt", [False, True])
def test_given_types_stand_around_generate(prompt: bool, options: dict[str, Any]) -> None:
    """What is generated goes on as the last speaker; each row is told by itself."""
    stack = build(before=[ReferencePrompt()] if prompt else [])
    ids = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(3))
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2]])
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    with stack.columns(token_type_ids=types):
        found = stack.model.generate(ids, **settings)
        if "use_cache" not in options:
            chunked = stack.model.generate(ids, prefill_chunk_size=3, **settings)
            assert torch.equal(chunked, found)
    assert not torch.equal(found, stack.model.generate(ids, **settings))
    if not options:
        told = torch.cat((types, types[:, -1:].expand(-1, 6)), 1)[:, : found.shape[1]]
        expected = stack.model(found, token_type_ids=told).logits[:, 6:-1].argmax(-1)
        assert torch.equal(found[:, 7:], expected)


@torch.no_grad()
def test_what_else_is_embedded_in_a_call_is_read_by_itself() -> None:
    """By another plugin, say; what the caller said of its own tokens is not said of these."""
    stack = build()
    embedding, found = stack.model.get_input_embeddings(), []
    ids, others = ids_of(stack, "User: ab"), ids_of(stack, "no turns")
    assert ids.shape == others.shape
    norm = stack.model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: found.append(embedding(others)))
    full = stack.model(ids, token_type_ids=torch.ones_like(ids), use_cache=True)
    assert torch.equal(found[0], embedding.weight[others])
    assert full.past_key_values.layers[-1].keys[0, 0, :, 0].tolist() == ids[0].tolist()


@torch.no_grad()
def test_gpt2_does_not_read_the_types_as_words() -> None:
    stack = build("gpt2")
    ids = torch.randint(3, 250, (1, 7))
    with stack.disabled():
        base = stack.model(ids).logits
    assert torch.equal(stack.model(ids, token_type_ids=torch.zeros_like(ids)).logits, base)
    out = stack.model.generate(ids, token_type_ids=torch.full_like(ids, 2), max_new_tokens=5, do_sample=False)
    expected = stack.model(out, token_type_ids=torch.full_like(out, 2)).logits[0, 6:-1].argmax(-1)
    assert torch.equal(out[0, 7:], expected)


def test_a_new_text_in_a_packed_row_begins_with_nobody() -> None:
    stack = build()
    bos = torch.tensor([[stack.tokenizer.bos_token_id]])
    row = torch.cat((ids_of(stack, SHORT), bos, ids_of(stack, "News")), 1)
    assert trail_of(stack).read(row)[0, -6:].tolist() == [2] + [0] * 5


def test_more_speakers() -> None:
    stack = build(speakers=("user", "assistant", "guide", "system"))
    assert speakers(stack, "System: a\nGuide: b\nAssistant: c") == "0" * 6 + "4" * 9 + "3" * 13 + "2" * 3
    rows = [{"messages": [{"role": r, "content": "words"} for r in ("system", "user", "guide", "assistant")]}]
    report = stack.train(rows * 4, steps=2, batch_size=2, learning_rate=1e-2)
    assert report.trainable == 4 * 32


@pytest.mark.parametrize(
    ("template", "user", "assistant"),
    [
        (CHATML, "<|im_start|>user", "<|im_start|>assistant"),
        (
            HEADERS,
            "<|start_header_id|>user<|end_header_id|>",
            "<|start_header_id|>assistant<|end_header_id|>",
        ),
        (BRACKETS, "<|bos|>[INST]", "[/INST]"),
    ],
)
def test_markers_of_chat_templates(template: str, user: str, assistant: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert marker_text(tokenizer, "user", {}) == user
    assert marker_text(tokenizer, "assistant", {}) == assistant
    stack = build(tokenizer=tokenizer)
    turns = [
        {"role": "user", "content": "Abc"}, {"role": "assistant", "content": "Def"},
        {"role": "user", "content": "Ghi"}, {"role": "assistant", "content": "Jkl"},
    ]  # fmt: skip
    ids = torch.tensor(
        [
            tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
        ]
    )
    found = trail_of(stack).read(ids)[0].tolist()
    letters = [tokenizer.decode([t]) for t in ids[0].tolist()]
    assert [found[letters.index(letter)] for letter in "ADGJ"] == [1, 2, 1, 2]


def test_the_channel_tells_what_the_text_does_not() -> None:
    """One text goes on in two ways, by who speaks; the frozen head of random weights sets a floor to both losses."""
    rows = []
    for speaker, word in ((1, "x"), (2, "y")):
        ids = tiny_tokenizer()(f"go {word}")["input_ids"]
        labels = [-100] * (len(ids) - 1) + ids[-1:]
        rows.append({"input_ids": ids, "labels": labels, "token_type_ids": [speaker] * len(ids)})

    def loss(data: list[dict[str, Any]]) -> float:
        stack = Stack(tiny("llama"), [Lora(rank=4), TokenTrails()], tokenizer=tiny_tokenizer())
        return stack.train(data, steps=30, batch_size=2, learning_rate=3e-2, schedule="constant").last_loss

    untold = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    assert loss(rows) < loss(untold) - math.log(2)


def test_generate_from_text_is_the_assistants_reply() -> None:
    stack = build()
    text = stack.generate(SHORT, max_new_tokens=6)
    ids = ids_of(stack, SHORT)
    types = trail_of(stack).read(ids)
    new: list[int] = []
    for _ in range(6):
        s = torch.cat((types, torch.full((1, len(new)), 2)), 1)
        with torch.no_grad():
            logits = stack.model(
                torch.cat((ids, torch.tensor([new], dtype=torch.long)), 1), token_type_ids=s
            ).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == stack.tokenizer.eos_token_id:
            break
    assert text == stack.tokenizer.decode(new, skip_special_tokens=True)


def test_a_bundle_reads_the_markers_of_its_training(tmp_path: Any) -> None:
    stack = build(markers={"user": "Q:", "assistant": "A:"})
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert list(map(tuple, trail_of(loaded).markers)) == trail_of(stack).markers
    assert speakers(loaded, "Q: a\nA: b") == "0" + "1" * 5 + "2" * 3


def test_nothing_listens_after_removal() -> None:
    stack = build()
    twin = copy.deepcopy(stack.model)
    stack.remove("token-trails")
    assert not stack.model._forward_pre_hooks
    assert not stack.model._forward_hooks
    cache = stack.model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    assert len(cache.layers) == 2
    assert len(twin(torch.tensor([[5, 6]]), use_cache=True).past_key_values.layers) == 3


def test_refuses_what_is_no_plain_decoder() -> None:
    for arch in ("bert", "t5", "mamba", "llava"):
        with pytest.raises(ArchitectureError, match="no plain decoder"):
            Stack(tiny(arch), [TokenTrails()], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"speakers": ("user",)}, "speakers"),
        ({"speakers": ("user", "user")}, "stands twice"),
        ({"markers": {"guide": "G:"}}, "'guide', who is none of"),
        ({"speakers": 3}, "speakers"),
        ({"markers": "User:"}, "markers"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=f"TokenTrails: .*{match}"):
        TokenTrails(**options)


def test_of_two_markers_that_end_together_the_longer_one_counts() -> None:
    stack = build(markers={"user": "A:", "assistant": "BA:"})
    assert speakers(stack, "A: x\nBA: x") == "0" + "1" * 6 + "2" * 3
    stack = build(markers={"user": "BA:", "assistant": "A:"})
    assert speakers(stack, "A: x\nBA: x") == "0" + "2" * 6 + "1" * 3


def merging(pair: tuple[str, str], *, template: str | None = None, prefix: bool = False) -> Any:
    """The tiny tokenizer with a token of two characters; `prefix`: it reads a space before each text."""
    tokenizer = tiny_tokenizer()
    parts, vocabulary = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    parts.model = type(parts.model)({**vocabulary, "".join(pair): len(vocabulary)}, [pair])
    parts.pre_tokenizer = type(parts.pre_tokenizer)(add_prefix_space=prefix, use_regex=False)
    tokenizer.chat_template = template
    return tokenizer


def test_a_marker_is_known_by_its_tokens_at_the_start_of_a_text_and_of_a_line() -> None:
    stack = build(tokenizer=merging(("Ġ", "U"), prefix=True))  # `ĠU s e r :` at first, then `U s e r :`
    found = speakers(stack, "User: a\nAssistant: b\nUser: c")
    assert found == "0000" + "1" * 13 + "2" * 8 + "1" * 3


def test_a_name_within_a_line_is_no_turn_where_its_tokens_tell() -> None:
    stack = build(tokenizer=merging(("Ġ", "U")))
    assert speakers(stack, "User: a\nAssistant: no User: b") == "0000" + "1" * 13 + "2" * 11


def test_a_templates_marker_stands_within_a_line_too() -> None:
    tokenizer = merging(("Ġ", "["), template=BRACKETS)
    found = speakers(build(tokenizer=tokenizer), "<|bos|>[INST] ab [/INST] cd")
    assert found == "0" * 6 + "1" * 10 + "2" * 4  # `Ġ[ / I N S T ]`, and nowhere `[ / I N S T ]`


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m['role'] != 'guide' %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_say_who_speaks(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(PeftxError, match="writes nothing before a turn of 'guide'") as caught:
        marker_text(tokenizer, "guide", {})
    assert caught.value.hint == "markers={'guide': ...}"
    assert marker_text(tokenizer, "guide", {"guide": " G: "}) == "G:"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"markers": {"user": " "}}, "of 'user' is empty"),
        ({"markers": {"user": "A:", "assistant": "A:"}}, "'A:' of 'assistant' is empty or that of another"),
    ],
)
def test_bad_markers(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        build(**options)


def said(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "words"} for role in roles]}


def compared(*roles: str) -> dict[str, Any]:
    return {"prompt": said(*roles)["messages"], "chosen": "yes", "rejected": "no"}


def test_each_may_speak_in_a_row_of_their_own_or_there_are_no_rows() -> None:
    build().train([said("user", "assistant"), said("system", "assistant")], steps=1, batch_size=2)
    nothing = TrainingData(
        train=None, eval=None, tokenizer=tiny_tokenizer(), seed=0, format="messages", max_length=8
    )
    assert build().prepare(nothing) is nothing, "a run that does not train"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            [said("user", "assistant"), {"messages": []}],
            "row 1 .*'messages' must be an array .* got an empty array",
        ),
        ([said("user", "guide", "assistant")], "row 0 .* 'guide' is none of the 2 speakers user, assistant"),
        ([said("assistant"), said("system", "assistant")], "only assistant, system speaks"),
        ([compared("user", "guide")], "row 0 .* 'guide' is none of the 2 speakers user, assistant"),
        ([{"prompt": "2 + 2 =", "completion": "4"}], "no row of the data holds a turn: none of 'User:'"),
    ],
)
def test_bad_data(rows: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        build().train(rows, steps=1)


@pytest.mark.parametrize(
    ("types", "match"),
    [
        ([[0, 1, 3]], "from 0 to 3, and R has 2 rows"),
        ([[-1, 1, 2]], "from -1 to 2"),
        ([[1, 2]], "the column 'token_type_ids' has a value for 2 tokens, and the call 3"),
    ],
)
def test_bad_types(types: list[list[int]], match: str) -> None:
    stack = build()
    with pytest.raises(PeftxError, match=match):
        stack.model(torch.tensor([[5, 6, 7]]), token_type_ids=torch.tensor(types))
    assert trail_of(stack).call.ids is None
    assert stack.model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
