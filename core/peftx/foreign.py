"""What other libraries do to a model that no stack can stand on: refused before anything is put there."""

from __future__ import annotations

from torch import nn

from peftx.errors import ConflictError, ModelError


def refuse_wrapped(model: nn.Module, what: str) -> None:
    """Raises ConflictError where HF PEFT was put on a model that carries a stack, so that `what` cannot hold it all."""
    path = next((name for name, module in model.named_modules() if _wraps(module)), None)
    if path is not None:
        raise ConflictError(
            f"HF PEFT was put on the stack's model ({path}), and {what} would not hold what it trains",
            hint="peft_model.save_pretrained(folder) writes that apart; peft_model.unload() gives the stack back",
        )


def _wraps(module: nn.Module) -> bool:
    """Is this a layer of HF PEFT around another."""
    return "base_layer" in module._modules and hasattr(module, "active_adapters")


def refuse_foreign(model: object) -> None:
    """Look a model over, in one walk, since every stack does.

    Raises:
        ConflictError: HF PEFT has put layers of its own around the model's, which a stack would pass by and freeze.
        ModelError: some weights are offloaded, so that they are not there to be adapted, merged or saved.
    """
    if not isinstance(model, nn.Module):
        return  # which is refused as no model
    away = there = 0
    for module in model.modules():
        if _wraps(module):
            path = next(name for name, other in model.named_modules() if other is module)
            raise ConflictError(
                f"HF PEFT stands on the model ({path}), and a stack would pass its layers by and freeze them",
                hint="peft_model.unload() gives the base back; `use: peft` with `path:` puts it into the stack",
            )
        for parameter in module._parameters.values():
            if parameter is not None:
                away, there = away + parameter.is_meta, there + (not parameter.is_meta)
    if away and there:  # all of them: a plan, or a base that a bundle is to fill
        first = next(name for name, parameter in model.named_parameters() if parameter.is_meta)
        raise ModelError(
            f"{first} and {away - 1} further weights are offloaded (device_map), and plugins cannot act on them",
            hint="load the model onto one device, as with device_map={'': 'cpu'}",
        )
