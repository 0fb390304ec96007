"""The sbatch script of a stage: one task of `srun` on each node, which starts ditty's own launch.

A job that is preempted, or comes near its time limit, has its ranks save, and puts itself into the
queue again: Slurm does that by itself only for jobs that had to be killed, and for lost nodes.
"""

import math
import shlex
import sys
from collections.abc import Iterator

from ditty.config.choices import Device
from ditty.config.launchspec import SlurmSpec
from ditty.processes.backend import StageRun
from ditty.processes.environment import MARGIN_SECONDS
from ditty.processes.machines import HOST_VARIABLE, PORT_VARIABLE

SCRIPT = r"""#!/bin/bash
{options}
# Written by ditty from the run's spec.

running() {{ [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; }}

result={attempt}/result.json
step() {{ sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$result" 2>/dev/null; }}
saved() {{ grep -qs '"status": "preempted"' "$result" && grep -qs '"retryable": true' "$result"; }}

# What this job left the last time, where it was put back into the queue.
before="$(step)"
rm -rf {attempt}/heartbeat "$result"

export {host}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export {port}="$((20000 + SLURM_JOB_ID % 10000))"  # another one for each job of a node
# Since 22.05 srun does not take this from sbatch by itself.
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

srun --kill-on-bad-exit=1 {command} &
step=$!
# Slurm tells this script alone that it wants the nodes; a job that it ends, or that somebody
# cancels, is not RUNNING any more, and all of its processes are told. srun itself, told to end,
# would kill them.
trap 'told=1; running && scancel --signal=TERM "$SLURM_JOB_ID"' TERM
while told=; wait "$step"; code=$?; [ -n "$told" ]; do :; done
trap - TERM

# A job that is cancelled saves as well, and must not come back; one that has not got on since the
# start before would come back for ever: the flow has a limit for that.
if saved && running && [ "$(step)" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def batch_script(run: StageRun, job_name: str) -> str:
    """The script for `run`, to be given to sbatch as it is."""
    options = [*_own_options(run, job_name), *_options(run.launch.slurm)]
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        attempt=shlex.quote(str(run.attempt)),
        command=shlex.join(_node_command(run)),
        host=HOST_VARIABLE,
        port=PORT_VARIABLE,
    )


def _node_command(run: StageRun) -> list[str]:
    how = ["--distributed"] if run.distributed else []
    return [sys.executable, "-m", "ditty.processes.node", *how, run.stage, str(run.attempt)]


def _own_options(run: StageRun, job_name: str) -> Iterator[str]:
    launch = run.launch
    # In a file name % begins a pattern of Slurm's.
    log_path = str(run.attempt / "log.txt").replace("%", "%%")
    yield _option("job-name", job_name)
    yield _option("comment", str(run.attempt))
    yield _option("output", log_path)
    yield _option("open-mode", "append")
    yield _option("nodes", launch.num_machines)
    yield _option("ntasks-per-node", 1)
    if launch.threads and "cpus-per-task" not in launch.slurm.options:
        yield _option("cpus-per-task", launch.threads * launch.num_processes)
    if launch.device is Device.CUDA and not _asks_for_gpus(launch.slurm):
        yield _option("gpus-per-node", launch.num_processes)
    yield _option("requeue", True)
    yield _option("signal", f"B:TERM@{math.ceil(launch.grace_seconds + MARGIN_SECONDS)}")


def _asks_for_gpus(slurm: SlurmSpec) -> bool:
    resources = ("gres", "tres-per-node", "tres-per-task")  # which may be others than GPUs
    return any(
        name.startswith("gpus") or (name in resources and "gpu" in str(value))
        for name, value in slurm.options.items()
    )


def _options(slurm: SlurmSpec) -> Iterator[str]:
    named = {"partition": slurm.partition, "account": slurm.account, "time": slurm.time_limit}
    for name, value in {**named, **slurm.options}.items():
        if value is not None:
            yield _option(name, value)


def _option(name: str, value: str | int | bool) -> str:
    # sbatch reads quotes in these lines as a shell does.
    return f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
