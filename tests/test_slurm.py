"""The backend `slurm` against a queue in a folder, and its script run by bash.

A real cluster: test_slurm_cluster.py.
"""

import subprocess
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ditty.config.choices import Device, Where
from ditty.config.launchspec import LaunchSpec
from ditty.config.specfile import parse_spec
from ditty.errors import Cancelled, Crashed, RemoteError, RunBusy, SpecError
from ditty.planning import fit
from ditty.planning.shapes import SHAPES
from ditty.processes import environment, local, node, slurm
from ditty.processes.backend import StageRun
from ditty.processes.batchscript import batch_script
from ditty.processes.environment import resolve_device
from ditty.processes.launch import backend_of, open_attempt, raise_for_result, run_stage
from ditty.runs.rundir import Result, RunDir, Status, read_result, write_result
from ditty.store.files import read_json, write_json
from tests.fake_slurm import UNKNOWN_PARTITION, FakeSlurm
from tests.test_launch import wait_for
from tests.test_stage_launch import WORKER

SAVED = Result(Status.PREEMPTED, 7, "Preempted", "saved step 7", retryable=True)
BEFORE = replace(SAVED, step=5)  # of the job's start before
STOPPED = Result(Status.PREEMPTED, 7, "Preempted", "by a stop file", retryable=False)


def launch_spec(**changes: Any) -> LaunchSpec:
    return LaunchSpec.model_validate({"backend": "slurm", "device": "cpu", **changes})


def stage_run(attempt: Path, **changes: Any) -> StageRun:
    return StageRun("train", attempt, launch_spec(**changes), distributed=True)


def options(script: str) -> list[str]:
    return [line[10:] for line in script.splitlines() if line.startswith("#SBATCH --")]


