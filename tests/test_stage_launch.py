"""A stage in a process of its own, or two in one world: what it is told, records, and ends with."""

# ruff: noqa: F811  (imported fixtures)
import json
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from ditty.config.choices import Device
from ditty.config.launchspec import LaunchSpec
from ditty.errors import Crashed, DataError, OutOfMemory, Preempted, RunError
from ditty.processes import local
from ditty.processes.launch import raise_for_result, run_stage
from ditty.runs.rundir import Result, Status
from ditty.store.files import read_json
from ditty.worker import explain
from tests.test_launch import CPU, Files, Stop, files  # noqa: F401

WORKER = """
    import os, sys, time
    from pathlib import Path
    from ditty.store.files import read_json, write_json
    from ditty.runs.rundir import Result, Status, write_result
    stage, attempt = sys.argv[1], Path(sys.argv[2])
    job = read_json(attempt / "job.json")
    write_json(attempt / "environment.json", dict(os.environ))
    print("stage", stage, "of", os.getcwd())
    if "crash" in job:
        for i in range(100):
            print("last words", i)
        os.kill(os.getpid(), job["crash"])
    write_result(attempt, Result(**{**job["result"], "status": Status(job["result"]["status"])}))
    sys.exit(job.get("code", 0))
"""


@pytest.fixture
def attempt(files: Files, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.script("fake_worker.py", WORKER)
    monkeypatch.setattr(local, "WORKER_MODULE", "fake_worker")
    folder = files.folder / "attempt"
    folder.mkdir()
    return folder


def stage(job: dict[str, Any], attempt: Path, spec: LaunchSpec = CPU, **kwargs: Any) -> Result:
    defaults = {"distributed": False, "on_line": lambda line: None, "check": lambda: None}
    return run_stage("train", job, attempt, spec, **{**defaults, **kwargs})


@pytest.mark.parametrize(
    "result",
    [
        {"status": "ok", "step": 7},
        {"status": "preempted", "step": 3, "message": "saved", "retryable": True},
        {"status": "failed", "kind": "DataError", "message": "no rows"},
    ],
)
def test_the_result_counts_not_the_exit_code(result: dict[str, Any], attempt: Path) -> None:
    lines: list[str] = []
    got = stage({"result": result, "code": 1}, attempt, on_line=lines.append)
    assert got == Result(**{**result, "status": Status(result["status"])})
    assert lines == [f"stage train of {Path.cwd()}"]
    assert (attempt / "log.txt").read_text().splitlines() == lines


def test_no_result_is_a_crash_and_its_last_words_are_told(attempt: Path) -> None:
    got = stage({"crash": int(signal.SIGKILL)}, attempt)
    assert (got.status, got.kind, got.retryable) == (Status.FAILED, "Crashed", True)
    first, *lines = got.message.splitlines()
    assert "exit code 137 (SIGKILL)" in first and str(attempt / "log.txt") in first
    assert [line.strip() for line in lines] == [f"last words {i}" for i in range(80, 100)]
    with pytest.raises(Crashed, match="last words 99") as caught:
        raise_for_result(got)
    assert caught.value.retryable


def test_the_record_of_a_launch_has_no_secret(
    attempt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_TOKEN"):
        monkeypatch.setenv(name, f"canary-{name}")
    spec = LaunchSpec(device=Device.CPU, environment=["MY_TOKEN"], num_processes=3, num_machines=2)
    assert stage({"result": {"status": "ok"}}, attempt, spec).status is Status.OK

    child = read_json(attempt / "environment.json")
    assert "AWS_SECRET_ACCESS_KEY" not in child
    assert child["MY_TOKEN"] == "canary-MY_TOKEN"
    (attempt / "environment.json").unlink()  # the fake worker's own

    texts = {path.name: path.read_text() for path in attempt.iterdir()}
    assert set(texts) == {"job.json", "launch.json", "log.txt", "result.json"}
    assert [name for name, text in texts.items() if "canary" in text] == []
    assert platform.node() not in texts["launch.json"]
    record = json.loads(texts["launch.json"])
    assert record["argv"] == [sys.executable, "-m", "fake_worker", "train", str(attempt)]
    assert [record[k] for k in ("device", "num_processes", "num_machines")] == ["cpu", 1, 1]
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"]
    assert "MY_TOKEN" in record["environment"]
    assert record["git_commit"] is None  # the current directory is no repository


def test_the_record_names_the_commit(attempt: Path) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    stage({"result": {"status": "ok"}}, attempt)
    assert read_json(attempt / "launch.json")["git_commit"] == head.stdout.strip()


RANK = """
    import json, os, signal, sys, time
    from pathlib import Path
    from accelerate import PartialState
    import torch
    from ditty.store.files import write_json
    from ditty.runs.rundir import Result, Status, write_result
    attempt = Path(sys.argv[2])
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    state = PartialState(cpu=True)
    total = torch.tensor([state.process_index + 1.0])
    torch.distributed.all_reduce(total)
    write_json(attempt / f"rank{state.process_index}.json", {
        "argv": sys.argv[1:], "world": state.num_processes, "sum": total.item(), "pid": os.getpid(),
        "backend": torch.distributed.get_backend(), "threads": os.environ["OMP_NUM_THREADS"],
        "type": str(state.distributed_type), "session": os.getsid(0),
        "mixed_precision": os.environ["ACCELERATE_MIXED_PRECISION"],
        "fsdp": os.environ.get("ACCELERATE_USE_FSDP"),
    })
    while not told:
        time.sleep(0.02)
    time.sleep(0.5)
    if state.process_index == 0:
        write_result(attempt, Result(Status.PREEMPTED, step=1))
    (attempt / f"saved{state.process_index}").touch()
"""


def test_two_processes_are_one_world_and_end_together(
    files: Files, attempt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything around that would make accelerate launch something else in silence."""
    files.script("fake_worker.py", RANK)
    machine_wide = files.folder / "hf" / "accelerate" / "default_config.yaml"
    machine_wide.parent.mkdir(parents=True)
    machine_wide.write_text("distributed_type: MULTI_CPU\nnum_processes: 1\n")
    monkeypatch.setenv("HF_HOME", str(files.folder / "hf"))
    for name, value in {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    spec = LaunchSpec(device=Device.CPU, threads=1, num_processes=2, grace_seconds=20)
    ranks: list[dict[str, Any]] = []

    def stop_when_joined() -> None:
        records = [read_json(attempt / f"rank{rank}.json") for rank in (0, 1)]
        if all(records):
            ranks.extend(records)
            raise Stop

    with pytest.raises(Stop):
        stage({}, attempt, spec, distributed=True, check=stop_when_joined)

    for rank in ranks:
        assert rank["argv"] == ["train", str(attempt)]
        assert (rank["world"], rank["sum"], rank["backend"]) == (2, 3.0, "gloo")
        assert (rank["threads"], rank["mixed_precision"], rank["fsdp"]) == ("1", "no", None)
    assert ranks[0]["pid"] != ranks[1]["pid"]
    assert not any(psutil.pid_exists(rank["pid"]) for rank in ranks)
    assert [p.name for p in sorted(attempt.glob("saved*"))] == ["saved0", "saved1"]


def test_one_process_through_accelerate(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert stage({"result": {"status": "ok"}}, attempt, distributed=True).status is Status.OK
    child = read_json(attempt / "environment.json")
    assert (child["ACCELERATE_USE_CPU"], child["OMP_NUM_THREADS"]) == ("True", "1")
    assert not {"ACCELERATE_USE_FSDP", "WORLD_SIZE", "RANK"} & set(child)


@pytest.mark.parametrize(
    ("result", "error", "retryable"),
    [
        (Result(Status.PREEMPTED, 4, "Preempted", "m", retryable=True), Preempted, True),
        (Result(Status.PREEMPTED, 4, "Preempted", "m", retryable=False), Preempted, False),
        (Result(Status.FAILED, kind="DataError", message="m"), DataError, False),
        (Result(Status.FAILED, kind="DataError", message="m", retryable=True), DataError, True),
        (Result(Status.FAILED, kind="OutOfMemory", message="m"), OutOfMemory, False),
        (Result(Status.FAILED, kind="Crashed", message="m"), Crashed, False),
        (Result(Status.FAILED, kind="ZeroDivisionError", message="m"), RunError, False),
        (Result(Status.FAILED, kind="__doc__", message="m", retryable=True), RunError, True),
    ],
)
def test_raise_for_result(result: Result, error: type[RunError], retryable: bool) -> None:
    with pytest.raises(error, match="m") as caught:
        raise_for_result(result)
    assert type(caught.value) is error
    assert caught.value.retryable is retryable
    if error is RunError:
        assert result.kind in str(caught.value)
    assert not DataError.retryable, "the class itself is left alone"


def test_ok_raises_nothing() -> None:
    raise_for_result(Result(Status.OK, step=9))


@pytest.mark.parametrize(("local", "kind"), [("2", "Crashed"), ("1", "RuntimeError")])
def test_a_lost_peer_has_crashed_if_it_was_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, local: str, kind: str
) -> None:
    """Else a rank that never fits would be tried again each time, for what the others say of it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    said = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    result = explain(RuntimeError(said))
    assert (result.kind, result.retryable) == (kind, True) and said in result.message
