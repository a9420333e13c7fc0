"""A stack's adapter as HF PEFT writes it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftx.composition.adapters import BARE, CONFIG, FULL, HEADS, PREFIX, TOKENS, WEIGHTS
from peftx.composition.members import default_id
from peftx.engines.files import replacing
from peftx.errors import AdapterError
from peftx.interop.importing import bare_parameter, entry_of, experts_of, kept_as, own_tensors
from peftx.kernel.members import Member
from peftx.kernel.parts import BasePart, DeltaPart, Part
from peftx.kernel.slots import Rows
from peftx.peft_format import INNER, PeftFormat, most_common
from peftx.stack import Stack

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
LOW_RANK = PeftFormat("LORA", lambda settings: {}, lambda config: {}, divided={"B": 0}, experts=True)
"""Of plugins whose deltas are s B A x, whatever they are called."""
ALL_HEADS = frozenset[str]().union(*HEADS.values())
Place = tuple[str, str]
"""Path of a module, and the parameter where PEFT adapts that and not the module."""


def to_peft(stack: Stack, folder: str | Path, *, id: str | None = None) -> Path:
    """Write an adapter as HF PEFT writes it, for PEFT, TRL, vLLM and others; of a classifier with the head.

    Args:
        id: the plugin; the only adapter of the stack if left out. Parts of the base that train whole go with it.

    Raises:
        PeftxError: PEFT has no such method, or cannot say all of it. Nothing is written then.
        BundleError: the folder holds something else than an adapter, or cannot be written; it is as it was.
    """
    member = stack.member(id) if id is not None else _only(stack)
    format = _format(stack, member)
    groups, kept = _read(stack, member, format)
    deltas = {part.path: part for part in stack.ledger.of(member.id, DeltaPart)}
    matrices = {
        place: _joined(place, pieces, member, format, deltas[place[0]]) for place, pieces in groups.items()
    }
    fields, tensors = _beside(stack, {path for path, _ in matrices})
    tensors |= kept | _named(matrices)
    task, head = _task(stack, {path for path, _ in matrices})
    plain = sorted(path for path, parameter in matrices if not parameter)
    config: dict[str, Any] = {
        "peft_type": format.type, "task_type": task, "base_model_name_or_path": stack.base_id,
        "inference_mode": True, "target_modules": plain or None,
        "target_parameters": [f"{p}.{parameter}" for p, parameter in matrices if parameter] or None,
        **format.settings(member.plugin.config), **_ranks(matrices), **fields,
        **format.of_deltas({path: part.module for path, part in deltas.items()}),
    }  # fmt: skip
    told = {name: value for name, value in config.items() if value is not None or name == "task_type"}
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors | head).items()}
    if not saved:
        raise AdapterError(
            f"{member.id}: nothing of it is beside the weights any more: what compressed the model folded it in",
            hint="export it before that, or the whole model: peftx merge",
        )
    if not matrices:  # the model stands in no tuner's model
        saved = {name.replace(PREFIX, BARE, 1): tensor for name, tensor in saved.items()}
    with replacing(Path(folder), marker=CONFIG) as place:
        (place / CONFIG).write_text(json.dumps(told, indent=1), "utf-8")
        save_file(saved, place / WEIGHTS, metadata={"format": "pt"})
    return Path(folder)


def _only(stack: Stack) -> Member:
    """The stack's adapter.

    Raises:
        PeftxError: there is none, or there are several.
    """
    found = [m for m in stack.members if any(stack.ledger.of(m.id)) and default_id(type(m.plugin)) != FULL]
    if len(found) != 1:
        names = ", ".join(f"'{m.id}'" for m in found) or "none"
        raise AdapterError(
            f"PEFT's format holds one adapter, and the stack has {names}", hint="name it by its id"
        )
    return found[0]


def _format(stack: Stack, member: Member) -> PeftFormat:
    """How the plugin says that PEFT writes it; else as a LoRA where all that it adds is of low rank."""
    for format in member.plugin.peft:
        if format.written(member.plugin.config):
            return format
    deltas = [part for part in stack.ledger.of(member.id) if not _is_head(part)]
    if deltas and all(isinstance(p, DeltaPart) and p.module.low_rank() is not None for p in deltas):  # type: ignore[operator]
        return LOW_RANK
    other = next(
        (p.key for p in deltas if not isinstance(p, DeltaPart) or p.module.low_rank() is None), "nothing"
    )  # type: ignore[operator]
    raise AdapterError(
        f"{member.id}: PEFT has no format for it: {other} is no low-rank update alone",
        hint="stack.model.eval() first, if it has dropout; else peftx merge, or a bundle",
    )


def _is_head(part: Part) -> bool:
    return isinstance(part, BasePart) and not ALL_HEADS.isdisjoint(part.key.split("."))


@dataclass(frozen=True)
class _Piece:
    """What one part says: all of a matrix, or of its rows."""

    tensors: dict[str, Tensor]
    """By the name in the file."""
    divided: dict[str, int]
    rows: Rows | None
    experts: int
    scale: float | None
    """s of a low-rank update."""


def _read(
    stack: Stack, member: Member, format: PeftFormat
) -> tuple[dict[Place, list[_Piece]], dict[str, Tensor]]:
    """The plugin's numbers: by the matrix that they belong to, and those that belong to none.

    Raises:
        PeftxError: a tensor that the format has no name for.
    """
    groups: dict[Place, list[_Piece]] = {}
    kept: dict[str, Tensor] = {}
    for part in stack.ledger.of(member.id):
        if _is_head(part):
            continue
        if not isinstance(part, DeltaPart):
            tensors = {n: t.detach() for n, t in own_tensors(part.module).items() if n not in format.own}
            tensors = format.write(part.module, tensors) if tensors else {}
            names = {own: format.kept.get(f"{kept_as(part)}.{own}", "") for own in tensors}
            _check(member, part, format, [own for own, name in names.items() if not name])
            kept |= {names[own]: tensor for own, tensor in tensors.items()}
            continue
        entry, scale = entry_of(part), getattr(part.module, "scale", None) if format.type == "LORA" else None
        if format is LOW_RANK:
            a, b, scale = part.module.low_rank()  # type: ignore[operator, misc]
            tensors, divided = {A: a, B: b}, {B: 0}
        elif bare_parameter(part) and not format.experts:
            raise AdapterError(
                f"{member.id}: {part.path} is no layer but holds a {bare_parameter(part)}, as experts and routers do, "
                f"which PEFT does not adapt by {default_id(type(member.plugin))}",
                hint="save it as a bundle, or merge it",
            )
        else:
            own = {n: t.detach() for n, t in own_tensors(part.module).items() if n not in format.own}
            if not format.fused and entry.rows is not None:
                raise AdapterError(
                    f"{member.id}: {part.path} is several matrices in one, and PEFT's format of {format.type} has one "
                    "update for all of it",
                    hint="save it as a bundle, or merge it",
                )
            own = format.write(part.module, own)
            _check(member, part, format, sorted(own.keys() - format.tensors.keys()))
            tensors = {format.tensors[name]: tensor for name, tensor in own.items()}
            divided = {format.tensors[name]: axis for name, axis in format.divided.items()}
        piece = _Piece(tensors, divided, entry.rows, experts_of(part), scale)
        groups.setdefault((part.path, bare_parameter(part)), []).append(piece)
    return groups, kept


def _check(member: Member, part: Part, format: PeftFormat, unknown: Sequence[str]) -> None:
    if unknown:
        raise AdapterError(
            f"{member.id}: PEFT's format of {format.type} has no place for {part.key}.{unknown[0]}",
            hint="save it as a bundle, or merge it",
        )


def _joined(
    place: Place, pieces: list[_Piece], member: Member, format: PeftFormat, part: DeltaPart
) -> _Piece:
    """The roles of a fused matrix as one. Low-rank updates with factors of their own lie beside each other."""
    first = pieces[0]
    if first.rows is None:
        return first
    front = int(bool(first.experts))
    found: dict[str, Tensor] = {}
    same = {
        name: all(torch.equal(piece.tensors[name], first.tensors[name]) for piece in pieces)
        for name in first.tensors if name not in first.divided
    }  # fmt: skip
    together = all(same.values()) and len({piece.scale for piece in pieces}) == 1
    if not together and not {A, B} <= first.tensors.keys():
        name = next((name for name, equal in same.items() if not equal), A)
        raise AdapterError(
            f"{member.id}: the roles of the fused matrix {place[0]} have each a {name} of their own, and PEFT's format "
            "has one for all",
            hint="save it as a bundle, or merge it",
        )
    scale = 1.0 if not together else first.scale
    ranks = [piece.tensors[A].shape[-2] if not together else 0 for piece in pieces]
    neutral = {format.tensors[name]: start for name, start in format.neutral.items()}
    for name, tensor in first.tensors.items():
        if name not in first.divided:
            found[name] = tensor if together else torch.cat([p.tensors[name] for p in pieces], front)
            continue
        axis, beside = first.divided[name] + front, not together and name == B
        shape = list(tensor.shape)
        shape[axis] = first.rows.total
        if beside:
            shape[-1] = sum(ranks)
        whole = neutral[name](_weight(part)).to(tensor) if name in neutral else tensor.new_zeros(shape)
        for index, piece in enumerate(pieces):
            assert piece.rows is not None
            if not beside:
                factor = (piece.scale or 1.0) if not together and name == BIAS else 1.0
                whole = piece.rows.put(whole, piece.tensors[name] * factor, axis)
                continue
            wide = torch.zeros_like(piece.rows.take(whole, axis))
            before = sum(ranks[:index])
            wide[..., before : before + ranks[index]] = piece.tensors[name] * (piece.scale or 1.0)
            whole = whole + piece.rows.put(torch.zeros_like(whole), wide, axis)
        found[name] = whole
    return _Piece(found, first.divided, None, first.experts, scale)


def _weight(part: DeltaPart) -> Tensor:
    """Of the matrix on which a part stands, [out, in]."""
    entry = entry_of(part)
    held = part.place._parameters.get(entry.parameter)
    weight = (part.place.weight if held is None else held).detach().float()  # type: ignore[operator, union-attr]
    return weight.mT if entry.transposed else weight


def _named(matrices: dict[Place, _Piece]) -> dict[str, Tensor]:
    """Tensors under their names in the file."""
    found: dict[str, Tensor] = {}
    further = Counter(path for path, _ in matrices)
    for (path, _), piece in matrices.items():
        further[path] -= 1
        inner = INNER * further[path]  # the first parameter is wrapped by the second
        for name, tensor in piece.tensors.items():
            if piece.experts:
                tensor = tensor.permute(1, 2, 0) if name in piece.divided else tensor
                tensor = (
                    tensor.reshape(tensor.shape[0], -1) if name in piece.divided else tensor.flatten(0, 1)
                )
            found[f"{PREFIX}{path}{inner}.{name}"] = tensor
    return found


def _ranks(matrices: dict[Place, _Piece]) -> dict[str, Any]:
    """Ranks and alphas of low-rank updates, PEFT's scale being alpha / r."""
    scaled = {
        ".".join(filter(None, place)): piece for place, piece in matrices.items() if piece.scale is not None
    }
    if not scaled:
        return {}
    ranks = {path: _rank(piece) for path, piece in scaled.items()}
    alphas = {path: piece.scale * ranks[path] for path, piece in scaled.items() if piece.scale is not None}
    r, alpha = most_common(ranks), most_common(alphas)
    return {
        "r": r, "lora_alpha": alpha, "use_rslora": False,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
    }  # fmt: skip


def _rank(piece: _Piece) -> int:
    down = next(t for name, t in piece.tensors.items() if name in (A, "lora_embedding_A"))
    return down.shape[-2]


def _beside(stack: Stack, adapted: set[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What of the base trains as it is, which PEFT saves with any method."""
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    every = list(stack.model.named_parameters(remove_duplicate=False))
    for member in stack.members:
        if default_id(type(member.plugin)) != FULL:
            continue
        tokens: Sequence[int] = getattr(member.plugin.config, "tokens", ())
        biases = getattr(member.plugin.config, "parameters", "all") == "bias"
        for part in stack.ledger.of(member.id, BasePart):
            path, own = part.key, part.module._parameters
            if tokens:
                fields.setdefault("trainable_token_indices", {})[path] = list(tokens)
                tensors[f"{PREFIX}{path}.{TOKENS}"] = own["weight"][list(tokens)]  # type: ignore[index]
            elif biases:
                fields["bias"] = "all" if fields.get("bias") == "all" or path not in adapted else "lora_only"
                inner = INNER if path in adapted else ""
                tensors[f"{PREFIX}{path}{inner}.bias"] = own["bias"]  # type: ignore[assignment]
            else:
                fields.setdefault("modules_to_save", []).append(path)
                shared = {
                    f"{PREFIX}{name}": p.detach().clone()
                    for n, q in own.items() if q is not None
                    for name, p in every if p is q and name != f"{path}.{n}"
                }  # fmt: skip
                if shared:  # PEFT has a copy for each then
                    fields["ensure_weight_tying"] = True
                    tensors |= shared
                tensors |= {f"{PREFIX}{path}.{n}": p for n, p in own.items() if p is not None}
    return fields, tensors


def _task(stack: Stack, adapted: set[str]) -> tuple[str | None, dict[str, Tensor]]:
    """PEFT's name of what the model does, by which it wraps it (None: plainly), and the head that goes with it."""
    from transformers.models.auto import modeling_auto as auto

    tasks = {
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
    kind = type(stack.model).__name__
    task = next((task for task, names in tasks.items() if kind in names.values()), None)
    if task not in HEADS:
        return task, {}
    head = {PREFIX + n: p for n, p in stack.model.named_parameters() if HEADS[task] & set(n.split("."))}
    # PEFT's wrapper does not go with an adapted head.
    touched = any(HEADS[task] & set(path.split(".")) for path in adapted)
    return (None, {}) if touched or not head else (task, head)
