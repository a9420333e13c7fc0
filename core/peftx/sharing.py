"""Bundles to the Hugging Face Hub and back: only files that hold tensors, JSON, YAML and text go either way.

What needs torch is imported once the Hub has answered, so that one that does not is told of within seconds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peftx.engines.files import (
    MOST_JSON,
    check_there,
    folder_bytes,
    make_place,
    plain_files,
    read_json,
    replacing,
)
from peftx.engines.hub import PATIENCE, HubId, ask, bundle_id, fetch, is_hub, telling
from peftx.errors import BundleError, HubError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

MANIFEST = "manifest.json"
KINDS = (".safetensors", ".json", ".yaml", ".md", ".txt", ".jinja")
"""Ends of the files that a bundle is made of; nothing among them runs or unpickles anything."""

_NOT_OURS = (".gitattributes", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""What a repository may hold before a bundle is pushed to it."""


@dataclass(frozen=True)
class Shared:
    """A bundle and its commit on the Hub.

    Attributes:
        repo: owner/name. revision: what was asked for: a branch, a tag or the commit. commit: what that was.
        path: the bundle's folder. bytes: of its files.
    """

    repo: str
    revision: str
    commit: str
    path: Path
    bytes: int

    @property
    def id(self) -> str:
        """What names this commit wherever a bundle is expected."""
        return str(HubId(self.repo, self.commit))


def push(bundle: str | Path, repo: str, *, message: str | None = None, public: bool = False) -> Shared:
    """Put a bundle into a repository of the Hub: its files and its model card, in one commit on `main`.

    Files of a bundle that stood there before are replaced or deleted in the same commit. A repository that is not
    there is made, a private one.

    Args:
        bundle: a folder; it is checked as `load` checks it. repo: owner/name. public: make it for everybody to see.

    Raises:
        HubError: no token, a Hub that does not answer or refuses, a repository that holds something else.
        BundleError: no bundle, a damaged one, or one with files that are not shared.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    id = bundle_id(repo)
    if id.revision is not None:
        raise HubError(f"'{repo}': a push makes a commit on main", hint=f"leave @{id.revision} out")
    if get_token() is None:
        raise HubError(
            f"{id}: a push needs a token, and there is none",
            hint="hf auth login, or HF_TOKEN=...; https://huggingface.co/settings/tokens makes one that may write",
        )
    folder = Path(bundle)
    check_there(folder, MANIFEST)  # the Hub need not be asked
    known = ask(lambda api: _known(api, id), str(id))
    old = _files_of(id, known) if known is not None else set()
    names = _own_files(folder)
    operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in names]
    operations += [CommitOperationDelete(name) for name in sorted(old - set(names))]
    with telling(str(id)):
        api = HfApi()
        if known is None:
            api.create_repo(id.repo, private=not public, exist_ok=True)
        made = api.create_commit(
            id.repo, operations, commit_message=message or f"Push {folder.resolve().name} with peftx",
            parent_commit=None if known is None else known.sha,
        )  # fmt: skip
    return Shared(id.repo, "main", made.oid, folder, folder_bytes(folder))


def pull(repo: str, output: str | Path) -> Shared:
    """A bundle from the Hub into a folder; `manifest.json` then says of which commit it is.

    Args:
        repo: owner/name, or owner/name@revision: a branch, a tag or a commit.

    Raises:
        HubError: no such repository or revision, no bundle in it, or a Hub that does not answer.
        BundleError: what arrived is damaged, or a folder that is not to be overwritten.
    """
    id, target = bundle_id(repo), Path(output)
    make_place(target)
    folder, commit = _fetched(id)
    from peftx.engines.bundle.manifest import own_digest, read_manifest

    read_manifest(folder)
    revision = id.revision or "main"
    with replacing(target, marker=MANIFEST) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        manifest = read_json(new / MANIFEST)
        manifest["hub"] = {"repo": id.repo, "revision": revision, "commit": commit}
        manifest["own"] = own_digest(manifest)
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (new / MANIFEST).write_text(text, encoding="utf-8")
    return Shared(id.repo, revision, commit, target, folder_bytes(target))


def located(target: str | Path) -> Path:
    """Where a bundle lies: `hub:owner/name@revision` is fetched, unless that commit is here; a path stays as it is.

    Raises:
        HubError, BundleError: as `pull`.
    """
    return _fetched(bundle_id(str(target)))[0] if is_hub(target) else Path(target)


def _fetched(id: HubId) -> tuple[Path, str]:
    """The folder of a bundle in the cache, and its commit."""
    if id.pinned and _place(id).is_dir():
        return _place(id), str(id.revision)
    info = ask(lambda api: _info(api, id), str(id))
    here = replace(id, revision=info.sha)
    if not _place(here).is_dir():
        _fill(here, {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()})
    return _place(here), str(here.revision)


def _place(id: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "peftx" / id.repo.replace("/", "--") / str(id.revision)


def _info(api: Any, id: HubId) -> ModelInfo:
    return api.model_info(id.repo, revision=id.revision, files_metadata=True, timeout=PATIENCE)


def _known(api: Any, id: HubId) -> ModelInfo | None:
    """None of a repository that is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return _info(api, id)
    except RepositoryNotFoundError:
        return None


