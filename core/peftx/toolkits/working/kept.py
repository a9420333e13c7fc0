"""Where answers of a stack are kept between runs, where nobody names a file for them.

They lie in `answers` of `peftx_spec.places.cache_folder`, a file for each who answers: a run that was killed goes
on, and one with other options asks nothing twice. What cannot be read is asked again, and what cannot be written is
not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftx.engines.files import keep_within
from peftx.engines.models import tokenizer_digest
from peftx.kernel.stack import Stack
from peftx.toolkits.working.answers import Answer, answer_of
from peftx.version import __version__
from peftx_spec.places import cache_folder

MOST_BYTES = 10 * 2**30
"""Of all files; what was used longest ago goes first."""


def kept_file(name: str, stack: Stack) -> Path | None:
    """The file for the answers of `stack`, called `name` where it answers; None where nothing is kept
    (`PEFTX_CACHE=`).

    Another version, tokenizer or configuration has another file.
    """
    place = cache_folder()
    if place is None:
        return None
    config = stack.model.config.to_json_string(use_diff=False)
    about = json.dumps([__version__, name, tokenizer_digest(stack.tokenizer), config])
    return place / "answers" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.jsonl"


def remember(records: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Add answers, without their prompts, in one call: another process may write to the file at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"key": key} | {n: value for n, value in record.items() if n not in ("prompt", "of")})
        for key, record in records.items()
    ]
    with file.open("ab", buffering=0) as sink:
        sink.write("\n".join(["", *lines, ""]).encode())  # a line that a kill cut short ends here
    keep_within(file.parent, "*.jsonl", most=MOST_BYTES)


def remembered(file: Path) -> dict[str, Answer | float]:
    """The answers of a file, without what is none."""
    found: dict[str, Answer | float] = {}
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:
        os.utime(file)
        for line in lines:
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                found[record.pop("key")] = answer_of(record)
    return found
