"""Options that select parts of a model (`targets`), held against what there can be in it, before it is loaded.

The table of an architecture says which roles there may be, and `config.json` how many layers. That an optional role is
there, that a plugin takes it, and what a regular expression finds, only the model tells: `peftx plan` asks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import peftx
from peftx.errors import TargetError
from peftx.kernel.anatomy.table import Table, Tower, table_for
from peftx.kernel.targets import Targets
from peftx_spec.errors import PeftxError
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.resolve import FOLDER, absolute
from peftx_spec.translate import Finding

if TYPE_CHECKING:
    from peftx.composition.registry import Registry

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configurations call their number of layers."""
BY_MODEL = ("re:", "other", "block")
"""How words begin that go by a model's own modules, and by no table."""


@dataclass(frozen=True)
class Possible:
    """A place that a model of the architecture may have."""

    role: str
    tower: str | None = None
    layer: int | None = None
    names: tuple[str, ...] = ()

    @property
    def in_all(self) -> bool:
        return self.layer is not None


def findings(data: Data, registry: Registry, folder: Path) -> Iterator[Finding]:
    """Selectors that match nothing in any model of this architecture; none where its configuration is not at hand."""
    told = _configuration(data, folder)
    table = table_for(str(told.get("model_type")))
    if table is None:  # its parts are inferred from the model
        return
    layers = _layers(table, told)
    places = list(_possible(table, layers or 1))
    for index, name, targets in _selectors(data, registry):
        words = [word for word in targets.text.split() if layers or not word.startswith("layers=")]
        if any(word.lstrip("!").startswith(BY_MODEL) for word in words):
            continue
        try:
            Targets(" ".join(words)).select(places, layers=layers or 1)
        except TargetError as error:
            yield Finding(
                ("stack", index, "with", name), error.message, suggestion=error.hint or "", code=error.code
            )


def _configuration(data: Data, folder: Path) -> dict[str, Any]:
    """The model's `config.json`; empty where none can be read, of which the run says more."""
    model = data.get("model")
    id = model if isinstance(model, str) else mapping_of(data, "model").get("id")
    if not isinstance(id, str):
        return {}
    if id.startswith("peftx:"):
        where = Path(peftx.__file__).parent / "assets" / id.removeprefix("peftx:")
    else:
        where = Path(absolute(id, folder.absolute()) if id.startswith(FOLDER) else id)
    try:
        found = json.loads((where / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _layers(table: Table, told: Data) -> int | None:
    """The number of layers of the one tower; None where there are more, or the file leaves it to a default."""
    if len(table.towers) > 1 or table.towers[0].config:
        return None
    return next((n for n in map(told.get, LAYERS) if isinstance(n, int) and n > 0), None)


def _possible(table: Table, layers: int) -> Iterator[Possible]:
    for tower in table.towers:
        for role in tower.around:
            yield Possible(role, tower.name)
        for role in _roles(tower):
            for layer in range(layers):
                yield Possible(role, tower.name, layer)
    for role in table.around:
        yield Possible(role)


def _roles(tower: Tower) -> dict[str, None]:
    """Roles inside of the layers, optional ones too, and the modules that are called for attention."""
    fused = (role for matrix in tower.fused for role in matrix.roles)
    stacked = (role for matrix in tower.stacked for role in matrix.roles)
    inside = [*tower.roles, *fused, *stacked]
    groups = {role.partition(".")[0] for role in inside}
    return dict.fromkeys(
        [*inside, *(role for role in (*tower.blocks, *tower.dispatch) if role not in groups)]
    )


def _selectors(data: Data, registry: Registry) -> Iterator[tuple[int, str, Targets]]:
    """Place of the entry, option and value of every selector that the stack states."""
    for index, entry in enumerate(list_of(data, "stack")):
        match entry:
            case {"use": str(use), "with": dict(options)}:
                pass
            case _:
                continue
        try:
            fields = registry.outline(use).Config.model_fields
        except PeftxError:  # a problem of its own
            continue
        for name, value in options.items():
            kind = fields[name].annotation if name in fields else None
            if isinstance(value, str) and Targets in (kind, *get_args(kind)):
                try:
                    yield index, name, Targets(value)
                except TargetError:  # malformed, which its type says
                    continue
