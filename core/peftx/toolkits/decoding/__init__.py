"""What the `decode` hook works with: one `Generation` a request, and lossless verification of drafts."""

from __future__ import annotations

from peftx.toolkits.decoding.cache import fork_cache
from peftx.toolkits.decoding.draft import Drafter, DraftTree, VerifiedStep
from peftx.toolkits.decoding.generation import Generation, Prepared, require_single
from peftx.toolkits.decoding.rows import per_row
from peftx.toolkits.decoding.verify import speculative_generate

__all__ = [
    "DraftTree",
    "Drafter",
    "Generation",
    "Prepared",
    "VerifiedStep",
    "fork_cache",
    "per_row",
    "require_single",
    "speculative_generate",
]
