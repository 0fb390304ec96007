"""`ditty status`: states from locks that other processes hold, metrics read once, and `--watch`."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from ditty.errors import RunError
from ditty.runs.rundir import CRASH_FILE, Result, RunDir, Status, append_record, write_result
from ditty.runs.status import Runs, RunStatus
from ditty.store.artifacts import Store
from ditty.store.files import FileLock, is_held
from tests.processes import Command, Holder


@pytest.fixture
def run(home: Path) -> RunDir:
    found = RunDir.named("demo", home)
    found.root.mkdir(parents=True)
    return found


def status(home: Path) -> RunStatus:
    (found,) = Runs(Store(home), "demo").read()
    return found


def train_record(step: int, seconds: float = 30.0) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "total_steps": 10,
        "loss": 2.0 / step,
        "tokens_per_second": 100.0 * step,
        "seconds": seconds,
    }


def test_a_lock_that_is_shared_is_held_until_its_last_holder_ends(tmp_path: Path) -> None:
    path = tmp_path / "flow"
    assert not is_held(path) and not path.exists()
    with Holder(path, shared=True) as one, Holder(path, shared=True) as other:
        assert is_held(path)
        one.kill()
        assert is_held(path)
        other.kill()
        assert not is_held(path)
    lock = FileLock(path)
    assert lock.acquire(0)
    assert is_held(path)
    lock.release()
    assert not is_held(path)


def test_states(run: RunDir, home: Path) -> None:
    assert (status(home).state, status(home).alive) == ("new", False)
    with Holder(run.flow_lock, shared=True) as flow:
        assert (status(home).state, status(home).alive) == ("new", True)
        first = run.new_attempt("train")
        assert status(home).state == "starting"
        with Holder(run.root / "lock"):
            assert status(home).state == "training"
            (first / "heartbeat").mkdir()
        assert status(home).state == "crashed"  # it waits for the retry
        second = run.new_attempt("train")
        assert status(home).state == "starting"
        (second / CRASH_FILE).write_text("{}")
        assert status(home).state == "crashed"
        third = run.new_attempt("train")
        flow.kill()
    assert (status(home).state, status(home).alive) == ("crashed", False)
    assert status(home).message == f"the log is {third / 'log.txt'}"
    write_result(third, Result(Status.FAILED, message="why"))
    assert (status(home).state, status(home).message) == ("failed", "why")


def test_while_watching_only_what_is_new_is_read(run: RunDir, home: Path) -> None:
    runs = Runs(Store(home), "demo")
    append_record(run.metrics_file, {"kind": "eval", "step": 0, "loss": 3.5})
    for step in (1, 2, 3):
        append_record(run.metrics_file, train_record(step))
    (before,) = runs.read()
    assert (before.step, before.total_steps, before.eval_loss) == (3, 10, 3.5)
    assert (before.tokens_per_second, before.seconds_left) == (None, None), "it does not train"
    size = run.metrics_file.stat().st_size
    other = json.dumps({"kind": "eval", "step": 0, "loss": 99.0})
    run.metrics_file.write_text(other.ljust(size - 1) + "\n")
    append_record(run.metrics_file, train_record(4, seconds=50.0))
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    with Holder(run.root / "lock"):
        (now,) = runs.read()
    assert (now.step, now.loss, now.eval_loss) == (4, 0.5, 3.5)
    assert (now.tokens_per_second, now.seconds_left) == (250.0, 6 * 30.0)


def test_a_resumed_run_is_where_it_resumed(run: RunDir, home: Path) -> None:
    for step in (4, 5, 6, 7, 8, 3):
        append_record(run.metrics_file, train_record(step, seconds=100.0 / step))
    with Holder(run.root / "lock"):
        now = status(home)
    assert (now.step, now.tokens_per_second) == (3, 300.0)
    assert now.seconds_left == pytest.approx(7 * 100 / 3)


def test_runs_come_and_go_while_all_are_watched(run: RunDir, home: Path) -> None:
    runs = Runs(Store(home))
    append_record(run.metrics_file, train_record(1))
    (home / "runs" / "another").mkdir()
    assert [(s.name, s.step) for s in runs.read()] == [("another", 0), ("demo", 1)]
    (home / "runs" / "another").rmdir()
    append_record(run.metrics_file, train_record(2))
    assert [(s.name, s.step) for s in runs.read()] == [("demo", 2)]
    with pytest.raises(
        RunError, match=r"there is no run another in .*; runs there: demo\. Start one with"
    ):
        Runs(Store(home), "another")


def test_the_command_watches_until_the_run_has_ended(run: RunDir, home: Path) -> None:
    attempt = run.new_attempt("train")
    append_record(run.metrics_file, train_record(1, seconds=100.0))
    with (
        Holder(run.root / "lock") as training,
        Command("status", "demo", "-w", DITTY_HOME=str(home), FORCE_COLOR="1") as command,
    ):
        assert "training" in command.until("15 min")  # 9 x 100 s
        append_record(run.metrics_file, train_record(2, seconds=100.0))
        assert "2/10" in command.until("13 min")
        write_result(attempt, Result(Status.FAILED, message="no more"))
        training.kill()
        code, text = command.end()
    assert code == 0
    assert "failed" in text and text.endswith(f"directory  {run.root}\nno more\n")


def test_ctrl_c_is_the_end_of_watching(run: RunDir, home: Path) -> None:
    with (
        Holder(run.root / "lock"),
        Command("status", "--watch", DITTY_HOME=str(home), FORCE_COLOR="1") as command,
    ):
        command.until("demo")
        command.process.send_signal(signal.SIGINT)
        code, text = command.end()
    assert code == 0 and "Traceback" not in text and "Aborted" not in text
