"""Soft tokens at the input: the caller's lengths everywhere, and the arithmetic of tokens written out."""

from __future__ import annotations

import copy
import inspect
import pickle  # noqa: TID251 - in memory only: worker processes get modules so
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from peftx import Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.kernel import positions, virtual_tokens
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.changes import Owner
from peftx.kernel.ledger import Ledger
from peftx.kernel.view import ModelView
from peftx.kernel.virtual_tokens import VirtualTokens
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.shapes import PAD, Padding

DECODERS = (
    "llama",
    "qwen2",
    "gpt2",
    "gemma2",
    "opt",
    "gpt_neox",
    "bloom",
    "mixtral",
    "gptj",
    "phi3",
    "llava",
)
ENCODERS = ("bert", "roberta", "deberta_v2")
PAIRS = ("t5", "bart")


class Rows(VirtualTokens):
    """Free rows [P, hidden]."""

    def __init__(self, length: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__(length)
        self.table = nn.Parameter(torch.randn(length, hidden, generator=torch.Generator().manual_seed(seed)))

    def rows(self) -> Tensor:
        return self.table


def prompted(model: PreTrainedModel, *lengths: int) -> tuple[Ledger, list[Rows]]:
    """One plugin for each length, in stack order."""
    ledger = Ledger(model)
    prompts = []
    for rank, length in enumerate(lengths):
        view = ModelView(Anatomy(model), ledger, Owner(f"p{rank}", rank))
        prompts.append(view.prompt(Rows(length, seed=rank)))
    return ledger, prompts


def run(model: PreTrainedModel, padding: Padding = None, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(model, padding=padding) | more)


def written_out(
    model: PreTrainedModel, rows: Tensor, inputs: dict[str, Tensor], *, at: int = 0
) -> tuple[dict[str, Tensor], int]:
    """The same input with the rows spelled out as embeddings; `at`: tokens that stand before them, beside pads."""
    ids = inputs["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    rows = rows.expand(ids.shape[0], -1, -1)
    mask = inputs["attention_mask"]
    ones = torch.ones(ids.shape[0], rows.shape[1], dtype=mask.dtype)
    places = [at + int((one.cumsum(0) == 0).sum()) for one in mask]

    def joined(own: Tensor, new: Tensor) -> Tensor:
        return torch.stack([torch.cat((o[:n], r, o[n:])) for o, r, n in zip(own, new, places, strict=True)])

    spelled = {"inputs_embeds": joined(embedded, rows), "attention_mask": joined(mask, ones)}
    if "position_ids" in inspect.signature(model.forward).parameters and not mask[:, 0].all():
        spelled["position_ids"] = (spelled["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # pads do not count
    if "decoder_input_ids" in inputs:
        spelled["decoder_input_ids"] = inputs["decoder_input_ids"]
    return spelled, rows.shape[1]


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_decoders_equal_embeddings_written_out(arch: str, padding: Padding) -> None:
    """Rows in front of the text, behind the pads; logits of the caller's own length."""
    model = tiny(arch)
    reference = copy.deepcopy(model)
    _, prompts = prompted(model, 3)
    inputs = example_inputs(model, padding=padding)
    spelled, length = written_out(reference, prompts[0].table, inputs)
    with torch.no_grad():
        expected = reference(**spelled).logits
        actual = model(**inputs).logits
    mask = inputs["attention_mask"]
    assert actual.shape == (*mask.shape, expected.shape[-1])
    real = mask.bool()
    behind = torch.stack([
        torch.cat((row[:pads], row[pads + length :]))
        for row, pads in zip(expected, (mask.cumsum(1) == 0).sum(1).tolist(), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(actual[real], behind[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual[real], run(reference, padding)[real], atol=1e-2)


@pytest.mark.parametrize("arch", ["mamba", "gemma2", "gemma3", "mistral", "bloom", "llama"])
def test_a_batch_writes_what_each_prompt_alone_writes(arch: str) -> None:
    """Also where distance counts: a state space, sliding windows, ALiBi."""
    options = {"sliding_window": 6} if arch in ("gemma2", "gemma3", "mistral") else {}
    model = tiny(arch, **options)
    prompted(model, 4)
    rows = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 2, 5)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=2) for row in rows])
    mask = torch.stack(
        [torch.ones(longest).long().index_fill(0, torch.arange(longest - len(row)), 0) for row in rows]
    )
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 319, "pad_token_id": 2}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, longest:]
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones(1, len(row)).long(), **settings)
        assert found.tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("arch", DECODERS)
def test_left_padding_does_not_matter(arch: str) -> None:
    model = tiny(arch)
    prompted(model, 3)
    whole = example_inputs(model, length=6)["input_ids"]
    pads = torch.full((2, 4), PAD)
    ones, zeros = torch.ones_like(whole), torch.zeros_like(pads)
    mask = torch.cat((zeros, ones), 1)
    with torch.no_grad():
        plain = model(input_ids=whole).logits
        assert torch.equal(model(input_ids=whole, attention_mask=ones).logits, plain)
        left = model(input_ids=torch.cat((pads, whole), 1), attention_mask=mask).logits
        right = model(
            input_ids=torch.cat((whole, pads), 1), attention_mask=torch.cat((ones, zeros), 1)
        ).logits
    torch.testing.assert_close(left[:, 4:], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right[:, :6], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
def test_loss_is_over_the_callers_tokens(arch: str) -> None:
    model = tiny(arch)
    _, prompts = prompted(model, 3)
    inputs = example_inputs(model)
    labels = inputs["input_ids"].clone()
    labels[:, :2] = -100
    out = model(**inputs, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    if arch != "mixtral":  # adds a loss of its router
        torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert prompts[0].table.grad.abs().sum(-1).min() > 0  # every row


def test_gradients_are_those_of_the_written_out_input() -> None:
    model = tiny("llama")
    reference = copy.deepcopy(model)
    _, prompts = prompted(model, 3)
    inputs = example_inputs(model, padding="right")
    rows = prompts[0].table.detach().clone().requires_grad_()
    spelled, length = written_out(reference, rows, inputs)
    real = inputs["attention_mask"].bool()
    reference(**spelled).logits[:, length:][real].square().sum().backward()
    model(**inputs).logits[real].square().sum().backward()
    torch.testing.assert_close(prompts[0].table.grad, rows.grad, rtol=1e-4, atol=1e-4)


def generated(model: PreTrainedModel, ids: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Six new tokens and their logits [steps, rows, vocabulary]."""
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    out = model.generate(input_ids=ids, **fixed, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, -6:], torch.stack(out.logits)


def test_rows_that_leave_the_text_no_position_are_refused() -> None:
    """Of 128; what other plugins took counts, and so does a prefix that positions start behind."""
    model = tiny("llama")
    assert positions.free_positions(model) == 128
    ledger, _ = prompted(model, 100)
    assert positions.free_positions(model) == 28
    view = ModelView(Anatomy(model), ledger, Owner("shifts", 1))
    view.shift_positions(20)
    assert positions.free_positions(model) == 8
    names = [name for name, _ in model.named_parameters()]
    for refused in (lambda: view.prompt(Rows(8)), lambda: view.shift_positions(8)):
        with pytest.raises(PeftxError, match="shifts: 8 soft tokens leave no room in the 8 positions"):
            refused()
    assert [name for name, _ in model.named_parameters()] == names
    assert positions.free_positions(model) == 8
    assert positions.free_positions(tiny("t5")) is None
    assert positions.free_positions(tiny("roberta")) == 128 - 1 - PAD  # which counts from behind the pad's id


@pytest.mark.parametrize("arch", [*(a for a in DECODERS if a != "mixtral"), "mamba", *PAIRS])
def test_generation(arch: str) -> None:
    """Greedy, cached and not, padded and not, with beams: all of the same tokens, from the same logits."""
    model = tiny(arch)
    ids = example_inputs(model, length=5)["input_ids"]
    mask = torch.ones_like(ids)
    _, without = generated(model, ids, attention_mask=mask)
    prompted(model, 3)
    tokens, logits = generated(model, ids, attention_mask=mask)
    assert logits.shape == without.shape
    assert not torch.allclose(logits, without, atol=1e-2)

    def same(other: tuple[Tensor, Tensor], rows: slice = slice(None)) -> None:
        assert torch.equal(other[0], tokens[rows])
        torch.testing.assert_close(other[1], logits[:, rows], rtol=1e-4, atol=1e-4)

    same(generated(model, ids, attention_mask=mask, use_cache=False))
    same(generated(model, ids))  # no mask at all
    same(generated(model, ids[:1], attention_mask=mask[:1]), slice(0, 1))
    if arch not in (
        "bart",
        "t5",
        "mamba",
    ):  # which take no positions: pads stand between the rows and the text
        padded = torch.cat((torch.full((2, 3), PAD), ids), 1)
        same(
            generated(model, padded, attention_mask=torch.cat((torch.zeros(2, 3, dtype=torch.long), mask), 1))
        )
    beams = generated(model, ids, attention_mask=mask, num_beams=3)
    slow = generated(model, ids, attention_mask=mask, num_beams=3, use_cache=False)
    assert torch.equal(beams[0], slow[0])
    torch.testing.assert_close(beams[1], slow[1], rtol=1e-4, atol=1e-4)


STATIC = {
    "sdpa": tiny("llama"),
    "eager": tiny("llama", attn_implementation="eager"),
    "table of positions": tiny("gpt2"),
    "experts": tiny("mixtral"),
    "encoder": tiny("t5"),
    "long windows": tiny("gemma2"),
    "short windows": tiny("gemma2", sliding_window=9),
    "short windows under SDPA": tiny(
        "gemma3", sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("kind", STATIC)
def test_a_static_cache_has_room_for_the_rows(kind: str) -> None:
    """It is made for the caller's lengths, and `generate` makes its masks; pads, beams and a longer call included."""
    model = copy.deepcopy(STATIC[kind])
    prompted(model, 4, 3)
    for length, padding, more in ((6, None, {}), (6, "left", {}), (9, "left", {"num_beams": 2})):
        inputs = example_inputs(model, length=length, padding=None if kind == "encoder" else padding)
        inputs.pop("decoder_input_ids", None)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD} | more
        wanted = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), wanted)


@pytest.mark.parametrize("model", [tiny("mistral", sliding_window=16), tiny("mistral"), tiny("bloom")])
def test_masks_that_generate_prepares_for_a_static_cache(model: PreTrainedModel) -> None:
    """Those of windows alone, and those as wide as the cache, have no place for the rows."""
    model = copy.deepcopy(model)
    prompted(model, 7)
    inputs = example_inputs(model, length=9, padding="left")
    with pytest.raises(ArchitectureError, match="generate` prepared for this static cache"):
        model.generate(**inputs, max_new_tokens=8, pad_token_id=PAD, cache_implementation="static")


def test_a_static_cache_that_holds_its_tensors_cannot_grow() -> None:
    model = tiny("llama")
    prompted(model, 4)
    ids, options = torch.arange(3, 9)[None], {"do_sample": False, "pad_token_id": PAD}
    cache = StaticCache(config=model.config, max_cache_len=12)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=7, **options)
    assert torch.equal(found, model.generate(ids, max_new_tokens=7, **options))
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=7, **options), found)
    with pytest.raises(UnsupportedError, match="has no room for 4 soft tokens"):
        model.generate(ids, cache_implementation="static", prefill_chunk_size=8, max_new_tokens=7, **options)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_masks_of_the_callers_own_shape_are_refused(arch: str) -> None:
    """The rows have no place in them: packed rows, a mask for each head, causality where there was none."""
    model = tiny(arch)
    prompted(model, 4)
    inputs = example_inputs(model, length=6)
    for heads in (1, 4):
        mask = torch.ones(2, heads, 6, 6, dtype=torch.bool).tril()
        with pytest.raises(ArchitectureError, match="2-D attention mask"):
            model(**inputs | {"attention_mask": mask})


