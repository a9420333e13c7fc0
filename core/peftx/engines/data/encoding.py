"""Text and pairs of texts become token ids.

The boundary between a prompt and its completion: the two are tokenized separately, so that the prompt's ids
in training are the ids that the model is given at inference. A completion gets one leading space unless it
begins with white space, or the prompt ends with white space or is empty. The prompt carries what the
tokenizer puts in front (BOS, exactly once); the completion ends with EOS.

    prompt "2 + 2 ="  completion "4"   ->   input_ids  BOS 2 + 2 =  _4  EOS
                                            labels      -  - - - -  _4  EOS
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakKeyDictionary

from peftx.engines.data.collate import IGNORE
from peftx.engines.data.places import Where
from peftx.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE: Final = "a"


class Example(NamedTuple):
    """One tokenized row; `labels` is IGNORE where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids without BOS and EOS; no warning for texts longer than the model's window."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def many_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The same of several texts, in one call: twice as fast."""
    if not texts:
        return []
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def many_following(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`following_ids` of several texts."""
    if _marks_starts(tokenizer):
        return [following_ids(tokenizer, text) for text in texts]
    return many_ids(tokenizer, texts)


_MARKS: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()


def _marks_starts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does the tokenizer put a mark before the first word of a text (SentencePiece's dummy prefix)."""
    found = _MARKS.get(tokenizer)
    if found is None:
        after, before = text_ids(tokenizer, f"\n{_PROBE}"), text_ids(tokenizer, "\n")
        found = after[len(before) :] != text_ids(tokenizer, _PROBE)
        _MARKS[tokenizer] = found
    return found


def following_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on after another one: without the mark of a text's start."""
    if not text or not _marks_starts(tokenizer):
        return text_ids(tokenizer, text)
    for before in ("\n", _PROBE, "."):  # the first that the text does not melt into
        head, whole = text_ids(tokenizer, before), text_ids(tokenizer, before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return text_ids(tokenizer, text)


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after any text: `([bos], [])` for Llama, `([], [eos])` for T5."""
    bare = text_ids(tokenizer, _PROBE)
    framed = list(tokenizer(_PROBE)["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise UnsupportedError(
        f"the tokenizer encodes {_PROBE!r} as {framed} with special tokens and as {bare} without: "
        "it changes more than the two ends"
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """BOS (where the tokenizer puts one) and the prompt, open at its end: what a completion follows."""
    prefix, _ = special_frame(tokenizer)
    return prefix + without_prefix(text_ids(tokenizer, prompt), prefix)


def encoder_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_length: int) -> list[int]:
    """The prompt as an encoder takes it, with the tokenizer's ends; cut at its left to `max_length`."""
    prefix, suffix = special_frame(tokenizer)
    body = without_prefix(text_ids(tokenizer, prompt), prefix)
    room = max(0, max_length - len(prefix) - len(suffix))
    return prefix + body[max(0, len(body) - room) :] + suffix


def continuation(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: with a leading space unless there is white space already."""
    if not prompt or not completion or prompt[-1].isspace() or completion[0].isspace():
        return completion
    return " " + completion


def fill_template(template: str, text: str) -> str:
    """`template` with `text` in place of `{text}`; other braces mean themselves."""
    if template.count("{text}") != 1:
        raise DataError(f"a prompt template holds {{text}} exactly once, got {template!r}")
    return template.replace("{text}", text)


def join_pair(
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    prompt: str,
    completion: str,
    max_length: int,
    where: Where,
) -> Example:
    """BOS prompt completion EOS, with loss on the completion and EOS; the prompt is cut at its left to fit."""
    text = continuation(prompt, completion)
    head, tail = text_ids(tokenizer, prompt), following_ids(tokenizer, text)
    return joined(tokenizer, prefix, head, (text, tail), max_length, where)


def joined(
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    head: list[int],
    completion: tuple[str, list[int]],
    max_length: int,
    where: Where,
) -> Example:
    """`join_pair` of what is tokenized already. head: ids of the prompt. completion: its text, and ids."""
    text, tail = completion
    _check_learned(text, tail, where)
    head, tail = without_prefix(head, prefix), [*tail, eos_id(tokenizer)]
    room = max_length - len(prefix) - len(tail)
    if room < 0:
        raise too_long(where, tail, prefix, max_length)
    head = prefix + head[max(0, len(head) - room) :]
    return Example(head + tail, [IGNORE] * len(head) + tail)


def too_long(where: Where, tail: list[int], prefix: list[int], max_length: int) -> DataError:
    """Of a completion that does not fit."""
    return DataError(
        f"{where}: the completion has {len(tail)} tokens with EOS and does not fit in max_length {max_length}"
        + (f" after {len(prefix)} of BOS" if prefix else ""),
        hint="raise max_length or shorten the row",
    )


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, where: Where, *, alone: bool = False
) -> list[int]:
    """`alone`: a decoder of its own begins with it, and no prompt stands before."""
    ids = text_ids(tokenizer, text) if alone else following_ids(tokenizer, text)
    _check_learned(text, ids, where)
    return ids


def _check_learned(text: str, ids: list[int], where: Where) -> None:
    if not ids:
        raise DataError(f"{where}: the completion {text!r} has no tokens, so there is nothing to learn")


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no EOS token, so a completion would have no end",
            hint="set tokenizer.eos_token",
        )
    return int(tokenizer.eos_token_id)


def without_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """A text that spells out BOS itself must not get a second one."""
    return ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids
