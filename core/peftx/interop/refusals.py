"""What of a stack a checkpoint of weights cannot say, found before anything is written."""

from __future__ import annotations

from importlib import import_module

from peftx.engines.bundle.exporting import unfolded
from peftx.errors import MergeError, MissingExtraError
from peftx.kernel.members import Member
from peftx.kernel.parts import DeltaPart, FreePart, Part, takes_no_fold
from peftx.kernel.plugin import Claim
from peftx.stack import Stack

BUNDLE = "a bundle holds it: peftx generate, peftx serve"


def require_package(module: str, *, extra: str, format: str) -> None:
    """Raises PeftxError with the extra of ours that brings a library which is not installed."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--format {format} needs {error.name}, which is not installed",
            hint=f"pip install 'peftx[{extra}]'",
        ) from error


def require_weights(stack: Stack, format: str) -> None:
    """Nothing of the stack is left beside the weights once its deltas are folded.

    Raises:
        MergeError: something is; it names the plugin, the reason and the formats that hold it.
    """
    for member in stack.members:
        reason = _reason(stack, member)
        if reason:
            raise MergeError(
                f"'{member.id}' {reason}, which {format} cannot say", hint=_elsewhere(stack, member)
            )


def _reason(stack: Stack, member: Member) -> str:
    """Why weights do not hold all of the plugin; empty where they do."""
    if member.implements("decode"):
        return "takes part in decoding"
    packed = next((p for p in stack.ledger.of(member.id, DeltaPart) if takes_no_fold(p.place)), None)
    if packed is not None:
        return f"stands on {packed.path}, a quantized layer, into whose integers no delta folds"
    part = unfolded(stack, member) or _shared(stack, member)
    return f"has more than weights ({part.what} at {part.key})" if part is not None else ""


def _shared(stack: Stack, member: Member) -> Part | None:
    """A module beside the model, as a head of classes. What deltas share is in the weights once they are folded."""
    return None if member.claims(Claim.MERGEABLE) else next(iter(stack.ledger.of(member.id, FreePart)), None)


def _elsewhere(stack: Stack, member: Member) -> str:
    """Which formats hold the plugin."""
    deltas = stack.ledger.of(member.id, DeltaPart)
    low_rank = bool(deltas) and all(part.module.low_rank() is not None for part in deltas)  # type: ignore[operator]
    if low_rank or any(format.written(member.plugin.config) for format in member.plugin.peft):
        return "--format peft writes it apart, for the base without it; a bundle holds both: peftx serve"
    return BUNDLE
