"""Text as it is written: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class TextStream(BaseStreamer):
    """Hands each piece of text to `send` as soon as it is settled.

    Args:
        tokenizer: of the model. stop: strings at which the text ends. send: gets pieces that are not empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str],
        send: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._send = send
        self._tokens: list[int] = []
        self._sent = 0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T], then tokens [1] or several at once [n]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += value.reshape(-1).tolist()
        text, _ = cut_at_stop(self._text(), self._stop)
        self._pass_on(text, settled(text, self._stop))

    def end(self) -> None:
        text, _ = cut_at_stop(self._text(), self._stop)
        self._pass_on(text, len(text))

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _pass_on(self, text: str, end: int) -> None:
        if end > self._sent:
            self._send(text[self._sent : end])
            self._sent = end
