"""Several machines: who is which, and one training on all of them, also when some are lost.

The slow part has hosts as network namespaces on one bridge; they share this machine's disk, as
real ones share a file system. It needs root and iproute2.

    python -m pytest -m slow -o addopts= tests/test_machines.py
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from ditty.config.launchspec import LaunchSpec
from ditty.errors import SpecError
from ditty.processes.environment import child_environment
from ditty.processes.local import accelerate_command
from ditty.processes.machines import Machines, resolve_machines
from ditty.runs.rundir import RunDir, Status
from ditty.store.files import read_json
from tests.machines import Hosts, Machine, free_port, make_job, wait_for
from tests.test_distributed import adapter, inputs, losses, run_training  # noqa: F401

VARIABLES = ("DITTY_MACHINE_RANK", "SLURM_NODEID", "DITTY_MAIN_HOST", "DITTY_MAIN_PORT")


# Which machine this is


@pytest.fixture
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets these of VARIABLES, and no other."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def give(**variables: str) -> None:
        for name, value in variables.items():
            assert name in VARIABLES
            monkeypatch.setenv(name, value)

    return give


def launch_spec(**changes: Any) -> LaunchSpec:
    return LaunchSpec.model_validate({"num_machines": 3, "device": "cpu", **changes})


def test_one_machine_needs_no_environment_and_reads_none(set_variables) -> None:
    set_variables(DITTY_MACHINE_RANK="7", DITTY_MAIN_HOST="node0", DITTY_MAIN_PORT="none")
    assert resolve_machines(LaunchSpec()) == Machines(0, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("keys", "variables", "expected"),
    [
        ({"machine_rank": 1, "main_host": "a", "main_port": 7}, {}, Machines(1, "a", 7)),
        ({}, {"DITTY_MACHINE_RANK": "2", "DITTY_MAIN_HOST": "b"}, Machines(2, "b", 29500)),
        ({}, {"SLURM_NODEID": "1", "DITTY_MAIN_HOST": "b"}, Machines(1, "b", 29500)),
        (  # our own variable says it on purpose, Slurm's is there anyway
            {},
            {"DITTY_MACHINE_RANK": "2", "SLURM_NODEID": "1", "DITTY_MAIN_HOST": "10.0.0.1"},
            Machines(2, "10.0.0.1", 29500),
        ),
        (
            {"machine_rank": 0, "main_host": "a", "main_port": 7},
            {"DITTY_MACHINE_RANK": "2", "DITTY_MAIN_HOST": "b", "DITTY_MAIN_PORT": "9"},
            Machines(0, "a", 7),
        ),
        (
            {"machine_rank": 0},
            {"DITTY_MAIN_HOST": "fd00::1", "DITTY_MAIN_PORT": "9"},
            Machines(0, "[fd00::1]", 9),
        ),
    ],
)
def test_the_spec_goes_before_the_environment(keys, variables, expected, set_variables) -> None:
    set_variables(**variables)
    assert resolve_machines(launch_spec(**keys)) == expected


GOOD = {"DITTY_MACHINE_RANK": "1", "DITTY_MAIN_HOST": "node0"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DITTY_MAIN_HOST": "a"}, r"num_machines is 3.*set DITTY_MACHINE_RANK .* 0 to 2"),
        ({**GOOD, "DITTY_MACHINE_RANK": "3"}, r"DITTY_MACHINE_RANK is '3'; expected .* 0 to 2"),
        ({**GOOD, "DITTY_MACHINE_RANK": "-1"}, r"DITTY_MACHINE_RANK is '-1'"),
        ({"SLURM_NODEID": "5", "DITTY_MAIN_HOST": "a"}, r"SLURM_NODEID is '5'"),
        ({"DITTY_MACHINE_RANK": "1"}, r"set DITTY_MAIN_HOST .*launch\.main_host"),
        ({**GOOD, "DITTY_MAIN_HOST": "node0:29500"}, r"'node0:29500'.*launch\.main_port"),
        ({**GOOD, "DITTY_MAIN_HOST": "tcp://node0"}, r"'tcp://node0' is no name or address"),
        ({**GOOD, "DITTY_MAIN_PORT": "0"}, r"DITTY_MAIN_PORT is '0'; expected a port"),
        ({**GOOD, "DITTY_MAIN_PORT": "70000"}, r"DITTY_MAIN_PORT is '70000'"),
    ],
)
def test_what_is_missing_or_wrong_is_said(variables, message, set_variables) -> None:
    set_variables(**variables)
    with pytest.raises(SpecError, match=message):
        resolve_machines(launch_spec())
    with pytest.raises(SpecError, match=message):
        child_environment(launch_spec())  # what is asked before anything is started


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"machine_rank": 3}, r"machine_rank is 3 of num_machines: 3; expected 0 to 2"),
        ({"num_machines": 1, "machine_rank": 1}, r"machine_rank is 1 of num_machines: 1"),
        ({"machine_rank": -1}, "machine_rank"),
        ({"main_port": 0}, "main_port"),
        ({"collective_timeout_seconds": 0}, "collective_timeout_seconds"),
    ],
)
def test_the_spec_refuses(keys, message) -> None:
    with pytest.raises(ValidationError, match=message):
        launch_spec(**keys)


def test_what_accelerate_is_told(tmp_path, set_variables) -> None:
    set_variables(**GOOD)
    launch = launch_spec(num_processes=4, collective_timeout_seconds=1000.5)
    argv = accelerate_command(launch, tmp_path, ["train"])
    config = yaml.safe_load((tmp_path / "accelerate.yaml").read_text())
    assert (config["num_machines"], config["machine_rank"], config["num_processes"]) == (3, 1, 12)
    assert (config["main_process_ip"], config["main_process_port"]) == ("node0", 29500)
    assert (config["distributed_type"], config["rdzv_backend"]) == ("MULTI_GPU", "static")
    # A machine waits for one that notices a cut link only now.
    assert float(argv[argv.index("--rdzv_conf") + 1].removeprefix("timeout=")) > 1000.5
    assert "--max_restarts" not in argv


# Training


@pytest.fixture
def on_loopback(tmp_path) -> Iterator[Callable[..., list[Machine]]]:
    """Starts one machine a given job, all on this host's loopback interface."""
    started: list[Machine] = []

    def start(*jobs: dict[str, Any]) -> list[Machine]:
        meeting = {"DITTY_MAIN_HOST": "127.0.0.1", "DITTY_MAIN_PORT": str(free_port())}
        for rank, job in enumerate(jobs):
            variables = meeting | {"DITTY_MACHINE_RANK": str(rank)}
            started.append(Machine(tmp_path / f"machine{len(started)}", job, variables))
        return started[-len(jobs) :]

    yield start
    for machine in started:
        machine.process.kill()  # its guard ends the rest
        machine.process.wait()


