"""One class for each thing that can be wrong; all are `PeftxError`s, so one `except` catches them all.

A class states its code, which stays as it is when the class is renamed, and `peftx explain CODE` has a page on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftx_spec.errors import DataError, FileError, PeftxError, nearest, nearest_names
from peftx_spec.problems import SpecError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "AdapterError",
    "ArchitectureError",
    "BatchError",
    "BundleError",
    "CheckpointError",
    "ConflictError",
    "DataError",
    "FileError",
    "GenerationError",
    "HubError",
    "MergeError",
    "MissingExtraError",
    "ModelError",
    "OptionError",
    "PeftxError",
    "PluginError",
    "RegistryError",
    "ServerError",
    "SpecError",
    "StackError",
    "TargetError",
    "TrainingError",
    "TrialError",
    "UnsupportedError",
    "UsageError",
    "WorkerError",
    "nearest",
    "nearest_names",
    "refused_options",
    "with_code",
]


class UsageError(PeftxError):
    """A command or a call that lacks something, names what there is not, or says two things that exclude each other."""

    code = "usage"


class OptionError(PeftxError):
    """An option with a value that the model, the data or another option does not allow."""

    code = "option"


class MissingExtraError(PeftxError):
    """A package that is not installed, and that this alone needs."""

    code = "missing-extra"


class RegistryError(PeftxError):
    """A plugin name that is unknown, claimed twice or disabled, is for another version, or does not import."""

    code = "registry"


class TargetError(PeftxError):
    """A target selector that is malformed or matches nothing."""

    code = "target"


class ArchitectureError(PeftxError):
    """The model lacks a role or a mechanism that was asked for."""

    code = "architecture"


class ModelError(PeftxError):
    """A model that does not go with the stack or with another model, or whose numbers are not finite."""

    code = "model"


class ConflictError(PeftxError):
    """Two plugins that cannot stand on one model, or not in this order."""

    code = "conflict"


class StackError(PeftxError):
    """A call that the stack cannot answer as it is: no such plugin, no tokenizer, merged, or not trained yet."""

    code = "stack"


class TrainingError(PeftxError):
    """A training that cannot start or cannot go on: nothing trains, or a loss is not finite."""

    code = "training"


class ClusterError(PeftxError):
    """A cluster of Ray that does not answer, or has not what is asked of it."""

    code = "cluster"


class BatchError(PeftxError):
    """A batch that lacks a column, or whose columns do not go with each other or with the call."""

    code = "batch"


class GenerationError(PeftxError):
    """A prompt, a draft or a setting from which no text can be generated."""

    code = "generation"


class MergeError(PeftxError):
    """A merge or unmerge that would not be exact."""

    code = "merge"


class BundleError(PeftxError):
    """A bundle or a model's folder that is missing, incomplete, corrupted, or made for another base model."""

    code = "bundle"


class CheckpointError(BundleError):
    """A checkpoint of a training that is missing, incomplete, corrupted, or of another run."""

    code = "checkpoint"


class AdapterError(PeftxError):
    """An adapter that HF PEFT's format or the model here has no place for."""

    code = "adapter"


class HubError(PeftxError):
    """The Hugging Face Hub does not answer, or does not have or allow what was asked for."""

    code = "hub"


class TrialError(PeftxError):
    """A comparison or a search of which no run can be carried out, or a run that does not give what it is judged by."""

    code = "trial"


class ServerError(PeftxError):
    """A server that cannot start so, or a request to it that it cannot answer."""

    code = "server"


class WorkerError(PeftxError):
    """A language model that is asked for texts and does not answer, or whose budget is spent."""

    code = "worker"


class UnsupportedError(PeftxError):
    """An option or combination that this version does not carry out."""

    code = "unsupported"


class PluginError(PeftxError):
    """A plugin's hook raised, or gave what it may not give; names the plugin, the hook and the place in the spec."""

    code = "plugin"


def refused_options(error: ValidationError, known: Iterable[str]) -> str:
    """What pydantic says against options, in one line; an unknown one with the nearest that is known."""
    told = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        near = nearest(name, known) if problem["type"] == "extra_forbidden" else ""
        told.append(f"{name}: {problem['msg']} (got {problem['input']!r}) {near}".rstrip())
    return "; ".join(told)


def with_code(code: str) -> type[PeftxError]:
    """The class that states a code, among those that are loaded; `PeftxError` where none does."""
    classes = [PeftxError]
    for each in classes:  # a base before what is derived from it, which may have its code
        if each.code == code:
            return each
        classes += each.__subclasses__()
    return PeftxError
