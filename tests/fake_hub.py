"""A model hub on localhost: one repository, as much of the hub's HTTP as huggingface_hub needs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "tiny-org/tiny-model"


class FakeHub:
    """Serves the files of `folder` as REPO at COMMIT, named main and v1.

    Attributes:
        requests: "METHOD path" of what was asked, in order.
        refuse: a status that answers everything instead.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.refuse: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        if self.refuse is not None:
            return self._send(request, self.refuse, b"{}")
        api, resolve = f"/api/models/{REPO}", f"/{REPO}/resolve/{COMMIT}/"
        names = {"main", "v1", COMMIT}
        if path == api or path.removeprefix(f"{api}/revision/") in names:
            body = json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": []})
            return self._send(request, 200, body.encode())
        if path.removeprefix(f"{api}/tree/") in names:
            files = [p for p in self.folder.rglob("*") if p.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": p.relative_to(self.folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": f"{i:040x}",
                }
                for i, p in enumerate(sorted(files))
            ]
            return self._send(request, 200, json.dumps(entries).encode())
        if path.startswith(resolve):
            data = (self.folder / path.removeprefix(resolve)).read_bytes()
            tag = f'"{path.rpartition("/")[2]}-tag"'
            return self._send(request, 200, data, {"ETag": tag, "X-Repo-Commit": COMMIT})
        code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
        return self._send(request, 404, b"{}", {"X-Error-Code": code})

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@contextmanager
def fake_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Let huggingface_hub in this process ask a FakeHub, with an empty cache."""
    hub = FakeHub(folder)
    use_endpoint(hub.url, cache, monkeypatch)
    with serving(hub.server):
        yield hub


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Within the block it answers."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_endpoint(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, whose settings are read when it is imported, elsewhere."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
