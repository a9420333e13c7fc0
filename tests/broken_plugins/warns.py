"""A module that warns when it is imported."""

from __future__ import annotations

import warnings

from peftx import Claim, Plugin, TrainingData, hookimpl

warnings.warn("this package is old", DeprecationWarning, stacklevel=1)


class Warns(Plugin):
    """Nobody should see another package's warnings."""

    caught_by = "imports_quickly"
    claims = {Claim.DATA_ONLY}

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None: ...
