"""The launch part of a spec: processes, and what is asked of a Slurm cluster."""

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from ditty.config.choices import Device, Where
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


class LaunchSpec(Section):
    """Processes and how to deal with their end. Nothing here changes the result of a stage."""

    backend: Where = Where.LOCAL
    """Where the processes of training and of the other stages with tensors run: here, or as jobs of
    a Slurm cluster, which has the same DITTY_HOME and Python."""
    slurm: SlurmSpec = Field(default_factory=SlurmSpec)
    """What `backend: slurm` asks the cluster for."""
    num_processes: int = Field(default=1, ge=1)
    """Training processes on each machine; on GPUs one a GPU."""
    num_machines: int = Field(default=1, ge=1)
    """Machines that train together; with `backend: local` each starts the same spec."""
    machine_rank: int | None = Field(default=None, ge=0)
    """Which of them this is, from 0; by default DITTY_MACHINE_RANK or SLURM_NODEID says so."""
    main_host: str | None = None
    """Machine 0's name or address as the others reach it; by default DITTY_MAIN_HOST says so."""
    main_port: int | None = Field(default=None, ge=1, le=65535)
    """A free port of machine 0; by default DITTY_MAIN_PORT, or 29500."""
    collective_timeout_seconds: float = Field(default=600.0, gt=0)
    """A process that waits for another one longer than this gives it up for lost. Raise it where
    a single save, or loading the model, takes longer."""
    device: Device = Device.AUTO
    """Where to train."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads a process; by default the cores divided by the processes."""
    grace_seconds: float = Field(default=20.0, ge=0)
    """Time to save between SIGTERM and SIGKILL; Prefect's runner itself waits 30 s."""
    retries: int = Field(default=3, ge=0)
    """Attempts after the first, where the failure can pass (preempted, crashed, unreachable). Each
    new checkpoint of a training restores them: they count those in a row that did not get on."""
    retry_delay_seconds: float = Field(default=10.0, ge=0)
    """Before the first retry; doubles with each. A training that got on is retried at once."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that the training process gets besides the usual ones."""

    @model_validator(mode="after")
    def _one_of_the_machines(self) -> "LaunchSpec":
        if self.machine_rank is not None and self.machine_rank >= self.num_machines:
            raise ValueError(
                f"machine_rank is {self.machine_rank} of num_machines: {self.num_machines}; "
                f"expected 0 to {self.num_machines - 1}"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_backend(self) -> "LaunchSpec":
        if self.backend is Where.LOCAL:
            return self
        if self.device is Device.AUTO:
            raise ValueError(
                f"device: auto looks for a GPU here, and backend: {self.backend} runs elsewhere; "
                "write device: cuda, or cpu"
            )
        for key in ("machine_rank", "main_host"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} goes with backend: local; which machines {self.backend} gives is known "
                    "when the job starts: remove it"
                )
        return self

    def alone(self) -> "LaunchSpec":
        """The same for one process on one machine."""
        one = {"num_processes": 1, "num_machines": 1, "machine_rank": None}
        return self.model_copy(update=one)

    @property
    def world_size(self) -> int:
        """Training processes on all machines."""
        return self.num_processes * self.num_machines


def _checked(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{text!r} is no value for sbatch: expected one line of text")
    return text