def test_prompt_lookup() -> None:
    """Drafts that are taken back leave the rows in the cache alone."""
    model = tiny("llama")
    prompted(model, 3)
    ids = example_inputs(model, batch=1, length=5)["input_ids"].repeat(1, 2)
    tokens, _ = generated(model, ids)
    drafted = model.generate(
        input_ids=ids,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=PAD,
        prompt_lookup_num_tokens=2,
    )
    assert torch.equal(drafted[:, -6:], tokens)


def test_the_cache_of_an_earlier_generate_is_refused() -> None:
    """`generate` would take the soft tokens in it for tokens of the text."""
    model = tiny("llama")
    prompted(model, 3)
    ids = example_inputs(model, length=5)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    first = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
    longer = torch.cat((first.sequences, ids, ids), 1)
    held = int(first.past_key_values.get_seq_length())
    for length in (longer.shape[1], held + 1):  # one token is read as a step of decoding is
        with pytest.raises(UnsupportedError, match="soft tokens in the cache were taken for text"):
            model.generate(
                input_ids=longer[:, :length], past_key_values=copy.deepcopy(first.past_key_values), **options
            )


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("chunk", [2, 3])
def test_prefill_in_chunks(arch: str, chunk: int) -> None:
    """The rows enter once, with the first chunk."""
    model = tiny(arch)
    prompted(model, 3)
    inputs = example_inputs(model, length=7)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    whole = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=chunk), whole)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_step_by_step_with_a_cache(arch: str) -> None:
    """A loop of one's own, with and without masks: each step's logits are those of the whole text."""
    model = tiny(arch)
    prompted(model, 3)
    ids = example_inputs(model, length=6)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for masks in (False, True):
            cache = None
            for start, stop in ((0, 3), (3, 4), (4, 6)):
                given = {"attention_mask": torch.ones(2, stop, dtype=torch.long)} if masks else {}
                out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
                cache = out.past_key_values
                torch.testing.assert_close(out.logits, whole[:, start:stop], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_embeddings_of_the_callers_own(arch: str) -> None:
    model = tiny(arch)
    prompted(model, 3)
    inputs = example_inputs(model, padding="right")
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        by_ids = model(input_ids=ids, **inputs).logits
        by_rows = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).logits
        second = (None, inputs["attention_mask"]) if arch == "gpt2" else (inputs["attention_mask"],)
        positional = model.base_model(
            ids, *second
        ).last_hidden_state  # the cache comes before the mask in GPT-2
        named = model.base_model(input_ids=ids, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(by_ids, by_rows)
    assert torch.equal(positional, named)


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_hidden_states_and_tuples_have_the_callers_length(arch: str) -> None:
    model = tiny(arch)
    prompted(model, 3)
    inputs = example_inputs(model)
    out = model(**inputs, output_hidden_states=True)
    if arch == "t5":
        assert {h.shape[1] for h in out.decoder_hidden_states} == {9}
    else:
        assert {h.shape for h in out.hidden_states} == {(2, 9, 32)}
    assert model(**inputs, return_dict=False)[0].shape == out.logits.shape
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], out.logits)