def _fill(id: HubId, sizes: Mapping[str, int]) -> None:
    """Fetch what the manifest of a commit names, and nothing else.

    Raises:
        HubError: no bundle, or one with files that are not shared. BundleError: it is damaged.
    """
    from peftx.engines.bundle.manifest import read_manifest

    if MANIFEST not in sizes:
        raise HubError(
            f"{id} holds no bundle: {MANIFEST} is missing",
            hint=f"an adapter of HF PEFT: hf download {id.repo} --local-dir DIR, and DIR serves as a bundle does"
            if "adapter_config.json" in sizes
            else f"peftx push BUNDLE {id.repo} puts one there",
        )
    _check_size(id, MANIFEST, sizes)
    names = _named(fetch(id, MANIFEST), id)
    for name in names:
        _check_size(id, name, sizes)
    with replacing(_place(id), marker=MANIFEST) as folder:
        for name in (MANIFEST, *names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(fetch(id, name).resolve(), folder / name)
        read_manifest(folder)


def _named(manifest: Path, id: HubId) -> list[str]:
    """The files that a manifest from the Hub names. Raises HubError for one that no bundle has."""
    found = read_json(manifest, links=True)
    names = found.get("files") if isinstance(found, dict) else None
    if not isinstance(names, dict):
        raise HubError(f"{id} holds no bundle: {MANIFEST} names no files")
    strange = next((name for name in names if not _is_shared(name)), None)
    if strange is not None:
        raise HubError(
            f"{id} names '{strange}', which no bundle has, and nothing was fetched",
            hint=f"files of a bundle end in {', '.join(KINDS)}; ask its authors",
        )
    return sorted(names)


def _is_shared(name: str) -> bool:
    """Is it a name within the bundle's folder, of a kind that runs nothing."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and "\\" not in name and "\0" not in name
    return plain and name.endswith(KINDS) and not any(part.startswith(".") for part in path.parts)


def _check_size(id: HubId, name: str, sizes: Mapping[str, int]) -> None:
    """Raises HubError for a file that is not there, or longer than any that is read."""
    if name not in sizes:
        raise HubError(f"{id}: {MANIFEST} names '{name}', and it is not there", hint="push the bundle again")
    if not name.endswith(".safetensors") and sizes[name] > MOST_JSON:
        raise HubError(f"{id}: '{name}' has {sizes[name]:,} bytes, and at most {MOST_JSON:,} are read")


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where that is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _own_files(folder: Path) -> list[str]:
    """What is pushed: the files that a whole bundle names, and no other. Raises BundleError where one is not shared."""
    from peftx.engines.bundle.manifest import read_manifest

    read_manifest(folder)
    names = [str(file.relative_to(folder)) for file in plain_files(folder)]
    strange = next((name for name in names if not _is_shared(name)), None)
    if strange is not None:
        raise BundleError(
            f"'{folder / strange}' is no file that is shared",
            hint=f"files of a bundle end in {', '.join(KINDS)}",
        )
    return names


def _files_of(id: HubId, info: ModelInfo) -> set[str]:
    """The files of the bundle that a repository holds.

    Raises:
        HubError: it holds something else, which a push would bury.
    """
    there = {sibling.rfilename for sibling in info.siblings or ()}
    if MANIFEST in there:
        return {MANIFEST, *_named(fetch(replace(id, revision=info.sha), MANIFEST), id)} & there
    strange = sorted(there.difference(_NOT_OURS))
    if strange:
        raise HubError(
            f"{id} holds {strange[0]} and no {MANIFEST}, so no bundle is pushed there",
            hint="name another repository; one that is not there is made",
        )
    return set()
