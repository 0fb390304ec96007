"""One machine's part of a stage that a cluster started: what a local launch does, on this machine.

    python -m ditty.processes.node [--distributed] STAGE ATTEMPT

All machines share ATTEMPT. Their output is the cluster's to collect, and signals come from it.
Exit code: 1 if the stage failed: a cluster may then end the other machines' parts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ditty.config.choices import Where
from ditty.config.specfile import parse_spec
from ditty.errors import DittyError
from ditty.processes.backend import StageRun
from ditty.processes.environment import child_environment
from ditty.processes.local import guarded, worker_command
from ditty.processes.machines import resolve_machines
from ditty.processes.signals import stop_signal
from ditty.runs.rundir import Result, Status, read_job, read_result, write_result
from ditty.store.files import make_dir

WAIT_SECONDS = 0.5


def main(arguments: Sequence[str]) -> int:
    """Run this machine's part; the exit code."""
    *options, stage, folder = arguments
    attempt = Path(folder)
    try:
        _run(_stage_run(stage, attempt, distributed=options == ["--distributed"]))
    except DittyError as error:
        print(f"ERROR ditty.processes.node: {error}", flush=True)  # noqa: T201  (the job's log)
        if read_result(attempt) is None:
            kind = type(error).__name__
            write_result(attempt, Result(Status.FAILED, 0, kind, str(error), error.retryable))
    result = read_result(attempt)
    return 1 if result is None or result.status is Status.FAILED else 0


def _stage_run(stage: str, attempt: Path, *, distributed: bool) -> StageRun:
    launch = parse_spec(read_job(attempt)["spec"]).launch
    here = (launch if distributed else launch.alone()).model_copy(update={"backend": Where.LOCAL})
    return StageRun(stage, attempt, here, distributed)


def _run(run: StageRun) -> None:
    env = child_environment(run.launch)
    rank = resolve_machines(run.launch).rank
    folder = make_dir(run.attempt / "machines" / f"{rank:05d}")
    argv = worker_command(run, folder)
    grace = run.launch.grace_seconds
    with stop_signal() as told, guarded(argv, output=None, env=env, grace=grace) as processes:
        while processes.wait(WAIT_SECONDS) is None:
            if told:
                processes.stop()
                return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