@pytest.mark.parametrize("arch", ENCODERS)
@pytest.mark.parametrize("padding", [None, "right"])
def test_encoders_keep_the_first_token_first(arch: str, padding: Padding) -> None:
    """Rows behind the first token ([CLS]), whose place the head reads."""
    model = tiny(arch)
    reference = copy.deepcopy(model)
    _, prompts = prompted(model, 3)
    inputs = example_inputs(model, padding=padding)
    spelled, length = written_out(reference, prompts[0].table, inputs, at=1)
    if arch == "roberta":  # its positions come from the ids of the pads, which embeddings do not show
        spelled["position_ids"] = reference.config.pad_token_id + 1 + torch.arange(9 + length).expand(2, -1)
    with torch.no_grad():
        out = reference(**spelled).logits
        expected = torch.cat((out[:, :1], out[:, 1 + length :]), 1)
        actual = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ENCODERS)
def test_classifiers_read_their_own_token(arch: str) -> None:
    model = tiny(arch, head="classification")
    plain = run(model, "right")
    _, prompts = prompted(model, 3)
    out = output_of(model, example_inputs(model, padding="right"))
    assert out.shape == plain.shape
    assert not torch.allclose(out, plain, atol=1e-3)
    out.square().sum().backward()
    assert prompts[0].table.grad.abs().sum(-1).min() > 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_decoder_classifiers_read_the_last_real_token(arch: str, padding: Padding) -> None:
    model = tiny(arch, head="classification")
    prompted(model, 3)
    inputs = example_inputs(model, padding=padding)
    batch = output_of(model, inputs)
    alone = inputs["input_ids"][1:][:, inputs["attention_mask"][1].bool()]
    torch.testing.assert_close(batch[1:], model(input_ids=alone).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_base_models(arch: str) -> None:
    """A model without a head is its own host."""
    model = tiny(arch, head="base")
    plain = run(model)
    ledger, _ = prompted(model, 3)
    out = run(model)
    assert out.shape == plain.shape
    assert not torch.allclose(out, plain, atol=1e-3)
    ledger.remove("p0")
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("arch", PAIRS)
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_encoder_decoders(arch: str, padding: Padding) -> None:
    """Rows in front of the source; the decoder attends to them, whatever mask of the source the caller gave."""
    model = tiny(arch)
    reference = copy.deepcopy(model)
    _, prompts = prompted(model, 3)
    inputs = example_inputs(model, padding=padding)
    spelled, _ = written_out(reference, prompts[0].table, inputs)
    expected = run_raw(reference, spelled)
    torch.testing.assert_close(run_raw(model, inputs), expected, rtol=1e-4, atol=1e-5)
    if padding is None:
        inputs.pop("attention_mask")
        torch.testing.assert_close(run_raw(model, inputs), expected, rtol=1e-4, atol=1e-5)
    labels = {"labels": inputs["decoder_input_ids"], **inputs}
    labels.pop("decoder_input_ids")
    out = model(**labels)
    out.loss.backward()
    assert prompts[0].table.grad.abs().sum(-1).min() > 0


def run_raw(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_two_plugins_in_stack_order(arch: str) -> None:
    """The first in the stack stands first, whichever was attached first."""
    model, swapped, single = tiny(arch), tiny(arch), tiny(arch)
    _, (first, second) = prompted(model, 2, 3)
    virtual_tokens.attach(swapped, second, owner="p1", rank=1)
    virtual_tokens.attach(swapped, first, owner="p0", rank=0)
    both = Rows(5)
    both.table = nn.Parameter(torch.cat((first.table, second.table)).detach())
    virtual_tokens.attach(single, both, owner="both", rank=0)
    assert torch.equal(run(model, "right"), run(single, "right"))
    assert torch.equal(run(swapped, "right"), run(single, "right"))
    assert positions.prompt_length(model) == 5


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "bart"])
def test_removal_and_switching_off(arch: str) -> None:
    model = tiny(arch)
    before = run(model, "right")
    classes = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    ledger, _ = prompted(model, 2, 3)
    assert isinstance(model.base_model, classes[[*model.modules()].index(model.base_model)])
    assert [key for key in model.state_dict() if "peftx" not in key] == keys
    both = run(model, "right")
    ledger.switch("p0", False)
    one = run(model, "right")
    ledger.switch("p1", False)
    assert torch.equal(run(model, "right"), before)
    ledger.switch("p0", True)
    ledger.switch("p1", True)
    assert torch.equal(run(model, "right"), both)
    ledger.remove("p0")
    assert torch.equal(run(model, "right"), one)
    ledger.remove("p1")
    assert torch.equal(run(model, "right"), before)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert not any("peftx" in key for m in model.modules() for key in m.__dict__)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_copies(arch: str) -> None:
    model = tiny(arch)
    _, prompts = prompted(model, 3)
    before = run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), before)
        kept = prompts[0].table.detach().clone()
        prompts[0].table.data.zero_()
        assert torch.equal(run(copied), before)
        assert not torch.equal(run(model), before)
        prompts[0].table.data.copy_(kept)


