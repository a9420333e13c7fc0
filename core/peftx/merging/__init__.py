"""Several adapters of one base as one.

merged = merge_adapters(["german", "legal"], method="ties", rank=8)   # bundles, or adapters of HF PEFT
merged.stack.save("both")                                             # one `lora`
merge_adapters(["german", "legal"], into="weights").stack.export("model")   # or a plain checkpoint

`sources` takes of each adapter what it adds to the base's weights, `methods` combines such differences, `factors` holds
them as matrices of low rank, `run` walks over the model.
"""

from __future__ import annotations

from peftx.merging.methods import METHODS
from peftx.merging.run import Merged, merge_adapters, share_kept
from peftx.merging.work import Place

__all__ = ["METHODS", "Merged", "Place", "merge_adapters", "share_kept"]
