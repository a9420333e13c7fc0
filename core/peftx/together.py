"""Several bundles, each a stack of its own, over bases that lie in memory once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.composition.adapters import is_adapter, read_adapter
from peftx.composition.registry import Registry
from peftx.copies import sharing
from peftx.engines.bundle.manifest import MANIFEST, read_manifest
from peftx.engines.bundle.surroundings import TOKENIZER_FOLDER, cast_buffers, computed_buffers
from peftx.engines.models import lasting, load_model, usable_device
from peftx.errors import BundleError, UsageError
from peftx.loading import check_tokenizer, load
from peftx.sharing import located
from peftx.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Place:
    """Where the base of a bundle lies, and what it is read as; equal ones are one base.

    Attributes:
        buffers: dtypes of its tables of positions.
    """

    id: str
    dtype: str = "auto"
    buffers: tuple[tuple[str, str], ...] = ()


class Bases:
    """Bases, each read when the first bundle asks for it.

    Args:
        model: where the base lies now, for bundles that name another place. device, registry, trust_remote_code: as in
            `peftx.load`.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        device: str = "cpu",
        registry: Registry | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.device, self.registry = model, usable_device(device), registry
        self.trust_remote_code = trust_remote_code
        self._read: dict[Place, tuple[PreTrainedModel, PreTrainedTokenizerBase | None]] = {}
        self._settled = False

    def settle(self) -> None:
        """Read no other base from now on: who names a bundle does not say where its base lies."""
        self._settled = True

    def stack(self, target: str | Path) -> Stack:
        """The stack of a bundle (its folder, or `hub:...`), of an adapter of HF PEFT, or of a plain model.

        Raises:
            BundleError: it is missing or damaged, or of another base, or of one that is not here once they are settled.
            PeftxError: an adapter that names no base.
        """
        target = located(target)
        folder, place = target.expanduser(), self._place(target)
        more = {"registry": self.registry, "trust_remote_code": self.trust_remote_code}
        if place is None:
            return load(folder, device=self.device, **more)  # type: ignore[arg-type]
        if self._settled and place.id not in {known.id for known in self._read}:
            raise BundleError(
                f"'{target}' is of '{place.id}', and no such base is served here",
                hint=f"name it where the server starts: peftx serve base={place.id}",
            )
        base, tokenizer = self._base(place)
        tokenizer = copy.deepcopy(
            tokenizer
        )  # its settings change while it works, and each stack has a thread
        if not _has_plugins(folder):
            return Stack(sharing(base), [], tokenizer=tokenizer)
        own = (folder / TOKENIZER_FOLDER).exists()
        if not own and (folder / MANIFEST).exists():
            check_tokenizer(tokenizer, read_manifest(folder).base, folder, of=place.id)
        return load(folder, model=sharing(base), tokenizer=None if own else tokenizer, **more)  # type: ignore[arg-type]

    def _place(self, target: str | Path) -> Place | None:
        """None of a bundle that holds its base itself."""
        folder = Path(target).expanduser()
        if (folder / MANIFEST).exists():
            base = read_manifest(folder).base
            if base.contained is not None:
                return None
            return Place(lasting(self.model or base.id), base.dtype, tuple(sorted(base.buffers.items())))
        if is_adapter(folder):
            known = self.model or read_adapter(folder).base
            if known is None:
                raise UsageError(f"'{target}' does not say which model it is for", hint="name it: --model ID")
            return Place(lasting(known))
        return Place(lasting(str(folder)))

    def _base(self, place: Place) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        if place not in self._read:
            model, tokenizer = load_model(
                place.id, dtype=place.dtype, device=self.device, trust_remote_code=self.trust_remote_code
            )
            cast_buffers(model, dict(place.buffers))
            dtype, buffers = str(model.dtype).removeprefix("torch."), computed_buffers(model)
            known = Place(place.id, dtype, tuple(sorted(buffers.items())))  # what `auto` came to
            self._read[place] = self._read.setdefault(known, (model, tokenizer))
        return self._read[place]


def _has_plugins(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or is_adapter(folder)


def load_together(
    targets: Mapping[str, str | Path], *, model: str | None = None, device: str = "cpu"
) -> dict[str, Stack]:
    """Stacks by name, over bases that they share: what each adds is all that it costs.

    Raises:
        BundleError: one is missing or damaged, or of another base.
    """
    bases = Bases(model=model, device=device)
    return {name: bases.stack(target) for name, target in targets.items()}
