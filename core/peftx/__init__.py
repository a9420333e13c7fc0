"""peftx: every paper an installable plugin, and plugins compose on one model.

    import peftx
    stack = peftx.Stack("peftx:tiny", [Lora(rank=8)])

Names are resolved on first use, so that `import peftx` stays without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "Claim": "peftx.plugin",
    "Plugin": "peftx.plugin",
    "PluginConfig": "peftx.plugin",
    "hookimpl": "peftx.plugin",
    "Anatomy": "peftx.anatomy",
    "ModelView": "peftx.view",
    "Site": "peftx.anatomy",
    "Targets": "peftx.anatomy",
    "Delta": "peftx.slots",
    "LowRank": "peftx.slots",
    "add_low_rank": "peftx.slots",
    "dropout_linear": "peftx.slots",
    "AttentionEdit": "peftx.attention",
    "CallEdit": "peftx.calls",
    "VirtualTokens": "peftx.virtual_tokens",
    "PeftxError": "peftx.errors",
    "Registry": "peftx.registry",
    "Stack": "peftx.stack",
    "load": "peftx.bundle",
    "load_model": "peftx.models",
    "run": "peftx.pipeline",
    "TrainStep": "peftx.training",
    "TrainingData": "peftx.data",
    "Generation": "peftx.decoding",
    "Evaluation": "peftx.evaluation",
}

__all__ = [
    "Anatomy",
    "AttentionEdit",
    "CallEdit",
    "Claim",
    "Delta",
    "Evaluation",
    "Generation",
    "LowRank",
    "ModelView",
    "PeftxError",
    "Plugin",
    "PluginConfig",
    "Registry",
    "Site",
    "Stack",
    "Targets",
    "TrainStep",
    "TrainingData",
    "VirtualTokens",
    "__version__",
    "add_low_rank",
    "dropout_linear",
    "hookimpl",
    "load",
    "load_model",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'peftx' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from peftx.anatomy import Anatomy, Site, Targets
    from peftx.attention import AttentionEdit
    from peftx.bundle import load
    from peftx.calls import CallEdit
    from peftx.data import TrainingData
    from peftx.decoding import Generation
    from peftx.errors import PeftxError
    from peftx.evaluation import Evaluation
    from peftx.models import load_model
    from peftx.pipeline import run
    from peftx.plugin import Claim, Plugin, PluginConfig, hookimpl
    from peftx.registry import Registry
    from peftx.slots import Delta, LowRank, add_low_rank, dropout_linear
    from peftx.stack import Stack
    from peftx.training import TrainStep
    from peftx.view import ModelView
    from peftx.virtual_tokens import VirtualTokens
