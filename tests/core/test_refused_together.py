"""Pairs in which one plugin would have no effect, or no place: refused when the stack is built, in both orders."""

from __future__ import annotations

import pytest

from peftx import Registry, Stack
from peftx.errors import ConflictError
from peftx.testing import tiny, tiny_tokenizer

PAIRS = {
    ("batchllm", "marconi"): "both keep what prompts begin with",
    ("byte2word", "ks-lottery"): "'ks-lottery' acts on that alone",  # the embedding, which nobody reads then
    ("word-pooled-lm", "ks-lottery"): "'ks-lottery' acts on that alone",
    ("hierarchical-byte-transformer", "ks-lottery"): "'ks-lottery' acts on that alone",
    ("byte2word", "byte2word"): "both put words' vectors",
    ("aligndistil", "ks-lottery"): "in the middle of what the phases of 'ks-lottery' settle",
    ("transcoder", "lt-sft"): "in the middle of what the phases of 'lt-sft' settle",
    ("pointer-network", "ls-llama"): "the loss of 'ls-llama' is of classes",
    ("pointer-network", "multi-layer-trainable-pooling"): "is of whole texts",
    ("pointer-network", "ptec"): "the loss of 'ptec' is of classes",
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_plugin_is_without_effect(pair: tuple[str, str], turned: bool) -> None:
    plugins = []
    for index, name in enumerate(reversed(pair) if turned else pair):
        cls = Registry().load(name)
        plugins.append((f"{name}{index * (pair[0] == pair[1]) or ''}", cls(**cls.example)))
    with pytest.raises(ConflictError, match=PAIRS[pair]):
        Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())


def test_a_tied_embedding_trains_through_the_head() -> None:
    classes = [Registry().load(name) for name in ("byte2word", "ks-lottery")]
    Stack(tiny("gemma"), [cls(**cls.example) for cls in classes], tokenizer=tiny_tokenizer())
