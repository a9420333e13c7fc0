"""A guess at a table, from the structure of a model that has none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import ArchitectureError
from peftx.kernel.anatomy.table import Stacked, Table, Tower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def layer_stacks(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the lists of layers: outermost lists whose members hold matrices and are no lone linear layers."""
    found: list[str] = []
    for name, module in modules.items():
        if (
            not isinstance(module, nn.ModuleList)
            or not len(module)
            or name.startswith(tuple(f"{f}." for f in found))
        ):
            continue
        if all(_holds_matrices(member) for member in module):
            found.append(name)
    return found


def _holds_matrices(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear | Conv1D | nn.ModuleList):
        return False
    return any(isinstance(m, nn.Linear | Conv1D) or _stacked(m) for m in layer.modules())


def _stacked(module: nn.Module) -> list[str]:
    """Names of parameters that hold one matrix for each of several experts."""
    if isinstance(module, nn.Conv1d):
        return []
    return [
        name
        for name, p in module._parameters.items()
        if p is not None and p.ndim == 3 and min(p.shape[1:]) > 1
    ]


def infer(model: PreTrainedModel, modules: dict[str, nn.Module]) -> Table:
    """Guess a table: each list of layers is a tower; linear layers, and experts, get roles from their names, read off
    every kind of layer that a tower has.

    Raises:
        ArchitectureError: no list of layers.
    """
    stacks = layer_stacks(modules)
    if not stacks:
        raise ArchitectureError(
            f"no layers found in {type(model).__name__} (model_type '{model.config.model_type}')",
            hint="publish a table under the entry point group 'peftx.anatomies' (see CONTRIBUTING.md)",
        )
    head = next((n for n, m in modules.items() if m is model.get_output_embeddings() and m is not None), None)
    speaks = _speaker(stacks, model, head)
    towers: list[Tower] = []
    for path in stacks:
        name = "decoder" if path == speaks else _tower_name(path)
        same = sum(tower.name.rstrip("0123456789") == name for tower in towers)
        towers.append(_tower(f"{name}{same + 1}" if same else name, path, stacks, modules))
    outside = [
        n
        for n, m in modules.items()
        if isinstance(m, nn.Embedding) and not n.startswith(tuple(f"{s}." for s in stacks))
    ]
    around = {f"embedding{'.' + name.split('.')[-1] + (str(i) if i > 1 else '') if i else ''}": name
              for i, name in enumerate(outside)}  # fmt: skip
    return Table(model.config.model_type, tuple(towers), around | ({"head": head} if head else {}))


def _speaker(stacks: list[str], model: PreTrainedModel, head: str | None) -> str | None:
    """The list of layers that generates, if one does: a decoder, a language model, else the longest."""
    for pattern in (r"(^|\.)decoder\.", r"language_model|text_model"):
        found = [s for s in stacks if re.search(pattern, f"{s}.")]
        if found:
            return found[0]
    if head is None or model.config.is_encoder_decoder:
        return None
    return max(stacks, key=lambda s: (len(model.get_submodule(s)), -len(s)))  # type: ignore[arg-type]


_TOWERS = (("vision", r"vision|visual|image"), ("audio", r"audio|speech"), ("text", r"text|language"),
           ("decoder", "decoder"))  # fmt: skip


def _tower_name(path: str) -> str:
    return next((name for name, pattern in _TOWERS if re.search(pattern, path)), "encoder")


def _tower(name: str, layers: str, stacks: list[str], modules: Mapping[str, nn.Module]) -> Tower:
    """Roles of the modules of all layers, each optional, since layers may differ."""
    roles: dict[str, str] = {}
    stacked: dict[tuple[str, str], Stacked] = {}
    blocks: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for full, module in modules.items():
        if not full.startswith(f"{layers}."):
            continue
        _, _, path = full.removeprefix(f"{layers}.").partition(".")
        if not path or f"{path}?" in roles.values():
            continue
        kind = type(module).__name__
        if isinstance(module, nn.Linear | Conv1D):
            role = _role(path, routes=_routes(path, modules, full))
            role = role if role is not None and not taken[role] else f"linear.{path.replace('.', '-')}"
            taken[role] += 1
            roles[role] = f"{path}?"
        elif re.search("norm", kind, re.IGNORECASE):
            roles[f"norm.{path.replace('.', '-')}"] = f"{path}?"
        elif (
            re.search(r"attention$", kind, re.IGNORECASE)
            and "attention" not in blocks
            and not _CROSS.search(path)
        ):
            blocks["attention"] = f"{path}?"
        for parameter in _stacked(module):
            stacked[path, parameter] = Stacked(f"{path}?", parameter, (f"experts.{parameter}",))
    return Tower(name, layers, roles, stacked=tuple(stacked.values()), blocks=blocks)


_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention", re.IGNORECASE)


def _role(path: str, *, routes: bool) -> str | None:
    if routes:
        return "router"
    role = next((role for pattern, role in _NAMES if re.search(pattern, path)), None)
    if role is not None and role.startswith("attention.") and _CROSS.search(path):
        return f"cross_{role}"
    return role


def _routes(path: str, modules: Mapping[str, nn.Module], full: str) -> bool:
    """Is a layer the router of experts that stand beside it."""
    if not re.search(r"(^|\.)(router|gate|wg)(\.|$)", path):
        return False
    parent = full.rpartition(".")[0]
    return any("expert" in name and name.startswith(f"{parent}.") for name in modules)
