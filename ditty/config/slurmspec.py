"""What a spec asks a Slurm cluster for."""

import re
from typing import Any

from pydantic import Field, field_validator

from ditty.config.dataspec import Section

OPTION = re.compile(r"[a-z][a-z0-9-]+")
# sbatch's options that follow from other keys, or that a run depends on.
DECIDED = {
    "account": "write launch.slurm.account",
    "partition": "write launch.slurm.partition",
    "time": "write launch.slurm.time_limit",
    "nodes": "write launch.num_machines",
    "signal": "write launch.grace_seconds",
    "export": "name the variables in launch.environment",
    "export-file": "name the variables in launch.environment",
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "one task a node starts launch.num_processes"),
    **dict.fromkeys(("job-name", "comment"), "a job is found again by it"),
    **dict.fromkeys(("output", "error", "input", "open-mode"), "the flow follows the log"),
    **dict.fromkeys(("requeue", "no-requeue"), "a preempted job saves and queues again"),
    **dict.fromkeys(("array", "wrap", "parsable", "wait", "test-only"), "ditty writes the script"),
    **dict.fromkeys(("cluster", "clusters"), "jobs are looked for on the cluster of the flow"),
}


class SlurmSpec(Section):
    """What `launch.backend: slurm` asks for. Nodes are `launch.num_machines`, processes on each
    `launch.num_processes`, with `device: cuda` as many GPUs; the time to save when Slurm takes the
    nodes is `launch.grace_seconds`."""

    partition: str | None = None
    """Where to queue; by default the cluster's default."""
    account: str | None = None
    """Who pays."""
    time_limit: str | None = None
    """As sbatch's --time: "90" (minutes), "12:00:00", "2-00:00:00". Near its end a training saves,
    and queues again; by default the partition's."""
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    """Any other option of sbatch by its long name, `true` for one without a value:
    {qos: long, constraint: a100, mem: 0, exclusive: true, cpus-per-task: 16}."""

    @field_validator("partition", "account", "time_limit")
    @classmethod
    def _one_line(cls, text: str | None) -> str | None:
        return text if text is None else _checked(text)

    @field_validator("time_limit", mode="before")
    @classmethod
    def _time_is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f"{value} is a number: YAML takes 12:00:00 for 43200, and Slurm that for minutes; "
                'put it in quotes, as "12:00:00" (hours) or "90" (minutes)'
            )
        return value

    @field_validator("options")
    @classmethod
    def _known_to_be_free(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, value in options.items():
            if not OPTION.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no long option of sbatch; expected e.g. qos or gpus-per-node, "
                    "without dashes before it"
                )
            # sbatch takes an option by its beginning, too.
            if near := [known for known in DECIDED if known == name or known.startswith(name)]:
                raise ValueError(f"{name} is decided already: {DECIDED[near[0]]}")
            if value is False:
                raise ValueError(f"{name}: false: an option is given or not; remove it")
            _checked(str(value))
        return options


def _checked(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{text!r} is no value for sbatch: expected one line of text")
    return text
