"""What is read of a training process: levels of log lines, ranks that hang."""

import json
import logging
from pathlib import Path

import pytest

from ditty.errors import Crashed
from flows.watch import StallWatch, level_of


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("WARNING ditty.checkpoint: set aside", (logging.WARNING, "set aside")),
        (
            "INFO ditty.trainer: training from step 0 to 9",
            (logging.INFO, "training from step 0 to 9"),
        ),
        ("[rank1]:ERROR ditty.worker: gone", (logging.ERROR, "gone")),
        ("INFO ditty.trainer: step 3/9 loss 1.25", (logging.DEBUG, "step 3/9 loss 1.25")),
        (
            "INFO ditty.trainer: step 3 held-out loss 1.2",
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


def test_fast_steps_leave_a_minute(ranks: Ranks) -> None:
    ranks.stall.slowest_step = 0.01
    ranks.beat(0, "step", 4)
    ranks.after(0)
    ranks.after(60)
    with pytest.raises(Crashed):
        ranks.after(1)


def test_a_checkpoint_may_take_an_hour(ranks: Ranks) -> None:
    ranks.stall.slowest_step = 0.01
    ranks.beat(0, "save", 4)
    ranks.after(0)
    ranks.after(3600)


def test_no_heartbeat_yet_is_no_stall(ranks: Ranks) -> None:
    ranks.after(0)
    ranks.after(1e6)
