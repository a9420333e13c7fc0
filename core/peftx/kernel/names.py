"""Names that stand outside of Python: hooks, entry points, environment."""

from __future__ import annotations

PROJECT = "peftx"
HOOKS = ("prepare_data", "inject", "train_step", "compress", "decode", "serve", "evaluate")
GROUP = "peftx.plugins"
SAMPLERS = "peftx.samplers"
DISABLE_VARIABLE = "PEFTX_DISABLE_PLUGINS"
