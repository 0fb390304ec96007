"""The backend `local`: a stage's processes on this machine, below a guard that leaves none behind.

On several machines with `backend: local` each starts its own part: they meet by what
ditty.processes.machines finds.
"""

import fcntl
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from ditty.config.choices import Device
from ditty.config.launchspec import LaunchSpec
from ditty.errors import RunError
from ditty.processes.backend import Ended, StageRun
from ditty.processes.environment import MARGIN_SECONDS, child_environment, resolve_device
from ditty.processes.machines import resolve_machines
from ditty.processes.record import write_record
from ditty.store.files import write_atomic

log = logging.getLogger(__name__)

WORKER_MODULE = "ditty.worker"
JOIN_MARGIN_SECONDS = 300.0


class Local:
    """Processes of this machine; when the flow ends, however it does, they save and end."""

    def check(self, launch: LaunchSpec) -> None:
        """See `Backend`; the devices and the variables are there."""
        child_environment(launch)

    def describe(self, launch: LaunchSpec) -> str:
        """See `Backend`."""
        if launch.num_machines == 1:
            return "this machine"
        return f"{launch.num_machines} machines, each of which starts the same spec"

    def find(self, name: str, stage: str, attempts: Path) -> Path | None:
        """See `Backend`; the guard has ended them."""
        return None

    @contextmanager
    def start(self, run: StageRun) -> Iterator["Guarded"]:
        """See `Backend`.

        Raises:
            SpecError: the launch does not fit this machine.
            RunError: this is not Linux.
        """
        argv = worker_command(run, run.attempt)
        env = child_environment(run.launch)
        write_record(run.attempt, argv, env, run.launch, resolve_machines(run.launch).rank)
        with (
            open(run.attempt / "log.txt", "ab") as output,
            guarded(argv, output=output, env=env, grace=run.launch.grace_seconds) as processes,
        ):
            yield processes


def worker_command(run: StageRun, folder: Path) -> list[str]:
    """The command of this machine's part of `run`; what it reads besides goes into `folder`.

    Raises:
        SpecError: see `accelerate_command`.
    """
    arguments = [run.stage, str(run.attempt)]
    if run.distributed:
        return accelerate_command(run.launch, folder, arguments)
    return [sys.executable, "-m", WORKER_MODULE, *arguments]


def accelerate_command(launch: LaunchSpec, folder: Path, arguments: Sequence[str]) -> list[str]:
    """The command that starts this machine's processes of one world of `launch.world_size`.

    Writes `folder/accelerate.yaml`, so that a machine-wide configuration is never read. On CPUs
    only `MULTI_GPU` together with the variable ACCELERATE_USE_CPU (`child_environment`) makes a
    world: with `--cpu` or `MULTI_CPU` accelerate starts one process, or one world a machine, and
    says nothing.

    Several machines meet statically: the c10d rendezvous gives out ranks as machines arrive, and
    rank 0 has to be on machine 0. Nothing is restarted here: a retry is a new attempt.

    Raises:
        SpecError: see `resolve_device` and `resolve_machines`.
    """
    several = launch.world_size > 1
    machines = resolve_machines(launch)
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if several else "NO",
        "use_cpu": resolve_device(launch) == Device.CPU and not several,
        "num_processes": launch.world_size,
        "num_machines": launch.num_machines,
        "machine_rank": machines.rank,
        "rdzv_backend": "static",
        "main_process_ip": machines.host,
        "main_process_port": machines.port,
        "gpu_ids": "all",
        "mixed_precision": "no",  # the worker casts by itself
        "debug": False,
    }
    path = folder / "accelerate.yaml"
    write_atomic(path, yaml.safe_dump(config, sort_keys=False).encode())
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    if launch.num_machines > 1:
        # No key of the file. After a cut link one machine starts again at once, another when its
        # collectives time out: the first has to wait for it.
        wait = math.ceil(launch.collective_timeout_seconds + JOIN_MARGIN_SECONDS)
        argv += ["--rdzv_conf", f"timeout={wait}"]
    return [*argv, "-m", WORKER_MODULE, *arguments]


class Guarded:
    """A command below a guard (ditty.processes.guard)."""

    def __init__(self, guard: "subprocess.Popen[bytes]", grace: float):
        self._guard, self._grace = guard, grace

    def wait(self, seconds: float) -> Ended | None:
        """See `Processes`."""
        try:
            self._guard.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        code: int = self._guard.returncode
        return Ended(_exit(code if code >= 0 else 128 - code))

    def stop(self) -> None:
        """SIGTERM to the whole tree, the grace, then SIGKILL.

        A second exception during that wait leaves at once, and the guard finishes without us.
        """
        self._guard.terminate()
        try:
            self._guard.wait(self._grace + MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            # A process in uninterruptible sleep. Killing the guard would orphan it.
            log.warning(
                "processes below guard %d resist SIGKILL; it goes on without us", self._guard.pid
            )


def _exit(code: int) -> str:
    """128 + signal where a signal ended it, 127 where it could not start."""
    if code > 128 and code - 128 in list(signal.Signals):
        return f"exit code {code} ({signal.Signals(code - 128).name})"
    return f"exit code {code}"


@contextmanager
def guarded(
    command: Sequence[str], *, output: IO[bytes] | None, env: Mapping[str, str], grace: float
) -> Iterator[Guarded]:
    """Start a command below a guard: whatever happens here, leaving the block stops its tree.

    `output` is a file and not a pipe: if this process were killed, a pipe would give the command
    EPIPE in the middle of a save.

    Args:
        output: where the command writes; None: where we do.
        env: the command's whole environment; see `child_environment`.
        grace: seconds between SIGTERM and SIGKILL.
    Raises:
        RunError: this is not Linux.
    """
    _check_platform()
    with _Pipe() as pipe:
        yield Guarded(_start_guard(command, pipe, output, env, grace), grace)


def _start_guard(
    command: Sequence[str],
    pipe: "_Pipe",
    output: IO[bytes] | None,
    env: Mapping[str, str],
    grace: float,
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "ditty.processes.guard", str(pipe.reader), f"{grace:g}", *command],
        env=dict(env),
        pass_fds=(pipe.reader,),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,  # Ctrl-C in a terminal is for us alone: we stop it in order
    )


def _check_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise RunError(
            f"ditty starts stages on Linux only, this is {sys.platform}: "
            "elsewhere nothing can make sure that no process outlives a run"
        )


class _Pipe:
    """A pipe whose writing end nobody but us holds: its end of file tells that we are gone."""

    def __enter__(self) -> "_Pipe":
        ends = os.pipe()
        # Where stdin is closed, the pipe would get number 0, and Popen puts /dev/null there.
        self.reader, self.writer = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in ends)
        for fd in ends:
            os.close(fd)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.writer)
        os.close(self.reader)
