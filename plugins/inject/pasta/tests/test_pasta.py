from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import EOS, PAD, output_of, tiny, tiny_tokenizer
from peftx_pasta import Pasta
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("pasta")

CLS, SEP = 0, 1
"""BOS and EOS of the tiny tokenizer, which has no [CLS] and [SEP]."""
ROWS = torch.tensor(
    [
        [CLS, 10, 11, SEP, 12, 13, SEP],  # a pair
        [CLS, 10, 11, 12, SEP, PAD, PAD],  # one sentence
        [CLS, 10, SEP, 11, SEP, 12, SEP],  # more of them than vectors
    ]
)
ORDER = torch.tensor([[1, 0, 0, 2, 0, 0, 3], [1, 0, 0, 0, 2, 0, 0], [1, 0, 2, 0, 3, 0, 0]])
MASK = (ROWS != PAD).long()


def stack_of(arch: str, *plugins: Any, head: str | None = None, **options: Any) -> Stack:
    options = {"dropout": 0.0, "init_std": 1.0, **options}
    return Stack(tiny(arch, head=head), [*plugins, Pasta(**options)], tokenizer=tiny_tokenizer())


def vectors(stack: Stack) -> list[Tensor]:
    return [part.module.e for part in stack.ledger.of("pasta") if list(part.module.parameters())]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


def inputs_of(arch: str, ids: Tensor = ROWS, mask: Tensor = MASK) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": torch.arange(3, 9).expand(len(ids), -1)} if arch == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


@torch.no_grad()
def by_hand(arch: str, e: list[Tensor], ids: Tensor = ROWS, order: Tensor = ORDER) -> Tensor:
    """What the plain model gives where e(l, s) is added by a loop over rows and tokens."""
    model = tiny(arch)

    def adds(e: Tensor) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h = args[0].clone()
            for row, places in enumerate(order.tolist()):
                for token, s in enumerate(places):
                    if s:
                        h[row, token] += e[s - 1]
            return h, *args[1:]

        return hook

    for layer, vector in zip(layers_of(model), e, strict=True):
        layer.register_forward_pre_hook(adds(vector))
    return output_of(model, inputs_of(arch, ids, (ids != PAD).long()))