# The spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "auto"}, "device: auto looks for a GPU here.*write device: cuda, or cpu"),
        ({"machine_rank": 0}, "machine_rank goes with backend: local"),
        ({"main_host": "node0"}, "main_host goes with backend: local"),
        ({"slurm": {"time_limit": 43200}}, r'43200 is a number: YAML.*as "12:00:00"'),
        ({"slurm": {"partition": "a\nb"}}, "is no value for sbatch"),
        ({"slurm": {"options": {"nodes": 3}}}, r"nodes is decided.*launch\.num_machines"),
        ({"slurm": {"options": {"array": "0-3"}}}, "array is decided already"),
        ({"slurm": {"options": {"part": "x"}}}, r"part is decided.*launch\.slurm\.partition"),
        ({"slurm": {"options": {"--qos": "long"}}}, "'--qos' is no long option.*without dashes"),
        ({"slurm": {"options": {"exclusive": False}}}, "exclusive: false.*remove it"),
        ({"slurm": {"queue": "x"}}, "queue"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        launch_spec(**changes)


def test_a_launch_elsewhere_is_not_measured_by_this_machine(tmp_path, monkeypatch) -> None:
    """No GPU is here; and were one here, its memory would be another's."""
    monkeypatch.setattr(environment, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(environment, "DRIVER_GPUS", tmp_path / "none")
    launch = launch_spec(device="cuda", num_processes=8)
    assert resolve_device(launch) == "cuda"
    with pytest.raises(SpecError, match="no NVIDIA GPU is visible"):
        resolve_device(launch.model_copy(update={"backend": Where.LOCAL}))
    monkeypatch.setattr(fit, "gpu_bytes", lambda: 1e9)
    write_json(tmp_path / "config.json", SHAPES["8b"].config())
    values = {"name": "r", "data": {"source": "x"}, "model": {"base_model": "m"}}
    spec = parse_spec({**values, "launch": {"backend": "slurm", "device": "cuda"}})
    found = fit.expected_memory(spec, tmp_path)
    assert found and found.budget is None and found.fits


def test_a_plan_says_where() -> None:
    asked = launch_spec(num_machines=3, slurm={"partition": "low", "time_limit": "90"})
    assert backend_of(asked).describe(asked) == "Slurm: 3 nodes of low, at most 90 at a time"
    assert backend_of(LaunchSpec()).describe(LaunchSpec()) == "this machine"


# The script


def test_the_options_of_a_job(tmp_path: Path) -> None:
    attempt = tmp_path / "a 100%" / "0001"
    slurm_keys = {
        "partition": "low",
        "account": "team",
        "time_limit": "1-00:00:00",
        "options": {"qos": "long", "exclusive": True, "mem": 0, "constraint": "a100&nvlink"},
    }
    changes = {"num_machines": 3, "num_processes": 8, "device": "cuda", "threads": 4}
    run = stage_run(attempt, **changes, grace_seconds=90.5, slurm=slurm_keys)
    assert options(batch_script(run, "ditty-run-train")) == [
        "job-name=ditty-run-train",
        f"comment='{attempt}'",
        f"output='{tmp_path}/a 100%%/0001/log.txt'",
        "open-mode=append",
        "nodes=3",
        "ntasks-per-node=1",
        "cpus-per-task=32",
        "gpus-per-node=8",
        "requeue",
        "signal=B:TERM@96",  # with the margin for the guard's SIGKILLs
        "partition=low",
        "account=team",
        "time=1-00:00:00",
        "qos=long",
        "exclusive",
        "mem=0",
        "constraint='a100&nvlink'",
    ]


@pytest.mark.parametrize(
    ("name", "value", "asked"),
    [("gres", "gpu:1", 0), ("gpus-per-task", "1", 0), ("gres", "lscratch:100", 1)],
)
def test_gpus_are_asked_for_once(name: str, value: str, asked: int, tmp_path: Path) -> None:
    run = stage_run(tmp_path, device="cuda", slurm={"options": {name: value}})
    found = options(batch_script(run, "job"))
    assert f"{name}={value}" in found
    assert sum("gpus-per-node" in option for option in found) == asked


class Script:
    """A job's script, run by bash with Slurm's programs as the test has them.

    `srun` waits for the files `go`, and ends with the code there; `state` is what squeue says.
    """

    def __init__(self, folder: Path):
        self.fake, self.attempt = FakeSlurm(folder / "fake"), folder / "attempt"
        (self.attempt / "heartbeat").mkdir(parents=True)
        write_result(self.attempt, BEFORE)
        self.folder, self.said = folder, folder / "said"
        self.state("RUNNING")
        names = 'case "$2" in *=*) ;; hostnames) printf "node4\\nnode5\\n"; exit ;; esac\n'
        self.fake.program("scontrol", f'{names}echo "scontrol $@" >> {self.said}')
        self.fake.program("scancel", f'echo "scancel $@" >> {self.said}')
        self.fake.program("squeue", f"cat {folder}/state")
        self.fake.program(
            "srun",
            f'env > {folder}/env; echo "$@" > {folder}/srun; touch {folder}/started\n'
            f"while [ ! -f {folder}/go ]; do sleep 0.02; done; exit $(cat {folder}/go)",
        )
        (folder / "job.sh").write_text(batch_script(stage_run(self.attempt), "job"))
        variables = {"SLURM_JOB_ID": "30007", "SLURM_JOB_NODELIST": "node[4-5]"}
        path = f"{self.fake.commands}:/usr/bin:/bin"
        self.process = subprocess.Popen(
            ["bash", folder / "job.sh"],
            env={**variables, "PATH": path, "SLURM_CPUS_PER_TASK": "6"},
        )
        wait_for(lambda: (folder / "started").exists(), "srun")

    def state(self, name: str) -> None:
        (self.folder / "state").write_text(f"{name}\n")

    def end(self, code: int, result: Result | None) -> list[str]:
        """srun ends so; what was said to Slurm."""
        if result:
            write_result(self.attempt, result)
        (self.folder / "part").write_text(str(code))
        (self.folder / "part").rename(self.folder / "go")
        assert self.process.wait(60) == code
        return self.said.read_text().splitlines() if self.said.exists() else []


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_the_nodes_learn_where_they_meet_and_find_nothing_of_before(script: Script) -> None:
    assert not (script.attempt / "heartbeat").exists()
    assert read_result(script.attempt) is None
    assert script.end(0, Result(Status.OK, 9)) == []
    variables = dict(
        line.split("=", 1) for line in (script.folder / "env").read_text().splitlines()
    )
    assert variables["DITTY_MAIN_HOST"] == "node4"
    assert (variables["DITTY_MAIN_PORT"], variables["SRUN_CPUS_PER_TASK"]) == ("20007", "6")
    asked = (script.folder / "srun").read_text()
    assert f"-m ditty.processes.node --distributed train {script.attempt}\n" in asked


@pytest.mark.parametrize(
    ("code", "result", "state", "expected"),
    [
        (0, SAVED, "RUNNING", ["scontrol requeue 30007"]),
        (0, SAVED, "COMPLETING", []),  # cancelled: it must not come back
        (0, BEFORE, "RUNNING", []),  # nor one that does not get on, for ever
        (0, STOPPED, "RUNNING", []),
        (0, Result(Status.OK, 9), "RUNNING", []),
        (1, Result(Status.FAILED, 0, "RunError", "x", retryable=True), "RUNNING", []),
        (137, None, "RUNNING", []),
    ],
)
def test_a_job_comes_back_that_has_saved_and_was_not_cancelled(
    code: int, result: Result | None, state: str, expected: list[str], script: Script
) -> None:
    script.state(state)
    assert script.end(code, result) == expected


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_warning_is_passed_on_to_the_ranks(state: str, script: Script) -> None:
    """SIGTERM to the script alone; one that Slurm ends has told all of its processes itself."""
    script.state(state)
    script.process.terminate()
    if state == "RUNNING":
        wait_for(script.said.exists, "the word to the ranks")
    time.sleep(0.2)
    assert script.process.poll() is None, "it waits for srun"
    told = ["scancel --signal=TERM 30007", "scontrol requeue 30007"]
    assert script.end(0, SAVED) == (told if state == "RUNNING" else [])


# The queue


class Queue(FakeSlurm):
    """The flow of a run whose jobs are in a fake queue."""

    def __init__(self, folder: Path):
        super().__init__(folder / "fake")
        self.run = RunDir.named("run", folder / "home")
        self.launch = launch_spec(num_machines=2, slurm={"partition": "low"})
        self.lines: list[str] = []

    def job(self, key: str = "k1") -> dict[str, Any]:
        values = {"name": "run", "data": {"source": "x"}, "model": {"base_model": "m"}}
        launch = self.launch.model_dump(mode="json")
        return {"spec": {**values, "launch": launch}, "key": key}

    def attempt(self, *events: Callable[[], object], key: str = "k1") -> Result:
        """One attempt; `events` happen one after the other while it is followed."""
        waiting = list(events)

        def check() -> None:
            if waiting:
                waiting.pop(0)()

        attempt = open_attempt(self.run, "train", self.launch)
        told: dict[str, Any] = {"on_line": self.lines.append, "check": check}
        return run_stage("train", self.job(key), attempt, self.launch, distributed=True, **told)

    @property
    def newest(self) -> Path:
        return self.run.attempts("train")[-1]

    def say(self, line: str) -> None:
        with open(self.newest / "log.txt", "a") as log:
            log.write(f"{line}\n")

    def ends(self, state: str, result: Result | None = None) -> None:
        if result:
            write_result(self.newest, result)
        self.becomes(self.jobs()[-1], state)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue(tmp_path)
    monkeypatch.setenv("PATH", str(queue.commands), prepend=":")
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.0)
    monkeypatch.setattr("ditty.processes.launch.CHECK_SECONDS", 0.0)
    monkeypatch.setattr("ditty.processes.launch.POLL_SECONDS", 0.02)
    return queue


class Killed(BaseException):
    """The flow is gone, without a word."""


def test_a_job_is_submitted_followed_and_read(queue: Queue, monkeypatch) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "canary", "WANDB_API_KEY": "canary2", "TOKEN": "given"}
    for name, value in {**secrets, "DITTY_MACHINE_RANK": "1", "SBATCH_ACCOUNT": "other"}.items():
        monkeypatch.setenv(name, value)
    queue.launch = queue.launch.model_copy(update={"environment": ["TOKEN"]})
    result = queue.attempt(
        lambda: queue.becomes("1", "RUNNING"),
        lambda: queue.say("INFO x: step 1"),
        lambda: queue.ends("COMPLETED", Result(Status.OK, 9)),
    )
    assert result == Result(Status.OK, 9)
    assert queue.lines == ["INFO x: step 1"]
    assert queue.jobs() == ["1"]
    assert (queue.of_job("1", "name"), queue.of_job("1", "comment")) == (
        "ditty-run-train",
        str(queue.newest),
    )
    given = dict(
        line.split("=", 1) for line in queue.of_job("1", "env").splitlines() if "=" in line
    )
    assert given["TOKEN"] == "given" and "PYTHONPATH" in given and "PATH" in given
    assert not {"AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DITTY_MACHINE_RANK"} & set(given)
    assert "SBATCH_ACCOUNT" not in given
    record = read_json(queue.newest / "launch.json")
    assert record["argv"][0] == "sbatch" and record["num_machines"] == 2
    assert "TOKEN" in record["environment"] and "given" not in str(record)


