"""A job: one pipeline that is run for a comparison, named by all that decides about its result."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from peftx.composition.registry import Registry
from peftx.engines.files import read_json, sha256, write_text
from peftx.engines.models import asset_path
from peftx.errors import BundleError
from peftx_spec.models import Pipeline

Kind = Literal["pace", "rate", "seed", "trial"]
"""Steps are timed; a rate is tried on validation rows; a row is measured with a seed; a point of a search is tried on
validation rows, and what it costs is measured."""


@dataclass(frozen=True)
class Job:
    """`pipeline` is YAML in full; `identity` what else decides about the result: digests of files, versions.

    `row` says for whom it runs; rows whose jobs are the same share them, so it is no part of the identity.
    """

    row: str
    kind: Kind
    pipeline: str
    metric: str
    seed: int
    identity: str
    rate: float | None = None
    seconds: float | None = None
    """Of a `pace` job: the budget."""

    @cached_property
    def id(self) -> str:
        """Hex, 24 digits."""
        whole = {**asdict(self), "row": ""}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Check:
    """Of a trial while it trained: the share of its steps that was made, the score then, and the seconds so far."""

    share: float
    value: float
    seconds: float


@dataclass(frozen=True)
class JobResult:
    """What a job left, in one JSON file.

    Attributes:
        reason: why it failed; empty where it is done. log: what it printed, where it failed.
        scores: name -> value, low, high, count, unit; an infinite value is text, which JSON can hold.
        steps: optimizer steps; of a `pace` job, those that the seconds are enough for.
        trained, base_parameters: numbers. bundle_bytes: on disk.
        memory: bytes at most, of the process; None where the system does not tell.
        base_bytes: of the base's weights on disk, which must be there beside the bundle; 0 where it holds the base,
            None of a job of a version that did not look.
        device_memory: bytes at most that tensors took on the accelerator; None without one.
        seconds: of training. token_seconds: of one generated token; None where the model writes no text.
        losses: (step, loss). threads: of torch.
        checks: of a `trial` job, how it stood while it trained. ended_early: it was beaten, and `reason` says by whom.
    """

    id: str
    kind: Kind
    seed: int
    rate: float | None
    reason: str = ""
    log: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int = 0
    trained: int = 0
    base_parameters: int = 0
    bundle_bytes: int = 0
    base_bytes: int | None = None
    memory: int | None = None
    device_memory: int | None = None
    seconds: float = 0.0
    token_seconds: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    threads: int = 0
    checks: list[Check] = field(default_factory=list)
    ended_early: bool = False

    def value(self, metric: str) -> float:
        """The score; may be infinite."""
        return float(self.scores[metric]["value"])


def result_file(folder: Path, id: str) -> Path:
    return folder / "jobs" / f"{id}.json"


def write_result(folder: Path, result: JobResult) -> None:
    """Whole or not at all."""
    text = json.dumps(asdict(result), indent=1, allow_nan=False)
    write_text(result_file(folder, result.id), text + "\n")


def read_result(folder: Path, id: str) -> JobResult | None:
    """What the job left; None where there is nothing, or no whole result of ours."""
    file = result_file(folder, id)
    if not file.exists():
        return None
    try:
        told = read_json(file)
        told["checks"] = [Check(**check) for check in told.get("checks", ())]
        return JobResult(**told)
    except (BundleError, TypeError, AttributeError):
        return None


def checks_file(scratch: Path) -> Path:
    """Where a running trial writes its checks, a line each."""
    return scratch / "checks"


def read_checks(scratch: Path) -> list[Check]:
    """Those of a trial so far; a line that is not whole yet is left for the next look."""
    file = checks_file(scratch)
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [Check(**json.loads(line)) for line in lines]


def identity_of(pipeline: Pipeline, registry: Registry) -> str:
    """Digests of the files that a pipeline reads and of its plugins' modules, and versions of the rest, as text.

    Raises:
        PeftxError: a file that is not there, or a plugin.
    """
    from importlib.metadata import version

    from peftx.version import __version__

    data = pipeline.data
    sources = [data.train, data.eval, data.calibration, *data.sources.values()]
    paths = dict.fromkeys(source.path for source in sources if source is not None)
    plugins = {entry.use: sha256(Path(inspect.getfile(registry.load(entry.use)))) for entry in pipeline.stack}
    versions = {name: version(name) for name in ("torch", "transformers")}
    whole = {
        "files": {path: sha256(asset_path(path)) for path in paths},
        "model": _folder_state(Path(pipeline.model.id)),
        "versions": {"peftx": __version__, **versions, **plugins},
    }
    return json.dumps(whole, sort_keys=True)


def _folder_state(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's files: its weights are too many to be read anew."""
    if not folder.is_absolute() or not folder.is_dir():
        return []
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
