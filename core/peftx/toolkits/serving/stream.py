"""Text as it is written: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = 24
"""Tokens that are decoded at least: what a token says hangs on a few before it."""
UNFINISHED = "�"  # what a tokenizer decodes the first bytes of a character to


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first stop string, and whether there was one."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: str, stop: Sequence[str]) -> int:
    """How many characters of `text` cannot change any more: no half character, no beginning of a stop string."""
    end = len(text.rstrip(UNFINISHED)) if text.endswith(UNFINISHED) else len(text)
    for word in stop:
        for size in range(min(len(word) - 1, end), 0, -1):
            if text[:end].endswith(word[:size]):
                end -= size
                break
    return end


class Text:
    """What tokens say that come one after the other, special ones left out. Of a long text the last tokens alone are
    decoded at each, as far as that says the same, which is looked at again and again.

    Args:
        tokenizer: of the model.

    Attributes:
        said: of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._head, self._first = "", 0  # what is decoded for good, and the token behind it
        self._look = 2 * KEPT  # tokens at which there is more of that
        self.said = ""

    def put(self, tokens: Sequence[int]) -> str:
        """The whole text, with these too."""
        self._tokens += tokens
        self.said = self._head + self._decoded(self._first)
        if len(self._tokens) >= self._look:
            self._settle()
        return self.said

    def _settle(self) -> None:
        self._look = len(self._tokens) + KEPT
        first = len(self._tokens) - KEPT
        last, whole = self._decoded(first), self._decoded(0)
        if last and self.said == whole and whole.endswith(last) and UNFINISHED not in last:
            self._head, self._first = whole.removesuffix(last), first
        else:
            self.said, self._head, self._first = whole, "", 0

    def _decoded(self, first: int) -> str:
        return str(self._tokenizer.decode(self._tokens[first:], skip_special_tokens=True))


class TextStream(BaseStreamer):
    """Hands each piece of text to `send` as soon as it is settled.

    Args:
        text: of the tokens, that `put` adds to. stop: strings at which it ends. send: gets pieces that are not empty.
    """

    def __init__(self, text: Text, *, stop: Sequence[str], send: Callable[[str], None]) -> None:
        self._text, self._stop, self._send = text, stop, send
        self._sent = 0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T], then tokens [1] or several at once [n]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._text.put(value.reshape(-1).tolist())
        self.pass_on()

    def pass_on(self) -> None:
        """Send what cannot change any more."""
        text, _ = cut_at_stop(self._text.said, self._stop)
        self._pass_on(text, settled(text, self._stop))

    def end(self) -> None:
        text, _ = cut_at_stop(self._text.said, self._stop)
        self._pass_on(text, len(text))

    def _pass_on(self, text: str, end: int) -> None:
        if end > self._sent:
            self._send(text[self._sent : end])
            self._sent = end
