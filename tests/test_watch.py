"""What is read of a training process: levels of log lines, ranks that hang."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ditty.errors import Crashed
from flows.watch import StallWatch, level_of, what_ranks_do
from tests.processes import ROOT


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("WARNING ditty.training.checkpoint: set aside", (logging.WARNING, "set aside")),
        (
            "INFO ditty.training.trainer: training from step 0 to 9",
            (logging.INFO, "training from step 0 to 9"),
        ),
        ("[rank1]:ERROR ditty.worker: gone", (logging.ERROR, "gone")),
        ("INFO ditty.training.trainer: step 3/9 loss 1.25", (logging.DEBUG, "step 3/9 loss 1.25")),
        (
            "INFO ditty.training.trainer: step 3 held-out loss 1.2",
            (logging.INFO, "step 3 held-out loss 1.2"),
        ),
        (
            "Traceback (most recent call last):",
            (logging.INFO, "Traceback (most recent call last):"),
        ),
        ("WARNING: no logger", (logging.INFO, "WARNING: no logger")),
    ],
)
def test_level_of_a_line(line: str, expected: tuple[int, str]) -> None:
    assert level_of(line) == expected


class Ranks:
    """Heartbeats and a clock that a test sets."""

    def __init__(self, directory: Path):
        self.directory, self.now = directory, 1000.0
        self.stall = StallWatch(directory, clock=lambda: self.now)

    def beat(self, rank: int, phase: str, step: int) -> None:
        beat = {"pid": 10 + rank, "phase": phase, "step": step, "time": self.now}
        (self.directory / f"rank_{rank:05d}.json").write_text(json.dumps(beat))

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.stall.check()


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_a_rank_that_does_not_get_on_is_named(ranks: Ranks) -> None:
    ranks.beat(0, "step", 4)
    ranks.beat(1, "step", 4)
    ranks.after(0)
    ranks.beat(0, "step", 5)
    ranks.after(899)
    ranks.beat(0, "step", 6)
    with pytest.raises(Crashed, match=r"rank_00001 \(pid 11\) has been in phase step of step 4"):
        ranks.after(2)


def test_a_slow_step_sets_what_is_slow(ranks: Ranks) -> None:
    ranks.stall.slowest_step = 5.0
    ranks.beat(0, "step", 4)
    ranks.after(0)
    ranks.after(100)
    with pytest.raises(Crashed, match="at most 100 s were expected"):
        ranks.after(1)


@pytest.mark.fault("hung rank")
def test_fast_steps_leave_a_minute(ranks: Ranks, figure: Callable[[str], None]) -> None:
    ranks.stall.slowest_step = 0.01
    ranks.beat(0, "step", 4)
    ranks.after(0)
    ranks.after(60)
    with pytest.raises(Crashed):
        ranks.after(1)
    figure("fast steps, by default: 61 s to detection")


def test_a_checkpoint_may_take_an_hour(ranks: Ranks) -> None:
    ranks.stall.slowest_step = 0.01
    ranks.beat(0, "save", 4)
    ranks.after(0)
    ranks.after(3600)


def test_no_heartbeat_yet_is_no_stall(ranks: Ranks) -> None:
    ranks.after(0)
    ranks.after(1e6)


HANGING = """
import sys, threading, time
from pathlib import Path
from ditty import worker

def read_ahead():
    time.sleep(600)

def wait_for_a_peer(seconds):
    print("hangs", flush=True)
    time.sleep(seconds)

attempt, rank, registers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
if not registers:
    worker.show_stack_when_asked = lambda heartbeat: None
beat = worker._heartbeat(attempt, rank)
beat("step", 4)
threading.Thread(target=read_ahead, daemon=True).start()
wait_for_a_peer(600)
"""


class Hanging(ExitStack):
    """Processes with the worker's own heartbeats that do not get on."""

    def __init__(self, attempt: Path):
        super().__init__()
        self.attempt, self.children = attempt, []

    def start(self, registers: bool = True) -> "subprocess.Popen[str]":
        arguments = [str(self.attempt), str(len(self.children)), str(registers)]
        child = self.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", HANGING, *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self.callback(child.kill)
        assert child.stdout and child.stdout.readline() == "hangs\n"
        self.children.append(child)
        return child


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    with Hanging(tmp_path / "0001") as hanging:
        yield hanging


def test_the_report_says_what_each_rank_does(hanging: Hanging) -> None:
    waiting, stopped, dead = (hanging.start() for _ in range(3))
    stacks = hanging.attempt / "heartbeat/rank_00000.stack"
    stacks.write_text("Current thread 0x1 (most recent call first):\n  in an_earlier_answer\n\n")
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    dead.kill()
    dead.wait()
    now = 1000.0
    stall = StallWatch(hanging.attempt / "heartbeat", clock=lambda: now)
    stall.check()
    now += 901
    with pytest.raises(Crashed, match=r"rank_00000 \(pid \d+\) .* phase step of step 4") as caught:
        stall.check()
    zero, one, two = str(caught.value).split("\nrank_0000")[1:]
    assert "in wait_for_a_peer" in zero and "read_ahead" not in zero, "the thread that trains"
    assert "an_earlier_answer" not in zero
    assert zero.index("in wait_for_a_peer") < zero.index("in <module>")
    assert "phase step of step 4, stopped: it shows no stack" in one
    assert "gone: it shows no stack" in two
    assert waiting.poll() is None and stopped.poll() is None, "it only looked"
    assert "in read_ahead" in stacks.read_text(), "the file has all threads"


def test_no_signal_to_who_would_die_of_it(hanging: Hanging) -> None:
    """One that does not know the signal yet, and a stranger that has the number of a rank."""
    early, other = hanging.start(registers=False), hanging.start()
    path = hanging.attempt / "heartbeat/rank_00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid_start": 1.0}))
    told = what_ranks_do(path.parent)
    assert told.count("it shows no stack") == 2 and "gone" in told.splitlines()[-1]
    assert early.poll() is None and other.poll() is None
    assert not (path.parent / "rank_00001.stack").read_text()
