"""`ditty serve` as a process of its own, and runs of its deployments through the API."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry

from tests.processes import ROOT, kill_tree
from tests.tiny import make_model_folder

COMMAND = "from flows.commands.cli import main; main()"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_spec(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """A run of some seconds, on files that this makes in `folder`."""
    if not (folder / "model").exists():
        make_model_folder(folder / "model")
        rows = [
            {"messages": [{"role": r, "content": f"{r} says {i}"} for r in ("user", "assistant")]}
            for i in range(40)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": name,
        "data": {"source": str(folder / "rows.jsonl"), "seq_len": 64},
        "model": {"base_model": str(folder / "model"), "attention": "sdpa"},
        "train": {
            "max_steps": steps,
            "precision": "fp32",
            "save_steps": 20,
            "gradient_accumulation_steps": 1,
        },
        "launch": {"device": "cpu", "threads": 1, "retries": 0},
        "upload": {"url": f"file://{folder}/target"},
    }


class Serving:
    """One `ditty serve`; `url` is the browser's."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None):
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.home = folder / "ditty"
        own = {
            "PREFECT_HOME": str(folder / "prefect"),
            "DITTY_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.environment = {**os.environ, **own, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start it; what it printed until it was up."""
        output = self.folder / "serve.txt"
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve", "--port", str(self.port)],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.wait(lambda: "press Run" in output.read_text(), 120)
        return output.read_text()

    def wait(self, happened: Callable[[], Any], seconds: float) -> None:
        """Until `happened`; fails where it does not, or where the server ends before."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process is not None
            ended = self.process.poll()
            assert ended is None, (self.folder / "serve.txt").read_text()
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of what server and worker said."""
        place = self.folder / "prefect" / "ditty-server"
        return "\n".join(p.read_text()[-3000:] for p in sorted(place.glob("*.txt")))

    def processes(self) -> list[psutil.Process]:
        """It and all below it."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def training(self) -> bool:
        """Is there a process of a training below it?"""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if "ditty.worker" in process.cmdline():
                    return True
        return False

    def kill(self) -> None:
        """As if the machine lost power: SIGKILL to everything at once."""
        assert self.process is not None
        kill_tree(self.process)

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process is None or self.process.poll() is not None:
            return
        below = self.processes()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(90)
        assert not psutil.wait_procs(below, timeout=5)[1], "processes outlive ditty serve"

    def client(self) -> SyncPrefectClient:
        """A client of its API."""
        return SyncPrefectClient(f"{self.url}/api")

    def trigger(self, spec: dict[str, Any]) -> UUID:
        """Run the deployment `finetune` with `spec`, as the form does."""
        with self.client() as client:
            deployment = client.read_deployment_by_name("finetune/finetune")
            run = client.create_flow_run_from_deployment(deployment.id, parameters={"spec": spec})
            return run.id

    def run(self, run: UUID) -> FlowRun:
        """The flow run as the server knows it."""
        with self.client() as client:
            return client.read_flow_run(run)

    def state(self, run: UUID) -> str:
        """The name of its state."""
        found = self.run(run).state
        return found.name or "" if found else ""

    def ended_tasks(self, run: UUID) -> Counter[tuple[str, str]]:
        """`tasks`, once the server knows of the end of each: it hears of tasks through events,
        which may come later than the end of the flow run."""
        under_way = {"Running", "Pending", "Scheduled", ""}
        self.wait(lambda: not {state for _, state in self.tasks(run)} & under_way, 60)
        return self.tasks(run)

    def tasks(self, run: UUID) -> Counter[tuple[str, str]]:
        """How many of its task runs there are of each (stage, state), as far as is known yet."""
        only = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        with self.client() as client:
            found = client.read_task_runs(flow_run_filter=only)
        return Counter((t.name.split()[0], t.state.name or "") for t in found if t.state)

    def retry(self, run: UUID) -> None:
        """What the button does."""
        with self.client() as client:
            client.set_flow_run_state(run, AwaitingRetry(message="Retry from the UI"))


@contextmanager
def serving(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Serving]:
    """A `ditty serve` that is up within the block."""
    served = Serving(folder, environment)
    try:
        served.start()
        yield served
    finally:
        served.stop()
