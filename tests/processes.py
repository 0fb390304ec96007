"""Starting flows in processes of their own, and ending them hard."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from ditty.spec import RunSpec

ROOT = Path(__file__).parent.parent

FLOW = (
    "import sys; from ditty.spec import RunSpec; from flows.finetune import finetune; "
    "finetune(RunSpec.model_validate_json(sys.argv[1]))"
)


def start_flow(
    spec: RunSpec, home: Path, api: str, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """The flow in a process of its own, with the API of a server that is there."""
    variables = {"PREFECT_API_URL": api, "OMP_NUM_THREADS": "1", "DITTY_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", FLOW, spec.model_dump_json()],
        cwd=ROOT,
        env={**os.environ, **variables, **(environment or {})},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def kill_when(child: "subprocess.Popen[bytes]", happened: Callable[[], bool]) -> None:
    """SIGKILL a process and all below it as soon as `happened`; it must not end before."""
    while not happened():
        assert child.poll() is None, f"it ended with {child.returncode} before that happened"
        time.sleep(0.002)
    kill_tree(child)


def kill_tree(child: "subprocess.Popen[bytes]") -> None:
    """SIGKILL a process and everything below it, and wait until all are gone."""
    parent = psutil.Process(child.pid)
    processes = [parent, *parent.children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    child.wait()
    assert not psutil.wait_procs(processes, timeout=10)[1], "a killed process is still there"
