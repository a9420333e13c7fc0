"""What the rows of a spec become on their way to training, without training.

preview          run.py      a spec's rows, read, prepared and tokenized by the code that trains on them
Preview          found.py    what was kept, dropped, cut and packed, and how long the examples are
shown            tokens.py   an example as tokens, each with whether it counts in the loss
"""

from __future__ import annotations

from peftx.previewing.found import Lengths, Prepared, Preview
from peftx.previewing.run import Preparation, preview
from peftx.previewing.tokens import Shown, Token, shown

__all__ = ["Lengths", "Preparation", "Prepared", "Preview", "Shown", "Token", "preview", "shown"]
