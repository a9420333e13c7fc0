"""`--set lora.rank=4,8` asks for a comparison: what to say, with a file that does it."""

from __future__ import annotations

import copy

from peftx_spec.dumper import dump_plain
from peftx_spec.loader import parse_value
from peftx_spec.models import HIGHER_IS_BETTER
from peftx_spec.overrides import entry_ids
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.scalars import ScalarError
from peftx_spec.trainer_names import our_target
from peftx_spec.training import TrainSpec

POINTER = "one run takes one value; 'peftx compare' tries several (docs/compare.md)"
_SWEPT = {"train.learning_rate": "learning_rate", "train.seed": "seeds"}
"""What a comparison has a list for."""


def several(override: str) -> tuple[str, list[object]] | None:
    """The target and the numbers of `target=4,8`; None for any other override."""
    target, _, raw = override.partition("=")
    parts = raw.split(",")
    if len(parts) < 2:
        return None
    try:
        values = [parse_value(part) for part in parts if part.strip()]
    except ScalarError:
        return None
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return (our_target(target.strip()), values) if numbers and len(values) > 1 else None


def pointer(data: Data, target: str, values: list[object]) -> str:
    """What to do in place of it: the file of a comparison, where this pipeline makes one."""
    file = comparison(data, target, values)
    if file is None:
        return POINTER
    how = "for several write this to compare.yaml, and run 'peftx compare compare.yaml'"
    return f"one run takes one value; {how}:\n{file}"


def comparison(data: Data, target: str, values: list[object]) -> str | None:
    """The comparison of a pipeline's stack over the values of one option, as YAML; None where there is no metric that
    it could choose by, or steps are what is varied."""
    sources = mapping_of(data, "data")
    names = [next(iter(item), None) if isinstance(item, dict) else item for item in list_of(data, "evaluate")]
    metrics = [name for name in names if name in HIGHER_IS_BETTER]
    if target == "train.steps" or not metrics or not ({"eval", "holdout"} & sources.keys()):
        return None
    defaults = TrainSpec()
    train = {key: value for key, value in mapping_of(data, "train").items() if f"train.{key}" != target}
    steps, rate = train.pop("steps", defaults.steps), train.pop("learning_rate", defaults.learning_rate)
    for key in ("seed", "checkpoint_every"):
        train.pop(key, None)
    base: Data = {"model": data.get("model"), "data": sources, "train": train, "evaluate": metrics}
    method: Data = {"stack": [_without(item, target) for item in list_of(data, "stack")]}
    compare: Data = {"base": {key: value for key, value in base.items() if value}, "budget": {"steps": steps},
                     "seeds": [0, 1, 2], "learning_rate": [rate]}  # fmt: skip
    if target in _SWEPT:
        compare[_SWEPT[target]] = values
    else:
        method["grid"] = {target: values}
    name = "-".join(entry_ids(data)) or "base"
    return dump_plain({"peftx": 1, "compare": {**compare, "methods": {name: method}}}).rstrip("\n")


def _without(item: object, target: str) -> object:
    """A stack's entry without the option that is varied."""
    id, _, option = target.partition(".")
    if not isinstance(item, dict) or item.get("id", item.get("use")) != id:
        return item
    entry = copy.deepcopy(item)
    options = entry.get("with")
    if isinstance(options, dict):
        options.pop(option, None)
        if not options:
            del entry["with"]
    return entry
