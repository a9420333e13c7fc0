"""One class for each thing that can be wrong; all are `PeftxError`s, so one `except` catches them all."""

from __future__ import annotations

from peftx_spec.errors import PeftxError, nearest, nearest_names
from peftx_spec.problems import SpecError

__all__ = [
    "ArchitectureError",
    "BundleError",
    "ConflictError",
    "DataError",
    "HubError",
    "MergeError",
    "PeftxError",
    "PluginError",
    "RegistryError",
    "SpecError",
    "TargetError",
    "UnsupportedError",
    "nearest",
    "nearest_names",
]


class RegistryError(PeftxError):
    """A plugin name that is unknown, claimed twice or disabled, is for another version, or does not import."""


class TargetError(PeftxError):
    """A target selector that is malformed or matches nothing."""


class ArchitectureError(PeftxError):
    """The model lacks a role or a mechanism that was asked for."""


class ConflictError(PeftxError):
    """Two plugins that cannot stand on one model, or not in this order."""


class MergeError(PeftxError):
    """A merge or unmerge that would not be exact."""


class DataError(PeftxError):
    """A data file that is missing, empty, undecodable or malformed; names file and line."""


class BundleError(PeftxError):
    """A bundle that is incomplete, corrupted, or made for another base model."""


class HubError(PeftxError):
    """The Hugging Face Hub does not answer, or does not have or allow what was asked for."""


class UnsupportedError(PeftxError):
    """An option or combination that this version does not carry out."""


class PluginError(PeftxError):
    """A plugin's hook raised; names the plugin, the hook and the place in the spec."""
