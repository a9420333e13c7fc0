"""A bundle or a model on the command line becomes a stack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.errors import BundleError, UsageError
from peftx_spec.errors import nearest

if TYPE_CHECKING:
    from peftx.stack import Stack


def open_stack(
    target: str, *, model: str | None = None, device: str = "auto", trust_remote_code: bool = False
) -> Stack:
    """The stack of a bundle, or a plain model as a stack without plugins.

    Args:
        target: a bundle's folder, hub:owner/name of one, peftx:tiny, a model's folder, or a model's hub id.
        model: the bundle's base model, where it lies elsewhere now.
        trust_remote_code: run Python code that the model brings along.

    Raises:
        PeftxError: no such bundle or model, or a bundle that does not fit its base.
    """
    from peftx.sharing import located

    # A Hub that does not answer, and a folder that is not there, are told of before torch is imported.
    target = str(located(target))
    is_bundle = _is_bundle(target, model)
    from peftx.loading import load
    from peftx.stack import Stack

    if is_bundle:
        folder = os.path.expanduser(target)
        return load(folder, model=model, device=_device(device), trust_remote_code=trust_remote_code)
    return Stack(target, device=device, trust_remote_code=trust_remote_code)


def chosen(target: str | None, adapter: str | None) -> str:
    """What to open: a bundle or model, or an adapter of HF PEFT in its place.

    Raises:
        PeftxError: none of both or both, or no adapter there; before torch is imported.
    """
    from peftx.composition.adapters import read_adapter
    from peftx.engines.files import naming
    from peftx.sharing import located

    if adapter is None:
        if target is None:
            raise UsageError("no bundle or model is named", hint="a folder, peftx:tiny, or --adapter DIR")
        return target
    if target is not None:
        raise UsageError(
            f"--adapter stands in the place of '{target}'", hint=f"its base is --model: --model {target}"
        )
    folder = os.path.expanduser(located(adapter))
    with naming(adapter):
        read_adapter(folder)
    return folder


def check_there(target: str, *, model: str | None = None) -> None:
    """Look for a bundle or model on this machine before what reads it is imported; the Hub is not asked.

    Raises:
        PeftxError: as `open_stack`, of a target that is not there.
    """
    from peftx.engines.hub import is_hub

    if not is_hub(target):
        _is_bundle(target, model)


def check_bundle(target: str) -> None:
    """The same where it must be a bundle."""
    from peftx.engines.files import check_there
    from peftx.engines.hub import is_hub

    if not is_hub(target):
        check_there(Path(os.path.expanduser(target)), "manifest.json")


class Opener:
    """Opens several, over bases that they share; arguments as of `open_stack`."""

    def __init__(
        self, *, model: str | None = None, device: str = "auto", trust_remote_code: bool = False
    ) -> None:
        from peftx.together import Bases

        self.model = model
        self.bases = Bases(model=model, device=_device(device), trust_remote_code=trust_remote_code)

    def stack(self, target: str) -> Stack:
        """Raises PeftxError as `open_stack` does."""
        from peftx.sharing import located

        target = str(located(target))
        _is_bundle(target, self.model)
        return self.bases.stack(os.path.expanduser(target))


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_bundle(target: str, model: str | None) -> bool:
    """Or a plain model.

    Raises:
        PeftxError: neither, or a base is named for a plain model.
    """
    from peftx.engines.checkpoints import TINY

    folder = Path(os.path.expanduser(target))  # pathlib's own raises for an unknown user
    if (folder / "manifest.json").exists() or (folder.is_dir() and not (folder / "config.json").exists()):
        return True
    if model is not None:
        raise UsageError(
            f"--model names the base of a bundle, and '{target}' is none", hint="leave --model out"
        )
    looks_local = target.startswith((".", "/", "~")) or target.count("/") > 1 or "/" not in target
    if not target.startswith("peftx:") and not folder.exists() and looks_local:
        near = [str(p.parent) for p in folder.absolute().parent.glob("*/manifest.json")]
        names = [Path(path).name for path in near]
        hint = nearest(folder.name, names) or (
            f"bundles there: {', '.join(names)}" if names else f"or {TINY}"
        )
        raise BundleError(f"there is no bundle or model '{target}'", hint=hint)
    return False
