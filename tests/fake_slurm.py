"""sbatch, squeue and scancel that keep a queue in a folder: no cluster, no daemon.

What they print is what Slurm 22.05 prints; tests/test_slurm_cluster.py asks both.
"""

from pathlib import Path

UNKNOWN_JOB = "slurm_load_jobs error: Invalid job id specified\n"
UNKNOWN_PARTITION = (
    "sbatch: error: invalid partition specified: nowhere\n"
    "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
)

SBATCH = """
for script; do :; done
if grep -q '^#SBATCH --partition=nowhere$' "$script"; then cat {folder}/partition >&2; exit 1; fi
number=$(($(ls {folder}/jobs | wc -l) + 1))
job={folder}/jobs/$number
mkdir $job
cp "$script" $job/script
env > $job/env
sed -n 's/^#SBATCH --job-name=//p' "$script" > $job/name
sed -n 's/^#SBATCH --comment=//p' "$script" > $job/comment
echo PENDING > $job/state
echo $number
"""
SQUEUE = """
for option; do
    case $option in
        --jobs=*) number=${{option#*=}} ;;
        --name=*) name=${{option#*=}} ;;
    esac
done
if [ -f {folder}/down ]; then cat {folder}/down >&2; exit 1; fi
if [ -n "$number" ]; then
    if [ ! -d {folder}/jobs/$number ]; then cat {folder}/unknown >&2; exit 1; fi
    cat {folder}/jobs/$number/state
    exit
fi
for job in {folder}/jobs/*; do
    [ -d "$job" ] && [ "$(cat $job/name)" = "$name" ] || continue
    case $(cat $job/state) in CANCELLED|COMPLETED|FAILED|NODE_FAIL|TIMEOUT) continue ;; esac
    echo "${{job##*/}}|$(cat $job/state)|$(cat $job/comment)"
done
"""
SCANCEL = "echo CANCELLED > {folder}/jobs/$1/state"


class FakeSlurm:
    """The queue; `commands` is for PATH. A job runs nothing: tests say what becomes of it."""

    def __init__(self, folder: Path):
        self.folder, self.commands = folder, folder / "commands"
        (folder / "jobs").mkdir(parents=True)
        self.commands.mkdir()
        (folder / "unknown").write_text(UNKNOWN_JOB)
        (folder / "partition").write_text(UNKNOWN_PARTITION)
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
            self.program(name, text.format(folder=folder))

    def program(self, name: str, text: str) -> None:
        """Put a shell script on PATH."""
        path = self.commands / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)

    def jobs(self) -> list[str]:
        """The numbers of all jobs ever submitted."""
        return sorted(job.name for job in (self.folder / "jobs").iterdir())

    def of_job(self, number: str, what: str) -> str:
        """What sbatch was given: `script`, `env`, `name` or `comment`; or the job's `state`."""
        return (self.folder / "jobs" / number / what).read_text().removesuffix("\n")

    def becomes(self, number: str, state: str) -> None:
        """From now on the job is in that state."""
        (self.folder / "jobs" / number / "state").write_text(f"{state}\n")

    def answers(self, problem: str = "") -> None:
        """From now on squeue fails with these words, or works again."""
        (self.folder / "down").unlink(missing_ok=True)
        if problem:
            (self.folder / "down").write_text(problem)
