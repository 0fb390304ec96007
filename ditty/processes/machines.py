"""Which machine of a launch this is, and where its machines meet. Without torch.

The spec is the same on every machine, so what tells them apart may come from the environment.
"""

import os
from dataclasses import dataclass

from ditty.config.launchspec import LaunchSpec
from ditty.errors import SpecError

RANK_VARIABLE = "DITTY_MACHINE_RANK"
SLURM_RANK_VARIABLE = "SLURM_NODEID"  # of `srun`, one task a machine
HOST_VARIABLE = "DITTY_MAIN_HOST"
PORT_VARIABLE = "DITTY_MAIN_PORT"
DEFAULT_PORT = 29500  # torchrun's
FREE_PORT = 0  # the system picks one: good enough where nobody else has to know it


@dataclass(frozen=True)
class Machines:
    """This machine's place among those of a launch.

    Attributes:
        rank: 0 is the machine whose first process writes checkpoints and the result.
        host: name or address of machine 0, an IPv6 address in brackets.
        port: TCP port there; FREE_PORT where there is one machine only.
    """

    rank: int
    host: str
    port: int


def resolve_machines(launch: LaunchSpec) -> Machines:
    """The place of this machine: the spec's keys, else the environment's variables.

    One machine needs neither, and looks at neither.

    Raises:
        SpecError: there are several machines, and rank or host of this one is nowhere to be found,
            or is none; says what to set.
    """
    if launch.num_machines == 1:
        return Machines(0, "127.0.0.1", FREE_PORT)
    return Machines(_rank(launch), _host(launch), _port(launch))


def _rank(launch: LaunchSpec) -> int:
    if launch.machine_rank is not None:
        return launch.machine_rank  # within bounds: the spec has checked it
    several = f"launch.num_machines is {launch.num_machines}"
    last = launch.num_machines - 1
    for name in (RANK_VARIABLE, SLURM_RANK_VARIABLE):
        if text := os.environ.get(name):
            if text.isdecimal() and int(text) <= last:
                return int(text)
            raise SpecError(f"{several} and {name} is {text!r}; expected a number from 0 to {last}")
    raise SpecError(
        f"{several}, and nothing says which of them this one is: set {RANK_VARIABLE} to a number "
        f"from 0 to {last}, another on each machine ({SLURM_RANK_VARIABLE}, which srun sets, does "
        "as well), or launch.machine_rank"
    )


def _host(launch: LaunchSpec) -> str:
    host = (launch.main_host or os.environ.get(HOST_VARIABLE, "")).strip("[]")
    if not host:
        raise SpecError(
            f"launch.num_machines is {launch.num_machines}, and nothing says where they meet: set "
            f"{HOST_VARIABLE} (or launch.main_host) to the name or address of machine 0, as the "
            "others reach it; under Slurm the first line of "
            '`scontrol show hostnames "$SLURM_JOB_NODELIST"`'
        )
    if host.count(":") == 1 or "/" in host or any(c.isspace() for c in host):
        raise SpecError(
            f"{host!r} is no name or address of machine 0; expected e.g. node0 or 10.0.0.1, the "
            f"port in launch.main_port (or {PORT_VARIABLE})"
        )
    return f"[{host}]" if ":" in host else host


def _port(launch: LaunchSpec) -> int:
    if launch.main_port is not None:
        return launch.main_port
    text = os.environ.get(PORT_VARIABLE) or str(DEFAULT_PORT)
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise SpecError(f"{PORT_VARIABLE} is {text!r}; expected a port from 1 to 65535")
    return int(text)
