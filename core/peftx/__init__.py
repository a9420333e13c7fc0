"""peftx: every paper an installable plugin, and plugins compose on one model.

    import peftx
    stack = peftx.Stack("peftx:tiny", [Lora(rank=8)])

Names are resolved on first use, so that `import peftx` stays without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peftx.moved import put_up
from peftx.version import __version__

put_up()

_WHERE = {
    "Claim": "peftx.kernel.plugin",
    "Plugin": "peftx.kernel.plugin",
    "PluginConfig": "peftx.kernel.plugin",
    "hookimpl": "peftx.kernel.plugin",
    "Anatomy": "peftx.kernel.anatomy",
    "ModelView": "peftx.kernel.view",
    "Site": "peftx.kernel.anatomy",
    "Targets": "peftx.kernel.anatomy",
    "Delta": "peftx.kernel.slots",
    "LowRank": "peftx.kernel.slots",
    "SparseDelta": "peftx.kernel.slots",
    "add_low_rank": "peftx.kernel.slots",
    "dropout_linear": "peftx.kernel.slots",
    "AttentionEdit": "peftx.kernel.attention",
    "CallEdit": "peftx.kernel.calls",
    "VirtualTokens": "peftx.kernel.virtual_tokens",
    "PeftxError": "peftx.errors",
    "Registry": "peftx.kernel.registry",
    "Stack": "peftx.stack",
    "companion": "peftx.companions",
    "load": "peftx.loading",
    "Worker": "peftx.toolkits.working",
    "Phase": "peftx.kernel.phases",
    "BoundSite": "peftx.kernel.view",
    "load_model": "peftx.engines.models",
    "run": "peftx.pipeline",
    "TrainStep": "peftx.engines.training",
    "TrainingData": "peftx.engines.data",
    "Generation": "peftx.toolkits.decoding",
    "Evaluation": "peftx.toolkits.evaluation",
}

__all__ = [
    "Anatomy",
    "AttentionEdit",
    "BoundSite",
    "CallEdit",
    "Claim",
    "Delta",
    "Evaluation",
    "Generation",
    "LowRank",
    "ModelView",
    "PeftxError",
    "Phase",
    "Plugin",
    "PluginConfig",
    "Registry",
    "Site",
    "SparseDelta",
    "Stack",
    "Targets",
    "TrainStep",
    "TrainingData",
    "VirtualTokens",
    "Worker",
    "__version__",
    "add_low_rank",
    "companion",
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
    from peftx.companions import companion
    from peftx.engines.data import TrainingData
    from peftx.engines.models import load_model
    from peftx.engines.training import TrainStep
    from peftx.errors import PeftxError
    from peftx.kernel.anatomy import Anatomy, Site, Targets
    from peftx.kernel.attention import AttentionEdit
    from peftx.kernel.calls import CallEdit
    from peftx.kernel.phases import Phase
    from peftx.kernel.plugin import Claim, Plugin, PluginConfig, hookimpl
    from peftx.kernel.registry import Registry
    from peftx.kernel.slots import Delta, LowRank, SparseDelta, add_low_rank, dropout_linear
    from peftx.kernel.view import BoundSite, ModelView
    from peftx.kernel.virtual_tokens import VirtualTokens
    from peftx.loading import load
    from peftx.pipeline import run
    from peftx.stack import Stack
    from peftx.toolkits.decoding import Generation
    from peftx.toolkits.evaluation import Evaluation
    from peftx.toolkits.working import Worker
