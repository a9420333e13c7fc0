"""New tokens: added, trained, saved alone, taken away, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import peftx
from peftx import ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import ConflictError, PeftxError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_lora import Lora

WORDS = ("<tea>", "<rain>")
ROWS = [{"prompt": f"Bring {word}", "completion": f" {word} it is"} for word in WORDS] * 4
TEXT = "Bring <tea> and <rain> now"


class WordsConfig(PluginConfig):
    words: tuple[str, ...] = WORDS


class Words(Plugin):
    Config = WordsConfig
    config: WordsConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.rows = model.vocabulary(self.config.words)


def logits(stack: Stack, text: str = TEXT) -> Tensor:
    ids = torch.tensor([stack.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return stack.model(ids).logits


def wide(arch: str) -> PreTrainedModel:
    """A model whose embedding ends where the tokenizer does, so that new tokens lie beyond it."""
    model = tiny(arch)
    model.resize_token_embeddings(len(tiny_tokenizer()))
    return model


@pytest.mark.parametrize("model_of", [tiny, wide], ids=["inside", "beyond"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_a_life_of_new_tokens(arch: str, model_of: type, tmp_path: Path) -> None:
    model = model_of(arch)
    size, tokenizer = model.config.vocab_size, tiny_tokenizer()
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    before = logits(Stack(model_of(arch), tokenizer=tokenizer))
    stack = Stack(model, [Words()], tokenizer=tokenizer)
    assert [stack.tokenizer.convert_ids_to_tokens(i) for i in stack.plugins["words"].rows.ids] == list(WORDS)  # type: ignore[attr-defined]
    assert len(stack.tokenizer(TEXT)["input_ids"]) < len(tokenizer(TEXT)["input_ids"])
    old = [id for id in range(size) if id not in stack.plugins["words"].rows.ids]  # type: ignore[attr-defined]
    bare = Stack(model_of(arch), tokenizer=tokenizer)
    assert torch.equal(logits(stack, "no news")[..., old], logits(bare, "no news")[..., old])
    start = stack.plugins["words"].rows.R.detach().clone()  # type: ignore[attr-defined]
    stack.train(ROWS, steps=4, batch_size=4, learning_rate=0.05)
    assert (start != stack.plugins["words"].rows.R).any(1).all()  # type: ignore[attr-defined]
    assert all(
        torch.equal(t, plain[name]) for name, t in stack.model.state_dict().items() if "peftx" not in name
    )
    found = logits(stack)
    assert stack.generate("Bring", max_new_tokens=3, do_sample=False) is not None

    folder = stack.save(tmp_path / "bundle")
    assert (folder / "words.safetensors").stat().st_size < 8 * start.numel() * 4, "the new rows alone"
    again = peftx.load(folder, model=model_of(arch))
    assert torch.equal(logits(again), found)
    again.remove("words")
    assert len(again.tokenizer) == len(tokenizer)
    assert again.model.config.vocab_size == size

    exported = stack.export(tmp_path / "plain")
    other = AutoModelForCausalLM.from_pretrained(exported)
    ids = torch.tensor([AutoTokenizer.from_pretrained(exported)(TEXT)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, found, rtol=1e-4, atol=1e-5)

    stack.remove("words")
    assert stack.tokenizer is tokenizer
    assert stack.model.config.vocab_size == size
    assert torch.equal(logits(stack), before)


def test_beside_an_adapter_and_another_ones_tokens() -> None:
    stack = Stack(
        tiny("llama"), [Words(), Lora(rank=2), ("more", Words(words=("<snow>",)))], tokenizer=tiny_tokenizer()
    )
    first, second = (stack.plugins[id].rows.ids for id in ("words", "more"))  # type: ignore[attr-defined]
    assert not set(first) & set(second)
    stack.train(ROWS, steps=1, batch_size=4)
    with pytest.raises(ConflictError, match="'more' added tokens behind those of 'words'"):
        stack.remove("words")
    stack.remove("more")
    stack.remove("words")


def test_what_cannot_be_added() -> None:
    with pytest.raises(PeftxError, match="words: 2 new tokens, each once"):
        Stack(tiny("llama"), [Words(words=("<a>", "<a>"))], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match="new tokens need a tokenizer"):
        Stack(tiny("llama"), [Words()])
    known = next(iter(tiny_tokenizer().get_vocab()))
    model = tiny("llama")
    with pytest.raises(PeftxError, match="is a token already"):
        Stack(model, [Words(words=("<b>", known))], tokenizer=tiny_tokenizer())
    assert model.config.vocab_size == tiny("llama").config.vocab_size
