"""Text in, text out: several prompts at once, and what does not fit the model."""

from __future__ import annotations

import pytest

from peftx import ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import tiny, tiny_tokenizer
from peftx.toolkits.decoding.text import check_writes


@pytest.mark.parametrize("arch", ["llama", "bart", "t5"])
def test_prompts_together_are_answered_as_alone(arch: str) -> None:
    stack = Stack(tiny(arch), [], tokenizer=tiny_tokenizer())
    prompts = ["Once upon a time there was a fox", "A", "The river"]
    alone = [stack.generate(prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    assert stack.generate(prompts, max_new_tokens=6, do_sample=False) == alone


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [("x" * 130, 4, "128 fit this model"), ("x", 500, "128 fit this model"), ("x", 0, "one is the least")],
)
def test_what_does_not_fit_is_refused(prompt: str, new: int, message: str) -> None:
    stack = Stack(tiny("gpt2"), [], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match=message):
        stack.generate(prompt, max_new_tokens=new)


@pytest.mark.parametrize(("arch", "alone"), [("bert", True), ("t5", True), ("vit", True), ("bert", False)])
def test_what_does_not_go_on_with_a_text_is_refused_by_name(arch: str, alone: bool) -> None:
    class Writes(Plugin):
        def suits(self, model: ModelView) -> None:
            check_writes(model, alone=alone)

        @hookimpl
        def inject(self, model: ModelView) -> None: ...

    Stack(tiny("llama"), [Writes()], tokenizer=tiny_tokenizer())
    if not alone:  # one behind an encoder will do
        Stack(tiny("t5"), [Writes()], tokenizer=tiny_tokenizer())
    said = "is no decoder that writes text" if alone else "writes no text"
    with pytest.raises(ArchitectureError, match=f"writes: {type(tiny(arch)).__name__} {said}"):
        Stack(tiny(arch), [Writes()], tokenizer=tiny_tokenizer())
