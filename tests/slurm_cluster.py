"""A real Slurm cluster on this machine: slurmctld, and slurmd on hosts of tests.machines.

It needs root, iproute2, and Debian's packages slurmctld, slurmd, slurm-client and munge. The host
after the nodes runs the controller. `commands` is a folder of `sbatch`, `squeue` ... for PATH that
ask it from this process's own network, as a login node would.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machines import Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
WAIT_SECONDS = 300.0
CORES = 4  # that each node says it has

CONFIG = """
ClusterName=ditty
SlurmctldHost=controller(10.77.0.{controller})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=20
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName=snode[0-{last}] NodeAddr=10.77.0.[1-{nodes}] CPUs={cores} RealMemory=4000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

# A program of the login node; within a job it is Slurm's own.
WRAPPER = """#!/bin/sh
export SLURM_CONF={conf}
[ -n "$SLURM_JOB_ID" ] && exec {program} "$@"
exec ip netns exec {host} {program} "$@"
"""


class Cluster:
    """Slurm on all `hosts` but the last, which is the controller's."""

    def __init__(self, hosts: Hosts, folder: Path):
        for program in PROGRAMS:
            if shutil.which(program) is None:
                pytest.skip(f"no {program}: apt-get install slurmctld slurmd slurm-client munge")
        self.hosts, self.folder, self.count = hosts, folder, len(hosts.names) - 1
        self.conf, self.commands = folder / "slurm.conf", folder / "commands"

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", "commands"):
            (self.folder / name).mkdir(parents=True)
        numbers = {"last": self.count - 1, "nodes": self.count, "controller": self.count + 1}
        self.conf.write_text(CONFIG.format(folder=self.folder, cores=CORES, **numbers))
        # Nothing here uses it, and what detects the version fails where no cgroup is mounted.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = [*(f"snode{node}" for node in range(self.count)), "controller"]
        lines = ["127.0.0.1 localhost", *(f"10.77.0.{i + 1} {n}" for i, n in enumerate(names))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        for name in COMMANDS:
            program, host = shutil.which(name), self.hosts.names[self.count]
            (self.commands / name).write_text(
                WRAPPER.format(conf=self.conf, host=host, program=program)
            )
            (self.commands / name).chmod(0o755)
        self._start_munge()
        self._on(self.count, "controller", "slurmctld", "-c", "-f", str(self.conf))
        for node in range(self.count):
            self.start_node(node)
        self.wait_for(lambda: self.nodes("idle") == self.count, "all nodes")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = ("socket", "log-file", "pid-file", "seed-file")
        options = [f"--{name}={self.folder}/munge.{name}" for name in places]
        subprocess.run(["munged", "--force", f"--key-file={key}", *options], check=True)

    def _on(self, host: int, name: str, *command: str) -> None:
        """Start a daemon on a host that is called `name`, and knows the names of the others."""
        hosts = self.folder / "hosts"
        inside = f"hostname {name} && mount --bind {hosts} /etc/hosts && exec " + " ".join(command)
        prefix = ["ip", "netns", "exec", self.hosts.names[host], "unshare", "--uts", "--mount"]
        subprocess.run([*prefix, "sh", "-c", inside], check=True)

    def start_node(self, node: int) -> None:
        """Start a node's slurmd, also again after `hosts.kill`."""
        self._on(node, f"snode{node}", "slurmd", "-f", str(self.conf))

    def ask(self, *command: str) -> str:
        """The output of a command of Slurm's."""
        program, *arguments = command
        return subprocess.run(
            [self.commands / program, *arguments], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def nodes(self, state: str) -> int:
        """How many nodes are in a state."""
        return sum(line == state for line in self.ask("sinfo", "-hN", "-o%T", "-plow").split())

    def states(self) -> dict[int, str]:
        """Job id -> state of all jobs that Slurm remembers."""
        lines = self.ask("squeue", "-h", "--states=all", "-o%i %T").splitlines()
        return {int(number): state for number, state in map(str.split, lines)}

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < end, f"waited {WAIT_SECONDS:g} s for {what}:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}:\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log")
        )

    def __exit__(self, *_: object) -> None:
        for host in range(self.count + 1):
            self.hosts.kill(host)
        pid = self.folder / "munge.pid-file"
        if pid.exists():
            os.kill(int(pid.read_text()), 9)
