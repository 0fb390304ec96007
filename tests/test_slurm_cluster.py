"""A training as jobs of a real Slurm: slurmctld and three slurmd on hosts as network namespaces.

It needs root, iproute2 and Debian's slurmctld, slurmd, slurm-client and munge.

    python -m pytest -m slow -o addopts= tests/test_slurm_cluster.py
"""

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ditty.config.launchspec import LaunchSpec
from ditty.config.spec import RunSpec
from ditty.config.specfile import parse_spec
from ditty.processes import slurm
from ditty.processes.launch import open_attempt, run_stage
from ditty.runs.rundir import Result, RunDir, Status, read_result
from flows.finetune import finetune
from tests.fake_slurm import FakeSlurm
from tests.machines import Hosts, make_job
from tests.processes import start_flow, wait_while
from tests.served import tiny_spec
from tests.slurm_cluster import Cluster
from tests.test_distributed import adapter, inputs, losses  # noqa: F401

pytestmark = pytest.mark.slow

NODES = 3
TRAIN = {"max_steps": 40, "save_steps": 5, "gradient_accumulation_steps": 2}
LOCAL = {"num_processes": NODES}
SLURM = {
    "backend": "slurm",
    "num_machines": NODES,
    "grace_seconds": 25,
    "slurm": {"partition": "low", "time_limit": "30"},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Hosts(NODES + 1) as hosts, Cluster(hosts, tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Flow:
    """What the flow does for a training: one attempt after the other, wherever it runs."""

    def __init__(self, inputs: Path, home: Path, launch: dict[str, Any], **changes: Any):  # noqa: F811
        self.home, self.run = home, RunDir.named("run", home)
        names = changes.keys() & LaunchSpec.model_fields.keys()
        launch = launch | {name: changes.pop(name) for name in names}
        self.job = make_job(inputs, home, launch, **{**TRAIN, **changes})
        self.launch = parse_spec(self.job["spec"]).launch
        self.lines: list[str] = []

    def attempt(self, check: Callable[[], None] = lambda: None) -> Result:
        attempt = open_attempt(self.run, "train", self.launch)
        options: dict[str, Any] = {"on_line": self.lines.append, "check": check}
        return run_stage("train", self.job, attempt, self.launch, distributed=True, **options)

    def log(self) -> str:
        return (self.run.attempts("train")[-1] / "log.txt").read_text()

    def steps(self) -> int:
        return max((r["step"] for r in self.run.metrics() if r["kind"] == "train"), default=0)

    def once(self, step: int, act: Callable[[], object]) -> Callable[[], None]:
        """A check that does `act` when `step` is done."""
        acts = [act]

        def check() -> None:
            if acts and self.steps() >= step:
                acts.pop()()

        return check


@pytest.fixture
def flow(cluster, inputs, tmp_path, monkeypatch) -> Iterator[Callable[..., Flow]]:  # noqa: F811
    monkeypatch.setenv("PATH", str(cluster.commands), prepend=":")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.5)
    before = set(cluster.states())
    yield lambda **changes: Flow(inputs, tmp_path / "home", SLURM, **changes)
    for number, state in cluster.states().items():
        if number not in before and state not in slurm.ENDED:
            cluster.ask("scancel", str(number))
    cluster.wait_for(lambda: cluster.nodes("idle") == NODES, "idle nodes")


def starts(flow: Flow) -> list[int]:
    """The step after which each start of the training went on."""
    records = flow.run.metrics_file.read_text().splitlines()
    return [r["step"] for r in map(json.loads, records) if r["kind"] == "start"]


def test_a_preempted_training_saves_and_comes_back(cluster, flow, inputs, tmp_path):  # noqa: F811
    """One attempt of the flow, two starts of the job; and a local run's numbers, bit by bit."""
    training = flow()
    preempt = ("sbatch", "--partition=high", f"--nodes={NODES}", "--exclusive")
    preempt += ("--output=/dev/null", "--wrap=sleep 2")
    before = set(cluster.states())
    result = training.attempt(training.once(12, lambda: cluster.ask(*preempt)))
    assert (result.status, result.step) == (Status.OK, 40), training.log()
    states = {n: s for n, s in cluster.states().items() if n not in before}
    assert list(states.values()) == ["COMPLETED"] * 2, "the training's, and the one that came first"
    first, second = starts(training)
    assert first == 0 and 12 <= second < 40
    assert len(training.run.attempts("train")) == 1
    assert len(training.run.metrics_file.read_text().splitlines()) >= 40
    steps = [r["step"] for r in training.run.metrics() if r["kind"] == "train"]
    assert steps == list(range(1, 41))
    (attempt,) = training.run.attempts("train")
    assert len(list((attempt / "heartbeat").glob("rank_*.json"))) == NODES

    alone = Flow(inputs, tmp_path / "alone", LOCAL)
    assert alone.attempt().status is Status.OK
    assert losses(training.run) == losses(alone.run)
    expected, got = adapter(alone.home), adapter(training.home)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_flow_itself(cluster, flow, tmp_path, home, prefect_api):
    """Killed, it leaves its job, and the next one takes it up; both ways of cancelling agree.

    `flow` is for what it sets and cleans up.
    """
    values = tiny_spec(tmp_path, "demo", 100_000)
    values["train"]["save_steps"] = 100_000
    values["launch"] |= {**SLURM, "retries": 1, "retry_delay_seconds": 0}
    spec, run = RunSpec.model_validate(values), RunDir.named("demo", home)
    before = set(cluster.states())

    def jobs() -> list[str]:
        return [state for n, state in sorted(cluster.states().items()) if n not in before]

    def saved() -> int:
        (result,) = [read_result(run.attempts("train")[-1])]
        assert result and result.status is Status.PREEMPTED and result.retryable, result
        assert run.committed_steps()[-1] == result.step
        return result.step

    first = start_flow(spec, home, prefect_api)
    wait_while(first, lambda: steps_of(run) < 3)
    first.kill()
    first.wait()
    assert jobs() == ["RUNNING"] and not run.has_flow()

    threading.Thread(target=cancel_at, args=(cluster, run, steps_of(run) + 5)).start()
    state: Any = finetune(spec, return_state=True)
    assert state.is_cancelled() and "was cancelled where it ran" in state.message, state
    assert jobs() == ["CANCELLED"] and len(run.attempts("train")) == 1
    step = saved()
    assert step >= 3

    second = start_flow(spec, home, prefect_api)
    wait_while(second, lambda: steps_of(run) < step + 3)
    second.terminate()  # what Prefect's runner does at a Cancel
    assert second.wait() == -signal.SIGTERM
    cluster.wait_for(lambda: jobs() == ["CANCELLED"] * 2, "the end of the job")
    assert saved() >= step + 3, "it went on where scancel had it saved"


def steps_of(run: RunDir) -> int:
    return max((r["step"] for r in run.metrics() if r["kind"] == "train"), default=0)


def cancel_at(cluster: Cluster, run: RunDir, step: int) -> None:
    cluster.wait_for(lambda: steps_of(run) >= step and run.has_flow(), f"step {step}")
    for number, state in cluster.states().items():
        if state == "RUNNING":
            cluster.ask("scancel", str(number))


class Stop(BaseException):
    """What Prefect raises on SIGTERM is no Exception either."""


def test_a_cut_link_ends_in_bounded_time(cluster, flow):
    """The nodes that are left notice it by their collectives, Slurm by itself; the one that is cut
    off, where nobody can tell it anything, ends its own ranks."""
    training = flow(max_steps=100_000, collective_timeout_seconds=20)
    before = set(cluster.states())

    def cut() -> None:
        since = time.monotonic()
        cluster.hosts.plug(NODES - 1, "down")

        def back_in_the_queue() -> bool:
            return [s for n, s in cluster.states().items() if n not in before] == ["PENDING"]

        cluster.wait_for(back_in_the_queue, "the job to be put back")
        print(f"put back {time.monotonic() - since:.0f} s after the cut")
        cluster.wait_for(lambda: not ranks_on(cluster, NODES - 1), "the end of the ranks there")
        print(f"no rank is left {time.monotonic() - since:.0f} s after the cut")
        raise Stop

    with pytest.raises(Stop):
        training.attempt(training.once(3, cut))
    cluster.hosts.plug(NODES - 1, "up")


def ranks_on(cluster: Cluster, host: int) -> list[int]:
    """Pids of ditty.worker there."""
    pids = cluster.hosts.pids(host)
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
    return [p for p, path in commands.items() if path.exists() and b"worker" in path.read_bytes()]


def test_the_fake_queue_answers_as_the_real_one(cluster, flow, tmp_path):
    """What test_slurm.py goes by; on hold a real job stays PENDING, as a job of the fake does."""
    attempt = tmp_path / "stages" / "train" / "0001"
    options = ["job-name=probe", f"comment={attempt}", "output=/dev/null", "hold"]
    script, refused = tmp_path / "job.sh", tmp_path / "refused.sh"
    lines = ["#!/bin/sh", *(f"#SBATCH --{option}" for option in options), "sleep 1", ""]
    script.write_text("\n".join(lines))
    refused.write_text("\n".join([lines[0], "#SBATCH --partition=nowhere", *lines[1:]]))

    def answers(commands: Path) -> list[tuple[int, str, str]]:
        def ask(program: str, *arguments: str) -> tuple[int, str, str]:
            command = [commands / program, *arguments]
            answer = subprocess.run(command, capture_output=True, text=True)
            return answer.returncode, answer.stdout, answer.stderr

        by_name = ("squeue", "--noheader", "--me", "--name=probe", "--format=%i|%T|%k")
        by_number = ("squeue", "--noheader", "--states=all", "--format=%T")
        found = [ask("sbatch", "--parsable", "--export=ALL", str(refused)), ask(*by_name)]
        found += [ask("sbatch", "--parsable", "--export=ALL", str(script))]
        number = found[-1][1].strip()
        found += [ask(*by_name), ask(*by_number, f"--jobs={number}"), ask("scancel", number)]
        found += [ask(*by_number, f"--jobs={number}"), ask(*by_name)]
        found += [ask(*by_number, "--jobs=99999")]
        return [(code, re.sub(rf"^{number}\b", "N", out), error) for code, out, error in found]

    assert answers(FakeSlurm(tmp_path / "fake").commands) == answers(cluster.commands)


def test_a_killed_node_costs_at_most_the_interval(cluster, flow):
    """Slurm puts the job back, and it starts when there are nodes enough. It may kill it once more
    on the node that came back, as it wanted to before: then the flow submits it again."""
    training = flow()
    before = set(cluster.states())
    lost: list[int] = []

    def kill() -> None:
        cluster.hosts.kill(NODES - 1)
        there = {"RUNNING", "COMPLETING"}

        def is_noticed() -> bool:
            return not there & {s for n, s in cluster.states().items() if n not in before}

        cluster.wait_for(is_noticed, "Slurm to notice it")
        lost.append(training.steps() - training.run.committed_steps()[-1])
        cluster.start_node(NODES - 1)

    result = training.attempt(training.once(12, kill))
    if result.status is not Status.OK:
        assert result.retryable, training.log()
        result = training.attempt()
    assert result.status is Status.OK, training.log()
    assert lost and lost[0] <= TRAIN["save_steps"] and starts(training)[-1] >= 10
    assert [r["step"] for r in training.run.metrics() if r["kind"] == "train"] == [*range(1, 41)]
