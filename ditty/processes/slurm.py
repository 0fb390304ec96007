"""The backend `slurm`: a stage as a job of a Slurm cluster, which outlives the flow.

The nodes have the same DITTY_HOME, Python and ditty as the flow, under the same paths. A job is
known by its name, which is the run's, and by its comment, which is the attempt's directory: nothing
else has to be remembered to find it again.
"""

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditty.config.launchspec import LaunchSpec
from ditty.errors import RemoteError, SpecError
from ditty.processes.backend import Ended, StageRun
from ditty.processes.batchscript import batch_script
from ditty.processes.environment import MARGIN_SECONDS, environment_elsewhere
from ditty.processes.record import write_record
from ditty.runs.rundir import read_job
from ditty.store.files import locked, remove_tree, write_atomic

log = logging.getLogger(__name__)

PROGRAMS = ("sbatch", "squeue", "scancel")
ASK_SECONDS = 5.0  # between looks at the queue: all users of a cluster share its controller
ANSWER_SECONDS = 60.0

# Source: squeue(1), JOB STATE CODES; a job in any other state is there, or will be.
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
    + ("PREEMPTED", "REVOKED", "TIMEOUT")
)
STANDING = frozenset(("SUSPENDED", "STOPPED"))  # its processes are there, and do nothing
FORGOTTEN = "Invalid job id specified"  # squeue, minutes after a job's end
# sbatch's words where the same again may succeed.
PASSING = ("Unable to contact slurm controller", "Socket timed out", "Resource temporarily")


class Slurm:
    """Jobs of the cluster that sbatch and squeue of this machine know."""

    def check(self, launch: LaunchSpec) -> None:
        """See `Backend`; what the partition takes, sbatch says when a job is submitted."""
        _check_programs()
        environment_elsewhere(launch)

    def describe(self, launch: LaunchSpec) -> str:
        """See `Backend`."""
        slurm = launch.slurm
        nodes = f"{launch.num_machines} node{'s' if launch.num_machines > 1 else ''}"
        return ", ".join(
            [f"Slurm: {nodes} of {slurm.partition or 'the default partition'}"]
            + ([f"account {slurm.account}"] if slurm.account else [])
            + [f"at most {slurm.time_limit or 'what the partition allows'} at a time"]
        )

    def find(self, name: str, stage: str, attempts: Path) -> Path | None:
        """See `Backend`."""
        _check_programs()
        found = _find(job_name(name, stage), attempts)
        return found[1] if found else None

    @contextmanager
    def start(self, run: StageRun) -> Iterator["Job"]:
        """See `Backend`; leaving the block leaves the job."""
        name = job_name(read_job(run.attempt)["spec"]["name"], run.stage)
        with locked(run.attempt.parent / "submit"):  # against another flow of this run
            found = _find(name, run.attempt.parent)
            if found and found[1] != run.attempt:
                raise RemoteError(
                    f"job {found[0]} of {found[1]} was submitted just now, by another flow of this "
                    "run: run again, and it is taken up"
                )
            number = found[0] if found else _submit(run, name)
        log.info("%s is job %s of Slurm%s", name, number, ", found again" if found else "")
        yield Job(number, run)


class Job:
    """A job of Slurm's queue."""

    def __init__(self, number: str, run: StageRun):
        self.number, self.run = number, run
        self._state, self._next, self._away = "", 0.0, False

    def wait(self, seconds: float) -> Ended | None:
        """See `Processes`."""
        time.sleep(seconds)
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + ASK_SECONDS
        state = self._ask()
        if state == self._state:
            return None
        self._state = state
        log.info("job %s: %s", self.number, state)
        if state == "PENDING":
            # Those of the start before; that they do not beat is no sign of a hang.
            remove_tree(self.run.attempt / "heartbeat")
        if state in STANDING:
            # The same, of processes that will write the next ones there.
            for beat in (self.run.attempt / "heartbeat").glob("rank_*.json"):
                beat.unlink(missing_ok=True)
        if state in ENDED or state == FORGOTTEN:
            how = f"Slurm's state {state} of job {self.number}"
            return Ended(how, cancelled=state == "CANCELLED")
        return None

    def _ask(self) -> str:
        """The job's state, or FORGOTTEN; where Slurm does not answer, as before: it ends no job."""
        ask = ("squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%T")
        try:
            state = _call(*ask).strip() or FORGOTTEN
        except RemoteError as error:
            if FORGOTTEN in str(error):
                return FORGOTTEN
            if not self._away:
                log.warning("%s: job %s goes on, and so does the wait for it", error, self.number)
            self._away = True
            return self._state
        self._away = False
        return state

    def stop(self) -> None:
        """Cancel it: SIGTERM, so that it saves; after Slurm's KillWait (30 s) SIGKILL."""
        try:
            _call("scancel", self.number)
        except RemoteError as error:
            log.warning("job %s goes on until you cancel it: %s", self.number, error)
            return
        end = time.monotonic() + self.run.launch.grace_seconds + MARGIN_SECONDS
        while time.monotonic() < end:
            if self._ask() in ENDED | {FORGOTTEN}:
                return
            time.sleep(1)
        log.warning("job %s is cancelled, and has not ended yet", self.number)


def job_name(name: str, stage: str) -> str:
    """The name in Slurm's queue."""
    return f"ditty-{name}-{stage}"


def _find(name: str, attempts: Path) -> tuple[str, Path] | None:
    """(number, attempt) of the job of that name that is in the queue for an attempt in there."""
    ask = ("squeue", "--noheader", "--me", f"--name={name}", "--format=%i|%T|%k")
    for line in _call(*ask).splitlines():
        number, state, comment = line.split("|", 2)
        if state not in ENDED and Path(comment).parent == attempts:
            return number, Path(comment)
    return None


def _submit(run: StageRun, name: str) -> str:
    """Submit the job; its number."""
    script = run.attempt / "job.sh"
    write_atomic(script, batch_script(run, name).encode())
    env = environment_elsewhere(run.launch)
    argv = ["sbatch", "--parsable", "--export=ALL", str(script)]  # all of `env`
    write_record(run.attempt, argv, env, run.launch)
    try:
        return _call(*argv, env=_configuration() | env).strip().partition(";")[0]
    except RemoteError as error:
        no_answer = error.__cause__ is not None  # and perhaps it was submitted: it is looked for
        if no_answer or any(word in str(error) for word in PASSING):
            raise
        raise SpecError(f"{error}\nLook at launch.slurm; the script is {script}") from error


def _check_programs() -> None:
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise SpecError(
                f"launch.backend: slurm needs {program}, which is not on PATH: run ditty where you "
                "submit jobs (a login node), or use backend: local"
            )


def _call(*argv: str, env: dict[str, str] | None = None) -> str:
    """The output of one of Slurm's programs.

    Raises:
        RemoteError: it failed; in its own words.
    """
    try:
        answer = subprocess.run(
            argv,
            env=env or _client_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RemoteError(
            f"{argv[0]} does not answer: {error}; try it by hand on this machine"
        ) from error
    if answer.returncode:
        raise RemoteError(answer.stderr.strip() or f"{argv[0]} ended with {answer.returncode}")
    return answer.stdout


def _client_environment() -> dict[str, str]:
    """Without SQUEUE_*, SBATCH_* and SLURM_*, which change what these programs do and show."""
    foreign = ("SQUEUE_", "SBATCH_", "SCANCEL_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return _configuration() | kept


def _configuration() -> dict[str, str]:
    return {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
