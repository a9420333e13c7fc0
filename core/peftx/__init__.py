"""peftx: every paper an installable plugin, and plugins compose on one model.

    import peftx
    stack = peftx.Stack("peftx:tiny", [Lora(rank=8)])

Names are resolved on first use, so that `import peftx` stays without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peftx.exported import WHERE
from peftx.moved import put_up
from peftx.version import __version__

put_up()

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
    "PeftFormat",
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
    "load_together",
    "pull",
    "push",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in WHERE:
        raise AttributeError(f"module 'peftx' has no attribute '{name}'")
    value = getattr(importlib.import_module(WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from peftx.companions import companion
    from peftx.composition.registry import Registry
    from peftx.engines.data import TrainingData
    from peftx.engines.models import load_model
    from peftx.engines.training import TrainStep
    from peftx.errors import PeftxError
    from peftx.kernel.anatomy.anatomy import Anatomy
    from peftx.kernel.anatomy.site import Site
    from peftx.kernel.attention import AttentionEdit
    from peftx.kernel.calls import CallEdit
    from peftx.kernel.phases import Phase
    from peftx.kernel.plugin import Claim, Plugin, PluginConfig, hookimpl
    from peftx.kernel.slots import Delta, LowRank, add_low_rank, dropout_linear
    from peftx.kernel.targets import Targets
    from peftx.kernel.view import BoundSite, ModelView
    from peftx.kernel.virtual_tokens import VirtualTokens
    from peftx.loading import load
    from peftx.peft_format import PeftFormat
    from peftx.pipeline import run
    from peftx.sharing import pull, push
    from peftx.sparse import SparseDelta
    from peftx.stack import Stack
    from peftx.together import load_together
    from peftx.toolkits.decoding import Generation
    from peftx.toolkits.evaluation import Evaluation
    from peftx.toolkits.working import Worker
