"""What no single field can see: unknown plugins, their options, ids, stages, metrics, data that is not there.

Every check reads the raw data and skips what is malformed, so that it speaks also where something else is
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from peftx_spec.catalogue import Catalogue
from peftx_spec.errors import PeftxError, nearest
from peftx_spec.models import FORMATS, LM_EVAL, METRIC_FORMATS, METRICS
from peftx_spec.overrides import RESERVED_IDS, entry_ids
from peftx_spec.problems import Path, describe, path_text
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.run_checks import need_findings, rate_findings, run_findings
from peftx_spec.translate import Finding, examine_options, known_keys

_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_LONGEST_NAME, _LONGEST_PLACE = 255, 4095  # bytes, on the systems that people use
_OF_TASKS = ("tasks", "include", "num_fewshot")


def check(data: Data, catalogue: Catalogue) -> list[Finding]:
    """Everything that is wrong with a spec's data beyond what its models say."""
    names = sorted(catalogue.names())
    hooks = _hooks(data, catalogue, names)
    return [
        *_version(data),
        *_other_files(data),
        *_remote_code(data),
        *_places(data),
        *_large_numbers((), data),
        *_nulls(data),
        *_plugins(data, catalogue, names),
        *_ids(data),
        *_phases(data, hooks),
        *_holdout(data),
        *_metrics(data, hooks),
        *_metric_formats(data),
        *_runtime(data),
        *run_findings(data, hooks),
        *rate_findings(data, hooks),
        *need_findings(data, hooks),
    ]


def _hooks(data: Data, catalogue: Catalogue, names: list[str]) -> dict[int, frozenset[str]]:
    """The hooks of each entry whose plugin loads; `_plugins` says why another one does not."""
    found: dict[int, frozenset[str]] = {}
    for index, use, _ in _entries(data):
        if use in names:
            with suppress(PeftxError):
                found[index] = catalogue.hooks(use)
    return found


def _entries(data: Data) -> Iterator[tuple[int, str, Data]]:
    """Place, plugin and mapping of each entry of the stack that names a plugin."""
    for index, item in enumerate(list_of(data, "stack")):
        entry = {"use": item} if isinstance(item, str) else item
        if isinstance(entry, dict) and isinstance(entry.get("use"), str):
            yield index, entry["use"], entry


def _version(data: Data) -> Iterator[Finding]:
    version = data.get("peftx", 1)
    if type(version) is not int or version != 1:  # true == 1, and no version
        message = "this peftx reads specs of format 1"
        yield Finding(("peftx",), message, expected="1", got=describe(version))


OTHER_FILES = {"compare": "comparison", "search": "search"}
"""Key of a file that has several pipelines -> what it is."""


def _other_files(data: Data) -> Iterator[Finding]:
    for key, noun in OTHER_FILES.items():
        if key in data:
            message = f"this is a {noun}, and no pipeline"
            yield Finding((key,), message, at_key=True, suggestion=f"run it with 'peftx {key} FILE'")


def _remote_code(data: Data) -> Iterator[Finding]:
    """A spec may be a stranger's, who would then be trusting himself."""
    if "trust_remote_code" in mapping_of(data, "model"):
        message = "'trust_remote_code' is not a spec's to set: it would let the file run code of its author's choice"
        remedy = "leave it out; if you trust the model, run with --trust-remote-code (Python: trust_remote_code=True)"
        yield Finding(("model", "trust_remote_code"), message, at_key=True, suggestion=remedy)


def _runtime(data: Data) -> Iterator[Finding]:
    """Of processes elsewhere nothing is left but what they save."""
    given = data.get("runtime")
    engine = mapping_of(data, "runtime").get("engine") if isinstance(given, dict) else given
    if engine == "ray" and data.get("output") is None:
        remedy = "output: out/, on a disk that all machines see"
        yield Finding(
            ("runtime",), "processes of Ray leave a bundle, and 'output' says no place", suggestion=remedy
        )


def _places(data: Data) -> Iterator[Finding]:
    """Names that no file can have; whether the file is there is another question."""
    for path, name in _files(data):
        if "\0" in name:
            yield Finding(path, "no name of a file holds the character U+0000")
            continue
        part = max((len(part.encode("utf-8", "replace")) for part in name.split("/")), default=0)
        whole = len(name.encode("utf-8", "replace"))
        if part > _LONGEST_NAME or whole > _LONGEST_PLACE:
            long, most = (part, _LONGEST_NAME) if part > _LONGEST_NAME else (whole, _LONGEST_PLACE)
            yield Finding(path, f"a name of {long} bytes is too long for a file: at most {most}")


