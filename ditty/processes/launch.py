"""Starting a stage in a process of its own, and leaving none behind.

The launching process (the flow, or the command line) knows nothing of torch. It writes the job into
the attempt's directory, runs `python -m ditty.worker STAGE ATTEMPT` below a guard
(ditty.processes.guard), follows its log file, and reads what the worker left in `result.json`. Exit
codes mean nothing: accelerate and torchrun turn each of them into 1.
"""

import fcntl
import importlib.metadata
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from ditty import errors
from ditty.config.choices import Device
from ditty.config.spec import LaunchSpec
from ditty.errors import DittyError, RunError
from ditty.processes.environment import MARGIN_SECONDS, child_environment, resolve_device
from ditty.processes.machines import resolve_machines
from ditty.runs.rundir import Result, Status, read_result
from ditty.runs.tail import LineTail
from ditty.store.files import write_atomic, write_json

log = logging.getLogger(__name__)

WORKER_MODULE = "ditty.worker"
RECORDED_PACKAGES = ("ditty", "torch", "transformers", "accelerate", "peft", "bitsandbytes")

POLL_SECONDS = 0.2
CHECK_SECONDS = 1.0
RECENT_LINES = 20
LINE_CHARACTERS = 400  # of each recent line, in an error message
JOIN_MARGIN_SECONDS = 300.0


def run_stage(
    stage: str,
    job: Mapping[str, Any],
    attempt: Path,
    launch: LaunchSpec,
    *,
    distributed: bool,
    on_line: Callable[[str], None],
    check: Callable[[], None],
) -> Result:
    """Run `python -m ditty.worker STAGE ATTEMPT` to its end.

    Writes `job.json`, `launch.json` and, where distributed, `accelerate.yaml` into `attempt`; the
    output goes to `log.txt` there.

    Args:
        job: what the worker is to do; JSON values.
        attempt: a fresh directory of the run directory (`RunDir.new_attempt`).
        distributed: through accelerate, in `launch.num_processes` processes, which form one world
            with those of the other machines; otherwise in one process, on this machine alone.
        on_line: gets each complete line of output.
        check: called about once a second; may raise to stop the stage.
    Returns:
        The worker's result, whatever its status. A worker that left none has crashed.
    Raises:
        SpecError: the launch does not fit this machine.
        RunError: this is not Linux.
        whatever `on_line` and `check` raise, after the stage's processes are gone.
    """
    attempt = attempt.absolute()
    assert read_result(attempt) is None, f"{attempt} is not fresh, and its result would count"
    argv, launch = _worker_command(stage, attempt, launch, distributed)
    env = child_environment(launch)
    write_json(attempt / "job.json", job)
    write_json(attempt / "launch.json", _describe(argv, env, launch))
    recent: deque[str] = deque(maxlen=RECENT_LINES)

    def remember(line: str) -> None:
        recent.append(line)
        on_line(line)

    log_path, grace = attempt / "log.txt", launch.grace_seconds
    code = run_guarded(argv, log_path=log_path, env=env, grace=grace, on_line=remember, check=check)
    return read_result(attempt) or _crashed(stage, code, log_path, recent)


def _worker_command(
    stage: str, attempt: Path, launch: LaunchSpec, distributed: bool
) -> tuple[list[str], LaunchSpec]:
    """The command, and the launch that it stands for."""
    arguments = [stage, str(attempt)]
    if distributed:
        return accelerate_command(launch, attempt, arguments), launch
    alone = {"num_processes": 1, "num_machines": 1, "machine_rank": None}
    return [sys.executable, "-m", WORKER_MODULE, *arguments], launch.model_copy(update=alone)


def raise_for_result(result: Result) -> None:
    """Return if the stage is done, else raise what it ended with.

    Raises:
        DittyError: the class of ditty.errors that `result.kind` names (Preempted: it was asked to
            stop, and saved), or RunError where it names none; `retryable` follows the result.
    """
    if result.status is Status.OK:
        return
    named = getattr(errors, result.kind, None)
    if isinstance(named, type) and issubclass(named, DittyError):
        error = named(result.message)
    else:
        error = RunError(f"{result.kind}: {result.message}")
    error.retryable = result.retryable
    raise error


