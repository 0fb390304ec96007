"""A Prefect API for runs on one machine: one server for all of them, gone when the last one is.

Prefect's embedded server is stopped by `atexit` only: it outlives a flow that SIGTERM or SIGKILL
ends, and several of them, one a flow, lock each other out of the same SQLite file (both measured).
Ours is shared by all runs of one PREFECT_HOME and kept by `flows.serving.watchdog`.
"""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from ditty.errors import RunError
from ditty.store.files import locked, make_dir, read_json, write_json

START_SECONDS = 120.0  # 8 s on two idle cores, 15 s with an empty database
POLL_SECONDS = 0.1

# As Prefect starts its own, and without asking the network.
SERVER_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # For the form of blocks in the UI, which this server does not have; 2 s.
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}


@contextmanager
def local_server() -> Iterator[str]:
    """Yield the url of the API that flows in the block use.

    It is the one that the user configured (PREFECT_API_URL or a Prefect profile), else that of the
    server of this PREFECT_HOME, started if need be.

    Raises:
        RunError: it does not start.
    """
    configured = get_current_settings().api.url
    if configured:
        yield configured
        return
    where = place()
    with open(where / "users.lock", "ab") as users:
        with locked(where / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            url = running(where) or _start(where)
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield url
            finally:
                _flush()


def place() -> Path:
    """The folder of this PREFECT_HOME's server: locks, address, logs."""
    return make_dir(get_current_settings().home.expanduser() / "ditty-server")


def running(place: Path) -> str | None:
    """The API's url of the server that runs there."""
    found = read_json(place / "server.json")
    return found["url"] if found and is_healthy(found["url"]) else None


def is_served(place: Path) -> bool:
    """Is the server that runs there that of `ditty serve`?"""
    return bool((read_json(place / "server.json") or {}).get("serves"))


def command(host: str, port: int) -> list[str]:
    """How to start Prefect's server in the foreground."""
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    return [*uvicorn, "--host", host, "--port", str(port), "--log-level", "error"]


def is_healthy(url: str) -> bool:
    """Does a Prefect API answer at `url`?"""
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _start(place: Path) -> str:
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    with open(place / "log.txt", "wb") as output:
        watchdog = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flows.serving.watchdog",
                str(place),
                *command("127.0.0.1", port),
            ],
            env={**os.environ, **settings, **SERVER_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C stops the flow, which still has something to report
        )
    deadline = time.monotonic() + START_SECONDS
    while not is_healthy(url):
        if watchdog.poll() is not None or time.monotonic() >= deadline:
            raise RunError(_not_started(place, watchdog.poll()))
        time.sleep(POLL_SECONDS)
    write_json(place / "server.json", {"url": url})
    return url


def _not_started(place: Path, code: int | None) -> str:
    ended = f"did not answer within {START_SECONDS:g} s" if code is None else f"ended with {code}"
    return (
        f"the local Prefect server {ended}. Set PREFECT_API_URL to a server of your own. "
        f"{end_of(place / 'log.txt')}"
    )


def end_of(log: Path) -> str:
    """A sentence that shows the last lines of a log."""
    lines = log.read_text(errors="replace").splitlines()[-10:]
    end = "\n  ".join(lines)
    return f"Its log, {log}, ends with:\n  {end}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _flush() -> None:
    """Send what Prefect would send at exit, when the server may be gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with suppress(Exception):  # records of a run that is over are not worth an error
        APILogWorker.drain_all(timeout=5)
        EventsWorker.drain_all(timeout=5)