def test_a_flow_that_comes_back_takes_up_its_job(queue: Queue, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    queue.run = RunDir.named("run", Path("home"))  # as DITTY_HOME may be given

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(slurm.Job, "stop", lambda self: None)  # SIGKILL gives no time for it
        queue.attempt(lambda: queue.becomes("1", "RUNNING"), kill)
    with pytest.raises(RunBusy, match=r"another spec of this name \(key k1, not other\)"):
        queue.attempt(lambda: queue.ends("COMPLETED"), key="other")
    result = queue.attempt(lambda: queue.ends("COMPLETED", Result(Status.OK, 9)))
    assert result == Result(Status.OK, 9)
    assert queue.jobs() == ["1"] and len(queue.run.attempts("train")) == 1
    assert queue.attempt(lambda: queue.ends("COMPLETED", SAVED)) == SAVED
    assert queue.jobs() == ["1", "2"] and len(queue.run.attempts("train")) == 2


def test_jobs_of_another_home_and_name_are_others(queue: Queue) -> None:
    for number, (name, comment) in enumerate(
        [("ditty-run-train", "/other/home/runs/run/stages/train/0001"), ("ditty-run2-train", "x")]
    ):
        folder = queue.folder / "jobs" / str(number + 1)
        folder.mkdir()
        for what, text in {"name": name, "comment": comment, "state": "RUNNING"}.items():
            (folder / what).write_text(text)
    queue.attempt(lambda: queue.ends("COMPLETED", Result(Status.OK, 9)))
    assert queue.jobs() == ["1", "2", "3"]


def test_one_that_was_put_back_is_waited_for(queue: Queue) -> None:
    """What its ranks left of signs of life does not count as a hang meanwhile."""
    beats: list[bool] = []

    def runs() -> None:
        (queue.newest / "heartbeat").mkdir()
        queue.becomes("1", "RUNNING")

    result = queue.attempt(
        runs,
        lambda: None,
        lambda: queue.ends("PENDING", SAVED),
        lambda: None,
        lambda: beats.append((queue.newest / "heartbeat").exists()),
        lambda: queue.ends("COMPLETED", Result(Status.OK, 9)),
    )
    assert result == Result(Status.OK, 9) and beats == [False]


def test_one_that_is_suspended_is_not_taken_for_hung(queue: Queue) -> None:
    """Its ranks still have their directory when they go on."""
    beats: list[list[str]] = []

    def runs() -> None:
        (queue.newest / "heartbeat").mkdir()
        (queue.newest / "heartbeat" / "rank_00000.json").write_text("{}")
        queue.becomes("1", "RUNNING")

    def look() -> None:
        beats.append([path.name for path in (queue.newest / "heartbeat").iterdir()])

    result = queue.attempt(
        runs,
        look,
        lambda: queue.becomes("1", "SUSPENDED"),
        lambda: None,
        look,
        lambda: queue.ends("COMPLETED", Result(Status.OK, 9)),
    )
    assert result == Result(Status.OK, 9) and beats == [["rank_00000.json"], []]


@pytest.mark.parametrize(
    ("state", "result", "error", "retryable"),
    [
        ("CANCELLED", SAVED, Cancelled, False),
        ("CANCELLED", None, Cancelled, False),
        ("NODE_FAIL", None, Crashed, True),
        ("TIMEOUT", None, Crashed, True),
        ("FAILED", Result(Status.FAILED, 0, "SpecError", "no GPU"), SpecError, False),
    ],
)
def test_what_the_end_of_a_job_means(state, result, error, retryable, queue: Queue) -> None:
    got = queue.attempt(lambda: queue.say("last words"), lambda: queue.ends(state, result))
    with pytest.raises(error) as caught:
        raise_for_result(got)
    assert caught.value.retryable is retryable
    if error is Crashed:
        assert f"state {state} of job 1" in str(caught.value)
        assert "last words" in str(caught.value)


def test_a_job_that_ended_well_counts_although_slurm_forgot_it(queue: Queue) -> None:
    def forgotten() -> None:
        write_result(queue.newest, Result(Status.OK, 9))
        (queue.folder / "jobs" / "1").rename(queue.folder / "gone")

    assert queue.attempt(forgotten) == Result(Status.OK, 9)


def test_a_controller_that_is_away_ends_no_job(queue: Queue) -> None:
    away = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    result = queue.attempt(
        lambda: queue.becomes("1", "RUNNING"),
        lambda: queue.answers(away),
        lambda: None,
        lambda: queue.answers(),
        lambda: queue.ends("COMPLETED", Result(Status.OK, 9)),
    )
    assert result == Result(Status.OK, 9) and queue.jobs() == ["1"]
    queue.answers(away)
    with pytest.raises(RemoteError, match="Unable to contact slurm controller") as caught:
        queue.attempt()
    assert caught.value.retryable and queue.jobs() == ["1"], "one may be there already"


def test_whoever_stops_the_flow_cancels_the_job(queue: Queue) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.attempt(lambda: queue.becomes("1", "RUNNING"), stop)
    assert queue.of_job("1", "state") == "CANCELLED"


def test_an_sbatch_that_does_not_answer_is_asked_again(queue: Queue, monkeypatch) -> None:
    """It may have submitted the job: the next attempt finds that."""
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 1.0)
    sbatch = (queue.commands / "sbatch").read_text()
    queue.program("sbatch", sbatch + "exec sleep 60\n")
    with pytest.raises(RemoteError, match="sbatch does not answer") as caught:
        queue.attempt()
    assert caught.value.retryable and queue.jobs() == ["1"]
    queue.attempt(lambda: queue.ends("COMPLETED", Result(Status.OK, 9)))
    assert queue.jobs() == ["1"]


