"""Processes of their own: flows, the `ditty` command, holders of locks; and ending them hard."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import psutil

from ditty.config.spec import RunSpec

ROOT = Path(__file__).parent.parent

FLOW = (
    "import sys; from ditty.config.spec import RunSpec; from flows.finetune import finetune; "
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
    wait_while(child, lambda: not happened())
    kill_tree(child)


def wait_while(child: "subprocess.Popen[bytes]", still: Callable[[], bool]) -> None:
    """Return when it is no longer so; the process must not end before."""
    while still():
        assert child.poll() is None, f"it ended with {child.returncode} before that happened"
        time.sleep(0.002)


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


class Holder:
    """A process that holds a lock, and appends to files as it is told. A context manager.

    Args:
        path: of the lock.
        shared: see `ditty.store.files.FileLock`.
    """

    SCRIPT = """
import json, sys
from pathlib import Path
from ditty.store.files import locked
with locked(Path(sys.argv[1]), shared=sys.argv[2] == "True"):
    print("held", flush=True)
    for order in sys.stdin:
        path, text = json.loads(order)
        with open(path, "a") as file:
            file.write(text)
        print("written", flush=True)
"""

    def __init__(self, path: Path, *, shared: bool = False):
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(path), str(shared)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin and self.process.stdout
        self.orders, self.answers = self.process.stdin, self.process.stdout
        assert self.answers.readline() == "held\n"

    def __enter__(self) -> "Holder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        self.orders.close()
        self.answers.close()

    def append(self, path: Path, text: str) -> None:
        """Let it append; returns when it has."""
        self.orders.write(json.dumps([str(path), text]) + "\n")
        self.orders.flush()
        assert self.answers.readline() == "written\n"

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait()


class Command:
    """`ditty ARGUMENTS` in a process of its own, its output as on a terminal. A context manager."""

    def __init__(self, *arguments: str, **variables: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from flows.commands.cli import main; main()", *arguments],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = b""

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def until(self, text: str | None, seconds: float = 60.0) -> str:
        """All output so far, as soon as `text` is in it, or (None) at its end."""
        assert self.process.stdout
        while text is None or text.encode() not in self.output:
            ready, _, _ = select.select([self.process.stdout], [], [], seconds)
            assert ready, f"{seconds} s without output; waiting for {text!r} after {self.output!r}"
            block = os.read(self.process.stdout.fileno(), 1 << 16)
            if not block:
                assert text is None, f"it ended without {text!r}: {self.output!r}"
                break
            self.output += block
        return self.output.decode()

    def end(self) -> tuple[int, str]:
        """(exit code, all output) once it ends by itself."""
        text = self.until(None)
        return self.process.wait(), text
