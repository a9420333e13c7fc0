"""From a `model_type` to its table; and a guess from structure where there is none."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftx.anatomy.table import Table, Tower
from peftx.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = "peftx.anatomies"

_NAMES = (
    (r"(^|\.)(q_proj|query|q|q_lin|wq)$", "attention.q"),
    (r"(^|\.)(k_proj|key|k|k_lin|wk)$", "attention.k"),
    (r"(^|\.)(v_proj|value|v|v_lin|wv)$", "attention.v"),
    (r"attn.*\.(o_proj|out_proj|o|dense|c_proj|proj|out_lin|wo)$", "attention.o"),
    (r"attention.*\.(o_proj|out_proj|o|dense|c_proj|proj|out_lin|wo)$", "attention.o"),
    (r"(^|\.)(gate_proj|w1|gate)$", "mlp.gate"),
    (r"(^|\.)(up_proj|fc1|fc_in|c_fc|w3|lin1|wi|dense_h_to_4h|linear_1|intermediate\.dense)$", "mlp.up"),
    (r"(^|\.)(down_proj|fc2|fc_out|c_proj|w2|lin2|wo|dense_4h_to_h|linear_2|output\.dense)$", "mlp.down"),
)


@cache
def _tables() -> dict[str, Table]:
    """All tables by `model_type`: the core's own, then those of entry points, which win."""
    import peftx.anatomy.tables as package

    found = [
        importlib.import_module(f"{package.__name__}.{info.name}").TABLE
        for info in pkgutil.iter_modules(package.__path__)
    ]
    found += [point.load() for point in entry_points(group=GROUP)]
    return {name: table for table in found for name in (table.model_type, *table.same_as)}


def table_for(model_type: str) -> Table | None:
    """The table of an architecture, or None."""
    return _tables().get(model_type)


def known_types() -> list[str]:
    """All `model_type`s with a table."""
    return sorted(_tables())


def infer(model: PreTrainedModel, modules: dict[str, nn.Module]) -> Table:
    """Guess a table: the longest list of equal layers is the tower; linear layers get roles from their names.

    Raises:
        ArchitectureError: no list of equal layers.
    """
    lists = [
        (len(module), name)
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(m) for m in module}) == 1
        and any(isinstance(m, nn.Linear | Conv1D) for m in module.modules())
    ]  # fmt: skip
    if not lists:
        raise ArchitectureError(
            f"no layers found in {type(model).__name__} (model_type '{model.config.model_type}')",
            hint="publish a table under the entry point group 'peftx.anatomies' (see CONTRIBUTING.md)",
        )
    layers = max(lists, key=lambda pair: (pair[0], -len(pair[1])))[1]
    first = f"{layers}.0."
    roles: dict[str, str] = {}
    blocks: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for name, module in modules.items():
        if not name.startswith(first):
            continue
        path = name.removeprefix(first)
        if isinstance(module, nn.Linear | Conv1D):
            role = next((role for pattern, role in _NAMES if re.search(pattern, path)), None)
            role = role if role is not None and not taken[role] else f"linear.{path.replace('.', '-')}"
            taken[role] += 1
            roles[role] = f"{path}?"
        elif re.search("norm", type(module).__name__, re.IGNORECASE):
            roles[f"norm.{path.replace('.', '-')}"] = f"{path}?"
        elif re.search(r"attention$", type(module).__name__, re.IGNORECASE) and "attention" not in blocks:
            blocks["attention"] = path
    around = {
        f"embedding{'.' + name.split('.')[-1] if i else ''}": name
        for i, (name, module) in enumerate(
            (n, m) for n, m in modules.items() if isinstance(m, nn.Embedding) and not n.startswith(layers)
        )
    }
    head = next((n for n, m in modules.items() if m is model.get_output_embeddings() and m is not None), None)
    name = "decoder" if head is not None and not model.config.is_encoder_decoder else "encoder"
    tower = Tower(name, layers, roles, blocks=blocks, around=around)
    return Table(model.config.model_type, (tower,), {"head": head} if head else {})
