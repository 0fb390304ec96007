"""One training on several machines: `run_stage` on each, and hosts as network namespaces.

The hosts share this machine's disk, as real ones share a file system.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ditty.store.files import read_json, write_json
from tests.test_distributed import KEY

WAIT_SECONDS = 300.0  # until we call a process stuck

DRIVER = """
    import dataclasses, json, sys, time
    from pathlib import Path
    from ditty.store.files import write_json
    from ditty.processes.launch import run_stage
    from ditty.runs.rundir import RunDir
    from ditty.config.specfile import parse_spec

    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    spec = parse_spec(job["spec"])
    attempt = RunDir.named(spec.name, Path(job["home"])).new_attempt("train")
    write_json(out / "attempt.json", str(attempt))
    several = spec.launch.world_size > 1
    result = run_stage(
        "train", job, attempt, spec.launch, distributed=several, on_line=print, check=lambda: None
    )
    write_json(out / "result.json", dataclasses.asdict(result) | {"time": time.time()})
"""


class Machine:
    """One machine's part of a training: `launch.run_stage` in a process of its own."""

    def __init__(
        self, out: Path, job: dict[str, Any], variables: dict[str, str], prefix: Sequence[str] = ()
    ):
        self.out = out
        out.mkdir(parents=True)
        (out / "driver.py").write_text(textwrap.dedent(DRIVER))
        write_json(out / "job.json", job)
        root = str(Path(__file__).parent.parent)
        with open(out / "output.txt", "wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, out / "driver.py", out / "job.json", out],
                env={**os.environ, "PYTHONPATH": root, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def attempt(self) -> Path:
        path = read_json(self.out / "attempt.json")
        return Path(path) if path else self.out

    def end(self) -> dict[str, Any]:
        """The result, once it is there."""
        self.process.wait(WAIT_SECONDS)
        result = read_json(self.out / "result.json")
        assert result is not None, self.output()
        return result

    def output(self) -> str:
        return (self.out / "output.txt").read_text()

    def ranks(self) -> dict[int, int]:
        """Global rank -> pid of the processes here, by their heartbeats."""
        beats = {p: read_json(p) for p in (self.attempt / "heartbeat").glob("rank_*.json")}
        return {int(p.stem.removeprefix("rank_")): beat["pid"] for p, beat in beats.items()}


def make_job(inputs: Path, home: Path, launch: dict[str, Any], **train: Any) -> dict[str, Any]:
    """What ditty.worker is to do; `train`: keys of the spec's section."""
    defaults = {"precision": "fp32", "learning_rate": 1e-3, "micro_batch_size": 1}
    return {
        "home": str(home),
        "spec": {
            "name": "run",
            "data": {"source": "unused"},
            "model": {"base_model": str(inputs / "model")},
            "train": defaults | train,
            "launch": {"device": "cpu", "threads": 1, **launch},
        },
        "key": KEY,
        "inputs": {"test": "machines"},
        "model_dir": str(inputs / "model"),
        "data_dir": str(inputs / "data"),
        "device": "cpu",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], machines: list[Machine], what: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        outputs = "\n\n".join(m.output() for m in machines)
        assert time.monotonic() < end, f"waited {WAIT_SECONDS:g} s for {what}:\n{outputs}"
        assert all(m.process.poll() is None for m in machines), f"before {what}:\n{outputs}"
        time.sleep(0.1)


class Hosts:
    """Hosts with an interface eth0 each, 10.77.0.1 and so on, on the bridge of a namespace."""

    def __init__(self, count: int):
        self.switch = f"ditty-{os.getpid()}-switch"
        self.names = [f"ditty-{os.getpid()}-{i}" for i in range(count)]

    def __enter__(self) -> "Hosts":
        if shutil.which("ip") is None:
            pytest.skip("no iproute2 here: `ip netns` makes the hosts")
        answer = subprocess.run(["ip", "netns", "add", self.switch], capture_output=True, text=True)
        if answer.returncode:
            pytest.skip(f"`ip netns add` fails here (it needs root): {answer.stderr.strip()}")
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self) -> None:
        self._ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self.switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            self._ip("netns", "add", name)
            peer = ("type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            self._ip("link", "add", "eth0", "netns", name, *peer)
            self._ip("-n", self.switch, "link", "set", f"port{i}", "master", "br0")
            self._ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self.plug(i, "up")

    def _ip(self, *arguments: str) -> str:
        command = ["ip", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def plug(self, host: int, state: str) -> None:
        """`down`: the cable of this host is cut; the host itself sees a link all the same."""
        self._ip("-n", self.switch, "link", "set", f"port{host}", state)

    def pids(self, host: int) -> list[int]:
        return [int(pid) for pid in self._ip("netns", "pids", self.names[host]).split()]

    def kill(self, host: int) -> None:
        """As a power cut: no process of the host says another word."""
        while pids := self.pids(host):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def start(self, out: Path, job: dict[str, Any], count: int) -> list[Machine]:
        """The job on the first `count` hosts."""
        shared = {"DITTY_MAIN_HOST": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
        machines = []
        for i, name in enumerate(self.names[:count]):
            variables = shared | {"DITTY_MACHINE_RANK": str(i)}
            prefix = ("ip", "netns", "exec", name)
            machines.append(Machine(out / f"host{i}", job, variables, prefix))
        return machines

    def __exit__(self, *_: object) -> None:
        for i, name in enumerate(self.names):
            if (Path("/run/netns") / name).exists() or (Path("/var/run/netns") / name).exists():
                self.kill(i)
                self._ip("netns", "del", name)
        self._ip("netns", "del", self.switch)