def test_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny("llama")
        _, prompts = prompted(model, 3)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = example_inputs(model, padding="left")
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append(prompts[0].table.grad)
    torch.testing.assert_close(*grads)


def test_bfloat16() -> None:
    """Rows in float32 in a bfloat16 model."""
    model = tiny("llama").to(torch.bfloat16)
    _, prompts = prompted(model, 3)
    prompts[0].float()
    out = run(model, "left")
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_position_ids_of_the_caller(arch: str) -> None:
    model = tiny(arch)
    prompted(model, 3)
    inputs = example_inputs(model)
    positions = torch.arange(9).expand(2, -1)
    torch.testing.assert_close(run(model, position_ids=positions), run(model), rtol=1e-5, atol=1e-5)
    assert inputs["input_ids"].shape == (2, 9)


def test_shift_alone_and_with_a_prompt() -> None:
    """`shift_positions` counts from where keys and values of other tokens end."""
    model, reference = tiny("gpt2"), tiny("gpt2")
    ledger = Ledger(model)
    view = ModelView(Anatomy(model), ledger, Owner("one", 0))
    view.shift_positions(4)
    inputs = example_inputs(model)
    expected = reference(**inputs, position_ids=torch.arange(4, 13)[None]).logits
    torch.testing.assert_close(model(**inputs).logits, expected)
    cached = model(input_ids=inputs["input_ids"][:, :5])
    rest = model(input_ids=inputs["input_ids"][:, 5:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 5:], rtol=1e-4, atol=1e-5)
    prompt = view.prompt(Rows(3))
    rows = torch.cat((prompt.table.expand(2, -1, -1), reference.transformer.wte(inputs["input_ids"])), 1)
    both = reference(inputs_embeds=rows, position_ids=torch.arange(4, 16)[None]).logits[:, 3:]
    torch.testing.assert_close(model(**inputs).logits, both, rtol=1e-4, atol=1e-5)
    ledger.remove("one")
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("arch", ["gemma3n", "gemma4"])
def test_a_caller_of_embeddings_brings_what_the_layers_look_up(arch: str, padding: Padding) -> None:
    """Gemma 3n and 4 are given numbers of each token for each layer; soft tokens have none, whoever brings them."""
    model = tiny(arch)
    prompted(model, 3)
    inputs = example_inputs(model, padding=padding)
    ids, real = inputs.pop("input_ids"), inputs["attention_mask"].bool()
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
    inputs["per_layer_inputs"] = model.base_model.get_per_layer_inputs(ids)
    with torch.no_grad():
        found = model(**inputs).logits
    torch.testing.assert_close(found[real], run(model, padding)[real], rtol=1e-5, atol=1e-5)


