"""A run as one HTML page that needs nothing else: no script, no font, no address.

told        told.py     what a bundle says of its run, without loading it
samples     samples.py  what base and stack write after prompts of held-out rows
page        page.py     both as HTML
"""

from __future__ import annotations

from peftx.pages.page import page
from peftx.pages.samples import Sample, Samples, samples
from peftx.pages.told import Told, told

__all__ = ["Sample", "Samples", "Told", "page", "samples", "told"]
