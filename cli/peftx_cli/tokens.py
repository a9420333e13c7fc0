"""Examples as tokens: those that count in the loss in colour, or in brackets where there is none."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from peftx_cli.render import out
from peftx_spec.errors import visible

if TYPE_CHECKING:
    from peftx.previewing import Preview, Shown, Token

MOST_TOKENS = 400
"""Of an example; more have their middle left out."""


def share(found: Preview) -> str:
    """How much of what is read counts."""
    if found.classes:
        return "no token has a label: each example is of one class"
    share = found.share()
    if share is None:
        return "15% of the tokens are hidden and count, others in each step; shown are those of the first"
    of = "target has" if found.two_sided else "tokens have"
    return f"{share:.1%} of the {of} a label"


def show(example: Shown, found: Preview) -> None:
    """One example, on a line of its own under its head."""
    count = sum(token.labelled for token in [*example.tokens, *example.target])
    size = f"{len(example.tokens):,} tokens" + (
        f", {len(example.target):,} of the target" if example.target else ""
    )
    ending = f"class {example.label}" if example.label else f"{count:,} count in the loss"
    out(f"example {example.number + 1} of {len(found.examples):,}: {size}, {ending}")
    print_tokens(example.tokens, example.pads)
    if example.target:
        print_tokens(example.target, 0)
    for name, value in example.columns.items():
        out(f"  {name}: {_short(value)}")


def _short(value: object) -> str:
    text = visible(str(value))
    return text if len(text) <= 100 else f"{text[:100]} ..."


def print_tokens(tokens: list[Token], pads: int) -> None:
    """One line; the middle of a long one is left out."""
    left_out = max(0, len(tokens) - MOST_TOKENS)
    if left_out:
        head, tail = tokens[: MOST_TOKENS // 2], tokens[-(MOST_TOKENS // 2) :]
        parts: list[list[Token] | str] = [head, f" ... {left_out:,} tokens ... ", tail]
    else:
        parts = [tokens]
    if pads:
        parts.append(f" + {pads} pad{'s' if pads > 1 else ''}")
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # where colors alone tell them apart
        _in_colour(parts)
    else:
        out("".join(part if isinstance(part, str) else in_brackets(part) for part in parts))


def in_brackets(tokens: list[Token]) -> str:
    """`<s>|2| +| 2| =[ 4][</s>]`: bars between tokens, and brackets around each that counts in the loss."""
    text = ""
    for before, token in zip([None, *tokens], tokens, strict=False):
        bar = "|" if before is not None and not before.labelled and not token.labelled else ""
        text += f"[{plain(token)}]" if token.labelled else bar + plain(token)
    return text


def plain(token: Token) -> str:
    """A token's text on one line, nothing of it acting on a terminal."""
    return visible(token.text)


def _in_colour(parts: list[list[Token] | str]) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text()
    for part in parts:
        if isinstance(part, str):
            line.append(part, style="dim italic")
            continue
        for number, token in enumerate(part):
            # Every second token is underlined or not, so that one sees where each ends.
            ends = " underline" if number % 2 else ""
            style = "green" if token.labelled else "dim"
            line.append(plain(token), style=f"{style}{' italic' if token.special else ''}{ends}")
    Console().print(line)