def test_what_sbatch_refuses_is_told_in_its_words(queue: Queue) -> None:
    queue.launch = queue.launch.model_copy(
        update={"slurm": queue.launch.slurm.model_copy(update={"partition": "nowhere"})}
    )
    with pytest.raises(SpecError, match="Invalid partition name specified") as caught:
        queue.attempt()
    assert UNKNOWN_PARTITION.strip() in str(caught.value) and "launch.slurm" in str(caught.value)


def test_slurm_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpecError, match="needs sbatch, which is not on PATH"):
        backend_of(launch_spec()).check(launch_spec())
    with pytest.raises(SpecError, match="needs sbatch, which is not on PATH"):
        open_attempt(RunDir.named("run", tmp_path), "merge", launch_spec())


# A node


@pytest.fixture
def part(queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The attempt of a job, on a node of it."""
    (tmp_path / "fake_worker.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local, "WORKER_MODULE", "fake_worker")
    attempt = queue.run.new_attempt("train")
    write_json(attempt / "job.json", {**queue.job(), "result": {"status": "ok", "step": 3}})
    return attempt


def test_a_node_starts_what_a_local_launch_does(part: Path) -> None:
    assert node.main(["train", str(part)]) == 0
    assert read_result(part) == Result(Status.OK, 3)
    assert read_json(part / "environment.json")["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    ("device", "message"),
    [("cpu", "num_machines is 2, and nothing says"), ("cuda", "no NVIDIA GPU is visible")],
)
def test_a_node_that_cannot_start_says_why(device, message, part: Path, queue, monkeypatch) -> None:
    """It looks at its own devices, and for its own place."""
    for name in ("SLURM_NODEID", "DITTY_MACHINE_RANK", "DITTY_MAIN_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "DEVICE_FILES", part / "none")
    monkeypatch.setattr(environment, "DRIVER_GPUS", part / "none")
    queue.launch = queue.launch.model_copy(update={"device": Device(device)})
    write_json(part / "job.json", queue.job())
    assert node.main(["--distributed", "train", str(part)]) == 1
    result = read_result(part)
    assert result and (result.status, result.kind) == (Status.FAILED, "SpecError")
    assert message in result.message
