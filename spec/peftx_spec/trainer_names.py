"""The Trainer's own names for keys of `train`: each is taken in the place of ours, in specs and in Python alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from peftx_spec.loader import Document, Fault
from peftx_spec.problems import Path

TRAINER_NAMES = {
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "schedule",
    "save_steps": "checkpoint_every",
}
"""Name of a field of `transformers.TrainingArguments` -> our key that says the same."""
_Value = TypeVar("_Value")


def our_name(name: str) -> str:
    """`max_steps` as `steps`; any other name as it is."""
    return TRAINER_NAMES.get(name, name)


def our_target(target: str) -> str:
    """`train.max_steps` as `train.steps`."""
    head, dot, name = target.partition(".")
    return f"train.{our_name(name)}" if dot and head == "train" else target


def with_our_names(settings: Mapping[str, _Value]) -> tuple[dict[str, _Value], list[tuple[str, str]]]:
    """The settings by our names, and what is given by both: pairs of ours and the Trainer's. Ours holds there."""
    twice = [(ours, theirs) for theirs, ours in TRAINER_NAMES.items() if {ours, theirs} <= settings.keys()]
    left_out = {theirs for _, theirs in twice}
    return {our_name(key): value for key, value in settings.items() if key not in left_out}, twice


def by_our_names(document: Document, faults: list[Fault]) -> tuple[Document, list[Fault]]:
    """A document whose sections `train` say all by our names, at the places where theirs stand; what both say is a
    fault."""
    data: Any = document.data
    found = list(faults)
    places: dict[Path, Path] = {}
    for at in _sections(data):
        parent = data
        for part in at[:-1]:
            parent = parent[part]
        given = parent[at[-1]]
        parent[at[-1]], twice = with_our_names(given)
        for ours, theirs in twice:
            first, second = sorted(
                (document.position((*at, name), key=True), name) for name in (ours, theirs)
            )
            message = (
                f"'{ours}' and '{theirs}' are names of one thing: '{first[1]}' stands at {first[0]}, "
                f"'{second[1]}' at {second[0]}"
            )
            found.append(
                Fault(
                    (*at, ours),
                    document.problem(
                        message, second[0], (*at, second[1]), suggestion="leave one of them out"
                    ),
                )
            )
        places |= {
            (*at, name): (*at, our_name(name))
            for name in given
            if name in TRAINER_NAMES and (our_name(name), name) not in twice
        }
    if not places:
        return document, found

    def moved(path: Path) -> Path:
        begin = next((path[:end] for end in range(1, len(path) + 1) if path[:end] in places), ())
        return (*places[begin], *path[len(begin) :]) if begin else path

    renamed = replace(
        document,
        keys={moved(path): position for path, position in document.keys.items()},
        values={moved(path): position for path, position in document.values.items()},
        variables={moved(path): names for path, names in document.variables.items()},
        written={ours: str(theirs[-1]) for theirs, ours in places.items()},
    )
    return renamed, [Fault(moved(fault.path), fault.problem) for fault in found]


def _sections(data: Any) -> Iterator[Path]:
    """Where settings of training stand: in a pipeline and its stages, in the base of a comparison or of a search."""
    if isinstance(data.get("train"), dict):
        yield ("train",)
    yield from _stages(data.get("run"), ("run",))
    for key in ("compare", "search"):
        base = data[key].get("base") if isinstance(data.get(key), dict) else None
        if isinstance(base, dict) and isinstance(base.get("train"), dict):
            yield (key, "base", "train")


def _stages(run: object, at: Path) -> Iterator[Path]:
    for index, stage in enumerate(run if isinstance(run, list) else ()):
        if isinstance(stage, dict) and isinstance(stage.get("train"), dict):
            yield (*at, index, "train")
        if isinstance(stage, dict) and isinstance(stage.get("repeat"), dict):
            yield from _stages(stage["repeat"].get("run"), (*at, index, "repeat", "run"))
