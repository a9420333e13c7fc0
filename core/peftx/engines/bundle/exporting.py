"""A stack into a plain `transformers` checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftx.engines.bundle.manifest import versions
from peftx.engines.files import read_json, replacing
from peftx.errors import BundleError, MergeError
from peftx.foreign import refuse_wrapped
from peftx.kernel.chain import is_ours
from peftx.kernel.members import Member
from peftx.kernel.parts import AttentionPart, CallPart, DeltaPart, Part, PromptPart, ReplacedPart, ShiftPart
from peftx.kernel.plugin import Claim
from peftx.kernel.stack import Stack
from peftx.kernel.vocabulary import NewLogits, NewRows, widened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORT = "peftx_export.json"


PACKED = (
    "a bundle holds it: peftx generate, peftx serve; --format compressed-tensors holds integers of 4 or 8 bits; or "
    "export before compressing"
)
"""The way out where packed layers cannot be said."""


def export(stack: Stack, path: Path) -> Path:
    """See `Stack.export`."""
    for member in stack.members:
        left = unfolded(stack, member)
        if left is not None:
            raise MergeError(
                f"'{member.id}' does not fold into the weights ({left.what} at {left.key}), so no plain checkpoint can "
                "hold it",
                hint=f"save a bundle, or stack.remove('{member.id}') first",
            )
    if stack.ledger.all(ReplacedPart):
        raise MergeError(
            "a quantized stack has no plain checkpoint",
            hint=PACKED,
        )
    with folded(stack):
        state = weights(stack)
        check_plain(blank(stack.model), state)
        with writing(stack, path) as folder:
            save_plain(stack, folder, state)
    return path


def unfolded(stack: Stack, member: Member) -> Part | None:
    """Something of the plugin that no weights can hold.

    Raises:
        MergeError: it claims that its deltas fold, and one does not.
    """
    if not stack.ledger.of(member.id):
        return None
    if member.claims(Claim.MERGEABLE):
        stack.ledger.check_fold(member.id)
    stays = (AttentionPart, PromptPart, ShiftPart, CallPart)
    kinds = stays if member.claims(Claim.MERGEABLE) else (DeltaPart, *stays)
    own = (part for part in stack.ledger.of(member.id) if not isinstance(part.module, NewRows | NewLogits))
    return next((part for part in own if isinstance(part, kinds)), None)


@contextmanager
def folded(stack: Stack) -> Iterator[None]:
    """Inside, all deltas that fold are in the weights; behind it, the weights are the very same bits as before.

    Raises:
        ConflictError: HF PEFT is on the model.
    """
    refuse_wrapped(stack.model, "an export")
    mergeable = [
        m.id
        for m in stack.members
        if m.claims(Claim.MERGEABLE) and not stack.standing[m.id].folded and stack.ledger.of(m.id)
    ]
    if mergeable:
        stack.merge(*mergeable)
    try:
        yield
    finally:
        if mergeable:
            stack.unmerge()


def weights(stack: Stack) -> dict[str, Tensor]:
    """The model's own tensors under the base's names, with the rows of tokens that plugins added."""
    state = {n: t for n, t in stack.model.state_dict(keep_vars=True).items() if not is_ours(n)}
    return state | _with_new_tokens(stack)


@contextmanager
def writing(stack: Stack, path: Path) -> Iterator[Path]:
    """An empty folder that takes `path`'s place at the end, with a note of what was written."""
    _refuse_strange_files(path)
    with replacing(path, marker=EXPORT) as folder:
        yield folder
        files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        about = {
            "base": stack.base_id,
            "plugins": list(stack.plugins),
            "versions": versions(),
            "files": files,
        }
        (folder / EXPORT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def save_plain(stack: Stack, folder: Path, state: dict[str, Tensor]) -> None:
    """Configuration, tensors and tokenizer, as `transformers` writes them."""
    plain = type(stack.model).save_pretrained  # the stack's own guard is for those who do not know of it
    plain(stack.model, folder, state_dict={n: t.detach() for n, t in state.items()})
    if stack.given_tokenizer is not None:
        stack.given_tokenizer.save_pretrained(folder)


def blank(model: PreTrainedModel) -> PreTrainedModel:
    """What `from_pretrained` makes of the model's configuration, without numbers."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config))


def _refuse_strange_files(path: Path) -> None:
    """An earlier export is replaced; what somebody put beside its files is not thrown away."""
    if not (path / EXPORT).exists():
        return
    found = read_json(path / EXPORT)
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise BundleError(
            f"'{path / EXPORT}' is corrupted: it does not name its files", hint="choose another folder"
        )
    ours = {*files, EXPORT}
    strange = sorted({str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - ours)
    if strange:
        raise BundleError(
            f"'{path}' holds {strange[0]}, which is not of the checkpoint that stands there, so it is not overwritten",
            hint="choose another folder",
        )


def _with_new_tokens(stack: Stack) -> dict[str, Tensor]:
    """Embedding and head with the rows of tokens that plugins added, in stack order."""
    found: dict[str, Tensor] = {}
    tied: dict[int, Tensor] = {}
    for part in stack.ledger.all(DeltaPart):
        delta = part.module
        if not isinstance(delta, NewRows | NewLogits):
            continue
        name, weight = f"{part.path}.weight", part.place._parameters["weight"]
        assert weight is not None
        if isinstance(delta, NewLogits) and delta.rows:
            found[name] = tied[id(weight)]
            continue
        matrix = delta.matrix if isinstance(delta, NewLogits) else delta.R
        found[name] = tied[id(weight)] = widened(found.get(name, weight), delta.ids, matrix)
        if isinstance(delta, NewLogits) and part.place._parameters.get("bias") is not None:
            raise MergeError(
                f"{part.path} has a bias, and new tokens have none", hint="save a bundle instead"
            )
    return found


def check_plain(plain: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Refuse what `from_pretrained` would drop in silence: biases where the class has none, weights it ties."""
    own, kind = plain.state_dict(keep_vars=True), type(plain).__name__
    extra = sorted(state.keys() - own.keys())
    if extra:
        raise MergeError(
            f"{kind} has no parameter '{extra[0]}', so no plain checkpoint can hold it",
            hint="save a bundle instead",
        )
    first: dict[int, str] = {}
    for name, tensor in own.items():
        other = first.setdefault(id(tensor), name)
        if state[name] is not state[other] and not torch.equal(state[name], state[other]):
            raise MergeError(
                f"{kind} uses one matrix as {other} and {name}, and they differ after the merge",
                hint="save a bundle, or set tie_word_embeddings=False before the stack is built",
            )