def _files(data: Data) -> Iterator[tuple[Path, str]]:
    """Path and value of everything that names a file or a folder."""
    found: list[tuple[Path, object]] = [(("output",), data.get("output"))]
    found += _either(("model",), data.get("model"), "id")
    for key, source in mapping_of(data, "data").items():
        if key != "sources":
            found += _either(("data", key), source, "path")
    for key, source in mapping_of(mapping_of(data, "data"), "sources").items():
        found += _either(("data", "sources", key), source, "path")
    for index, item in enumerate(list_of(data, "evaluate")):
        for name, options in item.items() if isinstance(item, dict) else ():
            found += _either(("evaluate", index, name), options, "path")
            if isinstance(options, dict):
                found.append((("evaluate", index, name, "include"), options.get("include")))
    for index, item in enumerate(list_of(data, "run")):
        if isinstance(item, dict):
            found += _either(("run", index, "save"), item.get("save"), "path")
    return ((path, name) for path, name in found if isinstance(name, str))


def _either(path: Path, value: object, key: str) -> list[tuple[Path, object]]:
    """A place that stands bare or under a key: `train: x` is `train: {path: x}`."""
    return [((*path, key), value.get(key))] if isinstance(value, dict) else [(path, value)]


def _large_numbers(path: Path, value: object) -> Iterator[Finding]:
    """Whole numbers that neither a file nor a tensor nor any other program holds."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _large_numbers((*path, key), item)
    elif isinstance(value, int) and not _SMALLEST <= value <= _LARGEST:
        yield Finding(path, "the number does not fit in 64 bits", got=describe(value))


def _nulls(data: Data) -> Iterator[Finding]:
    """`train:` with nothing after it could mean the defaults or no training."""
    sections: list[tuple[Path, object]] = [((key,), data.get(key, "")) for key in ("train", "run", "output")]
    sections += [(("data", key), value) for key, value in mapping_of(data, "data").items()]
    for path, value in sections:
        if value is None and path[-1] in ("train", "run", "output", "eval", "calibration", "holdout"):
            remedy = (
                "write {} for the defaults, or leave the key out"
                if path == ("train",)
                else "leave the key out"
            )
            yield Finding(path, f"'{path[-1]}' has no value", at_key=True, suggestion=remedy)


def _plugins(data: Data, catalogue: Catalogue, names: list[str]) -> Iterator[Finding]:
    for index, item in enumerate(list_of(data, "stack")):
        if isinstance(item, dict) and "use" not in item:
            for key in item:
                if key in names:
                    remedy = f"write 'use: {key}', and its options under 'with:'"
                    yield Finding(
                        ("stack", index, key), f"unknown key: '{key}'", at_key=True, suggestion=remedy
                    )
    for index, use, entry in _entries(data):
        path: Path = ("stack", index, "use")
        if use not in names:
            near = nearest(use, names)
            hint = catalogue.install_hint(use)
            suggestion = f"{near} Otherwise: {hint}" if near else hint
            yield Finding(path, f"no plugin '{use}' is installed", suggestion=suggestion)
            continue
        try:
            config = catalogue.config(use)
        except PeftxError as error:
            yield Finding(path, error.message, suggestion=error.hint or "", code=error.code)
            continue
        for key in known_keys(config):
            if key in entry and key not in ("use", "id", "with", "phase"):
                remedy = f"options stand under 'with:': with: {{{key}: ...}}"
                yield Finding(("stack", index, key), f"unknown key: '{key}'", at_key=True, suggestion=remedy)
        options = entry.get("with")
        if options is None or isinstance(options, dict):
            for found in examine_options(config, options or {}, plugin=use):
                yield replace(found, path=("stack", index, "with", *found.path))


def _ids(data: Data) -> Iterator[Finding]:
    first = entry_ids(data)
    taken = {str(entry.get("id", use)) for _, use, entry in _entries(data)}
    for index, use, entry in _entries(data):
        id = entry.get("id", use)
        path: Path = ("stack", index, "id" if "id" in entry else "use")
        if not isinstance(id, str):
            continue  # the pipeline's own validation says so
        if id in RESERVED_IDS:
            yield Finding(
                path, f"'{id}' is a word of the spec and cannot be an id", suggestion="add another 'id:'"
            )
        elif first[id] != index:
            free = next(name for n in range(2, len(taken) + 3) if (name := f"{id}-{n}") not in taken)
            what = f"the id '{id}'" if "id" in entry else f"the plugin '{use}'"
            message = f"{what} stands twice: first at {path_text(('stack', first[id]))}, again here"
            yield Finding(path, message, suggestion=f"add an 'id:' of its own, for example 'id: {free}'")


def _phases(data: Data, hooks: dict[int, frozenset[str]]) -> Iterator[Finding]:
    for index, use, entry in _entries(data):
        if entry.get("phase") is None or index not in hooks:
            continue
        path: Path = ("stack", index, "phase")
        if "compress" not in hooks[index]:
            message = f"'phase' says when a plugin compresses, and '{use}' does not"
            yield Finding(path, message, at_key=True, suggestion="leave 'phase' out")
        elif data.get("run") is not None:
            message = "'phase' has no effect beside 'run', which says when each plugin compresses"
            yield Finding(path, message, at_key=True, suggestion="leave 'phase' out")


def _holdout(data: Data) -> Iterator[Finding]:
    """Rows that are held out of data.train must come from there, and nothing else may look at them."""
    sources = mapping_of(data, "data")
    if sources.get("holdout") is None:
        return
    path: Path = ("data", "holdout")
    if sources.get("train") is None:
        message = "'holdout' keeps rows of data.train, and there is none"
        yield Finding(path, message, at_key=True, suggestion="write 'data: {train: file}'")
    if sources.get("eval") is not None:
        message = "'eval' and 'holdout' exclude each other: both say what is evaluated on"
        yield Finding(path, message, at_key=True, suggestion="leave one of them out")
    trained, calibrated = (_place(sources.get(name)) for name in ("train", "calibration"))
    if trained is not None and trained == calibrated:
        message = "'calibration' names the file of 'train', and so the rows that 'holdout' keeps back too"
        remedy = "leave 'calibration' out: it is the rows that are trained on then"
        yield Finding(("data", "calibration"), message, suggestion=remedy)


def _place(source: object) -> object:
    return source.get("path") if isinstance(source, dict) else source


def _metrics(data: Data, hooks: dict[int, frozenset[str]]) -> Iterator[Finding]:
    plugins = [id for id, index in entry_ids(data).items() if "evaluate" in hooks.get(index, ())]
    unknown = {id for id, index in entry_ids(data).items() if index not in hooks}
    known = [*METRICS, *plugins]
    sources = mapping_of(data, "data")
    held_out = sources.get("eval") is not None or sources.get("holdout") is not None
    for index, item in enumerate(list_of(data, "evaluate")):
        entries = {item: None} if isinstance(item, str) else item
        if not isinstance(entries, dict):
            continue
        for name, options in entries.items():
            path: Path = ("evaluate", index, name) if isinstance(item, dict) else ("evaluate", index)
            if name not in known and name not in unknown:
                yield Finding(
                    path,
                    f"no metric '{name}'",
                    at_key=True,
                    expected=f"one of {', '.join(known)}",
                    suggestion=nearest(str(name), known),
                )
            elif name == LM_EVAL:
                yield from _tasks(path, options)
            elif isinstance(options, dict) and (wrong := [key for key in _OF_TASKS if options.get(key)]):
                key = wrong[0]
                message = f"'{key}' is of lm-eval, and '{name}' is measured on rows"
                yield Finding((*path, key), message, at_key=True, suggestion="leave it out")
            elif name in METRICS and not held_out and not _has_path(options):
                message = f"'{name}' has no data: neither a path of its own nor data.eval"
                remedy = f"write '{name}: {{path: ...}}', or keep rows of the training data: 'data: {{holdout: 0.1}}'"
                yield Finding(path, message, at_key=True, suggestion=remedy)


def _tasks(path: Path, options: object) -> Iterator[Finding]:
    """lm-eval has rows of its own."""
    said = options if isinstance(options, dict) else {}
    if not said.get("tasks"):
        message = f"'{LM_EVAL}' runs tasks, and none is named"
        yield Finding(
            path, message, at_key=True, suggestion=f"write '{LM_EVAL}: {{tasks: [peftx-opposites]}}'"
        )
    for key in ("path", "format"):
        if said.get(key, "auto") != "auto":
            message = f"'{key}' is of rows, and the tasks of '{LM_EVAL}' have their own"
            remedy = "leave it out" if key == "format" else "a folder of tasks is 'include'"
            yield Finding((*path, key), message, at_key=True, suggestion=remedy)


def _metric_formats(data: Data) -> Iterator[Finding]:
    """Metrics that cannot read the rows that they are given, as far as `format:` tells."""
    sources = mapping_of(data, "data")
    held_out = sources.get("eval") if sources.get("holdout") is None else sources.get("train")
    for index, item in enumerate(list_of(data, "evaluate")):
        entries = {item: None} if isinstance(item, str) else item
        for name, options in entries.items() if isinstance(entries, dict) else ():
            format = _declared(options if _has_path(options) else held_out)
            if METRIC_FORMATS.get(name) and format in FORMATS and format not in METRIC_FORMATS[name]:
                path: Path = ("evaluate", index, name) if isinstance(item, dict) else ("evaluate", index)
                yield Finding(
                    path,
                    f"'{name}' cannot read these rows: they are {format}",
                    at_key=True,
                    expected=f"rows of {' or '.join(METRIC_FORMATS[name])}",
                    suggestion=metric_for(str(format)),
                )


def metric_for(format: str) -> str:
    """What to do about a metric that does not fit, as a suggestion."""
    others = [name for name, formats in METRIC_FORMATS.items() if format in formats]
    return (
        f"for these rows there is {' and '.join(others)}"
        if others
        else "give it rows of another file: {path: ...}"
    )


def _declared(source: object) -> object:
    return source.get("format") if isinstance(source, dict) else None


def _has_path(options: object) -> bool:
    return isinstance(options, str) or (isinstance(options, dict) and "path" in options)
