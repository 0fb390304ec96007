"""`ditty serve`: all that runs from the browser need, on one machine, kept in one process.

Prefect's server with its UI, a worker, and what `flows.serving.deploy` puts on the server. The
server is that of this PREFECT_HOME: while it is up, `ditty run` reports to it too
(flows.serving.server). When this process ends, however it ends, so does all below it, trainings
after saving a checkpoint.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    get_current_settings,
    temporary_settings,
)

from ditty.errors import RunError
from ditty.processes.signals import stop_signal
from ditty.store.files import locked, write_json
from flows.serving import server
from flows.serving.automations import HEARTBEAT_SECONDS
from flows.serving.deploy import POOL, Applied, apply
from flows.serving.sweep import crash_orphans

# The guard's patience: the worker and a training that saves (launch.grace_seconds) fit in.
STOP_SECONDS = 60.0
POLL_SECONDS = 0.5
SWEEP_SECONDS = 10.0

SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # In memory, a slot leaks when the server restarts and its holder then dies.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
}


@dataclass(frozen=True)
class Served:
    """What is up.

    Attributes:
        url: for the browser.
        logs: folder of the logs of server and worker.
        database: SQLite or PostgreSQL, without credentials.
    """

    url: str
    logs: Path
    database: str
    applied: Applied


def serve(host: str, port: int, on_up: Callable[[Served], None], notify: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM; `on_up` is called once all is there.

    Args:
        notify: see `deploy.apply`.
    Raises:
        RunError: something else serves here, a local run holds the database, or a part does not
            start or ends by itself.
    """
    url = f"http://{host}:{port}"
    api = f"{url}/api"
    _check_configured(api)
    place = server.place()
    with ExitStack() as stack:
        stopped = stack.enter_context(stop_signal())
        users = stack.enter_context(open(place / "users.lock", "ab"))
        with locked(place / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            _check_free(place, api)
            prefect = stack.enter_context(_server(place, host, port))
            _await(prefect, api)
            write_json(place / "server.json", {"url": api, "serves": True})
        stack.callback((place / "server.json").unlink, missing_ok=True)
        stack.enter_context(temporary_settings({PREFECT_API_URL: api}))
        applied = apply(notify)
        worker = stack.enter_context(_worker(place, api))
        on_up(Served(url, place, database(), applied))
        _watch((prefect, worker), stopped)


def _watch(parts: "tuple[Part, ...]", stopped: list[int]) -> None:
    """Until a signal: see that all parts are up, and tidy up after runs that were killed."""
    swept = time.monotonic()
    with get_client(sync_client=True) as client:
        while not stopped:
            for part in parts:
                part.check()
            if time.monotonic() >= swept + SWEEP_SECONDS:
                with suppress(httpx.HTTPError):  # a busy server; the next round finds them again
                    crash_orphans(client)
                swept = time.monotonic()
            time.sleep(POLL_SECONDS)


def database() -> str:
    """The database's kind and place, for people."""
    url = PREFECT_SERVER_DATABASE_CONNECTION_URL.value() or ""
    if url.startswith("postgresql"):
        return f"PostgreSQL at {url.rpartition('@')[2]}"
    return f"SQLite, {url.partition('///')[2] or get_current_settings().home / 'prefect.db'}"


def _check_configured(api: str) -> None:
    configured = get_current_settings().api.url
    if configured and configured.rstrip("/") != api:
        raise RunError(
            f"PREFECT_API_URL (or the Prefect profile) names a server at {configured}, and "
            f"`ditty serve` would start its own at {api}. For the server that is there: `ditty "
            f"deploy`, and `prefect worker start --pool {POOL}` on the machines that train. For "
            "one of its own: unset PREFECT_API_URL"
        )


def _check_free(place: Path, api: str) -> None:
    url = server.running(place)
    if url and server.is_served(place):
        raise RunError(f"`ditty serve` is already running: {url.removesuffix('/api')}")
    if url:
        raise RunError(
            "a `ditty run` on this machine has a Prefect server of its own, and two of them cannot "
            "share a database: start `ditty serve` again when that run has ended"
        )
    if server.is_healthy(api):
        raise RunError(
            f"a Prefect server is already at {api}: set PREFECT_API_URL={api} and use `ditty "
            "deploy`, or choose another --port"
        )


class Part:
    """A process that must stay up, with a guard that ends all below it."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: Path):
        self.name, self.process, self.log = name, process, log

    def check(self) -> None:
        """Raise if it has ended."""
        code = self.process.poll()
        if code is not None:
            raise RunError(f"the {self.name} ended with {code}. {server.end_of(self.log)}")


@contextmanager
def _guarded(name: str, place: Path, command: list[str], env: dict[str, str]) -> Iterator[Part]:
    reader, writer = os.pipe()
    log = place / f"{name}.txt"
    guard = [sys.executable, "-m", "ditty.processes.guard", str(reader), str(STOP_SECONDS)]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*guard, *command],
            env={**os.environ, **settings, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(reader,),
            start_new_session=True,  # Ctrl-C is for us, who stop the parts in order
        )
    os.close(reader)
    try:
        yield Part(name, process, log)
    finally:
        os.close(writer)  # that alone ends it
        process.wait()


@contextmanager
def _server(place: Path, host: str, port: int) -> Iterator[Part]:
    address = {"PREFECT_SERVER_API_HOST": host, "PREFECT_SERVER_API_PORT": str(port)}
    command = server.command(host, port)
    with _guarded("server", place, command, SERVER_ENVIRONMENT | address) as part:
        yield part


@contextmanager
def _worker(place: Path, api: str) -> Iterator[Part]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]
    command += ["--type", "process", "--name", os.uname().nodename]
    env = {
        "PREFECT_API_URL": api,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    with _guarded("worker", place, command, env) as part:
        yield part


def _await(part: Part, api: str) -> None:
    deadline = time.monotonic() + server.START_SECONDS
    while not server.is_healthy(api):
        part.check()
        if time.monotonic() >= deadline:
            raise RunError(
                f"the server did not answer at {api} within {server.START_SECONDS:g} s. "
                f"{server.end_of(part.log)}"
            )
        time.sleep(server.POLL_SECONDS)