def test_a_gemma_4_whose_layers_look_nothing_up() -> None:
    """As its larger models."""
    options = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    model, reference = tiny("gemma4", **options), tiny("gemma4", **options)
    _, (rows,) = prompted(model, 3)
    ids = example_inputs(model)["input_ids"]
    with torch.no_grad():
        joined = torch.cat((rows.table.expand(2, -1, -1), reference.get_input_embeddings()(ids)), 1)
        expected = reference(inputs_embeds=joined).logits[:, 3:]
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["vit", "whisper", "clip"])
def test_models_that_take_no_embeddings_say_so(arch: str) -> None:
    model = tiny(arch)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ArchitectureError, match="inputs_embeds"):
        prompted(model, 3)
    assert [type(m) for m in model.modules()] == classes


# -- rows of their own -----------------------------------------------------------------------------------------------


class OwnRows(VirtualTokens):
    """Each row of the batch its own tokens, and as many of them as its column says."""

    def __init__(self, width: int, call: Any) -> None:
        super().__init__(4)
        self.table = nn.Parameter(torch.randn(3, 4, width, generator=torch.Generator().manual_seed(0)))
        self.call = call

    def rows(self) -> Tensor:
        return self.table[self.call.batch["kind"]]

    def real(self) -> Tensor | None:
        return torch.arange(4) < self.call.batch["count"][:, None]


