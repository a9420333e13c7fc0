"""A Hugging Face Hub on this machine, for tests: what `push`, `pull` and rows of the Hub ask of it, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits in order, and what names them; `main` is the last."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes]) -> str:
        text = repr((len(self.commits), sorted(files.items())))
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.tags["main"] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.tags.get(revision)


class LoopbackHub:
    """The Hub's state. `repos`: `models/owner/name` or `datasets/owner/name` -> repository. `asked`: every request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.endpoint = ""

    def put(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> str:
        """A commit as if somebody had pushed it. Returns its sha."""
        return self.repos.setdefault(name, Repo(private)).commit(files)

    def files(self, name: str) -> Files:
        """Of a repository's `main`."""
        repo = self.repos[name]
        return repo.commits[repo.tags["main"]]

    @property
    def environment(self) -> dict[str, str]:
        """For other processes."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def _read(self) -> None:
        url = urlsplit(self.path)
        self.hub.asked.append(f"{self.command} {url.path}")
        path = unquote(url.path).strip("/")
        if path.startswith("api/"):
            if path.count("/") < 3:  # what the library asks of its own accord
                self._answer(404)
                return
            kind, owner, name, *rest = path.removeprefix("api/").split("/")
            repo = self._readable(f"{kind}/{owner}/{name}")
            if repo is not None:
                revision = "/".join(rest[1:]) or "main"
                self._info(f"{owner}/{name}", repo, revision, "blobs" in parse_qs(url.query))
            return
        kind = "datasets" if path.startswith("datasets/") else "models"
        owner, name, _, revision, *parts = path.removeprefix("datasets/").split("/")
        repo = self._readable(f"{kind}/{owner}/{name}")
        if repo is not None:
            self._file(repo, revision, "/".join(parts))

    def _readable(self, key: str) -> Repo | None:
        repo = self.hub.repos.get(key)
        if repo is None or (repo.private and not self._signed_in()):
            self._answer(404 if self._signed_in() else 401, headers={"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _info(self, name: str, repo: Repo, revision: str, sizes: bool) -> None:
        sha = repo.sha(revision)
        if sha is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [
            {"rfilename": file} | ({"size": len(content)} if sizes else {})
            for file, content in repo.commits[sha].items()
        ]
        self._answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def _file(self, repo: Repo, revision: str, name: str) -> None:
        sha = repo.sha(revision)
        content = None if sha is None else repo.commits[sha].get(name)
        if sha is None or content is None:
            code = "RevisionNotFound" if sha is None else "EntryNotFound"
            self._answer(404, headers={"X-Error-Code": code})
            return
        etag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, headers={"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.asked.append(f"PUT {self.path}")
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._answer(200)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path).strip("/"), self._body()
        self.hub.asked.append(f"POST /{path}")
        if not self._signed_in():
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._answer(401, headers=headers)
        elif path == "api/validate-yaml":
            self._card(json.loads(body)["content"])
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        else:
            _, _, owner, name, action, _ = path.split("/")
            repo = self.hub.repos[f"models/{owner}/{name}"]
            if action == "preupload":
                self._preupload(repo, json.loads(body)["files"])
            else:
                self._commit(f"{owner}/{name}", repo, [json.loads(line) for line in body.splitlines()])

    def _card(self, text: str) -> None:
        """The Hub looks at a card's metadata; a base is a name of its own."""
        bases = [line for line in text.splitlines() if line.startswith("base_model:")]
        bad = [line for line in bases if line.count("/") != 1 or line.count(":") != 1]
        errors = [{"message": '"base_model" with value is not valid. Use a model id.'}] if bad else []
        self._answer(400 if bad else 200, {"errors": errors, "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "forbidden":
            self._answer(403, headers={"X-Error-Message": "You don't have the rights"})
            return
        self.hub.put(f"models/{name}", {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        told = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
             "shouldIgnore": False}
            for file in files
        ]  # fmt: skip
        self._answer(200, {"files": told})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        told = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in objects
        ]
        self._answer(200, {"transfer": "basic", "objects": told})

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.commits[repo.tags["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repo.tags["main"]):
                self._answer(412, {"error": "A commit has happened since."})
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self,
        code: int,
        body: bytes | dict[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub on 127.0.0.1 in place of huggingface.co, for this process; signed in, with a cache of its own."""
    from huggingface_hub import constants

    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        TemporaryDirectory() as home,
        ExitStack() as until,
    ):
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
            "HF_HOME": home, "HF_HUB_CACHE": str(Path(home) / "hub"), "HF_TOKEN_PATH": str(Path(home) / "token"),
            "HF_HUB_DISABLE_XET": True,
        }.items():  # fmt: skip
            until.enter_context(patch.object(constants, name, value))
        until.enter_context(patch.dict(os.environ, HF_TOKEN=TOKEN))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
