"""The declarative half of peftx: what a pipeline is, how it is read, and all that can be wrong in it.

Knows neither torch nor the core. Importing the package loads nothing; each name loads its
module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from peftx_spec.errors import PeftxError, nearest, nearest_names

if TYPE_CHECKING:
    from peftx_spec.catalogue import Catalogue
    from peftx_spec.dumper import dump
    from peftx_spec.loader import Document, parse, read
    from peftx_spec.models import (
        METRICS,
        DataSpec,
        EvaluateSpec,
        HoldoutSpec,
        MetricOptions,
        ModelSpec,
        Pipeline,
        SourceSpec,
        StackEntry,
    )
    from peftx_spec.order import stages_of
    from peftx_spec.plan import Plan, PlannedConflict, PlannedPlugin, PlannedStage, Totals, TouchedModule
    from peftx_spec.problems import Position, Problem, SpecError
    from peftx_spec.resolve import resolved
    from peftx_spec.schema import json_schema, options_schema
    from peftx_spec.stages import EvaluateStage, RunStage, SaveStage, TrainStage
    from peftx_spec.training import TrainSpec
    from peftx_spec.validate import LoadedSpec, load_pipeline, load_spec

_HOME = {
    "METRICS": "models",
    "Catalogue": "catalogue",
    "DataSpec": "models",
    "Document": "loader",
    "EvaluateSpec": "models",
    "EvaluateStage": "stages",
    "HoldoutSpec": "models",
    "LoadedSpec": "validate",
    "MetricOptions": "models",
    "ModelSpec": "models",
    "Pipeline": "models",
    "Plan": "plan",
    "PlannedConflict": "plan",
    "PlannedPlugin": "plan",
    "PlannedStage": "plan",
    "Position": "problems",
    "Problem": "problems",
    "RunStage": "stages",
    "SaveStage": "stages",
    "SourceSpec": "models",
    "SpecError": "problems",
    "StackEntry": "models",
    "Totals": "plan",
    "TouchedModule": "plan",
    "TrainSpec": "training",
    "TrainStage": "stages",
    "dump": "dumper",
    "json_schema": "schema",
    "options_schema": "schema",
    "load_pipeline": "validate",
    "load_spec": "validate",
    "parse": "loader",
    "read": "loader",
    "resolved": "resolve",
    "stages_of": "order",
}

__all__ = [
    "METRICS",
    "Catalogue",
    "DataSpec",
    "Document",
    "EvaluateSpec",
    "EvaluateStage",
    "HoldoutSpec",
    "LoadedSpec",
    "MetricOptions",
    "ModelSpec",
    "PeftxError",
    "Pipeline",
    "Plan",
    "PlannedConflict",
    "PlannedPlugin",
    "PlannedStage",
    "Position",
    "Problem",
    "RunStage",
    "SaveStage",
    "SourceSpec",
    "SpecError",
    "StackEntry",
    "Totals",
    "TouchedModule",
    "TrainSpec",
    "TrainStage",
    "dump",
    "json_schema",
    "load_pipeline",
    "load_spec",
    "nearest",
    "nearest_names",
    "options_schema",
    "parse",
    "read",
    "resolved",
    "stages_of",
]


def __getattr__(name: str) -> object:
    """Load the module that holds `name` on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'peftx_spec' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"peftx_spec.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