def run_guarded(
    command: Sequence[str],
    *,
    log_path: Path,
    env: Mapping[str, str],
    grace: float,
    on_line: Callable[[str], None],
    check: Callable[[], None],
) -> int:
    """Run a command below a guard; when this returns or raises, none of its processes is left.

    The output goes to the end of the file `log_path`, which is followed. It is not a pipe: if this
    process were killed, a pipe would give the command EPIPE in the middle of a save.

    On any exception, also KeyboardInterrupt and what signal handlers raise, the command's whole
    process tree gets SIGTERM, `grace` seconds, then SIGKILL. A second exception during that wait
    leaves at once, and the guard finishes without us.

    Args:
        env: the command's whole environment; see `child_environment`.
        grace: seconds between SIGTERM and SIGKILL.
        on_line: gets complete lines without their end; of a progress bar (carriage returns) the
            last state.
        check: called about once a second; may raise.
    Returns:
        the command's exit code, 128 + signal where a signal ended it, 127 where it cannot start.
    Raises:
        RunError: this is not Linux.
        whatever `on_line` and `check` raise.
    """
    _check_platform()
    # Whatever happens here, leaving the block closes our end of the pipe, and that stops the guard.
    with open(log_path, "ab") as output, LineTail(log_path, at_end=True) as tail, _Pipe() as pipe:
        guard = _start_guard(command, pipe, output, env, grace)
        try:
            _follow(guard, tail, on_line, check)
        except BaseException:
            _stop(guard, grace)
            with suppress(Exception):  # the first exception is the one to tell
                for line in tail.read(last=True):
                    on_line(line)
            raise
    code: int = guard.returncode
    return code if code >= 0 else 128 - code


def _check_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise RunError(
            f"ditty starts stages on Linux only, this is {sys.platform}: "
            "elsewhere nothing can make sure that no process outlives a run"
        )


def _start_guard(
    command: Sequence[str],
    pipe: "_Pipe",
    output: BinaryIO,
    env: Mapping[str, str],
    grace: float,
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "ditty.processes.guard", str(pipe.reader), f"{grace:g}", *command],
        env=dict(env),
        pass_fds=(pipe.reader,),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in a terminal is for us alone: we stop it in order
    )


def _follow(
    guard: "subprocess.Popen[bytes]",
    tail: LineTail,
    on_line: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    next_check = time.monotonic() + CHECK_SECONDS
    while True:
        try:
            guard.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        else:
            break
        for line in tail.read():
            on_line(line)
        if time.monotonic() >= next_check:
            check()
            next_check = time.monotonic() + CHECK_SECONDS
    for line in tail.read(last=True):
        on_line(line)


def _stop(guard: "subprocess.Popen[bytes]", grace: float) -> None:
    guard.terminate()
    try:
        guard.wait(grace + MARGIN_SECONDS)
    except subprocess.TimeoutExpired:
        # A process in uninterruptible sleep. Killing the guard would orphan it.
        log.warning("processes below guard %d resist SIGKILL; it goes on without us", guard.pid)


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


def accelerate_command(launch: LaunchSpec, attempt: Path, arguments: Sequence[str]) -> list[str]:
    """The command that starts this machine's processes of one world of `launch.world_size`.

    Writes `attempt/accelerate.yaml`, so that a machine-wide configuration is never read. On CPUs
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
    path = attempt / "accelerate.yaml"
    write_atomic(path, yaml.safe_dump(config, sort_keys=False).encode())
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    if launch.num_machines > 1:
        # No key of the file. After a cut link one machine starts again at once, another when its
        # collectives time out: the first has to wait for it.
        wait = math.ceil(launch.collective_timeout_seconds + JOIN_MARGIN_SECONDS)
        argv += ["--rdzv_conf", f"timeout={wait}"]
    return [*argv, "-m", WORKER_MODULE, *arguments]


def _describe(argv: Sequence[str], env: Mapping[str, str], launch: LaunchSpec) -> dict[str, Any]:
    """The content of `launch.json`: names of environment variables, never their values."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "argv": list(argv),
        "device": resolve_device(launch),
        "num_processes": launch.num_processes,
        "num_machines": launch.num_machines,
        "machine_rank": resolve_machines(launch).rank,
        "threads": int(env["OMP_NUM_THREADS"]),
        "environment": sorted(env),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit checked out in the current directory; None where there is no repository or git."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        answer = subprocess.run(
            [git, "rev-parse", "HEAD"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _crashed(stage: str, code: int, log_path: Path, recent: Sequence[str]) -> Result:
    """The result of a worker that left none."""
    ended = f"exit code {code}"
    if code > 128 and code - 128 in list(signal.Signals):
        ended += f" ({signal.Signals(code - 128).name})"
    lines = [line[:LINE_CHARACTERS] for line in recent] or ["(it printed nothing)"]
    message = "\n  ".join(
        [f"stage {stage} ended with {ended} and left no result. The end of {log_path}:", *lines]
    )
    return Result(status=Status.FAILED, kind="Crashed", message=message, retryable=True)
