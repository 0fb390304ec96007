"""Starting a stage in processes of its own, wherever the spec says, and reading what it left.

The launching process (the flow, or the command line) knows nothing of torch. It writes the job into
the attempt's directory, has a backend run `python -m ditty.worker STAGE ATTEMPT`, follows the log
file, and reads what the worker left in `result.json`. Exit codes mean nothing: accelerate and
torchrun turn each of them into 1.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ditty import errors
from ditty.config.choices import Where
from ditty.config.launchspec import LaunchSpec
from ditty.errors import Cancelled, Crashed, DittyError, RunBusy, RunError
from ditty.processes.backend import Backend, Ended, Processes, StageRun
from ditty.processes.local import Local
from ditty.processes.slurm import Slurm
from ditty.runs.rundir import Result, RunDir, Status, read_result
from ditty.runs.tail import LineTail
from ditty.store.files import read_json, write_json

POLL_SECONDS = 0.2
CHECK_SECONDS = 1.0
RECENT_LINES = 20
LINE_CHARACTERS = 400  # of each recent line, in an error message


def backend_of(launch: LaunchSpec) -> Backend:
    """Where the processes of a launch run."""
    return Slurm() if launch.backend is Where.SLURM else Local()


def open_attempt(run: RunDir, stage: str, launch: LaunchSpec) -> Path:
    """The attempt whose processes an earlier flow has left running, else a fresh one.

    Raises:
        SpecError: the place where they run cannot be asked from this machine.
        RemoteError: it does not answer: one must not be started twice.
    """
    attempts = (run.root / "stages" / stage).absolute()
    found = backend_of(launch).find(run.root.name, stage, attempts)
    return found or run.new_attempt(stage)


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

    Writes `job.json`, `launch.json` and, where distributed, `accelerate.yaml` into `attempt` (on a
    cluster each machine its own, in `machines/`); the output goes to `log.txt` there.

    Args:
        job: what the worker is to do; JSON values.
        attempt: of the run directory (`open_attempt`).
        distributed: through accelerate, in `launch.num_processes` processes, which form one world
            with those of the other machines; otherwise in one process, on one machine.
        on_line: gets each complete line of output.
        check: called about once a second; may raise to stop the stage.
    Returns:
        The worker's result, whatever its status. A worker that left none has crashed.
    Raises:
        SpecError: the launch does not fit this machine, or the place where it is to run.
        RunError: this is not Linux.
        RunBusy: the attempt's processes do other work than `job`.
        RemoteError: the place where it is to run does not answer.
        whatever `on_line` and `check` raise, after the stage's processes are gone, or the place
            where they run has been told to end them.
    """
    attempt = attempt.absolute()
    _write_job(attempt, job)
    run = StageRun(stage, attempt, launch if distributed else launch.alone(), distributed)
    recent: deque[str] = deque(maxlen=RECENT_LINES)

    def remember(line: str) -> None:
        recent.append(line)
        on_line(line)

    log_path = attempt / "log.txt"
    log_path.touch()
    with (
        LineTail(log_path, at_end=True) as tail,
        backend_of(launch).start(run) as processes,
    ):
        ended = follow(processes, tail, remember, check)
    return _result(stage, ended, attempt, recent)


def _write_job(attempt: Path, job: Mapping[str, Any]) -> None:
    """Leave `job` for the worker; where one works at it already, make sure that it is the same."""
    found = read_json(attempt / "job.json")
    if found is None:
        assert read_result(attempt) is None, f"{attempt} is not fresh, and its result would count"
        write_json(attempt / "job.json", job)
    elif found["key"] != job["key"]:
        raise RunBusy(
            f"the processes of {attempt} still work at another spec of this name (key "
            f"{found['key'][:12]}, not {job['key'][:12]}): wait for them, or cancel them "
            "(on Slurm, `squeue --me` lists their job), then run again"
        )


def follow(
    processes: Processes,
    tail: LineTail,
    on_line: Callable[[str], None],
    check: Callable[[], None],
) -> Ended:
    """Follow processes and their log to the end.

    On any exception, also KeyboardInterrupt and what signal handlers raise, they are stopped.

    Args:
        on_line: gets complete lines without their end; of a progress bar (carriage returns) the
            last state.
        check: called about once a second; may raise.
    Raises:
        whatever `on_line` and `check` raise.
    """
    try:
        next_check = time.monotonic() + CHECK_SECONDS
        while (ended := processes.wait(POLL_SECONDS)) is None:
            for line in tail.read():
                on_line(line)
            if time.monotonic() >= next_check:
                check()
                next_check = time.monotonic() + CHECK_SECONDS
        for line in tail.read(last=True):
            on_line(line)
    except BaseException:
        processes.stop()
        with suppress(Exception):  # the first exception is the one to tell
            for line in tail.read(last=True):
                on_line(line)
        raise
    return ended


def _result(stage: str, ended: Ended, attempt: Path, recent: Sequence[str]) -> Result:
    """What processes that ended so have left, or what it means that they left nothing."""
    result = read_result(attempt)
    if ended.cancelled and (result is None or result.status is not Status.OK):
        step = result.step if result else 0
        message = f"{stage} was cancelled where it ran ({ended.how}); run again, and it goes on"
        return Result(Status.FAILED, step, Cancelled.__name__, message)
    if result:
        return result
    lines = [line[:LINE_CHARACTERS] for line in recent] or ["(it printed nothing)"]
    what = f"stage {stage} ended with {ended.how} and left no result. The end of "
    message = "\n  ".join([f"{what}{attempt / 'log.txt'}:", *lines])
    return Result(Status.FAILED, kind=Crashed.__name__, message=message, retryable=True)


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
