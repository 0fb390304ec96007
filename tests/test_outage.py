"""Prefect's server is gone for five minutes: training goes on, and afterwards it knows all. Slow.

python -m pytest -m slow -o addopts= -s tests/test_outage.py
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient

from ditty.config.spec import RunSpec
from ditty.runs.rundir import RunDir, Status, read_result
from flows.serving.server import SERVER_ENVIRONMENT, command, is_healthy
from tests.processes import start_flow, wait_while
from tests.seaweed import free_ports
from tests.served import tiny_spec

pytestmark = pytest.mark.slow

AWAY_SECONDS = 300.0


class Server:
    """Prefect's server with its database in a folder; `start` after `kill` finds all again."""

    def __init__(self, folder: Path):
        self.folder, (self.port,) = folder, free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        own = {**SERVER_ENVIRONMENT, "PREFECT_HOME": str(self.folder)}
        self.process = subprocess.Popen(
            command("127.0.0.1", self.port), env={**os.environ, **own}, stdout=subprocess.DEVNULL
        )
        wait_while(self.process, lambda: not is_healthy(self.url))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "prefect")
    server.start()
    yield server
    server.kill()


def states(server: Server) -> tuple[str, dict[str, str]]:
    """(the flow run's state, that of each of its tasks by the first word of its name)"""
    with SyncPrefectClient(server.url) as client:
        (flow_run,) = client.read_flow_runs()
        tasks = {task.name.split()[0]: task.state_name or "" for task in client.read_task_runs()}
        return flow_run.state_name or "", tasks


@pytest.mark.fault("prefect down")
def test_the_server_is_killed_and_comes_back(
    server: Server, home: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    values = tiny_spec(tmp_path, "outage", steps=1_000_000)
    values["upload"] = {}
    run = RunDir.named("outage", home)

    def done() -> int:
        return max((r["step"] for r in run.metrics() if r["kind"] == "train"), default=0)

    flow = start_flow(RunSpec.model_validate(values), home, server.url)
    try:
        wait_while(flow, lambda: done() < 5)
        server.kill()
        before, back = done(), time.monotonic() + AWAY_SECONDS
        wait_while(flow, lambda: time.monotonic() < back)
        meanwhile = done() - before
        server.start()
        after = done() + 5
        wait_while(flow, lambda: done() < after)
        run.stop_file.touch()
        assert flow.wait(120) == 1, "a stop file is an end that is not tried again"
    finally:
        flow.kill()
        flow.wait()
    (attempt,) = run.attempts("train")
    result = read_result(attempt)
    assert result and result.status is Status.PREEMPTED and result.step == done()
    assert meanwhile > 20, "it waited"
    end = time.monotonic() + 60
    while states(server)[1].get("train") != "Failed" and time.monotonic() < end:
        time.sleep(0.2)  # the server hears of tasks through events, a little later
    expected = {"load": "Completed", "tokenize": "Completed", "pack": "Completed"}
    assert states(server) == ("Failed", {**expected, "train": "Failed"})
    figure(
        f"away {AWAY_SECONDS:.0f} s: {meanwhile} steps meanwhile, attempts 1, steps lost 0, "
        "states of run and tasks are what happened"
    )