def test_two_machines_give_the_numbers_of_one_process(inputs, tmp_path, on_loopback) -> None:  # noqa: F811
    """Bitwise: with one row a process and step, what is added up is two numbers, in any order.

    The second machine, all of whose ranks are above 0, ends with a result of its own.
    """
    train = {"max_steps": 6, "save_steps": 1000}
    homes = [tmp_path / "one", tmp_path / "two"]
    one, two = (RunDir.named("run", home) for home in homes)
    train = {"max_steps": 6, "save_steps": 1000}
    job = make_job(inputs, homes[1], {"num_machines": 2}, gradient_accumulation_steps=1, **train)
    machines = on_loopback(job, job)
    job = make_job(inputs, homes[0], {}, gradient_accumulation_steps=2, **train)
    results = [machine.end() for machine in machines + on_loopback(job)]
    assert [(r["status"], r["step"]) for r in results] == [(Status.OK, 6)] * 3, results
    assert [set(machine.ranks()) for machine in machines] == [{0}, {1}]
    assert read_json(two.checkpoint(6) / "state.json")["world_size"] == 2
    assert losses(two) == losses(one)
    expected, got = (adapter(home) for home in homes)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.slow
def test_machines_whose_specs_differ_are_refused(inputs, tmp_path, on_loopback) -> None:  # noqa: F811
    """Three processes find each other, and neither two nor four were meant."""
    train = {"max_steps": 6, "gradient_accumulation_steps": 4}
    launches = [{"num_machines": 2, "num_processes": n} for n in (1, 2)]
    machines = on_loopback(*(make_job(inputs, tmp_path / "h", one, **train) for one in launches))
    for machine, expected in zip(machines, (2, 4), strict=True):
        result = machine.end()
        assert (result["status"], result["kind"]) == (Status.FAILED, "RunError")
        assert f"launched {expected} processes, but 3 found each other" in result["message"]
        assert not result["retryable"]