@pytest.mark.parametrize("arch", ["bert", "roberta", "t5", "llama", "gpt2"])
@torch.no_grad()
def test_adds_each_vector_to_its_own_token(arch: str) -> None:
    """Counted in every row for itself, whatever the others hold; the released code counts in the first row alone."""
    stack = stack_of(arch)
    found, real = output_of(stack.model, inputs_of(arch)), ... if arch == "t5" else MASK.bool()
    torch.testing.assert_close(found[real], by_hand(arch, vectors(stack))[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reaches_the_attention_of_special_tokens_alone() -> None:
    """What the first layer's attention gets: h + e at special tokens, h elsewhere, pads among these."""
    stack, seen = stack_of("bert"), []
    attention = layers_of(stack.model)[0].attention
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    stack.model(**inputs_of("bert"))
    with stack.disabled():
        stack.model(**inputs_of("bert"))
    change, e = seen[0] - seen[1], vectors(stack)[0]
    assert change[ORDER == 0].abs().max() == 0
    for s in (1, 2, 3):
        torch.testing.assert_close(change[s == ORDER], e[s - 1].expand(int((s == ORDER).sum()), -1))


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_zeros_give_the_frozen_model(arch: str) -> None:
    stack, inputs = stack_of(arch, init_std=0.0), inputs_of(arch)
    with torch.no_grad():
        found = output_of(stack.model, inputs)
        assert torch.equal(found, output_of(tiny(arch), inputs))
        assert not torch.equal(found, output_of(stack_of(arch).model, inputs))


def test_trains_m_vectors_a_layer_and_the_head() -> None:
    head = 2 * 32 + 2
    for count in (2, 3):
        assert stack_of("bert", count=count).trainable_parameters() == 2 * count * 32
        classifier = stack_of("bert", count=count, head="classification")
        assert classifier.trainable_parameters() == 2 * count * 32 + head, "and not the pooler"
        saved = stack_of("bert", count=count).ledger.tensors("pasta").values()
        assert [tuple(e.shape) for e in saved] == [(count, 32)] * 2, "a bundle holds nothing else"


def test_the_gradient_reaches_the_vectors_of_every_layer() -> None:
    stack = stack_of("bert")
    output_of(stack.model, inputs_of("bert")).square().sum().backward()
    for e in vectors(stack):
        assert e.grad is not None
        assert e.grad.abs().sum(1).min() > 0
    stack = stack_of("bert")
    output_of(stack.model, inputs_of("bert", ROWS[1:2], MASK[1:2])).square().sum().backward()
    assert all(e.grad is not None and e.grad[2].abs().max() == 0 for e in vectors(stack)), (
        "no third one there"
    )


@pytest.mark.parametrize("arch", ["bert", "llama"])
@torch.no_grad()
def test_stands_beside_soft_tokens(arch: str) -> None:
    """[CLS] keeps its vector where soft tokens stand behind it, and BOS where they stand before it."""
    stack = stack_of(arch, PromptTuning(length=4, init="uniform"))
    soft, zeros = stack.ledger.of("prompt-tuning")[0].module.P, torch.zeros(3, 4, dtype=torch.int64)
    at = 1 if arch == "bert" else 0
    ids = torch.cat((ROWS[:, :at], zeros + 9, ROWS[:, at:]), 1)
    order = torch.cat((ORDER[:, :at], zeros, ORDER[:, at:]), 1)
    model = tiny(arch)
    joined = model.get_input_embeddings()(ids)
    joined[:, at : at + 4] = soft
    model.get_input_embeddings().register_forward_hook(lambda *_: joined)
    expected = written_out(model, vectors(stack), ids, order)
    found, keep = output_of(stack.model, inputs_of(arch)), [i for i in range(11) if not at <= i < at + 4]
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[:, keep][real], rtol=1e-4, atol=1e-5)


def written_out(model: PreTrainedModel, e: list[Tensor], ids: Tensor, order: Tensor) -> Tensor:
    """As `by_hand`, with a table."""
    for layer, vector in zip(layers_of(model), e, strict=True):
        table = torch.cat((torch.zeros(1, 32), vector))[order]
        layer.register_forward_pre_hook(lambda _, args, table=table: (args[0] + table, *args[1:]))
    return output_of(model, {"input_ids": ids, "attention_mask": (ids != PAD).long()})


@torch.no_grad()
def test_counts_on_while_it_writes() -> None:
    """A special token that comes later is the next one, with and without cache and left pads."""
    model = stack_of("llama", count=2).model
    ids = torch.tensor([[CLS, 5, 6, SEP, 7, SEP, 8], [PAD, PAD, CLS, 5, 7, SEP, 8]])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    out = model(ids[:, :3], attention_mask=mask[:, :3], position_ids=positions[:, :3], use_cache=True)
    for at in range(3, 7):
        out = model(
            ids[:, at : at + 1], attention_mask=mask[:, : at + 1], position_ids=positions[:, at : at + 1],
            past_key_values=out.past_key_values,
        )  # fmt: skip
        torch.testing.assert_close(out.logits[:, -1], whole[:, at], rtol=1e-4, atol=1e-5)
    alone = model(ids[1:, 2:]).logits
    torch.testing.assert_close(whole[1:, 2:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pads_that_are_a_special_token_are_none() -> None:
    """Decoders without a pad of their own take EOS."""
    model, ids = stack_of("llama").model, torch.tensor([[SEP, SEP, CLS, 5, SEP, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(padded[:, 2:], model(ids[:, 2:]).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_acts_on_the_encoder_that_generate_runs_alone() -> None:
    model, start = stack_of("t5").model, torch.full((3, 1), PAD)
    more = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ROWS, attention_mask=MASK, **more)
    forward = model(ROWS, attention_mask=MASK, decoder_input_ids=start).logits[:, 0]
    torch.testing.assert_close(out.logits[0], forward)


def test_dropout_acts_on_what_is_added_while_training() -> None:
    stack, inputs = stack_of("bert", dropout=0.5), inputs_of("bert")
    with torch.no_grad():
        calm = output_of(stack.model, inputs)
        assert torch.equal(output_of(stack.model, inputs), calm)
        stack.model.train()
        one, two = output_of(stack.model, inputs), output_of(stack.model, inputs)
        assert not torch.allclose(one, two)
        with stack.disabled():
            assert torch.equal(output_of(stack.model, inputs), output_of(stack.model, inputs))


def test_learns_a_family_of_sentences() -> None:
    rows = [
        {"text": f"{word} {n}", "label": label}
        for n in range(8)
        for word, label in (("ab", "0"), ("cd", "1"))
    ]
    model = tiny("bert", head="classification")
    model.config.pad_token_id = PAD
    tokenizer = tiny_tokenizer()
    stack = Stack(model, [Pasta(tokens=("a", "c"), count=1)], tokenizer=tokenizer)
    report = stack.train(rows, steps=30, batch_size=8, learning_rate=3e-2)
    assert report.last_loss < 0.5 * report.first_loss


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="pasta: whisper reads no tokens"):
        stack_of("whisper")
    stack, ids = stack_of("llama"), ROWS[:1]
    with pytest.raises(UnsupportedError, match="pasta: special tokens are told by their ids"):
        stack.model(inputs_embeds=stack.model.get_input_embeddings()(ids))
    with pytest.raises(PeftxError, match=r"pasta: the tokenizer has no token '<\|bo\|>'") as caught:
        stack_of("llama", tokens=("<|bo|>",))
    assert "<|bos|>" in str(caught.value.hint)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(PeftxError, match="pasta: the tokenizer names no special tokens"):
        Stack(tiny("llama"), [Pasta()], tokenizer=tokenizer)


def test_special_tokens_are_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    assert stack_of("llama").ledger.of("pasta")[-1].module.ids.tolist() == [CLS, EOS]
    tokenizer.cls_token, tokenizer.sep_token = "a", "b"
    stack = Stack(tiny("bert"), [Pasta()], tokenizer=tokenizer)
    expected = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert stack.ledger.of("pasta")[-1].module.ids.tolist() == expected
