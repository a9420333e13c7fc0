"""Answers that are JSON: of any shape, or of a schema's. Needs `peftx[structured]`.

A grammar says before each token which ones may follow (xgrammar); the others' logits become -inf. What a schema asks
for and a grammar cannot hold to is refused.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from peftx.errors import MissingExtraError, ServerError, UnsupportedError
from peftx.kernel.objective import vocabulary_of

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, GrammarMatcher

    from peftx.kernel.stack import Stack

DEEPEST = 32
OTHERWISE = "say it in another way, or leave it out and check the answer"
KEPT = 2**26
"""Bytes of compiled grammars that are remembered, by their content."""
BLANK = 0x20
"""Characters below it must not stand in JSON's strings, and need not between them."""
SAID = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$comment",
    "$defs",
    "definitions",
    "deprecated",
}
"""Words of a schema that ask for nothing."""
HELD = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}
"""Words that are held to beside a type."""
ALONE = ("anyOf", "$ref", "enum", "const")
"""Words that are held to where no other stands beside them, but a type that enum's values have."""


def check_schema(schema: object, place: str = "schema", depth: int = 0) -> None:
    """Raise PeftxError for the first thing in a schema that is none, or that an answer might not hold to."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict) or depth > DEEPEST:
        raise ServerError(f"{place} is no JSON schema: an object, true or false, {DEEPEST} deep at most")
    for word in ("$defs", "definitions", "properties"):
        if not isinstance(schema.get(word, {}), dict):
            raise ServerError(f"{place}: '{word}' is no object")
        for name, part in schema.get(word, {}).items():
            check_schema(part, f"{place}.{name}", depth + 1)
    for word in ("items", "additionalProperties"):
        if word in schema:
            check_schema(schema[word], f"{place}.{word}", depth + 1)
    for word in ("anyOf", "prefixItems"):
        for index, part in enumerate(_list(schema, word, place)):
            check_schema(part, f"{place}.{word}[{index}]", depth + 1)
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else _list(schema, "type", place)
    if unknown := [kind for kind in kinds if kind not in list(HELD)]:
        raise ServerError(f"{place}: no type {unknown[0]!r} in JSON schema")
    _check_words(schema, kinds, place)
    properties = schema.get("properties", {})
    if lost := [name for name in _list(schema, "required", place) if name not in list(properties)]:
        raise UnsupportedError(
            f"{place}: {lost[0]!r} is required, and not among its properties", hint=OTHERWISE
        )
    if properties and schema.get("additionalProperties", False) is not False:
        raise UnsupportedError(
            f"{place}: 'additionalProperties' is false beside 'properties'", hint=OTHERWISE
        )


def _check_words(schema: dict[str, Any], kinds: list[str], place: str) -> None:
    words = schema.keys() - SAID
    if alone := next((word for word in ALONE if word in words), None):
        values = [schema["const"]] if alone == "const" else _list(schema, "enum", place)
        typed = alone in ("const", "enum") and all(_is(value, kinds) for value in values)
        others, beside = words - {alone} - ({"type"} if typed else set()), f" beside '{alone}'"
    else:
        others = words - {"type"} - set[str]().union(*(HELD[kind] for kind in kinds))
        beside = "" if kinds else " without a type"
    if "pattern" in words:
        others |= words & {"minLength", "maxLength"}
    if others:
        raise UnsupportedError(f"{place}: '{min(others)}' is not held to{beside}", hint=OTHERWISE)


def _list(schema: dict[str, Any], word: str, place: str) -> list[Any]:
    found = schema.get(word, [])
    if not isinstance(found, list):
        raise ServerError(f"{place}: '{word}' is no list")
    return found


def _is(value: object, kinds: list[str]) -> bool:
    """Has a value one of the types."""
    own = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    kind = own.get(type(value), "null")
    return kind in kinds or (kind == "integer" and "number" in kinds)


class Grammars:
    """Compiled grammars of one tokenizer, from any thread.

    Args:
        ends: tokens that end a text; they follow where a grammar is fulfilled.

    Raises:
        PeftxError: xgrammar is not installed.
    """

    def __init__(self, stack: Stack, ends: Iterable[int]) -> None:
        try:
            import xgrammar
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"response_format needs {error.name}, which is not installed",
                hint="pip install 'peftx[structured]'",
            ) from error
        self.library, size = xgrammar, vocabulary_of(stack.model)
        ends = sorted(ends)
        told = xgrammar.TokenizerInfo.from_huggingface(stack.tokenizer, vocab_size=size, stop_token_ids=ends)
        self.size = told.vocab_size
        blank = [any(byte < BLANK for byte in token) for token in told.decoded_vocab]
        self.blank = torch.tensor(blank).index_fill(0, torch.tensor(ends), False)
        self._compiler = xgrammar.GrammarCompiler(told, max_threads=1, cache_limit_bytes=KEPT)
        self._compiling = threading.Lock()

    def compiled(self, schema: str) -> CompiledGrammar:
        """Raises PeftxError where a schema is none, or asks for what is not held to."""
        check_schema(json.loads(schema))
        try:
            with self._compiling:
                return self._compiler.compile_json_schema(schema, any_whitespace=False)
        except RuntimeError as error:
            said = re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)).strip()
            raise ServerError(f"response_format: {said}") from error


class Structure(LogitsProcessor):  # type: ignore[misc]
    """Lets each row write what its grammar allows.

    Args:
        schema: as JSON. start: tokens of the prompt, pads with it.
    """

    def __init__(self, grammars: Grammars, schema: str, *, start: int) -> None:
        self.grammars, self.start = grammars, start
        self.grammar = grammars.compiled(schema)
        self._rows: list[tuple[GrammarMatcher, list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids [B, T], logits [B, V] -> logits. Raises PeftxError where no token is left."""
        library, size = self.grammars.library, self.grammars.size
        while len(self._rows) < len(input_ids):
            self._rows.append((library.GrammarMatcher(self.grammar), []))
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        mask = library.allocate_token_bitmask(1, size)
        for index, row in enumerate(input_ids[:, self.start :].tolist()):
            matcher = self._follow(index, row)
            if matcher.is_terminated():  # pads follow
                continue
            matcher.fill_next_token_bitmask(mask)
            bits = (mask[0, :, None] >> torch.arange(32)) & 1
            allowed[index] = False
            allowed[index, :size] = bits.flatten()[:size].bool() & ~self.grammars.blank
        scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if bool((scores.amax(-1) == -torch.inf).any()):
            raise ServerError("response_format: the model may write nothing that fits", hint="ask for less")
        return scores

    def _follow(self, index: int, row: list[int]) -> GrammarMatcher:
        """A row's grammar behind its tokens, which may be others than the last time: drafts are taken back."""
        matcher, known = self._rows[index]
        same = next(
            (i for i, (a, b) in enumerate(zip(known, row, strict=False)) if a != b), min(len(known), len(row))
        )
        matcher.rollback(len(known) - same)
        del known[same:]
        for token in row[same:]:
            if matcher.is_terminated() or not matcher.accept_token(token):
                break
            known.append(token)
        return matcher
