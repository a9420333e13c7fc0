"""The Hugging Face Hub: what lies there under which name, and what its errors mean.

Imports no torch, so that a Hub that does not answer is told of at once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftx.errors import HubError, PeftxError, nearest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hub:"
PATIENCE = 3.0
"""Seconds until a Hub that says nothing counts as one that does not answer."""

COMMIT = re.compile(r"[0-9a-f]{40}")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
"""Ends of the files that rows are read from; each also with .gz."""

_REPO = r"(?P<repo>[^\s/@:]+/[^\s/@:]+)"
_BUNDLE = re.compile(rf"(?:{SCHEME})?{_REPO}(?:@(?P<revision>[^\s@]+))?")
_FILE = re.compile(rf"{SCHEME}{_REPO}(?:@(?P<revision>[^\s/@]+))?/(?P<file>\S.*)")
_SIGN_IN = "hf auth login, or HF_TOKEN=...; a token is made at https://huggingface.co/settings/tokens"
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class HubId:
    """A repository, a revision of it (a branch, tag or commit), and a file in it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def pinned(self) -> bool:
        """Is it one commit for ever."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


def is_hub(target: str | Path) -> bool:
    return str(target).startswith(SCHEME)


def bundle_id(text: str) -> HubId:
    """`owner/name@revision`, with or without `hub:` before it. Raises HubError for anything else."""
    return _parsed(_BUNDLE, text, f"{SCHEME}owner/name, or {SCHEME}owner/name@revision")


def file_id(text: str) -> HubId:
    """`hub:owner/name@revision/path/to/rows.jsonl`. Raises HubError for anything else, and for a file without rows."""
    found = _parsed(_FILE, text, f"{SCHEME}owner/name/rows.jsonl, or {SCHEME}owner/name@revision/rows.jsonl")
    if not str(found.file).lower().removesuffix(".gz").endswith(ROWS):
        raise HubError(f"'{text}' is no file of rows", hint=f"rows are read from {', '.join(ROWS)}")
    return found


def _parsed(pattern: re.Pattern[str], text: str, form: str) -> HubId:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    found = pattern.fullmatch(text)
    if found is None:
        raise HubError(f"'{text}' names nothing on the Hub", hint=form)
    try:
        validate_repo_id(found["repo"])
    except HFValidationError as error:
        raise HubError(f"'{text}': {str(error).splitlines()[0]}", hint=form) from error
    return HubId(**found.groupdict())


def ask(call: Callable[[HfApi], _Found], what: str) -> _Found:
    """What the Hub answers to a short question, within `PATIENCE`.

    Raises:
        HubError: it does not answer, or says no.
    """
    from huggingface_hub import HfApi

    answer: Future[_Found] = Future()

    def asking() -> None:
        try:
            answer.set_result(call(api))
        except Exception as error:  # noqa: BLE001  raised again by the one who waits
            answer.set_exception(error)

    with telling(what):
        api = HfApi()
        # A thread, since looking up the name of a host knows no time limit.
        threading.Thread(target=asking, daemon=True).start()
        try:
            return answer.result(PATIENCE)
        except TimeoutError as error:
            raise _silent(what) from error


def _silent(what: str) -> HubError:
    from huggingface_hub import constants

    return HubError(
        f"{what}: {constants.ENDPOINT} does not answer",
        hint="check the connection, HTTPS_PROXY and HF_ENDPOINT; what is on this machine is named by its folder",
    )


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn what the Hub's library raises into what it means for `what`.

    Raises:
        HubError: in place of the library's own errors; those of a disk stay.
    """
    from huggingface_hub import errors

    try:
        yield
    except PeftxError:
        raise
    except (errors.HTTPError, errors.EntryNotFoundError, errors.FileMetadataError, ConnectionError,
            RuntimeError, ValueError) as error:  # fmt: skip
        raise _meaning(error, what) from error


def _meaning(error: Exception, what: str) -> HubError:
    from huggingface_hub import constants, errors, get_token

    unsigned = get_token() is None
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{what}: its authors give it to those alone who ask them",
            hint=f"ask on its page, then: {_SIGN_IN}" if unsigned else "ask on its page",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{what}: there is no such repository, or it is private",
            hint=f"check the name; to see a private one: {_SIGN_IN}"
            if unsigned
            else "check the name, and what your token may see: hf auth whoami",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{what}: the repository has no such revision", hint="a branch, a tag or a commit")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{what}: the repository has no such file", hint="check the name")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, what)
    if isinstance(error, errors.HTTPError | errors.LocalEntryNotFoundError | ConnectionError):
        if not constants.is_offline_mode():
            return _silent(what)
        return HubError(
            f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked",
            hint="HF_HUB_OFFLINE=0; or a commit that was fetched before: ...@<commit>",
        )
    if isinstance(error.__cause__, Exception):  # an upload's error says that it failed; its cause says why
        return _meaning(error.__cause__, what)
    said = " ".join(str(error).split())[:300]
    return HubError(f"{what}: {said or type(error).__name__}")


def _refused(error: Any, what: str) -> HubError:
    """An answer that is no."""
    code = error.response.status_code
    if code == 401:
        return HubError(f"{what}: the Hub does not take your token", hint=_SIGN_IN)
    if code == 403:
        return HubError(
            f"{what}: your token does not allow it",
            hint="one that may write, of a member of the repository's owner: hf auth login; hf auth whoami",
        )
    if code in (409, 412):
        return HubError(
            f"{what}: the repository changed meanwhile, and nothing was written", hint="once more"
        )
    said = " ".join((error.server_message or str(error)).split())[:300]
    return HubError(
        f"{what}: the Hub answers {code}: {said}",
        hint="once more, later" if code == 429 or code >= 500 else None,
    )


def fetch(id: HubId, name: str, *, repo_type: str = "model") -> Path:
    """A file of a commit, in the Hub's cache. `id` is pinned.

    Raises:
        HubError: it is not there, or did not arrive.
    """
    from huggingface_hub import hf_hub_download

    with telling(f"{replace(id, file=name)}"):
        return Path(hf_hub_download(id.repo, name, revision=id.revision, repo_type=repo_type))


@lru_cache(maxsize=256)
def pinned_rows(text: str) -> str:
    """A file of rows in a data set, as `hub:owner/name@commit/file`: what a branch is now, for all of the process.

    Raises:
        HubError: no such data set, revision or file.
    """
    from huggingface_hub import try_to_load_from_cache

    id = file_id(text)
    if id.pinned and isinstance(
        try_to_load_from_cache(id.repo, str(id.file), revision=id.revision, repo_type="dataset"), str
    ):
        return text
    found = ask(lambda api: api.dataset_info(id.repo, revision=id.revision, timeout=PATIENCE), str(id))
    names = [sibling.rfilename for sibling in found.siblings or ()]
    if id.file not in names:
        rows = [name for name in names if name.lower().removesuffix(".gz").endswith(ROWS)]
        raise HubError(
            f"{id}: the repository has no such file",
            hint=nearest(str(id.file), rows) or f"there are: {', '.join(rows[:8]) or 'no files of rows'}",
        )
    return str(replace(id, revision=found.sha))


def rows_path(text: str) -> Path:
    """A file of rows on the Hub -> where it lies on this machine; it is fetched where it is not there yet.

    Raises:
        HubError: as `pinned_rows`.
    """
    id = file_id(pinned_rows(text))
    return fetch(replace(id, file=None), str(id.file), repo_type="dataset")
