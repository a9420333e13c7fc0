"""Folders damaged in one place, seeded: for tests that no damage goes unseen. `attempt.py` reads them.

A kind of mutation is a function that changes one file and says what it did. They come in layers, as a reader is built.

scene.py    what a mutation works on, and the list of all kinds
files.py    bytes, and whole files: also what is no file, such as folders, links, pipes and devices
values.py   values of JSON, lines of text
tensors.py  tensors
code.py     what would run code
signing.py  a manifest that agrees with what was changed
"""

from __future__ import annotations

from peftx.testing.mutations import code, files, tensors, values
from peftx.testing.mutations.scene import CANARY, HUGE, KINDS, mutate
from peftx.testing.mutations.signing import sign

LAYERS = (files, values, tensors, code)
"""Importing them fills `KINDS`, in this order."""

__all__ = ["CANARY", "HUGE", "KINDS", "LAYERS", "mutate", "sign"]