# Hosts


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        yield hosts


def steps_done(run: RunDir) -> int:
    return max((r["step"] for r in run.metrics() if r["kind"] == "train"), default=0)


def train_records(run: RunDir) -> list[dict[str, Any]]:
    return [r for r in run.metrics() if r["kind"] == "train"]


def check_lost(machines: list[Machine], since: float, what: str) -> None:
    """They all end by themselves, and another attempt would make sense."""
    for machine in machines:
        result = machine.end()
        assert (result["status"], result["retryable"]) == (Status.FAILED, True), result
        message = result["message"].splitlines()[0][:200]
        print(f"{what}: {machine.out.name} ended {result['time'] - since:.1f} s later: {message}")


@pytest.mark.slow
def test_a_run_of_three_hosts_loses_one_and_goes_on_with_two(inputs, tmp_path, hosts) -> None:  # noqa: F811
    """9 processes, then 6, give what one gives: same rows a step, rates, losses and weights."""
    home, run = tmp_path / "home", RunDir.named("run", tmp_path / "home")
    train = {"max_steps": 36, "save_steps": 5, "warmup_steps": 6}

    def job(num_machines: int, accumulation: int) -> dict[str, Any]:
        launch = {"num_machines": num_machines, "num_processes": 3}
        more = {"gradient_accumulation_steps": accumulation, "sharding": "ddp"}
        return make_job(inputs, home, launch, **train, **more)

    machines = hosts.start(tmp_path / "first", job(3, 2), 3)
    wait_for(lambda: steps_done(run) >= 12, machines, "step 12")
    assert [set(machine.ranks()) for machine in machines] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]
    for i, machine in enumerate(machines):
        assert set(machine.ranks().values()) < set(hosts.pids(i))
    hosts.kill(2)
    check_lost(machines[:2], time.time(), "a host killed")
    assert not (machines[2].out / "result.json").exists()
    assert not hosts.pids(0) and not hosts.pids(1), "they left nothing running"
    saved = run.committed_steps()[-1]
    assert saved >= 10 and read_json(run.checkpoint(saved) / "state.json")["world_size"] == 9

    before = len(run.metrics_file.read_bytes())
    machines = hosts.start(tmp_path / "second", job(2, 3), 2)
    results = [machine.end() for machine in machines]
    assert [(r["status"], r["step"]) for r in results] == [(Status.OK, 36)] * 2, results
    lines = run.metrics_file.read_bytes()[before:].splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert steps == list(range(saved + 1, 37)), "it went on at the newest checkpoint"
    assert read_json(run.checkpoint(36) / "state.json")["world_size"] == 6

    one, alone = tmp_path / "one", {"gradient_accumulation_steps": 18, **train}
    assert run_training(inputs, one, 1, **alone)[0].status is Status.OK
    expected, got = (train_records(r) for r in (RunDir.named("run", one), run))
    for key in ("step", "learning_rate", "supervised_tokens", "tokens"):
        assert [r[key] for r in got] == [r[key] for r in expected], key
    assert len({r["tokens"] for r in got}) > 1, "rows differ in length"
    assert losses(run) == pytest.approx(losses(RunDir.named("run", one)), rel=1e-5)
    weights = adapter(one)
    assert all(torch.allclose(w, adapter(home)[n], atol=1e-5) for n, w in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the main host killed", "the link of a host cut"])
def test_all_end_when_one_is_lost(what: str, inputs, tmp_path, hosts) -> None:  # noqa: F811
    """Also the host that is cut off, which hears nothing any more."""
    run = RunDir.named("run", tmp_path / "home")
    launch = {"num_machines": 3, "collective_timeout_seconds": 20}
    train = {"max_steps": 100_000, "save_steps": 1, "gradient_accumulation_steps": 2}
    job = make_job(inputs, tmp_path / "home", launch, **train)
    machines = hosts.start(tmp_path / "first", job, 3)
    wait_for(lambda: steps_done(run) >= 3, machines, "step 3")
    since = time.time()
    if what == "the main host killed":
        hosts.kill(0)
        check_lost(machines[1:], since, what)
    else:
        hosts.plug(2, "down")
        check_lost(machines, since, what)
    assert not any(hosts.pids(i) for i in range(3))
