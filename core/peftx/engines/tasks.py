"""Tasks of lm-eval as their files tell: found and checked without running them, and without importing the library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from peftx.errors import DataError, UnsupportedError, nearest

PACKAGED = Path(__file__).parents[1] / "assets" / "tasks"
KEYS = frozenset({
    "dataset_kwargs", "dataset_name", "dataset_path", "description", "doc_to_choice", "doc_to_target",
    "doc_to_text", "fewshot_config", "fewshot_delimiter", "fewshot_split", "filter_list", "gen_prefix",
    "generation_kwargs", "metadata", "metric_list", "num_fewshot", "output_type", "repeats", "tag",
    "target_delimiter", "task", "task_alias", "test_split", "training_split", "validation_split",
})  # fmt: skip
"""What a task of one's own may say: data, and templates of text."""

_NAME = re.compile(rb"^(?:task|group): *[\"']?([\w.:+-]+)", re.MULTILINE)


class Code(str):
    """A function that a task names; its name alone."""


class _Loader(yaml.SafeLoader):
    """YAML that runs nothing: `!function` is a `Code`."""


_Loader.add_constructor("!function", lambda loader, node: Code(node.value))


@dataclass(frozen=True)
class TaskFile:
    """A task. `config`: of a task of one's own, all that its file and those that it includes say; else None."""

    name: str
    file: Path
    config: dict[str, Any] | None = field(default=None, compare=False)


def find_tasks(names: Iterable[str], include: Path | None = None) -> list[TaskFile]:
    """The tasks of these names: packaged ones, those of a folder, and the library's own.

    Raises:
        UnsupportedError: lm-eval is not installed. DataError: no such task or folder, or a task that would run code.
    """
    library = find_spec("lm_eval")
    if library is None or library.origin is None:
        raise UnsupportedError(
            "lm-eval needs lm_eval, which is not installed", hint="pip install 'peftx[eval]'"
        )
    own = _own(PACKAGED)
    for name, task in (_own(include) if include is not None else {}).items():
        if name in own:
            raise DataError(f"{task.file}: there is a packaged task '{name}' already", hint="another name")
        own[name] = task
    return [_found(name, own, Path(library.origin).parent / "tasks") for name in dict.fromkeys(names)]


def _found(name: str, own: dict[str, TaskFile], library: Path) -> TaskFile:
    if name in own:
        _check(own[name])
        return own[name]
    theirs = _library(library)
    if name not in theirs:
        raise DataError(
            f"lm-eval has no task '{name}'",
            hint=nearest(name, [*own, *theirs])
            or f"there are {', '.join(own)}, and {len(theirs):,} that need the Hub: lm-eval ls tasks",
        )
    return TaskFile(name, theirs[name])


@lru_cache(maxsize=1)
def _library(folder: Path) -> dict[str, Path]:
    """Names of the library's tasks and groups -> their files. Thousands of files, of which the names alone are read."""
    files = sorted(folder.rglob("*.yaml"))
    return {found.decode(): file for file in files for found in _NAME.findall(file.read_bytes())}


def _own(folder: Path) -> dict[str, TaskFile]:
    """The tasks of a folder, and of those in it. Raises DataError: no folder, or a file that is no YAML."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder of tasks '{folder}'", hint="include: a folder with lm-eval's YAML files"
        )
    found: dict[str, TaskFile] = {}
    for file in sorted(folder.rglob("*.yaml")):
        config = read_task(file)
        name = config.get("task")
        if not isinstance(name, str):
            continue  # a group, or what tasks include
        if name in found:
            raise DataError(
                f"{file}: {found[name].file} has a task '{name}' too", hint="give one another name"
            )
        found[name] = TaskFile(name, file, config)
    return found


def read_task(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task's file, with those that it includes; what it says itself comes first.

    Raises:
        DataError: it is no YAML mapping, or includes itself.
    """
    if file in above:
        raise DataError(f"{file} includes itself")
    try:
        config = yaml.load(file.read_bytes(), Loader=_Loader)  # a safe loader
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{file} is no task: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} is no task: it holds no mapping")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= read_task(file.parent / name, (*above, file))
    return merged | config


def _check(task: TaskFile) -> None:
    """Raises DataError for a task that would run code: a folder may be a stranger's."""
    assert task.config is not None
    way_out = "peftx export --format hf writes a checkpoint, on which lm-eval itself runs such tasks"
    code = next(_code(task.config), None)
    if code is not None:
        raise DataError(f"{task.file}: '{task.name}' would run code: {code}", hint=way_out)
    strange = sorted(map(str, task.config.keys() - KEYS))
    if strange:
        raise DataError(
            f"{task.file}: '{task.name}' says '{strange[0]}', which peftx does not read",
            hint=nearest(strange[0], KEYS) or way_out,
        )
    for name in local_files(task):
        if not name.is_file():
            raise DataError(
                f"{task.file}: there is no file '{name}'", hint="data_files are seen from the task's file"
            )


def _code(value: object) -> Iterator[str]:
    if isinstance(value, Code):
        yield f"!function {value}"
    elif isinstance(value, dict):
        if value.get("hf_evaluate"):
            yield "hf_evaluate, a metric of the Hub"
        for item in value.values():
            yield from _code(item)
    elif isinstance(value, list):
        for item in value:
            yield from _code(item)


def local_files(task: TaskFile) -> list[Path]:
    """The files of rows that a task names."""
    return [file for files in splits(task).values() for file in files]


def splits(task: TaskFile) -> dict[str, list[Path]]:
    """Split -> files, of a task whose rows lie beside it; empty of one whose rows are a data set of the Hub."""
    config = task.config or {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") not in ("json", "csv", "parquet") or files is None:
        return {}
    named = files if isinstance(files, dict) else {"train": files}
    return {
        split: [task.file.parent / name for name in ([found] if isinstance(found, str) else found)]
        for split, found in named.items()
    }
