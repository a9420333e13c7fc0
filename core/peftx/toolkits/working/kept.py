"""Where answers of a stack are kept between runs, where nobody names a file for them.

They lie in `answers` of `peftx_spec.places.cache_folder`, a file for each who answers: a run that was killed goes
on, and one with other options asks nothing twice. What cannot be read is asked again, and what cannot be written is
not kept.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peftx.engines.models import tokenizer_digest
from peftx.kernel.stack import Stack
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


def make_room(file: Path) -> None:
    """Delete files beside this one, the oldest first, until all are of `MOST_BYTES` at most; at last itself."""
    found = sorted(
        file.parent.glob("*.jsonl"), key=lambda one: (one == file, one.stat().st_mtime), reverse=True
    )
    used = 0
    for one in found:
        used += one.stat().st_size
        if used > MOST_BYTES:
            one.unlink(missing_ok=True)
