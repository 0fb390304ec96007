"""The log of a run's stages: of the newest attempt, and as it grows. Pure reading."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ditty.runs.rundir import RunDir
from ditty.runs.tail import LineTail

# What a terminal would obey (ESC among them) is shown as its code instead.
_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) != "\t"}


class LoggedStage(StrEnum):
    """The stages with processes of their own, so with logs; the others run in the flow's."""

    FETCH = "fetch"
    PREQUANTIZE = "prequantize"
    TRAIN = "train"
    EVALUATE = "evaluate"
    HARNESS = "harness"
    MERGE = "merge"
    GGUF = "gguf"


@dataclass(frozen=True)
class NoLog:
    """There is none yet."""


@dataclass(frozen=True)
class Attempt:
    """What follows is of this attempt.

    Attributes:
        began: nanoseconds since 1970; only to tell which of two is newer.
    """

    began: int
    stage: str
    directory: Path

    @property
    def log(self) -> Path:
        """Its log."""
        return self.directory / "log.txt"


@dataclass(frozen=True)
class Line:
    """A line of the log; no control character is in it but tabs."""

    text: str


Event = NoLog | Attempt | Line


def read_logs(
    run: RunDir, stage: LoggedStage | None = None, wait: Callable[[], None] | None = None
) -> Iterator[Event]:
    """The newest attempt and its lines.

    With `wait` it goes on, also with newer attempts, until neither a flow nor a training of the
    run is alive; a run without any log is waited for, unless it ends without one.

    Args:
        stage: of this stage only; None: of the one that began last.
        wait: called where there is nothing new; returns after a while. None: do not follow.
    """
    attempts = _attempts(run, stage)
    if not attempts:
        yield NoLog()
        attempts = _awaited(run, stage, wait) if wait else []
    following = attempts[-1] if attempts else None
    while following:
        yield following
        following = yield from _one(run, stage, following, wait)


def _attempts(run: RunDir, stage: LoggedStage | None) -> list[Attempt]:
    """Those with a log, by when they began."""
    found = []
    for name in [stage] if stage else LoggedStage:
        for directory in run.attempts(name):
            # Written once, before the log is: directories and logs change later on.
            job = directory / "job.json"
            if job.exists() and (directory / "log.txt").exists():
                found.append(Attempt(job.stat().st_mtime_ns, str(name), directory))
    return sorted(found, key=lambda a: (a.began, a.directory.name))


def _awaited(run: RunDir, stage: LoggedStage | None, wait: Callable[[], None]) -> list[Attempt]:
    """The first attempts that there are; empty where the run ended without one."""
    was_alive = False
    while True:
        # Asked before looking: what has ended by now has written all that it will.
        alive = run.is_alive()
        attempts = _attempts(run, stage)
        if attempts or (was_alive and not alive):
            return attempts
        was_alive = alive
        wait()


def _one(
    run: RunDir, stage: LoggedStage | None, attempt: Attempt, wait: Callable[[], None] | None
) -> Generator[Event, None, Attempt | None]:
    """The lines of an attempt; returns the one to go on with, or None at the run's end."""
    with LineTail(attempt.log) as tail:
        while True:
            # In this order, as in `_awaited`.
            alive = wait is not None and run.is_alive()
            newer = [a for a in _attempts(run, stage) if a.began > attempt.began] if wait else []
            ended = bool(newer) or not alive
            new = False
            for line in tail.read(last=ended):
                new = True
                yield Line(line.translate(_CONTROLS))
            if ended:
                return newer[0] if newer else None
            if wait and not new:
                wait()
