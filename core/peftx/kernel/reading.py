"""What layers give while the model runs, for plugins that start from it, or measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from peftx.errors import ArchitectureError
from peftx.kernel.anatomy.site import Site


def check_output(site: Site, *, owner: str) -> None:
    """Raises ArchitectureError where a site's output is not to be seen: another module uses its weight itself."""
    if site.kind == "experts" or site.read:
        raise ArchitectureError(
            f"{owner}: another module uses the weight of {site.path} itself, so what it gives is not to be seen",
            hint=f"leave it out of targets: '!{site.role}'",
        )


@contextmanager
def outputs_of(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[dict[str, Tensor]]:
    """Inside, every call of the model leaves in a mapping what each of these layers gave, under its name: the features
    of its role [..., out], with all that stands on the layer. Of several calls of a layer the first one's, which the
    model makes: those that follow are of plugins, for rows of their own."""
    given: dict[str, Tensor] = {}
    with ExitStack() as exits:
        exits.callback(model.register_forward_pre_hook(lambda module, inputs: given.clear()).remove)
        for name, site in sites.items():
            handle = site.module.register_forward_hook(_noting(given, name, site))
            exits.callback(handle.remove)
        yield given


def _noting(given: dict[str, Tensor], name: str, site: Site) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        first: Tensor = output[0] if isinstance(output, tuple) else output
        given.setdefault(name, first if site.rows is None else site.rows.take(first))

    return note
