"""A model hub on localhost that takes pushes: what huggingface_hub asks, answered as the hub does.

Source: the hub's API as huggingface_hub calls it, and git-lfs' batch API. Files above SMALL bytes
go to the store of large files first, each by a PUT; a commit is one POST that names them.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from huggingface_hub import constants

from tests.fake_hub import serving, use_endpoint

TOKEN = "hf_canaryCANARYcanary"
OWNERS = ("me", "my-org")
SMALL = 200


class PushHub:
    """What was pushed to it.

    Attributes:
        repos: name -> {"private", "files": {path: content}, "commits": [{path: content}]}.
        large: content by SHA-256 of what was put into the store of large files.
        puts: SHA-256 of each PUT that was taken, in order.
        cut_after: so many PUTs are taken, and later ones cut in the middle of their answer.
        damage: a path whose content it does not keep as it came.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.cut_after: int | None = None
        self.damage: str | None = None
        hub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    answer = hub.answer(self, body)
                if answer is None:  # the connection is cut
                    self.close_connection = True
                    return
                status, value = answer
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = handle_any

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, Any] | None:
        path = request.path.partition("?")[0].strip("/")
        if path.startswith("large/"):  # a signed url: it takes no token
            return self._put(path.removeprefix("large/"), body)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "api/whoami-v2":
            return 200, {"name": OWNERS[0], "orgs": [{"name": name} for name in OWNERS[1:]]}
        if path == "api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, _, owner, name, verb, *_ = [*path.split("/"), ""]
        repo = self.repos[f"{owner}/{name}"]
        if verb == "tree":
            return 200, [self._entry(path, repo) for path in sorted(repo["files"])]
        if verb == "preupload":
            return self._modes(repo, json.loads(body))
        if verb == "commit":
            return self._commit(f"{owner}/{name}", repo, body)
        if verb == "paths-info":
            asked = [p for p in parse_qs(body.decode())["paths"] if p in repo["files"]]
            return 200, [self._entry(path, repo) for path in asked]
        if verb == "revision":
            return 200, {"id": f"{owner}/{name}", "sha": self._oid(repo), "siblings": []}
        return 404, {"error": path}

    def _put(self, oid: str, body: bytes) -> tuple[int, Any] | None:
        if self.cut_after is not None and len(self.puts) >= self.cut_after:
            return None
        assert hashlib.sha256(body).hexdigest() == oid, "not what was announced"
        self.puts.append(oid)
        self.large[oid] = body
        return 200, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, url | {"error": "You already created this model repo"}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.repos[name] = {"private": private, "files": files, "commits": []}
        return 200, url

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for entry in asked["objects"]:
            found: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.large:
                found["actions"] = {"upload": {"href": f"{self.url}/large/{entry['oid']}"}}
            objects.append(found)
        return 200, {"transfer": "basic", "objects": objects}

    def _modes(self, repo: dict[str, Any], asked: dict[str, Any]) -> tuple[int, Any]:
        files = []
        for entry in asked["files"]:
            mode = "lfs" if entry["size"] > SMALL else "regular"
            found = {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False}
            if entry["path"] in repo["files"]:
                there = self._entry(entry["path"], repo)
                found["oid"] = there["lfs"]["oid"] if "lfs" in there else there["oid"]
            files.append(found)
        return 200, {"files": files}

    def _commit(self, name: str, repo: dict[str, Any], body: bytes) -> tuple[int, Any]:
        files = dict(repo["files"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if self.damage in files:
            files[self.damage] += b"?"
        repo["files"] = files
        repo["commits"].append(files)
        oid = self._oid(repo)
        return 200, {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def _oid(self, repo: dict[str, Any]) -> str:
        return f"{len(repo['commits']):040x}"

    def _entry(self, path: str, repo: dict[str, Any]) -> dict[str, Any]:
        data = repo["files"][path]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if len(data) > SMALL:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def holds(self, repo: str, folder: Path) -> bool:
        """Whether a repository has the files of a folder, and nothing else."""
        here = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        there = {k: v for k, v in self.repos[repo]["files"].items() if k != ".gitattributes"}
        same = all(there.get(name) == path.read_bytes() for name, path in here.items())
        return same and there.keys() == here.keys()


@contextmanager
def push_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    """Let huggingface_hub in this process push to a PushHub, by plain HTTP."""
    hub = PushHub()
    use_endpoint(hub.url, cache, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(hub.server):
        yield hub