class AfterBos(OwnRows):
    after_bos = True


class ByRow(Plugin):
    tokens: ClassVar[type[OwnRows]] = OwnRows

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column("kind")
        model.column("count")
        model.prompt(self.tokens(model.hidden_size, model.call))


class ByRowAfterBos(ByRow):
    tokens = AfterBos


@pytest.mark.parametrize("plugin", [ByRow, ByRowAfterBos])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@torch.no_grad()
def test_rows_of_a_batch_have_soft_tokens_of_their_own(arch: str, plugin: type[Plugin]) -> None:
    """Beside others, padded, with beams and with fewer tokens: each row is what it is alone."""
    stack = Stack(tiny(arch), [plugin()], tokenizer=tiny_tokenizer())
    model, long = stack.model, torch.arange(3, 11)[None]
    short = torch.cat((torch.zeros(1, 3, dtype=torch.int64), long[:, 3:]), 1)
    ids = torch.cat((long, short, long))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    kind, count = torch.tensor([0, 1, 2]), torch.tensor([4, 4, 2])
    both = model(ids, attention_mask=mask, kind=kind, count=count).logits
    for row in range(3):
        real = mask[row].bool()
        own = ids[row : row + 1, real]
        alone = model(
            own, attention_mask=torch.ones_like(own), kind=kind[row : row + 1], count=count[row : row + 1]
        )
        torch.testing.assert_close(both[row, real], alone.logits[0], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with stack.columns(kind=kind, count=count):
        found = model.generate(ids, attention_mask=mask, **options)
    for row in (0, 1):
        own = ids[row : row + 1, mask[row].bool()]
        with stack.columns(kind=kind[row : row + 1], count=count[row : row + 1]):
            alone = model.generate(own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(found[row, -5:], alone[0, -5:])


@pytest.mark.parametrize("arch", PAIRS)
@torch.no_grad()
def test_an_encoder_that_generate_runs_alone_has_rows_of_its_own(arch: str) -> None:
    stack = Stack(tiny(arch), [ByRow()], tokenizer=tiny_tokenizer())
    ids, columns = (
        torch.arange(3, 15).reshape(2, 6),
        {"kind": torch.tensor([0, 2]), "count": torch.tensor([4, 2])},
    )
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "num_beams": 2,
        "pad_token_id": 2,
    }
    with stack.columns(**columns):
        found = stack.model.generate(ids, **options)
    for row in (0, 1):
        with stack.columns(**{name: column[row : row + 1] for name, column in columns.items()}):
            assert torch.equal(found[row], stack.model.generate(ids[row : row + 1], **options)[0])
    with stack.columns(**columns | {"kind": torch.tensor([1, 1])}):
        assert not torch.equal(stack.model.generate(ids, **options), found)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("arch", ["t5", "bart", "llama"])
@torch.no_grad()
def test_what_is_in_soft_tokens_that_are_not_there_shows_nowhere(arch: str, masked: bool) -> None:
    """A decoder that attends to the encoder's rows passes them by as well."""
    stack = Stack(tiny(arch), [ByRow()], tokenizer=tiny_tokenizer())
    ids = torch.arange(4, 16).reshape(2, 6)
    inputs = {"input_ids": ids, "kind": torch.tensor([0, 1]), "count": torch.tensor([2, 1])}
    if masked:
        inputs["attention_mask"] = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    if arch in PAIRS:
        inputs["decoder_input_ids"] = ids[:, :3]
    before = stack.model(**inputs).logits
    tokens = stack.ledger.parts[-1].module
    rows = tokens.rows

    def other() -> Tensor:
        there = tokens.real()[..., None]
        return torch.where(there, rows(), 100.0)

    tokens.rows = other
    real = torch.ones_like(before[..., 0], dtype=torch.bool)
    if masked and arch not in PAIRS:
        real = inputs["attention_mask"].bool()
    torch.testing.assert_close(stack.model(**inputs).logits[real], before[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_soft_tokens_behind_the_first_token() -> None:
    """As the same embeddings written out behind BOS give."""
    stack = Stack(tiny("llama"), [ByRowAfterBos()], tokenizer=tiny_tokenizer())
    ids, model = torch.arange(3, 9)[None], stack.model
    rows = stack.ledger.parts[-1].module.table[:1]
    kind, count = torch.tensor([0]), torch.tensor([4])
    found = model(ids, attention_mask=torch.ones_like(ids), kind=kind, count=count).logits
    embedded = model.get_input_embeddings()(ids)
    plain = tiny("llama")
    written = torch.cat((embedded[:, :1], rows, embedded[:, 1:]), 1)
    whole = plain(inputs_embeds=written).logits
    torch.testing.assert_close(found, torch.cat((whole[:, :1], whole[:, 5:]), 1))


class InFront(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(Rows(3, model.hidden_size))


def test_two_sides_of_the_first_token_are_refused() -> None:
    with pytest.raises(PeftxError, match="two sides of a text's first token"):
        Stack(tiny("llama"), [ByRowAfterBos(), InFront()], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_first_values_are_what_the_embedding_gives(arch: str) -> None:
    """Gemma scales what it looks up; no token twice while there are enough."""
    model = tiny(arch)
    view = ModelView(Anatomy(model), Ledger(model), Owner("it", 0))
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).detach()
    found = view.embedded(7)
    places = [int((table - row).abs().sum(1).argmin()) for row in found]
    assert torch.equal(found, table[places])
    assert not found.requires_grad
    assert len(set(places)) == 7
    assert {int((table - row).abs().sum(1).argmin()) for row in view.embedded(20, among=3)} == {0, 1, 2}
