"""Work in processes that are forked from one which has imported torch and its like, once a session.

Importing torch, transformers and DeepSpeed takes longer than a tiny training. A process that comes
from here is one like any other: it may train, fork the ranks of a world, and die.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from ditty.processes import local
from ditty.store.files import read_json

FORK = multiprocessing.get_context("fork")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.imported"])
SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


# Of all trainings on CPUs: no GPU is looked for, and no hub asked.
CPU_ONLY = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}


def run(
    work: Callable[[Path], None],
    path: Path,
    *,
    environment: Mapping[str, str],
    seconds: float | None = None,
    context: Any = SERVER,
) -> str:
    """Do `work(path)` in a new process; what it and those below it printed.

    Args:
        seconds: after which it is killed; none: it is waited for.
    """
    output = path.with_suffix(".output")
    process = start(work, path, output=output, environment=environment, context=context)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return output.read_text()


def start(
    work: Callable[..., Any],
    *arguments: Any,
    output: Path,
    environment: Mapping[str, str],
    context: Any = SERVER,
) -> BaseProcess:
    """Call `work` in a new process that prints to the end of `output`.

    Its exit code is 0, 1 after an exception, or the signal that ended it, negative.
    """
    forked = context is SERVER
    call = (work, arguments, output, dict(environment), forked)
    process = context.Process(target=_call, args=call)
    process.start()
    return process  # type: ignore[no-any-return]


def _call(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    output: Path,
    environment: dict[str, str],
    forked: bool,
) -> None:
    with open(output, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if forked:  # where the server could not import it, it said nothing; now we hear why
        import tests.imported  # noqa: F401
    os.environ.clear()  # the server's are those of its start
    os.environ.update(environment)
    work(*arguments)


class Worker:
    """A forked `ditty.worker` in the place of the process below a guard that a launch starts.

    For tests whose point is what a stage makes. That a launch starts a fresh one, and how it ends:
    test_stage_launch.py, test_distributed.py, test_kills.py.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        *_, stage, attempt = command
        log = Path(attempt) / "log.txt"
        assert read_json(log.with_name("launch.json"))["num_processes"] == 1
        self.process = start(_work, stage, attempt, output=log, environment=env)
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, seconds: float) -> None:
        """Raises TimeoutExpired, as Popen does."""
        self.process.join(seconds)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("ditty.worker", seconds)


def instead_of_launching(patch: pytest.MonkeyPatch) -> None:
    """Let the stages that this process launches in one process be a `Worker` each."""
    patch.setattr(
        local, "_start_guard", lambda command, pipe, output, env, grace: Worker(command, env)
    )


def _work(stage: str, attempt: str) -> None:
    from ditty import worker

    sys.exit(worker.main([stage, attempt]))
